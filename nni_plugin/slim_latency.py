"""Milliseconds of a network's layers at any widths, from a table of single layers.

What :mod:`nni_plugin.slim_cost` is for MACs: which widths of which layers shrink with a group is read off its slices.
Convolutions and linear layers that run through their own `forward` are looked up; all else (normalisation, activation,
attention products) is in no table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_plugin.cost import batch_size_of, call
from nni_plugin.groups import ChannelGroup
from nni_plugin.latency import evaluation_mode
from nni_plugin.latency_table import LayerLatencies, LayerShape

Widths = Mapping[str, "int | NDArray[np.int64]"]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer: the shapes it runs at in one pass; by dimension of its weight, the positions a channel of each group."""

    calls: tuple[LayerShape, ...]
    positions: tuple[Mapping[str, float], Mapping[str, float]]

    @property
    def groups(self) -> set[str]:
        return {*self.positions[0], *self.positions[1]}


class SlimLatency:
    """Predicts how long the layers of a network take whose groups keep some of their channels.

    Args:
        model: The network that `groups` was found on; run once.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        groups: Its coupled channel groups; those with `.fixed` keep their width.
        table: Times of single layers.

    Attributes:
        widths: Channels of each prunable group.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, groups: Iterable[ChannelGroup], table: LayerLatencies
    ) -> None:
        prunable = [group for group in groups if group.fixed is None]
        self.widths = {group.name: group.width for group in prunable}
        self._table = table
        self._layers: list[_Layer] = []
        positions: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
        for group in prunable:
            for piece in group.slices:
                path, _, leaf = piece.tensor.rpartition(".")
                if leaf == "weight" and piece.dim < 2:
                    held = positions.setdefault(path, ({}, {}))[piece.dim]
                    held[group.name] = held.get(group.name, 0.0) + len(piece.index) / group.width
        for path, calls in _calls(model, example_inputs, positions).items():
            self._layers.append(_Layer(calls, positions[path]))
        self._of_group: dict[str, list[_Layer]] = {
            name: [layer for layer in self._layers if name in layer.groups] for name in self.widths
        }

    def total(self, widths: Mapping[str, int]) -> float:
        """Return the milliseconds of all layers that can shrink, at these numbers of channels.

        Args:
            widths: Channels by group name; groups that are not named keep all.
        """
        return sum(float(self._ms(layer, widths)) for layer in self._layers)

    def around(self, group: str, options: NDArray[np.int64], widths: Mapping[str, int]) -> NDArray[np.float64]:
        """Return the milliseconds of the layers that a group runs through, at several widths of it.

        Args:
            group: Its name.
            options: Numbers of its channels, shape `[options]`.
            widths: Channels of the other groups.

        Returns:
            Times, float64, shape `[options]`.
        """
        total = np.zeros(len(options))
        for layer in self._of_group[group]:
            total += self._ms(layer, {**widths, group: options})
        return total

    def _ms(self, layer: _Layer, widths: Widths) -> NDArray[np.float64]:
        shape = layer.calls[0]
        lost = [
            sum(((self.widths[name] - widths[name]) * each for name, each in held.items() if name in widths), start=0.0)
            for held in layer.positions
        ]
        # Positions of the weight's second dimension are the input channels of one group of a grouped convolution.
        outputs = np.rint(shape.outputs - np.asarray(lost[0])).astype(np.int64)
        inputs = np.rint(shape.inputs - np.asarray(lost[1]) * shape.groups).astype(np.int64)
        inputs, outputs = np.maximum(inputs, 1), np.maximum(outputs, 1)
        total = np.zeros(np.broadcast_shapes(inputs.shape, outputs.shape))
        for each in layer.calls:
            total = total + self._table.ms(each, inputs, outputs)
        return total


def _calls(model: nn.Module, example_inputs: Any, paths: Iterable[str]) -> dict[str, tuple[LayerShape, ...]]:
    """Run the network once and return the shapes that convolutions and linear layers of these paths run at."""
    found: dict[str, list[LayerShape]] = {}
    modules, hooks, samples = dict(model.named_modules()), [], batch_size_of(example_inputs)

    def note(path: str) -> Any:
        def hook(layer: Any, given: tuple[Tensor, ...], returned: Tensor) -> None:
            found.setdefault(path, []).append(LayerShape.of(layer, given[0], returned, samples))

        return hook

    for path in paths:
        if isinstance(layer := modules.get(path), (nn.Conv2d, nn.Linear)):
            hooks.append(layer.register_forward_hook(note(path)))
    try:
        with evaluation_mode(model), torch.no_grad():
            call(model, example_inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return {path: tuple(shapes) for path, shapes in found.items()}
