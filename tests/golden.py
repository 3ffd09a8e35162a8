"""
The golden net: what every preset computes, to the bit. A change that moves a number shows here, and
only one that means to may rewrite tests/golden.json.

    python tests/golden.py                      # compare all with tests/golden.json
    python tests/golden.py golf_loop remix_m    # only runs whose names hold one of these words
    python tests/golden.py --write              # keep the present numbers, and print what moved
    python tests/golden.py --scripts remix_m    # the presets' scripts (logs/script.py) instead

Each preset runs six steps under on_cpu on the shipped text, in fp32 and eagerly, as one process and
as two gloo ranks; Remix also with bfloat16 weights, pre-pre-training and the transfer behind it
too. Kept are every loss and gradient norm (as float.hex()), sha256 and norm of the tensors of
model, optimizer, averages and artifact, and the loss read back.

Where torch, processor and zlib are those that wrote the file, all of it is compared to the bit;
elsewhere losses and norms within the bounds below. MKL and ATen are held to instructions that every
x86-64 has, so most other machines give the same bits as well.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

PORTABLE = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
FILE, ROOT = Path(__file__).with_suffix(".json"), Path(__file__).resolve().parent.parent
LAYERS = {"on_cpu", "one_gpu"}  # configurations that are no presets by themselves
# Relative differences that another machine may show: in losses, weights and averages ...
ELSEWHERE = 1e-5
# ... in what is nearer to zero, or rounded to integers ...
LOOSER = {"grad_norm": 1e-3, "optimizer": 1e-3, "artifact": 1e-4, "roundtrip": 1e-4}
LOOSER |= {"teacher_kl": 1e-2}
# ... and in runs that blow up the last bit: weights in bfloat16, or rounded in training, and a gate
# whose first steps of AdamW have the signs of gradients that are nearly zero.
LOOSEST = {"bfloat16": 2e-3, "golf_cpu qat": 2e-3, "slowrun_tiny": 0.1}
# Set: with the machine's own instructions, as if it were another one. Shows that the bounds hold.
NATIVE = "GOLDEN_NATIVE" in os.environ
STEPS = 6

SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "compile": 0,
    "steps": STEPS,
    "max_seconds": 0,
    "depth": 4,
    "dim": 64,
    "heads": 4,
    "head_dim": 32,
    "seq_len": 128,
    "eval_seq_len": 0,
    "batch_tokens": 1024,
    "micro_tokens": 512,
    "auto_micro": 0,
    "loss_chunk": 200,
    "val_tokens": 1024,
    "eval_every": 3,
    "log_every": 1,
    "save_every": 0,
    "embed_stats": 0,
    "artifact_limit": 0,
    "ema": 0.9,
    "swa_every": 2,
    "swa_start": 0.3,
}
EPOCHS = {
    "epochs": 3,
    "lr_cycles": 1,
    "average_epochs": 2,
    "train_tokens": 16 * 129,
    "shuffle": 2,
    "eval_every": -1,
}
CHAIN = {
    "batch_tokens": "0:1024 2s:2048 4s:1024",
    "cycles": 3,
    "distill_from": 2,
    "fitness_tokens": 300,
    "train_tokens": 8000,
    "shuffle": 2,
    "eval_every": -1,
}
LOOP = {"loop": "1:3"}  # within four blocks
GROUPED = {"kv_heads": 2}
# The speedrun's six blocks instead of eleven, its stages, and documents that are short enough.
RECORD = {
    "head_dim": 16,
    "depth": 6,
    "mlp_ratio": 2,
    "seq_len": "0:64 2s:128",
    "batch_tokens": "0:512 2s:1024",
    "doc_cap": "0:24 2s:48",
    "window": "0:9 2s:25",
    "window_pattern": "SLSSSL",
    "window_long": "0:25 2s:57",
    "eval_window_long": 81,
    "paired_layers": "0,4",
    "no_attn_layers": "3",
    "skip_gate": "1>3",
    "value_layers": "1,4,5",
    "xsa_layers": "1,2",
    "attn_gate_layers": "1,5",
    "x0_layers": "0-2,4",
    "late_input": "3",
    "gate_nets": "0,2",
    "mudd": "x0,3",
    "mudd_final": "x0,3,v1,1",
    "backout": "3:0.5",
    "net_hidden": 16,
    "bigram_rows": 2048,
    "bigram_signs": 64,
    "untie_at": "3s",
    "tail_ema": "0 2s:3",
    "shuffle": 0,
}


MEDIUM = {
    "head_dim": 16,
    "depth": 6,
    "mlp_ratio": 2,
    "seq_len": "0:64 2s:128",
    "batch_tokens": "0:512 2s:1024",
    "doc_cap": 48,
    "window": "0:9 2s:25",
    "window_pattern": "LSSLSL",
    "window_long": "0:25 2s:41 4s:57",
    "eval_window_long": 81,
    "yarn": 41,
    "skip_gate": "2>4 1>5",
    "value_layers": "0-1 4-5=0-1",
    "x0_layers": "0-5",
    "backout": "3:0.5",
    "untie_at": "3s",
    "shuffle": 0,
}


def fitted_lists(preset: str) -> list[str]:
    """What fits lists of blocks beyond a layer's four, as flags, for heads of any width."""
    lists = FITTED[preset] if preset.startswith("speedrun") else {}
    return [w for k, v in lists.items() if k != "head_dim" for w in (f"--{k}", str(v))]


