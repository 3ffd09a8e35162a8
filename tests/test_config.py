"""
Config and schedules: nothing that a user writes is misread, and every impossible wish is refused by
name.
"""

import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys
import tomllib

import golden
import pytest
from helpers import ROOT, tg, tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

PRESETS = sorted((ROOT / "configs").glob("*.toml"))
NAMES = [p.stem for p in PRESETS]
LAYERS = {"on_cpu", "one_gpu"}  # presets that are meant to lie behind another


def preset(*names: str, flags: tuple[str, ...] = ()) -> tg.Config:
    return tg.parse_args(["--config", *names, *flags])


def refused(capsys, *argv: str) -> str:
    """What the command line says when it refuses these flags; it must leave with code 2."""
    with pytest.raises(SystemExit) as left:
        tg.parse_args(list(argv))
    assert left.value.code == 2
    said = capsys.readouterr()
    return said.out + said.err


# --- help


def test_every_field_has_a_comment_for_its_help():
    """
    The comment above or behind a field is its help text: read from the source, not through tyro.
    """
    text = "".join(map(inspect.getsource, tg.SECTIONS))
    found = re.findall(r"((?:    # .+\n)*)    (\w+): [^=\n]+ = [^#\n]*(#.+)?\n", text)
    told = {name: above + behind for above, name, behind in found}
    assert told.keys() == tg.FIELDS.keys() - tg.TABLES.keys()
    flags = tg.FIELDS.keys() - tg.TABLES
    assert all(len(told[name]) >= 5 for name in flags)


def test_help_lists_every_flag_and_spells_it_as_messages_do(capsys):
    with pytest.raises(SystemExit) as left:
        tg.parse_args(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for name in tg.FIELDS:
        listed = bool(re.search(rf"--{name}\b", text))
        assert listed == (name not in tg.TABLES), f"--help does not list --{name}"
    squeezed = re.sub(r"[\s│]+", " ", text)
    for words in ("optimizer steps at most", "decoupled weight decay of matrices", "Newton-Schulz"):
        assert words in squeezed


def test_flags_are_understood_with_dash_or_underscore():
    assert (
        preset("remix_m", flags=("--batch_tokens", "1024", "--micro-tokens", "512")).micro_tokens
        == 512
    )


@pytest.mark.parametrize("flag", ["--stride", "--score=sliding", "--rule_p", "--sample-tokens"])
def test_flag_that_became_a_key_of_a_table_is_refused_with_its_place(flag):
    with pytest.raises(tg.UserError, match=r"no flag of training, but \w+ of a preset's \["):
        tg.parse_args([flag, "1"])


# --- presets


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_preset_loads_and_has_a_header(path):
    cfg = preset(*(["remix_m"] if path.stem in LAYERS else []), path.stem)
    head = path.read_text().split("\n\n")[0]
    assert head.startswith(f"# {path.stem}: ")
    for word in ("track:", "hardware:", *(() if path.stem in LAYERS else ("expected:", "source:"))):
        assert word in head, f"{path.name} does not say its {word}"
    tg.Plan(cfg).train_shapes(1)


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_preset_has_only_keys_that_are_fields_or_tables(path):
    """
    A preset lists differences; a layer may set what is the default, because it undoes the preset
    before it.
    """
    if path.stem in LAYERS:
        return
    for key, value in tomllib.loads(path.read_text()).items():
        assert key in tg.FIELDS and key not in tg.MOVED or isinstance(value, dict)
        if key in tg.TABLES:
            assert value.keys() <= tg.TABLES[key].keys()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in LAYERS])
def test_on_cpu_keeps_the_recipe_of_a_preset(name):
    """The layer may change sizes, never optimizer, schedules, tying or softcap."""
    plain = preset(name)
    # a span beyond the layer's four
    fitted = ("--loop", "1:3") if tg.loop_span(plain)[1] > 4 else ()
    layered = preset(name, "on_cpu", flags=(*fitted, *golden.fitted_lists(name)))
    for key in (
        "optimizer",
        "matrix_lr",
        "adamw_lr",
        "embed_lr",
        "head_lr",
        "tied_lr",
        "lr",
        "momentum",
        "softcap",
        "tie_embed",
        "matrix_wd",
        "beta1",
        "beta2",
        "norm_eps",
        "attn_scale",
        "rope",
        "head_init",
    ):
        assert getattr(plain, key) == getattr(layered, key), key
    assert layered.device == "cpu" and layered.vocab == 1024


