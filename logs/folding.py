"""
Partial evaluation of a Python source whose configuration is known, on its concrete syntax tree:
what cannot run goes, and what stays keeps its comments and its layout. logs/script.py says what is
known of the trainer; nothing here is about training.

`fold()` repeats a few passes until none changes anything:
    Folding       conditions that are known, branches and loops that cannot run, texts and lists
                  that are put together from what is known
    Locals        names of a function that hold a constant, or that nobody reads
    Attributes    what is always one constant, or never read; fields of records likewise
    Parameters    those with one value at every call, and those that nobody reads
    Inlining      functions of which a constant or one short expression is left
    Unused        functions, classes, methods, constants without a use
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator

import libcst as cst
import libcst.matchers as m

UNKNOWN = object()  # what value_of gives where only a run can tell
LITERALS = (type(None), bool, int, float, str, tuple, list, dict)
BUILTINS: dict[str, Callable] = {
    f.__name__: f
    for f in (bool, int, float, str, len, max, min, any, all, sum, list, tuple, set, range, sorted)
} | {
    "abs": abs,
    "frozenset": frozenset,
    "dict": dict,
    "map": map,
    "zip": zip,
    "enumerate": enumerate,
}
ARITHMETIC: dict[type, Callable] = {
    cst.Add: lambda a, b: a + b,
    cst.Subtract: lambda a, b: a - b,
    cst.Multiply: lambda a, b: a * b,
    cst.Divide: lambda a, b: a / b,
    cst.FloorDivide: lambda a, b: a // b,
    cst.Modulo: lambda a, b: a % b,
    cst.Power: lambda a, b: a**b,
    cst.BitOr: lambda a, b: a | b,
    cst.BitAnd: lambda a, b: a & b,
}
COMPARISONS: dict[type, Callable] = {
    cst.Equal: lambda a, b: a == b,
    cst.NotEqual: lambda a, b: a != b,
    cst.LessThan: lambda a, b: a < b,
    cst.LessThanEqual: lambda a, b: a <= b,
    cst.GreaterThan: lambda a, b: a > b,
    cst.GreaterThanEqual: lambda a, b: a >= b,
    cst.Is: lambda a, b: a is b,
    cst.IsNot: lambda a, b: a is not b,
    cst.In: lambda a, b: a in b,
    cst.NotIn: lambda a, b: a not in b,
}


@dataclasses.dataclass
class Facts:
    """What is known before anything runs."""

    fields: dict[str, object]  # of the configuration, those that are fixed
    config: object  # has them as attributes, and raises KeyError for the others
    records: dict[str, dict[str, object]]  # of records by the name that holds one: fixed fields
    functions: dict[str, Callable]  # that may be called at once, with known arguments
    constants: dict[str, object]  # of the module
    called_as: dict[str, str]  # expressions that are called, as source -> Class.method or function
    roots: set[str]  # names that are used from outside
    protocol: set[str]  # methods that a library calls
    pure: set[str]  # functions that may be left out where nobody takes what they give
    aliases: set[str]  # records whose fields may go
    compared: set[str]  # of these, records that are told apart by fields which nobody reads, too
    tuples: set[str]  # names of what is a NamedTuple, wherever it stands
    attributes: dict[tuple[str, str], object]  # (class, attribute) -> its one value
    expressions: dict[str, object]  # what else is known, by its text
    anywhere: dict[str, object] = dataclasses.field(default_factory=dict)  # attributes, of all
    # functions that make an error which says what to do: an assertion is enough instead
    refusals: set[str] = dataclasses.field(default_factory=set)
    short: set[str] = dataclasses.field(default_factory=set)  # functions whose calls are inlined
    # functions that give one thing at least: a loop over it that reads none says the same each time
    reminders: set[str] = dataclasses.field(default_factory=set)
    harmless: set[str] = dataclasses.field(default_factory=set)  # functions; fold() finds them
    filling: set[str] = dataclasses.field(default_factory=set)  # and these


def code_of(node: cst.CSTNode) -> str:
    if isinstance(node, cst.Name) and not node.lpar:
        return node.value
    if isinstance(node, cst.Attribute) and not node.lpar:
        return f"{code_of(node.value)}.{node.attr.value}"
    return cst.Module([]).code_for_node(node)


@functools.cache
def parts_of(kind: type) -> list[str]:
    """The attributes of a kind of node that may hold nodes with names in them."""
    names = [f.name for f in dataclasses.fields(kind)]
    dull = ("whitespace", "lpar", "rpar", "comma", "leading_lines", "lines_after", "equal", "dot")
    dull += ("semicolon", "trailing", "header", "footer", "lbracket", "rbracket", "colon")
    return [name for name in names if not name.startswith(dull)]


@functools.cache
def is_node(kind: type) -> bool:
    """isinstance() of an abstract class takes five times as long."""
    return issubclass(kind, cst.CSTNode)


def kids(node: cst.CSTNode) -> list[cst.CSTNode]:
    """The children without layout and comments; quicker than libcst's own."""
    found = []
    for name in parts_of(type(node)):
        value = getattr(node, name)
        kind = type(value)
        if is_node(kind):
            found.append(value)
        elif kind is tuple or kind is list:
            found += [v for v in value if is_node(type(v))]
    return found


# What was found out about a node, by id; and the node, so that no other gets its id.
_texts: dict[int, tuple[cst.CSTNode, str]] = {}
_walks: dict[int, tuple[cst.CSTNode, list[cst.CSTNode]]] = {}


def walk(node: cst.CSTNode) -> list[cst.CSTNode]:
    """The node and all below it, parents first; of functions and classes remembered."""
    kept = type(node) in (cst.FunctionDef, cst.ClassDef)
    if kept and id(node) in _walks:
        return _walks[id(node)][1]
    found = [node]
    for child in kids(node):
        found += walk(child)
    if kept:
        _walks[id(node)] = node, found
    return found


@functools.cache
def concrete(kinds: tuple[type, ...]) -> set[type]:
    """All of these kinds of nodes: a set is asked faster than isinstance()."""
    nodes = [kind for kind in vars(cst).values() if isinstance(kind, type)]
    return {kind for kind in nodes if issubclass(kind, kinds)}


def find_all(node: cst.CSTNode, *kinds: type) -> list:
    wanted = concrete(kinds)
    return [n for n in walk(node) if type(n) in wanted]


def text_of(statement: cst.CSTNode) -> str:
    """code_of(), remembered."""
    found = _texts.get(id(statement))
    if found is None:
        found = _texts[id(statement)] = statement, code_of(statement)
    return found[1]


def revisit(module: cst.Module, visitor: Transformer, wanted: Callable[[str], bool]) -> cst.Module:
    """
    visit() of those statements of a module whose text is `wanted`; what did not change stays the
    same object, so that what was found out about it holds.
    """
    body: list[cst.BaseStatement] = []
    for statement in module.body:
        if not wanted(text_of(statement)):
            body.append(statement)
            continue
        new = visitor.transform(statement)
        if isinstance(new, cst.FlattenSentinel):
            body.extend(new)
        elif not isinstance(new, cst.RemovalSentinel):
            same = new is statement or text_of(new) == text_of(statement)
            body.append(statement if same else new)
    return module.with_changes(body=body)


def mentions(names) -> Callable[[str], bool]:
    """Whether a text holds one of these words."""
    words = [name for name in names if name]
    if not words:
        return lambda text: False
    return re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b").search


class Settled:
    """Whether a pass may change a statement: not, if it left the same text alone before."""

    def __init__(self):
        self.texts: dict[str, set[str]] = defaultdict(set)

    def visit(self, name: str, module: cst.Module, visitor: Transformer) -> cst.Module:
        texts = self.texts[name]
        new = revisit(module, visitor, lambda text: text not in texts)
        texts |= {text_of(s) for s in module.body} & {text_of(s) for s in new.body}
        return new


@functools.cache
def handlers(cls: type, kind: type) -> tuple[Callable | None, Callable | None]:
    """What a class does before and behind what is inside of a kind of node."""
    name = kind.__name__
    return getattr(cls, f"visit_{name}", None), getattr(cls, f"leave_{name}", None)


class Walker:
    """Calls visit_KIND() of each node; where that gives False, what is inside is left out."""

    def visit(self, node: cst.CSTNode) -> None:
        before, behind = handlers(type(self), type(node))
        if before is None or before(self, node) is not False:
            for child in kids(node):
                self.visit(child)
            if behind:
                behind(self, node)


class Transformer:
    """
    What becomes of a tree by leave_KIND(old, new) of each node; libcst's own goes through the
    layout, too. What does not change stays the same object.
    """

    def transform(self, node: cst.CSTNode):
        begin, end = handlers(type(self), type(node))
        if begin:
            begin(self, node)
        changes: dict[str, object] = {}
        for name in parts_of(type(node)):
            value = getattr(node, name)
            if is_node(type(value)):
                new = self.transform(value)
                if new is not value:
                    changes[name] = None if isinstance(new, cst.RemovalSentinel) else new
            elif value and isinstance(value, list | tuple):
                items = self.each(value)
                if len(items) != len(value) or any(a is not b for a, b in zip(items, value)):
                    changes[name] = items
        new = node.with_changes(**changes) if changes else node
        return end(self, node, new) if end else new

    def each(self, nodes) -> list:
        found: list = []
        for node in nodes:
            new = self.transform(node) if is_node(type(node)) else node
            if isinstance(new, cst.FlattenSentinel):
                found.extend(new)
            elif not isinstance(new, cst.RemovalSentinel):
                found.append(new)
        return found


def literal(value: object) -> cst.BaseExpression:
    if isinstance(value, float) and not math.isfinite(value):
        return cst.parse_expression(f'float("{value}")')
    return cst.parse_expression(
        repr(value).replace("'", '"')
        if type(value) is str and "'" not in value and '"' not in value
        else repr(value)
    )


def is_literal(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(is_literal, value))
    if isinstance(value, dict):
        return all(map(is_literal, value.values())) and all(map(is_literal, value))
    return type(value) in LITERALS


def is_config(node: cst.CSTNode) -> bool:
    """cfg, or anything's .cfg."""
    return m.matches(node, m.Name("cfg") | m.Attribute(attr=m.Name("cfg")))


