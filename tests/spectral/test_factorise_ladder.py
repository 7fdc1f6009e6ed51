"""Every kind of failure on every step: the next step is taken, the record says why, and the result is right."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Methods
from helpers import Accelerator
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from laser.errors import NumericalError
from laser.spectral.certificate import Factors
from laser.spectral.devices import HOST, Device
from laser.spectral.factorise import device_bytes, eigh_squares, measure, steps, truncate

SINGLE = replace(HOST, dtype=torch.float32)


CARD = Accelerator("cpu", torch.float32, False, "pretends")
RUNS_OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB. Process 123 has 7 GiB in use.")


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 24, generator=generator) @ torch.diag(torch.linspace(3, 0.1, 24))


def names(method: str, device: Device) -> list[str]:
    return [step.name for step in steps(method, device)]


def test_steps_of_each_device() -> None:
    mps = Device("mps", torch.float32, True, "")
    cuda = Device("cuda", torch.float64, False, "")
    assert names("gram", HOST) == ["gram", "svd"] and names("svd", cuda) == ["svd"]
    assert names("projector", SINGLE) == ["projector", "gram", "gram float64", "svd"]
    assert names("projector", mps) == ["projector", "gram", "gram on the host", "svd"]
    assert names("gram", cuda) == ["gram", "gram on the host", "svd"]
    single = replace(cuda, dtype=torch.float32)
    assert names("gram", single) == ["gram", "gram float64", "gram on the host", "svd"]
    assert all(step.device.dtype == torch.float64 for step in steps("gram", single)[1:])


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def spoiled(honest: Any, fault: str) -> Callable[..., Any]:
    """The honest method with its result made wrong."""

    def wrong(W: torch.Tensor, device: Device, values: Any) -> Factors:
        factors = honest(W, device, values)

        def cut(wanted: Any) -> Any:
            raw = factors.cut(wanted)
            if fault == "NaN":
                return replace(raw, distance=math.nan)
            return replace(raw, orthogonality=0.5) if fault == "not orthogonal" else replace(raw, distance=0.0)

        return Factors(factors.singular_values, cut)

    return wrong


FAULTS = {
    "LinAlgError": ("failed to converge", LinAlgError("linalg.eigh: failed to converge")),
    "cuSOLVER": ("cusolver error", RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED\nat line 7")),
    "out of memory": ("out of memory on the device", RUNS_OUT),
    "MPS out of memory": ("out of memory on the device", RuntimeError("MPS backend out of memory (MPS allocated: 1)")),
    "NaN": ("certificate missed: residual nan", None),
    "not orthogonal": ("orthogonality 5.00e-01", None),
    "wrong": ("certificate missed: residual", None),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_the_next_step_is_taken_and_recorded(fault: str, failing: int, methods: Methods) -> None:
    """The first `failing` steps of projector, gram, gram float64, gram on the host, svd."""
    told, error = FAULTS[fault]
    tried: list[str] = []
    expected = names("projector", CARD)
    for method, honest in dict(methods.factors).items():
        bad = raising(error) if error else spoiled(honest, fault)

        def count(W: Any, device: Any, values: Any, method: Any = method, bad: Any = bad, honest: Any = honest) -> Any:
            tried.append(method)
            return (bad if len(tried) <= failing else honest)(W, device, values)

        methods.factors[method] = count
    W = weights()
    found = truncate(W, 6, CARD, "projector")
    assert found.certificate.method == expected[failing]
    notes = found.certificate.note.split("; ")
    assert [note.split(": ")[0] for note in notes] == expected[:failing]
    assert all(told in note for note in notes) and "123" not in found.certificate.note
    assert torch.allclose(found.matrix, truncate(W, 6, HOST, "svd").matrix, atol=1e-4)


def test_values_take_the_next_step_too(methods: Methods) -> None:
    honest = methods.values["gram"]
    methods.values["gram"] = lambda W, d: honest(W, d) if d.host_blas else raising(RUNS_OUT)()
    found = measure(weights(), CARD)
    assert (found.method, found.note) == (
        "gram on the host",
        "gram: out of memory on the device; gram float64: out of memory on the device",
    )
    assert found.singular_values == pytest.approx(torch.linalg.svdvals(weights().double()).numpy())


@pytest.mark.parametrize("solver", ["eigvalsh", "eigh"])
@pytest.mark.parametrize("fault", ["NaN", "shifted"])
def test_a_wrong_spectrum_is_noticed(solver: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = getattr(torch.linalg, solver)

    def wrong(G: torch.Tensor) -> Any:
        found = true(G)
        values = found if solver == "eigvalsh" else found[0]
        values = values * math.nan if fault == "NaN" else values + 0.01 * values[-1]
        return values if solver == "eigvalsh" else (values, found[1])

    monkeypatch.setattr(torch.linalg, solver, wrong)
    W = weights()
    if solver == "eigvalsh":
        found = measure(W, CARD)
        method, note, s = found.method, found.note, found.singular_values
    else:
        result = truncate(W, 6, CARD)
        method, note, s = result.certificate.method, result.certificate.note, result.singular_values
    assert method == "gram on the host"
    assert ("NaN or Inf" if fault == "NaN" else "miss the trace") in note
    assert s == pytest.approx(np.linalg.svd(W.double().numpy(), compute_uv=False))


def test_memory_is_asked_before_a_matrix_is_sent(methods: Methods) -> None:
    sent: list[str] = []
    honest = methods.factors["gram"]

    def record(W: torch.Tensor, device: Device, values: Any) -> Factors:
        sent.append(device.label)
        return honest(W, device, values)

    methods.factors["gram"] = record
    found = truncate(weights(), 6, replace(CARD, share=10_000))
    assert found.certificate.method == "gram on the host" and sent == ["cpu float64"]
    assert "GiB of memory on the device, more than is free" in found.certificate.note
    sent_later = torch.empty(14336, 4096, dtype=torch.bfloat16, device="meta")
    mps = replace(CARD, host_eigensolver=True)
    needed = [device_bytes(sent_later, method, card) for card in (CARD, mps) for method in ("gram", "projector")]
    eigh = (64 * eigh_squares() + 4 * 32) + 64  # in float32: squares of 64 MiB, 4 blocks of 32, and the libraries' own
    assert [round(n / 2**20) for n in needed] == [eigh, eigh, 256, 384]
    there = weights()
    both = 2 * there.nbytes  # W and the result
    assert device_bytes(there, "gram", CARD) == device_bytes(there.to("meta"), "gram", CARD) + both


@pytest.mark.parametrize(
    ("version", "squares"), [("2.8.0", 5), ("2.11.0+cu130", 5), ("2.12.1", 6), ("2.13.0+cpu", 6), ("3.0.0a0+git1", 6)]
)
def test_the_eigenproblem_s_memory_goes_by_the_routine_of_this_torch(version: str, squares: int) -> None:
    assert eigh_squares(version) == squares


def test_a_mistake_of_ours_is_not_hidden(methods: Methods) -> None:
    methods.factors["gram"] = raising(RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        truncate(weights(), 6, CARD)
    methods.factors["gram"] = raising(RuntimeError("something else: out of memory"))
    with pytest.raises(RuntimeError, match="something else"):
        truncate(weights(), 6, HOST)  # on the host memory is the machine's affair


def test_when_all_fail_every_reason_is_told(methods: Methods) -> None:
    for method, honest in dict(methods.factors).items():
        methods.factors[method] = spoiled(honest, "wrong")
    with pytest.raises(NumericalError, match=r"projector: .*gram: .*gram on the host: .*svd: .*try --exclude") as error:
        truncate(weights(), 6, CARD, "projector")
    assert error.value.residual is not None and error.value.residual > 0.1
