"""
What averaging the weights is worth, apart from what the falling learning rate is worth: the
analysis of ./run.sh study warmdown.

For every run: the live weights, their moving average and their plain average, each scored as it is
and as the run's export rounds it, on the same validation prefix. Runs need a checkpoint of their
end, --ema and --swa_every, or have fewer columns.
"""

import math
from pathlib import Path

import train_gpt as tg
from logs import score
from logs.report import mean_sd


def scores(folder: Path) -> dict[str, float]:
    """Bits per byte (nats per token where bytes are unknown) by "live", "live rounded", "ema"..."""
    if not tg.checkpoints(folder):
        raise tg.UserError(
            f"{folder} holds no complete checkpoint (ckpt/*/DONE): it was not kept, or the run "
            "is not finished"
        )
    s = score.opened(score.Source(str(folder)), exact=True)
    live = tg.read_tensors(s.path / "model.safetensors")
    averages = tg.read_tensors(s.path / "averages.safetensors")
    kinds = {"live": live}
    for kind in ("ema", "swa"):
        if f"{next(iter(live))}:{kind}" in averages:
            kinds[kind] = {name: averages[f"{name}:{kind}"].view_as(w) for name, w in live.items()}
    scorer = score.make_scorer(s.model, score.OneScore(mode="chunked"), s.shape)
    found, bits = {}, tg.parse_bits(s.cfg.export)
    for kind, named in kinds.items():
        rounded = tg.quantise({name: named[name] for name in tg.quantised_names(s.model)}, bits)
        data = tg.pack_artifact(named, rounded, s.cfg, "zstd")
        read = tg.unpack_artifact(data, kind)[1]
        for word, weights in ((kind, named), (f"{kind} rounded", read)):
            tg.load_weights(s.model, weights, word)
            result = score.score_all(scorer, s.val)
            found[word] = result["val_bpb"] if s.val.bytes else result["val_loss"]
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
