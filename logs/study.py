"""
A study: arms x seeds, matched, from one command; a table, a figure, and what its analysis adds.

    ./run.sh study depth                                # as configs/studies/depth.toml says
    ./run.sh study depth --seeds 1 2 --max_seconds 180  # other flags are the trainer's
    python logs/study.py nca --arms list                # the arms that there are
    python logs/study.py nca --arms "muon-load-*"       # some, and what they are compared with
    python logs/study.py depth --only report            # tables of what is finished

The file of a study says

    base = ["golf_cpu"]    presets, layered left to right; an arm may name its own
    baseline = "constant"  arm that the others are compared with; in a grid also { axis = "value" }
    metric = "val_loss"    what is compared: a number of result.json
    seeds = [1, 2, 3]
    differ = ["repeats"]   fields in which alone an arm may differ from what it is compared with
    sizes = ["steps"]      fields that may differ as well, and that flags may set for all arms
    must = { slow = "" }   values that every run has to have
    default = ["a", "b"]   arms that run where --arms names none; without it all do
    analysis = "nca"       logs/nca.py adds its tables and figures
    quiet = true           a line for each run instead of its log
    [flags]                the trainer's flags, for all arms
    [arms.NAME]            an arm's flags; and base, note, from = an arm whose flags it begins with
                           and is compared with (with the first of a chain), phase1 = the
                           pre-pre-training that it starts from, longer = true: its time as steps
    [phase1]               flags of all pre-pre-training; its runs are tables NAME = { flags }
    [grid]                 instead of arms: each axis a list of numbers or tables NAME = { flags }
    [tricks.NAME]          instead of arms: base, each trick added to it, all, all without each

A flag's text may compute with numbers of the grid and the configuration: "{1e-5 / lr}".

Arms take turns within a seed, so that a machine that drifts does so for all. All runs share this
process, or these ranks: runs of seconds need no start of their own. A finished run is known by its
folder and its configuration; other flags are an error that names them. p is two-sided, of the
t-test paired by seed, and nothing is corrected for the number of arms.

Contents: arms | matching | runs | command line
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import fnmatch
import io
import itertools
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

from logs import report, study_report  # noqa: E402
from logs.endings import UserError, ending  # noqa: E402

# train_gpt and pre_pre_train are imported where runs are made: a report needs no torch


def is_text(value) -> bool:
    return isinstance(value, str)


def is_flag(value) -> bool:
    return type(value) in (str, int, float, bool)


def are_texts(value) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def are_flags(value) -> bool:
    return isinstance(value, dict) and all(map(is_flag, value.values()))


def are_tables(value) -> bool:
    rows = value.values() if isinstance(value, dict) else []
    return len(rows) > 0 and all(isinstance(row, dict) for row in rows)


def are_seeds(value) -> bool:
    whole = isinstance(value, list) and all(type(v) is int for v in value)
    return whole and 0 < len(value) == len(set(value))


def are_values(value) -> bool:
    """Of an axis of a grid."""
    numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
    return numbers and len(value) > 0 or are_tables(value)


# what a value must be: in words, and whether it is that
TEXT, FLAG = ("a text", is_text), ("a text or a number", is_flag)
TEXTS, FLAGS = ("a list of texts", are_texts), ("a table of flags", are_flags)
BOOL = ("true or false", lambda v: isinstance(v, bool))
TABLES = ("tables, one at least", lambda v: isinstance(v, dict) and len(v) > 0)
AXIS = ("a list of numbers or tables NAME = { flags }", are_values)
SEEDS = ("a list of whole numbers, one at least and none twice", are_seeds)
KEYS = {
    "base": TEXTS,
    "baseline": ('an arm or { axis = "value" }', lambda v: is_text(v) or are_flags(v)),
    "metric": TEXT,
    "seeds": SEEDS,
    "differ": TEXTS,
    "sizes": TEXTS,
    "must": FLAGS,
    "default": ("a list of arms, one at least", lambda v: are_texts(v) and len(v) > 0),
    "analysis": TEXT,
    "quiet": BOOL,
    "flags": FLAGS,
    "arms": TABLES,
    "phase1": ("a table", lambda v: isinstance(v, dict)),
    "grid": ("axes, one at least", lambda v: isinstance(v, dict) and len(v) > 0),
    "tricks": TABLES,
}
ARM = {"base": TEXTS, "from": TEXT, "phase1": TEXT, "note": TEXT, "longer": BOOL}
# what names a run, says where it is kept, or is read by other programs
NAMES = {"config", "run", "arm", "track", "log_dir", "resume", "rule", "score"}

########################################
#                 Arms                 #
########################################


@dataclass
class Arm:
    name: str
    base: list[str]  # presets
    flags: dict  # over the study's
    against: str = ""  # arm that it is compared with; empty: none
    phase1: str = ""  # pre-pre-training that it starts from
    longer: bool = False
    note: str = ""
    cell: dict[str, str | float] = field(default_factory=dict)  # its place in the grid


def read_study(name: str) -> dict:
    """What a study's file says, by name or path; what is unknown or malformed is an error."""
    folder = ROOT / "configs" / "studies"
    path = next((p for p in (Path(name), folder / f"{name}.toml") if p.is_file()), None)
    if not path:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise UserError(f"{name}: no such file and no study of that name; there are {known}")
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not TOML: {e}") from e
    for key, value in said.items():
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key}; there are {', '.join(KEYS)}")
        expect(path, key, value, KEYS[key])
    if "metric" not in said or sum(key in said for key in ("arms", "grid", "tricks")) != 1:
        raise UserError(f"{path}: needs a metric, and one of [arms], [grid] and [tricks]")
    if "grid" not in said:
        expect(path, "baseline", said.get("baseline", ""), ("the name of an arm", is_text))
    check_arms(path, said)
    if "analysis" in said and said["analysis"] not in (known := analyses()):
        raise UserError(
            f"{path}: analysis = {said['analysis']!r} must be one of {', '.join(known)}, the files "
            "of logs/ that have one; leave it out for none"
        )
    return said


