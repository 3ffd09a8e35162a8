"""
Numbers and switches: each value is refused in one line before the first step, or a run with it can
be finished; each switch that is accepted does something; and what an older version wrote still
means what it meant.
"""

import dataclasses
import json
import math
import random
import shutil
import struct
import time
import tomllib
import typing
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import sampler
import torch
from helpers import ROOT, alone, build, tg, tiny, write_shard
from test_artifact import exported, forge

import pre_pre_train as ppt

# a configuration and an artifact of this project at 21f4c0f
OLD = Path(__file__).parent / "written_before"
ODD = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "0": 0,
    "1e30": 1e30,
    "2^40": 2**40,
    "-2^63": -(2**63),
    "1e-45": 1e-45,
}


# may be as high as fp32 goes
RATES = ("matrix_lr", "adamw_lr", "embed_lr", "head_lr", "tied_lr", "scalar_lr")


def numeric(kind: type) -> list[str]:
    return [name for name, of in typing.get_type_hints(kind).items() if of in (int, float)]


def odd_values(kind: type, name: str) -> list:
    """The odd values that the field's type can hold; a schedule takes them as text."""
    if name in tg.SCHEDULES:
        return [f"{v}" for v in ODD.values()] + [f"0:1 0.5:{v}" for v in ODD.values()]
    whole = typing.get_type_hints(kind)[name] is int
    return (
        [v for v in ODD.values() if isinstance(v, int)]
        if whole
        else [float(v) for v in ODD.values()]
    )


def refusal(check) -> str | None:
    """
    The one line of a refusal; None where there is none. Anything else than a UserError is a fault.
    """
    try:
        check()
    except tg.UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000
        return str(e)
    return None


# --- numbers


def test_every_number_and_schedule_has_limits():
    """
    A new flag gets its line in its section's LIMITS (a table's key in TABLE_LIMITS), so that nan
    and 1e30 are refused.
    """
    assert set(tg.LIMITS) == {*numeric(tg.Config), *tg.SCHEDULES}
    for part in tg.SECTIONS:
        assert set(part.LIMITS) <= set(part.__annotations__), part
    tables = {k: v for table in tg.TABLES.values() for k, v in table.items()}
    assert len(tables) == sum(map(len, tg.TABLES.values()))
    assert set(tg.TABLE_LIMITS) == {key for key, v in tables.items() if type(v) is not str}
    assert all(tg.TABLE_LIMITS[k][0] <= tables[k] <= tg.TABLE_LIMITS[k][1] for k in tg.TABLE_LIMITS)
    own = set(numeric(ppt.PrePreConfig)) - set(numeric(tg.Config))
    assert set(ppt.NcaConfig.LIMITS) == own


@pytest.mark.parametrize("name", [*numeric(tg.Config), *tg.SCHEDULES])
def test_odd_number_is_refused_by_name_or_lies_within_its_limits(name):
    """
    In a line that names the flag; nan and infinity always, on the command line and in TOML alike.
    """
    plain = tiny(loop="0:2", repeats="1", window="8")
    for value in odd_values(tg.Config, name):
        cfg = dataclasses.replace(plain, **{name: value})
        said = refusal(lambda cfg=cfg: tg.validate(cfg))
        assert said is None or name in said, said
        text = str(value)
        if "nan" in text or "inf" in text or "e+30" in text and name not in RATES:
            assert said, f"{name} = {value} is accepted"
        if said is None:
            assert tomllib.loads(tg.config_toml(cfg))[name] == value  # what runs can be read again
            numbers = tg.Schedule(name, value).values() if name in tg.SCHEDULES else [value]
            assert all(tg.LIMITS[name][0] <= x <= tg.LIMITS[name][1] for x in numbers)


