"""A preset's training step at full size on one GPU with its share of the batch: time, MFU, memory,
kernels, waits of the host; beside another trainer's script where one is named.

    python tests/bench_gpu.py remix_m --share 8              # one rank's step of a run on 8 GPUs
    python tests/bench_gpu.py golf_progressive --share 8 --at "0 1" --trace trace.json.gz
    python tests/bench_gpu.py centering_221m --share 4 --flags="--compile 2"
    python tests/bench_gpu.py remix_m --share 8 --variant="--loss_chunk 16384"   # in turns
    python tests/bench_gpu.py remix_m on_cpu --device cpu --steps 3    # without a GPU
    python tests/bench_gpu.py remix_m --share 8 --against theirs.py --replace "8 ranks=>1 rank"
    torchrun --standalone --nproc_per_node 2 -- tests/bench_gpu.py remix_m --trace trace.json.gz

Names are layered as behind --config. The trainer is train_gpt.py's own: build, warm_up, train_step,
averages and, one step late, log_step. Tokens are random, drawn by Zipf's law, in documents of
about 1,000, so no data is needed. --at names the fractions of training whose schedules (repeats,
rows, window) are measured; those that make the same graph are measured once.

"step" are milliseconds between CUDA events at the beginnings of consecutive steps, which no wait of
the host lies between; "logged" is the same with each step's loss read as the loop reads it. Peak
memory is what the allocator gave out at once, in steps behind the warm-up, beside dry_run's figure.
Each --variant is one trainer more, with these flags behind --flags; the first moment of all of them
is then measured in turns. Of several ranks rank 0 speaks; it also says how long a step's
communication takes, and how much of that lies beside its computing.

Another trainer's script (--against) runs in a process of its own between two rounds of ours, on the
same shards (data/fineweb10B in its folder), with torchrun's variables of one rank. It must print
lines with step:N and train_time:Xms. Its times are differences of these, from line --skip on.
Texts in it are replaced first (--replace "OLD=>NEW", each found once): a script for eight GPUs has
to be told that it is on one.
"""

import argparse
import collections
import contextlib
import gzip
import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg  # noqa: E402
from data.get import write_shard  # noqa: E402
from logs.dry_run import H100_FLOPS, estimate, flops_per_token  # noqa: E402

TRAIN_TOKENS, VAL_TOKENS, DOCUMENT = 1 << 23, (1 << 17) + 1, 1000
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
         "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")  # fmt: skip
# nothing of a run but its steps: no evaluation, artifact, clock or end of the data
ONLY_STEPS = {
    "run": "bench",
    "tokenizer": "",
    "max_seconds": 0,
    "epochs": 0,
    "average_epochs": 0,
    "lr_cycles": 0,
    "eval_every": 0,
    "save_every": 0,
    "log_every": 10**9,
    "val_tokens": 0,
    "export": "",
    "gptq": 0,
    "artifact_limit": 0,
}


