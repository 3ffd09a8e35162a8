"""
Track 3 of modded-nanogpt: its transformer and every trick of its optimizers, against formulae in
fp64 that are written here once more, and the golden numbers of its logs and scripts.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import alone, build, parts, randn, random_tokens, tg, tiny


def one(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float32)


def rule(**changes) -> tg.Rule:
    return tg.Rule("muon", "matrix", (), 0.0, 0.0, 0.0, 0.0, False)._replace(**changes)


def polar(x: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def s4(x: np.ndarray) -> float:
    return float((np.linalg.svd(x, compute_uv=False) ** 4).sum() ** 0.25)


def random_basis(n: int, seed: int) -> np.ndarray:
    return np.linalg.qr(randn(n, n, seed=seed).double().numpy())[0]


# --- the transformer


def plain_track3(w: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, cfg) -> torch.Tensor:
    """Its forward pass in fp64 and without our modules: losses of all targets."""
    heads, width, (B, T) = cfg.heads, cfg.dim // cfg.heads, x.shape

    def rms(x, gain=None):
        x = x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
        return x if gain is None else x * gain

    freqs = (1 / cfg.rope_base) ** torch.linspace(0, 1, width // 4, dtype=torch.float32).double()
    angle = torch.arange(T, dtype=torch.float64)[:, None] * freqs

    def turned(x):  # [B, T, H, K]: pairs (i, i + K/2), of which the first half turn
        x = x.clone()
        for i in range(width // 4):
            a, b = x[..., i].clone(), x[..., i + width // 2].clone()
            c, s = angle[:, i].cos()[:, None], angle[:, i].sin()[:, None]
            x[..., i], x[..., i + width // 2] = a * c + b * s, b * c - a * s
        return x

    h = rms(w["embed"][x], w["embed_gain"])
    for i in range(cfg.depth):
        b = lambda name, i=i: w[f"blocks.{i}.{name}"]
        u = rms(h, b("gains")[0])
        q, k, v = (
            (u @ m.T + bias).view(B, T, heads, width)
            for m, bias in zip(b("attn.qkv"), b("attn.qkv_bias"))
        )
        q, k = turned(rms(q)), turned(rms(k))
        scores = torch.einsum("bthk,bshk->bhts", q, k) * cfg.attn_scale
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        mixed = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).reshape(B, T, -1)
        h = h + mixed @ b("attn.proj").T + b("attn.proj_bias")
        u = rms(h, b("gains")[1]) @ b("mlp.fc").T + b("mlp.fc_bias")
        h = h + u.clamp_min(0).square() @ b("mlp.proj").T + b("mlp.proj_bias")
    z = rms(h, w["final_gain"]) @ w["head"].T + w["head_bias"]
    z = cfg.softcap * torch.sin(torch.atan(z / cfg.softcap))
    return F.cross_entropy(z.view(B * T, -1), y.flatten(), reduction="none")


ARCHITECTURE = {
    "norm_gain": 1,
    "biases": 1,
    "softcap": 5.0,
    "softcap_shape": "isru",
    "doc_mask": 0,
    "attn_scale": 0.12,
    "vocab": 128,
    "init": "normal",
}


def test_loss_and_gradients_are_those_of_the_transformer_written_once_more():
    cfg = tiny(heads=2, bias_init=1.0, **ARCHITECTURE)
    model, (x, y) = build(cfg), random_tokens(cfg, 2, 32)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(randn(*p.shape, seed=i) * 0.2)
    weights = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    losses, want = model(x, y), plain_track3(weights, x, y, cfg)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    want.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), weights[name].grad, rtol=1e-4, atol=1e-3)


def test_biases_of_0_and_gains_of_1_change_no_bit():
    changes = {"softcap": 5.0, "doc_mask": 0, "proj_init": 1.0, "head_init": "0.1", "vocab": 128}
    plain, (x, y) = build(tiny(**changes)), random_tokens(tiny(**changes), 2, 32)
    more = build(tiny(norm_gain=1, biases=1, **changes))
    assert torch.equal(plain(x, y), more(x, y))
    names = {n for n, _ in more.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert len(names) == 2 + 5 * len(plain.blocks) + 1  # gains; biases and gains by block; head's


def test_isru_is_c_sin_atan_and_a_large_cap_is_none():
    z, c = torch.linspace(-60, 60, 241), 15.0
    model = build(tiny(softcap=c, softcap_shape="isru", vocab=128))
    model.linear = lambda x, name, w=None: x  # the head's product is z itself
    got = model.logits(z)
    torch.testing.assert_close(got, c * torch.sin(torch.atan(z / c)), rtol=1e-5, atol=1e-5)
    assert torch.equal(got, -got.flip(0)) and got.abs().max() < c
    big = build(tiny(softcap=1e6, softcap_shape="isru", vocab=128))
    big.linear = model.linear
    torch.testing.assert_close(big.logits(z), z)


def test_starts_are_those_of_the_baseline_and_of_torch():
    """N(0, .33/fan in) and zeros; uniform in +-1/sqrt(fan in), biases too, and zero projections."""
    cfg = tiny(dim=128, heads=2, head_dim=64, **ARCHITECTURE)
    base = build(tg.dataclasses.replace(cfg, init_std=0.33**0.5))
    for name in ("attn.qkv", "mlp.fc"):
        w = base.get_parameter(f"blocks.0.{name}")
        assert w.std().item() == pytest.approx((0.33 / 128) ** 0.5, rel=0.02)
        assert w.abs().max() > 3 * w.std(), "normal, not uniform"
    lineage = tg.dataclasses.replace(cfg, init="remix", init_std=3**-0.5, bias_init=3**-0.5)
    model, bound = build(lineage), 128**-0.5
    for name in ("attn.qkv", "mlp.fc", "attn.qkv_bias", "mlp.fc_bias"):
        w = model.get_parameter(f"blocks.0.{name}")
        assert 0.98 * bound < w.abs().max() <= bound
    zero = ["head", "head_bias"]
    zero += [f"blocks.0.{n}" for n in ("attn.proj", "attn.proj_bias", "mlp.proj", "mlp.proj_bias")]
    for m in (base, model):
        assert not any(m.get_parameter(name).any() for name in zero)


@pytest.mark.parametrize("preset", ["track3", "track3_record"])
def test_parameters_and_first_loss_are_those_of_the_logs(preset):
    cfg = tg.parse_args(["--config", preset])
    model = tg.build_model(cfg, torch.device("meta"), torch.float32, 8)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes.values()) == 162_354_816
    vectors = [n for n in sizes if "bias" in n or "gain" in n]
    assert sum(sizes[n] for n in vectors) == 153_216
    assert sum(sizes[n] for n in vectors if "gain" in n) == 26 * 768
    rules = {
        n: tg.rule_of(cfg, n, p, tg.declarations(model)[n]) for n, p in model.named_parameters()
    }
    assert sum(sizes[n] for n, r in rules.items() if r.kind == "muon") == 84_934_656
    # step:0 val_loss:10.82584, as the head starts at zero
    logits = torch.zeros(1, len(model.head))
    assert F.cross_entropy(logits, torch.tensor([7])).item() == pytest.approx(10.82584, abs=5e-6)


def test_schedules_of_the_record_are_those_of_its_script():
    plan = tg.Plan(tg.parse_args(["--config", "track3_record"]))
    now = lambda s: plan.at(s, s / 2690)
    for step, matrices, others in [
        (0, 1, 1), (513, 1, 1), (514, 0.99980, 1), (1000, 0.76070, 1), (1487, None, 1),
        (2000, 0.31031, 0.58200), (2690, 0.05412, 0.10151),
    ]:  # fmt: skip
        assert now(step).lr == pytest.approx(others, abs=5e-6)
        assert matrices is None or now(step).lr_matrices == pytest.approx(matrices, abs=5e-6)
    assert [now(s).momentum for s in (0, 150, 300, 2690)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert [now(s).ema_nesterov for s in (299, 300, 1949, 1950)] == [0, 0.3, 0.3, 0]
    assert [now(s).soap_floor for s in (0, 1375, 1500, 1625)] == pytest.approx(
        [0.45, 0.45, 0.225, 0]
    )
    assert [now(s).soap_cap for s in (0, 1624, 1625)] == [0.85, 0.85, 1]
    base = tg.Plan(tg.parse_args(["--config", "track3"]))
    assert [base.at(s, s / 3250).lr for s in (0, 975, 2112.5, 3250)] == pytest.approx(
        [1, 1, 0.5, 0]
    )


def test_groups_of_the_record_have_its_rates_and_betas():
    cfg = tg.parse_args(["--config", "track3_record"])
    model = tg.build_model(cfg, torch.device("meta"), torch.float32, 8)
    found = {
        n: tg.rule_of(cfg, n, p, tg.declarations(model)[n]) for n, p in model.named_parameters()
    }
    told = lambda n: (found[n].lr, found[n].beta1, found[n].beta2, found[n].corrected, found[n].wd)
    assert told("embed") == (0.3, 0.8, 0.99, True, 0)
    assert told("head") == (1 / 320, 0.8, 0.99, True, 0)
    for name in ("embed_gain", "blocks.3.gains", "final_gain"):
        assert told(name) == (0.01, 0.8, 0.99, False, 0)
    for name in ("head_bias", "blocks.0.attn.qkv_bias", "blocks.0.mlp.proj_bias"):
        assert told(name) == (0.01, 0.8, 0.997, False, 0)
    assert told("blocks.5.attn.proj_bias") == (0.01, 0.8, 0.9965, False, 0)
    matrices = {n: r for n, r in found.items() if r.kind == "muon"}
    assert len(matrices) == 48 and all(r.soap for r in matrices.values())
    assert {n.split(".", 2)[2] for n, r in matrices.items() if r.soap_gate} == {"attn.proj"}


# --- polar factors


def test_ns12_is_the_scalar_map_twelve_times():
    """p(s) = 2s - 1.5s^3 + .5s^5 of each singular value; golden values of the page."""
    s = np.array([1e-4, 2**-12, 5e-4, 1e-3, 2e-3, 0.05, 0.4])
    want = s.copy()
    for _ in range(12):
        want = 2 * want - 1.5 * want**3 + 0.5 * want**5
    assert want[:4] == pytest.approx([0.39303, 0.79615, 0.99682, 1.0000050], abs=5e-6)
    assert np.allclose(want[4:], 1, atol=1e-10)
    # a matrix of Frobenius norm 1 with those singular values, and one for the rest
    s = np.append(s, np.sqrt(1 - (s**2).sum()))
    u, v = random_basis(8, 1), random_basis(20, 2)[:, :8]
    x = torch.from_numpy(u * s @ v.T)
    for g in (x, x.mT):
        got = tg.polar_factor(g[None].float(), "ns12", 12, torch.float32)[0].numpy()
        got = u.T @ (got if g is x else got.T) @ v
        assert np.allclose(np.diag(got)[:-1], want, rtol=2e-4) and np.allclose(
            got, np.diag(np.diag(got)), atol=2e-5
        )
    g = torch.from_numpy(u * np.geomspace(1, 1 / 400, 8) @ v.T)
    got = tg.polar_factor(g[None].float(), "ns12", 12, torch.float32)[0].numpy()
    assert np.allclose(got, polar(g.numpy()), atol=1e-5)


def test_schatten4_lies_between_the_spectral_and_the_frobenius_norm():
    for shape in ((6, 20), (20, 6), (9, 9)):
        x = randn(2, *shape)
        got = tg.schatten4(x).flatten()
        for i in range(2):
            assert got[i].item() == pytest.approx(s4(x[i].double().numpy()), rel=1e-5)
        assert (torch.linalg.matrix_norm(x, 2) < got).all() and (
            got < tg.frobenius(x)[:, 0, 0]
        ).all()
    column = randn(1, 9, 1) @ randn(1, 1, 5)
    assert tg.schatten4(column).item() == pytest.approx(tg.frobenius(column).item(), rel=1e-5)
    g, exact = randn(1, 12, 30), {}
    for by in ("frobenius", "schatten4"):
        exact[by] = tg.polar_factor(g, "ns12", 12, torch.float32, by)
    assert torch.allclose(exact["frobenius"], exact["schatten4"], atol=1e-5)


def test_soft_muon_is_nearly_the_tenth_power_of_the_singular_values():
    assert sum(tg.SOFT) == pytest.approx(1, abs=1e-6)
    s, total = np.array([1e-3, 0.01, 0.05, 0.1, 0.3, 1.0]), 0.0
    x = s.copy()
    for share in tg.SOFT:
        total, x = total + share * x, 2 * x - 1.5 * x**3 + 0.5 * x**5
    ratio = total / s**0.1
    assert ratio[:3] == pytest.approx([0.6385, 0.9917, 0.9990], abs=5e-5)
    assert np.allclose(ratio[3:], 1, atol=2e-4)
    u, v = random_basis(8, 1), random_basis(8, 2)
    spread = np.geomspace(1, 0.02, 8)
    g = torch.from_numpy(u * spread @ v.T).float()[None]
    hard = tg.polar_factor(g, "ns12", 12, torch.float32, "schatten4")
    none = tg.polar_factor(g, "ns12", 12, torch.float32, "schatten4", one(0.0))
    assert torch.allclose(hard, none, atol=1e-5)
    full = tg.polar_factor(g, "ns12", 12, torch.float32, "schatten4", one(1.0))[0].double().numpy()
    assert s4(full) == pytest.approx(s4(hard[0].numpy()), rel=1e-5)
    powers = np.diag(u.T @ full @ v)
    assert np.allclose(powers / powers[0], spread**0.1, rtol=3e-3)


def test_aurora_evens_the_norms_and_stays_orthogonal():
    """#30: U U^T = I of a wide matrix, and its columns' squared norms near rows/cols."""
    g = randn(1, 8, 32) * torch.logspace(-1, 1, 32)
    factor = lambda x: tg.polar_factor(x, "ns12", 12, torch.float32)
    cfg = tiny(aurora_rounds=12, aurora_power=0.25)
    spread = lambda u: (u.square().sum(1) - 8 / 32).abs().max().item()
    plain, three = factor(g), tg.even_polar_factor(g, tiny(), factor)
    many = tg.even_polar_factor(g, cfg, factor)
    for u in (three, many):
        assert torch.allclose(u[0] @ u[0].T, torch.eye(8), atol=1e-3)
    assert spread(many) < 0.02 < spread(three) < 0.5 * spread(plain)
    tall = tg.even_polar_factor(g.mT, cfg, factor)
    assert torch.allclose(tall, many.mT, atol=1e-6)
    alike = torch.from_numpy(random_basis(8, 3)).float()[None]  # columns of one norm already
    assert torch.allclose(tg.even_polar_factor(alike, cfg, factor), factor(alike), atol=1e-4)


