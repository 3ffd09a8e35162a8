"""
What golf adds to the trainer: smaller artifacts, better scores, and the proof that a score decodes.

    python golf.py score logs/my-run --mode sliding --stride 64     # or chunked, mixture, ttt
    python golf.py prove logs/my-run --mode mixture --bytes 16384   # encode text, decode it in a fresh process, compare
    python golf.py quantise logs/my-run                             # bytes and bits per byte lost, choice by choice

Read it from top to bottom:
    Quantisation   rows of integers: clip search, GPTQ on recorded inputs, noise and straight-through for training
    Coders         zstd, brotli, xz, and a range coder with histograms fitted to rows and columns
    Artifact       one file; loading executes nothing and unpacks within bounds
    Scorers        chunked, sliding window, online mixture, score-first test-time training
    Proof          distributions that sum to 1 and know no future, and a text that comes back from its code
    Command line   score, prove, decode, quantise

A score is a code length. Every scorer gives the probability of each token of a stream behind its predecessors, and does
so twice: `score` takes a whole stream at the speed of the batched forward pass, `distribution` and `observe` walk one
token at a time and cannot look ahead. The first is what is claimed, the second is what decodes; `prove` ties them.
The model is train_gpt's and is never copied here. Letters as there: B, T, D, V; losses in nats per token.
"""

import contextlib
import copy
import hashlib
import io
import json
import lzma
import math
import re
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
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
from constriction.stream import model as models
from constriction.stream.queue import RangeDecoder, RangeEncoder
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import train_gpt as tg
from train_gpt import Config, UserError

########################################
#             Quantisation             #
########################################

CLIPS = tuple(1 - i / 20 for i in range(13))  # fractions of a row's largest entry at which it may be clipped
LADDER = ("int8", "int7", "int7 mlp:6", "int6", "int6 mlp:5", "int5", "int5 mlp:4", "int4")  # finest first


def levels_of(bits: int) -> int:
    """The largest integer of symmetric `bits`-bit codes: 127 for 8, 31 for 6, 7 for 4."""
    return 2 ** (bits - 1) - 1


def is_matrix(w: Tensor) -> bool:
    """Matrices, stacks of them and tables are quantised; vectors and stacks of vectors stay floating point."""
    return w.ndim >= 2 and min(w.shape[-2:]) >= 64


class Bits(NamedTuple):
    """Bits by tensor: "int6 mlp:5 head:8" is 5 where the name matches mlp, 8 where it matches head, else 6."""

    default: int
    rules: tuple[tuple[str, int], ...]

    def of(self, name: str) -> int:
        return next((bits for pattern, bits in self.rules if re.search(pattern, name)), self.default)


def parse_bits(text: str) -> Bits:
    words = text.split()
    rules = [re.fullmatch(r"(.+):([4-8])", word) for word in words[1:]]
    if not words or not re.fullmatch("int[4-8]", words[0]) or None in rules:
        raise UserError(f"export = {text!r}: write int8, int7, int6, int5 or int4, then regular expressions over names "
                        "with other bits, for example 'int6 mlp:5 head:8'; or 'fit' to choose by artifact_limit")
    for rule in rules:
        try:
            re.compile(rule[1])
        except re.error as e:
            raise UserError(f"export = {text!r}: {rule[1]!r} is no regular expression: {e}") from e
    return Bits(int(words[0][3:]), tuple((rule[1], int(rule[2])) for rule in rules))


