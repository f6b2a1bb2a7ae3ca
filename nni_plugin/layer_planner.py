"""A layer importance and a budget make a plan that removes whole blocks; the network that is asked about stays.

Elkerdawy et al., LayerPrune, ACCV 2020, arXiv 2007.05667: blocks leave in the order of their importance, scored once
or anew after each step, until a number of them has left or a latency is met. Here also MACs and parameters. The cut
that meets the budget is then walked back: a block that could stay within it stays, the most important first.
"""

from __future__ import annotations

import bisect
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nni_plugin.budgets import Budget, Latency, Layers, MACs, Params, Size
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count, on_device_of
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import BudgetError, CriterionError, ScheduleError
from nni_plugin.held_out import split_fifth
from nni_plugin.latency_budget import TOLERANCE, LatencyMeter
from nni_plugin.layers.base import LayerImportance, LossFn
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.candidates import Candidates, candidate_blocks, possible_removal, removal_sets
from nni_plugin.layers.removal import Removal
from nni_plugin.machine import library_versions
from nni_plugin.plan import PruningPlan, dense_names
from nni_plugin.processes import agreed
from nni_plugin.schedules import Gradual, OneShot
from nni_plugin.wrappers import checked_network, copy_to_plan_on


def plan_layers(
    model: nn.Module,
    example_inputs: Any,
    importance: LayerImportance,
    batches: Iterable[Any],
    budget: Budget,
    *,
    loss_fn: LossFn = cross_entropy,
    held_out: Iterable[Any] | None = None,
    schedule: OneShot | Gradual | None = None,
    candidates: Candidates = "outermost",
    keep: Iterable[str] = (),
    reestimate: bool = False,
) -> PruningPlan:
    """Choose the blocks to remove so that a network meets a budget.

    Args:
        model: Left as it was; scored in eval mode.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        importance: One of `nni_plugin.layers`.
        batches: Minibatches of the training set, `(inputs, labels)` for `Imprinting`.
        budget: `Layers` that leave, or `Latency`, `MACs` or `Params` kept. Within it, none of the blocks that leave
            in the last step could stay. A latency is met as measured on the slim network, within 3 %.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar, for importances that need it.
        held_out: Minibatches of the training set that are not in `batches`, for importances that need them; None:
            every fifth minibatch of `batches` (of fewer than five the last one) is kept back; they must then be the
            same ones each time.
        schedule: `OneShot()` scores once; `Gradual(steps)` removes in so many steps, each on fresh scores.
        candidates: Of blocks inside blocks (the branches of a transformer's) the `"outermost"`, the `"innermost"`, or
            `"all"`, where one that leaves takes those inside along.
        keep: Names of blocks, or of modules in them, that must stay.
        reestimate: Estimate the statistics of batch normalisations anew before blocks are scored again. A plan holds
            no statistics: call `reestimate_batchnorm` on the pruned network as well, before its accuracy counts.

    Returns:
        The plan; `plan.explain()` shows it, `plan.apply(model, example_inputs)` does it.

    Raises:
        BudgetError: The budget cannot be met; the text says what can be reached.
        CriterionError: A block cannot be scored, or `importance` is for channels.
        DataError: The minibatches cannot be scored on.
        GraphError: There is no removable block.
        PlanError: `keep` names nothing in the network.
    """
    schedule = schedule or OneShot()
    if not isinstance(schedule, (OneShot, Gradual)) or schedule.minibatches is not None:
        raise ScheduleError(f"Blocks leave by OneShot() or Gradual(steps), without training between, got {schedule!r}.")
    model = checked_network(model)
    if isinstance(importance, type):
        raise CriterionError(f"Expected an importance, got the class {importance.__name__}: {importance.__name__}().")
    if not isinstance(importance, LayerImportance):
        raise CriterionError(
            f"{importance!r} scores channels, not layers: give LayerStatistic({type(importance).__name__}()), or "
            "another importance of nni_plugin.layers."
        )
    example_inputs = on_device_of(model, example_inputs)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    with torch.random.fork_rng(devices=[]):  # a loader may draw when it is gone through
        if importance.needs_held_out and held_out is None:
            batches, held_out = split_fifth(batches)
        cuts = _Cuts(model, example_inputs, _of_layers(budget))
        work, scored = copy_to_plan_on(model), []
        for step in range(schedule.steps):
            now = cuts.value(work)
            if step and now <= cuts.limit:
                break
            names = dense_names(work)
            staying = [name for name in map(names.after, keep) if name is not None]
            blocks = candidate_blocks(work, example_inputs, candidates, staying)
            scores = importance.score(work, example_inputs, blocks, batches, loss_fn, held_out)
            part = now - (now - cuts.limit) / (schedule.steps - step)
            limit = max(math.floor(part), cuts.limit) if isinstance(budget, Layers) else part
            gone = agreed(cuts.choose(work, blocks, scores, limit))
            scored += [
                {
                    "step": step,
                    "name": names.block_before(block.name),
                    "kind": block.kind,
                    "score": scores[block.name],
                    "removed": block.name in gone,
                }
                for block in blocks
            ]
            if gone:
                work = copy.deepcopy(work)
                PruningPlan((), gone).apply(work, example_inputs)
                if reestimate and step + 1 < schedule.steps:
                    reestimate_batchnorm(work, batches, loss_fn)
    done: PruningPlan = getattr(work, "pruning_plan", PruningPlan(()))
    if not done.removed_blocks:
        warnings.warn(f"The plan removes nothing: {budget} is met by the network as it is.", stacklevel=2)
    return PruningPlan(
        groups=(),
        removed_blocks=done.removed_blocks,
        shells=done.shells,
        model=getattr(model, "nni_plugin_identity", None),
        cost_before=count(model, example_inputs),
        cost_after=count(work, example_inputs),
        provenance={
            "importance": str(importance),
            "budget": repr(budget),
            "schedule": repr(schedule),
            "candidates": candidates,
            "blocks": scored,
            **({} if cuts.meter is None else {"latency": cuts.meter.account(work)}),
            "versions": library_versions(),
        },
    )


