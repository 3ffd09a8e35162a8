"""Statistics of embeddings and logits, as output-embedding centering is judged by (arXiv
2601.02031).

    python logs/report.py embeddings logs/RUN            # of its newest checkpoint, kept beside it
    python logs/report.py embeddings logs/RUN/model.nrx  # or of an artifact or a checkpoint

Keys are the columns of the paper's loss_overview.csv: `I.` is the input embedding, `O.` the output
embedding (the head), `OC.` the head after subtracting its mean row mu, `H.` of hidden states.
`O.ratio norm`, |mu| over the mean row norm, tells how anisotropic the rows are: 0 if they are
centred, 1 if all are equal. Standard deviations have n - 1 below.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402
from logs.endings import ending  # noqa: E402

########################################
#              Statistics              #
########################################


class LogitStatistics:
    """
    Of any number of tokens, fed in pieces: what stays of a piece is five numbers a token, never its
    logits.
    """

    def __init__(self):
        self.columns, self.hidden_sum = [], 0.0

    def add(self, logits: Tensor, hidden: Tensor) -> None:
        """Logits [n, V] and the activations [n, D] that they were made of."""
        columns = (
            logits.mean(-1),
            logits.std(-1),
            logits.abs().mean(-1),
            logits.abs().amax(-1),
            logits.logsumexp(-1),
        )
        self.columns.append(torch.stack(columns).double().cpu())
        self.hidden_sum = self.hidden_sum + hidden.double().sum(0).cpu()

    def result(self) -> tuple[dict[str, float], Tensor]:
        """The statistics by name, and the mean activation [D]."""
        mean, std, absmean, absmax, log_z = torch.cat(self.columns, dim=1)
        return {
            "O.logits_mean_mean": mean.mean().item(),
            "O.logits_mean_std": std.mean().item(),
            "O.logits_std_mean": mean.std().item(),
            "O.logits_std_std": std.std().item(),
            "O.logits_mean_absmean": absmean.mean().item(),
            "O.logits_mean_absmax": absmax.mean().item(),
            "H.mean_logsqZ": log_z.square().mean().item(),
        }, self.hidden_sum / mean.numel()


def row_statistics(e: Tensor, mu: Tensor | None = None) -> dict[str, float]:
    """
    Norms of the rows e [V, D], the norm of their mean, their products and cosines with mu (their
    own mean, unless given). centering_ratio is the paper's B_ratio: the largest |projection on mu|
    behind centering over the one before.
    """
    norms, own = e.norm(dim=1), e.mean(0)
    mu = own if mu is None else mu
    dots, size = e @ mu, mu.norm()
    cosines = dots / (norms * size).clamp_min(1e-300)
    words = {"max": torch.amax, "avg": torch.mean, "min": torch.amin}
    out = {f"{word} norm": f(norms) for word, f in words.items()}
    out |= {"mu norm": own.norm(), "ratio norm": own.norm() / norms.mean().clamp_min(1e-300)}
    out |= {f"{word} aligndot": f(dots) for word, f in words.items()}
    out |= {f"{word} aligncos": f(cosines) for word, f in words.items()}
    return {k: v.item() for k, v in out.items()} | {
        "centering_ratio": b_ratio(
            *(x.item() for x in (own.square().sum(), dots.amin(), dots.amax())), norms.mean().item()
        )
    }


def b_ratio(square: float, low: float, high: float, mean_norm: float = 1.0) -> float:
    """
    From |mu|^2 and the least and largest e_i.mu; 1 where there is no mean to speak of (0/0 up to
    rounding).
    """
    if square <= (1e-6 * mean_norm) ** 2:
        return 1.0
    below, above = square - low, high - square
    return max(below, above) / max(below - square, above + square)


def spectrum(e: Tensor) -> dict[str, float]:
    """
    Least and largest singular value of e [V, D], and isotropy: the least over the largest Z(c) =
    sum_i exp(e_i.c) for c any eigenvector of e^T e, of either sign (Mu & Viswanath 2018). Named
    otherwise than the published `isotropy`, which takes one sign, as the eigensolver leaves it; so
    is the ratio of the two, published in percent.
    """
    if not e.isfinite().all():
        return dict.fromkeys(("isotropy of both signs", "Smin", "Smax", "Smin over Smax"), math.nan)
    values, vectors = torch.linalg.eigh(e.T @ e)
    singular = values.clamp_min(0).sqrt()
    projections = e @ vectors
    log_z = torch.cat([projections.logsumexp(0), (-projections).logsumexp(0)])
    return {
        "isotropy of both signs": (log_z.min() - log_z.max()).exp().item(),
        "Smin": singular[0].item(),
        "Smax": singular[-1].item(),
        "Smin over Smax": (singular[0] / singular[-1]).item(),
    }


@torch.no_grad()
def statistics(
    model: tg.GPT, val: tg.Validation | None, shape: tg.Shape, tokens: int
) -> tuple[dict[str, float], int]:
    """
    Everything about the embeddings, and about logits on the first tokens of validation text; and on
    how many there were.
    """
    head = model.head[: model.logit_rows].detach().double()  # rows without logits are no part of it
    tables = {
        "I": head if model.embed is None else model.embed[: model.logit_rows].detach().double(),
        "O": head,
    }
    out = {
        f"{k}.{name}": x
        for k, e in tables.items()
        for name, x in (row_statistics(e) | spectrum(e)).items()
    }
    out |= {
        f"OC.{name}": x for name, x in row_statistics(head - head.mean(0), head.mean(0)).items()
    }
    tokens = min(tokens, val.scored if val else 0)
    if not tokens:
        return out, 0
    seen = LogitStatistics()
    for low in range(0, -(-tokens // val.seq_len), shape.rows):
        x, _ = val.batch(range(low, low + shape.rows), head.device, shape.rows)
        applied = shape.repeats, shape.window, shape.passes, shape.window_long
        hidden = model.hidden(x, *applied).flatten(0, 1)[: tokens - low * val.seq_len]
        for piece in hidden.split(model.cfg.loss_chunk):
            seen.add(model.logits(piece), piece)
    logits, mean = seen.result()
    out |= logits
    for k, e in tables.items():
        mu = e.mean(0).cpu()
        out[f"{k}.fhs_dot_prod"] = (mu @ mean).item()
        out[f"{k}.fhs_cos_sim"] = (mu @ mean / (mu.norm() * mean.norm()).clamp_min(1e-300)).item()
    return out, tokens


def of_source(where: str, tokens: int) -> tuple[dict, Path]:
    """
    Statistics of a run folder's newest checkpoint (else its artifact), a checkpoint folder or an
    artifact; their file.
    """
    cfg, named, path = tg.open_source(where, exact=True)
    plan = tg.Plan(cfg)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = tg.build_model(cfg, device, tg.choose_dtype(cfg, device), plan.eval_seq_len)
    tg.load_weights(model, named, str(path))
    try:
        val = tg.Validation(cfg, plan, None)
    except tg.UserError as e:
        print(f"notice: no statistics of logits: {e}")
        val = None
    shape = plan.eval_shape(plan.at(cfg.steps, 1.0))
    values, tokens = statistics(model, val, shape, tokens)
    return {"source": str(path), "tokens": tokens, **values}, (
        path if path.is_dir() else path.parent
    )


@dataclass
class EmbeddingOptions:
    """
    Statistics of embeddings and logits of checkpoints and artifacts, written as embeddings.json
    beside each.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders, checkpoint folders or artifacts
    tokens: int = 131072  # tokens of validation text that the statistics of logits are about


