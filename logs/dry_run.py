"""
What a run will cost, without GPU, data or compiling: parameters by group, FLOPs, shards, memory,
artifact, graphs, time; or what its forward pass is.

    python logs/dry_run.py --config remix_m              # WORLD_SIZE=8: the memory of one of eight ranks
    python logs/dry_run.py --config remix_m --json       # the same as one JSON object
    python logs/dry_run.py --config golf_loop --wiring   # the places of the forward pass, in order

All other flags are train_gpt.py's.
"""

import json
import os
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logs.endings import ending  # noqa: E402
from train_gpt import (  # noqa: E402
    Config,
    Place,
    Plan,
    Schedule,
    UserError,
    build_model,
    head_width,
    hidden_width,
    param_buckets,
    parse_args,
    shard_files,
    wiring,
)

# dense bf16 peak of one H100, and the share of it that dry_run reckons with
H100_FLOPS, ASSUMED_MFU = 989e12, 0.40


class Ranks:
    """The two numbers that cutting parameters into buckets asks of a run."""

    def __init__(self, world: int):
        self.rank, self.world = 0, world


def flops_per_token(cfg: Config, repeats: int, seq_len: int, window: int) -> int:
    """
    Forward and backward: 6 for each weight applied, 12*heads*head_dim for each key that a query
    sees on average; replays count as often as they run, multi-token prediction with its block and
    its second use of the head.
    """
    model = build_model(cfg, torch.device("meta"), torch.float32, 8)
    blocks = [*model.blocks, *([model.mtp_block] if cfg.mtp else [])]
    # iha mixes weights, once a step, and is not applied to tokens
    size = [
        sum(p.numel() for n, p in b.named_parameters() if p.ndim >= 2 and not n.endswith("iha"))
        for b in blocks
    ]
    places = wiring(cfg, repeats)
    order = [p.block for p in places] + [cfg.depth] * bool(cfg.mtp)
    windows = [window if p.windowed else 0 for p in places] + [0] * bool(cfg.mtp)
    keys = [min(w or seq_len, seq_len) for w in windows]
    attention = (
        12 * cfg.heads * head_width(cfg) * sum(k - k * (k - 1) / (2 * seq_len) for k in keys)
    )
    weights = sum(size[i] for i in order) + model.head.numel() * (2 if cfg.mtp else 1)
    return int(6 * (weights + (model.mtp_proj.numel() if cfg.mtp else 0)) + attention)