def codes(w: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Nearest integers, with the scale as it is stored (fp16)."""
    return (w.float() / scale.float()).round().clamp(-levels, levels).to(torch.int8)


def clip_search(w: Tensor, levels: int) -> Tensor:
    """
    fp16 scales [..., rows, 1] of weights [..., rows, cols]: of several clips the one with the least squared error of the
    row. parameter-golf's GPTQ-lite, with fractions of the largest entry in place of quantiles: at 6 bits and below the
    best clip lies far under the quantiles that it tries.
    """
    _, best = tg.quantize_rows(w, levels)
    least = (tg.dequantize_rows(codes(w, best, levels), best) - w.float()).square().sum(-1, keepdim=True)
    widest = best.float()
    for clip in CLIPS[1:]:
        scale = (widest * clip).half().clamp_min(2.0**-24)
        error = (tg.dequantize_rows(codes(w, scale, levels), scale) - w.float()).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def gptq(w: Tensor, hessian: Tensor, scale: Tensor, levels: int, block: int = 128) -> Tensor:
    """
    Codes [rows, cols] that lessen tr((W-Q) H (W-Q)^T), where H [cols, cols] is the mean of x x^T over the inputs of W:
    columns are rounded by falling H_ii, and the error of each is made up for by those behind it (Frantar et al. 2022).
    In float64; damping is 1 % of the mean diagonal. The scale of a row is given and stays.
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
    """Inside, attributes of a module or an object are others; behind it, they are what they were."""
    kept = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


@torch.compiler.set_stance("force_eager")  # compiled graphs do not call the recording function
@torch.no_grad()
def record_hessians(model: tg.GPT, rows: np.ndarray, repeats: int, window: int, run=None) -> dict[str, Tensor]:
    """
    Mean of x x^T over the inputs of every matrix that train_gpt.linear multiplies with, by parameter name, from
    calibration rows [n, T+1] of TRAINING tokens (collecting them counts as training time under the rules). All uses of a
    shared matrix add up; a tied table gets the final norm's output. Ranks take turns with the rows and share the sums.
    """
    run = run or alone(model.head.device)
    plain, sums = tg.linear, {}
    names = {p.data_ptr(): name for name, p in model.named_parameters()}  # flatten() of a stack keeps the address

    def recording(x: Tensor, w: Tensor) -> Tensor:
        flat = x.detach().reshape(-1, x.size(-1)).float()
        name = names[w.data_ptr()]
        sums[name] = sums.get(name, 0) + flat.mT @ flat
        return plain(x, w)

    with swapped(tg, linear=recording):
        for row in rows[run.rank :: run.world]:
            run.agree()
            tokens, targets = tg.tensors(row[None], run.device)
            model(tokens, targets, repeats, window)
    return {name: run.sum(h) / (rows.shape[0] * (rows.shape[1] - 1)) for name, h in sorted(sums.items())}


def quantise(named: dict[str, Tensor], bits: Bits, hessians: dict[str, Tensor] | None = None) -> dict[str, tuple]:
    """
    Codes, fp16 scales and levels of every matrix: int8 keeps the whole range of a row, fewer bits search a clip, and
    GPTQ rounds where there is a Hessian.
    """
    found = {}
    for name, w in named.items():
        if not is_matrix(w):
            continue
        levels, w = levels_of(bits.of(name)), w.detach().float()
        scale = tg.quantize_rows(w)[1] if levels == 127 else clip_search(w, levels)
        q = codes(w, scale, levels)
        if hessians and name in hessians:
            flat = w.flatten(0, -2), hessians[name].to(w.device), scale.flatten(0, -2)
            q = gptq(*flat, levels).view_as(w)
        found[name] = q.cpu().contiguous(), scale.cpu().contiguous(), levels
    return found


def noisy(w: Tensor, levels: int, rng: torch.Generator | None = None) -> Tensor:
    """
    Weights with uniform noise of one quantisation step per row, for training: looped blocks meet the error that they
    will have, once per repeat (parameter-golf PR #363). The gradient passes unchanged.
    """
    step = w.detach().abs().amax(-1, keepdim=True) / levels
    return w + step * (torch.rand(w.shape, generator=rng, device=w.device, dtype=w.dtype) - 0.5)


def straight_through(w: Tensor, levels: int) -> Tensor:
    """Quantised weights forward, the gradient of the plain ones backward (Bengio et al. 2013)."""
    return w + (tg.dequantize_rows(*tg.quantize_rows(w.detach(), levels)).to(w.dtype) - w.detach())


########################################
#                Coders                #
########################################


def unzstd(data: bytes, size: int) -> bytes:
    return zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(data)).read(size)