class Values:
    """value_of(): what an expression gives, if that is known; nothing is run that has an effect."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.told = {re.match(r"\w+", text)[0] for text in facts.expressions}
        self.inside: dict[str, object] = {}  # names of comprehensions

    def value_of(self, node: cst.CSTNode) -> object:
        try:
            return self.find(node)
        except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, AttributeError):
            return UNKNOWN

    def find(self, node: cst.CSTNode) -> object:
        """The same; KeyError where it is not known."""
        if self.is_told(node):
            return self.facts.expressions[code_of(node)]
        how = getattr(self, f"find_{type(node).__name__}", None)
        if how is None:
            raise KeyError(type(node).__name__)
        return how(node)

    def is_told(self, node: cst.CSTNode) -> bool:
        """Whether it is known by its text; the first word is looked at before all are written."""
        if not isinstance(node, cst.Comparison | cst.Call):
            return False
        first = node.left if isinstance(node, cst.Comparison) else node.func
        while isinstance(first, cst.Subscript | cst.Attribute | cst.Call):
            first = first.func if isinstance(first, cst.Call) else first.value
        if not isinstance(first, cst.Name) or first.value not in self.told:
            return False
        return code_of(node) in self.facts.expressions

    def find_Integer(self, node):
        return node.evaluated_value

    def find_Float(self, node):
        return node.evaluated_value

    def find_SimpleString(self, node):
        return node.evaluated_value

    def find_ConcatenatedString(self, node):
        if node.evaluated_value is None:
            raise KeyError("an f-string")
        return node.evaluated_value

    def find_FormattedString(self, node):
        parts = []
        for part in node.parts:
            if isinstance(part, cst.FormattedStringText):
                parts.append(part.value)
            else:
                raise KeyError("an f-string")
        return "".join(parts)

    def find_Name(self, node):
        if node.value in ("None", "True", "False"):
            return {"None": None, "True": True, "False": False}[node.value]
        if node.value in self.inside:
            return self.inside[node.value]
        return self.facts.constants[node.value]

    def find_Attribute(self, node):
        if is_config(node.value):
            return self.facts.fields[node.attr.value]
        holder = leaf_of(node.value)
        if node.attr.value in self.facts.anywhere:
            return self.facts.anywhere[node.attr.value]
        if node.attr.value in self.facts.records.get(holder, ()):
            return self.facts.records[holder][node.attr.value]
        if code_of(node) in self.facts.expressions:
            return self.facts.expressions[code_of(node)]
        if holder == "math" and node.attr.value == "inf":
            return math.inf
        raise KeyError(node.attr.value)

    def find_Tuple(self, node):
        return tuple(self.items(node))

    def find_List(self, node):
        return self.items(node)

    def find_Set(self, node):
        return set(self.items(node))

    def find_Dict(self, node):
        found: dict = {}
        for e in node.elements:
            if isinstance(e, cst.StarredDictElement):
                found |= self.find(e.value)
            else:
                found[self.find(e.key)] = self.find(e.value)
        return found

    def find_ListComp(self, node):
        if node.for_in.inner_for_in:
            raise KeyError("two loops")
        found, before = [], self.inside
        for item in self.find(node.for_in.iter):
            self.inside = before | self.bound(node.for_in.target, item)
            try:
                if all(self.find(i.test) for i in node.for_in.ifs):
                    found.append(self.find(node.elt))
            finally:
                self.inside = before
        return found

    find_GeneratorExp = find_ListComp

    def bound(self, target: cst.CSTNode, value: object) -> dict[str, object]:
        if isinstance(target, cst.Name):
            return {target.value: value}
        names = [e.value.value for e in target.elements]
        return dict(zip(names, value, strict=True))

    def items(self, node) -> list:
        found = []
        for e in node.elements:
            value = self.find(e.value)
            found += value if isinstance(e, cst.StarredElement) else [value]
        return found

    def find_BooleanOperation(self, node):
        left = self.find(node.left)
        stops = not left if isinstance(node.operator, cst.And) else bool(left)
        return left if stops else self.find(node.right)

    def find_UnaryOperation(self, node):
        value = self.find(node.expression)
        if isinstance(node.operator, cst.Not):
            return not value
        if isinstance(node.operator, cst.Minus):
            return -value
        raise KeyError("an operator")

    def find_BinaryOperation(self, node):
        return ARITHMETIC[type(node.operator)](self.find(node.left), self.find(node.right))

    def find_Comparison(self, node):
        left = self.find(node.left)
        for part in node.comparisons:
            right = self.find(part.comparator)
            if not COMPARISONS[type(part.operator)](left, right):
                return False
            left = right
        return True

    def find_IfExp(self, node):
        return self.find(node.body if self.find(node.test) else node.orelse)

    def find_Subscript(self, node):
        (element,) = node.slice
        if not isinstance(element.slice, cst.Index):
            raise KeyError("a slice")
        return self.find(node.value)[self.find(element.slice.value)]

    def find_Call(self, node):
        if m.matches(node, m.Call(m.Name("getattr"), [m.Arg(), m.Arg()])):
            if not is_config(node.args[0].value):
                raise KeyError("of what is not known")
            return self.facts.fields[self.find(node.args[1].value)]
        if isinstance(node.func, cst.Attribute):  # of a text or a schedule
            if is_config(node.func.value):
                raise KeyError("a method of the configuration")
            module = m.matches(node.func.value, m.Name("math"))
            whose = math if module else self.find(node.func.value)
            if type(whose).__module__ == "torch":
                raise KeyError("a tensor")
            call = getattr(whose, node.func.attr.value)
        else:
            name = node.func.value
            call = self.facts.functions.get(name) or BUILTINS[name]
        args, named = [], {}
        for arg in node.args:
            if arg.star:
                raise KeyError("starred")
            value = self.facts.config if is_config(arg.value) else self.find(arg.value)
            if arg.keyword:
                named[arg.keyword.value] = value
            else:
                args.append(value)
        return call(*args, **named)


def is_doc(statement: cst.BaseStatement) -> bool:
    return m.matches(
        statement, m.SimpleStatementLine([m.Expr(m.SimpleString() | m.ConcatenatedString())])
    )


def own_body(node: cst.FunctionDef | cst.ClassDef) -> list[cst.BaseStatement]:
    """The statements behind the docstring."""
    body = list(node.body.body)
    return body[1:] if body and is_doc(body[0]) else body


def with_comments(first: cst.BaseStatement, lines) -> cst.BaseStatement:
    return first.with_changes(leading_lines=[*lines, *first.leading_lines])


def wrapped(outer: cst.BaseExpression, inner: cst.BaseExpression) -> cst.BaseExpression:
    """`inner` in the place of `outer`, in parentheses where that had them."""
    atom = (
        m.Float()
        | m.Name()
        | m.Attribute()
        | m.Call()
        | m.Subscript()
        | m.List()
        | m.Dict()
        | m.Integer()
    )
    if outer.lpar and not inner.lpar and not m.matches(inner, atom | m.SimpleString()):
        return inner.with_changes(lpar=outer.lpar, rpar=outer.rpar)
    return inner


def as_operand(node: cst.BaseExpression) -> cst.BaseExpression:
    """In parentheses if its operators might bind less than those around it."""
    loose = m.BinaryOperation() | m.BooleanOperation() | m.Comparison() | m.IfExp()
    loose |= m.Tuple() | m.UnaryOperation() | m.Lambda() | m.NamedExpr() | m.GeneratorExp()
    if not node.lpar and m.matches(node, loose):
        return node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    return node


ENDS = m.SimpleStatementLine([m.Return() | m.Raise() | m.Continue() | m.Break()])
EMPTY = m.List(elements=[]) | m.Tuple(elements=[])
MAKERS = m.Name("set") | m.Name("list") | m.Name("dict")
NOTHING = m.List(elements=[]) | m.Dict(elements=[]) | m.Call(MAKERS, args=[])  # may be filled
HOLLOW = EMPTY | NOTHING
NO_TEXT = m.SimpleString(value='""') | m.SimpleString(value="''")


class Folding(Transformer):
    """Conditions that are known, and what hangs on them."""

    def __init__(self, facts: Facts):
        self.facts, self.values = facts, Values(facts)
        self.elifs: set[int] = set()
        self.inside = 0  # functions

    def visit_FunctionDef(self, node):
        self.inside += 1

    def leave_FunctionDef(self, old, new):
        self.inside -= 1
        body = new.body.body
        if len(body) > 1 and m.matches(body[-1], m.SimpleStatementLine([m.Return(None)])):
            return new.with_changes(body=new.body.with_changes(body=body[:-1]))
        # `if a: return` before one last statement
        leaves = m.If(body=m.IndentedBlock([m.SimpleStatementLine([m.Return(None)])]), orelse=None)
        if len(body) > 1 and m.matches(body[-2], leaves):
            if m.matches(body[-1], m.SimpleStatementLine([m.Raise() | m.Expr()])):
                last = body[-2].with_changes(
                    test=negated(body[-2].test), body=cst.IndentedBlock([body[-1]])
                )
                last = self.leave_If(last, last)
                return new.with_changes(body=new.body.with_changes(body=[*body[:-2], last]))
        return new

    def visit_If(self, node):
        if isinstance(node.orelse, cst.If):
            self.elifs.add(id(node.orelse))

    def known(self, node: cst.CSTNode) -> object:
        return self.values.value_of(node)

    # expressions

    def leave_IfExp(self, old, new):
        new = new.with_changes(test=self.as_test(new.test))
        test = self.known(new.test)
        if test is not UNKNOWN:
            return wrapped(new, new.body if test else new.orelse)
        if new.body.deep_equals(new.orelse):
            return wrapped(new, new.body)
        return new

    def leave_BooleanOperation(self, old, new):
        left, right = self.known(new.left), self.known(new.right)
        both = isinstance(new.operator, cst.And)
        if left is not UNKNOWN and bool(left) != both and type(left) is bool:
            return literal(left)
        if left is not UNKNOWN:
            return wrapped(new, new.right if bool(left) == both else new.left)
        if type(right) is bool and is_truth(new.left):
            if right == both:
                return wrapped(new, new.left)
            if is_pure(new.left, self.facts):
                return literal(right)
        return new

    def leave_UnaryOperation(self, old, new):
        if isinstance(new.operator, cst.Not):
            new = new.with_changes(expression=self.as_test(new.expression))
        value = self.known(new) if isinstance(new.operator, cst.Not) else UNKNOWN
        minus = {"operator": m.Minus()}
        rounded_up = m.BinaryOperation(m.UnaryOperation(**minus), m.FloorDivide(), m.Integer("1"))
        if m.matches(new, m.UnaryOperation(**minus, expression=rounded_up)):
            return new.expression.left.expression
        return new if value is UNKNOWN else literal(value)

    def leave_Comparison(self, old, new):
        value = self.known(new)
        inside = m.Comparison(comparisons=[m.ComparisonTarget(m.In() | m.NotIn(), HOLLOW)])
        if m.matches(new, inside) and is_pure(new.left, self.facts):
            return literal(isinstance(new.comparisons[0].operator, cst.NotIn))
        return new if value is UNKNOWN else literal(value)

    def leave_Subscript(self, old, new):
        index = m.SubscriptElement(m.Index(m.Integer()))
        if m.matches(new, m.Subscript(m.Tuple(), slice=[index])):
            at = new.slice[0].slice.value.evaluated_value
            if at < len(new.value.elements):
                return as_operand(new.value.elements[at].value)
        if m.matches(new.value, m.List() | m.Tuple()):
            value = self.known(new)
            return new if value is UNKNOWN or not is_literal(value) else literal(value)
        if m.matches(new, m.Subscript(m.Dict(), slice=[m.SubscriptElement(m.Index())])):
            return self.looked_up(new)
        return new

    def looked_up(self, new):
        """What stands behind a known key of a dictionary that is written down there."""
        key, rows = self.known(new.slice[0].slice.value), new.value.elements
        if key is UNKNOWN or any(isinstance(e, cst.StarredDictElement) for e in rows):
            return new
        keys = [self.known(e.key) for e in rows]
        if UNKNOWN in keys or keys.count(key) != 1:
            return new
        if not all(is_pure(e.value, self.facts) for e in rows):
            return new
        return as_operand(rows[keys.index(key)].value)

    def leave_Attribute(self, old, new):
        if isinstance(new.value, cst.Call) or code_of(new) == "math.inf":
            return new
        value = self.known(new)
        if is_config(new.value) and type(value) is not bool:
            return new
        return literal(value) if value is not UNKNOWN and is_literal(value) else new

    def leave_Call(self, old, new):
        if m.matches(new, m.Call(m.Lambda(params=m.Parameters([])), args=[])):
            return as_operand(new.func.body)
        name = new.func.value if isinstance(new.func, cst.Name) else ""
        method = isinstance(new.func, cst.Attribute) and isinstance(
            new.func.value, cst.Call | cst.SimpleString
        )
        if self.values.is_told(new):
            return literal(self.facts.expressions[code_of(new)])
        nothing = HOLLOW
        if name in ("zip", "enumerate") and any(m.matches(a.value, nothing) for a in new.args):
            return cst.parse_expression("[]")
        if name == "next" and len(new.args) == 2 and m.matches(new.args[0].value, nothing):
            return new.args[1].value
        if name == "dict" and len(new.args) == 1 and m.matches(new.args[0].value, nothing):
            return cst.parse_expression("{}")
        if m.matches(new, m.Call(m.Attribute(m.Dict([]), m.Name("items") | m.Name("values")), [])):
            return cst.parse_expression("[]")
        if name in ("any", "all") and m.matches(new.args[0].value, m.Tuple([m.Element()])):
            one = self.as_test(new.args[0].value.elements[0].value)
            if is_truth(one):
                return one
        if name == "sum" and m.matches(new, m.Call(args=[m.Arg(m.Tuple([m.Element()]))])):
            return as_operand(new.args[0].value.elements[0].value)
        if name == "len" and len(new.args) == 1 and m.matches(new.args[0].value, nothing):
            return literal(0)
        if name == "len" and len(new.args) == 1 and isinstance(new.args[0].value, cst.List):
            value = self.known(new)
            return new if value is UNKNOWN else literal(value)
        method |= m.matches(new.func, m.Attribute(m.Name("math"), m.Name("prod")))
        if name in ("bool", "any", "all") or name in self.facts.functions or method:
            value = self.known(new)
            if value is not UNKNOWN and is_literal(value):
                return literal(value)
        if name == "bool" and len(new.args) == 1 and is_truth(new.args[0].value):
            return new.args[0].value
        args = self.spread(new.args)
        if len(args) == len(new.args) and all(a is b for a, b in zip(args, new.args)):
            return new
        return new.with_changes(
            args=[a.with_changes(comma=cst.MaybeSentinel.DEFAULT) for a in args]
        )

    def spread(self, args) -> list[cst.Arg]:
        """Arguments of which starred ones that are written down are single ones."""
        found: list[cst.Arg] = []
        for a in args:
            keywords = m.DictElement(m.SimpleString())
            if a.star == "*" and isinstance(a.value, cst.Tuple | cst.List):
                stars = [isinstance(e, cst.StarredElement) for e in a.value.elements]
                if not (stars and any(f.keyword or f.star == "**" for f in found)):
                    found += [
                        cst.Arg(e.value, star="*" if star else "")
                        for e, star in zip(a.value.elements, stars)
                    ]
                    continue
            elif a.star == "**" and m.matches(a.value, m.Call(m.Name("dict"), [m.Arg(star="")])):
                found.append(a.with_changes(value=a.value.args[0].value))
                continue
            elif a.star == "**" and m.matches(a.value, m.Dict([m.ZeroOrMore(keywords)])):
                names = [e.key.evaluated_value for e in a.value.elements]
                if all(name.isidentifier() for name in names):
                    equal = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
                    found += [
                        cst.Arg(e.value, keyword=cst.Name(name), equal=equal)
                        for e, name in zip(a.value.elements, names)
                    ]
                    continue
            found.append(a)
        return found

    def leave_FormattedString(self, old, new):
        parts = []
        for part in new.parts:
            if isinstance(part, cst.FormattedStringExpression) and not part.format_spec:
                value = self.known(part.expression)
                simple = type(value) in (str, int, bool) and part.conversion in (None, "r")
                text = repr(value) if part.conversion else str(value)
                if simple and (plain(text) or new.prefix == "f"):
                    part = cst.FormattedStringText(in_quotes(text, new.quote))
            if parts and all(isinstance(p, cst.FormattedStringText) for p in (parts[-1], part)):
                part = cst.FormattedStringText(parts.pop().value + part.value)
            parts.append(part)
        if all(isinstance(p, cst.FormattedStringText) for p in parts) and new.prefix == "f":
            text = "".join(p.value for p in parts).replace("{{", "{").replace("}}", "}")
            return cst.SimpleString(new.quote + text + new.quote)
        return new.with_changes(parts=parts)

    def leave_ConcatenatedString(self, old, new):
        if m.matches(new.left, NO_TEXT):
            return wrapped(new, new.right)
        if m.matches(new.right, NO_TEXT):
            return wrapped(new, new.left)
        return new

    def leave_BinaryOperation(self, old, new):
        if isinstance(new.operator, cst.Add):
            nothing = EMPTY | NO_TEXT
            if m.matches(new.left, nothing):
                return wrapped(new, new.right)
            if m.matches(new.right, nothing):
                return wrapped(new, new.left)
            text = m.SimpleString(lpar=[]) | m.FormattedString(lpar=[])
            if m.matches(new, m.BinaryOperation(text, right=text)):
                both = cst.ConcatenatedString(new.left, new.right)
                return both.with_changes(lpar=new.lpar, rpar=new.rpar)
        if isinstance(new.operator, cst.BitOr):
            nothing = m.Dict([]) | m.Call(m.Name("set"), args=[])
            if m.matches(new.right, nothing):
                return wrapped(new, new.left)
            if m.matches(new.left, nothing):
                return wrapped(new, new.right)
        one = m.Integer("1") | m.Float("1.0")
        if isinstance(new.operator, cst.Multiply) and m.matches(new.right, one):
            return wrapped(new, new.left)
        nothing = m.Name("False") | m.Integer("0")
        if isinstance(new.operator, cst.Add | cst.Subtract) and m.matches(new.right, nothing):
            if m.matches(new.right, m.Name("False")) or m.matches(new.left, m.Integer()):
                return wrapped(new, new.left)
        if isinstance(new.operator, cst.Subtract) and m.matches(
            new.right, m.Call(m.Name("set"), [])
        ):
            return wrapped(new, new.left)
        if m.matches(new, m.BinaryOperation(m.Integer(), m.Subtract(), m.Integer())):
            value = self.known(new)
            return new if value < 0 else literal(value)
        return self.with_ones(new)

    def with_ones(self, new):
        """
        Sizes divided by 1, and parts of 0: what is left of ranks where there is one. A fraction's
        1 is written 1.0, see refuse_ones().
        """
        size = m.Integer() | SIMPLE
        nothing = m.Integer("0") | m.BinaryOperation(m.Integer("0"), m.Multiply(), size)
        if m.matches(new, m.BinaryOperation(operator=m.BitOr(), right=m.Integer("0"))):
            return wrapped(new, new.left)
        if m.matches(new, m.BinaryOperation(size, m.Add(), m.BinaryOperation())):
            return wrapped(new, new.left) if m.matches(new.right, nothing) else new
        if m.matches(new, m.BinaryOperation(m.Integer("1"), m.Multiply(), size)):
            return wrapped(new, new.right)
        by_one = self.known(new.right) if m.matches(new.left, size) else UNKNOWN
        if type(by_one) is int and by_one == 1 and isinstance(new.operator, cst.FloorDivide):
            return wrapped(new, new.left)
        if type(by_one) is int and by_one == 1 and isinstance(new.operator, cst.Modulo):
            return literal(0)
        return new

    def spliced(self, elements) -> list:
        found = []
        for e in elements:
            if isinstance(e, cst.StarredElement) and isinstance(e.value, cst.List | cst.Tuple):
                found += e.value.elements
            else:
                found.append(e)
        return [e.with_changes(comma=cst.MaybeSentinel.DEFAULT) for e in found]

    def leave_List(self, old, new):
        starred = any(isinstance(e, cst.StarredElement) for e in new.elements)
        return new.with_changes(elements=self.spliced(new.elements)) if starred else new

    def leave_Tuple(self, old, new):
        if not any(m.matches(e, m.StarredElement(m.List() | m.Tuple())) for e in new.elements):
            return new
        elements = self.spliced(new.elements)
        if len(elements) == 1:
            elements = [elements[0].with_changes(comma=cst.Comma())]
        return new.with_changes(elements=elements)

    def leave_Dict(self, old, new):
        kept = []
        for e in new.elements:
            if isinstance(e, cst.StarredDictElement) and isinstance(e.value, cst.Dict):
                kept += e.value.elements
            else:
                kept.append(e)
        if len(kept) == len(new.elements):
            return new
        kept = [e.with_changes(comma=cst.MaybeSentinel.DEFAULT) for e in kept]
        return new.with_changes(elements=kept)

    def once(self, new):
        """A comprehension over a list of one thing, as that one element."""
        over = new.for_in.iter
        if not m.matches(over, m.List([m.Element()])) or new.for_in.ifs or new.for_in.inner_for_in:
            return None
        pairs = matched(new.for_in.target, over.elements[0].value)
        for target, item in pairs:
            if not isinstance(target, cst.Name) or not is_pure(item, self.facts):
                return None
            if names_in(new.elt).read[target.value] > 1 and not m.matches(item, SIMPLE):
                return None
        return Replacing({t.value: as_operand(item) for t, item in pairs}).transform(new.elt)

    def comprehension(self, new, nothing: str):
        over = self.known(new.for_in.iter)
        if m.matches(new.for_in.iter, HOLLOW) or over is not UNKNOWN and not over:
            return cst.parse_expression(nothing)
        ifs = [i for i in new.for_in.ifs if self.known(i.test) is UNKNOWN or not self.known(i.test)]
        if len(ifs) < len(new.for_in.ifs):
            return new.with_changes(for_in=new.for_in.with_changes(ifs=ifs))
        return new

    def leave_ListComp(self, old, new):
        if self.known(new) == []:
            return cst.parse_expression("[]")
        if (one := self.once(new)) is not None:
            return cst.List([cst.Element(one)])
        return self.comprehension(new, "[]")

    def leave_GeneratorExp(self, old, new):
        if (one := self.once(new)) is not None:
            return cst.Tuple([cst.Element(one, comma=cst.Comma())])
        return self.comprehension(new, "()")

    def leave_SetComp(self, old, new):
        return self.comprehension(new, "set()")

    def leave_DictComp(self, old, new):
        """{k: v for k, v in x.items()} is dict(x)."""
        same = m.CompFor(
            m.Tuple([m.Element(m.Name()), m.Element(m.Name())]),
            m.Call(m.Attribute(attr=m.Name("items")), []),
            ifs=[],
            inner_for_in=None,
        )
        if m.matches(new.for_in, same):
            names = [e.value.value for e in new.for_in.target.elements]
            if m.matches(new, m.DictComp(m.Name(names[0]), m.Name(names[1]))):
                return cst.Call(cst.Name("dict"), [cst.Arg(new.for_in.iter.func.value)])
        return self.comprehension(new, "{}")

    def as_test(self, node):
        """The same where only its truth counts."""
        if isinstance(node, cst.BooleanOperation):
            left, right = self.as_test(node.left), self.as_test(node.right)
            both, value = isinstance(node.operator, cst.And), self.known(right)
            if value is not UNKNOWN and bool(value) == both:
                return left
            if value is not UNKNOWN and is_pure(left, self.facts):
                return literal(bool(value))
            return node.with_changes(left=left, right=right)
        if m.matches(node, m.Call(m.Name("bool"), args=[m.Arg()])):
            return self.as_test(node.args[0].value)
        return node

    # statements

    def leave_If(self, old, new):
        new = new.with_changes(test=self.as_test(new.test))
        test = self.known(new.test)
        if test is UNKNOWN:
            if new.orelse is not None and is_empty(
                new.orelse.body if isinstance(new.orelse, cst.Else) else None
            ):
                new = new.with_changes(orelse=None)
            if new.orelse is None and is_empty(new.body) and is_pure(new.test, self.facts):
                return cst.RemoveFromParent()
            if isinstance(new.orelse, cst.Else) and is_empty(new.body):
                return new.with_changes(test=negated(new.test), body=new.orelse.body, orelse=None)
            if m.matches(new.orelse, m.If(orelse=None)) and is_empty(new.body):
                if id(old) not in self.elifs:
                    both = [in_and(test) for test in (negated(new.test), new.orelse.test)]
                    test = cst.BooleanOperation(both[0], cst.And(), both[1])
                    return new.with_changes(test=test, body=new.orelse.body, orelse=None)
            if new.orelse is None and id(old) not in self.elifs and self.refuses(new.body):
                return asserted(negated(new.test), new.leading_lines)
            return new
        if id(old) in self.elifs:
            if test:
                return cst.Else(new.body, leading_lines=new.leading_lines)
            return cst.RemoveFromParent() if new.orelse is None else new.orelse
        if test:
            taken = list(new.body.body)
        elif isinstance(new.orelse, cst.If):
            return new.orelse.with_changes(leading_lines=new.leading_lines)
        else:
            taken = list(new.orelse.body.body) if new.orelse else []
        taken = [s for s in taken if not m.matches(s, m.SimpleStatementLine([m.Pass()]))]
        if not taken:
            return cst.RemoveFromParent()
        if isinstance(taken[0], cst.BaseCompoundStatement | cst.SimpleStatementLine):
            taken[0] = with_comments(taken[0], new.leading_lines)
        return cst.FlattenSentinel(taken)

    def leave_For(self, old, new):
        if new.orelse:
            return new
        over = self.known(new.iter)
        if m.matches(new.iter, HOLLOW) or over is not UNKNOWN and not list(over):
            return cst.RemoveFromParent()
        single = m.matches(new.iter, m.List([m.Element()]) | m.Tuple([m.Element()]))
        leave = m.If(body=m.IndentedBlock([m.SimpleStatementLine([m.Break()])]), orelse=None)
        *before, last = new.body.body
        if single and before and m.matches(last, leave) and is_pure(last.test, self.facts):
            new = new.with_changes(body=new.body.with_changes(body=before))
        leaves = find_all(new.body, cst.Break, cst.Continue)
        if type(over) is range and len(over) == 1 and not leaves:
            new = new.with_changes(iter=cst.List([cst.Element(literal(over[0]))]))
        new = self.without_false(new)
        once = m.matches(new.iter, m.List([m.Element(CONSTANT)]) | m.Tuple([m.Element(CONSTANT)]))
        if once and m.matches(new.target, m.Name()) and not leaves:
            instead = {new.target.value: new.iter.elements[0].value}
            body = list(Replacing(instead).transform(new.body).body)
            body[0] = with_comments(body[0], new.leading_lines)
            return cst.FlattenSentinel(body)
        if is_empty(new.body) and is_pure(new.iter, self.facts):
            return cst.RemoveFromParent()
        again = m.matches(new.iter, m.Call()) and leaf_of(new.iter.func) in self.facts.reminders
        read = names_in(new.body).read
        if again and not leaves and not any(read[n.value] for n in find_all(new.target, cst.Name)):
            body = list(new.body.body)
            return cst.FlattenSentinel([with_comments(body[0], new.leading_lines), *body[1:]])
        if m.matches(new, m.For(iter=m.List([m.Element()]))) and not leaves:
            value = cst.AssignTarget(new.target), new.iter.elements[0].value
            line = cst.SimpleStatementLine([cst.Assign([value[0]], value[1])])
            return cst.FlattenSentinel([with_comments(line, new.leading_lines), *new.body.body])
        return new

    def without_false(self, new):
        """`for x in (a, None): if x:` without what is never taken."""
        inside = m.IndentedBlock([m.If(m.Name(), orelse=None)])
        if not m.matches(new, m.For(m.Name(), m.Tuple(), inside)):
            return new
        if new.body.body[0].test.value != new.target.value:
            return new
        never = m.Name("None") | m.Name("False")
        elements = [e for e in new.iter.elements if not m.matches(e.value, never)]
        if len(elements) == len(new.iter.elements) or len(elements) < 2:
            return new
        elements[-1] = elements[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return new.with_changes(iter=new.iter.with_changes(elements=elements))

    def refuses(self, block) -> bool:
        """Whether nothing is done there but to say what is wrong."""
        *said, last = block.body
        raises = m.matches(last, m.SimpleStatementLine([m.Raise(exc=m.Call())]))
        if not raises or leaf_of(last.body[0].exc.func) not in self.facts.refusals:
            return False
        return all(m.matches(s, m.SimpleStatementLine([m.Assign()])) for s in said)

    def leave_Try(self, old, new):
        """Without handlers that raise the same again, or something that says more of it."""
        again = m.IndentedBlock([m.SimpleStatementLine([m.Raise(None)])])
        handlers = list(new.handlers)
        while handlers and (m.matches(handlers[-1].body, again) or self.refuses(handlers[-1].body)):
            handlers.pop()
        final = None if new.finalbody and is_empty(new.finalbody.body) else new.finalbody
        return tried(new, handlers, final)

    def leave_With(self, old, new):
        items = [i for i in new.items if code_of(i.item) != "contextlib.nullcontext()"]
        if not items:
            body = list(new.body.body)
            body[0] = with_comments(body[0], new.leading_lines)
            return cst.FlattenSentinel(body)
        if len(items) < len(new.items):
            items = [i.with_changes(comma=cst.MaybeSentinel.DEFAULT) for i in items]
            return new.with_changes(items=items)
        return new

    def leave_SimpleStatementLine(self, old, new):
        (first, *more) = new.body
        if more:
            return new
        if isinstance(first, cst.Assert) and self.known(first.test) not in (UNKNOWN, False):
            return cst.RemoveFromParent()
        if m.matches(first, m.Expr(m.Call(m.Name("require")))):
            ok = self.known(first.value.args[0].value)
            if ok is UNKNOWN and "require" in self.facts.refusals:
                return asserted(first.value.args[0].value, new.leading_lines)
            if ok is not UNKNOWN and ok:
                return cst.RemoveFromParent()
            if ok is not UNKNOWN:
                error = cst.Call(
                    cst.Name("UserError"),
                    [first.value.args[1].with_changes(comma=cst.MaybeSentinel.DEFAULT)],
                )
                return new.with_changes(body=[cst.Raise(error)])
        if isinstance(first, cst.Assign) and self.inside and len(first.targets) == 1:
            pairs = pairs_of(first) or []
            kept = [
                p for p in pairs if not isinstance(p[0], cst.Name) or not p[0].deep_equals(p[1])
            ]
            if len(kept) < len(pairs):
                left = assignment(first, kept)
                return new.with_changes(body=[left]) if left else cst.RemoveFromParent()
        if isinstance(first, cst.Expr) and not is_doc(new) and is_pure(first.value, self.facts):
            return cst.RemoveFromParent()
        empty = m.AugAssign(operator=m.AddAssign() | m.BitOrAssign(), value=HOLLOW)
        empty |= m.AugAssign(operator=m.AddAssign() | m.SubtractAssign(), value=m.Integer("0"))
        return cst.RemoveFromParent() if m.matches(first, empty) else new

    def leave_IndentedBlock(self, old, new):
        new = self.unnested(self.undivided(self.stored(self.reachable(new))))
        return filled(self.returned(new))

    def unnested(self, block):
        """`def f(): ...; return f()` as what stands inside."""
        if len(block.body) < 2 or not isinstance(block.body[-2], cst.FunctionDef):
            return block
        inner, name = block.body[-2], block.body[-2].name.value
        called = m.SimpleStatementLine([m.Return(m.Call(m.Name(name), []))])
        plain = m.FunctionDef(params=m.Parameters([], kwonly_params=[]), decorators=[])
        if not m.matches(block.body[-1], called) or not m.matches(inner, plain):
            return block
        if find_all(inner, cst.Yield) or names_in(inner.body).read[name]:
            return block
        first, *more = inner.body.body
        first = with_comments(first, inner.leading_lines)
        return block.with_changes(body=[*block.body[:-2], first, *more])

    def stored(self, block):
        """`x = a; x = b` as the second alone."""
        rule = m.SimpleStatementLine([m.Assign([m.AssignTarget(m.Name())])])
        body = list(block.body)
        for one, two in zip(block.body, block.body[1:]):
            if m.matches(one, rule) and m.matches(two, rule) and self.inside:
                (a,), (b,) = one.body, two.body
                name = a.targets[0].target.value
                again = name == b.targets[0].target.value and not names_in(b.value).read[name]
                if again and is_pure(a.value, self.facts):
                    body.remove(one)
        return block if len(body) == len(block.body) else block.with_changes(body=body)

    def undivided(self, block):
        """`if a: return x` before `return x` as the second alone."""
        last = block.body[-2:]
        rule = m.If(body=m.IndentedBlock([m.SimpleStatementLine([m.Return()])]), orelse=None)
        while len(last) == 2 and m.matches(last[0], rule) and is_pure(last[0].test, self.facts):
            if code_of(last[0].body.body[0].body[0]) != code_of(last[1]).strip():
                break
            block = block.with_changes(body=[*block.body[:-2], last[1]])
            last = block.body[-2:]
        return block

    def returned(self, block):
        """`x = f(); return x` as `return f()`."""
        pair = [
            m.SimpleStatementLine([m.Assign([m.AssignTarget(m.Name())])]),
            m.SimpleStatementLine([m.Return(m.Name())]),
        ]
        last = block.body[-2:]
        if len(last) < 2 or not all(m.matches(s, rule) for s, rule in zip(last, pair)):
            return block
        (assign,), (result,) = last[0].body, last[1].body
        if assign.targets[0].target.value != result.value.value:
            return block
        line = last[1].with_changes(
            leading_lines=[*last[0].leading_lines, *last[1].leading_lines],
            body=[result.with_changes(value=assign.value)],
        )
        return block.with_changes(body=[*block.body[:-2], line])

    def reachable(self, block):
        for i, s in enumerate(block.body[:-1]):
            ends = m.matches(s, ENDS)
            if isinstance(s, cst.If) and always_ends(s):
                ends = True
            if ends:
                return block.with_changes(body=block.body[: i + 1])
        return block


def negated(test: cst.BaseExpression) -> cst.BaseExpression:
    """What is true where a test is not."""
    opposite = {
        cst.Equal: cst.NotEqual,
        cst.LessThan: cst.GreaterThanEqual,
        cst.LessThanEqual: cst.GreaterThan,
        cst.Is: cst.IsNot,
        cst.In: cst.NotIn,
    }
    opposite |= {b: a for a, b in opposite.items()}
    if isinstance(test, cst.UnaryOperation) and isinstance(test.operator, cst.Not):
        return test.expression
    if isinstance(test, cst.Comparison) and len(test.comparisons) == 1:
        (target,) = test.comparisons
        if type(target.operator) in opposite:  # of nan both would be false: no check is of it
            target = target.with_changes(operator=opposite[type(target.operator)]())
            return test.with_changes(comparisons=[target])
    if isinstance(test, cst.BooleanOperation) and isinstance(test.operator, cst.Or):
        left, right = negated(test.left), negated(test.right)
        return test.with_changes(left=left, operator=cst.And(), right=right)
    loose = m.BooleanOperation() | m.IfExp() | m.NamedExpr()
    return cst.UnaryOperation(cst.Not(), as_operand(test) if m.matches(test, loose) else test)


def in_and(test: cst.BaseExpression) -> cst.BaseExpression:
    loose = m.BooleanOperation(operator=m.Or()) | m.IfExp() | m.NamedExpr() | m.Lambda()
    return as_operand(test) if m.matches(test, loose) else test


def asserted(test: cst.BaseExpression, lines) -> cst.SimpleStatementLine:
    return cst.SimpleStatementLine([cst.Assert(test)], lines)


def tried(node: cst.Try, handlers: list, final):
    """A try statement with these handlers; where there are none, what stands inside."""
    if len(handlers) == len(node.handlers) and final is node.finalbody:
        return node
    if handlers or final:
        return node.with_changes(handlers=handlers, finalbody=final)
    body = [*node.body.body, *(node.orelse.body.body if node.orelse else [])]
    return cst.FlattenSentinel([with_comments(body[0], node.leading_lines), *body[1:]])


class Unraised(Transformer):
    """Handlers of exceptions that nobody raises."""

    def __init__(self, names: set[str]):
        self.names = names

    def left(self, handler: cst.ExceptHandler) -> cst.ExceptHandler | None:
        if isinstance(handler.type, cst.Tuple):
            kept = [e for e in handler.type.elements if leaf_of(e.value) not in self.names]
            if len(kept) == len(handler.type.elements):
                return handler
            left = kept[0].value if len(kept) == 1 else handler.type.with_changes(elements=kept)
            return handler.with_changes(type=left) if kept else None
        return None if leaf_of(handler.type) in self.names else handler

    def leave_Try(self, old, new):
        handlers = [h for h in map(self.left, new.handlers) if h]
        if len(handlers) == len(new.handlers):
            same = all(a is b for a, b in zip(handlers, new.handlers))
            return new if same else new.with_changes(handlers=handlers)
        return tried(new, handlers, new.finalbody)


def unraised(module: cst.Module, facts: Facts) -> cst.Module:
    """Without handlers of the module's own exceptions that nothing mentions but handlers."""
    known, caught = Known(facts, module), Counter()
    read = sum((names_in(s).read for s in module.body), Counter())
    for handler in find_all(module, cst.ExceptHandler):
        if handler.type is not None:
            caught.update(names_in(handler.type).read)
    builtin = m.Arg(m.Name("Exception") | m.Name("BaseException"))
    roots = {
        name for name, c in known.classes.items() if any(m.matches(b, builtin) for b in c.bases)
    }
    names = {name for name in roots if caught[name] and read[name] == caught[name]}
    return revisit(module, Unraised(names), mentions(names)) if names else module


