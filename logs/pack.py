"""The project's sources as one file that runs alone, for leaderboards that count the bytes of the
code.

    python logs/pack.py --out packed/train_gpt.py              # train_gpt.py with all that it imports of the project
    python logs/pack.py golf.py --out packed/golf.py            # the same with golf.py as the program
    python logs/pack.py --unpack packed/train_gpt.py --out shown    # what is in such a file, for the eye; runs nothing

    torchrun --standalone --nproc_per_node=8 -- packed/train_gpt.py --config golf_progressive
    python packed/train_gpt.py golf score logs/RUN             # a module's name first: that one is the program

A packed file behaves as the program it was made of: the same flags and help, the same numbers. It
logs and counts itself as its source. Comments, docstrings and spaces are left out, except for those
that --help prints; the code that remains is the same to the last node of its syntax tree (checked
here at every packing). One file is read for each module: LZMA, base 85, and a loader that registers
the modules.
"""

import ast
import base64
import io
import lzma
import os
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

from logs.endings import ending  # noqa: E402

MARK = "#module "  # begins the line before each module in the packed text
# pb 0: text has no alignment
LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}]
# Python 3.12
FSTRING_START, FSTRING_END = (
    getattr(tokenize, "FSTRING_START", -1),
    getattr(tokenize, "FSTRING_END", -1),
)

# Every module keeps its place in the whole text as line numbers, and linecache holds that text
# under the name of the packed file: so inspect, tyro's --help and tracebacks find the source (the
# interpreter's own printer of tracebacks asks no linecache, hence the hook). The program runs as
# the file itself.
LOADER = """\
# {names}, packed by logs/pack.py; `python logs/pack.py --unpack` shows what is inside
def packed(data):
 import base64,linecache,lzma,sys,traceback
 from importlib.util import spec_from_loader
 text=lzma.decompress(base64.b85decode(data)).decode()
 linecache.cache[__file__]=len(text),None,text.splitlines(True),__file__
 parts,line={{}},1
 for part in text.split("{mark}")[1:]:
  name,code=part.split("\\n",1)
  parts[name]="\\n"*line+code
  line+=part.count("\\n")
 class Packed:
  def find_spec(name,path=None,target=None):
   if name in parts:return spec_from_loader(name,Packed,origin=__file__)
   if any(p.startswith(name+".") for p in parts):return spec_from_loader(name,Packed,is_package=True)
  def create_module(spec):0
  def exec_module(module):
   module.__file__=__file__
   exec(program(module.__name__),module.__dict__)
 def program(name):return compile(parts.get(name,""),__file__,"exec",dont_inherit=True)
 sys.meta_path.insert(0,Packed)
 sys.excepthook=lambda *e:traceback.print_exception(*e)
 return program(sys.argv.pop(1) if __name__=="__main__" and sys.argv[1:2] and sys.argv[1] in parts else "{entry}")
packed=packed("{data}")
exec(packed)
"""


class PackError(Exception):
    """What was given, why it cannot work, what to do. Ends the program with exit code 2."""


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imported(source: str) -> list[str]:
    """Every module that a source imports, at its top or in a function, in the order of its text."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def modules_of(paths: list[Path], root: Path = ROOT) -> list[Path]:
    """The files given and all files of the project that they import, directly or through others."""
    found = list(paths)
    for path in found:  # grows while it is read
        for name in imported(path.read_text(encoding="utf-8")):
            other = root.joinpath(*name.split(".")).with_suffix(".py")
            if other.is_file() and other not in found:
                found.append(other)
    return found


def is_dataclass(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        "dataclass" in ast.unparse(d) for d in node.decorator_list
    )


def docstrings(tree: ast.Module, source: str) -> list[tuple[ast.AST, ast.Expr]]:
    """
    Docstrings that nothing prints, each with its owner: not a dataclass's, and not that of a module
    that uses its own.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [
        node
        for node in ast.walk(tree)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None
    ]
    return [
        (node, node.body[0])
        for node in owners
        if not (is_dataclass(node) or (isinstance(node, ast.Module) and "__doc__" in source))
    ]


