"""
Averages over the ends of epochs, for runs with --average_epochs N (train_gpt.py calls this file at
the end of each of the last N epochs and after training). By hand, the same on weights that are
there:

    python slowrun.py logs/RUN                          # also under torchrun, with as many ranks as there are GPUs
    python slowrun.py logs/RUN --last 2 --device cpu

Each run owns its folder logs/RUN/epochs/STEP/: weights, configuration, and how deep and with which
windows the model was applied when they were saved, which is how it is applied again. What is
averaged:

    prob_*       the probability that each checkpoint gives to the target; -log of it is the loss of the mixture, which is
                 a distribution (of logits it would not be that of anything)
    weights_*    the weights themselves, one model
    *_equal      every checkpoint counts the same
    *_recency    the k-th of N counts k/(1 + ... + N)

Only averages over as many epochs as the run says go into result.json; others are printed.
`val_loss` there stays the loss of the last step. The best epoch and the leaderboard's figure, the
least of all of these, are chosen on the validation set itself; `selected_on_validation` names them.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import tyro
from torch import Tensor

import train_gpt as tg
from train_gpt import UserError


def keep_epoch(p: tg.Parts, step: int) -> None:
    """Write the weights of the end of an epoch, whole or not at all. Collective."""
    final = p.run.folder / "epochs" / f"{step:06d}"
    part = final.with_name(f".{final.name}.part")
    now = p.plan.at(step - 1, (step - 1) / p.cfg.steps)  # what the last step was trained with

    def write() -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {
            name: w.detach().cpu().contiguous().clone() for name, w in p.model.named_parameters()
        }
        try:
            tg.write_tensors(weights, part / "model.safetensors")
            (part / "config.toml").write_text(tg.config_toml(p.cfg), encoding="utf-8")
            state = {"step": step, "repeats": now.repeats, "window": now.window}
            (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
            tg.sync_folder(part)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)  # a full disk needs its room
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.rename(part, final)
        tg.sync_folder(final.parent)

    p.run.on_main(write)


def epochs(folder: Path) -> list[Path]:
    """The epochs kept by a run, oldest first."""
    return sorted(p for p in folder.glob("epochs/*") if p.name.isdigit())


def mixing_weights(n: int) -> dict[str, list[float]]:
    return {"equal": [1 / n] * n, "recency": [2 * k / (n * (n + 1)) for k in range(1, n + 1)]}


@torch.no_grad()
def token_losses(p: tg.Parts, repeats: int, window: int) -> Tensor:
    """Losses in nats, float64 on the CPU, of the validation targets that fall to this rank."""
    shape = tg.Shape(
        max(1, p.cfg.micro_tokens // p.plan.eval_seq_len), p.plan.eval_seq_len, repeats, window
    )
    losses = []
    for low in range(0, p.val.rows, shape.rows * p.run.world):
        p.run.agree()
        first = low + p.run.rank * shape.rows
        x, y = p.val.batch(range(first, first + shape.rows), p.run.device, shape.rows)
        losses.append(p.graph(x, y, repeats, window)[y.flatten() >= 0].double().cpu())
    return torch.cat(losses)


def mean_over_ranks(p: tg.Parts, losses: Tensor) -> float:
    total = losses.sum().to(p.run.device)
    return float(p.run.sum(total)) / (p.val.rows * p.val.seq_len)


def score_epochs(p: tg.Parts, result: dict, last: int = 0) -> dict:
    """
    Losses of the averages over the last epochs kept, and of the best epoch, for result.json. Leaves
    the model with other weights. Collective.
    """

    def listed() -> list[tuple[Path, dict]]:
        paths = epochs(p.run.folder)[-(last or p.cfg.average_epochs) :]
        texts = [(path / "state.json").read_text(encoding="utf-8") for path in paths]
        return [(path, json.loads(text)) for path, text in zip(paths, texts)]

    def weights_of(path: Path) -> dict[str, Tensor]:
        return p.run.read_on_main(lambda: (tg.read_tensors(path / "model.safetensors"), None))[0]

    kept = p.run.on_main(listed)
    if not kept:
        raise UserError(f"{p.run.folder}/epochs is empty: train with --average_epochs N")
    paths, states = [path for path, _ in kept], [state for _, state in kept]
    found: dict[str, float] = {}
    losses = []
    for path, state in zip(paths, states):
        tg.load_weights(p.model, weights_of(path), str(path))
        losses.append(token_losses(p, state["repeats"], state["window"]))
        p.run.log(
            f"epoch weights of step {state['step']}: val_loss:{mean_over_ranks(p, losses[-1]):.5f}"
        )
    stacked = torch.stack(losses)
    for name, weights in mixing_weights(len(paths)).items():
        log_weights = torch.tensor(weights, dtype=torch.float64).log()[:, None]
        found[f"val_loss_prob_{name}"] = mean_over_ranks(
            p, -torch.logsumexp(log_weights - stacked, 0)
        )
    for name, weights in mixing_weights(len(paths)).items():
        average = {
            n: torch.zeros(w.shape, dtype=torch.float32) for n, w in p.model.named_parameters()
        }
        for path, weight in zip(paths, weights):
            for n, w in weights_of(path).items():
                average[n].add_(w.float(), alpha=weight)
        tg.load_weights(p.model, average, str(p.run.folder))
        found[f"val_loss_weights_{name}"] = mean_over_ranks(
            p, token_losses(p, states[-1]["repeats"], states[-1]["window"])
        )
    for name, loss in found.items():
        p.run.log(f"average over {len(paths)} epochs: {name}:{loss:.5f}")
    return found | {"averaged_steps": [s["step"] for s in states]} | select(p, result, found)


def select(p: tg.Parts, result: dict, found: dict) -> dict:
    """
    The best epoch, and the least of all losses as the leaderboard takes it: both chosen on the
    validation set.
    """
    best = p.run.on_main(lambda: best_epoch(p.run.folder, p.plan))
    last = {key: result.get(key) for key in ("val_loss", "val_loss_ema", "val_loss_swa")}
    losses = last | found | ({"val_loss_best_epoch": best[0]} if best else {})
    name = min((n for n in losses if losses[n] is not None), key=losses.get)
    chosen = {"slowrun_val_loss": losses[name], "slowrun_val_loss_is": name}
    if best:
        chosen |= {"val_loss_best_epoch": best[0], "best_epoch": best[1]}
        p.run.log(f"best epoch: {best[1]}, val_loss:{best[0]:.5f} (selected on validation)")
    p.run.log(
        f"slowrun's figure, the least of these: val_loss:{losses[name]:.5f} from {name} "
        "(selected on validation)"
    )
    return chosen | {
        "selected_on_validation": [
            k for k in ("val_loss_best_epoch", "slowrun_val_loss") if k in chosen
        ]
    }


def best_epoch(folder: Path, plan: tg.Plan) -> tuple[float, int] | None:
    """
    Least loss among the evaluations at ends of epochs, and its epoch; None where there was none.
    """
    cfg, losses = plan.cfg, []
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    for record in filter(None, map(tg.parse_metric, text.splitlines())):
        if record["kind"] == "val" and plan.ends_epoch(record["step"]):
            losses.append((record["val_loss"], record["step"] * cfg.epochs // cfg.steps))
    return min(losses, default=None)


@dataclasses.dataclass
class Flags:
    folder: tyro.conf.Positional[str]  # run folder, such as logs/slowrun_cpu-s1
    # epochs to average; 0: as many as the run says; any other number is printed and not written
    last: int = 0
    device: str = "auto"  # auto, cpu or cuda
    compile: int = 0  # as in train_gpt.py
    micro_tokens: int = 0  # tokens in one pass; 0: as in training


def main(argv: list[str] | None = None) -> int:
    try:
        flags = tyro.cli(Flags, args=argv, description=__doc__, use_underscores=True)
        folder = Path(flags.folder)
        if not epochs(folder):
            raise UserError(
                f"{folder} holds no epochs/*: no run with --average_epochs N, or not yet in "
                "its last epochs"
            )
        if flags.last < 0 or flags.last > len(epochs(folder)):
            raise UserError(f"--last {flags.last}: {folder} holds {len(epochs(folder))} epochs")
        cfg = tg.Config(**tg.read_toml(epochs(folder)[-1] / "config.toml"))
        cfg.device, cfg.compile, cfg.micro_tokens = (
            flags.device,
            flags.compile,
            flags.micro_tokens or cfg.micro_tokens,
        )
        cfg.log_dir, cfg.run = str(folder.parent), folder.name
        with tg.Run(cfg) as run:
            plan = tg.Plan(cfg)
            model = tg.build_model(
                cfg, run.device, run.dtype, max(plan.max_seq_len, plan.eval_seq_len)
            )
            val = tg.Validation(cfg, plan, None)
            p = tg.Parts(
                cfg, run, plan, model, tg.compile_model(model, cfg), None, None, None, val, None
            )
            path = folder / "result.json"
            result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            official = flags.last in (0, cfg.average_epochs)
            result |= score_epochs(p, result, flags.last)
            if not official:
                run.log(
                    f"--last {flags.last}: {path} is left as it is, with averages over "
                    f"{cfg.average_epochs} epochs"
                )
            elif run.is_main and path.exists():
                tg.write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    except (UserError, RuntimeError, OSError) as e:
        message = tg.explain(e)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except (tg.Interrupted, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
