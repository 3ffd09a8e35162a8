"""
The analysis of ./run.sh study centering: output-embedding centering's methods over learning rates,
scales and seeds, in tables and figures.

    python logs/centering.py tables loss_overview.csv          # of the paper's own overview
    python logs/centering.py overhead --config centering_cpu   # step time of each method, paired

Contents: overview | tables | figures | overhead | command line
"""

import contextlib
import csv
import io
import itertools
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

from logs.endings import UserError, ending  # noqa: E402
from logs.report import Run, mean_sd, table  # noqa: E402

PAPER_METHODS = {
    "baseline": "baseline",
    "zloss": "z_loss",
    "muloss": "mu_loss",
    "mucentering": "mu_centering",
}
COLORS = {
    "baseline": "#D55E00",
    "mu_loss": "#E69F00",
    "mu_centering": "#009E73",
    "z_loss": "#0072B2",
}
# loss at initialisation, 10.83 for the other scales; what a diverged run counts as
PAPER_LOSS = {"221M": 10.85}

########################################
#               Overview               #
########################################


def read_run(run: Run, folder: Path, cell: dict) -> dict:
    """
    One row of the overview. Losses are the last evaluation's, pure cross-entropy; a run that
    diverged has an infinite one and no statistics. Columns have the paper's names where they mean
    the same.
    """
    cfg, last = run.config, run.val[-1] if run.val and run.finished else {}
    evaluated = (e["val_loss"] for e in run.val if e["step"] == 0)
    # what diverged has no result.json
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    told = re.search(r"^model_params:(\d+)", text, re.MULTILINE)
    loss = last.get("val_loss", math.inf)
    row = {
        "name": run.name,
        "scale": cell["scale"],
        "method": cell["method"],
        "lambda": max(cfg["z_loss"], cfg["mu_loss"]),
        "lr": cfg["adamw_lr"],
        "seed": run.seed,
        "params": run.result.get("params") or (int(told[1]) if told else ""),
        "initial_loss": next(evaluated, math.log(cfg["vocab"])),
        "test_loss": loss,
        "diverged": int(not run.finished),
        "test_perplexity": math.exp(loss) if math.isfinite(loss) else math.inf,
    }
    statistics = last | (all_statistics(folder, cfg["embed_stats"]) if run.finished else {})
    row |= {k: v for k, v in statistics.items() if k.partition(".")[0] in ("I", "O", "OC", "H")}
    return row | {"time": run.result.get("train_time_s", "")}


def all_statistics(folder: Path, tokens: int) -> dict[str, float]:
    """Those of embeddings and logits of a run's last checkpoint, taken once; none without one."""
    import train_gpt as tg
    from logs import embeddings

    saved = tg.checkpoints(folder)
    if not saved or not tokens:
        return {}
    kept = saved[-1] / f"embeddings-{tokens}.json"
    if not kept.is_file():
        found, _ = embeddings.of_source(str(folder), tokens)
        tg.write_whole(kept, (json.dumps(found) + "\n").encode())
    return json.loads(kept.read_text(encoding="utf-8"))


def read_overview(path: Path) -> list[dict]:
    """Rows of a CSV, ours or the paper's, whose runs are told by their names alone."""
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        for raw in csv.DictReader(f):
            if not isinstance(raw.get("name"), str) or None in raw or None in raw.values():
                raise UserError(
                    f"{path}: row {len(rows) + 1} has not the columns of an overview; give an "
                    "overview.csv of a study or the paper's"
                )
            row = {k: number(v) for k, v in raw.items()}
            rows.append(row if "method" in row else row | named_by_the_paper(row["name"], path))
    return rows


