"""logs/study.py: what it calls matched, what it trains and skips, what it pairs and charges."""

import contextlib
import json
import os
import signal
import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, write_shard
from scipy import stats

import train_gpt as tg
from logs import nca, report, study, study_report
from logs.endings import UserError

LM = """device = "cpu"
dtype = "float32"
compile = 0
depth = 1
dim = 32
heads = 2
vocab = 64
doc_token = 0
tokenizer = ""
seq_len = 32
batch_tokens = 128
micro_tokens = 128
steps = 24
eval_every = 6
export = ""
epochs = 0
val_tokens = 256
head_multiple = 32
"""
PLAIN = """base = ["lm"]
baseline = "plain"
metric = "val_loss"
seeds = [1, 2]
differ = ["softcap"]
sizes = ["steps"]
[flags]
matrix_lr = 0.03
[arms]
plain = {}
capped = { softcap = 15, note = "logits within 15" }
"""
NCA = """base = ["lm"]
metric = "val_loss"
seeds = [1, 2]
differ = ["init_from", "transfer", "slow", "slow_lr"]
sizes = ["steps", "epochs"]
analysis = "nca"
[phase1]
device = "cpu"
dtype = "float32"
compile = 0
nca_colors = 3
nca_grid = 6
nca_seq_len = 60
nca_filter = "none"
nca_tokens = 1100
nca_val_tokens = 660
nca_epochs = 1
batch_tokens = 440
micro_tokens = 440
nca_threads = 1
eval_every = 0
optimizer = "adamw"
pre = {}
[arms]
muon = { optimizer = "muon" }
longer = { from = "muon", longer = true }
taken = { from = "muon", phase1 = "pre", transfer = "attn" }
sham = { from = "muon", slow = "attn", slow_lr = "0:0 0.1>1" }
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a preset, two studies and data; gives the names of what is trained."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write_shard(tmp_path / "x_train_000000.bin", rng.integers(0, 64, 2000))
    write_shard(tmp_path / "x_val_000000.bin", rng.integers(0, 64, 300))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/lm.toml").write_text(LM + f"data = {str(tmp_path)!r}\n")
    (tmp_path / "plain.toml").write_text(PLAIN)
    (tmp_path / "nca.toml").write_text(NCA)
    trained, train = [], tg.train

    def recorded(cfg, run, *parts):
        trained.append(cfg.run)
        return train(cfg, run, *parts)

    monkeypatch.setattr(tg, "train", recorded)
    made = {"tokens": 1000, "tokens_per_s": 50000.0, "rules_per_s": 1000.0, "candidates": 20}
    monkeypatch.setattr(nca, "measure", lambda argv: trained.append("measured") or dict(made))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    yield trained
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)


def made(text: str, *flags: str, arms: list[str] = ("*",)) -> study.Study:
    said = tomllib.loads(text)
    arms = study.chosen(said, list(arms))
    return study.Study("x", said, arms, said.get("seeds", [1]), list(flags), [], study.Path("logs"))


def result(name: str, run: str) -> dict:
    with open(f"logs/{name}/{run}/result.json") as f:
        return json.load(f)


########################################
#           Arms and matching          #
########################################


def test_a_studys_name_keeps_its_dots(here):
    """Else cap0.1 and cap0.2 would share a folder."""
    for name in ("cap0.1", "cap0.2"):
        Path(f"{name}.toml").write_text(PLAIN)
        argv = [f"{name}.toml", "--arms", "plain", "--seeds", "1", "--steps", "1"]
        assert study.main(argv) == 0
        assert Path(f"logs/{name}/plain-s1/result.json").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.toml")), ids=str)
def test_the_arms_of_a_shipped_study_are_matched(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = study.read_study(str(path))
    some = ["lr0.01-*"] if "lr" in said.get("grid", {}) else ["*"]
    shipped = study.Study(
        path.stem, said, study.chosen(said, some), said["seeds"], [], [], study.Path("logs")
    )
    shipped.check()
    assert any(arm.against for arm in shipped.arms.values())
    header = path.read_text().splitlines()
    assert header[0].startswith(f"# {path.stem}: ") and header[1].startswith("# question: ")


def test_shipped_arms_of_nca_take_what_they_say():
    arms = study.all_arms(study.read_study("nca"))
    assert len(arms) == 44
    assert arms["muon-freeze-longer"].phase1 == "muon" and not arms["muon-sham"].phase1
    assert arms["adamw-shuffled"].against == "adamw" and arms["muon-hybrid"].against == "muon"
    assert arms["adamw-from-band-2-3"].flags["transfer"] == "attn"
    assert {name for name, arm in arms.items() if not arm.against} == {"adamw", "muon"}


@pytest.mark.parametrize(
    "arm, key",
    [
        ('{ from = "muon", phase1 = "pre", transfer = "attn", matrix_lr = 0.07 }', "matrix_lr"),
        ('{ from = "muon", optimizer = "adamw" }', "optimizer"),
        ('{ from = "muon", softcap = 5 }', "softcap"),
    ],
)
def test_an_arm_that_differs_in_more_than_was_asked_for_is_not_run(
    here, tmp_path, capsys, arm, key
):
    (tmp_path / "nca.toml").write_text(NCA + f"mine = {arm}\n")
    assert study.main(["nca.toml", "--arms", "mine"]) == 2
    said = capsys.readouterr().err
    assert (
        f"arm mine is no fair comparison with muon: beside what may differ it differs in {key}"
        in said
    )
    assert not here and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere"], "no study of that name; there are centering"),
        (["plain.toml", "--arms", "nonsense"], "no such arm; there are plain, capped"),
        (["plain.toml", "--seeds", "1", "1"], "--seeds 1 1: each seed is one run"),
        (["plain.toml", "--softcap", "3"], "--softcap: that is what the arms differ in"),
        (["plain.toml", "--seed=3"], "--seed: "),
        (["plain.toml", "--data", "nowhere"], "nowhere"),
        (["nca.toml", "--max_seconds", "9"], "max_seconds = 9 have no number of steps"),
        (["nca.toml", "--arms", "longer"], "so there is no time to give"),
        (["plain.toml", "--only", "report"], "no run of this study is finished"),
        (["plain.toml", "--softcapp", "3"], "study plain: those are the flags of arm plain"),
    ],
)
def test_bad_input_ends_in_a_line_that_says_what_to_do(here, capsys, flags, message):
    assert study.main(flags) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize(
    "change, message",
    [
        (("metric", "metrics"), "unknown key metrics"),
        (("seeds = [1, 2]", "seeds = 3"), "seeds = 3 must be"),
        (('"plain"', '"none"'), "baseline: no arm is called none"),
        (("plain = {}", 'plain = { from = "x" }'), "no arm before it"),
        (("plain = {}", "plain = { softcap = '{1/0}' }"), "{1/0} cannot be worked out"),
        (("plain = {}", "plain = { softcap = '{open(1)}' }"), "cannot be worked out"),
        (("plain = {}", "plain = { softcap = '{steps.real}' }"), "more than arithmetic"),
        (("[arms]", "[grid]"), "[grid] plain = {} must be a list of numbers or tables"),
        (("= [1, 2]", "="), "is not TOML"),
        (("[1, 2]", "[]"), "plain.toml: seeds = [] must be a list of whole numbers, one at least"),
        (("[1, 2]", '["x"]'), "plain.toml: seeds = ['x'] must be a list of whole numbers"),
        (("[1, 2]", "[1.5]"), "plain.toml: seeds = [1.5] must be a list of whole numbers"),
        (("[1, 2]", "[1, 1]"), "plain.toml: seeds = [1, 1] must be"),
        (('["lm"]', "[3]"), "plain.toml: base = [3] must be a list of texts"),
        (("plain = {}", "plain = 3"), "plain.toml: [arms] plain = 3 must be a table"),
        (("plain = {}", 'plain = { base = "lm" }'), "[arms] plain: base = 'lm' must be a list"),
        (("plain = {}", "plain = { longer = 1 }"), "[arms] plain: longer = 1 must be true or"),
        (("plain = {}", "plain = { softcap = [3] }"), "[arms] plain: softcap = [3] must be a"),
        (("plain = {}", "plain = { softcap = true }"), "study plain: those are the flags of arm"),
        (("[arms]", "[tricks]\na = 3"), "plain.toml: [tricks] a = 3 must be a table { flags }"),
        (("[flags]", "[phase1]\na = [3]\n[flags]"), "[phase1] a = [3] must be a flag or a table"),
        (("[arms]", "[grid]\nx = [[1]]"), "[grid] x = [[1]] must be a list of numbers"),
        (('"plain"', '{ a = "b" }'), "baseline = {'a': 'b'} must be the name of an arm"),
        (("[flags]", "analysis = 'avraging'\n[flags]"), "analysis = 'avraging' must be one of av"),
        (("[flags]", "analysis = 'report'\n[flags]"), "analysis = 'report' must be one of av"),
        (("[flags]", "default = []\n[flags]"), "default = [] must be a list of arms, one"),
        (("[flags]", "default = ['b']\n[flags]"), "default: b: no such arm; there are plain"),
        (("[flags]", "[must]\nsofcap = 3\n[flags]"), "must: sofcap is no flag; did you mean sof"),
        (('["softcap"]', '["sofcap"]'), "differ: sofcap is no flag; did you mean softcap?"),
        (("plain = {}", '"../b" = {}'), "arm '../b': a run's folder is named after it"),
        (("plain = {}", '"a b" = {}'), "arm 'a b': a run's folder is named after it"),
        (("[flags]", '[phase1."../b"]\n[flags]'), "arm '../b': a run's folder is named after it"),
    ],
)
def test_a_study_that_says_nonsense_is_refused(here, tmp_path, capsys, change, message):
    text = PLAIN.replace(*change)
    assert text != PLAIN
    (tmp_path / "plain.toml").write_text(text)
    assert study.main(["plain.toml"]) == 2
    assert message in capsys.readouterr().err and not here


def test_a_study_without_an_arm_is_refused(here, tmp_path, capsys):
    for table in ("arms", "tricks", "grid"):
        (tmp_path / "plain.toml").write_text(PLAIN.split("[arms]")[0] + f"[{table}]\n")
        assert study.main(["plain.toml"]) == 2
        assert f"plain.toml: {table} = {{}} must be " in capsys.readouterr().err


def test_a_metric_that_no_run_has_is_said_by_the_first_run_and_by_the_report(
    here, tmp_path, capsys
):
    (tmp_path / "plain.toml").write_text(PLAIN.replace("val_loss", "val_losss"))
    argv = ["plain.toml", "--seeds", "1", "--steps", "2"]
    assert study.main([*argv, "--only", "train"]) == 0
    words = "1/2 plain seed 1: its result.json has no val_losss so far, which the report needs"
    assert words in capsys.readouterr().out
    assert study.main([*argv, "--only", "report"]) == 2
    said = capsys.readouterr()
    assert "metric = 'val_losss' is a number of none of the 2 finished runs; they" in said.err
    assert ", val_loss, " in said.err and not said.out


def test_a_grid_has_every_cell_and_compares_along_its_baseline(here):
    text = (
        PLAIN.replace('"plain"', '{ cap = "off" }').split("[arms]")[0]
        + """lr = "0:1 {1 - part}:1 1>0"
