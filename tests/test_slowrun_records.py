"""The newest slowrun records: what each part is, by formulae written out here."""

import math

import pytest
import torch
from helpers import OneOf, parts, tg, tiny

from logs import explain_centering

CPU = torch.device("cpu")


def share(folder, rank: int = 0, world: int = 1, **changes) -> tg.Trainer:
    """One rank's trainer, which hears nothing of the others; a step leaves its gradients."""
    p = parts(folder, head_init="0.2", proj_init=1.0, **changes)
    p.run = OneOf(CPU, rank, world)
    p.loader = tg.Loader(p.cfg, p.plan, rank, world)
    p.opt = tg.MuonAdamW(p.cfg, p.model, p.run)
    p.opt.step = lambda now: torch.zeros(1)
    return p


def gradients(p: tg.Trainer, step: int = 0) -> dict[str, torch.Tensor]:
    tg.train_step(p, step, p.plan.at(step, step / p.cfg.steps))
    return {name: w.grad.clone() for name, w in p.model.named_parameters()}


@pytest.fixture
def doubles():
    """Everything in fp64."""
    torch.set_default_dtype(torch.float64)
    with explain_centering.in_float64():
        yield
    torch.set_default_dtype(torch.float32)


def doubled(p: tg.Trainer) -> tg.Trainer:
    for q in p.model.parameters():
        q.data = q.data.double()
    p.model.dtype = p.run.dtype = torch.float64
    p.opt = tg.MuonAdamW(p.cfg, p.model, p.run)
    p.opt.step, p.opt.collect = lambda now: torch.zeros(1), lambda last: None
    return p


# --- meta-gradient

META = {"meta_step": "0.5", "meta_groups": 4, "micro_tokens": 32, "batch_tokens": "512"}


def test_meta_step_on_least_squares_is_the_formula(tmp_path, doubles, monkeypatch):
    """Gradient of half 1, then of half 2 at W - length * g1/|g1|, whose Hessian is F2'F2/N."""
    p = doubled(
        share(tmp_path, meta_step="0.5", meta_groups=1, meta_match=r"blocks\.0\.attn\.proj")
    )
    rng = torch.Generator().manual_seed(0)
    table, wanted = torch.randn(2, 96, 32, generator=rng).unbind(0)
    w = p.model.blocks[0].attn.proj

    def squares(p, x, y, *how):
        miss = table[x.flatten()] @ w.T - wanted[y.flatten()]
        return (miss.square().sum() / 2).view(1)

    monkeypatch.setattr(tg, "loss_terms", squares)
    rows = torch.from_numpy(tg.Loader(p.cfg, p.plan).batch(0, 128, 32).astype("int64"))
    before, found = w.detach().clone(), gradients(p)["blocks.0.attn.proj"]
    g, hessians = [], []
    for half in (rows[:2], rows[2:]):
        f, t = table[half[:, :-1].flatten()], wanted[half[:, 1:].flatten()]
        g.append((f @ before.T - t).T @ f / 128)
        hessians.append(f.T @ f / 128)
    want = g[0] + g[1] - 0.5 * g[0] / g[0].norm() @ hessians[1]
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert (found - g[0] - g[1]).norm() > 1e-2 * found.norm()
    assert torch.equal(w, before)


def test_meta_step_changes_a_models_gradient_by_the_hessian_of_the_second_half(tmp_path, doubles):
    """(G(length) - G(0)) / length -> -H2 d, d the first half's direction on the chosen matrices."""
    length, match = 1e-5, r"\.mlp\."
    how = META | {"meta_groups": 1, "meta_match": match, "micro_tokens": 128}
    steps = {size: f"0:{size} 1>9" for size in (length, 0.0)}
    moved, plain = (
        gradients(doubled(share(tmp_path, **how | {"meta_step": text}))) for text in steps.values()
    )
    p = doubled(share(tmp_path, **how))
    named = dict(p.model.named_parameters())
    rows = torch.from_numpy(tg.Loader(p.cfg, p.plan).batch(0, 512, 32).astype("int64"))
    first, second = (
        p.model(half[:, :-1].contiguous(), half[:, 1:].contiguous()).sum() / 512
        for half in (rows[:8], rows[8:])
    )
    chosen = [name for name in named if ".mlp." in name]
    g = torch.autograd.grad(first, [named[name] for name in chosen])
    size = math.sqrt(sum(float(t.square().sum()) for t in g))
    slope = torch.autograd.grad(second, list(named.values()), create_graph=True)
    along = sum(
        (s * d / size).sum()
        for s, d in zip([s for n, s in zip(named, slope) if n in chosen], g, strict=True)
    )
    for name, want in zip(named, torch.autograd.grad(along, list(named.values()))):
        found = (moved[name] - plain[name]) / length
        torch.testing.assert_close(found, -want, rtol=1e-3, atol=1e-6)


