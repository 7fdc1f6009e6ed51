"""The spine on a pico Mixtral: scan, plan, reduce, verify, their records, and being killed."""

import json
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import snapshot, tensors_in
from safetensors.torch import save_file

import laser
from laser.checkpoint.reader import INDEX
from laser.checkpoint.writer import JOURNAL
from laser.engine.crew import Crew
from laser.errors import RecordError, UsageError
from laser.flow import run_flow
from laser.outcome import Outcome
from laser.pipeline import reduce, scan, scan_into
from laser.plan import Plan, empty_plan, make_plan
from laser.reasons import Kind, Why
from laser.selection import Selection, parse_layers
from laser.spectra import Spectra
from laser.spectral.devices import choose_device
from laser.spectral.rules import RULES, apply_rule
from laser.verification import verify

CPU = choose_device("cpu")
CREW = Crew((CPU,))


def test_scan_measures_what_numpy_measures(pico: Path) -> None:
    spectra = scan(laser.open_checkpoint(pico))
    tensors = tensors_in(pico)
    assert len(spectra.values) == 3 * (4 + 12)  # attention and experts; not router, embedding, head, norms
    for name, s in spectra.values.items():
        wanted = np.linalg.svd(tensors[name].double().numpy(), compute_uv=False)
        assert s == pytest.approx(wanted, abs=1e-7 * wanted[0])
    assert spectra.values.keys() | spectra.skipped.keys() == tensors.keys()
    assert spectra.skipped["model.layers.0.block_sparse_moe.gate.weight"] == Why(
        Kind.PROTECTED, "role router is kept unless asked for"
    )


def test_spectra_and_plan_survive_saving(pico: Path, tmp_path: Path) -> None:
    spectra = scan(laser.open_checkpoint(pico), Selection(layers=(1,), roles=("w1", "q")))
    spectra.save(tmp_path / "spectra.safetensors")
    loaded = Spectra.load(tmp_path / "spectra.safetensors")
    assert (loaded.source, loaded.matrices, loaded.skipped) == (spectra.source, spectra.matrices, spectra.skipped)
    assert all(np.array_equal(loaded.values[k], spectra.values[k]) for k in spectra.values)
    plan = make_plan(loaded, "mp-edge", Selection(layers=(1,)))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").to_json() == plan.to_json()


SLOWER = {"bema": pytest.mark.slow}  # its law is made anew for every shape


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule.sample or name, marks=SLOWER.get(name, ()))
        for name, rule in RULES.items()
        if not (rule.needs_null or rule.needs_sigma)
    ],
)
def test_every_rule_end_to_end_against_numpy(pico: Path, tmp_path: Path, rule: str) -> None:
    """Ranks equal those from numpy's SVD; touched tensors equal numpy's truncation; the rest is bit-identical."""
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(
        scan(checkpoint, Selection((1,), ("q", "w1", "w2"))), rule
    )  # the others are draws of the same kind
    outcome = reduce(checkpoint, plan, tmp_path / "out")
    before, after = tensors_in(pico), tensors_in(tmp_path / "out")
    assert outcome.matrices
    for name, W in before.items():
        if name not in outcome.matrices:
            assert torch.equal(after[name], W)
            continue
        U, s, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
        rank = apply_rule(rule, s, (W.shape[0], W.shape[1])).rank
        assert outcome.matrices[name]["rank"] == rank
        truth = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        ulp = torch.finfo(W.dtype).eps * np.abs(truth)
        assert (np.abs(after[name].double().numpy() - truth) <= ulp + 1e-5 * np.abs(truth).max()).all()
    found = verify(checkpoint, tmp_path / "out")
    assert found.problems == ()
    assert (found.touched, found.untouched) == (len(outcome.matrices), len(before) - len(outcome.matrices))


@pytest.mark.parametrize("shards", [1, 3])
def test_the_empty_plan_is_the_identity(make_pico: Callable[..., Path], tmp_path: Path, shards: int) -> None:
    source = make_pico(shards=shards)
    checkpoint = laser.open_checkpoint(source)
    reduce(checkpoint, empty_plan(scan(checkpoint)), tmp_path / "out")
    before, after = snapshot(source), snapshot(tmp_path / "out")
    assert after.keys() - before.keys() == {"laser.json"} and before.keys() - after.keys() == {"README.md"}
    assert all(after[name] == before[name] for name in after if name != "laser.json")


