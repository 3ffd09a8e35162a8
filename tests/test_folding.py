"""logs/folding.py: what is left of a source does what the source does, and no more is lost."""

import ast
import textwrap

import libcst as cst
import pytest

from logs import folding, script


def folded(source: str, *, fields: dict | None = None, **more) -> str:
    """A source with main() as its root, folded; `fields` of the configuration are fixed."""
    sets = dict.fromkeys("roots protocol pure aliases compared tuples".split(), frozenset())
    facts = {
        "fields": fields or {},
        "config": script.Fixed(fields or {}),
        **dict.fromkeys("records functions constants called_as attributes expressions".split(), {}),
        **sets,
        "roots": {"main"},
    }
    module = cst.parse_module(textwrap.dedent(source).lstrip("\n"))
    return folding.fold(module, folding.Facts(**facts | more)).code.strip()


def same_code(ours: str, wanted: str) -> None:
    ours, wanted = (ast.unparse(ast.parse(textwrap.dedent(x))) for x in (ours, wanted))
    assert ours == wanted


EXPRESSIONS = [
    ("not {}", "True"),
    ("x if set() else y", "y"),
    ("f(x) in []", "f(x) in []"),  # what f does is not lost
    ("x in []", "False"),
    ("x is y and False", "False"),
    ("f(x) == 1 and False", "f(x) == 1 and False"),
    ("x and False", "x and False"),  # may be any x that is false
    ("{p for p in []} | x", "x"),
    ("f(*(1, x), y)", "f(1, x, y)"),
    ("f(*[x], **{'a': y})", "f(x, a=y)"),
    ("f(a=x, *(1, y))", "f(*(1, y), a=x)"),  # places would be others
    ("{'a': x, 'b': y}['b']", "y"),
    ("{'a': f(x), 'b': y}['b']", "{'a': f(x), 'b': y}['b']"),
    ("math.prod(())", "1"),
    ("1 + len([]) - False", "1"),
    ("x + 0", "x + 0"),  # -0. + 0 is 0.
    ("any(len(w) > 2 for w in ('ab', 'c'))", "False"),
    ("[k for k, on in (('a', 0), ('b', '')) if on]", "[]"),
    ("getattr(cfg, 'size') > 2 and x is y", "x is y"),
]


@pytest.mark.parametrize("source,wanted", EXPRESSIONS)
def test_an_expression_folds_to_what_it_gives(source, wanted):
    source = f"def main(x, y, cfg):\n    return {source}\n"
    same_code(folded(source, fields={"size": 3}), f"def main(x, y, cfg):\n    return {wanted}")


STATEMENTS = [
    # a name that is given the same constant each time is that constant
    ("a = ()\nif x:\n    a = ()\nreturn f(*a, y)", "return f(y)"),
    ("a = 1\nif x:\n    a = 2\nreturn f(a)", "a = 1\nif x:\n    a = 2\nreturn f(a)"),
    # a tuple that is only starred, of what nothing changes
    ("a = cfg.n, y\nreturn f(*a)", "return f(cfg.n, y)"),
    ("a = x, y\nx = f(x)\nreturn f(*a)", "a = x, y\nx = f(x)\nreturn f(*a)"),
    # what a name was in the turn before
    ("for b in x:\n    f(a)\n    a = b", "for b in x:\n    f(a)\n    a = b"),
    ("for b in x:\n    f(*a)\n    a = b, y", "for b in x:\n    f(*a)\n    a = b, y"),
    ("for b in x:\n    a = b, y\n    f(*a)", "for b in x:\n    f(b, y)"),
    ("a = {'k': y}\nreturn f(x, **a)", "return f(x, k=y)"),
    ("a, b = [], {}\na.append(x)\nreturn f(a, x | b)", "a = []\na.append(x)\nreturn f(a, x)"),
    ("x = x\nreturn f(x)", "return f(x)"),
    ("x, y = x, f(y)\nreturn f(x, y)", "y = f(y)\nreturn f(x, y)"),
    ("a, b = y.shape\nreturn f(x)", "return f(x)"),
    ("a = (0, 0)\na = f(x)\nreturn f(a)", "a = f(x)\nreturn f(a)"),
    ("a = 0\na = f(x, a)\nreturn a", "return f(x, 0)"),
    ("if x:\n    return y\nreturn y", "return y"),
    ("for _ in range(1 - 1):\n    f(x)\nreturn y", "return y"),
    (
        "for a in (x, None, y):\n    if a:\n        f(a)",
        "for a in (x, y):\n    if a:\n        f(a)",
    ),
    ("f(x)\nreturn", "f(x)"),
    ("y -= 0\nreturn f(y)", "return f(y)"),
]


@pytest.mark.parametrize("source,wanted", STATEMENTS)
def test_statements_fold_to_what_they_do(source, wanted):
    head = "def main(x, y, cfg):\n"
    source, wanted = (head + textwrap.indent(text, "    ") for text in (source, wanted))
    same_code(folded(source), wanted)


CLASSES = """
class Rule(NamedTuple):
    kind: str
    group: str
    slow: bool = False

class Part:
    def __init__(self, rule):
        self.rule, self.found, self.size = rule, set(), 5
        self.log = self.wandb = None

    def make(self, name, *shape, on=True):
        return f(name, shape) if on else None

    def state(self):
        return f(self.size)

class Other:
    def __init__(self):
        self.log = f(2)

    def state(self):
        return f(self.log)

    def spare(self):
        return f(self.rule)

def main(x, part, other):
    part, other, spare = Part(Rule("a", x)), Other(), 1
    more = Part(Rule("b", "m"))
    part.make(x, 1, *x)
    if part.rule.kind == "c" or x in part.found or part.wandb:
        f(part.rule.slow)
    return other.state(), f(3 if part.size else 4), part.rule.kind == "a"
"""
FOLDED = """
class Rule(NamedTuple):
    kind: str
    group: str

class Part:
    def __init__(self, rule):
        self.rule = rule

    def make(self, name, *shape):
        return f(name, shape)

class Other:
    def __init__(self):
        self.log = f(2)

    def state(self):
        return f(self.log)

def main(x, part, other):
    part, other = Part(Rule("a", x)), Other()
    Part(Rule("b", "m"))
    part.make(x, 1, *x)
    return other.state(), f(3), part.rule.kind == "a"
"""


def test_classes_lose_what_their_own_objects_have_no_use_for():
    """
    A state() that is called on others only, attributes that are one thing or never read, a field
    with one value; not a field that nobody reads, which tells records apart.
    """
    holders = {"part": "Part", "other": "Other", "rule": "Rule"}
    more = {"called_as": holders, "aliases": {"Rule"}, "compared": {"Rule"}}
    same_code(folded(CLASSES, **more), FOLDED)


def test_a_set_that_something_is_put_into_stays():
    filled = CLASSES.replace("part.make(x, 1, *x)", "part.found.add(x)")
    assert "x in part.found" in folded(filled, called_as={"part": "Part", "other": "Other"})


def test_a_name_of_ones_own_is_no_use_of_a_function():
    source = """
    def numbers(x, hint=None):
        return f(x) if hint is None else f(hint)

    def spare():
        return f(1)

    def main(x):
        return numbers(x), inner(x)

    def inner(y):
        spare = f(y)
        numbers = f(spare)
        return f(numbers, spare)
    """
    code = folded(source)
    assert "def spare" not in code and "hint" not in code and "numbers = f(spare)" in code