def test_one_gpu_is_remix_m_with_float32_weights_and_no_rule():
    """
    What the layer changes, field by field; all else, sizes and schedules too, is the preset's.
    """
    plain, layered = preset("remix_m"), preset("remix_m", "one_gpu", flags=("--device", "cpu"))
    changed = {k for k in tg.FIELDS if getattr(plain, k) != getattr(layered, k)} - {
        "config",
        "run",
        "device",
    }
    assert changed == {"track", "param_dtype", "loss_chunk", "save_every", "rule"}
    assert plain.rule == {"target": 3.28, "p": 0.01} and layered.rule == {"target": 0, "p": 0}
    assert (plain.param_dtype, layered.param_dtype) == ("bfloat16", "float32")
    assert int(layered.batch_tokens) == 8 * layered.micro_tokens


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_layer_without_a_preset_is_refused(layer):
    with pytest.raises(tg.UserError, match=f"{layer} is a layer.*--config remix_m {layer}"):
        preset(layer)


def test_preset_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbfsteps = 7\r\ndepth = 3\r\n")
    assert (preset(str(path)).steps, preset(str(path)).depth) == (7, 3)


def test_later_layer_and_flag_win(tmp_path):
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text('steps = 1\ndepth = 3\ndim = 192\nrun = "x"\n')
    b.write_text("steps = 2\ndepth = 4\n")
    cfg = preset(str(a), str(b), flags=("--steps", "3"))
    assert (cfg.steps, cfg.depth, cfg.dim) == (3, 4, 192)
    assert preset(str(b), str(a)).steps == 1
    assert preset(str(a), flags=("--config", str(b))).depth == 4
    assert preset(str(a)).config == (str(a),)


def test_flag_behind_config_is_no_preset(capsys):
    with pytest.raises(SystemExit) as left:
        tg.parse_args(["--config", "remix_m", "-h"])
    assert left.value.code == 0 and "--steps" in capsys.readouterr().out


def test_flag_that_equals_the_default_overrides_the_file():
    assert preset("remix_a", flags=("--steps", str(tg.Config().steps))).steps == tg.Config().steps
    assert preset("remix_a", flags=("--tie_embed", "0")).tie_embed == 0


def test_run_is_named_after_its_presets_and_seed():
    assert preset("remix_m", "on_cpu", flags=("--seed", "7")).run == "remix_m-on_cpu-s7"
    assert tg.parse_args([]).run == "run-s1"


# --- tables


def test_tables_of_layers_merge_key_by_key(tmp_path):
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text('steps = 1\n[rule]\ntarget = 3\np = 0.01\n[score]\nmodes = "ttt"\nstride = 8\n')
    b.write_text("[rule]\np = 0.5\n[score]\nstride = 4\nprove_bytes = 9\n")
    cfg = preset(str(a), str(b))
    assert (cfg.steps, cfg.rule) == (1, {"target": 3.0, "p": 0.5})
    assert cfg.score == {"modes": "ttt", "stride": 4, "prove_bytes": 9}
    assert preset(str(b), str(a)).rule == {"p": 0.01, "target": 3.0}
    assert preset(str(a)).score == {"modes": "ttt", "stride": 8}
    assert tg.parse_args([]).rule == tg.parse_args([]).score == {}
    # a layer with the names of before merges alike
    b.write_text('rule_p = 0.5\nscore = "lora"\n')
    cfg = preset(str(a), str(b))
    assert cfg.rule == {"target": 3.0, "p": 0.5} and cfg.score == {"modes": "lora", "stride": 8}


