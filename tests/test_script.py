"""logs/script.py: a script has the losses, weights and artifact of the trainer, to the bit."""

import ast
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import golden
import numpy as np
import pytest
import torch
from forks import run_ranks
from helpers import ROOT, tg, write_shard
from safetensors.torch import load_file

from logs import pack, score, script, submit

FLAGS = (
    "--vocab 512 --tokenizer= --doc_token 1 --steps 6 --max_seconds 0 --epochs 0 --batch_tokens "
    "1024 --micro_tokens 512 --seq_len 128 --val_tokens 1024 --eval_every 3 --save_every 3 --keep "
    "9 --log_every 1 --dtype float32 --compile 0 --data tokens"
)
# a preset's net, and the flags that make it small
PRESETS = {
    "remix_m": "remix_m on_cpu --window 32 --softcap 15",
    "golf": "golf_cpu --export int6 --artifact_limit 0 --gptq 2 --export_codec best",
    # and a chain, whose teacher is applied as the model is
    "slowrun": "slowrun_cpu --train_tokens 0 --average_epochs 0 --lr_cycles 0 --export int8 "
    "--repeats 2 --cycles 2 --perturb 0.1 --distill 0.45 --fitness_tokens 300",
    "centering": "centering_cpu --mu_loss 0.1 --z_loss 1e-4 --ema 0.9",
    # on text, as its mask of tokens and its prefixes are of a tokenizer
    "speedrun": "speedrun on_cpu --dim 64 --heads 4 --head_dim 16 --shuffle 0 --export int8 "
    "--eval_seq_len 0",
}


def words_of(name: str) -> list[str]:
    """The preset and all flags of a run."""
    own, flags = shlex.split(PRESETS[name]), shlex.split(FLAGS)
    if name == "speedrun":
        fitted = golden.fitted_lists(name)
        pairs = dict(zip(fitted[::2], fitted[1::2]))
        lists = {k: v for k, v in pairs.items() if k not in (*own, *flags)}
        own += [word for pair in lists.items() for word in pair]
        flags[flags.index("--tokenizer=")] = "--tokenizer=tokens/tokenizer.model"
    return own + flags


@pytest.fixture(scope="module")
def scripts(tmp_path_factory, text):
    """(folder, script) of a preset, made when it is first asked for."""
    made = {}

    def ask(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "speedrun":
                shutil.copytree(text, folder / "tokens")
            else:
                (folder / "tokens").mkdir()
                rng = np.random.default_rng(0)
                shards = {"train_000000": 4000, "train_000001": 700, "train_000002": 16000}
                for part, count in (shards | {"val_000000": 2049}).items():
                    shard = folder / "tokens" / f"x_{part}.bin"
                    write_shard(shard, rng.integers(0, 64, count) ** 2 % 512)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            before = os.getcwd()
            os.chdir(folder)
            try:
                request = script.read_request(words_of(name))
                (folder / "script.py").write_text(script.script_of(request))
            finally:
                os.chdir(before)
            made[name] = folder
        return made[name]

    return ask


def run(folder, *argv, code: int = 0) -> str:
    """What a program prints, started in that folder."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def told(folder, name: str) -> tuple[list[dict], dict, dict]:
    """Losses and norms of every line, final weights, and the figures of result.json."""
    lines = (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()
    numbers = re.compile("loss|bpb|grad_norm|O[.]|H[.]")
    kept = [{k: v for k, v in json.loads(x).items() if numbers.search(k)} for x in lines]
    weights = load_file(folder / "logs" / name / "ckpt" / "000006" / "model.safetensors")
    result = json.loads((folder / "logs" / name / "result.json").read_text())
    return kept, weights, {k: v for k, v in result.items() if re.search("loss|bits|params", k)}


@pytest.fixture(scope="module")
def go(server):
    """go(folder, script, *flags): what a script, or else the trainer, prints, in forks."""

    def start(folder, file, *argv, ranks: int = 1, code: int = 0) -> str:
        how = {"file": folder / file if file else "", "cwd": folder}
        if ranks == 1:
            all_ended = [server.run(*argv, **how)]
        else:
            all_ended = run_ranks(server, ranks, list(argv), **how)
        for ended in all_ended:
            assert ended.code == code, ended.out[-2000:] + ended.err[-4000:]
        return all_ended[0].text

    return start


@pytest.fixture(scope="module")
def trainer(go):
    """trainer(folder, name, run_name): the trainer's run of a preset, if it is not there yet."""

    def start(folder, name: str, run_name: str, ranks: int = 1) -> None:
        if not (folder / "logs" / run_name).exists():
            go(folder, "", "--config", *words_of(name), "--run", run_name, ranks=ranks)

    return start


def same(folder, a: str, b: str) -> None:
    ours, theirs = told(folder, a), told(folder, b)
    assert len(ours[0]) == 9 and ours[0] == theirs[0] and ours[2] == theirs[2]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(w, theirs[1][k]) for k, w in ours[1].items())
    path = folder / "logs" / a / "model.nrx"
    ours, theirs = (
        tg.load_artifact(folder / "logs" / r / "model.nrx")[1] if path.exists() else {}
        for r in (a, b)
    )
    assert all(torch.equal(w, theirs[k]) for k, w in ours.items())
    # how snapshots are applied, for those who score them
    kept, other = (sorted((folder / "logs" / r).glob("snapshots/*/state.json")) for r in (a, b))
    assert [json.loads(x.read_text()) for x in kept] == [json.loads(x.read_text()) for x in other]


