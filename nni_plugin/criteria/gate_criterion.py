"""What the criteria on gates share: where the gates of a group lie, sums over minibatches, scores from sums.

A subclass says what one minibatch gives at each layer (gradients of parameters, or of every sample), what of the
joint gate gradients is summed up, and how sums become scores. It is scored group by group, yet computed for all
groups at once. Without groups (a stock pruner that finds its own) each minibatch's terms are kept layer by layer
and combined when a group is named.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin.criteria.base import Conclusion, Criterion
from nni_plugin.criteria.first_order import member_gates
from nni_plugin.criteria.gates import GateLayout, accumulable
from nni_plugin.criteria.per_sample import PerSampleGates
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.tensors import NORMS, Axis, kind_of

Gates = Literal["auto", "bn", "weight", "input"]

Sums = dict[str, Tensor]
"""Statistics of gates by name, each `[gates]`: sums over minibatches (or over samples)."""


class GateCriterion(Criterion):
    """Base of the criteria that read gradients of joint gates.

    Args:
        gates: Where the gate lies. `"bn"`: after the normalisations that write the channel, an error for a group
            without. `"weight"`: on the dense layers that write it. `"input"`: on the layers that read it. `"auto"`:
            `"bn"`, the writer's own weights where it is followed by no normalisation, and the readers where a
            normalisation has no affine parameters or the channel is read both directly and through a depthwise layer.
    """

    per_sample = False
    """Whether a minibatch gives gate gradients of every sample, `[N, positions]`, or of its mean, `[positions]`."""

    needs_groups = False
    """Whether `collect` must be told the groups."""

    _layout: GateLayout | None = None
    _watcher: PerSampleGates | None = None

    def __init__(self, gates: Gates = "auto") -> None:
        if gates not in ("auto", "bn", "weight", "input"):
            raise CriterionError(f"gates must be 'auto', 'bn', 'weight' or 'input', got {gates!r}.")
        self.gates = gates
        super().__init__()

    @contextmanager
    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> Iterator[Criterion]:
        """Watch a network while minibatches run; nothing stays on it afterwards.

        Args:
            model: The network whose gradients will be read; a distributed wrapper is looked through.
            groups: The groups that will be scored. With them memory stays at a few numbers a channel; without
                them rows are kept per minibatch until a group is named.

        Raises:
            CriterionError: The network is frozen, this criterion is collecting already, or a group has no gate.
        """
        with super().collect(model, groups):
            assert self._model is not None
            if self.needs_groups and not groups:
                raise CriterionError(f"{type(self).__name__} weighs all groups together: pass them to collect().")
            layout = GateLayout((group, self._members(self._model, group)) for group in groups) if groups else None
            if self.minibatches and layout is not None and self._layout is not None and layout != self._layout:
                raise CriterionError(f"{type(self).__name__} holds data of other groups; call reset() before.")
            self._layout = layout
            try:
                if not self.per_sample:
                    yield self
                else:
                    members = self._layout.members if self._layout else self._all_members(self._model)
                    with PerSampleGates(self._model, members) as watcher:
                        self._watcher = watcher
                        yield self
            finally:
                self._watcher = None

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self.samples = 0
        self._sums: Sums = {}
        self._rows: dict[tuple[str, Axis], list[Tensor]] = {}

    # -- what a subclass says ----------------------------------------------------------------------------

    def _terms(self, model: nn.Module, members: Sequence[Member]) -> list[Tensor]:
        """Return what the minibatch gives at each member, shape `[..., positions]`."""
        if self._watcher is not None:
            return [term / self.loss_scale for term in self._watcher.take()]
        return [accumulable(term) for term in member_gates(model, members)]

    @abstractmethod
    def _statistics(self, joint: Tensor) -> Sums:
        """Return what to sum over minibatches, from joint gate gradients `[..., gates]`; each `[gates]`."""

    @abstractmethod
    def _scores(self, mean: Sums) -> Tensor:
        """Return the scores, `[gates]`, from sums divided by the number of minibatches (or samples)."""

    def _changes(self, mean: Sums) -> Tensor | None:
        """Return the predicted loss change of removing each gate alone, `[gates]`; None without a signed prediction."""
        return None

    def loss_changes(self, group: ChannelGroup) -> Tensor | None:
        """Predict how the loss changes when each channel of a group is removed alone.

        Returns:
            Changes in units of the loss, shape `[width]`; None for a criterion that predicts no sign.
        """
        changes = self._changes(self._mean(ChannelGroup.from_host(group)))
        return None if changes is None else changes.cpu()

    def conclude(self, before: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Conclusion:
        """Predict the loss change as the sum over the channels that go."""
        if self._layout is None or not self._sums:
            return Conclusion()
        changes = self._changes({key: total / self._count for key, total in self._sums.items()})
        if changes is None:
            return Conclusion()
        total = 0.0
        for name, part in self._layout.split(changes.double().cpu()).items():
            total += float(part[before[name][~torch.isin(before[name], kept[name])]].sum())
        return Conclusion(predicted_loss_change=total)

    @property
    def _count(self) -> int:
        return self.samples if self.per_sample else self.minibatches

    # -- gathering and scoring ---------------------------------------------------------------------------

    def _gather(self, model: nn.Module) -> None:
        members = self._layout.members if self._layout else self._all_members(model)
        terms = self._terms(model, members)
        self.samples += terms[0].shape[0] if self.per_sample and terms else 0
        if self._layout is not None:
            self._accumulate(self._statistics(self._layout.joint(terms)))
            return
        for member, term in zip(members, terms, strict=True):
            self._rows.setdefault((member.path, member.axis), []).append(term)

    def _accumulate(self, statistics: Sums) -> None:
        for name, value in statistics.items():
            before = self._sums.get(name)
            self._sums[name] = value if before is None else before.to(value) + value

    def _score(self, group: ChannelGroup) -> Tensor:
        return self._scores(self._mean(group)).cpu()

    def _mean(self, group: ChannelGroup) -> Sums:
        """Return the mean statistics of one group."""
        if self._layout is not None:
            gates = self._layout.gates_of(group)
            return {key: total[..., gates.to(total.device)] / self._count for key, total in self._sums.items()}
        members = self._choose(group, {key[0] for key in self._rows if key[1] == "out"})
        layout = GateLayout([(group, members)])
        sums: Sums = {}
        for minibatch in range(self.minibatches):
            terms = [self._row(member, minibatch) for member in layout.members]
            for name, value in self._statistics(layout.joint(terms)).items():
                sums[name] = sums[name] + value if name in sums else value
        return {name: total / self._count for name, total in sums.items()}

    def _row(self, member: Member, minibatch: int) -> Tensor:
        rows = self._rows.get((member.path, member.axis), [])
        if len(rows) != self.minibatches:
            raise CriterionError(f"Layer {member.path!r} had no gradient to collect.")
        if int(member.index.max()) >= rows[minibatch].shape[-1]:
            raise CriterionError(f"Layer {member.path!r} has changed since its gradients were collected.")
        return rows[minibatch]

    # -- where the gates lie -----------------------------------------------------------------------------

    def _members(self, model: nn.Module, group: ChannelGroup) -> tuple[Member, ...]:
        affine = {
            member.path
            for member in group.writers
            if member.kind != "norm" or getattr(model.get_submodule(member.path), "weight", None) is not None
        }
        return self._choose(group, affine)

    def _choose(self, group: ChannelGroup, scorable: set[str]) -> tuple[Member, ...]:
        """Return the members whose gate gradients make up the group's; `scorable` has the writers with parameters."""
        if self.gates == "bn":
            members = group.writers
            missing = [m.path for m in members if m.kind != "norm" or m.path not in scorable]
            if missing:
                raise CriterionError(
                    f"Group {group.name!r} is written by {missing[0]!r} without an affine normalisation behind it; "
                    "use gates='auto', 'weight' or 'input'."
                )
        elif self.gates == "weight":
            members = tuple(m for m in group.members if m.axis == "out" and m.kind == "dense" and not m.beside)
        elif self.gates == "input" or group.forked or not all(m.path in scorable for m in group.writers):
            members = group.readers
        elif self.per_sample and any(m.kind == "parameter" for m in group.writers):
            members = group.readers  # no hook sees the output of a bare parameter
        else:
            members = group.writers
        if not members:
            raise CriterionError(f"Group {group.name!r} has no layer to score under gates={self.gates!r}.")
        return members

    def _all_members(self, model: nn.Module) -> list[Member]:
        """Return every place a group might be scored at, for a collection before groups are known."""
        none = torch.empty(0, dtype=torch.int64)
        found = []
        for path, layer in model.named_modules():
            kind = kind_of(layer)
            parameters = list(layer.parameters(recurse=False))
            if kind not in ("norm", "dense", "depthwise") or not parameters:
                continue
            if any(not p.requires_grad if self.per_sample else p.grad is None for p in parameters):
                continue
            is_norm = isinstance(layer, NORMS)
            if self.gates != "input" and (is_norm or self.gates != "bn") and not (is_norm and self.gates == "weight"):
                found.append(Member(path, "out", kind, none, none, ()))
            if self.gates in ("auto", "input") and kind == "dense":
                found.append(Member(path, "in", kind, none, none, ()))
        return found

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and rows collected."""
        rows = {"\n".join(key): list(values) for key, values in self._rows.items()}
        return {**super().state_dict(), "samples": self.samples, "sums": dict(self._sums), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.samples, self._sums = int(state["samples"]), dict(state["sums"])
        self._rows = {}
        for key, rows in state["rows"].items():
            path, axis = key.split("\n")
            self._rows[path, "in" if axis == "in" else "out"] = list(rows)

    def all_reduce(self) -> None:
        """Sum what every process collected; each must have collected for the same groups."""
        super().all_reduce()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self._rows:
                raise CriterionError("Pass the groups to collect() when several processes share the work.")
            self.samples = self._summed(self.samples)
            for total in self._sums.values():  # on the device of the gradients, as the process group needs
                torch.distributed.all_reduce(total)
