"""The same visits as tasks of a Ray cluster. Ray is an extra, and imported only here.

Of a scan a task is one matrix, or several small ones, so that it outweighs its overhead of milliseconds (docs/log).
It reads its matrices itself, so the checkpoint has to lie at the same path on every node. Its result comes back through
Ray's object store. Twice as many tasks are in flight as the cluster has slots: memory stays bounded, no slot waits for
the driver, and that is what a lost node costs at the most.

Of a reduction a task is a whole shard, which one node writes by itself: through one driver 1.4 GPUs' results would fit.
So the output, too, has to lie at the same path everywhere. What comes back is the shard's hash and the records of its
matrices, which the driver journals.

Ray itself starts the tasks of a lost node again, elsewhere. The GPUs have to be of one kind: a task that is run twice
has to make the same bytes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.checkpoint.safetensors import BITS
from laser.engine.crew import Crew, T, Visits, Work, do, quiet
from laser.errors import LaserError, UsageError, first_line, is_out_of_memory
from laser.spectral.devices import Device, choose_device

# A task's work, in m * n * min(m, n): about a tenth of a second on a core and on an H100.
GROUP = {"cpu": 2e9, "cuda": 2e11}
GROUP_BYTES = 256 << 20  # of results that come back at once
RETRIES = 5  # Ray's own, for each task, where a node or a worker is lost
IN_FLIGHT = 2  # tasks per slot
CONNECT_TRIES = 2  # of connecting from outside: now and then the server that Ray starts for a client ends as it begins
# Of a GPU per task: two share one, and while one of them reads and copies, the other computes.
SHARE = 0.5
RESOURCES = {"cpu": "CPU", "cuda": "GPU"}
ACCELERATOR = "accelerator_type:"  # before the name of a kind, among a node's resources
X = TypeVar("X")
R = TypeVar("R")


@dataclass(frozen=True)
class _Plain:
    """A tensor as bytes that Ray shares without a copy."""

    data: np.ndarray  # (bytes,), uint8
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Failed:
    """An error of ours, or memory that ran out, handed to the driver as it is.

    All others are Ray's to wrap, or to try again.
    """

    error: LaserError | MemoryError


def visit_on_ray(checkpoint: Checkpoint, matrices: Sequence[Matrix], work: Work[T], crew: Crew) -> Visits[T]:
    """As `workers.visit_all`. Connects to the cluster that `crew.engine` names, or that is there already."""
    device = crew.devices[0]
    kind = device.torch_device.type
    _require_lent(kind)
    ray = connect(crew.engine)
    options: dict[str, Any] = {"num_gpus": SHARE, "num_cpus": 1} if kind == "cuda" else {"num_cpus": 1}
    slots, task = _slots(ray, kind), ray.remote(max_retries=RETRIES, **options)(_task)
    shared = [ray.put(item) for item in (_portable(checkpoint), work)]  # once per node, not once per task
    submitted = (task.remote(*shared, group, device) for group in groups(matrices, kind))
    with closing(_results(ray, submitted, IN_FLIGHT * slots)) as results:
        for matrix, result, seconds in results:
            yield matrix, from_bytes(result), seconds
            del result


def on_nodes(
    checkpoint: Checkpoint, tasks: Sequence[X], work: Callable[[X, Crew], R], crew: Crew
) -> Generator[R, None, None]:
    """What `work` gives of each task, in the order in which they are finished.

    A task is one node's alone. Two share a GPU, as of a scan: one computes while the other writes. Where there are
    fewer tasks than GPUs or cores, each gets several, as many as one node has. `work` is handed the workers to use.
    """
    device = crew.devices[0]
    kind = device.torch_device.type
    _require_lent(kind)
    _portable(checkpoint)
    ray = connect(crew.engine)
    resource = RESOURCES[kind]
    _slots(ray, kind)
    here = [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]
    lent = lent_to_a_task(len(tasks), here, SHARE if kind == "cuda" else 1)
    options: dict[str, Any] = {"num_gpus": lent, "num_cpus": 1} if kind == "cuda" else {"num_cpus": lent}
    task, shared = ray.remote(max_retries=RETRIES, **options)(_on_node), ray.put(work)
    submitted = (task.remote(shared, item, device, lent) for item in tasks)
    with closing(_results(ray, submitted, IN_FLIGHT * sum(here))) as results:
        yield from results


def lent_to_a_task(tasks: int, here: Sequence[int], least: float) -> float:
    """How many of the GPUs or cores `here`, by node, each of so many tasks gets.

    As many as there are for it, and at least `least` of one. At most those of the smallest node: for more a task would
    wait for ever."""
    whole = min(sum(here) // max(tasks, 1), min(filter(None, here), default=1))
    return whole if whole > 1 else least


def _results(ray: Any, submitted: Iterator[Any], most: int) -> Generator[Any, None, None]:
    """The results of tasks, each of which returns a list; at most so many are in flight."""
    pending: list[Any] = []
    try:
        while True:
            while len(pending) < most and (reference := next(submitted, None)) is not None:
                pending.append(reference)
            if not pending:
                return
            (ready,), pending = ray.wait(pending, num_returns=1)
            try:
                results = ray.get(ready)
            except (ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectStoreFullError) as error:
                raise MemoryError(f"Ray: {first_line(error)}") from error
            except ray.exceptions.WorkerCrashedError as error:
                raise LaserError(
                    f"a worker of Ray ended {RETRIES + 1} times over the same matrices, as the kernel does it where "
                    "memory is short; try --engine threads"
                ) from error
            del ready
            while results:
                if isinstance(results[0], _Failed):
                    raise results[0].error
                yield results.pop(0)
    finally:
        for reference in pending:
            with suppress(TypeError):  # Ray up to 2.46 has no owner for the object of a node that is gone
                ray.cancel(reference)


def choose_in_cluster(engine: str, kind: str, precision: str) -> Device:
    """As `choose_device`, but of the cluster's GPUs, which the driver need not have; auto takes them if there are any.

    Raises UsageError for a kind of device that Ray does not lend, or that the cluster lacks.
    """
    if kind == "cpu":  # the same everywhere
        return choose_device("cpu", precision)
    if kind != "auto":
        _require_lent(kind)
    ray = connect(engine)
    if kind == "auto" and not ray.cluster_resources().get("GPU"):
        return choose_device("cpu", precision)
    _slots(ray, "cuda")
    try:
        return ray.get(ray.remote(num_gpus=SHARE)(choose_device).remote("cuda", precision))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as it was raised on the node


def _require_lent(kind: str) -> None:
    if kind not in GROUP:
        raise UsageError(f"Ray lends no device {kind!r}, expected cuda or cpu; try --device cpu, or --engine threads")


def _slots(ray: Any, kind: str) -> int:
    """How many tasks the cluster runs at a time. Raises UsageError for none."""
    resource = RESOURCES[kind]
    if kind == "cuda":
        _require_one_kind(ray.nodes())
    slots = int(ray.cluster_resources().get(resource, 0) / (SHARE if kind == "cuda" else 1))
    if not slots:
        raise UsageError(
            f"the Ray cluster has no {resource}, expected one per worker; try --device cpu or --engine ray"
        )
    return slots


def _require_one_kind(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raises UsageError for GPUs of several kinds, by the names that Ray gives them."""
    kinds = {name for node in nodes if node["Alive"] for name in node["Resources"] if name.startswith(ACCELERATOR)}
    if len(kinds) > 1:
        names = ", ".join(sorted(name.removeprefix(ACCELERATOR) for name in kinds))
        raise UsageError(
            f"the Ray cluster has GPUs of several kinds ({names}), expected one, for their last bits differ; "
            "try a cluster of one kind, or --device cpu"
        )


