"""Which channels to keep within a time: a knapsack over latency tables, as in HALP.

Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022, section 3.3: channels of a group leave in
the order of their scores, keeping the j-th best is worth its score, and it costs the difference between the times of
the layers with j and with j - 1. For each group that is a list of widths with a worth and a time each, of which one is
chosen: a multiple-choice knapsack. The widths are those that the table measures, and one that takes no less than a
wider one is never worth choosing: where the time is a staircase, channels are taken together in its steps.

Solved by dynamic programming over the time spent, vectorised over it: exact on a grid of times, and as long for every
case of one size. Branch and bound (`scipy.optimize.milp`) needs no grid, but it stops at a tolerance, and how long it
takes depends on the scores; it would be asked dozens of times for one plan.

A layer's time depends on its inputs and its outputs, so a group's times depend on the other groups' widths. They are
taken as of the last round, until nothing changes. On times that are products of widths this is Newton's iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nni_plugin.groups import ChannelGroup
from nni_plugin.latency_table import grid
from nni_plugin.selection import Ranking
from nni_plugin.slim_latency import SlimLatency

RESOLUTION = 16384
"""Steps that the time to be spent is divided into; each group's time is rounded up to one."""

ROUNDS = 16
"""Rounds at most; 3 to 8 are usual."""

SETTLING = 3
"""Rounds after which a choice that still takes too long is asked to take less than there is."""

STAGE = 0.75
"""A choice is looked for from one that takes at most its time divided by this."""

LEVELS = 256
"""A time is chosen between the narrowest and the widest network to 1 of so many at least."""

Floats = NDArray[np.float64]


def best_choice(values: Sequence[Floats], costs: Sequence[NDArray[np.int64]], capacity: int) -> list[int] | None:
    """Choose one option of every group so that their values add up to the most within a capacity: exact.

    Args:
        values: What each option of a group is worth, not rising from one to the next; one array a group.
        costs: What it costs, at least 0, of the same shape.
        capacity: The most that all may cost, at least 0.

    Returns:
        The number of the option of each group; of equally good ones that which comes first in the last groups. None if
        even the cheapest options cost more.

    Example:
        >>> best_choice([np.array([5.0, 3.0, 0.0]), np.array([4.0, 0.0])], [np.array([4, 2, 0]), np.array([3, 0])], 5)
        [1, 0]
    """
    best = np.zeros(capacity + 1)  # the most that is worth having at each cost or below
    chosen = []
    for value, cost in zip(values, costs, strict=True):
        most, pick = np.full(capacity + 1, -np.inf), np.zeros(capacity + 1, dtype=np.int32)
        cheapest = capacity + 1
        for option in range(len(value)):
            spent = int(cost[option])
            if spent >= cheapest:  # one that is worth as much or more costs no more
                continue
            cheapest = spent
            worth = best[: capacity + 1 - spent] + value[option]
            better = worth > most[spent:]
            most[spent:][better], pick[spent:][better] = worth[better], option
        best = most
        chosen.append(pick)
    if best[capacity] == -np.inf:
        return None
    left, result = capacity, []
    for pick, cost in zip(reversed(chosen), reversed(costs), strict=True):
        result.append(int(pick[left]))
        left -= int(cost[result[-1]])
    return result[::-1]


def within(
    values: Sequence[Floats], times: Sequence[Floats], capacity: float, resolution: int = RESOLUTION
) -> list[int] | None:
    """Choose one option of every group within a time, as :func:`best_choice` does.

    Args:
        values: What each option of a group is worth, not rising from one to the next; one array a group.
        times: How long it takes, in any unit, negative ones too.
        capacity: The most that all may take together.
        resolution: Steps that the time above the least is divided into.

    Returns:
        The number of the option of each group, never above the capacity; worth as much at least as the best choice
        within a capacity that is less by one step a group. None if even the fastest options take longer.
    """
    least = [float(time.min()) for time in times]
    room = capacity - math.fsum(least)
    if room < 0:
        return None
    step = room / resolution
    costs = []
    for time, fastest in zip(times, least, strict=True):
        # A time that is a whole step up to rounding stays one; without any room only the fastest option fits.
        steps = np.ceil((time - fastest) / max(step, 1e-300) - 1e-9)
        costs.append(np.minimum(steps, resolution + 1).astype(np.int64))
    return best_choice(values, costs, resolution)


