"""publish: from the records that lie in an output to the README.md that describes it.

Records read, all optional but the first:

    laser.json                           what was done (`laser reduce`, `laser run`)
    laser/source.json                    what the card says of the source; written here, so that a card can be made
                                         again where the source is no longer at hand
    laser/search.json                    what a search tried, and its result on held-out text (`laser run --search`)
    laser/eval.json                      `laser eval OUT -o OUT/laser/eval.json`; before a search's own result
    laser/eval-source.json               `laser eval SOURCE -o OUT/laser/eval-source.json`, on the same text
    laser/leaderboard.json               `laser leaderboard OUT`
    laser/leaderboard-source.json        `laser leaderboard SOURCE -o OUT/laser/leaderboard-source.json`
    laser/spectra.safetensors            the spectra (`laser run`), of which laser/spectrum.svg is drawn
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from laser.checkpoint.at_rest import CARD
from laser.checkpoint.hub import hub_origin
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.checkpoint.safetensors import DEEPEST_CONFIG, sha256_of
from laser.checkpoint.side_files import read_own
from laser.checkpoint.source import Source
from laser.checkpoint.writer import RECORDS
from laser.errors import OutputError, RecordError, UsageError
from laser.evaluation.leaderboard import Leaderboard
from laser.evaluation.perplexity import Perplexity, difference
from laser.files import claimed, disk_errors, write_atomically
from laser.outcome import Outcome
from laser.plan import Plan
from laser.records import LATER, Record, agree, fingerprint_in, is_deep, under
from laser.report.card import TAGS, CardRun, CardSource, card_text
from laser.report.comparison import LossDocument, Losses, losses_of
from laser.report.picture import picture_of_cuts
from laser.report.source_card import licence_of
from laser.searching.runner import Trial
from laser.searching.search import REMOVE, Report, SearchRecord
from laser.spectra import Spectra
from laser.spectral.rules import RULES

SOURCE_FILE = f"{RECORDS}/source.json"
SEARCH_FILE = f"{RECORDS}/search.json"
EVAL = f"{RECORDS}/eval.json"
EVAL_SOURCE = f"{RECORDS}/eval-source.json"
SPECTRA_FILE = f"{RECORDS}/spectra.safetensors"
CARD_PICTURE = f"{RECORDS}/spectrum.svg"
LEADERBOARD = f"{RECORDS}/leaderboard.json"
LEADERBOARD_SOURCE = f"{RECORDS}/leaderboard-source.json"
REMEDY = "remove it, or name the model with --source"
MeasuredRecord = TypeVar("MeasuredRecord", Leaderboard, Perplexity)
PACKAGES = ("laser-rmt", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class _Made:
    """Which output a card was of, by the hashes of its shards and of the source's weights, and how it was made."""

    outcome: Mapping[str, str | None]
    weights: Mapping[str, str]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class SourceRecord(
    CardSource, _Made, Record, kind="source", version=2, made_by="laser card OUT --source MODEL", mend=REMEDY
):
    """laser/source.json. picture: the sha256 of laser/spectrum.svg."""

    picture: str | None = field(default=None, metadata=LATER)

    @property
    def about(self) -> CardSource:
        return CardSource(**{each.name: getattr(self, each.name) for each in fields(CardSource)})

    def wrong(self) -> str | None:
        return under(self, 0, "parameters")


