"""Tables, statistics, verdicts and plots over training logs: ours, modded-nanogpt's and
parameter-golf's.

    python logs/report.py logs/remix_*                      # run folders of one experiment
    python logs/report.py logs --baseline A                 # every run below a folder
    python logs/report.py records/X --rule configs/remix_m.toml       # upstream .txt logs
    python logs/report.py embeddings logs/RUN               # see logs/embeddings.py

Runs are grouped by `arm`, and arms are paired by seed where both have it. Losses are nats per
token, bpb is bits per byte, lower is better everywhere. `+-` is the sample standard deviation over
seeds (n - 1 in the denominator), never the error of the mean. All p-values are one-sided.
OUT/report.md gets what is printed.

Contents: reading logs | statistics | verdict of a track's rule | tables | plots | command line
"""

import dataclasses
import functools
import glob
import json
import math
import re
import sys
import textwrap
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

from logs.endings import UserError, ending  # noqa: E402

METRICS = (
    "val_loss",
    "val_bpb",
    "roundtrip_val_bpb",
    "chunked_val_bpb",
    "sliding_val_bpb",
    "mixed_val_bpb",
    "ttt_val_bpb",
    "lora_val_bpb",
)
# what averages over epochs add: all but the last step's loss, and the least of them
EPOCHS = {
    "val_loss_best_epoch": "best epoch",
    "val_loss_ema": "ema",
    "val_loss_prob_equal": "probs",
    "val_loss_prob_recency": "by recency",
    "val_loss_weights_equal": "weights",
    "val_loss_weights_recency": "by recency",
    "slowrun_val_loss": "least",
}
# what a mixture of snapshots adds
ENSEMBLE = {
    "ensemble_size": "snapshots",
    "val_loss_ensemble": "weighted",
    "val_loss_ensemble_uniform": "uniform",
}
COSTS = (
    "steps",
    "tokens",
    "train_time_s",
    "wall_time_s",
    "eval_time_s",
    "artifact_bytes",
    "total_bytes",
    "peak_memory_bytes",
)
# the [rule] table of a config, a track's rule, with the values that ask for nothing
RULE = {
    "metric": "val_loss",  # of result.json
    "target": 0.0,  # the mean over seeds must be below this
    "margin": 0.0,  # by at least this much
    "p": 0.0,  # at this level of a one-sided one-sample t-test
    "z": 0.0,  # (target - mean) * sqrt(n) must reach this
    "max_seconds": 0.0,  # cap of the training clock
    "max_bytes": 0,  # cap of total_bytes
}
# config fields that name a run or say where it is kept, not how it is trained
NAMES = {"config", "preset", "run", "arm", "seed"}
NAMES |= {"log_dir", "resume", "wandb", "keep", "save_every", "save_last", "log_every"}
SCHEDULES = {
    "lr": "lr",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "repeats": "repeats",
    "seq_len": "row length (tokens)",
    "window": "window (tokens)",
    "batch_tokens": "batch (tokens)",
}
# the colour-blind safe palette of Okabe and Ito, without its yellow
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH = 110  # columns of the console


########################################
#             Reading logs             #
########################################


@dataclass
class Run:
    """One training run, whoever logged it. `result` has the keys of result.json, with times in
    seconds; `val` and `train` hold the logged dicts (keys of metrics.jsonl) by rising step.
    """

    name: str
    arm: str
    seed: int | None = None
    config: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)
    val: list[dict] = field(default_factory=list)
    train: list[dict] = field(default_factory=list)
    finished: bool = False
    resumed: bool = False

    def value(self, metric: str) -> float | None:
        """The final number of a metric: result.json's, else the last evaluation's, else None."""
        last = self.val[-1] if self.val else {}
        return self.result.get(metric, last.get("step" if metric == "steps" else metric))

    def state(self) -> str:
        last = self.val[-1] if self.val else {}
        at = max((event["step"] for event in self.val[-1:] + self.train[-1:]), default=0)
        of = last.get("steps", "?") if self.val else self.config.get("steps", "?")
        marks = [] if self.finished else [f"unfinished {at}/{of}"]
        marks += ["resumed"] * self.resumed
        marks += ["diverged"] * (not math.isfinite(last.get("val_loss", 0.0)))
        return ", ".join(marks) or "ok"


def settle(run: Run, events: list[dict]) -> Run:
    """Sort events into run.val and run.train. A step smaller than the one before means that the run
    went back to a checkpoint: what it had logged beyond that is no part of it, later lines win.
    """
    kept, before = {}, -1
    for event in events:
        step = event["step"]
        if step < before:
            run.resumed = True
            kept = {key: old for key, old in kept.items() if key[1] <= step}
        kept[event["kind"], step] = event
        before = step
    run.val = [event for (kind, _), event in sorted(kept.items()) if kind == "val"]
    run.train = [event for (kind, _), event in sorted(kept.items()) if kind == "train"]
    if run.val and "train_time_ms" in run.val[-1]:
        run.result.setdefault("train_time_s", run.val[-1]["train_time_ms"] / 1000)
    return run


def step_event(step: str, steps: str, pairs: str) -> dict:
    """One line `step:125/2500 key:value ...`; upstream's times are `12345ms`, or `12.345s`."""
    kind = "val" if re.search(r"\bval_loss:", pairs) else "train"
    event = {"kind": kind, "step": int(step), "steps": int(steps)}
    pair = r"\b([a-z]\w*):([-+]?[\d.]+(?:e[-+]?\d+)?|nan|inf)(ms|s)?(?!\S)"
    for key, value, unit in re.findall(pair, pairs):
        event[f"{key}_ms" if unit else key] = float(value) * (1000 if unit == "s" else 1)
    if "wall_time_ms" in event:
        event["wall_time_s"] = event.pop("wall_time_ms") / 1000
    return event


