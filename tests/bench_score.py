"""What scoring costs: the compiled forward pass, the sliding window, the mixture, in turns on the
same tokens.

    python tests/bench_score.py [--rounds 5] [--config golf_cpu] [--tokens 16384] [--stride 64]

Weights are random: time does not depend on them. The forward pass is the model's own, with its
loss, over rows of seq_len. A sliding pass sees a token about seq_len/stride times; its rate counts
all the tokens that go through the model, so 1.0 would mean that windows, gathers and sums cost
nothing beside the forward pass.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # noqa: E402
from logs import score  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="golf_cpu")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--stride", type=int, default=64)
    args = parser.parse_args()
    cfg = tg.parse_args(["--config", args.config, "--run", "bench"])
    run, plan = tg.Run(cfg), tg.Plan(cfg)
    run.prepare_machine()
    shape = plan.eval_shape(plan.at(cfg.steps, 1.0))
    model = tg.build_model(cfg, run.device, run.dtype, shape.seq_len)
    graph = tg.compile_model(model, cfg)
    stream = np.random.default_rng(0).integers(cfg.vocab, size=args.tokens + 1)
    scorers = {
        mode: score.make_scorer(model, score.OneScore(mode=mode, stride=args.stride), shape)
        for mode in ("sliding", "mixture")
    }
    x, y = tg.tensors(stream[: shape.rows * shape.seq_len + 1][None], run.device)
    x, y = (t.view(shape.rows, shape.seq_len) for t in (x, y))
    seen = len(score.window_plan(args.tokens, shape.seq_len, args.stride)) * shape.seq_len
    passes = seen // x.numel()

    @torch.no_grad()
    def forward() -> None:
        for _ in range(passes):
            graph(x, y, shape.repeats, shape.window)

    ways = {"forward": forward} | {
        mode: (lambda s=s: s.score(stream)) for mode, s in scorers.items()
    }
    seconds = {name: [] for name in ways}
    for i in range(args.rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if i:  # the first round compiles
                seconds[name].append(time.perf_counter() - began)
    through = {"forward": passes * x.numel(), "sliding": seen, "mixture": seen}
    rate = {name: [through[name] / s for s in times] for name, times in seconds.items()}
    for name, r in rate.items():
        print(
            f"{name:8} {statistics.median(r):9,.0f} tokens/s through the model (median of "
            f"{len(r)}; {min(r):,.0f} to {max(r):,.0f})"
        )
    for a, b, words in (
        ("sliding", "forward", "rate of sliding over forward"),
        ("sliding", "mixture", "time of mixture over sliding"),
    ):
        ratios = [p / q for p, q in zip(rate[a], rate[b])]
        print(
            f"{words}: {statistics.median(ratios):.3f} (median of {len(ratios)}; {min(ratios):.3f} "
            f"to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
