"""The solver: merges undone to the last bit, and what is no merge left undone."""

import pytest
import torch
from merges import BF16, F16, F32, full, merged, update, weights

from laser.differences.difference import Verdict, compare_tensors, evidence, judge_difference, whitened
from laser.differences.formats import same_bits
from laser.differences.formulas import Formula
from laser.differences.recover import is_believed, recover, vote
from laser.differences.solver import Adapter, Solution, polish, solve, wrong_bits
from laser.spectral.devices import HOST, Device

ONCE, FIRST = Formula("once"), Formula("delta-first")


def error(found: Solution, X: torch.Tensor) -> float:
    return float((found.adapter.rows(0, len(X)) - X.double()).norm() / X.double().norm())


@pytest.mark.parametrize("formula", [ONCE, FIRST], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(192, 160), (96, 320)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_merge_is_undone_to_the_bit(formula: Formula, shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = weights(*shape, dtype=dtype)
    X = update(W, 4, 0.01)
    q = merged(W, X, formula.name, dtype)
    found = solve(W, q, 4, formula)
    assert found.share_wrong <= 1e-4 and found.adapter.rank == 4
    assert error(found, X) < 0.015
    assert error(found, X) < 0.3 * float((q.double() - W.double() - X).norm() / X.norm())  # of the difference itself


@pytest.mark.parametrize("formula", [ONCE, FIRST], ids=lambda f: f.name)
def test_the_middle_of_what_gives_the_bits_is_nearer(formula: Formula) -> None:
    """And every interval is still met: no bit is lost."""
    W = weights(160, 128)
    X = update(W, 4, 0.005, decay=0.8)
    q = merged(W, X, formula.name)
    found = solve(W, q, 4, formula)
    middle = polish(W, q, found)
    assert middle.wrong <= found.wrong and error(middle, X) < 0.8 * error(found, X)


def test_nothing_is_polished_where_bits_are_wrong_or_all_is_zero() -> None:
    W = weights(96, 80)
    q = merged(W, update(W, 6, 0.01))
    few, none = solve(W, q, 2, ONCE), solve(W, W, 2, ONCE)
    assert polish(W, q, few) is few and polish(W, W, none) is none


def test_the_formula_is_part_of_the_answer() -> None:
    W = weights(192, 160)
    q = merged(W, update(W, 4, 0.01), "delta-first")
    assert solve(W, q, 4, FIRST).share_wrong < 1e-4 and solve(W, q, 4, ONCE).share_wrong > 5e-3


def test_a_scale_that_is_no_power_of_two() -> None:
    """An adapter in 16 bits: its product is rounded before it is scaled and again after."""
    W, s = weights(192, 160), 4 / 3
    X = update(W, 4, 0.01)
    q = merged(W, X, "scaled-after", BF16, s)
    found = solve(W, q, 4, Formula("scaled-after", s))
    assert found.share_wrong < 1e-4 and error(found, s * X) < 0.02


@pytest.mark.slow
def test_too_low_a_rank_leaves_percents_wrong() -> None:
    W = weights(256, 192)
    q = merged(W, update(W, 8, 0.003, decay=0.8), "delta-first")
    wrong = [solve(W, q, rank, FIRST).share_wrong for rank in (6, 7, 8, 9)]
    assert wrong[0] > wrong[1] > 0.01 and max(wrong[2:]) < 1e-4


def test_a_change_in_all_directions_is_not_solved() -> None:
    W = weights(192, 160)
    assert solve(W, merged(W, full(W, 0.003, 0.0)), 8, ONCE).share_wrong > 0.3


def test_nothing_to_explain_is_explained_at_once() -> None:
    W = weights(64, 48)
    found = solve(W, W, 2, ONCE)
    assert found.wrong == 0 and found.rounds == 0 and not found.adapter.B.any()


def test_float32_is_right_up_to_its_own_products() -> None:
    """A product in float32 has errors of its own, which no rank explains: the last bit of some entries stays wrong."""
    W = weights(128, 96, dtype=F32)
    X = update(W, 4, 0.01)
    q = merged(W, X, "once", F32)
    found = solve(W, q, 4, ONCE)
    assert found.share_wrong < 0.1 and error(found, X) < 1e-4


def test_another_format_than_the_base_s() -> None:
    for base, tuned in ((F32, BF16), (F16, BF16), (BF16, F16)):
        W = weights(128, 96, dtype=base)
        q = merged(W, update(W, 3, 0.02), "once", tuned)
        assert solve(W, q, 3, ONCE).share_wrong < 2e-3


# --- traps ------------------------------------------------------------------------------------------------------------


def test_zeros_subnormals_and_powers_of_two() -> None:
    """Stored zeros of both signs, numbers under the least normal one, and entries on a binade's edge."""
    W = weights(128, 96, dtype=F16)
    W[::7, ::5] = 0
    W[1::7, ::5] = -0.0
    W[2::7, ::5] = 2.0**-20  # subnormal in float16
    W[3::7, ::5] = -(2.0**-5)
    q = merged(W, update(W, 3, 0.02), "delta-first", F16)
    found = solve(W, q, 3, FIRST)
    assert found.share_wrong < 2e-3 and torch.isfinite(found.adapter.B).all()


def test_an_entry_that_cancels_is_in_nobody_s_way() -> None:
    """Where the update takes all of W away, the interval is shorter than a step of float32, in which it is met."""
    W = weights(96, 80)
    W[0, 0] = -(2.0**-12)
    X = update(W, 3, 0.005, seed=0)
    X *= -W[0, 0].float() * (1 + 2.0**-20) / X[0, 0]
    q = merged(W, X)
    low, high = ONCE.cell(W, q)
    assert q[0, 0] and low.float()[0, 0] == high.float()[0, 0]
    found = solve(W, q, 3, ONCE)
    middle = polish(W, q, found)
    assert middle.wrong <= found.wrong < 5 and error(middle, X) < 0.8 * error(found, X)


def test_tiny_and_huge_matrices() -> None:
    """In the range of the format the solution goes along with a power of two."""
    W = weights(96, 80)
    q = merged(W, update(W, 3, 0.02))
    one, other = solve(W, q, 3, ONCE), solve(W * 2.0**-90, q * 2.0**-90, 3, ONCE)
    assert one.wrong == other.wrong == 0


def test_ties_are_known_to_go_to_the_even_one() -> None:
    """X exactly on a tie: the stored bits say which side, and the solver stays on it."""
    W = torch.ones(8, 8, dtype=BF16)
    X = torch.full((8, 8), 2.0**-8)  # 1 + 2^-8 lies between 1 and 1 + 2^-7
    q = merged(W, X)
    assert torch.equal(q, W)  # to the even one
    found = solve(W, q, 1, ONCE)
    assert found.wrong == 0 and same_bits(ONCE.merge(W, found.adapter.rows(0, 8), BF16), q).all()


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 16, 33])
def test_the_sum_has_one_order(rank: int) -> None:
    """Against Python's own float64, one direction after the other, and whatever rows are asked for."""
    generator = torch.Generator().manual_seed(rank)
    B, A = (torch.randn(shape, generator=generator) for shape in ((6, rank), (rank, 5)))
    X = Adapter(B, A).rows(0, 6)
    for i in range(6):
        for j in range(5):
            expected = 0.0
            for b, a in zip(B[i].tolist(), A[:, j].tolist(), strict=True):
                expected += b * a
            assert X[i, j].item() == expected
    assert torch.equal(X[2:5], Adapter(B, A).rows(2, 5)) and Adapter(B, A).rows(3, 3).shape == (0, 5)
    wide = Adapter(B, torch.randn(rank, 40_000, generator=generator))  # of which no two rows fit
    assert torch.equal(wide.rows(0, 6)[4:], wide.rows(4, 6))