def unbrotli(data: bytes, size: int) -> bytes:
    decoder, parts = brotli.Decompressor(), []
    while size > 0 and not decoder.is_finished():
        part = decoder.process(data, output_buffer_limit=size)
        if not part and not data:
            break  # cut short: nothing left to give it
        data = b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def unxz(data: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor(memlimit=1 << 30).decompress(data, size)


# name -> compress(data), decompress(data, most bytes to give)
CODECS: dict[str, tuple[Callable, Callable]] = {
    "zstd": (lambda data: zstandard.ZstdCompressor(level=22).compress(data), unzstd),
    "brotli": (lambda data: brotli.compress(data, quality=11, lgwin=24), unbrotli),
    "xz": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), unxz),
}
ENTROPY = "entropy"  # the range coder below for the codes, the smallest of the above for the rest
STEPS = (2, 4, 16, 1 << 20)  # widths of a class of spreads, in eighths of an octave; the last: all in one class


def spread_classes(rows: np.ndarray, cols: np.ndarray, step: int) -> np.ndarray:
    """Class of every entry [R, C] from the logarithms of its row's and its column's spread (int8, eighths of octaves)."""
    both = (rows.astype(np.int64)[:, None] + cols.astype(np.int64)) // step
    return both - both.min()


def log_spread(x: np.ndarray) -> np.ndarray:
    return np.round(8 * np.log2(np.maximum(x, 2.0**-12))).clip(-127, 127).astype(np.int8)


def histogram_probabilities(counts: np.ndarray) -> np.ndarray:
    """Counts -> probabilities, the same IEEE divisions on every machine."""
    return counts.astype(np.float64) / counts.sum()


def encode_codes(q: np.ndarray, levels: int) -> tuple[dict[str, np.ndarray], int, np.ndarray]:
    """
    Codes [R, C] in +-levels -> tables, step, range-coded words. Entries whose row and column spread alike share a class
    and its histogram, so what is fitted is the shape of the distribution and not only its width. Classes are as wide as
    pays for their tables.
    """
    size = np.abs(q.astype(np.float64))
    row_mean = size.mean(1)
    rows = log_spread(row_mean)
    cols = log_spread((size / np.maximum(row_mean, 2.0**-12)[:, None]).mean(0))
    symbols, width = q.astype(np.int64) + levels, 2 * levels + 1
    best = None
    for step in STEPS:
        classes = spread_classes(rows, cols, step)
        counts = np.bincount((classes * width + symbols).ravel(), minlength=(classes.max() + 1) * width).reshape(-1, width)
        totals = counts.sum(1, keepdims=True)
        bits = -(counts * np.log2(np.maximum(counts, 1) / np.maximum(totals, 1))).sum() + 8 * np.count_nonzero(counts)
        if best is None or bits < best[0]:
            best = bits, step, classes, counts
    _, step, classes, counts = best
    counts = np.ceil(counts * min(1.0, 65535 / counts.max())).astype(np.uint16)
    order, encoder = np.argsort(classes.ravel(), kind="stable"), RangeEncoder()
    symbols, sizes = symbols.ravel()[order].astype(np.int32), np.bincount(classes.ravel(), minlength=len(counts))
    for part, row in zip(np.split(symbols, np.cumsum(sizes)[:-1]), counts):
        if len(part):
            encoder.encode(part, models.Categorical(histogram_probabilities(row), perfect=False))
    return {"rows": rows, "cols": cols, "counts": counts}, step, encoder.get_compressed()


def decode_codes(tables: dict[str, np.ndarray], step: int, words: np.ndarray, levels: int) -> np.ndarray:
    """The inverse of encode_codes. ValueError where the tables cannot belong together."""
    rows, cols, counts = tables["rows"], tables["cols"], tables["counts"]
    classes = spread_classes(rows, cols, step)
    sizes = np.bincount(classes.ravel())
    if counts.shape != (len(sizes), 2 * levels + 1):
        raise ValueError(f"histograms {counts.shape} for {len(sizes)} classes of {2 * levels + 1} codes")
    decoder, parts = RangeDecoder(words), []
    for size, row in zip(sizes, counts):
        if size:
            parts.append(decoder.decode(models.Categorical(histogram_probabilities(row), perfect=False), int(size)))
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