def test_names_of_before_are_read_as_keys_of_their_tables(tmp_path):
    flat = {
        "rule": {f"rule_{key}": key for key in tg.TABLES["rule"]},
        "score": {
            "score": "modes",
            **{
                key: key
                for key in "stride prove_bytes sample_tokens prompt temperature top_k".split()
            },
        },
    }
    assert {old: (table, new) for table, names in flat.items() for old, new in names.items()} == (
        tg.MOVED
    )
    path = tmp_path / "old.toml"
    for table, names in flat.items():
        values = {old: {str: "ttt", int: 7, float: 0.5}[type(tg.TABLES[table][new])]
                  for old, new in names.items()}  # fmt: skip
        path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
        assert tg.read_toml(path) == {table: {new: values[old] for old, new in names.items()}}
    for old, (table, new) in tg.MOVED.items():
        for words in ([f"--{old}", "1"], [f"--{old.replace('_', '-')}=1"]):
            with pytest.raises(
                tg.UserError, match=rf"no flag of training, but {new} .*\[{table}\]"
            ):
                tg.parse_args(words)
    with pytest.raises(SystemExit) as left:
        tg.parse_args(["--sample_from", "1"])
    assert left.value.code == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("[score]\nstrid = 8", ("unknown key strid = 8", "[score]", "stride")),
        ("[rule]\nmetrics = 'x'", ("unknown key metrics = 'x'", "[rule]", "metric")),
        ("[score]\nstride = 'x'", ("stride = 'x'", "[score]", "int")),
        ("[score]\nstride = 8.5", ("stride = 8.5", "[score]", "int")),
        ("[score]\nmodes = ['ttt']", ("modes = ['ttt']", "[score]", "str")),
        ("[score]\ntop_k = true", ("top_k = True", "[score]", "int")),
        ("[score]\nttt_lr = nan", ("ttt_lr = nan", "[score]", "finite")),
        ("[score]\nstride = 0", ("stride = 0", "[score]", "between 1 and")),
        ("[rule]\np = 2", ("p = 2", "[rule]", "between 0 and 1")),
        ("[rule]\ntarget = '3.28'", ("target = '3.28'", "[rule]", "float")),
        ("[rule]\nmax_bytes = 1e6", ("max_bytes = 1000000.0", "[rule]", "int")),
        ("rule = 3", ("rule = 3", "int", "dict")),
        ("stride = 'x'", ("stride = 'x'", "[score]", "int")),
        ("rule_target = -1", ("target = -1", "[rule]", "between 0 and")),
    ],
)
def test_wrong_line_of_a_table_is_named_with_table_key_and_value(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text + "\n")
    with pytest.raises(tg.UserError) as e:
        preset(str(path))
    for word in (str(path), *words):
        assert word in str(e.value)


# --- mistakes


def test_misspelt_flag_is_explained(capsys):
    said = refused(capsys, "--matrix_lrr", "0.1")
    assert "matrix_lrr" in said and re.search(r"--matrix_lr\b", said)


def test_misspelt_preset_is_explained():
    with pytest.raises(tg.UserError, match=r"remix_x.*remix_m"):
        preset("remix_x")


@pytest.mark.parametrize(
    "line, words",
    [
        ("matrix_lrr = 0.1", ("unknown key matrix_lrr", "did you mean", "matrix_lr")),
        ("zzzzzz = 1", ("unknown key zzzzzz", "--help")),
        ("steps = 2.5", ("steps = 2.5", "float", "int")),
        ('depth = "12"', ("depth = '12'", "str", "int")),
        ("depth = true", ("depth", "bool", "int")),
        ("run = 5", ("run = 5", "int", "str")),
        ("lr = true", ("lr = True", "bool", "str")),
        ("resume = 1", ("resume", "int", "bool")),
        ("config = 5", ("config", "list of strings")),
        ("[model]\ndepth = 3", ("model",)),
        ("steps = ", ("not TOML",)),
    ],
)
def test_wrong_preset_line_is_named(tmp_path, line, words):
    path = tmp_path / "mine.toml"
    path.write_text(line + "\n")
    with pytest.raises(tg.UserError) as e:
        preset(str(path))
    for word in (str(path), *words):
        assert word in str(e.value)


