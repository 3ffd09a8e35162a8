"""Get a data set: make one from the shipped text or from own text, or download a published one.
Every command leaves a folder of the same shape, which `train_gpt.py --data FOLDER` reads.

    python data/get.py sample                   # offline: shipped English, 1024-piece tokenizer
    python data/get.py tokenize a.txt b.jsonl.zst --out data/mine --tokenizer gpt2
    python data/get.py tokenize b.jsonl --out data/mine --tokenizer train:4096 --val_docs 100
    python data/get.py fineweb10B --shards 9    # GPT-2 shards; also fineweb100B, finewebedu10B
    python data/get.py golf --variant sp1024    # the 16 MB challenge: its shards and tokenizer
    python data/get.py slowrun                  # FineWeb: 100M tokens, and 10M for validation
    python data/get.py from_slowrun DIR         # the same from the track's own .pt files
    python data/get.py to_slowrun data/slowrun  # and back into such files
    python data/get.py check data/sample        # verify shards, hashes, byte counts, the split

The folder:
    *_val_000000.bin    256 little-endian int32 (20240520, 1, token count, zeros), then uint16
    *_train_000001.bin  tokens: the format of llm.c, modded-nanogpt and parameter-golf. A document
    ...                 is its separator token, then its text; documents run across shards. Six
                        digits end the name: what has another ("x_train_000001 (1).bin") is no
                        shard, and no run reads it.
    tokenizer.model     the SentencePiece model; absent where the tokenizer is gpt2
    val.txt             the validation text byte for byte as it decodes, without separators: its
                        size is what bits per byte divides by; absent where tokens were downloaded
    manifest.json       where all came from; counts, sizes and SHA-256 of every file

Nothing passes for complete that is not: files get their name when they are whole, a download
continues in `NAME.part` and must match the hub's SHA-256, and a data set is finished when it has a
manifest.
"""

import errno
import fnmatch
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import re
import shutil
import sys
import time
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import tyro
import zstandard
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python only looks in data/

from logs.endings import UserError, written_whole  # noqa: E402
from logs.start import WAIT_SECONDS, Overdue, turn  # noqa: E402

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
SHARD_TOKENS = 100_000_000  # what every published set uses
SHARD_NAME = re.compile(r".+_(train|val)_[0-9]{6}\.bin")  # as in train_gpt.py
THREADS = os.cpu_count() or 1
# text tokenised at once: enough to keep all threads busy, little to hold in memory
BATCH_CHARS = 4_000_000

SAMPLE = Path(__file__).with_name("sample.jsonl.xz")
SAMPLE_RULE = "within each source, in order, every 20th document from the third on is validation"


def from_trainer(name: str, *args):
    """What train_gpt.py's function or class of this name returns. Imported late: its torch takes
    seconds and 200 MB, and the command that promises to need little memory has no use for it.
    """
    import train_gpt

    try:
        return getattr(train_gpt, name)(*args)
    except train_gpt.UserError as error:
        raise UserError(str(error)) from None


def side(name: str) -> str:
    """The side of a shard by its name: train or val, the last of them; empty for another name."""
    match = SHARD_NAME.fullmatch(name)
    return match[1] if match else ""


def read_shard(path: str | Path, vocab: int = 0) -> np.ndarray:
    """The tokens of one shard, a read-only uint16 memory map; with vocab > 0 all are below that."""
    return from_trainer("read_shard", path, vocab)


########################################
#              Documents               #
########################################


class Document(NamedTuple):
    text: str
    split: str  # "train" or "val"


def sample_documents() -> list[Document]:
    """The shipped text in its order: State of the Union messages by year, then Moby-Dick by
    chapter, split by SAMPLE_RULE. That gives 5.2 % of the bytes from all of both sources to
    validation. The third, because of the twenty choices it is among those that leak least:
    presidents quote their earlier messages, and 0.2 % of the 80-character windows of these
    documents also occur in a training document.
    """
    documents = []
    before = Counter()  # documents of each source so far
    for line in lzma.decompress(SAMPLE.read_bytes()).decode().splitlines():
        record = json.loads(line)
        source = record["id"].partition("/")[0]
        split = "val" if before[source] % 20 == 2 else "train"
        documents.append(Document(record["text"], split))
        before[source] += 1
    return documents


class ZstReader(io.RawIOBase):
    """The content of a .zst file. zstandard's own reader takes one that was cut short for whole."""

    def __init__(self, raw: BinaryIO):
        self.raw = raw
        self.frame = None  # the decompressor of the frame that has begun and not ended
        self.packed = b""
        self.content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.content:
            self.packed = self.packed or self.raw.read(1 << 17)
            if not self.packed and self.frame is not None:
                raise EOFError("the last frame has no end")
            if not self.packed:
                return 0
            # zstd --long=31 is the most there is; memory is taken for the file's own window only
            unpack = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            self.frame = self.frame or unpack.decompressobj()
            self.content = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        count = min(len(buffer), len(self.content))
        buffer[:count], self.content = self.content[:count], self.content[count:]
        return count