def embeddings(options: EmbeddingOptions) -> int:
    if options.tokens < 0:
        raise tg.UserError(
            f"--tokens {options.tokens}: give how many, or 0 for no statistics of logits"
        )
    for where in options.runs:
        found, folder = of_source(where, options.tokens)
        (folder / "embeddings.json").write_text(
            json.dumps(found, indent=1) + "\n", encoding="utf-8"
        )
        print(
            f"{found.pop('source')} ({found.pop('tokens')} tokens) -> {folder / 'embeddings.json'}"
        )
        groups: dict[str, dict[str, float]] = {}
        for key, value in found.items():
            prefix, name = key.split(".", 1)
            groups.setdefault(name, {})[prefix] = value
        columns = [c for c in ("I", "O", "OC", "H") if any(c in g for g in groups.values())]
        print(f"{'':18}" + "".join(f"{c:>14}" for c in columns))
        for name, values in groups.items():
            print(
                f"{name:18}"
                + "".join(f"{values[c]:14.6g}" if c in values else " " * 14 for c in columns)
            )
    return 0


def main(argv: list[str]) -> int:
    if not argv:
        print(
            "usage: report.py embeddings RUN... [--tokens N]: run folders, checkpoint folders "
            "or artifacts",
            file=sys.stderr,
        )
        return 2
    return ending(
        "error",
        lambda: embeddings(tyro.cli(EmbeddingOptions, args=argv, prog="report.py embeddings")),
    )