def test_preset_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(tg.UserError, match="not TOML"):
        preset(str(path))


@pytest.mark.parametrize(
    "flags", [("--steps", "abc"), ("--softcap", "x"), ("--depth", "1.5"), ("--resume", "3")]
)
def test_wrong_type_of_a_flag_is_named(capsys, flags):
    assert flags[0] in refused(capsys, *flags) or flags[1] in refused(capsys, *flags)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"device": "tpu"}, ("device", "tpu", "cuda")),
        ({"dtype": "float16"}, ("dtype", "float16", "bfloat16")),
        ({"rope": "x"}, ("rope", "truncated")),
        ({"optimizer": "sgd"}, ("optimizer", "sgd", "adamw")),
        ({"polar": "svd"}, ("polar", "svd", "ns5")),
        ({"export": "int3"}, ("export", "int3", "int8")),
        ({"steps": 0}, ("steps = 0",)),
        ({"depth": -1}, ("depth = -1",)),
        ({"log_every": 0}, ("log_every = 0",)),
        ({"head_multiple": 0}, ("head_multiple = 0",)),
        ({"kv_heads": -1}, ("kv_heads = -1",)),
        ({"head_dim": -4}, ("head_dim = -4",)),
        ({"eval_seq_len": -1}, ("eval_seq_len = -1",)),
        ({"swa_every": -1}, ("swa_every = -1",)),
        ({"mlp_ratio": 0.0}, ("mlp_ratio = 0",)),
        ({"seed": -1}, ("seed = -1",)),
        ({"keep": -1}, ("keep = -1",)),
        ({"max_seconds": math.nan}, ("max_seconds",)),
        ({"vocab": 70000}, ("vocab = 70000", "65536")),
        ({"doc_token": 96}, ("doc_token = 96", "vocab = 96")),
        ({"doc_token": -1}, ("doc_token = -1",)),
        ({"dim": 33}, ("dim = 33", "heads = 2")),
        ({"head_dim": 6}, ("head_dim = 6", "4")),
        ({"heads": 4, "kv_heads": 3}, ("heads = 4", "kv_heads = 3")),
        (
            {"eval_every": -1, "epochs": 2, "batch_tokens": "128 0.5:256"},
            ("eval_every count epochs by steps", "batch_tokens = '128 0.5:256'"),
        ),
        ({"ema": 1.0}, ("ema = 1.0",)),
        ({"final_weights": "ema"}, ("ema > 0",)),
        ({"final_weights": "swa"}, ("swa_every > 0",)),
        ({"head_init": "normal"}, ("head_init", "uniform")),
        ({"tie_embed": 1, "head_init": "0.0"}, ("head_init = '0.0'", "tie_embed = 1", "uniform")),
        ({"embed_init": 0.0}, ("embed_init = 0", "head_init = 'zero'", "--head_init")),
        ({"embed_init": 0.0, "head_init": "0"}, ("embed_init = 0", "head_init = '0'")),
        (
            {"sampled_classes": "64 0.5:72", "fp8": "^head$"},
            ("sampled_classes = '64 0.5:72'", "fp8", "16"),
        ),
        ({"sampled_classes": "72", "fp8": "("}, ("fp8 = '('", "regular expression")),
        ({"tie_embed": 1, "untie_at": "3s", "slow": "("}, ("slow = '('", "regular expression")),
        (
            {"tie_embed": 1, "untie_at": "3s", "slow": "^embed$", "slow_lr": "0 10s:1"},
            ("slow = '^embed$'", "untie_at = '3s'", "both"),
        ),
        ({"adamw_matrices": "("}, ("adamw_matrices", "regular expression")),
        *[
            ({key: text}, (key, "regular expression"))
            for key in ("adamw_matrices", "slow", "fp8", "transfer_skip")
            for text in ("a{99999999999999}", "(" * 3000)
        ],
        ({"own_lr": "a{99999999999999}=1"}, ("own_lr", "too large")),
        ({"matrix_lr_mul": "a{99999999999999}=1"}, ("matrix_lr_mul", "too large")),
        ({"tail_blend": "a{99999999999999}=0 0.6"}, ("tail_blend", "names no share")),
        ({"export": "int6 a{99999999999999}:5"}, ("export", "too large")),
        ({"fp8": "(.|.)*!"}, ("fp8 = '(.|.)*!'", "without brackets")),
        ({"fp8": ".*.*.*!"}, ("fp8", "at most two")),
        ({"data": "a" * 30_000}, ("data has 30000 characters",)),
        ({"init_from": "x", "transfer": "["}, ("transfer", "regular expression")),
        ({"run": "a/b"}, ("run", "a/b")),
        ({"run": ".."}, ("run", "..")),
        ({"loop": "1"}, ("loop", "first:end")),
        ({"loop": "1:1"}, ("loop", "1:1")),
        ({"loop": "1:3"}, ("loop", "2 blocks")),
        ({"repeats": "2"}, ("repeats", "--loop")),
        ({"seq_len": "0"}, ("seq_len",)),
        ({"seq_len": "32.5"}, ("seq_len", "whole")),
        ({"window": "0:8 1>16"}, ("window", "':'")),
        ({"window": "-1"}, ("window",)),
        ({"window": "0:8 1:16"}, ("window", "20 steps")),
        ({"loop": "0:1", "repeats": "0:1 20s:2"}, ("repeats", "20 steps")),
        ({"lr": ""}, ("lr", "start with a value")),
    ],
)
def test_impossible_value_is_refused_with_key_and_fix(changes, words):
    with pytest.raises(tg.UserError) as e:
        tg.validate(tiny(**changes))
    for word in words:
        assert word in str(e.value)


