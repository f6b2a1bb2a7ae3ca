"""Prove a plan: the network with the plan's channels and blocks held at zero against the compact one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from nni_plugin.adapters.torch_pruning.blocks import channel_part
from nni_plugin.adapters.torch_pruning.compare import TOLERANCE, Parity, compare, difference
from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.adapters.torch_pruning.probe import without_chance
from nni_plugin.cost import count_params
from nni_plugin.errors import SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.layers.removal import Removal, find_removal
from nni_plugin.parts import parts_of
from nni_plugin.plan import PruningPlan
from nni_plugin.wrappers import checked_network


def verify(
    model_before: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    groups: Sequence[ChannelGroup] | None = None,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare the masked network with the compact one on the example inputs, in eval mode.

    Args:
        model_before: The dense network; copied twice, itself untouched.
        plan: The plan to prove, with its factors.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        groups: The network's groups where they are known already; None finds them. Not used with blocks.
        tolerance: Largest accepted relative difference.

    Returns:
        The differences; `.ok` says whether they are acceptable. With blocks the larger ones of two steps: all layers
        of the blocks at zero against the network without them, then its channels.

    Raises:
        PlanError: The plan does not fit the network.
        SurgeryError: One of the two networks gives other outputs in number or shape, or does not run.
    """
    model_before = checked_network(model_before)
    warn_of_another(model_before, plan)
    if plan.removed_blocks:
        removal = find_removal(model_before, plan.removed_blocks, example_inputs)
        return verify_with_blocks(model_before, plan, removal, example_inputs, tolerance=tolerance)
    if groups is not None:
        return compare(model_before, plan, example_inputs, groups, tolerance=tolerance)
    found = find_groups(model_before, example_inputs, parts=parts_of(plan.provenance))
    try:
        parity = compare(model_before, plan, example_inputs, found, tolerance=tolerance)
    except SurgeryError:
        if (sound := without_chance(model_before, found, example_inputs)) is None:
            raise
    else:
        if parity.ok or (sound := without_chance(model_before, found, example_inputs)) is None:
            return parity
    return compare(model_before, plan, example_inputs, sound, tolerance=tolerance)


def verify_with_blocks(
    model_before: nn.Module,
    plan: PruningPlan,
    removal: Removal,
    example_inputs: Any,
    *,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Do what :func:`verify` does with a plan that removes blocks, where it is known how they leave."""
    held, slim = copy.deepcopy(model_before), copy.deepcopy(model_before)
    removal.perform(slim)
    with removal.held(held):
        parity = Parity(*difference(held, slim, example_inputs), tolerance)
    rest, groups = channel_part(plan, removal, model_before, slim, example_inputs)
    if not rest.groups:
        return parity
    channels = compare(slim, rest, example_inputs, groups, tolerance=tolerance)
    largest = max(parity.max_abs, channels.max_abs), max(parity.max_rel, channels.max_rel)
    return Parity(*largest, tolerance, channels.renormalised)


def warn_of_another(model: nn.Module, plan: PruningPlan) -> None:
    """Warn where a plan was made on a network of another size: names and widths of a deeper one may fit by chance."""
    params = count_params(model)
    if plan.cost_before is not None and plan.cost_before.params != params:
        warnings.warn(
            f"The plan was made on a network of {plan.cost_before.params:,} parameters, this one has {params:,}: "
            "what the plan does not name stays whole. Make a plan on this network, unless the two are meant to differ.",
            stacklevel=4,
        )