def always_ends(statement) -> bool:
    if not isinstance(statement, cst.If) or statement.orelse is None:
        return False
    bodies = [statement.body]
    other = statement.orelse
    if isinstance(other, cst.If):
        return always_ends(other) and ends(statement.body)
    return all(ends(b) for b in [*bodies, other.body])


def ends(block) -> bool:
    return bool(block.body) and m.matches(block.body[-1], ENDS)


def plain(text: str) -> bool:
    return not re.search(r"[\"'{}\\\n]", text)


def in_quotes(text: str, quote: str) -> str:
    """A text as it stands between such quotes of an f-string."""
    for a, b in (
        ("\\", r"\\"),
        ("\n", r"\n"),
        (quote[0], "\\" + quote[0]),
        ("{", "{{"),
        ("}", "}}"),
    ):
        text = text.replace(a, b)
    return text


def is_truth(node: cst.CSTNode) -> bool:
    """Whether an expression gives a bool by its form."""
    if isinstance(node, cst.BooleanOperation):
        return is_truth(node.left) and is_truth(node.right)
    return m.matches(
        node, m.Comparison() | m.UnaryOperation(operator=m.Not()) | m.Call(m.Name("bool"))
    )


def is_empty(block) -> bool:
    return block is not None and all(
        m.matches(s, m.SimpleStatementLine([m.Pass()])) for s in block.body
    )