def named_by_the_paper(name: str, path: Path) -> dict:
    """What a published run's name says; an integer N behind lr is N * 1e-4."""
    m = re.search(r"-(\d+M)-.*-lr(\d+)-([a-z]+?)(wt)?-g([\d.e+-]+)-s(\d+)", name)
    if not m or m[3] not in PAPER_METHODS:
        raise UserError(
            f"{path}: {name!r} is no name such as wor40A-16M-13p1B-100k-bs64-lr10-baseline-"
            "g0e+00-s1; give an overview.csv of a study or the paper's"
        )
    weight, method = float(m[5]), PAPER_METHODS[m[3]]
    if weight not in (0, 1e-4):
        method += f"_{weight:.0e}".replace("e-0", "e-").replace("e+0", "e+")
    return {
        "scale": m[1],
        "method": method + ("_tied" if m[4] else ""),
        "lambda": weight,
        "lr": int(m[2]) * 1e-4,
        "seed": int(m[6]),
        "initial_loss": PAPER_LOSS.get(m[1], 10.83),
        "params": float(m[1][:-1]) * 1e6,
    }


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def write_overview(rows: list[dict], path: Path) -> None:
    keys = list(dict.fromkeys(k for row in rows for k in row))
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, keys)
        out.writeheader()
        out.writerows(rows)


########################################
#                Tables                #
########################################


def lr_sensitivity(losses: list[float], initial: float, intervals: int | None = None) -> float:
    """
    Mean over learning rates of min(loss, initial loss) - least loss (Wortsman et al. 2023). The
    paper divides by intervals = n - 1 and not by n, the default. What is not a number counts as
    diverged; nan where no rate trains at all.
    """
    capped = [min(x, initial) if math.isfinite(x) else initial for x in losses]
    if not capped or min(capped) >= initial:
        return math.nan
    return sum(x - min(capped) for x in capped) / (intervals or len(capped))


def optimum(losses: dict[float, float]) -> tuple[float, float]:
    """
    (least loss, its learning rate), the smaller rate of two with one loss; nan where all diverged.
    """
    finite = {lr: x for lr, x in losses.items() if math.isfinite(x)}
    if not finite:
        return math.nan, math.nan
    lr = min(finite, key=lambda lr: (finite[lr], lr))
    return finite[lr], lr


def measured(row: dict, key: str) -> bool:
    return isinstance(row.get(key), float) and math.isfinite(row[key])


def size(rows: list[dict]) -> float:
    """Parameters of these runs of one scale, from whichever tells; nan if none does."""
    return next((float(r["params"]) for r in rows if r["params"] not in ("", None)), math.nan)


def grouped(rows: list[dict]) -> dict[tuple[str, str], dict[int, dict[float, dict]]]:
    """(scale, method) -> seed -> learning rate -> row; scales by size."""
    sizes = {r["scale"]: size([x for x in rows if x["scale"] == r["scale"]]) for r in rows}
    sizes = {scale: 0 if math.isnan(n) else n for scale, n in sizes.items()}
    out: dict = {}
    for row in sorted(rows, key=lambda r: (sizes[r["scale"]], r["lr"])):
        by_seed = out.setdefault((row["scale"], row["method"]), {})
        by_seed.setdefault(int(row["seed"]), {})[row["lr"]] = row
    return out


def spread(values: list[float], digits: int = 3) -> str:
    """Mean (sample standard deviation) of what is finite; !k: k more diverged."""
    finite = [x for x in values if math.isfinite(x)]
    lost = f"!{len(values) - len(finite)}" * (len(finite) < len(values))
    if not finite:
        return lost or "-"
    mean, sd = mean_sd(finite)
    return (
        f"{mean:.{digits}f}"
        + ("" if math.isnan(sd) else f" ({sd:.{digits}f})")
        + f" {lost}" * bool(lost)
    )


def all_rates(groups: dict, scale: str) -> set[float]:
    """Every learning rate that some method of this scale was trained at."""
    return set().union(
        *(by_lr for (of, _), seeds in groups.items() if of == scale for by_lr in seeds.values())
    )


def summary(
    seeds: dict[int, dict[float, dict]], rates: set[float] | None = None
) -> dict[str, list[float]]:
    """
    Per seed: least loss, its learning rate, sensitivity by both conventions; of the seeds that have
    all of these rates (all that the method has). Where none has, of those with most, and `rates`
    has their number, as sensitivities over different rates do not compare.
    """
    rates = rates or set().union(*seeds.values())
    most = max(map(len, seeds.values()))
    out: dict[str, list[float]] = {k: [] for k in ("loss", "lr", "lrs_n1", "lrs_n")}
    for by_lr in seeds.values():
        if len(by_lr) == most:
            losses = {lr: row["test_loss"] for lr, row in by_lr.items()}
            best, lr = optimum(losses)
            initial = next(iter(by_lr.values()))["initial_loss"]
            n1 = lr_sensitivity(list(losses.values()), initial, max(1, len(losses) - 1))
            for k, v in zip(out, (best, lr, n1, lr_sensitivity(list(losses.values()), initial))):
                out[k].append(v)
    return out | {"rates": [most] if most < len(rates) else []}