def test_the_count_is_that_of_the_bits() -> None:
    W = weights(96, 80)
    q = merged(W, update(W, 3, 0.01))
    found = solve(W, q, 2, ONCE)
    made = ONCE.merge(W, found.adapter.rows(0, 96), BF16)
    positions = wrong_bits(W, q, found.adapter, ONCE)
    assert found.wrong == len(positions) == int((made != q).sum()) > 0
    mended = made.clone().reshape(-1)
    mended[positions] = q.reshape(-1)[positions]
    assert same_bits(mended.reshape(96, 80), q).all()


def test_twice_the_same() -> None:
    W = weights(96, 80)
    q = merged(W, update(W, 3, 0.01))
    one, other = solve(W, q, 3, ONCE), solve(W, q, 3, ONCE)
    assert torch.equal(one.adapter.B, other.adapter.B) and torch.equal(one.adapter.A, other.adapter.A)


def test_on_every_device(device: Device) -> None:
    W = weights(128, 96)
    q = merged(W, update(W, 3, 0.01))
    assert solve(W, q, 3, ONCE, device).share_wrong < 2e-4


# --- the rank ---------------------------------------------------------------------------------------------------------


def found_in(W: torch.Tensor, q: torch.Tensor, voted: int | None = None) -> Solution | None:
    change = compare_tensors(W, q)
    s = torch.linalg.svdvals(whitened(W, q, HOST)).numpy()
    return recover(W, q, judge_difference(change, s, (q.shape[0], q.shape[1])), voted)


