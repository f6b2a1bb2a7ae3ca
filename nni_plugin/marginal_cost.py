"""What one channel, or one block, costs a network: in MACs, in parameters, or in measured milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import apply_plan
from nni_plugin.budgets import Latency, MACs, Params, Size
from nni_plugin.cost import count
from nni_plugin.groups import ChannelGroup
from nni_plugin.latency import measure_pair
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.latency import block_latencies
from nni_plugin.layers.removal import find_removal
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.slim_cost import SlimCost

_SHARE = 0.25
"""Part of every group's channels that the narrower network lacks on which the saving is measured."""


class MarginalCost:
    """Savings in units of a budget.

    Args:
        model: The network as it is now.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        groups: Its prunable groups.
        blocks: Its removable blocks.
        budget: Says the unit; of a latency the batch size and the device too.

    Attributes:
        channels: What one channel less saves, by group name.
        blocks: What each block saves when it leaves, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        groups: Sequence[ChannelGroup],
        blocks: Sequence[Block],
        budget: MACs | Params | Latency,
    ) -> None:
        if isinstance(budget, Latency):
            self._by_time(model, example_inputs, groups, blocks, budget)
        else:
            self._by_count(model, example_inputs, groups, blocks, budget)

    def _by_count(
        self,
        model: nn.Module,
        example_inputs: Any,
        groups: Sequence[ChannelGroup],
        blocks: Sequence[Block],
        budget: MACs | Params,
    ) -> None:
        cost = SlimCost(model, example_inputs, groups)
        whole = budget.value(cost.dense)
        self.channels = {
            group.name: float(whole - budget.value(cost.predict({group.name: torch.arange(group.width - 1)})))
            if group.width > 1
            else 0.0
            for group in groups
        }
        self.blocks = {}
        for block in blocks:
            without = copy.deepcopy(model)
            find_removal(model, [block.name], example_inputs).perform(without)
            self.blocks[block.name] = float(whole - budget.value(Size(count(without, example_inputs), 0)))

    def _by_time(
        self,
        model: nn.Module,
        example_inputs: Tensor,
        groups: Sequence[ChannelGroup],
        blocks: Sequence[Block],
        budget: Latency,
    ) -> None:
        layers = sorted({piece.tensor.rpartition(".")[0] for group in groups for piece in group.slices})
        alone = [Block(path, "unit", (path,), ()) for path in layers if path]
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        found = block_latencies(
            model,
            example_inputs,
            [*alone, *blocks],
            batch_size=budget.batch_size,
            device=budget.device,
            dtype=dtype,
        )
        self.blocks = {block.name: found[block.name].median_ms for block in blocks}
        share = shares(model, groups, {block.name: found[block.name].median_ms for block in alone})
        saving = _saving(model, example_inputs, groups, share, budget) if groups else 1.0
        self.channels = {name: saving * ms for name, ms in share.items()}


def shares(model: nn.Module, groups: Sequence[ChannelGroup], times: Mapping[str, float]) -> dict[str, float]:
    """Return a channel's share of the times of the layers it runs through, by group name.

    Args:
        model: The network.
        groups: Its groups.
        times: Of each layer, by its name.
    """
    parameters = dict(model.named_parameters())
    result = {}
    for group in groups:
        dims = {(piece.tensor, piece.dim): len(piece.index) for piece in group.slices if piece.tensor in parameters}
        parts: dict[str, set[float]] = {}
        for (tensor, dim), positions in dims.items():
            path, _, leaf = tensor.rpartition(".")
            if leaf == "weight" and path in times:
                parts.setdefault(path, set()).add(positions / parameters[tensor].shape[dim] / group.width)
        result[group.name] = sum(times[path] * max(part) for path, part in parts.items())
    return result


def _saving(
    model: nn.Module,
    example_inputs: Tensor,
    groups: Sequence[ChannelGroup],
    share: Mapping[str, float],
    budget: Latency,
) -> float:
    """Return which part of their channels' shares narrower layers save, as measured; in [0.05, 1]."""
    entries, promised = [], 0.0
    for group in groups:
        units = int(_SHARE * group.units)
        keep = (group.unit >= units).nonzero().flatten()
        entries.append(GroupPlan(group.name, group.width, tuple(keep.tolist())))
        promised += share[group.name] * (group.width - len(keep))
    if promised <= 0:
        return 1.0
    narrow = apply_plan(copy.deepcopy(model), PruningPlan(tuple(entries)), example_inputs, groups=groups, check=False)
    shape = (example_inputs.shape[1], example_inputs.shape[2], example_inputs.shape[3])
    [pair] = measure_pair(model, narrow, shape, (budget.batch_size,), device=budget.device)
    return min(max((1 - pair.ratio) * pair.first.median_ms / promised, 0.05), 1.0)
