"""Starts that meet: of one run, of ranks, of nodes with and without a shared folder; the cap."""

# ruff: noqa: F811 (fixtures of another file are arguments here)

import ast
import errno
import fcntl
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import ROOT, free_port, run_ranks, start_ranks
from helpers import parts, tg, tiny
from test_runs import (  # noqa: F401 (fixtures)
    assert_refused,
    data,
    flags,
    folder_hash,
    metrics,
    newest,
    same_end,
    server,
    succeed,
    timeless,
)

########################################
#        Two starts of one run         #
########################################


def begun(folder: Path, fork) -> None:
    """Wait until the run in this folder trains."""
    log = folder / "logs/tiny/metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 3):
        assert fork.poll() is None, fork.read(0) + fork.read(1)
        time.sleep(0.01)


@pytest.mark.parametrize("world", [1, 2])
def test_the_second_start_leaves_and_the_first_goes_on(server, flags, tmp_path, world):
    """Exit code 2 and who has the run, on every rank; killed, the first leaves no lock behind."""
    argv = flags(
        steps=100000, save_every=50, eval_every=0, epochs=0, micro_tokens=32, batch_tokens=64
    )
    first = start_ranks(server, world, argv, tmp_path)
    begun(tmp_path, first[0])
    for ended in run_ranks(server, world, [*argv, "--resume"], tmp_path):
        assert_refused(
            ended, ["logs/tiny is in use by process", f"{first[0].pid} on ", "another --run"]
        )
        assert len(ended.err.strip().splitlines()) == 1
    assert [fork.poll() for fork in first] == [None] * world
    for fork in first:
        fork.signal(signal.SIGKILL)
        fork.wait()
    trained = [r["step"] for r in metrics(tmp_path / "logs/tiny") if r["kind"] == "train"]
    assert trained == list(range(1, len(trained) + 1))
    stop = {"phase": "train_step", "send": [[99, signal.SIGTERM]]}
    assert {e.code for e in run_ranks(server, world, [*argv, "--resume"], tmp_path, stop)} == {143}


def test_of_two_that_begin_a_run_at_once_one_trains(server, flags, tmp_path):
    argv = flags(steps=60, eval_every=0, epochs=0)
    forks = [server.start(*argv, cwd=tmp_path) for _ in range(2)]
    ended = [fork.wait() for fork in forks]
    assert sorted(e.code for e in ended) == [0, 2]
    assert any("in use" in e.err or "exists" in e.err for e in ended)
    trained = [r["step"] for r in metrics(tmp_path / "logs/tiny") if r["kind"] == "train"]
    assert trained == list(range(1, 61))


@pytest.fixture
def held(tmp_path):
    """A run's folder that another process, this one, has locked."""
    folder = tmp_path / "logs/tiny"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "a+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield folder


def test_pre_pre_training_keeps_to_the_lock_as_well(server, held, tmp_path):
    argv = ["--like", "nca_cpu", "--run", "tiny", "--resume", "--device", "cpu"]
    ended = server.run(*argv, cwd=tmp_path, program="pre_pre_train")
    assert_refused(ended, ["logs/tiny is in use by another process"])


def test_where_files_cannot_be_locked_a_run_says_so_and_trains(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    run = tg.Run(tiny(log_dir=str(tmp_path)))
    run.folder.mkdir()
    run.lock_folder()
    assert "No locks available" in capsys.readouterr().out


def test_a_finished_run_is_not_the_answer_to_other_flags(server, flags, tmp_path):
    """What differs and exit code 2, on every rank; with the same flags there is nothing to do."""
    argv = flags(steps=2, eval_every=0, vocab=64)
    succeed(server.run(*argv, cwd=tmp_path))
    before = folder_hash(tmp_path)
    other = flags(steps=2, vocab=64, depth=2, matrix_lr=0.5, eval_every=1, resume=True)
    for ended in run_ranks(server, 2, [*other, "--micro_tokens", "64"], tmp_path):
        assert_refused(ended, ["logs/tiny is finished", "depth: 1 -> 2", "matrix_lr: 0.05 -> 0.5"])
        assert "eval_every" not in ended.err
    for ended in run_ranks(server, 2, [*argv, "--resume"], tmp_path):
        assert ended.code == 0, ended.text
    assert "is finished" in server.run(*argv, "--resume", cwd=tmp_path).out
    assert folder_hash(tmp_path) == before


def test_a_finished_run_is_not_the_answer_to_other_data(server, flags, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    argv = [*flags(steps=2, vocab=64, data="data"), "--resume"]
    succeed(server.run(*argv, cwd=tmp_path))
    shard = sorted((tmp_path / "data").glob("x_train_*.bin"))[0]
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-2] + b"\1\0")
    said = ["the data in data is not what this run", f"{shard.name} has other content"]
    assert_refused(server.run(*argv, cwd=tmp_path), said)
    shard.write_bytes(kept)
    assert "is finished" in server.run(*argv, cwd=tmp_path).out
    shutil.rmtree(tmp_path / "data")  # it is finished all the same
    assert "is finished" in server.run(*argv, cwd=tmp_path).out