def pack(named: dict[str, Tensor], found: dict[str, tuple], cfg: Config, codec: str, note: str = "") -> bytes:
    """
    One file: magic, length of a JSON header, header (configuration, kind of every tensor, codec, sizes), compressed
    safetensors, range-coded words, sha256 of all before. `found` is quantise's; its codes are int8 tensors among the
    others, or with the codec "entropy" words behind them. Beside 8-bit codes small tensors stay exact, else fp16.
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
    packed, inner = min(((CODECS[c][0](payload), c) for c in inner_codecs), key=lambda pair: len(pair[0]))
    header = json.dumps({"codec": codec, "rest": inner, "payload_bytes": len(payload), "packed_bytes": len(packed),
                         "bits": note, "tensors": kinds, "config": tg.config_toml(cfg)}).encode()
    body = b"".join([MAGIC, struct.pack("<I", len(header)), header, packed, *words])
    return body + hashlib.sha256(body).digest()


def export(path: Path, named: dict[str, Tensor], cfg: Config, bits: str = "int8", codecs: tuple[str, ...] = ("zstd",),
           hessians: dict[str, Tensor] | None = None, most: int = 0, log: Callable = lambda line: None) -> int:
    """
    Write the artifact of weights `named` and return its bytes; of several codecs (names of CODECS, "entropy", or "best"
    for all of them) the smallest result is kept. bits "fit" goes down LADDER until the file has at most `most` bytes.
    """
    codecs = (*CODECS, ENTROPY) if "best" in codecs else codecs
    for choice in LADDER if bits == "fit" else (bits,):
        found = quantise(named, parse_bits(choice), hessians)
        packed = {codec: pack(named, found, cfg, codec, choice) for codec in codecs}
        codec = min(packed, key=lambda c: len(packed[c]))
        size = len(packed[codec])
        log(f"artifact: {choice}{' gptq' if hessians else ''} " + " ".join(f"{c}:{len(p)}" for c, p in packed.items()) +
            f" -> {codec}" + (f", limit {most}" if most else ""))
        if bits != "fit" or size <= most:
            break
    if most and size > most:
        raise UserError(f"the artifact has {size} bytes at {choice}, but {most} are left beside the source: choose a smaller "
                        "model" + ("" if bits == "fit" else ", or --export fit"))
    tg.write_whole(Path(path), packed[codec])
    return size


def unpack(data: bytes, where: str) -> tuple[Config, dict[str, Tensor], dict]:
    """Configuration, fp32 weights and header of an artifact's bytes. Executes nothing; any damage is a UserError."""

    def bad(why: str) -> UserError:
        return UserError(f"{where} is no usable artifact: {why}; export it again from its checkpoint")

    start = len(MAGIC) + 4
    if not data.startswith(MAGIC):
        raise bad("it does not begin with the artifact's magic")
    if len(data) < start + 32 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise bad("its checksum does not match: it is cut short or changed")
    try:
        (length,) = struct.unpack("<I", data[start - 4 : start])
        header = json.loads(data[start : start + length])
        size, packed_size = header["payload_bytes"], header["packed_bytes"]
        total = size + sum(math.prod(kind["shape"]) for kind in header["tensors"].values() if kind["kind"] == "rows")
        if not all(type(n) is int and n >= 0 for n in (size, packed_size, total)):
            raise bad("its sizes are no numbers")
        if total > min(MOST, max(1 << 26, MOST_RATIO * len(data))):
            raise bad(f"its header wants {total} bytes")
        packed, stream = (data[start + length : -32][part] for part in (slice(packed_size), slice(packed_size, None)))
        payload = CODECS[header["rest"]][1](packed, size + 1)
        if len(payload) != size:
            raise bad("its payload has another size than its header says")
        named = read_tensors(header, load_tensors(payload), np.frombuffer(stream, "<u4"))
        cfg = Config(**tg.checked(tomllib.loads(header["config"]), where))
        tg.validate(cfg)
    except UserError as e:
        raise (e if where in str(e) else bad(str(e))) from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError, AssertionError,
            zstandard.ZstdError, brotli.error, lzma.LZMAError, SafetensorError) as e:
        raise bad(f"{type(e).__name__}: {e}") from e
    return cfg, named, header


