"""From gates to an architecture that meets the budget: deterministic, and exactly.

A gate stays where it is more likely open than closed. Then the budget is met by repair in the order of the gates'
values: while the network costs too much the lowest open gate closes, while there is room the highest closed one opens.
Both are one order of removal, closed gates first and each by value, of which the fewest are taken that meet the limit;
and since a channel of one group may cost many times that of another, those that still fit then open again, the highest
first. A group keeps at least `min_channels`, and widths are multiples of `round_to`, or whole.

(The authors' released code draws a new random sample instead, so what it prunes is not what it had evaluated.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nni_plugin.errors import BudgetError
from nni_plugin.groups import ChannelGroup
from nni_plugin.performance.architecture import ArchitectureLayout
from nni_plugin.performance.gates import EVEN
from nni_plugin.selection import Ranking

Kept = dict[str, Tensor]
"""Channels kept, as ascending indices by group name."""


class Discretiser:
    """Turns gate values into channels kept, within a limit.

    Args:
        layout: The gates.
        measure: What a network costs that keeps the given channels; falls with each channel less.
        limit: What it may cost.
        round_to: Widths become multiples of this (the nearest), or stay whole.
        min_channels: No group gets narrower.

    Raises:
        BudgetError: Even the narrowest network costs more; the text says what could be reached.
    """

    def __init__(
        self,
        layout: ArchitectureLayout,
        measure: Callable[[Kept], float],
        limit: float,
        *,
        round_to: int = 1,
        min_channels: int = 1,
    ) -> None:
        self.layout, self.measure, self.limit = layout, measure, limit
        self.round_to, self.min_channels = round_to, min_channels
        ranking = self._ranking(self._by_channel(torch.zeros(layout.size)), layout.groups)
        least, whole = measure(ranking.kept(ranking.units)), measure(ranking.kept(0))
        if least > limit:
            raise BudgetError(
                f"The budget allows {limit:,.6g} of {whole:,.6g}, but with every gated group at its smallest width "
                f"{least:,.6g} remain ({least / max(whole, 1e-12):.4f} of the dense network). Ask for more, give gates "
                "to the skip connections as well (select='all'), or allow narrower groups (min_channels, round_to). "
                "The model is unchanged."
            )

    def repair(self, values: Tensor, opened: Tensor) -> Kept:
        """Return the channels kept by the gates that are open, after repair.

        Args:
            values: One number a gate, higher = keep, shape `[N]`.
            opened: Which gates are open, bool, shape `[N]`.

        Returns:
            Channels kept, within the limit; with any group one step wider they would not be.
        """
        order = torch.sort(values.detach().double().cpu(), stable=True).indices
        rank = torch.empty(self.layout.size, dtype=torch.float64)
        rank[order] = torch.arange(self.layout.size, dtype=torch.float64)
        order_of_removal = rank + self.layout.size * opened.cpu()
        ranking = self._ranking(self._by_channel(order_of_removal), self.layout.groups)
        units = ranking.fewest(lambda kept: self.measure(kept) <= self.limit)
        if units is None:
            raise BudgetError(f"No network within {self.limit:,.6g} was found. The model is unchanged.")
        return self._filled(ranking.kept(units), order_of_removal)

    def deterministic(self, logits: Tensor, offset: float) -> Kept:
        """Return the channels whose gates are as likely open as closed or more, after repair."""
        return self.repair(logits, logits.detach() + offset >= EVEN)

    def _filled(self, kept: Kept, scores: Tensor) -> Kept:
        """Widen groups, the one with the highest gate to open first, while the network stays within the limit."""
        groups = {group.name: group for group in self.layout.groups}
        by_channel = self._by_channel(scores)
        waiting: dict[str, tuple[float, Tensor]] = {}

        def look(name: str) -> None:
            """Note the group one step wider, with the highest score that it gains; nothing if it is whole."""
            group = groups[name]
            alone = self._ranking({name: by_channel[name]}, [group])
            if len(kept[name]) < group.width:
                # The most that can go so that more stays than now: widths fall as more goes.
                fewer = bisect_left(range(alone.units), True, key=lambda n: len(alone.kept(n)[name]) <= len(kept[name]))
                wider = alone.kept(fewer - 1)[name]
                gained = group.unit[wider[~torch.isin(wider, kept[name])]]
                waiting[name] = float(scores[self.layout.slices[name]][gained].max()), wider

        for name in groups:
            look(name)
        while waiting:
            name = max(waiting, key=lambda name: waiting[name][0])
            wider = {**kept, name: waiting.pop(name)[1]}
            if self.measure(wider) <= self.limit:
                kept = wider
                look(name)
        return kept

    def _ranking(self, by_channel: Kept, groups: Sequence[ChannelGroup]) -> Ranking:
        return Ranking(groups, by_channel, round_to=self.round_to, min_channels=self.min_channels)

    def _by_channel(self, scores: Tensor) -> Kept:
        """Share each gate's score out among the channels of its unit, which a ranking sums again."""
        shared = self.layout.expand((scores / self.layout.unit_sizes.cpu()).to(self.layout.device)).cpu()
        return {name: shared[part] for name, part in self.layout.channel_slices.items()}
