"""
Chains: cycles and their snapshots, noise between them, distillation from the snapshot before, and
mixtures of snapshots weighed on training text that was held out.
"""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_ranks
from helpers import build, parts, random_tokens, tg, tiny, write_shard
from test_model import awake
from test_runs import metrics, speech, succeed, timeless

from logs import score

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
    tg.perturb(dict(model.named_parameters()), 1, 3, 0.2)
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
        tg.perturb(dict(again.named_parameters()), seed, cycle, 0.2)
        equal = [torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters())]
        varied = [p.numel() > 1 and bool(p.std() > 0) for p in before.values()]
        assert all(equal) if same else not any(e and v for e, v in zip(equal, varied))
    a, b = moved["blocks.0.mlp.proj"] / moved["blocks.0.mlp.proj"].std(), moved["blocks.1.mlp.proj"]
    assert not torch.allclose(a, b / b.std(), atol=0.1)  # names draw apart


def test_noise_leaves_what_is_frozen_as_it_is(tmp_path):
    p = parts(tmp_path, steps=8, cycles=2, perturb="0.5", slow="mlp", slow_lr="0 5s:1", depth=2)
    awake(p.model)
    for step, moves in ((4, False), (5, True)):  # 5 ends no cycle: as if it did
        p.plan.cycle_ends[0] = step
        before = {n: w.detach().clone() for n, w in p.model.named_parameters()}
        tg.begin_cycle(p, step, p.plan.at(step, step / 8))
        for name, w in p.model.named_parameters():
            varied = w.numel() > 1 and bool(before[name].std() > 0)
            assert torch.equal(w, before[name]) != (varied and (moves or "mlp" not in name)), name


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
        now = p.plan.at(0, 0.0)._replace(distill=0.45)
        terms = tg.loss_terms(p, x, y, now) / y.numel()
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


# --- mixtures


