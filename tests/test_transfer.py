"""
Weights from another run, and learning rates of chosen tensors: what is taken, what stays, what is
printed.
"""

import re

import numpy as np
import pytest
import torch
from helpers import alone, build, now, tiny, write_shard

import train_gpt as tg
from logs import embeddings


def started(folder, **changes):
    """A real Run and its parts on random tokens; its log lines are in run.early."""
    data = folder.parent / "data"
    if not data.exists():
        data.mkdir(parents=True)
        rng = np.random.default_rng(0)
        write_shard(data / "x_train_000000.bin", rng.integers(0, 60, 4000))
        write_shard(data / "x_val_000000.bin", rng.integers(0, 60, 300))
    cfg = tiny(data=str(data), log_dir=str(folder.parent), run=folder.name, **changes)
    tg.validate(cfg)
    run = tg.Run(cfg)
    return run, tg.build(cfg, run)


def source(folder, **changes) -> tuple[str, dict]:
    """A checkpoint of another seed with every weight moved, and its weights."""
    run, p = started(folder, seed=5, **changes)
    with torch.no_grad():
        for q in p.model.parameters():
            q.add_(torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel())))
    tg.save_checkpoint(p, 3)
    return str(folder), {n: q.detach().clone() for n, q in p.model.named_parameters()}