# What a preset needs to keep its mechanisms at this size.
FITTED = {
    "speedrun": RECORD,
    "speedrun_cpu": RECORD | {"doc_cap": 0},
    "speedrun_medium": MEDIUM,
    "remix_a": {"window": 50},
    "remix_m": {"window": 50},
    "golf_baseline": {"export": "int8"} | GROUPED,
    "golf_cpu": {"export": "int6", "export_codec": "entropy", "gptq": 4, "loop": "0:3", "depth": 3}
    | GROUPED,
    "golf_loop": {"export": "int6 mlp:5", "export_codec": "best", "gptq": 4, "final_weights": "ema"}
    | GROUPED
    | LOOP,
    "golf_progressive": {"export": "int6", "depth": 3} | GROUPED,
    "golf_progressive_4h": {"export": "int8", "depth": 3} | GROUPED,
    "slowrun_1h": {"window": 50, "meta_groups": 2} | EPOCHS | LOOP,
    "slowrun_cpu": {"window": 50} | EPOCHS | LOOP,
    "slowrun_pr63": {"window": 50} | EPOCHS | LOOP,
    "slowrun_tiny": {"window": 50, "meta_groups": 2} | EPOCHS,
    "slowrun_two_hour": {"window": "20 1/3:40 2/3:60", "window_long": "40 1/3:80 2/3:129"}
    | EPOCHS
    | LOOP,
    "track3_record": {"tail_ema": "0 0.5:2"},
    "slowrun_unlimited": {"window": 50} | CHAIN | LOOP,
}
# Runs beside the presets' own: name -> (preset, changes).
BESIDE = {
    "remix_a bfloat16": ("remix_a", {"param_dtype": "bfloat16"}),
    "remix_m bfloat16": ("remix_m", {"param_dtype": "bfloat16"}),
    "remix_m in_order": ("remix_m", {"shuffle": 0, "export": "int5", "export_codec": "brotli"}),
    "golf_cpu qat": ("golf_cpu", {"qat": "0 0.5:1"}),
    "centering_cpu mu_centering": ("centering_cpu", {"mu_centering": 1}),
    "centering_cpu mu_loss": ("centering_cpu", {"mu_loss": 0.01}),
    "centering_cpu z_loss": ("centering_cpu", {"z_loss": 1e-4}),
    "track3 momenta": (
        "track3",
        {"maxwell": "0.85 0.98", "maxwell_age": "0 2s:30", "normuon": 0.95, "update_floor": 0.35}
        | {"aurora": "mlp.proj", "polar_norm": "schatten4", "soft_muon": "0 3s>0.5"},
    ),
    "track3 hyperball": ("track3", {"hyperball": 1, "matrix_wd": 0, "proj_init": 1}),
}
NCA = {
    "like": "nca_cpu",
    "nca_grid": 8,
    "nca_filter": "none",
    "nca_sims_per_rule": 1,
    "nca_cache": "",
    "nca_epochs": 1,
    "nca_threads": 1,
    "dim": 64,
    "heads": 4,
    "head_dim": 32,
    "eval_every": 3,
    "adamw_lr": 0.003,
    "device": "cpu",
    "dtype": "float32",
    "compile": 0,
}
GOLDEN = ("--run", "golden")  # whose numbers are kept
NCA_ROW = {"pr63": 252, "paper": 256}  # inputs of a row of at most 256 tokens