def plain(text: str) -> str:
    """A log as it was written, from one that went through a terminal or torchrun: without colours,
    and the first rank's lines alone, without the rank before them ([rank0]: [default0]: rank0: 0:).
    """
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    prefix = re.compile(r"(?:\[(?:rank|default)(\d+)\]:?|rank ?(\d+):|(\d+): )[ \t]?")
    lines = []
    for line in text.split("\n"):
        line = line.rstrip("\r").rsplit("\r", 1)[-1]  # a terminal's line was written over
        m = prefix.match(line)
        if not m or int(m[1] or m[2] or m[3] or 0) == 0:
            lines.append(line[m.end() :] if m else line)
    return "\n".join(lines)


def parse_metric(line: str) -> dict | None:
    """A line of metrics.jsonl; None for a damaged one, as a kill or a full disk leaves it."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or [type(event.get(k)) for k in ("kind", "step")] != [str, int]:
        return None
    loss = event.get("val_loss" if event["kind"] == "val" else "step")
    return event if isinstance(loss, int | float) else None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that are whole; none where there is no such file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [event for line in text.splitlines() if (event := parse_metric(line))]


# words in the name of a line `final_NAME val_loss:... val_bpb:...`, and the metric that it is
FINALS = {
    "sliding": "sliding_val_bpb",
    "ttt": "ttt_val_bpb",
    "hedge": "mixed_val_bpb",
    "mixture": "mixed_val_bpb",
    "roundtrip": "roundtrip_val_bpb",
}
FINAL_LINE = r"final_(\w+?)(_exact)? val_loss:\S+ val_bpb:(\S+)(?:.*eval_time:(\d+)ms)?"
# what stands before a whole number in a line of its own, and the key of result.json that it is
COUNTS = {
    r"(?:seed:|Using seed=)": "seed",
    "model_params:": "params",
    "world_size:": "world_size",
    "Code size: ": "code_bytes",
    "peak memory allocated: ": "peak_memory_bytes",
    # a line without the codec's name is about the raw model, not the artifact
    r"Serialized model [^\s:]+: ": "artifact_bytes",
    r"Total submission size [^\s:]+: ": "total_bytes",
}


def parse_log(text: str) -> tuple[list[dict], dict]:
    """Events and final numbers of a text log: ours, modded-nanogpt's or parameter-golf's, with the
    lines that progressive depth added. Read from the line of 100 '=' on, which ends the embedded
    sources: those contain the same words.
    """
    text = re.split(r"^={100}$", plain(text), maxsplit=1, flags=re.MULTILINE)[-1]
    events, facts, exact, phase = [], {}, set(), {}
    for line in text.splitlines():
        if m := re.match(r"step:(\d+)/(\d+) (.*)", line):
            events.append(phase | step_event(*m.groups()))
        elif m := re.match(FINAL_LINE, line):
            metric = next((name for word, name in FINALS.items() if word in m[1]), m[1])
            if m[2] or metric not in exact:  # eight digits beat four, whichever come first
                facts[metric] = float(m[3])
                exact |= {metric} if m[2] else set()
            if m[4]:
                facts["eval_time_s"] = facts.get("eval_time_s", 0.0) + int(m[4]) / 1000
        elif m := re.match(r"prog_depth: .*(?:starting_repeats=|switched to )(\d+)", line):
            phase = {"repeats": int(m[1])}
        elif line.startswith("stopping_early: wallclock_cap"):
            facts["stopped_by_cap"] = True
        else:
            for pattern, key in COUNTS.items():
                if m := re.match(pattern + r"(\d+)( MiB)?", line):
                    facts[key] = int(m[1]) * (2**20 if m[2] else 1)
    return events, facts


def name_parts(path: Path) -> tuple[str, int | None]:
    """(arm, seed) from a log's name: `m_s3` and `m_seed3.txt` are seed 3 of m. A run id says
    nothing: then the folder is the arm, as in record folders (`baseline/<uuid>.txt`).
    """
    stem = path.stem if path.suffix in (".txt", ".log") else path.name
    m = re.search(r"(?:^|[_.-])s(?:eed)?[_-]?(\d+)$", stem)
    arm, seed = (stem[: m.start()], int(m[1])) if m else (stem, None)
    run_id = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", arm)
    if run_id or arm in ("", "train", "log"):
        arm = path.resolve().parent.name
    return arm, seed


def is_run_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.toml", "metrics.jsonl", "result.json"))


def rule_of(config: dict) -> dict:
    """The rule of a config: its [rule] table, or the fields rule_metric, rule_target, ... that runs
    had before there was one. What neither has asks for nothing.
    """
    table = config.get("rule", {})
    return {key: table.get(key, config.get(f"rule_{key}", none)) for key, none in RULE.items()}


def load_folder(path: Path) -> Run:
    """A run folder of ours; only finished runs have a result.json, and log.txt rounds."""
    run, events = Run(path.name, *name_parts(path)), []
    log = ""
    if (path / "log.txt").is_file():
        log = (path / "log.txt").read_bytes().decode(errors="replace")
    try:
        if (path / "config.toml").is_file():
            run.config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
            rule_of(run.config)
        if (path / "result.json").is_file():
            run.result = json.loads((path / "result.json").read_text(encoding="utf-8"))
            for key in (*METRICS, *EPOCHS, *ENSEMBLE, *COSTS, "seed"):
                if not isinstance(run.result.get(key), int | float | None):
                    raise ValueError(f"{key} = {run.result[key]!r} is no number")
    except (ValueError, AttributeError) as error:  # AttributeError: JSON or rule, but no table
        raise UserError(
            f"{path}: config.toml or result.json is damaged: {error}; leave it out"
        ) from error
    if (path / "metrics.jsonl").is_file():
        logged = read_metrics(path / "metrics.jsonl")
        events = [event for event in logged if event["kind"] in ("val", "train")]
    elif log:
        events, facts = parse_log(log)
        run.result = facts | run.result
    known = run.config | run.result
    run.arm = known.get("arm") or known.get("preset") or run.arm
    run.seed = known.get("seed", run.seed)
    run.finished = (path / "result.json").is_file()
    run.resumed = bool(run.result.get("resumed") or re.search(r"^resumed:", log, re.MULTILINE))
    return settle(run, events)


def load_text(path: Path) -> list[Run]:
    """The runs of an upstream log: none without step lines, one, or several if a script trained
    trial after trial: upstream's trainers cannot resume, so a step that goes back starts a run.
    """
    events, facts = parse_log(path.read_bytes().decode(errors="replace"))
    starts = [i for i in range(len(events)) if i == 0 or events[i]["step"] < events[i - 1]["step"]]
    arm, seed = name_parts(path)
    runs = []
    for i, start in enumerate(starts):
        run = Run(path.stem, arm, facts.get("seed", seed), result=dict(facts))
        if len(starts) > 1:
            run.name, run.seed = f"{path.stem}#{i + 1}", None
        settle(run, events[start : [*starts, len(events)][i + 1]])
        if run.val:
            run.finished = run.val[-1]["step"] == run.val[-1]["steps"] or "stopped_by_cap" in facts
            runs.append(run)
    return runs


def find_runs(arguments: list[str]) -> list[Run]:
    """The runs of run folders, folders of runs or logs, globs and log files in order, each once."""
    found: dict[Path, list[Run]] = {}
    for argument in arguments:
        paths = [argument] if Path(argument).exists() else sorted(glob.glob(argument))
        if not paths:
            raise UserError(
                f"no run {argument}: no such folder or file and nothing that it matches; runs are "
                "the folders in logs/, try `python logs/report.py logs`"
            )
        here = []
        for path in map(Path, paths):
            if path.is_file() and is_run_folder(path.parent):
                path = path.parent  # logs/x/log.txt means logs/x
            inside = [path]
            if path.is_dir() and not is_run_folder(path):
                inside = sorted([*path.glob("*"), *path.glob("*/*")])
            for p in inside:
                if is_run_folder(p):
                    found[p.resolve()] = [load_folder(p)]
                elif p.is_file() and p.suffix in (".txt", ".log") and not is_run_folder(p.parent):
                    found[p.resolve()] = load_text(p)
                here += found.get(p.resolve(), [])
        if not here:
            raise UserError(
                f"no run in {argument}: a run folder has config.toml, metrics.jsonl or "
                "result.json, an upstream log is a .txt or .log file with lines such as "
                "`step:125/2500 val_loss:4.6412 train_time:18311ms`"
            )
    return [run for runs in found.values() for run in runs]


########################################
#              Statistics              #
########################################


def mean_sd(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation: nan of too few values, exactly 0 of equal ones."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    if min(values) == max(values):
        return values[0], 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1))


def t_below(values: list[float], threshold: float) -> tuple[float, float]:
    """One-sample one-sided t-test that the mean lies below `threshold`, as the record rules of
    speedrun and golf ask: t = (threshold - mean) / (sd / sqrt(n)) and p = P(T_{n-1} > t).
    """
    test = stats.ttest_1samp(values, threshold, alternative="less")
    return -float(test.statistic), float(test.pvalue)


def margin_needed(n: int, sd: float, p: float) -> float:
    """How far below the threshold the mean of n runs must lie: t_crit * sd / sqrt(n)."""
    return float(stats.t.isf(p, n - 1)) * sd / math.sqrt(n)


def seeds_needed(gap: float, sd: float, p: float) -> int:
    """Smallest n whose t-test passes if the mean (`gap` > 0 below the threshold) and the sd stay as
    they are. The search starts from the same question for a normal distribution, which needs fewer.
    """
    n = max(2, math.floor((float(stats.norm.isf(p)) * sd / gap) ** 2))
    while gap <= margin_needed(n, sd, p):
        n += 1
    return n


def bytes_per_token(val_loss: float, val_bpb: float) -> float:
    """What one evaluation's numbers imply: val_bpb = val_loss / ln 2 * tokens / bytes."""
    return val_loss / (math.log(2) * val_bpb)


