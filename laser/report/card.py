"""card: the README.md of a reduced checkpoint, a pure function of the records: card.md.jinja has the text.

The metadata is what the Hub reads. `ModelCard.validate` asks the Hub, so here the card is read back off line: its
model-index is parsed into EvalResults again, base_model is checked as a repository id, and the YAML must say what was
put in. Anything else is an error and no card.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from laser.errors import RecordError
from laser.escape import cell, code, fence, visible
from laser.evaluation.leaderboard import Leaderboard
from laser.evaluation.lm_tasks import TASKS
from laser.evaluation.verdict import Direction
from laser.outcome import Outcome
from laser.plan import Plan, PlanLine
from laser.reasons import Kind
from laser.records import LATER, SPARSE
from laser.report import chat
from laser.report.comparison import Losses, compare
from laser.report.source_card import LICENCE, SourceCard, read_source_card
from laser.searching.runner import Trial

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from jinja2 import Template

TAGS = ("laser-rmt", "rank-reduction", "random-matrix-theory")
INHERITED = (*LICENCE, "language")
CARD_ROWS = 200  # of a table; of 45,000 matrices nobody reads more, and the Hub shows no card of some megabytes
# What looks like org/name and is a path: transformers writes into config.json and cards whatever a model was loaded by.
LOCAL = re.compile(
    r"(?i)(?:models?|outputs?|out|checkpoints?|ckpts?|results?|runs?|data|weights|tmp|temp|home|users|root|mnt|content|"
    r"workspace|downloads|local|cache)/.*|.*/checkpoint-\d+|.*\.(?:safetensors|bin|pth?|gguf)"
)


@dataclass(frozen=True)
class CardSource:
    """What the card says of the source: its own files, read once."""

    name: str
    identity: str
    hub_id: str | None = None  # where it is known for certain: asked for, or the Hub cache's own path
    revision: str | None = None
    readme: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer_config: Mapping[str, Any] | None = None
    chat_template: str | None = None  # the text of chat_template.jinja
    parameters: int | None = None
    shards: Mapping[str, str] | None = None  # file -> sha256 of the source's weights
    licence_files: tuple[str, ...] = ()
    # Licence file -> the Hub's name of the licence whose text it is.
    licences: Mapping[str, str] | None = field(default=None, metadata=LATER)
    # BASE+ADAPTER as a command line elsewhere has it: no address has the merge, and the name has no owners.
    added: str | None = field(default=None, metadata=SPARSE)
    base: str | None = field(default=None, metadata=SPARSE)  # of a fine-tune, likewise

    @property
    def word(self) -> str:
        """What names it on a command line."""
        return self.added or self.hub_id or self.name


@dataclass(frozen=True)
class CardRun:
    """How the output was made, as far as laser.json does not say it."""

    rule_source: str | None = None  # where the rule comes from: RULES[name].source
    versions: Mapping[str, str] | None = None  # of laser, torch and so on
    commands: tuple[str, ...] = ()  # exact; empty: spelled out from the plan


def card_text(
    name: str,
    outcome: Outcome,
    source: CardSource,
    *,
    run: CardRun | None = None,
    losses: Losses | None = None,
    before: Leaderboard | None = None,
    after: Leaderboard | None = None,
    trials: Sequence[Trial] = (),
    picture: str | None = None,
) -> str:
    """The whole card as text.

    losses: the same text under source and result. before, after: the leaderboard's tasks on either. trials: what a
    search tried. picture: where a picture of what was cut lies, from the card's own place.
    Raises RecordError where the metadata would not be valid.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run = run or CardRun()
    own = read_source_card(source.readme)
    base = base_model(source, own.entries)
    inherited: dict[str, Any] = {key: value for key, value in own.entries.items() if key in INHERITED}
    in_files = sorted(set((source.licences or {}).values()))
    if not any(key in inherited for key in LICENCE) and len(in_files) == 1:
        inherited["license"] = in_files[0]
    results = eval_results(after) if after else None
    # Not the keyword arguments only: what the source leaves out stays out.
    data = ModelCardData(
        base_model=base[0],
        library_name=None if _is_release(source) else "transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        eval_results=results,
        model_name=visible(name) if results else None,
        **{key: inherited[key] for key in INHERITED if key in inherited},
        inference=False,
    )
    body = _template().render(
        name=name,
        outcome=outcome,
        plan=outcome.plan,
        source=source,
        own=own,
        run=run,
        losses=losses,
        before=before,
        after=after,
        trials=trials,
        picture=picture,
        left=_left_as_is(outcome.plan),
        most=CARD_ROWS,
        tasks=TASKS,
        **_of_source(name, source, base, own),
        **_of_comparison(losses, before, after),
        **_of_plan(outcome),
        commands=_command_block(name, outcome, source, run, before, after),
    )
    # A directory's name may hold bytes that are no UTF-8; they are shown as escapes.
    body = body.encode("utf-8", "backslashreplace").decode()
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))
    check_metadata(text, data.to_dict())
    return text