def test_tiny_itself_is_accepted():
    """Else the test above would pass for the wrong reason."""
    tg.validate(tiny())


@pytest.mark.parametrize(
    "changes, world",
    [
        ({"batch_tokens": "100"}, 1),
        ({"batch_tokens": "96", "micro_tokens": 64}, 1),
        ({"micro_tokens": 48}, 1),
        ({"batch_tokens": "128"}, 3),
        ({"batch_tokens": "32"}, 64),
        ({"batch_tokens": "128"}, 8),
        ({"seq_len": "0:32 0.5:48"}, 1),
    ],
)
def test_batch_that_does_not_divide_is_refused(changes, world):
    with pytest.raises(tg.UserError, match=r"batch_tokens.*micro_tokens.*seq_len"):
        tg.Plan(tiny(**changes)).train_shapes(world)


# --- the resolved configuration


def test_resolved_config_is_accepted_again(tmp_path):
    for i, cfg in enumerate(
        [
            preset("remix_a"),
            preset("tiny_cpu", flags=("--arm", 'say "hi"\\\n\t\x7f é 🚀 #=[]')),
            tiny(score={"prompt": 'say "hi"\\\n\t\x00\x7f é 🚀 #=[]', "top_k": 3}, rule={"p": 0.1}),
            tiny(adam_eps=1e-30, matrix_lr=1e3, adamw_matrices=r"\.attn\.(qkv|proj)$"),
        ]
    ):
        path = tmp_path / f"{i}.toml"
        path.write_bytes(tg.config_toml(cfg).encode())
        back = tg.Config(**tg.read_toml(path))
        assert dataclasses.replace(back, config=cfg.config) == cfg
        assert tg.parse_args(["--config", str(path)]).lr == cfg.lr


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**62), 2**62))
@settings(max_examples=60)
def test_resolved_config_holds_any_value(text, number, whole):
    text = text.encode("utf-8", "replace").decode()
    cfg = tiny(
        arm=text,
        matrix_lr=number,
        seed=whole,
        rule={"target": number},
        score={"prompt": text, "sample_tokens": whole},
    )
    assert tomllib.loads(tg.config_toml(cfg)) == {
        k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("config", "resume")
    }


def test_hash_sees_the_seed_and_ignores_the_name():
    base = tg.config_hash(tiny())
    assert (
        tg.config_hash(tiny(run="other", arm="b", log_every=7, log_dir="x", device="cuda")) == base
    )
    assert (
        len(
            {
                base,
                tg.config_hash(tiny(seed=2)),
                tg.config_hash(tiny(matrix_lr=0.051)),
                tg.config_hash(tiny(window="8")),
            }
        )
        == 4
    )


