"""scan: every selected matrix's singular values, kept in one small file so that planning never touches the weights."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from laser.checkpoint.families import DoubtWarning, Matrix, doubts, list_matrices
from laser.checkpoint.files import Journal, check_header, require_sealed, sealed, spoiling, write_atomically
from laser.checkpoint.fingerprint import Fingerprint, agree, content_by_reading, require_unchanged
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.records import decode, parse, require_finite, require_keys, shown, value_of
from laser.checkpoint.regular import require_regular
from laser.engine.workers import Crew, dearest_first, near, visit
from laser.errors import LaserError, NumericalError, RecordError, UsageError, first_line
from laser.in_data import DATA, InData
from laser.measured import ENTRY, Measured, from_entry, to_entry
from laser.reasons import Kind, Why, earlier_reason
from laser.selection import Selection
from laser.spectral.data_metric import data_values
from laser.spectral.devices import Device, choose_device
from laser.spectral.factorise import METHODS
from laser.spectral.factorise import measure as measure_values
from laser.spectral.permutation import null_largest
from laser.spectral.spectrum import excess_kurtosis

if TYPE_CHECKING:
    from laser.moments import Moments

KIND, VERSION, EARLIER = "spectra", 3, 2  # the earlier one has reasons that are texts alone
LARGEST_INTEGER = 2**63 - 1
AGAIN = "try laser scan again with this version of laser"
SOURCE_OPTIONAL = ("parameters", "unindexed", "content", "samples")  # which records of earlier versions lack
GONE = "laser.data-null."  # before others in files of earlier versions, which nobody reads any more
NULL = "laser.null."  # before a tensor's name in the file: its permuted matrices' largest singular values


@dataclass(frozen=True)
class Source:
    """Which checkpoint a record speaks of: its name, and a hash of config, index and headers.

    parameters: numbers in its shards, by their headers; unindexed: how many of them no matrix speaks of: 0 since laser
    reads every tensor of a shard. content, samples: which weights they are, see `Fingerprint`.
    """

    name: str
    identity: str
    parameters: int | None = None  # None in records of laser 0.1
    unindexed: int = 0
    content: str | None = None
    samples: str | None = None

    @staticmethod
    def of(checkpoint: Checkpoint) -> Source:
        stored = sum(math.prod(t.shape) for shard in checkpoint.shards for t in shard.tensors)
        named = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
        weights = checkpoint.fingerprint
        return Source(checkpoint.name, checkpoint.identity, stored, stored - named, weights.content, weights.samples)

    @staticmethod
    def decoded(found: Any, where: str, remedy: str) -> Source:
        """From a record's JSON. Raises RecordError, which begins with `where` and ends with `remedy`."""
        source = decode(Source, found, where, remedy, SOURCE_OPTIONAL)
        for key in ("parameters", "unindexed"):
            if (getattr(source, key) or 0) < 0:
                raise RecordError(f"{where}: {key} is {getattr(source, key)}, expected 0 or more; {remedy}")
        return source

    @property
    def weights(self) -> Fingerprint:
        return Fingerprint(self.samples, self.content)

    def told(self) -> dict[str, str]:
        """For a journal: what identifies the weights, as far as it is known, and their name for messages."""
        return {"source": self.identity, "model": self.name} | self.weights.told()

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


@dataclass(frozen=True)
class Spectra:
    """Every tensor of a checkpoint: singular values (p,), float64, descending, or the reason why there are none.

    kurtosis: name -> excess kurtosis of the entries, which moves the edge of noise (spectrum.py)
    nulls: name -> (draws,) largest singular values of the matrix with its entries permuted, for the rule `parallel`;
    empty unless the scan was asked for them.
    data: the values again in the metric of the data, where the scan was given moments
    notes: name -> by which step of the ladder its values were found and which failed, where that was not `method`
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


def measure(W: torch.Tensor, device: Device, method: str, null_draws: int) -> Measured:
    """The scan of one matrix W (m, n), wherever it runs. What cannot be factorised is a reason, not an error."""
    try:
        found = measure_values(W, device, method)
        null = null_largest(W, null_draws, device) if null_draws else np.empty(0)
        return Measured(found.singular_values, null, excess_kurtosis(W, device), note=found.told)
    except (NumericalError, UsageError) as error:
        return Measured(np.empty(0), np.empty(0), skipped=describe_failure(W, error))


def check_scan(method: str, null_draws: int) -> None:
    """What can be refused of a scan before its model is opened. Raises UsageError."""
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}; try --method {'|'.join(METHODS)}")
    if null_draws < 0:
        raise UsageError(f"{null_draws} permutations cannot be drawn; try --null 19")


def run_of_scan(
    checkpoint: Checkpoint, selection: Selection, crew: Crew, method: str, null_draws: int, moments: Moments | None
) -> dict[str, Any]:
    """What a scan's journal belongs to."""
    return {
        "kind": "scan journal",
        "version": VERSION,
        **Source.of(checkpoint).told(),
        "selection": selection.describe(),
        "method": method,
        "device": crew.label,
        "null_draws": null_draws,
    } | ({"moments": moments.calibration.identity} if moments else {})


