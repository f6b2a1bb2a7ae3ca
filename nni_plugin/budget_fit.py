"""How many channels have to go: by arithmetic first, then on the slim network itself, counted or timed.

MACs and parameters are counted, and fall with every channel: one ranking by score, cut where the budget is met. Latency
is a staircase, so which channels go is a knapsack over measured layers (:mod:`nni_plugin.knapsack`); how much time the
layers may take is then corrected on the slim network, timed in turns with the dense one, until the budget holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from nni_plugin.budgets import Budget, Size
from nni_plugin.cost import count
from nni_plugin.groups import ChannelGroup
from nni_plugin.knapsack import KnapsackRanking
from nni_plugin.latency_budget import LatencyByTable, LatencyMeter
from nni_plugin.processes import agreed
from nni_plugin.selection import Ranking, solve
from nni_plugin.slim_cost import SlimCost
from nni_plugin.slim_latency import SlimLatency

Kept = Mapping[str, Tensor]

_SHARE = 0.25
"""Part of a group's channels whose latency says what one of them saves: a single one may save nothing."""


class BudgetFit:
    """Holds rankings of one network against its budget.

    Args:
        budget: What the result may cost.
        model: The network.
        example_inputs: Inputs to count it with.
        groups: Its prunable groups.
        slim: `slim(kept)` -> a copy of the network with these channels alone.
        meter: Times it; None where the budget is counted.
        dense: Size of the dense network, which ratios refer to; None: the network's own.
    """

    def __init__(
        self,
        budget: Budget,
        model: nn.Module,
        example_inputs: Any,
        groups: Iterable[ChannelGroup],
        slim: Callable[[Kept], nn.Module],
        meter: LatencyMeter | None,
        dense: Size | None = None,
    ) -> None:
        groups = list(groups)
        self.budget, self.slim, self.example_inputs, self.meter = budget, slim, example_inputs, meter
        self.cost: SlimCost | LatencyByTable = SlimCost(model, example_inputs, groups)
        self._layers: SlimLatency | None = None
        if meter is not None:
            self._layers = SlimLatency(model, example_inputs, groups, meter.table)
            self.cost = meter.sized(self.cost, self._layers)
        self.dense = self.cost.dense if dense is None else dense

    def ranking(
        self,
        groups: Iterable[ChannelGroup],
        scores: Mapping[str, Tensor],
        *,
        additive: bool,
        round_to: int,
        min_channels: int,
    ) -> Ranking:
        """Return what goes first, for the budget.

        Args:
            groups: The groups to choose from.
            scores: One score a channel, by group name.
            additive: Whether scores of several channels may be added up, as a knapsack does; without that, of positions
                in an order of removal, that order is kept whatever the budget.
            round_to: Widths become multiples of this, or stay whole.
            min_channels: No group gets narrower.
        """
        if self._layers is None or not additive:
            return Ranking(list(groups), scores, round_to=round_to, min_channels=min_channels)
        # What follows measures where its choices lead it, and every process has to be led alike.
        scores = agreed(dict(scores))
        return KnapsackRanking(list(groups), scores, self._layers, round_to=round_to, min_channels=min_channels)

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
        savings = {}
        for group in groups:
            index = kept[group.name]
            gone = 1 if self.meter is None else max(1, int(_SHARE * len(index)))
            savings[group.name] = float(whole - self._value({**kept, group.name: index[:-gone]})) / gone
        return savings

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
            timing = {
                **self.meter.account(self.slim(kept)),
                "predicted_ratio": self._value(kept) / self.meter.dense_ms,
                "chosen_by": "knapsack" if isinstance(ranking, KnapsackRanking) else "order",
            }
        size = self._counted(kept)
        if self.meter is None and size != self.cost.predict(kept):
            kept = solve(ranking, self.budget, self.dense, self._counted)[1]
            size = self._counted(kept)
        return kept, size, timing

    def _value(self, kept: Kept) -> float:
        return self.budget.value(self.cost.predict(kept))

    def _counted(self, kept: Kept) -> Size:
        return Size(count(self.slim(kept), self.example_inputs), sum(len(index) for index in kept.values()))
