"""The queue: the same bytes whatever the number of workers and their order, bounded, and quick to give up."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Machine
from helpers import snapshot
from threadpoolctl import ThreadpoolController

import laser
from laser import pipeline
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.engine import workers
from laser.engine.crew import Crew, most_expensive_first, peak_bytes, quiet, worker_bytes
from laser.engine.workers import choose_crew, visit_all
from laser.errors import NumericalError, UsageError
from laser.flow import run_flow
from laser.pipeline import by_shard, reduce, scan
from laser.plan import Treatment, make_plan
from laser.spectral import devices, factorise
from laser.spectral.data_metric import ByData, data_values, truncate_in_metric
from laser.spectral.devices import Device, choose_device
from laser.spectral.factorise import device_bytes

CPU = choose_device("cpu")


class Full(Device):
    """A GPU that runs out of memory whenever anything is sent to it."""

    @property
    def host_blas(self) -> bool:
        return False

    @property
    def torch_device(self) -> torch.device:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB.")


class Alone(Crew):
    """One worker per device."""

    def pool(self, matrices: Sequence[Matrix]) -> tuple[Device, ...]:
        return self.devices


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Full:
    # Its torch_device fails, also where only its kind is asked for: what asks is put aside.
    monkeypatch.setattr(workers, "own_stream", lambda _: nullcontext())
    monkeypatch.setattr(factorise, "free_bytes", lambda _: None)
    monkeypatch.setattr(factorise, "release", lambda _: None)
    monkeypatch.setattr(devices, "release", lambda _: None)
    return Full("cuda", torch.float64, False, "pretends")


def scanned(checkpoint: laser.Checkpoint) -> list[Matrix]:
    return [m for m in list_matrices(checkpoint) if laser.Selection().why_not(m) is None]


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(pico: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    for count in (1, 2, 5):
        place = tmp_path / str(count)
        place.mkdir()
        crew = Crew((CPU,), count)
        spectra = scan(checkpoint, crew=crew)
        spectra.save(place / "spectra.safetensors")
        reduce(checkpoint, make_plan(spectra, "mp-edge"), place / "out", crew=crew)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2") == snapshot(tmp_path / "5")


@pytest.mark.slow
def test_large_matrices_too(make_pico: Callable[..., Path], tmp_path: Path) -> None:
    """Above the size where BLAS would take a second thread, whose sums end in other bits; it may have two here."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(800, 850, generator=generator) for i in (0, 1)}
    checkpoint = laser.open_checkpoint(make_pico(tensors=tensors, shards=1))

    def threads(matrix: Matrix, W: torch.Tensor, device: Device) -> set[int]:
        return {pool["num_threads"] for pool in ThreadpoolController().info() if pool["user_api"] == "blas"}

    with ThreadpoolController().limit(limits=2, user_api="blas"):
        for count in (1, 2):
            crew = Crew((CPU,), count)
            scan(checkpoint, crew=crew).save(tmp_path / f"{count}.safetensors")
            matrices = laser.list_matrices(checkpoint)
            assert [found for _, found, _ in visit_all(checkpoint, matrices, threads, crew)] == [{1}] * len(matrices)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


@pytest.mark.parametrize("name, threads", [("cpu", 1), ("cuda", 1), ("mps", 2)])
def test_blas_has_one_thread_where_several_workers_come_and_go(name: str, threads: int) -> None:
    """The second enters before the first leaves: had they anything to change, it would be put back to what was not."""

    def now() -> set[int]:
        return {pool["num_threads"] for pool in ThreadpoolController().info() if pool["user_api"] == "blas"}

    first, second = ExitStack(), ExitStack()
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        with quiet(Device(name, torch.float32, name != "cuda", "pretends")):
            assert now() == {threads}
            with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
                one.submit(first.enter_context, devices.host_threads(8)).result()
                other.submit(second.enter_context, devices.host_threads(8)).result()
                one.submit(first.close).result()
                other.submit(second.close).result()
            assert now() == {threads}
        assert now() == {2}


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["two passes", "one pass"])
def test_a_gpu_without_memory_ends_in_what_the_host_finds(full: Full, pico: Path, tmp_path: Path, flow: str) -> None:
    """The matrix itself, its null, its tails and every step of the ladder."""
    checkpoint, found = laser.open_checkpoint(pico), {}
    for label, device in (("host", CPU), ("gpu", full)):
        found[label] = run_flow(
            checkpoint, tmp_path / label, laser.Selection(), lambda spectra: make_plan(spectra, "parallel:0.5"),
            crew=Alone((device,)), null_draws=2, treatment=Treatment("parallel:0.5") if flow == "one pass" else None,
        )  # fmt: skip
    host, gpu = found["host"], found["gpu"]
    assert gpu.outcome.shards == host.outcome.shards and gpu.plan.reductions.keys() == host.plan.reductions.keys()
    assert gpu.spectra.kurtosis == host.spectra.kurtosis and not gpu.spectra.skipped.keys() - host.spectra.skipped
    for name, s in host.spectra.values.items():
        assert (gpu.spectra.values[name] == s).all() and (gpu.spectra.nulls[name] == host.spectra.nulls[name]).all()
        assert gpu.spectra.notes[name] == "by gram on the host, as gram: out of memory on the device"
    assert {m["method"] for m in gpu.outcome.matrices.values()} == {"gram on the host"}