def expect(path: Path, key: str, value, kind: tuple[str, Callable[..., bool]]) -> None:
    """An error where a value is not of its kind."""
    words, is_one = kind
    if not is_one(value):
        raise UserError(f"{path}: {key} = {value!r} must be {words}")


def check_arms(path: Path, said: dict) -> None:
    """An error where the flags of an arm, a trick or a cell are none, or a run cannot be named."""
    named = {f"[{k}] {name}": v for k in ("arms", "tricks") for name, v in said.get(k, {}).items()}
    for axis, values in said.get("grid", {}).items():
        expect(path, f"[grid] {axis}", values, AXIS)
        if isinstance(values, dict):
            named |= {f"[grid.{axis}] {name}": flags for name, flags in values.items()}
    for where, flags in named.items():
        expect(path, where, flags, ("a table { flags }", lambda v: isinstance(v, dict)))
        for key, value in flags.items():
            expect(path, f"{where}: {key}", value, ARM.get(key, FLAG))
    either = ("a flag or a table { flags }", lambda v: is_flag(v) or are_flags(v))
    for name, value in said.get("phase1", {}).items():
        expect(path, f"[phase1] {name}", value, either)
        if isinstance(value, dict):
            check_name(name)


def check_name(name: str) -> None:
    """An error where a name is no part of a run's, which is a folder's (the trainer's rule)."""
    if re.search(r"[\s/\\]|^\.*$", name):
        raise UserError(
            f"arm {name!r}: a run's folder is named after it: give a name without / or blanks"
        )


def analyses() -> list[str]:
    """The files of logs/ that add to a report."""
    files = sorted((ROOT / "logs").glob("*.py"))
    return [p.stem for p in files if "\ndef analyse(" in p.read_text(encoding="utf-8")]


def all_arms(said: dict) -> dict[str, Arm]:
    """Every arm of a study by name."""
    arms = grid_arms(said) if "grid" in said else named_arms(said)
    for name in arms:
        check_name(name)
    if lost := {arm.against for arm in arms.values()} - {"", *arms}:
        raise UserError(f"baseline: no arm is called {min(lost)}; there are {', '.join(arms)}")
    return arms


