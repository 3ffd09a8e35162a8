"""
Slowrun: its golden numbers, each mechanism against a few plain lines, its schedules, loader and
averages.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forks import Server, run_ranks
from helpers import alone, build, now, random_tokens, tg, tiny, write_shard
from test_model import awake, dense, preset
from test_runs import succeed

from logs import score

META = torch.device("meta")

# Every mechanism on, in a model of six blocks; the test of each one below turns the others off.
ALL = {
    "depth": 6, "dim": 64, "heads": 2, "activation": "swiglu", "mlp_ratio": 2.5, "rope":
    "standard", "attn_gate": 12, "value_proj": 20, "iha": 1, "resid_lambda": 1.1, "x0_lambda":
    0.1, "unet": 2, "loop": "3:5", "repeats": "0:1 0.5:3", "window": "5", "window_pattern": "SSL",
    "pad_vocab": 1, "vocab": 90, "softcap": 10.0, "head_init": "0.2", "init_std": 1.0,
    "proj_init": 1.0,
}  # fmt: skip


# --- golden numbers


@pytest.mark.parametrize(
    "name, flags, golden",
    [
        ("slowrun_1h", "--mtp 0 --iha 0", 1_398_287_931),
        ("slowrun_1h", "", 1_443_722_775),
        ("slowrun_pr63", "", 2_734_834_155),
        ("slowrun_1h", "--mtp 0 --iha 0 --vocab 10002 --doc_token 0", 1_254_010_427),
        ("slowrun_pr63", "--vocab 10002 --doc_token 0", 2_528_723_435),
        ("slowrun_tiny", "", 316_935_848),
        ("slowrun_tiny", "--xsa 0 --xsa_learned 0", 316_935_720),
        ("slowrun_two_hour", "", 1_443_722_775),
        ("slowrun_unlimited", "", 1_870_172_811),
    ],
)
def test_parameter_count_is_the_golden_one(name, flags, golden):
    model = tg.build_model(preset(name, flags=tuple(flags.split())), META, torch.float32, 8)
    assert sum(p.numel() for p in model.parameters()) == golden


def test_groups_of_the_main_track_have_their_golden_sizes():
    """
    Transformer 1,169,829,360, value projections 48,168,960, lm_head 90,144,768, other 90,144,843.
    """
    cfg = preset("slowrun_1h", flags=("--mtp", "0", "--iha", "0"))
    size = {n: p.numel() for n, p in tg.build_model(cfg, META, torch.float32, 8).named_parameters()}
    assert size["head"] == 90_144_768
    projections = [n for n in size if n.endswith("value_proj")]
    assert projections == [f"blocks.{i}.value_proj" for i in range(1, 30, 2)]
    assert sum(size[n] for n in projections) == 48_168_960
    body = [n for n in size if ".attn." in n or ".mlp." in n]
    assert sum(size[n] for n in body) == 1_169_829_360
    assert sum(size.values()) - sum(size[n] for n in (*body, *projections, "head")) == 90_144_843


def test_optimizer_groups_have_the_rates_of_the_specification():
    """Specification 3.2, at the width of the preset and two blocks."""
    cfg = preset("slowrun_1h", flags=("--depth", "2", "--loop", "", "--repeats", "1"))
    buckets = tg.param_buckets(cfg, tg.build_model(cfg, META, torch.float32, 8), alone())
    found = {
        n: (b.rule.kind, b.rule.lr, b.rule.wd, b.rule.beta1) for b in buckets for n in b.params
    }
    assert found["head"] == ("adamw", 0.0005, 1.3, 0.8) and found["embed"] == (
        "adamw",
        0.0375,
        1.3,
        0.8,
    )
    assert found["skips"] == found["blocks.0.resid_lambda"] == ("adamw", 0.00025, 0.0, 0.8)
    assert found["blocks.1.x0_lambda"] == ("adamw", 0.025, 0.0, 0.96)
    assert found["blocks.1.attn.iha"] == found["mtp_block.attn.iha"] == ("adamw", 0.02, 0.0, 0.8)
    muon = {n for n, f in found.items() if f == ("muon", 0.01, 1.3, 0.8)}
    assert {n for n in found if n.endswith(("qkv", "proj", "fc", "gate"))} == muon
    assert (
        "blocks.1.attn.value_gate" in muon
        and "blocks.0.attn.value_gate" not in found
        and "mtp_proj" in muon
    )


def test_initial_values_are_those_of_the_original():
    cfg = preset(
        "slowrun_1h",
        flags=(
            "--depth",
            "2",
            "--loop",
            "",
            "--repeats",
            "1",
            "--vocab",
            "300",
            "--doc_token",
            "0",
        ),
    )
    model = tg.build_model(cfg, torch.device("cpu"), torch.float32, 8)
    p, d = {n: t.detach() for n, t in model.named_parameters()}, 1792
    # uniform +-sqrt(3/d)
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc", "blocks.1.value_proj", "mtp_proj"):
        assert p[name].std().item() == pytest.approx(d**-0.5, rel=0.01), name
        assert p[name].abs().max().item() == pytest.approx((3 / d) ** 0.5, rel=0.01), name
    for name in ("blocks.0.attn.proj", "blocks.0.mlp.proj"):  # normal
        assert (
            p[name].std().item() == pytest.approx(d**-0.5, rel=0.01)
            and p[name].abs().max() > 4 * d**-0.5
        )
    assert p["embed"].std().item() == pytest.approx(1, rel=0.01)
    assert p["head"].std().item() == pytest.approx(0.001, rel=0.02)
    assert p["embed"].shape == p["head"].shape == (320, d)
    assert not p["blocks.0.attn.attn_gate"].any() and not p["blocks.1.attn.value_gate"].any()
    assert torch.equal(p["blocks.0.attn.iha"], torch.eye(14).expand(3, 14, 14))
    assert p["skips"].tolist() == [1.0] and p["blocks.1.resid_lambda"] == 1
    assert p["blocks.1.x0_lambda"].item() == pytest.approx(0.1)


# --- the model


def by_hand(
    p: dict, cfg: tg.Config, x: torch.Tensor, order: list[int], window: int
) -> torch.Tensor:
    """
    Specification 3.1 as plain as it gets, a second model from a dictionary of weights, heads one by
    one.
    """
    rms = lambda z: F.rms_norm(z, (z.size(-1),), eps=cfg.norm_eps)
    T, H, K, L = x.size(1), cfg.heads, cfg.dim // cfg.heads, cfg.depth
    angle = torch.outer(torch.arange(T).float(), cfg.rope_base ** -(torch.arange(K // 2) * 2 / K))
    turn = torch.polar(torch.ones(T, K // 2), -angle)

    def rope(z: torch.Tensor) -> torch.Tensor:  # B T K
        z = torch.complex(z[..., : K // 2], z[..., K // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    h = x0 = rms(p["embed"][x])
    encoder = {}
    for i in order:
        a = {n.split(".", 2)[2]: t for n, t in p.items() if n.startswith(f"blocks.{i}.")}
        if i >= L // 2:
            h = h + p["skips"][i - L // 2] * encoder[L - 1 - i]
        h = a["resid_lambda"] * h + a["x0_lambda"] * x0
        n, heads = rms(h), []
        for j in range(H):
            q, k, v = (
                sum(
                    a["attn.iha"][c, j, m] * (n @ a["attn.qkv"][c, m * K : (m + 1) * K].T)
                    for m in range(H)
                )
                for c in range(3)
            )
            if (L - 1 - i) % 2 == 0:
                gate = 2 * torch.sigmoid(n[..., :20] @ a["attn.value_gate"][j])
                v = v + gate[..., None] * (x0 @ a["value_proj"].T)[..., j * K : (j + 1) * K]
            q, k = rms(rope(q)), rms(rope(k))
            w = 0 if i == L - 1 or cfg.window_pattern[i % 3] == "L" else window
            y = dense(q[:, None], k[:, None], v[:, None], None, w, K**-0.5)[:, 0]
            heads.append(y * torch.sigmoid(n[..., :12] @ a["attn.attn_gate"][j])[..., None])
        h = h + torch.cat(heads, -1) @ a["attn.proj"].T
        gate, up = rms(h) @ a["mlp.fc"][0].T, rms(h) @ a["mlp.fc"][1].T
        h = h + (gate * torch.sigmoid(gate) * up) @ a["mlp.proj"].T
        if i < L // 2:
            encoder[i] = h
    return rms(h)


def shaken(model: tg.GPT) -> tg.GPT:
    """Noise on what starts at one value, so that two such parameters cannot be mixed up."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.unique().numel() <= 2:
                p += torch.randn(p.shape, generator=rng) * (0.3 if p.ndim < 2 else 0.5)
    return model


