"""Which weights these are, by their bytes.

Names, shapes and headers of two fine-tunes are equal, so bytes are looked at. A small checkpoint is read whole. Of a
larger one every tensor gives its first and last bytes and a few places between, chosen by its name: some thousand short
reads, whatever the size. Shards that lie on the Hub are not sampled, for there the Hub's own hashes of the files are
known. Both kinds are kept where both are known; see `agree`.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from laser.checkpoint.hub import Hub
from laser.checkpoint.safetensors import CHUNK, Shard, TensorInfo, read_bytes
from laser.checkpoint.slices import bytes_of
from laser.errors import CheckpointError
from laser.files import raw_regular
from laser.records import Fingerprint

READ_WHOLE = 64 << 20  # bytes of weights up to which a checkpoint is read whole: a fraction of a second
PAGE = 4096  # bytes of one read, the unit in which disks and caches move them
BETWEEN = 4  # reads between the first and the last of a tensor: 6 in all, 5,000 for Mixtral-8x7B
READERS = 16  # reads under way at a time, so that a disk far away is waited for 16 at once


def fingerprint_of(shards: Sequence[Shard], hub: Hub | None) -> Fingerprint:
    """The fingerprint of the weights as they are now. hub: where they come from, if that is the Hub."""
    content = hub.content if hub else None
    remote = hub is not None and not all(shard.path.exists() for shard in shards)
    # A server that states no hashes is asked for ranges: slow, but not wrong.
    return Fingerprint(None if remote and content else samples_of(shards), content)


def samples_of(shards: Sequence[Shard]) -> str:
    """sha256 over each tensor's name, dtype, shape and sampled bytes: the same however they are spread over files."""
    whole = sum(shard.size for shard in shards) <= READ_WHOLE
    digests: list[tuple[str, str, bytes]] = []
    for shard in shards:  # a pickle is opened once, and its tensors are read one after the other
        if shard.data is not None:
            found = [_of_tensor(shard, t, None, whole) for t in shard.tensors]
        else:
            found = _of_file(shard, whole)
        digests += [(t.name, shard.name, digest) for t, digest in zip(shard.tensors, found, strict=True)]
    total = hashlib.sha256()
    for _, _, digest in sorted(digests):
        total.update(digest)
    return total.hexdigest()


def _of_file(shard: Shard, whole: bool) -> list[bytes]:
    digests = [b""] * len(shard.tensors)
    try:
        with raw_regular(shard.path) as file, ThreadPoolExecutor(READERS) as pool:
            handle = file.fileno()

            def read(first: int) -> list[bytes]:
                return [_of_tensor(shard, t, handle, whole) for t in shard.tensors[first::READERS]]

            # A task for each reader: one for each tensor takes longer than the tensor, where there are thousands.
            for first, found in enumerate(pool.map(read, range(READERS))):
                digests[first::READERS] = found
    except OSError as error:
        raise CheckpointError(f"cannot read {shard.path}: {error.strerror}; download it again") from error
    return digests


def places_of(tensor: TensorInfo, whole: bool) -> list[tuple[int, int]]:
    """Byte ranges of a tensor's shard that stand for it: all of it, or its ends and BETWEEN pages drawn by its name."""
    size = tensor.end - tensor.start
    if whole or size <= (BETWEEN + 2) * PAGE:
        return [(at, min(at + CHUNK, tensor.end)) for at in range(tensor.start, tensor.end, CHUNK)]
    draw = random.Random(tensor.name)  # the same on every machine: seeded by a string through sha512
    pages = sorted(draw.sample(range(1, size // PAGE), BETWEEN))
    starts = [0, *(page * PAGE for page in pages), size - PAGE]
    return [(tensor.start + at, tensor.start + at + PAGE) for at in starts]


def _of_tensor(shard: Shard, tensor: TensorInfo, file: int | None, whole: bool) -> bytes:
    digest = hashlib.sha256(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode("utf-8", "surrogatepass"))
    for start, end in places_of(tensor, whole):
        data = bytes_of(read_bytes(shard, start, end)) if file is None else os.pread(file, end - start, start)
        if len(data) != end - start:
            raise CheckpointError(
                f"{shard.name} ends at byte {start + len(data)}, expected {end}: it changed; run again"
            )
        digest.update(data)
    return digest.digest()


# --- while they are read ----------------------------------------------------------------------------------------------

Stamp = tuple[int, int]  # size, mtime in ns


def stamp_of(path: Path) -> Stamp | None:
    """What changes when a file does; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def require_stamp(path: Path, stamp: Stamp | None) -> None:
    """Raises CheckpointError for a file that is not what it was."""
    if stamp_of(path) != stamp:
        raise changed(path)


def changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was read, so the result would be of no model; let nothing write there, and run the "
        "command again with --force"
    )
