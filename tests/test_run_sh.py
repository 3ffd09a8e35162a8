"""
run.sh: what it starts, seen by a python that writes down how it is called and only answers
questions about presets.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

from logs import start as starter

STAND_IN = """#!/bin/bash
case $1 in logs/start.py) exec {python} "$@" ;; esac
echo "$*" >> calls.txt
while [ $# -gt 0 ]; do
  case $1 in --run) run=$2 ;; --log_dir) logs=$2 ;; esac
  shift
done
[ -n "${{run:-}}" ] || exit 0
mkdir -p "${{logs:-logs}}/$run"
echo "{{}}" > "${{logs:-logs}}/$run/result.json"
"""
GET = "import sys\nopen('calls.txt', 'a').write(' '.join(['data/get.py', *sys.argv[1:]]) + '\\n')\n"


@pytest.fixture
def start(tmp_path):
    """
    Runs run.sh in an empty folder; returns its exit code, what it said, and the calls that it made.
    """
    for name in (".venv/bin", "logs", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "get.py").write_text(GET)
    for name in ("run.sh", "requirements.txt", "configs", "logs/start.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    ranks = "#!/bin/bash\necho torchrun $* >> calls.txt\n"
    for name, text in (("python", STAND_IN), ("torchrun", ranks)):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(text.format(python=sys.executable))
        program.chmod(0o755)
    done = hashlib.sha256((ROOT / "requirements.txt").read_bytes())
    (tmp_path / ".venv" / "installed").write_text(done.hexdigest())

    def start(*argv, **environment):
        calls = tmp_path / "calls.txt"
        calls.write_text("")
        paths = {"PYTHONPATH": str(ROOT), "NPROC": "0"}
        done = subprocess.run(
            ["./run.sh", *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | paths | environment,
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return start


def only(calls, script):
    return [call for call in calls if call.startswith(script)]


def test_phases_follow_each_other_for_each_seed_and_one_report_ends_them(start):
    code, said, calls = start("golf_cpu", "--steps", "3", SEEDS="1 2")
    assert code == 0, said
    trained = "train_gpt.py --config golf_cpu --run golf_cpu-s{0} --resume --seed {0} --steps 3"
    assert calls == [
        "data/get.py sample",
        trained.format(1),
        trained.format(2),
        "logs/score.py logs/golf_cpu-s1",
        "logs/score.py logs/golf_cpu-s2",
        "logs/report.py logs/golf_cpu-s1 logs/golf_cpu-s2 --out logs/report-golf_cpu",
    ]


def test_golf_scores_proves_and_submits_what_it_trained(start):
    code, said, calls = start("golf", SEEDS="1 2", NCA="1")
    assert code == 0, said
    trained = [call.split("--run ")[1].split()[0] for call in only(calls, "train_gpt.py")]
    assert trained == ["golf_cpu-nca-s1", "golf_cpu-nca-s2"]
    scored = "--modes mixture sliding --prove_bytes 16384"
    assert only(calls, "logs/score.py") == [f"logs/score.py logs/{run} {scored}" for run in trained]
    submitted = " ".join(f"logs/{run}" for run in trained)
    assert calls[-1] == f"logs/submit.py golf_non_record golf_cpu {submitted}"
    (trained,) = only(start("golf", GOLF="tiny_cpu")[2], "train_gpt.py")
    assert "--config tiny_cpu --run tiny_cpu-s1" in trained


def test_both_phases_have_the_model_and_the_folder_that_the_flags_say(start, tmp_path):
    flags = ("--dim", "256", "--log_dir", "elsewhere")
    code, said, calls = start("golf_cpu", *flags, NCA="yes", SEEDS="1")
    assert code == 0, said
    (first,), (second,) = only(calls, "pre_pre_train.py"), only(calls, "train_gpt.py")
    like = first.split("--like ")[1].split()[0]
    assert tomllib.loads((tmp_path / like).read_text())["dim"] == 256
    assert "--log_dir elsewhere --run golf_cpu-pre-s1" in first
    assert "--init_from elsewhere/golf_cpu-pre-s1" in second and "--dim 256" in second
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["start.py"]


def test_a_value_of_nca_that_means_nothing_is_refused_and_bad_flags_end_in_a_message(start):
    calls = start("golf_cpu", NCA="no", SEEDS="1")[2]
    assert only(calls, "train_gpt.py") and not only(calls, "pre_pre_train.py")
    code, said, calls = start("golf_cpu", NCA="2")
    assert code == 2 and "NCA=2" in said and not calls
    code, said, calls = start("golf_cpu", "--dim", "7")
    assert code == 2 and "run.sh: dim = 7" in said and "Traceback" not in said and not calls


@pytest.mark.parametrize(
    "folder, command",
    [
        ("data/sample", "sample"),
        ("data/sample4096", "sample --vocab 4096 --out data/sample4096"),
        ("data/fineweb10B", "fineweb10B --shards 24"),
        ("data/fineweb100B", "fineweb100B --shards 132"),
        ("data/slowrun", "slowrun"),
        ("data/golf_sp1024", "golf --variant sp1024"),
    ],
)
def test_the_data_of_a_folder_is_got_by_its_name(monkeypatch, folder, command):
    asked = []
    monkeypatch.setattr(starter.subprocess, "run", lambda words, **how: asked.append(words[1:]))
    starter.get_data(folder)
    assert asked == [["data/get.py", *command.split()]]


def test_data_of_ones_own_is_taken_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(starter.subprocess, "run", lambda words, **how: pytest.fail("got"))
    starter.get_data("mine/shards")
    assert "mine/shards is taken as it is" in capsys.readouterr().err


def test_a_finished_run_is_asked_again_so_that_other_flags_are_refused(start, tmp_path):
    """Python compares the flags; no ranks are started for that. Scores look for themselves."""
    (tmp_path / "logs" / "golf_cpu-s1").mkdir(parents=True)
    (tmp_path / "logs" / "golf_cpu-s1" / "result.json").write_text("{}")
    calls = start("golf_cpu", "--dim", "256", NPROC="2")[2]
    asked = [call for call in calls if "train_gpt.py" in call]
    assert asked == ["train_gpt.py --config golf_cpu --run golf_cpu-s1 --resume --seed 1 --dim 256"]
    ranks = "torchrun --standalone --nproc_per_node 2 -- logs/score.py logs/golf_cpu-s1"
    assert only(calls, "torchrun") == [ranks]


@pytest.mark.parametrize("flags", [("--seed", "4"), ("--seed=4",), ("--run", "x")])
@pytest.mark.parametrize("verb", ["golf_cpu", "remix", "golf", "study depth", ""])
def test_flags_that_break_the_names_of_runs_are_refused(start, verb, flags):
    code, said, calls = start(*verb.split(), *flags)
    study = verb in ("remix", "study depth")
    words = "--config TRACK --run x" if "x" in flags else "--seeds 4" if study else 'SEEDS="4"'
    assert code == 2 and words in said and not calls


def test_help_and_a_typo_need_nothing_installed(start, tmp_path):
    shutil.rmtree(tmp_path / ".venv")
    for word in ("--help", "-h", "help"):
        code, said, _ = start(word)
        assert code == 0 and "./run.sh TRACK " in said and "set -e" not in said
    code, said, _ = start("golf_cpuu")
    assert code == 2 and "'golf_cpuu'" in said and "golf_cpu " in said
    code, said, _ = start("study")
    assert code == 2 and "remix_8xh100" in said
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    "words, environment, said",
    [
        ("dry_run typo", {}, "no preset is called 'typo'; presets: "),
        ("dry_run remix_m typo", {}, "'typo'"),
        ("dry_run", {"TRACK": "typo"}, "'typo'"),
        ("script typo > x.py", {}, "'typo'"),
        ("golf", {"GOLF": "typo"}, "'typo'"),
        ("", {"CPU_TRACK": "typo"}, "'typo'"),
        ("--steps 3", {"TRACK": "typo", "NPROC": "1"}, "'typo'"),
        ("tiny_cpu typo --steps 3", {}, "'typo'"),
        ("study typo", {}, "no study is called 'typo'; studies: centering "),
        ("sample nosuch hi", {}, "no run nosuch: no such file or folder"),
        ("report nosuch", {}, "no run nosuch"),
        ("report logs/* nosuch-*", {}, "no run nosuch-*"),
        ("report embeddings nosuch --tokens 5", {}, "no run nosuch"),
        ("submit nosuch x logs", {}, "no track is called 'nosuch'; tracks: golf "),
        ("submit golf x logs nosuch", {}, "no run nosuch"),
        ("test tests/nosuch.py::test_x -x", {}, "no test tests/nosuch.py"),
        ("report", {}, "usage: ./run.sh report RUN..."),
        ("submit", {}, "usage: ./run.sh submit TRACK NAME RUN..."),
    ],
)
def test_a_name_of_nothing_is_refused_before_anything_is_installed(
    start, tmp_path, words, environment, said
):
    shutil.rmtree(tmp_path / ".venv")
    code, text, calls = start(*words.split(), **environment)
    assert code == 2 and said in text and text.count("\n") == 1 and not calls, text
    assert not (tmp_path / ".venv").exists()


def test_what_is_there_is_not_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "mine"
    file.touch()
    for words, answer in (
        (["dry_run", "configs/tiny_cpu.toml", "on_cpu", "--json"], ("dry_run", 2, "tiny_cpu")),
        (["dry_run", str(file)], ("dry_run", 2, str(file))),
        (["study", str(file), "--seeds", "1"], ("study", 2, str(file))),
        (["report", "logs/*.py", "--metric", "nothing"], ("report", 1, "")),
        (["report", "embeddings", "logs", "--tokens", "5"], ("report", 1, "")),
        (["submit", "golf", "x", "logs", "--date", "nothing"], ("submit", 1, "")),
        (["script", "remix_m", "on_cpu", "--keep", "lr"], ("script", 1, "")),
        (["test", "tests/test_model.py::test_x", "-k", "nothing"], ("test", 1, "")),
        (["sample", "-h"], ("sample", 2, "-h")),
    ):
        assert starter.asked(words, []) == answer


def test_the_tracks_of_run_sh_are_those_of_submit():
    from logs import submit

    assert set(starter.TRACKS) == set(submit.TRACKS)


def test_without_locks_as_on_windows_nothing_is_locked(tmp_path):
    code = (
        f"import sys; sys.modules['fcntl'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
        "from logs.start import turn\nwith turn('lock', '') as file:\n print(file.read() == '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_flags_alone_are_the_main_jobs_and_a_path_is_a_track(start, tmp_path):
    (call,) = only(start("--steps", "3")[2], "train_gpt.py")
    assert call == "train_gpt.py --config golf_cpu --run golf_cpu-s1 --resume --seed 1 --steps 3"
    (call,) = only(start("configs/tiny_cpu.toml")[2], "train_gpt.py")
    assert call.startswith("train_gpt.py --config tiny_cpu --run tiny_cpu-s1 ")
    (tmp_path / "of mine").mkdir()
    shutil.copy(ROOT / "configs" / "tiny_cpu.toml", tmp_path / "of mine" / "x.toml")
    (call,) = only(start("of mine/x.toml")[2], "train_gpt.py")
    assert call.startswith("train_gpt.py --config of mine/x.toml --run x-s1 ")


def test_a_sample_a_report_and_a_dry_run_are_one_program_each(start, tmp_path):
    (tmp_path / "logs" / "x").mkdir()
    for words, call in (
        ("sample logs/x The --top_k 5", "logs/score.py sample logs/x --prompt=The --top_k 5"),
        ("sample logs/x", "logs/score.py sample logs/x --prompt="),
        ("sample logs/x --tokens 5", "logs/score.py sample logs/x --tokens 5"),
        ("sample logs/x --top_k=5", "logs/score.py sample logs/x --top_k=5"),
        ("sample logs/x -h", "logs/score.py sample logs/x -h"),
        ("sample logs/x -Well, --seed 2", "logs/score.py sample logs/x --prompt=-Well, --seed 2"),
        ("report logs/x --metric val_bpb", "logs/report.py logs/x --metric val_bpb"),
        ("submit golf tiny_cpu logs/x", "logs/submit.py golf tiny_cpu logs/x"),
        ("dry_run --json", "logs/dry_run.py --config remix_m --json"),
        ("dry_run tiny_cpu", "logs/dry_run.py --config tiny_cpu"),
    ):
        code, said, calls = start(*words.split())
        assert code == 0 and calls == [call], said
    assert start("sample", "logs/x", "-- said he")[2][0].endswith(" --prompt=-- said he")
    code, said, calls = start("sample")
    assert code == 2 and "usage: ./run.sh sample RUN" in said and not calls


@pytest.mark.parametrize("node", [0, 1])
def test_every_node_starts_the_same_and_one_scores_and_reports(start, tmp_path, node):
    """Whatever lies in its own logs/; each start meets at a port of its own."""
    if node == 0:
        (tmp_path / "logs" / "tiny_cpu-s1").mkdir()
        (tmp_path / "logs" / "tiny_cpu-s1" / "result.json").write_text("{}")
    nodes = {"NNODES": "2", "NODE_RANK": str(node), "NPROC": "8", "WAIT_SECONDS": "60"}
    where = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    code, said, calls = start("tiny_cpu", SEEDS="1 2", **nodes, **where)
    assert code == 0, said
    where = f"torchrun --nnodes 2 --node_rank {node} --master_addr 10.0.0.1 --master_port"
    conf = "--rdzv_conf timeout=60 --nproc_per_node 8 -- train_gpt.py --config tiny_cpu"
    begun = [
        f"{where} {1233 + seed} {conf} --run tiny_cpu-s{seed} --resume --seed {seed}"
        for seed in (1, 2)
    ]
    if node == 0:
        alone = "torchrun --standalone --nproc_per_node 8 -- logs/score.py logs"
        begun += [f"{alone}/tiny_cpu-s{seed}" for seed in (1, 2)]
    assert only(calls, "torchrun") == begun
    assert bool(only(calls, "logs/report.py")) == (node == 0)


@pytest.mark.parametrize("verb", ["depth", "study depth"])
def test_a_study_gets_its_data_trains_on_ranks_and_reports(start, verb):
    code, said, calls = start(*verb.split(), "--seeds", "1", "2", "--log_dir", "mine", NPROC="2")
    assert code == 0, said
    flags = "logs/study.py depth --seeds 1 2 --log_dir mine --only"
    trained = f"torchrun --standalone --nproc_per_node 2 -- {flags} train"
    assert calls == [f"{flags} get", trained, f"{flags} report"]


def test_a_study_that_is_only_asked_starts_no_ranks(start):
    for words in ("--arms list", "--arms=list", "--help", "--only report", "--only=report"):
        calls = start("study", "nca", *words.split(), NPROC="8")[2]
        assert calls == [f"logs/study.py nca {words}"]
    for words in ("--only train", "--only=train"):  # which asks nothing
        calls = start("study", "nca", *words.split(), NPROC="8")[2]
        ranks = "torchrun --standalone --nproc_per_node 8 --"
        assert calls == [f"{ranks} logs/study.py nca {words}"]


EIGHT = "".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-{i}a{i})\n" for i in range(8))
CUT = "GPU 0: NVIDIA A100 (UUID: GPU-0a0)\n" + "".join(
    f"  MIG 1g.5gb     Device  {i}: (UUID: MIG-{i})\n" for i in range(7)
)


@pytest.mark.parametrize(
    "listing, visible, count",
    [
        ("", None, 0),
        (EIGHT, None, 8),
        (EIGHT, "2,3", 2),
        (EIGHT, "", 0),
        (EIGHT, "-1", 0),
        (EIGHT, "0,1,-1,2", 2),
        (EIGHT, "0,9", 1),
        (EIGHT, "GPU-3a3", 1),
        (CUT, None, 1),
        (CUT, "MIG-1,MIG-2", 1),
        ("", "0,1", 0),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
            None,
            0,
        ),
    ],
)
def test_as_many_processes_as_gpus_that_they_can_see(listing, visible, count):
    assert starter.gpus(listing, visible) == count


def test_requirements_are_installed_by_one_process_of_those_that_share_the_folder(
    tmp_path, monkeypatch
):
    """
    Three nodes start at once: one pip; another file, another pip; one that was killed is no
    obstacle.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requirements.txt").write_text("torch\n")
    pip = tmp_path / ".venv" / "bin" / "python"
    pip.parent.mkdir(parents=True)
    pip.write_text(
        "#!/bin/bash\n"
        '[ "$3" != --version ] || exit 0\n'
        "sleep 0.3; echo $* >> pip.txt; [ ! -e fails ]\n"
    )
    pip.chmod(0o755)

    def nodes(count):
        begun = [
            subprocess.Popen(
                [sys.executable, ROOT / "logs" / "start.py", "environment"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(count)
        ]
        said = [process.communicate()[0] for process in begun]
        pips = (tmp_path / "pip.txt").read_text().splitlines()
        return [process.returncode for process in begun], "".join(said), len(pips)

    codes, said, pips = nodes(3)
    assert codes == [0, 0, 0] and pips == 1 and "waiting" in said
    assert nodes(1) == ([0], "", 1)
    (tmp_path / "requirements.txt").write_text("torch\nnumpy\n")
    (tmp_path / "fails").touch()
    codes, said, pips = nodes(1)
    assert (
        codes == [2]
        and pips == 2
        and "requirements.txt ended with code 1" in said
        and "Traceback" not in said
    )
    (tmp_path / "fails").unlink()
    assert nodes(1)[::2] == ([0], 3)


@pytest.mark.parametrize("kind", ["without pip", "of a Python that is gone"])
def test_a_venv_that_was_half_made_is_made_again(tmp_path, monkeypatch, kind):
    """Its making was killed before pip came, or failed: Debian without python3-venv has no pip."""
    monkeypatch.chdir(tmp_path)
    Path("requirements.txt").write_text("")
    python = Path(".venv/bin/python")
    if kind == "without pip":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], check=True)
    else:
        python.parent.mkdir(parents=True)
        python.symlink_to("/nowhere/python3")
    assert not starter.has_pip(python)
    with monkeypatch.context() as older:
        older.setattr(sys, "version_info", (3, 10, 1))
        with pytest.raises(starter.UserError, match="3.11 or newer is needed"):
            starter.environment()
    starter.environment()
    assert starter.has_pip(python) and Path(".venv/installed").read_text()
    monkeypatch.setattr(starter.subprocess, "run", lambda *words, **how: pytest.fail("started"))
    starter.environment()  # what is installed takes no process


def test_a_turn_waits_with_a_message_and_a_limit(tmp_path, capsys):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from logs.start import turn\n"
        "with turn('lock', ''):\n print(flush=True)\n input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    with (
        pytest.raises(starter.Overdue, match="WAIT_SECONDS"),
        starter.turn(tmp_path / "lock", "at work", 0.2),
    ):
        raise AssertionError("it was locked")
    assert "another process is at work: waiting" in capsys.readouterr().out
    threading.Timer(0.3, other.kill).start()
    with starter.turn(tmp_path / "lock", "at work", 60):
        assert other.wait() == -9
