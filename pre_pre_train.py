"""Pre-pre-training: a GPT learns the trajectories of random neural cellular automata (NCA) before
it sees any text.

    python pre_pre_train.py --like tiny_cpu --run nca       # a model like that preset's
    python train_gpt.py --config tiny_cpu --init_from logs/nca --transfer attn
    python pre_pre_train.py --generate_only                 # make rules and tokens, say how fast
    python pre_pre_train.py --generate_only --json          # the same as one JSON object
    python pre_pre_train.py --generate_only --nca_compat paper    # the paper's choices
    python pre_pre_train.py --picture nca.png               # accepted and rejected rules

A rule is a tiny random convolution that maps a 12x12 grid of 10 colours to the next one. A row of
training data shows one rule's grids one after another, each cut into patches that are one token
each; predicting the next token means finding the rule in the context. Model, optimizer, loop, log
and checkpoints are train_gpt.py's. After the paper's code (danihyunlee/nca-pre-pretraining) and its
port to the slowrun (qlabs-eng/slowrun, pull request 63); the two differ in a dozen choices, each a
flag here: see COMPAT.

Read it from top to bottom:
    Config       flags; the two published sets of choices; what cannot work
    Streams      random numbers by counter: they depend on what for, never on what was drawn before
    Rules        weights of many rules at once
    Simulation   many rules at once, fast, and exactly what the definition in float64 says
    Tokens       grids to tokens, inputs and labels, next-grid accuracy
    Filter       keep rules whose trajectories compress neither too well nor too badly
    Cache        files that are whole, verified, and named by a hash of what made them
    Data         rows of an epoch: the same for any number of ranks, threads and any batch
    Train        rows as train_gpt's loop wants them, the evaluation on held-out rules
    Picture      what rules look like
    Main         the command line

Letters: R rows (one automaton each), N rules, C = grid*grid cells, d colours, W tokens of a row, L
inputs of a row. Nothing happens at import.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from scipy.special import ndtr, ndtri
from tqdm import tqdm

import train_gpt as tg
from train_gpt import Config, UserError

########################################
#                Config                #
########################################


@dataclass
class NcaConfig(tg.Section):
    """Rules, their grids and their rows."""

    # presets of the language run (or its config.toml): the model is theirs (pr63: see LIKE_PR63)
    like: tuple[str, ...] = ()
    # whose choices the flags below start from: pr63 (slowrun pull request 63) or paper
    nca_compat: str = "pr63"
    # seeds rules and start grids; `seed` is for weights, so that arms and seeds share their data
    nca_seed: int = 0
    nca_grid: int = 12  # cells along one side of the grid, which is a torus
    nca_patch: int = 2  # cells along one side of the patch that is one token
    nca_colors: int = 10  # states of a cell
    nca_dt: int = 1  # steps of the automaton from one recorded grid to the next
    nca_init_steps: int = 10  # steps before recording
    nca_temperature: float = 1e-4  # of the choice of a cell's next colour; 0: always the likeliest
    nca_identity: float = 0.0  # added to the logit of the colour that the cell has
    nca_rule_init: str = "normal"  # a rule's weights: normal, or lecun (fan-in, colours padded)
    # start grids: uniform, or skewed (colour frequencies drawn per grid)
    nca_start: str = "uniform"
    nca_record: str = "after"  # first recorded grid: after nca_dt steps more, or before them
    nca_seq_len: int = 1024  # tokens of a row, at most
    # last grid of a row: whole (the row ends with it) or cut (the row is full)
    nca_last: str = "whole"
    nca_min_grid: int = 1  # first grids of a row that are context only
    nca_delimiter_loss: int = 0  # 1: the tokens around a grid are predicted too
    # which rollout is compressed to judge a rule: pr63, paper, or none (all rules pass)
    nca_filter: str = "pr63"
    # accepted gzip size over raw size (int32 tokens; noise reaches 0.67), low:high or low:
    nca_band: str = "0.5:1"
    # the search for rules gives up when fewer than one candidate in so many passes
    nca_tries: int = 100
    nca_sims_per_rule: int = 10  # rows of an epoch that share a rule
    nca_tokens: int = 50_000_000  # training tokens of an epoch
    nca_val_tokens: int = 16_000_000  # validation tokens, of other rules
    nca_epochs: int = 6  # passes
    # 1: new start grids every epoch, of the same rules; 0: the same rows in another order
    nca_regen: int = 1
    nca_vocab: int = 0  # rows of embedding and head; 0: as many as there are tokens
    # what is wrong on purpose: random (cells), shuffled (order of grids), still (no change)
    nca_control: str = ""
    nca_cache: str = "data/nca"  # folder where rules and rows are kept; empty: nowhere
    nca_threads: int = 0  # threads that generate; 0: the cores of this machine over its ranks
    # validation rows, each of another rule where there are so many, for next-grid accuracy
    nca_measured: int = 64
    # generate rules, epoch 0 and validation rows, report speed and hash, then leave
    generate_only: bool = False
    json: bool = False  # with generate_only: print one JSON object
    picture: str = ""  # with generate_only, or alone: draw rules into this PNG file

    LIMITS = tg.limits(
        (0, 1, "nca_delimiter_loss nca_regen"),
        (0, 4096, "nca_threads"),
        (0, 65536, "nca_vocab nca_colors"),
        (0, 10**6, "nca_init_steps nca_temperature"),
        (0, 2**32 - 1, "nca_seed"),
        (1, 128, "nca_patch"),
        (1, 1024, "nca_grid"),
        (1, 10**6, "nca_dt nca_epochs"),
        (1, 2**22, "nca_seq_len nca_min_grid"),
        (1, 10**9, "nca_tries nca_sims_per_rule nca_measured"),
        (1, 10**12, "nca_tokens nca_val_tokens"),
        (-(10**6), 10**6, "nca_identity"),
    )
    CHOICES = {
        "nca_compat": ("pr63", "paper"),
        "nca_rule_init": ("normal", "lecun"),
        "nca_start": ("uniform", "skewed"),
        "nca_record": ("after", "before"),
        "nca_last": ("whole", "cut"),
        "nca_filter": ("pr63", "paper", "none"),
        "nca_control": ("", "random", "shuffled", "still"),
    }

    def check(self) -> None:
        tg.check_choices(self, self.CHOICES)
        tg.check_numbers(self, self.LIMITS)
        check_patches(self)
        check_rows(self)
        band(self)
        tg.require(
            self.generate_only or not self.json,
            "json = True is about what --generate_only prints: give that as well, or leave --json "
            "out (a run's numbers are in its result.json)",
        )


@dataclass
class PrePreConfig(NcaConfig, Config):
    """The trainer's flags with those of the automata behind them."""


# What follows from other flags here, and from which.
FOLLOWS = {
    "vocab": "nca_colors, nca_patch and nca_vocab",
    "seq_len": "nca_seq_len, nca_grid and nca_last",
    "eval_seq_len": "nca_seq_len, nca_grid and nca_last",
    "val_tokens": "nca_val_tokens",
    "epochs": "nca_epochs",
    "steps": "nca_epochs, nca_tokens and batch_tokens",
}
# What is about text, an artifact of it, samples or a leaderboard, and so does nothing here; with
# the value that it has.
TEXT = {"data": "", "tokenizer": "", "doc_token": 0, "doc_mask": 0, "train_tokens": 0, "shuffle": 0}
IDLE = {
    name: tg.FIELDS[name].default
    for name in (
        *("track", "average_epochs", "export", "export_codec", "artifact_limit", "gptq", "qat"),
        *("qat_noise", "cycles", "cycle_lr", "cycle_decay", "perturb", "distill", "distill_from"),
        *("distill_temperature", "teacher", "fitness_tokens", "prefix_loss"),
        *("bos_rows", "doc_cap", "sampled_classes", "canonical_mask"),
    )
}
IDLE |= TEXT | {"export": ""}
# Differences between the two sources, and what they were trained with. Presets and flags win over
# these.
COMPAT = {
    "pr63": {
        "nca_rule_init": "normal",
        "nca_start": "uniform",
        "nca_record": "after",
        "nca_last": "whole",
        "nca_delimiter_loss": 0,
        "nca_filter": "pr63",
        "nca_band": "0.5:1",
        "nca_sims_per_rule": 10,
        "nca_vocab": 0,
        # 5,061 rules; 300 M tokens
        "nca_tokens": 50_000_000,
        "nca_val_tokens": 16_000_000,
        "nca_epochs": 6,
        "eval_every": 790,
        # (s+1)/237 in its 4,740 steps: the first update already moves, as its log's lr of 2.53e-06
        # at step 1 says
        "batch_tokens": "63232",
        "optimizer": "adamw",
        "lr": "0:1/237 236/4740>1 0.85:1 1>0",
        "beta1": 0.9,
        "beta2": 0.95,
        "adam_eps": 1e-8,
        "adamw_lr": 6e-4,
        "embed_lr": 6e-4,
        "head_lr": 6e-4,
        "scalar_lr": 6e-4,
        "matrix_wd": 0.3,
        "embed_wd": 0.3,
        "scalar_wd": 0.3,
    },
    "paper": {
        "nca_rule_init": "lecun",
        "nca_start": "skewed",
        "nca_record": "before",
        "nca_last": "cut",
        "nca_delimiter_loss": 1,
        "nca_filter": "paper",
        "nca_band": "0.5:",
        "nca_sims_per_rule": 1,
        "nca_vocab": 64000,
        # 16,000 rules; 164 M tokens
        "nca_tokens": 16_384_000,
        "nca_val_tokens": 3_276_800,
        "nca_epochs": 10,
        "eval_every": 500,
        # Its checkpoint is taken at epoch 10 of 100, exactly where the warm-up ends.
        "batch_tokens": "32768",
        "optimizer": "adamw",
        "lr": "0:0 1>1",
        "beta1": 0.9,
        "beta2": 0.999,
        "adam_eps": 1e-8,
        "adamw_lr": 1e-4,
        "embed_lr": 1e-4,
        "head_lr": 1e-4,
        "scalar_lr": 1e-4,
        "matrix_wd": 0.0,
        "embed_wd": 0.0,
        "scalar_wd": 0.0,
    },
}