# --- momentum


def test_weights_of_maxwell_are_those_of_both_pull_requests():
    """PR 339's two buffers, and PR 357's eight from 58 down to 26 steps."""
    assert tg.maxwell_weights([0.85, 0.98], 29.998) == pytest.approx([0.4385, 0.5615], abs=1e-5)
    ages = [3 * (64 / 3) ** (k / 7) for k in range(8)]
    decays = [age / (age + 1) for age in ages]
    for age, slope in ((58, 0.005093975), (26, 0.032261839)):
        weights = tg.maxwell_weights(decays, age)
        want = [slope * k for k in range(1, 8)] + [1 - 28 * slope]
        assert weights == pytest.approx(want, abs=5e-8)  # as exact as the slopes are
        assert sum(w * a for w, a in zip(weights, ages)) == pytest.approx(age)


def momenta(cfg, gradients, ages, mu=0.9) -> list[torch.Tensor]:
    """What Muon takes the polar factor of, step by step."""
    first = gradients[0]
    state = {"momentum": torch.zeros_like(first), "maxwell": torch.zeros(len(first), 2, 4, 4)}
    found = []
    for g, age in zip(gradients, ages):
        weights = tg.maxwell_weights(tg.decays_of(cfg), age)
        rates = {"momentum": one(mu), "mixed": one(age > 0)}
        rates |= {f"weight{k}": one(w) for k, w in enumerate(weights)}
        found.append(tg.nesterov(g.clone(), state, rates, cfg))
    return found