def unpacked(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".xz":
        return lzma.open(raw)
    if suffix == ".zst":
        return io.BufferedReader(ZstReader(raw), 1 << 17)
    return raw


# what unpacking a damaged file raises
DAMAGES = (gzip.BadGzipFile, zlib.error, EOFError, lzma.LZMAError, zstandard.ZstdError)


class Reader:
    """Documents of the user's files, in the order given. A .txt file is one document, or several
    where the regular expression `split` cuts it; a .jsonl or .ndjson file has one a line, under the
    key `text_field`. All may be packed as .gz, .xz or .zst. A folder stands for all such files
    below it, but for hidden ones and for what get.py itself wrote there: its val.txt would put
    validation text into the training text. Blank documents are passed over.

    Raises UserError for a missing file, an unknown suffix, text that is not UTF-8, a line without
    JSON or without text under that key, and a damaged archive.
    """

    def __init__(self, inputs: Iterable[Path], split: str = "", text_field: str = "text"):
        self.text_field = text_field
        self.paths, own, made = [], [], functools.cache(made_in)
        for given in inputs:
            if given.is_dir():
                for path in self.below(given):
                    (own if path.name in made(path.parent) else self.paths).append(path)
            else:
                self.paths.append(self.usable(given))
        if own:
            print(f"passed over, as get.py made it: {', '.join(map(str, own))}")
        if not self.paths:
            raise UserError(
                "no input: name .txt, .jsonl or .ndjson files, or .gz, .xz or .zst of them, or a "
                "folder that holds such files"
            )
        try:
            self.split = re.compile(split) if split else None
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(
                f"--split {split!r} is no regular expression: {error}; "
                r"'\n\n+' cuts at blank lines"
            ) from None
        if self.split and self.split.groups:
            raise UserError(
                f"--split {split!r}: a group would return as text; write (?:...) for (...)"
            )

    @classmethod
    def usable(cls, given: Path) -> Path:
        if not given.exists():
            raise UserError(f"{given}: no such file or folder")
        if not given.is_file():
            raise UserError(
                f"{given}: a pipe or device gives its text once, and it is read several times; "
                "write it to a file first"
            )
        if not cls.kind(given):
            raise UserError(
                f"{given}: unknown kind of file; give .txt, .jsonl or .ndjson, or .gz, .xz or .zst "
                "of them"
            )
        return given

    @classmethod
    def below(cls, folder: Path) -> list[Path]:
        """The files of a known kind below a folder, without hidden ones (also a Mac's ._name)."""

        def refuse(error: OSError) -> None:
            raise error  # a folder that cannot be read would be left out without a word

        found = []
        for parent, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(parent, name) for name in names if not name.startswith(".")]
        return sorted(path for path in found if cls.kind(path) and path.is_file())

    @staticmethod
    def kind(path: Path) -> str:
        """txt or jsonl; empty for any other file."""
        match = re.search(r"\.(txt|jsonl|ndjson)(\.gz|\.xz|\.zst)?$", path.name.lower())
        return match[1].replace("ndjson", "jsonl") if match else ""

    def read(self, title: str) -> Iterator[str]:
        """All texts, with a bar over the bytes of the files as they are stored."""
        total = sum(path.stat().st_size for path in self.paths)
        with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:
            for path in self.paths:
                before = bar.n
                with path.open("rb") as raw:
                    for text in self.texts(path, unpacked(raw, path.suffix.lower())):
                        if text.strip():
                            yield text
                        bar.update(before + raw.tell() - bar.n)

    def texts(self, path: Path, stream: BinaryIO) -> Iterator[str]:
        number = 0
        try:
            if self.kind(path) == "jsonl":
                for line in stream:
                    number += 1
                    if line.strip():
                        yield self.field(json.loads(line.decode("utf-8-sig")))
            else:
                text = stream.read().decode("utf-8-sig")
                yield from self.split.split(text) if self.split else [text]
        except UnicodeDecodeError as error:
            where = f"{path}, line {number}" if number else str(path)
            raise UserError(f"{where}, byte {error.start}: not UTF-8; convert it first") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        except DAMAGES as error:
            raise UserError(f"{path}: damaged or cut short ({error}); fetch it again") from None

    def field(self, record: object) -> str:
        if not isinstance(record, dict):
            raise ValueError(
                f'no text: a line must be a JSON object such as {{"{self.text_field}": "..."}}'
            )
        if self.text_field not in record:
            raise ValueError(
                f'no text under "{self.text_field}"; choose --text_field from its '
                f"keys: {', '.join(record)}"
            )
        text = record[self.text_field]
        if not isinstance(text, str):
            raise ValueError(
                f'"{self.text_field}" is {json.dumps(text)[:40]} and no text; leave '
                "such lines out, or choose another --text_field"
            )
        # JSON can spell lone surrogates, which no tokenizer takes
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class HashSplit:
    """The side of a document, by a hash of what it says and nothing else: adding documents moves no
    other one, and a document that comes twice is on one side. Texts count as the same when they
    differ only in what SentencePiece's nmt_nfkc drops (runs of white space, compatibility forms,
    control characters): then their tokens are the same.
    """

    def __init__(self, threshold: int):
        self.threshold = threshold  # of the hashes 0 to 2**64 - 1 those below it are validation

    def __call__(self, text: str) -> str:
        return "val" if self.key(text) < self.threshold else "train"

    @staticmethod
    def key(text: str) -> int:
        return hash64(normalizer()(text).encode())

    @classmethod
    def of(cls, reader: Reader, val_fraction: float | None, val_docs: int | None) -> Self:
        """About `val_fraction` of the documents, or the `val_docs` with the smallest hashes."""
        if val_fraction is not None and val_docs is not None:
            raise UserError("--val_fraction and --val_docs exclude each other; keep one")
        if val_docs is None:
            fraction = 0.05 if val_fraction is None else val_fraction
            if not 0 < fraction < 1:
                raise UserError(
                    f"--val_fraction {fraction:g}: give a share of the documents between 0 and 1"
                )
            return cls(int(fraction * 2**64))
        keys = sorted({cls.key(text) for text in reader.read("counting documents")})
        if not 0 < val_docs < len(keys):
            raise UserError(
                f"--val_docs {val_docs}: the input has {len(keys)} different documents, and each "
                r"side needs one; a .txt file can be cut, at blank lines by --split '\n\n+'"
            )
        return cls(keys[val_docs])


@functools.cache
def normalizer() -> Callable[[str], str]:
    import sentencepiece

    return sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False
    ).normalize


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


########################################
#              Tokenizer               #
########################################


class Encoder:
    """gpt2 (tiktoken) or a SentencePiece model by path, with what counts its bytes. Raises
    UserError if it cannot be loaded, has more ids than uint16 holds, or has no separator token.
    """

    def __init__(self, name: str):
        self.name = name
        try:
            if name == "gpt2":
                import tiktoken

                self.model = tiktoken.get_encoding("gpt2")
                self.vocab, self.separator = self.model.n_vocab, self.model.eot_token
            else:
                import sentencepiece

                self.model = sentencepiece.SentencePieceProcessor()
                # not by its name, which may have bytes that are no UTF-8
                self.model.LoadFromSerializedProto(Path(name).read_bytes())
                self.vocab, self.separator = self.model.get_piece_size(), self.model.bos_id()
        except (OSError, RuntimeError, ValueError) as error:
            remedy = "give gpt2 or the path of a SentencePiece model"
            if name == "gpt2":
                remedy = "tiktoken downloads two files once; offline put them in TIKTOKEN_CACHE_DIR"
            raise UserError(f"tokenizer {name} cannot be loaded: {error}; {remedy}") from None
        if self.vocab > 65536:
            raise UserError(
                f"tokenizer {name} has {self.vocab} ids and shards hold uint16: at most 65536"
            )
        if self.separator < 0:
            raise UserError(
                f"tokenizer {name} has no BOS piece to start documents with; train one that has"
            )
        tokenizer = from_trainer("Tokenizer", name, self.vocab, self.separator)
        self.base_bytes, self.leading_space, self.boundary = tokenizer.tables()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Documents as uint16: the separator, then the text, where nothing is a special token."""
        if self.name == "gpt2":
            ids = self.model.encode_ordinary_batch(texts, num_threads=THREADS)
        else:
            ids = self.model.encode(texts, num_threads=THREADS)
        return [np.array([self.separator, *document], np.uint16) for document in ids]

    def decode(self, document: np.ndarray) -> bytes:
        """The text of a document behind its separator, as bytes: it may end within a character."""
        ids = document[1:].tolist()
        if self.name == "gpt2":
            return self.model.decode_bytes(ids)
        return self.model.decode(ids, out_type=bytes)

    def count_bytes(self, document: np.ndarray) -> int:
        """Bytes of text by the pieces alone, as parameter-golf counts them: a leading space counts
        unless the token before is a boundary (a control token).
        """
        spaces = self.leading_space[document[1:]] & ~self.boundary[document[:-1]]
        return int(self.base_bytes[document].sum(dtype=np.int64)) + int(spaces.sum())


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines for SentencePiece's trainer, which skips those above 4,192 bytes and stops at NUL."""
    for text in texts:
        for sentence in re.split(r"(?<=[.!?;:])\s+|\n+", text.replace("\0", " ")):
            for start in range(0, len(sentence), 1000):  # 1,000 characters are at most 4,000 bytes
                yield sentence[start : start + 1000]


def train_tokenizer(path: Path, texts: Iterable[str], vocab: int) -> None:
    """A SentencePiece BPE model with parameter-golf's arguments (its
    data/download_hf_docs_and_tokenize.py). Above 2 million sentences, trains on a seeded sample of
    that many. The same texts give the same file.

    Raises UserError if the texts allow no such vocabulary.
    """
    import sentencepiece

    if not 0 < vocab <= 65536:
        raise UserError(f"vocabulary of {vocab}: shards hold uint16, so give 1 to 65536")
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            hard_vocab_limit=False,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            minloglevel=2,
            # not THREADS: it is stored in the model, whose hash would depend on the machine
            num_threads=4,
        )
    except RuntimeError as error:
        raise UserError(
            f"no tokenizer of {vocab} pieces can be trained on this text: {error}"
        ) from None
    with written_whole(path) as file:
        file.write(model.getvalue())


