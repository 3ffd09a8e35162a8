"""
A golf preset as one module: its script (logs/script.py), and behind it what its score needs of
logs/score.py, both folded together under the preset and its [score] table.

Modes that the table does not name, settings that it fixes, samples, ensembles, averages of epochs
and studies of artifacts are gone, and so is what a golf run may not do (go on after a stop) or does
not need (wandb). `train_gpt.py logs.score RUN` scores, proves and decodes as logs/score.py does.
Where the table names no mode, the trainer's own figure is the score, and there is no scorer.
"""

import dataclasses

import libcst as cst
import libcst.matchers as m

from logs import folding, score, script

GONE = ("resume", "wandb")  # as --without says it: timed tracks take runs in one piece
# flags of the trainer that the scorer sets for itself
OWN = ("device", "compile", "dtype", "tokenizer")
# of the scorer: what the trainer has a name for too, and what stands in its place here
DROPPED = {"main", "check", "Table", "Export", "Sample", "token_losses", "ROOT", "Settings"}

ALONE = '''

def source_files(cfg: Config) -> list[Path]:
    """This file is all that runs and is counted."""
    return [Path(__file__).resolve()]
'''

FOR_TRAINER = '''

def open_source(where: str, exact: bool = False) -> tuple[Config, dict[str, Tensor], Path]:
    """Config and weights of an artifact, or of that in a run folder."""
    path = Path(where) / "model.nrx" if Path(where).is_dir() else Path(where)
    cfg, named = load_artifact(path)
    return found_near(cfg, path), named, path


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        words = sys.argv[1:] if argv is None else argv
        if words[:1] == ["logs.score"]:
            return program(words[1:])
        cfg = parse_args(words)
        with Run(cfg) as run:
            return train(cfg, run)

    return exit_code(work)
'''

FOR_SCORER = '''
@dataclass
class OneScore:
    """The settings are those of the preset's table."""

    mode: str = "MODE"


def make_scorer(
    model: GPT, how: OneScore, shape: Shape, run: Ranks | None = None
) -> Sliding:
    """The scorer of how.mode; shape: of its windows; run: for several ranks."""
    return SCORERS[how.mode](model, how, shape, run)


@dataclass
class Source:
    """Which weights, on which text, on which machine."""

    source: Annotated[str, tyro.conf.Positional]  # run folder, checkpoint folder or artifact
    data: str = ""  # folder of the shards; empty: the run's own
    device: str = "auto"  # auto, cpu or cuda


@dataclass
class Phase(Source):
    """Scores, and a proof."""

    prove_bytes: int = PROVE_BYTES  # validation text to encode and decode; 0: none


def phase(argv: list[str]) -> int:
    """The exit code of the scores of the run folder, checkpoint or artifact argv[0]."""
    flags = tyro.cli(Phase, args=argv, prog="score.py", use_underscores=True)
    subject = opened(flags, compiled=True)
    with subject.run as run:
        try:
            run.on_main(lambda: begin(subject, flags))
            take_figures(subject, flags)
        except Interrupted:  # in here, where the log is still open
            name = signal.Signals(run.signal).name
            run.log(f"interrupted by {name}: what was taken is kept; start again to go on")
            return 128 + run.signal
    return 0


def take_figures(subject: Subject, flags: Phase) -> None:
    """Every figure that was asked for, each written as soon as it is there. Collective."""
    figures = Figures(subject)
    for mode in MODES:
        how = OneScore(mode=mode)
        figures.take(label(how), lambda how=how: one_score(subject, how))
    if flags.prove_bytes:
        name = f"proof {label(how)} bytes={flags.prove_bytes}"
        figures.take(name, lambda: one_proof(subject, how, flags))


VERBS = {"prove": (Prove, prove_command), "decode": (Decode, decode_command)}
'''

# where the table names one mode
ONE_MODE = '''
@dataclass
class OneScore:
    """The settings are those of the preset's table."""


def make_scorer(
    model: GPT, how: OneScore, shape: Shape, run: Ranks | None = None
) -> Sliding:
    """shape: of its windows; run: for several ranks."""
    return KIND(model, how, shape, run)


def take_figures(subject: Subject, flags: Phase) -> None:
    """Every figure that was asked for, each written as soon as it is there. Collective."""
    figures = Figures(subject)
    how = OneScore()
    figures.take("LABEL", lambda: one_score(subject, how))
    if flags.prove_bytes:
        name = f"proof LABEL bytes={flags.prove_bytes}"
        figures.take(name, lambda: one_proof(subject, how, flags))
'''

# expressions of the scorer by what they hold or call
CALLED_AS = {
    "subject": "Subject",
    "scorer": "Sliding",
    "figures": "Figures",
    "cache": "Cache",
    "ngrams": "NGrams",
}


def asked_of(cfg: script.tg.Config) -> score.Phase:
    """What a preset's [score] table asks for; UserError where that could not be given."""
    table = {k: v for k, v in cfg.score.items() if k in {f.name for f in fields_of(score.Phase)}}
    asked = score.Phase(source="", **table)
    score.check(asked)
    where = " ".join(cfg.config)
    scored = bool(cfg.export) or not asked.modes
    script.require(scored, f"{where}: export is empty: there is no artifact to score")
    training = set(asked.modes.split()) & {"ttt", "lora"}  # a proof of theirs sets its own chunks
    why = f"{where}: modes = {asked.modes!r} train on what they score: leave --preset out"
    script.require(not training, why)
    if asked.canonical or asked.prove_bytes:
        script.require(bool(cfg.tokenizer), f"{where}: its [score] table needs a tokenizer")
    return asked


