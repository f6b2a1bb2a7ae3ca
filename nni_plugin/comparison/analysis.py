"""What rows say: means and deviations, paired differences to the best built-in method, fronts, and losses.

Differences are paired by seed: both methods started from the same dense network. The best built-in method of a target
is the one with the highest mean over the same seeds, so it is favoured by the choice, and ours are not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scipy import stats

from nni_plugin.adapters.hosts import is_built_in
from nni_plugin.comparison.results import Row

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """Mean over seeds, and standard deviation (0 of a single one)."""

    mean: float
    sd: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """Sum up some values."""
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def __str__(self) -> str:
        """Return both for a person to read."""
        return f"{self.mean:.2f} ± {self.sd:.2f}" if self.count > 1 else f"{self.mean:.2f}"


@dataclass(frozen=True)
class Point:
    """A method at a target, over its seeds.

    Args:
        target: What was asked.
        method: Which.
        seeds: Those that are done.
        top1: After fine-tuning, in percent; and likewise the others, see :class:`~.results.Row`.
    """

    target: str
    method: str
    seeds: tuple[int, ...]
    top1: Mean
    top1_before_finetune: Mean
    macs_ratio: Mean
    params_ratio: Mean
    latency_ratio: Mean
    seconds: Mean


@dataclass(frozen=True)
class Difference:
    """A method against the best built-in one at a target, over the seeds that both have.

    Args:
        target: What was asked.
        method: Ours.
        against: The built-in one with the highest mean.
        difference: Of top-1 after fine-tuning, in points; positive where ours is ahead.
        interval: 95 % confidence interval of the mean difference by Student's t; None of a single seed.
    """

    target: str
    method: str
    against: str
    difference: Mean
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Say in a word or two who is ahead."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        return "ahead" if low > 0 else "behind" if high < 0 else "not told apart"


def points(rows: Sequence[Row]) -> list[Point]:
    """Return every method at every target, targets in their order, methods from the best down."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.target, row.method), []).append(row)

    def mean(of: Sequence[Row], value: Callable[[Row], float]) -> Mean:
        return Mean.of(value(row) for row in of)

    found = [
        Point(
            target,
            method,
            tuple(row.seed for row in of),
            mean(of, lambda row: row.top1),
            mean(of, lambda row: row.top1_before_finetune),
            mean(of, lambda row: row.macs_ratio),
            mean(of, lambda row: row.params_ratio),
            mean(of, lambda row: row.latency_ratio),
            mean(of, lambda row: row.seconds),
        )
        for (target, method), of in groups.items()
    ]
    order = list(dict.fromkeys(row.target for row in rows))
    return sorted(found, key=lambda point: (order.index(point.target), -point.top1.mean))


def best_built_in(rows: Sequence[Row], target: str) -> str | None:
    """Return the built-in method with the highest mean top-1 at a target, among those with the most seeds."""
    built_in = [p for p in points(rows) if p.target == target and is_built_in(p.method)]
    if not built_in:
        return None
    most = max(len(p.seeds) for p in built_in)
    return next(p.method for p in built_in if len(p.seeds) == most)


def differences(rows: Sequence[Row]) -> list[Difference]:
    """Return our methods against the best built-in one, at each target."""
    found = []
    for target in dict.fromkeys(row.target for row in rows):
        against = best_built_in(rows, target)
        if against is None:
            continue
        top1 = {(row.method, row.seed): row.top1 for row in rows if row.target == target}
        for point in points([row for row in rows if row.target == target]):
            seeds = [seed for seed in point.seeds if (against, seed) in top1]
            if is_built_in(point.method) or not seeds:
                continue
            paired = [top1[point.method, seed] - top1[against, seed] for seed in seeds]
            found.append(Difference(target, point.method, against, Mean.of(paired), interval(paired)))
    return found


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of a mean by Student's t; None of fewer than two values.

    Example:
        >>> low, high = interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), float(stats.sem(values))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)


def losses(rows: Sequence[Row]) -> list[str]:
    """Say at which targets our best method is not ahead of the best built-in one; empty where it is everywhere."""
    found = []
    of_target: dict[str, list[Difference]] = {}
    for difference in differences(rows):
        of_target.setdefault(difference.target, []).append(difference)
    for target, those in of_target.items():
        best = max(those, key=lambda difference: difference.difference.mean)
        if best.difference.mean <= 0:
            found.append(
                f"{target}: {best.against} is ahead of our best, {best.method}, by {-best.difference.mean:.2f} points "
                f"({best.verdict})."
            )
        elif best.verdict == "not told apart" and best.interval is not None:
            found.append(
                f"{target}: {best.method} has {best.difference.mean:.2f} points more than {best.against}, which these "
                f"{best.difference.count} seeds do not tell apart (95 % interval {best.interval[0]:.2f} to "
                f"{best.interval[1]:.2f})."
            )
    return found


def front(cost_and_top1: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other one beats in cost and accuracy, by rising cost (Pareto).

    Example:
        >>> front([(0.5, 90.0), (0.6, 89.0), (0.7, 91.0)])
        [0, 2]
    """
    order = sorted(range(len(cost_and_top1)), key=lambda i: (cost_and_top1[i][0], -cost_and_top1[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or cost_and_top1[i][1] > cost_and_top1[kept[-1]][1]:
            kept.append(i)
    return kept
