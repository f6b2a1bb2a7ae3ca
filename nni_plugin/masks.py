"""Pruning without surgery: every parameter slice of a removed channel is held at zero.

A masked network computes what the compact one computes: the writers give zero, and the readers would not
see it otherwise. Held at zero are weights of ALL members, not just the gates, so that norms, weight decay
and clipping of what remains come out as in the compact network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nni_plugin.groups import ChannelGroup, Slice
from nni_plugin.narrowing import gone_positions
from nni_plugin.plan import PruningPlan


class Masks:
    """Holds the slices of removed channels at zero.

    Args:
        model: The network, in the numbering that `groups` was found on.
        groups: Its coupled channel groups.
    """

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
        self.model = model
        self.groups = {group.name: group for group in groups}
        self.removed: dict[str, Tensor] = {}
        # Parameters, not names: they keep their identity, and hundreds of lookups a step would show.
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._dead: list[tuple[nn.Parameter, int, Tensor]] = []

    def remove(self, kept: Mapping[str, Tensor]) -> None:
        """Set which channels remain, by group name, as index tensors; groups not named stay as they are."""
        for name, channels in kept.items():
            gone = torch.ones(self.groups[name].width, dtype=torch.bool)
            gone[channels] = False
            self.removed[name] = gone
        stays = {name: ~gone.numpy() for name, gone in self.removed.items() if bool(gone.any())}
        self._dead = [
            (self._parameters[name], dim, torch.from_numpy(positions).to(self._parameters[name].device))
            for (name, dim), positions in gone_positions(self.groups.values(), stays).items()
            if isinstance(dim, int) and name in self._parameters
        ]

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Put the weights of removed channels back to zero; call it after every optimizer step."""
        for parameter, dim, index in self._dead:
            parameter.index_fill_(dim, index.to(parameter.device), 0)

    @torch.no_grad()
    def zero_grads(self) -> None:
        """Zero the gradients of removed channels; call it before gradients are clipped."""
        for parameter, dim, index in self._dead:
            gradient = parameter.grad
            if gradient is not None:
                gradient.index_fill_(dim, index.to(gradient.device), 0)


def removed_positions(piece: Slice, gone: Tensor) -> Tensor:
    """Return the positions of a slice whose channel is gone (`gone`: bool, shape `[width]`)."""
    return piece.index[gone[piece.channel]]


def mask_plan(model: nn.Module, plan: PruningPlan, groups: Iterable[ChannelGroup]) -> nn.Module:
    """Zero, in place, every parameter slice that a plan would remove; returns the same model."""
    masks = Masks(model, groups)
    masks.remove({name: torch.tensor(kept) for name, kept in plan.kept().items() if name in masks.groups})
    masks.zero_weights()
    return model
