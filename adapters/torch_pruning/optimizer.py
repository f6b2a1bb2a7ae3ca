"""Carry an optimizer over a cut: its moments are sliced exactly as their parameters were."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.optim import Optimizer

from nni_plugin.adapters.torch_pruning.surgery import CUTS, Cut, sliced
from nni_plugin.errors import SurgeryError
from nni_plugin.plan import PruningPlan


def carry_optimizer(optimizer: Optimizer, plan: PruningPlan) -> Optimizer:
    """Slice an optimizer's state (momentum, Adam's moments, ...) by a plan that has been applied.

    Args:
        optimizer: The optimizer of the network that the plan was applied to. Parameters are still the same
            objects; learning rates, parameter groups and step counts stay.
        plan: The plan, after `plan.apply(model, example_inputs)`. Calling twice changes nothing more.

    Returns:
        The same optimizer.

    Raises:
        SurgeryError: The plan has not been applied to this optimizer's parameters; nothing is changed.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cuts = {parameter: cut for parameter in parameters for cut in CUTS.get(parameter, []) if cut.digest == plan.digest}
    if not cuts and (plan.channels_removed or any(group.factors for group in plan.groups)):
        raise SurgeryError(
            "None of the optimizer's parameters was cut by this plan. Apply it first (plan.apply), to the network "
            "that this optimizer trains; the optimizer is unchanged."
        )
    for parameter, cut in cuts.items():
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[key] = _carried(value, cut, parameter, key)
    return optimizer


def _carried(value: Tensor, cut: Cut, parameter: Tensor, key: str) -> Tensor:
    if tuple(value.shape) == cut.shape:
        return sliced(value, cut.keep)
    if value.shape == parameter.shape:
        return value
    # Factored or low-rank moments (Adafactor, ...) have no channel of their own to slice.
    warnings.warn(
        f"Optimizer state {key!r} of shape {tuple(value.shape)} does not follow its parameter of shape {cut.shape}; "
        "it starts again from zero.",
        stacklevel=4,
    )
    shape = [
        len(cut.keep[cut.shape.index(size)]) if size in cut.shape and cut.shape.index(size) in cut.keep else size
        for size in value.shape
    ]
    return value.new_zeros(shape)
