"""Scores and a budget make a plan; the network that is asked about stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nni_plugin.budgets import Budget
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.checks import Selection, checked_criterion
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.rerun import RandomState
from nni_plugin.errors import CriterionError, ScheduleError
from nni_plugin.groups import ChannelGroup
from nni_plugin.parts import DEFAULT_PARTS
from nni_plugin.plan import PruningPlan
from nni_plugin.processes import gathered, pooled_mean
from nni_plugin.schedules import Continuous, Gradual, OneShot, Schedule
from nni_plugin.scorer import ForeignCriterion, Scorer
from nni_plugin.wrappers import checked_network


def plan_channels(
    model: nn.Module,
    example_inputs: Any,
    criterion: Criterion | ForeignCriterion,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    budget: Budget,
    *,
    schedule: Schedule | None = None,
    round_to: int | None = None,
    min_channels: int = 1,
    ignore: Iterable[str | nn.Module] = (),
    select: Selection = "all",
    cost_aware: bool | None = None,
    divide_by_blocks: bool = False,
    isomorphic: bool = False,
    parts: Collection[str] = DEFAULT_PARTS,
    reestimate: bool = False,
) -> PruningPlan:
    """Choose the channels to keep so that a network meets a budget.

    Args:
        model: Scored in the mode it is in (`model.eval()` for the network as it is used; `model.train()` as it is
            trained). Weights, statistics, gradients and mode are put back. Wrappers (DDP, `torch.compile`) are looked
            through: the network inside is scored.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        criterion: One of `nni_plugin.criteria`, or any stock importance of Torch-Pruning.
        batches: Minibatches, anything that `loss_fn` takes; gone through again while a schedule goes on. Not
            read by a criterion that needs no data.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar.
        budget: `MACs`, `Params` or `Channels` kept, met exactly, within one unit of removal; or `Latency`, met as
            measured on the slim network, within 3 %, its channels chosen by a knapsack over measured layers (but in
            the order of a criterion that gives one, as `OBS` does).
        schedule: `OneShot()` scores once; `Iterative(...)` masks and scores anew, without training between.
        round_to: Widths become multiples of this (the nearest), or stay whole; None: 8 for a model on CUDA, else 1.
        min_channels: No group gets narrower.
        ignore: Layers to leave whole, as modules or names; the classifier always is.
        select: Which groups may be pruned: `"all"`, `"skip-only"` (coupled across blocks by additions), `"no-skip"`.
        cost_aware: Rank by loss per unit of what the budget counts; None: as the criterion wants it. Under `Latency` a
            knapsack weighs loss against time in any case.
        divide_by_blocks: Divide the score of a residual group by the number of blocks that share its gate.
        isomorphic: Compare groups built alike with each other alone; all kinds lose the same fraction.
        parts: Which parts of a transformer may shrink: `"heads"` or `"head_dim"`, `"mlp"`, `"embedding"`.
        reestimate: Estimate the statistics of batch normalisations anew after each step of a schedule. A plan
            holds no statistics: call `reestimate_batchnorm` on the pruned network as well.

    With a process group of `torch.distributed` every process calls this, each with its share of the minibatches; all
    get the plan that one process would find on all of them. A stock importance that reads gradients sees only those
    of the first process.

    Returns:
        The plan; `plan.explain()` shows it, `plan.apply(model, example_inputs)` does it.

    Raises:
        BudgetError: The budget is none, or cannot be met; the text says what can be reached.
        CriterionError: The criterion is none (such as a name), there is no batch, a loss is not finite, or a layer
            lacks gradients.
        DataError: With `reestimate`, the minibatches leave a normalisation without finite statistics.
        GraphError: The network cannot be traced, or nothing may be pruned.
        ModelError: The model is no network.
    """
    model = checked_network(model)
    with unchanged(model):
        pruner = ChannelPruner(
            model,
            example_inputs,
            criterion,
            budget,
            schedule=schedule or OneShot(),
            round_to=round_to,
            min_channels=min_channels,
            ignore=ignore,
            select=select,
            cost_aware=cost_aware,
            divide_by_blocks=divide_by_blocks,
            isomorphic=isomorphic,
            parts=parts,
            cut="never",
        )
        return run_without_training(pruner, batches, loss_fn, reestimate=reestimate)


def run_without_training(
    pruner: ChannelPruner,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    reestimate: bool = False,
) -> PruningPlan:
    """Drive a pruner to its budget on minibatches, without an optimizer; returns its plan.

    Args:
        pruner: The pruner; its network's gradients are used up, its removed channels are zero afterwards.
        batches: Minibatches; one pass for a one-shot schedule, as many as it takes for others.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar.
        reestimate: Estimate the statistics of batch normalisations anew after each step.

    Raises:
        CriterionError: There is no batch, a loss is not finite, or a layer lacks gradients.
        ScheduleError: The schedule waits for training.
    """
    if isinstance(pruner.schedule, Continuous):
        raise ScheduleError(
            "A continuous schedule waits for the training loss to fall, and here nothing trains: use Iterative or "
            "OneShot, or call the pruner from a training loop."
        )
    pruner.scorer.evaluate_with(loss_fn)
    with pruner:
        if pruner.scorer.needs_data and not pruner.done:
            _check_data(batches, loss_fn)
            _pass_over(pruner, batches, loss_fn, reestimate)
        if not pruner.done:
            pruner.finish()
            _settle(pruner, batches, loss_fn, reestimate, window=batches)
        return pruner.plan()


def _check_data(batches: Any, loss_fn: Any) -> None:
    if not isinstance(batches, Iterable):
        raise CriterionError(f"Expected minibatches, a list or a loader, got {batches!r}. The model is unchanged.")
    if not callable(loss_fn):
        raise CriterionError(f"Expected loss_fn(model, batch) -> a scalar, got {loss_fn!r}. The model is unchanged.")


def _pass_over(
    pruner: ChannelPruner, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor], reestimate: bool
) -> None:
    """Score until the budget is met, or once over the minibatches for a one-shot schedule."""
    model, steps = pruner.model, len(pruner.steps)
    one_pass = isinstance(pruner.schedule, OneShot)
    step_a_pass = isinstance(pruner.schedule, Gradual) and pruner.schedule.minibatches is None
    total = len(batches) if isinstance(batches, Sized) else None
    window: list[Any] | None = [] if pruner.scorer.predicts and pruner.schedule.minibatches is not None else None
    with tqdm(desc="score", total=total if one_pass else None, unit="batch", delay=2, disable=None) as bar:
        while True:
            seen = 0
            for batch in batches:
                seen += 1
                if not pruner.scorer.foreign:  # a stock importance reads the sum over the minibatches
                    model.zero_grad(set_to_none=True)
                loss = pruner.scorer.backward(model, batch, loss_fn, create_graph=pruner.needs_graph)
                pruner.on_backward(loss, batch, loss_scale=1.0)
                pruner.on_step()
                bar.update()
                if window is not None:
                    window.append(batch)
                if len(pruner.steps) > steps:  # a window of its own for each step
                    steps = len(pruner.steps)
                    _settle(pruner, batches, loss_fn, reestimate, window)
                    window = None if window is None else []
                if pruner.done:
                    return
            _check_seen(seen, together=one_pass or step_a_pass)
            if step_a_pass:
                pruner.step()
                steps = len(pruner.steps)
                if pruner.scorer.predicts and steps > 1:  # the pass of this step has measured the one before
                    pruner.live.measure(pruner.steps[-1]["loss_before"], step=-2)
                _settle(pruner, batches, loss_fn, reestimate, window=batches if pruner.done else None)
            if one_pass or pruner.done:
                return


def _settle(
    pruner: ChannelPruner,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    reestimate: bool,
    window: Iterable[Any] | None,
) -> None:
    """After a step: a network as it goes on, and on the minibatches of the step's window what the step has done."""
    pruner.model.zero_grad(set_to_none=True)
    if reestimate:
        reestimate_batchnorm(pruner.model, batches, loss_fn)
    if window is not None and pruner.scorer.predicts:
        loss = _mean_loss(pruner.model, window, loss_fn)
        if loss is not None:
            pruner.live.measure(loss)


