"""State that is damaged while nobody works on it: each fault is repaired, or named; none passes in silence."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import windows_of
from conftest import mixtral_tensors
from helpers import snapshot
from mistral_release import write_release
from safetensors.torch import save_file

import laser
from laser import calibration
from laser.calibration import calibrate
from laser.checkpoint import fingerprint
from laser.checkpoint.convert import write_directory
from laser.checkpoint.fingerprint import places_of, samples_of
from laser.checkpoint.matrices import list_matrices
from laser.checkpoint.mistral import as_hub
from laser.checkpoint.safetensors import TensorInfo, read_header
from laser.checkpoint.source import require_unchanged
from laser.engine.crew import Crew
from laser.errors import CheckpointError, LaserError, OutputError, RecordError
from laser.flow import run_flow
from laser.moments import Moments
from laser.outcome import Outcome
from laser.pipeline import scan_into
from laser.plan import Plan, make_plan
from laser.records import Fingerprint, agree
from laser.selection import Selection
from laser.spectra import Spectra

CREW = Crew((laser.choose_device("cpu"),), workers=1)


class Killed(BaseException):
    pass


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)


def zeroed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = len(data) // 3
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    path.write_bytes(data)


FAULTS = (nothing, halved, flipped, last_bit, zeroed, Path.unlink)


def faults(folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every file of a folder with every fault."""
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files
    for file in files:
        for fault in FAULTS:
            yield file, fault


@pytest.fixture
def small(make_pico: Callable[..., Path]) -> Path:
    """One layer, two experts, two shards."""
    names = {n: t for n, t in mixtral_tensors().items() if "layers." not in n or "layers.0." in n}
    names = {n: t for n, t in names.items() if "experts.2" not in n and "experts.3" not in n}
    names["model.layers.0.block_sparse_moe.gate.weight"] = names["model.layers.0.block_sparse_moe.gate.weight"][
        :2
    ].clone()
    return make_pico("small", shards=2, tensors=names, num_hidden_layers=1, num_local_experts=2)


def other_weights(model: Path) -> None:
    """The headers stay, every byte behind them changes."""
    for file in model.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(b ^ 1 for b in data[start:])
        file.write_bytes(data)


# --- whose weights ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_records_of_a_fine_tune_are_refused_with_both_names(small: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(small, tuned)
    other_weights(tuned)
    a, b = laser.open_checkpoint(small), laser.open_checkpoint(tuned)
    assert a.identity == b.identity and agree(a.fingerprint, b.fingerprint) is False
    spectra = laser.scan(a)
    plan = make_plan(spectra, "rank:4")
    told = r"made from other weights of small: found tuned \(\w{12}\), expected small \(\w{12}\)"
    with pytest.raises(RecordError, match=f"the plan was {told}"):
        laser.reduce(b, plan, tmp_path / "out")
    laser.reduce(a, plan, tmp_path / "out")
    with pytest.raises(RecordError, match=f"the output was {told}"):
        laser.verify(b, tmp_path / "out")

    def stop(*_: object) -> None:
        raise Killed

    for verb in (
        lambda model, tick: scan_into(tmp_path / "s", model, Selection(), CREW, "gram", tick),
        lambda model, tick: run_flow(model, tmp_path / "r", Selection(), chosen, crew=CREW, on_scan=tick, resume=True),
    ):
        with pytest.raises(Killed):
            verb(a, stop)
        with pytest.raises(RecordError, match=r"weights differ; it was begun with small \(\w+\), found tuned \(\w+\)"):
            verb(b, lambda *_: None)
        verb(laser.open_checkpoint(shutil.copytree(small, tmp_path / "copy", dirs_exist_ok=True)), lambda *_: None)


def chosen(spectra: Spectra) -> Plan:
    return make_plan(spectra, "rank:4", lowest_snr=3)


def test_the_same_weights_are_the_same_wherever_they_lie(small: Path, make_pico: Callable[..., Path]) -> None:
    one, three = (laser.open_checkpoint(make_pico(f"in{n}", shards=n)) for n in (1, 3))
    assert one.fingerprint == three.fingerprint and one.fingerprint.content is None
    assert one.fingerprint != laser.open_checkpoint(small).fingerprint


