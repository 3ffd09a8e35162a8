"""Export: weights are rounded well, coded to the last bit, and come back as they were stored."""

import hashlib
import json
import math
import random
import re
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import build, random_tokens, tg, tiny, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

# --- quantisation


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def objective(w: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, h: torch.Tensor) -> float:
    """tr((W-Q) H (W-Q)^T)"""
    d = w.double() - q.double() * scale.double()
    return float((d @ h.double() * d).sum())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_gptq_halves_its_own_objective_against_plain_rounding(bits):
    # correlated inputs, two blocks of columns
    w, x = made(0, 48, 200), made(1, 600, 200) @ made(2, 200, 200)
    h = x.mT @ x / len(x)
    scale = tg.clip_search(w, tg.levels_of(bits))
    plain, better = (
        tg.codes(w, scale, tg.levels_of(bits)),
        tg.gptq(w, h, scale, tg.levels_of(bits)),
    )
    assert better.dtype == torch.int8 and better.abs().max() <= tg.levels_of(bits)
    assert objective(w, better, scale, h) < 0.5 * objective(w, plain, scale, h)


def test_gptq_with_independent_inputs_is_plain_rounding():
    w, h = made(0, 20, 150), torch.diag(made(1, 150).abs() + 0.1)
    scale = tg.clip_search(w, 31)
    assert torch.equal(tg.gptq(w, h, scale, 31), tg.codes(w, scale, 31))


def test_gptq_gives_weights_of_inputs_that_never_fire_the_code_zero():
    w, x = made(0, 8, 40), made(1, 100, 40)
    x[:, 5] = 0
    q = tg.gptq(w, x.mT @ x, tg.clip_search(w, 31), 31)
    assert not q[:, 5].any() and q[:, 6].any()


@given(st.integers(0, 10**6), st.sampled_from([4, 5, 6, 7, 8]))
@settings(max_examples=40, deadline=None)
def test_clip_search_is_never_worse_than_no_clip(seed, bits):
    levels = tg.levels_of(bits)
    w = made(seed, 6, 50) * torch.logspace(-6, 3, 6)[:, None]
    w[2] = 0
    whole = tg.quantize_rows(w, levels)[1]
    clipped, plain = (
        (tg.codes(w, s, levels).float() * s.float() - w).square().sum(1)
        for s in (tg.clip_search(w, levels), whole)
    )
    assert (clipped <= plain).all() and clipped[2] == 0
    # Where nothing is clipped an entry is off by half a scale at most.
    off = (tg.codes(w, whole, levels).double() * whole.double() - w.double()).abs()
    assert (off <= whole.double() / 2 * (1 + 1e-6)).all()


def test_bits_are_read_by_pattern_and_wrong_ones_refused():
    bits = tg.parse_bits("int6 mlp:5 head:8")
    assert [bits.of(n) for n in ("blocks.0.mlp.fc", "head", "blocks.0.attn.qkv")] == [5, 8, 6]
    for wrong in ("", "int9", "6", "int6 mlp", "int6 mlp:9", "int6 (:5"):
        with pytest.raises(tg.UserError, match="export = "):
            tg.parse_bits(wrong)


def small(**changes) -> tg.Config:
    return tiny(**({"dim": 64, "vocab": 96, "seq_len": "16", "head_init": "0.2"} | changes))


def weights(cfg: tg.Config, noise: float = 0.05) -> dict[str, torch.Tensor]:
    return {
        n: (p + noise * made(i, *p.shape)).detach()
        for i, (n, p) in enumerate(build(cfg).named_parameters())
    }


def model_of(cfg: tg.Config, named: dict[str, torch.Tensor]) -> tg.GPT:
    model = build(cfg)
    tg.load_weights(model, named, "x")
    return model


def quantised(named: dict[str, torch.Tensor], cfg: tg.Config, bits: str) -> dict[str, tuple]:
    matrices = {name: named[name] for name in tg.quantised_names(build(cfg))}
    return tg.quantise(matrices, tg.parse_bits(bits))


