"""What can leave a network: channels of coupled groups and whole blocks, side by side in one order of removal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import cut_channels, find_groups, sound_groups
from nni_plugin.criteria import quadratic
from nni_plugin.criteria.gates import TiedGates
from nni_plugin.errors import GraphError
from nni_plugin.groups import ChannelGroup
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.candidates import Candidates, candidate_blocks, inside, possible_removal
from nni_plugin.layers.removal import Removal
from nni_plugin.plan import GroupPlan, PruningPlan, dense_names
from nni_plugin.rounding import rounding_of
from nni_plugin.selection import Ranking


@dataclass(frozen=True)
class Limits:
    """What may leave at all."""

    candidates: Candidates
    ignore: tuple[str, ...]
    min_channels: int
    round_to: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        candidates: Candidates,
        ignore: Iterable[str | nn.Module],
        min_channels: int,
        round_to: int | None,
    ) -> Limits:
        """Take the user's words; modules to ignore go by their names in the network."""
        paths = {module: name for name, module in model.named_modules()}
        given = [ignore] if isinstance(ignore, (str, nn.Module)) else list(ignore)
        unknown = [item for item in given if isinstance(item, nn.Module) and item not in paths]
        if unknown:
            raise GraphError(f"Layer to ignore {unknown[0]!r} is not in the model; give its name or itself.")
        names = tuple(item if isinstance(item, str) else paths[item] for item in given)
        return cls(candidates, names, min_channels, rounding_of(round_to, model))


