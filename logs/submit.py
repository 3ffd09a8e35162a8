"""From finished runs to the folder that a leaderboard asks for, or a list of what a reviewer would
object to.

    python logs/submit.py golf MyIdea logs/golf_baseline-s*
    # -> records/track_10min_16mb/<date>_MyIdea/
    python logs/submit.py speedrun MyIdea logs/remix_m-s*
    # -> records/track_1_short/<date>_MyIdea/
    python logs/submit.py track_3 MyIdea logs/track3-s*
    # -> records/track_3_optimization/results/<date>_MyIdea/

Reads what a run leaves in its folder (result.json, log.txt, config.toml, model.nrx), this project's
sources, and the shards that were trained on. What it writes: a README with tables and the
statistics of logs/report.py, submission.json, a log for each seed, and train_gpt.py with
config.toml, which run from inside the folder. It is written whole or not at all: everything that
speaks against it is said in one go, and the exit code is then 2.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "data")) if p not in sys.path]

from get import documents_of, hash64  # noqa: E402

import train_gpt as tg  # noqa: E402
from logs import pack, report  # noqa: E402
from logs.endings import UserError, ending  # noqa: E402


@dataclass(frozen=True)
class Track:
    """What a leaderboard asks for beside the [rule] of a run; 0 or empty asks for nothing."""

    folder: str  # under records/
    kind: str  # Config.track
    tested: bool = False  # the mean over seeds must be shown to lie below a target
    max_seconds: float = 0.0  # of the training clock
    max_eval_seconds: float = 0.0
    max_bytes: int = 0  # of artifact and code together
    max_train_tokens: int = 0  # in the train shards
    val_tokens: int | None = None  # the prefix that is scored; 0: the whole validation split
    packed: bool = False  # code is counted, so it is shipped packed
    log_name: str = "train_seed{seed}.log"
    of_preset: str = ""  # whose model and batches every submission has
    date: str = "%Y-%m-%d"  # in the folder's name


GOLF = {"kind": "golf", "max_bytes": 16_000_000, "val_tokens": 0, "packed": True}
SPEEDRUN = {"kind": "speedrun", "val_tokens": 10_485_760, "log_name": "{run}.txt"}
SLOWRUN = {"kind": "slowrun", "max_train_tokens": 100_000_000}
TRACKS = {
    "golf": Track("track_10min_16mb", tested=True, max_seconds=600, max_eval_seconds=600, **GOLF),
    "golf_non_record": Track("track_non_record_16mb", **GOLF),
    "speedrun": Track("track_1_short", tested=True, **SPEEDRUN),
    # the slowrun's repository keeps no record folders: these names are chosen here
    "slowrun": Track("slowrun_limited", max_seconds=3600, **SLOWRUN),
    "slowrun_tiny": Track("slowrun_tiny", max_seconds=900, **SLOWRUN),
    "slowrun_two_hour": Track("slowrun_two_hour", max_seconds=7200, **SLOWRUN),
    "slowrun_unlimited": Track("slowrun_unlimited", **SLOWRUN),
    "track_3": Track(
        "track_3_optimization/results",
        "track_3",
        tested=True,
        val_tokens=10_485_760,
        log_name="seed{seed}.txt",
        of_preset="track3",
        date="%Y%m%d",
    ),
}
FILES = ("config.toml", "log.txt", "result.json")
# of a published split's validation documents that may be in train too: web text repeats itself
PUBLISHED_SHARE = 0.01
# of result.json: what all runs must have in common
SAME = ("world_size", "device", "torch", "params", "data_sha256")
STORED = report.METRICS[2:]  # scores of the artifact: all but val_loss and val_bpb
SCORER = "logs/score.py"
BESIDE = "scorer"  # folder of the scorer and the trainer that it imports, beside a script
OF_ONE_RUN = report.NAMES - {"arm"}  # config fields that are not shipped, as they belong to one run


class Refusal(UserError):
    """Everything that stands against the submission, one message a line."""

    def __init__(self, problems: list[str]):
        lines = "".join(f"  - {problem}\n" for problem in problems)
        super().__init__(f"refused, nothing was written; {len(problems)} found:\n{lines}")


@dataclass
class Options:
    """A submission folder from finished runs."""

    # golf, golf_non_record, speedrun, track_3, slowrun, slowrun_tiny, slowrun_two_hour, ...
    track: tyro.conf.Positional[str]
    name: tyro.conf.Positional[str]  # of the submission: letters, digits, dot, dash, underscore
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders, one a seed
    # the seeds that were planned; empty: all from the smallest given to the largest
    seeds: tuple[int, ...] = ()
    data: str = ""  # where the shards of the runs are now; empty: where they were
    author: str = ""  # who submits; empty: git's user.name
    github_id: str = ""  # account that the submission is made from
    blurb: str = ""  # one or two sentences on what is new
    date: str = ""  # YYYY-MM-DD; empty: today
    out: str = "records"  # folder of all submissions


@dataclass
class Submission:
    """What is known of the runs once they are read, and what was found to be wrong."""

    track: Track
    runs: list[report.Run]
    folders: list[Path]
    logs: list[str]
    problems: list[str] = field(default_factory=list)
    # name -> text of the code that is shipped
    sources: dict[str, str] = field(default_factory=dict)
    # what that was packed from; empty where nothing is packed
    readable: dict[str, str] = field(default_factory=dict)
    rule: dict = field(default_factory=dict)
    documents: dict = field(default_factory=dict)  # counts of the data

    def object(self, where: Path | str, what: str, remedy: str) -> None:
        self.problems.append(f"{where}: {what}; {remedy}")

    def of_each(self):
        return zip(self.folders, self.logs, self.runs, (run.result for run in self.runs))


########################################
#                Checks                #
########################################


def load(track: Track, arguments: tuple[str, ...]) -> Submission:
    """Read the run folders. Of one that is none, or not finished, nothing more can be checked."""
    s = Submission(track, [], [], [])
    for folder in map(Path, arguments):
        missing = [name for name in FILES if not (folder / name).is_file()]
        if not folder.is_dir():
            s.object(folder, "no such run folder", "give those in logs/")
        elif missing:
            s.object(
                folder,
                f"{', '.join(missing)} missing, so the run is not finished",
                "continue it with --resume, or run it again",
            )
        else:
            s.folders.append(folder)
            s.logs.append((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
            s.runs.append(report.load_folder(folder))
    if not arguments:
        s.object(
            "runs",
            "none given",
            "give run folders, one a seed: logs/NAME-s1 logs/NAME-s2 logs/NAME-s3",
        )
    if s.problems:
        raise Refusal(s.problems)
    return s


def head_of(log: str) -> str:
    """The sources at the top of a log, as begin_log writes them: up to the line of 100 '='."""
    return re.split(r"^={100}$", log, maxsplit=1, flags=re.MULTILINE)[0]


def sources_in(head: str, texts: dict[str, str]) -> dict[str, str]:
    """Those files of which a log's head consists, each with a newline behind; {} if of others."""
    found = {}
    while head:
        left = [name for name in texts if name not in found]
        name = next((name for name in left if head.startswith(texts[name] + "\n")), "")
        if not name:
            return {}
        found[name] = texts[name]
        head = head.removeprefix(texts[name] + "\n")
    return found


