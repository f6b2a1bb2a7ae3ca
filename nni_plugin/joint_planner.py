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
savings weighed fully, by their root and not at all, which leaves depth alone, and the network that loses least on the
scoring images, its batch normalisations settled, decides.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nni_plugin.adapters.torch_pruning import apply_plan, find_groups, sound_groups
from nni_plugin.budgets import Channels, Latency, Layers, MACs, Params, Size
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count, on_device_of
from nni_plugin.criteria import OBS, quadratic
from nni_plugin.errors import BudgetError, CriterionError, GraphError
from nni_plugin.groups import ChannelGroup
from nni_plugin.latency_budget import LatencyMeter
from nni_plugin.layer_planner import Candidates, candidate_blocks
from nni_plugin.layers.block_gate import block_gate_gradients
from nni_plugin.layers.blocks import Block
from nni_plugin.machine import library_versions
from nni_plugin.marginal_cost import MarginalCost
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.planner import unchanged
from nni_plugin.processes import agreed, pooled_mean
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
    round_to: int = 1,
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
        ignore: Layers to leave whole.
        min_channels: No group gets narrower.
        round_to: Widths become multiples of this, or stay whole.
        reestimate: Estimate the statistics of batch normalisations anew between steps; the plan holds none.

    Returns:
        One plan with the blocks that leave, the channels that stay and their factors.

    Raises:
        BudgetError: The budget is of another kind or out of reach; the text says what can be reached.
        CriterionError: There is no minibatch, a loss is not finite, or a layer lacks gradients.
        GraphError: There is neither a block nor a channel to remove.
    """
    if isinstance(budget, (Channels, Layers)):
        raise BudgetError(f"{budget} counts channels or blocks alone; both leave here: give Latency, MACs or Params.")
    if not cost_powers:
        raise BudgetError("cost_powers must hold one number at least, such as 1.0 for loss per unit saved.")
    example_inputs = on_device_of(model, example_inputs)
    meter = LatencyMeter(model, example_inputs, budget) if isinstance(budget, Latency) else None
    goal = _Goal(budget, meter, model, example_inputs)
    search = _Search(goal, batches, loss_fn, steps, damping, max_samples, reestimate)
    limits = candidates, tuple(ignore), min_channels, round_to
    with tqdm(total=steps * len(cost_powers), desc="prune", unit="step", delay=2, disable=None) as bar:
        paths = [search.path(model, power, limits, bar) for power in cost_powers]
    losses = [search.settled_loss(path.network) for path in paths] if len(paths) > 1 else [None]
    chosen = agreed(min(range(len(paths)), key=lambda i: losses[i] or 0.0))
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
            "criterion": f"joint gates(damping={damping}, cost_power={cost_powers[chosen]})",
            "budget": repr(budget),
            "steps": account,
            "settled_losses": dict(zip(map(str, cost_powers), losses, strict=True)),
            **({} if meter is None else {"latency": meter.account(work)}),
            "versions": library_versions(),
        },
    )


@dataclass(frozen=True)
class _Path:
    """A network pruned step by step, and a record of each step."""

    network: nn.Module
    account: list[dict[str, Any]]


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

    def path(self, model: nn.Module, cost_power: float, limits: tuple[Any, ...], bar: Any) -> _Path:
        """Go to the budget on a copy of a network, which carries its plan."""
        goal, inputs = self.goal, self.goal.example_inputs
        work = copy.deepcopy(model).eval()
        if hasattr(work, "pruning_plan"):
            del work.pruning_plan
        account: list[dict[str, Any]] = []
        for step in range(self.steps):
            items, last = _Items.of(work, inputs, *limits), step + 1 == self.steps
            cost = MarginalCost(work, inputs, items.groups, items.blocks, goal.budget)
            with unchanged(work):
                rows, movable = _gradients(work, items, self.batches, self.loss_fn, self.max_samples)
            costs = items.columns(cost.channels, cost.blocks).pow(cost_power)
            order = quadratic.removal_order(rows, self.damping, costs, holds=items.holds)
            now = goal.value(work)
            limit = now - (now - goal.limit) / (self.steps - step)
            number = agreed(goal.fewest(items, order, work, limit, exact=last))
            plan, change = items.plan(order, number, rows, movable, self.damping)
            if plan is not None:
                apply_plan(work, plan, inputs)
                if self.reestimate and not last:
                    reestimate_batchnorm(work, self.batches, self.loss_fn)
            size = count(work, inputs)
            account.append({"macs": size.macs, "params": size.params, "predicted_loss_change": change})
            bar.update()
        return _Path(work, account)

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
    """Return per-sample gradients of all gates, channels first, `[N, gates]`, and which of them can take a factor."""
    parts, movable = [], torch.zeros(len(items.blocks), dtype=torch.bool)
    if items.groups:
        criterion = OBS(max_samples=max_samples)
        with criterion.collect(model, items.groups):
            for batch in batches:
                model.zero_grad(set_to_none=True)
                loss_fn(model, batch).backward()
                criterion.update()
                if criterion.samples >= max_samples:
                    break
        if criterion.samples == 0:
            raise CriterionError("There is no batch to score with: the loader is empty (or used up).")
        criterion.all_reduce()
        parts.append(criterion.rows)
        movable = torch.cat([criterion.movable, movable])
    if items.blocks:
        model.zero_grad(set_to_none=True)
        rows = block_gate_gradients(model, items.blocks, batches, loss_fn, max_samples=max_samples)
        parts.append(rows.to(parts[0].dtype) if parts else rows)
    return torch.cat(parts, 1), movable


@dataclass(frozen=True)
class _Items:
    """What can leave a network: channels of groups, and blocks; the columns of the quadratic model in this order.

    Args:
        groups: Prunable groups.
        blocks: Removable blocks.
        holds: By a block's column those of the channels inside it.
        min_channels: No group gets narrower.
        round_to: Widths become multiples of this.
    """

    groups: tuple[ChannelGroup, ...]
    blocks: tuple[Block, ...]
    holds: dict[int, Tensor]
    min_channels: int
    round_to: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Any,
        candidates: Candidates,
        ignore: tuple[str | nn.Module, ...],
        min_channels: int,
        round_to: int,
    ) -> _Items:
        """Find them in a network."""
        found = sound_groups(model, find_groups(model, example_inputs, ignore=ignore), example_inputs)
        groups = tuple(group for group in found if group.fixed is None)
        try:
            blocks = tuple(candidate_blocks(model, example_inputs, candidates))
        except GraphError:
            if not groups:
                raise
            blocks = ()
        firsts = torch.tensor([0, *(group.width for group in groups)]).cumsum(0).tolist()
        holds = {}
        for number, block in enumerate(blocks):
            inside = [
                torch.arange(firsts[i], firsts[i + 1])
                for i, group in enumerate(groups)
                if all(block.holds(member.path) for member in group.members if member.axis == "out")
            ]
            holds[firsts[-1] + number] = torch.cat(inside) if inside else torch.empty(0, dtype=torch.int64)
        return cls(groups, blocks, holds, min_channels, round_to)

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
        gone = tuple(self.blocks[int(i) - self.channels].name for i in taken if i >= self.channels)
        position = torch.full((self.channels,), float(len(order)), dtype=torch.float64)
        in_order = order[order < self.channels]
        position[in_order] = torch.arange(len(in_order), dtype=torch.float64)
        scores = dict(zip((g.name for g in self.groups), position.split([g.width for g in self.groups]), strict=True))
        ranking = Ranking(self.groups, scores, round_to=self.round_to, min_channels=self.min_channels)
        kept = ranking.kept(int((taken < self.channels).sum()))
        leaving = [block for block in self.blocks if block.name in gone]
        inside = {
            group.name
            for group in self.groups
            if any(all(block.holds(m.path) for m in group.members if m.axis == "out") for block in leaving)
        }
        return {name: index for name, index in kept.items() if name not in inside}, gone

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
                idle[self.holds[self.channels + number_of]] = True
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

    def __init__(
        self, budget: MACs | Params | Latency, meter: LatencyMeter | None, dense: nn.Module, example_inputs: Any
    ) -> None:
        self.budget, self.meter, self.example_inputs = budget, meter, example_inputs
        self.limit = meter.limit if meter else budget.limit(Size(count(dense, example_inputs), 0))

    def value(self, network: nn.Module) -> float:
        """Return what the budget counts."""
        if self.meter is not None:
            return self.meter.ms(network)
        return self.budget.value(Size(count(network, self.example_inputs), 0))

    def fewest(self, items: _Items, order: Tensor, work: nn.Module, limit: float, *, exact: bool) -> int:
        """Return how many removals meet the limit on the slim network itself; a step on the way is timed briefly."""

        def slim(number: int) -> nn.Module:
            network = copy.deepcopy(work)
            kept, gone = items.chosen(order, number)
            widths = {group.name: group.width for group in items.groups}
            entries = [GroupPlan(name, widths[name], tuple(index.tolist())) for name, index in kept.items()]
            if number:
                apply_plan(network, PruningPlan(tuple(entries), gone), self.example_inputs, check=False)
            return network

        if self.meter is not None:
            return self.meter.fewest(len(order), slim, limit, exact=exact)
        least = self.value(slim(len(order)))
        if least > limit:
            raise BudgetError(
                f"{self.budget} allows {limit:,.0f}, but without all blocks and channels that can leave {least:,.0f} "
                "remain. Ask for more. The model is unchanged."
            )
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self.value(slim(middle)) <= limit:
                high = middle
            else:
                low = middle + 1
        return low