@pytest.mark.parametrize(
    "flag", ["--grad_clip", "--matrix_lr", "--beta1", "--rope_base", "--attn_scale"]
)
@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e400"])
def test_odd_number_on_the_command_line_is_refused(flag, value):
    with pytest.raises(tg.UserError, match=flag[2:]):
        tg.parse_args([flag, value])


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e999", "9" * 400])
@pytest.mark.parametrize(
    "key, table", [("grad_clip", ""), ("temperature", "[score]"), ("target", "[rule]")]
)
def test_odd_number_in_a_preset_is_refused(tmp_path, key, table, value):
    (tmp_path / "a.toml").write_text(f"{table}\n{key} = {value}\n")
    with pytest.raises(tg.UserError, match=key):
        tg.parse_args(["--config", str(tmp_path / "a.toml")])


@pytest.mark.parametrize("table", tg.TABLES)
def test_number_of_a_table_is_refused_by_name_or_lies_within_its_limits(table):
    tried = 0
    for key, plain in tg.TABLES[table].items():
        if type(plain) is str:
            continue
        for value in ODD.values():
            if type(plain) is int and type(value) is float:
                continue
            said = refusal(lambda key=key, v=value: tg.checked({table: {key: v}}, "x.toml"))
            low, high = tg.TABLE_LIMITS[key]
            if low <= value <= high:
                assert said is None
            else:
                assert f"[{table}]" in said and key in said and "x.toml" in said
                tried += 1
    assert tried > 20


@pytest.mark.parametrize(
    "word",
    [
        "x=inf",
        "x=nan",
        "x=-1",
        "x=0.1/1",
        "x=0.1/nan",
        "x=0.1/0.9/-1",
        "x=0.1/0.9/0.9/inf",
        "x=0.1/0.9/0.9/0/1",
        "x=",
        "x",
        "(=1",
        "x=1e39",
        "0.5",
        "=0.5",
    ],
)
def test_odd_rate_of_own_lr_is_refused(word):
    assert "own_lr" in refusal(lambda: tg.validate(tiny(own_lr=word)))


@pytest.mark.parametrize("name", numeric(ppt.PrePreConfig))
def test_odd_number_of_pre_pre_training_is_refused_or_can_be_reckoned_with(name):
    began = time.perf_counter()
    for value in odd_values(ppt.PrePreConfig, name):
        said = refusal(
            lambda value=value: ppt.make_config(**{"depth": 1, "dim": 32, "heads": 2, name: value})
        )
        if isinstance(value, float) and not math.isfinite(value):
            assert said and name in said
    assert time.perf_counter() - began < 5


def test_accepted_zero_or_minus_one_of_every_number_trains(tmp_path):
    """
    Validation is not enough: each accepted value goes through the first step of a tiny run, and its
    loss is finite.
    """
    tried = 0
    data = sampler.make_data(tmp_path / "data")
    for name in numeric(tg.Config):
        for value in (-1, 0, 1e-45, 1e30):
            kind = typing.get_type_hints(tg.Config)[name]
            if kind is int and value != int(value) or value == getattr(tiny(), name):
                continue
            cfg = tiny(
                **{
                    "data": data,
                    "log_dir": str(tmp_path),
                    "export": "",
                    "epochs": 0,
                    "seq_len": "16",
                    "dim": 16,
                    "batch_tokens": "32",
                    "depth": 1,
                    "micro_tokens": 32,
                    "head_init": "0.1",
                    "loss_chunk": 16,
                    "val_tokens": 32,
                    name: kind(value),
                }
            )
            if refusal(lambda cfg=cfg: tg.validate(cfg)) is not None:
                continue
            run = tg.Run(cfg)
            found = {}
            if (
                refusal(lambda run=run, cfg=cfg, found=found: found.update(p=tg.build(cfg, run)))
                is None
            ):
                loss, size = tg.train_step(found["p"], 0, found["p"].plan.at(0, 0.0))
                assert loss.isfinite().all() and size.isfinite().all(), f"{name} = {value}"
                tried += 1
    assert tried >= 58  # flags of scores, samples and rules are no longer among them
    assert not list(tmp_path.glob("test"))


# --- texts and files