def random_experts(m: int, n: int, seed: int) -> torch.Tensor:
    """Probabilities [m, n] of models of which each knows another part of the text better."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(m, n, generator=rng) - 1.5 + torch.linspace(0, 0.6, m)[:, None]
    return torch.sigmoid(z)


@pytest.mark.parametrize("m, seed", [(2, 0), (5, 1), (12, 2)])
def test_learned_weights_are_at_the_optimum_that_em_finds(m, seed):
    """The KKT conditions too: mean p_i / (w.p) is 1 where there is weight, and never above 1."""
    p = random_experts(m, 4000, seed)
    w = score.mixture_weights(p)
    em = torch.full((m,), 1 / m, dtype=torch.float64)
    for _ in range(20000):
        em = em * (p.double() / (em @ p.double())).mean(1)
    loss = lambda w: float(-(w @ p.double()).log().mean())
    uniform = loss(torch.full((m,), 1 / m, dtype=torch.float64))
    # a softmax is 0 nowhere
    assert loss(w) == pytest.approx(loss(em), abs=1e-5) and loss(w) < uniform - 1e-3
    assert w.sum() == pytest.approx(1) and torch.allclose(w, em, atol=2e-4)
    slope = (p.double() / (w @ p.double())).mean(1)
    assert slope.max() < 1 + 1e-4 and (slope[w > 0.01] - 1).abs().max() < 1e-4


# --- whole chains

CHAIN = {
    "run": "chain", "compile": 0, "device": "cpu", "dtype": "float32", "depth": 2, "dim": 32,
    "heads": 2, "seq_len": 32, "batch_tokens": 256, "micro_tokens": 64, "vocab": 64,
    "doc_token": 0, "tokenizer": "", "val_tokens": 1024, "steps": 60, "epochs": 0,
    "eval_every": -1, "save_every": 5, "shuffle": 2, "export": "", "loss_chunk": 48, "mtp": 0.3,
    "cycles": 3, "cycle_lr": "1 1>0.08", "cycle_decay": "0.7 1>1", "matrix_wd": 0.1, "lr": "1",
    "perturb": "0.25 1~0.05", "distill": 0.45, "distill_from": 2, "distill_temperature": 1.2,
    "fitness_tokens": 700, "momentum": "0.95",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train_000001", 9001), ("train_000002", 4001), ("val_000000", 1101)):
        write_shard(folder / f"x_{name}.bin", speech(count, 64, seed=count))
    return folder


def words(data: Path, **changes) -> list[str]:
    both = CHAIN | {"data": data} | changes
    return [w for k, v in both.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


@pytest.fixture(scope="module")
def chain(server, data, tmp_path_factory) -> Path:
    """The folder of an unbroken chain of three cycles on one rank, with dropout."""
    folder = tmp_path_factory.mktemp("chain")
    succeed(server.run(*words(data, **DROPOUT), cwd=folder))
    return folder / "logs" / "chain"


DROPOUT = {"attn_dropout": 0.1, "mlp_dropout": 0.1}


def snapshots_of(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("snapshots/*/*.safetensors"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if "val-" not in f.name}


def test_chain_keeps_its_snapshots_and_shows_both_losses(chain):
    """What a snapshot's probabilities are, and where the teacher begins."""
    assert [p.name for p in score.kept_snapshots(chain)] == ["0001", "0002", "0003"]
    lines = metrics(chain)
    train = {r["step"]: r for r in lines if r["kind"] == "train"}
    assert [r["step"] for r in lines if r["kind"] == "val"] == [0, 20, 40, 60]
    for step, r in train.items():
        assert r.get("distill", 0) == (0.45 if step > 20 else 0)
        assert ("blended_loss" in r) == (step > 20)
        if step > 20:
            own = 0.55 * (r["train_loss"] + r["mtp"]) + 0.45 * r["teacher_kl"]
            assert r["teacher_kl"] > 0 and r["blended_loss"] == pytest.approx(own)
        else:
            assert r["teacher_kl"] == 0
    assert [train[s]["lr"] for s in (1, 11, 20, 21)] == pytest.approx([1, 0.54, 0.126, 1])
    cfg = tg.checkpoint_config(chain)
    for path in score.kept_snapshots(chain):
        named = tg.read_tensors(path / "model.safetensors")
        assert all(w.dtype == torch.bfloat16 for w in named.values())
        model = build(cfg)
        tg.load_weights(model, named, "here")
        tokens = torch.from_numpy(tg.held_out(cfg)[: 21 * 33].astype(np.int64)).view(21, 33)
        with torch.no_grad():
            z = model.logits(model.hidden(tokens[:, :-1], 1, 0)).softmax(-1)
        p = tg.read_tensors(path / "fitness.safetensors")["p"]
        want = z.gather(-1, tokens[:, 1:, None]).flatten()
        assert p.dtype == torch.float32 and torch.allclose(p, want, atol=1e-6)
        state = json.loads((path / "state.json").read_text())
        assert state["step"] == 20 * int(path.name) == 20 * state["cycle"]
        assert state["fitness_loss"] == pytest.approx(float(-p.double().log().mean()))


@pytest.mark.parametrize(
    "calls, n", [("run_backward", 4 * 26 + 2), ("randn", 5), ("fsync", 3)], ids=str
)
def test_chain_that_is_killed_and_goes_on_ends_with_the_same_bits(
    server, data, chain, tmp_path, calls, n
):
    """In the middle of cycle 2, in the middle of the noise, and while a snapshot is written."""
    phase = "keep_snapshot" if calls == "fsync" else "train_step"
    when = {"phase": phase, "calls": calls, "send": [[n, 9]]}
    ended = server.run(*words(data, **DROPOUT), cwd=tmp_path, when=when)
    assert ended.code == -9 and f"signal 9 in {phase}" in ended.err
    begun = int(re.search(r"steps begun: (\d+)", ended.err)[1])
    assert begun == {"run_backward": 27, "randn": 21, "fsync": 20}[calls]
    succeed(server.run(*words(data, resume=True, **DROPOUT), cwd=tmp_path))
    folder = tmp_path / "logs" / "chain"
    assert snapshots_of(folder) == snapshots_of(chain)
    assert timeless(metrics(folder)) == timeless(metrics(chain))
    ends = [tg.newest_checkpoint(f) for f in (folder, chain)]
    for part in ("model", "optimizer"):
        a, b = (tg.read_tensors(e / f"{part}.safetensors") for e in ends)
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert not list(folder.glob("snapshots/.*"))


