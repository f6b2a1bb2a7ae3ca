"""Carry an optimizer over a cut: its moments are sliced exactly as their parameters were, those of blocks leave."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nni_plugin.adapters.torch_pruning.slicing import sliced
from nni_plugin.adapters.torch_pruning.surgery import CUTS, REMOVED, Cut
from nni_plugin.errors import SurgeryError
from nni_plugin.plan import PruningPlan


def carry_optimizer(optimizer: Optimizer, plan: PruningPlan) -> Optimizer:
    """Slice an optimizer's state (momentum, Adam's moments, ...) by a plan that has been applied.

    Parameters of removed blocks leave the optimizer; their parameter groups stay, empty ones too, for schedulers.

    Args:
        optimizer: The optimizer of the network that the plan was applied to. Parameters are still the same
            objects; learning rates, parameter groups and step counts stay. Optimizers that it holds (of timm's
            Lookahead, of SAM) are carried too.
        plan: The plan, after `plan.apply(model, example_inputs)`. Calling twice changes nothing more.

    Returns:
        The same optimizer.

    Raises:
        SurgeryError: The plan has not been applied to this optimizer's parameters; nothing is changed.
    """
    optimizers = list(_with_inner(optimizer))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cuts = {parameter: cut for parameter in parameters for cut in CUTS.get(parameter, []) if cut.digest == plan.digest}
    gone = {parameter for parameter in parameters if plan.digest in REMOVED.get(parameter, [])}
    effective = plan.channels_removed or plan.removed_blocks or any(group.factors for group in plan.groups)
    if not cuts and not gone and effective:
        raise SurgeryError(
            "None of the optimizer's parameters was cut by this plan. Apply it first (plan.apply), to the network "
            "that this optimizer trains; the optimizer is unchanged."
        )
    for each in optimizers:
        for group in each.param_groups:
            staying = [i for i, parameter in enumerate(group["params"]) if parameter not in gone]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in staying]
        for parameter in gone:
            each.state.pop(parameter, None)
        afresh = _forgotten(each) if cuts or gone else 0
        for parameter, cut in cuts.items():
            if cut.keep or tuple(parameter.shape) != cut.shape:
                afresh += not _carried(each.state, parameter, cut)
        if afresh:
            warnings.warn(
                f"{type(each).__name__} keeps state that does not follow its parameters' shapes; it starts afresh for "
                f"{afresh} of them.",
                stacklevel=2,
            )
    return optimizer


def _with_inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer and those that it holds, each once."""
    seen: set[int] = set()
    waiting = [optimizer]
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [value for value in vars(each).values() if isinstance(value, Optimizer)]


def _forgotten(optimizer: Optimizer) -> int:
    """Let an optimizer of one history for all parameters start afresh; return for how many it does."""
    if not isinstance(optimizer, LBFGS):
        return 0
    optimizer._params = optimizer.param_groups[0]["params"]
    stepped: int | None = vars(optimizer)["_numel_cache"]
    if stepped in (None, sum(parameter.numel() for parameter in optimizer._params)):
        return 0  # has not stepped, or has been carried already
    optimizer._numel_cache = None
    optimizer.state.clear()
    return len(optimizer._params)


def _carried(states: MutableMapping[Tensor, Any], parameter: Tensor, cut: Cut) -> bool:
    """Slice what an optimizer keeps of a parameter, or drop it where it does not follow the shape."""
    state = states.get(parameter, {})
    if all(_follows(value, (cut.shape, tuple(parameter.shape))) for value in state.values()):
        for key, value in state.items():
            if isinstance(value, Tensor) and tuple(value.shape) == cut.shape:
                state[key] = sliced(value, cut.keep)
        return True
    states.pop(parameter)
    return False


def _follows(value: object, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Tell whether an entry is a number or of its parameter's shape, before or after the cut."""
    if isinstance(value, Tensor):
        return value.dim() == 0 or value.numel() == 1 or tuple(value.shape) in shapes
    return value is None or isinstance(value, (bool, int, float, str))