@dataclass(frozen=True)
class Items:
    """What can leave a network: units of groups (a channel, or tied ones), and blocks, in this order.

    Args:
        groups: Prunable groups.
        every: All groups, also those that stay whole.
        blocks: Removable blocks.
        holds: By a block's number those of the units and blocks inside it.
        removal: How blocks leave.
        min_channels: No group gets narrower.
        round_to: Widths become multiples of this.
    """

    groups: tuple[ChannelGroup, ...]
    every: tuple[ChannelGroup, ...]
    blocks: tuple[Block, ...]
    holds: dict[int, Tensor]
    removal: Callable[[Iterable[str]], Removal] | None
    min_channels: int
    round_to: int

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, limits: Limits) -> Items:
        """Find them in a network.

        Units of plain networks are no candidates: where one leaves, the channels on its two sides become the same.
        """
        after = [name for name in map(dense_names(model).after, limits.ignore) if name is not None]
        every = sound_groups(model, find_groups(model, example_inputs, ignore=after), example_inputs)
        groups = tuple(group for group in every if group.fixed is None)
        try:
            found = candidate_blocks(model, example_inputs, limits.candidates, after)
        except GraphError:
            if not groups:
                raise
            found = []
        blocks = tuple(block for block in found if block.kind != "unit")
        if not groups and not blocks:
            raise GraphError(f"{type(model).__name__} has neither a block nor a channel that may leave.")
        firsts = torch.tensor([0, *(group.units for group in groups)]).cumsum(0).tolist()
        holds = {}
        for number, block in enumerate(blocks):
            held = [torch.arange(firsts[i], firsts[i + 1]) for i, group in enumerate(groups) if _holds(block, group)]
            held += [torch.tensor([firsts[-1] + i]) for i, other in enumerate(blocks) if inside(other, block)]
            holds[firsts[-1] + number] = torch.cat(held) if held else torch.empty(0, dtype=torch.int64)
        removal = possible_removal(model, blocks, example_inputs) if blocks else None
        return cls(groups, tuple(every), blocks, holds, removal, limits.min_channels, limits.round_to)

    @cached_property
    def tied(self) -> TiedGates:
        """Which channels leave together."""
        return TiedGates(self.groups)

    @property
    def units(self) -> int:
        """Number of units, which come before the blocks."""
        return self.tied.number

    def __len__(self) -> int:
        return self.units + len(self.blocks)

    @property
    def sizes(self) -> Tensor:
        """How many gates each item has."""
        return torch.cat([self.tied.sizes, torch.ones(len(self.blocks), dtype=torch.int64)])

    def sums(self, gates: Tensor) -> Tensor:
        """Return a number an item, from one a gate: those of channels, then of blocks, along the last dimension."""
        channels, blocks = gates.split([gates.shape[-1] - len(self.blocks), len(self.blocks)], -1)
        return torch.cat([self.tied.sums(channels), blocks], -1)

    def costs(self, channels: dict[str, float], blocks: dict[str, float]) -> Tensor:
        """Return what each item saves (at least a trifle), from numbers a channel by group and a block by name."""
        values = [torch.full((group.width,), channels[group.name], dtype=torch.float64) for group in self.groups]
        values.append(torch.tensor([blocks[block.name] for block in self.blocks], dtype=torch.float64))
        costs = self.sums(torch.cat(values))
        return costs.clamp_min(1e-6 * float(costs.max()))

    def chosen(self, order: Tensor, number: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Return the channels kept by group, groups inside a block that leaves left out, and the blocks that leave."""
        taken = order[:number]
        leaving = [self.blocks[int(i) - self.units] for i in taken if i >= self.units]
        leaving = [block for block in leaving if not any(inside(block, other) for other in leaving)]
        position = torch.full((self.units,), float(len(order)), dtype=torch.float64)
        in_order = order[order < self.units]
        position[in_order] = torch.arange(len(in_order), dtype=torch.float64)
        parts = self.tied.shared(position).split([group.width for group in self.groups])
        scores = dict(zip((group.name for group in self.groups), parts, strict=True))
        ranking = Ranking(self.groups, scores, round_to=self.round_to, min_channels=self.min_channels)
        kept = ranking.kept(int((taken < self.units).sum()))
        within = {group.name for group in self.groups if any(_holds(block, group) for block in leaving)}
        kept = {name: index for name, index in kept.items() if name not in within}
        return kept, tuple(block.name for block in leaving)

    def slim(self, model: nn.Module, order: Tensor, number: int) -> nn.Module:
        """Return a copy of the network without so many items, not proven: to count and to time."""
        network = copy.deepcopy(model)
        kept, gone = self.chosen(order, number)
        widths = {group.name: group.width for group in self.groups}
        entries = [GroupPlan(name, widths[name], tuple(index.tolist())) for name, index in kept.items()]
        cut_channels(network, PruningPlan(tuple(entries)), self.every)
        if self.removal is not None and gone:
            self.removal(gone).perform(network)
        return network

    def plan(
        self, order: Tensor, number: int, rows: Tensor, movable: Tensor, damping: float
    ) -> tuple[PruningPlan | None, float]:
        """Return the plan of the first so many removals, with factors, and the loss change that the model expects.

        Args:
            order: Items in the order of their removal.
            number: How many of them go.
            rows: Gradients of all gates, those of channels first, `[N, gates]`.
            movable: Which gates can take a factor, `[gates]`.
            damping: Of the quadratic model.
        """
        kept, gone = self.chosen(order, number)
        removed = torch.zeros(rows.shape[1], dtype=torch.bool)
        idle = torch.zeros_like(removed)
        items = torch.cat([self.tied.unit, torch.arange(self.units, len(self))])
        channels = len(self.tied.unit)
        first = 0
        for group in self.groups:
            if group.name in kept:
                removed[first : first + group.width] = True
                removed[first + kept[group.name]] = False
            first += group.width
        for number_of, block in enumerate(self.blocks):
            if block.name in gone:
                removed[channels + number_of] = True
                held = torch.isin(items, self.holds[self.units + number_of])
                idle[held], removed[held] = True, False
        if not bool(removed.any()):
            return None, 0.0
        z = quadratic.Compensation(rows, removed, movable=movable & ~idle)(damping)
        change = quadratic.loss_change(rows, z)
        entries, first = [], 0
        for group in self.groups:
            if group.name in kept:
                index = kept[group.name]
                can = bool(movable[first : first + group.width].all())
                factors = tuple(z[first + index].tolist()) if can else None
                entries.append(GroupPlan(group.name, group.width, tuple(index.tolist()), factors))
            first += group.width
        return PruningPlan(tuple(entries), gone), change


def _holds(block: Block, group: ChannelGroup) -> bool:
    """Tell whether all layers that write a group's channels lie in a block."""
    return all(block.holds(member.path) for member in group.members if member.axis == "out")