def test_chain_stopped_between_snapshot_and_noise_goes_on_without_noise_twice(
    server, data, chain, tmp_path
):
    """A signal behind cycle 1's last step: what is saved then is the snapshot's own state."""
    when = {"phase": "keep_snapshot", "calls": "fsync", "send": [[1, 15]]}
    ended = server.run(*words(data, save_every=0, **DROPOUT), cwd=tmp_path, when=when)
    assert ended.code == 143 and "saved" in ended.out, ended.text
    folder = tmp_path / "logs" / "chain"
    assert tg.newest_checkpoint(folder).name == "000020"
    succeed(server.run(*words(data, save_every=0, resume=True, **DROPOUT), cwd=tmp_path))
    assert snapshots_of(folder) == snapshots_of(chain)


def test_two_ranks_make_the_chain_of_one_and_its_ensemble(server, data, tmp_path):
    """Without dropout; two ranks are killed in cycle 2 and one goes on; all mix alike."""
    results = {}
    for world in (1, 2):
        argv = words(data, run=f"w{world}")
        succeed(run_ranks(server, world, argv, tmp_path))
    for world in (1, 2):
        argv = [f"logs/w{world}", "--ensemble", "1 2 3", "--device", "cpu"]
        succeed(run_ranks(server, world, argv, tmp_path, program="logs.score"))
        results[world] = json.loads((tmp_path / f"logs/w{world}/result.json").read_text())
    one, two = (results[w]["scores"]["ensemble 1 2 3 of 3 snapshots"] for w in (1, 2))
    for a, b in zip(one["table"], two["table"], strict=True):
        for key in ("val_loss", "val_loss_uniform", "val_loss_mean_single"):
            assert a[key] == pytest.approx(b[key], abs=2e-4), key
    for key in ("train_loss", "teacher_kl", "val_loss"):
        a, b = ([r[key] for r in metrics(tmp_path / f"logs/w{w}") if key in r] for w in (1, 2))
        assert a == pytest.approx(b, abs=2e-4), key
    when = {"phase": "train_step", "calls": "run_backward", "send": [[2 * 26, 15]]}
    ended = run_ranks(server, 2, words(data, run="broken"), tmp_path, when)
    assert [e.code for e in ended] == [143, 143], ended[0].text
    succeed(server.run(*words(data, run="broken", resume=True), cwd=tmp_path))
    a, b = (snapshots_of(tmp_path / "logs" / run) for run in ("broken", "w2"))
    assert a["snapshots/0001/model.safetensors"] == b["snapshots/0001/model.safetensors"]


def own_nats(folder: Path) -> torch.Tensor:
    """Losses [snapshots, targets] of the validation text, by the halves of the model."""
    cfg, nats = tg.checkpoint_config(folder), []
    tokens = torch.from_numpy(tg.read_shard(tg.find_shards(cfg, "val")[0]).astype(np.int64))
    for path in score.kept_snapshots(folder):
        model = build(cfg)
        tg.load_weights(model, tg.read_tensors(path / "model.safetensors"), "here")
        with torch.no_grad():
            z = model.logits(model.hidden(tokens[:1024].view(32, 32), 1, 0)).flatten(0, 1)
        nats.append(torch.nn.functional.cross_entropy(z, tokens[1:1025], reduction="none"))
    return torch.stack(nats).double()