@pytest.mark.parametrize("name", PRESETS)
def test_a_script_has_the_trainers_losses_weights_and_artifact_to_the_bit(
    scripts, trainer, go, name
):
    folder = scripts(name)
    trainer(folder, name, "trainer")
    go(folder, "script.py", "--run", "script")
    same(folder, "trainer", "script")


# all that can be left out where weights and artifact shall still be read
LESS = "wandb averages sample gpu signals checks warmup witness schedules"


def less(folder, words: str, name: str) -> str:
    """remix_m's script without these parts, run under this name; its text."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        request = script.read_request([*words_of("remix_m"), "--without", *words.split()])
        text = script.script_of(request)
    finally:
        os.chdir(before)
    (folder / f"{name}.py").write_text(text)
    run(ROOT, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", folder / f"{name}.py")
    return text


def test_what_can_be_left_out_changes_no_number(scripts, trainer, go):
    folder = scripts("remix_m")
    trainer(folder, "remix_m", "trainer")
    text = less(folder, f"{LESS} ranks", "less")
    go(folder, "less.py", "--run", "less")
    same(folder, "trainer", "less")
    gone = "dist. signal. flex_attention on_signal warm_up git_revision Schedule( LIMITS"
    assert not [word for word in gone.split() if word in text]
    assert "assert header[0] == SHARD_MAGIC" in text


def test_without_all_of_it_a_wrong_file_is_an_assertion(scripts, trainer, go):
    folder = scripts("remix_m")
    flags = FLAGS.replace("--save_every 3 --keep 9 ", "")
    request = [
        *PRESETS["remix_m"].split(),
        *shlex.split(flags),
        "--without",
        "resume",
        "export",
        "ranks",
    ]
    before = os.getcwd()
    os.chdir(folder)
    try:
        text = script.script_of(script.read_request([*request, *LESS.split()]))
    finally:
        os.chdir(before)
    (folder / "least.py").write_text(text)
    assert len(text.splitlines()) < 1450 and "UserError" not in text
    go(folder, "least.py", "--run", "least")
    trainer(folder, "remix_m", "trainer")
    lines = [(folder / "logs" / r / "metrics.jsonl").read_text() for r in ("least", "trainer")]
    ours, theirs = ([json.loads(x) for x in some.splitlines()] for some in lines)
    for key in ("train_loss", "val_loss", "grad_norm", "lr", "momentum"):
        assert [x.get(key) for x in ours] == [x.get(key) for x in theirs], key
    (folder / "damaged").mkdir()
    for split in ("train", "val"):
        write_shard(folder / "damaged" / f"x_{split}_000000.bin", range(4000), magic=1)
    said = go(folder, "least.py", "--run", "damaged", "--data", "damaged", code=1)
    assert "assert header[0] == SHARD_MAGIC" in said
    assert "assert not folder.exists()" in go(folder, "least.py", "--run", "least", code=1)


def test_a_script_for_a_gpu_alone_has_nothing_of_a_cpu():
    """It is made and read here, and not run."""
    text = script.script_of(script.read_request(["remix_m", "--without", "cpu"]))
    ast.parse(text)
    for word in ("attend_blocks", "mallopt", "is_cuda", "compiled_on_gpu", "is_compiling"):
        assert word not in text, word
    assert "return flex_attention(" in text and "torch.cuda.synchronize()" in text


@pytest.mark.parametrize("name", ["remix_m", "golf"])  # golf's rows are those of all shards, mixed
def test_a_script_on_two_ranks_is_the_trainer_on_two_ranks(scripts, trainer, go, name):
    folder = scripts(name)
    trainer(folder, name, "trainer2", ranks=2)
    go(folder, "script.py", "--run", "script2", ranks=2)
    same(folder, "trainer2", "script2")


def stopped_at_3(folder, name: str) -> None:
    """The run as one that was stopped behind its third step."""
    (folder / "logs" / name / "result.json").unlink()
    shutil.rmtree(folder / "logs" / name / "ckpt" / "000006")


def test_a_script_that_was_stopped_goes_on_to_the_same_weights(scripts, trainer, go):
    folder = scripts("remix_m")
    trainer(folder, "remix_m", "trainer")
    go(folder, "script.py", "--run", "stopped")
    stopped_at_3(folder, "stopped")
    assert "at step 3" in go(folder, "script.py", "--run", "stopped", "--resume")
    same(folder, "trainer", "stopped")
    stopped_at_3(folder, "stopped")  # and the trainer goes on with what a script has begun
    words = [*words_of("remix_m"), "--run", "stopped", "--resume"]
    assert "at step 3" in go(folder, "", "--config", *words)
    same(folder, "trainer", "stopped")


def test_a_script_refuses_what_the_trainer_refuses(scripts, server, tmp_path):
    shutil.copytree(scripts("golf") / "tokens", tmp_path / "tokens")
    file, logs = scripts("golf") / "script.py", tmp_path / "logs"

    def refused(*flags, **how) -> str:
        ended = server.run(*flags, file=file, cwd=tmp_path, **how)
        assert (ended.code, ended.err.count("error: ")) == (2, 1), ended.text
        return ended.err

    assert "a run's name is a folder's name" in refused("--run", "a/b")
    assert "no UTF-8 text" in refused("--wandb", "\udcff")
    assert "lr = '0:1 1>-1': must lie between" in refused("--lr", "0:1 1>-1")
    nodes = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert "4 ranks, 2 of them here: a script serves one node" in refused(env=nodes)
    nodes = {"WORLD_SIZE": "2"}  # as the trainer takes it
    assert "2 ranks, 1 of them here: a script serves one node" in refused(env=nodes)
    assert "the run of 1 steps ends before it is reached" in refused("--steps", "1")
    assert not logs.exists()
    assert not server.run("--run", "a", file=file, cwd=tmp_path).code
    assert "exists; choose another --run" in refused("--run", "a")
    resumed = ["--run", "a", "--resume"]
    assert "is finished, but under another" in refused(*resumed, "--matrix_lr", "1")
    stopped_at_3(tmp_path, "a")
    assert "matrix_lr: 0.05 -> 1.0" in refused(*resumed, "--matrix_lr", "1")
    saved = logs / "a" / "config.toml"
    config = saved.read_text()
    saved.write_text("z_loss = 0.1\n" + config)  # a field that the script knows nothing of
    assert "  z_loss: 0.1 -> None" in refused(*resumed)
    saved.write_text("z_loss = \n")
    assert "config.toml cannot be read" in refused(*resumed)
    saved.write_text(config)
    shard = tmp_path / "tokens" / "x_train_000002.bin"
    tokens = np.fromfile(shard, "<u2")
    tokens[512:] = tokens[:511:-1].copy()  # behind the header
    tokens.tofile(shard)
    assert "x_train_000002.bin has other content; put the old files back" in refused(*resumed)
    tokens[5000] = 999
    tokens.tofile(shard)
    assert "token 999 at position 4488 is not below vocab" in refused("--run", "b")


@pytest.mark.parametrize("name", PRESETS)
def test_a_script_is_clean_and_imports_nothing_of_the_project(scripts, name):
    text = (scripts(name) / "script.py").read_text()
    settings = ["--config", ROOT / "pyproject.toml"]
    for command in (["check", *settings], ["format", "--check", *settings]):
        run(ROOT, "-m", "ruff", *command, scripts(name) / "script.py")
    imported = {name.split(".")[0] for name in pack.imported(text)}
    assert not imported & {"train_gpt", "pre_pre_train", "logs", "data"}
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert len(text.splitlines()) < 0.75 * len((ROOT / "train_gpt.py").read_text().splitlines())
    assert len(functions) > 100 and ast.get_docstring(tree).count("origin: nanoremix ") == 1


def test_what_a_preset_leaves_off_is_gone(scripts):
    text = (scripts("remix_m") / "script.py").read_text()
    for word in ("xsa", "value_embeds", "Averages", "gptq", "swiglu", "PLACES", "polar_express"):
        assert not re.search(rf"\b(?:self\.|def |class ){word}\b", text), word
    assert "for block in self.blocks:" in text
    assert "PLACES = {" in (scripts("golf") / "script.py").read_text()


def test_an_edit_by_hand_runs_and_its_log_can_be_submitted(scripts, trainer, go):
    folder = scripts("remix_m")
    text = (folder / "script.py").read_text()
    assert text.count("h = F.relu(h)") == 1
    (folder / "edited.py").write_text(text.replace("h = F.relu(h)", "h = F.gelu(h)"))
    go(folder, "edited.py", "--run", "edited")
    trainer(folder, "remix_m", "trainer")
    assert told(folder, "edited")[0] != told(folder, "trainer")[0]
    log = (folder / "logs" / "edited" / "log.txt").read_text()
    assert submit.script_in(submit.head_of(log)) == {
        "train_gpt.py": (folder / "edited.py").read_text()
    }
    config = (folder / "logs" / "edited" / "config.toml").read_text()
    result = json.loads((folder / "logs" / "edited" / "result.json").read_text())
    assert result["config_sha256"] == submit.script_hash(config)
    read = tg.Config(**tg.read_toml(folder / "logs" / "edited" / "config.toml"))
    assert (read.softcap, read.window, read.activation) == (15, "32", "relu2")
    # but another net than the trainer's is not scored by that
    with pytest.raises(tg.UserError, match="section Model was changed by hand"):
        score.opened(score.Source(str(folder / "logs" / "edited")))
    with pytest.raises(tg.UserError, match="section Model was changed by hand"):
        score.opened(score.Source(str(folder / "logs" / "edited" / "ckpt" / "000006")))
    said = re.search(r"^net: sha256 (\w+)", text, re.M)[1]
    assert said == score.net_mark(
        text.replace("beta2) * g", "beta2) * g  #").replace("1e-7", "1e-8")
    )


def test_what_would_do_nothing_is_refused_by_a_script_as_by_the_trainer(scripts, go):
    folder = scripts("remix_m")
    argv = ["--run", "idle", "--weight_decay", "0:1 1>0"]
    said = go(folder, "script.py", *argv, code=2)
    assert "weight_decay = '0:1 1>0' needs a matrix_wd or embed_wd above 0" in said
    assert "--scalar_wd" in go(folder, "script.py", "--run", "idle", "--scalar_wd", "1", code=2)


def test_messages_name_flags_that_a_script_has(scripts):
    text = (scripts("remix_m") / "script.py").read_text()
    (cfg,) = (n for n in ast.parse(text).body if getattr(n, "name", "") == "Config")
    fields = [n for n in cfg.body if isinstance(n, ast.AnnAssign)]
    flags = {n.target.id for n in fields if "ClassVar" not in ast.unparse(n.annotation)}
    assert {"steps", "matrix_lr"} <= flags and "adamw_lr" not in flags
    body = ast.Module(ast.parse(text).body[1:], [])  # without the head, which tells of its making
    said = [n for n in ast.walk(body) if isinstance(n, ast.JoinedStr | ast.Constant)]
    named = [x for n in said for x in re.findall(r"(\S*) --([a-z_0-9]+)", ast.unparse(n))]
    assert ("train_gpt.py's", "vocab") in named and ("another", "run") in named
    for before, name in named:
        there = name in {*flags, "config"} or name not in tg.FIELDS or "sample" in before
        assert there != before.endswith("train_gpt.py's"), (before, name)
    assert "halve Config.micro_tokens or Config.loss_chunk" in text


@pytest.fixture(scope="module")
def golf(tmp_path_factory, text):
    """A folder with text and golf_cpu's packed program, made small; what it was made from."""
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(text, folder / "tokens")
    small = FLAGS.replace("--tokenizer=", "--tokenizer tokens/tokenizer.model")
    preset = f"{PRESETS['golf']} {small} --dim 64 --heads 2 --kv_heads 1 --head_dim 32"
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert pack.main(["--preset", preset, "--out", "packed/train_gpt.py"]) == 0
        yield folder, preset
    finally:
        os.chdir(before)