def test_maxwell_is_momentum_up_to_its_switch_and_then_the_mixture():
    cfg, plain = tiny(maxwell="0.85 0.98", maxwell_age="0 3s:30"), tiny()
    gradients = [randn(1, 4, 4, seed=s) for s in range(6)]
    got = momenta(cfg, gradients, [0, 0, 0, 30, 30, 30])
    buf, fast, slow, weights = 0.0, None, None, tg.maxwell_weights([0.85, 0.98], 30)
    for s, g in enumerate(x.double() for x in gradients):
        buf = 0.9 * buf + 0.1 * g
        if s < 3:
            fast = slow = buf
            mean = buf
        else:
            fast, slow = 0.85 * fast + 0.15 * g, 0.98 * slow + 0.02 * g
            mean = weights[0] * fast + weights[1] * slow
        torch.testing.assert_close(got[s].double(), 0.1 * g + 0.9 * mean, rtol=1e-5, atol=1e-6)
    state = {"momentum": torch.zeros(1, 4, 4)}
    for s in range(3):
        assert torch.equal(got[s], tg.nesterov(gradients[s], state, {"momentum": one(0.9)}, plain))


def test_impulse_response_of_two_buffers_is_30_steps_old():
    """.4385*.15*.85^k + .5615*.02*.98^k, and a constant gradient is its own mean."""
    cfg = tiny(maxwell="0.85 0.98", maxwell_age="30")
    gradients = [torch.ones(1, 4, 4)] + [torch.zeros(1, 4, 4)] * 400
    got = [m[0, 0, 0].item() for m in momenta(cfg, gradients, [29.998] * 401, mu=0.5)]
    want = [0.5 * (k == 0) for k in range(401)]
    want = [
        w + 0.5 * (0.4385 * 0.15 * 0.85**k + 0.5615 * 0.02 * 0.98**k) for k, w in enumerate(want)
    ]
    assert got == pytest.approx(want, abs=2e-6)
    mean = [2 * g for g in got]
    mean[0] -= 1
    assert sum(k * m for k, m in enumerate(mean)) == pytest.approx(29.998, rel=0.01)


