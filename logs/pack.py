"""The project's sources as one file that runs alone, for leaderboards that count the bytes of the
code.

    python logs/pack.py --out packed/train_gpt.py
    python logs/pack.py --preset golf_progressive       # what that leaves off is left out
    torchrun --standalone --nproc_per_node=8 -- packed/train_gpt.py --config golf_progressive
    python packed/train_gpt.py logs.score logs/RUN    # a module's name first: that one is run

    python logs/pack.py --unpack packed/train_gpt.py --out shown    # for the eye; runs nothing

A packed file behaves as the programs it was made of: the same flags and help, the same numbers. It
logs and counts itself as its source. Comments, docstrings and spaces are left out, except for those
that --help prints; the code that remains is the same to the last node of its syntax tree (checked
here at every packing). It is LZMA in base 85, behind a loader that registers the modules.
"""

import ast
import base64
import io
import lzma
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

from logs.endings import UserError, ending, written_whole  # noqa: E402

# what golf ships and counts; the first runs where no other is named
PROGRAMS = ("train_gpt.py", "logs/score.py")
MARK = "#module "  # begins the line before each module in the packed text
# pb 0: text has no alignment
LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}]
# tokens that Python 3.12 brought
FSTRING_START = getattr(tokenize, "FSTRING_START", -1)
FSTRING_END = getattr(tokenize, "FSTRING_END", -1)

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
   if any(p.startswith(name+".") for p in parts):
    return spec_from_loader(name,Packed,is_package=True)
  def create_module(spec):0
  def exec_module(module):
   module.__file__=__file__
   exec(program(module.__name__),module.__dict__)
 def program(name):return compile(parts.get(name,""),__file__,"exec",dont_inherit=True)
 sys.meta_path.insert(0,Packed)
 sys.excepthook=lambda *e:traceback.print_exception(*e)
 first=sys.argv[1] if __name__=="__main__" and sys.argv[1:] else ""
 return program(sys.argv.pop(1) if first in parts else "{entry}")
packed=packed("{data}")
exec(packed)
"""


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
    """(owner, docstring) of those that nothing prints, as --help prints a dataclass's."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            printed = is_dataclass(node) or isinstance(node, ast.Module) and "__doc__" in source
            found += [] if printed else [(node, node.body[0])]
    return found


def help_lines(tree: ast.Module, lines: list[str]) -> set[int]:
    """The lines whose comments --help prints: those at fields of dataclasses and above them."""
    found = set()
    for node in filter(is_dataclass, ast.walk(tree)):
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                found.add(field.end_lineno)
                above = field.lineno - 1
                while lines[above - 1].lstrip().startswith("#"):
                    found.add(above)
                    above -= 1
    return found


def tokens_of(source: str, lines: list[str]) -> Iterator[tuple[int, str, int]]:
    """(kind, text, line that it begins on) of each token, f-strings as one: Python 3.12 cuts them
    into tokens that do not give the text back, so it is taken from the lines.
    """
    begun = []  # where the open f-strings began
    for kind, text, begin, end, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind == FSTRING_START:
            begun.append(begin)
        if not begun:
            yield kind, text, begin[0]
        elif kind == FSTRING_END:
            first, column = begun.pop()
            if not begun:
                rows = lines[first - 1 : end[0]]
                rows[-1] = rows[-1][: end[1]]
                yield kind, "".join(rows)[column:], first


LAYOUT = (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER)


