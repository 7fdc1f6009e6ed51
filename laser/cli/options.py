"""The options that several verbs take: each is declared once, in a group, and a verb gets the group as one object.

def scan(model: Model, *, which: Matrices, ...) has the options --layers, --roles, --include and --exclude, and finds
them in `which`, which makes a Selection of them. What a method needs it imports itself: for help nothing is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from laser.choices import ACCEPT, DEVICES, ROLES, WINDOW
from laser.cli import common
from laser.cli.complete import one_of, several_of
from laser.cli.recipe import configure
from laser.errors import OutputError, UsageError
from laser.evaluation.lm_tasks import TASKS
from laser.evaluation.rows import holds_rows
from laser.files import require_no_mount
from laser.spectral.rules import RULES
from laser.spectral.shrinkage import SHRINKERS

if TYPE_CHECKING:
    from laser.checkpoint.reader import Checkpoint
    from laser.differences.base import Base
    from laser.engine.crew import Crew
    from laser.evaluation import text as texts
    from laser.moments import Moments
    from laser.parts import PartOfRun
    from laser.selection import Selection
    from laser.spectral.devices import Device


def option(default: Any, help: str, *names: str, recipe: Any = None, **more: Any) -> Any:
    """A field of a group: an option of the field's own name, or of these.

    recipe: what a recipe may hold for it, where that is no value of the field's type.
    """
    return field(default=default, metadata={"declared": (typer.Option(*names, help=help, **more), recipe)})


def declared(group: type[Any]) -> list[inspect.Parameter]:
    """The options of a group as typer reads them; help lists them under the group's title, if it has one."""
    for f in fields(group):
        f.metadata["declared"][0].rich_help_panel = getattr(group, "title", None)
    types, kind = get_type_hints(group), inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(f.name, kind, default=f.default, annotation=Annotated[types[f.name], *f.metadata["declared"]])
        for f in fields(group)
    ]


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as the command line calls it: with the options of its groups, the parameters that are dataclasses.

    And with --config, which every verb has. Raises ValueError for an option that it has twice.
    """
    groups: dict[str, type[Any]] = {}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb, eval_str=True).parameters.items():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[name] = group
            options += declared(group)
        else:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    options.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config))
    flags = {parameter.name: flag for parameter in options if (flag := _flag(parameter))}

    @wraps(verb)
    def call(**given: Any) -> None:
        common.called_with({flag: given[name] for name, flag in flags.items()})
        del given["config"]
        objects = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        verb(**given, **objects)

    call.__signature__ = inspect.Signature(options)  # pyright: ignore[reportAttributeAccessIssue]
    return call


def _flag(parameter: inspect.Parameter) -> str | None:
    """An option's name on the command line, without its dashes; None for an argument."""
    for declared in get_args(parameter.annotation):
        if isinstance(declared, OptionInfo):
            given = (declared.default, *(declared.param_decls or ()))  # typer takes the first name for a default
            words = [word.partition("/")[0] for word in given if isinstance(word, str) and word.startswith("--")]
            return words[0].removeprefix("--") if words else parameter.name.replace("_", "-")
    return None


# --- arguments, and options that stand alone --------------------------------------------------------------------------

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint directory, Hub id org/name[@revision], or BASE+ADAPTER.")
]
BaseModel = Annotated[
    str, typer.Argument(metavar="BASE", help="The base: checkpoint directory, or a Hub id, org/name[@revision].")
]
Original = Annotated[
    str, typer.Argument(metavar="ORIGINAL", help="The model: checkpoint directory, or a Hub id, org/name[@revision].")
]
Copy = Annotated[
    str, typer.Argument(metavar="COPY", help="What was made of it: quantised, pruned or reduced, likewise.")
]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tune of it, likewise.")]
SpectraFile = Annotated[Path, typer.Argument(metavar="SPECTRA", help="File written by laser scan.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory written by laser reduce or laser run.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", is_eager=True, callback=configure, metavar="FILE", help="Options as YAML or TOML: option: value."
    ),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="The file or directory to write.")]