########################################
#        The data set's folder         #
########################################


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """One shard of uint16 tokens, fewer than 2**31."""
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with written_whole(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, "<u2"))


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path, separator: int) -> dict:
    """A file's entry in a manifest: bytes, SHA-256, of a shard also tokens and document starts."""
    entry = {"size": path.stat().st_size, "sha256": file_hash(path)}
    if side(path.name):
        tokens = read_shard(path)
        entry |= {"tokens": len(tokens), "documents": int(np.count_nonzero(tokens == separator))}
    return entry


MANIFEST = {
    "source": dict,
    "tokenizer": str,
    "vocab": int,
    "separator": int,
    "train": dict,
    "val": dict,
    "files": dict,
}


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a data set; None if the folder has none.

    Raises UserError for a file of that name that is not one.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if is_manifest(manifest):
            return manifest
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        pass
    raise UserError(
        f"{path} is damaged or was not written by data/get.py; remove it and get the data again"
    )


def is_manifest(found: object) -> bool:
    """Whether all is there that this program takes from a manifest."""

    def holds(what: object, keys: dict[str, type]) -> bool:
        return isinstance(what, dict) and all(isinstance(what.get(k), t) for k, t in keys.items())

    counts = {"tokens": int, "documents": int}
    of_file = {"size": int, "sha256": str}
    if not holds(found, MANIFEST) or not all(holds(found[s], counts) for s in ("train", "val")):
        return False
    return all(
        holds(entry, of_file | counts if side(name) else of_file)
        for name, entry in found["files"].items()
    )


def write_manifest(folder: Path, manifest: dict) -> None:
    with written_whole(folder / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def altered_files(folder: Path, entries: dict) -> list[str]:
    """Names among a manifest's entries whose file is missing or has another content."""
    altered = []
    for name, entry in file_bar(entries.items(), "checking hashes"):
        path = folder / name
        as_long = path.is_file() and path.stat().st_size == entry["size"]
        if not as_long or file_hash(path) != entry["sha256"]:
            altered.append(name)
    return altered


def file_bar(files: Iterable, title: str) -> Iterable:
    """The files with a bar, which shows where they take longer than a second."""
    return tqdm(files, desc=title, unit="file", leave=False, delay=1)


def summary(manifest: dict) -> str:
    """One line of counts."""
    parts = []
    for split in ("train", "val"):
        counts = manifest[split]
        size = f", {counts['bytes']:,} bytes" if "bytes" in counts else ""
        parts.append(
            f"{split} {counts['tokens']:,} tokens, {counts['documents']:,} documents{size}"
        )
    return "; ".join(parts) + f"; vocabulary {manifest['vocab']:,}"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the folder if need be and keeps other processes of this program out of it: they wait,
    and then find the data set there. So nodes that share a folder get it once.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with turn(out / ".lock", f"getting data into {out}", WAIT_SECONDS):
            yield
    except Overdue as error:
        raise UserError(str(error)) from None


def made_in(folder: Path) -> Container[str]:
    """Files in a folder that this program made: its manifest's, and what a killed process left.
    Where that is damaged or gone, shards tell a data set from texts of one's own.
    """
    if folder.name == "building" and (folder.parent / ".lock").exists():
        return os.listdir(folder)
    with suppress(UserError):  # damaged, or another program's of the same name
        if manifest := read_manifest(folder):
            return manifest["files"]
    return ("val.txt",) if shards_in(folder) else ()


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.bin") if side(path.name))


def nothing_to_do(out: Path, source: dict, force: bool) -> bool:
    """Whether `out` holds the data set of this source whole and unaltered. Asked before `out` is
    locked, and nothing is written: a disk may be read-only, several processes may ask at once.
    """
    manifest = None if force else read_manifest(out)
    if manifest is None or manifest["source"] != source or altered_files(out, manifest["files"]):
        return False
    print(f"{out} is complete, nothing to do: {summary(manifest)}")
    return True


def complete(out: Path, source: dict, force: bool) -> bool:
    """True if `out`, now locked, holds the data set of this source whole and unaltered; False if it
    is to be made.

    Raises UserError where making it would replace another one and `force` does not allow that.
    """
    if force:
        return False
    manifest = read_manifest(out)
    remedy = "give another --out, or --force to replace it"
    if manifest is None:
        if shards_in(out):
            raise UserError(f"{out} holds shards without a manifest; {remedy}")
        return False
    old = manifest["source"]
    change = [
        f"{key} was {old.get(key)}, now {source.get(key)}"
        for key in old | source
        if old.get(key) != source.get(key)
    ]
    if change:
        raise UserError(f"{out} holds another data set ({'; '.join(change)}); {remedy}")
    altered = altered_files(out, manifest["files"])
    if altered:
        print(f"{out}: {', '.join(altered)} missing or altered; making the data set again")
        return False
    print(f"{out} is complete, nothing to do: {summary(manifest)}")
    return True


class DataSet:
    """A data set being made: documents go in, shards of `shard_tokens` come out, the last with the
    rest.

    Everything is written in `out/building` and moved into place at the end, so that nobody reads
    half a data set and an error leaves the one that is to be replaced as it was.
    """

    def __init__(self, out: Path, prefix: str, shard_tokens: int):
        if not 0 < shard_tokens < 2**31:
            raise UserError(
                f"--shard_tokens {shard_tokens}: the count is an int32, so give 1 to 2147483647"
            )
        self.out, self.prefix = out, prefix
        self.building = out / "building"
        shutil.rmtree(self.building, ignore_errors=True)
        self.building.mkdir()
        self.model = self.building / "tokenizer.model"
        self.buffers, self.counts, self.hashes = {}, {}, {}
        for split in ("train", "val"):
            self.buffers[split] = np.empty(shard_tokens, np.uint16)
            self.counts[split] = {"tokens": 0, "documents": 0, "bytes": 0}
            self.hashes[split] = array("Q")  # of the documents' tokens
        self.files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error) -> None:
        shutil.rmtree(self.building)

    def fill(self, tokenizer: Encoder, documents: Iterable[tuple[Document, np.ndarray]]) -> None:
        """Takes all documents, tokenised. Raises UserError if a side gets none, or if the
        tokenizer's pieces do not count the bytes of the text.
        """
        self.tokenizer = tokenizer
        with (self.building / "val.txt").open("wb") as val_text:
            for document, tokens in documents:
                size = tokenizer.count_bytes(tokens)
                if document.split == "val":
                    text = tokenizer.decode(tokens)
                    val_text.write(text)
                    if len(text) != size:
                        raise UserError(
                            f"tokenizer {tokenizer.name}: a document has {size} bytes by pieces, "
                            f"{len(text)} as it decodes, so bits per byte would be wrong; use a "
                            f"byte_fallback model (the document starts {document.text[:40]!r})"
                        )
                self.add(document.split, tokens, size)
        total = sum(counts["documents"] for counts in self.counts.values())
        for split, counts in self.counts.items():
            if not counts["documents"]:
                raise UserError(
                    f"none of the {total} documents is for {split}; give more text, cut it by "
                    "--split, or set the share: --val_docs 1 keeps one document for validation"
                )
            if rest := counts["tokens"] % len(self.buffers[split]):
                self.write(split, self.buffers[split][:rest])

    def add(self, split: str, tokens: np.ndarray, size: int) -> None:
        counts = self.counts[split]
        counts["documents"] += 1
        counts["bytes"] += size
        self.hashes[split].append(hash64(tokens.tobytes()))
        buffer = self.buffers[split]
        while len(tokens):
            start = counts["tokens"] % len(buffer)
            piece, tokens = tokens[: len(buffer) - start], tokens[len(buffer) - start :]
            buffer[start : start + len(piece)] = piece
            counts["tokens"] += len(piece)
            if counts["tokens"] % len(buffer) == 0:
                self.write(split, buffer)

    def write(self, split: str, tokens: np.ndarray) -> None:
        # val counts from 0 and train from 1, as in every set of modded-nanogpt
        number = sum(side(path.name) == split for path in self.files) + (split == "train")
        path = self.building / f"{self.prefix}_{split}_{number:06d}.bin"
        write_shard(path, tokens)
        self.files.append(path)

    def finish(self, source: dict, published_split: bool = False) -> dict:
        """Moves everything into place, manifest last, and returns the manifest.

        Raises UserError if a document is on both sides, unless the split is not ours to choose.
        """
        shared = len(np.intersect1d(self.hashes["train"], self.hashes["val"]))
        if shared and not published_split:
            raise UserError(
                f"{shared} validation documents equal a training document in tokens; drop them"
            )
        own_model = [self.model] if self.model.exists() else []
        files = [*sorted(self.files), self.building / "val.txt", *own_model]
        manifest = {
            "source": source,
            "published_split": published_split,
            "tokenizer": "tokenizer.model" if own_model else "gpt2",
            "vocab": self.tokenizer.vocab,
            "separator": self.tokenizer.separator,
            **self.counts,
            "files": {path.name: describe(path, self.tokenizer.separator) for path in files},
        }
        (self.out / "manifest.json").unlink(missing_ok=True)  # from here on there is no data set
        (self.out / "tokenizer.model").unlink(missing_ok=True)
        for path in shards_in(self.out):
            path.unlink()
        for path in files:
            os.replace(path, self.out / path.name)
        write_manifest(self.out, manifest)
        print(f"{self.out}: {summary(manifest)}")
        return manifest


