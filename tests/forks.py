"""
Runs of train_gpt.py for the tests, cheaply: one process imports torch, and each run is a fork of
it.

A fork is a process of its own, with its own flags, files, signals and end, but it starts in
milliseconds. It can be made to send itself a signal at the n-th call within a phase (in a step, in
saving, ...), so that a kill "at a random instant" falls on the same instant on every machine.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A folder: each run of the trainer is then one of the script of its flags, which is made there
# (17 s each, once) and has to do what the tests say of the trainer: AS_SCRIPTS=FOLDER pytest
# tests/test_runs.py. What cannot be a script is the trainer as ever.
AS_SCRIPTS = os.environ.get("AS_SCRIPTS", "")
# Functions of train_gpt.py and logs/score.py that name a phase of a run; the innermost one that is
# at work counts.
PHASES = {
    "parse_args",
    "prepare_folder",
    "open_log",
    "build",
    "load_checkpoint",
    "warm_up",
    "train_step",
    "log_step",
    "evaluate",
    "save_checkpoint",
    "keep_snapshot",
    "export_artifact",
    "finish",
    "write_result",
    "take",
    "one_score",
    "averaged",
}
PROGRAMS = "train_gpt.py", "score.py"
# Calls that change or sync files: between two of them a kill leaves another state on the disk.
FILE_CALLS = {
    "open",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "remove",
    "rmdir",
    "fsync",
    "write",
    "serialize_file",
}


@dataclass
class Ended:
    """What a run left: exit code (negative: killed by that signal) and what it printed."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class Fork:
    """A run under way."""

    server: "Server"
    pid: int
    files: tuple[Path, Path]
    code: int | None = field(default=None)

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.server.ask(op="poll", pid=self.pid)["code"]
        return self.code

    def signal(self, number: int) -> None:
        if self.poll() is None:  # until the server has waited for it, its id belongs to nobody else
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> Ended:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(
                    f"the run did not end in {seconds} s; it printed:\n"
                    + self.read(0)
                    + self.read(1)
                )
            time.sleep(0.005)
        return Ended(self.code, self.read(0), self.read(1))

    def read(self, which: int) -> str:
        return self.files[which].read_text(errors="replace") if self.files[which].exists() else ""


class Server:
    """The warm process and its forks; close() ends them all."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.forks = folder, 0, []
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env = {
            k: v
            for k, v in env.items()
            if not k.startswith("WANDB_") and k not in ("RANK", "WORLD_SIZE")
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *argv,
        env: dict | None = None,
        cwd: Path | None = None,
        when: dict | None = None,
        full_exit: bool = False,
        backend: str = "",
        program: str = "train_gpt",
        file: str | Path = "",
    ) -> Fork:
        """
        `train_gpt.py argv`, or another program, in a fork. when: {"phase": name or "", "calls":
        "all", "files" or the name of one} chooses calls; {"send": [[n, signal], ...]} sends itself
        a signal at the n-th of them, {"count": path} writes how many there were in each phase,
        {"watch": path} writes at each of them which checkpoints were complete, with their bytes'
        hash. full_exit: leave as the interpreter does, closing what is open, instead of at once.
        backend: what torch.compile makes of its graphs, for example nothing ("eager"): tracing and
        recompiling stay as they are. file: run this file instead, as the interpreter would.
        """
        argv = [str(a) for a in argv]
        if AS_SCRIPTS and program == "train_gpt" and not file:
            file, argv = as_script(argv, cwd or self.folder)
        self.count += 1
        files = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        pid = self.ask(
            op="start",
            argv=argv,
            env=env or {},
            cwd=str(cwd or self.folder),
            full_exit=full_exit,
            backend=backend,
            program=program,
            file=str(file),
            out=str(files[0]),
            err=str(files[1]),
            when=when,
        )["pid"]
        self.forks.append(Fork(self, pid, files))
        return self.forks[-1]

    def run(self, *argv, seconds: float = 120, **how) -> Ended:
        return self.start(*argv, **how).wait(seconds)

    def close(self) -> None:
        for fork in self.forks:
            fork.signal(signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(
    server: Server, world: int, argv: list[str], cwd: Path, when: dict | None = None, **how
) -> list[Fork]:
    """
    One process per rank, as torchrun starts them; `when` goes to the last rank. Those of the
    trainer do not know that they are on one node, so that they do what is done on several.
    """
    env = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if AS_SCRIPTS or how.get("file"):  # a script serves one
        env["LOCAL_WORLD_SIZE"] = world
    return [
        server.start(
            *argv,
            cwd=cwd,
            when=when if rank == world - 1 else None,
            env={k: str(v) for k, v in (env | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            **how,
        )
        for rank in range(world)
    ]


def run_ranks(
    server: Server, world: int, argv: list[str], cwd: Path, when: dict | None = None, **how
) -> list[Ended]:
    return [fork.wait() for fork in start_ranks(server, world, argv, cwd, when, **how)]


def as_script(argv: list[str], cwd: Path) -> tuple[str, list[str]]:
    """The script of the trainer's flags and the flags that are left, or "" and all of them."""
    from logs import script

    flags, fixed, left = [], [], []
    for word in argv:
        if word.startswith("--") or not flags:
            flags.append([word])
        else:
            flags[-1].append(word)
    for flag in flags:
        name = flag[0].partition("=")[0].removeprefix("--")
        (left if name in script.KEPT else fixed).append(flag)
    # what a script is checked with, and its schedules are known by
    fixed += [flag for flag in left if flag[0] in ("--steps", "--data")]
    made = hashlib.sha256(repr(fixed).encode()).hexdigest()[:16]
    file = Path(AS_SCRIPTS).resolve() / made / "train_gpt.py"  # watched as the trainer is
    if not file.parent.exists():
        file.parent.mkdir(parents=True)
        plain = file.parent / "plain.toml"
        plain.touch()
        preset = [] if ["--config"] in [flag[:1] for flag in fixed] else ["--config", str(plain)]
        words = [*preset, *(word for flag in fixed for word in flag)]
        maker = [sys.executable, str(ROOT / "logs" / "script.py")]
        subprocess.run([*maker, *words, "--out", str(file)], cwd=cwd, capture_output=True)
    if not file.exists():
        return "", argv
    fields = re.findall(r"^    (\w+): (?!ClassVar)", file.read_text(encoding="utf-8"), re.M)
    kept = [flag for flag in left if flag[0].partition("=")[0].removeprefix("--") in fields]
    return str(file), [word for flag in kept for word in flag]


