"""Plain functions that several test files share (fixtures are in conftest.py)."""

import itertools
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402

with lzma.open(ROOT / "data" / "sample.jsonl.xz") as lines:  # no more of it is unpacked
    TEXTS = [json.loads(line)["text"] for line in itertools.islice(lines, 60)]
# what SentencePiece trains on: it leaves lines of more than 4,192 bytes out
SENTENCES = [part[:2000] for one in TEXTS[:30] for part in one.splitlines() if part]
SENTENCES += ["a naïve café, über résumé: déjà vu"]  # letters of two bytes

# tiny operations: threads that wait for each other cost more than they bring
torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(**changes) -> tg.Config:
    """A model and a run small enough for a test; a few hundred kilobytes at most."""
    small = {
        "device": "cpu",
        "dtype": "float32",
        "compile": 0,
        "vocab": 96,
        "doc_token": 0,
        "head_multiple": 32,
        "depth": 2,
        "dim": 32,
        "heads": 2,
        "rope_base": 64.0,
        "seq_len": "32",
        "batch_tokens": "128",
        "micro_tokens": 128,
        "steps": 20,
        "tokenizer": "",
        "val_tokens": 0,
        "run": "test",
        "doc_mask": 0,
    }
    return tg.Config(**(small | changes))


class OneOf(tg.Ranks):
    """One rank of a world without the others: it hears nothing from them."""

    def sum_of(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def together(self, work):
        return work()


def alone(rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float32) -> OneOf:
    return OneOf(torch.device("cpu"), rank, world, dtype)


def build(cfg: tg.Config, seq_len: int = 0, dtype: torch.dtype = torch.float32) -> tg.GPT:
    return tg.build_model(cfg, torch.device("cpu"), dtype, seq_len or tg.Plan(cfg).max_seq_len)


def random_tokens(
    cfg: tg.Config, rows: int, seq_len: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [rows, seq_len] of i.i.d. tokens."""
    rng = torch.Generator().manual_seed(seed)
    both = torch.randint(cfg.vocab, (rows, seq_len + 1), generator=rng)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def parts(folder, device: str = "cpu", **changes) -> tg.Trainer:
    """All that train_step needs, on a shard of random tokens."""
    for path in (folder / "x_train_000000.bin", folder / "x_val_000000.bin"):
        if not path.exists():
            write_shard(path, np.random.default_rng(0).integers(0, 96, 16385))
    cfg = tiny(**({"data": str(folder), "epochs": 0, "export": ""} | changes))
    tg.validate(cfg)
    run = tg.Run(cfg)
    run.device = torch.device(device)
    run.join_group()
    return tg.build(cfg, run)


def now(**changes) -> tg.Now:
    """The schedules in the middle of training, where nothing is scaled."""
    plain = {
        "lr": 1.0,
        "momentum": 0.95,
        "weight_decay": 1.0,
        "qat": 0.0,
        "repeats": 1,
        "seq_len": 32,
        "window": 0,
        "batch_tokens": 128,
    }
    return tg.Now(**(plain | changes))


def write_shard(
    path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None
) -> Path:
    """A token shard, written from the format's description: 256 int32 of header, then uint16."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path