def test_ensemble_is_the_mixture_by_hand_and_beats_its_snapshots(chain, tmp_path, capsys):
    """Weights of the held-out text alone, the K largest renormalised; and it is not taken twice."""
    folder = Path(shutil.copytree(chain, tmp_path / "logs" / "chain"))
    argv = [str(folder), "--device", "cpu", "--ensemble", "2 9"]
    assert score.main(argv) == 0
    said, result = capsys.readouterr().out, json.loads((folder / "result.json").read_text())
    figure = result["scores"]["ensemble 2 3 of 3 snapshots"]
    p = torch.stack(
        [tg.read_tensors(s / "fitness.safetensors")["p"] for s in score.kept_snapshots(folder)]
    )
    w, nats = score.mixture_weights(p), own_nats(folder)
    order = w.argsort(descending=True)
    assert figure["snapshots"] == [f"chain/000{i + 1}" for i in order.tolist()]
    for row, size in zip(figure["table"], (2, 3), strict=True):
        best = order[:size]
        share = w[best] / w[best].sum()
        assert row["weights"] == pytest.approx(share.tolist())
        mixed = -(share @ (-nats[best]).exp()).log().mean()
        even = -((-nats[best]).exp().mean(0)).log().mean()
        assert row["val_loss"] == pytest.approx(float(mixed), abs=1e-5)
        assert row["val_loss_uniform"] == pytest.approx(float(even), abs=1e-5)
        assert row["val_loss_uniform"] < row["val_loss_mean_single"]  # Jensen
        assert row["val_loss_mean_single"] == pytest.approx(float(nats[best].mean()), abs=1e-5)
    assert result["val_loss_ensemble"] == figure["table"][-1]["val_loss"] < nats.mean()
    assert result["ensemble_size"] == 3 and "| 3 |" in said
    singles = [float(x) for x in re.findall(r"snapshot chain/\d+ val_loss:(\S+)", said)]
    assert singles == pytest.approx(nats.mean(1)[order].tolist(), abs=1e-4)
    assert score.main(argv) == 0 and "taken before" in capsys.readouterr().out


def test_ensemble_goes_on_from_the_snapshots_that_it_has_scored(chain, tmp_path, monkeypatch):
    folder, scored = Path(shutil.copytree(chain, tmp_path / "logs" / "chain")), []
    plain = tg.token_losses

    def stopping(run, *how):
        if len(scored) == 2:
            raise tg.UserError("stop")
        scored.append(how)
        return plain(run, *how)

    monkeypatch.setattr(tg, "token_losses", stopping)
    argv = [str(folder), "--device", "cpu", "--ensemble", "3"]
    assert score.main(argv) == 2 and len(scored) == 2
    monkeypatch.setattr(tg, "token_losses", lambda *how: scored.append(how) or plain(*how))
    assert score.main(argv) == 0 and len(scored) == 3


def test_chains_of_other_seeds_are_mixed_in_and_other_recipes_refused(
    server, data, chain, tmp_path, capsys
):
    shutil.copytree(chain, tmp_path / "logs" / "chain")
    more = {"seed": 2, "run": "other", "steps": 30}
    succeed(server.run(*words(data, **more), cwd=tmp_path))
    folder, other = (str(tmp_path / "logs" / run) for run in ("chain", "other"))
    argv = [folder, "--device", "cpu", "--ensemble", "6", "--with_runs", other]
    assert score.main(argv) == 0
    result = json.loads((tmp_path / "logs" / "chain" / "result.json").read_text())
    figure = result["scores"]["ensemble 6 of 6 snapshots with other"]
    assert {name.split("/")[0] for name in figure["snapshots"]} == {"chain", "other"}
    assert len(figure["snapshots"]) == 6 and sum(figure["table"][0]["weights"]) == pytest.approx(1)
    capsys.readouterr()
    before = (tmp_path / "logs" / "chain" / "result.json").read_bytes()
    argv = [folder, "--device", "cpu", "--modes", "chunked", "--ensemble", "6"]
    argv += ["--with_runs", other]
    config = tmp_path / "logs" / "other" / "config.toml"
    text = config.read_text()
    for key, new in (("softcap", "5.0"), ("fitness_tokens", "900")):
        others = re.sub(rf"^{key} = .*\n", "", text, flags=re.M)
        config.write_text(f"{key} = {new}\n{others}")
        assert score.main(argv) == 2 and f"{key} = " in capsys.readouterr().err
    # before any figure is taken
    assert (tmp_path / "logs" / "chain" / "result.json").read_bytes() == before
    config.write_text(text)
    for argv, said in (
        ([folder, "--with_runs", other], "it needs --ensemble"),
        ([folder, "--ensemble", "2 x"], "ensemble = '2 x'"),
        ([folder, "--ensemble", "0"], "ensemble = '0'"),
    ):
        assert score.main(argv) == 2 and said in capsys.readouterr().err


