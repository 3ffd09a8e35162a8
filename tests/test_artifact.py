"""
Artifact, averages and checkpoints: what is stored comes back, and what is damaged is refused, never
run.
"""

import hashlib
import json
import math
import pickle
import random
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zstandard
from helpers import ROOT, alone, build, tg, tiny, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_with_numpy
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

# --- quantiser


def dequantised(q: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """The second formula: an integer times its row's scale, in float64."""
    return q.numpy().astype(np.float64) * scale.numpy().astype(np.float64)


entry = st.one_of(
    st.floats(-8e6, 8e6, width=32),
    st.floats(-(2**-12), 2**-12, width=32),
    st.sampled_from([0.0, 1e-30, -1e-38, 1.4e-45, 2**-24, 65504.0, 8e6, 127.0, -127.5]),
)


@given(st.integers(1, 4), st.integers(1, 5), st.data())
@settings(max_examples=150)
def test_quantised_entry_is_off_by_half_a_scale_at_most(rows, cols, data):
    w = torch.tensor(
        data.draw(
            st.lists(st.lists(entry, min_size=cols, max_size=cols), min_size=rows, max_size=rows)
        )
    )
    if data.draw(st.booleans()):
        w = w.bfloat16()
    q, scale = tg.quantize_rows(w)
    assert q.dtype == torch.int8 and scale.dtype == torch.float16 and scale.shape == (rows, 1)
    assert scale.isfinite().all() and (scale > 0).all() and q.abs().max() <= 127
    back, exact = dequantised(q, scale), w.double().numpy()
    assert (np.abs(back - exact) <= scale.double().numpy() / 2 * (1 + 1e-6)).all()
    assert np.array_equal(
        tg.dequantize_rows(q, scale).double().numpy(), np.float32(back).astype(np.float64)
    )
    assert not back[~exact.any(1)].any(), "a row of zeros must stay one"
    # The largest entry of a row uses the range; fp16 steps of the scale cost at most a level
    # (subnormal ones more).
    big = np.abs(exact).max(1) > 1e-2
    assert (np.abs(q.numpy()).max(1)[big] >= 126).all()


def test_scale_is_never_rounded_below_its_row():
    """
    Tiny rows have fp16 scales of a few bits: rounded down, the largest entries would be cut off.
    """
    w = torch.linspace(1e-6, 1e-3, 5000)[:, None] * torch.tensor([1.0, -1.0, 0.5])
    q, scale = tg.quantize_rows(w)
    assert (
        np.abs(dequantised(q, scale) - w.double().numpy())
        <= scale.double().numpy() / 2 * (1 + 1e-6)
    ).all()


def test_quantiser_takes_every_row_by_itself():
    w = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -6, 4, 60
    ).view(3, 20, 1)
    q, scale = tg.quantize_rows(w)
    assert scale.shape == (3, 20, 1)
    for i in range(3):
        for j in range(20):
            one = tg.quantize_rows(w[i, j][None])
            assert torch.equal(one[0][0], q[i, j]) and torch.equal(one[1][0], scale[i, j])
    relative = (tg.dequantize_rows(q, scale) - w).norm(dim=-1) / w.norm(dim=-1)
    assert relative[scale[..., 0] > 1e-4].max() < 0.01


def test_weights_beyond_fp16_become_its_largest_number():
    q, scale = tg.quantize_rows(torch.tensor([[1e30, -1e30, 0.0]]))
    assert dequantised(q, scale).tolist() == [[127 * 65504.0, -127 * 65504.0, 0.0]]


# --- artifact


def big(**changes) -> tg.Config:
    """Matrices that are quantised, vectors that stay as they are."""
    return tiny(
        **(
            {
                "dim": 256,
                "heads": 4,
                "depth": 1,
                "vocab": 300,
                "head_init": "0.02",
                "mlp_ratio": 0.5,
                "block_scales": 1,
            }
            | changes
        )
    )


def write_artifact(path, model) -> None:
    path.write_bytes(tg.smallest_artifact(model, "int8", "zstd")[0])


