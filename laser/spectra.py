"""Singular values of every selected matrix, kept in one small file so that planning never touches the weights.

`Measured` is one matrix as a scan finds it, and as a line of the scan's journal. `InData` holds the values again in the
metric of the data, where the scan was given moments, and `in_metric_of` puts them in the place of the plain ones.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laser.arrays import ArrayRecord, hash_of
from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.source import Source
from laser.differences.base import Delta
from laser.differences.difference import RULE, SIGMA, Change
from laser.errors import RecordError, UsageError
from laser.moments import Calibration, Moments
from laser.notebook import FrameRows, Shown, drawn
from laser.reasons import Kind, Why, earlier_reason
from laser.records import ASIDE, LATER, SPARSE, has_shape, plain, reader, shown, under
from laser.selection import Selection, parse_layers, parse_roles
from laser.spectral.permutation import NULL_ORDER
from laser.spectral.rules import by_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A line of a journal, by its keys and their types; vectors are base64 of their bytes.
ENTRY: dict[str, Any] = {"name": str, "skipped": str | None, "kurtosis": float | None, "note": str, "step": str}
ENTRY |= {"data_failed": str | None, "values": str, "null": str, "data": str}
OF_DIFFERENCE = ENTRY | {"change": Change}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a scan finds of one matrix: its spectrum (p,), its null's (draws,), the kurtosis, or why there are none."""

    values: NDArray[np.float64]
    null: NDArray[np.float64]
    kurtosis: float | None = None
    skipped: str | None = None
    data: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # the values again in the data's metric
    data_failed: str | None = None  # why not in the data's metric
    note: str = ""  # by which step of the ladder, where it was not the method asked for, and why: for people
    step: str = ""  # that step
    change: Change | None = None  # of a difference: what became of the matrix


def to_entry(name: str, measured: Measured) -> dict[str, Any]:
    """A line of a journal."""
    vectors = {"values": _encode(measured.values), "null": _encode(measured.null)}
    vectors |= {"data": _encode(measured.data)}
    stated = {"name": name, "skipped": measured.skipped, "kurtosis": measured.kurtosis, "note": measured.note}
    stated |= {"step": measured.step}
    stated |= {"data_failed": measured.data_failed} | vectors
    return stated if measured.change is None else stated | {"change": plain(measured.change)}


def from_entry(entry: Any, where: str) -> Measured:
    """Raises RecordError, which begins with `where`, for what no scan writes."""
    try:
        if not isinstance(entry, Mapping) or not (has_shape(entry, ENTRY) or has_shape(entry, OF_DIFFERENCE)):
            raise ValueError
        values, null, data = (_decode(entry[key]) for key in ("values", "null", "data"))
    except ValueError:
        raise RecordError(f"{where} is not what a scan measures; start afresh with --force") from None
    change = reader(Change | None)(entry.get("change"))
    rest = (entry["kurtosis"], entry["skipped"], data, entry["data_failed"], entry["note"], entry["step"], change)
    return Measured(values, null, *rest)


def _encode(vector: NDArray[np.float64]) -> str:
    return base64.b64encode(vector.astype("<f8").tobytes()).decode()