def test_the_metric_of_the_data_goes_to_the_host_too(full: Full) -> None:
    generator = torch.Generator().manual_seed(0)
    W, X = (torch.randn(size, 40, generator=generator) for size in (30, 300))
    metric = ByData("full", (X.T @ X / 300).double(), 300)
    assert (data_values(W, metric, full) == data_values(W, metric, CPU)).all()
    assert torch.equal(*(truncate_in_metric(W, 5, metric, device).matrix for device in (full, CPU)))


def test_what_a_worker_may_use_does_not_depend_on_what_another_holds(
    pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, lock, both = 0, threading.Lock(), threading.Barrier(2, timeout=60)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000 - held, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())

    def work(matrix: Matrix, W: torch.Tensor, device: Device) -> int | None:
        nonlocal held
        both.wait()
        with lock:
            held += 300
            found = devices.free_bytes(device)
        both.wait()
        with lock:
            held -= 300
        return found

    checkpoint, card = laser.open_checkpoint(pico), Device("cuda", torch.float64, False, "pretends")
    assert [found for _, found, _ in visit_all(checkpoint, scanned(checkpoint)[:4], work, Crew((card,)))] == [500] * 4


def test_small_matrices_bring_more_workers_to_a_gpu_as_its_memory_allows(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    def matrix(*shape: int) -> Matrix:
        return Matrix("w", "q", 0, None, shape, "BF16", "w")

    def workers(sides: Sequence[tuple[int, int]], share: int = 80 << 30, gpus: int = 1) -> int:
        cards = tuple(Device(f"cuda:{i}", torch.float64, False, "pretends", share) for i in range(gpus))
        pool = Crew(cards).pool([*(matrix(*shape) for shape in sides), matrix(4096)])  # a norm is none
        assert {pool.count(card) for card in cards} == {len(pool) // gpus}
        return len(pool)

    large, small = (4096, 14336), (4096, 1024)
    assert workers([large]) == workers([large, small], gpus=1) == 2  # without a GPU here there is none to ask
    machine(cuda=2)
    assert (workers([large]), workers([large, small]), workers([small, (64, 64)]), workers([])) == (2, 4, 8, 2)
    assert workers([small], gpus=2) == 16
    one = 2 * 4 * 4096 * 14336 + device_bytes(
        torch.empty(large, device="meta"), "gram", Device("cuda", torch.float64, False, "")
    )
    assert [workers([large, small], each * one) for each in (0, 1, 3, 9)] == [2, 2, 3, 4]
    assert workers([small], 1 << 30) > 2  # which need less


def test_what_is_read_ahead_for_cuda_is_page_locked(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    W, locked = torch.ones(3, 4), torch.full((3, 4), 2.0)
    card = Device("cuda", torch.float64, False, "pretends")
    # Page-locked memory needs a driver.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: locked)
    assert devices.staged(W, CPU.torch_device) is devices.staged(W, card.torch_device) is W  # there is no CUDA
    machine(cuda=1)
    assert devices.staged(W, CPU.torch_device) is W and devices.staged(W, card.torch_device) is locked

    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    assert devices.staged(W, card.torch_device) is W  # it is only slower


def test_only_a_contiguous_page_locked_tensor_is_sent_to_cuda_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, where, non_blocking=False: asked.append(non_blocking) or x)
    for pinned in (False, True):
        # As above.
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _, pinned=pinned: pinned)
        for x in (torch.ones(3, 4), torch.ones(3, 4).T):
            for name in ("cuda:0", "mps", "cpu"):
                devices.sent(x, torch.device(name))
    assert asked == [False] * 6 + [True] + [False] * 5


def test_a_matrix_is_sent_whole_only_where_its_factorisation_fits_beside_it() -> None:
    card, W = Device("meta", torch.float64, False, "pretends"), torch.ones(40, 24)
    needed = 2 * W.nbytes + factorise.device_bytes(W, "gram", card)
    assert factorise.to_device_if_it_fits(W, replace(card, share=needed - 1)) is W
    assert factorise.to_device_if_it_fits(W, replace(card, share=needed)).device.type == "meta"


@pytest.mark.slow
def test_any_order_of_completion_gives_the_same_output(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer gets matrices of all shards in a thoroughly wrong order."""
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(scan(checkpoint), "mp-edge")
    reduce(checkpoint, plan, tmp_path / "straight")

    # The wrong order, which laser never asks for.
    monkeypatch.setattr(pipeline, "by_shard", lambda c, ms: by_shard(c, ms)[::-1])
    reduce(checkpoint, plan, tmp_path / "backwards")
    assert snapshot(tmp_path / "straight") == snapshot(tmp_path / "backwards")


def test_most_expensive_first_and_shard_by_shard(pico: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    matrices = scanned(checkpoint)
    costs = [m.cost for m in most_expensive_first(matrices)]
    assert costs == sorted(costs, reverse=True)
    order = [(checkpoint.tensors[m.tensor].shard, -m.cost) for m in by_shard(checkpoint, matrices)]
    assert order == sorted(order)


@pytest.mark.parametrize("count", [1, 3])
def test_every_matrix_is_visited_once_and_few_are_in_memory(pico: Path, count: int) -> None:
    checkpoint = laser.open_checkpoint(pico)
    alive, most, lock = 0, 0, threading.Lock()
    true_read = laser.Checkpoint.read

    def read(self: laser.Checkpoint, name: str, part: Any = None) -> torch.Tensor:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return true_read(self, name, part)

    def work(matrix: Matrix, W: torch.Tensor, device: Device) -> str:
        return matrix.name

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        # Counted while they are alive: in the thread that reads.
        patch.setattr(laser.Checkpoint, "read", read)
        with closing(visit_all(checkpoint, scanned(checkpoint), work, Crew((CPU,), count))) as visits:
            for matrix, name, _ in visits:
                assert matrix.name == name
                seen.append(name)
                time.sleep(0.002)
                with lock:
                    alive -= 1
    assert sorted(seen) == sorted(m.name for m in scanned(checkpoint))
    assert most <= count + 2 + 2 + 1  # at work, two ahead, two behind, and the caller's


@pytest.mark.parametrize("error", [NumericalError("no"), KeyboardInterrupt(), MemoryError()])
def test_what_fails_in_a_worker_is_raised_here_and_all_threads_end(pico: Path, error: BaseException) -> None:
    checkpoint, before = laser.open_checkpoint(pico), threading.active_count()

    def work(matrix: Matrix, W: torch.Tensor, device: Device) -> None:
        if "layers.1" in matrix.name:
            raise error

    with pytest.raises(type(error)):
        list(visit_all(checkpoint, scanned(checkpoint), work, Crew((CPU,), 2)))
    assert threading.active_count() == before


def test_a_caller_that_stops_ends_all_threads(pico: Path) -> None:
    checkpoint, before = laser.open_checkpoint(pico), threading.active_count()
    threads = torch.get_num_threads()
    with closing(visit_all(checkpoint, scanned(checkpoint), lambda m, W, d: m.name, Crew((CPU,), 2))) as visits:
        next(visits)
    assert (threading.active_count(), torch.get_num_threads()) == (before, threads)


def test_a_read_that_fails_is_raised(pico: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    last = checkpoint.shards[-1]
    last.path.write_bytes(last.path.read_bytes()[:-100])
    with pytest.raises(laser.CheckpointError, match="it changed; run again"):
        list(visit_all(checkpoint, list_matrices(checkpoint)[::-1], lambda m, W, d: None, Crew((CPU,), 2)))


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"workers": 0}, "0 workers do nothing"),
        ({"engine": "slurm"}, "no engine is called 'slurm'; try --engine threads, ray"),
        ({"device": "cpu,cuda:0"}, "different devices of one kind"),
        ({"device": "cuda:0,cuda:0"}, "different devices of one kind"),
    ],
)
def test_crews_that_cannot_be(asked: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_crew(**{"device": "cpu"} | asked)  # pyright: ignore[reportArgumentType]


def test_gpus_that_would_choose_different_precisions_need_one_for_all(machine: Machine) -> None:
    machine(cuda=3, capability={"cuda:0": (9, 0), "cuda:1": (8, 6), "cuda:2": (8, 6)})
    with pytest.raises(UsageError, match=r"found cuda:0 float64, cuda:1 float32, expected one.*--precision float32"):
        choose_crew("cuda:0,cuda:1")
    assert choose_crew("cuda:0,cuda:1", "float32").label == "cuda float32"
    assert [device.name for device in choose_crew("all", "float32").devices] == ["cuda:0", "cuda:1", "cuda:2"]


def test_a_crew_fits_into_memory(pico: Path) -> None:
    matrices = scanned(laser.open_checkpoint(pico))
    each = worker_bytes(matrices, CPU)
    crew = Crew((replace(CPU, share=2 * each),))
    assert len(crew.pool(matrices)) == 1  # half of what is there
    assert len(Crew((CPU,), 3).pool(matrices)) == 3  # asked for
    assert len(Crew((CPU,), 3).pool(matrices[:2])) == 2
    assert peak_bytes(matrices, crew) == each + 4 * 2 * 48 * 32


def test_records_name_the_kind_of_device_and_not_its_number() -> None:
    first, second = (Device(f"cuda:{i}", torch.float64, False, "") for i in (0, 1))
    assert Crew((second,)).label == Crew((first, second)).label == "cuda float64"
    assert Crew((CPU,), 2).label == CPU.label
    assert Crew((first, second)).pool([]) == (first, second, first, second)  # two workers each