def test_maxwell_refuses_an_age_that_no_mixture_has():
    for age in ("50", "5", "0 3s:49.5"):
        with pytest.raises(tg.UserError, match="no mixture of '0.85 0.98' is so young or so old"):
            tg.validate(tiny(maxwell="0.85 0.98", maxwell_age=age))
    with pytest.raises(tg.UserError, match="two decays or more"):
        tg.validate(tiny(maxwell="0.98 0.85", maxwell_age="30"))


# --- SOAP


def soap_state(rows: int, cols: int) -> dict[str, torch.Tensor]:
    names = tg.states_in_fp32(rule(shape=(rows, cols), soap=True), tiny(soap="."))
    return {name: torch.zeros(1, *shape) for name, shape in names.items()}


def soap_steps(gradients, gated=False, floor=0.0, cap=1.0):
    """The outcome of each step, momentum left out: u is the gradient."""
    state, found = soap_state(*gradients[0].shape), []
    for s, g in enumerate(gradients):
        rates = {"begun": one(s > 0), "soap_floor": one(floor), "soap_cap": one(cap)}
        found.append(tg.soap_update(g[None], g[None], state, rates, gated, 0.9)[0])
        tg.turn_basis(state, s == 0)
    return found, state


def soap_by_hand(gradients, turn):
    """Steps 2, 3 and 13 of record #46 in fp64; turn: of the bases, given the Gram matrices."""
    kr = kc = v = 0.0
    qr = qc = None
    found = []
    for g in (g.double().numpy() for g in gradients):
        if qr is None:
            found.append(g)
        else:
            p = qr.T @ g @ qc
            v = 0.9 * v + 0.1 * p**2
            z = qr @ (p / np.sqrt(np.maximum(v, 1e-16))) @ qc.T
            found.append(z * s4(g) / s4(z))
        kr, kc = 0.9 * kr + 0.1 * g @ g.T, 0.9 * kc + 0.1 * g.T @ g
        if qr is None:
            qr, qc, v = turn(kr, None), turn(kc, None), np.zeros_like(g)
            continue
        for side in (0, 1):
            k, q = (kr, qr) if side == 0 else (kc, qc)
            order = np.argsort(-np.diag(q.T @ k @ q), kind="stable")
            v, q = np.take(v, order, axis=side), turn(k, q[:, order])
            if side == 0:
                qr = q
            else:
                qc = q
    return found


