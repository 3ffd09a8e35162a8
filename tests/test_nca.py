"""
pre_pre_train.py: cellular-automaton data. The simulator against a slow oracle, the same data on any
ranks, threads and batches, the filter and its limits, tokens and labels by hand, the cache, and
messages for what cannot work.

Numbers without a source beside them are of the two upstream codes, as measured there.
"""

import functools
import gzip
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import nca_reference as reference
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pre_pre_train as nca  # noqa: E402
import train_gpt as tg  # noqa: E402
from train_gpt import UserError  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operations: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**values) -> nca.PrePreConfig:
    return nca.make_config(
        **{"nca_cache": "", "nca_tokens": 60 * 988, "nca_val_tokens": 20 * 988} | values
    )


def silent(message: str) -> None:
    pass


def data(split="train", **values) -> nca.NcaData:
    return nca.NcaData(config(**values), split, say=silent)


# --- tokens and labels


def test_a_patch_is_a_number_with_its_first_cell_as_least_digit():
    cfg = config(nca_grid=4, nca_seq_len=64)
    grid = np.array([[1, 2, 9, 9], [3, 4, 9, 9], [0, 0, 5, 0], [0, 0, 0, 0]], np.uint8)
    tokens = nca.tokenize(grid.reshape(1, 1, 16), cfg)
    assert tokens.tolist() == [[10000, 4321, 9999, 0, 5, 10001]]
    assert nca.tokenize(grid.reshape(1, 1, 16), cfg, delimiters=False).tolist() == [
        [4321, 9999, 0, 5]
    ]
    assert nca.digits(tokens, cfg)[0, 1].tolist() == [1, 2, 3, 4]
    assert (nca.digits(tokens, cfg)[0, [0, 5]] == 255).all()


def test_grids_and_rows_have_the_widths_of_the_originals():
    pr63, paper = config(), config(nca_compat="paper")
    assert nca.vocabulary(pr63) == 10002 and nca.grid_tokens(pr63) == 38
    assert (nca.grids_per_row(pr63), nca.row_width(pr63), nca.row_inputs(pr63)) == (26, 988, 988)
    assert (nca.grids_per_row(paper), nca.row_width(paper), nca.row_inputs(paper)) == (
        27,
        1025,
        1024,
    )
    zeros = nca.tokenize(np.zeros((1, 1, 144), np.uint8), pr63)
    assert zeros.tolist() == [[10000] + [0] * 36 + [10001]]