def exported(path, **changes) -> tuple[tg.Config, dict[str, torch.Tensor]]:
    cfg = big(**changes)
    model = build(cfg)
    named = {n: p.detach() for n, p in model.named_parameters()}
    for i, p in enumerate(named.values()):
        p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype))
    write_artifact(path, model)
    return cfg, named


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embed": 1}, {"param_dtype": "bfloat16"}, {"kv_heads": 2}], ids=str
)
def test_artifact_loads_the_weights_that_were_exported(tmp_path, changes):
    """Read a second time by hand: magic, header, zstd, safetensors, q times scale in numpy."""
    path = tmp_path / "model.nrx"
    cfg, named = exported(path, score={"prompt": "é\n🚀"}, **changes)
    loaded_cfg, loaded = tg.load_artifact(path)
    assert loaded_cfg == cfg and loaded.keys() == named.keys()
    data = path.read_bytes()
    assert data[:8] == b"NANORMX2"
    (length,) = struct.unpack("<I", data[8:12])
    header = json.loads(data[12 : 12 + length])
    stored = (
        load_with_numpy(zstandard.ZstdDecompressor().decompress(data[12 + length : -32]))
        if "param_dtype" not in changes
        else None
    )
    kinds = set()
    for name, w in named.items():
        kinds.add(header["tensors"][name]["kind"])
        if header["tensors"][name]["kind"] == "plain":
            assert min(w.shape[-2:]) < 64 and torch.equal(loaded[name], w)
            continue
        assert w.ndim >= 2 and min(w.shape[-2:]) >= 64 and loaded[name].dtype == torch.float32
        assert (
            (loaded[name] - w.float()).abs().amax(-1) <= w.float().abs().amax(-1) / 127 * 0.51
        ).all()
        if stored:
            q, scale = stored[f"{name}:q"], stored[f"{name}:scale"]
            assert q.dtype == np.int8 and scale.dtype == np.float16
            assert np.array_equal(
                loaded[name].numpy(), q.astype(np.float32) * scale.astype(np.float32)
            )
    assert kinds == {"plain", "rows"}
    # The model that is read back is the one that was scored.
    model = tg.build_model(loaded_cfg, torch.device("cpu"), torch.float32, 32)
    tg.load_weights(model, loaded, "x")
    for name, p in model.named_parameters():
        assert torch.equal(p, loaded[name].to(p.dtype))


