"""Permutations keep what they should, Lanczos finds the largest value, and `parallel` is calibrated by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, ks_2samp

from laser.errors import UsageError
from laser.spectral import permutation
from laser.spectral.devices import HOST, Device
from laser.spectral.permutation import (
    FEISTEL_ROUNDS,
    columns_by_row,
    grid,
    largest_singular_value,
    null_largest,
    permuted,
    places,
)
from laser.spectral.rules import apply_rule, fewest_draws


@pytest.mark.slow
@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_permutations_keep_every_entry_and_rows_keep_theirs(shape: tuple[int, int], seed: int) -> None:
    W = torch.arange(shape[0] * shape[1]).reshape(shape).to(torch.bfloat16)
    whole, rows = permuted(W, seed), permuted(W, seed, "rows")
    assert whole.shape == rows.shape == W.shape
    assert sorted(whole.flatten().tolist()) == sorted(W.flatten().tolist())
    for before, after in zip(W.tolist(), rows.tolist(), strict=True):
        assert sorted(before) == sorted(after)
    assert torch.equal(permuted(W, seed), whole)  # the same seed, the same order
    assert torch.equal(W, torch.arange(shape[0] * shape[1]).reshape(shape).to(torch.bfloat16))  # W is left alone


def test_permuting_destroys_a_rank_one_matrix_and_other_seeds_differ() -> None:
    W = torch.outer(torch.arange(1.0, 41.0), torch.arange(1.0, 61.0))
    s = torch.linalg.svdvals(permuted(W, 0))
    assert s[1] > 0.05 * s[0]
    assert not torch.equal(permuted(W, 0), permuted(W, 1))


# --- the order: a slow reference in Python's own integers -------------------------------------------------------------


CPU = HOST.torch_device


def split_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def source(place: int, seed: int, a: int, b: int) -> int:
    row, column = divmod(place, b)
    for step in range(FEISTEL_ROUNDS):
        key = split_mix((split_mix(seed) + step) % 2**64)
        if step % 2 == 0:
            row = (row + ((split_mix(key ^ column) >> 32) * a >> 32)) % a
        else:
            column = (column + ((split_mix(key ^ row) >> 32) * b >> 32)) % b
    return row * b + column


def order(count: int, seed: int, device: torch.device = CPU) -> np.ndarray:
    return torch.cat([sources for _, sources in places(count, seed, device)]).cpu().numpy()


def test_split_mix_is_the_published_one() -> None:
    """The first outputs of the authors' own program for the seed 1234567, as the Rosetta Code page lists them."""
    gamma, found = 0x9E3779B97F4A7C15, []
    for i in range(3):
        found.append(split_mix((1234567 + i * gamma) % 2**64))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 96, 12 * 35, 31 * 37, 4096])
@pytest.mark.parametrize("seed", [0, 1, 12345678901234567890])
def test_the_order_is_the_reference_s_and_a_bijection(device: Device, count: int, seed: int) -> None:
    a, b = grid(count)
    assert a * b == count and a <= b
    found = order(count, seed, device.torch_device)
    assert found.tolist() == [source(place, seed, a, b) for place in range(count)]
    assert sorted(found.tolist()) == list(range(count))


def test_the_order_does_not_depend_on_how_much_of_it_is_worked_out_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, W = order(4096, 3), torch.arange(4096).view(32, 128)
    by_row = permuted(W, 3, "rows")
    # A size: real pieces need matrices of thousands of columns.
    monkeypatch.setattr(permutation, "GRID_PLACES", {"cpu": 100})
    assert np.array_equal(order(4096, 3), whole) and torch.equal(permuted(W, 3, "rows"), by_row)


def test_in_each_row_the_order_is_the_reference_s() -> None:
    m, n, seed = 5, 37, 2
    (_, found), key = next(columns_by_row(m, n, seed)), split_mix((split_mix(seed) + FEISTEL_ROUNDS) % 2**64)
    for row in range(m):
        words = [split_mix(key ^ split_mix(row) ^ column) for column in range(n)]
        assert found[row].tolist() == sorted(range(n), key=lambda i, words=words: (words[i] >> 6, i))


def test_a_permutation_is_in_the_dtype_of_the_matrix_and_where_it_is(device: Device) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
        for kind in ("entries", "rows"):
            here, there = permuted(W, 4, kind), permuted(W.to(device.torch_device), 4, kind)
            assert there.device == device.torch_device and there.dtype == dtype
            assert torch.equal(here, there.cpu())
            assert torch.equal(permuted(W.T, 4, kind), permuted(W.T.contiguous(), 4, kind))


def level(statistic: float, freedom: int) -> float:
    return float(chi2.sf(statistic, freedom))