SpectraOut = Annotated[Path | None, typer.Option("-o", "--output", help="The spectra file to write.")]
Scanned = Annotated[
    Path | None, typer.Option("--spectra", help="File of laser scan: show the model's own spectra, too.")
]
NullDraws = Annotated[int, typer.Option("--null", help="Permutations to measure, for the rule parallel.")]
SOURCES = {name: rule.source for name, rule in RULES.items()}
a_rule = one_of(SOURCES)
ShownRule = Annotated[
    str | None,
    typer.Option(
        "--rule", help="Whose cut is shown; default: mp-edge, of differences rounding.", autocompletion=a_rule
    ),
]
DEVICE_NAMES = f"{', '.join(DEVICES[:-1])} or {DEVICES[-1]}"
_LAYER_BY_LAYER = "One layer's weights in memory at a time; default: as many as fit."
Stream = Annotated[bool | None, typer.Option("--stream/--no-stream", help=_LAYER_BY_LAYER)]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32 or bfloat16, for weights and activations.",
        autocompletion=one_of(("float32", "bfloat16")),
    ),
]


# --- groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrices:
    """Which matrices."""

    title: ClassVar = "Which matrices"
    layers: str | None = option(None, "Only these layers; of another stack: mtp:0, encoder:all.", metavar="0,4,20-31")
    roles: str | None = option(
        None, "Only these roles; gate, down, up are w1, w2, w3.", metavar="w1,w2,q", autocompletion=several_of(ROLES)
    )
    include: str | None = option(None, "Only tensors whose name matches this expression.", metavar="REGEX")
    exclude: str | None = option(None, "No tensor whose name matches this expression.", metavar="REGEX")

    def selection(self) -> Selection:
        from laser.selection import Selection, parse_layers, parse_roles

        return Selection(parse_layers(self.layers), parse_roles(self.roles), self.include, self.exclude)


@dataclass(frozen=True)
class OneDevice:
    """Where a verb computes that takes one device."""

    title: ClassVar = "Where and how it computes"
    device: str = option("auto", f"{DEVICE_NAMES}.", autocompletion=one_of(DEVICES))

    def choose(self) -> Device:
        from laser.spectral.devices import choose_device

        return choose_device(self.device)


@dataclass(frozen=True)
class Precise(OneDevice):
    """And in which precision."""

    precision: str = option("auto", "auto, float64 or float32.", autocompletion=one_of(("auto", "float64", "float32")))

    def choose(self) -> Device:
        from laser.spectral.devices import choose_device
        from laser.spectral.measuring import chosen_routes

        found = choose_device(self.device, self.precision)
        return replace(found, routes=chosen_routes(found))


@dataclass(frozen=True)
class ComputeOptions(Precise):
    """Where and how a verb computes that visits matrix after matrix, on all the devices that it is given."""

    device: str = option(
        "auto",
        f"{DEVICE_NAMES}; several: cuda:0,cuda:1, or all, two workers each.",
        autocompletion=one_of((*DEVICES, "all")),
    )
    workers: int | None = option(None, "On the cpu, one thread each; default: as cores and memory allow.")
    engine: str = option(
        "threads",
        "threads (here), ray, or ray://HOST:PORT (pip install 'laser-rmt[ray]').",
        autocompletion=one_of(("threads", "ray")),
    )
    method: str = option(
        "auto",
        "auto, gram (fast), projector (products alone) or svd (reference).",
        autocompletion=one_of(("auto", "gram", "projector", "svd")),
    )

    def crew(self) -> Crew:
        from laser.engine.workers import choose_crew

        return choose_crew(self.device, self.precision, workers=self.workers, engine=self.engine)

    def truncating(self, crew: Crew) -> str:
        """The method by which these workers truncate."""
        from laser.spectral.measuring import choose_method

        return choose_method(self.method, crew.devices[0])[0]


@dataclass(frozen=True)
class Inputs:
    """By the inputs of which text."""

    title: ClassVar = "By the data"
    moments: Path | None = option(
        None, "Moments file of laser calibrate: also go by its inputs x, in the metric E||W x||^2."
    )

    def load(self) -> Moments | None:
        from laser.moments import Moments

        return None if self.moments is None else Moments.load(self.moments)


@dataclass(frozen=True)
class FromBase:
    """Of a fine-tune: from which base."""

    base: str | None = option(
        None, "Go by the differences from this model: a checkpoint directory or a Hub id. MODEL is its fine-tune."
    )

    def of(self, tuned: Checkpoint) -> Base | None:
        """The base that the tuned checkpoint is compared with, if one was named."""
        from laser.differences.base import Base
        from laser.differences.opened import open_model

        return None if self.base is None else Base.of(open_model(self.base), tuned)