@pytest.mark.parametrize("repeats", [1, 3])
def test_model_is_the_one_of_the_specification(repeats):
    cfg = tiny(**ALL)
    x, y = random_tokens(cfg, 2, 32)
    model = shaken(build(cfg))
    order = {1: [0, 1, 2, 3, 4, 5], 3: [0, 1, 2, 3, 4, 3, 4, 3, 4, 5]}[repeats]
    hidden = model.hidden(x, repeats, 5)
    p = dict(model.named_parameters())
    expected = by_hand(p, cfg, x, order, 5)
    assert torch.allclose(hidden, expected, atol=2e-5), (hidden - expected).abs().max()
    for wrong in (by_hand(p, cfg, x, order, 6), by_hand(p, cfg, x, order[:-2] + [5], 5)):
        assert (hidden - wrong).abs().max() > 1e-3
    logits = 10 * torch.tanh(expected @ p["head"][:90].T / 10)
    assert torch.allclose(model.logits(hidden), logits, atol=1e-4)
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    assert torch.allclose(model(x, y, repeats, 5), losses, atol=1e-4)


NEUTRAL = {
    "attn_gate": 0, "value_proj": 0, "iha": 0, "resid_lambda": 0.0, "x0_lambda": 0.0, "unet": 0,
    "window_pattern": "", "attn_dropout": 0.0, "mlp_dropout": 0.0, "stoch_depth": 0.0, "mtp": 0.0,
    "pad_vocab": 0, "init_std": 0.0, "proj_init": 0.0, "own_lr": "", "lr_cycles": 0,
    "decay_by_shape": 0, "train_tokens": 0,
}  # fmt: skip


