"""Rounding to a storage format, against torch's own rounding: all numbers of 16 bits, and chosen ones of 32."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merges import BF16, F16, F32, merged, weights

from laser.differences.formats import cell_of, exponent, format_of, power_of_two, same_bits
from laser.differences.formulas import Formula
from laser.errors import UsageError

SIXTEEN = pytest.mark.parametrize("dtype", [BF16, F16])


def all_of(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a format of 16 bits, both zeros among them."""
    q = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return q[torch.isfinite(q)]


def some_of_float32() -> torch.Tensor:
    """Powers of two and their neighbours, subnormals, both zeros, the largest, and any others."""
    powers = torch.tensor([2.0**k for k in range(-149, 128)], dtype=torch.float32)
    bits = torch.cat((powers.view(torch.int32), torch.tensor([0, 1, 2, 3, 0x7FFFFF, 0x800000, 0x7F7FFFFF])))
    bits = torch.cat((bits, (bits[1:] - 1).clamp(min=0), bits + 1, torch.randint(0, 0x7F7FFFFF, (2000,))))
    q = bits.to(torch.int32).view(torch.float32)
    q = q[torch.isfinite(q)]
    return torch.cat((q, -q))


@SIXTEEN
def test_a_cell_is_what_torch_rounds_to_the_number(dtype: torch.dtype) -> None:
    q = all_of(dtype)
    cell = cell_of(q)
    assert (cell.low < cell.high).all()
    middle = (cell.low + cell.high) / 2
    # Torch goes by float32, which holds a middle and an end of 16 bits exactly.
    assert torch.equal(middle.float().double(), middle)
    assert same_bits(middle.to(dtype), q).all()
    for end in (cell.low, cell.high):
        inside = same_bits(end.to(dtype), q)
        assert torch.equal(inside[end != 0], cell.closed[end != 0])
    step = (cell.high - cell.low) * 2**-10
    assert same_bits((cell.low + step).to(dtype), q).all() and same_bits((cell.high - step).to(dtype), q).all()


def test_cells_of_float32() -> None:
    q = some_of_float32()
    cell = cell_of(q)
    assert same_bits(((cell.low + cell.high) / 2).float(), q).all()
    for end in (cell.low, cell.high):
        inside = same_bits(end.float(), q)
        assert torch.equal(inside[end != 0], cell.closed[end != 0])


@SIXTEEN
def test_cells_leave_no_gap(dtype: torch.dtype) -> None:
    """In the order of the numbers each cell begins where the one before ends; the zeros share theirs."""
    q = all_of(dtype)
    q = q[torch.argsort(q.double() + torch.where(torch.signbit(q), -1e-60, 0.0), stable=True)]
    cell = cell_of(q)
    assert torch.equal(cell.high[:-1], cell.low[1:])


@SIXTEEN
def test_spacing_is_the_way_to_the_next_number(dtype: torch.dtype) -> None:
    q = all_of(dtype)
    positive = torch.unique(q[q > 0].double())
    gaps = positive.diff()
    assert torch.equal(format_of(dtype).spacing(positive[:-1]), gaps)
    assert format_of(dtype).spacing(torch.zeros(1, dtype=torch.float64))[0] == positive[0]


@SIXTEEN
def test_variance_is_the_mean_square_over_the_cell(dtype: torch.dtype) -> None:
    """Against a sum over points of the cell, for ordinary numbers, powers of two, subnormals and zero."""
    q = torch.tensor([1.0, 1.5, -2.0, 3.0, -(2.0**-14), 2.0**-15, 0.0], dtype=dtype)
    x, cell = q.double(), cell_of(q)
    points = cell.low[:, None] + (cell.high - cell.low)[:, None] * (torch.arange(4096) + 0.5) / 4096
    mean = ((points - x[:, None]) ** 2).mean(1)
    assert torch.allclose(format_of(dtype).variance(q), mean, rtol=1e-5)
    ulp = format_of(dtype).spacing(torch.tensor([1.5], dtype=torch.float64))
    assert float(format_of(dtype).variance(torch.tensor([1.5], dtype=dtype))) == pytest.approx(float(ulp**2 / 12))
    assert float(format_of(dtype).variance(torch.tensor([2.0], dtype=dtype))) == pytest.approx(
        float((2 * ulp) ** 2 / 16)
    )


def test_rounding_errors_have_these_variances() -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (BF16, F16, F32):
        q = x.to(dtype)
        expected = float(format_of(dtype).variance(q).sum())
        assert float(((q.double() - x) ** 2).sum()) == pytest.approx(expected, rel=0.01)