@pytest.mark.parametrize("shape", [(64, 64), (8, 512), (96, 35)])
def test_every_entry_comes_to_every_place_as_often_and_neighbours_part(shape: tuple[int, int]) -> None:
    count, draws, cells = shape[0] * shape[1], 400, 16
    tables, adjacent, repeats, b = np.zeros((cells, cells)), [], [], grid(count)[1]
    for seed in range(draws):
        found = order(count, seed)
        np.add.at(tables, (np.arange(count) * cells // count, found.astype(np.int64) * cells // count), 1)
        adjacent.append(float(np.corrcoef(found[:-1], found[1:])[0, 1]))
        # How many pairs of neighbours keep their distance: 1 pair in `count`, of a uniform order.
        repeats.append(int(np.count_nonzero(np.diff(found) == 1)) + int(np.count_nonzero(found[b:] - found[:-b] == b)))
    expected = draws * count / cells**2
    # Within a draw the cells of a row or column have fixed sums: (cells - 1)^2 degrees of freedom.
    assert level(float(((tables - expected) ** 2).sum() / expected) * (count - 1) / count, (cells - 1) ** 2) > 1e-3
    # A uniform order correlates with itself moved by one with mean -1/count and variance 1/count.
    z = (np.mean(adjacent) + 1 / count) * math.sqrt(count * draws)
    assert abs(z) < 3.5
    mean = 2 - (1 + b) / count
    assert abs(sum(repeats) - draws * mean) < 3.5 * math.sqrt(draws * mean)


def structures(m: int, n: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    rows, columns = np.arange(m)[:, None], np.arange(n)
    blocks = (rows < m // 2) & (columns < n // 2)
    return {
        "rank one": np.outer(random.standard_normal(m), random.standard_normal(n)),
        "sorted": np.sort(random.standard_normal(m * n)).reshape(m, n),
        "stripe": np.broadcast_to(columns < n // 8, (m, n)) - 1 / 8,
        "block": blocks - blocks.mean(),
        "chequers": (rows + columns) % 2 - 0.5,
        "heavy": random.standard_t(3, (m, n)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (8, 512), (31, 37)])
def test_the_null_is_that_of_numpy_s_shuffle(shape: tuple[int, int]) -> None:
    """Same law of the largest singular value, whatever structure was there: so records of either mean the same."""
    random, draws = np.random.default_rng(0), 150
    for name, W in structures(*shape, random).items():
        shuffled = [np.linalg.norm(random.permutation(W.reshape(-1)).reshape(shape), 2) for _ in range(draws)]
        tensor = torch.from_numpy(np.ascontiguousarray(W, dtype=np.float64))
        now = [np.linalg.norm(permuted(tensor, seed).numpy(), 2) for seed in range(draws)]
        error = math.sqrt((np.var(now) + np.var(shuffled)) / draws)
        assert abs(np.mean(now) - np.mean(shuffled)) < 3.5 * error, name
        _, chance = ks_2samp(now, shuffled)
        assert chance > 1e-3, name  # pyright: ignore[reportOperatorIssue]


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_unknown_permutation_is_answered_with_the_list() -> None:
    with pytest.raises(UsageError, match="entries, rows"):
        permuted(torch.ones(2, 2), 0, "columns")


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (16, 16), (17, 17), (40, 90), (200, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_value_is_that_of_a_full_decomposition(
    device: Device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    full = float(torch.linalg.svdvals(W.double())[0])
    assert largest_singular_value(W, device) == pytest.approx(full, rel=1e-4)
    assert largest_singular_value(W.T, device) == pytest.approx(full, rel=1e-4)
    assert largest_singular_value(torch.zeros(shape), device) == 0.0


@pytest.mark.parametrize(("alpha", "draws"), [(0.05, 19), (0.1, 9), (0.5, 1), (0.01, 99), (0.3, 3)])
def test_fewest_draws(alpha: float, draws: int) -> None:
    assert fewest_draws(alpha) == draws


def test_threshold_is_the_order_statistic_that_the_level_names() -> None:
    null = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 9.0, 8.0, 7.0])  # 9 draws: the level is k / 10
    s = np.array([8.5, 7.5, 1.0])
    for alpha, threshold in ((0.1, 9.0), (0.2, 8.0), (0.29, 8.0), (0.5, 5.0)):
        assert apply_rule(f"parallel:{alpha}", s, (3, 5), null).threshold == threshold
    assert apply_rule("parallel:0.2", s, (3, 5), null).rank == 1
    assert apply_rule("parallel:0.2", np.zeros(3), (3, 5), null).rank == 0


@pytest.mark.parametrize("null", [None, np.ones(5)])
def test_too_few_permutations_name_the_scan_that_is_needed(null: np.ndarray | None) -> None:
    with pytest.raises(UsageError, match="laser scan --null 19"):
        apply_rule("parallel", np.ones(3), (3, 3), null)


@pytest.mark.slow
@pytest.mark.parametrize("entries", ["gaussian", "student"])
def test_noise_of_any_law_is_found_at_most_as_often_as_the_level_says(device: Device, entries: str) -> None:
    random, found, trials = np.random.default_rng(3), 0, 60
    for _ in range(trials):
        W = random.standard_normal((24, 40)) if entries == "gaussian" else random.standard_t(3, (24, 40))
        tensor = torch.from_numpy(W)
        s = torch.linalg.svdvals(tensor).numpy()
        found += apply_rule("parallel:0.2", s, (24, 40), null_largest(tensor, 4, device)).rank > 0
    assert 0 < found / trials < 0.41  # 0.2 within four binomial errors of 0.052


def test_signal_is_found_and_scaling_scales(device: Device) -> None:
    random = np.random.default_rng(2)
    W = torch.from_numpy(random.standard_normal((30, 50)))
    W[:, 0] += 20 * torch.from_numpy(random.standard_normal(30)) / 30**0.5
    s, null = torch.linalg.svdvals(W).numpy(), null_largest(W, 19, device)
    cut = apply_rule("parallel", s, (30, 50), null)
    assert cut.rank == 1
    again = apply_rule("parallel", 8 * s, (50, 30), null_largest(8 * W.T, 19, device))
    assert again.rank == 1
    # Transposed, the same seeds give other permutations: the same law, another sample.
    assert again.threshold == pytest.approx(8 * (cut.threshold or 0), rel=0.1)