def test_a_packed_script_trains_scores_and_proves_from_an_empty_folder(golf, go):
    """The trainer has its losses, and the project's own scorer gives its figures to the bit."""
    folder, preset = golf
    file = folder / "packed" / "train_gpt.py"
    assert file.stat().st_size < 36_000
    run(folder, "packed/train_gpt.py", "--run", "a")
    run(folder, "packed/train_gpt.py", "logs.score", "logs/a", "--prove_bytes", "100")
    result = json.loads((folder / "logs" / "a" / "result.json").read_text())
    assert result["code_bytes"] == file.stat().st_size
    shutil.copytree(folder / "logs" / "a", folder / "logs" / "b")
    unscored = {k: v for k, v in result.items() if k not in ("scores", "decoded_bpb")}
    unscored = {k: v for k, v in unscored.items() if "sliding" not in k}
    (folder / "logs" / "b" / "result.json").write_text(json.dumps(unscored))
    flags = "--prove_bytes 100 --sample_tokens 0".split()
    run(folder, ROOT / "logs" / "score.py", "logs/b", *flags)
    again = json.loads((folder / "logs" / "b" / "result.json").read_text())
    assert math.isfinite(result["sliding_val_loss"])
    scores = {k: v["top"] for k, v in again["scores"].items() if k != "compressors"}
    assert scores == {k: v["top"] for k, v in result["scores"].items()} and len(scores) == 2
    go(folder, "", "--config", *shlex.split(preset), "--run", "c")
    theirs = json.loads((folder / "logs" / "c" / "result.json").read_text())
    for key in ("val_loss", "val_loss_ema", "roundtrip_val_loss", "params"):
        assert result[key] == theirs[key], key


