"""logs/nca.py: what it calls fair, what it pairs and charges, and a whole ablation of tiny runs."""

import json
import shlex
import signal
import sys

import numpy as np
import pytest
from helpers import ROOT, write_shard
from scipy import stats

sys.path[:0] = [str(ROOT / "logs")]
import nca as ablation  # noqa: E402
import report  # noqa: E402

import pre_pre_train  # noqa: E402
import train_gpt as tg  # noqa: E402

LM = """device = "cpu"\ndtype = "float32"\ncompile = 0\ndepth = 1\ndim = 32\nheads = 2\nvocab = 64\ndoc_token = 0
tokenizer = ""\nseq_len = 32\nbatch_tokens = 128\nmicro_tokens = 128\nsteps = 24\neval_every = 6\nexport = ""\nepochs = 0
val_tokens = 256\nhead_multiple = 32\n"""
PRE = (
    "--device cpu --dtype float32 --compile 0 --nca_colors 3 --nca_grid 6 --nca_seq_len 60 "
    "--nca_filter none "
    "--nca_tokens 1100 --nca_val_tokens 660 --nca_epochs 1 --batch_tokens 440 --micro_tokens "
    "440 --nca_threads 1 "
    "--eval_every 0"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """
    A folder with a preset and data; trainers are called in this process instead of being started.
    """
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write_shard(tmp_path / "x_train_000000.bin", rng.integers(0, 64, 2000))
    write_shard(tmp_path / "x_val_000000.bin", rng.integers(0, 64, 300))
    (tmp_path / "lm.toml").write_text(LM + f"data = {str(tmp_path)!r}\n")
    started = []

    class Done:
        stdout = ""

        def __init__(self, code):
            self.returncode = code

    def run(command, **how):
        started.append(command)
        program, argv = command[1], command[2:]
        if "--generate_only" in argv:
            done = Done(0)
            done.stdout = json.dumps(
                {"tokens": 1000, "tokens_per_s": 50000.0, "rules_per_s": 1000.0, "candidates": 20}
            )
            return done
        return Done((pre_pre_train if "pre_pre" in program else tg).main(argv))

    monkeypatch.setattr(ablation, "call", run)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    yield started
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)


def options(**changes) -> ablation.Options:
    return ablation.Options(**({"lm": ("lm.toml",), "pre": PRE, "seeds": (1, 2)} | changes))


def words(**changes) -> list[str]:
    given = {"lm": "lm.toml", "seeds": "1 2", "arms": "muon muon-from-adamw"} | changes
    return [
        w
        for k, v in given.items()
        for w in ([f"--{k}", *v.split()] if k in ("lm", "seeds", "arms") else [f"--{k}={v}"])
    ]


def test_arms_differ_from_their_base_in_more_than_the_transfer(here):
    everything = ablation.Ablation(options(arms=tuple(ablation.all_arms())))
    table = everything.check()
    assert len(everything.arms) >= 40 and "adamw_matrices" in table and "transfer_control" in table
    rows = [line.split()[:3] for line in table.splitlines()[1:]]
    assert {key for _, _, key in rows} <= ablation.TRANSFER | {"steps"}
    assert ["muon-sham", "muon", "slow"] in rows and not [
        r for r in rows if r[0] == "muon-sham" and r[2] == "init_from"
    ]


@pytest.mark.parametrize(
    "extra",
    [
        "mine adamw muon --transfer attn --matrix_lr 0.07",
        "mine none muon --optimizer adamw",
        "mine adamw muon --steps 7",
    ],
)
def test_unfair_arm_is_run(here, capsys, extra):
    assert ablation.main([*words(arms="mine"), "--extra", extra]) == 2
    said = capsys.readouterr().err
    key = shlex.split(extra)[-2].removeprefix("--")
    assert (
        f"arm mine is no fair comparison with muon: beside the transfer it differs in {key}" in said
        and not here
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arms", "nonsense"], "no such arm; there are adamw"),
        (["--extra", "mine nothing muon"], "must read NAME PRE BASE"),
        (["--extra", "mine"], "must read NAME PRE BASE"),
        (["--seeds", "1", "1"], "--seeds 1 1: each seed is one run"),
        (["--extra", "mine adamw muon --slow_lr"], "pairs of --flag and value"),
        (
            words(arms="muon-from-adamw muon-longer", flags="--max_seconds 9"),
            "max_seconds = 9 have no number of steps",
        ),
        (["--lm", "nowhere", "--arms", "muon", "muon-sham"], "no such preset"),
    ],
)
def test_bad_input_is_a_traceback(here, capsys, flags, message):
    assert ablation.main(flags) == 2
    assert message in capsys.readouterr().err and not here


