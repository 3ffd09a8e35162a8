"""
Data: the same tokens for every number of ranks, damaged shards refused, bytes counted as they
decode.
"""

import functools
import inspect
import itertools
import os
import re
import shlex
import subprocess
import tomllib

import numpy as np
import pytest
import sentencepiece
import torch
from helpers import ROOT, alone, parts, tg, tiny, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import get

VOCAB = 60000


def config(folder, **changes) -> tg.Config:
    return tiny(**({"data": str(folder), "vocab": VOCAB, "steps": 3} | changes))


def loader(cfg: tg.Config, rank: int = 0, world: int = 1) -> tg.Loader:
    return tg.Loader(cfg, tg.Plan(cfg), alone(rank, world))


def shards(folder, *lengths: int, split: str = "train") -> list[np.ndarray]:
    """Shards of these lengths in which every token is its own position over all shards."""
    folder.mkdir(exist_ok=True)
    starts = np.cumsum([0, *lengths])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    for i, part in enumerate(parts):
        write_shard(folder / f"x_{split}_{i:06d}.bin", part)
    return parts


def rule(parts, batch: int, seq_len: int, rank: int, world: int, epochs: int = 1):
    """
    Spec 1.11 in plain Python: rank r takes tokens[pos + r*share : ... + share + 1]; pos += batch; a
    new shard when pos + batch + 1 >= its length. Cut into rows with targets shifted by one.
    """
    share = batch // world
    for tokens in parts * epochs:
        pos = 0
        while not pos + batch + 1 >= len(tokens):
            mine = [int(t) for t in tokens[pos + rank * share : pos + rank * share + share + 1]]
            yield [mine[i : i + seq_len + 1] for i in range(0, share, seq_len)]
            pos += batch


# --- in order


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("seq_len", [8, 16])
def test_batches_keep_the_rule_of_the_speedrun(tmp_path, world, seq_len):
    """Shards that end one token before, at, and behind a border, and one too short for a batch."""
    parts = shards(tmp_path, 3 * 128, 3 * 128 + 1, 3 * 128 + 2, 100, 1000)
    cfg = config(tmp_path, seq_len=str(seq_len), epochs=2)
    for rank in range(world):
        ours = loader(cfg, rank, world)
        count = 0
        for step, expected in enumerate(rule(parts, 128, seq_len, rank, world, epochs=2)):
            rows = ours.batch(step, 128, seq_len)
            assert rows.tolist() == expected and rows.shape == (
                128 // world // seq_len,
                seq_len + 1,
            )
            count += 1
        assert count == 2 * ours.per_epoch(128) == 2 * (2 + 2 + 3 + 0 + 7)


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_see_the_tokens_of_one_process(tmp_path, world, shuffle):
    shards(tmp_path, 700, 900)
    cfg = config(tmp_path, seq_len="16", shuffle=shuffle)
    alone, ranks = loader(cfg), [loader(cfg, r, world) for r in range(world)]
    for step in range(5):
        whole = alone.batch(step, 128, 16)
        parts = [r.batch(step, 128, 16) for r in ranks]
        assert np.array_equal(np.concatenate(parts), whole)
        assert all(r.state_dict() == alone.state_dict() for r in ranks)


def sparse_shard(path, count: int) -> None:
    """A shard of real size that takes no room on the disk."""
    write_shard(path, [], count=count)
    os.truncate(path, 1024 + 2 * count)


def test_shard_of_100m_tokens_gives_190_batches(tmp_path):
    """
    Spec 1.1: 190 batches of 524,288 a shard; remix A needs 24 shards and M 14. Found before the
    first step.
    """
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    sparse_shard(folder / "fineweb_train_000001.bin", 100_000_000)
    cfg = tg.parse_args(["--config", "remix_m", "--data", str(folder), "--steps", "190"])
    ours = loader(cfg)
    assert ours.per_epoch(524288) == 190
    # the real one would be read for its largest token
    ours.opened[0] = np.zeros(100_000_000, dtype=np.uint8)
    for step in range(190):
        assert ours.batch(step, 524288, 65536).shape == (8, 65537)
    with pytest.raises(tg.UserError, match="ran out of train shards at step 190: 1 found"):
        ours.batch(190, 524288, 65536)
    for preset, needed in (("remix_a", 24), ("remix_m", 14)):
        for i in range(2, needed):
            sparse_shard(folder / f"fineweb_train_{i:06d}.bin", 100_000_000)
        for i in range(needed, 30):
            (folder / f"fineweb_train_{i:06d}.bin").unlink(missing_ok=True)
        cfg = tg.parse_args(["--config", preset, "--data", str(folder)])
        with pytest.raises(
            tg.UserError,
            match=rf"too little.*found {needed - 1} .*fineweb10B --out .* --shards {needed}\b",
        ):
            loader(cfg)
        sparse_shard(folder / f"fineweb_train_{needed:06d}.bin", 100_000_000)
        loader(cfg)


def test_batch_size_that_grows_skips_and_repeats_no_token(tmp_path):
    parts = shards(tmp_path, 2000)
    ours = loader(config(tmp_path, seq_len="16", batch_tokens="0:64 0.5:128", micro_tokens=64))
    seen = [ours.batch(s, size, 16)[:, :-1].ravel() for s, size in enumerate((64, 64, 128, 128))]
    assert np.array_equal(np.concatenate(seen), parts[0][: 64 + 64 + 128 + 128])