@SIXTEEN
def test_the_next_numbers_up_and_down(dtype: torch.dtype) -> None:
    known = format_of(dtype)
    q = torch.unique(all_of(dtype).double())
    between = (q[:-1] + q[1:]) / 2
    assert torch.equal(known.down(q), q) and torch.equal(known.up(q), q)
    assert torch.equal(known.down(between), q[:-1]) and torch.equal(known.up(between), q[1:])


@pytest.mark.slow
@given(st.integers(-1022, 1023))
def test_powers_of_two(k: int) -> None:
    x = power_of_two(torch.tensor([k]))
    assert float(x) == math.ldexp(1.0, k) and int(exponent(x)) == k and int(exponent(-x * 1.99)) == k


def test_the_sign_of_zero_counts() -> None:
    assert not same_bits(torch.tensor([0.0], dtype=BF16), torch.tensor([-0.0], dtype=BF16)).any()
    cell = cell_of(torch.tensor([0.0, -0.0], dtype=BF16))
    least = 2.0**-133
    assert cell.low.tolist() == [0.0, -least / 2] and cell.high.tolist() == [least / 2, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_formats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"rounding to .*, expected one of bfloat16, float16, float32; try --exclude"):
        cell_of(torch.zeros(2, dtype=dtype))


# --- formulas ---------------------------------------------------------------------------------------------------------

FORMULAS = [Formula("once"), Formula("delta-first"), Formula("scaled-after", 4 / 3), Formula("scaled-after", 2.0)]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f"{f.name} {f.scale:.3g}")
@SIXTEEN
def test_a_formula_is_what_the_tools_do(formula: Formula, dtype: torch.dtype) -> None:
    W = weights(40, 30, dtype=dtype)
    X = 0.01 * torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    s = formula.scale
    expected = merged(W, X, formula.name, dtype, s)
    assert same_bits(formula.merge(W, (X.double() * s), dtype), expected).all()


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f"{f.name} {f.scale:.3g}")
@SIXTEEN
def test_the_cell_of_a_formula_is_what_gives_the_bits(formula: Formula, dtype: torch.dtype) -> None:
    """X drawn, q made; then around both ends of the interval the bits are right inside and wrong outside."""
    W = weights(60, 50, seed=4, dtype=dtype)
    for size in (1e-4, 1e-2, 0.3):
        X = size * torch.randn(60, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        q = formula.merge(W, X, dtype)
        low, high = formula.cell(W, q)
        step = (high - low) * 2**-6
        assert ((low - step <= X) & (X <= high + step)).all()  # ends are those of exact sums
        reached = same_bits(formula.merge(W, (low + high) / 2, dtype), q)
        assert reached.double().mean() > 0.99
        for end, way in ((low, 1), (high, -1)):
            assert same_bits(formula.merge(W, end + way * step, dtype), q)[reached].double().mean() > 0.999
            assert same_bits(formula.merge(W, end - way * step, dtype), q)[reached].double().mean() < 0.001


def test_what_no_update_gives_has_the_interval_of_the_sum() -> None:
    """1 + X for a tiny result: X near -1 has a coarser step than the result."""
    W, q = torch.tensor([[1.0]], dtype=BF16), torch.tensor([[2.0**-20]], dtype=BF16)
    low, high = Formula("delta-first").cell(W, q)
    plain = Formula("once").cell(W, q)
    assert (low, high) == plain and low < high


def test_formulas_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="no formula is called 'thrice'; try one of once, delta-first, scaled-after"):
        Formula("thrice")
    with pytest.raises(UsageError, match="expected a positive number"):
        Formula("scaled-after", 0.0)


def test_two_roundings_reach_half_a_step_further() -> None:
    """Every sum of two updates, each rounded as it is added, lies in the cell of `twice`."""
    generator = torch.Generator().manual_seed(3)
    W = (1 + 0.4 * torch.rand(64, 48, generator=generator)).to(torch.bfloat16)  # of one binade, as are the sums
    one, other = (0.02 * torch.randn(64, 48, generator=generator) for _ in range(2))
    q = ((W.float() + one).to(torch.bfloat16).float() + other).to(torch.bfloat16)
    X = (one + other).double()
    twice = Formula("twice")
    low, high = twice.cell(W, q)
    assert twice.explains(W, X, q).float().mean() > 0.999 and bool((low < high).all())
    assert 0.1 < (twice.merge(W, X, torch.bfloat16) != q).float().mean() < 0.5
    assert not twice.explains(W, X + 0.03, q).all()
