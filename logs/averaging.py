"""
What averaging the weights is worth, apart from what the falling learning rate is worth: the
analysis of ./run.sh study warmdown.

For every run: the live weights, their moving average and their plain average, each scored as it is
and as the run's export rounds it, on the same validation prefix. Runs need a checkpoint of their
end, --ema and --swa_every, or have fewer columns.
"""

import math
from pathlib import Path

import golf
import train_gpt as tg
from logs.report import mean_sd


def scores(folder: Path) -> dict[str, float]:
    """
    Bits per byte (nats per token where bytes are unknown) by "live", "live rounded", "ema", ...
    """
    saved = tg.checkpoints(folder)
    if not saved:
        raise tg.UserError(
            f"{folder} holds no complete checkpoint (ckpt/*/DONE): it was not kept, or the run "
            "is not finished"
        )
    path = saved[-1]
    cfg, live = tg.checkpoint_config(path), tg.read_tensors(path / "model.safetensors")
    averages = tg.read_tensors(path / "averages.safetensors")
    kinds = {"live": live}
    for kind in ("ema", "swa"):
        if f"{next(iter(live))}:{kind}" in averages:
            kinds[kind] = {name: averages[f"{name}:{kind}"].view_as(w) for name, w in live.items()}
    cfg.compile, plan = 0, tg.Plan(cfg)
    device = tg.choose_device(cfg)
    model = tg.build_model(
        cfg, device, tg.choose_dtype(cfg, device), max(plan.max_seq_len, plan.eval_seq_len)
    )
    val, _ = golf.validation(model)
    scorer = golf.make_scorer(
        model, golf.How(mode="chunked"), plan.eval_shape(plan.at(cfg.steps, 1.0))
    )
    found = {}
    for kind, named in kinds.items():
        data = golf.pack(named, golf.quantise(named, golf.parse_bits(cfg.export)), cfg, "zstd")
        for word, weights in ((kind, named), (f"{kind} rounded", golf.unpack(data, kind)[1])):
            tg.load_weights(model, weights, word)
            result = golf.score_all(scorer, val)
            found[word] = result["bpb"] if val.bytes else result["loss"]
    return found


def analyse(study, found, out: Path) -> tuple[dict[str, str], list[str]]:
    """The table by title, mean over seeds and standard deviation, of the runs of a study by arm."""
    arms = {
        name: [scores(study.folder(name, run.seed)) for run in runs] for name, runs in found.items()
    }
    words = list(dict.fromkeys(word for rows in arms.values() for row in rows for word in row))
    lines = [f"| arm | n | {' | '.join(words)} |", "|-|-:|" + "-:|" * len(words)]
    for name, rows in arms.items():
        cells = []
        for word in words:
            values = [row[word] for row in rows if word in row]
            mean, sd = mean_sd(values)
            spread = "" if math.isnan(sd) else f" ({sd:.4f})"
            cells.append(f"{mean:.4f}{spread}" if values else "")
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return {"Live weights and their averages, exact and rounded": "\n".join(lines)}, []
