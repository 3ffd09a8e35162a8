"""
SIGKILLs at random instants over tiny runs of five presets, each resumed until it ends: it must end
as the unbroken run does, to the bit. Not part of the tests; 20 kills take a preset two minutes.

    python tests/campaign.py                          # 100 kills, seed 0
    python tests/campaign.py golf nca --kills 10      # 5 of each of these

Prints a line for each preset: kills, resumes, finished runs, and "equal" or what differs. What is
compared: weights, optimizer, averages, loader and random numbers of the last checkpoint, weights of
epochs, the artifact, every number of metrics.jsonl and result.json but times and memory. Exit code
1 where something differs. Folders of runs that differ are kept, and named.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from forks import ROOT, Server
from safetensors.torch import load_file
from test_runs import newest, timeless

OF_ONE_ATTEMPT = {
    "train_time_s",
    "wall_time_s",
    "eval_time_s",
    "first_eval_time_s",
    "resumed",
    "peak_memory_bytes",
}
SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "compile": 0,
    "max_seconds": 0,
    "steps": 12,
    "depth": 3,
    "dim": 64,
    "heads": 2,
    "head_dim": 32,
    "seq_len": 128,
    "batch_tokens": 512,
    "micro_tokens": 256,
    "val_tokens": 1024,
    "eval_every": 4,
    "save_every": 2,
    "ema": 0.9,
    "swa_every": 2,
    "swa_start": 0.3,
}
GOLF = {"kv_heads": 1, "export": "int6", "export_codec": "entropy", "artifact_limit": 0, "gptq": 4}
SCORES = "--modes|sliding mixture|--stride|64|--prove_bytes|0|--sample_tokens|8".split("|")
SLOWRUN = {
    "depth": 4,
    "loop": "1:3",
    "window": 50,
    "train_tokens": 16 * 129,
    "epochs": 3,
    "lr_cycles": 1,
    "average_epochs": 2,
    "eval_every": -1,
}
PRE = {
    "nca_colors": 3,
    "nca_grid": 6,
    "nca_seq_len": 60,
    "nca_filter": "pr63",
    "nca_band": "0.2:0.9",
    "nca_threads": 1,
    "nca_tokens": 2200,
    "nca_val_tokens": 660,
    "nca_epochs": 3,
    "batch_tokens": 440,
    "micro_tokens": 220,
    "eval_every": 3,
    "save_every": 2,
    "ema": 0.9,
    "compile": 0,
    "device": "cpu",
    "dtype": "float32",
    "depth": 2,
    "dim": 64,
    "heads": 2,
}


@dataclass
class Stage:
    """A program and its flags, and the run that it works on. Several are a preset's phases."""

    program: str
    argv: list[str]
    run: str


def stage(run: str, *words: str, program: str = "train_gpt", **flags) -> Stage:
    given = [w for key, value in flags.items() for w in (f"--{key}", str(value))]
    return Stage(program, [*words, *given, "--run", run, "--resume"], run)


def scoring(run: str, *words: str) -> Stage:
    """It goes on where it was stopped without being told to."""
    return Stage("logs.score", [f"logs/{run}", *words], run)


def presets(data: Path) -> dict[str, list[Stage]]:
    text = SMALL | {"data": data, "tokenizer": data / "tokenizer.model"}
    return {
        "golf": [stage("run", "--config", "golf_cpu", **text | GOLF), scoring("run", *SCORES)],
        "slowrun": [stage("run", "--config", "slowrun_cpu", **text | SLOWRUN), scoring("run")],
        "remix": [
            stage("run", "--config", "remix_m", "on_cpu", **text | {"param_dtype": "bfloat16"})
        ],
        "nca": [
            stage("pre", "--like", "nca_cpu", program="pre_pre_train", **PRE),
            stage(
                "run",
                "--config",
                "nca_cpu",
                **text | {"depth": 2, "head_dim": 0, "init_from": "logs/pre", "transfer": "attn"},
            ),
        ],
        "ranks": [stage("run", "--config", "tiny_cpu", **text)],  # two, by torchrun
    }


########################################
#             Processes                #
########################################


class Alone:
    """A stage as one process, forked from one that has imported torch."""

    def __init__(self, server: Server, at: Stage, folder: Path):
        self.fork = server.start(*at.argv, cwd=folder, program=at.program)

    def code(self) -> int | None:
        return self.fork.poll()

    def kill(self, rng: random.Random) -> None:
        self.fork.signal(signal.SIGKILL)

    def text(self) -> str:
        return self.fork.read(0) + self.fork.read(1)