def test_neutral_value_of_a_flag_is_its_default():
    assert {k: getattr(tg.Config(), k) for k in NEUTRAL} == NEUTRAL


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_gate": 12},
        {"value_proj": 20},
        {"iha": 1},
        {"resid_lambda": 1.0},
        {"x0_lambda": 0.1},
        {"unet": 2},
        {"mtp": 0.3},
        {"window_pattern": "SL", "window": "8"},
        {"stoch_depth": 0.1},
        {"attn_dropout": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "base",
    [{}, {"tie_embed": 1, "kv_heads": 1, "block_scales": 1, "xsa": -1, "doc_mask": 1}],
    ids=["plain", "golf"],
)
def test_mechanism_leaves_other_initial_values_and_trains_with_other_presets(base, changes):
    cfg = tiny(**(base | changes | ({"kv_heads": 0} if "iha" in changes else {})))
    plain = dict(
        build(tiny(**(base | ({"kv_heads": 0} if "iha" in changes else {})))).named_parameters()
    )
    model = build(cfg)
    for name, p in model.named_parameters():
        if name in plain:
            assert torch.equal(p, plain[name]), name
    opt = tg.MuonAdamW(cfg, model, alone())
    x, y = random_tokens(cfg, 4, 32)
    losses = []
    for _ in range(8):
        loss = (
            tg.loss_terms(SimpleNamespace(cfg=cfg, graph=model), x, y, now(window=8)).sum()
            / y.numel()
        )
        loss.backward()
        opt.step(tg.Plan(cfg).at(0, 0.0))
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_mtp_predicts_the_token_after_next_and_stays_out_of_the_evaluation():
    """
    Its loss by hand: token after next, one block on [activation; embedding of the next token], mean
    over T-1.
    """
    cfg = tiny(depth=2, mtp=0.3, softcap=10.0, head_init="0.2", x0_lambda=0.1, value_proj=20)
    x, y = random_tokens(cfg, 3, 16)
    model = awake(build(cfg))
    p = dict(model.named_parameters())
    assert not any("lambda" in n or "value" in n for n in p if n.startswith("mtp_block"))
    with torch.no_grad():
        plain = model(x, y)
        rms = lambda z: F.rms_norm(z, (z.size(-1),), eps=cfg.norm_eps)
        h = torch.cat([model.hidden(x, 1, 0), rms(p["embed"][y])], -1) @ p["mtp_proj"].T
        single = build(tiny(depth=1))  # a plain GPT of that one block, its embedding put aside
        single.blocks[0].load_state_dict(model.mtp_block.state_dict())
        h = single.blocks[0](
            h, h, [], (single.cos, single.sin), tg.AttentionMask(None, 0, h), False
        )
        logits = 10 * torch.tanh(rms(h) @ p["head"].T / 10)
        extra = F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    training = tg.loss_terms(SimpleNamespace(cfg=cfg, graph=model), x, y, now()) / y.numel()
    assert training.tolist() == pytest.approx([plain.mean().item(), 0.3 * extra.item()], abs=1e-5)
    assert torch.equal(plain, model.losses(model.hidden(x, 1, 0).flatten(0, 1), y.flatten()))
    model.cfg = dataclasses.replace(cfg, loss_chunk=20, z_loss=0.01)
    three = tg.loss_terms(SimpleNamespace(cfg=model.cfg, graph=model), x, y, now()) / y.numel()
    assert torch.allclose(three[[0, 2]], training, atol=1e-5) and three[1] > 0


def test_dropout_and_stochastic_depth_have_their_size_and_are_off_in_evaluation():
    cfg = tiny(depth=3, attn_dropout=0.4, mlp_dropout=0.0, stoch_depth=0.6)
    x, y = random_tokens(cfg, 2, 32)
    model, plain = awake(build(cfg)), awake(build(tiny(depth=3)))
    with torch.no_grad():
        assert torch.equal(model(x, y), plain(x, y))
    torch.manual_seed(1)
    assert not torch.allclose(model(x, y), plain(x, y))
    # A branch's output keeps 1 - p of its entries, scaled by 1/(1 - p).
    ones = torch.ones(1000, 100)
    dropped = model.blocks[0].drop(ones, 0.4)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.4, abs=0.01)
    assert dropped.max().item() == pytest.approx(1 / 0.6) and torch.equal(
        model.blocks[0].drop(ones, 0.0), ones
    )
    # Block i of 3 is left out with chance 0.6*i/2, as a whole and without rescaling.
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(bool(args[7])))
    for _ in range(400):
        model.hidden(x[:1, :2], 1, 0)
    rates = torch.tensor(seen).view(400, 3).float().mean(0)
    assert torch.allclose(rates, torch.tensor([1.0, 0.7, 0.4]), atol=0.07) and rates[0] == 1
    h = torch.randn(1, 4, 32)
    skipped = model.blocks[1](
        h,
        h,
        [],
        (model.cos, model.sin),
        tg.AttentionMask(None, 0, h),
        False,
        None,
        torch.tensor(False),
    )
    assert torch.equal(skipped, h)