def filled(block):
    """With a `pass` where nothing is left, and without one where something is."""
    kept = [s for s in block.body if not m.matches(s, m.SimpleStatementLine([m.Pass()]))]
    if not kept:
        return block.with_changes(body=[cst.parse_statement("pass")])
    return block.with_changes(body=kept) if len(kept) < len(block.body) else block


def is_pure(node: cst.CSTNode, facts: Facts) -> bool:
    """Whether nobody would miss the expression if its value is not used."""
    if isinstance(node, cst.Call):
        name = code_of(node.func)
        leaf = name.split(".")[-1]
        pure = leaf in facts.pure or name in facts.pure or name in facts.functions
        pure = pure or name in BUILTINS or name in facts.harmless
        inner = [node.func.value] if isinstance(node.func, cst.Attribute) else []
        return pure and all(is_pure(x, facts) for x in [*inner, *(a.value for a in node.args)])
    if isinstance(node, cst.Lambda):
        return True
    if isinstance(node, cst.Await | cst.Yield | cst.NamedExpr):
        return False
    return all(is_pure(child, facts) for child in kids(node))


# --- names -------------------------------------------------------------------------------------


def leaf_of(node: cst.CSTNode) -> str:
    """The last name of a.b.c; empty of what is no name."""
    if isinstance(node, cst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, cst.Name) else ""


class Names(Walker):
    """Counts of names that are read and of attributes that are read, and where names are bound."""

    def __init__(self):
        self.read, self.attributes, self.bound = Counter(), Counter(), Counter()
        self.strings: Counter = Counter()
        self.held: Counter = Counter()  # attributes that are read, with the last name before them
        self.set: Counter = Counter()  # those that are set, likewise
        self.own: set[str] = set()  # names that are bound in this scope, and not in one inside
        self.free: Counter = Counter()  # names that are read and not bound in a function around
        self.asked: set[str] = set()  # last names of what getattr() is called with
        self.outer: set[str] = set()  # those that are said to be global or nonlocal
        self.depth = 0  # of comprehensions and lambdas

    def visit_Attribute(self, node):
        self.attributes[node.attr.value] += 1
        self.held[leaf_of(node.value), node.attr.value] += 1
        self.visit(node.value)
        return False

    def visit_Name(self, node):
        self.read[node.value] += 1
        self.free[node.value] += 1

    def visit_Call(self, node):
        if m.matches(node.func, m.Name("getattr") | m.Name("hasattr")):
            leaf, name = leaf_of(node.args[0].value), node.args[1].value
            if isinstance(name, cst.SimpleString):
                self.attributes[name.raw_value] += 1
                self.held[leaf, name.raw_value] += 1
            else:
                self.asked.add(leaf)

    def visit_SimpleString(self, node):
        self.strings[node.raw_value] += 1

    def visit_Arg(self, node):
        self.visit(node.value)
        return False

    def visit_Param(self, node):
        self.bound[node.name.value] += 1
        for part in (node.annotation, node.default):
            if part is not None and not isinstance(part, cst.MaybeSentinel):
                self.visit(part)
        return False

    def bind(self, name: str) -> None:
        self.bound[name] += 1
        if not self.depth:
            self.own.add(name)

    def visit_FunctionDef(self, node):
        self.bind(node.name.value)
        for part in (*node.decorators, node.params, node.returns):
            if part is not None:
                self.visit(part)
        inside = names_in(node.body)
        self.add(inside, inside.own | set(names_in(node.params).bound))
        return False

    def visit_ClassDef(self, node):
        self.bind(node.name.value)
        for part in (*node.decorators, *node.bases, *node.keywords):
            self.visit(part)
        self.add(names_in(node.body), set())
        return False

    def add(self, inside: Names, own: set[str]) -> None:
        """What a function or class mentions, that has these names of its own."""
        for kind in ("read", "attributes", "bound", "strings", "held", "set"):
            getattr(self, kind).update(getattr(inside, kind))
        self.asked |= inside.asked
        self.free.update({name: n for name, n in inside.free.items() if name not in own})

    def visit_Lambda(self, node):
        self.depth += 1

    def leave_Lambda(self, node):
        self.depth -= 1

    def target(self, node) -> None:
        if isinstance(node, cst.Name):
            self.bind(node.value)
        elif isinstance(node, cst.Tuple | cst.List):
            for e in node.elements:
                self.target(e.value)
        elif isinstance(node, cst.StarredElement):
            self.target(node.value)
        elif isinstance(node, cst.Attribute):
            self.set[leaf_of(node.value), node.attr.value] += 1
            self.visit(node.value)  # what is set is not read
        else:
            self.visit(node)

    def visit_AssignTarget(self, node):
        self.target(node.target)
        return False

    def visit_AnnAssign(self, node):
        self.target(node.target)
        self.visit(node.annotation)
        if node.value:
            self.visit(node.value)
        return False

    def visit_AugAssign(self, node):
        if isinstance(node.target, cst.Name):
            self.bind(node.target.value)
            self.bound[node.target.value] += 1  # never bound once
            self.visit(node.target)
        else:
            if isinstance(node.target, cst.Attribute):
                self.set[leaf_of(node.target.value), node.target.attr.value] += 1
            self.visit(node.target)
        self.visit(node.value)
        return False

    def visit_For(self, node):
        self.target(node.target)
        for part in (node.iter, node.body, node.orelse):
            if part is not None:
                self.visit(part)
        return False

    def visit_CompFor(self, node):
        self.depth += 1
        self.target(node.target)
        self.depth -= 1
        for part in (node.iter, *node.ifs, node.inner_for_in):
            if part is not None:
                self.visit(part)
        return False

    def visit_AsName(self, node):
        self.target(node.name)
        return False

    def visit_NamedExpr(self, node):
        self.target(node.target)
        self.visit(node.value)
        return False

    def visit_Nonlocal(self, node):
        for item in node.names:
            self.bound[item.name.value] += 2
            self.outer.add(item.name.value)
        return False

    visit_Global = visit_Nonlocal

    def visit_ImportAlias(self, node):
        name = node.asname.name if node.asname else node.name
        if isinstance(name, cst.Name):
            self.bind(name.value)
        return False


@functools.lru_cache(maxsize=20000)
def names_in(node: cst.CSTNode) -> Names:
    found = Names()
    found.visit(node)
    found.own -= found.outer
    return found


class Replacing(Transformer):
    """Names that are read -> what stands there instead."""

    def __init__(self, instead: dict[str, cst.BaseExpression]):
        self.instead = instead

    def leave_Attribute(self, old, new):
        return new if new.attr is old.attr else new.with_changes(attr=old.attr)

    def leave_Arg(self, old, new):
        return new if new.keyword is old.keyword else new.with_changes(keyword=old.keyword)

    def leave_Param(self, old, new):
        return new if new.name is old.name else new.with_changes(name=old.name)

    def leave_AssignTarget(self, old, new):
        return old if isinstance(old.target, cst.Name) else new

    def leave_Name(self, old, new):
        return self.instead.get(new.value, new)


CONSTANT = (
    m.Name("None")
    | m.Name("True")
    | m.Name("False")
    | m.Integer()
    | m.Float()
    | m.SimpleString()
    | m.UnaryOperation(operator=m.Minus(), expression=m.Integer() | m.Float())
)


def is_constant(node: cst.CSTNode, facts: Facts) -> bool:
    """A literal; a tuple of such is one."""
    if isinstance(node, cst.Tuple):
        return all(is_constant(e.value, facts) for e in node.elements)
    return m.matches(node, CONSTANT)


def is_local_constant(node: cst.CSTNode, facts: Facts) -> bool:
    """The same, and a field that is fixed, of a configuration that is at hand."""
    if isinstance(node, cst.Attribute) and is_config(node.value):
        return node.attr.value in facts.fields
    if isinstance(node, cst.Tuple):
        return all(is_local_constant(e.value, facts) for e in node.elements)
    return is_constant(node, facts)


def pairs_of(assign: cst.Assign) -> list[tuple[cst.CSTNode, cst.BaseExpression]] | None:
    """(target, value) of a = x, of a, b = x, y, and of a = b = 0; None of all else."""
    if isinstance(assign, cst.AnnAssign):
        return [(assign.target, assign.value)] if assign.value else None
    if len(assign.targets) != 1:
        simple = all(isinstance(t.target, cst.Name | cst.Attribute) for t in assign.targets)
        if not simple or not m.matches(assign.value, CONSTANT):
            return None
        return [(t.target, assign.value) for t in assign.targets]
    target, value = assign.targets[0].target, assign.value
    if not isinstance(target, cst.Tuple):
        return [(target, value)]
    if not isinstance(value, cst.Tuple) or len(value.elements) != len(target.elements):
        return None
    parts = [*target.elements, *value.elements]
    if any(isinstance(e, cst.StarredElement) for e in parts):
        return None
    return [(t.value, v.value) for t, v in zip(target.elements, value.elements)]


def matched(target: cst.CSTNode, value: cst.BaseExpression) -> list[tuple]:
    """What each part of a target is given: a, b = x, y."""
    if not isinstance(target, cst.Tuple) or not isinstance(value, cst.Tuple):
        return [(target, value)]
    return [(t.value, v.value) for t, v in zip(target.elements, value.elements, strict=True)]


def assignment(assign: cst.Assign, pairs: list) -> cst.Assign | None:
    if not pairs:
        return None
    if len(assign.targets) > 1:
        left = [target for target, _ in pairs]
        return assign.with_changes(targets=[t for t in assign.targets if t.target in left])
    if len(pairs) == 1:
        target, value = pairs[0]
    else:
        target, value = (
            cst.Tuple([cst.Element(p[i]) for p in pairs], lpar=[], rpar=[]) for i in (0, 1)
        )
    if isinstance(value, cst.Tuple) and not value.lpar and len(value.elements) == 0:
        value = value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    new_target = assign.targets[0].with_changes(target=target)
    return assign.with_changes(targets=[new_target], value=value)


