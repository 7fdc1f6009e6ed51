"""The same visits as tasks of a Ray cluster; Ray is an extra and imported only here."""

from __future__ import annotations

from collections.abc import Sequence

from laser.checkpoint.families import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.errors import UsageError
from laser.workers import Crew, T, Visits, Work


def visit_on_ray(checkpoint: Checkpoint, matrices: Sequence[Matrix], work: Work[T], crew: Crew) -> Visits[T]:
    """As `laser.workers.visit`."""
    raise UsageError("the engine ray is not there yet; try --engine threads")
    yield