# What makes the model; what documents mean is no part of it, nor losses that are about text.
MODEL = {f.name for f in dataclasses.fields(tg.ModelConfig)}
MODEL -= {"doc_mask", "prefix_loss", "sampled_classes"}


# The pull request's model was the language run's without what regularises that run, its projections
# began at zero, and short windows were half a row.
LIKE_PR63 = {"mtp": 0.0, "stoch_depth": 0.0, "iha": 0, "proj_init": 0.0}
LIKE_PR63 |= {"mtp_next": "0", "mtp_third": "0", "window_long": "0", "yarn": 0, "passes": "1"}


def like_pr63(model: dict, seq_len: int) -> dict:
    """The model of a language run as the pull request pre-pre-trained it. Replays are left out too,
    but where parameters belong to positions: those of another number of repeats would fit none of
    the language run's.
    """
    cfg = Config(**model)
    if cfg.window_pattern and cfg.window != "0":
        model = model | {"window": str(seq_len // 2 + 1)}
    by_place = cfg.loop_embed, cfg.value_embeds, cfg.second_embed, cfg.cross_repeat, cfg.unet == 1
    if not any(by_place):
        model = model | {"repeats": "1"}
    return model | LIKE_PR63


def refuse_idle(values: dict, where: str = "") -> None:
    """UserError where a field is given that follows from others here, or that does nothing here."""
    for key, value in values.items():
        if key in FOLLOWS:
            raise UserError(
                f"{where}{key} = {value!r}: in pre-pre-training it follows from {FOLLOWS[key]}: "
                "give those instead"
            )
        if key in IDLE and str(value) != str(IDLE[key]) or key in tg.TABLES and value:
            raise UserError(
                f"{where}{key} = {value!r}: does nothing in pre-pre-training, which knows no text, "
                "no artifact and no leaderboard: leave it out (of a language run's preset --like "
                "takes the model alone)"
            )


def given_flags(argv: list[str]) -> dict[str, str]:
    """The fields that a command line names, with the first word of what it says of each."""
    given = {}
    for word, after in zip(argv, [*argv[1:], "--"]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            name = flag.removeprefix("--").replace("-", "_")
            given[name] = value if equals else "" if after.startswith("--") else after
    return given


@dataclass
class Flags(PrePreConfig):
    """PrePreConfig as --help shows it: without the flags that are refused."""

    __annotations__ = {
        f.name: Annotated[f.type, tyro.conf.Suppress]
        for f in tg.FIELDS.values()
        if f.name in FOLLOWS or f.name in IDLE
    }


def read_preset(name: str) -> dict:
    """Values of a preset. What follows from others follows anew where the preset is the resolved
    configuration of a run, which holds every field.
    """
    path = tg.preset_path(name)
    values = tg.read_toml(path, PrePreConfig)
    if FOLLOWS.keys() | IDLE.keys() <= values.keys():
        values = {k: v for k, v in values.items() if k not in FOLLOWS}
    refuse_idle(values, f"{path}: ")
    return values


def make_config(**values) -> PrePreConfig:
    """A checked configuration in Python: nca_compat's choices, and over them the given values."""
    refuse_idle(values)
    compat = values.get("nca_compat", PrePreConfig.nca_compat)
    cfg = PrePreConfig(**({"run": "nca"} | compat_values(compat) | values))
    validate(cfg)
    return cfg


def compat_values(compat: str) -> dict:
    if compat not in COMPAT:
        raise UserError(
            f"nca_compat = {compat!r}: must be one of {', '.join(repr(c) for c in COMPAT)}"
        )
    return IDLE | COMPAT[compat] | {"nca_compat": compat}


def parse_args(argv: list[str]) -> PrePreConfig:
    """Defaults < choices of nca_compat < model of `like` < presets from left to right < flags."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="*", action="extend", default=[])
    early.add_argument("--like", nargs="*", action="extend", default=[])
    early.add_argument("--nca_compat", "--nca-compat")
    early.add_argument("--nca_seq_len", "--nca-seq-len")
    refuse_idle({k: v for k, v in given_flags(argv).items() if k in FOLLOWS.keys() | IDLE.keys()})
    given = early.parse_known_args(argv)[0]
    presets: dict = {}
    for name in given.config:
        presets |= read_preset(name)
    presets.pop("config", None)
    model: dict = {}
    for name in given.like or presets.get("like", ()):
        model |= tg.read_toml(tg.preset_path(name))
    model = {k: v for k, v in model.items() if k in MODEL}
    compat = given.nca_compat or presets.get("nca_compat", PrePreConfig.nca_compat)
    if model and compat == "pr63":
        seq_len = given.nca_seq_len or ""  # what is no number is refused below
        model = like_pr63(
            model,
            int(seq_len)
            if seq_len.isdecimal()
            else presets.get("nca_seq_len", PrePreConfig.nca_seq_len),
        )
    merged = compat_values(compat) | model | presets
    cfg = tyro.cli(
        Flags,
        args=argv,
        default=PrePreConfig(**merged),
        use_underscores=True,
        description=__doc__.split("Read it")[0],
    )
    cfg = PrePreConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)})
    cfg.config = tuple(given.config)
    cfg.run = cfg.run or "-".join([Path(n).stem for n in given.config] or ["nca"]) + f"-s{cfg.seed}"
    validate(cfg)
    return cfg


def derive(cfg: PrePreConfig) -> None:
    """What follows from the data: vocabulary, length of a row, number of steps."""
    cfg.vocab = cfg.nca_vocab or vocabulary(cfg)
    cfg.seq_len, cfg.eval_seq_len = str(row_inputs(cfg)), 0
    cfg.val_tokens, cfg.epochs = cfg.nca_val_tokens, cfg.nca_epochs
    rows = int(max(tg.Schedule("batch_tokens", cfg.batch_tokens).values())) // row_inputs(cfg)
    cfg.steps = max(1, cfg.nca_epochs * (row_count(cfg, "train") // max(1, rows)))


def validate(cfg: PrePreConfig) -> None:
    """Refuse what cannot work: each message names the key, the value and the fix."""
    NcaConfig.check(cfg)
    tg.require(
        cfg.param_dtype == "float32",
        f"param_dtype = {cfg.param_dtype!r}: an embedding in bfloat16 cannot move by steps as "
        "small as these (the pull request's did not): pre-pre-training keeps float32 masters",
    )
    tg.require(
        len(tg.Schedule("batch_tokens", cfg.batch_tokens).points) == 1,
        f"batch_tokens = {cfg.batch_tokens!r}: the steps of an epoch are counted in batches of one "
        "size: give one number",
    )
    derive(cfg)
    tg.validate(cfg)


def check_patches(cfg: PrePreConfig) -> None:
    """Grids can be cut into patches, and there are few enough of these to be tokens."""
    grid, patch, colors = cfg.nca_grid, cfg.nca_patch, cfg.nca_colors
    below = grid - grid % patch
    near = f"{below} or {below + patch}" if below else f"{patch}"
    tg.require(
        grid % patch == 0,
        f"nca_grid = {grid} cannot be cut into patches of nca_patch = {patch} cells: choose "
        f"--nca_grid {near}",
    )
    tg.require(2 <= colors <= 16, f"nca_colors = {colors}: 2 to 16 colours are possible")
    possible = [p for p in range(1, 5) if colors ** (p * p) + 2 <= 65536 and grid % p == 0]
    # told as a power: the number itself may have more digits than Python prints
    tg.require(
        patch < 5 and vocabulary(cfg) <= 65536,
        f"nca_colors = {colors} and nca_patch = {patch} make {colors}^{patch**2} tokens, but rows "
        f"hold uint16: choose fewer colours or --nca_patch {max(possible, default=1)}",
    )
    tg.require(
        cfg.nca_vocab == 0 or cfg.nca_vocab >= vocabulary(cfg),
        f"nca_vocab = {cfg.nca_vocab}: there are {vocabulary(cfg)} tokens; 0 takes just these",
    )


def check_rows(cfg: PrePreConfig) -> None:
    """A row holds a grid to predict, and there is a row of each split."""
    grids, size = cfg.nca_min_grid + 1, grid_tokens(cfg)
    tg.require(
        row_width(cfg) >= grids * size,
        f"nca_seq_len = {cfg.nca_seq_len}: a row needs {grids} grids of {size} tokens, the first "
        f"{cfg.nca_min_grid} of them as context: at least {grids * size}",
    )
    for key in ("nca_tokens", "nca_val_tokens"):
        value, row = getattr(cfg, key), row_inputs(cfg)
        tg.require(value >= row, f"{key} = {value}: less than one row of {row} tokens")


def band(cfg: PrePreConfig) -> tuple[float, float]:
    """Accepted compressed sizes as fractions of the raw size."""
    low, colon, high = cfg.nca_band.partition(":")
    try:
        limits = float(low or 0), float(high or math.inf)
    except ValueError:
        limits = 1.0, 0.0
    if not colon or not limits[0] < limits[1]:
        raise UserError(
            f"nca_band = {cfg.nca_band!r}: must read low:high with low < high, such as 0.3:0.4 or "
            "0.5:"
        )
    return limits


def vocabulary(cfg: PrePreConfig) -> int:
    """Patches of d colours, then the start and the end token of a grid."""
    return cfg.nca_colors ** (cfg.nca_patch**2) + 2


def grid_tokens(cfg: PrePreConfig) -> int:
    """Tokens of one recorded grid: start, patches, end."""
    return (cfg.nca_grid // cfg.nca_patch) ** 2 + 2


def grids_per_row(cfg: PrePreConfig) -> int:
    if cfg.nca_last == "whole":
        return cfg.nca_seq_len // grid_tokens(cfg)
    return math.ceil(cfg.nca_seq_len / grid_tokens(cfg))


def row_width(cfg: PrePreConfig) -> int:
    """Tokens that a row holds (W): whole grids, or one more than its inputs, for the last label."""
    tokens = grids_per_row(cfg) * grid_tokens(cfg)
    return tokens if cfg.nca_last == "whole" else min(tokens, cfg.nca_seq_len + 1)


def row_inputs(cfg: PrePreConfig) -> int:
    """Inputs, and labels, that a row makes (L); tokens are counted and paid for in these."""
    return row_width(cfg) - (0 if cfg.nca_last == "whole" else 1)


def row_count(cfg: PrePreConfig, split: str) -> int:
    """Rows of an epoch of training, or of validation."""
    return (cfg.nca_tokens if split == "train" else cfg.nca_val_tokens) // row_inputs(cfg)


########################################
#               Streams                #
########################################

# what a stream of random numbers is for: its first key
RULE, START, STEP, FILTER_START, FILTER_STEP, ORDER, CONTROL = range(1, 8)
# SplitMix64 (Steele, Lea, Flood 2014), with the constants of Vigna's splitmix64.c
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, uint64 [...] -> uint64 [...]."""
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


def stream(*parts) -> np.ndarray:
    """Keys (uint64) of the private streams that `parts` name: whole numbers, or arrays of them; the
    keys have the shape to which these broadcast, [1] of numbers alone.
    """
    with np.errstate(over="ignore"):
        key = np.zeros(1, np.uint64)
        for part in parts:
            key = mix(key + GOLDEN * (np.asarray(part).astype(np.uint64) + np.uint64(1)))
        return key


def bits(keys: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Outputs number `counter` (0, 1, ..., in any order) of the generators that start at `keys`:
    uint64 of the shape to which the two broadcast.
    """
    with np.errstate(over="ignore"):
        return mix(keys + GOLDEN * (np.asarray(counter).astype(np.uint64) + np.uint64(1)))


def uniform(keys: np.ndarray, counter: np.ndarray, resolution: int = 52) -> np.ndarray:
    """As bits, but float64 in (0, 1): midpoints of 2^resolution intervals, so never at an end."""
    interval = bits(keys, counter) >> np.uint64(64 - resolution)
    return (interval.astype(np.float64) + 0.5) * 2.0**-resolution


def choose(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Samples uint8 [...] from weights p [..., d], by u [...] in (0, 1): the first index whose
    cumulative share exceeds u.
    """
    total = p.cumsum(-1)
    return (total[..., :-1] <= u[..., None] * total[..., -1:]).sum(-1).astype(np.uint8)


########################################
#                Rules                 #
########################################

HIDDEN1, HIDDEN2 = 4, 16  # channels behind the 3x3 convolution and behind the first 1x1
# rule ids from here on, 2^31 of each: no rule can be in both
SPLIT_START = {"train": 0, "val": 1 << 31}


class Weights(NamedTuple):
    """Weights of N rules, float32, shaped as torch's convolutions: 614 numbers at 10 colours."""

    conv1: np.ndarray  # [N, 4, d, 3, 3], circular padding, no activation behind it
    bias1: np.ndarray  # [N, 4]
    conv2: np.ndarray  # [N, 16, 4], 1x1, then ReLU
    bias2: np.ndarray  # [N, 16]
    conv3: np.ndarray  # [N, d, 16], 1x1, the logits
    bias3: np.ndarray  # [N, d]


def draw_weights(ids: np.ndarray, cfg: PrePreConfig) -> Weights:
    """Weights of the rules with these ids [N]. "normal" (slowrun PR 63): weights and biases N(0,1).
    "lecun" (the paper, by way of Flax's nn.Conv): a normal cut at two standard deviations and
    widened to variance 1/fan_in again, biases zero. The paper pads all axes of the grid around, the
    colours' too: its first convolution sees the last colour, all colours, the first colour, 9 * (d
    + 2) inputs, and has two kernels for the first colour and for the last.
    """
    d = cfg.nca_colors
    lecun = cfg.nca_rule_init == "lecun"
    shapes = Weights(
        conv1=(HIDDEN1, d, 3, 3),
        bias1=(HIDDEN1,),
        conv2=(HIDDEN2, HIDDEN1),
        bias2=(HIDDEN2,),
        conv3=(d, HIDDEN2),
        bias3=(d,),
    )
    sizes = [math.prod(shape) for shape in shapes]
    again = (HIDDEN1, 2, 3, 3)  # the second kernels of the paper's first colour and of its last
    count = sum(sizes) + math.prod(again) * lecun
    u = uniform(stream(cfg.nca_seed, RULE, ids)[:, None], np.arange(count))
    if lecun:
        # 0.8796...: standard deviation of a normal cut at +-2, as in
        # jax.nn.initializers.variance_scaling
        normal = ndtri(ndtr(-2) + u * (ndtr(2) - ndtr(-2))) / 0.87962566103423978
        fan_in = (9 * (d + 2), math.inf, HIDDEN1, math.inf, HIDDEN2, math.inf, 9 * (d + 2))
        normal *= np.repeat([n**-0.5 for n in fan_in], [*sizes, math.prod(again)])
    else:
        normal = ndtri(u)
    parts = np.split(normal.astype(np.float32), np.cumsum(sizes), axis=1)
    w = Weights(*(part.reshape(len(ids), *shape) for part, shape in zip(parts, shapes)))
    if lecun:
        w.conv1[:, :, [0, d - 1]] += parts[-1].reshape(len(ids), *again)
    return w


class Tables(NamedTuple):
    """N rules made ready to run. Behind the first convolution there is no activation and its input
    is one-hot, so its four numbers for a cell are a sum of nine table rows, one for the colour of
    each neighbour.
    """

    weights: Weights
    near: np.ndarray  # [N, 9, d, 4] float32: the first convolution, its bias in the own cell's rows
    second: np.ndarray  # [N, 16, 5] float32: the second convolution, its bias last
    head: np.ndarray  # [N, d, 17] float32: the third one, its bias last
    doubt: np.ndarray  # [N] float32: how much a lead in float32 may differ from the true one


def make_tables(w: Weights, cfg: PrePreConfig) -> Tables:
    """Tables, and a bound on float32's error. Let S be the largest sum of |products| of a logit, in
    units of 2^-24. No term passes more than 37 roundings, whatever the order of the sums and
    whether products are rounded before they are added: 1 in a table, 8 in the sum of its rows,
    1 + 5 behind the second convolution, 1 + 17 behind the third, the identity's, the lead's, and
    two of what it is compared with: 40 S cover them, for each of the two logits of a lead.
    """
    N, d = len(w.conv1), cfg.nca_colors
    # by line and column of the kernel
    near = np.ascontiguousarray(w.conv1.transpose(0, 3, 4, 2, 1)).reshape(N, 9, d, HIDDEN1)
    first = np.abs(near).max(axis=2).sum(axis=1) + np.abs(w.bias1)  # [N, 4]
    hidden = (np.abs(w.conv2) * first[:, None]).sum(-1) + np.abs(w.bias2)  # [N, 16]
    logit = (np.abs(w.conv3) * hidden[:, None]).sum(-1) + np.abs(w.bias3)  # [N, d]
    size = logit.max(-1) + abs(cfg.nca_identity)
    near[:, 4] += w.bias1[:, None]
    return Tables(
        w,
        near,
        np.concatenate([w.conv2, w.bias2[:, :, None]], axis=2),
        np.concatenate([w.conv3, w.bias3[:, :, None]], axis=2),
        (2 * 40 * 2.0**-24 * size).astype(np.float32),
    )


########################################
#              Simulation              #
########################################

# cells per piece of work, 1,600 grids of 12x12: enough to drown the overhead of what is done for
# the few that float32 leaves open
CELLS_AT_ONCE = 230_400


@functools.lru_cache
def neighbours(grid: int) -> np.ndarray:
    """The cells around each cell on the torus, itself included, int32 [C, 9], line by line."""
    y, x = np.divmod(np.arange(grid * grid), grid)
    near = [(y + dy) % grid * grid + (x + dx) % grid for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.stack(near, axis=1).astype(np.int32)


def rollout(
    rules: Tables,
    slot: np.ndarray,
    start: np.ndarray,
    keys: np.ndarray,
    times: range,
    cfg: PrePreConfig,
) -> np.ndarray:
    """States of R automata at `times` (0 is the start): uint8 [R, len(times), C].

    Row r runs rule slot[r] from the colours start[r, C]; keys[r] is the stream of its choices. A
    cell's next colour is drawn from softmax((logits + identity*[own colour])/T) by u, number step*C
    + cell of that stream. A colour that leads by T*ln((d-1)/v) leaves less than v to all others, so
    u chooses it if v <= u <= 1-v. Float32, summed in any order, thus settles nearly all cells, most
    of them whatever u is (a 24-bit midpoint: v = 2^-25); the others are computed as defined, in
    float64 and in one order. So the result does not depend on what else is in the batch.
    """
    R, C = start.shape
    settled = rules.doubt[slot, None] + np.float32(lead_for(2.0**-25, cfg))
    advance = compiled_advance(cfg.nca_colors) or plain_advance
    recorded, state = np.empty((R, len(times), C), np.uint8), start.copy()
    after, lead = np.empty_like(state), np.empty((R, C), np.float32)
    for step in range(times[-1] + 1):
        if step in times:
            recorded[:, times.index(step)] = state
        if step < times[-1]:
            advance(rules, slot, state, after, lead, cfg)
            where = np.flatnonzero(lead <= settled)
            row, cell = np.divmod(where, C)
            u = uniform(keys[row], step * C + cell, 24)
            needed = rules.doubt[slot[row]] + lead_for(np.minimum(u, 1 - u), cfg)
            doubtful = lead.ravel()[where] <= needed
            if doubtful.any():
                where, u = where[doubtful], u[doubtful]
                after.ravel()[where] = decide(rules, slot, state, where, u, cfg)
            state, after = after, state
    return recorded


# plain_advance for D colours. As many cells as a vector has places are done with before the next
# are looked at: separate operations of torch take longer, most of it for passes over memory.
ADVANCE = """
#include <cstdint>
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
#if defined __AVX512F__
constexpr int PLACES = 16;
#elif defined __AVX2__
constexpr int PLACES = 8;
#else
constexpr int PLACES = 4;
#endif
typedef float floats __attribute__((vector_size(4 * PLACES)));
typedef int32_t ints __attribute__((vector_size(4 * PLACES)));

extern "C" void advance(const uint8_t* state, const int64_t* slot, const int32_t* around,
                        const float* nears, const float* seconds, const float* heads,
                        float identity, int64_t rows, int64_t cells, uint8_t* after, float* lead) {
  for (int64_t r = 0; r < rows; r++, state += cells, after += cells, lead += cells) {
    const four* near = (const four*)nears + slot[r] * 9 * D;  // [9][D]
    const float* second = seconds + slot[r] * 16 * 5;  // [16][5]
    const float* head = heads + slot[r] * D * 17;  // [D][17]
    for (int64_t q = 0; q < cells; q += PLACES) {
      int64_t count = cells - q < PLACES ? cells - q : PLACES;
      floats first[4] = {}, logit[D], zero = {};
      ints own = {}, colour = {};
      for (int i = 0; i < count; i++) {
        const int32_t* cell = around + (q + i) * 9;
        four sum = near[state[cell[0]]];
        for (int k = 1; k < 9; k++) sum += near[k * D + state[cell[k]]];
        for (int j = 0; j < 4; j++) first[j][i] = sum[j];
        own[i] = state[q + i];
      }
      for (int c = 0; c < D; c++) logit[c] = head[c * 17 + 16] + zero;
      for (int h = 0; h < 16; h++) {
        floats hidden = second[h * 5 + 4] + zero;
        for (int j = 0; j < 4; j++) hidden += second[h * 5 + j] * first[j];
        hidden = hidden > 0 ? hidden : zero;
        for (int c = 0; c < D; c++) logit[c] += head[c * 17 + h] * hidden;
      }
      if (identity)
        for (int c = 0; c < D; c++) logit[c] += own == c ? identity + zero : zero;
      floats best = logit[0], other = zero - __builtin_inff();
      for (int c = 1; c < D; c++) {
        ints leads = logit[c] > best;
        floats less = leads ? best : logit[c];
        other = less > other ? less : other;
        best = leads ? logit[c] : best;
        colour = leads ? c - ints{} : colour;
      }
      best -= other;
      for (int i = 0; i < count; i++) after[q + i] = colour[i], lead[q + i] = best[i];
    }
  }
}
"""


@functools.lru_cache
def compiled_advance(colors: int):
    """plain_advance as one loop, compiled anew by each process: that takes a fifth of a second, and
    no other CPU ever meets the file. None where there is no compiler.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, "-O3", "-march=native", f"-DD={colors}", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "advance.so"
        command += ["-x", "c++", "-", "-o", str(path)]
        try:
            subprocess.run(command, input=ADVANCE.encode(), check=True, capture_output=True)
            function = ctypes.CDLL(str(path)).advance
        except (OSError, subprocess.CalledProcessError):
            return None
    of = functools.partial(np.ctypeslib.ndpointer, flags="C_CONTIGUOUS")
    bytes_, floats, number = of(np.uint8), of(np.float32), ctypes.c_int64
    function.argtypes = bytes_, of(np.int64), of(np.int32), floats, floats, floats, ctypes.c_float
    function.argtypes += number, number, bytes_, floats
    function.restype = None

    def advance(rules: Tables, slot, state, after, lead, cfg: PrePreConfig) -> None:
        given = state, slot, neighbours(cfg.nca_grid), rules.near, rules.second, rules.head
        function(*given, cfg.nca_identity, *state.shape, after, lead)

    return advance


@torch.no_grad()
def plain_advance(rules: Tables, slot, state, after, lead, cfg: PrePreConfig) -> None:
    """A step in float32 of states uint8 [R, C] of the rules slot int64 [R]: the likeliest next
    colours are put into `after`, uint8 [R, C], and their leads over all others into `lead`, float32
    [R, C].
    """
    near = torch.from_numpy(rules.near).view(-1, HIDDEN1)
    row_of = np.arange(9, dtype=np.int32) * cfg.nca_colors
    for low in range(0, len(state), 64):  # rows that fit into the caches
        some = slice(low, low + 64)
        index = np.take(state[some], neighbours(cfg.nca_grid), axis=1) + row_of
        index += (slot[some] * (9 * cfg.nca_colors)).astype(np.int32)[:, None, None]
        first = torch.embedding_bag(
            near, torch.from_numpy(index).view(-1), torch.arange(0, index.size, 9).int()
        )[0].view(len(index), -1, HIDDEN1)
        second = torch.from_numpy(rules.second[slot[some]])
        head = torch.from_numpy(rules.head[slot[some]])
        hidden = torch.baddbmm(second[:, :, -1:], second[:, :, :-1], first.transpose(1, 2))
        logits = torch.baddbmm(head[:, :, -1:], head[:, :, :-1], hidden.relu_())
        if cfg.nca_identity:
            own = torch.from_numpy(state[some]).long()[:, None]
            logits.scatter_add_(1, own, torch.full(own.shape, cfg.nca_identity))
        best, colour = logits.max(1)
        logits.scatter_(1, colour[:, None], -math.inf)
        after[some], lead[some] = colour.numpy(), (best - logits.amax(1)).numpy()


def lead_for(v: float | np.ndarray, cfg: PrePreConfig) -> float | np.ndarray:
    """Lead of a logit over each other that leaves all others together less probability than v."""
    return cfg.nca_temperature * np.log((cfg.nca_colors - 1) / v)


def decide(
    rules: Tables,
    slot: np.ndarray,
    state: np.ndarray,
    where: np.ndarray,
    u: np.ndarray,
    cfg: PrePreConfig,
) -> np.ndarray:
    """Next colours [n] as defined, of the cells row*C + cell [n] of states [R, C], by u [n]."""
    row, cell = np.divmod(where, state.shape[1])
    around = state[row[:, None], neighbours(cfg.nca_grid)[cell]]  # [n, 9]
    logits = exact_logits(rules.weights, slot[row], around)
    logits[np.arange(len(row)), state[row, cell]] += cfg.nca_identity
    logits -= logits.max(-1, keepdims=True)
    if not cfg.nca_temperature:
        return logits.argmax(-1)
    return choose(np.exp(logits / cfg.nca_temperature), u)


def exact_logits(w: Weights, slot: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Logits float64 [n, d] as defined, of cells of the rules slot [n] with the colours around [n,
    9]: the order of all sums is part of the definition.
    """
    n = len(slot)
    conv1 = w.conv1.reshape(len(w.conv1), HIDDEN1, -1, 9)
    near = conv1[slot[:, None], :, around, np.arange(9)].astype(np.float64)  # [n, 9, 4]
    second, bias1 = w.conv2[slot].astype(np.float64), w.bias1[slot]  # [n, 16, 4], [n, 4]
    terms, middle = np.zeros((n, 9, HIDDEN2)), w.bias2[slot].astype(np.float64)
    for j in range(HIDDEN1):  # one product at a time
        terms += near[:, :, j, None] * second[:, None, :, j]
        middle += bias1[:, j, None] * second[:, :, j]
    terms[:, 4] += middle
    # numpy adds along a middle axis in order, for one cell as for many
    hidden = np.maximum(terms.sum(axis=1), 0)
    head = w.conv3[slot].transpose(0, 2, 1).astype(np.float64, order="C")
    return (head * hidden[:, :, None]).sum(axis=1) + w.bias3[slot]


def start_grids(keys: np.ndarray, cfg: PrePreConfig) -> np.ndarray:
    """Start grids uint8 [R, C] of keys [R]. "uniform" (PR 63): each cell any colour. "skewed" (the
    paper): the colours' frequencies in a grid are the softmax of N(0,1) draws.
    """
    C, d = cfg.nca_grid**2, cfg.nca_colors
    u = uniform(keys[:, None], np.arange(C), 24)
    if cfg.nca_start == "uniform":
        return (u * d).astype(np.uint8)
    p = np.exp(ndtri(uniform(keys[:, None], C + np.arange(d))))
    return choose(np.broadcast_to(p[:, None], (len(p), C, d)), u)


def recorded_times(cfg: PrePreConfig) -> range:
    """Steps whose grids make a row. The paper records and steps, PR 63 steps first and records."""
    first = cfg.nca_init_steps + (cfg.nca_dt if cfg.nca_record == "after" else 0)
    return range(first, first + grids_per_row(cfg) * cfg.nca_dt, cfg.nca_dt)


def simulate(ids: np.ndarray, sims: np.ndarray, epoch: int, cfg: PrePreConfig) -> np.ndarray:
    """Recorded grids uint8 [R, n, C] of an epoch's simulations `sims` [R] of rules `ids` [R]."""
    distinct, slot = np.unique(ids, return_inverse=True)
    C, times = cfg.nca_grid**2, recorded_times(cfg)
    start = start_grids(stream(cfg.nca_seed, START, ids, sims, epoch), cfg)
    if cfg.nca_control == "still":
        return np.repeat(start[:, None], len(times), axis=1)
    keys = stream(cfg.nca_seed, CONTROL, ids, sims, epoch)
    if cfg.nca_control == "random":
        cells = uniform(keys[:, None], np.arange(len(times) * C), 24) * cfg.nca_colors
        return cells.astype(np.uint8).reshape(len(ids), len(times), C)
    tables = make_tables(draw_weights(distinct, cfg), cfg)
    grids = rollout(tables, slot, start, stream(cfg.nca_seed, STEP, ids, sims, epoch), times, cfg)
    if cfg.nca_control == "shuffled":
        order = bits(keys[:, None], np.arange(len(times))).argsort(axis=1, kind="stable")
        return np.take_along_axis(grids, order[:, :, None], axis=1)
    return grids


########################################
#                Tokens                #
########################################

IGNORE = -1  # the label without a loss, as in train_gpt.GPT.losses


def tokenize(grids: np.ndarray, cfg: PrePreConfig, delimiters: bool = True) -> np.ndarray:
    """Grids uint8 [R, n, C] -> tokens uint16 [R, n * tokens of a grid]. Patches go row by row; a
    patch's token is the number whose digits in base d are its cells, row by row, the first being
    the least. Start is d^(p*p), end the one behind.
    """
    R, n, _ = grids.shape
    d, p, side = cfg.nca_colors, cfg.nca_patch, cfg.nca_grid // cfg.nca_patch
    cells = grids.reshape(R, n, side, p, side, p).astype(np.uint16)
    patches = sum(cells[:, :, :, k // p, :, k % p] * np.uint16(d**k) for k in range(p * p))
    patches = patches.reshape(R, n, side**2)
    if not delimiters:
        return patches.reshape(R, -1)
    tokens = np.empty((R, n, side**2 + 2), np.uint16)
    tokens[..., 0] = vocabulary(cfg) - 2
    tokens[..., 1:-1] = patches
    tokens[..., -1] = vocabulary(cfg) - 1
    return tokens.reshape(R, -1)


def digits(tokens: np.ndarray, cfg: PrePreConfig) -> np.ndarray:
    """Colours uint8 [..., p*p] of patch tokens [...]; 255 where the token is no patch."""
    tokens, d = np.asarray(tokens).astype(np.int64)[..., None], cfg.nca_colors
    colours = tokens // d ** np.arange(cfg.nca_patch**2) % d
    is_patch = (0 <= tokens) & (tokens < vocabulary(cfg) - 2)
    return np.where(is_patch, colours, 255).astype(np.uint8)


def inputs_and_labels(rows: np.ndarray, cfg: PrePreConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows uint16 [R, W] -> inputs and next-token labels, int64 [R, L], with labels IGNORE where
    there is no loss: the first nca_min_grid grids, and start and end tokens unless
    nca_delimiter_loss. Where the last grid is whole, the row ends in one padding input (token 0, no
    label), which makes L = W as PR 63 has it; else L = W - 1.
    """
    inputs, labels = rows.astype(np.int64), rows.astype(np.int64)
    labels[:, : cfg.nca_min_grid * grid_tokens(cfg)] = IGNORE
    if not cfg.nca_delimiter_loss:
        labels[labels >= vocabulary(cfg) - 2] = IGNORE
    if cfg.nca_last == "cut":
        return inputs[:, :-1], labels[:, 1:]
    inputs[:, -1] = 0
    labels = np.roll(labels, -1, axis=1)
    labels[:, -1] = IGNORE
    return inputs, labels


def next_grid_accuracy(predicted: np.ndarray, rows: np.ndarray, cfg: PrePreConfig) -> dict:
    """How well tokens predicted [R, at least W-1], where predicted[:, i] stands for rows[:, i+1],
    give the next grids of rows [R, W].

    Returns shares: cell_accuracy (chance is 1/d), token_accuracy (chance 1/d^(p*p)), grid_accuracy
    (all cells right), and lists of cell and grid accuracy by the number of grids in the context,
    from 1 up. A grid cut short is left out.
    """
    size, whole = grid_tokens(cfg), rows.shape[1] // grid_tokens(cfg)
    if rows.shape[1] % size == size - 1:  # only the end token is missing
        rows, whole = np.pad(rows, ((0, 0), (0, 1))), whole + 1

    def patches(tokens: np.ndarray) -> np.ndarray:  # [R, grids but the first, patches, p*p]
        grids = tokens[:, : whole * size].reshape(len(rows), whole, size)
        return digits(grids[:, 1:, 1:-1], cfg)

    # made to stand at the places of what they predict
    shifted = np.zeros((len(rows), whole * size), np.int64)
    n = min(whole * size - 1, predicted.shape[1])
    shifted[:, 1 : n + 1] = predicted[:, :n]
    right = patches(shifted) == patches(rows)
    # by the number of grids in the context
    cells, tokens = right.mean((0, 2, 3)), right.all(-1).mean((0, 2))
    grids = right.all((2, 3)).mean(0)
    return {
        "cell_accuracy": float(cells.mean()),
        "token_accuracy": float(tokens.mean()),
        "grid_accuracy": float(grids.mean()),
        "cell_by_context": cells.tolist(),
        "grid_by_context": grids.tolist(),
    }


def copy_accuracy(rows: np.ndarray, cfg: PrePreConfig) -> float:
    """cell_accuracy of taking a grid for the one before: a model must go above. rows: [R, W]."""
    behind = grid_tokens(cfg) - 1
    guess = np.zeros_like(rows)
    guess[:, behind:] = rows[:, : rows.shape[1] - behind]
    return next_grid_accuracy(guess.astype(np.int64), rows, cfg)["cell_accuracy"]


def unigram_loss(rows: np.ndarray, cfg: PrePreConfig) -> float:
    """Nats per label of the best constant guess for rows [R, W]; a model must go below."""
    labels = inputs_and_labels(rows, cfg)[1]
    count = np.bincount(labels[labels != IGNORE])
    p = count[count > 0] / count.sum()
    return float(-(p * np.log(p)).sum())


########################################
#                Filter                #
########################################

# least and most candidates scored at once; between them, twice the rules that are missing
ROUND = 256, 8192


def raw_size(cfg: PrePreConfig) -> int:
    """Bytes of a rule's ten grids before compression: int32 tokens; only PR 63 has delimiters."""
    return 4 * 10 * (grid_tokens(cfg) - (0 if cfg.nca_filter == "pr63" else 2))


def compressed_sizes(ids: np.ndarray, cfg: PrePreConfig) -> np.ndarray:
    """gzip sizes (level 9) in bytes, int32 [N], of ten grids of each rule of ids [N], as
    little-endian int32 tokens: the tokens' width is part of the measure, noise scores 0.67 in int32
    and 0.35 in int64. PR 63 runs every rule from one and the same start grid and takes steps 1 to
    10; the paper takes the run's own time steps behind its initial ones.
    """
    alike = cfg.nca_filter == "pr63"
    first, dt = (1, 1) if alike else (cfg.nca_init_steps, cfg.nca_dt)
    start = stream(cfg.nca_seed, FILTER_START, np.zeros_like(ids) if alike else ids)
    tables, slot = make_tables(draw_weights(ids, cfg), cfg), np.arange(len(ids))
    keys, times = stream(cfg.nca_seed, FILTER_STEP, ids), range(first, first + 10 * dt, dt)
    grids = rollout(tables, slot, start_grids(start, cfg), keys, times, cfg)
    tokens = tokenize(grids, cfg, delimiters=alike).astype("<i4")
    return np.array([gzip_size(row.tobytes()) for row in tokens], np.int32)


def gzip_size(data: bytes) -> int:
    """len(gzip.compress(data, 9)): wbits 31 is gzip's own header (10 bytes) and trailer (8)."""
    return len(zlib.compress(data, 9, wbits=31))


def passes(sizes: np.ndarray, cfg: PrePreConfig) -> np.ndarray:
    """Which compressed sizes lie in the band; its ends belong to it in PR 63, not in the paper."""
    score, (low, high) = sizes / raw_size(cfg), band(cfg)
    if cfg.nca_filter == "pr63":
        return (low <= score) & (score <= high)
    return (low < score) & (score < high)


def refuse_band(sizes: np.ndarray, accepted: int, cfg: PrePreConfig) -> None:
    """Stop a search that would not end, and say what the candidates were like."""
    low, *middle, high = np.quantile(sizes / raw_size(cfg), [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    raise UserError(
        f"nca_band = {cfg.nca_band!r}: {accepted} of {len(sizes)} candidate rules passed, an "
        f"acceptance rate of {accepted / len(sizes):.2%}, and fewer than one in nca_tries = "
        f"{cfg.nca_tries} ends the search. Compressed sizes go from {low:.3f} to {high:.3f}; 5, "
        f"25, 50, 75 and 95 % of them lie below {', '.join(f'{q:.3f}' for q in middle)}: choose a "
        f"band among these, for example --nca_band {middle[1]:.2f}:{middle[3]:.2f}, or raise "
        "--nca_tries"
    )


########################################
#                Cache                 #
########################################

# by nca_rule_init: counts up whenever the same flags come to mean other data
GENERATOR = {"normal": 1, "lecun": 2}


@functools.lru_cache
def zlib_mark() -> list:
    """What tells compressors apart: another zlib may give other sizes and so accept other rules."""
    state, noise = 12345, []
    for _ in range(360):
        state = (1103515245 * state + 12345) % 2**31
        noise.append((state >> 8) % 10000)
    sizes = gzip_size(np.array(noise, "<i4").tobytes()), gzip_size(bytes(1440))
    return [zlib.ZLIB_RUNTIME_VERSION, *sizes]


def facts(cfg: PrePreConfig, rows: bool) -> dict:
    """All that rows, or else only rules' compressed sizes, depend on."""
    filtered = cfg.nca_filter != "none"
    names = ["seed", "grid", "patch", "colors", "dt", "init_steps", "temperature", "identity"]
    names += ["rule_init", "start", "filter"]
    if rows:
        names += ["record", "seq_len", "last", "sims_per_rule", "control"]
        names += ["band"] if filtered else []
    of = {name: getattr(cfg, f"nca_{name}") for name in names}
    made = {"generator": GENERATOR[cfg.nca_rule_init], "zlib": zlib_mark() if filtered else None}
    return made | of


class Cache:
    """Arrays in files under <folder>/<hash of facts>/. A file is one line of JSON and the bytes
    that it describes; it appears whole or not at all, and one that does not match its sha256 is
    reported and taken for missing.
    """

    def __init__(self, folder: str, facts: dict, say=print):
        self.facts, self.say, self.root = facts, say, folder
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(folder) / name if folder else None

    def load(self, name: str) -> np.ndarray | None:
        path = self.folder / name if self.folder else None
        if path is None:
            return None
        try:
            head, _, data = path.read_bytes().partition(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            self.say(f"warning: {path} cannot be read ({e.strerror}): generating it anew")
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            meta = json.loads(head)
            array = np.frombuffer(data, np.dtype(meta["dtype"])).reshape(meta["shape"])
            if meta["sha256"] == hashlib.sha256(data).hexdigest() and meta["facts"] == self.facts:
                return array
        self.say(f"warning: {path} is damaged (its sha256 does not match): generating it anew")
        return None

    def save(self, name: str, array: np.ndarray) -> None:
        if self.folder is None:
            return
        little = array.dtype.newbyteorder("<")
        data = array.astype(little).tobytes()
        meta = {
            "dtype": little.str,
            "shape": array.shape,
            "facts": self.facts,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        part = self.folder / f"{name}.{os.getpid()}"  # ranks may make the same file at once
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tg.write_whole(part, json.dumps(meta).encode() + b"\n" + data)
            os.replace(part, self.folder / name)
        except OSError as e:
            raise UserError(
                f"nca_cache = {self.root!r}: cannot write {self.folder / name} ({e.strerror}); "
                "choose another folder, or --nca_cache '' for none"
            ) from e


########################################
#                 Data                 #
########################################

CHUNK_ROWS = 8192  # rows of one cache file: 16 MB at 988 tokens
Span = tuple[int, int]


def thread_count(cfg: PrePreConfig) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cfg.nca_threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def pieces(n: int, cfg: PrePreConfig) -> list[slice]:
    """n rows cut for the threads, of whole rules: a piece each, or of many rows CELLS_AT_ONCE."""
    most = max(1, CELLS_AT_ONCE // cfg.nca_grid**2)
    size = min(most, max(32, -(-n // thread_count(cfg))))
    size = max(1, size // cfg.nca_sims_per_rule) * cfg.nca_sims_per_rule
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@contextlib.contextmanager
def workers(cfg: PrePreConfig):
    """Threads, each computing alone: many small operations would spend their time waiting for each
    other. Torch's number of threads is one setting for the process, so nothing else should compute
    on the CPU meanwhile; it is restored.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(thread_count(cfg), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def gather_from_ranks(mine: np.ndarray, world: int) -> list[np.ndarray]:
    """Every rank's array, in order of the ranks."""
    if world == 1:
        return [mine]
    out = [None] * world
    dist.all_gather_object(out, mine)
    return out


class NcaData:
    """Rows of one split, "train" or "val". Row r of an epoch is simulation r % sims_per_rule of
    rule r // sims_per_rule, so it is the same on any number of ranks and in any batch. `gather`
    stands in for torch.distributed in tests. `poll` is called between rounds of the search for
    rules, by every rank as often: a signal ends it there. `together` is given what may fail on one
    rank alone, and raises that on all.
    """

    def __init__(
        self,
        cfg: PrePreConfig,
        split: str,
        rank: int = 0,
        world: int = 1,
        say=print,
        gather=gather_from_ranks,
        read_cache: bool = True,
        poll=lambda: None,
        together=lambda work: work(),
    ):
        self.cfg, self.split, self.rank, self.world = cfg, split, rank, world
        self.say, self.gather, self.read_cache, self.poll = say, gather, read_cache, poll
        self.together = together
        self.rows = row_count(cfg, split)
        self.scored, self.score_seconds = 0, 0.0  # candidate rules, and what that took
        self.made, self.make_seconds = 0, 0.0  # tokens, likewise
        self.size_cache = Cache(cfg.nca_cache, facts(cfg, rows=False), say)
        self.row_cache = Cache(cfg.nca_cache, facts(cfg, rows=True), say)
        self.kept: dict[tuple, np.ndarray] = {}
        # compressed size of every candidate rule so far, in order of the ids
        self.sizes = np.empty(0, np.int32)
        self.rules = self.find_rules(-(-self.rows // cfg.nca_sims_per_rule))

    def find_rules(self, count: int) -> np.ndarray:
        """Ids of the split's first `count` rules that pass; refuse_band ends a search in vain."""
        cfg, start = self.cfg, SPLIT_START[self.split]
        if cfg.nca_filter == "none":
            return start + np.arange(count)
        known = self.size_cache.load(f"sizes-{self.split}") if self.read_cache else None
        # Ranks of other machines may not see this file: all go on from what one of them knows.
        self.sizes = max(self.gather(self.sizes if known is None else known, self.world), key=len)
        bar = tqdm(total=count, desc=f"{self.split} rules", disable=None, leave=False)
        try:
            with workers(cfg) as pool, bar:
                while (accepted := int(passes(self.sizes, cfg).sum())) < count:
                    self.poll()
                    bar.update(min(accepted, count) - bar.n)
                    tried = len(self.sizes)
                    if tried >= 20 * cfg.nca_tries and accepted * cfg.nca_tries < tried:
                        refuse_band(self.sizes, accepted, cfg)
                    more = min(ROUND[1], max(ROUND[0], 2 * (count - accepted)))
                    self.score_round(start + np.arange(tried, tried + more), pool)
        finally:  # an interrupted search goes on from here
            if self.scored and self.rank == 0:
                self.size_cache.save(f"sizes-{self.split}", self.sizes)
        return start + np.flatnonzero(passes(self.sizes, cfg))[:count]

    def score_round(self, ids: np.ndarray, pool: ThreadPoolExecutor) -> None:
        """Compressed sizes of these candidates; each rank makes its share and all get all."""
        began = time.perf_counter()
        mine = np.array_split(ids, self.world)[self.rank]
        score = lambda some: compressed_sizes(mine[some], self.cfg)
        sizes = np.concatenate(list(pool.map(score, pieces(len(mine), self.cfg))))
        self.sizes = np.concatenate([self.sizes, *self.gather(sizes, self.world)])
        self.scored += len(ids)
        self.score_seconds += time.perf_counter() - began

    @property
    def accept_rate(self) -> float:
        return float(passes(self.sizes, self.cfg).mean()) if len(self.sizes) else 1.0

    def generate(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Tokens uint16 [R, W] of the rows with these numbers [R], made now by this rank."""
        cfg, began = self.cfg, time.perf_counter()
        epoch = self.grids_of(epoch)
        ids, sims = self.rules[rows // cfg.nca_sims_per_rule], rows % cfg.nca_sims_per_rule
        out = np.empty((len(rows), row_width(cfg)), np.uint16)

        def make(some: slice) -> None:
            tokens = tokenize(simulate(ids[some], sims[some], epoch, cfg), cfg)
            out[some] = tokens[:, : out.shape[1]]

        with workers(cfg) as pool:
            list(pool.map(make, pieces(len(rows), cfg)))
        self.made += len(rows) * row_inputs(cfg)
        self.make_seconds += time.perf_counter() - began
        return out

    def grids_of(self, epoch: int) -> int:
        """The epoch whose start grids this one has."""
        return epoch if self.cfg.nca_regen and self.split == "train" else 0

    def chunks(self) -> list[Span]:
        return [(a, min(a + CHUNK_ROWS, self.rows)) for a in range(0, self.rows, CHUNK_ROWS)]

    def chunk(self, epoch: int, span: Span) -> np.ndarray:
        """Rows span[0] up to span[1], from the cache or made and put there."""
        epoch = self.grids_of(epoch)
        name = f"{self.split}-epoch{epoch}-rows{span[0]}-{span[1]}"
        rows = self.row_cache.load(name) if self.read_cache else None
        if rows is None:
            rows = self.generate(epoch, np.arange(*span))
            self.row_cache.save(name, rows)
        return rows

    def prepare(self, epoch: int) -> None:
        """
        Make this rank's share of an epoch's cache files and, when all ranks have theirs, read all,
        so that no batch of the epoch meets a disk. Collective.
        """
        if not self.cfg.nca_cache:
            return
        self.kept = {}  # first, as two epochs may be too much for the memory
        self.together(lambda: self.make_share(epoch))

        def read() -> dict[tuple, np.ndarray]:  # what another machine's disk has is made here, too
            return {(epoch, span): self.chunk(epoch, span) for span in self.chunks()}

        self.kept = self.together(read)

    def make_share(self, epoch: int) -> None:
        mine = self.chunks()[self.rank :: self.world]
        for span in tqdm(mine, desc="rows", disable=None, leave=False):
            self.chunk(epoch, span)

    def take(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Tokens uint16 [R, W] of the rows with these numbers [R], from the cache if there is one;
        else only these are made.
        """
        if not self.cfg.nca_cache:
            return self.generate(epoch, rows)
        self.kept = {key: chunk for key, chunk in self.kept.items() if key[0] == epoch}
        out = np.empty((len(rows), row_width(self.cfg)), np.uint16)
        for span in self.chunks():
            here = (span[0] <= rows) & (rows < span[1])
            if here.any():
                if (epoch, span) not in self.kept:
                    self.kept[epoch, span] = self.chunk(epoch, span)
                out[here] = self.kept[epoch, span][rows[here] - span[0]]
        return out

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's rows in their order of training, int64 [rows]."""
        keys = bits(stream(self.cfg.nca_seed, ORDER, epoch), np.arange(self.rows))
        return keys.argsort(kind="stable")

    def sha256(self, epoch: int) -> str:
        """Hash of all rows of an epoch in order of their numbers, little-endian."""
        h = hashlib.sha256()
        for span in tqdm(self.chunks(), desc=f"{self.split} rows", disable=None, leave=False):
            h.update(self.chunk(epoch, span).astype("<u2").tobytes())
        return h.hexdigest()


########################################
#                Train                 #
########################################


def data_of(run: tg.Run, cfg: PrePreConfig, split: str) -> NcaData:
    return NcaData(cfg, split, run.rank, run.world, run.log, poll=run.poll, together=run.together)


class NcaLoader:
    """Batches for train_gpt's loop: batch s has an epoch's order[s*B : (s+1)*B], split by ranks."""

    def __init__(self, cfg: PrePreConfig, run: tg.Run):
        self.cfg, self.run, self.rows = cfg, run, int(cfg.batch_tokens) // row_inputs(cfg)
        need = row_inputs(cfg) * run.world
        if int(cfg.batch_tokens) % need or not self.rows:
            raise UserError(
                f"batch_tokens = {cfg.batch_tokens} on {run.world} ranks: must be a multiple of "
                f"{need}, a row of {row_inputs(cfg)} tokens for each: choose "
                f"{max(1, round(int(cfg.batch_tokens) / need)) * need}"
            )
        if row_count(cfg, "train") < self.rows:
            raise UserError(
                f"nca_tokens = {cfg.nca_tokens}: an epoch of {row_count(cfg, 'train')} rows is "
                f"less than one batch of {self.rows}: raise it, or lower --batch_tokens"
            )
        self.data = data_of(run, cfg, "train")
        self.epoch = self.pos = 0  # the next batch is batch `pos` of the epoch
        self.prepared, self.order = -1, np.empty(0, np.int64)
        row = self.data.generate(0, np.arange(1))
        # labels of a row; all rows have as many
        self.scored = int((inputs_and_labels(row, cfg)[1] != IGNORE).sum())

    def prepare(self) -> None:
        """Make an epoch's rows, while the training clock stands still: the log says how long."""
        began = time.perf_counter()
        with self.run.clock.paused(), self.run.interruptible():
            self.data.prepare(self.epoch)
        self.prepared, self.order = self.epoch, self.data.order(self.epoch)
        took = f"{time.perf_counter() - began:.1f}s"
        self.run.log(f"nca epoch:{self.epoch} rows:{self.data.rows} generated in {took}")

    def batch(self, step: int, batch_tokens: int, seq_len: int) -> np.ndarray:
        """This rank's rows of the next batch, uint16 [B/world, W]. Rows for no whole batch at an
        epoch's end are dropped.
        """
        if (self.pos + 1) * self.rows > self.data.rows:
            self.epoch, self.pos = self.epoch + 1, 0
        if self.prepared != self.epoch:
            self.prepare()
        share = self.rows // self.run.world
        first = self.pos * self.rows + self.run.rank * share
        rows = self.data.take(self.epoch, self.order[first : first + share])
        self.pos += 1
        return rows

    def targets(self, batch_tokens: int) -> int:
        return batch_tokens // row_inputs(self.cfg) * self.scored

    def tensors(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = inputs_and_labels(rows, self.cfg)
        return tg.to_device(inputs, device), tg.to_device(labels, device)

    def fingerprint(self, **instead) -> str:
        """sha256 over all that makes the rows, the rules accepted included; some facts instead."""
        made = json.dumps(facts(self.cfg, rows=True) | instead, sort_keys=True).encode()
        return hashlib.sha256(made + self.data.rules.astype("<i8").tobytes()).hexdigest()

    def identity(self) -> dict:
        """
        What makes the rows; a resumed run makes them anew from its configuration. `by_rules` is
        without the compressor, of which rows have nothing but the rules that it let pass.
        """
        return {"rows": self.fingerprint(), "by_rules": self.fingerprint(zlib=None)}

    def accept(self, saved: dict, position: dict) -> str:
        """UserError where a checkpoint (of this identity) was trained on other rows than these."""
        found = self.identity()
        if not any(saved.get(key) == found[key] for key in found):
            raise UserError(
                "the automata's rows are not those that this run was trained on: zlib "
                f"{zlib.ZLIB_RUNTIME_VERSION} lets other rules pass here, or pre_pre_train.py "
                "has changed; go on with the zlib and the source that it began with, or start "
                "another --run (--init_from takes over the weights)"
            )
        return ""

    def ended(self, batch_tokens: int) -> bool:
        return False  # another epoch can always be made

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "pos": self.pos}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.pos = state["epoch"], state["pos"]


class NcaValidation:
    """Rows of rules that training never sees."""

    def __init__(self, cfg: PrePreConfig, run: tg.Run, loader: NcaLoader):
        self.cfg, self.tensors, self.bytes, self.seq_len = cfg, loader.tensors, 0, row_inputs(cfg)
        data = data_of(run, cfg, "val")
        data.prepare(0)
        self.data = data.take(0, np.arange(data.rows))
        self.rows, self.scored = data.rows, data.rows * loader.scored
        spread = np.linspace(0, self.rows - 1, min(self.rows, cfg.nca_measured))
        self.measured = self.data[np.unique(spread.round().astype(int))]
        self.unigram = unigram_loss(self.data[:1024], cfg)

    def batch(
        self, rows: range, device: torch.device, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as inputs and labels int64 [size, L]; those beyond the last one have no labels."""
        x, y = self.tensors(self.data[np.minimum(rows, self.rows - 1)], device)
        y[[i for i, r in enumerate(rows) if r >= self.rows]] = IGNORE
        return x, y

    @torch.no_grad()
    def measure(self, trainer: tg.Trainer, step: int, shape: tg.Shape) -> dict:
        """Greedy next-grid accuracy on held-out rules, by every rank; tokens follow true ones."""
        guesses, patches = [], vocabulary(self.cfg) - 2
        for low in range(0, len(self.measured), shape.rows):
            rows = self.measured[low : low + shape.rows]
            missing = shape.rows - len(rows)
            full = np.concatenate([rows, rows[np.zeros(missing, int)]])  # one shape, one graph
            x, _ = self.tensors(full, trainer.run.device)
            applied = shape.repeats, shape.window, shape.passes, shape.window_long
            hidden = trainer.model.hidden(x, *applied)[: len(rows)]
            for row in hidden:
                guesses.append(trainer.model.logits(row)[:, :patches].argmax(-1).cpu().numpy())
        score = next_grid_accuracy(np.stack(guesses), self.measured, self.cfg)
        by_context = {k: score.pop(k) for k in ("cell_by_context", "grid_by_context")}
        trainer.run.metric("nca", step, **by_context, unigram_loss=self.unigram)
        return score | {"last_cell_accuracy": by_context["cell_by_context"][-1]}


def build(cfg: PrePreConfig, run: tg.Run) -> tg.Trainer:
    """train_gpt's parts around automata; rules and validation rows are found before the clock."""
    plan = tg.Plan(cfg, run.world)
    with run.interruptible():
        loader = NcaLoader(cfg, run)
        plan.train_shapes(run.world)  # refuses micro-batches that do not divide
        val = NcaValidation(cfg, run, loader)
    return tg.assemble(cfg, run, plan, loader, val, None)


########################################
#               Picture                #
########################################


SHOWN, FRAMES = 6, 10  # rules of each kind, and grids of each


def draw_picture(cfg: PrePreConfig, path: str | Path, candidates: int = 1024) -> None:
    """PNG of accepted and of rejected rules side by side, and of all candidates' scores."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    judged = cfg if cfg.nca_filter != "none" else dataclasses.replace(cfg, nca_filter="pr63")
    ids = np.arange(candidates)
    with workers(cfg) as pool:
        sizes = pool.map(lambda some: compressed_sizes(ids[some], judged), pieces(candidates, cfg))
        sizes = np.concatenate(list(sizes))
    accepted, score = passes(sizes, judged), sizes / raw_size(judged)
    fig = Figure(figsize=(15, 8.5))
    top, bottom = fig.subfigures(2, 1, height_ratios=[3, 1])
    left, right = top.subfigures(1, 2)
    left.suptitle(f"accepted: {accepted.sum()} of {candidates} rules", y=0.99)
    draw_rules(left, ids[accepted], score, cfg)
    right.suptitle(f"rejected: {(~accepted).sum()} of {candidates} rules", y=0.99)
    draw_rules(right, ids[~accepted], score, cfg)
    ax, (low, high) = bottom.subplots(), band(judged)
    bottom.subplots_adjust(bottom=0.25, top=0.95, left=0.05, right=0.99)
    ax.hist(score, bins=80, color="0.5")
    high = min(high, score.max() + 0.02)
    ax.axvspan(low, high, color="tab:green", alpha=0.2, label=f"accepted: {cfg.nca_band}")
    ax.set_xlabel("score: compressed size / raw size (gzip -9, int32 tokens of ten grids)")
    ax.set_ylabel("rules")
    ax.legend(loc="upper center")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, format="png")


def draw_rules(figure, ids: np.ndarray, score: np.ndarray, cfg: PrePreConfig) -> None:
    """The first grids of SHOWN of these rules, spread over their scores; score is by id."""
    ids = ids[np.argsort(score[ids])]
    spread = np.linspace(0, len(ids) - 1, min(SHOWN, len(ids)))
    ids = ids[np.unique(spread.round().astype(int))]
    axes = figure.subplots(SHOWN, FRAMES, squeeze=False)
    figure.subplots_adjust(left=0.12, right=0.99, top=0.9, bottom=0.02, wspace=0.06, hspace=0.06)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, at in zip(axes[0], recorded_times(cfg)):
        ax.set_title(f"step {at}", fontsize=7)
    if not len(ids):
        return
    colours = {
        "cmap": "tab10" if cfg.nca_colors <= 10 else "tab20",
        "vmin": 0,
        "vmax": max(9, cfg.nca_colors - 1),
        "interpolation": "nearest",
    }
    grids = simulate(ids, np.zeros_like(ids), 0, cfg)
    for row, rule, states in zip(axes, ids, grids):
        label, place = f"rule {rule}\n{score[rule]:.3f}", row[0].transAxes
        row[0].text(-0.1, 0.5, label, fontsize=8, ha="right", va="center", transform=place)
        for ax, state in zip(row, states):
            ax.imshow(state.reshape(cfg.nca_grid, -1), **colours)


########################################
#                 Main                 #
########################################


def generate_only(cfg: PrePreConfig) -> int:
    """Makes rules, epoch 0 and validation rows anew, into the cache; prints speed and hashes."""
    say = functools.partial(print, file=sys.stderr)
    train, val = (NcaData(cfg, split, say=say, read_cache=False) for split in ("train", "val"))
    out = {"sha256": train.sha256(0), "val_sha256": val.sha256(0)}
    scored, seconds = train.scored + val.scored, train.score_seconds + val.score_seconds
    out |= {
        "tokens_per_s": (train.made + val.made) / (train.make_seconds + val.make_seconds),
        **({"rules_per_s": scored / seconds} if scored else {}),
        "accept_rate": train.accept_rate,
        "rules": len(train.rules),
        "val_rules": len(val.rules),
        "candidates": scored,
        "rows": train.rows,
        "val_rows": val.rows,
        "tokens": train.rows * row_inputs(cfg),
        "val_tokens": val.rows * row_inputs(cfg),
        "compiled": compiled_advance(cfg.nca_colors) is not None,
        "seconds": seconds + train.make_seconds + val.make_seconds,
        "unigram_loss": unigram_loss(train.generate(0, np.arange(min(train.rows, 1024))), cfg),
        "compat": cfg.nca_compat,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }
    if cfg.json:
        print(json.dumps(out))
        return 0
    for key, value in out.items():
        print(f"{key:14} {value:,.6g}" if isinstance(value, float) else f"{key:14} {value}")
    return 0


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        cfg = parse_args(sys.argv[1:] if argv is None else argv)
        if cfg.picture:
            draw_picture(cfg, cfg.picture)
            print(f"picture: {cfg.picture}", file=sys.stderr)
        if cfg.generate_only:
            return generate_only(cfg)
        return 0 if cfg.picture else train(cfg)

    return tg.exit_code(work)


def train(cfg: PrePreConfig) -> int:
    with tg.Run(cfg) as run:
        try:
            code = tg.train(cfg, run, build)
        except tg.Interrupted:  # while build searched for rules: there is nothing to save yet
            run.log(
                f"interrupted by {signal.Signals(run.signal).name} while rules were searched: "
                "nothing is changed; the same command goes on, with what the cache holds"
            )
            return 128 + run.signal
        if code == 0 and run.is_main and not (run.folder / "nca.png").exists():
            draw_picture(cfg, run.folder / "nca.png", candidates=256)
        return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
