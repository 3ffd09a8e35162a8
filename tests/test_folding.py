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
    # a text inside of another keeps its quotes, braces and lines
    ("f'a {\"it is {mu}\"} {x}'", "f'a it is {{mu}} {x}'"),
    ('f"a {cfg.said}"', repr('a it\'s "{x}" \\ \n')),
    ("x if set() else y", "y"),
    ("f(x) in []", "f(x) in []"),  # what f does is not lost
    ("x in []", "False"),
    ("x is y and False", "False"),
    ("f(x) == 1 and False", "f(x) == 1 and False"),
    ("x and False", "x and False"),  # may be any x that is false
    ("{p for p in []} | x", "x"),
    ("f'{\"a b\"!r} {x!r}'", "f'\\'a b\\' {x!r}'"),
    ("'a ' + f'b {x}'", "f'a b {x}'"),
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
    fields = {"size": 3, "said": 'it\'s "{x}" \\ \n'}
    same_code(folded(source, fields=fields), f"def main(x, y, cfg):\n    return {wanted}")


STATEMENTS = [  # None: nothing
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
    ("for a in range(cfg.one):\n    f(a, x)", "f(0, x)"),
    ("for _ in range(cfg.one):\n    if f(x):\n        break", None),
    # a long text keeps its name, but where it becomes a part of another
    (
        "a = 'no checkpoint was saved before'\nf(f'{x}: {a}.')",
        "f(f'{x}: no checkpoint was saved before.')",
    ),
    ("a = 'no checkpoint was saved before'\nf(a, f'{x}: {a}.')", None),
    # what is asked of each of several moments, and of none of them
    (
        "for a in x.moments():\n    if y:\n        raise ValueError(y)",
        "if y:\n    raise ValueError(y)",
    ),
    ("for a in x.moments():\n    if y > a:\n        raise ValueError(y)", None),
    # a list is empty for good where nothing can fill it, under whatever name
    ("a = []\nif a:\n    f(y)\nreturn f(x, a)", "return f(x, [])"),
    *(
        (f"a, b = [], []\n{fill}\nreturn f(a, b)",) * 2
        for fill in (
            "(a if x else b).append(y)",
            "for c in (a, b):\n    c.append(y)",
            "(b or a)[x] = (a or b)[y]",
            "for c in f(x):\n    d = a if c else b\n    d.append(c)",
            "fill(x, a)\nfill(x, into=b)",
            "Holder(a).add(x)\nHolder(b).add(y)",
        )
    ),
    ("y -= 0\nreturn f(y)", "return f(y)"),
]


HELPERS = (
    "def fill(x, into):\n    into.append(x)\n",
    """class Holder(Base):
    def __init__(self, found):
        self.found = found
    def add(self, x):
        self.found.append(x)
""",
)


@pytest.mark.parametrize("source,wanted", STATEMENTS)
def test_statements_fold_to_what_they_do(source, wanted):
    head = "def main(x, y, cfg):\n"
    source, wanted = (head + textwrap.indent(text, "    ") for text in (source, wanted or source))
    used = [helper for helper in HELPERS if helper.split("(")[0].split()[-1] + "(" in wanted]
    ours = folded("\n".join([*HELPERS, source]), fields={"one": 1}, reminders={"moments"})
    same_code(ours, "\n".join([*used, wanted]))


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
        'What it says.'
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
        'What it says.'
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


def test_checks_are_assertions_where_their_messages_are_not_wanted():
    source = """
    class Wrong(Exception):
        pass

    class Left(Exception):
        pass

    def main(x, path):
        if x is None or not path:
            near = sorted(path)
            raise Wrong(f"of {near}")
        if not x < 3:  # nan
            raise Wrong("large")
        if x == 4:
            raise Wrong("four")
        else:
            f(x)
        require(x > 0, "small")
        try:
            y = f(path)
        except OSError as e:
            raise Wrong(path) from e
        try:
            f(y)
        except (KeyError, Left):
            f(0)
        except Left:
            f(1)
        if (z := f(2)) > 1:
            raise Wrong("z")
        if y:
            return
        raise Wrong("no y")
    """
    wanted = """
    def main(x, path):
        assert x is not None and path
        assert x < 3
        if x == 4:
            raise Wrong("four")
        else:
            f(x)
        assert x > 0
        y = f(path)
        try:
            f(y)
        except KeyError:
            f(0)
        assert f(2) <= 1
        assert y
    """
    refusals = {"Wrong", "require"}
    code = folded(source, refusals=refusals)
    same_code(code[code.index("def main") :], wanted)
    assert "class Left" not in code and "raise Wrong(f" in folded(source)