def minify(source: str) -> str:
    """The source without comments, docstrings, blank lines and needless spaces. Help texts stay:
    comments above and behind the fields of dataclasses, their docstrings, and that of a module that
    uses `__doc__`.
    """

    def sticks(character: str) -> bool:  # to another such, if no space is between them
        return character.isalnum() or character in "_'\""

    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    helps, unread = help_lines(tree, lines), docstrings(tree, source)
    instead = {text.lineno: "" if len(node.body) > 1 else "pass" for node, text in unread}
    out, depth, fresh = [], 0, True  # fresh: at the start of a line
    for kind, text, line in tokens_of(source, lines):
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if kind == tokenize.COMMENT and line in helps:
            out.append(f"{text}\n" if fresh else f" {text}")
        elif kind == tokenize.NEWLINE:
            out += [] if fresh else ["\n"]
            fresh = True
        elif kind not in LAYOUT:
            text = instead.get(line, text) if fresh else text
            if not text:
                continue
            if fresh:
                out.append(" " * depth)
            elif sticks(out[-1][-1]) and sticks(text[0]):
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
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return pack_texts(texts)


def pack_texts(texts: dict[str, str]) -> str:
    """The same of sources by their paths below the root."""
    whole = ""
    for name, text in texts.items():
        small = minify(text)
        assert MARK not in small, f"{name} contains {MARK!r}"
        whole += f"{MARK}{module_name(Path(name), Path())}\n{small}"
    packed = lzma.compress(whole.encode(), format=lzma.FORMAT_ALONE, filters=LZMA)
    data = base64.b85encode(packed).decode()
    entry = module_name(Path(next(iter(texts))), Path())
    return LOADER.format(names=", ".join(texts), mark=MARK, data=data, entry=entry)


def unpack(text: str) -> dict[str, str]:
    """Name of a module -> its minified source, from a packed file's text; nothing of it is run."""
    found = re.search(r'^packed=packed\("([^"]+)"\)', text, re.MULTILINE)
    if not found:
        raise UserError("this is no file that logs/pack.py wrote; give one that it did")
    try:
        whole = lzma.decompress(base64.b85decode(found[1])).decode()
    except (ValueError, lzma.LZMAError) as error:
        raise UserError(f"the packed sources are damaged ({error}); pack them again") from error
    return dict(part.split("\n", 1) for part in whole.split(MARK)[1:])


########################################
#             Command line             #
########################################


@dataclass
class Options:
    """One self-contained file out of the project's sources."""

    # the file to write; with --unpack, a folder that is not there yet
    out: str = "packed/train_gpt.py"
    unpack: str = ""  # a packed file to take apart
    # a preset, perhaps with layers and flags, of whose script it is made (see logs/script.py)
    preset: str = ""


def show(packed: Path, folder: Path) -> None:
    """Take a packed file apart into a new folder."""
    sources = unpack(packed.read_text(encoding="utf-8", errors="replace"))
    folder.mkdir(parents=True)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    names = ", ".join(f"{name}.py" for name in sources)
    print(f"{folder}: {names}, without comments as they were packed")


def texts_of(paths: list[Path], preset: str) -> dict[str, str]:
    """What is packed, by path: these files, with a preset's script in the place of the trainer."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    if preset:
        from logs import script  # brings torch

        request = script.read_request(preset.split())
        texts["train_gpt.py"] = script.script_of(request, scorer=True)
    return texts


def write(out: Path, preset: str) -> None:
    """Pack PROGRAMS, with what they import, into one file."""
    paths = modules_of([ROOT / name for name in PROGRAMS])
    others = [out.parent / path.relative_to(ROOT) for path in paths if path.name != out.name]
    if out.resolve() in paths or any(other.exists() for other in others):
        raise UserError(
            f"--out {out} lies beside sources of the same names, which it would log and count; "
            "write to a folder of its own, for example packed/"
        )
    data = pack_texts(texts_of(paths, preset)).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as file:
        file.write(data)
    before, names = sum(path.stat().st_size for path in paths), [path.name for path in paths]
    print(f"{out}: {len(data)} bytes from {before} ({', '.join(names)})")


def program(options: Options) -> None:
    if options.unpack:
        show(Path(options.unpack), Path(options.out))
    else:
        write(Path(options.out), options.preset)


def main(argv: list[str] | None = None) -> int:
    work = lambda: program(tyro.cli(Options, args=argv, use_underscores=True))
    return ending("pack.py", work)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
