"""Coupled channel groups as plain index data: what must be removed together, and who writes a channel.

A trace of the network says which slices of which layers go when a channel of a root layer goes.
:class:`ChannelGroup` keeps that answer as index tensors over qualified names, in the numbering of
the network it was found on, so that scoring, masking, costing and slicing are index arithmetic and the
graph is asked once.

Writers and carriers. A *carrier* works channel by channel (a normalisation, a depthwise convolution). A
layer whose output reaches nothing but carriers of its own group is superseded by them; the layers that
remain are the group's *writers*: the last channel-wise affine step before anybody reads the channel. Each
reader then sees exactly one writer's output, so a gate on every writer is the gate on the channel: after
BN2 in a residual block, after the second BN of an inverted residual, after each of the BNs behind a
concatenation. Where two members of a group are multiplied (squeeze-excite, gated linear units, layer
scale) only one factor carries the gate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nni_plugin.errors import GraphError
from nni_plugin.flow import Step, gate_writers
from nni_plugin.tensors import Axis, kind_of, places_of, tie_period


@dataclass(frozen=True, eq=False)
class Slice:
    """The positions of one tensor dimension that belong to a group's channels.

    Args:
        tensor: Qualified name of the parameter or buffer.
        dim: Dimension that holds the channels.
        index: Positions along `dim`, int64, shape `[n]`.
        channel: The group's channel behind each position, int64, shape `[n]`.
    """

    tensor: str
    dim: int
    index: Tensor
    channel: Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one layer (or one bare parameter) in a group.

    Args:
        path: Qualified name of the layer, or of the bare parameter.
        axis: `"out"` (writes or carries the channel) or `"in"` (reads it).
        kind: `"norm"`, `"depthwise"`, `"dense"`, `"prelu"`, `"embedding"`, `"parameter"`; `""` for a layer
            that cannot be cut.
        index: Positions on the axis, int64, shape `[n]`.
        channel: The group's channel behind each position, int64, shape `[n]`.
        slices: The same, tensor by tensor.
        ties: Of a layer that works in channel groups, for each position the label of those that go together.
        writer: Whether the channel's gate lies on this member's output.
        beside: Whether it only scales the gated signal (the last layer of a squeeze-excite branch, and a
            normalisation behind it).
    """

    path: str
    axis: Axis
    kind: str
    index: Tensor
    channel: Tensor
    slices: tuple[Slice, ...]
    ties: Tensor | None = None
    writer: bool = False
    beside: bool = False


@dataclass(frozen=True, eq=False)
class SizeAttribute:
    """A number among a module's attributes that counts channels, such as `num_heads`.

    Args:
        path: Qualified name of the module.
        name: Name of the attribute.
        item: Position in it where it is a tuple or a list; None for a plain number.
        channel: The group's channel behind each thing counted, int64, shape `[n]`; the number falls by one for each
            that is gone.
    """

    path: str
    name: str
    item: int | None
    channel: Tensor


