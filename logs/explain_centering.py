"""Why centering the output embedding helps, and where it cannot, computed (arXiv 2601.02031).

    python logs/explain_centering.py                     # half a minute on one core
    python logs/explain_centering.py --run logs/RUN      # rounding of a trained run's own logits

(a) In exact arithmetic an untied head's mean row mu is invisible to the loss, so centering changes
none. (b) A mean logit far from 0 costs precision in bfloat16, which centering gives back. (c) What
moves mu is the head's optimizer; softcap and a tied table end the invariance.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402
from logs.embeddings import row_statistics  # noqa: E402
from logs.endings import ending  # noqa: E402

SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "compile": 0,
    "vocab": 128,
    "doc_token": 0,
    "head_multiple": 64,
    "depth": 2,
    "dim": 32,
    "heads": 2,
    "seq_len": "32",
    "batch_tokens": "256",
    "micro_tokens": 256,
    "tokenizer": "",
    "doc_mask": 0,
    "layer_norm": 1,
    "embed_norm": 0,
    "activation": "swiglu",
    "mlp_ratio": 2.0,
    "rope": "interleaved",
    "rope_dims": -1,
    "init": "xavier",
    "optimizer": "adamw",
    "beta1": 0.9,
    "adam_eps": 1e-8,
    "grad_clip": 1.0,
    "norm_eps": 1e-5,
    "lr": "0:0.1 0.1>1 1~0.1",
}
RATES = ("adamw_lr", "embed_lr", "head_lr", "scalar_lr", "tied_lr")


@contextlib.contextmanager
def in_float64():
    """Inside, the trainer takes norms, logits and updates in fp64, which else are in fp32."""
    single, size = torch.Tensor.float, torch.linalg.vector_norm
    torch.Tensor.float = torch.Tensor.double
    torch.linalg.vector_norm = lambda x, *args, dtype=None, **more: size(x, *args, **more)
    try:
        yield
    finally:
        torch.Tensor.float, torch.linalg.vector_norm = single, size


def zipf_batch(rng: torch.Generator, rows: int, seq_len: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, seq_len]: token k as often as 1/(k+1), and half of them follow from
    the one before: by turns they repeat it or count on.
    """
    odds = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    tokens = torch.multinomial(odds.expand(rows, -1), seq_len + 1, replacement=True, generator=rng)
    again = torch.rand(rows, seq_len + 1, generator=rng) < 0.5
    for t in range(1, seq_len + 1):
        tokens[:, t] = torch.where(again[:, t], (tokens[:, t - 1] + t % 2) % vocab, tokens[:, t])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train_small(
    steps: int, lr: float = 0.01, head_update=None, **changes
) -> tuple[list[float], tg.GPT]:
    """Train SMALL with these changes in fp64 on data of one seed; cross-entropy of every step, and
    the model. The words used are 7/8 of the vocabulary. head_update(head, gradient, step) replaces
    the optimizer's update of the head.
    """
    with in_float64():
        cfg = tg.Config(**(SMALL | {k: lr for k in RATES} | {"steps": steps} | changes))
        plan = tg.Plan(cfg)
        model = tg.build_model(cfg, torch.device("cpu"), torch.float64, 32)
        for p in model.parameters():
            p.data = p.data.double()
        optimizer = tg.MuonAdamW(cfg, model, tg.Ranks(torch.device("cpu"), dtype=torch.float64))
        rng, curve = torch.Generator().manual_seed(1), []
        for step in range(steps):
            x, y = zipf_batch(rng, 8, 32, cfg.vocab * 7 // 8)
            losses, log_z = model(x, y, log_z=True)
            curve.append(losses.mean().item())
            (losses.mean() + cfg.z_loss * log_z.square().mean()).backward()
            if cfg.mu_loss:
                tg.add_mu_loss(model.head, cfg.mu_loss, 1)
            head, grad = model.head.detach().clone(), model.head.grad.clone()
            optimizer.step(plan.at(step, step / steps))
            if head_update:
                model.head.data.copy_(head)
                head_update(model.head.data, grad, step)
            if cfg.mu_centering:
                tg.center(model.head)
        return curve, model


NO_OP = {
    "AdamW, untied": {},
    "lr 0.1: rounding grows": {"lr_": 0.1},
    "with decoupled decay 0.1": {"embed_wd": 0.1, "matrix_wd": 0.1},
    "without clipping": {"grad_clip": 0.0},
    "Muon on the blocks": {"optimizer": "muon", "matrix_lr": 0.02},
    "tied table": {"tie_embed": 1},
    "z-loss 1e-2": {"z_loss": 1e-2},
    "softcap 15": {"softcap": 15.0},
}


def no_op(changes: dict, steps: int = 100) -> tuple[float, float]:
    """(a) Largest difference of a step's loss between baseline and mu-centering, and largest
    difference of the heads but for their mean rows. sum_j (p_j - y_j) = 0, so a shift of all logits
    changes neither loss nor any gradient.
    """
    lr = changes.get("lr_", 0.01)
    changes = {k: v for k, v in changes.items() if k != "lr_"}
    curve, plain = train_small(steps, lr, mu_centering=0, **changes)
    other_curve, centred = train_small(steps, lr, mu_centering=1, **changes)
    apart = plain.head - plain.head.mean(0) - centred.head + centred.head.mean(0)
    return max(abs(x - y) for x, y in zip(curve, other_curve)), apart.abs().max().item()


def rounding_curve(
    offsets: tuple[float, ...],
    std: float = 4.7,
    vocab: int = 50304,
    tokens: int = 1024,
    seed: int = 1,
) -> list[float]:
    """(b) Rise of the cross-entropy when logits N(0, std^2) + offset are rounded to bfloat16, in
    expectation over targets drawn from the exact softmax. bfloat16 has 8 significant bits: its
    numbers are 0.5 apart from 64 on, 4 from 512 on.
    """
    rng, rises = torch.Generator().manual_seed(seed), [0.0] * len(offsets)
    for _ in range(0, tokens, 64):
        logits = std * torch.randn(64, vocab, generator=rng)
        exact = logits.log_softmax(-1)
        for i, c in enumerate(offsets):
            rounded = (logits + c).bfloat16().float().log_softmax(-1)
            rises[i] += F.kl_div(rounded, exact, reduction="sum", log_target=True).item() / tokens
    return rises


@dataclass
class Subject:
    """A trained model, what its last norm gives on some text [N, D], and the targets [N]."""

    model: tg.GPT
    hidden: Tensor
    targets: Tensor
    name: str

    def factor(self) -> float:
        """What the model's logits are over the products of activations and head."""
        return self.model.cfg.dim**self.model.cfg.logit_dim_power

    def head(self, offset: float) -> Tensor:
        """The rows that give logits [V, D], shifted along the mean activation until the mean logit
        is `offset`.
        """
        mean, head = self.hidden.mean(0), self.model.head[: self.model.logit_rows].detach().float()
        return head - head.mean(0) + offset / self.factor() * mean / mean.square().sum()

    def loss(self, products: Tensor, cap: float = 0.0) -> float:
        """Cross-entropy of activations times head [N, V], scaled as the model scales its logits."""
        logits = products.float() * self.factor()
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return F.cross_entropy(logits, self.targets).item()


@torch.no_grad()
def stress(of: Subject, offset: float) -> dict[str, float]:
    """(b) Cross-entropy of a trained model whose mean logit is shifted to `offset`: in fp32, with
    logits rounded to bf16, with weights and activations in bf16 as a GPU multiplies them, and that
    again behind one centering.
    """
    hidden, head, loss = of.hidden, of.head(offset), of.loss
    centred = head.clone()
    tg.center(centred)
    return {
        "fp32": loss(hidden @ head.T),
        "bf16 logits": loss((hidden @ head.T).bfloat16()),
        "bf16 head": loss(hidden @ head.bfloat16().float().T),
        "all bf16": loss(hidden.bfloat16() @ head.bfloat16().T),
        "all bf16, centred": loss(hidden.bfloat16() @ centred.bfloat16().T),
    }


def head_optimizers(steps: int = 100, lr: float = 0.01) -> dict[str, tuple[float, float]]:
    """(c) |mu| and |mu| / mean row norm when the head is trained by each rule. The gradient's
    column sums are zero, which SGD and Muon's polar factor keep; AdamW, and whatever rescales
    single rows or entries, does not.
    """

    def sgd(head: Tensor, grad: Tensor, step: int) -> None:
        head.sub_(30 * lr * grad)

    def muon(**changes):
        cfg, state = tg.Config(**(SMALL | changes)), {}
        rule = tg.Rule("muon", "head", (), lr, 0.0, cfg.beta1, cfg.beta2, False)

        def update(head: Tensor, grad: Tensor, step: int) -> None:
            if not state:
                state["momentum"] = torch.zeros_like(head)[None]
                if cfg.normuon:
                    state["second"] = head.new_zeros(1, len(head), 1)
            rates = {"lr": lr, "momentum": 0.95, "decay": 0.0}
            rates = {key: torch.tensor(x, dtype=head.dtype) for key, x in rates.items()}
            tg.muon_update(head[None], grad[None], state, rates, rule, cfg, head.dtype)

        return update

    rules = {
        "AdamW": None,
        "SGD": sgd,
        "Muon": muon(),
        "Muon, row_norm": muon(row_norm=1),
        "Muon, normuon": muon(normuon=0.9),
    }
    models = {name: train_small(steps, lr, rule)[1] for name, rule in rules.items()}
    model = models["AdamW"]
    start = tg.initial_value("head", model.declared["head"], model.head.shape, model.cfg.seed)
    heads = {"at the start": start.double()}
    heads |= {name: model.head.detach() for name, model in models.items()}
    found = {name: row_statistics(head) for name, head in heads.items()}
    return {name: (of["mu norm"], of["ratio norm"]) for name, of in found.items()}


@dataclass
class ExplainOptions:
    """Why centering the output embedding helps, computed."""

    # run folder or checkpoint whose model is stressed; empty: a small one, trained here
    run: str = ""
    tokens: int = 8192  # of validation text that a run's model is stressed on


def explain(options: ExplainOptions) -> int:
    of = subject(options)  # first: what is wrong with a run should not be told half a minute later
    print(
        "(a) fp64, 100 steps: mu-centering against the baseline. An untied head's mean row is "
        "invisible to the loss."
    )
    print(f"{'':28}{'loss differs by':>16}{'centred head by':>17}")
    for name, changes in NO_OP.items():
        loss, head = no_op(changes)
        print(f"{name:28}{loss:16.1e}{head:17.1e}")
    offsets = (16.5, 92.5, 270.0, 588.0, 1152.0)
    print(
        "\n(b) So a difference is rounding. Logits N(0, 4.7^2) + c in bf16, 50,304 of them: "
        "the loss rises by"
    )
    print("".join(f"{f'c = {c:g}':>12}" for c in offsets))
    print("".join(f"{rise:12.4f}" for rise in rounding_curve(offsets)))
    print(f"\n    {of.name}: head rows shifted until the mean logit is c")
    rows = {c: stress(of, c) for c in (0.0, *offsets)}
    print("    " + f"{'c':>8}" + "".join(f"{name:>19}" for name in rows[0.0]))
    for c, losses in rows.items():
        print(f"    {c:8g}" + "".join(f"{loss:19.4f}" for loss in losses.values()))
    print(
        "\n(c) Head trained by each rule, 100 steps: only what rescales entries or rows moves "
        "the mean row."
    )
    for name, (mu, ratio) in head_optimizers().items():
        print(f"{name:28} |mu| {mu:9.3e}   |mu|/mean norm {ratio:.3f}")
    print(
        "    Muon on the blocks: as (a), no effect. Softcap: cap*tanh(z/cap) is not free to shift; "
        "loss of the model above"
    )
    for c in (0.0, 5.0, 15.0):
        plain, capped = (of.loss(of.hidden @ of.head(c).T, cap) for cap in (0.0, 15.0))
        print(f"    mean logit {c:4g}: {plain:.4f} without, {capped:.4f} with softcap 15")
    return 0


def small_subject(steps: int = 150, rows: int = 64) -> Subject:
    _, model = train_small(steps)
    x, y = zipf_batch(torch.Generator().manual_seed(2), rows, 32, model.cfg.vocab * 7 // 8)
    hidden = model.hidden(x, 1, 0).detach().flatten(0, 1).float()
    return Subject(model, hidden, y.flatten(), "A small model")


def subject(options: ExplainOptions) -> Subject:
    """A trained model on validation text, as its own evaluation runs it at the end of training."""
    if not options.run:
        return small_subject()
    if options.tokens < 1:
        raise tg.UserError(f"--tokens {options.tokens}: give one row of text at least")
    cfg, named, path = tg.open_source(options.run, exact=True)
    if cfg.softcap:
        raise tg.UserError(
            f"--run {options.run}: its softcap = {cfg.softcap:g} does not let logits shift freely, "
            "which this is about; give a run without one"
        )
    plan, device = tg.Plan(cfg), torch.device("cpu")
    model = tg.build_model(cfg, device, torch.float32, plan.eval_seq_len)
    tg.load_weights(model, named, str(path))
    val, shape = tg.Validation(cfg, plan, None), plan.eval_shape(plan.at(cfg.steps, 1.0))
    hidden, targets = [], []
    for row in range(max(1, min(val.rows, options.tokens // val.seq_len))):
        # one by one: a run's batch may be a GPU's
        x, y = val.batch(range(row, row + 1), device, 1)
        with torch.no_grad():
            applied = shape.repeats, shape.window, shape.passes, shape.window_long
            hidden.append(model.hidden(x, *applied).flatten(0, 1).float())
        targets.append(y.flatten())
    return Subject(model, torch.cat(hidden), torch.cat(targets), str(path))


def main() -> int:
    return ending("error", lambda: explain(tyro.cli(ExplainOptions)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
