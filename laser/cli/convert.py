"""The verb convert: a model in another format to a directory as the Hub has it."""

from __future__ import annotations

import time
from pathlib import Path

from laser.checkpoint.convert import require_new, write_directory
from laser.checkpoint.fingerprint import require_stamp, stamp_of
from laser.checkpoint.formats import is_gguf
from laser.checkpoint.gguf import open_gguf, tokenizer_files
from laser.checkpoint.mistral import as_hub, is_release
from laser.checkpoint.reader import Checkpoint, open_checkpoint
from laser.checkpoint.side_files import read_own
from laser.checkpoint.source import require_unchanged
from laser.checkpoint.writer import require_outside
from laser.cli import common, options
from laser.cli.common import say
from laser.cli.progress import Bar
from laser.errors import CheckpointError, UsageError

# What a tokenizer may need, copied as it is; weights and params.json stay behind.
TOKENIZERS = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


def convert_verb(
    model: Path,
    *,
    output: Path,
    dtype: str | None,
    shown_as: options.Json,
) -> None:
    """`laser convert`, whose arguments and help are in verbs.py."""
    start = time.perf_counter()
    require_new(output)
    if is_gguf(model):
        stamp = stamp_of(model)
        seen, side = open_gguf(model, dtype), tokenizer_files(model)

        def check() -> None:
            require_stamp(model, stamp)

    else:
        if dtype is not None:
            raise UsageError("--output-dtype is for GGUF files; a release keeps its own")
        release = open_checkpoint(model)
        require_outside(release, output)
        seen, side = _from_release(release, model)

        def check() -> None:
            require_unchanged(release)

    size = sum(shard.size for shard in seen.shards)
    with Bar("convert", size, size=True) as bar:
        files = {} if isinstance(side, str) else side
        common.to_write(output)
        write_directory(seen, output, files, tick=lambda t: bar.update(t.end - t.start, t.name), check=check)
    seconds = time.perf_counter() - start
    if shown_as.as_json:
        copied = sorted(files)
        return common.print_json(
            {"output": str(output), "tensors": len(seen.tensors), "bytes": size, "copied": copied, "seconds": seconds}
        )
    say(f"{len(seen.tensors)} tensors, {size / 1e9:.2f} GB, written to {output} in {seconds:.1f} s")
    if isinstance(side, str):
        say(f"no tokenizer could be made of the file ({side}); copy one from the model on the Hub")


def _from_release(checkpoint: Checkpoint, model: Path) -> tuple[Checkpoint, dict[str, bytes]]:
    if not is_release(checkpoint):
        raise UsageError(f"{model} is in the Hub's format already; try laser scan {model}")
    side = sorted({path for pattern in TOKENIZERS for path in checkpoint.path.glob(pattern)})
    found = {path.name: read_own(checkpoint.path, path.name) for path in side}
    if lost := [path for path in side if found[path.name] is None and path.is_symlink()]:
        raise CheckpointError(
            f"{lost[0]} is a link to {lost[0].readlink()}, and what a link leads to is not copied; put a copy in its "
            "place"
        )
    return as_hub(checkpoint), {name: data for name, data in found.items() if data is not None}
