"""From scores to channels: one global ranking, exact to the last unit of removal.

Units (channels, or a few tied ones) of all groups are removed in ascending order of score, ties in the order
of the network. A group never falls below its minimum width, and widths are rounded to the nearest multiple of
`round_to`. Removing one more unit changes one group by one step, so any size that falls with the widths can
be met exactly by bisection on the number of units removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nni_plugin.budgets import Budget, Size
from nni_plugin.errors import BudgetError
from nni_plugin.groups import ChannelGroup


class Ranking:
    """All units of all prunable groups in the order of their removal.

    Args:
        groups: The groups to choose from.
        scores: One score a channel, by group name, higher = keep, shape `[width]`; a unit scores the sum of its
            channels. Channels with `-inf` (removed before) go first; a group of `inf` stays whole.
        round_to: Widths become the nearest multiple of this, or stay whole.
        min_channels: No group gets narrower than this (or than its smallest possible width above it).
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor],
        *,
        round_to: int = 1,
        min_channels: int = 1,
    ) -> None:
        for name, value in (("round_to", round_to), ("min_channels", min_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"{name} must be an integer of at least 1, got {value!r}.")
        self.groups = list(groups)
        self._orders: list[Tensor] = []
        self._widths: list[list[int]] = []
        unit_scores, owners = [], []
        for number, group in enumerate(self.groups):
            score = torch.zeros(group.units, dtype=torch.float64)
            score.index_add_(0, group.unit, scores[group.name].double())
            sizes = torch.bincount(group.unit, minlength=group.units)
            order = torch.sort(score, stable=True).indices  # removed first .. removed last
            self._orders.append(order)
            left = group.width - torch.cat([torch.zeros(1, dtype=torch.int64), sizes[order].cumsum(0)])
            whole = bool((score == math.inf).all())
            least = max(min_channels, group.least)
            self._widths.append([0] * len(left) if whole else _rounded(left.tolist(), round_to, least))
            unit_scores.append(score[order])
            owners.append(torch.full((group.units,), number))
        flat = torch.cat(unit_scores) if unit_scores else torch.zeros(0)
        ranked = torch.sort(flat, stable=True).indices
        self._owner = torch.cat(owners)[ranked] if owners else torch.zeros(0, dtype=torch.int64)

    @property
    def units(self) -> int:
        """Number of units that can be asked to go."""
        return len(self._owner)

    def kept(self, units_removed: int) -> dict[str, Tensor]:
        """Return the channels that each group keeps when so many units are asked to go.

        Args:
            units_removed: How many of the lowest units go, before minimum widths and rounding.

        Returns:
            Ascending channel indices by group name.
        """
        gone = torch.bincount(self._owner[:units_removed], minlength=len(self.groups)).tolist()
        return {
            group.name: self._channels(number, self._widths[number][gone[number]])
            for number, group in enumerate(self.groups)
        }

    def _channels(self, number: int, units_left_out: int) -> Tensor:
        group, order = self.groups[number], self._orders[number]
        out = torch.zeros(group.units, dtype=torch.bool)
        out[order[:units_left_out]] = True
        return (~out[group.unit]).nonzero().flatten()

    def fewest(self, enough: Callable[[dict[str, Tensor]], bool]) -> int | None:
        """Return the smallest number of units to ask for so that `enough(kept)`; None if none is.

        `enough` must stay true as more is removed.
        """
        low, high = 0, self.units
        if not enough(self.kept(high)):
            return None
        while low < high:
            middle = (low + high) // 2
            if enough(self.kept(middle)):
                high = middle
            else:
                low = middle + 1
        return low


def _rounded(left: list[int], round_to: int, minimum: int) -> list[int]:
    """Return, for each number of units asked to go, how many do go.

    Args:
        left: Width after 0, 1, 2, ... units have gone, descending to 0.
        round_to: Multiple that widths are rounded to.
        minimum: Smallest width.
    """
    allowed = [
        gone for gone, width in enumerate(left) if gone == 0 or (width % round_to == 0 and width >= max(minimum, 1))
    ]
    result, position = [], 0
    for width in left:
        # The nearest allowed width; of two equally near the wider. Both lists descend, so one walk does.
        while position + 1 < len(allowed) and abs(left[allowed[position + 1]] - width) < abs(
            left[allowed[position]] - width
        ):
            position += 1
        result.append(allowed[position])
    return result


def solve(
    ranking: Ranking, budget: Budget, dense: Size, size_of: Callable[[dict[str, Tensor]], Size]
) -> tuple[int, dict[str, Tensor]]:
    """Find the fewest removals that meet a budget.

    Args:
        ranking: Units in the order of their removal.
        budget: What the result may cost.
        dense: Size of the dense network, which ratios refer to.
        size_of: Size of the network with the given channels kept.

    Returns:
        The number of units asked to go, and the channels kept: within the budget, and one unit less is not.

    Raises:
        BudgetError: Even the narrowest network exceeds the budget; the text says what can be reached.
    """
    limit = budget.limit(dense)
    units = ranking.fewest(lambda kept: budget.value(size_of(kept)) <= limit)
    if units is None:
        least, whole = budget.value(size_of(ranking.kept(ranking.units))), budget.value(dense)
        raise BudgetError(
            f"{budget} allows {limit:,} of {whole:,}, but with every group at its smallest width {least:,} remain "
            f"({least / max(whole, 1):.4f} of the dense network). Ask for more, allow narrower groups "
            "(min_channels, round_to) or ignore fewer layers. The model is unchanged."
        )
    return units, ranking.kept(units)
