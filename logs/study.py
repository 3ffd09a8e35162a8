"""
A study: arms x seeds, matched, from one command; a table, a figure, and what its analysis adds.

    ./run.sh study depth                                # configs/studies/depth.toml: its data, its runs, its report
    ./run.sh study depth --seeds 1 2 --max_seconds 180  # further flags are the trainer's, for all arms
    python logs/study.py nca --arms list                # the arms that there are
    python logs/study.py nca --arms "muon-load-*"       # some of them, and what they are compared with
    python logs/study.py depth --only report            # tables of what is finished, nothing trained

The file of a study says

    base = ["golf_cpu"]       presets, layered left to right; an arm may name its own
    baseline = "constant"     arm that the others are compared with; of a grid: { axis = "value" }, the rest alike
    metric = "val_loss"       what is compared: a number of result.json
    seeds = [1, 2, 3]
    differ = ["repeats"]      fields in which alone an arm may differ from the one that it is compared with
    sizes = ["steps"]         fields that may differ as well and that flags may set for all
    must = { slow = "" }      values that every run has to have
    default = ["a", "b"]      arms that run where --arms names none; without it all do
    analysis = "nca"          logs/nca.py adds its tables and figures
    quiet = true              a line for each run instead of its log
    [flags]                   the trainer's flags, for all arms
    [arms.NAME]               an arm's flags, and where it needs them: base, note, from = an arm whose flags it
                              begins with and is compared with (with the first of a chain), phase1 = a run of
                              pre-pre-training that it starts from, longer = true for the time of phase 1 as steps
    [phase1]                  flags of pre-pre-training, for all; its runs are the tables in it: NAME = { flags }
    [grid]                    instead of arms: each axis a list of numbers, or a table NAME = { flags }
    [tricks.NAME]             instead of arms: base, each trick added alone, all, and all without each

A text flag may compute with an axis of numbers or a number of the configuration: "{1e-5 / lr}".

Arms take turns within a seed, so that a machine that drifts does so for all. Everything runs in
this process (or these ranks): runs of seconds need no start of their own. A finished run is known by
its folder and its configuration; other flags are an error that names them. p is two-sided, of the
t-test paired by seed, and nothing is corrected for the number of arms.
"""

import argparse
import ast
import contextlib
import dataclasses
import fnmatch
import importlib
import io
import itertools
import json
import math
import re
import shlex
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

from logs import report  # noqa: E402
from logs.endings import ending  # noqa: E402

# train_gpt and pre_pre_train are imported where runs are made: a report needs no torch

KEYS = {
    "base": list,
    "baseline": str | dict,
    "metric": str,
    "seeds": list,
    "differ": list,
    "sizes": list,
    "must": dict,
    "default": list,
    "analysis": str,
    "quiet": bool,
    "flags": dict,
    "arms": dict,
    "phase1": dict,
    "grid": dict,
    "tricks": dict,
}
# what names a run or says where it is kept, and so differs between any two
NAMES = {"config", "run", "arm", "log_dir", "resume"}


class StudyError(Exception):
    """Bad input: what was given, why it cannot work, what to do. Exit code 2."""


########################################
#                 Arms                 #
########################################


@dataclass
class Arm:
    name: str
    base: list[str]  # presets
    flags: dict  # over the study's
    against: str = ""  # arm that it is compared with; empty: others are compared with it
    phase1: str = ""  # pre-pre-training that it starts from
    longer: bool = False
    note: str = ""
    cell: dict[str, str | float] = field(default_factory=dict)  # its place in the grid