def pair_up(runs: list[Run], base: list[Run]) -> list[tuple[Run, Run]]:
    """(run, baseline run) for each seed of both arms; empty if a seed is unknown or ran twice."""
    mine = {run.seed: run for run in runs}
    theirs = {run.seed: run for run in base}
    if None in mine or None in theirs or len(mine) < len(runs) or len(theirs) < len(base):
        return []
    return [(run, theirs[seed]) for seed, run in mine.items() if seed in theirs]


def compare(runs: list[Run], base: list[Run], metric: str) -> tuple[str, str, float, float, float]:
    """(test, n, difference to the baseline, its sd, p of "lower"): a paired t-test over common
    seeds, or Welch's. sd and p are nan where runs are too few, or copies of one, for a test.
    """
    runs, base = ([run for run in group if run.value(metric) is not None] for group in (runs, base))
    p = math.nan
    if pairs := pair_up(runs, base):
        diffs = [run.value(metric) - twin.value(metric) for run, twin in pairs]
        mean, sd = mean_sd(diffs)
        if sd > 0:
            p = t_below(diffs, 0.0)[1]
        return "paired", str(len(pairs)), mean, sd, p
    x, y = ([run.value(metric) for run in group] for group in (runs, base))
    (mean_x, sd_x), (mean_y, sd_y) = mean_sd(x), mean_sd(y)
    if sd_x + sd_y > 0:
        p = float(stats.ttest_ind(x, y, equal_var=False, alternative="less").pvalue)
    return "Welch", f"{len(x)}, {len(y)}", mean_x - mean_y, math.hypot(sd_x, sd_y), p


