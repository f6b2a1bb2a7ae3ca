"""Scores and a budget make a plan; the network that is asked about stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nni_plugin.budgets import Budget
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import CriterionError, ScheduleError
from nni_plugin.plan import PruningPlan
from nni_plugin.schedules import Continuous, OneShot, Schedule
from nni_plugin.scorer import ForeignCriterion


def plan_channels(
    model: nn.Module,
    example_inputs: Any,
    criterion: Criterion | ForeignCriterion,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    budget: Budget,
    *,
    schedule: Schedule | None = None,
    round_to: int = 1,
    min_channels: int = 1,
    ignore: Iterable[str | nn.Module] = (),
) -> PruningPlan:
    """Choose the channels to keep so that a network meets a budget.

    Args:
        model: Scored in the mode it is in (`model.eval()` for the network as it is used; `model.train()` as it is
            trained). Weights, statistics, gradients and mode are put back.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        criterion: One of `nni_plugin.criteria`, or any stock importance of Torch-Pruning.
        batches: Minibatches, anything that `loss_fn` takes; gone through again while a schedule goes on. Not
            read by a criterion that needs no data.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar.
        budget: `MACs`, `Params` or `Channels` kept; met exactly, within one unit of removal.
        schedule: `OneShot()` scores once; `Iterative(...)` masks and scores anew, without training between.
        round_to: Widths become multiples of this (the nearest), or stay whole.
        min_channels: No group gets narrower.
        ignore: Layers to leave whole, as modules or names; the classifier always is.

    Returns:
        The plan; `plan.explain()` shows it, `plan.apply(model, example_inputs)` does it.

    Raises:
        BudgetError: The budget cannot be met; the text says what can be reached.
        CriterionError: There is no batch, a loss is not finite, or a layer lacks gradients.
        GraphError: The network cannot be traced, or nothing may be pruned.
    """
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
            cut="never",
        )
        try:
            return run_without_training(pruner, batches, loss_fn)
        finally:
            pruner.close()


def run_without_training(
    pruner: ChannelPruner, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]
) -> PruningPlan:
    """Drive a pruner to its budget on minibatches, without an optimizer; returns its plan.

    Args:
        pruner: The pruner; its network's gradients are used up, its removed channels are zero afterwards.
        batches: Minibatches; one pass for a one-shot schedule, as many as it takes for others.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar.

    Raises:
        CriterionError: There is no batch, a loss is not finite, or a layer lacks gradients.
        ScheduleError: The schedule waits for training.
    """
    if isinstance(pruner.schedule, Continuous):
        raise ScheduleError(
            "A continuous schedule waits for the training loss to fall, and here nothing trains: use Iterative or "
            "OneShot, or call the pruner from a training loop."
        )
    if pruner.scorer.needs_gradients and not pruner.done:
        with pruner:
            _pass_over(pruner, pruner.model, batches, loss_fn)
            return pruner.finish()
    return pruner.finish()


def _pass_over(
    pruner: ChannelPruner, model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]
) -> None:
    one_pass, steps = pruner.schedule.channels is None, len(pruner.steps)
    total = len(batches) if isinstance(batches, Sized) else None
    with tqdm(desc="score", total=total if one_pass else None, unit="batch", delay=2, disable=None) as bar:
        while True:
            seen = 0
            for batch in batches:
                seen += 1
                if not pruner.scorer.foreign:  # a stock importance reads the sum over the minibatches
                    model.zero_grad(set_to_none=True)
                loss = loss_fn(model, batch)
                if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
                    raise CriterionError(
                        f"loss_fn must return a scalar tensor that depends on parameters (requires_grad), got {loss}."
                    )
                loss.backward(create_graph=pruner.needs_graph)
                pruner.on_backward(float(loss.detach()), batch)
                pruner.on_step()
                if len(pruner.steps) > steps:  # a window of its own for each step
                    model.zero_grad(set_to_none=True)
                    steps = len(pruner.steps)
                bar.update()
                if pruner.done:
                    return
            if seen == 0:
                raise CriterionError("There is no batch to score with: the loader is empty (or used up).")
            if one_pass:
                return


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back a network's weights, buffers, gradients and modes, and the random state, at the end."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    random = copy.copy(torch.random.get_rng_state())
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        torch.random.set_rng_state(random)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        for module, training in modes.items():
            module.training = training
