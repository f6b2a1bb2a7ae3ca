"""From a network and a budget to a plan, by performance maximisation (Gao et al., CVPR 2021).

The plan is made of the very architecture that was evaluated, and it is within the budget as counted on the slim network
itself. Whoever saves and resumes drives a :class:`PerformancePlanner`; `plan_performance` is one call for all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from nni_plugin.adapters.torch_pruning import cut_channels, find_groups, sound_groups, verify, warn_of_unreached
from nni_plugin.budgets import MACs, Params, Size
from nni_plugin.cost import count, on_device_of
from nni_plugin.errors import BudgetError, SurgeryError
from nni_plugin.live_plan import LivePlan
from nni_plugin.performance.accuracy import AccuracyFn, LossFn, top1
from nni_plugin.performance.architecture import ArchitectureLayout, gated_groups
from nni_plugin.performance.choose import Choice, choose
from nni_plugin.performance.cost import ArchitectureCost, CostTarget, Objective
from nni_plugin.performance.discretise import Discretiser, Kept
from nni_plugin.performance.hooks import sound_gates
from nni_plugin.performance.latency_table import LatencyTable, TableLatency
from nni_plugin.performance.options import SearchOptions
from nni_plugin.performance.search import PerformanceMaximization
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import unchanged
from nni_plugin.rounding import rounding_of
from nni_plugin.wrappers import checked_network

SearchBudget = MACs | Params | TableLatency

_METHODS = {"full": "nppm", "gates-only": "differentiable-gates", "linear": "nppm-linear"}


class PerformancePlanner:
    """Searches the gates of one network for a budget, and makes the plan.

    Args:
        model: The network (unwrapped); left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar; it calls `model` once.
        budget: `MACs`, `Params` or `TableLatency` kept.
        options: How the search goes.
        accuracy_fn: `accuracy_fn(output, batch)` -> a fraction in [0, 1].
        round_to: Widths become multiples of this (the nearest), or stay whole; None: 8 for a model on CUDA, else 1.
        min_channels: No group gets narrower.
        ignore: Layers to leave whole, as modules or names; the classifier always is.

    Attributes:
        search: The search; `run`, `state_dict` and `history` are there.
        choice: What was chosen by the last `plan()`.

    Raises:
        BudgetError: The budget cannot be met; the text says what can be reached.
        GraphError: The network cannot be traced, or nothing in it may have gates.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        loss_fn: LossFn,
        budget: SearchBudget,
        *,
        options: SearchOptions | None = None,
        accuracy_fn: AccuracyFn = top1,
        round_to: int | None = None,
        min_channels: int = 1,
        ignore: Iterable[str | nn.Module] = (),
    ) -> None:
        options = options or SearchOptions()
        self.model, self.budget, self.example_inputs = model, budget, on_device_of(model, example_inputs)
        self._rounding = {"round_to": rounding_of(round_to, model), "min_channels": min_channels}
        self._asked = {"budget": repr(budget), **self._rounding}
        found = find_groups(model, self.example_inputs, ignore=ignore)
        self._all_groups = sound_groups(model, found, self.example_inputs)
        warn_of_unreached(model, self.example_inputs)
        self.groups = sound_gates(model, gated_groups(self._all_groups, options.select), self.example_inputs)
        layout = ArchitectureLayout(self.groups, next(model.parameters()).device)
        self.cost = ArchitectureCost(model, self.example_inputs, layout)
        self._objective, limit = self._aim(layout)
        self.discretiser = Discretiser(layout, self._predict, limit, **self._rounding)
        target = CostTarget(self._objective, limit)
        self.search = PerformanceMaximization(model, self.groups, target, loss_fn, options, accuracy_fn)
        self.choice: Choice | None = None

    def plan(self, held_out: Iterable[Any] | None = None) -> PruningPlan:
        """Choose an architecture within the budget and make its plan.

        Args:
            held_out: Minibatches of the training set that the search has not seen, never of the test set; gone through
                once for each candidate. None takes the deterministic architecture of the gates.

        Raises:
            BudgetError: The budget cannot be met on the slim network.
            SurgeryError: The compact network would not compute what the masked one does.
        """
        choice = choose(self.search, self.discretiser, held_out)
        size = self._count(choice.kept)
        if not isinstance(self.budget, TableLatency) and size != self.cost.predict(choice.kept):
            # Arithmetic is off for this network: count every network that is tried.
            counted = Discretiser(self.search.layout, self._counted_value, self.discretiser.limit, **self._rounding)
            choice = choose(self.search, counted, held_out)
            size = self._count(choice.kept)
        self.choice = choice
        plan = self._plan_of(choice, size)
        parity = verify(self.model, plan, self.example_inputs, groups=self._all_groups)
        if not parity.ok:
            raise SurgeryError(f"{parity}. The network is unchanged; leave layers whole with `ignore`.")
        return plan

    def _aim(self, layout: ArchitectureLayout) -> tuple[Objective, float]:
        """Return the cost that the search brings down, and its limit."""
        if isinstance(self.budget, TableLatency):
            table = LatencyTable(self.cost, self.budget.layers, self.budget.rest_ms)
            return table, self.budget.ratio * table.dense
        if isinstance(self.budget, MACs | Params):
            objective = self.cost.macs if isinstance(self.budget, MACs) else self.cost.params
            return objective, self.budget.limit(self.cost.dense)
        raise BudgetError(f"A search over gates goes to MACs, Params or TableLatency, got {self.budget!r}.")

    @torch.no_grad()
    def _predict(self, kept: Kept) -> float:
        return float(self._objective(self.cost.layout.architecture(kept)))

    def _counted_value(self, kept: Kept) -> float:
        assert not isinstance(self.budget, TableLatency)
        return self.budget.value(self._count(kept))

    def _count(self, kept: Kept) -> Size:
        """Count the slim network."""
        live = LivePlan(self.groups)
        slim = copy.deepcopy(self.model)
        cut_channels(slim, live.relative(kept), self._all_groups)
        return Size(count(slim, self.example_inputs), sum(len(index) for index in kept.values()))

    def _plan_of(self, choice: Choice, size: Size) -> PruningPlan:
        live = LivePlan(self.groups)
        live.kept = choice.kept
        live.record(size, None, None)
        gates = self.search.gates
        values = {name: vector + gates.offset for name, vector in gates.vectors().items()}
        ranges = {name: (float(value.min()), float(value.max())) for name, value in values.items()}
        whole = {group.name: group.fixed for group in self._all_groups if group.fixed is not None}
        provenance = {
            "method": _METHODS[self.search.options.mode],
            "options": asdict(self.search.options),
            **self._asked,
            "steps_made": self.search.steps_done,
            "p": self.search.target.p,
            "chosen": choice.source,
            "held_out_accuracy": choice.accuracy,
            **({"whole": whole} if whole else {}),
        }
        identity = getattr(self.model, "nni_plugin_identity", None)
        return live.whole(ranges, self.cost.dense, size, identity, provenance)


