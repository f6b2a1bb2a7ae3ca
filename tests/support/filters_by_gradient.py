"""Which weights make an output channel of a layer, asked of autograd instead of looking at the layout of tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nni_plugin.groups import ChannelGroup

WRITERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def own_weights(layer: nn.Module, position: int) -> Tensor:
    """Return, in a fixed order, the weights on which an output channel of a layer depends."""
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    sides = () if isinstance(layer, nn.Linear) else (8, 8)
    x = torch.rand(1, width, *sides, dtype=layer.weight.dtype) + 1
    (gradient,) = torch.autograd.grad(layer(x)[:, position].sum(), layer.weight)
    return layer.weight.detach()[gradient != 0]


def filters_of(model: nn.Module, group: ChannelGroup, channel: int) -> dict[str, Tensor]:
    """Return the weights that write a channel, by layer, in the order of the group's members."""
    found: dict[str, list[Tensor]] = {}
    for member in group.members:
        layer = model.get_submodule(member.path) if member.kind != "parameter" else None
        if member.axis == "in" or member.beside or not isinstance(layer, WRITERS):
            continue
        for position, behind in zip(member.index.tolist(), member.channel.tolist(), strict=True):
            if behind == channel:
                found.setdefault(member.path, []).append(own_weights(layer, position))
    return {path: torch.cat(parts) for path, parts in found.items()}
