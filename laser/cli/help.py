"""Help pages: options in groups, an example for each verb, and for the list of verbs a line that is not cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand

# Verb -> its line in `laser --help`, and command lines as people give them.
VERB_HELP: dict[str, tuple[str, tuple[str, ...]]] = {
    "info": ("Say what a model holds, by its headers alone.", ("laser info mistralai/Mixtral-8x7B-Instruct-v0.1",)),
    "scan": (
        "Measure the singular values of every matrix.",
        ("laser scan MODEL -o spectra.safetensors", "laser scan MODEL --layers 0,4,20-31 --roles w1,w2,w3 --dry-run"),
    ),
    "plan": (
        "Decide by a rule what is to be reduced.",
        ("laser plan spectra.safetensors -o plan.json --rule mp-edge --lowest-snr 15",),
    ),
    "reduce": (
        "Write the checkpoint that a plan describes.",
        ("laser reduce MODEL plan.json -o OUT", "laser reduce MODEL plan.json -o OUT --resume"),
    ),
    "verify": ("Check a written checkpoint against its plan.", ("laser verify MODEL OUT",)),
    "run": (
        "Scan, search or plan, reduce, and write the card.",
        ("laser run MODEL -o OUT --recipe laser-rmt", "laser run MODEL -o AGAIN --config OUT/laser.yaml"),
    ),
    "devices": ("Say where it would compute here, and how fast.", ("laser devices --probe",)),
    "eval": (
        "Measure perplexity, or two models' paired difference.",
        ("laser eval MODEL OUT --text wikitext.txt --windows 32",),
    ),
    "calibrate": (
        "Keep the second moments of each matrix's inputs.",
        ("laser calibrate MODEL -o moments.safetensors --text train.txt --windows 64",),
    ),
    "search": (
        "Keep the reductions that measurably help.",
        ("laser search MODEL -o plan.json --rules laser-rmt,mp-edge --lowest-snr 15",),
    ),
    "leaderboard": (
        "Measure the six tasks of the Open LLM Leaderboard.",
        ("laser leaderboard OUT --tasks arc_challenge,winogrande --limit 100",),
    ),
    "card": ("Write the model card from the records.", ("laser card OUT --base-model org/name",)),
    "push": ("Upload a finished output to the Hub.", ("laser push OUT org/name --private",)),
    "null": (
        "Count what each rule finds where nothing is.",
        ("laser null MODEL --rules mp-edge,laser-rmt --roles w1 --draws 5",),
    ),
    "spectra": (
        "List every scanned matrix in numbers.",
        (
            "laser spectra spectra.safetensors --rule mp-edge",
            "laser spectra spectra.safetensors --unfrozen-yaml train.yaml",
        ),
    ),
    "plot": (
        "Draw a histogram with its law, or a heat map.",
        (
            "laser plot spectra.safetensors -o w1.png --matrix layers.0.block_sparse_moe.experts.0.w1",
            "laser plot spectra.safetensors -o map.svg --heat kept --mean",
        ),
    ),
    "report": (
        "Write one HTML page to look at a whole model.",
        (
            "laser report spectra.safetensors -o report.html",
            "laser report base.safetensors --against tuned.safetensors -o two.html",
        ),
    ),
    "convert": ("Translate a release or a GGUF file to the Hub's format.", ("laser convert model.gguf -o MODEL",)),
    "delta": (
        "Say what a fine-tune did to its base.",
        ("laser delta BASE TUNED -o delta.safetensors", "laser delta BASE BASE+ADAPTER -o delta.safetensors"),
    ),
    "unmerge": ("Find the adapter that was merged into a fine-tune.", ("laser unmerge BASE TUNED -o ADAPTER",)),
    "rebuild": ("Make the fine-tune again from base and adapter.", ("laser rebuild BASE ADAPTER -o TUNED",)),
    "compensate": (
        "Give back what a smaller copy of a model lost.",
        (
            "laser compensate ORIGINAL COPY --text train.txt --held-out test.txt --rank 8 -o ADAPTER",
            "laser compensate ORIGINAL COPY --text train.txt --bits 0.2 -o ADAPTER",
        ),
    ),
}


# Option -> the form of its value, where its declaration says none and the kind of value alone would say too little.
VALUE_FORMS = {
    **dict.fromkeys(("--base", "--source"), "MODEL"),
    **dict.fromkeys(("--data", "--disk"), "DIR"),
    **dict.fromkeys(("--dtype", "--output-dtype"), "DTYPE"),
    **{"--recipe": "NAME|FILE", "--output": "PATH", "--rules": "NAME,NAME", "--base-model": "ORG/NAME"},
    **{"--device": "DEVICE", "--engine": "ENGINE", "--precision": "float64|float32", "--window": "TOKENS"},
    **{"--shrink": "LOSS", "--accept": "WHICH", "--order": "layers|snr", "--objective": "loss|accuracy"},
    **{"--mode": "windows|rolling", "--permute": "entries|rows", "--heat": "QUANTITY", "--scale": "C"},
    **{"--top-percent": "PERCENT", "--revision": "BRANCH", "--bits": "BITS"},
}
KINDS = {"<path>": "FILE", "<int>": "N", "<float>": "X", "<str>": "NAME"}  # by what typer shows


def _with_form(words: str, option: Any) -> str:
    """An option's names, as help lists them, with the form of its value."""
    names, _, kind = words.rpartition(" ")
    return f"{names} {VALUE_FORMS.get(option.opts[-1]) or KINDS[kind]}" if kind in KINDS else words


class Command(TyperCommand):
    """A verb whose options stand in the groups that options.py declares, each with the form of its value."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """As the documentation has them: MODEL, where typer puts braces around what is required."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                is_argument = parameter.param_type_name == "argument"
                record = (str(parameter.metavar) if is_argument else _with_form(record[0], parameter), record[1])
                title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _, examples = VERB_HELP[self.name or ""]
        with formatter.section("Example" if len(examples) == 1 else "Examples"):
            for line in examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def command_of(app: Any, verb: Callable[..., None], call: Callable[..., None]) -> None:
    """Make `call` a verb of the app."""
    app.command(verb.__name__, cls=Command, short_help=VERB_HELP[verb.__name__][0])(call)
