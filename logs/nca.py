"""
The analysis of ./run.sh study nca: does pre-pre-training on cellular automata help?

Two views, of final and best losses, each paired by seed with the run without it (two-sided t-test):
equal steps, where pre-pre-training is for free, and equal total time, where its training and the
generation of its data are charged; an arm that is `longer` gives the run without it that time as
further steps. Nothing is corrected for the number of arms.

    python logs/nca.py logs/nca/pre-*-s1 --out learns.png   # picture of what phase 1 itself learns

Contents: time of pre-pre-training | tables | figures | command line
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

import pre_pre_train  # noqa: E402
import train_gpt  # noqa: E402
from logs import report  # noqa: E402
from logs.endings import ending  # noqa: E402

########################################
#       Time of pre-pre-training       #
########################################


def measure(argv: list[str]) -> dict:
    """What --generate_only says, in a process of its own, whose time nothing else shares."""
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "pre_pre_train.py"), *argv, "--generate_only", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=alone)
    if done.returncode:
        raise train_gpt.UserError(
            f"generating the data of phase 1 ended with code {done.returncode}"
        )
    return json.loads(done.stdout)


def generation(study, name: str) -> dict:
    """How long the data of these runs takes: measured once, kept for as long as they are so."""
    kept, argv = study.out / f"generate-{name}.json", study.phase1_argv(name, study.seeds[0])
    made_by = train_gpt.config_hash(pre_pre_train.parse_args(argv))
    try:
        made = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    except ValueError:  # damaged: measured once more
        made = {}
    if made.get("config_sha256") != made_by:
        made = measure(argv) | {"config_sha256": made_by}
        kept.parent.mkdir(parents=True, exist_ok=True)
        train_gpt.write_whole(kept, (json.dumps(made) + "\n").encode())
    return made


def charge(study, name: str, seed: int) -> float:
    """Seconds of a pre-pre-training run: its clock, search for rules, making of its rows."""
    cfg = pre_pre_train.parse_args(study.phase1_argv(name, seed))
    made = generation(study, name)
    rows = made["tokens"] * (cfg.nca_epochs if cfg.nca_regen else 1) / made["tokens_per_s"]
    rules = made["candidates"] / made["rules_per_s"] if "rules_per_s" in made else 0.0
    run = report.load_folder(study.folder(f"pre-{name}", seed))
    return run.value("train_time_s") + rows + rules


def longer(study, name: str, seed: int) -> dict[str, int]:
    """
    Length of a `longer` arm: that of the run that it is compared with, and as many steps as the
    mean pre-pre-training of that one's arms takes time for. Where epochs are limited, they grow
    along; where they are counted, by whole ones, in favour of this arm.
    """
    saved, base = study.folder(name, seed) / "config.toml", study.arms[name].against
    if saved.exists():  # times are never the same twice, so what was begun is gone on with
        begun = train_gpt.read_toml(saved)
        return {"steps": begun["steps"], "epochs": begun["epochs"]}
    pres = {arm.phase1 for arm in study.arms.values() if arm.against == base and arm.phase1}
    if not pres:
        raise train_gpt.UserError(
            f"arm {name}: no arm with pre-pre-training on {base} is run, so there is no time to "
            "give"
        )
    cfg, run = study.config(base, seed), report.load_folder(study.folder(base, seed))
    more = 1 + np.mean([charge(study, pre, seed) for pre in pres]) / run.value("train_time_s")
    epochs = math.ceil(cfg.epochs * more)
    if cfg.epochs and (cfg.lr_cycles or cfg.average_epochs or cfg.eval_every < 0):
        more = epochs / cfg.epochs
    return {"steps": round(run.value("steps") * more), "epochs": epochs}


def add_charges(study, found: dict[str, list[report.Run]]) -> None:
    """To each run its best loss, and its charge for pre-pre-training in seconds."""
    for name, runs in found.items():
        pre = study.arms[name].phase1
        for run in runs:
            if not run.val:
                raise train_gpt.UserError(
                    f"{study.folder(name, run.seed)}/metrics.jsonl holds no evaluation: put the "
                    "run's own file back, or delete the folder and run again"
                )
            run.result["best_val_loss"] = min(event["val_loss"] for event in run.val)
            run.result["charge_s"] = charge(study, pre, run.seed) if pre else 0.0
            for event in run.val:
                event["charged_ms"] = event["train_time_ms"] + 1000 * run.result["charge_s"]


########################################
#                Tables                #
########################################


def loss_at(run: report.Run, seconds: float) -> float:
    """The validation loss when so many seconds were spent, phase 1 included; nan before its end."""
    clock = [event["charged_ms"] / 1000 for event in run.val]
    return float(np.interp(seconds, clock, [event["val_loss"] for event in run.val], left=math.nan))


def rows_of(study, found: dict[str, list[report.Run]]) -> list[dict]:
    rows = []
    for name, runs in found.items():
        against = study.arms[name].against
        row = {"arm": name, "against": against, "n": len(runs)}
        for key in ("best_val_loss", "train_time_s", "charge_s"):
            row[key] = report.mean_sd([run.value(key) for run in runs])[0]
        rows.append(row)
        if not (base := found.get(against)):
            continue
        pairs = report.pair_up(runs, base)
        for run, twin in pairs:
            run.result["timed_loss"] = loss_at(run, twin.value("train_time_s"))
            twin.result["timed_loss"] = twin.value("val_loss")
        row["best"] = report.paired(runs, base, "best_val_loss")
        row["timed"] = report.paired(runs, base, "timed_loss")
        row |= speed(pairs)
        for other, arm in study.arms.items():
            if arm.longer and arm.against == against and other != name:
                row["longer"] = other
                row["longer_final"] = report.paired(runs, found[other], "val_loss")
                row["longer_best"] = report.paired(runs, found[other], "best_val_loss")
    return rows


def speed(pairs: list[tuple[report.Run, report.Run]]) -> dict:
    """How many reach their twin's best loss, and in what part of its steps and time."""
    steps, times = [], []
    for run, twin in pairs:
        goal = twin.result["best_val_loss"]
        first = lambda of, clock: report.time_to_loss(of.val, goal, "val_loss", clock)  # noqa: B023
        # a twin that only got worse is no goal
        if first(run, "step") is not None and first(twin, "step"):
            steps.append(first(run, "step") / first(twin, "step"))
            times.append(first(run, "charged_ms") / first(twin, "charged_ms"))
    step, time = (float(np.mean(ratios)) if ratios else math.nan for ratios in (steps, times))
    return {"reached": len(steps), "step_ratio": step, "time_ratio": time}