LOOPED = {
    "depth": 2,
    "head_dim": 64,
    "loop": "0:2",
    "repeats": "2",
    "tie_embed": 1,
    "kv_heads": 1,
    "block_scales": 1,
    "q_gain": 1.5,
    "xsa": 1,
    "loop_embed": 1,
    "cross_repeat": 1,
    "value_embeds": 1,
    "rope": "standard",
    "activation": "leaky_relu2",
    "softcap": 30.0,
}


def test_hessians_add_up_all_uses_of_a_shared_matrix():
    cfg = small(**LOOPED)
    model = model_of(cfg, weights(cfg))
    rows = np.random.default_rng(0).integers(96, size=(3, 17))
    run = tg.Ranks(torch.device("cpu"))
    found, seen = tg.record_hessians(model, rows, tg.Shape(1, 32, 2, 0), run)
    once, _ = tg.record_hessians(model, rows, tg.Shape(1, 32, 1, 0), run)
    assert seen == 3
    assert found.keys() == {name for name in tg.quantised_names(model) if name != "value_embeds"}
    x = torch.from_numpy(rows[:, :-1])
    with torch.no_grad():
        final = model.hidden(x, 2, 0).flatten(0, 1)
    torch.testing.assert_close(found["head"], final.mT @ final / len(final))
    # The inputs of fc are RMS-normed: each use adds dim to the trace.
    assert math.isclose(found["blocks.0.mlp.fc"].trace(), 2 * 64, rel_tol=1e-3)
    assert math.isclose(once["blocks.0.mlp.fc"].trace(), 64, rel_tol=1e-3)


def clock_of(times: list[float]) -> SimpleNamespace:
    """A clock that shows these times one after another, then the last."""
    return SimpleNamespace(
        sync=lambda: None, seconds=lambda: times.pop(0) if len(times) > 1 else times[0]
    )


def test_calibration_ends_by_the_clock_within_a_row_and_on_all_ranks_alike():
    """Sums are those of a calibration on the rows seen whole; the row begun adds to some."""
    cfg = small()
    model = model_of(cfg, weights(cfg))
    rows = np.random.default_rng(0).integers(96, size=(6, 17))
    # A look for the turn, and one for each matrix but the embedding, which multiplies with nothing.
    looks = 1 + len(tg.quantised_names(model)) - 1
    alone = tg.Ranks(torch.device("cpu"))
    run = tg.Ranks(torch.device("cpu"))
    run.clock = clock_of([0.0] * 2 * looks + [9.0])
    found, seen = tg.record_hessians(model, rows, tg.Shape(1, 32, 1, 0), run, until=5.0)
    two, _ = tg.record_hessians(model, rows[:2], tg.Shape(1, 32, 1, 0), alone)
    assert seen == 2 and found.keys() == two.keys()
    for name in two:
        torch.testing.assert_close(found[name], two[name])
    run.clock = clock_of([0.0] * (2 * looks + 3) + [9.0])  # two matrices into the third row
    found, seen = tg.record_hessians(model, rows, tg.Shape(1, 32, 1, 0), run, until=5.0)
    differ = [name for name in two if not torch.equal(found[name], two[name])]
    assert seen == 2 and 0 < len(differ) <= 2
    run.clock = clock_of([9.0])
    assert tg.record_hessians(model, rows, tg.Shape(1, 32, 1, 0), run, until=5.0) == ({}, 0)
    asked = []
    run = tg.Ranks(torch.device("cpu"))
    run.world, run.sum_of, run.clock = 2, lambda x: x, clock_of([0.0])
    # the other rank is late at the third turn
    run.poll = lambda late: asked.append(late) or len(asked) > 2
    assert tg.record_hessians(model, rows, tg.Shape(1, 32, 1, 0), run, until=5.0)[
        1
    ] == 2 and asked == [0, 0, 0]


