"""
Phase 3: what the weights of a run are worth, each figure a code length that could be decoded.

    python logs/score.py logs/RUN               # all that the [score] table of its preset asks for
    python logs/score.py logs/RUN --modes "sliding mixture" --stride 64   # and with other settings
    python logs/score.py logs/RUN/model.nrx --modes ttt   # of an artifact alone: printed, not kept
    python logs/score.py logs/RUN --ensemble "8 16" --with_runs logs/RUN2   # snapshots, mixed
    python logs/score.py sample logs/RUN --prompt "The people"
    python logs/score.py prove logs/RUN --mode mixture --bytes 16384
    python logs/score.py table logs/RUN         # bytes and bits per byte lost, choice by choice
    python logs/score.py export logs/RUN --out small.nrx --bits fit --limit 16000000

The first form runs under torchrun too, with as many ranks as there are GPUs. It adds to the run's
log.txt and result.json: at the top what was asked for last, under `scores` each figure that was
ever taken, by its settings. A figure that is there is not taken again: what was killed goes on.

Read it from top to bottom:
    Scorers      chunked, sliding window, online mixture, score-first test-time training
    Proof        distributions that sum to 1 and know no future; a text back from its code
    Epochs       averages of the weights that a run kept at the ends of its epochs
    Ensembles    mixtures of the snapshots that runs kept at the ends of their cycles
    Figures      result.json
    Programs     the phase, sample, prove, decode, table, export

Every scorer gives the probability of each token of a stream behind its predecessors, and does so
twice: `score` takes a whole stream at the speed of the batched forward pass, `distribution` and
`observe` walk one token at a time and cannot look ahead. The first is what is claimed, the second
is what decodes; `prove` ties them. Letters as in train_gpt.py: B, T, D, V; losses in nats.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
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
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
import zstandard
from constriction import stream as coder
from safetensors.torch import save as save_tensors
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402
from train_gpt import Config, UserError  # noqa: E402

########################################
#               Scorers                #
########################################


@dataclass
class Settings:
    """How a stream is scored; encoder and decoder must be given the same."""

    # tokens scored per window; behind the first, each has row - stride tokens before it or more
    stride: int = 64
    logit_temperature: float = 1.0  # divides the logits; choose it on training tokens
    # mixture: weight spread over the experts after every token; 0: Bayes, regret at most ln 4
    share: float = 0.0
    ttt_chunk: int = 32768  # ttt: tokens scored before they are trained on
    ttt_epochs: int = 3  # ttt: passes over each chunk
    # ttt: learning rate of SGD with momentum 0.9, falling to 0 as a cosine over the chunks
    ttt_lr: float = 0.002
    lora_rank: int = 8  # lora: rank of the products that are trained on a document
    lora_lr: float = 0.001  # lora: learning rate of AdamW
    # 1: tokens that the tokenizer never puts behind the one before get no probability of the model
    canonical: int = 0


@dataclass
class OneScore(Settings):
    """The settings of one scorer."""

    # chunked, sliding, mixture (with n-grams), ttt or lora (training on what was scored)
    mode: str = "sliding"


class Scores(NamedTuple):
    nats: Tensor  # [n] float64: of every target
    times: Tensor  # [n] int32: how often it was scored; anything but 1 is a bug
    distributions: dict[int, np.ndarray]  # at the targets that were asked for


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
    Keys and values of a row that grows: stands in for train_gpt.AttentionMask, so that the model's
    own code computes the activations of new tokens alone. Feeding a row in pieces gives what one
    pass over it gives, up to float order.
    """

    def __init__(self, model: tg.GPT, shape: tg.Shape):
        self.model, self.shape, self.size, self.docs = model, shape, 0, None
        places = tg.wiring(model.cfg, shape.repeats)
        places = [p for p in places if tg.has_attention(model.cfg, p.block)]
        windows = [shape.window if p.windowed else shape.window_long for p in places]
        self.windows = windows * shape.passes
        self.sharp = tg.sharpness(model.cfg, shape.window_long)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.last: dict[int, Tensor] = {}  # by turn, the last token's key as it was
        self.embedding: Tensor | None = None  # the last token's, as smear needs it
        self.token: Tensor | None = None  # the last one [1, 1]
        self.turn = 0

    def feed(self, tokens: Tensor) -> Tensor:
        """Activations [T, D] of the next tokens [T]."""
        shape = self.shape
        applied = shape.repeats, shape.window, shape.passes, shape.window_long
        x = self.model.hidden(tokens[None], *applied, cache=self)[0]
        self.size, self.token = self.size + len(tokens), tokens[None, -1:]
        return x

    def begin_pass(self, docs: Tensor | None) -> Cache:
        """Begin a pass over the blocks for tokens of the documents docs [1, T]."""
        self.turn = 0
        if docs is not None:  # documents are counted within what is fed: go on from the last one
            self.docs = (
                docs if self.docs is None else torch.cat([self.docs, docs + self.docs[:, -1:]], 1)
            )
        return self

    def embedding_before(self, x: Tensor) -> Tensor:
        """Of the first new token the embedding of the one before it, zeros where none is."""
        before = torch.zeros_like(x[:, :1]) if self.embedding is None else self.embedding
        self.embedding = x[:, -1:]
        return before

    def keys_before(self, k: Tensor) -> Tensor:
        """Of each new token the key of the one before it, which may be of an earlier piece."""
        first = self.last.get(self.turn, k[:, :1])
        self.last[self.turn] = k[:, -1:]
        return torch.cat([first, k[:, :-1]], dim=1)

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
        docs = None, None
        if self.docs is not None:  # with pairs of heads, of two positions a token
            positions = self.docs.repeat_interleave(len(pos) // self.docs.size(1), dim=1)
            docs = positions[:, None, new], positions[:, None, None]
        ok = tg.visible(new, pos, *docs, self.windows[self.turn - 1])
        scores = ((q * (scale * self.sharp)) @ k.mT).float().masked_fill(~ok, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v


class Sliding:
    """
    The model over windows of the stream. Chunked is the plan whose stride is the whole row. Batches
    have one shape, ranks take turns with them. Temperature divides the logits; ids beyond the
    vocabulary get no probability.
    """

    def __init__(self, model: tg.GPT, how: OneScore, shape: tg.Shape, run: tg.Ranks | None = None):
        self.model, self.how, self.shape = model, how, shape
        self.run = run or tg.Ranks(model.head.device)
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
        self.hidden, self.impossible = self.compiled_as_model(model.hidden), None
        if how.canonical:
            mask = tg.canonical_mask(tokenizer_of(model.cfg))
            self.impossible = torch.from_numpy(mask).to(self.run.device)

    def compiled_as_model(self, f: Callable) -> Callable:
        """Compiled as one graph where the model is (compile = 2); else as it is."""
        return torch.compile(f, dynamic=False) if self.model.cfg.compile == 2 else f

    def warm_up(self) -> None:
        """Compile every graph that scoring needs, on random tokens of one document."""
        tokens = np.random.default_rng(0).integers(
            self.model.cfg.vocab - 1, size=self.length + self.stride + 1
        )
        self.score(tokens + (tokens >= self.model.cfg.doc_token))

    def log_probs(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Activations [..., D] of the tokens [...] -> log probabilities [..., V] in fp32."""
        z = self.model.logits(x)[..., : self.model.cfg.vocab] / self.how.logit_temperature
        if self.impossible is not None:
            z = z.masked_fill(tg.unpacked(self.impossible, tokens, z.size(-1)), -torch.inf)
        return z.log_softmax(-1)

    def plain_losses(self, x: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(self.log_probs(x, tokens), targets, reduction="none")

    def score(self, tokens: np.ndarray, want: tuple[int, ...] = ()) -> Scores:
        """Of tokens [n+1] the n targets tokens[1:], each given its predecessors."""
        n, device = len(tokens) - 1, self.run.device
        stream = torch.from_numpy(tokens.astype(np.int64)).to(device)
        zeros = [torch.zeros(n, dtype=kind, device=device) for kind in (torch.float64, torch.int32)]
        scores = Scores(*zeros, {})
        self.score_windows(stream, window_plan(n, self.length, self.stride), scores, want)
        return Scores(
            self.run.sum_of(scores.nats), self.run.sum_of(scores.times), scores.distributions
        )

    @torch.no_grad()
    def score_windows(
        self, stream: Tensor, plan: np.ndarray, scores: Scores, want: tuple[int, ...]
    ) -> None:
        run, rows = self.run, self.shape.rows
        plan = torch.from_numpy(plan).to(run.device)
        within = torch.arange(self.length, device=run.device)
        for low in range(0, len(plan), rows * run.world):
            run.poll()
            mine = plan[low + run.rank * rows :][:rows]
            # windows of zeros fill the batch up: they end where they begin and score nothing
            start, first, end = F.pad(mine, (0, 0, 0, rows - len(mine))).T[..., None]
            at = start + within  # of inputs in the stream, and of their targets among the targets
            shape = self.shape
            applied = shape.repeats, shape.window, shape.passes, shape.window_long
            hidden = self.hidden(stream[at.clamp_max(len(stream) - 2)], *applied)
            scored = ((at >= first) & (at < end)).flatten().nonzero()[:, 0]
            at, hidden = at.flatten(), hidden.flatten(0, 1)
            for part in scored.split(rows * self.stride):
                padded = F.pad(part, (0, rows * self.stride - len(part)))
                pair = [stream[(at[padded] + k).clamp_max(len(stream) - 1)] for k in (0, 1)]
                nats = self.losses(hidden[padded], *pair)[: len(part)]
                scores.nats.index_add_(0, at[part], nats.double())
                scores.times.index_add_(0, at[part], torch.ones_like(part, dtype=torch.int32))
            for t in want:
                for i in scored[at[scored] == t]:
                    log_p = self.log_probs(hidden[i], stream[t])
                    scores.distributions[t] = log_p.double().softmax(-1).cpu().numpy()

    def reset(self, first: int, n: int) -> None:
        """Begin to walk along n targets behind the token `first`."""
        self.past, self.end = [first], 0

    @torch.no_grad()
    def distribution(self) -> np.ndarray:
        """Probabilities [V] in float64 of the next token. Once before each observe."""
        t = len(self.past) - 1
        if t == self.end:  # a new window: see its context again
            self.start, self.end = self.next_window(t)
            self.cache, self.fed = (Cache(self.model, self.shape), self.start)
        x = self.feed(torch.tensor(self.past[self.fed :], device=self.run.device))
        self.fed = t + 1
        last = torch.tensor(self.past[-1], device=self.run.device)
        return self.log_probs(x, last).double().softmax(-1).cpu().numpy()

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
    """How often each entry occurs before itself, for a whole stream at once."""
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
        for t in range(max(neural.distributions, default=-1) + 1):
            if t in neural.distributions:
                given[t] = before[t].exp().cpu().numpy() @ np.stack(
                    [neural.distributions[t], *ngrams.distributions()]
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

    def __init__(self, model: tg.GPT, how: OneScore, shape: tg.Shape, run: tg.Ranks | None = None):
        super().__init__(model, how, shape, run)
        self.graph = self.compiled_as_model(model)

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
        """One step of SGD on rows, of which ranks take turns; gradient norm 1 at most."""
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
            shape = self.shape
            applied = shape.repeats, shape.window, shape.passes, shape.window_long
            losses = self.graph(x, y, *applied)
            (losses.sum() / tokens).backward()
        for p in self.model.parameters():
            p.grad = self.run.sum_of(torch.zeros_like(p) if p.grad is None else p.grad)
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

    def __init__(self, model: tg.GPT, how: OneScore, shape: tg.Shape, run: tg.Ranks | None = None):
        super().__init__(model, how, shape, run)
        self.adapted = adapted_matrices(model)
        self.watch = self.add_product  # one object: graphs are kept by it
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        if not self.adapted:
            raise UserError(NO_LORA)
        self.graph = self.compiled_as_model(self.log_probs_at)

    def add_product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x W^T -> x (W + B A)^T, with A [R, rank, cols] and B [R, rows, rank] of each document."""
        if name not in self.pairs:
            return y
        a, b = self.pairs[name]
        return y + (x @ a.to(x.dtype).mT) @ b.to(x.dtype).mT

    def begin(self, rows: int) -> None:
        """New products for so many documents; every document starts with the same random halves."""
        self.products, rank = {}, self.how.lora_rank
        for i, (name, p) in enumerate(self.adapted.items()):
            w, rng = p.detach().flatten(0, -2), torch.Generator().manual_seed(i)
            a = torch.randn(rank, w.size(1), generator=rng).to(w.device) * w.size(1) ** -0.5
            b = w.new_zeros(rows, w.size(0), rank, dtype=torch.float32)
            pair = a.expand(rows, -1, -1).clone(), b
            self.products[name] = tuple(x.requires_grad_() for x in pair)
        self.parts = [x for pair in self.products.values() for x in pair]
        how = {"lr": self.how.lora_lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(self.parts, **how)

    @contextlib.contextmanager
    def adapting(self):
        """Inside, a forward pass adds the products; blocks compiled one by one run eagerly."""
        stance = contextlib.nullcontext()
        if self.model.cfg.compile == 1:
            stance = torch.compiler.set_stance("force_eager")
        with tg.watching(self.model, self.watch), stance:
            self.pairs = self.products
            yield

    def log_probs_at(self, tokens: Tensor, places: Tensor, pairs: dict) -> Tensor:
        """Log probabilities [R, n, V] at places [n] of rows [R, T], under `pairs`."""
        self.pairs = pairs
        shape = self.shape
        applied = shape.repeats, shape.window, shape.passes, shape.window_long
        hidden = self.model.hidden(tokens, *applied)
        return self.log_probs(hidden[:, places], tokens[:, places])

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
        with self.adapting():
            return self.graph(tokens, places, self.products), at[:, places]

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
                run.poll()
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
        return Scores(run.sum_of(nats), run.sum_of(times), given)

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
        with self.adapting():
            return super().feed(tokens)

    def log_probs(self, x: Tensor, tokens: Tensor) -> Tensor:
        if x.ndim > 1:  # within the graph, which adapts
            return super().log_probs(x, tokens)
        with self.adapting():
            return super().log_probs(x[None, None], tokens[None, None])[0, 0]

    def observe(self, token: int) -> None:
        super().observe(token)
        # the next one begins: with it a new window and new products
        if token == self.model.cfg.doc_token:
            self.document = self.end = len(self.past) - 1
            self.begin(1)


def adapted_matrices(model: tg.GPT) -> dict[str, Tensor]:
    """The large matrices that activations are multiplied with: no table of the input."""
    named = dict(model.named_parameters())
    tables = ("embed", "value_embeds", "value_tables", "second_embed", "bigram")
    return {name: named[name] for name in tg.quantised_names(model) if name not in tables}


NO_LORA = "mode = 'lora' adapts matrices of 64 rows and columns or more, and this model has none"
SCORERS = {
    "chunked": Sliding,
    "sliding": Sliding,
    "mixture": Mixture,
    "ttt": TestTime,
    "lora": LoRA,
}


def tokenizer_of(cfg: Config) -> tg.Tokenizer:
    if not cfg.tokenizer:
        raise UserError("canonical = 1 needs a tokenizer, and this model was trained without one")
    return tg.Tokenizer(cfg.tokenizer, cfg.vocab, cfg.doc_token)


def refuse_dropout(cfg: Config, modes: str) -> None:
    if re.search("ttt|lora", modes) and (cfg.attn_dropout or cfg.mlp_dropout or cfg.stoch_depth):
        raise UserError(
            f"mode = {modes!r} trains on what it scored, and with attn_dropout, mlp_dropout or "
            "stoch_depth by chance: no decoder could follow; use another mode, or a model without "
            "them"
        )


def make_scorer(
    model: tg.GPT, how: OneScore, shape: tg.Shape, run: tg.Ranks | None = None
) -> Sliding:
    """The scorer of how.mode; shape: of its windows; run: for several ranks."""
    if how.mode not in SCORERS:
        raise UserError(f"mode = {how.mode!r}: must be one of {', '.join(SCORERS)}")
    refuse_dropout(model.cfg, how.mode)
    for f in dataclasses.fields(Settings):
        tg.check_table_number(f.name, getattr(how, f.name))
    return SCORERS[how.mode](model, how, shape, run)


########################################
#                Proof                 #
########################################


@contextlib.contextmanager
def one_thread():
    """For walks token by token: threads cost more than they bring there."""
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
    scorer: Sliding, tokens: np.ndarray, decoder: Callable[[bytes], np.ndarray], flips: int = 3
) -> dict:
    """
    Show that the scorer's claim for tokens [n+1] is a code length, or raise UserError that names
    what it is not. Shown: what check_claim() shows; the step-wise distributions all sum to 1; they
    encode the tokens in the claimed number of bits; and decoder(code), which is given nothing but
    the code, gives the same tokens back. Returns what was measured.
    """
    n = len(tokens) - 1
    places = tuple(sorted({round((i + 1) * (n - 1) / (flips + 1)) for i in range(flips)}))
    nats = check_claim(scorer, tokens, places)
    began = time.perf_counter()
    code, seen = encode(scorer, tokens)
    encode_seconds = time.perf_counter() - began
    worst = float(np.abs(seen[:, 0] - 1).max())
    show(scorer, worst < 1e-6, f"step-wise probabilities sum to 1 +- {worst:.3g}")
    claimed_bits, stepwise_bits = float(nats.sum()) / math.log(2), float(-np.log2(seen[:, 1]).sum())
    # 6 bytes of head, at most two words of rounding at the end; the two passes round floats
    # differently.
    fits = 8 * len(code) <= claimed_bits * 1.005 + 112
    show(scorer, fits, f"{claimed_bits:.0f} bits are claimed, the code has {8 * len(code)}")
    began = time.perf_counter()
    show(scorer, np.array_equal(decoder(code), tokens), "what is decoded is another text")
    return {
        "tokens": n,
        "claimed_bits": claimed_bits,
        "stepwise_bits": stepwise_bits,
        "code_bytes": len(code),
        "flips": len(places),
        "worst_sum": worst,
        "encode_s": encode_seconds,
        "decode_s": time.perf_counter() - began,
    }


def show(scorer: Sliding, ok: bool, why: str) -> None:
    if not ok:
        raise UserError(f"mode {scorer.how.mode}: no code length: {why}")


def check_claim(scorer: Sliding, tokens: np.ndarray, places: tuple[int, ...]) -> Tensor:
    """
    The claimed nats [n], on the CPU. Shown of them: every target is scored once; at `places` the
    distribution behind the claim sums to 1 and gives its target what was claimed; changing such a
    target changes no score before it and not the distribution at it.
    """
    vocab, claim = scorer.model.cfg.vocab, scorer.score(tokens, places)
    nats = claim.nats.cpu()
    often = int(claim.times.min()), int(claim.times.max())
    show(scorer, often == (1, 1), f"targets are scored {often[0]} to {often[1]} times")
    show(scorer, bool(nats.isfinite().all()), "scores are not finite")
    for t in places:
        p, own, claimed = claim.distributions[t], int(tokens[t + 1]), float(nats[t])
        sums = p.shape == (vocab,) and bool((p >= 0).all()) and abs(p.sum() - 1) < 1e-6
        show(scorer, sums, f"the probabilities at target {t} sum to {p.sum():.6g}")
        given = -math.log(p[own])
        why = f"target {t} is scored {claimed:.6f} nats, but its distribution gives {given:.6f}"
        show(scorer, abs(given - claimed) < 1e-3, why)
        changed = tokens.copy()
        changed[t + 1] = (own + 1) % vocab
        other = scorer.score(changed, (t,))
        moved = float((other.nats.cpu() - nats)[:t].abs().amax()) if t else 0.0
        why = f"changing target {t} moves a score before it by {moved:.3g} nats"
        show(scorer, moved < 1e-5, why)
        same = np.abs(other.distributions[t] - p).max() < 1e-6
        show(scorer, same, f"changing target {t} changes the distribution at it")
    return nats


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
        "pieces; if those are enough, the pieces and the decoded text disagree about their length"
    )


########################################
#                Epochs                #
########################################


def kept_epochs(folder: Path) -> list[Path]:
    """The epochs kept by a run, oldest first."""
    return sorted(p for p in folder.glob("epochs/*") if p.name.isdigit())


def averaging_weights(n: int) -> dict[str, list[float]]:
    """equal: every checkpoint counts the same; recency: the k-th of n counts k / (1 + ... + n)."""
    return {"equal": [1 / n] * n, "recency": [2 * k / (n * (n + 1)) for k in range(1, n + 1)]}


@torch.no_grad()
def token_losses(subject: Subject, state: dict) -> Tensor:
    """
    Losses in nats, float64 on the CPU, of the validation targets that fall to this rank; the net is
    applied as `state` says.
    """
    newer = state.get("passes", 1), state.get("window_long", 0)
    applied = state["repeats"], state["window"], *newer
    run, rows, losses = subject.run, subject.shape.rows, []
    for low in range(0, subject.val.rows, rows * run.world):
        run.poll()
        first = low + run.rank * rows
        x, y = subject.val.batch(range(first, first + rows), run.device, rows)
        found = subject.graph(x, y, *applied)
        losses.append(found[y.flatten() >= 0].double().cpu())
    return torch.cat(losses)


def mean_over_ranks(subject: Subject, losses: Tensor) -> float:
    return float(subject.run.sum_of(losses.sum().to(subject.run.device))) / subject.val.scored


def read_applied(folder: Path) -> dict:
    """How the weights of an epoch's end or a snapshot are applied."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        applied = [state[key] for key in ("step", "repeats", "window")]
        if not all(type(value) is int for value in applied):
            raise ValueError(f"step, repeats, window: {applied}")
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise UserError(
            f"{path} cannot be read ({type(e).__name__}: {e}); put the run's own back, or delete "
            "its folder"
        ) from e
    return state


def score_epochs(subject: Subject, last: int) -> dict:
    """
    Losses of averages over the last epochs that the run kept, each applied with the depth and
    windows of its time: prob_* of the probabilities that each checkpoint gives to the target,
    which is a distribution (averaged logits would not be that of anything), weights_* of the
    weights themselves. Leaves the model with other weights. Collective.
    """

    def listed() -> list[tuple[Path, dict]]:
        paths = kept_epochs(subject.folder)[-last:]
        return [(path, read_applied(path)) for path in paths]

    def weights_of(path: Path) -> dict[str, Tensor]:
        return subject.run.read_on_main(
            lambda: (tg.read_tensors(path / "model.safetensors"), None)
        )[0]

    kept = subject.run.on_main(listed)
    if len(kept) < last:
        raise UserError(f"{subject.folder}/epochs holds {len(kept)} of {last} epochs to average")
    found, losses = {}, []
    for path, state in kept:
        tg.load_weights(subject.model, weights_of(path), str(path))
        losses.append(token_losses(subject, state))
        loss = mean_over_ranks(subject, losses[-1])
        subject.run.log(f"epoch weights of step {state['step']}: val_loss:{loss:.5f}")
    stacked, end = torch.stack(losses), kept[-1][1]
    for name, weights in averaging_weights(len(kept)).items():
        log_weights = torch.tensor(weights, dtype=torch.float64).log()[:, None]
        mixture = -torch.logsumexp(log_weights - stacked, 0)
        found[f"val_loss_prob_{name}"] = mean_over_ranks(subject, mixture)
    for name, weights in averaging_weights(len(kept)).items():
        average = {n: torch.zeros(w.shape) for n, w in subject.model.named_parameters()}
        for (path, _), weight in zip(kept, weights):
            for n, w in weights_of(path).items():
                average[n].add_(w.float(), alpha=weight)
        tg.load_weights(subject.model, average, str(subject.folder))
        averaged = token_losses(subject, end)
        found[f"val_loss_weights_{name}"] = mean_over_ranks(subject, averaged)
    for name, loss in found.items():
        subject.run.log(f"average over {len(kept)} epochs: {name}:{loss:.5f}")
    return found | {"averaged_steps": [state["step"] for _, state in kept]}


def selected(subject: Subject, result: dict, found: dict) -> dict:
    """
    The best epoch, and the least of all losses as slowrun's board takes it: both are chosen on the
    validation set itself, which `selected_on_validation` says.
    """
    best = best_epoch(subject.folder, subject.plan)
    last = {key: result.get(key) for key in ("val_loss", "val_loss_ema", "val_loss_swa")}
    losses = last | {k: v for k, v in found.items() if k.startswith("val_loss")}
    losses |= {"val_loss_best_epoch": best[0]} if best else {}
    name = min((n for n in losses if losses[n] is not None), key=losses.get)
    chosen = {"slowrun_val_loss": losses[name], "slowrun_val_loss_is": name}
    if best:
        chosen |= {"val_loss_best_epoch": best[0], "best_epoch": best[1]}
        subject.run.log(f"best epoch: {best[1]}, val_loss:{best[0]:.5f} (selected on validation)")
    subject.run.log(
        f"slowrun's figure, the least of these: val_loss:{losses[name]:.5f} from {name} (selected "
        "on validation)"
    )
    on_validation = [k for k in ("val_loss_best_epoch", "slowrun_val_loss") if k in chosen]
    return chosen | {"selected_on_validation": on_validation}


def best_epoch(folder: Path, plan: tg.Plan) -> tuple[float, int] | None:
    """Least loss among the evaluations at ends of epochs, and its epoch; None without any."""
    cfg, losses = plan.cfg, []
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    for record in filter(None, map(tg.parse_metric, text.splitlines())):
        if record["kind"] == "val" and plan.ends_epoch(record["step"]):
            losses.append((record["val_loss"], record["step"] * cfg.epochs // cfg.steps))
    return min(losses, default=None)


########################################
#              Ensembles               #
########################################


class Snapshot(NamedTuple):
    """The weights of the end of a cycle, and the probabilities that weigh them."""

    path: Path
    state: dict
    p: Tensor | None  # of each target of the run's held-out training text; None on other ranks

    @property
    def name(self) -> str:
        return f"{self.path.parent.parent.name}/{self.path.name}"


def kept_snapshots(folder: Path) -> list[Path]:
    """The snapshots of a run, oldest first."""
    return sorted((p for p in folder.glob("snapshots/*") if p.name.isdigit()), key=lambda p: p.name)


def read_snapshots(subject: Subject, folders: list[Path]) -> list[Snapshot]:
    """Those of several runs, which must be of one recipe and weigh on one text."""
    found: list[Snapshot] = []
    for folder in folders:
        theirs, paths = tg.checkpoint_config(folder), kept_snapshots(folder)
        require_one_recipe(subject.cfg, theirs, folder)
        if not paths:
            raise UserError(f"{folder} holds no snapshots: they are kept with --cycles")
        for path in paths:
            state = read_applied(path)
            if "fitness_sha256" not in state:
                raise UserError(
                    f"{path} has no probabilities to weigh it by: train with --fitness_tokens"
                )
            p = tg.read_tensors(path / "fitness.safetensors").get("p")
            tg.require(p is not None, f"{path / 'fitness.safetensors'} holds no probabilities")
            found.append(Snapshot(path, state, p))
    if len({s.state["fitness_sha256"] for s in found}) > 1:
        raise UserError(
            f"{', '.join(map(str, folders))}: their held-out training texts differ, so their "
            "snapshots cannot be weighed together"
        )
    return found


# what only training looks at, and what a snapshot's state says
NOT_OF_THE_MODEL = set(
    "attn_dropout mlp_dropout stoch_depth z_loss mu_loss mu_centering embed_init head_init "
    "init_std proj_init init repeats window".split()
)


def require_one_recipe(cfg: Config, theirs: Config, folder: Path) -> None:
    """One model serves all snapshots, and one text: both runs must have been built for them."""
    fields = [f.name for f in dataclasses.fields(tg.ModelConfig) if f.name not in NOT_OF_THE_MODEL]
    fields += ["vocab", "doc_token", "seq_len", "eval_seq_len", "fitness_tokens"]
    other = [
        f"{key} = {getattr(theirs, key)!r} there and {getattr(cfg, key)!r} here"
        for key in fields
        if getattr(theirs, key) != getattr(cfg, key)
    ]
    if other:
        raise UserError(f"{folder} is of another recipe: {', '.join(other)}")


def mixture_weights(p: Tensor, steps: int = 300, lr: float = 0.5) -> Tensor:
    """
    Weights [M] with which mixing the probabilities p [M, n] that M models give to n targets costs
    the least nats, as slowrun's unlimited track finds them: the softmax of what AdamW learns on all
    targets at once. The problem is convex.
    """
    p, rng = p.double(), torch.Generator().manual_seed(0)
    alpha = (1e-4 * torch.randn(len(p), generator=rng)).double().requires_grad_()
    optimizer = torch.optim.AdamW([alpha], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        loss = -(alpha.softmax(0) @ p).clamp_min(1e-12).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([alpha], 1.0)
        optimizer.step()
    return alpha.detach().softmax(0)


def snapshot_losses(subject: Subject, snapshot: Snapshot) -> Tensor:
    """
    Its losses in nats of the validation targets, kept beside it: what was scored is not scored
    again, whatever it is mixed with. Collective.
    """
    run, val, state = subject.run, subject.val, snapshot.state
    text = hashlib.sha256(f"{val.seq_len} ".encode() + val.tokens.tobytes()).hexdigest()[:16]
    path = snapshot.path / f"val-{text}.safetensors"
    known: list[Tensor] = []  # on rank 0, which alone mixes

    def read() -> bool:
        known.extend([tg.read_tensors(path)["nats"]] if path.exists() else [])
        return bool(known)

    if run.on_main(read):
        return known[0] if run.is_main else torch.zeros(val.scored)
    named = run.read_on_main(lambda: (tg.read_tensors(snapshot.path / "model.safetensors"), None))[
        0
    ]
    tg.load_weights(subject.model, named, str(snapshot.path))
    shape = subject.shape._replace(**{key: state[key] for key in tg.APPLIED if key in state})
    nats = tg.token_losses(run, subject.graph, val, shape)
    data = save_tensors({"nats": nats})
    run.on_main(lambda: tg.write_whole(path, data))
    return nats


def score_ensemble(subject: Subject, snapshots: list[Snapshot], sizes: list[int]) -> dict:
    """
    Validation losses of mixing the probabilities of the K snapshots with the largest weights, for
    each K: with these weights, and evenly. Weights and choice are of held-out training text alone.
    Leaves the model with other weights. Collective.
    """
    run = subject.run
    stacked = lambda: mixture_weights(torch.stack([s.p for s in snapshots])).tolist()
    weights = torch.tensor(run.on_main(stacked), dtype=torch.float64)
    order = weights.argsort(descending=True, stable=True).tolist()[: max(sizes)]
    fitted = even = torch.full((subject.val.scored,), -math.inf, dtype=torch.float64)
    table, singles = [], []
    for size, i in enumerate(order, 1):
        nats = snapshot_losses(subject, snapshots[i]).double()
        singles.append(float(nats.mean()))
        run.log(f"snapshot {snapshots[i].name} val_loss:{singles[-1]:.5f} weight:{weights[i]:.5f}")
        fitted = torch.logaddexp(fitted, weights[i].log() - nats)
        even = torch.logaddexp(even, -nats)
        if size in sizes:
            row = {
                "size": size,
                "val_loss": float((weights[order[:size]].sum().log() - fitted).mean()),
                "val_loss_uniform": float((math.log(size) - even).mean()),
                "val_loss_mean_single": sum(singles) / size,
                "weights": (weights[order[:size]] / weights[order[:size]].sum()).tolist(),
            }
            table.append(row)
    return {"snapshots": [snapshots[i].name for i in order], "singles": singles, "table": table}


def ensemble_table(found: dict) -> str:
    lines = ["| K | fitted | uniform | mean of the singles | largest weights |", "|-:|-:|-:|-:|-|"]
    for row in found["table"]:
        cells = [f"{row[k]:.5f}" for k in ("val_loss", "val_loss_uniform", "val_loss_mean_single")]
        some = " ".join(
            f"{name}:{w:.3f}" for name, w in zip(found["snapshots"], row["weights"][:4])
        )
        lines.append(f"| {row['size']} | {' | '.join(cells)} | {some} |")
    return "\n".join(lines)


def parse_sizes(text: str) -> list[int]:
    """The numbers of snapshots that are mixed."""
    words = text.split()
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 10**6 for word in words):
        raise UserError(f'ensemble = {text!r}: numbers of snapshots from 1 on, such as "8 16 32"')
    return sorted({int(word) for word in words})


########################################
#               Figures                #
########################################

# what a mode's bits per byte are called in result.json
RESULT = {
    "chunked": "chunked_val_bpb",
    "sliding": "sliding_val_bpb",
    "mixture": "mixed_val_bpb",
    "ttt": "ttt_val_bpb",
    "lora": "lora_val_bpb",
}
# the settings that each mode looks at
LOOKS_AT = {
    "chunked": ("logit_temperature", "canonical"),
    "sliding": ("stride", "logit_temperature", "canonical"),
    "mixture": ("stride", "logit_temperature", "canonical", "share"),
    "ttt": ("stride", "logit_temperature", "canonical", "ttt_chunk", "ttt_epochs", "ttt_lr"),
    "lora": ("stride", "logit_temperature", "canonical", "lora_rank", "lora_lr"),
}


class Figures:
    """
    The figures of a run folder: result.json, which rank 0 reads and writes, whole or not at all.
    A source that is no finished run has none, and what is found is only printed.
    """

    def __init__(self, subject: Subject):
        self.subject, self.path = subject, subject.folder / "result.json"
        self.result: dict = subject.run.on_main(
            lambda: {} if subject.other_text else subject.result
        )
        self.keeps = bool(self.result)
        self.digest = subject.run.on_main(self.digest_of_weights)

    def digest_of_weights(self) -> str:
        path = self.subject.path
        with open(path if path.is_file() else path / "model.safetensors", "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    def take(self, name: str, work: Callable[[], tuple[dict, dict]], of: str = "") -> None:
        """
        Unless the figure `name` of these very weights is there (`of`: the hash of those that it is
        about, where they are not the run's last ones), find it by work(), which gives it and what
        of it stands at the top of result.json: what was asked for last stands there.
        """
        scores, digest = self.result.setdefault("scores", {}), of or self.digest
        known = scores.pop(name, None)
        if known and known["of"] == digest:
            self.subject.run.log(f"{name}: taken before: {json.dumps(known['top'])}")
        else:
            figure, top = work()
            known = figure | {"top": top, "of": digest}
        scores[name] = known  # the newest is the last
        self.result |= known["top"]
        if self.keeps:
            self.result["eval_time_s"] = self.seconds()
            text = json.dumps(self.result, indent=1) + "\n"
            self.subject.run.on_main(lambda: tg.write_whole(self.path, text.encode()))

    def seconds(self) -> float:
        """Of the evaluation behind training and of the newest score in each mode."""
        first = self.result.setdefault("first_eval_time_s", self.result.get("eval_time_s", 0.0))
        newest = {}
        for name, figure in self.result["scores"].items():
            newest[name.split()[0]] = figure.get("eval_time_s", 0.0)
        return first + sum(newest.values())


########################################
#               Programs               #
########################################


@dataclass
class Subject:
    """What is scored: weights in their model, how they are applied, the text, and who works."""

    cfg: Config
    run: tg.Run
    plan: tg.Plan
    model: tg.GPT
    graph: Callable  # the model, compiled or not
    shape: tg.Shape
    path: Path  # of the weights: an artifact, or a checkpoint's folder
    folder: Path  # of the run, or the one that the weights lie in
    is_run: bool  # whether a run folder was asked for
    own_text: bool  # whether no flag names another text than the run was evaluated on

    def __post_init__(self):
        cfg, self.tokenizer = self.cfg, None
        if cfg.tokenizer:
            self.tokenizer = tg.Tokenizer(cfg.tokenizer, cfg.vocab, cfg.doc_token)

    @functools.cached_property
    def val(self) -> tg.Validation:
        return tg.Validation(self.cfg, self.plan, self.tokenizer)

    @functools.cached_property
    def result(self) -> dict:
        """What the run's result.json says; empty where this is no finished run. Of rank 0 alone."""
        path = self.folder / "result.json"
        if not self.is_run or not path.exists():
            return {}
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            for figure in result.get("scores", {}).values():
                figure["of"], figure["top"].items()
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as e:
            raise UserError(f"{path} cannot be read ({e}); train the run again") from e
        return result

    @functools.cached_property
    def other_text(self) -> str:
        """
        Why the figures are not the run's: its text is another one, or may be. Empty: they are. Of
        rank 0 alone, once: all shards are read where the run has a hash of them.
        """
        if not self.own_text:
            return "on another text than the run's own"
        known, back = self.result.get("data_sha256"), "put the run's shards back to keep figures"
        try:
            if known and known != tg.data_fingerprint(self.cfg):
                return f"{self.cfg.data} has not the run's shards (data_sha256 differs): {back}"
        except UserError as e:  # those that only training read may be gone
            return f"the data cannot be compared with the run's ({e}): {back}"
        return ""


@dataclass
class Source:
    """Which weights, on which text, on which machine."""

    source: Annotated[str, tyro.conf.Positional]  # run folder, checkpoint folder or artifact
    # scored prefix of the validation stream; 0: all of it; -1: what the run was evaluated on
    val_tokens: int = -1
    data: str = ""  # folder of the shards; empty: the run's own
    device: str = "auto"  # auto, cpu or cuda
    rows: int = 0  # windows per batch; 0: as many as micro_tokens holds


def net_mark(source: str) -> str:
    """A hash of the section Model of a preset's script, which stands in the script's head."""
    title, rest = (f"#{name:^38}#" for name in ("Model", "Optimizer"))
    section = source.partition(title)[2].partition(rest)[0]
    return hashlib.sha256(section.encode()).hexdigest()[:12]


def refuse_edited(folder: Path) -> None:
    """UserError for the run of a script whose net was changed by hand: here is the trainer's."""
    if not (folder / "log.txt").is_file():
        return
    with open(folder / "log.txt", encoding="utf-8", errors="replace") as log:
        head = "".join(itertools.takewhile(lambda line: line != "=" * 100 + "\n", log))
    said = re.search(r"^net: sha256 (\w+) of the section Model", head, re.MULTILINE)
    if said and said[1] != net_mark(head):
        raise UserError(
            f"{folder} is the run of a script whose section Model was changed by hand, and here "
            "the trainer's net would be applied: what the script itself measured is its score; or "
            "make the change in train_gpt.py, and another script"
        )


def opened(flags: Source, compiled: bool = False, exact: bool = False, found=None) -> Subject:
    """
    The weights that `flags` name, in a model; exact: those of a checkpoint, not rounded; found:
    what open_source gave, where it was asked before.
    """
    if flags.rows < 0:
        raise UserError(f"rows = {flags.rows}: must not be negative; 0 are as many as fit")
    if flags.val_tokens < -1:
        raise UserError(f"val_tokens = {flags.val_tokens}: -1 are the run's own, 0 are all")
    cfg, named, path = found or tg.open_source(flags.source, exact)
    if not cfg.data:  # of pre_pre_train.py
        raise UserError(
            f"{flags.source} is a pre-pre-training, which knows no text: train a run from it "
            f"(train_gpt.py --init_from {flags.source}) and score that"
        )
    if exact and path.is_file():
        raise UserError(
            f"{path} is an artifact: quantising needs the exact weights, of a checkpoint "
            "(ckpt/*/DONE)"
        )
    is_run = is_run_folder(flags.source)
    folder = Path(flags.source) if is_run else path.parent
    if Path(__file__).name == "score.py":  # a packed one applies its own net
        for near in (folder, folder.parent):  # that of a checkpoint
            refuse_edited(near)
    cfg.device, cfg.data = flags.device, flags.data or cfg.data
    if flags.val_tokens >= 0:
        cfg.val_tokens = flags.val_tokens
    on_cpu = tg.choose_device(cfg).type == "cpu"
    if on_cpu and isinstance(flags, (Prove, Decode)):
        cfg.dtype = "float32"  # a walk token by token would spend its time on casting weights
    if not compiled:
        cfg.compile = 0  # takes longer than it saves
    quiet = copy.copy(cfg)
    quiet.wandb = ""
    run, plan = tg.Run(quiet), tg.Plan(cfg)
    run.folder = folder  # wherever it was when it was trained, which an export goes on saying
    model = tg.build_model(cfg, run.device, run.dtype, max(plan.max_seq_len, plan.eval_seq_len))
    tg.load_weights(model, named, str(path))
    shape = plan.eval_shape(plan.at(cfg.steps, 1.0))
    graph = tg.compile_model(model, cfg)
    own_text = not flags.data and flags.val_tokens < 0
    subject = Subject(cfg, run, plan, model, graph, shape, path, folder, is_run, own_text)
    if flags.rows:
        most = shape.rows
        if flags.rows > most:  # as many as the text has, more would be of nothing
            most = max(most, windows_of(subject, flags))
        subject.shape = shape._replace(rows=min(flags.rows, most))
    return subject


def windows_of(subject: Subject, flags: Source) -> int:
    """How many windows the text has, each of which scores `stride` tokens."""
    if isinstance(flags, Decode):  # which has no text
        return 1
    stride = getattr(flags, "stride", Settings.stride)
    return -(-subject.val.scored // max(1, min(stride, subject.shape.seq_len)))


@dataclass
class Phase(Settings, Source):
    """
    Take the figures that a run's [score] table asks for, or that the flags do: scores, a proof,
    averages over epochs where some were kept, an ensemble of snapshots, and a sample.
    """

    modes: str = ""  # any of chunked sliding mixture ttt lora, in this order; empty: none
    prove_bytes: int = 0  # validation text to encode and decode, under the last mode; 0: none
    sample_tokens: int = 0  # length of a sample; 0: none
    prompt: str = ""  # text that it continues; empty: the start of a document
    temperature: float = 0.8  # of sampling; 0: always the likeliest token
    top_k: int = 50  # sample among so many likeliest tokens; 0: all
    # average over so many of the last epochs; 0: as many as average_epochs says; -1: over none
    last_epochs: int = 0
    # mix the K snapshots of the largest weights, for each of these K, such as "8 16"; empty: none
    ensemble: str = ""
    # other run folders, such as chains with other seeds, whose snapshots are mixed in
    with_runs: tuple[str, ...] = ()


def phase(argv: list[str]) -> int:
    """The exit code of phase 3 on the run folder, checkpoint or artifact argv[0]."""
    found = tg.open_source(argv[0])
    # Of a run the table as it is now: an artifact has that of its training.
    renewed = is_run_folder(argv[0]) and (Path(argv[0]) / "config.toml").exists()
    cfg = tg.checkpoint_config(Path(argv[0])) if renewed else found[0]
    flags = tyro.cli(
        Phase,
        args=argv,
        default=Phase(source=argv[0], **cfg.score),
        prog="score.py",
        description=__doc__.split("Read it")[0],
        use_underscores=True,
    )
    check(flags)
    subject = opened(flags, compiled=True, found=found)
    with subject.run as run:
        try:
            run.on_main(lambda: begin(subject, flags))
            run.on_main(lambda: check_possible(subject, flags))
            take_figures(subject, flags)
            if flags.sample_tokens:
                run.on_main(lambda: log_sample(subject, flags))
        except tg.Interrupted:  # in here, where the log is still open
            name = signal.Signals(run.signal).name
            run.log(f"interrupted by {name}: what was taken is kept; start again to go on")
            return 128 + run.signal
    return 0


def is_run_folder(source: str) -> bool:
    """Whether a run's folder is named, and not an artifact or one of its checkpoints."""
    return Path(source).is_dir() and not (Path(source) / "model.safetensors").exists()


def check(flags: Phase) -> None:
    """Refuse what no weights could be scored with."""
    modes = flags.modes.split()
    for mode in modes:
        if mode not in SCORERS:
            raise UserError(f"modes = {flags.modes!r}: {mode!r} is none of {', '.join(SCORERS)}")
    if len(set(modes)) < len(modes):
        raise UserError(f"modes = {flags.modes!r} names one twice")
    tg.check_table_number("prove_bytes", flags.prove_bytes)
    check_sampling(flags.sample_tokens, flags.temperature, flags.top_k)
    if not parse_sizes(flags.ensemble) and flags.with_runs:
        raise UserError(
            f"with_runs = {' '.join(flags.with_runs)} does nothing here: it needs --ensemble, how "
            'many snapshots are mixed, such as "8 16"'
        )


def check_possible(subject: Subject, flags: Phase) -> None:
    """Refuse what these weights cannot be scored with, before any figure is taken."""
    for mode in flags.modes.split():
        make_scorer(subject.model, OneScore(mode=mode, **settings_of(flags)), subject.shape)
    if flags.prove_bytes and not subject.tokenizer:
        raise UserError(
            f"prove_bytes = {flags.prove_bytes}: {subject.path} was trained without a tokenizer: "
            "there is no text to encode"
        )
    if flags.sample_tokens:
        prompt_tokens(subject, flags.prompt)
    if parse_sizes(flags.ensemble):
        read_snapshots(subject, [subject.folder, *map(Path, flags.with_runs)])


def begin(subject: Subject, flags: Phase) -> None:
    """Go on with the run's log, and keep others out of its folder; of no run, only say what is."""
    if subject.is_run:
        subject.run.lock_folder()
        subject.run.open_log(None)
    settings = {k: v for k, v in dataclasses.asdict(flags).items() if k != "source"}
    subject.run.log("=" * 100, console=False)
    subject.run.log(f"scores of {subject.path}: {json.dumps(settings)}", console=False)
    if subject.other_text:
        subject.run.log(f"notice: figures are not kept: {subject.other_text}")


def take_figures(subject: Subject, flags: Phase) -> None:
    """Every figure that was asked for, each written as soon as it is there. Collective."""
    figures, modes = Figures(subject), flags.modes.split()
    for mode in modes:
        how = OneScore(mode=mode, **settings_of(flags))
        figures.take(label(how), lambda how=how: one_score(subject, how))
    if flags.prove_bytes:
        how = OneScore(mode=(modes or ["chunked"])[-1], **settings_of(flags))
        name = f"proof {label(how)} bytes={flags.prove_bytes}"
        figures.take(name, lambda: one_proof(subject, how, flags))
    epochs = flags.last_epochs or subject.cfg.average_epochs
    if epochs > 0 and (subject.is_run or flags.last_epochs):
        official = epochs == subject.cfg.average_epochs
        figures.take(f"epochs {epochs}", lambda: averaged(subject, figures, epochs, official))
    if sizes := parse_sizes(flags.ensemble):
        take_ensemble(subject, figures, sizes, flags.with_runs)
    if subject.tokenizer and 0 < subject.val.bytes < 8e6:
        figures.take("compressors", lambda: compressors_bpb(subject))


def settings_of(flags: Settings) -> dict:
    return {f.name: getattr(flags, f.name) for f in dataclasses.fields(Settings)}


def label(how: OneScore) -> str:
    """A figure's name: the mode, its stride, and what differs from the defaults of its settings."""
    plain = OneScore()
    words = [
        f"{key}={getattr(how, key):g}"
        for key in LOOKS_AT[how.mode]
        if key == "stride" or getattr(how, key) != getattr(plain, key)
    ]
    return " ".join([how.mode, *words])


def one_score(subject: Subject, how: OneScore) -> tuple[dict, dict]:
    """Score the validation text; graphs are compiled before the clock, on random tokens."""
    scorer = make_scorer(subject.model, how, subject.shape, subject.run)
    if subject.cfg.compile:
        scorer.warm_up()
    found = score_all(scorer, subject.val)
    if how.mode == "ttt" and not scorer.trained:
        subject.run.log(
            f"notice: ttt trained on nothing: the windows of these {len(subject.val.tokens) - 1} "
            f"tokens begin within the first ttt_chunk = {how.ttt_chunk}; lower --ttt_chunk"
        )
    ms, rate = found["eval_time_s"] * 1000, found["tok_s"]
    subject.run.log(
        f"final_{how.mode} val_loss:{found['val_loss']:.8f} val_bpb:{found['val_bpb']:.8f} "
        f"window:{subject.shape.seq_len} stride:{scorer.stride} eval_time:{ms:.0f}ms "
        f"tok_s:{rate:.0f}"
    )
    bpb = None if math.isnan(found["val_bpb"]) else found["val_bpb"]
    key = RESULT[how.mode]
    top = {key.replace("bpb", "loss"): found["val_loss"]} | ({key: bpb} if bpb else {})
    return {"world_size": subject.run.world, "eval_time_s": found["eval_time_s"]}, top


def one_proof(subject: Subject, how: OneScore, flags: Phase) -> tuple[dict, dict]:
    """Have a process of its own encode and decode a stretch of text from the weights alone."""
    words = {
        "bytes": flags.prove_bytes,
        "device": subject.run.device.type,
        "data": subject.cfg.data,
    }
    words |= dataclasses.asdict(how)
    argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]

    def is_asked() -> bool:
        return bool(subject.run.signal)

    def work() -> str:
        return fresh_process("prove", str(subject.path), *argv, asked_to_stop=is_asked)

    lines = subject.run.on_main(work)
    subject.run.poll()  # a signal that came meanwhile
    subject.run.log(lines.rstrip())
    found = dict(re.findall(r"(\w+_bpb|code_bytes):([\d.]+)", lines))
    decoded = float(found["decoded_bpb"])
    figure = {key: float(value) for key, value in found.items()}
    return figure, {"proven_bytes": flags.prove_bytes, "decoded_bpb": decoded}


@contextlib.contextmanager
def own_weights(subject: Subject):
    """Behind it the model has the weights of the subject again."""
    own = {name: w.detach().clone() for name, w in subject.model.named_parameters()}
    try:
        yield
    finally:
        tg.load_weights(subject.model, own, str(subject.path))


def take_ensemble(
    subject: Subject, figures: Figures, sizes: list[int], others: tuple[str, ...]
) -> None:
    """
    Mixtures of the snapshots of a run and of others; at the top of result.json stands that of the
    most. Collective.
    """
    run, folders, kept = subject.run, [subject.folder, *map(Path, others)], []

    def read() -> tuple[list[Snapshot], str]:
        kept.extend(read_snapshots(subject, folders))
        digest = hashlib.sha256(b"".join(s.p.numpy().tobytes() for s in kept)).hexdigest()
        return [s._replace(p=None) for s in kept], digest

    listed, digest = run.on_main(read)
    snapshots = kept or listed  # the probabilities are rank 0's
    sizes = sorted({min(size, len(snapshots)) for size in sizes})

    def work() -> tuple[dict, dict]:
        with own_weights(subject):
            found = score_ensemble(subject, snapshots, sizes)
        found = run.on_main(lambda: found)
        run.log(ensemble_table(found))
        most = found["table"][-1]
        top = {"val_loss_ensemble": most["val_loss"], "ensemble_size": most["size"]}
        top["val_loss_ensemble_uniform"] = most["val_loss_uniform"]
        return found, top

    runs = "".join(f" {folder.name}" for folder in folders[1:])
    name = f"ensemble {' '.join(map(str, sizes))} of {len(snapshots)} snapshots"
    figures.take(name + (f" with{runs}" if runs else ""), work, of=digest)


def averaged(subject: Subject, figures: Figures, last: int, official: bool) -> tuple[dict, dict]:
    """
    Averages over the last epochs. At the top of result.json stand those over as many as the run
    says; `val_loss` there stays the loss of the last step.
    """
    with own_weights(subject):
        found = score_epochs(subject, last)
    if not official:
        subject.run.log(
            f"the top of result.json keeps averages over {subject.cfg.average_epochs} epochs"
        )
        return found, {}
    chosen = subject.run.on_main(lambda: selected(subject, figures.result, found))
    return {}, found | chosen


def compressors_bpb(subject: Subject) -> tuple[dict, dict]:
    """xz -9e and zstd -19 on the scored text itself, to compare with: they need no training."""

    def work() -> dict[str, float]:
        text = subject.tokenizer.decode(subject.val.tokens[1:]).encode()
        xz = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        zstd = len(zstandard.ZstdCompressor(level=19).compress(text))
        return {"xz_bpb": xz * 8 / len(text), "zstd_bpb": zstd * 8 / len(text)}

    found = subject.run.on_main(work)
    xz, zstd = found["xz_bpb"], found["zstd_bpb"]
    subject.run.log(f"same text: xz -9e {xz:.4f} bpb, zstd -19 {zstd:.4f} bpb")
    return {}, found


@dataclass
class Sample(Source):
    """Continue a text with the weights of a run, a checkpoint or an artifact."""

    prompt: str = ""  # text to continue; empty: the start of a document
    tokens: int = 200  # length of the sample at most; a document's end ends it
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50  # among so many likeliest tokens; 0: all
    seed: int = 1


def prompt_tokens(subject: Subject, prompt: str) -> list[int]:
    """A document's start and the prompt, all of them tokens that the model knows."""
    if re.search("[\ud800-\udfff]", prompt):
        raise UserError(f"prompt = {ascii(prompt)} is no UTF-8 text")
    if not subject.tokenizer:
        raise UserError(
            f"{subject.path} was trained without a tokenizer: there is no text to sample"
        )
    tokens = [subject.cfg.doc_token, *subject.tokenizer.encode(prompt)]
    if bad := [t for t in tokens if t >= subject.cfg.vocab]:
        raise UserError(
            f"the tokenizer gives token {bad[0]}, which is not below the model's vocab = "
            f"{subject.cfg.vocab}"
        )
    return tokens


def generate(subject: Subject, how: Sample) -> str:
    """The prompt and what the model goes on with; it stops where a document ends."""
    if not subject.cfg.compile:  # the compiler takes a second to load
        return continued(subject, how)
    with torch.compiler.set_stance("force_eager"):  # every length would be a graph of its own
        return continued(subject, how)


@torch.no_grad()
def continued(subject: Subject, how: Sample) -> str:
    """generate(), one token behind the other."""
    model, device, vocab = subject.model, subject.run.device, subject.cfg.vocab
    rng = torch.Generator(device).manual_seed(how.seed)
    tokens = prompt_tokens(subject, how.prompt)
    for _ in range(how.tokens):
        context = torch.tensor([tokens[-subject.plan.max_seq_len :]], device=device)
        shape = subject.shape
        applied = shape.repeats, shape.window, shape.passes, shape.window_long
        hidden = model.hidden(context, *applied)
        logits = model.logits(hidden[0, -1])[:vocab]
        if how.top_k:
            least = logits.topk(min(how.top_k, vocab)).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if how.temperature > 0:
            p = (logits / how.temperature).softmax(-1)
            tokens.append(int(torch.multinomial(p, 1, generator=rng)))
        else:
            tokens.append(int(logits.argmax()))
        if tokens[-1] == subject.cfg.doc_token:
            break
    return subject.tokenizer.decode(tokens)


def log_sample(subject: Subject, flags: Phase) -> None:
    how = Sample(
        source=flags.source,
        prompt=flags.prompt,
        tokens=flags.sample_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        seed=subject.cfg.seed,
    )
    what = "artifact" if subject.path.is_file() else "weights"
    subject.run.log(f"sample from the {what}:\n{generate(subject, how)}")


def check_sampling(tokens: int, temperature: float, top_k: int) -> None:
    named = {"sample_tokens": tokens, "temperature": temperature, "top_k": top_k}
    for key, value in named.items():
        tg.check_table_number(key, value)
    if 0 < temperature < 1e-3:
        raise UserError(
            f"temperature = {temperature}: 0, or from 0.001 on, as logits are divided by it"
        )


def sample_command(flags: Sample) -> None:
    check_sampling(flags.tokens, flags.temperature, flags.top_k)
    tg.require(0 <= flags.seed < 2**32, f"seed = {flags.seed}: must lie between 0 and {2**32 - 1}")
    print(generate(opened(flags), flags))


def fresh_process(*arguments: str, asked_to_stop: Callable[[], bool] = lambda: False) -> str:
    """
    What `score.py ARGUMENTS` prints, in a process that shares nothing with this one; UserError
    where it fails. Once asked_to_stop() it is ended as by Ctrl-C, with what it has started, and
    gives "".
    """
    packed = [] if Path(__file__).name == "score.py" else ["logs.score"]  # within one file
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    env = {key: value for key, value in os.environ.items() if key not in ranks}
    command = [sys.executable, __file__, *packed, *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
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
        raise UserError(f"score.py {arguments[0]} left with {process.returncode}: {err[-2000:]}")
    return out


def score_all(scorer: Sliding, val: tg.Validation) -> dict[str, float]:
    """Loss in nats per token, bits per byte (nan: unknown), seconds, tokens/s."""
    began = time.perf_counter()
    scores = scorer.score(val.tokens)
    assert bool((scores.times == 1).all()), "a target was not scored exactly once"
    n = len(val.tokens) - 1
    loss, seconds = float(scores.nats.sum()) / n, time.perf_counter() - began
    bpb = tg.bits_per_byte(loss, n, val.bytes)
    bpb = math.nan if bpb is None else bpb
    return {"val_loss": loss, "val_bpb": bpb, "eval_time_s": seconds, "tok_s": n / seconds}


@dataclass
class Prove(OneScore, Source):
    """Encode validation text, decode it in a fresh process, check the claimed length."""

    bytes: int = 16384  # text at least


def prove_command(flags: Prove) -> None:
    if flags.bytes < 1:
        raise UserError(f"bytes = {flags.bytes}: there is no text to prove; 1 at least")
    subject = opened(flags)
    if not subject.tokenizer:
        raise UserError(
            f"{flags.source} was trained without a tokenizer: there is no text to encode"
        )
    tokens, text = stretch(subject.val.tokens, subject.tokenizer, flags.bytes)
    note = ""
    if flags.mode == "ttt" and flags.ttt_chunk > len(tokens) // 4:  # else nothing is trained
        flags.ttt_chunk = len(tokens) // 4
        note = f", ttt_chunk:{flags.ttt_chunk}: this stretch in four chunks"
    with tempfile.TemporaryDirectory() as folder:
        code, out = Path(folder) / "code", Path(folder) / "tokens"
        words = {f.name: getattr(flags, f.name) for f in dataclasses.fields(OneScore)}
        words |= {"device": flags.device, "code": code, "out": out}
        argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]

        def decode_afresh(data: bytes) -> np.ndarray:
            """Decode in a new process, which is given the weights and the code."""
            code.write_bytes(data)
            fresh_process("decode", flags.source, *argv)
            return np.fromfile(out, "<u2")

        found = prove(make_scorer(subject.model, flags, subject.shape), tokens, decode_afresh)
        same = text_of(subject.tokenizer, np.fromfile(out, "<u2")) == text
    if not same:
        raise UserError("the tokens came back, but not the text")
    bpb = {
        "decoded_bpb": 8 * found["code_bytes"] / len(text),
        "claimed_bpb": found["claimed_bits"] / len(text),
        "stepwise_bpb": found["stepwise_bits"] / len(text),
    }
    bits = " ".join(f"{key}:{value:.6f}" for key, value in bpb.items())
    print(f"prove:{flags.mode} text_bytes:{len(text)} code_bytes:{found['code_bytes']} {bits}")
    print(
        f"  tokens:{found['tokens']} each scored once, {found['flips']} flips, sums within "
        f"{found['worst_sum']:.1e} of 1, encode:{found['encode_s']:.1f}s "
        f"decode:{found['decode_s']:.1f}s{note}, the text came back: proven"
    )


@dataclass
class Decode(OneScore, Source):
    """Decode a code that prove wrote, from the weights alone."""

    code: str = ""  # file with the code
    out: str = ""  # file for the tokens, uint16 little endian


def decode_command(flags: Decode) -> None:
    if not flags.code or not flags.out:
        raise UserError(
            "say which file holds the code and where the tokens go: --code FILE --out FILE"
        )
    subject = opened(flags)
    code = Path(flags.code).read_bytes()
    decode(make_scorer(subject.model, flags, subject.shape), code).astype("<u2").tofile(flags.out)


@dataclass
class Table(OneScore, Source):
    """The same weights stored in different ways: bytes, and bits per byte lost."""

    mode: str = "chunked"  # how to score: chunked, sliding, mixture, ttt or lora
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


def require_rows(count: int, least: int) -> None:
    tg.require(count >= least, f"calibration_rows = {count}: must be at least {least}")


def table_command(flags: Table) -> None:
    require_rows(flags.calibration_rows, 1)
    s = opened(flags, exact=True)
    named = {name: w.detach().clone() for name, w in s.model.named_parameters()}
    matrices = {name: named[name] for name in tg.quantised_names(s.model)}
    for choice in flags.choices:
        tg.check_bits(choice.removesuffix(" gptq"), list(matrices))
    rows = tg.calibration(s.cfg, flags.calibration_rows)
    hessians, _ = tg.record_hessians(s.model, rows, s.shape, s.run)
    scorer = make_scorer(s.model, flags, s.shape)
    exact, base, codecs = score_all(scorer, s.val), 0, (*tg.CODECS, tg.ENTROPY)
    print(
        f"exact weights: {exact['val_loss']:.5f} nats, {exact['val_bpb']:.5f} bpb; "
        f"{sum(w.numel() for w in named.values())} parameters; {flags.mode}, "
        f"{len(s.val.tokens) - 1} tokens; GPTQ on {rows.size} training tokens"
    )
    print(f"| weights | {' | '.join(codecs)} | smallest / (int8 + zstd) | bpb lost |")
    print("|-|" + "-:|" * (len(codecs) + 2))
    for choice in flags.choices:
        bits = choice.removesuffix(" gptq")
        found = tg.quantise(matrices, tg.parse_bits(bits), hessians if bits != choice else None)
        packed = {codec: tg.pack_artifact(named, found, s.cfg, codec) for codec in codecs}
        base = base or len(packed["zstd"])
        tg.load_weights(s.model, tg.unpack_artifact(packed[tg.ENTROPY], choice)[1], choice)
        lost = score_all(scorer, s.val)["val_bpb"] - exact["val_bpb"]
        sizes = [len(p) for p in packed.values()]
        columns = " | ".join(map(str, sizes))
        print(f"| {choice} | {columns} | {min(sizes) / base:.3f} | {lost:+.5f} |", flush=True)


@dataclass
class Export(Source):
    """Write an artifact from the newest checkpoint of a run."""

    out: str = "model.nrx"  # the file to write; it must not exist
    # int4 to int8, with exceptions such as "int6 mlp:5 head:8"; fit: the most that --limit allows
    bits: str = "int6"
    codec: str = "best"  # zstd, brotli, xz, entropy, or best: the smallest of them
    calibration_rows: int = 32  # rows of training tokens for GPTQ; 0: nearest integers instead
    limit: int = 0  # bytes of the file at most; 0: any


def export_command(flags: Export) -> None:
    codecs = (*tg.CODECS, tg.ENTROPY, "best")
    if Path(flags.out).exists():
        raise UserError(f"out = {flags.out!r} exists: choose another name, or delete it")
    if not Path(flags.out).parent.is_dir():
        raise UserError(f"out = {flags.out!r}: there is no folder {Path(flags.out).parent}")
    if flags.bits == "fit" and not flags.limit:
        raise UserError("bits = 'fit' chooses by limit, which is not set: --limit 16000000")
    if flags.codec not in codecs:
        raise UserError(f"codec = {flags.codec!r}: must be one of {', '.join(codecs)}")
    require_rows(flags.calibration_rows, 0)
    s = opened(flags, exact=True)
    hessians = None
    if flags.calibration_rows:
        rows = tg.calibration(s.cfg, flags.calibration_rows)
        hessians, _ = tg.record_hessians(s.model, rows, s.shape, s.run)
    how = flags.bits, flags.codec, hessians, flags.limit
    data, _ = tg.smallest_artifact(s.model, *how, log=print)
    if flags.limit and len(data) > flags.limit:
        more = "" if flags.bits == "fit" else ", or --bits fit"
        raise UserError(
            f"the artifact has {len(data)} bytes, but limit = {flags.limit}: choose a smaller "
            f"model{more}"
        )
    tg.write_whole(Path(flags.out), data)
    print(f"artifact: {flags.out} {len(data)} bytes; score it: python logs/score.py {flags.out}")


VERBS = {
    "sample": (Sample, sample_command),
    "prove": (Prove, prove_command),
    "decode": (Decode, decode_command),
    "table": (Table, table_command),
    "export": (Export, export_command),
}


def program(argv: list[str]) -> int:
    if argv[0] not in VERBS:
        return phase(argv)
    kind, work = VERBS[argv[0]]
    work(tyro.cli(kind, args=argv[1:], prog=f"score.py {argv[0]}", use_underscores=True))
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        print(__doc__)
        tyro.cli(Phase, args=["--help"], prog="score.py", use_underscores=True)
    return tg.exit_code(lambda: program(argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