def paired(runs: list[Run], base: list[Run], metric: str) -> dict[str, float]:
    """Mean difference over common seeds, its sd, half its 95 % interval, two-sided p; or nan."""
    test, n, mean, sd, lower = compare(runs, base, metric)
    if test != "paired":
        return dict.fromkeys(("difference", "difference_sd", "half", "p"), math.nan)
    half = float(stats.t.ppf(0.975, int(n) - 1)) * sd / math.sqrt(int(n))
    p = 2 * min(lower, 1 - lower)
    return {"difference": mean, "difference_sd": sd, "half": half, "p": p}


def time_to_loss(val: list[dict], target: float, metric: str, clock: str) -> float | None:
    """The value of `clock` (train_time_ms or step) where a validation curve first reaches `target`,
    linear between the two evaluations around it; None if it never does.
    """
    points = [(event[clock], event[metric]) for event in val if metric in event and clock in event]
    for i, (x, y) in enumerate(points):
        if y <= target:
            x0, y0 = points[i - 1] if i else (x, y)
            return x if y0 == y else x0 + (x - x0) * (y0 - target) / (y0 - y)
    return None


def time_ratios(
    runs: list[Run], base: list[Run], metric: str, clock: str
) -> dict[str, float | None]:
    """Seed -> the part of the baseline's whole training that the run took to the baseline's final
    loss, None if it never got there. Without common seeds the keys are names of runs, and the
    baseline's mean loss and mean time count.
    """
    mean_end = {key: mean_sd([run.val[-1][key] for run in base])[0] for key in (metric, clock)}
    goals = [(f"seed {run.seed}", run, twin.val[-1]) for run, twin in pair_up(runs, base)]
    ratios = {}
    for label, run, end in goals or [(run.name, run, mean_end) for run in runs]:
        at = time_to_loss(run.val, end[metric], metric, clock)
        ratios[label] = None if at is None else at / end[clock]
    return ratios


########################################
#      Verdict of a track's rule       #
########################################


def judge_mean(values: list[float], rule: dict) -> tuple[str, list[str]]:
    """(passes | fails | undecided, why) for the mean over seeds against target - margin."""
    n, threshold, level, z = len(values), rule["target"] - rule["margin"], rule["p"], rule["z"]
    mean, sd = mean_sd(values)
    gap = threshold - mean
    spread = "" if n < 2 else f", sd {sd:.5f}"
    why = [f"mean {rule['metric']} {mean:.5f} (n={n}{spread}) against {threshold:.5f}"]
    if not gap > 0:
        return "fails", [*why, "not below it; no number of seeds at this mean would pass"]
    verdict = "passes"
    if z:
        score = gap * math.sqrt(n)
        why.append(f"gap*sqrt(n) = {score:.5f}, at least {z:g} needed")
        if score < z - 1e-9:  # 1e-9: decimal losses on the border must not fail by binary rounding
            verdict = "fails"
            why.append(f"seeds missing at this mean: {math.ceil((z / gap) ** 2 - 1e-6) - n}")
    if level and not sd > 0:
        verdict = "fails" if verdict == "fails" else "undecided"
        copies = "all runs gave one number: they are no independent sample"
        why.append("a t-test needs two seeds at least" if n < 2 else copies)
    elif level:
        t, p = t_below(values, threshold)
        why.append(
            f"t = {t:.2f}, p = {p:.2g}, below {level:g} needed; that takes a gap of "
            f"{margin_needed(n, sd, level):.5f} at this n and sd, there is {gap:.5f}"
        )
        if not p < level:
            verdict = "fails"
            why.append(f"seeds missing at this mean and sd: {seeds_needed(gap, sd, level) - n}")
    return verdict, why


# of track 3: what a step less is worth in loss, from its record #12 cut by 200 steps
LOSS_PER_STEP = 0.000045
BETTER_BY = 0.004  # the least pairwise statistic for "better than"


def pairwise(runs: list[Run], base: list[Run], metric: str) -> float | None:
    """
    Track 3's statistic for a claim that `runs` are better than `base`, which is at least BETTER_BY:
    the difference of mean losses, and of steps at LOSS_PER_STEP, over sqrt(1/n + 1/m).
    """
    losses = [[run.value(metric) for run in group] for group in (runs, base)]
    steps = [[run.value("steps") for run in group] for group in (runs, base)]
    if not (runs and base) or None in [x for group in (*losses, *steps) for x in group]:
        return None
    (ours, theirs), (fewer, more) = ([mean_sd(x)[0] for x in pair] for pair in (losses, steps))
    better = theirs - ours + LOSS_PER_STEP * (more - fewer)
    return better / math.sqrt(1 / len(runs) + 1 / len(base))


