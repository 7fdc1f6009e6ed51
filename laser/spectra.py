"""Singular values of every selected matrix, kept in one small file so that planning never touches the weights."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.source import Source
from laser.errors import RecordError, UsageError, first_line
from laser.files import require_regular, write_atomically
from laser.moments import Calibration, Moments
from laser.reasons import Kind, Why, earlier_reason
from laser.records import (
    check_header,
    decode,
    has_shape,
    parse,
    require_finite,
    require_keys,
    require_sealed,
    sealed,
    shown,
    value_of,
)
from laser.spectral.rules import by_data

# A line of a journal, by its keys and their types; vectors are base64 of their bytes.
ENTRY: dict[str, Any] = {"name": str, "skipped": str | None, "kurtosis": float | None, "note": str}
ENTRY |= {"data_failed": str | None, "values": str, "null": str, "data": str}


@dataclass(frozen=True)
class Measured:
    """What a scan finds of one matrix: its spectrum (p,), its null's (draws,), the kurtosis, or why there are none."""

    values: NDArray[np.float64]
    null: NDArray[np.float64]
    kurtosis: float | None = None
    skipped: str | None = None
    data: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))  # the values again in the data's metric
    data_failed: str | None = None  # why not in the data's metric
    note: str = ""  # by which step of the ladder, where it was not the method asked for, and why


def to_entry(name: str, measured: Measured) -> dict[str, Any]:
    """A line of a journal."""
    vectors = {"values": _encode(measured.values), "null": _encode(measured.null)}
    vectors |= {"data": _encode(measured.data)}
    told = {"name": name, "skipped": measured.skipped, "kurtosis": measured.kurtosis, "note": measured.note}
    return told | {"data_failed": measured.data_failed} | vectors


def from_entry(entry: Any, where: str) -> Measured:
    """Raises RecordError, which begins with `where`, for what no scan writes."""
    try:
        if not isinstance(entry, Mapping) or not has_shape(entry, ENTRY):
            raise ValueError
        values, null, data = (_decode(entry[key]) for key in ("values", "null", "data"))
    except ValueError:
        raise RecordError(f"{where} is not what a scan measures; start afresh with --force") from None
    told = entry["kurtosis"], entry["skipped"], data, entry["data_failed"], entry["note"]
    return Measured(values, null, *told)


def _encode(vector: NDArray[np.float64]) -> str:
    return base64.b64encode(vector.astype("<f8").tobytes()).decode()