@cache
def _template() -> Template:
    """The text, in which every value is escaped: as plain text where no filter has escaped it already."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(cell(value)),
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "plain": lambda text: Markup(cell(text)),
        "code": lambda text: Markup(code(text)),
        "fence": lambda text, language: Markup(fence(str(text), language)),
        "word": shlex.quote,
        "figure": lambda number, form: "" if number is None else format(number, form),
        "span": _ranges_of,
    }
    return environment.from_string((resources.files("laser.report") / "card.md.jinja").read_text(encoding="utf-8"))


def _ranges_of(numbers: Collection[int]) -> str:
    """The least and the largest; nothing where there is none."""
    return "" if not numbers else " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def _of_source(
    name: str, source: CardSource, base: tuple[str | list[str] | None, str], own: SourceCard
) -> dict[str, Any]:
    """What the text says of the source and of how the model is loaded."""
    config = source.config or {}
    tokenizer = source.tokenizer_config or {}
    stored = config.get("dtype") or config.get("torch_dtype")
    template = chat.find_template(tokenizer, source.chat_template)
    conversation, why = (None, "") if template is None else chat.render_chat(template, tokenizer)
    named, named_by = base
    ancestors = [] if named is None or named_by == "source" else [named] if isinstance(named, str) else named
    return {
        "origin": source.hub_id or source.name,
        "ancestors": ancestors,
        "named_by": named_by,
        "own_licence": any(key in own.entries for key in LICENCE),
        "licences": source.licences or {},
        "is_release": _is_release(source),
        "half": stored if stored in ("float16", "bfloat16") else "bfloat16",
        "literal": visible(json.dumps(name, ensure_ascii=False)),  # of Python as well
        "has_template": template is not None,
        "conversation": conversation,
        "why_no_conversation": why,
    }


def _is_release(source: CardSource) -> bool:
    """Whether the model is in Mistral's own format: a params.json, which names no model_type."""
    return (source.config or {}).get("model_type") == "mistral_release"


def _of_comparison(losses: Losses | None, before: Leaderboard | None, after: Leaderboard | None) -> dict[str, Any]:
    """The first table, and what has to be said of it."""
    rows = compare(losses, before, after)
    boards = [board for board in (before, after) if board is not None]
    local = [board for board in boards if board.data]
    tasks = [TASKS[name] for name in dict.fromkeys(score.task for board in local for score in board.scores)]
    return {
        "rows": rows,
        "worse": [row.what for row in rows if row.direction is Direction.WORSE],
        "better": [row.what for row in rows if row.direction is Direction.BETTER],
        "compared": any(row.direction is not Direction.NOT_COMPARED for row in rows),
        "unlike": list(dict.fromkeys(str(difference) for row in rows for difference in row.unlike)),
        "limits": sorted({str(board.limit) for board in boards if board.limit is not None}),
        "local": bool(local),
        "held_out": [task.title.partition(" (")[0] for task in tasks if task.shots and not task.examples],
    }