def encoded(
    documents: Iterable[Document], tokenizer: Encoder
) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents with their tokens. Batches of BATCH_CHARS or so go to the libraries' threads."""
    batch, chars = [], 0

    def flush():
        return zip(batch, tokenizer.encode([document.text for document in batch]), strict=True)

    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield from flush()
            batch, chars = [], 0
    yield from flush()


########################################
#      sample, tokenize, slowrun       #
########################################


def make(
    out: Path,
    prefix: str,
    source: dict,
    fill: Callable[[DataSet], None],
    force: bool,
    shard_tokens: int = SHARD_TOKENS,
    published_split: bool = False,
) -> dict | None:
    """Make a data set by fill(data); its manifest, or None where `out` holds it already."""
    if nothing_to_do(out, source, force):
        return None
    with locked(out):
        if complete(out, source, force):
            return None
        with DataSet(out, prefix, shard_tokens) as data:
            fill(data)
            return data.finish(source, published_split)


def sample(out: Path = Path("data/sample"), vocab: int = 1024, force: bool = False) -> None:
    """Make the shipped sample, offline: 12 MB of public-domain English, and its own tokenizer.

    Args:
        out: Folder of the data set.
        vocab: Pieces of the SentencePiece model.
        force: Replace whatever data set is there.
    """

    def fill(data: DataSet) -> None:
        documents = sample_documents()
        train_tokenizer(data.model, (d.text for d in documents if d.split == "train"), vocab)
        tokenizer = Encoder(str(data.model))
        bar = tqdm(documents, desc="tokenising", unit="document")
        data.fill(tokenizer, encoded(bar, tokenizer))

    text = {"text_sha256": file_hash(SAMPLE), "rule": SAMPLE_RULE}
    make(out, "sample", {"command": "sample", **text, "vocab": vocab}, fill, force)


def tokenize(
    inputs: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path,
    tokenizer: str,
    val_fraction: float | None = None,
    val_docs: int | None = None,
    split: str = "",
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    force: bool = False,
) -> None:
    r"""Make a data set from own text: .txt (a document) and .jsonl (one a line), also packed.

    Args:
        inputs: Files, or folders that hold such files; also as .gz, .xz or .zst.
        out: Folder of the data set.
        tokenizer: gpt2, path of a SentencePiece model, or train:VOCAB, trained on the train part.
        val_fraction: Share of the documents for validation, by hash of their text; else 0.05.
        val_docs: Number of different documents for validation, instead of a share.
        split: Regular expression that cuts .txt files into documents; '\n\n+' cuts at blank lines.
        text_field: Key of the text in .jsonl lines.
        shard_tokens: Tokens in a shard.
        force: Replace whatever data set is there.
    """
    reader = Reader(inputs, split, text_field)
    sides = HashSplit.of(reader, val_fraction, val_docs)
    # the source is what the files hold, not their names or dates: copies give the same data set
    bar = tqdm(reader.paths, desc="hashing input", unit="file", leave=False)
    source = {
        "command": "tokenize",
        "input_sha256": [file_hash(path) for path in bar],
        "split": split,
        "text_field": text_field,
        "val_below": sides.threshold,
        "tokenizer": tokenizer,
        "shard_tokens": shard_tokens,
    }
    trained = re.fullmatch(r"train:(\d+)", tokenizer)
    if not trained and tokenizer != "gpt2":
        Encoder(tokenizer)  # what is wrong with it is said before anything is written
        source["tokenizer"] = file_hash(Path(tokenizer))

    def fill(data: DataSet) -> None:
        if trained:
            texts = reader.read("training the tokenizer")
            kept = (text for text in texts if sides(text) == "train")
            train_tokenizer(data.model, kept, int(trained[1]))
        elif tokenizer != "gpt2":
            shutil.copyfile(tokenizer, data.model)
        model = Encoder("gpt2" if tokenizer == "gpt2" else str(data.model))
        documents = (Document(text, sides(text)) for text in reader.read("tokenising"))
        data.fill(model, encoded(documents, model))

    make(out, "text", source, fill, force, shard_tokens)


# what the track trains on, and the training documents in the files that it publishes
SLOWRUN = {
    "command": "slowrun",
    "dataset": "HuggingFaceFW/fineweb",
    "subset": "sample-10BT",
    "val_tokens": 10_000_000,
    "train_tokens": 100_000_000,
}
SLOWRUN_DOCUMENTS = 143_651


def slowrun(
    out: Path = Path("data/slowrun"),
    train_tokens: int = 100_000_000,
    val_tokens: int = 10_000_000,
    dataset: str = "HuggingFaceFW/fineweb",
    subset: str = "sample-10BT",
    force: bool = False,
) -> None:
    """Make the slowrun's data: FineWeb in its published order as GPT-2 tokens, validation first,
    then train.

    Args:
        out: Folder of the data set.
        train_tokens: Tokens to train on; the rules say 100,000,000.
        val_tokens: Tokens for validation; the rules say 10,000,000.
        dataset: Data set on the hub, or a local folder of .jsonl or .parquet files.
        subset: Its configuration; empty for none.
        force: Replace whatever data set is there.
    """
    if train_tokens < 1 or val_tokens < 1:
        raise UserError(
            f"--train_tokens {train_tokens} --val_tokens {val_tokens}: both must be at least 1"
        )
    budgets = {"val": val_tokens, "train": train_tokens}

    def fill(data: DataSet) -> None:
        tokenizer = Encoder("gpt2")
        documents = encoded(hub_documents(dataset, subset), tokenizer)
        data.fill(tokenizer, cut_to_budgets(documents, budgets))

    source = {
        "command": "slowrun",
        "dataset": dataset,
        "subset": subset,
        "val_tokens": val_tokens,
        "train_tokens": train_tokens,
    }
    made = make(out, "fineweb", source, fill, force, published_split=True)
    # slowrun publishes SHA-256 of files by torch.save, whose bytes change with torch's version: no
    # such hash can be had from token streams. The number of training documents can be compared.
    if made and source == SLOWRUN and made["train"]["documents"] != SLOWRUN_DOCUMENTS:
        print(
            f"warning: {made['train']['documents']:,} training documents, and slowrun's files have "
            f"{SLOWRUN_DOCUMENTS:,}: FineWeb has changed, so losses cannot be compared with the "
            "leaderboard"
        )


