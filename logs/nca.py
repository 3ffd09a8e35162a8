"""
Does pre-pre-training on cellular automata help a language model? Arms x seeds, matched, from one
command.

    python logs/nca.py                                       # the optimizer cross at laptop size, five seeds
    python logs/nca.py --arms muon muon-from-adamw muon-sham muon-shuffled --seeds 1 2 3
    python logs/nca.py --arms list                           # what there is
    python logs/nca.py --learns logs/nca-pre-adamw-s1        # picture of what pre-pre-training itself learns

An arm is a language run with its flags, begun from a pre-pre-training run or not, and a base: the
arm that it must equal in every flag but those of the transfer. The resolved configurations are
compared before anything runs, and an arm that differs in more is refused. Arms take turns within a
seed; finished runs are skipped and broken ones go on, so the same command finishes what was
interrupted. Pre-pre-training runs are shared by the arms that ask for the same.

Two views, of final and best losses, each paired by seed with the base (two-sided t-test): equal
steps, where pre-pre-training is for free, and equal total time, where its training and the
generation of its data are charged; an arm BASE-longer gives the base that time as further steps.
Nothing is corrected for the number of arms.

Contents: arms | runs | tables | figures | command line
"""

import dataclasses
import json
import math
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "logs")]
import report  # noqa: E402

import pre_pre_train  # noqa: E402
import train_gpt  # noqa: E402
from logs.endings import ending  # noqa: E402

########################################
#                 Arms                 #
########################################

# Fields in which an arm may differ from its base.
TRANSFER = {
    "init_from",
    "transfer",
    "transfer_skip",
    "transfer_control",
    "slow",
    "slow_lr",
    "adamw_matrices",
}
NAMES = {"run", "arm", "config", "log_dir", "resume"}
# all but the tables of the vocabulary, as the pull request froze it
BODY = r"^(?!embed$|head$|value_embeds$)"
FREEZE = "0:0 0.052:0 0.094>1"  # 250 steps frozen, ramped up over 200, of its 4,766


@dataclass
class Arm:
    pre: str  # pre-pre-training that it starts from, a key of PRE; empty: none
    flags: dict[str, str]  # of the language run, over the preset
    base: str = ""  # arm that it is compared with; empty: it is a base itself
    note: str = ""


# Pre-pre-training runs: their flags over those of --pre; the optimizer is --source where none is
# named.
PRE = {
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "random": {"nca_control": "random"},
    "shuffled": {"nca_control": "shuffled"},
    "still": {"nca_control": "still"},
    **{
        f"band-{low}-{high}": {"nca_band": f"0.{low}:0.{high}"}
        for low, high in ((2, 3), (3, 4), (4, 5))
    },
}