# --- shuffled


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shuffled_epoch_is_a_permutation(tmp_path, world):
    """
    Every block of every shard once an epoch, in another order each time, the same for any number of
    ranks.
    """
    # 7, 0, 9 and 3 whole blocks with a target behind
    shards(tmp_path, 32 * 7 + 5, 20, 32 * 9 + 1, 32 * 4, 0)
    cfg = config(tmp_path, shuffle=1, epochs=0, seq_len="32", batch_tokens="128")
    ranks = [loader(cfg, r, world) for r in range(world)]
    starts = []
    for step in range(19):  # 19 batches of 4 blocks are 4 epochs of 19
        for r in ranks:
            rows = r.batch(step, 128, 32)
            assert np.array_equal(rows, rows[:, :1] + np.arange(33)), (
                "a row must be a stretch of one shard"
            )
            starts += rows[:, 0].tolist()
    bases = [(0, 7), (32 * 7 + 25, 9), (32 * 7 + 25 + 32 * 9 + 1, 3)]
    blocks = {base + 32 * i for base, n in bases for i in range(n)}
    epochs = [starts[i : i + 19] for i in range(0, 76, 19)]
    for e in epochs:
        assert set(e) == blocks and len(e) == 19
    assert len({tuple(e) for e in epochs}) == 4 and tuple(sorted(blocks)) not in {
        tuple(e) for e in epochs
    }
    assert starts == [int(b) for s in range(19) for b in whole_world(cfg)[s]]


def whole_world(cfg):
    ours = loader(cfg)
    return [ours.batch(s, 128, 32)[:, 0] for s in range(19)]


def test_seed_changes_the_order(tmp_path):
    shards(tmp_path, 2000)
    first = [
        loader(config(tmp_path, shuffle=1, seed=s)).batch(0, 128, 32).tolist() for s in (1, 2, 1)
    ]
    assert first[0] == first[2] != first[1]


def test_shorter_rows_hold_all_tokens_of_their_block(tmp_path):
    """
    While seq_len grows, a block is cut into rows: the same blocks in the same order, the same
    tokens.
    """
    shards(tmp_path, 2000)
    cfg = config(tmp_path, shuffle=1, seq_len="0:8 0.5:32", batch_tokens="128")
    short, long = loader(cfg), loader(cfg)
    for step in range(3):
        a, b = short.batch(step, 128, 8), long.batch(step, 128, 32)
        assert np.array_equal(a[:, :-1].ravel(), b[:, :-1].ravel()) and np.array_equal(
            a[:, 1:].ravel(), b[:, 1:].ravel()
        )
    with pytest.raises(tg.UserError, match="seq_len = 32 must .* 24"):
        loader(
            config(tmp_path, shuffle=1, seq_len="0:24 0.5:32", batch_tokens="384", micro_tokens=96)
        )


# --- resume


@pytest.mark.parametrize("shuffle", [0, 1])
def test_resumed_loader_gives_the_same_tokens(tmp_path, shuffle):
    shards(tmp_path, 500, 700, 300)
    cfg = config(
        tmp_path, shuffle=shuffle, epochs=0, seq_len="16", batch_tokens="64", micro_tokens=64
    )
    ours = loader(cfg)
    states, batches = [], []
    for step in range(60):  # over the ends of shards and of epochs
        states.append(tg.json.loads(tg.json.dumps(ours.state_dict())))
        batches.append(np.array(ours.batch(step, 64, 16)))
    assert len({tuple(s.items()) for s in states}) == 60 and states[-1]["epoch"] >= 2
    for start in (0, 1, 6, 7, 22, 23, 24, 45, 59):
        for world in (1, 2):
            again = [loader(cfg, r, world) for r in range(world)]
            for r in again:
                r.load_state_dict(states[start])
            for step in range(start, min(start + 4, 60)):
                assert np.array_equal(
                    np.concatenate([r.batch(step, 64, 16) for r in again]), batches[step]
                )


# --- too little


def test_missing_shards_are_found_before_training(tmp_path):
    with pytest.raises(tg.UserError, match=r"no train shards.*get.py tokenize"):
        loader(config(tmp_path))
    with pytest.raises(tg.UserError, match=r"no train shards.*get.py fineweb10B"):
        loader(config(tmp_path / "fineweb10B"))
    shards(tmp_path, 100)
    with pytest.raises(tg.UserError, match=r"100 tokens, less than one batch of 128"):
        loader(config(tmp_path))
    shards(tmp_path, 128 * 3 + 1)  # two batches by the rule: the third ends at the last token
    with pytest.raises(
        tg.UserError,
        match=r"too little data for 3 steps: they need 384.*found 1.*--steps.*--epochs",
    ):
        loader(config(tmp_path))
    loader(config(tmp_path, epochs=2))
    loader(config(tmp_path, epochs=0))
    loader(config(tmp_path, steps=2))
    loader(config(tmp_path, max_seconds=10.0))  # nobody knows how many steps that is
    shards(tmp_path, 128 * 3 + 2)
    loader(config(tmp_path))