def test_whole_ablation(here, capsys, tmp_path):
    """
    Three arms, two seeds, and a base with longer runs: takes turns, charges, goes on, and refuses
    what was changed.
    """
    argv = words(arms="muon-from-adamw muon-sham muon-longer", pre=PRE)
    assert ablation.main(argv) == 0, capsys.readouterr().err
    names = [c[c.index("--run") + 1] for c in here if "--generate_only" not in c]
    assert names == [
        f"nca-{arm}-s{seed}"
        for seed in (1, 2)
        for arm in ("muon", "pre-adamw", "muon-from-adamw", "muon-sham", "muon-longer")
    ]
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "logs/report-nca/nca.json").read_text())
    rows = {row["arm"]: row for row in record["arms"]}
    results = {
        name: json.loads((tmp_path / "logs" / name / "result.json").read_text()) for name in names
    }
    finals = {
        arm: [results[f"nca-{arm}-s{s}"]["val_loss"] for s in (1, 2)]
        for arm in ("muon", "muon-from-adamw", "muon-sham")
    }
    for arm in ("muon-from-adamw", "muon-sham"):
        expected = stats.ttest_rel(finals[arm], finals["muon"])
        assert rows[arm]["final"]["p"] == pytest.approx(expected.pvalue)
        assert rows[arm]["final"]["delta"] == pytest.approx(
            np.mean(finals[arm]) - np.mean(finals["muon"])
        )
    paid = [
        results[f"nca-pre-adamw-s{s}"]["train_time_s"] + 1000 / 50000 + 20 / 1000 for s in (1, 2)
    ]
    assert (
        rows["muon-from-adamw"]["charge_s"] == pytest.approx(np.mean(paid))
        and rows["muon"]["charge_s"] == 0
    )
    for s in (1, 2):
        longer, base = results[f"nca-muon-longer-s{s}"], results[f"nca-muon-s{s}"]
        assert longer["steps"] == round(24 * (1 + paid[s - 1] / base["train_time_s"]))
    assert (
        "longer_final" in rows["muon-from-adamw"]
        and "Equal total time" in out
        and "curves.png" in out
    )
    for name in ("report.md", "curves.png", "deltas.png"):
        assert (tmp_path / "logs/report-nca" / name).stat().st_size > 500
    here.clear()
    assert ablation.main(argv) == 0 and here == [], "nothing is run twice"
    assert ablation.main([*argv, "--flags=--matrix_wd 0.5"]) == 2
    assert "was made with other flags: matrix_wd 0.0 -> 0.5" in capsys.readouterr().err
    assert ablation.main(["--learns", "logs/nca-pre-adamw-s1", "logs/nca-pre-adamw-s2"]) == 0
    assert (tmp_path / "logs/report-nca/learns.png").stat().st_size > 5000


def test_one_seed_makes_json_that_is_none_and_limited_epochs_end_the_longer_arm(
    here, capsys, tmp_path
):
    """The preset allows two epochs; a charge of old pre-pre-training flags is measured again."""
    (tmp_path / "lm.toml").write_text(
        (tmp_path / "lm.toml")
        .read_text()
        .replace("epochs = 0", "epochs = 2")
        .replace("steps = 24", "steps = 30")
    )
    argv = words(arms="muon-from-adamw muon-longer", pre=PRE, seeds="1")
    assert ablation.main(argv) == 0, capsys.readouterr().err
    record = json.loads(
        (tmp_path / "logs/report-nca/nca.json").read_text(), parse_constant=pytest.fail
    )
    assert record["arms"][1]["final"]["p"] is None
    base, longer = (
        tg.read_toml(tmp_path / f"logs/nca-{name}-s1/config.toml")
        for name in ("muon", "muon-longer")
    )
    assert longer["steps"] > 30 and longer["epochs"] > base["epochs"] == 2
    generated = [c for c in here if "--generate_only" in c]
    changed = ablation.Ablation(
        options(arms=("muon-from-adamw",), pre=PRE + " --nca_colors 4", seeds=(1,))
    )
    changed.generation("adamw")
    assert len(generated) == 1 and len([c for c in here if "--generate_only" in c]) == 2


def test_longer_arm_of_counted_epochs_has_whole_ones(here, tmp_path):
    (tmp_path / "lm.toml").write_text(
        (tmp_path / "lm.toml").read_text().replace("epochs = 0", "epochs = 2\nlr_cycles = 1")
    )
    runs = ablation.Ablation(options(arms=("muon-from-adamw", "muon-longer"), seeds=(1,)))
    base = tmp_path / "logs/nca-muon-s1"
    base.mkdir(parents=True)
    (base / "result.json").write_text(json.dumps({"steps": 30, "train_time_s": 10.0}))
    (base / "metrics.jsonl").write_text("")
    runs.charge = lambda pre, seed: 12.0
    assert runs.longer("muon-longer", 1) == {"steps": "75", "epochs": "5"}  # 2.2 times the time


def test_charge_is_left_out_of_the_clock():
    def run(seed, charge, losses):
        val = [
            {"step": 10 * i, "val_loss": x, "train_time_ms": 1000.0 * i}
            for i, x in enumerate(losses)
        ]
        return report.Run(
            "r",
            "a",
            seed,
            result={"charge_s": charge, "best_val_loss": min(losses), "train_time_s": 4.0},
            val=val,
            finished=True,
        )

    with_pre, base = run(1, 2.0, [5, 3, 2, 1, 2]), run(1, 0.0, [5, 4, 3, 2, 3])
    assert ablation.loss_at(with_pre, 4.0) == 2 and ablation.loss_at(with_pre, 3.5) == 2.5
    # 2 is reached at step 20 instead of 30, and after 2 + 2 s instead of 3
    found = ablation.speed([(with_pre, base)])
    assert found == {
        "reached": 1,
        "step_ratio": pytest.approx(2 / 3),
        "time_ratio": pytest.approx(4 / 3),
    }
    assert ablation.speed([(base, with_pre)])["reached"] == 0