def minify(source: str) -> str:
    """The source without comments, docstrings, blank lines and needless spaces. Help texts stay:
    comments above and behind the fields of dataclasses, their docstrings, and that of a module that
    uses `__doc__`.
    """
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    unread = docstrings(tree, source)
    skip = {text.lineno: "" if len(node.body) > 1 else "pass" for node, text in unread}
    help_lines = set()
    for node in filter(is_dataclass, ast.walk(tree)):
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                help_lines.add(field.end_lineno)
                above = field.lineno - 1
                while lines[above - 1].lstrip().startswith("#"):
                    help_lines.add(above)
                    above -= 1
    # fresh: at the start of a line; f_strings: where open ones began
    out, depth, fresh, f_strings = [], 0, True, []

    def word(character: str) -> bool:
        return character.isalnum() or character == "_"

    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text, begin, end, _ = token
        if kind == FSTRING_START:
            f_strings.append(begin)
        # Python 3.12 cuts f-strings into tokens that do not give the text back: take it from the
        # source
        if f_strings:
            if kind != FSTRING_END:
                continue
            begin = f_strings.pop()
            if f_strings:
                continue
            rows = lines[begin[0] - 1 : end[0]]
            rows[-1] = rows[-1][: end[1]]
            text = "".join(rows)[begin[1] :]
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if kind == tokenize.COMMENT and begin[0] in help_lines:
            out.append(f"{text}\n" if fresh else f" {text}")
        elif kind == tokenize.NEWLINE:
            out += [] if fresh else ["\n"]
            fresh = True
        elif kind not in (
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.NL,
            tokenize.COMMENT,
            tokenize.ENDMARKER,
        ):
            if fresh and begin[0] in skip:
                text = skip[begin[0]]
            if not text:
                continue
            if fresh:
                out.append(" " * depth)
            elif (word(out[-1][-1]) or out[-1][-1] in "'\"") and (
                word(text[0]) or text[0] in "'\""
            ):
                out.append(" ")
            out.append(text)
            fresh = False
    for node, _ in unread:
        node.body = node.body[1:] or [ast.Pass()]
    small = "".join(out)
    assert ast.dump(ast.parse(small)) == ast.dump(tree), "minifying changed the code"
    return small


def pack(paths: list[Path], root: Path = ROOT) -> str:
    """The text of one Python file that runs as paths[0] does, with the other modules inside."""
    texts = [
        f"{MARK}{module_name(path, root)}\n{minify(path.read_text(encoding='utf-8'))}"
        for path in paths
    ]
    assert all(text.count(MARK) == 1 for text in texts), f"a module contains {MARK!r}"
    data = base64.b85encode(
        lzma.compress("".join(texts).encode(), format=lzma.FORMAT_ALONE, filters=LZMA)
    ).decode()
    names = ", ".join(path.relative_to(root).as_posix() for path in paths)
    return LOADER.format(names=names, mark=MARK, data=data, entry=module_name(paths[0], root))


def unpack(text: str) -> dict[str, str]:
    """
    Name of a module -> its minified source, from the text of a packed file; nothing of it is run.
    """
    found = re.search(r'^packed=packed\("([^"]+)"\)', text, re.MULTILINE)
    if not found:
        raise PackError("this is no file that logs/pack.py wrote; give one that it did")
    try:
        whole = lzma.decompress(base64.b85decode(found[1])).decode()
    except (ValueError, lzma.LZMAError) as error:
        raise PackError(f"the packed sources are damaged ({error}); pack them again") from error
    return dict(part.split("\n", 1) for part in whole.split(MARK)[1:])


########################################
#             Command line             #
########################################


@dataclass
class Options:
    """One self-contained file out of the project's sources."""

    # the program first; what they import follows by itself
    sources: tyro.conf.Positional[tuple[str, ...]] = ("train_gpt.py",)
    # the file to write; with --unpack, a folder that is not there yet
    out: str = "packed/train_gpt.py"
    unpack: str = ""  # a packed file to take apart


def write(options: Options) -> None:
    out = Path(options.out)
    if options.unpack:
        sources = unpack(Path(options.unpack).read_text(encoding="utf-8", errors="replace"))
        out.mkdir(parents=True)
        for name, source in sources.items():
            (out / f"{name}.py").write_text(source, encoding="utf-8")
        print(
            f"{out}: {', '.join(f'{name}.py' for name in sources)}, without comments as they "
            "were packed"
        )
        return
    paths = [Path(source).resolve() for source in options.sources]
    for path in paths:
        if not path.is_relative_to(ROOT) or path.suffix != ".py":
            raise PackError(f"{path} is no source of this project; give .py files under {ROOT}")
    try:
        paths = modules_of(paths)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PackError(f"{paths[0].name}, or what it imports, is no Python: {error}") from error
    if (
        any((out.parent / path.name).exists() for path in paths if path.name != out.name)
        or out.resolve() in paths
    ):
        raise PackError(
            f"--out {out} lies beside sources of the same names, which it would log and count; "
            "write to "
            "a folder of its own, for example packed/"
        )
    text = pack(paths)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, out)
    before = sum(path.stat().st_size for path in paths)
    print(
        f"{out}: {len(text.encode())} bytes from {before} "
        f"({', '.join(path.name for path in paths)})"
    )


def main(argv: list[str] | None = None) -> int:
    return ending(
        "pack.py", lambda: write(tyro.cli(Options, args=argv, use_underscores=True)), PackError
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