@pytest.mark.parametrize(
    "lengths, changes, words",
    [
        ((100, 27), {}, "hold 127 tokens, less than one batch of 128"),
        (
            (100, 90),
            {},
            "hold 190 .*but none holds a batch of 128: .* has room for 98; .*--shuffle 1",
        ),
        ((129,), {}, "hold 129 tokens, but none holds a batch of 128: .* has room for 127"),
        (
            (30, 30, 30, 30, 30),
            {"shuffle": 1},
            "hold 150 .*which make 0 rows of 32 .*a batch of 128",
        ),
        ((65, 66), {"shuffle": 2}, "hold 131 .*3 rows of 32 and its last target, too few for"),
        (
            (500,),
            {"train_tokens": 100},
            r"within train_tokens = 100, less .*of 128 .*or raise --train_tokens \(0: all\)$",
        ),
        ((500,), {"train_tokens": 129}, "hold 129 tokens within train_tokens = 129, but none"),
        (
            (500,),
            {"train_tokens": 300},
            "of train_tokens = 300 256 are usable in each of epochs = 1; raise --train_tokens",
        ),
        (
            (500,),
            {"train_tokens": 300, "bos_rows": 1, "doc_mask": 1},
            "no train shard in .* within train_tokens = 300 has documents",
        ),
    ],
)
def test_what_is_said_of_too_little_data_is_true(tmp_path, lengths, changes, words):
    shards(tmp_path, *lengths)
    with pytest.raises(tg.UserError, match=words) as refused:
        loader(config(tmp_path, **changes))
    # more shards help no run that may not read them
    assert "train_tokens" not in changes or "run: " not in str(refused.value)


@pytest.mark.parametrize("seed", range(12))
def test_growing_batches_are_counted_shard_by_shard(tmp_path, seed):
    """check_enough accepts exactly those runs that a plain walk over the shards can serve."""
    rng = np.random.default_rng(seed)
    parts = shards(tmp_path, *rng.integers(200, 700, 3))
    epochs, sizes = int(rng.integers(1, 3)), [int(32 * n) for n in rng.integers(1, 6, 3)]
    batch = f"0:{sizes[0]} 1/3:{sizes[1]} 0.7:{sizes[2]}"

    def possible(steps: int) -> int:
        shard, pos, queue = None, 0, list(parts * epochs)
        for step in range(steps):
            size = sizes[(3 * step >= steps) + (step / steps >= 0.7)]
            while shard is None or pos + size + 1 >= len(shard):
                if not queue:
                    return step
                shard, pos = queue.pop(0), 0
            pos += size
        return steps

    refused = {}
    for steps in range(3, 130, 2):
        cfg = config(tmp_path, epochs=epochs, batch_tokens=batch, micro_tokens=32, steps=steps)
        try:
            ours = loader(cfg)
        except tg.UserError as e:
            refused[steps] = True
            assert possible(steps) < steps and f"too little data for {steps} steps" in str(e)
            continue
        refused[steps] = False
        plan = tg.Plan(cfg)
        for step in range(steps):
            ours.batch(step, plan.at(step, step / steps).batch_tokens, 32)
        assert possible(steps) == steps
    assert set(refused.values()) == {True, False}