EXTRAS = {"block_scales": 1, "unet": 1, "q_gain": 1.5, "value_embeds": 1}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "mode, taken",
    [
        ("qk", {"qkv": [0, 1], "q": [0], "kv": [0], "q_gain": [0]}),
        ("vo", {"qkv": [2], "kv": [1], "attn.proj": [0]}),
        ("qk+vo", {"qkv": [0, 1, 2], "q": [0], "kv": [0, 1], "q_gain": [0], "attn.proj": [0]}),
        ("attn", {"qkv": [0, 1, 2], "q": [0], "kv": [0, 1], "q_gain": [0], "attn.proj": [0]}),
        ("scalars", {"q_gain": [0], "mix": [0], "scales": [0], "skips": [0], "value_scales": [0]}),
        (
            "attn+scalars",
            {
                "qkv": [0, 1, 2],
                "q": [0],
                "kv": [0, 1],
                "attn.proj": [0],
                "q_gain": [0],
                "mix": [0],
                "scales": [0],
                "skips": [0],
                "value_scales": [0],
            },
        ),
        ("mlp", {"fc": [0], "mlp.proj": [0]}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_transfer_takes_the_matrices_that_were_asked_for(tmp_path, mode, taken, grouped):
    model = EXTRAS | ({"heads": 4, "kv_heads": 2} if grouped else {})
    where, old = source(tmp_path / "old", **model)
    _, p = started(tmp_path / "new", init_from=where, transfer=mode, **model)
    fresh = dict(build(p.cfg).named_parameters())
    for name, q in p.model.named_parameters():
        leaf = next((k for k in taken if name == k or name.endswith(f".{k}")), None)
        stack = name.endswith("qkv") or name.endswith("kv")
        for i in range(len(q) if stack else 1):
            mine, its, own = (
                x[name][i] if stack else x[name]
                for x in (dict(p.model.named_parameters()), old, fresh)
            )
            assert torch.equal(mine, its if leaf and i in taken[leaf] else own), f"{name} {i}"


def test_tables_of_another_vocabulary_are_left_out(tmp_path):
    where, old = source(tmp_path / "old", vocab=200)
    run, p = started(tmp_path / "new", init_from=where, transfer="all")
    fresh = dict(build(p.cfg).named_parameters())
    for name, q in p.model.named_parameters():
        assert torch.equal(q, fresh[name] if name in ("embed", "head") else old[name]), name
    said = "\n".join(run.early)
    assert (
        "transfer:fresh (another vocabulary) embed [96, 32]" in said
        and "8 of 10 tensors loaded" in said
    )
    with pytest.raises(tg.UserError, match=r"embed is \[200, 32\] there and \[96, 32\] here"):
        started(tmp_path / "named", init_from=where, transfer="embed")


def test_report_of_a_transfer_names_every_tensor(tmp_path):
    where, old = source(tmp_path / "old", unet=1)
    run, p = started(tmp_path / "new", init_from=where, transfer="qk+scalars", block_scales=1)
    said = [line for line in run.early if line.startswith("transfer:")]
    names = [n for n, _ in p.model.named_parameters()]
    words = {
        name: next(line for line in said if f" {name} [" in line).split(f" {name}")[0][9:]
        for name in names
    }
    assert words["blocks.0.attn.qkv"] == "loaded 2 of 3" and words["blocks.0.mix"] == "missing"
    assert words["blocks.1.mlp.fc"] == words["embed"] == "fresh"
    assert "transfer:unused skips [1, 32]" in said
    line = next(line for line in said if " blocks.1.attn.qkv [" in line)
    norms = [float(x) for x in re.findall(r"[\d.]+(?=[ )]|$)", line.split("norm")[1])]
    assert norms[0] == pytest.approx(
        dict(p.model.named_parameters())["blocks.1.attn.qkv"].norm().item(), rel=1e-3
    )


def test_console_is_told_what_was_taken(tmp_path, capsys):
    where, old = source(tmp_path / "old", unet=1, depth=3)
    capsys.readouterr()
    _, p = started(tmp_path / "new", init_from=where, transfer="attn", block_scales=1)
    said = capsys.readouterr().out.splitlines()
    mine = dict(p.model.named_parameters())
    norm = torch.stack([mine[f"blocks.{i}.attn.qkv"].norm() for i in range(2)]).norm().item()
    line = next(line.split() for line in said if " blocks.*.attn.qkv" in line)
    assert line[:4] == ["loaded", "blocks.*.attn.qkv", "x2", "norm"] and float(
        line[4]
    ) == pytest.approx(norm, rel=1e-3)
    assert any(line.split()[:3] == ["fresh", "embed", "x1"] for line in said)
    assert any(
        line.startswith("  in the source only: blocks.*.attn.") and line.endswith(", skips")
        for line in said
    )
    assert any("notice" in line and "depth = 3 there and 2 here" in line for line in said)


@pytest.mark.parametrize(
    "theirs, mine, key",
    [
        ({"heads": 4}, {"heads": 2}, "heads = 4 there and 2 here, head_dim = 8 there and 16 here"),
        (
            {"heads": 4, "kv_heads": 2, "head_dim": 8},
            {"heads": 2, "kv_heads": 1, "head_dim": 16},
            "kv_heads = 2 there and 1 here",
        ),
    ],
)
def test_attention_of_other_heads_is_refused_though_shapes_agree(tmp_path, theirs, mine, key):
    where, _ = source(tmp_path / "old", **theirs)
    with pytest.raises(tg.UserError, match=key):
        started(tmp_path / "new", init_from=where, transfer="attn", **mine)
    started(tmp_path / "mlp", init_from=where, transfer="mlp", **mine)


def test_other_rotations_are_told(tmp_path):
    where, _ = source(tmp_path / "old")
    run, _ = started(tmp_path / "new", init_from=where, transfer="qk", rope_base=128.0)
    assert any(
        "notice" in line and "rope_base = 64.0 there and 128.0 here" in line for line in run.early
    )
    run, _ = started(tmp_path / "mlp", init_from=where, transfer="mlp", rope_base=128.0)
    assert not any("notice: init_from" in line for line in run.early)


def test_transfer_skip_is_heeded_and_wrong_sources_are_refused(tmp_path):
    where, old = source(tmp_path / "old")
    _, p = started(tmp_path / "new", init_from=where, transfer="attn", transfer_skip=r"blocks\.0\.")
    fresh, mine = dict(build(p.cfg).named_parameters()), dict(p.model.named_parameters())
    assert torch.equal(mine["blocks.0.attn.qkv"], fresh["blocks.0.attn.qkv"])
    assert torch.equal(mine["blocks.1.attn.qkv"], old["blocks.1.attn.qkv"])
    with pytest.raises(tg.UserError, match="takes nothing"):
        started(tmp_path / "none", init_from=where, transfer="attn", transfer_skip="attn")
    with pytest.raises(tg.UserError, match=r"qkv is \[3, 32, 32\] there and \[3, 64, 64\] here"):
        started(tmp_path / "wide", init_from=where, transfer="attn", dim=64)
    with pytest.raises(tg.UserError, match="takes nothing"):
        started(tmp_path / "scalars", init_from=where, transfer="scalars")


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_control_destroys_what_it_should(tmp_path, control):
    where, old = source(tmp_path / "old")
    a, b, c = (
        dict(
            started(
                tmp_path / f"new{i}",
                init_from=where,
                transfer="attn",
                transfer_control=control,
                seed=s,
            )[1].model.named_parameters()
        )
        for i, s in enumerate((1, 1, 2))
    )
    for name in ("blocks.0.attn.qkv", "blocks.1.attn.proj"):
        assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
        for mine, its in zip(*(x[name].reshape(-1, 32, 32) for x in (a, old))):
            mine = mine.detach()
            close = torch.isclose(mine, its).float().mean()
            assert close < 0.1, "hardly an entry may stay where it was"
            assert mine.norm() == pytest.approx(float(its.norm()), rel=1e-5)
            same = torch.equal(mine.flatten().sort().values, its.flatten().sort().values)
            assert same == (control == "shuffled")
    assert not torch.equal(a["blocks.0.attn.qkv"][0], a["blocks.0.attn.qkv"][1])


# --- exported weights


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_of_a_run_that_exports_an_average_the_average_is_taken(tmp_path, capsys, kind):
    """By transfer, scores, samples and statistics of embeddings, which all open it in one place."""
    run, p = started(tmp_path / "old", ema=0.5, swa_every=1, swa_start=0.0, final_weights=kind)
    for step in (1, 2):
        with torch.no_grad():
            for q in p.model.parameters():
                q.add_(step)
        p.avg.update(step, 1.0)
    tg.save_checkpoint(p, 3)
    live = {n: q.detach().clone() for n, q in p.model.named_parameters()}
    # From w0: w0+1, then w0+3. EMA: decays min(.5, 1/10), min(.5, 2/11); SWA: the mean of both.
    off = {"ema": 0.9 + (3 - 0.9) * 9 / 11 - 3, "swa": -1.0}[kind]
    cfg, named, path = tg.open_source(str(tmp_path / "old"))
    assert capsys.readouterr().err == f"notice: {path}: its {kind} average, as final_weights says\n"
    assert cfg.final_weights == kind and path.name == "000003"
    for name, w in live.items():
        torch.testing.assert_close(named[name], w + off)
    taken, q = started(tmp_path / "new", init_from=str(tmp_path / "old"))
    assert any(
        line == f"notice: {path}: its {kind} average, as final_weights says" for line in taken.early
    )
    assert all(torch.equal(w, named[n]) for n, w in q.model.named_parameters())
    found, _ = embeddings.of_source(str(tmp_path / "old"), 0)
    assert found["O.mu norm"] == pytest.approx(
        float(named["head"][: 60 + 36].double().mean(0).norm())
    )


def test_an_average_without_a_snapshot_is_not_taken(tmp_path, capsys):
    run, p = started(tmp_path / "old", swa_every=2, final_weights="swa")
    with torch.no_grad():
        p.model.head.add_(1)
    tg.save_checkpoint(p, 1)
    _, named, _ = tg.open_source(str(tmp_path / "old"))
    assert (
        torch.equal(named["head"], p.model.head) and "its live weights" in capsys.readouterr().err
    )


# --- slow: frozen and ramped up


def test_ramp_is_that_of_the_pull_request():
    sched = tg.Schedule("slow_lr", "0 250s:0 450s>1")
    for step, value in ((0, 0), (249, 0), (250, 0), (251, 0.005), (350, 0.5), (450, 1), (451, 1)):
        assert sched.at(step, 0.0) == pytest.approx(value)
    # a ramp without a freeze
    assert tg.Schedule("slow_lr", "0 500s>1").at(100, 0.0) == pytest.approx(0.2)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_frozen_tensor_keeps_every_bit(tmp_path, optimizer):
    """
    Frozen for two steps by schedule, without any checkpoint: attention keeps every bit, the rest
    moves as ever.
    """
    slow = {"slow": r"\.attn\.", "slow_lr": "0 2s:0 4s>1", "steps": 6}
    _, p = started(tmp_path / "a", optimizer=optimizer, matrix_wd=0.1, head_init="0.1", **slow)
    _, q = started(tmp_path / "b", optimizer=optimizer, matrix_wd=0.1, head_init="0.1", steps=6)
    with torch.no_grad():
        for parts in (p, q):
            dict(parts.model.named_parameters())["blocks.0.attn.proj"].fill_(-0.0)
            dict(parts.model.named_parameters())["blocks.0.mlp.proj"].normal_(
                generator=torch.Generator().manual_seed(1)
            )
    before = {n: w.detach().clone() for n, w in p.model.named_parameters()}
    moved = []
    for step in range(4):
        now_ = p.plan.at(step, step / 6)
        assert now_.slow_lr == (0, 0, 0, 0.5)[step]
        tg.train_step(p, step, now_)
        moved.append(
            {
                n
                for n, w in p.model.named_parameters()
                if w.detach().numpy().tobytes() != before[n].numpy().tobytes()
            }
        )
    assert not any(".attn." in n for n in moved[2]) and any(".mlp.fc" in n for n in moved[0])
    assert {n for n in moved[3] if ".attn." in n} == {n for n in before if ".attn." in n}
    frozen = [b for b in p.opt.buckets if b.rule.slow]
    assert sum(len(b.params) for b in frozen) == 4
    assert all(s.abs().sum() > 0 for b in frozen for s in b.state.values()), (
        "moments go on while weights stand still"
    )
    tg.train_step(q, 0, q.plan.at(0, 0.0))
    assert not any(b.rule.slow for b in q.opt.buckets)


def test_slow_learning_rate_reaches_its_tensors_alone():
    cfg = tiny(slow="mlp", slow_lr="0.25", optimizer="adamw", matrix_wd=0.1)
    half = [
        tg.MuonAdamW(c, build(c), alone()) for c in (cfg, tiny(optimizer="adamw", matrix_wd=0.1))
    ]
    for opt in half:
        for b in opt.buckets:
            b.weights.fill_(2.0)
            b.grads.fill_(1.0)
        opt.step(now(slow_lr=0.25))
    weights = [
        {n: p.flatten()[0].item() for b in opt.buckets for n, p in b.params.items()} for opt in half
    ]
    for name in weights[1]:
        step = 2.0 - weights[1][name]
        assert 2.0 - weights[0][name] == pytest.approx(
            step * (0.25 if "mlp" in name else 1), rel=1e-3
        ), name


def test_slow_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(tg.UserError, match="slow = 'zzz' matches no tensor"):
        started(tmp_path / "a", slow="zzz")


def test_hybrid_gives_what_was_taken_to_adamw():
    cfg = tiny(adamw_matrices=r"\.attn\.", slow="mlp", optimizer="muon")
    kinds = {
        n: (b.rule.kind, b.rule.slow)
        for b in tg.param_buckets(cfg, build(cfg), alone())
        for n in b.params
    }
    assert kinds["blocks.0.attn.qkv"] == ("adamw", False) and kinds["blocks.1.mlp.fc"] == (
        "muon",
        True,
    )


# --- a small part of the data


def test_no_more_tokens_than_allowed_are_trained_on(tmp_path):
    for name, count in (("train_000000", 500), ("train_000001", 500), ("val_000000", 200)):
        write_shard(tmp_path / f"x_{name}.bin", np.arange(count) % 60 + (1 if "1" in name else 0))
    base = dict(data=str(tmp_path), epochs=0, batch_tokens="64", seq_len="32", train_tokens=600)
    loader = tg.Loader(tiny(**base), tg.Plan(tiny(**base)))
    assert loader.counts == [500, 100]
    cfg = tiny(**base, shuffle=1)
    loader = tg.Loader(cfg, tg.Plan(cfg))
    assert loader.per_epoch(64) == (499 // 32 + 99 // 32) * 32 // 64
    rows = [loader.batch(step, 64, 32) for step in range(9)]
    assert loader.epoch == 0 and len(np.unique(np.concatenate(rows), axis=0)) == 18
    with pytest.raises(
        tg.UserError, match="hold 60 tokens within train_tokens = 60, less than one batch"
    ):
        tg.Loader(tiny(**base | {"train_tokens": 60}), tg.Plan(tiny(**base)))
