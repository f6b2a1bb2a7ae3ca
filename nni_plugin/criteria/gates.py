"""The joint gates of many groups as one flat vector.

Sums over coupled layers are one `index_add`, whatever the number of groups: with hundreds of layers, a Python
loop over groups would cost more than the arithmetic, and criteria that need all gates together (the Fisher
matrix of Optimal Brain Surgeon) get them side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.tensors import Axis


class GateLayout:
    """Where each channel of each group lies in a flat vector, and which layers' terms make it up.

    Args:
        chosen: Each group with the members on which its gate lies.

    Attributes:
        members: The layers to read, each `(path, axis)` once.
        size: Number of gates, over all groups.
    """

    def __init__(self, chosen: Iterable[tuple[ChannelGroup, Sequence[Member]]]) -> None:
        self.members: list[Member] = []
        self._slices: dict[str, slice] = {}
        self._groups: dict[str, ChannelGroup] = {}
        number: dict[tuple[str, Axis], int] = {}
        self._parts: list[tuple[int, Tensor, Tensor]] = []  # layer, positions on its axis, flat gates
        self.size = 0
        for group, members in chosen:
            for member in members:
                key = (member.path, member.axis)
                if key not in number:
                    number[key] = len(self.members)
                    self.members.append(member)
                self._parts.append((number[key], member.index, member.channel + self.size))
            self._slices[group.name] = slice(self.size, self.size + group.width)
            self._groups[group.name] = group
            self.size += group.width
        self._index: tuple[Tensor, Tensor] | None = None

    def __eq__(self, other: object) -> bool:
        """Tell whether two layouts put the same groups in the same places."""
        return isinstance(other, GateLayout) and self._slices == other._slices

    __hash__ = None  # type: ignore[assignment]

    def joint(self, terms: Sequence[Tensor]) -> Tensor:
        """Sum what each layer contributes to the gates of its groups.

        Args:
            terms: For each of `members` its gate gradients, shape `[..., positions]`, on one device.

        Returns:
            `dE/dz` of all gates, shape `[..., size]`.
        """
        position, gate = self._flat_index(terms)
        flat = torch.cat(list(terms), dim=-1)
        total = flat.new_zeros(*flat.shape[:-1], self.size)
        return total.index_add_(-1, gate, flat.index_select(-1, position))

    def gates_of(self, group: ChannelGroup) -> Tensor:
        """Return the gates of a group's channels, int64, shape `[width]`.

        Raises:
            CriterionError: The group is none of this layout's.
        """
        for ours in self._groups.values():
            channels = channels_of(ours, group)
            if channels is not None:
                return channels + int(self._slices[ours.name].start)
        raise CriterionError(f"Group {group.name!r} was not among the groups collected for; pass it to collect().")

    @property
    def groups(self) -> list[ChannelGroup]:
        """The groups in the order in which their gates lie."""
        return list(self._groups.values())

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a flat vector `[..., size]` by group."""
        return {name: flat[..., part] for name, part in self._slices.items()}

    def _flat_index(self, terms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the positions in the concatenated terms, and the gate that each adds to."""
        if self._index is None:
            start = [0]
            for term in terms:
                start.append(start[-1] + term.shape[-1])
            position = torch.cat([index + start[layer] for layer, index, _ in self._parts])
            gate = torch.cat([gates for _, _, gates in self._parts])
            self._index = position, gate
        position, gate = (index.to(terms[0].device) for index in self._index)
        self._index = position, gate
        return position, gate


def channels_of(ours: ChannelGroup, group: ChannelGroup) -> Tensor | None:
    """Return which channel of ours each channel of a group is, int64, shape `[width]`; None where it is another group.

    Stock pruners may reach a group from another of its layers than ours did: then the layer they started from says
    which channel is which.
    """
    if ours.width != group.width:
        return None
    if ours is group or ours.name == group.name:
        return torch.arange(group.width)
    root = group.members[0]
    for member in ours.members:
        if (member.path, member.axis) == (root.path, root.axis) and len(member.index) == len(root.index):
            at = torch.full((int(member.index.max()) + 1,), -1)
            at[member.index] = member.channel
            channels: Tensor = torch.empty(group.width, dtype=torch.int64)
            channels[root.channel] = at[root.index.clamp(max=len(at) - 1)]
            if bool((channels >= 0).all()):
                return channels
    return None


class TiedGates:
    """Channels that can only leave together (those of a grouped convolution, of a head): one gate on all of them.

    Args:
        groups: Groups whose channels lie one after the other.

    Attributes:
        unit: The number of each channel's unit, over all groups, int64, shape `[channels]`.
        number: Of units.
        sizes: Number of channels of each unit, int64, shape `[units]`.
    """

    def __init__(self, groups: Iterable[ChannelGroup]) -> None:
        units: list[Tensor] = []
        self.number = 0
        for group in groups:
            units.append(group.unit + self.number)
            self.number += group.units
        self.unit = torch.cat(units) if units else torch.empty(0, dtype=torch.int64)
        self.sizes = torch.bincount(self.unit, minlength=self.number)
        self._each_alone = torch.equal(self.unit, torch.arange(len(self.unit)))

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums over the channels of each unit, `[..., channels]` -> `[..., units]`."""
        if self._each_alone:
            return values
        return values.new_zeros(*values.shape[:-1], self.number).index_add_(-1, self.unit.to(values.device), values)

    def shared(self, values: Tensor) -> Tensor:
        """Return each unit's value in equal parts to its channels, `[units]` -> `[channels]`, which add up to it."""
        return (values / self.sizes)[self.unit]


def accumulable(term: Tensor) -> Tensor:
    """Return a term in float32 where it came in half precision, for sums over positions and minibatches."""
    return term.float() if term.dtype in (torch.float16, torch.bfloat16) else term
