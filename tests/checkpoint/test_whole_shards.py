"""Shards that other processes make from beginning to end, while this one keeps the journal."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mixtral_config, mixtral_tensors, write_checkpoint_directory
from helpers import snapshot

import laser
from laser import pipeline
from laser.checkpoint.quantised import quantise
from laser.checkpoint.shards import Job, Made, New, make_shard, partial_of
from laser.checkpoint.swap import writing
from laser.checkpoint.writer import write_checkpoint
from laser.engine.crew import Crew
from laser.errors import NumericalError, OutputError
from laser.outcome import describe_by
from laser.pipeline import weights_and_scales
from laser.spectral.devices import choose_device

CREW = Crew((choose_device("cpu"),), 1)


class Work:
    """A reduction of pico, its parts at hand."""

    def __init__(self, path: Path, rule: str = "mp-edge") -> None:
        self.checkpoint = laser.open_checkpoint(path)
        self.plan = laser.make_plan(laser.scan(self.checkpoint), rule)
        prepared = pipeline.prepare(self.checkpoint, self.plan, CREW, "gram", False, None, None, None)
        self.source, self.touched, self.run = prepared
        weights = tuple(m for m in self.touched if m.name in self.plan.reductions)
        self.cuts = pipeline.Cuts(
            self.source, weights, pipeline.Reduction("gram", self.plan.reductions), pipeline.stored
        )

    def whole(self, out: Path) -> pipeline.WholeShards:
        return pipeline.WholeShards(self.cuts, out)

    def write(self, out: Path, elsewhere: Any) -> None:
        def compute(names: list[str]) -> Generator[New, None, None]:
            raise AssertionError("this process makes no matrix")
            yield

        with writing(self.source, out, resume=True, force=False) as place:
            describe = describe_by(self.plan)
            write_checkpoint(self.source, place, self.touched, compute, describe, self.run, elsewhere=elsewhere)


@pytest.fixture
def work(pico: Path) -> Work:
    return Work(pico)


def test_the_bytes_are_those_of_one_process(work: Work, tmp_path: Path) -> None:
    seen: list[str] = []

    def elsewhere(jobs: list[Job]) -> Iterator[Made]:
        for job in reversed(jobs):
            made, seconds = work.whole(tmp_path / "a")((job.shard.name, job.touched), CREW)
            assert [matrix.name for matrix, _ in seconds] != [] and partial_of(tmp_path / "a", made.shard).exists()
            seen.append(made.shard)
            yield made

    work.write(tmp_path / "a", elsewhere)
    laser.reduce(work.checkpoint, work.plan, tmp_path / "b", crew=CREW)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") and len(seen) == 3
    assert [p for p in (tmp_path / "a").rglob("*") if p.suffix in (".partial", ".tmp", ".lock", ".jsonl")] == []


@pytest.mark.slow
def test_scales_in_another_shard_than_their_weights(tmp_path: Path) -> None:
    """FP8: whoever writes a shard makes the scales in it, also of a matrix that another writes."""
    tensors, scales = mixtral_tensors(), dict[str, torch.Tensor]()
    for name in [name for name in tensors if "self_attn" in name]:
        tensors[name], scales[f"{name}_scale_inv"] = quantise(tensors[name], torch.float32, (16, 16))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}}
    work = Work(write_checkpoint_directory(tmp_path / "fp8", tensors | scales, mixtral_config() | config), "rank:4")
    apart = [
        m
        for m in work.cuts.weights
        if len({work.source.tensors[n].shard for n in weights_and_scales(work.source, m)}) > 1
    ]
    work.write(
        tmp_path / "a", lambda jobs: (work.whole(tmp_path / "a")((j.shard.name, j.touched), CREW)[0] for j in jobs)
    )
    laser.reduce(work.checkpoint, work.plan, tmp_path / "b", crew=CREW)
    assert apart and snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_a_run_that_was_killed_goes_on_with_the_shards_that_were_left(work: Work, tmp_path: Path) -> None:
    """Also by the other way of writing: a journal does not say who made what."""

    def one_then_none(jobs: list[Job]) -> Iterator[Made]:
        yield work.whole(tmp_path / "a")((jobs[0].shard.name, jobs[0].touched), CREW)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.write(tmp_path / "a", one_then_none)
    (first,) = (tmp_path / "a").glob("*.safetensors")
    was = first.stat()
    laser.reduce(work.checkpoint, work.plan, tmp_path / "a", crew=CREW, resume=True)
    laser.reduce(work.checkpoint, work.plan, tmp_path / "b", crew=CREW)
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.slow
def test_half_a_shard_of_one_process_is_made_anew(work: Work, tmp_path: Path) -> None:
    ticks: list[Any] = []

    def stop(*found: Any) -> None:
        ticks.append(found)
        if len(ticks) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        laser.reduce(work.checkpoint, work.plan, tmp_path / "a", crew=CREW, tick=stop)
    assert list((tmp_path / "a").glob("*.partial"))
    work.write(
        tmp_path / "a", lambda jobs: (work.whole(tmp_path / "a")((j.shard.name, j.touched), CREW)[0] for j in jobs)
    )
    laser.reduce(work.checkpoint, work.plan, tmp_path / "b", crew=CREW)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.slow
def test_two_that_make_the_same_shard_do_not_see_each_other(work: Work, tmp_path: Path) -> None:
    """As a node that was given up and its successor. The first ends last, after the shard has its name."""
    out, shard = tmp_path / "a", work.source.shards[0]
    touched = [m for m in work.touched if work.source.tensors[m.tensor].shard == shard.name]
    begun, go_on = threading.Event(), threading.Event()

    def results(wait: bool) -> Iterator[New]:
        for number, each in enumerate(work.cuts.make([m.name for m in touched], CREW, lambda *_: None)):
            if wait and number == 1:
                begun.set()
                go_on.wait(60)
            yield each

    made: list[Made] = []
    late = threading.Thread(target=lambda: made.append(make_shard(shard, touched, out, results(True))))

    def elsewhere(jobs: list[Job]) -> Iterator[Made]:
        late.start()
        begun.wait(60)
        for job in jobs:
            yield make_shard(job.shard, job.touched, out, work.cuts.make([m.name for m in job.touched], CREW, nothing))
            if job.shard.name == shard.name:
                go_on.set()
                late.join()
                assert partial_of(out, shard.name).exists()

    work.write(out, elsewhere)
    laser.reduce(work.checkpoint, work.plan, tmp_path / "b", crew=CREW)
    assert made[0].sha256 is not None and snapshot(out) == snapshot(tmp_path / "b")


def test_what_a_lost_node_left_is_swept_away(work: Work, tmp_path: Path) -> None:
    out, shard = tmp_path / "a", work.source.shards[0]

    def elsewhere(jobs: list[Job]) -> Iterator[Made]:
        for job in jobs:
            yield work.whole(out)((job.shard.name, job.touched), CREW)[0]
        (out / f".{shard.name}.partial.0123abcd.tmp").write_bytes(b"half of it")

    work.write(out, elsewhere)
    laser.reduce(work.checkpoint, work.plan, tmp_path / "b", crew=CREW)
    assert snapshot(out) == snapshot(tmp_path / "b") and not list(out.glob(".*"))


def nothing(*_: Any) -> None: ...


def test_an_error_leaves_no_file_and_is_the_error(work: Work, tmp_path: Path) -> None:
    def results() -> Iterator[New]:
        raise NumericalError("x: no")
        yield

    (tmp_path / "a").mkdir()
    with pytest.raises(NumericalError, match="x: no"):
        make_shard(work.source.shards[0], work.touched[:1], tmp_path / "a", results())
    assert list((tmp_path / "a").iterdir()) == []


def test_an_output_that_is_another_directory_there_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is not the same directory on every node.*try -o on a disk that they share"):
        work.whole(tmp_path / "nowhere")((work.source.shards[0].name, ()), CREW)
    with pytest.raises(OutputError, match="is not the same directory on every node"):
        work.write(tmp_path / "a", lambda jobs: (Made(job.shard.name, None, []) for job in jobs))
    assert not list((tmp_path / "a").glob("*.safetensors"))
