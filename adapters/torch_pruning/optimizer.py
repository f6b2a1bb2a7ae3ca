"""Carry an optimizer over a cut: its moments are sliced exactly as their parameters were, those of blocks leave."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.optim import Optimizer

from nni_plugin.adapters.torch_pruning.slicing import sliced
from nni_plugin.adapters.torch_pruning.surgery import CUTS, REMOVED
from nni_plugin.errors import SurgeryError
from nni_plugin.plan import PruningPlan


def carry_optimizer(optimizer: Optimizer, plan: PruningPlan) -> Optimizer:
    """Slice an optimizer's state (momentum, Adam's moments, ...) by a plan that has been applied.

    Parameters of removed blocks leave the optimizer; their parameter groups stay, empty ones too, for schedulers.

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
    gone = {parameter for parameter in parameters if plan.digest in REMOVED.get(parameter, [])}
    effective = plan.channels_removed or plan.removed_blocks or any(group.factors for group in plan.groups)
    if not cuts and not gone and effective:
        raise SurgeryError(
            "None of the optimizer's parameters was cut by this plan. Apply it first (plan.apply), to the network "
            "that this optimizer trains; the optimizer is unchanged."
        )
    for group in optimizer.param_groups:
        staying = [i for i, parameter in enumerate(group["params"]) if parameter not in gone]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in staying]
    for parameter in gone:
        optimizer.state.pop(parameter, None)
    afresh = 0
    for parameter, cut in cuts.items():
        if not cut.keep and tuple(parameter.shape) == cut.shape:
            continue
        state = optimizer.state.get(parameter, {})
        if all(_follows(value, (cut.shape, tuple(parameter.shape))) for value in state.values()):
            for key, value in state.items():
                if isinstance(value, Tensor) and tuple(value.shape) == cut.shape:
                    state[key] = sliced(value, cut.keep)
        else:
            optimizer.state.pop(parameter)
            afresh += 1
    if afresh:
        warnings.warn(
            f"{type(optimizer).__name__} keeps state that does not follow its parameters' shapes; it starts afresh for "
            f"{afresh} of them.",
            stacklevel=2,
        )
    return optimizer


def _follows(value: object, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Tell whether an entry is a number or of its parameter's shape, before or after the cut."""
    if isinstance(value, Tensor):
        return value.dim() == 0 or value.numel() == 1 or tuple(value.shape) in shapes
    return value is None or isinstance(value, (bool, int, float, str))