def _check_seen(seen: int, *, together: bool) -> None:
    """Refuse a pass without minibatches.

    Args:
        seen: How many this process has seen.
        together: Whether every process is at this point, so that all can be told.

    Raises:
        CriterionError: There were none.
    """
    if (min(gathered(seen)) if together else seen) == 0:
        where = " in one of the processes" if seen else ""
        raise CriterionError(f"There is no batch to score with{where}: the loader is empty (or used up).")


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]) -> float | None:
    """Return the mean loss over minibatches that can be gone through again, of all processes."""
    losses = [float(loss_fn(model, batch)) for batch in batches]
    return pooled_mean(sum(losses), len(losses))


def score_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion | ForeignCriterion,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """Score channels by one criterion on the network as it is used (in eval mode), without choosing any.

    Args:
        model: The network; weights, statistics, gradients and modes are put back.
        groups: The groups to score; for a stock importance of Torch-Pruning found with `keep_host=True`.
        criterion: One of `nni_plugin.criteria` (what it has collected before is forgotten; what it collects here
            stays, for `loss_changes`), or a stock importance.
        batches: Minibatches, gone through once; not read by a criterion that needs no data.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar.

    Returns:
        Scores by group name, float64, shape `[width]`, higher = keep; groups that a stock importance skips are left
        out.

    Raises:
        CriterionError: The criterion is none (such as a name), there is no batch, a score is not a number, or a layer
            lacks what is needed.
    """
    scorer = Scorer(checked_criterion(criterion))
    scorer.evaluate_with(loss_fn)
    with unchanged(model):
        model.eval()
        try:
            scorer.open(model, groups)
            seen = 0
            for batch in batches if scorer.needs_data else ():
                seen += 1
                if not scorer.foreign:  # a stock importance reads the sum over the minibatches
                    model.zero_grad(set_to_none=True)
                scorer.backward(model, batch, loss_fn, create_graph=scorer.needs_graph)
                scorer.update(model, groups, due=False, batch=batch)
            if scorer.needs_data:
                _check_seen(seen, together=True)
            scorer.read(groups)
            scores = scorer.scores(groups, {group.name: torch.arange(group.width) for group in groups}, 0.0)
        finally:
            scorer.close()
    return {name: score for name, score in scores.items() if not bool(torch.isinf(score).all())}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back a network's weights, buffers, gradients and modes, and the random state of the CPU and its device."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    random = RandomState(next((tensor.device for tensor in tensors.values()), torch.device("cpu")))
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        random.restore()
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        for module, training in modes.items():
            module.training = training
