"""The adapter behind a merge: X of rank r with merge(W, X) = q, from the stored bits of base W and tuned q.

Every stored q_ij confines X_ij to an interval (formulas.py). X is sought in all m n of them at once, among matrices of
rank r: r (m + n) unknowns against m n intervals, so where r is the rank of the adapter hardly anything else fits. With
G the way from X into the intervals, entry by entry, and T the directions in which a matrix of rank r can move at X,

    X  <-  the nearest matrix of rank r to X + L P_T(G),    L = ||G||^2 / ||P_T(G)||^2

L is the extrapolated step of parallel projections (Pierra 1984; Combettes 1997). Near the end few entries are still
outside, and P_T(G) is short for their sake: L is 20 to 300 then, and a plain alternating projection has L = 1. The set
of low rank is not convex, so nothing is promised, and nothing has to be: the bits are compared with those stored.

What meets all intervals is a region, and the iteration stops at its edge. BA is as likely anywhere inside, so the
region's mean is the best guess. Of an interval only an end within the uncertainty t of X_ij says anything: that of X_ij
by all other entries. With d the distances to the ends of all intervals, `polish` descends

    sum rho(d / t),    rho'(x) = -exp(-x^2 / 2) / x

a logarithmic barrier that reaches as far as t. It is within 0.5 % of the loss that is optimal for errors as even as
these (Bean, Bickel, El Karoui and Yu 2013). The leverages of a fit sum to its unknowns, which gives t: the mean of
k t^2 / (1 + k t^2) is unknowns / entries, with k_ij the barrier's bend at X_ij. The rows of B go one by one while A is
held, then the columns of A: each by a Newton step of r unknowns, lengthened, and shortened where it would leave an
interval.

Products of two numbers of float32 are exact in float64, and `rows` adds those of the r directions one after the other,
entry by entry: the same X on every device, and so does `merge`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from laser.choices import ROUNDS
from laser.differences.formats import format_of, same_bits
from laser.differences.formulas import Formula
from laser.differences.whitening import biwhiten
from laser.spectral.devices import HOST, Device, full_precision, in_float64

CHECK = 10  # steps between two looks at the bits
# Of an interval's width, what is kept from its ends, times the unknowns per interval. A sequence that nears an interval
# from outside would else never be inside. And the fewer the unknowns, the nearer to some ends the only solution lies.
INSIDE, LARGEST_MARGIN = 0.14, 2**-6
# First so much more that hardly all intervals can be met: that leads to the middle of what is possible, nearer to BA.
# Steps are kept short there, for where nothing meets all, L has no sense.
WIDE, WIDE_STEPS, WIDE_L = (8.0, 4.0, 2.0), 20, 16.0
MARGINS = (1.0, 1 / 4, 1 / 16)  # then smaller ones, where the bits stay wrong
STALLED = 3  # looks without notably fewer wrong bits, after which a smaller margin is tried
NOTABLY = 0.95
HOPELESS = 0.03  # share of wrong bits at the first margin, over which no smaller one has been seen to help
POLISH_SWEEPS = 8  # of polishing, over B and A each; with 100 the error is 1 to 2 % of itself less
LENGTHENED = 1.6  # Newton's step: B and A pull at each other, as in successive over-relaxation
POLISHED = 2e-3  # share of wrong bits up to which there is a region to be in the middle of
MAY_LOSE = 4  # entries that the last try may lose, to the remainder
NEAR_END = 1 - 1e-4  # of u: what is outside is pulled in as if it were this near to its end
SHORTEST = 1e-6  # of the usual interval, and taken to be so long: one of a stored zero is 1e-40, which has no inverse
OF_STEP = 0.5  # at the most, of the way to the nearest end: of the smallest intervals the middle is needed
POLISH_TRIES = 3  # a bit of an interval as small as the factors' last digits comes and goes from sweep to sweep
BATCH = 1 << 22  # entries of a batch of rows, each with a copy of the held factor
ENTRIES = 1 << 20  # that are worked on at a time
IN_CACHE = 1 << 16  # entries in float64 that stay there from direction to direction


@dataclass(frozen=True)
class Adapter:
    """X = B A: B (m, r) and A (r, n), float32 or less, on the host."""

    B: torch.Tensor
    A: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.A)

    def stored_as(self, dtype: torch.dtype) -> Adapter:
        return Adapter(self.B.to(dtype), self.A.to(dtype))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of X, (stop - start, n), float64, the sum in one order: bits depend on no library and no block."""
        B, A = self.B[start:stop].double(), self.A.double()
        X = B.new_zeros(len(B), A.shape[1])
        size = max(1, IN_CACHE // max(A.shape[1], 1))
        for a in range(0, len(B), size):
            for b, direction in zip(B[a : a + size].T, A, strict=True):
                X[a : a + size].add_(b[:, None] * direction)
        return X


@dataclass(frozen=True)
class Solution:
    """An adapter and what it is worth. wrong: entries that it does not explain; rounds: of projections."""

    adapter: Adapter
    formula: Formula
    wrong: int
    rounds: int
    entries: int

    @property
    def share_wrong(self) -> float:
        return self.wrong / self.entries


def count_wrong(W: torch.Tensor, q: torch.Tensor, adapter: Adapter, formula: Formula) -> int:
    """How many entries of q (m, n) the formula cannot make from W."""
    return sum(
        int((~formula.explains(W[a:b], adapter.rows(a, b), q[a:b])).sum()) for a, b in _blocks(q.shape[0], q.shape[1])
    )


def wrong_bits(W: torch.Tensor, q: torch.Tensor, adapter: Adapter, formula: Formula) -> torch.Tensor:
    """Positions (row-major, int64, rising) of the entries of q (m, n) that the formula does not give from W.

    On the host, exactly as `rebuilt` computes them.
    """
    n, found = q.shape[1], []
    for start, stop in _blocks(*q.shape):
        made = formula.merge(W[start:stop], adapter.rows(start, stop), q.dtype)
        found.append(torch.nonzero(~same_bits(made, q[start:stop]).reshape(-1)).reshape(-1) + start * n)
    return torch.cat(found)


def solve(
    W: torch.Tensor, q: torch.Tensor, rank: int, formula: Formula, device: Device = HOST, rounds: int = ROUNDS
) -> Solution:
    """The adapter of this rank that makes most of the stored q (m, n) from W (m, n), as far as `rounds` get.

    W and q are finite, on the host. In memory on the device: two bounds, one matrix, and W and q themselves.
    """
    with full_precision():
        device = in_float64(device)
        work = _State(W.to(device.torch_device), q.to(device.torch_device), rank, formula)
        done = work.run(rounds)
    return _solution(work, W, q, formula, done)


def polish(W: torch.Tensor, q: torch.Tensor, found: Solution, device: Device = HOST) -> Solution:
    """A solution in the middle of what gives the bits, or `found` where all tries give more than a few wrong ones.

    A few of the smallest intervals are no reason to stay at the edge of all others: there the error is a third higher.

    Only where nearly all bits are right, and not of float32, where few intervals are wider than the errors of A and B.
    """
    if found.share_wrong > POLISHED or q.dtype == torch.float32 or not found.adapter.B.any():
        return found
    with full_precision():
        device = in_float64(device)
        W_, q_ = (x.to(device.torch_device) for x in (W, q))
        work = _State(W_, q_, found.adapter.rank, found.formula, found.adapter)
        for more in (0,) * (POLISH_TRIES - 1) + (MAY_LOSE,):
            work.to_the_middle()
            polished = _solution(work, W, q, found.formula, found.rounds)
            if polished.wrong <= found.wrong + more:
                return polished
    return found


def _solution(work: _State, W: torch.Tensor, q: torch.Tensor, formula: Formula, done: int) -> Solution:
    B, A = (factor.float().cpu().contiguous() for factor in work.factors())
    adapter = Adapter(B, A)
    return Solution(adapter, formula, count_wrong(W, q, adapter, formula), done, q.numel())


def _blocks(m: int, n: int) -> list[tuple[int, int]]:
    size = max(1, ENTRIES // max(n, 1))
    return [(start, min(start + size, m)) for start in range(0, m, size)]


class _State:
    """The iteration's state: X = U M^T, U (m, r) and V (n, r) orthonormal, M (n, r) = V S for some S (r, r)."""

    def __init__(
        self, W: torch.Tensor, q: torch.Tensor, rank: int, formula: Formula, start: Adapter | None = None
    ) -> None:
        self.W, self.q, self.formula = W, q, formula
        m, n = q.shape
        self.blocks = _blocks(m, n)
        # In the precision in which a sum is rounded: the cells of 16 bits are wide for float32.
        dtype = format_of(q.dtype).wide
        self.low, self.high = (torch.empty(m, n, dtype=dtype, device=q.device) for _ in range(2))
        if start is None:
            self.U, self.M = first_guess(formula.start(W, q.dtype), q, rank, dtype)
        else:
            self.U, R = torch.linalg.qr(start.B.to(self.low))
            self.M = start.A.to(self.low).T @ R.T
        self.V = torch.linalg.qr(self.M)[0]
        self.unknowns = rank * (m + n - rank)

    def keep_from_ends(self, margin: float) -> None:
        """The intervals, less this share of them at either end."""
        for a, b in self.blocks:
            low, high = self.formula.cell(self.W[a:b], self.q[a:b])
            width = margin * (high - low)
            self.low[a:b], self.high[a:b] = low + width, high - width

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B (m, r) and A (r, n), of equal norms, direction by direction."""
        U, s, Vh = torch.linalg.svd(self.M.double().T, full_matrices=False)
        root = s.sqrt()
        return (self.U.double() @ U) * root, root[:, None] * Vh

    def run(self, rounds: int) -> int:
        """Steps until all bits are right, or they get no better. Keeps the best X; returns the number of steps."""
        best, kept, done = self.wrong(), (self.U, self.M), 0
        usual = min(INSIDE * self.unknowns / self.q.numel(), LARGEST_MARGIN)
        for times in WIDE if best else ():
            self.keep_from_ends(times * usual)
            for _ in range(min(WIDE_STEPS, rounds - done)):
                done += 1
                if not self.step(WIDE_L):
                    break
        for times in MARGINS:
            if not best or done >= rounds or (times < MARGINS[0] and best > HOPELESS * self.q.numel()):
                break
            self.keep_from_ends(times * usual)
            looks, moved = 0, True
            while best and moved and done < rounds and looks < STALLED:
                moved = self.step()
                done += 1
                if done % CHECK == 0 or not moved:
                    wrong = self.wrong()
                    looks = 0 if wrong < NOTABLY * best else looks + 1
                    if wrong < best:
                        best, kept = wrong, (self.U, self.M)
        self.U, self.M = kept
        self.V = torch.linalg.qr(self.M)[0]
        return done

    def to_the_middle(self) -> None:
        """Polishes: L (m, r) and R (n, r), balanced, with X = L R^T."""
        self.keep_from_ends(0.0)
        B, A = self.factors()
        L, R = B.to(self.low), A.T.to(self.low)
        middle, half = self.low.add(self.high).div_(2), self.high.sub_(self.low).div_(2)
        half.clamp_(min=SHORTEST * float(half.median()))
        told, reach = self.unknowns / self.q.numel(), float(half.median())
        for _ in range(POLISH_SWEEPS):
            L, _ = _nearer(L, R, middle, half, reach)
            R, leverage = _nearer(R, L, middle.T, half.T, reach)
            reach *= min(max(told / leverage, 1 / 2), 2.0) if leverage else 2.0
        self.U, inner = torch.linalg.qr(L)
        self.M = R @ inner.T

    def step(self, most: float = math.inf) -> bool:
        """One step of the iteration, L at most `most`; False where X lies in all intervals, or cannot come nearer."""
        U, V, r = self.U, self.V, self.V.shape[1]
        GV, GU = torch.empty_like(U), torch.zeros_like(V)
        squares = torch.zeros((), dtype=torch.float64, device=U.device)
        for a, b in self.blocks:
            X = U[a:b] @ self.M.T
            G = torch.clamp(X, self.low[a:b], self.high[a:b]).sub_(X)
            GV[a:b] = G @ V
            GU.addmm_(G.T, U[a:b])
            squares += torch.linalg.vector_norm(G, dtype=torch.float64) ** 2
        P = GV - U @ (U.T @ GV)  # P_T(G) = U GU^T + P V^T
        reach = float((GU.double() ** 2).sum() + (P.double() ** 2).sum())
        if not reach or not float(squares):
            return False
        L = min(float(squares) / reach, most)
        # X + L P_T(G) = U (M + L GU)^T + L P V^T has rank 2 r; the nearest of rank r by two thin QR and a small SVD.
        left, R = torch.linalg.qr(torch.cat((U, L * P), 1))
        right, S = torch.linalg.qr(torch.cat((self.M + L * GU, V), 1))
        inner, s, outer = torch.linalg.svd(R @ S.T)
        self.U, self.V = left @ inner[:, :r], right @ outer[:r].T
        self.M = self.V * s[:r]
        return True

    def wrong(self) -> int:
        """How many bits X gives wrongly, in the precision of the iteration."""
        count = torch.zeros((), dtype=torch.int64, device=self.q.device)
        for a, b in self.blocks:
            count += (~self.formula.explains(self.W[a:b], self.U[a:b] @ self.M.T, self.q[a:b])).sum()
        return int(count)


def first_guess(W: torch.Tensor, q: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """U (m, r) orthonormal and M (n, r) of the truncated difference, biwhitened while it is truncated.

    By subspace iteration from a seeded start, with as many directions more.
    """
    D = q.double() - W.double()
    scales = biwhiten(format_of(q.dtype).variance(q))
    D = scales.of(D).to(dtype)
    m, n = D.shape
    width = min(2 * rank + 8, m, n)
    seeded = torch.Generator().manual_seed(0)
    V = torch.randn(n, width, generator=seeded, dtype=torch.float64).to(D)
    for _ in range(6):
        V = torch.linalg.qr(D.T @ torch.linalg.qr(D @ V)[0])[0]
    U, s, Vh = torch.linalg.svd(D @ V, full_matrices=False)
    left = U[:, :rank] * s[:rank] / scales.rows.to(dtype)
    right = (V @ Vh.T)[:, :rank] / scales.columns.T.to(dtype)
    Q, R = torch.linalg.qr(left)
    return Q, right @ R.T


def _nearer(
    L: torch.Tensor, R: torch.Tensor, middle: torch.Tensor, half: torch.Tensor, reach: float
) -> tuple[torch.Tensor, float]:
    """L (m, r) with every row one step nearer to the middle of its intervals, given R (n, r); middle, half: (m, n).

    Also the mean leverage of an entry, at the barrier's reach t."""
    made, size = torch.empty_like(L), max(1, BATCH // max(R.numel(), middle.shape[1]))
    leverage = torch.zeros((), dtype=torch.float64, device=L.device)
    for a in range(0, len(L), size):
        X, c, h = L[a : a + size] @ R.T, middle[a : a + size], half[a : a + size]
        u = (X - c) / h
        inside, u = u.abs() < NEAR_END, u.clamp(-NEAR_END, NEAR_END)
        above, under = (1 - u) * (h / reach), (1 + u) * (h / reach)
        one, other = torch.exp(-(above**2) / 2), torch.exp(-(under**2) / 2)
        slope = one / above - other / under
        bend = one * (1 + above**-2) + other * (1 + under**-2)
        leverage += (bend / (1 + bend)).sum()
        H = ((R * bend[:, :, None]).mT @ R).double()
        H.diagonal(dim1=1, dim2=2).mul_(1 + 1e-12)
        step = -LENGTHENED * reach * torch.linalg.solve_ex(H, (slope @ R).double())[0].nan_to_num(0, 0, 0).to(L)
        dX = step @ R.T
        room = torch.where(dX > 0, (c + h - X) / dX, (c - h - X) / dX)
        room = torch.where(inside & (dX != 0), room, math.inf).amin(1)
        made[a : a + size] = L[a : a + size] + (OF_STEP * room).clamp(0, 1)[:, None] * step
    return made, float(leverage) / middle.numel()