def memory_estimate(cfg: Config, plan: Plan, world: int, params: int, states: int) -> int:
    """
    Peak bytes of one rank, by this method: weights and gradients whole and optimizer states in
    shards (the warm-up keeps its copy of them on the host); the weights once more as they are
    computed with; what a compiled backward keeps of each position (counted in the graphs of
    torch.compile's partitioner); the logits of one chunk three times.
    """
    b = 2 if cfg.param_dtype == "bfloat16" else 4
    fixed = b * (2 * params + -(-states // world))
    if b == 2 and any(plan.micro_batches(n, world) > 1 for n in plan.moments()):
        fixed += 4 * params  # their gradients are summed in fp32
    q, kv = head_width(cfg) * cfg.heads, head_width(cfg) * (cfg.kv_heads or cfg.heads)
    # block input, middle, both normed; q, k raw and rotated, v, attention twice
    kept = 4 * cfg.dim + 4 * q + 3 * kv
    # before and behind the activation
    kept += hidden_width(cfg) * (3 if cfg.activation == "swiglu" else 2)
    kept += 3 * cfg.dim * bool(cfg.block_scales)  # mixed input, both branches before their scales
    kept += q * (bool(cfg.q_gain) + bool(cfg.attn_gate))  # before the gain, before the gate
    kept += (2 * cfg.dim + 2 * q) * bool(cfg.layer_norm)  # in fp32
    kept += kv / 2 * bool(cfg.value_proj)  # in every second block
    kept += cfg.dim / 2 * ((cfg.attn_dropout > 0) + (cfg.mlp_dropout > 0))  # a byte each
    # its inputs: one more
    depth = max(len(wiring(cfg, n.repeats)) for n in plan.moments()) + (2 if cfg.mtp else 0)
    tokens = max(s.rows * s.seq_len for s in plan.train_shapes(world))
    logits = 3 * 4 * min(tokens, cfg.loss_chunk) * cfg.vocab
    return fixed + 2 * params * (b == 4) + int(2 * tokens * depth * kept) + logits


def cost(cfg: Config, as_json: bool) -> int:
    """
    Print what a run would cost, on the meta device: no GPU, no data, nothing written. Ranks come
    from WORLD_SIZE.
    """
    plan, world = Plan(cfg), int(os.environ.get("WORLD_SIZE", 1))
    shapes = plan.train_shapes(world)
    buckets = param_buckets(
        cfg, build_model(cfg, torch.device("meta"), torch.float32, 8), Ranks(world)
    )
    groups = [
        {
            "kind": b.kind,
            "tensors": len(b.params),
            "params": sum(p.numel() for p in b.params.values()),
            "lr": b.lr,
            "weight_decay": b.wd,
            "names": sorted({re.sub(r"\d+", "*", n) for n in b.params}),
        }
        for b in buckets
    ]
    params = sum(g["params"] for g in groups)
    states = sum(g["params"] * (1 if g["kind"] == "muon" else 2) for g in groups)
    matrices = sum(
        p.numel() for b in buckets for p in b.params.values() if p.ndim >= 2 and p.numel() > 65536
    )
    flops = {
        f"repeats {s.repeats}, seq_len {s.seq_len}, window {s.window}": flops_per_token(
            cfg, s.repeats, s.seq_len, s.window
        )
        for s in shapes
    }
    tokens = plan.tokens()
    first = plan.moments()[0]
    per_shard = max(1, -(-(100_000_000 - 1) // first.batch_tokens) - 1) * first.batch_tokens
    # rows of all shards are one stock, and batches run from one epoch into the next
    if cfg.shuffle:
        per_shard = 100_000_000 // (plan.max_seq_len + (cfg.shuffle == 2)) * plan.max_seq_len
    present = len(shard_files(cfg.data, "train"))
    mean_flops = sum(
        flops_per_token(cfg, n.repeats, n.seq_len, n.window) for n in plan.moments()
    ) / len(plan.moments())
    out = {
        "params": params,
        "groups": groups,
        "flops_per_token": flops,
        "tokens": tokens,
        "shards_needed": -(-tokens // (per_shard * max(1, cfg.epochs))) if cfg.epochs else 1,
        "shards_present": present,
        "memory_bytes": memory_estimate(cfg, plan, world, params, states),
        "artifact_bytes": int(0.92 * matrices + 4 * (params - matrices)) if cfg.export else 0,
        "graphs": {
            "train": [s._asdict() for s in shapes],
            "eval": [s._asdict() for s in plan.eval_shapes()],
        },
        "estimated_seconds": tokens * mean_flops / (8 * H100_FLOPS * ASSUMED_MFU),
        "world_size": world,
    }
    if as_json:
        print(json.dumps(out))
        return 0
    print(f"{'kind':8}{'tensors':>8}{'parameters':>14}{'lr':>10}{'decay':>8}  names")
    for g in groups:
        print(
            f"{g['kind']:8}{g['tensors']:8}{g['params']:14,}{g['lr']:10g}{g['weight_decay']:8g}  {' '.join(g['names'])}"
        )
    print(f"{'all':8}{sum(g['tensors'] for g in groups):8}{params:14,}")
    for name, f in flops.items():
        print(f"flops per token ({name}): {f / 1e6:,.1f} M, forward and backward")
    print(
        f"tokens: {tokens:,} in {cfg.steps} steps"
        + (f", or what {cfg.max_seconds:g} s allow" if cfg.max_seconds else "")
    )
    print(
        f"train shards of 100M tokens: {out['shards_needed']} needed; {present} files present "
        f"in {cfg.data}"
    )
    print(
        f"memory: {out['memory_bytes'] / 1e9:.2f} GB a rank on {world} ranks, estimated: "
        "weights, gradients, sharded states, what backward keeps of each position, three copies of "
        "a chunk's logits"
    )
    print(
        f"artifact: about {out['artifact_bytes']:,} bytes (int8 at the 0.92 that zstd-22 left "
        "of such weights)"
    )
    print(f"graphs to compile: {len(shapes)} train, {len(plan.eval_shapes())} eval")
    print(f"time: {out['estimated_seconds']:.0f} s on 8xH100 at {ASSUMED_MFU:.0%} MFU")
    return 0


def wiring_table(cfg: Config, repeats: int) -> list[str]:
    """The places of a forward pass, a line each, under a heading."""
    places, wide = wiring(cfg, repeats), max(Schedule("window", cfg.window).values()) > 0
    lines = [f"{'place':>5}{'block':>6}{'visit':>6}  {'sees':8}{'adds':28}also"]
    for at, place in enumerate(places):
        sees = "window" if wide and place.windowed else "row"
        adds = [f"place {place.skip.source}" if place.skip else ""]
        adds += [f"last visit ({place.again.source})" if place.again else ""]
        adds, also = ", ".join(filter(None, adds)) or "-", ", ".join(extras(cfg, place)) or "-"
        lines.append(f"{at:5}{place.block:6}{place.visit:6}  {sees:8}{adds:28}{also}")
    return lines


def extras(cfg: Config, place: Place) -> list[str]:
    """What else is done at a place, in words."""
    values = cfg.value_proj and (cfg.depth - 1 - place.block) % 2 == 0
    return [
        *([f"loop vector {place.row}"] if cfg.loop_embed else []),
        *([f"value tables by row {place.row}"] if cfg.value_embeds else []),
        *(["value projection"] if values else []),
        *(["exclusive self-attention"] if place.xsa else []),
        *([f"inputs x {place.shrink:.3f}"] if cfg.layer_scale else []),
        *([f"left out at {place.drop:.3f}"] if place.drop else []),
    ]


def print_wiring(cfg: Config) -> int:
    """The table for every number of repeats that the schedule has."""
    for repeats in Schedule("repeats", cfg.repeats).values():
        again = f", blocks {cfg.loop} {int(repeats)} times" if cfg.loop else ""
        print(f"repeats = {int(repeats)}: {len(wiring(cfg, int(repeats)))} places{again}")
        print("\n".join(wiring_table(cfg, int(repeats))) + "\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    own = {"--json", "--wiring"} & set(argv)

    def work() -> int:
        cfg = parse_args([word for word in argv if word not in own])
        return print_wiring(cfg) if "--wiring" in own else cost(cfg, "--json" in own)

    return ending("error", work, UserError)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
