"""Open a model as people name it: a checkpoint, or BASE+ADAPTER, a base with a PEFT adapter merged as it is read."""

from __future__ import annotations

import shlex
from pathlib import Path

from laser.checkpoint.hub import ID, fetched
from laser.checkpoint.reader import Checkpoint, by_whole_shards, open_checkpoint
from laser.differences.base import Base
from laser.differences.peft import with_adapter_merged
from laser.differences.unmerge import CONFIG, MODEL, is_recorded
from laser.errors import CheckpointError, UsageError


def open_model(model: str | Path, need: str = "ranges") -> Checkpoint:
    """As `open_checkpoint`, also of BASE+ADAPTER, each a directory or a Hub id. What is called so itself goes first.

    The merge is that of `laser rebuild`, one matrix at a time. Raises UsageError for an adapter that cannot be merged.
    """
    if not is_sum(model):
        return open_checkpoint(model, need)
    base, adapter, folder = _parts_of_sum(str(model))
    if is_recorded(folder):
        raise UsageError(
            f"{folder} is what laser unmerge wrote, and merged alone it would leave out the remainder; make the "
            f"fine-tune with laser rebuild {base} {folder} -o TUNED, and try that"
        )
    # Its other files lie in the snapshot of the base, where they are looked for.
    opened = open_checkpoint(base, "files" if need == "ranges" else need)
    return with_adapter_merged(by_whole_shards(opened), folder, given=(base, adapter))


def is_sum(model: str | Path) -> bool:
    """Whether it is called BASE+ADAPTER, and nothing lies there that is called so itself."""
    return "+" in str(model) and not (Path(model).exists() or Path(model).is_symlink())


def open_stored(model: str) -> Checkpoint:
    """A checkpoint whose own files are needed. Raises UsageError for BASE+ADAPTER, which is in none."""
    try:
        return open_checkpoint(model, "files")
    except CheckpointError as error:
        if not is_sum(model):
            raise
        raise in_no_files(model) from error


def in_no_files(whole: str) -> UsageError:
    """What to say of BASE+ADAPTER where the bytes of files are needed."""
    base, _, folder = _parts_of_sum(whole)
    return UsageError(
        f"{whole} is in no files, and their bytes are needed here; make them with "
        f"`laser rebuild {shlex.join((base, str(folder)))} -o OUT`, and try OUT"
    )


def opened_model(model: Checkpoint | str | Path) -> Checkpoint:
    """The checkpoint, opened where only its name is given."""
    return model if isinstance(model, Checkpoint) else open_model(model)


def _parts_of_sum(whole: str) -> tuple[str, str, Path]:
    """The base's name, the adapter's, and its folder. A name may hold a + itself: the first behind which one lies."""
    places = [(whole[:at], whole[at + 1 :]) for at, sign in enumerate(whole) if sign == "+"]
    for base, adapter in places:
        if (Path(adapter) / CONFIG).is_file():
            return base, adapter, Path(adapter)
    there = [pair for pair in places if Path(pair[0]).is_dir()]  # a directory's own + is no sign of a sum
    base, adapter = there[-1] if there else (whole.partition("+")[0], whole.partition("+")[2])
    if "+" in adapter and not there and ID.fullmatch(base) is None:
        raise CheckpointError(
            f"no such model: {whole} is no directory, and none is called {' or '.join(pair[0] for pair in places)}; "
            "try BASE+ADAPTER with the directory or Hub id of each"
        )
    if "+" in adapter:
        raise UsageError(
            f"{whole} names {len(places)} adapters, expected BASE+ADAPTER; merge one with laser rebuild first"
        )
    if not Path(adapter).exists() and (folder := fetched(adapter, (CONFIG, MODEL))) is not None:
        return base, adapter, folder
    raise CheckpointError(
        f"no such model: {whole} is no directory, and {adapter or 'what follows the +'} is no PEFT adapter with "
        f"{CONFIG}; try BASE+ADAPTER with the directory or Hub id of each"
    )


def base_named(base: Base | Checkpoint | str | Path | None, tuned: Checkpoint) -> Base | None:
    """The base of a fine-tune, opened where only its name is given; None stays None."""
    return base if base is None or isinstance(base, Base) else Base.of(opened_model(base), tuned)
