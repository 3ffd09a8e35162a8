"""logs/pack.py and logs/submit.py: a packed run is the run, and no submission passes that a
reviewer would stop.

Three seeds of a tiny model on the shipped text are run once; each refusal is tested on a copy that
is damaged.
"""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forks import ROOT
from helpers import tg, write_shard
from scipy import stats

from logs import pack, report, submit

CONFIG = """
track = "golf"
data = "sample"
tokenizer = "sample/tokenizer.model"
vocab = 1024
doc_token = 1
val_tokens = 0
epochs = 0
shuffle = 1
steps = 12
batch_tokens = 512
micro_tokens = 512
seq_len = 128
eval_every = 6
depth = 1
dim = 32
heads = 2
device = "cpu"
dtype = "float32"
compile = 0
save_last = 0

[rule]
metric = "roundtrip_val_bpb"
target = 4.0
margin = 0.00296
p = 0.01
max_seconds = 600
max_bytes = 16000000
"""
NAME, DATE = "Tiny_Steps", "2026-11-22"


@pytest.fixture(scope="module", autouse=True)
def pack_once():
    """Packing takes a second and gives the same for the same files: once is enough here."""
    plain, packed = pack.pack, {}

    def remembered(paths, root=ROOT):
        key = (root, *paths)
        packed[key] = packed.get(key) or plain(paths, root)
        return packed[key]

    pack.pack = remembered
    yield
    pack.pack = plain


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    """train_gpt.py packed, as the command line does it."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    with contextlib.redirect_stdout(io.StringIO()):
        assert pack.main(["--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def work(server, tmp_path_factory):
    """A folder with some of the shipped text, the config, and logs/ of seeds 1, 2, 3."""
    folder = tmp_path_factory.mktemp("work")
    whole = tmp_path_factory.mktemp("shipped") / "sample"
    subprocess.run(
        [sys.executable, ROOT / "data/get.py", "sample", "--out", whole],
        check=True,
        capture_output=True,
    )
    (folder / "sample").mkdir()
    for name, documents in (("sample_train_000001.bin", 40), ("sample_val_000000.bin", 3)):
        tokens = np.fromfile(whole / name, "<u2")[512:]
        write_shard(folder / "sample" / name, tokens[: np.flatnonzero(tokens == 1)[documents]])
    for name in ("tokenizer.model", "manifest.json"):
        shutil.copy(whole / name, folder / "sample")
    (folder / "tiny.toml").write_text(CONFIG)
    for seed in (1, 2, 3):
        ended = server.run(
            "--config", "tiny.toml", "--seed", seed, "--run", f"tiny-s{seed}", cwd=folder
        )
        assert ended.code == 0, ended.text
    return folder


@pytest.fixture(scope="module")
def packed_run(work, packed_file, tmp_path_factory):
    """Seed 1 once more, from the packed file in a process of its own, far from the sources."""
    folder = tmp_path_factory.mktemp("packed_run")
    shutil.copytree(work / "sample", folder / "sample")
    shutil.copy(work / "tiny.toml", folder)
    command = [
        sys.executable,
        packed_file,
        "--config",
        "tiny.toml",
        "--seed",
        "1",
        "--run",
        "tiny-s1",
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "logs/tiny-s1"


@pytest.fixture
def copy(work, tmp_path, monkeypatch):
    """A copy of the working directory that a test may damage, as the current directory."""
    shutil.copytree(work, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


RUNS = tuple(f"logs/tiny-s{seed}" for seed in (1, 2, 3))


def call(capsys, *argv, track: str = "golf", runs=RUNS) -> tuple[int, str, str]:
    capsys.readouterr()
    code = submit.main([track, NAME, *runs, "--date", DATE, *argv])
    return code, *capsys.readouterr()


def refused(capsys, *words, **how) -> str:
    """The submission is refused with one message that says all the words, and leaves nothing
    behind.
    """
    before = sorted(Path().rglob("*"))
    code, out, err = call(capsys, *how.pop("argv", ()), **how)
    assert code == 2 and not out, out
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("  - ")]
    hits = [line for line in lines if all(word in line for word in words)]
    assert hits, err
    assert all("; " in line and ": " in line for line in lines)  # where: what; what to do
    assert sorted(Path().rglob("*")) == before
    return err


def result(run: str) -> dict:
    return json.loads(Path(run, "result.json").read_text())


def edit(run: str, **changes) -> None:
    """Change keys of a result.json."""
    Path(run, "result.json").write_text(json.dumps(result(run) | changes))


def set_config(changes: dict, runs=RUNS) -> None:
    """Change config.toml, log.txt and result.json alike, as if the runs had been made so. A key
    `rule.target` is `target` in the table [rule].
    """
    for run in map(Path, runs):
        old = (run / "config.toml").read_text()
        new = old
        for name, value in changes.items():
            table, _, key = name.rpartition(".")
            start = new.index(f"[{table}]") if table else 0
            line = re.compile(rf"^{key} = .*$", re.M)
            changed, count = line.subn(f"{key} = {json.dumps(value)}", new[start:], count=1)
            assert count == 1
            new = new[:start] + changed
        (run / "config.toml").write_text(new)
        log, body = (run / "log.txt").read_text(), old.split("\n", 1)[1]
        assert body in log
        (run / "log.txt").write_text(log.replace(body, new.split("\n", 1)[1]))
        cfg = tg.Config(**tg.read_toml(run / "config.toml"))
        edit(str(run), config_sha256=tg.config_hash(cfg), seed=cfg.seed)


########################################
#                Packing               #
########################################


def test_a_packed_run_is_the_run(work, packed_run, packed_file):
    """Every logged number of training, the artifact to the byte, and the source that it logs and
    counts: its own.
    """
    plain = work / "logs/tiny-s1"
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, packed_run)
    ]
    times = {"train_time_ms", "wall_time_s", "eval_time_s", "tok_s"}
    one, other = (
        [{k: v for k, v in row.items() if k not in times} for row in both] for both in rows
    )
    assert one == other and len([row for row in one if row["kind"] == "train"]) == 12
    assert (plain / "model.nrx").read_bytes() == (packed_run / "model.nrx").read_bytes()
    found = result(packed_run)
    assert found["code_bytes"] == packed_file.stat().st_size
    assert found["total_bytes"] == found["code_bytes"] + (packed_run / "model.nrx").stat().st_size
    assert (
        (packed_run / "log.txt")
        .read_text()
        .startswith(pack.text_in(packed_file.read_bytes()) + "\n" + "=" * 100 + "\n")
    )
    assert packed_file.stat().st_size < (ROOT / "train_gpt.py").stat().st_size / 2


def test_a_packed_file_answers_like_its_program(packed_file, server):
    """Help (made of comments in the source), errors, presets of the working directory."""

    def both(*argv):
        ran = [
            server.run(*argv, cwd=ROOT, file=program)
            for program in (ROOT / "train_gpt.py", packed_file)
        ]
        words = [
            re.sub(r"\S*train_gpt.py", "PROGRAM", " ".join(r.text.replace("│", " ").split()))
            for r in ran
        ]
        assert ran[0].code == ran[1].code and words[0] == words[1]
        return words[0]

    assert "decay per step of an exponential moving average of the weights" in both("--help")
    assert "no such file and no such preset" in both("--config", "nothing")


def test_a_packed_module_is_a_program_too(work, packed_file, server, tmp_path):
    """Scores and a proof, which starts the scorer again in a process of its own, as unpacked."""
    found = []
    for name, program in (("plain", ROOT / "logs/score.py"), ("packed", packed_file)):
        run = shutil.copytree(work / "logs/tiny-s1", tmp_path / name / "tiny-s1")
        module = ("logs.score",) if program == packed_file else ()
        argv = (run, "--modes", "sliding", "--stride", 64, "--prove_bytes", 100)
        ended = server.run(*module, *argv, cwd=work, file=program)
        assert ended.code == 0, ended.text
        found.append(result(run))
    assert found[0]["sliding_val_bpb"] == found[1]["sliding_val_bpb"] < 5
    assert found[0]["decoded_bpb"] == found[1]["decoded_bpb"] and found[1]["proven_bytes"] == 100


@pytest.mark.parametrize(
    "name", ["train_gpt.py", "logs/score.py", "pre_pre_train.py", "logs/dry_run.py"]
)
def test_packing_keeps_every_token_of_the_code(name):
    """What is left are the tokens of the source, in their order; only comments, docstrings and
    layout are gone.
    """
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}

    def code(source: str) -> list[str]:
        """All tokens but those of layout and strings that are statements."""
        found, fresh = [], True
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if (
                token.type not in layout
                and not (fresh and token.type == tokenize.STRING)
                and token.string != "pass"
            ):
                found.append(token.string)
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                fresh = token.type in layout
        return found

    source = (ROOT / name).read_text()
    small = pack.minify(source)
    assert code(small) == code(source) and len(small) < 0.85 * len(source)


def test_minifying_keeps_what_python_allows():
    """Strings that look like comments, spaces that matter, docstrings as the only body, lines that
    go on.
    """
    source = '''"""Doc."""
import os  # gone
def f(a, *, b = "# no comment"):
    """Only a docstring."""
class C:
    "doc"
    x = 1 if os else -1; y = not(x)
def g(x) :
    """Doc
    over lines."""
    if x :  # gone

        return f"{x!r:>{10}} # stays {'a' 'b'}" + """
   kept # as it is
