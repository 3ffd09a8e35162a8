"""
Whole runs, as processes: ranks, kills, signals, bad input, logs, clocks, tracking. forks.py starts
them.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forks import AS_SCRIPTS, ROOT, Ended, Server, complete_checkpoints, free_port, run_ranks
from helpers import tg, write_shard
from safetensors.torch import load_file

TRAINER = ROOT / "train_gpt.py"
of_the_source = pytest.mark.skipif(bool(AS_SCRIPTS), reason="a script has a source of its own")
# of metrics.jsonl: what no two runs have in common
TIMES = {"train_time_ms", "wall_time_s", "eval_time_s", "tok_s"}
VAL_LINE = re.compile(
    r"^step:(\d+)/(\d+) val_loss:(\S+) train_time:(\d+)ms step_avg:([\d.]+)ms$", re.M
)
TRAIN_LINE = re.compile(r"^step:(\d+)/(\d+) train_time:(\d+)ms step_avg:([\d.]+)ms$", re.M)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("output"))
    yield server
    server.close()


def speech(count: int, vocab: int, seed: int) -> np.ndarray:
    """Tokens that can be learned: from each, three may follow; 0 starts a document."""
    rng = np.random.default_rng(seed)
    follows = np.random.default_rng(7).integers(1, vocab, (vocab, 3))
    tokens = np.zeros(count, dtype=np.uint16)
    for i in range(1, count):
        tokens[i] = 0 if rng.random() < 0.02 else follows[tokens[i - 1], rng.integers(3)]
    return tokens


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two train shards and a val shard over 64 tokens."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train_000001", 6001), ("train_000002", 4001), ("val_000000", 1101)):
        write_shard(folder / f"x_{name}.bin", speech(count, 64, seed=count))
    return folder


@pytest.fixture(scope="session")
def flags(data):
    """flags(steps=3, ...) -> the command line of a tiny run; None leaves a flag out."""
    tiny = {
        "run": "tiny",
        "compile": 0,
        "device": "cpu",
        "dtype": "float32",
        "depth": 1,
        "dim": 32,
        "heads": 2,
        "seq_len": 32,
        "batch_tokens": 256,
        "micro_tokens": 256,
        "vocab": 64,
        "doc_token": 0,
        "tokenizer": "",
        "val_tokens": 1024,
        "steps": 6,
        "eval_every": 3,
        "data": data,
    }

    def build(**changes) -> list[str]:
        both = {k: v for k, v in (tiny | changes).items() if v is not None and v is not False}
        return [
            w for k, v in both.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])
        ]

    return build


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def numbers(records: list[dict], key: str) -> list[float]:
    return [r[key] for r in records if key in r]


def newest(folder: Path) -> Path:
    """
    The newest complete checkpoint, by the rule of the README: a folder of digits with a DONE
    marker.
    """
    found = [p for p in folder.glob("ckpt/[0-9]*") if (p / "DONE").exists()]
    assert found, f"no complete checkpoint in {folder}"
    return max(found, key=lambda p: int(p.name))


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    """Every stored number of a checkpoint, bit for bit."""
    return {
        f"{part}/{name}": t.numpy().tobytes()
        for part in ("model", "optimizer", "averages")
        for name, t in load_file(checkpoint / f"{part}.safetensors").items()
    }


def same_end(folder: Path, reference: Path) -> None:
    """
    Two run folders end alike, bit for bit: the artifact, the last checkpoint, all numbers that are
    no times.
    """
    assert timeless(metrics(folder)) == timeless(metrics(reference))
    assert (folder / "model.nrx").read_bytes() == (reference / "model.nrx").read_bytes()
    assert newest(folder).name == newest(reference).name
    assert tensors_of(newest(folder)) == tensors_of(newest(reference))
    states = [json.loads((newest(f) / "state.json").read_text()) for f in (folder, reference)]
    for key in ("step", "loader", "rng", "world_size"):
        assert states[0][key] == states[1][key]
    mine, other = (json.loads((f / "result.json").read_text()) for f in (folder, reference))
    for key in (
        "val_loss",
        "roundtrip_val_loss",
        "steps",
        "tokens",
        "artifact_bytes",
        "config_sha256",
        "data_sha256",
    ):
        assert mine[key] == other[key]


def succeed(ended: Ended | list[Ended]) -> None:
    ended = ended if isinstance(ended, list) else [ended]
    assert not any(e.code for e in ended), "\n".join(e.text for e in ended)


########################################
#                Ranks                 #
########################################

RANKED = {
    "depth": 2,
    "steps": 20,
    "eval_every": 10,
    "grad_clip": 1,
    "matrix_wd": 0.1,
    "ema": 0.9,
    "swa_every": 2,
    "swa_start": 0.5,
    "shuffle": 1,
}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_any_number_of_ranks_gives_the_same_losses(server, flags, tmp_path, optimizer):
    """
    1, 2, 4, 8 ranks and any micro-batch: one sequence of losses to 1e-5, for the live weights and
    the averages.
    """

    def losses(world: int, micro: int) -> dict[str, list[float]]:
        run = f"w{world}-{micro}"
        own = {"normuon": 0.9} if optimizer == "muon" else {"adamw_lr": 0.01}
        argv = flags(run=run, micro_tokens=micro, optimizer=optimizer, **own, **RANKED)
        succeed(run_ranks(server, world, argv, tmp_path))
        found = metrics(tmp_path / "logs" / run)
        assert (
            json.loads((tmp_path / "logs" / run / "result.json").read_text())["world_size"] == world
        )
        keys = ("train_loss", "grad_norm", "val_loss", "val_loss_ema", "val_loss_swa")
        return {key: numbers(found, key) for key in keys}

    one = losses(1, 256)
    others = [
        (2, 64),
        (4, 32),
        (8, 32),
        *([(1, 32), (2, 128), (4, 64)] if optimizer == "muon" else []),
    ]
    assert (
        len(one["train_loss"]) == 20 and len(one["val_loss"]) == 3 and len(one["val_loss_swa"]) == 2
    )
    # it learns: the comparison is of something that moves
    assert one["train_loss"][-1] < one["train_loss"][0]
    for world, micro in others:
        many = losses(world, micro)
        for key in one:
            which = f"{key}, {world} ranks, micro_tokens {micro}"
            np.testing.assert_allclose(many[key], one[key], rtol=1e-5, err_msg=which)


def test_ranks_whose_clocks_differ_stop_at_one_step(server, flags, tmp_path):
    """
    Under max_seconds the step to stop at is one for all, or the rest waits forever for a gradient.
    """
    skewed = tmp_path / "skewed.py"
    skewed.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as tg
plain = tg.Clock.seconds
tg.Clock.seconds = lambda self: plain(self) * (1 + 0.5 * int(os.environ["RANK"]))
sys.exit(tg.main(sys.argv[1:]))
""")
    argv = flags(
        micro_tokens=64, steps=100000, epochs=1000, max_seconds=1, eval_every=0, gptq=3, dim=64
    )
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    forks = [
        server.start(
            *argv, cwd=tmp_path, file=skewed, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in (0, 1)
    ]
    succeed([fork.wait(60) for fork in forks])
    result = json.loads((tmp_path / "logs/tiny/result.json").read_text())
    assert 0 < result["steps"] < 100000 and result["train_time_s"] < 1


def test_ranks_with_unequal_shares_of_calibration_and_scores_give_the_numbers_of_one(
    server, flags, tmp_path
):
    """
    Three ranks, four rows for GPTQ, five scorers, documents of uneven lengths: the numbers of one
    process.
    """

    def scores(world: int) -> dict:
        argv = flags(
            run=f"w{world}",
            micro_tokens=32,
            batch_tokens=384,
            gptq=4,
            export="int6",
            val_tokens=500,
            dim=64,
            heads=1,
            steps=3,
        )
        succeed(run_ranks(server, world, argv, tmp_path))
        folder = tmp_path / f"logs/w{world}"
        modes = ["--modes", "chunked sliding mixture ttt lora", "--stride", "8"]
        succeed(run_ranks(server, world, [folder, *modes], tmp_path, program="logs.score"))
        result = json.loads((folder / "result.json").read_text())
        assert {f.get("world_size") for f in result["scores"].values()} == {world}
        return result

    one, three = scores(1), scores(3)
    found = [key for key in one if key.endswith("val_loss")]
    assert len(found) >= 7, found
    for key in found:
        assert one[key] == pytest.approx(three[key], rel=1e-4), key


def test_saved_on_four_ranks_a_run_goes_on_alike_on_one_and_two(server, flags, tmp_path):
    """
    A checkpoint does not know how many ranks wrote it: what goes on from it follows the
    uninterrupted run.
    """
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir(), broken.mkdir()
    argv = flags(micro_tokens=64, **RANKED)
    succeed(server.run(*argv, cwd=straight))
    left = run_ranks(
        server, 4, argv, broken, {"phase": "train_step", "send": [[800, signal.SIGTERM]]}
    )
    assert [e.code for e in left] == [143] * 4, left[0].text
    assert 0 < int(newest(broken / "logs/tiny").name) < 20
    reference = metrics(straight / "logs/tiny")
    for world in (1, 2):
        folder = tmp_path / f"resumed{world}"
        shutil.copytree(broken, folder)
        succeed(run_ranks(server, world, [*argv, "--resume"], folder))
        found = metrics(folder / "logs/tiny")
        assert [(r["kind"], r["step"]) for r in found] == [
            (r["kind"], r["step"]) for r in reference
        ]
        for key in ("train_loss", "val_loss", "val_loss_ema", "val_loss_swa"):
            np.testing.assert_allclose(
                numbers(found, key), numbers(reference, key), rtol=1e-5, err_msg=key
            )


def test_torchrun_works_and_its_sigterm_saves_one_checkpoint(flags, tmp_path):
    """
    `torchrun --standalone` works as documented; SIGTERM to it reaches both ranks, which save one
    checkpoint.
    """
    argv = flags(steps=100000, eval_every=0, batch_tokens=64, micro_tokens=32, epochs=0)
    command = [
        Path(sys.executable).parent / "torchrun",
        "--standalone",
        "--nproc_per_node=2",
        "--",
        TRAINER,
        *argv,
    ]
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    log = tmp_path / "logs/tiny/metrics.jsonl"
    wait_until(
        lambda: log.exists() and log.read_bytes().count(b"\n") > 3, process, tmp_path / "out"
    )
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    text = (tmp_path / "out").read_text()
    assert "interrupted by SIGTERM" in text and "--resume" in text
    assert (
        json.loads((newest(tmp_path / "logs/tiny") / "state.json").read_text())["world_size"] == 2
    )


def wait_until(condition, process: subprocess.Popen, out: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, out.read_text()
        time.sleep(0.02)


########################################
#         Kills and checkpoints        #
########################################

# Everything on that a checkpoint must carry. The table of 2,112 rows is large enough to be
# quantised, and the data small enough that the run passes through it more than once.
BREAKABLE = {
    "steps": 8,
    "save_every": 2,
    "eval_every": 3,
    "shuffle": 1,
    "ema": 0.9,
    "swa_every": 1,
    "swa_start": 0.3,
    "vocab": 2112,
    "micro_tokens": 128,
    "normuon": 0.9,
    "matrix_wd": 0.1,
    "epochs": 0,
    "data": "data",
}


@pytest.fixture(scope="session")
def breakable(server, flags, tmp_path_factory):
    """
    A run to break: flags, a folder to copy for each attempt, the uninterrupted run, its calls, its
    checkpoints.
    """
    folder = tmp_path_factory.mktemp("breakable")
    clean, whole = folder / "clean", folder / "whole"
    (clean / "data").mkdir(parents=True)
    write_shard(clean / "data/x_train_000001.bin", speech(1001, 64, seed=1))
    write_shard(clean / "data/x_val_000000.bin", speech(1101, 64, seed=2))
    shutil.copytree(clean, whole)
    argv = flags(**BREAKABLE)
    succeed(server.run(*argv, cwd=whole))
    calls = {}
    for kind in ("all", "files"):
        count = folder / f"{kind}.json"
        when = {"count": str(count), "calls": kind}
        succeed(server.run(*argv, "--keep", "99", cwd=_copy(clean, folder / kind), when=when))
        calls[kind] = json.loads(count.read_text())
    every = {int(p.name): tensors_of(p) for p in (folder / "all/logs/tiny/ckpt").iterdir()}
    assert sorted(every) == [2, 4, 6, 8]
    return argv, clean, whole / "logs/tiny", calls, every


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


KILLS = (
    [("train_step", "all")] * 5
    + [("evaluate", "all")] * 4
    + [("export_artifact", "all")] * 2
    + [
        *[("save_checkpoint", "all")] * 2,
        *[("save_checkpoint", "files")] * 2,
        ("save_checkpoint", "rename"),
        ("save_checkpoint", "unlink"),
        ("warm_up", "all"),
        ("write_result", "all"),
        ("prepare_folder", "all"),
    ]
)


@pytest.mark.parametrize("number", range(len(KILLS)))
def test_killed_at_any_instant_and_resumed_a_run_ends_alike(server, breakable, tmp_path, number):
    """
    Killed, resumed, killed again and resumed until it ends, a run ends bit-identical to the
    uninterrupted one.
    """
    argv, clean, reference, calls, every = breakable
    rng, (phase, kind) = random.Random(number), KILLS[number]
    folder = _copy(clean, tmp_path / "run")
    # four saves, each with a rename
    first = rng.randrange(calls[kind][phase] if kind in calls else 4) + 1
    ended = server.run(
        *argv, cwd=folder, when={"phase": phase, "calls": kind, "send": [[first, signal.SIGKILL]]}
    )
    assert ended.code == -signal.SIGKILL and f"in {phase} " in ended.err, ended.text
    # a complete checkpoint is that of the straight run
    for path in (folder / "logs/tiny").glob("ckpt/[0-9]*/DONE"):
        assert tensors_of(path.parent) == every[int(path.parent.name)]
    again = rng.randrange(sum(calls["all"].values()) // 2)
    ended = server.run(*argv, "--resume", cwd=folder, when={"send": [[again, signal.SIGKILL]]})
    if ended.code:
        assert ended.code == -signal.SIGKILL, ended.text
        succeed(server.run(*argv, "--resume", cwd=folder))
    same_end(folder / "logs/tiny", reference)
    assert not [p for p in (folder / "logs/tiny").rglob("*.part")], (
        "half-written files were left behind"
    )


def test_killed_ten_times_from_outside_a_run_ends_alike(server, breakable, tmp_path):
    """
    Killed from outside ten times, after random times, inside system calls too; it always ends
    alike.
    """
    argv, clean, reference, _, every = breakable
    began = time.monotonic()
    succeed(server.run(*argv, cwd=_copy(clean, tmp_path / "timed")))
    took = time.monotonic() - began
    rng, folder, kills = random.Random(20), _copy(clean, tmp_path / "run"), 0
    for _ in range(60):
        fork = server.start(*argv, "--resume", cwd=folder)
        if kills < 10:
            time.sleep(rng.uniform(0.1, 0.9) * took)
            fork.signal(signal.SIGKILL)
        killed = fork.wait().code == -signal.SIGKILL
        kills += killed
        # it ended before: the machine was busier when the time was taken
        took *= 1 if killed else 0.9
        for path in (folder / "logs/tiny").glob("ckpt/[0-9]*/DONE"):
            assert tensors_of(path.parent) == every[int(path.parent.name)]
        if (folder / "logs/tiny/result.json").exists():
            same_end(folder / "logs/tiny", reference)
            if kills == 10:
                return
            shutil.rmtree(folder / "logs")
    raise AssertionError(f"{kills} kills hit anything")


def test_every_file_call_of_saving_may_be_the_last(server, breakable, tmp_path):
    """
    Before each single call that changes files, a save leaves whole checkpoints; one of its own
    step, too.
    """
    argv, clean, _, calls, _ = breakable
    folder = _copy(clean, tmp_path / "run")
    # in the sixth step of eight: the resumed run saves none at once
    at = calls["all"]["train_step"] * 11 // 16
    left = server.run(
        *argv, cwd=folder, when={"phase": "train_step", "send": [[at, signal.SIGTERM]]}
    )
    assert left.code == 143
    known = complete_checkpoints(folder)
    assert sorted(known) == ["000004", "000006"]
    for keep in (1, 2):
        again, watched = _copy(folder, tmp_path / f"keep{keep}"), tmp_path / f"watched{keep}"
        succeed(
            server.run(
                *argv,
                "--resume",
                "--keep",
                keep,
                cwd=again,
                when={"phase": "save_checkpoint", "calls": "files", "watch": str(watched)},
            )
        )
        seen = json.loads(watched.read_text())
        assert len(seen) > 20, "the calls that write a checkpoint are no longer recognised"
        for before, after in zip([known, *seen], [*seen, complete_checkpoints(again)]):
            assert max(after) >= max(before), "the newest checkpoint was lost"
            assert all(after[step] == before[step] for step in after.keys() & before.keys()), (
                "it was changed"
            )
        assert sorted(seen[-1])[-keep:] == ["000006", "000008"][-keep:]


########################################
#               Signals                #
########################################

SIGNALS = [
    ("train_step", "all", 0.5, signal.SIGTERM),
    ("train_step", "all", 0.1, signal.SIGINT),
    ("warm_up", "all", 0.4, signal.SIGTERM),
    ("warm_up", "all", 0.8, signal.SIGINT),
    ("evaluate", "all", 0.02, signal.SIGTERM),
    ("evaluate", "all", 0.5, signal.SIGINT),
    # of the artifact as read back: those weights are not the run's
    ("evaluate", "all", 0.97, signal.SIGTERM),
    ("save_checkpoint", "all", 0.6, signal.SIGTERM),
    ("build", "all", 0.5, signal.SIGTERM),
    ("load_checkpoint", "all", 0.5, signal.SIGINT),
]


def steps_begun(ended: Ended) -> int:
    return int(re.findall(r"steps begun: (\d+)", ended.err)[-1])


@pytest.mark.parametrize("phase, kind, where, number", SIGNALS, ids=lambda x: str(x))
def test_sigterm_and_ctrl_c_save_within_a_step(
    server, breakable, tmp_path, phase, kind, where, number
):
    """
    One signal, anywhere: exit code 128 + signal, a checkpoint at most one step on, a message, the
    same end later.
    """
    argv, clean, reference, calls, _ = breakable
    folder = _copy(clean, tmp_path / "run")
    before = 0
    if phase == "load_checkpoint":
        left = server.run(
            *argv, cwd=folder, when={"phase": "train_step", "send": [[2000, signal.SIGTERM]]}
        )
        before = steps_begun(left)
        count = tmp_path / "count.json"
        succeed(
            server.run(
                *argv, "--resume", cwd=_copy(folder, tmp_path / "count"), when={"count": str(count)}
            )
        )
        calls = {"all": json.loads(count.read_text())}
    at = int(where * calls[kind][phase]) + 1
    ended = server.run(
        *argv, "--resume", cwd=folder, when={"phase": phase, "calls": kind, "send": [[at, number]]}
    )
    assert ended.code == 128 + number, ended.text
    assert (
        f"interrupted by {number.name}" in ended.out
        and "logs/tiny" in ended.out
        and "--resume" in ended.out
    )
    begun = before + steps_begun(ended)
    assert begun <= int(newest(folder / "logs/tiny").name) <= begun + 1
    assert not (folder / "logs/tiny/result.json").exists()
    succeed(server.run(*argv, "--resume", cwd=folder))
    same_end(folder / "logs/tiny", reference)


def test_weights_read_back_from_the_artifact_are_not_saved(server, breakable, tmp_path):
    """
    Interrupted while the artifact is scored, without a checkpoint of that step: what is saved is
    the run's own.
    """
    argv, clean, reference, _, every = breakable
    argv = [*argv, "--save_last", "0", "--save_every", "5"]
    count = tmp_path / "count.json"
    succeed(server.run(*argv, cwd=_copy(clean, tmp_path / "count"), when={"count": str(count)}))
    at = int(0.97 * json.loads(count.read_text())["evaluate"])
    folder = _copy(clean, tmp_path / "run")
    ended = server.run(
        *argv, cwd=folder, when={"phase": "evaluate", "send": [[at, signal.SIGTERM]]}
    )
    assert ended.code == 143 and (folder / "logs/tiny/model.nrx").exists(), ended.text
    assert tensors_of(folder / "logs/tiny/ckpt/000008") == every[8]
    succeed(server.run(*argv, "--resume", cwd=folder))
    assert timeless(metrics(folder / "logs/tiny")) == timeless(metrics(reference))


def test_sigterm_while_compiling_leaves_at_once(server, flags, tmp_path):
    """
    Tracing and compiling take long: the signal does not wait for their end, and step 0 is saved as
    it was.
    """
    argv = flags(compile=1, depth=2, seq_len="0:16 0.5:32", window="0 2s:8", eval_seq_len=32)
    fork = server.start(*argv, cwd=tmp_path, backend="eager")
    while "model_params" not in fork.read(0) and fork.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    fork.signal(signal.SIGTERM)
    ended = fork.wait()
    assert ended.code == 143 and "warmup:" not in ended.out and "ckpt/000000" in ended.out, (
        ended.text
    )
    succeed(server.run(*argv, "--resume", "--compile", "0", cwd=tmp_path))
    (tmp_path / "straight").mkdir()
    succeed(server.run(*argv, "--compile", "0", cwd=tmp_path / "straight"))
    same_end(tmp_path / "logs/tiny", tmp_path / "straight/logs/tiny")


def test_ctrl_c_before_the_run_begins_is_one_line(server, flags, tmp_path):
    """While flags are read there is nothing to save: exit 130, no traceback, no folder."""
    ended = server.run(
        *flags(), cwd=tmp_path, when={"phase": "parse_args", "send": [[500, signal.SIGINT]]}
    )
    assert ended.code == 130 and "Traceback" not in ended.text and "interrupted" in ended.text, (
        ended.text
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "phase, where", [("train_step", 0.4), ("evaluate", 0.5), ("save_checkpoint", 0.7)]
)
def test_the_second_ctrl_c_leaves_at_once(server, breakable, tmp_path, phase, where):
    """
    Two interrupts in one step: exit 130 without another checkpoint, and nothing that was there is
    lost.
    """
    argv, clean, reference, calls, _ = breakable
    folder = _copy(clean, tmp_path / "run")
    at = int(where * calls["all"][phase])
    ended = server.run(
        *argv,
        cwd=folder,
        when={"phase": phase, "send": [[at, signal.SIGINT], [at + 9, signal.SIGINT]]},
    )
    assert (
        ended.code == 130 and "Traceback" not in ended.text and "interrupted by" not in ended.text
    )
    assert int(newest(folder / "logs/tiny").name) <= steps_begun(ended)
    succeed(server.run(*argv, "--resume", cwd=folder))
    same_end(folder / "logs/tiny", reference)


@pytest.mark.parametrize(
    "phase, where", [("train_step", 0.5), ("evaluate", 0.5), ("evaluate", 0.97), ("warm_up", 0.5)]
)
def test_sigterm_to_one_rank_of_two_saves_one_checkpoint(
    server, breakable, two_ranks, tmp_path, phase, where
):
    """
    The ranks agree: both save and leave, although one alone was asked to; resumed on both, the end
    is the same.
    """
    argv, clean, _, _, _ = breakable
    reference, calls = two_ranks
    folder = _copy(clean, tmp_path / "run")
    at = int(where * calls[phase]) + 1
    left = run_ranks(server, 2, argv, folder, {"phase": phase, "send": [[at, signal.SIGTERM]]})
    assert [e.code for e in left] == [143, 143], left[0].text + left[1].text
    assert "interrupted by SIGTERM" in left[0].out and "logs/tiny" in left[0].out
    begun = steps_begun(left[1])
    assert begun <= int(newest(folder / "logs/tiny").name) <= begun + 1
    succeed(run_ranks(server, 2, [*argv, "--resume"], folder))
    same_end(folder / "logs/tiny", reference)


@pytest.fixture(scope="session")
def two_ranks(server, breakable, tmp_path_factory):
    """The uninterrupted run on two ranks, and the calls of its second rank by phase."""
    argv, clean, _, _, _ = breakable
    folder = _copy(clean, tmp_path_factory.mktemp("two") / "run")
    count = folder / "count.json"
    succeed(run_ranks(server, 2, argv, folder, {"count": str(count)}))
    return folder / "logs/tiny", json.loads(count.read_text())


def test_ctrl_c_on_the_command_itself_saves(flags, tmp_path):
    """`python train_gpt.py`, Ctrl-C in training, `--resume`: as a person does it."""
    argv = [sys.executable, TRAINER, *flags(steps=250, eval_every=0, epochs=0)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen(
            argv, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT, env=env
        )
    log = tmp_path / "logs/tiny/metrics.jsonl"
    wait_until(
        lambda: log.exists() and log.read_bytes().count(b"\n") > 3, process, tmp_path / "out"
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "out").read_text()
    text = (tmp_path / "out").read_text()
    step = int(newest(tmp_path / "logs/tiny").name)
    assert f"logs/tiny/ckpt/{step:06d}" in text and "--resume" in text and "Traceback" not in text
    again = subprocess.run(
        [*argv, "--resume"], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert again.returncode == 0, again.stderr
    assert f"resumed:logs/tiny/ckpt/{step:06d} at step {step}" in again.stdout
    assert [r["step"] for r in metrics(tmp_path / "logs/tiny") if r["kind"] == "train"] == list(
        range(1, 251)
    )
    assert json.loads((tmp_path / "logs/tiny/result.json").read_text())["resumed"] is True


########################################
#              Bad input               #
########################################


def folder_hash(*folders: Path) -> dict[str, str]:
    """Every file below, and what it holds."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for folder in folders
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def finished(server, flags, tmp_path_factory):
    """The folder of a finished run, with an artifact."""
    folder = tmp_path_factory.mktemp("finished")
    succeed(server.run(*flags(steps=2, vocab=2112), cwd=folder))
    return folder / "logs/tiny"


def damaged(data: Path, tmp_path: Path, name: str, change) -> dict:
    """The data with one shard changed, as flags."""
    folder = _copy(data, tmp_path / "data")
    path = folder / f"x_{name}.bin"
    path.write_bytes(change(bytearray(path.read_bytes())))
    return {"data": "data"}


def put(value: int, at: int, kind: str):
    """A change of bytes: this number at this place."""

    def change(raw: bytearray) -> bytearray:
        piece = np.array([value], kind).tobytes()
        raw[at : at + len(piece)] = piece
        return raw

    return change


def toml(tmp_path: Path, text: str) -> dict:
    (tmp_path / "mine.toml").write_text(text)
    return {"config": "mine.toml"}


def artifact(finished: Path, tmp_path: Path, change) -> dict:
    (tmp_path / "a.nrx").write_bytes(change(bytearray((finished / "model.nrx").read_bytes())))
    return {"init_from": "a.nrx"}


def flipped(at: float):
    def change(raw: bytearray) -> bytearray:
        raw[int(at * (len(raw) - 1))] ^= 1
        return raw

    return change


# What is given (flags, or a function of the data, a finished run and an empty folder that returns
# them), and what the message must name: the thing and the fix.
BAD = {
    "truncated shard": (
        lambda d, f, t: damaged(d, t, "train_000001", lambda raw: raw[:-2]),
        ["data/x_train_000001.bin", "truncated", "6001", "data/get.py"],
    ),
    "shard without a header": (
        lambda d, f, t: damaged(d, t, "train_000002", lambda raw: raw[:511]),
        ["data/x_train_000002.bin", "truncated", "511", "data/get.py"],
    ),
    "empty shard file": (
        lambda d, f, t: damaged(d, t, "val_000000", lambda raw: b""),
        ["data/x_val_000000.bin", "truncated"],
    ),
    "truncated val shard": (
        lambda d, f, t: damaged(d, t, "val_000000", lambda raw: raw[:-999]),
        ["data/x_val_000000.bin", "truncated", "1101", "data/get.py"],
    ),
    "wrong magic": (
        lambda d, f, t: damaged(d, t, "train_000001", put(20240521, 0, "<i4")),
        ["data/x_train_000001.bin", "20240521", "20240520", "data/get.py tokenize"],
    ),
    "wrong version": (
        lambda d, f, t: damaged(d, t, "train_000001", put(2, 4, "<i4")),
        ["data/x_train_000001.bin", "version 2", "version 1"],
    ),
    "negative count": (
        lambda d, f, t: damaged(d, t, "train_000001", put(-512, 8, "<i4")),
        ["data/x_train_000001.bin", "-512"],
    ),
    "token over the vocabulary": (
        lambda d, f, t: damaged(d, t, "train_000001", put(64, 1024 + 2 * 5000, "<u2")),
        ["data/x_train_000001.bin", "token 64", "position 5000", "vocab = 64", "--vocab"],
    ),
    "val token over the vocabulary": (
        lambda d, f, t: damaged(d, t, "val_000000", put(9999, 1024, "<u2")),
        ["data/x_val_000000.bin", "token 9999", "position 0", "--vocab"],
    ),
    "no such data folder": (
        {"data": "nowhere"},
        ["no train shards", "nowhere", "python data/get.py"],
    ),
    "no val shards": (
        lambda d, f, t: ((_copy(d, t / "data") / "x_val_000000.bin").unlink(), {"data": "data"})[1],
        ["no val shards", "data", "python data/get.py"],
    ),
    "too few shards": (
        {"steps": 60},
        ["60 steps", "15360 tokens", "found 2", "data/get.py", "--steps", "--epochs"],
    ),
    "less than a batch": ({"batch_tokens": 8192}, ["8192", "10002", "--batch_tokens"]),
    "too few val tokens": ({"val_tokens": 2048}, ["val_tokens = 2048", "1101", "--val_tokens"]),
    "too few for a val row": (
        {"val_tokens": 0, "eval_seq_len": 2048},
        ["1101", "2048", "--eval_seq_len"],
    ),
    "misspelt flag": ({"matrx_lr": 0.1}, ["matrx_lr", "matrix_lr"]),
    "wrong type on a flag": ({"steps": "many"}, ["steps", "many", "int"]),
    "misspelt TOML key": (
        lambda d, f, t: toml(t, "matrx_lr = 0.1"),
        ["mine.toml", "matrx_lr", "0.1", "matrix_lr"],
    ),
    "wrong type in TOML": (
        lambda d, f, t: toml(t, 'depth = "2"'),
        ["mine.toml", "depth", "'2'", "str", "int"],
    ),
    "TOML that is none": (lambda d, f, t: toml(t, "depth 2"), ["mine.toml", "TOML", "line 1"]),
    "no such preset": ({"config": "remix_z"}, ["remix_z", "remix_a", "tiny_cpu"]),
    "dim and heads": ({"dim": 30, "heads": 4}, ["dim = 30", "heads = 4"]),
    "batch and micro-batch": ({"micro_tokens": 96}, ["batch_tokens = 256", "micro_tokens = 96"]),
    "batch and rows": (
        {"seq_len": 48, "micro_tokens": 256},
        ["micro_tokens = 256", "seq_len = 48"],
    ),
    "an average that is none": ({"final_weights": "ema"}, ["final_weights", "--ema 0.997"]),
    "repeats without a loop": ({"repeats": 2}, ["repeats", "--loop"]),
    "a loop behind the last block": ({"loop": "0:3"}, ["loop = '0:3'", "1 blocks"]),
    "a schedule that is none": ({"lr": "0:1 0.5"}, ["lr", "0:1 0.5"]),
    "a ramp of rows": ({"seq_len": "0:16 1>32"}, ["seq_len", "':'"]),
    "a document token that is none": ({"doc_token": 64}, ["doc_token = 64", "vocab = 64"]),
    "a vocabulary over uint16": ({"vocab": 70000}, ["vocab = 70000", "65536"]),
    "an unknown optimizer": ({"optimizer": "lion"}, ["lion", "muon", "adamw"]),
    "a name that is a path": ({"run": "a/b"}, ["run = 'a/b'", "folder"]),
    "a broken regular expression": ({"adamw_matrices": "qkv("}, ["adamw_matrices", "qkv("]),
    "artifact cut short": (
        lambda d, f, t: artifact(f, t, lambda raw: raw[:-1]),
        ["a.nrx", "cut short", "export it again"],
    ),
    "artifact cut to nothing": (
        lambda d, f, t: artifact(f, t, lambda raw: b""),
        ["a.nrx", "magic", "export it again"],
    ),
    **{
        f"artifact with a bit flipped at {at:.0%}": (
            lambda d, f, t, at=at: artifact(f, t, flipped(at)),
            ["a.nrx", "export it again"],
        )
        for at in (0, 0.002, 0.01, 0.5, 1)
    },
    "a run without anything to start from": (
        lambda d, f, t: ((t / "empty").mkdir(), {"init_from": "empty"})[1],
        ["empty", "model.nrx"],
    ),
    "nothing to start from": ({"init_from": "nowhere"}, ["nowhere", "artifact"]),
    "an unknown key of a table": (
        lambda d, f, t: toml(t, "[score]\nmode = 'ttt'"),
        ["mine.toml", "[score]", "mode = 'ttt'", "modes"],
    ),
    "weights of another shape": (
        lambda d, f, t: {"init_from": f, "dim": 64},
        ["32", "64", "--transfer"],
    ),
    "a transfer that takes nothing": (
        lambda d, f, t: {"init_from": f, "transfer": "nope"},
        ["transfer = 'nope'"],
    ),
    "log_dir below a file": (
        lambda d, f, t: ((t / "file").touch(), {"log_dir": "file/logs"})[1],
        ["file/logs", "--log_dir"],
    ),
    "log_dir that is a file": (
        lambda d, f, t: ((t / "file").touch(), {"log_dir": "file"})[1],
        ["file", "--log_dir"],
    ),
    "log_dir where nobody may write": ({"log_dir": "/proc/logs"}, ["/proc/logs", "--log_dir"]),
    "CUDA preset without CUDA": (
        {"config": "remix_m", "device": "cuda"},
        ["device = 'cuda'", "--config remix_m on_cpu"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(server, flags, data, finished, tmp_path, name):
    """
    Exit code 2 and a message that names the thing and the fix; no traceback; nothing made, nothing
    changed.
    """
    given, words = BAD[name]
    given = given(data, finished, tmp_path) if callable(given) else given
    watched = (data, finished.parent, tmp_path, ROOT / "configs")
    before = folder_hash(*watched)
    ended = server.run(*flags(**given), cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert_refused(ended, words)
    assert folder_hash(*watched) == before


@pytest.mark.parametrize("verb", [[], ["sample"], ["prove"], ["table"], ["export"]], ids=str)
@pytest.mark.parametrize("name", [n for n in BAD if "artifact" in n or "start from" in n])
def test_what_cannot_be_scored_sampled_or_exported_is_refused(
    server, data, finished, tmp_path, name, verb
):
    """A damaged artifact, a folder without weights, nothing at all."""
    given, words = BAD[name]
    given = given(data, finished, tmp_path) if callable(given) else given
    before = folder_hash(finished, tmp_path)
    ended = server.run(*verb, given["init_from"], cwd=tmp_path, program="logs.score")
    assert_refused(ended, words)
    assert folder_hash(finished, tmp_path) == before


def assert_refused(ended: Ended, words: list[str]) -> None:
    assert ended.code == 2 and "Traceback" not in ended.text and "Exception" not in ended.text, (
        ended.text
    )
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ended.text).split())
    assert not [w for w in words if w not in plain], plain


def test_a_run_name_that_is_taken_is_refused(server, flags, finished, tmp_path):
    """A second run of one name does not touch the first."""
    folder = _copy(finished.parent.parent, tmp_path / "run")
    before = folder_hash(folder)
    assert_refused(
        server.run(*flags(steps=2, vocab=2112), cwd=folder),
        ["logs/tiny", "--resume", "another --run"],
    )
    assert folder_hash(folder) == before


def test_resume_with_another_configuration_is_refused_with_the_difference(server, flags, tmp_path):
    """The message is the diff; what may change freely is not in it."""
    left = server.run(
        *flags(), cwd=tmp_path, when={"phase": "train_step", "send": [[900, signal.SIGTERM]]}
    )
    assert left.code == 143
    before = folder_hash(tmp_path)
    ended = server.run(
        *flags(matrix_lr=0.01, depth=2, eval_every=2, micro_tokens=64, resume=True), cwd=tmp_path
    )
    assert_refused(ended, ["logs/tiny", "depth: 1 -> 2", "matrix_lr: 0.05 -> 0.01", "--run"])
    assert "micro_tokens" not in ended.text and "eval_every" not in ended.text
    assert folder_hash(tmp_path) == before


@pytest.mark.parametrize("world", [1, 2])
def test_token_over_the_vocabulary_in_a_later_shard_is_refused(
    server, flags, data, tmp_path, world
):
    """Found when the shard is opened, in mid-run: all steps are saved, it goes on once mended."""
    given = damaged(data, tmp_path, "train_000002", put(64, 1024, "<u2"))
    argv = flags(steps=30, save_every=10, micro_tokens=128, **given)
    for ended in run_ranks(server, world, argv, tmp_path):
        assert_refused(
            ended,
            [
                "data/x_train_000002.bin",
                "token 64",
                "position 0",
                "--resume",
                "all 23 steps are saved in logs/tiny/ckpt/000023",
            ],
        )
    assert newest(tmp_path / "logs/tiny").name == "000023"
    shutil.copy(data / "x_train_000002.bin", tmp_path / "data")
    ended = run_ranks(server, world, [*argv, "--resume"], tmp_path)
    succeed(ended)
    assert "not yet read have changed: x_train_000002.bin has other content" in ended[0].out
    (tmp_path / "straight").mkdir()
    shutil.copytree(tmp_path / "data", tmp_path / "straight/data")
    succeed(run_ranks(server, world, argv, tmp_path / "straight"))
    ends = [tensors_of(newest(tmp_path / f / "logs/tiny")) for f in (".", "straight")]
    assert ends[0] == ends[1]


def test_a_shard_that_one_rank_alone_cannot_read_ends_all(server, flags, data, tmp_path):
    """Two ranks that see two disks: the other one hears of it, both save and leave."""
    for rank in "01":
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "logs").symlink_to(tmp_path / "logs")
        _copy(data, tmp_path / rank / "data")
    (tmp_path / "logs").mkdir()
    path = tmp_path / "1/data/x_train_000002.bin"
    path.write_bytes(put(64, 1024, "<u2")(bytearray(path.read_bytes())))
    argv = flags(steps=30, micro_tokens=128, data="data")

    def start(*more: str) -> list:
        env = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # one node: what nodes see is compared at the start
        return [
            server.start(
                *argv, *more, cwd=tmp_path / rank, env=env | {"RANK": rank, "LOCAL_RANK": rank}
            )
            for rank in "01"
        ]

    for fork in start():
        assert_refused(fork.wait(60), ["x_train_000002.bin", "token 64", "all 23 steps are saved"])
    assert newest(tmp_path / "logs/tiny").name == "000023"
    path.unlink()
    (tmp_path / "1/data/x_train_000001.bin").unlink()  # and at the start
    for fork in start("--run", "other"):
        assert_refused(fork.wait(60), ["no train shards"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("shuffle, steps", [(0, 38), (1, 39)])
def test_the_end_of_the_data_ends_a_run_on_the_clock_as_its_cap_does(
    server, flags, tmp_path, world, shuffle, steps
):
    """Checkpoint, evaluation, artifact and result are those of the last step that the data had."""
    argv = flags(
        steps=10000, max_seconds=500, shuffle=shuffle, micro_tokens=128, eval_every=0, export="int8"
    )
    ended = run_ranks(server, world, argv, tmp_path)
    succeed(ended)
    assert f"the data ended at step {steps}, after" in ended[0].out
    folder = tmp_path / "logs/tiny"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == steps and result["roundtrip_val_loss"] > 0
    assert (folder / "model.nrx").exists()
    assert newest(folder).name == f"{steps:06d}"
    assert [r["step"] for r in metrics(folder) if r["kind"] == "val"] == [steps]


def test_a_reader_that_leaves_costs_the_run_nothing(monkeypatch):
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        tg.to_console("step")
        tg.to_console("another")

        def print_help() -> int:
            raise BrokenPipeError

        assert tg.exit_code(print_help) == 0


def test_resume_with_other_data_is_refused(server, flags, data, tmp_path):
    """Another shard of the same name is named, nothing changed; with the old one it goes on."""
    folder = _copy(data, tmp_path / "data")
    argv = flags(data="data", steps=12)
    when = {"phase": "train_step", "send": [[900, signal.SIGTERM]]}
    assert server.run(*argv, cwd=tmp_path, when=when).code == 143
    checkpoint, kept = newest(tmp_path / "logs/tiny"), (folder / "x_train_000001.bin").read_bytes()
    (folder / "x_train_000001.bin").write_bytes(put(9, 2000, "<u2")(bytearray(kept)))
    (folder / "x_val_000000.bin").rename(folder / "y_val_000000.bin")
    before = tensors_of(checkpoint)
    for ended in run_ranks(server, 2, [*argv, "--resume", "--micro_tokens", "128"], tmp_path):
        assert_refused(
            ended,
            [
                "the data in data is not what this run was trained on",
                "x_train_000001.bin has other content",
                "x_val_000000.bin is gone; y_val_000000.bin is new",
                "--run",
            ],
        )
    assert tensors_of(newest(tmp_path / "logs/tiny")) == before
    (folder / "x_train_000001.bin").write_bytes(kept)
    (folder / "y_val_000000.bin").rename(folder / "x_val_000000.bin")
    state = json.loads((checkpoint / "state.json").read_text())
    old = _copy(tmp_path, tmp_path.with_name(tmp_path.name + "-old"))
    old /= checkpoint.relative_to(tmp_path)
    (old / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k != "data"}))
    succeed(server.run(*argv, "--resume", cwd=tmp_path))
    # as it was written before data had an identity
    ended = server.run(*argv, "--resume", cwd=old.parents[3])
    succeed(ended)
    assert "does not say what data it was trained on" in ended.out
    assert tensors_of(newest(tmp_path / "logs/tiny")) == tensors_of(newest(old.parents[1]))


def test_too_few_shards_are_found_on_every_rank(server, flags, tmp_path):
    """With ranks, too, before a folder is made; no rank waits for another."""
    for ended in run_ranks(server, 2, flags(steps=60), tmp_path):
        assert_refused(ended, ["60 steps", "found 2"])
    for ended in run_ranks(server, 2, flags(batch_tokens=96), tmp_path):
        assert_refused(ended, ["batch_tokens = 96 on 2 ranks"])
    assert not (tmp_path / "logs").exists()


def test_a_run_name_that_is_taken_is_refused_on_two_ranks(server, flags, finished, tmp_path):
    """Rank 0 finds it, all leave."""
    folder = _copy(finished.parent.parent, tmp_path / "run")
    before = folder_hash(folder)
    for ended in run_ranks(server, 2, flags(steps=2, vocab=2112), folder):
        assert_refused(ended, ["logs/tiny", "--resume"])
    assert folder_hash(folder) == before


def test_files_without_a_document_make_no_data_set(spoken, tmp_path):
    """data/get.py on files without a document makes no data set."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    argv = [
        "tokenize",
        "empty.txt",
        "empty.jsonl",
        "--out",
        "mine",
        "--tokenizer",
        spoken[0] / "tokenizer.model",
    ]
    ended = subprocess.run(
        [sys.executable, ROOT / "data/get.py", *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert_refused(
        Ended(ended.returncode, ended.stdout, ended.stderr),
        ["none of the 0 documents", "give more text"],
    )
    assert not list(tmp_path.rglob("*.bin"))


def test_misspelt_flag_on_the_command_itself_is_explained(tmp_path):
    """The same through the interpreter: exit code 2, no traceback, no folder."""
    ended = subprocess.run(
        [sys.executable, TRAINER, "--config", "tiny_cpu", "--stepps", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), ["stepps", "steps"])
    assert not list(tmp_path.iterdir())


def test_read_only_file_system_is_named(server, flags, data, tmp_path):
    """A folder of a file system that was mounted read-only, as root meets it."""
    with mounted(tmp_path / "logs", "ro"):
        ended = server.run(*flags(), cwd=tmp_path)
        assert_refused(ended, ["logs/tiny", "--log_dir"])


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A tmpfs on `folder`; the test says so and is skipped where the user may not mount."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"needs a user who may mount a tmpfs: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


# KiB
FULL = {"in the head of the log": 64, "in the first checkpoint": 400, "in a later checkpoint": 4000}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_keeps_the_old_checkpoint(server, breakable, tmp_path, where):
    """
    A tmpfs fills up: one message, exit code 2, the complete checkpoint kept; with room again it
    ends the same.
    """
    argv, clean, reference, _, every = breakable
    folder = _copy(clean, tmp_path / "run")
    with mounted(folder / "logs", f"size={FULL[where]}k"):
        ended = server.run(*argv, "--resume", cwd=folder, full_exit=True)
        assert_refused(ended, ["the disk is full", "--resume"])
        kept = sorted(int(p.parent.name) for p in folder.glob("logs/tiny/ckpt/[0-9]*/DONE"))
        assert bool(kept) == (where == "in a later checkpoint")
        assert all(
            tensors_of(folder / f"logs/tiny/ckpt/{step:06d}") == every[step] for step in kept
        )
        assert not list(folder.rglob(".*.part")), "what did not fit takes the room that is needed"
        subprocess.run(["mount", "-o", "remount,size=32m", folder / "logs"], check=True)
        succeed(server.run(*argv, "--resume", cwd=folder))
        same_end(folder / "logs/tiny", reference)


def test_a_full_disk_on_two_ranks_ends_both(server, breakable, tmp_path):
    """Only rank 0 writes; what it meets ends both, with the same message."""
    argv, clean, _, _, _ = breakable
    folder = _copy(clean, tmp_path / "run")
    with mounted(folder / "logs", "size=800k"):
        for ended in run_ranks(server, 2, argv, folder):
            assert_refused(ended, ["the disk is full", "--resume"])


def test_a_file_larger_than_allowed_is_named(flags, tmp_path):
    """
    `ulimit -f` (a quota that every user can set): the same message where no tmpfs can be mounted.
    """
    # in KiB; the log of this run is smaller, its checkpoint larger
    command = 'ulimit -f 200; exec "$@"'
    argv = [
        "bash",
        "-c",
        command,
        "bash",
        sys.executable,
        TRAINER,
        *flags(vocab=2112, save_every=2),
    ]
    ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert_refused(
        Ended(ended.returncode, ended.stdout, ended.stderr), ["the disk is full", "--resume"]
    )


def test_a_port_in_use_is_named(server, flags, tmp_path):
    """
    Two ranks are to meet where another program listens: rank 0 says so, and names the port and the
    fix.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ended = server.run(*flags(), cwd=tmp_path, env=env, full_exit=True)
    assert_refused(ended, [str(port), "MASTER_PORT", "--standalone"])
    assert not (tmp_path / "logs").exists()


########################################
#           Log and recompiles         #
########################################


@of_the_source
def test_the_log_holds_what_a_record_needs(server, flags, tmp_path):
    """
    log.txt: sources, environment, configuration, then the speedrun's lines in the speedrun's order.
    """
    succeed(server.run(*flags(ema=0.9, steps=7), cwd=tmp_path))
    log = (tmp_path / "logs/tiny/log.txt").read_text()
    source = TRAINER.read_text()
    assert log.startswith(source)
    head, config, body = log[len(source) :].split("=" * 100)[-3:]
    assert (
        "Running Python" in config
        and f"Running PyTorch {__import__('torch').__version__}" in config
    )
    assert 'run = "tiny"' in config and "steps = 7" in config
    lines = [line for line in body.splitlines() if line.startswith("step:")]
    assert all(VAL_LINE.match(line) or TRAIN_LINE.match(line) for line in lines), lines
    order = [
        ("val" if "val_loss" in line else "train") + line.split("/")[0].removeprefix("step:")
        for line in lines
    ]
    assert order == "val0 train1 train2 train3 val3 train4 train5 train6 val6 train7 val7".split()
    assert {int(m[2]) for m in VAL_LINE.finditer(body)} == {7}
    found = metrics(tmp_path / "logs/tiny")
    assert [float(m[3]) for m in VAL_LINE.finditer(body)] == pytest.approx(
        numbers(found, "val_loss"), abs=6e-6
    )
    ms = [int(m[3]) for m in TRAIN_LINE.finditer(body)]
    assert ms == sorted(ms) and float(list(TRAIN_LINE.finditer(body))[-1][4]) == pytest.approx(
        ms[-1] / 7, abs=0.2
    )
    # before the first step the average is the weights themselves
    assert re.findall(r"^  at:(\d+) .*val_loss_ema:\d", body, re.M) == ["3", "6", "7"]
    assert re.search(r"^peak memory allocated: \d+ MiB reserved: \d+ MiB$", body, re.M)
    assert re.search(r"^recompiles:0$", body, re.M) and re.search(
        r"^warmup:\d+ graphs time:[\d.]+s$", body, re.M
    )


PHASES = [(16, 0, 1, 128), (32, 0, 1, 128), (32, 0, 2, 256), (32, 8, 2, 256)]


@pytest.mark.parametrize("seconds", [0, 60])
def test_every_graph_of_the_schedules_is_warmed(server, flags, tmp_path, seconds):
    """
    Rows, repeats, batch and window change in mid-run, on the clock or not: nothing is traced inside
    the clock.
    """
    argv = flags(
        compile=2,
        depth=2,
        steps=8,
        eval_every=2,
        loop="1:2",
        repeats="0:1 0.5:2",
        window="0 0.75:8",
        seq_len="0:16 1/4:32",
        batch_tokens="0:128 0.5:256",
        micro_tokens=128,
        eval_seq_len=32,
        max_seconds=seconds,
    )
    ended = server.run(*argv, cwd=tmp_path, backend="eager")
    succeed(ended)
    assert re.search(r"^recompiles:0$", ended.out, re.M), ended.out
    train = [r for r in metrics(tmp_path / "logs/tiny") if r["kind"] == "train"]
    found = [(r["seq_len"], r["window"], r["repeats"], r["batch_tokens"]) for r in train]
    assert found == [phase for phase in PHASES for _ in range(2)]


# every part of the newest slowrun records, changing in mid-run
RECORDS = {
    "depth": 4, "steps": 8, "eval_every": 2, "head_init": 0.1, "proj_init": 1, "x0_lambda": 0.1,
    "passes": "0:1 0.5:2", "window": "4", "window_pattern": "SL", "window_long": "5 0.25:9 0.75:17",
    "yarn": 1, "key_offset": "second", "xsa": -1, "xsa_learned": 1, "mtp": 0.3, "loss_chunk": 40,
    "mtp_next": "0:0.5 0.33:0.5 0.66>0", "mtp_third": "0:0.25 0.33>0",
    "meta_step": "0:0.5 0.5:0.5 1>0^0.5", "meta_groups": 2, "meta_match": "mlp", "micro_tokens": 64,
}  # fmt: skip


def test_every_graph_of_the_slowrun_records_is_warmed(server, flags, tmp_path):
    """Weights of later tokens and the meta step's length change at every step, graphs at three."""
    argv = flags(**RECORDS | {"compile": 2, "eval_every": 4})
    ended = server.run(*argv, cwd=tmp_path, backend="eager")
    succeed(ended)
    assert re.search(r"^recompiles:0$", ended.out, re.M), ended.out
    train = [r for r in metrics(tmp_path / "logs/tiny") if r["kind"] == "train"]
    found = [(r["passes"], r["window_long"]) for r in train]
    assert found == [(1, 5)] * 2 + [(1, 9)] * 2 + [(2, 9)] * 2 + [(2, 17)] * 2
    assert len({r["mtp_third"] for r in train}) > 2 and train[0]["mtp_next_loss"] > 1


def test_ranks_of_the_slowrun_records_give_the_same_losses(server, flags, tmp_path):
    """1 and 2 ranks, and another cut into micro-batches."""
    found = {}
    for world, micro in ((1, 64), (2, 64), (2, 32)):
        argv = flags(**RECORDS | {"run": f"w{world}-{micro}", "micro_tokens": micro})
        succeed(run_ranks(server, world, argv, tmp_path))
        records = metrics(tmp_path / "logs" / f"w{world}-{micro}")
        keys = ("train_loss", "mtp_next_loss", "mtp_third_loss", "mtp", "grad_norm", "val_loss")
        found[world, micro] = {key: numbers(records, key) for key in keys}
    for key, one in found[1, 64].items():
        for other in list(found.values())[1:]:
            assert other[key] == pytest.approx(one, rel=1e-4, abs=1e-6), key


def ends_the_same_from(server, argv: list[str], folder: Path, steps: tuple[int, ...]) -> None:
    """A run of 8 steps, continued from its checkpoint of each of these, ends with its own bits."""
    succeed(server.run(*argv, cwd=folder))
    whole = folder / "logs/tiny"
    for step in steps:
        again = folder / str(step)
        _copy(whole, again / "logs/tiny")
        for later in range(step + 1, 9):
            shutil.rmtree(again / f"logs/tiny/ckpt/{later:06d}")
        (again / "logs/tiny/result.json").unlink()
        succeed(server.run(*argv, "--resume", cwd=again))
        same_end(again / "logs/tiny", whole)


def test_a_broken_run_of_the_slowrun_records_ends_with_the_same_bits(server, flags, tmp_path):
    """Whatever it is in: tables, windows and weights of the losses are reckoned from the step."""
    argv = flags(**RECORDS | {"save_every": 1, "keep": 9, "attn_dropout": 0.1, "export": "int8"})
    ends_the_same_from(server, argv, tmp_path, (1, 3, 5))


SPEEDRUN = {
    # every part of blocks and stream, windows and YaRN changing in mid-run
    "blocks": {
        "depth": 5, "steps": 8, "eval_every": 4, "head_init": 0.1, "proj_init": 1, "dim": 64,
        "heads": 4, "mlp_ratio": 1, "window": "4 0.5:6", "window_pattern": "SSSSL", "yarn": 1,
        "window_long": "5 0.5:9", "key_offset": "still", "smear": 8, "backout": "2:0.5",
        "value_layers": "1,4 0=1", "value_gate": "4+4", "no_attn_layers": "3", "paired_layers": "0",
        "xsa_layers": "1,2", "xsa_learned": 1, "attn_gate_layers": "2,4", "skip_gate": "1>3",
        "x0_layers": "0-2", "post_lambda": 1, "resid_lambda": 1.05, "sa_lambdas": "0.5 1",
        "late_input": "2", "gate_nets": "0,2", "mudd": "x0,2", "mudd_final": "x0,2,v1",
        "net_hidden": 64, "micro_tokens": 64,
    },
    # loss, tables, optimizer and loader, changing in mid-run
    "training": {
        "depth": 2, "steps": 8, "eval_every": 4, "head_init": 0.1, "proj_init": 1, "tie_embed": 1,
        "untie_at": "3s", "adam_every": 2, "softcap": 11.5, "softcap_in": 15, "softcap_shift": 5,
        "mtp_next": "0:0.5 1>0", "prefix_loss": "0:0.25 0.5:0.25 1>0", "loss_chunk": 12,
        "bos_rows": 1, "doc_cap": "0:20 4s:40",
        "seq_len": "0:16 4s:32", "batch_tokens": "0:128 4s:256", "micro_tokens": 64,
        "bigram_rows": 200, "bigram_signs": 16, "bigram_rule": "rows", "qk_groups": 1,
        "own_lr": "head=0.01/0.5 embed=0.02/0.7",
        "matrix_lr_mul": "mlp.proj=4", "sampled_classes": "0:40 2s:50 6s:0", "loss_sum": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def speedrun(flags, spoken):
    """speedrun("blocks", steps=3) -> the command line of a run with that part of the records."""
    text = {"data": spoken[0], "tokenizer": spoken[0] / "tokenizer.model", "vocab": 96}
    text |= {"doc_token": 1, "val_tokens": 0}
    return lambda part, **changes: flags(**text | SPEEDRUN[part] | changes)


@pytest.mark.parametrize("part", SPEEDRUN)
@pytest.mark.parametrize("how", [1, 2])
def test_every_graph_of_the_speedrun_records_is_warmed(server, speedrun, tmp_path, part, how):
    """Also that of the embedding's own update, which no step has before it is untied."""
    argv = speedrun(part, compile=how)
    ended = server.run(*argv, cwd=tmp_path, backend="eager")
    succeed(ended)
    assert re.search(r"^recompiles:0$", ended.out, re.M), ended.out
    train = [r for r in metrics(tmp_path / "logs/tiny") if r["kind"] == "train"]
    if part == "blocks":
        assert [r["window_long"] for r in train] == [5] * 4 + [9] * 4
    else:
        assert [r["sampled_classes"] for r in train] == [40] * 2 + [50] * 4 + [0] * 2
        assert [r.get("tied", 0) for r in train] == [1] * 4 + [0] * 4


@pytest.mark.parametrize("part", SPEEDRUN)
def test_ranks_of_the_speedrun_records_give_the_same_losses(server, speedrun, tmp_path, part):
    """1 and 2 ranks, and another cut into micro-batches."""
    found = {}
    for world, micro in ((1, 64), (2, 64), (2, 32)):
        argv = speedrun(part, run=f"w{world}-{micro}", micro_tokens=micro)
        succeed(run_ranks(server, world, argv, tmp_path))
        records = metrics(tmp_path / "logs" / f"w{world}-{micro}")
        keys = ["train_loss", "grad_norm", "val_loss"]
        if part == "training":
            keys += ["mtp_next_loss", "prefix_token_loss"]
        found[world, micro] = {key: numbers(records, key) for key in keys}
    for key, one in found[1, 64].items():
        for other in list(found.values())[1:]:
            assert other[key] == pytest.approx(one, rel=1e-4, abs=1e-6), key
    if part == "training":
        assert min(found[1, 64]["prefix_token_loss"][:4]) > 0


@pytest.mark.parametrize("part, steps", [("blocks", (3, 5)), ("training", (1, 3, 4, 5))])
def test_a_broken_run_of_the_speedrun_records_ends_with_the_same_bits(
    server, speedrun, tmp_path, part, steps
):
    """Tied or not, inside a shard, with a gradient that waits for the next, in any stage."""
    argv = speedrun(part, save_every=1, keep=9, export="int8")
    ends_the_same_from(server, argv, tmp_path, steps)


@pytest.fixture(scope="session", autouse=True)
def compiling(request, flags, tmp_path_factory):
    """
    A compiled run in the background: a minute of compilers, beside the other tests. Only if its
    test was chosen.
    """
    if not any("really_compiled" in item.name for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("compiled")
    argv = flags(
        compile=1,
        steps=4,
        eval_every=2,
        loop="0:1",
        repeats="0:1 0.5:2",
        seq_len="0:16 0.5:32",
        window="0:0 0.5:8",
        eval_seq_len=32,
        optimizer="adamw",
        tie_embed=1,
    )
    with open(folder / "out", "wb") as out:
        process = subprocess.Popen(
            [sys.executable, TRAINER, *argv], cwd=folder, stdout=out, stderr=subprocess.STDOUT
        )
    yield process, folder
    process.kill()
    process.wait()


def test_nothing_is_really_compiled_inside_the_clock(compiling):
    """The same with real compilers, kept small: every kernel was built before the first step."""
    process, folder = compiling
    assert process.wait(500) == 0, (folder / "out").read_text()
    assert re.search(r"^recompiles:0$", (folder / "out").read_text(), re.M)
    found = metrics(folder / "logs/tiny")
    shapes = {(r["seq_len"], r["window"], r["repeats"]) for r in found if r["kind"] == "train"}
    assert shapes == {(16, 0, 1), (32, 8, 2)}
    # building the kernels of one of these graphs takes longer
    assert max(r["train_time_ms"] for r in found) < 4000


########################################
#                Clock                 #
########################################


def test_the_clock_caps_training(server, flags, tmp_path):
    """
    max_seconds: the training clock ends at the cap (one short step over at most) and the schedule
    with it.
    """
    argv = flags(
        steps=100000, max_seconds=0.8, eval_every=20, epochs=0, lr="0:1 1>0", save_every=10
    )
    killed = server.start(*argv, cwd=tmp_path)
    log = tmp_path / "logs/tiny/metrics.jsonl"
    while killed.poll() is None and not (log.exists() and log.read_bytes().count(b'"train"') > 25):
        time.sleep(0.01)
    killed.signal(signal.SIGKILL)
    killed.wait()
    kept = json.loads((newest(tmp_path / "logs/tiny") / "state.json").read_text())["train_seconds"]
    succeed(server.run(*argv, "--resume", cwd=tmp_path))
    result = json.loads((tmp_path / "logs/tiny/result.json").read_text())
    train = [r for r in metrics(tmp_path / "logs/tiny") if r["kind"] == "train"]
    times = [r["train_time_ms"] / 1000 for r in train]
    assert all(a < b for a, b in zip(times, times[1:])), "the clock goes on from the checkpoint"
    longest = max(b - a for a, b in zip(times, times[1:]))
    assert kept > 0 and 0.8 - 3 * longest < result["train_time_s"] < 0.8 + longest
    assert result["wall_time_s"] > result["train_time_s"]
    for record, started in zip(train[1:], times):
        assert record["lr"] <= 1 - (started - longest) / 0.8
    assert train[-1]["lr"] < 3 * longest / 0.8 + 0.01
    assert result["steps"] == train[-1]["step"] and result["tokens"] == 256 * result["steps"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_ends_the_run(server, flags, tmp_path, optimizer):
    """
    It stops at once with exit code 2, names the step and the last good checkpoint, and keeps that.
    """
    argv = flags(
        optimizer=optimizer,
        adamw_lr=1e30,
        matrix_lr=1e38,
        embed_lr=1e30,
        lr="0:0 3s:1",
        steps=20,
        save_every=1,
        keep=2,
    )
    ended = server.run(*argv, cwd=tmp_path)
    assert_refused(ended, ["not finite", "Last good checkpoint: logs/tiny/ckpt/", "--grad_clip"])
    step = int(re.search(r"step (\d+): loss", ended.err)[1])
    good = newest(tmp_path / "logs/tiny")
    assert 4 <= step <= 8 and int(good.name) < step and str(good.relative_to(tmp_path)) in ended.err
    assert all(np.isfinite(t.numpy()).all() for t in load_file(good / "model.safetensors").values())
    assert all(
        np.isfinite(r["train_loss"])
        for r in metrics(tmp_path / "logs/tiny")
        if r["kind"] == "train"
    )
    assert not (tmp_path / "logs/tiny/result.json").exists()


########################################
#     Dry run, result, samples, wandb  #
########################################

PRESETS = [[p.stem] for p in sorted((ROOT / "configs").glob("*.toml")) if not tg.is_layer(p)]
PRESETS += [["remix_m", "on_cpu"], ["remix_m", "one_gpu"]]


@pytest.mark.parametrize("preset", PRESETS, ids=" ".join)
def test_the_dry_run_counts_what_a_run_would_cost(server, tmp_path, preset):
    """
    For every preset on eight ranks, without GPU and data: one JSON object, exit code 0, nothing
    written.
    """
    argv, env = ("--config", *preset, "--json"), {"WORLD_SIZE": "8"}
    ended = server.run(*argv, cwd=tmp_path, env=env, program="logs.dry_run")
    assert ended.code == 0, ended.text
    found = json.loads(ended.out)
    keys = set(
        "params groups flops_per_token tokens shards_needed memory_bytes artifact_bytes graphs "
        "estimated_seconds".split()
    )
    assert keys <= found.keys()
    assert found["params"] == sum(g["params"] for g in found["groups"])
    golden = {"remix_a": 123_568_128, "remix_m": 162_165_504}
    assert found["params"] == golden.get(preset[0], found["params"]) or preset[1:] == ["on_cpu"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", ["0", "abc", "-1"])
def test_a_number_of_ranks_that_is_none_is_refused_by_the_dry_run(server, tmp_path, world):
    argv, env = ["--config", "tiny_cpu"], {"WORLD_SIZE": world}
    ended = server.run(*argv, cwd=tmp_path, env=env, program="logs.dry_run")
    assert ended.code == 2 and ended.err.startswith(f"error: WORLD_SIZE={world}: "), ended.text


def test_the_dry_run_works_from_any_folder(tmp_path):
    """What a person types, from any folder; the table names the parts."""
    program = ROOT / "logs" / "dry_run.py"
    ended = subprocess.run(
        [sys.executable, program, "--config", "remix_a"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "123,568,128" in ended.stdout.replace("_", ",") and not list(tmp_path.iterdir())


def test_the_wiring_of_a_preset_is_a_table_of_its_places(server, tmp_path):
    argv = ("--config", "golf_progressive", "--wiring")
    ended = server.run(*argv, cwd=tmp_path, program="logs.dry_run")
    assert ended.code == 0, ended.text
    *_, last = ended.out.strip().split("repeats = ")
    rows = [line.split() for line in last.splitlines()[2:]]
    assert [row[1] for row in rows] == ["0", "1", "2"] * 4 and [row[0] for row in rows][-1] == "11"
    assert "last visit (8)" in last.splitlines()[-1] and "exclusive" in last.splitlines()[-1]
    assert ended.out.count("repeats = ") == 3


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """Text, a SentencePiece model of it, and its shards: what bits per byte and samples need."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spoken")
    words = "the old house stood by a river and nobody knew who had built it".split()
    rng = random.Random(3)
    texts = [" ".join(rng.choices(words, k=40)) + "." for _ in range(80)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=96,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens = [[1, *pieces.encode(t)] for t in texts]
    write_shard(folder / "x_train_000001.bin", sum(tokens[:70], []))
    write_shard(folder / "x_val_000000.bin", sum(tokens[70:], []))
    held_out = sum(len(t) for t in texts[70:])
    return folder, pieces, held_out


TOLD = """[score]
modes = "ttt mixture sliding"
stride = 16
prove_bytes = 150
sample_tokens = 20
"""


@pytest.fixture(scope="session")
def told(server, flags, spoken, tmp_path_factory):
    """
    A finished run on text, with everything that a run does and reports, and what scoring it said;
    it was tracked with wandb, offline.
    """
    folder = tmp_path_factory.mktemp("told")
    argv = flags(
        data=spoken[0],
        tokenizer=spoken[0] / "tokenizer.model",
        vocab=96,
        doc_token=1,
        val_tokens=0,
        steps=30,
        eval_every=10,
        config="told.toml",
        ema=0.9,
        epochs=0,
        arm="x",
        log_dir="results",
        wandb="nanoremix-test",
        dim=64,
        export="int6 head:8",
        export_codec="best",
        artifact_limit=600_000,
        gptq=2,
        qat="0:0 0.8:1",
    )
    (folder / "told.toml").write_text(TOLD)
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(folder)}
    ended = server.run(*argv, cwd=folder, env=env, full_exit=True)
    succeed(ended)
    scored = server.run("results/tiny", cwd=folder, program="logs.score")
    succeed(scored)
    return folder / "results/tiny", scored


@of_the_source
def test_the_result_has_its_keys_and_they_agree(told, spoken):
    """result.json: the keys of the design that apply, and they agree with each other."""
    folder, ended = told
    result = json.loads((folder / "result.json").read_text())
    expected = set(
        "run seed preset arm params steps tokens val_loss val_bpb roundtrip_val_bpb train_time_s "
        "wall_time_s eval_time_s artifact_bytes code_bytes total_bytes world_size device torch git "
        "data_sha256 config_sha256 resumed peak_memory_bytes".split()
    )
    assert expected <= result.keys(), expected - result.keys()
    assert result["proven_bytes"] == 150 and result["artifact_bits"].startswith("int6_head_8_")
    assert (
        result["sliding_val_bpb"] < result["roundtrip_val_bpb"]
        and {"mixed_val_bpb", "ttt_val_bpb"} < result.keys()
    )
    assert None not in result.values()
    assert (result["run"], result["arm"], result["steps"], result["tokens"]) == (
        "tiny",
        "x",
        30,
        30 * 256,
    )
    assert result["artifact_bytes"] == (folder / "model.nrx").stat().st_size
    scorers = ROOT / "logs" / "score.py"
    assert result["code_bytes"] == TRAINER.stat().st_size + scorers.stat().st_size
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    tokens = np.fromfile(spoken[0] / "x_val_000000.bin", dtype="<u2")[512:]
    scored = (len(tokens) - 1) // 32 * 32
    text = spoken[1].decode([int(t) for t in tokens[: scored + 1] if t != 1])
    bits = result["val_loss"] / np.log(2) * scored
    # decode() joins documents and drops the space before each, so the text has those spaces fewer
    documents = int((tokens[: scored + 1] == 1).sum())
    assert bits / result["val_bpb"] == pytest.approx(len(text.encode()), abs=2 * documents)
    last = [r for r in metrics(folder) if r["kind"] == "val"][-1]
    assert last["val_loss"] == result["val_loss"] and last["val_bpb"] == result["val_bpb"]
    assert result["roundtrip_val_bpb"] == pytest.approx(result["val_bpb"], rel=0.02)
    assert (
        "sample from the artifact" in ended.out
        and "xz -9e" in ended.out
        and "zstd -19" in ended.out
    )


def test_samples_follow_seed_and_source(server, told, tmp_path):
    """
    From the run's folder and from the artifact the same text for the same seed; another seed,
    another text.
    """
    folder, _ = told

    def say(source: Path, seed: int, **more) -> str:
        given = {"prompt": "the old", "seed": seed, "device": "cpu", "tokens": 30} | more
        words = [word for key, value in given.items() for word in (f"--{key}", value)]
        ended = server.run("sample", source, *words, cwd=tmp_path, program="logs.score")
        succeed(ended)
        return ended.out

    text = say(folder, 5)
    assert text.startswith("the old") and len(text) > 12
    assert say(folder / "model.nrx", 5) == text
    # the exact weights, which may say something else
    assert say(newest(folder), 5).startswith("the old")
    assert say(folder, 6) != text
    assert say(folder, 6, temperature=0) == say(folder, 7, temperature=0)
    assert not list(tmp_path.iterdir())


def test_wandb_records_a_run_offline(told):
    """
    With WANDB_MODE=offline a run is recorded below its own folder, with its configuration and its
    numbers.
    """
    folder, _ = told
    records = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(records) == 1
    raw = records[0].read_bytes()
    for word in (
        b"nanoremix-test",
        b"val/val_loss",
        b"train/train_loss",
        b"matrix_lr",
        b"roundtrip_val_bpb",
    ):
        assert word in raw, word


def test_wandb_without_a_login_says_how_and_the_run_goes_on(server, flags, tmp_path):
    """Asked for, but not logged in: the message says how, and the run goes on from there."""
    argv, home = (
        flags(steps=2, wandb="nanoremix-test"),
        {"HOME": str(tmp_path), "WANDB_SILENT": "true"},
    )
    ended = server.run(*argv, cwd=tmp_path, env=home | {"WANDB_MODE": "online"}, full_exit=True)
    assert_refused(
        ended, ["--wandb nanoremix-test", "wandb login", "WANDB_MODE=offline", "--resume"]
    )
    succeed(
        server.run(
            *argv, "--resume", cwd=tmp_path, env=home | {"WANDB_MODE": "disabled"}, full_exit=True
        )
    )
