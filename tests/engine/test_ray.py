"""The engine ray on a real local cluster of two nodes: the bytes of one process, also when a node is killed."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import snapshot

import laser
from laser.checkpoint.matrices import Matrix, list_matrices
from laser.checkpoint.swap import writing
from laser.checkpoint.writer import write_checkpoint
from laser.engine import ray as ray_engine
from laser.engine.crew import Crew
from laser.engine.workers import choose_crew, visit_all
from laser.errors import NumericalError, UsageError
from laser.flow import run_flow
from laser.outcome import describe_by
from laser.pipeline import Cuts, Reduction, Visited, makers_of, prepare, reduce, scan, stored
from laser.plan import Treatment, make_plan
from laser.spectral.devices import Device, choose_device

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'laser-rmt[ray]'")
# Ray leaves the log of its client server open.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"),
]
CPU = choose_device("cpu")
ON_RAY = choose_crew("cpu", engine="ray")
with closing(socket.socket()) as free:
    free.bind(("127.0.0.1", 0))
    CLIENT_PORT = free.getsockname()[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a second node on this machine, one slot each."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 << 20}
    quickly = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # that a node is dead
    quickly |= {"worker_niceness": 0}  # 15 by default: beside other work its workers would wait for minutes
    head = small | {"include_dashboard": False, "_system_config": quickly, "ray_client_server_port": CLIENT_PORT}
    with pytest.MonkeyPatch.context() as environment:  # its server's start takes a while on a machine with other work
        environment.setenv("RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S", "90")
        nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.WARNING)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task per matrix, however small."""
    # A limit: pico would be one group, and so one task.
    monkeypatch.setitem(ray_engine.GROUP, "cpu", 1)


def test_scan_and_reduce_are_those_of_one_process(cluster: Any, pico: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    for label, crew in {"here": Crew((CPU,), 1), "ray": ON_RAY}.items():
        place = tmp_path / label
        place.mkdir()
        spectra = scan(checkpoint, crew=crew)
        spectra.save(place / "spectra.safetensors")
        reduce(checkpoint, make_plan(spectra, "mp-edge"), place / "out", crew=crew)
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "ray")