def size_of(sources: dict[str, str]) -> int:
    """Bytes of their files."""
    return sum(len(pack.bytes_of(text)) for text in sources.values())


def is_script(source: str) -> bool:
    """Whether logs/script.py printed it, also where it was changed by hand since."""
    docstring = source.split('"""')[1:2]
    return bool(docstring) and re.search(r"^origin: nanoremix ", docstring[0], re.M) is not None


def script_in(head: str) -> dict[str, str]:
    """The source of a run whose program is a preset's script, readable or packed; else {}."""
    if is_script(head):
        return {"train_gpt.py": head.removesuffix("\n")}
    text = head.removesuffix("\n")
    with contextlib.suppress(UserError):
        if any(pack.origin_of(text)) and pack.unpack(text):
            return {"train_gpt.py": text}
    return {}


def readable_of(packed: str) -> dict[str, str]:
    """
    What a preset's packed script was made from, if this checkout makes the same of the preset; else
    what is inside it.
    """
    revision, preset = pack.origin_of(packed)
    with contextlib.suppress(UserError, tg.UserError, SystemExit):  # of flags that it lacks
        text = pack.program_of(preset)
        if pack.pack_program(text, preset, revision) == packed:
            return {"train_gpt.py": text}
    parts = pack.unpack(packed)
    return {f"{name.replace('.', '/')}.py": text for name, text in parts.items()}


def script_hash(text: str) -> str:
    """config_sha256 of such a program, from the text of its run's config.toml."""
    free = tg.FREE_ON_RESUME | {"run", "arm", "", "# presets:"}
    lines = text.split("\n", 1)[-1].partition("\n[")[0].splitlines()
    kept = [line for line in lines if line.split(" = ")[0] not in free]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


def check_sources(s: Submission) -> None:
    """
    All logs hold one source: this checkout's, readable or packed, or a preset's script. Sets what
    is shipped.
    """
    paths = pack.modules_of([ROOT / name for name in pack.PROGRAMS])
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    packed = {"train_gpt.py": pack.pack(paths)}
    for folder, log, _, result in s.of_each():
        head = head_of(log)
        found = sources_in(head, packed) or sources_in(head, texts) or script_in(head)
        if "train_gpt.py" not in found:
            s.object(
                folder / "log.txt",
                f"its source ({len(head.encode())} bytes) differs from that shipped, {ROOT}'s",
                f"check out the revision of the run ({result.get('git') or 'unknown'}), or run "
                "again with this source",
            )
            continue
        s.sources = s.sources or found
        size = size_of(found)
        if found != s.sources:
            s.object(
                folder / "log.txt",
                "not the source of the other logs, though both could be shipped (packed and not, "
                "say)",
                "a submission is of one source: run again what differs",
            )
        if result.get("code_bytes", size) != size:
            s.object(
                folder / "result.json",
                f"code_bytes {result['code_bytes']}, but the source in log.txt has {size}",
                "one of the files was changed: put the run's own back, or run again",
            )
    shipped = s.sources.get("train_gpt.py", "")
    if is_script(shipped) and s.track.packed:
        s.object(
            s.folders[0] / "log.txt",
            "a preset's script, but this track counts code: it is shipped packed, with its scorer",
            "run the file that `python logs/pack.py --preset PRESET` writes",
        )
    elif shipped in texts.values() and s.track.packed or s.sources == packed:
        s.sources, s.readable = packed, texts
    elif s.track.packed and shipped:  # packed from a script
        s.readable = readable_of(shipped)
    elif is_script(shipped):
        s.readable = {}
        if s.runs[0].config.get("average_epochs"):  # its scorer applies the trainer's net
            s.sources = s.sources | {f"{BESIDE}/{name}": text for name, text in texts.items()}
    elif s.runs[0].config.get("average_epochs"):  # which the scorer takes, whatever [score] says
        s.sources = s.sources | {SCORER: texts[SCORER]}


