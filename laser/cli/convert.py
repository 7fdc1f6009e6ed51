"""The verb convert: a model in another format to a directory as the Hub has it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from laser.checkpoint.convert import write_directory
from laser.checkpoint.mistral import as_hub, is_release
from laser.checkpoint.reader import open_checkpoint
from laser.cli import common
from laser.errors import UsageError

# What a tokenizer may need, copied as it is; weights and params.json stay behind.
TOKENIZERS = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


def convert(
    model: Annotated[Path, typer.Argument(metavar="SRC", help="Directory in Mistral's release format.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new directory.")],
    as_json: common.Json = False,
) -> None:
    """Translate a model into the Hub's format, with the same logits: today from Mistral's own releases
    (params.json and consolidated*.safetensors or .pt). Tokenizer files are copied byte for byte."""
    checkpoint = open_checkpoint(model)
    if not is_release(checkpoint):
        raise UsageError(f"{model} is in the Hub's format already; try laser scan {model}")
    start, seen = time.perf_counter(), as_hub(checkpoint)
    side = sorted({path for pattern in TOKENIZERS for path in checkpoint.path.glob(pattern) if path.is_file()})
    size = sum(shard.size for shard in seen.shards)
    with tqdm(desc="convert", total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        write_directory(
            seen, output, {path.name: path.read_bytes() for path in side}, tick=lambda t: bar.update(t.end - t.start)
        )
    seconds = time.perf_counter() - start
    if as_json:
        copied = [path.name for path in side]
        return common.print_json(
            {"output": str(output), "tensors": len(seen.tensors), "bytes": size, "copied": copied, "seconds": seconds}
        )
    print(f"{len(seen.tensors)} tensors, {size / 1e9:.2f} GB, written to {output} in {seconds:.1f} s")
