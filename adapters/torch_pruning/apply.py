"""Apply a plan to a network: check that it fits, prove it, cut, run; on any error everything is as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.adapters.torch_pruning.surgery import cut_channels
from nni_plugin.adapters.torch_pruning.verify import verify
from nni_plugin.cost import call
from nni_plugin.errors import SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import PruningPlan


def apply_plan(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    groups: Iterable[ChannelGroup] | None = None,
    check: bool = True,
) -> nn.Module:
    """Remove a plan's channels from a network, in place; on any error the network is unchanged.

    Args:
        model: The dense network that the plan is for.
        plan: What to keep.
        example_inputs: Inputs to trace the network with, and to prove the plan on.
        groups: The network's groups where they are known already; None finds them.
        check: Compare with the masked network on a copy first; without it the network is only run.

    Returns:
        The same object. Its attribute `pruning_plan` is the plan (composed with earlier ones).

    Raises:
        PlanError: The plan names a group that the network does not have, or of another width, or one that
            must stay whole, or blocks.
        SurgeryError: The smaller network does not run, or does not compute what the masked one does.
    """
    found = list(find_groups(model, example_inputs) if groups is None else groups)
    if check:
        parity = verify(model, plan, example_inputs, groups=found)
        if not parity.ok:
            raise SurgeryError(f"{parity}. The model is unchanged; plan with the layers at fault in `ignore`.")
    if plan.channels_removed == 0 and not any(group.factors for group in plan.groups):
        warnings.warn("The plan removes nothing: the network stays as it is.", stacklevel=3)
    earlier = getattr(model, "pruning_plan", None)
    composed = plan if earlier is None else earlier.then(plan)
    undo = cut_channels(model, plan, found)
    try:
        _run(model, example_inputs)
    except BaseException as error:
        undo()
        if not isinstance(error, Exception):
            raise
        raise SurgeryError(
            f"The network does not run without the channels of this plan ({type(error).__name__}: {error}). It has "
            "been put back as it was; plan with the layers at fault in `ignore`."
        ) from error
    model.pruning_plan = composed  # type: ignore[assignment]
    return model


def _run(model: nn.Module, example_inputs: Any) -> None:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            call(model, example_inputs)
    finally:
        for module, training in modes.items():
            module.training = training
