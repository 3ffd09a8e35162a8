"""Time per token as a model grows, as rows grow, and with ranks: runs of the trainer, a few steps
each, one behind the other.

    python tests/bench_growth.py [--steps 8] [--only models rows ranks] [--config tiny_cpu]
    python tests/bench_growth.py --figure docs/growth.png --json growth.json
    python tests/bench_growth.py --config remix_m --largest 1400    # on a GPU, millions of weights
    python tests/bench_growth.py --pairs 5    # two ranks of one thread against one of two, in turns

The net is --config's, with the widths and depths of MODELS, batches of 2,048 tokens and rows of
512; with rows of 1,024 to 65,536 it is the second of them, batches are one row and windows are of
1,024 tokens; with ranks it is the third, batches of 8,192 tokens are shared, and every rank has one
thread. Compiled as --config is. Time is the trainer's clock per step, the median of all steps but
the first two and its quartiles. TFLOP/s are of the flops that dry_run reckons, per rank. Memory is
what the run's result says beside dry_run's figure: on a CPU all of the process, on a GPU what the
allocator gave out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402
from logs.dry_run import estimate  # noqa: E402

# depth, width, heads: about 1, 4, 11, 40, 110, 300, 760 and 1,400 million weights, tables aside
MODELS = [(4, 128, 2), (4, 256, 4), (6, 384, 6), (8, 640, 10), (12, 896, 14), (16, 1280, 20)]
MODELS += [(24, 1600, 25), (30, 1984, 31)]
ROWS, RANKS = (1024, 4096, 16384, 65536), (1, 2, 4, 8)


def jobs(only: list[str], largest: float) -> list[tuple[str, str, dict]]:
    """Of each run the table, the label, and the flags."""
    shape = [dict(zip(("depth", "dim", "heads"), model)) for model in MODELS]
    rows = {"batch_tokens": 2048, "micro_tokens": 2048, "seq_len": 512, "eval_seq_len": 512}
    found = []
    for one in shape if "models" in only else ():
        if one["depth"] * 12 * one["dim"] ** 2 < largest * 1e6:
            found.append(("models", f"{one['depth']} x {one['dim']}", one | rows))
    for T in ROWS if "rows" in only else ():
        long = dict.fromkeys(("batch_tokens", "micro_tokens", "seq_len", "eval_seq_len"), T)
        found.append(("rows", f"{T:,}", shape[1] | long | {"window": 1024}))
    for world in RANKS if "ranks" in only else ():
        shared = {"batch_tokens": 8192, "micro_tokens": min(4096, 8192 // world), "world": world}
        found.append(("ranks", f"{world}", shape[2] | rows | shared))
    return found


def measure(config: str, flags: dict, steps: int, more: list[str]) -> dict:
    """One run of the trainer: seconds of its steps, and what dry_run says of it."""
    flags = {
        "steps": steps,
        "max_seconds": 0,
        "export": "",
        "save_every": 0,
        "save_last": 0,
    } | flags
    world, T = flags.pop("world", 1), int(flags["seq_len"])
    flags |= {} if torch.cuda.is_available() else {"device": "cpu"}  # whose scores dry_run counts
    flags |= {"eval_every": 0, "val_tokens": max(T, 4096)}
    with tempfile.TemporaryDirectory() as folder:
        flags |= {"run": "growth", "log_dir": folder}
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        argv = ["--config", *config.split(), *words, *more]
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "--"]
        command = [sys.executable, *(start if world > 1 else []), str(ROOT / "train_gpt.py"), *argv]
        threads = {"OMP_NUM_THREADS": "1"} if world > 1 else {}  # one process: all cores
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
        if done.returncode:
            sys.exit(f"{' '.join(argv)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = (Path(folder) / "growth" / "metrics.jsonl").read_text("utf-8").splitlines()
        result = json.loads((Path(folder) / "growth" / "result.json").read_text("utf-8"))
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    batch = int(flags["batch_tokens"])
    seconds = [batch / row["tok_s"] for row in rows][2:]
    reckoned = estimate(cfg := tg.parse_args(argv), tg.Plan(cfg), world)
    flops = max(reckoned["flops_per_token"].values()) * batch / world
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {
        "params": result["params"],
        "us_per_token": [1e6 * x / batch for x in (middle, low, high)],
        "tflops": flops / middle / 1e12,
        "memory_gb": result["peak_memory_bytes"] / 1e9,
        "reckoned_gb": reckoned["memory_bytes"] / 1e9,
        "device": result["device"],
        "n": len(seconds),
    }


def compare_ranks(config: str, pairs: int, steps: int, more: list[str]) -> None:
    """Two ranks with a thread each against one process with two, in turns: tokens per second."""
    by_world = {flags["world"]: flags for _, _, flags in jobs(["ranks"], 0)}
    ratios = []
    for _ in range(pairs):
        one, two = (measure(config, dict(by_world[n]), steps, more) for n in (1, 2))
        ratios.append(one["us_per_token"][0] / two["us_per_token"][0])
        print(f"1 x 2 threads {one['us_per_token'][0]:.1f} us a token, 2 x 1 thread ", end="")
        print(f"{two['us_per_token'][0]:.1f}, ratio {ratios[-1]:.3f}", flush=True)
    print(
        f"ratio of tokens/s {statistics.median(ratios):.3f} (median of {pairs}; {min(ratios):.3f} "
        f"to {max(ratios):.3f})"
    )


def draw(found: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure  # pyplot would look for a display

    tables = list(dict.fromkeys(row["table"] for row in found))
    names = {"models": "weights, millions", "rows": "tokens of a row", "ranks": "ranks"}
    figure = Figure(figsize=(4.2 * len(tables), 3.4), layout="constrained")
    for place, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables):
        rows = [row for row in found if row["table"] == table]
        x = {"models": lambda row: row["params"] / 1e6}.get(
            table, lambda row: int(row["label"].replace(",", ""))
        )
        y, low, high = zip(*(row["us_per_token"] for row in rows))
        at = [x(row) for row in rows]
        spread = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
        place.errorbar(at, y, yerr=spread, marker="o", capsize=3)
        place.set(xscale="log", xlabel=names[table])
        if table == "models":
            place.set_yscale("log")
        else:
            place.set_ylim(0)
        place.set_xticks(at, [f"{value:,.0f}" for value in at], minor=False)
        place.set_xticks([], minor=True)
        place.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("microseconds a token")
    figure.suptitle("Training time per token: median and quartiles of steps", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny_cpu", help="presets, layered left to right")
    parser.add_argument("--steps", type=int, default=8)
    tables = ["models", "rows", "ranks"]
    parser.add_argument("--only", nargs="+", choices=tables, default=tables)
    parser.add_argument("--largest", type=float, default=320, help="millions of weights in blocks")
    parser.add_argument("--pairs", type=int, default=0, help="two ranks against one, so often")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    args, more = parser.parse_known_args()
    if args.pairs:
        return compare_ranks(args.config, args.pairs, args.steps, more)
    found = []
    print("| what | weights | us a token, quartiles | n | TFLOP/s a rank | GB, reckoned |")
    print("|-|-|-|-|-|-|")
    for table, label, flags in jobs(args.only, args.largest):
        row = {"table": table, "label": label}
        row |= measure(args.config, dict(flags), args.steps, more)
        middle, low, high = row["us_per_token"]
        print(
            f"| {table} {label} | {row['params'] / 1e6:,.1f} M | {middle:,.1f}, {low:,.1f} to "
            f"{high:,.1f} | {row['n']} | {row['tflops']:.3f} | {row['memory_gb']:.2f}, "
            f"{row['reckoned_gb']:.2f} |",
            flush=True,
        )
        found.append(row)
    print(f"on {found[0]['device']}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