def judge(runs: list[Run], rule: dict, track: str = "") -> tuple[str, list[str]]:
    """Verdict of a rule on an arm's finished runs, and why."""
    if not runs:
        return "undecided", ["no finished run"]
    metric, margin = rule["metric"], rule["margin"]
    why = [problem for run in runs for problem in beyond_caps(run, rule, track)]
    if not rule["target"]:
        return ("fails" if why else "passes"), why
    if missing := [run.name for run in runs if run.value(metric) is None]:
        unknown = f"{metric} was not measured in {', '.join(missing)}"
        return ("fails" if why else "undecided"), [*why, unknown]
    verdict, mean_why = judge_mean([run.value(metric) for run in runs], rule)
    loss, bpb = runs[0].value("val_loss"), runs[0].value("val_bpb")
    if margin and metric.endswith("bpb") and loss and bpb:
        size = bytes_per_token(loss, bpb)
        mean_why.append(
            f"the margin of {margin:g} bits per byte is {margin * math.log(2) * size:.5f} nats per "
            f"token at {size:.4f} bytes per token"
        )
    return ("fails" if why else verdict), why + mean_why


def beyond_caps(run: Run, rule: dict, track: str) -> list[str]:
    """What speaks against one run: its clock, its size, that it was resumed where time counts."""
    cap, limit, found = rule["max_seconds"], rule["max_bytes"], []
    seconds, size = run.value("train_time_s"), run.value("total_bytes")
    # the cap is looked at after each step, so the last one may pass it (golf 2.8: 600.038 s was
    # accepted)
    last_step = (seconds or 0) / max(run.value("steps") or 1, 1)
    if cap and not (seconds is not None and seconds - cap <= last_step):
        clock = number(seconds, "train_time_s")
        found.append(f"{run.name}: train clock {clock} s, {cap:g} s allowed")
    if limit and not (size is not None and size <= limit):
        found.append(f"{run.name}: total_bytes {number(size, 'total_bytes')}, {limit:,} allowed")
    if run.resumed and (cap or "speedrun" in track):
        found.append(f"{run.name}: resumed, not valid for timed tracks")
    return found


########################################
#                Tables                #
########################################


def number(x: float | None, metric: str = "") -> str:
    """One cell: `-` for what was not measured; the metric's name tells the unit."""
    if x is None or (math.isnan(x) and metric in COSTS):
        return "-"
    if metric == "peak_memory_bytes":
        return f"{x / 1e9:.2f}"
    if metric == "ensemble_size":
        return f"{x:.0f}"
    if metric in COSTS:
        return f"{x:.1f}" if metric.endswith("_s") else f"{x:,.0f}"
    return f"{x:.5f}"


def wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="    ", break_long_words=False)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, empty ones left out; the first loses its front where a line is too long."""
    keep = [i for i in range(len(header)) if any(row[i] not in ("", "-", "nan") for row in rows)]
    lines = [[row[i] for i in keep] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = max(8, min(widths[0], WIDTH - sum(width + 2 for width in widths[1:])))
    left = {i for i in keep if header[i] in ("run", "arm", "metric", "state", "test", "field")}
    out = []
    for line in lines:
        line[0] = line[0] if len(line[0]) <= widths[0] else ".." + line[0][2 - widths[0] :]
        cells = []
        for cell, width, i in zip(line, widths, keep, strict=True):
            cells.append(cell.ljust(width) if i in left else cell.rjust(width))
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def run_section(runs: list[Run], metrics: list[str]) -> str:
    """A row for each run, notes on what to mind, and what averages over epochs gave."""
    shown = [metric for metric in metrics if metric in METRICS]
    rows = []
    for run in runs:
        seed = "-" if run.seed is None else str(run.seed)
        columns = ("steps", *shown, "train_time_s", "wall_time_s")
        cells = [number(run.value(key), key) for key in columns]
        rows.append([run.name, run.arm, seed, *cells, run.state()])
    short = [m if m in ("val_loss", "val_bpb") else m.removesuffix("_val_bpb") for m in shown]
    heads = ["run", "arm", "seed", "steps", *short, "train s", "wall s", "state"]
    text = [table(heads, rows), *run_notes(runs)]
    if averaged := [run for run in runs if "slowrun_val_loss" in run.result]:
        keys = ("val_loss", *EPOCHS)
        rows = [[run.name, *(number(run.value(key)) for key in keys)] for run in averaged]
        what = (
            "Losses of the last step, of the best epoch, of averages over the last epochs "
            "(probabilities, weights), and the least of all; best epoch and least are chosen on "
            "the validation set:"
        )
        text += ["", wrap(what), table(["run", "last step", *EPOCHS.values()], rows)]
    if mixed := [run for run in runs if "val_loss_ensemble" in run.result]:
        keys = ("val_loss", *ENSEMBLE)
        rows = [[run.name, *(number(run.value(key), key) for key in keys)] for run in mixed]
        what = "Losses of the last step, and of mixing the probabilities of snapshots:"
        text += ["", what, table(["run", "last step", *ENSEMBLE.values()], rows)]
    return "\n".join(text)


def run_notes(runs: list[Run]) -> list[str]:
    """Lines on what a reader of the runs' table should know."""
    hedged = [run.name for run in runs if "mixed_val_bpb" in run.result and not run.config]
    notes = {
        "unfinished, so not counted below": [run.name for run in runs if not run.finished],
        "resumed, so not valid for timed tracks": [run.name for run in runs if run.resumed],
        "mixed is upstream's hedge line: no distribution, so no code length": hedged,
    }
    for key, command in (("xz_bpb", "xz -9e"), ("zstd_bpb", "zstd -19")):
        sizes = {f"{run.result[key]:.5f}" for run in runs if key in run.result}
        notes[f"{command} on the same text, bits per byte"] = sorted(sizes)
    for key in ("data_sha256", "device", "world_size"):
        values = {str(run.result[key]) for run in runs if key in run.result}
        if len(values) > 1:
            notes[f"not all alike in {key}, so mind what you compare"] = sorted(values)
    return [wrap(f"{what}: {', '.join(names)}") for what, names in notes.items() if names]


