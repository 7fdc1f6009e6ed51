"""Which weights these are: names, shapes and headers of two fine-tunes are equal, so their bytes are looked at.

A small checkpoint is read whole. Of a larger one every tensor gives its first and last bytes and a few places between,
chosen by its name: some thousand short reads, whatever the size. Shards that lie on the Hub are not sampled, for there
the Hub's own hashes of the files are known. Both kinds are kept where both are known; see `agree`.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laser.checkpoint.cuts import bytes_of
from laser.checkpoint.headers import CHUNK, Shard, TensorInfo, read_bytes, sha256_of
from laser.checkpoint.regular import raw_regular
from laser.errors import CheckpointError

if TYPE_CHECKING:
    from laser.checkpoint.reader import Checkpoint

WHOLE = 64 << 20  # bytes of weights up to which a checkpoint is read whole: a fraction of a second
PAGE = 4096  # bytes of one read, the unit in which disks and caches move them
BETWEEN = 4  # reads between the first and the last of a tensor: 6 in all, 5,000 for Mixtral-8x7B
READERS = 16  # reads under way at a time, so that a disk far away is waited for 16 at once


@dataclass(frozen=True)
class Fingerprint:
    """Which weights these are, by hashes of them.

    samples: sha256 over bytes of every tensor; None where they lie on the Hub
    content: one hash over the hashes that the Hub has of the files; None elsewhere
    """

    samples: str | None = None
    content: str | None = None

    def told(self) -> dict[str, str]:
        """The hashes that are known, for records."""
        known = {"content": self.content, "samples": self.samples}
        return {kind: digest for kind, digest in known.items() if digest}

    @property
    def short(self) -> str:
        """The first digits of a hash, for messages."""
        return (self.samples or self.content or "unknown")[:12]


def fingerprint_of(checkpoint: Checkpoint) -> Fingerprint:
    """The fingerprint of the weights as they are now."""
    content = checkpoint.hub.content if checkpoint.hub else None
    remote = checkpoint.hub is not None and not all(shard.path.exists() for shard in checkpoint.shards)
    # A server that states no hashes is asked for ranges: slow, but not wrong.
    return Fingerprint(None if remote and content else samples_of(checkpoint.shards), content)


def samples_of(shards: Sequence[Shard]) -> str:
    """sha256 over each tensor's name, dtype, shape and sampled bytes: the same however they are spread over files."""
    whole = sum(shard.size for shard in shards) <= WHOLE
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
    try:
        with raw_regular(shard.path) as file, ThreadPoolExecutor(READERS) as pool:
            handle = file.fileno()
            return list(pool.map(lambda t: _of_tensor(shard, t, handle, whole), shard.tensors))
    except OSError as error:
        raise CheckpointError(f"cannot read {shard.path}: {error.strerror}; download it again") from error


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


# --- comparing --------------------------------------------------------------------------------------------------------


def agree(a: Fingerprint, b: Fingerprint) -> bool | None:
    """Whether the two are of the same weights: equal in every kind that both know; None where they share no kind."""
    pairs = [(x, y) for x, y in ((a.content, b.content), (a.samples, b.samples)) if x and y]
    return all(x == y for x, y in pairs) if pairs else None


def fingerprint_in(record: Mapping[str, Any]) -> Fingerprint:
    """What a record or journal states of weights."""
    samples, content = (told if isinstance(told := record.get(key), str) else None for key in ("samples", "content"))
    return Fingerprint(samples, content)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Keys in which two descriptions of a run differ. The model's name does not count, and its weights are compared
    by what both know of them."""
    aside = {"samples", "content", "model"}
    different = sorted(k for k in (found.keys() | expected.keys()) - aside if found.get(k) != expected.get(k))
    a, b = fingerprint_in(found), fingerprint_in(expected)
    same = agree(a, b) or (a == b and "source" not in different)
    return different if same else [*different, "weights"]


def content_by_reading(checkpoint: Checkpoint) -> str | None:
    """The hash that the Hub would tell of a checkpoint's files, found by reading them whole; None for a view."""
    lines = []
    for shard in sorted(checkpoint.shards, key=lambda s: s.name):
        if shard.data is not None:
            return None
        lines.append(f"{shard.name} {sha256_of(shard.path)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- while they are read ----------------------------------------------------------------------------------------------

Stamp = tuple[int, int]  # size, mtime in ns


def stamp_of(path: Path) -> Stamp | None:
    """What changes when a file does; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def require_unchanged(checkpoint: Checkpoint, gone: Iterable[str] = ()) -> None:
    """Raises CheckpointError where the weights are not what they were when the checkpoint was opened: what was made of
    them meanwhile is of neither. `gone`: names of shards that were dropped on purpose. The Hub's files are checked as
    they come."""
    checkpoint, dropped = checkpoint.origin or checkpoint, set(gone)
    for shard in checkpoint.shards:
        if shard.stamp is not None and shard.name not in dropped:
            require_stamp(shard.path, shard.stamp)
    if not dropped and not agree(fingerprint_of(checkpoint), checkpoint.fingerprint):
        raise _changed(checkpoint.path)


def require_stamp(path: Path, stamp: Stamp | None) -> None:
    """Raises CheckpointError for a file that is not what it was."""
    if stamp_of(path) != stamp:
        raise _changed(path)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was read, so the result would be of no model; let nothing write there, and run the "
        "command again with --force"
    )