"""
    return [1, # gone
            2] if x is not None else (yield)
'''
    small = pack.minify(source)
    assert "gone" not in small and "Doc" not in small and "\n   kept # as it is\n" in small
    bare = ast.parse(source)
    bare.body = bare.body[1:]
    bare.body[1].body = [ast.Pass()]
    bare.body[2].body = bare.body[2].body[1:]
    bare.body[3].body = bare.body[3].body[1:]
    assert ast.dump(ast.parse(small)) == ast.dump(bare)


def test_unpacking_runs_nothing_and_gives_every_module(packed_file, tmp_path, capsys):
    assert set(pack.unpack(pack.text_in(packed_file.read_bytes()))) == {"train_gpt", "logs.score"}
    assert pack.main(["--unpack", str(packed_file), "--out", str(tmp_path / "shown")]) == 0
    assert "class GPT(Declaring):" in (tmp_path / "shown/train_gpt.py").read_text()
    assert pack.main(["--unpack", str(ROOT / "run.sh"), "--out", str(tmp_path / "no")]) == 2
    assert "no file that logs/pack.py wrote" in capsys.readouterr().err
    assert pack.main(["--out", str(ROOT / "packed.py")]) == 2
    assert "a folder of its own" in capsys.readouterr().err


########################################
#              Submission              #
########################################


def test_a_golf_folder_holds_all_that_is_asked_for_and_runs(copy, capsys, server):
    """Everything that the leaderboard asks for, with the numbers of the runs, and a program that
    runs from inside.
    """
    code, out, err = call(
        capsys, "--author", "A. Person", "--github_id", "aperson", "--blurb", "Twelve steps."
    )
    assert code == 0, err
    place = copy / "records/track_10min_16mb" / f"{DATE}_{NAME}"
    names = {
        "README.md",
        "submission.json",
        "train_gpt.py",
        "config.toml",
        "source",
        *(f"train_seed{s}.log" for s in (1, 2, 3)),
    }
    assert {p.name for p in place.iterdir()} == names and list(place.parent.iterdir()) == [place]
    facts = json.loads((place / "submission.json").read_text())
    for key in (
        "author",
        "github_id",
        "name",
        "blurb",
        "date",
        "val_loss",
        "val_bpb",
        "bytes_total",
        "bytes_code",
    ):
        assert facts[key], key
    scores = [result(run)["roundtrip_val_bpb"] for run in RUNS]
    assert facts["val_bpb"] == pytest.approx(np.mean(scores)) and facts[
        "val_bpb_std"
    ] == pytest.approx(np.std(scores, ddof=1))
    assert (
        facts["seeds"] == [1, 2, 3] and facts["seed_results"]["2"]["roundtrip_val_bpb"] == scores[1]
    )
    test = stats.ttest_1samp(scores, 4.0 - 0.00296, alternative="less")
    assert facts["test"]["p"] == pytest.approx(test.pvalue) and facts["test"]["t"] == pytest.approx(
        -test.statistic
    )
    assert facts["bytes_code"] == (place / "train_gpt.py").stat().st_size
    assert facts["bytes_total"] == facts["bytes_code"] + max(
        Path(r, "model.nrx").stat().st_size for r in RUNS
    )
    text = (place / "README.md").read_text()
    for word in (
        f"{scores[0]:.5f}",
        f"{facts['val_bpb']:.5f}",
        f"{facts['test']['p']:.4g}",
        "sd, n - 1",
        "0 of these",
    ):
        assert word in text, word
    for seed in (1, 2, 3):
        assert (place / f"train_seed{seed}.log").read_bytes() == (
            copy / f"logs/tiny-s{seed}/log.txt"
        ).read_bytes()
    programs = [place / "source" / name for name in pack.PROGRAMS]
    sources = pack.modules_of(programs, place / "source")
    shipped = pack.text_in((place / "train_gpt.py").read_bytes())
    assert pack.pack(sources, place / "source") == shipped
    ran = server.run(
        "--config",
        "config.toml",
        "--seed",
        2,
        "--data",
        "../../../sample",
        "--tokenizer",
        "../../../sample/tokenizer.model",
        "--run",
        "again",
        "--log_dir",
        copy / "again",
        cwd=place,
        file="train_gpt.py",
    )
    assert ran.code == 0, ran.text
    assert (
        json.loads((copy / "again/again/result.json").read_text())["roundtrip_val_bpb"] == scores[1]
    )
    argv = ("logs.score", copy / "again/again", "--modes", "chunked", "--prove_bytes", 50)
    ran = server.run(*argv, cwd=place, file="train_gpt.py")
    assert ran.code == 0, ran.text
    assert result(copy / "again/again")["proven_bytes"] == 50
    assert "train_gpt.py logs.score logs/again\n" in text
    shutil.rmtree(copy / "again")
    err = refused(capsys, "exists", "choose another name")
    assert "1 found" in err


def test_a_packed_run_ships_the_file_that_ran(copy, packed_run, packed_file, capsys):
    shutil.copytree(packed_run, copy / "packed/tiny-s1")
    code, _, err = call(capsys, track="golf_non_record", runs=["packed/tiny-s1"])
    assert code == 0, err
    place = copy / "records/track_non_record_16mb" / f"{DATE}_{NAME}"
    assert (place / "train_gpt.py").read_bytes() == packed_file.read_bytes()
    refused(
        capsys,
        "logs/tiny-s2/log.txt",
        "not the source of the other logs",
        runs=["packed/tiny-s1", *RUNS[1:]],
    )


def test_folders_of_speedrun_and_slowrun_hold_readable_source(copy, capsys, monkeypatch):
    """One .txt a run, the readable source; no bytes are counted."""
    monkeypatch.setitem(submit.TRACKS, "speedrun", replace(submit.TRACKS["speedrun"], val_tokens=0))
    set_config(
        {
            "track": "speedrun",
            "rule.metric": "val_loss",
            "rule.target": 9.0,
            "rule.margin": 0.0,
            "rule.max_seconds": 0.0,
            "rule.max_bytes": 0,
        }
    )
    code, _, err = call(capsys, track="speedrun")
    assert code == 0, err
    place = copy / "records/track_1_short" / f"{DATE}_{NAME}"
    assert {p.name for p in place.iterdir()} == {
        "README.md",
        "submission.json",
        "train_gpt.py",
        "config.toml",
        *(f"tiny-s{s}.txt" for s in (1, 2, 3)),
    }
    assert (place / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert (
        "ttest_1samp" in (place / "README.md").read_text()
        and "train_time_s" in (place / "README.md").read_text()
    )
    # averages over epochs are the scorer's, so its source is shipped
    set_config({"track": "slowrun", "rule.target": 0.0, "rule.p": 0.0, "average_epochs": 2})
    code, _, err = call(capsys, track="slowrun_tiny")
    assert code == 0, err
    shipped = copy / "records/slowrun_tiny" / f"{DATE}_{NAME}/logs/score.py"
    assert shipped.read_bytes() == (ROOT / "logs/score.py").read_bytes()
    assert (
        "asks for no test"
        in (copy / "records/slowrun_tiny" / f"{DATE}_{NAME}/README.md").read_text()
    )
    # beside a script with the trainer that it imports, as the script is not one
    program = '"""\norigin: nanoremix x, ...\n"""\n'
    for run in RUNS:
        log = (copy / run / "log.txt").read_text()
        head = submit.head_of(log)
        (copy / run / "log.txt").write_text(program + "\n" + log.removeprefix(head))
        edit(copy / run, code_bytes=len(program))
    shutil.rmtree(copy / "records")
    code, _, err = call(capsys, track="slowrun_tiny")
    assert code == 0, err
    place = copy / "records/slowrun_tiny" / f"{DATE}_{NAME}"
    assert (place / "train_gpt.py").read_text() == program
    for name in ("train_gpt.py", "logs/score.py"):
        assert (place / "scorer" / name).read_bytes() == (ROOT / name).read_bytes()
    assert " scorer/logs/score.py logs/again" in (place / "README.md").read_text()
    program = [sys.executable, place / "scorer/logs/score.py", "sample", "--help"]
    assert b"--temperature" in subprocess.run(program, capture_output=True).stdout
    monkeypatch.setitem(
        submit.TRACKS, "slowrun_tiny", replace(submit.TRACKS["slowrun_tiny"], max_train_tokens=1000)
    )
    refused(capsys, "sample: ", "training tokens, 1000 are allowed", track="slowrun_tiny")


def test_folder_of_track_3_has_its_logs_and_the_statistic_at_every_validation(
    copy, capsys, monkeypatch
):
    """Their names and lines, which logs/report.py reads again; another model is refused."""
    track = replace(submit.TRACKS["track_3"], val_tokens=0)
    monkeypatch.setitem(submit.TRACKS, "track_3", track)
    rule = {"rule.metric": "val_loss", "rule.target": 9.0, "rule.margin": 0.0}
    rule |= {"rule.max_seconds": 0.0, "rule.max_bytes": 0}
    set_config({"track": "track_3"} | rule)
    refused(capsys, "not the track's model", "depth = 1 instead of 12", track="track_3")
    monkeypatch.setitem(submit.TRACKS, "track_3", replace(track, of_preset="tiny"))
    monkeypatch.setattr(tg, "preset_path", lambda name: copy / "logs/tiny-s1/config.toml")
    code, _, err = call(capsys, track="track_3")
    assert code == 0, err
    day = DATE.replace("-", "")
    place = copy / "records/track_3_optimization/results" / f"{day}_{NAME}"
    assert {"seed1.txt", "seed2.txt", "seed3.txt", "summary.tsv"} < {
        p.name for p in place.iterdir()
    }
    source, environment, lines = re.split(r"(?m)^={100}$", (place / "seed2.txt").read_text())
    assert source == (ROOT / "train_gpt.py").read_text() + "\n"
    assert re.search(r"^Running PyTorch", environment, re.M)
    theirs = r"step:(\d+)/(\d+) val_loss:([\d.]+)( val_\w+:[\d.]+)*"
    theirs = re.compile(theirs + r" train_time:([\d.]+)s step_avg:(\S+)ms")
    steps = [theirs.fullmatch(line)[1] for line in lines.strip().split("\n")]
    assert steps == ["0", "6", "12"]
    (copy / "theirs").mkdir()
    for seed in (1, 2, 3):
        shutil.copy(place / f"seed{seed}.txt", copy / "theirs")
    losses = []
    for seed, run in zip((1, 2, 3), report.find_runs(["theirs"])):
        ours = report.load_folder(copy / f"logs/tiny-s{seed}")
        losses.append([event["val_loss"] for event in run.val])
        assert losses[-1] == pytest.approx([event["val_loss"] for event in ours.val], abs=6e-6)
    rows = [line.split("\t") for line in (place / "summary.tsv").read_text().splitlines()]
    mean = np.mean(losses, axis=0)
    for row, at in zip(rows[1:], mean):
        assert float(row[2]) == pytest.approx(at, abs=1e-5)
        assert float(row[4]) == pytest.approx((9 - at) * 3**0.5, abs=1e-4)


def test_sizes_over_the_cap_or_unlike_result_json_are_refused(copy, capsys):
    """Artifact and code over the cap; a file that is not as long as result.json says; one that is
    missing.
    """
    set_config({"rule.max_bytes": 60000})
    refused(capsys, "logs/tiny-s1/model.nrx", "60000 are allowed", "make the model smaller")
    set_config({"rule.max_bytes": 0})  # a laxer rule than the track's does not help
    with open("logs/tiny-s2/model.nrx", "ab") as f:
        f.write(b"\0")
    refused(capsys, "logs/tiny-s2/model.nrx", "result.json says")
    Path("logs/tiny-s2/model.nrx").unlink()
    refused(capsys, "logs/tiny-s2/model.nrx", "missing", "put the run's own file back")


def test_clocks_over_the_cap_are_refused(copy, capsys):
    for run in RUNS:  # log and result agree on it
        log = Path(run, "log.txt").read_text()
        Path(run, "log.txt").write_text(
            re.sub(r"^(final: .*train_time:)[\d.]+s", r"\g<1>700.000s", log, flags=re.M)
        )
        edit(run, train_time_s=700.0)
    refused(capsys, "logs/tiny-s3/result.json", "700.0 s, 600 s are allowed", "--max_seconds 600")
    edit(RUNS[0], eval_time_s=601.0)
    refused(capsys, "logs/tiny-s1/result.json", "eval_time_s 601.0", "600 s are allowed")


def test_a_source_unlike_this_checkout_is_refused(copy, capsys):
    log = Path(RUNS[1], "log.txt").read_text()
    Path(RUNS[1], "log.txt").write_text(
        log.replace("beta2: float = 0.95", "beta2: float = 0.99", 1)
    )
    refused(capsys, "logs/tiny-s2/log.txt", "differs from that shipped", "check out the revision")
    Path(RUNS[1], "log.txt").write_text(log)
    edit(RUNS[1], code_bytes=1000)
    refused(capsys, "logs/tiny-s2/result.json", "code_bytes 1000")


def test_seeds_missing_doubled_or_left_out_are_refused(copy, capsys):
    refused(capsys, "seeds: 2 missing", "--seeds", runs=[RUNS[0], RUNS[2]])
    refused(
        capsys,
        "logs/tiny-s2: a run of the same experiment",
        "left out",
        runs=[RUNS[0], RUNS[2]],
        argv=["--seeds", "1", "3"],
    )
    refused(capsys, "logs/tiny-s1", "seed 1 is given 2 times", runs=[*RUNS, RUNS[0]])
    refused(capsys, "seeds: 4 missing", argv=["--seeds", "1", "2", "3", "4"])
    refused(capsys, "seeds: 3 given, but not in --seeds", argv=["--seeds", "1", "2"])
    edit(RUNS[1], seed=1)
    refused(capsys, "logs/tiny-s2", "seed 1 in result.json, 2 in config.toml")


def test_what_the_rule_fails_is_refused(copy, capsys):
    """Too few runs, a mean not far enough below, no rule at all, a metric that was not measured."""
    set_config(
        {
            "rule.target": float(np.mean([result(run)["roundtrip_val_bpb"] for run in RUNS]))
            + 0.00297
        }
    )
    refused(capsys, "the rule is not met", "p = ", "below 0.01 needed", "seeds missing")
    set_config({"rule.target": 1.0})
    refused(capsys, "the rule is not met", "no number of seeds")
    set_config({"rule.target": 0.0})
    refused(capsys, "no target with p (or z)", "p = 0.01")
    set_config({"rule.target": 4.0, "rule.metric": "sliding_val_bpb"})
    refused(capsys, "sliding_val_bpb", "was not measured in logs/tiny-s1")
    set_config({"rule.metric": "val_loss"})
    refused(capsys, "val_loss is no score of the artifact", "roundtrip_val_bpb")
    set_config({"rule.metric": "roundtrip_val_bpb"})
    for run in RUNS[1:]:
        shutil.move(run, "elsewhere-" + Path(run).name)
    refused(capsys, "fewer than the rule needs", "run more seeds", runs=RUNS[:1])


def test_a_run_that_began_from_another_one_is_refused(copy, capsys):
    """Pre-pre-training is training: its code and seconds would neither be shipped nor counted."""
    set_config({"init_from": "logs/tiny-pre-s1", "transfer": "attn"})
    err = refused(
        capsys,
        "logs/tiny-s1/config.toml: init_from = 'logs/tiny-pre-s1'",
        "neither in the folder nor counted",
    )
    assert err.count("init_from = ") == 3  # one line a run
    refused(capsys, "init_from", "fresh weights", track="golf_non_record")


def test_a_run_with_a_teacher_of_another_run_is_refused(copy, capsys):
    """A chain's own snapshots teach without one: then `teacher` is empty."""
    set_config({"teacher": "logs/large-s1", "distill": 0.45})
    err = refused(
        capsys,
        "logs/tiny-s1/config.toml: teacher = 'logs/large-s1'",
        "neither in the folder nor counted",
    )
    assert err.count("teacher = ") == 3  # one line a run
    set_config({"teacher": "", "cycles": 2, "distill_from": 2})
    assert call(capsys, track="golf_non_record")[0] == 0
    set_config({"teacher": "logs/large-s1", "track": "slowrun", "rule.max_bytes": 0})
    set_config({"rule.max_seconds": 0})  # a sequence of models, as slowrun's record was
    assert call(capsys, "--out", "b", track="slowrun_unlimited")[0] == 0


