"""Which checkpoint a record speaks of, and whether it is still the one that was opened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from laser.checkpoint.fingerprint import changed, fingerprint_of, require_stamp
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import sha256_of
from laser.errors import RecordError
from laser.records import LATER, SPARSE, Fingerprint, agree, under


@dataclass(frozen=True)
class Source:
    """Which checkpoint a record speaks of: its name, and a hash of config, index and headers.

    parameters: numbers in its shards, by their headers; unindexed: how many of them no matrix speaks of: 0 since laser
    reads every tensor of a shard. content, samples: which weights they are, see `Fingerprint`.
    made_of: of BASE+ADAPTER, the identity of the base and sha256 of the adapter's files, by their names.
    """

    name: str
    identity: str
    parameters: int | None = field(default=None, metadata=LATER)  # None in records of laser 0.1
    unindexed: int = field(default=0, metadata=LATER)
    content: str | None = field(default=None, metadata=LATER)
    samples: str | None = field(default=None, metadata=LATER)
    made_of: Mapping[str, str] | None = field(default=None, metadata=SPARSE)

    @staticmethod
    def of(checkpoint: Checkpoint) -> Source:
        stored = sum(math.prod(t.shape) for shard in checkpoint.shards for t in shard.tensors)
        named = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
        weights, made_of = checkpoint.fingerprint, None
        if checkpoint.on_top is not None and checkpoint.origin is not None:
            made_of = {checkpoint.origin.name: checkpoint.origin.identity, **checkpoint.on_top.sums}
        return Source(
            checkpoint.name, checkpoint.identity, stored, stored - named, weights.content, weights.samples, made_of
        )

    def wrong(self) -> str | None:
        return under(self, 0, "parameters", "unindexed")

    @property
    def weights(self) -> Fingerprint:
        return Fingerprint(self.samples, self.content)

    def stated(self) -> dict[str, str]:
        """For a journal: what identifies the weights, as far as it is known, and their name for messages."""
        return {"source": self.identity, "model": self.name} | self.weights.stated()

    def is_of(self, other: Source) -> bool:
        """Whether the two surely speak of the same weights."""
        return self.identity == other.identity and agree(self.weights, other.weights) is True

    def require(self, checkpoint: Checkpoint, what: str) -> None:
        """Raises RecordError unless `what` was made from these very weights.

        A record of a model on the Hub knows the hashes of its files; a directory is then read whole and hashed.
        """
        other = Source.of(checkpoint)
        if self.identity != other.identity:
            raise RecordError(
                f"the {what} was made from {self.name} ({self.identity[:12]}), found {other.name} "
                f"({other.identity[:12]}); make the {what} again from this checkpoint"
            )
        same = agree(self.weights, other.weights)
        if same is None and self.content:
            same = self.content == content_by_reading(checkpoint)
        if same is None:
            repo = checkpoint.hub.repo if checkpoint.hub else other.name
            raise RecordError(
                f"the {what} knows sampled bytes of {self.name}, and of {other.name} on the Hub only the hashes of its "
                f"files are known, so nobody can tell whether they are the same; try `hf download {repo}` and the same "
                f"command, or make the {what} again from this model"
            )
        if not same:
            raise RecordError(
                f"the {what} was made from other weights of {self.name}: found {other.name} ({other.weights.short}), "
                f"expected {self.name} ({self.weights.short}), of the same names and shapes; if it was changed on the "
                f"Hub, name its old revision, else make the {what} again from this model"
            )


def content_by_reading(checkpoint: Checkpoint) -> str | None:
    """The hash that the Hub would tell of a checkpoint's files, found by reading them whole; None for a view."""
    lines = []
    for shard in sorted(checkpoint.shards, key=lambda s: s.name):
        if shard.data is not None:
            return None
        lines.append(f"{shard.name} {sha256_of(shard.path)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def require_unchanged(checkpoint: Checkpoint, gone: Iterable[str] = (), stamps_only: bool = False) -> None:
    """Raises CheckpointError where the weights are not what they were when the checkpoint was opened: what was made of
    them meanwhile is of neither. `gone`: names of shards that were dropped on purpose. The Hub's files are checked as
    they come. stamps_only: by sizes and times of the files, for what is asked again and again."""
    dropped = set(gone)
    while checkpoint.origin is not None:
        for path, stamp in checkpoint.on_top.stamps.items() if checkpoint.on_top else ():
            require_stamp(path, stamp)
        checkpoint = checkpoint.origin
    for shard in checkpoint.shards:
        if shard.stamp is not None and shard.name not in dropped:
            require_stamp(shard.path, shard.stamp)
    if stamps_only or dropped:
        return
    if not agree(fingerprint_of(checkpoint.shards, checkpoint.hub), checkpoint.fingerprint):
        raise changed(checkpoint.path)