def write_card(
    out: Path,
    source: Checkpoint | None = None,
    *,
    name: str | None = None,
    base_model: str | None = None,
    hash_source: bool = False,
    spectra: str | Path | None = None,
    base: Checkpoint | None = None,
    commands: tuple[str, ...] = (),
    force: bool = False,
) -> Path:
    """Write OUT/README.md from the records in `out`; returns its path.

    source: the checkpoint that was reduced. Without it, what an earlier card kept of it in laser/source.json is used.
    Failing that, only what was copied from it is, and licence and language are not known. hash_source: read the
    source's shards for their sha256, which takes the time of reading them. Records of evaluations and leaderboards
    are those in OUT/laser. spectra: the scan that the plan rests on, for the picture, where it does not lie there.
    base: of a fine-tune, for the commands in the card.
    Raises RecordError for records of other weights, UsageError for spectra of nothing that was cut, and OutputError
    where OUT/README.md is not a card of laser, or somebody is at work on OUT.
    """
    if not out.is_dir():
        raise OutputError(f"there is no directory {out}; try the one that laser reduce or laser run wrote")
    with claimed(out):  # nobody replaces what is described
        outcome = Outcome.load(out)
        if wrong := outcome.unlike_plan():
            raise RecordError(f"{out}: {wrong[0]}; a card would claim what was not done: run laser reduce again")
        target = out / CARD
        if target.exists() and not force and not _is_ours(target):
            raise OutputError(f"{target} was not written by laser; try --force to replace it")
        earlier = _earlier(out, outcome, source is not None)
        about = _about(out, outcome, source, hash_source)
        about = replace(about, base=word_of(base) if base else earlier.base if earlier else None)
        if base_model is not None:
            about = replace(about, hub_id=base_model)
        made_of, made = outcome.plan.model, Source.of(open_checkpoint(out))
        losses, trials = None, ()
        if (out / SEARCH_FILE).exists():
            losses, trials = _searched(out / SEARCH_FILE, outcome.plan.source)
            _require_search_of(outcome.plan, trials, out / SEARCH_FILE)
        a, b = _record(Perplexity, out / EVAL_SOURCE, made_of), _record(Perplexity, out / EVAL, made)
        if a and b:
            change = difference(a, b)
            losses = losses_of(a, b, change, a.text, change.unlike)
        rules = [RULES[n].source for part in outcome.plan.rule.split(",") if (n := part.partition(":")[0]) in RULES]
        commands = commands or (earlier.commands if earlier else ())
        picture = _picture_for(out, outcome, None if spectra is None else Path(spectra), earlier)
        text = card_text(
            name or out.resolve().name,
            outcome,
            about,
            run=CardRun("; ".join(dict.fromkeys(rules)) or None, versions(), commands),
            losses=losses,
            before=_record(Leaderboard, out / LEADERBOARD_SOURCE, made_of),
            after=_record(Leaderboard, out / LEADERBOARD, made),
            trials=trials,
            picture=None if picture is None else CARD_PICTURE,
        )
        if base_model is not None and f"base_model: {base_model}\n" not in text:
            raise UsageError(f"--base-model {base_model!r} is not the id of a model; try OWNER/NAME")
        with disk_errors(out / RECORDS):
            (out / RECORDS).mkdir(exist_ok=True)
        shards, weights = outcome.shards, made_of.weights.stated()
        if picture is not None:
            write_atomically(out / CARD_PICTURE, picture)
        else:  # an earlier one, of another output
            with disk_errors(out / CARD_PICTURE):
                (out / CARD_PICTURE).unlink(missing_ok=True)
        digest = None if picture is None else hashlib.sha256(picture).hexdigest()
        SourceRecord(shards, weights, commands, **vars(about), picture=digest).save(out / SOURCE_FILE)
        write_atomically(target, text.encode())
        return target


def _picture_for(out: Path, outcome: Outcome, path: Path | None, earlier: SourceRecord | None) -> bytes | None:
    """The picture of what was cut, by the spectra in the file or among the records; else that of the earlier card.

    None where there is neither: `laser reduce` keeps no spectra. Raises as `write_card`.
    """
    found = path or out / SPECTRA_FILE
    if path is None and not found.exists():
        drawn = read_own(out, CARD_PICTURE)
        if drawn is None or earlier is None:
            return None
        return drawn if hashlib.sha256(drawn).hexdigest() == earlier.picture else None
    spectra, source = Spectra.load(found), outcome.plan.source
    picture = picture_of_cuts(spectra, outcome) if spectra.source == source else None
    if path is not None and spectra.source != source:
        raise RecordError(
            f"{path} is of {spectra.source.name} ({spectra.source.identity[:12]}), expected {source.name} "
            f"({source.identity[:12]}), which {out} was made from; try the file that the plan was made from"
        )
    if path is not None and picture is None:
        raise UsageError(f"{path} measures no matrix that was cut in {out}; leave --spectra out")
    return picture


