"""logs/report.py: statistics against published numbers, parsers against each format, the command
line.

Published numbers are of modded-nanogpt's record folders, of remix's two logs and of
parameter-golf's records.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("report", ROOT / "logs" / "report.py")
report = importlib.util.module_from_spec(SPEC)
sys.modules["report"] = report  # dataclasses look their module up
SPEC.loader.exec_module(report)
Run = report.Run

# The 80 val losses of the SoftCap record's README in units of 1e-4 above 3.27, as {loss: how many
# runs}.
SOFTCAP = {
    53: 2,
    54: 1,
    62: 1,
    65: 3,
    66: 2,
    68: 2,
    69: 2,
    71: 1,
    75: 1,
    77: 2,
    78: 1,
    80: 5,
    81: 2,
    82: 2,
    83: 1,
    84: 3,
    85: 2,
    86: 1,
    88: 1,
    90: 2,
    91: 2,
    92: 3,
    93: 2,
    94: 2,
    96: 3,
    97: 1,
    98: 2,
    99: 2,
    100: 1,
    101: 3,
    102: 1,
    103: 5,
    104: 3,
    105: 1,
    108: 1,
    109: 1,
    113: 1,
    116: 1,
    119: 1,
    125: 1,
    127: 1,
    130: 2,
    132: 1,
    134: 1,
    137: 1,
}
A_CURVE = {
    0: 14.9328,
    125: 6.2211,
    250: 5.1729,
    500: 4.1838,
    1000: 3.7701,
    1500: 3.6310,
    2000: 3.5535,
    2500: 3.5052,
    3000: 3.4726,
    3500: 3.3985,
    4000: 3.3241,
    4250: 3.2919,
    4375: 3.2809,
}
M_CURVE = {
    0: 10.8258,
    125: 4.6412,
    250: 4.0813,
    500: 3.7860,
    1000: 3.5694,
    1500: 3.4809,
    2000: 3.3592,
    2250: 3.3108,
    2375: 3.2917,
    2500: 3.2791,
}
SOURCE = """print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{training_time_ms:.0f}ms")
step:7/9 val_loss:1.0000 train_time:1ms step_avg:1.00ms
peak memory allocated: 1 MiB reserved: 2 MiB
"""  # noqa: E501


def sample(n: int, mean: float, sd: float) -> list[float]:
    """n numbers with exactly this mean and sample standard deviation."""
    x = np.linspace(-1, 1, n)
    return list(mean + sd * x / x.std(ddof=1))


def upstream_log(curve: dict[int, float], step_ms: float, peak: int) -> str:
    """A log of the remix: source, separator, environment, separator, step lines, memory line."""
    lines, steps = [], max(curve)
    for step, loss in curve.items():
        if step:
            lines.append(
                f"step:{step}/{steps} train_time:{step * step_ms:.0f}ms step_avg:{step_ms:.2f}ms"
            )
        lines.append(
            f"step:{step}/{steps} val_loss:{loss:.4f} train_time:{step * step_ms:.0f}ms "
            f"step_avg:{step_ms:.2f}ms"
        )
    bar = "=" * 100
    return "\n".join(
        [
            SOURCE + bar,
            "Running Python 3.12.9",
            "| NVIDIA-SMI |",
            bar,
            *lines,
            f"peak memory allocated: {peak} MiB reserved: 34414 MiB",
            "",
        ]
    )


def make_run(
    folder: Path,
    arm: str,
    seed: int,
    losses: dict[int, float],
    finished: bool = True,
    config: dict | None = None,
    result: dict | None = None,
) -> Path:
    """A run folder as the trainer leaves it."""
    folder.mkdir(parents=True)
    steps, run = max(losses), folder.name
    fields = {"run": run, "arm": arm, "seed": seed, "steps": steps, **(config or {})}
    table = fields.pop("rule", {})
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in fields.items()]
    lines += ["[rule]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in table.items())]
    (folder / "config.toml").write_text("".join(lines))
    events = []
    for step, loss in losses.items():
        clock = {"step": step, "train_time_ms": step * 100.0}
        if step:
            repeats = 1 + (step > steps / 2)
            events.append({"kind": "train", "lr": 1 - step / steps, "repeats": repeats, **clock})
        events.append(
            {"kind": "val", "steps": steps, "val_loss": loss, "val_bpb": loss / 2, **clock}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if finished:
        final = {
            "run": run,
            "arm": arm,
            "seed": seed,
            "steps": steps,
            "val_loss": loss,
            "val_bpb": loss / 2,
            "train_time_s": steps * 0.1,
            "total_bytes": 5_000_000,
            **(result or {}),
        }
        (folder / "result.json").write_text(json.dumps(final))
    return folder


def run_of(val_loss: float, seed: int | None = None, **result) -> report.Run:
    return Run(f"run{seed}", "x", seed, result={"val_loss": val_loss, **result}, finished=True)


def rule(**fields) -> dict:
    return report.RULE | fields


########################################
#              Statistics              #
########################################


def test_the_softcap_records_losses_give_its_published_p():
    losses = [3.27 + unit / 1e4 for unit, count in SOFTCAP.items() for _ in range(count)]
    mean, sd = report.mean_sd(losses)
    assert len(losses) == 80 and f"{mean:.4f} {sd:.4f}" == "3.2791 0.0019"
    t, p = report.t_below(losses, 3.28)
    assert f"{p:.4f}" == "0.0001"
    assert t == pytest.approx((3.28 - mean) / (sd / math.sqrt(80)))
    assert report.judge_mean(losses, rule(target=3.28, p=0.01))[0] == "passes"


def test_the_margin_needed_is_t_crit_times_the_standard_error():
    table = {3: 6.965, 4: 4.541, 5: 3.747, 6: 3.365, 8: 2.998, 10: 2.821, 13: 2.681, 20: 2.539}
    for n, crit in table.items():
        assert report.margin_needed(n, math.sqrt(n), 0.01) == pytest.approx(crit, abs=5e-4)
    # golf: mean <= h - 4.02 sd
    assert report.margin_needed(3, 1.0, 0.01) == pytest.approx(4.02, abs=5e-3)
    assert [f"{report.margin_needed(10, sd, 0.01):.4f}" for sd in (0.0010, 0.0025)] == [
        "0.0009",
        "0.0022",
    ]


def test_published_losses_give_the_published_p_values():
    # PR 315
    assert report.t_below(sample(10, 3.27851, 0.00097), 3.28)[1] == pytest.approx(4.5e-4, rel=0.01)
    # golf's seq2048 record, rounded losses
    t, p = report.t_below([1.20576, 1.20617, 1.20716], 1.21937)
    assert t == pytest.approx(31.4, abs=0.1) and f"{p:.4f}" == "0.0005"
    # PRs 342 and 337 give mean and sd, no p; PR 322 mean and p, so that the sd which follows must
    # be usual
    for n, mean, sd in ((13, 3.27837, 0.00142), (10, 3.27848, 0.00150)):
        assert report.judge_mean(sample(n, mean, sd), rule(target=3.28, p=0.01))[0] == "passes"
    sd = (3.28 - 3.27893) * math.sqrt(13) / stats.t.isf(0.0078, 12)
    assert 0.0010 < sd < 0.0025
    assert report.t_below(sample(13, 3.27893, sd), 3.28)[1] == pytest.approx(0.0078)


def test_a_mean_on_the_border_of_track_3s_rule_passes():
    track_3 = rule(target=3.28, z=0.004)
    assert report.judge_mean(sample(16, 3.279, 0.0013), track_3)[0] == "passes"
    assert report.judge_mean([3.276], track_3)[0] == "passes"
    verdict, why = report.judge_mean(sample(15, 3.279, 0.0013), track_3)
    assert verdict == "fails" and why[-1] == "seeds missing at this mean: 1"


@pytest.mark.parametrize(
    ("gap", "sd"), [(0.001, 0.0013), (0.0002, 0.0013), (0.01, 0.001), (1.0, 0.001)]
)
def test_seeds_needed_is_the_smallest_n_that_passes(gap, sd):
    n = report.seeds_needed(gap, sd, 0.01)
    assert report.t_below(sample(n, -gap, sd), 0.0)[1] < 0.01
    assert n == 2 or report.t_below(sample(n - 1, -gap, sd), 0.0)[1] >= 0.01


def test_loss_and_bpb_imply_the_bytes_of_golfs_validation_set():
    # two lines of the naive baseline's log, at step 0 and after the round trip, must imply the same
    # text
    for line in ((6.9370, 4.0978), (2.07269931, 1.22436570)):
        assert 63_779_840 * report.bytes_per_token(*line) == pytest.approx(155.8e6, rel=5e-4)
    bpb = 1.1271
    loss = bpb * math.log(2) * 151_080_364 / 62_021_632
    assert 62_021_632 * report.bytes_per_token(loss, bpb) == pytest.approx(151.08e6, rel=1e-4)
    assert 0.005 / (math.log(2) * report.bytes_per_token(loss, bpb)) == pytest.approx(
        0.00296, abs=5e-6
    )


def test_a_rule_is_passed_by_means_shown_to_lie_below_its_target_alone():
    def judge(runs, track="", **fields):
        verdict, why = report.judge(runs, rule(**fields), track)
        return verdict, "\n".join(why)

    good = [
        run_of(3.27, seed, train_time_s=100.0, steps=100, total_bytes=15_999_999) for seed in (1, 2)
    ]
    assert judge(good)[0] == "passes"
    assert judge([], target=3.28)[0] == "undecided"
    assert "two seeds" in judge(good[:1], target=3.28, p=0.01)[1]
    assert judge(good[:1], target=3.28, p=0.01)[0] == "undecided"
    assert "no independent sample" in judge(good, target=3.28, p=0.01)[1]
    assert judge(good[:1], target=3.28)[0] == "passes"
    assert judge(good, target=3.28, margin=0.02)[0] == "fails"
    assert "no number of seeds" in judge(good, target=3.0, p=0.01)[1]
    assert judge([run_of(math.nan, 1), run_of(3.0, 2)], target=3.28, p=0.01)[0] == "fails"
    assert "not measured" in judge(good, metric="sliding_val_bpb", target=1.1)[1]
    spread = [run_of(loss, seed) for seed, loss in enumerate(sample(3, 3.2791, 0.0019))]
    verdict, why = judge(spread, target=3.28, p=0.01)
    assert (
        verdict == "fails" and f"sd: {report.seeds_needed(3.28 - 3.2791, 0.0019, 0.01) - 3}" in why
    )


def test_runs_beyond_a_cap_or_resumed_on_a_clock_fail():
    def verdict(run, **fields):
        return report.judge([run], rule(**fields))[0]

    last_step_over = run_of(3.27, 1, train_time_s=600.038, steps=13780, total_bytes=16_000_000)
    assert verdict(last_step_over, max_seconds=600, max_bytes=16_000_000) == "passes"
    assert verdict(last_step_over, max_seconds=599) == "fails"
    assert verdict(last_step_over, max_bytes=15_999_999) == "fails"
    assert verdict(run_of(3.27, 1), max_bytes=16_000_000) == "fails"  # not measured is not passed
    resumed = run_of(3.27, 1, train_time_s=10.0, steps=10)
    resumed.resumed = True
    assert verdict(resumed, max_seconds=600) == "fails"
    assert report.judge([resumed], rule(target=3.28), "speedrun")[0] == "fails"
    assert report.judge([resumed], rule(target=3.28), "slowrun")[0] == "passes"


def test_a_margin_in_bits_per_byte_is_told_in_nats():
    bpb = [1.1271, 1.1272, 1.1273]
    runs = [run_of(x * math.log(2) * 2.4359, seed, val_bpb=x) for seed, x in enumerate(bpb)]
    verdict, why = report.judge(runs, rule(metric="val_bpb", target=1.14, margin=0.00296, p=0.01))
    assert (
        verdict == "passes"
        and "0.00296 bits per byte is 0.00500 nats per token at 2.4359" in why[-1]
    )


def test_common_seeds_are_paired_and_others_compared_by_welchs_test():
    x, y = [1.00, 1.11, 1.19], [1.10, 1.18, 1.31]
    runs, base = ([run_of(v, seed) for seed, v in enumerate(values)] for values in (x, y))
    test, n, diff, sd, p = report.compare(runs[::-1], base, "val_loss")
    assert (test, n) == ("paired", "3")
    assert p == pytest.approx(stats.ttest_rel(x, y, alternative="less").pvalue)
    assert (diff, sd) == pytest.approx((np.mean(x) - np.mean(y), np.subtract(x, y).std(ddof=1)))

    far = [run_of(v, seed + 10) for seed, v in enumerate(y)]
    test, n, diff, _, p = report.compare(runs, far, "val_loss")
    # Satterthwaite's degrees of freedom by hand
    vx, vy = np.var(x, ddof=1) / 3, np.var(y, ddof=1) / 3
    df = (vx + vy) ** 2 / (vx**2 / 2 + vy**2 / 2)
    assert (test, n) == ("Welch", "3, 3")
    assert p == pytest.approx(stats.t.cdf(diff / math.sqrt(vx + vy), df))

    assert report.compare(runs, base[1:], "val_loss")[:2] == ("paired", "2")
    assert math.isnan(report.compare(runs[:1], base, "val_loss")[4])  # one pair
    assert math.isnan(report.compare(runs[:1], far, "val_loss")[4])
    assert math.isnan(report.compare(runs, runs, "val_loss")[4])  # copies
    twice = [run_of(1.0, 1), run_of(1.1, 1)]
    assert report.pair_up(twice, base) == []
    assert "x ran a seed twice" in report.arm_section({"x": twice}, ["val_loss"])
    assert report.pair_up([run_of(1.0)], base) == []


def test_time_to_loss_is_the_inverse_interpolation():
    rng = np.random.default_rng(0)
    for _ in range(50):
        y = np.sort(rng.uniform(3, 5, 12))[::-1]
        x = np.cumsum(rng.uniform(1, 9, 12))
        val = [{"train_time_ms": a, "val_loss": b} for a, b in zip(x, y, strict=True)]
        target = rng.uniform(y[-1], y[0])
        expected = np.interp(-target, -y, x)
        assert report.time_to_loss(val, target, "val_loss", "train_time_ms") == pytest.approx(
            expected
        )
    noisy = [{"step": i, "val_loss": loss} for i, loss in enumerate([5.0, 3.0, 4.0, 2.0])]
    # the first time counts
    assert report.time_to_loss(noisy, 3.5, "val_loss", "step") == pytest.approx(0.75)
    assert report.time_to_loss(noisy, 1.9, "val_loss", "step") is None
    assert report.time_to_loss(noisy, 6.0, "val_loss", "step") == 0
    assert report.time_to_loss([], 6.0, "val_loss", "step") is None


########################################
#               Reading                #
########################################


def test_remix_logs_are_read_below_their_embedded_source(tmp_path):
    (tmp_path / "A.txt").write_text(upstream_log(A_CURVE, 615334 / 4375, 28874))
    (tmp_path / "M.txt").write_text(upstream_log(M_CURVE, 367065 / 2500, 28691))
    (tmp_path / "notes.txt").write_text("no step lines: not a log\n")
    a, m = report.find_runs([str(tmp_path)])
    assert (a.arm, m.arm, a.seed) == ("A", "M", None)
    assert {point["step"]: point["val_loss"] for point in a.val} == A_CURVE
    assert {point["step"]: point["val_loss"] for point in m.val} == M_CURVE
    assert len(m.train) == len(M_CURVE) - 1 and a.finished and not a.resumed
    assert a.value("train_time_s") == 615.334 and m.value("peak_memory_bytes") == 28691 * 2**20
    # A ends at 3.2809: between M's last two evaluations, so just before the whole 367 s of 615 s
    ratios = report.time_ratios([m], [a], "val_loss", "train_time_ms")
    steps = np.interp(-3.2809, [-3.2917, -3.2791], [2375, 2500])
    assert ratios["M"] == pytest.approx(steps * 146.826 / 615334, rel=1e-4)
    assert 0.59 < ratios["M"] < 367.065 / 615.334
    verdicts = report.build([a, m], fallback={"rule": rule(target=3.28)})[0]["Rule of the track"]
    assert "A fails" in verdicts and "M passes" in verdicts  # A's log never reached 3.28


def test_track_3s_seconds_and_trials_in_one_file_are_read(tmp_path):
    trial = (
        "step:0/250 val_loss:10.82584 train_time:0.000s step_avg:0.12ms\n"
        "step:250/250 val_loss:{} train_time:125.376s step_avg:501.50ms\n"
    )
    folder = tmp_path / "muonh"
    folder.mkdir()
    path = folder / "28df77c8-d9e8-4759-9136-4cd1fcebc672.txt"
    path.write_text(
        "\n" + "=" * 100 + "\nUsing seed=1\n" + trial.format(4.065) + trial.format(4.075)
    )
    runs = report.load_text(path)
    assert [run.value("val_loss") for run in runs] == [4.065, 4.075]
    for run in runs:
        assert (run.arm, run.seed, run.finished, run.resumed) == ("muonh", None, True, False)
    assert runs[0].value("train_time_s") == 125.376
    (folder / "seed01.txt").write_text("Using seed=1\n" + trial.format(4.07))
    (only,) = report.load_text(folder / "seed01.txt")
    assert (only.arm, only.seed) == ("muonh", 1)


def test_every_number_of_a_golf_log_is_read(tmp_path):
    (tmp_path / "train_seed1337.log").write_text("""W0318 warnings of torchrun
