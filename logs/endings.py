"""How the programs of this folder end: with their result, or with a line that says what to do."""

import os
import sys
from collections.abc import Callable


def ending(program: str, work: Callable[[], int | None], *mistakes: type[Exception]) -> int:
    """
    The exit code of a program that is work(): its own; 2 behind a line about one of `mistakes` or
    about a file that cannot be read or written; 130 behind Ctrl-C.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (*mistakes, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
