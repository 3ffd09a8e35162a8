"""
Output-embedding centering: the model family to the last parameter, the three methods, their
statistics and tables.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, alone, build, now, random_tokens, tg, tiny, write_shard

from logs import centering, embeddings, explain_centering, study
from logs.endings import UserError

SCALES = ("16m", "29m", "57m", "109m", "221m")
FAMILY = {
    "layer_norm": 1,
    "embed_norm": 0,
    "activation": "swiglu",
    "rope": "interleaved",
    "rope_dims": -1,
    "init": "xavier",
    "optimizer": "adamw",
    "rope_base": 10000.0,
    "norm_eps": 1e-5,
}


def preset(name: str, *flags: str) -> tg.Config:
    return tg.parse_args(["--config", name, *flags])


def parts(tmp_path, **changes) -> tg.Trainer:
    """Everything that train_step needs, on a little shard of random tokens."""
    if not list(tmp_path.glob("*.bin")):
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            write_shard(tmp_path / f"x_{split}_000000.bin", rng.integers(1, 80, 4097))
    cfg = tiny(data=str(tmp_path), epochs=0, **(FAMILY | changes))
    tg.validate(cfg)
    return tg.build(cfg, tg.Run(cfg))


def words(folder, **changes) -> list[str]:
    """Command line of a short run of the family on parts()' shards, called x in folder/logs."""
    short = {"steps": 3, "eval_every": 0, "epochs": 0, "export": "", "run": "x"}
    places = {"data": str(folder), "log_dir": str(folder / "logs")}
    cfg = vars(tiny(**FAMILY | short | places | changes))
    plain = {k: v for k, v in cfg.items() if type(v) in (int, float, str)}
    return [word for k, v in plain.items() for word in (f"--{k}", str(v))]


# --- the model family


@pytest.mark.parametrize(
    "name, count, width",
    [
        ("16m", 26_840_576, 768),
        ("29m", 44_735_840, 1024),
        ("57m", 81_484_320, 1280),
        ("109m", 140_599_360, 1792),
        ("221m", 262_663_648, 2304),
    ],
)
def test_a_scale_has_the_published_number_of_parameters(name, count, width):
    cfg = preset(f"centering_{name}")
    model = tg.build_model(cfg, torch.device("meta"), torch.float32, 8)
    assert sum(p.numel() for p in model.parameters()) == count
    assert tg.hidden_width(cfg) == width and tg.rotary_dims(cfg) == cfg.dim // 8
    tied = tg.build_model(
        preset(f"centering_{name}", "--tie_embed", "1"), torch.device("meta"), torch.float32, 8
    )
    # its name
    assert round(sum(p.numel() for p in tied.parameters()) / 1e6) in (
        int(name[:-1]),
        int(name[:-1]) - 1,
    )


def test_initial_values_are_xavier_normal_and_gains_one():
    """
    At d = 224 with the full head; the specs give the standard deviations of all but the input of
    the other half.
    """
    cfg = preset("centering_16m", "--depth", "6")
    model = tg.build_model(cfg, torch.device("meta"), torch.float32, 8)
    said = tg.declarations(model)
    p = {
        n: tg.initial_value(n, said[n], t.shape, cfg.seed)
        for n, t in model.named_parameters()
        if ".1." in n or "blocks" not in n
    }
    expected = {
        "head": 0.00629,
        "embed": 0.0668,
        "blocks.1.attn.qkv": 0.0472,
        "blocks.1.mlp.fc": 0.0449,
        "blocks.1.mlp.proj": 0.0449,
        "blocks.1.attn.proj": 0.00577,
    }
    for name, std in expected.items():
        assert p[name].std().item() == pytest.approx(std, rel=0.006), name
        assert p[name].abs().max() > 3.5 * std, f"{name} is not normal"
    for name in p.keys() - expected.keys():
        assert torch.equal(p[name], torch.ones_like(p[name])), name


@pytest.mark.parametrize(
    "step, rate", [(0, 5.9988e-5), (4999, 0.29994), (5000, 0.3), (52500, 0.150005), (100000, 1e-5)]
)
def test_the_learning_rate_is_the_originals(step, rate):
    cfg = preset("centering_16m", "--lr", f"0:1/5001 0.05>1 1~{1e-5 / 0.3}")
    assert 0.3 * tg.Plan(cfg).at(step, step / cfg.steps).lr == pytest.approx(rate, rel=1e-4)


def test_learning_rates_sum_to_the_published_total():
    cfg = preset("centering_16m", "--lr", "0:1/5001 0.05>1 1~0.0001")
    sched = tg.Schedule("lr", cfg.lr)
    assert 0.1 * sum(sched.at(s, s / 100000) for s in range(100000)) == pytest.approx(
        5000.5, abs=0.05
    )


@pytest.mark.parametrize("name", SCALES)
def test_a_preset_has_the_originals_settings(name):
    cfg = preset(f"centering_{name}")
    assert cfg.adamw_lr == cfg.embed_lr == cfg.head_lr == cfg.scalar_lr == cfg.tied_lr
    assert cfg.adamw_lr * tg.Schedule("lr", cfg.lr).at(100000, 1.0) == pytest.approx(1e-5)
    assert tg.Plan(cfg).tokens() == 13_107_200_000 and cfg.steps == 100_000
    assert (cfg.beta1, cfg.beta2, cfg.adam_eps, cfg.grad_clip) == (0.9, 0.95, 1e-8, 1.0)
    assert {
        cfg.matrix_wd,
        cfg.embed_wd,
        cfg.scalar_wd,
        cfg.tie_embed,
        cfg.mu_loss,
        cfg.z_loss,
        cfg.mu_centering,
    } == {0}


@pytest.mark.parametrize(
    "batch, most, micro",
    [(64, 48, 16), (64, 24, 16), (64, 16, 16), (256, 48, 32), (48, 12, 12), (96, 20, 12)],
)
def test_the_automatic_micro_batch_is_the_originals(batch, most, micro):
    """On 4 GPUs, in rows of 2,048."""
    cfg = preset(
        "centering_16m", "--batch_tokens", str(batch * 2048), "--micro_tokens", str(most * 2048)
    )
    plan = tg.Plan(cfg)
    assert plan.micro_rows(plan.moments()[0], 4) == micro


def test_a_batch_that_does_not_divide_is_refused_under_an_automatic_micro_batch():
    cfg = preset("centering_16m", "--batch_tokens", str(3 * 2048))
    with pytest.raises(tg.UserError, match="does not divide"):
        tg.Plan(cfg).train_shapes(4)


