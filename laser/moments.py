"""moments: second moments of each matrix's inputs on a text, the record that calibration writes.

The file keeps a moment as correlations in float32, which takes half the bytes, and a diagonal in float64;
`from_correlations` puts them together again. `metric_of` gives the metric that a rule or a plan's line names, from the
record or without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from laser.arrays import ArrayRecord
from laser.checkpoint.safetensors import Shard, read_header, tensor_in
from laser.checkpoint.slices import tensor_sha256
from laser.checkpoint.source import Source
from laser.errors import CheckpointError, RecordError, UsageError
from laser.records import SPARSE, differences, named, under
from laser.spectral.data_metric import SITES_KEPT, ByData
from laser.spectral.metric import PLAIN, UNKNOWN_DATA, Metric
from laser.spectral.recent import Recent

FORMS = ("full", "diagonal", "outputs")  # see ByData
WHOLE: Recent[torch.Tensor] = Recent(SITES_KEPT)  # moments, which nobody may change
SAMPLED = 4096  # entries of a matrix that tell it from another model's
NO_MOMENTS = (
    "a rule in the metric of the data needs moments, and spectra that were scanned with them; try --moments with a "
    "file of laser calibrate, and for laser search --spectra with a file that is not there yet"
)


@dataclass(frozen=True)
class Calibration:
    """What was calibrated on which text: in every record that rests on it."""

    identity: str  # sha256 over the moments and all of the below
    text: str
    text_sha256: str
    windows_sha256: str
    window: int
    windows: int
    tokens: int  # inputs of the whole model; an expert sees those that are routed to it
    dtype: str
    shrink: bool
    diagonal: bool

    def wrong(self) -> str | None:
        return under(self, 1, "window", "windows", "tokens")


@dataclass(frozen=True)
class Site:
    """Where inputs arrive; see `ByData` for form and fourth.

    matrices: the tensors that are multiplied with them
    weights: fingerprints of those
    gradients: the mean square gradient at the outputs of each, see `gradients_at_outputs`; () where none were asked for
    """

    key: str
    layer: int
    form: str
    tokens: int
    fourth: float
    matrices: tuple[str, ...]
    weights: tuple[str, ...]
    gradients: tuple[float, ...] = field(default=(), metadata=SPARSE)

    @property
    def arrays(self) -> tuple[str, str]:
        """Names of its correlations, which only a whole moment has, and of its diagonal."""
        return f"{self.key}.correlations", f"{self.key}.diagonal"

    def wrong(self) -> str | None:
        count = len(self.matrices)
        if self.form not in FORMS or not len(set(self.matrices)) == count == len(self.weights) or not count:
            message = f"form {named(self.form)}, {count} matrices and {len(self.weights)} fingerprints"
            return f"found {message}, expected one of {', '.join(FORMS)}, and one each"
        if self.gradients and (len(self.gradients) != count or min(self.gradients) < 0):
            return f"gradients {list(self.gradients)}, expected {count} of 0 or more, or none"
        return under(self, 0, "layer", "tokens", "fourth")


@dataclass(frozen=True)
class MomentsHeader(ArrayRecord, kind="moments", version=5, made_by="laser calibrate MODEL --text TEXT -o FILE"):
    """What the file says beside the moments."""

    source: Source
    calibration: Calibration
    run: Mapping[str, Any]  # what the calibration was asked for, as its parts tell
    sites: tuple[Site, ...]
    hashes: Mapping[str, str]  # tensor in the file -> sha256 of its bytes

    def wrong(self) -> str | None:
        seen: set[str] = set()
        twice = next((n for site in self.sites for n in site.matrices if n in seen or seen.add(n)), None)
        if twice is not None:
            return f"{twice} is of two sites"
        if len({bool(site.gradients) for site in self.sites}) > 1:
            return "some sites have gradients and some have none"
        return None


@dataclass(frozen=True)
class Moments:
    """The record; moments are read from `path` one at a time. `sites` by name of the matrix."""

    path: Path
    source: Source
    calibration: Calibration
    sites: Mapping[str, Site]
    hashes: Mapping[str, str] = field(default_factory=dict)  # tensor in the file -> sha256 of its bytes
    run: Mapping[str, Any] = field(default_factory=dict)  # what the calibration was asked for, as its parts tell

    def tokens(self, name: str) -> int:
        """How many inputs the matrix has seen; 0 for one that was not calibrated."""
        return self.sites[name].tokens if name in self.sites else 0

    @property
    def has_gradients(self) -> bool:
        """Whether the calibration kept the gradients at outputs as well."""
        return any(site.gradients for site in self.sites.values())

    def gradient(self, name: str) -> float:
        """The mean square gradient at the outputs of a matrix that was calibrated with gradients."""
        site = self.sites[name]
        return site.gradients[site.matrices.index(name)]

    def metric(self, name: str, W: torch.Tensor) -> ByData:
        """The metric of the matrix W (m, n). Raises UsageError for one that was not calibrated or saw no token,
        RecordError for the matrix of that name of another model."""
        if name not in self.sites:
            raise UsageError(
                f"{self.path.name} holds no moments of {name}; try laser calibrate with its layer and role"
            )
        site = self.sites[name]
        if not site.tokens:
            raise UsageError(f"{name} has seen no token of {self.calibration.text}; calibrate on more text")
        found, expected = fingerprint(W), site.weights[site.matrices.index(name)]
        if found != expected:  # two models of one shape have the same headers
            raise RecordError(
                f"{self.path.name} was made from other weights of {name}: found {found}, expected {expected}; try "
                f"laser calibrate with this model"
            )
        m, n = W.shape
        k = m if site.form == "outputs" else n
        diagonal = self._tensor(site.arrays[1], (k,))
        if site.form == "diagonal":
            return ByData("diagonal", diagonal, site.tokens)
        key = " ".join(self.hashes.get(name, "") for name in site.arrays)

        def whole() -> torch.Tensor:
            return from_correlations(self._tensor(site.arrays[0], (k, k)), diagonal)

        moment = WHOLE.get((self.path, key), whole)  # the matrices of a site follow one another
        return ByData(site.form, moment, site.tokens, site.fourth, self.calibration.shrink, key)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Raises RecordError for one that is not as calibration wrote it."""
        tensor = self._read(name)
        dtype = torch.float32 if name.endswith(".correlations") else torch.float64
        if tensor.dtype != dtype or tensor.shape != shape or not torch.isfinite(tensor).all():
            message = f"{tensor.dtype} of shape {list(tensor.shape)}, expected finite {dtype} of {shape}"
            raise RecordError(f"{self.path}: {name} is {message}; calibrate again")
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        """Raises RecordError for one whose bytes are not those that were written."""
        with MomentsHeader.reading(self.path, CheckpointError):
            tensor = tensor_in(self._held, name)
        if self.hashes.get(name) != tensor_sha256(tensor):
            raise RecordError(f"{self.path}: {name} was changed or damaged since it was written; calibrate again")
        return tensor

    @cached_property
    def _held(self) -> Shard:
        """The file by its header, which tells of every site: it is read once, and not for each of them."""
        return read_header(self.path)

    @staticmethod
    def found_again(run: Mapping[str, Any], path: Path) -> Moments | None:
        """The moments at `path` if this very run made them and every byte is as it wrote it."""
        try:
            there = Moments.load(path)
            for name in there.hashes:
                there._read(name)
        except RecordError:
            return None
        return None if differences(there.run, run) else there

    @staticmethod
    def load(path: str | Path) -> Moments:
        """Headers only. Raises RecordError for a file that is missing, damaged or of another version."""
        path = Path(path)
        header = MomentsHeader.load(path)
        sites = {name: site for site in header.sites for name in site.matrices}
        return Moments(path, header.source, header.calibration, sites, header.hashes, header.run)


def fingerprint(W: torch.Tensor) -> str:
    """Of a matrix W (m, n) as stored: over its dtype, shape and SAMPLED entries, evenly spaced."""
    flat = W.reshape(-1)
    sample = flat[:: max(1, len(flat) // SAMPLED)].contiguous().view(torch.uint8)
    digest = hashlib.sha256(f"{W.dtype} {tuple(W.shape)} ".encode())
    digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def to_correlations(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A second moment (k, k), float64, as correlations (k, k), float32, and its diagonal (k,), float64."""
    diagonal = moment.diagonal().clone()
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    return (moment * scale[:, None] * scale).float(), diagonal


def from_correlations(correlations: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """The second moment (k, k), float64."""
    scale = diagonal.clamp_min(0).sqrt()
    return correlations.double() * scale[:, None] * scale


def metric_of(metric: str, name: str, W: torch.Tensor, moments: Moments | None) -> Metric:
    """The metric that a plan's line or a rule names, of the matrix W (m, n) called `name`. Raises as Moments.metric."""
    if metric == "plain":
        return PLAIN
    return UNKNOWN_DATA if moments is None else moments.metric(name, W)