model_params:17140056
seed:1337
prog_depth: schedule=[(0.3, 2), (1.0, 3)] starting_repeats=2
step:0/20000 val_loss:6.9370 val_bpb:4.0978 train_time:0ms step_avg:0.01ms
step:3350/20000 someone/parameter-golftrain_loss:2.2214 train_time:145628ms step_avg:43.47ms
prog_depth: switched to 3 repeats at step:4134 frac:0.30
step:4150/20000 train_loss:2.1285 train_time:180438ms step_avg:43.48ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
final_sliding_window_exact val_loss:1.99780000 val_bpb:1.18320000 stride:64
final_sliding_window val_loss:1.9978 val_bpb:1.1832 window:1024 stride:64 eval_time:2000ms
final_hedge_mixer_exact val_loss:1.91200000 val_bpb:1.13240000
""")
    (run,) = report.find_runs([str(tmp_path / "*.log")])
    assert (run.arm, run.seed, run.finished, run.value("params")) == (
        tmp_path.name,
        1337,
        True,
        17140056,
    )
    assert (run.value("code_bytes"), run.value("artifact_bytes"), run.value("total_bytes")) == (
        47642,
        15815847,
        15863489,
    )
    assert run.value("roundtrip_val_bpb") == 1.22436570 and run.value("sliding_val_bpb") == 1.1832
    assert run.value("val_bpb") == 1.2172 and run.value("steps") == 13780
    assert run.value("eval_time_s") == pytest.approx(3.401) and run.value("train_time_s") == 600.038
    repeats = {point["step"]: point["repeats"] for point in run.train if "repeats" in point}
    assert repeats == {3350: 2, 4150: 3}
    assert "no code length" in report.run_section([run], list(report.METRICS))
    # a final score has no curve
    assert report.build([run], metric="sliding_val_bpb")[3] == "val_bpb"


def test_a_resumed_run_keeps_the_later_lines(tmp_path):
    folder = make_run(tmp_path / "a_s1", "a", 1, {0: 5.0, 10: 4.0, 20: 3.5}, finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "val", "step": 30, "val_lo\n')  # cut by the kill
        file.write('{"kind": "train", "step": 11, "lr": 0.5, "train_time_ms": 1}\n')
        file.write(
            '{"kind": "val", "step": 20, "steps": 40, "val_loss": 3.25, "train_time_ms": 2000}\n'
        )
    run = report.load_folder(folder)
    assert [(point["step"], point["val_loss"]) for point in run.val] == [
        (0, 5.0),
        (10, 4.0),
        (20, 3.25),
    ]
    # 20 was logged by the attempt that was lost
    assert [point["step"] for point in run.train] == [10, 11]
    assert run.state() == "unfinished 20/40, resumed"
    later = make_run(tmp_path / "a_s3", "a", 3, {0: 5.0, 10: 4.0}, finished=False)
    (later / "log.txt").write_text(SOURCE + "=" * 100 + "\nresumed:ckpt/5 at step 5\n")
    assert report.load_folder(later).state() == "unfinished 10/10, resumed"
    finished = make_run(tmp_path / "a_s2", "a", 2, {0: 5.0, 10: 4.0}, result={"resumed": True})
    assert "resumed, so not valid for timed tracks: a_s2" in report.run_section(
        [report.load_folder(finished)], ["val_loss"]
    )


def test_log_txt_stands_in_for_metrics(tmp_path):
    folder = make_run(tmp_path / "m_s3", "m", 3, {0: 5.0, 10: 4.0})
    (folder / "metrics.jsonl").unlink()
    (folder / "log.txt").write_text(
        SOURCE
        + "=" * 100
        + """
