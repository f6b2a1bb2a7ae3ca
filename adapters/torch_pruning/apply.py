"""Apply a plan to a network: check that it fits, prove it, cut, run; on any error everything is as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nni_plugin.adapters.torch_pruning.blocks import channel_part, check_units, note_removed
from nni_plugin.adapters.torch_pruning.compare import Parity, compare
from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.adapters.torch_pruning.probe import without_chance
from nni_plugin.adapters.torch_pruning.surgery import cut_channels
from nni_plugin.adapters.torch_pruning.verify import verify_with_blocks, warn_of_another
from nni_plugin.cost import call
from nni_plugin.errors import PlanError, SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.layers.removal import Removal, find_removal
from nni_plugin.parts import parts_of
from nni_plugin.plan import PruningPlan
from nni_plugin.sample_inputs import sample_of
from nni_plugin.wrappers import checked_network


def apply_plan(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    groups: Iterable[ChannelGroup] | None = None,
    check: bool = True,
) -> nn.Module:
    """Remove a plan's blocks and channels from a network, in place; on any error the network is unchanged.

    Args:
        model: The dense network that the plan is for; wrappers (DDP, `torch.compile`) are looked through.
        plan: What to keep.
        example_inputs: Inputs to trace the network with, and to prove the plan on.
        groups: The network's groups where they are known already; None finds them. Not used with blocks, without
            which the groups are others.
        check: Compare with the masked network on a copy first; without it the network is only run.

    Returns:
        The same object. Its attribute `pruning_plan` is the plan (with its `shells`, composed with earlier ones),
        `pruning_inputs` the form of the inputs.

    Warns:
        UserWarning: The plan fits, but was made on a network of another size.

    Raises:
        PlanError: The plan names a group that the network does not have, or of another width, or one that
            must stay whole, or a block that cannot be removed.
        SurgeryError: The smaller network does not run, or does not compute what the masked one does.
    """
    network = checked_network(model)
    warn_of_another(network, plan)
    if plan.removed_blocks:
        _apply_with_blocks(network, plan, example_inputs, check)
        return model
    found = list(find_groups(network, example_inputs, parts=parts_of(plan.provenance)) if groups is None else groups)
    try:
        _cut(network, plan, found, example_inputs, check)
    except SurgeryError:
        if groups is not None:
            raise
        if (sound := without_chance(network, found, example_inputs)) is None:
            raise
        _cut(network, plan, sound, example_inputs, check)
    return model


def _cut(model: nn.Module, plan: PruningPlan, groups: list[ChannelGroup], example_inputs: Any, check: bool) -> None:
    if check:
        _prove(compare(model, plan, example_inputs, groups))
    if plan.channels_removed == 0 and not any(group.factors for group in plan.groups):
        warnings.warn("The plan removes nothing: the network stays as it is.", stacklevel=4)
    composed = _composed(model, plan)
    with _put_back_on_error() as stack:
        stack.callback(cut_channels(model, plan, groups))
        _run(model, example_inputs)
    model.pruning_plan = composed  # type: ignore[assignment]
    model.pruning_inputs = sample_of(example_inputs)  # type: ignore[assignment]


def _apply_with_blocks(model: nn.Module, plan: PruningPlan, example_inputs: Any, check: bool) -> None:
    """Take the blocks out, then the channels of what remains."""
    removal = find_removal(model, plan.removed_blocks, example_inputs)
    check_units(model, removal, getattr(model, "pruning_plan", None), example_inputs)
    if check:
        _prove(verify_with_blocks(model, plan, removal, example_inputs))
    composed = _composed(model, replace(plan, shells=removal.shells))
    before = dict.fromkeys(model.parameters(), "")
    # Channels are found on the smaller network, those rooted in a block on the whole one: both are needed at once.
    rest, groups = _channel_part(plan, removal, model, example_inputs)
    with _put_back_on_error() as stack:
        stack.callback(removal.perform(model))
        stack.callback(note_removed(before, model, plan.digest))
        stack.callback(cut_channels(model, rest, groups, digest=plan.digest))
        _run(model, example_inputs)
    model.pruning_plan = composed  # type: ignore[assignment]
    model.pruning_inputs = sample_of(example_inputs)  # type: ignore[assignment]


def _channel_part(
    plan: PruningPlan, removal: Removal, model: nn.Module, example_inputs: Any
) -> tuple[PruningPlan, list[ChannelGroup]]:
    if not plan.groups:
        return channel_part(plan, removal, model, model, example_inputs)
    slim = copy.deepcopy(model)
    removal.perform(slim)
    return channel_part(plan, removal, model, slim, example_inputs)


def _prove(parity: Parity) -> None:
    if not parity.ok:
        raise SurgeryError(f"{parity}. The model is unchanged; plan with the layers at fault in `ignore`.")


def _composed(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    earlier = getattr(model, "pruning_plan", None)
    return plan if earlier is None else earlier.then(plan)


@contextmanager
def _put_back_on_error() -> Iterator[ExitStack]:
    """Collect what undoes the steps of a cut; undo them, the latest first, when one of them fails."""
    with ExitStack() as stack:
        try:
            yield stack
        except PlanError:
            raise
        except Exception as error:
            raise SurgeryError(
                f"The network does not run without the channels and blocks of this plan ({type(error).__name__}: "
                f"{error}). It has been put back as it was; plan with the layers at fault in `ignore`."
            ) from error
        stack.pop_all()


def _run(model: nn.Module, example_inputs: Any) -> None:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            call(model, example_inputs)
    finally:
        for module, training in modes.items():
            module.training = training