def arm_section(arms: dict[str, list[Run]], metrics: list[str]) -> str:
    """Means and spreads of the arms' scores, and what they cost."""
    scores, costs, notes = [], [], []
    for arm, runs in arms.items():
        known = {}
        for key in (*metrics, *COSTS):
            known[key] = [run.value(key) for run in runs if run.value(key) is not None]
        for key in metrics:
            if values := known[key]:
                cells = (*mean_sd(values), min(values), max(values))
                scores.append([arm, key, str(len(values)), *map(number, cells)])
        seeds = [run.seed for run in runs if run.seed is not None]
        if len(set(seeds)) < len(seeds):
            notes.append(
                f"{arm} ran a seed twice: repeats are no independent sample, so nothing is paired"
            )
        cells = [number(mean_sd(known[key])[0], key) for key in COSTS]
        spread = number(mean_sd(known["train_time_s"])[1], "train_time_s")
        costs.append([arm, str(len(runs)), *cells[:3], spread, *cells[3:]])
    heads = ["arm", "n", "steps", "tokens", "train s", "sd", "wall s", "eval s"]
    heads += ["artifact B", "total B", "peak GB"]
    parts = [table(["arm", "metric", "n", "mean", "sd", "min", "max"], scores)] if scores else []
    return "\n\n".join([*parts, "\n".join([table(heads, costs), *notes])])


def compare_section(arms: dict[str, list[Run]], baseline: str, metrics: list[str]) -> str:
    """The differences of the arms to the baseline, with a test."""
    rows, base = [], arms[baseline]
    for arm, runs in arms.items():
        for metric in [*metrics, "train_time_s"] if arm != baseline else []:
            measured = [any(run.value(metric) is not None for run in g) for g in (runs, base)]
            if all(measured):
                test, n, diff, sd, p = compare(runs, base, metric)
                told = "-" if math.isnan(p) else f"{p:.2g}"
                rows.append([arm, metric, test, n, number(diff, metric), number(sd, metric), told])
    text = table(["arm", "metric", "test", "n", "difference", "sd", "p"], rows) if rows else ""
    if any(row[-1] == "-" for row in rows):
        text += "\nno p: a test needs two seeds at least, and not copies of each other"
    return text


def time_section(arms: dict[str, list[Run]], baseline: str, metric: str) -> str:
    """How much of the baseline's training each arm needs to reach the baseline's final loss."""
    usable = {}
    for arm, runs in arms.items():
        usable[arm] = [run for run in runs if run.val and metric in run.val[-1]]
    base, lines = usable.pop(baseline), []
    for arm, runs in usable.items():
        for clock, what in (("train_time_ms", "time"), ("step", "steps")):
            if runs and base and all(run.val[-1].get(clock) for run in base):
                ratios = time_ratios(runs, base, metric, clock)
                lines.append(f"{arm} {time_line(ratios, baseline, what)}")
        if runs and base and not pair_up(runs, base):
            lines.append(
                f"({arm} shares no seeds with {baseline}: against its mean loss and mean time)"
            )
    return "\n".join(map(wrap, lines))


def time_line(ratios: dict[str, float | None], baseline: str, what: str) -> str:
    """time_ratios of one arm and clock in words."""
    reached = [ratio for ratio in ratios.values() if ratio is not None]
    parts = []
    for name, ratio in ratios.items():
        parts.append(f"{name[-12:]} never" if ratio is None else f"{name[-12:]} {ratio:.3f}")
    each = ", ".join(parts)
    if len(reached) < len(ratios):
        counts = f"{len(reached)} of {len(ratios)} runs"
        return f"gets there in {counts}; of {baseline}'s {what}: {each}"
    mean, sd = mean_sd(reached)
    spread = "" if math.isnan(sd) else f" +- {sd:.3f}"
    factor = f"{1 / mean:.2f} times less" if 0 < mean < 1 else f"{mean:.2f} times as much"
    part = f"{mean:.3f}{spread} of {baseline}'s training {what} (n={len(reached)})"
    return f"needs {part}, {factor}: {each}"


def rule_section(arms: dict[str, list[Run]], fallback: dict, baseline: str = "") -> str:
    """
    Verdicts on finished runs; those without a config (upstream logs) go by --rule's preset. Of
    track 3's, too, whether they are better than the baseline.
    """
    lines, base = [], [run for run in arms.get(baseline, []) if run.finished]
    for arm, runs in arms.items():
        config = runs[0].config or fallback
        rule = rule_of(config)
        if rule["target"] or rule["max_seconds"] or rule["max_bytes"]:
            finished = [run for run in runs if run.finished]
            verdict, why = judge(finished, rule, config.get("track", ""))
            if config.get("track") == "track_3" and arm != baseline:
                score = pairwise(finished, base, rule["metric"])
                if score is not None:
                    told = "is" if score >= BETTER_BY else "is not"
                    why.append(
                        f"{told} better than {baseline} by track 3's pairwise statistic: "
                        f"{score:.4f}, at least {BETTER_BY:g} needed"
                    )
            lines += [f"{arm} {verdict}", *(wrap(f"    {reason}") for reason in why)]
    return "\n".join(lines)


def flat(config: dict) -> dict:
    """The fields of a config that say how it trains; those of a table are named table.field."""
    fields = {}
    for key, value in (config | {"rule": rule_of(config)}).items():
        if isinstance(value, dict):
            fields |= {f"{key}.{name}": entry for name, entry in value.items()}
        elif key not in NAMES and not key.startswith("rule_"):
            fields[key] = value
    return fields