# --- schedules


def value(text: str, step: int, total: int) -> float:
    return tg.Schedule("lr", text).at(step, step / total)


@pytest.mark.parametrize(
    "text, expected",
    [  # the docstring's examples at 0, 30, 50, 60, 80, 100 of 100 steps
        ("3", (3, 3, 3, 3, 3, 3)),
        ("0:1 0.5:2", (1, 1, 2, 2, 2, 2)),
        ("0:1 0.6:1 1>0.1", (1, 1, 1, 1, 0.55, 0.1)),
        ("1 1>0", (1, 0.7, 0.5, 0.4, 0.2, 0)),
        ("0:1 30s:2 80s:3", (1, 2, 2, 2, 3, 3)),
        ("0:1 0.5:2 0.65:3", (1, 1, 2, 2, 3, 3)),
        ("0 3/5>6", (0, 3, 5, 6, 6, 6)),
        ("0.85 60s>0.95", (0.85, 0.9, 0.85 + 0.1 * 5 / 6, 0.95, 0.95, 0.95)),
    ],
)
def test_schedule_grammar_is_read_as_documented(text, expected):
    assert [value(text, s, 100) for s in (0, 30, 50, 60, 80, 100)] == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "1 2",
        "0.5:1",
        "0>1",
        "0:1 0.5:2 0.5:3",
        "0:1 0.5:2 0.4:3",
        "0:1 1.5:2",
        "0:1 0.2",
        "1/0",
        "0:1 0.5:",
        "0:1 5s>2 0.5>3",
        "0:1 -5s:2",
        "0:1 3s:2 -0.5:3",
        "1e999",
        "nan",
        "0:1 0.5=2",
        "0:1, 0.5:2",
        "0:1 9s:2 0.5:3 4s:5",
        "0:1 0.5:2 4s:5 0.3:3",
        "0:1 0.5:0.1^2",  # a power of nothing: it was to be a ramp
        "1^3",
    ],
)
def test_wrong_schedule_is_refused(text):
    with pytest.raises(tg.UserError, match=r"^lr = "):
        tg.Schedule("lr", text)


def test_learning_rate_of_remix_a_is_the_originals():
    """Spec 8.7, and at every step the formula of 1.8, written again."""
    cfg = preset("remix_a")
    lr = tg.Schedule("lr", cfg.lr)
    assert lr.at(0, 0) == pytest.approx(1 / 256)
    assert [lr.at(s, s / cfg.steps) for s in (255, 3062)] == pytest.approx([1, 1])
    assert lr.at(4374, 4374 / cfg.steps) == pytest.approx(0.1007, abs=5e-5)
    for s in range(cfg.steps):
        x = s / 4375
        w = (1 - x) / 0.3
        expected = (s + 1) / 256 if s < 256 else 1 if x < 0.7 else w + 0.1 * (1 - w)
        assert lr.at(s, x) == pytest.approx(expected, abs=1e-12)


def test_learning_rate_and_momentum_of_remix_m_are_the_originals():
    cfg = preset("remix_m")
    lr, momentum = tg.Schedule("lr", cfg.lr), tg.Schedule("momentum", cfg.momentum)
    assert lr.at(1499, 1499 / cfg.steps) == 1
    assert lr.at(2499, 2499 / cfg.steps) == pytest.approx(0.1009, abs=5e-5)
    assert (momentum.at(0, 0), momentum.at(300, 300 / 2500)) == pytest.approx((0.85, 0.95))
    for s in range(cfg.steps):
        w = (1 - s / 2500) / 0.4
        assert lr.at(s, s / 2500) == pytest.approx(1 if s < 1500 else w + 0.1 * (1 - w), abs=1e-12)
        assert momentum.at(s, s / 2500) == pytest.approx(0.85 + 0.1 * min(s / 300, 1), abs=1e-12)


