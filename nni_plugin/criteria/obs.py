"""Optimal Brain Surgeon on joint channel gates: all interactions, and compensation by the gates that stay.

Scores rank channels one by one; pruning removes many at once. The per-sample gradients of all joint gates, which
one backward pass gives, hold the whole empirical Fisher matrix over all gates of the network. Gates are removed
greedily under that quadratic model of the loss, each removal moving all other gates to where the loss is least;
what the surviving gates have become is folded into the layers that write them (:mod:`nni_plugin.criteria.quadratic`).

Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993. Nearest relatives: the
diagonal of the same matrix is Group Fisher Pruning (Liu et al., ICML 2021); the Combinatorial Brain Surgeon (Yu et
al., ICML 2022) weighs interactions between single weights; Optimal Brain Connection (arXiv 2508.05521) between
structures, without compensation by gates.

Cost: that of Taylor-Fisher for the data, then a few seconds of linear algebra; see the quadratic model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin import processes
from nni_plugin.criteria import quadratic
from nni_plugin.criteria.base import Conclusion, Criterion
from nni_plugin.criteria.gate_reader import GateReader, Gates
from nni_plugin.criteria.gates import TiedGates
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.tensors import holders, tensor_of

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What `damping="auto"` chooses from."""


LEAST_DAMPING = 1e-8
"""Below, systems of fewer samples than gates are singular to double precision."""


ORDER_DAMPING = 1.0
"""Of the order of removal under `"auto"`: far better than 0.1 where half the MACs go in one step
(`docs/joint_removal.md`); many channels that go together lead away from where the gradients were taken."""