def _decode(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8")


DATA = "laser.data."  # before a tensor's name in the spectra file

Vectors = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class InData:
    """What a scan measures by the data, by name of the matrix.

    calibration: on which text (moments.Calibration)
    seen: how many inputs a matrix has seen, for those that were calibrated
    values: singular values (p,) of W C^(1/2), descending
    failed: why there are none
    """

    calibration: Mapping[str, Any]
    seen: Mapping[str, int]
    values: Vectors = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def vectors(self) -> dict[str, NDArray[np.float64]]:
        """Everything under the names that the file has."""
        return {DATA + n: v for n, v in self.values.items()}

    def header(self) -> dict[str, Any]:
        return {"calibration": dict(self.calibration), "seen": dict(self.seen), "failed": dict(self.failed)}

    def wrong(self, sides: Mapping[str, int]) -> str | None:
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
        return InData(asdict(moments.calibration), seen, values, failed)

    @staticmethod
    def from_file(header: Any, vectors: Vectors, where: str, remedy: str) -> InData | None:
        """What `header` and `vectors` wrote, taken from all of a file's vectors; None where there is none.

        Raises RecordError, which begins with `where` and ends with `remedy`.
        """
        if header is None:
            return None
        header = value_of(Mapping[str, Any], header, "data", where, remedy)
        require_keys(header, ("calibration", "seen"), ("failed",), where, remedy)
        kinds = {"calibration": Mapping[str, Any], "seen": Mapping[str, int], "failed": Mapping[str, str]}
        for key in header:
            value_of(kinds[key], header[key], key, where, remedy)
        Calibration.decoded(header["calibration"], f"{where}: its calibration", remedy)
        values = {n.removeprefix(DATA): v for n, v in vectors.items() if n.startswith(DATA)}
        return InData(header["calibration"], header["seen"], values, header.get("failed", {}))


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
            skipped[name] = Why(Kind.UNSEEN, f"not seen enough: {met_by(data.seen[name], p)}")
        elif name in spectra.values:
            skipped[name] = Why(Kind.NOT_CALIBRATED, "not calibrated")
    return replace(spectra, values=values, nulls={}, skipped=skipped, kurtosis={}, seen=data.seen)


def met_by(tokens: int, p: int) -> str:
    """How many inputs a matrix has seen, and how many it should have at the least."""
    return f"has seen {tokens} tokens of the calibration, and has {p} dimensions"


KIND, VERSION, EARLIER = "spectra", 3, 2  # the earlier one has reasons that are texts alone
LARGEST_INTEGER = 2**63 - 1
AGAIN = "try laser scan again with this version of laser"
GONE = "laser.data-null."  # before others in files of earlier versions, which nobody reads any more
NULL = "laser.null."  # before a tensor's name in the file: its permuted matrices' largest singular values


@dataclass(frozen=True)
class Spectra:
    """Every tensor of a checkpoint: singular values (p,), float64, descending, or the reason why there are none.

    kurtosis: name -> excess kurtosis of the entries, which moves the edge of noise (spectrum.py)
    nulls: name -> (draws,) largest singular values of the matrix with its entries permuted, for the rule `parallel`;
    empty unless the scan was asked for them.
    data: the values again in the metric of the data, where the scan was given moments
    notes: name -> by which step of the ladder its values were found and which failed, where that was not `method`
    seen: name -> how many inputs, where the values are those in the metric of the data; never in a file
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
    seen: Mapping[str, int] | None = None

    def save(self, path: Path) -> None:
        """One safetensors file: a float64 vector per scanned tensor, everything else as JSON in `__metadata__`."""
        header = {
            "kind": KIND,
            "version": VERSION,
            "source": asdict(self.source),
            "method": self.method,
            "device": self.device,
            "matrices": [_row(m) | self._extra(m.name) for m in self.matrices],
        }
        vectors = dict(self.values) | {NULL + name: null for name, null in self.nulls.items()}
        if self.data is not None:
            header["data"] = self.data.header()
            vectors |= self.data.vectors()
        header = sealed(header | {"vectors": _hash(vectors)})
        write_atomically(path, save(vectors, metadata={"laser": json.dumps(header, allow_nan=False)}))

    def _extra(self, name: str) -> dict[str, Any]:
        note = {"note": self.notes[name]} if name in self.notes else {}
        why = self.skipped.get(name)
        return {"skipped": why and asdict(why), "kurtosis": self.kurtosis.get(name)} | note

    @staticmethod
    def load(path: Path) -> Spectra:
        """Raises RecordError for a file that is missing, damaged or of another version."""
        if not path.exists() and not path.is_symlink():
            raise RecordError(f"no such file: {path}; try `laser scan MODEL -o {path}`")
        try:
            require_regular(path)
            with safe_open(path, framework="numpy") as file:
                header = parse((file.metadata() or {}).get("laser", "null"))
                check_header(header, path, KIND, VERSION, EARLIER)
                vectors = {name: file.get_tensor(name) for name in file.keys()}
        # NumPy knows not every dtype that safetensors does, and says so in ways of its own.
        except (SafetensorError, ValueError, TypeError, AttributeError, LookupError, OSError, MemoryError) as error:
            raise RecordError(f"{path} is not a readable spectra file ({first_line(error)}); scan again") from error
        needed = ("source", "method", "device", "matrices", "vectors", "check")
        require_keys(header, needed, ("kind", "version", "data"), f"{path}: its header", AGAIN)
        require_finite(header, f"{path}: its header", AGAIN)
        method, device = (value_of(str, header[key], key, f"{path}: its header", AGAIN) for key in ("method", "device"))
        rows = value_of(list, header["matrices"], "matrices", f"{path}: its header", AGAIN)
        earlier = header["version"] == EARLIER
        decoded = [_decoded(row, number, path, earlier) for number, row in enumerate(rows, 1)]
        skipped = {matrix.name: extra.skipped for matrix, extra in decoded if extra.skipped is not None}
        matrices = tuple(matrix for matrix, _ in decoded)
        values = {name: vector for name, vector in vectors.items() if not name.startswith((NULL, DATA, GONE))}
        nulls = {name.removeprefix(NULL): vector for name, vector in vectors.items() if name.startswith(NULL)}
        source = Source.decoded(header["source"], f"{path}: its source", AGAIN)
        kurtosis = {matrix.name: extra.kurtosis for matrix, extra in decoded if extra.kurtosis is not None}
        data = InData.from_file(header.get("data"), vectors, f"{path}: its data", AGAIN)
        notes = {matrix.name: extra.note for matrix, extra in decoded if extra.note}
        spectra = Spectra(source, matrices, values, skipped, method, device, nulls, kurtosis, data, notes)
        if wrong := _wrong(spectra):
            raise RecordError(f"{path}: {wrong}; {AGAIN}")
        require_sealed(header if header["vectors"] == _hash(vectors) else None, path, KIND)
        return spectra


def _hash(vectors: Mapping[str, NDArray[np.float64]]) -> str:
    """sha256 over names and values."""
    digest = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        digest.update(f"{name}\0{vector.dtype}\0{vector.shape}\0".encode("utf-8", "surrogatepass") + vector.tobytes())
    return digest.hexdigest()


def _row(matrix: Matrix) -> dict[str, Any]:
    # Not the cut: whoever reads weights has the checkpoint, and lists its matrices anew. Only FP8 has scales.
    without = ("cut",) if matrix.dtype.startswith("F8") else ("cut", "scaled")
    return {key: value for key, value in asdict(matrix).items() if key not in without}


@dataclass(frozen=True)
class _Extra:
    """What a row of the file says besides the matrix itself."""

    skipped: Why | None
    kurtosis: float | None = None
    note: str = ""


def _decoded(row: Any, number: int, path: Path, earlier: bool) -> tuple[Matrix, _Extra]:
    """A row of the file. Raises RecordError naming it."""
    where = f"{path}: matrix {number}"
    if isinstance(row, dict):
        where += f" ({row['name']})" if isinstance(row.get("name"), str) else ""
        own = {f.name for f in fields(_Extra)}
        if earlier and isinstance(row.get("skipped"), str):
            row = row | {"skipped": asdict(earlier_reason(row["skipped"]))}
        # Files of laser 0.1 knew no other tensor, and FP8 only with scales.
        row = {"tensor": row.get("name"), "scaled": str(row.get("dtype")).startswith("F8")} | row
        extra = decode(_Extra, {k: x for k, x in row.items() if k in own}, where, AGAIN, ("kurtosis", "note"))
        later = [f.name for f in fields(Matrix) if f.default is not MISSING]
        return decode(Matrix, {k: x for k, x in row.items() if k not in own}, where, AGAIN, later), extra
    raise RecordError(f"{where} is {shown(row)}, expected an object; {AGAIN}")


def _wrong(spectra: Spectra) -> str | None:
    """What of the vectors does not belong to the matrices, or is no spectrum."""
    for m in spectra.matrices:
        if min(m.shape, default=0) < 0 or m.parameters > LARGEST_INTEGER or (m.layer or 0) < 0 or (m.expert or 0) < 0:
            return f"{m.name} has shape {shown(list(m.shape))}, layer {shown(m.layer)} and expert {shown(m.expert)}"
    sides = {m.name: min(m.shape) if m.is_matrix else 0 for m in spectra.matrices}
    if len(sides) < len(spectra.matrices):
        return "a matrix is in it twice"
    if unsaid := next((n for n in sides if (n in spectra.values) == (n in spectra.skipped)), None):
        return f"{unsaid} has both singular values and a reason why not, or neither"
    data = spectra.data
    if data and (wrong := data.wrong(sides)):
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
    record = Spectra(Source.of(checkpoint), tuple(matrices), values, reasons, method, device, nulls, kurtosis)
    record = replace(record, notes=notes)
    if wrong := _wrong(record):  # found in a journal
        raise RecordError(f"{checkpoint.name}: {wrong}; start afresh with --force")
    return record