def presets() -> list[str]:
    return sorted({p.stem for p in (ROOT / "configs").glob("*.toml")} - LAYERS)


def command(changes: dict) -> list[str]:
    return [word for key, value in changes.items() for word in (f"--{key}", str(value))]


def runs() -> dict[str, list[tuple[str, list[str]]]]:
    """Name of each run -> program and command line of each of its phases, in order."""
    found, phase1 = {}, {}
    for name, (preset, changes) in ({p: (p, {}) for p in presets()} | BESIDE).items():
        flags = SMALL | FITTED.get(preset, {}) | changes
        found[name] = [("train_gpt", ["--config", preset, "on_cpu", *command(flags), *GOLDEN])]
        if "average_epochs" in flags or "cycles" in flags:
            found[name].append(("score", ["logs/golden", "--modes", "", "--sample_tokens", "0"]))
    for compat in ("pr63", "paper"):
        row = NCA_ROW[compat]
        sizes = {
            "nca_seq_len": 256,
            "nca_tokens": 4 * row * STEPS,
            "nca_val_tokens": 4 * row,
            "batch_tokens": 4 * row,
            "micro_tokens": 2 * row,
        }
        phase1[compat] = command(NCA | sizes | {"nca_compat": compat})
        found[f"nca {compat}"] = [("pre_pre_train", [*phase1[compat], *GOLDEN])]
    transfer = SMALL | {"init_from": "logs/phase1", "transfer": "attn"}
    found["nca pr63, then nca_cpu"] = [
        ("pre_pre_train", [*phase1["pr63"], "--run", "phase1"]),
        ("train_gpt", ["--config", "nca_cpu", "on_cpu", *command(transfer), *GOLDEN]),
    ]
    return {
        f"{name}, {world} rank{'s' * (world > 1)}": how
        for name, how in found.items()
        for world in (1, 2)
    }


def scripts(wanted: dict[str, list], without: list[str]) -> dict[str, list]:
    """The training of these runs by scripts, each as its text and the flags that are left."""
    from logs import script

    found, texts = {}, {}
    for name, ((program, argv), *_) in wanted.items():
        if program != "train_gpt":
            continue
        words = tuple(argv[1:])
        if words not in texts:
            print(f"folding {' '.join(words[:2])} ...", flush=True)
            less = ["--without", *without] if without else []
            texts[words] = script.script_of(script.read_request([*words, *less]))
            assert not script.findings(texts[words]), script.findings(texts[words])
        found[name] = [("script", [texts[words], *GOLDEN])]
    return found


########################################
#             One run                  #
########################################


def digest(tensors: dict) -> dict:
    """
    sha256 over names, types, shapes and bytes; and the norm of all floats, for other machines.
    """
    import torch

    sha, squares = hashlib.sha256(), 0.0
    for name, w in sorted(tensors.items()):
        data = w.detach().cpu().contiguous()
        sha.update(
            f"{name} {data.dtype} {list(data.shape)} ".encode()
            + data.view(-1).view(torch.uint8).numpy().tobytes()
        )
        if data.is_floating_point():  # a count of steps would outweigh everything
            squares += float(data.double().square().sum())
    return {"sha256": sha.hexdigest(), "norm": math.sqrt(squares).hex()}


