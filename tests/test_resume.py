"""
Runs that are stopped, entered twice, ended otherwise or renewed: whoever reads the folder then
finds what the result is of.
"""

import contextlib
import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sampler
import torch
from helpers import tg


def config(folder: Path, run: str = "test", **changes) -> tg.Config:
    short = {"steps": 10, "save_every": 0, "save_last": 0, "export": "", "batch_tokens": "128"}
    return sampler.config(short | changes, folder, run)


def go(cfg: tg.Config) -> tuple[int, str]:
    """A start of a run in this process: exit code, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), tg.Run(cfg) as run:
        return tg.train(cfg, run), said.getvalue()


def stop(monkeypatch, at: int) -> None:
    """A signal in the evaluation of that number, counted from 1."""
    whole, calls = tg.evaluate, []

    def evaluate(run, *more):
        calls.append(1)
        if len(calls) == at:
            run.signal = signal.SIGTERM
            raise tg.Interrupted
        return whole(run, *more)

    monkeypatch.setattr(tg, "evaluate", evaluate)


def result(cfg: tg.Config) -> dict:
    return json.loads((Path(cfg.log_dir) / cfg.run / "result.json").read_text())


def again(cfg: tg.Config, **changes) -> tg.Config:
    return dataclasses.replace(cfg, resume=True, **changes)


def test_tokens_are_those_of_the_batches_that_a_clock_allowed(tmp_path):
    """Under max_seconds a batch follows the clock; a run that goes on counts from where it was."""
    cfg = config(tmp_path, steps=10**6, max_seconds=0.6, batch_tokens="128 0.5:512", epochs=0)
    assert go(cfg)[0] == 0
    lines = (tmp_path / "test" / "metrics.jsonl").read_text().splitlines()
    drawn = [row["batch_tokens"] for row in map(json.loads, lines) if row["kind"] == "train"]
    found = result(cfg)
    assert {128, 512} == set(drawn) and found["steps"] == len(drawn)
    assert found["tokens"] == sum(drawn)
    cfg = config(tmp_path, "by_steps", save_every=7, keep=1, batch_tokens="128 0.5:512", epochs=0)
    go(cfg)
    (tmp_path / "by_steps" / "result.json").unlink()
    go(again(cfg))
    assert result(cfg)["resumed"] and result(cfg)["tokens"] == 5 * 128 + 5 * 512
    state = tmp_path / "by_steps" / "ckpt" / "000007" / "state.json"
    older = json.loads(state.read_text())
    del older["tokens"]  # which knew no count
    state.write_text(json.dumps(older))
    (tmp_path / "by_steps" / "result.json").unlink()
    go(again(cfg))
    assert result(cfg)["tokens"] == 5 * 128 + 5 * 512


TAKE = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_a_folder_is_locked_although_nothing_is_kept(tmp_path):
    """Another start with --resume would go into it."""
    with tg.Run(config(tmp_path, keep=0)) as run:
        tg.prepare_folder(run)
        take = [sys.executable, "-c", TAKE, tmp_path / "test" / ".lock"]
        assert "BlockingIOError" in subprocess.run(take, capture_output=True, text=True).stderr


def test_calibration_that_is_made_again_is_timed_once(tmp_path, monkeypatch):
    """Stopped while the artifact is evaluated, with no checkpoint of that step."""
    cfg = config(tmp_path, export="int4", gptq=8, eval_every=0, final_weights="live", save_last=0)
    stop(monkeypatch, 2)  # the first is behind the last step
    seconds = iter(range(0, 10**6, 100))
    calibrate = tg.calibrate

    def slowly(trainer, rows, until):
        found = calibrate(trainer, rows, until)
        trainer.run.clock.total += next(seconds) + 100
        return found

    monkeypatch.setattr(tg, "calibrate", slowly)
    assert go(cfg)[0] == 143
    state = json.loads((tmp_path / "test/ckpt/000010/state.json").read_text())
    assert 0 < state["train_seconds"] < 100
    monkeypatch.undo()
    assert go(again(cfg))[0] == 0
    assert result(cfg)["train_time_s"] < 100


def test_weights_of_a_run_that_was_ended_otherwise_are_those_of_its_result(tmp_path, monkeypatch):
    """Its checkpoint, begun for live weights, was not replaced; its artifact had other weights."""
    cfg = config(tmp_path, ema=0.9, export="int8", eval_every=0)
    stop(monkeypatch, 3)  # live weights, their average, and then what is read back
    assert go(cfg)[0] == 143 and (tmp_path / "test" / "model.nrx").exists()
    monkeypatch.undo()
    other = again(cfg, final_weights="ema", export="")
    assert go(other)[0] == 0 and not (tmp_path / "test" / "model.nrx").exists()
    found, named, _ = tg.open_source(str(tmp_path / "test"), say=print)
    averages = tg.read_tensors(tmp_path / "test/ckpt/000010/averages.safetensors")
    assert found.final_weights == "ema" and result(cfg)["val_loss"] == result(cfg)["val_loss_ema"]
    for name, w in named.items():
        assert torch.equal(w.flatten(), averages[f"{name}:ema"].flatten()), name


def test_a_run_goes_on_without_the_one_that_it_began_from(tmp_path):
    go(config(tmp_path, "first", save_last=1, keep=1))
    cfg = config(tmp_path, "second", save_last=1, keep=1, init_from=str(tmp_path / "first"))
    assert "loaded  " in go(cfg)[1]
    (tmp_path / "second" / "result.json").unlink()
    shutil.rmtree(tmp_path / "first")
    code, said = go(again(cfg))
    assert code == 0 and "resumed:" in said and "loaded  " not in said


def test_a_snapshot_is_read_where_the_run_exports_an_average(tmp_path):
    cfg = config(tmp_path, cycles=2, ema=0.9, final_weights="ema", save_last=1, keep=1)
    go(cfg)
    (last,) = list((tmp_path / "test" / "snapshots").glob("*2"))
    _, named, path = tg.open_source(str(last))
    live = tg.read_tensors(last / "model.safetensors")
    assert path == last and all(torch.equal(w, live[name]) for name, w in named.items())
    checkpoint = tg.checkpoints(tmp_path / "test")[-1]
    (checkpoint / "averages.safetensors").unlink()
    with pytest.raises(tg.UserError, match="averages.safetensors"):  # there it is damage
        tg.open_source(str(checkpoint))


def test_renewed_tables_stand_in_the_log_too(tmp_path):
    """Where submit looks for the configuration that a run folder has."""
    cfg = config(tmp_path)
    go(cfg)
    assert go(again(cfg, rule={"target": 9.0, "p": 0.5}))[0] == 0
    text = (tmp_path / "test" / "config.toml").read_text()
    assert "target = 9.0" in text
    assert text.split("\n", 1)[-1] in (tmp_path / "test" / "log.txt").read_text()


def test_the_loss_without_the_mask_is_of_the_weights_that_the_run_ends_with(tmp_path):
    cfg = config(tmp_path, ema=0.9, final_weights="ema")
    run = tg.Run(cfg)
    run.join_group()
    trainer = tg.build(cfg, run)
    found = {
        f"val_loss{kind}{tail}": i
        for i, (kind, tail) in enumerate(
            (kind, tail) for kind in ("", "_ema") for tail in ("", "_unmasked")
        )
    }
    ended = tg.finish(trainer, 10, trainer.plan.at(10, 1.0), found)
    assert (ended["val_loss"], ended["val_loss_unmasked"]) == (2, 3)


def test_a_node_with_a_flag_more_is_named(monkeypatch):
    """Its sources are newer; the message and no KeyError says so."""
    ranks = tg.Ranks(torch.device("cpu"), 0, 2, torch.float32)
    ranks.one_node = False
    facts = [("one", {"depth": 2, "sources": "x"}), ("two", {"depth": 2, "new": 0, "sources": "y"})]

    def gather(found, own):
        found[:] = facts

    monkeypatch.setattr(tg.dist, "all_gather_object", gather)
    with pytest.raises(tg.UserError, match="rank 1 on two has new = 0, sources = 'y'"):
        ranks.require_the_same(lambda: facts[0][1])