def eigen_then_qr(k, q):
    return np.linalg.eigh(k)[1][:, ::-1] if q is None else np.linalg.qr(k @ q)[0]


def test_soap_is_the_records_step_by_step():
    gradients = [randn(8, 8, seed=s) for s in range(5)]
    found, _ = soap_steps(gradients)
    assert torch.equal(found[0], gradients[0]), "there is no basis yet"
    for got, want in zip(found, soap_by_hand(gradients, eigen_then_qr)):
        assert np.allclose(got.double().numpy(), want, rtol=2e-3, atol=2e-3 * np.abs(want).max())


def test_soap_of_one_gradient_is_its_polar_factor():
    """In the basis of its singular vectors every singular value is divided by itself."""
    g = random_basis(8, 1) * np.linspace(2, 1, 8) @ random_basis(8, 2).T
    # so small that what is rounding, and no gradient, stays below the floor of 1e-8
    g = 1e-5 * torch.from_numpy(g).float()
    z = soap_steps([g] * 4)[0][-1].double().numpy()
    want = polar(g.double().numpy())
    assert np.allclose(z, want * s4(z) / s4(want), atol=2e-3 * np.abs(z).max())
    assert s4(z) == pytest.approx(s4(g.double().numpy()), rel=1e-4)


def test_soap_turns_with_the_gradient():
    a, b = (torch.from_numpy(random_basis(8, seed)).float() for seed in (1, 2))
    gradients = [randn(8, 8, seed=s) for s in range(4)]
    plain, turned = (soap_steps(x)[0] for x in (gradients, [a @ g @ b for g in gradients]))
    # the QR step keeps eigenbases apart by sign alone
    assert torch.allclose(a @ plain[1] @ b, turned[1], atol=2e-3 * turned[1].abs().max())


def test_trust_is_between_floor_and_cap():
    """u where nothing of z is trusted, z where all is; and both agree where z is along u."""
    gradients = [randn(8, 8, seed=s) for s in range(3)]
    free, whole = soap_steps(gradients)[0][-1], soap_steps(gradients, True, 1.0, 1.0)[0][-1]
    assert torch.allclose(free, whole, atol=1e-4)
    none = soap_steps(gradients, True, 0.0, 0.0)[0][-1]
    assert torch.allclose(none, gradients[-1], atol=1e-4)
    z, g = free.double().numpy(), gradients[-1].double().numpy()
    cos = (z * g).sum() / np.linalg.norm(z) / np.linalg.norm(g)
    trust = np.clip((cos - 0.2) / 0.8, 0, 1) * np.clip(cos, 0, 1)  # u is the gradient
    want = g + trust * (z - g)
    want *= s4(g) / s4(want)
    got = soap_steps(gradients, True)[0][-1].double().numpy()
    assert 0.05 < trust < 0.95 and np.allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_bases_are_ordered_eigenbases_and_turn_towards_new_ones():
    gradients = [randn(6, 10, seed=s) * torch.logspace(0, 1, 10) for s in range(12)]
    _, state = soap_steps(gradients)
    for side in ("rows", "cols"):
        q, k = state[f"basis_{side}"][0], state[f"gram_{side}"][0]
        assert torch.allclose(q.T @ q, torch.eye(len(q)), atol=1e-5)
        turned = q.T @ k @ q
        sizes = torch.linalg.eigvalsh(k).flip(0)
        assert turned[0, 0] == pytest.approx(sizes[0].item(), rel=0.1)


# --- along the weights and across


def test_brake_halves_what_grows_the_norm_and_nothing_else():
    w, u, cfg = randn(2, 6, 4), randn(2, 6, 4, seed=1), tiny(radial_brake=0.5)
    u[0] -= 2 * w[0]  # a step along -u makes the first longer,
    u[1] += 2 * w[1]  # and the second shorter
    got = tg.radial(w, u, 1.0, cfg)
    along = lambda x, i: (x[i] * w[i]).sum() / w[i].square().sum()
    tangent = lambda x, i: x[i] - along(x, i) * w[i]
    assert along(got, 0).item() == pytest.approx(0.5 * along(u, 0).item(), rel=1e-4)
    assert torch.allclose(tangent(got, 0), tangent(u, 0), atol=1e-5)
    assert torch.equal(got[1], u[1]) and along(u, 0) < 0 < along(u, 1)
    assert torch.equal(tg.radial(torch.zeros_like(w), u, 1.0, cfg), u)