def all_arms(source: str = "adamw") -> dict[str, Arm]:
    """
    Every arm by name, for both optimizers of the language run; `source` is the pre-pre-training
    that controls use.
    """
    arms = {}
    for lm in ("adamw", "muon"):
        own = {"optimizer": lm}
        attn, slow = own | {"transfer": "attn"}, {"slow": BODY, "slow_lr": FREEZE}
        arms[lm] = Arm("", own, note="no pre-pre-training")
        for pre in ("adamw", "muon"):
            arms[f"{lm}-from-{pre}"] = Arm(
                pre, attn, lm, f"attention from pre-pre-training with {pre}"
            )
        arms[f"{lm}-longer"] = Arm("", own, lm, "no pre-pre-training, its time as further steps")
        for mode in ("attn+scalars", "mlp", "all", "qk", "vo"):
            arms[f"{lm}-load-{mode}"] = Arm(
                source, own | {"transfer": mode}, lm, f"takes {mode} instead of attn"
            )
        for name, pre, flags, note in (
            ("freeze", source, attn | slow, "body frozen, then ramped up, as in the pull request"),
            (
                "freeze-longer",
                source,
                attn | slow | {"slow_lr": "0:0 0.105:0 0.21>1"},
                "twice as long",
            ),
            ("ramp", source, attn | slow | {"slow_lr": "0:0 0.105>1"}, "ramped up only"),
            ("sham", "", own | slow, "frozen and ramped up like freeze, without pre-pre-training"),
            (
                "shuffled",
                source,
                attn | {"transfer_control": "shuffled"},
                "entries shuffled within each matrix",
            ),
            (
                "norm-matched",
                source,
                attn | {"transfer_control": "random"},
                "normal numbers of the same norms",
            ),
            ("from-random", "random", attn, "pre-pre-trained on random cells"),
            ("from-shuffled", "shuffled", attn, "pre-pre-trained on grids in wrong order"),
            ("from-still", "still", attn, "pre-pre-trained on grids that never change"),
            *(
                (f"from-{p}", p, attn, f"rules that compress to {PRE[p]['nca_band']}")
                for p in PRE
                if p.startswith("band")
            ),
        ):
            arms[f"{lm}-{name}"] = Arm(pre, flags, lm, note)
    hybrid = {"optimizer": "muon", "adamw_matrices": r"\.attn\."}
    arms["muon-hybrid"] = Arm(
        source, hybrid | {"transfer": "attn"}, "muon", "AdamW on what was taken, Muon on the rest"
    )
    arms["muon-hybrid-sham"] = Arm("", hybrid, "muon", "the same optimizers, nothing taken")
    return arms


LONGER = ("adamw-longer", "muon-longer")
CROSS = tuple(
    f"{lm}{tail}" for lm in ("adamw", "muon") for tail in ("", "-from-adamw", "-from-muon")
)


@dataclass
class Options:
    """Does pre-pre-training help a language model? Arms x seeds, matched; and what it learns."""

    # preset of the language runs, and of the model of both phases
    lm: tuple[str, ...] = ("nca_cpu",)
    arms: tuple[str, ...] = CROSS  # which arms; `list` prints all that there are
    # optimizer of the pre-pre-training behind the controls
    source: Literal["adamw", "muon"] = "adamw"
    # seeds of weights and data order; the automata are the same for all
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    pre: str = ""  # flags of the pre-pre-training runs, as one string
    flags: str = ""  # flags of the language runs, as one string
    # more arms: "NAME PRE BASE FLAGS...", PRE being none or one of the known
    extra: tuple[str, ...] = ()
    name: str = "nca"  # what the runs' names begin with
    log_dir: str = "logs"  # where they are kept
    # what starts a trainer, e.g. "torchrun --standalone --nproc_per_node=8 --"; empty: this Python
    launch: str = ""
    out: str = "logs/report-nca"  # folder for report.md, nca.json and the PNGs
    # only draw the learning of these pre-pre-training runs into OUT/learns.png
    learns: tuple[str, ...] = ()


########################################
#                 Runs                 #
########################################


def call(command: list[str], **how) -> subprocess.CompletedProcess:
    """A trainer, which Ctrl-C reaches as well: it saves its run, and is waited for."""
    process, interrupted = subprocess.Popen(command, **how), False
    while True:
        try:
            out, _ = process.communicate()
            break
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return subprocess.CompletedProcess(command, process.returncode, out)


