"""
Optimizer: Muon and AdamW against torch.optim, the SVD and second formulas; the same numbers on any
ranks.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import Server, free_port
from helpers import ROOT, alone, build, now, parts, randn, random_tokens, tg, tiny
from torch.utils._python_dispatch import TorchDispatchMode


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32)


def exact_polar(g: torch.Tensor) -> torch.Tensor:
    """U V^T by SVD in float64."""
    u, _, vt = torch.linalg.svd(g.double(), full_matrices=False)
    return (u @ vt).float()


def set_gradients(model, seed: int = 0, scale: float = 1.0) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad.copy_(scale * randn(*p.shape, seed=seed * 1000 + i))


# --- AdamW


@pytest.mark.parametrize("wd", [0.0, 0.1, 3.0])
def test_adamw_is_that_of_torch(wd):
    cfg = tiny(beta1=0.8, beta2=0.95, adam_eps=1e-10)
    w, other = randn(1000), torch.nn.Parameter(randn(1000))
    m, v = torch.zeros(1000), torch.zeros(1000)
    judge = torch.optim.AdamW([other], lr=1.0, betas=(0.8, 0.95), eps=1e-10, weight_decay=wd)
    for t in range(1, 31):
        g = randn(1000, seed=t) * 10.0 ** (t % 5 - 3)
        lr = 0.02 * (1 - t / 40)
        judge.param_groups[0]["lr"], other.grad = lr, g
        judge.step()
        tg.adamw_update(
            w,
            g,
            m,
            v,
            scalar(lr),
            scalar(lr * wd),
            scalar(1 - 0.8**t),
            scalar(1 - 0.95**t),
            cfg,
            cfg,
        )
        assert torch.allclose(w, other, rtol=1e-5, atol=1e-6), t
    assert torch.allclose(m, judge.state[other]["exp_avg"], atol=1e-6)
    assert torch.allclose(v, judge.state[other]["exp_avg_sq"], rtol=1e-5)
    assert (w - randn(1000)).abs().mean() > 0.05


def test_epsilon_of_adamw_stands_where_it_does_in_torch():
    """With a large epsilon its place shows: behind the corrected root, as in torch."""
    cfg = tiny(adam_eps=0.5)
    w, other = randn(50), torch.nn.Parameter(randn(50))
    m, v = torch.zeros(50), torch.zeros(50)
    judge = torch.optim.AdamW(
        [other], lr=0.1, betas=(cfg.beta1, cfg.beta2), eps=0.5, weight_decay=0.0
    )
    for t in range(1, 4):
        other.grad = randn(50, seed=t)
        judge.step()
        tg.adamw_update(
            w,
            other.grad,
            m,
            v,
            scalar(0.1),
            scalar(0.0),
            scalar(1 - cfg.beta1**t),
            scalar(1 - cfg.beta2**t),
            cfg,
            cfg,
        )
    assert torch.allclose(w, other, atol=1e-6)


def test_decay_is_not_lost_in_bf16_weights():
    """
    Remix A holds weights in bf16, where a decay of 2e-4 a step rounds to nothing if it is applied
    by itself (spec 1.2). torch's fused AdamW rounds once; so must this, eager or compiled. Measured
    along the initial weights.
    """
    cfg, start, wd = tiny(beta1=0.9), 0.1 * randn(50000), 0.5
    ours, plain = start.bfloat16(), start.bfloat16()
    judged = torch.nn.Parameter(start.bfloat16())
    state = [torch.zeros_like(ours) for _ in range(4)]
    judge = torch.optim.AdamW(
        [judged], lr=0.0021, betas=(0.9, 0.95), eps=1e-10, weight_decay=wd, fused=True
    )
    for t in range(1, 41):
        g = randn(50000, seed=t).bfloat16()
        judged.grad = g.clone()
        judge.step()
        correct = scalar(1 - 0.9**t), scalar(1 - 0.95**t)
        tg.adamw_update(
            ours, g, *state[:2], scalar(0.0021), scalar(0.0021 * wd), *correct, cfg, cfg
        )
        tg.adamw_update(plain, g, *state[2:], scalar(0.0021), scalar(0.0), *correct, cfg, cfg)
    along = lambda w: ((w.detach().float() * start).sum() / start.square().sum()).item()
    assert along(plain) - along(ours) == pytest.approx(1 - (1 - 0.0021 * wd) ** 40, rel=0.1)
    assert along(ours) == pytest.approx(along(judged), abs=2e-3)


# --- Muon


SHAPES = [(1, 24, 24), (3, 16, 16), (2, 64, 16), (2, 16, 64)]


def with_torch_muon(
    stack: torch.Tensor,
    gradients: list[torch.Tensor],
    lrs: list[float],
    momenta: list[float],
    wd: float,
):
    """torch.optim.Muon on every matrix of the stack by itself."""
    ws = [torch.nn.Parameter(w.clone()) for w in stack]
    judge = torch.optim.Muon(
        ws,
        lr=1.0,
        weight_decay=wd,
        momentum=0.0,
        nesterov=True,
        ns_steps=5,
        adjust_lr_fn="original",
    )
    for g, lr, momentum in zip(gradients, lrs, momenta):
        judge.param_groups[0].update(lr=lr, momentum=momentum)
        for w, one in zip(ws, g):
            w.grad = one.clone()
        judge.step()
    return torch.stack([w.detach() for w in ws])


def with_ours(stack, gradients, lrs, momenta, wd, cfg, dtype):
    w, state = stack.clone(), {"momentum": torch.zeros_like(stack)}
    if cfg.normuon:
        state["second"] = torch.zeros(
            w.size(0), *((1, w.size(2)) if w.size(1) < w.size(2) else (w.size(1), 1))
        )
    rule = tg.Rule("muon", "matrix", tuple(w.shape[1:]), 0.0, 0.0, 0.0, 0.0, False)
    for g, lr, momentum in zip(gradients, lrs, momenta):
        rates = {"lr": scalar(lr), "momentum": scalar(momentum), "decay": scalar(lr * wd)}
        tg.muon_update(w, g.clone(), state, rates, rule, cfg, dtype)
    return w


@pytest.mark.parametrize("wd", [0.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_is_that_of_torch(monkeypatch, shape, wd):
    """
    Both in full precision (torch's cast to bf16 is taken out to compare the algebra), then both in
    bf16.
    """
    gradients = [10 * randn(*shape, seed=s) for s in range(5)]
    lrs, momenta = [0.05, 0.04, 0.03, 0.02, 0.01], [0.85, 0.87, 0.9, 0.93, 0.95]
    args = randn(*shape, seed=9), gradients, lrs, momenta, wd
    ours = with_ours(*args, tiny(), torch.bfloat16)
    judged = with_torch_muon(*args)
    moved = (judged - args[0]).norm()
    assert (ours - judged).norm() < 0.04 * moved
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    judged = with_torch_muon(*args)
    assert torch.allclose(with_ours(*args, tiny(), torch.float32), judged, atol=2e-5)


def spectrum(rows: int, cols: int, low: float, seed: int) -> torch.Tensor:
    """A matrix with singular values from 1 down to `low` and random bases."""
    n = min(rows, cols)
    u, v = (torch.linalg.qr(randn(k, n, seed=seed + i))[0] for i, k in enumerate((rows, cols)))
    return u @ torch.diag(torch.linspace(1, low, n)) @ v.T


@pytest.mark.parametrize("method, low, high", [("ns5", 0.68, 1.16), ("polar_express", 0.85, 1.15)])
@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)], ids=str)
def test_polar_factor_keeps_its_band_and_the_bases(method, low, high, shape):
    """
    U and V are those of the SVD, and singular values lie in the spec's band: each is the scalar
    polynomials' value, with Muon's constants or those of Polar Express as printed to four digits.
    """
    printed = {
        "ns5": [(3.4445, -4.7750, 2.0315)] * 5,
        "polar_express": [
            (8.1566, -22.4833, 15.8788),
            (4.0429, -2.8089, 0.5000),
            (3.8917, -2.7725, 0.5061),
            (3.2858, -2.3681, 0.4645),
            (2.3465, -1.7098, 0.4232),
        ],
    }[method]
    stack = torch.stack([spectrum(*shape, 0.2, seed) for seed in (0, 50)])
    for g, x in zip(stack, tg.polar_factor(stack, method, 5, torch.float32)):
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        core = u.T @ x @ vt.T
        assert low < core.diagonal().min() and core.diagonal().max() < high
        assert (core - core.diagonal().diag()).abs().max() < 1e-3
        assert (x - exact_polar(g)).norm() < 0.3 * x.norm()
        s = s / s.norm() / (1.02 if method == "polar_express" else 1)
        for a, b, c in printed:
            s = a * s + b * s**3 + c * s**5
        assert torch.allclose(core.diagonal(), s, atol=3e-3)


def test_polar_express_is_better_than_newton_schulz():
    g = randn(1, 96, 96)
    error = {
        m: (tg.polar_factor(g, m, 5, torch.float32)[0] - exact_polar(g[0])).norm()
        for m in ("ns5", "polar_express")
    }
    assert error["polar_express"] < 0.7 * error["ns5"]


def test_more_polar_steps_than_coefficients_converge():
    x = tg.polar_factor(spectrum(32, 32, 0.05, 3)[None], "polar_express", 9, torch.float32)[0]
    assert (torch.linalg.svdvals(x) - 1).abs().max() < 0.15
    few, more = (tg.polar_factor(randn(1, 16, 16), "ns5", n, torch.float32) for n in (3, 4))
    assert not torch.equal(few, more)


@pytest.mark.parametrize("factors", [tg.NS5 * 5, tg.POLAR_EXPRESS], ids=["ns5", "polar_express"])
def test_iterations_on_the_gram_matrix_are_the_iterations(factors):
    x = randn(3, 16, 64).double()
    x /= 2 * torch.linalg.matrix_norm(x, 2)[:, None, None]
    expected = x
    for a, b, c in factors:
        square = expected @ expected.mT
        expected = a * expected + b * square @ expected + c * square @ square @ expected
    for at_once in (2, 3, 5, 100):
        by_gram = tg.iterate_on_gram(x, list(factors), at_once)
        assert torch.allclose(by_gram, expected, rtol=0, atol=1e-10)


def test_only_long_matrices_are_iterated_on_their_gram_matrix():
    for shape in ((2, 16, 32), (2, 32, 16), (2, 16, 24), (2, 16, 16)):
        g = randn(*shape)
        plain, by_gram = (tg.polar_factor(g, "ns5", 5, torch.float32, gram=n) for n in (1, 3))
        assert torch.allclose(plain, by_gram, atol=1e-4)
        assert torch.equal(plain, by_gram) == (32 not in shape)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_gram_iterations_in_bfloat16_err_as_the_others_do(decay):
    """
    Singular values that fall as i^-decay. Made with x every second or third time, Newton-Schulz
    stays as near to the exact iterations; never made, the small ones that rounding has drowned
    explode, which is why the flag counts iterations.
    """
    u, v = torch.linalg.qr(randn(64, 64)).Q, torch.linalg.qr(randn(256, 64)).Q
    g = (u * torch.arange(1, 65).float() ** -decay @ v.T)[None]
    exact = tg.polar_factor(g, "ns5", 5, torch.float32)
    error = {
        gram: (tg.polar_factor(g, "ns5", 5, torch.bfloat16, gram=gram) - exact).norm().item()
        for gram in (1, 2, 3, 5)
    }
    assert max(error[2], error[3]) < max(2 * error[1], 0.05 * exact.norm())
    assert error[5] > 10 * error[3] or decay < 1


def test_stacked_matrices_do_not_influence_each_other():
    stack = randn(5, 20, 30) * torch.logspace(-4, 4, 5)[:, None, None]
    for method in ("ns5", "polar_express"):
        together = tg.polar_factor(stack, method, 5, torch.float32)
        for i in range(5):
            assert torch.allclose(
                together[i],
                tg.polar_factor(stack[i : i + 1], method, 5, torch.float32)[0],
                atol=1e-5,
            )


def test_empty_gradient_changes_no_weight():
    """Padding to the ranks is zero, and a frozen matrix may be."""
    for cfg in (tiny(), tiny(polar="polar_express", normuon=0.9, row_norm=1, cautious=1)):
        w = with_ours(
            torch.ones(2, 8, 8), [torch.zeros(2, 8, 8)], [0.1], [0.9], 0.0, cfg, torch.float32
        )
        assert torch.equal(w, torch.ones(2, 8, 8))
    # a head that starts at zero leaves every matrix without a gradient in the first step
    hyperball = tiny(hyperball=1, proj_init=1.0)
    w = with_ours(
        randn(2, 8, 8), [torch.zeros(2, 8, 8)], [0.3], [0.9], 0.0, hyperball, torch.float32
    )
    torch.testing.assert_close(w, randn(2, 8, 8), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"polar": "polar_express"}, {"normuon": 0.9}, {"row_norm": 1}], ids=str
)
def test_muon_is_independent_of_the_scale_of_the_gradient(changes):
    cfg = tiny(**changes)
    gradients = [randn(2, 16, 48, seed=s) for s in range(3)]
    run = lambda scale: with_ours(
        torch.zeros(2, 16, 48),
        [scale * g for g in gradients],
        [0.1] * 3,
        [0.9] * 3,
        0.0,
        cfg,
        torch.float32,
    )
    assert torch.allclose(run(1.0), run(1000.0), atol=1e-5) and torch.allclose(
        run(1.0), run(0.1), atol=1e-4
    )


def test_qkv_is_orthogonalised_matrix_by_matrix_with_the_factor_of_its_shape():
    """
    Spec 1.8: q, k and v each by itself; factor 2 on the 4 times taller fc, 1 on the rest. Momentum
    0: one step.
    """
    cfg = tiny(dim=32, matrix_lr=0.05)
    model = build(cfg)
    opt = tg.MuonAdamW(cfg, model, alone())
    set_gradients(model, 3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    opt.step(now(momentum=0.0, lr=0.5))
    factors = {"attn.qkv": 1, "attn.proj": 1, "mlp.fc": 2, "mlp.proj": 1}
    for name, p in model.named_parameters():
        if not name.startswith("blocks."):
            continue
        factor = factors[name.split(".", 2)[2]]
        moved = ((before[name] - p) / (0.05 * 0.5)).view(-1, *p.shape[-2:])
        for one, g in zip(moved, gradients[name].view(-1, *p.shape[-2:])):
            assert torch.allclose(
                one, factor * tg.polar_factor(g[None], "ns5", 5, torch.float32)[0], atol=1e-4
            ), name
            exact = factor * exact_polar(g)
            assert (one * exact).sum() / (one.norm() * exact.norm()) > 0.97


# --- variants of Muon, each against a second formula in numpy


def one_step(cfg, w, g, lr=0.1, wd=0.0, steps=1):
    return with_ours(
        w[None], [g[None]] * steps, [lr] * steps, [0.0] * steps, wd, cfg, torch.float32
    )[0]


@pytest.mark.parametrize("buffer", ["lerp", "sum"])
def test_buffer_of_muon_is_a_mean_or_a_sum_as_asked(buffer):
    """
    Parameter-golf's b <- m*b + g, u = g + m*b, and slowrun's means: they part while momentum rises,
    and only then.
    """
    gradients, momenta = [randn(24, 16, seed=s) for s in range(6)], [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    expected = {}
    for kind in ("lerp", "sum"):
        b, w = np.zeros((24, 16)), torch.zeros(24, 16)
        for g, m in zip(gradients, momenta):
            new = g.double().numpy()
            b = m * b + (new if kind == "sum" else (1 - m) * new)
            u = (new if kind == "sum" else (1 - m) * new) + m * b
            w = (
                w
                - 0.1
                * 1.5**0.5
                * tg.polar_factor(torch.from_numpy(u).float()[None], "ns5", 5, torch.float32)[0]
            )
        expected[kind] = w

    def stepped(kind: str, momenta: list[float]) -> torch.Tensor:
        stacks = [g[None] for g in gradients]
        start, cfg = torch.zeros(1, 24, 16), tiny(muon_buffer=kind)
        return with_ours(start, stacks, [0.1] * 6, momenta, 0.0, cfg, torch.float32)[0]

    assert torch.allclose(stepped(buffer, momenta), expected[buffer], atol=1e-4)
    assert (expected["sum"] - expected["lerp"]).norm() > 0.01 * expected[buffer].norm()
    assert torch.allclose(stepped("lerp", [0.9] * 6), stepped("sum", [0.9] * 6), atol=1e-4)


def test_row_norm_is_muoneq():
    """Rows of the update are divided by their length before the polar factor."""
    g = randn(24, 24) * torch.logspace(-2, 2, 24)[:, None]
    rows = g.numpy() / np.sqrt((g.numpy() ** 2).sum(1, keepdims=True))
    expected = -0.1 * tg.polar_factor(torch.from_numpy(rows)[None], "ns5", 5, torch.float32)[0]
    assert torch.allclose(one_step(tiny(row_norm=1), torch.zeros(24, 24), g), expected, atol=1e-5)
    assert not torch.allclose(one_step(tiny(), torch.zeros(24, 24), g), expected, atol=1e-2)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)], ids=str)
def test_normuon_keeps_the_size_and_takes_the_right_side(shape):
    """
    One second moment per row where there are at least as many rows as columns, else one per column.
    """
    beta, g = 0.9, randn(*shape)
    axis = 1 if shape[0] >= shape[1] else 0
    o = tg.polar_factor(g[None], "ns5", 5, torch.float32)[0].numpy().astype(np.float64)
    v, total = 0.0, 0.0
    for _ in range(3):
        v = beta * v + (1 - beta) * (o**2).mean(axis=axis, keepdims=True)
        u = o / np.sqrt(np.maximum(v, 1e-10))
        u *= np.linalg.norm(o) / np.linalg.norm(u)
        assert np.linalg.norm(u) == pytest.approx(np.linalg.norm(o))
        total = total - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * u
    got = one_step(tiny(normuon=beta), torch.zeros(shape), g, steps=3).numpy()
    assert np.allclose(got, total, atol=1e-5)
    assert np.linalg.norm(got) == pytest.approx(
        np.linalg.norm(one_step(tiny(), torch.zeros(shape), g, steps=3)), rel=1e-4
    )


@pytest.mark.parametrize("compiled", [0, 2])
def test_normuon_keeps_its_second_moment_in_fp32_beside_bf16_weights(compiled):
    """
    Against the formula from the polar factors of the very gradients; at .95 a moment in bf16 would
    be off by percents. The state that is saved is fp32 too, and loaded it goes on with the same
    bits.
    """
    cfg = tiny(normuon=0.95, param_dtype="bfloat16", compile=compiled, mlp_ratio=1.0)
    model, rank = build(cfg), alone()
    opt = tg.MuonAdamW(cfg, model, rank)
    expected = np.zeros((32, 1))
    for step in range(6):
        set_gradients(model, step)
        o = tg.polar_factor(model.blocks[1].mlp.fc.grad[None], "ns5", 5, torch.float32)[0]
        expected = 0.95 * expected + 0.05 * (o.double().numpy() ** 2).mean(1, keepdims=True)
        opt.step(now(momentum=0.0))
    saved = opt.state_dict()
    second = saved["blocks.1.mlp.fc:second"]
    assert (
        second.dtype == torch.float32 and saved["blocks.1.mlp.fc:momentum"].dtype == torch.bfloat16
    )
    assert np.allclose(second[0].numpy(), expected, rtol=2e-3)
    again = build(cfg)
    tg.load_weights(again, dict(model.named_parameters()), "here")
    other = tg.MuonAdamW(cfg, again, rank)
    other.load_state_dict(saved)
    for m, o in ((model, opt), (again, other)):
        set_gradients(m, 9)
        o.step(now())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_cautious_decay_never_decays_against_the_update():
    """w shrinks by lr*wd where u*w >= 0, as torch would decay it; elsewhere it does not shrink."""
    w, g = randn(16, 16, seed=5), randn(16, 16)
    u = one_step(tiny(), torch.zeros(16, 16), g, lr=0.1).numpy() / -0.1
    for cautious in (0, 1):
        mask = (u * w.numpy() >= 0) if cautious else np.ones((16, 16))
        expected = w.numpy() - 0.1 * 2.0 * w.numpy() * mask - 0.1 * u
        assert np.allclose(
            one_step(tiny(cautious=cautious), w, g, lr=0.1, wd=2.0), expected, atol=1e-5
        )
    assert 50 < (u * w.numpy() >= 0).sum() < 206


def test_cautious_decay_of_adamw_never_decays_against_the_update():
    w, g = randn(200, seed=5), randn(200)
    plain, cautious = w.clone(), w.clone()
    for x, flag in ((plain, 0), (cautious, 1)):
        tg.adamw_update(
            x,
            g,
            torch.zeros(200),
            torch.zeros(200),
            scalar(0.01),
            scalar(0.2),
            scalar(0.2),
            scalar(0.05),
            tiny(),
            tiny(cautious=flag),
        )
    against = g * w < 0  # the first update has the sign of the gradient
    assert torch.allclose(plain[~against], cautious[~against])
    assert (
        torch.allclose((cautious - plain)[against], 0.2 * w[against], atol=1e-6)
        and against.sum() > 50
    )


# --- buckets


LAYOUTS = [
    {},
    {"optimizer": "adamw"},
    {"adamw_matrices": r"\.attn\."},
    {"tie_embed": 1},
    {"kv_heads": 1, "heads": 2},
    {"normuon": 0.9},
    {"depth": 3, "adamw_matrices": r"blocks\.1\."},
    {"mlp_ratio": 1.0},
]


@pytest.mark.parametrize("changes", LAYOUTS, ids=str)
def test_every_parameter_is_in_one_bucket(changes):
    cfg = tiny(**changes)
    model = build(cfg)
    buckets = tg.param_buckets(cfg, model, alone())
    names = [n for b in buckets for n in b.params]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters()) and len(
        set(names)
    ) == len(names)
    assert sum(high - low for b in buckets for low, high in b.spans.values()) == sum(
        p.numel() // math.prod(b.unit) for b in buckets for p in b.params.values()
    )
    for b in buckets:
        for name in b.params:
            wants_adamw = (
                not name.startswith("blocks.")
                or cfg.optimizer == "adamw"
                or bool(cfg.adamw_matrices and tg.re.search(cfg.adamw_matrices, name))
            )
            assert b.rule.kind == ("adamw" if wants_adamw else "muon"), name


def test_a_parameter_that_is_not_declared_is_refused():
    """A new matrix must not become AdamW's at scalar_lr because nobody said what it is."""
    cfg = tiny()
    model = build(cfg)
    model.blocks[1].mlp.up = torch.nn.Parameter(torch.empty(64, 32))
    for act in (lambda: tg.param_buckets(cfg, model, alone()), lambda: tg.declarations(model)):
        with pytest.raises(AssertionError, match=r"blocks\.1\.mlp\.up .*make it by declare"):
            act()
    with pytest.raises(AssertionError, match="up: no group is called matrices"):
        model.blocks[1].mlp.declare("up", "matrices", 0.0, 64, 32)


def test_bucket_is_no_copy_of_the_weights():
    """Updating a bucket must update the module, and a backward pass must fill the bucket."""
    cfg = tiny(depth=3)
    model = build(cfg)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = tg.MuonAdamW(cfg, model, alone())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), "putting a weight into its bucket changed it"
    for b in opt.buckets:
        b.weights.add_(1.0)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] + 1.0)
    model(*random_tokens(cfg, 2, 32)).mean().backward()
    for b in opt.buckets:
        for name, (low, high) in b.spans.items():
            assert (
                torch.equal(b.grads[low:high].view(b.params[name].shape), b.params[name].grad)
                and b.grads[low:high].any()
            )
    opt.step(now())
    assert not any(b.grads.any() for b in opt.buckets), "gradients must not pile up"
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_learning_rate_and_decay_go_to_their_kind():
    cfg = tiny(
        matrix_lr=1.0,
        embed_lr=2.0,
        head_lr=3.0,
        scalar_lr=4.0,
        tied_lr=5.0,
        adamw_lr=6.0,
        matrix_wd=0.1,
        embed_wd=0.2,
    )
    told = {
        n: (b.rule.lr, b.rule.wd)
        for b in tg.param_buckets(cfg, build(cfg), alone())
        for n in b.params
    }
    assert (
        told["head"] == (3.0, 0.2)
        and told["embed"] == (2.0, 0.2)
        and told["blocks.0.mlp.fc"] == (1.0, 0.1)
    )
    cfg = tg.dataclasses.replace(cfg, tie_embed=1, optimizer="adamw")
    told = {
        n: (b.rule.lr, b.rule.wd)
        for b in tg.param_buckets(cfg, build(cfg), alone())
        for n in b.params
    }
    assert told["head"] == (5.0, 0.2) and told["blocks.0.mlp.fc"] == (6.0, 0.1)


