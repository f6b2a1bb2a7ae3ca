"""A pruning step as Torch-Pruning's own pruners take it, without their scoring: what ours is timed beside.

Fang et al., CVPR 2023 (DepGraph). A pruner builds its dependency graph once; each of its steps makes all groups anew,
and then, for each layer chosen, the group of the channels that go, which it prunes (`BasePruner.step`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch_pruning as tp
from torch import nn

from nni_plugin.cost import call

_ROOTS = [tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_LSTM]
"""The layers at which its pruners look for groups."""


class HostStep:
    """Torch-Pruning's dependency graph of a network, built by this call, with gradients on.

    Args:
        model: The network; put into eval mode.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._model = model
        self._graph = tp.DependencyGraph()
        self._graph.build_dependency(model, example_inputs, forward_fn=call, verbose=False)

    def find(self) -> int:
        """Make all groups, as at the start of every step; returns how many there are."""
        return len(list(self._graph.get_all_groups(root_module_types=_ROOTS)))

    def prune(self, channels: Mapping[str, Sequence[int]]) -> None:
        """Remove output channels, in place: a group for each layer, pruned at once.

        Args:
            channels: Positions on the layer's output, by its qualified name.
        """
        for name, positions in channels.items():
            layer = self._model.get_submodule(name)
            cut = self._graph.get_pruner_of_module(layer).prune_out_channels
            self._graph.get_pruning_group(layer, cut, list(positions)).prune()