def _of_plan(outcome: Outcome) -> dict[str, Any]:
    """What was done to which matrix, by the plan and as measured."""
    plan = outcome.plan
    reduced = list(plan.reductions.values())
    measured = {line.name: outcome.matrices.get(line.name, {}) for line in reduced}
    removed = {x.name: 1 - float(measured[x.name].get("energy_kept", x.energy_kept)) for x in reduced}
    by_outputs = [line for line in reduced if line.tokens is not None]
    elsewhere = {line.name: measured[line.name].get("fresh_output_error") for line in by_outputs}
    return {
        "reduced": reduced,
        # A plan line has no shape, but its reason says of a tensor that it is no matrix.
        "matrices": sum(line.why.kind is not Kind.NOT_A_MATRIX for line in plan.lines),
        "skipped": sum(line.action == "skip" for line in plan.lines),
        "scales": sorted({line.scale for line in reduced if line.scale is not None}),
        "only_scaled": bool(reduced) and all(line.scale is not None for line in reduced),
        "removed": removed,  # by name: share of the squared singular values, or of the outputs' mean square
        "roles": _role_rows(plan, reduced, removed),
        "by_outputs": by_outputs,
        "lost_elsewhere": {name: lost for name, lost in elsewhere.items() if lost is not None},
        "unseen": [line for line in plan.lines if line.unseen and line.action != "reduce"],
        # A search may have tried several rules; what is true of one is then true of part of the edits.
        "rules": list(dict.fromkeys(part.partition(":")[0] for part in plan.rule.split(","))),
    }


# Why a tensor was left as it is, for people; what is not here speaks for itself.
LEFT_AS_IS = {
    Kind.NOT_A_MATRIX: "that are no matrix",
    Kind.PROTECTED: "kept unless asked for, as embeddings, head and router",
    Kind.NOT_SELECTED: "not selected",
    Kind.FAILED: "that could not be measured",
    Kind.ALL_KEPT: "of which the rule removes nothing",
    Kind.NOT_NOISE: "whose bulk is not noise",
    Kind.NOT_LOWEST: "not among the lowest by signal-to-noise ratio",
    Kind.UNSEEN: "not seen enough by the calibration",
    Kind.NO_DIFFERENCE: "without a difference from the base",
    Kind.UNUSED: "that the model does not use",
    Kind.REJECTED: "tried by the search and undone",
    Kind.NOT_TRIED: "not tried by the search",
    Kind.OTHER: "for reasons that laser.json states",
}


def _left_as_is(plan: Plan) -> list[tuple[str, int]]:
    """(why, how many tensors) of what was left as it is, the most first."""
    counts = Counter(
        LEFT_AS_IS.get(line.why.kind, str(line.why.kind)) for line in plan.lines if line.action != "reduce"
    )
    return counts.most_common()


