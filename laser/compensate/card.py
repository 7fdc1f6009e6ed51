"""The card of an adapter that compensates: README.md, a pure function of its record."""

from __future__ import annotations

from laser.compensate.record import CompensationRecord, ErrorsMeasured

# What a budget goes by: by_gradients of the record.
SPENT_BY = {True: "the loss's gradients at the outputs", False: "the share of each output's own size"}


def card_of(record: CompensationRecord) -> str:
    """Markdown, with the front matter that the Hub reads."""
    text = record.calibration
    by = "the plain norm" if text is None else f"{text.tokens} tokens of {text.text}"
    asked = ", ".join(f"{name} {value:g}" for name, value in record.asked.items()) + spent(record)
    lines = [
        "---",
        "library_name: peft",
        "tags:\n- lora\n- quantization\n- laser",
        "---",
        f"# What {record.copy.name} lost, given back",
        "",
        f"A LoRA adapter for `{record.copy.name}`, a smaller copy of `{record.original.name}`. It was not trained: "
        "every matrix gets the best correction of low rank for the inputs that it met in a calibration "
        "(EoRA, [arXiv 2410.21271](https://arxiv.org/abs/2410.21271)), by `laser compensate`.",
        "",
        "| | |",
        "|---|---|",
        f"| original | `{record.original.name}`, identity `{record.original.identity[:12]}` |",
        f"| copy | `{record.copy.name}`, identity `{record.copy.identity[:12]}` |",
        f"| calibration | {by}{'' if text is None else f', sha256 `{text.text_sha256[:12]}`'} |",
        f"| asked for | {asked} |",
        f"| stored | {record.bits:.3f} bits per corrected weight |",
        f"| corrected | {len(record.entries)} matrices, {len(record.left)} left as they are |",
        f"| moments shrunk | {sum(e.shrunk for e in record.entries)} matrices met fewer inputs than dimensions |",
        f"| output error | {_mean(record, 'before'):.3e} of the outputs' mean square before, "
        f"{_mean(record, 'after'):.3e} after |",
    ]
    if (found := record.held_out) is not None:
        lines += [
            "",
            f"On {found.tokens} tokens of {found.text}, which the calibration never saw (nats per token, "
            f"{found.windows} windows of {found.window}, paired, {found.dtype}):",
            "",
            "| model | bytes | loss | against the original |",
            "|---|---|---|---|",
            *(_card_row(each) for each in (found.original, found.copy, found.adapted)),
            "",
            f"The adapter changes the copy's loss by {found.gain:+.5f} ± {_or_dash(found.gain_error)}: "
            + ("it survives the second text." if found.survives else "**it does not survive the second text.**"),
        ]
    lines += ["", "Load it with PEFT on the copy:", "", "```python", *_USE.format(copy=record.copy.name).split("\n")]
    return "\n".join([*lines, "```", ""])


_USE = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{copy}")
model = PeftModel.from_pretrained(model, "THIS_DIRECTORY")"""


def spent(record: CompensationRecord) -> str:
    """What a budget went by; nothing where there is none."""
    if "bits" not in record.asked:
        return ""
    return f", spent by {SPENT_BY[record.by_gradients]}"


def _mean(record: CompensationRecord, what: str) -> float:
    return sum(getattr(e, what) for e in record.entries) / max(len(record.entries), 1)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _card_row(of: ErrorsMeasured) -> str:
    return (
        f"| {of.model} | {of.bytes:,} | {of.nll:.5f} ± {_or_dash(of.standard_error)} | {of.lost:+.5f} ± "
        f"{_or_dash(of.lost_error)} |"
    )