@dataclass(frozen=True, eq=False)
class Passage:
    """Where channels enter or leave a module that takes a statistic over channels.

    Args:
        path: Qualified name of the module.
        side: `"in"` (its first tensor) or `"out"`.
        dim: Dimension of that tensor.
        index: Positions along it, int64, shape `[n]`.
        channel: The group's channel behind each position, int64, shape `[n]`.
    """

    path: str
    side: Axis
    dim: int
    index: Tensor
    channel: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are coupled across layers, one unit of removal each (or a few tied ones).

    Args:
        name: Qualified name of the root layer.
        width: Number of channels.
        members: Every axis of every layer that holds these channels, the root first.
        fixed: Why the group must keep all its channels; None when it may be pruned.
        host: The group in Torch-Pruning's form, for its importances, which read that.
        forked: Whether a writer's output is read both directly and through a carrier. Gates on the writers then
            count the second way twice, and only the readers' side gives the channel's gate.
        sizes: Numbers among modules' own attributes that count these channels.
        passages: Where these channels enter and leave modules whose statistics change when one is removed.
        part: Which part of a transformer they are: `"heads"`, `"head_dim"`, `"mlp"`, `"embedding"`; `""` elsewhere.
        tied: Label of the unit of removal of each channel, where more goes together than grouped layers say (the
            rows of a head, the halves of a split); None where these say it all.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    fixed: str | None = None
    host: Any = field(default=None, repr=False)
    forked: bool = False
    sizes: tuple[SizeAttribute, ...] = ()
    passages: tuple[Passage, ...] = ()
    part: str = ""
    tied: Tensor | None = field(default=None, repr=False)

    @property
    def writers(self) -> tuple[Member, ...]:
        """The members on whose output the channel's gate lies."""
        return tuple(member for member in self.members if member.writer)

    @property
    def readers(self) -> tuple[Member, ...]:
        """The dense layers that read the channel."""
        return tuple(member for member in self.members if member.axis == "in")

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every tensor slice of every member."""
        return tuple(piece for member in self.members for piece in member.slices)

    @cached_property
    def unit(self) -> Tensor:
        """Label of the unit of removal of each channel: int64, shape `[width]`, labels `0..units-1`.

        Channels tied by a grouped convolution or a GroupNorm share a label.
        """
        if self.tied is not None:
            tied: Tensor = torch.unique(self.tied, return_inverse=True)[1]
            return tied
        if all(member.ties is None for member in self.members):
            return torch.arange(self.width)
        label = list(range(self.width))

        def root(i: int) -> int:
            while label[i] != i:
                label[i] = label[label[i]]
                i = label[i]
            return i

        for member in self.members:
            if member.ties is None:
                continue
            first: dict[int, int] = {}
            for tie, channel in zip(member.ties.tolist(), member.channel.tolist(), strict=True):
                a, b = root(first.setdefault(tie, channel)), root(channel)
                label[max(a, b)] = min(a, b)
        roots = torch.tensor([root(i) for i in range(self.width)])
        labels: Tensor = torch.unique(roots, return_inverse=True)[1]
        return labels

    @property
    def units(self) -> int:
        """Number of units of removal."""
        return int(self.unit.max()) + 1

    @cached_property
    def make(self) -> frozenset[tuple[str, str]]:
        """Which layers the channels run through, up to the numbers in their names: equal in blocks built alike."""
        return frozenset((re.sub(r"\d+", "#", member.path), member.axis) for member in self.members)

    @property
    def least(self) -> int:
        """The fewest channels that it makes sense to keep: two where a statistic is taken over them, else one."""
        return 2 if self.passages else 1

    @property
    def residual(self) -> bool:
        """Whether an addition couples the channels of several layers, as the skip connections of a stage do.

        Molchanov et al., CVPR 2019, prune either only these channels, or all but these, or both. Told by the layers:
        some channel is written by more than one dense layer (an embedding is one). Concatenated layers write
        channels of their own, and factors of a product are not counted. A layer that is called in several places on
        channels it has written itself counts as an addition would.
        """
        return self._summands > 1

    @property
    def blocks(self) -> int:
        """Number of blocks that share a channel through additions, at least 1: the most on one channel.

        One dense layer begins the sum and each block adds to it, so it is one less than the dense layers that write
        the channel. By it the score of a gate that a whole stage shares may be divided (Molchanov et al., CVPR 2019;
        3, 4, 6 and 3 in ResNet-50).
        """
        return max(1, self._summands - 1)

    @cached_property
    def _summands(self) -> int:
        """The largest number of dense layers that write one channel."""
        writers: dict[int, set[str]] = {}
        for member in self.members:
            if member.axis == "out" and member.kind in ("dense", "embedding") and not member.beside:
                for channel in member.channel.tolist():
                    writers.setdefault(channel, set()).add(member.path)
        return max(map(len, writers.values()), default=0)

    def freeze(self, reason: str) -> ChannelGroup:
        """Return the same group, not to be pruned for the given reason."""
        return replace(self, fixed=reason)

    @classmethod
    def from_host(cls, group: Any) -> ChannelGroup:
        """Read a group in the form of Torch-Pruning's dependency graph, as its pruners hand it to a criterion.

        Args:
            group: A sequence of items with `.dep.target` (node), `.dep.handler` (pruning function),
                `.idxs` and `.root_idxs`, root first, as Torch-Pruning's `Group` is.

        Returns:
            The group with its channels numbered `0..len(group[0].idxs)-1` in the order of the root.

        Raises:
            GraphError: The group comes from no graph that knows its layers' names.
        """
        graph = getattr(group, "_DG", None)
        if isinstance(group, ChannelGroup):
            return group
        if graph is None or len(group) == 0:
            raise GraphError("Expected a group of a built dependency graph, got one without its graph.")
        number = {int(index): i for i, index in enumerate(group[0].idxs)}
        steps = _steps(graph)
        outputs = [item.dep.target for item in group if item.dep.handler.__name__ != "prune_in_channels"]
        layers = [steps[node] for node in outputs if _is_layer(node)]
        writers, beside, forked = gate_writers({steps[item.dep.target] for item in group}, layers)
        members = []
        for item in group:
            node = item.dep.target
            if not _is_layer(node):
                continue
            axis: Axis = "in" if item.dep.handler.__name__ == "prune_in_channels" else "out"
            root_idxs = item.idxs if item.root_idxs is None else item.root_idxs
            member = _member(
                graph,
                node,
                axis,
                torch.tensor([int(i) for i in item.idxs], dtype=torch.int64),
                torch.tensor([number[int(i)] for i in root_idxs], dtype=torch.int64),
            )
            is_out = member.axis == "out"
            members.append(
                replace(member, writer=is_out and steps[node] in writers, beside=is_out and steps[node] in beside)
            )
        return cls(name=members[0].path, width=len(number), members=tuple(members), host=group, forked=forked)


def _is_layer(node: Any) -> bool:
    """Tell layers and bare parameters from the operators between them."""
    return isinstance(node.module, nn.Parameter) or not type(node.module).__name__.startswith("_")


def _member(graph: Any, node: Any, axis: Axis, index: Tensor, channel: Tensor) -> Member:
    if isinstance(node.module, nn.Parameter):
        path = graph._param_to_name[node.module]
        dim = node.pruning_dim % node.module.dim()
        return Member(path, axis, "parameter", index, channel, (Slice(path, dim, index, channel),))
    layer, path = node.module, graph._module2name[node.module]
    kind = kind_of(layer)
    # A layer that carries its channels through has one axis, whatever side it was reached from.
    axis = axis if kind == "dense" else "out"
    slices = []
    for place in places_of(layer, axis):
        where, who = index, channel
        if place.period is not None:
            where = index % place.period
            first = where[:, None].eq(where[None, :]).int().argmax(dim=1) == torch.arange(len(where))
            where, who = where[first], channel[first]
        slices.append(Slice(f"{path}.{place.tensor}" if path else place.tensor, place.dim, where, who))
    period = tie_period(layer, axis) if kind else None
    return Member(path, axis, kind, index, channel, tuple(slices), None if period is None else index % period)


_STEPS: WeakKeyDictionary[Any, dict[Any, Step]] = WeakKeyDictionary()


def _steps(graph: Any) -> dict[Any, Step]:
    """Return the nodes of a host's graph as steps; a graph is read once."""
    if graph not in _STEPS:
        nodes = list(graph.module2node.values())
        steps = {}
        for node in nodes:
            name = "aten.mul" if "Mul" in str(getattr(node.module, "_grad_fn", "")) else str(node.name)
            layer, kind = None, ""
            if isinstance(node.module, nn.Parameter):
                layer, kind = str(graph._param_to_name[node.module]), "parameter"
            elif _is_layer(node):
                layer, kind = str(graph._module2name[node.module]), kind_of(node.module)
            steps[node] = Step(name, "", layer, kind)
        for node in nodes:
            steps[node].inputs = [steps[near] for near in node.inputs if near in steps]
            steps[node].outputs = [steps[near] for near in node.outputs if near in steps]
        _STEPS[graph] = steps
    return _STEPS[graph]