@pytest.mark.parametrize("shuffle", [0, 1, 2])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_end_is_known_before_the_batch_and_leaves_the_position(tmp_path, shuffle, epochs):
    shards(tmp_path, 700, 60, 431)
    ours = loader(config(tmp_path, shuffle=shuffle, epochs=epochs, max_seconds=1.0))
    step = 0
    while not ours.ended(128):
        ours.batch(step, 128, 32)
        step += 1
    rows = {0: (5 + 3) * 4, 1: 21 + 1 + 13, 2: 1191 // 33}[shuffle]  # four are a batch
    assert step == rows * epochs // 4
    before = ours.state_dict()
    for _ in range(2):
        with pytest.raises(tg.UserError, match=f"ran out of train shards at step {step}"):
            ours.batch(step, 128, 32)
        assert ours.state_dict() == before


def test_a_run_that_came_to_the_end_goes_on_in_a_shard_that_is_added(tmp_path):
    parts = shards(tmp_path, 400, 300)
    cfg = config(tmp_path, max_seconds=1.0)
    ours = loader(cfg)
    while not ours.ended(128):
        ours.batch(0, 128, 32)
    shards(tmp_path, 400, 300, 200)
    again = loader(cfg)
    again.load_state_dict(ours.state_dict())
    assert again.batch(0, 128, 32)[0, 0] == 700 == sum(map(len, parts))


def test_shuffled_shards_are_all_read_before_the_first_step(tmp_path):
    shards(tmp_path, 300, 300)
    write_shard(tmp_path / "x_train_000001.bin", [*range(300, 500), 59999])
    cfg = config(tmp_path, vocab=59999)
    loader(cfg).open_shards()
    for shuffle in (1, 2):
        with pytest.raises(tg.UserError, match="x_train_000001.bin: token 59999 at position 200"):
            loader(tg.dataclasses.replace(cfg, shuffle=shuffle)).open_shards()


def test_a_document_across_shards_is_one_document(tmp_path):
    """However the stream is cut into shards, epochs hold the same documents in the same order."""
    rng = np.random.default_rng(0)
    documents = [[0, *rng.integers(1, 60000, n)] for n in (5, 40, 1, 90, 17, 0, 33, 8, 60, 21)]
    for first in (True, False):
        flat = np.concatenate(documents)[0 if first else 1 :]
        streams = []
        for cuts in ([], [100], [3, 4, 60, 61, 130], [0, 46, 46, 47], [len(flat) - 1]):
            folder = tmp_path / f"{first}-{len(streams)}"
            folder.mkdir()
            for i, part in enumerate(np.split(flat, cuts)):
                write_shard(folder / f"x_train_{i:06d}.bin", part)
            ours = loader(config(folder, shuffle=2, doc_token=0, epochs=0))
            epochs = []
            for ours.epoch in range(4):
                ours.shuffle_documents()
                epochs.append(ours.stretch(ours.stream, 0, len(flat)).tolist())
            streams.append(epochs)
        assert all(s == streams[0] for s in streams[1:])
        assert streams[0][0] == flat.tolist() and len({tuple(e) for e in streams[0]}) == 4
        for epoch in streams[0] if first else []:
            starts = [i for i, token in enumerate(epoch) if token == 0]
            found = [epoch[a:b] for a, b in itertools.pairwise([*starts, len(epoch)])]
            assert sorted(found) == sorted([int(t) for t in d] for d in documents)


@pytest.mark.parametrize("shuffle, steps", [(0, 2), (1, 3)])
def test_end_of_data_is_explained(tmp_path, shuffle, steps):
    shards(tmp_path, 128 * 3 + 1)
    ours = loader(config(tmp_path, shuffle=shuffle, max_seconds=1.0))
    for step in range(steps):
        ours.batch(step, 128, 32)
    with pytest.raises(
        tg.UserError,
        match=rf"ran out of train shards at step {steps}: 1 found in .*; run: .*--epochs \(now 1\)",
    ):
        ours.batch(steps, 128, 32)


@given(
    st.lists(st.integers(0, 700), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from([32, 64]),
    st.integers(1, 30),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_run_is_accepted_exactly_if_it_has_enough_tokens(
    tmp_path_factory, lengths, epochs, batch, steps, shuffle
):
    """
    What check_enough lets pass can be drawn to the last step; what it refuses for its length cannot
    (in order).
    """
    folder = tmp_path_factory.mktemp("d")
    parts = shards(folder, *lengths)
    cfg = config(
        folder,
        epochs=epochs,
        batch_tokens=str(batch),
        micro_tokens=batch,
        seq_len="16",
        steps=steps,
        shuffle=int(shuffle),
    )
    possible = sum(1 for _ in rule(parts, batch, 16, 0, 1, epochs))
    try:
        ours = loader(cfg)
    except tg.UserError:
        assert shuffle or steps > possible
        return
    rows = [ours.batch(s, batch, 16) for s in range(steps)]
    assert shuffle or steps <= possible
    assert all(r.shape == (batch // 16, 17) for r in rows)


# --- shards


@given(st.lists(st.integers(0, 65535), max_size=300))
@settings(max_examples=50)
def test_shard_comes_back_as_written(tmp_path_factory, tokens):
    path = write_shard(tmp_path_factory.mktemp("s") / "a.bin", tokens)
    assert tg.shard_tokens(path) == len(tokens)
    assert tg.read_shard(path).tolist() == tokens
    assert tg.read_shard(path, 65536).tolist() == tokens


@given(st.lists(st.integers(0, 65535), max_size=50), st.data())
@settings(max_examples=150)
def test_damaged_shard_is_refused(tmp_path_factory, tokens, data):
    """
    Any other length of file, any other value of the three numbers of the header, is a UserError
    that names it.
    """
    path = write_shard(tmp_path_factory.mktemp("s") / "a.bin", tokens)
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["length", "header"]))
    if kind == "length":
        size = data.draw(st.integers(0, len(whole) + 5).filter(lambda n: n != len(whole)))
        path.write_bytes(whole[:size] + b"\0" * max(0, size - len(whole)))
    else:
        header = np.frombuffer(whole[:1024], dtype="<i4").copy()
        where = data.draw(st.integers(0, 2))
        header[where] = data.draw(
            st.integers(-(2**31), 2**31 - 1).filter(lambda n: n != header[where])
        )
        path.write_bytes(header.tobytes() + whole[1024:])
    for read in (tg.shard_tokens, tg.read_shard):
        with pytest.raises(tg.UserError, match="a.bin"):
            read(path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"magic": 20240521}, ("magic number is 20240521 instead of 20240520", "tokenize")),
        ({"version": 2}, ("version 2", "version 1")),
        ({"count": 11}, ("promises 11 tokens", "1046 bytes", "has 1044", "data/get.py")),
    ],
)
def test_message_about_a_shard_names_its_numbers(tmp_path, change, words):
    path = write_shard(tmp_path / "a.bin", range(10), **change)
    with pytest.raises(tg.UserError) as e:
        tg.read_shard(path)
    for word in words:
        assert word in str(e.value)


def test_token_over_the_vocabulary_is_refused(tmp_path):
    tokens = np.arange(1000) % 90
    tokens[777] = 96
    write_shard(tmp_path / "x_train_000000.bin", tokens)
    ours = loader(config(tmp_path, vocab=96))
    words = r"x_train_000000.bin: token 96 at position 777 .* vocab = 96; .*--vocab"
    with pytest.raises(tg.UserError, match=words):
        ours.batch(0, 128, 32)
    write_shard(tmp_path / "x_val_000000.bin", tokens)
    with pytest.raises(tg.UserError, match=r"x_val_000000.bin: token 96 at position 777"):
        tg.Validation(config(tmp_path, vocab=96), tg.Plan(config(tmp_path)), None)
    assert loader(config(tmp_path, vocab=97)).batch(0, 128, 32).shape == (4, 33)


def test_targets_are_the_next_tokens(tmp_path):
    shards(tmp_path, 1000)
    x, y = tg.tensors(loader(config(tmp_path)).batch(0, 128, 32), torch.device("cpu"))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (4, 32)
    assert torch.equal(y, x + 1) and x[1, 0] == 32


