"""bench_gpu.py without a GPU: shares of a batch, another script's times, what a trace says."""

import argparse
import re
import subprocess
import sys
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


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


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
    events = [
        event("user_annotation", "bench_step", 0, 10),
        event("user_annotation", "bench_step", 20, 10),
        event("cuda_runtime", "cudaStreamSynchronize", 5, 1),
        event("cuda_runtime", "cudaLaunchKernel", 6, 1),
        event("cuda_runtime", "cudaDeviceSynchronize", 40, 1),  # the profiler's own
        event("kernel", "matmul", 7, 3000),
        event("kernel", "matmul", 27, 1000),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 3, 1),
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 5},
    ]
    found = bench_gpu.counted(events, 2)
    assert found["waits"] == {"cudaStreamSynchronize": 0.5}
    assert (found["kernels"], found["kernel_ms"]) == (1, 2)
    assert found["top"] == [("matmul", 2, 1)]
    assert found["copies"] == {"Memcpy HtoD (Pinned -> Device)": 0.5}


def test_communication_beside_computing_is_what_both_intervals_share():
    on_cpu = [
        event("user_annotation", "bench_step", 0, 9000),
        event("user_annotation", "gloo:all_reduce", 1000, 3000, tid=2),
        event("user_annotation", "gloo:broadcast", 3000, 2000, tid=3),  # 1000 to 5000 in all
        event("cpu_op", "aten::mm", 500, 1000),
        event("cpu_op", "aten::copy_", 600, 100),  # inside of it
        event("cpu_op", "c10d::allreduce_", 2000, 500),  # tells others to
        event("cpu_op", "aten::mm", 4000, 4000),
        event("cpu_op", "aten::add", 2000, 2000, tid=2),  # what gloo does itself
    ]
    assert bench_gpu.communication(on_cpu, 1) == pytest.approx((4.0, 0.5 + 1.0))
    on_gpu = [*on_cpu, event("kernel", "ncclDevKernel_AllGather", 0, 2000, tid=7)]
    on_gpu += [event("kernel", "matmul", 1500, 100, tid=8), event("kernel", "add", 1550, 850, 9)]
    assert bench_gpu.communication(on_gpu, 2) == pytest.approx((1.0, 0.25))


def test_two_ranks_say_how_much_they_communicate(tmp_path):
    """A trace of a real step: gloo's threads are found in it."""
    script = Path(bench_gpu.__file__)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", script]
    flags = ["tiny_cpu", "--device", "cpu", "--flags=--compile 0", "--at", "0"]
    flags += ["--steps", "2", "--settle", "1", "--trace", tmp_path / "trace.json.gz"]
    ended = subprocess.run([sys.executable, *start, *flags], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (line,) = re.findall("communication: .*", ended.stdout)  # of rank 0 alone
    whole, beside = map(float, re.findall(r"[\d.]+(?= ms)", line))
    assert 0 < beside <= whole and (tmp_path / "trace.json.gz").stat().st_size


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
