"""
nanoremix: one GPT trainer for three leaderboards (speedrun, slowrun, golf), in plain PyTorch.

    python train_gpt.py --config tiny_cpu                                     # a laptop, minutes
    torchrun --standalone --nproc_per_node=8 -- train_gpt.py --config remix_m # one node
    python train_gpt.py --config remix_m --resume  # continue a broken run
    python logs/dry_run.py --config remix_m  # costs, without GPU or data

Read it from top to bottom. A section begins with its flags; the comment of a field is its help:
    Schedules    one grammar for all that varies in time: "0:1 0.5:2 1>0"
    Run          ranks, folder, log, clocks, signals
    Model        GPT: attention under one mask rule, blocks, order of layers, loss
    Optimizer    Muon for matrices and AdamW for the rest, sharded over 1..N ranks
    Data         shards, the loader, bytes per token
    Averaging    EMA and SWA of the weights
    Cycles       snapshots for ensembles, noise between them, teachers
    Evaluation   nats per token and bits per byte of the validation prefix
    Export       rounding, GPTQ, coders, the artifact: one file, read strictly
    Checkpoint   written whole or not at all; transfer between runs
    Config       all sections' flags; presets, their tables, what older files said otherwise
    Train        warm-up, the loop, the end of a run, main

Letters: B batch, T time, D width, H heads, K head_dim, V vocabulary, N = B*T tokens. A tensor whose
layout is not obvious carries it as a suffix (q_BTHK). `steps` are optimizer steps; `repeats` are
passes through looped blocks; a `block` owns matrices; a `place` is one application of a block.
Losses are nats per token, sizes decimal bytes. Nothing happens at import.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tokenize
import tomllib
import typing
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import brotli
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
import zstandard
from constriction import stream as coder
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as tensors_as_bytes
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

########################################
#            Configuration             #
########################################


class UserError(Exception):
    """What the user can mend: what was given, why it cannot work, what to do. Exit code 2."""


class Diverged(UserError):
    """A loss or a gradient is not finite, on every rank alike."""


class Section:
    """
    A part of the configuration, at the head of the code that it is about: fields, whose comments
    are their help, and what must hold of them whether they were given or read from a file.
    """

    # least and most of each number, or of the values of a schedule: what lies beyond would
    # overflow, divide by zero, or need a machine that nobody has
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}

    def check(self) -> None:
        """UserError that names the key, the value and the fix."""

    def needs(self) -> list[Need]:
        """
        What switches need in order to do anything. What only tunes a switch (a rate, a size, a
        choice) may stand there while that is off: a study turns off the switch alone.
        """
        return []


Need = tuple[str, str, bool]  # a field, what it needs, whether that is there


def limits(*rows: tuple[float, float, str]) -> dict[str, tuple[float, float]]:
    return {name: (least, most) for least, most, names in rows for name in names.split()}


BELOW_ONE = 1 - 2**-24  # the next number below 1 in fp32


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def compiled_pattern(text: str) -> re.Pattern:
    """Of the configuration; re.error for all that Python's re cannot take."""
    try:
        return re.compile(text)
    except (OverflowError, RecursionError) as e:  # a{99999999999999}, and 3,000 brackets
        raise re.error(str(e)) from e


def require_regex(key: str, text: str) -> None:
    try:
        compiled_pattern(text)
    except re.error as e:
        raise UserError(f"{key} = {text[:200]!r} is no regular expression: {e}") from e


########################################
#              Schedules               #
########################################


@dataclass
class LengthConfig(Section):
    """How long training is, and how its tokens are cut."""

    steps: int = 2500  # optimizer steps at most
    max_seconds: float = 0.0  # cap of the training clock; schedules then run on time; 0: none
    batch_tokens: str = "524288"  # [sched] tokens per step over all ranks
    seq_len: str = "65536"  # [sched] tokens per row
    eval_seq_len: int = 0  # tokens per row in evaluation; 0: the largest seq_len

    LIMITS = limits(
        (0, 10**9, "max_seconds"),
        (0, 2**22, "eval_seq_len"),
        (1, 10**9, "steps batch_tokens"),
        (1, 2**22, "seq_len"),
    )


# schedules that make another graph
GRAPHS = ("repeats", "passes", "seq_len", "window", "window_long", "batch_tokens")
GRAPHS += ("sampled_classes",)
RATES = ("lr", "momentum", "weight_decay", "qat", "slow_lr", "meta_step", "mtp_next", "mtp_third")
# Those that only tricks read; lr_matrices may be empty.
OF_TRICKS = "lr_matrices maxwell_age soft_muon soap_floor soap_cap ema_nesterov tail_ema".split()
OF_TRICKS += ["prefix_loss", "doc_cap"]
BY_CYCLE = ("cycle_lr", "cycle_decay", "perturb")  # run over a cycle, or over the cycles
SCHEDULES = (*RATES, *OF_TRICKS, *BY_CYCLE, *GRAPHS)
# how the net is applied, whatever the rows
APPLIED = ("repeats", "passes", "window", "window_long")
CYCLE_FLOOR = 0.05  # the least multiplier of lr_cycles


class Point(NamedTuple):
    at: float  # where the value holds: a fraction of training, or a step
    in_steps: bool
    ramp: bool  # reached from the point before, linearly
    value: float
    cosine: bool = False  # or along half a cosine
    power: float = 1.0  # or as this power of what is left of the way


class Schedule:
    """
    A value over training. "3" is constant; "0:1 0.5:2" sets 2 from the middle on; "0.6:1 1>0.1"
    falls linearly from 60 % to the end, "0.6:1 1~0.1" along half a cosine, "0.6:1 1>0.1^0.5" as the
    root of what is left of the way; "300s>0.95" counts steps; a value set where a ramp ends is a
    jump ("0.5>2 0.5:1"); a ramp may end behind training ("1.1>0"), which then sees a part of it.
    Positions may be fractions such as 1/3. A fraction is step/steps, or elapsed/max_seconds where
    the clock is capped, whichever is further.
    """

    def __init__(self, name: str, text: str):
        self.name, self.text, self.points = name, text, []
        words = text.split()
        if len(words) > 1000:
            raise UserError(f"{name} has {len(words)} points: 1000 at most")
        for word in words:
            match = re.fullmatch(r"(?:([\d./e+-]+)(s?)([:>~]))?([\d./e+-]+)(?:\^([\d.]+))?", word)
            try:
                at = number(match[1]) if match[1] else 0.0
                power = number(match[5] or "1")
                if match[5] and match[3] not in (">", "~"):
                    raise ValueError(word)
                point = Point(
                    at,
                    match[2] == "s",
                    match[3] in (">", "~"),
                    number(match[4]),
                    match[3] == "~",
                    power,
                )
            except (TypeError, ValueError, ZeroDivisionError):
                raise self.error(
                    f"{word!r} is neither value, at:value, at>value nor at~value"
                ) from None
            self.points.append(point)
        if not self.points or self.points[0].at != 0 or self.points[0].ramp:
            raise self.error("must start with a value, or with 0:value")
        reached = {True: 0.0, False: 0.0}  # the last position in steps, and as a fraction
        for a, b in zip(self.points, self.points[1:]):
            jump = a.ramp and not b.ramp and (a.at, a.in_steps) == (b.at, b.in_steps)
            if b.at <= reached[b.in_steps] and not jump:
                raise self.error(
                    f"its points must stand in order, but {b.at:g} follows {reached[b.in_steps]:g}"
                )
            reached[b.in_steps] = b.at
            if b.ramp and a.at != 0 and a.in_steps != b.in_steps:
                raise self.error("a ramp must begin and end in the same unit, steps or fractions")
            # a ramp may head for what would come behind the end
            if not b.in_steps and b.at > (2 if b.ramp else 1):
                raise self.error(
                    f"{b.at:g} is no fraction of training; write {b.at:g}s to count steps"
                )

    def error(self, why: str) -> UserError:
        return UserError(f'{self.name} = {self.text!r}: {why} (example: "0:1 0.5:2 1>0")')

    def at(self, step: int, fraction: float) -> float:
        value, last = self.points[0].value, self.points[0]
        for point in self.points[1:]:
            x = step if point.in_steps else fraction
            if x >= point.at:
                value, last = point.value, point
                continue
            start = last.at if last.in_steps == point.in_steps else 0.0
            if point.ramp and x > start:
                share = (x - start) / (point.at - start)
                if point.power != 1:
                    share = 1 - (1 - share) ** point.power
                value += (point.value - value) * (
                    (1 - math.cos(math.pi * share)) / 2 if point.cosine else share
                )
            break
        return value

    def values(self) -> list[float]:
        return sorted({p.value for p in self.points})

    def require_plateaus(self) -> None:
        """For what shapes a graph, and for what is on or off: whole numbers, no ramps."""
        for p in self.points:
            if p.ramp or p.value != int(p.value):
                raise self.error(
                    "needs whole numbers, set with ':' (there is nothing between them)"
                )


def number(text: str) -> float:
    top, _, bottom = text.partition("/")
    value = float(top) / float(bottom) if bottom else float(top)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def is_constant(schedule: str) -> bool:
    return len(schedule.split()) == 1


def largest(schedule: str) -> int:
    return int(max(Schedule("", schedule).values()))


class Now(NamedTuple):
    """The values of all schedules at one step."""

    lr: float
    momentum: float
    weight_decay: float
    qat: float
    repeats: int
    seq_len: int
    window: int
    batch_tokens: int
    slow_lr: float = 1.0
    lr_matrices: float | None = None  # None: as lr
    maxwell_age: float = 0.0
    soft_muon: float = 0.0
    soap_floor: float = 0.0
    soap_cap: float = 1.0
    ema_nesterov: float = 0.0
    meta_step: float = 0.0
    mtp_next: float = 0.0
    mtp_third: float = 0.0
    prefix_loss: float = 0.0
    doc_cap: int = 0
    passes: int = 1
    window_long: int = 0
    distill: float = 0.0  # the teacher's share of the loss
    sampled_classes: int = 0
    tied: int = 0  # 1: before untie_at


class Shape(NamedTuple):
    """What makes a graph: how many rows it takes, and how the net is applied to them."""

    rows: int  # of a micro-batch
    seq_len: int
    repeats: int
    window: int
    passes: int = 1
    window_long: int = 0
    distill: bool = False  # with a teacher
    sampled_classes: int = 0  # 0: all
    as_trained: bool = False  # of an evaluation: in a graph of training, which keeps activations


class Plan:
    """All schedules of a run, and the graphs that they will need."""

    def __init__(self, cfg: Config, world: int = 1):
        self.cfg, self.world = cfg, world
        texts = {name: getattr(cfg, name) for name in SCHEDULES}
        self.sched = {name: Schedule(name, text) for name, text in texts.items() if text}
        self.cycle_ends = self.ends_of_cycles() if cfg.cycles else []  # in steps
        self.max_seq_len = largest(cfg.seq_len)
        self.eval_seq_len = cfg.eval_seq_len or largest(cfg.seq_len)
        # for steps; the warm-up subtracts what GPTQ will take behind them
        self.seconds = cfg.max_seconds

    def fraction(self, step: int, seconds: float) -> float:
        share = step / self.cfg.steps
        return min(1.0, max(share, seconds / self.seconds)) if self.seconds else share

    def at(self, step: int, fraction: float) -> Now:
        v = {name: s.at(step, fraction) for name, s in self.sched.items()}
        if self.cfg.cycles:
            share = self.cycle_at(step)[1]
            v["lr"] *= self.sched["cycle_lr"].at(0, share)
            v["weight_decay"] *= self.sched["cycle_decay"].at(0, share)
        return Now(
            lr=self.in_cycles(v["lr"], fraction) if self.cfg.lr_cycles else v["lr"],
            momentum=v["momentum"],
            weight_decay=v["weight_decay"],
            qat=v["qat"],
            repeats=int(v["repeats"]),
            seq_len=int(v["seq_len"]),
            window=int(v["window"]),
            batch_tokens=int(v["batch_tokens"]),
            slow_lr=v["slow_lr"],
            lr_matrices=v.get("lr_matrices"),
            maxwell_age=v["maxwell_age"],
            soft_muon=v["soft_muon"],
            soap_floor=v["soap_floor"],
            soap_cap=v["soap_cap"],
            ema_nesterov=v["ema_nesterov"],
            meta_step=v["meta_step"],
            mtp_next=v["mtp_next"],
            mtp_third=v["mtp_third"],
            prefix_loss=v["prefix_loss"],
            doc_cap=int(v["doc_cap"]),
            passes=int(v["passes"]),
            window_long=int(v["window_long"]),
            distill=self.cfg.distill * (step >= self.taught_from()) if self.cfg.distill else 0.0,
            sampled_classes=int(v["sampled_classes"]),
            tied=int(step <= last_tied(self.cfg)) if self.cfg.untie_at else 0,
        )

    def ends_of_cycles(self) -> list[int]:
        """The step behind each cycle; they have equal shares of the tokens, as far as steps can."""
        cycles, total, ends, done, step = self.cfg.cycles, self.tokens(), [], 0, 0
        for steps, size in self.batches():
            while len(ends) < cycles:
                # steps of this size to the end of the next cycle
                more = -(-((len(ends) + 1) * total - cycles * done) // (cycles * size))
                if more > steps:
                    break
                ends.append(step + more)
            step, done = step + steps, done + steps * size
        return ends

    def cycle_at(self, step: int) -> tuple[int, float]:
        """The cycle, from 0, that a step is in, and which share of its steps lies before it."""
        cycle = min(bisect.bisect_right(self.cycle_ends, step), len(self.cycle_ends) - 1)
        begin = self.cycle_ends[cycle - 1] if cycle else 0
        return cycle, (step - begin) / (self.cycle_ends[cycle] - begin)

    def ends_cycle(self, step: int) -> bool:
        """Whether step `step` (from 1) is the last of a cycle."""
        return step > 0 and step in self.cycle_ends

    def perturbation(self, cycle: int) -> float:
        """The noise before cycle 1, 2, ... (from 0), as a share of each tensor's deviation."""
        return self.sched["perturb"].at(0, (cycle - 1) / max(1, self.cfg.cycles - 2))

    def taught_from(self) -> float:
        """The first step that has a teacher; infinity: none has."""
        if self.cfg.teacher:
            return 0
        if self.cfg.distill and 1 < self.cfg.distill_from <= self.cfg.cycles:
            return self.cycle_ends[self.cfg.distill_from - 2]
        return math.inf

    def in_cycles(self, lr: float, fraction: float) -> float:
        """The multiplier `lr` in one of the cycles at the end (lr_cycles)."""
        # epochs since the cycles began
        cycle = fraction * self.cfg.epochs - (self.cfg.epochs - self.cfg.lr_cycles)
        if cycle < 0:
            return lr
        above = max(lr, CYCLE_FLOOR) - CYCLE_FLOOR
        return CYCLE_FLOOR + above * (1 + math.cos(math.pi * (cycle % 1.0))) / 2

    def ends_epoch(self, step: int) -> bool:
        """Whether step `step` (from 1) is the last of an epoch, by the count of steps."""
        epochs, steps = self.cfg.epochs, self.cfg.steps
        return step > 0 and step * epochs // steps > (step - 1) * epochs // steps

    def moments(self) -> list[Now]:
        """The schedules at every point where one that shapes a graph changes, in order of time."""
        taught = {self.taught_from()} - {0, math.inf} if self.cfg.distill else set()
        if all(is_constant(getattr(self.cfg, name)) for name in GRAPHS) and not taught:
            return [self.at(0, 0.0)]
        points = [p for name in GRAPHS for p in self.sched[name].points]
        steps = self.cfg.steps
        if not self.cfg.max_seconds:
            reached = {math.ceil(p.at if p.in_steps else p.at * steps - 1e-9) for p in points}
            starts = sorted({0} | reached | taught)
            return [self.at(s, s / steps) for s in starts if s < steps or s == 0]
        # on the clock they have no marks in steps
        return [self.at(0, f) for f in sorted({p.at for p in points} | {0.0})]

    def micro_rows(self, now: Now, world: int) -> int:
        """
        Rows of one forward pass. The batch must divide evenly, or ranks would weigh differently.
        """
        parts, of = world, f"on {world} ranks"
        if has_meta_step(self.cfg):  # halves of groups, of which each rank has some
            parts, of = (
                2 * self.cfg.meta_groups,
                f"in meta_step's halves of meta_groups = {self.cfg.meta_groups}",
            )
            require(
                self.cfg.meta_groups % world == 0,
                f"meta_groups = {self.cfg.meta_groups} cannot be shared by {world} ranks: choose a "
                "multiple of their number",
            )
        share = now.batch_tokens // parts
        micro = min(self.cfg.micro_tokens, share)
        if self.cfg.auto_micro:
            rows, most = share // now.seq_len, micro // now.seq_len
            micro = now.seq_len * next((m for m in range(most, 0, -1) if rows % m == 0), 0)
        if not micro or now.batch_tokens % (parts * micro) or micro % now.seq_len:
            by = "2 * meta_groups" if has_meta_step(self.cfg) else "ranks"
            raise UserError(
                f"batch_tokens = {now.batch_tokens} {of} does not divide into micro-batches of "
                f"micro_tokens = {self.cfg.micro_tokens} made of rows of seq_len = {now.seq_len}: "
                f"choose batch_tokens = {by} * micro_tokens * a whole number, and micro_tokens = "
                "seq_len * a whole number"
            )
        return micro // now.seq_len

    def micro_batches(self, now: Now, world: int) -> int:
        """Forward passes of one rank in a step."""
        return now.batch_tokens // world // (self.micro_rows(now, world) * now.seq_len)

    def train_moments(self, world: int) -> dict[Shape, Now]:
        """The graphs of training, each with the schedules where it is first needed."""
        found: dict[Shape, Now] = {}
        for n in self.moments():
            rows = self.micro_rows(n, world)
            applied = n.passes, n.window_long, n.distill > 0, n.sampled_classes
            shape = Shape(rows, n.seq_len, n.repeats, n.window, *applied)
            found.setdefault(shape, n)
        return found

    def train_shapes(self, world: int) -> list[Shape]:
        return list(self.train_moments(world))

    def eval_shape(self, now: Now) -> Shape:
        rows = max(1, self.cfg.micro_tokens // self.eval_seq_len)
        length, far = self.eval_seq_len, now.window_long
        if self.cfg.eval_window_long and far == long_windows(self.cfg)[-1]:
            far = self.cfg.eval_window_long
        as_trained = self.has_trained(rows, length, now.window, far)
        applied = now.repeats, now.window, now.passes, far
        return Shape(rows, length, *applied, as_trained=as_trained)

    def has_trained(self, rows: int, seq_len: int, window: int, window_long: int) -> bool:
        """
        Whether blocks have graphs of training for an evaluation's rows, which do the same there, so
        that no others are compiled.
        """
        cfg = self.cfg
        if cfg.compile != 1 or cfg.attn_dropout or cfg.mlp_dropout or cfg.stoch_depth or cfg.fp8:
            return False
        of_rows = (seq_len, window, window_long)
        alike = [n for n in self.moments() if (n.seq_len, n.window, n.window_long) == of_rows]
        with contextlib.suppress(UserError):  # a score may have ranks that divide no batch
            return any(self.micro_rows(n, self.world) == rows for n in alike)
        return False

    def eval_shapes(self) -> list[Shape]:
        # the last evaluation is behind the last step
        moments = [*self.moments(), self.at(self.cfg.steps, 1.0)]
        return list(dict.fromkeys(self.eval_shape(n) for n in moments))

    def batches(self) -> list[tuple[int, int]]:
        """The batches of all steps by count: (how many, of how many tokens), in order of time."""
        steps = self.cfg.steps
        if is_constant(self.cfg.batch_tokens):
            return [(steps, largest(self.cfg.batch_tokens))]
        points = self.sched["batch_tokens"].points
        starts = [math.ceil(p.at if p.in_steps else p.at * steps - 1e-9) for p in points]
        found = []
        # a point waits for all before it, in whichever unit they stand
        for i, p in enumerate(points):
            begin = min(max(starts[: i + 1]), steps)
            end = min(max(starts[: i + 2]), steps) if i + 1 < len(points) else steps
            found.append((end - begin, int(p.value)))
        return [(count, size) for count, size in found if count]

    def tokens(self) -> int:
        """Training tokens of all steps."""
        return sum(steps * batch_tokens for steps, batch_tokens in self.batches())


########################################
#                 Run                  #
########################################


@dataclass
class RunConfig(Section):
    """Which run this is, what it writes and on which machine."""

    config: tuple[str, ...] = ()  # presets (paths, or names in configs/), left to right; flags win
    run: str = ""  # name of the run and of its folder under log_dir; empty: preset and seed
    arm: str = ""  # which arm of an ablation this is; the report groups runs by it
    track: str = ""  # leaderboard: speedrun, slowrun or golf
    seed: int = 1  # seeds the initial weights and the order of shuffled data
    log_dir: str = "logs"  # where run folders live
    resume: bool = False  # continue the run of this name from its newest complete checkpoint
    wandb: str = ""  # Weights & Biases project to log to as well; empty: none

    # steps between evaluations; 0: at the end; -1: at each epoch's end, or each cycle's
    eval_every: int = 125
    log_every: int = 1  # steps between training lines in log.txt and metrics.jsonl
    embed_stats: int = 0  # validation tokens for statistics of logits and embeddings; 0: none
    save_every: int = 0  # steps between checkpoints; 0: only when interrupted
    save_last: int = 1  # 1: keep a checkpoint of the end of training
    keep: int = 2  # newest checkpoints kept; 0: none is written, also where a run is interrupted

    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # of compute: bfloat16, float32, or auto (bfloat16 where that is fast)
    param_dtype: str = "float32"  # type of weights, gradients, optimizer's state; remix: bfloat16
    # what is compiled, before the clock starts; 1: one block, for all, and the updates, on a CPU
    # those of AdamW alone; 2: the whole model and the updates; 0: nothing
    compile: int = 1
    micro_tokens: int = 65536  # tokens a rank takes at once; fewer save memory, same result
    auto_micro: int = 0  # 1: micro_tokens is a ceiling; the most rows that divide the batch
    loss_chunk: int = 16384  # tokens whose logits exist at once

    LIMITS = limits(
        (0, 1, "save_last auto_micro"),
        (0, 2, "compile"),
        (0, 2**32 - 1, "seed"),
        (0, 10**9, "save_every embed_stats keep"),
        (1, 10**9, "log_every micro_tokens loss_chunk"),
        (-1, 10**9, "eval_every"),
    )

    def needs(self) -> list[Need]:
        return [("save_every", "keep > 0, as no checkpoint is kept", self.keep > 0)]

    CHOICES = {
        "device": ("auto", "cpu", "cuda"),
        "dtype": ("auto", "float32", "bfloat16"),
        "param_dtype": ("float32", "bfloat16"),
    }

    def check(self) -> None:
        check_run_name(self.run)


def check_run_name(name: str) -> None:
    require(
        not re.search(r"[\s/\\]|^\.*$", name),
        f"run = {name!r}: a run's name is a folder's name, without / or blanks",
    )
    require(
        len(name.encode()) <= 255, f"run = {name[:40]!r}...: a folder's name has 255 bytes at most"
    )


SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that ask a run to leave


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C, raised where all ranks can leave; no Exception: nobody swallows it."""


class Clock:
    """The timed clock of training: it stands still in warm-up, evaluation and saving."""

    def __init__(self, on_gpu: bool):
        self.on_gpu, self.total, self.started = on_gpu, 0.0, None

    def start(self) -> None:
        self.sync()
        self.started = time.perf_counter()

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def stop(self) -> None:
        self.sync()
        if self.started is not None:
            self.total += time.perf_counter() - self.started
        self.started = None

    def seconds(self) -> float:
        return self.total + (
            time.perf_counter() - self.started if self.started is not None else 0.0
        )

    @contextlib.contextmanager
    def paused(self):
        self.stop()
        yield
        self.start()


class Ranks:
    """
    The processes that work together, and what they tell each other: beside the optimizer the only
    code that knows of ranks. By default one that is alone.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self.device, self.rank, self.world = device, rank, world
        self.dtype = dtype  # of compute
        self.is_main = rank == 0
        self.one_node = True
        self.signal = 0  # that asked this process to leave

    def poll(self, seconds: float = 0.0) -> float:
        """Once a step or batch: all ranks leave if one was asked to; the most of their seconds."""
        stop = self.signal
        if self.world > 1:
            both = torch.tensor([float(stop), seconds], dtype=torch.float64)
            dist.all_reduce(both, op=dist.ReduceOp.MAX)  # on the CPU: no wait for the device
            stop, seconds = int(both[0]), float(both[1])
        if stop:
            self.signal = stop
            raise Interrupted
        return seconds

    def sum_of(self, x: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(x)
        return x

    @property
    def sums_in_place(self) -> bool:
        """On a CPU: gloo's reduce_scatter and all_gather copy for longer than they send."""
        return self.device.type == "cpu"

    def start_sum(self, whole: Tensor, shard: Tensor) -> dist.Work:
        """Begin a sum over the ranks, of which this one needs its shard."""
        if self.sums_in_place:  # shard is a view into whole
            return dist.all_reduce(whole, async_op=True)
        return dist.reduce_scatter_single(shard, whole, async_op=True)

    def start_gather(self, whole: Tensor, shard: Tensor) -> list[dist.Work]:
        """Begin to bring all shards into whole, into which this rank's is a view."""
        if self.sums_in_place:
            parts = enumerate(whole.chunk(self.world))
            return [dist.broadcast(part, rank, async_op=True) for rank, part in parts]
        return [dist.all_gather_single(whole, shard, async_op=True)]

    def on_main(self, work):
        """
        Call work() on rank 0 alone, while the others wait for what it gives; whatever it raises
        is raised on all, for a rank that never heard of it would wait for the next sum.
        """
        if self.world == 1:
            return work()
        answer: list = [None, None]
        raised = None
        if self.is_main:
            try:
                answer[0] = work()
            except BaseException as e:
                raised, answer[1] = e, portable(e)
        dist.broadcast_object_list(answer, src=0)
        if raised or answer[1]:
            raise raised or answer[1]
        return answer[0]

    def read_on_main(self, read):
        """
        What read() gives on rank 0, on every rank: (tensors by name, anything else). For what
        rank 0 alone has written: another node may have another disk, or see late what is on a
        shared one. On one node each rank reads for itself.
        """
        if self.one_node:
            return read()
        named: dict[str, Tensor] = {}

        def heads() -> tuple:
            found, rest = read()
            named.update(found)
            return [(name, t.shape, t.dtype) for name, t in named.items()], rest

        listed, rest = self.on_main(heads)
        for name, shape, dtype in listed:  # one by one: no second copy of all in memory
            whole = named[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            if whole.numel():
                dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
            named[name] = whole
        return named, rest

    def require_the_same(self, facts) -> None:
        """Refuse nodes whose facts() are not rank 0's: each may have other flags and files."""
        if self.one_node:
            return
        found: list = [None] * self.world
        dist.all_gather_object(found, (socket.gethostname(), facts()))
        first, right = found[0]
        for rank, (host, theirs) in enumerate(found):
            other = [f"{k} = {v!r}" for k, v in theirs.items() if k not in right or right[k] != v]
            require(
                not other,
                f"rank {rank} on {host} has {', '.join(other)}, which is not what rank 0 on "
                f"{first} has: give every node the same flags, sources and data",
            )

    def most(self, n: int) -> int:
        """The largest of all ranks' n; on the CPU: no wait for the device."""
        if self.world > 1:
            both = torch.tensor([n])
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
            n = int(both)
        return n

    def together(self, work):
        """Call work() on every rank, for what may fail on one alone: it is then raised on all."""
        if self.world == 1:
            return work()
        answer, failure = None, None
        try:
            answer = work()
        except Exception as e:  # whatever it is, the others would wait for this rank
            failure = portable(e)
        failures = [None] * self.world
        dist.all_gather_object(failures, failure)
        failure = next((e for e in failures if e), None)
        if failure:
            raise failure
        return answer


ALONE = Ranks(torch.device("cpu"))


def keep_compiled() -> None:
    """
    Compiled graphs beside this file instead of in the system's temporary folder, which a reboot
    empties; one folder for each kind of CPU, as they are made for that alone.
    """
    # Also graphs with autograd functions of our own: a graph's key holds what torch made of those.
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
    # a second that what compiles nothing does not wait
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    home, cpu = Path(__file__).resolve().parent, platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next((x for x in lines if x.startswith(("flags", "Features"))), cpu)
    kind = hashlib.sha256(cpu.encode()).hexdigest()[:8]
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # by the user, or by torch's own import
    if named in (None, default_cache_dir()) and os.access(home, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home / ".compiled" / kind)


class Run(Ranks):
    """One run: the ranks and device of this process, the run's folder, log, clocks, signals."""

    def __init__(self, cfg: Config):
        env = {key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        device, rank, world = choose_device(cfg), int(env["RANK"] or 0), int(env["WORLD_SIZE"] or 1)
        super().__init__(device, rank, world, choose_dtype(cfg, device))
        # torchrun says how many ranks are here; where nobody says it, they may be anywhere
        self.one_node = int(env["LOCAL_WORLD_SIZE"] or 1) == self.world
        self.cfg = cfg
        self.folder = Path(cfg.log_dir) / cfg.run
        self.began = time.perf_counter()
        self.leave_at_once = False
        self.trained: Now | None = None  # the schedules of the last step that was trained
        self.owns_group = False
        self.log_file = self.metrics_file = self.lock_file = self.wandb = None
        self.tokens = 0  # trained on, where batches change
        self.calibration = 0.0  # seconds of the clock that GPTQ's took
        self.paces: list[tuple[list, float]] = []  # graph and seconds of the last steps, as agreed
        self.over = False  # the last step has been made
        self.complete = False  # result.json is written
        self.early: list[str] = []  # lines from before the log was there
        self.live_line, self.last_print = False, 0.0
        self.clock = Clock(self.device.type == "cuda")

    def prepare_machine(self) -> None:
        if self.cfg.compile:
            keep_compiled()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif sys.platform == "linux":
            # glibc hands large blocks back to the kernel at every free and faults them in anew,
            # which a CPU training step feels (tests/bench_textbook.py --against faulting). Keep
            # them (M_MMAP_THRESHOLD -3, M_TRIM_THRESHOLD -1 of malloc.h).
            with contextlib.suppress(OSError, AttributeError):
                libc = ctypes.CDLL(None)
                libc.mallopt(-3, 1 << 30)
                libc.mallopt(-1, (1 << 31) - 1)

    def __enter__(self) -> Run:
        self.prepare_machine()
        self.join_group()
        for number_ in SIGNALS:
            signal.signal(number_, self.on_signal)
        return self

    def join_group(self) -> None:
        """Join the process group, unless this process is in it: several runs may share one."""
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend)
            except (RuntimeError, ValueError) as e:
                raise UserError(
                    f"{self.world} ranks could not meet at "
                    f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
                    f"{str(e).splitlines()[0]}; is the port in use? set MASTER_PORT to a free one, "
                    "or use torchrun --standalone"
                ) from e
            self.owns_group = True

    def leave(self) -> None:
        if self.owns_group:
            dist.destroy_process_group()
        self.owns_group = False

    def __exit__(self, *exc) -> None:
        for number_ in SIGNALS:
            signal.signal(number_, signal.SIG_DFL)
        for f in (self.log_file, self.metrics_file, self.lock_file):
            if f:
                f.close()
        if self.wandb:
            self.wandb.finish(exit_code=0 if self.complete else 1)  # 0 is shown as "finished"
        if exc[0] is None:
            self.leave()

    def on_signal(self, number_: int, frame) -> None:
        if self.signal and number_ == signal.SIGINT:
            os._exit(128 + number_)  # the second Ctrl-C means now
        self.signal = number_
        at_once, self.leave_at_once = self.leave_at_once, False
        if at_once:
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self):
        """
        Inside, a signal takes effect at once: for compiling, which can take minutes between two
        polls. Several ranks cannot leave so: one of them would be gone while the others wait for
        its part of a sum.
        """
        self.leave_at_once = self.world == 1
        try:
            yield
        finally:
            self.leave_at_once = False

    def lock_folder(self) -> None:
        """
        Keep every other process out of the run's folder for as long as this one lives. The kernel
        holds the lock (over NFS, too): it ends with its process, however that ends, and no child
        inherits it, so none is ever left behind.
        """
        if self.lock_file:
            return
        try:
            import fcntl
        except ImportError:  # Windows has none
            return
        path = self.folder / ".lock"
        lock = open(path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{self.folder} is in use by {holder}: wait until it has ended, or choose "
                    "another --run"
                ) from e
            self.log(
                f"notice: {path}: {e.strerror}: see that nobody else starts this run meanwhile"
            )
            return
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self.lock_file = lock

    def wall(self) -> float:
        """
        Seconds since the first start of this run's processes, compilation and evaluation included.
        """
        return time.perf_counter() - self.began

    def open_log(self, step: int | None) -> None:
        """Begin log.txt and metrics.jsonl. step: they go on, without metrics behind it."""
        if self.is_main:
            metrics = self.folder / "metrics.jsonl"
            if step is not None and metrics.exists():
                text = metrics.read_text(encoding="utf-8", errors="replace")
                kept = [line for line in text.splitlines() if keep_metric(line, step)]
                write_whole(metrics, "".join(line + "\n" for line in kept).encode())
            self.log_file = open(
                self.folder / "log.txt",
                "a",
                buffering=1,
                encoding="utf-8",
                errors="backslashreplace",
            )  # of a path that is no text
            self.metrics_file = open(metrics, "a", buffering=1, encoding="utf-8")
        if self.is_main and self.cfg.wandb:
            try:
                import wandb

                self.wandb = wandb.init(
                    project=self.cfg.wandb,
                    name=self.cfg.run,
                    dir=self.folder,
                    resume="allow",
                    id=hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:12],
                    config=tomllib.loads(config_toml(self.cfg)),
                )
            except Exception as e:  # whatever its login, its server or its files raise
                raise UserError(
                    f"--wandb {self.cfg.wandb}: {e}; log in with `wandb login`, or set "
                    "WANDB_MODE=offline, and continue with --resume"
                ) from e

    def log(self, line: str, console: bool = True) -> None:
        if not self.is_main:
            return
        if self.log_file:
            self.log_file.write(line + "\n")
        else:
            self.early.append(line)
        if console:
            self.clear_live()
            to_console(line)

    def metric(self, kind: str, step: int, **values) -> None:
        """One line of metrics.jsonl, without the values that are None. wandb: it gets them, too."""
        if not self.is_main:
            return
        values = {k: v for k, v in values.items() if v is not None}
        self.metrics_file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)

    def live(self, line: str) -> None:
        """The console's training line: rewritten on a terminal, else printed every 10 s."""
        if not self.is_main:
            return
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            to_console("\r" + line[:width].ljust(width), end="")
            self.live_line = True
        elif time.perf_counter() - self.last_print > 10:
            to_console(line)
            self.last_print = time.perf_counter()

    def clear_live(self) -> None:
        if self.live_line:
            to_console("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="")
            self.live_line = False


def to_console(text: str, end: str = "\n") -> None:
    """To the console. Who reads it may leave, as `head` does: that costs a run nothing."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        say_nothing()


def say_nothing() -> None:
    """From here on, as nobody reads the console."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def portable(e: BaseException) -> BaseException:
    """An exception as other ranks can be told of it: a library's may not survive the way."""
    if type(e).__module__ in ("builtins", __name__):
        return e
    return RuntimeError(f"{type(e).__name__}: {e}")


def parse_metric(line: str) -> dict | None:
    """A line of metrics.jsonl; None for a damaged one, as a kill or a full disk leaves it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or [type(record.get(k)) for k in ("kind", "step")] != [
        str,
        int,
    ]:
        return None
    loss = record.get("val_loss" if record["kind"] == "val" else "step")
    return record if isinstance(loss, int | float) else None


def keep_metric(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl belongs to the past of a run that goes on from `step`."""
    record = parse_metric(line)
    if record is None:
        return False
    return record["step"] < step or (record["step"] == step and record["kind"] == "train")


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves either the old one or the new one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def choose_device(cfg: Config) -> torch.device:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        presets = [name for name in cfg.config if name != "on_cpu"]
        raise UserError(
            "device = 'cuda', but torch sees no CUDA device here; on a laptop layer on_cpu over "
            f"the preset, and give no --device: --config {' '.join(presets) or 'PRESET'} on_cpu"
        )
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def choose_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        fast = capability.startswith("AVX512") and bool(
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
    return torch.bfloat16 if fast else torch.float32


def environment(run: Run) -> list[str]:
    """What the numbers depend on beside the code: for the head of log.txt."""
    lines = [
        f"Running Python {sys.version}",
        f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}",
        f"host: {platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        f"ranks: {run.world} on {run.device.type}, compute {run.dtype}".replace("torch.", ""),
    ]
    if run.device.type == "cuda":
        lines.append(f"gpu: {torch.cuda.get_device_name(run.device)}")
        if shutil.which("nvidia-smi"):
            lines.append(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    return lines + [f"git: {git_revision()}"]


def git_revision() -> str:
    """
    Commit of the source, with + behind it when files differ from it; empty outside a checkout.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""
    return head + ("+" if head and dirty else "")


########################################
#                Model                 #
########################################


@dataclass
class ModelConfig(Section):
    """The model and its loss. Neutral values leave the graph of the plain one."""

    depth: int = 12  # blocks
    dim: int = 768  # width
    heads: int = 6  # query heads
    kv_heads: int = 0  # key and value heads; 0: as many as heads
    head_dim: int = 0  # width of a head; 0: dim / heads
    mlp_ratio: float = 4.0  # hidden width of the MLP over dim
    mlp_multiple: int = 1  # that width is rounded up to a multiple of this
    norm_eps: float = 1e-6  # of every norm; remix ran at bfloat16's 2^-7 and depends on it
    # 1: norms but that of the embedding are LayerNorms with a gain (no bias); 0: RMS without gain
    layer_norm: int = 0
    norm_gain: int = 0  # 1: RMS norms of embedding, branches and output have a learned gain
    embed_norm: int = 1  # 1: norm behind the embedding
    qk_norm: int = 1  # 1: norm on queries and keys
    attn_scale: float = 0.0  # factor on attention scores; 0: 1/sqrt(head_dim)
    rope: str = "truncated"  # truncated (half turn, base^-linspace), standard or interleaved
    rope_base: float = 1024.0  # longest period over 2 pi of the rotary frequencies
    rope_dims: int = 0  # standard, interleaved: so many first dims turn; 0: all, -1: half
    activation: str = "relu2"  # relu2, leaky_relu2 (slope 0.5, then squared) or swiglu
    biases: int = 0  # 1: the maps of attention and MLP, and the head, have a bias

    # in L blocks of window_pattern (all, without one) these dims of a key are the key's before it:
    # still, those that do not turn; second, the second of each pair (slowrun); empty: none
    key_offset: str = ""

    q_gain: float = 0.0  # start of a learned factor per query head, behind the rotation; 0: none
    attn_gate: int = 0  # heads times sigmoid of a map of the input's first n dims; 0: none
    value_proj: int = 0  # every 2nd block adds a map of the embedding, gated by n input dims
    iha: int = 0  # 1: learned mixing of the heads' weights of queries, keys, values (slowrun)
    # exclusive self-attention (no component along the own value) in the last n places; -1: in all
    xsa: int = 0
    xsa_learned: int = 0  # 1: of that component, tanh of a number learned by head, from 0
    block_scales: int = 0  # 1: learned vectors mix in the embedding and scale both branches
    resid_lambda: float = 0.0  # start of a learned factor per block on the residual stream; 0: none
    x0_lambda: float = 0.0  # start of a learned share of the embedding per block; 0: none
    # learned skips from the first half to the second: 1: a vector by place; 2: a number by block
    unet: int = 0
    layer_scale: int = 0  # 1: normed inputs of block l's branches are divided by sqrt(l + 1)
    loop_embed: int = 0  # 1: each place adds a learned vector
    value_embeds: int = 0  # token tables of which each place adds a learned share; 0: none
    second_embed: int = 0  # 1: another embedding, normed, of which each place adds a learned share
    # rows of a table for a token and the one before it, by a hash, of which each place adds a
    # learned share, at first .05; 0: none
    bigram_rows: int = 0
    bigram_signs: int = 0  # so many fixed rows of signs multiply them, by another hash; 0: none
    cross_repeat: int = 0  # 1: a looped block adds a learned share of its last output

    # The speedrun's records #14 to #89. A list of blocks reads "0,2,5-9".
    # each token's embedding takes a learned share of the one before it, by a gate of n of its dims
    smear: int = 0
    # "7:0.5": the final norm's input loses a learned share, from 0.5, of block 7's output
    backout: str = ""
    # blocks that add a token table's row to their values; "0-4 11-15=0-4": 11 to 15 share those
    value_layers: str = ""
    value_gate: str = ""  # "6+6": by head, from so many dims of attention's input and of that row
    value_init: float = 0.01  # standard deviation of those tables
    no_attn_layers: str = ""  # blocks without attention
    no_mlp_layers: str = ""  # blocks without an MLP
    attn_gate_layers: str = ""  # blocks that have attn_gate; empty: all
    xsa_layers: str = ""  # blocks that have xsa, wherever they stand
    x0_layers: str = ""  # blocks that have x0_lambda, which may then be 0; empty: all
    # blocks whose attention has half the heads and two positions a token: heads j and j + heads/2
    # see each other's keys; windows count such positions
    paired_layers: str = ""
    # "3>6": block 6 adds block 3's output times sigmoid(number), by token times 2*sigmoid of a map
    # of skip_dims dims of the embedding; "6>9 4>10" are two
    skip_gate: str = ""
    skip_dims: int = 0  # 0: the first factor alone, or one of gate_nets
    # start of a learned factor on each branch's output; resid_lambda then has one by branch as
    # well, and x0_lambda's share joins behind attention and not before it
    post_lambda: float = 0.0
    # "0.5 1": starts of two learned factors: on queries, keys and values, and on attention's output
    sa_lambdas: str = ""
    late_input: str = ""  # "7": attention of all blocks behind block 7 reads block 7's output
    # "0,4": a small net reads the input of block 0, another that of block 4. Each gives, by token,
    # factors of the blocks from its own to the next net's: xsa_learned's, head gates of
    # attn_gate_layers (where attn_gate is 0), x0_layers' shares and there those of bigram_rows,
    # skip_gate's (where skip_dims is 0)
    gate_nets: str = ""
    # "x0,7": a net gives, by token, what the last block's values and input take of the embedding,
    # block 7's output and that input, and the factors of post_lambda, x0_lambda, value_layers there
    mudd: str = ""
    mudd_final: str = ""  # "x0,7,v1": what the final norm's input takes; v1: block 1's table's row
    net_hidden: int = 64  # hidden width of those nets

    doc_mask: int = 1  # 1: a token sees its own document only
    window: str = "0"  # [sched] keys a token sees, itself included; 0: the whole row
    # SSSL, repeated over blocks: S sees window, L window_long; the last block is L
    window_pattern: str = ""
    window_long: str = "0"  # [sched] keys a token sees in an L block; 0: the whole row
    # the same in evaluation, once window_long has its last value; 0: that value
    eval_window_long: int = 0
    # where window_long grows, rotations slow down and attention sharpens (YaRN), in all blocks:
    # 1: always; more: until it has this value
    yarn: int = 0
    loop: str = ""  # "a:b": blocks a..b-1 are applied `repeats` times; empty: none
    repeats: str = "1"  # [sched] passes through the looped blocks
    # [sched] passes through the whole net, each from the normed output of the one before, of which
    # the last alone has gradients
    passes: str = "1"

    attn_dropout: float = 0.0  # share of the attention branch's output that is zeroed in training
    mlp_dropout: float = 0.0  # share of the MLP branch's output that is zeroed in training
    stoch_depth: float = 0.0  # chance that training skips the last block, linear from 0 at block 0
    mtp: float = 0.0  # weight of the loss of the token after next, by one more block; 0: none
    mtp_next: str = "0"  # [sched] weight of the loss of that token by the same logits; 0: none
    mtp_third: str = "0"  # [sched] the same of the token behind it; 0: none
    # [sched] weight of the loss, by the same logits, of the token that is the longest proper prefix
    # of the target's bytes; 0: none
    prefix_loss: str = "0"
    # [sched] in training a row's softmax is over so many classes, its targets and others in turn;
    # 0: over all
    sampled_classes: str = "0"

    tie_embed: int = 0  # 1: one table is input embedding and head
    # behind this step, such as 847s, or this part of training, they go on as two; empty: never
    untie_at: str = ""
    head_multiple: int = 128  # rows of the head are rounded up to a multiple of this
    pad_vocab: int = 0  # 1: the embedding has those rows too; beyond vocab there are no logits
    embed_init: float = 1.0  # standard deviation of the untied input embedding
    # of head or tied table: a standard deviation, zero or uniform (1/sqrt(dim))
    head_init: str = "zero"
    init_std: float = 0.0  # std of q, k, v, MLP input, times sqrt(dim); 0: 0.5 and 1/sqrt(3)
    proj_init: float = 0.0  # std of both output projections, times sqrt(dim); 0: they start at zero
    attn_proj_init: float = 0.0  # the same of attention's alone, drawn as q, k, v; 0: as proj_init
    bias_init: float = 0.0  # std of biases, times sqrt(fan in); those of proj and head start at 0
    # initial values: remix (uniform), normal (the same deviations), or xavier (normal; embedding
    # 1/sqrt(dim), attn.proj .02/sqrt(2*depth))
    init: str = "remix"
    logit_dim_power: float = 0.0  # logits are multiplied by dim to this power; remix M has -0.5
    softcap: float = 0.0  # bound of the logits; 0: none
    # how they near it: tanh (cap*tanh(z/cap)) or isru (z/sqrt(1 + (z/cap)^2))
    softcap_shape: str = "tanh"
    softcap_in: float = 0.0  # what logits are divided by before that bound's tanh; 0: softcap
    softcap_shift: float = 0.0  # added to them before that, so that the bounds are not alike

    # regex without groups: maps, such as "^head$|mlp", whose products training takes in 8 bits,
    # those of gradients for weights aside, where the device can: GPUs from compute capability 8.9
    fp8: str = ""

    z_loss: float = 0.0  # weight of the mean of log(Z)^2, Z the sum of softmax; 0: none
    mu_loss: float = 0.0  # weight of |mu|^2, mu the mean row of the head; 0: none
    mu_centering: int = 0  # 1: after every step mu is subtracted from every row of the head

    LIMITS = limits(
        (0, 1, "layer_norm embed_norm qk_norm iha block_scales layer_scale loop_embed"),
        (0, 1, "cross_repeat doc_mask tie_embed pad_vocab mu_centering norm_eps xsa_learned"),
        (0, 1, "norm_gain biases second_embed"),
        (0, 100, "post_lambda value_init attn_proj_init"),
        (0, 2, "unet"),
        (0, BELOW_ONE, "attn_dropout mlp_dropout stoch_depth"),
        (0, 100, "mtp mtp_next mtp_third prefix_loss"),
        (0, 100, "q_gain resid_lambda embed_init init_std proj_init bias_init value_embeds"),
        (0, 1000, "attn_scale mlp_ratio z_loss"),
        (0, 10**6, "softcap softcap_in mu_loss"),
        (0, 10**9, "window window_long eval_window_long yarn"),
        (0, 65536, "kv_heads head_dim attn_gate value_proj smear skip_dims bigram_signs"),
        (0, 2**27, "bigram_rows"),
        (0, 2**17, "sampled_classes"),
        (1, 1000, "depth repeats passes"),
        (1, 65536, "dim heads head_multiple mlp_multiple net_hidden"),
        (1, 10**12, "rope_base"),
        (-1, 65536, "rope_dims xsa"),
        (-4, 4, "logit_dim_power"),
        (-100, 100, "x0_lambda"),
        (-(10**6), 10**6, "softcap_shift"),
    )
    CHOICES = {
        "rope": ("truncated", "standard", "interleaved"),
        "key_offset": ("", "still", "second"),
        "activation": ("relu2", "leaky_relu2", "swiglu"),
        "init": ("remix", "normal", "xavier"),
        "softcap_shape": ("tanh", "isru"),
    }

    def check(self) -> None:
        self.check_sizes()
        self.check_loop()
        self.check_lists()
        self.check_values()
        self.check_stream()
        self.check_nets()
        check_fp8(self.fp8)
        windows = long_windows(self)
        require(
            not self.yarn or windows[0] > 1 and windows == sorted(windows),
            f"yarn = {self.yarn} follows the growth of window_long = {self.window_long!r}: its "
            "values must grow, from 2 on (as many as the row is long for the whole row)",
        )
        require(
            not self.yarn or len(windows) <= 64,
            f"yarn = {self.yarn} with {len(windows)} values of window_long: each has a rotary "
            "table, and there may be 64",
        )
        require(
            not self.eval_window_long or 0 < windows[-1] <= self.eval_window_long,
            f"eval_window_long = {self.eval_window_long} is less than the last value of "
            f"window_long = {self.window_long!r} (0 is the whole row): set it to 0",
        )
        for key in ("attn_gate", "value_proj", "smear", "skip_dims"):
            value = getattr(self, key)
            require(
                0 <= value <= self.dim,
                f"{key} = {value}: a number of input dims, dim = {self.dim} at most",
            )
        require(
            not self.iha or self.heads == (self.kv_heads or self.heads),
            f"iha = 1 mixes the weights of {self.heads} heads, but keys and values have "
            f"{self.kv_heads}: set --kv_heads 0",
        )
        require(
            not (self.iha and self.biases),
            "iha = 1 mixes the weights of heads and knows no biases: set --biases 0 or --iha 0",
        )
        require(
            re.fullmatch("[SL]*", self.window_pattern) is not None,
            f"window_pattern = {self.window_pattern!r}: letters S (the window) and L (the whole "
            "row), for example SSSL",
        )
        self.check_starts()
        if self.untie_at:
            check_untie(self)
        if self.sampled_classes != "0":
            check_sampled(self)
        require(
            self.bigram_rows != 1,
            "bigram_rows = 1: one row is of tokens without one before them, and there must be "
            "others: 2 or more, or 0",
        )
        for key in ("softcap", "softcap_in"):
            value = getattr(self, key)
            require(
                value == 0 or value >= 1e-3,
                f"{key} = {value}: 0, or from 0.001 on, as logits are divided by it",
            )

    def needs(self) -> list[Need]:
        windowed = any(is_windowed(self, block) for block in range(self.depth))
        shortest = min(Schedule("seq_len", self.seq_len).values())
        growing = Schedule("window_long", self.window_long).values()
        starts = "init = 'remix' or 'normal', as xavier sets every start"
        by_tanh = self.softcap_shape == "tanh"
        return [
            *self.needs_of_records(),
            ("window", "an S in window_pattern before its last block", windowed),
            ("window_long", "window_pattern, of which it is the L", bool(self.window_pattern)),
            ("eval_window_long", "window_pattern, of which it is the L", bool(self.window_pattern)),
            ("yarn", "a window_long that grows, such as '769 0.5:1025'", len(growing) > 1),
            (
                "yarn",
                "1 or a second value of window_long that is not beyond it",
                self.yarn < 2 or len(growing) < 2 or long_windows(self)[1] <= self.yarn,
            ),
            ("rope_dims", "rope = 'standard' or 'interleaved'", self.rope != "truncated"),
            ("key_offset", "rows of 2 tokens or more", shortest > 1),
            (
                "key_offset",
                "dims that do not turn: rope = 'truncated', rope_dims below head_dim, or 'second'",
                not self.key_offset or bool(offset_dims(self)),
            ),
            ("stoch_depth", "depth > 1, as block 0 always takes part", self.depth > 1),
            ("mtp", "rows of 2 tokens or more", shortest > 1),
            ("mtp_next", "rows of 2 tokens or more", shortest > 1),
            ("mtp_third", "rows of 3 tokens or more", shortest > 2),
            ("prefix_loss", "a tokenizer, whose tokens have bytes", bool(self.tokenizer)),
            ("init_std", starts, self.init != "xavier"),
            ("proj_init", starts, self.init != "xavier"),
            ("attn_proj_init", starts, self.init != "xavier"),
            ("head_init", starts, self.init != "xavier"),
            ("embed_init", starts, self.init != "xavier"),
            ("norm_gain", "layer_norm = 0, whose norms have one anyway", not self.layer_norm),
            ("bias_init", "biases = 1", self.biases > 0),
            ("softcap_shape", "softcap > 0", self.softcap > 0),
            ("bigram_signs", "bigram_rows > 1, which they multiply", self.bigram_rows > 0),
            ("untie_at", "tie_embed = 1", self.tie_embed > 0),
            *[(f"softcap_{key}", "softcap > 0", self.softcap > 0) for key in ("in", "shift")],
            *[(f"softcap_{key}", "softcap_shape = 'tanh'", by_tanh) for key in ("in", "shift")],
        ]

    def needs_of_records(self) -> list[Need]:
        shortest = min(Schedule("seq_len", self.seq_len).values())
        return [
            (
                "xsa_learned",
                "xsa, of which it learns a share, such as --xsa -1",
                self.xsa != 0 or bool(self.xsa_layers),
            ),
            ("value_gate", "value_layers", bool(self.value_layers)),
            (
                "attn_gate_layers",
                "attn_gate, the dims that it reads, or gate_nets",
                self.attn_gate > 0 or bool(self.gate_nets),
            ),
            ("mudd", "post_lambda, whose factors it gives by token", self.post_lambda > 0),
            (
                "late_input",
                "a block with attention behind that one",
                any(is_late(self, b) and has_attention(self, b) for b in range(self.depth)),
            ),
            (
                "net_hidden",
                "gate_nets, mudd or mudd_final",
                bool(self.gate_nets or self.mudd or self.mudd_final),
            ),
            ("skip_dims", "skip_gate, such as '3>6'", bool(self.skip_gate)),
            ("smear", "rows of 2 tokens or more", shortest > 1),
            (
                "bigram_rows",
                "gate_nets = '', or x0_lambda, x0_layers or mudd at a block that a net steers",
                not self.bigram_rows or takes_bigrams(self),
            ),
        ]

    def check_starts(self) -> None:
        require(
            self.head_init in ("zero", "uniform")
            or is_number(self.head_init)
            and 0 <= float(self.head_init) <= 100,
            f"head_init = {self.head_init!r}: zero, uniform or a standard deviation such as 0.005",
        )
        at_zero = is_number(self.head_init) and float(self.head_init) == 0
        by_init = self.init == "xavier"
        require(
            not (self.tie_embed and at_zero) or by_init,
            f"head_init = {self.head_init!r} with tie_embed = 1: a table of zeros that is input "
            "and output has no gradient: uniform, or a standard deviation such as 0.005",
        )
        require(
            self.tie_embed
            or self.embed_init > 0
            or not (at_zero or self.head_init == "zero")
            or by_init,
            f"embed_init = 0 and head_init = {self.head_init!r}: neither table has a gradient "
            "where the other is zero: --embed_init 1, or --head_init 0.005",
        )

    def check_sizes(self) -> None:
        require(
            self.head_dim > 0 or self.dim % self.heads == 0,
            f"dim = {self.dim} is no multiple of heads = {self.heads}",
        )
        width = head_width(self)
        require(width % 4 == 0, f"head_dim = {width}: rotary embedding needs a multiple of 4")
        require(
            self.rope_dims == -1 or self.rope_dims % 2 == 0 and self.rope_dims <= width,
            f"rope_dims = {self.rope_dims}: an even number up to head_dim = {width}, or -1 for "
            "half of it",
        )
        require(
            self.heads % (self.kv_heads or self.heads) == 0,
            f"heads = {self.heads}: no multiple of kv_heads = {self.kv_heads}",
        )
        require(
            self.mlp_ratio * self.dim >= 1,
            f"mlp_ratio = {self.mlp_ratio}: leaves the MLP no hidden unit",
        )

    def check_loop(self) -> None:
        low, high = loop_span(self)
        loop, repeats = f"loop = {self.loop!r}", f"repeats = {self.repeats[:200]!r}"
        require(0 <= low <= high <= self.depth, f"{loop}: must lie within the {self.depth} blocks")
        values = Schedule("repeats", self.repeats).values()
        require(
            bool(self.loop) or values == [1],
            f"{repeats} without looped blocks: set loop, e.g. --loop 4:6",
        )
        places = self.depth + (high - low) * (max(values) - 1)
        passes = max(Schedule("passes", self.passes).values())
        # summed, as there is a table of places for each value
        every = sum(self.depth + (high - low) * (value - 1) for value in values) * passes
        require(
            every <= 10_000,
            f"{loop}, {repeats}, passes = {self.passes!r}: {every:g} applications of a block "
            "over all values, 10000 at most",
        )
        require(
            not self.cross_repeat or max(values) > 1,
            f"cross_repeat = 1 adds a looped block's output one repeat before, but {loop} and "
            f"{repeats} repeat nothing: --cross_repeat 0, or --loop 1:3 --repeats 2",
        )
        halves = self.depth > 1 if self.unet == 2 else places > 1
        require(
            not self.unet or halves,
            f"unet = {self.unet} ties the second half of the blocks to the first: depth = "
            f"{self.depth} has no halves",
        )

    def check_lists(self) -> None:
        for key in BLOCK_LISTS:
            text = getattr(self, key)
            require(
                not text or is_block_list(text, self.depth),
                f"{key} = {text!r}: blocks below depth = {self.depth}, each once, such as "
                "'0,2,5-9'",
            )
        bare = set(blocks_of(self.no_attn_layers))
        require(len(bare) < self.depth, "no_attn_layers: a block or more must have attention")
        for key in ("attn_gate_layers", "xsa_layers", "value_layers", "paired_layers"):
            own = value_tables(self) if key == "value_layers" else blocks_of(getattr(self, key))
            lost = sorted(bare & set(own))
            require(not lost, f"{key} has blocks without attention (no_attn_layers): {lost}")
        require(
            not self.paired_layers or (self.kv_heads or self.heads) % 2 == 0,
            f"paired_layers = {self.paired_layers!r} has pairs of heads, but heads = {self.heads}, "
            f"kv_heads = {self.kv_heads or self.heads}: both must be even",
        )
        require(
            not (self.xsa and self.xsa_layers),
            f"xsa = {self.xsa} counts places, xsa_layers = {self.xsa_layers!r} names blocks: set "
            "one of them",
        )

    def check_values(self) -> None:
        # at most a word a block: what is longer is a forged file's
        words = [word.split("=") for word in self.value_layers.split()[: self.depth + 1]]
        ok = len(words) <= self.depth and all(
            len(lists) <= 2
            and all(is_block_list(text, self.depth) for text in lists)
            and len(blocks_of(lists[0])) == len(blocks_of(lists[-1]))
            for lists in words
        )
        tables = value_tables(self) if ok else {}
        require(
            ok and set(tables.values()) == set(range(len(set(tables.values())))),
            f"value_layers = {self.value_layers!r}: blocks below depth = {self.depth}, such as "
            "'1,2,8-10', and behind them those that share their tables, such as '11-15=0-4'",
        )
        require(
            not (tables and self.value_proj),
            f"value_layers = {self.value_layers!r} and value_proj = {self.value_proj}: values come "
            "from tables or from maps of the embedding, not from both",
        )
        dims = re.fullmatch(r"(\d{1,5})(\+\d{1,5})?", self.value_gate)
        width = (self.kv_heads or self.heads) * head_width(self)
        require(
            not self.value_gate
            or dims is not None
            and 0 < sum(value_dims(self)) <= value_dims(self)[0] + width
            and value_dims(self)[0] <= self.dim,
            f"value_gate = {self.value_gate!r}: numbers of dims, up to dim = {self.dim} of "
            f"attention's input and up to {width} of a table's row, such as '6+6' or '16'",
        )

    def check_stream(self) -> None:
        match = re.fullmatch(r"(\d{1,4}):(.+)", self.backout)
        require(
            not self.backout
            or match is not None
            and int(match[1]) < self.depth - 1
            and is_number(match[2])
            and abs(float(match[2])) <= 100,
            f"backout = {self.backout!r}: a block that has others behind it, of {self.depth}, and "
            "a share, such as '7:0.5'",
        )
        ok = all(re.fullmatch(r"\d{1,4}>\d{1,4}", word) for word in self.skip_gate.split())
        skips = gated_skips(self) if ok else {}
        require(
            ok
            and len(skips) == len(self.skip_gate.split())
            and all(source < block < self.depth for block, source in skips.items()),
            f"skip_gate = {self.skip_gate!r}: from a block to a later one below depth = "
            f"{self.depth} that has no other skip, such as '3>6' or '6>9 4>10'",
        )
        require(
            re.fullmatch(r"(\d{1,4})?", self.late_input) is not None
            and int(self.late_input or -1) < self.depth - 1,
            f"late_input = {self.late_input!r}: a block that has others behind it, of {self.depth}",
        )
        words = self.sa_lambdas.split()
        require(
            not words
            or len(words) == 2
            and all(is_number(word) and abs(float(word)) <= 100 for word in words),
            f"sa_lambdas = {self.sa_lambdas!r}: two numbers, such as '0.5 1'",
        )

    def check_nets(self) -> None:
        ok = not self.gate_nets or is_block_list(self.gate_nets, self.depth)
        blocks = blocks_of(self.gate_nets) if ok else []
        require(
            ok and "-" not in self.gate_nets and blocks == sorted(blocks),
            f"gate_nets = {self.gate_nets!r}: blocks below depth = {self.depth}, rising, such as "
            "'0,4'",
        )
        for net, block in enumerate(blocks):
            require(
                bool(net_lanes(self, net)),
                f"gate_nets = {self.gate_nets!r}: the net at block {block} has nothing to give: "
                "xsa_learned, attn_gate_layers, x0_layers or skip_gate before the next one",
            )
        gated = [] if self.attn_gate else blocks_of(self.attn_gate_layers)
        lost = [block for block in gated if blocks and block < blocks[0]]
        require(
            not lost,
            f"attn_gate_layers = {self.attn_gate_layers!r}: no net of gate_nets = "
            f"{self.gate_nets!r} stands before blocks {lost}",
        )
        last, width = self.depth - 1, (self.kv_heads or self.heads) * head_width(self)
        for key in ("mudd", "mudd_final"):
            text = getattr(self, key)
            words = sources_of(text)
            known = {"x0", *map(str, range(last)), *(f"v{block}" for block in value_tables(self))}
            require(
                len(words) == len(set(words)) and known.issuperset(words),
                f"{key} = {text!r}: x0, blocks before the last, and v1 for the table of block 1 if "
                "value_layers has it, such as 'x0,7,v1'",
            )
            by_width = key == "mudd" or any(word[0] == "v" for word in words)
            require(
                not (words and by_width) or width == self.dim,
                f"{key} = {text!r} takes values for the stream or the other way: heads * head_dim "
                f"= {width} must be dim = {self.dim}, without kv_heads",
            )
        ends = has_attention(self, last) and last not in blocks_of(self.no_mlp_layers)
        require(
            not self.mudd or ends and (last not in value_tables(self) or self.heads % 2 == 0),
            f"mudd = {self.mudd!r}: the last block must have attention, an MLP and, with a value "
            "table, an even number of heads",
        )


SPAN = r"(\d{1,4})(?:-(\d{1,4}))?"
BLOCK_LIST = rf"{SPAN}(?:,{SPAN})*"  # 0,2,5-9
BLOCK_LISTS = ("no_attn_layers", "no_mlp_layers", "attn_gate_layers", "xsa_layers", "x0_layers")
BLOCK_LISTS += ("paired_layers",)


def is_block_list(text: str, depth: int) -> bool:
    """Whether it names blocks below `depth`, each once."""
    if not re.fullmatch(BLOCK_LIST, text):
        return False
    spans = sorted((int(low), int(high or low)) for low, high in re.findall(SPAN, text))
    ends = [-1, *(high for _, high in spans)]
    return ends[-1] < depth and all(end < low <= high for end, (low, high) in zip(ends, spans))


def blocks_of(text: str) -> list[int]:
    """The blocks of a list such as 0,2,5-9, in its order."""
    spans = [part.partition("-") for part in text.split(",") if part]
    return [b for low, _, high in spans for b in range(int(low), int(high or low) + 1)]


def value_tables(cfg: Config) -> dict[int, int]:
    """By block of value_layers the number of its table; -1 where it would share one not there."""
    tables: dict[int, int] = {}
    for word in cfg.value_layers.split():
        blocks, _, shared = word.partition("=")
        if shared:
            rows = [tables.get(block, -1) for block in blocks_of(shared)]
            tables |= dict(zip(blocks_of(blocks), rows))
        else:
            count = len(set(tables.values()))
            tables |= {block: count + i for i, block in enumerate(blocks_of(blocks))}
    return tables


def value_dims(cfg: Config) -> tuple[int, int]:
    """Dims that value_gate reads: of attention's input, of the table's row."""
    of_input, _, of_row = cfg.value_gate.partition("+")
    return int(of_input or 0), int(of_row or 0)


def gated_skips(cfg: Config) -> dict[int, int]:
    """By block, the block whose output skip_gate adds to its input."""
    pairs = [word.split(">") for word in cfg.skip_gate.split()]
    return {int(block): int(source) for source, block in pairs}


def backed_out(cfg: Config) -> tuple[int, float]:
    """The block whose output is taken away at the end, and the share at first; -1: none."""
    block, _, share = cfg.backout.partition(":")
    return (int(block), float(share)) if block else (-1, 0.0)


class Lane(NamedTuple):
    """Numbers by token that a net gives: what for, to which block, how many, what they start at."""

    kind: str
    block: int
    count: int
    start: float


BIGRAM_SHARE = 0.05  # what places take of bigram_rows' table at first (modded-nanogpt)
NET_SCALE = 0.1  # of the nets' outputs: learned from there by gate_nets, fixed in mudd


def net_of(cfg: Config, block: int) -> int:
    """Number of the net of gate_nets that a block has its factors from; -1: none."""
    before = [net for net, first in enumerate(blocks_of(cfg.gate_nets)) if first <= block]
    return before[-1] if before and block < cfg.depth else -1


def net_lanes(cfg: Config, net: int) -> list[Lane]:
    """What a net of gate_nets gives, in order; starts are modded-nanogpt's (#85)."""
    lanes = []
    for block in (block for block in range(cfg.depth) if net_of(cfg, block) == net):
        if has_xsa_alpha(cfg, block):
            lanes.append(Lane("xsa", block, cfg.heads, 0.0))
        if has_given_gate(cfg, block):
            lanes.append(Lane("gate", block, cfg.heads, 0.25))
        if has_x0_share(cfg, block) and not is_in_mudd(cfg, block):
            lanes.append(Lane("x0", block, 1, cfg.x0_lambda))
            if cfg.bigram_rows:
                lanes.append(Lane("bigram", block, 1, BIGRAM_SHARE))
        if block in gated_skips(cfg) and not cfg.skip_dims:
            lanes.append(Lane("skip", block, 1, 0.5))
    return lanes


def sources_of(text: str) -> list[str]:
    """Of mudd and mudd_final."""
    return text.split(",") if text else []


def is_in_mudd(cfg: Config, block: int) -> bool:
    return bool(cfg.mudd) and block == cfg.depth - 1


def mudd_starts(cfg: Config) -> list[float]:
    """
    Of what the net before the last block gives: by source and for the input itself, to values and
    to the stream; to each half of the table's heads; factors of attention, shares of the embedding
    and, where nets give it, of bigram_rows' table, factors of the MLP (modded-nanogpt #81, after
    arXiv 2502.12170).
    """
    shares = [0.0] * (len(sources_of(cfg.mudd)) + 1)
    of_table = [2.0, 2.0] if cfg.depth - 1 in value_tables(cfg) else []
    factors = [cfg.resid_lambda or 1.0, cfg.post_lambda]
    of_bigram = [BIGRAM_SHARE] if bigram_by_nets(cfg) else []
    return [*shares, *shares, *of_table, *factors, cfg.x0_lambda, *of_bigram, *factors]


def final_starts(cfg: Config) -> list[float]:
    """Of what the net before the final norm gives: backout's share, and nothing."""
    block, share = backed_out(cfg)
    return [-share if word == str(block) else 0.0 for word in sources_of(cfg.mudd_final)]


def bigram_by_nets(cfg: Config) -> bool:
    """
    Whether the shares of the table of bigram_rows are given by token, to the blocks that have one
    of the embedding; the first takes it before it begins.
    """
    return cfg.bigram_rows > 0 and bool(cfg.gate_nets)


def has_bigram_given(cfg: Config, block: int) -> bool:
    steered = net_of(cfg, block) >= 0 and has_x0_share(cfg, block)
    return 0 < block < cfg.depth and (steered or is_in_mudd(cfg, block))


def takes_bigrams(cfg: Config) -> bool:
    """Whether rows of bigram_rows' table join the stream anywhere."""
    first = net_of(cfg, 0) >= 0 and has_x0_share(cfg, 0)
    given = first or any(has_bigram_given(cfg, block) for block in range(cfg.depth))
    return given or not cfg.gate_nets


def has_attention(cfg: Config, block: int) -> bool:
    return block not in blocks_of(cfg.no_attn_layers)


def has_x0_share(cfg: Config, block: int) -> bool:
    """Whether a block adds a share of the embedding by x0_lambda; not the one of MTP."""
    if cfg.x0_layers:
        return block in blocks_of(cfg.x0_layers)
    return bool(cfg.x0_lambda) and block < cfg.depth


def has_share(cfg: Config, block: int) -> bool:
    """Whether the embedding joins the stream within a block."""
    return has_x0_share(cfg, block) or is_in_mudd(cfg, block)


def has_value_proj(cfg: Config, block: int) -> bool:
    """Every second block, counted from the last one, has one of value_proj; not that of MTP."""
    second = block < cfg.depth and (cfg.depth - 1 - block) % 2 == 0
    return cfg.value_proj > 0 and second and has_attention(cfg, block)


def has_given_values(cfg: Config, block: int) -> bool:
    """Whether a block's values are joined by those of a table, or of mudd."""
    return block in value_tables(cfg) or is_in_mudd(cfg, block)


def gate_dims(cfg: Config, block: int, projected: bool) -> tuple[int, int]:
    """Dims that a block's gate of values reads: of attention's input, of the values."""
    if projected:
        return cfg.value_proj, 0
    in_table = block in value_tables(cfg) and not is_in_mudd(cfg, block)
    return value_dims(cfg) if in_table else (0, 0)


def has_attn_gate(cfg: Config, block: int) -> bool:
    listed = not cfg.attn_gate_layers or block in blocks_of(cfg.attn_gate_layers)
    return cfg.attn_gate > 0 and listed


def has_given_gate(cfg: Config, block: int) -> bool:
    """Whether a net of gate_nets gives the head gate."""
    listed = block in blocks_of(cfg.attn_gate_layers)
    return listed and not cfg.attn_gate and net_of(cfg, block) >= 0


def has_xsa_alpha(cfg: Config, block: int) -> bool:
    """Whether a block learns by how much xsa acts; not that of MTP, which has none."""
    listed = not cfg.xsa_layers or block in blocks_of(cfg.xsa_layers)
    return bool(cfg.xsa_learned) and listed and block < cfg.depth and has_attention(cfg, block)


SWEEP = 20011  # modded-nanogpt #92's: prime, so a multiple by it visits every class


def check_sampled(cfg: Config) -> None:
    """Refuse what a loss over some classes does not know, and more classes than there are."""
    classes, most = classes_of(cfg), largest(cfg.sampled_classes)
    require(
        most <= classes and classes % SWEEP > 0,
        f"sampled_classes = {cfg.sampled_classes!r}: at most {classes}, the rows of the head that "
        f"have a logit, and these no multiple of {SWEEP}",
    )
    odd = [n for n in Schedule("sampled_classes", cfg.sampled_classes).values() if n % 16]
    require(
        not (odd and is_named(cfg.fp8, "head")),
        f"sampled_classes = {cfg.sampled_classes!r} with fp8 = {cfg.fp8!r}, which finds the head: "
        "products in 8 bits take multiples of 16 classes",
    )
    other = [key for key in ("z_loss", "mtp", "distill", "biases") if getattr(cfg, key)]
    require(
        not other,
        f"sampled_classes = {cfg.sampled_classes!r} knows no {' and no '.join(other)}, which are "
        "about all classes or have a head of their own: leave one of both out",
    )


def head_rows(cfg: Config) -> int:
    return -(-cfg.vocab // cfg.head_multiple) * cfg.head_multiple


def classes_of(cfg: Config) -> int:
    """How many rows of the head have a logit."""
    return cfg.vocab if cfg.pad_vocab else head_rows(cfg)


def candidates(targets: np.ndarray, count: int, classes: int, start: int) -> np.ndarray:
    """
    Classes [count], rising, for the softmax of a row: all that are targets (no more than count) and
    as many others as are missing, in the order of k * SWEEP mod classes from k = start on.
    """
    free = np.ones(classes, bool)
    free[targets] = False
    swept = (start + np.arange(classes)) * SWEEP % classes
    used = np.flatnonzero(~free)
    return np.sort(np.concatenate([used, swept[free[swept]][: count - len(used)]]))


def check_fp8(pattern: str) -> None:
    """
    Refuse what is no pattern, and one that could search for ever: unlike other patterns, this one
    is about the model, so that readers of an artifact run it.
    """
    require_regex("fp8", pattern)
    require(
        len(pattern) <= 200 and "(" not in pattern and sum(map(pattern.count, "*+?{")) <= 2,
        f"fp8 = {pattern[:200]!r}: at most 200 characters, without brackets ( ) and with "
        "at most two of * + ? {, such as '^head$|mlp'",
    )


def check_untie(cfg: Config) -> None:
    """Refuse what the step of two tables could not be told from, or would part them before it."""
    require(
        re.fullmatch(r"[0-9./]+s?", cfg.untie_at) is not None,
        f"untie_at = {cfg.untie_at!r}: a step such as 847s, or a part of training such as 2/3",
    )
    apart = [
        key
        for key, on in (
            ("max_seconds", cfg.max_seconds > 0),
            ("mu_centering", cfg.mu_centering),
            ("perturb", cfg.perturb != CycleConfig.perturb),
            ("qat_noise", cfg.qat_noise),
        )
        if on
    ]
    require(
        not apart,
        f"untie_at = {cfg.untie_at!r} keeps two tables alike until a given step, which "
        f"{' and '.join(apart)} do not: leave one of both out",
    )
    require_regex("slow", cfg.slow)  # its own section looks at it later
    require(
        is_named(cfg.slow, "head") == is_named(cfg.slow, "embed"),
        f"slow = {cfg.slow!r} finds one of head and embed, which are one table until untie_at = "
        f"{cfg.untie_at!r}: name both, or none",
    )


def last_tied(cfg: Config) -> int:
    """The last step that is made with one table for head and embedding."""
    # the end without untie_at, which a script's folding asks as well
    point = Schedule("untie_at", f"0 {cfg.untie_at or '1'}:1").points[1]
    return math.ceil(point.at if point.in_steps else point.at * cfg.steps - 1e-9)


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def head_width(cfg: Config) -> int:
    return cfg.head_dim or cfg.dim // cfg.heads


def hidden_width(cfg: Config) -> int:
    """Hidden width of the MLP."""
    return -(-int(cfg.mlp_ratio * cfg.dim) // cfg.mlp_multiple) * cfg.mlp_multiple


def rotary_dims(cfg: Config) -> int:
    """Dims of a head that turn under rope = standard or interleaved."""
    return head_width(cfg) // 2 if cfg.rope_dims == -1 else cfg.rope_dims or head_width(cfg)


def later_targets(cfg: Config) -> dict[str, int]:
    """
    Schedules of weights that are on, with how far behind a token's target that one stands which
    theirs is, or is a prefix of.
    """
    far = {"mtp_next": 1, "mtp_third": 2, "prefix_loss": 0}
    return {name: k for name, k in far.items() if any(Schedule(name, getattr(cfg, name)).values())}


def loop_span(cfg: Config) -> tuple[int, int]:
    """First looped block and the one behind the last; (0, 0) without a loop."""
    if not cfg.loop:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", cfg.loop)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(
            f"loop = {cfg.loop!r}: must read 'first:end', for example 4:6 for blocks 4 and 5"
        )
    return int(match[1]), int(match[2])


def norm(x: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    """RMS norm (Zhang & Sennrich 2019) over the last dim, computed in fp32."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (y if gain is None else y * gain.float()).to(x.dtype)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ w.T + bias with fp32 master weights cast to the type of the activations at use."""
    return F.linear(x, w.to(x.dtype), None if bias is None else bias.flatten().to(x.dtype))


class Fp8Product(torch.autograd.Function):
    """
    x [n, cols] @ w.T of w [rows, cols], with x and w in e4m3 and the gradient of the result, for
    that of x, in e5m2, each by one scale from its largest entry (Micikevicius et al. 2022). The
    gradient for w is of x and w as they were.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        (x8, of_x), (w8, of_w) = in_fp8(x, E4M3), in_fp8(w, E4M3)
        how = {"out_dtype": x.dtype, "use_fast_accum": True}
        return torch._scaled_mm(x8, w8.mT, scale_a=of_x, scale_b=of_w, **how)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        (g8, of_g), (w8, of_w) = in_fp8(grad, E5M2), in_fp8(w.mT.contiguous(), E4M3)
        back = torch._scaled_mm(g8, w8.mT, scale_a=of_g, scale_b=of_w, out_dtype=grad.dtype)
        return back, grad.mT @ x


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def in_fp8(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """x over a scale that brings its largest entry to the largest of that kind, and the scale."""
    scale = (x.abs().amax().float() / torch.finfo(kind).max).clamp_min(1e-12).to(x.dtype)
    return (x / scale).to(kind), scale.float()


def has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(), with the products of Fp8Product."""
    y = Fp8Product.apply(x.flatten(0, -2), w.to(x.dtype)).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias.flatten().to(x.dtype)


def rows_of(table: Tensor, tokens: Tensor, few: bool = False) -> Tensor:
    """
    The table's rows. A CPU would sum their gradients in bfloat16, a GPU does in fp32. few: of a
    table so large that a CPU, where gradients are kept already, adds to those of these rows alone
    and makes no table of others.
    """
    if few and table.device.type == "cpu" and not torch.compiler.is_compiling():
        sparse = table.grad is not None and table.dtype == torch.float32
        return F.embedding(tokens, table.float(), sparse=sparse)
    return F.embedding(tokens, table if table.is_cuda else table.float())


def bigram_ids(tokens: Tensor, before: Tensor, rows: int) -> Tensor:
    """
    Rows 0 to rows - 2 of a table for tokens and the ones before them: modded-nanogpt's hash (#62)
    of products in int32, which wrap around, as here a sum of theirs in int64 does.
    """
    mixed = (36313 * tokens) ^ (27191 * before)
    return (((mixed + 2**31) & (2**32 - 1)) - 2**31) % (rows - 1)


def bigram_signs(cfg: Config) -> Tensor:
    """Fixed signs [bigram_signs, D], the same for every seed, so that a table keeps them."""
    size = cfg.bigram_signs, cfg.dim
    signs = torch.randint(2, size, generator=generator_of("bigram_signs"), dtype=torch.int8)
    return 2 * signs - 1


def layer_norm(x: Tensor, eps: float, gain: Tensor | None) -> Tensor:
    """LayerNorm (Ba et al. 2016) with gain, without bias, in fp32; no gain: the RMS norm."""
    return (
        norm(x, eps)
        if gain is None
        else F.layer_norm(x.float(), x.shape[-1:], gain.float(), None, eps).to(x.dtype)
    )


def long_windows(cfg: Config) -> list[int]:
    return [int(p.value) for p in Schedule("window_long", cfg.window_long).points]


def yarn_stages(cfg: Config) -> list[int]:
    """
    The values of window_long, in order, up to yarn where that is more than 1: all that it depends
    on, so that nothing is stored.
    """
    return [w for w in long_windows(cfg) if cfg.yarn < 2 or w <= cfg.yarn]


def yarn_stage(cfg: Config, window_long: int) -> int:
    """Its place among yarn_stages(); beyond them, as in evaluation, the last one's rotations."""
    stages = yarn_stages(cfg)
    return stages.index(window_long) if window_long in stages else len(stages) - 1


def yarn_growths(cfg: Config, window_long: int) -> list[tuple[int, int]]:
    """
    From which to which length window_long has grown until it has this value; none without yarn.
    Counted are the tokens before a query, as in modded-nanogpt #31 and slowrun.
    """
    if not cfg.yarn:
        return []
    before = [keys - 1 for keys in yarn_stages(cfg)][: yarn_stage(cfg, window_long) + 1]
    return list(zip(before, before[1:]))


def sharpness(cfg: Config, window_long: int) -> float:
    """YaRN's factor on attention scores."""
    factor = 1.0
    for a, b in yarn_growths(cfg, window_long):  # math.prod() would break compiled graphs in two
        factor *= 1 + 0.2 * math.log(b / a)
    return factor


def rope_table(cfg: Config, seq_len: int, window_long: int = 0) -> tuple[Tensor, Tensor]:
    """
    cos and sin [T, K/2] in fp32 for the half-split layout (dim k turns with dim k + K/2).
    truncated: the first K/4 frequencies run base^-linspace(0, 1), the others stand still
    (modded-nanogpt, @YouJiacheng). standard, interleaved: base^(-2k/R) on the first R dims (Su et
    al. 2021). R is rope_dims, and rotate() leaves the others alone. yarn: where the window has
    grown from a to b, what turned less than once in a slows down by a/b, what turned 32 times or
    more stays (Peng et al. 2023).
    """
    k = head_width(cfg) if cfg.rope == "truncated" else rotary_dims(cfg)
    if cfg.rope == "truncated":
        turning = (1 / cfg.rope_base) ** torch.linspace(0, 1, k // 4, dtype=torch.float32)
        freqs = torch.cat([turning, turning.new_zeros(k // 4)])
    else:
        freqs = (1 / cfg.rope_base) ** (torch.arange(0, k, 2, dtype=torch.float32) / k)
    for a, b in yarn_growths(cfg, window_long):
        stays = ((a * freqs / (2 * math.pi) - 1) / 31).clamp(0, 1)
        freqs = freqs * (a / b + stays * (1 - a / b))
    theta = torch.outer(torch.arange(seq_len, dtype=torch.float32), freqs)
    return theta.cos(), theta.sin()


def rope_tables(cfg: Config, seq_len: int) -> tuple[Tensor, Tensor]:
    """
    rope_table(), with yarn one for each value of window_long; twice as long where pairs of heads
    have two positions a token.
    """
    if cfg.paired_layers:
        seq_len *= 2
    if not cfg.yarn:
        return rope_table(cfg, seq_len)
    cos, sin = zip(*(rope_table(cfg, seq_len, window) for window in yarn_stages(cfg)))
    return torch.stack(cos), torch.stack(sin)


def offset_dims(cfg: Config) -> list[tuple[int, int]]:
    """
    Stretches of a key's dims, in rotate()'s order, that key_offset takes from the token before.
    still: those without a rotation (modded-nanogpt #49), where a query that matches a token lands
    on the one behind it. second: the second dim of each pair, as all dims are paired there, so half
    of the still ones and half of those that turn (slowrun).
    """
    k = head_width(cfg)
    if cfg.rope == "truncated":  # of the k/2 pairs, half stand still
        spans = [(k // 4, k // 2), (3 * k // 4, k)] if cfg.key_offset == "still" else [(k // 2, k)]
    else:
        turning = rotary_dims(cfg)
        half = (turning + k) // 2  # the middle of the dims that stand still
        spans = (
            [(turning, k)] if cfg.key_offset == "still" else [(turning // 2, turning), (half, k)]
        )
    return [(low, high) for low, high in spans if low < high] if cfg.key_offset else []


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (k, k + R/2) of the first R dims by its position's angle; in fp32."""
    half = cos.size(-1)
    # [..., 2, R/2]: halves that cat() puts together take a CPU three times as long backward
    x, still = x_BTHK[..., : 2 * half].unflatten(-1, (2, half)).float(), x_BTHK[..., 2 * half :]
    cos, sin = (table[: x.size(1), None, None] for table in (cos, sin))
    sign = 1 - 2 * torch.arange(2, device=x.device)[:, None]
    turned = (x * cos + x.flip(-2) * (sin * sign)).flatten(-2).to(x_BTHK.dtype)
    return torch.cat([turned, still], dim=-1) if still.size(-1) else turned


def rotate_pairs(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Head h of token t turns by the angle of position 2t + h mod 2 (modded-nanogpt #58)."""
    x = x_BTHK.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)  # B 2T H/2 K
    return rotate(x, cos, sin).unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


def as_pairs(x_BTHK: Tensor) -> Tensor:
    """[B, 2T, H/2, K]: head h of token t at position 2t + h // (H/2), as head h mod H/2."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.reshape(B, 2 * T, H // 2, K)


def half_split(x_BTHK: Tensor, dims: int) -> Tensor:
    """Neighbours (2k, 2k + 1) -> rotate()'s pairs. Products of q and k see no order."""
    return torch.cat([x_BTHK[..., 1:dims:2], x_BTHK[..., 0:dims:2], x_BTHK[..., dims:]], dim=-1)


LONG_ROW = 4096  # tokens, beyond which nothing of T x T is kept


def visible(
    q_pos: Tensor, k_pos: Tensor, q_doc: Tensor | None, k_doc: Tensor | None, window: int
) -> Tensor:
    """
    The mask rule of every attention path: no future. window > 0: the last `window` keys alone.
    q_doc: and those of the own document.
    """
    ok = q_pos >= k_pos
    if window:
        ok = ok & (q_pos - k_pos < window)
    if q_doc is not None:
        ok = ok & (q_doc == k_doc)
    return ok


def seen_by(pos: Tensor, docs: Tensor | None, window: int, rows: slice, cols: slice) -> Tensor:
    """
    visible() of the queries in `rows` and the keys in `cols`. pos: 0 to T - 1. docs [B, T]: then
    the result has a batch, [B, 1, rows, cols].
    """
    q_doc, k_doc = None, None
    if docs is not None:
        q_doc, k_doc = docs[:, None, rows, None], docs[:, None, None, cols]
    return visible(pos[rows, None], pos[cols], q_doc, k_doc, window)


@functools.cache
def compiled(function):
    """The function compiled, when it is first needed and not at import."""
    return torch.compile(function, dynamic=False)


def compiled_on_gpu(function, like: Tensor):
    """
    For the two functions below, which a GPU must run compiled, also where the model is eager. Where
    compiling is off (set_stance("force_eager")) or gives up (too many lengths) they do without
    flex_attention and its mask.
    """
    return compiled(function) if like.is_cuda and not torch.compiler.is_compiling() else function


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, window: int, scale: float, mask=None
) -> Tensor:
    """
    Attention [B, H, T, K] through flex_attention, which skips blocks without a visible pair. To be
    compiled: else it builds all T x T scores, 103 GB for remix's rows. `mask` is flex_mask's,
    shared by all layers of one window. k and v may have fewer heads: kv_heads.
    """
    mask = flex_mask(q, docs, window) if mask is None else mask
    if mask is None or (q.is_cuda and not torch.compiler.is_compiling()):
        return attend_blocks(q, k, v, docs, window, scale)
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


def flex_mask(q: Tensor, docs: Tensor | None, window: int):
    """The mask rule as flex_attention wants it. None where compiled_on_gpu() does not compile."""

    def rule(b, h, i, j):
        return visible(
            i,
            j,
            docs[b, i] if docs is not None else None,
            docs[b, j] if docs is not None else None,
            window,
        )

    return compiled_on_gpu(block_mask, q)(rule, q, docs is not None)


def block_mask(rule, q: Tensor, by_row: bool):
    if q.is_cuda and not torch.compiler.is_compiling():
        return None
    rows, length = q.size(0) if by_row else None, q.size(-2)
    return create_block_mask(rule, rows, None, length, length, device=q.device)


class DotProducts(torch.autograd.Function):
    """
    q @ k.mT of queries [..., rows, K] and keys [..., cols, K]. By itself autograd makes the keys'
    gradient the other way around, [..., K, cols], in which a CPU's norm behind it strides.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        return q @ k.mT

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        return grad @ k, grad.mT @ q


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    docs: Tensor | None,
    window: int,
    scale: float,
    bound: float = math.inf,
    seen: Tensor | None = None,
) -> Tensor:
    """
    Attention [B, H, T, K] with plain matmuls: queries in blocks, each against the keys that it may
    see. Exact, runs everywhere, differentiable; compiled it trains faster on a CPU than SDPA, whose
    backward is slow there (tests/bench_textbook.py --attention). Long rows with a window are for
    attend_bands(). bound: no score is beyond +- it; where that is small, as it is behind QK norm,
    exp cannot overflow and the pass for each row's maximum is saved. seen: what all queries see,
    where that was made already, see seen_by().
    """
    B, H, T, K = q.shape
    if k.size(1) != H:
        k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))
    if T > LONG_ROW and T >= 2 * window > 0:
        return attend_bands(q, k, v, docs, window, scale)
    pos = torch.arange(T, device=q.device, dtype=torch.int32)
    size, outs = max(128, T // 64), []

    def of_block(q: Tensor, k: Tensor, v: Tensor, rows: slice, cols: slice) -> Tensor:
        ok = seen_by(pos, docs, window, rows, cols) if seen is None else seen[..., rows, cols]
        scores = DotProducts.apply(q, k).float()
        if bound <= 40:
            p = torch.where(ok, scores.exp(), 0.0)
            return ((p.to(v.dtype) @ v).float() / p.sum(-1, keepdim=True)).to(v.dtype)
        return scores.masked_fill(~ok, -torch.inf).softmax(-1).to(v.dtype) @ v

    for start, block in zip(range(0, T, size), (q * scale).split(size, dim=2)):
        first = max(0, start - window + 1) // size * size if window else 0
        rows, cols = slice(start, start + block.size(2)), slice(first, start + block.size(2))
        part = block, k[:, :, cols], v[:, :, cols], rows, cols
        outs.append(recomputed(of_block, *part) if T > LONG_ROW else of_block(*part))
    return torch.cat(outs, dim=2)


def recomputed(function, *args):
    """function(*args), of which the backward pass keeps the arguments alone."""
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def attend_bands(
    q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, window: int, scale: float
) -> Tensor:
    """
    Attention in bands of `window` queries against 2*window keys, a sixteenth of all bands at a
    time, which the backward pass computes again: what is kept grows with T, and neither with T*T
    nor T*window.
    """
    B, H, T, K = q.shape
    pad = -T % window
    n = (T + pad) // window

    # [..., T, K] -> [..., n, 2*window, K], a band before the first
    def keys(x: Tensor, fill: int = 0) -> Tensor:
        x = F.pad(x, (0, 0, window, pad), value=fill)
        return torch.cat(
            [
                x[..., :-window, :].unflatten(-2, (n, window)),
                x[..., window:, :].unflatten(-2, (n, window)),
            ],
            -2,
        )

    q_bands = F.pad(q, (0, 0, 0, pad)).unflatten(2, (n, window))
    q_pos = torch.arange(T + pad, device=q.device).view(1, 1, n, window, 1)
    pos = torch.arange(T, device=q.device, dtype=torch.int32).view(1, 1, T, 1)
    # padding lies before every window
    k_pos = keys(pos, fill=-(4 * window + T)).mT

    def of_bands(q: Tensor, k: Tensor, v: Tensor, q_pos, k_pos, q_doc=None, k_doc=None) -> Tensor:
        ok = visible(q_pos, k_pos, q_doc, k_doc, window)
        # finite: padded queries may see nothing
        scores = ((q * scale) @ k.mT).float().masked_fill(~ok, -1e30)
        return scores.softmax(-1).to(v.dtype) @ v

    each = -(-n // 16)
    whole = [q_bands, keys(k), keys(v), q_pos, k_pos]
    if docs is not None:
        whole.append(F.pad(docs, (0, pad)).view(B, 1, n, window, 1))
        whole.append(keys(docs.view(B, 1, T, 1), fill=-1).mT)
    parts = zip(*(x.split(each, dim=2) for x in whole))
    out = torch.cat([recomputed(of_bands, *part) for part in parts], dim=2)
    return out.flatten(2, 3)[:, :, :T]


Start = Callable[[torch.Size, torch.Generator], Tensor]  # draws an initial value in fp32
# A matrix's name, what it is multiplied with and the product -> what is used as the product.
Watch = Callable[[str, Tensor, Tensor], Tensor]


class Declared(NamedTuple):
    """What is said of a parameter at the line that makes it."""

    group: str  # matrix, embed, head or scalar; rule_of() says how each is updated
    start: float | Start  # its initial value
    rate: float = 1.0  # of AdamW: factor on the group's learning rate
    betas: tuple[float, float] | None = None  # of AdamW, where they are not beta1 and beta2


class Declaring(nn.Module):
    """
    A module that makes its parameters by declare(), and no others: what else is said of parameters
    (initial values, groups of the optimizer, ...) is read from there.
    """

    def __init__(self):
        super().__init__()
        self.declared: dict[str, Declared] = {}
        self.prefix = ""  # of the module within the model, with a dot behind it
        self.watch: Watch | None = None  # see watching()
        self.in_fp8: set[str] = set()  # its maps of cfg.fp8, where the device has 8 bits
        self.biased: set[str] = set()  # its maps with a bias, see declare_bias()

    def declare(
        self,
        name: str,
        group: str,
        start: float | Start,
        *shape: int,
        on: object = True,
        rate: float = 1.0,
        betas: tuple[float, float] | None = None,
    ) -> None:
        """Make the parameter `name`. on: else the attribute is None."""
        assert group in ("matrix", "embed", "head", "scalar"), f"{name}: no group is called {group}"
        self.register_parameter(name, nn.Parameter(torch.empty(shape)) if on else None)
        if on:
            self.declared[name] = Declared(group, start, rate, betas)

    def declare_bias(
        self,
        name: str,
        start: float | Start,
        *shape: int,
        rate: float = 1.0,
        betas: tuple[float, float] | None = None,
    ) -> None:
        """Make what linear() adds to the products with the matrix `name`."""
        self.biased.add(name)
        self.declare(f"{name}_bias", "scalar", start, *shape, rate=rate, betas=betas)

    def linear(self, x: Tensor, name: str, w: Tensor | None = None) -> Tensor:
        """
        x [..., cols] times the matrix `name` [rows, cols], or a stack of matrices as if they were
        one. w: the same matrix in another type.
        """
        w = getattr(self, name).flatten(0, -2) if w is None else w
        product = fp8_linear if name in self.in_fp8 and torch.is_grad_enabled() else linear
        y = product(x, w, getattr(self, f"{name}_bias") if name in self.biased else None)
        return y if self.watch is None else self.watch(self.prefix + name, x, y)


@contextlib.contextmanager
def watching(model: nn.Module, watch: Watch):
    """Inside, watch() sees every product with a declared matrix, by name, and may change it."""
    modules = [module for module in model.modules() if isinstance(module, Declaring)]
    for module in modules:
        module.watch = watch
    try:
        yield
    finally:
        for module in modules:
            module.watch = None


def declarations(model: nn.Module) -> dict[str, Declared]:
    """What every parameter of a model is, by name. None has a default: it would get any rate."""
    found = {}
    for path, module in model.named_modules():
        for name, said in getattr(module, "declared", {}).items():
            found[f"{path}.{name}".lstrip(".")] = said
    for name, _ in model.named_parameters():
        assert name in found, f"parameter {name} has neither start nor group: make it by declare()"
    return found


def uniform(bound: float) -> Start:
    return lambda shape, rng: torch.rand(shape, generator=rng) * (2 * bound) - bound


def normal(std: float) -> Start:
    return lambda shape, rng: torch.randn(shape, generator=rng) * std


def xavier(joined: bool = False) -> Start:
    """
    Normal with variance 2/(fan in + fan out). Joined: a stack, such as q, k and v, is one map, as
    in Wortsman et al. 2023.
    """

    def draw(shape: torch.Size, rng: torch.Generator) -> Tensor:
        fan_out = math.prod(shape[:-1]) if joined else shape[-2]
        return torch.randn(shape, generator=rng) * (2 / (shape[-1] + fan_out)) ** 0.5

    return draw


def identities(shape: torch.Size, rng: torch.Generator) -> Tensor:
    return torch.eye(shape[-1]).expand(shape)


def one_and_zero(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """All of x, nothing of the embedding."""
    return torch.stack([torch.ones(shape[1]), torch.zeros(shape[1])])


def numbers(*values: float) -> Start:
    return lambda shape, rng: torch.tensor(values, dtype=torch.float32).view(shape)


def sa_start(cfg: Config) -> Start:
    return numbers(*map(float, cfg.sa_lambdas.split()))


def spread(cfg: Config, std: float) -> Start:
    """Around zero with this standard deviation, as `init` says: uniform or normal."""
    return normal(std) if cfg.init == "normal" else uniform(3**0.5 * std)


def plain_map(cfg: Config) -> Start:
    """Of standard deviation 1/sqrt(dim)."""
    return xavier() if cfg.init == "xavier" else spread(cfg, cfg.dim**-0.5)


def bias_start(cfg: Config) -> float | Start:
    """Of maps of the activations [dim]."""
    return spread(cfg, cfg.bias_init * cfg.dim**-0.5) if cfg.bias_init else 0.0


def head_start(cfg: Config) -> float | Start:
    """head_init; a tied table must not start at zero, as it is the input as well."""
    if cfg.init == "xavier":
        return xavier()
    if is_number(cfg.head_init):
        return normal(float(cfg.head_init))
    return 0.0 if cfg.head_init == "zero" and not cfg.tie_embed else uniform(cfg.dim**-0.5)


def initial_value(name: str, declared: Declared, shape: torch.Size, seed: int) -> Tensor:
    """
    Initial value of one parameter in fp32, drawn from a generator of its own: a flag that adds a
    parameter does not change the others.
    """
    if isinstance(declared.start, (int, float)):
        return torch.full(shape, float(declared.start))
    return declared.start(shape, generator_of(f"{seed} {name}"))


def generator_of(text: str) -> torch.Generator:
    """Numbers of chance that depend on this text alone."""
    own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
    return torch.Generator().manual_seed(own)


def score_bound(cfg: Config) -> float:
    """
    No attention score is beyond +- this. Normed queries and keys have length sqrt(K) at most, and
    rotation keeps it (1 %: rounding in bfloat16).
    """
    if not cfg.qk_norm or cfg.q_gain or cfg.layer_norm:
        return math.inf
    return 1.01 * head_width(cfg) * (cfg.attn_scale or head_width(cfg) ** -0.5)


class Attention(Declaring):
    def __init__(self, cfg: Config, index: int, values: bool):
        super().__init__()
        offset = bool(cfg.key_offset) and has_key_offset(cfg, index)
        self.offset = offset_dims(cfg) if offset else []
        self.paired = bool(cfg.paired_layers) and index in blocks_of(cfg.paired_layers)
        self.heads, self.kv_heads, self.head_dim = (
            cfg.heads,
            cfg.kv_heads or cfg.heads,
            head_width(cfg),
        )
        self.eps, self.qk_norm = cfg.norm_eps, bool(cfg.qk_norm)
        self.scale = cfg.attn_scale or self.head_dim**-0.5
        self.bound = score_bound(cfg)
        inner, inner_kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        by_xavier, one_map = cfg.init == "xavier", cfg.kv_heads in (0, cfg.heads)
        # Remix (modded-nanogpt): a standard deviation of 0.5/sqrt(dim), and outputs of zero.
        start = spread(cfg, (cfg.init_std or 0.5) * cfg.dim**-0.5)
        start = xavier(joined=True) if by_xavier else start
        # Three matrices, or one and two: Muon treats each by itself.
        grouped = bool(cfg.qk_groups)
        self.declare("qkv", "matrix", start, 3, inner, cfg.dim, on=one_map and not grouped)
        self.declare("q", "matrix", start, inner, cfg.dim, on=not one_map)
        self.declare("kv", "matrix", start, 2, inner_kv, cfg.dim, on=not one_map)
        # Of queries and then of keys, each of some heads (modded-nanogpt #80); values as a whole.
        of = cfg.qk_groups or self.heads
        stack = (2 * self.heads // of, of * self.head_dim, cfg.dim)
        self.declare("qk", "matrix", start, *stack, on=grouped)
        self.declare("v", "matrix", start, inner, cfg.dim, on=grouped)
        std = 0.02 / (2 * cfg.depth) ** 0.5 if by_xavier else cfg.proj_init * cfg.dim**-0.5
        way = normal(std)
        if cfg.attn_proj_init:  # modded-nanogpt #64
            way = spread(cfg, cfg.attn_proj_init * cfg.dim**-0.5)
        self.declare("proj", "matrix", way, cfg.dim, inner)
        if cfg.biases:
            start = bias_start(cfg)
            if one_map:
                self.declare_bias("qkv", start, 3, inner)
            else:
                self.declare_bias("q", start, inner)
                self.declare_bias("kv", start, 2, inner_kv)
            self.declare_bias("proj", 0.0, cfg.dim)
        self.declare("q_gain", "scalar", cfg.q_gain, cfg.heads, on=cfg.q_gain)
        gains = cfg.layer_norm and cfg.qk_norm
        self.declare("qk_gains", "scalar", 1.0, 2, self.head_dim, on=gains)
        self.neighbours = rotary_dims(cfg) if cfg.rope == "interleaved" else 0
        self.declare_by_index(cfg, index, values)

    def declare_by_index(self, cfg: Config, index: int, values: bool) -> None:
        """What some blocks have and others do not."""
        # In conditions first comes what the flags alone decide: a script is made without that.
        gated = cfg.attn_gate and has_attn_gate(cfg, index)
        self.declare("attn_gate", "matrix", 0.0, cfg.heads, cfg.attn_gate, on=gated)
        joins = has_given_values(cfg, index) or values
        self.has_values = bool(cfg.value_proj or cfg.value_layers or cfg.mudd) and joins
        # dims that it reads of the input and of the values
        self.value_dims = gate_dims(cfg, index, values) if self.has_values else (0, 0)
        shape = (self.kv_heads, sum(self.value_dims))
        has_dims = bool(cfg.value_proj or cfg.value_gate) and shape[1] > 0
        self.declare("value_gate", "matrix", 0.0, *shape, on=has_dims and self.has_values)
        self.declare("iha", "scalar", identities, 3, cfg.heads, cfg.heads, on=cfg.iha)
        own = {"rate": 0.8, "betas": (0.9, 0.95)}  # slowrun's
        self.has_alpha = bool(cfg.xsa_learned) and has_xsa_alpha(cfg, index)
        self.steered = bool(cfg.gate_nets) and net_of(cfg, index) >= 0
        self.has_given_gate = bool(cfg.gate_nets) and has_given_gate(cfg, index)
        has_own = not self.steered and self.has_alpha
        self.declare("xsa_alpha", "scalar", 0.0, cfg.heads, on=cfg.xsa_learned and has_own, **own)
        usual = {"betas": (0.9, 0.99)}  # modded-nanogpt's
        scaled = cfg.sa_lambdas and index < cfg.depth
        self.declare("sa_lambdas", "scalar", sa_start(cfg), 2, on=scaled, **usual)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask,
        xsa: bool,
        values: Tensor | None = None,
        given: dict | None = None,
    ) -> Tensor:
        """
        x [B, T, D] -> [B, T, D]. `values` [B, T, kv_heads*K] join the own ones, times 2*sigmoid of
        a head's gate where there is a value_gate. given: numbers by token and head of gate_nets.
        """
        B, T, _ = x_BTD.shape
        if self.iha is not None:  # a mixture is none of the matrices: nobody watches it
            mixed = self.iha @ self.qkv.view(3, self.heads, -1)
            qkv = linear(x_BTD, mixed.view(-1, x_BTD.size(-1)))
        elif self.qkv is not None:
            qkv = self.linear(x_BTD, "qkv")
        elif self.qk is not None:
            qkv = torch.cat([self.linear(x_BTD, "qk"), self.linear(x_BTD, "v")], dim=-1)
        else:
            qkv = torch.cat([self.linear(x_BTD, "q"), self.linear(x_BTD, "kv")], dim=-1)
        if self.sa_lambdas is not None:
            qkv = self.sa_lambdas[0].to(qkv.dtype) * qkv
        qkv = qkv.view(B, T, -1, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.has_values:
            v = self.with_values(v, x_BTD, values)
        if self.qk_norm:
            q_scale, k_scale = self.qk_gains if self.qk_gains is not None else (None, None)
            q, k = layer_norm(q, self.eps, q_scale), layer_norm(k, self.eps, k_scale)
        if self.neighbours:
            q, k = half_split(q, self.neighbours), half_split(k, self.neighbours)
        turn = rotate_pairs if self.paired else rotate
        q, k = turn(q, *rope), turn(k, *rope)
        if self.q_gain is not None:
            q = q * self.q_gain[:, None].to(q.dtype)
        if self.offset:
            k = self.shifted(k, mask.keys_before(k))
        q_BHTK, k_BHTK, v_BHTK = (
            (as_pairs(x) if self.paired else x).transpose(1, 2) for x in (q, k, v)
        )
        y = mask.attend(q_BHTK, k_BHTK, v_BHTK, self.scale, self.bound).transpose(1, 2)
        if self.paired:
            y = y.reshape(B, T, self.heads, self.head_dim)
        if xsa:
            y = self.without_own(y, v, given)
        if self.attn_gate is not None:
            few = x_BTD[..., : self.attn_gate.size(1)]
            y = y * torch.sigmoid(self.linear(few, "attn_gate")).unsqueeze(-1)
        if self.has_given_gate:
            y = y * given["gate"].unsqueeze(-1)
        y = self.linear(y.reshape(B, T, -1), "proj")
        return y if self.sa_lambdas is None else self.sa_lambdas[1].to(y.dtype) * y

    def shifted(self, k: Tensor, before: Tensor) -> Tensor:
        """Keys of which some dims are those of the keys before them."""
        parts, at = [], 0
        for low, high in self.offset:
            parts += [k[..., at:low], before[..., low:high]]
            at = high
        return torch.cat([*parts, k[..., at:]], dim=-1)

    def with_values(self, v: Tensor, x_BTD: Tensor, values: Tensor) -> Tensor:
        """Values v [B, T, H, K] and those that come from outside, [B, T, H*K], by their gate."""
        values = values.view_as(v)
        if self.value_gate is None:
            return v + values
        few = x_BTD[..., : self.value_dims[0]]
        if self.value_dims[1]:
            few = torch.cat([few, values.flatten(2)[..., : self.value_dims[1]]], dim=-1)
        gate = 2 * torch.sigmoid(self.linear(few, "value_gate"))
        return v + gate.unsqueeze(-1) * values

    def without_own(self, y: Tensor, v: Tensor, given: dict | None) -> Tensor:
        """
        Each head's output without its component along the token's own value (arXiv 2603.09078), or
        without tanh(alpha) of it (slowrun #11, modded-nanogpt #82). y: [B, T, H, K].
        """
        v_hat = F.normalize(v.float(), dim=-1).unsqueeze(3)  # B T kv_heads 1 K
        y = y.float().unflatten(2, (self.kv_heads, -1))
        own = (y * v_hat).sum(-1, keepdim=True) * v_hat
        if self.has_alpha:
            alpha = given["xsa"] if self.steered else self.xsa_alpha
            own = torch.tanh(alpha.float()).unflatten(-1, (self.kv_heads, -1, 1)) * own
        return (y - own).flatten(2, 3).to(v.dtype)


class MLP(Declaring):
    """Two maps and an activation between them."""

    def __init__(self, cfg: Config):
        super().__init__()
        hidden = hidden_width(cfg)
        self.gated = cfg.activation == "swiglu"
        width, by_xavier = cfg.dim**-0.5, cfg.init == "xavier"
        # 3**-0.5: uniform in +-1/sqrt(dim), torch.nn.Linear's own start
        start = spread(cfg, (cfg.init_std or 3**-0.5) * width)
        stack = (hidden, cfg.dim)
        if self.gated:  # its matrix and the other one, a stack of two as q, k, v are one of three
            stack = (2, hidden, cfg.dim)
        self.declare("fc", "matrix", xavier() if by_xavier else start, *stack)
        start = xavier() if by_xavier else normal(cfg.proj_init * width)
        self.declare("proj", "matrix", start, cfg.dim, hidden)
        if cfg.biases:
            self.declare_bias("fc", bias_start(cfg), *stack[:-1])
            self.declare_bias("proj", 0.0, cfg.dim)
        self.slope = 0.5 if cfg.activation == "leaky_relu2" else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:  # SwiGLU (Shazeer 2020)
            gate, h = self.linear(x, "fc").chunk(2, dim=-1)
            return self.linear(F.silu(gate) * h, "proj")
        h = self.linear(x, "fc")
        h = F.leaky_relu(h, self.slope) if self.slope else F.relu(h)
        return self.linear(h.square(), "proj")  # squared (So et al. 2021)


class Block(Declaring):
    """
    Attention and MLP, with the vectors that steer them. One that loop_span() has inside is applied
    at several places. value_proj: counted from the last one, every second block has one; that of
    MTP (index = depth) has none, and no lambdas.
    """

    def __init__(self, cfg: Config, index: int):
        super().__init__()
        self.eps, self.norm = cfg.norm_eps, layer_norm if cfg.layer_norm else norm
        self.attn_dropout, self.mlp_dropout = cfg.attn_dropout, cfg.mlp_dropout
        values = bool(cfg.value_proj) and has_value_proj(cfg, index)
        self.no_attn = bool(cfg.no_attn_layers) and not has_attention(cfg, index)
        self.no_mlp = bool(cfg.no_mlp_layers) and index in blocks_of(cfg.no_mlp_layers)
        self.attn = None if self.no_attn else Attention(cfg, index, values)
        self.mlp = None if self.no_mlp else MLP(cfg)
        inner_kv = (cfg.kv_heads or cfg.heads) * head_width(cfg)
        self.declare("value_proj", "matrix", plain_map(cfg), inner_kv, cfg.dim, on=values)
        self.is_late = bool(cfg.late_input) and is_late(cfg, index)
        self.values_given = bool(cfg.value_layers or cfg.mudd) and has_given_values(cfg, index)
        self.declare_lambdas(cfg, index)
        self.declare("mix", "scalar", one_and_zero, 2, cfg.dim, on=cfg.block_scales)
        self.declare("scales", "scalar", 1.0, 2, cfg.dim, on=cfg.block_scales)
        self.declare("gains", "scalar", 1.0, 2, cfg.dim, on=cfg.layer_norm or cfg.norm_gain)

    def declare_lambdas(self, cfg: Config, index: int) -> None:
        """Factors on the residual stream: one of the block's. With post_lambda, one by branch."""
        counted = index < cfg.depth
        self.by_branch = bool(cfg.post_lambda) and counted
        self.in_mudd = bool(cfg.mudd) and is_in_mudd(cfg, index)
        # whether the embedding joins, and by a share that is given by token
        self.has_share = bool(cfg.x0_lambda or cfg.x0_layers or cfg.mudd) and has_share(cfg, index)
        steered = bool(cfg.gate_nets) and net_of(cfg, index) >= 0
        self.share_given = self.in_mudd or steered and self.has_share
        self.bigram_given = bigram_by_nets(cfg) and has_bigram_given(cfg, index)
        own = not self.share_given and self.has_share
        on = (cfg.x0_lambda or cfg.x0_layers) and own
        self.declare("x0_lambda", "scalar", cfg.x0_lambda, 1, on=on)
        # A branch that is missing has no factors, but for what the embedding's share joins.
        branches = 2 - self.no_attn - self.no_mlp
        factors = branches + (self.no_attn and self.has_share) if self.by_branch else 1
        scaled = cfg.resid_lambda and not self.in_mudd and factors > 0 and counted
        self.declare("resid_lambda", "scalar", cfg.resid_lambda, factors, on=scaled)
        usual = {"rate": 0.2, "betas": (0.9, 0.95)}  # modded-nanogpt's
        scaled_by_branch = cfg.post_lambda and not self.in_mudd and branches > 0 and counted
        start = cfg.post_lambda
        self.declare("post_lambda", "scalar", start, branches, on=scaled_by_branch, **usual)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        added: list[tuple[Tensor, Tensor]],
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask,
        xsa: bool,
        shrink: Tensor | None = None,
        keep: Tensor | None = None,
        given: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """
        x [B, T, D] -> [B, T, D]. x0: the embedding. added: pairs of a learned factor ([D], or by
        token) and what it scales. shrink: what the normed inputs of both branches are multiplied
        with. keep: a truth value [], whether the block takes part (stoch_depth, Huang et al. 2016,
        here without rescaling). given: by name, what is not the block's own: values, the source
        that attention reads, and factors by token of nets.
        """

        def branch(x: Tensor, gain: Tensor | None) -> Tensor:
            x = self.norm(x, self.eps, gain)
            return x if shrink is None else x * shrink.to(x.dtype)

        for scale, term in added:
            x = x + scale.to(x.dtype) * term
        first, second = self.gains if self.gains is not None else (None, None)
        if self.resid_lambda is not None and not self.by_branch:
            x = self.resid_lambda.to(x.dtype) * x
        share = self.x0_lambda
        if self.share_given:
            share = given["x0"]
        if self.has_share and not self.by_branch:
            x = x + share.to(x.dtype) * x0
        if self.bigram_given and not self.by_branch:
            x = x + given["bigram"]
        values = given["values"] if self.values_given else None
        if self.value_proj is not None:
            values = self.linear(x0, "value_proj")
        if self.mix is not None:
            mix = self.mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x0
        skipped = x
        if not self.no_attn:
            read = branch(given["source"] if self.is_late else x, first)
            y = self.attn(read, rope, mask, xsa, values, given)
            x = self.joined(x, self.drop(y, self.attn_dropout), 0, given)
        elif self.by_branch and self.has_share and self.resid_lambda is not None:
            x = self.resid_lambda[0].to(x.dtype) * x
        if self.has_share and self.by_branch:
            x = x + share.to(x.dtype) * x0
        if self.bigram_given and self.by_branch:
            x = x + given["bigram"]
        if not self.no_mlp:
            y = self.mlp(branch(x, second))
            x = self.joined(x, self.drop(y, self.mlp_dropout), 1, given)
        return x if keep is None else torch.where(keep, x, skipped)

    def joined(self, x: Tensor, y: Tensor, half: int, given: dict | None) -> Tensor:
        """The stream with the output of attention (half 0) or of the MLP (1), both scaled."""
        if self.mix is not None:
            y = self.scales[half].to(x.dtype) * y
        if self.by_branch:  # where a branch is missing, the other's factor is both first and last
            resid, post = self.resid_lambda, self.post_lambda
            if self.in_mudd:
                resid, post = given["resid"], given["post"]
            y = post[-half].to(x.dtype) * y
            if resid is not None:
                x = resid[-half].to(x.dtype) * x
        return x + y

    def drop(self, y: Tensor, share: float) -> Tensor:
        """Dropout where gradients are recorded: evaluation and sampling run without."""
        return F.dropout(y, share) if share and torch.is_grad_enabled() else y


class AttentionMask:
    """What the tokens of a batch may see, made once for all layers of one window."""

    def __init__(self, docs_BT: Tensor | None, window: int, like: Tensor, sharp: float = 1.0):
        self.docs, self.window = docs_BT, 0 if window >= like.size(1) else window
        self.sharp = sharp  # YaRN's factor on scores
        self.plain = docs_BT is None and not self.window
        self.on_gpu = like.is_cuda
        self.seen: Tensor | None = None
        if not self.on_gpu and like.size(1) <= LONG_ROW:
            pos = torch.arange(like.size(1), device=like.device, dtype=torch.int32)
            self.seen = seen_by(pos, docs_BT, self.window, slice(None), slice(None))
        self.flex = (
            flex_mask(like, docs_BT, self.window) if self.on_gpu and not self.plain else None
        )

    def keys_before(self, k_BTHK: Tensor) -> Tensor:
        """Of each token the key of the one before it in the row; the first has its own."""
        return torch.cat([k_BTHK[:, :1], k_BTHK[:, :-1]], dim=1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bound: float = math.inf
    ) -> Tensor:
        scale, bound = scale * self.sharp, bound * self.sharp
        if not self.on_gpu:
            return attend_blocks(q, k, v, self.docs, self.window, scale, bound, self.seen)
        if self.plain:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1)
            )
        return compiled_on_gpu(attend_flex, q)(q, k, v, self.docs, self.window, scale, self.flex)


def layer_order(cfg: Config, repeats: int) -> list[int]:
    """
    The blocks in order of application: the looped span stands `repeats` times, the others once.
    """
    low, high = loop_span(cfg)
    return [*range(low), *list(range(low, high)) * repeats, *range(high, cfg.depth)]


class Added(NamedTuple):
    """
    An earlier output that a place adds to its input: from where, and the row of its learned scale.
    """

    source: int
    row: int | tuple[int, int]


class TokenNet(Declaring):
    """A few numbers by token [B, T, n], which begin at `starts` whatever the token."""

    def __init__(self, cfg: Config, starts: list[float], rate: float):
        super().__init__()
        matrices, own = {"rate": 20 * rate, "betas": (0.9, 0.99)}, {"betas": (0.9, 0.99)}
        start = spread(cfg, (3 * cfg.dim) ** -0.5)
        self.declare("fc", "matrix", start, cfg.net_hidden, cfg.dim, **matrices)
        self.declare("proj", "matrix", 0.0, len(starts), cfg.net_hidden, **matrices)
        biases = numbers(*(start / NET_SCALE for start in starts))
        self.declare_bias("proj", biases, len(starts), rate=rate, **own)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(self.linear(x, "fc")), "proj")


def token_nets(cfg: Config) -> nn.ModuleList:
    """Of gate_nets."""
    nets = [net_lanes(cfg, net) for net in range(len(blocks_of(cfg.gate_nets)))]
    starts = [[lane.start for lane in net for _ in range(lane.count)] for net in nets]
    return nn.ModuleList(TokenNet(cfg, net, 0.02) for net in starts)


class Pairs(NamedTuple):
    """What blocks of pairs of heads attend by: rotations, masks of S blocks and of L blocks."""

    rope: tuple[Tensor, Tensor]
    near: AttentionMask
    far: AttentionMask


class Place(NamedTuple):
    """One application of a block in the forward pass, and all that is fixed about it."""

    block: int
    visit: int  # how often the block was applied before
    row: int  # of what is learned by place: loop_embed, value_scales
    windowed: bool  # whether a token sees `window` keys, where that is set; else the whole row
    skip: Added | None  # of the U-net, by a row of skips
    last_visit: Added | None  # the block's own last output, by a row of cross_scales
    xsa: bool  # exclusive self-attention
    shrink: float  # layer_scale's factor on the normed inputs of both branches
    drop: float  # the chance of stochastic depth that a training pass leaves it out
    paired: bool = False  # attention has two positions a token
    table: int = -1  # of value_layers; -1: none
    net: int = -1  # of gate_nets, that reads its input; -1: none
    is_late: bool = False  # attention reads late_input's block
    in_mudd: bool = False
    gated: Added | None = None  # of skip_gate: from which block, by a row of skip_lambdas
    is_kept: bool = False  # whether its output is used behind the next place, by its block
    is_added: bool = False  # whether a later place adds its output


def wiring(cfg: Config, repeats: int) -> list[Place]:
    """
    The forward pass of a configuration as data: its places in order. `python logs/dry_run.py
    --config PRESET --wiring` prints it.
    """
    order = layer_order(cfg, repeats)
    deepest = len(layer_order(cfg, largest(cfg.repeats)))
    last: dict[int, int] = {}  # of each block, the place where it was applied last
    places, kept, tables = [], kept_blocks(cfg), value_tables(cfg)
    paired, nets = blocks_of(cfg.paired_layers), blocks_of(cfg.gate_nets)
    visits = dict.fromkeys(order, 0)
    for at, block in enumerate(order):
        visit = visits[block]
        visits[block] += 1
        # loop_embed and value_scales have as many rows as the deepest order: up to the loop's end
        # they are counted from the front, behind it from the back. So each keeps its place when
        # depth grows. (Skips do not: their rows are counted from the middle.)
        row = at + deepest - len(order) if block >= loop_span(cfg)[1] else at
        last_visit = None
        if cfg.cross_repeat and visit:
            last_visit = Added(last[block], (block - loop_span(cfg)[0], visit - 1))
        place = Place(
            block=block,
            visit=visit,
            row=row,
            windowed=is_windowed(cfg, block),
            skip=unet_skip(cfg, at, block, len(order), last),
            last_visit=last_visit,
            xsa=has_xsa(cfg, block, len(order) - at),
            shrink=(block + 1) ** -0.5 if cfg.layer_scale else 1.0,
            drop=drop_chance(cfg, block),
            paired=block in paired,
            table=tables.get(block, -1),
            net=nets.index(block) if block in nets else -1,
            is_late=is_late(cfg, block),
            in_mudd=is_in_mudd(cfg, block),
            gated=gated_skip(cfg, block),
            is_kept=block in kept,
        )
        places.append(place)
        last[block] = at
    sources = {added.source for p in places for added in (p.skip, p.last_visit) if added}
    return [p._replace(is_added=at in sources) for at, p in enumerate(places)]


def wirings(cfg: Config) -> dict[int, list[Place]]:
    """By repeats, all that the schedule has."""
    values = map(int, Schedule("repeats", cfg.repeats).values())
    return {repeats: wiring(cfg, repeats) for repeats in values}


def unet_skip(cfg: Config, at: int, block: int, places: int, last: dict[int, int]) -> Added | None:
    """
    unet = 1 takes places as a stack: the first half lays its outputs on it, the second takes them
    off, and of an odd number the last has none. unet = 2 does so with blocks, of which the last
    outputs count.
    """
    if cfg.unet == 1 and places // 2 <= at < places // 2 * 2:
        return Added(places // 2 * 2 - 1 - at, at - places // 2)
    if cfg.unet == 2 and block >= cfg.depth - cfg.depth // 2:
        return Added(last[cfg.depth - 1 - block], block - cfg.depth + cfg.depth // 2)
    return None


def gated_skip(cfg: Config, block: int) -> Added | None:
    sources = gated_skips(cfg)
    return Added(sources[block], list(sources).index(block)) if block in sources else None


def kept_blocks(cfg: Config) -> set[int]:
    """Blocks whose last output is used elsewhere than at the next place, -1 aside."""
    mixed = [word for word in sources_of(cfg.mudd) + sources_of(cfg.mudd_final) if word.isdigit()]
    late = int(cfg.late_input or -1)
    return {*gated_skips(cfg).values(), backed_out(cfg)[0], late, *map(int, mixed)}


def is_late(cfg: Config, block: int) -> bool:
    """Whether attention reads the output of late_input's block; not that of MTP's block."""
    return bool(cfg.late_input) and int(cfg.late_input) < block < cfg.depth


def has_xsa(cfg: Config, block: int, left: int) -> bool:
    """Whether a place has exclusive self-attention, of which so many are left, itself counted."""
    chosen = cfg.xsa < 0 or left <= cfg.xsa or block in blocks_of(cfg.xsa_layers)
    return chosen and has_attention(cfg, block)


def is_windowed(cfg: Config, block: int) -> bool:
    """Whether a block has the window: all without a pattern; with one, never the last block."""
    if not cfg.window_pattern:
        return True
    letter = cfg.window_pattern[block % len(cfg.window_pattern)]
    return letter == "S" and block < cfg.depth - 1


def has_key_offset(cfg: Config, block: int) -> bool:
    """Not the block of MTP, which is behind the last."""
    windowed = cfg.window_pattern and is_windowed(cfg, block)
    return bool(cfg.key_offset) and block < cfg.depth and not windowed


def drop_chance(cfg: Config, block: int) -> float:
    """The chance that a training pass leaves a block out; MTP's is behind the last."""
    return cfg.stoch_depth * block / max(1, cfg.depth - 1)


class LossAndLogZ(torch.autograd.Function):
    """
    Cross-entropy and log Z [2, N] of logits [N, V], both 0 where the target is -1, for little more
    than the first alone. log Z = loss + the target's logit. The gradient is (a + b) * softmax, less
    a at the target, for gradients a of the loss and b of log Z: PyTorch's kernel for the backward
    pass of log_softmax gives it in one pass, when told -(a + b) at the target, up to b there.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        log_p, keep, at = logits.log_softmax(-1), targets >= 0, targets.clamp_min(0)[:, None]
        losses = -log_p.gather(-1, at)[:, 0]
        ctx.save_for_backward(log_p, keep, at)
        return torch.stack([losses, losses + logits.gather(-1, at)[:, 0]]) * keep

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        log_p, keep, at = ctx.saved_tensors
        by_loss, by_log_z = grad * keep
        given = torch.zeros_like(log_p).scatter_(-1, at, -(by_loss + by_log_z)[:, None])
        slope = torch.ops.aten._log_softmax_backward_data(given, log_p, -1, log_p.dtype)
        return slope.scatter_add_(-1, at, by_log_z[:, None]), None


def plain_loss_and_log_z(logits: Tensor, targets: Tensor) -> Tensor:
    """
    The same by autograd alone. On a GPU the compiler fuses this, but not the class above: 2 % of a
    step against 11 %.
    """
    log_z = logits.logsumexp(-1)
    return torch.stack([log_z - logits.gather(-1, targets.clamp_min(0)[:, None])[:, 0], log_z]) * (
        targets >= 0
    )


class GPT(Declaring):
    """The language model. forward() gives the loss; hidden() and logits() are its two halves."""

    norm = staticmethod(norm)  # of embedding and head; where the model is eager, compiled by itself

    def __init__(self, cfg: Config, dtype: torch.dtype):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.head_rows = head_rows(cfg)
        self.declare("head", "head", head_start(cfg), self.head_rows, cfg.dim)
        if cfg.biases:
            self.declare_bias("head", 0.0, self.head_rows)
        rows = self.head_rows if cfg.pad_vocab or cfg.untie_at else cfg.vocab
        start = normal(cfg.dim**-0.5 if cfg.init == "xavier" else cfg.embed_init)
        # What will be untied has two tables from the start, see same_tables().
        apart, group = not cfg.tie_embed or cfg.untie_at, "head" if cfg.untie_at else "embed"
        self.declare("embed", group, start, rows, cfg.dim, on=apart)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.depth))
        self.declare("mtp_proj", "matrix", plain_map(cfg), cfg.dim, 2 * cfg.dim, on=cfg.mtp)
        self.mtp_block = Block(cfg, cfg.depth) if cfg.mtp else None
        gains = cfg.norm_gain and cfg.embed_norm
        self.declare("embed_gain", "scalar", 1.0, cfg.dim, on=gains)
        self.declare("final_gain", "scalar", 1.0, cfg.dim, on=cfg.layer_norm or cfg.norm_gain)
        self.places = wirings(cfg)
        # What is learned by place, and not by block, is there for the deepest order.
        most, (low, high) = largest(cfg.repeats), loop_span(cfg)
        places, tables = len(layer_order(cfg, largest(cfg.repeats))), cfg.value_embeds
        pairs = (cfg.depth // 2,) if cfg.unet == 2 else (places // 2, cfg.dim)
        self.declare("skips", "scalar", 1.0, *pairs, on=cfg.unet)
        self.declare("loop_embed", "scalar", 0.0, places, cfg.dim, on=cfg.loop_embed)
        self.declare("value_embeds", "embed", normal(1.0), tables, cfg.vocab, cfg.dim, on=tables)
        self.declare("value_scales", "scalar", 0.0, places, tables, cfg.dim, on=tables)
        self.declare("second_embed", "embed", start, rows, cfg.dim, on=cfg.second_embed)
        self.declare("second_scales", "scalar", 0.0, places, on=cfg.second_embed)
        own = {"on": cfg.bigram_rows, "betas": (0.75, 0.95)}  # modded-nanogpt's
        self.declare("bigram", "embed", 0.0, cfg.bigram_rows, cfg.dim, **own)
        on = cfg.bigram_rows and not cfg.gate_nets
        self.declare("bigram_scales", "scalar", BIGRAM_SHARE, places, on=on)
        shape = (high - low, max(1, most - 1), cfg.dim)
        self.declare("cross_scales", "scalar", 0.0, *shape, on=cfg.cross_repeat)
        self.declare_records(cfg)
        self.register_buffer("cos", None, persistent=False)  # see rope_table()
        self.register_buffer("sin", None, persistent=False)
        if "prefix_loss" in later_targets(cfg):
            # of each token the one that is its longest proper prefix
            self.register_buffer("prefixes", None, persistent=False)
        if cfg.bigram_signs:
            signs = torch.empty(cfg.bigram_signs, cfg.dim, dtype=torch.int8)
            self.register_buffer("signs", signs, persistent=False)  # bigram_signs()
        for path, module in self.named_modules():
            if path and isinstance(module, Declaring):
                module.prefix = f"{path}."

    def declare_records(self, cfg: Config) -> None:
        """What the speedrun's records learn outside of blocks."""
        own = {"betas": (0.9, 0.99)}
        self.declare("smear_gate", "scalar", 0.0, 1, cfg.smear, on=cfg.smear, rate=0.002, **own)
        self.declare("smear_lambda", "scalar", 0.0, 1, on=cfg.smear, **own)
        tables, width = len(set(value_tables(cfg).values())), head_width(cfg)
        shape = (tables, self.head_rows, (cfg.kv_heads or cfg.heads) * width)
        usual = {"betas": (0.75, 0.95)}
        start = normal(cfg.value_init) if cfg.value_layers else 0.0
        self.declare("value_tables", "embed", start, *shape, on=cfg.value_layers, **usual)
        skips, dims = len(gated_skips(cfg)), cfg.skip_dims
        self.declare("skip_lambdas", "scalar", -1.5, skips, on=cfg.skip_gate, **own)
        on = cfg.skip_gate and cfg.skip_dims
        self.declare("skip_gates", "scalar", 0.0, skips, dims, on=on, rate=0.002, **own)
        block, share = backed_out(cfg)
        static = str(block) not in sources_of(cfg.mudd_final)  # else that does it
        self.declare("backout", "scalar", share, 1, on=cfg.backout and static)
        self.gate_nets = token_nets(cfg) if cfg.gate_nets else None
        self.declare("gate_scale", "scalar", NET_SCALE, 1, on=cfg.gate_nets, rate=0.02, **own)
        self.mudd = TokenNet(cfg, mudd_starts(cfg), 0.05) if cfg.mudd else None
        self.mudd_final = TokenNet(cfg, final_starts(cfg), 0.05) if cfg.mudd_final else None

    def documents(self, tokens_BT: Tensor) -> Tensor | None:
        """
        The document of each token, counted within its row; None where documents see each other.
        """
        return (
            (tokens_BT == self.cfg.doc_token).cumsum(1, dtype=torch.int32)
            if self.cfg.doc_mask
            else None
        )

    def embedded(self, tokens_BT: Tensor, cache=None) -> Tensor:
        x = rows_of(self.head if self.embed is None else self.embed, tokens_BT).to(self.dtype)
        if self.cfg.smear:
            x = self.smeared(x, cache)
        return self.norm(x, self.cfg.norm_eps, self.embed_gain) if self.cfg.embed_norm else x

    def smeared(self, x: Tensor, cache=None) -> Tensor:
        """
        Each token's embedding with a share of the one before it in the row, whatever its document
        (modded-nanogpt #34).
        """
        first = cache.embedding_before(x) if cache else torch.zeros_like(x[:, :1])
        gate = torch.sigmoid(linear(x[..., : self.cfg.smear], self.smear_gate))
        before = torch.cat([first, x[:, :-1]], dim=1)
        return x + self.smear_lambda.to(x.dtype) * gate * before

    def final(self, x: Tensor) -> Tensor:
        way = layer_norm if self.cfg.layer_norm else self.norm
        return way(x, self.cfg.norm_eps, self.final_gain)

    def rope(self, window_long: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T, K/2] where L blocks have this window."""
        if not self.cfg.yarn:
            return self.cos, self.sin
        stage = yarn_stage(self.cfg, window_long)
        return self.cos[stage], self.sin[stage]

    def hidden(
        self,
        tokens_BT: Tensor,
        repeats: int,
        window: int,
        passes: int = 1,
        window_long: int = 0,
        cache=None,
    ) -> Tensor:
        """
        tokens [B, T] -> final normalised activations [B, T, D] in the compute dtype. cache: the
        keys and values of the tokens before these; its begin_pass() is in logs/score.py.
        """
        places = self.places.get(repeats) or wiring(self.cfg, repeats)
        x = self.embedded(tokens_BT, cache)
        # A copy: at the first place x would be x0, and a compiled block takes a graph of its own
        # for two arguments that are one tensor.
        x0 = x.clone()
        rope, docs = self.rope(window_long), self.documents(tokens_BT)
        if cache:
            rope = rope[0][cache.size :], rope[1][cache.size :]
        sharp = sharpness(self.cfg, window_long)
        near = cache.begin_pass(docs) if cache else AttentionMask(docs, window, x, sharp)
        far = near  # of L blocks: one object for all of them
        if window != window_long and self.cfg.window_pattern and not cache:
            far = AttentionMask(docs, window_long, x, sharp)
        pairs = None
        if self.cfg.paired_layers:
            pairs = self.pairs(docs, x, window, window_long, cache)
        values, rows = self.token_values(tokens_BT), self.value_rows(tokens_BT)
        if self.cfg.bigram_rows:
            values = [*values, self.bigram_values(tokens_BT, cache)]
        for _ in range(passes - 1):
            # No gradient goes into an earlier pass; with dropout as in the last (slowrun_tiny #12).
            x = self.one_pass(places, x, x0, values, rope, near, far, pairs, rows).detach()
        return self.one_pass(places, x, x0, values, rope, near, far, pairs, rows)

    def pairs(self, docs: Tensor | None, x: Tensor, window: int, window_long: int, cache) -> Pairs:
        """Of two positions a token, for tokens x [B, T, D] of documents docs [B, T]."""
        cos, sin = self.rope(window_long)
        if cache:  # which sees by itself how many positions there are
            return Pairs((cos[2 * cache.size :], sin[2 * cache.size :]), cache, cache)
        docs = None if docs is None else docs.repeat_interleave(2, dim=1)
        like, sharp = x[:, :1].expand(-1, 2 * x.size(1), -1), sharpness(self.cfg, window_long)
        near = AttentionMask(docs, window, like, sharp)
        far = near
        if window != window_long and self.cfg.window_pattern:
            far = AttentionMask(docs, window_long, like, sharp)
        return Pairs((cos, sin), near, far)

    def one_pass(
        self,
        places: list[Place],
        x: Tensor,
        x0: Tensor,
        values: list[Tensor],
        rope: tuple[Tensor, Tensor],
        near: AttentionMask,
        far: AttentionMask,
        pairs: Pairs | None,
        rows: list[Tensor],
    ) -> Tensor:
        """
        All places in order and the final norm, [B, T, D] -> [B, T, D]. x0: the embedding; rows: of
        the tables of value_layers.
        """
        one, drawn = torch.ones((), dtype=x.dtype, device=x.device), self.drawn(len(places))
        outputs: dict[int, Tensor] = {}  # that later places add
        latest: dict[int, Tensor] = {}  # by block, last outputs that are used later
        lanes: dict[tuple[str, int], Tensor] = {}  # of gate_nets, by what for and block
        begun, cfg = x0, self.cfg
        for at, place in enumerate(places):
            if cfg.gate_nets and place.net >= 0:
                lanes |= self.lanes(place.net, x)
            added = self.added(place, outputs, values, one)
            if cfg.skip_gate and place.gated:
                lane = lanes.get(("skip", place.block))
                factor = self.skip_factor(place.gated.row, x0, lane)
                added.append((factor, latest[place.gated.source]))
            given: dict = self.given_by_nets(lanes, place.block) if cfg.gate_nets else {}
            if cfg.value_layers and place.table >= 0:
                given["values"] = rows[place.table]
            if cfg.late_input and place.is_late:
                given["source"] = latest[int(cfg.late_input)]
            if cfg.bigram_rows and ("bigram", place.block) in lanes:
                share = lanes["bigram", place.block] * values[-1]
                if at == 0:  # modded-nanogpt: the stream begins so, and is c0 for nets
                    x, begun = x + share, x0 + share
                else:
                    given["bigram"] = share
            if cfg.mudd and place.in_mudd:
                table = values[-1] if cfg.bigram_rows else None
                x = self.mixed(x, begun, latest, rows, table, given)
            # A tensor, as a number would make a graph of each block.
            shrink = one * place.shrink if cfg.layer_scale else None
            keep = drawn[at] >= place.drop if drawn is not None else None
            block, mask = self.blocks[place.block], near if place.windowed else far
            turns = rope
            if cfg.paired_layers and place.paired:
                turns, mask = pairs.rope, pairs.near if place.windowed else pairs.far
            own = begun if cfg.mudd and place.in_mudd else x0
            x = block(x, own, added, turns, mask, place.xsa, shrink, keep, given)
            if place.is_added:
                outputs[at] = x
            if place.is_kept:
                latest[place.block] = x
        return self.final(self.mixed_last(x, begun, latest, rows))

    def given_by_nets(self, lanes: dict[tuple[str, int], Tensor], block: int) -> dict[str, Tensor]:
        """What gate_nets give a block, by its name there."""
        joined = ("skip", "bigram")  # by the stream, outside of the block
        return {kind: x for (kind, to), x in lanes.items() if to == block and kind not in joined}

    def lanes(self, net: int, x: Tensor) -> dict[tuple[str, int], Tensor]:
        """What a net of gate_nets gives by token for this input of its block."""
        said = net_lanes(self.cfg, net)
        numbers = self.gate_scale.to(x.dtype) * self.gate_nets[net](x)
        parts = numbers.split([lane.count for lane in said], dim=-1)
        return {(lane.kind, lane.block): part for lane, part in zip(said, parts)}

    def skip_factor(self, row: int, x0: Tensor, lane: Tensor | None) -> Tensor:
        """Of a pair of skip_gate: a number, or one by token [B, T, 1]."""
        factor = torch.sigmoid(self.skip_lambdas[row]).to(x0.dtype)
        if lane is not None:
            return factor * lane
        if self.skip_gates is None:
            return factor
        few = linear(x0[..., : self.cfg.skip_dims], self.skip_gates[row : row + 1])
        return factor * 2 * torch.sigmoid(few)

    def sources(
        self, text: str, x0: Tensor, latest: dict[int, Tensor], rows: list[Tensor]
    ) -> list[Tensor]:
        """What mudd or mudd_final names, [B, T, D] each."""
        tables = value_tables(self.cfg)
        return [
            x0
            if word == "x0"
            else rows[tables[int(word[1:])]]
            if word[0] == "v"
            else latest[int(word)]
            for word in sources_of(text)
        ]

    def mixed(
        self,
        x: Tensor,
        x0: Tensor,
        latest: dict[int, Tensor],
        rows: list[Tensor],
        bigram: Tensor | None,
        given: dict[str, Tensor],
    ) -> Tensor:
        """
        mudd before the last block: its input with shares of earlier ones, [B, T, D]; into `given`,
        what joins the values, and the block's factors. All of them are read from x as it comes.
        bigram: rows of the table of bigram_rows.
        """
        sources = [*self.sources(self.cfg.mudd, x0, latest, rows), x]
        numbers = list((NET_SCALE * self.mudd(x)).split(1, dim=-1))
        take = lambda count: [numbers.pop(0) for _ in range(count)]
        values = sum(share * source for share, source in zip(take(len(sources)), sources))
        x = x + sum(share * source for share, source in zip(take(len(sources)), sources))
        if "values" in given:  # half of the heads each
            halves = zip(take(2), given["values"].chunk(2, dim=-1))
            values = values + torch.cat([share * half for share, half in halves], dim=-1)
        resid, post, given["x0"] = take(3)
        if self.cfg.bigram_rows and self.cfg.gate_nets:
            given["bigram"] = numbers.pop(0) * bigram
        last_resid, last_post = take(2)
        given["resid"], given["post"] = (resid, last_resid), (post, last_post)
        given["values"] = values
        return x

    def mixed_last(
        self, x: Tensor, x0: Tensor, latest: dict[int, Tensor], rows: list[Tensor]
    ) -> Tensor:
        """The last block's output with shares of earlier ones: mudd_final's, and backout's."""
        if self.cfg.mudd_final:
            shares = (NET_SCALE * self.mudd_final(x)).split(1, dim=-1)
            sources = self.sources(self.cfg.mudd_final, x0, latest, rows)
            x = x + sum(share * source for share, source in zip(shares, sources))
        if self.backout is not None:  # modded-nanogpt #40
            x = x - self.backout.to(x.dtype) * latest[backed_out(self.cfg)[0]]
        return x

    def value_rows(self, tokens_BT: Tensor) -> list[Tensor]:
        """The rows [B, T, kv_heads*K] of each table of value_layers."""
        tables = self.value_tables if self.cfg.value_layers else ()
        return [rows_of(table, tokens_BT).to(self.dtype) for table in tables]

    def token_values(self, tokens_BT: Tensor) -> list[Tensor]:
        """The rows [B, T, D] of each value table. And those of second_embed, normed."""
        tables = self.value_embeds if self.cfg.value_embeds else ()
        values = [rows_of(table, tokens_BT).to(self.dtype) for table in tables]
        if self.cfg.second_embed:  # modded-nanogpt's track 2
            x = rows_of(self.second_embed, tokens_BT).to(self.dtype)
            values.append(self.norm(x, self.cfg.norm_eps))
        return values

    def bigram_values(self, tokens_BT: Tensor, cache=None) -> Tensor:
        """
        For each token and the one before it, whatever its document, a row times signs [B, T, D]. A
        row's first token has the table's last row, and the number of that stands for it in the hash
        of the second, as in modded-nanogpt (#62, signs #83).
        """
        last, size = self.cfg.bigram_rows - 1, cache.size if cache else 0
        first = cache.token if size else tokens_BT[:, :1]
        before = torch.cat([first, tokens_BT[:, :-1]], dim=1)
        at = size + torch.arange(tokens_BT.size(1), device=tokens_BT.device)
        ids = bigram_ids(tokens_BT, before.masked_fill(at == 1, last), last + 1)
        few = self.cfg.bigram_rule == "rows"
        rows = rows_of(self.bigram, ids.masked_fill(at == 0, last), few).to(self.dtype)
        if not self.cfg.bigram_signs:
            return rows
        ids = ((before ^ tokens_BT) % self.cfg.bigram_signs).masked_fill(at == 0, 0)
        return rows * F.embedding(ids, self.signs).to(self.dtype)

    def drawn(self, places: int) -> Tensor | None:
        """Numbers of chance for stochastic depth, one for each place; None where all take part."""
        if self.cfg.stoch_depth and torch.is_grad_enabled():
            return torch.rand(places, device=self.head.device)
        return None

    def added(
        self, place: Place, outputs: dict[int, Tensor], values: list[Tensor], one: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """What a place adds to its input: pairs of a learned vector [D] and what it scales."""
        pairs = []
        if place.skip:
            pairs.append((self.skips[place.skip.row], outputs[place.skip.source]))
        if self.loop_embed is not None:
            pairs.append((self.loop_embed[place.row], one))  # the vector itself
        if self.cfg.value_embeds:
            tables = values[: self.cfg.value_embeds]
            pairs += [(self.value_scales[place.row, table], v) for table, v in enumerate(tables)]
        if self.second_scales is not None:
            pairs.append((self.second_scales[place.row], values[self.cfg.value_embeds]))
        if self.bigram_scales is not None:
            pairs.append((self.bigram_scales[place.row], values[-1]))
        if place.last_visit:
            scale = self.cross_scales[place.last_visit.row]
            pairs.append((scale, outputs[place.last_visit.source]))
        return pairs

    @property
    def logit_rows(self) -> int:
        return classes_of(self.cfg)

    def logits(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """activations [..., D] -> fp32 logits [..., V]; head: the same in another type."""
        z = self.linear(x, "head", head)
        z = (z[..., : self.cfg.vocab] if self.cfg.pad_vocab else z).float()
        if self.cfg.logit_dim_power:
            z = z * self.cfg.dim**self.cfg.logit_dim_power
        if not self.cfg.softcap:
            return z
        if self.cfg.softcap_shape == "isru":  # inverse square root unit (Carlile et al. 2017)
            return z * torch.rsqrt(1 + (z / self.cfg.softcap).square())
        # Remix M's 30*sigmoid(z/7.5) is 15 + 15*tanh(z/15): a cap of 15, and softmax does not see
        # the shift.
        if self.cfg.softcap_in or self.cfg.softcap_shift:  # modded-nanogpt #54, less its constant
            scale = self.cfg.softcap_in or self.cfg.softcap
            return self.cfg.softcap * torch.tanh((z + self.cfg.softcap_shift) / scale)
        return self.cfg.softcap * torch.tanh(z / self.cfg.softcap)

    def losses_and_log_z(self, x: Tensor, targets: Tensor, head: Tensor | None = None) -> Tensor:
        """losses() and each log(sum(exp(logits))): [2, N]."""
        both = plain_loss_and_log_z if x.is_cuda else LossAndLogZ.apply
        return both(self.logits(x, head), targets)

    def losses(self, x: Tensor, targets: Tensor, head: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of each target; 0 where the target is -1."""
        return F.cross_entropy(self.logits(x, head), targets, ignore_index=-1, reduction="none")

    def losses_with_later(
        self, x: Tensor, targets_KN: Tensor, head: Tensor | None = None
    ) -> Tensor:
        """
        losses() of several targets of each token from the same logits, behind the first of which
        stands log Z where z_loss is on: [K, N] or [K + 1, N].
        """
        logits, keep = self.logits(x, head), targets_KN >= 0
        at = targets_KN.clamp_min(0).mT
        losses = -logits.log_softmax(-1).gather(-1, at).mT * keep
        if not self.cfg.z_loss:
            return losses
        log_z = logits.logsumexp(-1) * keep[0]
        return torch.cat([losses[:1], log_z[None], losses[1:]])

    def losses_and_teacher_kl(
        self,
        x: Tensor,
        targets: Tensor,
        taught: Tensor,
        teacher_head: Tensor,
        head: Tensor | None = None,
    ) -> Tensor:
        """
        losses_and_log_z() and T^2 KL(teacher || model) of both softmaxes at temperature T, without
        padding of the vocabulary: [3, N]. The square keeps the gradient's size (Hinton et al.
        2015). taught: the teacher's activations, whose logits are made as the model's are.
        """
        z, T = self.logits(x, head), self.cfg.distill_temperature
        both = plain_loss_and_log_z if x.is_cuda else LossAndLogZ.apply
        with torch.no_grad():
            teacher = self.logits(taught, teacher_head)[..., : self.cfg.vocab] / T
            log_p = teacher.log_softmax(-1)
        log_q = (z[..., : self.cfg.vocab] / T).log_softmax(-1)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return torch.cat([both(z, targets), (T * T * kl * (targets >= 0))[None]])

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        repeats: int = 1,
        window: int = 0,
        passes: int = 1,
        window_long: int = 0,
        log_z: bool = False,
        mtp: bool = False,
        later: bool = False,
        taught: Tensor | None = None,
        teacher_head: Tensor | None = None,
        impossible: Tensor | None = None,
        candidates_BP: Tensor | None = None,
    ) -> Tensor:
        """
        Losses [B*T] of all targets, in nats. With log_z a row more, of losses_and_log_z(), with
        later one for each of later_targets(), with a teacher's activations and head those of
        losses_and_teacher_kl(), with mtp one more, of mtp_losses(). impossible: canonical_mask().
        With candidates the losses are sampled_losses().
        """
        x = self.hidden(tokens_BT, repeats, window, passes, window_long)
        if impossible is not None:
            return self.canonical_losses(x, tokens_BT, targets_BT, impossible)
        targets = self.with_later(targets_BT) if later else targets_BT
        if self.cfg.sampled_classes != "0" and candidates_BP is not None:
            return self.sampled_losses(x, targets, candidates_BP)
        losses = self.chunked(x, targets, log_z, taught, teacher_head)
        if not mtp:
            return losses
        rows = losses.view(-1, targets_BT.numel())
        return torch.cat([rows, self.mtp_losses(x, targets_BT, window_long).view(1, -1)])

    def canonical_losses(
        self, x_BTD: Tensor, tokens_BT: Tensor, targets_BT: Tensor, impossible: Tensor
    ) -> Tensor:
        """Losses [B*T] where tokens that cannot stand behind the input have no probability."""
        parts = [t.split(self.cfg.loss_chunk) for t in (x_BTD.flatten(0, 1), tokens_BT.flatten())]
        losses = []
        for x, tokens, targets in zip(*parts, targets_BT.flatten().split(self.cfg.loss_chunk)):
            z = self.logits(x)
            z = z.masked_fill(unpacked(impossible, tokens, z.size(-1)), -torch.inf)
            losses.append(F.cross_entropy(z, targets, ignore_index=-1, reduction="none"))
        return torch.cat(losses)

    def with_later(self, targets_BT: Tensor) -> Tensor:
        """
        [K, B, T]: targets, and those that stand 1 or 2 behind them in their row; -1 behind its end,
        where slowrun goes on with the micro-batch's next row, which another cut would change. For
        prefix_loss the targets' prefixes; -1 where there is none.
        """
        found = [targets_BT]
        for name, k in later_targets(self.cfg).items():
            later = F.pad(targets_BT[:, k:], (0, k), value=-1)
            if name == "prefix_loss":
                later = torch.where(later < 0, later, self.prefixes[later.clamp_min(0)])
            found.append(later)
        return torch.stack(found)

    def sampled_losses(self, x_BTD: Tensor, targets: Tensor, candidates_BP: Tensor) -> Tensor:
        """
        Losses of targets [B, T] or [K, B, T] by softmaxes over the candidates of each row alone
        (modded-nanogpt #92, without a correction for how they were chosen); 0 where a prefix of the
        target is none of them.
        """
        parts = []
        for row, (x, ids) in enumerate(zip(x_BTD, candidates_BP)):
            own = targets[..., row, :].contiguous()
            at = torch.searchsorted(ids, own.clamp_min(0)).clamp_max(len(ids) - 1)
            at = at.masked_fill((own < 0) | (ids[at] != own), -1)
            some = F.embedding(ids, self.head)
            parts.append(self.chunked(x[None], at.unsqueeze(-2), False, head=some))
        return torch.cat(parts, -1)

    def mtp_losses(self, x_BTD: Tensor, targets_BT: Tensor, window_long: int = 0) -> Tensor:
        """
        Multi-token prediction as in DeepSeek-V3 (2024): activations and the embedding of the target
        go through one more block, with the row in full, and the same head. Losses [B*T] of the
        token behind the target, times T/(T-1), as a row's last target has none behind it.
        """
        T = targets_BT.size(1)
        both = torch.cat([x_BTD, self.embedded(targets_BT.clamp_min(0))], dim=-1)
        h = self.linear(both, "mtp_proj")
        keep = None
        if self.cfg.stoch_depth and torch.is_grad_enabled():
            keep = torch.rand((), device=h.device) >= drop_chance(self.cfg, self.cfg.depth)
        docs, rope = self.documents(targets_BT), self.rope(window_long)
        mask = AttentionMask(docs, 0, h, sharpness(self.cfg, window_long))
        h = self.mtp_block(h, h.clone(), [], rope, mask, False, None, keep)
        after = F.pad(targets_BT[:, 1:], (0, 1), value=-1)
        return self.chunked(self.final(h), after, False) * (T / max(1, T - 1))

    def chunked(
        self,
        x_BTD: Tensor,
        targets: Tensor,
        log_z: bool,
        taught: Tensor | None = None,
        teacher_head: Tensor | None = None,
        head: Tensor | None = None,
    ) -> Tensor:
        """
        losses() of targets [B, T] with logits of loss_chunk tokens at a time; with more than one
        chunk they are computed again in the backward pass instead of being kept. Of targets
        [K, B, T] losses_with_later(). head: the rows of it that have a logit; else all.
        """
        by_token, more = [x_BTD.flatten(0, 1), targets.flatten(-2)], []
        losses = self.losses_and_log_z if log_z else self.losses
        if later_targets(self.cfg) and targets.ndim > 2:
            losses = self.losses_with_later
        if self.cfg.distill and taught is not None:
            losses, more = self.losses_and_teacher_kl, [teacher_head]
            by_token.append(taught.flatten(0, 1))
        size = self.cfg.loss_chunk
        if len(by_token[0]) <= size:
            return losses(*by_token, *more, *([] if head is None else [head]))
        splits = [t.split(size, -1 if t is by_token[1] else 0) for t in by_token]
        chunks = zip(*splits)
        # in fp32, so that chunks' gradients are summed in it
        rows = (self.head if head is None else head).float()
        return torch.cat([recomputed(losses, *c, *more, rows) for c in chunks], -1)


def build_model(cfg: Config, device: torch.device, dtype: torch.dtype, seq_len: int) -> GPT:
    with torch.device(device):
        model = GPT(cfg, dtype)
    model.to(getattr(torch, cfg.param_dtype))
    model.cos, model.sin = (t.to(device) for t in rope_tables(cfg, seq_len))  # in fp32
    if device.type == "meta":
        return model
    if cfg.bigram_signs:
        model.signs = bigram_signs(cfg).to(device)
    with torch.no_grad():
        declared = declarations(model)
        for name, p in model.named_parameters():
            p.copy_(initial_value(name, declared[name], p.shape, cfg.seed))
    if cfg.untie_at:
        same_tables(model)
    if cfg.fp8 and has_fp8(device):
        for module in model.modules():
            if isinstance(module, Declaring):
                module.in_fp8 = {n for n in module.declared if is_in_fp8(cfg, module, n)}
    return model


def is_in_fp8(cfg: Config, module: Declaring, name: str) -> bool:
    """Named by cfg.fp8, and of sizes that the products take."""
    *rows, cols = getattr(module, name).shape
    return is_named(cfg.fp8, module.prefix + name) and not (math.prod(rows) % 16 or cols % 16)


@torch.no_grad()
def same_tables(model: GPT) -> None:
    """Where tables will be untied: before the first step the embedding is a copy of the head."""
    model.embed.copy_(model.head)


########################################
#              Optimizer               #
########################################


@dataclass
class OptimConfig(Section):
    """What updates the weights, and how fast."""

    optimizer: str = "muon"  # what updates the matrices of the blocks: muon or adamw
    adamw_matrices: str = ""  # regex: these matrices get AdamW although optimizer is muon
    matrix_lr: float = 0.05  # learning rate of Muon
    # "pattern=factor pattern=factor": what multiplies it for names that the pattern finds, and with
    # it their decay
    matrix_lr_mul: str = ""
    adamw_lr: float = 0.0021  # learning rate of AdamW on matrices
    embed_lr: float = 0.6  # learning rate of the untied input embedding
    head_lr: float = 0.22  # learning rate of the untied head
    tied_lr: float = 0.0021  # learning rate of a tied table; with untie_at of both that it becomes
    scalar_lr: float = 0.04  # learning rate of vectors and scalars
    # "pattern=rate pattern=rate/beta1/beta2/decay": AdamW's rate (and more) of names that the
    # pattern finds
    own_lr: str = ""

    lr: str = "0:1 0.6:1 1>0.1"  # [sched] multiplies every learning rate
    lr_matrices: str = ""  # [sched] multiplies matrix_lr in place of lr; empty: lr does
    # in each of the last n epochs the rate falls from its schedule to 5 % by half a cosine
    lr_cycles: int = 0
    slow: str = ""  # regex: tensors whose learning rate is multiplied by slow_lr as well
    # [sched] e.g. "0 250s:0 450s>1": frozen to the bit for 250 steps, then ramped up over 200
    slow_lr: str = "1"

    beta1: float = 0.8  # AdamW: decay of the first moment
    beta2: float = 0.95  # AdamW: decay of the second moment
    adam_eps: float = 1e-10  # AdamW: epsilon
    # regex: tensors of which AdamW does not correct the moments, so that the first steps are short
    uncorrected: str = ""
    momentum: str = "0:0.85 300/2500>0.95"  # [sched] Muon: Nesterov momentum
    muon_buffer: str = "lerp"  # Muon's momentum buffer: lerp (m*buf + (1-m)*g) or sum (m*buf + g)
    # Muon: two or more decays, rising, of momentum buffers whose mixture replaces the buffer, e.g.
    # "0.85 0.98"; how old the mixture's gradients are on average says maxwell_age
    maxwell: str = ""
    # [sched] in steps; 0: the plain buffer, of which the others are copies so far
    maxwell_age: str = "0"
    # Muon: ns5 (Newton-Schulz; quick, within 0.7 to 1.2), ns12 (slow, exact), or polar_express
    polar: str = "ns5"
    polar_steps: int = 5  # Muon: iterations towards the polar factor; ns12 is meant for 12
    polar_norm: str = "frobenius"  # Muon: they begin with a norm of 1: frobenius or schatten4
    # Muon: matrices at least twice as wide as high, or high as wide: of the iterations so many at a
    # time are made with the smaller x x^T in place of x; bfloat16 carries 2 or 3; 1: with x
    polar_gram: int = 1
    soft_muon: str = "0"  # [sched] Muon: share of U S^0.1 V^T in the polar factor, by ns12
    aurora: str = ""  # regex: matrices whose update has rows and columns of even norms
    aurora_rounds: int = 3  # polar factors that this takes
    aurora_power: float = 0.25  # how far a round evens them
    # Muon: so many neighbouring heads have one matrix of queries and one of keys; 0: all heads
    qk_groups: int = 0
    row_norm: int = 0  # Muon: 1 divides each row of the update by its norm first (MuonEq-R)
    normuon: float = 0.0  # Muon: decay of NorMuon's second moment per neuron; 0: off
    soap: str = ""  # regex: matrices of which Muon takes Adam's update in Shampoo's eigenbasis
    soap_decay: float = 0.9  # of the Gram matrices that have this basis, and of Adam's moment in it
    soap_every: int = 1  # steps between two turns of the basis
    soap_gate: str = ""  # regex: of these, it is trusted as far as momentum and gradient agree
    soap_floor: str = "0"  # [sched] this far at least
    soap_cap: str = "1"  # [sched] this far at most

    radial_brake: float = 1.0  # Muon: factor on the part of a step along the matrix, if it grows so
    row_floor: float = 0.0  # Muon: a row's update has at least this share of the row's norm
    update_floor: float = 0.0  # Muon: a matrix' update has at least this share of its norm
    # Muon: 1: a step changes a matrix' norm as its part along the matrix does, and decay follows
    radial_pin: int = 0
    hyperball: int = 0  # Muon: 1: steps are shares of a matrix' norm, which never changes (MuonH)

    matrix_wd: float = 0.0  # decoupled weight decay of matrices (weights shrink by lr*wd a step)
    embed_wd: float = 0.0  # decoupled weight decay of embedding, head and tied table
    scalar_wd: float = 0.0  # decoupled weight decay of vectors and scalars
    weight_decay: str = "1"  # [sched] multiplies every weight decay
    independent_wd: int = 0  # 1: weights shrink by wd a step whatever the rate; 0: by lr*wd
    # [sched] gradients are taken this far ahead, in units of the mean step of the weights of late
    # (EMA-Nesterov), times lr's factor of the step before
    ema_nesterov: str = "0"
    ema_nesterov_decay: float = 0.99  # of that mean
    cautious: int = 0  # decay only where it agrees with the update: 1: all, 2: Muon's matrices
    decay_by_shape: int = 0  # 1: Muon's decay times sqrt(max(1, rows/cols)), as its step
    # what updates the table of bigram_rows: adam, or rows (no momentum, one second moment a row; a
    # row without a gradient stays as it is)
    bigram_rule: str = "adam"
    adam_every: int = 1  # AdamW: steps whose gradients are summed for one of its own
    grad_clip: float = 0.0  # largest global gradient norm; 0: no clipping
    loss_sum: int = 0  # 1: gradients are of the sum of a batch's losses, as epsilons may expect

    # [sched] how far matrices move against the gradient of a group's first half, all of them
    # together, for the gradient of its second half (slowrun's meta-gradient); 0: they stay
    meta_step: str = "0"
    meta_groups: int = 8  # groups of a step's rows, each of which moves by itself
    meta_match: str = ""  # regex: which matrices move; empty: all

    LIMITS = limits(
        (0, 1, "row_norm decay_by_shape independent_wd radial_pin hyperball loss_sum"),
        (0, 1, "soap_floor soap_cap soft_muon radial_brake aurora_power"),
        (0, 2, "cautious"),
        (0, BELOW_ONE, "beta1 beta2 momentum normuon soap_decay ema_nesterov_decay"),
        (0, 100, "row_floor update_floor ema_nesterov"),
        (0, 10**6, "maxwell_age"),
        (1, 100, "aurora_rounds"),
        (1, 10**6, "soap_every"),
        (0, 1000, "lr_matrices"),
        (0, 65536, "qk_groups"),
        (1, 1000, "adam_every"),
        (0, 1000, "lr weight_decay slow_lr matrix_wd embed_wd scalar_wd meta_step"),
        # diverged runs are a sweep's business
        (0, 1e38, "matrix_lr adamw_lr embed_lr head_lr tied_lr scalar_lr"),
        (0, 10**6, "lr_cycles"),
        (0, 10**9, "grad_clip"),
        (1, 100, "polar_steps polar_gram"),
        (1, 65536, "meta_groups"),
        (1e-30, 1, "adam_eps"),
    )
    CHOICES = {
        "optimizer": ("muon", "adamw"),
        "polar": ("ns5", "ns12", "polar_express"),
        "polar_norm": ("frobenius", "schatten4"),
        "muon_buffer": ("lerp", "sum"),
        "bigram_rule": ("adam", "rows"),
    }

    def check(self) -> None:
        for key in (
            "adamw_matrices",
            "slow",
            "uncorrected",
            "aurora",
            "soap",
            "soap_gate",
            "meta_match",
        ):
            require_regex(key, getattr(self, key))
        own_rates(self)
        matrix_factors(self)
        self.check_groups()
        decays, ages = decays_of(self), Schedule("maxwell_age", self.maxwell_age)
        steps = zip(ages.points, ages.points[1:])
        require(
            not any(b.ramp and not a.value * b.value for a, b in steps),
            f"maxwell_age = {self.maxwell_age!r}: a ramp from or to 0 has ages of no mixture; "
            "switch on with ':', such as '0 1000s:30 2000s>20'",
        )
        for age in ages.values():
            weights = maxwell_weights(decays, age) if decays and age else [0.0]
            require(
                min(weights) >= 0,
                f"maxwell_age = {age:g}: no mixture of {self.maxwell!r} is so young or so old; its "
                f"buffers' gradients are {decays[0] / (1 - decays[0]) if decays else 0:.3g} to "
                f"{decays[-1] / (1 - decays[-1]) if decays else 0:.3g} steps old on average",
            )
        require(
            not has_meta_step(self) or self.param_dtype == "float32",
            f"meta_step = {self.meta_step!r} moves each weight by too little for param_dtype = "
            f"{self.param_dtype!r}: set --param_dtype float32",
        )

    def check_groups(self) -> None:
        require(
            not self.qk_groups or self.heads % self.qk_groups == 0,
            f"qk_groups = {self.qk_groups}: heads = {self.heads} do not divide into groups of it",
        )
        other = [key for key in ("kv_heads", "iha", "biases") if getattr(self, key)]
        require(
            not (self.qk_groups and other),
            f"qk_groups = {self.qk_groups} knows no {' and no '.join(other)}: set it to 0, or "
            f"{', '.join(f'--{key} 0' for key in other)}",
        )

    def needs(self) -> list[Need]:
        muon, decays = self.optimizer == "muon", self.matrix_wd or self.embed_wd or self.scalar_wd
        decays = decays or any(rate.decay for rate in own_rates(self))
        ages = Schedule("maxwell_age", self.maxwell_age).values()
        exact = self.polar == "ns12" and self.polar_steps == 12
        acts = bool(decays) if self.cautious < 2 else self.matrix_wd > 0
        slows = Schedule("slow_lr", self.slow_lr).values() != [1]
        a_decay = "matrix_wd, embed_wd, scalar_wd, or a decay in own_lr"
        only_muon = (
            *("row_norm", "normuon", "decay_by_shape", "adamw_matrices", "maxwell", "polar_norm"),
            *("soft_muon", "aurora", "soap", "radial_brake", "row_floor", "update_floor"),
            *("polar_gram", "radial_pin", "hyperball", "lr_matrices", "matrix_lr_mul", "qk_groups"),
        )
        return [
            ("maxwell", "a maxwell_age above 0, such as '0 1000s:30'", max(ages) > 0),
            ("maxwell_age", "maxwell, two decays or more", bool(self.maxwell)),
            ("maxwell", "muon_buffer = 'lerp'", self.muon_buffer == "lerp"),
            ("soft_muon", "polar = 'ns12', polar_steps = 12, whose iterates it sums", exact),
            ("polar_gram", "soft_muon = 0, which sums iterates of x", self.soft_muon == "0"),
            ("aurora_rounds", "aurora", bool(self.aurora)),
            ("aurora_power", "aurora, aurora_rounds > 1", self.aurora and self.aurora_rounds > 1),
            *[(f"soap_{key}", "soap", bool(self.soap)) for key in ("decay", "every", "gate")],
            *[(f"soap_{key}", "soap_gate", bool(self.soap_gate)) for key in ("floor", "cap")],
            ("ema_nesterov_decay", "ema_nesterov", self.ema_nesterov != "0"),
            ("lr_matrices", "lr_cycles = 0, whose cycles are lr's", not self.lr_cycles),
            ("lr_matrices", "cycles = 0, whose cycle_lr is lr's", not self.cycles),
            (
                "hyperball",
                "matrices with a norm: --proj_init",
                self.proj_init > 0 or self.init == "xavier",
            ),
            (
                "hyperball",
                "attn_gate = 0, value_proj = 0, no value_gate, gate_nets, mudd, whose gates begin "
                "at zero and so would stay, or adamw_matrices = 'gate|mudd'",
                not (self.attn_gate or self.value_proj or self.value_gate)
                and not (self.gate_nets or self.mudd or self.mudd_final)
                or bool(self.adamw_matrices),
            ),
            ("hyperball", "matrix_wd = 0, as it keeps each norm", not self.matrix_wd),
            *[(key, "hyperball = 0, as it keeps each norm", not self.hyperball) for key in RADIAL],
            *[(key, "optimizer = 'muon'", muon) for key in only_muon],
            ("cautious", "Muon's matrices: 1, or optimizer = 'muon'", muon or self.cautious != 2),
            ("cautious", "a decay that it acts on, such as --matrix_wd 0.1", acts),
            ("decay_by_shape", "matrix_wd > 0", self.matrix_wd > 0),
            *[(key, a_decay, bool(decays)) for key in ("independent_wd", "weight_decay")],
            ("slow", "a slow_lr other than 1, such as '0 250s:0 450s>1'", slows),
            ("slow_lr", "slow, the names of what it slows", bool(self.slow)),
            ("bigram_rule", "bigram_rows > 1", self.bigram_rows > 0),
            ("qk_groups", f"more heads than that, now {self.heads}", self.qk_groups < self.heads),
            ("adam_every", f"steps to sum, now {self.steps}", self.adam_every <= self.steps),
        ]


RADIAL = ("radial_brake", "radial_pin", "update_floor")  # about how a matrix' norm changes


def decays_of(cfg: Config) -> list[float]:
    """Of the momentum buffers that maxwell mixes."""
    try:
        decays = list(map(float, cfg.maxwell.split()))
    except ValueError:
        decays = [math.nan]
    rising = all(a < b for a, b in zip([0.0, *decays], [*decays, 1.0]))
    require(
        len(decays) != 1 and rising,
        f"maxwell = {cfg.maxwell!r}: two decays or more between 0 and 1, rising: '0.85 0.98'",
    )
    return decays


def maxwell_weights(decays: list[float], age: float) -> list[float]:
    """
    Of each buffer in the mixture whose gradients are `age` steps old on average: rising in
    proportion up to the last, which has the rest. A buffer's are beta/(1 - beta) old. (Closed form
    of modded-nanogpt's PR 357; with two buffers that of PR 339.)
    """
    ages = [beta / (1 - beta) for beta in decays]
    count = len(ages)
    pairs = count * (count - 1) / 2
    rest = sum(k * age_k for k, age_k in enumerate(ages[:-1], 1))
    slope = (ages[-1] - age) / (ages[-1] * pairs - rest)
    return [slope * k for k in range(1, count)] + [1 - slope * pairs]


def has_meta_step(cfg: Config) -> bool:
    return any(Schedule("meta_step", cfg.meta_step).values())


class OwnRate(NamedTuple):
    """What own_lr says of the names that `pattern` finds; None: as for the others."""

    pattern: re.Pattern
    rate: float
    beta1: float | None = None
    beta2: float | None = None
    decay: float | None = None


def own_rates(cfg: Config) -> list[OwnRate]:
    rates = []
    for word in cfg.own_lr.split():
        pattern, _, values = word.rpartition("=")
        try:
            if not pattern:
                raise ValueError("no pattern")
            rate = OwnRate(compiled_pattern(pattern), *map(float, values.split("/")))
            for value, most in zip(rate[1:], (1e38, BELOW_ONE, BELOW_ONE, 1000)):
                if value is not None and not 0 <= value <= most:  # nan does not either
                    raise ValueError(f"{value} does not lie between 0 and {most}")
        except (re.error, ValueError, TypeError) as e:
            raise UserError(
                f"own_lr = {cfg.own_lr!r}: {word!r} is not pattern=rate, /beta1, /beta2 and /decay "
                f"behind it as far as they are needed ({e}); for example x0_lambda=0.025/0.96"
            ) from e
        rates.append(rate)
    return rates


def matrix_factors(cfg: Config) -> list[tuple[re.Pattern, float]]:
    """What matrix_lr_mul says: patterns, of which the first that fits holds, and their factors."""
    factors = []
    for word in cfg.matrix_lr_mul.split():
        pattern, _, factor = word.rpartition("=")
        try:
            factors.append((compiled_pattern(pattern), float(factor)))
        except (re.error, ValueError) as e:
            raise UserError(f"matrix_lr_mul = {cfg.matrix_lr_mul!r}: {word!r}: {e}") from e
        require(
            bool(pattern) and 0 <= factors[-1][1] <= 1000,
            f"matrix_lr_mul = {cfg.matrix_lr_mul!r}: {word!r} is not pattern=factor with a factor "
            "from 0 to 1000, for example mlp.proj=4",
        )
    return factors


# Keller Jordan's quintic, the same every iteration (Muon, 2024).
NS5 = ((3.4445, -4.7750, 2.0315),)
# modded-nanogpt track 3's: 1 is a fixed point without slope, so it converges there.
NS12 = ((2.0, -1.5, 0.5),)
# Polar Express (Amsel et al. 2025), for 5 iterations, safety 2e-2, cushion 2, as in modded-nanogpt;
# the last repeats.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


# Soft-Muon (modded-nanogpt track 3, #20): so much of each of ns12's iterates, the start first, is
# nearly U S^0.1 V^T.
SOFT = (
    *(0.1091613623, 0.07085664498, 0.05210528973, 0.05457295795, 0.05011334061, 0.03334622198),
    *(0.05022104481, 0.1053727358, 0.1187323776, 0.1185061091, 0.1185059576, 0.1185059576),
)


def frobenius(x: Tensor) -> Tensor:
    """Frobenius norm of each matrix of a stack: [n, 1, 1], in fp32."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)


def schatten4(x: Tensor) -> Tensor:
    """
    (sum of s^4)^(1/4) over the singular values s of each matrix of a stack: [n, 1, 1]. No less than
    the largest of them, and no more than the Frobenius norm.
    """
    x = x.float() if x.size(-2) <= x.size(-1) else x.float().mT
    return frobenius(x @ x.mT).sqrt()


def polar_factor(
    g: Tensor,
    method: str,
    steps: int,
    dtype: torch.dtype,
    by: str = "frobenius",
    soft: Tensor | None = None,
    gram: int = 1,
) -> Tensor:
    """
    Roughly U V^T of each matrix U S V^T in a stack [n, rows, cols], by matmuls in `dtype` alone.
    by: the norm that the iteration begins with. soft: the share [] of Soft-Muon's sum, brought to
    the Schatten-4 norm of the result, which it keeps. gram: see polar_gram.
    """
    x = g.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    size = (frobenius(x) if by == "frobenius" else schatten4(g)).to(dtype)
    table = {"ns5": NS5, "ns12": NS12, "polar_express": POLAR_EXPRESS}[method]
    x = x / (1.02 * size + 1e-6) if method == "polar_express" else x / (size + 1e-7)
    factors = [table[min(i, len(table) - 1)] for i in range(steps)]
    if gram > 1 and x.size(-1) >= 2 * x.size(-2):
        x = iterate_on_gram(x, factors, gram)
        return x.mT if tall else x
    iterates = []
    for a, b, c in factors:
        if soft is not None:
            iterates.append(x)
        xxt = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(xxt, xxt, xxt, beta=b, alpha=c), x, beta=a)
    if soft is not None:
        x, size = x.float(), schatten4(x)
        total = sum(share * iterate.float() for share, iterate in zip(SOFT, iterates))
        x = x.lerp(total * (size / schatten4(total).clamp_min(1e-30)), soft)
        x = x * (size / schatten4(x).clamp_min(1e-30))
    return x.mT if tall else x


def iterate_on_gram(x: Tensor, factors: list[tuple[float, float, float]], at_once: int) -> Tensor:
    """
    x <- (a I + b x x^T + c (x x^T)^2) x for each (a, b, c) in turn, `at_once` of them by products
    of x x^T's size (Gram Newton-Schulz, Zhang, Amsel, Chen and Dao 2026): with P = b G + c G^2, G
    becomes (a I + P) G (a I + P). G holds squares of the singular values, so rounding drowns small
    ones, and each iteration makes more of that, until x is made again. A rest of the iterations
    comes first, where singular values lie farthest apart.
    """
    while factors:
        few = len(factors) % at_once or at_once
        now, factors = factors[:few], factors[few:]
        a, b, c = now[0]
        gram = x @ x.mT
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        whole = p.clone()  # and a I: x becomes whole x
        whole.diagonal(dim1=-2, dim2=-1).add_(a)
        for factor in now[1:]:
            gram = torch.baddbmm(gram, p, gram, beta=a)
            gram = torch.baddbmm(gram, gram, p, beta=a)
            a, b, c = factor
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            whole = torch.baddbmm(whole, p, whole, beta=a)
        x = whole @ x
    return x


def even_polar_factor(g: Tensor, cfg: Config, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """
    Aurora (modded-nanogpt track 3, #17 and #30): polar factors of g with rescaled columns (of a
    tall matrix, rows), until those of the result have norms that are nearly even.
    """
    x = g.float() if g.size(-2) >= g.size(-1) else g.float().mT
    scale = 1 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-7)
    for i in range(cfg.aurora_rounds):
        u = factor(scale * x).float()
        if i + 1 < cfg.aurora_rounds:
            squares = u.square().sum(-1, keepdim=True).clamp_min(1e-14)
            scale = scale * (x.size(-1) / x.size(-2) / squares) ** cfg.aurora_power
    return u if g.size(-2) >= g.size(-1) else u.mT


def nesterov(g: Tensor, state: dict[str, Tensor], rates: dict[str, Tensor], cfg: Config) -> Tensor:
    """Muon's momentum, one step on: the gradient and what is remembered of those before."""
    buf, momentum = state["momentum"], rates["momentum"].to(g.dtype)
    if cfg.muon_buffer == "sum":
        buf.mul_(momentum).add_(g)
        return g + momentum * buf
    buf.lerp_(g, (1 - rates["momentum"]).to(g.dtype))
    mean = buf
    if cfg.maxwell:
        mixed, parts = rates["mixed"] > 0, state["maxwell"].unbind(1)
        for part, decay in zip(parts, decays_of(cfg)):
            part.copy_(torch.where(mixed, part.lerp(g.float(), 1 - decay), buf.float()))
        mixture = sum(rates[f"weight{k}"] * part for k, part in enumerate(parts))
        mean = torch.where(mixed, mixture.to(g.dtype), buf)
    return g.lerp(mean, momentum)


def soap_update(
    u: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    rates: dict[str, Tensor],
    gated: bool,
    decay: float,
) -> Tensor:
    """
    SOAP (Vyas et al. 2024) as modded-nanogpt track 3 has it before Muon's polar factor (#14, #44):
    u over the root of its second moment in the eigenbasis of the gradients' Gram matrices, of the
    Schatten-4 norm of u. The basis is of the step before, turn_basis() makes it; in the first step
    there is none. gated: a share of it (#16), see soap_gate.
    """
    u, g, second = u.float(), g.float(), state["soap_second"]
    rows, cols, begun = state["basis_rows"], state["basis_cols"], rates["begun"] > 0
    x = rows.mT @ u @ cols
    second.copy_(torch.where(begun, second.lerp(x.square(), 1 - decay), second))
    z = rows @ (x / second.clamp_min(1e-16).sqrt()) @ cols.mT
    size = schatten4(u)
    z = z * (size / schatten4(z).clamp_min(1e-30))
    if gated:
        trust = ((cosine(z, u) - 0.2) / 0.8).clamp(0, 1)
        trust = trust * (cosine(z, g) / cosine(u, g).clamp_min(1e-8)).clamp(0, 1)
        trust = torch.minimum(torch.maximum(trust, rates["soap_floor"]), rates["soap_cap"])
        z = u.lerp(z, trust)
        z = z * (size / schatten4(z).clamp_min(1e-30))
    state["gram_rows"].lerp_(g @ g.mT, 1 - decay)
    state["gram_cols"].lerp_(g.mT @ g, 1 - decay)
    return torch.where(begun, z, u)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of the angle between the matrices of two stacks: [n, 1, 1]."""
    return (a * b).sum((-2, -1), keepdim=True) / (frobenius(a) * frobenius(b)).clamp_min(1e-30)


def turn_basis(state: dict[str, Tensor], first: bool) -> None:
    """
    The eigenbases of both Gram matrices, largest eigenvalue first; behind the first step by one
    step of the QR algorithm from the bases so far. The second moment is put into the same order.
    """
    for side, dim in (("rows", 1), ("cols", 2)):
        gram, basis, second = state[f"gram_{side}"], state[f"basis_{side}"], state["soap_second"]
        if first:
            basis.copy_(torch.linalg.eigh(gram).eigenvectors.flip(-1))
            continue
        sizes = ((gram @ basis) * basis).sum(1)  # of each direction [n, rows or cols]
        order = torch.sort(sizes, dim=-1, descending=True, stable=True).indices
        in_order = basis.gather(2, order[:, None].expand_as(basis))
        basis.copy_(torch.linalg.qr(gram @ in_order).Q)
        second.copy_(second.gather(dim, order.unsqueeze(3 - dim).expand_as(second)))


def radial(w: Tensor, u: Tensor, ratio: float, cfg: Config) -> Tensor:
    """
    The update u [n, rows, cols], of which a step takes lr*ratio: what of it makes w longer times
    radial_brake (modded-nanogpt track 3, #29); not smaller than a share of w, by matrix (#9) or by
    row (#46).
    """
    w, u = w.float(), u.float()
    if cfg.radial_brake != 1:
        along = (u * w).sum((-2, -1), keepdim=True)
        along = along / w.square().sum((-2, -1), keepdim=True).clamp_min(1e-12)
        u = u - (1 - cfg.radial_brake) * along.clamp_max(0) * w
    if cfg.update_floor:
        least = cfg.update_floor / ratio * frobenius(w)
        u = u * (least / frobenius(u).clamp_min(1e-30)).clamp_min(1)
    if cfg.row_floor:
        least = cfg.row_floor / ratio * torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        size = torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_min(1e-30)
        u = u * (least / size).clamp_min(1)
    return u


def normalized(u: Tensor, second: Tensor, beta: float) -> Tensor:
    """
    NorMuon (Li et al. 2025): the rows (or columns) of u over the roots of their second moments, at
    the norm that u had. Both norms follow from the means of squares: u is read once, written once.
    """
    side = -1 if second.size(-1) == 1 else -2
    squares = u.square().sum(side, keepdim=True)  # [n, rows, 1] or [n, 1, cols]
    second.lerp_(squares / u.size(side), 1 - beta)
    scale = second.clamp_min(1e-10).rsqrt()
    before, after = (x.sum((-2, -1), keepdim=True) for x in (squares, squares * scale.square()))
    return u * (scale * (before.sqrt() / after.sqrt().clamp_min(1e-10)))


def muon_update(
    w: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    rates: dict[str, Tensor],
    rule: Rule,
    cfg: Config,
    dtype: torch.dtype,
) -> None:
    """
    One step of Muon on a stack w [n, rows, cols], in place: Nesterov momentum, polar factor, step
    of lr*sqrt(max(1, rows/cols)) (Jordan et al. 2024). rates: MuonAdamW.rates()'s, tensors, so that
    a schedule does not recompile. row_norm: MuonEq-R. state["second"]: NorMuon's moment [n, rows,
    1] or [n, 1, cols] (Li et al. 2025).
    """
    u = nesterov(g, state, rates, cfg)
    if cfg.row_norm:
        u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_min(1e-7)
    if cfg.soap and rule.soap:
        u = soap_update(u, g, state, rates, rule.soap_gate, cfg.soap_decay)
    soft = rates["soft_muon"] if cfg.soft_muon != "0" else None
    how = cfg.polar, cfg.polar_steps, dtype, cfg.polar_norm, soft, cfg.polar_gram
    if cfg.aurora and rule.aurora:
        u = even_polar_factor(u, cfg, lambda x: polar_factor(x, *how))
    else:
        u = polar_factor(u, *how)
    if cfg.normuon:
        u = normalized(u.float(), state["second"], cfg.normuon)
    ratio = max(1.0, w.size(-2) / w.size(-1)) ** 0.5
    if cfg.radial_brake != 1 or cfg.update_floor or cfg.row_floor:
        u = radial(w, u, ratio, cfg)
    lr, decay = rates["lr"] * ratio, rates["decay"]
    if cfg.hyperball:
        descend_on_sphere(w, u, rates["lr"])
    else:
        decay = decay * ratio if cfg.decay_by_shape and decay is not None else decay
        descend(w, u, lr, decay, cfg.cautious > 0, cfg.radial_pin > 0)


def adamw_update(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    correct1: Tensor,
    correct2: Tensor,
    rule: Rule,
    cfg: Config,
) -> None:
    """
    One step of AdamW (Loshchilov & Hutter 2019) in place; decay = lr*wd, correct1/2 = 1 - beta^t.
    The arithmetic and its order are torch.optim.AdamW's.
    """
    m.lerp_(g, 1 - rule.beta1)
    v.mul_(rule.beta2).addcmul_(g, g, value=1 - rule.beta2)
    u = (m / correct1) / (v.sqrt() / correct2.sqrt() + cfg.adam_eps)
    descend(w, u, lr, decay, cfg.cautious == 1, False)


def rows_update(
    w: Tensor, g: Tensor, second: Tensor, rates: dict[str, Tensor], rule: Rule, cfg: Config
) -> None:
    """
    modded-nanogpt #92's step of a large table w [n, D], in place: AdamW without momentum and with
    one second moment [n, 1] for a row, the mean over it. Rows without a gradient keep every bit;
    their moments fall at once, as a list of the others would make the host wait.
    """
    g, x = g.float(), w.float()
    second.lerp_(g.square().mean(-1, keepdim=True), 1 - rule.beta2)
    u = g * (rates["correct2"].sqrt() / (second.sqrt() + cfg.adam_eps))
    stepped = descended(x, u, rates["lr"], rates["decay"], cfg.cautious == 1)
    w.copy_(torch.where((g != 0).any(-1, keepdim=True), stepped, x))


def update_few_rows(
    few: Tensor,
    w: Tensor,
    g: Tensor,
    second: Tensor,
    rates: dict[str, Tensor],
    rule: Rule,
    cfg: Config,
) -> None:
    """rows_update() on a CPU. few, g: the rows that have a gradient, by their number, and it."""
    rows, moments = w.index_select(0, few), second.index_select(0, few)
    rows_update(rows, g, moments, rates, rule, cfg)
    second.lerp_(torch.zeros_like(second), 1 - rule.beta2)
    second.index_copy_(0, few, moments)
    w.index_copy_(0, few, rows)


def descend(
    w: Tensor, u: Tensor, lr: Tensor, decay: Tensor | None, cautious: bool, pin: bool
) -> None:
    """
    One step of w in place, see descended(). pin: the norm of a matrix changes to first order in lr
    only, and decay comes behind that (modded-nanogpt track 3, #29 and #46).
    """
    x, u = w.float(), u.float()
    if not pin:
        w.copy_(descended(x, u, lr, decay, cautious))
        return
    size, y = frobenius(x).clamp_min(1e-8), x - u * lr
    wanted = (size - lr * (u * x).sum((-2, -1), keepdim=True) / size).clamp_min(1e-8)
    y = y * (wanted / frobenius(y).clamp_min(1e-8))
    if decay is not None:
        y = y - y * (decay * (u * x >= 0) if cautious else decay)
    w.copy_(y)


def descended(x: Tensor, u: Tensor, lr: Tensor, decay: Tensor | None, cautious: bool) -> Tensor:
    """
    x - decay*x - lr*u in fp32, to be rounded once: decay by itself is too small a change for a
    weight in bfloat16. decay: lr*wd. cautious: of entries alone that the update shrinks too (Liang
    et al. 2024, Chen et al. 2025).
    """
    if decay is None:
        return x - u * lr
    shrink = decay * (u * x >= 0) if cautious else decay
    return x - x * shrink - u * lr


def descend_on_sphere(w: Tensor, u: Tensor, lr: Tensor) -> None:
    """MuonH (modded-nanogpt track 3, #5): a step of lr times the norm of w, which stays."""
    x, u = w.float(), u.float()
    size, long = frobenius(x), frobenius(u)
    step = lr * size / long.clamp_min(1e-30)
    # |x - step u| by its parts: of the difference, a norm ends torch.compile (2.13) in a KeyError
    along = (x * u).sum((-2, -1), keepdim=True)
    length = (size.square() + (step * long).square() - 2 * step * along).clamp_min(1e-30).sqrt()
    w.copy_((x - step * u) * (size / length))


class Bucket:
    """
    Parameters of one kind that are updated together. Weights and gradients are views into one flat
    buffer each, so matrices of one shape are one stack, small vectors one vector, and a rank owns
    the same slice of weights, gradients and states: `shard`. Muon's units are matrices, AdamW's are
    numbers; both are padded to the ranks.
    """

    def __init__(self, rule: Rule, params: dict[str, Tensor], run: Ranks, cfg: Config):
        self.rule, self.params = rule, params
        first, self.unit = next(iter(params.values())), rule.shape  # of what is never cut
        per = math.prod(self.unit)
        self.spans, count = {}, 0
        for name, p in params.items():
            self.spans[name] = (count, count + p.numel() // per)
            count += p.numel() // per
        self.share = -(-count // run.world)  # units of one rank
        self.weights = first.new_zeros(self.share * run.world, *self.unit)
        self.grads = torch.zeros_like(self.weights)
        self.total: Tensor | None = None  # collect()'s
        for name, p in params.items():
            low, high = self.spans[name]
            self.weights[low:high].copy_(p.detach().view(-1, *self.unit))
            p.data = self.weights[low:high].view(p.shape)
            p.grad = self.grads[low:high].view(p.shape)
        self.shard, self.grad_shard = self.weights, self.grads
        if run.world > 1:
            own = slice(run.rank * self.share, (run.rank + 1) * self.share)
            self.shard, self.grad_shard = self.weights[own], self.grads[own]
            if not run.sums_in_place:
                self.grad_shard = torch.zeros_like(self.shard)
        kept = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}
        self.state = {k: torch.zeros_like(self.shard) for k in kept.get(rule.kind, ())}
        # In fp32 whatever the weights are in: at a decay of .95 bfloat16 would lose most of what is
        # added.
        for name, shape in states_in_fp32(rule, cfg).items():
            self.state[name] = self.shard.new_zeros(self.share, *shape, dtype=torch.float32)
        if cfg.ema_nesterov != "0":
            self.state["last"].copy_(self.shard)
        self.world = run.world
        # On a GPU the host would wait for a list of rows.
        self.of_rows = rule.kind == "rows" and run.device.type == "cpu" and cfg.adam_every == 1
        # where of_rows: numbers of the rows with a gradient, of the table and of the shard
        self.touched: Tensor | None = None
        self.few: Tensor | None = None
        self.first = run.rank * self.share

    def start_sum(self, run: Ranks) -> dist.Work | None:
        """
        Begin to sum the ranks' gradients. Of a table of rows those that have any, at once: how many
        are not known before.
        """
        if not self.of_rows:
            return run.start_sum(self.grads, self.grad_shard)
        some = self.has_gradient().to(torch.uint8)
        dist.all_reduce(some, dist.ReduceOp.MAX)
        self.touched = some.nonzero().flatten()
        rows = self.grads.index_select(0, self.touched)
        dist.all_reduce(rows)
        self.grads.index_copy_(0, self.touched, rows)
        return None

    def start_gather(self, run: Ranks) -> list[dist.Work]:
        """Begin to bring what the ranks changed into every rank's weights."""
        if not self.of_rows:
            return run.start_gather(self.weights, self.shard)
        for rank in range(run.world):
            at = self.touched[self.touched // self.share == rank]
            rows = self.weights.index_select(0, at)
            dist.broadcast(rows, rank)
            self.weights.index_copy_(0, at, rows)
        return []

    def has_gradient(self) -> Tensor:
        """Of each row of the table."""
        return (self.grads.amax(-1) != 0) | (self.grads.amin(-1) != 0)

    def square(self) -> Tensor:
        """Of the norm of the shard's gradients. of_rows: finds the rows that have any."""
        g = self.grad_shard
        if self.of_rows:
            if self.world == 1:
                self.touched = self.has_gradient().nonzero().flatten()
            own = self.touched - self.first
            self.few = own[(own >= 0) & (own < self.share)]
            g = g.index_select(0, self.few)
        return torch.linalg.vector_norm(g, dtype=torch.float32).square()

    def clear(self) -> None:
        """All gradients become 0 again."""
        if self.of_rows:
            self.grads.index_fill_(0, self.touched, 0)
        else:
            self.grads.zero_()

    def frozen(self, now: Now) -> bool:
        """Whether the weights keep every bit in this step."""
        return self.rule.slow and not now.slow_lr

    def collect(self, last: bool) -> None:
        """
        Behind each of several micro-batches: add its gradients to a sum in fp32, which behind the
        last one becomes the gradients, rounded once. In bfloat16 a sum of 512 is percents off.
        Costs 4 bytes for each such parameter.
        """
        if self.total is None:
            self.total = torch.zeros_like(self.grads, dtype=torch.float32)
        self.total.add_(self.grads)
        if last:
            self.grads.copy_(self.total)
            self.total.zero_()
        else:
            self.grads.zero_()

    def gather(self, shard: Tensor) -> Tensor:
        """All ranks' shards as one tensor."""
        if self.world == 1:
            return shard
        whole = shard.new_empty(self.world * shard.size(0), *shard.shape[1:])
        dist.all_gather_single(whole, shard.contiguous())
        return whole

    def by_name(self, shard: Tensor) -> dict[str, Tensor]:
        """CPU copies of a sharded tensor by parameter, whatever the ranks. Collective."""
        whole = self.gather(shard).cpu()
        return {name: whole[low:high].clone() for name, (low, high) in self.spans.items()}

    def from_names(self, shard: Tensor, named: dict[str, Tensor], rank: int) -> None:
        """The inverse: fill this rank's shard."""
        whole = torch.zeros(self.world * self.share, *shard.shape[1:], dtype=shard.dtype)
        for name, (low, high) in self.spans.items():
            whole[low:high] = named[name]
        shard.copy_(whole[rank * self.share : (rank + 1) * self.share])


def states_in_fp32(rule: Rule, cfg: Config) -> dict[str, tuple[int, ...]]:
    """What the tricks keep of each unit of a bucket, and its shape."""
    states: dict[str, tuple[int, ...]] = {}
    if cfg.ema_nesterov != "0":
        states |= {"drift": rule.shape, "last": rule.shape}
    if rule.kind != "muon" and cfg.adam_every > 1:
        states["summed"] = rule.shape  # gradients since the last step
    if rule.kind == "rows":
        states["row_sq"] = (1,)
    if rule.kind != "muon":
        return states
    rows, cols = rule.shape
    if cfg.normuon:
        states["second"] = (1, cols) if rows < cols else (rows, 1)
    if cfg.maxwell:
        states["maxwell"] = (len(decays_of(cfg)), rows, cols)
    if cfg.soap and rule.soap:
        states |= {"gram_rows": (rows, rows), "basis_rows": (rows, rows)}
        states |= {"gram_cols": (cols, cols), "basis_cols": (cols, cols)}
        states["soap_second"] = (rows, cols)
    return states


def moved_matrices(cfg: Config, model: nn.Module) -> dict[str, Tensor]:
    """What the meta step moves."""
    declared = declarations(model)
    return {
        name: p
        for name, p in model.named_parameters()
        if declared[name].group == "matrix" and re.search(cfg.meta_match, name)
    }


class MetaStep:
    """
    Slowrun's meta-gradient (pull requests 98 and 99): behind the gradient of a group's first half
    its matrices move against it by a given length, the gradient of the second half is taken there,
    and the weights are put back; the step is made with the sum of both. A group's rows are the same
    for any number of ranks, of which each has whole groups. (There each of 8 ranks is one.)
    """

    def __init__(self, cfg: Config, model: nn.Module, world: int):
        self.halves = 2 * cfg.meta_groups // world  # that this rank has in a step
        moved = moved_matrices(cfg, model)
        require(
            bool(moved),
            f"meta_match = {cfg.meta_match!r} matches no matrix of this model; names are such as "
            f"{', '.join(list(declarations(model))[:3])}",
        )
        self.weights = [p.data for p in moved.values()]
        self.grads = [p.grad for p in moved.values()]  # views into the buckets, which stay
        self.kept = [torch.empty_like(w) for w in self.weights]
        # sums over the groups before this one, where there are several
        self.earlier = [torch.zeros_like(g) for g in self.grads] if self.halves > 2 else []

    @torch.no_grad()
    def before(self, at: int, count: int, length: float) -> None:
        """Before micro-batch `at` of `count`: where a half begins."""
        half, inside = divmod(at, count // self.halves)
        if inside:
            return
        if half % 2:
            self.move(length)
        elif half:
            for earlier, g in zip(self.earlier, self.grads):
                earlier.copy_(g)
                g.zero_()

    def move(self, length: float) -> None:
        """Keep the weights, and move them by `length` against the gradient that there is."""
        norms = torch.stack([torch.linalg.vector_norm(g) for g in self.grads])
        by = torch.linalg.vector_norm(norms).clamp_min(1e-12).reciprocal()  # stays on the device
        for kept, w, g in zip(self.kept, self.weights, self.grads):
            kept.copy_(w)
            w.addcmul_(g, by, value=-length)

    @torch.no_grad()
    def after(self, at: int, count: int) -> None:
        """Behind the backward pass of micro-batch `at` of `count`: where a group ends."""
        half, inside = divmod(at + 1, count // self.halves)
        if inside or half % 2:
            return
        for w, kept in zip(self.weights, self.kept):
            w.copy_(kept)
        if half > 2:
            for g, earlier in zip(self.grads, self.earlier):
                g.add_(earlier)


class Rule(NamedTuple):
    """How a parameter is updated; those of one rule (and, with Muon, one shape) share a bucket."""

    kind: str  # muon, adamw or rows
    group: str
    shape: tuple[int, ...]  # of a matrix that Muon updates, or of a row
    lr: float
    wd: float
    beta1: float
    beta2: float
    slow: bool
    corrected: bool = True  # AdamW's moments, for their start at zero
    soap: bool = False
    soap_gate: bool = False
    aurora: bool = False
    alone: str = ""  # the only name of its bucket: tables that are tied are cut alike


def rule_of(cfg: Config, name: str, p: Tensor, declared: Declared) -> Rule:
    """What the declaration and the flags say of a parameter. own_lr is heard last."""
    slow, by_pattern = is_named(cfg.slow, name), is_named(cfg.adamw_matrices, name)
    if declared.group == "matrix" and cfg.optimizer == "muon" and not by_pattern:
        lr, wd, shape = cfg.matrix_lr, cfg.matrix_wd, tuple(p.shape[-2:])
        if cfg.matrix_lr_mul:
            factors = matrix_factors(cfg)
            lr *= next((factor for pattern, factor in factors if pattern.search(name)), 1.0)
        rule = Rule("muon", "matrix", shape, lr, wd, cfg.beta1, cfg.beta2, slow)
        if cfg.soap:
            soap = is_named(cfg.soap, name)
            rule = rule._replace(soap=soap, soap_gate=soap and is_named(cfg.soap_gate, name))
        if cfg.aurora:
            rule = rule._replace(aurora=is_named(cfg.aurora, name))
        return rule
    rates = {
        "embed": (cfg.embed_lr, cfg.embed_wd),
        "head": (cfg.tied_lr if cfg.tie_embed else cfg.head_lr, cfg.embed_wd),
        "scalar": (cfg.scalar_lr, cfg.scalar_wd),
    }
    if cfg.optimizer != "muon" or cfg.adamw_matrices:
        rates["matrix"] = cfg.adamw_lr, cfg.matrix_wd
    lr, wd = rates[declared.group]
    beta1, beta2 = declared.betas or (cfg.beta1, cfg.beta2)
    lr = lr * declared.rate
    own = next((own for own in own_rates(cfg) if own.pattern.search(name)), None)
    if own is not None:
        usual = lr, beta1, beta2, wd
        lr, beta1, beta2, wd = (b if a is None else a for a, b in zip(own[1:], usual))
    corrected = not is_named(cfg.uncorrected, name)
    rule = Rule("adamw", declared.group, (), lr, wd, beta1, beta2, slow, corrected)
    if cfg.bigram_rule == "rows" and name == "bigram":
        rule = rule._replace(kind="rows", shape=(cfg.dim,))
    if cfg.untie_at and name in ("head", "embed"):
        rule = rule._replace(alone=name)
    return rule


def is_named(pattern: str, name: str) -> bool:
    """Whether a pattern of the configuration finds the name; an empty one finds none."""
    return bool(pattern and re.search(pattern, name))


def param_buckets(cfg: Config, model: nn.Module, run: Ranks) -> list[Bucket]:
    """Every parameter in exactly one bucket, by its rule."""
    groups: dict[Rule, dict[str, Tensor]] = {}
    declared = declarations(model)
    for name, p in model.named_parameters():
        groups.setdefault(rule_of(cfg, name, p, declared[name]), {})[name] = p
    if cfg.slow and not any(rule.slow for rule in groups):
        raise UserError(
            f"slow = {cfg.slow!r} matches no tensor of this model; names are such as "
            f"{', '.join(list(declared)[:3])}"
        )
    # Big ones first: their communication then runs while the others are computed.
    order = sorted(groups, key=lambda rule: -sum(p.numel() for p in groups[rule].values()))
    return [Bucket(rule, groups[rule], run, cfg) for rule in order]


class MuonAdamW:
    """
    Muon and AdamW over 1..N ranks. A step has three phases: start summing every bucket's gradients
    to their owners; as each arrives, update the own shard and start gathering it; wait for the
    rest. With grad_clip the updates wait for all sums. One rank communicates nothing.
    """

    def __init__(self, cfg: Config, model: nn.Module, run: Ranks):
        self.cfg, self.run, self.count = cfg, run, 0
        self.buckets = param_buckets(cfg, model, run)
        self.meta = None
        if has_meta_step(cfg):
            self.meta = MetaStep(cfg, model, run.world)
        on = bool(cfg.compile)
        # Of matrix products: on a CPU they take as long when compiled, and longest to compile.
        products = cfg.compile == 2 or cfg.compile == 1 and run.device.type != "cpu"
        self.muon = torch.compile(muon_update, dynamic=False) if products else muon_update
        self.adamw = torch.compile(adamw_update, dynamic=False) if on else adamw_update
        self.rows = torch.compile(rows_update, dynamic=False) if on else rows_update

    @torch.no_grad()
    def collect(self, last: bool) -> None:
        """Behind the backward pass of each micro-batch, where a step has several."""
        for b in self.buckets:
            b.collect(last)

    def step(self, now: Now) -> Tensor:
        """
        Update the weights from the summed gradients, clear those; the global gradient norm [1].
        """
        run, world = self.run, self.run.world
        pending = []
        if world > 1:
            pending = [b.start_sum(run) for b in self.buckets]
        if self.cfg.untie_at and now.tied:
            self.one_gradient(pending)
        self.count += 1
        rates, squares, gathers = self.rates(now), [], []
        for i, b in enumerate(self.buckets):
            if world > 1 and pending[i]:
                pending[i].wait()
            squares.append(b.square())
            if not self.cfg.grad_clip:  # nobody waits for the norm
                self.update_shard(b, now, rates[i])
                b.clear()
                if world > 1:
                    gathers += b.start_gather(run)
        size = run.sum_of(torch.stack(squares).sum().view(1)).sqrt()
        if self.cfg.grad_clip:
            for i, b in enumerate(self.buckets):
                b.grad_shard.mul_(
                    (self.cfg.grad_clip / (size + 1e-6)).clamp(max=1.0).to(b.grads.dtype)
                )
                self.update_shard(b, now, rates[i])
                b.clear()
                if world > 1:
                    gathers += b.start_gather(run)
        for work in gathers:
            work.wait()
        return size

    def rates(self, now: Now) -> list[dict[str, Tensor | None]]:
        """
        Of each bucket, on the device: learning rate, momentum, decay (None: it has none), both
        corrections of AdamW's moments. rates_of_tricks() adds to these. In one copy from pinned
        memory: a tensor made of a number on a GPU makes the host wait until the GPU has nothing to
        do.
        """
        table, tricks = [], self.rates_of_tricks(now)
        for b in self.buckets:
            rule, slow = b.rule, now.slow_lr if b.rule.slow else 1.0
            own = rule.kind == "muon" and now.lr_matrices is not None
            lr = rule.lr * (now.lr_matrices if own else now.lr) * slow
            decay = (slow if self.cfg.independent_wd else lr) * rule.wd * now.weight_decay
            row = {"lr": lr, "momentum": now.momentum, "decay": decay}
            count = self.count // self.cfg.adam_every  # of AdamW's steps
            row["correct1"] = 1 - rule.beta1**count if rule.corrected else 1.0
            row["correct2"] = 1 - rule.beta2**count if rule.corrected else 1.0
            table.append(row | tricks)
        device = self.buckets[0].weights.device
        # 16 bytes each: compiled graphs copy an input that is not aligned so.
        spread = torch.zeros(len(table), len(table[0]), 4, pin_memory=device.type == "cuda")
        spread[..., 0] = torch.tensor([list(row.values()) for row in table], dtype=torch.float32)
        moved = spread.to(device, non_blocking=True)[..., 0]
        rates = [dict(zip(table[0], row.unbind())) for row in moved]
        for b, row in zip(self.buckets, rates):
            row["decay"] = row["decay"] if b.rule.wd else None
        return rates

    def rates_of_tricks(self, now: Now) -> dict[str, float]:
        """The same for all buckets; of the tricks that are on."""
        cfg, found = self.cfg, {}
        if cfg.soft_muon != "0":
            found["soft_muon"] = now.soft_muon
        if cfg.soap:
            found |= {"begun": float(self.count > 1), "soap_floor": now.soap_floor}
            found["soap_cap"] = now.soap_cap
        if cfg.maxwell:
            weights = maxwell_weights(decays_of(cfg), now.maxwell_age)
            found["mixed"] = float(now.maxwell_age > 0)
            found |= {f"weight{k}": weight for k, weight in enumerate(weights)}
        return found

    @torch.no_grad()
    def update_shard(self, b: Bucket, now: Now, rates: dict[str, Tensor]) -> None:
        """Update this rank's shard by its row of rates()."""
        shard = b.shard.clone() if b.frozen(now) else b.shard  # its moments go on
        if self.cfg.untie_at and now.tied and b.rule.alone == "embed":
            self.copy_head(b)
            return
        if self.cfg.adam_every > 1 and b.rule.kind != "muon" and self.is_summed(b):
            pass
        elif b.rule.kind == "muon":
            dtype = torch.bfloat16 if self.run.dtype == torch.bfloat16 else torch.float32
            self.muon(shard, b.grad_shard, b.state, rates, b.rule, self.cfg, dtype)
        elif self.cfg.bigram_rule == "rows" and b.rule.kind == "rows":
            state = b.state["row_sq"], rates, b.rule, self.cfg
            if b.of_rows:
                update_few_rows(b.few, shard, b.grad_shard.index_select(0, b.few), *state)
            else:
                self.rows(shard, b.grad_shard, *state)
        else:
            self.adamw(
                shard,
                b.grad_shard,
                b.state["exp_avg"],
                b.state["exp_avg_sq"],
                rates["lr"],
                rates["decay"],
                rates["correct1"],
                rates["correct2"],
                b.rule,
                self.cfg,
            )
        if self.cfg.soap and b.rule.soap:
            first = self.count == 1
            if first or self.count % self.cfg.soap_every == 0:
                turn_basis(b.state, first)
        if self.cfg.ema_nesterov != "0":
            b.state["drift"].lerp_(b.shard - b.state["last"], 1 - self.cfg.ema_nesterov_decay)
            b.state["last"].copy_(b.shard)

    def is_summed(self, b: Bucket) -> bool:
        """
        Add a bucket's gradients to those of the steps before. Behind adam_every steps the sum takes
        their place; False then. (Of steps that are left at the end nobody takes them.)
        """
        b.state["summed"].add_(b.grad_shard)
        if self.count % self.cfg.adam_every:
            return True
        b.grad_shard.copy_(b.state["summed"])
        b.state["summed"].zero_()
        return False

    def one_gradient(self, pending: list) -> None:
        """While head and embedding are one table, the head has the gradient of both."""
        of = {b.rule.alone: i for i, b in enumerate(self.buckets)}
        for at in (of["head"], of["embed"]) if pending else ():
            pending[at].wait()
            pending[at] = None  # gloo would write the sum once more
        head, embed = self.buckets[of["head"]], self.buckets[of["embed"]]
        head.grad_shard.add_(embed.grad_shard)
        embed.grad_shard.zero_()

    def copy_head(self, embed: Bucket) -> None:
        """
        Behind the head's update: the embedding and its moments are the head's, so that they go on
        from there when they are untied (modded-nanogpt #53). A rank has the same part of both.
        """
        (head,) = [b for b in self.buckets if b.rule.alone == "head"]
        embed.shard.copy_(head.shard)
        for key, state in embed.state.items():
            state.copy_(head.state[key])

    @torch.no_grad()
    def look_ahead(self, now: Now, before: Now | None) -> None:
        """
        Before the forward pass: EMA-Nesterov (modded-nanogpt track 3, #39) moves the weights on by
        a multiple of their mean step, `drift`, to where the gradient is taken and the step begins.
        Evaluation and checkpoints lie between two steps and never see this. before: the schedules
        of the last step; None in the first. Collective.
        """
        if not now.ema_nesterov or not before:
            return
        ahead = torch.tensor([now.ema_nesterov * before.lr])
        if self.run.device.type == "cuda":
            ahead = ahead.pin_memory()
        ahead = ahead.to(self.run.device, non_blocking=True)
        for b in self.buckets:
            if not b.frozen(now):
                b.shard.copy_(b.shard + ahead * b.state["drift"])
        if self.run.world > 1:
            for b in self.buckets:
                dist.all_gather_single(b.weights, b.shard)

    def frozen(self, name: str, now: Now) -> bool:
        """Whether a parameter keeps every bit in this step."""
        return any(b.frozen(now) for b in self.buckets if name in b.params)

    def state_dict(self) -> dict[str, Tensor]:
        """CPU tensors named <parameter>:<state>; the same for any number of ranks. Collective."""
        named = {"step_count": torch.tensor(self.count)}
        for b in self.buckets:
            for key, shard in b.state.items():
                named |= {f"{name}:{key}": t for name, t in b.by_name(shard).items()}
        return named

    def load_state_dict(self, named: dict[str, Tensor]) -> None:
        self.count = int(named["step_count"])
        for b in self.buckets:
            for key, shard in b.state.items():
                b.from_names(
                    shard, {name: named[f"{name}:{key}"] for name in b.params}, self.run.rank
                )

    def snapshot(self) -> tuple[int, list[Tensor]]:
        """Copies of all that a step changes, on the host: the device may be full."""
        return self.count, [t.to("cpu", copy=True) for t in self.changing()]

    def restore(self, kept: tuple[int, list[Tensor]]) -> None:
        self.count = kept[0]
        for t, copy_ in zip(self.changing(), kept[1]):
            t.copy_(copy_)

    def changing(self) -> list[Tensor]:
        return [t for b in self.buckets for t in (b.weights, b.grads, *b.state.values())]


########################################
#                 Data                 #
########################################


@dataclass
class DataConfig(Section):
    """Shards of tokens, and what they stand for."""

    data: str = "data/fineweb10B"  # folder of *_train_*.bin and *_val_*.bin shards
    tokenizer: str = "gpt2"  # gpt2 or a SentencePiece model; for bits per byte and samples
    vocab: int = 50257  # token ids in use
    doc_token: int = 50256  # the token that starts every document
    val_tokens: int = 10485760  # scored prefix of the validation stream; 0: all of it
    train_tokens: int = 0  # use only so many tokens of the training shards, from their start
    epochs: int = 1  # passes over the training shards that the run may make; 0: as many as it needs
    # 1: the last evaluation gives no probability to tokens that the tokenizer never puts behind the
    # one before
    canonical_mask: int = 0
    # 0: shards in the order of their names; each epoch anew 1: rows, 2: documents and rows
    # (slowrun)
    shuffle: int = 0
    # 1: each row begins with a document; the rest of one that a row's end cuts is passed over
    bos_rows: int = 0
    doc_cap: str = "0"  # [sched] so many first tokens of a document are in a row; 0: all

    LIMITS = limits(
        (0, 1, "canonical_mask bos_rows"),
        (0, 2, "shuffle"),
        (0, 10**6, "epochs"),
        (0, 10**9, "doc_cap"),
        (0, 10**12, "val_tokens train_tokens"),
        (0, 65536, "doc_token"),
        (2, 65536, "vocab"),
    )

    def check(self) -> None:
        require(
            0 <= self.doc_token < self.vocab,
            f"doc_token = {self.doc_token}: not below vocab = {self.vocab}",
        )
        require(
            not (self.bos_rows and self.shuffle),
            f"bos_rows = 1 takes documents as they stand, and shuffle = {self.shuffle} does not: "
            "set --shuffle 0 or --bos_rows 0",
        )
        require(
            not (self.bos_rows and self.max_seconds),
            f"bos_rows = 1 counts before the first step how far the documents reach, and under "
            f"max_seconds = {self.max_seconds:g} nobody knows the steps: set --bos_rows 0",
        )

    def needs(self) -> list[Need]:
        others = self.average_epochs or self.cycles
        return [
            ("doc_cap", "bos_rows = 1, whose documents it cuts", self.bos_rows > 0),
            ("canonical_mask", "a tokenizer", bool(self.tokenizer)),
            ("canonical_mask", "no average_epochs or cycles: they are scored without", not others),
        ]


# as in llm.c, modded-nanogpt and parameter-golf
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 1024
SHARD_NAME = r".+_{}_[0-9]{{6}}\.bin"  # of train or val; data/get.py, without torch, has the same


def shard_tokens(path: str | Path) -> int:
    """Number of tokens of a shard from its header, checked against the size of the file."""
    try:
        with open(path, "rb") as f:
            raw = f.read(SHARD_HEADER)
        size = os.path.getsize(path)
    except OSError as e:
        raise unreadable(path, e) from e
    again = "; delete it and get it again with data/get.py"
    header = np.frombuffer(raw, dtype="<i4") if len(raw) == SHARD_HEADER else ()
    if not len(header):
        raise UserError(
            f"{path} is truncated: {size} bytes do not even hold the header of "
            f"{SHARD_HEADER}{again}"
        )
    if header[0] != SHARD_MAGIC:
        raise UserError(
            f"{path} is no token shard: its magic number is {header[0]} instead of {SHARD_MAGIC} "
            "(nanoGPT's raw .bin files need `python data/get.py tokenize`)"
        )
    if header[1] != SHARD_VERSION:
        raise UserError(
            f"{path} has shard version {header[1]}; only version {SHARD_VERSION} (uint16 tokens) "
            "is read"
        )
    if size != SHARD_HEADER + 2 * int(header[2]):
        raise UserError(
            f"{path} is truncated or damaged: its header promises {header[2]} tokens, that is "
            f"{SHARD_HEADER + 2 * int(header[2])} bytes, but it has {size}{again}"
        )
    return int(header[2])


def unreadable(path: str | Path, e: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read ({e.strerror or e}); see that it is there and that you may read it"
    )


def read_shard(path: str | Path, vocab: int = 0) -> np.ndarray:
    """The tokens of a shard, a uint16 memory map. vocab > 0: each is checked against it."""
    count = shard_tokens(path)
    tokens = np.zeros(0, "<u2")
    if count:
        try:
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER, shape=(count,))
        except OSError as e:
            raise unreadable(path, e) from e
    if vocab and count and int(tokens.max()) >= vocab:
        where = int(np.argmax(tokens >= vocab))
        raise UserError(
            f"{path}: token {tokens[where]} at position {where} is not below vocab = {vocab}; the "
            "shard was made with another tokenizer: set --vocab, or get the data that belongs to "
            "this preset"
        )
    return tokens


def shard_files(folder: str, split: str) -> list[str]:
    """
    The shards of one side, by name: *_train_NNNNNN.bin or *_val_NNNNNN.bin with six digits, and
    nothing else. A copy ("x_train_000001 (1).bin") is no shard, and of a name with both words the
    last one says the side.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise unreadable(folder, e) from e
    rule = SHARD_NAME.format(split)
    return [os.path.join(folder, name) for name in sorted(names) if re.fullmatch(rule, name)]


def find_shards(cfg: Config, split: str) -> list[str]:
    files = shard_files(cfg.data, split)
    if not files:
        near = sorted(path.name for path in Path(cfg.data).glob(f"*{split}*.bin"))
        but = f" ({near[0]} does not: six digits end the name of a shard)" if near else ""
        raise UserError(
            f"no {split} shards: nothing in {cfg.data} matches *_{split}_NNNNNN.bin{but}; run: "
            f"{get_command(cfg)}"
        )
    return files


def get_command(cfg: Config, shards: int = 0) -> str:
    """What brings this data to where the configuration looks for it."""
    folder, many = Path(cfg.data), True
    name, out = folder.name, f" --out {shlex.quote(cfg.data)}"
    verb, usual = name, folder == Path("data") / name
    if name.startswith("golf_"):
        verb = f"golf --variant {name.removeprefix('golf_')}"
    elif name.removeprefix("sample").isdigit():
        verb, usual, many = f"sample --vocab {name.removeprefix('sample')}", False, False
    elif name in ("sample", "slowrun"):
        many = False
    elif name not in ("fineweb10B", "fineweb100B", "finewebedu10B"):
        return f"python data/get.py tokenize YOUR_TEXT{out}"
    more = f" --shards {shards}" if shards and many else ""
    return f"python data/get.py {verb}{'' if usual else out}{more}"


class OutOfData(UserError):
    """The last epoch has ended."""


class Loader:
    """
    Batches of rows, the same tokens at any number of ranks. tokens_in_order() counts those of the
    speedrun's rule: a batch is one stretch of one shard, a tail that holds no whole batch is
    dropped, shards follow in the order of their names. Of shuffled_starts() the rows of all shards
    are drawn in a new order each epoch. With shuffle_documents() (slowrun) the stream is put
    together from its documents in a new order each epoch but the first, and rows share no token.
    With bos_rows `pos` counts the documents of a shard, see next_documents().
    The position is a few integers, and stays where it was if the next batch cannot be had.
    """

    def __init__(self, cfg: Config, plan: Plan, run: Ranks = ALONE):
        self.cfg, self.run = cfg, run
        self.files = find_shards(cfg, "train")
        self.counts = [shard_tokens(f) for f in self.files]
        if cfg.train_tokens:
            self.read_less(cfg.train_tokens)
        self.held_out = len(held_out(cfg)) if cfg.fitness_tokens else 0
        self.counts[0] -= self.held_out
        self.block = plan.max_seq_len
        self.opened: dict[int, np.ndarray] = {}
        # shuffle 2: shard, start, length and end in this epoch's stream of each document [n, 4]
        self.stream = None
        self.epoch = self.shard = self.pos = 0
        self.order: np.ndarray | None = None
        self.marks: dict = {}  # see identity()
        self.ends: tuple | None = None  # see document_ends()
        if cfg.bos_rows:
            self.check_documents(plan)
        else:
            self.check_enough(plan)

    def read_less(self, left: int) -> None:
        """Of all shards so many tokens, from the first on."""
        for i, count in enumerate(self.counts):
            self.counts[i] = min(count, left)
            left -= self.counts[i]
        if left:
            raise UserError(
                f"train_tokens = {self.cfg.train_tokens}, but the train shards in {self.cfg.data} "
                f"hold {sum(self.counts)}; lower it, or run: "
                f"{get_command(self.cfg, 2 * len(self.files))}"
            )

    def check_enough(self, plan: Plan) -> None:
        """
        Before the first step: one batch fits, and the epochs allowed hold the tokens of all steps.
        """
        cfg, steps = self.cfg, plan.cfg.steps
        for now in plan.moments():
            if cfg.shuffle and (now.batch_tokens % self.block or self.block % now.seq_len):
                raise UserError(
                    f"with shuffle = {cfg.shuffle} the largest seq_len = {self.block} must divide "
                    f"batch_tokens = {now.batch_tokens} and be a multiple of every other seq_len, "
                    f"here {now.seq_len}"
                )
            if not self.per_epoch(now.batch_tokens):
                raise self.no_batch(now.batch_tokens)
        needed, now = plan.tokens(), plan.at(0, 0.0)
        first = now.batch_tokens
        held = self.rows() * self.block if cfg.shuffle else self.per_epoch(first) * first
        if (
            cfg.lr_cycles or cfg.average_epochs or cfg.eval_every < 0 and not cfg.cycles
        ) and needed < 0.95 * cfg.epochs * held:
            raise UserError(
                f"steps = {steps} read {needed} tokens, {needed / held:.2f} epochs of {held}, but "
                f"lr_cycles, average_epochs and eval_every -1 take them for epochs = {cfg.epochs}: "
                f"set --epochs {max(1, round(needed / held))}, --steps "
                f"{int(cfg.epochs * held // first)}, or --train_tokens"
            )
        if not cfg.epochs or cfg.max_seconds:
            return
        usable = cfg.epochs * held if cfg.shuffle else self.tokens_in_order(plan)
        if cfg.train_tokens and needed > usable:
            raise UserError(
                f"too little data for {steps} steps: they need {needed} tokens, and of "
                f"train_tokens = {cfg.train_tokens} {usable // cfg.epochs} are usable in each of "
                f"epochs = {cfg.epochs}; raise --train_tokens (0: all), or lower --steps, or allow "
                "more epochs with --epochs (0: as many as needed)"
            )
        if needed > usable:
            per = usable / len(self.files) / cfg.epochs
            more = max(len(self.files) + 1, math.ceil(needed / per / cfg.epochs))
            raise UserError(
                f"too little data for {steps} steps: they need {needed} tokens, that is "
                f"{needed / per / cfg.epochs:.1f} train shards, found {len(self.files)} in "
                f"{cfg.data} with {usable // cfg.epochs} usable tokens; run: "
                f"{get_command(cfg, more)}, or lower --steps, or allow more epochs with --epochs "
                "(0: as many as needed)"
            )

    def check_documents(self, plan: Plan) -> None:
        """
        The same for bos_rows: go through the documents once, as all steps will. What counts epochs
        by their tokens is refused.
        """
        cfg, steps, drawn = self.cfg, plan.cfg.steps, 0
        counted = ["lr_cycles"] if cfg.lr_cycles else []
        counted += ["average_epochs"] if cfg.average_epochs else []
        counted += ["eval_every"] if cfg.eval_every < 0 and not cfg.cycles else []
        require(
            not counted,
            f"bos_rows = 1 and {' and '.join(counted)}, which counts epochs by their tokens: rows "
            "that begin with documents leave out some of them; set --bos_rows 0",
        )
        try:
            for step in range(steps):
                now = plan.at(step, step / steps)
                self.next_documents(step, now.batch_tokens, now.seq_len, now.doc_cap)
                drawn += now.batch_tokens
        except OutOfData:
            if not drawn:
                raise self.no_documents(now.batch_tokens, now.doc_cap) from None
            if cfg.train_tokens:
                raise UserError(
                    f"too little data for {steps} steps: with bos_rows = 1 and doc_cap = "
                    f"{cfg.doc_cap!r} they need {plan.tokens()} tokens, and train_tokens = "
                    f"{cfg.train_tokens} give {drawn} in epochs = {cfg.epochs}; raise "
                    "--train_tokens (0: all), or lower --steps, or allow more epochs with "
                    "--epochs (0: as many as needed)"
                ) from None
            more = math.ceil(len(self.files) * plan.tokens() / drawn) + 1
            raise UserError(
                f"too little data for {steps} steps: with bos_rows = 1 and doc_cap = "
                f"{cfg.doc_cap!r} they need {plan.tokens()} tokens, and the {len(self.files)} "
                f"train shards in {cfg.data} give {drawn} in epochs = {cfg.epochs}; run: "
                f"{get_command(cfg, more)}, or lower --steps, or allow more epochs with --epochs "
                "(0: as many as needed)"
            ) from None
        self.epoch = self.shard = self.pos = 0

    def no_batch(self, batch_tokens: int) -> UserError:
        """Why not one batch can be had."""
        held = sum(self.counts)
        found = f"the {len(self.files)} train shards in {self.cfg.data} hold {held} tokens"
        if self.cfg.train_tokens:
            found += f" within train_tokens = {self.cfg.train_tokens}"
        if held <= batch_tokens:
            more = f"run: {get_command(self.cfg)}"
            if self.cfg.train_tokens:
                more = "raise --train_tokens (0: all)"
            return UserError(
                f"{found}, less than one batch of {batch_tokens} and the token behind it; lower "
                f"--batch_tokens or {more}"
            )
        if self.cfg.shuffle:
            why = " (with shuffle = 1 a row lies in one shard)" if self.cfg.shuffle == 1 else ""
            return UserError(
                f"{found}, which make {self.rows()} rows of {self.block} and its last target{why}, "
                f"too few for a batch of {batch_tokens}; lower --batch_tokens or --seq_len"
            )
        return UserError(
            f"{found}, but none holds a batch of {batch_tokens}: without shuffle a batch is a "
            f"stretch of one shard, and the largest has room for {max(self.counts) - 2}; lower "
            "--batch_tokens, set --shuffle 1, or make larger shards (get.py tokenize "
            "--shard_tokens)"
        )

    def tokens_in_order(self, plan: Plan) -> int:
        """Tokens that the run's batches can have, without shuffle, until steps or epochs end."""
        shards, pos, drawn = iter(self.counts * self.cfg.epochs), 0, 0
        count = next(shards)
        for steps, batch_tokens in plan.batches():
            while steps:
                fit = max(0, (count - 2 - pos) // batch_tokens)  # pos + batch + 1 stays below count
                here = min(steps, fit)
                steps -= here
                pos += here * batch_tokens
                drawn += here * batch_tokens
                if steps:
                    count, pos = next(shards, None), 0
                    if count is None:
                        return drawn
        return drawn

    def per_epoch(self, batch_tokens: int) -> int:
        """Batches in one pass."""
        if self.cfg.shuffle:
            return self.rows() * self.block // batch_tokens
        return sum(max(0, -(-(n - 1) // batch_tokens) - 1) for n in self.counts)

    def rows(self) -> int:
        """Rows of one pass, shuffled."""
        if self.cfg.shuffle == 2:
            return sum(self.counts) // (self.block + 1)
        return sum((n - 1) // self.block for n in self.counts if n)

    def open_shards(self) -> None:
        """Open what the first batch may need. shuffle: all shards, so none is found bad later."""
        for shard in range(len(self.files) if self.cfg.shuffle else 1):
            self.tokens_of(shard)

    def tokens_of(self, shard: int) -> np.ndarray:
        if shard not in self.opened:
            if not self.cfg.shuffle:
                self.opened.clear()  # one at a time
            path, vocab = self.files[shard], self.cfg.vocab
            # which may fail on one rank alone
            self.opened[shard] = self.run.together(lambda: read_shard(path, vocab))
            if self.held_out and shard == 0:
                self.opened[shard] = self.opened[shard][self.held_out :]
        return self.opened[shard]

    def ended(self, batch_tokens: int) -> bool:
        """Whether there is no next batch of this size: it would end behind the last epoch."""
        if not self.cfg.epochs or self.epoch < self.cfg.epochs - 1:
            return False
        if self.cfg.shuffle:
            return self.pos + batch_tokens // self.block > self.rows()
        pos = [self.pos] + [0] * len(self.files)
        return all(p + batch_tokens + 1 >= n for p, n in zip(pos, self.counts[self.shard :]))

    def batch(self, step: int, batch_tokens: int, seq_len: int, doc_cap: int = 0) -> np.ndarray:
        """This rank's rows of the next batch [n, seq_len + 1] in uint16; then move on."""
        if not self.cfg.keep:
            return self.next_rows(step, batch_tokens, seq_len, doc_cap)
        before = self.state_dict()
        try:
            return self.next_rows(step, batch_tokens, seq_len, doc_cap)
        except UserError:
            self.load_state_dict(before)  # a checkpoint of now goes on with this very batch
            raise

    def next_rows(self, step: int, batch_tokens: int, seq_len: int, doc_cap: int) -> np.ndarray:
        share = batch_tokens // self.run.world
        if self.cfg.bos_rows:
            return self.document_rows(step, batch_tokens, seq_len, doc_cap)
        if self.cfg.shuffle:
            starts = self.shuffled_starts(step, batch_tokens // self.block)
            first, count = self.run.rank * share // seq_len, share // seq_len
            per = self.block // seq_len  # rows in a block
            rows = []
            for i in range(first, first + count):
                stream, shard, block = starts[i // per]
                low = block * (self.block + (stream is not None)) + i % per * seq_len
                row = (
                    self.tokens_of(shard)[low : low + seq_len + 1]
                    if stream is None
                    else self.stretch(stream, low, seq_len + 1)
                )
                rows.append(row)
            return np.stack(rows)
        while self.pos + batch_tokens + 1 >= self.counts[self.shard]:
            self.shard, self.pos = self.shard + 1, 0
            if self.shard == len(self.files):
                self.next_epoch(step)
        low = self.pos + self.run.rank * share
        self.pos += batch_tokens
        flat = self.tokens_of(self.shard)[low : low + share + 1]
        return np.lib.stride_tricks.sliding_window_view(flat, seq_len + 1)[::seq_len]

    def document_ends(self, doc_cap: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Where documents of the present shard begin and behind them its end [n + 1], and how many
        tokens those before each give, of each doc_cap at most [n + 1].
        """
        key = self.shard, doc_cap
        if self.ends is None or self.ends[0] != key:
            count = self.counts[self.shard]
            begun = np.flatnonzero(self.tokens_of(self.shard)[:count] == self.cfg.doc_token)
            starts = np.append(begun, count)
            sizes = np.minimum(np.diff(starts), doc_cap or count)
            self.ends = key, starts, np.concatenate([[0], sizes.cumsum()])
        return self.ends[1:]

    def next_documents(self, step: int, batch_tokens: int, seq_len: int, cap: int) -> list[int]:
        """
        Of each row of the next batch the first document, and behind them the one behind the last;
        then move on. A shard without enough of them for the whole batch is left (modded-nanogpt).
        """
        tried = 0
        while True:
            _, ends = self.document_ends(cap)
            bounds = [self.pos]
            while len(bounds) <= batch_tokens // seq_len:
                # the first that ends where the row is full, or behind that
                last = int(np.searchsorted(ends, ends[bounds[-1]] + seq_len + 1))
                if last == len(ends):
                    break
                bounds.append(last)
            else:
                self.pos = bounds[-1]
                return bounds
            tried += 1
            if tried > len(self.files):
                raise self.no_documents(batch_tokens, cap)
            self.shard, self.pos = self.shard + 1, 0
            if self.shard == len(self.files):
                self.next_epoch(step)

    def no_documents(self, batch_tokens: int, cap: int) -> UserError:
        where = self.cfg.data
        if self.cfg.train_tokens:
            where += f" within train_tokens = {self.cfg.train_tokens}"
        return UserError(
            f"no train shard in {where} has documents (doc_token = {self.cfg.doc_token}) "
            f"for a batch of {batch_tokens} with bos_rows = 1 and doc_cap = {cap}: lower "
            "--batch_tokens, or set --bos_rows 0"
        )

    def document_rows(self, step: int, batch_tokens: int, seq_len: int, cap: int) -> np.ndarray:
        """
        Rows of whole documents, or their first `cap` tokens, the last of them cut where the row is
        full. The target behind a cut is the token that begins the next document.
        """
        bounds = self.next_documents(step, batch_tokens, seq_len, cap)
        (starts, _), tokens = self.document_ends(cap), self.tokens_of(self.shard)
        share = batch_tokens // seq_len // self.run.world
        rows = np.empty((share, seq_len + 1), tokens.dtype)
        for i, row in enumerate(rows, self.run.rank * share):
            at = 0
            for first, end in zip(starts[bounds[i] :], starts[bounds[i] + 1 : bounds[i + 1] + 1]):
                piece = tokens[first : min(end, first + (cap or end), first + seq_len + 1 - at)]
                row[at : at + len(piece)] = piece
                at += len(piece)
        return rows

    def shuffled_starts(self, step: int, count: int) -> list[tuple]:
        """Of the next rows: the stream that they are cut from, shard, number of the row in it."""
        starts = []
        while len(starts) < count:
            if self.order is None:
                rng = np.random.default_rng([self.cfg.seed, self.epoch])
                if self.cfg.shuffle == 2:
                    self.shuffle_documents()
                    blocks = [(0, b) for b in range(self.rows())]
                else:
                    blocks = [
                        (s, b)
                        for s, n in enumerate(self.counts)
                        for b in range(max(0, n - 1) // self.block)
                    ]
                self.order = np.array(blocks)[rng.permutation(len(blocks))]
            if self.pos == len(self.order):
                self.next_epoch(step)
                continue
            # a batch may run from one epoch into the next
            starts.append((self.stream, *self.order[self.pos]))
            self.pos += 1
        return starts

    def shuffle_documents(self) -> None:
        """
        Documents in the order of this epoch; the first keeps the order of the files, as slowrun
        does. A document that runs across shards is several pieces that stay together: what stands
        before a shard's first separator belongs to the shard before.
        """
        pieces, documents, begun = [], [], 0
        for shard, n in enumerate(self.counts):
            if n:
                tokens = self.tokens_of(shard)[:n]
                starts = np.union1d([0], np.flatnonzero(tokens == self.cfg.doc_token))
                lengths = np.diff(starts, append=n)
                pieces.append(np.column_stack([np.full(len(starts), shard), starts, lengths]))
                documents.append(begun + np.cumsum(tokens[starts] == self.cfg.doc_token))
                begun = documents[-1][-1]
        pieces, documents = np.concatenate(pieces).astype(np.int64), np.concatenate(documents)
        if self.epoch:
            documents = documents - documents[0]  # from 0, also where the first has no separator
            rng = np.random.default_rng([self.cfg.seed, self.epoch, 1])
            place = np.argsort(rng.permutation(documents[-1] + 1))  # of a document in the new order
            pieces = pieces[np.argsort(place[documents], kind="stable")]
        self.stream = np.column_stack([pieces, pieces[:, 2].cumsum()])

    def stretch(self, stream: np.ndarray, low: int, count: int) -> np.ndarray:
        """Tokens low..low+count-1 of a stream of documents."""
        parts, i = [], int(np.searchsorted(stream[:, 3], low, side="right"))
        while count:
            shard, start, length, end = stream[i]
            skip = low - (end - length)
            parts.append(self.tokens_of(shard)[start + skip : start + min(length, skip + count)])
            low, count, i = low + len(parts[-1]), count - len(parts[-1]), i + 1
        return np.concatenate(parts)

    def next_epoch(self, step: int) -> None:
        self.epoch, self.shard, self.pos, self.order = self.epoch + 1, 0, 0, None
        if self.cfg.epochs and self.epoch >= self.cfg.epochs:
            raise OutOfData(
                f"ran out of train shards at step {step}: {len(self.files)} found in "
                f"{self.cfg.data}; run: {get_command(self.cfg, 2 * len(self.files))}, or raise "
                f"--epochs (now {self.cfg.epochs})"
            )

    def identity(self) -> dict:
        """What a checkpoint keeps of its data: data_marks() when it was first asked for."""
        self.marks = self.marks or data_marks(self.cfg)
        return self.marks

    def accept(self, saved: dict, position: dict) -> str:
        """accepted(), of the data as it is now."""
        return accepted(self.cfg, saved, self.identity(), position)

    def targets(self, batch_tokens: int) -> int:
        """How many tokens of a batch bear a loss."""
        return batch_tokens

    def tensors(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        return tensors(rows, device)

    def fingerprint(self) -> str:
        return data_fingerprint(self.cfg)

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "shard": self.shard, "pos": self.pos}

    def load_state_dict(self, state: dict) -> None:
        if state["epoch"] < 0 or not 0 <= state["shard"] < len(self.files) or state["pos"] < 0:
            raise ValueError(f"no such place in the data: {state}")
        self.epoch, self.shard, self.pos, self.order = (
            state["epoch"],
            state["shard"],
            state["pos"],
            None,
        )


def held_out(cfg: Config) -> np.ndarray:
    """
    The first documents of the training text that together have fitness_tokens or more, and that
    nothing is trained on.
    """
    path = find_shards(cfg, "train")[0]
    tokens = read_shard(path)[: cfg.train_tokens or None]
    starts = np.flatnonzero(tokens[cfg.fitness_tokens :] == cfg.doc_token)
    require(
        len(starts) > 0,
        f"fitness_tokens = {cfg.fitness_tokens}: behind so many tokens no document of {path} (or "
        "of its train_tokens) begins: lower it",
    )
    return tokens[: cfg.fitness_tokens + starts[0]]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Without a wait: from pinned memory, as else a copy waits for what was begun."""
    x = torch.from_numpy(array)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def tensors(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [n, T+1] -> inputs and targets [n, T] int64 on the device."""
    rows = to_device(rows.astype(np.int64), device)
    # clone: of a single row both would be views of one memory, and evaluation writes to targets
    return rows[:, :-1].contiguous(), rows[:, 1:].clone(memory_format=torch.contiguous_format)


def data_marks(cfg: Config) -> dict[str, dict]:
    """The mark of every shard, by side and name, and of what else the losses depend on."""
    marks: dict[str, dict] = {}
    for split in ("train", "val"):
        files = find_shards(cfg, split)
        marks[split] = {os.path.basename(path): shard_mark(path) for path in files}
    beside = [("tokenizer", cfg.tokenizer)] if cfg.tokenizer else []
    if cfg.teacher:
        path = source_path(cfg.teacher)
        beside.append(("teacher", str(path if path.is_file() else path / "model.safetensors")))
    marks["beside"] = {name: shard_mark(path) for name, path in beside if os.path.isfile(path)}
    return marks


def accepted(cfg: Config, saved: dict, found: dict, position: dict) -> str:
    """
    Compare the data of a checkpoint (Loader.identity()) with that of now; gives a notice where only
    shards differ that it had not yet read: in order and in the first epoch, those behind its
    position.

    Raises UserError if the position would point to other tokens, or losses would be of another
    validation text.
    """
    wrong, unread = [], []
    old, new = ({**both["train"], **both["val"]} for both in (saved, found))
    in_order = not cfg.shuffle and not position["epoch"]
    last = sorted(saved["train"])[position["shard"]]
    for name in sorted(old | new):
        if old.get(name) == new.get(name):
            continue
        if name not in new:
            what = "is gone"
        elif name not in old:
            what = "is new"
        elif old[name][0] != new[name][0]:
            what = f"has {new[name][0]} bytes instead of {old[name][0]}"
        else:
            what = "has other content"
        known = name in saved["train"] or name in found["train"]
        (unread if known and in_order and name > last else wrong).append(f"{name} {what}")
    for name, mark in saved.get("beside", {}).items():  # older checkpoints have none
        if found["beside"].get(name, mark) != mark:
            wrong.append(f"{name} = {getattr(cfg, name)!r} has other content")
    if wrong:
        some = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(
            f"the data in {cfg.data} is not what this run was trained on: {some}; put the "
            "old files back, or start another --run (--init_from takes over the weights)"
        )
    said = "shards that this run has not yet read have changed: "
    return said + "; ".join(unread) if unread else ""


def shard_mark(path: str) -> list:
    """
    Size, and a hash of both ends and of blocks between them, 1 MiB in all: for resuming, where a
    minute of reading is too much and the question is whether a file was exchanged. What proves
    content is data_fingerprint.
    """
    block, digest = 1 << 16, hashlib.sha256()
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            for i in range(16):
                f.seek(max(0, size - block) * i // 15)
                digest.update(f.read(block))
    except OSError as e:
        raise unreadable(path, e) from e
    return [size, digest.hexdigest()]


def data_fingerprint(cfg: Config) -> str:
    """
    SHA-256 of every byte of every shard: of what `sha256sum *_train_*.bin *_val_*.bin` prints in
    the data's folder. Some GB take seconds, so it is reckoned once, behind the clock.
    """

    def line(path: str) -> str:
        try:
            with open(path, "rb") as f:
                return f"{hashlib.file_digest(f, 'sha256').hexdigest()}  {os.path.basename(path)}\n"
        except OSError as e:
            raise unreadable(path, e) from e

    paths = find_shards(cfg, "train") + find_shards(cfg, "val")
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as threads:
        return hashlib.sha256("".join(threads.map(line, paths)).encode()).hexdigest()


class Tokenizer:
    """A tokenizer by its name or file, with the bytes that each token stands for."""

    def __init__(self, name: str, vocab: int, doc_token: int):
        self.name, self.vocab, self.doc_token = name, vocab, doc_token
        if name == "gpt2":
            import tiktoken

            try:
                self.gpt2 = tiktoken.get_encoding("gpt2")
            except Exception as e:  # tiktoken raises whatever its download raises
                raise UserError(
                    f"tokenizer gpt2: tiktoken could not load its files ({type(e).__name__}); they "
                    "are fetched once over the network and then cached in TIKTOKEN_CACHE_DIR"
                ) from e
            self.sp = None
        else:
            import sentencepiece

            if not Path(name).is_file():
                raise UserError(
                    f"tokenizer = {name!r}: no such file; for the shipped text run: python "
                    "data/get.py sample"
                )
            try:
                self.sp = sentencepiece.SentencePieceProcessor()
                # not by its name, which may have bytes that are no UTF-8
                self.sp.LoadFromSerializedProto(Path(name).read_bytes())
            except (RuntimeError, OSError) as e:
                raise UserError(f"tokenizer = {name!r} is no SentencePiece model: {e}") from e
            # Beside a character without a piece, a space needs a piece of its own. Without one it
            # becomes the three bytes of U+2581, which would count as three and decode to that sign.
            if "\u2581" in self.sp.decode(self.sp.encode("\ue000 \ue001 \ue002")):
                raise UserError(
                    f"tokenizer = {name!r} has no piece for a space by itself: spaces would count "
                    "as three bytes, and bits per byte be too low; train one that has (get.py "
                    "tokenize --tokenizer train:VOCAB)"
                )

    def encode(self, text: str) -> list[int]:
        return self.sp.encode(text) if self.sp else self.gpt2.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """Text of the tokens; document tokens are left out."""
        tokens = [int(t) for t in tokens if t != self.doc_token]
        return self.sp.decode(tokens) if self.sp else self.gpt2.decode(tokens)

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        For every token: its bytes, whether a space stands before it, whether it swallows a space
        that follows. The rule is parameter-golf's: a leading space counts unless the token before
        is a control token (a document's start).
        """
        size = max(self.vocab, self.sp.get_piece_size() if self.sp else self.gpt2.n_vocab)
        base, space, edge = np.zeros(size, np.int64), np.zeros(size, bool), np.ones(size, bool)
        if not self.sp:
            for i in range(self.gpt2.n_vocab):
                if i != self.gpt2.eot_token:
                    base[i], edge[i] = len(self.gpt2.decode_single_token_bytes(i)), False
            return base, space, edge
        for i in range(self.sp.get_piece_size()):
            if self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_unused(i):
                continue
            edge[i] = False
            piece = self.sp.id_to_piece(i)
            space[i] = piece.startswith("\u2581") and not self.sp.is_byte(i)
            text = piece.removeprefix("\u2581").replace("\u2581", " ")
            base[i] = 1 if self.sp.is_byte(i) else len(text.encode())
        return base, space, edge

    def merged_pieces(self) -> dict[bytes | str, int]:
        """
        The pieces of byte pair encoding with their ids, which are in the order of the merges; those
        of SentencePiece are text with U+2581 for a space. UserError where it is no such encoding.
        """
        if not self.sp:
            count = self.gpt2.eot_token
            return {self.gpt2.decode_single_token_bytes(i): i for i in range(count)}
        none = self.sp.is_control, self.sp.is_unknown, self.sp.is_unused, self.sp.is_byte
        ids = [i for i in range(self.sp.get_piece_size()) if not any(f(i) for f in none)]
        scores = [self.sp.get_score(i) for i in ids]
        # byte pair encoding numbers its pieces 0, -1, -2, ...; a unigram model has probabilities
        if scores != sorted(set(scores), reverse=True) or scores != [int(x) for x in scores]:
            raise UserError(
                f"tokenizer = {self.name!r} does no byte pair encoding, which alone a mask of "
                "tokens can be made for: --canonical_mask 0, or --canonical 0 of a score"
            )
        return {self.sp.id_to_piece(i): i for i in ids}

    def pieces(self) -> list[tuple[bytes, bool]]:
        """
        The bytes of every id in use, none of control tokens; and whether it stands for one byte of
        a character that has no piece (SentencePiece), whatever other piece has that byte.
        """
        found = []
        for i in range(self.vocab):
            if not self.sp:
                control = i >= self.gpt2.n_vocab or i == self.gpt2.eot_token
                found.append((b"" if control else self.gpt2.decode_single_token_bytes(i), False))
            elif i >= self.sp.get_piece_size() or self.sp.is_control(i) or self.sp.is_unknown(i):
                found.append((b"", False))
            elif self.sp.is_byte(i):
                found.append((bytes([int(self.sp.id_to_piece(i)[1:-1], 16)]), True))
            else:
                text = "" if self.sp.is_unused(i) else self.sp.id_to_piece(i)
                found.append((text.replace("\u2581", " ").encode(), False))
        return found

    def count_bytes(self, tokens: np.ndarray) -> int:
        """Bytes of text that tokens[1:] stand for, each seen behind its predecessor."""
        base, space, edge = self.tables()
        return int(base[tokens[1:]].sum() + (space[tokens[1:]] & ~edge[tokens[:-1]]).sum())


def merge_history(
    piece: bytes | str, ids: dict[bytes | str, int]
) -> tuple[list[tuple], list[tuple], tuple] | None:
    """
    How byte pair encoding makes a token from its bytes or characters: its last piece and its first
    one over time, each with the rank of the merge that ends it, and the last pair merged. The rank
    of a merge is the id of what it makes. None where the token is not what its text becomes, or
    where a merge has a lower rank than one before it: time would not be the rank.
    """
    parts, last, first, pair, now = [piece[i : i + 1] for i in range(len(piece))], [], [], (), -1
    while len(parts) > 1:
        ranks = [ids.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        rank = min(ranks)
        at = ranks.index(rank)  # of equal ranks the leftmost
        if not now <= rank < math.inf:
            return None
        now, pair = rank, (parts[at], parts[at + 1])
        if at + 2 == len(parts):
            last.append((parts[-1], rank))
        if at == 0:
            first.append((parts[0], rank))
        parts[at : at + 2] = [pair[0] + pair[1]]
    end = (parts[0], math.inf)
    return [*last, end], [*first, end], pair


class Merges:
    """
    Which tokens byte pair encoding never puts behind which (arXiv 2506.07956, the part of it that
    needs one token of context; modded-nanogpt #91). Between two tokens of its output no merge
    crossed, so both grew as they do alone. If, while they grew, a pair that is merged stood at the
    border, the encoder had merged it: these two tokens are not its output.
    """

    def __init__(self, ids: dict[bytes | str, int]):
        """ids: of every piece that merging makes or begins with, in the order of the merges."""
        known = {i: merge_history(piece, ids) for piece, i in ids.items()}
        self.histories = {i: history for i, history in known.items() if history}
        beginning = defaultdict(list)  # by piece: tokens that begin with it, and from when to when
        self.rules = defaultdict(list)  # by left piece: rank of the merge, tokens behind the border
        for i, (_, first, _) in self.histories.items():
            since = 0
            for piece, until in first:
                beginning[piece].append((since, until, i))
                since = until + 1  # a border to the left of a merge of the same rank comes first
        tables = {piece: np.array(rows).T for piece, rows in beginning.items()}
        for i, (_, _, pair) in sorted(self.histories.items()):
            if pair and pair[1] in tables:
                since, until, tokens = tables[pair[1]]
                behind = tokens[(since <= i) & (i <= until)].astype(np.int64)
                self.rules[pair[0]].append((i, behind))

    def impossible(self, token: int) -> np.ndarray:
        """Ids of the tokens that cannot stand behind this one in one stretch of merging."""
        found, since = [np.empty(0, np.int64)], 0
        for piece, until in self.histories[token][0] if token in self.histories else ():
            rules = self.rules.get(piece, ())
            low, high = (bisect.bisect_left(rules, r, key=lambda x: x[0]) for r in (since, until))
            found += [behind for _, behind in rules[low:high]]
            since = until  # a border to the right of a merge of the same rank comes later
        return np.concatenate(found)


def border_class(text: str, at: int) -> str:
    """S whitespace, N number, L letter, O other, ? a part of a character; of text[at]."""
    c = text[at]
    if c == "\ufffd":
        return "?"
    if c.isspace() and not "\x1c" <= c <= "\x1f":  # Python's spaces, less four that are not \s
        return "S"
    return {"N": "N", "L": "L"}.get(unicodedata.category(c)[0], "O")


def canonical_mask(tokenizer: Tokenizer) -> np.ndarray:
    """
    Bits [V, ceil(V/8)] of the tokens that the tokenizer never puts behind each, the lowest bit
    first. A document's token, bytes of SentencePiece and unused ids are never among them.

    GPT-2 merges within stretches of its regular expression only, and the border must lie within
    one for certain: two whitespaces may be parted by what follows them, and letters behind a sign
    or behind a contraction ('s, 't, 're, ...) by what stands before it.
    """
    vocab, pieces = tokenizer.vocab, tokenizer.merged_pieces()
    merges, gpt2 = Merges(pieces), tokenizer.sp is None
    mask = np.zeros((vocab, -(-vocab // 8)), np.uint8)
    keep = {}
    if gpt2:
        texts = {i: piece.decode(errors="replace") for piece, i in pieces.items()}
        classes = np.array([border_class(texts[i], 0) if i in texts else "?" for i in range(vocab)])
        keep = {c: (classes == "?") | (classes == after) for c, after in (("S", "S"), ("O", "L"))}
        keep |= {c: classes == "?" for c in "NL?"}
    contraction = re.compile("(^|[^\\W_])'(s|t|re|ve|m|ll|d)$")
    for i in range(vocab):
        row = np.zeros(vocab, bool)
        row[merges.impossible(i)] = True
        if gpt2 and row.any():
            row &= ~keep[border_class(texts[i], -1)]
            row &= not contraction.search(texts[i])
        mask[i] = np.packbits(row, bitorder="little")
    return mask


def unpacked(mask: Tensor, tokens: Tensor, columns: int) -> Tensor:
    """Rows of canonical_mask() of tokens [...] -> truth values [..., columns], False beyond."""
    bits = mask[tokens].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    found = (bits & 1).bool().flatten(-2)[..., :columns]
    return F.pad(found, (0, columns - found.size(-1)))


def longest_prefixes(pieces: list[tuple[bytes, bool]]) -> np.ndarray:
    """
    Of each of Tokenizer.pieces() the other whose bytes are the longest that its own begin with; -1
    where there is none (modded-nanogpt #88). In the order of bytes all that begin with a piece
    stand behind it, so those that a piece begins with are a stack.
    """
    ids: dict[bytes, int] = {}
    for i in sorted(range(len(pieces)), key=lambda i: pieces[i][1]):
        ids.setdefault(pieces[i][0], i)  # of two with the same bytes no byte of other characters
    ids.pop(b"", None)
    longest: dict[bytes, int] = {b"": -1}
    stack: list[bytes] = []
    for own in sorted(ids):
        while stack and not own.startswith(stack[-1]):
            stack.pop()
        longest[own] = ids[stack[-1]] if stack else -1
        stack.append(own)
    return np.array([longest[own] for own, _ in pieces], np.int64)


class Validation:
    """The scored prefix of the validation stream: tokens, rows, bytes of text."""

    def __init__(self, cfg: Config, plan: Plan, tokenizer: Tokenizer | None):
        self.seq_len = self.stride = plan.eval_seq_len
        parts, have, want = [], 0, cfg.val_tokens + 1 if cfg.val_tokens else math.inf
        for path in find_shards(cfg, "val"):
            if have < want:
                tokens = read_shard(path, cfg.vocab)
                parts.append(tokens[: int(min(want - have, len(tokens)))])
                have += len(parts[-1])
        if cfg.val_tokens and have < want:
            raise UserError(
                f"val_tokens = {cfg.val_tokens}, but the val shards in {cfg.data} hold {have} (one "
                "more than scored is needed); lower --val_tokens, or 0 for all, or run: "
                f"{get_command(cfg)}"
            )
        self.rows = (have - 1) // self.seq_len
        if cfg.val_tokens and self.rows < 1:
            raise UserError(
                f"val_tokens = {cfg.val_tokens}: less than one row of {self.seq_len}; raise "
                "--val_tokens (0: all), or lower --eval_seq_len"
            )
        if self.rows < 1:
            raise UserError(
                f"the val shards in {cfg.data} hold {have} tokens, less than one row of "
                f"{self.seq_len}; lower --eval_seq_len"
            )
        self.tokens = np.concatenate(parts)[: self.rows * self.seq_len + 1]
        self.scored = self.rows * self.seq_len  # targets
        self.bytes = tokenizer.count_bytes(self.tokens) if tokenizer else 0

    def batch(self, rows: range, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
        """Rows as inputs and targets [size, T]; what is missing to size has targets -1."""
        T, stride = self.seq_len, self.stride
        data = np.stack([self.tokens[min(r, self.rows - 1) * stride :][: T + 1] for r in rows])
        x, y = tensors(data, device)
        y[[i for i, r in enumerate(rows) if r >= self.rows]] = -1
        assert len(x) == size
        return x, y

    def measure(self, trainer: Trainer, step: int, shape: Shape) -> dict:
        """More than the loss to know at an evaluation; there is nothing more to know of text."""
        return {}


class Fitness(Validation):
    """The held-out training text in rows that share no token, for the weights of an ensemble."""

    def __init__(self, cfg: Config, plan: Plan):
        self.seq_len, self.stride = plan.eval_seq_len, plan.eval_seq_len + 1
        self.rows = cfg.fitness_tokens // self.stride
        self.tokens = held_out(cfg)[: self.rows * self.stride]
        self.scored, self.bytes = self.rows * self.seq_len, 0


########################################
#              Averaging               #
########################################


@dataclass
class AverageConfig(Section):
    """Averages of the weights, and which weights are kept."""

    ema: float = 0.0  # decay per step of an exponential moving average of the weights; 0: none
    swa_every: int = 0  # steps between the snapshots of a plain average of the weights; 0: none
    swa_start: float = 0.75  # fraction of training from which those snapshots are taken
    # [sched] steps that an average reaches back, which begins where this is no longer 0, with the
    # weights of then ("0 2400s:150"); it is blended with the live weights
    tail_ema: str = "0"
    # the average's share, by name: words "pattern=share", the first that fits holds, and behind
    # them one for all others
    tail_blend: str = "0.6"
    average_epochs: int = 0  # keep the weights of the last n epochs for logs/score.py
    final_weights: str = "live"  # which weights are exported and sampled: live, ema, swa or tail

    LIMITS = limits(
        (0, 1, "swa_start"),
        (0, BELOW_ONE, "ema"),
        (0, 10**6, "average_epochs"),
        (0, 10**9, "swa_every tail_ema"),
    )
    CHOICES = {"final_weights": ("live", "ema", "swa", "tail")}

    def check(self) -> None:
        tail_shares(self)

    def needs(self) -> list[Need]:
        return [("tail_blend", "tail_ema, such as '0 0.8:50'", self.tail_ema != "0")]


def tail_shares(cfg: Config) -> list[tuple[re.Pattern, float]]:
    """What tail_blend says: patterns and the share of what they find."""
    shares = []
    for word in cfg.tail_blend.split():
        pattern, named, share = word.rpartition("=")
        try:
            shares.append((compiled_pattern(pattern), float(share)))
        except (re.error, ValueError) as e:
            raise UserError(f"tail_blend = {cfg.tail_blend!r}: {word!r} names no share") from e
        last = word == cfg.tail_blend.split()[-1]
        require(
            bool(named) != last and 0 <= shares[-1][1] <= 1,
            f"tail_blend = {cfg.tail_blend!r}: words pattern=share and behind them one share for "
            "all others, each from 0 to 1, for example 'embed=0 0.6'",
        )
    require(bool(shares), "tail_blend is empty: it needs a share such as 0.6")
    return shares


def tail_share(cfg: Config, name: str) -> float:
    return next(share for pattern, share in tail_shares(cfg) if pattern.search(name))


@contextlib.contextmanager
def weights_kept(buckets: list[Bucket]):
    """Behind it the model has its own weights again, also after an interruption."""
    kept = [b.weights.clone() for b in buckets]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, own in zip(buckets, kept):
                b.weights.copy_(own)


def is_averaged(cfg: Config) -> bool:
    return cfg.ema > 0 or cfg.swa_every > 0 or cfg.tail_ema != "0"


class Averages:
    """
    EMA, plain average (SWA) and tail EMA of the weights, each rank keeping its own shards. They are
    evaluated beside the live weights, so that what averaging gains is in the log and not taken on
    trust.
    """

    def __init__(self, cfg: Config, opt: MuonAdamW):
        self.cfg, self.buckets, self.swa_count = cfg, opt.buckets, 0
        self.tail, self.tail_count = Schedule("tail_ema", cfg.tail_ema), 0
        kinds = ("ema", cfg.ema > 0), ("swa", cfg.swa_every > 0), ("tail", cfg.tail_ema != "0")
        names = [name for name, on in kinds if on]
        self.shards = {name: [b.shard.float().clone() for b in self.buckets] for name in names}

    @torch.no_grad()
    def update(self, step: int, fraction: float) -> None:
        """
        After step `step` (counted from 1). The EMA's decay is at most step/(step+9), so that at
        first it reaches back over a ninth of the steps.
        """
        if self.cfg.ema > 0:
            keep = min(self.cfg.ema, step / (step + 9))
            for avg, b in zip(self.shards["ema"], self.buckets):
                avg.lerp_(b.shard.float(), 1 - keep)
        is_due = self.cfg.swa_every > 0 and step % self.cfg.swa_every == 0
        if is_due and fraction >= self.cfg.swa_start:
            self.swa_count += 1
            for avg, b in zip(self.shards["swa"], self.buckets):
                avg.lerp_(b.shard.float(), 1 / self.swa_count)
        if self.cfg.tail_ema != "0" and (reach := self.tail.at(step, fraction)):
            # modded-nanogpt track 3, #45: the first time, the weights themselves
            share = 1 / max(1.0, reach) if self.tail_count else 1.0
            self.tail_count += 1
            for avg, b in zip(self.shards["tail"], self.buckets):
                avg.lerp_(b.shard.float(), share)

    def close(self) -> None:
        """Where a capped clock left no time for a snapshot, the last weights are the only one."""
        for name in [name for name in self.shards if name not in self.ready()]:
            self.swa_count, self.tail_count = max(1, self.swa_count), max(1, self.tail_count)
            for avg, b in zip(self.shards[name], self.buckets):
                avg.copy_(b.shard)

    def ready(self) -> list[str]:
        ready = ["ema"] if self.cfg.ema > 0 else []
        if self.cfg.swa_every > 0 and self.swa_count:
            ready.append("swa")
        if self.cfg.tail_ema != "0" and self.tail_count:
            ready.append("tail")
        return ready

    @contextlib.contextmanager
    def swapped_in(self, name: str):
        """Inside, the model has averaged weights. Collective."""
        with weights_kept(self.buckets):
            with torch.no_grad():
                for b, avg in zip(self.buckets, self.shards[name]):
                    if self.cfg.tail_ema != "0" and name == "tail":
                        self.blend(b, b.gather(avg))
                    else:
                        b.weights.copy_(b.gather(avg))
            yield

    def blend(self, b: Bucket, average: Tensor) -> None:
        """Into the weights of a bucket, their own share of the average."""
        for name, (low, high) in b.spans.items():
            live = b.weights[low:high]
            live.copy_(live.float().lerp(average[low:high], tail_share(self.cfg, name)))

    def state_dict(self) -> dict[str, Tensor]:
        named = {"swa_count": torch.tensor(self.swa_count)}
        if self.cfg.tail_ema != "0":
            named["tail_count"] = torch.tensor(self.tail_count)
        for kind, shards in self.shards.items():
            for b, shard in zip(self.buckets, shards):
                named |= {f"{name}:{kind}": t for name, t in b.by_name(shard).items()}
        return named

    def load_state_dict(self, named: dict[str, Tensor], rank: int) -> None:
        self.swa_count = int(named["swa_count"])
        if "tail" in self.shards:
            self.tail_count = int(named["tail_count"])
        for kind, shards in self.shards.items():
            for b, shard in zip(self.buckets, shards):
                b.from_names(shard, {name: named[f"{name}:{kind}"] for name in b.params}, rank)


def weights_of(trainer: Trainer, name: str):
    """Inside, the model has the weights that are meant: live, ema, swa or tail. Collective."""
    return contextlib.nullcontext() if name == "live" else trainer.avg.swapped_in(name)


def write_weights(
    trainer: Trainer, step: int, named: dict[str, Tensor], part: Path, **more
) -> None:
    """Weights, and how those who read them apply them: as the last step was trained."""
    now = trainer.plan.at(step - 1, (step - 1) / trainer.cfg.steps)
    write_tensors(named, part / "model.safetensors")
    (part / "config.toml").write_text(config_toml(trainer.cfg), encoding="utf-8")
    applied = {"repeats": now.repeats, "passes": now.passes}
    applied |= {"window": now.window, "window_long": now.window_long}
    state = {"step": step} | applied | more
    (part / "state.json").write_text(json.dumps(state), encoding="utf-8")


def keep_epoch(trainer: Trainer, step: int) -> None:
    """Write the weights of the end of an epoch, for logs/score.py to average. Collective."""

    def write(part: Path) -> None:
        write_weights(trainer, step, weights_on_cpu(trainer.model), part)

    trainer.run.on_main(lambda: write_folder(trainer.run.folder / "epochs" / f"{step:06d}", write))


########################################
#                Cycles                #
########################################


@dataclass
class CycleConfig(Section):
    """Training in cycles, each of which leaves a snapshot for an ensemble; and teachers."""

    cycles: int = 0  # equal parts of training that each leave their weights as a snapshot; 0: none
    cycle_lr: str = "1"  # [sched] over each cycle: multiplies lr, such as "1 1>0.08"
    cycle_decay: str = "1"  # [sched] over each cycle: multiplies weight_decay
    # [sched] over the cycles: noise behind each snapshot, as a share of a tensor's deviation
    perturb: str = "0"
    distill: float = 0.0  # share of the divergence from a teacher in the loss; 0: no teacher
    distill_from: int = 2  # the first cycle whose teacher is the snapshot of the cycle before
    distill_temperature: float = 1.0  # divides the logits of teacher and model
    # run folder, checkpoint or artifact that is the teacher all along; empty: the last snapshot
    teacher: str = ""
    # so many first tokens, in whole documents, that are not trained on: snapshots are weighed there
    fitness_tokens: int = 0

    LIMITS = limits(
        (0, 1, "distill"),
        (0, 1000, "cycle_lr cycle_decay perturb"),
        (0, 10**6, "cycles"),
        (0, 10**9, "fitness_tokens"),
        (1, 10**6, "distill_from"),
        (1e-3, 1000, "distill_temperature"),
    )

    def check(self) -> None:
        for key in BY_CYCLE:
            schedule = Schedule(key, getattr(self, key))
            if any(p.in_steps for p in schedule.points):
                raise schedule.error("takes fractions of a cycle, or of the cycles, and no steps")
        row = self.eval_seq_len or largest(self.seq_len)
        require(
            not 0 < self.fitness_tokens <= row,
            f"fitness_tokens = {self.fitness_tokens}: no row of {row} tokens and its last target: "
            f"at least {row + 1}, or 0",
        )

    def needs(self) -> list[Need]:
        cycles = [(key, "cycles > 0", self.cycles > 0) for key in ("cycle_lr", "cycle_decay")]
        return [
            *cycles,
            ("perturb", "cycles > 1, as noise is added between two", self.cycles > 1),
            ("distill", "cycles > 1, or a teacher", self.cycles > 1 or bool(self.teacher)),
            ("teacher", "distill > 0, such as --distill 0.45", self.distill > 0),
            ("fitness_tokens", "cycles > 0, whose snapshots it weighs", self.cycles > 0),
        ]


def check_cycles(cfg: Config) -> None:
    """Refuse cycles without steps, and teachers that would be applied in another way."""
    require(
        not cfg.distill or not (cfg.biases or later_targets(cfg)),
        f"distill = {cfg.distill:g} knows neither a head's bias nor losses of other tokens: set "
        "--biases 0 --mtp_next 0 --mtp_third 0 --prefix_loss 0, or --distill 0",
    )
    if not cfg.cycles:
        return
    if not cfg.distill or cfg.teacher or cfg.cycles == 1:
        return
    require(
        2 <= cfg.distill_from <= cfg.cycles,
        f"distill_from = {cfg.distill_from}: from 2, as the first cycle has no snapshot before it, "
        f"to cycles = {cfg.cycles}",
    )
    for key in APPLIED:
        require(
            is_constant(getattr(cfg, key)),
            f"distill = {cfg.distill:g} applies a snapshot as the model is applied, but {key} = "
            f"{getattr(cfg, key)!r} changes: one value, or --distill 0",
        )


def snapshot_path(folder: Path, cycle: int) -> Path:
    """Where the weights of the end of a cycle, from 1, are kept."""
    return folder / "snapshots" / f"{cycle:04d}"


def keep_snapshot(trainer: Trainer, step: int) -> None:
    """
    Write the weights of the end of a cycle in bfloat16 and, with fitness_tokens, the probability
    that they give to each target of that text. Collective.
    """
    cfg, run, plan = trainer.cfg, trainer.run, trainer.plan
    cycle, more, found = plan.cycle_at(step - 1)[0] + 1, {}, None
    if cfg.fitness_tokens:
        text = run.together(lambda: Fitness(cfg, plan))  # reads, which may fail on one rank alone
        shape = plan.eval_shape(plan.at(step - 1, (step - 1) / cfg.steps))
        with weights_kept(trainer.opt.buckets):
            with torch.no_grad():
                for b in trainer.opt.buckets:
                    b.weights.copy_(b.weights.bfloat16())
            losses = token_losses(run, trainer.graph, text, shape)
        found = {"p": losses.neg().exp()}
        more = {"fitness_loss": float(losses.double().mean())}
        more["fitness_sha256"] = hashlib.sha256(text.tokens.tobytes()).hexdigest()

    def write(part: Path) -> None:
        named = {name: w.bfloat16() for name, w in weights_on_cpu(trainer.model).items()}
        write_weights(trainer, step, named, part, cycle=cycle, **more)
        if found:
            write_tensors(found, part / "fitness.safetensors")

    run.on_main(lambda: write_folder(snapshot_path(run.folder, cycle), write))
    said = f" fitness_loss:{more['fitness_loss']:.5f}" if more else ""
    run.log(f"snapshot:{cycle} at:{step}{said}")


@torch.no_grad()
def perturb(named: dict[str, Tensor], seed: int, cycle: int, scale: float) -> None:
    """
    Add noise to each tensor, each matrix of a stack by itself: normal, of `scale` times its own
    standard deviation, as slowrun does between the cycles of a chain. It depends on the seed, the
    cycle and the name, so ranks and resumed runs draw the same. What is one number has none.
    """
    for name, p in named.items():
        dims = tuple(range(-min(2, p.ndim), 0))
        if math.prod(p.shape[-2:]) > 1:
            noise = torch.randn(p.shape, generator=generator_of(f"{seed} perturb {cycle} {name}"))
            p.add_((scale * p.float().std(dims, keepdim=True) * noise.to(p.device)).to(p.dtype))


@dataclass
class Teacher:
    """A model that the trained one learns from, in bfloat16 weights and without dropout."""

    model: GPT
    hidden: Callable  # its activations, compiled or not
    applied: tuple[int, ...]  # how: repeats, window, passes, window_long
    cycle: int = 0  # whose snapshot its weights are

    @torch.no_grad()
    def activations(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What GPT.forward() is given of a teacher."""
        return self.hidden(tokens_BT, *self.applied), self.model.head


def build_teacher(cfg: Config, run: Run, plan: Plan) -> Teacher | None:
    """A model for the snapshots of this run, or that of `teacher` with its weights."""
    if plan.taught_from() == math.inf:
        return None
    theirs, named = cfg, {}
    if cfg.teacher:

        def read() -> tuple[dict[str, Tensor], Config]:
            found = open_source(cfg.teacher, say=lambda line: run.log(f"notice: {line}"))
            return found[1], found[0]

        named, theirs = run.read_on_main(read)
        compare_logits(cfg, theirs)
        theirs.compile = cfg.compile
    end = Plan(theirs).at(theirs.steps, 1.0)
    model = build_model(theirs, run.device, run.dtype, max(plan.max_seq_len, plan.eval_seq_len))
    if named:
        load_weights(model, named, cfg.teacher)
    for p in model.requires_grad_(False).parameters():
        p.data = p.data.bfloat16()
    if cfg.compile == 2:
        hidden = torch.compile(model.hidden, dynamic=False)
    else:
        compile_model(model, theirs)
        hidden = model.hidden
    return Teacher(model, hidden, (end.repeats, end.window, end.passes, end.window_long))


def compare_logits(cfg: Config, theirs: Config) -> None:
    """Refuse a teacher whose activations and head would not give its logits here."""
    keys = [
        "vocab",
        "softcap",
        "softcap_shape",
        "softcap_in",
        "softcap_shift",
        "biases",
        "logit_dim_power",
        *(["dim"] if cfg.logit_dim_power else []),
    ]
    other = [
        f"{key} = {getattr(theirs, key)} there and {getattr(cfg, key)} here"
        for key in keys
        if getattr(theirs, key) != getattr(cfg, key)
    ]
    require(
        not other,
        f"teacher = {cfg.teacher!r}: {', '.join(other)}: a teacher's logits are made of its "
        "activations and its head as the model's own are: train both alike in these",
    )


def ready_teacher(trainer: Trainer, step: int) -> None:
    """Give the teacher the snapshot of the cycle before, unless it has it. Collective."""
    run, teacher, cycle = trainer.run, trainer.teacher, 0
    if not trainer.cfg.teacher:
        cycle = trainer.plan.cycle_at(step)[0]
    if teacher.cycle == cycle:
        return
    path = snapshot_path(run.folder, cycle) / "model.safetensors"
    named, _ = run.together(lambda: run.read_on_main(lambda: (read_tensors(path), None)))
    load_weights(teacher.model, named, str(path))
    teacher.cycle = cycle


########################################
#              Evaluation              #
########################################


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float | None:
    """Nats per token -> bits per byte of text; None where the bytes are unknown."""
    return loss / math.log(2) * tokens / n_bytes if n_bytes else None


@torch.no_grad()
def evaluate(
    run: Run, model, val: Validation, shape: Shape, impossible: Tensor | None = None
) -> float:
    """
    Mean loss in nats per token over the validation prefix. Rows do not overlap; ranks take turns
    with batches of one shape (the last is filled up with ignored rows); sums are in float64. Polls
    for signals. impossible: canonical_mask(), of what has no probability.
    """
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    stride = shape.rows * run.world
    bar = tqdm(
        range(0, val.rows, stride),
        desc="evaluate",
        leave=False,
        disable=not (run.is_main and sys.stderr.isatty()),
    )
    for low in bar:
        run.poll()
        first = low + run.rank * shape.rows
        x, y = val.batch(range(first, first + shape.rows), run.device, shape.rows)
        applied = shape.repeats, shape.window, shape.passes, shape.window_long
        with torch.enable_grad() if shape.as_trained else contextlib.nullcontext():
            losses = model(x, y, *applied, impossible=impossible).detach()
        total += losses.double().sum()
    return float(run.sum_of(total)) / val.scored


@torch.no_grad()
def token_losses(run: Run, model, val: Validation, shape: Shape) -> Tensor:
    """The loss of every target in nats, in order, in fp32 on every rank's CPU. Collective."""
    tokens, stride = shape.rows * val.seq_len, shape.rows * run.world
    batches = -(-val.rows // stride) * run.world
    losses = torch.zeros(batches, tokens, device=run.device)
    for low in range(0, val.rows, stride):
        run.poll()
        first = low + run.rank * shape.rows
        x, y = val.batch(range(first, first + shape.rows), run.device, shape.rows)
        applied = shape.repeats, shape.window, shape.passes, shape.window_long
        with torch.enable_grad() if shape.as_trained else contextlib.nullcontext():
            found = model(x, y, *applied).detach()
        losses[first // shape.rows] = found.float()
    return run.sum_of(losses).flatten()[: val.scored].cpu()


########################################
#                Export                #
########################################


@dataclass
class ExportConfig(Section):
    """The artifact: weights in a few bits, in one file."""

    export: str = "int8"  # bits, e.g. "int6 mlp:5 head:8"; fit: by artifact_limit; empty: no file
    export_codec: str = "zstd"  # zstd, brotli, xz, entropy, or best: the smallest of these
    artifact_limit: int = 0  # bytes that source and artifact may have together; 0: no limit
    gptq: int = 0  # rows of training tokens that GPTQ looks at, inside the clock; 0: rounding
    qat: str = "0"  # [sched] 1: the loss sees the weights as export would round them
    # 1: qat adds noise of a rounding step instead of rounding, to looped blocks alone if there are
    # any
    qat_noise: int = 0

    LIMITS = limits((0, 1, "qat qat_noise"), (0, 10**6, "gptq"), (0, 10**12, "artifact_limit"))
    CHOICES = {"export_codec": ("zstd", "brotli", "xz", "entropy", "best")}

    def needs(self) -> list[Need]:
        rounds = 1 in Schedule("qat", self.qat).values()
        return [("qat_noise", "qat, such as '0 0.8:1'", rounds)]


# fractions of a row's largest entry at which it may be clipped
CLIPS = tuple(1 - i / 20 for i in range(13))
# finest first
LADDER = ("int8", "int7", "int7 mlp:6", "int6", "int6 mlp:5", "int5", "int5 mlp:4", "int4")


def levels_of(bits: int) -> int:
    """The largest integer of symmetric `bits`-bit codes: 127 for 8, 31 for 6, 7 for 4."""
    return 2 ** (bits - 1) - 1


def quantised_names(model: nn.Module) -> list[str]:
    """What an artifact stores as integers: matrices and tables with 64 rows and columns or more."""
    declared = declarations(model)
    large = {name for name, p in model.named_parameters() if min(p.shape[-2:]) >= 64}
    return [name for name in declared if name in large and declared[name].group != "scalar"]


class Bits(NamedTuple):
    """Bits by name: "int6 mlp:5 head:8" is 5 where it matches mlp, 8 for head, else 6."""

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
            f"export = {text!r}: write int8, int7, int6, int5 or int4, then regular expressions "
            "over names with other bits, for example 'int6 mlp:5 head:8'; or 'fit' to choose by "
            "artifact_limit"
        )
    for rule in rules:
        try:
            compiled_pattern(rule[1])
        except re.error as e:
            raise UserError(f"export = {text!r}: {rule[1]!r} is no regular expression: {e}") from e
    return Bits(int(words[0][3:]), tuple((rule[1], int(rule[2])) for rule in rules))


def check_bits(text: str, matrices: list[str]) -> Bits:
    """parse_bits, and UserError where a rule is about none of these names."""
    bits = parse_bits(text)
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


class OutOfTime(Exception):
    """The training clock has come to the end of what calibration may take, within a row."""


@torch.no_grad()
def record_hessians(
    model: GPT, rows: np.ndarray, shape: Shape, run: Ranks, until: float = math.inf
) -> tuple[dict[str, Tensor], int]:
    """
    Mean of x x^T [cols, cols] over the inputs of every matrix to be quantised, by name, from rows
    [n, T+1] of TRAINING tokens (collecting them counts as training time under the rules). All uses
    of a shared matrix add up; a tied table gets the final norm's output. Ranks take turns with
    rows and share the sums. When the training clock says `until`, it ends for all of them, also
    within a row. Gives the number of rows that were seen whole as well.
    """
    timed = until < math.inf

    def time_is_up() -> bool:
        run.clock.sync()  # the host runs ahead of a GPU
        return run.clock.seconds() >= until

    parameters = dict(model.named_parameters())
    sums = {}
    for name in quantised_names(model):
        columns = parameters[name].size(-1)
        sums[name] = parameters[name].new_zeros(columns, columns, dtype=torch.float32)

    def record(name: str, x: Tensor, y: Tensor) -> Tensor:
        if timed and time_is_up():
            raise OutOfTime
        if name in sums:
            flat = x.detach().reshape(-1, x.size(-1)).float()
            sums[name] += flat.mT @ flat
        return y

    whole = 0
    # compiled graphs have no place to watch
    with torch.compiler.set_stance("force_eager"), watching(model, record):
        for turn in range(0, len(rows), run.world):  # as many on every rank: each asks the others
            if run.poll(float(timed and time_is_up())):
                break
            for row in rows[turn + run.rank :][:1]:
                with contextlib.suppress(OutOfTime):  # the others end at their next turn
                    x, y = tensors(row[None], run.device)
                    model(x, y, shape.repeats, shape.window, shape.passes, shape.window_long)
                    whole += 1
    # A rank without a row has seen no name: all sums are exchanged, and those without an input are
    # zero on every rank.
    seen = int(run.sum_of(torch.tensor(whole, device=run.device)))
    found = {name: run.sum_of(h) / (seen * (rows.shape[1] - 1)) for name, h in sums.items() if seen}
    return {name: h for name, h in found.items() if bool(h.any())}, seen


def row_scales(w: Tensor, levels: int) -> Tensor:
    """fp16 scales [..., rows, 1]: 8 bits keep the whole range of a row, fewer search a clip."""
    return quantize_rows(w)[1] if levels == 127 else clip_search(w, levels)


def quantise(
    matrices: dict[str, Tensor], bits: Bits, hessians: dict[str, Tensor] | None = None
) -> dict[str, tuple]:
    """Codes, fp16 scales and levels of each; GPTQ rounds where there is a Hessian."""
    found = {}
    for name, w in matrices.items():
        levels, w = levels_of(bits.of(name)), w.detach().float()
        scale = row_scales(w, levels)
        q = codes(w, scale, levels)
        if hessians and name in hessians:
            flat = w.flatten(0, -2), hessians[name].to(w.device), scale.flatten(0, -2)
            q = gptq(*flat, levels).view_as(w)
        found[name] = q.cpu().contiguous(), scale.cpu().contiguous(), levels
    return found


@contextlib.contextmanager
def rounded(model: GPT, cfg: Config, step: int):
    """
    Inside, matrices have the values that cfg.export would store. With qat_noise, they are off by up
    to half a rounding step at random (Noisy Quantisation, Fan et al. 2020) instead, and only those
    of looped blocks where there is a loop: their error adds up over repeats (parameter-golf #363).
    Gradients taken inside are applied to the exact weights, which is the straight-through
    estimator. Every rank rounds alike.
    """
    looped = "|".join(map(str, range(*loop_span(cfg))))
    chosen = rf"blocks\.({looped})\." if cfg.qat_noise and looped else ""
    parameters = dict(model.named_parameters())
    exact = {
        name: parameters[name].detach().clone()
        for name in quantised_names(model)
        if re.match(chosen, name)
    }
    rng, bits = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step), parse_bits(cfg.export)
    try:
        with torch.no_grad():
            for name in exact:
                p, levels = parameters[name], levels_of(bits.of(name))
                scale = row_scales(p, levels)
                if cfg.qat_noise:  # from the CPU, as every rank rounds alike; no wait for a GPU
                    noise = torch.rand(p.shape, generator=rng, pin_memory=p.is_cuda)
                    noise = noise.to(p.device, non_blocking=True).to(p.dtype) - 0.5
                    p.add_(noise * scale.to(p))
                else:
                    p.copy_(dequantize_rows(codes(p, scale, levels), scale))
        yield
    finally:
        with torch.no_grad():
            for name, own in exact.items():
                parameters[name].copy_(own)


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


class Codec(NamedTuple):
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes, int], bytes]  # gives so many bytes at most
    error: type[Exception]


CODECS = {
    "zstd": Codec(
        lambda data: zstandard.ZstdCompressor(level=22).compress(data), unzstd, zstandard.ZstdError
    ),
    "brotli": Codec(
        lambda data: brotli.compress(data, quality=11, lgwin=24), unbrotli, brotli.error
    ),
    "xz": Codec(
        lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), unxz, lzma.LZMAError
    ),
}
ENTROPY = "entropy"  # the range coder below for the codes, the smallest of the above for the rest
# widths of a class of spreads, in eighths of an octave; the last: all in one class
STEPS = (2, 4, 16, 1 << 20)


def spread_classes(rows: np.ndarray, cols: np.ndarray, step: int) -> np.ndarray:
    """Class of every entry [R, C] from its row's and column's spread (see log_spread)."""
    both = (rows.astype(np.int64)[:, None] + cols.astype(np.int64)) // step
    return both - both.min()


def log_spread(x: np.ndarray) -> np.ndarray:
    return np.round(8 * np.log2(np.maximum(x, 2.0**-12))).clip(-127, 127).astype(np.int8)


def histogram(counts: np.ndarray):
    """The coder's model of counts, alike on every machine; what has none keeps 2^-24."""
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


MAGIC = b"NANORMX2"
MOST = 1 << 33  # bytes that an artifact may unpack to, whatever its header says ...
MOST_RATIO = 1024  # ... nor may it unpack to more than so many times its own size and 64 MiB


def pack_artifact(
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
    payload = tensors_as_bytes(out)
    if codec == ENTROPY:
        every = ((CODECS[name].pack(payload), name) for name in CODECS)
        packed, inner = min(every, key=lambda pair: len(pair[0]))
    else:
        packed, inner = CODECS[codec].pack(payload), codec
    header = json.dumps(
        {
            "codec": codec,
            "rest": inner,
            "payload_bytes": len(payload),
            "packed_bytes": len(packed),
            "bits": note,
            "tensors": kinds,
            "config": config_toml(cfg),
        }
    ).encode()
    body = b"".join([MAGIC, struct.pack("<I", len(header)), header, packed, *words])
    return body + hashlib.sha256(body).digest()


def smallest_artifact(
    model: GPT,
    bits: str,
    codec: str,
    hessians: dict[str, Tensor] | None = None,
    most: int = 0,
    log: Callable = lambda line: None,
) -> tuple[bytes, str]:
    """
    The artifact of the model's weights, and what was chosen for it ("int6_entropy"). Codec "best"
    keeps the smallest of all codecs' results. Bits "fit" go down LADDER until the file has at most
    `most` bytes; where even the last has more, that one is given.
    """
    if bits != "fit":
        rule = check_bits(bits, quantised_names(model))
        return artifact_of(model, rule, bits, codec, hessians, most, log)
    for choice in LADDER:
        far = 1.1 * most if choice != LADDER[-1] else math.inf
        found = artifact_of(model, parse_bits(choice), choice, codec, hessians, most, log, far)
        if len(found[0]) <= most:
            break
    return found


def artifact_of(
    model: GPT,
    bits: Bits,
    said: str,
    codec: str,
    hessians: dict[str, Tensor] | None,
    most: int,
    log: Callable,
    far: float = math.inf,
) -> tuple[bytes, str]:
    """
    The artifact in these bits, and their name and that of the codec; log() is told its size. far:
    a size from which no other codec leads back to `most`, so that none is tried.
    """
    named, cfg = dict(model.named_parameters()), model.cfg
    found = quantise({name: named[name] for name in quantised_names(model)}, bits, hessians)
    packed: dict[str, bytes] = {}
    for name in (ENTROPY, *CODECS) if codec == "best" else (codec,):  # the fastest one first
        packed[name] = pack_artifact(named, found, cfg, name, said)
        if len(packed[name]) > far:
            break
    smallest = min(packed, key=lambda name: len(packed[name]))
    sizes = " ".join(f"{name}:{len(data)}" for name, data in packed.items())
    how, limit = " gptq" if hessians else "", f", limit {most}" if most else ""
    log(f"artifact: {said}{how} {sizes} -> {smallest}{limit}")
    return packed[smallest], re.sub(r"\W+", "_", f"{said}_{smallest}")


# what reading a damaged or forged file may end in
DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    SafetensorError,
    *(codec.error for codec in CODECS.values()),
)


def unpack_artifact(data: bytes, where: str) -> tuple[Config, dict[str, Tensor], dict]:
    """Configuration, fp32 weights and header of an artifact; any damage is a UserError."""

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
        payload = CODECS[header["rest"]].unpack(packed, size + 1)
        if len(payload) != size:
            raise bad("its payload has another size than its header says")
        named = stored_tensors(header, tensors_of_bytes(payload), np.frombuffer(stream, "<u4"))
        cfg = stored_config(header["config"], where)
        fits(cfg, named)
    except UserError as e:
        raise (e if where in str(e) else bad(str(e))) from None
    except DAMAGE as e:
        raise bad(f"{type(e).__name__}: {e}") from e
    return cfg, named, header


LONGEST = 1 << 20  # tokens of a row that an artifact may ask for ...
ANGLES = 1 << 29  # ... and numbers in its rotary tables: 2 GiB


def check_rows(cfg: Config) -> None:
    """Refuse rows that no reader of an artifact makes tables for."""
    plan = Plan(cfg)
    longest, width = max(plan.max_seq_len, plan.eval_seq_len), head_width(cfg)
    tables = len(yarn_stages(cfg)) if cfg.yarn else 1
    if cfg.paired_layers:  # twice as long
        tables *= 2
    require(
        longest <= LONGEST and longest * width * tables <= ANGLES,
        f"rows of {longest} tokens, heads of {width} and {tables} rotary tables of such rows are "
        "more than an artifact may have: lower seq_len or eval_seq_len",
    )


def fits(cfg: Config, named: dict[str, Tensor]) -> None:
    """ValueError unless the model of cfg has these tensors: a header may be forged."""
    if cfg.depth > len(named):
        raise ValueError(f"its configuration has {cfg.depth} blocks")
    check_rows(cfg)
    model = build_model(cfg, torch.device("meta"), torch.float32, 8)
    if {k: list(w.shape) for k, w in model.named_parameters()} != {
        k: list(w.shape) for k, w in named.items()
    }:
        raise ValueError("its tensors are not those of its configuration's model")


def stored_tensors(header: dict, stored: dict[str, Tensor], words: np.ndarray) -> dict[str, Tensor]:
    """The tensors that a header lists, from payload and coded words; else ValueError."""
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


def load_artifact(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and fp32 weights of an artifact file."""
    return unpack_artifact(Path(path).read_bytes(), str(path))[:2]


def check_export(cfg: Config) -> None:
    """Refuse what the end of a run could not do, before it begins."""
    if cfg.export == "fit":
        if not cfg.artifact_limit:
            raise UserError(
                "export = 'fit' chooses bits by artifact_limit, which is not set: "
                "--artifact_limit 16000000"
            )
    else:
        parse_bits(cfg.export)
    qat = Schedule("qat", cfg.qat).values()
    if set(qat) - {0, 1}:
        raise UserError(f"qat = {cfg.qat!r}: 0 is off and 1 is on, there is nothing between")
    if cfg.qat_noise and 1 not in qat:
        raise UserError(
            f"qat_noise = {cfg.qat_noise} is the noise of quantisation-aware training, but qat = "
            f"{cfg.qat!r} never begins it: for example --qat '0 0.8:1'"
        )


def check_artifact(cfg: Config, model: GPT) -> None:
    """Refuse, before training, an artifact that this model could not have behind it."""
    check_rows(cfg)
    matrices = quantised_names(model)
    if cfg.export != "fit":
        check_bits(cfg.export, matrices)
    rounds = [key for key, on in (("qat", cfg.qat != "0"), ("gptq", cfg.gptq)) if on]
    if rounds and not matrices:
        raise UserError(
            f"{' and '.join(rounds)} round matrices of 64 rows and columns or more, and this model "
            "has none"
        )
    if cfg.artifact_limit and (code := source_bytes(cfg)) >= cfg.artifact_limit:
        raise UserError(
            f"artifact_limit = {cfg.artifact_limit}: the source alone has {code} bytes; python "
            "logs/pack.py makes one small file of it"
        )


def calibration_rows(cfg: Config, count: int) -> int:
    """How many of `count` rows the first train shard holds; UserError where it is none."""
    shard, length = find_shards(cfg, "train")[0], Plan(cfg).eval_seq_len
    # others it was not trained on
    tokens = min(shard_tokens(shard), cfg.train_tokens or math.inf)
    if cfg.fitness_tokens:
        tokens -= len(held_out(cfg))
    if tokens <= length:
        raise UserError(
            f"GPTQ looks at rows of {length} training tokens, but {shard} has only {tokens}: lower "
            "--eval_seq_len, or --gptq 0"
        )
    return min(count, (tokens - 1) // length)


def calibration(cfg: Config, count: int) -> np.ndarray:
    """The first rows [count, T+1] of the training shards."""
    length, count = Plan(cfg).eval_seq_len, calibration_rows(cfg, count)
    tokens = read_shard(find_shards(cfg, "train")[0], cfg.vocab)
    if cfg.fitness_tokens:
        tokens = tokens[len(held_out(cfg)) :]
    return np.stack([tokens[i * length :][: length + 1] for i in range(count)])


def calibrate(trainer: Trainer, rows: np.ndarray, until: float) -> tuple[dict[str, Tensor], int]:
    """record_hessians with the model applied as the artifact's readers apply it."""
    shape = trainer.plan.eval_shape(trainer.plan.at(trainer.cfg.steps, 1.0))
    return record_hessians(trainer.model, rows, shape, trainer.run, until)


def gptq_seconds(trainer: Trainer) -> float:
    """Seconds of calibration, from two rows, and a third more: a clock cap is a cap."""
    rows = calibration(trainer.cfg, 2 * trainer.run.world)
    for _ in range(2):  # the first is slower
        trainer.run.clock.sync()
        began = time.perf_counter()
        calibrate(trainer, rows, until=sys.float_info.max)  # it looks at the clock as it will then
        trainer.run.clock.sync()
        seconds = time.perf_counter() - began
    return 1.33 * seconds * calibration_rows(trainer.cfg, trainer.cfg.gptq) / len(rows)


def calibrated(trainer: Trainer) -> dict[str, Tensor] | None:
    """
    Hessians for GPTQ, on the training clock. A clock cap is a cap: on a machine that has become
    slower than the warm-up foresaw, they are of fewer rows, or there are none. What summing them up
    takes is kept back from the time foreseen.
    """
    cfg, run = trainer.cfg, trainer.run
    rows = run.together(lambda: calibration(cfg, cfg.gptq))  # reads: may fail on one rank alone
    kept_back = (cfg.max_seconds - trainer.plan.seconds) * min(0.1, run.world / len(rows))
    until = cfg.max_seconds - kept_back if cfg.max_seconds else math.inf
    before = run.clock.seconds()
    run.clock.start()
    hessians, seen = calibrate(trainer, rows, until)
    run.clock.stop()
    fewer = "" if seen == len(rows) else f" of {len(rows)} (max_seconds allowed no more)"
    after = run.clock.seconds()
    run.calibration = after - before
    run.log(
        f"gptq: {seen} rows{fewer} of training tokens, train_time:{after - before:.1f}s of "
        f"{after:.1f}s" + ("" if seen else "; weights are rounded to the nearest instead")
    )
    return hessians or None


def export_artifact(trainer: Trainer) -> dict:
    """
    Behind the last step, with the weights to be exported in the model: calibrate (on the training
    clock), write the artifact, read it back strictly into the model, evaluate it. Entries of
    result.json.
    """
    cfg, run, path = trainer.cfg, trainer.run, trainer.run.folder / "model.nrx"
    hessians = calibrated(trainer) if cfg.gptq else None
    code = source_bytes(cfg)
    most = max(0, cfg.artifact_limit - code)

    def write() -> tuple[str, int]:
        data, chosen = smallest_artifact(
            trainer.model, cfg.export, cfg.export_codec, hessians, most, run.log
        )
        write_whole(path, data)
        return chosen, len(data)

    chosen, size = run.on_main(write)
    named, _ = run.together(lambda: run.read_on_main(lambda: (load_artifact(path)[1], None)))
    load_weights(trainer.model, named, str(path))
    began = time.perf_counter()
    shape = trainer.plan.eval_shape(trainer.plan.at(cfg.steps, 1.0))
    loss = evaluate(run, trainer.graph, trainer.val, shape, trainer.impossible)
    bpb = bits_per_byte(loss, trainer.val.scored, trainer.val.bytes)
    seconds = time.perf_counter() - began
    bits = f" val_bpb:{bpb:.8f}" if bpb else ""
    run.log(f"final_{chosen}_roundtrip val_loss:{loss:.8f}{bits} eval_time:{seconds * 1000:.0f}ms")
    over = "OVER the limit of" if size + code > cfg.artifact_limit else "within the limit of"
    limit = f", {over} {cfg.artifact_limit}" if cfg.artifact_limit else ""
    run.log(f"artifact: {path} {size} bytes + code {code} bytes = {size + code} bytes{limit}")
    return {
        "roundtrip_val_loss": loss,
        "roundtrip_val_bpb": bpb,
        "artifact_bytes": size,
        "code_bytes": code,
        "total_bytes": size + code,
        "artifact_bits": chosen,
        "eval_time_s": seconds,
    }


def load_weights(model: nn.Module, named: dict[str, Tensor], where: str) -> None:
    """Strictly: the same names, the same shapes."""
    own = dict(model.named_parameters())
    missing, extra = sorted(own.keys() - named.keys()), sorted(named.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"{where} does not fit this model: missing {missing[:5]}, unknown {extra[:5]}"
        )
    with torch.no_grad():
        for name, p in own.items():
            if p.shape != named[name].shape:
                raise UserError(
                    f"{where}: {name} is {list(named[name].shape)} there and {list(p.shape)} here"
                )
            p.copy_(named[name])


def source_files(cfg: Config) -> list[Path]:
    """
    The project's sources that a run needs, the started script first: they go into the log and are
    counted. Scores beyond the evaluation of whole rows need their scorer.
    """
    here, started = Path(__file__).resolve(), Path(sys.argv[0]).resolve()
    found = [here]
    if started.suffix == ".py" and started.parent == here.parent:
        found.insert(0, started)
    if cfg.score.get("modes") or cfg.score.get("ensemble") or cfg.average_epochs:
        found.append(here.parent / "logs" / "score.py")
    return list(dict.fromkeys(path for path in found if path.is_file()))


def source_bytes(cfg: Config) -> int:
    return sum(path.stat().st_size for path in source_files(cfg))


########################################
#              Checkpoint              #
########################################


@dataclass
class TransferConfig(Section):
    """Weights of another run to start from."""

    init_from: str = ""  # run folder, checkpoint folder or artifact whose weights start this run
    transfer: str = "all"  # what it gives: all, attn, qk, vo, mlp, scalars joined by +, or a regex
    transfer_skip: str = ""  # regex: tensors that are left out of it
    transfer_control: str = ""  # wrong on purpose: shuffled (in each matrix) or random (same norm)

    CHOICES = {"transfer_control": ("", "shuffled", "random")}

    def check(self) -> None:
        require_regex("transfer_skip", self.transfer_skip)
        if self.init_from:
            require_regex("transfer", self.transfer)

    def needs(self) -> list[Need]:
        keys = ("transfer", "transfer_skip", "transfer_control")
        return [(key, "init_from", bool(self.init_from)) for key in keys]


def checkpoints(folder: Path) -> list[Path]:
    """
    Complete checkpoints of a run, oldest first: those with their final name and a DONE marker.
    """
    done = (p.parent for p in folder.glob("ckpt/*/DONE"))
    return sorted((p for p in done if re.fullmatch("[0-9]+", p.name)), key=lambda p: int(p.name))


def newest_checkpoint(folder: Path) -> Path | None:
    return (checkpoints(folder) or [None])[-1]


def sync_folder(path: Path) -> None:
    for p in [*path.iterdir(), path]:
        fd = os.open(p, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def save_checkpoint(trainer: Trainer, step: int) -> Path:
    """
    Weights, optimizer, averages, loader position, RNG of every rank, clocks and config in
    log_dir/run/ckpt/<step>. Written beside, synced, marked DONE, then renamed: a crash at any
    instant leaves the older one whole. Collective.
    """
    run, loader = trainer.run, trainer.loader
    if run.cfg.gptq:  # who goes on from here calibrates anew
        run.clock.total, run.calibration = run.clock.total - run.calibration, 0.0
    final = run.folder / "ckpt" / f"{step:06d}"
    averages = {"swa_count": torch.tensor(0)}
    if is_averaged(run.cfg):
        averages = trainer.avg.state_dict()
    tensors = {"optimizer": trainer.opt.state_dict(), "averages": averages}
    state = {
        "step": step,
        "train_seconds": run.clock.seconds(),
        "wall_seconds": run.wall(),
        "loader": loader.state_dict(),
        "rng": rng_of_ranks(run),
        "world_size": run.world,
        "torch": torch.__version__,
        "paces": run.paces,
        "tokens": run.tokens,
        "over": run.over,
        "trained": run.trained and run.trained._asdict(),
    }

    def write(part: Path) -> None:
        tensors["model"] = weights_on_cpu(trainer.model)
        for name, named in tensors.items():
            write_tensors(named, part / f"{name}.safetensors")
        text = json.dumps(state | {"data": loader.identity()})
        (part / "state.json").write_text(text, encoding="utf-8")
        (part / "config.toml").write_text(config_toml(run.cfg), encoding="utf-8")
        sync_folder(part)
        (part / "DONE").touch()

    def save() -> None:
        # of one step there is one state: what is whole is never replaced
        if final not in checkpoints(run.folder):
            write_folder(final, write)
        remove_checkpoints(final.parent, checkpoints(run.folder)[-run.cfg.keep :])

    run.on_main(save)
    return final


def rng_of_ranks(run: Run) -> list[dict[str, str]]:
    """The state of every rank's generators, in hexadecimal. Collective."""
    mine = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if run.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    found = [mine] * run.world
    if run.world > 1:
        dist.all_gather_object(found, mine)
    return found


def weights_on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter, by name."""
    return {name: p.detach().cpu().contiguous().clone() for name, p in model.named_parameters()}


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder: beside, then synced and renamed, so that it is whole or not there."""
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        sync_folder(part)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # a full disk needs its room for the next attempt
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.rename(part, final)
    sync_folder(final.parent)


def remove_checkpoints(folder: Path, kept: list[Path]) -> None:
    """All but those kept; what the user copied there has another name and stays."""
    own = {p for p in folder.iterdir() if re.fullmatch(r"[0-9]+|\.[0-9]+\.part", p.name)}
    for old in own - set(kept):
        # first, so that half a checkpoint is never taken for a whole one
        (old / "DONE").unlink(missing_ok=True)
        shutil.rmtree(old)


def write_tensors(named: dict[str, Tensor], path: Path) -> None:
    try:
        save_tensors(named, path)
    except SafetensorError as e:  # it wraps the system's error: full disk, mostly
        number_ = re.search(r"os error (\d+)", str(e))
        raise OSError(int(number_[1]) if number_ else errno.EIO, str(e), str(path)) from e


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{path} cannot be read ({e}); delete its checkpoint folder to go back to the one "
            "before"
        ) from e


@contextlib.contextmanager
def using(file: Path):
    """Inside, a checkpoint's file is taken over: UserError where it holds something else."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise UserError(
            f"{file} cannot be used ({why}); delete its checkpoint folder to go back to the one "
            "before"
        ) from e


def read_state(path: Path) -> dict:
    with using(path / "state.json"):
        return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load_checkpoint(path: Path, trainer: Trainer) -> int:
    """Everything that save_checkpoint wrote, at any number of ranks; the step to go on from."""
    run, loader = trainer.run, trainer.loader

    def accept() -> str:
        with using(path / "state.json"):
            return loader.accept(state["data"], state["loader"])

    def tensors_of(part: str) -> dict[str, Tensor]:
        return run.read_on_main(lambda: (read_tensors(path / f"{part}.safetensors"), None))[0]

    state = run.on_main(lambda: read_state(path))
    if "data" not in state:
        run.log(
            f"notice: {path} does not say what data it was trained on: whether these are the same "
            "is not known"
        )
    elif notice := run.on_main(accept):
        run.log(f"notice: {notice}")
    load_weights(trainer.model, tensors_of("model"), str(path))
    named = tensors_of("optimizer")
    with using(path / "optimizer.safetensors"):
        trainer.opt.load_state_dict(named)
    if is_averaged(run.cfg):
        named = tensors_of("averages")
        with using(path / "averages.safetensors"):
            trainer.avg.load_state_dict(named, run.rank)
    with using(path / "state.json"):
        return load_state(state, trainer)


def load_state(state: dict, trainer: Trainer) -> int:
    """The part of a checkpoint that is no tensors."""
    run = trainer.run
    trainer.loader.load_state_dict(state["loader"])
    if run.rank < len(state["rng"]):  # ranks that did not exist then keep their own fresh stream
        for kind, text in state["rng"][run.rank].items():
            rng = torch.from_numpy(np.frombuffer(bytes.fromhex(text), dtype=np.uint8).copy())
            if kind == "cpu":
                torch.set_rng_state(rng)
            elif run.device.type == "cuda":
                torch.cuda.set_rng_state(rng)
    run.clock.total = float(state["train_seconds"])
    run.began -= state["wall_seconds"]
    if saved := state.get("trained"):  # of a script: the schedules that move
        now = trainer.plan.at(state["step"], state["step"] / run.cfg.steps)
        run.trained = now._replace(**{k: v for k, v in saved.items() if k in Now._fields})
    run.paces, run.over = state.get("paces", []), state.get("over", False)  # older ones have none
    if not is_constant(run.cfg.batch_tokens):
        step, steps = state["step"], run.cfg.steps
        counted = (trainer.plan.at(s, s / steps).batch_tokens for s in range(step))
        run.tokens = state["tokens"] if "tokens" in state else sum(counted)
    return int(state["step"])


def notice(line: str) -> None:
    print(f"notice: {line}", file=sys.stderr, flush=True)


def source_path(where: str, exact: bool = False) -> Path:
    """The artifact or checkpoint that open_source() reads."""
    path = Path(where)
    if path.is_dir() and not (path / "model.safetensors").exists():
        found = [p for p in (path / "model.nrx", *checkpoints(path)[-1:]) if p.exists()]
        if not found:
            raise UserError(
                f"{where} holds neither an artifact (model.nrx) nor a complete checkpoint "
                "(ckpt/*/DONE)"
            )
        path = found[-1 if exact else 0]
    return path


def open_source(
    where: str, exact: bool = False, say=notice
) -> tuple[Config, dict[str, Tensor], Path]:
    """
    Config and weights to be used of a run folder (its artifact, else its newest checkpoint; the
    other way round with `exact`), a checkpoint or an artifact. Of a checkpoint those that the run
    exports, averages too, which `say` is told.
    """
    path = source_path(where, exact)
    if path.is_file():
        cfg, named = load_artifact(path)
        return found_near(cfg, path), named, path
    if not (path / "model.safetensors").exists():
        raise UserError(f"{where}: no such run folder, checkpoint or artifact")
    cfg, named = checkpoint_config(path), read_tensors(path / "model.safetensors")
    # a snapshot, or the end of an epoch, has these weights alone
    if (kind := cfg.final_weights) != "live" and (path / "DONE").exists():
        averages = read_tensors(path / "averages.safetensors")
        with using(path / "averages.safetensors"):
            found = kind == "ema" or bool(averages[f"{kind}_count"])
            of_kind = [averages[f"{name}:{kind}"].view_as(w) for name, w in named.items() if found]
        if not found:
            say(f"{path}: its live weights, as final_weights = {kind!r} has no snapshot yet")
        else:
            say(f"{path}: its {kind} average, as final_weights says")
            live, named = named, dict(zip(named, of_kind))
            if kind == "tail":
                named = {
                    name: w.float().lerp(named[name], tail_share(cfg, name))
                    for name, w in live.items()
                }
    return found_near(cfg, path), named, path


def checkpoint_config(path: Path) -> Config:
    """The configuration of a checkpoint; those of pre_pre_train.py have fields of their own."""
    file = path / "config.toml"
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read ({e})") from e
    if "nca_compat" in raw:
        raw = {key: value for key, value in raw.items() if key in FIELDS}
    return Config(**checked(raw, str(file)))


def found_near(cfg: Config, source: Path) -> Config:
    """
    A run names its data and its tokenizer as they were seen from where it was started. From
    elsewhere they are looked for in the folders above the run's, and then beside this program.
    """
    places = [*source.resolve().parents, Path(__file__).resolve().parent]
    for key in ("data", "tokenizer"):
        name = getattr(cfg, key)
        if name and name != "gpt2" and not Path(name).exists():
            setattr(cfg, key, next((str(p / name) for p in places if (p / name).exists()), name))
    return cfg


# Parts of attention that each parameter is, or each matrix of a stack.
ATTENTION_PARTS = {
    "qkv": ("qk", "qk", "vo"),
    "kv": ("qk", "vo"),
    "q": ("qk",),
    "qk": ("qk",),
    "v": ("vo",),
    "q_gain": ("qk",),
    "proj": ("vo",),
}


def parts_of(name: str, group: str) -> list[set[str]]:
    """The words of `transfer` that take a tensor, or each matrix of a stack."""
    words = {"all"} | {word for word in ("attn", "mlp") if f".{word}." in name}
    if group == "scalar":
        words.add("scalars")
    if "attn" not in words:
        return [words]
    leaf = name.split(".")[-1]
    return [words | {part} for part in ATTENTION_PARTS.get(leaf, ("attn",))]


def transferred(w: Tensor, name: str, cfg: Config) -> Tensor:
    """The weights or, as a control, shuffled in each matrix or noise of their norm."""
    if not cfg.transfer_control:
        return w
    rng, out = generator_of(f"{cfg.seed} {cfg.transfer_control} {name}"), w.float().clone()
    for matrix in out if out.ndim > 2 else [out]:
        if cfg.transfer_control == "shuffled":
            matrix.copy_(
                matrix.flatten()[torch.randperm(matrix.numel(), generator=rng)].view_as(matrix)
            )
        else:
            noise = torch.randn(matrix.shape, generator=rng)
            matrix.copy_(noise * (matrix.norm() / noise.norm()))
    return out


def compare_sources(cfg: Config, theirs: Config, attention: bool, path: Path) -> list[str]:
    """
    What no shape tells: attention that was cut into other heads is an error where its weights are
    taken. Returns notices of what may be meant.
    """

    def heads(c: Config) -> dict[str, int]:
        return {"heads": c.heads, "head_dim": head_width(c), "kv_heads": c.kv_heads or c.heads}

    other = [
        f"{key} = {a} there and {b} here"
        for (key, a), b in zip(heads(theirs).items(), heads(cfg).values())
        if a != b
    ]
    if attention and other:
        raise UserError(
            f"init_from {path}: {', '.join(other)}: the same numbers would make other heads; build "
            "both alike, or leave attention out with --transfer"
        )
    turning = [
        f"{key} = {a!r} there and {b!r} here"
        for key, a, b in [
            (k, getattr(theirs, k), getattr(cfg, k)) for k in ("rope", "rope_base", "rope_dims")
        ]
        if a != b
    ]
    notices = (
        [f"{', '.join(turning)}: queries and keys were learned with other rotations"]
        if attention and turning
        else []
    )
    return notices + (
        [f"depth = {theirs.depth} there and {cfg.depth} here: blocks are taken by their number"]
        if theirs.depth != cfg.depth
        else []
    )


def transfer_weights(model: nn.Module, cfg: Config, run: Run) -> None:
    """
    Start from the weights of another run (init_from), of this program or of pre_pre_train.py; what
    was taken stands in the log by tensor, and on the console by kind. Of "all", tables of another
    vocabulary stay fresh. Any other shape that differs is an error, as is nothing.
    """

    def read() -> tuple[dict[str, Tensor], tuple[Config, Path]]:
        say = lambda line: run.log(f"notice: {line}")
        theirs, named, path = open_source(cfg.init_from, exact=True, say=say)
        return named, (theirs, path)

    named, (theirs, path) = run.read_on_main(read)
    declared, attention, found = declarations(model), False, []
    for name, p in model.named_parameters():
        parts = taken_parts(cfg, name, declared[name].group)
        was = float(p.detach().float().norm())
        fate = fate_of(cfg, name, declared[name].group, p, parts, named, path)
        if fate.startswith("loaded"):
            source = transferred(named[name], name, cfg)
            attention |= ".attn." in name and p.ndim > 1
            with torch.no_grad():
                for i in [...] if all(parts) else [i for i, taken in enumerate(parts) if taken]:
                    p[i] = source[i]
        found.append(Fate(name, fate, list(p.shape), float(p.detach().float().norm()), was))
    if cfg.untie_at:
        same_tables(model)
    if not any(f.fate.startswith("loaded") for f in found):
        raise UserError(
            f"transfer = {cfg.transfer!r} takes nothing from {path}: no name of this model matches "
            "it there"
        )
    notices = compare_sources(cfg, theirs, attention, path)
    unused = {name: list(named[name].shape) for name in sorted(named.keys() - declared.keys())}
    log_transfer(run, found, unused)
    for line in notices:
        run.log(f"notice: init_from {path}: {line}")
    loaded = sum(f.fate.startswith("loaded") for f in found)
    control = f", {cfg.transfer_control} on purpose" if cfg.transfer_control else ""
    run.log(
        f"transfer:{loaded} of {len(found)} tensors loaded from {path}{control}; each one: log.txt"
    )


class Fate(NamedTuple):
    """What a transfer did with a parameter, and its norm now and before."""

    name: str
    fate: str
    shape: list[int]
    norm: float
    was: float


def taken_parts(cfg: Config, name: str, group: str) -> list[bool]:
    """Whether `transfer` asks for a tensor, or for each matrix of a stack."""
    parts = parts_of(name, group)
    asked, words = set(cfg.transfer.split("+")), {"all", "attn", "qk", "vo", "mlp", "scalars"}
    if cfg.transfer_skip and re.search(cfg.transfer_skip, name):
        return [False] * len(parts)
    if asked <= words:
        return [bool(part & asked) for part in parts]
    return [bool(re.search(cfg.transfer, name))] * len(parts)


def fate_of(
    cfg: Config,
    name: str,
    group: str,
    p: Tensor,
    parts: list[bool],
    named: dict[str, Tensor],
    path: Path,
) -> str:
    """fresh, missing or loaded; UserError where a shape is not the source's."""
    if not any(parts):
        return "fresh"
    if name not in named:
        return "missing"  # asked for, but the source has none
    theirs = named[name].shape
    if p.shape == theirs:
        return "loaded" if all(parts) else f"loaded {sum(parts)} of {len(parts)}"
    table = group in ("embed", "head") and p.shape[-1] == theirs[-1] or name == "head_bias"
    if table and "all" in cfg.transfer.split("+"):
        return "fresh (another vocabulary)"
    raise UserError(
        f"init_from {path}: {name} is {list(theirs)} there and {list(p.shape)} here; leave it out "
        "with --transfer or --transfer_skip, or build the same shape"
    )


def log_transfer(run: Run, found: list[Fate], unused: dict[str, list[int]]) -> None:
    """By tensor in log.txt; on the console by kind, a name without its number."""
    kinds: dict[tuple[str, str], list[Fate]] = {}
    for f in found:
        was = f" (was {f.was:.4g})" if f.fate.startswith("loaded") else ""
        line = f"transfer:{f.fate} {f.name} {f.shape} norm {f.norm:.4g}{was}"
        run.log(line, console=False)
        kinds.setdefault((f.fate, without_number(f.name)), []).append(f)
    for name, shape in unused.items():
        run.log(f"transfer:unused {name} {shape}", console=False)
    for (fate, name), alike in kinds.items():
        now, before = (math.hypot(*(f[i] for f in alike)) for i in (3, 4))
        was = f" (was {before:.4g})" if fate.startswith("loaded") else ""
        run.log(f"  {fate:14} {name:24} x{len(alike):<3} norm {now:.4g}{was}")
    if unused:
        names = dict.fromkeys(map(without_number, unused))
        run.log(f"  in the source only: {', '.join(names)}")


def without_number(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


########################################
#                Config                #
########################################


SECTIONS = (
    RunConfig,
    LengthConfig,
    ModelConfig,
    OptimConfig,
    DataConfig,
    AverageConfig,
    CycleConfig,
    ExportConfig,
    TransferConfig,
)


Table = Annotated[dict, tyro.conf.Suppress]  # of a preset, and no flag


@dataclass
class Config(*reversed(SECTIONS)):  # of which the last one's fields come first
    """Every flag, and the tables of a preset that other programs read in the run's folder."""

    # no help in their metadata would make tyro read this file once for each class
    rule: Table = dataclasses.field(default_factory=dict, metadata={"help": ""})
    score: Table = dataclasses.field(default_factory=dict, metadata={"help": ""})


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
LIMITS = {name: limit for part in SECTIONS for name, limit in part.LIMITS.items()}
# The keys of those tables and the values that ask for nothing, which also say the types.
TABLES: dict[str, dict[str, object]] = {
    "rule": {  # of the leaderboard, for logs/report.py and logs/submit.py
        "metric": "val_loss",  # of result.json, that the rule is about
        "target": 0.0,  # the mean over seeds must be below this; 0: no rule
        "margin": 0.0,  # by at least this much
        "p": 0.0,  # at this level of a one-sided one-sample t-test; 0: no t-test
        "z": 0.0,  # (target - mean) * sqrt(n) must reach this; 0: not asked
        "max_seconds": 0.0,  # cap of the training clock; 0: none
        "max_bytes": 0,  # cap of total_bytes; 0: none
    },
    "score": {  # of the weights, for logs/score.py, whose flags these are
        "modes": "",
        "ensemble": "",
        "stride": 64,
        "share": 0.0,
        "logit_temperature": 1.0,
        "ttt_chunk": 32768,
        "ttt_epochs": 3,
        "ttt_lr": 0.002,
        "lora_rank": 8,
        "lora_lr": 0.001,
        "canonical": 0,
        "prove_bytes": 0,
        "sample_tokens": 0,
        "prompt": "",
        "temperature": 0.8,
        "top_k": 50,
    },
}
TABLE_LIMITS = limits(
    (0, 0.5, "share"),
    (0, 1, "p canonical"),
    (0, 10, "ttt_lr lora_lr"),
    (0, 100, "ttt_epochs"),
    (0, 1000, "target margin z temperature"),
    (0, 65536, "top_k"),
    (0, 10**6, "sample_tokens"),
    (0, 10**9, "max_seconds prove_bytes"),
    (0, 10**12, "max_bytes"),
    (1e-3, 1000, "logit_temperature"),
    (1, 1 << 12, "lora_rank"),
    (1, 10**9, "stride"),
    (1, 1 << 40, "ttt_chunk"),
)
# What a resumed run may change without becoming another experiment.
FREE_ON_RESUME = set(
    "config resume log_dir log_every eval_every save_every save_last keep wandb device compile "
    "micro_tokens auto_micro loss_chunk embed_stats rule score "
    "nca_cache nca_threads nca_measured".split()
)
# What is asked for behind the last step alone: an unfinished run may change it, or its end might be
# impossible.
AFTER_TRAINING = {"export", "export_codec", "artifact_limit", "gptq", "final_weights"}
# Flags that this version lacks: {name: the value at which it did nothing}. What was written with
# that value is read as if the name were not there; any other value is an error. A flag that is new
# has such a value as its default, so what was written before it means what it meant.
REMOVED: dict[str, object] = {"sample_from": "", "lr_floor": 0.05}
# Flags that became keys of a table.
MOVED = {f"rule_{key}": ("rule", key) for key in TABLES["rule"]}
MOVED |= {"score": ("score", "modes")}
MOVED |= {
    key: ("score", key)
    for key in ("stride", "prove_bytes", "sample_tokens", "prompt", "temperature", "top_k")
}


def preset_path(name: str) -> Path:
    """A path, or the name of a file in configs/ beside this file or where we are."""
    folders = [Path(__file__).resolve().parent / "configs", Path("configs")]
    for path in (Path(name), *(folder / f"{name}.toml" for folder in folders)):
        if path.is_file():
            return path
    known = sorted({p.stem for folder in folders for p in folder.glob("*.toml")})
    raise UserError(
        f"--config {name}: no such file and no such preset; presets: {', '.join(known)}"
    )


def is_layer(path: Path) -> bool:
    """A layer says so in its first line; alone it would train a model of defaults."""
    with open(path, "rb") as f:
        return re.match(rb"# \w+: a layer\b", f.readline(200)) is not None


def read_toml(path: Path, kind: type | None = None) -> dict:
    """Values of one preset file; unknown keys and wrong types are errors that name them."""
    try:
        # some editors begin a file with a mark
        raw = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{path} is not TOML: {e}") from e
    return checked(raw, str(path), kind or Config)


def checked(raw: dict, where: str, config: type = Config) -> dict:
    """The same in the types of `config`; all else is an error that names it."""
    values, fields = {}, typing.get_type_hints(config)
    tables = {name: dict(raw[name]) for name in TABLES if isinstance(raw.get(name), dict)}
    for key, value in raw.items():
        if key in tables:
            continue
        if key in MOVED:
            name, inner = MOVED[key]
            tables.setdefault(name, {})[inner] = value
            continue
        if key in REMOVED and key not in fields:
            require(
                value == REMOVED[key],
                f"{where}: {key} = {value!r}, but this version has no {key}; it reads what was "
                f"written with {key} = {REMOVED[key]!r}, the rest needs the version that wrote it",
            )
            continue
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=3)
            hint = (
                f"; did you mean {' or '.join(close)}?"
                if close
                else "; `python train_gpt.py --help` lists all"
            )
            raise UserError(f"{where}: unknown key {key} = {value!r}{hint}")
        kind = fields[key]
        listed = kind == tuple[str, ...]
        if listed and isinstance(value, list) and all(isinstance(v, str) for v in value):
            value = tuple(value)
        elif kind is float and type(value) is int:
            value = as_float(value)
        elif key in SCHEDULES and type(value) in (int, float):
            value = str(value)  # a constant schedule
        elif listed or type(value) is not kind:
            word = "a list of strings" if listed else getattr(kind, "__name__", kind)
            raise UserError(
                f"{where}: {key} = {value!r} is a {type(value).__name__}, but {key} must be {word}"
            )
        values[key] = value
    return values | {name: checked_table(name, table, where) for name, table in tables.items()}


def checked_table(name: str, table: dict, where: str) -> dict:
    """The same keys and values in the types of TABLES; all else is an error that names it."""
    values = {}
    for key, value in table.items():
        if key not in TABLES[name]:
            raise UserError(
                f"{where}: unknown key {key} = {value!r} in [{name}]; its keys are "
                f"{', '.join(TABLES[name])}"
            )
        kind = type(TABLES[name][key])
        if kind is float and type(value) is int:
            value = as_float(value)
        if type(value) is not kind or kind is float and not math.isfinite(value):
            finite = " that is finite" if kind is float else ""
            raise UserError(
                f"{where}: {key} = {value!r} in [{name}] must be a {kind.__name__}{finite}"
            )
        if kind is not str:
            check_table_number(key, value, f"{where}, [{name}]: ")
        values[key] = value
    return values


def check_table_number(key: str, value: float, where: str = "") -> None:
    low, high = TABLE_LIMITS[key]
    require(low <= value <= high, f"{where}{key} = {value}: must lie between {low} and {high}")


def as_float(value: int) -> float:
    """More than a float holds is too much in any case."""
    return float(max(-(10**300), min(value, 10**300)))


def parse_args(argv: list[str]) -> Config:
    """Defaults < presets from left to right < flags."""
    for word in argv:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in MOVED:
            table, key = MOVED[name]
            more = " and of logs/score.py, which scores a trained run" * (table == "score")
            raise UserError(f"{word}: no flag of training, but {key} of a preset's [{table}]{more}")
    names, i = [], 0
    while i < len(argv):
        if argv[i] == "--config":
            while i + 1 < len(argv) and not argv[i + 1].startswith("-"):
                i += 1
                names.append(argv[i])
        elif argv[i].startswith("--config="):
            names.append(argv[i].split("=", 1)[1])
        i += 1
    merged: dict = {}
    for name in names:
        layer = read_toml(preset_path(name))
        for table in TABLES:  # key by key
            layer[table] = merged.get(table, {}) | layer.get(table, {})
        merged |= layer
    if names and is_layer(preset_path(names[0])):
        raise UserError(
            f"--config {' '.join(names)}: {names[0]} is a layer, which changes a preset: name that "
            f"first, for example --config remix_m {names[0]}"
        )
    merged.pop("config", None)
    cfg = tyro.cli(
        Config,
        args=argv,
        default=Config(**merged),
        description=__doc__.split("Read it")[0],
        use_underscores=True,
    )
    cfg.config = tuple(names)
    if not cfg.run:
        cfg.run = "-".join([Path(n).stem for n in names] or ["run"]) + f"-s{cfg.seed}"
    validate(cfg)
    # that run has its configuration
    if not (cfg.resume and (Path(cfg.log_dir) / cfg.run / "config.toml").is_file()):
        refuse_idle(cfg)
    return cfg


def validate(cfg: Config) -> None:
    """Refuse what cannot work, before anything is created: key, value and fix."""
    check_config(cfg)
    check_length(cfg)
    require(
        max(cfg.lr_cycles, cfg.average_epochs) <= (cfg.epochs or 1),
        f"lr_cycles = {cfg.lr_cycles}, average_epochs = {cfg.average_epochs}: at most epochs = "
        f"{cfg.epochs}",
    )
    require(
        cfg.final_weights != "ema" or cfg.ema > 0,
        "final_weights = 'ema' needs ema > 0, for example --ema 0.997",
    )
    require(
        cfg.final_weights != "swa" or cfg.swa_every > 0, "final_weights = 'swa' needs swa_every > 0"
    )
    require(
        cfg.final_weights != "tail" or cfg.tail_ema != "0",
        "final_weights = 'tail' needs tail_ema, for example --tail_ema '0 0.8:50'",
    )
    check_cycles(cfg)
    if cfg.export:
        check_export(cfg)
    require(
        bool(cfg.export) or not cfg.gptq,
        "gptq is about an artifact, but export is empty: set --export int8",
    )
    require(
        Schedule("qat", cfg.qat).values() == [0] or cfg.export not in ("", "fit"),
        f"qat = {cfg.qat!r} rounds as export does, but export = {cfg.export!r} names no bits: set "
        "it, for example --export int6",
    )


def check_length(cfg: Config) -> None:
    """Refuse what is not possible in so many steps."""
    by_epoch = [
        k
        for k, on in (
            ("lr_cycles", cfg.lr_cycles),
            ("average_epochs", cfg.average_epochs),
            ("eval_every", cfg.eval_every < 0 and not cfg.cycles),
        )
        if on
    ]
    require(
        not by_epoch or 0 < cfg.epochs <= cfg.steps and not cfg.max_seconds,
        f"{' and '.join(by_epoch)} count epochs by steps: they need epochs (now {cfg.epochs}) "
        f"from 1 to steps = {cfg.steps}, and no max_seconds",
    )
    require(
        is_constant(cfg.batch_tokens) or not by_epoch,
        f"{' and '.join(by_epoch)} count epochs by steps: they need steps of one size, but "
        f"batch_tokens = {cfg.batch_tokens!r}",
    )
    # on the clock nobody knows the last step
    last = cfg.swa_every and cfg.steps // cfg.swa_every * cfg.swa_every
    require(
        not cfg.swa_every or cfg.max_seconds > 0 or last and last / cfg.steps >= cfg.swa_start,
        f"swa_every = {cfg.swa_every} takes no snapshot in steps = {cfg.steps} from swa_start = "
        f"{cfg.swa_start:g} of them on: lower --swa_every or --swa_start",
    )
    require(
        not cfg.cycles or cfg.cycles <= cfg.steps and not cfg.max_seconds,
        f"cycles = {cfg.cycles} are counted by steps: at most steps = {cfg.steps}, and no "
        "max_seconds",
    )
    require(
        not cfg.cycles or len(set(Plan(cfg).cycle_ends)) == cfg.cycles,
        f"cycles = {cfg.cycles} in steps = {cfg.steps}: with batch_tokens = {cfg.batch_tokens!r} "
        "one of them would have no step: fewer cycles",
    )
    if cfg.untie_at:
        tied = last_tied(cfg) + 1
        require(
            tied < cfg.steps,
            f"untie_at = {cfg.untie_at!r} needs a step of two tables behind it, and steps = "
            f"{cfg.steps}",
        )
        require(
            tied % cfg.adam_every == 0,
            f"untie_at = {cfg.untie_at!r} is behind {tied} steps, which adam_every = "
            f"{cfg.adam_every} does not divide: the tables part behind a step of AdamW",
        )
    validate_schedules(cfg)


# Regular expressions, which a forger could let search for ever.
OF_TRAINING = "own_lr adamw_matrices matrix_lr_mul slow uncorrected aurora soap soap_gate".split()
OF_TRAINING += ["meta_match", "tail_blend", "transfer", "transfer_skip"]


def stored_config(text: str, where: str) -> Config:
    """Of a file that may be forged: without the patterns that only training reads."""
    values = checked(tomllib.loads(text), where)
    cfg = Config(**{key: value for key, value in values.items() if key not in OF_TRAINING})
    check_config(cfg)
    return cfg


def check_config(cfg: Section) -> None:
    """What holds for every configuration, also one that was read and may be forged."""
    check_texts(cfg)
    parts = [part for part in SECTIONS if isinstance(cfg, part)]
    for part in parts:
        check_numbers(cfg, part.LIMITS)
        check_choices(cfg, part.CHOICES)
    for part in parts:
        part.check(cfg)


def check_choices(cfg: Section, choices: dict[str, tuple[str, ...]]) -> None:
    for key, allowed in choices.items():
        value = getattr(cfg, key)
        words = ", ".join(repr(word) for word in allowed)
        require(value in allowed, f"{key} = {value!r}: must be one of {words}")


def check_texts(cfg: Config) -> None:
    """Every text can be written to a file: what a console gives need not be UTF-8."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                require(len(text) <= 20_000, f"{f.name} has {len(text)} characters: 20000 at most")
                require(
                    not re.search("[\ud800-\udfff]", text),
                    f"{f.name} = {ascii(text)} is no UTF-8 text",
                )
                require("\0" not in text, f"{f.name} = {text!r} holds a zero byte")


def check_numbers(cfg: Section, ranges: dict[str, tuple[float, float]]) -> None:
    """Each number, and each value of a schedule, is finite and within its range."""
    for name, (least, most) in ranges.items():
        value = getattr(cfg, name)
        if name not in SCHEDULES:
            values, what = [value], f"{name} = {value}"
        elif name == "lr_matrices" and not value:
            continue
        else:
            schedule = Schedule(name, value)
            if name in (*GRAPHS, "qat", "doc_cap"):
                schedule.require_plateaus()
            values, what = schedule.values(), f"{name} = {value!r}: its values"
        for x in values:
            require(math.isfinite(x), f"{what}: must be a finite number")
            if name in SCHEDULES:
                ok = least <= x <= most
                require(ok, f"{what} must lie between {least} and {most}")
            require(
                x >= least,
                f"{what}: must {'not be negative' if least == 0 else f'be at least {least}'}",
            )
            require(x <= most, f"{what}: must be at most {most}")


def validate_schedules(cfg: Config) -> None:
    """
    Refuse schedules that shape graphs or the weights that are scored, where their last value might
    not be reached.
    """
    moving = [key for key in GRAPHS if not is_constant(getattr(cfg, key))]
    moving += [] if is_constant(cfg.qat) else ["qat"]
    moving += [] if is_constant(cfg.tail_ema) else ["tail_ema"]
    for key in moving:
        sched = Schedule(key, getattr(cfg, key))
        require(
            not cfg.max_seconds or not any(p.at for p in sched.points if p.in_steps),
            f"{key} = {sched.text!r} counts steps, but under max_seconds = {cfg.max_seconds:g} "
            "nobody knows whether they are reached: give fractions of the time, such as 0.5 for "
            "half of it",
        )
        # nobody knows what the last step is where max_seconds ends training
        steps = math.inf if cfg.max_seconds else cfg.steps
        late = [
            p
            for p in sched.points
            if p.at
            and (
                math.ceil(p.at) >= cfg.steps
                if p.in_steps
                else p.at >= 1 or p.at * steps - 1e-9 > steps - 1
            )
        ]
        require(
            not late,
            f"{key} = {sched.text!r}: its last value is the one that is scored and exported, but "
            f"the run of {cfg.steps} steps ends before it is reached",
        )


def refuse_idle(cfg: Config) -> None:
    """Refuse what is on and would do nothing."""
    plain = Config()
    for key, what, there in [need for part in SECTIONS for need in part.needs(cfg)]:
        value, neutral = getattr(cfg, key), getattr(plain, key)
        require(
            there or value == neutral,
            f"{key} = {value!r} does nothing here: it needs {what}; or leave it at {neutral!r}",
        )


def config_toml(cfg: Config) -> str:
    """The resolved configuration as TOML that --config accepts again."""

    def line(key: str, value: object) -> str:  # JSON's values are TOML's, but for this character
        return f"{key} = " + json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

    named = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    lines = [
        line(key, value) for key, value in named.items() if key not in ("config", "resume", *TABLES)
    ]
    for name in TABLES:
        if named[name]:
            lines += ["", f"[{name}]", *(line(key, value) for key, value in named[name].items())]
    return "\n".join(lines) + "\n"


def config_hash(cfg: Config) -> str:
    """sha256 over everything that makes two runs different experiments, the seed included."""
    keep = {
        k: v for k, v in dataclasses.asdict(cfg).items() if k not in FREE_ON_RESUME | {"run", "arm"}
    }
    return hashlib.sha256(json.dumps(keep, sort_keys=True).encode()).hexdigest()


########################################
#                Train                 #
########################################


@dataclass
class Trainer:
    """What training consists of, together."""

    cfg: Config
    run: Run
    plan: Plan
    model: GPT
    graph: object  # the model, compiled or not
    opt: MuonAdamW
    avg: Averages
    loader: Loader
    val: Validation
    tokenizer: Tokenizer | None
    teacher: Teacher | None = None
    impossible: Tensor | None = None  # canonical_mask()
    # seconds of the last three steps
    paces: list[tuple[Now, float]] = dataclasses.field(default_factory=list)


def build(cfg: Config, run: Run) -> Trainer:
    """Make every part; what is wrong with config or data is found here."""
    plan = Plan(cfg, run.world)
    for now in plan.moments():
        plan.micro_rows(now, run.world)  # refuses batches that do not divide
    loader = run.together(lambda: Loader(cfg, plan, run))
    loader.open_shards()
    tokenizer = open_tokenizer(cfg, run) if cfg.tokenizer else None
    val = run.together(lambda: Validation(cfg, plan, tokenizer))
    impossible = find_impossible(run, tokenizer, val) if cfg.canonical_mask else None
    trainer = assemble(cfg, run, plan, loader, val, tokenizer, impossible)
    if cfg.export:
        check_artifact(cfg, trainer.model)
    if cfg.gptq and (rows := calibration_rows(cfg, cfg.gptq)) < cfg.gptq:
        run.log(
            f"notice: gptq = {cfg.gptq} rows, but the first train shard holds {rows}: they are all"
        )
    return trainer


def find_impossible(run: Run, tokenizer: Tokenizer, val: Validation) -> Tensor:
    """canonical_mask() on the device; the speedrun's rules count its making as training time."""
    run.clock.start()
    mask = canonical_mask(tokenizer)
    run.clock.stop()
    before, target = val.tokens[:-1], val.tokens[1:]
    lost = int((mask[before, target >> 3] >> (target & 7).astype(np.uint8) & 1).sum())
    require(
        lost == 0,
        f"canonical_mask = 1: {lost} of {val.scored} tokens of the validation text stand where "
        f"{tokenizer.name} never puts them, so it was encoded by something else",
    )
    pairs = int(np.unpackbits(mask).sum())
    run.log(f"canonical_mask:{pairs} pairs of tokens time:{run.clock.seconds():.1f}s")
    return torch.from_numpy(mask).to(run.device)


def open_tokenizer(cfg: Config, run: Run) -> Tokenizer | None:
    try:
        return Tokenizer(cfg.tokenizer, cfg.vocab, cfg.doc_token)
    except UserError as e:
        if cfg.canonical_mask:
            raise
        run.log(f"notice: no bits per byte and no samples: {e}")
        return None


def assemble(
    cfg: Config,
    run: Run,
    plan: Plan,
    loader,
    val,
    tokenizer: Tokenizer | None,
    impossible: Tensor | None = None,
) -> Trainer:
    """Model and optimizer to go with the data."""
    model = build_model(cfg, run.device, run.dtype, max(plan.max_seq_len, plan.eval_seq_len))
    if "prefix_loss" in later_targets(cfg):
        require(
            tokenizer is not None,
            f"prefix_loss = {cfg.prefix_loss!r} needs the bytes of all tokens, but tokenizer = "
            f"{cfg.tokenizer!r} could not be read: see the notice above, or --prefix_loss 0",
        )
        model.prefixes = torch.from_numpy(longest_prefixes(tokenizer.pieces())).to(run.device)
    for line in centering_notices(cfg):
        run.log(f"notice: {line}")
    if cfg.tie_embed and cfg.head_init == "zero" and cfg.init != "xavier":
        run.log(
            "notice: a tied table cannot start at zero, as it is the input too: it starts uniform "
            "in +-1/sqrt(dim)"
        )
    patterns = (cfg.adamw_matrices, cfg.own_lr, cfg.uncorrected, cfg.soap, cfg.aurora, cfg.fp8)
    if any((*patterns, cfg.matrix_lr_mul)):
        for line in pattern_notices(cfg, model):
            run.log(f"notice: {line}")
    if cfg.fp8 and not has_fp8(run.device):
        run.log(f"notice: fp8 = {cfg.fp8!r}: {run.device} takes no products in 8 bits")
    if cfg.init_from and not (cfg.resume and run.on_main(lambda: newest_checkpoint(run.folder))):
        transfer_weights(model, cfg, run)
    opt = MuonAdamW(cfg, model, run)
    torch.manual_seed(cfg.seed << 16 | run.rank)  # dropout: each rank its own
    return Trainer(
        cfg,
        run,
        plan,
        model,
        compile_model(model, cfg),
        opt,
        Averages(cfg, opt),
        loader,
        val,
        tokenizer,
        build_teacher(cfg, run, plan) if cfg.distill else None,
        impossible,
    )


def pattern_notices(cfg: Config, model: GPT) -> list[str]:
    """
    Refuse a pattern that finds nothing. A rate of own_lr may wait, as other rates do, but this is
    said.
    """
    declared = declarations(model)
    rules = {name: rule_of(cfg, name, p, declared[name]) for name, p in model.named_parameters()}
    matrices = [name for name, rule in rules.items() if rule.group == "matrix"]
    adamws = [name for name, rule in rules.items() if rule.kind != "muon"]
    require(
        not cfg.adamw_matrices or any(name in adamws for name in matrices),
        f"adamw_matrices = {cfg.adamw_matrices!r} matches no matrix of this model; they are such "
        f"as {', '.join(matrices[:3])}",
    )
    hits: dict[str, bool] = {}
    if cfg.soap:
        hits[f"soap = {cfg.soap!r}"] = any(rule.soap for rule in rules.values())
    if cfg.soap_gate:
        hits[f"soap_gate = {cfg.soap_gate!r}"] = any(rule.soap_gate for rule in rules.values())
    if cfg.aurora:
        hits[f"aurora = {cfg.aurora!r}"] = any(rule.aurora for rule in rules.values())
    for pattern, _ in matrix_factors(cfg) if cfg.matrix_lr_mul else ():
        found = [name for name in rules if pattern.search(name) and rules[name].kind == "muon"]
        hits[f"matrix_lr_mul = {pattern.pattern!r}"] = bool(found)
    if cfg.fp8:
        hits[f"fp8 = {cfg.fp8!r}"] = any(is_named(cfg.fp8, n) for n in ("head", *matrices))
    if cfg.uncorrected:
        hits[f"uncorrected = {cfg.uncorrected!r}"] = not all(r.corrected for r in rules.values())
    for pattern, hit in hits.items():
        require(
            hit,
            f"{pattern} matches nothing that it is for; Muon updates such as "
            f"{', '.join([n for n in matrices if n not in adamws][:2])}, AdamW such as "
            f"{', '.join(adamws[:2])}",
        )
    return [
        f"own_lr: {own.pattern.pattern!r} is the name of nothing that AdamW updates here"
        for own in own_rates(cfg)
        if not any(own.pattern.search(name) for name in adamws)
    ]


def centering_notices(cfg: Config) -> list[str]:
    """What theory says of centering here; logs/explain_centering.py shows each."""
    on = [k for k in ("mu_centering", "mu_loss", "z_loss") if getattr(cfg, k)]
    lines, names = [], " and ".join(on)
    moved = [k for k in on if k != "z_loss"]
    if moved and cfg.tie_embed:
        lines.append(
            f"{' and '.join(moved)} with a tied table: the input embeddings are shifted as well, "
            "so the loss is changed and not only the mean logit"
        )
    if on and cfg.softcap:
        lines.append(
            f"{names} with softcap = {cfg.softcap:g}: capped logits are not free to shift, so a "
            "common offset costs loss and centering changes it; log(Z) is at most softcap + "
            "ln(vocab) anyway"
        )
    if moved and cfg.optimizer == "muon":
        lines.append(
            f"{' and '.join(moved)} with Muon on the blocks: they do not see mu; the head stays "
            "AdamW's, whose steps move mu (a polar factor has column sums of zero and would not)"
        )
    return lines


def compile_model(model: GPT, cfg: Config):
    """The model as train and evaluation call it."""
    if cfg.compile == 0:
        return model
    # one graph per shape of the schedule, and per block where no two are alike; the default of 8 is
    # for accidents
    torch._dynamo.config.recompile_limit = 256
    if cfg.compile == 2:
        return torch.compile(model, dynamic=False)
    for block in [*model.blocks, *([model.mtp_block] if cfg.mtp else [])]:
        block.compile(dynamic=False)
    model.losses = torch.compile(model.losses, dynamic=False)
    if cfg.z_loss:
        model.losses_and_log_z = torch.compile(model.losses_and_log_z, dynamic=False)
    if later_targets(cfg):
        model.losses_with_later = torch.compile(model.losses_with_later, dynamic=False)
    if cfg.distill:
        model.losses_and_teacher_kl = torch.compile(model.losses_and_teacher_kl, dynamic=False)
    model.norm = torch.compile(norm, dynamic=False)
    return model


def graphs_compiled() -> int:
    loaded = sys.modules.get("torch._dynamo.utils")  # by what compiles; it takes a second to load
    return loaded.counters["stats"]["unique_graphs"] if loaded else 0


def log_recompiles(run: Run, before: int) -> None:
    """How many graphs the warm-up has left out."""
    run.log(f"recompiles:{graphs_compiled() - before}")


def warm_up(trainer: Trainer) -> None:
    """
    Run every graph that the schedules will need once, on random tokens: compilation and the
    allocator's first growth lie before the clock. Then weights, gradients, optimizer state and RNG
    are put back.
    """
    run, plan, began = trainer.run, trainer.plan, time.perf_counter()
    kept = trainer.opt.snapshot()
    several = trainer.cfg.param_dtype != "float32" and any(
        plan.micro_batches(n, run.world) > 1 for n in plan.moments()
    )
    todo = [*plan.train_moments(run.world).items(), *((s, None) for s in plan.eval_shapes())]
    what = "compile" if trainer.cfg.compile else "warm up"
    bar = tqdm(todo, desc=what, leave=False, disable=not (run.is_main and sys.stderr.isatty()))
    try:
        with (
            run.interruptible(),
            told_while(bar, what, len(todo)) if run.is_main else contextlib.nullcontext(),
            torch.random.fork_rng([run.device] if run.device.type == "cuda" else []),
        ):
            for shape, now in bar:
                run.poll()
                rows = torch.randint(
                    trainer.cfg.vocab, (shape.rows, shape.seq_len + 1), device=run.device
                )
                x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
                if now:
                    some = ()
                    if trainer.cfg.sampled_classes != "0" and now.sampled_classes:
                        classes = torch.arange(now.sampled_classes, device=run.device)
                        some = (classes.repeat(shape.rows, 1),)
                    loss_terms(trainer, x, y, now, *some).sum().backward()
                    if several:
                        trainer.opt.collect(last=True)
                    first = plan.at(0, 0.0)
                    if trainer.cfg.untie_at:  # else no step would have an embedding of its own
                        first = first._replace(tied=0)
                    for _ in range(trainer.cfg.adam_every):
                        trainer.opt.step(first)
                else:
                    applied = shape.repeats, shape.window, shape.passes, shape.window_long
                    with torch.enable_grad() if shape.as_trained else torch.no_grad():
                        trainer.graph(x, y, *applied, impossible=None)
                        if trainer.impossible is not None:
                            trainer.graph(x, y, *applied, impossible=trainer.impossible)
        if trainer.cfg.gptq and trainer.cfg.max_seconds:
            keep_time_for_gptq(trainer)
    finally:
        with torch.no_grad():
            trainer.opt.restore(kept)
    run.log(f"warmup:{len(todo)} graphs time:{time.perf_counter() - began:.1f}s")


@contextlib.contextmanager
def told_while(bar: tqdm, what: str, graphs: int, every: float = 10):
    """One graph may take a minute: the bar's clock goes on; without one, a line every 10 s."""
    over, began = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not over.wait(every if bar.disable else 1):
            if bar.disable:
                to_console(f"{what}: {graphs} graphs, {time.perf_counter() - began:.0f} s")
            else:
                bar.refresh()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def keep_time_for_gptq(trainer: Trainer) -> None:
    """What GPTQ will take behind the last step is no time for steps: a clock cap is a cap."""
    cfg, run, plan = trainer.cfg, trainer.run, trainer.plan
    seconds = run.poll(gptq_seconds(trainer))
    plan.seconds = cfg.max_seconds - seconds
    if plan.seconds < cfg.max_seconds / 2:
        raise UserError(
            f"gptq = {cfg.gptq} rows would take {seconds:.1f} of max_seconds = "
            f"{cfg.max_seconds:g}, more than half: fewer rows, such as --gptq "
            f"{max(1, cfg.gptq // 4)}"
        )
    run.log(f"gptq: {plan.seconds:.1f} of {cfg.max_seconds:.0f} s are left for steps")


def rounded_weights(trainer: Trainer, step: int, now: Now):
    """Inside, under qat, weights are rounded; gradients are taken for the true ones'."""
    if not now.qat:
        return contextlib.nullcontext()
    return rounded(trainer.model, trainer.cfg, step)


def extra_terms(cfg: Config) -> list[str]:
    """Names of what is added to the cross-entropy in training."""
    names = ["z_loss"] if cfg.z_loss else []
    terms = {"prefix_loss": "prefix_token_loss"}  # as the weight is logged too
    names += [terms.get(name, f"{name}_loss") for name in later_targets(cfg)]
    named = {"mtp": cfg.mtp, "teacher_kl": cfg.distill, "mu_loss": cfg.mu_loss}
    return names + [name for name, on in named.items() if on]


def loss_terms(
    trainer: Trainer, x: Tensor, y: Tensor, now: Now, some: Tensor | None = None
) -> Tensor:
    """
    Sums over the tokens of a micro-batch: cross-entropy and, where they are on, weighted z-loss,
    losses of later tokens and MTP, and the divergence from the teacher; [1] to [6]. some: the
    classes [B, P] of each row's softmax.
    """
    cfg, later = trainer.cfg, later_targets(trainer.cfg)
    applied = now.repeats, now.window, now.passes, now.window_long
    taught = ()
    if cfg.sampled_classes != "0" and some is not None:
        rows = trainer.graph(x, y, *applied, later=bool(later), candidates_BP=some)
        rows = rows.view(-1, y.numel())
    elif not (cfg.z_loss or cfg.mtp or later or now.distill):
        return trainer.graph(x, y, *applied).sum().view(1)
    else:
        taught = trainer.teacher.activations(x) if cfg.distill and now.distill else ()
        rows = trainer.graph(x, y, *applied, bool(cfg.z_loss), bool(cfg.mtp), bool(later), *taught)
    terms = [rows[0].sum()]
    if cfg.z_loss:
        terms.append(cfg.z_loss * rows[1].square().sum())
    # Beside the graph, which so has no weight in it: they may change at every step.
    if later:
        weights = {"mtp_next": now.mtp_next, "mtp_third": now.mtp_third}
        weights["prefix_loss"] = now.prefix_loss
        for at, name in enumerate(later, 1 + bool(cfg.z_loss)):
            terms.append(weights[name] * rows[at].sum())
    if cfg.mtp:
        terms.append(cfg.mtp * rows[-1].sum())
    if taught:
        terms.append(rows[2].sum())
    return torch.stack(terms)


def next_batch(trainer: Trainer, step: int, now: Now) -> tuple[np.ndarray, np.ndarray | None]:
    """This rank's rows of a step and, with sampled_classes, each one's candidates(). Collective."""
    cfg = trainer.cfg
    sizes = (now.batch_tokens, now.seq_len, *([now.doc_cap] if cfg.bos_rows else []))
    if cfg.sampled_classes == "0" or not now.sampled_classes:
        return trainer.loader.batch(step, *sizes), None
    loader, count, classes = trainer.loader, now.sampled_classes, classes_of(cfg)
    before = loader.state_dict()
    rows = loader.batch(step, *sizes)
    most = trainer.run.most(max(len(np.unique(row[1:])) for row in rows))
    if most > count:
        loader.load_state_dict(before)  # a checkpoint of now goes on with this batch
        raise UserError(
            f"step {step}: a row has {most} different targets, more than sampled_classes = "
            f"{count}: raise it, or shorten rows with --seq_len, in another --run"
        )
    # The sweep goes on from step to step; rows of a step begin at equal distances along it.
    total, first = now.batch_tokens // now.seq_len, trainer.run.rank * len(rows)
    starts = [step * count + classes * (first + i) // total for i in range(len(rows))]
    return rows, np.stack(
        [candidates(row[1:], count, classes, start) for row, start in zip(rows, starts)]
    )


def begin_cycle(trainer: Trainer, step: int, now: Now) -> None:
    """Before the first step of each cycle but the first: noise on the weights that move."""
    plan, cycle = trainer.plan, trainer.plan.cycle_at(step)[0]
    if plan.ends_cycle(step) and (scale := plan.perturbation(cycle)):
        named = dict(trainer.model.named_parameters())
        if trainer.cfg.slow:
            named = {k: p for k, p in named.items() if not trainer.opt.frozen(k, now)}
        perturb(named, trainer.cfg.seed, cycle, scale)


def blended(terms: Tensor, share: float) -> Tensor:
    """The loss: `share` of the last term, the divergence, and the rest of the others' sum."""
    return (1 - share) * terms[:-1].sum() + share * terms[-1]


@torch.no_grad()
def add_mu_loss(
    head: nn.Parameter, weight: float, world: int, rows: int | None = None, scale: int = 1
) -> Tensor:
    """
    weight * |mu|^2 [1], mu being the mean of the head's first V rows [V, D] (all but those without
    logits), and its gradient: 2 * weight * mu / V in every row, times the scale of the others. Once
    a step on every rank, whose gradients are summed, and not in every micro-batch.
    """
    mu, grad = head[:rows].float().mean(0), head.grad[:rows]
    grad.add_((2 * scale * weight / (len(grad) * world) * mu).to(grad.dtype))
    return weight * mu.square().sum().view(1)


@torch.no_grad()
def center(head: Tensor) -> None:
    """Subtract the mean row, so that a token's logits have the mean 0, on every rank."""
    head.sub_(head.float().mean(0).to(head.dtype))


def train_step(trainer: Trainer, step: int, now: Now) -> tuple[Tensor, Tensor]:
    """
    One optimizer step; on the device: the mean cross-entropy over the global batch, and the
    gradient norm. Behind the first stand extra_terms(), which were added to it.
    """
    cfg = trainer.cfg
    if cfg.distill and now.distill:
        ready_teacher(trainer, step)
    rows, classes = next_batch(trainer, step, now)
    if cfg.cycles:  # behind the last thing that may be refused: a checkpoint has no noise yet
        begin_cycle(trainer, step, now)
    per_pass = trainer.plan.micro_rows(now, trainer.run.world)
    terms = extra_terms(cfg)
    total = torch.zeros(1 + len(terms) - ("mu_loss" in terms), device=trainer.run.device)
    count = len(rows) // per_pass
    if cfg.ema_nesterov != "0":
        trainer.opt.look_ahead(now, trainer.run.trained)
    targets = trainer.loader.targets(now.batch_tokens)
    scale = targets if cfg.loss_sum else 1  # of the gradients
    in_halves = has_meta_step(cfg)
    with rounded_weights(trainer, step, now):
        for at in range(count):
            if in_halves:
                trainer.opt.meta.before(at, count, now.meta_step)
            part = rows[at * per_pass : (at + 1) * per_pass]
            x, y = trainer.loader.tensors(part, trainer.run.device)
            # Summed over tokens and divided by the global count: ranks and micro-batches change the
            # float order alone.
            some = ()
            if cfg.sampled_classes != "0" and classes is not None:
                part = classes[at * per_pass : (at + 1) * per_pass]
                some = (to_device(part, trainer.run.device),)
            sums = loss_terms(trainer, x, y, now, *some)
            means = sums / targets
            taught = cfg.distill and now.distill
            loss = blended(means, now.distill) if taught else means.sum()
            (loss * scale).backward()
            total[: len(means)] += means.detach()
            if cfg.param_dtype != "float32" and count > 1:
                trainer.opt.collect(last=at + 1 == count)
            if in_halves:
                trainer.opt.meta.after(at, count)
    total = trainer.run.sum_of(total)
    if cfg.mu_loss:
        head, rows_used = trainer.model.head, trainer.model.logit_rows
        extra = add_mu_loss(head, cfg.mu_loss, trainer.run.world, rows_used, scale)
        total = torch.cat([total, extra])
    grad_norm = trainer.opt.step(now)
    if cfg.mu_centering and not trainer.opt.frozen("head", now):
        center(trainer.model.head[: trainer.model.logit_rows])
    return total, grad_norm


def validate_all(trainer: Trainer, step: int, now: Now) -> dict:
    """Evaluate what is trained; a line in the speedrun's format."""
    run, ms = trainer.run, trainer.run.clock.seconds() * 1000
    began, val, more = time.perf_counter(), trainer.val, {}
    shape, mask = trainer.plan.eval_shape(now), trainer.impossible if run.over else None
    averages = trainer.avg.ready() if is_averaged(trainer.cfg) and step else []  # at first: live
    for name in ["live", *averages]:
        with weights_of(trainer, name):
            tail = "" if name == "live" else f"_{name}"
            measured = evaluate(run, trainer.graph, val, shape, mask)
            if name == "live":
                loss = measured
            else:
                more[f"val_loss{tail}"] = measured
            if trainer.cfg.tokenizer and val.bytes:
                more[f"val_bpb{tail}"] = bits_per_byte(measured, val.scored, val.bytes)
            if mask is not None:
                unmasked = evaluate(run, trainer.graph, val, shape)
                more[f"val_loss{tail}_unmasked"] = unmasked
    more |= val.measure(trainer, step, shape)
    run.log(
        f"step:{step}/{trainer.cfg.steps} val_loss:{loss:.5f} train_time:{ms:.0f}ms "
        f"step_avg:{ms / max(step, 1):.2f}ms"
    )
    if more:
        run.log(f"  at:{step} " + " ".join(f"{k}:{v:.5f}" for k, v in more.items()))
    found = {"val_loss": loss, **more, "eval_time_s": time.perf_counter() - began}
    if trainer.cfg.embed_stats and math.isfinite(loss):
        found |= run.on_main(lambda: embedding_statistics(trainer, now))
    run.metric(
        "val", step, steps=trainer.cfg.steps, **found, train_time_ms=ms, wall_time_s=run.wall()
    )
    if not math.isfinite(loss):
        raise Diverged(
            f"step {step}: the validation loss is {loss} although the training loss "
            "was finite a step ago: lower the learning rates; if they are low, compare with "
            "--compile 0 and report which graph went wrong"
        )
    return found


@torch.no_grad()
def embedding_statistics(trainer: Trainer, now: Now) -> dict[str, float]:
    """
    How far the head's rows share a direction mu (their mean), and how large logits are on the first
    embed_stats tokens of validation: the signals of output-embedding centering (arXiv 2601.02031),
    named as in its tables. logs/embeddings.py has many more, of a checkpoint.
    """
    model, shape = trainer.model, trainer.plan.eval_shape(now)
    head = model.head[: model.logit_rows].double()
    size = head.mean(0).norm()
    found = {"O.mu norm": size, "O.ratio norm": size / head.norm(dim=1).mean().clamp_min(1e-300)}
    tokens, sums = (
        min(trainer.cfg.embed_stats, trainer.val.scored),
        torch.zeros(3, dtype=torch.float64),
    )
    for low in range(0, -(-tokens // shape.seq_len), shape.rows):
        x, _ = trainer.val.batch(range(low, low + shape.rows), trainer.run.device, shape.rows)
        hidden = model.hidden(x, shape.repeats, shape.window, shape.passes, shape.window_long)
        hidden = hidden.flatten(0, 1)
        for piece in hidden[: tokens - low * shape.seq_len].split(trainer.cfg.loss_chunk):
            logits = model.logits(piece)
            each = logits.mean(-1), logits.abs().amax(-1), logits.logsumexp(-1).square()
            sums += torch.stack(each).double().sum(1).cpu()
    names = "O.logits_mean_mean", "O.logits_mean_absmax", "H.mean_logsqZ"
    return {key: float(x) for key, x in (found | dict(zip(names, sums / tokens))).items()}


def moment(on_gpu: bool) -> float | torch.cuda.Event:
    """Now; of a GPU when all is done that it was told to do."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Reading:
    """
    The numbers of a step on their way to the host: whoever reads them waits for that step alone,
    however many are queued behind it.
    """

    def __init__(self, losses: Tensor, grad_norm: Tensor, begun: float | torch.cuda.Event):
        numbers = torch.cat([losses, grad_norm.view(1)])
        self.numbers = numbers.to("cpu", non_blocking=True)  # of a GPU: a copy, in pinned memory
        self.on_gpu = numbers.is_cuda
        self.begun, self.ended = begun, moment(self.on_gpu)

    def read(self) -> tuple[list[float], float]:
        """What train_step() gave, as numbers, and the seconds of the step."""
        if not self.on_gpu:
            return self.numbers.tolist(), max(1e-9, self.ended - self.begun)
        self.ended.synchronize()
        return self.numbers.tolist(), self.begun.elapsed_time(self.ended) / 1000


def told(plan: Plan, now: Now) -> dict[str, float]:
    """The schedules at a step, without those of tricks that are off for the whole run."""
    neutral = Now._field_defaults

    def moves(key: str) -> bool:
        return key in plan.sched and plan.sched[key].values() != [neutral[key]]

    return {
        k: v for k, v in now._asdict().items() if k not in neutral or v != neutral[k] or moves(k)
    }


def log_step(trainer: Trainer, step: int, now: Now, reading: Reading) -> None:
    """Read a finished step's numbers (a wait), stop if not finite, write the lines."""
    (numbers, seconds), run, cfg = reading.read(), trainer.run, trainer.cfg
    loss, grad_norm = numbers[0], numbers[-1]
    terms = dict(zip(extra_terms(cfg), numbers[1:-1]))
    if cfg.distill and now.distill:  # what was descended, beside the cross-entropy alone
        others = loss + terms.get("z_loss", 0.0) + terms.get("mtp", 0.0)
        terms["blended_loss"] = (1 - now.distill) * others + now.distill * terms["teacher_kl"]
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        good = checkpoints(run.folder) if cfg.keep or cfg.resume else []
        kept = "No checkpoint was saved before it"
        if good:
            kept = f"Last good checkpoint: {good[-1]}; it is kept"
        start = ", which may start from those weights with --init_from" if good else ""
        raise Diverged(
            f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, stopped (lr "
            f"multiplier {now.lr:.4g}, repeats {now.repeats}). {kept}. Lower the learning rates or "
            f"set --grad_clip 1 in another --run{start}"
        )
    log_switch(trainer, step, now, seconds)
    if step % cfg.log_every == 0 or step == cfg.steps:
        elapsed = run.clock.seconds()
        run.log(
            f"step:{step}/{cfg.steps} train_time:{elapsed * 1000:.0f}ms "
            f"step_avg:{elapsed * 1000 / step:.2f}ms",
            console=False,
        )
        run.metric(
            "train",
            step,
            train_loss=loss,
            **terms,
            grad_norm=grad_norm,
            tok_s=now.batch_tokens / seconds,
            **told(trainer.plan, now),
            train_time_ms=elapsed * 1000,
        )
        fraction = trainer.plan.fraction(step, elapsed)
        eta = elapsed * (1 - fraction) / max(fraction, 1e-9)
        more = "".join(f"{k}:{v:.4g} " for k, v in terms.items())
        run.live(
            f"step:{step}/{cfg.steps} train_loss:{loss:.4f} {more}lr:{now.lr:.3g} "
            f"{now.batch_tokens / seconds:,.0f} tok/s {100 * fraction:.1f}% "
            f"eta:{int(eta // 60)}m{int(eta % 60):02d}s"
        )


def log_switch(trainer: Trainer, step: int, now: Now, seconds: float) -> None:
    """Where the graph changed a step ago: times before, at and after. A stall shows."""
    trainer.paces = [*trainer.paces[-2:], (now, seconds)]
    if len(trainer.paces) == 3:
        (old, before), (new, at), (_, after) = trainer.paces
        changed = " ".join(
            f"{k}:{getattr(new, k)}" for k in GRAPHS if getattr(new, k) != getattr(old, k)
        )
        if changed:
            ms = f"before:{1000 * before:.0f}ms at:{1000 * at:.0f}ms after:{1000 * after:.0f}ms"
            trainer.run.log(f"switch:{step - 1} {changed} {ms}")


def graph_of(now: Now) -> list[int]:
    """What decides which graph a step runs."""
    return [getattr(now, key) for key in GRAPHS]


def next_step_seconds(paces: list[tuple[list, float]], graph: list) -> float:
    """
    What the next step may take, from the last ones of its graph (where there are none, of any): the
    second slowest and a tenth. One step that was stopped for a while must not end the run, nor one
    that was quick carry it over its cap.
    """
    seconds = sorted([s for g, s in paces if g == graph] or [s for _, s in paces])
    return 1.1 * seconds[max(0, len(seconds) - 2)] if seconds else 0.0


def is_over(trainer: Trainer, step: int, now: Now, seconds: float) -> bool:
    """Whether no step is begun behind `step`, at these seconds of the clock."""
    cfg, run, plan = trainer.cfg, trainer.run, trainer.plan
    over = run.over or step >= cfg.steps
    if over or not cfg.max_seconds:
        return over
    # A clock cap is a cap: no step is begun that would end behind it. The clocks that all ranks
    # agreed on decide, or one rank would leave alone.
    busy = 2 if run.device.type == "cuda" else 1  # with the step before, perhaps
    took = busy * next_step_seconds(run.paces, graph_of(now))
    if seconds + took > plan.seconds:
        return True
    # When the data of a capped run ends, nobody could know before: it ends training as a cap does.
    ended = trainer.loader.ended(now.batch_tokens)
    if ended:
        run.log(
            f"notice: the data ended at step {step}, after {seconds:.1f} of {plan.seconds:.1f} s, "
            "and with it training, before the schedules did; more shards or more --epochs would "
            "have used the rest"
        )
    return ended


class Due(NamedTuple):
    """What is to be done behind a step while the clock stands still."""

    save: bool
    keep: bool  # the weights of the end of an epoch
    evaluate: bool
    snapshot: bool = False  # of the end of a cycle


def due(plan: Plan, step: int, last: bool) -> Due:
    cfg, epoch_ends = plan.cfg, plan.ends_epoch(step)
    by_count = cfg.save_every > 0 and step > 0 and step % cfg.save_every == 0
    save = cfg.keep > 0 and (by_count or cfg.save_last > 0 and last)
    first = cfg.epochs - cfg.average_epochs  # epochs before those whose weights are kept
    keep = cfg.average_epochs > 0 and epoch_ends and step * cfg.epochs // cfg.steps > first
    snapshot = plan.ends_cycle(step) if cfg.cycles else False
    if cfg.eval_every < 0:
        measured = (snapshot if cfg.cycles else epoch_ends) or step == 0
    else:
        measured = cfg.eval_every > 0 and step % cfg.eval_every == 0
    return Due(save, keep, measured or last, snapshot)


def pause(trainer: Trainer, step: int, now: Now, todo: Due) -> dict:
    """Do what is due, the clock standing still; gives what an evaluation found."""
    with trainer.run.clock.paused():
        if todo.save:  # before evaluating: what crashes there must not cost the checkpoint
            save_checkpoint(trainer, step)
        if todo.keep:
            keep_epoch(trainer, step)
        if trainer.cfg.cycles and todo.snapshot:
            keep_snapshot(trainer, step)
        return validate_all(trainer, step, trainer.run.trained or now) if todo.evaluate else {}


def train_loop(trainer: Trainer, step: int) -> tuple[int, Now, dict]:
    """
    From `step` to the end of training; gives the last step, its schedules and its evaluation. The
    state is whole wherever a signal can raise Interrupted.
    """
    run, plan = trainer.run, trainer.plan
    before = None  # what the last look at the clock said
    unlogged = []  # finished steps without line

    def log_all_but(count: int) -> None:
        while len(unlogged) > count:
            log_step(trainer, *unlogged.pop(0))

    run.step = step
    run.clock.start()
    while True:
        try:
            seconds = run.poll(run.clock.seconds())
        except Interrupted:
            log_all_but(0)  # which raises, before anything is saved, if a step was not finite
            raise
        now = plan.at(step, plan.fraction(step, seconds))
        if before and trainer.cfg.max_seconds:
            run.paces = [*run.paces[-19:], (before[0], seconds - before[1])]
        before = graph_of(now), seconds
        run.over = is_over(trainer, step, now, seconds)
        if run.over and is_averaged(trainer.cfg):
            trainer.avg.close()
        if any(todo := due(plan, step, run.over)):
            log_all_but(0)
            found = pause(trainer, step, now, todo)
        if run.over:
            break
        try:
            begun = moment(run.device.type == "cuda")
            told = train_step(trainer, step, now)
        except (UserError, Interrupted):  # the loader may be asked to leave while it makes rows
            log_all_but(0)
            raise
        step += 1
        run.step, run.trained = step, now
        if not is_constant(trainer.cfg.batch_tokens):
            run.tokens += now.batch_tokens
        if is_averaged(trainer.cfg):
            trainer.avg.update(step, plan.fraction(step, seconds))
        unlogged.append((step, now, Reading(*told, begun)))
        # One step late: a GPU is not kept waiting for the host to read a number.
        log_all_but(0 if run.device.type == "cpu" else 1)
    run.clock.stop()
    return step, run.trained or now, found


@contextlib.contextmanager
def trained_is_kept(trainer: Trainer, begun: int):
    """A refusal inside, on all ranks and no divergence, costs no step: all are saved first."""
    run = trainer.run
    try:
        yield
    except Diverged:
        raise
    except UserError as e:
        if not run.cfg.keep or run.step == begun:
            raise
        run.clock.stop()
        saved = save_checkpoint(trainer, run.step)
        raise UserError(
            f"{e}; all {run.step} steps are saved in {saved}, from where --resume continues, and "
            "--init_from takes their weights into another --run"
        ) from e


def finish(trainer: Trainer, step: int, now: Now, found: dict) -> dict:
    """
    After the last step, its schedules and its evaluation `found`: write the artifact and evaluate
    what is read back. Scores, proofs and samples are logs/score.py's.
    """
    cfg, run, plan = trainer.cfg, trainer.run, trainer.plan
    end = plan.at(cfg.steps, 1.0)  # as all who read the artifact apply it
    different = [key for key in APPLIED if getattr(now, key) != getattr(end, key)]
    if cfg.max_seconds and different:
        ended, meant = (
            ", ".join(f"{key} {getattr(n, key)}" for key in different) for n in (now, end)
        )
        run.log(
            f"notice: the clock ended training at {ended}, and the evaluation is of these; "
            f"artifact and sample are of the schedules' end, {meant}"
        )
    result = dict(found)
    if cfg.final_weights != "live":
        kind = cfg.final_weights
        own = {"val_loss": f"val_loss_{kind}", "val_bpb": f"val_bpb_{kind}"}
        own["val_loss_unmasked"] = f"val_loss_{kind}_unmasked"
        result |= {key: found[name] for key, name in own.items() if key in found}
    if cfg.export:
        with weights_kept(trainer.opt.buckets), weights_of(trainer, cfg.final_weights):
            result |= {k: v for k, v in export_artifact(trainer).items() if v is not None}
    return result


GO_ON = ", continue it with --resume"  # as one of the things to do about a run that was begun


def taken(cfg: Config, folder: Path) -> UserError:
    return UserError(
        f"run = {cfg.run!r}: {folder} exists; choose another --run{GO_ON}, or delete the folder"
    )


def check_folder(cfg: Config, folder: Path) -> None:
    """Refuse a name that is taken. Where changes() are found, a run is not gone on with."""
    if not folder.exists():
        return
    if not cfg.resume:
        raise taken(cfg, folder)
    # else what is done behind the last step may still be done otherwise
    finished = is_finished(folder)
    frozen = {"export"} if Schedule("qat", cfg.qat).values() != [0] else set()
    free = FREE_ON_RESUME if finished else FREE_ON_RESUME | AFTER_TRAINING - frozen
    if changed := changed_fields(cfg, folder, free):
        state = "is finished, but" if finished else "was begun, but"
        raise UserError(
            f"{folder} {state} under another configuration:\n"
            + "\n".join(changed)
            + "\nuse the old values, another --run, or delete it"
        )


def is_finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


def saved_config(folder: Path) -> Path | None:
    """Where a run's configuration stands; None where it has none, as it did nothing yet."""
    found = [path / "config.toml" for path in (folder, *reversed(checkpoints(folder)))]
    saved = next((path for path in found if path.exists()), None)
    require(
        saved is not None or not is_finished(folder),
        f"{folder} has no config.toml, so nobody can say what its result is of; choose another "
        "--run, or delete the folder",
    )
    return saved


def changes(cfg: Config, folder: Path) -> dict[str, tuple]:
    """Each field that a run folder's configuration has another value of: that, and the one now."""
    saved = saved_config(folder)
    old = type(cfg)(**read_toml(saved, type(cfg))) if saved else cfg
    both = {f.name: (getattr(old, f.name), getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def changed_fields(cfg: Config, folder: Path, free: set[str]) -> list[str]:
    """changes() of fields that are not free: a line each, and how many more than 20 there are."""
    changed = changes(cfg, folder).items()
    lines = [f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changed if key not in free]
    return lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else [])


def enter_folder(run: Run) -> bool:
    """Lock what can be gone on with. Whether the run is finished."""
    finished = is_finished(run.folder)
    if finished:
        refuse_exchanged(run)
        renew_tables(run)
    elif run.folder.exists():
        run.lock_folder()
    return finished


def refuse_exchanged(run: Run) -> None:
    """Of a finished run whose shards were exchanged since, as far as its last checkpoint knows."""
    newest = newest_checkpoint(run.folder)
    state = read_state(newest) if newest else {}
    if "train" in state.get("data", {}):  # others make their data themselves
        if all(shard_files(run.cfg.data, split) for split in ("train", "val")):  # not gone
            accepted(run.cfg, state["data"], data_marks(run.cfg), state["loader"])


def renew_tables(run: Run) -> None:
    """Of a finished run, [rule] and [score] are what is asked for now, for those who read them."""
    kept = type(run.cfg)(**read_toml(saved_config(run.folder), type(run.cfg)))
    tables = {name: getattr(run.cfg, name) for name in TABLES}
    if any(getattr(kept, name) != table for name, table in tables.items()):
        new = dataclasses.replace(kept, config=run.cfg.config, **tables)
        write_config(run.folder, new)
        with open(run.folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"[rule] and [score] were renewed:\n{config_toml(new)}{'=' * 100}\n")


def renew_end(cfg: Config, folder: Path) -> None:
    """
    A run may be ended in another way than it was begun for. Of the old one nothing is left then for
    those who take weights from the folder: no artifact, and a checkpoint names the new one.
    """
    if AFTER_TRAINING & changes(cfg, folder).keys():
        (folder / "model.nrx").unlink(missing_ok=True)
        for path in checkpoints(folder):
            write_whole(path / "config.toml", config_toml(cfg).encode())


def write_config(folder: Path, cfg: Config) -> None:
    text = f"# presets: {' '.join(cfg.config)}\n{config_toml(cfg)}"
    write_whole(folder / "config.toml", text.encode(errors="backslashreplace"))


def prepare_folder(run: Run) -> None:
    """Create the run's folder. With enter_folder() it is taken over."""
    cfg, folder = run.cfg, run.folder
    try:
        folder.mkdir(parents=True, exist_ok=cfg.resume)
        run.lock_folder()
        if cfg.resume:  # again, for another start may have been here meanwhile
            check_folder(cfg, folder)
            renew_end(cfg, folder)
        write_config(folder, cfg)
    except FileExistsError as e:
        raise taken(cfg, folder) from e
    except FileNotFoundError as e:  # so /proc and the like say that nothing can be made in them
        raise UserError(
            f"cannot create {folder} ({e}); choose another folder with --log_dir"
        ) from e


def ingredients(trainer: Trainer) -> dict:
    """What must be the same on every node, but for the places of its files."""
    places = set("config data log_dir tokenizer init_from teacher nca_cache nca_threads".split())
    sources = b"".join(path.read_bytes() for path in source_files(trainer.cfg))
    data = json.dumps(
        trainer.loader.identity(), sort_keys=True
    ).encode()  # no rank reads all shards here
    return {
        **{k: v for k, v in dataclasses.asdict(trainer.cfg).items() if k not in places},
        "sources": hashlib.sha256(sources).hexdigest(),
        "data": hashlib.sha256(data).hexdigest(),
    }


def begin_log(run: Run, step: int | None) -> None:
    """Open the log and begin it. step: at which the run goes on."""
    run.open_log((-1 if step is None else step) if run.cfg.resume else None)
    log_head(run, with_sources=step is None)
    for line in run.early:
        run.log(line, console=False)
    run.log(f"log: {run.folder / 'log.txt'}")


def log_head(run: Run, with_sources: bool) -> None:
    """Sources, environment and configuration, so that a log is a complete witness."""
    for path in source_files(run.cfg) if with_sources else ():
        with tokenize.open(path) as source:  # a packed one is not UTF-8
            run.log(source.read(), console=False)
    run.log("=" * 100, console=False)
    for line in environment(run):
        run.log(line, console=False)
    run.log(config_toml(run.cfg) + "=" * 100, console=False)


def train(cfg: Config, run: Run, build=build) -> int:
    """A whole run, from folder to result.json; the exit code. `build` makes its parts."""
    run.on_main(lambda: check_folder(cfg, run.folder))
    if cfg.resume and run.on_main(lambda: enter_folder(run)):
        run.log(f"{run.folder} is finished: nothing to resume")
        return 0
    trainer = build(cfg, run)  # what cannot work is refused here, before a folder is made
    run.require_the_same(lambda: ingredients(trainer))
    run.on_main(lambda: prepare_folder(run))
    start = run.on_main(lambda: newest_checkpoint(run.folder)) if cfg.resume else None
    run.resumed = start is not None
    run.on_main(lambda: begin_log(run, int(start.name) if start else None))
    step = load_checkpoint(start, trainer) if start else 0
    run.step = step
    if start:
        run.log(f"resumed:{start} at step {step}")
    size = sum(q.numel() for q in trainer.model.parameters())
    run.log(
        f"model_params:{size} ranks:{run.world} device:{run.device} dtype:{run.dtype} "
        f"val_tokens:{trainer.val.scored}"
    )
    if cfg.keep:
        run.on_main(trainer.loader.identity)  # of the data as it is now, for the checkpoints
    try:
        warm_up(trainer)
        before = graphs_compiled()
        with trained_is_kept(trainer, step):
            step, now, found = train_loop(trainer, step)
            log_recompiles(run, before)
            result = finish(trainer, step, now, found)
    except Interrupted:
        run.clock.stop()
        saved = save_checkpoint(trainer, run.step) if cfg.keep else None
        run.log(
            f"interrupted by {signal.Signals(run.signal).name}: "
            + (f"saved {saved}; continue with --resume" if cfg.keep else "nothing of it is kept")
        )
        return 128 + run.signal
    write_result(trainer, result, step, size)
    run.complete = True
    return 0


def write_result(trainer: Trainer, result: dict, step: int, size: int) -> None:
    cfg, run = trainer.cfg, trainer.run
    if run.device.type == "cuda":
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak = held = peak_memory()
    run.log(f"peak memory allocated: {peak // 2**20} MiB reserved: {held // 2**20} MiB")
    seconds = run.clock.seconds()
    out = {
        "run": cfg.run,
        "seed": cfg.seed,
        "preset": "+".join(Path(c).stem for c in cfg.config),
        "arm": cfg.arm,
        "params": size,
        "steps": step,
        "tokens": tokens_seen(trainer, step),
        **result,
        "train_time_s": seconds,
        "wall_time_s": run.wall(),
        "world_size": run.world,
        "device": device_name(run),
        "torch": torch.__version__,
        **evidence(trainer),
        "resumed": run.resumed,
        "peak_memory_bytes": peak,
    }
    bits = " ".join(f"{k}:{v:.8f}" for k, v in result.items() if k.endswith("bpb"))
    run.log(
        f"final: val_loss:{result['val_loss']:.8f} {bits} train_time:{seconds:.3f}s "
        f"wall_time:{run.wall():.1f}s"
    )
    text = json.dumps(out, indent=1) + "\n"
    run.on_main(lambda: write_whole(run.folder / "result.json", text.encode()))
    if run.wandb:
        run.wandb.summary.update(out)


def evidence(trainer: Trainer) -> dict[str, str]:
    """Which source, data and configuration a result is of."""
    found = {"git": git_revision()}
    if trainer.run.is_main:
        try:
            found["data_sha256"] = trainer.loader.fingerprint()
        except UserError as e:  # the data is gone, the run is not
            trainer.run.log(f"notice: no data_sha256: {e}")
    return found | {"config_sha256": config_hash(trainer.cfg)}


def peak_memory() -> int:
    """Bytes that this process has held at most; 0 where nobody counts them."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tokens_seen(trainer: Trainer, step: int) -> int:
    if is_constant(trainer.cfg.batch_tokens):
        return step * largest(trainer.cfg.batch_tokens)
    return trainer.run.tokens


def device_name(run: Run) -> str:
    if run.device.type == "cuda":
        return torch.cuda.get_device_name(run.device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def explain(e: BaseException) -> str | None:
    """What a person can do about errors that are not bugs; None for those that are."""
    text = str(e)
    if isinstance(e, UserError):
        return text
    lost = "(closed|reset) by peer|remote process exited"
    if isinstance(e, RuntimeError) and re.search(lost, text):
        return (
            "another rank has left, so this one leaves, too: its message stands above, or on its "
            f"node. ({text.splitlines()[0][:200]})"
        )
    if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            "out of memory: halve --micro_tokens or --loss_chunk; the result stays the same but "
            f"for rounding. ({text.splitlines()[0]})"
        )
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({e}); make room for the run{GO_ON}"
    if isinstance(e, OSError) and e.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
    ):
        return f"this may not be read or written ({e}); --log_dir says where runs go"
    # a file that is none, is gone, is a folder, has too long a name, ...
    if isinstance(e, OSError) and e.filename:
        return text
    return None


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        cfg = parse_args(sys.argv[1:] if argv is None else argv)
        with Run(cfg) as run:
            return train(cfg, run)

    return exit_code(work)


def exit_code(work: Callable[[], int]) -> int:
    """That of work(); 2 behind a line about what a person can mend, 130 behind Ctrl-C."""
    try:
        return work()
    except BrokenPipeError:  # of --help
        say_nothing()
        return 0
    except (UserError, RuntimeError, OSError) as e:
        message = explain(e)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