def describe_source(checkpoint: Checkpoint, *, hash_source: bool = False) -> CardSource:
    """What a card says of a checkpoint, read from its small files. In the Hub's cache, the path holds the id and
    the revision, and the names of the blobs are the sha256 of the weights."""
    path = checkpoint.path
    hub_id, revision = (None, None) if checkpoint.on_top else hub_origin(path)  # no address has the merge
    shards = {}
    for shard in checkpoint.shards if checkpoint.on_top is None else ():  # then no file holds them
        blob = shard.path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", blob):
            shards[shard.name] = blob
        elif hash_source:
            shards[shard.name] = sha256_of(shard.path)
    files, licences = _licences(path)
    # Each tensor of the headers once: tied weights are stored once and counted once.
    parameters = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
    return CardSource(
        name=checkpoint.name,
        identity=checkpoint.identity,
        hub_id=hub_id,
        revision=revision,
        readme=_text_of(path / CARD),
        config=_plain(dict(checkpoint.config)),
        tokenizer_config=_object(path / "tokenizer_config.json"),
        chat_template=_text_of(path / "chat_template.jinja"),
        parameters=parameters,
        shards=shards,
        licence_files=files,
        licences=licences,
        added=checkpoint.on_top.elsewhere if checkpoint.on_top else None,
    )


def word_of(checkpoint: Checkpoint) -> str:
    """What names a checkpoint on a command line elsewhere."""
    return checkpoint.on_top.elsewhere if checkpoint.on_top else hub_origin(checkpoint.path)[0] or checkpoint.name


def versions() -> dict[str, str]:
    """Of Python and of what computes, as installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # laser itself, run from its sources
    return found


def _about(out: Path, outcome: Outcome, source: Checkpoint | None, hash_source: bool) -> CardSource:
    if source is not None:
        outcome.plan.model.require(source, "output")
        return describe_source(source, hash_source=hash_source)
    if (out / SOURCE_FILE).exists():
        record, of = SourceRecord.load(out / SOURCE_FILE), outcome.plan.model
        if record.identity == of.identity and agree(fingerprint_in(record.weights), of.weights):
            return record.about
    files, licences = _licences(out)
    return CardSource(
        name=outcome.plan.model.name,
        identity=outcome.plan.model.identity,
        config=_object(out / "config.json") or _plain(dict(open_checkpoint(out).config)),
        tokenizer_config=_object(out / "tokenizer_config.json"),
        chat_template=_text_of(out / "chat_template.jinja"),
        licence_files=files,
        licences=licences,
    )


def _licences(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """(names of the files about a licence, those of them that are the whole text of one -> its name)."""
    files = sorted(p.name for p in folder.iterdir() if re.match(r"(?i)(licen[cs]e|copying|notice)", p.name))
    small = [name for name in files if (folder / name).is_file() and (folder / name).stat().st_size < 1 << 20]
    texts = {name: licence_of(_text_of(folder / name) or "") for name in small}
    return tuple(files), {name: licence for name, licence in texts.items() if licence is not None}


def _earlier(out: Path, outcome: Outcome, source: bool) -> SourceRecord | None:
    """What an earlier card of this very outcome left; None where there is none, or where the record is damaged and,
    with the `source` at hand, is made again."""
    if not (out / SOURCE_FILE).exists():
        return None
    try:
        record = SourceRecord.load(out / SOURCE_FILE)
    except RecordError:
        if source:
            return None
        raise
    return record if record.outcome == outcome.shards else None


def _record(kind: type[MeasuredRecord], path: Path, of: Source) -> MeasuredRecord | None:
    """The record at `path`; None where it is absent."""
    if not path.exists():
        return None
    record = kind.load(path)
    weights = fingerprint_in(record.weights)
    if record.identity != of.identity or not agree(weights, of.weights):
        raise RecordError(
            f"{path} was measured on {record.model} ({record.identity[:12]}, {weights.short}), whose weights are not "
            f"those that the card speaks of, {of.name} ({of.identity[:12]}, {of.weights.short}); measure again, or "
            "remove the file"
        )
    return record


def _searched(path: Path, of: Source) -> tuple[Losses | None, Sequence[Trial]]:
    """What a search measured on text that it did not select on, and its trials."""
    record = SearchRecord.load(path)
    if not record.source.is_of(of):
        raise RecordError(
            f"{path} is of a search on {record.source.name} ({record.source.weights.short}), found the output of "
            f"{of.name} ({of.weights.short}); {REMOVE}"
        )
    return next((losses for report in record.held_out if (losses := _losses_in(report))), None), record.trials


def _losses_in(report: Report) -> Losses | None:
    """Those that a search reports; None where the objective is none, or was not finite."""
    if report.objective != "loss" or report.before is None or report.after is None or report.d is None:
        return None

    def loss(nll: float, se: float | None) -> LossDocument:
        return {"nll": nll, "se": se, "tokens": report.tokens, "windows": report.units, "text": report.text}

    return {
        "source": loss(report.before, report.before_se),
        "result": loss(report.after, report.after_se),
        "difference": loss(report.d, report.se),
    }


def _require_search_of(plan: Plan, trials: Sequence[Trial], path: Path) -> None:
    """Raises RecordError where a plan did not come out of these trials."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        for name in trial.ranks if trial.accepted else ():
            found.setdefault(name, []).append(trial)
    tried = all(any(t.made(line) for t in found.get(name, ())) for name, line in plan.reductions.items())
    if "accept" not in plan.selection or not (tried or plan.edited):
        raise RecordError(f"{path} is of another search than the plan of this output; remove it, or search again")