def test_an_ensemble_with_other_runs_is_refused_as_the_figure(copy, capsys):
    """As another figure it may stand there, and beside it one of the run's own snapshots."""
    mixed = {"val_loss_ensemble": 4.5, "ensemble_size": 4, "val_loss_ensemble_uniform": 4.6}
    alone = {"val_loss_ensemble": 4.7, "ensemble_size": 2, "val_loss_ensemble_uniform": 4.8}
    shared = {"ensemble 4 of 4 snapshots with tiny-s2 big": {"top": mixed, "of": ""}}
    own = {"ensemble 2 of 2 snapshots": {"top": alone, "of": ""}}
    for run in RUNS:
        edit(run, scores=own | shared, **mixed)
    assert call(capsys, "--out", "a", track="golf_non_record")[0] == 0
    set_config({"track": "slowrun", "rule.metric": "val_loss_ensemble", "rule.target": 0.0})
    words = "its figure is of an ensemble with snapshots of tiny-s2 big", "without --with_runs"
    refused(capsys, "logs/tiny-s1/result.json: ", *words, track="slowrun")
    set_config({"rule.max_bytes": 0, "rule.max_seconds": 0})  # as in configs/slowrun_unlimited.toml
    assert call(capsys, "--out", "b", track="slowrun_unlimited")[0] == 0
    set_config({"rule.max_seconds": 600})
    for run in RUNS:
        edit(run, scores=shared | own, **alone)
    code, _, err = call(capsys, track="slowrun")
    assert code == 0, err


