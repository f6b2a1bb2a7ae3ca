"""From a trace to channel groups: whose channels are the same, whose go together, and who reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_plugin.cost import tensors_in
from nni_plugin.errors import GraphError
from nni_plugin.flow import Step, gate_writers
from nni_plugin.groups import ChannelGroup, Member, Passage, SizeAttribute, Slice
from nni_plugin.parts import DEFAULT_PARTS
from nni_plugin.tensors import Axis, kind_of, places_of, tie_period
from nni_plugin.tracing import contractions, elementwise, shapes, statistics  # noqa: F401  (their rules)
from nni_plugin.tracing.ledger import Atoms, Solved
from nni_plugin.tracing.operators import rule_of
from nni_plugin.tracing.sizes import size_attributes
from nni_plugin.tracing.trace import Trace

_NONE = -1

_SAID = {
    "heads": "an attention's heads",
    "head_dim": "the width of an attention's heads",
    "mlp": "the width of an MLP",
    "embedding": "the width of the residual stream",
}


def coupled_groups(model: nn.Module, inputs: Any, *, parts: Collection[str] = DEFAULT_PARTS) -> list[ChannelGroup]:
    """Run a network once and return its coupled channel groups.

    Args:
        model: In eval mode, with gradients on (so that no fused inference kernel hides the operators).
        inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        parts: Which parts of a transformer may shrink.

    Returns:
        One group per coupled set of channels, in module order of its first dense layer; those that meet the
        network's input, its output, or an operator that cannot be followed are fixed with the reason.
    """
    trace = Trace(model, rule_of)
    outputs = tensors_in(trace.run(inputs))
    if not outputs:
        raise GraphError(f"{type(model).__name__} returned no tensor: expected one, or dicts, tuples or dataclasses.")
    if not any(trace.value(tensor).step is not None for tensor in outputs):
        raise GraphError(f"{type(model).__name__} returned no tensor that depends on its inputs or parameters.")
    _drop_dead_ends(trace, [trace.value(tensor).step for tensor in outputs])
    if trace.unmet:
        outputs += tensors_in(trace.run_as_trained(inputs))
    for tensor in outputs:
        value = trace.value(tensor)
        at = value.step.layer or value.step.module if value.step is not None else ""
        for block in value.labels.blocks:
            trace.ledger.fix(block.atoms, "its channels are the network's output" + (f" (at {at})" if at else ""))
    return _Coupling(model, trace, trace.ledger.solve(head_dim="head_dim" in parts)).groups(parts)


def unreached(model: nn.Module, inputs: Any) -> list[str]:
    """Return the layers whose parameters a network uses neither as it is nor in training, on these inputs.

    Args:
        model: In eval mode, with gradients on.
        inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
    """
    trace = Trace(model, rule_of)
    trace.run(inputs)
    if trace.unmet:
        trace.run_as_trained(inputs)
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in trace.unmet))


def _drop_dead_ends(trace: Trace, ends: Iterable[Step | None]) -> None:
    """Forget steps that lead to no output: copies that autograd keeps, shapes that are only asked for."""
    alive: set[Step] = set()
    stack = [step for step in ends if step is not None]
    while stack:
        step = stack.pop()
        if step not in alive:
            alive.add(step)
            stack += step.inputs
    trace.steps = [step for step in trace.steps if step in alive]
    for step in trace.steps:
        step.outputs = [reader for reader in step.outputs if reader in alive]


class _Coupling:
    """The solved relations of one trace."""

    def __init__(self, model: nn.Module, trace: Trace, solved: Solved) -> None:
        self.model, self.trace, self.solved = model, trace, solved
        number = int(solved.same.max(initial=-1)) + 1
        self.group_of_unit = np.full(int(solved.tied.max(initial=-1)) + 1, _NONE)
        self.channel = np.full(number, _NONE)  # of each same-channel label, in its group
        self.first = np.full(len(self.group_of_unit), _NONE)  # a channel of each unit
        self.unit_of = np.zeros(number, np.int64)
        self.unit_of[solved.same] = solved.tied
        self.roots: list[list[int]] = []  # of each group its channels as same-channel labels, in order
        self.names: list[str] = []

    def groups(self, parts: Collection[str]) -> list[ChannelGroup]:
        """Number the channels of every group and gather its members."""
        self._number()
        members, insides = self._members(), self._inside()
        sizes = size_attributes(self.model, self.trace)
        result = []
        for index, name in enumerate(self.names):
            inside = insides[index]
            outs = [
                step
                for step in inside
                if step.layer is not None and any(self._touches(atoms, index) for atoms in step.writes)
            ]
            writers, beside, forked = gate_writers(inside, outs)
            in_order = sorted(members[index], key=lambda member: (member.path != name, member.axis != "out"))
            marked = _marked(in_order, _layers(writers), _layers(beside))
            group = ChannelGroup(
                name=name,
                width=len(self.roots[index]),
                members=tuple(marked),
                fixed=self._reason(index) or (None if inside else "no output of the network in use depends on it"),
                forked=forked,
                passages=tuple(self._passages(index)),
            )
            unit = self._units(index)
            if group.units > int(unit.max()) + 1:  # more goes together than grouped layers say
                group = replace(group, tied=unit)
            part = self._part(group, index)
            if part and part not in parts and group.fixed is None:
                group = group.freeze(f"it is {_SAID[part]}, and parts={', '.join(sorted(parts))} leaves these whole")
            result.append(replace(group, part=part))
        by_group = self._sizes(sizes, [group.fixed is None for group in result])
        return [replace(group, sizes=tuple(by_group[i])) for i, group in enumerate(result)]

    def _number(self) -> None:
        """Give every channel of a dense layer a group: that of the first layer in module order that reaches it."""
        same = self.solved.same
        roots = [
            (path, atoms)
            for path, module in self.model.named_modules()
            if kind_of(module) in ("dense", "depthwise") and (atoms := self.trace.axes.get((path, "out"))) is not None
        ]
        in_unit: dict[int, list[int]] = {}
        for _, atoms in roots:
            for label in dict.fromkeys(same[atoms].tolist()):
                in_unit.setdefault(int(self.unit_of[label]), []).append(label)
        for path, atoms in roots:
            own = [label for label in dict.fromkeys(same[atoms].tolist()) if self.channel[label] == _NONE]
            if not own:
                continue
            units = dict.fromkeys(int(self.unit_of[label]) for label in own)
            tied = [label for unit in units for label in in_unit[unit]]
            channels = list(dict.fromkeys([*own, *tied]))
            for number, label in enumerate(channels):
                self.channel[label] = number
            for unit in units:
                self.group_of_unit[unit] = len(self.names)
                self.first[unit] = self.channel[in_unit[unit][0]]
            self.roots.append(channels)
            self.names.append(path)

    def _channels(self, atoms: Atoms) -> tuple[Atoms, Atoms]:
        """Return the group and the channel in it of each atom, -1 for neither."""
        units = self.solved.tied[atoms]
        group = self.group_of_unit[units]
        channel = self.channel[self.solved.same[atoms]]
        return group, np.where(channel == _NONE, self.first[units], channel)

    def _touches(self, atoms: Atoms, index: int) -> bool:
        return bool((self.group_of_unit[self.solved.tied[atoms]] == index).any())

    def _may_shrink(self, atoms: Atoms) -> bool:
        return any(int(unit) not in self.solved.fixed for unit in np.unique(self.solved.tied[atoms]))

    def _split(self, atoms: Atoms) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Return for each group that has some of these atoms: the group, their positions, their channels."""
        group, channel = self._channels(atoms)
        for index in np.unique(group[group != _NONE]).tolist():
            on = np.flatnonzero(group == index)
            yield index, torch.from_numpy(on), torch.from_numpy(channel[on].astype(np.int64))

    def _members(self) -> list[list[Member]]:
        members: list[list[Member]] = [[] for _ in self.names]
        for name in self.trace.order:
            for axis in ("out", "in"):
                atoms = self.trace.axes.get((name, axis))
                if atoms is not None:
                    layer = self.model.get_submodule(name)
                    for index, positions, channel in self._split(atoms):
                        members[index].append(_of_layer(name, layer, axis, positions, channel))
        for (name, dim), atoms in self.trace.parameters.items():
            for index, positions, channel in self._split(atoms):
                piece = Slice(name, dim, positions, channel)
                members[index].append(Member(name, "out", "parameter", positions, channel, (piece,)))
        return members

    def _inside(self) -> list[set[Step]]:
        inside: list[set[Step]] = [set() for _ in self.names]
        for step in self.trace.steps:
            atoms = [*step.reads, *step.writes]
            if atoms:
                units = np.concatenate([self.group_of_unit[self.solved.tied[a.ravel()]] for a in atoms])
                for index in np.unique(units[units != _NONE]).tolist():
                    inside[index].add(step)
        return inside

    def _reason(self, index: int) -> str | None:
        units = self.unit_of[self.roots[index]]
        reasons = [self.solved.fixed[int(unit)] for unit in dict.fromkeys(units.tolist()) if unit in self.solved.fixed]
        return reasons[0] if reasons else None

    def _part(self, group: ChannelGroup, index: int) -> str:
        """Tell which part of a transformer a group is; a network without attention has none."""
        if not self.solved.heads.any():
            return ""
        units = np.unique(self.unit_of[self.roots[index]])
        if bool(self.solved.heads[units].any()):
            return "heads"
        if bool(self.solved.contracted[units].any()):
            return "head_dim"
        if not isinstance(self.model.get_submodule(group.name), nn.Linear) and not group.passages:
            return ""
        return "embedding" if group.residual else "mlp"

    def _units(self, index: int) -> Tensor:
        """Return the unit of each channel of a group, numbered from 0."""
        units = self.unit_of[self.roots[index]]
        return torch.from_numpy(np.unique(units, return_inverse=True)[1].astype(np.int64))

    def _sizes(self, sizes: Iterable[SizeAttribute], prunable: list[bool]) -> list[list[SizeAttribute]]:
        """Return the attributes of each group. Where a number counts several things, the first that can shrink."""
        result: list[list[SizeAttribute]] = [[] for _ in self.names]
        known: set[tuple[str, str, int | None]] = set()
        for size in sizes:
            key = size.path, size.name, size.item
            parts = list(self._split(size.channel.numpy()))
            counted = sum(len(positions) for _, positions, _ in parts)
            if key in known or counted < len(size.channel) or not any(prunable[group] for group, _, _ in parts):
                continue
            known.add(key)
            for group, _, channel in parts:
                result[group].append(replace(size, channel=channel))
        return result

    def _passages(self, index: int) -> Iterator[Passage]:
        for path, over in self.trace.statistics.items():
            called = self.trace.calls.get(path)
            if called is None or not any(self._may_shrink(atoms) for atoms in over):
                continue
            for side, boundaries in (("in", called.entering), ("out", called.leaving)):
                for boundary in boundaries:
                    for group, positions, channel in self._split(boundary.atoms):
                        if group == index:
                            yield Passage(path, side, boundary.dim, positions, channel)  # type: ignore[arg-type]


def _layers(steps: Iterable[Step]) -> set[str]:
    return {step.layer for step in steps if step.layer is not None}


def _marked(members: Iterable[Member], writers: set[str], beside: set[str]) -> Iterator[Member]:
    """Say which members carry the gate."""
    for member in members:
        is_out = member.axis == "out"
        yield replace(member, writer=is_out and member.path in writers, beside=is_out and member.path in beside)


def _of_layer(path: str, layer: nn.Module, axis: Axis, index: Tensor, channel: Tensor) -> Member:
    slices = []
    for place in places_of(layer, axis):
        where, who = index, channel
        if place.period is not None:
            where = index % place.period
            _, first = np.unique(where.numpy(), return_index=True)
            chosen = torch.from_numpy(np.sort(first))
            where, who = where[chosen], channel[chosen]
        slices.append(Slice(f"{path}.{place.tensor}" if path else place.tensor, place.dim, where, who))
    period = tie_period(layer, axis)
    ties = None if period is None else index % period
    return Member(path, axis, kind_of(layer), index, channel, tuple(slices), ties)