def test_a_run_folder_without_its_configuration_is_not_gone_on_with_under_another(
    server, flags, tmp_path
):
    argv = flags(steps=2, vocab=64)
    succeed(server.run(*argv, cwd=tmp_path))
    folder = tmp_path / "logs" / "tiny"
    (folder / "config.toml").unlink()
    other = [*flags(steps=2, vocab=64, matrix_lr=0.5), "--resume"]
    assert_refused(server.run(*other, cwd=tmp_path), ["matrix_lr: 0.05 -> 0.5"])
    (folder / "result.json").unlink()
    assert_refused(server.run(*other, cwd=tmp_path), ["was begun", "matrix_lr: 0.05 -> 0.5"])
    succeed(server.run(*argv, "--resume", cwd=tmp_path))
    for config in folder.glob("**/config.toml"):
        config.unlink()
    assert_refused(server.run(*argv, "--resume", cwd=tmp_path), ["has no config.toml"])


########################################
#       What one rank alone meets      #
########################################

RAISING = """
import errno, os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from helpers import tg, tiny

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{{one}} and {{two}}")

def fail(error):
    raise error

with tg.Run(tiny(log_dir="nowhere")) as run:
    for error in (tg.UserError("mend it"), OSError(errno.ENOSPC, "full", "x"), ValueError("a bug"),
                  Odd(1, 2), MemoryError(), KeyboardInterrupt(), SystemExit(3)):
        try:
            run.on_main(lambda: fail(error))
        except BaseException as e:
            print(type(e).__name__, e, flush=True)
    print("both:", run.on_main(lambda: os.environ["RANK"]), flush=True)
"""


def test_whatever_rank_0_raises_is_raised_on_all(server, tmp_path):
    """Every kind of exception, those included that cannot be sent; and nobody waits."""
    script = tmp_path / "raising.py"
    script.write_text(RAISING.format(tests=str(ROOT / "tests"), root=str(ROOT)))
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    forks = [
        server.start(cwd=tmp_path, file=script, env=env | {"RANK": str(rank)}) for rank in (0, 1)
    ]
    first, second = [fork.wait(60) for fork in forks]
    succeed([first, second])
    said = [
        "UserError mend it",
        "OSError [Errno 28] full: 'x'",
        "ValueError a bug",
        "Odd 1 and 2",
        "MemoryError ",
        "KeyboardInterrupt ",
        "SystemExit 3",
        "both: 0",
    ]
    assert first.out.splitlines() == said
    said[3] = "RuntimeError Odd: 1 and 2"
    assert second.out.splitlines() == said