def test_files_that_cannot_be_read_are_named(copy, capsys):
    Path("sample/manifest.json").write_text("[")
    refused(capsys, "sample/manifest.json: damaged", "get the data again")
    Path(RUNS[1], "log.txt").write_bytes(
        Path(RUNS[1], "log.txt").read_bytes().replace(b"final: ", b"\xff\xfefinal: ")
    )
    refused(capsys, "logs/tiny-s2/log.txt", "cut short")
    for text, words in (
        ("[1]", "damaged"),
        ("{", "damaged"),
        ('{"val_loss": "low"}', "val_loss = 'low' is no number"),
    ):
        Path(RUNS[0], "result.json").write_text(text)
        code, _, err = call(capsys)
        assert code == 2 and err.count("\n") == 1 and "logs/tiny-s1" in err and words in err, err


def test_a_log_that_went_through_a_terminal_is_read(copy, capsys):
    """The sources at its top must be those that ran; behind them colours do not hide a number."""
    for run in RUNS:
        path = Path(run, "log.txt")
        path.write_text(path.read_text().replace("\nfinal: ", "\n\x1b[32mfinal: "))
    assert call(capsys)[0] == 0


def test_a_resumed_run_on_a_timed_track_is_refused(copy, capsys):
    edit(RUNS[2], resumed=True)
    refused(capsys, "logs/tiny-s3: resumed", "under another name")
    set_config({"rule.max_seconds": 0.0})
    assert call(capsys, track="golf_non_record")[0] == 0  # not timed


