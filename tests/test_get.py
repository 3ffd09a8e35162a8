"""
data/get.py: a data set is whole or absent, held-out text is not trained on, and bytes are those of
the text.

The hub is a server on the loopback interface with the three endpoints that downloads use (revision,
tree, resolve), which can break a connection, send wrong bytes or refuse service. GPT-2's vocabulary
comes from the wheel that conftest.py names.
"""

import errno
import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("get", ROOT / "data" / "get.py")
get = importlib.util.module_from_spec(spec)
spec.loader.exec_module(get)

sys.path.insert(0, str(ROOT))
import train_gpt as trainer  # noqa: E402

UserError, read_shard = get.UserError, get.read_shard


def run(*args):
    """Exit code of the command line, which must never end in a traceback."""
    return get.main([str(arg) for arg in args])


def command_line(script, *args, **environment):
    """The same in a process of its own."""
    environment = os.environ | {key: str(value) for key, value in environment.items()}
    command = [sys.executable, script, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def tokens_of(folder, split):
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(f"*_{split}_*.bin"))])


def documents_of(folder, split, separator):
    """Documents without their separators, cut by a plain loop."""
    documents = []
    for token in tokens_of(folder, split).tolist():
        if token == separator:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def normal(text):
    """What SentencePiece's nmt_nfkc leaves of these texts."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def story(seed, words=60):
    """A short made-up document: with its accents no ASCII, and a number among its dozen words."""
    pick = random.Random(seed)
    vocabulary = [
        "whale",
        "sea",
        "ship",
        "captain",
        "naïve",
        "café",
        "of",
        "the",
        "—",
        "“white”",
        "1851",
    ]
    return " ".join(pick.choice(vocabulary) for _ in range(words)) + f". Story {seed}.\n"


########################################
#                sample                #
########################################


def shipped_lines():
    return lzma.decompress(get.SAMPLE.read_bytes()).decode().splitlines()


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The shipped sample, made once."""
    out = tmp_path_factory.mktemp("sample") / "sample"
    assert run("sample", "--out", out) == 0
    return out


@pytest.fixture
def few(monkeypatch, tmp_path):
    """The sample's text cut to a dozenth, so that it is made in a second."""
    lines = shipped_lines()
    packed = tmp_path / "few.jsonl.xz"
    packed.write_bytes(lzma.compress("\n".join(lines[:6] + lines[233:260]).encode(), preset=0))
    monkeypatch.setattr(get, "SAMPLE", packed)
    return packed


def test_the_shipped_text_is_what_its_readme_says():
    records = [json.loads(line) for line in shipped_lines()]
    names = [record["id"] for record in records]
    assert sum(name.startswith("sotu/") for name in names) == 233
    assert sum(name.startswith("moby/chapter_") for name in names) == 135
    assert len(set(names)) == len({record["text"] for record in records}) == len(records)
    assert get.SAMPLE.stat().st_size < 3_000_000


def test_sample_holds_out_documents_of_all_times_and_both_sources():
    names = [json.loads(line)["id"] for line in shipped_lines()]
    documents = get.sample_documents()
    held = [
        name for name, document in zip(names, documents, strict=True) if document.split == "val"
    ]
    years = [int(name[5:9]) for name in held if name.startswith("sotu/")]
    assert min(years) < 1800 and max(years) > 2000 and max(np.diff(years)) <= 25
    assert sum(name.startswith("moby/") for name in held) >= 5
    train, val = ([d.text for d in documents if d.split == split] for split in ("train", "val"))
    assert 0.04 < len("".join(val).encode()) / len("".join(train + val).encode()) < 0.06
    assert not set(train) & set(val)


def test_the_samples_tokens_bytes_and_val_text_agree(sample):
    manifest = manifest_of(sample)
    assert sorted(contents(sample)) == [
        "manifest.json",
        "sample_train_000001.bin",
        "sample_val_000000.bin",
        "tokenizer.model",
        "val.txt",
    ]
    model = sentencepiece.SentencePieceProcessor(model_file=str(sample / "tokenizer.model"))
    assert model.get_piece_size() == manifest["vocab"] == 1024
    val = [model.decode(document) for document in documents_of(sample, "val", model.bos_id())]
    assert "".join(val).encode() == (sample / "val.txt").read_bytes()
    assert manifest["val"]["bytes"] == (sample / "val.txt").stat().st_size
    assert manifest["val"]["documents"] == len(val) == 19
    train = [model.decode(document) for document in documents_of(sample, "train", model.bos_id())]
    assert manifest["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert not set(train) & set(val)
    held_out = [normal(d.text) for d in get.sample_documents() if d.split == "val"]
    assert val == held_out, "text is lost in tokens"


def test_sample_tokenizer_has_not_seen_validation(few, tmp_path, monkeypatch):
    seen = []
    train_tokenizer = get.train_tokenizer

    def spy(path, texts, vocab):
        seen.extend(texts)
        train_tokenizer(path, seen, vocab)

    monkeypatch.setattr(get, "train_tokenizer", spy)
    assert run("sample", "--out", tmp_path / "out", "--vocab", 400) == 0
    documents = get.sample_documents()
    assert seen == [d.text for d in documents if d.split == "train"] and len(seen) < len(documents)


def test_sample_is_the_same_in_another_process(few, tmp_path, monkeypatch):
    assert run("sample", "--out", tmp_path / "a", "--vocab", 400) == 0
    copy = tmp_path / "data" / "get.py"  # takes the cut text for the shipped one
    copy.parent.mkdir()
    shutil.copy(get.__file__, copy)
    shutil.copy(few, copy.parent / "sample.jsonl.xz")
    environment = {"PYTHONHASHSEED": 7, "PYTHONPATH": ROOT}
    done = command_line(copy, "sample", "--out", tmp_path / "b", "--vocab", 400, **environment)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    monkeypatch.setattr(get, "THREADS", 7)
    assert run("sample", "--out", tmp_path / "c", "--vocab", 400) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "c"), "depends on the number of cores"