def test_a_node_writes_its_shards_by_itself(
    cluster: Any, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans and one pass: in this process no matrix is made, and what comes back is the same to the byte."""
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(scan(checkpoint, crew=ON_RAY), "mp-edge")
    treatment = {"choose": lambda spectra: make_plan(spectra, "mp-edge"), "treatment": Treatment("mp-edge")}
    reduce(checkpoint, plan, tmp_path / "here", crew=Crew((CPU,), 1))
    run_flow(checkpoint, tmp_path / "here-1", laser.Selection(), crew=Crew((CPU,), 1), name="x", **treatment)

    def fail(*_: Any) -> None:
        raise AssertionError("made by the driver")

    monkeypatch.setattr(Cuts, "make", fail)  # the nodes' processes have their own
    reduce(checkpoint, plan, tmp_path / "ray", crew=ON_RAY)
    run_flow(checkpoint, tmp_path / "ray-1", laser.Selection(), crew=ON_RAY, name="x", **treatment)
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "ray")
    assert snapshot(tmp_path / "here-1") == snapshot(tmp_path / "ray-1")


def test_a_worker_killed_in_the_middle_of_a_shard(cluster: Any, pico: Path, tmp_path: Path) -> None:
    """Ray begins its task again; what the killed one left is swept away."""
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(scan(checkpoint), "mp-edge")
    reduce(checkpoint, plan, tmp_path / "here", crew=Crew((CPU,), 1))
    killed = tmp_path / "killed"

    @dataclass(frozen=True)
    class Killed(Reduction):
        """A reduction whose process is killed at its third matrix, once."""

        seen: list[str] = field(default_factory=list)

        def __call__(self, matrix: Matrix, W: torch.Tensor, device: Device) -> Visited:
            import os
            import signal

            self.seen.append(matrix.name)
            if len(self.seen) == 3 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super(type(self), self).__call__(matrix, W, device)

    source, touched, stated = prepare(checkpoint, plan, ON_RAY, "gram", False, None, None, None)
    cuts = Cuts(source, tuple(touched), Killed("gram", plan.reductions), stored)
    with writing(source, tmp_path / "ray", resume=False, force=False) as place:
        compute, elsewhere = makers_of(cuts, place, ON_RAY, lambda *_: None)
        write_checkpoint(source, place, touched, compute, describe_by(plan), stated, elsewhere=elsewhere)
    assert killed.exists() and snapshot(tmp_path / "here") == snapshot(tmp_path / "ray")
    assert not [path for path in (tmp_path / "ray").rglob(".*")]


def test_a_driver_that_is_killed(cluster: Any, pico: Path, tmp_path: Path) -> None:
    """As soon as its journal has a shard; the next one goes on."""
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(scan(checkpoint), "mp-edge")
    plan.save(tmp_path / "plan")
    reduce(checkpoint, plan, tmp_path / "here", crew=Crew((CPU,), 1))
    words = ["reduce", str(pico), str(tmp_path / "plan"), "-o", str(tmp_path / "ray"), "--engine", "ray"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    driver = subprocess.Popen([sys.executable, "-m", "laser", *words, "--device", "cpu"], env=environment)
    journal, until = tmp_path / "ray" / "laser" / "journal.jsonl", time.monotonic() + 120
    while driver.poll() is None and time.monotonic() < until:
        if journal.exists() and b'"shard"' in journal.read_bytes():
            break
        time.sleep(0.01)
    driver.kill()
    assert driver.wait(60) == -signal.SIGKILL
    reduce(checkpoint, plan, tmp_path / "ray", crew=ON_RAY, resume=True)
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "ray")


@pytest.mark.parametrize(
    ("tasks", "here", "lent"),
    [
        *((163, [8] * 8, 0.5), (40, [8] * 8, 0.5), (19, [8] * 8, 3), (2, [8, 8], 8), (1, [8] * 8, 8)),
        *((1, [8, 2, 0], 2), (0, [4], 4), (5, [1], 0.5), (1, [1], 0.5)),
    ],
)
def test_fewer_shards_than_gpus_share_them(tasks: int, here: list[int], lent: float) -> None:
    assert ray_engine.lent_to_a_task(tasks, here, 0.5) == lent
    assert ray_engine.lent_to_a_task(tasks, here, 1) == max(lent, 1)


def test_a_task_uses_all_the_cards_that_it_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1000))
    fifth = Device("cuda:5", torch.float64, False, "")
    (crew,) = ray_engine._on_node(lambda item, crew: crew, None, fifth, 0.5)
    assert isinstance(crew, Crew) and [(d.name, d.share) for d in crew.devices] == [("cuda", 500)]
    (crew,) = ray_engine._on_node(lambda item, crew: crew, None, fifth, 3)
    assert isinstance(crew, Crew)
    assert [device.name for device in crew.devices] == ["cuda:0", "cuda:1", "cuda:2"] and crew.workers is None
    (crew,) = ray_engine._on_node(lambda item, crew: crew, None, CPU, 3)
    assert crew == Crew((CPU,), 3)


def test_gpus_of_several_kinds_are_refused() -> None:
    def node(kind: str, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {"CPU": 1.0, "GPU": 1.0, f"accelerator_type:{kind}": 1.0}}

    ray_engine._require_one_kind(
        [node("H100"), node("H100"), node("A100", alive=False), {"Alive": True, "Resources": {}}]
    )
    with pytest.raises(
        UsageError, match=r"GPUs of several kinds \(A100, H100\), expected one, .*; try a cluster of one"
    ):
        ray_engine._require_one_kind([node("H100"), node("A100")])


def test_from_a_machine_outside_of_the_cluster(cluster: Any, pico: Path, tmp_path: Path, run: Any) -> None:
    """By Ray's client protocol, from a process of its own, as a laptop would.

    Skipped where Ray's own log says that Ray did not bring up what it starts for a client.
    """
    grpc = pytest.importorskip("grpc", reason="needs Ray's client: pip install 'ray[client]'")
    log = Path(cluster.head_node.get_logs_dir_path()) / "ray_client_server.err"
    with closing(grpc.insecure_channel(address := f"127.0.0.1:{CLIENT_PORT}")) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=120)
        except grpc.FutureTimeoutError:
            pytest.skip(f"Ray's client server does not listen after two minutes:\n{log.read_text()}")
    there, here = tmp_path / "there", tmp_path / "here"
    command = [sys.executable, "-m", "laser", "scan", str(pico), "-o", str(there), "--engine", f"ray://{address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    told = log.read_text()
    if done.returncode and any(failure in told for failure in ("startup failed", "Timeout waiting for channel")):
        pytest.skip(f"Ray did not start its server for a client: {done.stderr}\n{told}")
    assert done.returncode == 0, done.stderr
    assert run("scan", pico, "-o", here)[0] == 0 and there.read_bytes() == here.read_bytes()


ABORTED = (
    "Initialization failure from server:\nTraceback (most recent call last):\n  File\nRuntimeError: no server; see x\n"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConnectionError("no\nmore"), r"no Ray cluster answers at ray://x:1 \(no\); try `ray start --head` there"),
        (
            ConnectionAbortedError(ABORTED),
            r".* at ray://x:1 failed 2 times .* \(RuntimeError: no server; see x\); try .*",
        ),
        (ConnectionAbortedError(""), r".* at ray://x:1 failed 2 times to .* \(ConnectionError\); try again, .*"),
        (ValueError("no client\nx"), r"--engine ray://x:1: no client; try pip install 'laser-rmt\[ray\]'"),
        (
            RuntimeError("Version mismatch: a\n b"),
            "--engine ray://x:1: Version mismatch: a; try the cluster's versions.*",
        ),
    ],
)
def test_what_keeps_from_connecting_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UsageError) as told:
        ray_engine.connect("ray://x:1")
    assert re.fullmatch(line, str(told.value))


def test_a_server_that_ray_did_not_start_is_asked_for_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def init(address: str, **_: Any) -> None:
        asked.append(address)
        if len(asked) == 1:
            raise ConnectionAbortedError(ABORTED)

    monkeypatch.setattr(ray, "is_initialized", lambda: len(asked) == 2)
    monkeypatch.setattr(ray, "init", init)
    assert ray_engine.connect("ray://x:1") is ray and asked == ["ray://x:1"] * 2


def test_an_error_in_a_task_is_the_error_of_the_run(cluster: Any, pico: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)

    def fail(matrix: Matrix, W: torch.Tensor, device: Device) -> None:
        raise NumericalError(f"{matrix.name}: no")

    with pytest.raises(NumericalError, match=r"model\..*: no"):
        list(visit_all(checkpoint, list_matrices(checkpoint)[:3], fail, ON_RAY))


def test_a_device_that_the_cluster_lacks(cluster: Any, pico: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    crew = Crew((Device("cuda", torch.float64, False, ""),), engine="ray")
    with pytest.raises(UsageError, match="cluster has no GPU"):
        list(visit_all(checkpoint, list_matrices(checkpoint), lambda m, W, d: None, crew))


def test_the_device_is_chosen_where_the_gpus_are(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the driver, which has none: by a task to which Ray has lent one. This node's is a mere number."""

    def chosen(name: str, precision: str) -> Device:
        import os

        return Device(name, getattr(torch, precision), False, f"saw {os.environ['CUDA_VISIBLE_DEVICES']}")

    node = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20)
    try:
        with pytest.raises(UsageError, match=r"^device 'cuda' is not available: no CUDA device found by torch; try"):
            choose_crew("auto", engine="ray")
        # The card is a mere number: a task that asked torch for it would find none.
        monkeypatch.setattr(ray_engine, "choose_device", chosen)
        for device in ("auto", "cuda", "cuda:3,cuda:5"):
            crew = choose_crew(device, engine="ray", precision="float32")
            assert crew == Crew((Device("cuda", torch.float32, False, "saw 0"),), engine="ray")
    finally:
        cluster.remove_node(node)