def test_a_slow_calibration_keeps_the_cap_and_its_artifact(tmp_path, monkeypatch, capsys):
    """Foreseen were 0.7 s for eight rows; each takes so long that only some fit."""
    for name, seed in (("train_000001", 0), ("val_000000", 1)):
        write_shard(tmp_path / f"x_{name}.bin", np.random.default_rng(seed).integers(96, size=2000))
    cfg = small(
        data=str(tmp_path),
        log_dir=str(tmp_path),
        gptq=8,
        max_seconds=1.5,
        steps=10**6,
        epochs=0,
        export="int6",
        eval_every=0,
        val_tokens=160,
        batch_tokens="64",
        micro_tokens=64,
    )
    calibrate, linear = tg.calibrate, tg.linear

    def slowly(x, w, bias=None):
        time.sleep(0.014)
        return linear(x, w, bias)

    def slow(p, rows, until):
        with monkeypatch.context() as patch:
            patch.setattr(tg, "linear", slowly)
            return calibrate(p, rows, until)

    monkeypatch.setattr(tg, "gptq_seconds", lambda p: 0.7)
    monkeypatch.setattr(tg, "calibrate", slow)
    tg.validate(cfg)
    run = tg.Run(cfg)
    assert tg.train(cfg, run) == 0
    result = json.loads((run.folder / "result.json").read_text())
    assert 0.8 < result["train_time_s"] <= 1.5
    said = re.search(
        r"gptq: (\d) rows of 8 \(max_seconds allowed no more\)", capsys.readouterr().out
    )
    assert said and 0 < int(said[1]) < 8
    named = tg.load_artifact(run.folder / "model.nrx")[1]
    assert result["artifact_bytes"] == (run.folder / "model.nrx").stat().st_size
    assert (
        math.isfinite(result["roundtrip_val_loss"])
        and named.keys() == dict(build(cfg).named_parameters()).keys()
    )


def test_too_few_tokens_for_calibration_are_refused_before_training(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", np.zeros(10))
    write_shard(tmp_path / "x_val_000000.bin", np.zeros(40))
    how = {"seq_len": "8", "eval_seq_len": 16, "batch_tokens": "8", "micro_tokens": 8, "steps": 1}
    cfg = small(data=str(tmp_path), gptq=4, export="int6", log_dir=str(tmp_path), **how)
    with pytest.raises(tg.UserError, match="rows of 16 training tokens.* has only 10"):
        tg.build(cfg, tg.Run(cfg))


# --- coders and artifact


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([7, 15, 31, 63, 127]),
    st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_entropy_coder_gives_every_code_back(rows, cols, levels, seed):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0, 1, (rows, 1)) * rng.uniform(0, 1, (1, cols)) ** 3
    q = (
        (rng.laplace(size=(rows, cols)) * spread * levels)
        .round()
        .clip(-levels, levels)
        .astype(np.int8)
    )
    tables, step, words = tg.encode_codes(q, levels)
    assert np.array_equal(tg.decode_codes(tables, step, words, levels), q)


@given(st.binary(max_size=3000), st.sampled_from(sorted(tg.CODECS)), st.integers(0, 4000))
@settings(max_examples=60, deadline=None)
def test_codec_gives_no_more_than_it_may(data, codec, most):
    assert tg.CODECS[codec].unpack(tg.CODECS[codec].pack(data), most) == data[:most]


def test_entropy_coder_stays_within_two_percent_of_the_entropy():
    rng = np.random.default_rng(0)
    q = (rng.normal(size=(400, 500)) * 6).round().clip(-31, 31).astype(np.int8)
    tables, _, words = tg.encode_codes(q, 31)
    _, counts = np.unique(q, return_counts=True)
    entropy = -(counts * np.log2(counts / q.size)).sum() / 8
    assert 4 * len(words) + sum(t.nbytes for t in tables.values()) < 1.015 * entropy
    assert min(len(c.pack(q.tobytes())) for c in tg.CODECS.values()) > 4 * len(words)


