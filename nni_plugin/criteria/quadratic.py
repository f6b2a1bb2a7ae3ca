"""The loss as a quadratic function of all gates, from the gradients of single samples: order of removal, compensation.

Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993 (diagonal: LeCun et al.,
1990), on the joint channel gates of a network instead of its weights. With the gates' per-sample gradients as rows
of `G` (`N x M`), the empirical Fisher is `F = G^T G / N`, and `H = F + damping * mean(diag F) * I`. With `d = z - 1`:

- removing gate `m` where the others are free to move costs `z_m^2 / (2 [H^-1]_mm)` and moves them by
  `-[H^-1]_:m z_m / [H^-1]_mm`; then `H^-1` of what remains is a rank-one downdate away (:func:`removal_order`);
- for a given set of removed gates the best values of the others have a closed form, whatever the order:
  `d_K = H_KK^-1 H_KR 1` (:class:`Compensation`).

Work and memory. `H^-1` is held as a matrix up to `DENSE` gates (`8 M^2` bytes, 134 MB at 4,096). Above, the
matrix inversion lemma writes it through `N x N` systems: beside the gradients two arrays of `N x M` floats (at 2,000
samples 180 MB for 11,392 gates, 1.04 GB for 65,000; doubles where the damping is too small for floats), and the order
takes about `N M^2` multiplications in all. Gates go in chunks: within a chunk removals see each other exactly among a
pool of candidates; the rest is updated after each chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

DENSE = 4096
"""Most gates for which the inverse is held as a matrix."""

POOL = 4
"""Candidates looked at for each gate that goes in a chunk."""

MOST = 200
"""Gates in a chunk: all others feel them only once it is full."""

PART = 1024
"""Gates that are looked at, or brought up to date, at a time: what that needs stays in the cache."""

SINGLE = 1e-3
"""Least damping for which the inverse above `DENSE` gates is held in single precision."""


def damped(gradients: Tensor, damping: float) -> float:
    """Return what is added to the diagonal of the Fisher matrix: `damping` times the mean of its diagonal.

    Gates without any gradient (removed before) do not count, so that it is the same whether they are still there.
    """
    alive, squares = 0, 0.0
    for _, part in _parts(gradients):
        alive += int((part != 0).any(0).sum())
        squares += float(part.square().sum())
    return max(damping * squares / (len(gradients) * max(alive, 1)), 1e-30)


def removal_order(
    gradients: Tensor,
    damping: float = 0.1,
    costs: Tensor | None = None,
    *,
    sizes: Tensor | None = None,
    chunk: int | None = None,
    holds: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Rank gates by greedy removal with compensation: next goes the one that costs least loss (per unit of cost).

    Args:
        gradients: Gate gradients of single samples, shape `[N, M]`.
        damping: Added to the diagonal, in units of its mean.
        costs: What removing each gate saves, positive, shape `[M]`; None: all the same.
        sizes: How many gates that leave together each column stands for, the sum of theirs; each of them is damped.
            None: one.
        chunk: Gates removed between two exact updates of all others; None: 1 up to 512 gates, then
            1/100 of them, at most `MOST`.
        holds: By the number of a gate on something that holds others (a block) those others: once it is closed they
            have nothing more to say, and they are held where they are. It is taken alone, not in a chunk.

    Returns:
        Gates in the order of their removal, int64, shape `[M]`, or fewer: those that another one has taken along are
        left out.
    """
    gates = gradients.shape[1]
    if gates == 0:
        return torch.empty(0, dtype=torch.int64)
    chunk = chunk or (min(gates // 100, MOST) if gates > 512 else 1)
    # A gate on k tied ones has k times their damping: in units in which it is sqrt(k), it has theirs.
    value = torch.ones(gates, dtype=torch.float64) if sizes is None else sizes.double().sqrt()
    if bool((value != 1).any()):
        gradients = gradients / value.to(gradients)
    inverse = _inverse(gradients, damping)
    cost = torch.ones(gates, dtype=torch.float64) if costs is None else costs.double()
    alive = torch.arange(gates)
    order: list[Tensor] = []
    holder = torch.zeros(gates, dtype=torch.bool)
    holder[list(holds or ())] = True
    while len(alive):
        price = 0.5 * value.square() / inverse.diagonal() / cost[alive]
        first, count = int(price.argmin()), min(chunk, len(alive))
        if holder[alive[first]]:
            gone = torch.tensor([first])
        else:
            before_holders = price.masked_fill(holder[alive], torch.inf)
            number = min(POOL * count, int(before_holders.isfinite().sum()))
            pool = torch.topk(before_holders, number, largest=False).indices
            gone = pool[_greedy(inverse.block(pool), value[pool], cost[alive][pool], min(count, number))]
        order.append(alive[gone])
        value = value - inverse.times(gone, torch.linalg.solve(inverse.block(gone), value[gone]))
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[gone] = False
        inverse.remove(gone, stays)
        value, alive = value[stays], alive[stays]
        if holds and bool(holder[order[-1]].any()):
            held = torch.isin(alive, holds[int(order[-1])])
            inverse.remove(held.nonzero().flatten(), ~held)
            value, alive = value[~held], alive[~held]
    return torch.cat(order)


class Compensation:
    """The gates' best values once some are zero, for any damping: sums over gates or samples are made once.

    Args:
        gradients: Gate gradients of single samples, shape `[N, M]`.
        removed: Which gates are zero: bool, shape `[M]`.
        movable: Which of the others may move; None: all.
        linear: Let the mean gradient pull too (a damped Newton step), instead of taking the network as trained.
    """

    def __init__(
        self, gradients: Tensor, removed: Tensor, *, movable: Tensor | None = None, linear: bool = False
    ) -> None:
        self.gradients, self.removed = gradients, removed
        self.free = ~removed if movable is None else movable & ~removed
        self._unit = damped(gradients, 1.0)
        samples = len(gradients)
        self._target = gradients.new_zeros(samples, dtype=torch.float64)
        for _, part in _parts(gradients, removed):
            self._target += part.sum(1)
        if linear:
            self._target -= 1.0
        self._few = int(self.free.sum()) <= samples
        if self._few:
            kept = gradients[:, self.free].double()
            self._system, self._right = kept.T @ kept / samples, kept.T @ self._target / samples
        else:
            self._system = self._target.new_zeros(samples, samples)
            for _, part in _parts(gradients, self.free):
                self._system.addmm_(part, part.T)

    def __call__(self, damping: float = 0.1) -> Tensor:
        """Return the values.

        Args:
            damping: Added to the diagonal of the Fisher matrix, in units of its mean.

        Returns:
            `z`, float64, shape `[M]`: zero where removed, one where it may not move.
        """
        ridge, z = damping * self._unit, (~self.removed).double()
        system = self._system.clone()
        system.diagonal().add_(ridge if self._few else len(self.gradients) * ridge)
        if self._few:
            z[self.free] += torch.linalg.solve(system, self._right)
        else:
            solved = torch.linalg.solve(system, self._target)
            for at, part in _parts(self.gradients, self.free):
                z[at] += part.T @ solved
        return z


def loss_change(gradients: Tensor, z: Tensor, *, linear: bool = False) -> float:
    """Return the quadratic model's loss change when the gates go from 1 to `z`: `1/2 d F d` (`+ g d` when linear)."""
    along, d = gradients.new_zeros(len(gradients), dtype=torch.float64), z.double() - 1
    for at, part in _parts(gradients, d != 0):
        along += part @ d[at]
    return float(0.5 * along.square().mean() + (along.mean() if linear else 0.0))


def _parts(gradients: Tensor, columns: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through the gates (those that a mask names), some at a time: where they are, and their rows in float64."""
    at = torch.arange(gradients.shape[1]) if columns is None else columns.nonzero().flatten()
    for some in at.split(PART):
        yield some, gradients[:, some].double()


def _greedy(block: Tensor, value: Tensor, cost: Tensor, count: int) -> Tensor:
    """Choose `count` gates of a pool one by one, each removal felt by the others of the pool.

    A Cholesky factorisation that pivots on what costs least: of the block without the gates chosen so far, the diagonal
    alone is kept, and a column is worked out when its gate goes.
    """
    least = 1e-12 * float(block.diagonal().max())  # rounding must not lead below zero
    diagonal, value = block.diagonal().clamp_min(least), value.clone()
    columns = block.new_empty(count, len(value))
    chosen: list[int] = []
    for k in range(count):
        loss = 0.5 * value.square() / diagonal / cost
        loss[chosen] = torch.inf
        m = int(loss.argmin())
        chosen.append(m)
        columns[k] = (block[m] - columns[:k, m] @ columns[:k]) / diagonal[m].sqrt()
        value -= columns[k] * (value[m] / diagonal[m].sqrt())
        diagonal = (diagonal - columns[k].square()).clamp_min(least)
    return torch.tensor(chosen)


class _Inverse(ABC):
    """`H^-1` of the gates that are alive, by their present positions; float64 results."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return `[alive]`."""

    @abstractmethod
    def times(self, at: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of the columns at `at`, weighted: `[alive]`."""

    @abstractmethod
    def block(self, at: Tensor) -> Tensor:
        """Return `[len(at), len(at)]`."""

    @abstractmethod
    def remove(self, gone: Tensor, stays: Tensor) -> None:
        """Go to the inverse over the gates that stay."""


class _Matrix(_Inverse):
    """The inverse itself."""

    def __init__(self, gradients: Tensor, ridge: float) -> None:
        gradients = gradients.double()
        fisher = gradients.T @ gradients / len(gradients)
        fisher.diagonal().add_(ridge)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))

    def diagonal(self) -> Tensor:
        return self.inverse.diagonal()

    def times(self, at: Tensor, weights: Tensor) -> Tensor:
        return self.inverse[:, at] @ weights

    def block(self, at: Tensor) -> Tensor:
        return self.inverse[at][:, at]

    def remove(self, gone: Tensor, stays: Tensor) -> None:
        rows = self.inverse[gone][:, stays]
        self.inverse = self.inverse[stays][:, stays] - rows.T @ torch.linalg.solve(self.block(gone), rows)


class _LowRank(_Inverse):
    """`H^-1 = (I - G^T B) / ridge` with `B = (N ridge I + G G^T)^-1 G`, over the columns that are alive.

    Both are held transposed, a gate a row: what is taken out, and summed over samples, then lies together in memory.
    """

    def __init__(self, gradients: Tensor, ridge: float, dtype: torch.dtype) -> None:
        samples = len(gradients)
        system = gradients.new_zeros(samples, samples, dtype=torch.float64)
        for _, part in _parts(gradients):
            system.addmm_(part, part.T)
        system.diagonal().add_(samples * ridge)
        factor = torch.linalg.cholesky(system)
        self.ridge = ridge
        self.rows = gradients.new_empty(gradients.shape[::-1], dtype=dtype)
        self.solved = torch.empty_like(self.rows)
        self._dots = gradients.new_empty(len(self.rows), dtype=torch.float64)  # of each gate's two rows
        for at, part in _parts(gradients):
            self.rows[at] = part.T.to(dtype)
            self.solved[at] = torch.cholesky_solve(part, factor).T.to(dtype)
            self._dots[at] = torch.linalg.vecdot(self.rows[at], self.solved[at]).double()

    def diagonal(self) -> Tensor:
        return ((1 - self._dots) / self.ridge).clamp_min(1e-12 / self.ridge)

    def times(self, at: Tensor, weights: Tensor) -> Tensor:
        product = -(self.rows @ (self.solved[at].T.double() @ weights).to(self.rows)).double()
        product[at] += weights
        return product / self.ridge

    def block(self, at: Tensor) -> Tensor:
        product = self.rows[at].double() @ self.solved[at].double().T
        product = 0.5 * (product + product.T)
        return (torch.eye(len(at), dtype=torch.float64) - product) / self.ridge

    def remove(self, gone: Tensor, stays: Tensor) -> None:
        core = torch.linalg.inv(self.block(gone) * self.ridge).to(self.rows)
        rows, pushed = self.rows[gone], core @ self.solved[gone]
        # Part by part, in place: what stays moves to the front, and nothing large is allocated.
        for done, part in enumerate(stays.nonzero().flatten().split(PART)):
            to = slice(done * PART, done * PART + len(part))
            self.rows[to] = self.rows[part]
            self.solved[to] = torch.addmm(solved := self.solved[part], solved @ rows.T, pushed)
            self._dots[to] = torch.linalg.vecdot(self.rows[to], self.solved[to]).double()
        left = int(stays.sum())
        self.rows, self.solved, self._dots = self.rows[:left], self.solved[:left], self._dots[:left]


def _inverse(gradients: Tensor, damping: float) -> _Inverse:
    ridge = damped(gradients, damping)
    if gradients.shape[1] <= DENSE:
        return _Matrix(gradients, ridge)
    return _LowRank(gradients, ridge, torch.float32 if damping >= SINGLE else torch.float64)