def test_an_epoch_has_as_many_rows_and_rules_as_the_originals():
    pr63, paper = nca.make_config(), nca.make_config(nca_compat="paper")
    rows = nca.row_count(pr63, "train")
    assert (rows, -(-rows // pr63.nca_sims_per_rule), rows * nca.row_inputs(pr63)) == (
        50607,
        5061,
        49_999_716,
    )
    rows = nca.row_count(pr63, "val")
    assert (rows, -(-rows // pr63.nca_sims_per_rule)) == (16194, 1620)
    assert nca.row_count(paper, "train") == 16000 and nca.row_count(paper, "val") == 3200
    assert paper.nca_epochs * 16000 * nca.row_inputs(paper) == 163_840_000


@pytest.mark.parametrize("compat, count", [("pr63", 900), ("paper", 987)])
def test_all_patches_but_the_first_grids_bear_a_loss(compat, count):
    cfg = config(nca_compat=compat)
    rows = nca.tokenize(np.ones((2, nca.grids_per_row(cfg), 144), np.uint8), cfg)[
        :, : nca.row_width(cfg)
    ]
    inputs, labels = nca.inputs_and_labels(rows, cfg)
    assert inputs.shape == labels.shape == (2, nca.row_inputs(cfg))
    assert ((labels != nca.IGNORE).sum(axis=1) == count).all()
    assert (
        labels[:, :-1][labels[:, :-1] != nca.IGNORE] == inputs[:, 1:][labels[:, :-1] != nca.IGNORE]
    ).all()


def test_labels_are_those_written_by_hand():
    # Grids of four patches: start 10000, patches, end 10001. Two whole grids of six tokens.
    row = np.array([[10000, 1, 2, 3, 4, 10001, 10000, 5, 6, 7, 8, 10001]], np.uint16)
    no = nca.IGNORE
    whole = dict(nca_grid=4, nca_seq_len=13)
    inputs, labels = nca.inputs_and_labels(row, config(**whole))
    assert inputs.tolist() == [[10000, 1, 2, 3, 4, 10001, 10000, 5, 6, 7, 8, 0]]
    assert labels.tolist() == [[no, no, no, no, no, no, 5, 6, 7, 8, no, no]]
    _, labels = nca.inputs_and_labels(row, config(**whole, nca_delimiter_loss=1))
    assert labels.tolist() == [[no, no, no, no, no, 10000, 5, 6, 7, 8, 10001, no]]
    inputs, labels = nca.inputs_and_labels(row, config(nca_grid=4, nca_seq_len=12, nca_last="cut"))
    assert inputs.tolist() == row[:, :-1].tolist()
    assert labels.tolist() == [[no, no, no, no, no, no, 5, 6, 7, 8, no]]


@pytest.mark.parametrize("compat", ["pr63", "paper"])
def test_next_grid_accuracy_counts_wrong_cells_where_they_are(compat):
    cfg = config(nca_compat=compat, nca_filter="none")
    rows = nca.NcaData(cfg, "train", say=silent).generate(0, np.arange(6))
    perfect = rows[:, 1:].astype(np.int64)
    grids = nca.grids_per_row(cfg)
    score = nca.next_grid_accuracy(perfect, rows, cfg)
    assert score["cell_accuracy"] == score["grid_accuracy"] == score["token_accuracy"] == 1
    assert len(score["cell_by_context"]) == grids - 1
    wrong = perfect.copy()
    # one cell of the grid behind three others
    wrong[0, 3 * 38 + 5 - 1] += 1 if rows[0, 3 * 38 + 5] % 10 < 9 else -1
    score = nca.next_grid_accuracy(wrong, rows, cfg)
    expected = [1.0] * (grids - 1)
    expected[2] = 5 / 6
    assert score["grid_by_context"] == pytest.approx(expected)
    assert score["cell_by_context"][2] == pytest.approx(1 - 1 / (6 * 144))
    assert score["token_accuracy"] == pytest.approx(1 - 1 / (6 * (grids - 1) * 36))
    guess = np.random.default_rng(0).integers(0, 10000, perfect.shape)
    score = nca.next_grid_accuracy(guess, rows, cfg)
    assert score["cell_accuracy"] == pytest.approx(0.1, abs=0.01) and score["grid_accuracy"] == 0
    assert nca.next_grid_accuracy(np.full_like(perfect, 10000), rows, cfg)["cell_accuracy"] == 0


def test_unigram_loss_is_the_entropy_of_the_labels():
    cfg = config(nca_grid=4, nca_seq_len=13)
    row = np.array([[10000, 1, 1, 1, 1, 10001, 10000, 7, 7, 8, 8, 10001]], np.uint16)
    assert nca.unigram_loss(row, cfg) == pytest.approx(math.log(2))
    assert nca.unigram_loss(
        data(nca_control="random").generate(0, np.arange(40)), config()
    ) < math.log(10**4)


# --- streams and simulation


def test_streams_are_splitmix64():
    # the first outputs for seed 1234567, as Rosetta Code has them
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert nca.bits(np.array([1234567], np.uint64), np.arange(4)).tolist() == published
    u = nca.uniform(nca.stream(1, 2, np.arange(50))[:, None], np.arange(2000), 24)
    assert 2**-25 <= u.min() and u.max() <= 1 - 2**-25
    assert abs(u.mean() - 0.5) < 0.003 and abs(np.corrcoef(u[0], u[1])[0, 1]) < 0.08


def test_rule_weights_have_the_published_distributions():
    w = nca.draw_weights(np.arange(2000), config())
    for part in w:
        assert abs(part.mean()) < 0.05 and abs(part.std() - 1) < 0.03
    assert sum(part[0].size for part in w) == 614
    w = nca.draw_weights(np.arange(2000), config(nca_compat="paper"))
    for part, fan_in in ((w.conv1[:, :, 1:9], 108), (w.conv2, 4), (w.conv3, 16)):
        assert part.std() * fan_in**0.5 == pytest.approx(1, abs=0.02)
        assert abs(part).max() * fan_in**0.5 <= 2 / 0.8796 + 1e-3
    assert not any(b.any() for b in (w.bias1, w.bias2, w.bias3))


def test_the_papers_first_and_last_colour_have_two_kernels():
    """Its grid is padded around on all axes: 12 channels at 10 colours, two of them seen twice."""
    w = nca.draw_weights(np.arange(4000), config(nca_compat="paper"))
    for colour in range(10):
        assert w.conv1[:, :, colour].std() == pytest.approx(
            0.136 if colour in (0, 9) else 0.0962, rel=0.01
        )
    wide, rng = np.zeros((1, 4, 12, 3, 3)), np.random.default_rng(0)
    wide[:] = rng.normal(size=wide.shape)
    folded = wide[:, :, 1:11].copy()
    folded[:, :, 9] += wide[:, :, 0]
    folded[:, :, 0] += wide[:, :, 11]
    grid = torch.from_numpy(rng.integers(0, 10, (1, 12, 12)))
    onehot = torch.nn.functional.one_hot(grid, 10).numpy().transpose(0, 3, 1, 2)
    padded = torch.from_numpy(
        np.pad(onehot, ((0, 0), (1, 1), (1, 1), (1, 1)), mode="wrap").astype(float)
    )
    there = torch.nn.functional.conv2d(padded, torch.from_numpy(wide[0]))
    torus = torch.from_numpy(
        np.pad(onehot, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap").astype(float)
    )
    torch.testing.assert_close(
        torch.nn.functional.conv2d(torus, torch.from_numpy(folded[0])), there
    )


def test_start_grids_have_the_published_distributions():
    keys = nca.stream(0, nca.START, np.arange(3000))
    counts = np.bincount(nca.start_grids(keys, config()).ravel(), minlength=10)
    assert abs(counts / counts.sum() - 0.1).max() < 0.002
    share = (nca.start_grids(keys, config(nca_start="skewed"))[..., None] == np.arange(10)).mean(1)
    z = np.random.default_rng(0).standard_normal((3000, 10))
    expected = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    drawn = (expected * (1 - expected)).mean() / 144  # what drawing 144 cells adds
    assert share.std() == pytest.approx(np.sqrt(expected.var() + drawn), rel=0.05)


def oracle(w, slot, start, keys, times, cfg):
    """What nca_reference makes of the same weights, start grids and numbers, row after row."""
    C, out = cfg.nca_grid**2, []
    u = nca.uniform(keys[:, None], np.arange(times[-1] * C), 24).reshape(len(keys), times[-1], 1, C)
    for n in range(len(keys)):
        grid = torch.from_numpy(start[n].astype(np.int64)).view(1, cfg.nca_grid, cfg.nca_grid)
        rule = reference.Rule.from_weights(w, slot[n])
        with torch.no_grad():
            grids = reference.record(
                rule, grid, times, cfg.nca_temperature, cfg.nca_identity, reference.Numbered(u[n])
            )
        out.append(grids.flatten(2)[0].numpy())
    return np.array(out)


def advances(cfg) -> list:
    """The ways to make a step in float32 here: torch's, and the compiled one."""
    compiled = nca.compiled_advance(cfg.nca_colors)
    assert compiled or not shutil.which("g++")
    return [nca.plain_advance, *([compiled] if compiled else [])]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"nca_compat": "paper"},
        {"nca_temperature": 0.5},
        {"nca_temperature": 0.0, "nca_identity": 3.0},
        {"nca_compat": "paper", "nca_temperature": 0.02, "nca_identity": 0.05},
        {
            "nca_grid": 9,
            "nca_patch": 3,
            "nca_colors": 3,
            "nca_dt": 2,
            "nca_init_steps": 0,
            "nca_seq_len": 200,
        },
        {"nca_colors": 15, "nca_temperature": 1.0, "nca_seq_len": 400},
        {"nca_colors": 2, "nca_grid": 2, "nca_temperature": 0.3, "nca_seq_len": 60},
    ],
    ids=lambda v: " ".join(f"{k.removeprefix('nca_')}={x}" for k, x in v.items()) or "pr63",
)
def test_grids_are_those_of_the_oracle(values, monkeypatch):
    cfg, decided = config(**values), []
    ids, rows = np.arange(4), np.arange(6)
    w, times = nca.draw_weights(ids, cfg), nca.recorded_times(cfg)
    start = nca.start_grids(nca.stream(5, nca.START, rows), cfg)
    keys = nca.stream(5, nca.STEP, rows)
    decide = nca.decide
    monkeypatch.setattr(nca, "decide", lambda *a: (decided.append(len(a[3])), decide(*a))[1])
    # rows of a rule side by side, or anyhow
    for slot in (np.array([0, 0, 1, 1, 2, 2]), np.array([3, 0, 1, 2, 1, 1])):
        expected = oracle(w, slot, start, keys, times, cfg)
        for advance in advances(cfg):
            monkeypatch.setattr(nca, "compiled_advance", lambda colors, advance=advance: advance)
            got = nca.rollout(nca.make_tables(w, cfg), slot, start, keys, times, cfg)
            assert (got == expected).all(), (
                f"{advance}: rows {rows[(got != expected).any((1, 2))]} differ"
            )
    if cfg.nca_temperature > 0.01:
        # float32 did not decide everything, though of four cells nearly all
        assert sum(decided) > (50 if cfg.nca_grid > 2 else 1)


def test_doubt_bounds_the_error_of_float32():
    """A colour's lead, and whether it leads at all, is known to within a rule's doubt."""
    rng, rule = np.random.default_rng(0), np.arange(200)
    where, cells = np.divmod(np.arange(200 * 144), 144), np.arange(200 * 144)
    for values in ({}, {"nca_compat": "paper"}, {"nca_identity": 2.0}):
        cfg = config(**values)
        rules = nca.make_tables(nca.draw_weights(rule, cfg), cfg)
        for advance in advances(cfg):
            state = rng.integers(0, 10, (200, 144)).astype(np.uint8)
            after, lead = np.empty_like(state), np.empty(state.shape, np.float32)
            advance(rules, rule, state, after, lead, cfg)
            around = state[where[0][:, None], nca.neighbours(12)[where[1]]]
            exact = nca.exact_logits(rules.weights, where[0], around)
            exact[cells, state.ravel()] += cfg.nca_identity
            spread = exact.std(1).reshape(200, 144).mean(1)
            own = exact[cells, after.ravel()].copy()
            exact[cells, after.ravel()] = -np.inf
            error = abs(lead - (own - exact.max(1)).reshape(200, 144)).max(1)
            assert (error < rules.doubt).all() and (error > 0).all()
            assert (rules.doubt < 0.02 * spread).all()


@pytest.mark.parametrize("compiler", ["no such program", "false"])
def test_without_a_compiler_the_data_is_the_same(compiler, monkeypatch):
    rows = data(nca_filter="none", nca_colors=9).generate(0, np.arange(3))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(nca, "compiled_advance", functools.cache(nca.compiled_advance.__wrapped__))
    assert nca.compiled_advance(9) is None
    assert (data(nca_filter="none", nca_colors=9).generate(0, np.arange(3)) == rows).all()


def test_rows_do_not_depend_on_the_batch_or_on_threads(monkeypatch):
    whole = data(nca_compat="paper", nca_filter="none", nca_tokens=40 * 1024, nca_sims_per_rule=3)
    rows = whole.generate(1, np.arange(40))
    some = np.array([33, 2, 2, 17])
    assert (whole.generate(1, some) == rows[some]).all()
    assert (
        np.concatenate([whole.generate(1, np.array([r])) for r in (0, 38)]) == rows[[0, 38]]
    ).all()
    monkeypatch.setattr(nca, "pieces", lambda n, cfg: [slice(i, i + 7) for i in range(0, n, 7)])
    whole.cfg.nca_threads = 3
    assert (whole.generate(1, np.arange(40)) == rows).all()


def test_epochs_have_new_start_grids_of_the_same_rules_unless_told_otherwise():
    d, v = data(nca_filter="none"), data("val", nca_filter="none")
    assert (d.generate(0, np.arange(4)) != d.generate(1, np.arange(4))).any(axis=1).all()
    assert (v.generate(0, np.arange(4)) == v.generate(1, np.arange(4))).all()
    still = data(nca_filter="none", nca_regen=0)
    assert (still.generate(0, np.arange(4)) == still.generate(1, np.arange(4))).all()
    assert (d.order(0) != d.order(1)).any() and sorted(d.order(3)) == list(range(d.rows))


def test_the_seed_changes_rules_and_nothing_global_is_touched():
    torch.manual_seed(3)
    before, threads, precision = (
        torch.get_rng_state(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
    )
    numpy_before = np.random.get_state()[1].copy()
    a, b = (data(nca_filter="none", nca_seed=s).generate(0, np.arange(3)) for s in (0, 1))
    assert (a != b).any(axis=1).all()
    assert (
        torch.equal(before, torch.get_rng_state())
        and (numpy_before == np.random.get_state()[1]).all()
    )
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)


def test_recording_starts_behind_the_initial_steps():
    assert (
        list(nca.recorded_times(config()))[:2] == [11, 12]
        and nca.recorded_times(config())[-1] == 36
    )
    assert list(nca.recorded_times(config(nca_compat="paper", nca_dt=2)))[:2] == [10, 12]
    assert nca.recorded_times(config(nca_compat="paper", nca_init_steps=0))[0] == 0


def test_each_control_breaks_what_it_says_and_nothing_else():
    ids, sims = np.arange(3), np.zeros(3, int)
    normal, still, shuffled, random = (
        nca.simulate(ids, sims, 0, config(nca_control=c))
        for c in ("", "still", "shuffled", "random")
    )
    assert (still == still[:, :1]).all() and not (normal == normal[:, :1]).all()
    assert (
        np.sort(normal.reshape(3, 26, -1), axis=1) == np.sort(shuffled.reshape(3, 26, -1), axis=1)
    ).all()
    assert (normal != shuffled).any()
    assert abs(np.bincount(random.ravel(), minlength=10) / random.size - 0.1).max() < 0.02


@pytest.mark.parametrize(
    "compat, digest",
    [
        ("pr63", "e1519e6138f8364622400db323ff32bcc9b7645fb57d8a9bb111cf327ebce91a"),
        ("paper", "56a879822405f6d16fd92aeb200f5bb52155ad92ffc8734f5e5eebbe52798c35"),
    ],
)
def test_data_stays_what_it_is(compat, digest):
    """If this fails on purpose, count nca.GENERATOR up, so that caches of the old data are void."""
    d = data(nca_compat=compat, nca_filter="none", nca_tokens=30 * 1024)
    assert d.sha256(2) == digest


# --- filter


def noise_of_the_specification() -> np.ndarray:
    s, out = 12345, []
    for _ in range(360):
        s = (1103515245 * s + 12345) % 2**31
        out.append((s >> 8) % 10000)
    return np.array(out, "<i4")


def test_gzip_sizes_are_those_of_the_original():
    noise, zeros = noise_of_the_specification(), np.zeros(360, "<i4")
    assert noise[:4].tolist() == [5830, 6967, 1980, 5638]
    assert nca.gzip_size(zeros.tobytes()) / 1440 == pytest.approx(32 / 1440, abs=0.01)
    assert nca.gzip_size(noise.tobytes()) / 1440 == pytest.approx(958 / 1440, abs=0.01)
    for array in (noise, zeros):
        assert nca.gzip_size(array.tobytes()) == len(
            gzip.compress(array.tobytes(), compresslevel=9)
        )


def test_random_grids_score_what_they_did_upstream():
    grids = np.random.default_rng(0).integers(0, 10, (20, 10, 144)).astype(np.uint8)
    for values, share, constant in (({"nca_compat": "paper"}, 0.669, 0.022), ({}, 0.653, 0.029)):
        cfg = config(**values)
        assert nca.raw_size(cfg) == (1440 if values else 1520)
        rows = nca.tokenize(grids, cfg, delimiters=not values).astype("<i4")
        sizes = [nca.gzip_size(row.tobytes()) for row in rows]
        assert np.mean(sizes) / nca.raw_size(cfg) == pytest.approx(share, abs=0.006)
        flat = nca.tokenize(np.zeros((1, 10, 144), np.uint8), cfg, delimiters=not values).astype(
            "<i4"
        )
        assert nca.gzip_size(flat.tobytes()) / nca.raw_size(cfg) == pytest.approx(
            constant, abs=0.003
        )


@pytest.mark.parametrize(
    "compat, quantiles, rate",
    [
        ("pr63", (0.115, 0.319, 0.482, 0.553, 0.599), 0.42),
        ("paper", (0.024, 0.310, 0.493, 0.568, 0.624), 0.49),
    ],
)
def test_scores_are_distributed_as_upstream(compat, quantiles, rate):
    cfg = config(nca_compat=compat)
    sizes = nca.compressed_sizes(np.arange(1000), cfg)
    assert np.quantile(sizes / nca.raw_size(cfg), [0.05, 0.25, 0.5, 0.75, 0.95]) == pytest.approx(
        quantiles, abs=0.05
    )
    assert nca.passes(sizes, cfg).mean() == pytest.approx(rate, abs=0.05)


def test_a_rules_size_is_that_of_its_own_rollout():
    cfg, ids = config(), np.arange(6)
    w, keys = nca.draw_weights(ids, cfg), nca.stream(0, nca.FILTER_STEP, ids)
    start = nca.start_grids(nca.stream(0, nca.FILTER_START, ids * 0), cfg)  # one grid for all
    assert (start == start[0]).all()
    grids = (
        torch.from_numpy(oracle(w, ids, start, keys, range(1, 11), cfg)).long().view(6, 10, 12, 12)
    )
    rows = reference.to_tokens(grids).numpy().astype(np.int32)
    assert [len(gzip.compress(row.tobytes(), 9)) for row in rows] == nca.compressed_sizes(
        ids, cfg
    ).tolist()


def test_band_ends_belong_to_it_in_the_pull_request_only():
    sizes = np.array([456, 760, 761, 1064])
    assert nca.passes(sizes, config(nca_band="0.5:0.7")).tolist() == [False, True, True, True]
    sizes = np.array([432, 720, 721, 1008])
    assert nca.passes(sizes, config(nca_compat="paper", nca_band="0.5:0.7")).tolist() == [
        False,
        False,
        True,
        False,
    ]
    assert nca.passes(sizes, config(nca_compat="paper")).tolist() == [False, False, True, True]


def test_rules_are_the_first_that_pass_and_splits_never_meet():
    few, many = data(nca_band="0.3:0.4"), data(nca_band="0.3:0.4", nca_tokens=250 * 988)
    assert len(few.rules) == 6 and len(many.rules) == 25 and (many.rules[:6] == few.rules).all()
    score = nca.compressed_sizes(many.rules, many.cfg) / 1520
    assert (0.3 <= score).all() and (score <= 0.4).all() and 0.04 < many.accept_rate < 0.2
    val = data("val", nca_band="0.3:0.4")
    assert many.rules.max() < nca.SPLIT_START["val"] <= val.rules.min() and val.rules.max() < 2**32


def test_a_band_that_accepts_nothing_ends_the_search_with_a_hint():
    hint = r"0\.7:0\.9.*0 of 2048 .*rate of 0\.00%.*5, 25, 50, 75 and 95 %.*for example --nca_band"
    with pytest.raises(UserError, match=hint):
        data(nca_band="0.7:0.9")
    with pytest.raises(UserError, match="fewer than one in nca_tries = 3"):
        data(nca_band="0.3:0.4", nca_tries=3, nca_tokens=10**6)


def test_an_interrupted_search_for_rules_goes_on_where_it_was(tmp_path, monkeypatch):
    cfg = config(nca_band="0.3:0.4", nca_tokens=600 * 988, nca_cache=str(tmp_path))
    rounds = []

    def poll():
        rounds.append(1)
        if len(rounds) == 2:
            raise tg.Interrupted

    with pytest.raises(tg.Interrupted):
        nca.NcaData(cfg, "train", say=silent, poll=poll)
    again, whole = (
        nca.NcaData(cfg, "train", say=silent),
        data(nca_band="0.3:0.4", nca_tokens=600 * 988),
    )
    assert (again.rules == whole.rules).all() and 0 < again.scored < whole.scored


# --- ranks


class Ranks:
    """`gather` and `together` for ranks that are threads."""

    def __init__(self, world: int):
        self.barrier, self.slots = threading.Barrier(world, timeout=60), [None] * world

    def gather(self, rank: int):
        def exchange(mine, world):
            self.slots[rank] = mine
            self.barrier.wait()
            out = list(self.slots)
            self.barrier.wait()
            return out

        return exchange

    def together(self, work):
        answer = work()
        self.barrier.wait()
        return answer

    def run(self, work) -> list:
        out, threads = [None] * len(self.slots), []
        for rank in range(len(self.slots)):

            def call(rank=rank):
                out[rank] = work(rank, self.gather(rank))

            threads.append(threading.Thread(target=call))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return out


@pytest.mark.parametrize("cached", [False, True])
def test_any_number_of_ranks_and_any_batch_make_the_same_data(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(nca, "CHUNK_ROWS", 16)
    hashes, rows = set(), 64
    for world, batch in ((1, 64), (1, 8), (2, 16), (4, 32)):
        folder = str(tmp_path / f"{world}-{batch}") if cached else ""
        cfg = config(nca_tokens=rows * 988, nca_cache=folder, nca_threads=1)
        ranks = Ranks(world)

        def work(rank, gather, cfg=cfg, world=world, batch=batch, ranks=ranks, folder=folder):
            meet = {"gather": gather, "together": ranks.together}
            d = nca.NcaData(cfg, "train", rank, world, say=silent, **meet)
            d.prepare(1)
            ranks.barrier.wait()
            if cached:  # no batch meets a disk that is gone
                shutil.rmtree(folder, ignore_errors=True)
            order, share = d.order(1), batch // world
            steps = [
                d.take(1, order[s + rank * share : s + (rank + 1) * share])
                for s in range(0, rows, batch)
            ]
            return steps, order, d.rules, d.made

        results = ranks.run(work)
        rows_in_order = np.concatenate(
            [part for step in zip(*(r[0] for r in results)) for part in step]
        )
        back = np.empty_like(rows_in_order)
        back[results[0][1]] = rows_in_order
        hashes.add(hashlib.sha256(back.tobytes() + results[0][2].tobytes()).hexdigest())
        assert sum(r[3] for r in results) == rows * 988, "every row is made once, by one rank"
        digest = hashlib.sha256(back.astype("<u2").tobytes()).hexdigest()
        assert digest == nca.NcaData(cfg, "train", say=silent).sha256(1)
    assert len(hashes) == 1


# --- cache


def test_the_cache_is_used_and_keyed_by_what_matters(tmp_path):
    folder = str(tmp_path)
    first = data(nca_cache=folder)
    digest = first.sha256(0)
    again = data(nca_cache=folder, seed=7, nca_threads=1)  # neither changes the data
    assert again.sha256(0) == digest and again.made == 0 and again.scored == 0
    other = data(nca_cache=folder, nca_band="0.4:0.6")  # compressed sizes are known, rows are not
    assert other.sha256(0) != digest and other.made > 0 and other.scored == 0
    assert data(nca_cache=folder, nca_seed=1).scored > 0
    assert not [
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and not p.name.startswith(("sizes-", "train-"))
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_cache_is_noticed_and_mended(damage, tmp_path):
    digest = data(nca_cache=str(tmp_path)).sha256(0)
    for path in tmp_path.rglob("*train*"):
        raw = bytearray(path.read_bytes())
        if damage == "flip":
            raw[-100] ^= 1
        other = {"cut": raw[:-2], "empty": b"", "foreign": raw.replace(b'"seed": 0', b'"seed": 1')}
        path.write_bytes(other.get(damage, raw))
    said = []
    mended = nca.NcaData(config(nca_cache=str(tmp_path)), "train", say=said.append)
    assert mended.sha256(0) == digest and mended.made > 0 and mended.scored > 0
    assert len(said) == 2 and all(
        "damaged" in message and str(tmp_path) in message for message in said
    )
    assert data(nca_cache=str(tmp_path)).sha256(0) == digest


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="nca_cache = .*cannot write.*another folder, or --nca_cache ''"
    ):
        data(nca_cache=str(tmp_path / "file"))


def test_a_cache_that_cannot_be_read_is_made_anew(tmp_path):
    cache, said = nca.Cache(str(tmp_path), {}, [].append), []
    cache.say = said.append
    (cache.folder / "train").mkdir(parents=True)  # in the place of a file
    assert cache.load("train") is None and cache.load("other") is None
    assert len(said) == 1 and "train cannot be read (Is a directory)" in said[0]


# --- command line


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--nca_grid", "13"],
            "nca_grid = 13 cannot be cut .* nca_patch = 2 .*--nca_grid 12 or 14",
        ),
        (
            ["--nca_patch", "3"],
            r"nca_colors = 10 and nca_patch = 3 make 10\^9 tokens.*--nca_patch 2$",
        ),
        (["--nca_band", "0.5"], "nca_band = '0.5': must read low:high"),
        (["--nca_band", "0.5:0.4"], "low < high"),
        (["--nca_compat", "both"], "nca_compat = 'both': must be one of 'pr63', 'paper'"),
        (["--nca_seq_len", "75"], "nca_seq_len = 75: a row needs 2 grids of 38 tokens"),
        (["--nca_tokens", "900"], "nca_tokens = 900: less than one row of 988 tokens"),
        (["--nca_colors", "1"], "2 to 16 colours"),
        (["--nca_temperature", "-1"], "nca_temperature = -1.0: must not be negative"),
        (["--nca_vocab", "100"], "nca_vocab = 100: there are 10002 tokens"),
        (["--nca_sims_per_rule", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_work_is_told_in_one_message(flags, message, capsys):
    assert nca.main(["--generate_only", "--nca_cache", "", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and re.search(message, err)


def example(name: str) -> str:
    """A value of a field, as a flag, that is not its default."""
    value = getattr(nca.PrePreConfig, name)
    return f"{value}x" if isinstance(value, str) else str(value + 1)


@pytest.mark.parametrize("name", [*nca.FOLLOWS, *nca.IDLE])
def test_a_flag_that_does_nothing_here_is_refused_by_name(name, capsys):
    for flags in ([f"--{name}", example(name)], [f"--{name.replace('_', '-')}={example(name)}"]):
        assert nca.main(["--generate_only", "--nca_cache", "", *flags]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith(f"error: {name} = ")
        assert ("follows from nca_" if name in nca.FOLLOWS else "does nothing") in err
    with pytest.raises(UserError, match=f"{name} = "):
        config(**{name: type(getattr(nca.PrePreConfig, name))(example(name))})


def test_what_does_nothing_here_is_refused_in_a_preset_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nca.tg, "train", None)  # nothing gets so far
    (tmp_path / "a.toml").write_text("nca_epochs = 2\nsteps = 10\n")
    (tmp_path / "b.toml").write_text('[score]\nmodes = "sliding"\n')
    (tmp_path / "c.toml").write_text("[rule]\np = 0.01\n")
    for file, words in (
        ("a", "a.toml: steps = 10: .* nca_epochs"),
        ("b", "b.toml: score = .*sliding.*--like"),
        ("c", "c.toml: rule = .*0.01.*--like"),
    ):
        assert nca.main(["--config", str(tmp_path / f"{file}.toml")]) == 2
        assert re.search(words, capsys.readouterr().err)
    assert nca.main(["--config", "remix_m"]) == 2 and "--like" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        nca.parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "--nca_tokens" in told
        and "--matrix_lr" in told
        and "cells along one side of the grid" in told
    )
    assert not [name for name in [*nca.FOLLOWS, *nca.IDLE] if f"--{name} " in told]


def test_a_runs_configuration_makes_a_run_of_another_length(tmp_path):
    """Its resolved file holds what followed from its flags; that follows anew."""
    cfg = nca.parse_args(["--nca_epochs", "3", "--lr_cycles", "2"])
    assert cfg.epochs == 3  # which cycles and --eval_every -1 count in
    (tmp_path / "c.toml").write_text(tg.config_toml(cfg))
    longer = nca.parse_args(["--config", str(tmp_path / "c.toml"), "--nca_epochs", "6"])
    assert longer.steps == 2 * cfg.steps and longer.epochs == 6 and longer.lr_cycles == 2


def test_compat_is_a_layer_below_flags():
    cfg = nca.parse_args(["--nca_compat", "paper", "--nca_sims_per_rule", "3"])
    assert (cfg.nca_start, cfg.nca_record, cfg.nca_sims_per_rule, cfg.nca_vocab) == (
        "skewed",
        "before",
        3,
        64000,
    )
    assert nca.parse_args([]) == nca.make_config(run="nca-s1")
    differ = {k for k in nca.COMPAT["pr63"] if nca.COMPAT["pr63"][k] != nca.COMPAT["paper"][k]}
    assert nca.COMPAT["pr63"].keys() == nca.COMPAT["paper"].keys() and len(differ) >= 12


def test_generate_only_tells_speed_and_hash(tmp_path, capsys):
    flags = ["--generate_only", "--json", "--nca_tokens", "50000", "--nca_val_tokens", "20000"]
    flags += ["--nca_cache", str(tmp_path)]
    assert nca.main([*flags, "--picture", str(tmp_path / "nca.png")]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["tokens_per_s"] > 0 and out["rules_per_s"] > 0 and 0.3 < out["accept_rate"] < 0.6
    assert len(out["sha256"]) == 64 and out["rows"] == 50 and out["rules"] == 5
    assert out["sha256"] == data(nca_tokens=50000).sha256(0)
    assert (tmp_path / "nca.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "nca.png"
    ).stat().st_size > 20000
    assert nca.main(flags[:1] + flags[2:]) == 0
    assert out["sha256"] in capsys.readouterr().out


def test_json_without_what_it_is_about_is_refused(tmp_path, capsys):
    for flags in (["--json"], ["--json", "--picture", str(tmp_path / "x.png")]):
        assert nca.main(flags) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: json = True") and "--generate_only" in err
    assert not list(tmp_path.iterdir())


def test_import_does_nothing():
    code = "import sys, pre_pre_train; assert 'matplotlib' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