@pytest.mark.parametrize("noise", [0, 1])
def test_rounded_weights_are_the_artifacts_and_leave_nothing_behind(noise):
    """
    Inside, forward and backward see what export would store (or noise of its rounding step); behind
    it, nothing is left.
    """
    cfg = small(export="int5 mlp:4", qat="1", qat_noise=noise)
    model, (x, y) = model_of(cfg, weights(cfg)), random_tokens(cfg, 2, 16)
    exact = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = quantised(exact, cfg, cfg.export)
    stored = tg.unpack_artifact(tg.pack_artifact(exact, found, cfg, "zstd"), "x")[1]
    with tg.rounded(model, cfg, step=3):
        inside = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(x, y).sum().backward()
    # of one step there is one noise, on every rank and after a resume
    with tg.rounded(model, cfg, step=3):
        assert all(torch.equal(p, inside[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, exact[n]) for n, p in model.named_parameters())
    for name, w in inside.items():
        if name not in found:
            assert torch.equal(w, exact[name])
        elif noise:
            off = (w - exact[name]).abs() / found[name][1].float()
            assert off.max() <= 0.5 + 1e-4 and 0.2 < off.mean() < 0.3
        else:
            assert torch.equal(w, stored[name]) and not torch.equal(w, exact[name])
    other = build(cfg)
    tg.load_weights(other, inside, "x")
    other(x, y).sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(p.grad, q.grad), (
            f"{name}: gradients were not taken at the rounded weights"
        )


def test_noise_falls_on_shared_blocks_alone():
    cfg = small(**LOOPED | {"depth": 3, "loop": "1:2"}, export="int6", qat="1", qat_noise=1)
    model = model_of(cfg, weights(cfg))
    exact = {n: p.detach().clone() for n, p in model.named_parameters()}
    with tg.rounded(model, cfg, step=0):
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, exact[n])}
    looped = {name for name in tg.quantised_names(model) if name.startswith("blocks.1.")}
    assert moved == looped != set()


@pytest.mark.parametrize("codec", [*tg.CODECS, tg.ENTROPY])
@pytest.mark.parametrize(
    "changes", [{}, LOOPED, {"param_dtype": "bfloat16"}], ids=["plain", "looped", "bf16"]
)
def test_artifact_of_every_codec_loads_the_weights_that_were_exported(tmp_path, codec, changes):
    cfg = small(score={"prompt": "é\n🚀"}, rule={"max_bytes": 5}, **changes)
    model = model_of(cfg, weights(cfg))
    named = {name: p.detach() for name, p in model.named_parameters()}
    for bits in ("int8", "int6 mlp:5"):
        data, chosen = tg.smallest_artifact(model, bits, codec)
        (tmp_path / "a").write_bytes(data)
        again, loaded = tg.load_artifact(tmp_path / "a")
        assert (
            chosen == f"{'int6_mlp_5' if 'mlp' in bits else bits}_{codec}"
            and again == cfg
            and loaded.keys() == named.keys()
        )
        header = tg.unpack_artifact(data, "a")[2]
        assert header["codec"] == codec
        found = quantised(named, cfg, bits)
        for name, w in named.items():
            if name in found:
                q, scale, _ = found[name]
                product = q.numpy().astype(np.float32) * scale.numpy().astype(np.float32)
                assert np.array_equal(loaded[name].numpy(), product)
            else:
                rtol = 0 if bits == "int8" else 1e-3
                torch.testing.assert_close(loaded[name].float(), w.float(), rtol=rtol, atol=1e-6)
        tg.load_weights(build(cfg), loaded, "a")