def read_study(name: str) -> dict:
    """What a study's file says, by name or path; unknown keys and wrong types are errors."""
    folder = ROOT / "configs" / "studies"
    path = next((p for p in (Path(name), folder / f"{name}.toml") if p.is_file()), None)
    if not path:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise StudyError(f"{name}: no such file and no study of that name; there are {known}")
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise StudyError(f"{path} is not TOML: {e}") from e
    for key, value in said.items():
        if key not in KEYS:
            raise StudyError(f"{path}: unknown key {key}; there are {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]):
            raise StudyError(f"{path}: {key} = {value!r} must be {KEYS[key]}")
    if sum(key in said for key in ("arms", "grid", "tricks")) != 1:
        raise StudyError(f"{path}: give one of [arms], [grid] and [tricks]")
    return said


def all_arms(said: dict) -> dict[str, Arm]:
    """Every arm of a study by name, each with the one that it is compared with."""
    if "grid" in said:
        return grid_arms(said)
    arms, first = {}, {}  # first: name -> where its chain of `from` begins
    baseline = said.get("baseline", "base" if "tricks" in said else "")
    for name, given in (said.get("arms") or trick_arms(said["tricks"])).items():
        own = dict(given)
        parent = own.pop("from", "")
        if parent and parent not in arms:
            raise StudyError(f"arm {name}: from = {parent!r}: no arm before it has that name")
        before = arms.get(parent) or Arm("", said.get("base", []), {})
        first[name] = first.get(parent, name)
        arms[name] = Arm(
            name,
            own.pop("base", before.base),
            against=first[name] if parent else baseline * (name != baseline),
            phase1=own.pop("phase1", before.phase1),
            longer=own.pop("longer", False),
            note=own.pop("note", ""),
            flags=before.flags | own,  # what the lines above have left
        )
    if baseline and baseline not in arms:
        raise StudyError(f"baseline = {baseline!r}: no such arm; there are {', '.join(arms)}")
    return arms


def trick_arms(tricks: dict[str, dict]) -> dict[str, dict]:
    """The base, each trick added alone; all of them, and all without each, compared with all."""

    def stack(without: str) -> dict:
        return {k: v for name, flags in tricks.items() if name != without for k, v in flags.items()}

    arms = {"base": {}} | {f"add-{name}": flags for name, flags in tricks.items()}
    arms["all"] = stack("")
    return arms | {f"without-{name}": stack(name) for name in tricks}


def grid_arms(said: dict) -> dict[str, Arm]:
    """A cell is called by its places on all axes; a number with its axis before it."""
    axes, arms, baseline = said["grid"], {}, said.get("baseline", "")
    place = lambda axis, v: v if isinstance(v, str) else f"{axis}{v:g}"
    named = lambda cell: "-".join(itertools.starmap(place, cell.items()))
    for values in itertools.product(*axes.values()):
        cell, flags = dict(zip(axes, values)), {}
        for axis, value in cell.items():
            flags |= axes[axis][value] if isinstance(axes[axis], dict) else {}
        against = named(cell | baseline) if isinstance(baseline, dict) else baseline
        base = flags.pop("base", said.get("base", []))
        name = named(cell)
        arms[name] = Arm(name, base, flags, against * (against != name), cell=cell)
    if lost := {arm.against for arm in arms.values()} - {"", *arms}:
        raise StudyError(f"baseline = {baseline!r}: there is no {', '.join(lost)}")
    return arms


def compute(text: str, numbers: dict[str, float]) -> str:
    """A flag's text with each {expression} worked out: + - * / // **, brackets, round, numbers."""
    allowed = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    allowed += (ast.Constant, ast.Name, ast.Load, ast.Call)

    def value(found: re.Match) -> str:
        try:
            tree = ast.parse(found[1].strip(), mode="eval")
            if not all(isinstance(node, allowed) for node in ast.walk(tree)):
                raise ValueError("more than arithmetic")
            code = compile(tree, "study", "eval")
            return f"{eval(code, {'__builtins__': {}, 'round': round}, numbers):.12g}"
        except (SyntaxError, TypeError, ValueError, NameError, ArithmeticError) as e:
            raise StudyError(f"{text!r}: {found[0]} cannot be worked out: {e}") from e

    return re.sub(r"\{([^{}]*)\}", value, text)


########################################
#                Study                 #
########################################


def words(flags: dict) -> list[str]:
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


@dataclass
class Study:
    name: str
    said: dict  # what its file says
    arms: dict[str, Arm]  # those that run
    seeds: list[int]
    more: list[str]  # flags of the trainer, for all arms
    phase1: list[str]  # flags of pre-pre-training, for all of its runs
    log_dir: Path

    @property
    def out(self) -> Path:
        return self.log_dir / f"report-{self.name}"

    def folder(self, arm: str, seed: int) -> Path:
        return self.log_dir / self.name / f"{arm}-s{seed}"

    def placed(self, arm: str, seed: int) -> list[str]:
        """Flags that name a run of this study."""
        folder = self.folder(arm, seed)
        where = ["--log_dir", str(folder.parent), "--run", folder.name]
        return [*where, "--arm", arm, "--seed", str(seed), "--resume"]

    def config(self, name: str, seed: int, **length):
        """The resolved configuration of a run; `length`: how long a `longer` one is."""
        import train_gpt

        arm = self.arms[name]
        own = self.said.get("flags", {}) | arm.flags
        if arm.phase1:
            own["init_from"] = str(self.folder(f"pre-{arm.phase1}", seed))
        presets = ["--config", *arm.base] if arm.base else []

        def parse(flags: dict):
            last = [*self.more, *words(length), *self.placed(name, seed)]
            return train_gpt.parse_args([*presets, *words(flags), *last])

        computed = {k for k, v in own.items() if "{" in str(v)}
        if computed:
            plain = parse({k: v for k, v in own.items() if k not in computed})
            numbers = {k: v for k, v in vars(plain).items() if isinstance(v, (int, float))}
            numbers |= {k: v for k, v in arm.cell.items() if not isinstance(v, str)}
            own |= {k: compute(own[k], numbers) for k in computed}
        return parse(own)

    def phase1_argv(self, name: str, seed: int) -> list[str]:
        """Flags of a pre-pre-training run; its model is that of the study's presets."""
        runs = self.said.get("phase1", {})
        if not isinstance(runs.get(name), dict):
            known = ", ".join(k for k, v in runs.items() if isinstance(v, dict))
            raise StudyError(f"phase1 = {name!r}: [phase1] has no such run; it has {known}")
        own = {k: v for k, v in runs.items() if not isinstance(v, dict)} | runs[name]
        like = ["--like", *self.said.get("base", [])]
        return [*like, *words(own), *self.phase1, *self.placed(f"pre-{name}", seed)]

    def free(self) -> set[str]:
        """Fields in which arms that are compared may differ."""
        tricks = [key for flags in self.said.get("tricks", {}).values() for key in flags]
        return {*self.said.get("differ", []), *self.said.get("sizes", []), *tricks}

    def differences(self, name: str) -> list[list[str]]:
        """[field, there, here] of an arm and the one that it is compared with; errors if unfair."""
        here, there = (self.config(n, self.seeds[0]) for n in (name, self.arms[name].against))
        rows = [
            [f.name, repr(getattr(there, f.name)), repr(getattr(here, f.name))]
            for f in dataclasses.fields(here)
            if f.name not in NAMES and getattr(there, f.name) != getattr(here, f.name)
        ]
        if wrong := [row for row in rows if row[0] not in self.free()]:
            raise StudyError(
                f"arm {name} is no fair comparison with {self.arms[name].against}: beside what may "
                f"differ it differs in {', '.join(f'{k} ({a} there, {b} here)' for k, a, b in wrong)}"
                "; give both the same, or name the field in `differ`"
            )
        return rows

    def check(self) -> list[list[str]]:
        """Rows (arm, compared with, field, there, here); an error where the arms are not matched."""
        flags = {w.partition("=")[0].removeprefix("--") for w in self.more if w.startswith("--")}
        fixed = self.free() - {*self.said.get("sizes", [])} | {*self.said.get("must", {})}
        if bad := flags & (fixed | {"seed", "run", "arm", "resume"}):
            raise StudyError(
                f"--{min(bad)}: that is what the arms differ in, or what names or matches the runs; "
                "--seeds takes seeds, the study's file the rest"
            )
        rows = []
        for name, arm in self.arms.items():
            cfg = self.config(name, self.seeds[0])
            for key, value in self.said.get("must", {}).items():
                if getattr(cfg, key) != value:
                    raise StudyError(
                        f"arm {name}: {key} = {getattr(cfg, key)!r}, but this study needs {value!r}"
                    )
            if arm.longer and cfg.max_seconds:
                raise StudyError(
                    f"arm {name}: runs of max_seconds = {cfg.max_seconds:g} have no number of steps "
                    "to lengthen: give --max_seconds 0 --steps N, or leave the arm out"
                )
            changed = self.differences(name) if arm.against else []
            if arm.longer:
                changed.append(["steps", str(cfg.steps), "longer by the time of phase 1"])
            rows += [[name, arm.against, *row] for row in changed]
        return rows


########################################
#                 Runs                 #
########################################


def is_over(cfg, folder: Path) -> bool:
    """Whether a run is finished or has diverged; one under other settings is refused."""
    import train_gpt

    over = (folder / "result.json").exists() or (folder / "diverged").exists()
    # an analysis reads the statistics that embed_stats asks for
    free = train_gpt.FREE_ON_RESUME - {"embed_stats"}
    if over and (changed := train_gpt.changed_fields(cfg, folder, free)):
        raise StudyError(
            f"{folder} is over, but was made with other flags:\n"
            + "\n".join(changed)
            + "\nuse the old values, another --log_dir, or delete it"
        )
    return over


def refuse_other_settings(study: Study) -> None:
    """Before anything is trained: whether all that is over was made with these flags."""
    import pre_pre_train

    for seed, (name, arm) in itertools.product(study.seeds, study.arms.items()):
        if not arm.longer:
            is_over(study.config(name, seed), study.folder(name, seed))
        if arm.phase1:
            folder = study.folder(f"pre-{arm.phase1}", seed)
            is_over(pre_pre_train.parse_args(study.phase1_argv(arm.phase1, seed)), folder)


def train_phase1(study: Study, name: str, seed: int, ranks) -> None:
    """A pre-pre-training run, unless it is finished; the making of its data is timed before it."""
    import pre_pre_train
    from logs import nca

    argv = study.phase1_argv(name, seed)
    ranks.on_main(lambda: nca.generation(study, name))
    cfg = pre_pre_train.parse_args(argv)
    if not ranks.on_main(lambda: is_over(cfg, study.folder(f"pre-{name}", seed))):
        clean(cfg)
        if code := pre_pre_train.main(argv):
            raise SystemExit(code)


def clean(cfg) -> None:
    """What runs before left in this process: compiled graphs, memory, its greatest use."""
    import torch

    if cfg.compile:
        # graphs of the runs before would count against the limit of recompilations
        torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def train_one(study: Study, name: str, seed: int, ranks) -> str:
    """One run; what became of it. One whose loss or gradient is not finite is marked and counts."""
    import train_gpt
    from logs import nca

    arm, folder, more = study.arms[name], study.folder(name, seed), {}
    if arm.phase1:
        train_phase1(study, arm.phase1, seed, ranks)
    if arm.longer:
        more = ranks.on_main(lambda: nca.longer(study, name, seed))
    cfg = study.config(name, seed, **more)
    if ranks.on_main(lambda: is_over(cfg, folder)):
        return "was there"
    clean(cfg)
    quiet = study.said.get("quiet", False)
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        run = stack.enter_context(train_gpt.Run(cfg))
        try:
            code = train_gpt.train(cfg, run)
        except train_gpt.Diverged as e:  # on every rank alike
            message = f"{e}\n".encode()
            ranks.on_main(lambda: train_gpt.write_whole(folder / "diverged", message))
            return "diverged"
    if code:
        raise SystemExit(code)  # stopped by a signal, its state saved
    if not ranks.is_main:
        return ""
    value = report.load_folder(folder).value(study.said["metric"])
    return f"{study.said['metric']} {report.number(value)}"


def train(study: Study) -> None:
    """All runs that are not over, the arms in turn for each seed; ranks meet once for all."""
    import train_gpt

    jobs = list(itertools.product(study.seeds, study.arms))
    began = time.perf_counter()
    ranks = train_gpt.Run(study.config(jobs[0][1], jobs[0][0]))
    ranks.prepare_machine()
    ranks.meet()
    ranks.on_main(lambda: refuse_other_settings(study))
    for i, (seed, name) in enumerate(jobs):
        head = f"{i + 1}/{len(jobs)} {name} seed {seed}:"
        if ranks.is_main and not study.said.get("quiet"):
            print(f"== {head}", flush=True)
        became = train_one(study, name, seed, ranks)
        if ranks.is_main:
            print(f"{head} {became} ({time.perf_counter() - began:.0f} s)", flush=True)
    ranks.part()


########################################
#                Report                #
########################################


def load(study: Study) -> dict[str, list[report.Run]]:
    """Runs that are over, by arm; a diverged one is not finished."""
    found = {}
    for name in study.arms:
        folders = [study.folder(name, seed) for seed in study.seeds]
        over = [f for f in folders if any((f / k).exists() for k in ("result.json", "diverged"))]
        found[name] = [report.load_folder(f) for f in over]
    if not any(found.values()):
        raise StudyError(f"{study.log_dir / study.name}: no run of this study is finished")
    return found


def summary(study: Study, found: dict[str, list[report.Run]]) -> list[dict]:
    """A row for each arm: n, mean and sd of the metric, what separates it from its twin, costs."""
    rows, metric = [], study.said["metric"]
    finished = {name: [run for run in runs if run.finished] for name, runs in found.items()}
    for name, runs in finished.items():
        values = [v for run in runs if (v := run.value(metric)) is not None]
        paces = [1000 * run.value("train_time_s") / run.value("steps") for run in runs]
        row = {"arm": name, "against": study.arms[name].against, "n": len(values)}
        row["diverged"] = len(found[name]) - len(runs)
        row["mean"], row["sd"] = report.mean_sd(values)
        row |= report.paired(runs, finished.get(row["against"], []), metric)
        row["step_ms"] = report.mean_sd(paces)[0]
        for key in ("steps", "train_time_s", "artifact_bytes"):
            known = [v for run in runs if (v := run.value(key)) is not None]
            row[key] = report.mean_sd(known)[0]
        rows.append(row | {"note": study.arms[name].note})
    return rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads well as text, too; columns that say nothing are left out."""
    keep = [i for i in range(len(header)) if any(row[i] not in ("", "-", "0") for row in rows)]
    lines = [[row[i] for i in keep] for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, *(i for i, k in enumerate(keep) if header[k] in ("to", "note", "field"))}
    out = []
    for line in lines:
        cells = [
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))
        ]
        out.append(f"| {' | '.join(cells)} |")
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([out[0], f"| {' | '.join(rule)} |", *out[1:]])


def table(study: Study, rows: list[dict]) -> str:
    one = len({row["against"] for row in rows} - {""}) < 2
    header = ["arm", "n", "diverged", study.said["metric"], "sd", "to", "d", "sd", "95 % interval"]
    header += ["p", "steps", "ms a step", "train s", "bytes", "note"]

    def cell(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    body = []
    for row in rows:
        low, high = row["difference"] - row["half"], row["difference"] + row["half"]
        body.append(
            [
                row["arm"],
                str(row["n"]),
                str(row["diverged"]),
                cell(row["mean"], ".4f"),
                cell(row["sd"], ".4f"),
                "" if one else row["against"],
                cell(row["difference"], "+.4f"),
                cell(row["difference_sd"], ".4f"),
                "-" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}",
                cell(row["p"], ".2g"),
                cell(row["steps"], ",.0f"),
                cell(row["step_ms"], ".1f"),
                cell(row["train_time_s"], ".1f"),
                cell(row["artifact_bytes"], ",.0f"),
                row["note"],
            ]
        )
    return markdown(header, body)


def curve_metric(study: Study, runs: list[report.Run]) -> str:
    """What the validation curves show: the metric, or what it is a final score of."""
    metric = study.said["metric"]
    wanted = (metric, "val_bpb") if "bpb" in metric else (metric,)
    logged = {key for run in runs for event in run.val for key in event}
    return next((key for key in wanted if key in logged), "val_loss")


def times(study: Study, found: dict[str, list[report.Run]]) -> str:
    """How much of its twin's training each arm needs to reach that one's final loss."""
    finished = {name: [r for r in runs if r.finished and r.val] for name, runs in found.items()}
    parts = []
    for against in dict.fromkeys(arm.against for arm in study.arms.values() if arm.against):
        group = {n: finished[n] for n, arm in study.arms.items() if arm.against == against}
        curve = curve_metric(study, finished[against])
        if all(len(run.val) > 3 for run in finished[against]):
            parts.append(report.time_section(group | {against: finished[against]}, against, curve))
    return "\n".join(part for part in parts if part)


def config_rows(study: Study, found: dict[str, list[report.Run]]) -> list[list[str]]:
    """[arm, compared with, field, there, here], as the runs' own configurations have it."""
    rows = []
    for name, runs in found.items():
        twins = found.get(study.arms[name].against)
        if runs and twins:
            changed = report.config_diff(twins[0].config, runs[0].config)
            rows += [[name, twins[0].arm, *row] for row in changed]
    return rows


def draw_curves(ax, study: Study, found: dict[str, list[report.Run]]) -> None:
    """Validation curves against the train clock: seeds thin, the mean of finished ones bold."""
    every = [run for runs in found.values() for run in runs]
    metric = curve_metric(study, every)
    drawn = [run for run in every if any(math.isfinite(e.get(metric, math.nan)) for e in run.val)]
    for i, (name, runs) in enumerate(found.items()):
        style = report.arm_style(i)
        report.draw_arm(ax, runs, metric, "train_time_ms", 1e3, name, style)
    unit = "bits per byte" if "bpb" in metric else "nats per token"
    low, high = report.y_limits(drawn, metric, 0.0)
    ax.set(xlabel="training time (s)", ylabel=f"{metric} ({unit})", ylim=(low, high))
    ax.legend(title="arm: mean of the last evaluations", frameon=False, fontsize=8)


def draw_differences(ax, study: Study, rows: list[dict], found: dict) -> None:
    """Paired differences with 95 % intervals of t, and those of the seeds as dots."""
    metric = study.said["metric"]
    rows = [row for row in rows if row["against"]][::-1]
    for y, row in enumerate(rows):
        pairs = report.pair_up(found[row["arm"]], found[row["against"]])
        values = [(run.value(metric), twin.value(metric)) for run, twin in pairs]
        gaps = [a - b for a, b in values if a is not None and b is not None]
        ax.plot(gaps, [y - 0.2] * len(gaps), ".", color="0.6", ms=5)
        half = 0.0 if math.isnan(row["half"]) else row["half"]
        ax.errorbar(row["difference"], y, xerr=half, fmt="o", ms=5, capsize=3, color="#0072B2")
    ax.axvline(0, color="0.4", lw=1)
    named = "grid" not in study.said and len({row["against"] for row in rows}) > 1
    labels = [row["arm"] + (f" to {row['against']}" if named else "") for row in rows]
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    ax.set_ylim(-0.8, len(rows) - 0.2)
    to = study.said.get("baseline", "what each is compared with")
    to = " ".join(to.values()) if isinstance(to, dict) else to
    ax.set_xlabel(f"difference in {metric} to {to},\npaired by seed; bars: 95 % of t")


def draw(study: Study, rows: list[dict], found: dict[str, list[report.Run]], path: Path) -> bool:
    """Curves where they were logged and can be told apart, and differences."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    most = max(len(run.val) for runs in found.values() for run in runs)
    curves = most > 3 and len(found) <= 2 * len(report.COLORS)
    compared = sum(bool(row["against"]) for row in rows)
    panels = curves + bool(compared)
    if not panels:
        return False
    size = (6.5 * panels, max(4.5, 1.2 + 0.3 * compared))
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.grid(alpha=0.25, lw=0.6)
    if curves:
        draw_curves(axes[0], study, found)
    if compared:
        draw_differences(axes[-1], study, rows, found)
    figure.savefig(path, dpi=130)
    return True


def json_ready(value):
    """The same with None, JSON's null, where a number is not one: one seed has no deviation."""
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(study: Study) -> None:
    """report.md, study.json and study.png of the runs that are over, and what the analysis adds."""
    found, out = load(study), study.out
    rows = summary(study, found)
    out.mkdir(parents=True, exist_ok=True)
    sections = {"Arms, and differences paired by seed": table(study, rows)}
    if text := times(study, found):
        sections["Training to the final loss of the arm compared with"] = text
    images = ["study.png"] * draw(study, rows, found, out / "study.png")
    if "analysis" in study.said:
        analysis = importlib.import_module(f"logs.{study.said['analysis']}")
        more, drawn = analysis.analyse(study, found, out)
        sections |= more
        images += drawn
    if differ := config_rows(study, found):
        header = ["arm", "to", "field", "there", "here"]
        sections["What the arms differ in"] = markdown(header, differ)
    record = {"study": study.name, "file": study.said, "flags": study.more, "seeds": study.seeds}
    text = json.dumps(json_ready(record | {"arms": rows}), indent=1, allow_nan=False) + "\n"
    (out / "study.json").write_text(text, encoding="utf-8")
    blocks = {k: v if v.startswith("|") else f"```\n{v}\n```" for k, v in sections.items()}
    body = "".join(f"\n## {title}\n\n{block}\n" for title, block in blocks.items())
    body += "".join(f"\n![{name}]({name})\n" for name in images)
    (out / "report.md").write_text(f"# {study.name}\n{body}", encoding="utf-8")
    print("\n\n".join(f"{report.wrap(title)}\n{text}" for title, text in sections.items()))
    print(f"\nwrote {', '.join(str(out / n) for n in ['report.md', 'study.json', *images])}")


########################################
#             Command line             #
########################################


def chosen(said: dict, patterns: list[str]) -> dict[str, Arm]:
    """The arms asked for and those that they are compared with; longer ones come last."""
    known, names = all_arms(said), []
    for pattern in patterns or said.get("default", ["*"]):
        matching = fnmatch.filter(known, pattern)
        if not matching:
            raise StudyError(f"--arms {pattern}: no such arm; there are {', '.join(known)}")
        names += matching
    wanted = {n for name in names for n in (name, known[name].against)}
    arms = {name: arm for name, arm in known.items() if name in wanted}
    return dict(sorted(arms.items(), key=lambda named: named[1].longer))


def get_data(study: Study) -> None:
    from logs import start

    for folder in dict.fromkeys(study.config(name, study.seeds[0]).data for name in study.arms):
        start.get_data(folder)


def arguments() -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("study", description=__doc__, formatter_class=kind)
    parser.allow_abbrev = False
    parser.add_argument("study", help="a name in configs/studies/, or a path")
    parser.add_argument(
        "--arms", nargs="+", default=[], help="names, patterns; list: all there are"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--phase1", default="", help="flags of pre-pre-training, as one string")
    parser.add_argument("--log_dir", default="logs", help="runs go to LOG_DIR/NAME")
    parser.add_argument("--only", choices=("get", "train", "report"), help="one step of the three")
    return parser


def program(argv: list[str] | None) -> int:
    options, more = arguments().parse_known_args(argv)
    said = read_study(options.study)
    if options.arms == ["list"]:
        for name, arm in all_arms(said).items():
            print(f"{name:24} {arm.against or '-':12} {arm.note}".rstrip())
        return 0
    seeds = options.seeds or said.get("seeds", [1])
    if len(set(seeds)) < len(seeds):
        raise StudyError(
            f"--seeds {' '.join(map(str, seeds))}: each seed is one run: no seed twice"
        )
    study = Study(
        Path(options.study).stem,
        said,
        chosen(said, options.arms),
        seeds,
        more,
        shlex.split(options.phase1),
        Path(options.log_dir),
    )
    if options.only in (None, "get"):
        if rows := study.check():
            print(markdown(["arm", "to", "field", "there", "here"], rows), flush=True)
        get_data(study)
    if options.only in (None, "train"):
        train(study)
    if options.only in (None, "report"):
        write_report(study)
    return 0


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        try:
            return program(argv)
        except Exception as e:
            tg = sys.modules.get("train_gpt")  # which a report need not import
            if tg and (message := tg.explain(e)):
                raise StudyError(message) from e
            raise

    return ending("error", work, StudyError, report.ReportError)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