def test_two_exports_of_the_same_weights_are_equal(tmp_path):
    exported(tmp_path / "a")
    exported(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_of_a_training_run_can_be_exported(tmp_path):
    """
    They are views into the optimizer's buckets, which safetensors must not take for shared memory.
    """
    cfg = big()
    model = build(cfg)
    tg.MuonAdamW(cfg, model, alone())
    write_artifact(tmp_path / "a", model)
    loaded = tg.load_artifact(tmp_path / "a")[1]
    assert torch.equal(loaded["blocks.0.mix"], model.blocks[0].mix)
    assert torch.allclose(loaded["head"], model.head, atol=1e-3)


def test_nothing_that_is_read_is_unpickled(tmp_path, monkeypatch):
    """Nothing that is read may execute: the readers work with pickle and torch.load forbidden."""

    def forbidden(*a, **k):
        raise AssertionError("unpickled")

    cfg, _ = exported(tmp_path / "a")
    run, p = started(tmp_path / "run")
    saved = tg.save_checkpoint(p, 0)
    for target, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(target, name, forbidden)
    assert tg.load_artifact(tmp_path / "a")[0] == cfg
    assert tg.load_checkpoint(saved, p) == 0
    source = (ROOT / "train_gpt.py").read_text()
    assert not any(
        word in source
        for word in ("import pickle", "torch.load(", "allow_pickle", "eval(", "exec(")
    )
    assert not any(f.suffix in (".pt", ".pkl", ".bin") for f in saved.iterdir())
    (tmp_path / "b").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(tg.UserError, match="magic"):
        tg.load_artifact(tmp_path / "b")


def test_flipped_byte_or_cut_is_noticed(tmp_path):
    path = tmp_path / "model.nrx"
    exported(path)
    whole, rng = path.read_bytes(), random.Random(0)
    damaged = [
        whole[:n]
        for n in (
            0,
            1,
            7,
            8,
            11,
            12,
            20,
            43,
            44,
            len(whole) - 33,
            len(whole) - 1,
            *(rng.randrange(len(whole)) for _ in range(20)),
        )
    ]
    damaged += [whole + b"\0", whole + whole, whole[1:], b"\0" * 100, tg.MAGIC * 40]
    for where in (
        *range(0, 40),
        *(rng.randrange(len(whole)) for _ in range(100)),
        *range(len(whole) - 40, len(whole)),
    ):
        flipped = bytearray(whole)
        flipped[where] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    bad = tmp_path / "bad.nrx"
    for data in damaged:
        bad.write_bytes(data)
        with pytest.raises(tg.UserError, match=r"bad.nrx is no usable artifact.*export it again"):
            tg.load_artifact(bad)


def forge(
    path,
    header=None,
    tensors=None,
    raw_header: bytes | None = None,
    packed: bytes | None = None,
    length: int | None = None,
    to=None,
):
    """
    A file with a valid checksum and whatever else; `header` and `tensors` change what was there.
    """
    data = path.read_bytes()
    (size,) = struct.unpack("<I", data[8:12])
    old, payload = (
        json.loads(data[12 : 12 + size]),
        zstandard.ZstdDecompressor().decompress(data[12 + size : -32]),
    )
    if tensors:
        stored = load_tensors(payload)
        tensors(stored)
        payload = save_tensors(stored)
        old["payload_bytes"] = len(payload)
    packed = zstandard.ZstdCompressor().compress(payload) if packed is None else packed
    old["packed_bytes"] = len(packed)
    new = old
    if header:
        new = header(old) or old
    raw = json.dumps(new).encode() if raw_header is None else raw_header
    body = tg.MAGIC + struct.pack("<I", len(raw) if length is None else length) + raw + packed
    bad = to or path.with_name("forged.nrx")
    bad.write_bytes(body + hashlib.sha256(body).digest())
    return bad


def setting(key, value):
    return lambda h: h.__setitem__(key, value)


def configured(*lines: str):
    return lambda h: h.__setitem__("config", h["config"] + "".join(line + "\n" for line in lines))


def replaced(old: str, new: str):
    def change(h):
        assert old in h["config"]
        h["config"] = h["config"].replace(old, new)

    return change


FORGED = {
    "payload too large": {"header": lambda h: h.update(payload_bytes=h["payload_bytes"] + 1)},
    "payload too small": {"header": lambda h: h.update(payload_bytes=h["payload_bytes"] - 1)},
    "payload immense": {"header": setting("payload_bytes", 1 << 60)},
    "payload of 8 GB": {"header": setting("payload_bytes", 1 << 33)},
    "payload negative": {"header": setting("payload_bytes", -1)},
    "payload infinite": {"header": setting("payload_bytes", float("inf"))},
    "payload is text": {"header": setting("payload_bytes", "9")},
    "packed size wrong": {"header": setting("packed_bytes", 3)},
    "size missing": {"header": lambda h: h.pop("payload_bytes") and None},
    "tensors missing": {"header": lambda h: h.pop("tensors") and None},
    "tensors is a list": {"header": setting("tensors", ["head"])},
    "tensor of unknown kind": {"header": lambda h: h["tensors"]["head"].update(kind="int4")},
    "kind is a list": {"header": lambda h: h["tensors"].update(head=[])},
    "kind swapped": {"header": lambda h: h["tensors"].update(head={"kind": "plain"})},
    "kind swapped back": {
        "header": lambda h: h["tensors"].update(
            {"blocks.0.mix": {"kind": "rows", "shape": [2, 256], "levels": 127}}
        )
    },
    "name not stored": {"header": lambda h: h["tensors"].update(more={"kind": "plain"})},
    "tensor not named": {"header": lambda h: h["tensors"].pop("head") and None},
    "rows of another shape": {"header": lambda h: h["tensors"]["head"].update(shape=[256, 384])},
    "config missing": {"header": lambda h: h.pop("config") and None},
    "config is a number": {"header": setting("config", 5)},
    "config is no toml": {"header": setting("config", "steps = = 3")},
    "config of unknown key": {"header": configured("backdoor = 1")},
    "config twice": {"header": configured("depth = 1")},
    "config of a wrong type": {"header": replaced("depth = 1", 'depth = "1"')},
    "config nan": {"header": replaced("norm_eps = 1e-06", "norm_eps = []")},
    "config impossible": {"header": replaced("heads = 4", "heads = 3")},
    "config with depth 0": {"header": replaced("depth = 1", "depth = 0")},
    "config with a folder": {"header": replaced('run = "test"', 'run = "../../x"')},
    "header is a list": {"header": lambda h: [h]},
    "header is no json": {"raw_header": b"{"},
    "header is no text": {"raw_header": b"\xff\xfe"},
    "header is deep": {"raw_header": b"[" * 200_000},
    "header is empty": {"raw_header": b""},
    "header too long": {"length": 0xFFFFFFFF},
    "payload is no zstd": {"packed": b"nonsense" * 9},
    "payload is nothing": {"packed": b""},
    "payload is no safetensors": {"packed": zstandard.ZstdCompressor().compress(b"\xff" * 5000)},
    "tensor added": {"tensors": lambda t: t.update(extra=torch.zeros(3))},
    "scale missing": {"tensors": lambda t: t.__delitem__("head:scale")},
    "scale of another shape": {"tensors": lambda t: t.update({"head:scale": torch.ones(7, 1)})},
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_artifact_with_a_valid_checksum_is_refused(tmp_path, name):
    path = tmp_path / "model.nrx"
    exported(path)
    tg.load_artifact(forge(path))  # the forger's tools alone do no harm
    with pytest.raises(tg.UserError, match="forged.nrx"):
        tg.load_artifact(forge(path, **FORGED[name]))


def test_rows_that_no_reader_would_take_are_refused_before_training():
    cfg = tiny(export="int8", eval_seq_len=1 << 21)
    with pytest.raises(tg.UserError, match="lower seq_len or eval_seq_len"):
        tg.check_artifact(cfg, build(tiny()))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"blocks.0.mix": torch.zeros(3, 3)}),
        lambda t: t.update(
            {
                "head:q": torch.zeros(384, 4, dtype=torch.int8),
                "head:scale": torch.ones(384, 1).half(),
            }
        ),
        lambda t: t.update(
            {"head:q": torch.zeros(384 * 256, dtype=torch.int8), "head:scale": torch.ones(1).half()}
        ),
        lambda t: t.update({"blocks.0.mix": torch.zeros(256)}),
    ],
)
def test_tensor_of_another_shape_is_refused(tmp_path, change):
    path = tmp_path / "model.nrx"
    cfg, _ = exported(path)
    with pytest.raises(tg.UserError):
        tg.load_weights(build(cfg), tg.load_artifact(forge(path, tensors=change))[1], "forged.nrx")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda x: st.one_of(
        st.lists(x, max_size=3), st.dictionaries(st.text(max_size=5), x, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.sampled_from(["tensors", "codec", "payload_bytes", "packed_bytes", "config", "more"]),
    json_values,
)
@example("config", 'config = ["a"]')
@example("config", "lr = inf")
@example("config", "steps = 99999999999999999999999999")
@settings(max_examples=150, deadline=None)
def test_any_header_loads_or_raises_usererror(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "for_headers.nrx"
    if not path.exists():
        exported(path)
    try:
        cfg, named = tg.load_artifact(forge(path, header=setting(key, value)))
    except tg.UserError:
        return
    assert isinstance(cfg, tg.Config) and named.keys() == tg.load_artifact(path)[1].keys()


def test_weights_are_loaded_strictly(tmp_path):
    cfg = tiny()
    model = build(cfg)
    named = {n: p.detach().clone() for n, p in model.named_parameters()}
    tg.load_weights(model, named, "x")
    for change, words in (
        (lambda d: d.pop("head"), "missing \\['head'\\]"),
        (lambda d: d.update(extra=torch.zeros(1)), "unknown \\['extra'\\]"),
        (
            lambda d: d.update(embed=torch.zeros(3, 3)),
            "embed is \\[3, 3\\] there and \\[96, 32\\] here",
        ),
    ):
        other = dict(named)
        change(other)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(tg.UserError, match=words):
            tg.load_weights(model, other, "x")
        if "embed" not in words:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# --- averages


def walk(cfg, steps: int):
    """
    Random steps of the weights; the averages after each, and the history of one parameter in
    float64.
    """
    model = build(cfg)
    opt = tg.MuonAdamW(cfg, model, alone())
    avg, history = tg.Averages(cfg, opt), []
    name = "blocks.0.mlp.fc"
    p = dict(model.named_parameters())[name]
    history.append(p.detach().double().numpy().copy())
    for step in range(1, steps + 1):
        for b in opt.buckets:
            b.weights.add_(
                0.1
                * torch.randn(b.weights.shape, generator=torch.Generator().manual_seed(step)).to(
                    b.weights.dtype
                )
            )
        avg.update(step, step / steps)
        history.append(p.detach().double().numpy().copy())
    return model, opt, avg, history, name


@pytest.mark.parametrize("decay, dtype", [(0.9, "float32"), (0.99, "float32"), (0.5, "bfloat16")])
def test_ema_is_its_closed_formula(decay, dtype):
    """
    sum over t of (1-k_t) * w_t * product of the later k, with k_t = min(decay, t/(t+9)); kept in
    fp32.
    """
    _, _, avg, history, name = walk(tiny(ema=decay, param_dtype=dtype), 30)
    k = [0.0, *(min(decay, t / (t + 9)) for t in range(1, 31))]
    expected = sum((1 - k[t]) * math.prod(k[t + 1 :]) * w for t, w in enumerate(history))
    got = avg.state_dict()[f"{name}:ema"]
    assert got.dtype == torch.float32 and np.allclose(
        got.numpy().reshape(expected.shape), expected, atol=1e-5
    )
    assert sum((1 - k[t]) * math.prod(k[t + 1 :]) for t in range(31)) == pytest.approx(1)


@pytest.mark.parametrize(
    "every, start, taken",
    [
        (5, 0.5, [15, 20, 25, 30]),
        (4, 0.75, [24, 28]),
        (1, 0.9, [27, 28, 29, 30]),
        (7, 0.0, [7, 14, 21, 28]),
    ],
)
def test_swa_is_the_mean_of_its_snapshots(every, start, taken):
    _, _, avg, history, name = walk(tiny(swa_every=every, swa_start=start), 30)
    assert avg.swa_count == len(taken)
    expected = np.mean([history[t] for t in taken], axis=0)
    assert np.allclose(
        avg.state_dict()[f"{name}:swa"].numpy().reshape(expected.shape), expected, atol=1e-5
    )


def test_only_averages_with_snapshots_are_evaluated():
    cfg = tiny(swa_every=100, ema=0.9)
    assert walk(cfg, 5)[2].ready() == ["ema"]
    assert walk(tiny(swa_every=2, swa_start=0.5), 5)[2].ready() == ["swa"]
    assert walk(tiny(), 3)[2].ready() == [] and walk(tiny(), 3)[2].shards == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swapping_averages_in_leaves_the_live_weights(dtype):
    model, opt, avg, _, name = walk(
        tiny(ema=0.9, swa_every=3, swa_start=0.0, param_dtype=dtype), 10
    )
    live = {n: p.detach().clone() for n, p in model.named_parameters()}
    for kind in ("ema", "swa"):
        with avg.swapped_in(kind):
            inside = dict(model.named_parameters())
            for n, p in inside.items():
                assert torch.equal(p, avg.state_dict()[f"{n}:{kind}"].view(p.shape).to(p.dtype))
            assert not torch.equal(inside[name], live[name])
        assert all(torch.equal(p, live[n]) for n, p in model.named_parameters())
        with pytest.raises(tg.Interrupted), avg.swapped_in(kind):
            model.head.data.fill_(7)
            raise tg.Interrupted
        assert all(torch.equal(p, live[n]) for n, p in model.named_parameters())
    with tg.weights_of(SimpleNamespace(avg=avg), "live"):
        assert all(torch.equal(p, live[n]) for n, p in model.named_parameters())


def test_averages_saved_on_one_rank_are_the_same_on_three():
    cfg = tiny(ema=0.9, swa_every=3, swa_start=0.0)
    _, opt, avg, _, _ = walk(cfg, 10)
    saved = avg.state_dict()
    shards = {"ema": [], "swa": []}
    for rank in range(3):
        model = build(cfg)
        other = tg.Averages(cfg, tg.MuonAdamW(cfg, model, alone(rank, 3)))
        other.load_state_dict(saved, rank)
        assert other.swa_count == avg.swa_count == 3
        for kind in shards:
            shards[kind].append(other.shards[kind])
    for kind, parts in shards.items():
        for i, b in enumerate(opt.buckets):
            whole = torch.cat([p[i] for p in parts])
            assert torch.equal(whole[: b.weights.size(0)], avg.shards[kind][i])


# --- checkpoints, with a real run of one process


def started(folder, data=None, **changes):
    """A real Run (without its signal handlers) and its parts on 4,000 random tokens."""
    data = data or folder.parent / "data"
    if not data.exists():
        data.mkdir(parents=True)
        rng = np.random.default_rng(0)
        write_shard(data / "x_train_000000.bin", rng.integers(0, 96, 4000))
        write_shard(data / "x_val_000000.bin", rng.integers(0, 96, 300))
    cfg = tiny(data=str(data), log_dir=str(folder.parent), run=folder.name, **changes)
    tg.validate(cfg)
    run = tg.Run(cfg)
    return run, tg.build(cfg, run)


def train_on(p, start: int, steps: int) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        losses.append(p_step(p, step))
    return losses


def p_step(p, step: int) -> float:
    loss, _ = tg.train_step(p, step, p.plan.at(step, step / p.cfg.steps))
    p.avg.update(step + 1, (step + 1) / p.cfg.steps)
    return float(loss)


def everything(p) -> dict[str, torch.Tensor]:
    return (
        {n: q.detach().clone() for n, q in p.model.named_parameters()}
        | {f"o:{k}": v for k, v in p.opt.state_dict().items()}
        | {f"a:{k}": v for k, v in p.avg.state_dict().items()}
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.9, "swa_every": 2, "swa_start": 0.1},
        {"shuffle": 1, "epochs": 3, "normuon": 0.9},
        {"optimizer": "adamw", "tie_embed": 1, "matrix_wd": 0.1},
        {"param_dtype": "bfloat16", "ema": 0.5},
    ],
    ids=str,
)
def test_resumed_training_is_the_same_to_the_bit(tmp_path, changes):
    run, p = started(tmp_path / "a", **changes)
    train_on(p, 0, 5)
    run.clock.total, run.began = 12.5, run.began - 100.0
    torch.rand(3)
    saved = tg.save_checkpoint(p, 5)
    assert saved == tmp_path / "a" / "ckpt" / "000005"
    at_save, draw = everything(p), torch.rand(4)
    goes_on = train_on(p, 5, 6)
    torch.manual_seed(999)
    run2, q = started(tmp_path / "a", **changes)
    assert tg.load_checkpoint(saved, q) == 5
    assert torch.equal(torch.rand(4), draw), "the generator's state must come back"
    assert run2.clock.total == 12.5 and run2.wall() > 100
    assert all(torch.equal(v, at_save[k]) for k, v in everything(q).items())
    assert train_on(q, 5, 6) == goes_on
    a, b = everything(p), everything(q)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert p.loader.state_dict() == q.loader.state_dict()