def test_run_learns_from_another_run_all_along(server, data, chain, tmp_path):
    """The older recipe: models in sequence, each the teacher of the next, of any size."""
    plain = {"cycles": 0, "cycle_lr": "1", "cycle_decay": "1", "perturb": "0", "fitness_tokens": 0}
    small = plain | {"depth": 1, "dim": 16, "steps": 10, "teacher": str(chain), "run": "pupil"}
    small |= {"eval_every": 5, "distill_from": 9}
    succeed(server.run(*words(data, **small), cwd=tmp_path))
    train = [r for r in metrics(tmp_path / "logs" / "pupil") if r["kind"] == "train"]
    assert all(r["distill"] == 0.45 and r["teacher_kl"] > 0 for r in train) and len(train) == 10
    wrong = server.run(*words(data, **small | {"softcap": 5, "run": "no"}), cwd=tmp_path)
    assert wrong.code == 2 and "softcap = 0.0 there and 5.0 here" in wrong.err
    gone = server.run(*words(data, **small | {"teacher": "nowhere", "run": "no"}), cwd=tmp_path)
    assert gone.code == 2 and "nowhere: no such run folder" in gone.err


@pytest.mark.parametrize("compiled", [1, 2])
def test_nothing_is_compiled_when_the_teacher_begins(server, data, tmp_path, compiled):
    """Graphs are traced as torch.compile does, and run eagerly."""
    argv = words(data, compile=compiled, steps=12, save_every=0, batch_tokens=128)
    ended = server.run(*argv, cwd=tmp_path, backend="eager")
    succeed(ended)
    assert re.search(r"^recompiles:0$", ended.out, re.M), ended.out
    assert re.search(r"^warmup:3 graphs", ended.out, re.M)
    train = [r for r in metrics(tmp_path / "logs" / "chain") if r["kind"] == "train"]
    assert [r.get("distill", 0) > 0 for r in train] == [False] * 4 + [True] * 8


def test_cycles_alone_move_no_bit(server, data, chain, tmp_path):
    """Neutral rates, no noise, no teacher: the snapshots of a plain run."""
    off = {"cycle_lr": "1", "cycle_decay": "1", "perturb": "0", "distill": 0.0, "steps": 12}
    off |= {"eval_every": 6, "fitness_tokens": 0} | DROPOUT
    for run, cycles in (("cycles", 3), ("plain", 0)):
        succeed(server.run(*words(data, **off | {"run": run, "cycles": cycles}), cwd=tmp_path))
    a, b = (tmp_path / "logs" / run for run in ("cycles", "plain"))
    assert timeless(metrics(a)) == timeless(metrics(b))
    ends = [tg.read_tensors(tg.newest_checkpoint(f) / "model.safetensors") for f in (a, b)]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[1])
    last = tg.read_tensors(score.kept_snapshots(a)[-1] / "model.safetensors")
    assert all(torch.equal(last[n], w.bfloat16()) for n, w in ends[1].items())
    assert not (b / "snapshots").exists()