def read_tensors(header: dict, stored: dict[str, Tensor], words: np.ndarray) -> dict[str, Tensor]:
    """The tensors that a header tells of, from the payload's and the range-coded words. ValueError where they disagree."""
    named = {}
    for name, kind in header["tensors"].items():
        if kind["kind"] == "plain":
            w = stored.pop(name)
            named[name] = w.float() if w.dtype == torch.float16 else w
        elif kind["kind"] == "rows":
            shape, scale, levels = kind["shape"], stored.pop(f"{name}:scale"), kind["levels"]
            if header["codec"] == ENTROPY:
                tables = {key: stored.pop(f"{name}:{key}").numpy() for key in ("rows", "cols", "counts")}
                count, step = kind["words"], kind["step"]
                if (math.prod(shape[:-1]), shape[-1]) != (tables["rows"].size, tables["cols"].size) or not 0 <= count <= len(words):
                    raise ValueError(f"{name} has other tables than its shape asks for")
                q = torch.from_numpy(decode_codes(tables, step, words[:count], levels)).view(shape)
                words = words[count:]
            else:
                q = stored.pop(f"{name}:q")
            if list(q.shape) != shape or list(scale.shape) != [*shape[:-1], 1] or q.dtype != torch.int8:
                raise ValueError(f"{name} has another shape than its header says")
            named[name] = tg.dequantize_rows(q, scale)
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

    mode: str = "sliding"  # chunked, sliding, mixture (sliding with n-grams) or ttt (sliding with training on what is scored)
    stride: int = 64  # tokens scored per window; every one has at least row - stride tokens before it
    temperature: float = 1.0  # divides the logits; choose it on training tokens
    share: float = 0.0  # mixture: weight that flows between the experts at every token; 0: Bayes, regret at most ln 4 nats
    ttt_chunk: int = 32768  # ttt: tokens scored before they are trained on
    ttt_epochs: int = 3  # ttt: passes over each chunk
    ttt_lr: float = 0.002  # ttt: learning rate of SGD with momentum 0.9, falling to 0 as a cosine over the chunks


class Scores(NamedTuple):
    nats: Tensor  # [n] float64: of every target
    times: Tensor  # [n] int32: how often it was scored; anything but 1 is a bug
    given: dict[int, np.ndarray]  # the whole distribution at the targets that were asked for


def alone(device: torch.device) -> SimpleNamespace:
    """What scorers ask of a Run, in one process without a run folder."""
    return SimpleNamespace(rank=0, world=1, device=device, agree=lambda: None, sum=lambda x: x)


