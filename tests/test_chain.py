"""
Chains: cycles and their snapshots, noise between them, distillation from the snapshot before, and
mixtures of snapshots weighed on training text that was held out.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import build, parts, random_tokens, tg, tiny, write_shard
from test_model import awake

# --- cycles


def unlimited(**changes) -> tg.Config:
    """The schedules of slowrun's unlimited track, at a size that needs no data."""
    return dataclasses.replace(
        tiny(
            steps=42646,
            batch_tokens="0:393216 12184s:524288 30462s:393216",
            micro_tokens=32,
            cycles=96,
            lr="1",
            cycle_lr="1 1>0.08",
            cycle_decay="0.7 1>1",
            perturb="0.25 1~0.05",
            distill=0.45,
            distill_from=9,
        ),
        **changes,
    )


def test_cycles_have_equal_shares_of_the_tokens_and_the_rates_of_the_specification():
    plan = tg.Plan(unlimited())
    sizes = {s: n.batch_tokens for s, n in ((s, plan.at(s, s / 42646)) for s in (0, 12184, 30462))}
    assert list(sizes.values()) == [393216, 524288, 393216]
    lengths = np.diff([0, *plan.cycle_ends])
    assert set(lengths[:24]) | set(lengths[73:]) <= {507, 508}
    assert set(lengths[24:72]) <= {380, 381} and lengths.sum() == 42646
    tokens, passed = np.cumsum([0, *(n for c, n in plan.batches() for _ in range(c))]), 0
    for cycle, end in enumerate(plan.cycle_ends, 1):  # the first step that has the share
        assert tokens[end - 1] * 96 < cycle * tokens[-1] <= tokens[end] * 96
        assert plan.cycle_at(passed) == (cycle - 1, 0.0) and plan.ends_cycle(end)
        first, last = plan.at(passed, passed / 42646), plan.at(end - 1, (end - 1) / 42646)
        n = end - passed
        assert (first.lr, first.weight_decay) == (1, 0.7)
        assert last.lr == pytest.approx(1 - 0.92 * (n - 1) / n)
        assert last.weight_decay == pytest.approx(0.7 + 0.3 * (n - 1) / n)
        passed = end
    assert [plan.ends_cycle(s) for s in range(42647)].count(True) == 96
    assert plan.at(42646, 1.0).lr == pytest.approx(0.08)


def test_noise_between_cycles_has_the_scales_of_the_specification():
    """.25, .2219 at 24, .15 at 48, .0781 at 72, .05 at 95; one boundary alone has the first."""
    plan = tg.Plan(unlimited())
    found = [plan.perturbation(c) for c in (1, 24, 48, 72, 95)]
    assert found == pytest.approx([0.25, 0.2219, 0.15, 0.0781, 0.05], abs=5e-5)
    for c in range(1, 96):
        by_formula = 0.05 + 0.1 * (1 + math.cos(math.pi * (c - 1) / 94))
        assert plan.perturbation(c) == pytest.approx(by_formula, abs=1e-12)
    assert tg.Plan(unlimited(cycles=2, distill_from=2)).perturbation(1) == 0.25


