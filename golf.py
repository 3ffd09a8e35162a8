"""
What golf adds to the trainer: smaller artifacts, better scores, and the proof that a score decodes.

    python golf.py score logs/my-run --mode sliding --stride 64     # or chunked, mixture, ttt
    python golf.py prove logs/my-run --mode mixture --bytes 16384   # encode text, decode it in a fresh process, compare
    python golf.py quantise logs/my-run                             # bytes and bits per byte lost, choice by choice
    python golf.py export logs/my-run --out small.nrx --bits int6   # an artifact; --bits fit: the most that fits --limit

Read it from top to bottom:
    Quantisation   rows of integers: clip search, GPTQ on recorded inputs
    Coders         zstd, brotli, xz, and a range coder with histograms fitted to rows and columns
    Artifact       one file; loading executes nothing and unpacks within bounds
    Scorers        chunked, sliding window, online mixture, score-first test-time training
    Proof          distributions that sum to 1 and know no future, and a text that comes back from its code
    A run's golf   what train_gpt does behind its last step: artifact, scores, proof
    Command line   score, prove, decode, quantise, export

A score is a code length. Every scorer gives the probability of each token of a stream behind its
predecessors, and does so twice: `score` takes a whole stream at the speed of the batched forward
pass, `distribution` and `observe` walk one token at a time and cannot look ahead. The first is what
is claimed, the second is what decodes; `prove` ties them. The model is train_gpt's and is never
copied here. Letters as there: B, T, D, V; losses in nats per token.
"""

import contextlib
import copy
import hashlib
import io
import json
import lzma
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import brotli
import numpy as np
import torch
import torch.nn.functional as F
import tyro
import zstandard
from constriction import stream as coder
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import train_gpt as tg
from train_gpt import Config, UserError

########################################
#             Quantisation             #
########################################

# fractions of a row's largest entry at which it may be clipped
CLIPS = tuple(1 - i / 20 for i in range(13))
# finest first
LADDER = ("int8", "int7", "int7 mlp:6", "int6", "int6 mlp:5", "int5", "int5 mlp:4", "int4")


def levels_of(bits: int) -> int:
    """The largest integer of symmetric `bits`-bit codes: 127 for 8, 31 for 6, 7 for 4."""
    return 2 ** (bits - 1) - 1


def is_matrix(w: Tensor) -> bool:
    """
    Matrices, stacks of them and tables are quantised; vectors and stacks of vectors stay floating
    point.
    """
    return w.ndim >= 2 and min(w.shape[-2:]) >= 64


class Bits(NamedTuple):
    """
    Bits by tensor: "int6 mlp:5 head:8" is 5 where the name matches mlp, 8 where it matches head,
    else 6.
    """

    default: int
    rules: tuple[tuple[str, int], ...]

    def of(self, name: str) -> int:
        return next(
            (bits for pattern, bits in self.rules if re.search(pattern, name)), self.default
        )


def parse_bits(text: str) -> Bits:
    words = text.split()
    rules = [re.fullmatch(r"(.+):([4-8])", word) for word in words[1:]]
    if not words or not re.fullmatch("int[4-8]", words[0]) or None in rules:
        raise UserError(
            f"export = {text!r}: write int8, int7, int6, int5 or int4, then regular "
            "expressions over names "
            "with other bits, for example 'int6 mlp:5 head:8'; or 'fit' to choose by artifact_limit"
        )
    for rule in rules:
        try:
            re.compile(rule[1])
        except re.error as e:
            raise UserError(f"export = {text!r}: {rule[1]!r} is no regular expression: {e}") from e
    return Bits(int(words[0][3:]), tuple((rule[1], int(rule[2])) for rule in rules))


def check_bits(text: str, named: dict[str, Tensor]) -> Bits:
    """parse_bits, and UserError where a rule is about no matrix of the model."""
    bits = parse_bits(text)
    matrices = [name for name, w in named.items() if is_matrix(w)]
    for pattern, _ in bits.rules:
        if not any(re.search(pattern, name) for name in matrices):
            raise UserError(
                f"export = {text!r}: {pattern!r} matches no matrix of the model; they are "
                f"{', '.join(matrices)}"
            )
    return bits


def quantize_rows(w: Tensor, levels: int = 127) -> tuple[Tensor, Tensor]:
    """
    Weights [..., rows, cols] -> integers in +-levels and fp16 scales [..., rows, 1]: the largest
    entry of a row maps to `levels`. The rounding uses the scale as stored, so an entry is off by
    half a scale at most.
    """
    top = torch.finfo(torch.float16)
    scale = (w.float().abs().amax(-1, keepdim=True) / levels).clamp(2.0**-24, top.max)
    stored = scale.half()
    larger = stored.nextafter(torch.full_like(stored, top.max))
    stored = torch.where(stored.float() * levels < scale * levels, larger, stored)
    q = (w.float() / stored.float()).round().clamp(-levels, levels).to(torch.int8)
    return q, stored


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale.float()