def test_floors_lift_what_is_small_and_keep_directions():
    w, u = 10 * randn(1, 6, 4), randn(1, 6, 4, seed=1)
    u[0, 3] *= 100
    ratio = 2.0
    got = tg.radial(w, u, ratio, tiny(update_floor=0.5))
    assert torch.equal(got, u), "all in all it is large enough"
    got = tg.radial(w, u, ratio, tiny(update_floor=50.0))
    assert (ratio * got.norm() / w.norm()).item() == pytest.approx(50, rel=1e-5)
    assert torch.allclose(got / got.norm(), u / u.norm(), atol=1e-6)
    got = tg.radial(w, u, ratio, tiny(row_floor=0.5))[0]
    was = ratio * u[0].norm(dim=1) / w[0].norm(dim=1)
    shares = ratio * got.norm(dim=1) / w[0].norm(dim=1)
    assert (was < 0.5).sum() >= 3 and torch.allclose(shares, was.clamp_min(0.5), rtol=1e-5)
    assert torch.equal(got[3], u[0, 3])


def descended(w, u, lr=0.1, decay=0.0, cautious=False, pin=True) -> torch.Tensor:
    x = w.clone()
    tg.descend(x, u, one(lr), one(decay), cautious, pin)
    return x


def test_pin_changes_the_norm_by_its_first_order_and_decay_comes_behind():
    w, u = randn(1, 6, 4), randn(1, 6, 4, seed=1)
    along = ((u * w).sum() / w.norm()).item()
    x = descended(w, u)
    assert x.norm().item() == pytest.approx(w.norm().item() - 0.1 * along, rel=1e-5)
    y = w - 0.1 * u
    assert torch.allclose(x / x.norm(), y / y.norm(), atol=1e-6)
    still = u - (u * w).sum() / w.square().sum() * w
    assert descended(w, still).norm().item() == pytest.approx(w.norm().item(), rel=1e-6)
    plain = [(descended(w, u, lr) - descended(w, u, lr, pin=False)).norm() for lr in (1e-2, 1e-3)]
    assert 50 < plain[0] / plain[1] < 200, "they part in the second order"
    mask = (u * w >= 0).float()
    assert torch.allclose(
        descended(w, u, decay=0.2, cautious=True), x * (1 - 0.2 * mask), atol=1e-6
    )
    assert torch.allclose(descended(w, u, decay=0.2), 0.8 * x, atol=1e-6)
    none = descended(w, -w, decay=0.2, cautious=True)
    assert torch.allclose(none, descended(w, -w), atol=1e-6), "no entry shrinks"


def test_pinned_zeros_grow_from_the_second_step_on():
    """A8: 1e-8 long behind the first, then 1e-8 + lr*|u|*cos(u2, u1)."""
    first, second = randn(1, 6, 4), randn(1, 6, 4, seed=1) + 2 * randn(1, 6, 4)
    cfg = tiny(radial_brake=0.5, row_floor=0.3825)
    x = torch.zeros(1, 6, 4)
    x = descended(x, tg.radial(x, first, 1.0, cfg))
    assert x.norm().item() == pytest.approx(1e-8, rel=1e-3)
    assert F.cosine_similarity(x.flatten(), -first.flatten(), 0).item() == pytest.approx(
        1, abs=1e-5
    )
    u = tg.radial(x, second, 1.0, cfg)
    x = descended(x, u)
    cos = F.cosine_similarity(first.flatten(), second.flatten(), 0)
    assert torch.allclose(u, second, rtol=1e-3), "of weights so short the brake sees little"
    assert x.norm().item() == pytest.approx((1e-8 + 0.1 * second.norm() * cos).item(), rel=1e-3)


def test_muonh_keeps_every_norm_whatever_the_size_of_the_update():
    w, u = randn(2, 6, 4), randn(2, 6, 4, seed=1)
    x, y = w.clone(), w.clone()
    tg.descend_on_sphere(x, u, one(0.3))
    tg.descend_on_sphere(y, 7 * u, one(0.3))
    assert torch.allclose(x, y, atol=1e-6)
    assert torch.allclose(x.norm(dim=(1, 2)), w.norm(dim=(1, 2)), rtol=1e-6)
    z = w[0] - 0.3 * w[0].norm() * u[0] / u[0].norm()
    assert torch.allclose(x[0], z * w[0].norm() / z.norm(), atol=1e-6)


# --- Adam without correction, sums of losses