def test_configs_that_differ_beyond_the_seed_are_refused(copy, capsys):
    set_config({"matrix_lr": 0.06}, [RUNS[1]])
    refused(
        capsys,
        "logs/tiny-s2: not the same experiment",
        "matrix_lr = 0.06 instead of 0.05",
        "run again what differs",
    )
    set_config({"matrix_lr": 0.05}, [RUNS[1]])
    edit(RUNS[1], device="another")
    refused(capsys, "logs/tiny-s2", "device = another instead of")
    edit(RUNS[1], device=result(RUNS[0])["device"])
    text = Path(RUNS[0], "config.toml").read_text()
    Path(RUNS[0], "config.toml").write_text(text.replace("beta1 = 0.8", "beta1 = 0.9"))
    err = refused(capsys, "logs/tiny-s1/config.toml: not the configuration that log.txt holds")
    assert "config_sha256" in err


def test_numbers_unlike_the_logs_are_refused(copy, capsys):
    for key, what in (
        ("steps", "steps, but log.txt was last evaluated at 12"),
        ("eval_time_s", "but the scores in log.txt took"),
    ):
        value = result(RUNS[0])[key]
        edit(RUNS[0], **{key: value + 1})
        refused(capsys, f"logs/tiny-s1/result.json: {key if key == 'eval_time_s' else 13}", what)
        edit(RUNS[0], **{key: value})
    edit(RUNS[0], roundtrip_val_bpb=1.0)
    refused(capsys, "logs/tiny-s1/result.json", "roundtrip_val_bpb 1.0, but log.txt ends with")
    log = Path(RUNS[1], "log.txt").read_text()
    Path(RUNS[1], "log.txt").write_text(log[: log.index("\nfinal: ")])
    refused(capsys, "logs/tiny-s2/log.txt", "cut short")