@pytest.mark.parametrize(
    "name, side",
    [
        ("x_train_000001.bin", "train"),
        ("x_val_000000.bin", "val"),
        ("pre_train_x_val_000000.bin", "val"),
        ("a_val_b_train_000012.bin", "train"),
        ("x_train_000001 (1).bin", ""),
        ("x_train_1.bin", ""),
        ("x_train_.bin", ""),
        ("x_train_0000001.bin", ""),
        ("_train_000001.bin", ""),
        ("x_train_000001.bin.part", ""),
        ("x_train_00000\u0661.bin", ""),
    ],
)
def test_one_rule_says_what_is_a_shard(tmp_path, name, side):
    write_shard(tmp_path / name, range(9))
    for split in ("train", "val"):
        found = [os.path.basename(path) for path in tg.shard_files(str(tmp_path), split)]
        assert found == [name] * (split == side)
        if split != side and (".part" not in name and f"{split}" in name):
            words = rf"no {split} shards.*_NNNNNN.bin .*{re.escape(name)} does not"
            with pytest.raises(tg.UserError, match=words):
                tg.find_shards(config(tmp_path), split)


def test_shards_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "x_train_000000.bin").mkdir()
    (tmp_path / "x_val_000000.bin").symlink_to(tmp_path / "nowhere")
    reasons = {"x_train_000000.bin": "Is a directory", "x_val_000000.bin": "No such file"}
    for name, why in reasons.items():
        for read in (tg.shard_tokens, tg.read_shard, tg.shard_mark):
            with pytest.raises(tg.UserError, match=rf"{name} cannot be read \({why}"):
                read(tmp_path / name)
    with pytest.raises(tg.UserError, match="x_train_000000.bin cannot be read"):
        tg.data_fingerprint(config(tmp_path))
    with pytest.raises(tg.UserError, match="no train shards"):
        tg.find_shards(config(tmp_path / "x_train_000000.bin"), "train")


# --- validation


def test_validation_scores_the_tokens_of_its_prefix(tmp_path):
    """
    The first val_tokens over all shards, cut into rows; the last batch is filled up with targets of
    -1.
    """
    parts = np.concatenate(shards(tmp_path, 100, 50, 300, split="val"))
    cfg = config(tmp_path, seq_len="32", val_tokens=230)
    val = tg.Validation(cfg, tg.Plan(cfg), None)
    assert (val.rows, val.seq_len, val.bytes) == (7, 32, 0)
    assert np.array_equal(val.tokens, parts[: 7 * 32 + 1])
    seen = []
    for low in (0, 4, 8):
        x, y = val.batch(range(low, low + 4), torch.device("cpu"), 4)
        assert x.shape == (4, 32) and torch.equal(y[y >= 0], x[y >= 0] + 1)
        seen += y[y >= 0].tolist()
    assert seen == parts[1 : 7 * 32 + 1].tolist()
    everything = config(tmp_path, val_tokens=0)
    assert tg.Validation(everything, tg.Plan(everything), None).rows == 449 // 32
    assert tg.Validation(config(tmp_path, val_tokens=449), tg.Plan(cfg), None).rows == 449 // 32
    for tokens, words in (
        (450, "val_tokens = 450, .* hold 450"),
        (10**9, "val_tokens = 1000000000"),
        (31, "val_tokens = 31: less than one row of 32; raise --val_tokens"),
    ):
        with pytest.raises(tg.UserError, match=words):
            tg.Validation(config(tmp_path, val_tokens=tokens), tg.Plan(cfg), None)
    long = config(tmp_path, seq_len="512")
    with pytest.raises(tg.UserError, match="less than one row of 512"):
        tg.Validation(long, tg.Plan(long), None)
    with pytest.raises(tg.UserError, match="no val shards"):
        tg.Validation(config(tmp_path / "none"), tg.Plan(cfg), None)