class OBS(GateReader):
    """Selection with compensation over all groups together; as a plain criterion its score is the order of removal.

    Args:
        gates: Where the gate lies, see :class:`GateReader`. Only gates on layers that write the channel can
            compensate, and not those of a weight that other layers share; the others can be removed. The order takes
            all of them as free to move.
        damping: Added to the diagonal of the Fisher matrix, in units of its mean; `"auto"`: `ORDER_DAMPING` for the
            order of removal, and for compensation the one of `DAMPINGS` under which the held-out fifth of the samples
            loses least (of fewer than 10 samples none is held out: 0.1).
        compensate: Whether the gates that stay move; without it only the order is used.
        linear: Let the mean gradient pull the gates that stay too (the order knows nothing of it): a full Newton step
            of all of them, far too long on a network that is not trained (its loss may grow a thousandfold). Off: the
            network is taken as trained.
        cost_aware: Remove what loses least per MAC (or whatever the budget counts) instead of per channel. Off: it
            takes the channels of the widest maps first, far beyond where a quadratic model holds.
        max_samples: Rows kept, by all processes together; once there are so many (in each process its share of
            them), further minibatches are not looked at.
    """

    per_sample = True
    predicts = True
    needs_groups = True
    is_ranking = True

    def __init__(
        self,
        gates: Gates = "auto",
        damping: float | Literal["auto"] = "auto",
        compensate: bool = True,
        linear: bool = False,
        cost_aware: bool = False,
        max_samples: int = 4096,
    ) -> None:
        if damping != "auto" and (not _is_number(damping) or not LEAST_DAMPING <= float(damping) < math.inf):
            raise CriterionError(f"damping must be a number of at least {LEAST_DAMPING:g} or 'auto', got {damping!r}.")
        if isinstance(max_samples, bool) or not isinstance(max_samples, int) or max_samples < 1:
            raise CriterionError(f"max_samples must be an integer of at least 1, got {max_samples!r}.")
        self.damping, self.compensate, self.linear, self.cost_aware = damping, compensate, linear, cost_aware
        self.max_samples = max_samples
        super().__init__(gates)

    @contextmanager
    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> Iterator[Criterion]:
        """Watch a network while minibatches run, see :meth:`GateReader.collect`; the groups must be given."""
        with super().collect(model, groups):
            assert self._model is not None
            held = holders(self._model)
            can = [torch.full((group.width,), self._can_compensate(self._model, group, held)) for group in groups]
            self._movable = torch.cat(can)
            yield self

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self._gradients: list[Tensor] = []
        self._position: Tensor | None = None
        self._ordered_by: dict[str, float] | None = None

    def _gather(self, model: nn.Module) -> None:
        assert self._layout is not None
        terms = self._terms(model, self._layout.members)  # taken even where there are rows enough: the next are others
        left = -(-self.max_samples // processes.count()) - self.samples
        if left <= 0:
            return
        rows = self._layout.joint(terms).detach()
        rows = rows.cpu() if len(rows) <= left else rows[:left].cpu().clone()  # a part would hold the whole
        self._gradients.append(rows)
        self.samples += len(rows)
        self._position = None

    def _can_compensate(self, model: nn.Module, group: ChannelGroup, held: Mapping[int, int]) -> bool:
        """Tell whether a factor on the gate of each channel can be folded into the layers that write it.

        A parameter that layers share cannot take it: the other one, a reader perhaps (a language model's head is its
        embedding), would take it too.
        """
        if self._members(model, group) != group.writers:
            return False
        parameters = []
        for writer in group.writers:
            pieces = [p for p in writer.slices if not p.tensor.rpartition(".")[2].startswith("running_")]
            if not pieces or any(len(p.index) != len(writer.index) for p in pieces):
                return False
            parameters += [id(tensor_of(model, piece.tensor)) for piece in pieces]
        return len(set(parameters)) == len(parameters) and all(held.get(parameter, 1) == 1 for parameter in parameters)

    @property
    def rows(self) -> Tensor:
        """Gate gradients of the samples so far, `[samples, gates]`, the groups' gates one after the other."""
        if len(self._gradients) != 1:
            self._gradients = [torch.cat(self._gradients)]  # held once
        return self._gradients[0]

    @property
    def movable(self) -> Tensor:
        """Which gates can take a factor, bool, `[gates]`."""
        return self._movable

    def gates_of(self, group: ChannelGroup) -> Tensor:
        """Return where a group's gates lie among the columns."""
        assert self._layout is not None
        return self._layout.gates_of(group)

    # -- what the pruner asks ----------------------------------------------------------------------------

    def _score(self, group: ChannelGroup) -> Tensor:
        layout = self._placed()
        costs = dict(self.costs or {})
        if self._position is None or self._ordered_by != costs:
            self._position, self._ordered_by = self._order(), costs
        return self._position[layout.gates_of(group)]

    def _order(self) -> Tensor:
        """Return the position of each gate in the order of removal, float64, shape `[gates]`."""
        assert self._layout is not None
        gradients = self.rows
        if not bool(torch.isfinite(gradients).all()):
            return torch.full((self._layout.size,), torch.nan)
        costs = torch.ones(self._layout.size, dtype=torch.float64)
        if self.costs:
            for name, part in self._layout.split(costs).items():
                part.fill_(max(self.costs[name], 1e-12))
        # Tied channels leave together: one gate on all of them, whose gradient is the sum of theirs.
        units = TiedGates(self._layout.groups)
        gradients, costs = units.sums(gradients), units.sums(costs)
        alive = (gradients != 0).any(0)
        gradients = gradients if bool(alive.all()) else gradients[:, alive]  # a copy as large as all that is collected
        damping = ORDER_DAMPING if self.damping == "auto" else self.damping
        position = torch.zeros(units.number, dtype=torch.float64)  # gates without any gradient go first
        order = quadratic.removal_order(gradients, damping, costs[alive], sizes=units.sizes[alive])
        position[alive.nonzero().flatten()[order]] = torch.arange(1, len(order) + 1, dtype=torch.float64)
        return units.shared(position)

    def conclude(self, before: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Conclusion:
        """Return the factors of the gates that stay, and the loss change that the quadratic model expects."""
        layout, gradients = self._placed(), self.rows
        removed = torch.ones(layout.size, dtype=torch.bool)
        for name, part in layout.split(removed).items():
            part[kept[name]] = False
        z = (~removed).double()
        if self.compensate:
            damping = self._best_damping(gradients, removed) if self.damping == "auto" else self.damping
            z = quadratic.Compensation(gradients, removed, movable=self._movable, linear=self.linear)(damping)
        movable = layout.split(self._movable)
        factors = {
            name: part for name, part in layout.split(z).items() if self.compensate and bool(movable[name].all())
        }
        return Conclusion(factors, quadratic.loss_change(gradients, z, linear=self.linear))

    def _best_damping(self, gradients: Tensor, removed: Tensor) -> float:
        if len(gradients) < 10:
            return DAMPINGS[2]
        # Every fifth by length, whatever the order in which the samples came, to one process or to several.
        by_length = gradients.double().square().sum(1).argsort(stable=True)
        held_out = torch.zeros(len(gradients), dtype=torch.bool)
        held_out[by_length[2::5]] = True
        best = quadratic.Compensation(gradients[~held_out], removed, movable=self._movable, linear=self.linear)
        judges = gradients[held_out]
        losses = [quadratic.loss_change(judges, best(damping), linear=self.linear) for damping in DAMPINGS]
        return DAMPINGS[losses.index(min(losses))]

    def loss_changes(self, group: ChannelGroup) -> Tensor | None:
        """Return None: what a removal costs depends on what else goes."""
        return None

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the rows collected."""
        return {**super().state_dict(), "gradients": list(self._gradients)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._gradients, self._position = list(state["gradients"]), None

    def all_reduce(self) -> None:
        """Gather the rows of every process."""
        super().all_reduce()
        if processes.several():
            mine = torch.cat(self._gradients) if self._gradients else torch.zeros(0, self._placed().size)
            self._gradients, self._position = processes.gathered(mine), None
            self.samples = sum(len(rows) for rows in self._gradients)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
