"""A layer importance and a budget make a plan that removes whole blocks; the network that is asked about stays.

Elkerdawy et al., LayerPrune, ACCV 2020, arXiv 2007.05667: blocks leave in the order of their importance, scored once
or anew after each step, until a number of them has left or a latency is met. Here also MACs and parameters. The cut
that meets the budget is then walked back: a block that could stay within it stays, the most important first.
"""

from __future__ import annotations

import bisect
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin.budgets import Budget, Channels, Latency, Layers, MACs, Params, Size
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count, on_device_of
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import BudgetError, DataError, GraphError, PlanError, ScheduleError
from nni_plugin.latency_budget import TOLERANCE, LatencyMeter
from nni_plugin.layers.base import LayerImportance, LossFn, removal_order
from nni_plugin.layers.blocks import Block, find_blocks
from nni_plugin.layers.removal import find_removal
from nni_plugin.machine import library_versions
from nni_plugin.plan import PruningPlan
from nni_plugin.processes import agreed
from nni_plugin.renumbering import Renumbering, ends_of
from nni_plugin.schedules import Gradual, OneShot

Candidates = Literal["outermost", "innermost", "all"]


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
            could stay. A latency is met as measured on the slim network, within 3 %.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar, for importances that need it.
        held_out: Minibatches of the training set that are not in `batches`, for importances that need them; None:
            every fifth minibatch of `batches` is kept back, which must then be the same ones each time.
        schedule: `OneShot()` scores once; `Gradual(steps)` removes in so many steps, each on fresh scores.
        candidates: Of blocks inside blocks (the branches of a transformer's) the `"outermost"`, the `"innermost"`, or
            `"all"`, where one that leaves takes those inside along.
        keep: Names of blocks that must stay.
        reestimate: Estimate the statistics of batch normalisations anew before blocks are scored again. A plan holds
            no statistics: call `reestimate_batchnorm` on the pruned network as well, before its accuracy counts.

    Returns:
        The plan; `plan.explain()` shows it, `plan.apply(model, example_inputs)` does it.

    Raises:
        BudgetError: The budget cannot be met; the text says what can be reached.
        CriterionError: A block cannot be scored.
        DataError: The minibatches cannot be scored on.
        GraphError: There is no removable block.
        PlanError: `keep` names no block.
    """
    schedule = schedule or OneShot()
    if not isinstance(schedule, (OneShot, Gradual)) or schedule.minibatches is not None:
        raise ScheduleError(f"Blocks leave by OneShot() or Gradual(steps), without training between, got {schedule!r}.")
    example_inputs = on_device_of(model, example_inputs)
    if importance.needs_held_out and held_out is None:
        batches, held_out = split_fifth(batches)
    work = copy.deepcopy(model)
    if hasattr(work, "pruning_plan"):
        del work.pruning_plan  # the plan asked for starts from this network
    cuts, scored = _Cuts(model, example_inputs, _of_layers(budget)), []
    keep = tuple(keep)
    _check_keep(model, example_inputs, keep)
    for step in range(schedule.steps):
        names = _dense_names(work)
        blocks = [
            block
            for block in candidate_blocks(work, example_inputs, candidates)
            if not any(_overlap(names.block_before(block.name), other) for other in keep)
        ]
        scores = importance.score(work, example_inputs, blocks, batches, loss_fn, held_out)
        now = cuts.value(work)
        limit = now - (now - cuts.limit) / (schedule.steps - step)
        gone = agreed(cuts.choose(work, removal_sets(blocks, scores), limit))
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
        if not gone:
            continue
        work = copy.deepcopy(work)
        PruningPlan((), gone).apply(work, example_inputs)
        if reestimate:
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
    model: nn.Module, example_inputs: Any, budget: Budget, candidates: Candidates = "outermost"
) -> None:
    """Refuse a budget that removing every block that may leave would not meet, or that nothing need leave for.

    Raises:
        BudgetError: It is so; the text says what can be reached.
        GraphError: There is no removable block.
    """
    cuts = _Cuts(model, example_inputs, _of_layers(budget))
    blocks = candidate_blocks(model, example_inputs, candidates)
    if cuts.value(model) <= cuts.limit:
        raise BudgetError(f"{budget} is met by the network as it is: nothing would be removed. Ask for less.")
    cuts.check(model, removal_sets(blocks, dict.fromkeys((block.name for block in blocks), 0.0)), cuts.limit)


def _of_layers(budget: Budget) -> MACs | Params | Layers | Latency:
    if isinstance(budget, Channels):
        raise BudgetError(f"{budget} counts channels, and whole blocks leave: give Layers, Latency, MACs or Params.")
    return budget


def candidate_blocks(model: nn.Module, example_inputs: Any, candidates: Candidates = "outermost") -> list[Block]:
    """Return the blocks that may leave, in forward order.

    Args:
        model: The network.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        candidates: See :func:`plan_layers`.

    Raises:
        GraphError: There is none; the text says why some must stay.
        PlanError: `candidates` is unknown.
    """
    if candidates not in ("outermost", "innermost", "all"):
        raise PlanError(f"candidates must be 'outermost', 'innermost' or 'all', got {candidates!r}.")
    found = find_blocks(model, example_inputs).blocks
    free = [block for block in found if block.fixed is None]
    if candidates == "outermost":
        free = [block for block in free if not any(_inside(block, other) for other in free)]
    elif candidates == "innermost":
        free = [block for block in free if not any(_inside(other, block) for other in free)]
    if not free:
        why = "; ".join(f"{block.name}: {block.fixed}" for block in found[:3] if block.fixed)
        raise GraphError(
            f"{type(model).__name__} has no block that can be removed whole: there must be residual blocks with an "
            f"identity shortcut, or plain layers of equal width. {why}"
        )
    return free


def split_fifth(batches: Iterable[Any]) -> tuple[Iterable[Any], Iterable[Any]]:
    """Split minibatches into those to learn from and every fifth, held out.

    Raises:
        DataError: They can be gone through only once, or come in another order each time.
    """
    what = "give held_out, or minibatches that are the same each time (a list, or a loader that does not shuffle)"
    if iter(batches) is batches:
        raise DataError(f"batches can be gone through only once, so none can be held out: {what}.")
    first = [next(iter(batches), None) for _ in range(2)]
    if first[0] is None or not _same(*first):
        problem = "are shuffled" if first[0] is not None else "are none"
        raise DataError(f"batches {problem}, so none can be held out: {what}.")
    return _Every(batches, lambda i: i % 5 != 4), _Every(batches, lambda i: i % 5 == 4)


class _Every:
    """Some of the minibatches, by their number; of fewer than five the last is the fifth."""

    def __init__(self, batches: Iterable[Any], chosen: Callable[[int], bool]) -> None:
        self.batches, self.chosen = batches, chosen

    def __iter__(self) -> Iterator[Any]:
        return (batch for i, batch in enumerate(self.batches) if self.chosen(i))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


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

    def value(self, work: nn.Module, names: Sequence[str] = ()) -> float:
        """Return what the budget counts of a network without these blocks."""
        if isinstance(self.budget, Layers):
            return -len(_composed(work, names))
        network = _without(work, names, self.example_inputs)
        if self.meter is not None:
            return self.meter.ms(network, longer=3)
        return self.budget.value(Size(count(network, self.example_inputs), 0))

    def choose(self, work: nn.Module, order: Sequence[tuple[str, ...]], limit: float) -> tuple[str, ...]:
        """Return the blocks to remove: as few of an order as it takes, less those that could stay after all.

        Args:
            work: The network now.
            order: The blocks that have left after 0, 1, 2, ... removals.
            limit: What the value may be.

        Raises:
            BudgetError: Not even the whole order is enough.
        """
        gone = list(order[self._fewest(work, order, limit)])
        for name in reversed(gone[:-1]):  # without the last one the search would have stopped earlier
            rest = [other for other in gone if other != name]
            if self.value(work, rest) <= limit:
                gone = rest
        return tuple(gone)

    def check(self, work: nn.Module, order: Sequence[tuple[str, ...]], limit: float) -> None:
        """Refuse a limit that is out of reach.

        Raises:
            BudgetError: Not even the whole order is enough; the text says what is.
        """
        if isinstance(self.budget, Layers):
            most = max(len(_composed(work, names)) for names in order)
            if -most > limit:
                raise BudgetError(
                    f"{self.budget}: only {most} blocks can leave. Ask for fewer. The model is unchanged."
                )
            return
        least = self.value(work, order[-1])
        if least > limit * (1 + TOLERANCE if self.meter else 1):
            unit = " ms a pass" if self.meter else ""
            raise BudgetError(
                f"{self.budget} allows {limit:,.5g}{unit}, but without all {len(order[-1])} blocks that can leave "
                f"{least:,.5g} remain. Ask for more, or prune channels too. The model is unchanged."
            )

    def _fewest(self, work: nn.Module, order: Sequence[tuple[str, ...]], limit: float) -> int:
        if self.meter is not None:
            return self.meter.fewest(len(order) - 1, lambda i: _without(work, order[i], self.example_inputs), limit)
        self.check(work, order, limit)
        if isinstance(self.budget, Layers):  # counts fall again where a block takes its branches along
            return next(i for i, names in enumerate(order) if self.value(work, names) <= limit)
        return bisect.bisect_left(range(len(order)), True, key=lambda i: self.value(work, order[i]) <= limit)


def removal_sets(blocks: Sequence[Block], scores: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return the blocks that have left after 0, 1, 2, ... removals in the order of their scores.

    A block inside one that has left is passed over; one that leaves takes those inside along.
    """
    by_name = {block.name: block for block in blocks}
    sets: list[tuple[str, ...]] = [()]
    for name in removal_order(scores):
        block, gone = by_name[name], sets[-1]
        if not any(_inside(block, by_name[other]) for other in gone):
            sets.append((*(other for other in gone if not _inside(by_name[other], block)), name))
    return sets


def _inside(block: Block, other: Block) -> bool:
    return block is not other and all(other.holds(member) for member in block.members)


def _overlap(block: str, other: str) -> bool:
    """Tell whether two blocks are the same or one lies inside the other, by their names."""
    pairs = [(a, b) for a in ends_of(block) for b in ends_of(other)]
    return any(a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") for a, b in pairs)


def _check_keep(model: nn.Module, example_inputs: Any, keep: Sequence[str]) -> None:
    known = [block.name for block in find_blocks(model, example_inputs).blocks] if keep else []
    for name in keep:
        if name not in known:
            raise PlanError(f"keep: {name!r} is none of the network's blocks: {', '.join(known)}.")


def _composed(work: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return, in the names of the dense network, the blocks that have left once these leave too."""
    earlier: PruningPlan | None = getattr(work, "pruning_plan", None)
    later = PruningPlan((), tuple(names))
    return (later if earlier is None else earlier.then(later)).removed_blocks


def _without(work: nn.Module, names: Sequence[str], example_inputs: Any) -> nn.Module:
    """Return a copy of a network without some blocks, not proven: to count and to time."""
    network = copy.deepcopy(work)
    if names:
        find_removal(work, names, example_inputs).perform(network)
    return network


def _dense_names(work: nn.Module) -> Renumbering:
    plan = getattr(work, "pruning_plan", None)
    return Renumbering(()) if plan is None else Renumbering(plan.removed_blocks, plan.shells)
