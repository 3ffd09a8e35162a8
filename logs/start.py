"""
What run.sh asks; Python's own library is all that this needs, but for the last two.

    python3 logs/start.py gpus               how many processes this node starts: the GPUs they see
    python3 logs/start.py asked WORDS -- LM  verb, number of words that say it, what it is about
    python3 logs/start.py yes NAME VALUE     1 or 0
    python3 logs/start.py help               the head of run.sh
    python3 logs/start.py environment        .venv with requirements.txt, once where nodes share it
    python logs/start.py data FLAGS          get what these flags read, print where runs go
    python logs/start.py config FILE FLAGS   write the configuration that these flags make
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: nothing is locked there
    fcntl = None

WAIT_SECONDS = float(os.environ.get("WAIT_SECONDS", 7200))  # for another node, or another process


class UserError(Exception):
    """Something that the user can mend. Exit code 2, no traceback."""


class Overdue(UserError):
    """Another process has the lock for too long."""


@contextlib.contextmanager
def turn(path, what, seconds=WAIT_SECONDS):
    """
    The open file `path`, locked: of all processes and nodes that see it one is inside; the others
    say so and wait. The kernel holds the lock: whoever dies gives it back, and the next goes on.
    What was written into the file is seen by the next one at once, over NFS, too.
    """
    with open(path, "a+", encoding="utf-8") as file:
        began, told = time.monotonic(), False
        while True:
            if fcntl is None:
                break
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if e.errno not in (errno.EACCES, errno.EAGAIN):
                    print(
                        f"notice: {path} cannot be locked ({e.strerror}): start one node after "
                        "the other",
                        flush=True,
                    )
                    break
            if time.monotonic() - began > seconds:
                raise Overdue(
                    f"another process has been {what} for {seconds:.0f} s: see whether it "
                    "hangs; WAIT_SECONDS=N waits longer"
                )
            if not told:
                print(f"another process is {what}: waiting, {seconds:.0f} s at most", flush=True)
            told = True
            time.sleep(min(1, seconds / 10))
        file.seek(0)
        yield file


def has_pip(python):
    """Whether a venv is whole: one whose making was killed, or failed, has a python without pip."""
    with contextlib.suppress(OSError):
        ended = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True)
        return ended.returncode == 0
    return False


def environment():
    """Make .venv and install requirements.txt, unless that is done; again when it changes."""
    want = hashlib.sha256(Path("requirements.txt").read_bytes()).hexdigest()
    python, mark = Path(".venv/bin/python"), Path(".venv/installed")
    if python.exists() and mark.exists() and mark.read_text(encoding="utf-8").strip() == want:
        return
    if not has_pip(python) and sys.version_info < (3, 11):
        raise UserError(
            f"python3 is {sys.version.split()[0]}, but 3.11 or newer is needed: put one "
            "first in PATH"
        )
    mark.parent.mkdir(exist_ok=True)
    with turn(
        mark, "installing requirements.txt into .venv"
    ) as file:  # the mark is the lock's own file
        if python.exists() and file.read().strip() == want:
            return
        print("installing requirements.txt into .venv", flush=True)
        file.truncate(0)
        if not has_pip(python):
            for link in python.parent.glob("python*"):
                if not link.exists():  # to a Python that is gone; venv would not replace it
                    link.unlink()
            subprocess.run([sys.executable, "-m", "venv", ".venv"], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", "requirements.txt"], check=True)
        file.write(want + "\n")


def gpus(listing, visible):
    """
    Devices that CUDA shows to a process, by what `nvidia-smi -L` lists and CUDA_VISIBLE_DEVICES (or
    None). Of GPUs that are cut by MIG it shows one slice.
    """
    lines = listing.splitlines()
    whole = sum(line.startswith("GPU ") for line in lines)
    cut = any(line.lstrip().startswith("MIG ") for line in lines)
    if visible is None:
        return min(whole, 1) if cut else whole
    count = 0
    for word in visible.split(","):  # the first that is none ends the list
        word = word.strip()
        if not (re.match("(GPU|MIG)-", word) or word.isdigit() and int(word) < whole):
            break
        cut = cut or word.startswith("MIG-")
        count += 1
    return min(count, whole, 1) if cut else min(count, whole)


STUDIES = ("remix", "depth", "warmdown", "nca", "centering")  # whose names alone do as well
VERBS = ("golf", "study", "test", "report", "submit", "sample", "dry_run", "script", *STUDIES)
USAGE = {"report": "RUN...", "submit": "TRACK NAME RUN...", "script": "TRACK > FILE"}
# leaderboards of logs/submit.py
TRACKS = ("golf", "golf_non_record", "speedrun", "slowrun", "slowrun_tiny", "slowrun_two_hour")
TRACKS += ("slowrun_unlimited", "track_3")


def asked(words, always):
    """
    (verb, how many of the words say it, what it is about) of run.sh's command line; `always` are
    the flags that every training run has. A name of nothing is refused here, where nothing needs
    to be installed; what else can be wrong is said by the programs.
    """
    first = words[0] if words else ""
    if first in ("-h", "--help", "help"):
        return "help", 1, ""
    if first == "study" or first in STUDIES:
        named = words[1:] if first == "study" else words
        return study_asked(named, 1 + (first == "study"))
    if first == "sample":
        if len(words) < 2:
            raise UserError("usage: ./run.sh sample RUN [TEXT] [flags]")
        there(before_flags(words[1:])[:1])
        return "sample", 2, words[1]
    if first == "dry_run":
        given = before_flags(words[1:])
        layers(given[1:])
        return "dry_run", 1 + bool(given), preset(given[0] if given else os.environ["TRACK"])
    if first in ("test", *USAGE):
        if first in USAGE and len(words) == 1:
            raise UserError(f"usage: ./run.sh {first} {USAGE[first]}")
        check_names(first, before_flags(words[1:]))
        return first, 1, ""
    names([*always, *words], 'SEEDS="{}" ./run.sh ...')
    if first == "golf":
        layers(before_flags(words[1:]))
        return "golf", 1, preset(os.environ["GOLF"])
    if not first or first.startswith("-"):
        return "track", 0, preset(os.environ["MAIN"])
    layers(before_flags(words[1:]))
    return "track", 1, preset(first, "verb and no preset")


def study_asked(words, count):
    """asked() of a study's name and what follows it."""
    known = sorted(p.stem for p in Path("configs/studies").glob("*.toml"))
    if not words or words[0].startswith("-"):
        raise UserError(f"study: name one of {' '.join(known)}, or a path to one")
    if words[0] not in known and not Path(words[0]).is_file():
        raise UserError(f"no study is called {words[0]!r}; studies: {' '.join(known)}")
    names(words[1:], "--seeds {} after the study's name")
    said = " ".join(words[1:]).replace("=", " ")
    verb = "train_study" if re.search(r"--only train\b", said) else "study"
    # what only asks needs no data and no ranks
    asks = {"list", "-h", "--help", "--only"} & set(said.split())
    verb = "ask_study" if asks and verb == "study" else verb
    return verb, count, words[0]