def textbook(model: tg.GPT, tokens: torch.Tensor) -> torch.Tensor:
    """
    The family in other words: complex rotation of neighbours, SDPA, nn.functional throughout. [B,
    T, D]
    """
    cfg, w = model.cfg, {n: p.detach() for n, p in model.named_parameters()}
    B, T = tokens.shape
    H, K = cfg.heads, cfg.dim // cfg.heads
    R = K // 2
    ln = lambda x, g: F.layer_norm(x, x.shape[-1:], g, None, 1e-5)
    angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, R, 2) / R))
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def rotary(x):
        pairs = torch.view_as_complex(x[..., :R].unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.cat([torch.view_as_real(pairs).flatten(-2), x[..., R:]], -1)

    x = w["embed"][tokens]
    for i in range(cfg.depth):
        b = lambda leaf: w[f"blocks.{i}.{leaf}"]  # noqa: B023
        q, k, v = (
            (ln(x, b("gains")[0]) @ b("attn.qkv").flatten(0, 1).T).view(B, T, 3, H, K).unbind(2)
        )
        q, k = rotary(ln(q, b("attn.qk_gains")[0])), rotary(ln(k, b("attn.qk_gains")[1]))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ b("attn.proj").T
        h = ln(x, b("gains")[1])
        x = x + (F.silu(h @ b("mlp.fc")[0].T) * (h @ b("mlp.fc")[1].T)) @ b("mlp.proj").T
    return ln(x, w["final_gain"])


def test_the_family_computes_what_the_textbook_does():
    """
    LayerNorm and its gains, also before the rotation of q and k, half of each head turning, SwiGLU.
    """
    cfg = tiny(**FAMILY, doc_mask=0)
    model = build(cfg)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gain" in name:  # large ones, so that scores get large as well
                p.copy_(3 * torch.randn(p.shape, generator=rng))
            elif name.endswith("attn.proj"):
                p.mul_(50)
    x, _ = random_tokens(cfg, 3, 32)
    assert torch.allclose(model.hidden(x, 1, 0), textbook(model, x), atol=2e-5)


def test_half_of_a_head_turns_and_half_stands_still():
    cfg = tiny(**FAMILY)
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 32, 2, 16, generator=rng).unbind(0)
    turned = tg.rotate(tg.half_split(q, 8), *tg.rope_table(cfg, 32))
    assert torch.equal(turned[..., 8:], q[..., 8:]) and not torch.allclose(
        turned[:, 1:, :, :8], q[:, 1:, :, :8]
    )
    same = lambda x: tg.rotate(
        tg.half_split(x[:, :1].expand(-1, 32, -1, -1), 8), *tg.rope_table(cfg, 32)
    )
    scores = torch.einsum("bthk,bshk->bhts", same(q), same(k))
    for h in range(2):  # of one vector everywhere, products depend on the distance alone
        assert torch.allclose(scores[0, h, 1:, 1:], scores[0, h, :-1, :-1], atol=1e-4)


def test_gains_have_adamw_and_no_decay():
    cfg = tiny(**FAMILY | {"optimizer": "muon"}, matrix_wd=0.1, embed_wd=0.1)
    for b in tg.param_buckets(cfg, build(cfg), alone()):
        gains = ["gain" in name for name in b.params]
        assert all(gains) and b.rule.kind == "adamw" and b.rule.wd == 0 or not any(gains)


def test_independent_decay_does_not_follow_the_learning_rate():
    for lr in (1.0, 0.01, 0.0):
        cfg = tiny(**FAMILY, matrix_wd=1e-2, embed_wd=1e-2, scalar_wd=0.0, independent_wd=1)
        model = build(cfg)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        tg.MuonAdamW(cfg, model, alone()).step(now(lr=lr))  # no gradient: nothing but decay
        for name, p in model.named_parameters():
            assert torch.allclose(
                p, before[name] * (1 if "gain" in name else 1 - 1e-2), atol=1e-7
            ), (lr, name)


@pytest.mark.parametrize(
    "changes", [{"rope_dims": 7}, {"rope_dims": 18}, {"rope_dims": -2}], ids=str
)
def test_impossible_rotary_dims_are_refused(changes):
    with pytest.raises(tg.UserError, match="rope_dims"):
        tg.validate(tiny(**changes))