def two_ranks(server, tmp_path, commands: tuple, **second) -> list:
    """How two ranks end that are started with these command lines; `second`: more about rank 1."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    forks = [
        server.start(*words, cwd=tmp_path, env=env | {"RANK": str(rank)}, full_exit=True, **more)
        for rank, (words, more) in enumerate(zip(commands, ({}, second), strict=True))
    ]
    return [fork.wait(60) for fork in forks]


def test_what_one_rank_alone_cannot_read_is_said_by_all(server, flags, tmp_path):
    argv = flags(micro_tokens=64)
    for ended in two_ranks(server, tmp_path, (argv, [*argv, "--data", "nowhere"])):
        assert_refused(ended, ["no train shards", "nowhere"])


def test_what_reads_a_disk_behind_the_first_step_does_so_together(tmp_path, monkeypatch):
    """Else a rank that alone cannot read would begin to save, and wait for the others for ever."""
    more = {"dim": 64, "gptq": 2, "export": "int6", "fitness_tokens": 99, "cycles": 2}
    (tmp_path / "run").mkdir()
    trainer = parts(tmp_path, run="run", log_dir=str(tmp_path), **more)
    found = set()
    for name in ("read_shard", "load_artifact"):
        read = getattr(tg, name)

        def watched(*given, name=name, read=read):
            found.add((name, any(frame.function == "together" for frame in inspect.stack())))
            return read(*given)

        monkeypatch.setattr(tg, name, watched)
    tg.keep_snapshot(trainer, 10)
    tg.export_artifact(trainer)
    assert found == {("read_shard", True), ("load_artifact", True)}


def test_a_rank_that_is_killed_is_not_waited_for(server, flags, tmp_path):
    """The other one says so in one line, and leaves."""
    argv = flags(micro_tokens=64, steps=500, epochs=0)
    killed = {"when": {"phase": "train_step", "send": [[40, signal.SIGKILL]]}}
    first, second = two_ranks(server, tmp_path, (argv, argv), **killed)
    assert second.code == -signal.SIGKILL
    assert_refused(first, ["another rank has left", "its message"])


########################################
#             Several nodes            #
########################################

# All that rank 0 alone writes and every rank reads again: checkpoint, artifact, ends of epochs.
WRITTEN = {
    "micro_tokens": 64,
    "steps": 10,
    "epochs": 2,
    "train_tokens": 1300,
    "eval_every": 5,
    "save_every": 3,
    "ema": 0.9,
    "swa_every": 1,
    "swa_start": 0.3,
    "average_epochs": 2,
    "vocab": 2112,
    "export": "int6",
}


def start_nodes(server, argv, folders, **more):
    """One rank in each folder, and the flags that this rank has beside."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    forks = [
        server.start(
            *argv,
            *more.get(f"rank{rank}", []),
            cwd=folder,
            env=env | {"RANK": str(rank), "LOCAL_RANK": "0"},
            when=more.get("when"),
            program=more.get("program", "train_gpt"),
        )
        for rank, folder in enumerate(folders)
    ]
    return [fork.wait(120) for fork in forks]


def test_ranks_without_rank_0s_disk_end_alike(server, flags, tmp_path):
    """What to start from, checkpoint, artifact, epochs lie where rank 0 is; killed and resumed."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    succeed(server.run(*flags(run="source", vocab=2112, steps=2), cwd=one))
    argv = flags(init_from="logs/source", **WRITTEN)
    succeed(start_nodes(server, argv, (one, one)))
    reference = (one / "logs/tiny").rename(tmp_path / "reference")
    killed = {"phase": "train_step", "send": [[7000, signal.SIGKILL]]}
    assert {e.code for e in start_nodes(server, argv, (one, two), when=killed)} != {0}
    assert newest(one / "logs/tiny")
    succeed(start_nodes(server, [*argv, "--resume"], (one, two)))
    same_end(one / "logs/tiny", reference)
    scores = ["--modes", "sliding", "--stride", "16"]
    for run in (one / "logs/tiny", reference):  # two nodes with a common disk
        succeed(start_nodes(server, [run, *scores], (one, one), program="logs.score"))
    mine, other = (
        json.loads((f / "result.json").read_text()) for f in (one / "logs/tiny", reference)
    )
    for key in ("val_loss_prob_equal", "val_loss_weights_recency", "sliding_val_loss"):
        assert mine[key] == other[key]
    assert not list(two.iterdir())


def test_nodes_with_other_flags_or_other_data_are_refused(server, flags, data, tmp_path):
    """Before a folder is made; the message names the rank and what it has."""
    mine = shutil.copytree(data, tmp_path / "mine")
    (mine / "x_train_000002.bin").unlink()
    cases = (
        (["--matrix_lr", "0.01"], "matrix_lr = 0.01"),
        (["--data", str(mine)], "data = "),
        (["--save_every", "1"], "save_every = 1"),
    )
    for other, words in cases:
        for ended in start_nodes(server, flags(micro_tokens=64), (tmp_path, tmp_path), rank1=other):
            assert_refused(ended, ["rank 1 on ", words, "every node the same"])
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "two folders"])
def test_two_torchrun_agents_train_and_go_on(flags, tmp_path, shared):
    """Two nodes on loopback, of one project or two copies: a run, and one that goes on."""
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(ROOT / "train_gpt.py", one)  # the trainer needs nothing else
    two = one if shared else shutil.copytree(one, tmp_path / "two")
    argv = flags(micro_tokens=64, steps=6, save_every=2, keep=9, ema=0.9, vocab=2112, shuffle=1)

    def train(*more):
        port, agents = free_port(), []
        for rank, folder in enumerate((one, two)):
            where = [
                "--nnodes=2",
                f"--node_rank={rank}",
                "--master_addr=127.0.0.1",
                f"--master_port={port}",
                "--rdzv_conf=timeout=60",
                "--nproc_per_node=1",
            ]
            command = [
                Path(sys.executable).parent / "torchrun",
                *where,
                "--",
                "train_gpt.py",
                *argv,
                *more,
            ]
            with open(folder / f"said{rank}", "wb") as said:
                agents.append(
                    subprocess.Popen(
                        command,
                        cwd=folder,
                        stdout=said,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                    )
                )
        codes = [agent.wait(180) for agent in agents]
        assert codes == [0, 0], "".join(
            (folder / f"said{r}").read_text() for r, folder in enumerate((one, two))
        )

    train()
    assert json.loads((one / "logs/tiny/result.json").read_text())["world_size"] == 2
    reference = shutil.copytree(one / "logs/tiny", tmp_path / "reference")
    for name in ("result.json", "model.nrx"):
        (one / "logs/tiny" / name).unlink()
    for step in (4, 6):
        shutil.rmtree(one / f"logs/tiny/ckpt/{step:06d}")
    train("--resume")
    assert "resumed:logs/tiny/ckpt/000002" in (one / "said0").read_text()
    same_end(one / "logs/tiny", reference)
    assert shared or not (two / "logs").exists()


########################################
#              The clock's cap         #
########################################


def end_of(durations, cap: float) -> float:
    """When a run of such steps ends, by train_loop's rule written once more."""
    clock, paces = 0.0, []
    for took in durations:
        if clock + tg.next_step_seconds(paces, [1]) > cap:
            break
        clock, paces = clock + took, [*paces[-19:], ([1], took)]
    return clock


