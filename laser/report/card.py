"""card: the README.md of a reduced checkpoint, a pure function of the records.

The metadata is what the Hub reads. It has no offline check of its own (`ModelCard.validate` asks the Hub), so here the
card is read back by huggingface_hub, its model-index is parsed into EvalResults again, base_model is checked as a
repository id, and the YAML must say what was put in. Anything else is an error and no card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laser.errors import RecordError
from laser.evaluation.leaderboard import Leaderboard
from laser.evaluation.lm_tasks import TASKS
from laser.report import card_edits as edits
from laser.report import card_sections as sections
from laser.report.card_loading import is_release, loading
from laser.report.card_metric import metric
from laser.report.comparison import Losses, compare
from laser.report.source_card import LICENCE, read_source_card
from laser.report.visible import visible

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from laser.outcome import Outcome

TAGS = ("laser-rmt", "rank-reduction", "random-matrix-theory")
INHERITED = (*LICENCE, "language")
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
    licences: Mapping[str, str] | None = None  # licence file -> the Hub's name of the licence whose text it is


@dataclass(frozen=True)
class CardRun:
    """How the output was made, as far as laser.json does not say it."""

    rule_source: str | None = None  # where the rule comes from: RULES[name].source
    versions: Mapping[str, str] | None = None  # of laser, torch and so on
    commands: tuple[str, ...] = ()  # exact; empty: spelled out from the plan


def card(
    name: str,
    outcome: Outcome,
    source: CardSource,
    *,
    run: CardRun | None = None,
    losses: Losses | None = None,
    before: Leaderboard | None = None,
    after: Leaderboard | None = None,
    trials: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The whole card as text.

    losses: the same text under source and result. before, after: the leaderboard's tasks on either. trials: what a
    search tried, each with label, rule, ranks (tensor -> rank), d, se and accepted.
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
        library_name=None if is_release(source) else "transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        eval_results=results,
        model_name=visible(name) if results else None,
        **{key: inherited[key] for key in INHERITED if key in inherited},
        inference=False,
    )
    rows = compare(losses, before, after)
    body = "\n\n".join(
        [
            f"# {sections.plain(name)}",
            sections.summary(outcome, source, base),
            sections.measured(rows, losses, before, after),
            edits.what_was_done(outcome, run),
            *([told] if (told := metric(outcome)) else []),
            *([edits.search(trials)] if trials else []),
            loading(name, source),
            sections.instruction_format(source),
            sections.limits(outcome, source, own, losses, after),
            sections.reproduce(name, outcome, source, run, before, after),
        ]
    )
    # A directory's name may hold bytes that are no UTF-8; they are shown as escapes.
    body = body.encode("utf-8", "backslashreplace").decode()
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))
    check_metadata(text, data.to_dict())
    return text


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