def test_a_cosine_is_half_a_cosine():
    sched = tg.Schedule("lr", "0:1 0.2>3 1~1")
    assert [sched.at(0, f) for f in (0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([1, 2, 3, 2, 1])
    assert sched.at(0, 0.4) == pytest.approx(2 + math.cos(math.pi / 4))
    with pytest.raises(tg.UserError, match="window"):
        tg.Schedule("window", "1 1~2").require_plateaus()


# --- the three methods


def shifted(seed: int = 0):
    """Hidden states, a head with a mean row, targets, in fp64."""
    rng = torch.Generator().manual_seed(seed)
    x, e = (torch.randn(n, 8, generator=rng, dtype=torch.float64) for n in (50, 300))
    return x, e + 3, torch.randint(300, (50,), generator=rng)


def test_centering_changes_no_loss_and_leaves_no_mean():
    x, e, y = shifted()
    mu = e.mean(0)
    assert torch.allclose((x @ e.T).mean(-1), x @ mu)  # the mean logit is mu . h
    centred = e.float()
    tg.center(centred)
    assert centred.mean(0).abs().max() < 1e-6 and torch.allclose(
        centred.double(), e - mu, atol=1e-6
    )
    assert torch.allclose(
        F.cross_entropy(x @ e.T, y), F.cross_entropy(x @ centred.double().T, y), atol=1e-6
    )
    once = centred.clone()
    tg.center(centred)
    assert torch.allclose(once, centred, atol=1e-6)
    for size in (0.006, 0.3):  # the head's start, and the largest step of a sweep
        rows = (0.1 * (e - 3) + size).float()
        tg.center(rows)
        assert rows.mean(0, dtype=torch.float64).abs().max() < 1e-7


def test_a_centered_run_keeps_to_the_baseline_but_for_the_mean_row(tmp_path):
    """
    train_step itself in fp64, clipped and decayed: 100 losses, and the head but for its mean row.
    """
    told = []
    torch.set_default_dtype(torch.float64)
    try:
        with explain_centering.in_float64():
            for on in (0, 1):
                p = parts(
                    tmp_path,
                    mu_centering=on,
                    grad_clip=1.0,
                    embed_wd=0.1,
                    matrix_wd=0.1,
                    beta1=0.9,
                    adam_eps=1e-8,
                    **dict.fromkeys(("adamw_lr", "embed_lr", "head_lr", "scalar_lr"), 0.01),
                )
                for q in p.model.parameters():
                    q.data = q.data.double()
                p.model.dtype = p.run.dtype = torch.float64
                p.opt = tg.MuonAdamW(p.cfg, p.model, p.run)
                losses = [tg.train_step(p, step, now())[0].item() for step in range(100)]
                told.append((losses, p.model.head.detach()))
    finally:
        torch.set_default_dtype(torch.float32)
    (a, plain), (b, centred) = told
    assert a[0] - a[-1] > 0.05 and max(abs(x - y) for x, y in zip(a, b)) < 1e-10
    assert (plain - plain.mean(0) - centred).abs().max() < 1e-10 < 1e-3 < plain.mean(0).norm()


def test_mu_loss_has_autograds_gradient():
    head = torch.nn.Parameter(shifted()[1].float())
    judged = head.detach().clone().double().requires_grad_()
    (1000 * judged.mean(0).square().sum()).backward()
    head.grad = torch.zeros_like(head)
    # four ranks, whose gradients are summed
    value = sum(tg.add_mu_loss(head, 1000.0, 4) for _ in range(4)) / 4
    assert torch.allclose(head.grad.double(), judged.grad, rtol=1e-5)
    assert torch.allclose(head.grad[0].double(), 2 * 1000 * judged.mean(0) / 300, rtol=1e-5)
    assert value.item() == pytest.approx(1000 * judged.mean(0).square().sum().item(), rel=1e-5)


def test_mu_loss_has_the_gradient_of_finite_differences():
    rng = torch.Generator().manual_seed(0)
    head = torch.nn.Parameter(torch.randn(7, 3, generator=rng, dtype=torch.float64))
    head.grad = torch.zeros_like(head)
    with explain_centering.in_float64():
        tg.add_mu_loss(head, 3.0, 1, 6)  # of the first six rows
        got, head.grad = head.grad, torch.zeros_like(head)
        for i, j in np.ndindex(7, 3):
            values = []
            for shift in (1e-5, -2e-5):
                head.data[i, j] += shift
                values.append(tg.add_mu_loss(head, 3.0, 1, 6).item())
            head.data[i, j] += 1e-5
            assert got[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-8)
    assert got[6].abs().max() == 0 < got[0].abs().min()


def test_z_loss_has_the_gradient_of_its_formula(tmp_path):
    p = parts(tmp_path, z_loss=0.5)
    x, y = random_tokens(p.cfg, 2, 32)
    p.opt.buckets[0].grads.zero_()
    terms = tg.loss_terms(p, x, y, now())
    logits = p.model.logits(p.model.hidden(x, 1, 0)).flatten(0, 1).detach().requires_grad_()
    assert terms[0].item() == pytest.approx(
        F.cross_entropy(logits, y.flatten(), reduction="sum").item(), rel=1e-5
    )
    log_z = logits.double().exp().sum(-1).log()
    assert terms[1].item() == pytest.approx(0.5 * log_z.square().sum().item(), rel=1e-5)
    # through the model; d/dlogits = 2 * weight * logZ * softmax, so d/dhead = that^T @ h
    terms[1].backward()
    by_logit = 2 * 0.5 * log_z[:, None] * logits.double().softmax(-1)
    hidden = p.model.hidden(x, 1, 0).flatten(0, 1).double()
    assert torch.allclose(p.model.head.grad.double(), by_logit.T @ hidden, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", [tg.LossAndLogZ.apply, tg.plain_loss_and_log_z], ids=["cpu", "gpu"])
def test_loss_and_log_z_in_one_pass_are_autograds(way):
    """Values and gradients, an ignored target included, against cross_entropy and logsumexp."""
    rng = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(20, 30, generator=rng, dtype=torch.float64)).requires_grad_()
    targets, weight = (
        torch.randint(30, (20,), generator=rng),
        torch.randn(2, 20, generator=rng, dtype=torch.float64),
    )
    targets[3] = -1
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    judged = torch.stack([loss, logits.logsumexp(-1) * (targets >= 0)])
    got = way(logits, targets)
    assert torch.allclose(got, judged)
    (a,), (b,) = (torch.autograd.grad((weight * out.sin()).sum(), logits) for out in (got, judged))
    assert torch.allclose(a, b)


def test_z_loss_of_equal_logits_is_the_square_of_ln_v():
    cfg = tiny(**FAMILY, vocab=50304)
    model = build(cfg)
    model.head.data.zero_()
    losses, log_z = model(*random_tokens(cfg, 1, 4), log_z=True)
    assert log_z.square().mean().item() == pytest.approx(117.2, abs=0.05)
    assert losses.mean().item() == pytest.approx(math.log(50304), abs=1e-4)


METHODS = [
    {"z_loss": 1e-2},
    {"mu_loss": 10.0},
    {"mu_centering": 1},
    {"z_loss": 1e-2, "mu_loss": 10.0, "mu_centering": 1},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_micro_batches_and_chunks_count_a_term_once(tmp_path, method):
    """
    One micro-batch against four, and logits in chunks: the same loss, terms, gradient norm and
    weights.
    """
    told = []
    for sizes in ({}, {"micro_tokens": 32}, {"loss_chunk": 32}):
        p = parts(tmp_path, **method, **sizes)
        steps = [tg.train_step(p, s, now()) for s in range(2)]
        told.append(
            (
                [torch.cat([loss, size.view(1)]) for loss, size in steps],
                p.model.head.detach().clone(),
            )
        )
    for steps, head in told[1:]:
        for a, b in zip(steps, told[0][0]):
            assert torch.allclose(a, b, rtol=1e-4) and len(a) == 2 + len(tg.extra_terms(p.cfg))
        assert torch.allclose(head, told[0][1], atol=2e-3)


def test_the_reported_loss_is_the_cross_entropy_alone(tmp_path):
    plain, extra = parts(tmp_path), parts(tmp_path, z_loss=1.0, mu_loss=1e4)
    (loss,), _ = tg.train_step(plain, 0, now())
    (same, z, mu), _ = tg.train_step(extra, 0, now())
    assert same.item() == pytest.approx(loss.item(), rel=1e-6) and z > 1 and mu > 1


def test_no_mean_row_is_left_after_a_step(tmp_path):
    p, plain = parts(tmp_path, mu_centering=1, head_lr=0.1), parts(tmp_path, head_lr=0.1)
    for step in range(3):
        tg.train_step(p, step, now())
        tg.train_step(plain, step, now())
    assert p.model.head.mean(0).norm() < 1e-7 < 0.01 < plain.model.head.mean(0).norm()
    names = {n for b in p.opt.buckets for n in b.params if n == "head"}
    # the optimizer sees it
    assert names and p.model.head.data_ptr() in {b.weights.data_ptr() for b in p.opt.buckets}


def test_padding_rows_without_logits_count_not_in_the_mean(tmp_path):
    """
    Under pad_vocab the head has rows that nothing ever sees; a number in them must change nothing.
    """
    told = []
    for junk in (0.0, 5.0):
        p = parts(
            tmp_path,
            mu_centering=1,
            mu_loss=10.0,
            pad_vocab=1,
            vocab=80,
            head_multiple=64,
            doc_token=0,
        )
        assert (len(p.model.head), p.model.logit_rows) == (128, 80)
        with torch.no_grad():
            p.model.head[80:] = junk
        loss, _ = tg.train_step(p, 0, now())
        values, _ = embeddings.statistics(p.model, None, None, 0)
        told.append((loss.tolist(), p.model.head[:80].detach().clone(), values))
        assert p.model.head[:80].mean(0).norm() < 1e-7 and values["O.ratio norm"] < 1e-6
        assert (p.model.head[80:] - junk).abs().max() < 1e-6
    assert (
        told[0][0] == told[1][0]
        and torch.equal(told[0][1], told[1][1])
        and told[0][2] == told[1][2]
    )


def test_terms_are_logged_under_their_names_beside_the_loss(tmp_path, monkeypatch):
    parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert tg.main(words(tmp_path, lr="1e-3", z_loss=1e-4, mu_loss=1e-4)) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "logs/x/metrics.jsonl").read_text().splitlines()
    ]
    assert all(
        {"train_loss", "z_loss", "mu_loss"} <= line.keys()
        for line in lines
        if line["kind"] == "train"
    )
    result = json.loads((tmp_path / "logs/x/result.json").read_text())
    assert result["val_loss"] == pytest.approx(math.log(96), abs=0.3)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mu_centering": 1, "tie_embed": 1}, ["tied table"]),
        ({"mu_loss": 1.0, "softcap": 15.0, "tie_embed": 1}, ["tied table", "softcap"]),
        ({"z_loss": 1.0, "softcap": 15.0}, ["softcap"]),
        ({"mu_centering": 1, "optimizer": "muon"}, ["Muon"]),
        ({"z_loss": 1.0, "tie_embed": 1}, []),
        ({"mu_centering": 1, "mu_loss": 1.0}, []),
        ({"tie_embed": 1, "softcap": 15.0, "optimizer": "muon"}, []),
    ],
    ids=str,
)
def test_a_notice_stands_where_theory_has_doubts(changes, words):
    told = tg.centering_notices(tiny(**FAMILY | changes))
    assert len(told) == len(words) and all(w in line for w, line in zip(words, told))