def require_shards(out: Path, on_check: Callable[[int, int], None] = lambda *_: None) -> None:
    """Raises RecordError where a reduced shard is not the one that laser.json names; all of them are read."""
    recorded = {name: sha256 for name, sha256 in Outcome.load(out).shards.items() if sha256 is not None}
    sizes = {name: (out / name).stat().st_size for name in recorded if (out / name).is_file()}
    read = 0
    for name, expected in recorded.items():
        found = sha256_of(out / name) if name in sizes else "no such file"
        if found != expected:
            raise RecordError(
                f"{out / name} is not the shard that laser.json tells of: found sha256 {found[:12]}, expected "
                f"{expected[:12]}; a card would speak of other weights: run laser reduce again"
            )
        read += sizes[name]
        on_check(read, sum(sizes.values()))


def _is_ours(path: Path) -> bool:
    """Whether a README carries the first tag of our cards."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    match = REGEX_YAML_BLOCK.search(_text_of(path) or "")
    try:
        found = yaml.safe_load(match.group(2)) if match else None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):  # a foreign file may hold anything
        return False
    tags = found.get("tags") if isinstance(found, dict) else None
    return isinstance(tags, list) and TAGS[0] in tags


def _text_of(path: Path) -> str | None:
    """The text of a file that may be absent; bytes that are not UTF-8 are replaced, for this is only shown. A link in
    its place counts as absent: what is read here goes into the card and its record."""
    data = read_own(path.parent, path.name)
    return None if data is None else data.decode("utf-8", "replace")


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none: a card can do without."""
    try:
        found = json.loads(_text_of(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return _plain(found) if isinstance(found, dict) and not is_deep(found, DEEPEST_CONFIG) else {}


def _plain(value: Any) -> Any:
    """A value of a config as strict JSON has it: NaN and Infinity, as in Mamba's time_step_limit, become their names,
    and half a character, of which no file can be made, a question mark."""
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