def test_sample_again_does_nothing(few, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("sample", "--out", out, "--vocab", 400) == 0
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    capsys.readouterr()
    assert run("sample", "--out", out, "--vocab", 400) == 0
    assert "complete, nothing to do" in capsys.readouterr().out
    assert times == {
        path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"
    }


@pytest.mark.parametrize("name", ["sample_train_000001.bin", "tokenizer.model", "val.txt"])
def test_sample_with_a_spoilt_file_is_made_again(few, tmp_path, name):
    out = tmp_path / "out"
    assert run("sample", "--out", out, "--vocab", 400) == 0
    before = contents(out)
    (out / name).write_bytes(before[name][:-1] + bytes([before[name][-1] ^ 1]))
    assert run("sample", "--out", out, "--vocab", 400) == 0
    assert contents(out) == before


def test_another_data_set_stays_as_it_is(few, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("sample", "--out", out, "--vocab", 400) == 0
    before = contents(out)
    assert run("sample", "--out", out, "--vocab", 500) == 2
    assert "vocab was 400, now 500" in capsys.readouterr().err
    assert contents(out) == before
    assert run("sample", "--out", out, "--vocab", 99999, "--force") == 2
    assert contents(out) == before, "a failure must leave the old data set"
    assert run("sample", "--out", out, "--vocab", 500, "--force") == 0
    assert manifest_of(out)["vocab"] == 500


def test_a_full_disk_leaves_the_old_data_set(few, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run("sample", "--out", out, "--vocab", 400) == 0
    before = contents(out)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(get.os, "fsync", full)
    assert run("sample", "--out", out, "--vocab", 500, "--force") == 2
    assert "No space left on device; free some space" in capsys.readouterr().err
    assert contents(out) == before


def test_what_is_complete_needs_no_lock_and_no_writing(few, hub, tmp_path, capsys):
    """A read-only disk will do, and several processes may ask at once (two ./run.sh)."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    commands = [
        ["sample", "--vocab", 400, "--out", tmp_path / "s"],
        ["tokenize", tmp_path / "a.jsonl", "--tokenizer", "train:340", "--out", tmp_path / "t"],
        ["fineweb10B", "--shards", 1, "--out", tmp_path / "f"],
    ]
    for command in commands:
        assert run(*command) == 0
        (command[-1] / ".lock").unlink()
        capsys.readouterr()
        files = [command[-1], *command[-1].iterdir()]
        times = [path.stat().st_mtime_ns for path in files]
        assert run(*command) == 0
        assert "complete, nothing to do" in capsys.readouterr().out
        assert files == [command[-1], *command[-1].iterdir()]
        assert times == [path.stat().st_mtime_ns for path in files]
        with get.locked(command[-1]):
            assert run(*command) == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        '"x"',
        "[" * 100_000,
        '{"source": {}, "files": []}',
        '{"source": 1, "files": {"a": 1}}',
    ],
)
def test_a_damaged_manifest_is_named(few, tmp_path, capsys, content):
    assert run("sample", "--out", tmp_path, "--vocab", 400) == 0
    whole = manifest_of(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    for command in (
        ["check", tmp_path],
        ["sample", "--out", tmp_path],
        ["to_slowrun", tmp_path, "--out", tmp_path / "x"],
        ["fineweb10B", "--out", tmp_path],
    ):
        assert run(*command) == 2
        assert "manifest.json is damaged or was not written by" in capsys.readouterr().err
    for name in whole:
        if name != "published_split":
            less = {key: value for key, value in whole.items() if key != name}
            (tmp_path / "manifest.json").write_text(json.dumps(less))
            assert run("sample", "--out", tmp_path, "--vocab", 400) == 2
    capsys.readouterr()


def test_a_second_process_waits_for_the_first_but_not_for_ever(tmp_path, monkeypatch, capsys):
    code = (
        "import sys\nfrom logs.start import turn\n"
        "with turn(sys.argv[1], ''):\n print(flush=True)\n input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".lock"],
        cwd=get.ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    monkeypatch.setattr(get, "WAIT_SECONDS", 0.2)
    assert run("sample", "--out", tmp_path) == 2
    said = capsys.readouterr()
    assert (
        f"another process is getting data into {tmp_path}" in said.out
        and "WAIT_SECONDS" in said.err
    )
    monkeypatch.setattr(get, "WAIT_SECONDS", 60)
    threading.Timer(0.5, other.kill).start()  # whoever dies gives the lock back
    with get.locked(tmp_path):
        assert other.wait() == -9


########################################
#               tokenize               #
########################################


@pytest.fixture
def texts(tmp_path):
    """Forty documents, ten .txt and ten each in .jsonl packed in three ways; with their list."""
    folder = tmp_path / "texts"
    folder.mkdir()
    stories = [story(seed) for seed in range(40)]
    for number, text in enumerate(stories[:10]):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}
    for start, (suffix, compress) in zip((10, 20, 30), pack.items(), strict=True):
        lines = "".join(
            json.dumps({"text": text, "n": 1}) + "\n" for text in stories[start : start + 10]
        )
        (folder / f"more.jsonl.{suffix}").write_bytes(compress(lines.encode()))
    return folder, stories


def test_tokenize_gpt2_keeps_every_byte(gpt2_files, texts, tmp_path):
    folder, stories = texts
    assert (
        run("tokenize", folder, "--out", tmp_path / "out", "--tokenizer", "gpt2", "--val_docs", 7)
        == 0
    )
    gpt2 = tiktoken.get_encoding("gpt2")
    sides = {
        split: [gpt2.decode(document) for document in documents_of(tmp_path / "out", split, 50256)]
        for split in ("train", "val")
    }
    assert sorted(sides["train"] + sides["val"]) == sorted(stories)
    assert len(sides["val"]) == 7
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["tokenizer"], manifest["vocab"], manifest["separator"]) == (
        "gpt2",
        50257,
        50256,
    )
    for split, found in sides.items():
        assert manifest[split]["bytes"] == sum(len(text.encode()) for text in found)
    assert (tmp_path / "out" / "val.txt").read_bytes() == "".join(sides["val"]).encode()
    assert run("check", tmp_path / "out") == 0


def test_special_tokens_in_text_are_text(gpt2_files, tmp_path):
    (tmp_path / "a.txt").write_text("one <|endoftext|> two")
    (tmp_path / "b.txt").write_text("three")
    assert (
        run("tokenize", tmp_path, "--out", tmp_path / "out", "--tokenizer", "gpt2", "--val_docs", 1)
        == 0
    )
    assert (
        sum(list(tokens_of(tmp_path / "out", split)).count(50256) for split in ("train", "val"))
        == 2
    )


def test_tokenize_trains_or_takes_a_sentencepiece_model(texts, tmp_path):
    folder, stories = texts
    own, taken = tmp_path / "own", tmp_path / "taken"
    model = own / "tokenizer.model"
    assert run("tokenize", folder, "--out", own, "--tokenizer", "train:340", "--val_docs", 7) == 0
    assert run("tokenize", folder, "--out", taken, "--tokenizer", model, "--val_docs", 7) == 0
    names = ["text_train_000001.bin", "text_val_000000.bin", "tokenizer.model", "val.txt"]
    assert all(contents(own)[name] == contents(taken)[name] for name in names)
    model = sentencepiece.SentencePieceProcessor(model_file=str(model))
    decoded = [
        model.decode(ids) for split in ("train", "val") for ids in documents_of(own, split, 1)
    ]
    assert sorted(decoded) == sorted(normal(text) for text in stories)
    assert run("check", own, taken) == 0


@pytest.mark.parametrize("shard_tokens", [13, 97, 1000])
def test_shards_have_the_exact_size_and_hold_the_same_stream(
    gpt2_files, texts, tmp_path, shard_tokens
):
    folder, _ = texts
    arguments = ["tokenize", *sorted(folder.glob("*.txt")), "--tokenizer", "gpt2", "--val_docs", 2]
    assert run(*arguments, "--out", tmp_path / "one") == 0
    assert run(*arguments, "--out", tmp_path / "many", "--shard_tokens", shard_tokens) == 0
    for split, first in (("train", 1), ("val", 0)):
        shards = sorted((tmp_path / "many").glob(f"*_{split}_*.bin"))
        sizes = [len(read_shard(path)) for path in shards]
        assert set(sizes[:-1]) <= {shard_tokens} and 0 < sizes[-1] <= shard_tokens
        assert [int(path.stem[-6:]) for path in shards] == list(range(first, first + len(shards)))
        np.testing.assert_array_equal(
            tokens_of(tmp_path / "many", split), tokens_of(tmp_path / "one", split)
        )
    assert run("check", tmp_path / "many") == 0


def test_a_replaced_data_set_leaves_no_shard_behind(gpt2_files, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    arguments = ["tokenize", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--tokenizer"]
    assert run(*arguments, "train:340", "--shard_tokens", 5000) == 0
    assert len(list((tmp_path / "out").glob("*.bin"))) > 3
    assert run(*arguments, "gpt2", "--force") == 0
    files = ["manifest.json", "text_train_000001.bin", "text_val_000000.bin", "val.txt"]
    assert sorted(contents(tmp_path / "out")) == files


def test_split_is_stable_and_keeps_doubles_together():
    assert get.HashSplit.key("Call me Ishmael.") == 15590843321583706913, (
        "the same on every machine"
    )
    sides = get.HashSplit(int(0.3 * 2**64))
    before = {seed: sides(story(seed)) for seed in range(200)}
    assert 30 < list(before.values()).count("val") < 90
    for seed, side in before.items():
        assert sides("\n " + story(seed).replace(" ", "  ")) == side, (
            "the tokenizer drops such white space"
        )
        assert sides(story(seed).replace("S", "\N{FULLWIDTH LATIN CAPITAL LETTER S}")) == side


def test_doubles_end_on_one_side(gpt2_files, tmp_path):
    lines = [json.dumps({"text": story(seed % 12)}) for seed in range(36)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert (
        run("tokenize", tmp_path, "--out", tmp_path / "out", "--tokenizer", "gpt2", "--val_docs", 4)
        == 0
    )
    sides = [
        set(map(tuple, documents_of(tmp_path / "out", split, 50256))) for split in ("train", "val")
    ]
    assert [len(side) for side in sides] == [8, 4] and not sides[0] & sides[1]


def test_one_text_file_can_be_cut(gpt2_files, tmp_path):
    (tmp_path / "a.txt").write_text(
        "\n\n".join(story(seed).strip() for seed in range(9)) + "\n\n\n"
    )
    arguments = [
        "tokenize",
        tmp_path,
        "--out",
        tmp_path / "out",
        "--tokenizer",
        "gpt2",
        "--val_docs",
        3,
    ]
    assert run(*arguments) == 2, "one document cannot be on both sides"
    assert run(*arguments, "--split", r"\n\n+") == 0
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["train"]["documents"], manifest["val"]["documents"]) == (6, 3)


def spoil(content):
    return content[: len(content) // 2]


LINES = "".join(json.dumps({"text": story(seed)}) + "\n" for seed in range(300)).encode()


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b" \n\t\n", [], "none of the 0 documents"),
        ("a.jsonl", b"\n\n", [], "none of the 0 documents"),
        ("a.txt", b"text", [], "none of the 1 documents is for"),
        ("a.txt", b"text", ["--val_docs", "1"], "1 different documents"),
        ("a.jsonl", LINES, ["--val_docs", "300"], "300 different documents"),
        ("a.jsonl", LINES, ["--val_docs", "0"], "--val_docs 0"),
        ("a.jsonl", LINES, ["--val_fraction", "1.5"], "--val_fraction 1.5"),
        ("a.jsonl", LINES, ["--val_fraction", "0.1", "--val_docs", "3"], "exclude each other"),
        ("a.jsonl", LINES, ["--shard_tokens", "0"], "--shard_tokens 0"),
        ("a.jsonl", LINES, ["--tokenizer", "train:65537"], "uint16"),
        ("a.jsonl", LINES, ["--tokenizer", "train:5"], "no tokenizer of 5 pieces"),
        ("a.jsonl", LINES, ["--tokenizer", "nowhere.model"], "nowhere.model"),
        ("a.jsonl", LINES, ["--text_field", "body"], "--text_field from its keys: text"),
        ("a.jsonl", LINES + b"[1, 2]\n", [], "a.jsonl, line 301: no text"),
        ("a.jsonl", LINES + b'{"text": \n', [], "a.jsonl, line 301: Expecting value"),
        (
            "a.jsonl",
            LINES + b'{"text": null}\n',
            [],
            'a.jsonl, line 301: "text" is null and no text; leave',
        ),
        (
            "a.jsonl",
            LINES + b'{"text": 7.5}\n',
            [],
            'a.jsonl, line 301: "text" is 7.5 and no text; leave',
        ),
        (
            "a.jsonl",
            LINES + b'{"txt": "a"}\n',
            [],
            'a.jsonl, line 301: no text under "text"; choose',
        ),
        (
            "a.jsonl",
            LINES + b'"text"\n',
            [],
            "a.jsonl, line 301: no text: a line must be a JSON object",
        ),
        (
            "a.jsonl",
            LINES + b"[" * 100_000 + b"\n",
            [],
            "a.jsonl, line 301: maximum recursion depth",
        ),
        ("a.txt", b"text", ["--split", "a{99999999999}"], "no regular expression"),
        ("a.jsonl", LINES, ["--tokenizer", ""], "tokenizer"),
        ("a.jsonl", LINES, ["--tokenizer", "."], "tokenizer"),
        ("a.jsonl", LINES + b'{"text": "\xff"}\n', [], "a.jsonl, line 301, byte 10: not UTF-8"),
        ("a.txt", b"caf\xe9", [], "a.txt, byte 3: not UTF-8"),
        ("a.txt", b"text", ["--split", "("], "no regular expression"),
        ("a.txt", b"text", ["--split", "(a)"], "(?:...)"),
        ("a.pdf", b"text", [], "unknown kind of file"),
        ("a.jsonl.gz", spoil(gzip.compress(LINES)), [], "damaged or cut short"),
        ("a.jsonl.xz", spoil(lzma.compress(LINES)), [], "damaged or cut short"),
        ("a.jsonl.zst", spoil(zstandard.compress(LINES)), [], "damaged or cut short"),
        ("a.txt.zst", b"no archive", [], "damaged or cut short"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_data(
    gpt2_files, tmp_path, capsys, name, content, options, message
):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    tokenizer = [] if "--tokenizer" in options else ["--tokenizer", "gpt2"]
    assert run("tokenize", tmp_path / name, "--out", out, *tokenizer, *options) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() or not contents(out)


def test_missing_input_and_unwritable_output_are_refused(tmp_path, capsys):
    assert (
        run(
            "tokenize", tmp_path / "none.txt", "--out", tmp_path / "out", "--tokenizer", "train:300"
        )
        == 2
    )
    assert "no such file or folder" in capsys.readouterr().err
    assert run("tokenize", "--out", tmp_path / "out", "--tokenizer", "train:300") == 2
    assert "no input" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "out", tmp_path / "file"):
        assert run("sample", "--out", out) == 2
        error = capsys.readouterr().err
        assert f"{out}: " in error and "in the way of a folder" in error
    assert run("from_slowrun", tmp_path) == 2
    assert "fineweb_val.pt: No such file" in capsys.readouterr().err


def test_packed_files_of_several_frames_are_read_whole(tmp_path):
    parts = [LINES[: len(LINES) // 3], LINES[len(LINES) // 3 :]]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
    assert list(get.Reader([tmp_path / "a.jsonl.zst"]).read("")) == [
        story(seed) for seed in range(300)
    ]


@pytest.mark.parametrize(
    "name", ["a.JSONL", "a.ndjson", "a.NDJSON.GZ", "a.Txt", "a.txt.XZ", "a.jsonl.Zst"]
)
def test_suffixes_are_read_in_any_case(tmp_path, name):
    content = LINES if "js" in name.lower() else story(1).encode()
    pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}
    (tmp_path / name).write_bytes(pack.get(name[-3:].lower().lstrip("."), bytes)(content))
    found = list(get.Reader([tmp_path]).read(""))
    assert found == ([story(seed) for seed in range(300)] if "js" in name.lower() else [story(1)])


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zst_with_a_long_window_is_read(tmp_path, window_log):
    how = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=how).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(LINES) + stream.flush())
    assert list(get.Reader([tmp_path]).read("")) == [story(seed) for seed in range(300)]


def test_a_folder_stands_for_the_users_own_files_alone(few, tmp_path, capsys):
    """Not for hidden ones, nor for what get.py wrote: val.txt would be trained on."""
    folder = tmp_path / "texts"
    for name in (
        ".git/a.txt",
        "._a.jsonl",
        ".hidden.txt",
        "x/._b.txt",
        "x/b.txt",
        "a.jsonl",
        "set/mine.txt",
        "other/val.txt",
        "left/building/val.txt",
        "building/c.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(LINES if name.endswith("jsonl") else story(7).encode())
    foreign = folder / "other" / "manifest.json"  # another program's
    foreign.write_text('{"files": {"val.txt": 1}}')
    (folder / "left" / ".lock").touch()  # a process was killed here
    assert run("sample", "--out", folder / "set", "--vocab", 400) == 0
    capsys.readouterr()
    reader = get.Reader([folder])
    own = ["a.jsonl", "building/c.txt", "other/val.txt", "set/mine.txt", "x/b.txt"]
    assert [str(path.relative_to(folder)) for path in reader.paths] == own
    out = capsys.readouterr().out
    assert "left/building/val.txt" in out and "set/val.txt" in out and "mine" not in out
    named = get.Reader([folder / "set" / "val.txt", folder / ".hidden.txt"])
    assert len(named.paths) == 2, "who names a file means it"


@pytest.mark.parametrize("manifest", ["{", '{"files": {}}', None])
def test_the_validation_text_of_a_data_set_without_its_manifest_is_no_input(
    few, tmp_path, capsys, manifest
):
    assert run("sample", "--out", tmp_path / "set", "--vocab", 400) == 0
    (tmp_path / "set" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "set" / "manifest.json").unlink()
    if manifest:
        (tmp_path / "set" / "manifest.json").write_text(manifest)
    capsys.readouterr()
    assert [path.name for path in get.Reader([tmp_path / "set"]).paths] == ["a.jsonl"]
    assert capsys.readouterr().out == f"passed over, as get.py made it: {tmp_path}/set/val.txt\n"


def test_tokenize_into_the_folder_of_the_texts_can_be_repeated(gpt2_files, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    for out in (tmp_path, tmp_path / "below"):
        arguments = ["tokenize", tmp_path, "--out", out, "--tokenizer", "gpt2"]
        assert run(*arguments) == 0
        before = contents(out) if out != tmp_path else manifest_of(out)
        capsys.readouterr()
        assert run(*arguments) == 0
        assert "complete, nothing to do" in capsys.readouterr().out
        assert (contents(out) if out != tmp_path else manifest_of(out)) == before
    train, val = (documents_of(tmp_path, split, 50256) for split in ("train", "val"))
    assert len(train) + len(val) == 300


def test_a_pipe_or_an_unreadable_folder_is_no_input(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.jsonl")
    arguments = ["--out", tmp_path / "out", "--tokenizer", "gpt2"]
    assert run("tokenize", tmp_path / "a.jsonl", *arguments) == 2
    assert "a.jsonl: a pipe or device gives its text once" in capsys.readouterr().err
    assert run("tokenize", tmp_path, "--out", tmp_path / "out", "--tokenizer", "gpt2") == 2
    assert "no input" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_piece_for_a_space_is_refused(sample, tmp_path, capsys):
    """Its spaces would count as three bytes. Seen before anything is written, and by check."""
    raw = (sample / "tokenizer.model").read_bytes()
    space, other = (b"\x0a\x03" + sign.encode() + b"\x15" for sign in ("\u2581", "\uf8ff"))
    spoilt = raw.replace(space, other)
    assert spoilt != raw
    (tmp_path / "bare.model").write_bytes(spoilt)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    arguments = ["--out", tmp_path / "out", "--tokenizer", tmp_path / "bare.model"]
    assert run("tokenize", tmp_path / "a.jsonl", *arguments) == 2
    assert "bare.model' has no piece for a space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("check", sample, "--tokenizer", tmp_path / "bare.model") == 2
    assert "no piece for a space" in capsys.readouterr().err


def test_a_model_that_puts_a_space_before_every_document_counts_right(texts, tmp_path):
    """SentencePiece's default: the first piece of a document starts with a space that decoding
    drops.
    """
    folder, stories = texts
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories),
        model_prefix=str(tmp_path / "prefix"),
        vocab_size=350,
        model_type="bpe",
        add_dummy_prefix=True,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    out, model = tmp_path / "out", tmp_path / "prefix.model"
    assert run("tokenize", folder, "--out", out, "--tokenizer", model, "--val_docs", 9) == 0
    manifest = manifest_of(out)
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == sum(
        len(normal(t).encode()) for t in stories
    )
    assert run("check", out) == 0


def test_a_tokenizer_that_cannot_count_bytes_is_refused(tmp_path, capsys):
    """Without byte fallback, what the model has no piece for decodes to a question mark."""
    text = [story(seed) for seed in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "bare"),
        vocab_size=60,
        model_type="bpe",
        bos_id=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    lines = [json.dumps({"text": f"{line} Ω"}) for line in text]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--out", tmp_path / "out", "--tokenizer", tmp_path / "bare.model", "--val_docs", 5]
    assert run("tokenize", tmp_path / "a.jsonl", *arguments) == 2
    assert "bits per byte would be wrong" in capsys.readouterr().err


########################################
#               slowrun                #
########################################


def test_slowrun_cuts_documents_at_the_budgets(gpt2_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(LINES)
    arguments = [
        "slowrun",
        "--dataset",
        tmp_path / "set",
        "--subset",
        "",
        "--out",
        tmp_path / "out",
    ]
    assert run(*arguments, "--val_tokens", 1000, "--train_tokens", 2500) == 0
    gpt2 = tiktoken.get_encoding("gpt2")
    stream = [
        [50256, *gpt2.encode_ordinary(json.loads(line)["text"])] for line in LINES.splitlines()
    ]
    for split, budget in (("val", 1000), ("train", 2500)):
        expected = []
        while len(expected) < budget:
            expected += stream.pop(0)
        np.testing.assert_array_equal(tokens_of(tmp_path / "out", split), expected[:budget])
    assert run("check", tmp_path / "out") == 0
    capsys.readouterr()
    assert run(*arguments, "--val_tokens", 1000, "--train_tokens", 2_000_000, "--force") == 2
    assert "short of the 2,000,000 for train" in capsys.readouterr().err
    assert manifest_of(tmp_path / "out")["train"]["tokens"] == 2500, (
        "a failure must leave the old data set"
    )


def test_slowruns_own_files_are_read_or_written_otherwise(
    gpt2_files, tmp_path, monkeypatch, capsys
):
    """Both formats, built here by the specification, give the shards that the same tokens gave;
    what is written is the first of them, key by key.
    """
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(LINES)
    arguments = [
        "slowrun",
        "--dataset",
        tmp_path / "set",
        "--subset",
        "",
        "--out",
        tmp_path / "made",
    ]
    assert run(*arguments, "--val_tokens", 1000, "--train_tokens", 2500) == 0
    made = {split: tokens_of(tmp_path / "made", split) for split in ("val", "train")}
    assert run("to_slowrun", tmp_path / "made", "--out", tmp_path / "flat") == 0
    assert sorted(p.name for p in (tmp_path / "flat").iterdir()) == [
        "fineweb_train.pt",
        "fineweb_val.pt",
    ]
    for split, seed in (("val", 42), ("train", 43)):
        flat = torch.load(tmp_path / "flat" / f"fineweb_{split}.pt", weights_only=True)
        assert sorted(flat) == ["bos_id", "doc_starts", "seq_shuffle_seed", "seq_size", "tokens"]
        assert (flat["bos_id"], flat["seq_shuffle_seed"], flat["seq_size"]) == (50256, seed, 2049)
        assert flat["tokens"].dtype == torch.uint16 and flat["doc_starts"].dtype == torch.int64
        np.testing.assert_array_equal(flat["tokens"].numpy(), made[split])
        np.testing.assert_array_equal(
            flat["doc_starts"].numpy(), np.flatnonzero(made[split] == 50256)
        )
    assert run("from_slowrun", tmp_path / "flat", "--out", tmp_path / "again") == 0
    # The older one: rows of 16 in chunks of 4, the last chunk filled up with zeros.
    (tmp_path / "old").mkdir()
    for split, tokens in made.items():
        rows = tokens[: len(tokens) // 16 * 16].reshape(-1, 16)
        counts = [min(4, len(rows) - low) for low in range(0, len(rows), 4)]
        rows = np.concatenate([rows, np.zeros((-len(rows) % 4, 16), np.uint16)])
        chunks = [
            torch.from_numpy(rows[low : low + 4].reshape(-1).copy())
            for low in range(0, len(rows), 4)
        ]
        old = {"chunks": chunks, "valid_counts": counts, "batch_size": 4, "sequence_size": 16}
        torch.save(old, tmp_path / "old" / f"fineweb_{split}.pt")
    assert run("from_slowrun", tmp_path / "old", "--out", tmp_path / "older") == 0
    for split, tokens in made.items():
        np.testing.assert_array_equal(tokens_of(tmp_path / "again", split), tokens)
        np.testing.assert_array_equal(
            tokens_of(tmp_path / "older", split), tokens[: len(tokens) // 16 * 16]
        )
    assert run("check", tmp_path / "again") == 0
    capsys.readouterr()
    torch.save({"model": [1]}, tmp_path / "old" / "fineweb_val.pt")
    assert run("from_slowrun", tmp_path / "old", "--out", tmp_path / "older", "--force") == 2
    assert "fineweb_val.pt is none of slowrun's files" in capsys.readouterr().err
    for tokens, said in (
        (torch.tensor([50256, 5, 50257]), "token 50257 at position 2 is none of GPT-2's 50257"),
        (torch.tensor([[50256, 5], [6, 7]]), "int64 of shape (2, 2)"),
        (torch.tensor([50256.0, 5.0]), "float32 of shape (2,)"),
    ):
        torch.save({"tokens": tokens}, tmp_path / "old" / "fineweb_val.pt")
        assert run("from_slowrun", tmp_path / "old", "--out", tmp_path / "older", "--force") == 2
        assert said in capsys.readouterr().err


def synthetic_set(folder, **tokens):
    """A data set of GPT-2 tokens with one shard a side, documents of 700 tokens."""
    folder.mkdir()
    files, counts = {}, {split: {"tokens": 0, "documents": 0} for split in ("train", "val")}
    for split, count in tokens.items():
        path = folder / f"fineweb_{split}_{int(split == 'train'):06d}.bin"
        stream = np.resize(np.arange(700, dtype=np.uint16), count)
        stream[::700] = 50256
        get.write_shard(path, stream)
        files[path.name] = get.describe(path, 50256)
        counts[split] = {key: files[path.name][key] for key in ("tokens", "documents")}
    get.write_manifest(
        folder,
        {
            "source": {"command": "slowrun"},
            "tokenizer": "gpt2",
            "vocab": 50257,
            "separator": 50256,
            **counts,
            "files": files,
        },
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_slowruns_files_are_written_in_little_memory(tmp_path):
    """100M tokens, 200 MB: no copy of them may be held, mapped or not, and torch's 200 MB not
    imported.
    """
    synthetic_set(tmp_path / "set", train=100_000_000, val=10_000)
    code = """import get, sys
assert get.main(["to_slowrun", "set", "--out", "flat"]) == 0
print("torch" in sys.modules, open("/proc/self/status").read())"""
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "data")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "False Name:" in told
    # not ru_maxrss: that begins with the parent's
    assert int(re.search(r"VmHWM:\s*(\d+) kB", told)[1]) < 150_000
    made = torch.load(tmp_path / "flat" / "fineweb_train.pt", mmap=True, weights_only=True)
    assert made["tokens"].shape == (100_000_000,) and made["tokens"].data_ptr() % 64 == 0
    np.testing.assert_array_equal(made["doc_starts"].numpy(), np.arange(0, 100_000_000, 700))
    np.testing.assert_array_equal(
        made["tokens"][-700:].numpy(), tokens_of(tmp_path / "set", "train")[-700:]
    )


def test_to_slowrun_refuses_a_set_without_validation_or_with_altered_shards(tmp_path, capsys):
    synthetic_set(tmp_path / "set", train=1000)
    assert run("to_slowrun", tmp_path / "set", "--out", tmp_path / "flat") == 2
    assert "has no val tokens" in capsys.readouterr().err
    synthetic_set(tmp_path / "both", train=1000, val=1000)
    get.write_shard(tmp_path / "both" / "fineweb_train_000001.bin", np.zeros(999, np.uint16))
    assert run("to_slowrun", tmp_path / "both", "--out", tmp_path / "flat") == 2
    assert "fineweb_train_000001.bin missing or altered" in capsys.readouterr().err
    assert not (tmp_path / "flat").exists()


########################################
#           Published shards           #
########################################

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GPT2_REPO = "kjj0/fineweb10B-gpt2"


class FakeHub:
    """Repositories of files under the hub's endpoints. `faults` holds what goes wrong in the next
    requests for content: "break" (the connection dies half-way), "corrupt" (one wrong byte), or a
    status code.
    """

    def __init__(self):
        self.files = {}  # (repository, path) -> content
        # paths that git keeps itself: the hub knows their SHA-1 and not their SHA-256
        self.small = set()
        self.faults = []
        self.api_faults = []
        self.requests = []  # (path, first byte) of every request for content
        self.api_requests = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request):
        path = request.path.partition("?")[0]
        if match := re.fullmatch(rf"/datasets/(\w+/[\w-]+)/resolve/{COMMIT}/(.+)", path):
            return self.content(request, match[1], match[2])
        self.api_requests += 1
        if self.api_faults:
            return self.send(request, self.api_faults.pop(0), b"{}")
        match = re.fullmatch(rf"/api/datasets/(\w+/[\w-]+)/(revision/main|tree/{COMMIT})", path)
        if not match or match[1] not in {repo for repo, _ in self.files}:
            return self.send(
                request, 404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"}
            )
        if match[2] == "revision/main":
            return self.send(request, 200, json.dumps({"id": match[1], "sha": COMMIT}).encode())
        tree = [
            self.entry(file, content)
            for (repo, file), content in self.files.items()
            if repo == match[1]
        ]
        return self.send(request, 200, json.dumps(tree).encode())

    def entry(self, path, content):
        entry = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        }
        if path not in self.small:
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    def content(self, request, repo, path):
        fault = self.faults.pop(0) if self.faults else None
        content = self.files[repo, path]
        start = int(re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "bytes=0-"))[1])
        self.requests.append((path, start))
        if isinstance(fault, int):
            return self.send(request, fault, b"")
        body = content[start:]
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        extra = (
            {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        )
        sent = len(body) // 2 if fault == "break" else len(body)
        return self.send(request, 206 if start else 200, body, extra, sent)

    @staticmethod
    def send(request, status, body, headers=None, sent=None):
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body[:sent])
        if sent is not None and sent < len(body):
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def shard(tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    url = fake.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    # 10 MB in truth: less than that is not kept
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(get, "RETRY_WAIT_S", 0.01)
    draw = np.random.default_rng(0)
    for name in ("val_000000", "train_000001", "train_000002", "train_000003"):
        tokens = draw.integers(0, 50256, 40_000)
        tokens[::500] = 50256
        fake.files[GPT2_REPO, f"fineweb_{name}.bin"] = shard(tokens)
    fake.files[GPT2_REPO, "README.md"] = b"hello"
    yield fake
    fake.close()


def published(hub, name):
    return hub.files[GPT2_REPO, f"fineweb_{name}.bin"]


def test_download_then_more_then_offline(hub, tmp_path, capsys):
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 0
    files = ["fineweb_train_000001.bin", "fineweb_val_000000.bin", "manifest.json"]
    assert sorted(contents(tmp_path)) == files
    assert run("fineweb10B", "--shards", 3, "--out", tmp_path) == 0
    assert len(hub.requests) == 4, "no shard comes twice"
    for name in ("val_000000", "train_000001", "train_000002", "train_000003"):
        assert (tmp_path / f"fineweb_{name}.bin").read_bytes() == published(hub, name)
    manifest = manifest_of(tmp_path)
    assert manifest["source"] == {"command": "download", "repo": GPT2_REPO, "commit": COMMIT}
    assert manifest["train"] == {"tokens": 120_000, "documents": 240}
    entry = manifest["files"]["fineweb_train_000002.bin"]
    assert entry["sha256"] == hashlib.sha256(published(hub, "train_000002")).hexdigest()
    hub.close()
    capsys.readouterr()
    assert run("fineweb10B", "--shards", 2, "--out", tmp_path) == 0, "what is here needs no network"
    assert "nothing to do" in capsys.readouterr().out


def test_download_goes_on_where_the_connection_broke(hub, tmp_path):
    hub.faults = [None, "break"]
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 0
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == published(hub, "train_000001")
    starts = [start for path, start in hub.requests if path == "fineweb_train_000001.bin"]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] > 0, (
        "the second request must not start over"
    )


def test_download_goes_on_from_what_a_killed_process_left(hub, tmp_path):
    (tmp_path / "fineweb_train_000001.bin.part").write_bytes(published(hub, "train_000001")[:12345])
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 0
    assert ("fineweb_train_000001.bin", 12345) in hub.requests
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == published(hub, "train_000001")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("left", [b"?" * 12345, b"?" * 81024, b"?" * 99999])
def test_a_spoilt_part_is_thrown_away(hub, tmp_path, left):
    (tmp_path / "fineweb_train_000001.bin.part").write_bytes(left)
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 0
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == published(hub, "train_000001")


def test_wrong_bytes_are_refused_by_their_hash(hub, tmp_path, capsys):
    hub.faults = [None, *["corrupt"] * get.ATTEMPTS]
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 2
    assert "its hash is not the hub's" in capsys.readouterr().err
    assert not list(tmp_path.glob("*train*")) and not (tmp_path / "manifest.json").exists()
    hub.faults = ["corrupt"]
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 0
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == published(hub, "train_000001")


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_busy_hub_is_asked_again(hub, tmp_path, status):
    hub.api_faults = [503]
    hub.faults = [503, status]
    assert run("fineweb10B", "--shards", 0, "--out", tmp_path) == 0
    assert (tmp_path / "fineweb_val_000000.bin").read_bytes() == published(hub, "val_000000")


def test_a_hub_that_stays_down_is_given_up_after_five_attempts(hub, tmp_path, capsys):
    hub.faults = [503] * 50
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert "gave up after 5 attempts" in error and "run the same command again" in error
    assert not (tmp_path / "manifest.json").exists()


def test_a_refusal_is_final(hub, tmp_path, capsys):
    assert run("fineweb100B", "--shards", 1, "--out", tmp_path) == 2
    assert "kjj0/fineweb100B-gpt2" in capsys.readouterr().err
    assert hub.api_requests == 1, "asking again cannot help"


def test_more_shards_than_there_are_is_refused_with_their_number(hub, tmp_path, capsys):
    assert run("fineweb10B", "--shards", 4, "--out", tmp_path) == 2
    assert "has 3 training shards" in capsys.readouterr().err
    assert run("fineweb10B", "--shards", -1, "--out", tmp_path) == 2
    assert not hub.requests


@pytest.mark.parametrize("size", [0, 1000, 81023, 81024])
def test_a_file_that_is_not_the_published_one_is_replaced(hub, tmp_path, capsys, size):
    (tmp_path / "fineweb_train_000001.bin").write_bytes(bytes(size))
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 0
    assert "not the published file" in capsys.readouterr().out
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == published(hub, "train_000001")


def test_a_file_altered_after_the_download_is_found(hub, tmp_path):
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 0
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 0
    assert path.read_bytes() == published(hub, "train_000001")


def test_a_shard_published_broken_is_refused(hub, tmp_path, capsys):
    hub.files[GPT2_REPO, "fineweb_train_000001.bin"] = shard([1, 2, 60000])
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 2
    assert "60000" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_is_told_before_the_download(hub, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(get.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path) == 2
    assert "are to be downloaded" in capsys.readouterr().err
    assert not hub.requests


def test_another_set_in_the_folder_is_kept(hub, tmp_path, few, capsys):
    assert run("sample", "--out", tmp_path / "out", "--vocab", 400) == 0
    before = contents(tmp_path / "out")
    assert run("fineweb10B", "--shards", 1, "--out", tmp_path / "out") == 2
    assert "holds another data set" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_the_command_line_uses_hf_endpoint(hub, tmp_path):
    done = command_line(
        get.__file__, "fineweb10B", "--shards", 1, "--out", tmp_path, HF_ENDPOINT=hub.address
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fineweb_train_000001.bin").read_bytes() == published(hub, "train_000001")
    assert "[2/2] fineweb_train_000001.bin" in done.stdout


@pytest.fixture
def golf_hub(hub, sample):
    """parameter-golf's layout with the sample's tokenizer and a stretch of its tokens."""
    repo, root = "willdepueoai/parameter-golf", "datasets"
    train, val = tokens_of(sample, "train")[:30_000], tokens_of(sample, "val")[:20_000]
    folder = f"{root}/datasets/fineweb10B_sp1024"
    hub.files |= {
        (repo, f"{folder}/fineweb_val_000000.bin"): shard(val),
        (repo, f"{folder}/fineweb_train_000000.bin"): shard(train[:15_000]),
        (repo, f"{folder}/fineweb_train_000001.bin"): shard(train[15_000:]),
        (repo, f"{root}/tokenizers/fineweb_1024_bpe.model"): (
            sample / "tokenizer.model"
        ).read_bytes(),
        (repo, f"{root}/manifest.json"): json.dumps(
            {
                "datasets": [
                    {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024"},
                    {"name": "fineweb10B_byte260", "tokenizer_name": "pure_byte_260"},
                ],
                "tokenizers": [
                    {"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"},
                    {"name": "pure_byte_260", "path": "tokenizers/fineweb_pure_byte_260.json"},
                ],
            }
        ).encode(),
    }
    hub.small.add(f"{root}/manifest.json")
    return hub


def test_golf_brings_shards_and_tokenizer(golf_hub, tmp_path, capsys):
    golf_hub.faults = ["corrupt"]  # of the manifest, whose hash is git's
    assert run("golf", "--shards", 2, "--out", tmp_path) == 0
    assert sorted(contents(tmp_path)) == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
        "tokenizer.model",
        "upstream_manifest.json",
    ]
    manifest = manifest_of(tmp_path)
    assert (manifest["tokenizer"], manifest["vocab"], manifest["separator"]) == (
        "tokenizer.model",
        1024,
        1,
    )
    assert run("check", tmp_path) == 0, "documents that run across shards count once"
    assert run("golf", "--shards", 1, "--out", tmp_path / "few") == 0
    assert not (tmp_path / "few" / "fineweb_train_000001.bin").exists()


def test_golf_refuses_a_tokenizer_before_it_fetches_gigabytes(golf_hub, tmp_path, capsys):
    key = "willdepueoai/parameter-golf", "datasets/tokenizers/fineweb_1024_bpe.model"
    space, other = (b"\x0a\x03" + sign.encode() + b"\x15" for sign in ("\u2581", "\uf8ff"))
    golf_hub.files[key] = golf_hub.files[key].replace(space, other)
    assert run("golf", "--shards", 2, "--out", tmp_path) == 2
    assert "no piece for a space" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"tokenizers": [1], "datasets": []}', b"\xff"]
)
def test_golf_names_a_manifest_in_another_layout(golf_hub, tmp_path, capsys, content):
    golf_hub.files["willdepueoai/parameter-golf", "datasets/manifest.json"] = content
    assert run("golf", "--out", tmp_path) == 2
    assert "upstream_manifest.json is not in parameter-golf's layout" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["sp4096", "byte260"])
def test_golf_names_the_variants_that_exist(golf_hub, tmp_path, capsys, variant):
    assert run("golf", "--variant", variant, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert variant in error and "there are: sp1024" in error
    assert not list(tmp_path.glob("*.bin"))


########################################
#           Shards and check           #
########################################


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 65535), max_size=300), cut=st.integers(1, 1624))
def test_a_written_shard_is_read_and_a_cut_one_refused(tmp_path_factory, tokens, cut):
    path = tmp_path_factory.mktemp("shard") / "a_train_000001.bin"
    get.write_shard(path, np.array(tokens, np.uint16))
    content = path.read_bytes()
    assert content == shard(tokens), "256 int32 and uint16, little-endian"
    assert read_shard(path).tolist() == tokens
    path.write_bytes(content[:-cut])
    with pytest.raises(UserError):
        read_shard(path)


def patched(path, offset, data):
    content = path.read_bytes()
    path.write_bytes(content[:offset] + data + content[offset + len(data) :])


TRAIN = "text_train_000001.bin"
SPOILS = {
    "truncated": (lambda out: (out / TRAIN).write_bytes((out / TRAIN).read_bytes()[:-2]), TRAIN),
    "too long": (
        lambda out: (out / TRAIN).write_bytes((out / TRAIN).read_bytes() + b"\0\0"),
        TRAIN,
    ),
    "empty": (lambda out: (out / TRAIN).write_bytes(b""), TRAIN),
    "magic": (lambda out: patched(out / TRAIN, 0, b"\1"), TRAIN),
    "version": (lambda out: patched(out / TRAIN, 4, b"\2"), TRAIN),
    "id": (lambda out: patched(out / TRAIN, 1030, b"\xff\xff"), "65535"),
    "other token": (
        lambda out: patched(out / TRAIN, 1030, b"\7\0"),
        "not the content that manifest.json",
    ),
    "missing": (lambda out: (out / TRAIN).unlink(), "missing or altered"),
    "text": (lambda out: patched(out / "val.txt", 0, b"?"), "val.txt: missing or altered"),
    "unlisted": (
        lambda out: shutil.copy(out / TRAIN, out / "text_train_000009.bin"),
        "not in manifest.json",
    ),
    "manifest": (lambda out: (out / "manifest.json").write_text("{}"), "manifest.json is damaged"),
}


@pytest.fixture(scope="module")
def small(gpt2_files, tmp_path_factory):
    """A small GPT-2 data set."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "a.jsonl").write_bytes(LINES)
    assert run("tokenize", folder / "a.jsonl", "--out", folder / "out", "--tokenizer", "gpt2") == 0
    return folder / "out"


@pytest.mark.parametrize("name", SPOILS)
def test_check_finds_what_is_spoilt(small, tmp_path, capsys, name):
    out = tmp_path / "out"
    shutil.copytree(small, out)
    assert run("check", out) == 0
    capsys.readouterr()
    spoiler, message = SPOILS[name]
    spoiler(out)
    assert run("check", out) == 2
    assert message in capsys.readouterr().err


def test_check_finds_a_document_on_both_sides(small, tmp_path, capsys):
    for path in small.glob("*.bin"):
        shutil.copy(path, tmp_path)
    assert run("check", tmp_path, "--tokenizer", "gpt2") == 0
    val = read_shard(next(tmp_path.glob("*_val_*"))).tolist()
    get.write_shard(
        tmp_path / "text_train_000002.bin", np.array(val[: val.index(50256, 1)], np.uint16)
    )
    assert run("check", tmp_path, "--tokenizer", "gpt2") == 2
    assert "1 validation documents are also in train" in capsys.readouterr().err


def test_check_reads_what_a_run_reads(small, tmp_path, capsys):
    """A name with both words is of the side it ends with; a copy's name is no shard's."""
    names = {
        "text_train_000001.bin": "pre_val_x_train_000001.bin",
        "text_val_000000.bin": "pre_train_x_val_000000.bin",
    }
    for old, new in names.items():
        shutil.copy(small / old, tmp_path / new)
        shutil.copy(small / old, tmp_path / f"{old[:-4]} (1).bin")
    assert run("check", tmp_path, "--tokenizer", "gpt2") == 0
    out = capsys.readouterr().out
    assert "no run reads: text_train_000001 (1).bin, text_val_000000 (1).bin;" in out
    counts = manifest_of(small)
    for split in ("train", "val"):
        tokens, documents = (counts[split][key] for key in ("tokens", "documents"))
        assert f"{split}: {tokens:,} tokens, {documents:,} documents" in out
        assert [os.path.basename(path) for path in trainer.shard_files(str(tmp_path), split)] == [
            name
            for name in names.values()
            if name.endswith(f"{split}_{int(split == 'train'):06d}.bin")
        ]


@settings(max_examples=300)
@given(
    parts=st.lists(
        st.sampled_from(
            ["x", "_", "train", "val", "_train_", "_val_", "000001", "1", ".bin", " (1)", "\n"]
        ),
        max_size=7,
    )
)
def test_names_of_shards_follow_one_rule(parts):
    name = "".join(parts)
    as_trained = [s for s in ("train", "val") if re.fullmatch(trainer.SHARD_NAME.format(s), name)]
    assert get.side(name) == (as_trained or [""])[0] and len(as_trained) < 2


def test_check_finds_the_wrong_tokenizer(small, sample, capsys):
    assert run("check", small, "--tokenizer", sample / "tokenizer.model") == 2
    assert "is not below vocab = 1024" in capsys.readouterr().err


def test_check_counts_documents_across_shards():
    stream = np.array([5, 6, 1, 7, 1, 1, 8, 9, 1, 3], np.uint16)
    whole = [[5, 6], [1, 7], [1], [1, 8, 9], [1, 3]]
    for size in range(1, 12):
        shards = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [document.tolist() for document in get.documents_of(shards, 1)] == whole


def test_check_takes_one_shard_and_refuses_nothing(small, tmp_path, capsys):
    assert run("check", small / TRAIN) == 0
    assert run("check", tmp_path) == 2
    assert run("check", tmp_path / "none") == 2
    assert run("check") == 2
    assert "nothing to check" in capsys.readouterr().err
