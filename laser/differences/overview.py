"""What a fine-tune did, in a few lines: the tensors of a role that fared alike, and whether the base is its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from laser.checkpoint.matrices import Matrix
from laser.differences.difference import AGREE, Change, Verdict, looks_quantised

# They say nothing of whether it is the base.
UNTOLD = (Verdict.SHAPE, Verdict.MISSING, Verdict.ADDED, Verdict.NOT_FINITE)


@dataclass(frozen=True)
class OverviewRow:
    """Tensors of one role and kind. Means are over those that have the figure; None where none has.

    layers: as --layers takes them; ranks: lowest and highest
    """

    role: str
    kind: Verdict
    tensors: int
    layers: str
    ranks: tuple[int, int] | None
    energy: float | None
    share: float | None
    moved: float | None
    rest: float | None


def overview_rows(matrices: Sequence[Matrix], changes: Mapping[str, Change]) -> list[OverviewRow]:
    """Every tensor in one row, in the order in which roles and kinds first appear; what is missing last."""
    groups: dict[tuple[str, Verdict], list[tuple[Matrix | None, Change]]] = {}
    known = {m.name: m for m in matrices}
    for name in [*known, *(name for name in changes if name not in known)]:
        matrix, change = known.get(name), changes[name]
        groups.setdefault((matrix.role if matrix else "-", change.kind), []).append((matrix, change))
    return [_row(role, kind, group) for (role, kind), group in groups.items()]


def _row(role: str, kind: Verdict, group: Sequence[tuple[Matrix | None, Change]]) -> OverviewRow:
    def mean(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if known else None

    changes = [change for _, change in group]
    ranks = [c.rank for c in changes if c.rank is not None]
    return OverviewRow(
        role,
        kind,
        len(group),
        spans_of(m.layer for m, _ in group if m is not None and m.layer is not None),
        (min(ranks), max(ranks)) if ranks else None,
        *(mean(getattr(c, key) for c in changes) for key in ("energy", "share", "moved", "rest")),
    )


def spans_of(layers: Iterable[int]) -> str:
    """`0-3,7`: layer numbers as --layers takes them."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def is_base(matrices: Sequence[Matrix], changes: Mapping[str, Change]) -> bool:
    """Whether anything of the base is left in a matrix of the tuned checkpoint, or nothing can be said."""
    told = [changes[m.name] for m in matrices if m.is_matrix and changes[m.name].kind not in UNTOLD]
    return not told or any(c.kind is not Verdict.OTHER and (c.cosine is None or c.cosine >= AGREE) for c in told)


def is_base_quantised(changes: Mapping[str, Change]) -> bool:
    """Whether most of what changed in all directions looks as if the base had been quantised before it was tuned."""
    full = [change for change in changes.values() if change.kind is Verdict.FULL]
    return sum(map(looks_quantised, full)) > len(full) / 2


QUANTISED = (
    "{tuned} looks as if {base} had been quantised before it was tuned: the differences hold the errors of a grid; "
    "try the quantised base, converted back to 16 bits"
)
