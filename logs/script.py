"""A preset as one readable script: the trainer without the switches that the preset leaves off.

    python logs/script.py remix_m > train_remix_m.py
    python logs/script.py golf_cpu --without wandb --keep "seed data lr" --out train_golf_cpu.py

What the preset fixes is a constant there, branches that cannot run are gone, and what only they
used is gone with them; comments and layout of what stays are the trainer's. The script needs no
other file of the project, its losses, weights and artifact are the trainer's to the bit, and what
it writes into its run folder is read by the project's other programs. It serves one node.
"""

import dataclasses
import difflib
import functools
import math
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import libcst as cst
import libcst.matchers as m
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, which sees its own folder alone
    sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402
from logs import folding, score  # noqa: E402
from logs.endings import UserError, ending, written_whole  # noqa: E402

# what stays a flag, where the code that is left reads it
KEPT = (
    "run seed data log_dir resume wandb steps lr momentum weight_decay matrix_lr adamw_lr embed_lr "
    "head_lr tied_lr scalar_lr matrix_wd embed_wd scalar_wd"
).split()


@dataclasses.dataclass
class Part:
    """What can be left out, as what is then known."""

    fields: dict[str, object] = dataclasses.field(default_factory=dict)  # of the configuration
    attributes: dict[str, object] = dataclasses.field(default_factory=dict)  # of Run
    constants: dict[str, object] = dataclasses.field(default_factory=dict)
    expressions: dict[str, object] = dataclasses.field(default_factory=dict)
    device: str = ""  # the only one
    idle: str = ""  # functions that do nothing
    pure: str = ""  # that can be left out where nobody takes what they give
    instead: str = ""  # definitions in the place of the trainer's
    refusals: str = ""  # functions that make an error which says what to do


DROPPED = {  # by the word of --without
    "resume": Part(
        {"resume": False, "keep": 0, "save_every": 0, "save_last": 0},
        constants={"GO_ON": ""},
        idle="lock_folder",
        instead="def write_whole(path: Path, data: bytes):\n    return path.write_bytes(data)\n",
    ),
    "wandb": Part({"wandb": ""}),
    "averages": Part({"ema": 0.0, "swa_every": 0, "average_epochs": 0, "final_weights": "live"}),
    "export": Part({"export": "", "gptq": 0, "artifact_limit": 0, "qat": "0", "qat_noise": 0}),
    "sample": Part({"tokenizer": ""}),
    "ranks": Part(
        attributes={"world": 1, "rank": 0, "is_main": True},
        expressions={'int(os.environ.get("LOCAL_RANK", 0))': 0},
    ),
    "cpu": Part(device="cuda"),
    "gpu": Part(device="cpu"),
    "signals": Part(attributes={"signal": 0}, constants={"SIGNALS": ()}),
    "checks": Part(
        idle="check",
        instead="def exit_code(work: Callable[[], int]) -> int:\n    return work()\n",
        refusals="require UserError Diverged error unreadable no_batch taken",
    ),
    "schedules": Part(constants={"SCHEDULES": ()}),  # as code: scheduled()
    "warmup": Part(idle="warm_up log_recompiles keep_compiled", pure="graphs_compiled"),
    "witness": Part(
        idle="log_head",
        instead="def evidence(trainer: Trainer) -> dict[str, str]:\n    return {}\n",
    ),
}
IN_BITS = ("val_bpb", "roundtrip_val_bpb", "sliding_val_bpb", "mixed_val_bpb", "ttt_val_bpb")
# fields that the script's own parser has no use for
NEVER = {"config", "rule", "score"}


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


@dataclasses.dataclass
class Request:
    """What was asked for."""

    argv: list[str]  # of the trainer: preset, layers and flags
    keep: list[str]
    without: list[str]
    out: str
    keep_given: bool = False


def read_request(argv: list[str]) -> Request:
    """The trainer's flags, and three of this program's."""
    own: dict[str, str] = {}
    rest, i = [], 0
    while i < len(argv):
        name, is_joined, joined = argv[i].partition("=")
        end = i + 1
        while not is_joined and end < len(argv) and not argv[end].startswith("--"):
            end += 1
        value = joined if is_joined else " ".join(argv[i + 1 : end])
        # the trainer has a flag of this name, too: how many checkpoints it keeps
        is_number = name == "--keep" and value.isdigit()
        if name in ("--keep", "--without", "--out") and not is_number:
            own[name] = value
            i = end
        else:
            rest.append(argv[i])
            i += 1
    presets = []
    while rest and not rest[0].startswith("-"):
        presets.append(rest.pop(0))
    require(
        bool(presets) or "--config" in rest,
        "which preset? for example: python logs/script.py remix_m > train_remix_m.py",
    )
    keep = own["--keep"].split() if "--keep" in own else KEPT
    without = own.get("--without", "").split()
    gone = {name for part in without if part in DROPPED for name in DROPPED[part].fields}
    gone |= set(tg.SCHEDULES) if "schedules" in without else set()
    keep = [name for name in keep if name not in gone]
    flags = ["--config", *presets, *rest] if presets else rest
    return Request(flags, keep, without, own.get("--out", ""), "--keep" in own)