def test_schedule_reaches_the_update():
    """
    lr and weight_decay of the schedules multiply; the decay a step is their product with both
    bases.
    """
    cfg = tiny(optimizer="adamw", adamw_lr=0.1, matrix_wd=0.5)
    model = build(cfg)
    opt = tg.MuonAdamW(cfg, model, alone())
    fc = model.blocks[0].mlp.fc.detach().clone()
    opt.step(now(lr=0.3, weight_decay=2.0))  # zero gradients: only decay acts
    assert torch.allclose(model.blocks[0].mlp.fc, fc * (1 - 0.1 * 0.3 * 0.5 * 2.0), rtol=1e-6)


@pytest.mark.parametrize("limit, scale", [(1.0, 1.0), (1.0, 1e-4), (0.01, 10.0)])
def test_clipping_is_that_of_torch(limit, scale):
    """
    The norm is global and that before clipping; AdamW's first moment shows the gradient that was
    used.
    """
    cfg = tiny(optimizer="adamw", grad_clip=limit)
    model, judged = build(cfg), build(cfg)
    opt = tg.MuonAdamW(cfg, model, alone())
    for p in judged.parameters():
        p.grad = torch.zeros_like(p)
    set_gradients(model, 1, scale)
    set_gradients(judged, 1, scale)
    size = torch.nn.utils.clip_grad_norm_(judged.parameters(), limit)
    assert opt.step(now()).item() == pytest.approx(size.item(), rel=1e-5)
    state = opt.state_dict()
    for name, p in judged.named_parameters():
        assert torch.allclose(
            state[f"{name}:exp_avg"] / (1 - cfg.beta1), p.grad.flatten(), rtol=1e-4, atol=1e-9
        )