def paired(rows: list[dict], key: str) -> dict[tuple[str, str], dict[float, list[float]]]:
    """
    (scale, method) -> learning rate -> differences of this column to the baseline of the same
    scale, rate and seed.
    """
    base = {(r["scale"], r["lr"], r["seed"]): r for r in rows if r["method"] == "baseline"}
    out: dict = {}
    for r in sorted(rows, key=lambda r: r["lr"]):
        other = base.get((r["scale"], r["lr"], r["seed"]), {})
        if r["method"] != "baseline" and measured(r, key) and measured(other, key):
            out.setdefault((r["scale"], r["method"]), {}).setdefault(r["lr"], []).append(
                r[key] - other[key]
            )
    return out


def pairs(rows: list[dict]) -> str:
    """Differences of loss and anisotropy to the baseline, over all pairs of runs, if there are."""
    keys, body = ("test_loss", "O.ratio norm"), []
    found = {key: paired(rows, key) for key in keys}
    for method in dict.fromkeys(r["method"] for r in rows if r["method"] != "baseline"):
        loss, ratio = (
            [
                x
                for (_, of), by_lr in found[key].items()
                for x in itertools.chain(*by_lr.values())
                if of == method
            ]
            for key in keys
        )
        if loss:
            above = f"{sum(x > 0 for x in ratio)} of {len(ratio)}" if ratio else "-"
            body.append([method, str(len(loss)), spread(loss, 4), spread(ratio, 4), above])
    heads = ["method", "n", "test loss", "ratio norm", "ratio above the baseline's"]
    return table(heads, body) if body else ""


def main_table(groups: dict) -> str:
    """Of each scale and method: optimal loss and rate, and sensitivity by both conventions."""
    heads = ["scale", "method", "n", "rates", "diverged", "optimal loss", "optimal lr"]
    heads += ["LRS /(n-1)", "LRS /n", "train s"]
    body = []
    for (scale, method), seeds in groups.items():
        rates = all_rates(groups, scale)
        s, runs = summary(seeds, rates), [row for by_lr in seeds.values() for row in by_lr.values()]
        times = [float(r["time"]) for r in runs if r.get("time") not in ("", None)]
        best = " ".join(f"{lr:g}" for lr in sorted(set(s["lr"])) if math.isfinite(lr))
        few = f"{s['rates'][0]} of {len(rates)}!" if s["rates"] else str(len(rates))
        lost = sum(not math.isfinite(r["test_loss"]) for r in runs)
        loss, n1, n = (
            spread(s[k]) if any(map(math.isfinite, s[k])) else "nan"
            for k in ("loss", "lrs_n1", "lrs_n")
        )
        counts = [str(len(s["loss"])), few, str(lost)]
        body.append([scale, method, *counts, loss, best or "-", n1, n, spread(times, 1)])
    return table(heads, body)


# columns that have a table over the learning rates: title, digits
BY_RATE = {
    "test_loss": ("Test loss", 3),
    "O.ratio norm": ("Anisotropy: |mu| over the mean row norm", 3),
    "O.mu norm": ("|mu| of the output embedding", 3),
    "O.logits_mean_mean": ("Mean logit", 2),
    "O.logits_mean_absmax": ("Largest logit", 2),
    "O.centering_ratio": ("B_ratio", 2),
}


def sections(rows: list[dict]) -> dict[str, str]:
    """Tables by title: means over seeds, behind them in brackets the sample standard deviation."""
    groups = grouped(rows)
    out = {"Optimal loss and sensitivity to the learning rate": main_table(groups)}
    if differences := pairs(rows):
        out["Paired with the baseline of the same scale, rate and seed"] = differences
    rates = sorted({row["lr"] for row in rows})
    for key, (title, digits) in BY_RATE.items():
        body = []
        for (scale, method), seeds in groups.items():
            found = [
                [by_lr[lr].get(key) for by_lr in seeds.values() if lr in by_lr] for lr in rates
            ]
            cells = [spread([x for x in v if isinstance(x, float)], digits) for v in found]
            body.append([scale, method, *cells])
        if any(cell != "-" for line in body for cell in line[2:]):
            out[title] = table(["scale", "method", *(f"{lr:g}" for lr in rates)], body)
    return out