def check_numbers(s: Submission) -> None:
    """result.json, log.txt, config.toml and the artifact of each run tell of the same run."""
    again = "put the run's own files back, or run again"
    for folder, log, _, result in s.of_each():
        path = folder / "config.toml"
        if path.read_text(encoding="utf-8").split("\n", 1)[-1] not in log:
            s.object(path, "not the configuration that log.txt holds", again)
        try:
            config = tg.Config(**tg.read_toml(path))
            text = path.read_text(encoding="utf-8")
            if result.get("config_sha256") not in (tg.config_hash(config), script_hash(text)):
                s.object(folder / "result.json", "config_sha256 is not that of config.toml", again)
        except tg.UserError as error:
            s.object(path, str(error), again)
        path, size = folder / "model.nrx", result.get("artifact_bytes")
        if s.rule["max_bytes"] and not (path.is_file() and size):
            s.object(
                path,
                "missing, or result.json does not know its size, and max_bytes of the track or of "
                "[rule] counts it",
                "run with --export int8, or put the run's own file back",
            )
        elif size and path.is_file() and path.stat().st_size != size:
            s.object(path, f"{path.stat().st_size} bytes, but result.json says {size}", again)
        log = report.plain(log)
        if not re.search(r"^final: ", log, re.MULTILINE):
            s.object(folder / "log.txt", "no line `final: ...`: it is cut short", again)
            continue
        try:
            odd = unlike_log(log, result) + unlike_scores(log, result)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            odd = [f"damaged ({type(error).__name__}: {error})"]
        for what in odd:
            s.object(folder / "result.json", what, again)


def unlike_log(log: str, result: dict) -> list[str]:
    """Where a result.json differs from the last numbers of its log, but for the log's rounding."""
    found, final = [], re.findall(r"^final: (.*)$", log, re.MULTILINE)[-1]
    for key, value in re.findall(r"(\w+):([-+.\de]+|nan|inf)s?(?= |$)", final):
        key, slack = ("train_time_s", 1e-3) if key == "train_time" else (key, 1e-7)
        known = result.get(key)
        if known is not None and not abs(float(value) - known) <= slack:
            found.append(f"{key} {known}, but log.txt ends with {value}")
    steps, known = re.findall(r"^step:(\d+)/\d+ val_loss:", log, re.MULTILINE), result.get("steps")
    if steps and int(steps[-1]) != known:
        found.append(f"{known} steps, but log.txt was last evaluated at {steps[-1]}")
    return found


def unlike_scores(log: str, result: dict) -> list[str]:
    """Where a result.json's scores differ from its log's lines `final_NAME val_loss:...`, its top
    from the scores (the newest is the last), or eval_time_s from what all took.
    """
    pattern = r"^final_(\S+) val_loss:(\S+)(?: val_bpb:(\S+))? .*?\beval_time:(\d+)ms"
    lines = re.findall(pattern, log, re.MULTILINE)
    # without a tokenizer a line has a bpb of nan, and the figure none
    known = lambda told: sorted(text for text in told if text not in ("", "nan"))
    found, top, seconds = [], {}, {}
    for name, figure in result.get("scores", {}).items():
        mode = name.split()[0]
        top |= figure["top"]
        seconds[mode] = figure.get("eval_time_s", 0.0)
        if seconds[mode]:
            losses = sorted(f"{value:.8f}" for value in figure["top"].values())
            alike = [ms for of, *told, ms in lines if of == mode and known(told) == losses]
            if not any(abs(int(ms) / 1000 - seconds[mode]) <= 1e-3 for ms in alike):
                found.append(f"log.txt does not have the score {name}")
    for key in dict.fromkeys([*STORED[1:], "slowrun_val_loss", *top]):
        if result.get(key) != top.get(key):
            found.append(f"{key} {result.get(key)}, but its newest score is {top.get(key)}")
    roundtrips = [int(ms) / 1000 for name, *_, ms in lines if name.endswith("roundtrip")]
    # without an artifact the first is the last evaluation, whose seconds no line has
    first = roundtrips[-1:] or [result.get("first_eval_time_s", 0.0)]
    took, said = sum(first) + sum(seconds.values()), result.get("eval_time_s")
    if lines and not abs((said or 0) - took) <= 1e-3 * len(lines):
        found.append(f"eval_time_s {said}, but the scores in log.txt took {took:.3f}")
    return found