def named_arms(said: dict) -> dict[str, Arm]:
    arms, first = {}, {}  # first: name -> where its chain of `from` begins
    baseline = said.get("baseline", "base" if "tricks" in said else "")
    for name, given in (said.get("arms") or trick_arms(said["tricks"])).items():
        own = dict(given)
        parent = own.pop("from", "")
        if parent and parent not in arms:
            raise UserError(f"arm {name}: from = {parent!r}: no arm before it has that name")
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
        if name.startswith("without-") and "tricks" in said:
            arms[name].against = "all"
    return arms


def trick_arms(tricks: dict[str, dict]) -> dict[str, dict]:
    """The base, each trick added to it; all of them, and all without each."""

    def stack(without: str) -> dict:
        return {k: v for name, flags in tricks.items() if name != without for k, v in flags.items()}

    arms = {"base": {}} | {f"add-{name}": flags for name, flags in tricks.items()}
    return arms | {"all": stack("")} | {f"without-{name}": stack(name) for name in tricks}


def grid_arms(said: dict) -> dict[str, Arm]:
    """A cell is called by its places on all axes; a number has its axis before it."""
    axes, arms, baseline = said["grid"], {}, said.get("baseline", "")
    place = lambda axis, v: v if isinstance(v, str) else f"{axis}{v:g}"
    named = lambda cell: "-".join(itertools.starmap(place, cell.items()))
    for values in itertools.product(*axes.values()):
        cell, flags = dict(zip(axes, values)), {}
        for axis, value in cell.items():
            flags |= axes[axis][value] if isinstance(axes[axis], dict) else {}
        name, base = named(cell), flags.pop("base", said.get("base", []))
        against = named(cell | baseline) if isinstance(baseline, dict) else baseline
        arms[name] = Arm(name, base, flags, against * (against != name), cell=cell)
    return arms


def compute(text: str, numbers: dict[str, float]) -> str:
    """A flag's text with each {expression} worked out: arithmetic, brackets, round, numbers."""
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
            raise UserError(f"{text!r}: {found[0]} cannot be worked out: {e}") from e

    return re.sub(r"\{([^{}]*)\}", value, text)


########################################
#               Matching               #
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
            try:
                return train_gpt.parse_args([*presets, *words(flags), *last])
            except SystemExit as e:  # the parser has said what is wrong, but not where it stands
                if not e.code:
                    raise
                raise UserError(f"study {self.name}: those are the flags of arm {name}") from e

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
            raise UserError(f"phase1 = {name!r}: [phase1] has no such run; it has {known}")
        own = {k: v for k, v in runs.items() if not isinstance(v, dict)} | runs[name]
        like = ["--like", *self.said.get("base", [])]
        return [*like, *words(own), *self.phase1, *self.placed(f"pre-{name}", seed)]

    def free(self) -> set[str]:
        """Fields in which arms that are compared may differ."""
        tricks = [key for flags in self.said.get("tricks", {}).values() for key in flags]
        return {*self.said.get("differ", []), *self.said.get("sizes", []), *tricks}

    def check(self) -> None:
        """An error where the arms are not matched, or a flag would make them so."""
        self.check_fields()
        fixed = self.free() - {*self.said.get("sizes", [])} | {*self.said.get("must", {})}
        fixed |= {"seed", "run", "arm", "resume"}
        given = [w[2:].partition("=")[0].replace("-", "_") for w in self.more if w[:2] == "--"]
        for key in given:
            if key in fixed:
                raise UserError(
                    f"--{key}: that is what the arms differ in, or names or matches the runs: "
                    "seeds are given with --seeds, all else in the study's file"
                )
        configs = {name: self.config(name, self.seeds[0]) for name in self.arms}
        for name, arm in self.arms.items():
            cfg = configs[name]
            for key, value in self.said.get("must", {}).items():
                if (has := getattr(cfg, key)) != value:
                    raise UserError(f"arm {name}: {key} = {has!r}; this study needs {value!r}")
            if arm.longer and cfg.max_seconds:
                raise UserError(
                    f"arm {name}: runs of max_seconds = {cfg.max_seconds:g} have no number of "
                    "steps to lengthen: give --max_seconds 0 --steps N, or leave the arm out"
                )
            if arm.against:
                self.compare(name, configs)

    def check_fields(self) -> None:
        """An error where the study's file names a field that there is not."""
        import train_gpt

        for key in ("differ", "sizes", "must"):
            for name in self.said.get(key, []):
                if name not in train_gpt.FIELDS:
                    near = difflib.get_close_matches(name, train_gpt.FIELDS, 1)
                    hint = f"; did you mean {near[0]}?" if near else ""
                    raise UserError(f"study {self.name}: {key}: {name} is no flag{hint}")

    def compare(self, name: str, configs: dict) -> None:
        there, here = configs[self.arms[name].against], configs[name]
        keys = [f.name for f in dataclasses.fields(here) if f.name not in NAMES | self.free()]
        wrong = [
            f"{key} ({getattr(there, key)!r} there, {getattr(here, key)!r} here)"
            for key in keys
            if getattr(there, key) != getattr(here, key)
        ]
        if wrong:
            raise UserError(
                f"arm {name} is no fair comparison with {self.arms[name].against}: beside what may "
                f"differ it differs in {', '.join(wrong)}; give both the same, or name the field "
                "in `differ`"
            )


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
        raise UserError(
            f"{folder} is over, but was made with other flags:\n"
            + "\n".join(changed)
            + "\nuse the old values, another --log_dir, or delete it"
        )
    return over