class KnapsackRanking(Ranking):
    """Channels to keep at each of many times, from that of the whole network to that of the narrowest.

    To be asked as :class:`Ranking` is: level 0 keeps everything, the last level the least, and one between them the
    best choice within a time in proportion. Unlike there a channel that is gone at one level may be back at the next.

    Args:
        groups: The groups to choose from.
        scores: One score a channel, by group name, higher = keep, shape `[width]`; a unit is worth the sum of its
            channels, one below zero nothing: it goes once time is short. Channels with `-inf` (removed before) are
            gone at every level; units with `inf` stay.
        latency: Times of the network at any widths.
        round_to: Widths are multiples of this, or whole; the nearest to those that are measured.
        min_channels: No group gets narrower than this (or than its smallest possible width above it).
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        latency: SlimLatency,
        *,
        round_to: int = 1,
        min_channels: int = 1,
    ) -> None:
        super().__init__(groups, scores, round_to=round_to, min_channels=min_channels)
        self._latency = latency
        self._options = [
            _Options.of(group, scores[group.name], order, sorted(set(widths)))
            for group, order, widths in zip(self.groups, self._orders, self._widths, strict=True)
        ]
        self._chosen: dict[int, list[int]] = {
            0: [0] * len(self.groups),
            self.units: [len(options.gone) - 1 for options in self._options],
        }

    @property
    def units(self) -> int:
        """Number of the last level."""
        return max(super().units, LEVELS)

    def kept(self, units_removed: int) -> dict[str, Tensor]:
        """Return the channels that each group keeps at a level.

        Args:
            units_removed: The level, from 0 to :attr:`units`.

        Returns:
            Ascending channel indices by group name.
        """
        if units_removed not in self._chosen:
            most, least = self._ends
            self._chosen[units_removed] = self._solve(most - (most - least) * units_removed / self.units)
        chosen = self._chosen[units_removed]
        return {
            group.name: self._channels(number, int(options.gone[option]))
            for number, (group, options, option) in enumerate(zip(self.groups, self._options, chosen, strict=True))
        }

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """Milliseconds of the layers of the widest network and of the narrowest."""
        first, last = (self._latency.total(self._widths_of(self._chosen[level])) for level in (0, self.units))
        return first, last

    @cached_property
    def _path(self) -> list[tuple[float, list[int]]]:
        """Choices at times that fall by stages, as far as somebody has had to go."""
        return [(self._ends[0], self._chosen[0])]

    def _solve(self, capacity: float) -> list[int]:
        """Return an option for each group so that the table gives all of them together no more than a time."""
        # Times far from where they were taken mislead: the way there goes by stages, the same for every level.
        while (time := self._path[-1][0] * STAGE) > max(capacity, self._ends[1]):
            self._path.append((time, self._settled(time, self._path[-1][1])))
        return self._settled(capacity, next(choice for time, choice in reversed(self._path) if time >= capacity))

    def _settled(self, capacity: float, now: list[int]) -> list[int]:
        """Choose within a time, going on from another choice until nothing changes."""
        # The narrowest network always will do; a slower one is better only if it is worth more.
        best, worth = self._chosen[self.units], -math.inf
        aim, seen = capacity, set()
        for number in range(ROUNDS):
            widths = self._widths_of(now)
            time = self._latency.total(widths)
            value = math.fsum(options.value[i] for options, i in zip(self._options, now, strict=True))
            if time <= capacity * (1 + 1e-9) and value > worth:
                best, worth = now, value
            if tuple(now) in seen and worth > -math.inf:
                break
            seen.add(tuple(now))
            if number >= SETTLING and time > capacity:
                aim -= time - capacity  # it goes round close by, or creeps up from above: ask for a little less
            now = self._next(now, widths, aim - time)
        return self._filled(best, capacity)

    def _next(self, now: Sequence[int], widths: Mapping[str, int], room: float) -> list[int]:
        """Choose anew, each group's times as the others are now.

        Args:
            now: The options at present.
            widths: Their widths.
            room: How much more time there is than they take.
        """
        changes = self._changes(now, widths)
        chosen = within([options.value for options in self._options], changes, room)
        return [int(change.argmin()) for change in changes] if chosen is None else chosen

    def _filled(self, now: list[int], capacity: float) -> list[int]:
        """Spend what time is left on what is worth most for it: rounds end as soon as they go nowhere."""
        now = list(now)
        while True:
            widths = self._widths_of(now)
            room = capacity - self._latency.total(widths)
            gains = []
            for number, change in enumerate(self._changes(now, widths)):
                value = self._options[number].value
                for option in range(now[number]):  # the wider ones
                    if change[option] <= room:
                        gain = float(value[option] - value[now[number]])
                        gains.append((gain / max(float(change[option]), 1e-12), -option, number))
            if not gains:
                return now
            _, option, number = max(gains)
            now[number] = -option

    def _changes(self, now: Sequence[int], widths: Mapping[str, int]) -> list[Floats]:
        """Return how much longer the network takes at each option of a group, the others as they are now."""
        changes = []
        for group, options, option in zip(self.groups, self._options, now, strict=True):
            times = self._latency.around(group.name, options.width, widths)
            changes.append(times - times[option])
        return changes

    def _widths_of(self, chosen: Sequence[int]) -> dict[str, int]:
        return {
            group.name: int(options.width[option])
            for group, options, option in zip(self.groups, self._options, chosen, strict=True)
        }


@dataclass(frozen=True, eq=False)
class _Options:
    """The widths that a group may get, widest first.

    Attributes:
        gone: Units removed.
        width: Channels left.
        value: What they are worth.
    """

    gone: NDArray[np.int64]
    width: NDArray[np.int64]
    value: Floats

    @classmethod
    def of(cls, group: ChannelGroup, scores: Tensor, order: Tensor, allowed: Sequence[int]) -> _Options:
        """List them.

        Args:
            group: The group.
            scores: One a channel.
            order: Its units, removed first to removed last.
            allowed: Numbers of units that may go, ascending.
        """
        score = torch.zeros(group.units, dtype=torch.float64).index_add_(0, group.unit, scores.double())[order].numpy()
        sizes = torch.bincount(group.unit, minlength=group.units)[order].numpy()
        dead, firm = int((score == -np.inf).sum()), int((score == np.inf).sum())
        possible = [gone for gone in allowed if dead <= gone <= group.units - firm]
        gone = np.array(possible or [min(allowed, key=lambda number: abs(number - dead))])
        width = group.width - np.concatenate([[0], sizes.cumsum()])[gone]
        # Between the widths that are measured a table knows no steps: one that seems cheap may lie on the next step.
        near = np.abs(width[:, None] - grid(group.width)[None, :]).argmin(0)
        near = np.union1d(near, [0, len(gone) - 1])
        gone, width = gone[near], width[near]
        worth = np.where(np.isfinite(score), np.maximum(score, 0.0), 0.0)
        value = np.concatenate([worth[::-1].cumsum()[::-1], [0.0]])[gone]
        return cls(gone, width, value)
