"""The sections of a card's text. Each takes records and returns Markdown without a blank line at its ends."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from laser.evaluation.leaderboard import Leaderboard
from laser.evaluation.lm_tasks import TASKS
from laser.evaluation.verdict import Direction
from laser.report import chat
from laser.report.card_edits import count
from laser.report.comparison import Losses, Row
from laser.report.markdown import cell, code, fence, table
from laser.report.source_card import LICENCE

if TYPE_CHECKING:
    from laser.outcome import Outcome
    from laser.report.card import CardRun, CardSource
    from laser.report.source_card import SourceCard


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return cell(text)


def summary(outcome: Outcome, source: CardSource, base: tuple[str | list[str] | None, str]) -> str:
    reduced = len(outcome.plan.reductions)
    matrices, _ = count(outcome.plan)
    text = (
        f"{code(source.hub_id or source.name)} with {reduced} of its {matrices} weight matrices replaced by their best "
        f"approximations of lower rank, chosen by the rule {code(outcome.plan.rule)}. Nothing was trained. Names, "
        "shapes, storage types and size are the source's, so it loads wherever the source does, and is neither smaller "
        "nor faster."
    )
    if not reduced:
        text += " **No matrix was reduced: the weights are the source's, byte for byte.**"
    named, origin = base
    if named and origin != "source":
        which = ", ".join(code(x) for x in ([named] if isinstance(named, str) else named))
        told = "its config.json names" if origin == "config.json" else "its own card names as its base"
        text += f"\n\nThe source is a local directory; `base_model` above is {which}, which {told}."
    return text


def measured(rows: Sequence[Row], losses: Losses | None, before: Leaderboard | None, after: Leaderboard | None) -> str:
    """The first table. What got worse is said above it and in it."""
    parts = ["## Measured before and after"]
    if not rows:
        parts.append("**Nothing was measured.** Whether this model is better or worse than its source is not known.")
        return "\n\n".join(parts)
    worse = [row.what for row in rows if row.direction is Direction.WORSE]
    better = [row.what for row in rows if row.direction is Direction.BETTER]
    odd = list(dict.fromkeys(str(difference) for row in rows for difference in row.unlike))
    if odd:
        parts.append(
            f"**Not like with like**: source and this model were measured with {cell('; '.join(odd))}. Such lines do "
            "not tell which of the two is better; measure both again in the same way."
        )
    if worse:
        parts.append(f"**Worse than the source** on: {cell('; '.join(worse))}.")
    elif odd and not any(row.direction is not Direction.NOT_COMPARED for row in rows):
        pass  # what there is to say stands above
    elif not any(row.direction is not Direction.NOT_COMPARED for row in rows):
        parts.append("**Nothing was measured on both models**, so whether this one is worse is not known.")
    elif not better:
        parts.append("No line below shows a difference beyond its error: no gain was measured.")
    cells = [
        (
            cell(r.what),
            cell(r.before),
            cell(r.after),
            cell(r.change),
            f"**{cell(r.verdict)}**" if r.direction is Direction.WORSE else cell(r.verdict),
        )
        for r in rows
    ]
    parts.append(table(("", "source", "this model", "change", "verdict"), cells, right=(1, 2, 3)))
    notes = ["± is one standard error: 0 where all rows are alike, and left out where a single one was measured."]
    if losses or (before and after):
        notes.append(
            "Changes are paired, window by window or row by row; a verdict is given where the change is larger than "
            "its standard error."
        )
    for who, board in (("source", before), ("this model", after)):
        for score in board.scores if board else ():
            if score.undefined:
                notes.append(
                    f"{score.undefined} of {score.n} rows of {TASKS[score.task].title} count 0 for {who}: no answer "
                    "has any probability (0/0)."
                )
    if any(board and (board.limit is not None) for board in (before, after)):
        limits = sorted({str(b.limit) for b in (before, after) if b and b.limit is not None})
        notes.append(
            f"The tasks were cut to their first {' and '.join(limits)} rows (MMLU: per subject). That is a smoke test, "
            "not a leaderboard result."
        )
    local = [board for board in (before, after) if board and board.data]
    if local:
        tasks = {score.task: TASKS[score.task] for board in local for score in board.scores}
        held_out = [task.title.partition(" (")[0] for task in tasks.values() if task.shots and not task.examples]
        notes.append("The rows came from local files.")
        if held_out:
            notes.append(
                f"The few-shot examples of {', '.join(held_out)} are the first rows of those files (not scored) and "
                "not drawn from the train split, as the leaderboard's are."
            )
    parts.append(" ".join(notes))
    return "\n\n".join(parts)


def instruction_format(source: CardSource) -> str:
    head = "## Instruction format\n\n"
    template = chat.find_template(source.tokenizer_config or {}, source.chat_template)
    if template is None:
        return head + "The source has no chat template: give it plain text."
    text, why = chat.render(template, source.tokenizer_config or {})
    if text is None:
        return (
            head + f"The source has a chat template that could not be rendered for a conversation of user, assistant, "
            f"user ({cell(why)}). It was copied unchanged; see the source's own card."
        )
    return (
        head + "The source's own chat template, copied unchanged, makes this of two questions and an answer, ready for "
        f"the next answer. `tokenizer.apply_chat_template` writes it for you.\n\n{fence(text, 'text')}"
    )


def limits(
    outcome: Outcome,
    source: CardSource,
    own: SourceCard,
    losses: Losses | None,
    after: Leaderboard | None,
) -> str:
    # A search may have tried several rules; what is true of one is then true of part of the edits.
    rules = list(dict.fromkeys(part.partition(":")[0] for part in outcome.plan.rule.split(",")))
    points = []
    if "laser-rmt" in rules:
        points.append(
            "The threshold of `laser-rmt` is biased. On a matrix of pure Gaussian noise, where nothing should be kept, "
            "it keeps 24 % of the singular values if the matrix is square and up to 100 % if one side is four times "
            "the other. What it removes depends on the shape of a matrix more than on its noise, and is not thereby "
            "shown to be noise."
        )
    for rule in rules:
        if rule in ("energy", "fraction", "rank"):
            points.append(f"The rule {code(rule)} sets a size; it does not tell signal from noise.")
        elif rule not in ("laser-rmt", "none"):
            points.append(
                f"The rule {code(rule)} rests on a model of the noise in a matrix, of entries that are independent. "
                "Trained weights need not be so, and small singular values can carry what a model knows."
            )
    if losses is None and after is None:
        points.append("No effect on quality was measured.")
    elif after is None:
        points.append("Only the loss on one text was measured, and no task.")
    elif losses is None:
        points.append("Only tasks were measured, and no loss on a text.")
    points.append(
        "Whatever was not measured above is not known: other languages, long contexts, code, tool use, safety. The "
        "source's own limits and biases are still there."
    )
    points.append("Nothing was measured in 8 or 4 bits, whose rounding is an error of its own.")
    if own.complaint:
        points.append(f"The source's README.md {own.complaint}.")
    points.append(_licence(source, own))
    return "## Limits\n\n" + "\n".join(f"- {p}" for p in points)


def _licence(source: CardSource, own: SourceCard) -> str:
    if any(key in own.entries for key in LICENCE):
        return "The licence is the source's."
    told = source.licences or {}
    files = ", ".join(code(x) + (f" ({told[x]})" if x in told else "") for x in source.licence_files)
    if len(set(told.values())) == 1:
        return f"The source's card names no licence; the one above is that whose text it carries: {files}."
    return f"The source's card names no licence{f'; see {files}' if files else ''}. Ask its authors before you use it."


def reproduce(
    name: str,
    outcome: Outcome,
    source: CardSource,
    run: CardRun,
    before: Leaderboard | None,
    after: Leaderboard | None,
) -> str:
    commands = list(run.commands) or [spell_command(name, outcome, source)]
    commands += [f"laser verify {shlex.quote(source.hub_id or source.name)} {shlex.quote(name)}"]
    commands += [board.command for board in (before, after) if board and board.command]
    parts = ["## How to reproduce", fence("\n".join(commands), "sh")]
    facts = [
        ("source", code(source.hub_id or source.name)),
        ("source revision", code(source.revision) if source.revision else "not known: a local directory"),
        ("source identity", code(source.identity)),
        ("method, device", cell(f"{outcome.run.get('method') or '?'}, {outcome.run.get('device') or '?'}")),
    ]
    facts += [(cell(k), cell(v)) for k, v in (run.versions or {}).items()]
    if after:
        facts += [(f"{cell(k)} (tasks)", cell(v)) for k, v in after.versions.items()]
        facts += [(code(k), f"sha256 {code(v)}") for k, v in after.data.items()]
    parts.append(table(("", ""), facts))
    parts.append(
        "The identity is a sha256 over the config, the index, laser.json if there is one, and each shard's name, size "
        "and header. The same source, plan, method, device and versions give the same bytes:"
    )
    shards = source.shards or {}
    if shards:
        rows = [(code(k), code(v), code(shards.get(k, "not read"))) for k, v in outcome.shards.items()]
        parts.append(table(("file", "sha256", "sha256 of the source's"), rows))
    else:
        parts.append(table(("file", "sha256"), [(code(k), code(v)) for k, v in outcome.shards.items()]))
    return "\n\n".join(parts)


def spell_command(name: str, outcome: Outcome, source: CardSource) -> str:
    """The command that makes this output, by its plan; a rule makes none again that a search or a hand made."""
    plan, dtype = outcome.plan, outcome.run.get("dtype")
    if plan.edited or "accept" in plan.selection or plan.calibration is not None or dtype:
        words = ["laser", "reduce", source.hub_id or source.name, "plan.json", "-o", name]
        words += [] if plan.calibration is None else ["--moments", "moments.safetensors"]
        words += ["--dtype", str(dtype)] if dtype else []
        return f"{shlex.join(words)}  # plan.json: the entry `plan` of laser.json"
    words = ["laser", "run", source.hub_id or source.name, "-o", name, "--rule", plan.rule]
    for key in ("lowest_snr", "include", "exclude", "shrink", "require_fit"):
        if plan.selection.get(key) is not None:
            words += [f"--{key.replace('_', '-')}", str(plan.selection[key])]
    words += ["--two-sided"] if plan.selection.get("two_sided") else []
    for flag in ("layers", "roles"):
        if plan.selection.get(flag):
            words += [f"--{flag}", ",".join(map(str, plan.selection[flag]))]
    device, _, precision = str(outcome.run.get("device", "")).partition(" ")
    if device and precision:
        words += ["--device", device, "--precision", precision]
    if outcome.run.get("method"):
        words += ["--method", str(outcome.run["method"])]
    return shlex.join(words)