def before_flags(words):
    """The words before the first flag; behind it they may be a flag's."""
    return words[: next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]


def check_names(verb, words):
    """What a verb that is one program is about, as far as it stands before all flags."""
    if verb == "script":
        layers(words)
    elif verb == "test":
        there([word.split("::")[0] for word in words], "test")
    elif verb == "report":
        there(words[words[:1] == ["embeddings"] :])
    elif words:
        if words[0] not in TRACKS:
            raise UserError(f"submit: no track is called {words[0]!r}; tracks: {' '.join(TRACKS)}")
        there(words[2:])


def there(paths, what="run"):
    """Refuse a path, or a pattern of paths, that names nothing."""
    for path in paths:
        if not os.path.exists(path) and not glob.glob(path):
            raise UserError(f"no {what} {path}: no such file or folder")


def layers(words):
    for word in words:
        preset(word)


def preset(word, kind="preset"):
    """A preset as --config takes it: a name in configs/, or a path."""
    name = word.removesuffix(".toml").removeprefix("configs/")
    if Path(f"configs/{name}.toml").is_file():
        return name
    path = word.removesuffix(".toml") + ".toml"
    if Path(path).is_file():
        return path
    if Path(word).is_file():  # by whatever name
        return word
    known = " ".join(sorted(p.stem for p in Path("configs").glob("*.toml")))
    raise UserError(f"no {kind} is called {word!r}; presets: {known}")