def left_out(s: Submission) -> list[Path]:
    """Runs beside those given that are of the same experiment and source with another seed."""
    given = {folder.resolve() for folder in s.folders}
    seeds, found = {run.seed for run in s.runs}, []
    for other in sorted({p for folder in given for p in folder.parent.iterdir()} - given):
        if not all((other / name).is_file() for name in ("config.toml", "log.txt")):
            continue
        with contextlib.suppress(UserError):  # a damaged folder is not of this experiment
            run = report.load_folder(other)
            head = head_of((other / "log.txt").read_text(encoding="utf-8", errors="replace"))
            differs = report.config_diff(s.runs[0].config, run.config) or head != head_of(s.logs[0])
            found += [] if differs or run.seed in seeds else [other]
    return found


def check_seeds(s: Submission, planned: tuple[int, ...]) -> None:
    """Each planned seed once, and no run of the same experiment left out."""
    given = [run.result.get("seed") for run in s.runs]
    seeds = sorted(seed for seed in given if isinstance(seed, int))
    for folder, run, seed in zip(s.folders, s.runs, given):
        planned_seed = run.config.get("seed")
        if not isinstance(seed, int) or seed != planned_seed:
            s.object(
                folder,
                f"seed {seed} in result.json, {planned_seed} in config.toml",
                "put the run's own files back, or run again",
            )
        elif (count := seeds.count(seed)) > 1:
            s.object(
                folder,
                f"seed {seed} is given {count} times, and repeats are no independent sample",
                "give one run for each seed",
            )
    wanted = planned or range(seeds[0], seeds[-1] + 1) if seeds else ()
    if missing := sorted(set(wanted) - set(seeds)):
        s.object(
            "seeds",
            f"{', '.join(map(str, missing))} missing beside {', '.join(map(str, seeds))}; a mean "
            "is of all seeds",
            "add those runs, or name the seeds that were planned with --seeds",
        )
    if extra := sorted(set(seeds) - set(wanted)):
        s.object(
            "seeds",
            f"{', '.join(map(str, extra))} given, but not in --seeds",
            "name all seeds that were planned, or leave --seeds out",
        )
    for other in left_out(s):
        s.object(
            other,
            "a run of the same experiment with another seed, left out; a mean is of all seeds that "
            "were run",
            "give it too (finished), or move it elsewhere if it does not belong here",
        )


def check_same(s: Submission) -> None:
    """All runs are of one experiment on one kind of machine, and of this track. Sets s.rule: of the
    caps of runs and track the stricter ones.
    """
    first, config = s.runs[0], s.runs[0].config
    for folder, _, run, result in s.of_each():
        odd = report.config_diff(config, run.config)
        odd += [[key, first.result.get(key), result.get(key)] for key in SAME]
        odd = [f"{key} = {here} instead of {there}" for key, there, here in odd if here != there]
        if odd:
            s.object(
                folder,
                f"not the same experiment as {s.folders[0]}: {', '.join(odd)}",
                "runs of a submission differ in their seeds alone: run again what differs",
            )
    path = s.folders[0] / "config.toml"
    if config.get("track") != s.track.kind:
        s.object(
            path,
            f"track = {config.get('track')!r}, but this is a submission to {s.track.kind!r}",
            f"give runs of that track, or run with --track {s.track.kind}",
        )
    if s.track.val_tokens is not None and config.get("val_tokens") != s.track.val_tokens:
        s.object(
            path,
            f"val_tokens = {config.get('val_tokens')}, but the track scores "
            f"{s.track.val_tokens or 'all (0)'}",
            f"run with --val_tokens {s.track.val_tokens}",
        )
    s.rule = report.rule_of(config)
    for key, cap in (("max_seconds", s.track.max_seconds), ("max_bytes", s.track.max_bytes)):
        s.rule[key] = min(s.rule[key] or cap, cap or s.rule[key])  # 0 is no cap


def check_model(s: Submission) -> None:
    """
    Track 3 fixes the data, its order, the batch and the model; optimizer, schedules, starts and the
    weights that are read out are free.
    """
    if not s.track.of_preset:
        return
    wanted = tg.read_toml(tg.preset_path(s.track.of_preset))
    plain = tg.Config()
    keys = {f.name for f in dataclasses.fields(tg.ModelConfig)} - {"init"}
    keys = {key for key in keys if not key.endswith("_init") and key != "init_std"}
    odd = []
    for key in sorted(keys | {"vocab", "batch_tokens", "seq_len", "shuffle", "epochs"}):
        value = type(getattr(plain, key))(wanted.get(key, getattr(plain, key)))
        if (given := s.runs[0].config.get(key)) != value:
            odd.append(f"{key} = {given!r} instead of {value!r}")
    if odd:
        s.object(
            s.folders[0] / "config.toml",
            f"not the track's model, data and batch: {', '.join(odd)}",
            f"run with --config {s.track.of_preset}, and change optimizer, schedules and starts",
        )