def test_what_stands_as_two_and_is_one():
    """
    A class with one heir, a function that ends another, one that is called once and short, a
    context that does nothing, a function that is made to be called, a default that nobody takes.
    """
    source = """
    class Base:
        def __init__(self, size, kind):
            self.size = size
            self.kind = kind

        def half(self, by=2):
            return f(self.size) / by

    class Heir(Base):
        def __init__(self, x):
            super().__init__(x, f(x))
            self.x = f(x)

    @contextlib.contextmanager
    def kept():
        try:
            yield
        except ValueError:
            raise

    def begin(x: Base):
        y = f(x)
        return end(x, y)

    def end(x, z):
        z += 1
        return f(x, z)

    def first(x):
        return x[0]

    def main(x):
        def work():
            with kept():
                h = Heir(x)
            for i, part in enumerate(x):
                f(part)
            return begin(first(x)), h.half(3), h.kind, h.x, h.half(x)

        return work()
    """
    wanted = """
    class Heir:
        def __init__(self, x):
            self.size = x
            self.kind = f(x)
            self.x = f(x)

        def half(self, by):
            return f(self.size) / by

    def begin(x: Heir):
        y = f(x)
        return end(x, y)

    def end(x, z):
        z += 1
        return f(x, z)

    def main(x):
        h = Heir(x)
        for part in x:
            f(part)
        return begin(x[0]), h.half(3), h.kind, h.x, h.half(x)
    """
    same_code(folded(source, called_as={"h": "Heir"}), wanted)  # z would be set, and y is not
    again = folded(
        source.replace("end(x, z)", "end(x, y)").replace("z", "y"), called_as={"h": "Heir"}
    )
    assert "def end" not in again and "y += 1\n    return f(x, y)" in again


def test_a_name_that_the_next_turn_sets_anew_is_not_the_one_before():
    source = """
    def main(x):
        for name in ("a", *x):
            new = f(name)
            if name == "a":
                old = new
        return f(old)
    """
    assert "old = new" in folded(source)


SIZES = [
    ("f(x) + 0 * x.size", "f(x) + 0 * x.size"),  # f(x) may be any thing
    ("x + 0 * y", "x"),
    ("-(-x // x.ranks)", "x"),
    ("x // x.ranks % y.ranks", "0"),
    ("8 // x.ranks", "8"),
    ("(x // 1.0, x % 1.0)", "(x // 1.0, x % 1.0)"),  # perhaps of 2.5
    ("1 * x | 0", "x"),
    ("sum((x + 1,)) * y", "(x + 1) * y"),
    ("f(**dict(x))", "f(**x)"),
    ("{k: v for k, v in x.items()}", "dict(x)"),
    ("{k: v for k, v in x.items() if v}", "{k: v for k, v in x.items() if v}"),
    ("sum(a * b for a, b in [(x, 2)])", "x * 2"),
    ("x.is_big and y.device.type == 'cuda'", "False"),
]


@pytest.mark.parametrize("operator", ["//", "%"])
def test_a_fraction_has_to_be_written_as_one(operator):
    source = f"def main(x, y):\n    return x {operator} 1"
    with pytest.raises(AssertionError, match="write 1.0"):
        script.parsed(source)
    script.parsed(f"{source}.0")


@pytest.mark.parametrize("source,wanted", SIZES)
def test_sizes_of_one_and_parts_of_none_fold(source, wanted):
    source = f"def main(x, y):\n    return {source}\n"
    more = {"anywhere": {"is_big": True, "ranks": 1}, "records": {"device": {"type": "cpu"}}}
    same_code(folded(source, **more), f"def main(x, y):\n    return {wanted}")


def test_a_function_with_the_name_of_what_has_no_effect_is_refused():
    script.parsed("class Clock:\n    def seconds(self):\n        return 1")
    for source in ("class Loader:\n    def seconds(self):\n        f(1)", "def view(x):\n    f(x)"):
        with pytest.raises(AssertionError, match="would be left out of scripts"):
            script.parsed(source)