@pytest.mark.slow
@pytest.mark.parametrize("rank, share, decay", [(4, 0.01, 1.0), (8, 0.01, 0.8), (4, 0.002, 1.0), (8, 0.003, 0.8)])
def test_the_rank_is_found_by_the_bits(rank: int, share: float, decay: float) -> None:
    """The last ones have directions under the edge."""
    W = weights(256, 192)
    found = found_in(W, merged(W, update(W, rank, share, decay=decay), "delta-first"))
    assert found and found.adapter.rank == rank and found.share_wrong < 1e-4


@pytest.mark.slow
def test_two_adapters_add_up() -> None:
    """Merged one after the other: their sum is found, though a quarter of the bits hangs on what lay between."""
    W = weights(256, 192)
    one, other = update(W, 3, 0.015, seed=5), update(W, 4, 0.015, seed=6)
    q = merged(merged(W, one), other)
    found = found_in(W, q)
    assert found and found.adapter.rank == 7 and found.formula.name == "twice"
    assert found.share_wrong < 1e-3 and error(found, one + other) < 0.05
    wrong = len(wrong_bits(W, q, found.adapter, found.formula)) / q.numel()
    assert 0.1 < wrong < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("share", [4e-3, 6e-3])
def test_no_full_fine_tune_is_called_two_adapters(share: float) -> None:
    """At these shares what one rounding and the change leave is about what two roundings would."""
    W = weights(192, 160)
    for X in (full(W, share, 0.0), update(W, 6, 0.02) + full(W, share, 0.0), full(W, share)):
        q = merged(W, X)
        s = torch.linalg.svdvals(whitened(W, q, HOST)).numpy()
        change = judge_difference(compare_tensors(W, q), s, (192, 160))
        assert change.kind is Verdict.FULL or recover(W, q, change) is None


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [3e-4, 1e-3, 3e-3, 1e-2])
def test_no_full_fine_tune_is_called_an_adapter(power: float, share: float) -> None:
    W = weights(256, 192)
    assert found_in(W, merged(W, full(W, share, power))) is None


def test_a_base_that_was_quantised_first_is_refused() -> None:
    """The adapter was trained on the base in 4 bits with a scale per row: the difference holds that error, too."""
    W = weights(256, 192)
    step = W.float().abs().amax(1, keepdim=True) / 7
    quantised = (torch.round(W.float() / step) * step).to(BF16)
    assert found_in(W, merged(quantised, update(W, 4, 0.01))) is None


def test_a_change_of_all_norms_as_dora_s_is_refused() -> None:
    W = weights(256, 192)
    tuned = W.float() + update(W, 4, 0.01)
    norms = W.float().norm(dim=1) * (1 + 0.01 * torch.randn(256, generator=torch.Generator().manual_seed(8)))
    q = (tuned * (norms / tuned.norm(dim=1))[:, None]).to(BF16)
    assert found_in(W, q) is None


def test_evidence_and_vote() -> None:
    assert evidence(4, (100, 100), 0.784) == pytest.approx(10.0)
    assert evidence(0, (100, 100), 0.5) == 0
    W = weights(64, 48)
    change = judge_difference(compare_tensors(W, merged(W, update(W, 3, 0.02))), torch.linalg.svdvals(
        whitened(W, merged(W, update(W, 3, 0.02)), HOST)).numpy(), (64, 48))  # fmt: skip
    assert change.kind is Verdict.LOW_RANK and vote([change]) == (change.rank, True) and vote([]) == (None, False)
    assert is_believed(Solution(Adapter(torch.ones(1, 1), torch.ones(1, 1)), ONCE, 1, 1, 1000), BF16)
    assert not is_believed(Solution(Adapter(torch.ones(1, 1), torch.ones(1, 1)), ONCE, 3, 1, 1000), BF16)