def test_only_complete_folders_are_checkpoints(tmp_path):
    """
    Complete means: a number for a name, and DONE. What the user put beside them is left alone.
    """
    run, p = started(tmp_path / "a", keep=2)
    folder = tmp_path / "a" / "ckpt"
    assert tg.checkpoints(tmp_path / "a") == []
    for name in ("000009", ".000010.part", "best", "10_copy", "000003"):
        (folder / name).mkdir(parents=True)
        if name not in ("000009", "000003"):
            (folder / name / "DONE").touch()
    (folder / "notes.txt").write_text("x")
    assert tg.checkpoints(tmp_path / "a") == []
    for step in (1, 2, 20, 3, 100000000):
        tg.save_checkpoint(p, step)
    assert [c.name for c in tg.checkpoints(tmp_path / "a")] == ["000020", "100000000"]
    left = {f.name for f in folder.iterdir()}
    assert {"best", "10_copy", "notes.txt"} <= left and not left & {
        "000001",
        "000002",
        ".000002.part",
    }


@pytest.mark.parametrize("keep", [1, 3])
def test_newest_checkpoints_are_kept(tmp_path, keep):
    run, p = started(tmp_path / "a", keep=keep)
    for step in range(5, 12):
        tg.save_checkpoint(p, step)
    assert [int(c.name) for c in tg.checkpoints(tmp_path / "a")] == list(range(12 - keep, 12))
    assert len(list((tmp_path / "a" / "ckpt").iterdir())) == keep


