"""Several networks timed in turns: what :func:`nni_plugin.latency.measure_pair` does for two.

A machine's speed drifts, so a speed-up is the median over short rounds in each of which every network ran; every other
round goes through them backwards. Networks are whatever can be called: a compiled one, a session of another runtime.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.benchmark import timer


@dataclass(frozen=True)
class Timing:
    """Time of one network's pass.

    Attributes:
        median_ms: Median time of a pass, in milliseconds for the whole batch.
        iqr_ms: Distance between the first and third quartile of the same times, in milliseconds.
        speedup: Median over the rounds of (time of the first network / time of this one).
        speedup_iqr: Distance between the quartiles of the same.
        passes: Number of timed passes.
    """

    median_ms: float
    iqr_ms: float
    speedup: float
    speedup_iqr: float
    passes: int


def measure_in_turns(networks: Sequence[Callable[[], object]], *, rounds: int, min_run_time: float) -> list[Timing]:
    """Time passes of several networks in turns, at torch's number of threads.

    Args:
        networks: Each makes one pass when called; called once before the first round to see how long it takes.
        rounds: Number of rounds, at least 3; each times every network once.
        min_run_time: Seconds to time each network, about; longer where one pass a round takes longer.

    Returns:
        One `Timing` a network, in their order.

    Raises:
        ValueError: `rounds` is below 3.
    """
    if rounds < 3:
        raise ValueError(f"measure_in_turns needs at least 3 rounds for a median, got {rounds}.")
    # The clock waits for the accelerator. torch's own Timer makes two passes more at each turn, which may take seconds.
    clocks = [timeit.Timer(network, timer=timer) for network in networks]
    passes = [max(1, round(min_run_time / rounds / clock.timeit(1))) for clock in clocks]
    seconds: list[list[float]] = [[] for _ in clocks]
    for turn in range(rounds):
        # A speed that drifts steadily would otherwise always favour the same ones.
        order = range(len(clocks)) if turn % 2 == 0 else reversed(range(len(clocks)))
        for i in order:
            seconds[i].append(clocks[i].timeit(passes[i]) / passes[i])
    return [_timing(seconds[0], own, number * rounds) for own, number in zip(seconds, passes, strict=True)]


def _timing(first: Sequence[float], own: Sequence[float], passes: int) -> Timing:
    ms = [1e3 * time for time in own]
    speedups = [one / other for one, other in zip(first, own, strict=True)]
    return Timing(statistics.median(ms), _iqr(ms), statistics.median(speedups), _iqr(speedups), passes)


def _iqr(values: Sequence[float]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low)