def write_tokens(folder: Path, cfg: tg.Config) -> None:
    """Shards of a vocabulary's tokens by Zipf's law, in documents of exponential lengths."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    weights = 1 / (np.arange(cfg.vocab) + 10.0)
    weights[cfg.doc_token] = 0
    order = rng.permutation(cfg.vocab)
    cumulated = np.cumsum(weights[order] / weights.sum())
    for split, count in (("train", TRAIN_TOKENS), ("val", VAL_TOKENS)):
        at = np.searchsorted(cumulated, rng.random(count), side="right")
        tokens = order[at.clip(max=cfg.vocab - 1)]
        starts = np.cumsum(1 + rng.exponential(DOCUMENT, 2 * count // DOCUMENT).astype(int))
        tokens[np.append(0, starts[starts < count])] = cfg.doc_token
        write_shard(folder / f"fineweb_{split}_000001.bin", tokens)


def configured(args: argparse.Namespace, data: Path, more: str = "") -> tg.Config:
    """The preset with one GPU's share of its batch, on the tokens in `data`; more: flags."""
    flags = ONLY_STEPS | {"data": data, "log_dir": data.parent / "logs"}
    flags |= {"device": args.device} if args.device else {}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    cfg = tg.parse_args(["--config", *args.preset, *words, *shlex.split(f"{args.flags} {more}")])
    points = [re.split("([:>~])", word) for word in cfg.batch_tokens.split()]
    for point in points:
        point[-1] = str(int(point[-1]) // args.share)
    cfg.batch_tokens = " ".join("".join(point) for point in points)
    tg.validate(cfg)
    return cfg


def chosen(plan: tg.Plan, fractions: str) -> list[tuple[float, tg.Now]]:
    """(fraction of training, its schedules): the first of those that make one graph."""
    found = {}
    for fraction in map(float, fractions.split()):
        now = plan.at(round(fraction * plan.cfg.steps), fraction)
        found.setdefault(tuple(tg.graph_of(now)), (fraction, now))
    return list(found.values())


class Bench:
    """A trainer that is warm, and its figures."""

    def __init__(self, args: argparse.Namespace, cfg: tg.Config, run: tg.Run, more: str = ""):
        self.args, self.cfg, self.run, self.more, self.done = args, cfg, run, more, 0
        self.on_gpu = run.device.type == "cuda"
        self.others = torch.cuda.memory_allocated() if self.on_gpu else 0
        began = time.perf_counter()
        self.trainer = tg.build(cfg, run)
        plan = self.trainer.plan
        self.moments = chosen(plan, args.at)
        # only the graphs that are measured, and none of an evaluation
        plan.moments, plan.eval_shapes = lambda: [now for _, now in self.moments], lambda: []
        self.build_s = time.perf_counter() - began
        began = time.perf_counter()
        tg.warm_up(self.trainer)
        self.sync()
        self.warm_up_s = time.perf_counter() - began
        self.graphs = tg.graphs_compiled()

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def step(self, now: tg.Now) -> tuple[torch.Tensor, torch.Tensor]:
        step, self.done = self.done, self.done + 1
        told = tg.train_step(self.trainer, step, now)
        self.trainer.avg.update(step + 1, step / self.cfg.steps)
        return told

    def times(self, now: tg.Now, count: int, logged: bool) -> dict[str, list[float]]:
        """Milliseconds of consecutive steps: "step" of the device, "host" of the host's part."""
        for _ in range(self.args.settle):
            self.step(now)
        self.sync()
        marks, host, late = [tg.moment(self.on_gpu)], [], None
        for _ in range(count):
            began = time.perf_counter()
            reading = tg.Reading(*self.step(now), marks[-1])
            host.append(1000 * (time.perf_counter() - began))
            if logged and late:
                tg.log_step(self.trainer, self.done - 1, now, late)
            late = reading
            marks.append(tg.moment(self.on_gpu))
        self.sync()
        if self.on_gpu:
            return {"step": [a.elapsed_time(b) for a, b in zip(marks, marks[1:])], "host": host}
        return {"step": [1000 * (b - a) for a, b in zip(marks, marks[1:])], "host": host}

    def memory(self, now: tg.Now) -> tuple[int, int, int]:
        """Peak bytes since the counters began, bytes reserved, and what dry_run says."""
        plan = tg.Plan(self.cfg)
        plan.moments = lambda: [now]
        predicted = estimate(self.cfg, plan, self.run.world)["memory_bytes"]
        if not self.on_gpu:
            return 0, 0, predicted
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return peak - self.others, reserved, predicted

    def head(self) -> str:
        cfg, name = self.cfg, tg.device_name(self.run)
        size = sum(p.numel() for p in self.trainer.model.parameters())
        return (
            f"{' '.join(self.args.preset)} {self.args.flags} {self.more} on {name}, "
            f"torch {torch.__version__}, {self.run.dtype}, compile {cfg.compile}, "
            f"{self.run.world} ranks: {size:,} parameters; build {self.build_s:.1f} s, "
            f"warm-up (compilation) {self.warm_up_s:.1f} s, {self.graphs} graphs"
        )


def spread(ms: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, mean and number."""
    low, high = np.percentile(ms, [10, 90])
    median, mean = statistics.median(ms), statistics.fmean(ms)
    return {"median": median, "p10": float(low), "p90": float(high), "mean": mean, "n": len(ms)}


def said(ms: dict[str, float]) -> str:
    return (
        f"{ms['median']:.2f} ms (p10 {ms['p10']:.2f}, p90 {ms['p90']:.2f}, mean {ms['mean']:.2f}, "
        f"n {ms['n']})"
    )


def measure(bench: Bench, fraction: float, now: tg.Now) -> dict:
    """All figures of the step at one moment of training; printed as they come."""
    shape = f"repeats {now.repeats}, rows of {now.seq_len}, window {now.window}"
    print(f"at {fraction:g} of training: {shape}, {now.batch_tokens} tokens a step", flush=True)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found = {"at": fraction, "shape": shape, "tokens": now.batch_tokens}
    for name, logged in (("step", False), ("logged", True)):
        times = bench.times(now, bench.args.steps, logged)
        found[name] = spread(times["step"])
        host = f"; host {spread(times['host'])['median']:.2f} ms" if not logged else ""
        print(f"  {name}: {said(found[name])}{host}", flush=True)
    rate = now.batch_tokens / found["step"]["median"] * 1000
    applied = now.window, now.passes, now.window_long
    flops = flops_per_token(bench.cfg, now.repeats, now.seq_len, *applied)
    found |= {"tokens_s": rate, "mfu": rate * flops / H100_FLOPS}
    share = f", MFU {found['mfu']:.1%} of {H100_FLOPS / 1e12:.0f} TFLOP/s" if bench.on_gpu else ""
    print(f"  {rate:,.0f} tokens/s at {flops / 1e6:,.1f} MFLOP each{share}")
    peak, reserved, predicted = bench.memory(now)
    found |= {"peak_bytes": peak, "reserved_bytes": reserved, "predicted_bytes": predicted}
    measured = f"peak {peak / 1e9:.2f} GB, reserved {reserved / 1e9:.2f} GB, " if peak else ""
    ratio = f": measured / predicted {peak / predicted:.3f}" if peak else ""
    print(f"  memory: {measured}predicted {predicted / 1e9:.2f} GB{ratio}", flush=True)
    if bench.args.profiled:
        found |= profiled(bench, now)
    found["recompiles"] = tg.graphs_compiled() - bench.graphs
    print(f"  recompiles behind the warm-up: {found['recompiles']}", flush=True)
    return found


def profiled(bench: Bench, now: tg.Now) -> dict:
    """
    What torch.profiler sees of a step: kernels and waits, the most expensive kernels, the ranks'
    communication.
    """
    count, path = bench.args.profiled, Path(bench.cfg.data).parent / "trace.json"
    if bench.args.trace and bench.run.is_main:  # of the last moment
        path = bench.args.trace
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if bench.on_gpu else []
    bench.sync()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(count):
            with torch.profiler.record_function("bench_step"):
                bench.step(now)
        bench.sync()
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        events = json.load(file)["traceEvents"]
    found = {}
    if bench.run.world > 1:
        found = {"communication_ms": communication(events, count)}
        whole, beside = found["communication_ms"]
        print(f"  communication: {whole:.2f} ms a step, {beside:.2f} ms of it beside computing")
    return found | (kernels_of(events, count) if bench.on_gpu else {})


def kernels_of(events: list[dict], count: int) -> dict:
    """counted(), printed."""
    found = counted(events, count)
    print(
        f"  a step has {found['kernels']:g} kernels ({found['kernel_ms']:.2f} ms), waits of the "
        f"host: {found['waits'] or 'none'}, copies: {found['copies']}"
    )
    for name, ms, calls in found["top"]:
        print(f"    {ms:9.3f} ms {calls:7g} x  {name[:100]}")
    return found


def of(events: list[dict], *kinds: str) -> list[dict]:
    """Those of a trace's events that last, of these categories."""
    return [e for e in events if e.get("cat") in kinds and e.get("ph") == "X"]


def steps_of(events: list[dict]) -> list[dict]:
    return [e for e in of(events, "user_annotation") if e["name"] == "bench_step"]


def communication(events: list[dict], steps: int) -> tuple[float, float]:
    """
    Milliseconds of a step in which ranks send or receive, and of those in which this one computes
    as well: on a GPU by kernels, on a CPU by what gloo's threads do beside the step's own thread.
    """
    sends, computes = [], []
    for e in of(events, "kernel"):
        (sends if e["name"].startswith("nccl") else computes).append(e)
    if not of(events, "kernel"):
        own = {e["tid"] for e in steps_of(events)}
        sends = [e for e in of(events, "user_annotation") if e["name"].startswith("gloo:")]
        computes = [e for e in of(events, "cpu_op") if e["tid"] in own]
        computes = [e for e in computes if not e["name"].startswith("c10d::")]
    sends, computes = joined(sends), joined(computes)
    shared = sum(
        max(0.0, min(b, d) - max(a, c)) for a, b in sends for c, d in computes if c < b and a < d
    )
    return sum(b - a for a, b in sends) / 1000 / steps, shared / 1000 / steps


def joined(events: list[dict]) -> list[tuple[float, float]]:
    """When at least one of these events was under way, in microseconds."""
    found: list[tuple[float, float]] = []
    for low, high in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return found


def counted(events: list[dict], steps: int) -> dict:
    """Of a step, from a trace's events: kernels, their time, copies, waits, the top ten."""
    inside, waits = steps_of(events), collections.Counter()
    for call in of(events, "cuda_runtime", "cuda_driver"):
        begun = any(s["ts"] <= call["ts"] <= s["ts"] + s["dur"] for s in inside)
        if begun and re.sub(r"_v\d+$", "", call["name"]) in WAITS:
            waits[call["name"]] += 1 / steps
    kernels, copies = of(events, "kernel"), collections.Counter()
    for copy in of(events, "gpu_memcpy"):
        copies[copy["name"]] += 1 / steps
    ms, calls = collections.Counter(), collections.Counter()
    for kernel in kernels:
        ms[kernel["name"]] += kernel["dur"] / 1000 / steps
        calls[kernel["name"]] += 1 / steps
    return {
        "kernels": len(kernels) / steps,
        "kernel_ms": sum(ms.values()),
        "waits": dict(waits),
        "copies": dict(copies),
        "top": [(name, took, calls[name]) for name, took in ms.most_common(10)],
    }


def replaced(text: str, pairs: list[str]) -> str:
    for pair in pairs:
        old, arrow, new = pair.partition("=>")
        if not arrow or text.count(old) != 1:
            sys.exit(f"--replace {pair!r}: {text.count(old)} places in the script have {old!r}")
        text = text.replace(old, new)
    return text


def their_times(args: argparse.Namespace, folder: Path) -> dict[str, float] | None:
    """Milliseconds of another script's steps; None where it printed too few of them."""
    script = folder / "theirs.py"
    script.write_text(replaced(args.against.read_text(), args.replace))
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    process = subprocess.Popen(
        [sys.executable, "-u", script],
        cwd=folder,
        env=os.environ | ranks | address,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ms, lines = [], collections.deque(maxlen=30)
    for line in process.stdout:
        lines.append(line)
        match = re.search(r"step:\d+(?:/\d+)? (?!val_loss).*?train_time:([\d.]+)ms", line)
        ms += [float(match[1])] if match else []
        if match and args.prepare:
            process.terminate()
            break
    code = process.wait()
    if code and not args.prepare:
        print(f"{args.against} ended with code {code}:\n{''.join(lines)}", flush=True)
    steps = np.diff(ms[args.skip :]).tolist()
    said_of_memory = [line.strip() for line in lines if "memory" in line]
    print(f"{args.against}: {len(ms)} steps {' '.join(said_of_memory)}", flush=True)
    return spread(steps) if len(steps) > 1 else None


def compare(benches: list[Bench], folder: Path) -> dict:
    """Rounds of ours and of the other script in turns; it begins and ends with ours."""
    args, rounds, theirs = benches[0].args, [[] for _ in benches], []
    for turn in range(args.turns + 1):
        if turn and args.against:
            if benches[0].on_gpu:
                torch.cuda.empty_cache()  # what we do not hold, they may have
            theirs.append(their_times(args, folder))
            print(f"  theirs {turn}: {said(theirs[-1]) if theirs[-1] else 'no times'}", flush=True)
        for bench, found in zip(benches, rounds):
            found.append({})
            for name, logged in (("step", False), ("logged", True)):
                ms = bench.times(bench.moments[0][1], args.steps, logged)["step"]
                found[-1][name] = spread(ms)
                print(
                    f"  ours {bench.more} {turn + 1}, {name}: {said(found[-1][name])}", flush=True
                )
    found = {
        "theirs": theirs,
        "ours": [{"flags": b.more, "rounds": r} for b, r in zip(benches, rounds)],
    }
    for ours in found["ours"] if any(theirs) else []:
        ours |= ratios(ours, theirs)
    return found


def ratios(ours: dict, theirs: list[dict | None]) -> dict[str, float]:
    """Our times by theirs, means over the rounds."""
    found = {}
    for name in ("step", "logged"):
        for kind in ("median", "mean"):
            mine = statistics.fmean(r[name][kind] for r in ours["rounds"])
            found[f"{name}_{kind}"] = mine / statistics.fmean(t[kind] for t in theirs if t)
            ratio = f"{found[f'{name}_{kind}']:.3f}"
            print(f"  ours {ours['flags']} ({name}) / theirs, by {kind}: {ratio}", flush=True)
    return {"ratios": found}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="+", help="layered as behind --config")
    parser.add_argument("--flags", default="", help="more of train_gpt.py's, in one word")
    parser.add_argument("--variant", action="append", default=[], help="flags of one trainer more")
    parser.add_argument("--device", default="", help="cuda or cpu; empty: the preset's")
    parser.add_argument("--share", type=int, default=1, help="GPUs that the batch is divided among")
    parser.add_argument("--steps", type=int, default=20, help="that are timed, of each kind")
    parser.add_argument("--settle", type=int, default=4, help="steps before these, not counted")
    parser.add_argument("--at", default="0 0.5 1", help="fractions of training to measure")
    parser.add_argument("--profiled", type=int, default=2, help="steps under the profiler; 0: none")
    parser.add_argument("--trace", type=Path, help="keep the profiler's trace: .json or .json.gz")
    parser.add_argument("--json", type=Path, help="append the figures to this file, a line a call")
    parser.add_argument("--against", type=Path, help="another trainer's script")
    parser.add_argument("--replace", action="append", default=[], help="OLD=>NEW in that script")
    parser.add_argument("--skip", type=int, default=20, help="lines of its steps that do not count")
    parser.add_argument("--turns", type=int, default=1, help="how often that script is run")
    parser.add_argument(
        "--prepare", action="store_true", help="compile both, time nothing: fills the cache"
    )
    return parser.parse_args()


def main() -> None:
    args = parsed()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = folder / "data" / "fineweb10B"  # where upstream's scripts look
        cfg = configured(args, data)
        write_tokens(data, cfg)
        run = stack.enter_context(tg.Run(cfg))
        if not run.is_main:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        benches, found = [], {"moments": []}
        for more in ["", *args.variant]:
            bench = Bench(args, configured(args, data, more), run, more)
            benches.append(bench)
            print(bench.head(), flush=True)
            if args.prepare:
                bench.times(bench.moments[0][1], 1, False)
                continue
            for fraction, now in bench.moments:
                found["moments"].append({"what": bench.head()} | measure(bench, fraction, now))
        if args.prepare:
            del bench, benches
            if args.against:
                torch.cuda.empty_cache()
                their_times(args, folder)
            return
        if args.against or args.variant:
            found |= compare(benches, folder)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