class Ranks:
    """A stage as two gloo ranks under torchrun. A kill takes both, or one, and torchrun notices."""

    def __init__(self, server: Server, at: Stage, folder: Path):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc_per_node=2", "--"]
        self.out, env = folder / "torchrun.txt", os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self.out, "wb") as out:
            self.process = subprocess.Popen(
                [*command, ROOT / f"{at.program.replace('.', '/')}.py", *at.argv],
                cwd=folder,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.workers: list[int] = []

    def code(self) -> int | None:
        self.workers = children(self.process.pid) or self.workers
        return self.process.poll()

    def kill(self, rng: random.Random) -> None:
        workers = children(self.process.pid)
        if workers and rng.random() < 0.5:
            os.kill(rng.choice(workers), signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.process.kill()
        self.process.wait()
        for pid in workers:
            end = time.monotonic() + 30
            while alive(pid) and time.monotonic() < end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)

    def text(self) -> str:
        return self.out.read_text(errors="replace")


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


########################################
#              Comparing               #
########################################


def tensors(path: Path) -> dict[str, bytes]:
    return {
        name: t.reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, t in load_file(path).items()
    }


def ends(folder: Path) -> dict:
    """All that a finished run leaves, but for what is of one attempt, such as times."""
    last = newest(folder)
    saved = json.loads((last / "state.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = {
        part: tensors(last / f"{part}.safetensors") for part in ("model", "optimizer", "averages")
    }
    found |= {
        f"epoch {path.parent.name}": tensors(path)
        for path in folder.glob("epochs/[0-9]*/model.safetensors")
    }
    found |= {"state": {key: saved[key] for key in ("step", "loader", "rng")}}
    found |= {"metrics": timeless([json.loads(line) for line in lines])}
    found |= {"result": lasting(result)}
    for name, figure in result.get("scores", {}).items():
        found["result"][name] = lasting(figure)
    found["result"].pop("scores", None)  # whose order tells what was taken before a kill
    artifact = folder / "model.nrx"
    return found | {"artifact": artifact.read_bytes() if artifact.exists() else b""}


def lasting(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in OF_ONE_ATTEMPT}


def differences(mine: dict, other: dict) -> list[str]:
    """Where two ends differ, in words."""
    words = []
    for part in mine.keys() | other.keys():
        a, b = mine.get(part), other.get(part)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            keys = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
            words.append(f"{part}: {', '.join(keys[:4])}")
        else:
            words.append(part)
    return sorted(words)


########################################
#               Campaign               #
########################################


def written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def attempt(start, at: Stage, folder: Path, wait: tuple[float, float] | None):
    """
    Start a stage and wait for its end, or only as long as `wait` says: (seconds, inf) counts from
    the start of its process, (inf, seconds) from its first line in the log. Returns the process,
    the seconds before that line, and the seconds from that line to its end.
    """
    log = folder / "logs" / at.run / "log.txt"
    before, began, process = written(log), time.monotonic(), start(at, folder)
    first, (early, late) = None, wait or (600, 600)
    while process.code() is None:
        now = time.monotonic()
        if first is None and written(log) != before:
            first = now
        if now > began + early or first is not None and now > first + late:
            break
        time.sleep(0.002)
    now = time.monotonic()
    return process, ((first or now) - began, now - (first or now))


def until_it_ends(
    start, stages: list[Stage], folder: Path, rng: random.Random, spans: list, kills: int
) -> tuple[int, int]:
    """
    Run the stages in a folder and kill them at random instants while kills are left, a quarter of
    them before the first line in the log; `spans` holds the seconds of each stage without a kill.
    Returns the number of kills and the number of runs that were resumed.
    """
    made = resumes = 0
    for at, (starting, working) in zip(stages, spans):
        ended = False
        while not ended:
            resumes += (folder / "logs" / at.run).exists()
            early = rng.random() < 0.25
            wait = (
                (rng.uniform(0, starting), math.inf)
                if early
                else (math.inf, rng.uniform(0, working))
            )
            process, _ = attempt(start, at, folder, wait if made < kills else None)
            if process.code() is None:
                assert made < kills, f"{at.argv} did not end; {process.text()[-2000:]}"
                process.kill(rng)
                made += 1
                while process.code() is None:
                    time.sleep(0.002)
            else:
                ended = process.code() == 0
                assert ended, f"{at.argv} ended with {process.code()}: {process.text()[-2000:]}"
    return made, resumes


def campaign(
    name: str, stages: list[Stage], start, work: Path, kills: int, rng: random.Random
) -> tuple[str, bool]:
    """The line about a preset, and whether all of its runs ended alike."""
    whole, spans = work / f"{name}-whole", []
    whole.mkdir()
    for at in stages:
        process, span = attempt(start, at, whole, None)
        assert process.code() == 0, process.text()[-2000:]
        spans.append(span)
    reference = {at.run: ends(whole / "logs" / at.run) for at in stages}
    made = resumes = runs = 0
    while made < kills:
        folder = work / f"{name}-{runs}"
        folder.mkdir()
        some = until_it_ends(
            start, stages, folder, rng, spans, min(kills - made, rng.randint(1, 8))
        )
        made, resumes, runs = made + some[0], resumes + some[1], runs + 1
        told = f"{name}: {made} kills, {resumes} resumes, {runs} runs:"
        for at in stages:
            if words := differences(ends(folder / "logs" / at.run), reference[at.run]):
                return f"{told} DIFFERENT {folder}/logs/{at.run}: {'; '.join(words)}", False
        if parts := list(folder.rglob("*.part")):
            return f"{told} LEFT BEHIND {parts[0]}", False
        shutil.rmtree(folder)
    return f"{name}: {made} kills, {resumes} resumes, {runs} runs: equal", True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("presets", nargs="*", help="golf, slowrun, remix, nca, ranks; none: all")
    parser.add_argument("--kills", type=int, default=100, help="over all presets together")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument(
        "--work", default="", help="folder for the runs; empty: a new one below /tmp"
    )
    flags = parser.parse_args()
    work = Path(flags.work or tempfile.mkdtemp(prefix="campaign-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    data = work / "sample"
    subprocess.run(
        [sys.executable, ROOT / "data/get.py", "sample", "--out", data],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    known = presets(data)
    names = flags.presets or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{unknown[0]}: no such preset; there are {', '.join(known)}")
    server, right = Server(work), True
    server.run("--config", "none")  # once it has answered it is warm: spans are of runs alone
    try:
        for i, name in enumerate(names):
            kills = flags.kills // len(names) + (i < flags.kills % len(names))
            kind = Ranks if name == "ranks" else Alone
            line, alike = campaign(
                name,
                known[name],
                lambda at, folder, kind=kind: kind(server, at, folder),
                work,
                kills,
                random.Random(f"{flags.seed} {name}"),
            )
            print(line, flush=True)
            right = right and alike
    finally:
        server.close()
    if right and not flags.work:
        shutil.rmtree(work)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
