"""The verb compensate: an adapter that gives back what a smaller copy lost. It parses, calls and prints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from laser.calibration import calibrate
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.writer import require_outside
from laser.choices import WINDOW
from laser.cli import common, options
from laser.cli.common import say
from laser.cli.measure import digits, fewer
from laser.cli.memory import for_gradients
from laser.cli.progress import Bar, Progress
from laser.compensate.budget import BITS_STORED, even_rank
from laser.compensate.card import SPENT_BY, spent
from laser.compensate.compensate import (
    Request,
    compensate,
    compensation_found_again,
    opened_journal,
    require_compensation_place,
    require_enough,
    run_of_compensation,
)
from laser.compensate.copies import require_copy, require_directions, require_same_model
from laser.compensate.peft import Slot
from laser.compensate.places import ParameterPlace, Places, find_places
from laser.compensate.record import CompensationRecord, HeldOut
from laser.compensate.verdict import check_held_out, judge_correction, sentence, size_of
from laser.differences.opened import in_no_files, open_model
from laser.differences.serving import in_vllm
from laser.engine.crew import Crew
from laser.errors import RecordError, UsageError
from laser.evaluation.activations import MEMORY_LIMIT
from laser.evaluation.footprint import Needs
from laser.evaluation.rows import holds_rows
from laser.evaluation.streaming import require_dtype
from laser.evaluation.text import Windows, check_cut, cut_windows, load_tokenizer
from laser.files import claimed, disk_errors, unfinished
from laser.moments import Moments
from laser.selection import Selection

RANK = 8
WINDOWS, DTYPE = 32, "float32"  # what verbs.py has where nothing else is asked for
NO_INPUTS = "a correction goes by the inputs of a text; try --text FILE, or --moments with a file of laser calibrate"


def compensate_verb(
    original: str,
    copy: str,
    *,
    output: Path,
    moments: options.Inputs,
    rank: int | None,
    bits: float | None,
    plain: bool,
    text: Path | None,
    windows: int,
    held_out: Path | None,
    held_out_windows: int,
    field: str | None,
    window: int,
    which: options.Matrices,
    dtype: str,
    compute: options.ComputeOptions,
    work: options.WorkOptions,
) -> None:
    """`laser compensate`, whose arguments and help are in verbs.py."""
    given = moments.moments
    if (given is not None) + (text is not None) + plain != 1:
        found = "found several of --moments, --text and --plain" if given or text or plain else NO_INPUTS
        raise UsageError(found if found is NO_INPUTS else f"{found}; try one of them")
    no_text = text is None and held_out is None
    rows = any(path is not None and holds_rows(path) for path in (text, held_out))
    idle = {
        "--windows": text is None and windows != WINDOWS,
        "--held-out-windows": held_out is None and held_out_windows != WINDOWS,
        "--window": no_text and window != WINDOW,
        "--dtype": no_text and dtype != DTYPE,
        "--field": field is not None and not rows,
        "--method": compute.method != "auto",
    }
    if those := [name for name, is_idle in idle.items() if is_idle]:
        does, them = ("does", "it") if len(those) == 1 else ("do", "them")
        raise UsageError(f"{', '.join(those)} {does} nothing in this call; try without {them}")
    asked = Request(RANK if rank is None and bits is None else rank, bits)
    require_dtype(dtype)
    selection, start = which.selection(), time.perf_counter()
    require_compensation_place(output, work.force)
    known = moments.load()
    runs = "files" if work.dry_run else "weights"
    first = open_model(original, runs if text or held_out else "ranges")
    second = open_model(copy, runs if held_out else "ranges")
    if second.on_top is not None:  # an adapter is loaded on a model that is stored
        raise in_no_files(copy)
    for checkpoint in (first, second):
        require_outside(checkpoint, output)
    places = find_places(first, second, selection)
    require_directions(rank, places.places)
    require_same_model(first, second)

    def cut(path: Path, most: int, length: int = window) -> Windows:
        check_cut(length, most or None, 0, "windows")
        read = options.text_of(path, field if holds_rows(path) else None, None)
        return cut_windows(read, load_tokenizer(first.path), length=length, limit=most or None)

    own = None if text is None else cut(text, windows)
    second_text = None if held_out is None else cut(held_out, held_out_windows)
    if own is not None:
        inputs = sum(len(each.tokens) - 1 for each in own.windows)
        require_enough(own.text, [inputs] * len(places.places), places.places)
    if held_out is not None and second_text is not None:
        seen = own.text_sha256 if own is not None else known.calibration.text_sha256 if known else None
        if second_text.text_sha256 == seen:
            raise UsageError(f"{second_text.text} is the text of the calibration; try --held-out with another one")
        if known is not None:  # which has no windows, but their sha256
            calibrated = known.calibration
            if cut(held_out, calibrated.windows, calibrated.window).sha256 == calibrated.windows_sha256:
                raise UsageError(
                    f"the held-out {second_text.text} begins with the windows of the calibration; "
                    "try another --held-out text"
                )
        check_held_out(first, second, second_text, own)
    crew = compute.crew()
    if work.dry_run:
        gradients = None
        if asked.bits is not None and own is not None:
            gradients = for_gradients(first, own.windows, crew.devices[0], dtype)
        return _print_plan(first, second, places, asked, crew, known, gradients, work.as_json)
    rescaled = require_copy(first, second, places.places)
    with claimed(output):
        common.to_write(output)
        record = None
        if own is not None:
            gradients = asked.bits is not None
            run = run_of_compensation(first, second, (own.sha256, dtype), asked, places, crew, gradients)
            record = compensation_found_again(output, run)
            if record is None:  # whose work lies there is known before its moments are made anew
                opened_journal(unfinished(output), run, work.force).close()
                known = _calibrated(first, own, unfinished(output), selection, crew, dtype, gradients)
        if record is None:

            def judged(adapter: Path, slots: Sequence[Slot]) -> HeldOut | None:
                if second_text is None:
                    return None
                device = str(crew.devices[0].torch_device)
                with Bar("verdict", unit="pieces") as bar:
                    return judge_correction(
                        first,
                        second,
                        adapter,
                        slots,
                        second_text,
                        dtype=dtype,
                        device=device,
                        tick=lambda: bar.update(),
                        expect=bar.expect,
                    )

            matrices = [matrix for place in places.places for matrix in place.matrices]
            with Progress("compensate", matrices) as bar:
                record = compensate(
                    first, second, places, known, asked, output,
                    rescaled=rescaled, crew=crew, judge=judged, force=work.force, tick=bar,
                )  # fmt: skip
    seconds = time.perf_counter() - start
    if work.as_json:
        sizes = {"original": size_of(first), "copy": size_of(second), "adapter": _size(output)}
        return common.print_json(record.document() | {"output": str(output), "bytes": sizes, "seconds": seconds})
    _print_record(record, places)
    for part in (own, second_text):
        if part is not None and (short := fewer(part.text, len(part.windows), part.asked)):
            say(short)
    say(
        f"{len(record.entries)} matrices of {second.name} corrected in {_size(output) / 1e6:.2f} MB, "
        f"{record.bits:.3f} bits per weight{spent(record)}; written to {output} in {seconds:.1f} s"
    )
    say(in_vllm(output))


def _size(output: Path) -> int:
    return (output / "adapter_model.safetensors").stat().st_size


def _calibrated(
    original: Checkpoint,
    windows: Windows,
    partial: Path,
    selection: Selection,
    crew: Crew,
    dtype: str,
    gradients: bool,
) -> Moments:
    """The moments of the original, kept beside what is solved until all is done."""
    path = partial / "moments.safetensors"
    with disk_errors(path):
        partial.mkdir(parents=True, exist_ok=True)
    if path.exists() and not unfinished(path).exists():
        try:
            there = Moments.load(path)
            there.source.require(original, "moments file")
            calibrated = there.calibration
            known = (calibrated.windows_sha256, calibrated.dtype, there.run.get("selection"), there.has_gradients)
            if known == (windows.sha256, dtype, selection.describe(), gradients):
                return there
        except RecordError:
            pass  # of another run: made anew
    with Bar("calibrate", unit="layers") as bar:
        return calibrate(
            original, windows, path, selection, dtype=dtype, device=crew.devices[0].torch_device, wide="diagonal",
            few=True, gradients=gradients, anew=True, tick=lambda layer: bar.update(now=f"layer {layer}"),
            expect=bar.expect,
        )  # fmt: skip


def _print_plan(
    original: Checkpoint,
    copy: Checkpoint,
    places: Places,
    asked: Request,
    crew: Crew,
    known: Moments | None,
    gradients: tuple[Needs, int] | None,
    as_json: bool,
) -> None:
    """What would be corrected, and what that takes on the disk. gradients: what it takes to make them."""
    shapes = {place.name: place.shape for place in places.places}
    rank = float(asked.rank) if asked.rank is not None else even_rank(shapes, asked.bits or 0.0)
    stored = sum(rank * (m + n) * BITS_STORED / 8 for m, n in shapes.values())
    weights = sum(m * n for m, n in shapes.values())
    by = gradients is not None or asked.by_gradients(known)
    if as_json:
        return common.print_json(
            {
                "original": original.name, "copy": copy.name, "places": len(shapes), "left": dict(places.left),
                "rank": rank, "bits": 8 * stored / weights, "bytes": stored, "device": crew.label,
                **({} if asked.bits is None else {"by_gradients": by}),
                **({} if gradients is None else {"gradients": asdict(gradients[0]) | {"states": gradients[1]}}),
            }
        )  # fmt: skip
    kinds: Counter[tuple[str, str]] = Counter()
    for place in places.places:
        kinds[
            place.matrices[0].role if len(place.matrices) == 1 else "+".join(_roles_of_places(place)),
            _shown_shape(place),
        ] += 1
    common.print_table(("role", "places", "shape"), [(role, count, shape) for (role, shape), count in kinds.items()])
    _print_left(places.left)
    say(
        f"{len(shapes)} places of {copy.name} to correct towards {original.name} at a mean rank of {rank:.1f}: "
        f"{stored / 1e6:.2f} MB, {8 * stored / weights:.3f} bits per weight, on {crew.label}"
    )
    if asked.bits is not None:
        say(f"the budget would be spent by {SPENT_BY[by]}")
    if gradients is not None:
        needs, states = gradients
        say(
            f"for the gradients the text runs back: {max(needs.device, needs.host) / 1e9:.2f} GB of memory at the peak "
            f"besides the libraries, and {states / 1e9:.2f} GB of states, in files beyond {MEMORY_LIMIT >> 30} GiB"
        )


def _roles_of_places(place: ParameterPlace) -> list[str]:
    return list(dict.fromkeys(matrix.role for matrix in place.matrices))


def _shown_shape(place: ParameterPlace) -> str:
    return "x".join(map(str, place.shape))


def _print_left(left: dict[str, str] | object) -> None:
    assert isinstance(left, dict)
    common.say_first([f"  {name}: left as it is: {why}" for name, why in left.items()], 12)


def _print_record(record: CompensationRecord, places: Places) -> None:
    """By role: ranks, and what share of the outputs' mean square is lost, before and after."""
    by_name = {place.name: place for place in places.places}
    groups: dict[str, list] = {}
    for entry in record.entries:
        groups.setdefault("+".join(_roles_of_places(by_name[entry.name])), []).append(entry)
    rows = []
    for role, entries in groups.items():
        ranks, count = sorted(e.rank for e in entries), len(entries)
        span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}-{ranks[-1]}"
        before, predicted, after = (
            sum(getattr(e, w) for e in entries) / count for w in ("before", "predicted", "after")
        )
        rows.append((role, count, span, before, predicted, after, sum(e.shrunk for e in entries)))
    common.print_table(("role", "places", "rank", "output error before", "predicted", "after", "moments shrunk"), rows)
    shrunk = [
        f"  {e.name}: {e.tokens} inputs met, fewer than {e.shape[1]}; its moments were shrunk"
        for e in record.entries
        if e.shrunk
    ]
    common.say_first(shrunk, 12)
    _print_left(dict(record.left))
    if (found := record.held_out) is not None:
        common.print_table(
            ("model", "bytes", "nats per token", "±", "against the original", "±"),
            [
                (
                    each.model,
                    each.bytes,
                    digits(each.nll),
                    digits(each.standard_error),
                    f"{each.lost:+.5f}",
                    digits(each.lost_error),
                )
                for each in (found.original, found.copy, found.adapted)
            ],
        )
        said = f"{found.windows} windows of {found.window}, {found.tokens} tokens, {found.dtype}"
        say(f"{found.text} (sha256 {found.text_sha256[:12]}), {said}")
        say(sentence(found))