def codes(w: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Nearest integers, with the scale as it is stored (fp16)."""
    return (w.float() / scale.float()).round().clamp(-levels, levels).to(torch.int8)


def clip_search(w: Tensor, levels: int) -> Tensor:
    """
    fp16 scales [..., rows, 1] of weights [..., rows, cols]: of several clips the one with the least
    squared error of the row. parameter-golf's GPTQ-lite, with fractions of the largest entry in
    place of quantiles: at 6 bits and below the best clip lies far under the quantiles that it
    tries.
    """
    _, best = quantize_rows(w, levels)
    least = (
        (dequantize_rows(codes(w, best, levels), best) - w.float()).square().sum(-1, keepdim=True)
    )
    widest = best.float()
    for clip in CLIPS[1:]:
        scale = (widest * clip).half().clamp_min(2.0**-24)
        error = (
            (dequantize_rows(codes(w, scale, levels), scale) - w.float())
            .square()
            .sum(-1, keepdim=True)
        )
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def gptq(w: Tensor, hessian: Tensor, scale: Tensor, levels: int, block: int = 128) -> Tensor:
    """
    Codes [rows, cols] that lessen tr((W-Q) H (W-Q)^T), where H [cols, cols] is the mean of x x^T
    over the inputs of W: columns are rounded by falling H_ii, and the error of each is made up for
    by those behind it (Frantar et al. 2022). In float64; damping is 1 % of the mean diagonal. The
    scale of a row is given and stays.
    """
    w, h, scale = w.double().clone(), hessian.double().clone(), scale.double()
    diagonal = h.diagonal()
    dead = diagonal == 0  # inputs that never fired: their weights are free, and 0 costs least
    diagonal[dead] = 1
    w[:, dead] = 0
    diagonal += 0.01 * diagonal.mean()
    order = diagonal.argsort(descending=True, stable=True)
    w, h = w[:, order], h[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.empty_like(w)
    for low in range(0, w.size(1), block):
        high = min(low + block, w.size(1))
        errors = torch.empty_like(w[:, low:high])
        for j in range(low, high):
            q[:, j] = (w[:, j] / scale[:, 0]).round().clamp(-levels, levels)
            errors[:, j - low] = (w[:, j] - q[:, j] * scale[:, 0]) / upper[j, j]
            w[:, j:high] -= errors[:, j - low, None] * upper[j, j:high]
        w[:, high:] -= errors @ upper[low:high, high:]
    return q[:, order.argsort()].to(torch.int8)


@contextlib.contextmanager
def swapped(owner, **values):
    """
    Inside, attributes of a module or an object are others; behind it, they are what they were.
    """
    kept = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


class OutOfTime(Exception):
    """The training clock has come to the end of what calibration may take, within a row."""


@torch.compiler.set_stance("force_eager")  # compiled graphs do not call the recording function
@torch.no_grad()
def record_hessians(
    model: tg.GPT, rows: np.ndarray, repeats: int, window: int, run=None, until: float = math.inf
) -> tuple[dict[str, Tensor], int]:
    """
    Mean of x x^T over the inputs of every matrix that train_gpt.linear multiplies with, by
    parameter name, from calibration rows [n, T+1] of TRAINING tokens (collecting them counts as
    training time under the rules). All uses of a shared matrix add up; a tied table gets the final
    norm's output. Ranks take turns with rows and share the sums. When the training clock says
    `until`, it ends for all of them, also within a row. With it goes how many rows were seen whole.
    """
    run = run or alone(model.head.device)
    plain, timed = tg.linear, until < math.inf

    def is_late() -> bool:
        run.clock.sync()  # the host runs ahead of a GPU
        return run.clock.seconds() >= until

    sums = {
        name: p.new_zeros(p.size(-1), p.size(-1), dtype=torch.float32)
        for name, p in model.named_parameters()
        if is_matrix(p)
    }
    # flatten() of a stack keeps the address
    names = {p.data_ptr(): name for name, p in model.named_parameters()}

    def recording(x: Tensor, w: Tensor) -> Tensor:
        if timed and is_late():
            raise OutOfTime
        flat = x.detach().reshape(-1, x.size(-1)).float()
        name = names.get(w.data_ptr())
        if name in sums:  # IHA's mixture of matrices is none of them: they are rounded plainly
            sums[name] += flat.mT @ flat
        return plain(x, w)

    whole = 0
    with swapped(tg, linear=recording):
        for turn in range(0, len(rows), run.world):  # as many on every rank: each asks the others
            if run.agree(float(timed and is_late())):
                break
            for row in rows[turn + run.rank :][:1]:
                with contextlib.suppress(OutOfTime):  # the others end at their next turn
                    model(*tg.tensors(row[None], run.device), repeats, window)
                    whole += 1
    # A rank without a row has seen no name: all sums are exchanged, and those without an input are
    # zero on every rank.
    seen = int(run.sum(torch.tensor(whole, device=run.device)))
    found = {name: run.sum(h) / (seen * (rows.shape[1] - 1)) for name, h in sums.items() if seen}
    return {name: h for name, h in found.items() if bool(h.any())}, seen


def row_scales(w: Tensor, levels: int) -> Tensor:
    """fp16 scales [..., rows, 1]: 8 bits keep the whole range of a row, fewer search a clip."""
    return quantize_rows(w)[1] if levels == 127 else clip_search(w, levels)


def quantise(
    named: dict[str, Tensor], bits: Bits, hessians: dict[str, Tensor] | None = None
) -> dict[str, tuple]:
    """Codes, fp16 scales and levels of every matrix; GPTQ rounds where there is a Hessian."""
    found = {}
    for name, w in named.items():
        if not is_matrix(w):
            continue
        levels, w = levels_of(bits.of(name)), w.detach().float()
        scale = row_scales(w, levels)
        q = codes(w, scale, levels)
        if hessians and name in hessians:
            flat = w.flatten(0, -2), hessians[name].to(w.device), scale.flatten(0, -2)
            q = gptq(*flat, levels).view_as(w)
        found[name] = q.cpu().contiguous(), scale.cpu().contiguous(), levels
    return found


@contextlib.contextmanager
def rounded(model: tg.GPT, cfg: Config, step: int):
    """
    Inside, matrices have the values that cfg.export would store. With qat_noise, they are off by up
    to half a rounding step at random (Noisy Quantisation, Fan et al. 2020) instead, and only those
    of looped blocks where there is a loop: their error adds up over repeats (parameter-golf #363).
    Gradients taken inside are applied to the exact weights, which is the straight-through
    estimator. Every rank rounds alike.
    """
    looped = "|".join(map(str, range(*tg.loop_span(cfg))))
    chosen = rf"blocks\.({looped})\." if cfg.qat_noise and looped else ""
    exact = {
        p: p.detach().clone()
        for name, p in model.named_parameters()
        if is_matrix(p) and re.match(chosen, name)
    }
    rng, bits = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step), parse_bits(cfg.export)
    try:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p in exact:
                    levels = levels_of(bits.of(name))
                    scale = row_scales(p, levels)
                    noise = None
                    if cfg.qat_noise:  # from the CPU, as every rank rounds alike; no wait for a GPU
                        noise = torch.rand(p.shape, generator=rng, pin_memory=p.is_cuda)
                        noise = noise.to(p.device, non_blocking=True).to(p.dtype) - 0.5
                    p.copy_(
                        dequantize_rows(codes(p, scale, levels), scale)
                        if noise is None
                        else p + noise * scale.to(p)
                    )
        yield
    finally:
        with torch.no_grad():
            for p, own in exact.items():
                p.copy_(own)


########################################
#                Coders                #
########################################


def unzstd(data: bytes, size: int) -> bytes:
    return (
        zstandard.ZstdDecompressor(max_window_size=1 << 27)
        .stream_reader(io.BytesIO(data))
        .read(size)
    )


def unbrotli(data: bytes, size: int) -> bytes:
    decoder, parts, left = brotli.Decompressor(), [], size
    while left > 0 and not decoder.is_finished():
        part = decoder.process(data, output_buffer_limit=left)
        if not part and not data:
            break  # cut short: nothing left to give it
        data = b""
        parts.append(part)
        left -= len(part)
    return b"".join(parts)[:size]  # the library takes its limit for a rough one


def unxz(data: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor(memlimit=1 << 30).decompress(data, size)


# name -> compress(data), decompress(data, most bytes to give)
CODECS: dict[str, tuple[Callable, Callable]] = {
    "zstd": (lambda data: zstandard.ZstdCompressor(level=22).compress(data), unzstd),
    "brotli": (lambda data: brotli.compress(data, quality=11, lgwin=24), unbrotli),
    "xz": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), unxz),
}
ENTROPY = "entropy"  # the range coder below for the codes, the smallest of the above for the rest
# widths of a class of spreads, in eighths of an octave; the last: all in one class
STEPS = (2, 4, 16, 1 << 20)


def spread_classes(rows: np.ndarray, cols: np.ndarray, step: int) -> np.ndarray:
    """
    Class of every entry [R, C] from the logarithms of its row's and column's spread (int8, eighths
    of octaves).
    """
    both = (rows.astype(np.int64)[:, None] + cols.astype(np.int64)) // step
    return both - both.min()


def log_spread(x: np.ndarray) -> np.ndarray:
    return np.round(8 * np.log2(np.maximum(x, 2.0**-12))).clip(-127, 127).astype(np.int8)


def histogram(counts: np.ndarray):
    """
    The coder's model of counts: the same IEEE divisions on every machine; what has no count keeps
    2^-24.
    """
    return coder.model.Categorical(counts.astype(np.float64) / counts.sum(), perfect=False)


def encode_codes(q: np.ndarray, levels: int) -> tuple[dict[str, np.ndarray], int, np.ndarray]:
    """
    Codes [R, C] in +-levels -> tables, step, range-coded words. Entries whose row and column spread
    alike share a class and its histogram, so what is fitted is the shape of the distribution and
    not only its width. Classes are as wide as pays for their tables.
    """
    size = np.abs(q.astype(np.float64))
    row_mean = size.mean(1)
    rows = log_spread(row_mean)
    cols = log_spread((size / np.maximum(row_mean, 2.0**-12)[:, None]).mean(0))
    symbols, width = q.astype(np.int64) + levels, 2 * levels + 1
    best = None
    for step in STEPS:
        classes = spread_classes(rows, cols, step)
        least = (classes.max() + 1) * width
        counts = np.bincount((classes * width + symbols).ravel(), minlength=least).reshape(
            -1, width
        )
        totals = counts.sum(1, keepdims=True)
        bits = -(
            counts * np.log2(np.maximum(counts, 1) / np.maximum(totals, 1))
        ).sum() + 8 * np.count_nonzero(counts)
        if best is None or bits < best[0]:
            best = bits, step, classes, counts
    _, step, classes, counts = best
    counts = np.ceil(counts * min(1.0, 65535 / counts.max())).astype(np.uint16)
    order, encoder = np.argsort(classes.ravel(), kind="stable"), coder.queue.RangeEncoder()
    symbols, sizes = (
        symbols.ravel()[order].astype(np.int32),
        np.bincount(classes.ravel(), minlength=len(counts)),
    )
    for part, row in zip(np.split(symbols, np.cumsum(sizes)[:-1]), counts):
        if len(part):
            encoder.encode(part, histogram(row))
    return {"rows": rows, "cols": cols, "counts": counts}, step, encoder.get_compressed()


def decode_codes(
    tables: dict[str, np.ndarray], step: int, words: np.ndarray, levels: int
) -> np.ndarray:
    """The inverse of encode_codes. ValueError where the tables cannot belong together."""
    rows, cols, counts = tables["rows"], tables["cols"], tables["counts"]
    if step not in STEPS:
        raise ValueError(f"classes of width {step}")
    classes = spread_classes(rows, cols, step)
    sizes = np.bincount(classes.ravel())
    if counts.shape != (len(sizes), 2 * levels + 1):
        raise ValueError(
            f"histograms {counts.shape} for {len(sizes)} classes of {2 * levels + 1} codes"
        )
    decoder, parts = coder.queue.RangeDecoder(words), []
    for size, row in zip(sizes, counts):
        if size:
            parts.append(decoder.decode(histogram(row), int(size)))
    if not decoder.maybe_exhausted():
        raise ValueError("codes are left over")
    q = np.empty(classes.size, np.int8)
    q[np.argsort(classes.ravel(), kind="stable")] = np.concatenate(parts) - levels
    return q.reshape(classes.shape)


########################################
#               Artifact               #
########################################

MAGIC = b"NANORMX2"
MOST = 1 << 33  # bytes that an artifact may unpack to, whatever its header says ...
MOST_RATIO = 1024  # ... nor may it unpack to more than so many times its own size and 64 MiB


def pack(
    named: dict[str, Tensor], found: dict[str, tuple], cfg: Config, codec: str, note: str = ""
) -> bytes:
    """
    One file: magic, length of a JSON header, header (configuration, kind of every tensor, codec,
    sizes), compressed safetensors, range-coded words, sha256 of all before. `found` is quantise's;
    its codes are int8 tensors among the others, or with the codec "entropy" words behind them.
    Beside 8-bit codes small tensors stay exact, else fp16.
    """
    out, kinds, words = {}, {}, []
    exact = all(levels == 127 for _, _, levels in found.values())
    for name, w in named.items():
        if name in found:
            q, out[f"{name}:scale"], levels = found[name]
            kinds[name] = {"kind": "rows", "shape": list(q.shape), "levels": levels}
            if codec == ENTROPY:
                tables, step, stream = encode_codes(q.flatten(0, -2).numpy(), levels)
                out |= {f"{name}:{key}": torch.from_numpy(table) for key, table in tables.items()}
                kinds[name] |= {"step": step, "words": len(stream)}
                words.append(stream.astype("<u4").tobytes())
            else:
                out[f"{name}:q"] = q
        else:
            w = w.detach().cpu().contiguous()
            top = torch.finfo(torch.float16).max
            out[name] = w if exact or w.abs().max() > top else w.half()
            kinds[name] = {"kind": "plain"}
    payload = save_tensors(out)
    inner_codecs = CODECS if codec == ENTROPY else (codec,)
    packed, inner = min(
        ((CODECS[c][0](payload), c) for c in inner_codecs), key=lambda pair: len(pair[0])
    )
    header = json.dumps(
        {
            "codec": codec,
            "rest": inner,
            "payload_bytes": len(payload),
            "packed_bytes": len(packed),
            "bits": note,
            "tensors": kinds,
            "config": tg.config_toml(cfg),
        }
    ).encode()
    body = b"".join([MAGIC, struct.pack("<I", len(header)), header, packed, *words])
    return body + hashlib.sha256(body).digest()


def smallest(
    named: dict[str, Tensor],
    cfg: Config,
    bits: str = "int8",
    codecs: tuple[str, ...] = ("zstd",),
    hessians: dict[str, Tensor] | None = None,
    most: int = 0,
    log: Callable = lambda line: None,
) -> tuple[bytes, str]:
    """
    The artifact of weights `named`, and what was chosen for it ("int6_entropy"). Of several codecs
    (names of CODECS, "entropy", or "best" for all of them) the smallest result is kept. bits "fit"
    goes down LADDER until the file has at most `most` bytes; where even the last has more, that one
    is given.
    """
    codecs = (*CODECS, ENTROPY) if "best" in codecs else codecs
    for choice in LADDER if bits == "fit" else (bits,):
        found = quantise(
            named, parse_bits(choice) if bits == "fit" else check_bits(choice, named), hessians
        )
        packed = {codec: pack(named, found, cfg, codec, choice) for codec in codecs}
        codec = min(packed, key=lambda c: len(packed[c]))
        log(
            f"artifact: {choice}{' gptq' if hessians else ''} "
            + " ".join(f"{c}:{len(p)}" for c, p in packed.items())
            + f" -> {codec}"
            + (f", limit {most}" if most else "")
        )
        if len(packed[codec]) <= most:
            break
    return packed[codec], re.sub(r"\W+", "_", f"{choice}_{codec}")


def unpack(data: bytes, where: str) -> tuple[Config, dict[str, Tensor], dict]:
    """
    Configuration, fp32 weights and header of an artifact's bytes. Executes nothing; any damage is a
    UserError.
    """

    def bad(why: str) -> UserError:
        return UserError(
            f"{where} is no usable artifact: {why}; export it again from its checkpoint"
        )

    start = len(MAGIC) + 4
    if not data.startswith(MAGIC):
        raise bad("it does not begin with the artifact's magic")
    if len(data) < start + 32 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise bad("its checksum does not match: it is cut short or changed")
    try:
        (length,) = struct.unpack("<I", data[start - 4 : start])
        header = json.loads(data[start : start + length])
        size, packed_size = header["payload_bytes"], header["packed_bytes"]
        shapes = [kind["shape"] for kind in header["tensors"].values() if kind["kind"] == "rows"]
        total = size + sum(math.prod(shape) for shape in shapes)
        if not all(
            type(n) is int and n >= 0
            for n in (size, packed_size, *(n for shape in shapes for n in shape))
        ):
            raise bad("its sizes are no numbers")
        if total > min(MOST, max(1 << 26, MOST_RATIO * len(data))):
            raise bad(f"its header wants {total} bytes")
        packed, stream = (
            data[start + length : -32][part]
            for part in (slice(packed_size), slice(packed_size, None))
        )
        payload = CODECS[header["rest"]][1](packed, size + 1)
        if len(payload) != size:
            raise bad("its payload has another size than its header says")
        named = read_tensors(header, load_tensors(payload), np.frombuffer(stream, "<u4"))
        cfg = Config(**tg.checked(tomllib.loads(header["config"]), where))
        tg.check_values(cfg)
        fits(cfg, named)
    except UserError as e:
        raise (e if where in str(e) else bad(str(e))) from None
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        MemoryError,
        AssertionError,
        zstandard.ZstdError,
        brotli.error,
        lzma.LZMAError,
        SafetensorError,
    ) as e:
        raise bad(f"{type(e).__name__}: {e}") from e
    return cfg, named, header


LONGEST = 1 << 20  # tokens of a row that an artifact may ask for ...
ANGLES = 1 << 27  # ... and numbers in its rotary table: 512 MiB


def fits(cfg: Config, named: dict[str, Tensor]) -> None:
    """
    ValueError unless the model of cfg has these tensors: what a header says of sizes must not cost
    more than the file.
    """
    plan = tg.Plan(cfg)
    longest, width = max(plan.max_seq_len, plan.eval_seq_len), tg.head_width(cfg)
    if cfg.depth > len(named) or longest > LONGEST or longest * width > ANGLES:
        raise ValueError(
            f"its configuration has {cfg.depth} blocks, rows of {longest} tokens and heads of "
            f"{width}"
        )
    model = tg.build_model(cfg, torch.device("meta"), torch.float32, 8)
    if {k: list(w.shape) for k, w in model.named_parameters()} != {
        k: list(w.shape) for k, w in named.items()
    }:
        raise ValueError("its tensors are not those of its configuration's model")


def read_tensors(header: dict, stored: dict[str, Tensor], words: np.ndarray) -> dict[str, Tensor]:
    """
    The tensors that a header tells of, from the payload's and the coded words. ValueError where
    they disagree.
    """
    named = {}
    for name, kind in header["tensors"].items():
        if kind["kind"] == "plain":
            w = stored.pop(name)
            named[name] = w.float() if w.dtype == torch.float16 else w
        elif kind["kind"] == "rows":
            shape, scale, levels = kind["shape"], stored.pop(f"{name}:scale"), kind["levels"]
            if levels not in map(levels_of, range(4, 9)):
                raise ValueError(f"{name} has codes up to {levels}")
            if header["codec"] == ENTROPY:
                tables = {
                    key: stored.pop(f"{name}:{key}").numpy() for key in ("rows", "cols", "counts")
                }
                count, step = kind["words"], kind["step"]
                sizes = tables["rows"].size, tables["cols"].size
                if sizes != (math.prod(shape[:-1]), shape[-1]) or not 0 <= count <= len(words):
                    raise ValueError(f"{name} has other tables than its shape asks for")
                q = torch.from_numpy(decode_codes(tables, step, words[:count], levels)).view(shape)
                words = words[count:]
            else:
                q = stored.pop(f"{name}:q")
            if (
                list(q.shape) != shape
                or list(scale.shape) != [*shape[:-1], 1]
                or q.dtype != torch.int8
            ):
                raise ValueError(f"{name} has another shape than its header says")
            named[name] = dequantize_rows(q, scale)
        else:
            raise ValueError(f"{name} is stored as {kind['kind']!r}, which is unknown")
        if not (named[name].is_floating_point() and bool(named[name].isfinite().all())):
            raise ValueError(f"{name} is not made of finite numbers")
    if stored or len(words):
        raise ValueError(f"its header does not tell of {sorted(stored)[:5]} and {len(words)} words")
    return named


def load(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and fp32 weights of an artifact file."""
    return unpack(Path(path).read_bytes(), str(path))[:2]


########################################
#               Scorers                #
########################################


@dataclass
class How:
    """How a stream is scored; encoder and decoder must be given the same."""

    # chunked, sliding, mixture (with n-grams), ttt or lora (training on what was scored)
    mode: str = "sliding"
    # tokens scored per window; every one has at least row - stride tokens before it
    stride: int = 64
    temperature: float = 1.0  # divides the logits; choose it on training tokens
    # mixture: weight spread over the experts after every token; 0: Bayes, regret at most ln 4
    share: float = 0.0
    ttt_chunk: int = 32768  # ttt: tokens scored before they are trained on
    ttt_epochs: int = 3  # ttt: passes over each chunk
    # ttt: learning rate of SGD with momentum 0.9, falling to 0 as a cosine over the chunks
    ttt_lr: float = 0.002
    lora_rank: int = 8  # lora: rank of the products that are trained on a document
    lora_lr: float = 0.001  # lora: learning rate of AdamW


class Scores(NamedTuple):
    nats: Tensor  # [n] float64: of every target
    times: Tensor  # [n] int32: how often it was scored; anything but 1 is a bug
    given: dict[int, np.ndarray]  # the whole distribution at the targets that were asked for


def alone(device: torch.device) -> SimpleNamespace:
    """What scorers ask of a Run, in one process without a run folder."""
    return SimpleNamespace(
        rank=0, world=1, device=device, agree=lambda seconds=0.0: seconds, sum=lambda x: x
    )


def window_plan(n: int, length: int, stride: int) -> np.ndarray:
    """
    Windows [k, 3] over n targets: first input, first target scored, end of the targets scored.
    Window k starts at k*stride; the first scores all that it covers, the others their last
    `stride`; the last may be cut short. Every target is scored once; behind the first window each
    has at least length - stride tokens before it.
    """
    count = max(1, -(-(n - length) // stride) + 1)
    starts = np.arange(count) * stride
    firsts = np.where(starts == 0, 0, starts + length - stride)
    return np.stack([starts, firsts, np.minimum(starts + length, n)], axis=1)


class Cache:
    """
    Keys and values of a row that grows: stands in for train_gpt.Seen, so that the model's own code
    computes the activations of new tokens alone. Feeding a row in pieces gives what one pass over
    it gives, up to float order.
    """

    def __init__(self, model: tg.GPT, repeats: int, window: int):
        self.model, self.repeats, self.window, self.size, self.docs = (
            model,
            repeats,
            window,
            0,
            None,
        )
        self.windows = [window if p.windowed else 0 for p in tg.wiring(model.cfg, repeats)]
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.turn = 0

    def feed(self, tokens: Tensor) -> Tensor:
        """Activations [T, D] of the next tokens [T]."""
        x = self.model.hidden(tokens[None], self.repeats, self.window, cache=self)[0]
        self.size += len(tokens)
        return x

    def seen(self, docs: Tensor | None) -> "Cache":
        """Begin a pass over the blocks for tokens of the documents docs [1, T]."""
        self.turn = 0
        if docs is not None:  # documents are counted within what is fed: go on from the last one
            self.docs = (
                docs if self.docs is None else torch.cat([self.docs, docs + self.docs[:, -1:]], 1)
            )
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bound: float) -> Tensor:
        if self.turn < len(self.kept):
            k, v = (torch.cat(pair, 2) for pair in zip(self.kept[self.turn], (k, v)))
            self.kept[self.turn] = k, v
        else:
            self.kept.append((k, v))
        self.turn += 1
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        pos = torch.arange(k.size(2), device=q.device)
        new = pos[k.size(2) - q.size(2) :, None]
        docs = (
            (self.docs[:, None, new], self.docs[:, None, None])
            if self.docs is not None
            else (None, None)
        )
        ok = tg.visible(new, pos, *docs, self.windows[self.turn - 1])
        return ((q * scale) @ k.mT).float().masked_fill(~ok, -torch.inf).softmax(-1).to(v.dtype) @ v


class Sliding:
    """
    The model over windows of the stream. Chunked is the plan whose stride is the whole row. Batches
    have one shape, ranks take turns with them. Temperature divides the logits; ids beyond the
    vocabulary get no probability.
    """

    def __init__(self, model: tg.GPT, how: How, shape: tg.Shape, run=None):
        self.model, self.how, self.shape = model, how, shape
        self.run = run or alone(model.head.device)
        self.length = shape.seq_len
        self.stride = shape.seq_len if how.mode == "chunked" else how.stride
        if not 1 <= self.stride <= self.length:
            raise UserError(
                f"stride = {how.stride}: must lie between 1 and the row's {self.length} tokens"
            )
        self.losses = (
            torch.compile(self.plain_losses, dynamic=False)
            if model.cfg.compile
            else self.plain_losses
        )
        self.hidden = self.whole(model.hidden)

    def whole(self, f: Callable) -> Callable:
        """
        Compiled as one graph where the model is (compile = 2); else its blocks are compiled by
        themselves, or nothing is.
        """
        return torch.compile(f, dynamic=False) if self.model.cfg.compile == 2 else f

    def warm_up(self) -> None:
        """Compile every graph that scoring needs, on random tokens of one document."""
        tokens = np.random.default_rng(0).integers(
            self.model.cfg.vocab - 1, size=self.length + self.stride + 1
        )
        self.score(tokens + (tokens >= self.model.cfg.doc_token))

    def log_probs(self, x: Tensor) -> Tensor:
        """Activations [..., D] -> log probabilities [..., V] in fp32."""
        return (
            self.model.logits(x)[..., : self.model.cfg.vocab] / self.how.temperature
        ).log_softmax(-1)

    def plain_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(self.log_probs(x), targets, reduction="none")

    def score(self, tokens: np.ndarray, want: tuple[int, ...] = ()) -> Scores:
        """Of tokens [n+1] the n targets tokens[1:], each given its predecessors."""
        n, device = len(tokens) - 1, self.run.device
        stream = torch.from_numpy(tokens.astype(np.int64)).to(device)
        zeros = [torch.zeros(n, dtype=kind, device=device) for kind in (torch.float64, torch.int32)]
        scores = Scores(*zeros, {})
        self.score_windows(stream, window_plan(n, self.length, self.stride), scores, want)
        return Scores(self.run.sum(scores.nats), self.run.sum(scores.times), scores.given)

    @torch.no_grad()
    def score_windows(
        self, stream: Tensor, plan: np.ndarray, scores: Scores, want: tuple[int, ...]
    ) -> None:
        run, rows = self.run, self.shape.rows
        plan = torch.from_numpy(plan).to(run.device)
        within = torch.arange(self.length, device=run.device)
        for low in range(0, len(plan), rows * run.world):
            run.agree()
            mine = plan[low + run.rank * rows :][:rows]
            # what is missing scores nothing
            start, first, end = F.pad(mine, (0, 0, 0, rows - len(mine))).T[..., None]
            at = start + within  # of inputs in the stream, and of their targets among the targets
            hidden = self.hidden(
                stream[at.clamp_max(len(stream) - 2)], self.shape.repeats, self.shape.window
            )
            scored = ((at >= first) & (at < end)).flatten().nonzero()[:, 0]
            at, hidden = at.flatten(), hidden.flatten(0, 1)
            for part in scored.split(rows * self.stride):
                padded = F.pad(part, (0, rows * self.stride - len(part)))
                nats = self.losses(
                    hidden[padded], stream[(at[padded] + 1).clamp_max(len(stream) - 1)]
                )[: len(part)]
                scores.nats.index_add_(0, at[part], nats.double())
                scores.times.index_add_(0, at[part], torch.ones_like(part, dtype=torch.int32))
            for t in want:
                for i in scored[at[scored] == t]:
                    scores.given[t] = self.log_probs(hidden[i]).double().softmax(-1).cpu().numpy()

    def reset(self, first: int, n: int) -> None:
        """Begin to walk along n targets behind the token `first`."""
        self.past, self.end = [first], 0

    @torch.no_grad()
    def distribution(self) -> np.ndarray:
        """
        Probabilities [V] in float64 of the token behind those observed. Called once before each
        observe.
        """
        t = len(self.past) - 1
        if t == self.end:  # a new window: see its context again
            self.start, self.end = self.next_window(t)
            self.cache, self.fed = (
                Cache(self.model, self.shape.repeats, self.shape.window),
                self.start,
            )
        x = self.feed(torch.tensor(self.past[self.fed :], device=self.run.device))
        self.fed = t + 1
        return self.log_probs(x).double().softmax(-1).cpu().numpy()

    def feed(self, tokens: Tensor) -> Tensor:
        """Activations [D] behind the last of the next tokens of a walk."""
        return self.cache.feed(tokens)[-1]

    def next_window(self, t: int) -> tuple[int, int]:
        """
        First input and end of the targets of the window that first scores target t. A scorer that
        trains does it here.
        """
        start = 0 if t == 0 else self.start + self.stride
        return start, start + self.length

    def observe(self, token: int) -> None:
        self.past.append(token)


ALPHA, BIGRAM_STRENGTH, TRIGRAM_STRENGTH = 0.1, 8.0, 4.0


class NGrams:
    """
    Unigram, bigram and trigram distributions from counts of the tokens seen so far. Each is a
    distribution over the whole vocabulary: the unigram is smoothed by ALPHA, the longer ones by the
    next shorter with the weight of so many counts (MacKay and Peto 1995).
    """

    def __init__(self, vocab: int, first: int):
        # `vocab` stands for nothing: before the first token
        self.total, self.context = 0, (vocab, first)
        self.unigram, self.longer = np.zeros(vocab), defaultdict(Counter)

    def distributions(self) -> np.ndarray:
        """[3, V]"""
        rows = [(self.unigram + ALPHA) / (self.total + ALPHA * len(self.unigram))]
        for context, strength in (
            (self.context[1:], BIGRAM_STRENGTH),
            (self.context, TRIGRAM_STRENGTH),
        ):
            counts = self.longer[context]
            row = strength * rows[-1]
            row[list(counts)] += list(counts.values())
            rows.append(row / (counts.total() + strength))
        return np.stack(rows)

    def observe(self, token: int) -> None:
        self.total += 1
        self.unigram[token] += 1
        self.longer[self.context[1:]][token] += 1
        self.longer[self.context][token] += 1
        self.context = (self.context[1], token)


def earlier(key: Tensor) -> Tensor:
    """
    How often each entry occurs before itself: what its count was when it was scored, for a whole
    stream at once.
    """
    ordered, order = key.sort(stable=True)
    place = torch.arange(len(key), device=key.device)
    first = (
        torch.where(F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True), place, 0)
        .cummax(0)
        .values
    )
    return torch.empty_like(place).index_copy_(0, order, place - first).double()


def ngram_log_probs(tokens: Tensor, vocab: int) -> Tensor:
    """
    What NGrams gave to each target of a stream [n+1], just before it counted it: [n, 3] float64.
    """
    y, x = tokens[1:], tokens[:-1]
    w = F.pad(x[:-1], (1, 0), value=vocab)
    place = torch.arange(len(y), device=y.device, dtype=torch.float64)
    p = [(earlier(y) + ALPHA) / (place + ALPHA * vocab)]
    for context, strength in ((x, BIGRAM_STRENGTH), (w * vocab + x, TRIGRAM_STRENGTH)):
        p.append((earlier(context * vocab + y) + strength * p[-1]) / (earlier(context) + strength))
    return torch.stack(p, 1).log()


def mixing_weights(experts: Tensor, share: float) -> Tensor:
    """
    Log weights before each target, from the log probabilities [n, K] that the experts gave to all
    targets: Bayes' rule, then `share` of the weight is spread evenly (Herbster and Warmuth 1998).
    One such step is a K x K matrix, so blocks of the stream are walked side by side: once for the
    product of their matrices, once more from the weights at their start.
    """
    n, k = experts.shape
    if share == 0:
        return F.pad(experts.cumsum(0)[:-1], (0, 0, 1, 0)).log_softmax(1)
    size = math.isqrt(n - 1) + 1
    p = F.pad(
        (experts - experts.amax(1, keepdim=True)).exp(), (0, 0, 0, -n % size), value=1.0
    ).view(-1, size, k)
    flow = (1 - share) * torch.eye(k).to(p) + share / k
    product = torch.eye(k).to(p).expand(len(p), k, k)
    for j in range(size):
        product = flow @ (p[:, j, :, None] * product)
        product = product / product.sum((1, 2), keepdim=True)
    weights = [p.new_full((k,), 1 / k)]
    for block in product[:-1]:
        weights.append(block @ weights[-1])
        weights[-1] = weights[-1] / weights[-1].sum()
    before, now = [], torch.stack(weights)
    for j in range(size):
        before.append(now)
        now = p[:, j] * now
        now = now / now.sum(1, keepdim=True) @ flow
    return torch.stack(before, 1).view(-1, k)[:n].log()


class Mixture(Sliding):
    """
    Neural, unigram, bigram and trigram, mixed by Bayes' rule: an expert's weight is its share of
    the probability given to the tokens so far (Hedge on log loss with learning rate 1), so the
    whole text costs at most ln 4 nats more than the best expert alone. Weights and counts change
    after a token is scored. A sum of distributions with weights that sum to 1 is one. The counts of
    a whole stream come from sorting it: the pass costs what the sliding pass costs.
    """

    def score(self, tokens: np.ndarray, want: tuple[int, ...] = ()) -> Scores:
        neural, vocab = super().score(tokens, want), self.model.cfg.vocab
        stream = torch.from_numpy(tokens.astype(np.int64)).to(self.run.device)
        experts = torch.cat([-neural.nats[:, None], ngram_log_probs(stream, vocab)], 1)
        before = mixing_weights(experts, self.how.share)
        given, ngrams = {}, NGrams(vocab, int(tokens[0]))
        for t in range(max(neural.given, default=-1) + 1):
            if t in neural.given:
                given[t] = before[t].exp().cpu().numpy() @ np.stack(
                    [neural.given[t], *ngrams.distributions()]
                )
            ngrams.observe(int(tokens[t + 1]))
        return Scores(-(before + experts).logsumexp(1), neural.times, given)

    def reset(self, first: int, n: int) -> None:
        super().reset(first, n)
        self.log_weights, self.ngrams = (
            np.full(4, -math.log(4)),
            NGrams(self.model.cfg.vocab, first),
        )

    def distribution(self) -> np.ndarray:
        self.experts = np.stack([super().distribution(), *self.ngrams.distributions()])
        return np.exp(self.log_weights) @ self.experts

    def observe(self, token: int) -> None:
        super().observe(token)
        posterior = self.log_weights + np.log(self.experts[:, token])
        posterior -= np.logaddexp.reduce(posterior)
        share = self.how.share
        self.log_weights = (
            np.logaddexp(posterior + np.log1p(-share), np.log(share / 4)) if share else posterior
        )
        self.ngrams.observe(token)


class TestTime(Sliding):
    """
    Score-first test-time training (parameter-golf #549): chunks of targets are scored by sliding
    windows, then SGD takes some passes over what was just scored, and only then the next chunk is
    scored. A window belongs to the chunk of its first scored target. The last chunk is never
    trained on. Behind `score` the model has its own weights again; a walk by `distribution` and
    `observe` leaves it trained.
    """

    def __init__(self, model: tg.GPT, how: How, shape: tg.Shape, run=None):
        super().__init__(model, how, shape, run)
        self.graph = self.whole(model)

    def warm_up(self) -> None:
        super().warm_up()
        with self.kept():
            self.start_training(1)
            self.train_step(torch.zeros(2, dtype=torch.long, device=self.run.device), range(1), 0.0)

    def score(self, tokens: np.ndarray, want: tuple[int, ...] = ()) -> Scores:
        with self.kept():
            return super().score(tokens, want)

    def score_windows(
        self, stream: Tensor, plan: np.ndarray, scores: Scores, want: tuple[int, ...]
    ) -> None:
        self.start_training(len(stream) - 1)
        chunk = plan[:, 1] // self.how.ttt_chunk
        for c in np.unique(chunk):
            self.train_until(c, stream)
            super().score_windows(stream, plan[chunk == c], scores, want)

    def reset(self, first: int, n: int) -> None:
        super().reset(first, n)
        self.start_training(n)

    def next_window(self, t: int) -> tuple[int, int]:
        with torch.enable_grad():
            self.train_until(
                t // self.how.ttt_chunk, torch.tensor(self.past, device=self.run.device)
            )
        return super().next_window(t)

    @contextlib.contextmanager
    def kept(self):
        """The model's weights are put back behind it."""
        own = copy.deepcopy(self.model.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def start_training(self, n: int) -> None:
        self.trained, self.chunks = 0, -(-n // self.how.ttt_chunk)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.how.ttt_lr, momentum=0.9)

    def train_until(self, chunk: int, stream: Tensor) -> None:
        """Train on the chunks before `chunk`, all scored; targets behind them are not looked at."""
        for c in range(self.trained, int(chunk)):
            lr = self.how.ttt_lr * 0.5 * (1 + math.cos(math.pi * c / max(1, self.chunks - 1)))
            low, high = c * self.how.ttt_chunk, (c + 1) * self.how.ttt_chunk
            rows = range(low, high, self.length)
            for _ in range(self.how.ttt_epochs):
                for first in range(0, len(rows), 32):
                    self.train_step(stream[: high + 1], rows[first : first + 32], lr)
        self.trained = max(self.trained, int(chunk))

    def train_step(self, stream: Tensor, starts: range, lr: float) -> None:
        """
        One step of SGD on rows of the stream, of which ranks take turns; the gradient's norm is at
        most 1.
        """
        self.optimizer.zero_grad()
        tokens = sum(min(self.length, len(stream) - 1 - s) for s in starts)
        mine, rows = list(starts)[self.run.rank :: self.run.world], self.shape.rows
        for low in range(0, len(mine), rows):
            some = torch.tensor(mine[low : low + rows], device=self.run.device)
            if self.model.cfg.compile:  # one shape is one graph: rows without a target fill it up
                some = F.pad(some, (0, rows - len(some)), value=len(stream))
            at = some[:, None] + torch.arange(self.length, device=self.run.device)
            x, y = (
                stream[at.clamp_max(len(stream) - 1)],
                stream[(at + 1).clamp_max(len(stream) - 1)],
            )
            y = y.masked_fill(at + 1 >= len(stream), -1)
            (self.graph(x, y, self.shape.repeats, self.shape.window).sum() / tokens).backward()
        for p in self.model.parameters():
            p.grad = self.run.sum(torch.zeros_like(p) if p.grad is None else p.grad)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


class LoRA(Sliding):
    """
    Score-first training per document (parameter-golf #77, Hu et al. 2021): a document starts with
    the artifact's weights plus low-rank products that are zero; each `stride` tokens are scored,
    and the same forward pass then gives one step of AdamW. A document's last tokens are never
    trained on, and the model's own weights never change. Documents of one batch are walked side by
    side, each with its own products.
    """

    def __init__(self, model: tg.GPT, how: How, shape: tg.Shape, run=None):
        super().__init__(model, how, shape, run)
        # one object: graphs are kept by it
        self.plain, self.stand_in, self.queue = tg.linear, self.linear, []
        self.adapted = {
            name: p
            for name, p in model.named_parameters()
            if is_matrix(p) and name not in ("embed", "value_embeds")
        }
        self.calls = self.order_of_calls()
        if not any(self.calls):
            raise UserError(NO_LORA)
        self.graph = self.whole(self.log_probs_at)

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        """
        Stands in for train_gpt.linear: the next matrix of `calls` and its products, a row of the
        batch for each document.
        """
        pair = self.queue.pop(0)
        return (
            self.plain(x, w)
            if pair is None
            else self.plain(x, w) + (x @ pair[0].to(x.dtype).mT) @ pair[1].to(x.dtype).mT
        )

    @torch.compiler.set_stance("force_eager")  # compiled graphs do not call the recording function
    @torch.no_grad()
    def order_of_calls(self) -> list[str | None]:
        """
        The adapted matrix of each multiplication of a forward pass, in order; None where there is
        none.
        """
        names, calls = {p.data_ptr(): name for name, p in self.adapted.items()}, []

        def recording(x: Tensor, w: Tensor) -> Tensor:
            calls.append(names.get(w.data_ptr()))  # views of a stack keep its address
            return self.plain(x, w)

        with swapped(tg, linear=recording):
            token = torch.zeros(1, 1, dtype=torch.long, device=self.run.device)
            self.model.logits(self.model.hidden(token, self.shape.repeats, self.shape.window))
        return calls

    def begin(self, rows: int) -> None:
        """New products for so many documents; every document starts with the same random halves."""
        pairs, rank = {}, self.how.lora_rank
        for i, (name, p) in enumerate(self.adapted.items()):
            w, rng = p.detach().flatten(0, -2), torch.Generator().manual_seed(i)
            a = torch.randn(rank, w.size(1), generator=rng).to(w.device) * w.size(1) ** -0.5
            pair = (
                a.expand(rows, -1, -1).clone(),
                w.new_zeros(rows, w.size(0), rank, dtype=torch.float32),
            )
            pairs[name] = [x.requires_grad_() for x in pair]
        self.parts, self.in_order = (
            [x for pair in pairs.values() for x in pair],
            [pairs.get(name) for name in self.calls],
        )
        self.optimizer = torch.optim.AdamW(
            self.parts, lr=self.how.lora_lr, betas=(0.9, 0.95), weight_decay=0.0
        )

    @contextlib.contextmanager
    def products(self):
        """
        Inside, one forward pass of the model adds the products. Blocks that are compiled by
        themselves run eagerly.
        """
        self.queue = list(self.in_order)
        stance = (
            contextlib.nullcontext()
            if self.model.cfg.compile == 2
            else torch.compiler.set_stance("force_eager")
        )
        with swapped(tg, linear=self.stand_in), stance:
            yield

    def log_probs_at(self, tokens: Tensor, places: Tensor, pairs: list) -> Tensor:
        """
        Log probabilities [R, n, V] behind the tokens at places [n] of rows [R, T], under the
        products in order of use.
        """
        self.queue = list(pairs)
        return self.log_probs(
            self.model.hidden(tokens, self.shape.repeats, self.shape.window)[:, places]
        )

    def chunk(self, stream: Tensor, starts: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """
        Log probabilities [R, stride, V] of chunk k of the documents that begin at starts [R], and
        its targets' places.
        """
        end = (k + 1) * self.stride
        low, size = max(0, end - self.length), min(end, self.length)
        # a few lengths are a few graphs; what lies behind the chunk, it does not see
        if self.model.cfg.compile == 2:
            size = min(self.length, self.stride << k.bit_length())
        at = starts[:, None] + torch.arange(low, low + size, device=stream.device)
        # what lies behind a document's end, no earlier token sees
        tokens = stream[at.clamp_max(len(stream) - 1)]
        places = torch.arange(end - self.stride - low, end - low, device=stream.device)
        with self.products():
            return self.graph(tokens, places, self.in_order), at[:, places]

    def train(self, log_probs: Tensor, targets: Tensor, go_on: Tensor) -> None:
        """
        One step on a chunk that was scored, log_probs [R, stride, V], of the documents for which
        go_on [R] is true.
        """
        with torch.enable_grad():
            losses = -log_probs.gather(-1, targets[..., None])[..., 0].mean(1)
            self.optimizer.zero_grad()
            (losses * go_on).sum().backward(inputs=self.parts)
        self.optimizer.step()

    @torch.no_grad()
    def score(self, tokens: np.ndarray, want: tuple[int, ...] = ()) -> Scores:
        n, run = len(tokens) - 1, self.run
        stream = torch.from_numpy(tokens.astype(np.int64)).to(run.device)
        nats, times = (
            torch.zeros(n, dtype=kind, device=run.device) for kind in (torch.float64, torch.int32)
        )
        given = {}
        begins = np.array([0, *(np.flatnonzero(tokens[1:n] == self.model.cfg.doc_token) + 1)])
        sizes = np.diff(begins, append=n)
        # alike lengths side by side
        order, rows = np.argsort(-sizes, kind="stable"), self.shape.rows
        for low in range(0, len(order), rows * run.world):
            mine = order[low + run.rank * rows :][:rows]
            starts, left = (torch.from_numpy(x[mine]).to(run.device) for x in (begins, sizes))
            if self.model.cfg.compile == 2:  # documents of no length, so that there is one shape
                starts, left = (F.pad(x, (0, rows - len(x))) for x in (starts, left))
            self.begin(len(starts))
            # rank 0 has the longest: all ask as often
            for k in range(-(-int(sizes[order[low]]) // self.stride)):
                run.agree()
                if not bool((left > k * self.stride).any()):
                    continue
                go_on = left > (k + 1) * self.stride
                with torch.set_grad_enabled(bool(go_on.any())):
                    log_probs, at = self.chunk(stream, starts, k)
                targets = stream[(at + 1).clamp_max(n)]
                scored = at < (starts + left)[:, None]
                p = log_probs.detach()[scored]
                nats[at[scored]] = -p.gather(1, targets[scored][:, None])[:, 0].double()
                times[at[scored]] += 1
                for t in want:
                    for i in (at[scored] == t).nonzero()[:, 0]:
                        given[t] = p[i].double().exp().cpu().numpy()
                if log_probs.requires_grad:
                    self.train(log_probs, targets, go_on)
        return Scores(run.sum(nats), run.sum(times), given)

    def reset(self, first: int, n: int) -> None:
        super().reset(first, n)
        self.document = 0
        self.begin(1)

    def next_window(self, t: int) -> tuple[int, int]:
        k = (t - self.document) // self.stride
        if k:
            here, past = torch.tensor([self.document]), torch.tensor(self.past)
            here, past = here.to(self.run.device), past.to(self.run.device)
            with torch.enable_grad():
                log_probs, at = self.chunk(past, here, k - 1)
                self.train(log_probs, past[at + 1], torch.ones_like(here))
        end = (k + 1) * self.stride
        return self.document + max(0, end - self.length), self.document + end

    def feed(self, tokens: Tensor) -> Tensor:
        with self.products():
            return super().feed(tokens)

    def log_probs(self, x: Tensor) -> Tensor:
        if x.ndim > 1:  # within the graph, or within products
            return super().log_probs(x)
        with self.products():  # of a walk: the head alone
            self.queue = self.in_order[-1:]
            return super().log_probs(x[None, None])[0, 0]

    def observe(self, token: int) -> None:
        super().observe(token)
        # the next one begins: with it a new window and new products
        if token == self.model.cfg.doc_token:
            self.document = self.end = len(self.past) - 1
            self.begin(1)


NO_LORA = (
    "mode = 'lora' adapts matrices of 64 rows and columns or more, and this model "
    "multiplies with none"
)
SCORERS = {
    "chunked": Sliding,
    "sliding": Sliding,
    "mixture": Mixture,
    "ttt": TestTime,
    "lora": LoRA,
}


def refuse_dropout(cfg: Config, modes: str) -> None:
    if re.search("ttt|lora", modes) and (cfg.attn_dropout or cfg.mlp_dropout or cfg.stoch_depth):
        raise UserError(
            f"mode = {modes!r} trains on what it scored, and with attn_dropout, mlp_dropout or "
            "stoch_depth by "
            "chance: no decoder could follow; use another mode, or a model without them"
        )


def make_scorer(model: tg.GPT, how: How, shape: tg.Shape, run=None) -> Sliding:
    """
    The scorer of how.mode. shape: rows per batch, tokens per row, repeats, window; run: for several
    ranks.
    """
    if how.mode not in SCORERS:
        raise UserError(f"mode = {how.mode!r}: must be one of {', '.join(SCORERS)}")
    refuse_dropout(model.cfg, how.mode)
    limits = {
        "temperature": (1e-3, 1e3),
        "share": (0, 0.5),
        "ttt_chunk": (1, 1 << 40),
        "ttt_epochs": (0, 100),
        "ttt_lr": (0, 10),
        "lora_rank": (1, 1 << 12),
        "lora_lr": (0, 10),
    }
    for key, (low, high) in limits.items():
        if not low <= getattr(how, key) <= high:
            raise UserError(f"{key} = {getattr(how, key)}: must lie between {low} and {high}")
    return SCORERS[how.mode](model, how, shape, run)


########################################
#                Proof                 #
########################################


@contextlib.contextmanager
def one_thread():
    """
    For walks token by token: threads cost such small operations more than they bring, and sums then
    have one order.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def encode(scorer, tokens: np.ndarray) -> tuple[bytes, list[np.ndarray]]:
    """
    Tokens [n+1] as bytes: their number, the first token, then a range code (constriction, 24-bit
    probabilities) of each under the scorer's step-wise distribution. Also those distributions' sums
    and probabilities of the tokens, [n, 2].
    """
    encoder, seen = coder.queue.RangeEncoder(), []
    scorer.reset(int(tokens[0]), len(tokens) - 1)
    for token in tokens[1:].tolist():
        p = scorer.distribution()
        seen.append((p.sum(), p[token]))
        encoder.encode(token, coder.model.Categorical(p, perfect=False))
        scorer.observe(token)
    head = struct.pack("<IH", len(tokens) - 1, int(tokens[0]))
    return head + encoder.get_compressed().astype("<u4").tobytes(), np.array(seen)


@one_thread()
def decode(scorer, code: bytes, most: int = 1 << 28) -> np.ndarray:
    """
    The tokens of a code, by the same walk as encode's. It needs the same arithmetic: the same kind
    of machine and build of torch. UserError where it is no code.
    """
    if len(code) < 6 or len(code) % 4 != 2 or struct.unpack_from("<I", code)[0] > most:
        raise UserError(f"{len(code)} bytes are no code that prove wrote")
    n, first = struct.unpack_from("<IH", code)
    decoder, tokens = (
        coder.queue.RangeDecoder(np.frombuffer(code[6:], "<u4").astype(np.uint32)),
        [first],
    )
    scorer.reset(first, n)
    for _ in range(n):
        tokens.append(
            int(decoder.decode(coder.model.Categorical(scorer.distribution(), perfect=False)))
        )
        scorer.observe(tokens[-1])
    return np.array(tokens, dtype=np.uint16)


def prove(
    scorer, tokens: np.ndarray, decoder: Callable[[bytes], np.ndarray], flips: int = 3
) -> dict:
    """
    Show that the scorer's claim for tokens [n+1] is a code length, or raise UserError that names
    what it is not. Shown: every target is scored once; at `flips` targets the distribution behind
    the claim sums to 1 and gives its target what was claimed; changing such a target changes no
    score before it and not the distribution at it; the step-wise distributions all sum to 1; they
    encode the tokens in the claimed number of bits; and decoder(code), which is given nothing but
    the code, gives the same tokens back. Returns what was measured.
    """
    n, vocab = len(tokens) - 1, scorer.model.cfg.vocab

    def need(ok: bool, why: str) -> None:
        if not ok:
            raise UserError(f"mode {scorer.how.mode}: no code length: {why}")

    places = tuple(sorted({round((i + 1) * (n - 1) / (flips + 1)) for i in range(flips)}))
    claim = scorer.score(tokens, places)
    nats = claim.nats.cpu()
    often = int(claim.times.min()), int(claim.times.max())
    need(often == (1, 1), f"targets are scored {often[0]} to {often[1]} times")
    need(bool(nats.isfinite().all()), "scores are not finite")
    for t in places:
        p, own = claim.given[t], int(tokens[t + 1])
        need(
            p.shape == (vocab,) and bool((p >= 0).all()) and abs(p.sum() - 1) < 1e-6,
            f"the probabilities at target {t} sum to {p.sum():.6g}",
        )
        need(
            abs(-math.log(p[own]) - float(nats[t])) < 1e-3,
            f"target {t} is scored {float(nats[t]):.6f} nats, but its "
            f"distribution gives {-math.log(p[own]):.6f}",
        )
        changed = tokens.copy()
        changed[t + 1] = (own + 1) % vocab
        other = scorer.score(changed, (t,))
        moved = float((other.nats.cpu() - nats)[:t].abs().amax()) if t else 0.0
        need(moved < 1e-5, f"changing target {t} moves a score before it by {moved:.3g} nats")
        need(
            np.abs(other.given[t] - p).max() < 1e-6,
            f"changing target {t} changes the distribution at it",
        )
    began = time.perf_counter()
    code, seen = encode(scorer, tokens)
    encode_seconds = time.perf_counter() - began
    worst = float(np.abs(seen[:, 0] - 1).max())
    need(worst < 1e-6, f"step-wise probabilities sum to 1 +- {worst:.3g}")
    claimed_bits, stepwise_bits = float(nats.sum()) / math.log(2), float(-np.log2(seen[:, 1]).sum())
    # 6 bytes of head, at most two words of rounding at the end; the two passes round floats
    # differently.
    need(
        8 * len(code) <= claimed_bits * 1.005 + 112,
        f"{claimed_bits:.0f} bits are claimed, the code has {8 * len(code)}",
    )
    began = time.perf_counter()
    need(np.array_equal(decoder(code), tokens), "what is decoded is another text")
    decode_seconds = time.perf_counter() - began
    return {
        "tokens": n,
        "claimed_bits": claimed_bits,
        "stepwise_bits": stepwise_bits,
        "code_bytes": len(code),
        "flips": len(places),
        "worst_sum": worst,
        "encode_s": encode_seconds,
        "decode_s": decode_seconds,
    }


def text_of(tokenizer: tg.Tokenizer, tokens: np.ndarray) -> bytes:
    """The text that tokens [n+1] add behind the first, document by document."""
    cuts = np.flatnonzero(tokens == tokenizer.doc_token)
    return b"".join(tokenizer.decode(part.tolist()).encode() for part in np.split(tokens, cuts))


def stretch(tokens: np.ndarray, tokenizer: tg.Tokenizer, least: int) -> tuple[np.ndarray, bytes]:
    """
    The first tokens of a stream, which begins with a document's token, that stand for at least
    `least` bytes of text, and that text. It ends where the bytes of the pieces and of the text
    agree: not within a character.
    """
    base, space, edge = tokenizer.tables()
    sizes = np.cumsum(base[tokens[1:]] + (space[tokens[1:]] & ~edge[tokens[:-1]]))
    first = int(np.searchsorted(sizes, least)) + 2
    for end in range(first, min(first + 8, len(tokens) + 1)):
        text = text_of(tokenizer, tokens[:end])
        if len(text) == sizes[end - 2]:
            return tokens[:end], text
    raise UserError(
        f"asked were {least} bytes of text, the stream holds {sizes[-1]} by the tokenizer's "
        "pieces; if "
        "those are enough, the pieces and the decoded text disagree about their length"
    )


########################################
#            A run's golf              #
########################################

RESULT = {
    "sliding": "sliding_val_bpb",
    "mixture": "mixed_val_bpb",
    "ttt": "ttt_val_bpb",
    "lora": "lora_val_bpb",
}


def validate(cfg: Config) -> None:
    """Refuse what the end of a run could not do, before it begins."""
    if cfg.export == "fit":
        if not cfg.artifact_limit:
            raise UserError(
                "export = 'fit' chooses bits by artifact_limit, which is not set: "
                "--artifact_limit 16000000"
            )
    else:
        parse_bits(cfg.export)
    unknown = [mode for mode in cfg.score.split() if mode not in RESULT]
    if unknown:
        raise UserError(f"score = {cfg.score!r}: {unknown[0]!r} is none of {', '.join(RESULT)}")
    refuse_dropout(cfg, cfg.score)
    if cfg.score and not 1 <= cfg.stride <= tg.Plan(cfg).eval_seq_len:
        raise UserError(
            f"stride = {cfg.stride}: must lie between 1 and the row's "
            f"{tg.Plan(cfg).eval_seq_len} tokens"
        )
    modes = cfg.score.split()
    if len(set(modes)) < len(modes):
        raise UserError(f"score = {cfg.score!r} names one twice")
    if cfg.prove_bytes and not cfg.tokenizer:
        raise UserError(f"prove_bytes = {cfg.prove_bytes} asks for text, but tokenizer is empty")
    qat = tg.Schedule("qat", cfg.qat).values()
    if set(qat) - {0, 1}:
        raise UserError(f"qat = {cfg.qat!r}: 0 is off and 1 is on, there is nothing between")
    if cfg.qat_noise and 1 not in qat:
        raise UserError(
            f"qat_noise = {cfg.qat_noise} is the noise of quantisation-aware training, but qat "
            f"= {cfg.qat!r} never "
            "begins it: for example --qat '0 0.8:1'"
        )


def check(
    cfg: Config, named: dict[str, Tensor], val: tg.Validation, tokenizer: tg.Tokenizer | None
) -> list[str]:
    """
    Refuse, before training, an artifact, a score or a proof that this model and text could not have
    behind it. Returns notices of what will be less than was asked for.
    """
    notices = []
    if cfg.export != "fit":
        check_bits(cfg.export, named)
    matrices = [name for name, w in named.items() if is_matrix(w)]
    rounds = [key for key, on in (("qat", cfg.qat != "0"), ("gptq", cfg.gptq)) if on]
    if rounds and not matrices:
        raise UserError(
            f"{' and '.join(rounds)} round matrices of 64 rows and columns or more, and this "
            "model has none"
        )
    if "lora" in cfg.score.split() and not set(matrices) - {"embed", "value_embeds"}:
        raise UserError(NO_LORA)
    if cfg.gptq and (rows := calibration_rows(cfg, cfg.gptq)) < cfg.gptq:
        notices.append(
            f"gptq = {cfg.gptq} rows, but the first train shard holds {rows}: they are all"
        )
    code = sum(f.stat().st_size for f in tg.source_files(cfg))
    if 0 < cfg.artifact_limit <= code:
        raise UserError(
            f"artifact_limit = {cfg.artifact_limit}: the source alone has {code} bytes; python "
            "logs/pack.py makes "
            "one small file of it"
        )
    if cfg.prove_bytes:
        if not tokenizer:
            raise UserError(
                f"prove_bytes = {cfg.prove_bytes} asks for text, but the tokenizer "
                f"{cfg.tokenizer!r} could not be "
                "loaded (the notice above says why)"
            )
        stretch(val.tokens, tokenizer, cfg.prove_bytes)
    return notices


def calibrate(
    p: tg.Parts, now: tg.Now, rows: np.ndarray, until: float
) -> tuple[dict[str, Tensor], int]:
    return record_hessians(p.model, rows, now.repeats, now.window, p.run, until)


def gptq_seconds(p: tg.Parts) -> float:
    """
    What calibration will take behind the last step, from two rows; a third more, as a clock cap is
    a cap.
    """
    last = p.plan.at(p.cfg.steps, 1.0)
    rows = calibration(p.cfg, 2 * p.run.world)
    for _ in range(2):  # the first is slower
        p.run.clock.sync()
        began = time.perf_counter()
        calibrate(p, last, rows, until=sys.float_info.max)  # it looks at the clock as it will then
        p.run.clock.sync()
        seconds = time.perf_counter() - began
    return 1.33 * seconds * calibration_rows(p.cfg, p.cfg.gptq) / len(rows)


def calibrated(p: tg.Parts, now: tg.Now) -> dict[str, Tensor] | None:
    """
    Hessians for GPTQ, on the training clock. A clock cap is a cap: on a machine that has become
    slower than the warm-up foresaw, they are of fewer rows, or there are none. What summing them up
    takes is kept back from the time foreseen.
    """
    cfg, run, rows = p.cfg, p.run, calibration(p.cfg, p.cfg.gptq)
    kept_back = (cfg.max_seconds - p.plan.seconds) * min(0.1, run.world / len(rows))
    until = cfg.max_seconds - kept_back if cfg.max_seconds else math.inf
    before = run.clock.seconds()
    run.clock.start()
    hessians, seen = calibrate(p, now, rows, until)
    run.clock.stop()
    fewer = "" if seen == len(rows) else f" of {len(rows)} (max_seconds allowed no more)"
    after = run.clock.seconds()
    run.log(
        f"gptq: {seen} rows{fewer} of training tokens, train_time:{after - before:.1f}s of "
        f"{after:.1f}s" + ("" if seen else "; weights are rounded to the nearest instead")
    )
    return hessians or None


def export_and_score(p: tg.Parts, now: tg.Now) -> dict:
    """
    Behind the last step, with the weights to be exported in the model: calibrate (on the training
    clock), write the artifact, read it back into the model, score it in every way that was asked
    for, prove. Entries of result.json.
    """
    cfg, run, path = p.cfg, p.run, p.run.folder / "model.nrx"
    hessians = calibrated(p, now) if cfg.gptq else None
    named = dict(p.model.named_parameters())
    code = sum(f.stat().st_size for f in tg.source_files(cfg))
    most = max(0, cfg.artifact_limit - code)

    def write() -> tuple[str, int]:
        data, chosen = smallest(
            named, cfg, cfg.export, (cfg.export_codec,), hessians, most, run.log
        )
        tg.write_whole(path, data)
        return chosen, len(data)

    chosen, size = run.on_main(write)
    tg.load_weights(p.model, run.read_on_main(lambda: (load(path)[1], None))[0], str(path))
    began = time.perf_counter()
    shape = p.plan.eval_shape(now)
    loss, bpb = tg.evaluate(run, p.graph, p.val, shape)
    seconds = time.perf_counter() - began
    result = {
        "roundtrip_val_loss": loss,
        "roundtrip_val_bpb": bpb,
        "artifact_bytes": size,
        "code_bytes": code,
        "total_bytes": size + code,
        "artifact_bits": chosen,
    }
    run.log(
        f"final_{chosen}_roundtrip val_loss:{loss:.8f}"
        + (f" val_bpb:{bpb:.8f}" if bpb else "")
        + f" eval_time:{seconds * 1000:.0f}ms"
    )
    over = "OVER the limit of" if size + code > cfg.artifact_limit else "within the limit of"
    limit = f", {over} {cfg.artifact_limit}" if cfg.artifact_limit else ""
    run.log(f"artifact: {path} {size} bytes + code {code} bytes = {size + code} bytes{limit}")
    for mode in cfg.score.split():
        found = score_and_log(p.model, How(mode=mode, stride=cfg.stride), shape, run, p.val)
        result |= {RESULT[mode]: None if math.isnan(found["bpb"]) else found["bpb"]}
        result |= {RESULT[mode].replace("bpb", "loss"): found["loss"]}
        seconds += found["eval_time_s"]
    if cfg.prove_bytes:
        mode = (cfg.score.split() or ["chunked"])[-1]
        flags = {
            "mode": mode,
            "stride": cfg.stride,
            "bytes": cfg.prove_bytes,
            "device": run.device.type,
            "data": cfg.data,
        }
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        lines = run.on_main(
            lambda: fresh_process(
                "prove", str(path), *words, asked_to_stop=lambda: bool(run.signal)
            )
        )
        run.agree()  # a signal that came meanwhile
        run.log(lines.rstrip())
        result |= {
            "proven_bytes": cfg.prove_bytes,
            "decoded_bpb": float(re.search(r"decoded_bpb:([\d.]+)", lines)[1]),
        }
    return result | {"eval_time_s": seconds}


def score_and_log(
    model: tg.GPT, how: How, shape: tg.Shape, run, val: tg.Validation
) -> dict[str, float]:
    """
    Score a validation prefix and log the line; graphs are compiled before the clock, on random
    tokens.
    """
    scorer = make_scorer(model, how, shape, run)
    if model.cfg.compile:
        scorer.warm_up()
    found = score_all(scorer, val)
    run.log(
        f"final_{how.mode} val_loss:{found['loss']:.8f} val_bpb:{found['bpb']:.8f} "
        f"window:{shape.seq_len} "
        f"stride:{scorer.stride} eval_time:{found['eval_time_s'] * 1000:.0f}ms "
        f"tok_s:{found['tok_s']:.0f}"
    )
    return found


def fresh_process(*arguments: str, asked_to_stop: Callable[[], bool] = lambda: False) -> str:
    """
    What `golf.py ARGUMENTS` prints, in a process that shares nothing with this one; UserError where
    it fails. Once asked_to_stop() it is ended as by Ctrl-C, with what it has started, and gives "".
    """
    # within a packed file
    command = [sys.executable, __file__, *([] if Path(__file__).name == "golf.py" else ["golf"])]
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=0.2)
                break
            if asked_to_stop():
                return ""
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
            process.kill()
            process.wait()
    if asked_to_stop():  # the terminal's Ctrl-C reached it as well
        return ""
    if process.returncode:
        raise UserError(f"golf.py {arguments[0]} left with {process.returncode}: {err[-2000:]}")
    return out


########################################
#             Command line             #
########################################


@dataclass
class Score(How):
    """Score the validation stream with the weights of a run, a checkpoint or an artifact."""

    source: Annotated[str, tyro.conf.Positional] = ""  # run folder, checkpoint folder or artifact
    # scored prefix of the validation stream; 0: all of it; -1: what the run was scored on
    val_tokens: int = -1
    data: str = ""  # folder of the shards; empty: the run's own
    device: str = "auto"  # auto, cpu or cuda
    rows: int = 0  # windows per batch; 0: as many as micro_tokens holds


@dataclass
class Prove(Score):
    """
    Encode a stretch of validation text, decode it in a fresh process, and check that the score is a
    code length.
    """

    bytes: int = 16384  # text at least


@dataclass
class Decode(Score):
    """Decode a code that prove wrote, from the weights alone."""

    code: str = ""  # file with the code
    out: str = ""  # file for the tokens, uint16 little endian


@dataclass
class Quantise(Score):
    """The same weights stored in different ways: bytes, and bits per byte lost."""

    mode: str = "chunked"  # how to score, see How
    calibration_rows: int = 32  # rows of training tokens for GPTQ
    choices: tuple[str, ...] = (
        "int8",
        "int7",
        "int6",
        "int6 gptq",
        "int6 mlp:5 gptq",
        "int5 gptq",
        "int4 gptq",
    )


@dataclass
class Export(Score):
    """Write an artifact from the newest checkpoint of a run."""

    out: str = "model.nrx"  # the file to write; it must not exist
    # int4 to int8, with exceptions such as "int6 mlp:5 head:8"; fit: the most that --limit allows
    bits: str = "int6"
    codec: str = "best"  # zstd, brotli, xz, entropy, or best: the smallest of them
    calibration_rows: int = 32  # rows of training tokens for GPTQ; 0: nearest integers instead
    limit: int = 0  # bytes of the file at most; 0: any


def opened(flags: Score, exact: bool = False) -> tuple[tg.GPT, tg.Shape, tg.Run, dict[str, Tensor]]:
    """Model, shape of its windows, ranks and device, and its weights as they were stored."""
    if not flags.source:
        raise UserError(
            "say which run folder, checkpoint or artifact: python golf.py score logs/my-run"
        )
    cfg, named, where = tg.open_source(flags.source, exact)
    if exact and where.is_file():
        raise UserError(
            f"{where} is an artifact: quantising needs the exact weights, of a checkpoint "
            "(ckpt/*/DONE)"
        )
    cfg.device, cfg.data = flags.device, flags.data or cfg.data
    cfg.val_tokens = cfg.val_tokens if flags.val_tokens < 0 else flags.val_tokens
    if isinstance(flags, (Prove, Decode)) and tg.choose_device(cfg).type == "cpu":
        cfg.dtype = "float32"  # a walk token by token would spend its time on casting weights
    run, plan = tg.Run(cfg), tg.Plan(cfg)
    if type(flags) is not Score or run.device.type == "cpu":
        cfg.compile = 0  # takes longer than it saves
    model = tg.build_model(cfg, run.device, run.dtype, max(plan.max_seq_len, plan.eval_seq_len))
    tg.load_weights(model, named, str(where))
    shape = plan.eval_shape(plan.at(cfg.steps, 1.0))
    return model, shape._replace(rows=flags.rows or shape.rows), run, named


def validation(model: tg.GPT) -> tuple[tg.Validation, tg.Tokenizer | None]:
    cfg = model.cfg
    tokenizer = tg.Tokenizer(cfg.tokenizer, cfg.vocab, cfg.doc_token) if cfg.tokenizer else None
    return tg.Validation(cfg, tg.Plan(cfg), tokenizer), tokenizer


def score_all(scorer: Sliding, val: tg.Validation) -> dict[str, float]:
    """
    Score a validation prefix: nats per token, bits per byte (nan where the bytes are unknown),
    seconds, tokens/s.
    """
    began = time.perf_counter()
    scores = scorer.score(val.tokens)
    assert bool((scores.times == 1).all()), "a target was not scored exactly once"
    n = len(val.tokens) - 1
    loss, seconds = float(scores.nats.sum()) / n, time.perf_counter() - began
    bpb = tg.bits_per_byte(loss, n, val.bytes)
    return {
        "loss": loss,
        "bpb": math.nan if bpb is None else bpb,
        "eval_time_s": seconds,
        "tok_s": n / seconds,
    }


def score_command(flags: Score) -> int:
    model, shape, run, _ = opened(flags)
    val, _ = validation(model)
    try:
        with run:
            tg.compile_model(model, model.cfg)
            score_and_log(model, flags, shape, run, val)
    except tg.Interrupted:
        run.log(f"interrupted by {signal.Signals(run.signal).name}")
        return 128 + run.signal
    return 0


def prove_command(flags: Prove) -> None:
    model, shape, run, _ = opened(flags)
    val, tokenizer = validation(model)
    if not tokenizer:
        raise UserError(
            f"{flags.source} was trained without a tokenizer: there is no text to encode"
        )
    tokens, text = stretch(val.tokens, tokenizer, flags.bytes)
    note = ""
    # or it would end before anything is trained
    if flags.mode == "ttt" and flags.ttt_chunk > len(tokens) // 4:
        flags.ttt_chunk = len(tokens) // 4
        note = f", ttt_chunk:{flags.ttt_chunk}: this stretch in four chunks"
    with tempfile.TemporaryDirectory() as folder:
        code, out = Path(folder) / "code", Path(folder) / "tokens"

        def fresh(data: bytes) -> np.ndarray:
            """Decode in a new process, which is given the artifact and the code."""
            code.write_bytes(data)
            how = [x for f in How.__dataclass_fields__ for x in (f"--{f}", str(getattr(flags, f)))]
            fresh_process(
                "decode",
                flags.source,
                *how,
                "--device",
                flags.device,
                "--code",
                str(code),
                "--out",
                str(out),
            )
            return np.fromfile(out, "<u2")

        found = prove(make_scorer(model, flags, shape), tokens, fresh)
        same = text_of(tokenizer, np.fromfile(out, "<u2")) == text
    if not same:
        raise UserError("the tokens came back, but not the text")
    print(
        f"prove:{flags.mode} text_bytes:{len(text)} code_bytes:{found['code_bytes']} "
        f"decoded_bpb:{8 * found['code_bytes'] / len(text):.6f} "
        f"claimed_bpb:{found['claimed_bits'] / len(text):.6f} "
        f"stepwise_bpb:{found['stepwise_bits'] / len(text):.6f}"
    )
    print(
        f"  tokens:{found['tokens']} each scored once, {found['flips']} flips, sums within "
        f"{found['worst_sum']:.1e} "
        f"of 1, encode:{found['encode_s']:.1f}s decode:{found['decode_s']:.1f}s{note}, the "
        "text came back: proven"
    )


def decode_command(flags: Decode) -> None:
    if not flags.code or not flags.out:
        raise UserError(
            "say which file holds the code and where the tokens go: --code FILE --out FILE"
        )
    model, shape, _, _ = opened(flags)
    decode(make_scorer(model, flags, shape), Path(flags.code).read_bytes()).astype("<u2").tofile(
        flags.out
    )


def calibration_rows(cfg: Config, count: int) -> int:
    """How many of `count` rows the first train shard holds; UserError where it is none."""
    shard, length = tg.find_shards(cfg, "train")[0], tg.Plan(cfg).eval_seq_len
    # others it was not trained on
    tokens = min(tg.shard_tokens(shard), cfg.train_tokens or math.inf)
    if tokens <= length:
        raise UserError(
            f"GPTQ looks at rows of {length} training tokens, but {shard} has only {tokens}: lower "
            "--eval_seq_len, or --gptq 0"
        )
    return min(count, (tokens - 1) // length)


def calibration(cfg: Config, count: int) -> np.ndarray:
    """The first rows [count, T+1] of the training shards."""
    length, count = tg.Plan(cfg).eval_seq_len, calibration_rows(cfg, count)
    tokens = tg.read_shard(tg.find_shards(cfg, "train")[0], cfg.vocab)
    return np.stack([tokens[i * length :][: length + 1] for i in range(count)])


def quantise_command(flags: Quantise) -> None:
    model, shape, _, named = opened(flags, exact=True)
    for choice in flags.choices:
        check_bits(choice.removesuffix(" gptq"), named)
    val, _ = validation(model)
    rows = calibration(model.cfg, flags.calibration_rows)
    hessians, _ = record_hessians(model, rows, shape.repeats, shape.window)
    scorer = make_scorer(model, flags, shape)
    exact, base, codecs = score_all(scorer, val), 0, (*CODECS, ENTROPY)
    print(
        f"exact weights: {exact['loss']:.5f} nats, {exact['bpb']:.5f} bpb; "
        f"{sum(w.numel() for w in named.values())} "
        f"parameters; {flags.mode}, {len(val.tokens) - 1} tokens; GPTQ on {rows.size} training "
        "tokens"
    )
    print(
        f"| weights | {' | '.join(codecs)} | smallest / (int8 + zstd) | bpb lost |\n|-|"
        + "-:|" * (len(codecs) + 2)
    )
    for choice in flags.choices:
        bits = choice.removesuffix(" gptq")
        found = quantise(named, parse_bits(bits), hessians if bits != choice else None)
        packed = {codec: pack(named, found, model.cfg, codec) for codec in codecs}
        base = base or len(packed["zstd"])
        tg.load_weights(model, unpack(packed[ENTROPY], choice)[1], choice)
        lost = score_all(scorer, val)["bpb"] - exact["bpb"]
        sizes = [len(p) for p in packed.values()]
        print(
            f"| {choice} | {' | '.join(map(str, sizes))} | {min(sizes) / base:.3f} | {lost:+.5f} |",
            flush=True,
        )


def export_command(flags: Export) -> None:
    if Path(flags.out).exists():
        raise UserError(f"out = {flags.out!r} exists: choose another name, or delete it")
    if not Path(flags.out).parent.is_dir():
        raise UserError(f"out = {flags.out!r}: there is no folder {Path(flags.out).parent}")
    if flags.bits == "fit" and not flags.limit:
        raise UserError("bits = 'fit' chooses by limit, which is not set: --limit 16000000")
    if flags.codec not in (*CODECS, ENTROPY, "best"):
        raise UserError(
            f"codec = {flags.codec!r}: must be one of {', '.join((*CODECS, ENTROPY, 'best'))}"
        )
    model, shape, _, named = opened(flags, exact=True)
    rows = calibration(model.cfg, flags.calibration_rows) if flags.calibration_rows else None
    hessians = (
        None if rows is None else record_hessians(model, rows, shape.repeats, shape.window)[0]
    )
    data, _ = smallest(
        named, model.cfg, flags.bits, (flags.codec,), hessians, flags.limit, log=print
    )
    if flags.limit and len(data) > flags.limit:
        raise UserError(
            f"the artifact has {len(data)} bytes, but limit = {flags.limit}: choose a smaller model"
            + ("" if flags.bits == "fit" else ", or --bits fit")
        )
    tg.write_whole(Path(flags.out), data)
    print(f"artifact: {flags.out} {len(data)} bytes; score it: python golf.py score {flags.out}")


def main(argv: list[str] | None = None) -> int:
    kinds = {
        "score": Score,
        "prove": Prove,
        "decode": Decode,
        "quantise": Quantise,
        "export": Export,
    }
    work = {
        Score: score_command,
        Prove: prove_command,
        Decode: decode_command,
        Quantise: quantise_command,
        Export: export_command,
    }
    try:
        flags = tyro.extras.subcommand_cli_from_dict(
            kinds, args=argv, use_underscores=True, description=__doc__.split("Read it")[0]
        )
        return work[type(flags)](flags) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except (UserError, RuntimeError, OSError) as e:
        message = tg.explain(e)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    # what imports golf from here on gets this very module
    sys.modules["golf"] = sys.modules["__main__"]
    sys.exit(main())
