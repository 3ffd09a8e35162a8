"""What a run will cost, without GPU, data or compiling: parameters by group, FLOPs, shards, memory,
artifact, graphs, time; or what its forward pass is.

    python logs/dry_run.py --config remix_m              # WORLD_SIZE=8: as one of eight ranks
    python logs/dry_run.py --config remix_m --json       # the same as one JSON object
    python logs/dry_run.py --config golf_loop --wiring   # the places of the forward pass, in order

All other flags are train_gpt.py's.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from logs.endings import UserError, ending  # noqa: E402
from train_gpt import (  # noqa: E402
    LONG_ROW,
    Config,
    Now,
    Place,
    Plan,
    Ranks,
    Schedule,
    Shape,
    blocks_of,
    build_model,
    has_attention,
    has_attn_gate,
    has_given_gate,
    has_key_offset,
    has_meta_step,
    has_value_proj,
    has_x0_share,
    head_width,
    hidden_width,
    moved_matrices,
    net_lanes,
    net_of,
    param_buckets,
    parse_args,
    shard_files,
    wiring,
)

H100_FLOPS = 989e12  # dense bf16 peak of one H100
ASSUMED_MFU = 0.40  # the share of it that training is taken to reach
SHARD_TOKENS = 100_000_000  # what every published set of shards uses


def flops_per_token(
    cfg: Config, repeats: int, seq_len: int, window: int, passes: int = 1, window_long: int = 0
) -> int:
    """Forward and backward: 6 for each weight applied, 12*heads*head_dim for each key that a query
    sees on average; replays count as often as they run, passes before the last a third, as they
    have no backward, multi-token prediction with its block and its second use of the head.
    """
    model = build_model(cfg, torch.device("meta"), torch.float32, 8)
    sizes = [weights_applied(block) for block in model.blocks]
    places = wiring(cfg, repeats)
    often = 1 + (passes - 1) / 3
    weights = often * sum(sizes[place.block] for place in places) + model.head.numel()
    seeing = [place for place in places if has_attention(cfg, place.block)]
    windows = [(window if p.windowed else window_long, seq_len << p.paired, often) for p in seeing]
    nets = [*(model.gate_nets or ()), model.mudd, model.mudd_final]
    weights += often * sum(weights_applied(net) for net in nets if net is not None)
    if cfg.mtp:
        weights += weights_applied(model.mtp_block) + model.mtp_proj.numel() + model.head.numel()
        windows.append((0, seq_len, 1))
    widths = [(min(w or length, length), length, often) for w, length, often in windows]
    # early tokens see fewer
    keys = sum(often * (w - w * (w - 1) / (2 * length)) for w, length, often in widths)
    return int(6 * weights + 12 * cfg.heads * head_width(cfg) * keys)


def weights_applied(block: torch.nn.Module) -> int:
    """Numbers in a block's matrices; iha mixes weights once a step and is not applied to tokens."""
    named = block.named_parameters()
    return sum(p.numel() for name, p in named if p.ndim >= 2 and not name.endswith("iha"))