def test_meta_step_puts_every_bit_of_the_weights_back(tmp_path):
    p, plain = share(tmp_path, **META), share(tmp_path, **META | {"meta_step": "0"})
    before = {name: w.detach().clone() for name, w in p.model.named_parameters()}
    seen = []
    p.model.register_forward_pre_hook(lambda *_: seen.append(p.model.blocks[0].mlp.fc.sum().item()))
    moved, still = gradients(p), gradients(plain)
    assert all(torch.equal(w, before[name]) for name, w in p.model.named_parameters())
    assert len(seen) == 16 and len(set(seen)) == 5  # at the weights, and at four points beside
    assert all(not torch.allclose(moved[n], still[n], rtol=1e-2) for n in moved)


def test_meta_step_of_length_0_changes_no_bit(tmp_path):
    """With the same micro-batches."""
    how = META | {"meta_groups": 1, "mtp": 0.3, "attn_dropout": 0.2}
    found = []
    for text in ("0", "0 0.5:1"):
        p = share(tmp_path, **how | {"meta_step": text})
        found.append(gradients(p))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


@pytest.mark.parametrize("world", [2, 4])
def test_meta_step_has_the_same_groups_for_any_number_of_ranks(tmp_path, world):
    """The points that each group moves to are equal to the bit, the sums up to their order."""

    def points(p: tg.Trainer) -> list[float]:
        seen = []
        p.model.register_forward_pre_hook(
            lambda *_: seen.append(p.model.blocks[1].attn.proj.double().sum().item())
        )
        return seen

    one = share(tmp_path, **META)
    alone, whole = points(one), gradients(one)
    ranks = [share(tmp_path, rank, world, **META) for rank in range(world)]
    seen, found = zip(*[(points(p), gradients(p)) for p in ranks])
    assert sum(seen, []) == alone
    for name, g in whole.items():
        torch.testing.assert_close(sum(f[name] for f in found), g, rtol=1e-5, atol=1e-7)


def test_one_micro_batch_a_group_is_split_in_two(tmp_path):
    """slowrun_tiny: 8 groups of 32 rows of 2,048 tokens, 65,536 tokens at once."""
    cfg = tiny(
        batch_tokens="524288", micro_tokens=65536, seq_len="2048", meta_step="0.5", meta_groups=8
    )
    plan = tg.Plan(cfg)
    now = plan.at(0, 0.0)
    assert [plan.micro_rows(now, w) for w in (1, 2, 4, 8)] == [16] * 4
    assert [plan.micro_batches(now, w) for w in (1, 2, 4, 8)] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"meta_groups": 3}, ("batch_tokens = 512 in 2 halves of 3 groups", "2 * meta_groups")),
        ({"meta_match": "nothing"}, ("meta_match = 'nothing'", "no matrix")),
        ({"meta_match": "("}, ("meta_match = '('",)),
        ({"param_dtype": "bfloat16"}, ("meta_step = '0.5'", "--param_dtype float32")),
        ({"meta_step": "-1"}, ("meta_step = '-1'",)),
    ],
    ids=str,
)
def test_meta_step_that_cannot_work_is_refused(tmp_path, changes, words):
    with pytest.raises(tg.UserError) as caught:
        parts(tmp_path, **META | changes)
    assert all(w in str(caught.value) for w in words), caught.value


def test_groups_that_ranks_cannot_share_are_refused():
    plan = tg.Plan(tiny(**META))
    with pytest.raises(tg.UserError, match="meta_groups = 4 cannot be shared by 3 ranks"):
        plan.micro_rows(plan.at(0, 0.0), 3)