def test_a_packed_scripts_log_is_shipped_with_what_it_was_made_from(golf):
    folder, _ = golf
    packed = (folder / "packed" / "train_gpt.py").read_bytes()
    if not (folder / "logs" / "a").exists():
        run(folder, "packed/train_gpt.py", "--run", "a")
    head = submit.head_of((folder / "logs" / "a" / "log.txt").read_text(encoding="utf-8"))
    (shipped,) = submit.script_in(head).values()
    assert pack.bytes_of(shipped) == packed
    readable = (folder / "packed" / "train_gpt_readable.py").read_text()
    assert submit.readable_of(shipped) == {"train_gpt.py": readable}
    assert "class Mixture" not in readable and "class Sliding" in readable
    other = shipped.replace("golf_cpu ", "golf_cpux ", 1)
    assert submit.readable_of(other) == {"train_gpt.py": pack.unpack(other)["train_gpt"]}


def test_a_packed_script_that_fails_names_the_line_of_its_text(golf):
    folder, _ = golf
    (folder / "broken").mkdir()
    text = (folder / "packed" / "train_gpt_readable.py").read_text()
    at = "def main(argv: list[str] | None = None) -> int:\n"
    assert text.count(at) == 1
    text = text.replace(at, at + "    return 1 // len(argv or ())\n")
    packed = pack.pack_program(text, "golf_cpu", "0")
    (folder / "broken" / "train_gpt.py").write_bytes(pack.bytes_of(packed))
    said = run(folder, "broken/train_gpt.py", code=1)
    number, line = re.findall(r"line (\d+), in \w+\n +(.*return 1//.*)\n", said)[0]
    assert line in pack.unpack(packed)["train_gpt"].split("\n")[int(number) - 1]
    assert "ZeroDivisionError" in said


