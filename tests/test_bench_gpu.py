"""tests/bench_gpu.py without a GPU: shares of a batch, another script's times, a trace's counts."""

import argparse
from pathlib import Path

import bench_gpu
import pytest
from helpers import tg

ARGS = {"device": "cpu", "flags": "", "at": "0 0.5 1", "prepare": False, "replace": [], "skip": 2}
SCRIPT = """
import os, sys
assert int(os.environ["WORLD_SIZE"]) == 8
for step in range(1, 7):
    print(f"step:{step}/6 train_time:{step * step / 2:.3f}ms step_avg:0ms")
print("step:6/6 val_loss:3.2 train_time:99ms step_avg:0ms")
print("peak memory allocated: 1 MiB")
"""


def test_one_gpu_gets_its_share_of_every_batch_of_the_schedule(tmp_path):
    args = argparse.Namespace(**ARGS, preset=["golf_progressive"], share=8)
    args.flags = '--batch_tokens "0:524288 0.5:1048576"'
    cfg = bench_gpu.configured(args, tmp_path / "data")
    assert cfg.batch_tokens == "0:65536 0.5:131072"
    other = bench_gpu.configured(args, tmp_path / "data", "--loss_chunk 65536")
    assert (other.loss_chunk, other.batch_tokens) == (65536, cfg.batch_tokens)
    found = bench_gpu.chosen(tg.Plan(cfg), "0 0.1 0.45 0.5 1")
    assert [(at, now.repeats, now.batch_tokens) for at, now in found] == [
        (0, 2, 65536),
        (0.45, 3, 65536),
        (0.5, 3, 131072),
        (1, 4, 131072),
    ]


def test_times_of_another_script_are_differences_of_what_it_prints(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    args = argparse.Namespace(**ARGS, against=script)
    assert bench_gpu.their_times(args, tmp_path) is None  # it wants eight ranks, and says so
    assert "AssertionError" in capfd.readouterr().out
    args.replace = ['["WORLD_SIZE"]) == 8=>["WORLD_SIZE"]) == 1']
    found = bench_gpu.their_times(args, tmp_path)
    assert found["n"] == 3 and found["median"] == found["mean"] == pytest.approx(4.5)
    assert "6 steps peak memory allocated: 1 MiB" in capfd.readouterr().out
    args.replace = ["step=>leap"]
    with pytest.raises(SystemExit, match="places in the script have 'step'"):
        bench_gpu.their_times(args, tmp_path)


def test_waits_are_counted_inside_steps_alone():
    def event(cat: str, name: str, ts: float, dur: float = 1.0) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("user_annotation", "bench_step", 0, 10),
        event("user_annotation", "bench_step", 20, 10),
        event("cuda_runtime", "cudaStreamSynchronize", 5),
        event("cuda_runtime", "cudaLaunchKernel", 6),
        event("cuda_runtime", "cudaDeviceSynchronize", 40),  # the profiler's own
        event("kernel", "matmul", 7, 3000),
        event("kernel", "matmul", 27, 1000),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 3),
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 5},
    ]
    found = bench_gpu.counted(events, 2)
    assert found["waits"] == {"cudaStreamSynchronize": 0.5}
    assert (found["kernels"], found["kernel_ms"]) == (1, 2)
    assert found["top"] == [("matmul", 2, 1)]
    assert found["copies"] == {"Memcpy HtoD (Pinned -> Device)": 0.5}


def test_the_recipe_for_upstream_names_texts_that_are_in_its_script():
    """Where that script lies beside the project."""
    script = Path(__file__).parent.parent / ".upstream" / "train_gpt_M.py"
    if not script.exists():
        pytest.skip("upstream's script is not here")
    shell = Path(__file__).with_name("gpu.sh").read_text()
    pairs = [line.split("'")[1] for line in shell.splitlines() if "--replace '" in line]
    text = bench_gpu.replaced(script.read_text(), pairs)
    assert len(pairs) == 7
    compile(text, "theirs.py", "exec")