def fixed_of(asked: score.Phase) -> dict[str, object]:
    """What the scorer's settings are fixed to."""
    modes, found = asked.modes.split(), {"rows": 0, "val_tokens": -1}
    found |= {f.name: getattr(asked, f.name) for f in fields_of(score.Settings)}
    return found | ({"mode": modes[0]} if len(modes) == 1 else {})


def fields_of(kind: type) -> tuple:
    return dataclasses.fields(kind)


class Fixing(cst.CSTTransformer):
    """Settings as constants, and the trainer's names without its module's."""

    def __init__(self, fixed: dict[str, object]):
        super().__init__()
        self.fixed = fixed

    def leave_Attribute(self, old, new):
        if m.matches(new.value, m.Name("tg")):
            return new.attr
        holder = m.Name("how") | m.Name("flags") | m.Attribute(attr=m.Name("how"))
        if new.attr.value in self.fixed and m.matches(new.value, holder):
            return folding.as_operand(folding.literal(self.fixed[new.attr.value]))
        return new


def statements(text: str) -> dict[str, cst.BaseStatement]:
    return {script.name_of(s): s for s in cst.parse_module(text).body}


def stand_ins(asked: score.Phase) -> dict[str, cst.BaseStatement]:
    """What takes the place of the scorer's own command line and settings."""
    modes, text = asked.modes.split(), FOR_SCORER.replace("PROVE_BYTES", repr(asked.prove_bytes))
    found = statements(text.replace('"MODE"', repr(modes[-1])).replace("MODES", repr(modes)))
    if len(modes) == 1:
        settings = {f.name: getattr(asked, f.name) for f in fields_of(score.Settings)}
        label = score.label(score.OneScore(mode=modes[0], **settings))
        text = ONE_MODE.replace("KIND", score.SCORERS[modes[0]].__name__).replace("LABEL", label)
        found |= statements(text)
    return found


def without_new(body: list[cst.BaseStatement], known: set[str]) -> list[cst.BaseStatement]:
    """Imports of a body, one name each, of what is not imported yet."""
    found = []
    for statement in body:
        one = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
        if not isinstance(one, cst.Import | cst.ImportFrom) or isinstance(
            one.names, cst.ImportStar
        ):
            continue
        for alias in one.names:
            name = folding.code_of(alias.asname.name if alias.asname else alias.name)
            if name not in known:
                known.add(name)
                alone = alias.with_changes(comma=cst.MaybeSentinel.DEFAULT)
                plain = one.with_changes(names=[alone])
                if isinstance(one, cst.ImportFrom):
                    plain = plain.with_changes(lpar=None, rpar=None)
                found.append(cst.SimpleStatementLine([plain]))
    return found


def is_import(statement: cst.BaseStatement) -> bool:
    return m.matches(statement, m.SimpleStatementLine([m.Import() | m.ImportFrom()]))


def is_start(statement: cst.BaseStatement) -> bool:
    """`if __name__ == "__main__":`"""
    return isinstance(statement, cst.If) and "__name__" in folding.code_of(statement.test)


def is_pair(statement: cst.BaseStatement) -> bool:
    """`A, B = 1, 2`"""
    target = m.AssignTarget(m.Tuple())
    return m.matches(statement, m.SimpleStatementLine([m.Assign([target])]))


def merged(module: cst.Module, asked: score.Phase) -> cst.Module:
    """The trainer's module with the scorer behind it."""
    scorer = script.parsed_scorer().visit(Fixing(fixed_of(asked)))
    own = stand_ins(asked)
    known: set[str] = {"tg", "Config", "UserError"}
    without_new([s for s in module.body if is_import(s)], known)
    imports = without_new(scorer.body, known)
    new: list[cst.BaseStatement] = []
    for statement in scorer.body:
        name = script.name_of(statement)
        if name in own:
            new.append(own.pop(name).with_changes(leading_lines=statement.leading_lines))
        elif name and name not in DROPPED or is_pair(statement):
            new.append(statement)
    new += own.values()
    starts = [s for s in module.body if is_start(s)]
    body = [s for s in module.body if not is_start(s)]
    both = {script.name_of(s) for s in body} & {script.name_of(s) for s in new} - {""}
    assert not both, f"the trainer and its scorer each define {', '.join(both)}"
    at = max(i for i, s in enumerate(body) if is_import(s)) + 1
    return module.with_changes(body=[*body[:at], *imports, *body[at:], *new, *starts])


def program_of(request: script.Request) -> str:
    """The text of the one module, as a person reads it."""
    cfg = script.configure(request)
    for part in GONE:
        for name, value in script.DROPPED[part].fields.items():
            setattr(cfg, name, value)
    gone = {name for part in GONE for name in script.DROPPED[part].fields}
    keep = [name for name in [*request.keep, *OWN] if name not in gone]
    asked = asked_of(cfg)
    facts = script.facts_of(cfg, keep, [])
    facts.called_as |= CALLED_AS
    del facts.called_as["mask"]  # the scorer's Cache stands in its place, too
    facts.aliases |= {"Subject"}
    facts.constants |= {"RESULT": score.RESULT}
    facts.expressions['Path(__file__).name == "score.py"'] = False
    request = dataclasses.replace(request, keep=keep)
    if not asked.modes.split():  # what the trainer measures is the score
        return script.text_of(cfg, request, facts, ALONE)
    return script.text_of(
        cfg, request, facts, ALONE + FOR_TRAINER, lambda tree: merged(tree, asked)
    )