def test_text_that_is_no_utf8_is_refused_before_a_folder_is_made(tmp_path):
    for key in ("run", "data", "arm", "log_dir"):
        assert key in refusal(lambda key=key: tg.validate(tiny(**{key: "caf\udce9"})))
    assert "config" in refusal(lambda: tg.validate(tiny(config=("caf\udce9.toml",))))
    assert "zero byte" in refusal(lambda: tg.validate(tiny(data="a\0b")))


def test_run_is_read_from_another_working_directory(tmp_path, monkeypatch):
    """
    Its relative data and tokenizer lie where it was started, above its folder; what is found from
    here comes first.
    """
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "t.model").write_text("x")
    cfg = tiny(data="data", tokenizer="data/t.model", log_dir="logs")
    monkeypatch.chdir(home)
    run = tg.Run(cfg)
    model = build(cfg)
    opt = tg.MuonAdamW(cfg, model, alone())
    loader = type("Position", (), {"state_dict": lambda self: {}, "identity": lambda self: {}})()
    trainer = SimpleNamespace(
        run=run, model=model, opt=opt, avg=tg.Averages(cfg, opt), loader=loader
    )
    tg.save_checkpoint(trainer, 1)
    assert tg.open_source("logs/test")[0].tokenizer == "data/t.model"
    monkeypatch.chdir(tmp_path)
    found = tg.open_source("home/logs/test")[0]
    assert (found.data, found.tokenizer) == (str(home / "data"), str(home / "data" / "t.model"))
    assert tg.found_near(tiny(tokenizer="train_gpt.py", data="none"), tmp_path).tokenizer == str(
        ROOT / "train_gpt.py"
    )
    assert tg.found_near(tiny(tokenizer="nowhere"), tmp_path).tokenizer == "nowhere"


# --- what the end needs is asked before the beginning

