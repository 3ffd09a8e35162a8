"""
Random combinations of the switches: each is refused in one line, or it trains, goes on from a
checkpoint with the same bits, and leaves an artifact that reads back as what was evaluated and is
scored; and a switch that is taken back changes something.

    python tests/sampler.py --first 0 --count 300      # by hand: seeds 0 to 299, half a second each
    python tests/sampler.py --count 20 --scripts       # what scripts of them do, 20 seconds each

A seed that fails stays a test in test_switches.py once the fault is mended.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from helpers import tg, tiny, write_shard
from safetensors.torch import load_file

from logs import score, script

STEPS = 3
# What every sample starts from: matrices of 64 rows and columns (smaller ones are not rounded),
# nothing that starts at zero, so that each switch can act within the few steps.
BASE = {
    "dim": 64,
    "depth": 2,
    "heads": 2,
    "seq_len": "16",
    "batch_tokens": "64",
    "micro_tokens": 64,
    "steps": STEPS,
    "vocab": 96,
    "head_init": "0.1",
    "proj_init": 0.5,
    "mlp_ratio": 1.0,
    "log_every": 1,
    "save_every": 1,
    "keep": 9,
    "eval_every": 2,
    "window": "0",
    "export": "",
    "epochs": 0,
    "val_tokens": 64,
    "q_gain": 1.0,
}
# Switches and choices, each with the values that it may take beside its own.
SWITCHES = {
    "train_tokens": (500,),
    "shuffle": (1, 2),
    "bos_rows": (1,),
    "doc_cap": ("6", "0:9 1s:0"),
    "embed_stats": (32,),
    "eval_seq_len": (8, 32),
    "seq_len": ("8", "0:8 2s:16"),
    "batch_tokens": ("128", "0:64 1s:128"),
    "depth": (1, 3, 4),
    "kv_heads": (1,),
    "head_dim": (16, 64),
    "mlp_multiple": (48,),
    "layer_norm": (1,),
    "embed_norm": (0,),
    "qk_norm": (0,),
    "attn_scale": (0.3,),
    "rope": ("standard", "interleaved"),
    "rope_dims": (-1, 8),
    "key_offset": ("still", "second"),
    "activation": ("leaky_relu2", "swiglu"),
    "q_gain": (1.5,),
    "attn_gate": (12,),
    "value_proj": (32,),
    "iha": (1,),
    "xsa": (-1, 1, 4),
    "block_scales": (1,),
    "resid_lambda": (1.1,),
    "x0_lambda": (0.1,),
    "unet": (1, 2),
    "layer_scale": (1,),
    "loop_embed": (1,),
    "value_embeds": (1, 2),
    "second_embed": (1,),
    "cross_repeat": (1,),
    "bigram_rows": (50,),
    "bigram_signs": (8,),
    "bigram_rule": ("rows",),
    "smear": (12,),
    "backout": ("0:0.5",),
    "value_layers": ("0", "0-1"),
    "value_gate": ("6+6", "16"),
    "no_attn_layers": ("0", "1"),
    "no_mlp_layers": ("0", "1"),
    "attn_gate_layers": ("0", "1"),
    "xsa_layers": ("0-1",),
    "xsa_learned": (1,),
    "x0_layers": ("0", "0-1"),
    "skip_gate": ("0>1",),
    "skip_dims": (8,),
    "post_lambda": (1.0,),
    "sa_lambdas": ("0.5 1",),
    "paired_layers": ("0", "0-1"),
    "late_input": ("0",),
    "gate_nets": ("0", "0,1", "1"),
    "mudd": ("x0,0",),
    "mudd_final": ("x0,0", "v0"),
    "doc_mask": (1,),
    "window": ("4", "0:4 1s:8"),
    "window_pattern": ("SSSL", "SL"),
    "window_long": ("6", "0:4 1s:8 2s:12"),
    "yarn": (1, 16),
    "loop": ("0:1", "1:2", "0:2"),
    "repeats": ("2", "0:1 1s:2 2s:3"),
    "passes": ("2", "0:1 1s:2"),
    "tie_embed": (1,),
    "untie_at": ("1s", "1/3"),
    "attn_dropout": (0.3,),
    "mlp_dropout": (0.3,),
    "stoch_depth": (0.9,),
    "mtp": (0.3,),
    "mtp_next": ("0.5", "0:0.5 1>0"),
    "mtp_third": ("0.25",),
    "head_multiple": (64,),
    "pad_vocab": (1,),
    "init_std": (1.0,),
    "logit_dim_power": (-0.5,),
    "softcap": (5.0,),
    "softcap_in": (8.0,),
    "softcap_shift": (2.0,),
    "sampled_classes": ("40", "0:30 2s:0"),
    "init": ("xavier",),
    "z_loss": (0.1,),
    "mu_loss": (10.0,),
    "mu_centering": (1,),
    "optimizer": ("adamw",),
    "adamw_matrices": ("attn", r"mlp\.fc"),
    "own_lr": ("embed=0.1/0.9", "scales=0.1/0.9/0.99/0.1 lambda=0.1"),
    "lr_cycles": (1,),
    "slow": ("blocks.0.",),
    "slow_lr": ("0 1s:0 2s>1", "0.5"),
    "polar": ("polar_express",),
    "polar_gram": (3,),
    "row_norm": (1,),
    "qk_groups": (1,),
    "matrix_lr_mul": ("mlp=4", "attn=0.5 mlp.proj=4"),
    "adam_every": (2, 3),
    "normuon": (0.95,),
    "cautious": (1, 2),
    "decay_by_shape": (1,),
    "matrix_wd": (0.5,),
    "embed_wd": (0.5,),
    "scalar_wd": (0.5,),
    "weight_decay": ("0:1 1>0.5",),
    "independent_wd": (1,),
    "grad_clip": (0.01,),
    "meta_step": ("0.5", "0 1s:0.5"),
    "meta_groups": (1, 2),
    "meta_match": ("mlp",),
    "ema": (0.9,),
    "swa_every": (1, 2),
    "average_epochs": (1, 2),
    "cycles": (2, 3),
    "cycle_lr": ("1 1>0.08",),
    "cycle_decay": ("0.7 1>1",),
    "perturb": ("0.25 1~0.05",),
    "distill": (0.45,),
    "distill_temperature": (1.2,),
    "fitness_tokens": (40,),
    "final_weights": ("ema", "swa"),
    "export": ("int8", "int6 mlp:5", "fit", "int4 head:8"),
    "export_codec": ("brotli", "xz", "entropy", "best"),
    "artifact_limit": (10**7,),
    "gptq": (2, 1000),
    "qat": ("1", "0:0 1s:1"),
    "qat_noise": (1,),
    "score": ({"modes": "sliding"}, {"modes": "mixture ttt"}, {"modes": "lora", "stride": 4}),
    "param_dtype": ("bfloat16",),
    "epochs": (1, 3),
    "auto_micro": (1,),
    "loss_chunk": (16,),
    "micro_tokens": (32,),
}
# Values that need not show in the result: sizes whose results agree by design, what rounds up to
# the same, averages that nobody scores but for one field, and patterns over names that the model
# may lack.
SILENT = {
    "micro_tokens",
    "auto_micro",
    "loss_chunk",
    "mlp_multiple",
    "head_multiple",
    "pad_vocab",
    "epochs",
    "shuffle",
    "train_tokens",
    "artifact_limit",
    "export_codec",
    "embed_stats",
    "own_lr",
    "window",
    "window_pattern",  # its window may have been refused
    "xsa",
    "gptq",
    "rope_dims",
    "head_dim",
    "stoch_depth",
    "eval_seq_len",
    "value_embeds",
    "seq_len",
    "kv_heads",
    "depth",
    "loop",
    "meta_groups",
    "meta_match",
    "cycles",
    "cycle_decay",
    "distill_temperature",
    "fitness_tokens",
    "late_input",  # right behind that block, attention reads its output anyway
}


def sample(seed: int) -> dict:
    """Flags of one combination: three to fourteen switches, each with one of its values."""
    rng = random.Random(seed)
    names = rng.sample(sorted(SWITCHES), rng.randint(3, 14))
    needed = {
        "cross_repeat": "repeats",
        "repeats": "loop",
        "qat_noise": "qat",
        "qat": "export",
        "gptq": "export",
        "window_pattern": "window",
        "softcap_in": "softcap",
        "softcap_shift": "softcap",
        "doc_cap": "bos_rows",
        "bigram_signs": "bigram_rows",
        "bigram_rule": "bigram_rows",
        "untie_at": "tie_embed",
        "slow": "slow_lr",
        "slow_lr": "slow",
        "lr_cycles": "epochs",
        "average_epochs": "epochs",
        "cycle_lr": "cycles",
        "cycle_decay": "cycles",
        "perturb": "cycles",
        "distill": "cycles",
        "distill_temperature": "distill",
        "fitness_tokens": "cycles",
        "rope_dims": "rope",
        "cautious": "matrix_wd",
        "export_codec": "export",
        "meta_step": "meta_groups",
        "meta_match": "meta_step",
    }
    for name in names:  # most alone would be refused: bring along what they need
        if name in needed and needed[name] not in names and rng.random() < 0.9:
            names.append(needed[name])
    flags = {name: rng.choice(SWITCHES[name]) for name in names}
    if "decay_by_shape" in flags:  # else no matrix is taller than wide
        flags["mlp_ratio"] = 2.0
    return flags


def make_data(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in (
        ("x_train_000001.bin", 700),
        ("x_train_000002.bin", 900),
        ("x_val_000000.bin", 200),
    ):
        write_shard(
            folder / name, np.where(rng.random(count) < 0.05, 0, rng.integers(0, 96, count))
        )
    return str(folder)


def config(flags: dict, folder: Path, run: str) -> tg.Config:
    """As parse_args makes one; UserError where it refuses."""
    own = {"data": make_data(folder / "data"), "log_dir": str(folder), "run": run}
    if "score" in flags:
        own["score"] = {"stride": 8} | flags["score"]
    cfg = tiny(**(BASE | flags | own))
    tg.validate(cfg)
    tg.refuse_idle(cfg)
    return cfg


def trained(cfg: tg.Config) -> Path:
    """Train it, and score it where it asks for that; UserError where the scores are refused."""
    with contextlib.redirect_stdout(io.StringIO()), tg.Run(cfg) as run:
        assert tg.train(cfg, run) == 0
    return scored(cfg, Path(cfg.log_dir) / cfg.run)


def scored(cfg: tg.Config, folder: Path) -> Path:
    if cfg.score or cfg.average_epochs:
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = score.main([str(folder)])
        if code:
            raise tg.UserError(said.getvalue().removeprefix("error: ").rstrip("\n"))
    return folder


def outcome(folder: Path) -> dict:
    """All that a run gives which does not depend on the clock."""
    named = load_file(tg.checkpoints(folder)[-1] / "model.safetensors")
    result = json.loads((folder / "result.json").read_text())
    timed = {
        "run",
        "config_sha256",
        "resumed",
        "peak_memory_bytes",
        "train_time_s",
        "wall_time_s",
        "eval_time_s",
        "first_eval_time_s",
        "scores",
        "git",
    }
    weights = {name: w.view(torch.uint8).numpy().tobytes() for name, w in named.items()}
    return weights | {k: v for k, v in result.items() if k not in timed}


def refused_flag(e: tg.UserError, flags: dict) -> str:
    """The flag to take out: the first that a refusal names, in one line."""
    assert "\n" not in str(e)
    named = sorted((str(e).find(name), name) for name in flags if name in str(e))
    assert named, f"names none of its flags: {e}"
    return named[0][1]


def finished(flags: dict, folder: Path) -> tuple[tg.Config, Path, list[str]]:
    """
    Train with these flags but for those that are refused, which are taken out of them: before the
    first step and before a folder is made, or, what is about scores, before a figure is taken.
    """
    refused: list[str] = []
    while True:
        try:
            cfg = config(flags, folder, "a")
            with contextlib.redirect_stdout(io.StringIO()):
                tg.build(cfg, tg.Run(cfg))  # the data are asked here, still before a folder is made
            break
        except tg.UserError as e:
            assert not (folder / "a").exists()
            refused.append(str(e))
            flags.pop(refused_flag(e, flags))
    try:
        return cfg, trained(cfg), refused
    except tg.UserError as e:
        assert "\n" not in str(e) and re.match("(mode|stride) = ", str(e)), e
        assert "scores" not in json.loads((folder / "a" / "result.json").read_text())
        del flags["score"]
        shutil.rmtree(folder / "a")
        cfg, first, more = finished(flags, folder)
        return cfg, first, [*refused, str(e), *more]


def without_end(folder: Path) -> None:
    """A finished run as one that was stopped behind its second step."""
    for name in ("result.json", f"ckpt/{STEPS:06d}", "ckpt/000003", "epochs/000003"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check(seed: int, folder: Path, flags: dict | None = None) -> tuple[dict, list[str]]:
    """Try one combination: its flags without those that were refused, and the refusals."""
    flags = dict(sample(seed) if flags is None else flags)
    cfg, first, refused = finished(flags, folder)
    done = outcome(first)
    if cfg.export:  # what was evaluated reads back, strictly
        kept, named = tg.load_artifact(first / "model.nrx")
        assert tg.config_hash(kept) == tg.config_hash(cfg) and kept == dataclasses.replace(
            cfg, config=()
        )
        tg.load_weights(
            tg.build_model(kept, torch.device("cpu"), torch.float32, 16), named, "model.nrx"
        )
    # and go on from step 2
    without_end(first)
    again = outcome(trained(dataclasses.replace(cfg, resume=True)))
    different = [k for k in done if done[k] != again.get(k)]
    assert not different and done.keys() == again.keys(), f"resumed: {different} differ"
    # one switch back at its own value: something must change
    one = random.Random(seed).choice(sorted(flags) or ["epochs"])
    if one not in SILENT:
        try:
            plain = config({k: v for k, v in flags.items() if k != one}, folder, "b")
            other = outcome(trained(plain))
        except tg.UserError:
            return flags, refused
        assert other != done, f"{one} = {flags[one]!r} changes nothing"
    return flags, refused


def check_script(seed: int, folder: Path) -> tuple[dict, list[str]]:
    """Whether the script of a combination gives and goes on to what the trainer does."""
    flags = dict(sample(seed))
    cfg, first, refused = finished(flags, folder)
    done, own = outcome(first), {"artifact_bytes", "code_bytes", "total_bytes"}
    request = script.Request([], script.KEPT, [], "")
    file = folder / "train.py"
    file.write_text(script.text_of(cfg, request, script.facts_of(cfg, script.KEPT, [])))
    spec = importlib.util.spec_from_file_location("train", file)
    made = sys.modules["train"] = importlib.util.module_from_spec(spec)  # its dataclass looks there
    spec.loader.exec_module(made)
    for argv in (["--run", "script"], ["--run", "script", "--resume"]):
        with contextlib.redirect_stdout(io.StringIO()):
            assert made.main(argv) == 0
        found = outcome(scored(cfg, folder / "script"))
        different = [k for k in done if k not in own and done[k] != found.get(k)]
        assert not different and done.keys() == found.keys(), f"{argv}: {different} differ"
        without_end(folder / "script")
    return flags, refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--scripts", action="store_true")
    flags, failed, refused, began = parser.parse_args(), [], 0, time.perf_counter()
    torch.set_num_threads(1)
    one = check_script if flags.scripts else check
    for seed in range(flags.first, flags.first + flags.count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                refused += len(one(seed, Path(folder))[1])
            except Exception as e:  # whatever a combination can raise is what is looked for
                failed.append(seed)
                where = traceback.extract_tb(e.__traceback__)[-1]
                print(
                    f"seed {seed}: {type(e).__name__}: {e} "
                    f"({Path(where.filename).name}:{where.lineno}) {sample(seed)}"
                )
    print(
        f"{flags.count} combinations, {refused} flags refused, {len(failed)} failed: {failed}, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