def test_gradient_norm_is_reported_without_clipping():
    cfg = tiny()
    model = build(cfg)
    opt = tg.MuonAdamW(cfg, model, alone())
    set_gradients(model, 2)
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert opt.step(now()).item() == pytest.approx(expected, rel=1e-5)


def gradients(folder, monkeypatch, **changes) -> dict[str, torch.Tensor]:
    """
    What the optimizer is given in one step of 8,192 tokens, of which every second is the same.
    """
    folder.mkdir()
    p = parts(folder, batch_tokens="8192", head_init="0.1", proj_init=1.0, **changes)
    rows = np.random.default_rng(0).integers(0, 96, (256, 33))
    rows[:, ::2] = 7
    monkeypatch.setattr(p.loader, "batch", lambda *args: rows.astype("<u2"))
    found = {}

    def step(now):
        found.update({n: w.grad.double().clone() for n, w in p.model.named_parameters()})
        return torch.ones(1)

    monkeypatch.setattr(p.opt, "step", step)
    for _ in range(2):  # nothing is left over from the step before
        tg.train_step(p, 0, p.plan.at(0, 0.0))
        for b in p.opt.buckets:
            b.grads.zero_()
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embed": 1, "value_embeds": 1, "mtp": 0.3, "z_loss": 0.1}], ids=str
)
def test_gradients_of_bf16_weights_do_not_depend_on_micro_batches_or_chunks_of_the_loss(
    tmp_path, monkeypatch, changes
):
    """
    One micro-batch or 256, one chunk of the loss or 128, against weights in fp32 with the same
    values: what is left is a rounding to bf16 of each term (.17 %; a tied table has two). Sums in
    bf16 are off by percents.
    """
    base = {"micro_tokens": 8192, "loss_chunk": 8192, **changes}
    with monkeypatch.context() as patch:
        drawn = tg.initial_value
        patch.setattr(tg, "initial_value", lambda *args: drawn(*args).bfloat16().float())
        exact = gradients(tmp_path / "fp32", monkeypatch, **base)
    ways = [base, base | {"micro_tokens": 32}, base | {"loss_chunk": 64}]
    for i, way in enumerate(ways):
        found = gradients(tmp_path / str(i), monkeypatch, **way, param_dtype="bfloat16")
        for name, g in exact.items():
            assert (found[name] - g).norm() <= 0.004 * g.norm(), (way, name)