def hub_documents(dataset: str, subset: str) -> Iterator[Document]:
    """The texts of a data set on the hub in its order, for no side yet, read as they arrive."""
    import datasets

    try:
        rows = datasets.load_dataset(dataset, name=subset or None, split="train", streaming=True)
        for row in rows:
            yield Document(row["text"], "")
    except Exception as error:  # of datasets or of an HTTP client, after their own retries
        if isinstance(error, OSError) and error.errno in OWN_FAULTS:
            raise
        raise UserError(
            f"{dataset} cannot be read ({type(error).__name__}: {error}); see that the name is "
            "right and the network is up, then run the command again"
        ) from error


def cut_to_budgets(
    documents: Iterable[tuple[Document, np.ndarray]], budgets: dict[str, int]
) -> Iterator[tuple[Document, np.ndarray]]:
    """The first budgets["val"] tokens for validation, those of the documents after for train, as
    slowrun's prepare_data.py cuts them: the last document of each side ends at the budget, and the
    rest of it is dropped.

    Raises UserError if the documents end first.
    """
    stream = iter(documents)
    for split, budget in budgets.items():
        left = budget
        with tqdm(total=budget, unit="token", unit_scale=True, desc=f"tokenising {split}") as bar:
            while left:
                document, tokens = next(stream, (None, None))
                if document is None:
                    raise UserError(
                        f"the data set ended {left:,} tokens short of the {budget:,} for {split}; "
                        f"lower --{split}_tokens or name a larger --subset"
                    )
                tokens = tokens[:left]
                left -= len(tokens)
                bar.update(len(tokens))
                yield Document(document.text, split), tokens


def slowrun_stream(path: Path, vocab: int) -> np.ndarray:
    """The tokens of one of the track's own files, checked and as uint16, mapped from the disk where
    it can be: `tokens` in one piece (since April 2026), or before that `chunks` of batch_size rows
    of sequence_size tokens, of which valid_counts are rows and the rest is filling. Read with
    weights_only, so that no code in the file is run.
    """
    import torch

    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if "tokens" in found:
            return as_uint16(found["tokens"].numpy(), vocab, path)
        rows, length = int(found["batch_size"]), int(found["sequence_size"])
        chunks = [chunk.numpy().reshape(rows, length) for chunk in found["chunks"]]
        counts = [int(n) for n in found["valid_counts"]]
        if len(counts) != len(chunks) or not all(0 <= n <= rows for n in counts):
            raise UserError(
                f"{path}: {len(chunks)} chunks of {rows} rows, but valid_counts is {counts[:5]}..."
            )
        whole = np.concatenate([chunk[:n].ravel() for chunk, n in zip(chunks, counts)])
        return as_uint16(whole, vocab, path)
    except (OSError, EOFError, UserError):
        raise
    except Exception as error:  # torch's unpickler and zip reader have half a dozen of their own
        raise UserError(
            f"{path} is none of slowrun's files ({type(error).__name__}: {str(error)[:200]}): it "
            "must hold tokens, or chunks, valid_counts, batch_size and sequence_size"
        ) from error


def as_uint16(tokens: np.ndarray, vocab: int, path: Path) -> np.ndarray:
    """One stream of token ids below vocab, of whatever integers they were.

    Raises UserError where they are no such stream.
    """
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(
            f"{path}: its tokens are {tokens.dtype} of shape {tokens.shape}, and must be whole "
            "numbers in one row; make the file again with slowrun's prepare_data.py"
        )
    for low in range(0, len(tokens), 1 << 22):
        piece = tokens[low : low + (1 << 22)]
        wrong = np.flatnonzero((piece < 0) | (piece >= vocab))
        if len(wrong):
            raise UserError(
                f"{path}: token {piece[wrong[0]]} at position {low + wrong[0]} is none of GPT-2's "
                f"{vocab}; make the file again with slowrun's prepare_data.py"
            )
    return tokens.astype(np.uint16, copy=False)


def from_slowrun(
    folder: tyro.conf.Positional[Path], /, out: Path = Path("data/slowrun"), force: bool = False
) -> None:
    """Make a data set from slowrun's own fineweb_train.pt and fineweb_val.pt, in either format.

    Args:
        folder: Where the two files are.
        out: Folder of the data set.
        force: Replace whatever data set is there.
    """
    paths = {split: folder / f"fineweb_{split}.pt" for split in ("val", "train")}
    hashes = {split: file_hash(path) for split, path in paths.items()}

    def documents(tokenizer: Encoder) -> Iterator[tuple[Document, np.ndarray]]:
        for split, path in paths.items():
            stream = slowrun_stream(path, tokenizer.vocab)
            for tokens in documents_of([stream], tokenizer.separator):
                yield Document("", split), np.ascontiguousarray(tokens)

    def fill(data: DataSet) -> None:
        tokenizer = Encoder("gpt2")
        data.fill(tokenizer, documents(tokenizer))

    source = {"command": "from_slowrun", **hashes}
    make(out, "fineweb", source, fill, force, published_split=True)


def to_slowrun(
    folder: tyro.conf.Positional[Path] = Path("data/slowrun"), /, out: Path = Path("fineweb_data")
) -> None:
    """Write slowrun's own fineweb_train.pt and fineweb_val.pt (the format in one piece) from a data
    set of GPT-2 tokens. The tokens are copied in pieces and torch is not imported: 100M tokens pass
    in 61 MB of memory.

    Args:
        folder: Folder of the data set.
        out: Where the two files go.
    """
    manifest = read_manifest(folder)
    if not manifest or manifest["tokenizer"] != "gpt2":
        raise UserError(
            f"{folder} has no manifest of GPT-2 tokens; run: python data/get.py slowrun"
        )
    sides = {"val": {}, "train": {}}
    for name, entry in manifest["files"].items():
        if side(name):
            sides[side(name)][name] = entry
    for split, shards in sides.items():
        if not sum(entry["tokens"] for entry in shards.values()):
            raise UserError(
                f"{folder} has no {split} tokens; slowrun reads both sides: get a data set that "
                "has them"
            )
        if altered := altered_files(folder, shards):
            raise UserError(
                f"{folder}: {', '.join(altered)} missing or altered; get the data set again"
            )
    out.mkdir(parents=True, exist_ok=True)
    for (split, shards), seed in zip(sides.items(), (42, 43)):  # the seeds of slowrun's own files
        write_slowrun(out / f"fineweb_{split}.pt", folder, shards, manifest["separator"], seed)