def test_of_a_large_model_every_tensor_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit: a model of which samples are taken is one of gigabytes.
    monkeypatch.setattr(fingerprint, "READ_WHOLE", 0)
    tensors = {name: torch.zeros(64, 4096) for name in "abc"} | {"norm": torch.zeros(64)}
    file, shard = tmp_path / "x.safetensors", None
    seen = set()
    for change in (None, ("a", 0, 0), ("b", 63, 4095), ("c", 0, 1023), ("norm", 33, None)):
        changed = {name: t.clone() for name, t in tensors.items()}
        if change:
            name, row, column = change
            changed[name][(row, column) if column is not None else row] = 1.0
        save_file(changed, file)
        shard = read_header(file)
        seen.add(samples_of([shard]))
    assert len(seen) == 5 and shard is not None
    info = next(t for t in shard.tensors if t.name == "a")
    assert len(places_of(info, False)) == 6 and sum(e - s for s, e in places_of(info, False)) == 6 * 4096
    assert places_of(info, False) == places_of(info, False)
    moved = TensorInfo("z", info.dtype, info.shape, info.shard, info.start, info.end)
    assert places_of(info, False)[1:-1] != places_of(moved, False)[1:-1]  # the places depend on the name


def test_what_two_records_know_of_weights() -> None:
    hub, local, both = Fingerprint(None, "h"), Fingerprint("s"), Fingerprint("s", "h")
    assert agree(hub, both) and agree(local, both) and agree(hub, local) is None
    assert agree(both, Fingerprint("t", "h")) is False and agree(Fingerprint(), Fingerprint()) is None


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["scan", "reduce", "run", "verify", "null", "calibrate", "eval", "search", "convert"])
def test_a_source_that_changes_while_it_is_read_is_an_error(verb: str, speaker: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(speaker)
    q = Selection(roles=("q",))
    plan = make_plan(laser.scan(checkpoint, q), "rank:4")
    laser.reduce(checkpoint, plan, tmp_path / "done")

    def touch(*_: object) -> None:
        os.utime(speaker / "model.safetensors", ns=(1, 1))

    from laser.evaluation.evaluate import evaluate
    from laser.evaluation.objective import Loss
    from laser.evaluation.streaming import LayeredModel
    from laser.null import null_test
    from laser.searching.search import search_plan

    def converted(tick: Callable[..., None]) -> None:
        release = laser.open_checkpoint(write_release(speaker, tmp_path / "release"))

        def touch_that(*_: object) -> None:
            for path in (tmp_path / "release").glob("*.safetensors"):
                os.utime(path, ns=(1, 1))

        write_directory(as_hub(release), tmp_path / "c", tick=touch_that, check=lambda: require_unchanged(release))

    verbs: dict[str, Callable[[], Any]] = {
        "scan": lambda: scan_into(tmp_path / "s", checkpoint, q, CREW, "gram", touch),
        "reduce": lambda: laser.reduce(checkpoint, plan, tmp_path / "out", tick=touch, resume=True),
        "run": lambda: run_flow(checkpoint, tmp_path / "r", q, chosen, crew=CREW, on_reduce=touch, resume=True),
        "verify": lambda: laser.verify(checkpoint, tmp_path / "done", tick=touch),
        "null": lambda: null_test(checkpoint, q, rules=["mp-edge"], tick=touch),
        "calibrate": lambda: calibrate(checkpoint, windows_of(speaker, 2), tmp_path / "m", q, shrink=True, tick=touch),
        "eval": lambda: evaluate(checkpoint, windows_of(speaker, 2), stream=True, tick=touch),
        "search": lambda: search_plan(
            LayeredModel(checkpoint),
            laser.scan(checkpoint, q),
            ["rank:4"],
            Loss(windows_of(speaker, 3)),
            [],
            selection=q,
            lowest_snr=1,
            tick=touch,
        ),
        "convert": lambda: converted(touch),
    }
    with pytest.raises(CheckpointError, match=r"(model|consolidated)\S*.safetensors changed while it was read"):
        verbs[verb]()
    assert not any((tmp_path / name).exists() for name in ("s", "out/laser.json", "r/laser.json", "m", "c"))
    if verb in ("scan", "reduce"):  # what was made of it is not gone on with
        checkpoint = laser.open_checkpoint(speaker)
        with pytest.raises(RecordError, match=r"holds work on a model that changed meanwhile.*--force"):
            verbs[verb]()


# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_fault_in_an_unfinished_output_is_repaired_or_named(small: Path, tmp_path: Path) -> None:
    checkpoint = laser.open_checkpoint(small)
    plan = make_plan(laser.scan(checkpoint), "fraction:0.5", Selection(roles=("q", "w2", "k")))
    laser.reduce(checkpoint, plan, tmp_path / "undisturbed", crew=CREW)
    wanted = snapshot(tmp_path / "undisturbed")

    def stop(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Killed

    cases = repaired = 0
    for count in (1, 4):
        left, template = count, tmp_path / f"killed{count}"
        with pytest.raises(Killed):
            laser.reduce(checkpoint, plan, template, crew=CREW, tick=stop)
        for file, fault in faults(template):
            out = tmp_path / "out"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(template, out)
            fault(out / file)
            cases += 1
            try:
                laser.reduce(checkpoint, plan, out, crew=CREW, resume=True)
            except LaserError as error:
                unknown = fault is Path.unlink and "not made by laser" in str(error)  # the journal is what tells
                assert unknown or file in str(error), (file, fault, error)
                continue
            assert snapshot(out) == wanted, (file, fault)
            repaired += 1
    assert cases >= 72 and repaired > 0.8 * cases


@pytest.mark.slow
def test_every_fault_in_a_finished_output_is_named(small: Path, tmp_path: Path) -> None:
    checkpoint, template, out = laser.open_checkpoint(small), tmp_path / "run", tmp_path / "out"
    run_flow(checkpoint, template, Selection(roles=("q", "w2")), chosen, crew=CREW)
    assert laser.verify(checkpoint, template).problems == ()
    plan = Outcome.load(template).plan
    cases = 0
    for file, fault in faults(template):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(template, out)
        fault(out / file)
        if fault is zeroed and (out / file).read_bytes() == (template / file).read_bytes():
            continue
        cases += 1
        try:
            problems = laser.verify(checkpoint, out).problems
        except LaserError as error:
            problems = (str(error),)
        if file == "README.md":  # people's to edit
            assert problems == ()
            continue
        assert any(Path(file).name in p for p in problems) or file.endswith(".safetensors"), (file, fault, problems)
        assert problems, (file, fault)
        if not file.startswith("laser/"):  # nor is it called finished
            try:
                laser.reduce(checkpoint, plan, out, resume=True)
            except LaserError:
                continue
            assert laser.verify(checkpoint, out).problems == (), (file, fault)
    assert cases > 60


def test_every_flipped_bit_of_spectra_is_an_error(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "spectra.safetensors"
    laser.scan(laser.open_checkpoint(small)).save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 997):
        data = bytearray(whole)
        data[at] ^= 1 << at % 7
        path.write_bytes(data)
        with pytest.raises(RecordError):
            Spectra.load(path)


def test_a_plan_that_does_not_know_its_weights_is_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made = make_plan(laser.scan(laser.open_checkpoint(small)), "rank:4")
    made.save(path)
    document = json.loads(path.read_bytes())
    bare = {key: value for key, value in document["source"].items() if key not in ("samples", "content")}
    for line in document["lines"]:
        del line["unseen"]
        line["reason"] = line.pop("why")["text"]
    del document["digest"]
    for version in (1, 2):
        path.write_text(json.dumps(document | {"version": version, "source": bare}))
        with pytest.raises(RecordError, match=r"which weights.*`laser plan SPECTRA -o FILE --rule RULE`"):
            Plan.load(path)
        path.write_text(json.dumps(document | {"version": version}))  # as one of a model on the Hub always did
        assert Plan.load(path) == made
    path.write_text(json.dumps(document | {"version": 4}))
    with pytest.raises(RecordError, match=r"version 4, expected 'plan' version 3.*`laser plan SPECTRA"):
        Plan.load(path)


@pytest.mark.slow
def test_a_scan_goes_on_from_a_damaged_journal(small: Path, tmp_path: Path) -> None:
    checkpoint, path, partial = laser.open_checkpoint(small), tmp_path / "s", tmp_path / "s.partial"
    wanted = scan_into(tmp_path / "whole", checkpoint, Selection(), CREW, "gram")
    seen: list[str] = []

    def stop(matrix: laser.Matrix) -> None:
        seen.append(matrix.name)
        if len(seen) == 6:
            raise Killed

    with pytest.raises(Killed):
        scan_into(path, checkpoint, Selection(), CREW, "gram", stop)
    begun = partial.read_bytes()
    for fault in FAULTS:
        partial.write_bytes(begun)
        fault(partial)
        scan_into(path, checkpoint, Selection(), CREW, "gram")
        assert path.read_bytes() == (tmp_path / "whole").read_bytes() and wanted, fault
        path.unlink()
    partial.write_bytes(begun)
    partial.write_bytes(b"x" + begun[1:])  # it does not even say what it belongs to
    with pytest.raises(RecordError, match=r"its first line.*--force"):
        scan_into(path, checkpoint, Selection(), CREW, "gram")
    scan_into(path, checkpoint, Selection(), CREW, "gram", anew=True)


@pytest.mark.slow
def test_a_damaged_layer_of_a_calibration_costs_that_layer(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, windows, path = laser.open_checkpoint(speaker), windows_of(speaker, 2), tmp_path / "m"
    asked = {"selection": Selection(roles=("q", "o")), "shrink": True}
    calibrate(checkpoint, windows, tmp_path / "whole", **asked)
    partial = tmp_path / "m.partial"

    def stop(layer: int) -> None:
        if layer == 1:
            raise Killed

    with pytest.raises(Killed):
        calibrate(checkpoint, windows, path, **asked, tick=stop)
    shutil.copytree(partial, tmp_path / "begun")
    ran: list[int] = []
    original = calibration._run_layer
    # `tick` also tells of layers that are run for their outputs alone.
    monkeypatch.setattr(calibration, "_run_layer", lambda *a: ran.append(a[1]) or original(*a))
    for file, fault in faults(tmp_path / "begun"):
        if fault in (last_bit, halved):
            continue
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(tmp_path / "begun", partial)
        fault(partial / file)
        ran.clear()
        calibrate(checkpoint, windows, path, **asked)
        lost = {0: [0, 2], 1: [1, 2]}.get(int(file[6:11]) if file.startswith("layer") else -1, [2])
        assert ran == lost and path.read_bytes() == (tmp_path / "whole").read_bytes(), (file, fault)
        path.unlink()
    flipped(tmp_path / "whole")
    moments = Moments.load(tmp_path / "whole")
    with pytest.raises(RecordError, match="was changed or damaged"):
        for matrix in list_matrices(checkpoint):
            if matrix.name in moments.sites:
                moments.metric(matrix.name, checkpoint.read(matrix.name))


# --- --force ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_force_leaves_the_old_output_until_the_new_one_is_whole(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = laser.open_checkpoint(small), tmp_path / "out"
    spectra = laser.scan(checkpoint)
    first, second = make_plan(spectra, "rank:4"), make_plan(spectra, "rank:8")
    laser.reduce(checkpoint, first, out)
    old = snapshot(out)

    def stop(*_: object) -> None:
        raise Killed

    with pytest.raises(LaserError, match="no method"):
        laser.reduce(checkpoint, second, out, force=True, method="none")
    with pytest.raises(LaserError, match="no layer 9"):
        run_flow(checkpoint, out, Selection(layers=(9,)), chosen, crew=CREW, force=True)
    with monkeypatch.context() as full, pytest.raises(OutputError, match="not enough disk"):
        usage = shutil.disk_usage(tmp_path)
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        laser.reduce(checkpoint, second, out, force=True)
    assert snapshot(out) == old and sorted(p.name for p in tmp_path.iterdir()) == ["out", "small"]
    for _ in range(2):
        with pytest.raises(Killed):
            laser.reduce(checkpoint, second, out, force=True, tick=stop)
        assert snapshot(out) == old
    done: list[object] = []
    laser.reduce(checkpoint, second, out, force=True, resume=True, crew=CREW, tick=lambda *a: done.append(a))
    laser.reduce(checkpoint, second, tmp_path / "undisturbed")
    assert snapshot(out) == snapshot(tmp_path / "undisturbed") and len(done) < len(second.reductions)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small", "undisturbed"]  # nothing is left beside it
    (out / "thesis.txt").write_text("not laser's")
    with pytest.raises(OutputError, match=r"holds thesis.txt, which laser did not write"):
        laser.reduce(checkpoint, first, out, force=True)
    assert (out / "thesis.txt").exists()


@pytest.mark.slow
def test_force_replaces_records_of_the_same_kind_only(small: Path, tmp_path: Path, run: Any) -> None:
    spectra, plan, text = tmp_path / "s", tmp_path / "p", tmp_path / "notes"
    text.write_text("mine")
    assert run("scan", small, "-o", spectra)[0] == run("plan", spectra, "-o", plan, "--rule", "rank:4")[0] == 0
    kept = snapshot(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(small / "config.json")
    for words, message in (
        (("scan", small, "-o", plan), "a record of kind 'plan', expected a record of kind 'spectra'"),
        (("plan", spectra, "-o", spectra, "--rule", "rank:4"), "a record of kind 'spectra', expected"),
        (("scan", small, "-o", text), "no record of laser"),
        (("scan", small, "-o", link), "lies in the model"),
        (("scan", small, "-o", small / "config.json"), "lies in the model"),
        (("scan", small, "-o", small / "new"), "lies in the model"),
        (("scan", small, "-o", small), "exists and is no file"),
        (("scan", small, "-o", spectra, "--layers", 9), "no layer 9"),
        (("plan", spectra, "-o", plan, "--rule", "nonsense"), "nonsense"),
    ):
        code, _, error = run(*words, "--force")
        assert code and message in error, error
    link.unlink()
    assert snapshot(tmp_path) == kept
    flipped(spectra)  # a damaged one can be made again
    assert run("scan", small, "-o", spectra, "--force")[0] == 0 and snapshot(tmp_path) == kept
