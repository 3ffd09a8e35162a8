"""On a GPU, and skipped without one: the losses of a CPU, graphs that stay compiled, runs that go
on, artifacts that decode.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, tg, tiny, write_shard

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The shipped text as shards, and its tokenizer."""
    folder = tmp_path_factory.mktemp("text") / "sample"
    python("data/get.py", "sample", "--out", str(folder), cwd=folder.parent)
    return folder


def python(program: str, *argv: str, cwd: Path, code: int = 0) -> str:
    """What a program of the project prints; it must leave with `code`."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, ROOT / program, *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    took, words = time.perf_counter() - began, " ".join([program, *argv])
    print(f"\n{words}: exit code {done.returncode} after {took:.0f} s\n{done.stdout[-1000:]}")
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def train(cwd: Path, text: Path, preset: str, run: str, **changes) -> Path:
    """The folder of a short run of a preset on the text, in fp32 and eagerly unless told else."""
    flags = {
        "run": run,
        "device": DEVICE,
        "dtype": "float32",
        "compile": 0,
        "data": text,
        "tokenizer": text / "tokenizer.model",
        "steps": 12,
        "max_seconds": 0,
        "epochs": 0,
        "average_epochs": 0,
        "lr_cycles": 0,
        "eval_every": 6,
        "save_every": 0,
        "log_every": 1,
        "val_tokens": 8192,
        "export": "",
        "gptq": 0,
        "artifact_limit": 0,
    } | changes
    argv = [w for k, v in flags.items() for w in (f"--{k}", str(v))]
    log = python("train_gpt.py", "--config", *preset.split(), *argv, cwd=cwd)
    assert f"device:{flags['device']}" in log
    return cwd / "logs" / run


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        r[key] for r in records for key in ("train_loss", "val_loss", "val_loss_ema") if key in r
    ]


# what two devices draw differently
CHANCE = {"attn_dropout": 0, "mlp_dropout": 0, "stoch_depth": 0}
PRESETS = [
    ("remix_m on_cpu", {"vocab": 1024}),
    ("remix_a on_cpu", {"vocab": 1024}),
    ("tiny_cpu", {}),
    ("golf_cpu", {}),
    ("slowrun_cpu", CHANCE),
    ("nca_cpu", {}),
    ("centering_cpu", {"vocab": 1024, "z_loss": 1e-4, "mu_loss": 1e-2}),
    ("centering_cpu", {"vocab": 1024, "mu_centering": 1}),
]


@pytest.mark.parametrize("preset,more", PRESETS)
def test_a_gpu_trains_as_a_cpu_does(tmp_path, text, preset, more):
    """Plain, windowed and document attention, grouped heads, loops, gates, MTP, LayerNorm, both
    optimizers.
    """
    found = [
        losses(train(tmp_path, text, preset, run, device=device, **more))
        for run, device in (("a", "cpu"), ("b", DEVICE))
    ]
    # it learns: the comparison is of something that moves
    assert len(found[0]) >= 14 and found[0][-1] < found[0][0] - 0.1
    assert found[1] == pytest.approx(found[0], rel=3e-3)  # the GPU multiplies in TF32


def test_products_in_8_bits_are_those_of_a_cpu():
    """Sizes of a head and an MLP, forward and backward, against a CPU's and plain ones."""
    if not tg.has_fp8(torch.device(DEVICE)):
        pytest.skip("no products in 8 bits before compute capability 8.9")
    rng = torch.Generator().manual_seed(0)
    x, w, slope = (torch.randn(*s, generator=rng) for s in ((256, 768), (3072, 768), (256, 3072)))

    def found(product, device: str) -> list[torch.Tensor]:
        own = [t.to(device, torch.bfloat16).requires_grad_() for t in (x, w)]
        y = product(*own)
        y.backward(slope.to(device, torch.bfloat16))
        return [t.float().cpu() for t in (y.detach(), own[0].grad, own[1].grad)]

    gpu, cpu = (found(tg.fp8_linear, device) for device in (DEVICE, "cpu"))
    plain = found(tg.linear, "cpu")
    for a, b, c in zip(gpu, cpu, plain):
        assert (a - b).norm() < 0.01 * b.norm() and (a - c).norm() < 0.08 * c.norm()