def configure(request: Request) -> tg.Config:
    """The configuration that the script fixes; UserError where what is asked cannot be."""
    cfg = tg.parse_args(request.argv)
    fields = [name for name in tg.FIELDS if name not in NEVER]
    for name in request.keep:
        close = difflib.get_close_matches(name, fields, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else "python train_gpt.py --help"
        require(name in fields, f"--keep {name}: the configuration has no such field; {hint}")
        require(
            name in KEPT or can_stay(cfg, name),
            f"--keep {name}: the script is made for its value; what can stay a flag beside "
            f"{' '.join(KEPT)} are numbers by which nothing is wired",
        )
    require(
        not {"cpu", "gpu"} <= set(request.without), "--without cpu gpu: then nothing is to run it"
    )
    for name in ("init_from", "teacher"):
        require(
            not getattr(cfg, name),
            f"{name} = {getattr(cfg, name)!r}: a script knows the configuration of its own runs "
            "alone; train_gpt.py reads those of others",
        )
    for part in request.without:
        require(part in DROPPED, f"--without {part}: what can be left out is {', '.join(DROPPED)}")
        why = used_by(cfg, part)
        require(not why, f"--without {part}: {' '.join(cfg.config)} needs it: {why}")
        for name, value in DROPPED[part].fields.items():
            setattr(cfg, name, value)
    return cfg


class Asked(tg.Config):
    """A configuration that knows which of its fields were read."""

    def __getattribute__(self, name: str) -> object:
        if name in tg.FIELDS:
            object.__getattribute__(self, "asked").add(name)
        return object.__getattribute__(self, name)


def can_stay(cfg: tg.Config, name: str) -> bool:
    """Whether a field is a number that is not put into a script in the shape of something else."""
    asked = object.__new__(Asked)
    object.__setattr__(asked, "asked", set())
    asked.__dict__.update(vars(cfg))
    tg.wirings(asked)
    expressions_of(asked, {})
    of_graphs(asked)
    read = object.__getattribute__(asked, "asked")
    return type(getattr(cfg, name)) in (int, float) and name not in read


def used_by(cfg: tg.Config, part: str) -> str:
    """Why a preset cannot do without a part; empty where it can. Defaults count for nothing."""
    said: dict = {}
    for name in cfg.config:
        said |= tg.read_toml(tg.preset_path(name))
    plain = tg.Config()
    for name, value in DROPPED[part].fields.items():
        if part != "resume" and part != "sample" and name in said and said[name] != value:
            return f"{name} = {said[name]!r}"
    metric = said.get("rule", {}).get("metric", "")
    modes = said.get("score", {}).get("modes", "")
    if part == "export" and (modes or metric.startswith("roundtrip")):
        return f"its score is the artifact's ({metric or modes})"
    if part == "sample" and metric in IN_BITS:
        return f"its rule is about {metric}, whose bytes the tokenizer counts"
    if DROPPED[part].device and cfg.device not in ("auto", DROPPED[part].device):
        return f"device = {cfg.device!r}"
    if part == "schedules":
        moving = set(tg.SCHEDULES) - set(constant_schedules(cfg, []))
        other = sorted(moving & {*tg.GRAPHS, *tg.BY_CYCLE} | moving & set(tg.Now._field_defaults))
        return f"more than rates depends on {', '.join(other)}" if other else ""
    if part == "resume" and (cfg.resume or cfg.save_every != plain.save_every):
        return f"save_every = {cfg.save_every}"
    return ""


# --- what is known -----------------------------------------------------------------------------


class Fixed:
    """The configuration with those fields alone that are fixed."""

    def __init__(self, fields: dict[str, object]):
        self.__dict__["fields"] = fields

    def __getattr__(self, name: str) -> object:
        return self.fields[name]


PURE = (
    "head_width hidden_width rotary_dims loop_span is_number extra_terms drop_chance is_windowed "
    "is_constant is_averaged largest layer_order Schedule own_rates decays_of tail_shares "
    "centering_notices has_meta_step matrix_factors last_tied classes_of head_rows "
    "later_targets offset_dims yarn_growths yarn_stages blocks_of value_tables value_dims "
    "gated_skips backed_out sources_of mudd_starts final_starts"
).split()
# expressions of the trainer by what they hold or call
CALLED_AS = {
    "self.muon": ".muon_update",
    "self.adamw": ".adamw_update",
    "self.rows": ".rows_update",
    "self.attn": "Attention.forward",
    "self.mlp": "MLP.forward",
    "block": "Block.forward",
    "self.mtp_block": "Block.forward",
    "trainer.graph": "GPT.forward",
    "model": "GPT.forward",
    "compiled_on_gpu(attend_flex, q)": ".attend_flex",
    "compiled_on_gpu(block_mask, q)": ".block_mask",
}
HOLDERS = {
    "run": "Run",
    "trainer": "Trainer",
    "plan": "Plan",
    "loader": "Loader",
    "val": "Validation",
    "opt": "MuonAdamW",
    "avg": "Averages",
    "b": "Bucket",
    "attn": "Attention",
    "mask": "AttentionMask",
    "clock": "Clock",
    "tokenizer": "Tokenizer",
    "now": "Now",
    "n": "Now",
    "end": "Now",
    "place": "Place",
    "todo": "Due",
    "rule": "Rule",
    "shape": "Shape",
    "s": "Shape",
    "said": "Declared",
    "declared": "Declared",
    "module": "Declaring",
    "old": "Now",
    "new": "Now",
}
RECORDS = {"Now", "Place", "Due", "Rule", "Shape", "Declared"}  # NamedTuples
# Calls that can be left out where nobody takes what they give: of Python and libraries, and of the
# trainer, whose other functions have none of these names.
WITHOUT_EFFECT = set(
    "clone ones zeros size view float Path cast items unbind to arange get isinstance hasattr "
    "enumerate torch.compile dataclasses.field named_modules Generator nullcontext "
    "contextlib.nullcontext environ".split()
)
OWN_WITHOUT_EFFECT = (
    "next_step_seconds graph_of Averages is_late AttentionMask check_bits parse_bits "
    "quantised_names GPT.embedded Schedule.at Plan.at Plan.ends_epoch Plan.eval_shape Plan.tokens "
    "Loader.tokens_in_order Clock.seconds Figures.seconds"
).split()


def constant_schedules(cfg: tg.Config, keep: list[str]) -> dict[str, object]:
    """Fields of Now that are one value from start to end."""
    found: dict[str, object] = {}
    plan, steps = tg.Plan(cfg), range(0, cfg.steps + 1, max(1, cfg.steps // 500))
    nows = [plan.at(step, step / cfg.steps) for step in steps]
    for name in tg.SCHEDULES:
        text = getattr(cfg, name)
        values = tg.Schedule(name, text).values() if text else [None]  # lr_matrices: as lr
        # those of cycles are no fields of Now, but looked up by their names
        asked = name in keep or bool(cfg.cycles) and name in tg.BY_CYCLE
        # cycles multiply some, and counts of tokens are whole
        seen = {getattr(now, name, values[0]) for now in nows}
        if not asked and len(values) == len(seen) == 1:
            found[name] = seen.pop()
    return found


def constant_places(cfg: tg.Config) -> dict[str, object]:
    """Fields of Place that are one value at all places."""
    places = [place for places in tg.wirings(cfg).values() for place in places]
    fields = {name: {getattr(p, name) for p in places} for name in tg.Place._fields}
    return {name: values.pop() for name, values in fields.items() if len(values) == 1}


def expressions_of(cfg: tg.Config, now: dict[str, object]) -> dict[str, object]:
    """What follows from the configuration, and not from one expression of the code alone."""
    found: dict[str, object] = {}
    if cfg.doc_mask:  # documents() gives a tensor
        found |= {f"{name} is not None": True for name in ("docs", "q_doc")}
        found |= {"docs is None": False, "docs_BT is None": False}
    defaults = tg.Now._field_defaults
    moved = set(defaults) - set(now) - {"distill", "tied"}
    if not cfg.distill and not cfg.untie_at and not moved:
        found["Now._field_defaults"] = {}
    if tg.rotary_dims(cfg) == tg.head_width(cfg):
        found["still.size(-1)"] = 0
    if not cfg.export:  # else fits() makes a model without weights
        found['device.type == "meta"'] = False
    if cfg.export_codec not in ("best", tg.ENTROPY):
        found |= {"codec == ENTROPY": False, 'header["codec"] == ENTROPY': False}
    if cfg.export != "fit" and len(cfg.export.split()) == 1:
        found["levels_of(bits.of(name))"] = tg.levels_of(tg.parse_bits(cfg.export).default)
    return found


def scheduled(source: str, cfg: tg.Config) -> str:
    """The trainer with each schedule that moves as a function, and without texts of schedules."""
    functions = ""
    for name in tg.SCHEDULES:
        if name not in constant_schedules(cfg, []):
            functions += "\n".join(schedule_lines(name, getattr(cfg, name))) + "\n\n\n"
            read = rf'v\["{name}"\](?! \*=)'  # cycles, which multiply it, are not allowed
            source = re.sub(read, f"{name}_at(step, fraction)", source)
    return source.replace("class Now(NamedTuple):\n", functions + "class Now(NamedTuple):\n")


def schedule_lines(name: str, text: str) -> list[str]:
    """Schedule.at() of one schedule, with its operations in their order."""
    first, *points = tg.Schedule(name, text).points
    value, last = first.value, first
    lines = [f"def {name}_at(step: int, fraction: float) -> float:", f'    """{text}"""']
    for point in points:
        x = "step" if point.in_steps else "fraction"
        start = last.at if last.in_steps == point.in_steps else 0.0
        reached = value
        if point.ramp and value != point.value:
            share = f"({x} - {start}) / ({point.at} - {start})" if start else f"{x} / {point.at}"
            if point.power != 1:
                share = f"1 - (1 - {share}) ** {point.power}"
            if point.cosine:
                share = f"(1 - math.cos(math.pi * ({share}))) / 2"
            reached = f"{value} + ({point.value} - {value}) * ({share})"
            if start:
                lines += [f"    if {x} <= {start}:", f"        return {value}"]
        if str(reached) != str(point.value):
            lines += [f"    if {x} < {point.at}:", f"        return {reached}"]
        value, last = point.value, point
    return [*lines, f"    return {value}"]


SCORER = ROOT / "logs" / "score.py"


@functools.cache
def parsed(source: str) -> cst.Module:
    """Its tree, which nothing changes in place; a long source takes seconds."""
    tree = cst.parse_module(source)
    folding.refuse_ones(tree)
    refuse_namesakes(tree)
    return tree


def refuse_namesakes(node: cst.Module | cst.ClassDef | cst.FunctionDef, inside: str = "") -> None:
    """A call is known by its last name alone: no function may share one of those without effect."""
    known = {*WITHOUT_EFFECT, *(name.rpartition(".")[2] for name in OWN_WITHOUT_EFFECT)}
    for inner in node.body if isinstance(node, cst.Module) else node.body.body:
        if isinstance(inner, cst.FunctionDef | cst.ClassDef):
            name = inner.name.value
            assert name not in known or inside + name in OWN_WITHOUT_EFFECT, (
                f"calls of {inside}{name} would be left out of scripts: give it another name"
            )
            refuse_namesakes(inner, f"{inside}{name}.")


def parsed_scorer() -> cst.Module:
    return parsed(SCORER.read_text(encoding="utf-8"))


def without(facts: folding.Facts, cfg: tg.Config, word: str) -> None:
    """What is known where a part is left out."""
    part = DROPPED[word]
    for cls in ("Ranks", "Run"):
        facts.attributes |= {(cls, name): value for name, value in part.attributes.items()}
    facts.constants |= part.constants
    facts.expressions |= part.expressions
    facts.pure |= set(part.pure.split())
    facts.short |= set(re.findall(r"^def (\w+)", part.instead, re.M))
    facts.refusals |= set(part.refusals.split())
    if word == "checks" and not cfg.bos_rows:
        facts.refusals |= {"OutOfData"}
    if word == "signals":
        facts.protocol -= {"on_signal"}
    if part.device:
        on_gpu = part.device == "cuda"
        facts.records["device"] = {"type": part.device}
        facts.anywhere["is_cuda"] = on_gpu
        facts.expressions["torch.cuda.is_available()"] = on_gpu


def of_graphs(cfg: tg.Config) -> dict[str, object]:
    """What follows from the lengths of rows, and from that nothing applies the model uncompiled."""
    plan, found = tg.Plan(cfg), {}
    graphs = {*plan.train_shapes(1), *plan.eval_shapes()}
    beside = cfg.gptq or cfg.distill or cfg.embed_stats
    in_graphs = cfg.compile == 2 and not beside and len(graphs) <= 8  # what torch compiles at most
    if in_graphs:
        found["torch.compiler.is_compiling()"] = True
        found["mask is None"] = False  # flex_mask()'s
    lengths = {graph.seq_len for graph in graphs}
    if cfg.paired_layers:
        lengths |= {2 * length for length in lengths}
    least, most = min(lengths), max(lengths)
    if least > tg.LONG_ROW or most <= tg.LONG_ROW:
        found["T > LONG_ROW"] = least > tg.LONG_ROW
        found["like.size(1) <= LONG_ROW"] = most <= tg.LONG_ROW
    windows = {graph.window for graph in graphs}
    if cfg.window_pattern:
        windows |= {graph.window_long for graph in graphs}
    if cfg.mtp:  # its block sees the whole row
        windows.add(0)
    if max(windows) < least:
        found["window >= like.size(1)"] = False
    if max(windows) == 0 or min(windows) > 0 and 2 * max(windows) <= least:
        found["T >= 2 * window > 0"] = max(windows) > 0
    if most <= tg.LONG_ROW and in_graphs:
        found["seen is None"] = False
    if cfg.kv_heads in (0, cfg.heads):
        found |= {"k.size(1) != H": False, "q.size(1) != k.size(1)": False}
    bounds = {tg.score_bound(cfg) * tg.sharpness(cfg, graph.window_long) for graph in graphs}
    if math.inf in bounds or in_graphs and max(bounds) <= 40:
        found["bound <= 40"] = math.inf not in bounds
    return found


def tables_of(cfg: tg.Config) -> str:
    """What texts of patterns say, as functions that give it at once."""

    def code(value: object) -> str:
        if isinstance(value, re.Pattern):
            return f"re.compile({value.pattern!r})"
        if isinstance(value, tg.OwnRate):
            return f"OwnRate({', '.join(map(code, value))})"
        return f"({', '.join(map(code, value))})" if isinstance(value, tuple) else repr(value)

    found = ""
    for name in ("own_rates", "matrix_factors", "tail_shares"):
        function = getattr(tg, name)
        rows = ", ".join(map(code, function(cfg)))
        kind = function.__annotations__["return"]
        found += f"def {name}(cfg: Config) -> {kind}:\n    return [{rows}]\n\n\n"
    return found


def idle_functions(cfg: tg.Config, words: list[str]) -> set[str]:
    """Functions and methods of which nothing is left, by what --without names."""
    found = {name for word in words for name in DROPPED[word].idle.split()}
    by_epochs = cfg.lr_cycles or cfg.average_epochs or cfg.eval_every < 0
    if "checks" in words and not cfg.shuffle and not by_epochs:
        found.add("check_enough")  # else it finds what would train otherwise than it was meant
    return found


class Idle(cst.CSTTransformer):
    """Functions of these names do nothing."""

    def __init__(self, names: set[str]):
        super().__init__()
        self.names = names

    def leave_FunctionDef(self, old, new):
        if new.name.value not in self.names:
            return new
        return new.with_changes(body=cst.IndentedBlock([cst.parse_statement("pass")]))


def facts_of(cfg: tg.Config, keep: list[str], words: list[str]) -> folding.Facts:
    fields = {
        name: getattr(cfg, name) for name in tg.FIELDS if name not in NEVER and name not in keep
    } | {"score": cfg.score}
    now, place = constant_schedules(cfg, keep), constant_places(cfg)
    varying = tuple(name for name in tg.SCHEDULES if name not in now)
    graphs = tuple(name for name in tg.GRAPHS if name not in now)
    applied = tuple(name for name in tg.APPLIED if name not in now)
    facts = folding.Facts(
        fields=fields,
        config=Fixed(fields),
        records={"now": now, "end": now, "n": now, "place": place, "p": place},
        functions={name: getattr(tg, name) for name in PURE},
        constants={
            "SCHEDULES": varying,
            "GRAPHS": graphs,
            "APPLIED": applied,
            "ENTROPY": tg.ENTROPY,
        },
        called_as=CALLED_AS | HOLDERS,
        roots={"main", "Config"},
        protocol={"forward", "backward", "on_signal"},
        pure=WITHOUT_EFFECT | {name.rpartition(".")[2] for name in OWN_WITHOUT_EFFECT},
        aliases={"Now", "Trainer", "Due", "Declared", "Shape", "Place", "Added", "Point", "Rule"},
        compared={"Rule", "Shape"},
        tuples={name for name, cls in HOLDERS.items() if cls in RECORDS},
        attributes={("Ranks", "one_node"): True, ("Run", "one_node"): True},
        expressions=expressions_of(cfg, now),
        reminders={"moments"},
    )
    for word in words:
        without(facts, cfg, word)
    return facts


# --- the configuration of a script --------------------------------------------------------------

TEMPLATE = '''
def check(cfg: Config) -> None:
    for name, (least, most) in LIMITS.items():
        value = getattr(cfg, name)
        for x in Schedule(name, value).values() if name in SCHEDULES else [value]:
            ok = least <= x <= most
            require(ok, f"{name} = {value!r}: must lie between {least} and {most}")
    for name, decays in DECAYS.items():
        idle = getattr(cfg, name) != "1" and not any(getattr(cfg, decay) for decay in decays)
        require(not idle, f"{name} = {getattr(cfg, name)!r} needs a {' or '.join(decays)} above 0")
    ranks, here = (int(os.environ.get(key) or 1) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    require(here == ranks, f"{ranks} ranks, {here} of them here: a script serves one node")
    check_texts(cfg)
    check_run_name(cfg.run)
    check_length(cfg)


def parse_args(argv: list[str]) -> Config:
    cfg = tyro.cli(Config, args=argv, description=__doc__, use_underscores=True)
    cfg.run = cfg.run or f"PRESET-s{cfg.seed}"
    check(cfg)
    return cfg


def config_toml(cfg: Config) -> str:
    """What is fixed and what was given, as TOML; what is left out has the trainer's default."""

    def line(key: str, value: object) -> str:
        return f"{key} = " + json.dumps(value, ensure_ascii=False).replace("\\x7f", "\\\\u007f")

    tables = {"rule": cfg.rule, "score": cfg.score}
    names = [name for name in Config.__annotations__ if name not in (*tables, "config", "resume")]
    lines = [line(name, getattr(cfg, name)) for name in names]
    for name, table in tables.items():
        if table:
            lines += ["", f"[{name}]", *(line(key, value) for key, value in table.items())]
    return "\\n".join(lines) + "\\n"


def config_hash(cfg: Config) -> str:
    """sha256 over the lines of the configuration that make two runs different experiments."""
    free = FREE_ON_RESUME | {"run", "arm", ""}
    lines = config_toml(cfg).partition("\\n[")[0].splitlines()
    kept = [line for line in lines if line.split(" = ")[0] not in free]
    return hashlib.sha256("\\n".join(kept).encode()).hexdigest()


def changes(cfg: Config, folder: Path) -> dict[str, tuple]:
    """
    Each field that a run folder's configuration has another value of: that, and the one now; None
    where there is none.
    """
    saved, new = saved_config(folder), tomllib.loads(config_toml(cfg))
    try:
        old = tomllib.loads(saved.read_text(encoding="utf-8")) if saved else new
    except ValueError as e:
        raise UserError(f"{saved} cannot be read ({e})") from e
    both = {name: (old.get(name), new.get(name)) for name in old | new}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def renew_tables(run: Run) -> None:
    pass


def stored_config(text: str, where: str) -> Config:
    flags = {f.name for f in dataclasses.fields(Config)}
    return Config(**{k: v for k, v in tomllib.loads(text).items() if k in flags})
'''

# where no schedule makes another graph
ONE_GRAPH = """

def log_switch(trainer: Trainer, step: int, now: Now, seconds: float) -> None:
    pass
"""


def help_of(name: str) -> list[str]:
    """The comments of a field of the trainer: above it and behind it."""
    source = Path(tg.__file__).read_text(encoding="utf-8").splitlines()
    field = f"    {name}: {tg.FIELDS[name].type} = "
    at = next(i for i, line in enumerate(source) if line.startswith(field))
    above, i = [], at - 1
    while source[i].lstrip().startswith("#"):
        above.insert(0, source[i].strip().removeprefix("# "))
        i -= 1
    behind = re.search(r"  # (.*)$", source[at])
    return [" ".join([*above, *([behind[1]] if behind else [])])]


def field_lines(name: str, value: object, fixed: bool) -> list[str]:
    kind = tg.FIELDS[name].type
    kind = f"ClassVar[{kind}]" if fixed else kind
    text = f"    {name}: {kind} = {folding.code_of(folding.literal(value))}"
    (comment,) = help_of(name)
    comment = comment.removeprefix("[sched] ")
    if fixed:  # what other values mean is not in this script
        first, *values = comment.split("; ")
        comment = "; ".join([first, *(v for v in values if v.startswith(f"{value}: "))])
    if comment and len(text) + len(comment) + 4 <= 100:
        return [f"{text}  # {comment}"]
    return [*(f"    # {line}" for line in textwrap.wrap(comment, 94)), text]


def config_class(cfg: tg.Config, flags: list[str], read: set[str]) -> str:
    """Flags that are left, fields that are fixed and read, and what else the preset says."""
    plain = tg.Config()
    names = [name for name in tg.FIELDS if name not in NEVER and name not in flags]
    used = [name for name in names if name in read]
    other = [n for n in names if n not in read and getattr(cfg, n) != getattr(plain, n)]
    other += [n for n in ("device", "arm", "track") if n in names and n not in [*used, *other]]
    lines = ["@dataclass", "class Config:", '    """Flags; behind them what is fixed."""', ""]
    for name in flags:
        lines += field_lines(name, "" if name == "run" else getattr(cfg, name), fixed=False)
    lines += ["", "    # fixed, and read below"]
    for name in used:
        lines += field_lines(name, getattr(cfg, name), fixed=True)
    lines += ["", "    # fixed: the code below does this; for those who read config.toml"]
    for name in other:
        lines.append(
            f"    {name}: ClassVar[{tg.FIELDS[name].type}] = "
            f"{folding.code_of(folding.literal(getattr(cfg, name)))}"
        )
    lines.append(f"    config: ClassVar[tuple[str, ...]] = {tuple(cfg.config)!r}")
    for table in ("rule", "score"):
        lines.append(f"    {table}: ClassVar[dict] = {getattr(cfg, table)!r}")
    return "\n".join(lines) + "\n"


def limits_of(flags: list[str]) -> str:
    rows = {name: tg.LIMITS[name] for name in tg.FIELDS if name in flags and name in tg.LIMITS}
    return f"LIMITS = {rows!r}  # of a number, or of a schedule's values\n"


def decays_of(cfg: tg.Config, flags: list[str]) -> str:
    """What would do nothing without a decay, as the trainer's OptimConfig.needs() says it."""
    decays = tuple(name for name in ("matrix_wd", "embed_wd", "scalar_wd") if name in flags)
    others = {"matrix_wd", "embed_wd", "scalar_wd"} - set(decays)
    any_other = any(getattr(cfg, name) for name in others)
    any_other = any_other or any(rate.decay for rate in tg.own_rates(cfg))
    of_matrices = {"decay_by_shape": cfg.decay_by_shape, "cautious": cfg.cautious > 1}
    of_all = {"independent_wd": cfg.independent_wd, "cautious": cfg.cautious == 1}
    of_all["weight_decay"] = "weight_decay" in flags or cfg.weight_decay != "1"
    needs = {name: decays for name, on in of_all.items() if on and decays and not any_other}
    if "matrix_wd" in flags:
        needs |= {name: ("matrix_wd",) for name, on in of_matrices.items() if on}
    return f"DECAYS = {needs!r}  # of which one must be above 0\n"


# --- putting it together -----------------------------------------------------------------------


def name_of(statement: cst.BaseStatement) -> str:
    """What a statement of a module defines."""
    if isinstance(statement, cst.ClassDef | cst.FunctionDef):
        return statement.name.value
    one = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
    if isinstance(one, cst.Assign) and isinstance(one.targets[0].target, cst.Name):
        return one.targets[0].target.value
    if isinstance(one, cst.AnnAssign) and isinstance(one.target, cst.Name):
        return one.target.value
    return ""


def prepared(
    module: cst.Module, cfg: tg.Config, facts: folding.Facts, more: str, words: list[str]
) -> cst.Module:
    """The trainer with a script's own configuration in the place of its sections; more: and other
    definitions in the place of its own.
    """
    template = TEMPLATE
    if "schedules" in words:
        template = re.sub(r"in Schedule\(.*\]:", "in [value]:", template)
    template = (template + more).replace("PRESET", "-".join(Path(n).stem for n in cfg.config))
    if not facts.constants["GRAPHS"]:
        template += ONE_GRAPH
    stand_ins = {name_of(s): s for s in cst.parse_module(template).body}
    idle = Idle(idle_functions(cfg, words))
    stand_ins = {name: s.visit(idle) for name, s in stand_ins.items()}
    values = {name: facts.constants[name] for name in ("SCHEDULES", "GRAPHS", "APPLIED")}
    used = set(tg.CODECS) if cfg.export_codec in ("best", tg.ENTROPY) else {cfg.export_codec}
    body: list[cst.BaseStatement] = []
    for statement in module.body:
        name = name_of(statement)
        gone = isinstance(statement, cst.ClassDef) and (
            name == "Config" or any(folding.code_of(b.value) == "Section" for b in statement.bases)
        )
        gone |= name in (
            "Section",
            "SECTIONS",
            "FIELDS",
            "LIMITS",
            "TABLES",
            "TABLE_LIMITS",
            "MOVED",
            "REMOVED",
            "Need",
        )
        gone |= isinstance(statement, cst.SimpleStatementLine) and isinstance(
            statement.body[0], cst.AugAssign
        )
        if gone:
            folding.carry_banner(body, statement)
        elif name in values:
            body.append(
                cst.parse_statement(f"{name} = {values[name]!r}").with_changes(
                    leading_lines=statement.leading_lines
                )
            )
        elif name == "CODECS":
            table = statement.body[0].value
            rows = [e for e in table.elements if e.key.evaluated_value in used]
            body.append(statement.deep_replace(table, table.with_changes(elements=rows)))
        elif name in stand_ins:
            body.append(stand_ins.pop(name).with_changes(leading_lines=statement.leading_lines))
        else:
            body.append(statement)
    at = next(i for i, s in enumerate(body) if name_of(s) == "require_regex")
    stubs = cst.parse_module("class Config:\n    pass\nLIMITS = {}\nDECAYS = {}\n").body
    new = [*stubs, *stand_ins.values()]
    return module.with_changes(body=[*body[: at + 1], *new, *body[at + 1 :]])


def with_wiring(module: cst.Module, cfg: tg.Config) -> cst.Module:
    """The order of the blocks as a plain loop, or as a table of what differs between places."""
    read, code = set(), module.code
    for function in [f for n in ("hidden", "one_pass", "added") for f in find_all(module, n)]:
        read |= read_of(function, "place")
    of_scorer = "places = wiring(model.cfg, " in code  # that of its cache
    if of_scorer:
        (cache,) = (s for s in module.body if name_of(s) == "Cache")
        read |= read_of(cache, "p")
    orders = tg.wirings(cfg)
    (one, *more) = orders.values()
    in_turn = not more and [p.block for p in one] == list(range(cfg.depth)) and not of_scorer
    if in_turn and read <= {"block"}:
        code = re.sub(
            r"for (?:at, place in enumerate\(places\)|place in places):",
            "for block in self.blocks:",
            code,
        )
        code = code.replace("block = self.blocks[place.block]\n", "pass\n")
        code = re.sub(r"block, (\w+) = self.blocks\[place.block\], ", r"\1 = ", code)
        code = re.sub(r"places = self.places.get\(.*\n", "pass\n", code)
        code = code.replace("self.places = wirings(cfg)\n", "pass\n")
        return cst.parse_module(code)
    fields = [name for name in tg.Place._fields if name in read]
    gone = "|".join(name for name in tg.Place._fields if name not in read)
    start, behind = code.split("class Place(NamedTuple):\n", 1)
    body, end = behind.split("\n\n\n", 1)
    body = re.sub(rf"^    (?:{gone or '-'}): .*\n?", "", body, flags=re.MULTILINE)
    code = f"{start}class Place(NamedTuple):\n{body}\n\n\n{end}"
    rows = []
    for repeats, places in orders.items():
        rows.append(f"    {repeats}: [")
        for place in places:
            values = ", ".join(f"{name}={getattr(place, name)!r}" for name in fields)
            rows.append(f"        Place({values}),")
        rows.append("    ],")
    table = "\n".join(["PLACES = {  # by repeats", *rows, "}", "", ""])
    (function,) = find_all(module, "hidden")
    key = "repeats" if "repeats" in folding.names_in(function.params).bound else min(orders)
    code = re.sub(r"places = self.places.get\(.*\n", f"places = PLACES[{key}]\n", code)
    code = re.sub(r"places = wiring\(model.cfg, (.*)\)\n", r"places = PLACES[\1]\n", code)
    code = code.replace("self.places = wirings(cfg)\n", "pass\n")
    code = re.sub(r"\n\n\ndef wiring\(", f"\n\n\n{table}\n\ndef wiring(", code, count=1)
    return cst.parse_module(code)


def read_of(node: cst.CSTNode, name: str) -> set[str]:
    """The attributes that are read of what a name holds."""
    found = folding.find_all(node, cst.Attribute)
    return {n.attr.value for n in found if m.matches(n.value, m.Name(name))}


def find_all(module: cst.Module, name: str) -> list[cst.FunctionDef]:
    return [f for f in folding.find_all(module, cst.FunctionDef) if f.name.value == name]


def identifiers(module: cst.Module) -> set[str]:
    """Every name that a source makes or reads."""
    names = folding.names_in(module)
    return {*names.read, *names.attributes, *names.bound}


def told_without(text: str, gone: set[str], lost: set[str]) -> str:
    """
    A comment or docstring without the sentences that speak of names that are `gone`.
    A word of plain English is such a name where it is called; lost: what a sentence begins with
    that explains it, such as parameters that the function itself does not have any more.
    """
    words = "|".join(map(re.escape, gone))
    clear = "|".join(re.escape(name) for name in gone if "_" in name)
    spoken = re.compile(rf"(?<![-\w])(?:(?:{clear})\b|(?:{words})\(\))")
    sentences = re.split(r"(?<=[.])\s+(?=[A-Za-z`])", " ".join(text.split()))
    one = rf"`?(?:{'|'.join(map(re.escape, lost)) or '-'})`?"
    explained = re.compile(rf"{one}(?:, {one})*(?: > 0)?: ")
    return " ".join(s for s in sentences if not spoken.search(s) and not explained.match(s))


class Retelling(cst.CSTTransformer):
    """Docstrings and comments that do not speak of what is gone."""

    def __init__(self, gone: set[str], params: dict[str, set[str]], other: set[str]):
        super().__init__()
        self.gone, self.depth = gone, 0
        self.other = other  # names of fields that are gone, and values that fields might have
        self.params = params  # of each function, as they were
        self.lost: list[set[str]] = [set()]

    def visit_FunctionDef(self, node):
        left = folding.names_in(node.params).bound
        self.lost.append({p for p in self.params.get(node.name.value, ()) if not left[p]})

    def leave_FunctionDef(self, old, new):
        self.lost.pop()
        return new

    def visit_IndentedBlock(self, node):
        self.depth += 1

    def told(self, text: str) -> str:
        return told_without(text, self.gone, self.lost[-1] | self.other)

    def leave_IndentedBlock(self, old, new):
        indent = "    " * self.depth
        self.depth -= 1
        if not new.body or not folding.is_doc(new.body[0]):
            return new
        text = new.body[0].body[0].value.value
        if not text.startswith('"""'):
            return new
        whole = " ".join(text.strip('"').split())
        left = self.told(whole) or re.split(r"(?<=[.])\s", whole)[0]
        if left == whole:
            return new
        one = f'"""{left}"""'
        if len(indent) + len(one) > 100:
            lines = textwrap.wrap(left, 100, initial_indent=indent, subsequent_indent=indent)
            one = "\n".join(['"""', *lines, indent + '"""'])
        doc = cst.SimpleStatementLine([cst.Expr(cst.SimpleString(one))])
        return new.with_changes(body=[doc, *new.body[1:]])

    def leave_TrailingWhitespace(self, old, new):
        if not new.comment or self.told(new.comment.value[2:]):
            return new
        return new.with_changes(comment=None, whitespace=cst.SimpleWhitespace(""))

    def on_leave(self, old, new):
        new = super().on_leave(old, new)
        lines = getattr(new, "leading_lines", ())
        text = " ".join(line.comment.value[2:] for line in lines if line.comment)
        if not text or "####" in text or self.told(text):
            return new
        return new.with_changes(leading_lines=[line for line in lines if not line.comment])


# constants that a person may edit, as no code was folded by them
EDITED = {"micro_tokens", "loss_chunk"}


class Advice(cst.CSTTransformer):
    """
    Messages that say what to do about flags which the script has not: that takes another script,
    or the trainer itself; what is a mere number is a constant that a person edits.
    """

    def __init__(self, flags: list[str], constants: set[str]):
        super().__init__()
        self.flags, self.constants = flags, constants & EDITED

    def said(self, text: str) -> str:
        def instead(match: re.Match) -> str:
            name = match[1]
            if name not in tg.FIELDS or name in self.flags:
                return match[0]
            return f"Config.{name}" if name in self.constants else f"train_gpt.py's --{name}"

        # what data/get.py is told to do keeps its own flags
        return re.sub(r"(?<!sample )(?<!tokenize )--([a-z_0-9]+)", instead, text)

    def leave_SimpleString(self, old, new):
        return new.with_changes(value=self.said(new.value))

    def leave_FormattedStringText(self, old, new):
        return new.with_changes(value=self.said(new.value))


def within(code: str, width: int) -> str:
    """Lines that hold nothing but a text, and are too long, as two texts behind one another."""
    lines = []
    for line in code.split("\n"):
        one = re.fullmatch(r"""( +f?)(["'])(.*)(\2[,)]*)""", line)
        while one and len(line) > width:
            first, quote, text, last = one.groups()
            spaces = [m.end() for m in re.finditer(" ", text)]
            # not inside of what is formatted
            fit = [at for at in spaces if text[:at].count("{") == text[:at].count("}")]
            at = max((at for at in fit if len(first) + 2 + at <= width), default=0)
            if not at:
                break
            halves = text[:at], text[at:]
            starts = [first if "{" in half else first.rstrip("f") for half in halves]
            lines.append(starts[0] + quote + halves[0] + quote)
            line = starts[1] + quote + halves[1] + last
            one = re.fullmatch(r"""( +f?)(["'])(.*)(\2[,)]*)""", line)
        lines.append(line)
    return "\n".join(lines)


def other_choices(cfg: tg.Config) -> set[str]:
    """Words that a field might have been, and is not."""
    found: set[str] = set()
    for part in tg.SECTIONS:
        for name, words in part.CHOICES.items():
            found |= {word for word in words if word.isidentifier() and word != getattr(cfg, name)}
    return found


def parameters_of(module: cst.Module) -> dict[str, set[str]]:
    """Of each function of this name, what it is given."""
    found: dict[str, set[str]] = {}
    for function in folding.find_all(module, cst.FunctionDef):
        bound = set(folding.names_in(function.params).bound)
        found[function.name.value] = found.get(function.name.value, set()) | bound
    return found


def header(cfg: tg.Config, request: Request) -> str:
    """The docstring: where the script comes from, and what the preset's file says of itself."""
    lines = []
    for name in cfg.config:
        text = tg.preset_path(name).read_text(encoding="utf-8")
        comment = [line[2:] for line in text.splitlines() if line.startswith("# ")]
        lines += [f for row in comment for f in textwrap.wrap(row, 98)]
    options = [f"--without {' '.join(request.without)}"] if request.without else []
    if request.keep_given:
        options.append(f"--keep {shlex.quote(' '.join(request.keep))}")
    command = " ".join(["python logs/script.py", shlex.join(request.argv[1:]), *options])
    return "\n".join(
        [
            '"""',
            *lines,
            "",
            *textwrap.wrap(
                f"origin: nanoremix {revision()}, train_gpt.py as `{command}` prints it: "
                "what the preset leaves off is gone from the code, what it fixes is a "
                "constant of Config.",
                98,
            ),
            "",
            "Letters: B batch, T time, D width, H heads, K head_dim, V vocabulary, N = B*T tokens.",
            "A tensor whose layout is not obvious has it as a suffix (q_BTHK). Losses are nats per",
            "token, sizes decimal bytes.",
            '"""',
            "",
        ]
    )


def revision() -> str:
    return tg.git_revision()[:12] or "outside its repository"


def formatted(code: str) -> str:
    """By ruff, as the project's own files are: imports that nobody uses any more go as well."""
    settings = ["--config", str(ROOT / "pyproject.toml"), "--stdin-filename", "script.py", "-"]
    for command in (["check", "--fix-only", "--quiet"], ["format", "--quiet"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *settings],
            input=code,
            capture_output=True,
            text=True,
        )
        require(done.returncode == 0, f"ruff {command[0]}: {done.stderr.strip()[:300]}")
        code = done.stdout
    return code


def findings(code: str, *options: str) -> str:
    """What ruff finds in a script, by the project's rules or by other options; empty: nothing."""
    rules = options or ("--config", str(ROOT / "pyproject.toml"), "--stdin-filename", "script.py")
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "--quiet"]
    done = subprocess.run([*command, *rules, "-"], input=code, capture_output=True, text=True)
    return done.stdout + done.stderr


def check_names(code: str) -> None:
    """Nothing is read that folding has taken away."""
    lost = findings(code, "--isolated", "--select", "F821")
    assert not lost, f"the script lacks what it needs: {lost[:300]}"


def script_of(request: Request, say: Callable[[str], None] = lambda line: None) -> str:
    """The script as text."""
    cfg = configure(request)
    facts = facts_of(cfg, request.keep, request.without)
    facts.expressions |= of_graphs(cfg)
    for line in tg.pattern_notices(cfg, weightless(cfg)):
        print(f"notice: {line}", file=sys.stderr)
    facts.expressions["pattern_notices(cfg, model)"] = []
    return text_of(cfg, request, facts, tables_of(cfg), say=say)


def weightless(cfg: tg.Config) -> tg.GPT:
    """A model that has shapes and declarations, and no memory."""
    with torch.device("meta"):
        return tg.GPT(cfg, torch.float32)


def text_of(
    cfg: tg.Config,
    request: Request,
    facts: folding.Facts,
    more: str = "",
    beside: Callable[[cst.Module], cst.Module] = lambda module: module,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """The trainer folded; more: definitions in the place of its own; beside: puts others to it."""
    source = Path(tg.__file__).read_text(encoding="utf-8")
    if "schedules" in request.without:
        source = scheduled(source, cfg)
    declared = tg.declarations(weightless(cfg)).values()
    for group in {"embed", "head", "scalar"} - {said.group for said in declared}:
        source = re.sub(rf'\n        "{group}": \(.*_lr.*\),(?=\n)', "", source, count=1)
    if "torch.compiler.is_compiling()" in facts.expressions:
        source = re.sub(r"compiled_on_gpu\((attend_flex|block_mask), q\)", r"\1", source)
    parts = [DROPPED[word].instead for word in request.without]
    tree = parsed(source).visit(Idle(idle_functions(cfg, request.without)))
    module = beside(prepared(tree, cfg, facts, "\n".join([more, *parts]), request.without))
    before = identifiers(module)
    module = folding.fold(module, facts, say)
    module = folding.fold(with_wiring(module, cfg), facts, say)
    gone = (identifiers(parsed(source)) | before) - identifiers(module)
    other = (gone & set(tg.FIELDS)) | other_choices(cfg)
    module = module.visit(Retelling(gone, parameters_of(tree), other))
    read = folding.fields_read(module) | set(facts.constants["SCHEDULES"])
    flags = [n for n in tg.FIELDS if n in request.keep and (n in read or n in KEPT[:5])]
    varying = set(facts.constants["SCHEDULES"]) - set(flags)
    text = config_class(cfg, flags, (read | varying) - set(flags))
    module = module.visit(Advice(flags, read))
    module = folding.replaced(module, "Config", text)
    module = folding.replaced(module, "LIMITS", limits_of(flags))
    module = folding.replaced(module, "DECAYS", decays_of(cfg, flags))
    code = module.code
    body = code[code.index('"""', 3) + 3 :] if code.startswith('"""') else code
    text = within(formatted(header(cfg, request) + body), 100)
    check_names(text)
    said = "of the section Model, the net that logs/score.py applies"
    text = text.replace(
        "\nLetters: ", f"\nnet: sha256 {score.net_mark(text)} {said}\n\nLetters: ", 1
    )
    return text


def main(argv: list[str] | None = None) -> int:
    def work() -> None:
        request = read_request(sys.argv[1:] if argv is None else argv)
        code = script_of(request)
        if request.out:
            out = Path(request.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(out) as file:
                file.write(code.encode())
        else:
            sys.stdout.write(code)

    return ending("script.py", work)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of what the console lacks
    sys.exit(main())