MANY = " ".join(f"{i}s:{i + 1}" for i in range(1, 990))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"swa_every": 10, "steps": 5, "final_weights": "swa"}, "no snapshot"),
        ({"swa_every": 6, "steps": 10}, "no snapshot"),
        ({"swa_every": 5, "steps": 19, "swa_start": 0.8}, "no snapshot"),
        ({"export": "fit"}, "artifact_limit"),
        ({"qat": "0 0.8>1", "export": "int6"}, "':'"),
        ({"qat": "0 1:1", "export": "int6"}, "ends before"),
        ({"qat": "0 0.5:2", "export": "int6"}, "qat"),
        ({"qat": "0.5", "export": "int6"}, "whole numbers"),
        ({"cross_repeat": 1}, "repeat nothing"),
        ({"cross_repeat": 1, "loop": "0:1"}, "repeat nothing"),
        ({"unet": 1, "depth": 1}, "no halves"),
        ({"loop": "0:2", "repeats": "10000"}, "repeats"),
        ({"loop": "0:1000", "depth": 1000, "repeats": "1000"}, "applications"),
        ({"loop": "0:1", "repeats": f"1 {MANY}"}, "applications"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_only_the_end_would_find_is_refused_at_the_start(changes, words):
    assert words in refusal(lambda: tg.validate(tiny(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"swa_every": 5, "steps": 20, "swa_start": 0.8},
        {"swa_every": 10, "steps": 10},
        {"swa_every": 7, "steps": 10, "swa_start": 0.7},
    ],
    ids=str,
)
def test_average_with_one_snapshot_is_accepted_and_takes_it(changes):
    cfg = tiny(**changes)
    tg.validate(cfg)
    avg = tg.Averages(cfg, tg.MuonAdamW(cfg, build(cfg), alone()))
    for step in range(1, cfg.steps + 1):
        avg.update(step, step / cfg.steps)
    assert avg.swa_count >= 1


def test_clock_that_ends_before_the_first_snapshot_leaves_the_last_weights_as_the_average(tmp_path):
    """
    Nobody knows at the start how many steps a clock allows; the run is finished all the same, and
    its export loads.
    """
    data = sampler.make_data(tmp_path / "data")
    cfg = tiny(
        **sampler.BASE
        | {
            "data": data,
            "log_dir": str(tmp_path),
            "steps": 10**6,
            "max_seconds": 0.2,
            "eval_every": 0,
            "swa_every": 10**6,
            "swa_start": 1.0,
            "final_weights": "swa",
            "save_every": 0,
            "export": "int8",
        }
    )
    tg.validate(cfg)
    result = sampler.outcome(sampler.trained(cfg))
    assert result["val_loss"] == result["val_loss_swa"]
    exact = tg.open_source(str(tmp_path / "test"), exact=True)[1]
    weights = tg.read_tensors(tg.checkpoints(tmp_path / "test")[-1] / "model.safetensors")
    assert all(torch.equal(exact[name], weights[name].float()) for name in weights)


def write_config(cfg: tg.Config, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tg.config_toml(cfg))


def test_flags_of_the_end_may_change_when_an_unfinished_run_goes_on(tmp_path):
    """
    They stay part of the experiment's hash; with rounding in training, export shapes the steps and
    stays as it was.
    """
    folder = tmp_path / "test"
    scores = {"modes": "sliding", "stride": 8}
    old = tiny(export="int8", score=scores, artifact_limit=10, log_dir=str(tmp_path))
    write_config(old, folder)
    new = dataclasses.replace(
        old, export="int6 head:8", score={}, rule={"p": 0.5}, artifact_limit=0, resume=True
    )
    tg.check_folder(new, folder)
    assert tg.config_hash(old) != tg.config_hash(new)
    # what is read when all is done is no part of the experiment
    assert tg.config_hash(dataclasses.replace(old, score={}, rule={"p": 0.5})) == tg.config_hash(
        old
    )
    with pytest.raises(tg.UserError, match="matrix_lr"):
        tg.check_folder(dataclasses.replace(new, matrix_lr=0.01), folder)
    shutil.rmtree(folder)
    write_config(dataclasses.replace(old, qat="1"), folder)
    with pytest.raises(tg.UserError, match="export"):
        tg.check_folder(dataclasses.replace(new, qat="1"), folder)


def test_gptq_is_bounded_by_what_the_data_hold_and_says_so(tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", np.arange(330) % 96)
    cfg = tiny(data=str(tmp_path), gptq=10**6, dim=64, steps=2)
    assert tg.calibration(cfg, 10**6).shape == (10, 33)
    write_shard(tmp_path / "x_val_000000.bin", np.arange(330) % 96)
    said = "notice: gptq = 1000000 rows, but the first train shard holds 10: they are all"
    for count, notices in ((10**6, [said]), (10, [])):
        with tg.Run(dataclasses.replace(cfg, gptq=count, log_dir=str(tmp_path))) as run:
            tg.build(run.cfg, run)
            assert [line for line in run.early if "gptq" in line] == notices
    write_shard(tmp_path / "x_train_000000.bin", np.arange(32))
    assert "rows of 32" in refusal(lambda: tg.calibration_rows(cfg, 10**6))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"export": "int6", "qat": "1"}, "qat round"),
        ({"export": "int6", "gptq": 2}, "gptq round"),
        ({"export": "int6 mlp:5"}, "matches no matrix"),
    ],
    ids=str,
)
def test_model_without_matrices_to_round_is_refused_at_the_start(changes, words):
    cfg = tiny(**changes)
    assert words in refusal(lambda: tg.check_artifact(cfg, build(cfg)))


# --- switches