def _decode(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8")


# --- in the metric of the data ----------------------------------------------------------------------------------------

DATA = "laser.data."  # before a tensor's name in the spectra file

Vectors = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class InData:
    """What a scan measures by the data, by name of the matrix.

    calibration: on which text
    seen: how many inputs a matrix has seen, for those that were calibrated
    values: singular values (p,) of W C^(1/2), descending
    failed: why there are none
    """

    calibration: Calibration
    seen: Mapping[str, int]
    values: Vectors = field(default_factory=dict, metadata=ASIDE)
    failed: Mapping[str, str] = field(default_factory=dict, metadata=LATER)

    def vectors(self) -> dict[str, NDArray[np.float64]]:
        """Everything under the names that the file has."""
        return {DATA + n: v for n, v in self.values.items()}

    def unlike(self, sides: Mapping[str, int]) -> str | None:
        """What in it contradicts the rest of a file whose matrices have these smaller sides."""
        for name in (*self.values, *self.failed):
            if name not in self.seen:
                return (
                    f"{name} is measured in the metric of the data, and its data do not say how many inputs it has seen"
                )
        for name, tokens in self.seen.items():
            if not sides.get(name) or tokens < 0:
                return f"{name} has seen {tokens} inputs, expected 0 or more of a matrix of it"
        return None

    @staticmethod
    def of(moments: Moments | None, names: Iterable[str], found: Mapping[str, Measured]) -> InData | None:
        """What was measured of `names`, in their order; a matrix without tokens has no values. None without moments."""
        if moments is None:
            return None
        seen = {name: moments.sites[name].tokens for name in names if name in moments.sites}
        values = {n: found[n].data for n in seen if len(found[n].data)}
        failed = {n: why for n in seen if (why := found[n].data_failed)}
        return InData(moments.calibration, seen, values, failed)


def in_metric_of(asked: str, spectra: Spectra, fewest: int | None = None) -> Spectra:
    """`spectra` with the values that a rule is asked of: the plain ones, or the data's in their place, and `seen`.

    A matrix that saw fewer than `fewest` tokens (default: than it has dimensions p) has no values, and the reason why.
    Raises UsageError where no moments were scanned, or for `fewest` of plain values.
    """
    asks_data = by_data(asked)
    if fewest is not None and (fewest < 0 or not asks_data):
        raise UsageError(
            f"--fewest-tokens {fewest} is for a rule data:NAME, and 0 or more; try --rule data:energy:0.99"
        )
    if not asks_data:
        return spectra
    data = spectra.data
    if data is None:
        raise UsageError("these spectra know no data; try laser calibrate, then laser scan --moments FILE")
    skipped, values = dict(spectra.skipped), {}
    for matrix in spectra.matrices:
        name, p = matrix.name, min(matrix.shape, default=0)
        if name in data.values and data.seen[name] >= (p if fewest is None else fewest):
            values[name] = data.values[name]
        elif name in data.failed:
            skipped[name] = Why(Kind.FAILED, f"skipped: {data.failed[name]}")
        elif name in data.seen:
            skipped[name] = Why(Kind.UNSEEN, f"not seen enough: {seen_by(data.seen[name], p)}")
        elif name in spectra.values:
            skipped[name] = Why(Kind.NOT_CALIBRATED, "not calibrated")
    return replace(spectra, values=values, nulls={}, skipped=skipped, kurtosis={}, seen=data.seen)


def seen_by(tokens: int, p: int) -> str:
    """How many inputs a matrix has seen, and how many it should have at the least."""
    return f"has seen {tokens} tokens of the calibration, and has {p} dimensions"


# --- the record -------------------------------------------------------------------------------------------------------

LARGEST_INTEGER = 2**63 - 1
GONE = "laser.data-null."  # before others in files of earlier versions, which nobody reads any more
NULL = "laser.null."  # before a tensor's name in the file: its permuted matrices' largest singular values


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tensor in the file: Matrix without its slice, and what the scan found of it besides the vectors.

    Whoever reads weights has the checkpoint and lists its matrices anew. Only FP8 says whether it is `scaled`.
    """

    name: str
    role: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    dtype: str
    tensor: str
    scaled: bool | None = field(default=None, metadata=SPARSE)
    stack: str
    skipped: Why | None
    kurtosis: float | None
    note: str = field(default="", metadata=SPARSE)
    step: str = field(default="", metadata=SPARSE)

    def wrong(self) -> str | None:
        if min(self.shape, default=0) < 0 or math.prod(self.shape) > LARGEST_INTEGER:
            return f"shape is {shown(list(self.shape))}"
        return under(self, 0, "layer", "expert")

    @property
    def matrix(self) -> Matrix:
        return Matrix(
            name=self.name, role=self.role, layer=self.layer, expert=self.expert, shape=self.shape, dtype=self.dtype,
            tensor=self.tensor, scaled=bool(self.scaled), stack=self.stack,
        )  # fmt: skip


def _rows_from_texts(header: dict[str, Any]) -> dict[str, Any]:
    """The header of version 2, whose reasons are texts alone and whose rows may lack some keys, as of today."""
    rows = header.get("matrices")
    return header | ({"matrices": [_row_with_kind(row) for row in rows]} if isinstance(rows, list) else {})


def _row_with_kind(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    if isinstance(why := row.get("skipped"), str):
        row = row | {"skipped": plain(earlier_reason(why))}
    # Files of laser 0.1 knew no other tensor, and FP8 only with scales.
    fp8 = {"scaled": True} if str(row.get("dtype")).startswith("F8") else {}
    return {"tensor": row.get("name"), "kurtosis": None, "stack": ""} | fp8 | row


@dataclass(frozen=True, kw_only=True)
class SpectraHeader(
    ArrayRecord, kind="spectra", version=3, earlier={2: _rows_from_texts}, made_by="laser scan MODEL -o FILE"
):
    """What the file says beside the vectors. vectors: their hash. null_order: see `Spectra`."""

    source: Source
    method: str
    device: str
    matrices: tuple[Row, ...]
    data: InData | None = field(default=None, metadata=SPARSE)
    null_order: int = field(default=1, metadata=SPARSE)
    delta: Delta | None = field(default=None, metadata=SPARSE)
    vectors: str

    def wrong(self) -> str | None:
        if len({row.name for row in self.matrices}) < len(self.matrices):
            return "a matrix is in it twice"
        if self.delta is not None and self.source != self.delta.source:
            return "its source is not the difference of the two that it names"
        return self.delta.unlike([row.name for row in self.matrices]) if self.delta else None


@dataclass(frozen=True, repr=False)
class Spectra(Shown):
    """Every tensor of a checkpoint: singular values (p,), float64, descending, or the reason why there are none.

    kurtosis: name -> excess kurtosis of the entries, which moves the edge of noise (spectrum.py)
    nulls: name -> (draws,) largest singular values of the matrix with its entries permuted, for the rule `parallel`;
    empty unless the scan was asked for them
    null_order: by which order of the entries (permutation.NULL_ORDER). 1 is the shuffle of earlier versions, whose
    values have the same law
    data: the values again in the metric of the data, where the scan was given moments
    notes: name -> by which step of the ladder its values were found and which failed, where that was not `method`
    steps: name -> that step, for programs
    seen: name -> how many inputs, where the values are those in the metric of the data; never in a file
    delta: of differences from a base, which two checkpoints and what became of each tensor; the values are then those
    of biwhitened differences, whose noise has sigma = 1
    """

    source: Source
    matrices: tuple[Matrix, ...]
    values: Mapping[str, NDArray[np.float64]]
    skipped: Mapping[str, Why]  # name -> why it has no values
    method: str
    device: str
    nulls: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    kurtosis: Mapping[str, float] = field(default_factory=dict)
    data: InData | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, str] = field(default_factory=dict)
    seen: Mapping[str, int] | None = None
    null_order: int = NULL_ORDER
    delta: Delta | None = None

    @property
    def sigma(self) -> float | None:
        """The level of the noise, where it is known."""
        return None if self.delta is None else SIGMA

    @property
    def usual_rule(self) -> str:
        """The rule to ask where none is named."""
        return "mp-edge" if self.delta is None else RULE

    @cached_property
    def by_name(self) -> Mapping[str, Matrix]:
        """The matrices by name."""
        return {matrix.name: matrix for matrix in self.matrices}

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Singular values (p,) of the matrix of that name. Raises KeyError with names that there are."""
        if name in self.values:
            return self.values[name]
        near = [n for n in self.values if name in n][:3] or list(self.values)[:3]
        raise KeyError(f"{name!r} was not measured in {self.source.name}; try one of {', '.join(near)}")

    def select(
        self,
        layers: str | Sequence[int | str] = (),
        roles: str | Sequence[str] = (),
        include: str | None = None,
        exclude: str | None = None,
    ) -> Spectra:
        """As if only these had been scanned. layers: "0,4,20-31" or numbers; roles: "w1,q" or a list.

        Raises UsageError for what matches nothing in this model.
        """
        places = parse_layers(layers) if isinstance(layers, str) else tuple(layers)
        kinds = parse_roles(roles) if isinstance(roles, str) else tuple(roles)
        chosen = Selection(places, kinds, include, exclude)
        chosen.check(self.matrices)
        left = {m.name: why for m in self.matrices if (why := chosen.why_not(m)) is not None}
        values = {name: s for name, s in self.values.items() if name not in left}
        return replace(self, values=values, skipped={**self.skipped, **left})

    def headline(self) -> str:
        measured = f"{len(self.values)} of {len(self.matrices)} tensors measured"
        return f"Spectra of {self.source.name}: {measured}, by {self.method} on {self.device}"

    def frame_rows(self) -> FrameRows:
        """A row for every tensor; numbers are None where it has no spectrum, and `skipped` says why."""
        rows = []
        for m in self.matrices:
            s, why = self.values.get(m.name), self.skipped.get(m.name)
            rows.append(
                {
                    "name": m.name, "role": m.role, "layer": m.layer, "expert": m.expert, "stack": m.stack,
                    "shape": "x".join(map(str, m.shape)), "dtype": m.dtype,
                    "s_1": None if s is None else float(s[0]),
                    "median": None if s is None else float(np.median(s)),
                    "norm": None if s is None else float(np.linalg.norm(s)),
                    "stable_rank": None if s is None or not s[0] else float(np.sum((s / s[0]) ** 2)),
                    "kurtosis": self.kurtosis.get(m.name), "skipped": None if why is None else why.text,
                }
            )  # fmt: skip
        return rows

    def plot(self, name: str | None = None, rule: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw the spectrum of the matrix `name` with the law of noise and the cut, on `ax` if there is one.

        Without a name, which share of its values the rule keeps of every matrix, layer by role. rule: default mp-edge,
        of differences `rounding`. Raises UsageError for a matrix that was not scanned.
        """
        return drawn("plot_spectra", self, name, rule, ax=ax)

    def glance(self) -> tuple[FrameRows, Sequence[float]]:
        """A row for each role, and the largest singular values over the matrices in file order."""
        found: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
        for m in self.matrices:
            if m.name in self.values:
                found.setdefault((m.role, "x".join(map(str, m.shape))), []).append(self.values[m.name])
        rows = [
            {
                "role": role, "shape": shape, "matrices": len(several),
                "mean s_1": float(np.mean([s[0] for s in several])),
                "mean median s": float(np.mean([np.median(s) for s in several])),
            }
            for (role, shape), several in found.items()
        ]  # fmt: skip
        return rows, [float(s[0]) for s in self.values.values()]

    def save(self, path: Path) -> None:
        """One safetensors file: a float64 vector per scanned tensor, everything else as JSON in `__metadata__`."""
        vectors = dict(self.values) | {NULL + name: null for name, null in self.nulls.items()}
        vectors |= self.data.vectors() if self.data else {}
        rows = tuple(map(self._row, self.matrices))
        header = SpectraHeader(
            source=self.source, method=self.method, device=self.device, matrices=rows, data=self.data,
            delta=self.delta, null_order=self.null_order if self.nulls else 1, vectors=hash_of(vectors),
        )  # fmt: skip
        header.save(path, vectors)

    def _row(self, m: Matrix) -> Row:
        return Row(
            name=m.name, role=m.role, layer=m.layer, expert=m.expert, shape=m.shape, dtype=m.dtype, tensor=m.tensor,
            scaled=m.scaled if m.dtype.startswith("F8") else None, stack=m.stack,
            skipped=self.skipped.get(m.name), kurtosis=self.kurtosis.get(m.name), note=self.notes.get(m.name, ""),
            step=self.steps.get(m.name, ""),
        )  # fmt: skip

    @staticmethod
    def load(path: str | Path) -> Spectra:
        """Raises RecordError for a file that is missing, damaged or of another version."""
        path = Path(path)
        with SpectraHeader.opened(path, "numpy") as file:
            document = SpectraHeader.document_in(file, path)
            vectors = {name: file.get_tensor(name) for name in file.keys()}
        header = SpectraHeader.from_document(document, path)
        rows, data = header.matrices, header.data
        values = {name: vector for name, vector in vectors.items() if not name.startswith((NULL, DATA, GONE))}
        nulls = {name.removeprefix(NULL): vector for name, vector in vectors.items() if name.startswith(NULL)}
        if data:
            data = replace(data, values={n.removeprefix(DATA): v for n, v in vectors.items() if n.startswith(DATA)})
        skipped = {row.name: row.skipped for row in rows if row.skipped is not None}
        kurtosis = {row.name: row.kurtosis for row in rows if row.kurtosis is not None}
        notes = {row.name: row.note for row in rows if row.note}
        steps = {row.name: row.step for row in rows if row.step}
        matrices = tuple(row.matrix for row in rows)
        spectra = Spectra(
            header.source, matrices, values, skipped, header.method, header.device, nulls, kurtosis, data, notes, steps,
            null_order=header.null_order if nulls else NULL_ORDER, delta=header.delta,
        )  # fmt: skip
        if wrong := _wrong(spectra):
            raise RecordError(f"{path}: {wrong}; {SpectraHeader.mend}")
        SpectraHeader.require_seal(document if header.vectors == hash_of(vectors) else None, path)
        return spectra


def _wrong(spectra: Spectra) -> str | None:
    """What of the vectors does not belong to the matrices, or is no spectrum."""
    sides = {m.name: min(m.shape) if m.is_matrix else 0 for m in spectra.matrices}
    if unsaid := next((n for n in sides if (n in spectra.values) == (n in spectra.skipped)), None):
        return f"{unsaid} has both singular values and a reason why not, or neither"
    data = spectra.data
    if data and (wrong := data.unlike(sides)):
        return wrong
    for vectors in (spectra.values, data.values if data else {}):
        for name, s in vectors.items():
            if not sides.get(name):
                return f"{name} has singular values and is no matrix of it"
            if s.dtype != np.float64 or s.shape != (sides[name],):
                return f"{name} has {s.dtype} values of shape {list(s.shape)}, expected float64 {[sides[name]]}"
            if not np.isfinite(s).all() or (s < 0).any() or (np.diff(s) > 0).any():
                return f"{name} has values that are not falling, finite and 0 or more, as singular values are"
    for name, null in spectra.nulls.items():
        plain = null.dtype == np.float64 and null.ndim == 1
        if not sides.get(name) or not plain or not np.isfinite(null).all() or (null < 0).any():
            return f"{name} has permutations that are not a list of finite float64 values of 0 or more"
    return None


def assemble(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    found: Mapping[str, Measured],
    skipped: Mapping[str, Why],
    method: str,
    device: str,
    null_draws: int,
) -> Spectra:
    """The record of what was found, in file order whatever the order in which it was found."""
    failed = {name: Why(Kind.FAILED, m.skipped) for name, m in found.items() if m.skipped is not None}
    reasons = dict(skipped) | failed
    whole = {m.name: found[m.name] for m in matrices if m.name in found and found[m.name].skipped is None}
    values = {name: m.values for name, m in whole.items()}
    nulls = {name: m.null for name, m in whole.items()} if null_draws else {}
    kurtosis = {name: m.kurtosis for name, m in whole.items() if m.kurtosis is not None}
    notes = {name: m.note for name, m in whole.items() if m.note}
    steps = {name: m.step for name, m in whole.items() if m.step}
    record = Spectra(Source.of(checkpoint), tuple(matrices), values, reasons, method, device, nulls, kurtosis)
    record = replace(record, notes=notes, steps=steps)
    if wrong := _wrong(record):  # found in a journal
        raise RecordError(f"{checkpoint.name}: {wrong}; start afresh with --force")
    return record