def test_teacher_begins_with_its_cycle_and_its_graph_is_foreseen():
    plan = tg.Plan(unlimited())
    begins = plan.cycle_ends[7]  # the ninth cycle's first step
    assert [plan.at(s, 0.0).distill for s in (0, begins - 1, begins, 42645)] == [0, 0, 0.45, 0.45]
    both = {s.distill for s in plan.train_shapes(1)}
    assert both == {False, True} and {s.distill for s in plan.eval_shapes()} == {False}
    alone = tg.Plan(tiny(teacher="somewhere", distill=0.5))
    assert [s.distill for s in alone.train_shapes(1)] == [True] and alone.at(0, 0.0).distill == 0.5
    assert [s.distill for s in tg.Plan(tiny(cycles=3)).train_shapes(1)] == [False]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"cycles": 21}, ("cycles = 21", "at most steps = 20")),
        ({"cycles": 2, "max_seconds": 1.0}, ("cycles = 2", "no max_seconds")),
        ({"cycles": 3, "steps": 3, "batch_tokens": "0:128 1s:512"}, ("would have no step",)),
        ({"cycles": 2, "cycle_lr": "1 5s:2"}, ("cycle_lr", "fractions of a cycle")),
        ({"cycles": 3, "distill": 0.5, "distill_from": 4}, ("distill_from = 4", "cycles = 3")),
        ({"cycles": 3, "distill": 0.5, "distill_from": 1}, ("distill_from = 1", "from 2")),
        (
            {"cycles": 2, "distill": 0.5, "loop": "0:1", "repeats": "1 0.5:2"},
            ("repeats", "changes"),
        ),
        ({"cycles": 2, "fitness_tokens": 32}, ("fitness_tokens = 32", "at least 33")),
        ({"cycle_lr": "0.5"}, ("cycle_lr = '0.5' does nothing", "cycles > 0")),
        ({"cycle_decay": "0.5"}, ("cycle_decay = '0.5' does nothing",)),
        ({"cycles": 1, "perturb": "0.1"}, ("perturb = '0.1' does nothing", "cycles > 1")),
        ({"distill": 0.5}, ("distill = 0.5 does nothing", "cycles > 1, or a teacher")),
        ({"teacher": "logs/x"}, ("teacher = 'logs/x' does nothing", "distill > 0")),
        ({"fitness_tokens": 99}, ("fitness_tokens = 99 does nothing", "cycles > 0")),
    ],
    ids=str,
)
def test_chain_that_cannot_work_is_refused(changes, words):
    with pytest.raises(tg.UserError) as caught:
        cfg = tiny(**changes)
        tg.validate(cfg)
        tg.refuse_idle(cfg)
    assert all(w in str(caught.value) for w in words), caught.value


# --- noise


def test_noise_is_of_each_matrix_own_size_and_depends_on_seed_cycle_and_name():
    cfg = tiny(dim=64, heads=4, iha=1, resid_lambda=1.1, q_gain=1.5, activation="swiglu", unet=1)
    model = awake(build(cfg))
    with torch.no_grad():
        model.blocks[0].attn.qkv[1] *= 10  # a stack whose matrices differ
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tg.perturb(model, 1, 3, 0.2)
    moved = {n: (p.detach() - before[n]).double() for n, p in model.named_parameters()}
    for name, by in moved.items():
        if before[name].numel() == 1:
            assert not by.any() and "lambda" in name
            continue
        stack = before[name].ndim > 2
        for w, d in zip(before[name], by) if stack else [(before[name], by)]:
            size = 0.2 * w.double().std()
            # a sample's own spread, four deviations wide
            assert d.square().mean().sqrt() == pytest.approx(
                float(size), rel=4 * (2 * d.numel()) ** -0.5, abs=1e-12
            ), name
    qkv = moved["blocks.0.attn.qkv"].square().mean((1, 2)).sqrt()
    assert qkv[1] / qkv[0] == pytest.approx(10, rel=0.3)
    for seed, cycle, same in ((1, 3, True), (2, 3, False), (1, 4, False)):
        again = awake(build(cfg))
        with torch.no_grad():
            again.blocks[0].attn.qkv[1] *= 10
        tg.perturb(again, seed, cycle, 0.2)
        equal = [torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters())]
        varied = [p.numel() > 1 and bool(p.std() > 0) for p in before.values()]
        assert all(equal) if same else not any(e and v for e, v in zip(equal, varied))
    a, b = moved["blocks.0.mlp.proj"] / moved["blocks.0.mlp.proj"].std(), moved["blocks.1.mlp.proj"]
    assert not torch.allclose(a, b / b.std(), atol=0.1)  # names draw apart


# --- distillation


def kl_by_hand(teacher: torch.Tensor, student: torch.Tensor, T: float) -> torch.Tensor:
    """T^2 sum p (log p - log q) of rows of logits, in fp64."""
    p = (teacher.double() / T).exp()
    q = (student.double() / T).exp()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return T * T * (p * (p / q).log()).sum(-1)