def test_a_score_counts_that_the_log_has_too(copy, capsys, server):
    """Of scores with other settings the last counts, also an old one that is asked for again."""
    for run, strides in zip(RUNS, ((64, 32, 64), (64,), (64,))):
        for stride in strides:
            argv = (run, "--modes", "sliding", "--stride", stride)
            ended = server.run(*argv, cwd=copy, program="logs.score")
            assert ended.code == 0, ended.text
    set_config({"rule.metric": "sliding_val_bpb"})
    code, _, err = call(capsys)
    assert code == 0, err
    kept = result(RUNS[0])
    assert len([name for name in kept["scores"] if name.startswith("sliding")]) == 2
    edit(RUNS[0], sliding_val_bpb=1.0)
    refused(capsys, "logs/tiny-s1/result.json: sliding_val_bpb 1.0, but its newest score is")
    top = kept["scores"]["sliding stride=64"]["top"] | {"sliding_val_bpb": 1.0}
    figure = kept["scores"]["sliding stride=64"] | {"top": top}
    edit(RUNS[0], scores=kept["scores"] | {"sliding stride=64": figure})
    refused(capsys, "logs/tiny-s1/result.json: log.txt does not have the score sliding stride=64")
    edit(RUNS[0], scores=kept["scores"], sliding_val_bpb=kept["sliding_val_bpb"], eval_time_s=0.0)
    refused(capsys, "logs/tiny-s1/result.json: eval_time_s 0.0, but the scores in log.txt took")
    edit(RUNS[0], scores={"sliding": {}})
    refused(capsys, "logs/tiny-s1/result.json: damaged (KeyError: 'top')")
    edit(RUNS[0], scores=["sliding"])
    refused(capsys, "logs/tiny-s1/result.json: damaged (AttributeError")
    edit(RUNS[0], scores={}, eval_time_s=kept["eval_time_s"])
    refused(capsys, "sliding_val_bpb", "its newest score is None")