def test_uncorrected_adam_takes_shorter_steps():
    """AdamW's times (1 - b1^t)/sqrt(1 - b2^t)."""
    grads = [randn(64, seed=s) for s in range(4)]
    moved = {}
    for pattern in ("", "embed$"):
        cfg = tiny(uncorrected=pattern, adam_eps=1e-12, compile=0)
        model = build(cfg)
        opt = tg.MuonAdamW(cfg, model, alone())
        found = []
        for g in grads:
            before = model.embed.detach().clone()
            for p in model.parameters():
                p.grad.copy_(g[:1].expand_as(p) + 0.5)
            opt.step(tg.Plan(cfg).at(0, 0.0))
            found.append((model.embed.detach() - before)[0, 0].item())
        moved[pattern] = found
    for t, (plain, short) in enumerate(zip(*moved.values()), 1):
        factor = (1 - cfg.beta1**t) / math.sqrt(1 - cfg.beta2**t)
        assert short == pytest.approx(plain * factor, rel=1e-3)


def test_a_sum_of_losses_moves_muon_and_adam_as_their_mean_does(tmp_path):
    """Both are free of scale, but for epsilons."""
    moved = []
    for i, total in enumerate((0, 1)):
        folder = tmp_path / str(i)
        folder.mkdir()
        p = parts(folder, loss_sum=total, adam_eps=1e-25, mu_loss=0.5, polar_steps=8)
        losses, size = tg.train_step(p, 0, p.plan.at(0, 0.0))
        weights = {n: w.detach().clone() for n, w in p.model.named_parameters()}
        moved.append(
            (losses, size / (p.loader.targets(p.plan.at(0, 0.0).batch_tokens) ** total), weights)
        )
    (loss, size, mean), (again, sized, summed) = moved
    assert torch.equal(loss, again) and torch.allclose(size, sized, rtol=1e-5)
    for name, w in mean.items():
        assert torch.allclose(w, summed[name], atol=2e-3), name


# --- EMA-Nesterov and the tail EMA


def test_ema_nesterov_of_a_steady_step_moves_v_over_1_minus_b(tmp_path):
    """The displacement is part of what is averaged: D = b*D + v."""
    p = parts(tmp_path, ema_nesterov="0 2s:0.6", ema_nesterov_decay=0.5, lr="1", compile=0)
    # of the optimizer the update alone is replaced: every weight rises by 0.25
    p.opt.muon = p.opt.adamw = lambda shard, *rest: shard.add_(0.25)
    path = [p.model.embed[0, 0].item()]
    for step in range(40):
        p.run.trained = p.plan.at(max(0, step - 1), 0.0)
        tg.train_step(p, step, p.plan.at(step, 0.0))
        path.append(p.model.embed[0, 0].item())
    moves = np.diff(path)
    assert moves[:2] == pytest.approx([0.25, 0.25], rel=1e-4)
    assert moves[-1] == pytest.approx(0.25 / (1 - 0.6), rel=1e-3)


def test_gradient_is_taken_ahead_and_the_step_begins_there(tmp_path):
    """By hand: y = x + b*lr*m, the optimizer goes on from y, and m follows what x did."""
    p = parts(tmp_path, ema_nesterov="0.7", ema_nesterov_decay=0.9, lr="0:1 1s:0.5", compile=0)
    seen, m, x = [], 0.0, p.model.embed.detach().double().clone()
    plain = tg.loss_terms
    with pytest.MonkeyPatch.context() as patch:
        look = lambda *args: seen.append(p.model.embed.detach().clone()) or plain(*args)
        patch.setattr(tg, "loss_terms", look)
        for step in range(4):
            factor = 1 if step == 1 else 0.5
            want = x + 0.7 * factor * m if step else x
            p.run.trained = p.plan.at(step - 1, 0.0) if step else None
            tg.train_step(p, step, p.plan.at(step, 0.0))
            assert torch.allclose(seen[-1].double(), want, atol=1e-6)
            new = p.model.embed.detach().double()
            m, x = 0.9 * m + 0.1 * (new - x), new.clone()
    assert m.abs().max() > 0


def test_tail_ema_begins_with_the_weights_and_lags(tmp_path):
    p = parts(tmp_path, tail_ema="0 3s:4", tail_blend="head=0 0.25", compile=0)
    weights = {n: w.detach().clone() for n, w in p.model.named_parameters()}
    for step in range(1, 200):
        with torch.no_grad():
            for w in p.model.parameters():
                w.add_(1.0)
        p.avg.update(step, step / 200)
        assert p.avg.ready() == ([] if step < 3 else ["tail"])
        if step == 3:
            with p.avg.swapped_in("tail"):
                for n, w in p.model.named_parameters():
                    assert torch.allclose(w, weights[n] + 3)
    with p.avg.swapped_in("tail"):  # a drift of 1 a step: (tau - 1) behind, and of that a quarter
        for n, w in p.model.named_parameters():
            lag = 0 if n.startswith("head") else 0.25 * 3
            assert torch.allclose(w, weights[n] + 199 - lag, atol=1e-3), n