step:0/10 val_loss:5.00000 train_time:0ms step_avg:0.00ms val_bpb:2.50000 wall_time:3.5s
step:10/10 train_time:1000ms step_avg:100.00ms train_loss:4.1 lr:1.5e-03 repeats:2 tok_s:812
step:10/10 val_loss:4.00000 train_time:1000ms step_avg:100.00ms val_bpb:2.00000 val_loss_ema:nan
"""
    )
    for argument in (folder, folder / "log.txt"):
        (run,) = report.find_runs([str(argument)])
        assert [point["val_bpb"] for point in run.val] == [2.5, 2.0] and run.val[0][
            "wall_time_s"
        ] == 3.5
        assert run.train == [
            {
                "kind": "train",
                "step": 10,
                "steps": 10,
                "train_time_ms": 1000.0,
                "lr": 0.0015,
                "step_avg_ms": 100.0,
                "train_loss": 4.1,
                "repeats": 2.0,
                "tok_s": 812.0,
            }
        ]
        assert math.isnan(run.value("val_loss_ema"))
        assert (run.arm, run.seed, run.finished) == ("m", 3, True)


DAMAGED = [
    '{"kind": "val", "step": 10, "val_lo',
    "",
    "17",
    "null",
    "[]",
    '{"kind": "val"}',
    '{"step": 10}',
    "\0\0\0",
    '{"kind": "val", "step": "ten", "val_loss": 1.0}',
    '{"kind": "val", "step": 10}',
    "\ufffd",
    '{"kind": 1, "step": 10}',
    '{"kind": "val", "step": 10, "val_loss": "low"}',
]


def test_every_reader_of_metrics_drops_damaged_lines(tmp_path):
    import train_gpt as tg
    from logs import score

    folder = make_run(tmp_path / "a_s1", "a", 1, {0: 5.0, 10: 4.0, 20: 3.5})
    whole = (folder / "metrics.jsonl").read_bytes()
    good = [json.loads(line) for line in whole.splitlines()]
    (folder / "metrics.jsonl").write_bytes("\n".join(DAMAGED).encode() + b"\n\xff\xfe{\n" + whole)
    assert report.read_metrics(folder / "metrics.jsonl") == good
    assert [point["val_loss"] for point in report.load_folder(folder).val] == [5.0, 4.0, 3.5]
    cfg = tg.Config(steps=20, epochs=2)
    assert score.best_epoch(folder, tg.Plan(cfg)) == (3.5, 2)
    for line in DAMAGED:
        assert (
            report.parse_metric(line) is None
            and tg.parse_metric(line) is None
            and not tg.keep_metric(line, 99)
        ), line
    assert all(
        report.parse_metric(json.dumps(event)) == tg.parse_metric(json.dumps(event)) == event
        for event in good
    )
    run = tg.Run(tg.Config(log_dir=str(tmp_path), run="a_s1", device="cpu"))
    run.open_log(99)
    run.log_file.close(), run.metrics_file.close()
    assert (folder / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "dress",
    [
        lambda line: f"\x1b[32m{line}\x1b[0m",
        lambda line: f"[rank0]: {line}",
        lambda line: f"[default0]:{line}",
        lambda line: f"rank0: {line}\n[rank1]: step:99/99 val_loss:1.0",
        lambda line: f"0: {line}\n1: {line}",
        lambda line: f"{line}\r",
        lambda line: f"\rstep:1/9 train_loss:9 12 tok/s\r            \r{line}",
        lambda line: f"[default0]:\x1b[1m{line}\x1b[0m",
    ],
)
def test_a_log_that_went_through_a_terminal_or_torchrun_is_read(tmp_path, dress):
    text = upstream_log(M_CURVE, 1.0, 1)
    (tmp_path / "plain.txt").write_text(text)
    (tmp_path / "dressed.txt").write_bytes("\n".join(map(dress, text.split("\n"))).encode())
    (plain,), (dressed,) = (
        report.load_text(tmp_path / f"{name}.txt") for name in ("plain", "dressed")
    )
    assert (
        plain.val == dressed.val and plain.train == dressed.train and plain.result == dressed.result
    )
    assert len(plain.val) == len(M_CURVE)


def test_a_run_named_twice_counts_once(tmp_path):
    folder = make_run(tmp_path / "logs" / "a_s1", "a", 1, {0: 5.0, 10: 4.0})
    assert (
        len(report.find_runs([str(folder), str(tmp_path / "logs"), str(tmp_path / "logs" / "*")]))
        == 1
    )


########################################
#                Report                #
########################################


def test_config_diff_shows_what_trains_differently():
    import train_gpt as tg

    a = {
        "run": "a_s1",
        "seed": 1,
        "arm": "a",
        "log_dir": "x",
        "matrix_lr": 0.05,
        "steps": 10,
        "lr": "0:1",
        "beta1": tg.Config().beta1,
    }
    b = {
        "run": "b_s2",
        "seed": 2,
        "arm": "b",
        "log_dir": "y",
        "matrix_lr": 0.02,
        "steps": 10,
        "cap": 15.0,
    }
    # what a script's config.toml leaves out has the trainer's default
    assert report.config_diff(a, b) == [
        ["matrix_lr", "0.05", "0.02"],
        ["lr", "0:1", tg.Config().lr],
        ["cap", "-", "15.0"],
    ]


def test_unlike_runs_of_one_arm_are_named(tmp_path):
    for seed, lr in ((1, 0.05), (2, 0.02)):
        make_run(tmp_path / f"a_s{seed}", "a", seed, {0: 5.0, 10: 4.0}, config={"matrix_lr": lr})
    runs = report.find_runs([str(tmp_path)])
    text = report.config_section({"a": runs}, "a")
    assert "should not differ" in text and text.splitlines()[-1].split() == [
        "matrix_lr",
        "0.05",
        "0.02",
    ]


def test_unpaired_seeds_are_measured_against_the_mean(tmp_path):
    base = [
        report.load_folder(make_run(tmp_path / f"a{seed}", "a", seed, {0: 5.0, 10: loss}))
        for seed, loss in ((1, 3.9), (2, 4.1))
    ]
    runs = [
        report.load_folder(make_run(tmp_path / f"m{seed}", "m", seed, {0: 5.0, 5: 4.0, 10: 3.0}))
        for seed in (8, 9)
    ]
    assert report.time_ratios(runs, base, "val_loss", "step") == {"m8": 0.5, "m9": 0.5}
    text = report.time_section({"a": base, "m": runs}, "a", "val_loss")
    assert "m needs 0.500 +- 0.000 of a's training time (n=2), 2.00 times less" in text
    assert "m shares no seeds with a" in text
    back = report.time_section({"a": base, "m": runs}, "m", "val_loss")
    assert "a gets there in 0 of 2 runs" in back and "a1 never" in back


def test_plots_are_not_squashed_by_step_0():
    run = Run("a", "a", val=[{"step": step, "val_loss": loss} for step, loss in A_CURVE.items()])
    low, high = report.y_limits([run], "val_loss", 3.28)
    assert 3.2 < low < 3.28 and 3.7 < high < 3.9
    assert report.y_limits([run], "val_loss", 0.5)[0] > 3.2  # a far target does not either
    run.val = [
        {"step": 0, "val_loss": 7.0},
        {"step": 100, "val_loss": 3.3},
        {"step": 146, "val_loss": 3.2},
    ]
    assert report.y_limits([run], "val_loss", 0.0)[1] > 7.0  # of three points none is left out


def fabricate(root: Path):
    """Two arms, three seeds, B faster than A; one more run of B that stopped half-way."""
    rng = np.random.default_rng(0)
    for seed in (1, 2, 3):
        for arm, tau in (("A", 30.0), ("B", 15.0)):
            noise = rng.normal(0, 0.002, 11)
            losses = {10 * i: 3 + 4 * math.exp(-10 * i / tau) + noise[i] for i in range(11)}
            settings = {
                "optimizer": {"A": "adamw", "B": "muon"}[arm],
                "track": "speedrun",
                "rule": {"metric": "val_loss", "target": 3.05, "p": 0.01},
            }
            make_run(root / f"{arm}_s{seed}", arm, seed, losses, config=settings)
    make_run(root / "B_s4", "B", 4, {0: 7.0, 10: 5.0}, finished=False, config=settings)


def test_command_line_writes_the_whole_report(tmp_path):
    fabricate(tmp_path / "logs")
    command = [sys.executable, str(ROOT / "logs" / "report.py"), "logs", "--out", "made/report"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
    text = done.stdout
    assert max(map(len, text.splitlines())) <= report.WIDTH
    for part in (
        "B needs 0.",
        "times less",
        "A fails",
        "B passes",
        "unfinished 10/10",
        "paired  3",
        "optimizer  adamw  muon",
    ):
        assert part in text, part
    written = (tmp_path / "made/report/report.md").read_text()
    assert all(line in written for line in text.splitlines()[2:-1] if not line.startswith("---"))
    for name in ("curves.png", "schedules.png"):
        assert (tmp_path / "made/report" / name).read_bytes()[:4] == b"\x89PNG" and name in written


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    code = 0
    try:
        report.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_one_seed_makes_a_report_without_tests(tmp_path, monkeypatch, capsys):
    config = {"rule": {"target": 4.5, "p": 0.01}}
    make_run(tmp_path / "a_s1", "a", 1, {0: 5.0, 10: 4.0}, config=config)
    make_run(tmp_path / "b_s1", "b", 1, {0: 5.0, 10: 3.0})
    code, text, _ = call(monkeypatch, capsys, tmp_path, "--out", tmp_path / "out", "--no_plots")
    assert code == 0 and "a undecided" in text and "a t-test needs two seeds at least" in text
    assert "no p: a test needs two seeds" in text and not list((tmp_path / "out").glob("*.png"))


def test_runs_without_evaluations_make_a_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.toml").write_text('arm = "a"\nseed = 1\nsteps = 10\n')
    code, text, _ = call(monkeypatch, capsys, tmp_path, "--out", tmp_path / "out")
    assert code == 0 and "unfinished 0/10" in text


@pytest.mark.parametrize(
    "preset", ["steps = 10\n[rule]\ntarget = 3.28\np = 0.05\n", "rule_target = 3.28\nrule_p = 0.05"]
)
def test_a_preset_gives_upstream_logs_their_rule(preset, tmp_path, monkeypatch, capsys):
    """Its [rule] table, or the fields by which configs told a rule before there was one."""
    for i, loss in enumerate((3.2780, 3.2785, 3.2790)):
        (tmp_path / f"m_s{i}.txt").write_text(upstream_log({0: 10.8, 100: loss}, 100.0, 1))
    (tmp_path / "preset.toml").write_text(preset)
    flags = ("--out", tmp_path / "out", "--no_plots", "--rule", tmp_path / "preset.toml")
    code, text, _ = call(monkeypatch, capsys, tmp_path, *flags)
    assert code == 0 and "m passes" in text and "t = 5.20" in text


def test_a_rule_of_before_the_table_is_the_same_rule():
    rule = {"metric": "val_bpb", "target": 1.2, "margin": 0.003, "p": 0.01, "max_bytes": 16}
    new = {"steps": 10, "rule": rule, "score": {"stride": 64}}
    old = {"steps": 10, **{f"rule_{key}": value for key, value in rule.items()}}
    assert report.rule_of(new) == report.rule_of(old) == report.RULE | rule
    assert report.config_diff(old, new) == [["score.stride", "-", "64"]]
    new["rule"] = rule | {"target": 1.1}
    assert ["rule.target", "1.2", "1.1"] in report.config_diff(old, new)


def test_bad_input_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "runs" / "a_s1", "a", 1, {0: 5.0, 10: 4.0})
    (tmp_path / "empty").mkdir()
    (tmp_path / "poem.txt").write_text("step by step\n")
    for name, data in (
        ("broken", b"{"),
        ("list", b"[1]"),
        ("words", b'{"val_loss": "x"}'),
        ("latin", b'{"arm": "\xe9"}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes(data)
    (tmp_path / "ruled").mkdir()
    for file in (tmp_path / "ruled" / "config.toml", tmp_path / "no_table.toml"):
        file.write_text('rule = "fair"\n')
    for arguments, words in (
        ((), "no runs given"),
        ((tmp_path / "nowhere",), "nowhere"),
        ((tmp_path / "no*e",), "no*e"),
        ((tmp_path / "empty",), "no run in"),
        ((tmp_path / "poem.txt",), "val_loss:4.6412"),
        ((tmp_path / "broken",), "damaged"),
        ((tmp_path / "list",), "damaged"),
        ((tmp_path / "words",), "val_loss = 'x'"),
        ((tmp_path / "latin",), "damaged"),
        ((tmp_path / "ruled",), "damaged"),
        ((folder, "--rule", tmp_path / "no_table.toml"), "no_table.toml"),
        (("x" * 5000,), "too long"),
        ((folder, "--baseline", "b"), "the arms are a"),
        ((folder, "--metric", "val_lose"), "there is val_loss, val_bpb"),
        ((folder, "--rule", "nowhere.toml"), "nowhere.toml"),
        ((folder, "--out", tmp_path / "poem.txt"), "poem.txt"),
        ((folder, "--basline", "a"), "basline"),
    ):
        code, _, error = call(monkeypatch, capsys, *arguments)
        assert code == 2 and words in error and "Traceback" not in error, arguments
    assert (tmp_path / "poem.txt").read_text() == "step by step\n"


def test_best_epoch_and_averages_stand_in_one_column_with_the_last_step():
    result = {
        "val_loss": 3.5,
        "val_loss_best_epoch": 3.3,
        "val_loss_prob_equal": 3.2,
        "val_loss_weights_recency": 3.25,
        "slowrun_val_loss": 3.2,
    }
    run = report.Run("slow-s1", "slow", 1, result=result, finished=True)
    lines = report.run_section([run], list(report.METRICS)).splitlines()
    heads = [word.strip() for word in lines[-2].split("  ") if word]
    assert heads == ["run", "last step", "best epoch", "probs", "by recency", "least"]
    assert lines[-1].split() == ["slow-s1", "3.50000", "3.30000", "3.20000", "3.25000", "3.20000"]
    run.result |= {"ensemble_size": 96, "val_loss_ensemble": 3.1, "val_loss_ensemble_uniform": 3.15}
    lines = report.run_section([run], list(report.METRICS)).splitlines()
    heads = [word.strip() for word in lines[-2].split("  ") if word]
    assert heads == ["run", "last step", "snapshots", "weighted", "uniform"]
    assert lines[-1].split() == ["slow-s1", "3.50000", "96", "3.10000", "3.15000"]
    assert "averages over" not in report.run_section(
        [report.Run("a", "a", 1, result={"val_loss": 3.0})], ["val_loss"]
    )


# of the ledger of track 3: steps, n and mean of two entries, and the statistic between them
PAIRS = [
    ((3250, 20, 3.27888), (3325, 20, 3.27905), 0.0112),  # 10 over 12
    ((3225, 16, 3.27854), (3250, 8, 3.27708), -0.0008),  # 11 over 9
    ((3125, 20, 3.27856), (3325, 20, 3.27905), 0.0300),  # 39 over 12
    ((2690, 8, 3.27833), (2720, 10, 3.27857), 0.0033),  # 46 over 45
    ((3160, 8, 3.27794), (3250, 10, 3.278659), 0.0101),  # pull request 357 over 36
]


@pytest.mark.parametrize("new, old, score", PAIRS)
def test_pairwise_statistic_is_that_of_the_ledger(new, old, score):
    def group(arm: str, steps: int, n: int, mean: float) -> list:
        losses = sample(n, mean, 0.001)
        return [
            Run(
                f"{arm}{i}",
                arm,
                seed=i,
                finished=True,
                config={"track": "track_3", "rule": {"target": 3.28, "z": 0.004}},
                result={"val_loss": loss, "steps": steps},
            )
            for i, loss in enumerate(losses)
        ]

    arms = {"new": group("new", *new), "old": group("old", *old)}
    found = report.pairwise(arms["new"], arms["old"], "val_loss")
    assert found == pytest.approx(score, abs=6e-5)
    told = " ".join(report.rule_section(arms, {}, "old").split())
    word = "is better" if score >= 0.004 else "is not better"
    assert f"{word} than old by track 3's pairwise statistic: {found:.4f}" in told