def test_one_micro_batch_of_bf16_weights_keeps_no_second_gradient(tmp_path):
    totals = []
    for name, micro in (("one", 128), ("two", 64)):
        (tmp_path / name).mkdir()
        p = parts(tmp_path / name, param_dtype="bfloat16", micro_tokens=micro)
        p.run.log = lambda line: None
        tg.warm_up(p)
        tg.train_step(p, 0, p.plan.at(0, 0.0))
        totals.append([b.total is not None and b.total.dtype for b in p.opt.buckets])
    assert set(totals[0]) == {False} and set(totals[1]) == {torch.float32}
    p = parts(tmp_path / "two", micro_tokens=64)
    tg.train_step(p, 0, p.plan.at(0, 0.0))
    assert not any(b.total is not None for b in p.opt.buckets), "fp32 needs none"


# --- ranks, without processes


VARIANTS = [
    {},
    {"optimizer": "adamw"},
    {"normuon": 0.9, "depth": 3},
    {"adamw_matrices": "mlp", "kv_heads": 1},
]


def trained(cfg, steps, seed=0):
    model = build(cfg)
    opt = tg.MuonAdamW(cfg, model, alone())
    for s in range(steps):
        set_gradients(model, seed + s)
        opt.step(now())
    return model, opt


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_sharded_update_and_state_are_those_of_the_whole(changes, world):
    """
    Every rank of a pretended world loads the state that one process saved, gets its slice of the
    summed gradients and updates it: the shards together are the weights of one process, and its
    state.
    """
    cfg = tiny(**changes)
    model, opt = trained(cfg, 2)
    saved, weights = opt.state_dict(), {n: p.detach().clone() for n, p in model.named_parameters()}
    ranks = []
    for rank in range(world):
        copy = build(cfg)
        with torch.no_grad():
            for name, p in copy.named_parameters():
                p.copy_(weights[name])
        other = tg.MuonAdamW(cfg, copy, alone(rank, world))
        other.load_state_dict(saved)
        other.count += 1
        set_gradients(copy, 77)
        for b, rates in zip(other.buckets, other.rates(now())):
            assert b.weights.size(0) == b.share * world and b.shard.size(0) == b.share
            b.grad_shard.copy_(b.grads[rank * b.share : (rank + 1) * b.share])
            other.update_shard(b, now(), rates)
        ranks.append(other)
    set_gradients(model, 77)
    opt.step(now())
    for i, b in enumerate(opt.buckets):
        total = torch.cat([r.buckets[i].shard for r in ranks])
        assert torch.allclose(total[: b.weights.size(0)], b.weights, atol=1e-6)
        assert not total[b.weights.size(0) :].any(), "padding must stay zero"
    # What the ranks would save together is what one process saves.
    for i, b in enumerate(ranks[0].buckets):
        which = lambda shard, b=b: next(k for k in b.state if b.state[k] is shard)
        b.gather = lambda shard, i=i, which=which: torch.cat(
            [r.buckets[i].state[which(shard)] for r in ranks]
        )
    gathered = ranks[0].state_dict()
    expected = opt.state_dict()
    assert gathered.keys() == expected.keys() and int(gathered["step_count"]) == 3
    for key in expected:
        assert torch.allclose(gathered[key].float(), expected[key].float(), atol=1e-6), key