def _role_rows(plan: Plan, reduced: Sequence[PlanLine], removed: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each role of each stack of which something was reduced."""
    rows = []
    for stack, role in dict.fromkeys((line.stack, line.role) for line in reduced):
        these = [line for line in reduced if (line.stack, line.role) == (stack, role)]
        rows.append(
            {
                "name": f"{stack}: {role}" if stack else role,
                "reduced": len(these),
                "tensors": sum((line.stack, line.role) == (stack, role) for line in plan.lines),
                "layers": [line.layer for line in these if line.layer is not None],
                "full_ranks": [line.full_rank for line in these if line.full_rank is not None],
                "ranks": [line.rank for line in these if line.rank is not None],
                "removed": [removed[line.name] for line in these],
            }
        )
    return rows


def _command_block(
    name: str,
    outcome: Outcome,
    source: CardSource,
    run: CardRun,
    before: Leaderboard | None,
    after: Leaderboard | None,
) -> list[str]:
    """The commands that make the output again, check it, and measure it."""
    commands = list(run.commands) or [_spelled_out(name, outcome, source)]
    base = _base_words(outcome.plan, source)
    commands += [shlex.join(["laser", "verify", source.word, name, *base])]
    return commands + [board.command for board in (before, after) if board and board.command]


def _base_words(plan: Plan, source: CardSource) -> list[str]:
    return [] if plan.pair is None else ["--base", source.base or plan.pair.base.name]


def _spelled_out(name: str, outcome: Outcome, source: CardSource) -> str:
    """The command that makes this output, by its plan; a rule makes none again that a search or a hand made."""
    plan, dtype = outcome.plan, outcome.run.get("dtype")
    base = _base_words(plan, source)
    if plan.edited or "accept" in plan.selection or plan.calibration is not None or dtype:
        words = ["laser", "reduce", source.word, "plan.json", *base, "-o", name]
        words += [] if plan.calibration is None else ["--moments", "moments.safetensors"]
        words += ["--output-dtype", str(dtype)] if dtype else []
        return f"{shlex.join(words)}  # plan.json: the entry `plan` of laser.json"
    words = ["laser", "run", source.word, *base, "-o", name, "--rule", plan.rule, "--no-search"]
    for key in ("lowest_snr", "include", "exclude", "shrink", "require_fit"):
        if plan.selection.get(key) is not None:
            words += [f"--{key.replace('_', '-')}", str(plan.selection[key])]
    words += ["--two-sided"] if plan.selection.get("two_sided") else []
    for flag in ("layers", "roles"):
        if plan.selection.get(flag):
            words += [f"--{flag}", ",".join(map(str, plan.selection[flag]))]
    device = str(outcome.run.get("device", "")).split()
    if len(device) > 1:
        words += ["--device", device[0], "--precision", device[1]]
    if outcome.run.get("method"):
        words += ["--method", str(outcome.run["method"])]
    return shlex.join(words)


def base_model(source: CardSource, inherited: Mapping[str, Any]) -> tuple[str | list[str] | None, str]:
    """(what the metadata's base_model says, where that comes from). Only valid Hub ids, or nothing: no local path.

    The source's own id where it is known. Failing that an ancestor: the id that its config or its card names, which is
    what the source itself was made from; the summary says that this is so.
    """
    if source.hub_id and _is_hub_id(source.hub_id):
        return source.hub_id, "source"
    named = (source.config or {}).get("_name_or_path")
    if isinstance(named, str) and _is_hub_id(named) and not LOCAL.fullmatch(named):
        return named, "config.json"
    above = inherited.get("base_model")
    listed = [x for x in (above if isinstance(above, list) else [above]) if isinstance(x, str)]
    listed = [x for x in listed if _is_hub_id(x) and not LOCAL.fullmatch(x)]
    if listed:
        return listed if len(listed) > 1 else listed[0], "card"
    return None, ""


def _is_hub_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII):  # a bare name might be any directory
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def eval_results(board: Leaderboard) -> list[EvalResult]:
    """An entry per task, in percent, under the data set names of the leaderboard's own cards.

    `args` says how many shots, and how many rows where not all were scored: such a figure must not pass for the real.
    """
    from huggingface_hub import EvalResult

    results = []
    for score in board.scores:
        task = TASKS[score.task]
        dataset, config, split = task.dataset
        args: dict[str, Any] = {"num_few_shot": score.shots}
        if board.limit is not None or board.data:
            args["rows_scored"] = score.n
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_name=task.title,
                dataset_type=dataset,
                dataset_config=config,
                dataset_split=split,
                dataset_args=args,
                # The leaderboard's cards call GSM8K's exact match an accuracy.
                metric_type="acc" if score.metric == "exact_match" else score.metric,
                metric_name={"acc_norm": "normalized accuracy", "mc2": None}.get(score.metric, "accuracy"),
                metric_value=round(100 * score.value, 2),
            )
        )
    return results


def check_metadata(text: str, expected: Mapping[str, Any]) -> None:
    """Read the card back and raise RecordError unless its metadata is whole and says what `expected` says."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import model_index_to_eval_results
    from yaml import YAMLError

    try:
        back = ModelCard(text).data.to_dict()
        results = model_index_to_eval_results(back["model-index"])[1] if "model-index" in back else []
    except (KeyError, TypeError, ValueError, YAMLError) as error:
        raise RecordError(f"the card's metadata cannot be read back ({error}); please report this") from error
    wrong = sorted(key for key in back.keys() | expected.keys() if back.get(key) != expected.get(key))
    named = back.get("base_model") or []
    wrong += [f"base_model {x!r}" for x in ([named] if isinstance(named, str) else named) if not _is_hub_id(x)]
    for result in results:
        value = result.metric_value
        if not isinstance(value, int | float) or not math.isfinite(value):
            wrong.append(f"{result.dataset_name}: {value!r}")
    if wrong:
        raise RecordError(f"the card's metadata is not valid: {', '.join(wrong)}; check the source's README.md")
