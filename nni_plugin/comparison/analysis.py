"""What rows say: means and deviations, paired differences to the best built-in method, fronts, and losses.

Differences are paired by seed: both methods started from the same dense network. Of the built-in methods each of ours
is held against the one that leaves it the least ahead, on the seeds that both have. Where several of ours are compared
at a target their intervals are wider, so that all of them hold together (Bonferroni).
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
        against: The built-in one that is the least behind, or the most ahead.
        difference: Of top-1 after fine-tuning, in points; positive where ours is ahead.
        interval: Confidence interval of the mean difference by Student's t, 95 % for all of ours at the target
            together; None of a single seed, or of seeds that all differ by the same.
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
            return "one seed" if self.difference.count == 1 else "no spread"
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
    """Return the built-in method with the highest mean top-1 at a target; None where none reached it."""
    return next((p.method for p in points(rows) if p.target == target and is_built_in(p.method)), None)


def differences(rows: Sequence[Row]) -> list[Difference]:
    """Return our methods against built-in ones, each against the hardest to beat, at each target."""
    found = []
    for target in dict.fromkeys(row.target for row in rows):
        by_method: dict[str, dict[int, float]] = {}
        for row in rows:
            if row.target == target:
                by_method.setdefault(row.method, {})[row.seed] = row.top1
        ours = [method for method in by_method if not is_built_in(method)]
        for method in ours:
            own = by_method[method]
            paired = {
                # Counts of images over their number: what is below a billionth of a point is rounding.
                other: [round(own[seed] - top1, 9) for seed, top1 in of_other.items() if seed in own]
                for other, of_other in by_method.items()
                if is_built_in(other) and own.keys() & of_other.keys()
            }
            if paired:
                hardest = min(paired, key=lambda other: statistics.fmean(paired[other]))
                values = paired[hardest]
                found.append(Difference(target, method, hardest, Mean.of(values), interval(values, len(ours))))
    return found


def interval(values: Sequence[float], together: int = 1) -> tuple[float, float] | None:
    """Return the confidence interval of a mean by Student's t; None of fewer than two values, or of equal ones.

    Args:
        values: A sample.
        together: Number of intervals that shall hold together with 95 %.

    Example:
        >>> low, high = interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), float(stats.sem(values))
    if error == 0:
        return None
    low, high = stats.t.interval(1 - (1 - CONFIDENCE) / together, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)


def best_of_ours(rows: Sequence[Row]) -> dict[str, Difference]:
    """Return, by target, the one of our methods that is the furthest ahead, or the least behind.

    Of those with the most seeds: a lucky one must not stand before what is known better.
    """

    def rank(difference: Difference) -> tuple[int, float]:
        return difference.difference.count, difference.difference.mean

    found: dict[str, Difference] = {}
    for difference in differences(rows):
        before = found.get(difference.target)
        if before is None or rank(difference) > rank(before):
            found[difference.target] = difference
    return found


def losses(rows: Sequence[Row]) -> list[str]:
    """Say at which targets our best method is not known to be ahead; empty where it is at all of them."""
    found, best = [], best_of_ours(rows)
    for target in dict.fromkeys(row.target for row in rows):
        methods = dict.fromkeys(row.method for row in rows if row.target == target)
        there = f"{target}: "
        if target in best:
            found += [there + text for text in _loss(best[target])]
        elif all(is_built_in(method) for method in methods):
            found.append(f"{there}no result of ours; there is one of {', '.join(methods)}.")
        else:
            found.append(f"{there}no result of a built-in method with a seed of ours: nothing to compare with.")
    return found


def _loss(best: Difference) -> list[str]:
    mean, ours, against = round(best.difference.mean, 9), best.method, best.against
    if mean < 0:
        return [f"{against} is ahead of our best, {ours}, by {-mean:.2f} points ({best.verdict})."]
    if mean == 0:
        return [f"{ours} and {against} are level."]
    ahead = f"{ours} has {mean:.2f} points more than {against}"
    if best.interval is None:
        return [f"{ahead}, on {best.verdict.replace('no spread', 'seeds without spread')}: more is not known."]
    if best.verdict == "ahead":
        return []
    low, high = best.interval
    return [
        f"{ahead}, which these {best.difference.count} seeds do not tell apart (interval {low:+.2f} to {high:+.2f})."
    ]


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