@pytest.mark.parametrize("limit", [0.0, 1e30])
def test_a_bucket_is_updated_while_others_are_summed(limit, monkeypatch):
    """
    Clipping alone waits for the norm, that is for all sums; where it clips nothing, the weights are
    the same.
    """
    cfg = tiny(grad_clip=limit)
    model, whole = build(cfg), trained(tiny(), 1)[1]
    opt, said = tg.MuonAdamW(cfg, model, alone(0, 2)), []
    names = {id(b): i for i, b in enumerate(opt.buckets)}

    def start_sum(b, run):
        said.append(("begin", names[id(b)]))
        return SimpleNamespace(wait=lambda: said.append(("wait", names[id(b)])))

    def start_gather(b, run):
        said.append(("gather", names[id(b)]))
        return []

    monkeypatch.setattr(tg.Bucket, "start_sum", start_sum)
    monkeypatch.setattr(tg.Bucket, "start_gather", start_gather)
    set_gradients(model)
    opt.step(now())
    each = range(len(opt.buckets))
    assert len(each) > 3 and said[: len(each)] == [("begin", i) for i in each]
    in_turns = [(what, i) for i in each for what in ("wait", "gather")]
    all_first = [("wait", i) for i in each] + [("gather", i) for i in each]
    assert said[len(each) :] == (all_first if limit else in_turns)
    for b, other in zip(opt.buckets, whole.buckets):
        count = min(b.share, len(other.weights))
        assert torch.equal(b.shard[:count], other.weights[:count])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loaded_optimizer_goes_on_with_the_same_numbers(changes):
    cfg = tiny(**changes)
    model, opt = trained(cfg, 3)
    again = build(cfg)
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters()):
            p.copy_(q)
    other = tg.MuonAdamW(cfg, again, alone())
    other.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (again, other)):
        set_gradients(m, 50)
        o.step(now(momentum=0.9))
    assert opt.count == other.count == 4
    for p, q in zip(again.parameters(), model.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_frozen_head_keeps_every_bit_whatever_moves_heads(tmp_path, optimizer):
    """Centring, its loss, decay and averages; then it is let go, and centred."""
    p = parts(
        tmp_path,
        slow="head",
        slow_lr="0 2s:0 4s>1",
        mu_centering=1,
        mu_loss=1.0,
        embed_wd=0.1,
        independent_wd=1,
        ema=0.5,
        swa_every=1,
        swa_start=0.0,
        head_init="0.1",
        optimizer=optimizer,
    )
    head, start = p.model.head, p.model.head.detach().clone()
    moved = []
    for step in range(4):
        tg.train_step(p, step, p.plan.at(step, step / 20))
        p.avg.update(step + 1, 0.5)
        averages = [p.avg.state_dict()[f"head:{kind}"].view_as(start) for kind in ("ema", "swa")]
        moved.append([not torch.equal(w, start) for w in (head.detach(), *averages)])
    assert moved == [[False] * 3] * 3 + [[True] * 3]  # the ramp begins at 0
    assert head.mean(0).norm() < 1e-6 < start.mean(0).norm()


def test_saved_state_stays_when_steps_follow():
    """state_dict must be a copy: averages and a checkpoint on its way to the disk depend on it."""
    model, opt = trained(tiny(), 1)
    saved = opt.state_dict()
    kept = {k: v.clone() for k, v in saved.items()}
    set_gradients(model, 5)
    opt.step(now())
    assert all(torch.equal(saved[k], kept[k]) for k in kept)
    assert not torch.equal(opt.state_dict()["embed:exp_avg"], kept["embed:exp_avg"])


def test_warm_up_leaves_no_trace():
    """
    snapshot and restore put back weights, gradients, both kinds of state and the step count, bit by
    bit.
    """
    model, opt = trained(tiny(normuon=0.9), 2)
    set_gradients(model, 9)
    before = [t.clone() for t in opt.changing()]
    kept = opt.snapshot()
    opt.step(now())
    assert not all(torch.equal(a, b) for a, b in zip(before, opt.changing()))
    opt.restore(kept)
    assert opt.count == 2 and all(torch.equal(a, b) for a, b in zip(before, opt.changing()))


def test_what_the_warm_up_keeps_lies_on_the_host(tmp_path):
    """A second copy of weights, gradients and states would not fit where the first just does."""
    p = parts(tmp_path, device="meta")
    opt = p.opt
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda t, *how, **more: kept.append((how, more)))
        opt.snapshot()
    assert kept == [(("cpu",), {"copy": True})] * len(opt.changing())


