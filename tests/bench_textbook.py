"""Training speed against a textbook GPT of the same shape: 6 layers, width 384, heads of 64 dims,
rows of 512 tokens, 16 rows, vocabulary 1024, bfloat16, compiled, the loss, gradients and optimizer
of a whole step.

    python tests/bench_textbook.py [--pairs 10] [--dtype bfloat16]
    python tests/bench_textbook.py --shape 4x256x256 --rows 8     # layers x width x tokens of a row
    python tests/bench_textbook.py --recipe              # ours with Muon, softcap, document mask
    python tests/bench_textbook.py --against faulting    # ours with glibc's return of memory
    python tests/bench_textbook.py --attention           # one layer's attention, both ways

The textbook is written as most tutorials write it: pre-norm blocks with nn.LayerNorm and nn.Linear,
GELU, scaled_dot_product_attention, learned positions, tied head, autocast, torch.compile of the
whole model and fused torch.optim.AdamW. Ours does the same task by default: AdamW, causal
attention, plain logits. Each of the two lives in a process of its own (so neither profits from the
other's settings); they take turns of a few steps, and the ratio is taken turn by turn. Prints both
in tokens/s, and the ratio's median and range.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LAYERS, DIM, HEADS, T, ROWS, VOCAB, STEPS = 6, 384, 6, 512, 16, 1024, 3  # see main()


class TextbookBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):
        B = x.size(0)
        q, k, v = (
            t.view(B, T, HEADS, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, DIM))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Textbook(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, DIM), nn.Embedding(T, DIM)
        self.blocks, self.norm = (
            nn.ModuleList(TextbookBlock() for _ in range(LAYERS)),
            nn.LayerNorm(DIM),
        )
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, x, y):
        h = self.tokens(x) + self.positions.weight
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.norm(h), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, VOCAB), y.view(-1))


def textbook_step(dtype):
    torch.manual_seed(0)
    model = Textbook()
    opt = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    graph = torch.compile(model)

    def step(x, y):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
            loss = graph(x, y)
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        return loss.item()

    return step


SAME_TASK = ("--optimizer", "adamw", "--doc_mask", "0", "--softcap", "0", "--logit_dim_power", "0")
NO_PAIRS = ("--bigram_rows", "0", "--bigram_signs", "0", "--bigram_rule", "adam")
SAME_TASK += (*NO_PAIRS, "--normuon", "0", "--polar_gram", "1")


def our_step(dtype, flags=(), keep_memory=True):
    import train_gpt as t

    cfg = t.parse_args(
        [
            *("--config", "tiny_cpu", "--run", "bench", "--device", "cpu"),
            *(
                "--dtype",
                str(dtype).removeprefix("torch."),
                "--seq_len",
                str(T),
                "--batch_tokens",
                str(ROWS * T),
            ),
            *(
                "--micro_tokens",
                str(ROWS * T),
                "--depth",
                str(LAYERS),
                "--dim",
                str(DIM),
                "--heads",
                str(HEADS),
            ),
            *flags,
        ]
    )
    run = t.Run(cfg)
    if keep_memory:
        run.prepare_machine()
    now = t.Plan(cfg).at(1000, 0.01)
    model = t.build_model(cfg, run.device, run.dtype, T)
    opt, graph = t.MuonAdamW(cfg, model, run), t.compile_model(model, cfg)

    def step(x, y):
        loss = graph(x, y, now.repeats, now.window).sum() / (ROWS * T)
        loss.backward()
        opt.step(now)
        return loss.item()

    return step


def worker(which: str, dtype) -> None:
    """Answers lines on stdin with the seconds of STEPS steps; its first line says it is warm."""
    flags = () if which == "recipe" else SAME_TASK
    step = (
        textbook_step(dtype)
        if which == "textbook"
        else our_step(dtype, flags, keep_memory=which != "faulting")
    )
    x, y = torch.randint(VOCAB, (2, ROWS, T))
    for _ in range(3):
        step(x, y)
    print("warm", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(STEPS):
            step(x, y)
        print(time.perf_counter() - began, flush=True)


def attention(pairs: int, dtype) -> None:
    """SDPA against train_gpt's blocks, both compiled, in turns: seconds of forward and backward."""
    import train_gpt as t

    q, k, v = torch.randn(3, ROWS, HEADS, T, DIM // HEADS, dtype=dtype).requires_grad_()
    grad = torch.randn(ROWS, HEADS, T, DIM // HEADS, dtype=dtype)
    ways = {
        "sdpa": torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.12)
        ),
        # as behind QK norm
        "blocks": torch.compile(lambda q, k, v: t.attend_blocks(q, k, v, None, 0, 0.12, bound=8)),
    }
    seconds = {name: [] for name in ways}
    for turn in range(pairs + 3):
        for name, way in ways.items():
            began = time.perf_counter()
            torch.autograd.grad(way(q, k, v), (q, k, v), grad)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(seconds["sdpa"], seconds["blocks"])]
    for name, s in seconds.items():
        ms = [1000 * x for x in s]
        print(
            f"{name:9} {statistics.median(ms):7.1f} ms (median of {len(ms)}; {min(ms):.1f} to "
            f"{max(ms):.1f})"
        )
    print(
        f"ratio     {statistics.median(ratios):7.2f} (median of pairs; {min(ratios):.2f} to "
        f"{max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--shape", default="6x384x512")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--against", default="textbook", choices=["textbook", "faulting"])
    parser.add_argument("--recipe", action="store_true")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    global LAYERS, DIM, HEADS, T, ROWS
    LAYERS, DIM, T = map(int, args.shape.split("x"))
    HEADS, ROWS = DIM // 64, args.rows
    if args.worker:
        return worker(args.worker, getattr(torch, args.dtype))
    if args.attention:
        return attention(args.pairs, getattr(torch, args.dtype))
    workers, ours = {}, "recipe" if args.recipe else "ours"
    for which in (args.against, ours):
        command = [sys.executable, __file__, "--worker", which, "--dtype", args.dtype]
        command += ["--shape", args.shape, "--rows", str(args.rows)]
        workers[which] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while (line := workers[which].stdout.readline().strip()) != "warm":
            if not line and workers[which].poll() is not None:
                sys.exit(f"the {which} worker died")
    seconds = {which: [] for which in workers}
    for _ in range(args.pairs):
        for which, w in workers.items():
            w.stdin.write("go\n")
            w.stdin.flush()
            seconds[which].append(float(w.stdout.readline()))
    for w in workers.values():
        w.stdin.close()
        w.wait()
    rate = {which: [STEPS * ROWS * T / s for s in times] for which, times in seconds.items()}
    ratios = [a / b for a, b in zip(rate[ours], rate[args.against])]
    for which, r in rate.items():
        print(
            f"{which:9} {statistics.median(r):9,.0f} tokens/s (median of {len(r)}; {min(r):,.0f} "
            f"to {max(r):,.0f})"
        )
    print(
        f"ratio     {statistics.median(ratios):9.2f} (median of pairs; {min(ratios):.2f} to "
        f"{max(ratios):.2f})"
    )
    print(json.dumps({"ratio": statistics.median(ratios), "n": len(ratios), "dtype": args.dtype}))


if __name__ == "__main__":
    main()
