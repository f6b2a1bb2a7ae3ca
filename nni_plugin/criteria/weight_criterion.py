"""What the criteria on weights share: which network is read, and the filters of a channel as rows.

They need no minibatch. Weights are read when scores are asked for, never earlier, so that masks, cuts and optimizer
steps since are seen. Whose weights: inside `collect` those of the collected network; outside, those of the graph that
a group came with (as any stock importance reads them); else those of the network collected last, held weakly.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.tensors import places_of


class WeightCriterion(Criterion):
    """Base of the criteria that read weights alone: `update()` may be called, and does nothing."""

    needs_gradients = False
    needs_data = False

    @abstractmethod
    def _weigh(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        """Return the scores of a group, shape `[width]`, from the weights of a network."""

    def _gather(self, model: nn.Module) -> None:
        """Take nothing from a minibatch."""

    @torch.no_grad()
    def _score(self, group: ChannelGroup) -> Tensor:
        return self._weigh(self._network(group), group).cpu()

    def _network(self, group: ChannelGroup) -> nn.Module:
        model = self._network_of(group)
        if model is None:
            raise CriterionError(
                f"{type(self).__name__} reads weights, and group {group.name!r} came without its network: call it "
                "inside or after `with criterion.collect(model):`, or with a group of Torch-Pruning."
            )
        return model


def weight_writers(group: ChannelGroup) -> list[Member]:
    """Return the members whose filters write a group's channels: dense ones first, each in the group's order.

    Factors that only scale the signal (squeeze-excite) write nothing, and a bare parameter has no filter.
    """
    members = [m for m in group.members if m.axis == "out" and not m.beside]
    dense = [m for m in members if m.kind in ("dense", "embedding")]
    return [*dense, *(m for m in members if m.kind == "depthwise")]


def shares(
    group: ChannelGroup, members: Iterable[Member], joint: bool, what: str
) -> list[tuple[Member, Tensor, Tensor]]:
    """Return which positions of which members count for which channels.

    Args:
        group: The group.
        members: What may count.
        joint: All members that hold a channel count, or only the first one.
        what: What these members are, for the error.

    Returns:
        Each member with its positions and the channels behind them, int64, shape `[n]` both.

    Raises:
        CriterionError: Some channel is held by none of the members.
    """
    seen = torch.zeros(group.width, dtype=torch.bool)
    found = []
    for member in members:
        counts = torch.ones_like(member.channel, dtype=torch.bool) if joint else ~seen[member.channel]
        seen[member.channel] = True
        if bool(counts.any()):
            found.append((member, member.index[counts], member.channel[counts]))
    if not bool(seen.all()):
        written = ", ".join(repr(member.path) for member in group.writers[:3])
        raise CriterionError(
            f"{int((~seen).sum())} of {group.width} channels of group {group.name!r} (written by {written}) have no "
            f"{what}; leave the group whole with `ignore`, or choose another criterion."
        )
    return found


def layer_of(model: nn.Module, member: Member) -> nn.Module:
    """Return the layer of a member.

    Raises:
        CriterionError: The network has none of that name.
    """
    try:
        return model.get_submodule(member.path)
    except AttributeError as error:
        raise CriterionError(
            f"{type(model).__name__} has no layer {member.path!r}: the group is of another network."
        ) from error


def weight_of(model: nn.Module, member: Member, index: Tensor) -> Tensor:
    """Return the weights that make the channels at positions of a member's output, in float64.

    Args:
        model: The network.
        member: A dense or depthwise layer, an embedding, or a normalisation with affine parameters.
        index: Positions on its output, int64, shape `[n]`.

    Returns:
        One row a position, `[n, weights]`: its filter over all inputs and places, or its `gamma`.

    Raises:
        CriterionError: The layer is not there, is narrower than the group says, or its weights are not finite.
    """
    layer = layer_of(model, member)
    place = next((place for place in places_of(layer, "out") if place.tensor == "weight"), None)
    if place is None:
        raise CriterionError(f"Layer {member.path!r} is a {type(layer).__name__} without weights to score.")
    weight: Tensor = getattr(layer, place.tensor).detach()
    if place.period is None:
        rows = weight.movedim(place.dim, 0)
    else:  # a grouped transposed convolution folds its outputs: each of its groups has `period` of them
        assert isinstance(layer, _ConvNd)
        rows = weight.reshape(layer.groups, weight.shape[0] // layer.groups, place.period, -1).transpose(1, 2)
        rows = rows.flatten(0, 1)
    if int(index.max()) >= rows.shape[0]:
        raise CriterionError(
            f"Layer {member.path!r} has {rows.shape[0]} channels, fewer than its group says: the network has been cut "
            "since, or is another one; find the groups anew."
        )
    rows = rows[index.to(rows.device)].reshape(len(index), -1)
    if rows.device.type == "mps":  # has no float64
        rows = rows.cpu()
    rows = rows.double()
    if not bool(torch.isfinite(rows).all()):
        raise CriterionError(
            f"Layer {member.path!r} has weights that are not finite; load them anew, training has diverged."
        )
    return rows