IDLE = [
    {"window_pattern": "L", "window": "8"},
    {"window_pattern": "S", "window": "8", "depth": 1},
    {"window_long": "8"},
    {"yarn": 1, "window_pattern": "SL", "window": "4", "window_long": "8"},
    {"qat_noise": 1},
    {"row_norm": 1, "optimizer": "adamw"},
    {"normuon": 0.9, "optimizer": "adamw"},
    {"cautious": 1},
    {"cautious": 2, "embed_wd": 0.1},
    {"cautious": 2, "embed_wd": 0.1, "optimizer": "adamw"},
    {"decay_by_shape": 1},
    {"decay_by_shape": 1, "matrix_wd": 0.1, "optimizer": "adamw"},
    {"independent_wd": 1},
    {"weight_decay": "0:1 1>0"},
    {"slow": "head"},
    {"slow_lr": "0.5"},
    {"transfer": "attn"},
    {"transfer_skip": "head"},
    {"transfer_control": "random"},
    {"rope_dims": 8},
    {"key_offset": "still", "rope": "standard"},
    {"key_offset": "second", "seq_len": "1"},
    {"stoch_depth": 0.1, "depth": 1},
    {"mtp": 0.3, "seq_len": "1"},
    {"init": "xavier", "init_std": 1.0},
    {"init": "xavier", "head_init": "0.1"},
    {"adamw_matrices": "qkv", "optimizer": "adamw"},
    # no block under a net has a share of the embedding, with which rows come
    {"bigram_rows": 64, "gate_nets": "0", "xsa": -1, "xsa_learned": 1},
    {"bigram_rows": 64, "gate_nets": "1", "xsa": -1, "xsa_learned": 1, "x0_layers": "0"},
]


@pytest.mark.parametrize("changes", IDLE, ids=str)
def test_switch_that_would_do_nothing_is_refused(changes):
    said = refusal(lambda: tg.refuse_idle(tiny(**changes)))
    assert said and said.split(" ")[0] in changes and "does nothing" in said


@pytest.mark.parametrize(
    "changes", [{"weight_decay": "0:1 1>0"}, {"independent_wd": 1}, {"cautious": 1}], ids=str
)
def test_a_decay_of_own_lr_is_one_that_other_switches_act_on(changes):
    tg.refuse_idle(tiny(own_lr="embed=0.1/0.8/0.95/0.1", **changes))


def test_neutral_configuration_and_every_preset_have_no_idle_switch():
    """Every preset was parsed by the tests of the presets; here as it stands under on_cpu."""
    tg.refuse_idle(tg.Config())
    for path in sorted((ROOT / "configs").glob("*.toml")):
        if not tg.is_layer(path):
            plain = ["--loop", "", "--repeats", "1", "--cross_repeat", "0"]
            fitted = golden.fitted_lists(path.stem)
            tg.parse_args(["--config", path.stem, "on_cpu", *plain, *fitted])


def test_run_that_was_begun_goes_on_although_one_of_its_switches_does_nothing(tmp_path):
    """It was accepted once, and its configuration is frozen."""
    flags = ["--cautious", "1", "--run", "r", "--log_dir", str(tmp_path)]
    with pytest.raises(tg.UserError, match="cautious"):
        tg.parse_args([*flags, "--resume"])
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.toml").write_text("cautious = 1\n")
    assert tg.parse_args([*flags, "--resume"]).cautious == 1
    with pytest.raises(tg.UserError, match="cautious"):
        tg.parse_args(flags)


def test_pattern_that_finds_nothing_is_refused_or_told():
    def notices(**changes) -> list[str]:
        return tg.pattern_notices(tiny(**changes), build(tiny(x0_lambda=0.1)))

    for pattern in ("nothing", "head"):
        refused = refusal(lambda pattern=pattern: notices(adamw_matrices=pattern))
        assert "adamw_matrices" in refused
    assert notices(adamw_matrices="qkv", own_lr="qkv=0.1 x0_lambda=0.1") == []
    (line,) = notices(own_lr="qkv=0.1 x0_lambda=0.1")
    assert "'qkv'" in line and "AdamW" in line