@pytest.mark.parametrize("world, rows", [(1, 1), (1, 3), (1, 64), (2, 3), (4, 2)])
def test_validation_loss_is_the_same_for_all_batches_and_ranks(tmp_path, world, rows):
    """evaluate() over any layout is the mean over the rows by themselves."""
    from helpers import alone, build

    shards(tmp_path, 32 * 11 + 9, split="val")
    cfg = config(tmp_path, vocab=400, head_init="0.3")
    val, model = tg.Validation(cfg, tg.Plan(cfg), None), build(cfg)
    by_row = [
        model(
            *(
                torch.tensor(val.tokens[i * 32 + s : i * 32 + s + 32].astype(int))[None]
                for s in (0, 1)
            )
        )
        for i in range(11)
    ]
    total = 0.0
    for rank in range(world):
        run = alone(rank, world)
        run.device, run.poll = torch.device("cpu"), lambda: None
        total += tg.evaluate(run, model, val, tg.Shape(rows, 32, 1, 0))
    assert total == pytest.approx(torch.cat(by_row).double().mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    "changes, shared",
    [
        ({}, True),
        ({"mtp": 0.3}, True),
        ({"loop": "0:2", "repeats": "2"}, True),
        ({"eval_seq_len": 16}, False),
        ({"attn_dropout": 0.1}, False),
        ({"auto_micro": 1, "micro_tokens": 96}, False),  # training takes rows by two then
    ],
)
def test_evaluation_has_the_blocks_graphs_of_training_where_they_do_the_same(
    tmp_path, monkeypatch, changes, shared
):
    """
    compile = 1: behind a training step an evaluation compiles nothing, and gives what the same
    weights give uncompiled; where training drops something, or has other rows, both differ.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    p = parts(tmp_path, compile=1, val_tokens=512, head_init="0.3", **changes)
    now = p.plan.at(0, 0.0)
    tg.train_step(p, 0, now)
    shape, before = p.plan.eval_shape(now), tg.graphs_compiled()
    losses = [tg.evaluate(p.run, p.graph, p.val, shape)]
    losses.append(float(tg.token_losses(p.run, p.graph, p.val, shape).double().mean()))
    assert shape.as_trained == shared == (tg.graphs_compiled() == before)
    torch.compiler.set_stance("force_eager")
    try:
        losses.append(tg.evaluate(p.run, p.model, p.val, shape._replace(as_trained=False)))
    finally:
        torch.compiler.set_stance("default")
    assert losses == pytest.approx([losses[-1]] * 3, abs=1e-6) and losses[0] > 1


COMMANDS = {
    "data/fineweb10B": "fineweb10B --shards 8",
    "/mnt/big disk/fineweb10B": "fineweb10B --out '/mnt/big disk/fineweb10B' --shards 8",
    "data/golf_sp1024": "golf --variant sp1024 --shards 8",
    "elsewhere/golf_sp1024": "golf --variant sp1024 --out elsewhere/golf_sp1024 --shards 8",
    "data/sample": "sample",
    "x/sample": "sample --out x/sample",
    "data/sample512": "sample --vocab 512 --out data/sample512",
    "data/slowrun": "slowrun",
    "data/mine": "tokenize YOUR_TEXT --out data/mine",
}


@pytest.mark.parametrize("data", COMMANDS)
def test_the_command_that_gets_data_is_one_that_get_py_takes(data):
    said = tg.get_command(tiny(data=data), 8)
    assert said == f"python data/get.py {COMMANDS[data]}"
    verb, *words = shlex.split(said)[2:]
    taken = inspect.signature(getattr(get, verb)).parameters
    assert {word[2:] for word in words if word.startswith("--")} <= taken.keys()


def test_ranks_whose_rows_are_others_are_evaluated_in_graphs_of_their_own():
    one, two = (tg.Plan(tiny(compile=1), world) for world in (1, 2))
    assert one.eval_shape(one.at(0, 0.0)).as_trained
    assert not two.eval_shape(two.at(0, 0.0)).as_trained


def test_bits_per_byte_is_nats_over_ln2_times_tokens_per_byte():
    assert tg.bits_per_byte(np.log(2), 100, 400) == pytest.approx(0.25)
    assert tg.bits_per_byte(3.28, 10, 45) == pytest.approx(3.28 * 1.4426950408889634 * 10 / 45)
    assert tg.bits_per_byte(3.28, 10, 0) is None


def test_data_sets_have_fingerprints_of_their_own(tmp_path):
    for name, tokens in (("a", 500), ("b", 501)):
        shards(tmp_path / name, tokens)
        shards(tmp_path / name, 100, split="val")
    a, b = (tg.data_fingerprint(config(tmp_path / n)) for n in "ab")
    write_shard(tmp_path / "b" / "x_train_000000.bin", [*range(499), 7])
    c = tg.data_fingerprint(config(tmp_path / "b"))
    write_shard(tmp_path / "b" / "x_train_000000.bin", range(500))
    assert len({a, b, c}) == 3 and tg.data_fingerprint(config(tmp_path / "b")) == a


def test_fingerprint_is_that_of_every_byte_and_can_be_had_from_sha256sum(tmp_path):
    shards(tmp_path, 3_000_000, 70)
    shards(tmp_path, 100, split="val")
    first = tg.data_fingerprint(config(tmp_path))
    command = "sha256sum x_train_000000.bin x_train_000001.bin x_val_000000.bin | sha256sum"
    said = subprocess.check_output(["sh", "-c", command], cwd=tmp_path, text=True)
    assert said.split()[0] == first
    tokens = np.array(tg.read_shard(tmp_path / "x_train_000000.bin"))
    for at in (0, 700_001, 1_555_555, 2_999_999):
        changed = tokens.copy()
        changed[at] ^= 1
        write_shard(tmp_path / "x_train_000000.bin", changed)
        assert tg.data_fingerprint(config(tmp_path)) != first


def save_position(folder, changes=None, batches=2, epoch=0):
    """Identity and position of a loader, as they come out of a checkpoint's JSON."""
    cfg = config(folder, epochs=0, **(changes or {}))
    ours = loader(cfg)
    for step in range(batches):
        ours.batch(step, 128, 32)
    state = ours.state_dict() | ({"epoch": epoch} if epoch else {})
    return cfg, *tg.json.loads(tg.json.dumps([ours.identity(), state]))


CHANGES = {
    "x_train_000000.bin has 1624 bytes instead of 2024": lambda d: write_shard(
        d / "x_train_000000.bin", range(300)
    ),
    "x_train_000000.bin has other content": lambda d: write_shard(
        d / "x_train_000000.bin", range(1, 501)
    ),
    "x_train_000001.bin has other content": lambda d: write_shard(
        d / "x_train_000001.bin", range(1, 701)
    ),
    "x_train_000001.bin is gone": lambda d: (d / "x_train_000001.bin").unlink(),
    "x_train_000002.bin is new": lambda d: write_shard(d / "x_train_000002.bin", range(200)),
    "a_train_000002.bin is new": lambda d: write_shard(d / "a_train_000002.bin", range(200)),
    "x_val_000000.bin has other content": lambda d: write_shard(
        d / "x_val_000000.bin", range(1, 101)
    ),
    "x_val_000001.bin is new": lambda d: write_shard(d / "x_val_000001.bin", range(100)),
}