def test_constants_of_the_remix_presets_stay():
    """Every constant of spec 1.1 to 1.8, for both presets."""
    a, m = preset("remix_a"), preset("remix_m")
    for cfg in (a, m):
        assert (cfg.depth, cfg.heads, cfg.dim, tg.head_width(cfg), cfg.vocab, cfg.doc_token) == (
            12,
            6,
            768,
            128,
            50257,
            50256,
        )
        assert (cfg.seq_len, cfg.batch_tokens, cfg.val_tokens, cfg.eval_every) == (
            "65536",
            "524288",
            10485760,
            125,
        )
        assert (cfg.norm_eps, cfg.attn_scale, cfg.window, cfg.doc_mask, cfg.rope_base) == (
            2**-7,
            0.12,
            "1024",
            1,
            1024,
        )
        assert (cfg.mlp_ratio, cfg.qk_norm, cfg.rope, cfg.beta2, cfg.adam_eps) == (
            4,
            1,
            "truncated",
            0.95,
            1e-10,
        )
        assert (cfg.grad_clip, cfg.param_dtype, cfg.shuffle, cfg.epochs) == (0, "bfloat16", 0, 1)
    assert (a.steps, a.optimizer, a.tie_embed, a.softcap, a.beta1) == (4375, "adamw", 1, 0, 0.9)
    assert {a.adamw_lr, a.tied_lr} == {0.0021} and {a.matrix_wd, a.embed_wd, a.scalar_wd} == {0.1}
    assert (m.steps, m.optimizer, m.tie_embed, m.softcap, m.beta1) == (2500, "muon", 0, 15, 0.8)
    assert (m.logit_dim_power, m.head_init, m.embed_init) == (-0.5, "zero", 1)
    assert (m.matrix_lr, m.head_lr, m.embed_lr, m.polar, m.polar_steps) == (
        0.05,
        0.22,
        0.6,
        "ns5",
        5,
    )
    assert {m.matrix_wd, m.embed_wd, m.scalar_wd} == {0}


numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6))


@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.booleans(), numbers),
        max_size=6,
        unique_by=lambda p: p[0],
    ),
    numbers,
    st.booleans(),
)
def test_plateau_is_flat_and_ramp_stays_between_its_ends(points, first, in_steps):
    """
    Points at multiples of 1/1000 of 1,000 steps, once as fractions, once as steps: both give the
    same values.
    """
    points = sorted(points)
    unit = (lambda at: f"{at}s") if in_steps else (lambda at: f"{at}/1000")
    text = " ".join(
        [f"0:{first!r}", *(f"{unit(at)}{'>' if ramp else ':'}{v!r}" for at, ramp, v in points)]
    )
    sched = tg.Schedule("lr", text)
    bounds = [(0, False, first), *points]
    for (low, _, a), (high, ramp, b) in zip(bounds, bounds[1:] + [(1001, False, 0.0)]):
        inside = [sched.at(s, s / 1000) for s in range(low, high)]
        if not ramp:
            assert set(inside) == {a}
            continue
        assert inside[0] == a
        assert all(min(a, b) - 1e-6 <= v <= max(a, b) + 1e-6 for v in inside)
        rise = [y - x for x, y in zip(inside, inside[1:])]
        assert all(d * (b - a) >= 0 or abs(d) < 1e-6 for d in rise)
        assert sched.at(high, high / 1000) == b