def mixed_in(result: dict, metric: str) -> str:
    """The other runs whose snapshots are in the figure `metric`; the newest one is the result's."""
    names = []
    with contextlib.suppress(AttributeError, TypeError):  # damaged, which check_numbers objects to
        scores = result.get("scores", {})
        names = [name for name, figure in scores.items() if metric in figure.get("top", {})]
    return names[-1].partition(" snapshots with ")[2] if names else ""


def check_alone(s: Submission) -> None:
    """
    A submission is what its folder holds: what began elsewhere is not shipped or counted. Where
    neither time nor bytes have a cap, another run may teach, and snapshots be mixed with others'.
    """
    capped = s.rule["max_seconds"] or s.rule["max_bytes"]
    for folder, _, run, result in s.of_each():
        if start := run.config.get("init_from"):
            s.object(
                folder / "config.toml",
                f"init_from = {start!r}: the weights that it began from, their training time and "
                "the code that made them (pre_pre_train.py, say) would be neither in the folder "
                "nor counted",
                "submit runs that train from fresh weights (with ./run.sh, NCA=0)",
            )
        if capped and (teacher := run.config.get("teacher")):
            s.object(
                folder / "config.toml",
                f"teacher = {teacher!r}: the weights that it learned from and their training time "
                "would be neither in the folder nor counted",
                "submit runs without one; a chain's own snapshots (--cycles) may teach",
            )
        if capped and (others := mixed_in(result, s.rule["metric"])):
            s.object(
                folder / "result.json",
                f"its figure is of an ensemble with snapshots of {others}, whose weights and "
                "training time would be neither in the folder nor counted",
                "score it without --with_runs: what was asked for last is the figure",
            )


def check_caps(s: Submission) -> None:
    """Clocks and sizes of each run; total_bytes is from here on that of what is shipped."""
    cap, limit, score_cap = s.rule["max_seconds"], s.rule["max_bytes"], s.track.max_eval_seconds
    code = size_of(s.sources)
    for folder, _, run, result in s.of_each():
        spent, scoring = result.get("train_time_s"), result.get("eval_time_s")
        # parameter-golf looks at its clock after a step and accepted 600.038 s: the last step may
        # end behind the cap
        last_step = (spent or 0) / max(result.get("steps") or 1, 1)
        if spent is None or cap and spent - cap > last_step:
            s.object(
                folder / "result.json",
                f"the training clock says {spent} s, {cap:g} s are allowed",
                f"run with --max_seconds {cap:g}",
            )
        if score_cap and not (scoring is not None and scoring <= score_cap):
            s.object(
                folder / "result.json",
                f"eval_time_s {scoring}, {score_cap:g} s are allowed for the score",
                "choose a cheaper way of scoring",
            )
        if run.resumed and (cap or s.track.kind == "speedrun"):
            s.object(
                folder,
                "resumed, and a timed track takes runs in one piece",
                "run that seed again under another name",
            )
        if limit and result.get("artifact_bytes"):
            total = result["artifact_bytes"] + code
            result |= {"total_bytes": total, "code_bytes": code}
            if total > limit:
                s.object(
                    folder / "model.nrx",
                    f"{total - code} bytes + code {code} bytes = {total}, {limit} are allowed",
                    "make the model smaller, or give its weights fewer bits",
                )


def check_rule(s: Submission) -> None:
    """Where the track asks for it, the mean over seeds is shown to lie below the rule's target."""
    metric, path = s.rule["metric"], s.folders[0] / "config.toml"
    if missing := [str(f) for f, *_, result in s.of_each() if result.get(metric) is None]:
        s.object(
            path,
            f"the rule's metric is {metric}, which was not measured in {', '.join(missing)}",
            "score those runs (python logs/score.py RUN), or run with another metric in [rule]",
        )
    elif s.track.kind == "golf" and metric not in STORED:
        s.object(
            path,
            f"the rule's metric {metric} is no score of the artifact, which is what golf takes",
            f"run with one of {', '.join(STORED)} as metric in the preset's [rule]",
        )
    elif s.track.tested and not (s.rule["target"] and (s.rule["p"] or s.rule["z"])):
        s.object(
            path,
            "no target with p (or z) in [rule], but the track wants a mean shown to beat a record",
            "run with target = LOSS and p = 0.01 in the preset's [rule]",
        )
    elif s.track.tested and s.rule["p"] and len(s.runs) < 2:
        s.object(
            "runs",
            "1 given, fewer than the rule needs: a t-test takes two seeds at least, and seldom "
            "passes with two",
            "run more seeds",
        )
    elif s.track.tested:
        verdict, why = report.judge_mean([run.result[metric] for run in s.runs], s.rule)
        if verdict != "passes":
            s.object(
                "runs",
                f"the rule is not met: {'; '.join(why)}",
                "run the seeds that are missing, or lower the loss",
            )