@dataclass(frozen=True)
class RuleOptions:
    """By which rule a matrix is cut, and how."""

    title: ClassVar = "By which rule"
    rule: str | None = option(
        None,
        f"One of {', '.join(RULES)}; data:NAME: by what the outputs lose.",
        metavar="NAME[:ARGUMENT]",
        autocompletion=a_rule,
    )
    shrink: str | None = option(
        None, f"Shrink what is kept: {', '.join(SHRINKERS)} loss.", autocompletion=one_of(SHRINKERS.keys())
    )
    two_sided: bool = option(False, "Keep what lies under the noise's lower edge as well.", "--two-sided")
    require_fit: float | None = option(
        None,
        "Leave a matrix whole if its bulk is rejected as noise at this level (p-value of the fit below P; try 0.05).",
        metavar="P",
    )

    def treatment(self) -> dict[str, Any]:
        """What a Treatment takes beside its rule."""
        return {"shrink": self.shrink, "two_sided": self.two_sided, "require_fit": self.require_fit}


@dataclass(frozen=True)
class Lowest:
    """How many matrices."""

    title: ClassVar = "By which rule"
    lowest_snr: str | None = option(
        None,
        "Only the K matrices of lowest SNR, or all. Default of a search: 15, as LaserRMT does.",
        metavar="K",
        recipe=int | Literal["all"],
        autocompletion=one_of(("all",)),
    )

    def count(self, otherwise: int | None = None) -> int | None:
        """K; None for all of them. Raises UsageError."""
        from laser.plan import parse_lowest_snr

        return parse_lowest_snr(self.lowest_snr, otherwise)


@dataclass(frozen=True)
class Trials:
    """How a search decides."""

    title: ClassVar = "How a search decides"
    accept: str = option(
        "better", f"Which edits a search keeps: {', '.join(ACCEPT)}.", autocompletion=one_of(ACCEPT.keys())
    )
    order: str = option(
        "layers",
        "Of a search: layers (last first, fast) or snr (as published).",
        autocompletion=one_of(("layers", "snr")),
    )
    racing: bool = option(False, "End a trial that a quarter of the windows shows to be worse.", "--racing")


@dataclass(frozen=True)
class TextOptions:
    """What is read to measure a model on, in windows of how many tokens."""

    title: ClassVar = "On which text"
    text: Path | None = option(None, "A .txt, .jsonl or .json file; default: Python's pydoc topics.")
    field: str | None = option(None, "The field of a .jsonl or .json file, or of a dataset.")
    window: int = option(WINDOW, "Tokens per window, BOS included.")


@dataclass(frozen=True)
class Dataset:
    """What is read instead of a file."""

    title: ClassVar = "On which text"
    dataset: str | None = option(None, "Through the library `datasets`; split: test.", metavar="NAME[,CONFIG[,SPLIT]]")


@dataclass(frozen=True)
class WindowOptions(Dataset, TextOptions):
    """One text, and its windows from the front."""

    windows: int = option(32, "How many windows, from the front; 0: all.")
    skip: int = option(0, "Leave out the first N windows.")

    def check(self, mode: str = "windows") -> None:
        from laser.evaluation import text as texts

        texts.check_cut(self.window, self.windows or None, self.skip, mode)

    def read(self) -> texts.Text:
        return text_of(self.text, self.field, self.dataset)

    def cut(self, text: texts.Text, checkpoint: Checkpoint, **how: Any) -> texts.Windows:
        from laser.evaluation import text as texts

        tokenizer, most = texts.load_tokenizer(checkpoint.path), self.windows or None
        return texts.cut_windows(text, tokenizer, length=self.window, limit=most, skip=self.skip, **how)


@dataclass(frozen=True)
class SearchText(TextOptions):
    """The text that a search calibrates on, and what it reports on."""

    held_out: Path | None = option(None, "Text to report on; default: what follows the calibration.")
    windows: int = option(16, "Calibration windows of a search, or questions of its task; 0: all.")
    held_out_windows: int = option(16, "Windows to report on; 0: all.")

    def read(self, dataset: str | None = None) -> tuple[texts.Text, texts.Text | None]:
        """Both, the second None where it is the first; --field is for those that hold rows."""
        path, other = self.text, self.held_out
        reported = None if other is None else text_of(other, self.field if holds_rows(other) else None, None)
        used = other is not None and holds_rows(other) and dataset is None and not (path and holds_rows(path))
        return text_of(path, None if used else self.field, dataset), reported


