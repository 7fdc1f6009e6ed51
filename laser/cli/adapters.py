"""The verbs unmerge and rebuild: a fine-tune to an adapter of its base, and back. They parse, call and print."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from laser.checkpoint.convert import require_new
from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.swap import restore_earlier
from laser.checkpoint.writer import require_outside, travelling
from laser.choices import ROUNDS
from laser.cli import common, options
from laser.cli.common import say
from laser.cli.estimates import print_dry_run
from laser.cli.progress import Bar, Progress
from laser.differences.base import Base, Delta
from laser.differences.formulas import FORMULA_NAMES
from laser.differences.opened import open_stored
from laser.differences.overview import QUANTISED, is_base_quantised
from laser.differences.peft import merge_streamed
from laser.differences.rebuild import Adapted, rebuild, verify_rebuilt
from laser.differences.serving import in_vllm
from laser.differences.unmerge import (
    EARLIER_ADAPTER,
    MODEL,
    REMAINDER,
    AdapterRecord,
    How,
    adapter_found_again,
    all_roles,
    delta_in,
    is_recorded,
    is_resized,
    memory_of_base,
    of_another_unmerge,
    require_adapter_place,
    require_base,
    require_files,
    require_own,
    run_of_unmerge,
    unmerge_into,
)
from laser.errors import RecordError, UsageError
from laser.files import claimed, disk_errors, unfinished
from laser.pipeline import scan_into
from laser.records import plain
from laser.selection import Selection

OF_WHAT = (
    "unmerge writes no reduced copy: of these it takes the scan, of the differences; solving the matrices that changed "
    "comes on top, and is not in the estimate"
)
ADAPTER_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def unmerge_verb(
    base: str,
    tuned: str,
    *,
    output: Path,
    compute: options.ComputeOptions,
    only_lora: bool,
    rounds: int,
    dtype: str,
    work: options.WorkOptions,
) -> None:
    """`laser unmerge`, whose arguments and help are in verbs.py."""
    if rounds < 1:
        raise UsageError(f"{rounds} rounds do nothing; try --rounds {ROUNDS}")
    if dtype not in ADAPTER_DTYPES:
        raise UsageError(f"no adapter is stored as {dtype}; try one of {', '.join(ADAPTER_DTYPES)}")
    if not (unfinished(output) / "old").exists():  # else an earlier adapter is put back first
        require_adapter_place(output, work.force)
    first, second = map(open_stored, (base, tuned))
    require_files(second)
    for checkpoint in (first, second):
        require_outside(checkpoint, output)
    crew = compute.crew()
    method = "gram" if compute.method == "auto" else compute.method
    every = Selection(roles=all_roles(second))
    compared, start, partial = Base.of(first, second), time.perf_counter(), unfinished(output)
    if work.dry_run:
        require_base(compared)
        print_dry_run(second, every, crew, work.as_json)
        if not work.as_json:
            say(OF_WHAT)
        return None
    matrices, delta = list_matrices(second), None
    run = run_of_unmerge(compared.pair, crew, rounds, ADAPTER_DTYPES[dtype])
    with claimed(output):
        require_own(partial)
        record = adapter_found_again(output, run, only_lora)
        if record is None:
            restore_earlier(output, partial / EARLIER_ADAPTER)
            require_adapter_place(output, work.force)
            with disk_errors(output):
                partial.mkdir(parents=True, exist_ok=True)
            common.to_write(output)

            def measured(anew: bool) -> Delta:
                with Progress("delta", matrices) as bar:
                    told = scan_into(
                        delta_in(partial), second, every, crew, method, bar, base=compared, anew=anew
                    ).delta
                assert told is not None, "a scan with a base measures differences"
                return told

            try:
                delta = measured(anew=False)
            except RecordError as error:
                if not work.force:
                    raise of_another_unmerge(partial) from error
                delta = measured(anew=True)
            with Progress("unmerge", matrices) as bar:
                how: dict[str, Any] = {"only_lora": only_lora, "rounds": rounds, "dtype": ADAPTER_DTYPES[dtype]}
                record = unmerge_into(compared, delta, output, crew=crew, force=work.force, tick=bar, **how)
    size = {name: (output / name).stat().st_size for name in (MODEL, REMAINDER)}
    whole, seconds = sum(shard.size for shard in record.shards), time.perf_counter() - start
    if work.as_json:
        entries = [asdict(entry) for entry in record.entries]
        found = {"output": str(output), "base": plain(record.base), "tuned": plain(record.tuned)}
        found |= {"entries": entries, "bytes": size | {"tuned": whole}, "left_out": travelling(second)[1]}
        return common.print_json(found | {"seconds": seconds})
    _print_entries(record)
    _print_resized(record, compared)
    if delta is not None and is_base_quantised(delta.changes):
        say(QUANTISED.format(tuned=second.name, base=first.name))
    say(
        f"{whole / 1e6:.1f} MB of {second.name} are {first.name} and {size[MODEL] / 1e6:.2f} MB of adapter, "
        f"{size[REMAINDER] / 1e6:.2f} MB of remainder; written to {output} in {seconds:.1f} s"
    )
    if left_out := travelling(second)[1]:
        some = f"{', '.join(left_out[:4])}{f' and {len(left_out) - 4} more' if len(left_out) > 4 else ''}"
        say(f"laser rebuild makes no {some}: links, states of a trainer and weights in further files are left out")
    if memory_of_base(compared) is None:
        say(f"whether PEFT finds the modules was not checked: transformers builds no model of {first.name}/config.json")
    if told := in_vllm(output):
        say(told)


def _print_entries(record: AdapterRecord) -> None:
    """What became of the matrices, and what PEFT alone does not apply."""
    kinds: Counter[tuple[str, str, int | str, str]] = Counter()
    missed: Counter[tuple[str, str, int | str, str]] = Counter()
    for e in record.entries:
        row = (e.how, e.kind, e.rank or "-", e.formula or "-")
        kinds[row] += 1
        missed[row] += e.missed or 0
    rows = [(*row, count, missed[row]) for row, count in sorted(kinds.items(), key=str)]
    common.print_table(("made how", "was found", "rank", "formula", "tensors", "bits missed"), rows)
    beyond = [
        e.name for e in record.entries if e.how in (How.WHOLE, How.SCALED) or (e.how is How.ADAPTER and e.place is None)
    ]
    if beyond:
        more = f" and {len(beyond) - 2} more" if len(beyond) > 2 else ""
        say(f"PEFT alone does not apply {', '.join(beyond[:2])}{more}: laser rebuild does")


def _print_resized(record: AdapterRecord, base: Base) -> None:
    """What PEFT loads only where the base's vocabulary has as many rows."""
    ours = {m.name: m for m in list_matrices(base.tuned)}
    resized = [
        (e.name, ours[e.name].shape[0])
        for e in record.entries
        if e.how is How.SAVED and e.name in base.places and is_resized(ours[e.name], base.places[e.name].shape)
    ]
    if resized:
        names, rows = ", ".join(name for name, _ in resized), resized[0][1]
        say(
            f"PEFT loads {names} only into a base with as many rows: call its resize_token_embeddings({rows}) before "
            "that; laser rebuild needs no such step"
        )