@pytest.mark.parametrize("when", ["save_tensors", "sync_folder", "rename"])
def test_crash_while_saving_keeps_the_older_checkpoint(tmp_path, monkeypatch, when):
    run, p = started(tmp_path / "a", keep=1)
    first = tg.save_checkpoint(p, 1)
    before = {f.name: f.read_bytes() for f in first.iterdir()}

    def crash(*a):
        raise KeyboardInterrupt  # nothing that the code could mend

    monkeypatch.setattr(tg.os if when == "rename" else tg, when, crash)
    for step in (1, 2):
        try:
            tg.save_checkpoint(p, step)
        except KeyboardInterrupt:
            pass
        assert tg.checkpoints(tmp_path / "a") == [first]
        assert {f.name: f.read_bytes() for f in first.iterdir()} == before
    monkeypatch.undo()
    second = tg.save_checkpoint(p, 2)
    assert tg.checkpoints(tmp_path / "a") == [second]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "averages.safetensors", "state.json"]
)
def test_damaged_checkpoint_is_refused_by_file_name(tmp_path, name):
    run, p = started(tmp_path / "a", ema=0.9)
    saved = tg.save_checkpoint(p, 1)
    whole = (saved / name).read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        (saved / name).write_bytes(data)
        with pytest.raises(tg.UserError, match=name):
            tg.load_checkpoint(saved, p)