def test_compiled_update_gives_the_same_weights():
    """Schedules are tensors: new values of lr, momentum and decay use the same graphs."""
    # two graphs: one stack, one table
    cfg = tiny(normuon=0.9, cautious=1, matrix_wd=0.1, mlp_ratio=1.0, tie_embed=1)
    eager = trained(cfg, 0)
    compiled = trained(tg.dataclasses.replace(cfg, compile=2), 0)
    counts = []
    for s in range(3):
        for model, opt in (eager, compiled):
            set_gradients(model, s)
            opt.step(now(lr=1.0 - 0.2 * s, momentum=0.85 + 0.02 * s, weight_decay=1.0 + s))
        counts.append(tg.graphs_compiled())
    assert counts[0] == counts[1] == counts[2]
    for p, q in zip(eager[0].parameters(), compiled[0].parameters()):
        assert torch.allclose(p, q, atol=1e-5)


# --- what a step asks of the device


class Traffic(TorchDispatchMode):
    """
    Notes what crosses between host and device (here the meta device), and what makes the host wait.
    """

    def __init__(self):
        super().__init__()
        self.copies, self.waits = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, out) if isinstance(t, torch.Tensor) and t.ndim}
        if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.waits.append(str(op))
        elif len(devices) > 1:
            self.copies.append(
                (str(op), tuple(out.shape), (kwargs or {}).get("non_blocking", False))
            )
        return out

    def tensor(self, data, *, device=None, made=torch.tensor, **kwargs) -> torch.Tensor:
        """torch.tensor, which a dispatch mode does not see."""
        if device is not None and torch.device(device).type != "cpu":
            self.waits.append(f"torch.tensor({data})")
        return made(data, device=device, **kwargs)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "optimizer": "muon",
            "grad_clip": 1.0,
            "normuon": 0.9,
            "mu_loss": 0.1,
            "mu_centering": 1,
            "slow": "head",
        },
        {
            "optimizer": "adamw",
            "ema": 0.9,
            "swa_every": 1,
            "swa_start": 0.0,
            "doc_mask": 1,
            "window": "8",
        },
        {
            "z_loss": 0.1,
            "mtp": 0.3,
            "stoch_depth": 0.5,
            "attn_dropout": 0.1,
            "mlp_dropout": 0.1,
            "unet": 2,
            "loop": "1:2",
            "repeats": "2",
            "own_lr": "skips=0.1/0.5",
            "layer_scale": 1,
            "iha": 1,
            "value_embeds": 1,
        },
        {
            "bigram_rows": 64,
            "bigram_signs": 8,
            "bigram_rule": "rows",
            "tie_embed": 1,
            "untie_at": "1s",
            "adam_every": 2,
            "qk_groups": 1,
        },
    ],
    ids=str,
)
def test_a_step_copies_rows_and_one_table_of_rates_to_the_device_and_waits_for_nothing(
    tmp_path, monkeypatch, changes
):
    """
    On the meta device, which has no numbers: what is read there raises, and what crosses is seen.
    """
    p = parts(tmp_path, device="meta", micro_tokens=64, **changes)
    traffic = Traffic()
    monkeypatch.setattr(torch, "tensor", traffic.tensor)
    with traffic:
        for step in range(2):
            total, size = tg.train_step(p, step, p.plan.at(step, 0.0))
            p.avg.update(step + 1, 0.5)
    assert total.device.type == size.device.type == "meta"
    assert not traffic.waits
    rows, rates = (
        ("aten._to_copy.default", (2, 33), True),
        ("aten._to_copy.default", (len(p.opt.buckets), 5, 4), True),
    )
    assert traffic.copies == [rows, rows, rates] * 2