@functools.cache
def defaults() -> dict:
    """Of the trainer's fields: a script's config.toml leaves out what it does not read."""
    import train_gpt  # and with it torch, which takes seconds

    return dataclasses.asdict(train_gpt.Config())


def config_diff(a: dict, b: dict) -> list[list[str]]:
    """[field, value in a, value in b] where two resolved configs differ in how they train."""
    a, b = flat(a), flat(b)
    if a and b and (lacking := a.keys() ^ b.keys()):
        usual = {key: value for key, value in defaults().items() if key in lacking}
        a, b = a | usual | a, b | usual | b
    keys = [key for key in a | b if a.get(key) != b.get(key)]
    return [[key, str(a.get(key, "-")), str(b.get(key, "-"))] for key in keys]


def config_section(arms: dict[str, list[Run]], baseline: str) -> str:
    """Where arms' configs differ from the baseline's, and within an arm, where they should not."""
    parts = []
    for arm, runs in arms.items():
        for run in runs[1:]:
            if odd := config_diff(runs[0].config, run.config):
                parts.append(
                    f"warning: runs of one arm ({arm}) should not differ\n"
                    + table(["field", runs[0].name, run.name], odd)
                )
        if arm != baseline and runs[0].config and arms[baseline][0].config:
            rows = config_diff(arms[baseline][0].config, runs[0].config)
            same = f"{arm} has the config of {baseline}"
            parts.append(table(["field", baseline, arm], rows) if rows else same)
    return "\n\n".join(parts)


########################################
#                Plots                 #
########################################


def y_limits(runs: list[Run], metric: str, target: float) -> tuple[float, float]:
    """From the best loss to the worst at a fifth of training: step 0 would squash what matters."""
    lows, highs = [], []
    for run in runs:
        points = [(e["step"], e[metric]) for e in run.val if math.isfinite(e.get(metric, math.nan))]
        lows.append(min(y for _, y in points))
        begin = 0.2 * points[-1][0] if len(points) > 4 else 0  # of few points all are shown
        highs.append(next(y for step, y in points if step >= begin))
    low, high = min(lows), max(highs)
    # a target far below would squash the curves as well
    if target and target >= low - 0.5 * (high - low):
        low, high = min(low, target), max(high, target)
    pad = 0.05 * (high - low) or 0.05
    return low - pad, high + pad