def test_a_task_uses_the_one_card_that_it_sees(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1000))
    checkpoint, fifth = laser.open_checkpoint(pico), Device("cuda:5", torch.float64, False, "")
    group = list_matrices(checkpoint)[:1]
    done = ray_engine._task(checkpoint, lambda matrix, W, device: (device.name, device.share), group, fifth)
    assert done[0][1] == ("cuda", 500)


def test_apple_gpus_are_refused(pico: Path) -> None:
    crew, checkpoint = Crew((Device("mps", torch.float32, True, ""),), engine="ray"), laser.open_checkpoint(pico)
    with pytest.raises(UsageError, match="Ray lends no device 'mps', expected cuda or cpu; try --device cpu"):
        list(visit_all(checkpoint, list_matrices(checkpoint), lambda m, W, d: None, crew))
    with pytest.raises(UsageError, match="Ray lends no device 'mps'"):
        choose_crew("mps", engine="ray")


def test_small_matrices_share_a_task() -> None:
    def matrices(count: int, side: int) -> list[Matrix]:
        return [Matrix(f"{side}.{i}", "q", i, None, (side, side), "BF16", f"{side}.{i}") for i in range(count)]

    mixed = matrices(1, 4096) + matrices(100, 64)
    made = list(ray_engine.groups(mixed, "cpu"))
    assert [len(g) for g in made] == [1, 100]
    assert [m for g in made for m in g] == mixed
    assert [len(g) for g in ray_engine.groups(matrices(40, 4096), "cuda")] == [2] * 20


def test_a_node_killed_half_way(cluster: Any, one_by_one: None, pico: Path, tmp_path: Path) -> None:
    """Last, since it takes a node away. Every task leaves a line, so that work done twice is seen.

    The first tasks wait until both nodes have left one: one node could do all before the other is asked.
    """
    checkpoint, trace = laser.open_checkpoint(pico), tmp_path / "trace"
    matrices = [m for m in list_matrices(checkpoint) if laser.Selection().why_not(m) is None]
    trace.mkdir()

    def work(matrix: Matrix, W: torch.Tensor, device: Device) -> torch.Tensor:
        import uuid

        import ray

        node = ray.get_runtime_context().get_node_id()
        (trace / f"{node} {uuid.uuid4()}").write_text(matrix.name)
        until = time.monotonic() + 120
        while len({path.name.split()[0] for path in trace.iterdir()}) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.05)
        return W + 1

    second = next(node for node in cluster.worker_nodes)
    results = {}
    with closing(visit_all(checkpoint, matrices, work, ON_RAY)) as visits:
        for matrix, new, _ in visits:
            assert matrix.name not in results
            results[matrix.name] = new
            if len(results) == 8:
                cluster.remove_node(second, allow_graceful=False)
    assert all(torch.equal(results[m.name], checkpoint.read(m.tensor) + 1) for m in matrices)
    lines = list(trace.iterdir())
    assert len({path.name.split()[0] for path in lines}) == 2  # both nodes took part
    begun = Counter(path.read_text() for path in lines)
    assert begun.total() - len(matrices) <= ray_engine.IN_FLIGHT * 2  # no more than what was in flight on both nodes