########################################
#               Figures                #
########################################


def look(method: str) -> dict:
    """The paper's colour of a method; other weights of it are broken in other ways."""
    base = next((m for m in sorted(COLORS, key=len, reverse=True) if method.startswith(m)), "")
    line, marker = {"": ("-", "o"), "_1e-7": (":", "v"), "_1e+2": ("-.", "^")}.get(
        method.removeprefix(base), ("--", "s")
    )
    return {
        "color": COLORS.get(base, "0.3"),
        "ls": line,
        "marker": marker,
        # wide: others lie on it
        "lw": 3.6 if method == "baseline" else 1.6,
        "ms": 6 if method == "baseline" else 3.5,
    }


# column, label, and where a symmetric logarithm, which shows 0 and both signs, stops being one; 0:
# a linear axis
PANELS = (
    ("test_loss", "test loss (nats)", 0),
    ("to the baseline", "test loss less the baseline's", 1e-3),
    ("O.ratio norm", "|mu| / mean row norm", 0),
    ("O.mu norm", "|mu|", 0.1),
    ("O.logits_mean_mean", "mean logit", 1),
    ("O.logits_mean_absmax", "largest |logit|", 1),
)


def by_rate(groups: dict, key: str) -> dict[tuple[str, str], dict[float, list[float]]]:
    """(scale, method) -> learning rate -> what was measured of this column, over seeds."""
    out = {}
    for group, seeds in groups.items():
        rates = sorted(set().union(*seeds.values()))
        cells = {lr: [by_lr[lr] for by_lr in seeds.values() if lr in by_lr] for lr in rates}
        out[group] = {lr: [r[key] for r in rows if measured(r, key)] for lr, rows in cells.items()}
    return out


def draw(rows: list[dict], path: Path):
    """Per scale panels over the learning rate; once the sensitivity to it against size. Saved."""
    from matplotlib.figure import Figure  # pyplot would look for a display

    groups = grouped(rows)
    scales = list(dict.fromkeys(scale for scale, _ in groups))
    values = {key: by_rate(groups, key) for key, _, _ in PANELS}
    values["to the baseline"] = paired(rows, "test_loss")
    panels = [p for p in PANELS if any(any(by_lr.values()) for by_lr in values[p[0]].values())]
    columns = min(4, len(panels) + 1)
    lines = -(-(len(panels) + 1) // columns)  # of panels, for each scale
    size = (3.7 * columns, 3.1 * lines * len(scales) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(scales) * lines, columns, squeeze=False)
    axes = axes.reshape(len(scales), lines * columns)
    for row, scale in zip(axes, scales):
        for ax, (key, label, linear) in zip(row, panels):
            here = {method: v for (of, method), v in values[key].items() if of == scale}
            draw_panel(ax, here, linear)
            ax.set(xscale="log", xlabel="learning rate", ylabel=label)
        row[0].set_title(scale, loc="left", fontsize=10)
        for ax in row[len(panels) :]:
            ax.axis("off")
    ax = axes[0][len(panels)]
    ax.axis("on")
    draw_sensitivity(ax, groups, scales)
    for ax in axes.flat:
        ax.grid(alpha=0.25, lw=0.6)
    shown = {
        label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())
    }
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)
    return figure


def draw_panel(ax, values: dict[str, dict[float, list[float]]], linear: float) -> None:
    """
    One line per method: means, and the range over seeds; linear up to there, from where the values
    are far beyond.
    """
    for method, by_lr in values.items():
        keep = {lr: v for lr, v in by_lr.items() if v}
        if keep:
            rates, found, style = list(keep), list(keep.values()), look(method)
            ax.plot(rates, [float(np.mean(v)) for v in found], label=method, **style)
            low, high = [min(v) for v in found], [max(v) for v in found]
            ax.fill_between(rates, low, high, color=style["color"], alpha=0.15, lw=0)
    if "baseline" not in values:  # differences to it
        ax.axhline(0, lw=2.5, color=look("baseline")["color"], zorder=1)
    every = [x for by_lr in values.values() for v in by_lr.values() for x in v]
    if linear and max(map(abs, every), default=0) > 30 * linear:
        ax.set_yscale("symlog", linthresh=linear)
        low, high = min(0, *every), max(0, *every)
        # its own margins are those of a linear axis
        ax.set_ylim(2 * low - linear / 4, 2 * high + linear / 4)