def scan(
    checkpoint: Checkpoint,
    selection: Selection | None = None,
    *,
    device: Device | None = None,
    crew: Crew | None = None,
    method: str = "gram",
    journal: Path | None = None,
    null_draws: int = 0,
    moments: Moments | None = None,
    tick: Callable[[Matrix], None] = lambda _: None,
    anew: bool = False,
) -> Spectra:
    """Singular values of every selected matrix; the others are listed with the reason why not.

    `crew` says who computes, by default `device` and, on the host, as many workers as cores and memory allow; the
    result does not depend on how many they are. In memory are the workers' matrices and two read ahead. With `journal`,
    each result is appended to that file at once and an interrupted scan goes on from there; the caller removes it when
    the spectra are saved, and with `anew` one of another scan is dropped. `tick` is called per matrix. A matrix with
    NaN or Inf, or one that no method can factorise,
    is skipped with its reason. `null_draws` permutations of each matrix are measured too, by their largest singular
    value: what the rule `parallel` needs. With `moments` the singular values are measured once more in the metric of
    the data, where a matrix was calibrated.
    Warns (DoubtWarning) about names that the table of families does not know.
    Raises UsageError for a selection that matches nothing, or a negative number of draws.
    """
    selection, crew = selection or Selection(), crew or Crew((device or choose_device(),))
    check_scan(method, null_draws)
    if moments is not None:
        moments.source.require(checkpoint, "moments")
    matrices = list_matrices(checkpoint)
    if told := doubts(checkpoint, matrices):
        warnings.warn(told, DoubtWarning, stacklevel=2)
    selection.check(matrices)
    skipped = {m.name: why for m in matrices if (why := selection.why_not(m))}
    run = run_of_scan(checkpoint, selection, crew, method, null_draws, moments)
    found: dict[str, Measured] = {}
    with Journal(journal, run, shapes=(ENTRY,), anew=anew) if journal else nullcontext() as log:
        for entry in log.entries if log else ():
            found[entry["name"]] = from_entry(entry, f"{journal}: the entry of {entry['name']}")
        for matrix in matrices:
            if matrix.name in found:
                tick(matrix)
        todo = [m for m in matrices if m.name not in found and m.name not in skipped]
        work = partial(_measure, method=method, null_draws=null_draws, moments=moments)
        with closing(visit(checkpoint, dearest_first(todo), work, crew)) as visits:
            for matrix, measured, _ in visits:
                found[matrix.name] = measured
                if log:
                    log.append(to_entry(matrix.name, measured))
                tick(matrix)
        with spoiling(log):
            require_unchanged(checkpoint)
    spectra = assemble(checkpoint, matrices, found, skipped, method, crew.label, null_draws)
    return replace(spectra, data=InData.of(moments, spectra.values, found))


def _measure(
    matrix: Matrix, W: torch.Tensor, device: Device, *, method: str, null_draws: int, moments: Moments | None
) -> Measured:
    found = measure(near(W, device), device, method, null_draws)
    if moments is None or not moments.tokens(matrix.name) or found.skipped is not None:
        return found
    try:
        return replace(found, data=data_values(W, moments.metric(matrix.name, W), device))
    except (NumericalError, UsageError) as error:  # the plain spectrum stands
        return replace(found, data_failed=str(error))


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


def describe_failure(W: torch.Tensor, error: LaserError) -> str:
    """The plan's reason for leaving a matrix alone."""
    W = W.cpu()  # where W lies there may be no memory left to look at it
    if W.is_floating_point() and W.element_size() > 1 and not torch.isfinite(W).all():
        bad = int((~torch.isfinite(W)).sum())
        return f"skipped: not finite ({bad} NaN or Inf of {W.numel()})"
    return f"skipped: {error}"