@pytest.mark.parametrize(
    "changes", [{"z_loss": -1.0}, {"mu_loss": -1.0}, {"mlp_multiple": 0}, {"init": "he"}], ids=str
)
def test_an_impossible_switch_is_refused(changes):
    with pytest.raises(tg.UserError, match=next(iter(changes))):
        tg.validate(tiny(**changes))


# --- statistics


def test_streamed_statistics_are_those_of_all_logits_at_once():
    """Against numpy on the whole matrix, fed in pieces of unequal size."""
    rng = np.random.default_rng(0)
    logits, hidden = 3 * rng.standard_normal((50, 40)) + 2, rng.standard_normal((50, 8))
    seen = embeddings.LogitStatistics()
    for low, high in ((0, 1), (1, 30), (30, 50)):
        seen.add(torch.from_numpy(logits[low:high]), torch.from_numpy(hidden[low:high]))
    got, mean = seen.result()
    log_z = np.log(np.exp(logits).sum(1))
    means, deviations, sizes = logits.mean(1), logits.std(1, ddof=1), np.abs(logits)
    expected = {
        "O.logits_mean_mean": means.mean(),
        "O.logits_mean_std": deviations.mean(),
        "O.logits_std_mean": means.std(ddof=1),
        "O.logits_std_std": deviations.std(ddof=1),
        "O.logits_mean_absmean": sizes.mean(),
        "O.logits_mean_absmax": sizes.max(1).mean(),
        "H.mean_logsqZ": (log_z**2).mean(),
    }
    assert got == pytest.approx(expected)
    assert np.allclose(mean, hidden.mean(0))


@pytest.mark.parametrize("asked, used", [(100, 100), (32, 32), (10**6, 4096)])
def test_statistics_are_of_the_tokens_that_they_say(tmp_path, asked, used):
    """Rows of 32 tokens in batches of 4: exactly the first 100, or all there are."""
    p = parts(tmp_path)
    got, count = embeddings.statistics(p.model, p.val, p.plan.eval_shape(now()), asked)
    x = torch.from_numpy(p.val.tokens[:-1].astype(np.int64)).view(-1, 32)
    logits = p.model.logits(p.model.hidden(x, 1, 0)).detach().flatten(0, 1)[:used]
    assert count == used and got["O.logits_mean_absmax"] == pytest.approx(
        logits.abs().amax(-1).mean().item(), rel=1e-5
    )


def test_a_negative_number_of_tokens_is_refused(tmp_path, capsys):
    assert embeddings.main([str(tmp_path), "--tokens", "-5"]) == 2
    assert capsys.readouterr().err.startswith("error: --tokens -5: ")


def test_embeddings_without_a_run_says_what_to_do(capsys):
    assert embeddings.main([]) == 2 and "usage" in capsys.readouterr().err


def test_statistics_of_rows_and_spectrum_are_numpys():
    rng = np.random.default_rng(1)
    e = rng.standard_normal((60, 8)) + 0.5
    got, mu = embeddings.row_statistics(torch.from_numpy(e)), e.mean(0)
    norms, dots = np.linalg.norm(e, axis=1), e @ mu
    assert got["ratio norm"] == pytest.approx(np.linalg.norm(mu) / norms.mean())
    assert (got["max norm"], got["min norm"]) == pytest.approx((norms.max(), norms.min()))
    assert (got["max aligndot"], got["min aligndot"]) == pytest.approx((dots.max(), dots.min()))
    # the average product is |mu|^2
    assert got["avg aligndot"] == pytest.approx(got["mu norm"] ** 2)
    assert got["max aligncos"] == pytest.approx((dots / norms / np.linalg.norm(mu)).max())
    below, above = mu @ mu - dots.min(), dots.max() - mu @ mu
    centred = (e - mu) @ mu  # B_ratio in other words: |projections| behind over before
    assert got["centering_ratio"] == pytest.approx(
        np.abs(centred).max() / max(dots.max(), -dots.min())
    )
    assert max(below, above) == pytest.approx(np.abs(centred).max())
    s = np.linalg.svd(e, compute_uv=False)
    spectrum = embeddings.spectrum(torch.from_numpy(e))
    assert (spectrum["Smin"], spectrum["Smax"]) == pytest.approx((s[-1], s[0])) and 0 < spectrum[
        "isotropy of both signs"
    ] < 1
    # exp() alone would overflow
    huge = embeddings.spectrum(torch.from_numpy(e * 200))["isotropy of both signs"]
    assert math.isfinite(huge)
    e[3, 3] = math.inf
    assert math.isnan(embeddings.spectrum(torch.from_numpy(e))["Smin"])  # LAPACK would raise


def test_b_ratio_is_the_published_one_and_never_zero_by_zero():
    assert embeddings.b_ratio(4.894, -2.914, 9.550) == pytest.approx(0.818, abs=5e-4)
    e = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    tg.center(e)
    assert (
        embeddings.row_statistics(e.double())["centering_ratio"] == 1
        and embeddings.b_ratio(0.0, 0.0, 0.0) == 1
    )


