"""The sources themselves: imports go one way, functions and lines stay short."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

FILES = sorted(p.relative_to(ROOT) for p in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])
SOURCES = [path for path in FILES if path.parts[0] != "tests"]
LINES, COLUMNS = 60, 100


def module(path: Path) -> str:
    """Its dotted name from the project's root."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in SOURCES}


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def named_in(node: ast.AST, path: Path) -> Iterator[str]:
    """Dotted names that an import, or a call that imports by name, may stand for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = path.parts[: -node.level] if node.level else ()
        base = ".".join([*above, *filter(None, [node.module])])
        yield from (base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names))
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("import_module", "__import__", "run_module", "run_path", "spec_from_file_location")
    ):
        words = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
        yield from (str(word).removesuffix(".py").replace("/", ".") for word in words)


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it, also by the name that a script
    has for the files beside itself.
    """
    beside = {name.rpartition(".")[2]: name for name in MODULES if MODULES[name] != path}
    found = set()
    for node in ast.walk(tree_of(path)):
        for name in named_in(node, path):
            found |= {x for x in (name, beside.get(name)) if x in MODULES}
    return found - {module(path)} - {"logs"}


def reached(name: str, arrows: dict[str, set[str]]) -> set[str]:
    """All that a module imports, however many files lie between."""
    found, todo = set(), [name]
    while todo:
        new = arrows[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_imports_go_one_way():
    """The trainer imports nothing of the project, and nobody imports what imports it."""
    arrows = {name: imported(path) for name, path in MODULES.items()}
    assert arrows["train_gpt"] == set()
    assert sum(map(len, arrows.values())) >= 10 and "train_gpt" in arrows["logs.score"]
    circles = {name for name in arrows if name in reached(name, arrows)}
    assert not circles, {name: arrows[name] for name in circles}


def test_imports_are_found_wherever_they_stand(tmp_path):
    """The test above sees them in functions, under other names, and by calls."""
    source = """
import os, train_gpt as tg
def f():
    from logs import score
    from logs.report import table as t
    importlib.import_module("pre_pre_train")
"""
    nodes = ast.walk(ast.parse(source))
    found = {name for node in nodes for name in named_in(node, Path("logs/x.py"))}
    assert {"os", "train_gpt", "logs.score", "logs.report", "pre_pre_train"} <= found
    (relative,) = ast.parse("from . import score").body
    assert "logs.score" in set(named_in(relative, Path("logs/x.py")))
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert reached("d", arrows) == {"a", "b", "c"} and "a" in reached("a", arrows)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nobody_puts_a_module_under_another_name(path):
    """sys.modules is read at most."""
    for node in ast.walk(tree_of(path)):
        changed = []
        if isinstance(node, ast.Assign):
            changed = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
            changed = [node.target]
        elif isinstance(node, ast.Delete):
            changed = node.targets
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("setdefault", "update", "pop", "clear", "__setitem__"):
                changed = [node.func.value]
        words = [ast.unparse(target) for target in changed]
        assert not [word for word in words if re.search(r"\bsys\.modules\b", word)], (
            f"{path}:{node.lineno}"
        )


def test_no_function_outside_the_tests_has_over_60_lines():
    """From def to its last line; classes may be longer, and decorators are not counted."""
    long = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                long += [f"{path}:{node.lineno} {node.name}: {lines}"] * (lines > LINES)
    assert not long, "\n" + "\n".join(long)


def tables(text: str) -> set[int]:
    """Numbers of the lines that the formatter and the linter are told to leave as they are."""
    left, off = set(), False
    for i, line in enumerate(text.splitlines(), 1):
        off = off and "# fmt: on" not in line or line.strip() == "# fmt: off"
        left |= {i} if off or "noqa: E501" in line else set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            last = text.splitlines()[node.end_lineno - 1]
            if "# fmt: skip" in last or "noqa: E501" in last:
                left |= set(range(node.lineno, node.end_lineno + 1))
    return left


def test_no_line_has_over_100_columns():
    """Tables of numbers aside, which are marked."""
    wide = []
    for path in FILES:
        with tokenize.open(ROOT / path) as f:
            text = f.read()
        long = {i for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS}
        wide += [f"{path}:{i}" for i in sorted(long - tables(text))] if long else []
    assert not wide, "\n" + "\n".join(wide)
