"""run.sh: what it starts, seen by a python that writes down how it is called and only answers questions about presets."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT

STAND_IN = """#!/bin/bash
if [ "$1" = - ]; then exec {python} "$@"; fi
echo "$*" >> calls.txt
while [ $# -gt 0 ]; do
  case $1 in --run) run=$2 ;; --log_dir) logs=$2 ;; esac
  shift
done
[ -z "${{run:-}}" ] || {{ mkdir -p "${{logs:-logs}}/$run"; echo "{{}}" > "${{logs:-logs}}/$run/result.json"; }}
"""


@pytest.fixture
def start(tmp_path):
    """Runs run.sh in an empty folder; returns its exit code, what it said, and the calls that it made."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt", "configs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    done = subprocess.run(["sha256sum", "requirements.txt"], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / ".venv" / "installed").write_text(done.stdout.split()[0])

    def start(*argv, **environment):
        calls = tmp_path / "calls.txt"
        calls.write_text("")
        done = subprocess.run(["./run.sh", *argv], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT), "NPROC": "0"} | environment)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return start


def only(calls, script):
    return [call for call in calls if call.startswith(script)]


def test_golf_submits_the_runs_that_it_trained_and_not_the_main_jobs(start, tmp_path):
    (tmp_path / "logs" / "golf_cpu-s1").mkdir(parents=True)  # the main job's, with other scores
    (tmp_path / "logs" / "golf_cpu-s1" / "result.json").write_text("{}")
    code, said, calls = start("golf", SEEDS="1 2", NCA="1")
    assert code == 0, said
    trained = [call.split("--run ")[1].split()[0] for call in only(calls, "train_gpt.py")]
    assert trained == ["golf-golf_cpu-nca-s1", "golf-golf_cpu-nca-s2"]
    submitted = " ".join(f"logs/{run}" for run in trained)
    assert only(calls, "logs/submit.py") == [f"logs/submit.py golf_non_record golf_cpu {submitted}"]
    (trained,) = only(start("golf", SEEDS="1")[2], "train_gpt.py")
    assert "--run golf-golf_cpu-s1" in trained and "--prove_bytes" in trained


def test_both_phases_have_the_model_and_the_folder_that_the_flags_say(start, tmp_path):
    code, said, calls = start("golf_cpu", "--dim", "256", "--log_dir", "elsewhere", NCA="yes", SEEDS="1")
    assert code == 0, said
    (first,), (second,) = only(calls, "pre_pre_train.py"), only(calls, "train_gpt.py")
    like = first.split("--like ")[1].split()[0]
    assert tomllib.loads((tmp_path / like).read_text())["dim"] == 256
    assert "--log_dir elsewhere --run golf_cpu-pre-s1" in first
    assert "--init_from elsewhere/golf_cpu-pre-s1" in second and "--dim 256" in second
    assert not (tmp_path / "logs").exists()


def test_a_value_of_nca_that_means_nothing_is_refused_and_bad_flags_end_in_a_message(start):
    calls = start("golf_cpu", NCA="no", SEEDS="1")[2]
    assert only(calls, "train_gpt.py") and not only(calls, "pre_pre_train.py")
    code, said, calls = start("golf_cpu", NCA="2")
    assert code == 2 and "NCA=2" in said and not calls
    code, said, calls = start("golf_cpu", "--dim", "7")
    assert code == 2 and "error:" in said and "Traceback" not in said and not calls


def test_centering_gets_the_data_of_one_scale_or_tabulates_another_folder(start):
    code, said, calls = start("centering", "--scales", "centering_cpu", "centering_16m,dim=32", "tiny_cpu,data=data/slowrun",
                              "--seeds", "1", "--log_dir", "logs/mine")
    assert code == 0, said
    got = [call.split()[1] for call in only(calls, "data/get.py")]
    assert got == ["sample", "fineweb100B", "slowrun"]
    assert only(calls, "logs/centering.py tables") == ["logs/centering.py tables logs/mine --out logs/report-mine"]
    code, said, calls = start("centering", "--seeds", "1")
    assert only(calls, "data/get.py") == ["data/get.py sample --vocab 4096 --out data/sample4096"]
    assert only(calls, "logs/centering.py tables") == ["logs/centering.py tables logs/centering --out logs/report-centering"]
    code, said, calls = start("centering", "--scales", "centering_cpu,width=3")
    assert code != 0 and "width" in said and not only(calls, "logs/centering.py")
