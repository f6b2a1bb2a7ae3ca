"""What an architecture costs, as a differentiable function of its gates.

A layer's MACs are proportional to the product of its widths: to what is kept of its outputs and of its inputs, to one
of both for a depthwise layer, per group for a grouped one. So the cost of the whole coupled network is a polynomial in
the gates,

    T(a) = T_fixed + sum over layers of  m_l * (outputs kept by a) * (inputs kept by a),

which at every 0/1 vector is what the slim network is counted to cost, exactly: the numbers are integers in float64.
(The authors' released code counts a depthwise layer as `k^2 c^2 / C`; it is linear in `c`.)

Cost: two sums over the channels of every layer, a few operators whatever the depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nni_plugin.errors import BudgetError
from nni_plugin.performance.architecture import ArchitectureLayout
from nni_plugin.slim_cost import SlimCost


class Objective(Protocol):
    """A cost that a search brings down: MACs, parameters, or measured milliseconds."""

    dense: float
    """What the network costs with all gates open."""

    fixed: float
    """The part of it that no gate changes."""

    def __call__(self, architecture: Tensor) -> Tensor:
        """Return the cost of an architecture `[N]`, a scalar float64 that can be differentiated."""


class ArchitectureCost(SlimCost):
    """Predicts the size of a network from gates, differentiably; and from kept channels, as its base does.

    Args:
        model: The network that the layout's groups were found on.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        layout: The gates.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, layout: ArchitectureLayout) -> None:
        super().__init__(model, example_inputs, layout.groups)
        self.layout = layout
        self.rows: dict[tuple[str, int], int] = {}
        """Where the width of a tensor's dimension lies among `kept_sizes(...)`; those that gates change."""
        sizes: list[int] = []
        row_of, channel_of, weight_of = [], [], []
        for name, shape in self._shapes.items():
            for dim, parts in self._shares[name].items():
                row = self.rows[name, dim] = len(sizes)
                sizes.append(shape[dim])
                for part in parts:
                    there = part.per_channel.nonzero().flatten()
                    row_of.append(torch.full((len(there),), row))
                    channel_of.append(there + layout.channel_slices[part.group].start)
                    weight_of.append(part.per_channel[there])
        device = layout.device
        self._sizes = torch.tensor(sizes, dtype=torch.float64, device=device)
        self._row, self._channel = torch.cat(row_of).to(device), torch.cat(channel_of).to(device)
        self._weight = torch.cat(weight_of).to(device, torch.float64)
        self.macs = PolynomialCost(self, self._macs, self.dense.cost.macs)
        """The multiply-accumulates of one sample."""
        numbers = {name: _product(shape) for name, shape in self._shapes.items() if name in self._stored}
        self.params = PolynomialCost(self, numbers, self.dense.cost.params)
        """The number of parameters."""

    def kept_sizes(self, architecture: Tensor) -> Tensor:
        """Return how many positions of every tensor dimension in `rows` are kept, float64, shape `[rows]`."""
        closed = 1 - self.layout.expand(architecture).double()
        lost = torch.zeros_like(self._sizes).index_add(0, self._row, self._weight * closed[self._channel])
        return self._sizes - lost

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a parameter that gates change."""
        return self._shapes[tensor]


class PolynomialCost:
    """A sum over tensors of a number times the widths kept along every dimension that gates change.

    Args:
        cost: Knows the widths.
        numbers: The cost of each tensor (or of the layer that it is the weight of) with all gates open.
        dense: The cost of the whole network.
    """

    def __init__(self, cost: ArchitectureCost, numbers: Mapping[str, int], dense: int) -> None:
        self._cost, self.dense, self.fixed = cost, float(dense), float(dense - sum(numbers.values()))
        rows: list[list[int]] = []
        per_position = []
        for name, number in numbers.items():
            rows.append([row for (tensor, _), row in cost.rows.items() if tensor == name])
            shape = cost.shape_of(name)
            dims = [dim for tensor, dim in cost.rows if tensor == name]
            per_position.append(number / _product(tuple(shape[dim] for dim in dims)))
        most = max(map(len, rows), default=0)
        # A dimension that no gate changes stands as the last row, a width of one.
        padded = [[*mine, *[len(cost.rows)] * (most - len(mine))] for mine in rows]
        device = cost.layout.device
        self._rows = torch.tensor(padded, dtype=torch.int64, device=device).reshape(len(padded), most)
        self._numbers = torch.tensor(per_position, dtype=torch.float64, device=device)

    def __call__(self, architecture: Tensor) -> Tensor:
        """Return the cost of an architecture `[N]`, a scalar float64."""
        widths = self._cost.kept_sizes(architecture)
        widths = torch.cat([widths, widths.new_ones(1)])
        term = self._numbers
        for dim in range(self._rows.shape[1]):
            term = term * widths[self._rows[:, dim]]
        return self.fixed + term.sum()


class CostTarget:
    """The one-sided penalty on an architecture that costs too much.

    With `T` the prunable part of the cost and `p` the fraction of it that may stay,

        R(a) = log(max(T(a), p T_total) / (p T_total)),

    zero with zero gradient once the target is met. `p` is set so that the WHOLE network meets the limit,

        p = 1 - r T_all / T_total      for a reduction by the fraction r of T_all,

    where the supplement (B) has `p = (1 - r) T_all / T_total`, which leaves out the part that cannot be pruned: the two
    agree where all of the network can.

    Args:
        objective: The cost.
        limit: What the whole network may cost.

    Attributes:
        p: The fraction of the prunable cost that may stay.

    Raises:
        BudgetError: What cannot be pruned costs more than the limit, or the limit is above the dense cost.
    """

    def __init__(self, objective: Objective, limit: float) -> None:
        self.objective, self.limit = objective, float(limit)
        self.p = kept_fraction(self.limit / objective.dense, objective.dense - objective.fixed, objective.dense)

    def penalty(self, cost: Tensor) -> Tensor:
        """Return `R` of the cost of a whole network, scalar."""
        prunable = self.objective.dense - self.objective.fixed
        return one_sided_log((cost - self.objective.fixed) / prunable, self.p)


def one_sided_log(kept: Tensor, p: float) -> Tensor:
    """Return `log(max(T, p) / p)` for a kept fraction `T`, with zero gradient where `T <= p`.

    Example:
        >>> float(one_sided_log(torch.tensor(0.7), 0.5)), float(one_sided_log(torch.tensor(0.4), 0.5))
        (0.336..., 0.0)
    """
    return torch.relu(torch.log(kept.clamp(min=torch.finfo(kept.dtype).tiny) / p))


def kept_fraction(
    ratio: float, prunable: float, total: float, formula: Literal["exact", "supplement"] = "exact"
) -> float:
    """Return `p`, the fraction of the prunable cost that may stay.

    Args:
        ratio: What may stay of the whole network's cost, in (0, 1].
        prunable: `T_total`: what the gated layers cost.
        total: `T_all`: what the network costs.
        formula: `"supplement"`: `ratio * total / prunable`, as printed; it keeps more than asked for.

    Raises:
        BudgetError: No `p` above 0 and at most 1 does that; the text says what could be reached.

    Example:
        >>> round(kept_fraction(0.5, 80.0, 100.0), 4), kept_fraction(0.5, 80.0, 100.0, "supplement")
        (0.375, 0.625)
    """
    if not 0 < ratio <= 1:
        raise BudgetError(f"A ratio is the fraction kept and must be above 0 and at most 1, got {ratio!r}.")
    if not 0 < prunable <= total:
        raise BudgetError(f"Expected a prunable cost above 0 and at most the total {total}, got {prunable}.")
    p = ratio * total / prunable if formula == "supplement" else 1 - (1 - ratio) * total / prunable
    if p <= 0:
        raise BudgetError(
            f"A cost of {ratio:.4g} of the dense network is out of reach: layers that cost {1 - prunable / total:.4f} "
            f"of it have no gates (p = {p:.4f}). Ask for more, ignore fewer layers, or give gates to the skip "
            "connections as well (select='all'). The model is unchanged."
        )
    return min(p, 1.0)


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
