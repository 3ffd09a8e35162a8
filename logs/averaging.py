"""
What averaging the weights is worth, apart from what the falling learning rate is worth.

    python logs/averaging.py logs/run-a logs/run-b ...

For every run that kept a checkpoint of its end: the live weights, their moving average and their
plain average, each scored as it is and as the run's export rounds it, on the same validation
prefix. One row per arm, mean over its seeds, standard deviation behind. Runs need --ema and
--swa_every, or have fewer columns.
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import golf
import train_gpt as tg
from logs.endings import ending
from logs.report import ReportError, load_folder


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


def main(folders: list[str]) -> int:
    arms = defaultdict(list)
    for folder in map(Path, folders):
        if not (folder / "result.json").exists():
            raise tg.UserError(f"{folder} has no result.json: it is not finished")
        arms[load_folder(folder).result.get("arm") or folder.name].append(scores(folder))
    words = list(dict.fromkeys(word for rows in arms.values() for row in rows for word in row))
    print(f"| arm | n | {' | '.join(words)} |\n|-|-:|" + "-:|" * len(words))
    for arm, rows in arms.items():
        cells = []
        for word in words:
            values = [row[word] for row in rows if word in row]
            sd = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{sd}" if values else "")
        print(f"| {arm} | {len(rows)} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(ending("error", lambda: main(sys.argv[1:]), tg.UserError, ReportError))