class Locals(Transformer):
    """Names of one outermost function: constants are put where they are read."""

    def __init__(self, facts: Facts):
        self.facts, self.depth = facts, 0

    def visit_FunctionDef(self, node):
        self.depth += 1

    def leave_FunctionDef(self, old, new):
        self.depth -= 1
        return new if self.depth else self.simplified(new)

    def simplified(self, function: cst.FunctionDef) -> cst.FunctionDef:
        names = names_in(function.body)
        params = names_in(function.params).bound
        gone, instead, tuples, unread = set(), {}, {}, []
        told = told_names(function.body)
        found: dict[str, list[cst.BaseExpression]] = defaultdict(list)
        for assign in find_all(function.body, cst.Assign, cst.AnnAssign):
            for target, value in pairs_of(assign) or ():
                if isinstance(target, cst.Name) and not params[target.value]:
                    found[target.value].append(value)
        for assign in find_all(function.body, cst.Assign):
            target = assign.targets[0].target
            if m.matches(target, m.Tuple([m.ZeroOrMore(m.Element(m.Name()))])):
                own = [e.value.value for e in target.elements]
                if not any(names.read[name] for name in own) and is_pure(assign.value, self.facts):
                    unread.append(assign)
        for name, values in found.items():
            value = values[0]
            if not names.read[name]:
                gone.add(name)
            elif names.bound[name] != len(values) or not all(map(value.deep_equals, values[1:])):
                continue
            elif is_local_constant(value, self.facts):
                if not is_long(value) or names.read[name] == told[name] == 1:
                    instead[name] = as_operand(value)
            elif m.matches(value, NOTHING):
                if name not in filled_names(function.body, self.facts.filling):
                    instead[name] = value
            elif len(values) > 1 or not is_set_first(function.body, name, value):
                continue
            elif isinstance(value, cst.Name):
                if names.bound[value.value] + params[value.value] <= 1 and value.value != name:
                    if not outlives(function.body, name, value.value):
                        instead[name] = value
            elif m.matches(value, m.Tuple() | m.Dict([m.AtLeastN(m.DictElement(), n=1)])):
                if all(self.is_steady(e.value, names, params) for e in value.elements):
                    tuples[name] = value
        body = function.body
        stars = Counter(
            (a.value.value, getattr(a, "star", "*"))
            for a in (find_all(body, cst.Arg, cst.StarredElement) if tuples else ())
            if getattr(a, "star", "*") and isinstance(a.value, cst.Name)
        )
        for name, value in tuples.items():
            if stars[name, "*" if isinstance(value, cst.Tuple) else "**"] == names.read[name]:
                gone.add(name)
        loops: Counter = Counter()  # reads of what is counted, in the loops that count it
        for node in find_all(body, cst.For):
            loops.update({t: names_in(node.body).read[t] for t in names_in(node.target).read})
        body = Uncounted({t for t in loops if loops[t] == names.read[t]}).transform(body)
        body = Unnamed({t for t in names.own if not names.read[t]}).transform(body)
        if gone & set(tuples):
            body = Spreading({k: v for k, v in tuples.items() if k in gone}).transform(body)
        if gone or instead or unread:
            body = Dropping(gone | set(instead), self.facts, unread).transform(body)
            body = Replacing(instead).transform(body)
        return function if body is function.body else function.with_changes(body=body)

    def is_steady(self, node: cst.BaseExpression, names: Names, params: Counter) -> bool:
        """Whether an expression is the same wherever it stands in a function, and cheap."""
        if isinstance(node, cst.Attribute):
            record = isinstance(node.value, cst.Name) and node.value.value in self.facts.tuples
            record = record or is_config(node.value)
            return record and self.is_steady(node.value, names, params)
        if isinstance(node, cst.Name):
            return names.bound[node.value] + params[node.value] <= 1
        return is_constant(node, self.facts)


def told_names(body: cst.CSTNode) -> Counter:
    """Of each name how often it is put into a text, of which a text can become a part."""
    found = find_all(body, cst.FormattedStringExpression)
    return Counter(
        part.expression.value
        for part in found
        if isinstance(part.expression, cst.Name) and not part.format_spec
    )


class Unnamed(Transformer):
    """`(x := y)` as y, where nobody reads x."""

    def __init__(self, unread: set[str]):
        self.unread = unread

    def leave_NamedExpr(self, old, new):
        if new.target.value not in self.unread:
            return new
        return new.value.with_changes(lpar=new.lpar, rpar=new.rpar) if new.lpar else new.value


class Uncounted(Transformer):
    """`for i, x in enumerate(y)` as `for x in y`, where nobody reads i."""

    def __init__(self, unread: set[str]):
        self.unread = unread

    def leave_For(self, old, new):
        pair = m.Tuple([m.Element(m.Name()), m.Element()])
        over = m.Call(m.Name("enumerate"), [m.Arg(keyword=None, star="")])
        if not m.matches(new, m.For(pair, over)):
            return new
        number, target = (e.value for e in new.target.elements)
        if number.value not in self.unread or names_in(new.body).read[number.value]:
            return new
        return new.with_changes(target=target, iter=new.iter.args[0].value)


def outlives(body: cst.CSTNode, name: str, value: str) -> bool:
    """Whether a name is read behind a loop whose turns set anew what it was given."""
    loops = [names_in(loop) for loop in find_all(body, cst.For, cst.While)]
    return any(i.bound[value] and i.read[name] < names_in(body).read[name] for i in loops)


def is_set_first(body: cst.CSTNode, name: str, value: cst.BaseExpression) -> bool:
    """Whether a name is set to this value before it is read: in a loop, by each of its turns."""
    for node in walk(body):
        if isinstance(node, cst.Assign | cst.AnnAssign):
            if any(v is value for _, v in pairs_of(node) or ()):
                return True
        if isinstance(node, cst.Name) and node.value == name:
            return False
    return False


class Spreading(Transformer):
    """Tuples and dictionaries of these names, where they are starred, as their elements."""

    def __init__(self, tuples: dict[str, cst.Tuple | cst.Dict]):
        self.tuples = tuples

    def written(self, node):
        name = node.value.value if isinstance(node.value, cst.Name) else ""
        if name not in self.tuples:
            return node
        return node.with_changes(value=as_operand(self.tuples[name]))

    def leave_Arg(self, old, new):
        return self.written(new) if new.star else new

    def leave_StarredElement(self, old, new):
        return self.written(new)


def is_long(node: cst.CSTNode) -> bool:
    """Whether a text is too long to stand in the middle of others: it keeps its name."""
    return isinstance(node, cst.SimpleString) and len(node.value) > 24


# methods of lists, dictionaries and sets by which nothing comes into them
LOOKS = {"items", "values", "keys", "get", "copy", "count", "index", "isdisjoint", "issubset"}
LOOKS |= {"issuperset", "union", "intersection", "difference", "symmetric_difference"}
FILLS = {*dir(list), *dir(dict), *dir(set)} - LOOKS


def held_by(node: cst.CSTNode | None) -> Iterator[str]:
    """Names of what an expression may be, or has in it, itself and no copy: a if b else (c, d)."""
    if isinstance(node, cst.Name):
        yield node.value
    elif isinstance(node, cst.IfExp):
        yield from (*held_by(node.body), *held_by(node.orelse))
    elif isinstance(node, cst.BooleanOperation):
        yield from (*held_by(node.left), *held_by(node.right))
    elif isinstance(node, cst.NamedExpr):
        yield from held_by(node.value)
    elif isinstance(node, cst.Tuple | cst.List | cst.Dict):
        for element in node.elements:
            if not isinstance(element, cst.StarredElement | cst.StarredDictElement):
                yield from held_by(element.value)


def filled_names(body: cst.CSTNode, filling: set[str]) -> set[str]:
    """
    Names of lists and dictionaries into which something may be put: by a method, by an index, under
    another name, or by a function that fills what it is given.
    """
    found: set[str] = set()
    for node in walk(body):
        kind = type(node)
        if kind is cst.Attribute:
            if node.attr.value in FILLS:
                found.update(held_by(node.value))
        elif kind is cst.AugAssign:
            found.update(names_in(node.target).read)
        elif kind is cst.AssignTarget:
            for part in find_all(node.target, cst.Subscript, cst.Attribute):
                found.update(names_in(part).read)
        elif kind in (cst.Assign, cst.AnnAssign, cst.NamedExpr, cst.Yield):
            found.update(held_by(node.value))
        elif kind in (cst.For, cst.CompFor):
            if isinstance(node.iter, cst.Tuple | cst.List):
                found.update(held_by(node.iter))
        elif kind is cst.Subscript:
            if not isinstance(node.value, cst.Name):
                found.update(held_by(node.value))
        elif kind is cst.Call and leaf_of(node.func) in filling:
            for arg in node.args:
                if not arg.star:
                    found.update(held_by(arg.value))
    return found


def filling(module: cst.Module) -> set[str]:
    """Functions and classes that put something into a list or dictionary given to them, or may."""
    found = {c.name.value for c in find_all(module, cst.ClassDef)}
    functions = find_all(module, cst.FunctionDef)
    while True:
        before = len(found)
        for function in functions:
            params = set(names_in(function.params).bound) - {"self"}
            if params & filled_names(function.body, found):
                found.add(function.name.value)
        if len(found) == before:
            return found


class Dropping(Transformer):
    """Assignments to these names; a call that may do something stays."""

    def __init__(self, names: set[str], facts: Facts, unread: Iterable[cst.Assign] = ()):
        self.names, self.facts = names, facts
        self.unread = {id(assign) for assign in unread}

    def leave_SimpleStatementLine(self, old, new):
        if len(old.body) == 1 and id(old.body[0]) in self.unread:
            return cst.RemoveFromParent()
        if len(new.body) == 1 and isinstance(new.body[0], cst.AnnAssign):
            one = new.body[0]
            gone = self.is_gone(one.target) and one.value and is_pure(one.value, self.facts)
            return cst.RemoveFromParent() if gone else new
        if len(new.body) != 1 or not isinstance(new.body[0], cst.Assign):
            return new
        assign, pairs = new.body[0], pairs_of(new.body[0])
        if pairs is None:
            return new
        kept, effects = [], []
        for target, value in pairs:
            if not self.is_gone(target):
                kept.append((target, value))
            elif not is_pure(value, self.facts):
                effects.append(value)
        if len(kept) == len(pairs):
            return new
        if effects and kept:
            return new
        if effects:
            lines = [cst.SimpleStatementLine([cst.Expr(e)]) for e in effects]
            lines[0] = with_comments(lines[0], new.leading_lines)
            return cst.FlattenSentinel(lines)
        left = assignment(assign, kept)
        return new.with_changes(body=[left]) if left else cst.RemoveFromParent()

    def is_gone(self, target) -> bool:
        return isinstance(target, cst.Name) and target.value in self.names

    def leave_IndentedBlock(self, old, new):
        return filled(new)


class DroppingAttributes(Dropping):
    """Assignments to these attributes: pairs of a class and a name."""

    def __init__(self, names: set[tuple[str, str]], known: Known):
        super().__init__(names, known.facts)
        self.known, self.inside = known, []

    def visit_ClassDef(self, node):
        self.inside.append(node.name.value)

    def leave_ClassDef(self, old, new):
        self.inside.pop()
        return new

    def is_gone(self, target) -> bool:
        if not isinstance(target, cst.Attribute):
            return False
        cls = self.known.class_of(target.value, self.inside[0] if self.inside else "")
        return (cls, target.attr.value) in self.names


# --- classes, attributes, functions and calls --------------------------------------------------


@dataclasses.dataclass
class Known:
    """What a module defines."""

    facts: Facts
    module: cst.Module

    def __post_init__(self):
        self.classes = {s.name.value: s for s in self.module.body if isinstance(s, cst.ClassDef)}
        self.functions = {
            s.name.value: s for s in self.module.body if isinstance(s, cst.FunctionDef)
        }
        every = find_all(self.module, cst.FunctionDef)
        tops = {id(f) for f in self.functions.values()}
        for cls in self.classes.values():
            tops |= {id(f) for f in cls.body.body}
        self.inner = {f.name.value: f for f in every if id(f) not in tops}
        self.counts = Counter(f.name.value for f in every)
        self.holders = {k: v for k, v in self.facts.called_as.items() if v in self.classes}
        self.own_members: dict[str, set[str]] = defaultdict(set)
        self.set_by: dict[str, set[str]] = defaultdict(set)  # attributes; "": of who knows what
        self.all_members: dict[str, set[str]] = {}
        for statement in self.module.body:
            inside = statement.name.value if isinstance(statement, cst.ClassDef) else ""
            for leaf, attribute in names_in(statement).set:
                cls = inside if leaf == "self" else self.holders.get(leaf, "")
                self.set_by[cls].add(attribute)
        for cls, attributes in self.set_by.items():
            self.own_members[cls] |= attributes
        for name, cls in self.classes.items():
            for s in cls.body.body:
                self.own_members[name].add(defined(s))

    def bases(self, name: str) -> list[str]:
        """The class and those of the module that it inherits from."""
        found = [name]
        for base in self.classes[name].bases if name in self.classes else ():
            if isinstance(base.value, cst.Name) and base.value.value in self.classes:
                found += self.bases(base.value.value)
        return found

    def class_of(self, node: cst.CSTNode, inside: str) -> str:
        """The class of what an expression holds, by its name; empty where that says nothing."""
        if isinstance(node, cst.Name) and node.value == "self":
            return inside
        return self.holders.get(leaf_of(node), "")

    def owner(self, leaf: str, attribute: str, inside: str) -> str:
        """
        The class of what is read as leaf.attribute in class `inside`; empty where it is not known
        to be one that has such an attribute.
        """
        cls = inside if leaf == "self" else self.holders.get(leaf, "")
        return cls if cls and attribute in self.members(cls) else ""

    def members(self, cls: str) -> set[str]:
        """Attributes, fields and methods of a class and of those that it is related to."""
        if cls not in self.all_members:
            names = [name for name in self.classes if self.related(name, cls)]
            self.all_members[cls] = set().union(*(self.own_members[name] for name in names))
        return self.all_members[cls]

    def is_set(self, cls: str, attribute: str) -> bool:
        """Whether an object of the class may get another value of an attribute later."""
        setters = [c for c, names in self.set_by.items() if attribute in names]
        return any(not c or self.related(c, cls) for c in setters)

    def related(self, a: str, b: str) -> bool:
        return bool(a and b) and (a in self.bases(b) or b in self.bases(a))

    def methods(self, name: str) -> dict[str, cst.FunctionDef]:
        body = self.classes[name].body.body
        return {s.name.value: s for s in body if isinstance(s, cst.FunctionDef)}

    def fields(self, name: str) -> list[cst.AnnAssign]:
        """Of a NamedTuple or a dataclass."""
        lines = [s for s in self.classes[name].body.body if isinstance(s, cst.SimpleStatementLine)]
        return [s.body[0] for s in lines if isinstance(s.body[0], cst.AnnAssign)]


