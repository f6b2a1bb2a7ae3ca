"""Width and depth in one plan: channel gates and block gates in one quadratic model of the loss, under one budget.

Optimal Brain Surgeon on the gates of all channels (:mod:`nni_plugin.criteria.obs`) with one more gate for every block
that can leave whole (:mod:`nni_plugin.layers.block_gate`): another column of the per-sample gradients `G`, so that
`G^T G / N` also holds how blocks interact with channels and with each other, and all surviving channel gates make up
for a block that leaves. Next goes what raises the loss least per unit of the budget saved. A block takes the gates
inside it along, which by then mean nothing any more.

What is saved: of MACs and parameters the exact count; of milliseconds the measured time of a block, and for a channel
its share of the measured times of its layers, times the part of it that a narrower network was measured to save. Each
step scores the smaller network anew and counts, or times, the slim network itself.

How far the quadratic model of a whole block may be trusted differs from network to network. So plans are made with
savings weighed fully, by their root and not at all, when blocks hardly ever go, and the network that loses least on the
scoring images, its batch normalisations settled, decides.
"""

from __future__ import annotations

import bisect
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nni_plugin.adapters.torch_pruning import apply_plan, cut_channels, find_groups, sound_groups
from nni_plugin.budgets import Latency, MACs, Params, Size
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count, on_device_of
from nni_plugin.criteria import OBS, quadratic
from nni_plugin.errors import BudgetError, CriterionError, GraphError, PlanError, ScheduleError
from nni_plugin.groups import ChannelGroup
from nni_plugin.latency_budget import LatencyMeter
from nni_plugin.layers.block_gate import BlockGates
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.candidates import Candidates, candidate_blocks, inside, possible_removal
from nni_plugin.layers.removal import Removal
from nni_plugin.machine import library_versions
from nni_plugin.marginal_cost import MarginalCost
from nni_plugin.plan import GroupPlan, PruningPlan, dense_names
from nni_plugin.planner import unchanged
from nni_plugin.processes import agreed, gathered, pooled_mean
from nni_plugin.rounding import rounding_of
from nni_plugin.selection import Ranking