def collect(folder: Path) -> dict:
    """
    The numbers of a finished run: from its metrics, its last checkpoint, its artifact, its result.
    """
    from safetensors.torch import load_file

    import train_gpt

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict = {}
    for key in (
        "train_loss",
        "grad_norm",
        "z_loss",
        "mu_loss",
        "mtp",
        "mtp_next_loss",
        "mtp_third_loss",
        "teacher_kl",
        "val_loss",
        "val_loss_ema",
        "val_loss_swa",
    ):
        values = [r[key].hex() for r in records if key in r and r["kind"] in ("train", "val")]
        found |= {key: values} if values else {}
    checkpoint = train_gpt.checkpoints(folder)[-1]
    for part in ("model", "optimizer", "averages"):
        found[part] = digest(load_file(checkpoint / f"{part}.safetensors"))
    if (folder / "model.nrx").exists():
        found["artifact"] = digest(train_gpt.open_source(str(folder / "model.nrx"))[1])
    result = json.loads((folder / "result.json").read_text())
    read_back = re.compile(
        "roundtrip|loss_prob|loss_weights|loss_ensemble"
    )  # of the artifact, of averages over epochs, of mixtures of snapshots
    kept = {k: v.hex() for k, v in result.items() if read_back.search(k) and v is not None}
    return found | kept


def work(
    program: str, argv: list[str], rank: int, world: int, port: int, folder: Path, last: bool
) -> int:
    """
    The life of one rank of one phase, in a process of its own. Rank 0 of the last phase leaves
    found.json.
    """
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.chdir(folder)
    log = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    import pre_pre_train
    import train_gpt
    from logs import score

    torch.set_num_threads(1)
    pre_pre_train.draw_picture = lambda *how, **more: None  # it takes longer than the run
    programs = {"train_gpt": train_gpt, "pre_pre_train": pre_pre_train, "score": score}
    if program == "script":
        sys.path.insert(0, str(folder))
        programs["script"] = importlib.import_module("script")
        argv = argv[1:]
    code = programs[program].main(argv)
    if code == 0 and rank == 0 and last:
        (folder / "found.json").write_text(json.dumps(collect(folder / "logs" / "golden")))
    return code


def fork(*how) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work(*how)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def measure(wanted: dict[str, list], data: Path, places: int) -> dict[str, dict]:
    """
    Make these runs, about `places` ranks at a time; their numbers. RuntimeError where one fails,
    with what it printed.
    """
    waiting = [(name, 0) for name in sorted(wanted, key=lambda name: name.endswith("2 ranks"))]
    running, found = {}, {}  # one rank before two: so no place is empty while a pair waits for it
    with tempfile.TemporaryDirectory() as temporary:
        try:
            while waiting or running:
                name, phase = waiting[0] if waiting else ("", 0)
                world = 2 if name.endswith("2 ranks") else 1
                if waiting and (not running or len(running) + world <= places):
                    waiting.pop(0)
                    start(wanted[name], phase, Path(temporary) / name, data, world, running, name)
                    continue
                pid, status = os.wait()
                name, phase = running.pop(pid)
                folder = Path(temporary) / name
                if status:
                    said = (folder / "rank0.txt").read_text()[-3000:]
                    raise RuntimeError(f"{name} failed:\n{said}")
                if (name, phase) in running.values():
                    continue  # its other rank
                if phase + 1 < len(wanted[name]):
                    waiting.insert(0, (name, phase + 1))
                else:
                    found[name] = json.loads((folder / "found.json").read_text())
                    shutil.rmtree(folder)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
    return {name: found[name] for name in wanted}


def start(
    phases: list, phase: int, folder: Path, data: Path, world: int, running: dict, name: str
) -> None:
    """Fork the ranks of a phase of a run, and note them in `running`."""
    if phase == 0:
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "sample").symlink_to(data)
        if phases[0][0] == "script":
            (folder / "script.py").write_text(phases[0][1][0], "utf-8")
    port, last = free_port(), phase + 1 == len(phases)
    for rank in range(world):
        running[fork(*phases[phase], rank, world, port, folder, last)] = name, phase


########################################
#               Compare                #
########################################