def check_data(s: Submission, data: str) -> None:
    """The shards here are those of the runs, and no document is on both sides (parameter-golf 2127:
    80 % were). Sets s.documents.
    """
    try:
        cfg = tg.Config(**tg.read_toml(s.folders[0] / "config.toml"))
        cfg.data = data or cfg.data
        files = {split: tg.find_shards(cfg, split) for split in ("train", "val")}
        if tg.data_fingerprint(cfg) != s.runs[0].result.get("data_sha256"):
            s.object(
                cfg.data,
                "not the shards that the runs read (data_sha256 differs)",
                "get those back, or give their folder with --data",
            )
            return
        tokens, hashes = {}, {}
        for split, paths in files.items():
            shards = [tg.read_shard(path, cfg.vocab) for path in paths]
            tokens[split] = sum(map(len, shards))
            documents = documents_of(shards, cfg.doc_token)
            hashes[split] = np.fromiter((hash64(d.tobytes()) for d in documents), np.uint64)
    except tg.UserError as error:
        s.object(
            "data",
            f"train and validation cannot be compared: {error}",
            "or say where the shards are with --data",
        )
        return
    shared, documents = int(np.isin(hashes["val"], hashes["train"]).sum()), len(hashes["val"])
    if shared > (PUBLISHED_SHARE * documents if is_published_split(s, Path(cfg.data)) else 0):
        s.object(
            cfg.data,
            f"{shared} of {documents} validation documents are also in train, so a score on them "
            "shows nothing",
            "make or get the data again (python data/get.py), and train anew",
        )
    if s.track.max_train_tokens and tokens["train"] > s.track.max_train_tokens:
        s.object(
            cfg.data,
            f"{tokens['train']} training tokens, {s.track.max_train_tokens} are allowed",
            "train on fewer shards",
        )
    s.documents = {
        "train_tokens": tokens["train"],
        "train_documents": len(hashes["train"]),
        "val_tokens": tokens["val"],
        "val_documents": documents,
        "shared_documents": shared,
    }


def is_published_split(s: Submission, data: Path) -> bool:
    """Whether the data's manifest says that its split was made by others."""
    manifest = data / "manifest.json"
    try:
        found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        return found.get("published_split", False)
    except (ValueError, AttributeError) as error:
        s.object(manifest, f"damaged ({error})", "get the data again (python data/get.py)")
        return False


########################################
#               Writing                #
########################################


def mean_sd(s: Submission, key: str) -> tuple[float | None, float | None]:
    """Over all runs; None where a number was not measured, or one run has no spread."""
    values = [run.result.get(key) for run in s.runs]
    if None in values:
        return None, None
    mean, sd = report.mean_sd(values)
    return mean, None if math.isnan(sd) else sd


def summary(s: Submission, options: Options) -> dict:
    """submission.json, in parameter-golf's keys: means over seeds and each seed's own numbers."""
    results, metric = [run.result for run in s.runs], s.rule["metric"]
    as_loss, as_bpb = metric.replace("bpb", "loss"), metric.replace("loss", "bpb")
    keys = ["val_loss", "val_bpb", as_loss, as_bpb, "steps", "tokens"]
    keys += ["train_time_s", "eval_time_s", "artifact_bytes", "total_bytes"]
    of_seeds = {}
    for result in results:
        numbers = {key: result[key] for key in keys if result.get(key) is not None}
        of_seeds[str(result["seed"])] = numbers
    test = {}
    if s.rule["target"] and mean_sd(s, metric)[1]:
        threshold = s.rule["target"] - s.rule["margin"]
        t, p = report.t_below([result[metric] for result in results], threshold)
        test = {"threshold": threshold, "t": t, "p": p}
    facts = {
        "author": options.author,
        "github_id": options.github_id,
        "name": options.name,
        "blurb": options.blurb,
        "date": options.date,
        "track": s.track.folder.removeprefix("track_"),
        "metric": metric,
        "val_loss": mean_sd(s, as_loss)[0],
        "val_bpb": mean_sd(s, as_bpb)[0],
        "val_loss_std": mean_sd(s, as_loss)[1],
        "val_bpb_std": mean_sd(s, as_bpb)[1],
        "bytes_total": max(r["total_bytes"] for r in results) if s.rule["max_bytes"] else None,
        "bytes_code": size_of(s.sources),
        "seeds": [r["seed"] for r in results],
        "seed_results": of_seeds,
        "test": test or None,
        "wallclock_seconds": mean_sd(s, "train_time_s")[0],
        "eval_time_seconds": mean_sd(s, "eval_time_s")[0],
        "params": results[0].get("params"),
        "hardware": f"{results[0].get('world_size')}x {results[0].get('device')}",
        "pytorch_version": results[0].get("torch"),
        "git": results[0].get("git"),
        "data_sha256": results[0].get("data_sha256"),
        **s.documents,
    }
    return {key: value for key, value in facts.items() if value is not None}


def score_table(s: Submission, logs: list[str]) -> list[str]:
    """One row a seed, then mean and standard deviation."""
    wanted = ["steps", "train_time_s", "eval_time_s", "val_loss", "val_bpb", s.rule["metric"]]
    wanted += ["artifact_bytes", "total_bytes"]
    keys = [key for key in dict.fromkeys(wanted) if mean_sd(s, key)[0] is not None]

    def cell(x: float | None) -> str:
        return "" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:,.5f}"

    rows = [["seed", *keys, "log"], ["-"] * (len(keys) + 2)]
    for run, log in zip(s.runs, logs):
        rows.append([str(run.result["seed"]), *(cell(run.result[key]) for key in keys), log])
    rows.append(["mean", *(cell(float(mean_sd(s, key)[0])) for key in keys), ""])
    if len(s.runs) > 1:
        rows.append(["sd, n - 1", *(cell(mean_sd(s, key)[1]) for key in keys), ""])
    return ["| " + " | ".join(row) + " |" for row in rows]


