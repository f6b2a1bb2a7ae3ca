"""Cost of a network at any widths, by arithmetic on what the dense one was counted to cost.

A dense or depthwise layer's MACs are proportional to the size of its weight along every dimension that
shrinks, and so is each tensor's number of parameters; both are exact. Work outside such layers (attention
products) is taken as unchanged: planners count the slim network itself before they promise anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.budgets import Size
from nni_plugin.cost import Cost, count_macs_by_module
from nni_plugin.groups import ChannelGroup


@dataclass(frozen=True, eq=False)
class _Share:
    """How many positions of a tensor dimension each channel of a group holds."""

    group: str
    per_channel: Tensor

    def removed(self, kept: Tensor) -> int:
        return int(self.per_channel.sum() - self.per_channel[kept].sum())


class SlimCost:
    """Predicts MACs, parameters and channels of a network whose groups keep some of their channels.

    Args:
        model: The network that `groups` was found on.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        groups: Its coupled channel groups; those with `.fixed` keep their width and are not counted as channels.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, groups: Iterable[ChannelGroup]) -> None:
        macs = count_macs_by_module(model, example_inputs)
        prunable = [group for group in groups if group.fixed is None]
        self.widths = {group.name: group.width for group in prunable}
        self._shares: dict[str, dict[int, list[_Share]]] = {}
        for group in prunable:
            for piece in group.slices:
                per_channel = torch.bincount(piece.channel, minlength=group.width)
                by_dim = self._shares.setdefault(piece.tensor, {}).setdefault(piece.dim, [])
                by_dim.append(_Share(group.name, per_channel))
        parameters = dict(model.named_parameters())
        # One that two layers share has two names: each layer multiplies by it, and it is stored once.
        by_name = dict(model.named_parameters(remove_duplicate=False))
        self._shapes = {name: tuple(by_name[name].shape) for name in self._shares if name in by_name}
        self._stored = self._shapes.keys() & parameters.keys()
        self._macs = {
            name: macs[name.removesuffix(".weight")]
            for name in self._shapes
            if name.endswith(".weight") and name.removesuffix(".weight") in macs
        }
        total_params = sum(parameter.numel() for parameter in parameters.values())
        self.dense = Size(Cost(macs[""], total_params), sum(self.widths.values()))

    def predict(self, kept: Mapping[str, Tensor]) -> Size:
        """Return the size of the network when each group keeps the given channels (index tensors).

        Groups that are not named keep all. Call it with ascending, unique indices.
        """
        removed = {name: self.widths[name] - len(index) for name, index in kept.items()}
        gone = {name for name, number in removed.items() if number}
        macs, params = self.dense.cost.macs, self.dense.cost.params
        for name, shape in self._shapes.items():
            share = Fraction(1)
            for dim, parts in self._shares[name].items():
                lost = sum(part.removed(kept[part.group]) for part in parts if part.group in gone)
                if lost:
                    share *= Fraction(shape[dim] - lost, shape[dim])
            if share != 1:
                if name in self._stored:
                    params -= _numel(shape) - int(share * _numel(shape))
                if name in self._macs:
                    macs -= self._macs[name] - int(share * self._macs[name])
        return Size(Cost(macs, params), self.dense.channels - sum(removed.values()))


def _numel(shape: tuple[int, ...]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number
