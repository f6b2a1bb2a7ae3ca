"""What has been chosen so far, while a network shrinks: kept channels, factors and steps, on the dense network.

Surgery renumbers channels; a plan speaks of the dense network. :class:`LivePlan` keeps both: for each group the
dense channel behind each channel there now, those of them that stay, and what their gates have been multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nni_plugin.budgets import Size
from nni_plugin.errors import ScheduleError
from nni_plugin.groups import ChannelGroup
from nni_plugin.machine import library_versions
from nni_plugin.plan import GroupPlan, ModelIdentity, PruningPlan


class LivePlan:
    """The state of a pruning run, in the numbering of the network as it is and as it was.

    Args:
        groups: The prunable groups of the dense network.

    Attributes:
        dense_widths: Channels of each group of the dense network.
        origin: The dense channel behind each channel there now, by group name, int64, shape `[width now]`.
        kept: Channels that stay, in the numbering of now, ascending.
        factors: What the gate of each channel there now has been multiplied by, float64, shape `[width now]`.
        steps: One record a pruning step: sizes, and what is known of the loss.
    """

    def __init__(self, groups: Iterable[ChannelGroup]) -> None:
        self.dense_widths = {group.name: group.width for group in groups}
        self.origin = {name: torch.arange(width) for name, width in self.dense_widths.items()}
        self.kept = dict(self.origin)
        self.factors = {name: torch.ones(width, dtype=torch.float64) for name, width in self.dense_widths.items()}
        self.steps: list[dict[str, float]] = []

    @property
    def is_cut(self) -> bool:
        """Whether channels have left the network physically."""
        return any(len(self.origin[name]) != width for name, width in self.dense_widths.items())

    def multiply(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take in factors of the channels that stay; returns them with one for those that go."""
        moved = {}
        for name, factor in factors.items():
            moved[name] = torch.ones_like(self.factors[name])
            moved[name][self.kept[name]] = factor.double()[self.kept[name]]
            self.factors[name] = self.factors[name] * moved[name]
        return moved

    def record(self, size: Size, loss_before: float | None, predicted: float | None) -> None:
        """Note a step: the size that it leaves, the mean loss of its window, and the predicted change of the loss."""
        step: dict[str, float] = {"channels": size.channels, "macs": size.cost.macs, "params": size.cost.params}
        if loss_before is not None:
            step["loss_before"] = loss_before
        if predicted is not None:
            step["predicted_loss_change"] = predicted
        self.steps.append(step)

    def measure(self, loss: float, step: int = -1) -> None:
        """Note the mean loss after a step, on the minibatches of its window."""
        self.steps[step]["loss_change"] = loss - self.steps[step]["loss_before"]

    def narrow(self) -> None:
        """Follow a physical cut: the channels that stay are all there is."""
        self.origin = {name: self.origin[name][index] for name, index in self.kept.items()}
        self.factors = {name: self.factors[name][index] for name, index in self.kept.items()}
        self.kept = {name: torch.arange(len(index)) for name, index in self.kept.items()}

    def relative(self, kept: Mapping[str, Tensor] | None = None) -> PruningPlan:
        """Return the plan on the network as it is now, without factors: they have been folded in."""
        kept = self.kept if kept is None else kept
        groups = (GroupPlan(name, len(self.origin[name]), tuple(index.tolist())) for name, index in kept.items())
        return PruningPlan(tuple(groups))

    def whole(
        self,
        ranges: Mapping[str, tuple[float, float]],
        before: Size,
        after: Size,
        model: ModelIdentity | None,
        provenance: Mapping[str, Any],
    ) -> PruningPlan:
        """Return the plan on the dense network.

        Args:
            ranges: Lowest and highest score by group name.
            before: Size of the dense network.
            after: Size without the channels removed so far.
            model: How to build the dense network again.
            provenance: How the plan was made; steps and versions are added.
        """
        groups = []
        for name, width in self.dense_widths.items():
            kept = self.kept[name]
            factor = self.factors[name][kept]
            factors = None if bool((factor == 1).all()) else tuple(factor.tolist())
            groups.append(GroupPlan(name, width, tuple(self.origin[name][kept].tolist()), factors, ranges.get(name)))
        changes = [step.get("predicted_loss_change") for step in self.steps]
        steps = [dict(step) for step in self.steps]
        return PruningPlan(
            groups=tuple(groups),
            model=model,
            cost_before=before.cost,
            cost_after=after.cost,
            predicted_loss_change=sum(c for c in changes if c is not None) if changes and None not in changes else None,
            provenance={**provenance, "steps": steps, "versions": library_versions()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as dicts of tensors and numbers."""
        steps = [dict(step) for step in self.steps]
        return {"origin": dict(self.origin), "kept": dict(self.kept), "factors": dict(self.factors), "steps": steps}

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that a saved state is of this network.

        Raises:
            ScheduleError: It is of another.
        """
        widths = {name: len(index) for name, index in state["origin"].items()}
        if widths.keys() != self.dense_widths.keys() or any(widths[n] > w for n, w in self.dense_widths.items()):
            raise ScheduleError("The saved pruning state is of another network; start again without resuming.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        self.check(state)
        self.origin, self.kept, self.factors = (dict(state[name]) for name in ("origin", "kept", "factors"))
        self.steps = [dict(step) for step in state["steps"]]