def test_own_rate_betas_and_decay_are_those_of_torch(tmp_path):
    """
    Two parameters with rates of their own, the rest as usual, over five steps of torch.optim.AdamW.
    """
    cfg = tiny(
        own_lr="x0_lambda=0.3/0.7 attn_gate=0.2/0.9/0.99/0",
        adamw_matrices="attn_gate",
        x0_lambda=0.5,
        attn_gate=8,
        matrix_wd=0.7,
        scalar_wd=0.3,
        scalar_lr=0.05,
        adam_eps=1e-8,
    )
    model = build(cfg)
    mine = {n: p for n, p in model.named_parameters() if "x0_lambda" in n or "attn_gate" in n}
    with torch.no_grad():
        for p in mine.values():
            p.fill_(0.5)
    copies = {n: p.detach().clone().requires_grad_() for n, p in mine.items()}
    optim = torch.optim.AdamW(
        [
            {"params": [p], "lr": 0.3, "betas": (0.7, 0.95), "weight_decay": 0.3}
            if "x0" in n
            else {"params": [p], "lr": 0.2, "betas": (0.9, 0.99), "weight_decay": 0.0}
            for n, p in copies.items()
        ],
        eps=1e-8,
    )
    opt, rng = tg.MuonAdamW(cfg, model, alone()), torch.Generator().manual_seed(0)
    for step in range(5):
        for n, p in mine.items():
            p.grad.copy_(torch.randn(p.shape, generator=rng))
            copies[n].grad = p.grad.clone()
        opt.step(tg.Plan(cfg).at(step, 0.0)._replace(lr=1.0, weight_decay=1.0))
        optim.step()
    for n, p in mine.items():
        assert torch.allclose(p, copies[n], atol=1e-6), n


# Combinations that once failed: what happened with each stands before it.
ONCE = {
    "a stride longer than the row": {
        "eval_seq_len": 8, "score": {"modes": "mixture ttt", "stride": 64}, "export": "int8",
        "tie_embed": 1, "batch_tokens": "0:64 1s:128", "kv_heads": 1, "ema": 0.9,
    },
    "a loop that is not repeated": {
        "q_gain": 1.5, "xsa": 4, "loop": "0:1", "row_norm": 1, "head_multiple": 64,
    },
    "a decay of scalars in a model without any": {
        "scalar_wd": 0.5, "shuffle": 1, "value_proj": 32, "mu_loss": 10.0, "init_std": 1.0,
        "polar": "polar_express", "activation": "leaky_relu2", "mtp": 0.3,
    },
    "qat_noise without an export": {
        "cross_repeat": 1, "qat_noise": 1, "batch_tokens": "0:64 1s:128", "z_loss": 0.1,
        "embed_wd": 0.5, "doc_mask": 1, "softcap": 5.0, "repeats": "2", "loop": "0:1",
    },
    "qat_noise behind a schedule that was refused": {
        "kv_heads": 1, "block_scales": 1, "qat_noise": 1, "rope_dims": 8, "epochs": 3,
        "logit_dim_power": -0.5, "qat": "0:0 1s:1", "rope": "interleaved", "export": "fit",
    },
}  # fmt: skip


@pytest.mark.parametrize("flags", ONCE.values(), ids=list(ONCE))
def test_combination_that_once_failed_is_refused_or_trains_resumes_and_reads_back(tmp_path, flags):
    sampler.check(0, tmp_path, flags)


@pytest.mark.parametrize("seed", range(1000, 1025))
def test_combination_of_switches_is_refused_or_trains_resumes_and_reads_back(tmp_path, seed):
    sampler.check(seed, tmp_path)


# --- what older versions wrote