@pytest.mark.parametrize("size", [0, 1, 2, 999, 1000, 1001, 4321])
def test_digits_give_the_bytes_back(size):
    for data in (os.urandom(size), b"\xff" * size):
        text = pack.as_text(data)
        assert pack.from_text(text) == data and len(text) < 1.06 * size + 2
        assert not set(text) & set('"\\\n\r\x00\x85\xa0')


@pytest.mark.parametrize(
    "argv,words",
    [
        ("", "which preset"),
        ("remix_m --keep softcapp", "--keep softcapp: the configuration has no such field"),
        ("remix_m --keep depth", "--keep depth: the script is made for its value"),
        ("golf_cpu --keep export_codec", "--keep export_codec: the script is made for"),
        ("remix_m --init_from logs/a", "a script knows the configuration of its own runs alone"),
        ("remix_m --without wings", "--without wings: what can be left out is resume, wandb"),
        ("golf_cpu --without export", "golf_cpu needs it"),
        ("golf_cpu --without averages", "golf_cpu needs it: ema = 0.99"),
        ("golf_cpu --without sample", "sliding_val_bpb"),
        ("remix_m on_cpu --without cpu", "on_cpu needs it: device = 'cpu'"),
        ("remix_m --without cpu gpu", "then nothing is to run it"),
        ("golf_progressive --without schedules", "depends on repeats"),
        ("remix_n", "no such file and no such preset"),
        ("one_gpu", "one_gpu is a layer"),
        ("remix_m --softcap -1", "softcap = -1.0"),
    ],
)
def test_what_cannot_be_a_script_is_one_line(argv, words, capsys):
    assert script.main(argv.split()) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    "preset,words",
    [
        ("golf_cpu --tokenizer= ", "its [score] table needs a tokenizer"),
        ("golf_cpu --export= --gptq 0 --artifact_limit 0", "export is empty"),
        ("golf_cpu ttt.toml", "modes = 'ttt' train on what they score"),
    ],
)
def test_what_cannot_be_scored_is_not_packed(preset, words, tmp_path, capsys):
    (tmp_path / "ttt.toml").write_text('[score]\nmodes = "ttt"\n')
    preset = preset.replace("ttt.toml", str(tmp_path / "ttt.toml"))
    assert pack.main(["--preset", preset, "--out", str(tmp_path / "x" / "train_gpt.py")]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "preset",
    ['golf_cpu on_cpu --lr "0:1 1>0.1"', "golf_cpu --run 'a b' --arm=\"it's\"", "golf_cpu"],
)
def test_a_packed_file_says_by_which_words_it_is_made_again(preset, monkeypatch):
    """A schedule has spaces, so a flag's value may be several words of one in quotes."""
    monkeypatch.setattr("logs.golf.program_of", lambda request: request.argv)
    monkeypatch.setattr(pack, "program_of", pack.program_of.__wrapped__)  # remembers nothing
    wanted = ["--config", *shlex.split(preset)]
    assert pack.program_of(preset) == wanted
    packed = pack.pack_program("x = 1\n", preset, "0")
    assert pack.program_of(pack.origin_of(packed)[1]) == wanted
    assert pack.pack_program("x = 1\n", pack.origin_of(packed)[1], "0") == packed