def draw_sensitivity(ax, groups: dict, scales: list[str]) -> None:
    """Against size, with the standard deviation over seeds; only over all rates of a scale."""
    sizes, told = {}, []
    for scale in scales:
        by_seed = [
            by_lr for (of, _), seeds in groups.items() if of == scale for by_lr in seeds.values()
        ]
        sizes[scale] = size([row for by_lr in by_seed for row in by_lr.values()]) / 1e6
    methods = list(dict.fromkeys(m for _, m in groups))
    for i, method in enumerate(methods):
        points = []
        for (scale, of), seeds in groups.items():
            s = summary(seeds, all_rates(groups, scale))
            values = [x for x in s["lrs_n1"] if math.isfinite(x)]
            if of == method and values and not s["rates"] and math.isfinite(sizes[scale]):
                # beside each other
                points.append((sizes[scale] * 1.03 ** (i - len(methods) / 2), *mean_sd(values)))
        if points:
            x, y, sd = zip(*points)
            bars = [0.0 if math.isnan(v) else v for v in sd]
            ax.errorbar(x, y, bars, label=method, capsize=2, elinewidth=1, **look(method))
            told += y
    ax.set(xlabel="parameters (millions)", ylabel="sensitivity to the learning rate")
    ticks = sorted(v for v in sizes.values() if math.isfinite(v))
    if len(ticks) > 1:
        ax.set_xscale("log")
    if len(ticks) > 2 and told and min(told) > 0:
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, None)
    ax.set_xticks(ticks, [f"{v:.3g}" for v in ticks])
    ax.set_xticks([], minor=True)


NOTES = """Means over seeds (sample standard deviation); !k: k runs more diverged. LRS: mean over
the rates of min(loss, initial loss) - best loss; `3 of 5!`: over 3 rates, when others have 5.
In the figure bands are ranges over seeds, bars standard deviations."""


def analyse(study, found: dict[str, list[Run]], out: Path) -> tuple[dict[str, str], list[str]]:
    """Tables by title, and the figure's name; out/overview.csv has a row for each run."""
    rows = []
    for name, runs in found.items():
        cell = study.arms[name].cell
        if not {"scale", "method"} <= cell.keys():
            raise UserError(
                f"arm {name}: analysis = 'centering' needs a grid of lr, scale and method; leave "
                "the analysis out"
            )
        rows += [read_run(run, study.folder(name, run.seed), cell) for run in runs]
    write_overview(rows, out / "overview.csv")
    draw(rows, out / "centering.png")
    return sections(rows) | {"How to read these tables": NOTES}, ["centering.png"]


@dataclass
class Tables:
    """The tables and centering.png of an overview in CSV, such as the paper's loss_overview.csv."""

    source: tyro.conf.Positional[str]  # an overview in CSV
    out: str = "logs/report-centering"  # folder for what is written


def tables(options: Tables) -> int:
    out, rows = Path(options.out), read_overview(Path(options.source))
    if not rows:
        raise UserError(f"{options.source} has no rows; train with ./run.sh study centering")
    out.mkdir(parents=True, exist_ok=True)
    draw(rows, out / "centering.png")
    found = sections(rows) | {"How to read these tables": NOTES}
    body = "".join(f"\n## {title}\n\n```\n{text}\n```\n" for title, text in found.items())
    text = f"# Centering\n{body}\n![figures](centering.png)\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    print("\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in found.items()))
    print(f"\nwrote {out}/report.md, centering.png")
    return 0


########################################
#               Overhead               #
########################################

# what each switches on; a weight changes no time
SWITCHES = {
    "baseline": {},
    "mu_centering": {"mu_centering": 1},
    "mu_loss": {"mu_loss": 1e-4},
    "z_loss": {"z_loss": 1e-4},
}