@pytest.mark.parametrize("said", CHANGES)
@pytest.mark.parametrize(
    "how", ["in order", "in order, second shard", "in order, second epoch", "rows", "documents"]
)
def test_other_data_is_refused_on_resume_by_name(tmp_path, said, how):
    """In order, what lies behind the position may still change: it was not read, nor counted."""
    shards(tmp_path, 500, 700)
    shards(tmp_path, 100, split="val")
    changes = {"shuffle": ["rows", "documents"].index(how) + 1} if "order" not in how else {}
    cfg, saved, position = save_position(
        tmp_path, changes, batches=2 + 3 * ("second shard" in how), epoch=int("second epoch" in how)
    )
    assert loader(cfg).accept(saved, position) == ""
    CHANGES[said](tmp_path)
    unread = (
        {"x_train_000002.bin is new"}
        if how == "in order, second shard"
        else {
            "x_train_000001.bin has other content",
            "x_train_000001.bin is gone",
            "x_train_000002.bin is new",
        }
    )
    if how.startswith("in order") and "epoch" not in how and said in unread:
        assert said in loader(cfg).accept(saved, position)
    else:
        with pytest.raises(tg.UserError, match=f"not what this run was trained on: {said}; "):
            loader(cfg).accept(saved, position)


def test_other_tokenizer_or_teacher_under_the_same_name_is_refused_on_resume(tmp_path):
    shards(tmp_path, 500)
    shards(tmp_path, 100, split="val")
    files = {name: tmp_path / f"{name}.x" for name in ("tokenizer", "teacher")}
    for path in files.values():
        path.write_bytes(b"old")
    named = {name: str(path) for name, path in files.items()}
    cfg, saved, position = save_position(tmp_path, named | {"distill": 0.5})
    assert loader(cfg).accept(saved, position) == ""
    for name, path in files.items():
        path.write_bytes(b"new")
        with pytest.raises(tg.UserError, match=f"{name} = '{re.escape(str(path))}' has other"):
            loader(cfg).accept(saved, position)
        path.write_bytes(b"old")
    del saved["beside"]  # of an older checkpoint
    files["teacher"].write_bytes(b"new")
    assert loader(cfg).accept(saved, position) == ""


