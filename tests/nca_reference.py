"""
The slow way to make cellular-automaton data: one rule at a time, as slowrun's pull request 63 goes
about it, written anew from a description of its code. `pre_pre_train.py` must equal it, and
`bench_nca.py` measures it against this.

Two things in one: with `sample=multinomial` and float32 it is the original's loop, timed; with
`sample=Numbered(...)` and float64 it is the oracle: convolutions, softmax, a choice by given
numbers, and none of pre_pre_train's shortcuts.
"""

import gzip

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rule(nn.Module):
    """One rule: 3x3 on the torus, 1x1, ReLU, 1x1."""

    def __init__(self, colors: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(colors, 4, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(4, 16, 1)
        self.conv3 = nn.Conv2d(16, colors, 1)
        self.requires_grad_(False)

    @staticmethod
    def from_seed(seed: int, colors: int = 10) -> "Rule":
        """Weights and biases N(0,1) of a generator with the rule's seed."""
        rule, rng = Rule(colors), torch.Generator().manual_seed(seed & 0xFFFFFFFF)
        for p in rule.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
        return rule

    @staticmethod
    def from_weights(weights, n: int) -> "Rule":
        """Rule n of pre_pre_train.Weights, in float64."""
        rule = Rule(weights.conv3.shape[1]).double()
        for conv, w, b in (
            (rule.conv1, weights.conv1, weights.bias1),
            (rule.conv2, weights.conv2, weights.bias2),
            (rule.conv3, weights.conv3, weights.bias3),
        ):
            conv.weight.copy_(torch.from_numpy(w[n]).view_as(conv.weight))
            conv.bias.copy_(torch.from_numpy(b[n]))
        return rule

    def forward(self, grid_BHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, d, H, W], and the one-hot grid."""
        onehot = (
            F.one_hot(grid_BHW, self.conv3.out_channels).movedim(-1, 1).to(self.conv1.weight.dtype)
        )
        return self.conv3(F.relu(self.conv2(self.conv1(onehot)))), onehot


def multinomial(p_BHWd: Tensor, step: int) -> Tensor:
    """The original's choice: torch.multinomial on the global generator."""
    return torch.multinomial(p_BHWd.flatten(0, 2), 1).view(p_BHWd.shape[:-1])


class Numbered:
    """Choices by u[step, B, H*W]: the first colour whose cumulative probability exceeds u."""

    def __init__(self, u: np.ndarray):
        self.u = torch.from_numpy(u)

    def __call__(self, p_BHWd: Tensor, step: int) -> Tensor:
        u = self.u[step].view(p_BHWd.shape[:-1])
        total = p_BHWd.cumsum(-1)
        return (total < (u * total[..., -1])[..., None]).sum(-1)


def step_grid(
    rule: Rule, grid_BHW: Tensor, temperature: float, identity: float, sample, step: int
) -> Tensor:
    logits, onehot = rule(grid_BHW)
    p = F.softmax((logits + identity * onehot) / max(temperature, 1e-8), dim=1)
    return sample(p.movedim(1, -1), step)


def record(
    rule: Rule,
    start_BHW: Tensor,
    times: range,
    temperature: float,
    identity: float = 0.0,
    sample=multinomial,
) -> Tensor:
    """Grids [B, len(times), H, W] after so many steps; 0 is the start."""
    grid, grids = start_BHW, []
    for step in range(times[-1] + 1):
        if step in times:
            grids.append(grid)
        if step < times[-1]:
            grid = step_grid(rule, grid, temperature, identity, sample, step)
    return torch.stack(grids, dim=1)


def to_tokens(grids: Tensor, patch: int = 2, colors: int = 10) -> Tensor:
    """Grids [B, n, H, W] -> tokens [B, n * (start, patches, end)]; first cells are least digits."""
    B, n, H, W = grids.shape
    patches = (
        grids.view(B, n, H // patch, patch, W // patch, patch)
        .permute(0, 1, 2, 4, 3, 5)
        .flatten(4)
        .flatten(2, 3)
    )
    tokens = (patches * colors ** torch.arange(patch * patch)).sum(-1)
    start, end = (torch.full((B, n, 1), colors ** (patch * patch) + i) for i in (0, 1))
    return torch.cat([start, tokens, end], dim=-1).flatten(1)


def generate_rows(
    seeds: list[int],
    epoch: int = 0,
    sims: int = 10,
    grids: int = 26,
    grid: int = 12,
    init_steps: int = 10,
    dt: int = 1,
    temperature: float = 1e-4,
) -> Tensor:
    """Rows of rule after rule: `sims` start grids each, one network call a step for all of them."""
    rows, first = [], init_steps + dt
    for i, seed in enumerate(seeds):
        rule = Rule.from_seed(seed)
        starts = []
        for sim in range(sims):
            rng = torch.Generator().manual_seed(epoch * 99991 + i * 997 + sim)
            starts.append(torch.randint(0, 10, (grid, grid), generator=rng))
        torch.manual_seed(seed * 10007 + epoch * 997)
        rows.append(
            to_tokens(
                record(rule, torch.stack(starts), range(first, first + grids * dt, dt), temperature)
            )
        )
    return torch.cat(rows)


def score(seed: int, grid: int = 12, temperature: float = 1e-4) -> float:
    """Compressed over raw size of a candidate's ten int32 grids behind the start grid of seed 0."""
    rule = Rule.from_seed(seed)
    start = torch.randint(0, 10, (1, grid, grid), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed * 10007)
    tokens = to_tokens(record(rule, start, range(1, 11), temperature))[0]
    data = tokens.numpy().astype(np.int32).tobytes()
    return len(gzip.compress(data, compresslevel=9)) / len(data)