class Watch:
    """A profile hook: counts the calls of a fork by phase, and sends the signals asked for."""

    def __init__(self, when: dict):
        self.phase, calls = when.get("phase", ""), when.get("calls", "all")
        self.only = {"all": None, "files": FILE_CALLS}.get(calls, {calls})
        self.send = {int(n): number for n, number in when.get("send", [])}
        self.count_to, self.watch_to = when.get("count"), when.get("watch")
        self.stack, self.seen, self.steps, self.watched = [], Counter(), 0, []

    def __call__(self, frame, event: str, arg) -> None:
        if event == "call" or event == "return":
            code = frame.f_code
            if code.co_name in PHASES and code.co_filename.endswith(PROGRAMS):
                if event == "call":
                    self.stack.append(code.co_name)
                    self.steps += code.co_name == "train_step"
                elif self.stack:
                    self.stack.pop()
        if not self.stack or event == "return" or event == "c_return":
            return
        if self.only and not (event == "c_call" and arg.__name__ in self.only):
            return
        phase = self.stack[-1]
        self.seen[phase] += 1
        if self.phase in ("", phase):
            if self.watch_to:
                self.watched.append(complete_checkpoints(Path.cwd()))
            n = self.seen[phase] if self.phase else self.seen.total()
            if n in self.send:
                os.write(
                    2,
                    f"signal {self.send[n]} in {phase} at call {n}, steps begun: "
                    f"{self.steps}\n".encode(),
                )
                os.kill(os.getpid(), self.send[n])

    def done(self) -> None:
        sys.setprofile(None)
        if self.count_to:
            Path(self.count_to).write_text(json.dumps(self.seen))
        if self.watch_to:
            Path(self.watch_to).write_text(json.dumps(self.watched))


def complete_checkpoints(folder: Path) -> dict[str, str]:
    """{step: hash of the tensor files} of what the trainer takes for checkpoints of run `tiny`."""
    import train_gpt

    return {
        p.name: hashlib.sha256(
            b"".join(f.read_bytes() for f in sorted(p.glob("*.safetensors")))
        ).hexdigest()
        for p in train_gpt.checkpoints(folder / "logs/tiny")
    }


def child(request: dict) -> None:
    """The forked process: becomes `train_gpt.py argv` and ends with its exit code."""
    import torch

    program = importlib.import_module(request["program"])
    os.setsid()
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT),
        (2, request["err"], os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = [program.__file__, *request["argv"]]
    if request["backend"]:
        torch.compile = functools.partial(torch.compile, backend=request["backend"])
    watch = Watch(request["when"]) if request["when"] else None
    if watch:
        sys.setprofile(watch)
    try:
        if request["file"]:
            sys.argv[0], code = request["file"], 0
            try:
                runpy.run_path(request["file"], run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
        else:
            code = program.main(request["argv"])
    finally:
        if watch:
            watch.done()
    if request["full_exit"]:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the interpreter down would cost as much as the run


def serve() -> None:
    """Read requests, one JSON object a line, and answer each with one."""
    sys.path.insert(0, str(ROOT))
    import torch._dynamo  # noqa: F401 (what a run imports late)

    import train_gpt
    from logs import score  # noqa: F401

    train_gpt.parse_args(["--run", "warm"])  # tyro's first parsing is slow

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on the tests is pytest's
    ended = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "start":
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                return child(request)
            answer = {"pid": pid}
        else:
            pid = request["pid"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = {"code": ended.get(pid)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve()