def write_slowrun(path: Path, folder: Path, shards: dict, separator: int, seed: int) -> None:
    """One of slowrun's files, of the tokens of a data set's shards."""
    total = sum(entry["tokens"] for entry in shards.values())
    starts = array("q")
    for low, piece in token_pieces(folder, shards):
        starts.extend((low + np.flatnonzero(piece == separator)).tolist())
    content = {
        "tokens": FlatTensor("0", "uint16", total),
        "doc_starts": FlatTensor("1", "int64", len(starts)),
        "bos_id": separator,
        "seq_shuffle_seed": seed,
        "seq_size": 2049,
    }
    pieces = (piece for _, piece in token_pieces(folder, shards))
    with written_whole(path) as file, zipfile.ZipFile(file, "w") as archive:
        add_record(archive, "archive/data.pkl", [torch_pickle(content)])
        add_record(archive, "archive/byteorder", [b"little"])
        add_record(archive, "archive/data/0", pieces, 2 * total)
        add_record(archive, "archive/data/1", [np.array(starts, "<i8")])
        add_record(archive, "archive/version", [b"3\n"])
    print(f"{path}: {total:,} tokens, {len(starts):,} documents")


def token_pieces(folder: Path, shards: Iterable[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of these shards' tokens, at most 4 MB each, with their places in the stream. They are
    read, not mapped: pages of a map count as memory of the process for as long as it stands.
    """
    at = 0
    for name in shards:
        with (folder / name).open("rb") as file:
            file.seek(4 * HEADER_INTS)
            while raw := file.read(1 << 22):
                yield at, np.frombuffer(raw, "<u2")
                at += len(raw) // 2


class FlatTensor(NamedTuple):
    """A tensor of one dimension in a file of torch.save: its record, what it holds, how many."""

    key: str
    dtype: str  # uint16 or int64
    size: int


def torch_pickle(content: dict) -> bytes:
    """data.pkl as torch.save writes it, of numbers and FlatTensors by name. Made without torch: its
    functions are only named, never called.
    """

    def plain(value) -> bytes:
        return pickle.dumps(value, 2)[2:-1]  # without the mark of the protocol and the stop

    def tensor(t: FlatTensor) -> bytes:
        if t.dtype == "int64":  # a dtype from before torch 2.3: its storage has a class of its own
            rebuild, dtype = b"_rebuild_tensor_v2\n", b""
            storage, count = b"ctorch\nLongStorage\n", t.size
        else:  # one from after it is named, behind an untyped storage
            rebuild, dtype = b"_rebuild_tensor_v3\n", b"ctorch\nuint16\n"
            storage, count = b"ctorch.storage\nUntypedStorage\n", 2 * t.size
        where = plain("storage") + storage + plain(t.key) + plain("cpu") + plain(count)
        shape = plain(0) + plain((t.size,)) + plain((1,)) + plain(False)  # offset, size, stride
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n" + rebuild + b"((" + where + b"tQ" + shape + hooks + dtype + b"tR"

    items = b""
    for key, value in content.items():
        items += plain(key) + (tensor(value) if isinstance(value, FlatTensor) else plain(value))
    return b"\x80\x02}(" + items + b"u."


def add_record(archive: zipfile.ZipFile, name: str, pieces: Iterable, size: int = 0) -> None:
    """One stored record, its content at a multiple of 64 bytes: so a map of it is aligned."""
    info, large = zipfile.ZipInfo(name), size > (1 << 30)
    content = archive.fp.tell() + 30 + len(name) + (20 if large else 0) + 4
    padding = -content % 64
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"\0" * padding
    with archive.open(info, "w", force_zip64=large) as record:
        for piece in pieces:
            record.write(piece)


########################################
#           Published shards           #
########################################

ATTEMPTS = 5
RETRY_WAIT_S = 1.0  # before the second attempt; doubles with each
# a retry mends none
OWN_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class HubFile(NamedTuple):
    path: str  # within the repository
    size: int  # bytes
    hash: str  # SHA-256 for large (LFS) files, git's SHA-1 of the blob for small ones


def with_retries(what: str, action: Callable[[], object]) -> object:
    """The action's result, tried up to ATTEMPTS times while the network or the hub fails. Raises
    UserError if it goes on failing, or at once where the hub refuses: no such name, no access.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    for attempt in count(1):
        try:
            return action()
        except UserError:
            raise
        # the errors are those of the HTTP client, which has changed twice
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OWN_FAULTS:
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if isinstance(error, OfflineModeIsEnabled):
                raise UserError(f"{what}: HF_HUB_OFFLINE forbids the network; unset it") from error
            if 400 <= status < 500 and status not in (408, 429):
                raise UserError(
                    f"{what}: the hub refuses ({reason}); see that the name is right, and that "
                    "HF_TOKEN is set if the repository is private"
                ) from error
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{what}: {reason}; gave up after {ATTEMPTS} attempts; run the same command "
                    "again to go on from what is here (HF_ENDPOINT chooses a mirror)"
                ) from error
            wait = RETRY_WAIT_S * 2 ** (attempt - 1)
            print(f"{what}: {reason}; trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)


def hub_listing(repo: str, revision: str) -> tuple[str, dict[str, HubFile]]:
    """The commit that a revision of a data set repository stands for, and its files by path."""
    from huggingface_hub import HfApi, RepoFile

    api = HfApi()
    what = f"the list of files of {repo}"
    commit = with_retries(what, lambda: api.dataset_info(repo, revision=revision).sha)

    def tree() -> list:
        entries = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
        return [entry for entry in entries if isinstance(entry, RepoFile)]

    files = {}
    for f in with_retries(what, tree):
        files[f.path] = HubFile(f.path, f.size, f.lfs.sha256 if f.lfs else f.blob_id)
    return commit, files


def is_published(path: Path, file: HubFile) -> bool:
    """Whether a local file has the content of the hub's."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if len(file.hash) == 64:
        return file_hash(path) == file.hash
    return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.hash


def download(repo: str, commit: str, file: HubFile, path: Path) -> None:
    """One file, through `path.part`, which a killed download leaves and the next one continues.

    huggingface_hub reads the stream, continues it where the connection breaks and draws the bar.
    hf_hub_download would begin anew in a new process, check no hash and give up at a 503.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = path.with_name(path.name + ".part")
    url = hf_hub_url(repo, file.path, repo_type="dataset", revision=commit)
    # packed bytes could not be continued
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}

    def attempt() -> None:
        with part.open("ab") as stream:
            if stream.tell() > file.size:
                stream.truncate(0)
                stream.seek(0)
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=path.name,
            )
            stream.flush()
            os.fsync(stream.fileno())
        if not is_published(part, file):
            part.unlink()
            raise ValueError("arrived damaged, its hash is not the hub's")
        os.replace(part, path)

    with_retries(f"{repo}/{file.path}", attempt)


def fetch(out: Path, repo: str, commit: str, wanted: dict[str, HubFile]) -> None:
    """Downloads those files (by local name) that `out` lacks as published, if the disk has room."""
    missing = {}
    for name, file in file_bar(wanted.items(), "checking what is here"):
        if not is_published(out / name, file):
            missing[name] = file
            if (out / name).exists():
                print(f"{out / name} is not the published file (size or hash): fetching it again")
    parts = [out / f"{name}.part" for name in missing]
    begun = sum(part.stat().st_size for part in parts if part.exists())
    needed = sum(file.size for file in missing.values()) - begun
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: {needed / 1e9:.1f} GB are to be downloaded and {free / 1e9:.1f} GB free; ask "
            "for fewer --shards or give an --out on a larger disk"
        )
    for number, (name, file) in enumerate(missing.items(), 1):
        print(f"[{number}/{len(missing)}] {name}", flush=True)
        download(repo, commit, file, out / name)