@pytest.mark.parametrize("tokenizer", ["sample/tokenizer.model", ""])
def test_scores_of_runs_without_an_artifact_count(copy, capsys, server, tokenizer):
    """Their first evaluation is that behind training; without a tokenizer there are no bits."""
    text = CONFIG.replace('"golf"', '"slowrun"').replace("roundtrip_val_bpb", "chunked_val_loss")
    text = text.replace("max_bytes = 16000000", "max_bytes = 0")
    text = text.replace('"sample/tokenizer.model"', f"{tokenizer!r}").replace(
        "last = 0", "last = 1"
    )
    Path("plain.toml").write_text('export = ""\n' + text)
    run = "logs/plain-s1"
    argv = ("--config", "plain.toml", "--run", "plain-s1")
    for more in (argv, (run, "--modes", "chunked")):
        program = "train_gpt" if more == argv else "logs.score"
        ended = server.run(*more, cwd=copy, program=program)
        assert ended.code == 0, ended.text
    assert result(run)["eval_time_s"] > result(run)["first_eval_time_s"] > 0
    assert ("chunked_val_bpb" in result(run)) == bool(tokenizer)
    code, _, err = call(capsys, track="slowrun", runs=[run])
    assert code == 0, err
    set_config({"rule.max_bytes": 99999}, [run])  # of an artifact that is not there
    refused(capsys, "logs/plain-s1/model.nrx: missing", track="slowrun", runs=[run])
    set_config({"rule.max_bytes": 0}, [run])
    edit(run, eval_time_s=result(run)["eval_time_s"] + 1)
    refused(capsys, "but the scores in log.txt took", track="slowrun", runs=[run])