class InClasses(Walker):
    """A visitor that knows in which class of the module it is."""

    def __init__(self, known: Known):
        self.known, self.inside = known, []

    def visit_ClassDef(self, node):
        self.inside.append(node.name.value)

    def leave_ClassDef(self, node):
        self.inside.pop()

    @property
    def here(self) -> str:
        return self.inside[0] if self.inside else ""


class Looks(Walker):
    """
    Reads of attributes where a list, set or dictionary is only looked at: whether it has anything,
    whether something is in it, all that is in it.
    """

    def __init__(self):
        self.found: Counter = Counter()

    def looked(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.Attribute):
            self.found[node.attr.value] += 1
        elif isinstance(node, cst.BooleanOperation):
            self.looked(node.left)
            self.looked(node.right)

    def visit_If(self, node):
        self.looked(node.test)

    visit_IfExp = visit_While = visit_If

    def visit_UnaryOperation(self, node):
        if isinstance(node.operator, cst.Not):
            self.looked(node.expression)

    def visit_ComparisonTarget(self, node):
        if isinstance(node.operator, cst.In | cst.NotIn):
            self.looked(node.comparator)

    def visit_For(self, node):
        self.looked(node.iter)

    visit_CompFor = visit_For

    def visit_Arg(self, node):
        if node.star:
            self.looked(node.value)

    def visit_StarredElement(self, node):
        self.looked(node.value)

    def visit_Call(self, node):
        func, looks = node.func, m.Name("items") | m.Name("values") | m.Name("keys") | m.Name("get")
        if isinstance(func, cst.Attribute) and m.matches(func.attr, looks):
            self.looked(func.value)
        taken = m.Name("len") | m.Name("any") | m.Name("all") | m.Name("sorted") | m.Name("bool")
        if m.matches(func, taken | m.Name("list") | m.Name("tuple") | m.Name("set")):
            for arg in node.args:
                self.looked(arg.value)


PRESENT = object()
TEXT = m.Arg(m.SimpleString())


class AttributeFacts(InClasses):
    """Assignments of attributes: which are one constant for all objects of a class."""

    def __init__(self, known: Known):
        super().__init__(known)
        self.set: dict[tuple[str, str], list] = defaultdict(list)
        looks = Looks()
        looks.visit(known.module)
        read = sum((names_in(s).attributes for s in known.module.body), Counter())
        self.truths: dict[tuple[str, str], bool] = {}  # of those that are sizes
        self.filled = {name for name, count in read.items() if looks.found[name] < count}

    def target(self, node, value) -> None:
        for t in node.elements if isinstance(node, cst.Tuple | cst.List) else [node]:
            t = t.value if isinstance(t, cst.Element) else t
            if isinstance(t, cst.Attribute):
                self.set[self.known.class_of(t.value, self.here), t.attr.value].append(value)

    def visit_Assign(self, node):
        pairs = pairs_of(node)
        if pairs is None:
            for t in node.targets:
                self.target(t.target, None)
        for target, value in pairs or ():
            self.target(target, value)

    def visit_AugAssign(self, node):
        self.target(node.target, None)

    def visit_For(self, node):
        self.target(node.target, None)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.target(node.target, node.value)

    def visit_Call(self, node):
        if m.matches(node, m.Call(m.Attribute(attr=m.Name("declare")), [TEXT, m.ZeroOrMore()])):
            name = node.args[0].value.evaluated_value
            on = [a.value for a in node.args if a.keyword and a.keyword.value == "on"]
            value = Values(self.known.facts).value_of(on[0]) if on else True
            state = None if value is UNKNOWN else PRESENT if value else cst.Name("None")
            self.set[self.here, name].append(state)

    def present(self) -> set[tuple[str, str]]:
        """Parameters that are always there."""
        return {key for key, values in self.set.items() if values == [PRESENT]}

    def constants(self) -> dict[tuple[str, str], cst.BaseExpression]:
        found = {}
        for (cls, name), values in self.set.items():
            if name in self.known.facts.roots:
                continue
            others = [
                v
                for (c, n), v in self.set.items()
                if n == name and c != cls and (not c or self.known.related(c, cls))
            ]
            if cls and one_value(values) and not others:
                if m.matches(values[0], NOTHING):
                    if len(values) == 1 and name not in self.filled:
                        found[cls, name] = values[0]
                    continue
                value = Values(self.known.facts).value_of(values[0])
                if value is not UNKNOWN and is_literal(value):
                    if is_switch(value):
                        found[cls, name] = literal(value)
                    self.truths[cls, name] = bool(value)
        return found


def one_value(values: list) -> bool:
    """Whether an attribute is set to the same each time, as far as it is written down."""
    if not all(isinstance(value, cst.CSTNode) for value in values):
        return False
    return all(map(values[0].deep_equals, values[1:]))


class Attributes(Transformer):
    """Reads of attributes that are one constant; declarations of parameters that are off."""

    def __init__(self, known: Known, constants: dict, present: set, values: dict, truths: dict):
        self.known, self.constants, self.present, self.inside = known, constants, present, []
        self.values, self.truths = values, truths

    def leave_Comparison(self, old, new):
        if len(old.comparisons) == 1 and isinstance(old.left, cst.Attribute):
            inside = self.inside[0] if self.inside else ""
            attribute, operator = old.left.attr.value, old.comparisons[0].operator
            cls = self.known.owner(leaf_of(old.left.value), attribute, inside)
            other = Values(self.known.facts).value_of(old.comparisons[0].comparator)
            if (cls, attribute) in self.values and other is not UNKNOWN:
                compare = COMPARISONS[type(operator)]
                literals = self.values[cls, attribute]
                found = {compare(Values(self.known.facts).find(v), other) for v in literals}
                if len(found) == 1:
                    return literal(found.pop())
        is_none = m.ComparisonTarget(m.Is() | m.IsNot(), m.Name("None"))
        if m.matches(old, m.Comparison(m.Attribute(), [is_none])):
            cls = self.known.class_of(old.left.value, self.inside[0] if self.inside else "")
            if (cls, old.left.attr.value) in self.present:
                return literal(isinstance(old.comparisons[0].operator, cst.IsNot))
        return new

    def visit_ClassDef(self, node):
        self.inside.append(node.name.value)

    def leave_ClassDef(self, old, new):
        self.inside.pop()
        return new

    def leave_AssignTarget(self, old, new):
        return new.with_changes(target=old.target)

    def leave_AnnAssign(self, old, new):
        return new.with_changes(target=old.target)

    def leave_AugAssign(self, old, new):
        return new.with_changes(target=old.target)

    def leave_IfExp(self, old, new):
        if isinstance(old.test, cst.Attribute):
            cls = self.known.class_of(old.test.value, self.inside[0] if self.inside else "")
            if (cls, old.test.attr.value) in self.truths:
                return as_operand(new.body if self.truths[cls, old.test.attr.value] else new.orelse)
        return new

    def leave_Call(self, old, new):
        """What is called stays, though nothing calls it where it is None."""
        return new.with_changes(func=old.func) if m.matches(new.func, m.Name("None")) else new

    def leave_Attribute(self, old, new):
        cls = self.known.class_of(old.value, self.inside[0] if self.inside else "")
        if not cls:
            return new
        for name in [cls, *self.known.bases(cls)]:
            if (name, old.attr.value) in self.constants:
                return as_operand(self.constants[name, old.attr.value])
        return new

    def leave_SimpleStatementLine(self, old, new):
        if m.matches(
            new, m.SimpleStatementLine([m.Expr(m.Call(m.Attribute(attr=m.Name("declare"))))])
        ):
            call = new.body[0].value
            on = [a for a in call.args if a.keyword and a.keyword.value == "on"]
            value = Values(self.known.facts).value_of(on[0].value) if on else UNKNOWN
            if value is UNKNOWN:
                return new
            if not value:
                used = call.args[0].value.evaluated_value in self.known.facts.roots
                return new if used else cst.RemoveFromParent()
            args = [a for a in call.args if a is not on[0]]
            args[-1] = args[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
            return new.with_changes(body=[cst.Expr(call.with_changes(args=args))])
        return new


def record_values(known: Known) -> dict[tuple[str, str], list[cst.BaseExpression]]:
    """Fields of records that are a literal wherever one is made, and those literals."""
    calls, found = Calls(known), {}
    calls.visit(known.module)
    replacing = [
        call
        for call in find_all(known.module, cst.Call)
        if m.matches(call.func, m.Attribute(attr=m.Name("_replace")))
    ]
    changed = {arg.keyword.value for call in replacing for arg in call.args if arg.keyword}
    for (cls, _), called in calls.found.items():
        if not called.record or not called.whole or not called.calls:
            continue
        sites = [called.arguments(c) for c in called.calls]
        for name, default in called.params:
            values = [s[name].value if name in s else default for s in sites if s is not None]
            clear = values and None not in values and None not in sites and name not in changed
            clear = clear and name not in known.facts.roots and not known.is_set(cls, name)
            if clear and all(is_constant(v, known.facts) for v in values):
                found[cls, name] = list({code_of(v): v for v in values}.values())
    return found


def attributes(module: cst.Module, facts: Facts) -> cst.Module:
    known = Known(facts, module)
    found = AttributeFacts(known)
    found.visit(module)
    given = {key: literal(value) for key, value in facts.attributes.items()}
    values = record_values(known)
    given |= {key: literals[0] for key, literals in values.items() if len(literals) == 1}
    constants, present, truths = found.constants() | given, found.present(), found.truths
    names = {name for _, name in (*constants, *present, *values, *truths)} | {"declare"}
    change = Attributes(known, constants, present, values, truths)
    module = revisit(module, change, mentions(names))
    known = Known(facts, module)
    reads, strings = Reads(known), set().union(*(names_in(s).strings for s in module.body))
    asked, gone = Dynamic(known), set()
    for cls, name in found.set:
        if cls and name not in facts.roots and not reads.of(cls)[name]:
            if not (name in strings and asked.of(cls)):
                gone.add((cls, name))
    return revisit(module, DroppingAttributes(gone, known), mentions(name for _, name in gone))


# --- parameters --------------------------------------------------------------------------------


@dataclasses.dataclass
class Called:
    """A function and all its calls; `whole`: whether there is no other use of it."""

    key: tuple[str, str]  # class or "", name
    params: list[tuple[str, cst.BaseExpression | None]]  # name and default
    calls: list[cst.Call] = dataclasses.field(default_factory=list)
    whole: bool = True
    record: bool = False  # a NamedTuple or a dataclass, whose fields these are
    star: int = -1  # how many stand before *args; -1: it has none

    def arguments(self, call: cst.Call) -> dict[str, cst.Arg] | None:
        """Arguments by the name of their parameter; None where that is not clear."""
        names, found = [name for name, _ in self.params], {}
        for i, arg in enumerate(call.args):
            if not arg.keyword and 0 <= self.star <= i:
                continue  # one of *args
            name = arg.keyword.value if arg.keyword else names[i] if i < len(names) else None
            if name not in names:
                return None
            found[name] = arg
        return found

    def is_plain(self, call: cst.Call) -> bool:
        """Whether it shows which parameters the arguments are for."""
        stars = [i for i, arg in enumerate(call.args) if arg.star]
        only = all(call.args[i].star == "*" for i in stars)
        return not stars or only and 0 <= self.star <= stars[0]


def params_of(function: cst.FunctionDef, method: bool) -> list | None:
    p = function.params
    if p.posonly_params or p.star_kwarg:
        return None
    both = [*p.params, *p.kwonly_params][1 if method else 0 :]
    return [(x.name.value, x.default) for x in both]


def star_of(function: cst.FunctionDef, method: bool) -> int:
    """How many parameters stand before *args; -1: it has none."""
    p = function.params
    return len(p.params) - method if isinstance(p.star_arg, cst.Param) else -1


def is_static(function: cst.FunctionDef) -> bool:
    return any(
        code_of(d.decorator) in ("staticmethod", "property", "classmethod")
        for d in function.decorators
    )


LIBRARIES = set("torch F np nn dist math os re json shutil time".split())


class Calls(InClasses):
    """All calls of the module's functions, methods and classes, by what they call."""

    def __init__(self, known: Known):
        super().__init__(known)
        self.found: dict[tuple[str, str], Called] = {}
        self.by_method: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.locals: list[set[str]] = []  # of the functions around
        for name, f in known.functions.items():
            self.add(("", name), params_of(f, False), star=star_of(f, False))
        for name in known.classes:
            methods = known.methods(name)
            for method, f in methods.items():
                if method != "__init__" and not is_static(f):
                    self.add((name, method), params_of(f, True), star=star_of(f, True))
                    self.by_method[method].append((name, method))
            if "__init__" in methods:
                f = methods["__init__"]
                self.add((name, "__init__"), params_of(f, True), star=star_of(f, True))
            elif known.fields(name):
                fields = [(f.target.value, f.value) for f in known.fields(name)]
                self.add((name, "__init__"), fields, record=True)
        for name, inner in known.inner.items():
            if self.known.counts[name] == 1:
                self.add(("inner", name), params_of(inner, False), star=star_of(inner, False))

    def add(self, key, params, record: bool = False, star: int = -1) -> None:
        roots = self.known.facts.roots
        used = key[0] in roots if key[1] == "__init__" else key[1] in roots
        if params is not None and not used:
            self.found[key] = Called(key, params, record=record, star=star)

    def called(self, func: cst.BaseExpression) -> list[tuple[str, str]]:
        """What an expression calls: keys of `found`."""
        alias = self.known.facts.called_as.get(code_of(func), "")
        if alias and alias not in self.known.classes:
            cls, _, name = alias.rpartition(".")
            return [(cls, name)]
        return self.target(func)

    def target(self, func: cst.BaseExpression) -> list[tuple[str, str]]:
        """What an expression means by its name: keys of `found`."""
        if isinstance(func, cst.Name):
            name = func.value
            if any(name in own for own in self.locals):
                return [k for k in [("inner", name)] if k in self.found]
            if name in self.known.classes:
                return [(name, "__init__")]
            return [k for k in (("", name), ("inner", name)) if k in self.found]
        if isinstance(func, cst.Attribute):
            name = func.attr.value
            keys = self.by_method.get(name, [])
            cls = self.known.owner(leaf_of(func.value), name, self.here)
            if cls:
                return [k for k in keys if self.known.related(k[0], cls)]
            if m.matches(func.value, m.Call(m.Name("super"))):
                bases = self.known.bases(self.here)[1:] if self.here else []
                return [(c, name) for c in bases if (c, name) in self.found]
            return [] if leaf_of(func.value) in LIBRARIES else keys
        return []

    def visit_Call(self, node):
        alias = self.known.facts.called_as.get(code_of(node.func), "")
        keys = self.called(node.func)
        sure = len(keys) == 1 and (
            alias
            or isinstance(node.func, cst.Name)
            or m.matches(node.func, m.Attribute(value=m.Call(m.Name("super"), [])))
            or self.known.class_of(
                node.func.value if isinstance(node.func, cst.Attribute) else node.func, self.here
            )
        )
        for key in keys:
            if key in self.found:
                called = self.found[key]
                if called.record and all(a.star == "**" for a in node.args):
                    continue  # of what was such a record
                if sure and called.is_plain(node):
                    called.calls.append(node)
                else:
                    self.found[key].whole = False
        for arg in node.args:
            self.visit(arg.value)
        if isinstance(node.func, cst.Attribute):
            self.visit(node.func.value)
        elif not isinstance(node.func, cst.Name) and not alias:
            self.visit(node.func)
        return False

    def visit_Attribute(self, node):
        for key in self.target(node):
            if key in self.found:
                self.found[key].whole = False
        self.visit(node.value)
        return False

    def visit_Name(self, node):
        for key in self.target(node):
            if key in self.found and key[1] != "__init__":
                self.found[key].whole = False

    def visit_Assign(self, node):
        """`self.muon = muon_update`: the calls of that attribute are calls of the function."""
        pairs = pairs_of(node)
        if pairs and len(pairs) == 1:
            alias = self.known.facts.called_as.get(code_of(pairs[0][0]), "")
            if alias.startswith("."):
                return False
        return True

    def visit_Annotation(self, node):
        return False

    def visit_AnnAssign(self, node):
        if not isinstance(node.target, cst.Name):
            self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)
        return False

    def visit_Param(self, node):
        if node.default is not None:
            self.visit(node.default)
        return False

    def visit_FunctionDef(self, node):
        for part in (*node.decorators, node.params):
            self.visit(part)
        self.locals.append(names_in(node.body).own | set(names_in(node.params).bound))
        self.visit(node.body)
        self.locals.pop()
        return False

    def visit_AssignTarget(self, node):
        if not isinstance(node.target, cst.Name):
            self.visit(node.target)
        return False