def arm_style(i: int) -> dict:
    """Colour and line of the i-th arm of a figure."""
    return {"color": COLORS[i % len(COLORS)], "ls": ("-", "--", "-.")[i // len(COLORS) % 3]}


def draw_arm(ax, runs: list[Run], metric: str, clock: str, scale: float, arm: str, style: dict):
    """Each seed thin, dotted if unfinished; bold the finished ones' mean, over what all cover."""
    curves = []
    for run in runs:
        if points := [(e[clock] / scale, e[metric]) for e in run.val if metric in e and clock in e]:
            x, y = map(np.array, zip(*points, strict=True))
            few = {"marker": "o", "ms": 4} if len(x) < 13 else {}
            dotted = {} if run.finished else {"ls": ":"}
            ax.plot(x, y, lw=0.8, alpha=0.6, **style | few | dotted)
            curves += [(x, y)] if run.finished else []
    if curves:
        first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        grid = np.unique(np.concatenate([x for x, _ in curves]))
        grid = grid[(first <= grid) & (grid <= last)]
        mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
        final = mean_sd([y[-1] for _, y in curves])[0]
        ax.plot(grid, mean, lw=2.4, label=f"{arm}: {final:.4f} (n={len(curves)})", **style)


def plot_curves(
    arms: dict[str, list[Run]], metric: str, target: float, baseline: str, path: Path
) -> bool:
    """Validation curves against the train clock and steps; False if there is nothing to draw."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    def drawable(run: Run) -> bool:
        return any(math.isfinite(event.get(metric, math.nan)) for event in run.val)

    arms = {arm: [run for run in group if drawable(run)] for arm, group in arms.items()}
    runs = [run for group in arms.values() for run in group]
    if not runs:
        return False
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    minutes = max(run.val[-1].get("train_time_ms", 0) for run in runs) > 6e5
    scale, unit = (6e4, "minutes") if minutes else (1e3, "s")
    kinds = (("train_time_ms", scale, f"training time ({unit})"), ("step", 1, "optimizer steps"))
    finished = [run.val[-1] for run in arms[baseline] if run.finished]
    ends = [event[metric] for event in finished if metric in event]
    for ax, (clock, scale, label) in zip(axes, kinds, strict=True):
        for i, (arm, group) in enumerate(arms.items()):
            dash = ("-", "--", "-.")[i // len(COLORS) % 3]
            style = {"color": COLORS[i % len(COLORS)], "ls": dash}
            draw_arm(ax, group, metric, clock, scale, arm, style)
        if ends and len(arms) > 1:
            ax.axhline(mean_sd(ends)[0], color="0.4", lw=1, ls=":", label=f"end of {baseline}")
        if target:
            ax.axhline(target, color="0.4", lw=1, ls="--", label=f"target {target:g}")
        ax.set(xlabel=label, xlim=(0, None))
        ax.grid(alpha=0.25, lw=0.6)
    unit = "bits per byte" if "bpb" in metric else "nats per token"
    axes[0].set(ylim=y_limits(runs, metric, target), ylabel=f"{metric} ({unit})")
    axes[1].legend(title="arm: mean of the last evaluations", frameon=False)
    figure.savefig(path, dpi=130)
    return True


def plot_schedules(arms: dict[str, list[Run]], path: Path) -> bool:
    """What varied in training, as logged, one run per arm; False if nothing did."""
    from matplotlib.figure import Figure

    series = {key: {} for key in SCHEDULES}  # field -> arm -> [(step, value)]
    for arm, group in arms.items():
        longest = max((run.train + run.val for run in group), key=len)
        logged = sorted(longest, key=lambda e: e["step"])
        for key in SCHEDULES:
            points = [(e["step"], e[key]) for e in logged if isinstance(e.get(key), int | float)]
            if points:
                series[key][arm] = points
    levels = {}  # field -> the values that it took, where there are several
    for key, lines in series.items():
        values = {value for points in lines.values() for _, value in points}
        if len(values) > 1:
            levels[key] = sorted(values)
    if not levels:
        return False
    columns = min(len(levels), 3)
    rows = math.ceil(len(levels) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    for place, (key, values) in enumerate(levels.items()):
        ax = figure.add_subplot(rows, columns, place + 1)
        whole = all(value == round(value) for value in values)  # repeats, lengths and batches jump
        style = "steps-post" if whole else "default"
        for i, (arm, points) in enumerate(series[key].items()):
            width = 2 * (len(series[key]) - i)  # earlier arms wider: so equal schedules show
            steps, drawn = zip(*points, strict=True)
            color = COLORS[i % len(COLORS)]
            ax.plot(steps, drawn, color=color, lw=width, drawstyle=style, label=arm)
        if whole and len(values) < 8:
            ax.set_yticks(values)
        ax.set(xlabel="optimizer steps", ylabel=SCHEDULES[key], xlim=(0, None))
        ax.grid(alpha=0.25, lw=0.6)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    return True


########################################
#             Command line             #
########################################


@dataclass
class Options:
    """Tables, statistics, verdicts and plots over training runs."""

    # run folders, folders of runs or logs, globs, log files
    runs: tyro.conf.Positional[tuple[str, ...]]
    out: str = "logs/report"  # folder for report.md and the PNGs
    # arm that the others are compared with; empty: one called `baseline`, else the first
    baseline: str = ""
    metric: str = ""  # what plots and time to loss are about; empty: the rule's metric
    # preset (TOML) whose [rule] table judges runs without a config, such as upstream logs
    rule: str = ""
    no_plots: bool = False  # text only


def build(runs: list[Run], baseline: str = "", metric: str = "", fallback: dict | None = None):
    """All that the report says: ({title: text}, arms, baseline, metric of the curves, target)."""
    arms = {}
    for run in runs:
        arms.setdefault(str(run.arm), []).append(run)
    if baseline and baseline not in arms:
        raise UserError(
            f"--baseline {baseline}: no run is of that arm; the arms are {', '.join(arms)}"
        )
    baseline = baseline or ("baseline" if "baseline" in arms else next(iter(arms)))
    rule = rule_of(next((run.config for run in runs if run.config), fallback or {}))
    metric = metric or rule["metric"]
    logged = dict.fromkeys(key for run in runs for event in run.val for key in event)
    averages = [key for key in logged if re.match(r"val_(loss|bpb)_", key)]
    names = dict.fromkeys([*METRICS, *EPOCHS, *averages, metric])
    metrics = [key for key in names if any(run.value(key) is not None for run in runs)]
    if metric not in (*metrics, rule["metric"]):
        raise UserError(
            f"--metric {metric}: no run has it; there is {', '.join(metrics) or 'nothing yet'}"
        )
    # final scores have no curve of their own
    wanted = [metric, "val_bpb"] if "bpb" in metric else [metric]
    curve = next((key for key in wanted if key in logged), "val_loss")
    finished = {arm: [run for run in group if run.finished] for arm, group in arms.items()}
    differences = compare_section(finished, baseline, metrics)
    sections = {
        "Runs": run_section(runs, metrics),
        "Arms (finished runs)": arm_section(finished, metrics),
        f"Difference to {baseline} (p: lower, one-sided)": differences,
        f"Training to {baseline}'s final {curve}": time_section(finished, baseline, curve),
        "Rule of the track": rule_section(arms, fallback or {}, baseline),
        "Config": config_section(arms, baseline),
    }
    target = rule["target"] if rule["metric"] == curve else 0.0
    return {title: text for title, text in sections.items() if text}, arms, baseline, curve, target


def report(options: Options):
    """Read the runs, print the report and write it to a folder."""
    fallback = {}
    try:
        if options.rule:
            fallback = tomllib.loads(Path(options.rule).read_text(encoding="utf-8"))
            rule_of(fallback)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: rule, but no table
        raise UserError(f"--rule {options.rule}: {error}; give a preset of configs/") from error
    if not options.runs:
        raise UserError("no runs given; try `python logs/report.py logs`")
    runs = find_runs(options.runs)
    built = build(runs, options.baseline, options.metric, fallback)
    sections, arms, baseline, curve, target = built
    folder, images = Path(options.out), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not options.no_plots:
            if plot_curves(arms, curve, target, baseline, folder / "curves.png"):
                images.append("curves.png")
            if plot_schedules(arms, folder / "schedules.png"):
                images.append("schedules.png")
        body = "".join(f"\n## {title}\n\n```\n{text}\n```\n" for title, text in sections.items())
        body += "".join(f"\n![{name}]({name})\n" for name in images)
        (folder / "report.md").write_text("# Report\n" + body, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out {options.out}: {error}; give a folder that can be written"
        ) from error
    print("\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections.items()))
    print(f"\nwrote {', '.join(str(folder / name) for name in ['report.md', *images])}")


def program() -> int | None:
    if sys.argv[1:2] == ["embeddings"]:
        from logs import embeddings  # torch, which a report does not need

        return embeddings.main(sys.argv[2:])
    return report(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))


def main():
    if code := ending("report.py", program):
        raise SystemExit(code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    main()