def test_an_exported_tail_is_the_blend_also_from_a_checkpoint(tmp_path):
    p = parts(
        tmp_path,
        tail_ema="0 1s:3",
        tail_blend="embed=0 0.5",
        final_weights="tail",
        log_dir=str(tmp_path),
    )
    for step in range(4):
        tg.train_step(p, step, p.plan.at(step, 0.0))
        p.avg.update(step + 1, 0.5)
    path = tg.save_checkpoint(p, 4)
    said: list[str] = []
    _, named, _ = tg.open_source(str(path), say=said.append)
    with p.avg.swapped_in("tail"):
        for n, w in p.model.named_parameters():
            assert torch.equal(named[n].view_as(w), w), n
    assert "its tail average" in said[0]


@pytest.mark.parametrize("key", ["soap", "aurora", "uncorrected"])
def test_a_pattern_that_finds_nothing_is_refused(tmp_path, key):
    with pytest.raises(tg.UserError, match=f"{key} = 'attn.mlp' matches nothing"):
        parts(tmp_path, **{key: "attn.mlp"})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tail_ema": "0 0.5:9", "tail_blend": "0.5 embed=0"}, "behind them one share"),
        ({"tail_ema": "0 0.5:9", "tail_blend": "2"}, "from 0 to 1"),
        ({"tail_blend": "0.5"}, "tail_blend = '0.5' does nothing here: it needs tail_ema"),
        ({"soap_gate": "proj"}, "soap_gate = 'proj' does nothing here: it needs soap"),
        ({"soft_muon": "0.5"}, "it needs polar = 'ns12'"),
        ({"hyperball": 1}, "it needs matrices with a norm"),
        ({"radial_pin": 1, "hyperball": 1, "proj_init": 1.0}, "needs hyperball = 0"),
        ({"hyperball": 1, "proj_init": 1.0, "attn_gate": 12}, "whose gates begin at zero"),
        ({"maxwell": "0.8 0.9", "maxwell_age": "0 0.5>8"}, "a ramp from or to 0"),
        ({"lr_matrices": "0.5", "cycles": 2}, "needs cycles = 0"),
        ({"bias_init": 1.0}, "needs biases = 1"),
        ({"norm_gain": 1, "layer_norm": 1}, "needs layer_norm = 0"),
        ({"softcap_shape": "isru", "softcap": 0.0}, "needs softcap > 0"),
        ({"biases": 1, "iha": 1}, "knows no biases"),
        ({"maxwell": "0.8 0.9"}, "needs a maxwell_age above 0"),
        ({"final_weights": "tail"}, "needs tail_ema"),
    ],
)
def test_what_would_do_nothing_is_refused(changes, message):
    cfg = tiny(**changes)
    with pytest.raises(tg.UserError, match=message):
        tg.validate(cfg)
        tg.refuse_idle(cfg)


# Stacks whose parts go together. The first whitens by bases that rounding turns: a wider bound.
COMPILED = {
    "soap": (
        {"soap": "mlp|attn", "soap_gate": "attn.proj", "maxwell": "0.5 0.9", "polar": "ns12"}
        | {"maxwell_age": "0 2s:4 6s>2", "polar_steps": 12, "soft_muon": "0 2s:0 5s>0.5"}
        | {"soap_floor": "0.4 4s>0", "radial_brake": 0.5, "row_floor": 0.3, "radial_pin": 1}
        | {"matrix_wd": 0.1, "cautious": 2, "ema_nesterov": "0 1s:0.5", "mlp_ratio": 1.0}
        | {"uncorrected": "head", "tie_embed": 1, "polar_norm": "schatten4"},
        2e-3,
    ),
    "aurora and MuonH": (
        {"aurora": "mlp.proj", "hyperball": 1, "proj_init": 1.0, "momentum": "0.8 3s>0.9"}
        | {"polar": "ns12", "polar_steps": 12, "lr": "1 2s:1 6s>0.1"},
        1e-5,
    ),
}


@pytest.mark.parametrize("stack", COMPILED)
def test_compiled_updates_are_the_eager_ones_and_nothing_compiles_again(stack):
    """Where bases begin, mixtures switch on and schedules move: tensors, and no branches."""
    flags, bound = COMPILED[stack]
    cfg = tiny(**flags, steps=6)
    counts, weights = [], {}
    for compiled in (0, 2):
        model = build(tg.dataclasses.replace(cfg, compile=compiled))
        opt, plan = tg.MuonAdamW(model.cfg, model, alone()), tg.Plan(cfg)
        for s in range(6):
            opt.look_ahead(plan.at(s, s / 6), plan.at(s - 1, (s - 1) / 6) if s else None)
            for i, p in enumerate(model.parameters()):
                p.grad.copy_(randn(*p.shape, seed=100 * s + i))
            opt.step(plan.at(s, s / 6))
            counts += [tg.graphs_compiled()] * (compiled > 0)
        weights[compiled] = [p.detach().clone() for p in model.parameters()]
    assert len(set(counts)) == 1
    for p, q in zip(weights[0], weights[2]):
        assert torch.allclose(p, q, atol=bound)
