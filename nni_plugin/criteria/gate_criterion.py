"""Criteria on gates that are sums over minibatches: what is summed up, and how sums become scores.

A subclass says what of the joint gate gradients is summed up, and how sums become scores. It is scored group by group,
yet computed for all groups at once. Without groups (a stock pruner that finds its own) each minibatch's terms are kept
layer by layer and combined when a group is named.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.criteria.base import Conclusion
from nni_plugin.criteria.gate_reader import GateReader
from nni_plugin.criteria.gates import GateLayout
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.tensors import Axis

Sums = dict[str, Tensor]
"""Statistics of gates by name, each `[gates]`: sums over minibatches (or over samples)."""


class GateCriterion(GateReader):
    """Base of the criteria that score each gate from sums over minibatches (or samples)."""

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self._sums: Sums = {}
        self._rows: dict[tuple[str, Axis], list[Tensor]] = {}

    # -- what a subclass says ----------------------------------------------------------------------------

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
        self._check_seen()
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
        if self._layout is not None or self._sums:
            gates = self._placed().gates_of(group)
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

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and rows collected."""
        rows = {"\n".join(key): list(values) for key, values in self._rows.items()}
        return {**super().state_dict(), "sums": dict(self._sums), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._sums = dict(state["sums"])
        self._rows = {}
        for key, rows in state["rows"].items():
            path, axis = key.split("\n")
            self._rows[path, "in" if axis == "in" else "out"] = list(rows)

    def all_reduce(self) -> None:
        """Sum what every process collected; each must have collected for the same groups."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self._rows:
                raise CriterionError("Pass the groups to collect() when several processes share the work.")
            for total in self._sums.values():  # on the device of the gradients, as the process group needs
                torch.distributed.all_reduce(total)
        super().all_reduce()
