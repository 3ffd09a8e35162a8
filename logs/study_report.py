"""
What logs/study.py writes of a study's runs: a table and a figure of arms, paired by seed with what
each is compared with, how soon they get there, what they differ in, and the analysis' own.

Contents: table | figure | report
"""

import importlib
import json
import math
from pathlib import Path

from logs import report
from logs.endings import UserError
from logs.report import Run

########################################
#                Table                 #
########################################


def load(study) -> dict[str, list[Run]]:
    """Runs that are over, by arm; a diverged one is not finished."""
    found = {}
    for name in study.arms:
        folders = [study.folder(name, seed) for seed in study.seeds]
        over = [f for f in folders if any((f / k).exists() for k in ("result.json", "diverged"))]
        found[name] = [report.load_folder(f) for f in over]
    if not any(found.values()):
        raise UserError(f"{study.log_dir / study.name}: no run of this study is finished")
    refuse_unknown_metric(study, [run for runs in found.values() for run in runs if run.finished])
    return found


def refuse_unknown_metric(study, finished: list[Run]) -> None:
    """An error where none of the finished runs has the study's number: it would have no column."""
    metric, names = study.said["metric"], set()
    for run in finished:
        if type(run.value(metric)) in (int, float):
            return
        names |= {k for k, v in run.result.items() if type(v) in (int, float)}
    if finished:
        raise UserError(
            f"study {study.name}: metric = {metric!r} is a number of none of the {len(finished)} "
            f"finished runs; they have {', '.join(sorted(names))}"
        )


def summary(study, found: dict[str, list[Run]]) -> list[dict]:
    """A row for each arm: its metric over seeds, paired with what it is compared with; costs."""
    rows, metric = [], study.said["metric"]
    finished = {name: [run for run in runs if run.finished] for name, runs in found.items()}
    for name, runs in finished.items():
        against = study.arms[name].against
        row = {"arm": name, "against": against, "diverged": len(found[name]) - len(runs)}
        values = [v for run in runs if (v := run.value(metric)) is not None]
        row |= {"n": len(values), "mean": report.mean_sd(values)[0]}
        row["sd"] = report.mean_sd(values)[1]
        row |= report.paired(runs, finished.get(against, []), metric)
        paces = [1000 * run.value("train_time_s") / run.value("steps") for run in runs]
        row["step_ms"] = report.mean_sd(paces)[0]
        for key in ("steps", "train_time_s", "artifact_bytes"):
            known = [v for run in runs if (v := run.value(key)) is not None]
            row[key] = report.mean_sd(known)[0]
        rows.append(row | {"note": study.arms[name].note})
    return rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads well as text, too; columns that say nothing are left out."""
    columns = [c for c in zip(header, *rows) if any(cell not in ("", "-", "0") for cell in c[1:])]
    out = []
    for cells in columns:
        column = [cell.replace("|", "\\|") for cell in cells]  # else they would be two
        left = column[0] in ("arm", "to", "note", "field")
        width = max(3, *map(len, column))
        rule = "-" * width if left else "-" * (width - 1) + ":"
        out.append([cell.ljust(width) if left else cell.rjust(width) for cell in column])
        out[-1].insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*out))


def table(study, rows: list[dict]) -> str:
    several = len({row["against"] for row in rows} - {""}) > 1
    columns = [("arm", "arm", ""), ("n", "n", ""), ("diverged", "diverged", "")]
    columns += [(study.said["metric"], "mean", ".4f"), ("sd", "sd", ".4f")]
    columns += [("to", "against", "")] * (several and "grid" not in study.said)
    columns += [("d", "difference", "+.4f"), ("sd", "difference_sd", ".4f")]
    columns += [("95 % low", "low", "+.4f"), ("high", "high", "+.4f"), ("p", "p", ".2g")]
    columns += [("steps", "steps", ",.0f"), ("ms a step", "step_ms", ".1f")]
    columns += [("train s", "train_time_s", ".1f"), ("bytes", "artifact_bytes", ",.0f")]
    columns += [("note", "note", "")]
    body = []
    for row in rows:
        low, high = row["difference"] - row["half"], row["difference"] + row["half"]
        row = row | {"low": low, "high": high}
        cells = [format(row[key], form) for _, key, form in columns]
        body.append(["-" if cell in ("nan", "+nan") else cell for cell in cells])
    return markdown([head for head, _, _ in columns], body)


def curve_metric(study, runs: list[Run]) -> str:
    """What the validation curves show: the metric, or what it is a final score of."""
    metric = study.said["metric"]
    wanted = (metric, "val_bpb") if "bpb" in metric else (metric,)
    logged = {key for run in runs for event in run.val for key in event}
    return next((key for key in wanted if key in logged), "val_loss")


def times(study, found: dict[str, list[Run]]) -> str:
    """How much of its twin's training each arm needs to reach that one's final loss."""
    finished = {name: [r for r in runs if r.finished and r.val] for name, runs in found.items()}
    parts = []
    for against in dict.fromkeys(arm.against for arm in study.arms.values() if arm.against):
        group = {n: finished[n] for n, arm in study.arms.items() if arm.against == against}
        curve = curve_metric(study, finished[against])
        if all(len(run.val) > 3 for run in finished[against]):
            parts.append(report.time_section(group | {against: finished[against]}, against, curve))
    return "\n".join(part for part in parts if part)


def config_rows(study, found: dict[str, list[Run]]) -> list[list[str]]:
    """[arm, compared with, field, there, here], as the runs' own configurations have it."""
    rows = []
    for name, runs in found.items():
        twins = found.get(study.arms[name].against)
        if runs and twins:
            changed = report.config_diff(twins[0].config, runs[0].config)
            rows += [[name, twins[0].arm, *row] for row in changed]
    return rows


########################################
#                Figure                #
########################################


def draw_curves(ax, study, found: dict[str, list[Run]]) -> None:
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


def draw_differences(ax, study, rows: list[dict], found: dict) -> None:
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
    twins = {row["against"] for row in rows}
    named = "grid" not in study.said and len(twins) > 1
    labels = [row["arm"] + (f" to {row['against']}" if named else "") for row in rows]
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    ax.set_ylim(-0.8, len(rows) - 0.2)
    to = min(twins) if len(twins) == 1 else "what each is compared with"
    ax.set_xlabel(f"difference in {metric} to {to},\npaired by seed; bars: 95 % of t")


def draw(study, rows: list[dict], found: dict[str, list[Run]], path: Path) -> bool:
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


########################################
#                Report                #
########################################


def json_ready(value):
    """The same with None, JSON's null, where a number is not one: one seed has no deviation."""
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(study) -> None:
    """report.md, study.json and study.png of the runs that are over, and what the analysis adds."""
    found, out = load(study), study.out
    rows = summary(study, found)
    out.mkdir(parents=True, exist_ok=True)
    sections = {"Arms, and differences paired by seed": table(study, rows)}
    # of other data or another machine, say; diverged ones have their column
    if notes := report.run_notes([run for runs in found.values() for run in runs if run.finished]):
        sections["Notes on the runs"] = "\n".join(notes)
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