def test_the_cap_holds_for_steps_that_vary_and_a_stall_ends_no_run():
    late = early = 0
    for seed in range(300):
        rng = random.Random(seed)
        steps = [
            rng.uniform(0.09, 0.1) if rng.random() > 0.03 else rng.uniform(0.001, 0.09)
            for _ in range(500)
        ]
        end = end_of(steps, 9.0)
        late, early = late + (end > 9.0), early + (end < 9.0 - 0.1 * 2.2)
        steps[1 + seed % 80] = 11.0  # (where it is the first, nothing tells it from a slow machine)
        assert 20 - 0.22 < end_of(steps, 20.0) <= 20.0
    assert late == early == 0


def test_the_next_step_is_foreseen_from_those_of_its_own_graph():
    fast, slow = [([1], 0.1)] * 10, [([3], 0.4)]
    assert tg.next_step_seconds([], [1]) == 0
    assert tg.next_step_seconds(fast, [3]) == pytest.approx(0.11)  # nothing better is known
    assert tg.next_step_seconds([*fast, *slow], [3]) == pytest.approx(0.44)
    assert tg.next_step_seconds([*slow * 5, *fast], [1]) == pytest.approx(0.11)


TIMED = """
import sys, time
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import train_gpt as tg
clock, steps, plain = [0.0], iter({durations}), tg.train_step

def train_step(*given):
    clock[0] += next(steps)
    return plain(*given)

tg.train_step = train_step
tg.time = SimpleNamespace(perf_counter=lambda: clock[0])
sys.exit(tg.main(sys.argv[1:]))
"""


def test_a_stall_ends_no_run_and_resumed_it_makes_no_step_more(server, flags, tmp_path):
    """A stall of 11 of 20 s; killed behind the last step, resumed where the checkpoint ends."""
    script = tmp_path / "timed.py"
    script.write_text(TIMED.format(root=str(ROOT), durations=[0.5] * 4 + [11.0] + [0.5] * 99))
    argv = flags(steps=100000, max_seconds=20, eval_every=0, epochs=0)
    killed = {"phase": "export_artifact", "send": [[1, signal.SIGKILL]]}
    assert server.run(*argv, cwd=tmp_path, file=script, when=killed).code == -signal.SIGKILL
    state = json.loads((newest(tmp_path / "logs/tiny") / "state.json").read_text())
    assert state["over"] and state["train_seconds"] == 19.5 and state["step"] == 18
    succeed(server.run(*argv, "--resume", cwd=tmp_path, file=script))
    result = json.loads((tmp_path / "logs/tiny/result.json").read_text())
    assert result["steps"] == 18 and result["train_time_s"] == 19.5