def test_documents_on_both_sides_are_refused(copy, capsys):
    """One validation document is put among the training documents; the data's fingerprint is made
    to fit.
    """
    val = np.fromfile("sample/sample_val_000000.bin", "<u2")[512:]
    starts = np.flatnonzero(val == 1)
    shard = np.fromfile("sample/sample_train_000001.bin", "<u2")
    both = np.concatenate([shard, val[starts[1] : starts[2]]])
    both[:512].view("<i4")[2] = len(both) - 512
    both.tofile("sample/sample_train_000001.bin")
    refused(capsys, "sample: not the shards that the runs read", "--data")
    cfg = tg.Config(**tg.read_toml(Path(RUNS[0], "config.toml")))
    for run in RUNS:
        edit(run, data_sha256=tg.data_fingerprint(cfg))
    refused(capsys, f"sample: 1 of {len(starts)} validation documents", "train anew")
    manifest = json.loads(Path("sample/manifest.json").read_text())
    Path("sample/manifest.json").write_text(json.dumps(manifest | {"published_split": True}))
    refused(capsys, "also in train")  # 1 of 3 is too many for a published split, too
    for path in Path("sample").glob("*.bin"):
        path.unlink()
    refused(capsys, "train and validation cannot be compared", "no train shards", "--data")


def test_what_is_no_submission_is_refused(copy, capsys):
    refused(capsys, "track = 'golf'", "--track speedrun", track="speedrun")
    set_config({"val_tokens": 1000})
    refused(capsys, "val_tokens = 1000", "run with --val_tokens 0")
    refused(capsys, "logs/none: no such run folder", runs=["logs/none"])
    Path(RUNS[0], "result.json").unlink()
    refused(capsys, "logs/tiny-s1: result.json missing", "--resume")
    assert submit.main(["chess", "../../x", *RUNS, "--date", "today"]) == 2
    err = capsys.readouterr().err
    assert (
        "track 'chess' is unknown" in err
        and "'../../x' becomes the name" in err
        and "YYYY-MM-DD" in err
    )


def test_a_failure_while_writing_leaves_nothing(copy, capsys, monkeypatch):
    """The disk fills up at the last file, or another process took the name."""

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    before = sorted(Path().rglob("*"))
    code, _, err = call(capsys)
    assert code == 2 and "No space left" in err and sorted(Path().rglob("*")) == before