def plan_performance(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    loss_fn: LossFn,
    budget: SearchBudget,
    *,
    held_out: Iterable[Any] | None = None,
    options: SearchOptions | None = None,
    accuracy_fn: AccuracyFn = top1,
    round_to: int | None = None,
    min_channels: int = 1,
    ignore: Iterable[str | nn.Module] = (),
    state: Mapping[str, Any] | None = None,
    on_step: Callable[[PerformanceMaximization], object] | None = None,
) -> PruningPlan:
    """Search the channels to keep so that a network meets a budget, by performance maximisation.

    Args:
        model: A trained network; weights, statistics, gradients, modes and hooks are put back.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        batches: Minibatches of a part of the training set, gone through again and again.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar; it calls `model` once.
        budget: `MACs`, `Params` or `TableLatency` kept of the WHOLE network; met exactly, within one unit of removal.
        held_out: Minibatches of another part of the training set, to choose among candidates; never the test set.
            None takes the deterministic architecture of the gates.
        options: How the search goes.
        accuracy_fn: `accuracy_fn(output, batch)` -> a fraction in [0, 1].
        round_to: Widths become multiples of this (the nearest), or stay whole; None: 8 for a model on CUDA, else 1.
        min_channels: No group gets narrower.
        ignore: Layers to leave whole, as modules or names; the classifier always is.
        state: The `state_dict()` of a search that was killed, to go on from.
        on_step: Called with the search after each step.

    Returns:
        The plan; `plan.explain()` shows it, `plan.apply(model, example_inputs)` does it.

    Raises:
        BudgetError: The budget cannot be met; the text says what can be reached.
        DataError: There is no minibatch.
        GraphError: The network cannot be traced, or nothing in it may have gates.
        SearchError: An option, a loss, a gate or an accuracy makes no sense.
    """
    model = checked_network(model)
    with unchanged(model):
        planner = PerformancePlanner(
            model,
            example_inputs,
            loss_fn,
            budget,
            options=options,
            accuracy_fn=accuracy_fn,
            round_to=round_to,
            min_channels=min_channels,
            ignore=ignore,
        )
        if state is not None:
            planner.search.load_state_dict(state)
        planner.search.run(batches, on_step)
        return planner.plan(held_out)