@pytest.mark.parametrize("save_last", [0, 1])
def test_interrupted_behind_the_last_step_a_run_makes_none_more(server, flags, tmp_path, save_last):
    """Without a checkpoint of the end, too: the signal's own says that training is over."""
    script = tmp_path / "timed.py"
    script.write_text(TIMED.format(root=str(ROOT), durations=[0.5] * 99))
    argv = flags(steps=100000, max_seconds=4, eval_every=0, epochs=0, save_last=save_last)
    at = {"phase": "evaluate", "send": [[400, signal.SIGTERM]]}
    ended = server.run(*argv, cwd=tmp_path, file=script, when=at)
    assert ended.code == 143, ended.text
    before = timeless(metrics(tmp_path / "logs/tiny"))
    steps = [r["step"] for r in before if r["kind"] == "train"]
    assert steps[-1] == 7 and int(newest(tmp_path / "logs/tiny").name) == 7
    succeed(server.run(*argv, "--resume", cwd=tmp_path, file=script))
    assert json.loads((tmp_path / "logs/tiny/result.json").read_text())["steps"] == 7


def test_wandb_hears_of_a_run_that_broke(tmp_path):
    """0 only of one that has its result: any other exit code is shown as failed."""
    told = []
    for complete in (False, True):
        run = tg.Run(tiny(log_dir=str(tmp_path)))
        run.wandb = type(
            "wandb", (), {"finish": staticmethod(lambda exit_code: told.append(exit_code))}
        )
        with run:
            run.complete = complete
    assert told == [1, 0]


def test_memory_is_counted_in_bytes_on_a_mac_as_well(monkeypatch):
    here = tg.peak_memory()
    assert 2**26 < here < 2**36
    monkeypatch.setattr(sys, "platform", "darwin")  # where getrusage itself counts bytes
    assert here <= 1024 * tg.peak_memory() < 1.1 * here


########################################
#      Files and console, b08          #
########################################

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("logs/*.py")])


def without_encoding(path: Path) -> list[int]:
    """Lines that open a text file in whatever encoding the locale has."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name, owner = (
            getattr(node.func, "attr", getattr(node.func, "id", "")),
            getattr(node.func, "value", None),
        )
        words = [
            a.value
            for a in [*node.args, *(k.value for k in node.keywords)]
            if isinstance(a, ast.Constant)
        ]
        binary = any(isinstance(w, str) and re.fullmatch("[rwaxt+]*b[rwaxt+]*", w) for w in words)
        other = isinstance(owner, ast.Name) and owner.id in (
            "os",
            "gzip",
            "lzma",
            "archive",
            "tokenize",  # by what the source says of itself
        )
        if (
            name == "write_text"
            or name == "read_text"
            and "utf-8" not in words
            or name == "open"
            and not (binary or other)
        ):
            found.append(node.lineno)
    return found


def test_text_files_are_utf_8_whatever_the_locale_and_the_console_replaces_what_it_lacks():
    assert len(SOURCES) > 15
    assert {path.name: lines for path in SOURCES if (lines := without_encoding(path))} == {}
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__":\n' in text:
            assert '__main__":\n    sys.stdout.reconfigure(errors="replace")' in text, path


def test_a_run_does_not_end_for_a_letter_that_the_locale_lacks(flags, tmp_path):
    """Printed, written, read again on resuming; in a process of its own, as a locale demands."""
    text = 'arm = "naïve"\ntokenizer = "naïve"\n'
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    argv = [
        sys.executable,
        ROOT / "train_gpt.py",
        "--config",
        "mine.toml",
        *flags(steps=2, eval_every=0, tokenizer=None),
    ]
    locale = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    for more in ([], ["--resume"]):
        done = subprocess.run(
            [*argv, *more], cwd=tmp_path, env=os.environ | locale, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"tokenizer" in done.stdout and b"na?ve" in done.stdout
        (tmp_path / "logs/tiny/result.json").unlink()
    for name in ("config.toml", "log.txt"):
        assert 'arm = "naïve"' in (tmp_path / "logs/tiny" / name).read_text(encoding="utf-8")
