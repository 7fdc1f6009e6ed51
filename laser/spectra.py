"""scan: every selected matrix's singular values, kept in one small file so that planning never touches the weights."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from laser.checkpoint.families import Matrix, list_matrices
from laser.checkpoint.files import Journal, check_header, write_atomically
from laser.checkpoint.reader import Checkpoint
from laser.errors import LaserError, NumericalError, RecordError, UsageError
from laser.selection import Selection
from laser.spectral.data_metric import data_values, null_in_metric
from laser.spectral.decomposition import METHODS, singular_values
from laser.spectral.devices import Device, choose_device
from laser.spectral.permutation import null_largest

if TYPE_CHECKING:
    from laser.moments import Moments

KIND, VERSION = "spectra", 1
# Before a tensor's name in the file: its permuted matrices' largest singular values; and both in the data's metric.
NULL, DATA, DATA_NULL = "laser.null.", "laser.data.", "laser.data-null."


@dataclass(frozen=True)
class Source:
    """Which checkpoint a record speaks of: its directory's name, and a hash of config, index and headers."""

    name: str
    identity: str

    @staticmethod
    def of(checkpoint: Checkpoint) -> Source:
        return Source(checkpoint.name, checkpoint.identity)

    def require(self, checkpoint: Checkpoint, what: str) -> None:
        """Raises RecordError unless `what` was made from this very checkpoint."""
        if self.identity != checkpoint.identity:
            raise RecordError(
                f"the {what} was made from {self.name} ({self.identity[:12]}), found {checkpoint.name} "
                f"({checkpoint.identity[:12]}); make the {what} again from this checkpoint"
            )


@dataclass(frozen=True)
class Spectra:
    """Every tensor of a checkpoint: singular values (p,), float64, descending, or the reason why there are none.

    nulls: name -> (draws,) largest singular values of the matrix with its entries permuted, for the rule `parallel`;
    empty unless the scan was asked for them. data, data_nulls: both again in the metric of the inputs that `calibration`
    says, where the scan was given moments (data_metric.py); seen: how many inputs each matrix met there.
    """

    source: Source
    matrices: tuple[Matrix, ...]
    values: Mapping[str, NDArray[np.float64]]
    skipped: Mapping[str, str]  # name -> why it has no values
    method: str
    device: str
    nulls: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    data: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    data_nulls: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None  # a moments.Calibration

    def in_data_metric(self, fewest: int | None = None) -> Spectra:
        """The same with the data's values in the place of the plain ones, for planning.

        A matrix that met fewer than `fewest` tokens (default: than it has dimensions p) has no values and the reason.
        Raises UsageError where no moments were scanned.
        """
        if self.calibration is None:
            raise UsageError("these spectra know no data; try laser calibrate, then laser scan --moments FILE")
        needed = {m.name: min(m.shape) if fewest is None else fewest for m in self.matrices if m.is_matrix}
        skipped, values = dict(self.skipped), {}
        for name in self.values:
            if name not in self.data:
                skipped[name] = "not seen: met no token of the calibration"
            elif self.seen[name] < needed[name]:
                skipped[name] = f"not seen enough: met {self.seen[name]} tokens, expected {needed[name]}"
            else:
                values[name] = self.data[name]
        return replace(self, values=values, nulls=self.data_nulls, skipped=skipped)

    def save(self, path: Path) -> None:
        """One safetensors file: a float64 vector per scanned tensor, everything else as JSON in `__metadata__`."""
        header = {
            "kind": KIND,
            "version": VERSION,
            "source": asdict(self.source),
            "method": self.method,
            "device": self.device,
            "matrices": [asdict(m) | {"skipped": self.skipped.get(m.name)} for m in self.matrices],
        }
        if self.calibration is not None:
            header |= {"calibration": dict(self.calibration), "seen": dict(self.seen)}
        vectors = dict(self.values)
        for prefix, group in ((NULL, self.nulls), (DATA, self.data), (DATA_NULL, self.data_nulls)):
            vectors |= {prefix + name: vector for name, vector in group.items()}
        write_atomically(path, save(vectors, metadata={"laser": json.dumps(header, allow_nan=False)}))

    @staticmethod
    def load(path: Path) -> Spectra:
        """Raises RecordError for a file that is missing, damaged or of another version."""
        if not path.is_file():
            raise RecordError(f"no such file: {path}; try `laser scan MODEL -o {path}`")
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("laser", "null"))
                vectors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError, OSError) as error:
            raise RecordError(f"{path} is not a readable spectra file ({error}); scan again") from error
        check_header(header, path, KIND, VERSION)
        rows = header["matrices"]
        skipped = {row["name"]: row["skipped"] for row in rows if row["skipped"] is not None}
        matrices = tuple(_matrix(row) for row in rows)
        prefixes = (NULL, DATA, DATA_NULL)
        values = {name: vector for name, vector in vectors.items() if not name.startswith(prefixes)}
        groups = [
            {name.removeprefix(prefix): vector for name, vector in vectors.items() if name.startswith(prefix)}
            for prefix in prefixes
        ]
        source, seen, calibration = Source(**header["source"]), header.get("seen", {}), header.get("calibration")
        return Spectra(
            source, matrices, values, skipped, header["method"], header["device"], *groups, seen, calibration
        )


