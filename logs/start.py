"""
What run.sh asks before anything is installed; Python's own library is all that this needs.

    python3 logs/start.py gpus            how many processes this node starts: the GPUs they can see
    python3 logs/start.py environment     .venv with requirements.txt, once where nodes share it
    python3 logs/start.py names FLAGS...  refuses flags that would break run.sh's names of runs
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

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


def environment():
    """Make .venv and install requirements.txt, unless that is done; again when it changes."""
    want = hashlib.sha256(Path("requirements.txt").read_bytes()).hexdigest()
    python, mark = Path(".venv/bin/python"), Path(".venv/installed")
    if python.exists() and mark.exists() and mark.read_text(encoding="utf-8").strip() == want:
        return
    if not python.exists() and sys.version_info < (3, 11):
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
        if not python.exists():
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


def names(flags):
    """Runs are called TRACK-sSEED: a flag for seed or name would train into another's folder."""
    for i, word in enumerate(flags):
        key, _, value = word.partition("=")
        value = value or " ".join(flags[i + 1 : i + 2])
        if key == "--seed":
            raise UserError(
                f"--seed {value}: a run's name carries its seed, so say "
                f'SEEDS="{value}" ./run.sh ...'
            )
        if key == "--run":
            raise UserError(
                f"--run {value}: run.sh names its runs by track and SEEDS; for a name of "
                f"your own: .venv/bin/python train_gpt.py --config TRACK --run {value}"
            )


def get_data(folder):
    """Get what presets read, unless it is there; a folder that data/get.py does not make is taken."""
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


def main(argv):
    try:
        if argv == ["gpus"]:
            print(gpus(list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")))
        elif argv == ["environment"]:
            environment()
        elif argv[:1] == ["names"]:
            names(argv[1:])
        else:
            raise UserError(f"start.py {' '.join(argv)}: gpus, environment or names")
    except UserError as e:
        print(f"run.sh: {e}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as e:
        print(f"run.sh: {' '.join(e.cmd)} ended with code {e.returncode}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"run.sh: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main(sys.argv[1:]))
