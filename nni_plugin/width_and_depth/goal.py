"""A budget of MACs, parameters or milliseconds, held on the slim networks themselves."""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.budgets import Latency, MACs, Params, Size
from nni_plugin.cost import count
from nni_plugin.errors import BudgetError
from nni_plugin.latency_budget import LatencyMeter
from nni_plugin.width_and_depth.items import Items, Limits
from nni_plugin.wrappers import copy_to_plan_on


class Goal:
    """The budget, on networks that come from a dense one."""

    def __init__(self, budget: MACs | Params | Latency, dense: nn.Module, example_inputs: Any) -> None:
        self.budget, self.example_inputs = budget, example_inputs
        self.meter = LatencyMeter(dense, example_inputs, budget) if isinstance(budget, Latency) else None
        self.limit = self.meter.limit if self.meter else budget.limit(Size(count(dense, example_inputs), 0))

    def value(self, network: nn.Module) -> float:
        """Return what the budget counts."""
        if self.meter is not None:
            return self.meter.ms(network)
        return self.budget.value(Size(count(network, self.example_inputs), 0))

    def check(self, model: nn.Module, limits: Limits) -> None:
        """Refuse a budget out of reach.

        Raises:
            BudgetError: It is not met without everything that may leave.
        """
        model = copy_to_plan_on(model)
        items = Items.of(model, self.example_inputs, limits)
        everything = torch.arange(len(items))
        smallest = items.slim(model, everything, len(everything))
        if self.meter is not None:
            self.meter.check(smallest)
        elif (least := self.value(smallest)) > self.limit:
            raise BudgetError(
                f"{self.budget} allows {self.limit:,.0f}, but without all blocks and channels that can leave "
                f"{least:,.0f} remain. Ask for more. The model is unchanged."
            )

    def check_reached(self, network: nn.Module) -> None:
        """Refuse a network that is above the limit, where that is no matter of measuring.

        Raises:
            BudgetError: It is.
        """
        if self.meter is None and (value := self.value(network)) > self.limit:
            raise BudgetError(
                f"{self.budget} allows {self.limit:,.0f}, and {value:,.0f} remain where nothing more can leave. Ask "
                "for more. The model is unchanged."
            )

    def fewest(self, items: Items, order: Tensor, work: nn.Module, limit: float, *, exact: bool) -> int:
        """Return how many removals meet the limit on the slim network itself; a step on the way is timed briefly."""
        if self.meter is not None:
            return self.meter.fewest(len(order), lambda number: items.slim(work, order, number), limit, exact=exact)
        return bisect.bisect_left(
            range(len(order)), True, key=lambda number: self.value(items.slim(work, order, number)) <= limit
        )