def statistics(s: Submission, facts: dict) -> list[str]:
    """The verdict in the words of logs/report.py, a line that repeats the test, and the caps."""
    rule, metric = s.rule, s.rule["metric"]
    lines, values = [], [run.result[metric] for run in s.runs]
    if rule["target"]:
        threshold = rule["target"] - rule["margin"]
        margin = f" ({rule['target']:g} less a margin of {rule['margin']:g})"
        below = f"{threshold:g}{margin if rule['margin'] else ''}"
        way = "One-sample t-test" if rule["p"] else "z-test with the track's own spread"
        lines += [
            f"Is mean {metric} of all {len(values)} seeds below {below}? {way}, one-sided.",
            "",
        ]
        lines += [f"- {why}" for why in report.judge_mean(values, rule)[1]]
        if "test" in facts:
            lines += [
                f"- t = {facts['test']['t']:.4f}, p = {facts['test']['p']:.4g}, as given by",
                "",
                "```python",
                f'scipy.stats.ttest_1samp({values}, {threshold!r}, alternative="less")',
                "```",
            ]
    else:
        lines += [f"The score is {metric}, lower is better; this track asks for no test."]
    if limit := rule["max_bytes"]:
        total, code = facts["bytes_total"], facts["bytes_code"]
        lines += ["", f"Bytes: {total:,} at most, with the code's {code:,}, of {limit:,}."]
    if cap := rule["max_seconds"]:
        most = max(run.result["train_time_s"] for run in s.runs)
        lines += ["", f"Training clock: {most:.3f} s at most, of {cap:g} s. No run was resumed."]
    return lines


README = """\
# {name}

{blurb}{scores}

## Statistics

{statistics}

## Environment

{environment}

## Data

{data}

## Run it

From inside this folder, where DATA and TOKENIZER are yours{scoring}:

```bash
{commands}
```

## Files

- {logs}: complete logs, with the source that ran at their top
- config.toml: every setting; the runs differ in their seeds alone
- {sources}
- submission.json: these numbers for machines
"""


def readme(s: Submission, facts: dict, options: Options, logs: list[str]) -> str:
    first, doc = s.runs[0], s.documents
    environment = re.split(r"^={100}$", s.logs[0], maxsplit=2, flags=re.MULTILINE)[1].splitlines()
    told = [line for line in environment if re.match("Running |host: |ranks: |gpu: |git: ", line)]
    data = (
        f"{first.config.get('data')}: {doc['train_tokens']:,} training tokens in "
        f"{doc['train_documents']:,} documents, {doc['val_tokens']:,} validation tokens in "
        f"{doc['val_documents']:,}. {doc['shared_documents']:,} of these documents are also in "
        "train (the tokens of every document on both sides were hashed and compared)."
    )
    world, seed = first.result.get("world_size", 1), first.result["seed"]
    start = f"torchrun --standalone --nproc_per_node={world} --" if world > 1 else "python"
    train = f"{start} train_gpt.py --config config.toml --seed {seed} --run again"
    commands = [f"{train} --data DATA --tokenizer TOKENIZER"]
    if script_in(next(iter(s.sources.values()), "")):  # has its configuration inside
        tokenizer = " --tokenizer TOKENIZER" if s.readable else ""
        commands = [f"{start} train_gpt.py --seed {seed} --run again --data DATA{tokenizer}"]
    sources = f"{', '.join(s.sources)}: the source that ran"
    if s.readable:
        if SCORER in s.readable or "logs.score" in s.readable["train_gpt.py"]:
            commands += [f"{start} train_gpt.py logs.score logs/again"]
        sources = (
            "train_gpt.py: packed (comments left out, compressed); it alone is run and counted\n"
            f"- source/: {', '.join(s.readable)}, from which logs/pack.py packed it; neither run "
            "nor counted"
        )
    for name in (SCORER, f"{BESIDE}/{SCORER}"):
        if not s.readable and name in s.sources:
            commands += [f"{start} {name} logs/again"]
    return README.format(
        name=options.name,
        blurb=options.blurb + "\n\n" if options.blurb else "",
        scores="\n".join(score_table(s, logs)),
        statistics="\n".join(statistics(s, facts)),
        environment="\n".join(f"- {line}" for line in [facts["hardware"], *told]),
        data=data,
        scoring="; the second command scores and proves" if len(commands) > 1 else "",
        commands="\n".join(commands),
        logs=", ".join(logs),
        sources=sources,
    )