def dash(text: str) -> str:
    return "-" if "nan" in text else text


def tables(rows: list[dict]) -> dict[str, str]:
    """By title: best losses, equal total time, and against the arms that are `longer`."""

    def cells(row: dict, key: str) -> list[str]:
        if key not in row:
            return [""] * 3
        test = row[key]
        forms = ((test["difference"], "+.4f"), (test["difference_sd"], ".4f"), (test["p"], ".2g"))
        return [dash(format(value, form)) for value, form in forms]

    best, times, longer = [], [], []
    for row in rows:
        best.append([row["arm"], f"{row['best_val_loss']:.4f}", *cells(row, "best")])
        cost = [row["arm"], f"{row['charge_s']:.1f}", f"{row['train_time_s']:.1f}"]
        ratios = [""] * 3
        if "timed" in row:
            reached = f"{row['reached']} of {row['n']}"
            ratios = [reached, *(dash(f"{row[key]:.2f}") for key in ("step_ratio", "time_ratio"))]
        times.append([*cost, *cells(row, "timed"), *ratios])
        if "longer" in row:
            both = [*cells(row, "longer_final"), *cells(row, "longer_best")]
            longer.append([row["arm"], row["longer"], *both])
    heads = ["arm", "pre s", "lm s", "d", "sd", "p", "reached", "steps", "time"]
    out = {
        "Equal steps: best val_loss, chosen on the data that it is scored on": report.table(
            ["arm", "best", "d best", "sd", "p"], best
        ),
        "Equal total time: seconds before and in language training; d: loss at the end of the time "
        "of the run compared with (- where the language run has not begun by then); how many reach "
        "that one's best loss, in what part of its steps and time": report.table(heads, times),
    }
    if longer:
        heads = ["arm", "to", "d final", "sd", "p", "d best", "sd", "p"]
        title = "Equal total time: against the arm with the time of pre-pre-training as steps"
        out[title] = report.table(heads, longer)
    return out


########################################
#               Figures                #
########################################


def plot_curves(study, found: dict[str, list[report.Run]], path: Path) -> None:
    """Validation loss against steps and seconds with phase 1 charged, a row for each comparison."""
    from matplotlib.figure import Figure

    bases = list(dict.fromkeys(arm.against for arm in study.arms.values() if arm.against))
    figure = Figure(figsize=(12, 4.2 * len(bases)), layout="constrained")
    axes = figure.subplots(len(bases), 2, squeeze=False)
    for (left, right), base in zip(axes, bases):
        members = {n: runs for n, runs in found.items() if base in (n, study.arms[n].against)}
        shown = [run for runs in members.values() for run in runs]
        for i, (name, runs) in enumerate(members.items()):
            style = report.arm_style(i)
            report.draw_arm(left, runs, "val_loss", "step", 1, name, style)
            report.draw_arm(right, runs, "val_loss", "charged_ms", 1e3, name, style)
        low, high = report.y_limits(shown, "val_loss", 0.0)
        label = "val_loss (nats per token)"
        left.set(xlabel="optimizer steps of the language run", ylabel=label, ylim=(low, high))
        right.set(xlabel="seconds, pre-pre-training and its data included", ylim=(low, high))
        left.legend(title="arm: mean of the last evaluations", frameon=False, fontsize=8)
        for ax in (left, right):
            ax.grid(alpha=0.25, lw=0.6)
            ax.set_xlim(0, None)
    figure.savefig(path, dpi=120)


