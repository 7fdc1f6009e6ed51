"""The one queue that feeds the workers: read, compute and hand on, of different matrices at the same time.

reader -> [two ahead] -> two and more workers per GPU, or one per core -> [two behind] -> the caller, who writes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, Generic

import torch

from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import Checkpoint
from laser.engine.crew import Crew, T, Visits, Work, do, own_stream, quiet
from laser.errors import UsageError
from laser.spectral.devices import Device, choose_device, shared, staged
from laser.spectral.measuring import chosen_routes

AHEAD = 1  # in a queue; with the one that its sender holds, two
PATIENCE = 0.1  # seconds between two looks at whether the work was given up


def choose_crew(
    device: str = "auto",
    precision: str = "auto",
    *,
    workers: int | None = None,
    engine: str = "threads",
) -> Crew:
    """The workers that a command line asks for.

    device: one, or several as "cuda:0,cuda:1", or "all": every CUDA device, if any

    On the host by the routes that this machine's probe found fastest; in a cluster by the default ones everywhere.
    Raises UsageError for what is not there, or for devices of different kinds or precisions, whose results would
    differ.
    """
    if engine != "threads" and engine.partition("://")[0] != "ray":
        raise UsageError(f"no engine is called {engine!r}; try --engine threads, ray or ray://HOST:PORT")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers do nothing; try --workers 1")
    if device == "all":
        device = ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count())) or "auto"
    names = [name for name in device.split(",") if name]
    if len({name.partition(":")[0] for name in names}) != 1 or len(set(names)) != len(names):
        raise UsageError(f"--device {device} must name different devices of one kind; try --device cuda:0,cuda:1")
    if engine == "threads":
        chosen = tuple(choose_device(name, precision) for name in names)
        chosen = tuple(replace(found, routes=chosen_routes(found)) for found in chosen)
    else:
        from laser.engine.ray import choose_in_cluster  # imported when needed: Ray is an extra

        chosen = (choose_in_cluster(engine, names[0].partition(":")[0], precision),)
    if len({found.dtype for found in chosen}) != 1:
        labels = ", ".join(found.label for found in chosen)
        raise UsageError(f"found {labels}, expected one precision on all devices; try --precision float32")
    if workers is not None and not chosen[0].host_blas:
        raise UsageError(f"--workers is for the cpu, found {chosen[0].name}; try --device cpu, or without --workers")
    return Crew(chosen, workers, engine)


def visit_all(checkpoint: Checkpoint, matrices: Sequence[Matrix], work: Work[T], crew: Crew) -> Visits[T]:
    """Every matrix with what `work` made of it and the seconds that took, in the order in which they are finished.

    They are begun in the order given. The first exception of a reader or worker is raised here, once all have
    stopped; so they do when the generator is closed (use contextlib.closing). What `work` makes may not depend on
    which of the crew's devices it gets.
    """
    if crew.engine != "threads":
        from laser.engine.ray import visit_on_ray  # imported when needed: Ray is an extra

        yield from visit_on_ray(checkpoint, matrices, work, crew)
    elif matrices:
        pool = crew.pool(matrices)
        yield from _visit_here(checkpoint, matrices, work, [shared(device, pool.count(device)) for device in pool])


class _GivenUp(Exception):
    pass


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _Pipe(Generic[T]):
    """A bounded queue whose ends wake up when the work is given up."""

    def __init__(self, stop: Event) -> None:
        self._queue: Queue[T] = Queue(AHEAD)
        self._stop = stop

    def put(self, item: T) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=PATIENCE)
            except Full:
                continue
        raise _GivenUp

    def get(self) -> T:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=PATIENCE)
            except Empty:
                continue
        raise _GivenUp


def _visit_here(checkpoint: Checkpoint, matrices: Sequence[Matrix], work: Work[T], pool: Sequence[Device]) -> Visits[T]:
    stop = Event()
    todo: _Pipe[tuple[Matrix, torch.Tensor] | None] = _Pipe(stop)
    done: _Pipe[tuple[Matrix, T, float] | _Failure | None] = _Pipe(stop)

    def read() -> None:
        for matrix in matrices:
            todo.put((matrix, staged(checkpoint.read(matrix.tensor, matrix.part), pool[0])))
        for _ in pool:
            todo.put(None)

    def compute(device: Device) -> None:
        torch.set_num_threads(1 if device.host_blas else torch.get_num_threads())  # OpenMP keeps it per thread
        with own_stream(device):
            while (item := todo.get()) is not None:
                done.put(do(work, *item, device))
                del item  # the weights, while the next are waited for
        done.put(None)

    def guarded(job: Callable[..., None], *arguments: Any) -> None:
        try:
            job(*arguments)
        except _GivenUp:
            pass
        except BaseException as error:
            try:
                done.put(_Failure(error))
            except _GivenUp:
                pass

    threads = [Thread(target=guarded, args=(read,), name="laser reader")]
    threads += [Thread(target=guarded, args=(compute, device), name=f"laser {device.name}") for device in pool]
    with quiet(pool[0]):
        try:
            for thread in threads:
                thread.start()
            working = len(pool)
            while working:
                item = done.get()
                if isinstance(item, _Failure):
                    raise item.error
                if item is None:
                    working -= 1
                else:
                    yield item
                del item
        finally:
            stop.set()
            for thread in threads:
                if thread.ident is not None:  # where there was room for no more, some were not started
                    thread.join()