def in_state(*keys, value):
    """Change what state.json says under `keys`."""

    def change(folder):
        state = part = json.loads((folder / "state.json").read_text())
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        (folder / "state.json").write_text(json.dumps(state))
        return "state.json"

    return change


def of_another(name: str):
    def change(folder):
        shutil.copy(folder / "model.safetensors", folder / f"{name}.safetensors")
        return f"{name}.safetensors"

    return change


@pytest.mark.parametrize(
    "change",
    [
        *[lambda f, t=t: (f / "state.json").write_text(t) and "state.json" for t in ("{}", "[]")],
        in_state("rng", value=[{"cpu": "zz"}]),
        in_state("rng", value=[{"cpu": "00"}]),
        in_state("loader", "shard", value=99),
        in_state("loader", "shard", value="1"),
        in_state("loader", "epoch", value=-1),
        in_state("data", value=[]),
        in_state("train_seconds", value="much"),
        in_state("step", value=None),
        of_another("optimizer"),
        of_another("averages"),
    ],
)
def test_checkpoint_of_other_content_is_refused_by_file_name(tmp_path, change):
    _, p = started(tmp_path / "a", ema=0.9)
    saved = tg.save_checkpoint(p, 1)
    name = change(saved)
    with pytest.raises(tg.UserError, match=rf"{name} cannot be used .* delete"):
        tg.load_checkpoint(saved, p)