embed_lr = "{part * steps}"
[grid]
part = [0.1, 0.8]
[grid.cap]
off = {}
on = { softcap = 15 }
"""
    )
    grid = made(text)
    assert list(grid.arms) == ["part0.1-off", "part0.1-on", "part0.8-off", "part0.8-on"]
    assert grid.arms["part0.8-on"].against == "part0.8-off"
    cfg = grid.config("part0.8-on", 2)
    assert (cfg.lr, cfg.embed_lr, cfg.softcap, cfg.seed) == ("0:1 0.2:1 1>0", 19.2, 15, 2)
    grid.check()
    with pytest.raises(UserError, match="embed_lr"):
        made(text.replace("off = {}", "off = { embed_lr = 3 }")).check()


def test_each_trick_is_added_alone_and_left_out_of_all(here):
    text = PLAIN.split("differ")[0].replace('baseline = "plain"\n', "")
    tricks = made(text + "[tricks.cap]\nsoftcap = 15\n[tricks.ema]\nema = 0.9\n")
    against = {name: arm.against for name, arm in tricks.arms.items()}
    assert against == {
        "base": "",
        "add-cap": "base",
        "add-ema": "base",
        "all": "base",
        "without-cap": "all",
        "without-ema": "all",
    }
    tricks.check()
    cfg = tricks.config("without-cap", 1)
    assert (cfg.softcap, cfg.ema) == (0, 0.9) and tricks.config("all", 1).softcap == 15


########################################
#                 Runs                 #
########################################


def test_arms_take_turns_and_the_table_has_what_scipy_says(here, capsys, tmp_path):
    assert study.main(["plain.toml"]) == 0, capsys.readouterr().err
    assert here == ["plain-s1", "capped-s1", "plain-s2", "capped-s2"]
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "logs/report-plain/study.json").read_text())
    rows = {row["arm"]: row for row in record["arms"]}
    a, b = (
        np.array([result("plain", f"{arm}-s{s}")["val_loss"] for s in (1, 2)])
        for arm in ("capped", "plain")
    )
    test = stats.ttest_rel(a, b)
    assert rows["capped"]["difference"] == pytest.approx(np.mean(a - b))
    assert rows["capped"]["p"] == pytest.approx(test.pvalue)
    interval = test.confidence_interval()
    assert rows["capped"]["half"] == pytest.approx((interval.high - interval.low) / 2)
    assert rows["plain"]["p"] is None and rows["plain"]["mean"] == pytest.approx(np.mean(b))
    text = (tmp_path / "logs/report-plain/report.md").read_text()
    assert "| capped |" in text and "logits within 15" in text and "| softcap |" in text
    assert (tmp_path / "logs/report-plain/study.png").stat().st_size > 5000
    assert "capped needs" in out or "capped gets there" in out


def test_a_tables_cell_may_hold_a_bar_and_empty_columns_are_left_out():
    rows = [["a|b", "", "1"], ["c", "-", "12"]]
    lines = study_report.markdown(["arm", "nothing", "n"], rows).splitlines()
    assert lines == ["| arm  |   n |", "| ---- | --: |", "| a\\|b |   1 |", "| c    |  12 |"]


def test_what_is_finished_is_not_trained_again_and_other_flags_are_refused(here, capsys):
    assert study.main(["plain.toml", "--seeds", "1"]) == 0
    here.clear()
    assert study.main(["plain.toml", "--steps", "25"]) == 2
    said = capsys.readouterr().err
    assert "plain-s1 is over, but was made with other flags" in said and "steps: 24 -> 25" in said
    assert here == []
    assert study.main(["plain.toml"]) == 0 and here == ["plain-s2", "capped-s2"]


def test_arms_that_are_not_matched_are_not_trained_by_the_step_of_training_either(
    here, capsys, tmp_path
):
    for more in (["--softcap", "3"], ["--nonsense", "3"]):
        with contextlib.suppress(SystemExit):  # of a flag that there is not
            assert study.main(["plain.toml", "--only", "train", *more]) == 2
        said = capsys.readouterr().err
        assert "--softcap: that is what the arms differ in" in said or "--nonsense" in said
    (tmp_path / "nca.toml").write_text(NCA + 'mine = { from = "muon", softcap = 5 }\n')
    assert study.main(["nca.toml", "--arms", "mine", "--only", "train"]) == 2
    assert "arm mine is no fair comparison with muon" in capsys.readouterr().err
    assert not here and not (tmp_path / "logs").exists()


def test_a_report_takes_no_flags_but_those_that_the_runs_were_made_with(here, capsys, tmp_path):
    """Else its record would say that they made these runs; without flags all are reported."""
    argv = ["plain.toml", "--seeds", "1"]
    assert study.main([*argv, "--steps", "25"]) == 0
    record = tmp_path / "logs/report-plain/study.json"
    before = record.read_bytes()
    for more, words in (
        (["--steps", "26"], "steps: 25 -> 26"),
        (["--softcap", "99"], "--softcap: that is what the arms differ in"),
        (["--sedes", "1"], "--sedes"),
        (["--phase1", "'"], '--phase1 "\'" cannot be split into words: No closing quotation'),
    ):
        capsys.readouterr()
        code = 2
        with contextlib.suppress(SystemExit):  # of a flag that there is not
            code = study.main([*argv, "--only", "report", *more])
        said = capsys.readouterr()
        assert code == 2 and words in said.err and not said.out and "Traceback" not in said.err
        assert record.read_bytes() == before
    assert study.main([*argv, "--only", "report", "--steps", "25"]) == 0
    assert record.read_bytes() == before
    assert study.main([*argv, "--only", "report"]) == 0


def test_a_study_that_is_stopped_goes_on_where_it_was(here, capsys, monkeypatch):
    assert study.main(["plain.toml", "--log_dir", "whole"]) == 0
    here.clear()
    step, steps = tg.train_step, []

    def stopped(*given):
        steps.append(1)
        if len(steps) == 30:  # in the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    monkeypatch.setattr(tg, "train_step", stopped)
    with pytest.raises(SystemExit) as left:
        study.main(["plain.toml"])
    assert left.value.code == 128 + signal.SIGTERM and here == ["plain-s1", "capped-s1"]
    here.clear()
    assert study.main(["plain.toml"]) == 0 and here == ["capped-s1", "plain-s2", "capped-s2"]
    for arm in ("plain", "capped"):
        with open(f"whole/plain/{arm}-s1/result.json") as f:
            assert result("plain", f"{arm}-s1")["val_loss"] == json.load(f)["val_loss"]
    assert result("plain", "capped-s1")["resumed"]


def test_the_report_says_where_runs_are_of_different_data(here, capsys, tmp_path):
    """An arm that was trained before the shards were exchanged is paired with one behind it."""
    argv = ["plain.toml", "--seeds", "1"]
    assert study.main([*argv, "--arms", "plain"]) == 0
    assert "not all alike" not in capsys.readouterr().out
    write_shard(tmp_path / "x_train_000000.bin", np.random.default_rng(1).integers(0, 64, 2000))
    assert study.main(argv) == 0 and here == ["plain-s1", "capped-s1"]
    words = "not all alike in data_sha256, so mind what you compare:"
    assert words in capsys.readouterr().out
    text = (tmp_path / "logs/report-plain/report.md").read_text()
    assert f"## Notes on the runs\n\n```\n{words}\n" in text
    for arm in ("plain", "capped"):
        assert result("plain", f"{arm}-s1")["data_sha256"] in text


def test_a_diverged_run_is_counted_and_not_tried_again(here, capsys, tmp_path):
    text = PLAIN.replace("softcap = 15", "embed_lr = 1e38").replace('["softcap"]', '["embed_lr"]')
    (tmp_path / "plain.toml").write_text(text)
    assert study.main(["plain.toml"]) == 0
    rows = json.loads((tmp_path / "logs/report-plain/study.json").read_text())["arms"]
    assert [(row["n"], row["diverged"]) for row in rows] == [(2, 0), (0, 2)]
    assert "| capped |   0 |        2 |" in capsys.readouterr().out
    here.clear()
    assert study.main(["plain.toml"]) == 0 and here == []


########################################
#            Pre-pre-training          #
########################################


def test_phase_1_is_shared_charged_and_its_time_given_to_the_longer_arm(here, capsys, tmp_path):
    assert study.main(["nca.toml"]) == 0, capsys.readouterr().err
    turns = ["muon", "pre-pre", "taken", "sham", "longer"]
    assert here == [
        "muon-s1",
        "measured",
        *(f"{arm}-s{seed}" for seed in (1, 2) for arm in turns if (arm, seed) != ("muon", 1)),
    ]
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "logs/report-nca/study.json").read_text())
    rows = {row["arm"]: row for row in record["arms"]}
    finals = {
        arm: [result("nca", f"{arm}-s{s}")["val_loss"] for s in (1, 2)]
        for arm in ("muon", "taken", "sham")
    }
    for arm in ("taken", "sham"):
        expected = stats.ttest_rel(finals[arm], finals["muon"])
        assert rows[arm]["p"] == pytest.approx(expected.pvalue)
    pre = [result("nca", f"pre-pre-s{s}")["train_time_s"] for s in (1, 2)]
    paid = [seconds + 1000 / 50000 + 20 / 1000 for seconds in pre]
    for s in (1, 2):
        longer, base = result("nca", f"longer-s{s}"), result("nca", f"muon-s{s}")
        assert longer["steps"] == round(24 * (1 + paid[s - 1] / base["train_time_s"]))
    again = made(NCA)
    again.name = "nca"
    assert [nca.charge(again, "pre", s) for s in (1, 2)] == pytest.approx(paid)
    assert "against the arm with the time of pre-pre-training as steps" in out
    for name in ("report.md", "curves.png", "study.png"):
        assert (tmp_path / "logs/report-nca" / name).stat().st_size > 500
    here.clear()
    assert study.main(["nca.toml"]) == 0 and here == [], "nothing is run twice"
    assert study.main(["nca.toml", "--matrix_wd", "0.5"]) == 2
    assert "matrix_wd: 0.0 -> 0.5" in capsys.readouterr().err
    assert study.main(["nca.toml", "--phase1", "--matrix_lr 0.5"]) == 2
    assert "pre-pre-s1 is over" in capsys.readouterr().err and here == []
    assert nca.main(["logs/nca/pre-pre-s1", "logs/nca/pre-pre-s2", "--out", "x.png"]) == 0
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_one_seed_has_no_p_and_limited_epochs_end_the_longer_arm(here, capsys, tmp_path):
    """The preset allows two epochs; a charge of old pre-pre-training flags is measured again."""
    lm = tmp_path / "configs/lm.toml"
    lm.write_text(lm.read_text().replace("epochs = 0", "epochs = 2").replace("= 24", "= 30"))
    flags = ["nca.toml", "--arms", "taken", "longer", "--seeds", "1"]
    assert study.main(flags) == 0, capsys.readouterr().err
    text = (tmp_path / "logs/report-nca/study.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert {row["arm"]: row["p"] for row in record["arms"]}["taken"] is None
    base, longer = (
        tg.read_toml(tmp_path / f"logs/nca/{name}-s1/config.toml") for name in ("muon", "longer")
    )
    assert longer["steps"] > 30 and longer["epochs"] > base["epochs"] == 2
    changed = made(NCA, arms=["taken"])
    changed.name, changed.phase1 = "nca", ["--nca_colors", "4"]
    nca.generation(changed, "pre")
    nca.generation(changed, "pre")
    assert here.count("measured") == 2


def test_a_longer_arm_of_counted_epochs_has_whole_ones(here, tmp_path, monkeypatch):
    lm = tmp_path / "configs/lm.toml"
    lm.write_text(lm.read_text().replace("epochs = 0", "epochs = 2\nlr_cycles = 1"))
    runs = made(NCA, arms=["taken", "longer"])
    folder = runs.folder("muon", 1)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"steps": 30, "train_time_s": 10.0}))
    (folder / "metrics.jsonl").write_text("")
    monkeypatch.setattr(nca, "charge", lambda study, pre, seed: 12.0)
    assert nca.longer(runs, "longer", 1) == {"steps": 75, "epochs": 5}  # 2.2 times the time


def test_a_charge_delays_the_clock():
    def run(seed, charge, losses):
        val = [
            {"step": 10 * i, "val_loss": x, "charged_ms": 1000.0 * (i + charge)}
            for i, x in enumerate(losses)
        ]
        known = {"charge_s": charge, "best_val_loss": min(losses), "train_time_s": 4.0}
        return report.Run("r", "a", seed, result=known, val=val, finished=True)

    with_pre, base = run(1, 2.0, [5, 3, 2, 1, 2]), run(1, 0.0, [5, 4, 3, 2, 3])
    assert nca.loss_at(with_pre, 4.0) == 2 and nca.loss_at(with_pre, 3.5) == 2.5
    # 2 is reached at step 20 instead of 30, and after 2 + 2 s instead of 3
    step, seconds = pytest.approx(2 / 3), pytest.approx(4 / 3)
    found = nca.speed([(with_pre, base)])
    assert found == {"reached": 1, "step_ratio": step, "time_ratio": seconds}
    assert nca.speed([(base, with_pre)])["reached"] == 0