def pair(**changes) -> tuple[tg.GPT, tg.GPT, torch.Tensor, torch.Tensor]:
    """A model and a teacher of other weights, activations and targets for them."""
    cfg = tiny(cycles=2, distill=0.5, softcap=5.0, vocab=90, head_init="0.3", **changes)
    model, teacher = build(cfg), build(dataclasses.replace(cfg, seed=2))
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 24, 32, generator=rng)
    return model, teacher, x, torch.randint(90, (24,), generator=rng)


@pytest.mark.parametrize("T", [1.0, 1.2, 4.0])
@pytest.mark.parametrize("pad_vocab", [0, 1])
def test_divergence_is_that_of_the_formula_on_capped_logits_of_the_real_vocabulary(T, pad_vocab):
    model, teacher, (x, t), y = pair(distill_temperature=T, pad_vocab=pad_vocab)
    y[5] = -1
    rows = model.losses_and_teacher_kl(x, y, t, teacher.head)
    capped = lambda head, x: 5 * torch.tanh((x @ head[:90].T).double() / 5)
    want = kl_by_hand(capped(teacher.head, t), capped(model.head, x), T).detach()
    assert want.min() > 0.01 and rows[2, 5] == 0
    torch.testing.assert_close(rows[2, y >= 0].double(), want[y >= 0], rtol=2e-5, atol=1e-6)
    assert torch.equal(rows[:2], model.losses_and_log_z(x, y))
    if not pad_vocab:  # rows of the head without a token
        with torch.no_grad():
            model.head[90:] += 3
            teacher.head[90:] -= 3
        assert torch.equal(model.losses_and_teacher_kl(x, y, t, teacher.head)[2], rows[2])


def test_gradient_of_the_divergence_is_T_times_the_difference_of_the_softmaxes():
    model, teacher, (x, t), y = pair(distill_temperature=1.2)
    x.requires_grad_()
    model.losses_and_teacher_kl(x, y, t, teacher.head)[2].sum().backward()
    z = (x.detach() @ model.head[:90].T).double()
    capped, slope = 5 * torch.tanh(z / 5), 1 - torch.tanh(z / 5) ** 2
    p = (5 * torch.tanh((t @ teacher.head[:90].T).double() / 5) / 1.2).softmax(-1)
    by_z = 1.2 * ((capped / 1.2).softmax(-1) - p) * slope
    want = (by_z @ model.head[:90].double()).float()
    torch.testing.assert_close(x.grad, want.detach(), rtol=1e-4, atol=1e-5)
    assert teacher.head.grad is None


def test_teacher_that_is_the_model_teaches_nothing():
    model, _, (x, _), y = pair(distill_temperature=1.2)
    x.requires_grad_()
    kl = model.losses_and_teacher_kl(x, y, x.detach(), model.head.detach())[2]
    kl.sum().backward()
    assert kl.abs().max() < 1e-5 and x.grad.abs().max() < 1e-5