def test_stochastic_depth_leaves_out_the_block_of_mtp_as_one_behind_the_last():
    """
    Block n of n has chance p * n / (n - 1); left out, it passes on what mtp_proj gives; evaluation
    keeps it.
    """
    cfg = tiny(depth=3, mtp=0.3, stoch_depth=0.4)
    model, (_, y) = awake(build(cfg)), random_tokens(cfg, 2, 32)
    kept = []
    model.mtp_block.register_forward_pre_hook(lambda module, args: kept.append(args[7]))
    torch.manual_seed(0)
    h = torch.randn(1, 2, 32)
    for _ in range(600):
        model.mtp_losses(h, y[:1, :2])
    assert 1 - torch.stack(kept).float().mean().item() == pytest.approx(0.4 * 3 / 2, abs=0.05)
    hidden = torch.randn(2, 32, 32)
    with torch.no_grad():
        whole = model.mtp_losses(hidden, y)
    assert kept[-1] is None
    torch.manual_seed(next(s for s in range(99) if torch.manual_seed(s) and torch.rand(()) < 0.6))
    dropped = model.mtp_losses(hidden, y)
    joined = torch.cat([hidden, model.embedded(y)], -1) @ model.mtp_proj.T
    logits = model.logits(F.rms_norm(joined, (32,), eps=cfg.norm_eps))[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), reduction="none") * 32 / 31
    assert torch.allclose(dropped.view(2, 32)[:, :-1].flatten(), expected, atol=1e-5)
    assert not torch.allclose(dropped, whole, atol=1e-3)


@pytest.mark.parametrize(
    "pattern, depth, windows",
    [
        ("SSSL", 8, [9, 9, 9, 0, 9, 9, 9, 0]),
        ("SSSL", 6, [9, 9, 9, 0, 9, 0]),
        ("LS", 4, [0, 9, 0, 0]),
        ("", 3, [9, 9, 9]),
    ],
)
def test_pattern_gives_every_block_its_window(pattern, depth, windows):
    cfg = tiny(depth=depth, window_pattern=pattern, window="9")
    assert [9 if place.windowed else 0 for place in tg.wiring(cfg, 1)] == windows


def test_pattern_of_windows_that_cover_the_row_changes_no_bit():
    x, y = random_tokens(tiny(), 2, 32)
    losses = [awake(build(tiny(window_pattern=w)))(x, y, 1, 0) for w in ("", "SL", "L")]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"window_pattern": "SSX"}, ("window_pattern = 'SSX'", "letters S")),
        ({"attn_dropout": 1.0}, ("attn_dropout = 1.0",)),
        ({"stoch_depth": -0.1}, ("stoch_depth = -0.1",)),
        ({"attn_gate": 33}, ("attn_gate = 33", "dim = 32")),
        ({"value_proj": 40}, ("value_proj = 40",)),
        ({"mtp": -1.0}, ("mtp = -1.0",)),
        ({"iha": 1, "kv_heads": 1}, ("iha = 1", "--kv_heads 0")),
        ({"unet": 2, "depth": 1}, ("unet = 2", "depth = 1")),
        ({"own_lr": "x0_lambda"}, ("own_lr = 'x0_lambda'", "x0_lambda=0.025/0.96")),
        ({"own_lr": "(=0.1"}, ("own_lr", "pattern=rate")),
    ],
    ids=str,
)
def test_mechanism_that_cannot_work_is_refused(changes, words):
    with pytest.raises(tg.UserError) as caught:
        tg.validate(tiny(**changes))
    assert all(w in str(caught.value) for w in words), caught.value


# --- optimizer and schedules


def test_main_schedule_meets_its_vectors():
    """
    Specification 7.3: step, LR multiplier, decay multiplier, at 2097 steps, 11 epochs, 3 cycles.
    """
    cfg = preset("slowrun_1h")
    plan = tg.Plan(cfg)
    vectors = (
        (0, 1, 1), (1200, 1, 0.815792), (1526, 0.999947, 0.654053), (1600, 0.681763, 0.984001),
        (1700, 0.065420, 1.429876), (1716, 0.953572, 0.651216), (2000, 0.271548, 1.067501),
        (2096, 0.05, 1.495541),
    )  # fmt: skip
    for step, lr, wd in vectors:
        now = plan.at(step, plan.fraction(step, 0.0))
        assert (now.lr, now.weight_decay) == pytest.approx((lr, wd), abs=1e-6), step
        assert now.repeats == (3 if step >= 1144 else 1)
    for step, momentum in ((0, 0.85), (150, 0.90), (300, 0.95), (2000, 0.95)):
        assert plan.at(step, step / 2097).momentum == pytest.approx(momentum)
    assert [s for s in range(2098) if plan.ends_epoch(s)][:2] == [191, 382]
    assert sum(plan.ends_epoch(s) for s in range(2098)) == 11 and plan.ends_epoch(2097)


def test_two_hour_schedule_meets_its_vectors():
    plan = tg.Plan(preset("slowrun_two_hour"))
    vectors = (
        (2000, 1, 0.886171),
        (2764, 0.526779, 1.073987),
        (2860, 0.999987, 0.652027),
        (3355, 0.379707, plan.at(3355, 3355 / 4194).weight_decay),
        (4000, 0.050331, 1.485002),
    )
    for step, lr, wd in vectors:
        now = plan.at(step, step / 4194)
        assert (now.lr, now.weight_decay) == pytest.approx((lr, wd), abs=1e-6), step