@pytest.mark.parametrize(
    "window,documents,heads", [(0, True, 2), (200, False, 4), (200, True, 2), (1024, True, 4)]
)
def test_flex_attention_equals_plain_matrix_products(window, documents, heads):
    rng = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(DEVICE).requires_grad_()

    q, k, v, slope = (
        made(2, 4, 1024, 64),
        made(2, heads, 1024, 64),
        made(2, heads, 1024, 64),
        made(2, 4, 1024, 64),
    )
    docs = (
        (torch.rand(2, 1024, generator=rng) < 0.01).to(DEVICE).cumsum(1, dtype=torch.int32)
        if documents
        else None
    )
    ways = []
    for attend in (tg.attend_blocks, tg.compiled(tg.attend_flex)):
        y = attend(q, k, v, docs, window, 0.125)
        ways.append((y, *torch.autograd.grad(y, (q, k, v), slope.detach())))
    for plain, flex in zip(*ways):
        torch.testing.assert_close(flex, plain, rtol=2e-2, atol=2e-2)
        assert float((flex - plain).norm() / plain.norm()) < 5e-3


@pytest.mark.parametrize("stance", ["default", "force_eager"])
@pytest.mark.parametrize("window", [0, 1024])
def test_a_model_that_nobody_prepared_reads_rows_of_65536_without_all_their_scores(window, stance):
    """As scores, embeddings and samples make it; all scores of one layer are 103 GB."""
    cfg = tg.Config(depth=1, vocab=1024, doc_token=0, dtype="bfloat16", compile=0)
    model = tg.build_model(cfg, torch.device(DEVICE), torch.bfloat16, 65536)
    with torch.no_grad():
        model.blocks[0].attn.proj.normal_(std=0.05)
        tokens = torch.randint(1, 1024, (1, 65536), generator=torch.Generator().manual_seed(0)).to(
            DEVICE
        )
        tokens[:, 20000] = 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.compiler.set_stance(stance):
            x = model.hidden(tokens, 1, window)
        assert torch.cuda.max_memory_allocated() - before < 16e9
        start = 20000 + 1024  # a row of its own for what the last of these tokens may see
        alone = model.hidden(tokens[:, 20000 : start + 1], 1, window)
    if window:
        alone = alone[:, -1:]
        assert torch.allclose(x[:, start : start + 1].float(), alone.float(), atol=0.05)
    else:
        assert torch.allclose(x[:, 20000 : start + 1].float(), alone.float(), atol=0.05)


STEPS = [
    {"normuon": 0.9, "grad_clip": 1.0, "mu_loss": 0.1, "mu_centering": 1, "doc_mask": 1,
     "window": "64", "ema": 0.9},
    {"optimizer": "adamw", "param_dtype": "bfloat16", "ema": 0.9, "swa_every": 1, "swa_start": 0.0,
     "z_loss": 0.1},
    {"mtp": 0.3, "stoch_depth": 0.5, "attn_dropout": 0.1, "mlp_dropout": 0.1, "unet": 2,
     "loop": "1:2", "repeats": "2", "layer_scale": 1, "value_embeds": 1,
     "own_lr": "skips=0.1/0.5"},
]  # fmt: skip