def track3_log(run: report.Run, log: str) -> str:
    """
    A log as track 3's are: the source, a line of 100 "=", the environment, one more, and the
    validation lines alone.
    """
    source, environment = re.split(r"^={100}$", log, maxsplit=2, flags=re.MULTILINE)[:2]
    bar, lines = "=" * 100, []
    for event in run.val:
        seconds, step = event["train_time_ms"] / 1000, event["step"]
        losses = [
            f"{key}:{event[key]:.5f}" for key in ("val_loss", "val_loss_tail") if key in event
        ]
        lines.append(
            f"step:{step}/{event['steps']} {' '.join(losses)} train_time:{seconds:.3f}s "
            f"step_avg:{1000 * seconds / max(step, 1):.2f}ms".replace(
                "val_loss_tail", "val_ema_loss"
            )
        )
    return "\n".join([f"{source}{bar}{environment}{bar}", *lines]) + "\n"


def steps_of_seeds(s: Submission, logs: list[str]) -> dict[str, str]:
    """
    Track 3's logs, and summary.tsv: mean loss over the seeds at every validation, so that the
    earliest step at which all are read is seen.
    """
    metric = s.rule["metric"]
    by_step: dict[int, list[float]] = {}
    for run in s.runs:
        for event in run.val:
            if metric in event:
                by_step.setdefault(event["step"], []).append(event[metric])
    rows = [["step", "n", f"mean_{metric}", "sd", "statistic"]]
    for step, values in by_step.items():
        mean, sd = report.mean_sd(values)
        score = (s.rule["target"] - mean) * math.sqrt(len(values))
        rows.append([str(step), str(len(values)), f"{mean:.5f}", f"{sd:.5f}", f"{score:.5f}"])
    table = "".join("\t".join(row) + "\n" for row in rows)
    found = {name: track3_log(run, log) for name, run, log in zip(logs, s.runs, s.logs)}
    return found | {"summary.tsv": table}


def write_folder(s: Submission, options: Options) -> Path:
    """All files into a folder beside their place, then one rename: a failure leaves nothing."""
    date = datetime.date.fromisoformat(options.date).strftime(s.track.date)
    place = Path(options.out) / s.track.folder / f"{date}_{options.name}"
    if place.exists():
        raise Refusal([f"{place}: exists already; choose another name, or delete it"])
    logs = [s.track.log_name.format(seed=run.result["seed"], run=run.name) for run in s.runs]
    facts = summary(s, options)
    config = (s.folders[0] / "config.toml").read_text(encoding="utf-8").splitlines()
    shared = [line for line in config if line.split(" = ")[0] not in OF_ONE_RUN]
    files = {
        "README.md": readme(s, facts, options, logs),
        "submission.json": json.dumps(facts, indent=2) + "\n",
        "config.toml": "".join(f"{line}\n" for line in shared),
        **dict(zip(logs, s.logs)),
        **(steps_of_seeds(s, logs) if s.track.of_preset else {}),
        **s.sources,
        **{f"source/{name}": text for name, text in s.readable.items()},
    }
    new_parents, part = [p for p in place.parents if not p.exists()], None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{options.name}-", suffix=".part", dir=place.parent))
        for name, text in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            own = name in s.sources  # a packed one is not UTF-8; a log begins with its text
            (part / name).write_bytes(pack.bytes_of(text) if own else text.encode())
        part.chmod(0o755)  # mkdtemp's folders are for their owner alone
        os.rename(part, place)
    except BaseException:
        if part:
            shutil.rmtree(part, ignore_errors=True)
        for folder in new_parents:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return place


########################################
#             Command line             #
########################################


def complete(options: Options) -> Track:
    """Fill in what can be known, and refuse what cannot be a submission at all."""
    problems = []
    if options.track not in TRACKS:
        problems.append(f"track {options.track!r} is unknown; choose one of {', '.join(TRACKS)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        problems.append(
            f"name {options.name!r} becomes the name of a folder; use letters, digits, dot, dash "
            "and underscore"
        )
    options.date = options.date or datetime.date.today().isoformat()
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", options.date):
        problems.append(
            f"date {options.date!r} becomes part of the folder's name; write YYYY-MM-DD"
        )
    if problems:
        raise Refusal(problems)
    if not options.author and shutil.which("git"):
        git = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True)
        options.author = git.stdout.strip()
    return TRACKS[options.track]


def submit(options: Options) -> Path:
    track = complete(options)
    s = load(track, options.runs)
    check_same(s)
    check_alone(s)
    check_model(s)
    check_seeds(s, options.seeds)
    check_sources(s)
    check_numbers(s)
    check_caps(s)
    check_rule(s)
    check_data(s, options.data)
    if s.problems:
        raise Refusal(s.problems)
    order = sorted(range(len(s.runs)), key=lambda i: s.runs[i].result["seed"])
    s.runs, s.folders, s.logs = ([group[i] for i in order] for group in (s.runs, s.folders, s.logs))
    return write_folder(s, options)


def program(options: Options) -> None:
    place = submit(options)
    print(f"{place}: " + ", ".join(sorted(p.name for p in place.iterdir())))
    if empty := [key for key in ("author", "github_id", "blurb") if not getattr(options, key)]:
        print(f"empty in submission.json: {', '.join(empty)}; fill in by hand, or give as flags")


def main(argv: list[str] | None = None) -> int:
    work = lambda: program(tyro.cli(Options, args=argv, use_underscores=True))
    return ending("submit.py", work)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
