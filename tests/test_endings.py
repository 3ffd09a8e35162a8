"""How programs end: Ctrl-C and errors of files are one line; proofs leave no process behind."""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, tg, tiny, write_shard

from logs import score
from logs.endings import ending

sys.path.append(str(ROOT / "logs"))
PROGRAMS = {
    "logs.report": [],
    "logs.pack": [[]],
    "logs.submit": [[]],
    "logs.centering": [["tables", "x"]],
    "logs.nca": [[]],
    "logs.embeddings": [["x"]],
    "logs.explain_centering": [],
    "logs.score": [["sample", "x"]],
    "pre_pre_train": [[]],
    "train_gpt": [["--run", "x"]],
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    "error, code",
    [(KeyboardInterrupt(), 130), (IsADirectoryError(21, "Is a directory", "there"), 2)],
)
def test_a_program_ends_with_one_line_and_its_code(name, error, code, monkeypatch, capsys):
    """Ctrl-C is exit code 130 and a file that cannot be read is 2, without a traceback."""

    def fail(*args, **how):
        raise error

    program = importlib.import_module(name)
    monkeypatch.setattr(program.tyro, "cli", fail)
    monkeypatch.setattr(program.tyro.extras, "subcommand_cli_from_dict", fail)
    monkeypatch.setattr(sys, "argv", [name, "x"])
    try:
        ended = program.main(*PROGRAMS[name])
    except SystemExit as stop:
        ended = stop.code
    err = capsys.readouterr().err
    assert ended == code and err.count("\n") == 1, err
    assert "interrupted" in err if code == 130 else "there" in err


def test_a_reader_that_leaves_a_pipe_ends_the_program_well(tmp_path):
    read, write = os.pipe()
    os.close(read)
    pid = os.fork()
    if not pid:
        os.dup2(write, 1)
        code = ending("x", lambda: os.write(1, b"much"))
        os._exit(code)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# --- the proof's processes

ASLEEP = """import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    open(sys.argv[1], "w").close()
    time.sleep(60)
except KeyboardInterrupt:
    os.rename(sys.argv[1], sys.argv[1] + ".ended")
    sys.exit(130)
"""


@pytest.fixture
def asleep(tmp_path, monkeypatch):
    """score.py is a program that sleeps; gives the mark that it makes when it begins."""
    (tmp_path / "score.py").write_text(ASLEEP)
    monkeypatch.setattr(score, "__file__", str(tmp_path / "score.py"))
    return tmp_path / "mark"


def test_a_proof_that_is_asked_to_stop_is_ended_as_by_ctrl_c(asleep):
    began = time.monotonic()
    assert score.fresh_process(str(asleep), asked_to_stop=asleep.exists) == ""
    assert time.monotonic() - began < 20 and Path(f"{asleep}.ended").exists()


def test_ctrl_c_ends_a_proof_and_what_it_started(asleep):
    def interrupt():
        if asleep.exists():
            raise KeyboardInterrupt  # as from the keyboard

    with pytest.raises(KeyboardInterrupt):
        score.fresh_process(str(asleep), asked_to_stop=interrupt)
    assert Path(f"{asleep}.ended").exists()


def test_a_signal_during_the_proof_keeps_the_scores_and_the_next_start_goes_on(
    tmp_path, monkeypatch, capsys
):
    for name, seed in (("train_000001", 0), ("val_000000", 1)):
        write_shard(tmp_path / f"x_{name}.bin", np.random.default_rng(seed).integers(96, size=2000))
    cfg = tiny(data=str(tmp_path), log_dir=str(tmp_path), dim=64, steps=3, val_tokens=160)
    with tg.Run(cfg) as run:
        assert tg.train(cfg, run) == 0
    told = []

    def proof(*arguments, asked_to_stop):
        told.append(asked_to_stop())
        if len(told) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return "prove:chunked decoded_bpb:1.5 "

    monkeypatch.setattr(score, "fresh_process", proof)
    # these random tokens are no text, and the proof only stands for one
    monkeypatch.setattr(score, "check_possible", lambda *how: None)
    argv = [str(tmp_path / "test"), "--modes", "chunked", "--prove_bytes", "10"]
    assert score.main(argv) == 143 and "interrupted by SIGTERM" in capsys.readouterr().out
    kept = json.loads((tmp_path / "test/result.json").read_text())
    assert list(kept["scores"]) == ["chunked"] and "decoded_bpb" not in kept
    assert score.main(argv) == 0 and "chunked: taken before" in capsys.readouterr().out
    result = json.loads((tmp_path / "test/result.json").read_text())
    assert result["decoded_bpb"] == 1.5 and result["scores"]["chunked"] == kept["scores"]["chunked"]


def test_a_finished_run_started_with_another_table_is_scored_by_it(tmp_path, capsys):
    """Its artifact has the table of its training, which is not what is asked for now."""
    for name, seed in (("train_000001", 0), ("val_000000", 1)):
        write_shard(tmp_path / f"x_{name}.bin", np.random.default_rng(seed).integers(96, size=2000))
    cfg = tiny(data=str(tmp_path), log_dir=str(tmp_path), dim=64, steps=2, val_tokens=160)
    cfg.score = {"modes": "chunked"}
    folder = tmp_path / "test"
    for table in ({"modes": "chunked"}, {"modes": "sliding", "stride": 8}):
        cfg.score, cfg.rule, cfg.resume = table, {"target": 3.0}, folder.exists()
        with tg.Run(cfg) as run:
            assert tg.train(cfg, run) == 0
        kept = tg.checkpoint_config(folder)
        assert (kept.score, kept.rule, kept.dim) == (cfg.score, cfg.rule, 64)
        assert score.main([str(folder)]) == 0
    assert tg.load_artifact(folder / "model.nrx")[0].score == {"modes": "chunked"}
    assert list(json.loads((folder / "result.json").read_text())["scores"]) == [
        "chunked",
        "sliding stride=8",
    ]
