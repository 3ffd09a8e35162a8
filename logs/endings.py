"""What the programs of logs/ and data/ share: their one error, whole files, and how they end."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class UserError(Exception):
    """What was given, why it cannot work, what to do. Exit code 2, no traceback."""


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is on disk; after an error there is none."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def explained(work: Callable[[], int | None]) -> int | None:
    """work(), with the trainer's explanation of its errors, where that was imported at all."""
    try:
        return work()
    except Exception as error:
        trainer = sys.modules.get("train_gpt")
        if trainer and (message := trainer.explain(error)):
            raise UserError(message) from error
        raise


def ending(program: str, work: Callable[[], int | None]) -> int:
    """The exit code of a program that is work(): its own; 130 behind Ctrl-C; 2 behind a line about
    what a person can mend.
    """
    try:
        return explained(work) or 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