def test_averages_of_other_content_are_refused_by_file_name(tmp_path):
    _, p = started(tmp_path / "a", ema=0.9, final_weights="ema")
    saved = tg.save_checkpoint(p, 1)
    of_another("averages")(saved)
    with pytest.raises(tg.UserError, match="averages.safetensors cannot be used"):
        tg.open_source(str(saved))


# --- starting from other weights


def test_source_is_a_run_a_checkpoint_or_an_artifact(tmp_path):
    run, p = started(tmp_path / "a")
    with pytest.raises(tg.UserError, match="no such run folder, checkpoint or artifact"):
        tg.open_source(str(tmp_path / "nowhere"))
    run.folder.mkdir()
    with pytest.raises(tg.UserError, match="neither an artifact .* nor a complete checkpoint"):
        tg.open_source(str(run.folder))
    saved = tg.save_checkpoint(p, 3)
    for where in (run.folder, saved):
        cfg, named, path = tg.open_source(str(where))
        assert path == saved and cfg == run.cfg and torch.equal(named["embed"], p.model.embed)
    write_artifact(run.folder / "model.nrx", p.model)
    for where in (run.folder, run.folder / "model.nrx"):
        assert tg.open_source(str(where))[2] == run.folder / "model.nrx"


@pytest.mark.parametrize(
    "transfer, expected",
    [("all", 10), ("attn", 4), ("mlp", 4), ("attn+mlp", 8), (r"blocks\.1\.", 4), ("embed|head", 2)],
)
def test_transfer_takes_the_parts_that_were_asked_for(tmp_path, transfer, expected):
    run, p = started(tmp_path / "old", seed=5)
    with torch.no_grad():
        for q in p.model.parameters():
            q.add_(1)
    tg.save_checkpoint(p, 3)
    run2, new = started(tmp_path / "new", init_from=str(tmp_path / "old"), transfer=transfer)
    fresh = dict(build(new.cfg).named_parameters())
    old = dict(p.model.named_parameters())
    taken = {n for n, q in new.model.named_parameters() if torch.equal(q, old[n])}
    kept = {n for n, q in new.model.named_parameters() if torch.equal(q, fresh[n])}
    assert len(taken) == expected and taken | kept == set(old) and not taken & kept
    pattern = {"all": "", "attn": "attn", "mlp": "mlp", "attn+mlp": "attn|mlp"}.get(
        transfer, transfer
    )
    assert taken == {n for n in old if tg.re.search(pattern, n)}