def chosen_shards(
    listing: dict[str, HubFile], folder: str, prefix: str, shards: int, repo: str
) -> dict[str, HubFile]:
    """All validation and the first `shards` training shards of a repository's folder, by name."""
    number = "[0-9]" * 6
    val = sorted(fnmatch.filter(listing, f"{folder}{prefix}_val_{number}.bin"))
    train = sorted(fnmatch.filter(listing, f"{folder}{prefix}_train_{number}.bin"))
    if not val or not train:
        raise UserError(
            f"{repo} has no {folder}{prefix}_train_*.bin with a {prefix}_val_*.bin; the repository "
            "has changed, or another one is meant"
        )
    if shards > len(train):
        raise UserError(
            f"--shards {shards}: {repo} has {len(train)} training shards of this set, so ask for "
            "at most that many"
        )
    return {path.rpartition("/")[2]: listing[path] for path in val + train[:shards]}


def here_already(out: Path, source: dict, shards: int) -> bool:
    """Whether the folder has that many training shards, unaltered, so that no network is needed.
    Raises UserError if it holds another data set.
    """
    manifest = read_manifest(out)
    if shards < 0:
        raise UserError(f"--shards {shards}: give 0 or more")
    if manifest is None:
        return False
    if {key: manifest["source"].get(key) for key in source} != source:
        raise UserError(f"{out} holds another data set ({manifest['source']}); give another --out")
    train = sorted(name for name in manifest["files"] if side(name) == "train")
    beyond = train[shards:]
    needed = {name: entry for name, entry in manifest["files"].items() if name not in beyond}
    if len(train) < shards or altered_files(out, needed):
        return False
    print(f"{out} is complete, nothing to do: {summary(manifest)}")
    return True


def finish_download(
    out: Path, source: dict, wanted: Iterable[str], tokenizer: str, vocab: int, separator: int
) -> None:
    """Reads every shard through (header, size, ids); writes the manifest of all downloads here."""
    earlier = read_manifest(out) or {"files": {}}
    entries = {name: entry for name, entry in earlier["files"].items() if (out / name).is_file()}
    for name in file_bar(wanted, "checking shards"):
        if side(name):
            read_shard(out / name, vocab)
        entries[name] = describe(out / name, separator)
    totals = {split: {"tokens": 0, "documents": 0} for split in ("train", "val")}
    for name, entry in entries.items():
        if side(name):
            totals[side(name)]["tokens"] += entry["tokens"]
            totals[side(name)]["documents"] += entry["documents"]
    manifest = {
        "source": source,
        "published_split": True,
        "tokenizer": tokenizer,
        "vocab": vocab,
        "separator": separator,
        **totals,
        "files": dict(sorted(entries.items())),
    }
    write_manifest(out, manifest)
    print(f"{out}: {summary(manifest)}")


def gpt2_shards(repo: str, prefix: str, shards: int, out: Path) -> None:
    """Shards of kjj0's repositories, modded-nanogpt's: GPT-2 tokens, one shard of validation."""
    source = {"command": "download", "repo": repo}
    if here_already(out, source, shards):
        return
    with locked(out):
        if not here_already(out, source, shards):
            commit, listing = hub_listing(repo, "main")
            wanted = chosen_shards(listing, "", prefix, shards, repo)
            fetch(out, repo, commit, wanted)
            finish_download(out, source | {"commit": commit}, wanted, "gpt2", 50257, 50256)


def fineweb10B(shards: int = 103, out: Path = Path("data/fineweb10B")) -> None:
    """Download FineWeb 10B as GPT-2 shards of 100M tokens (200 MB each): the speedrun's data.

    Args:
        shards: Training shards, of 103; the validation shard always comes along.
        out: Folder of the data set.
    """
    gpt2_shards("kjj0/fineweb10B-gpt2", "fineweb", shards, out)


def fineweb100B(shards: int = 1030, out: Path = Path("data/fineweb100B")) -> None:
    """Download FineWeb 100B as GPT-2 shards of 100M tokens (200 MB each).

    Args:
        shards: Training shards, of 1030; the validation shard always comes along.
        out: Folder of the data set.
    """
    gpt2_shards("kjj0/fineweb100B-gpt2", "fineweb", shards, out)


def finewebedu10B(shards: int = 99, out: Path = Path("data/finewebedu10B")) -> None:
    """Download FineWeb-Edu 10B as GPT-2 shards of 100M tokens (200 MB each).

    Args:
        shards: Training shards, of 99; the validation shard always comes along.
        out: Folder of the data set.
    """
    gpt2_shards("kjj0/finewebedu10B-gpt2", "finewebedu", shards, out)


def golf(
    variant: str = "sp1024",
    shards: int = 80,
    out: Path | None = None,
    repo: str = "willdepueoai/parameter-golf",
    root: str = "datasets",
) -> None:
    """Download parameter-golf's shards of FineWeb and their SentencePiece tokenizer.

    Args:
        variant: Tokenizer of the challenge: sp1024 and others; a wrong name prints all.
        shards: Training shards of 100M tokens (200 MB each); all validation shards come along.
        out: Folder of the data set; data/golf_VARIANT if not given.
        repo: Data set repository on the hub; others publish more tokenizers in this layout.
        root: Folder in the repository that holds manifest.json.
    """
    out = out or Path(f"data/golf_{variant}")
    source = {"command": "download", "repo": repo, "variant": variant}
    if here_already(out, source, shards):
        return
    with locked(out):
        if here_already(out, source, shards):
            return
        commit, listing = hub_listing(repo, "main")
        if f"{root}/manifest.json" not in listing:
            raise UserError(
                f"{repo} has no {root}/manifest.json; see that --repo and --root are right"
            )
        small = {"upstream_manifest.json": listing[f"{root}/manifest.json"]}
        fetch(out, repo, commit, small)
        model_path = golf_tokenizer(out / "upstream_manifest.json", variant)
        if f"{root}/{model_path}" not in listing:
            raise UserError(
                f"{repo} lacks {root}/{model_path}, which its manifest names; try another --repo"
            )
        wanted = chosen_shards(
            listing, f"{root}/datasets/fineweb10B_{variant}/", "fineweb", shards, repo
        )
        small["tokenizer.model"] = listing[f"{root}/{model_path}"]
        fetch(out, repo, commit, small)
        model = Encoder(str(out / "tokenizer.model"))  # refused before gigabytes are fetched
        fetch(out, repo, commit, wanted)
        source |= {"commit": commit}
        wanted |= small
        finish_download(out, source, wanted, "tokenizer.model", model.vocab, model.separator)