@dataclass(frozen=True)
class Rows:
    """On which rows of which tasks a leaderboard rests."""

    title: ClassVar = "On which tasks"
    tasks: str | None = option(
        None, f"Only these, of {', '.join(TASKS)}.", metavar="TASK,TASK", autocompletion=several_of(TASKS.keys())
    )
    limit: int | None = option(None, "Only the first N rows of each task or subject.")
    data: Path | None = option(None, "Folder of rows in JSON lines, for machines without the Hub.")

    def request(self) -> dict[str, Any]:
        """As laser.evaluation.leaderboard takes them; tasks: None for all."""
        named = None if self.tasks is None else tuple(t for t in self.tasks.replace(" ", "").split(",") if t)
        return {"tasks": named, "limit": self.limit, "data": self.data}


@dataclass(frozen=True)
class PartOption:
    """Which share of the work is this process's."""

    title: ClassVar = "What is written, and how"
    part: str | None = option(
        None,
        "Only the I-th of N parts, for machines that share a disk; whoever ends last makes the whole.",
        metavar="I/N",
    )

    def chosen(self, work: WorkOptions | Directory) -> PartOfRun | None:
        """Raises UsageError for what is no part, and for what only an undivided run can do."""
        from laser.parts import PartOfRun

        if self.part is None:
            return None
        if work.force or work.dry_run:
            raise UsageError(f"--{'force' if work.force else 'dry-run'} is for the whole; try it without --part")
        return PartOfRun.parse(self.part)


@dataclass(frozen=True)
class Json:
    """How a verb prints what it found."""

    title: ClassVar = "What is written, and how"
    as_json: bool = option(False, "Print one JSON document instead of a table.", "--json")


@dataclass(frozen=True)
class DryRun:
    """Whether a verb only says what it would do."""

    title: ClassVar = "What is written, and how"
    dry_run: bool = option(False, "Read headers only; print what would be done.", "--dry-run")


@dataclass(frozen=True)
class Force:
    """Whether what is there may be replaced."""

    title: ClassVar = "What is written, and how"
    force: bool = option(False, "Replace an earlier output.", "--force")

    def claim(self, path: Path, kind: str | None = None) -> None:
        """Keep `path` for this verb alone, until it ends: nobody else writes it meanwhile.

        Raises OutputError if it is there and may not be replaced, if its directory is missing, or if another process
        is at work on it. With --force a file of the same `kind` that laser made may be replaced.
        """
        from laser.checkpoint.replaceable import require_replaceable

        common.keep_file(path)
        if path.exists() and not self.force:
            raise OutputError(f"{path} exists; try another -o, or --force to replace it")
        if path.exists():
            require_no_mount(path)
            require_replaceable(path, kind)
        common.to_write(path)


@dataclass(frozen=True)
class Resume:
    """Whether to go on with what is there."""

    title: ClassVar = "What is written, and how"
    resume: bool = option(False, "Go on with an output that was interrupted.", "--resume")


# A dataclass has the fields of its last base first, and so they stand in the help.
@dataclass(frozen=True)
class RecordOptions(Json, Force):
    """Of a verb that writes a file."""


@dataclass(frozen=True)
class WorkOptions(Json, DryRun, Force):
    """Of a verb that writes a file and works for long."""


@dataclass(frozen=True)
class Directory(Json, DryRun, Force, Resume):
    """Of a verb that writes a model."""


def text_of(path: Path | None, field: str | None, dataset: str | None) -> texts.Text:
    """The text that was asked for; what was read otherwise than it stands in its file is said on stderr."""
    from laser.evaluation import text as texts

    if path is not None and dataset is not None:
        raise UsageError("found both --text and --dataset; try one of them")
    if dataset is not None:
        name, *rest = dataset.split(",")
        config = rest[0] if rest and rest[0] else None
        return texts.dataset_text(name, config, rest[1] if len(rest) > 1 else "test", field or "text")
    if path is None:
        if field is not None:
            raise UsageError(f"--field {field} is for files of rows; try it with --text FILE.jsonl, or leave it out")
        return texts.default_text()
    text = texts.read_text(path, field)
    for note in text.notes:
        common.say(f"laser: {note}", aside=True, needed=False)
    return text