@dataclass
class Overhead:
    """
    Time of a training step with each method over the baseline's: one model, its flags switched from
    step to step.
    """

    config: tuple[str, ...] = ("centering_cpu",)  # presets
    flags: str = ""  # further flags of train_gpt.py, as in --flags="--compile 1 --dim 224"
    rounds: int = 500  # steps of every method; two minutes at centering_cpu
    seed: int = 1  # of the order within a round and of the bootstrap


def switched_step(p, method: str, step: int):
    """
    A training step of one method by a model that is made for any: what train_step asks for are
    fields of its Config.
    """
    import train_gpt as tg

    off = dict.fromkeys(("z_loss", "mu_loss", "mu_centering"), 0)
    for k, v in (off | SWITCHES[method]).items():
        setattr(p.cfg, k, v)
    return tg.train_step(p, step, p.plan.at(step, min(1.0, step / p.cfg.steps)))


def step_times(
    p, methods: tuple[str, ...], rounds: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """
    Seconds [rounds] of a step of each method; in every round they come in another order. On a CPU
    it is the time of this process, which others lengthen little; on a GPU the time between two of
    its events.
    """
    import train_gpt as tg

    took = {m: np.zeros(rounds) for m in methods}
    on_gpu = p.run.device.type == "cuda"
    for i in range(-3, rounds):  # three rounds warm up: graphs, caches, the allocator
        for m in rng.permutation(list(methods)):
            if on_gpu:
                began, ended = (tg.torch.cuda.Event(enable_timing=True) for _ in range(2))
                tg.torch.cuda.synchronize()
                began.record()
                switched_step(p, m, i + 3)
                ended.record()
                tg.torch.cuda.synchronize()
                seconds = began.elapsed_time(ended) / 1000
            else:
                before = time.process_time()
                switched_step(p, m, i + 3)
                seconds = time.process_time() - before
            if i >= 0:
                took[m][i] = seconds
    return took


def median_ratio(
    values: np.ndarray, base: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float]:
    """
    Median of the paired differences in percent of the baseline's median, and its 95 % interval by
    bootstrap over rounds.
    """
    gap = 100 * (values - base) / np.median(base)
    resampled = np.median(rng.choice(gap, (2000, len(gap))), axis=1)
    return float(np.median(gap)), *map(float, np.quantile(resampled, (0.025, 0.975)))


def overhead(options: Overhead) -> int:
    import train_gpt as tg

    methods, rng = tuple(SWITCHES), np.random.default_rng(options.seed)
    cfg = tg.parse_args(["--config", *options.config, *options.flags.split(), "--epochs", "0"])
    if options.rounds < 10:
        raise UserError(f"--rounds {options.rounds}: an interval needs 10 or more")
    with contextlib.redirect_stdout(io.StringIO()), tg.Run(cfg) as run:
        p = tg.build(cfg, run)
        took = step_times(p, methods, options.rounds, rng)
    clock = "between CUDA events" if run.device.type == "cuda" else "of the process"
    print(
        f"{' '.join(options.config)} {options.flags}: "
        f"{sum(q.numel() for q in p.model.parameters()):,} parameters, head of "
        f"{p.model.logit_rows} x {cfg.dim}, {cfg.batch_tokens} tokens a step, "
        f"{tg.device_name(run)}\nbaseline "
        f"{1000 * np.median(took['baseline']):.2f} ms a step (time {clock}); {options.rounds} "
        "steps of each method, in turns"
    )
    for method in methods[1:]:
        mid, low, high = median_ratio(took[method], took["baseline"], rng)
        print(f"{method:14} {mid:+.2f} % (95 %: {low:+.2f} to {high:+.2f})")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    verbs = {"tables": (Tables, tables), "overhead": (Overhead, overhead)}
    verb = argv[0] if argv else ""
    if verb not in verbs:
        print(
            f"usage: python logs/centering.py {'|'.join(verbs)} [flags]; --help behind a verb "
            "lists them",
            file=sys.stderr,
        )
        return 2

    kind, work = verbs[verb]
    return ending("error", lambda: work(tyro.cli(kind, args=argv[1:], use_underscores=True)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
