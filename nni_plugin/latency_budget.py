"""Holds a network to a latency budget: every candidate is timed in turns with the dense network.

A machine's speed drifts, so a time alone says little: what counts is the time beside the dense network's, measured
round by round (:func:`nni_plugin.latency.measure_pair`). A budget in milliseconds is held to the clock all the same.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.budgets import Latency, Size
from nni_plugin.cost import Cost
from nni_plugin.errors import BudgetError, ModelError
from nni_plugin.latency import LatencyPair, device_of, measure_pair
from nni_plugin.latency_table import LayerLatencies, Place, table_of
from nni_plugin.machine import usable_device
from nni_plugin.processes import agreed
from nni_plugin.slim_cost import SlimCost
from nni_plugin.slim_latency import SlimLatency

TOLERANCE = 0.03
"""How far above the limit a measured result may lie: two measurements of one network differ by as much."""

_ATTEMPTS = 5

_MANY_ROUNDS, _FEW_ROUNDS = 41, 15
"""Many short rounds give the steadier median, but each takes three passes at least: too long where one pass is."""


class LatencyByTable:
    """Sizes of slim networks with a guess at their latency: the dense one's, less what the table says its layers save.

    It places the steps of a schedule and orders candidates; a budget is met by timing.

    Args:
        cost: Sizes without latency.
        layers: Times of the layers of the same network.
        dense_ms: Measured time of the dense network.
        dense_layers_ms: What the table gives its layers.
    """

    def __init__(self, cost: SlimCost, layers: SlimLatency, dense_ms: float, dense_layers_ms: float) -> None:
        self.cost, self._layers, self._dense_ms, self._dense_layers_ms = cost, layers, dense_ms, dense_layers_ms
        self.dense = self.predict({})

    def predict(self, kept: Mapping[str, Tensor]) -> Size:
        """Return what :meth:`SlimCost.predict` returns, and the guess."""
        left = self._layers.total({name: len(index) for name, index in kept.items()})
        # Layers timed alone may take longer than all of them together, in a network whose caches are warm.
        scale = min(1.0, self._dense_ms / self._dense_layers_ms) if self._dense_layers_ms else 0.0
        guess = self._dense_ms - scale * (self._dense_layers_ms - left)
        return dataclasses.replace(self.cost.predict(kept), latency_ms=guess)


class LatencyMeter:
    """Times networks against the dense one they come from.

    Args:
        dense: The network that ratios refer to; a copy is kept, on the device of the budget. Everything is timed in
            the element type of its weights, in the default memory format.
        example_inputs: One tensor `[N, C, H, W]`; another number of dimensions or inputs is refused.
        budget: Says the batch size and the device.
        min_run_time: Seconds to measure each network, about.

    Attributes:
        dense_ms: Median time of a pass of the dense network, in milliseconds for the batch.

    Raises:
        ModelError: The network does not take one tensor of images.
    """

    def __init__(self, dense: nn.Module, example_inputs: Any, budget: Latency, *, min_run_time: float = 0.5) -> None:
        if not isinstance(example_inputs, Tensor) or example_inputs.dim() != 4:
            raise ModelError("Latency is measured on one tensor of images [N, C, H, W]; budget by MACs instead.")
        device = device_of(dense) if budget.device is None else usable_device(budget.device)
        self.budget, self.device, self.min_run_time = budget, device, min_run_time
        self.dense = copy.deepcopy(dense).to(device)
        self._rounds = _FEW_ROUNDS
        self._dtype = next((p.dtype for p in dense.parameters() if p.is_floating_point()), torch.float32)
        self._shape = (example_inputs.shape[1], example_inputs.shape[2], example_inputs.shape[3])
        self._dense_layers_ms: float | None = None
        self.dense_ms = agreed(self.pair(self.dense).first.median_ms)
        if 3 * _MANY_ROUNDS * self.dense_ms < 1000 * min_run_time:
            self._rounds = _MANY_ROUNDS

    def pair(self, network: nn.Module, *, longer: float = 1.0) -> LatencyPair:
        """Time a network beside the dense one.

        Args:
            network: Takes what the dense one takes.
            longer: How many times as long as usual.
        """
        [pair] = measure_pair(
            self.dense,
            network,
            self._shape,
            (self.budget.batch_size,),
            device=self.device,
            dtype=self._dtype,
            min_run_time=longer * self.min_run_time,
            rounds=self._rounds,
        )
        return pair

    def ms(self, network: nn.Module, *, longer: float = 1.0) -> float:
        """Return what the budget compares: the ratio in terms of `dense_ms`, or the time itself.

        Of several processes the first one's measurement holds for all, so that they go on alike.
        """
        pair = self.pair(network, longer=longer)
        return agreed(pair.second.median_ms if self.budget.ms is not None else pair.ratio * self.dense_ms)

    @property
    def limit(self) -> float:
        """The most milliseconds of a pass that the budget allows."""
        return self.budget.limit(Size(Cost(0, 0), 0, latency_ms=self.dense_ms))

    @cached_property
    def table(self) -> LayerLatencies:
        """Times of single layers, where and how the networks are timed."""
        wide = [parameter for parameter in self.dense.parameters() if parameter.dim() == 4]
        last = any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in wide)
        return table_of(Place(self.device, self._dtype, self.budget.batch_size, last, torch.get_num_threads()))

    def sized(self, cost: SlimCost, layers: SlimLatency) -> LatencyByTable:
        """Return sizes with a guess at the latency.

        Args:
            cost: Sizes without, of the dense network or of what is left of it.
            layers: Times of its layers. What the first one that is given says of its network holds for the dense one.
        """
        if self._dense_layers_ms is None:
            self._dense_layers_ms = layers.total({})
        return LatencyByTable(cost, layers, self.dense_ms, self._dense_layers_ms)

    def check(self, smallest: nn.Module, limit: float | None = None) -> None:
        """Refuse a limit that the network without everything that may leave does not meet.

        Raises:
            BudgetError: It does not; the text says what can be reached.
        """
        limit = self.limit if limit is None else limit
        reached = self.ms(smallest, longer=2)
        if reached > limit * (1 + TOLERANCE):
            raise BudgetError(
                f"{self.budget} allows {limit:.3f} ms a pass of {self.dense_ms:.3f}, but with everything removed that "
                f"may be, {reached:.3f} ms remain ({reached / self.dense_ms:.4f} of the dense network). Ask for more. "
                "The model is unchanged."
            )

    def fewest(
        self, most: int, network_after: Callable[[int], nn.Module], limit: float | None = None, *, exact: bool = True
    ) -> int:
        """Find how many removals it takes to meet a limit, by timing.

        Args:
            most: Number of removals there are.
            network_after: The network after so many removals, faster the more there are.
            limit: In milliseconds; None: the budget's.
            exact: Whether to measure the result once more, for longer, and to refuse a limit out of reach.

        Returns:
            Few enough that one less was measured to be too slow; a longer measurement after it is within
            :data:`TOLERANCE` of the limit.

        Raises:
            BudgetError: The limit is out of reach; the text says what can be reached.
        """
        limit = self.limit if limit is None else limit
        low, high = 0, most
        if exact:
            self.check(network_after(most), limit)
        while low < high:
            middle = (low + high) // 2
            if self.ms(network_after(middle)) <= limit:
                high = middle
            else:
                low = middle + 1
        if not exact:
            return low
        for _ in range(_ATTEMPTS):  # a short measurement may have misled the search
            if low == most or self.ms(network_after(low), longer=3) <= limit * (1 + TOLERANCE):
                return low
            low += max(1, (most - low) // 50)
        raise BudgetError(
            f"{self.budget}: measurements on {self.device} vary by more than {100 * TOLERANCE:.0f} %, so the limit of "
            f"{limit:.3f} ms cannot be held; stop other work there, or budget by MACs. The model is unchanged."
        )

    def account(self, network: nn.Module) -> dict[str, Any]:
        """Return the measurement of a result, for a plan's provenance: settings, both times, their ratio."""
        pair = self.pair(network, longer=4)
        return {"dense": dataclasses.asdict(pair.first), "pruned": dataclasses.asdict(pair.second), "ratio": pair.ratio}