def memory_estimate(
    cfg: Config, plan: Plan, world: int, params: int, states: int, moving: int
) -> int:
    """Peak bytes of one rank, by this method: weights and gradients whole, `states` bytes of this
    rank's shard of the optimizer's state (the warm-up keeps its copy of them on the host) and its
    shards of averages; the weights once more as they are computed with; what a compiled backward
    keeps of each position (counted in the graphs of torch.compile's partitioner); logits in bf16,
    of which a compiled loss keeps one copy, as their gradient takes their place. compile = 2 has
    all chunks' at once, since the compiler orders the whole graph: docs/gpus.md.
    """
    width = 2 if cfg.param_dtype == "bfloat16" else 4
    averages = (cfg.ema > 0) + (cfg.swa_every > 0) + (cfg.tail_ema != "0")
    fixed = 2 * width * params + states + averages * math.ceil(4 * params / world)
    if width == 2 and any(plan.micro_batches(n, world) > 1 for n in plan.moments()):
        fixed += 4 * params  # their gradients are summed in fp32
    if width == 4:
        fixed += 2 * params  # the weights as they are computed with, in bf16
    if has_meta_step(cfg):  # what moves is kept; gradients of earlier groups, where there are any
        fixed += 4 * moving * (1 + (cfg.meta_groups > world))
    if cfg.distill:
        fixed += 2 * params  # a teacher of this size
    # numbers in bf16 that are kept of a token at one place
    q, kv = head_width(cfg) * cfg.heads, head_width(cfg) * (cfg.kv_heads or cfg.heads)
    kept = (
        4 * cfg.dim + 4 * q + 3 * kv
    )  # block input, middle, both normed; q, k twice, v, twice out
    kept += hidden_width(cfg) * (3 if cfg.activation == "swiglu" else 2)  # around the activation
    kept += 3 * cfg.dim * bool(cfg.block_scales)  # mixed input, both branches before their scales
    kept += q * (bool(cfg.q_gain) + bool(cfg.attn_gate))  # before the gain, before the gate
    kept += kv / 2 * bool(cfg.value_proj)  # in every second block
    kept += cfg.dim / 2 * ((cfg.attn_dropout > 0) + (cfg.mlp_dropout > 0))  # a byte each
    depth = max(len(wiring(cfg, n.repeats)) for n in plan.moments())
    depth += 2 if cfg.mtp else 0  # its block and, as one more, its inputs
    tokens = max(map(tokens_of, plan.train_shapes(world)))
    at_once = tokens if cfg.compile == 2 else min(tokens, cfg.loss_chunk)
    logits = (2 if cfg.compile else 3 * 4) * at_once * cfg.vocab  # eagerly, three in fp32
    logits *= 2 if cfg.distill else 1  # the teacher's
    kept = max(tokens_of(s) * (kept + scores_kept(cfg, s)) for s in plan.train_shapes(world))
    return fixed + int(2 * depth * kept) + logits


def tokens_of(s: Shape) -> int:
    return s.rows * s.seq_len