@pytest.mark.parametrize("cautious, by_shape", [(2, 1), (2, 0), (1, 0), (0, 0)])
def test_decay_falls_on_the_weights_that_were_asked_for(cautious, by_shape):
    """
    Muon's decay by shape and only where it agrees with the step; AdamW's of everything at cautious
    = 2.
    """
    cfg = tiny(cautious=cautious, decay_by_shape=by_shape, adam_eps=1e-10)
    rng = torch.Generator().manual_seed(0)
    w, g = torch.randn(1, 8, 4, generator=rng), torch.randn(1, 8, 4, generator=rng)
    start, one = w.clone(), lambda v: torch.tensor(v, dtype=torch.float32)
    rates = {"lr": one(0.1), "momentum": one(0.0), "decay": one(0.02)}
    rule = tg.Rule("muon", "matrix", (8, 4), 0.0, 0.0, 0.0, 0.0, False)
    tg.muon_update(w, g, {"momentum": torch.zeros_like(w)}, rates, rule, cfg, torch.float32)
    u = tg.polar_factor(g, cfg.polar, cfg.polar_steps, torch.float32)
    decay = (
        0.02 * (2**0.5 if by_shape else 1) * ((u * start >= 0) if cautious else torch.ones_like(u))
    )
    assert torch.allclose(w, start - decay * start - 0.1 * 2**0.5 * u, atol=1e-6)
    w, start = start[0].clone(), start[0]
    tg.adamw_update(
        w,
        g[0],
        torch.zeros(8, 4),
        torch.zeros(8, 4),
        one(0.1),
        one(0.02),
        one(0.2),
        one(0.05),
        cfg,
        cfg,
    )
    u = g[0].sign()
    decay = 0.02 * ((u * start >= 0) if cautious == 1 else torch.ones_like(u))
    assert torch.allclose(w, start - decay * start - 0.1 * u, atol=1e-5)


# --- the loader


