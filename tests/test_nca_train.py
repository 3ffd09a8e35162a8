"""
Pre-pre-training as train_gpt.py's loop runs it: loss, order of rows, ranks, kills, held-out rules,
bad input.
"""

import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forks import Server, free_port
from safetensors.torch import load_file
from test_runs import newest, timeless

import pre_pre_train as nca
import train_gpt as tg
from logs import score

# Grids of 6x6 cells of 3 colours: 11 tokens each, 5 of them a row of 55; 20 rows an epoch, 8 of
# them a batch.
SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "compile": 0,
    "depth": 1,
    "dim": 32,
    "heads": 2,
    "nca_colors": 3,
    "nca_grid": 6,
    "nca_seq_len": 60,
    "nca_filter": "none",
    "nca_cache": "",
    "nca_threads": 1,
    "nca_tokens": 1100,
    "nca_val_tokens": 660,
    "nca_epochs": 3,
    "batch_tokens": 440,
    "micro_tokens": 220,
    "eval_every": 3,
    "run": "tiny",
}


def flags(**changes) -> list[str]:
    return [w for k, v in (SMALL | changes).items() for w in (f"--{k}", str(v))]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("output"))
    yield server
    server.close()


def parts(**changes) -> tg.Trainer:
    cfg = nca.make_config(
        **({k: str(v) if k == "batch_tokens" else v for k, v in SMALL.items()} | changes)
    )
    return nca.build(cfg, tg.Run(cfg))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder: Path) -> dict:
    """All numbers that a run leaves, bit for bit, but the times."""
    last = newest(folder)
    tensors = {
        f"{part}/{k}": v.numpy().tobytes()
        for part in ("model", "optimizer", "averages")
        for k, v in load_file(last / f"{part}.safetensors").items()
    }
    saved = json.loads((last / "state.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    keys = ("val_loss", "cell_accuracy", "steps", "tokens", "data_sha256", "config_sha256")
    return {
        "step": last.name,
        "tensors": tensors,
        "loader": saved["loader"],
        "rng": saved["rng"],
        "metrics": timeless(metrics(folder)),
        "result": {k: result[k] for k in keys},
    }


# --- what a step computes


@pytest.mark.parametrize("compat, width, labels", [("pr63", 55, 36), ("paper", 54, 44)])
def test_the_loss_is_the_mean_over_the_labels_that_bear_one(compat, width, labels):
    p = parts(
        nca_compat=compat,
        nca_filter="none",
        head_init="0.5",
        nca_seq_len=55,
        batch_tokens=str(8 * width),
        nca_vocab=0,
        micro_tokens=2 * width,
    )
    rows = p.loader.data.generate(0, p.loader.data.order(0)[:8])
    x, y = (torch.from_numpy(a) for a in nca.inputs_and_labels(rows, p.cfg))
    assert (y != -1).sum() == 8 * labels == p.loader.targets(8 * width)
    expected = F.cross_entropy(
        p.model.logits(p.model.hidden(x, 1, 0)).flatten(0, 1), y.flatten(), ignore_index=-1
    )
    loss, _ = tg.train_step(p, 0, p.plan.at(0, 0.0))
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    rows = p.val.data
    x, y = (torch.from_numpy(a) for a in nca.inputs_and_labels(rows, p.cfg))
    expected = F.cross_entropy(
        p.model.logits(p.model.hidden(x, 1, 0)).flatten(0, 1), y.flatten(), ignore_index=-1
    )
    for size in (1, 5, 12):
        got = tg.evaluate(p.run, p.model, p.val, tg.Shape(size, width, 1, 0))
        assert got == pytest.approx(expected.item(), rel=1e-5)


def test_epochs_take_whole_batches_in_their_order():
    """Steps take whole batches of an epoch in its order; what is left over is dropped."""
    p = parts()
    assert p.cfg.steps == 6 and p.loader.data.rows == 20
    got = np.stack([p.loader.batch(step, 440, 55) for step in range(6)])
    for epoch in range(3):
        data = nca.NcaData(p.cfg, "train", say=print)
        expected = data.generate(epoch, data.order(epoch)[:16]).reshape(2, 8, -1)
        assert (got[2 * epoch : 2 * epoch + 2] == expected).all()


def test_knowing_the_next_token_scores_1_at_the_right_place_alone():
    """A model that knows the next token of every row scores 1; one a place late does not."""
    p = parts(nca_measured=7)
    following = np.roll(p.val.measured.astype(np.int64), -1, axis=1)

    def knows(tokens):
        def hidden(x, *applied):
            at = [
                int(np.flatnonzero((p.val.measured[:, :-1] == row[:-1].numpy()).all(1))[0])
                for row in x
            ]
            return F.one_hot(torch.from_numpy(tokens[at]), p.model.head_rows).float()

        return SimpleNamespace(
            model=SimpleNamespace(hidden=hidden, logits=lambda row: row), run=p.run
        )

    p.run.metric = lambda *a, **k: None
    assert len(p.val.measured) == 7
    for rows in (3, 7, 8):
        score = p.val.measure(knows(following), 0, tg.Shape(rows, 55, 1, 0))
        assert score["cell_accuracy"] == score["grid_accuracy"] == score["last_cell_accuracy"] == 1
    assert (
        p.val.measure(knows(p.val.measured.astype(np.int64)), 0, tg.Shape(4, 55, 1, 0))[
            "cell_accuracy"
        ]
        < 0.9
    )


def test_copy_accuracy_is_the_share_of_cells_that_stay():
    cfg = nca.make_config(**SMALL | {"batch_tokens": "440"})
    grids = np.random.default_rng(0).integers(0, 3, (4, 5, 36)).astype(np.uint8)
    assert nca.copy_accuracy(nca.tokenize(grids[:, :1].repeat(5, axis=1), cfg), cfg) == 1
    expected = (grids[:, 1:] == grids[:, :-1]).mean()
    assert nca.copy_accuracy(nca.tokenize(grids, cfg), cfg) == pytest.approx(expected)


def test_rules_of_validation_are_never_trained_on():
    p = parts()
    assert p.loader.data.rules.max() < nca.SPLIT_START["val"]
    assert not (p.val.data[:, None] == p.loader.data.generate(0, np.arange(20))[None]).all(-1).any()


def test_a_small_model_learns_that_grids_stand_still():
    """A small model finds that each grid repeats the one before: far below any constant guess, on
    rules of its own.
    """
    p = parts(
        nca_control="still",
        nca_colors=2,
        nca_tokens=55 * 320,
        nca_epochs=20,
        batch_tokens="1760",
        dim=64,
        nca_val_tokens=55 * 32,
        optimizer="muon",
        embed_lr=0.05,
        head_lr=0.02,
        lr="1",
        matrix_lr=0.02,
        micro_tokens=1760,
    )
    p.run.metric = lambda *a, **k: None
    shape = p.plan.eval_shape(p.plan.at(0, 0.0))
    first = tg.evaluate(p.run, p.graph, p.val, shape)
    # the head starts at zero; 18 tokens are rounded up to 128
    assert first == pytest.approx(math.log(128), abs=1e-4)
    for step in range(80):
        tg.train_step(p, step, p.plan.at(step, step / 200))
    assert tg.evaluate(p.run, p.graph, p.val, shape) < 0.7 * p.val.unigram
    assert p.val.measure(p, 60, shape)["cell_accuracy"] > 0.7


# --- whole runs


@pytest.fixture(scope="session")
def straight(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nca")
    counts = folder / "calls.json"
    ended = server.run(
        *flags(save_every=2, ema=0.5),
        cwd=folder,
        program="pre_pre_train",
        when={"count": str(counts)},
    )
    assert ended.code == 0, ended.text
    return folder / "logs/tiny", json.loads(counts.read_text())


@pytest.mark.parametrize(
    "phase, where",
    [("train_step", 0.3), ("train_step", 0.8), ("evaluate", 0.5), ("save_checkpoint", 0.7)],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_it_ends_alike(server, straight, tmp_path, phase, where, number):
    reference, calls = straight
    at = max(1, int(where * calls[phase]))
    # With a cache an epoch is made at its beginning, while the clock stands still; without one,
    # batch by batch.
    argv = flags(save_every=2, ema=0.5, nca_cache="cache" if where < 0.6 else "")
    ended = server.run(
        *argv, cwd=tmp_path, program="pre_pre_train", when={"phase": phase, "send": [[at, number]]}
    )
    assert ended.code == (-number if number == signal.SIGKILL else 128 + number), ended.text
    ended = server.run(*argv, "--resume", cwd=tmp_path, program="pre_pre_train")
    assert ended.code == 0, ended.text
    assert state(tmp_path / "logs/tiny") == state(reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_search_for_rules_that_has_no_end(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    sized = nca.compressed_sizes

    def slowly(ids, cfg):
        os.kill(os.getpid(), number)
        return sized(ids, cfg)

    monkeypatch.setattr(nca, "compressed_sizes", slowly)
    try:
        assert nca.main(flags(nca_filter="pr63", nca_band="0.9:1", nca_tries=10**9)) == 128 + number
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    said = capsys.readouterr()
    assert (
        not said.err and said.out.count("\n") == 1 and f"interrupted by {number.name}" in said.out
    )
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_the_step_before_an_interrupted_epoch_is_logged_and_checked(loss, monkeypatch):
    """On a GPU numbers are read one step late; the signal falls while the next rows are made."""
    p, calls = parts(), []
    p.run.device = SimpleNamespace(type="cuda")
    p.run.metric = lambda kind, step, **k: calls.append((kind, step))

    def train_step(p, step, now):
        if step == 2:
            raise tg.Interrupted
        return torch.tensor([loss if step else 1.0]), torch.tensor(1.0)

    monkeypatch.setattr(tg, "train_step", train_step)
    monkeypatch.setattr(tg, "moment", lambda on_gpu: 0.0)
    monkeypatch.setattr(tg, "validate_all", lambda *a: {})
    with pytest.raises(tg.Interrupted if loss == 1 else tg.Diverged):  # what diverged is not saved
        tg.train_loop(p, 0)
    assert calls == [("train", 1), ("train", 2)][: 2 if loss == 1 else 1]


def test_the_run_folder_holds_numbers_picture_and_measures(straight):
    folder, _ = straight
    result = json.loads((folder / "result.json").read_text())
    assert {
        "val_loss",
        "cell_accuracy",
        "grid_accuracy",
        "token_accuracy",
        "train_time_s",
    } <= result.keys()
    assert result["steps"] == 6 and result["tokens"] == 6 * 440 and "artifact_bytes" not in result
    assert (folder / "nca.png").read_bytes().startswith(b"\x89PNG") and not (
        folder / "model.nrx"
    ).exists()
    lines = [m for m in metrics(folder) if m["kind"] == "nca"]
    assert [m["step"] for m in lines] == [0, 3, 6] and len(lines[0]["cell_by_context"]) == 4
    back = nca.PrePreConfig(**tg.read_toml(folder / "config.toml", nca.PrePreConfig))
    assert (back.vocab, back.seq_len, back.steps, back.doc_mask, back.nca_grid) == (
        83,
        "55",
        6,
        0,
        6,
    )
    assert nca.parse_args(["--config", str(folder / "config.toml")]).nca_tokens == 1100


@pytest.mark.parametrize("verb", ["", "table", "export", "prove", "sample"])
@pytest.mark.parametrize("more", [(), ("--data", "data/sample")], ids=str)
def test_what_knows_no_text_is_not_scored(straight, tmp_path, capsys, verb, more):
    """Not on another text either, whose tokens would mean nothing to it."""
    out = ("--out", str(tmp_path / "a.nrx")) if verb == "export" else ()
    assert score.main([*verb.split(), str(straight[0]), *out, *more]) == 2
    said = capsys.readouterr()
    assert f"{straight[0]} is a pre-pre-training, which knows no text" in said.err
    assert said.err.count("\n") == 1 and not said.out


def test_any_number_of_ranks_gives_the_same_losses(server, straight, tmp_path):
    reference = [m["train_loss"] for m in metrics(straight[0]) if m["kind"] == "train"]
    for world in (2, 4):
        env = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        argv = flags(
            run=f"w{world}", micro_tokens=440 // world, ema=0.5, nca_cache=str(tmp_path / "cache")
        )
        ranks = [
            server.start(
                *argv,
                cwd=tmp_path,
                program="pre_pre_train",
                env={k: str(v) for k, v in (env | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            )
            for rank in range(world)
        ]
        for fork in ranks:
            ended = fork.wait()
            assert ended.code == 0, ended.text
        found = metrics(tmp_path / "logs" / f"w{world}")
        assert len(reference) == 6
        np.testing.assert_allclose(
            [m["train_loss"] for m in found if m["kind"] == "train"], reference, rtol=1e-5
        )


def test_a_cache_that_one_rank_alone_cannot_write_ends_both_and_keeps_the_steps(server, tmp_path):
    """Two machines; on the second one's disk there is no room for the second epoch."""
    argv = flags(nca_cache="cache", micro_tokens=220)
    folders = [tmp_path / "one", tmp_path / "two"]
    cfg = nca.parse_args(argv)
    lost = nca.Cache("two/cache", nca.facts(cfg, rows=True)).folder / "train-epoch1-rows0-20"
    folders[0].mkdir(), (tmp_path / lost).mkdir(parents=True)
    env = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        server.start(
            *argv,
            cwd=folder,
            program="pre_pre_train",
            env={k: str(v) for k, v in (env | {"RANK": rank, "LOCAL_RANK": 0}).items()},
        )
        for rank, folder in enumerate(folders)
    ]
    for fork in ranks:
        ended = fork.wait(60)
        assert ended.code == 2 and "cannot write" in ended.err, ended.text
        assert "all 2 steps are saved in logs/tiny/ckpt/000002" in ended.err
    assert newest(folders[0] / "logs/tiny").name == "000002"


def test_a_run_goes_on_with_its_own_rows_alone(monkeypatch):
    loader = parts(nca_filter="pr63", nca_band="0.2:0.9").loader
    saved, state = loader.identity(), loader.state_dict()
    assert loader.accept(saved, state) == ""
    assert loader.accept({"rows": saved["rows"]}, state) == "", "of an older version"
    monkeypatch.setattr(nca, "zlib_mark", lambda: ["another"])
    assert loader.accept(saved, state) == "", "by which the same rules pass"
    loader.data.rules = loader.data.rules + 1
    with pytest.raises(tg.UserError, match="not those that this run was trained on.*other rules"):
        loader.accept(saved, state)


BAD = {
    "a band that accepts nothing": (
        {"nca_filter": "pr63", "nca_band": "0.9:1"},
        "acceptance rate of 0.00%",
    ),
    "a batch of broken rows": (
        {"batch_tokens": 450},
        "batch_tokens = 450 on 1 ranks: must be a multiple of 55.*choose 440",
    ),
    "an epoch below a batch": (
        {"nca_tokens": 110},
        "an epoch of 2 rows is less than one batch of 8",
    ),
    "weights in bfloat16": ({"param_dtype": "bfloat16"}, "keeps float32 masters"),
    "a varying batch": ({"batch_tokens": "440 0.5:880"}, "give one number"),
    "a grid of broken patches": ({"nca_grid": 7}, "nca_grid = 7 cannot be cut into patches"),
    "a patch of more tokens than Python prints": (
        {"nca_grid": 100, "nca_patch": 100},
        r"3\^10000 tokens.*--nca_patch 2$",
    ),
    "no measured rows": ({"nca_measured": 0}, "nca_measured = 0: must be at least 1"),
    "fewer than no measured rows": ({"nca_measured": -1}, "nca_measured = -1"),
    "a model of an unknown preset": ({"like": "nowhere"}, "no such preset"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, message = BAD[name]
    assert nca.main(flags(**changes)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "logs").exists()


def test_like_takes_the_model_of_a_preset_and_nothing_else():
    cfg = nca.parse_args(["--like", "remix_m", "on_cpu", "--nca_colors", "3"])
    assert (cfg.depth, cfg.dim, cfg.heads, cfg.softcap, cfg.logit_dim_power) == (
        4,
        256,
        4,
        15,
        -0.5,
    )
    assert (cfg.optimizer, cfg.data, cfg.param_dtype, cfg.doc_mask, cfg.vocab) == (
        "adamw",
        "",
        "float32",
        0,
        83,
    )
    assert cfg.lr == nca.COMPAT["pr63"]["lr"] and cfg.seq_len == "988" and cfg.config == ()
    full = nca.parse_args([])
    rates = tg.Schedule("lr", full.lr)
    np.testing.assert_allclose(
        [rates.at(s, s / 4740) for s in (0, 1, 236, 4000, 4029, 4739)],
        [1 / 237, 2 / 237, 1, 1, 1, 1 / 711],
        rtol=1e-9,
    )
    # the pull request's
    assert (full.steps, full.seq_len, full.vocab, full.eval_every) == (4740, "988", 10002, 790)
    paper = nca.parse_args(["--nca_compat", "paper"])
    assert (paper.steps, paper.seq_len, paper.vocab) == (5000, "1024", 64000)


def test_the_pull_requests_model_has_none_of_the_language_runs_regularisers():
    """MTP would predict from the embedding of patch 0 where labels are ignored; windows belong to
    rows of 1,024 tokens.
    """
    cfg = nca.parse_args(["--like", "slowrun_1h"])
    assert (cfg.repeats, cfg.mtp, cfg.stoch_depth, cfg.iha, cfg.proj_init, cfg.window) == (
        "1",
        0,
        0,
        0,
        0,
        "513",
    )
    assert (cfg.loop, cfg.unet, cfg.attn_dropout, cfg.value_proj, cfg.window_pattern) == (
        "15:21",
        2,
        0.05,
        32,
        "SSSL",
    )
    cfg = nca.parse_args(
        ["--like", "slowrun_1h", "--nca_seq_len", "512", "--mtp", "0.3", "--repeats", "2"]
    )
    assert (cfg.window, cfg.mtp, cfg.repeats) == ("257", 0.3, "2")  # flags win
    cfg = nca.parse_args(["--like", "slowrun_1h", "--nca_compat", "paper"])
    assert (cfg.repeats, cfg.mtp, cfg.window) == ("0:1 6/11:3", 0.3, "1025")
    # its tables are per position
    assert nca.parse_args(["--like", "golf_cpu"]).repeats == "0:1 0.4:2 0.7:3"


@pytest.mark.parametrize(
    "preset, golden", [("slowrun_1h", 1_254_010_427), ("slowrun_pr63", 2_528_723_435)]
)
def test_models_with_the_vocabulary_of_patches_keep_their_sizes(preset, golden):
    cfg = nca.parse_args(["--like", preset])
    model = tg.build_model(cfg, torch.device("meta"), torch.float32, 8)
    assert sum(p.numel() for p in model.parameters()) == golden