def test_configuration_written_before_loads_and_new_flags_are_neutral():
    """What became keys of a table is found there; names that are gone did nothing."""
    cfg = tg.Config(**tg.read_toml(OLD / "config.toml"))
    raw = tomllib.loads((OLD / "config.toml").read_text())
    assert len(raw) > 130
    moved = {
        "rule": {key.removeprefix("rule_") for key in raw if key.startswith("rule_")},
        "score": {"stride", "prove_bytes", "prompt", "sample_tokens", "temperature", "top_k"},
    }
    assert cfg.rule == {key: raw[f"rule_{key}"] for key in moved["rule"]}
    assert len(cfg.rule) == 7 and cfg.rule.keys() == tg.TABLES["rule"].keys()
    assert cfg.score == {key: raw[key] for key in moved["score"]} | {"modes": raw["score"]}
    assert cfg.score["prompt"] == 'say "hé"'
    for f in dataclasses.fields(tg.Config):
        if f.name in tg.TABLES:
            continue
        if f.name in raw:
            assert getattr(cfg, f.name) == raw[f.name]
        else:
            assert getattr(cfg, f.name) == f.default
    tables = {f"rule_{key}" for key in moved["rule"]} | moved["score"]
    assert raw.keys() - tg.FIELDS - tables == tg.REMOVED.keys() - {"score"}
    assert "sample_from = 'x'" in refusal(lambda: tg.checked({"sample_from": "x"}, "x"))


def test_artifact_and_checkpoint_written_before_load(tmp_path, monkeypatch):
    """
    With the configuration's own values, and with a name that this version lacks at its neutral
    value.
    """
    cfg, named = tg.load_artifact(OLD / "model.nrx")
    assert cfg.dim == 64 and named["head"].shape == (64, 64)
    build(cfg).load_state_dict(named)
    monkeypatch.setitem(tg.REMOVED, "gone", 0)
    text = (OLD / "config.toml").read_text()
    folder = tmp_path / "ckpt" / "000001"
    folder.mkdir(parents=True)
    tg.write_tensors({k: v.contiguous() for k, v in named.items()}, folder / "model.safetensors")
    for value, said in ((0, None), (1, "gone = 1, but this version has no gone.*gone = 0")):
        (folder / "config.toml").write_text(f"{text}gone = {value}\n")
        (folder / "DONE").touch()
        artifact = forge(
            OLD / "model.nrx",
            header=lambda h, v=value: h.update(config=h["config"] + f"gone = {v}\n"),
            to=tmp_path / "forged.nrx",
        )
        readers = (
            lambda: tg.open_source(str(tmp_path))[0],
            lambda a=artifact: tg.load_artifact(a)[0],
            lambda: tg.Config(**tg.read_toml(folder / "config.toml")),
        )
        for read in readers:
            if said:
                with pytest.raises(tg.UserError, match=said):
                    read()
            else:
                assert isinstance(read(), tg.Config)
    assert "unknown key gine" in refusal(lambda: tg.checked({"gine": 0}, "x"))


# --- artifacts whose configuration is a lie


LIES = [
    f"head_dim = {10**11}",
    "head_dim = 65536",
    "dim = 65536",
    f"depth = {10**9}",
    f"steps = {2**62}",
    f'repeats = "{10**7}"\nloop = "0:1"',
    f'seq_len = "{2**21}"',
    f"eval_seq_len = {2**40}",
    "mlp_ratio = 1e30",
    f"value_embeds = {10**9}",
    f"heads = {2**40}",
    f"head_multiple = {2**40}",
    "rope_dims = 1000000000000",
    'lr = "' + "0:1 " * 100_000 + '"',
    f'batch_tokens = "0:1 {"1s:2 " * 2000}"',
    "norm_eps = nan",
    "softcap = inf",
    f"polar_steps = {10**12}",
    "x = " + "[" * 100_000,
    f"seed = -{2**70}",
    'maxwell = "x"',
    f"vocab = {2**31}",
    f"kv_heads = -{2**31}",
    f"embed_stats = {'9' * 5000}",
    f'repeats = "1 {MANY}"\nloop = "0:1"',
    f'window_long = "2 {MANY}"\nyarn = 1',
    f'window_long = "2 {MANY[:300]}"\nyarn = 1\neval_seq_len = {2**20}',
    'fp8 = "(.|.)*!"\nsampled_classes = "64 0.5:72"',
    f'run = "{"x" * 30_000}"',
]


