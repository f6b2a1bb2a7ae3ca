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

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nni_plugin.adapters.torch_pruning import warn_of_unreached
from nni_plugin.budgets import Latency, MACs, Params
from nni_plugin.cost import count, on_device_of
from nni_plugin.errors import BudgetError, CriterionError, ScheduleError
from nni_plugin.layers.candidates import Candidates
from nni_plugin.machine import library_versions
from nni_plugin.plan import PruningPlan
from nni_plugin.processes import agreed
from nni_plugin.width_and_depth.goal import Goal
from nni_plugin.width_and_depth.items import Limits
from nni_plugin.width_and_depth.search import Search
from nni_plugin.wrappers import checked_network


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
    model = checked_network(model)
    if iter(batches) is batches:
        raise CriterionError("batches can be gone through only once: give a list or a loader. The model is unchanged.")
    example_inputs = on_device_of(model, example_inputs)
    limits = Limits.of(model, candidates, ignore, min_channels, round_to)
    warn_of_unreached(model, example_inputs)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # a loader may draw when it is gone through
        goal = Goal(budget, model, example_inputs)
        goal.check(model, limits)
        search = Search(goal, batches, loss_fn, steps, damping, max_samples, reestimate)
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
                {
                    "settled_losses": {
                        str(path.cost_power): loss if math.isfinite(loss) else None
                        for path, loss in zip(paths, losses, strict=True)
                    }
                }
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
    goal = Goal(budget, model, example_inputs)
    if goal.value(model) <= goal.limit:
        raise BudgetError(f"{budget} is met by the network as it is: nothing would be removed. Ask for less.")
    goal.check(model, Limits.of(model, candidates, ignore, min_channels, round_to))


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
