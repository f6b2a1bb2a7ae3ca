"""The way to the budget, step by step, each on fresh gradients of channel gates and block gates together."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import apply_plan
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count
from nni_plugin.criteria import OBS, quadratic
from nni_plugin.errors import BudgetError, CriterionError, GraphError, PlanError
from nni_plugin.layers.block_gate import BlockGates
from nni_plugin.marginal_cost import MarginalCost
from nni_plugin.planner import unchanged
from nni_plugin.processes import agreed, gathered, pooled_mean
from nni_plugin.width_and_depth.goal import Goal
from nni_plugin.width_and_depth.items import Items, Limits
from nni_plugin.wrappers import copy_to_plan_on


@dataclass(frozen=True)
class Path:
    """A network pruned step by step, and a record of each step."""

    network: nn.Module
    account: list[dict[str, Any]]
    cost_power: float


@dataclass(frozen=True)
class Search:
    """What plans of several cost powers share; see :func:`plan_jointly`."""

    goal: Goal
    batches: Iterable[Any]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    steps: int
    damping: float
    max_samples: int
    reestimate: bool

    def paths(self, model: nn.Module, cost_powers: Sequence[float], limits: Limits, bar: Any) -> list[Path]:
        """Go each way that can be gone: one may end above the budget, or where no network can be traced any further."""
        found: list[Path] = []
        for number, power in enumerate(cost_powers):
            try:
                found.append(self.path(model, power, limits, bar))
            except (BudgetError, GraphError, PlanError):
                if number + 1 == len(cost_powers) and not found:
                    raise
        return found

    def path(self, model: nn.Module, cost_power: float, limits: Limits, bar: Any) -> Path:
        """Go to the budget on a copy of a network, which carries its plan."""
        goal, inputs = self.goal, self.goal.example_inputs
        work = copy_to_plan_on(model).eval()
        account: list[dict[str, Any]] = []
        for step in range(self.steps):
            now, last = goal.value(work), step + 1 == self.steps
            if step and now <= goal.limit:
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said once already, when the budget was checked
                items = Items.of(work, inputs, limits)
            cost = MarginalCost(work, inputs, items.groups, items.blocks, goal.budget)
            with unchanged(work):
                rows, movable = _gradients(work, items, self.batches, self.loss_fn, self.max_samples)
            costs = items.costs(cost.channels, cost.blocks).pow(cost_power)
            order = quadratic.removal_order(items.sums(rows), self.damping, costs, sizes=items.sizes, holds=items.holds)
            limit = now - (now - goal.limit) / (self.steps - step)
            order = agreed(order)
            number = agreed(goal.fewest(items, order, work, limit, exact=last))
            plan, change = agreed(items.plan(order, number, rows, movable, self.damping))
            if plan is not None:
                apply_plan(work, plan, inputs)
                if self.reestimate and not last:
                    reestimate_batchnorm(work, self.batches, self.loss_fn)
            size = count(work, inputs)
            account.append({"macs": size.macs, "params": size.params, "predicted_loss_change": change})
            bar.update()
        goal.check_reached(work)
        return Path(work, account, cost_power)

    @torch.no_grad()
    def settled_loss(self, network: nn.Module) -> float:
        """Return the mean loss of a copy whose batch normalisations have been settled."""
        network = copy.deepcopy(network).eval()
        reestimate_batchnorm(network, self.batches, self.loss_fn)
        losses = [float(self.loss_fn(network, batch)) for batch in self.batches]
        return pooled_mean(sum(losses), len(losses)) or 0.0


def _gradients(
    model: nn.Module,
    items: Items,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    max_samples: int,
) -> tuple[Tensor, Tensor]:
    """Return per-sample gradients of all gates, channels first, `[N, gates]`, and which of them can take a factor.

    Both come from the same backward pass, so that a row is one sample's.
    """
    criterion = OBS(max_samples=max_samples)
    of_blocks: list[Tensor] = []
    samples = 0
    with ExitStack() as stack:
        if items.groups:
            stack.enter_context(criterion.collect(model, items.groups))
        gates = stack.enter_context(BlockGates(model, items.blocks)) if items.blocks else None
        for batch in batches:
            model.zero_grad(set_to_none=True)
            loss = loss_fn(model, batch)
            if not math.isfinite(value := float(loss.detach())):
                raise CriterionError(f"The loss is {value}: look at the data. The model is unchanged.")
            loss.backward()
            if gates is not None:
                of_blocks.append(gates.after_backward())
            if items.groups:
                criterion.update()
            samples = criterion.samples if items.groups else sum(map(len, of_blocks))
            if samples >= max_samples:
                break
    if samples == 0:
        raise CriterionError("There is no batch to score with: the loader is empty (or used up).")
    parts, movable = [], torch.zeros(len(items.blocks), dtype=torch.bool)
    if items.groups:
        criterion.all_reduce()
        parts.append(criterion.rows)
        movable = torch.cat([criterion.movable, movable])
    if items.blocks:
        rows = torch.cat(gathered(torch.cat(of_blocks)[:samples]))
        parts.append(rows.to(parts[0].dtype) if parts else rows)
    found = torch.cat(parts, 1)
    if not bool(torch.isfinite(found).all()):
        raise CriterionError("Gradients are not finite: look at the data and the weights. The model is unchanged.")
    return found, movable