def verify_rebuilt_verb(adapter: Path, output: Path, shown_as: options.Json) -> None:
    """`laser verify ADAPTER OUT`: by the sha256 that laser unmerge has recorded."""
    found = verify_rebuilt(adapter, output)
    common.tell_verified(found, f"{found.shards} shards and {found.files} other files as recorded", shown_as.as_json)


def rebuild_verb(base: str, adapter: Path, *, output: Path, formula: str | None, work: options.RecordOptions) -> None:
    """`laser rebuild`, whose arguments and help are in verbs.py."""
    start = time.perf_counter()
    if not (unfinished(output) / "old").exists():  # else an earlier output is put back first
        require_new(output, work.force)
    checkpoint = open_stored(base)
    require_outside(checkpoint, output)
    if not is_recorded(adapter):
        return _merge(checkpoint, adapter, output, formula, work)
    if formula is not None:
        raise UsageError(f"{adapter} says itself how it was merged; try without --formula {formula}")
    total = sum(shard.size for shard in Adapted(checkpoint, adapter).record.shards)
    with Bar("rebuild", total, size=True) as bar:
        common.to_write(output)
        how: dict[str, Any] = {"force": work.force, "tick": lambda t: bar.update(t.end - t.start, t.name)}
        made = rebuild(checkpoint, adapter, output, **how)
    seconds = time.perf_counter() - start
    if work.as_json:
        return common.print_json({"output": str(output), **asdict(made), "seconds": seconds})
    say(
        f"{made.tensors} tensors in {made.shards} shards, {made.size / 1e6:.1f} MB, each shard's sha256 as recorded, "
        f"written to {output} in {seconds:.1f} s"
    )


def _merge(base: Checkpoint, adapter: Path, output: Path, formula: str | None, work: options.RecordOptions) -> None:
    """An adapter without a record."""
    if formula is not None and formula not in FORMULA_NAMES:
        raise UsageError(f"no formula is called {formula!r}; try one of {', '.join(FORMULA_NAMES)}")
    start, total = time.perf_counter(), sum(shard.size for shard in base.shards)
    with Bar("merge", total, size=True) as bar:
        common.to_write(output)
        how: dict[str, Any] = {"force": work.force, "tick": lambda t: bar.update(t.end - t.start, t.name)}
        changed = merge_streamed(base, adapter, output, formula, **how)
    seconds = time.perf_counter() - start
    if work.as_json:
        return common.print_json(
            {"output": str(output), "formula": formula or "peft", "changed": changed, "size": total, "seconds": seconds}
        )
    named = f"formula {formula}" if formula else "PEFT's formulas"
    say(f"{changed} matrices of {base.name} changed, by {named}; written to {output} in {seconds:.1f} s")
