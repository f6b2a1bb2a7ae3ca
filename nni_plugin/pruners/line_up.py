"""Let the masked channels of a grouped layer line up, so that they can leave.

The blocks of a grouped convolution (RegNet, ResNeXt) must stay equally wide, and its weight has one column for the
first input of every block, one for the second, and so on: channels leave at the same place of each block or not at
all. Masks that were made filter by filter take as many from each block, if the pruner is careful, but never at the
same places. The order of channels within a block is free, though: when every tensor that holds them is reordered
alike, the network computes the same. So in each block masked channels are moved to the places they have in the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.adapters.torch_pruning.surgery import CUTS
from nni_plugin.groups import ChannelGroup, Member, Slice
from nni_plugin.plan import PruningPlan
from nni_plugin.tensors import tensor_of


@dataclass(frozen=True)
class Order:
    """A new order of one group's channels.

    Args:
        group: The group.
        source: The old channel at each new place, int64, shape `[width]`.
        blocks: The block of each channel, int64, shape `[width]`; no channel leaves its block.
    """

    group: ChannelGroup
    source: Tensor
    blocks: Tensor

    @property
    def inverse(self) -> Order:
        """The order that takes this one back."""
        return Order(self.group, self.source.argsort(), self.blocks)


def order_of(model: nn.Module, group: ChannelGroup, dead: Tensor) -> Order | None:
    """Find the order in which as many dead channels as possible can leave a group with tied channels.

    Args:
        model: The network that the group was found on.
        group: A coupled group.
        dead: Which channels are masked without effect; bool, shape `[width]`.

    Returns:
        The order; None where nothing can be gained, or the group's grouped layers divide it differently.
    """
    blocks = _blocks(model, group)
    if blocks is None:
        return None
    number = int(blocks.max()) + 1
    least = min(int(dead[blocks == block].sum()) for block in range(number))
    loose = torch.zeros(group.units, dtype=torch.int64).scatter_add_(0, group.unit, (~dead).long())
    if least == 0 or int((loose == 0).sum()) >= least:
        return None
    source = torch.arange(group.width)
    places = dead[blocks == 0].nonzero().flatten()[:least]
    for block in range(number):
        here = (blocks == block).nonzero().flatten()
        goes = here[dead[here]][:least]
        order = torch.empty_like(here)
        order[places] = goes
        stays = torch.ones(len(here), dtype=torch.bool)
        stays[places] = False
        order[stays] = here[~torch.isin(here, goes)]
        source[here] = order
    return Order(group, source, blocks)


def _blocks(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """Return the block of each channel, where all tied layers of a group divide it into the same equal blocks."""
    if group.tied is not None:
        return None  # by something else than equal blocks, as the rows of a head are
    found: Tensor | None = None
    for member in group.members:
        if len(torch.bincount(member.channel, minlength=group.width).unique()) > 1:
            return None  # it holds only some of the channels, and an order may not carry others in
        if member.ties is None:
            continue
        layer = model.get_submodule(member.path)
        number = layer.groups if isinstance(layer, _ConvNd) else int(getattr(layer, "num_groups", 1))
        # Only where the layer holds just these channels, in their order, does a place in a block mean the same to all.
        in_order = torch.arange(group.width)
        if not torch.equal(member.channel, in_order) or not torch.equal(member.index, in_order):
            return None
        blocks = in_order // (group.width // number)
        if found is not None and not torch.equal(found, blocks):
            return None
        found = blocks
    return found


def reorder(model: nn.Module, masks: Mapping[str, Tensor], order: Order) -> None:
    """Put the channels of a group into another order, in every tensor that holds them, and in their masks.

    Args:
        model: Changed in place; it computes what it computed.
        masks: Masks of parameters by name, changed in place likewise.
        order: The order.
    """
    for member in order.group.members:
        folded = _folded(model, member)
        for piece in member.slices:
            tensor = tensor_of(model, piece.tensor)
            change = None if piece.tensor == folded else _change(piece, order, tensor.shape[piece.dim])
            for values in (tensor.data, tensor.grad, masks.get(piece.tensor)):
                if values is not None:
                    moved = (
                        _by_block(values, order)
                        if change is None
                        else values.index_select(piece.dim, change.to(values.device))
                    )
                    values.copy_(moved)


def note_orders(model: nn.Module, plan: PruningPlan, orders: Iterable[Order]) -> None:
    """Let an optimizer that is carried over the cut follow the new orders too.

    What a cut kept is told in the old order. Of a weight whose blocks were ordered each in its own way it cannot be
    told, so its state is made to start afresh.

    Args:
        model: The network after the plan has been applied.
        plan: The plan.
        orders: The orders that were taken before.
    """
    digest = plan.digest
    for order in orders:
        for member in order.group.members:
            folded = _folded(model, member)
            for piece in member.slices:
                noted = CUTS.get(tensor_of(model, piece.tensor), [])
                if not noted or noted[-1].digest != digest or not noted[-1].shape:
                    continue
                last = noted[-1]
                if piece.tensor == folded:
                    noted[-1] = replace(last, shape=())
                elif piece.dim in last.keep:
                    change = _change(piece, order, last.shape[piece.dim])
                    noted[-1] = replace(last, keep={**last.keep, piece.dim: change[last.keep[piece.dim]]})


def _folded(model: nn.Module, member: Member) -> str | None:
    """Return the weight whose second dimension the blocks of a grouped convolution share, where the member is one."""
    layer = None if member.kind == "parameter" else model.get_submodule(member.path)
    if member.ties is None or not isinstance(layer, _ConvNd) or (member.axis == "in") == layer.transposed:
        return None
    return f"{member.path}.weight" if member.path else "weight"


def _by_block(weight: Tensor, order: Order) -> Tensor:
    """Reorder the columns of a grouped weight, in each block of its rows by the order of that block."""
    number = int(order.blocks.max()) + 1
    size = len(order.blocks) // number
    columns = (order.source % size).reshape(number, size).to(weight.device)
    parts = zip(weight.chunk(number, 0), columns, strict=True)
    return torch.cat([part.index_select(1, places) for part, places in parts])


def _change(piece: Slice, order: Order, size: int) -> Tensor:
    """Return the old position at each new one of a dimension; a channel may hold several."""
    held = piece.index[piece.channel.argsort(stable=True)].reshape(len(order.source), -1)
    result = torch.arange(size)
    result[held.flatten()] = held[order.source].flatten()
    return result