def window_plan(n: int, length: int, stride: int) -> np.ndarray:
    """
    Windows [k, 3] over n targets: first input, first target scored, end of the targets scored. Window k starts at
    k*stride; the first scores all that it covers, the others their last `stride`; the last may be cut short. Every target
    is scored once, with at least length - stride tokens before it behind the first window (spec A2).
    """
    count = max(1, -(-(n - length) // stride) + 1)
    starts = np.arange(count) * stride
    firsts = np.where(starts == 0, 0, starts + length - stride)
    return np.stack([starts, firsts, np.minimum(starts + length, n)], axis=1)


class Cache:
    """
    Keys and values of a row that grows: takes the place of train_gpt.Seen, so that the model's own code computes the
    activations of new tokens alone. Feeding a row in pieces gives what one pass over it gives, up to float order.
    """

    def __init__(self, model: tg.GPT, repeats: int, window: int):
        self.model, self.repeats, self.window, self.size, self.docs = model, repeats, window, 0, None
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.turn = 0

    def feed(self, tokens: Tensor) -> Tensor:
        """Activations [T, D] of the next tokens [T]."""
        end = self.size + len(tokens)
        turned = {name: getattr(self.model, name)[self.size : end] for name in ("cos", "sin")}
        with swapped(tg, Seen=self.seen), swapped(self.model, **turned):
            x = self.model.hidden(tokens[None], self.repeats, self.window)[0]
        self.size = end
        return x

    def seen(self, docs: Tensor | None, window: int, like: Tensor) -> "Cache":
        self.turn = 0
        if docs is not None:  # documents are counted within what is fed: go on from the last one
            self.docs = docs if self.docs is None else torch.cat([self.docs, docs + self.docs[:, -1:]], 1)
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.turn < len(self.kept):
            k, v = (torch.cat(pair, 2) for pair in zip(self.kept[self.turn], (k, v)))
            self.kept[self.turn] = k, v
        else:
            self.kept.append((k, v))
        self.turn += 1
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        pos = torch.arange(k.size(2), device=q.device)
        new = pos[k.size(2) - q.size(2) :, None]
        docs = (self.docs[:, None, new], self.docs[:, None, None]) if self.docs is not None else (None, None)
        ok = tg.visible(new, pos, *docs, self.window)
        return ((q * scale) @ k.mT).float().masked_fill(~ok, -torch.inf).softmax(-1).to(v.dtype) @ v


class Sliding:
    """
    The model over windows of the stream. Chunked is the plan whose stride is the whole row. Batches have one shape, ranks
    take turns with them. Temperature divides the logits; ids of the head beyond the vocabulary get no probability.
    """

    def __init__(self, model: tg.GPT, how: How, shape: tg.Shape, run=None):
        self.model, self.how, self.shape = model, how, shape
        self.run = run or alone(model.head.device)
        self.length = shape.seq_len
        self.stride = shape.seq_len if how.mode == "chunked" else how.stride
        if not 1 <= self.stride <= self.length:
            raise UserError(f"stride = {how.stride}: must lie between 1 and the row's {self.length} tokens")
        self.losses = torch.compile(self.plain_losses, dynamic=False) if model.cfg.compile else self.plain_losses

    def log_probs(self, x: Tensor) -> Tensor:
        """Activations [..., D] -> log probabilities [..., V] in fp32."""
        return (self.model.logits(x)[..., : self.model.cfg.vocab] / self.how.temperature).log_softmax(-1)

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
    def score_windows(self, stream: Tensor, plan: np.ndarray, scores: Scores, want: tuple[int, ...]) -> None:
        run, rows = self.run, self.shape.rows
        plan = torch.from_numpy(plan).to(run.device)
        within = torch.arange(self.length, device=run.device)
        for low in range(0, len(plan), rows * run.world):
            run.agree()
            mine = plan[low + run.rank * rows :][:rows]
            start, first, end = F.pad(mine, (0, 0, 0, rows - len(mine))).T[..., None]  # what is missing scores nothing
            at = start + within  # of inputs in the stream, and of their targets among the targets
            hidden = self.model.hidden(stream[at.clamp_max(len(stream) - 2)], self.shape.repeats, self.shape.window)
            scored = ((at >= first) & (at < end)).flatten().nonzero()[:, 0]
            at, hidden = at.flatten(), hidden.flatten(0, 1)
            for part in scored.split(rows * self.stride):
                padded = F.pad(part, (0, rows * self.stride - len(part)))
                nats = self.losses(hidden[padded], stream[(at[padded] + 1).clamp_max(len(stream) - 1)])[: len(part)]
                scores.nats.index_add_(0, at[part], nats.double())
                scores.times.index_add_(0, at[part], torch.ones_like(part, dtype=torch.int32))
            for t in want:
                for i in scored[at[scored] == t]:
                    scores.given[t] = self.log_probs(hidden[i]).double().softmax(-1).cpu().numpy()

    def reset(self, first: int, n: int) -> None:
        """Begin to walk along n targets behind the token `first`."""
        self.past, self.n, self.end = [first], n, 0

    @torch.no_grad()
    def distribution(self) -> np.ndarray:
        """Probabilities [V] in float64 of the token behind those observed. Called once before each observe."""
        t = len(self.past) - 1
        if t == self.end:  # a new window: see its context again
            self.start = 0 if t == 0 else self.start + self.stride
            self.end = self.start + self.length
            self.begin_window(t)
            self.cache, self.fed = Cache(self.model, self.shape.repeats, self.shape.window), self.start
        x = self.cache.feed(torch.tensor(self.past[self.fed :], device=self.run.device))[-1]
        self.fed = t + 1
        return self.log_probs(x).double().softmax(-1).cpu().numpy()

    def begin_window(self, t: int) -> None:
        """What happens before the window that first scores target t; training, in a scorer that trains."""

    def observe(self, token: int) -> None:
        self.past.append(token)


ALPHA, BIGRAM_STRENGTH, TRIGRAM_STRENGTH = 0.1, 8.0, 4.0


class NGrams:
    """
    Unigram, bigram and trigram distributions from counts of the tokens seen so far. Each is a distribution over the whole
    vocabulary: the unigram is smoothed by ALPHA, the longer ones by the next shorter with the weight of so many counts
    (MacKay and Peto 1995).
    """

    def __init__(self, vocab: int, first: int):
        self.total, self.context = 0, (vocab, first)  # `vocab` stands for nothing: before the first token
        self.unigram, self.longer = np.zeros(vocab), defaultdict(Counter)

    def distributions(self) -> np.ndarray:
        """[3, V]"""
        rows = [(self.unigram + ALPHA) / (self.total + ALPHA * len(self.unigram))]
        for context, strength in ((self.context[1:], BIGRAM_STRENGTH), (self.context, TRIGRAM_STRENGTH)):
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
    """How often each entry occurs before itself: what a count was when its token was scored, for a whole stream at once."""
    ordered, order = key.sort(stable=True)
    place = torch.arange(len(key), device=key.device)
    first = torch.where(F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True), place, 0).cummax(0).values
    return torch.empty_like(place).index_copy_(0, order, place - first).double()


def ngram_log_probs(tokens: Tensor, vocab: int) -> Tensor:
    """What NGrams gave to each target of a stream [n+1], just before it counted it: [n, 3] float64."""
    y, x = tokens[1:], tokens[:-1]
    w = F.pad(x[:-1], (1, 0), value=vocab)
    place = torch.arange(len(y), device=y.device)
    p = [(earlier(y) + ALPHA) / (place + ALPHA * vocab)]
    for context, strength in ((x, BIGRAM_STRENGTH), (w * vocab + x, TRIGRAM_STRENGTH)):
        p.append((earlier(context * vocab + y) + strength * p[-1]) / (earlier(context) + strength))
    return torch.stack(p, 1).log()


class Mixture(Sliding):
    """
    Neural, unigram, bigram and trigram, mixed by Bayes' rule: an expert's weight is its share of the probability given to
    the tokens so far (Hedge on log loss with learning rate 1), so the whole text costs at most ln 4 nats more than
    the best expert alone. Weights and counts change after a token is scored. A sum of distributions with weights that sum
    to 1 is one. The counts of a whole stream come from sorting it: the pass costs what the sliding pass costs.
    """

    def score(self, tokens: np.ndarray, want: tuple[int, ...] = ()) -> Scores:
        neural, vocab = super().score(tokens, want), self.model.cfg.vocab
        stream = torch.from_numpy(tokens.astype(np.int64)).to(self.run.device)
        experts = torch.cat([-neural.nats[:, None], ngram_log_probs(stream, vocab)], 1)
        before = mixing_weights(experts, self.how.share)
        given, ngrams = {}, NGrams(vocab, int(tokens[0]))
        for t in range(max(neural.given, default=-1) + 1):
            if t in neural.given:
                given[t] = before[t].exp().cpu().numpy() @ np.stack([neural.given[t], *ngrams.distributions()])
            ngrams.observe(int(tokens[t + 1]))
        return Scores(-(before + experts).logsumexp(1), neural.times, given)

    def reset(self, first: int, n: int) -> None:
        super().reset(first, n)
        self.weights, self.ngrams = np.full(4, 0.25), NGrams(self.model.cfg.vocab, first)

    def distribution(self) -> np.ndarray:
        self.experts = np.stack([super().distribution(), *self.ngrams.distributions()])
        return self.weights @ self.experts

    def observe(self, token: int) -> None:
        super().observe(token)
        posterior = self.weights * self.experts[:, token]
        self.weights = (1 - self.how.share) * posterior / posterior.sum() + self.how.share / 4
        self.ngrams.observe(token)