@pytest.mark.parametrize("noise", [0, 1])
def test_rounded_weights_in_training_make_no_step_wait(tmp_path, monkeypatch, noise):
    p = parts(
        tmp_path,
        device="meta",
        dim=64,
        export="int6",
        qat="1",
        qat_noise=noise,
        param_dtype="bfloat16",
    )
    traffic, made = Traffic(), torch.Tensor.new_tensor
    monkeypatch.setattr(torch, "tensor", traffic.tensor)
    monkeypatch.setattr(
        torch.Tensor, "new_tensor", lambda t, data: traffic.waits.append(data) or made(t, data)
    )
    with traffic:
        tg.train_step(p, 0, p.plan.at(0, 0.0))
    assert not traffic.waits and all(non_blocking for _, _, non_blocking in traffic.copies)
    said = tg.declarations(p.model).values()
    matrices = sum(each.group == "matrix" or each.group in ("embed", "head") for each in said)
    assert len(traffic.copies) == 2 + noise * matrices


def test_classes_and_prefixes_make_no_step_wait(tmp_path, monkeypatch):
    """On the meta device, which has no numbers: two rows' classes cross beside the rows."""
    flags = {"micro_tokens": 64, "sampled_classes": "40", "mtp_next": "0.5"}
    p = parts(tmp_path, device="meta", **flags)
    p.cfg.prefix_loss = "0.25"
    p.plan = tg.Plan(p.cfg)
    p.model.prefixes = torch.zeros(96, dtype=torch.int64, device="meta")
    traffic = Traffic()
    monkeypatch.setattr(torch, "tensor", traffic.tensor)
    with traffic:
        tg.train_step(p, 0, p.plan.at(0, 0.0))
    assert not traffic.waits
    assert [shape for _, shape, quick in traffic.copies if quick] == [
        *[(2, 33), (2, 40)] * 2,
        (len(p.opt.buckets), 5, 4),
    ]
    assert len(traffic.copies) == 5


# --- every flag, weights in fp32 and bfloat16, on one rank and two

DECAYS = {"matrix_wd": 0.5, "embed_wd": 0.3, "scalar_wd": 0.2}
FLAGS = {
    "muon": {},
    "adamw": {"optimizer": "adamw", "adamw_lr": 0.01},
    "adamw_matrices": {"adamw_matrices": "attn"},
    "rates": {"matrix_lr": 0.02, "embed_lr": 0.1, "head_lr": 0.1, "scalar_lr": 0.1,
              "lr": "0:1 1>0"},
    "own_lr": {"own_lr": "embed=0.1/0.5 q_gain=0.01"},
    "slow": {"slow": "mlp", "slow_lr": "0.5"},
    "frozen": {"slow": "head|attn", "slow_lr": "0", "mu_centering": 1, **DECAYS},
    "betas": {"beta1": 0.5, "beta2": 0.9, "adam_eps": 1e-3},
    "momentum": {"momentum": "0:0.5 4s>0.9"},
    "muon_buffer": {"muon_buffer": "sum", "momentum": "0:0.5 4s>0.9"},
    "polar": {"polar": "polar_express", "polar_steps": 6},
    "polar_gram": {"polar_gram": 3},
    "row_norm": {"row_norm": 1},
    "normuon": {"normuon": 0.9},
    "decays": DECAYS | {"weight_decay": "0:1 1>0"},
    "independent_wd": {k: v / 10 for k, v in DECAYS.items()} | {"independent_wd": 1},
    "decay_by_shape": {"decay_by_shape": 1, "matrix_wd": 0.5},
    "cautious 1": {"cautious": 1} | DECAYS,
    "cautious 2": {"cautious": 2} | DECAYS,
    "grad_clip": {"grad_clip": 1.0, "optimizer": "adamw", "adam_eps": 1e-2},
    "tied": {"tie_embed": 1, "tied_lr": 0.01},
    "mu": {"mu_loss": 100.0, "mu_centering": 1},
    "averages": {"ema": 0.5, "swa_every": 2, "swa_start": 0.1},
    "lr_matrices": {"lr_matrices": "0:0.5 1>0^1.2"},
    "uncorrected": {"uncorrected": "embed|head"},
    "maxwell": {"maxwell": "0.5 0.9", "maxwell_age": "0 2s:4 4s>2"},
    "ns12": {"polar": "ns12", "polar_steps": 12, "polar_norm": "schatten4",
             "soft_muon": "0 2s:0.5"},
    "aurora": {"aurora": "mlp.proj"},
    "soap": {"soap": "mlp|attn", "soap_gate": "attn.proj", "soap_floor": "0.3 2s>0.1",
             "soap_every": 2},
    "radial": {"radial_brake": 0.5, "radial_pin": 1, "row_floor": 0.3, "cautious": 2,
               "matrix_wd": 0.5},
    "update_floor": {"update_floor": 3.0},
    "hyperball": {"hyperball": 1},
    "ema_nesterov": {"ema_nesterov": "0 1s:0.5", "ema_nesterov_decay": 0.5},
    "loss_sum": {"loss_sum": 1, "adam_eps": 1e-3},
    "tail_ema": {"tail_ema": "0 2s:3", "tail_blend": "embed=0 0.5"},
    "bigram": {"bigram_rows": 64, "bigram_signs": 8},
    "bigram_rule": {"bigram_rows": 64, "bigram_rule": "rows"},
    "matrix_lr_mul": {"matrix_lr_mul": "mlp.proj=4", "matrix_wd": 0.5},
    "qk_groups": {"qk_groups": 1, "normuon": 0.9},
    "adam_every": {"adam_every": 2, "bigram_rows": 64, "bigram_rule": "rows"},
    "untie_at": {"tie_embed": 1, "tied_lr": 0.01, "untie_at": "1s"},
    "untie_at, every 2nd": {"tie_embed": 1, "tied_lr": 0.01, "untie_at": "1s", "adam_every": 2,
                            "ema_nesterov": "0 1s:0.5", "grad_clip": 9.0},
    "all": {"normuon": 0.9, "row_norm": 1, "cautious": 1, "muon_buffer": "sum",
            "polar": "polar_express", "grad_clip": 9.0, "ema": 0.9, "swa_every": 1,
            "swa_start": 0.0, "adamw_matrices": "fc"} | DECAYS,
}  # fmt: skip
CASES = [(name, kind) for name in FLAGS for kind in ("float32", "bfloat16")]