def names(flags, instead):
    """A run's name carries its seed: a flag for either would train into another's folder."""
    for i, word in enumerate(flags):
        key, _, value = word.partition("=")
        value = value or " ".join(flags[i + 1 : i + 2])
        if key == "--seed":
            raise UserError(
                f"--seed {value}: a run's name carries its seed, so say {instead.format(value)}"
            )
        if key == "--run":
            raise UserError(
                f"--run {value}: run.sh names its runs; for a name of your own: "
                f".venv/bin/python train_gpt.py --config TRACK --run {value}"
            )


def yes(name, value):
    """1 or 0 for a setting that is on or off."""
    word = value.lower()
    if word in ("1", "true", "yes", "on"):
        return 1
    if word in ("0", "", "false", "no", "off"):
        return 0
    raise UserError(f"{name}={value}: give 1 for yes, 0 for no")


def usage():
    """The comment at the head of run.sh."""
    lines = Path("run.sh").read_text(encoding="utf-8").splitlines()[1:]
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line[2:] for line in head)


def resolved(flags):
    """The trainer, and the configuration that these flags make; needs what is installed."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import train_gpt

    try:
        return train_gpt, train_gpt.parse_args(flags)
    except train_gpt.UserError as e:
        raise UserError(str(e)) from e


def write_config(path, flags):
    """Write the resolved configuration, whole or not at all."""
    train_gpt, cfg = resolved(flags)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    train_gpt.write_whole(Path(path), train_gpt.config_toml(cfg).encode())


def data(flags):
    """Get what a run with these flags reads; the folder where it goes."""
    _, cfg = resolved(flags)
    get_data(cfg.data)
    return cfg.log_dir


def get_data(folder):
    """Get what presets read, unless it is there; any other folder is taken as it is."""
    shards = int(os.environ.get("SHARDS", 24))
    name = Path(folder).name
    known = {
        "data/sample": ["sample"],
        "data/fineweb10B": ["fineweb10B", "--shards", str(shards)],
        "data/fineweb100B": ["fineweb100B", "--shards", str(max(shards, 132))],  # 100,000 steps
        "data/slowrun": ["slowrun"],
    }
    if re.fullmatch(r"data/sample\d+", folder):
        known[folder] = ["sample", "--vocab", name.removeprefix("sample"), "--out", folder]
    if folder.startswith("data/golf_"):
        known[folder] = ["golf", "--variant", name.removeprefix("golf_")]
    if folder not in known:
        print(f"data: {folder} is taken as it is", file=sys.stderr)
        return
    command = [sys.executable, "data/get.py", *known[folder]]
    subprocess.run(command, check=True, stdout=sys.stderr)


def list_gpus():
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return ""


def answer(verb, words):
    """What one of this program's verbs prints; None: nothing."""
    if verb == "gpus":
        return gpus(list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if verb == "asked":
        end = len(words) - words[::-1].index("--") - 1
        return " ".join(map(str, asked(words[:end], words[end + 1 :])))
    if verb == "yes":
        return yes(*words)
    if verb == "help":
        return usage()
    if verb == "environment":
        return environment()
    if verb == "data":
        return data(words)
    if verb == "config":
        return write_config(words[0], words[1:])
    raise UserError(f"start.py {verb}: gpus, asked, yes, help, environment, data or config")


def main(argv):
    try:
        said = answer(argv[0] if argv else "", argv[1:])
        if said is not None:
            print(said, flush=True)
    except UserError as e:
        print(f"run.sh: {e}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as e:
        print(f"run.sh: {' '.join(e.cmd)} ended with code {e.returncode}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        print(f"run.sh: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main(sys.argv[1:]))