@pytest.mark.parametrize("lie", LIES, ids=lambda x: x[:40])
def test_lie_in_the_configuration_of_an_artifact_costs_neither_time_nor_memory(tmp_path, lie):
    path = tmp_path / "model.nrx"
    exported(path)
    names = [line.split(" = ")[0] for line in lie.split("\n")]

    def change(h):
        kept = [line for line in h["config"].splitlines() if line.split(" = ")[0] not in names]
        h["config"] = "\n".join([*kept, lie, ""])

    began = time.process_time()
    said = refusal(lambda: tg.load_artifact(forge(path, header=change)))
    assert said and "forged.nrx" in said and time.process_time() - began < 2


def test_patterns_of_an_artifact_that_only_training_reads_are_not_run(tmp_path):
    endless = f"^({'|'.join('.' * 60)})*!"
    exported(tmp_path / "model.nrx", untie_at="0.5", tie_embed=1)

    def change(h):
        for key in ("slow", "adamw_matrices", "own_lr", "tail_blend"):
            lines = h["config"].splitlines()
            at = [line.split(" = ")[0] for line in lines].index(key)
            h["config"] = "\n".join([*lines[:at], f'{key} = "{endless}"', *lines[at + 1 :], ""])

    began = time.process_time()
    cfg = tg.load_artifact(forge(tmp_path / "model.nrx", header=change))[0]
    assert time.process_time() - began < 2
    assert cfg.untie_at == "0.5" and not cfg.slow and not cfg.own_lr


def test_sizes_of_an_artifact_that_cancel_out_are_refused(tmp_path):
    """A negative length may not hide a positive one, nor codes a range that int8 does not hold."""
    path = tmp_path / "model.nrx"
    exported(path)
    for change in (
        lambda h: h["tensors"].update(
            a={"kind": "rows", "shape": [-(2**50)], "levels": 127},
            b={"kind": "rows", "shape": [2**50], "levels": 127},
        ),
        lambda h: h["tensors"]["head"].update(levels=10**9),
        lambda h: h["tensors"]["head"].update(levels=200),
        lambda h: h["tensors"]["head"].update(shape=[384.0, 256]),
    ):
        assert "forged.nrx" in refusal(
            lambda change=change: tg.load_artifact(forge(path, header=change))
        )


def test_mutated_configuration_of_an_artifact_is_refused_or_loads_as_a_model_that_runs(tmp_path):
    """
    Each field with odd values, and random damage to the text; what loads is built and gives a
    distribution.
    """
    path, rng = tmp_path / "model.nrx", random.Random(0)
    exported(path)
    (size,) = struct.unpack("<I", path.read_bytes()[8:12])
    lines = json.loads(path.read_bytes()[12 : 12 + size])["config"].splitlines()
    odd = [
        "nan",
        "inf",
        "-1",
        "0",
        "1e30",
        str(2**40),
        "1",
        '""',
        '"0:1 0.5:3"',
        '"x"',
        "[]",
        "true",
        '"1e9"',
    ]
    texts = []
    for i, line in enumerate(lines):
        key = line.split(" = ")[0]
        texts += [
            "\n".join([*lines[:i], f"{key} = {v}", *lines[i + 1 :]]) for v in rng.sample(odd, 4)
        ]
    for _ in range(100):
        text = list("\n".join(lines))
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.choice('0123456789.e-"=[]\n ainf')
        texts.append("".join(text))
    loaded, began = 0, time.process_time()
    for text in texts:
        found = {}

        def load(text=text, found=found):
            found["it"] = tg.load_artifact(
                forge(path, header=lambda h: h.__setitem__("config", text))
            )

        if refusal(load) is None:
            cfg, named = found["it"]
            plan = tg.Plan(cfg)
            model = tg.build_model(
                cfg, torch.device("cpu"), torch.float32, min(64, plan.max_seq_len)
            )
            tg.load_weights(model, named, "x")
            now = plan.at(cfg.steps, 1.0)
            logits = model.logits(model.hidden(torch.tensor([[1, 2]]), now.repeats, now.window))
            assert logits.shape[:2] == (1, 2)
            loaded += 1
    assert loaded > 50 and time.process_time() - began < 60, (loaded, time.process_time() - began)