def documents(n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """n documents of a token 0 and up to 40 others, their first other token their number."""
    return [
        np.concatenate([[0, 1 + i % 95], rng.integers(1, 96, rng.integers(0, 42))])
        for i in range(n)
    ]


def shards(folder: Path, docs: list[np.ndarray], cut: int) -> tg.Config:
    """Two train shards, cut where a document runs on, and one for validation."""
    flat = np.concatenate(docs)
    write_shard(folder / "x_train_000001.bin", flat[:cut])
    write_shard(folder / "x_train_000002.bin", flat[cut:])
    write_shard(folder / "x_val_000000.bin", flat[:600])
    return tiny(data=str(folder), shuffle=2, seq_len="32", batch_tokens="128", epochs=3, steps=12)


def drawn(loader: tg.Loader, count: int, cfg: tg.Config) -> list[np.ndarray]:
    return [row for i in range(count) for row in loader.batch(i, 128, int(cfg.seq_len))]


def test_rows_of_shuffled_documents_hold_every_token_once(tmp_path):
    """
    Epoch 0: the stream of the files cut into rows of 33 that share nothing; later: documents whole,
    in another order.
    """
    docs = documents(40, np.random.default_rng(0))
    cfg = shards(tmp_path, docs, 301)
    plan, flat = tg.Plan(cfg), np.concatenate(docs)
    loader = tg.Loader(cfg, plan)
    n = len(flat) // 33
    assert loader.rows() == n and n % 4 != 0  # batches run across epochs
    rows = drawn(loader, 3 * n // 4, cfg)
    epochs = [rows[i * n : (i + 1) * n] for i in range(2)]
    assert {r.tobytes() for r in epochs[0]} == {
        flat[i * 33 : i * 33 + 33].astype("<u2").tobytes() for i in range(n)
    }
    # rows are permuted
    assert any(not np.array_equal(a, flat[i * 33 : i * 33 + 33]) for i, a in enumerate(epochs[0]))
    assert {r.tobytes() for r in epochs[1]} != {r.tobytes() for r in epochs[0]}
    # The stream of epoch 1, read in order: the pieces of documents, each once.
    second = loader_at(cfg, 1)
    stream = second.stretch(second.stream, 0, len(flat))
    starts = np.append(np.union1d(np.flatnonzero(flat == 0), [301]), len(flat))
    pieces = sorted(flat[a:b].astype("<u2").tobytes() for a, b in zip(starts, starts[1:]))
    assert (
        sorted(stream[end - length : end].tobytes() for _, _, length, end in second.stream)
        == pieces
    )
    assert {r.tobytes() for r in epochs[1]} == {
        stream[i * 33 : i * 33 + 33].tobytes() for i in range(n)
    }


def loader_at(cfg: tg.Config, epoch: int) -> tg.Loader:
    loader = tg.Loader(cfg, tg.Plan(cfg))
    loader.load_state_dict({"epoch": epoch, "shard": 0, "pos": 0})
    loader.shuffle_documents()
    return loader


def test_document_shuffle_depends_on_the_seed_alone(tmp_path):
    cfg = shards(tmp_path, documents(40, np.random.default_rng(1)), 200)
    plan = tg.Plan(cfg)
    whole = tg.Loader(cfg, plan)
    ranks = [tg.Loader(cfg, plan, alone(r, 2)) for r in range(2)]
    for i in range(12):
        kept = whole.state_dict()
        batch = whole.batch(i, 128, 32)
        assert np.array_equal(batch, np.concatenate([r.batch(i, 128, 32) for r in ranks]))
        again = tg.Loader(cfg, plan)
        again.load_state_dict(kept)
        assert np.array_equal(again.batch(i, 128, 32), batch)
    other = tg.Loader(dataclasses.replace(cfg, seed=2), plan)
    assert not np.array_equal(other.batch(0, 128, 32), tg.Loader(cfg, plan).batch(0, 128, 32))


def test_hundred_million_tokens_make_the_rows_of_the_specification(tmp_path, monkeypatch):
    """Specification 7.3: 48,804 rows of 2,049; 2,097 and 4,766 steps fit into 11 and 25 epochs."""
    write_shard(tmp_path / "x_train_000001.bin", np.zeros(8))
    monkeypatch.setattr(tg, "shard_tokens", lambda path: 100_000_000)
    for name, shuffle in (
        ("slowrun_1h", 2),
        ("slowrun_pr63", 1),
        ("slowrun_pr63", 2),
        ("slowrun_tiny", 2),
        ("slowrun_two_hour", 2),
    ):
        cfg = dataclasses.replace(preset(name), data=str(tmp_path), shuffle=shuffle)
        loader = tg.Loader(cfg, tg.Plan(cfg))
        assert loader.rows() == (48_804 if shuffle == 2 else 48_828)
    assert cfg.val_tokens == 4864 * 2048 == 9_961_472


def test_budget_of_tokens_is_kept(tmp_path):
    cfg = shards(tmp_path, documents(40, np.random.default_rng(2)), 301)
    flat = np.concatenate([tg.read_shard(f) for f in tg.find_shards(cfg, "train")])
    for shuffle in (0, 1, 2):
        small = dataclasses.replace(cfg, train_tokens=400, shuffle=shuffle, epochs=0)
        loader = tg.Loader(small, tg.Plan(small))
        assert sum(loader.counts) == 400
        allowed = {
            t.tobytes()
            for part in (flat[:301], flat[301:400], flat[:400])
            for t in windows(part, 2)
        }
        if shuffle < 2:
            assert {
                t.tobytes() for row in drawn(loader, 6, small) for t in windows(row, 2)
            } <= allowed
        else:
            assert loader_at(small, 0).stream[-1, 3] == loader_at(small, 2).stream[-1, 3] == 400
    with pytest.raises(tg.UserError, match="train_tokens = 99999, but the train shards"):
        tg.Loader(dataclasses.replace(cfg, train_tokens=99999), tg.Plan(cfg))


def windows(x: np.ndarray, n: int) -> np.ndarray:
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(x.astype("<u2"), n))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lr_cycles": 2, "steps": 3}, ("steps = 3 read 384 tokens", "set --epochs 1")),
        ({"lr_cycles": 2, "epochs": 0}, ("lr_cycles count epochs", "epochs (now 0)")),
        ({"average_epochs": 4}, ("average_epochs = 4", "at most epochs = 3")),
        ({"eval_every": -1, "max_seconds": 5.0}, ("eval_every", "no max_seconds")),
        ({"eval_every": -2}, ("eval_every = -2",)),
        ({"shuffle": 3}, ("shuffle = 3",)),
    ],
    ids=str,
)
def test_counting_epochs_where_there_are_none_is_refused(tmp_path, changes, words):
    cfg = dataclasses.replace(
        shards(tmp_path, documents(40, np.random.default_rng(3)), 301), **changes
    )
    with pytest.raises(tg.UserError) as caught:
        tg.validate(cfg)
        tg.Loader(cfg, tg.Plan(cfg))
    assert all(w in str(caught.value) for w in words), caught.value


# --- averages over epochs, in whole runs


def test_weights_of_an_average_sum_to_one_and_follow_their_rule():
    weights = score.averaging_weights(3)
    assert weights["equal"] == pytest.approx([1 / 3] * 3) and weights["recency"] == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6]
    )