@pytest.mark.parametrize(
    "preset,words",
    [
        ('golf_cpu --lr "0:1', "cannot be split into words: No closing quotation"),
        ('golf_cpu --lr "0:1\n1>0"', "'0:1\\n1>0' has a line break"),
    ],
)
def test_words_that_a_packed_file_cannot_say_are_refused(preset, words, tmp_path, capsys):
    assert pack.main(["--preset", preset, "--out", str(tmp_path / "x" / "train_gpt.py")]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not (tmp_path / "x").exists()


def test_the_head_says_a_command_that_can_be_given_again():
    request = script.read_request(["golf_cpu", "--lr", "0:1 1>0.1", "--without", "wandb"])
    head = " ".join(script.header(script.configure(request), request).split())
    assert "`python logs/script.py golf_cpu --lr '0:1 1>0.1' --without wandb` prints it" in head


def test_keep_with_a_number_is_the_trainers_flag():
    request = script.read_request(["remix_m", "--keep", "3", "--keep", "seed", "lr"])
    assert request.argv == ["--config", "remix_m", "--keep", "3"] and request.keep == ["seed", "lr"]


@pytest.mark.parametrize("name", golden.presets())
def test_what_no_schedule_moves_is_in_a_script_as_the_trainer_has_it(name):
    """A cap of 48 tokens is no 48.0, by which nothing can be cut."""
    cfg = tg.parse_args(["--config", name])
    plan = tg.Plan(cfg)
    fixed = script.constant_schedules(cfg, [])
    assert len(fixed) > 5
    for now in (plan.at(0, 0.0), plan.at(cfg.steps, 1.0)):
        for key, value in fixed.items():
            if key in tg.Now._fields and value is not None:
                assert repr(getattr(now, key)) == repr(value), key
