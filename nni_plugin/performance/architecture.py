"""One flat vector for the widths of a whole network: a gate for each unit of removal of each coupled group.

A unit is one channel, or the few that a grouped convolution or a GroupNorm ties together, so that every 0/1 vector is
a network that can be cut. Groups follow each other in the order of the network: that order is the sequence which the
performance network reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nni_plugin.checks import Selection
from nni_plugin.errors import GraphError
from nni_plugin.groups import ChannelGroup


class ArchitectureLayout:
    """Where the gates of each group lie in a flat vector.

    Args:
        groups: The groups with gates; each must be prunable.
        device: Where vectors and indices live.

    Attributes:
        groups: The same groups.
        slices: The entries of a vector that belong to each group, by name.
        size: Number of gates `N`.
        channels: Number of channels of all groups.
        owner: The number of the group behind each gate, int64, shape `[N]`.
        unit_sizes: Number of channels behind each gate, int64, shape `[N]`.
    """

    def __init__(self, groups: Sequence[ChannelGroup], device: torch.device | str = "cpu") -> None:
        self.groups, self.device = list(groups), torch.device(device)
        self.slices: dict[str, slice] = {}
        self.channel_slices: dict[str, slice] = {}
        self.size = self.channels = 0
        for group in self.groups:
            self.slices[group.name] = slice(self.size, self.size + group.units)
            self.channel_slices[group.name] = slice(self.channels, self.channels + group.width)
            self.size += group.units
            self.channels += group.width
        units = [group.unit + self.slices[group.name].start for group in self.groups]
        owners = [torch.full((group.units,), number) for number, group in enumerate(self.groups)]
        self._unit = torch.cat(units).to(self.device) if units else torch.zeros(0, dtype=torch.int64)
        self._single = self.size == self.channels and bool((self._unit.cpu() == torch.arange(self.size)).all())
        self.owner = torch.cat(owners).to(self.device) if owners else torch.zeros(0, dtype=torch.int64)
        self.unit_sizes = torch.bincount(self._unit, minlength=self.size)

    @property
    def widths(self) -> list[int]:
        """Number of gates of each group, in their order."""
        return [part.stop - part.start for part in self.slices.values()]

    def expand(self, architecture: Tensor) -> Tensor:
        """Return one value a channel, shape `[channels]`, from one a gate, shape `[N]`; differentiable."""
        return architecture if self._single else architecture.index_select(0, self._unit)

    def split(self, architecture: Tensor) -> dict[str, Tensor]:
        """Return a vector `[..., N]` by group."""
        return {name: architecture[..., part] for name, part in self.slices.items()}

    def kept(self, architecture: Tensor) -> dict[str, Tensor]:
        """Return the channels that a 0/1 vector `[N]` keeps, as ascending indices on the CPU, by group name."""
        on = self.expand(architecture.detach()).cpu() >= 0.5
        return {name: on[part].nonzero().flatten() for name, part in self.channel_slices.items()}

    def architecture(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Return the 0/1 vector `[N]`, float32, of channels kept by group name; groups not named keep all.

        A unit counts as kept when all its channels are.
        """
        result = torch.ones(self.size)
        for group in self.groups:
            if group.name in kept:
                gone = torch.ones(group.width, dtype=torch.bool)
                gone[kept[group.name].cpu()] = False
                result[self.slices[group.name]][group.unit[gone]] = 0
        return result.to(self.device)


def gated_groups(groups: Iterable[ChannelGroup], select: Selection = "no-skip") -> list[ChannelGroup]:
    """Return the groups that get gates: prunable, read by some dense layer, and selected.

    Args:
        groups: All groups of the network.
        select: `"no-skip"`: those inside of blocks, as in the paper. `"skip-only"`: those that additions couple
            across blocks. `"all"`: both.

    Raises:
        GraphError: There is none; the text says why.
    """
    if select not in ("no-skip", "skip-only", "all"):
        raise GraphError(f"select must be 'no-skip', 'skip-only' or 'all', got {select!r}.")
    groups = list(groups)
    chosen = [
        group
        for group in groups
        if group.fixed is None and group.readers and (select == "all" or group.residual == (select == "skip-only"))
    ]
    if not chosen:
        reasons = [f"{group.name}: {group.fixed or f'select={select!r} leaves it whole'}" for group in groups[:5]]
        raise GraphError(f"No group of channels can have gates. {'; '.join(reasons)}")
    return chosen