def test_divergence_of_a_high_temperature_is_half_the_variance_of_the_logits_difference():
    model, teacher, (x, t), y = pair(distill_temperature=300.0)
    kl = model.losses_and_teacher_kl(x, y, t, teacher.head)[2]
    apart = (model.logits(x) - teacher.logits(t))[:, :90].double()
    torch.testing.assert_close(kl.double(), apart.var(-1, correction=0) / 2, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("mtp", [0.0, 0.3])
def test_blended_loss_and_its_gradients_are_those_by_hand_in_chunks_and_whole(mtp, tmp_path):
    flags = {"cycles": 2, "distill": 0.45, "distill_temperature": 1.2, "mtp": mtp}
    flags |= {"z_loss": 0.01, "head_init": "0.3", "softcap": 15.0}
    grads, norms = [], []
    for chunk in (1000, 50):
        p = parts(tmp_path, **flags, loss_chunk=chunk)
        teacher = p.teacher.model
        assert all(w.dtype == torch.bfloat16 and not w.requires_grad for w in teacher.parameters())
        with torch.no_grad():
            for name, w in p.model.named_parameters():
                noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(len(name)))
                w.add_(0.1 * noise)
        rows = p.loader.batch(0, 128, 32)
        x, y = p.loader.tensors(rows, p.run.device)
        terms = tg.loss_terms(p, x, y, 1, 0, True) / y.numel()
        loss = tg.blended(terms, 0.45)
        loss.backward()
        z, t = (m.logits(m.hidden(x, 1, 0)).flatten(0, 1) for m in (p.model, teacher))
        ce = torch.nn.functional.cross_entropy(z, y.flatten())
        kl = kl_by_hand(t, z, 1.2).mean()
        extra = mtp * p.model.mtp_losses(p.model.hidden(x, 1, 0), y).mean() if mtp else 0
        own = 0.55 * (ce + 0.01 * z.logsumexp(-1).square().mean() + extra) + 0.45 * kl
        assert loss.item() == pytest.approx(own.item(), rel=1e-5)
        assert len(terms) == 3 + (mtp > 0) and terms[0].item() == pytest.approx(ce.item())
        grads.append([w.grad.clone() for w in p.model.parameters()])
        norms.append(sum(float(g.square().sum()) for g in grads[-1]))
        p.run.leave()
    assert norms[0] > 1e-3
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_teacher_has_no_dropout_and_leaves_the_random_state_alone(tmp_path):
    p = parts(tmp_path, cycles=2, distill=0.5, attn_dropout=0.5, mlp_dropout=0.5, proj_init=0.5)
    x, _ = random_tokens(p.cfg, 2, 32)
    before = torch.get_rng_state()
    one, two = (p.teacher.activations(x)[0] for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(p.model.hidden(x, 1, 0), p.model.hidden(x, 1, 0))


# --- held-out text


def test_held_out_documents_are_whole_and_never_trained_on(tmp_path):
    """In all three orders; every other token is drawn as if the file began behind them."""
    rng = np.random.default_rng(0)
    docs = [np.concatenate([[0], rng.integers(1, 96, rng.integers(5, 60))]) for _ in range(60)]
    flat = np.concatenate(docs)
    cut = int(flat.size * 0.6)
    write_shard(tmp_path / "x_train_000001.bin", flat[:cut])
    write_shard(tmp_path / "x_train_000002.bin", flat[cut:])
    write_shard(tmp_path / "x_val_000000.bin", flat[:200])
    ends = np.cumsum([len(d) for d in docs])
    held = int(ends[ends >= 150][0])
    rest = tmp_path / "rest"
    rest.mkdir()
    write_shard(rest / "x_train_000001.bin", flat[held:cut])
    write_shard(rest / "x_train_000002.bin", flat[cut:])
    for shuffle in (0, 1, 2):
        cfg = tiny(data=str(tmp_path), epochs=0, shuffle=shuffle, fitness_tokens=150, cycles=2)
        assert np.array_equal(tg.held_out(cfg), flat[:held])
        other = dataclasses.replace(cfg, data=str(rest), fitness_tokens=0)
        ours, theirs = tg.Loader(cfg, tg.Plan(cfg)), tg.Loader(other, tg.Plan(other))
        for step in range(25):
            assert np.array_equal(ours.batch(step, 128, 32), theirs.batch(step, 128, 32))
        assert np.array_equal(tg.calibration(cfg, 3), tg.calibration(other, 3))
    text = tg.Fitness(cfg, tg.Plan(cfg))
    assert (text.rows, text.scored) == (4, 128)
    x, y = text.batch(range(0, 6), torch.device("cpu"), 6)
    assert np.array_equal(x[:4].numpy(), flat[:132].reshape(4, 33)[:, :-1])
    assert np.array_equal(y[:4].numpy(), flat[:132].reshape(4, 33)[:, 1:]) and (y[4:] == -1).all()
    with pytest.raises(tg.UserError, match="fitness_tokens = 99999: behind so many tokens"):
        tg.held_out(dataclasses.replace(cfg, fitness_tokens=99999))


def test_fitness_set_of_the_track_has_131072_targets(tmp_path):
    """64 rows of 2,049 of whole documents with 132,000 tokens or more."""
    tokens = np.arange(140_000) % 1000
    write_shard(tmp_path / "x_train_000001.bin", tokens)
    cfg = tiny(data=str(tmp_path), vocab=1000, seq_len="2048", fitness_tokens=132_000, cycles=1)
    text = tg.Fitness(cfg, tg.Plan(cfg))
    assert (text.rows, text.scored) == (64, 131_072) and len(tg.held_out(cfg)) == 132_000