def test_transfer_of_nothing_or_of_another_shape_is_refused(tmp_path):
    run, p = started(tmp_path / "old")
    tg.save_checkpoint(p, 3)
    with pytest.raises(tg.UserError, match="transfer = 'zzz' takes nothing"):
        started(tmp_path / "new", init_from=str(tmp_path / "old"), transfer="zzz")
    with pytest.raises(
        tg.UserError, match=r"blocks.0.mlp.fc is \[128, 32\] there and \[64, 32\] here.*--transfer"
    ):
        started(tmp_path / "new", init_from=str(tmp_path / "old"), mlp_ratio=2.0)
    started(tmp_path / "new", init_from=str(tmp_path / "old"), mlp_ratio=2.0, transfer="attn")


def test_size_of_the_code_counts_every_file_that_a_score_needs(monkeypatch):
    """The started script, train_gpt.py, and the scorers where more than whole rows is scored."""
    here, scorers = ROOT / "train_gpt.py", ROOT / "logs" / "score.py"
    for argv, expected in (
        ([str(here)], [here]),
        ([str(ROOT / "pre_pre_train.py")], [ROOT / "pre_pre_train.py", here]),
        (["/usr/bin/pytest"], [here]),
        (["-c"], [here]),
        ([str(scorers)], [here]),
    ):
        monkeypatch.setattr(tg.sys, "argv", argv)
        assert tg.source_files(tiny()) == tg.source_files(tiny(score={"modes": ""})) == expected
        scored = tiny(score={"modes": "sliding"})
        assert tg.source_files(scored) == [*expected, scorers]
        assert tg.source_bytes(scored) == sum(len(p.read_bytes()) for p in [*expected, scorers])
