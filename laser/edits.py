"""Edits in the metric of the data: a matrix reduced by its moments, what that costs elsewhere, and a check of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from laser.errors import RecordError, UsageError
from laser.moments import Moments
from laser.plan import Plan, PlanLine
from laser.spectra import Spectra
from laser.spectral.certificate import Truncation
from laser.spectral.data_metric import data_values, relative_error, rounding_error, truncate_in_metric
from laser.spectral.devices import Device
from laser.spectral.factorise import singular_values
from laser.spectral.rules import energy_share
from laser.spectral.unit import in_unit

NO_MOMENTS = (
    "a rule in the metric of the data needs moments, and spectra that were scanned with them; try laser calibrate, "
    "then --moments, and laser search --spectra with a file that is not there yet"
)
STORED = 1e-6  # share of the outputs that the float32 of stored correlations can hide, where tokens are few


def reduced_in_data(W: torch.Tensor, line: PlanLine, device: Device, moments: Moments | None) -> Truncation:
    """W (m, n) as its plan line says. Raises NumericalError where a certificate is missed."""
    assert moments is not None  # require_moments
    return truncate_in_metric(W, line.rank or 0, moments.metric(line.name, W), device)


def require_moments(plan: Plan, moments: Moments | None) -> None:
    """Raises UsageError where the plan needs moments and there are none, RecordError where they are others."""
    names = [line.name for line in plan.reductions.values() if line.metric == "data"]
    if not names:
        return
    told: Mapping[str, Any] = plan.calibration or {}
    if moments is None:
        raise UsageError(
            f"the plan reduces {len(names)} matrices in the metric of the data; try --moments with the file of "
            f"laser calibrate on {told.get('text')}"
        )
    if moments.calibration.identity != told.get("identity"):
        raise RecordError(
            f"{moments.path}: found moments {moments.calibration.identity[:12]} of {moments.calibration.text}, the "
            f"plan was made with {str(told.get('identity'))[:12]} of {told.get('text')}; scan and plan again with these"
        )


def require_same_moments(spectra: Spectra, moments: Moments | None) -> None:
    """Raises UsageError without moments or spectra that know them, RecordError where they are others."""
    known = None if spectra.data is None else spectra.data.calibration
    if moments is None or known is None:
        raise UsageError(NO_MOMENTS)
    if moments.calibration.identity != known.get("identity"):
        raise RecordError(
            f"{moments.path}: found moments {moments.calibration.identity[:12]} of {moments.calibration.text}, the "
            f"spectra were scanned with {str(known.get('identity'))[:12]} of {known.get('text')}; scan again with these"
        )


def on_fresh_text(W: torch.Tensor, B: torch.Tensor, line: PlanLine, fresh: Moments | None) -> dict[str, float]:
    """What share of E||W x||^2 is lost with B in the place of W on the inputs of another calibration, if it saw any.

    Where that knows outputs alone, as of inputs wider than 4096, it can tell of projections only: of no shrunk matrix.
    """
    if fresh is None or not fresh.tokens(line.name):
        return {}
    metric = fresh.metric(line.name, W)
    if metric.form == "outputs" and (line.shrink or line.below):
        return {}
    return {"fresh_output_error": relative_error(W, B, line.rank or 0, metric)}


def check_projection(
    W: torch.Tensor,
    B: torch.Tensor,
    half: torch.Tensor,
    line: PlanLine,
    device: Device,
    moments: Moments | None,
) -> list[str]:
    """What is wrong with B as W (m, n) reduced in the metric of the data, up to rounding to the storage dtype: `half`
    (m, n) is half a unit in the last place of each entry.

    Without moments: B is some projection U U^T W of rank r, which is the same as: no singular value beyond r, and
    B^T (W - B) = 0. With them also that it loses no more of the outputs than W itself says that rank r must.
    """
    source, (W, u) = W, in_unit(W)
    B, half = B.double() / u, half.double() / u
    wide, narrow = W.double(), B
    E = half
    rounding, norm = float(E.norm()), float(wide.norm())
    if not norm:
        return [] if not narrow.any() else [f"{line.name}: found values, expected zero, as the source's matrix is"]
    problems, rank = [], line.rank or 0
    beyond = float(np.linalg.norm(singular_values(B, device)[0][rank:]))
    if not beyond <= rounding + 1e-5 * norm:
        problems.append(f"{line.name}: {beyond / norm:.3e} of the norm lies beyond rank {rank}")
    # With B = U U^T W + E the product is at most ||E|| (||B|| + ||W - B|| + ||E||).
    left = float((narrow.T @ (wide - narrow)).norm())
    most = (rounding + 1e-5 * norm) * (float(narrow.norm()) + float((wide - narrow).norm()) + rounding)
    if not left <= most:
        problems.append(
            f"{line.name}: ||B^T (W - B)|| is {left:.3e}, expected {most:.1e} at most for a projection of W"
        )
    if moments is not None:
        metric = moments.metric(line.name, source)
        s, B, E = data_values(source, metric, device), B * u, E * u
        lost = energy_share(s, np.arange(len(s)) >= rank) if s.any() else 0.0
        found = relative_error(source, B, rank, metric, device)
        slack = 3 * math.sqrt(rounding_error(source, B, E, rank, metric, device)) + 1e-5
        if not (abs(math.sqrt(found) - math.sqrt(lost)) <= slack or abs(found - lost) <= STORED):
            problems.append(f"{line.name}: {found:.4e} of the outputs' mean square is lost, expected {lost:.4e}")
    return problems