def test_statistics_are_logged_and_those_of_the_weights(tmp_path, monkeypatch, capsys):
    """
    A run that logs them, then the command on its checkpoint: the same numbers, from what is saved.
    """
    p = parts(tmp_path, mu_centering=0)
    monkeypatch.chdir(tmp_path)
    assert tg.main(words(tmp_path, lr="1e-2", embed_stats=4096)) == 0
    logged = [json.loads(line) for line in Path("logs/x/metrics.jsonl").read_text().splitlines()][
        -1
    ]
    assert embeddings.embeddings(embeddings.EmbeddingOptions(("logs/x",), tokens=4096)) == 0
    told = json.loads(Path("logs/x/ckpt/000003/embeddings.json").read_text())
    assert "O.ratio norm" in capsys.readouterr().out.replace("ratio norm", "O.ratio norm")
    shared = [k for k in told if k in logged]
    assert set(shared) >= {"O.mu norm", "O.ratio norm", "O.logits_mean_mean", "H.mean_logsqZ"}
    assert all(told[k] == pytest.approx(logged[k], rel=1e-4, abs=1e-6) for k in shared)
    # mu . mean(h)
    assert told["O.fhs_dot_prod"] == pytest.approx(told["O.logits_mean_mean"], rel=1e-3, abs=1e-5)
    assert told["OC.mu norm"] < 1e-12 and {"O.isotropy of both signs", "I.Smax"} <= told.keys()
    assert p.cfg.dim == 32


# --- explanation


@pytest.mark.parametrize(
    "name", ["AdamW, untied", "with decoupled decay 0.1", "without clipping", "Muon on the blocks"]
)
def test_centering_changes_no_loss_in_exact_arithmetic(name):
    loss, head = explain_centering.no_op(explain_centering.NO_OP[name], steps=40)
    assert loss < 1e-12 and head < 1e-12


@pytest.mark.parametrize("name", ["tied table", "z-loss 1e-2", "softcap 15"])
def test_centering_changes_losses_where_it_is_not_free(name):
    assert explain_centering.no_op(explain_centering.NO_OP[name], steps=15)[0] > 1e-5