class Reads:
    """Reads of attributes by the class of what has them; "" where that is not known."""

    def __init__(self, known: Known):
        self.known = known
        self.found: dict[str, Counter] = defaultdict(Counter)
        for statement in known.module.body:
            inside = statement.name.value if isinstance(statement, cst.ClassDef) else ""
            for (leaf, attribute), count in names_in(statement).held.items():
                if leaf != "cfg":
                    self.found[known.owner(leaf, attribute, inside)][attribute] += count

    def of(self, cls: str) -> Counter:
        """Those of a class and its relatives, and those of who knows what."""
        related = [c for c in self.found if not c or self.known.related(c, cls)]
        return sum((self.found[c] for c in related), Counter())


class Dynamic:
    """Classes of which attributes are read by names that are texts."""

    def __init__(self, known: Known):
        self.known, self.found = known, set()
        for statement in known.module.body:
            inside = statement.name.value if isinstance(statement, cst.ClassDef) else ""
            for leaf in names_in(statement).asked - LIBRARIES - {"cfg"}:
                self.found.add(inside if leaf == "self" else known.holders.get(leaf, ""))

    def of(self, cls: str) -> bool:
        return any(not c or self.known.related(c, cls) for c in self.found)


@dataclasses.dataclass
class Change:
    """What becomes of a function: parameters to leave out, and what those that stay to read say."""

    called: Called
    gone: set[str]
    instead: dict[str, cst.BaseExpression]
    given: set[str] = dataclasses.field(default_factory=set)  # which need no default


