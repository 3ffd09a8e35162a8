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
here at every packing).

Of a preset (logs/golf.py) no help is kept, and names of functions, classes and local variables are
short ones; what a person reads lies beside it. Its flags are those that its script has left.

The text is compressed, by brotli where the program imports that anyway, and written with the 188
characters of Latin-1 that print: 5.9 % more than the bytes, where base 85 takes 25 % more.
"""

import ast
import functools
import io
import lzma
import re
import shlex
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import brotli
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

# Latin-1 without quote, backslash and what does not print: one byte of the file each. Blocks of so
# many of these digits hold so many bytes.
ALPHABET = bytes(i for i in range(32, 256) if i not in (34, 92) and not 126 < i < 161)
DIGITS, BYTES = 1059, 1000
CODING = "# coding:latin-1\n"  # the first line of a packed file

# The digits as bytes, decompressed: the same in both frames.
DECODER = """\
def unpacked(s):
 n=0
 for c in s:n=n*188+A.index(c)
 return n.to_bytes(len(s)*1000//1059,"big")
A=bytes(i for i in range(32,256)if i not in(34,92)and not 126<i<161)
"""

# Every module keeps its place in the whole text as line numbers, and linecache holds that text
# under the name of the packed file: so inspect, tyro's --help and tracebacks find the source (the
# interpreter's own printer of tracebacks asks no linecache, hence the hook). The program runs as
# the file itself.
LOADER = (
    CODING
    + """\
# {names}, packed by logs/pack.py; `python logs/pack.py --unpack` shows what is inside
"""
    + DECODER
    + """\
def packed(data):
 import brotli,linecache,sys,traceback
 from importlib.util import spec_from_loader
 data=[unpacked(data[i:i+1059])for i in range(0,len(data),1059)]
 text=brotli.decompress(b"".join(data)).decode()
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
packed=packed("{data}".encode("latin-1"))
exec(packed)
"""
)

# One module: nothing to import, and it runs as it stands.
FRAME = (
    CODING
    + """\
# origin: nanoremix {revision}: python logs/pack.py --preset {words}; --unpack shows it
import {codec},linecache,sys,traceback
"""
    + DECODER
    + """\
s="{data}".encode("latin-1")
s={codec}.decompress(b"".join(unpacked(s[i:i+1059])for i in range(0,len(s),1059))).decode()
linecache.cache[__file__]=len(s),None,s.splitlines(True),__file__
sys.excepthook=lambda*e:traceback.print_exception(*e)
exec(compile(s,__file__,"exec"))
"""
)
ORIGIN = re.compile(
    r"^# origin: nanoremix (.+?): python logs/pack.py --preset (.+); --unpack", re.M
)


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


def shrunk(source: str) -> str:
    """The source without what only people read: comments, docstrings, annotations that nothing
    evaluates, and long names of what no text names.
    """
    try:
        import python_minifier
        from python_minifier import RemoveAnnotationsOptions
    except ImportError as error:
        message = "packing a preset needs python-minifier: pip install -r requirements.txt"
        raise UserError(message) from error
    # those of classes are fields of dataclasses and of records
    annotations = RemoveAnnotationsOptions(remove_class_attribute_annotations=False)
    return python_minifier.minify(
        source,
        remove_annotations=annotations,
        remove_literal_statements=True,
        hoist_literals=False,  # makes what is compressed larger
        rename_globals=True,
    )


def as_text(data: bytes) -> str:
    """Bytes as digits of ALPHABET."""
    blocks = []
    for low in range(0, len(data), BYTES):
        part = data[low : low + BYTES]
        number, digits = int.from_bytes(part, "big"), []
        for _ in range(-(-len(part) * DIGITS // BYTES)):
            number, digit = divmod(number, len(ALPHABET))
            digits.append(ALPHABET[digit])
        assert number == 0
        blocks.append(bytes(digits[::-1]))
    return b"".join(blocks).decode("latin-1")


def from_text(text: str) -> bytes:
    """What as_text() was given; ValueError where it was not."""
    data, parts = text.encode("latin-1"), []
    for low in range(0, len(data), DIGITS):
        number, part = 0, data[low : low + DIGITS]
        for digit in part:
            number = number * len(ALPHABET) + ALPHABET.index(digit)
        parts.append(number.to_bytes(len(part) * BYTES // DIGITS, "big"))
    return b"".join(parts)


def bytes_of(text: str) -> bytes:
    """A source as its file has it: those packed here are Latin-1."""
    return text.encode("latin-1" if text.startswith(CODING) else "utf-8")


def text_in(data: bytes) -> str:
    """A source from the bytes of its file."""
    return data.decode("latin-1" if data.startswith(CODING.encode()) else "utf-8", "replace")


def compressed(text: str, codec: str) -> bytes:
    if codec == "brotli":
        return brotli.compress(text.encode(), mode=brotli.MODE_TEXT)
    return lzma.compress(text.encode(), format=lzma.FORMAT_ALONE, filters=LZMA)


def pack(paths: list[Path], root: Path = ROOT) -> str:
    """The text of one Python file that runs as paths[0] does, with the other modules inside."""
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    whole = ""
    for name, text in texts.items():
        small = minify(text)
        assert MARK not in small, f"{name} contains {MARK!r}"
        whole += f"{MARK}{module_name(Path(name), Path())}\n{small}"
    data = as_text(compressed(whole, "brotli"))
    entry = module_name(Path(next(iter(texts))), Path())
    return LOADER.format(names=", ".join(texts), mark=MARK, data=data, entry=entry)


def words_of(preset: str) -> list[str]:
    """The words of --preset, split as a shell does: a flag's value may have spaces."""
    try:
        words = shlex.split(preset)
    except ValueError as error:  # a quote that is not closed
        raise UserError(
            f"--preset {preset!r} cannot be split into words: {error}; quote as in a shell"
        ) from error
    if broken := [word for word in words if len(word.splitlines()) > 1]:
        raise UserError(
            f"--preset: {broken[0]!r} has a line break, but the packed file says in one line what "
            "it was made by: write spaces instead"
        )
    return words


def pack_program(text: str, preset: str, revision: str) -> str:
    """The text of one Python file that runs as this one does; preset: the words it was made by."""
    codec = "brotli" if "brotli" in imported(text) else "lzma"
    # behind the frame's lines, so that a traceback does not take those for its own
    small = "\n" * FRAME.count("\n") + shrunk(text)
    data = as_text(compressed(small, codec))
    words = shlex.quote(shlex.join(words_of(preset))).encode("ascii", "replace").decode()
    return FRAME.format(revision=revision, words=words, codec=codec, data=data)


def origin_of(text: str) -> tuple[str, str]:
    """Revision and words of the preset that a packed file was made by; empty where of none."""
    found = ORIGIN.search(text) if text.startswith(CODING) else None
    return (found[1], shlex.split(found[2])[0]) if found else ("", "")


def unpack(text: str) -> dict[str, str]:
    """Name of a module -> its minified source, from a packed file's text; nothing of it is run."""
    found = re.search(r'^(?:packed=packed\(|s=)"([^"]+)"\.encode', text, re.MULTILINE)
    if not found:
        raise UserError("this is no file that logs/pack.py wrote; give one that it did")
    try:
        data = from_text(found[1])
        codec = lzma if "\nimport lzma," in text else brotli
        whole = codec.decompress(data).decode()
    except (ValueError, lzma.LZMAError, brotli.error) as error:
        raise UserError(f"the packed sources are damaged ({error}); pack them again") from error
    if not whole.startswith(MARK):
        return {"train_gpt": whole}
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
    # a preset, perhaps with layers and flags, of whose script it is made (see logs/script.py);
    # quotes hold a value with spaces together: 'golf_cpu --lr "0:1 1>0.1"'
    preset: str = ""


def show(packed: Path, folder: Path) -> None:
    """Take a packed file apart into a new folder."""
    sources = unpack(text_in(packed.read_bytes()))
    folder.mkdir(parents=True)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    names = ", ".join(f"{name}.py" for name in sources)
    print(f"{folder}: {names}, without comments as they were packed")


@functools.cache  # folding takes a minute
def program_of(preset: str) -> str:
    """The program of a preset and its scorer, as a person reads it."""
    from logs import golf, script  # bring torch

    return golf.program_of(script.read_request(words_of(preset)))


def write(out: Path, preset: str) -> None:
    """Pack PROGRAMS, with what they import, into one file; of a preset the readable one too."""
    paths = modules_of([ROOT / name for name in PROGRAMS])
    others = [out.parent / path.relative_to(ROOT) for path in paths if path.name != out.name]
    if out.resolve() in paths or any(other.exists() for other in others):
        raise UserError(
            f"--out {out} lies beside sources of the same names, which it would log and count; "
            "write to a folder of its own, for example packed/"
        )
    files, readable = {}, out.with_name(f"{out.stem}_readable.py")
    if preset:
        from logs import script

        text = program_of(preset)
        files = {out: pack_program(text, preset, script.revision()), readable: text}
    else:
        files = {out: pack(paths)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        with written_whole(path) as file:
            file.write(bytes_of(text))
    before, names = sum(path.stat().st_size for path in paths), [path.name for path in paths]
    print(f"{out}: {out.stat().st_size} bytes from {before} ({', '.join(names)})")
    if preset:
        print(f"{readable}: the same for the eye, {text.count(chr(10))} lines; not counted")


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