def linear_loss(p: tg.Trainer, x: torch.Tensor, y: torch.Tensor, now: tg.Now) -> torch.Tensor:
    """
    A loss whose gradient is the same on any ranks, micro-batches and weights: random numbers, new
    in each step.
    """
    terms = []
    for i, w in enumerate(p.model.parameters()):
        terms.append((w.float() * randn(*w.shape, seed=1000 * p.opt.count + i)).sum())
    return torch.stack(terms).sum().view(1) * y.numel()


def outcome(folder, changes: dict, kind: str) -> dict[str, torch.Tensor]:
    """
    Weights, averages and states after four steps of train_step, on as many ranks as there are.
    Collective.
    """
    p = parts(
        folder,
        param_dtype=kind,
        micro_tokens=64,
        q_gain=1.5,
        head_init="0.1",
        proj_init=1.0,
        **changes,
    )
    found = {f"start {name}": w.detach().clone() for name, w in p.model.named_parameters()}
    plain, tg.loss_terms = tg.loss_terms, linear_loss
    try:
        for step in range(4):
            total, size = tg.train_step(p, step, p.plan.at(step, step / 4))
            assert torch.isfinite(total).all() and torch.isfinite(size).all()
            p.run.trained = p.plan.at(step, step / 4)
            p.avg.update(step + 1, (step + 1) / 4)
            found |= {
                f"{step + 1} {name}": w.detach().clone() for name, w in p.model.named_parameters()
            }
    finally:
        tg.loss_terms = plain
    found |= {f"average {name}": t for name, t in p.avg.state_dict().items()}
    return found | {f"state {name}": t for name, t in p.opt.state_dict().items()}


def on_ranks(folder) -> None:
    """One of several processes: every case in turn; rank 0 writes what it found."""
    for i, (name, kind) in enumerate(CASES):
        found = outcome(folder, FLAGS[name], kind)
        if tg.os.environ["RANK"] == "0":
            tg.save_tensors(found, folder / f"{i}.safetensors")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    """(flag, type of the weights, ranks) -> what outcome() found."""
    folder = tmp_path_factory.mktemp("table")
    found = {(*case, 1): outcome(folder, FLAGS[case[0]], case[1]) for case in CASES}
    script = folder / "ranks.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"import test_optimizer\ntest_optimizer.on_ranks(Path({str(folder)!r}))\n"
    )
    server = Server(folder)
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    try:
        ranks = [
            server.start(file=script, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in (0, 1)
        ]
        for fork in ranks:
            ended = fork.wait()
            assert ended.code == 0, ended.text
    finally:
        server.close()
    return found | {
        (*case, 2): tg.read_tensors(folder / f"{i}.safetensors") for i, case in enumerate(CASES)
    }


def moved(found: dict, name: str) -> torch.Tensor:
    return found[f"4 {name}"].double() - found[f"start {name}"].double()


def near(found: dict, exact: dict) -> None:
    """
    Weights in bf16 move as those in fp32 do, but for a rounding of the weights, which a step rounds
    anew, and of the gradients.
    """
    for key in exact:
        if key.startswith("start "):
            name = key.removeprefix("start ")
            error = (moved(found, name) - moved(exact, name)).norm()
            assert error <= 2**-8 * 1.3 * exact[key].norm() + 0.03 * moved(exact, name).norm(), name


def means(found: dict, cfg: tg.Config) -> None:
    """EMA and plain average by their formulae, from the weights behind each step."""
    for key in [k.removeprefix("start ") for k in found if k.startswith("start ")]:
        steps = [found[f"{word} {key}"].double().flatten() for word in ("start", 1, 2, 3, 4)]
        ema = steps[0]
        for i, w in enumerate(steps[1:]):
            keep = min(cfg.ema, (i + 1) / (i + 10))
            ema = keep * ema + (1 - keep) * w
        swa = torch.stack(steps[cfg.swa_every :: cfg.swa_every]).mean(0)
        for kind, mean in (("ema", ema), ("swa", swa)):
            assert torch.allclose(
                found[f"average {key}:{kind}"].double().flatten(), mean, rtol=1e-5, atol=1e-6
            ), key


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_of_optimizer_and_averages_works_in_bf16_and_on_two_ranks(outcomes, name):
    exact = outcomes[name, "float32", 1]
    for kind, close in (("float32", 1e-4), ("bfloat16", 1e-2)):
        one, two = outcomes[name, kind, 1], outcomes[name, kind, 2]
        assert one.keys() == two.keys() == exact.keys()
        for key, t in one.items():
            assert t.dtype == two[key].dtype and torch.allclose(
                t, two[key], rtol=close, atol=1e-6
            ), (kind, key)
        if name == "soap":  # a gradient's null space has any basis: roundings choose another one
            for key in (k.removeprefix("start ") for k in one if k.startswith("start ")):
                size, whole = moved(one, key).norm(), moved(exact, key).norm()
                assert size == pytest.approx(whole.item(), rel=0.05, abs=1e-2), key
        else:
            near(one, exact)
        if name in ("averages", "all"):
            for found in (one, two):
                means(found, tiny(**FLAGS[name]))
        if name == "frozen":
            still = {
                k.removeprefix("start ")
                for k in one
                if k.startswith("start ") and not moved(one, k[6:]).any()
            }
            assert still == {
                k[6:] for k in one if k.startswith("start ") and ("head" in k or "attn" in k)
            }
    plain = outcomes["muon", "float32", 1]
    same = exact.keys() == plain.keys() and all(
        torch.allclose(t, plain[k], rtol=1e-3) for k, t in exact.items()
    )
    assert same == (name in ("muon", "polar_gram")), "a flag that changes nothing"


def test_compiled_updates_of_bf16_weights_are_those_of_fp32_ones(tmp_path):
    """All at once, in three graphs: one stack of matrices, AdamW's table and its vectors."""
    changes = FLAGS["all"] | {
        "mlp_ratio": 1.0,
        "tie_embed": 1,
        "adamw_matrices": "",
        "polar_steps": 2,
    }
    exact = outcome(tmp_path, changes, "float32")
    found = outcome(tmp_path, changes | {"compile": 2}, "bfloat16")
    near(found, exact)
    means(found, tiny(**changes))
