"""
Model: the remix family to the last constant, one mask rule on every path, switches that cost
nothing when off.
"""

import dataclasses
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, alone, build, now, random_tokens, tg, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.overrides import TorchFunctionMode

CPU, META = torch.device("cpu"), torch.device("meta")


def preset(*names: str, flags: tuple[str, ...] = ()) -> tg.Config:
    return tg.parse_args(["--config", *names, *flags])


def awake(model: tg.GPT, seed: int = 0) -> tg.GPT:
    """
    The same model with noise in every weight that starts at zero: at the start, blocks do nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=rng) * p.size(-1) ** -0.5)
    return model


def outputs(
    cfg: tg.Config, x: torch.Tensor, y: torch.Tensor, repeats: int = 1, window: int = 0
) -> tuple:
    """Losses and gradients by name."""
    model = awake(build(cfg, x.size(1)))
    losses = model(x, y, repeats, window)
    losses.mean().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters()}


def same_bits(a: tuple, b: tuple) -> bool:
    return (
        torch.equal(a[0], b[0])
        and a[1].keys() == b[1].keys()
        and all(torch.equal(a[1][n], b[1][n]) for n in a[1])
    )


# --- golden numbers


@pytest.mark.parametrize(
    "name, flags, golden",
    [
        ("remix_a", (), 123_568_128),
        ("remix_m", (), 162_165_504),
        ("remix_m one_gpu", ("--device", "cpu"), 162_165_504),
        ("remix_a", ("--tie_embed", "0"), 162_165_504),
        ("remix_m", ("--tie_embed", "1"), 123_568_128),
        ("remix_m", ("--optimizer", "adamw"), 162_165_504),
    ],
)
def test_parameter_count_is_the_golden_one(name, flags, golden):
    model = tg.build_model(preset(*name.split(), flags=flags), META, torch.bfloat16, 64)
    assert sum(p.numel() for p in model.parameters()) == golden


def test_muon_gets_the_48_matrices_of_remix_m():
    cfg = preset("remix_m")
    model = tg.build_model(cfg, META, torch.bfloat16, 64)
    buckets = tg.param_buckets(cfg, model, alone())
    muon = {
        n: tuple(p.shape) for b in buckets if b.rule.kind == "muon" for n, p in b.params.items()
    }
    leaves = {
        "attn.qkv": (3, 768, 768),
        "attn.proj": (768, 768),
        "mlp.fc": (3072, 768),
        "mlp.proj": (768, 3072),
    }
    assert muon == {
        f"blocks.{i}.{leaf}": shape for i in range(12) for leaf, shape in leaves.items()
    }
    assert len(muon) == 48
    # Stacks of one shape: 12 x (3 qkv + 1 proj) square matrices, 12 tall, 12 wide.
    assert sorted((b.unit, b.weights.size(0)) for b in buckets if b.rule.kind == "muon") == [
        ((768, 768), 48),
        ((768, 3072), 12),
        ((3072, 768), 12),
    ]
    rest = {n: b.rule.lr for b in buckets if b.rule.kind == "adamw" for n in b.params}
    assert rest == {"head": 0.22, "embed": 0.6}


def test_depth_does_not_matter_for_the_loss_before_the_first_step():
    """
    Every block's two output projections start at zero, so x + 0 + 0: one block is enough for golden
    losses.
    """
    x, y = random_tokens(tiny(), 2, 32)
    for flags in ({"tie_embed": 1}, {"softcap": 15.0, "head_init": "0.5"}):
        shallow, deep = (build(tiny(depth=d, **flags))(x, y) for d in (1, 5))
        assert torch.equal(shallow, deep)


def test_first_loss_of_remix_m_is_ln_50304():
    """
    Spec 8.2 and the published log: 10.8258, because the head starts at zero. One block (see the
    test above).
    """
    cfg = preset("remix_m", flags=("--depth", "1", "--window", "0"))
    model = tg.build_model(cfg, CPU, torch.float32, 32)
    x, y = random_tokens(cfg, 1, 32)
    loss = model(x, y).mean().item()
    assert loss == pytest.approx(math.log(50304), abs=1e-5) and f"{loss:.4f}" == "10.8258"
    assert model.head.dtype == torch.bfloat16


def test_first_loss_of_remix_a_is_the_published_one():
    """
    Spec finding 3: 14.93 +- 0.05 with norm_eps 2^-7 and 16.0 with a small epsilon, on i.i.d.
    tokens. Full width and vocabulary, one block (see above), a short row: nothing in the loss
    depends on the length of the row.
    """
    cfg = preset("remix_a", flags=("--depth", "1", "--window", "0"))
    model = tg.build_model(cfg, CPU, torch.float32, 1024)
    x, y = random_tokens(cfg, 1, 1024)
    with torch.no_grad():
        assert model(x, y).mean().item() == pytest.approx(14.93, abs=0.05)
        model.cfg = dataclasses.replace(cfg, norm_eps=1e-6)
        assert model(x[:, :256], y[:, :256]).mean().item() == pytest.approx(16.0, abs=0.1)


def test_initial_values_are_those_of_the_original():
    """Spec 1.7: bounds and standard deviations, at full width."""
    model = tg.build_model(
        preset("remix_m", flags=("--depth", "1", "--vocab", "2000", "--doc_token", "0")),
        CPU,
        torch.float32,
        8,
    )
    p = {n: t.detach().float() for n, t in model.named_parameters()}
    assert p["blocks.0.attn.qkv"].std().item() == pytest.approx(0.01804, rel=0.005)
    assert p["blocks.0.attn.qkv"].abs().max().item() == pytest.approx(0.03125, rel=0.01)
    assert p["blocks.0.mlp.fc"].abs().max().item() == pytest.approx(0.03608, rel=0.01)
    assert p["blocks.0.mlp.fc"].std().item() == pytest.approx(0.03608 / 3**0.5, rel=0.005)
    assert (
        p["embed"].std().item() == pytest.approx(1, rel=0.005)
        and abs(p["embed"].mean().item()) < 0.005
    )
    assert not any(p[n].any() for n in ("head", "blocks.0.attn.proj", "blocks.0.mlp.proj"))
    tied = tg.build_model(
        preset("remix_a", flags=("--depth", "1", "--vocab", "2000", "--doc_token", "0")),
        CPU,
        torch.float32,
        8,
    )
    assert tied.head.abs().max().item() == pytest.approx(0.03608, rel=0.01) and tied.embed is None
    three = p["blocks.0.attn.qkv"]
    assert not torch.equal(three[0], three[1]) and not torch.equal(three[1], three[2])


# --- rotary embedding


def test_rotary_frequencies_and_still_dims_are_right():
    """Spec 1.4 and 8.3: w_k = 1024^-(k/31) on 32 pairs, dims 32..63 and 96..127 do not turn."""
    cfg = preset("remix_m")
    cos, sin = tg.rope_table(cfg, 300)
    assert cos.shape == sin.shape == (300, 64) and cos.dtype == torch.float32
    for k in range(32):
        w = 1024 ** -(k / 31)
        assert cos[299, k].item() == pytest.approx(math.cos(299 * w), abs=2e-5)
        assert sin[299, k].item() == pytest.approx(math.sin(299 * w), abs=2e-5)
    assert sin[1, 0].item() == pytest.approx(math.sin(1)) and sin[1, 31].item() == pytest.approx(
        math.sin(1 / 1024)
    )
    x = torch.randn(1, 300, 2, 128, generator=torch.Generator().manual_seed(0))
    y = tg.rotate(x, cos, sin)
    assert torch.equal(y[..., 32:64], x[..., 32:64]) and torch.equal(y[..., 96:], x[..., 96:])
    assert not torch.allclose(y[:, 1:, :, :32], x[:, 1:, :, :32])
    assert torch.equal(y[:, 0], x[:, 0])
    # y1 = x1 cos + x2 sin, y2 = -x1 sin + x2 cos: half-split pairs, in this direction.
    t, k = 7, 3
    angle = torch.tensor(t * 1024 ** -(k / 31))
    a, b = x[0, t, 1, k], x[0, t, 1, k + 64]
    assert torch.allclose(
        y[0, t, 1, [k, k + 64]],
        torch.stack([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()]),
    )


@pytest.mark.parametrize("rope", ["truncated", "standard"])
def test_rotary_scores_depend_on_distance_alone(rope):
    cos, sin = tg.rope_table(tiny(rope=rope, dim=64, heads=2), 100)
    q, k = torch.randn(32), torch.randn(32)
    spread = lambda x: x.expand(1, 100, 1, 32)
    scores = tg.rotate(spread(q), cos, sin)[0, :, 0] @ tg.rotate(spread(k), cos, sin)[0, :, 0].T
    for distance in (0, 1, 13):
        assert torch.allclose(
            scores.diagonal(-distance), scores[distance, 0].expand(100 - distance), atol=1e-4
        )
    assert (scores[1, 0] - scores[0, 0]).abs() > 1e-3


def test_standard_rotary_is_complex_multiplication():
    cos, sin = tg.rope_table(tiny(rope="standard", rope_base=10000.0, dim=64, heads=2), 50)
    x = torch.randn(1, 50, 1, 32)
    z = torch.complex(x[..., :16], x[..., 16:])
    angles = torch.arange(50)[:, None] * 10000 ** (-torch.arange(16) / 16)
    turned = z[0, :, 0] * torch.polar(torch.ones(50, 16), -angles)
    y = tg.rotate(x, cos, sin)[0, :, 0]
    assert torch.allclose(y, torch.cat([turned.real, turned.imag], -1), atol=1e-5)


# --- norm, softcap, MLP, loss


def test_swiglu_gates_the_right_half():
    cfg = tiny(activation="swiglu", mlp_ratio=2.5)
    mlp = awake(build(cfg)).blocks[0].mlp
    assert mlp.fc.shape == (2, 80, 32) and mlp.proj.shape == (32, 80)
    x = torch.randn(5, 32)
    gate, up = x @ mlp.fc[0].T, x @ mlp.fc[1].T
    assert torch.allclose(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.proj.T, atol=1e-6)
    muon = [b for b in tg.param_buckets(cfg, build(cfg), alone()) if "blocks.0.mlp.fc" in b.params][
        0
    ]
    assert muon.rule.kind == "muon" and muon.unit == (
        80,
        32,
    )  # the halves are orthogonalised one by one


def test_norm_has_the_epsilon_and_precision_that_were_asked_for():
    x = torch.randn(5, 64).double()
    expected = torch.from_numpy(
        x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 2**-7)
    )
    assert torch.allclose(tg.norm(x.float(), 2**-7).double(), expected, atol=1e-6)
    assert torch.allclose(
        tg.norm(x.float(), 1e-6), F.rms_norm(x.float(), (64,), eps=1e-6), atol=1e-6
    )
    # bf16 squares of these would be lost in a bf16 sum
    small = (torch.ones(1, 64) * 3e-3).bfloat16()
    assert tg.norm(small, 1e-6).float().mean().item() == pytest.approx(
        3e-3 / math.sqrt(9e-6 + 1e-6), rel=0.01
    )


def test_softcap_of_remix_m_is_the_sigmoid_of_the_original():
    """Spec 1.6: 30*sigmoid(logits/(7.5*sqrt(d))), and 30*sigmoid(u/7.5) = 15 + 15*tanh(u/15)."""
    cfg = tiny(softcap=15.0, logit_dim_power=-0.5)
    model = awake(build(cfg))
    x = torch.randn(40, cfg.dim) * 300
    raw = x @ model.head.T
    original = 30 * torch.sigmoid(raw / (7.5 * cfg.dim**0.5))
    assert torch.allclose(model.logits(x) + 15, original, atol=1e-4)
    assert torch.allclose(model.logits(x).log_softmax(-1), original.log_softmax(-1), atol=1e-4)
    assert model.logits(x).abs().max() > 14


def test_loss_counts_padding_columns_in_the_softmax():
    """Spec 1.2: the columns behind the vocabulary are in the sum; targets of -1 are not."""
    cfg = tiny(vocab=90)
    model = awake(build(cfg))
    x, y = random_tokens(cfg, 2, 16)
    y[0, 3] = -1
    losses = model(x, y)
    logits = model.hidden(x, 1, 0).flatten(0, 1) @ model.head.T
    assert logits.shape == (32, 96)
    by_hand = logits.exp().sum(-1).log() - logits.gather(1, y.flatten().clamp(min=0)[:, None])[:, 0]
    by_hand[3] = 0
    assert torch.allclose(losses, by_hand, atol=1e-5) and losses[3] == 0


@pytest.mark.parametrize("chunk", [1, 7, 16, 63])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    cfg = tiny(softcap=15.0)
    x, y = random_tokens(cfg, 4, 16)
    y[1, 2:9] = -1
    whole, parts = outputs(cfg, x, y), outputs(dataclasses.replace(cfg, loss_chunk=chunk), x, y)
    assert torch.allclose(whole[0], parts[0], atol=1e-6)
    for name in whole[1]:
        assert torch.allclose(whole[1][name], parts[1][name], atol=1e-6), name


def test_micro_batches_and_rows_do_not_influence_each_other():
    cfg = tiny(doc_mask=1, window="8")
    x, y = random_tokens(cfg, 4, 32)
    model = awake(build(cfg))
    together = model(x, y, 1, 8).view(4, 32)
    for i in range(4):
        assert torch.allclose(together[i], model(x[i : i + 1], y[i : i + 1], 1, 8), atol=1e-5)


def test_bf16_weights_and_compute_give_nearly_the_same_model():
    cfg = tiny(doc_mask=1)
    x, y = random_tokens(cfg, 2, 32)
    model = awake(build(cfg))
    half = awake(build(cfg, dtype=torch.bfloat16))
    assert (
        half.hidden(x, 1, 0).dtype == torch.bfloat16
        and half.logits(half.hidden(x, 1, 0)).dtype == torch.float32
    )
    assert torch.allclose(model(x, y), half(x, y), atol=0.15) and not torch.equal(
        model(x, y), half(x, y)
    )
    loss = half(x, y).mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in half.parameters())


# --- the mask rule


def test_mask_rule_is_right_in_hand_cases():
    """
    Spec 8.4: distance 1023 is seen and 1024 is not; no future; a document token sees itself alone,
    and is seen.
    """
    see = lambda i, j, a, b, w: bool(tg.visible(*(torch.tensor(t) for t in (i, j, a, b)), w))
    assert see(5000, 5000 - 1023, 3, 3, 1024) and not see(5000, 5000 - 1024, 3, 3, 1024)
    assert see(5000, 0, 3, 3, 0) and not see(5000, 0, 3, 3, 5000) and see(5000, 0, 3, 3, 5001)
    assert see(7, 7, 1, 1, 1) and not see(7, 6, 1, 1, 1) and not see(6, 7, 1, 1, 0)
    assert not see(7, 6, 2, 1, 0) and bool(
        tg.visible(torch.tensor(7), torch.tensor(6), None, None, 0)
    )


def reach(cfg: tg.Config, x: torch.Tensor, changed: int, window: int = 0) -> set[int]:
    """Positions whose final activation changes when the token at `changed` does."""
    model = awake(build(cfg, x.size(1)))
    other = x.clone()
    other[0, changed] = (other[0, changed] + 1) % cfg.vocab or 1
    with torch.no_grad():
        a, b = model.hidden(x, 1, window), model.hidden(other, 1, window)
    return set((a != b).any(-1)[0].nonzero().flatten().tolist())


def test_model_sees_no_future_no_other_document_and_nothing_beyond_its_window():
    x = torch.arange(1, 41)[None]
    assert reach(tiny(), x, 10) == set(range(10, 40))
    assert reach(tiny(depth=1), x, 10, window=5) == set(range(10, 15))
    assert reach(tiny(depth=3), x, 10, window=5) == set(range(10, 10 + 3 * 4 + 1))
    x[0, 20] = 0  # a document begins
    assert reach(tiny(doc_mask=1), x, 10) == set(range(10, 20))
    assert reach(tiny(doc_mask=0), x, 10) == set(range(10, 40))
    assert reach(tiny(doc_mask=1), x, 25) == set(range(25, 40))
    x[0, 30] = 0
    assert reach(tiny(doc_mask=1), x, 21) == set(range(21, 30))


def dense(q, k, v, docs, window, scale):
    """The oracle: a mask filled by plain loops, torch's own attention."""
    B, H, T, _ = q.shape
    mask = np.zeros((B, 1, T, T), dtype=bool)
    for i in range(T):
        first = max(0, i - window + 1) if window else 0
        mask[:, 0, i, first : i + 1] = True
        if docs is not None:
            for b in range(B):
                mask[b, 0, i] &= docs[b].numpy() == int(docs[b, i])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.from_numpy(mask), scale=scale, enable_gqa=True
    )