@pytest.mark.parametrize("compiled", [0, 1])
@pytest.mark.parametrize("changes", STEPS, ids=str)
def test_no_training_step_makes_the_host_wait_for_the_device(tmp_path, changes, compiled):
    for split in ("train", "val"):
        write_shard(
            tmp_path / f"x_{split}_000000.bin", np.random.default_rng(0).integers(0, 96, 16385)
        )
    cfg = tiny(
        data=str(tmp_path),
        device=DEVICE,
        epochs=0,
        export="",
        compile=compiled,
        seq_len="128",
        batch_tokens="1024",
        micro_tokens=512,
        head_dim=32,
        **changes,
    )
    tg.validate(cfg)
    run = tg.Run(cfg)
    run.prepare_machine()
    p = tg.build(cfg, run)
    told = []
    try:
        for step in range(4):
            if step == 2:  # until then graphs are compiled and the allocators grow
                torch.cuda.set_sync_debug_mode("error")
            begun, now = tg.moment(True), p.plan.at(step, step / 20)
            told.append(tg.Reading(*tg.train_step(p, step, now), begun))
            p.avg.update(step + 1, step / 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(x) for reading in told for x in reading.read()[0])


def test_who_reads_a_step_waits_for_no_later_one():
    losses, matrix = torch.tensor([1.0, 2.0], device=DEVICE), torch.eye(8192, device=DEVICE)

    def step(products: int) -> tg.Reading:
        begun, x = tg.moment(True), matrix
        for _ in range(products):  # of 10 ms and more
            x = x @ matrix
        return tg.Reading(losses, x[0, 0], begun)

    # until here libraries are loaded, and pinned memory is there for as many as are unread at once
    assert all(reading.read()[0] == [1, 2, 1] for reading in [step(1) for _ in range(3)])
    early, late = step(1), step(100)
    numbers, seconds = early.read()
    assert numbers == [1, 2, 1] and not late.ended.query()
    assert late.read()[1] > 20 * seconds and late.ended.query()


def test_the_copy_of_the_warm_up_takes_no_memory_of_the_device(tmp_path):
    for split in ("train", "val"):
        write_shard(
            tmp_path / f"x_{split}_000000.bin", np.random.default_rng(0).integers(0, 96, 4097)
        )
    cfg = tiny(data=str(tmp_path), device=DEVICE, epochs=0, export="", dim=512, depth=4)
    run = tg.Run(cfg)
    p = tg.build(cfg, run)
    before = torch.cuda.memory_allocated()
    kept = p.opt.snapshot()
    assert torch.cuda.memory_allocated() - before < 1e6 < sum(t.nbytes for t in kept[1])
    weights = {name: w.detach().clone() for name, w in p.model.named_parameters()}
    tg.warm_up(p)
    assert all(torch.equal(w, weights[name]) for name, w in p.model.named_parameters())


MODES = ("chunked", "sliding", "mixture", "ttt", "lora")


@pytest.mark.parametrize("compiled", [1, 2])
def test_a_run_compiles_before_the_clock_and_its_artifact_decodes(tmp_path, text, compiled):
    """Progressive depth, GPTQ, all codecs; all scores, each proven by a fresh process."""
    folder = train(
        tmp_path,
        text,
        "golf_cpu",
        "golf",
        compile=compiled,
        dtype="bfloat16",
        steps=60,
        micro_tokens=4096,
        export="int6",
        export_codec="best",
        gptq=4,
    )
    log = (folder / "log.txt").read_text()
    assert (
        "\nrecompiles:0\n" in log and len(re.findall(r"^switch:\d+ repeats:[23] ", log, re.M)) == 2
    )

    def score(mode: str) -> dict:
        own = Path(shutil.copytree(folder, tmp_path / "logs" / mode))
        how = ("--modes", mode, "--stride", "256", "--prove_bytes", "600")
        assert "the text came back: proven" in python("logs/score.py", str(own), *how, cwd=tmp_path)
        return json.loads((own / "result.json").read_text())

    with ThreadPoolExecutor() as pool:
        doing = {mode: pool.submit(score, mode) for mode in MODES}
    failed = {mode: str(task.exception()) for mode, task in doing.items() if task.exception()}
    assert not failed, "\n".join(f"== {mode}: {text}" for mode, text in failed.items())
    result = {}
    for task in doing.values():
        result |= task.result()
    assert {"ttt_val_bpb", "lora_val_bpb"} < result.keys() and result["proven_bytes"] == 600
    assert result["roundtrip_val_bpb"] == pytest.approx(result["val_bpb"], rel=0.02)
    assert result["sliding_val_bpb"] == pytest.approx(result["roundtrip_val_bpb"], rel=0.01)
    assert result["mixed_val_bpb"] <= result["sliding_val_bpb"] + 1e-3