@given(st.one_of(st.text(), st.text("0123456789.:>s/e+- ", max_size=30)))
@settings(max_examples=300)
@example("0:1 ²:3")
@example("0:1 1e308s:3 1e308/1e-308:2")
@example("0:1 0.00001s:2")
def test_nonsense_schedule_is_read_or_raises_usererror(text):
    """And what is accepted has a finite value everywhere."""
    try:
        sched = tg.Schedule("lr", text)
    except tg.UserError:
        return
    for step in (0, 1, 7, 20):
        assert math.isfinite(sched.at(step, step / 20))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["repeats", "window", "seq_len", "batch_tokens"]),
            st.one_of(
                st.integers(1, 19).map(lambda n: f"{n}/20"),
                st.integers(1, 19).map(lambda n: f"{n}s"),
                st.sampled_from(["0.01", "0.333", "2.5s", "0.999", "1/3"]),
            ),
            st.sampled_from([1, 2, 4]),
        ),
        max_size=5,
        unique_by=lambda p: p[:2],
    )
)
def test_schedule_reaches_only_graphs_that_were_compiled(marks):
    """
    The shapes of every step and of the last evaluation, walked one by one, are all among those to
    compile.
    """
    text = {"repeats": "1", "window": "8", "seq_len": "32", "batch_tokens": "128"}
    scale = {"repeats": 1, "window": 8, "seq_len": 32, "batch_tokens": 128}
    for key, at, factor in marks:
        text[key] += f" {at}:{factor * scale[key]}"
    try:
        plan = tg.Plan(tiny(loop="0:1", steps=20, **text))
    except tg.UserError:
        return  # marks that do not stand in order
    compiled, evaluated = plan.train_shapes(1), plan.eval_shapes()
    for s in range(21):
        n = plan.at(s, plan.fraction(s, 0.0))
        if s < 20:
            assert tg.Shape(plan.micro_rows(n, 1), n.seq_len, n.repeats, n.window) in compiled
        assert plan.eval_shape(n) in evaluated
    assert plan.tokens() == sum(plan.at(s, s / 20).batch_tokens for s in range(20))


def test_capped_clock_reaches_only_graphs_that_were_compiled():
    plan = tg.Plan(
        tiny(loop="0:1", max_seconds=10.0, repeats="0:1 0.5:2", window="0:8 0.3:16", steps=20)
    )
    for step in range(20):
        for tenth in range(11):
            n = plan.at(step, plan.fraction(step, tenth))
            assert tg.Shape(
                plan.micro_rows(n, 1), n.seq_len, n.repeats, n.window
            ) in plan.train_shapes(1)
    assert (
        plan.fraction(3, 9.0) == 0.9
        and plan.fraction(19, 0.0) == 0.95
        and plan.fraction(5, 99.0) == 1.0
    )


# --- import


IMPORT = """
import argparse, os, signal, socket, subprocess, sys
sys.argv = ["x", "--nonsense", "1"]
os.environ.update(RANK="0", WORLD_SIZE="8", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
def no(what):
    def forbidden(*a, **k):
        raise SystemExit(f"import did this: {what}")
    return forbidden
import torch, torch._inductor.compile_fx, tyro  # theirs to do what they like
def state():
    return (dict(os.environ), sorted(os.listdir(".")), torch.get_rng_state().sum().item(),
            torch.get_num_threads(), signal.getsignal(signal.SIGTERM),
            torch.get_float32_matmul_precision())
before = state()
socket.socket.connect = no("network")
subprocess.Popen.__init__ = no("a process")
argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = no("argparse")
torch.distributed.init_process_group = no("a process group")
def audit(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes and "__pycache__" not in str(args[0]):
        no(f"writes {args[0]}")()
sys.addaudithook(audit)
import train_gpt
after = state()
assert before == after, (before, after)
assert not torch.cuda.is_initialized()
heavy = {"wandb", "datasets", "huggingface_hub", "matplotlib", "tiktoken", "sentencepiece"}
assert not heavy & set(sys.modules)
print("clean")
"""


def test_import_does_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.stdout.strip() == "clean", done.stdout + done.stderr


EAGER = """
import sys
from pathlib import Path
from helpers import parts, tg
p = parts(Path.cwd(), val_tokens=256)
p.run.prepare_machine()
now = p.plan.at(0, 0.0)
tg.warm_up(p)
tg.train_step(p, 0, now)
loss = tg.evaluate(p.run, p.graph, p.val, p.plan.eval_shape(now))
print({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules), loss > 1)
"""


def test_what_compiles_nothing_does_not_wait_for_the_compiler_to_load(tmp_path):
    """It takes as long as all else that a run loads; a sample or a test is over before that."""
    done = subprocess.run(
        [sys.executable, "-c", EAGER],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.stdout.splitlines()[-1:] == ["set() True"], done.stdout + done.stderr