def test_mark_of_a_shard_sees_an_exchange_without_reading_it_whole(tmp_path):
    """A header, the end, an eighth of the tokens: each changes the mark of 200 MB."""
    path = tmp_path / "x_train_000001.bin"
    sparse_shard(path, 100_000_000)
    size, first = tg.shard_mark(path)
    marks = {first}
    with open(path, "r+b") as f:
        for at, count in ((100, 1), (size - 1, 1), (size // 6, size // 8)):
            f.seek(at)
            f.write(b"\1" * count)
            f.flush()
            marks.add(tg.shard_mark(path)[1])
    assert size == 200_001_024 and len(marks) == 4


# --- bytes


WORDS = (
    "the people of this union shall form a more perfect government under laws made by free "
    "states since 1789".split()
)
TEXTS = [
    "The state of the Union is strong.",
    "Zahl 1234567890, naïve café — “quoted” 'single'",
    "line one\nline two\n\n\tindented",
    "日本語 and русский and ελληνικά",
    "emoji 🚀🧪 and 👩‍👩‍👧",
    "a",
    " leading and  double   spaces ",
    "x=1;y=2 #%&*",
    "",
    "\u00a0nbsp ﬁ ligature ½ ² ™",
    "e\u0301 combining",
    "\x00\x01 control",
    "▁ underscore ▁▁",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]


def train_sp(path, **changes):
    """
    A small SentencePiece with parameter-golf's arguments (byte fallback, digits by themselves).
    """
    rng = np.random.default_rng(0)
    text = [" ".join(rng.choice(WORDS, 12)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=0.999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **changes,
    )
    return str(path) + ".model"


@pytest.fixture(scope="module")
def sp_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sp")
    return {
        "golf": train_sp(folder / "golf", add_dummy_prefix=False),
        # every document begins with a space that decoding drops
        "default": train_sp(folder / "default"),
        "spaces": train_sp(
            folder / "spaces",
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            user_defined_symbols=["▁▁▁▁", "\n"],
        ),
    }


def stream(documents: list[list[int]], separator: int) -> np.ndarray:
    return np.array([t for d in documents for t in (separator, *d)])


@pytest.mark.parametrize("model", ["golf", "default"])
def test_bytes_of_sentencepiece_are_those_of_the_decoded_text(sp_models, model):
    """
    parameter-golf 1.3: a leading space counts, but not at the start of a document, where decoding
    drops it.
    """
    tok = tg.Tokenizer(sp_models[model], 512, 1)
    documents = [tok.encode(t) for t in TEXTS]
    assert any(tok.sp.is_byte(i) for d in documents for i in d), "byte fallback must be met"
    for ids in documents:
        assert tok.count_bytes(stream([ids], 1)) == len(tok.decode(ids).encode()), tok.decode(ids)
    assert (
        tok.count_bytes(stream(documents, 1))
        == sum(len(tok.decode(d).encode()) for d in documents)
        > 300
    )
    assert tok.decode(stream(documents[:2], 1)).replace(" ", "") == (TEXTS[0] + TEXTS[1]).replace(
        " ", ""
    )


def test_bytes_of_runs_of_spaces_and_own_symbols_are_counted(sp_models):
    """A model that keeps white space decodes to the text itself."""
    tok = tg.Tokenizer(sp_models["spaces"], 512, 1)
    for text in ("a\n    b\n        c", "the people  of   this", "one\n\ntwo 1789"):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.count_bytes(stream([ids], 1)) == len(text.encode()), text


@given(
    st.sampled_from(["golf", "default"]),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40)),
)
@settings(max_examples=150)
def test_any_text_has_the_bytes_that_are_counted(sp_models, model, texts):
    tok = tg.Tokenizer(sp_models[model], 512, 1)
    documents = [tok.encode(t) for t in texts]
    assert tok.count_bytes(stream([*documents, []], 1)) == sum(
        len(tok.decode(d).encode()) for d in documents
    )


def test_bytes_of_gpt2_are_those_of_the_text(gpt2_files):
    tok = tg.Tokenizer("gpt2", 50257, 50256)
    documents = [tok.encode(t) for t in TEXTS]
    for text, ids in zip(TEXTS, documents):
        assert tok.decode(ids) == text
        assert tok.count_bytes(stream([ids], 50256)) == len(text.encode())
    assert tok.count_bytes(stream(documents, 50256)) == sum(len(t.encode()) for t in TEXTS)
    assert (
        tok.encode("<|endoftext|>")[0] != 50256
        and tok.decode(stream(documents[:2], 50256)) == TEXTS[0] + TEXTS[1]
    )
    base, _, _ = tok.tables()
    assert base[50256] == 0 and base.sum() > 300000


def test_tokenizer_that_is_none_is_refused(tmp_path, monkeypatch):
    with pytest.raises(tg.UserError, match="no such file.*get.py sample"):
        tg.Tokenizer(str(tmp_path / "x.model"), 100, 0)
    for content in (b"", b"no model", b"\x0a\xff\xff"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(tg.UserError, match="no SentencePiece model"):
            tg.Tokenizer(str(tmp_path / "bad.model"), 100, 0)


def test_validation_counts_its_bytes(tmp_path, sp_models):
    tok = tg.Tokenizer(sp_models["golf"], 512, 1)
    documents = [tok.encode(" ".join(WORDS) * 3), tok.encode("Zahl 1234567890, naïve café")]
    tokens = stream(documents, 1)
    write_shard(tmp_path / "x_val_000000.bin", tokens)
    cfg = config(tmp_path, vocab=512, seq_len="8", val_tokens=0)
    val = tg.Validation(cfg, tg.Plan(cfg), tok)
    kept = tokens[: val.rows * 8 + 1]
    border = list(kept).index(1, 1)
    expected = len(tok.sp.decode(kept[1:border].tolist()).encode()) + len(
        tok.sp.decode(kept[border + 1 :].tolist()).encode()
    )
    assert val.bytes == expected


def test_a_model_without_a_piece_for_a_space_is_refused(sp_models, tmp_path):
    """Its spaces become three bytes each, which decode to U+2581 and would count as three."""
    raw = open(sp_models["golf"], "rb").read()
    space, other = (b"\x0a\x03" + sign.encode() + b"\x15" for sign in ("\u2581", "\uf8ff"))
    assert raw.count(space) == 1  # field 1 of a piece: its three bytes, then the score
    (tmp_path / "bare.model").write_bytes(raw.replace(space, other))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bare.model"))
    ids = model.encode("7 \u2713")
    assert len(ids) > 6, "the space is bytes"
    with pytest.raises(tg.UserError, match="bare.model' has no piece for a space by itself"):
        tg.Tokenizer(str(tmp_path / "bare.model"), 512, 1)
    for model in sp_models.values():
        tg.Tokenizer(model, 512, 1)


def test_a_single_row_beyond_the_text_is_ignored_and_its_inputs_are_tokens(tmp_path):
    """One row a batch: of inputs and targets that are views of each other, -1 would be an input."""
    trainer = parts(tmp_path, micro_tokens=32, val_tokens=96)
    x, y = trainer.val.batch(range(3, 4), torch.device("cpu"), 1)
    assert bool((y == -1).all()) and bool((x >= 0).all())
    whole = trainer.val.batch(range(2, 3), torch.device("cpu"), 1)
    assert torch.equal(x, whole[0]) and bool((whole[1] >= 0).all())


def test_every_preset_of_the_shipped_text_begins(tmp_path):
    """
    As much text as is shipped is enough, and its rows divide its batches: a preset's golden run is
    of another size and says neither.
    """
    write_shard(tmp_path / "x_train_000001.bin", np.zeros(4_026_360, dtype=np.uint16))
    write_shard(tmp_path / "x_val_000000.bin", np.zeros(223_044, dtype=np.uint16))
    begun = set()
    for path in sorted((ROOT / "configs").glob("*.toml")):
        if tomllib.loads(path.read_text("utf-8")).get("data") != "data/sample":
            continue
        names = ["remix_m"] * (path.stem == "on_cpu") + [path.stem]
        cfg = tg.parse_args(["--config", *names, "--data", str(tmp_path)])
        now, plan = tg.Plan(cfg).at(0, 0.0), tg.Plan(cfg)
        rows = loader(cfg).batch(0, now.batch_tokens, now.seq_len)
        assert len(rows) * now.seq_len == now.batch_tokens and plan.train_shapes(1)
        assert tg.Validation(cfg, plan, None).rows > 0
        begun.add(path.stem)
    assert {"tiny_cpu", "golf_cpu", "speedrun_cpu", "on_cpu"} <= begun