class Parameters(Transformer):
    """Leaves out parameters, and their arguments in the calls that were found."""

    def __init__(self, known: Known, changes: dict[tuple[str, str], Change]):
        self.known, self.changes, self.inside, self.depth = known, changes, [], 0
        self.of_call = {id(c): ch for ch in changes.values() for c in ch.called.calls}

    def visit_ClassDef(self, node):
        self.inside.append(node.name.value)

    def leave_ClassDef(self, old, new):
        name = self.inside.pop()
        change = self.changes.get((name, "__init__"))
        if change and change.called.record:
            body = [s for s in new.body.body if not self.is_field(s, change.gone)]
            return new.with_changes(body=filled(new.body.with_changes(body=body)))
        return new

    def is_field(self, statement, gone: set[str]) -> bool:
        return m.matches(statement, m.SimpleStatementLine([m.AnnAssign(m.Name())])) and (
            statement.body[0].target.value in gone
        )

    def visit_FunctionDef(self, node):
        self.depth += 1

    def leave_FunctionDef(self, old, new):
        self.depth -= 1
        name, cls = new.name.value, self.inside[0] if self.inside else ""
        key = (cls, name) if self.depth == 0 else ("inner", name)
        change = self.changes.get(key)
        if change is None or change.called.record:
            return new
        p = new.params
        kept = [x for x in p.params if x.name.value not in change.gone]
        plain = cst.MaybeSentinel.DEFAULT
        kept = [
            x.with_changes(default=None, equal=plain) if x.name.value in change.given else x
            for x in kept
        ]
        only = [x for x in p.kwonly_params if x.name.value not in change.gone]
        if kept:
            kept[-1] = kept[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        star = p.star_arg
        if not only and not isinstance(star, cst.Param):
            star = cst.MaybeSentinel.DEFAULT
        params = p.with_changes(params=kept, kwonly_params=only, star_arg=star)
        body = Replacing(change.instead).transform(new.body)
        return new.with_changes(params=params, body=body)

    def leave_Call(self, old, new):
        change = self.of_call.get(id(old))
        if change is None:
            return new
        named = change.called.arguments(old)
        names = {id(arg): name for name, arg in named.items()}
        kept = []
        for before, arg in zip(old.args, new.args):
            if names.get(id(before)) in change.gone:
                continue
            kept.append(arg.with_changes(comma=cst.MaybeSentinel.DEFAULT))
        return new.with_changes(args=kept)


def parameters(module: cst.Module, facts: Facts) -> cst.Module:
    known = Known(facts, module)
    calls = Calls(known)
    calls.visit(module)
    reads = Reads(known)
    changes = {}
    for key, called in calls.found.items():
        if not called.whole or not called.calls or key[1] in ("backward", "on_signal"):
            continue
        sites = [called.arguments(c) for c in called.calls]
        if any(s is None for s in sites):
            continue
        change = Change(called, set(), {})
        body = None if called.record else function_of(known, key)
        read = reads.of(key[0]) if called.record else names_in(body.body).read
        bound = names_in(body.body).bound if body is not None else Counter()
        for at, (name, default) in enumerate(called.params):
            if called.record and name in facts.roots or at < called.star:
                continue
            values = [s[name].value if name in s else default for s in sites]
            if any(v is None for v in values):
                if called.record and not read[name] and not any(values):
                    change.gone.add(name)
                continue
            constants = [constant_of(v, known) for v in values]
            same = None not in constants and len({code_of(c) for c in constants}) == 1
            if same and m.matches(constants[0], NOTHING) and body is not None:
                same = name not in filled_names(body.body, facts.filling)
            if not read[name]:
                told_apart = called.record and key[0] in facts.compared and not same
                if all(is_pure(v, facts) for v in values) and not told_apart:
                    change.gone.add(name)
            elif same and not bound[name] and not called.record:
                change.gone.add(name)
                change.instead[name] = as_operand(constants[0])
        if not called.record:
            change.given = given_by_all(called, sites, change.gone)
        if called.record and key[0] not in facts.aliases:
            change.gone.clear()
        if change.gone or change.given:
            changes[key] = change
    names = {name for pair in changes for name in pair} - {"__init__", "inner"}
    names |= {
        code.split(".")[-1]
        for code, what in facts.called_as.items()
        if what.split(".")[-1] in {name for _, name in changes}
    }
    return revisit(module, Parameters(known, changes), mentions(names))


def given_by_all(called: Called, sites: list[dict], gone: set[str]) -> set[str]:
    """Parameters whose default no call takes; not those behind one whose default is."""
    found: set[str] = set()
    for name, default in called.params:
        if name in gone or default is None:
            continue
        if not all(name in site for site in sites):
            break
        found.add(name)
    return found


def constant_of(node: cst.BaseExpression, known: Known) -> cst.BaseExpression | None:
    """What may stand in another function instead: a literal, or the name of a function."""
    if is_constant(node, known.facts) or m.matches(node, NOTHING):
        return node
    if isinstance(node, cst.Name) and node.value in known.functions:
        return node
    if is_local_constant(node, known.facts):
        return literal(Values(known.facts).value_of(node))
    return None


def is_switch(value: object) -> bool:
    """Whether a value decides something, rather than being one of several sizes."""
    return value is None or type(value) in (bool, str) or value in (0, 1, ())


def function_of(known: Known, key: tuple[str, str]) -> cst.FunctionDef:
    cls, name = key
    if cls == "inner":
        return known.inner[name]
    return known.methods(cls)[name] if cls else known.functions[name]


# --- what is one and stands as two --------------------------------------------------------------


class Without(Transformer):
    """A module without some statements, and with others in the place of some."""

    def __init__(self, instead: dict[int, list[cst.BaseStatement]]):
        self.instead = instead

    def leave_IndentedBlock(self, old, new):
        body: list[cst.BaseStatement] = []
        for before, now in zip(old.body, new.body) if len(old.body) == len(new.body) else ():
            body += self.instead.get(id(before), [now])
        return new.with_changes(body=body) if len(old.body) == len(new.body) else new


def reads_of(module: cst.Module, name: str) -> int:
    """How often a name is read, but for annotations."""
    count, todo = 0, list(module.body)
    while todo:
        node = todo.pop()
        count += isinstance(node, cst.Name) and node.value == name
        todo += [kid for kid in kids(node) if not isinstance(kid, cst.Annotation)]
    return count


def joined(module: cst.Module, facts: Facts) -> cst.Module:
    """A class that only one other inherits from, and nobody makes, as a part of that one."""
    known = Known(facts, module)
    for name, base in known.classes.items():
        heirs = [c for c in known.classes if known.bases(c)[1:2] == [name]]
        if len(heirs) != 1 or base.bases or base.decorators or heirs[0] in facts.roots:
            continue
        if reads_of(module, name) != 2:  # its own definition, and that of the heir
            continue
        heir = known.classes[heirs[0]]
        whole = with_base(base, heir)
        if whole is not None:
            rest = [whole if s is heir else s for s in module.body if s is not base]
            module = module.with_changes(body=rest)
            renamed = Replacing({name: cst.Name(heirs[0])})
            return revisit(module, renamed, mentions([name]))
    return module


def with_base(base: cst.ClassDef, heir: cst.ClassDef) -> cst.ClassDef | None:
    """The heir with what its base has; None where that is not plain."""
    ours, theirs = (
        {f.name.value: f for f in c.body.body if isinstance(f, cst.FunctionDef)}
        for c in (heir, base)
    )
    above = m.Call(m.Name("super"), [])
    supers = [n for n in find_all(heir, cst.Attribute) if m.matches(n.value, above)]
    if len(supers) != 1 or "__init__" not in ours or "__init__" not in theirs:
        return None
    begin = m.SimpleStatementLine([m.Expr(m.Call(m.Attribute(above, m.Name("__init__"))))])
    (call,) = [s for s in ours["__init__"].body.body if m.matches(s, begin)] or [None]
    if call is None or supers[0] is not call.body[0].value.func:
        return None
    called = Called(("", ""), params_of(theirs["__init__"], True))
    body = spliced(theirs["__init__"], called.arguments(call.body[0].value), called)
    if body is None:
        return None
    start = Without({id(call): body}).transform(ours["__init__"])
    more = [f for name, f in theirs.items() if name not in ours]
    members = []
    for s in heir.body.body:
        members += [start, *more] if s is ours["__init__"] else [s]
    bases = [a for a in heir.bases if leaf_of(a.value) != base.name.value]
    return heir.with_changes(bases=bases, body=heir.body.with_changes(body=members))


def spliced(function: cst.FunctionDef, args: dict | None, called: Called) -> list | None:
    """The statements of a function with these arguments; None where they would be other ones."""
    if args is None or function.params.kwonly_params:
        return None
    names, instead = names_in(function.body), {}
    for name, default in called.params:
        value = args[name].value if name in args else default
        if value is None or names.bound[name] and code_of(value) != name:
            return None
        if names.read[name] > 1 and not m.matches(value, SIMPLE):
            return None
        instead[name] = as_operand(value) if names.read[name] == 1 else value
    return list(Replacing(instead).transform(function.body).body)


def tails(module: cst.Module, facts: Facts) -> cst.Module:
    """`return f(x)` as what f does, where nobody else calls it."""
    known = Known(facts, module)
    calls, ends = Calls(known), defaultdict(list)  # ends: functions by what they end with
    calls.visit(module)
    for caller, cls in callers(known):
        last = caller.body.body[-1]
        if m.matches(last, m.SimpleStatementLine([m.Return()])):
            ends[id(last.body[0].value)].append((caller, cls))
    for key, called in calls.found.items():
        if not called.whole or len(called.calls) != 1 or called.record or called.star >= 0:
            continue
        if key[1] in facts.protocol | {"__init__", "forward"} or key[0] == "inner":
            continue
        function, call = function_of(known, key), called.calls[0]
        if function.decorators or find_all(function.body, cst.Yield, cst.FunctionDef):
            continue
        for caller, cls in ends[id(call)]:
            if caller is function:
                continue
            whole = with_tail(caller, cls, function, key[0], called, call)
            if whole is not None:
                change = InPlace({id(caller): whole})
                return revisit(module, change, mentions([caller.name.value]))
    return module


class InPlace(Transformer):
    """Functions of these identities as others."""

    def __init__(self, instead: dict[int, cst.FunctionDef]):
        self.instead = instead

    def leave_FunctionDef(self, old, new):
        return self.instead.get(id(old), new)


def callers(known: Known) -> Iterator[tuple[cst.FunctionDef, str]]:
    """Functions and methods, with their class."""
    yield from ((f, "") for f in known.functions.values())
    for cls in known.classes:
        yield from ((f, cls) for f in known.methods(cls).values())


def with_tail(caller, cls: str, function, own: str, called: Called, call: cst.Call):
    """The caller with the function's statements in the place of its last one; None if not so."""
    method = isinstance(call.func, cst.Attribute)
    if leaf_of(call.func) != function.name.value:  # a compiled one, for example
        return None
    if method and not (own == cls and m.matches(call.func.value, m.Name("self"))):
        return None
    body = spliced(function, called.arguments(call), called)
    ours, theirs = names_in(caller.body), names_in(function.body)
    bound = set(ours.bound) | set(names_in(caller.params).bound)
    params = {name for name, _ in called.params} | {"self"}
    if body is None or any(theirs.free[n] for n in bound - set(theirs.bound) - params):
        return None
    if body and is_doc(body[0]):
        if not is_doc(caller.body.body[0]):
            return None
        body = body[1:]
    whole = caller.with_changes(body=caller.body.with_changes(body=[*caller.body.body[:-1], *body]))
    return whole if code_of(whole).count("\n") <= 60 else None


# --- inlining ----------------------------------------------------------------------------------


class Inlining(Transformer):
    """Calls of functions of which one expression is left, or nothing."""

    def __init__(self, bodies: dict[int, cst.BaseExpression | None]):
        self.bodies = bodies

    def leave_Call(self, old, new):
        body = self.bodies.get(id(old), UNKNOWN)
        return new if body is UNKNOWN or body is None else as_operand(body)

    def leave_SimpleStatementLine(self, old, new):
        if m.matches(old, m.SimpleStatementLine([m.Expr(m.Call())])):
            if self.bodies.get(id(old.body[0].value), UNKNOWN) is None:
                return cst.RemoveFromParent()
        return new

    def leave_IndentedBlock(self, old, new):
        return filled(new)


MANAGER = "(contextlib.contextmanager,)"
NO_CONTEXT = cst.parse_expression("contextlib.nullcontext()")
SIMPLE = m.Name() | m.Attribute(value=m.Name() | m.Attribute(value=m.Name())) | CONSTANT


def inlining(module: cst.Module, facts: Facts, before: set[tuple[str, str]]) -> cst.Module:
    """`before`: the functions as they were written; what the author wrote short stays."""
    known = Known(facts, module)
    calls = Calls(known)
    calls.visit(module)
    bodies: dict[int, cst.BaseExpression | None] = {}
    names: set[str] = set()
    for key, called in calls.found.items():
        if not called.whole or not called.calls or called.record or key[1] == "__init__":
            continue
        if key[1] in facts.protocol | {"forward"} or called.star >= 0:
            continue
        function = function_of(known, key)
        body = without_aliases(own_body(function), names_in(function.params).bound)
        one = (
            body[0].body[0]
            if len(body) == 1 and isinstance(body[0], cst.SimpleStatementLine)
            else None
        )
        if code_of(cst.Tuple([cst.Element(d.decorator) for d in function.decorators])) == MANAGER:
            if m.matches(one, m.Expr(m.Yield(None))):
                names.add(key[1])
                bodies |= {id(call): NO_CONTEXT for call in called.calls}
            continue
        if not body or isinstance(one, cst.Pass) or m.matches(one, m.Return(None)):
            names.add(key[1])
            for call in called.calls:
                if all(is_pure(a.value, facts) for a in call.args):
                    bodies[id(call)] = None
            continue
        if not isinstance(one, cst.Return) or one.value is None or function.decorators:
            continue
        if (key[1], code_of(function.body)) in before and not m.matches(one.value, HOLLOW):
            often = len(called.calls) > 1 or len(body) < len(function.body.body)
            if often and key[1] not in facts.short:
                continue  # the author has written it so
        names.add(key[1])
        for call in called.calls:
            expression = inlined(one.value, call, called, facts)
            if expression is not None:
                bodies[id(call)] = expression
    return revisit(module, Inlining(bodies), mentions(names))


def without_aliases(body: list[cst.BaseStatement], params: Counter) -> list[cst.BaseStatement]:
    """`cfg = self.cfg; return f(cfg)` as `return f(self.cfg)`."""
    alias = m.Attribute(value=m.Name() | m.Attribute(value=m.Name()))
    if len(body) != 2 or not m.matches(body[0], m.SimpleStatementLine([m.Assign()])):
        return body
    pairs = pairs_of(body[0].body[0]) or []
    plain = all(isinstance(t, cst.Name) and not params[t.value] for t, _ in pairs)
    if not pairs or not plain or not all(m.matches(v, alias) for _, v in pairs):
        return body
    if not m.matches(body[1], m.SimpleStatementLine([m.Return()])):
        return body
    return [Replacing({t.value: v for t, v in pairs}).transform(body[1])]


def inlined(value, call: cst.Call, called: Called, facts: Facts):
    """The function's expression with this call's arguments; None where it must stay a call."""
    named, read = called.arguments(call), names_in(value).read
    if named is None or leaf_of(call.func) != called.key[1]:
        return None
    if sum(not is_pure(arg.value, facts) for arg in named.values()) > 1:  # in which order?
        return None
    instead = {}
    for name, default in called.params:
        arg = named[name].value if name in named else default
        if arg is None:
            return None
        if read[name] > 1 and not m.matches(arg, SIMPLE):
            return None
        if not read[name] and not is_pure(arg, facts):
            return None
        instead[name] = as_operand(arg) if read[name] else arg
    if read["self"]:
        if not isinstance(call.func, cst.Attribute) or not m.matches(call.func.value, SIMPLE):
            return None
        instead["self"] = call.func.value
    if len(code_of(value)) > 60 and not is_constant(value, facts):
        return None
    return Replacing(instead).transform(value)


# --- what nobody uses --------------------------------------------------------------------------


BANNER = re.compile(r"#{20,}")


def carry_banner(body: list[cst.BaseStatement], gone: cst.BaseStatement) -> None:
    """Keep the banner above a statement that goes: an empty one takes its place until the end."""
    lines = list(gone.leading_lines)
    marks = [i for i, line in enumerate(lines) if line.comment and BANNER.match(line.comment.value)]
    if marks:
        body.append(cst.SimpleStatementLine([cst.Pass()], lines[: marks[-1] + 1]))


def without_marks(module: cst.Module) -> cst.Module:
    """The banners that were carried, above what follows; of two the last, as a part is empty."""
    body, waiting = [], None
    for statement in module.body:
        if m.matches(statement, m.SimpleStatementLine([m.Pass()])):
            waiting = statement.leading_lines
            continue
        if waiting is not None:
            lines = list(statement.leading_lines)
            if not any(line.comment and BANNER.match(line.comment.value) for line in lines):
                while lines and lines[0].comment is None:
                    lines.pop(0)
                gap = [cst.EmptyLine(indent=False)]
                statement = statement.with_changes(leading_lines=[*waiting, *gap, *lines])
            waiting = None
        body.append(statement)
    return module.with_changes(body=body)


class Unwrapped(Transformer):
    """Without parentheses around what stands by itself between commas, or behind a `=`."""

    def bare(self, new):
        node = new.value
        one_line = len(getattr(node, "lpar", ())) == 1 and "\n" not in code_of(node)
        whole = m.BinaryOperation() | m.Comparison() | m.BooleanOperation() | m.UnaryOperation()
        whole |= m.IfExp() | m.Name() | m.Attribute() | m.Call() | m.Subscript() | CONSTANT
        if m.matches(new, m.Assign([m.AssignTarget(m.Tuple())])):
            whole |= m.Tuple()
        if not one_line or not m.matches(node, whole):
            return new
        return new.with_changes(value=node.with_changes(lpar=[], rpar=[]))

    def leave_Arg(self, old, new):
        return new if new.star else self.bare(new)

    def leave_Element(self, old, new):
        return self.bare(new)

    def leave_DictElement(self, old, new):
        return self.bare(new)

    def leave_Assign(self, old, new):
        return self.bare(new)

    def leave_Return(self, old, new):
        return self.bare(new) if new.value else new


def replaced(module: cst.Module, name: str, text: str) -> cst.Module:
    """With another definition of a name, in the same place."""
    (new,) = cst.parse_module(text).body
    body = []
    for s in module.body:
        mine = isinstance(s, cst.ClassDef) and s.name.value == name
        mine |= m.matches(s, m.SimpleStatementLine([m.Assign([m.AssignTarget(m.Name(name))])]))
        body.append(new.with_changes(leading_lines=s.leading_lines) if mine else s)
    return module.with_changes(body=body)


def fields_read(module: cst.Module) -> set[str]:
    """Fields of the configuration that the code reads."""
    found = find_all(module, cst.Attribute)
    return {node.attr.value for node in found if is_config(node.value)}


class Unused(Transformer):
    def __init__(self, gone: set[tuple[str, str]]):
        self.gone, self.inside, self.depth = gone, [], 0

    def visit_ClassDef(self, node):
        self.inside.append(node.name.value)

    def leave_ClassDef(self, old, new):
        self.inside.pop()
        return new

    def visit_FunctionDef(self, node):
        self.depth += 1

    def leave_FunctionDef(self, old, new):
        self.depth -= 1
        if self.depth:
            return cst.RemoveFromParent() if ("inner", new.name.value) in self.gone else new
        cls = self.inside[0] if self.inside else ""
        return cst.RemoveFromParent() if cls and (cls, new.name.value) in self.gone else new

    def leave_IndentedBlock(self, old, new):
        return filled(new)


def defined(statement: cst.BaseStatement) -> str:
    """The name that a statement of a module defines."""
    if isinstance(statement, cst.ClassDef | cst.FunctionDef):
        return statement.name.value
    one = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
    target = None
    if isinstance(one, cst.Assign) and len(one.targets) == 1:
        target = one.targets[0].target
    elif isinstance(one, cst.AnnAssign | cst.AugAssign):
        target = one.target
    if isinstance(target, cst.Tuple) and all(
        isinstance(e.value, cst.Name) for e in target.elements
    ):
        return " ".join(e.value.value for e in target.elements)
    return target.value if isinstance(target, cst.Name) else ""


Key = tuple[str, str]  # class or "", and the name in it


def definitions(module: cst.Module, facts: Facts) -> tuple[dict[Key, list[Names]], list[Names]]:
    """The names that each definition of a module mentions, and those of its other statements."""
    owners: dict[Key, list[Names]] = defaultdict(list)
    others: list[Names] = []
    for statement in module.body:
        name = defined(statement)
        if isinstance(statement, cst.FunctionDef):
            owners["", name].append(names_in(statement))
        elif isinstance(statement, cst.ClassDef):
            rest = []
            for inner in statement.body.body:
                if isinstance(inner, cst.FunctionDef) and not needed(inner.name.value, facts):
                    owners[name, inner.name.value].append(names_in(inner))
                else:
                    rest.append(inner)
            body = cst.IndentedBlock(rest or [cst.parse_statement("pass")])
            owners["", name].append(names_in(statement.with_changes(body=body)))
        elif name:
            value = statement.body[0].value
            owners["", name].append(names_in(value) if value else Names())
        elif not m.matches(statement, m.SimpleStatementLine([m.Import() | m.ImportFrom()])):
            others.append(names_in(statement))
    return owners, others


def unused(module: cst.Module, facts: Facts) -> cst.Module:
    """Without definitions that nothing mentions which can be reached from the roots."""
    owners, others = definitions(module, facts)
    known = Known(facts, module)
    named: dict[str, list[Key]] = defaultdict(list)
    for key in owners:
        for name in key[1].split():
            named[name].append(key)
    asked = Dynamic(known)
    seen = {key for root in facts.roots for key in named.get(root, ())}
    todo = [("", names) for names in others]
    todo += [(key[0] or key[1], names) for key in seen for names in owners[key]]
    while todo:
        inside, names = todo.pop()
        texts = words_of(names.strings)
        read: dict[str, set[str]] = defaultdict(set)  # attributes, and classes that have them
        for leaf, name in names.held:
            read[name].add(known.owner(leaf, name, inside))

        for name in {*names.free, *names.attributes, *texts}:
            for key in named.get(name, ()):
                if key[0]:
                    used = any(not cls or known.related(cls, key[0]) for cls in read[name])
                    used = used or name in texts and asked.of(key[0])
                else:
                    used = name in names.free
                if key not in seen and used:
                    seen.add(key)
                    todo += [(key[0] or key[1], names) for names in owners[key]]
    gone = set(owners) - seen
    body: list[cst.BaseStatement] = []
    for statement in module.body:
        if ("", defined(statement)) in gone:
            carry_banner(body, statement)
        else:
            body.append(statement)
    classes = {cls for cls, _ in gone if cls}
    return revisit(module.with_changes(body=body), Unused(gone), mentions(classes))


def words_of(strings) -> set[str]:
    return {s for s in strings if s.isidentifier()}


def needed(name: str, facts: Facts) -> bool:
    return name.startswith("__") or name in facts.protocol


class InnerUnused(Transformer):
    """Functions within functions that nobody calls."""

    def leave_FunctionDef(self, old, new):
        read = names_in(new.body).read
        inner = {f.name.value for f in find_all(new.body, cst.FunctionDef)}
        gone = {("inner", name) for name in inner if not read[name]}
        if gone:
            new = new.with_changes(body=DropInner(gone).transform(new.body))
        return new


class DropInner(Transformer):
    def __init__(self, gone):
        self.gone = gone

    def leave_FunctionDef(self, old, new):
        return cst.RemoveFromParent() if ("inner", new.name.value) in self.gone else new

    def leave_IndentedBlock(self, old, new):
        return filled(new)


def harmless(module: cst.Module, facts: Facts) -> set[str]:
    """Functions of which one expression is left that has no effect."""
    found = set()
    for f in module.body:
        if isinstance(f, cst.FunctionDef) and not f.decorators:
            body = own_body(f)
            one = m.matches(body[0], m.SimpleStatementLine([m.Return()])) if body else False
            if one and len(body) == 1 and is_pure(body[0].body[0].value or NONE, facts):
                found.add(f.name.value)
    return found


NONE = cst.Name("None")


def refuse_ones(source: cst.Module) -> None:
    """
    AssertionError where a source has `x % 1` or `x // 1`: of an x that folding leaves so it thinks
    that it is a whole number, divided among one rank.
    """
    for operation in find_all(source, cst.BinaryOperation):
        divides = isinstance(operation.operator, cst.Modulo | cst.FloorDivide)
        is_one = m.matches(operation.right, m.Integer("1"))
        assert not (divides and is_one), f"{code_of(operation)}: write 1.0 in the place of 1"


@contextlib.contextmanager
def uncollected():
    """Without looking for cycles, which trees have none of: a tenth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@uncollected()
def fold(module: cst.Module, facts: Facts, say: Callable = lambda line: None) -> cst.Module:
    """The passes, until none changes anything."""
    before = {(f.name.value, code_of(f.body)) for f in find_all(module, cst.FunctionDef)}
    settled = Settled()
    passes: list[tuple[str, Callable]] = [
        ("unused", lambda tree: unused(tree, facts)),
        ("folding", lambda tree: settled.visit("folding", tree, Folding(facts))),
        ("locals", lambda tree: settled.visit("locals", tree, Locals(facts))),
        ("attributes", lambda tree: attributes(tree, facts)),
        ("parameters", lambda tree: parameters(tree, facts)),
        ("unraised", lambda tree: unraised(tree, facts)),
        ("inlining", lambda tree: inlining(tree, facts, before)),
        ("joined", lambda tree: joined(tree, facts)),
        ("tails", lambda tree: tails(tree, facts)),
        ("inner", lambda tree: settled.visit("inner", tree, InnerUnused())),
    ]
    facts.filling = facts.filling or filling(module)
    for turn in range(60):
        old = [text_of(s) for s in module.body]
        facts.harmless = harmless(module, facts)
        for _, run in passes:
            module = run(module)
        new = [text_of(s) for s in module.body]
        say(f"{turn}: {sum(text.count(chr(10)) for text in new)} lines")
        if new == old:
            _texts.clear()
            _walks.clear()
            return Unwrapped().transform(without_marks(module))
    raise RuntimeError("folding does not come to an end")
