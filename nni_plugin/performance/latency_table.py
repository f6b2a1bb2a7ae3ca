"""Measured milliseconds as the cost of an architecture.

A table says how long each layer took at some widths; between them the time is taken as linear in each width, outside
as that of the nearest. Which machine, batch size and precision it is about is whoever measured it to know.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_plugin.errors import BudgetError
from nni_plugin.performance.cost import ArchitectureCost


@dataclass(frozen=True)
class LayerTimes:
    """How long one layer takes at a grid of widths.

    Args:
        outputs: Sizes of the weight's first dimension that were measured, ascending, at least one: the output channels
            (of a transposed convolution the input channels).
        inputs: Sizes of its second dimension, ascending: the input channels, of one group in a grouped layer; `(1,)`
            for a depthwise layer.
        ms: Milliseconds, one row for each of `outputs`, one column for each of `inputs`.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Check that the grid is one."""
        for name, widths in (("outputs", self.outputs), ("inputs", self.inputs)):
            if not widths or any(b <= a for a, b in itertools.pairwise(widths)) or widths[0] < 1:
                raise BudgetError(f"{name} must be ascending widths of at least 1, got {widths}.")
        if len(self.ms) != len(self.outputs) or any(len(row) != len(self.inputs) for row in self.ms):
            raise BudgetError(f"Expected {len(self.outputs)} rows of {len(self.inputs)} times, got {self.ms}.")
        if any(not 0 <= time < float("inf") for row in self.ms for time in row):
            raise BudgetError("Times must be finite milliseconds of at least 0.")


@dataclass(frozen=True)
class TableLatency:
    """A budget: at most this fraction of the milliseconds that a table gives the dense network.

    Args:
        ratio: The fraction kept.
        layers: Times of layers by qualified name, e.g. `"layer1.0.conv1"`.
        rest_ms: Time of all that is in no table.
    """

    ratio: float
    layers: Mapping[str, LayerTimes]
    rest_ms: float = 0.0

    def __post_init__(self) -> None:
        """Check the range."""
        if isinstance(self.ratio, bool) or not 0 < self.ratio <= 1:
            raise BudgetError(
                f"TableLatency is the fraction kept and must be above 0 and at most 1, got {self.ratio!r}."
            )
        if not 0 <= self.rest_ms < float("inf"):
            raise BudgetError(f"rest_ms must be finite milliseconds of at least 0, got {self.rest_ms!r}.")


class LatencyTable:
    """The time of a forward pass, layer by layer, as an objective of the search.

    Args:
        cost: Knows the widths that gates leave.
        layers: Times of layers by qualified name, e.g. `"layer1.0.conv1"`.
        rest_ms: Time of all that is in no table.

    Attributes:
        dense: Milliseconds with all gates open.
        fixed: Milliseconds that no gate changes.

    Raises:
        BudgetError: A layer is not in the network, or no layer's width depends on a gate.
    """

    def __init__(self, cost: ArchitectureCost, layers: Mapping[str, LayerTimes], rest_ms: float = 0.0) -> None:
        self._cost, self.fixed = cost, float(rest_ms)
        device = cost.layout.device
        self._layers: list[tuple[_Axis, _Axis, Tensor]] = []
        for path, times in layers.items():
            weight = f"{path}.weight"
            axes = {dim: row for (tensor, dim), row in cost.rows.items() if tensor == weight}
            grid = torch.tensor(times.ms, dtype=torch.float64, device=device)
            if not axes:
                raise BudgetError(
                    f"The latency table has layer {path!r}, whose width no gate changes: count it in rest_ms."
                )
            shape = cost.shape_of(weight)
            outputs = _Axis(times.outputs, axes.get(0), shape[0], device)
            inputs = _Axis(times.inputs, axes.get(1), shape[1] if len(shape) > 1 else 1, device)
            self._layers.append((outputs, inputs, grid))
        if not self._layers:
            raise BudgetError("The latency table has no layer; measure those that will be pruned.")
        self.dense = float(self(torch.ones(cost.layout.size, device=device)))

    def __call__(self, architecture: Tensor) -> Tensor:
        """Return the milliseconds of an architecture `[N]`, a scalar float64."""
        widths = self._cost.kept_sizes(architecture)
        times = [outputs.weights(widths) @ grid @ inputs.weights(widths) for outputs, inputs, grid in self._layers]
        return self.fixed + torch.stack(times).sum()


class _Axis:
    """One axis of a grid: where its width comes from, and how it falls between the widths measured."""

    def __init__(self, measured: tuple[int, ...], row: int | None, size: int, device: torch.device) -> None:
        self._measured = torch.tensor(measured, dtype=torch.float64, device=device)
        self._row, self._size = row, size

    def weights(self, widths: Tensor) -> Tensor:
        """Return the weight of each width measured, float64, summing to one: hat functions."""
        width = widths[self._row] if self._row is not None else widths.new_tensor(self._size)
        at = self._measured
        if len(at) == 1:
            return torch.ones_like(at)
        share = ((width - at[:-1]) / at.diff()).clamp(0, 1)  # how much of each interval lies below the width
        one = share.new_ones(1)
        return torch.cat([one, share]) - torch.cat([share, one.new_zeros(1)])