def machine() -> dict[str, str]:
    """What the last bits depend on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    sets = [word for word in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if word in flags]
    return {
        "torch": torch.__version__,
        "cpu": " ".join([cpu, *sets]),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def numbers(value) -> list[float]:
    """The floats of an entry: of a list of losses, of one loss, or the norm beside a hash."""
    words = value["norm"] if isinstance(value, dict) else value
    return [float.fromhex(word) for word in ([words] if isinstance(words, str) else words)]


def bound_of(name: str, key: str) -> float:
    """The relative difference that an entry of a run may have on another machine."""
    looser = [bound for word, bound in LOOSER.items() if word in key]
    loosest = [bound for word, bound in LOOSEST.items() if word in name]
    return max([ELSEWHERE, *looser, *loosest])


def differences(kept: dict, found: dict, exact: bool, name: str) -> list[str]:
    """One line for each entry of a run that is not what it was."""
    if not kept:
        return [f"{name}: a new run"]
    lines = [
        f"{name}: {key}: {'new' if key in found else 'gone'}"
        for key in sorted(kept.keys() ^ found.keys())
    ]
    for key in (key for key in kept if key in found and kept[key] != found[key]):
        pairs = list(zip(numbers(kept[key]), numbers(found[key]), strict=False))
        far = max((abs(a - b) / max(abs(a), 1e-30) for a, b in pairs), default=math.inf)
        if (
            exact
            or far > bound_of(name, key)
            or len(numbers(kept[key])) != len(numbers(found[key]))
        ):
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
            was, now = pairs[at] if pairs else (math.nan, math.nan)
            lines.append(
                f"{name}: {key}[{at}]: {was:.9g} -> {now:.9g}, relative difference {far:.2g} "
                "at most"
            )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="runs whose names hold one of these; none: all")
    parser.add_argument("--write", action="store_true", help="keep the present numbers")
    parser.add_argument(
        "--list", action="store_true", help="print the runs and their command lines"
    )
    parser.add_argument(
        "--scripts", action="store_true", help="compare the presets' scripts with the file"
    )
    parser.add_argument("--places", type=int, default=2, help="ranks at work at a time")
    parser.add_argument(
        "--without", nargs="+", default=[], help="what these scripts leave out (logs/script.py)"
    )
    flags = parser.parse_args(argv)
    if flags.scripts and flags.write:
        parser.error("--scripts compares with the trainer's numbers: leave --write out")
    wanted = {
        n: how for n, how in runs().items() if not flags.words or any(w in n for w in flags.words)
    }
    if "ranks" in flags.without:
        wanted = {name: how for name, how in wanted.items() if name.endswith(" 1 rank")}
    if flags.list:
        for name, phases in wanted.items():
            print(name, *(f"\n    {program}.py {' '.join(words)}" for program, words in phases))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    began, kept = time.perf_counter(), {"machine": {}, "runs": {}}
    if FILE.exists():
        kept = json.loads(FILE.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "sample"
        subprocess.run(
            [sys.executable, ROOT / "data" / "get.py", "sample", "--out", data],
            check=True,
            capture_output=True,
        )
        import torch._dynamo  # noqa: F401  (before the forks, which would each import it)

        import pre_pre_train  # noqa: F401
        import train_gpt

        train_gpt.parse_args(["--run", "warm"])  # tyro's first parsing is slow
        phases = {name: len(how) for name, how in wanted.items()}
        if flags.scripts:
            wanted = scripts(wanted, flags.without)
        found = measure(wanted, data, flags.places)
    exact = machine() == kept["machine"] and not NATIVE
    before = {name: kept["runs"].get(name, {}) for name in wanted}
    if flags.scripts:  # what a later phase finds is not of the script
        for name in (name for name in wanted if phases[name] > 1):
            before[name] = {k: v for k, v in before[name].items() if k in found[name]}
    moved = [x for name in wanted for x in differences(before[name], found[name], exact, name)]
    gone = sorted(kept["runs"].keys() - runs().keys())
    for line in [*moved, *(f"{name}: no longer a run" for name in gone)]:
        print(line)
    how = "to the bit" if exact else "within bounds, on another machine than the file's"
    print(
        f"{len(found)} runs compared {how}, {len(moved)} entries moved, "
        f"{time.perf_counter() - began:.0f} s"
    )
    if not flags.write:
        return 1 if moved or gone else 0
    runs_kept = (
        {n: found.get(n) or kept["runs"].get(n) for n in runs()}
        if exact or not flags.words
        else None
    )
    if runs_kept is None:
        print(
            "error: this is another machine than the file's: only all runs together can be written",
            file=sys.stderr,
        )
        return 2
    FILE.write_text(json.dumps({"machine": machine(), "runs": runs_kept}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if any(os.environ.get(key) != value for key, value in PORTABLE.items()) and not NATIVE:
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | PORTABLE
        )  # torch reads them when it loads
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