def check_reachable(
    model: nn.Module,
    example_inputs: Any,
    budget: Budget,
    candidates: Candidates = "outermost",
    keep: Iterable[str] = (),
) -> None:
    """Refuse a budget that removing every block that may leave would not meet, or that nothing need leave for.

    Raises:
        BudgetError: It is so; the text says what can be reached.
        GraphError: There is no removable block.
        PlanError: `keep` names nothing in the network.
    """
    cuts = _Cuts(model, example_inputs, _of_layers(budget))
    blocks = candidate_blocks(model, example_inputs, candidates, keep)
    if cuts.value(model) <= cuts.limit:
        raise BudgetError(f"{budget} is met by the network as it is: nothing would be removed. Ask for less.")
    order = removal_sets(blocks, dict.fromkeys((block.name for block in blocks), 0.0))
    cuts.check(model, order, possible_removal(model, blocks, example_inputs))


def _of_layers(budget: Budget) -> MACs | Params | Layers | Latency:
    if not isinstance(budget, (Layers, Latency, MACs, Params)):
        raise BudgetError(f"Whole blocks leave: the budget is Layers, Latency, MACs or Params, got {budget!r}.")
    return budget


class _Cuts:
    """The budget's view of a network without some of its blocks.

    Args:
        dense: The network that the budget refers to.
        example_inputs: Its inputs.
        budget: What is asked.
    """

    def __init__(self, dense: nn.Module, example_inputs: Any, budget: MACs | Params | Layers | Latency) -> None:
        self.example_inputs, self.budget = example_inputs, budget
        self.meter = LatencyMeter(dense, example_inputs, budget) if isinstance(budget, Latency) else None
        self.limit = self.meter.limit if self.meter else budget.limit(Size(count(dense, example_inputs), 0))

    def value(self, work: nn.Module) -> float:
        """Return what the budget counts of a network that comes from the dense one."""
        if isinstance(self.budget, Layers):
            return -len(_composed(work, ()))
        if self.meter is not None:
            return self.meter.ms(work, longer=3)
        return self.budget.value(Size(count(work, self.example_inputs), 0))

    def choose(
        self, work: nn.Module, blocks: Sequence[Block], scores: Mapping[str, float], limit: float
    ) -> tuple[str, ...]:
        """Return the blocks to remove: as few of the order as it takes, less those that could stay after all.

        Args:
            work: The network now.
            blocks: Those that may leave.
            scores: Their importance by name.
            limit: What the value may be.

        Raises:
            BudgetError: Not even all of them are enough.
        """
        order, removal = removal_sets(blocks, scores), possible_removal(work, blocks, self.example_inputs)
        self.check(work, order, removal)
        enough = order[self._fewest(work, order, removal, limit)]
        gone = list(enough)
        for name in reversed(enough[:-1]):  # without the last one the search would have stopped earlier
            rest = [other for other in gone if other != name]
            if self._without(work, rest, removal) <= limit:
                gone = rest
        misled = (  # by one of many short measurements
            self.meter is not None
            and gone != list(enough)
            and self.meter.ms(_without(work, removal(gone)), longer=6) > limit * (1 + TOLERANCE)
        )
        return enough if misled else tuple(gone)

    def check(
        self, work: nn.Module, order: Sequence[tuple[str, ...]], removal: Callable[[Iterable[str]], Removal]
    ) -> None:
        """Refuse a budget that is out of reach.

        Raises:
            BudgetError: Not even the whole order is enough; the text says what is.
        """
        if self.meter is not None:
            self.meter.check(_without(work, removal(order[-1])))
        elif isinstance(self.budget, Layers):
            most = max(len(_composed(work, names)) for names in order)
            if -most > self.limit:
                raise BudgetError(
                    f"{self.budget}: only {most} blocks can leave. Ask for fewer. The model is unchanged."
                )
        elif (least := self._without(work, order[-1], removal)) > self.limit:
            raise BudgetError(
                f"{self.budget} allows {self.limit:,.0f}, but without all {len(order[-1])} blocks that can leave "
                f"{least:,.0f} remain. Ask for more, or prune channels too. The model is unchanged."
            )

    def _without(self, work: nn.Module, names: Sequence[str], removal: Callable[[Iterable[str]], Removal]) -> float:
        if isinstance(self.budget, Layers):
            return -len(_composed(work, names))
        return self.value(_without(work, removal(names)))

    def _fewest(
        self,
        work: nn.Module,
        order: Sequence[tuple[str, ...]],
        removal: Callable[[Iterable[str]], Removal],
        limit: float,
    ) -> int:
        if self.meter is not None:
            return self.meter.fewest(len(order) - 1, lambda i: _without(work, removal(order[i])), limit)
        if isinstance(self.budget, Layers):  # counts fall again where a block takes its branches along
            return next(i for i, names in enumerate(order) if self._without(work, names, removal) <= limit)
        met = bisect.bisect_left(order, True, key=lambda names: self._without(work, names, removal) <= limit)
        return min(met, len(order) - 1)


def _composed(work: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return, in the names of the dense network, the blocks that have left once these leave too."""
    earlier: PruningPlan | None = getattr(work, "pruning_plan", None)
    later = PruningPlan((), tuple(names))
    return (later if earlier is None else earlier.then(later)).removed_blocks


def _without(work: nn.Module, removal: Removal) -> nn.Module:
    """Return a copy of a network without some blocks, not proven: to count and to time."""
    network = copy.deepcopy(work)
    removal.perform(network)
    return network