@dataclass
class Ablation:
    o: Options
    arms: dict[str, Arm] = field(default_factory=dict)

    def __post_init__(self):
        if not self.o.seeds or len(set(self.o.seeds)) < len(self.o.seeds):
            raise train_gpt.UserError(
                f"--seeds {' '.join(map(str, self.o.seeds))}: each seed is one run of every "
                "arm: give "
                "different ones, at least one"
            )
        known = all_arms(self.o.source)
        for text in self.o.extra:
            name, pre, base, *flags = (
                shlex.split(text) if len(shlex.split(text)) > 2 else ("", "", "")
            )
            given = {k.removeprefix("--"): v for k, v in zip(flags[::2], flags[1::2])}
            if base not in known or pre not in ("none", *PRE):
                raise train_gpt.UserError(
                    f"--extra {text!r}: must read NAME PRE BASE FLAGS...; PRE is one of none, "
                    f"{', '.join(PRE)}, BASE an arm (`--arms list`)"
                )
            if len(flags) % 2 or not all(flag.startswith("--") for flag in flags[::2]):
                raise train_gpt.UserError(
                    f"--extra {text!r}: after NAME PRE BASE come pairs of --flag and value"
                )
            known[name] = Arm(
                "" if pre == "none" else pre,
                known[base].flags | given,
                base,
                "from the command line",
            )
        for name in self.o.arms:
            if name not in known:
                raise train_gpt.UserError(
                    f"--arms {name}: no such arm; there are {', '.join(known)}"
                )
        wanted = dict.fromkeys(n for name in self.o.arms for n in (known[name].base or name, name))
        self.arms = {
            name: known[name] for name in sorted(wanted, key=lambda n: n.endswith("-longer"))
        }

    def folder(self, run: str) -> Path:
        return Path(self.o.log_dir) / run

    def pre_argv(self, pre: str, seed: int) -> list[str]:
        own = [
            w for k, v in ({"optimizer": self.o.source} | PRE[pre]).items() for w in (f"--{k}", v)
        ]
        return [
            "--like",
            *self.o.lm,
            *shlex.split(self.o.pre),
            *own,
            "--log_dir",
            self.o.log_dir,
            "--seed",
            str(seed),
            "--run",
            f"{self.o.name}-pre-{pre}-s{seed}",
            "--arm",
            f"pre-{pre}",
            "--resume",
        ]

    def lm_argv(self, name: str, seed: int, more: dict[str, str]) -> list[str]:
        arm = self.arms[name]
        own = arm.flags | more
        if arm.pre:
            own["init_from"] = str(self.folder(f"{self.o.name}-pre-{arm.pre}-s{seed}"))
        return [
            "--config",
            *self.o.lm,
            *shlex.split(self.o.flags),
            *(w for k, v in own.items() for w in (f"--{k}", v)),
            "--log_dir",
            self.o.log_dir,
            "--seed",
            str(seed),
            "--run",
            f"{self.o.name}-{name}-s{seed}",
            "--arm",
            name,
            "--resume",
        ]

    def check(self) -> str:
        """
        The table of what each arm changes in its base; an arm that changes more than the transfer
        is refused.
        """
        rows = []
        for name, arm in self.arms.items():
            if not arm.base:
                continue
            mine, base = (train_gpt.parse_args(self.lm_argv(n, 1, {})) for n in (name, arm.base))
            if name in LONGER and base.max_seconds:
                raise train_gpt.UserError(
                    f"arm {name}: runs of max_seconds = {base.max_seconds:g} have no number of "
                    "steps to "
                    'lengthen: set --flags="--max_seconds 0 --steps N", or leave the arm out'
                )
            changed = differences(base, mine)
            wrong = [row for row in changed if row[0] not in TRANSFER]
            if wrong:
                raise train_gpt.UserError(
                    f"arm {name} is no fair comparison with {arm.base}: beside the transfer it "
                    "differs in "
                    + ", ".join(f"{key} ({a} there, {b} here)" for key, a, b in wrong)
                    + "; give both arms the same"
                )
            rows += [[name, arm.base, *row] for row in changed] or [
                [name, arm.base, "steps", "", "longer, see below"]
            ]
        return (
            report.table(["arm", "base", "field", "of the base", "of the arm"], rows)
            if rows
            else ""
        )

    def start(self, script: str, argv: list[str], kind: type) -> None:
        """One run, unless it is finished; one that was finished with other flags is an error."""
        cfg = (train_gpt if kind is train_gpt.Config else pre_pre_train).parse_args(argv)
        folder = self.folder(cfg.run)
        if (folder / "result.json").exists():
            old = kind(**train_gpt.read_toml(folder / "config.toml", kind))
            if changed := differences(old, cfg):
                raise train_gpt.UserError(
                    f"{folder} was made with other flags: "
                    + ", ".join(f"{k} {a} -> {b}" for k, a, b in changed)
                    + "; choose another --name, or delete it"
                )
            return
        print(f"== {cfg.run}", flush=True)
        command = [*(shlex.split(self.o.launch) or [sys.executable]), str(ROOT / script), *argv]
        code = call(command).returncode
        if code:
            raise train_gpt.UserError(
                f"{cfg.run} ended with code {code}: see {folder}/log.txt; the same command goes on"
            )

    def longer(self, name: str, seed: int) -> dict[str, str]:
        """Length of BASE-longer: the base's, and as many steps as the mean pre-pre-training of its
        arms takes time for. Where the base's epochs are limited, they grow along; where they are
        counted, by whole ones, in favour of this arm.
        """
        saved, base = (
            self.folder(f"{self.o.name}-{name}-s{seed}") / "config.toml",
            self.arms[name].base,
        )
        if saved.exists():  # times are never the same twice, so what was begun is gone on with
            begun = train_gpt.read_toml(saved)
            return {"steps": str(begun["steps"]), "epochs": str(begun["epochs"])}
        pres = {arm.pre for arm in self.arms.values() if arm.base == base and arm.pre}
        if not pres:
            raise train_gpt.UserError(
                f"arm {name}: no arm with pre-pre-training on {base} is run, so there is no "
                "time to give"
            )
        cfg = train_gpt.parse_args(self.lm_argv(base, seed, {}))
        run = report.load_folder(self.folder(f"{self.o.name}-{base}-s{seed}"))
        more = 1 + np.mean([self.charge(pre, seed) for pre in pres]) / run.value("train_time_s")
        epochs = math.ceil(cfg.epochs * more)
        if cfg.epochs and (cfg.lr_cycles or cfg.average_epochs or cfg.eval_every < 0):
            more = epochs / cfg.epochs
        return {"steps": str(round(run.value("steps") * more)), "epochs": str(epochs)}

    def generation(self, pre: str) -> dict:
        """
        What --generate_only says of the data of these runs: measured once, and kept for as long as
        they are the same.
        """
        kept, argv = Path(self.o.out) / f"generate-{pre}.json", self.pre_argv(pre, 1)
        made_by = train_gpt.config_hash(pre_pre_train.parse_args(argv))
        try:
            made = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        except ValueError:  # damaged: measured once more
            made = {}
        if made.get("config_sha256") != made_by:
            done = call(
                [
                    sys.executable,
                    str(ROOT / "pre_pre_train.py"),
                    *argv,
                    "--generate_only",
                    "--json",
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                raise train_gpt.UserError(
                    f"generating the data of {pre} ended with code {done.returncode}"
                )
            made = json.loads(done.stdout) | {"config_sha256": made_by}
            kept.parent.mkdir(parents=True, exist_ok=True)
            train_gpt.write_whole(kept, (json.dumps(made) + "\n").encode())
        return made

    def charge(self, pre: str, seed: int) -> float:
        """
        Seconds of a pre-pre-training run: its training clock, its search for rules, the making of
        its rows.
        """
        cfg, made = pre_pre_train.parse_args(self.pre_argv(pre, seed)), self.generation(pre)
        rows = made["tokens"] * (cfg.nca_epochs if cfg.nca_regen else 1) / made["tokens_per_s"]
        rules = made["candidates"] / made["rules_per_s"] if "rules_per_s" in made else 0.0
        return (
            report.load_folder(self.folder(f"{self.o.name}-pre-{pre}-s{seed}")).value(
                "train_time_s"
            )
            + rows
            + rules
        )

    def run(self) -> None:
        for seed in self.o.seeds:
            for name, arm in self.arms.items():
                if arm.pre:
                    self.generation(arm.pre)
                    self.start(
                        "pre_pre_train.py", self.pre_argv(arm.pre, seed), pre_pre_train.PrePreConfig
                    )
                more = self.longer(name, seed) if name in LONGER else {}
                self.start("train_gpt.py", self.lm_argv(name, seed, more), train_gpt.Config)

    def load(self) -> dict[str, list[report.Run]]:
        """
        Finished runs by arm, each with its best loss, and its charge for pre-pre-training in
        seconds.
        """
        found = {}
        for name, arm in self.arms.items():
            runs = [
                report.load_folder(self.folder(f"{self.o.name}-{name}-s{seed}"))
                for seed in self.o.seeds
            ]
            for run in runs:
                if not run.val:
                    raise train_gpt.UserError(
                        f"{self.folder(run.name)}/metrics.jsonl holds no evaluation: put the run's "
                        "own file back, or delete the folder and run again"
                    )
                run.result["best_val_loss"] = min(event["val_loss"] for event in run.val)
                run.result["charge_s"] = self.charge(arm.pre, run.seed) if arm.pre else 0.0
            found[name] = runs
        return found


def differences(a: train_gpt.Config, b: train_gpt.Config) -> list[list[str]]:
    """[field, value in a, value in b] of everything that makes two experiments."""
    free = train_gpt.FREE_ON_RESUME | NAMES
    return [
        [f.name, repr(getattr(a, f.name)), repr(getattr(b, f.name))]
        for f in dataclasses.fields(a)
        if f.name not in free and getattr(a, f.name) != getattr(b, f.name)
    ]


########################################
#                Tables                #
########################################


def paired(runs: list[report.Run], base: list[report.Run], metric: str) -> dict:
    """
    Mean difference to the base over common seeds, its sd, and p of the two-sided paired t-test.
    """
    _, n, mean, sd, lower = report.compare(runs, base, metric)
    return {"n": int(n), "delta": mean, "sd": sd, "p": 2 * min(lower, 1 - lower)}


def loss_at(run: report.Run, seconds: float) -> float:
    """
    The validation loss that a run had when so many seconds were spent on it, pre-pre-training
    included; nan before it.
    """
    clock = [event["train_time_ms"] / 1000 + run.result["charge_s"] for event in run.val]
    return float(np.interp(seconds, clock, [event["val_loss"] for event in run.val], left=math.nan))


def rows_of(found: dict[str, list[report.Run]], arms: dict[str, Arm]) -> list[dict]:
    rows = []
    for name, runs in found.items():
        values = {
            key: report.mean_sd([run.value(key) for run in runs])
            for key in ("val_loss", "best_val_loss", "train_time_s", "charge_s", "steps")
        }
        row = {
            "arm": name,
            "base": arms[name].base,
            "n": len(runs),
            "note": arms[name].note,
            **{key: value[0] for key, value in values.items()},
            "val_loss_sd": values["val_loss"][1],
            "best_val_loss_sd": values["best_val_loss"][1],
        }
        if base := found.get(arms[name].base):
            row |= {
                "final": paired(runs, base, "val_loss"),
                "best": paired(runs, base, "best_val_loss"),
            }
            pairs = report.pair_up(runs, base)
            for run, twin in pairs:
                run.result["timed_loss"] = loss_at(run, twin.value("train_time_s"))
                twin.result["timed_loss"] = twin.value("val_loss")
            row["timed"] = paired(runs, base, "timed_loss")
            longer = found.get(f"{arms[name].base}-longer")
            if longer and runs is not longer:
                row |= {
                    f"longer_{key}": paired(runs, longer, metric)
                    for key, metric in (("final", "val_loss"), ("best", "best_val_loss"))
                }
            row |= speed(pairs)
        rows.append(row)
    return rows


def speed(pairs: list[tuple[report.Run, report.Run]]) -> dict:
    """
    How many runs reach their base's best loss, and in what part of the steps and the time that the
    base took to it.
    """
    steps, times = [], []
    for run, twin in pairs:
        at = {
            (which, clock): report.time_to_loss(
                of.val, twin.result["best_val_loss"], "val_loss", clock
            )
            for which, of in (("run", run), ("base", twin))
            for clock in ("step", "train_time_ms")
        }
        # a base that only got worse is no goal
        if at["run", "step"] is not None and at["base", "step"]:
            steps.append(at["run", "step"] / at["base", "step"])
            times.append(
                (at["run", "train_time_ms"] + 1000 * run.result["charge_s"])
                / at["base", "train_time_ms"]
            )
    return {
        "reached": len(steps),
        "step_ratio": mean_or_nan(steps),
        "time_ratio": mean_or_nan(times),
    }


def mean_or_nan(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def json_ready(value):
    """
    The same with None, JSON's null, where a number is not one: with one seed there is no deviation
    and no p.
    """
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dash(text: str) -> str:
    return "-" if "nan" in text else text


def tables(rows: list[dict]) -> dict[str, str]:
    def cells(test: dict) -> list[str]:
        return [dash(f"{test['delta']:+.4f}"), dash(f"{test['sd']:.4f}"), dash(f"{test['p']:.2g}")]

    steps, times, longer = [], [], []
    for row in rows:
        head = [
            row["arm"],
            str(row["n"]),
            f"{row['val_loss']:.4f}",
            f"{row['val_loss_sd']:.4f}",
            f"{row['best_val_loss']:.4f}",
        ]
        steps.append(
            [*head, *(cells(row["final"]) + cells(row["best"]) if row["base"] else [""] * 6)]
        )
        cost = [row["arm"], f"{row['charge_s']:.1f}", f"{row['train_time_s']:.1f}"]
        if row["base"]:
            ratios = [
                f"{row['reached']} of {row['n']}",
                dash(f"{row['step_ratio']:.2f}"),
                dash(f"{row['time_ratio']:.2f}"),
            ]
            times.append([*cost, *cells(row["timed"]), *ratios])
        else:
            times.append([*cost, *[""] * 6])
        if "longer_final" in row:
            longer.append(
                [
                    row["arm"],
                    f"{row['base']}-longer",
                    *cells(row["longer_final"]),
                    *cells(row["longer_best"]),
                ]
            )
    out = {
        "Equal steps: final and best val_loss, and what they differ from the base's": report.table(
            ["arm", "n", "final", "sd", "best", "d final", "sd", "p", "d best", "sd", "p"], steps
        ),
        "Equal total time: seconds before and in language training; d: loss at the end of the "
        "base's time (- where the "
        "language run has not begun by then); how many reach the base's best loss, in what "
        "part of its steps and time": report.table(
            ["arm", "pre s", "lm s", "d", "sd", "p", "reached", "steps", "time"], times
        ),
    }
    if longer:
        out[
            "Equal total time: against the base with the time of pre-pre-training as further steps"
        ] = report.table(["arm", "base", "d final", "sd", "p", "d best", "sd", "p"], longer)
    return out


########################################
#               Figures                #
########################################


def plot_curves(found: dict[str, list[report.Run]], arms: dict[str, Arm], path: Path) -> None:
    """
    Validation loss, a row for each base: against steps, and against seconds with pre-pre-training
    charged.
    """
    from matplotlib.figure import Figure

    bases = [
        name
        for name, arm in arms.items()
        if not arm.base and any(a.base == name for a in arms.values())
    ]
    figure = Figure(figsize=(12, 4.2 * len(bases)), layout="constrained")
    axes = figure.subplots(len(bases), 2, squeeze=False)
    for (left, right), base in zip(axes, bases):
        members = [base, *(n for n, arm in arms.items() if arm.base == base)]
        shown = [run for name in members for run in found[name]]
        for i, name in enumerate(members):
            style = {
                "color": report.COLORS[i % len(report.COLORS)],
                "ls": ("-", "--", "-.")[i // len(report.COLORS) % 3],
            }
            steps = np.array([event["step"] for event in found[name][0].val])
            # BASE-longer: each seed has its own length
            if any(len(run.val) != len(steps) for run in found[name]):
                steps = steps[: min(len(run.val) for run in found[name])]
            loss = np.array(
                [[event["val_loss"] for event in run.val][: len(steps)] for run in found[name]]
            )
            clock = np.array(
                [
                    [event["train_time_ms"] / 1000 + run.result["charge_s"] for event in run.val][
                        : len(steps)
                    ]
                    for run in found[name]
                ]
            ).mean(0)
            mean, sd = loss.mean(0), loss.std(0, ddof=1) if len(loss) > 1 else 0 * loss[0]
            for ax, x in ((left, steps), (right, clock)):
                ax.plot(x, mean, lw=1.8, label=f"{name} (n={len(loss)}): {mean[-1]:.4f}", **style)
                ax.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.18, lw=0)
        late = [[event["val_loss"] for event in run.val[len(run.val) * 2 // 5 :]] for run in shown]
        low, high = min(map(min, late)), max(map(max, late))
        left.set(
            xlabel="optimizer steps of the language run",
            ylabel="val_loss (nats per token)",
            ylim=(low - 0.05 * (high - low), high + 0.3 * (high - low)),
        )
        right.set(xlabel="seconds, pre-pre-training and its data included", ylim=left.get_ylim())
        left.legend(title="arm: final val_loss; band: 1 sd", frameon=False, fontsize=8)
        for ax in (left, right):
            ax.grid(alpha=0.25, lw=0.6)
            ax.set_xlim(0, None)
    figure.savefig(path, dpi=120)


def plot_deltas(rows: list[dict], path: Path) -> None:
    """Difference of the final and the best loss to the base, with 95 % confidence intervals."""
    from matplotlib.figure import Figure
    from scipy import stats

    rows = [row for row in rows if row["base"]][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for shift, key, color in ((0.12, "final", report.COLORS[0]), (-0.12, "best", report.COLORS[1])):
        half = [
            stats.t.ppf(0.975, max(1, r[key]["n"] - 1)) * r[key]["sd"] / math.sqrt(r[key]["n"])
            for r in rows
        ]
        ax.errorbar(
            [r[key]["delta"] for r in rows],
            np.arange(len(rows)) + shift,
            xerr=half,
            fmt="o",
            ms=4,
            color=color,
            capsize=3,
            label=f"{key} val_loss",
        )
    ax.axvline(0, color="0.4", lw=1)
    ax.set_yticks(range(len(rows)), [f"{r['arm']} (to {r['base']})" for r in rows], fontsize=8)
    ax.set_xlabel(
        "difference in val_loss to the base, paired by seed; bars: 95 % of t; left is better"
    )
    ax.legend(frameon=False)
    ax.grid(alpha=0.25, lw=0.6, axis="x")
    figure.savefig(path, dpi=120)


def plot_learning(folders: tuple[str, ...], path: Path) -> None:
    """
    Loss of pre-pre-training over tokens against what guessing reaches; next-grid accuracy by grids
    in the context.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    uniform, unigram, chance, copied = set(), [], set(), []
    for i, folder in enumerate(folders):
        run, color = report.load_folder(Path(folder)), report.COLORS[i % len(report.COLORS)]
        cfg = pre_pre_train.PrePreConfig(
            **train_gpt.read_toml(Path(folder) / "config.toml", pre_pre_train.PrePreConfig)
        )
        measured = [
            e for e in report.read_metrics(Path(folder) / "metrics.jsonl") if e["kind"] == "nca"
        ]
        if not measured or not run.val:
            raise train_gpt.UserError(
                f"--learns {folder}: its metrics.jsonl holds no evaluation of pre-pre-training"
            )
        per_step = int(cfg.batch_tokens) / 1e6
        for events, key, style in (
            (run.train, "train_loss", {"lw": 0.5, "alpha": 0.4}),
            (
                run.val,
                "val_loss",
                {"lw": 2, "label": f"{run.name}, held-out rules: {run.val[-1]['val_loss']:.3f}"},
            ),
        ):
            left.plot(
                [e["step"] * per_step for e in events],
                [e[key] for e in events],
                color=color,
                **style,
            )
        cells = measured[-1]["cell_by_context"]
        right.plot(
            range(1, len(cells) + 1),
            cells,
            color=color,
            lw=2,
            label=f"{run.name}: {np.mean(cells):.3f}",
        )
        right.plot(
            range(1, len(cells) + 1), measured[0]["cell_by_context"], color=color, lw=1, ls=":"
        )
        uniform.add(cfg.nca_patch**2 * math.log(cfg.nca_colors))
        unigram.append(measured[-1]["unigram_loss"])
        chance.add(1 / cfg.nca_colors)
        data = pre_pre_train.NcaData(cfg, "val")
        copied.append(
            pre_pre_train.copy_accuracy(data.generate(0, np.arange(min(data.rows, 512))), cfg)
        )
    for value in sorted(uniform):
        left.axhline(value, color="0.3", lw=1, ls="--", label=f"all patches alike: {value:.3f}")
    left.axhline(
        np.mean(unigram),
        color="0.3",
        lw=1,
        ls=":",
        label=f"best constant guess: {np.mean(unigram):.3f}",
    )
    for value in sorted(chance):
        right.axhline(value, color="0.3", lw=1, ls="--", label=f"chance: {value:.3f}")
    right.axhline(
        np.mean(copied),
        color="0.3",
        lw=1,
        ls=":",
        label=f"the last grid once more: {np.mean(copied):.3f}",
    )
    left.set(xlabel="million tokens", ylabel="loss (nats per patch)", xlim=(0, None))
    right.set(
        xlabel="grids of the rule in the context",
        ylabel="cells right in the next grid (held-out rules)",
        ylim=(0, None),
    )
    for ax in (left, right):
        ax.grid(alpha=0.25, lw=0.6)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


########################################
#             Command line             #
########################################


def study(o: Options) -> int:
    out = Path(o.out)
    if "list" in o.arms:
        for name, arm in all_arms(o.source).items():
            print(f"{name:20} {arm.base or '(base)':8} {arm.note}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if o.learns:
        plot_learning(o.learns, out / "learns.png")
        print(f"wrote {out / 'learns.png'}")
        return 0
    ablation = Ablation(o)
    diff = ablation.check()
    print("Config: what each arm changes in its base\n" + diff, flush=True)
    ablation.run()
    found = ablation.load()
    rows = rows_of(found, ablation.arms)
    sections = tables(rows) | ({"Config: what each arm changes in its base": diff} if diff else {})
    images = ["curves.png", "deltas.png"] if any(row["base"] for row in rows) else []
    if images:
        plot_curves(found, ablation.arms, out / images[0])
        plot_deltas(rows, out / images[1])
    record = {"options": dataclasses.asdict(o), "git": train_gpt.git_revision(), "arms": rows}
    train_gpt.write_whole(
        out / "nca.json",
        (json.dumps(json_ready(record), indent=1, allow_nan=False) + "\n").encode(),
    )
    body = "".join(f"\n## {title}\n\n```\n{text}\n```\n" for title, text in sections.items())
    body += "".join(f"\n![{name}]({name})\n" for name in images)
    train_gpt.write_whole(out / "report.md", ("# Pre-pre-training\n" + body).encode())
    print("\n\n".join(f"{report.wrap(title)}\n{text}" for title, text in sections.items()))
    print(f"\nwrote {', '.join(str(out / name) for name in ['report.md', 'nca.json', *images])}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return ending(
        "error",
        lambda: study(tyro.cli(Options, args=argv, description=__doc__, use_underscores=True)),
        train_gpt.UserError,
        report.ReportError,
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    raise SystemExit(main())
