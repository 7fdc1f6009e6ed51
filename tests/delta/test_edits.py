"""A fine-tune with its difference cut or scaled: written as every reduction is, and checked against its base."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import snapshot
from merges import BF16, F16, F32, full, merged, update, weights
from models import write_model
from safetensors.torch import load_file, save_file
from test_delta import Q0, tune

from laser import flow
from laser.checkpoint.matrices import Matrix
from laser.checkpoint.reader import open_checkpoint
from laser.differences.base import Base
from laser.differences.difference import whitening
from laser.differences.edits import OfDifference, between, scaled, scaling_problems
from laser.engine.crew import Crew
from laser.errors import NumericalError
from laser.outcome import Outcome
from laser.plan import Plan, Treatment, make_plan
from laser.selection import Selection
from laser.spectral.devices import HOST, Device
from laser.spectral.shrinkage import Gains

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tuned", tune, shards=3)


def read(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def shards(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.glob("*.safetensors")}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("share", [1e-3, 0.1])
def test_between_is_the_sum_in_float64_rounded_once(dtype: torch.dtype, share: float) -> None:
    W = weights(24, 40, dtype=dtype)
    q = merged(W, full(W, share), dtype=dtype)
    assert same(between(W, q, 0.0).double() + 0.0, W.double() + 0.0) and same(between(W, q, 1.0), q)
    for c in (0.25, 0.5, 0.9):
        expected = (W.double() + c * (q.double() - W.double())).to(dtype)
        assert torch.equal(between(W, q, c), expected)
        found = scaled(W, q, c)
        assert found.certificate.residual <= found.certificate.tolerance and found.certificate.energy_kept == c * c
        assert not scaling_problems("W", W, q, found.matrix, c)
        assert scaling_problems("W", W, q, q, c)


def test_what_did_not_move_keeps_its_bits() -> None:
    W = torch.tensor([0.0, -0.0, -0.0, 1.0], dtype=BF16)
    q = torch.tensor([-0.0, -0.0, 0.0, 1.0], dtype=BF16)
    assert same(between(W, q, 0.5), q) and same(between(W, q, 0.0), q)
    assert scaling_problems("W", W, q, W, 0.5) == [
        "W: 2 of 4 entries are off, expected the base's and 0.5 of the difference, rounded once"
    ]


def test_a_scale_of_nan_is_refused() -> None:
    W = torch.ones(4, 4)
    with pytest.raises(NumericalError, match="certificate missed"):
        scaled(W, W * torch.nan, 0.5)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("rank", [0, 3, 40])
def test_a_cut_against_plain_svd(dtype: torch.dtype, rank: int) -> None:
    W = weights(60, 40, dtype=dtype)
    q = merged(W, update(W, 3, 0.02), dtype=dtype)
    scales, D = whitening(W, q, HOST)
    U, s, Vh = torch.linalg.svd(D)
    expected = W.double() + scales.undo((U[:, :rank] * s[:rank]) @ Vh[:rank])
    metric = OfDifference(W)
    found = metric.visit(q, lambda _: Gains(rank), HOST).truncation
    assert found is not None and found.matrix.dtype == dtype
    kind = torch.finfo(dtype)
    half = found.matrix.double().abs().clamp_min(kind.smallest_normal) * kind.eps / 2
    assert ((found.matrix.double() - expected).abs() <= half * 1.01 + 1e-12).all()
    assert metric.values(q, HOST).singular_values == pytest.approx(s.numpy(), rel=1e-6, abs=1e-6)
    assert not metric.problems("W", q, found.matrix, half, Gains(rank), HOST)
    if rank < 40:  # not q itself, whose distance is that of the rounding as well
        assert metric.problems("W", q, q, half, Gains(rank), HOST)
        assert metric.problems("W", q, found.matrix * torch.nan, half, Gains(rank), HOST)


def test_a_cut_on_every_device(device: Device) -> None:
    W = weights(60, 40)
    q = merged(W, update(W, 3, 0.02))
    here, there = (OfDifference(W).visit(q, lambda _: Gains(3), d).truncation for d in (HOST, device))
    assert here is not None and there is not None and there.matrix.device == here.matrix.device
    assert (here.matrix.double() - there.matrix.double()).abs().max() < 1e-2 * W.double().abs().max()


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scaled_is_every_tensor_in_one_command(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    """Norms too; what is the same stays, byte for byte; and the card says of what it is made."""
    out = tmp_path / "half"
    code, said, err = run("reduce", tuned, "--base", base, "--scale", "0.5", "-o", out)
    assert code == 0 and not err, err
    assert "96, times 0.5" in said and "-, times 0.5" in said
    W, q, made = read(base), read(tuned), read(out)
    assert all(same(made[name], between(W[name], q[name], 0.5)) for name in q)
    outcome = Outcome.load(out)
    assert outcome.plan.rule == "scale:0.5" and NORM in outcome.matrices and Q0 in outcome.matrices
    assert EMBEDDING not in outcome.matrices  # identical
    pair = outcome.plan.pair
    assert pair is not None and (pair.base.name, pair.tuned.name) == ("base", "tuned")
    card = (out / "README.md").read_text()
    assert "every tensor that differs from the base's. Of 21 tensors, 7 were scaled, 14 were copied" in card
    assert "a fine-tune of `base`, with its difference from that base multiplied by 0.5 in" in card
    assert "laser verify tuned half --base base" in card and str(tmp_path) not in card
    code, said, _ = run("verify", tuned, out, "--base", base)
    assert code == 0 and f"{len(outcome.matrices)} as planned, 0 problems" in said
    # The same in three steps, byte for byte.
    assert run("delta", base, tuned, "-o", tmp_path / "d")[0] == 0
    assert run("plan", tmp_path / "d", "--rule", "scale:0.5", "-o", tmp_path / "plan.json")[0] == 0
    words = ("reduce", tuned, tmp_path / "plan.json", "--base", base, "-o", tmp_path / "again")
    assert run(*words, "--part", "1/2")[0] == run(*words, "--part", "2/2")[0] == 0
    assert shards(out) == shards(tmp_path / "again")


@pytest.mark.slow
def test_cut_by_the_rounding_rule(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("reduce", tuned, "--base", base, "-o", out)[0] == 0
    W, q, made, outcome = read(base), read(tuned), read(out), Outcome.load(out)
    assert outcome.plan.rule == "rounding" and outcome.plan.reductions[Q0].rank in (3, 4)
    X = update(W[Q0], 3, 0.02, seed=len(Q0)).double()
    error = [float((t[Q0].double() - W[Q0].double() - X).norm() / X.norm()) for t in (q, made)]
    assert error[1] == pytest.approx(error[0], rel=0.1)  # what is written is rounded, too
    assert same(made[NORM], q[NORM]) and same(made[EMBEDDING], q[EMBEDDING])
    assert run("verify", tuned, out, "--base", base)[0] == 0
    # The same in three steps, byte for byte.
    assert run("delta", base, tuned, "-o", tmp_path / "d")[0] == 0
    assert run("plan", tmp_path / "d", "-o", tmp_path / "plan.json")[0] == 0
    assert run("reduce", tuned, tmp_path / "plan.json", "--base", base, "-o", tmp_path / "again")[0] == 0
    assert shards(out) == shards(tmp_path / "again")
    one = tmp_path / "one"
    assert (
        run("run", tuned, "--base", base, "--no-search", "--rule", "rounding", "--lowest-snr", "1", "-o", one)[0] == 0
    )
    assert len(Outcome.load(one).matrices) == 1 and run("verify", tuned, one, "--base", base)[0] == 0


@pytest.mark.slow
def test_nothing_left_of_a_difference_is_the_base(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    code, said, _ = run("reduce", tuned, "--base", base, "--scale", "0", "-o", tmp_path / "zero")
    assert code == 0 and "become the BASE'S, nothing of their change is left" in said
    assert all(torch.equal(W, read(base)[name]) for name, W in read(tmp_path / "zero").items())
    code, said, _ = run("reduce", tuned, "--base", base, "--rule", "rank:0", "-o", tmp_path / "none")
    assert code == 0 and "become the BASE'S" in said
    assert torch.equal(read(tmp_path / "none")[Q0], read(base)[Q0])
    for out in ("zero", "none"):
        assert run("verify", tuned, tmp_path / out, "--base", base)[0] == 0


@pytest.mark.parametrize("what, message", [
    ({"scale": 1.0}, "expected 'reduce' and a number from 0 to under 1"),
    ({"scale": 0.5, "below": 1, "noise": 1.0}, "which are for a cut"),
    ({"action": "keep", "scale": 0.5}, "expected 'reduce'"),
])  # fmt: skip
def test_a_plan_that_was_edited_badly(
    run: Run, base: Path, tuned: Path, tmp_path: Path, what: dict[str, object], message: str
) -> None:
    assert run("delta", base, tuned, "-o", tmp_path / "d")[0] == 0
    assert run("plan", tmp_path / "d", "--rule", "scale:0.5", "-o", tmp_path / "p.json")[0] == 0
    document = json.loads((tmp_path / "p.json").read_text())
    next(line for line in document["lines"] if line["name"] == Q0).update(what)
    (tmp_path / "p.json").write_text(json.dumps(document))
    code, _, err = run("reduce", tuned, tmp_path / "p.json", "--base", base, "-o", tmp_path / "out")
    assert code == 1 and Q0 in err and message in err and not (tmp_path / "out").exists()


def test_a_line_for_what_the_base_lacks(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    def grow(name: str, W: torch.Tensor) -> torch.Tensor:
        return torch.cat((W, W[:8])) if name == EMBEDDING else tune(name, W)

    grown = write_model(tmp_path / "grown", grow)
    assert run("delta", base, grown, "-o", tmp_path / "d")[0] == 0
    assert run("plan", tmp_path / "d", "--rule", "scale:0.5", "-o", tmp_path / "p.json")[0] == 0
    document = json.loads((tmp_path / "p.json").read_text())
    line = next(line for line in document["lines"] if line["name"] == EMBEDDING)
    line.update({"action": "reduce", "scale": 0.5})
    (tmp_path / "p.json").write_text(json.dumps(document))
    code, _, err = run("reduce", grown, tmp_path / "p.json", "--base", base, "-o", tmp_path / "out")
    assert code == 1 and "expected weights of this shape" in err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["scale:0.5", "rounding"])
def test_killed_and_gone_on_with_it_is_the_same(base: Path, tuned: Path, tmp_path: Path, rule: str) -> None:
    """By any number of workers, in one pass; what was finished is not made again."""
    checkpoint, whole = open_checkpoint(tuned), tmp_path / "whole"
    compared, treatment = Base.of(open_checkpoint(base), checkpoint), Treatment(rule)
    made: list[str] = []

    def call(out: Path, workers: int, after: int, resume: bool = False) -> None:
        def stop(matrix: Matrix, _: float) -> None:
            made.append(matrix.name)
            if len(made) == after:
                raise KeyboardInterrupt

        flow.run_flow(
            checkpoint, out, Selection(), lambda spectra: make_plan(spectra, rule), crew=Crew((HOST,), workers),
            base=compared, treatment=treatment, resume=resume, on_reduce=stop, name="out",
        )  # fmt: skip

    call(whole, 1, 99)
    every = len(made)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "out", 1, 9)
    made.clear()
    call(tmp_path / "out", 2, 99, resume=True)
    assert 0 < len(made) < every
    assert snapshot(tmp_path / "out") == snapshot(whole)


@pytest.mark.slow
def test_verify_finds_one_changed_entry(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    for flags in (("--scale", "0.5"), ("--rule", "rank:2")):
        out = tmp_path / flags[1]
        assert run("reduce", tuned, "--base", base, *flags, "-o", out)[0] == 0
        checkpoint = open_checkpoint(out)
        shard = checkpoint.shard_of(Q0).path
        found = load_file(shard)
        assert found[Q0][0, 0] != 0
        found[Q0][0, 0] *= 2
        document = json.loads((out / "laser.json").read_text())
        save_file(found, shard, {"format": "pt"})
        code, said, _ = run("verify", tuned, out, "--base", base)
        assert code == 1 and shard.name in said and document["shards"][shard.name]


@pytest.mark.slow
def test_another_base_is_refused(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1000)
    out = tmp_path / "out"
    assert run("reduce", tuned, "--base", base, "--scale", "0.5", "-o", out)[0] == 0
    assert run("delta", base, tuned, "-o", tmp_path / "d")[0] == 0
    assert run("plan", tmp_path / "d", "-o", tmp_path / "plan.json")[0] == 0
    for words in (("verify", tuned, out), ("reduce", tuned, tmp_path / "plan.json", "-o", tmp_path / "no")):
        code, _, err = run(*words)
        assert code == 1 and "was made from tuned - base" in err and "try it with --base" in err
        code, _, err = run(*words, "--base", other)
        assert code == 1 and "was made from other weights of base" in err and "found other" in err
    assert not (tmp_path / "no").exists()
    for rule in ("scale:0.5", "rounding"):  # a model that it never came from
        code, _, err = run("reduce", tuned, "--base", other, "--rule", rule, "-o", tmp_path / rule)
        assert code == 2 and "other is not the base of tuned: none of their matrices are alike" in err
        assert not (tmp_path / rule / "laser.json").exists()
    code, _, err = run("reduce", tuned, "--base", other, "--scale", "0.5", "-o", out, "--resume")
    assert code == 1 and "other weights of base" in err
    assert Plan.load(out / "laser" / "plan.json").pair is not None


@pytest.mark.parametrize("words, message", [
    (("--scale", "0.5", "--rule", "rounding"), "one of them"),
    (("--rule", ""), "no rule is called ''"),
    (("--scale", "1.5"), "from 0, which is the base"),
    (("--scale", "-1"), "from 0, which is the base"),
    (("--rule", "mp-nothing"), "no rule is called"),
    (("--scale", "0.5", "--fresh", "f"), "--fresh is for a reduction by a plan"),
    (("--scale", "0.5", "--part", "1/2"), "--part is for a reduction by a plan"),
])  # fmt: skip
def test_usage(run: Run, base: Path, tuned: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    code, _, err = run("reduce", tuned, "--base", base, *words, "-o", tmp_path / "out")
    assert code == 2 and message in err and not (tmp_path / "out").exists()


def test_no_base_no_difference(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    code, _, err = run("reduce", tuned, "--scale", "0.5", "-o", tmp_path / "out")
    assert code == 2 and "reduce needs a plan, or a base" in err
    for verb in ("run", "search"):
        flag = "--rule" if verb == "run" else "--rules"
        code, _, err = run(verb, tuned, flag, "scale:0.5", "-o", tmp_path / "out")
        assert code == 2 and "for differences of two checkpoints" in err
    code, said, _ = run("reduce", tuned, "--base", base, "--scale", "0.5", "-o", tmp_path / "out", "--dry-run")
    assert code == 0 and "a scale factorises nothing" in said and not (tmp_path / "out").exists()
    assert "disk for the scaled copy" in said and "to reduce them all" not in said and "reduced copy" not in said
    for out in (base, base / "in"):  # the base stays what it is
        code, _, err = run("reduce", tuned, "--base", base, "--scale", "0.5", "-o", out, "--force")
        assert code == 1 and "base" in err
    assert run("scan", tuned, "-o", tmp_path / "s")[0] == 0
    assert run("plan", tmp_path / "s", "-o", tmp_path / "p", "--rule", "mp-edge")[0] == 0
    code, _, err = run("reduce", tuned, tmp_path / "p", "--base", base, "-o", tmp_path / "out")
    assert code == 2 and "of no difference; try it without --base" in err