def _matrix(row: dict[str, Any]) -> Matrix:
    shape = tuple(row["shape"])
    return Matrix(row["name"], row["role"], row["layer"], row["expert"], shape, row["dtype"])


def scan(
    checkpoint: Checkpoint,
    selection: Selection | None = None,
    *,
    device: Device | None = None,
    method: str = "gram",
    journal: Path | None = None,
    null_draws: int = 0,
    moments: Moments | None = None,
    tick: Callable[[Matrix], None] = lambda _: None,
) -> Spectra:
    """Singular values of every selected matrix; the others are listed with the reason why not.

    One matrix is in memory while the next is read. With `journal`, each result is appended to that file at once and an
    interrupted scan goes on from there; the caller removes it when the spectra are saved. `tick` is called per matrix.
    A matrix with NaN or Inf, or one that no method can factorise, is skipped with its reason. `null_draws` permutations
    of each matrix are measured too, by their largest singular value: what the rule `parallel` needs.
    With `moments` all of that is measured once more in the metric of the data, where a matrix was calibrated.
    Raises UsageError for a selection that matches nothing, or a negative number of draws.
    """
    selection, device = selection or Selection(), device or choose_device()
    if method not in METHODS:
        raise UsageError(f"no method is called {method!r}; try --method {'|'.join(METHODS)}")
    if null_draws < 0:
        raise UsageError(f"{null_draws} permutations cannot be drawn; try --null 19")
    if moments is not None:
        moments.source.require(checkpoint, "moments")
    matrices = list_matrices(checkpoint)
    selection.check(matrices)
    skipped = {m.name: why for m in matrices if (why := selection.why_not(m))}
    run = {
        "kind": "scan journal",
        "source": checkpoint.identity,
        "selection": selection.describe(),
        "method": method,
        "device": device.label,
        "null_draws": null_draws,
    }
    if moments is not None:
        run["moments"] = moments.calibration.identity
    values: dict[str, NDArray[np.float64]] = {}
    nulls: dict[str, NDArray[np.float64]] = {}
    data: dict[str, NDArray[np.float64]] = {}
    data_nulls: dict[str, NDArray[np.float64]] = {}
    with Journal(journal, run) if journal else nullcontext() as log:
        resumed = {entry["name"]: entry for entry in log.entries} if log else {}
        for name, entry in resumed.items():
            if entry["skipped"] is not None:
                skipped[name] = entry["skipped"]
            else:
                values[name] = _decode(entry["values"])
                if null_draws:
                    nulls[name] = _decode(entry["null"])
                if entry.get("data"):
                    data[name], data_nulls[name] = _decode(entry["data"]), _decode(entry["data_null"])
        todo = []
        for matrix in matrices:
            if matrix.name in resumed:
                tick(matrix)
            elif matrix.name not in skipped:
                todo.append(matrix)
        for matrix, W in read_ahead(checkpoint, todo):
            why, s, null, seen = None, np.empty(0), np.empty(0), {}
            try:
                s, _ = singular_values(W, device, method)
                if null_draws:
                    null = nulls[matrix.name] = null_largest(W, null_draws, device)
                if moments is not None and moments.tokens(matrix.name):
                    metric = moments.metric(matrix.name)
                    data[matrix.name] = data_values(W, metric, device)
                    data_nulls[matrix.name] = null_in_metric(W, metric, null_draws, device)
                    seen = {"data": _encode(data[matrix.name]), "data_null": _encode(data_nulls[matrix.name])}
                values[matrix.name] = s
            except (NumericalError, UsageError) as error:
                why = skipped[matrix.name] = describe_failure(W, error)
            if log:
                log.append({"name": matrix.name, "skipped": why, "values": _encode(s), "null": _encode(null)} | seen)
            tick(matrix)
    found = [{m.name: g[m.name] for m in matrices if m.name in g} for g in (values, nulls, data, data_nulls)]
    spectra = Spectra(Source.of(checkpoint), tuple(matrices), found[0], skipped, method, device.label, *found[1:])
    if moments is None:
        return spectra
    tokens = {name: moments.tokens(name) for name in found[0]}
    return replace(spectra, seen=tokens, calibration=asdict(moments.calibration))


def _encode(vector: NDArray[np.float64]) -> str:
    return base64.b64encode(vector.astype("<f8").tobytes()).decode()


def _decode(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), dtype="<f8")


def read_ahead(checkpoint: Checkpoint, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, torch.Tensor]]:
    """Each matrix with its weights, the next one being read meanwhile: two in memory, never more."""
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for matrix in matrices:
            future = reader.submit(checkpoint.read, matrix.name)
            if ahead:
                yield ahead[0], ahead[1].result()
            ahead = (matrix, future)
        if ahead:
            yield ahead[0], ahead[1].result()


def describe_failure(W: torch.Tensor, error: LaserError) -> str:
    """The plan's reason for leaving a matrix alone."""
    if W.is_floating_point() and W.element_size() > 1 and not torch.isfinite(W).all():
        bad = int((~torch.isfinite(W)).sum())
        return f"skipped: not finite ({bad} NaN or Inf of {W.numel()})"
    return f"skipped: {error}"