def test_a_run_resumed_on_a_gpu_goes_the_same_way(tmp_path, text):
    """With dropout, whose generator lives on the device."""
    folder = train(tmp_path, text, "slowrun_cpu", "whole", save_every=6, ema=0.9)
    whole = losses(folder)
    shutil.copytree(folder, tmp_path / "logs" / "broken")
    broken = tmp_path / "logs" / "broken"
    (broken / "result.json").unlink()
    for checkpoint in (broken / "ckpt").iterdir():
        if int(checkpoint.name) != 6:
            shutil.rmtree(checkpoint)
    (broken / "config.toml").write_text(
        (broken / "config.toml").read_text().replace('run = "whole"', 'run = "broken"')
    )
    said = python("train_gpt.py", "--config", str(broken / "config.toml"), "--resume", cwd=tmp_path)
    assert "at step 6" in said
    assert losses(broken) == pytest.approx(whole, rel=1e-4)


def test_pre_pre_training_and_its_transfer_learn_on_a_gpu(tmp_path, text):
    flags = (
        "--like nca_cpu --nca_grid 8 --nca_band 0.2:0.4 --nca_sims_per_rule 1 --nca_seq_len 256 "
        "--nca_tokens 80640 --nca_val_tokens 8064 --nca_epochs 1 --batch_tokens 4032 "
        f"--micro_tokens 4032 --eval_every 10 --compile 0 --dtype float32 --device {DEVICE} --run "
        "phase1"
    ).split()
    python("pre_pre_train.py", *flags, cwd=tmp_path)
    first = losses(tmp_path / "logs" / "phase1")
    assert first[-1] < first[0] - 1
    folder = train(tmp_path, text, "nca_cpu", "phase2", init_from="logs/phase1", transfer="attn")
    assert losses(folder)[-1] < losses(folder)[0] - 0.1


def test_out_of_memory_is_one_line_with_advice(tmp_path, text):
    tokens = 1 << 20  # their logits are 105 GB in bfloat16 and 211 GB more in float32
    flags = {
        "device": DEVICE,
        "compile": 0,
        "depth": 1,
        "doc_mask": 0,  # for which attention would be compiled
        "data": text,
        "tokenizer": "",
        "vocab": 50304,
        "export": "",
        "shuffle": 1,
        "seq_len": 512,
        "batch_tokens": tokens,
        "micro_tokens": tokens,
        "loss_chunk": tokens,
        "epochs": 0,
        "max_seconds": 0,
        "steps": 2,
        "val_tokens": 8192,
    }
    argv = [w for k, v in flags.items() for w in (f"--{k}", str(v))]
    said = python("train_gpt.py", "--config", "tiny_cpu", *argv, cwd=tmp_path, code=2)
    assert "error: out of memory: halve --micro_tokens" in said and "Traceback" not in said


def test_overhead_of_centering_is_timed_between_events(text):
    said = python(
        "logs/centering.py",
        "overhead",
        "--rounds",
        "10",
        "--config",
        "centering_cpu",
        f"--flags=--device {DEVICE} --data {text} --vocab 1024 --compile 1",
        cwd=text.parent,
    )
    assert (
        "between CUDA events" in said
        and len(re.findall(r"^(?:mu_centering|mu_loss|z_loss) +[+-]", said, re.M)) == 3
    )
