"""How many channels have to go: by arithmetic first, then on the slim network itself, counted or timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from nni_plugin.budgets import Budget, Size
from nni_plugin.cost import count
from nni_plugin.groups import ChannelGroup
from nni_plugin.latency_budget import LatencyByMACs, LatencyMeter
from nni_plugin.selection import Ranking, solve
from nni_plugin.slim_cost import SlimCost

Kept = Mapping[str, Tensor]


class BudgetFit:
    """Holds rankings of one network against its budget.

    Args:
        budget: What the result may cost.
        cost: Sizes by arithmetic.
        slim: `slim(kept)` -> a copy of the network with these channels alone.
        example_inputs: Inputs to count it with.
        meter: Times it; None where the budget is counted.
        dense: Size of the dense network, which ratios refer to; None: the network's own.
    """

    def __init__(
        self,
        budget: Budget,
        cost: SlimCost,
        slim: Callable[[Kept], nn.Module],
        example_inputs: Any,
        meter: LatencyMeter | None,
        dense: Size | None = None,
    ) -> None:
        self.budget, self.slim, self.example_inputs, self.meter = budget, slim, example_inputs, meter
        self.cost: SlimCost | LatencyByMACs = cost if meter is None else meter.sized(cost)
        self.dense = self.cost.dense if dense is None else dense

    def check(self, ranking: Ranking) -> None:
        """Refuse a budget that the narrowest network does not meet.

        Raises:
            BudgetError: It does not; the text says what can be reached.
        """
        if self.meter is not None:
            self.meter.check(self.slim(ranking.kept(ranking.units)))
        else:
            solve(ranking, self.budget, self.dense, self.cost.predict)

    def enough(self, ranking: Ranking) -> int:
        """Return how many units go by arithmetic; all of them where only timing can tell."""
        if self.meter is not None:
            units = ranking.fewest(lambda kept: self._value(kept) <= self.budget.limit(self.dense))
            return ranking.units if units is None else units
        return solve(ranking, self.budget, self.dense, self.cost.predict)[0]

    def part(self, ranking: Ranking, kept: Kept, *, steps_left: int) -> int | None:
        """Return how many units go in the first of so many equal steps from here."""
        value = self._value(kept)
        limit = value - (value - self.budget.limit(self.dense)) / steps_left
        return ranking.fewest(lambda fewer: self._value(fewer) <= limit)

    def savings(self, groups: Iterable[ChannelGroup], kept: Kept) -> dict[str, float]:
        """Return what removing one more channel of each group saves, in units of the budget."""
        whole = self._value(kept)
        return {group.name: float(whole - self._value({**kept, group.name: kept[group.name][:-1]})) for group in groups}

    def exact(self, ranking: Ranking, kept: dict[str, Tensor]) -> tuple[dict[str, Tensor], Size, dict[str, Any]]:
        """Count on the slim network; where arithmetic was off, search again by counting; a latency by timing.

        Args:
            ranking: Units in the order of their removal.
            kept: What stays by arithmetic.

        Returns:
            What stays, its size, and how it was timed (empty where it was not).
        """
        timing: dict[str, Any] = {}
        if self.meter is not None:
            kept = ranking.kept(self.meter.fewest(ranking.units, lambda units: self.slim(ranking.kept(units))))
            timing = self.meter.account(self.slim(kept))
        size = self._counted(kept)
        if self.meter is None and size != self.cost.predict(kept):
            kept = solve(ranking, self.budget, self.dense, self._counted)[1]
            size = self._counted(kept)
        return kept, size, timing

    def _value(self, kept: Kept) -> float:
        return self.budget.value(self.cost.predict(kept))

    def _counted(self, kept: Kept) -> Size:
        return Size(count(self.slim(kept), self.example_inputs), sum(len(index) for index in kept.values()))
