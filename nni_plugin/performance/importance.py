"""Learned gates as a criterion: what a search found, for whoever ranks channels.

The score of a channel is its gate's value `w + b`, the larger the likelier kept (Gao et al., CVPR 2021). It serves
`plan_channels` as well as, given as `importance=`, any stock pruner of Torch-Pruning. Groups without gates stay whole.

Cost: none; the gates have been learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.gates import GateLayout
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.performance.gates import DifferentiableGates


class GateImportance(Criterion):
    """Scores channels with learned gates.

    Args:
        gates: The gates, of a search that is over; their values are copied.
    """

    needs_gradients = False
    needs_data = False
    is_ranking = True  # values of gates are no losses: nothing to average, and nothing to divide by a cost

    def __init__(self, gates: DifferentiableGates) -> None:
        super().__init__()
        gates.check()
        layout = gates.layout
        self._groups_with_gates = {group.name: group for group in layout.groups}
        self._places = GateLayout((group, group.members) for group in layout.groups)
        values = gates.logits.detach() + gates.offset
        # Whoever ranks sums over the channels of a unit.
        self._values = layout.expand(values / layout.unit_sizes).double().cpu()

    @contextmanager
    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> Iterator[Criterion]:
        """Do nothing but what every criterion does: there is nothing to collect."""
        with super().collect(model, groups):
            yield self

    def __call__(self, group: Any) -> Tensor:
        """Score the channels of a group.

        Args:
            group: A :class:`ChannelGroup`, or a group of Torch-Pruning holding all channels of its root.

        Returns:
            Scores, float64, shape `[width]`; all `inf` for one of our groups that has no gates, so that it stays whole,
            and None for one of Torch-Pruning's, which says the same to its pruners.

        Raises:
            CriterionError: The group has gates, but is not as wide as when they were learned.
        """
        ours = ChannelGroup.from_host(group)
        if not self._has_gates(ours):
            if group is not ours:
                return None  # type: ignore[return-value]  # what a stock pruner skips a group by
            return torch.full((ours.width,), math.inf, dtype=torch.float64)
        return super().__call__(ours)

    def state_dict(self) -> dict[str, Any]:
        """Return the values."""
        return {**super().state_dict(), "values": self._values.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._values = state["values"].clone()

    def _has_gates(self, group: ChannelGroup) -> bool:
        """Tell whether a group is one with gates, from whichever of its layers it was reached."""
        written = {member.path for member in group.members if member.axis == "out"}
        return any(
            known.members[0].path in written and any(member.path == group.members[0].path for member in known.members)
            for known in self._groups_with_gates.values()
        )

    def _gather(self, model: nn.Module) -> None:
        """Take nothing from a minibatch."""

    def _score(self, group: ChannelGroup) -> Tensor:
        try:
            return self._values[self._places.gates_of(group)]
        except CriterionError as error:
            raise CriterionError(
                f"The gates of group {group.name!r} were learned for another width than {group.width}: gates hold for "
                "the dense network alone, so prune it in one step."
            ) from error