@pytest.mark.slow
def test_reference_method_gives_the_same(pico: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    plans = {m: make_plan(scan(checkpoint, method=m), "mp-edge") for m in ("gram", "svd")}
    assert [x.rank for x in plans["gram"].lines] == [x.rank for x in plans["svd"].lines]
    for method, plan in plans.items():
        reduce(checkpoint, plan, tmp_path / method, method=method)
    gram, svd = tensors_in(tmp_path / "gram"), tensors_in(tmp_path / "svd")
    assert all(torch.allclose(gram[n].float(), svd[n].float(), rtol=2**-7, atol=1e-6) for n in gram)


def test_lowest_snr_takes_the_lowest(pico: Path) -> None:
    spectra = scan(laser.open_checkpoint(pico))
    everything = make_plan(spectra, "laser-rmt").reductions
    chosen = make_plan(spectra, "laser-rmt", lowest_snr=5).reductions
    ranked = sorted(everything.values(), key=lambda line: line.snr or 0)
    assert {line.name for line in ranked[:5]} == chosen.keys()


def test_plan_has_a_line_for_every_tensor_with_a_reason(pico: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(scan(checkpoint, Selection(roles=("w2",))), "mp-edge")
    assert [line.name for line in plan.lines] == list(checkpoint.tensors)
    assert all(line.why.text for line in plan.lines)


def test_protected_roles_are_reduced_when_asked_for(pico: Path) -> None:
    spectra = scan(laser.open_checkpoint(pico), Selection(roles=("router", "head")))
    with pytest.raises(UsageError, match="no selected matrix was scanned"):
        make_plan(spectra, "rank:1")  # scanned, but the plan's own selection does not name them
    assert len(make_plan(spectra, "rank:1", Selection(roles=("router", "head"))).reductions) == 4


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_skipped_by_name(make_pico: Callable[..., Path], tmp_path: Path, bad: float) -> None:
    from conftest import mixtral_tensors

    tensors = mixtral_tensors()
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][3, 4] = bad
    checkpoint = laser.open_checkpoint(make_pico(tensors=tensors))
    plan = make_plan(scan(checkpoint), "mp-edge")
    line = next(x for x in plan.lines if x.name == name)
    assert line.action == "skip" and line.why.text == "skipped: not finite (1 NaN or Inf of 512)"
    reduce(checkpoint, plan, tmp_path / "out")
    assert verify(checkpoint, tmp_path / "out").problems == ()


def test_a_plan_made_by_hand_for_a_matrix_with_nan_fails_with_its_name(
    make_pico: Callable[..., Path], tmp_path: Path
) -> None:
    from conftest import mixtral_tensors

    tensors = mixtral_tensors()
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][0, 0] = float("nan")
    checkpoint = laser.open_checkpoint(make_pico(tensors=tensors))
    plan = make_plan(scan(checkpoint), "mp-edge")
    lines = tuple(replace(x, action="reduce", rank=1, full_rank=16) if x.name == name else x for x in plan.lines)
    with pytest.raises(laser.NumericalError, match=f"{name}: .*NaN or Inf"):
        reduce(checkpoint, replace(plan, lines=lines), tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()


def test_eight_bit_floats_are_skipped_with_advice(make_pico: Callable[..., Path]) -> None:
    from conftest import mixtral_tensors

    tensors = mixtral_tensors()
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    spectra = scan(laser.open_checkpoint(make_pico(tensors=tensors)))
    assert "no scales" in spectra.skipped[name].text and spectra.skipped[name].kind is Kind.FAILED


def test_plan_of_another_checkpoint_is_refused(pico: Path, make_pico: Callable[..., Path], tmp_path: Path) -> None:
    other = laser.open_checkpoint(make_pico("other", rope_theta=5.0))
    plan = make_plan(scan(laser.open_checkpoint(pico)), "mp-edge")
    with pytest.raises(RecordError, match=r"plan was made from pico .* found other .* make the plan again"):
        reduce(other, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "selection, message",
    [
        (Selection(roles=("w9",)), "no matrix has role 'w9'; try --roles .*w1"),
        (Selection(layers=(7,)), "the model has no layer 7; try --layers 0-2"),
        (Selection(include="nothing"), "matches no matrix"),
    ],
)
def test_selections_that_match_nothing(pico: Path, selection: Selection, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        scan(laser.open_checkpoint(pico), selection)


def test_layers_are_numbers_and_not_substrings() -> None:
    assert parse_layers("0,4,20-22") == (0, 4, 20, 21, 22)
    for bad in ("x", "3-1", "1-", "-1", "1,,2"):
        with pytest.raises(UsageError):
            parse_layers(bad)


def test_aliases_select_experts_and_dense_alike(pico: Path) -> None:
    down = scan(laser.open_checkpoint(pico), Selection(roles=("down",)))
    assert {m.role for m in down.matrices if m.name in down.values} == {"w2"}


# --- records that were damaged ----------------------------------------------------------------------------------------


def test_damaged_records_are_refused(pico: Path, tmp_path: Path) -> None:
    plan = make_plan(scan(laser.open_checkpoint(pico)), "mp-edge")
    path = tmp_path / "plan.json"
    document = json.loads(plan.to_json())
    reduced = next(i for i, line in enumerate(document["lines"]) if line["action"] == "reduce")
    for change, message in [
        (lambda d: d.update(version=99), "version 99, expected 'plan' version 3"),
        (lambda d: d.pop("lines"), "not a whole plan"),
        (lambda d: d["lines"][reduced].update(rank=10**6), "rank 1000000 of"),
        (lambda d: d["lines"][reduced].update(rank=-1), "rank -1 of"),
        (lambda d: d["lines"][reduced].update(action="melt"), "action 'melt'"),
        (lambda d: d["lines"][0].update(nonsense=1), "not a whole plan"),
    ]:
        broken = json.loads(json.dumps(document))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(RecordError, match=message):
            Plan.load(path)
    path.write_text('{"kind": "plan"')
    with pytest.raises(RecordError, match="not a readable plan file"):
        Plan.load(path)
    with pytest.raises(RecordError, match="no such file"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "spectra").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    with pytest.raises(RecordError, match="not a readable spectra file"):
        Spectra.load(tmp_path / "spectra")
    with pytest.raises(RecordError, match="found kind None"):
        save_file({"a": torch.ones(1)}, tmp_path / "foreign")
        Spectra.load(tmp_path / "foreign")


@pytest.mark.slow
def test_verify_notices_every_kind_of_damage(pico: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(scan(checkpoint), "mp-edge", lowest_snr=3)
    name = next(iter(plan.reductions))
    kept = "model.layers.0.self_attn.o_proj.weight"
    assert kept not in plan.reductions

    def damaged(label: str, tensor: str, value: float) -> tuple[str, ...]:
        out = tmp_path / label
        reduce(checkpoint, plan, out)
        info = checkpoint.tensors[tensor]
        with (out / info.shard).open("r+b") as file:
            file.seek(info.start)
            file.write(torch.full((8,), value, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        first = verify(checkpoint, out).problems
        assert len(first) == 1 and "found sha256" in first[0]
        # A forger would mend the hash as well: then the weights themselves must give it away.
        outcome = json.loads((out / "laser.json").read_text())
        import hashlib

        outcome["shards"][info.shard] = hashlib.sha256((out / info.shard).read_bytes()).hexdigest()
        (out / "laser.json").write_text(json.dumps(outcome))
        return verify(checkpoint, out).problems

    assert any(kept in p and "its bytes differ" in p for p in damaged("kept", kept, 0.5))
    assert any(name in p and "beyond rank" in p for p in damaged("touched", name, 0.5))


def test_verify_notices_an_output_that_was_not_reduced(pico: Path, tmp_path: Path) -> None:
    """The source's own bytes under a plan that says "reduce": the norm beyond the rank gives it away."""
    checkpoint, out = laser.open_checkpoint(pico), tmp_path / "out"
    spectra = scan(checkpoint)
    reduce(checkpoint, empty_plan(spectra), out)
    plan = make_plan(spectra, "mp-edge", lowest_snr=2)
    document = json.loads((out / "laser.json").read_text())
    (out / "laser.json").write_text(json.dumps(document | {"plan": json.loads(plan.to_json())}))
    assert len(verify(checkpoint, out).problems) >= 2


# --- being killed -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_is_byte_identical_and_computes_nothing_twice(
    pico: Path, tmp_path: Path, one_thread: None
) -> None:
    checkpoint = laser.open_checkpoint(pico)
    plan = make_plan(scan(checkpoint), "mp-edge")
    plan.save(tmp_path / "plan.json")
    reduce(checkpoint, plan, tmp_path / "undisturbed")
    out, computed, promised = tmp_path / "out", [], set()
    rng = random.Random(5)
    for attempt in range(6):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which are asleep
            child = os.fork()
        if child == 0:

            def tick(matrix: laser.Matrix, *_: object, writer: int = writer) -> None:
                os.write(writer, f"{matrix.name}\n".encode())
                time.sleep(0.02)  # so that the parent can choose its moment

            with suppress(BaseException):
                reduce(checkpoint, plan, out, crew=laser.choose_crew("cpu", workers=2), resume=True, tick=tick)
                os._exit(0)
            os._exit(1)
        os.close(writer)
        stop_after = rng.randint(1, 9) if attempt < 5 else 10**6
        with os.fdopen(reader) as lines:
            for count, line in enumerate(lines, 1):
                assert line.strip() not in promised, "a matrix that the journal holds was computed again"
                computed.append(line.strip())
                if count >= stop_after:
                    os.kill(child, signal.SIGKILL)
                    break
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if attempt == 5:
            assert code == 0
        else:
            assert code == -signal.SIGKILL
            assert not (out / INDEX).exists()
            kept = (out / JOURNAL).read_text().splitlines(keepends=True)
            promised = {json.loads(x).get("matrix") for x in kept if x.endswith("\n")} - {None}
    assert snapshot(out) == snapshot(tmp_path / "undisturbed")
    assert set(computed) == plan.reductions.keys()
    assert len(computed) <= len(plan.reductions) + 5  # at most the one in flight at each kill


def test_interrupted_scan_goes_on_where_it_was(pico: Path, tmp_path: Path, reads: list[str]) -> None:
    checkpoint, seen = laser.open_checkpoint(pico), []

    def interrupt(matrix: laser.Matrix) -> None:
        seen.append(matrix.name)
        if len(seen) == 7:
            raise KeyboardInterrupt

    path = tmp_path / "spectra.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scan_into(path, checkpoint, Selection(), CREW, "gram", interrupt)
    assert not path.exists()
    reads.clear()
    scan_into(path, checkpoint, Selection(), CREW, "gram")
    assert not set(reads) & set(seen) and len(reads) == 48 - 7
    scan(checkpoint).save(tmp_path / "undisturbed")
    assert path.read_bytes() == (tmp_path / "undisturbed").read_bytes()
    assert not path.with_name(path.name + ".partial").exists()


@pytest.mark.slow
def test_run_twice_is_the_same_bytes(pico: Path, tmp_path: Path) -> None:

    checkpoint = laser.open_checkpoint(pico)

    def choose(spectra: Spectra) -> Plan:
        return make_plan(spectra, "mp-edge", lowest_snr=4)

    for out in ("a", "b"):
        run_flow(checkpoint, tmp_path / out / "reduced", Selection(), choose, crew=CREW)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    out = tmp_path / "a" / "reduced"
    assert {p.name for p in (out / "laser").iterdir()} == {
        "spectra.safetensors",
        "plan.json",
        "source.json",
        "spectrum.svg",
    }
    assert "base_model" not in (out / "README.md").read_text()  # a local directory has no id to name
    again = run_flow(checkpoint, out, Selection(), choose, crew=CREW, resume=True)
    assert again.outcome == Outcome.load(tmp_path / "b" / "reduced")