def analyse(study, found: dict[str, list[report.Run]], out: Path) -> tuple[dict[str, str], list]:
    """Tables by title, and the names of the figures in `out`."""
    add_charges(study, found)
    rows = rows_of(study, found)
    if not any(row["against"] for row in rows):
        return tables(rows), []
    plot_curves(study, found, out / "curves.png")
    return tables(rows), ["curves.png"]


def learned(folder: str) -> dict:
    """What a pre-pre-training run logged, and what guesses reach on its data."""
    run, where = report.load_folder(Path(folder)), Path(folder)
    saved = train_gpt.read_toml(where / "config.toml", pre_pre_train.PrePreConfig)
    cfg = pre_pre_train.PrePreConfig(**saved)
    events = report.read_metrics(where / "metrics.jsonl")
    measured = [e for e in events if e["kind"] == "nca"]
    if not measured or not run.val:
        raise train_gpt.UserError(
            f"{folder}: its metrics.jsonl holds no evaluation of pre-pre-training"
        )
    data = pre_pre_train.NcaData(cfg, "val")
    rows = data.generate(0, np.arange(min(data.rows, 512)))
    return {
        "run": run,
        "million_a_step": int(cfg.batch_tokens) / 1e6,
        "cells": [measured[0]["cell_by_context"], measured[-1]["cell_by_context"]],
        "uniform": cfg.nca_patch**2 * math.log(cfg.nca_colors),
        "unigram": measured[-1]["unigram_loss"],
        "chance": 1 / cfg.nca_colors,
        "copied": pre_pre_train.copy_accuracy(rows, cfg),
    }


def plot_learning(folders: tuple[str, ...], path: Path) -> None:
    """Loss over tokens against what guessing reaches; accuracy by grids in the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = [learned(folder) for folder in folders]
    for i, one in enumerate(runs):
        run, color, scale = one["run"], report.arm_style(i)["color"], one["million_a_step"]
        said = f"{run.name}, held-out rules: {run.val[-1]['val_loss']:.3f}"
        thin, bold = {"lw": 0.5, "alpha": 0.4}, {"lw": 2, "label": said}
        curves = ((run.train, "train_loss", thin), (run.val, "val_loss", bold))
        for events, key, style in curves:
            x, y = [e["step"] * scale for e in events], [e[key] for e in events]
            left.plot(x, y, color=color, **style)
        first, last = one["cells"]
        grids = range(1, len(last) + 1)
        right.plot(grids, last, color=color, lw=2, label=f"{run.name}: {np.mean(last):.3f}")
        right.plot(grids, first, color=color, lw=1, ls=":")
    gray = {"color": "0.3", "lw": 1}
    for value in sorted({one["uniform"] for one in runs}):
        left.axhline(value, **gray, ls="--", label=f"all patches alike: {value:.3f}")
    for value in sorted({one["chance"] for one in runs}):
        right.axhline(value, **gray, ls="--", label=f"chance: {value:.3f}")
    guess, copied = (np.mean([one[key] for one in runs]) for key in ("unigram", "copied"))
    left.axhline(guess, **gray, ls=":", label=f"best constant guess: {guess:.3f}")
    right.axhline(copied, **gray, ls=":", label=f"the last grid once more: {copied:.3f}")
    left.set(xlabel="million tokens", ylabel="loss (nats per patch)", xlim=(0, None))
    right.set(xlabel="grids of the rule in the context", ylim=(0, None))
    right.set_ylabel("cells right in the next grid (held-out rules)")
    for ax in (left, right):
        ax.grid(alpha=0.25, lw=0.6)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


########################################
#             Command line             #
########################################


@dataclass
class Options:
    """A picture of what pre-pre-training runs learn."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of pre-pre-training runs
    out: str = "logs/learns.png"  # the picture


def program(argv: list[str] | None) -> None:
    options = tyro.cli(Options, args=argv, use_underscores=True)
    if not options.runs:
        raise train_gpt.UserError("no runs given: name folders of pre-pre-training runs")
    plot_learning(options.runs, Path(options.out))
    print(f"wrote {options.out}")


def main(argv: list[str] | None = None) -> int:
    return ending("error", lambda: program(argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    raise SystemExit(main())