FLAGS = {
    "attn_gate": 12, "value_proj": 20, "iha": 1, "resid_lambda": 1.0, "x0_lambda": 0.1, "unet": 2,
    "attn_dropout": 0.1, "mlp_dropout": 0.1, "stoch_depth": 0.1, "mtp": 0.3, "window_pattern":
    "SL", "window": "5", "depth": 4, "loop": "2:3", "repeats": "0:1 2/3:2", "average_epochs": 2,
    "eval_every": -1, "lr_cycles": 2, "export": "", "proj_init": 1.0, "micro_tokens": 64, "steps":
    22, "save_every": 5, "head_init": "0.02", "ema": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A whole run of three epochs through the command line's own path, and its scores."""
    folder = tmp_path_factory.mktemp("slowrun")
    return start(folder, folder / "logs")


def start(data: Path, logs: Path, **changes) -> Path:
    cfg = dataclasses.replace(
        shards(data, documents(40, np.random.default_rng(4)), 301), **FLAGS, log_dir=str(logs)
    )
    cfg = dataclasses.replace(cfg, **changes)
    tg.validate(cfg)
    with tg.Run(cfg) as run:
        code = tg.train(cfg, run)
    assert code in (0, 143)
    if code == 0:
        before = json.loads((logs / "test" / "result.json").read_text())
        assert not any("slowrun" in key or "prob" in key for key in before)
        assert score.main([str(logs / "test"), "--device", "cpu"]) == 0
    return logs / "test"


def own_losses(folder: Path, named: dict, repeats: int) -> torch.Tensor:
    """
    Losses of all validation targets, by the model's two halves and torch's cross-entropy, row by
    row.
    """
    cfg = tg.Config(**tg.read_toml(folder / "config.toml"))
    model = build(cfg)
    tg.load_weights(model, named, "here")
    tokens = torch.from_numpy(tg.read_shard(tg.find_shards(cfg, "val")[0]).astype(np.int64))
    losses = []
    with torch.no_grad():
        for low in range(0, (len(tokens) - 1) // 32 * 32, 32):
            z = model.logits(model.hidden(tokens[None, low : low + 32], repeats, 5))[0]
            losses.append(F.cross_entropy(z, tokens[low + 1 : low + 33], reduction="none"))
    return torch.cat(losses).double()


def test_averages_are_those_by_hand_and_selected_results_are_named(trained):
    result = json.loads((trained / "result.json").read_text())
    paths = score.kept_epochs(trained)
    assert [p.name for p in paths] == ["000015", "000022"] and result["averaged_steps"] == [15, 22]
    named = [tg.read_tensors(p / "model.safetensors") for p in paths]
    # the second epoch ended without replays
    p = [(-own_losses(trained, n, k + 1)).exp() for k, n in enumerate(named)]
    assert result["val_loss"] == pytest.approx(-p[1].log().mean().item(), abs=1e-5)
    assert result["val_loss_prob_equal"] == pytest.approx(
        -((p[0] + p[1]) / 2).log().mean().item(), abs=1e-5
    )
    assert result["val_loss_prob_recency"] == pytest.approx(
        -((p[0] + 2 * p[1]) / 3).log().mean().item(), abs=1e-5
    )
    for kind, share in (("equal", 1 / 2), ("recency", 1 / 3)):
        mean = {n: share * named[0][n] + (1 - share) * named[1][n] for n in named[0]}
        assert result[f"val_loss_weights_{kind}"] == pytest.approx(
            own_losses(trained, mean, 2).mean().item(), abs=1e-5
        )
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    by_epoch = {r["step"]: r["val_loss"] for r in lines if r["kind"] == "val"}
    assert list(by_epoch) == [0, 8, 15, 22]
    best = min((v, k) for k, v in by_epoch.items() if k)
    assert (result["val_loss_best_epoch"], result["best_epoch"]) == (
        best[0],
        {8: 1, 15: 2, 22: 3}[best[1]],
    )
    every = [v for k, v in result.items() if k.startswith("val_loss")]
    assert len(every) == 7 and result["slowrun_val_loss"] == min(every)
    averages = {r["step"]: r.get("val_loss_ema") for r in lines if r["kind"] == "val"}
    assert averages[0] is None and result["val_loss_ema"] == averages[22]
    assert result[result["slowrun_val_loss_is"]] == min(every)
    assert result["selected_on_validation"] == ["val_loss_best_epoch", "slowrun_val_loss"]


def test_evaluation_at_the_end_of_an_epoch_applies_the_model_as_it_was_trained(trained):
    """
    Replays begin with the step behind that evaluation; the best epoch is chosen among such losses.
    """
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    repeats = {r["step"]: r["repeats"] for r in lines if r["kind"] == "train"}
    assert (repeats[15], repeats[16]) == (
        1,
        2,
    )  # counted from 1: the last step of the epoch, and the next
    found = next(r["val_loss"] for r in lines if r["kind"] == "val" and r["step"] == 15)
    named = tg.read_tensors(score.kept_epochs(trained)[0] / "model.safetensors")
    assert found == pytest.approx(own_losses(trained, named, 1).mean().item(), abs=1e-5)
    assert found != pytest.approx(own_losses(trained, named, 2).mean().item(), abs=1e-3)


def test_averages_over_other_epochs_are_kept_but_do_not_stand_at_the_top(trained, tmp_path, capsys):
    """Over as many as the run says they are taken again to the same figures."""
    folder = shutil.copytree(trained, tmp_path / "logs" / "test")
    path = folder / "result.json"
    before = json.loads(path.read_text())
    state = json.loads((score.kept_epochs(trained)[1] / "state.json").read_text())
    applied = {"repeats": 2, "passes": 1, "window": 5, "window_long": 0}
    assert state == {"step": 22} | applied
    named = tg.read_tensors(score.kept_epochs(trained)[1] / "model.safetensors")
    # replays matter
    assert (own_losses(trained, named, 1) - own_losses(trained, named, 2)).abs().max() > 1e-3
    kept = before["scores"].pop("epochs 2")
    path.write_text(json.dumps({k: v for k, v in before.items() if k not in kept["top"]}))
    assert score.main([str(folder), "--device", "cpu"]) == 0
    assert "selected on validation" in capsys.readouterr().out
    after = json.loads(path.read_text())
    assert after["scores"]["epochs 2"] == kept and {k: after[k] for k in kept["top"]} == kept["top"]
    assert score.main([str(folder), "--device", "cpu", "--last_epochs", "1"]) == 0
    assert "keeps averages over 2 epochs" in capsys.readouterr().out
    with_other = path.read_bytes()
    other = json.loads(with_other)
    assert other["scores"].pop("epochs 1")["averaged_steps"] == [22]
    assert other == after, "averages over other epochs are not the run's"
    assert score.main([str(folder), "--device", "cpu", "--last_epochs", "-1"]) == 0
    assert "average over" not in capsys.readouterr().out and path.read_bytes() == with_other
    assert score.main([str(folder), "--last_epochs", "3"]) == 2
    assert "holds 2 of 3 epochs" in capsys.readouterr().err
    assert score.main([str(folder / "epochs")]) == 2
    assert "neither an artifact (model.nrx) nor a complete checkpoint" in capsys.readouterr().err


def test_the_figure_of_slowrun_is_the_least_of_all_losses(tmp_path):
    """The EMA is one of the evaluations that the leaderboard takes the least of."""
    run = SimpleNamespace(log=lambda line: None)
    s = SimpleNamespace(run=run, folder=tmp_path, plan=tg.Plan(tiny()))
    result, found = {"val_loss": 3.0, "val_loss_ema": 2.5}, {"val_loss_prob_equal": 2.7}
    chosen = score.selected(s, result, found)
    assert (chosen["slowrun_val_loss"], chosen["slowrun_val_loss_is"]) == (2.5, "val_loss_ema")


def test_interrupted_run_with_dropout_and_epochs_ends_with_the_same_bits(
    trained, tmp_path, monkeypatch
):
    """
    Stopped in the last epoch and continued: the same bits, so dropout's random state is part of the
    checkpoint.
    """
    old = tg.train_step

    def stopping(p, step, now):
        if step == 17:
            p.run.signal = 15
        return old(p, step, now)

    monkeypatch.setattr(tg, "train_step", stopping)
    folder = start(tmp_path, tmp_path / "logs")
    assert not (folder / "result.json").exists()
    monkeypatch.setattr(tg, "train_step", old)
    start(tmp_path, tmp_path / "logs", resume=True)
    ends = [score.kept_epochs(f)[-1] / "model.safetensors" for f in (trained, folder)]
    a, b = (tg.read_tensors(e) for e in ends)
    assert all(torch.equal(a[n], b[n]) for n in a)
    a, b = (json.loads((f / "result.json").read_text()) for f in (trained, folder))
    assert {k: v for k, v in a.items() if "val_loss" in k} == {
        k: v for k, v in b.items() if "val_loss" in k
    }


def test_two_ranks_average_to_the_losses_of_one(tmp_path):
    """
    Without dropout the losses are those of one rank; each rank scores its own rows, one of them
    fills up the last batch.
    """
    shards(tmp_path, documents(40, np.random.default_rng(4)), 301)
    flags = {
        **FLAGS,
        "attn_dropout": 0.0,
        "mlp_dropout": 0.0,
        "stoch_depth": 0.0,
        "epochs": 3,
        "shuffle": 2,
    }
    base = {k: v for k, v in dataclasses.asdict(tiny()).items() if v != getattr(tg.Config(), k)}
    argv = [
        w
        for k, v in (base | flags | {"data": tmp_path, "log_dir": tmp_path / "logs"}).items()
        for w in (f"--{k}", str(v))
    ]
    server = Server(tmp_path)
    try:
        for world in (1, 2):
            succeed(run_ranks(server, world, [*argv, "--run", f"w{world}"], tmp_path))
            folder = tmp_path / "logs" / f"w{world}"
            succeed(run_ranks(server, world, [folder], tmp_path, program="logs.score"))
    finally:
        server.close()
    one, two = (
        json.loads((tmp_path / "logs" / f"w{world}" / "result.json").read_text())
        for world in (1, 2)
    )
    keys = [k for k in one if "val_loss" in k and isinstance(one[k], float)]
    assert len(keys) == 8
    for key in keys:
        assert one[key] == pytest.approx(two[key], abs=2e-4), key
    assert one["best_epoch"] == two["best_epoch"] and one["averaged_steps"] == two["averaged_steps"]


@pytest.mark.parametrize(
    "changes, most",
    [(ALL | {"mtp": 0.3}, 11), ({"loop": "0:2", "repeats": "3", "block_scales": 1}, 1)],
)
def test_blocks_compiled_by_themselves_share_graphs_over_positions(changes, most):
    """
    Blocks are given lists of several lengths and x0, which at the first position must not be the
    very tensor x.
    """
    cfg = tiny(**changes)
    model, (x, y) = awake(build(cfg, 16)), random_tokens(cfg, 2, 16)
    flags = (x, y, 3, 5, False, bool(cfg.mtp))
    eager = model(*flags)
    torch._dynamo.reset()
    before = tg.graphs_compiled()
    for block in [*model.blocks, *([model.mtp_block] if cfg.mtp else [])]:
        block.compile(dynamic=False, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64):
        assert torch.allclose(model(*flags), eager)
    assert 0 < tg.graphs_compiled() - before <= most