def golf_tokenizer(path: Path, variant: str) -> str:
    """The variant's SentencePiece model in the challenge's manifest at `path`, relative to that
    file's folder in the repository.

    Raises UserError for an unknown variant, for one without such a model (the byte tokenizers), and
    for a manifest in another layout.
    """
    try:
        manifest = json.loads(path.read_text("utf-8"))
        models = {entry["name"]: entry.get("model_path") for entry in manifest["tokenizers"]}
        variants = {}
        for entry in manifest["datasets"]:
            name = entry["name"].removeprefix("fineweb10B_")
            variants[name] = models.get(entry["tokenizer_name"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is not in parameter-golf's layout ({why}); are --repo and --root right?"
        ) from None
    if not variants.get(variant):
        known = ", ".join(name for name, model in variants.items() if model)
        raise UserError(
            f"--variant {variant}: no such set with a SentencePiece model; there are: {known}"
        )
    return variants[variant]


########################################
#                check                 #
########################################


def documents_of(shards: Iterable[np.ndarray], separator: int) -> Iterator[np.ndarray]:
    """The documents of a stream, each from its separator to the next, whole across shards. Tokens
    before the first separator come as a piece without one.
    """
    rest = np.empty(0, np.uint16)
    for tokens in shards:
        starts = np.flatnonzero(tokens == separator)
        if not len(starts):
            rest = np.concatenate([rest, tokens])
            continue
        rest = np.concatenate([rest, tokens[: starts[0]]])
        if len(rest):
            yield rest
        for start, end in pairwise(starts):
            yield tokens[start:end]
        rest = np.array(tokens[starts[-1] :])
    if len(rest):
        yield rest


class Check:
    """One folder, or one shard of it, with the problems found so far."""

    def __init__(self, path: Path, tokenizer: str, vocab: int):
        self.whole = path.is_dir()
        self.folder = path if self.whole else path.parent
        self.shards = shards_in(path) if self.whole else [path]
        self.problems = []
        if not path.exists():
            raise UserError(f"{path} does not exist; give a folder of shards or a shard")
        candidates = sorted(self.folder.glob("*.bin")) if self.whole else [path]
        others = ", ".join(other.name for other in candidates if not side(other.name))
        shard = "*_train_NNNNNN.bin or *_val_NNNNNN.bin"
        if not self.shards:
            but = f" (but {others})" if others else ""
            raise UserError(f"{path} holds no {shard}{but}; give a folder that does")
        if others:
            print(f"no run reads: {others}; a shard is {shard}")
        self.manifest = read_manifest(self.folder) or {}
        self.listed = self.manifest.get("files", {})
        given = tokenizer or self.manifest.get("tokenizer", "")
        if given == "tokenizer.model":
            given = str(self.folder / given)
        self.encoder = Encoder(given) if given else None
        limits = [vocab, self.manifest.get("vocab", 0), self.encoder.vocab if self.encoder else 0]
        self.vocab = min((limit for limit in limits if limit), default=0)

    def files(self) -> dict[str, list[np.ndarray]]:
        """Prints a line per shard and returns the readable ones by split."""
        streams = {"train": [], "val": []}
        print(f"{'shard':<34} {'tokens':>14} {'documents':>11} {'bytes':>14}  manifest")
        for path in self.shards:
            tokens, documents, size = "-", "-", f"{path.stat().st_size:,}"
            try:
                shard = read_shard(path, self.vocab)
                streams[side(path.name) or "train"].append(shard)
                tokens = f"{len(shard):,}"
                if self.encoder:
                    documents = f"{np.count_nonzero(shard == self.encoder.separator):,}"
            except UserError as error:
                self.problems.append(str(error))
            print(f"{path.name:<34} {tokens:>14} {documents:>11} {size:>14}  {self.standing(path)}")
        if self.whole:
            shown = {path.name for path in self.shards}
            others = {name: entry for name, entry in self.listed.items() if name not in shown}
            for name in altered_files(self.folder, others):
                problem = f"{self.folder / name}: missing or altered; get the data set again"
                self.problems.append(problem)
        return streams

    def standing(self, path: Path) -> str:
        """What the manifest says of a shard."""
        if not self.listed:
            return "none"
        if not side(path.name):
            return "no shard"
        if path.name not in self.listed:
            self.problems.append(
                f"{path}: not in manifest.json, and a run would read it; move it away"
            )
            return "NOT LISTED"
        if altered_files(self.folder, {path.name: self.listed[path.name]}):
            self.problems.append(
                f"{path}: not the content that manifest.json says; get the data again"
            )
            return "ALTERED"
        return "same"

    def documents(self, split: str, shards: list[np.ndarray], decode_tokens: int) -> array:
        """Prints a line of counts for one side and returns the hashes of its documents."""
        hashes, size, decoded = array("Q"), 0, 0
        tokens = sum(map(len, shards))
        bar = tqdm(total=tokens, unit="token", unit_scale=True, desc=split, leave=False, delay=1)
        for document in documents_of(shards, self.encoder.separator):
            bar.update(len(document))
            count = self.encoder.count_bytes(document)
            size += count
            if document[0] != self.encoder.separator:
                continue  # begins before the first shard: its first space and hash are unknown
            if decoded < decode_tokens:
                decoded += len(document)
                length = len(self.encoder.decode(document))
                if length != count:
                    self.problems.append(
                        f"{split} document {len(hashes)}: {count} bytes by pieces, {length} as it "
                        f"decodes; is {self.encoder.name} its tokenizer?"
                    )
            hashes.append(hash64(document.tobytes()))
        bar.close()
        print(
            f"{split}: {tokens:,} tokens, {len(hashes):,} documents, {size:,} bytes, "
            f"{size / max(tokens, 1):.4f} bytes per token; text of {decoded:,} tokens compared"
        )
        found = {"tokens": tokens, "documents": len(hashes), "bytes": size}
        expected = self.manifest.get(split, {}) if self.whole else {}
        for key, value in found.items():
            if value != expected.get(key, value):
                self.problems.append(
                    f"{split}: {value:,} {key}, and manifest.json says {expected[key]:,}; get the "
                    "data again"
                )
        return hashes

    def both_sides(self, decode_tokens: int, streams: dict[str, list[np.ndarray]]) -> None:
        """Checks the documents of each side, and that none is on both."""
        if not self.encoder:
            print("documents, bytes, split not checked: no tokenizer is known; give --tokenizer")
            return
        hashes = []
        for split, shards in streams.items():
            if shards:
                hashes.append(self.documents(split, shards, decode_tokens))
        if len(hashes) == 2:
            shared = len(np.intersect1d(*hashes))
            print(f"documents on both sides: {shared:,}")
            if shared and not self.manifest.get("published_split"):
                self.problems.append(
                    f"{self.folder}: {shared:,} validation documents are also in train"
                )


def check(
    paths: tyro.conf.Positional[tuple[Path, ...]],
    /,
    tokenizer: str = "",
    vocab: int = 0,
    decode_tokens: int = 10_000_000,
) -> None:
    """Verify data sets: header, size and ids of every shard, hashes and counts of the manifest,
    bytes by the tokenizer's pieces against the decoded text, and that no document is on both sides
    of the split. Exit code 2 if anything is wrong.

    Args:
        paths: Folders of shards, or single shards.
        tokenizer: gpt2 or the path of a SentencePiece model; taken from the manifest if not given.
        vocab: Ids must be below this, and below what the manifest and the tokenizer say.
        decode_tokens: Tokens of each side whose text is compared.
    """
    if not paths:
        raise UserError("nothing to check; give folders of shards, for example data/sample")
    if vocab < 0:
        raise UserError(f"--vocab {vocab}: ids are below a number above 0; 0 takes the manifest's")
    problems = []
    for path in paths:
        task = Check(path, tokenizer, vocab)
        task.both_sides(decode_tokens, task.files())
        problems += task.problems
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError("\n  ".join([f"{len(problems)} found wrong:", *problems[:20], *more]))
    print("all is well")


def advice(error: OSError) -> str:
    """What to do about an error of a file or a disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space or give another --out"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "a file is in the way of a folder: remove it or give another --out"
    if error.errno == errno.EISDIR:
        return "a folder is in the way of a file: remove it or give another --out"
    if error.errno == errno.EROFS:
        return "nothing can be written there: give another --out"
    return "see that it exists and you may use it"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns 0, or 2 after a message about what the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may not fit the console
    published = [fineweb10B, fineweb100B, finewebedu10B, golf, slowrun]
    commands = [sample, tokenize, *published, from_slowrun, to_slowrun, check]
    try:
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in commands},
            args=argv,
            prog="get.py",
            description="Make a data set from text, download a published one, or check one.",
            use_underscores=True,
        )
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        where = error.filename2 or error.filename or "disk"  # of a copy, where it goes
        message = f"{where}: {error.strerror or error}; {advice(error)}"
    except MemoryError as error:
        message = f"not enough memory ({error}); give smaller files, or fewer --shard_tokens"
    except KeyboardInterrupt:
        again = "run the same command again: a download goes on where it stopped"
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