def material(T, H=4, G=4, B=2, K=8, docs=True, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, T, K, generator=rng) for n in (H, G, G))
    ids = (
        (torch.rand(B, T, generator=rng) < 4 / max(T, 8)).cumsum(1, dtype=torch.int32)
        if docs
        else None
    )
    return q, k, v, ids


def with_gradients(attend, q, k, v, *rest):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = attend(q, k, v, *rest)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))


def bands(q, k, v, docs, window, scale):
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return tg.attend_bands(q, k, v, docs, window, scale)


CASES = [
    (1, 0, 4),
    (1, 1, 4),
    (7, 3, 2),
    (128, 0, 1),
    (129, 1, 4),
    (300, 0, 2),
    (300, 64, 4),
    (300, 130, 1),
    (300, 1000, 4),
    (391, 127, 2),
    (391, 128, 4),
    (391, 129, 4),
]  # T, window, heads of keys and values


@pytest.mark.parametrize("docs", [True, False], ids=["docs", "nodocs"])
@pytest.mark.parametrize("T, window, G", CASES)
def test_blocks_and_bands_are_dense_attention(T, window, G, docs):
    q, k, v, ids = material(T, G=G, docs=docs)
    expected = with_gradients(dense, q, k, v, ids, window, 0.3)
    bound = 0.3 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    assert bound < 40
    for attend in (tg.attend_blocks, partial(tg.attend_blocks, bound=bound), bands):
        if attend is bands and not window:
            continue
        for got, want in zip(with_gradients(attend, q, k, v, ids, window, 0.3), expected):
            assert torch.allclose(got, want, atol=2e-5), (got - want).abs().max()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"attn_scale": 0.12},
        {"rope": "standard", "rope_dims": 4},
        {"q_gain": 9.0},
        {"qk_norm": 0},
        {"attn_scale": 30.0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_keep_the_bound_that_lets_exp_go_unchecked(flags, dtype):
    cfg = tiny(**flags)
    model, largest = build(cfg, dtype=dtype), []
    attn = model.blocks[0].attn

    class Watching(tg.AttentionMask):
        def attend(self, q, k, v, scale, bound=math.inf):
            largest.append((float((q.float() * scale).matmul(k.float().mT).abs().max()), bound))
            got = super().attend(q, k, v, scale, bound)
            assert got.isfinite().all()
            return got

    x = torch.randn(2, 32, cfg.dim).to(dtype) * 100
    with torch.no_grad():
        # every query meets its own key: the largest scores there are
        attn.qkv[1].copy_(attn.qkv[0])
        attn(x, (model.cos, model.sin), Watching(None, 0, x), False)
    ((score, bound),) = largest
    assert score <= bound
    assert (bound == math.inf) == bool(flags.get("q_gain") or flags.get("qk_norm") == 0)


@given(st.integers(1, 80), st.integers(1, 90), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_bands_hold_for_any_length_and_window(T, window, seed):
    q, k, v, ids = material(T, H=2, G=2, B=1, seed=seed)
    want = dense(q, k, v, ids, window, 1.0)
    assert torch.allclose(bands(q, k, v, ids, window, 1.0), want, atol=2e-5)
    assert torch.allclose(tg.attend_blocks(q, k, v, ids, window, 1.0), want, atol=2e-5)


def test_long_rows_take_a_path_with_the_same_result(monkeypatch):
    q, k, v, ids = material(4200, H=1, G=1, B=1, K=4)
    taken = []
    monkeypatch.setattr(
        tg, "attend_bands", lambda *a, old=tg.attend_bands: taken.append(1) or old(*a)
    )
    for window, used in ((1000, 1), (3000, 1), (0, 1)):  # the last two stay with blocks
        found = with_gradients(tg.attend_blocks, q, k, v, ids, window, 0.3)
        assert len(taken) == used
        for got, want in zip(found, with_gradients(dense, q, k, v, ids, window, 0.3)):
            assert torch.allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("window", [1000, 3000, 0])
def test_no_scores_of_long_rows_are_kept_for_the_backward_pass(window):
    """Of 8,192 tokens: queries, keys, values and copies of them."""
    q, k, v, ids = material(8192, H=1, G=1, B=1, K=4)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        tg.attend_blocks(q.requires_grad_(), k, v, ids, window, 0.3).sum()
    inputs = q.nbytes + k.nbytes + v.nbytes + ids.nbytes
    assert inputs / 2 < sum(kept.values()) < 4 * inputs < 4 * 8192 * 64


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "T, window, G, docs",
    [
        (300, 0, 4, False),
        (300, 0, 2, True),
        (300, 64, 1, True),
        (391, 130, 4, False),
        (128, 500, 4, True),
        (7, 3, 4, True),
    ],
)
def test_the_gpu_path_has_the_same_mask(T, window, G, docs):
    """flex_attention, which trains on CUDA, run forward on the CPU."""
    q, k, v, ids = material(T, G=G, docs=docs)
    with torch.no_grad():
        assert torch.allclose(
            tg.attend_flex(q, k, v, ids, window, 0.3),
            tg.attend_blocks(q, k, v, ids, window, 0.3),
            atol=2e-5,
        )


@pytest.mark.filterwarnings("ignore")
def test_the_compiled_gpu_path_has_the_same_mask():
    q, k, v, ids = material(384, H=4, G=2, K=32)
    with torch.no_grad():
        mask = tg.flex_mask(q, ids, 100)
        flex = torch.compile(
            lambda q, k, v: tg.attend_flex(q, k, v, ids, 100, 0.3, mask), dynamic=False
        )
        assert torch.allclose(flex(q, k, v), tg.attend_blocks(q, k, v, ids, 100, 0.3), atol=2e-5)
        half = flex(*(t.bfloat16() for t in (q, k, v))).float()
    assert torch.allclose(half, tg.attend_blocks(q, k, v, ids, 100, 0.3), atol=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stance", ["default", "force_eager"])
def test_a_gpu_runs_the_flex_kernels_compiled_or_not_at_all(monkeypatch, stance):
    """
    Tensors here say that they are on a GPU; nobody has prepared anything, as in a tool that just
    builds a model. Where compiling is off, plain matmuls take over, which never hold T x T scores.
    """
    q, k, v, ids = material(300, G=2)
    x = torch.zeros(q.size(0), 300, 8)
    expected = {w: tg.attend_blocks(q, k, v, ids, w, 0.3) for w in (0, 64)}
    runs = []

    def watched(name: str, function):
        def run(*args, **kwargs):
            runs.append((name, torch.compiler.is_compiling()))
            return function(*args, **kwargs)

        monkeypatch.setattr(tg, name, run)

    for name in ("flex_attention", "create_block_mask"):
        watched(name, getattr(tg, name))
    monkeypatch.setattr(tg, "compiled", lambda f: torch.compile(f, dynamic=False, backend="eager"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    with torch.no_grad(), torch.compiler.set_stance(stance):
        for window in (0, 64):
            seen = tg.AttentionMask(ids, window, x)
            assert seen.on_gpu and (seen.flex is None) == (stance == "force_eager")
            assert torch.allclose(seen.attend(q, k, v, 0.3), expected[window], atol=2e-5)
    assert runs == (
        [("create_block_mask", True), ("flex_attention", True)] * 2 if stance == "default" else []
    )


def test_grouped_heads_read_the_keys_of_their_group():
    """
    kv_heads copies of a full-head model in which the heads of a group share their keys give the
    same output.
    """
    grouped, full = tiny(heads=4, kv_heads=2), tiny(heads=4)
    x, y = random_tokens(full, 2, 32)
    small, big = awake(build(grouped)), awake(build(full))
    with torch.no_grad():
        for a, b in zip(small.blocks, big.blocks):
            b.attn.qkv[0] = a.attn.q
            for i in (0, 1):
                heads = a.attn.kv[i].view(2, 1, 8, 32).expand(2, 2, 8, 32)
                b.attn.qkv[1 + i] = heads.reshape(32, 32)
            b.attn.proj.copy_(a.attn.proj)
    assert torch.allclose(small(x, y), big(x, y), atol=1e-5)


# --- depth


def test_loop_applies_blocks_in_order():
    cfg = tiny(depth=6, loop="2:4")
    assert tg.layer_order(cfg, 1) == [0, 1, 2, 3, 4, 5]
    assert tg.layer_order(cfg, 3) == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]
    assert tg.layer_order(tiny(depth=3, loop="0:3"), 4) == [0, 1, 2] * 4
    assert tg.layer_order(tiny(depth=3), 1) == [0, 1, 2]


@given(st.integers(1, 8), st.data())
def test_deeper_phase_begins_with_the_shallower_one(depth, data):
    """
    All but the blocks behind the loop is a prefix of the order with more repeats; they close both.
    """
    low = data.draw(st.integers(0, depth - 1))
    high = data.draw(st.integers(low + 1, depth))
    cfg = tiny(depth=depth, loop=f"{low}:{high}")
    tail = list(range(high, depth))
    for r in range(1, 5):
        less, more = tg.layer_order(cfg, r), tg.layer_order(cfg, r + 1)
        assert len(more) - len(less) == high - low
        assert less[len(less) - len(tail) :] == more[len(more) - len(tail) :] == tail
        assert more[: len(less) - len(tail)] == less[: len(less) - len(tail)]
        assert set(less) == set(range(depth))


@given(st.integers(1, 7), st.integers(1, 4), st.sampled_from([0, 1, 2]), st.booleans(), st.data())
def test_wiring_joins_the_places_that_a_stack_and_a_memory_of_blocks_join(
    depth, repeats, unet, cross, data
):
    """
    The U-net as a stack that is filled and emptied; a block's last output as it is remembered.
    """
    low = data.draw(st.integers(0, depth - 1))
    high = data.draw(st.integers(low + 1, depth))
    most = repeats + data.draw(st.integers(0, 2))
    cfg = tiny(depth=depth, loop=f"{low}:{high}", repeats=f"0:1 0.5:{most}", unet=unet)
    cfg.cross_repeat, cfg.xsa = int(cross), data.draw(st.integers(-1, 3))
    places, order = tg.wiring(cfg, repeats), tg.layer_order(cfg, repeats)
    assert [place.block for place in places] == order
    stack, outputs, seen = [], {}, {}
    for at, (place, block) in enumerate(zip(places, order)):
        skip = None
        if unet == 1 and at >= len(order) // 2 and stack:
            skip = stack.pop(), at - len(order) // 2
        if unet == 2 and block >= depth - depth // 2:
            skip = outputs[depth - 1 - block], block - depth + depth // 2
        assert place.skip == skip
        passed = seen.get(block, 0)
        again = (outputs[block], (block - low, passed - 1)) if cross and passed else None
        assert place.last_visit == again and place.visit == passed
        assert place.xsa == (cfg.xsa < 0 or len(order) - at <= cfg.xsa)
        behind = [b for b in order[at:] if b >= high] if block >= high else []
        deepest = depth + (high - low) * (most - 1)
        assert place.row == (deepest - len(behind) if behind else at)
        if unet == 1 and at < len(order) // 2:
            stack.append(at)
        outputs[block], seen[block] = at, passed + 1
    used = {added.source for p in places for added in (p.skip, p.last_visit) if added}
    assert {at for at, place in enumerate(places) if place.is_added} == used


def by_hand(
    p: dict, cfg: tg.Config, x: torch.Tensor, order: list[int], window: int
) -> torch.Tensor:
    """Spec 1.2 to 1.5 as plain as it gets: a second model, from a dictionary of weights."""
    rms = lambda z: F.rms_norm(z, (z.size(-1),), eps=cfg.norm_eps)
    (B, T), H, K = x.shape, cfg.heads, cfg.dim // cfg.heads
    docs = (x == cfg.doc_token).cumsum(1) if cfg.doc_mask else None
    w = torch.cat([cfg.rope_base ** -torch.linspace(0, 1, K // 4), torch.zeros(K // 4)])
    turn = torch.polar(torch.ones(T, K // 2), -torch.outer(torch.arange(T).float(), w))

    def rope(z: torch.Tensor) -> torch.Tensor:  # B H T K
        z = torch.complex(z[..., : K // 2], z[..., K // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    h = rms(p["embed" if "embed" in p else "head"][x])
    for i in order:
        a = {n.split(".", 2)[2]: t for n, t in p.items() if n.startswith(f"blocks.{i}.")}
        q, k, v = ((rms(h) @ m.T).view(B, T, H, K).transpose(1, 2) for m in a["attn.qkv"])
        y = dense(rope(rms(q)), rope(rms(k)), v, docs, window, cfg.attn_scale or K**-0.5)
        h = h + y.transpose(1, 2).reshape(B, T, -1) @ a["attn.proj"].T
        h = h + (rms(h) @ a["mlp.fc"].T).clamp(min=0).square() @ a["mlp.proj"].T
    return rms(h)


@pytest.mark.parametrize(
    "changes, window, repeats",
    [
        ({"doc_mask": 1}, 9, 1),
        ({"tie_embed": 1, "attn_scale": 0.12, "norm_eps": 2**-7}, 0, 1),
        ({"depth": 3, "loop": "1:3", "repeats": "0:1 0.5:3", "doc_mask": 1}, 0, 3),
        ({"depth": 3, "loop": "0:1", "repeats": "2"}, 5, 2),
    ],
    ids=str,
)
def test_model_is_the_one_of_the_specification(changes, window, repeats):
    cfg = tiny(**changes)
    x, _ = random_tokens(cfg, 2, 32)
    x[:, 13] = 0
    model = awake(build(cfg))
    order = {"": [0, 1], "1:3": [0, 1, 2, 1, 2, 1, 2], "0:1": [0, 0, 1, 2]}[cfg.loop]
    expected = by_hand(dict(model.named_parameters()), cfg, x, order, window)
    assert torch.allclose(model.hidden(x, repeats, window), expected, atol=1e-5)
    assert (
        expected - by_hand(dict(model.named_parameters()), cfg, x, order[:-1], window)
    ).abs().max() > 0.1


def test_gradient_of_a_looped_block_is_the_sum_over_its_passes():
    """Against blocks of their own, one for every position, with the same weights."""
    cfg = tiny(depth=3, loop="1:3", repeats="2")
    x, y = random_tokens(cfg, 2, 32)
    model, long = awake(build(cfg)), awake(build(tiny(depth=5)))
    with torch.no_grad():
        for new, old in enumerate((0, 1, 2, 1, 2)):
            long.blocks[new].load_state_dict(model.blocks[old].state_dict())
        long.head.copy_(model.head)
    a, b = model(x, y, 2).mean(), long(x, y).mean()
    a.backward()
    b.backward()
    assert torch.allclose(a, b) and not torch.allclose(a, model(x, y, 1).mean())
    looped, g = ({n: p.grad for n, p in m.named_parameters()} for m in (model, long))
    for leaf in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"):
        assert torch.allclose(looped[f"blocks.0.{leaf}"], g[f"blocks.0.{leaf}"], atol=1e-6)
        for block in (1, 2):
            total = g[f"blocks.{block}.{leaf}"] + g[f"blocks.{block + 2}.{leaf}"]
            assert torch.allclose(looped[f"blocks.{block}.{leaf}"], total, atol=1e-6)


# --- switches


@pytest.mark.parametrize(
    "changes, window",
    [
        ({"softcap": 0.0}, 0),
        ({"logit_dim_power": 0.0}, 0),
        ({"loop": "0:2", "repeats": "1"}, 0),
        ({"kv_heads": 2}, 0),
        ({"head_dim": 16}, 0),
        ({"attn_scale": 16**-0.5}, 0),
        ({}, 32),
        ({}, 999),
        ({"doc_mask": 1}, 0),
        ({"loss_chunk": 64}, 0),
        ({"ema": 0.9}, 0),
        ({"grad_clip": 1.0}, 0),
        ({"micro_tokens": 32}, 0),
        ({"adamw_matrices": "attn"}, 0),
    ],
    ids=str,
)
def test_switch_at_its_neutral_value_changes_no_bit(changes, window):
    """No new parameter, and the same bits of losses and gradients."""
    x, y = random_tokens(tiny(), 2, 32)
    x = x.clamp(min=1)  # no document token
    assert same_bits(outputs(tiny(), x, y), outputs(tiny(**changes), x, y, window=window))


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embed": 1},
        {"kv_heads": 1},
        {"depth": 4},
        {"head_init": "0.02"},
        {"optimizer": "adamw"},
        {"loop": "0:1", "repeats": "3"},
        {"vocab": 50},
        {"mlp_ratio": 2.0},
        {"normuon": 0.9},
    ],
    ids=str,
)
def test_switch_keeps_the_initial_values_of_other_parameters(changes):
    plain = dict(build(tiny()).named_parameters())
    other = dict(build(tiny(**changes)).named_parameters())
    common = [n for n in plain if n in other and plain[n].shape == other[n].shape]
    assert len(common) >= 4
    for name in common:
        if not (name == "head" and ("head_init" in changes or "tie_embed" in changes)):
            assert torch.equal(plain[name], other[name]), name


def test_seed_and_name_give_every_parameter_its_own_values():
    a, b, again = (dict(build(tiny(seed=s)).named_parameters()) for s in (1, 2, 1))
    drawn = [n for n in a if a[n].any()]
    assert set(a) - set(drawn) == {
        "head",
        *(f"blocks.{i}.{m}.proj" for i in (0, 1) for m in ("attn", "mlp")),
    }
    for name in drawn:
        assert torch.equal(a[name], again[name]) and not torch.equal(a[name], b[name])
    assert not torch.equal(a["blocks.0.mlp.fc"], a["blocks.1.mlp.fc"])


def test_building_a_model_leaves_the_global_random_state():
    torch.manual_seed(3)
    build(tiny())
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


SMALL = (
    "--depth",
    "2",
    "--dim",
    "64",
    "--heads",
    "2",
    "--head_dim",
    "32",
    "--vocab",
    "96",
    "--doc_token",
    "0",
    "--dtype",
    "float32",
    "--compile",
    "0",
    "--seq_len",
    "32",
    "--batch_tokens",
    "256",
    "--micro_tokens",
    "256",
    "--head_multiple",
    "32",
)


@pytest.mark.parametrize(
    "names, flags, tied, capped, muon",
    [
        ("remix_a", (), True, False, False),
        ("remix_m", (), False, True, True),
        ("remix_a", ("--tie_embed", "0"), False, False, False),
        ("remix_a", ("--softcap", "15"), True, True, False),
        ("remix_a", ("--optimizer", "muon"), True, False, True),
        ("remix_m", ("--tie_embed", "1"), True, True, True),
        ("remix_m", ("--softcap", "0"), False, False, True),
        ("remix_m", ("--optimizer", "adamw"), False, True, False),
        ("remix_m", ("--adamw_matrices", r"\.attn\."), False, True, True),
        (
            "remix_m",
            (
                "--polar",
                "polar_express",
                "--normuon",
                "0.95",
                "--cautious",
                "1",
                "--row_norm",
                "1",
                "--matrix_wd",
                "0.1",
            ),
            False,
            True,
            True,
        ),
    ],
    ids=lambda v: "_".join(v).replace("--", "") if isinstance(v, tuple) else str(v),
)
def test_halfway_house_between_a_and_m_is_one_flag_and_trains(names, flags, tied, capped, muon):
    cfg = preset(names, "on_cpu", flags=SMALL + flags)
    model = build(cfg)
    opt = tg.MuonAdamW(cfg, model, alone())
    assert (
        model.embed is None,
        cfg.softcap == 15,
        any(b.rule.kind == "muon" for b in opt.buckets),
    ) == (tied, capped, muon)
    x, y = random_tokens(cfg, 8, 32)
    losses = []
    for _ in range(15):
        loss = model(x, y).mean()
        loss.backward()
        opt.step(now())
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.4 and all(map(math.isfinite, losses)), losses
    if not tied and names == "remix_m":
        assert losses[0] == pytest.approx(math.log(96), abs=1e-5)


GRADIENT_OF_PRODUCTS = """
import torch, train_gpt as tg
tg.keep_compiled()
q, k = torch.ones(2, 3, 4, requires_grad=True), torch.ones(2, 5, 4)
torch.compile(lambda q, k: tg.DotProducts.apply(q, k).exp())(q, k).sum().backward()
print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_a_graph_with_a_function_of_ours_is_compiled_once(tmp_path):
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env.pop("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", None)  # keep_compiled() sets it
    start = [sys.executable, "-c", GRADIENT_OF_PRODUCTS]
    how = {"cwd": ROOT, "env": env, "text": True}
    found = [int(subprocess.check_output(start, **how)) for _ in range(2)]
    assert found == [0, 1]


def test_compiled_graphs_stay_beside_the_trainer_unless_a_folder_is_named(monkeypatch, tmp_path):
    name, usual = "TORCHINDUCTOR_CACHE_DIR", default_cache_dir()

    def kept(before: str | None) -> str:
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        tg.keep_compiled()
        return os.environ.get(name, "")

    ours = kept(None)
    assert Path(ours).parent == ROOT / ".compiled" and kept(usual) == ours
    assert kept(str(tmp_path)) == str(tmp_path)
    monkeypatch.setattr(tg.Path, "read_text", lambda path, how: "flags : another CPU")
    assert Path(kept(usual)).parent == ROOT / ".compiled" and kept(usual) != ours
    monkeypatch.setattr(tg.os, "access", lambda folder, how: False)  # installed by someone else
    assert kept(usual) == usual


def test_who_waits_for_a_compiler_without_a_terminal_is_told(capsys):
    with tg.told_while(tg.tqdm([], disable=True), "compile", 3, every=0.01):
        time.sleep(0.2)
    said = capsys.readouterr().out.splitlines()
    assert len(said) > 2 and set(said) == {"compile: 3 graphs, 0 s"}
    time.sleep(0.05)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "rope", [[], ["--rope", "standard", "--rope_dims", "16", "--kv_heads", "1"]]
)
def test_compiled_evaluation_gives_the_losses_of_eager(rope):
    """
    Inductor's vectorised bf16 kernels once made NaN of rows over 256 tokens, under no_grad alone.
    """
    flags = [
        "--config",
        "tiny_cpu",
        "--run",
        "x",
        "--depth",
        "1",
        "--dim",
        "128",
        "--heads",
        "2",
        "--head_init",
        "0.05",
    ]
    cfg = tg.parse_args([*flags, *rope])
    model = tg.build_model(cfg, torch.device("cpu"), torch.bfloat16, 512)
    with torch.no_grad():
        model.blocks[0].attn.proj.normal_(std=0.05)
        model.blocks[0].mlp.proj.normal_(std=0.05)
    x, y = torch.randint(1024, (2, 2, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eager = model(x, y, 1, 0)
        compiled = tg.compile_model(model, cfg)(x, y, 1, 0)
    assert torch.isfinite(compiled).all()
    torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.05)


# --- watching products


class Linears(TorchFunctionMode):
    """What F.linear itself is given, its matrix named by where its numbers lie."""

    def __init__(self, model: tg.GPT):
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
        self.seen: list[tuple] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if func is F.linear:
            x, w, *_ = args
            name = self.names.get(w.untyped_storage().data_ptr())
            self.seen.append((name, tuple(x.shape), tuple(y.shape)))
        return y


WATCHED = [
    {"attn_gate": 12, "softcap": 15.0},
    {
        "activation": "swiglu",
        "loop": "0:2",
        "repeats": "2",
        "kv_heads": 1,
        "tie_embed": 1,
        "value_embeds": 1,
    },
    {"depth": 4, "mtp": 0.3, "value_proj": 20, "unet": 2, "attn_gate": 12, "loss_chunk": 20},
    {"iha": 1, "value_proj": 20, "z_loss": 0.1},
]


@pytest.mark.parametrize("changes", WATCHED, ids=str)
def test_watching_sees_every_product_with_a_matrix_by_name_and_leaves_nothing(changes):
    """Names and shapes are those of every call of F.linear; a mixture of matrices has no name."""
    cfg = tiny(dim=64, head_init="0.1", proj_init=1.0, **changes)
    (x, y), model = random_tokens(cfg, 2, 16), awake(build(cfg))
    named, seen = dict(model.named_parameters()), []

    def watch(name: str, given: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        w = named[name].flatten(0, -2)
        torch.testing.assert_close(product, torch.einsum("...c,rc->...r", given, w))
        seen.append((name, tuple(given.shape), tuple(product.shape)))
        return product

    flags = (x, y, int(cfg.repeats), 0, 1, 0, True, bool(cfg.mtp))
    plain = model(*flags)
    with Linears(model) as linears, tg.watching(model, watch):
        watched = model(*flags)
    mixed = [call for call in linears.seen if call[0] is None]
    assert len(mixed) == (cfg.depth if cfg.iha else 0)
    assert seen == [call for call in linears.seen if call[0]]
    assert torch.equal(watched, plain)
    names = {name for name, _, _ in seen}
    others = {"embed", "value_embeds"} | {n for n in named if cfg.iha and n.endswith("qkv")}
    assert names >= set(tg.quantised_names(model)) - others != set()
    # behind it, and behind what breaks within, nobody watches
    with pytest.raises(tg.Interrupted), tg.watching(model, watch):
        raise tg.Interrupted
    assert torch.equal(model(*flags), plain) and len(seen) == len(linears.seen) - len(mixed)


def test_what_a_watcher_gives_is_used_as_the_product():
    """Doubling a product is doubling its matrix, for each of them; one watcher at a time."""
    cfg = tiny(depth=1, head_init="0.1", proj_init=1.0)
    (x, y), model = random_tokens(cfg, 2, 16), awake(build(cfg))
    plain = model(x, y)
    for name, p in model.named_parameters():
        if p.ndim < 2 or name == "embed":
            continue
        double = lambda of, _, product, name=name: 2 * product if of == name else product
        with tg.watching(model, double):
            watched = model(x, y)
        with torch.no_grad():
            p *= 2
            expected = model(x, y)
            p /= 2
        assert torch.allclose(watched, expected, atol=1e-5), name
        assert not torch.allclose(watched, plain, atol=1e-5), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": "8", "doc_mask": 1, "softcap": 15.0},
        {"window": "8", "window_long": "8 0.5:16", "window_pattern": "SL", "yarn": 1},
        {"loop": "0:1", "repeats": "2", "value_embeds": 2, "mtp": 0.3},
    ],
    ids=str,
)
def test_the_model_is_one_graph(changes):
    """Where torch.compile() cannot follow, it makes two of one: slower, with other last bits."""
    cfg = tiny(depth=2, **changes)
    model, (x, y) = build(cfg), random_tokens(cfg, 2, 32)
    now = tg.Plan(cfg).at(0, 0.0)
    how = now.repeats, now.window, now.passes, now.window_long
    torch.compiler.reset()
    whole = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(whole(x, y, *how), model(x, y, *how))