def test_that_centering_is_a_no_op_holds_for_other_optimizers_as_well():
    """The same of a bigram model under torch.optim.AdamW, clipped and decayed, in fp64."""
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(n, 8, generator=rng, dtype=torch.float64) for n in (60, 60)]
    told = []
    for on in (False, True):
        embed, head = (torch.nn.Parameter(t.clone()) for t in start)
        optimizer = torch.optim.AdamW([embed, head], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
        rng.manual_seed(1)
        for _ in range(100):
            x, y = torch.randint(50, (2, 64), generator=rng)
            loss = F.cross_entropy(F.layer_norm(embed[x], (8,)) @ head.T, y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([embed, head], 1.0)
            optimizer.step()
            if on:
                tg.center(head.data)
            told.append(loss.item())
    # center() takes the mean in fp32, which makes no difference: any shift is invisible
    assert max(abs(a - b) for a, b in zip(told[:100], told[100:])) < 1e-12


def test_rounding_of_shifted_logits_costs_what_the_specs_say():
    """
    Section 0.2, at 10 %: .001, .008, .14, .5, 1.83, the first two to the digits that it gives. And
    another computation, also at 10 %: in numpy, rounding to 8 significant bits, which is what
    bfloat16 has.
    """
    offsets = (16.5, 92.5, 270.0, 588.0, 1152.0)
    got = explain_centering.rounding_curve(offsets, tokens=256)
    assert got[0] == pytest.approx(0.001, abs=1e-3) and got[1] == pytest.approx(0.008, abs=1e-3)
    assert got[2:] == pytest.approx([0.14, 0.5, 1.83], rel=0.1)
    logits = 4.7 * np.random.default_rng(0).standard_normal((48, 50304))

    def log_softmax(z):
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    exact = log_softmax(logits)
    for c, rise in zip(offsets, got):
        power = 2.0 ** (np.floor(np.log2(np.abs(logits + c))) - 7)
        rounded = log_softmax(np.round((logits + c) / power) * power)
        assert (np.exp(exact) * (exact - rounded)).sum(1).mean() == pytest.approx(rise, rel=0.1), c


def test_centering_recovers_what_rounding_took():
    of = explain_centering.small_subject(40, 32)
    calm, wild = (explain_centering.stress(of, c) for c in (0.0, 588.0))
    assert wild["fp32"] == pytest.approx(calm["fp32"], abs=1e-3)
    assert wild["bf16 logits"] > calm["fp32"] + 0.1 and wild["all bf16"] > calm["fp32"] + 0.1
    assert wild["all bf16, centred"] == pytest.approx(calm["fp32"], abs=0.01)


def train_a_run(tmp_path, **changes) -> str:
    """The folder of a short run of the family."""
    parts(tmp_path)
    assert tg.main(words(tmp_path, lr="1e-2", **changes)) == 0
    return str(tmp_path / "logs" / "x")


def test_the_explanation_stresses_the_model_that_the_run_has(tmp_path):
    """
    A run with loops, windows, scaled logits and rows without logits: a shift changes no loss, so it
    is the run's own.
    """
    run = train_a_run(
        tmp_path,
        loop="0:1",
        repeats="0:1 0.5:3",
        window="5",
        logit_dim_power=-0.5,
        pad_vocab=1,
        vocab=80,
        head_multiple=64,
        init="remix",
        head_init="0.5",
        proj_init=1.0,
    )
    of = explain_centering.subject(explain_centering.ExplainOptions(run, tokens=10**6))
    own = json.loads((Path(run) / "result.json").read_text())["val_loss"]
    for offset in (0.0, 16.5):
        assert explain_centering.stress(of, offset)["fp32"] == pytest.approx(own, abs=2e-5)
        assert of.factor() * (of.hidden @ of.head(offset).T).mean().item() == pytest.approx(
            offset, abs=1e-3
        )


def test_the_explanation_refuses_capped_logits(tmp_path):
    with pytest.raises(tg.UserError, match="softcap = 15"):
        explain_centering.subject(
            explain_centering.ExplainOptions(train_a_run(tmp_path, softcap=15.0))
        )


def test_muon_and_sgd_on_the_head_leave_the_mean_row():
    found = explain_centering.head_optimizers(steps=30)
    start = found["at the start"][0]
    assert found["SGD"][0] == pytest.approx(start, rel=1e-9) and found["Muon"][0] == pytest.approx(
        start, rel=0.02
    )
    assert found["AdamW"][0] > 3 * start


# --- sweep and tables

PUBLISHED = {  # (least loss, sensitivity with n - 1) of 16M, 29M, 57M, 109M, 221M: specs, T1 and T2
    "baseline": ((3.841, 0.306), (3.591, 0.391), (3.369, 0.508), (3.202, 0.344), (3.05, 0.412)),
    "z_loss": ((3.836, 0.054), (3.58, 0.033), (3.366, 0.235), (3.202, 0.118), (3.049, 0.109)),
    "mu_loss": ((3.839, 0.031), (3.586, 0.027), (3.369, 0.031), (3.202, 0.046), (3.05, 0.056)),
    "mu_centering": ((3.842, 0.028), (3.582, 0.029), (3.366, 0.041), (3.201, 0.051), (3.05, 0.061)),
    "mu_loss_1e-7": ((3.84, 0.182), (3.588, 0.052), (3.369, 0.11), (3.203, 0.125), (3.048, 0.129)),
    "mu_loss_1e-1": ((3.837, 0.031), (3.578, 0.034), (3.368, 0.038), (3.2, 0.048), (3.049, 0.056)),
    "mu_loss_1e+2": ((3.811, 0.054), (3.561, 0.04), (3.362, 0.033), (3.198, 0.034), (3.046, 0.055)),
    "z_loss_1e-7": ((3.844, 0.037), (3.587, 0.044), (3.369, 0.107), (3.202, 0.076), (3.049, 0.131)),
    "z_loss_1e-1": ((3.835, 0.032), (3.574, 0.043), (3.349, 0.047), (3.184, 0.059), (3.034, 0.101)),
    "z_loss_1e+2": ((4.188, 1.156), (3.937, 1.78), (3.791, 1.392), (3.644, 2.15), (3.489, 2.166)),
}


def test_the_published_tables_follow_from_the_published_losses():
    """
    The paper's own file names, its losses (T1, T2), our tables: least loss and sensitivity to three
    decimals.
    """
    groups = centering.grouped(centering.read_overview(ROOT / "tests" / "centering_published.csv"))
    assert len(groups) == 50
    for method, values in PUBLISHED.items():
        for scale, (loss, lrs) in zip(("16M", "29M", "57M", "109M", "221M"), values):
            s = centering.summary(groups[scale, method])
            assert s["loss"] == [loss] and s["lrs_n1"][0] == pytest.approx(lrs, abs=5e-4 + 1e-9), (
                method,
                scale,
            )
            assert s["lrs_n"][0] == pytest.approx(s["lrs_n1"][0] * 6 / 7)
    best = {
        m: [centering.summary(groups[s, m])["lr"][0] for s in ("16M", "29M", "57M", "109M", "221M")]
        for m in PUBLISHED
    }
    assert best["baseline"] == pytest.approx([1e-2, 3e-3, 1e-2, 3e-3, 1e-3])
    assert best["mu_centering"] == pytest.approx([1e-2, 3e-2, 1e-2, 3e-3, 3e-3])


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TINY = {
    "vocab": 96,
    "head_multiple": 32,
    "val_tokens": 1024,
    "embed_stats": 1024,
    "dim": 16,
    "depth": 1,
    "eval_every": 2,
    "batch_tokens": 256,
    "micro_tokens": 128,
}


def sweep(tmp_path, rates: str, methods: str = "*", **scales: dict) -> list[str]:
    """
    Command line of the shipped study at these learning rates, and at scales of seconds on parts()'
    shards, each with its flags over them; runs go to tmp_path/tiny.
    """
    parts(tmp_path)
    text = (ROOT / "configs" / "studies" / "centering.toml").read_text()
    scales = scales or {"one": {}}
    lines = []
    for name, flags in scales.items():
        given = ['base = ["centering_cpu"]', *(f"{k} = {json.dumps(v)}" for k, v in flags.items())]
        lines.append(f"{name} = {{ {', '.join(given)} }}")
    text = re.sub(r"^lr = \[.*\]$", f"lr = [{rates}]", text, flags=re.M)
    text, found = re.subn(r"(?:^dim\d+ = \{.*\n)+", "\n".join(lines) + "\n", text, flags=re.M)
    assert found == 1
    (tmp_path / "tiny.toml").write_text(text)
    flags = [w for k, v in (TINY | {"data": tmp_path}).items() for w in (f"--{k}", str(v))]
    common = ["--log_dir", str(tmp_path), *flags]
    return [str(tmp_path / "tiny.toml"), "--arms", f"*-{methods}", *common]


def outcomes(said: str) -> list[str]:
    """What became of each run."""
    return [line.split(": ")[1] for line in said.splitlines() if re.match(r"\d+/\d+ ", line)]


def test_a_sweep_on_two_ranks_ends_as_on_one(tmp_path):
    """
    Four runs, two of which diverge, one process group; what is over is skipped; all three methods,
    with weights that matter, give the losses, terms and gradient norms of one rank.
    """
    loud = {"terms": {"z_loss": 0.5, "mu_loss": 50}, "centered": {"mu_centering": 1}}
    argv = sweep(tmp_path, "1e-2, 1e38", "baseline", **loud)
    argv += ["--seeds", "1", "--steps", "3", "--only", "train", "--log_dir"]
    torchrun = str(Path(sys.executable).parent / "torchrun")
    ranks = [torchrun, "--standalone", "--nproc_per_node=2", "--", "logs/study.py"]
    for said in ("val_loss", "was there"):
        two = [*ranks, *argv, str(tmp_path / "two")]
        how = {"capture_output": True, "text": True, "timeout": 240, "env": ENVIRONMENT}
        done = subprocess.run(two, cwd=ROOT, **how)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout and len(done.stdout.splitlines()) == 4  # rank 0 alone speaks
    assert study.main([*argv, str(tmp_path / "one")]) == 0
    runs = sorted((tmp_path / "one" / "tiny").glob("*-s1"))
    assert [(folder / "diverged").exists() for folder in runs] == [False, False, True, True]
    keys = {"train_loss", "z_loss", "mu_loss", "grad_norm", "val_loss", "O.mu norm", "O.ratio norm"}
    for folder in runs:
        other = tmp_path / "two" / "tiny" / folder.name
        assert (folder / "diverged").exists() == (other / "diverged").exists()
        if (folder / "result.json").exists():
            one, both = (
                [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
                for f in (folder, other)
            )
            for x, y in zip(one, both, strict=True):
                for key in x.keys() & keys:
                    close = pytest.approx(x[key], rel=1e-4, abs=1e-6)
                    assert y[key] == close, (folder.name, x["step"], key)


@pytest.mark.parametrize("steps", [1, 3], ids=["by its validation loss", "by its training loss"])
def test_a_diverged_run_does_not_end_the_sweep(tmp_path, capsys, steps):
    """
    A rate that makes the weights infinite in the first step: found at the evaluation behind it, or
    in the next step.
    """
    argv = sweep(tmp_path, "1e38, 1e-2", "baseline")
    assert study.main([*argv, "--seeds", "1", "--steps", str(steps), "--only", "train"]) == 0
    first, second = outcomes(capsys.readouterr().out)
    assert first.startswith("diverged") and second.startswith("val_loss")
    why = next((tmp_path / "tiny").glob("lr1e+38*")) / "diverged"
    assert ("validation loss" if steps == 1 else "gradient norm") in why.read_text()


def test_a_run_of_other_settings_is_not_taken_for_this_one_if_finished_or_diverged(
    tmp_path, capsys
):
    for rate in ("1e-2", "1e38"):
        argv = [*sweep(tmp_path, rate, "baseline"), "--seeds", "1", "--only", "train", "--steps"]
        assert study.main([*argv, "2"]) == 0
        capsys.readouterr()
        assert study.main([*argv, "3"]) == 2
        assert "steps: 2 -> 3" in capsys.readouterr().err
        assert study.main([*argv, "2"]) == 0 and "was there" in capsys.readouterr().out
        # the tables read these, so they are a setting here
        assert study.main([*argv, "2", "--embed_stats", "512"]) == 2


def test_a_sweep_has_one_rate_for_all_weights_and_refuses_others(tmp_path, capsys):
    said = study.read_study("centering")
    arm = study.all_arms(said)["lr0.1-dim64-baseline"]
    muon = study.Study("x", said, {arm.name: arm}, [1], ["--optimizer", "muon"], [], Path("logs"))
    cfg = muon.config(arm.name, 1)
    assert {b.rule.lr for b in tg.param_buckets(cfg, build(cfg), alone())} == {0.1}
    warm, peak, low = cfg.lr.split()
    assert (warm, peak) == ("0:1/16", "0.05>1") and float(low[2:]) == pytest.approx(1e-5 / 0.1)
    for other in (
        {"own_lr": "head=0.1"},
        {"slow": "embed", "slow_lr": "0.5"},
        {"lr_cycles": 1, "epochs": 1},
    ):
        argv = sweep(tmp_path, "1e-2", odd=other)
        assert study.main([*argv, "--only", "get"]) == 2
        assert f"odd-baseline: {next(iter(other))} = " in capsys.readouterr().err


def test_mu_losses_weight_is_the_papers_scaled_to_the_rows_of_the_head():
    said = study.read_study("centering")
    arm = study.all_arms(said)["lr0.1-dim64-mu_loss_1e-1"]
    for vocab, rows in (("4096", 4096), ("4097", 4224)):
        more = ["--vocab", vocab]
        cfg = study.Study("x", said, {arm.name: arm}, [1], more, [], Path("logs")).config(
            arm.name, 1
        )
        assert cfg.mu_loss == pytest.approx(0.1 * rows / 50304, rel=1e-10)


def row(scale: str, method: str, lr: float, seed: int = 1, loss: float = 5.0, **more) -> dict:
    """A line of an overview; one that diverged has neither size nor statistics."""
    params = {"small": 1e5, "middle": 4e5, "large": 2e6}[scale]
    ratio, mu = (0.0, 1e-9) if method == "mu_centering" else (0.7, 40 * lr)
    return {
        "name": f"{scale}-{method}-lr{lr}-s{seed}",
        "scale": scale,
        "method": method,
        "lr": lr,
        "seed": seed,
        "params": params,
        "initial_loss": 7.0,
        "test_loss": loss,
        "time": 3.0,
        "O.ratio norm": ratio,
        "O.mu norm": mu,
    } | more


LOST = {"test_loss": math.inf, "params": "", "time": "", "O.ratio norm": "", "O.mu norm": ""}


def columns(text: str) -> list[dict]:
    """A table's lines by column; cells hold single spaces at most."""
    heads, *lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return [dict(zip(heads, line, strict=True)) for line in lines]


def test_a_diverged_run_counts_in_the_tables(tmp_path):
    """
    One run of four, all of a method, all of a scale; tables, figure, and what was written read
    back.
    """
    rows = [
        row("small", m, lr, s, 5 + lr)
        for m in ("baseline", "mu_centering")
        for lr in (0.01, 0.1)
        for s in (1, 2)
    ]
    rows[0] |= LOST
    rows += [row("small", "z_loss", lr) | LOST for lr in (0.01, 0.1)]
    rows += [row("large", "baseline", lr) | LOST for lr in (0.01, 0.1)]
    centering.write_overview(rows, tmp_path / "x.csv")
    assert centering.tables(centering.Tables(str(tmp_path / "x.csv"), str(tmp_path))) == 0
    found = centering.sections(centering.read_overview(tmp_path / "x.csv"))
    main = {
        (r["scale"], r["method"]): r
        for r in columns(found["Optimal loss and sensitivity to the learning rate"])
    }
    told = {k: (r["diverged"], r["LRS /(n-1)"]) for k, r in main.items()}
    assert told["small", "mu_centering"] == ("0", "0.090 (0.000)") and told[
        "small", "baseline"
    ] == ("1", "0.995 (1.280)")
    # not 0, as if no rate were worse than the best
    assert told["small", "z_loss"] == told["large", "baseline"] == ("2", "nan")
    assert main["small", "z_loss"]["optimal lr"] == "-"
    loss = {(r["scale"], r["method"]): r["0.01"] for r in columns(found["Test loss"])}
    assert loss["small", "baseline"] == "5.010 !1" and loss["large", "baseline"] == "!1"


def test_a_sensitivity_over_fewer_rates_says_so():
    """In the middle of a sweep: mu_centering has two of three rates, seed 2 of the baseline one."""
    rows = [row("small", "baseline", lr) for lr in (0.01, 0.1, 1.0)] + [
        row("small", "mu_centering", lr) for lr in (0.01, 0.1)
    ]
    rows += [row("small", "baseline", 0.01, 2)]
    main = {
        r["method"]: r
        for r in columns(
            centering.sections(rows)["Optimal loss and sensitivity to the learning rate"]
        )
    }
    assert (main["baseline"]["rates"], main["baseline"]["n"]) == ("3", "1") and main[
        "mu_centering"
    ]["rates"] == "2 of 3!"


def test_the_figure_shows_zeros_sensitivities_and_sizes(tmp_path):
    """
    |mu| of centred rows is 0 on a logarithm; three sizes make the sensitivity's axes logarithms,
    whose limit is not 0.
    """
    rows = [
        row(scale, m, lr, s, 5 + lr * s)
        for scale in ("small", "middle", "large")
        for m in ("baseline", "mu_centering")
        for lr in (0.01, 0.1)
        for s in (1, 2)
    ]
    figure = centering.draw(rows, tmp_path / "x.png")
    axes = {ax.get_ylabel(): ax for ax in figure.axes if ax.get_ylabel()}
    mu, lrs, gap = (
        axes["|mu|"],
        axes["sensitivity to the learning rate"],
        axes["test loss less the baseline's"],
    )
    low, high = mu.get_ylim()
    assert mu.get_yscale() == "symlog" and low < 0 < 4 < high
    assert {line.get_label() for line in mu.lines} == {"baseline", "mu_centering"}
    assert lrs.get_yscale() == "log" and lrs.get_ylim()[0] > 0
    assert [t.get_text() for t in lrs.get_xticklabels()] == ["0.1", "0.4", "2"]
    assert all(x.get_segments() for x in lrs.collections)  # spread over seeds
    assert [list(line.get_ydata()) for line in gap.lines if line.get_label() == "mu_centering"] == [
        [0.0, 0.0]
    ]
    few = centering.draw([r for r in rows if r["scale"] != "middle"], tmp_path / "x.png")
    (lrs,) = (ax for ax in few.axes if "sensitivity" in ax.get_ylabel())
    assert lrs.get_yscale() == "linear" and lrs.get_ylim()[0] == 0


def test_an_overview_has_the_published_columns(tmp_path, monkeypatch):
    """
    Those that mean the same here; the published isotropy takes one sign, Smin/Smax is in percent,
    and have other names.
    """
    argv = sweep(tmp_path, "1e-2", "baseline")
    assert study.main([*argv, "--seeds", "1", "--steps", "2"]) == 0
    (found,) = centering.read_overview(tmp_path / "report-tiny" / "overview.csv")
    sizes = ["max norm", "avg norm", "min norm", "mu norm", "ratio norm"]
    aligned = [f"{a} align{b}" for a in ("max", "avg", "min") for b in ("dot", "cos")] + [
        "centering_ratio"
    ]
    want = {"name", "test_loss", "test_perplexity", "time", "O.Smin", "O.Smax", "H.mean_logsqZ"}
    want |= {f"I.{k}" for k in sizes} | {f"{p}.{k}" for p in ("O", "OC") for k in sizes + aligned}
    want |= {f"{p}.fhs_{k}" for p in "IO" for k in ("cos_sim", "dot_prod")}
    want |= {
        f"O.logits_{k}"
        for k in ("mean_mean", "mean_std", "std_mean", "std_std", "mean_absmean", "mean_absmax")
    }
    assert want <= found.keys() and all(isinstance(found[k], float) for k in want - {"name"})
    assert (
        found["O.isotropy of both signs"] > 0 and not {"O.isotropy", "O.Smin/Smax"} & found.keys()
    )


def test_a_sensitivity_counts_diverged_runs_and_is_nan_where_all_are():
    assert centering.lr_sensitivity([3.0, math.nan, 4.0], 10.0, 2) == pytest.approx((0 + 7 + 1) / 2)
    assert centering.lr_sensitivity([3.0, math.inf, 12.0], 10.0) == pytest.approx(14 / 3)
    # and not 0, the best there is
    assert math.isnan(centering.lr_sensitivity([math.inf, math.nan, 10.0], 10.0))
    assert centering.optimum({0.1: math.nan, 0.01: 3.0, 0.001: 3.0}) == (3.0, 0.001)


def test_a_sweep_trains_each_cell_once_and_keeps_methods_apart(tmp_path, capsys):
    argv = [*sweep(tmp_path, "1e-2, 1e-1"), "--seeds", "1", "2", "--steps", "2"]
    argv[2:3] = ["*-baseline", "*-mu_loss", "*-mu_centering"]
    assert study.main(argv) == 0
    assert capsys.readouterr().out.count(": val_loss") == 12 and study.main(argv) == 0
    assert capsys.readouterr().out.count("was there") == 12
    rows = centering.read_overview(tmp_path / "report-tiny" / "overview.csv")
    assert len(rows) == 12 and {r["method"] for r in rows} == {
        "baseline",
        "mu_loss",
        "mu_centering",
    }
    for row in rows:
        assert row["initial_loss"] == pytest.approx(math.log(96), abs=0.6)
        assert row["test_loss"] < row["initial_loss"] + 1
        weight = 1e-4 * 96 / 50304 if row["method"] == "mu_loss" else 0
        assert row["lambda"] == pytest.approx(weight)
        assert (row["O.ratio norm"] < 1e-5) == (row["method"] == "mu_centering")
    assert (tmp_path / "report-tiny" / "centering.png").stat().st_size > 10000
    again = centering.sections(rows)  # what was written is read back to the same tables
    assert again["Test loss"] in (tmp_path / "report-tiny" / "report.md").read_text()


@pytest.mark.parametrize("method", list(centering.SWITCHES))
def test_overhead_times_a_step_of_its_method(tmp_path, method):
    """
    Switched from step to step, on one model, a step does what a model made for its method does, to
    the bit.
    """
    loud = {
        k: {f: 1 if f == "mu_centering" else 50.0 for f in v} for k, v in centering.SWITCHES.items()
    }
    p, own = parts(tmp_path), parts(tmp_path, **loud[method])
    kept = p.opt.snapshot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(centering, "SWITCHES", loud)
        for before in ("z_loss", "mu_centering", "mu_loss", "baseline"):  # whatever was on
            centering.switched_step(p, before, 0)
        with torch.no_grad():
            p.opt.restore(kept)
        p.loader = parts(tmp_path).loader
        told = centering.switched_step(p, method, 0)
    judged = tg.train_step(own, 0, own.plan.at(0, 0.0))
    assert [t.tolist() for t in told] == [t.tolist() for t in judged]
    assert all(
        torch.equal(a, b) for a, b in zip(p.model.parameters(), own.model.parameters(), strict=True)
    )
    assert len(told[0]) == 1 + (method.startswith(("mu_loss", "z_loss")))
    assert (p.model.head.mean(0).norm() < 1e-7) == (method == "mu_centering")


def test_overhead_is_the_median_of_paired_differences(tmp_path, capsys):
    rng = np.random.default_rng(0)
    base = 0.05 + 0.02 * rng.random(400)  # the machine's drift, which both of a pair have
    mid, low, high = centering.median_ratio(
        base + 0.0006 + 1e-4 * rng.standard_normal(400), base, rng
    )
    assert low < 1.0 < high and high - low < 0.1 and low < mid < high
    parts(tmp_path)
    flags = " ".join(f"--{k} {v}" for k, v in (TINY | {"data": tmp_path}).items())
    assert centering.main(["overhead", f"--flags={flags}", "--rounds", "10"]) == 0
    said = capsys.readouterr().out
    assert "head of 96 x 16, 256 tokens a step" in said and all(
        re.search(rf"^{m} +[-+]\d", said, re.M) for m in ("mu_centering", "mu_loss", "z_loss")
    )
    assert centering.main(["overhead", f"--flags={flags}", "--rounds", "2"]) == 2


def test_what_is_no_overview_or_no_sweep_is_refused(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("name,test_loss\nsomething,3\n")
    with pytest.raises(UserError, match="is no name such as"):
        centering.tables(centering.Tables(str(tmp_path / "x.csv"), str(tmp_path)))
    (tmp_path / "x.csv").write_text("name,method\n")
    with pytest.raises(UserError, match="has no rows"):
        centering.tables(centering.Tables(str(tmp_path / "x.csv"), str(tmp_path)))
    argv = sweep(tmp_path, "1e-2")
    assert study.main([*argv, "--arms", "*-nu_loss"]) == 2
    assert "--arms *-nu_loss: no such arm" in capsys.readouterr().err
    assert study.main([*argv, "--only", "report"]) == 2
    assert "no run of this study is finished" in capsys.readouterr().err