def scores_kept(cfg: Config, s: Shape) -> float:
    """
    Numbers in bf16 that a CPU's attention keeps of a token at one place: scores and what exp makes
    of them, with the keys that its block of queries reads; of long rows none (attend_blocks()).
    """
    if cfg.device != "cpu" or s.seq_len > LONG_ROW:
        return 0
    block = max(128, s.seq_len // 64)
    keys = (s.seq_len + block) / 2
    return 2 * cfg.heads * (min(keys, s.window + block) if s.window else keys)


def shards_needed(cfg: Config, plan: Plan) -> int:
    """Train shards of 100M tokens that a run reads, or 1 where it may repeat without end."""
    batch = plan.moments()[0].batch_tokens
    # a shard's rest that is no whole batch, with a label for its last token, is passed over
    usable = max(1, math.ceil((SHARD_TOKENS - 1) / batch) - 1) * batch
    if cfg.shuffle:  # rows of all shards are one stock; batches run from one epoch into the next
        usable = SHARD_TOKENS // (plan.max_seq_len + (cfg.shuffle == 2)) * plan.max_seq_len
    return math.ceil(plan.tokens() / (usable * cfg.epochs)) if cfg.epochs else 1


def estimate(cfg: Config, plan: Plan, world: int) -> dict:
    """What a run would cost on so many ranks, by the keys of --json; found on the meta device."""

    def flops(at: Now | Shape) -> int:
        applied = at.window, at.passes, at.window_long
        own = flops_per_token(cfg, at.repeats, at.seq_len, *applied)
        if at.sampled_classes:
            own -= 6 * cfg.dim * (len(model.head) - at.sampled_classes)
        return own * 4 // 3 if at.distill else own  # a teacher of this size goes forward alone

    model = build_model(cfg, torch.device("meta"), torch.float32, 8)
    groups, params, states, matrices = [], 0, 0, 0
    for bucket in param_buckets(cfg, model, Ranks(torch.device("meta"), 0, world)):
        sizes = [p.numel() for p in bucket.params.values()]
        group = {
            "kind": bucket.rule.kind,
            "tensors": len(sizes),
            "params": sum(sizes),
            "lr": bucket.rule.lr,
            "weight_decay": bucket.rule.wd,
            "names": sorted({re.sub(r"\d+", "*", name) for name in bucket.params}),
        }
        groups.append(group)
        params += group["params"]
        states += sum(t.nbytes for t in bucket.state.values())
        large = [p for p in bucket.params.values() if p.ndim >= 2 and p.numel() > 65536]
        matrices += sum(p.numel() for p in large)
    moving = sum(p.numel() for p in moved_matrices(cfg, model).values())
    shapes, moments = plan.train_shapes(world), plan.moments()
    named = {
        f"repeats {s.repeats}, seq_len {s.seq_len}, window {s.window}"
        + f", passes {s.passes}" * (cfg.passes != "1")
        + f", window_long {s.window_long}" * (cfg.window_long != "0")
        + ", a teacher" * bool(s.distill)
        + f", {s.sampled_classes or 'all'} classes" * (cfg.sampled_classes != "0"): s
        for s in shapes
    }
    mean_flops = sum(map(flops, moments)) / len(moments)
    evaluated = plan.eval_shapes()
    return {
        "params": params,
        "groups": groups,
        "flops_per_token": {name: flops(shape) for name, shape in named.items()},
        "tokens": plan.tokens(),
        "shards_needed": shards_needed(cfg, plan),
        "shards_present": len(shard_files(cfg.data, "train")),
        "memory_bytes": memory_estimate(cfg, plan, world, params, states, moving),
        "artifact_bytes": int(0.92 * matrices + 4 * (params - matrices)) if cfg.export else 0,
        "graphs": {
            "train": [s._asdict() for s in shapes],
            "eval": [s._asdict() for s in evaluated],
        },
        "estimated_seconds": plan.tokens() * mean_flops / (8 * H100_FLOPS * ASSUMED_MFU),
        "world_size": world,
    }


def print_cost(cfg: Config, as_json: bool) -> int:
    """What a run would cost on as many ranks as WORLD_SIZE says; writes nothing."""
    world = os.environ.get("WORLD_SIZE") or "1"
    if not re.fullmatch("[1-9][0-9]{0,6}", world):
        raise UserError(f"WORLD_SIZE={world}: give the number of ranks, from 1")
    out = estimate(cfg, Plan(cfg), int(world))
    if as_json:
        print(json.dumps(out))
        return 0
    print(f"{'kind':8}{'tensors':>8}{'parameters':>14}{'lr':>10}{'decay':>8}  names")
    for g in out["groups"]:
        numbers = f"{g['tensors']:8}{g['params']:14,}{g['lr']:10g}{g['weight_decay']:8g}"
        print(f"{g['kind']:8}{numbers}  {' '.join(g['names'])}")
    print(f"{'all':8}{sum(g['tensors'] for g in out['groups']):8}{out['params']:14,}")
    for name, flops in out["flops_per_token"].items():
        print(f"flops per token ({name}): {flops / 1e6:,.1f} M, forward and backward")
    clock = f", or what {cfg.max_seconds:g} s allow" if cfg.max_seconds else ""
    print(f"tokens: {out['tokens']:,} in {cfg.steps} steps{clock}")
    needed, present = out["shards_needed"], out["shards_present"]
    least = ", or more, as rests of documents are passed over" if cfg.bos_rows else ""
    shards = f"{needed} needed{least}; {present} files present in {cfg.data}"
    print(f"train shards of 100M tokens: {shards}")
    memory = f"{out['memory_bytes'] / 1e9:.2f} GB a rank on {out['world_size']} ranks"
    print(
        f"memory: {memory}, estimated: weights, gradients, sharded states, what backward keeps of "
        "each position, logits"
    )
    size = f"about {out['artifact_bytes']:,} bytes"
    print(f"artifact: {size} (int8 at the 0.92 that zstd-22 left of such weights)")
    train, evaluated = (len(out["graphs"][kind]) for kind in ("train", "eval"))
    print(f"graphs to compile: {train} train, {evaluated} eval")
    print(f"time: {out['estimated_seconds']:.0f} s on 8xH100 at {ASSUMED_MFU:.0%} MFU")
    return 0


def wiring_table(cfg: Config, repeats: int) -> list[str]:
    """The places of a forward pass, a line each, under a heading."""
    lines = [f"{'place':>5}{'block':>6}{'visit':>6}  {'sees':8}{'adds':28}also"]
    windows = max(Schedule("window", cfg.window).values()) > 0
    far = "long" if max(Schedule("window_long", cfg.window_long).values()) else "all"
    for at, place in enumerate(wiring(cfg, repeats)):
        sees = ("window" if windows else "all") if place.windowed else far
        sees = sees if has_attention(cfg, place.block) else "-"
        adds = [f"place {place.skip.source}" if place.skip else ""]
        adds += [f"block {place.gated.source} by a gate" if place.gated else ""]
        adds += [f"last visit ({place.last_visit.source})" if place.last_visit else ""]
        adds, also = ", ".join(filter(None, adds)) or "-", ", ".join(extras(cfg, place)) or "-"
        lines.append(f"{at:5}{place.block:6}{place.visit:6}  {sees:8}{adds:28}{also}")
    return lines + around(cfg)


def around(cfg: Config) -> list[str]:
    """What is done before the first place and behind the last, a line each."""
    lines = []
    if cfg.smear:
        lines.append("before: each embedding takes a share of the one before it")
    if cfg.mudd_final:
        lines.append(f"behind: shares of {cfg.mudd_final} by a net join")
    elif cfg.backout:
        block, share = cfg.backout.split(":")
        lines.append(f"behind: a share, from {share}, of block {block}'s output is taken away")
    return lines


def extras(cfg: Config, place: Place) -> list[str]:
    """What else is done at a place, in words."""
    attends = has_attention(cfg, place.block)
    lanes = any(lane.block == place.block for lane in net_lanes(cfg, net_of(cfg, place.block)))
    return [
        *([f"loop vector {place.row}"] if cfg.loop_embed else []),
        *([f"value tables by row {place.row}"] if cfg.value_embeds else []),
        *([f"second embedding by share {place.row}"] if cfg.second_embed else []),
        *([f"pairs by share {place.row}"] if cfg.bigram_rows and not cfg.gate_nets else []),
        *(["value projection"] if has_value_proj(cfg, place.block) else []),
        *([f"value table {place.table}"] if place.table >= 0 else []),
        *(["a share of the embedding"] if has_x0_share(cfg, place.block) else []),
        *(["pairs of heads"] if place.paired else []),
        *(["no MLP"] if place.block in blocks_of(cfg.no_mlp_layers) else []),
        *(["head gate"] if has_attn_gate(cfg, place.block) else []),
        *(["head gate by token"] if has_given_gate(cfg, place.block) else []),
        *(["exclusive self-attention"] if place.xsa else []),
        *([f"attention reads block {cfg.late_input}"] if place.is_late and attends else []),
        *([f"reads its input for net {place.net}"] if place.net >= 0 else []),
        *([f"factors by net {net_of(cfg, place.block)}"] if lanes else []),
        *([f"shares of {cfg.mudd} by a net"] if place.in_mudd else []),
        *(["keys of the token before"] if has_key_offset(cfg, place.block) else []),
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
        return print_wiring(cfg) if "--wiring" in own else print_cost(cfg, "--json" in own)

    return ending("error", work)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