def plan_jointly(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    budget: MACs | Params | Latency,
    *,
    steps: int = 10,
    damping: float = 1.0,
    cost_powers: Sequence[float] = (1.0, 0.5, 0.0),
    max_samples: int = 2048,
    candidates: Candidates = "outermost",
    ignore: Iterable[str | nn.Module] = (),
    min_channels: int = 1,
    round_to: int | None = None,
    reestimate: bool = True,
) -> PruningPlan:
    """Choose channels and whole blocks together so that a network meets a budget.

    Args:
        model: Scored in eval mode; left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        batches: Minibatches that can be gone through again.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar, the mean over the samples of the minibatch.
        budget: `Latency`, `MACs` or `Params` kept.
        steps: Steps to the budget, each on fresh gradients and costs.
        damping: Of the quadratic model, see `OBS`.
        cost_powers: How much a saving counts: next goes the least loss over saving to this power. At 0 blocks, which
            save more than a channel, hardly ever go. Of several the one is taken under which the slim network loses
            least on `batches`; each takes as long again.
        max_samples: Rows of gate gradients kept.
        candidates: Which of blocks inside blocks may leave, see :func:`nni_plugin.plan_layers`.
        ignore: Layers, or blocks, to leave whole.
        min_channels: No group gets narrower.
        round_to: Widths become multiples of this, or stay whole; None: 8 for a model on CUDA, else 1.
        reestimate: Estimate the statistics of batch normalisations anew between steps; the plan holds none.

    Returns:
        One plan with the blocks that leave, the channels that stay and their factors.

    Raises:
        BudgetError: The budget is of another kind or out of reach; the text says what can be reached.
        ScheduleError: `steps` is no count.
        CriterionError: There is no minibatch, a loss is not finite, or a layer lacks gradients.
        GraphError: There is neither a block nor a channel to remove.
    """
    _check_settings(budget, steps, damping, cost_powers)
    example_inputs = on_device_of(model, example_inputs)
    limits = _Limits.of(model, candidates, ignore, min_channels, round_to)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # a loader may draw when it is gone through
        goal = _Goal(budget, model, example_inputs)
        goal.check(model, limits)
        search = _Search(goal, batches, loss_fn, steps, damping, max_samples, reestimate)
        with tqdm(total=steps * len(cost_powers), desc="prune", unit="step", delay=2, disable=None) as bar:
            paths = search.paths(model, cost_powers, limits, bar)
        losses = [search.settled_loss(path.network) if len(paths) > 1 else 0.0 for path in paths]
    chosen = min(range(len(paths)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    if not math.isfinite(losses[chosen]):
        raise CriterionError("The loss of every pruned network is not finite; ask for less. The model is unchanged.")
    chosen = agreed(chosen)
    work, account = paths[chosen].network, paths[chosen].account
    done: PruningPlan | None = getattr(work, "pruning_plan", None)
    if done is None:
        warnings.warn(f"The plan removes nothing: {budget} is met by the network as it is.", stacklevel=2)
        done = PruningPlan(())
    return PruningPlan(
        groups=done.groups,
        removed_blocks=done.removed_blocks,
        shells=done.shells,
        model=getattr(model, "nni_plugin_identity", None),
        cost_before=count(model, example_inputs),
        cost_after=count(work, example_inputs),
        predicted_loss_change=sum(step["predicted_loss_change"] for step in account),
        provenance={
            "criterion": f"joint gates(damping={damping}, cost_power={paths[chosen].cost_power})",
            "budget": repr(budget),
            "round_to": limits.round_to,
            "steps": account,
            **(
                {"settled_losses": dict(zip((str(path.cost_power) for path in paths), losses, strict=True))}
                if len(paths) > 1
                else {}
            ),
            **({} if goal.meter is None else {"latency": goal.meter.account(work)}),
            "versions": library_versions(),
        },
    )


def check_jointly(
    model: nn.Module,
    example_inputs: Any,
    budget: MACs | Params | Latency,
    *,
    candidates: Candidates = "outermost",
    ignore: Iterable[str | nn.Module] = (),
    min_channels: int = 1,
    round_to: int | None = None,
) -> None:
    """Refuse a budget for :func:`plan_jointly` that is out of reach, or met by the network as it is.

    Raises:
        BudgetError: It is so; the text says what can be reached.
        GraphError: There is neither a block nor a channel to remove.
    """
    goal = _Goal(budget, model, example_inputs)
    if goal.value(model) <= goal.limit:
        raise BudgetError(f"{budget} is met by the network as it is: nothing would be removed. Ask for less.")
    goal.check(model, _Limits.of(model, candidates, ignore, min_channels, round_to))


def _check_settings(budget: Any, steps: Any, damping: Any, cost_powers: Sequence[Any]) -> None:
    if not isinstance(budget, (Latency, MACs, Params)):
        raise BudgetError(f"Channels and blocks both leave: the budget is Latency, MACs or Params, got {budget!r}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ScheduleError(f"steps must be an integer of at least 1, got {steps!r}.")
    if not _is_number(damping) or not damping > 0:
        raise CriterionError(f"damping must be a finite number above 0, got {damping!r}.")
    if not cost_powers or not all(_is_number(power) and power >= 0 for power in cost_powers):
        raise BudgetError(f"cost_powers must hold finite numbers of at least 0, such as [1.0], got {cost_powers!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class _Limits:
    """What may leave at all."""

    candidates: Candidates
    ignore: tuple[str, ...]
    min_channels: int
    round_to: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        candidates: Candidates,
        ignore: Iterable[str | nn.Module],
        min_channels: int,
        round_to: int | None,
    ) -> _Limits:
        """Take the user's words; modules to ignore go by their names in the network."""
        paths = {module: name for name, module in model.named_modules()}
        given = [ignore] if isinstance(ignore, (str, nn.Module)) else list(ignore)
        unknown = [item for item in given if isinstance(item, nn.Module) and item not in paths]
        if unknown:
            raise GraphError(f"Layer to ignore {unknown[0]!r} is not in the model; give its name or itself.")
        names = tuple(item if isinstance(item, str) else paths[item] for item in given)
        return cls(candidates, names, min_channels, rounding_of(round_to, model))


@dataclass(frozen=True)
class _Path:
    """A network pruned step by step, and a record of each step."""

    network: nn.Module
    account: list[dict[str, Any]]
    cost_power: float


@dataclass(frozen=True)
class _Search:
    """What plans of several cost powers share; see :func:`plan_jointly`."""

    goal: _Goal
    batches: Iterable[Any]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    steps: int
    damping: float
    max_samples: int
    reestimate: bool

    def paths(self, model: nn.Module, cost_powers: Sequence[float], limits: _Limits, bar: Any) -> list[_Path]:
        """Go each way that can be gone: one may leave a network that cannot be traced any further."""
        found: list[_Path] = []
        for number, power in enumerate(cost_powers):
            try:
                found.append(self.path(model, power, limits, bar))
            except (GraphError, PlanError):
                if number + 1 == len(cost_powers) and not found:
                    raise
        return found

    def path(self, model: nn.Module, cost_power: float, limits: _Limits, bar: Any) -> _Path:
        """Go to the budget on a copy of a network, which carries its plan."""
        goal, inputs = self.goal, self.goal.example_inputs
        work = copy.deepcopy(model).eval()
        if hasattr(work, "pruning_plan"):
            del work.pruning_plan
        account: list[dict[str, Any]] = []
        for step in range(self.steps):
            now, last = goal.value(work), step + 1 == self.steps
            if step and now <= goal.limit:
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said once already, when the budget was checked
                items = _Items.of(work, inputs, limits)
            cost = MarginalCost(work, inputs, items.groups, items.blocks, goal.budget)
            with unchanged(work):
                rows, movable = _gradients(work, items, self.batches, self.loss_fn, self.max_samples)
            costs = items.columns(cost.channels, cost.blocks).pow(cost_power)
            order = quadratic.removal_order(rows, self.damping, costs, holds=items.holds)
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
        return _Path(work, account, cost_power)

    @torch.no_grad()
    def settled_loss(self, network: nn.Module) -> float:
        """Return the mean loss of a copy whose batch normalisations have been settled."""
        network = copy.deepcopy(network).eval()
        reestimate_batchnorm(network, self.batches, self.loss_fn)
        losses = [float(self.loss_fn(network, batch)) for batch in self.batches]
        return pooled_mean(sum(losses), len(losses)) or 0.0


def _gradients(
    model: nn.Module,
    items: _Items,
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


@dataclass(frozen=True)
class _Items:
    """What can leave a network: channels of groups, and blocks; the columns of the quadratic model in this order.

    Args:
        groups: Prunable groups.
        every: All groups, also those that stay whole.
        blocks: Removable blocks.
        holds: By a block's column those of the channels and blocks inside it.
        removal: How blocks leave.
        min_channels: No group gets narrower.
        round_to: Widths become multiples of this.
    """

    groups: tuple[ChannelGroup, ...]
    every: tuple[ChannelGroup, ...]
    blocks: tuple[Block, ...]
    holds: dict[int, Tensor]
    removal: Callable[[Iterable[str]], Removal] | None
    min_channels: int
    round_to: int

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, limits: _Limits) -> _Items:
        """Find them in a network.

        Units of plain networks are no candidates: where one leaves, the channels on its two sides become the same.
        """
        after = [name for name in map(dense_names(model).after, limits.ignore) if name is not None]
        every = sound_groups(model, find_groups(model, example_inputs, ignore=after), example_inputs)
        groups = tuple(group for group in every if group.fixed is None)
        try:
            found = candidate_blocks(model, example_inputs, limits.candidates, after)
        except GraphError:
            if not groups:
                raise
            found = []
        blocks = tuple(block for block in found if block.kind != "unit")
        if not groups and not blocks:
            raise GraphError(f"{type(model).__name__} has neither a block nor a channel that may leave.")
        firsts = torch.tensor([0, *(group.width for group in groups)]).cumsum(0).tolist()
        holds = {}
        for number, block in enumerate(blocks):
            held = [torch.arange(firsts[i], firsts[i + 1]) for i, group in enumerate(groups) if _holds(block, group)]
            held += [torch.tensor([firsts[-1] + i]) for i, other in enumerate(blocks) if inside(other, block)]
            holds[firsts[-1] + number] = torch.cat(held) if held else torch.empty(0, dtype=torch.int64)
        removal = possible_removal(model, blocks, example_inputs) if blocks else None
        return cls(groups, tuple(every), blocks, holds, removal, limits.min_channels, limits.round_to)

    @property
    def channels(self) -> int:
        """Number of channel gates, which come first."""
        return sum(group.width for group in self.groups)

    def columns(self, channels: dict[str, float], blocks: dict[str, float]) -> Tensor:
        """Return a number a gate, from one a channel by group and one a block by name; at least a trifle."""
        values = [torch.full((group.width,), channels[group.name], dtype=torch.float64) for group in self.groups]
        values.append(torch.tensor([blocks[block.name] for block in self.blocks], dtype=torch.float64))
        column = torch.cat(values)
        return column.clamp_min(1e-6 * float(column.max()))

    def chosen(self, order: Tensor, number: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Return the channels kept by group, groups inside a block that leaves left out, and the blocks that leave."""
        taken = order[:number]
        leaving = [self.blocks[int(i) - self.channels] for i in taken if i >= self.channels]
        leaving = [block for block in leaving if not any(inside(block, other) for other in leaving)]
        position = torch.full((self.channels,), float(len(order)), dtype=torch.float64)
        in_order = order[order < self.channels]
        position[in_order] = torch.arange(len(in_order), dtype=torch.float64)
        scores = dict(zip((g.name for g in self.groups), position.split([g.width for g in self.groups]), strict=True))
        ranking = Ranking(self.groups, scores, round_to=self.round_to, min_channels=self.min_channels)
        kept = ranking.kept(int((taken < self.channels).sum()))
        within = {group.name for group in self.groups if any(_holds(block, group) for block in leaving)}
        kept = {name: index for name, index in kept.items() if name not in within}
        return kept, tuple(block.name for block in leaving)

    def slim(self, model: nn.Module, order: Tensor, number: int) -> nn.Module:
        """Return a copy of the network without so many items, not proven: to count and to time."""
        network = copy.deepcopy(model)
        kept, gone = self.chosen(order, number)
        widths = {group.name: group.width for group in self.groups}
        entries = [GroupPlan(name, widths[name], tuple(index.tolist())) for name, index in kept.items()]
        cut_channels(network, PruningPlan(tuple(entries)), self.every)
        if self.removal is not None and gone:
            self.removal(gone).perform(network)
        return network

    def plan(
        self, order: Tensor, number: int, rows: Tensor, movable: Tensor, damping: float
    ) -> tuple[PruningPlan | None, float]:
        """Return the plan of the first so many removals, with factors, and the loss change that the model expects."""
        kept, gone = self.chosen(order, number)
        removed = torch.zeros(rows.shape[1], dtype=torch.bool)
        idle = torch.zeros_like(removed)
        first = 0
        for group in self.groups:
            if group.name in kept:
                removed[first : first + group.width] = True
                removed[first + kept[group.name]] = False
            first += group.width
        for number_of, block in enumerate(self.blocks):
            if block.name in gone:
                removed[self.channels + number_of] = True
                held = self.holds[self.channels + number_of]
                idle[held], removed[held] = True, False
        if not bool(removed.any()):
            return None, 0.0
        z = quadratic.compensation(rows, removed, damping, movable=movable & ~idle)
        change = quadratic.loss_change(rows, z)
        entries, first = [], 0
        for group in self.groups:
            if group.name in kept:
                index = kept[group.name]
                can = bool(movable[first : first + group.width].all())
                factors = tuple(z[first + index].tolist()) if can else None
                entries.append(GroupPlan(group.name, group.width, tuple(index.tolist()), factors))
            first += group.width
        return PruningPlan(tuple(entries), gone), change


class _Goal:
    """The budget, on networks that come from a dense one."""

    def __init__(self, budget: MACs | Params | Latency, dense: nn.Module, example_inputs: Any) -> None:
        self.budget, self.example_inputs = budget, example_inputs
        self.meter = LatencyMeter(dense, example_inputs, budget) if isinstance(budget, Latency) else None
        self.limit = self.meter.limit if self.meter else budget.limit(Size(count(dense, example_inputs), 0))

    def value(self, network: nn.Module) -> float:
        """Return what the budget counts."""
        if self.meter is not None:
            return self.meter.ms(network)
        return self.budget.value(Size(count(network, self.example_inputs), 0))

    def check(self, model: nn.Module, limits: _Limits) -> None:
        """Refuse a budget out of reach.

        Raises:
            BudgetError: It is not met without everything that may leave.
        """
        items = _Items.of(model, self.example_inputs, limits)
        everything = torch.arange(items.channels + len(items.blocks))
        smallest = items.slim(model, everything, len(everything))
        if self.meter is not None:
            self.meter.check(smallest)
        elif (least := self.value(smallest)) > self.limit:
            raise BudgetError(
                f"{self.budget} allows {self.limit:,.0f}, but without all blocks and channels that can leave "
                f"{least:,.0f} remain. Ask for more. The model is unchanged."
            )

    def fewest(self, items: _Items, order: Tensor, work: nn.Module, limit: float, *, exact: bool) -> int:
        """Return how many removals meet the limit on the slim network itself; a step on the way is timed briefly."""
        if self.meter is not None:
            return self.meter.fewest(len(order), lambda number: items.slim(work, order, number), limit, exact=exact)
        return bisect.bisect_left(
            range(len(order)), True, key=lambda number: self.value(items.slim(work, order, number)) <= limit
        )


def _holds(block: Block, group: ChannelGroup) -> bool:
    """Tell whether all layers that write a group's channels lie in a block."""
    return all(block.holds(member.path) for member in group.members if member.axis == "out")