def refuse_other_settings(study: Study) -> None:
    """An error, before training or a report, where a run that is over had other flags."""
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

    arm, folder, length = study.arms[name], study.folder(name, seed), {}
    if arm.phase1:
        train_phase1(study, arm.phase1, seed, ranks)
    if arm.longer:
        from logs import nca

        length = ranks.on_main(lambda: nca.longer(study, name, seed))
    cfg = study.config(name, seed, **length)
    if ranks.on_main(lambda: is_over(cfg, folder)):
        return "was there"
    clean(cfg)
    with contextlib.ExitStack() as stack:
        if study.said.get("quiet"):
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
    metric = study.said["metric"]
    value = report.load_folder(folder).value(metric)
    if value is None:  # a score may be taken later
        return f"its result.json has no {metric} so far, which the report needs"
    return f"{metric} {report.number(value)}"


def train(study: Study) -> None:
    """All runs that are not over, the arms in turn for each seed; ranks meet once for all."""
    import train_gpt

    jobs = list(itertools.product(study.seeds, study.arms))
    began = time.perf_counter()
    ranks = train_gpt.Run(study.config(jobs[0][1], jobs[0][0]))
    ranks.prepare_machine()
    ranks.join_group()
    ranks.on_main(lambda: refuse_other_settings(study))
    for i, (seed, name) in enumerate(jobs):
        head = f"{i + 1}/{len(jobs)} {name} seed {seed}:"
        if ranks.is_main and not study.said.get("quiet"):
            print(f"== {head}", flush=True)
        became = train_one(study, name, seed, ranks)
        if ranks.is_main:
            print(f"{head} {became} ({time.perf_counter() - began:.0f} s)", flush=True)
    ranks.leave()


########################################
#             Command line             #
########################################


def chosen(said: dict, patterns: list[str]) -> dict[str, Arm]:
    """The arms asked for and those that they are compared with; longer ones come last."""
    known, names = all_arms(said), []
    for pattern in patterns or said.get("default", ["*"]):
        matching = fnmatch.filter(known, pattern)
        if not matching:
            asked = "--arms" if patterns else "default:"
            raise UserError(f"{asked} {pattern}: no such arm; there are {', '.join(known)}")
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
    parser.add_argument("--arms", nargs="+", default=[], help="names or patterns; or list")
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
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: each seed is one run: none twice")
    name, arms = Path(options.study).name.removesuffix(".toml"), chosen(said, options.arms)
    try:
        phase1 = shlex.split(options.phase1)
    except ValueError as e:  # a quote that is not closed
        raise UserError(
            f"--phase1 {options.phase1!r} cannot be split into words: {e}; quote as in a shell"
        ) from e
    study = Study(name, said, arms, seeds, more, phase1, Path(options.log_dir))
    if options.only != "report":
        study.check()
    elif more or phase1:  # a table and a record of flags that made no run of it would mislead
        study.check()
        refuse_other_settings(study)
    if options.only in (None, "get"):
        get_data(study)
    if options.only in (None, "train"):
        train(study)
    if options.only in (None, "report"):
        study_report.write(study)
    return 0


def main(argv: list[str] | None = None) -> int:
    return ending("error", lambda: program(argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