def test_fit_takes_the_finest_bits_within_the_limit():
    lines: list[str] = []
    model = model_of(small(), weights(small()))
    sizes = [len(tg.smallest_artifact(model, bits, "best")[0]) for bits in tg.LADDER]
    assert sizes == sorted(sizes, reverse=True)
    for bits, size in list(zip(tg.LADDER, sizes))[::3]:
        data, chosen = tg.smallest_artifact(model, "fit", "best", most=size, log=lines.append)
        assert len(data) == size and chosen.startswith(bits.replace(" ", "_").replace(":", "_"))
        assert f"artifact: {bits} " in lines[-1] and str(size) in lines[-1]
    data, chosen = tg.smallest_artifact(model, "fit", "best", most=sizes[-1] - 1)
    assert len(data) == sizes[-1] and chosen.startswith("int4"), (
        "the smallest there is, which the caller sees is too large"
    )


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Cut, extended, bytes replaced, a stretch repeated, or a number in the header changed."""
    body, kind = bytearray(data[:-32]), rng.randrange(6)
    (length,) = struct.unpack("<I", data[8:12])
    if kind == 0:
        body = body[: rng.randrange(len(body))]
    elif kind == 1:
        body += rng.randbytes(rng.randrange(1, 40))
    elif kind == 2:
        for _ in range(rng.randrange(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    elif kind == 3:
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(12, 12 + length)] = rng.choice(b'0123456789-{}[],:"\\ntrueE.')
    elif kind == 4:
        low = rng.randrange(len(body))
        body[low:low] = body[low : low + rng.randrange(1, 60)]
    else:
        header = json.loads(body[12 : 12 + length])
        spot = rng.choice(list(header["tensors"].values()))
        value = rng.choice(
            [0, -1, 1, 2**31, 2**63, 2**70, 1e300, "x", None, [], {}, [2**40, 2], True, [-1, 64]]
        )
        target = rng.choice([header, spot])
        target[rng.choice(list(target))] = value
        text = json.dumps(header).encode()
        body[8 : 12 + length] = struct.pack("<I", len(text)) + text
    return bytes(body) + (hashlib.sha256(body).digest() if rng.random() < 0.75 else data[-32:])


def test_damaged_artifact_is_refused_or_loads_finite_weights():
    cfg = tiny(dim=64, heads=1, depth=1, vocab=64, mlp_ratio=1.0)
    named = weights(cfg)
    files = [
        tg.pack_artifact(named, quantised(named, cfg, f"int{bits}"), cfg, codec)
        for bits, codec in ((8, "zstd"), (6, tg.ENTROPY), (5, "brotli"), (4, "xz"))
    ]
    rng, refused = random.Random(0), 0
    for i in range(10000):
        data = mutated(rng, files[i % 4])
        try:
            again, loaded, _ = tg.unpack_artifact(data, "x.nrx")
            assert isinstance(again, tg.Config)
            assert all(w.is_floating_point() and w.isfinite().all() for w in loaded.values())
        except tg.UserError as e:
            refused += 1
            assert "x.nrx" in str(e)
    assert 8000 < refused < 10000


@pytest.mark.parametrize(
    "flags, why",
    [
        ({"qat": "0.3"}, "nothing between"),
        ({"qat_noise": 1}, "never begins"),
        ({"export": "int6 mlpp:5"}, "mlpp"),
        ({"export": "fit"}, "artifact_limit"),
        ({"artifact_limit": 1000}, "the source alone"),
    ],
    ids=str,
)
def test_export_that_could_not_be_done_is_refused_before_training(flags, why):
    cfg = small(**({"export": "int6"} | flags))
    with pytest.raises(tg.UserError, match=why):
        tg.check_export(cfg)
        tg.check_artifact(cfg, build(cfg))


def test_header_that_asks_for_more_than_the_file_holds_is_refused():
    cfg = tiny(dim=64, heads=1, depth=2, vocab=64, mlp_ratio=1.0)
    named = weights(cfg)
    packed = tg.pack_artifact(named, quantised(named, cfg, "int8"), cfg, "zstd")
    (length,) = struct.unpack_from("<I", packed, 8)
    for old, new in (
        ("depth = 2", "depth = 3000000"),
        ('seq_len = "32"', 'seq_len = "32000000000"'),
        ("dim = 64", "dim = 640000"),
        ("vocab = 64", "vocab = 65000"),
    ):
        header = json.loads(packed[12 : 12 + length])
        header["config"], changes = re.subn(f"^{old}$", new, header["config"], flags=re.M)
        assert changes == 1, old
        text = json.dumps(header).encode()
        body = packed[:8] + struct.pack("<I", len(text)) + text + packed[12 + length : -32]
        with pytest.raises(tg.UserError, match="x.nrx is no usable artifact"):
            tg.unpack_artifact(body + hashlib.sha256(body).digest(), "x.nrx")