def connect(engine: str) -> Any:
    """Ray, connected: to HOST:PORT by its client protocol, to the cluster of this machine, or to a new one."""
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--engine {engine} needs Ray ({error}); try pip install 'laser-rmt[ray]'") from error
    tries = 0
    while not ray.is_initialized():
        tries += 1
        try:
            ray.init(address=engine if "://" in engine else None, log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionAbortedError as error:  # it answers, but the server that it starts for each client did not
            if tries < CONNECT_TRIES:
                continue
            cause = str(error).strip().splitlines()[-1:]  # of the traceback on that side
            raise UsageError(
                f"the Ray cluster at {engine} failed {tries} times to start a server for this connection "
                f"({first_line(ConnectionError(*cause))}); try again, or read Ray's logs on its head node"
            ) from error
        except ConnectionError as error:
            raise UsageError(
                f"no Ray cluster answers at {engine} ({first_line(error)}); try `ray start --head` there"
            ) from error
        except ValueError as error:  # its client protocol is an extra of Ray's own
            raise UsageError(f"--engine {engine}: {first_line(error)}; try pip install 'laser-rmt[ray]'") from error
        except RuntimeError as error:  # another Ray or Python than the cluster's
            raise UsageError(f"--engine {engine}: {first_line(error)}; try the cluster's versions here") from error
    return ray


def groups(matrices: Sequence[Matrix], kind: str) -> Iterator[list[Matrix]]:
    """Consecutive matrices, together about GROUP of work and at most GROUP_BYTES."""
    group: list[Matrix] = []
    work = size = 0
    for matrix in matrices:
        mine = matrix.parameters * BITS[matrix.dtype] // 8
        if group and (work + matrix.cost > GROUP[kind] or size + mine > GROUP_BYTES):
            yield group
            group, work, size = [], 0, 0
        group.append(matrix)
        work, size = work + matrix.cost, size + mine
    if group:
        yield group


def _task(checkpoint: Checkpoint, work: Work[T], group: list[Matrix], device: Device) -> list[Any]:
    """On a node: the same visits that a thread of the driver would make, with one BLAS thread as there."""
    done: list[Any] = []
    if device.torch_device.type == "cuda":
        device = _part_of_the_card(device)
    with quiet(device):
        for matrix in group:
            try:
                W = checkpoint.read(matrix.tensor, matrix.part)
                matrix, result, seconds = do(work, matrix, W, device)
                done.append((matrix, to_bytes(result), seconds))
            except Exception as error:
                done.append(_failed(error))
    return done


def _on_node(work: Callable[[X, Crew], R], item: X, device: Device, lent: float) -> list[R | _Failed]:
    """On a node: one task of `on_nodes`, by a crew of what Ray has lent it."""
    if device.torch_device.type != "cuda":
        crew = Crew((device,), int(lent))
    elif lent < 1:
        crew = Crew((_part_of_the_card(device),))
    else:  # it sees those cards alone, whatever their numbers
        crew = Crew(tuple(replace(device, name=f"cuda:{number}") for number in range(int(lent))))
    try:
        return [work(item, crew)]
    except Exception as error:
        return [_failed(error)]


def _part_of_the_card(device: Device) -> Device:
    """The one card that Ray lets a task see, whatever its number, of which another task has a part, too."""
    return replace(device, name="cuda", share=int(SHARE * torch.cuda.mem_get_info()[1]))


def _failed(error: Exception) -> _Failed:
    """An error as the driver is to raise it. Raises it here where Ray is to wrap it."""
    if isinstance(error, LaserError):
        return _Failed(error)
    if isinstance(error, MemoryError | RuntimeError | OSError) and is_out_of_memory(error):
        return _Failed(MemoryError(first_line(error)))  # as a class that every node has
    raise error


def _portable(checkpoint: Checkpoint) -> Checkpoint:
    """Raises UsageError for a checkpoint that a task cannot open by its path."""
    if any(shard.data is not None for shard in checkpoint.shards):
        raise UsageError(
            f"{checkpoint.name} is not a directory of tidy safetensors that every node can read; try --engine threads"
        )
    return checkpoint


def to_bytes(result: Any) -> Any:
    """Tensors of a result as plain bytes; pickling a tensor would copy it."""
    if isinstance(result, tuple):
        parts = [to_bytes(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)  # a named one stays so
    if isinstance(result, torch.Tensor):
        whole = result.contiguous()
        return _Plain(whole.reshape(-1).view(torch.uint8).numpy(), whole.dtype, tuple(whole.shape))
    return result


def from_bytes(result: Any) -> Any:
    """The result as it was; tensors share their bytes with Ray's object store, so they are for reading only."""
    if isinstance(result, tuple):
        parts = [from_bytes(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    if isinstance(result, _Plain):
        with warnings.catch_warnings():  # that nobody may write to it: nobody does
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(result.data).view(result.dtype).reshape(result.shape)
    return result
