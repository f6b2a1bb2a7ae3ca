"""`ModelSpeedup` where NNI's own does not run any more: masks in, a smaller network out.

The masks become a :class:`~nni_plugin.plan.PruningPlan` and are applied through the dependency graph, in five steps:
weights are multiplied with their masks; the blocks that add nothing are found and leave whole
(:mod:`~nni_plugin.pruners.dead_blocks`); in what remains, the channels that nobody gets anything from are found
(:mod:`~nni_plugin.pruners.dead_channels`); their constants are handed to their readers
(:mod:`~nni_plugin.pruners.constants`); they are cut. The result is compared with the masked network, and what
could not be removed, or is not the same, is said.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import find_groups, sound_groups, verify
from nni_plugin.adapters.torch_pruning.apply import apply_plan
from nni_plugin.adapters.torch_pruning.slicing import sliced
from nni_plugin.adapters.torch_pruning.surgery import CUTS
from nni_plugin.adapters.torch_pruning.verify import verify_with_blocks
from nni_plugin.cost import call, count, tensors_in
from nni_plugin.errors import MaskError, SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.layers.removal import Removal, find_removal
from nni_plugin.plan import PruningPlan
from nni_plugin.pruners.constants import Constants
from nni_plugin.pruners.dead_blocks import dead_blocks
from nni_plugin.pruners.dead_channels import Verdict, dead_channels, plan_from_masks
from nni_plugin.pruners.line_up import Order, note_orders, order_of, reorder
from nni_plugin.pruners.masks import load_masks, parameter_masks
from nni_plugin.pruners.speedup_report import SpeedupReport
from nni_plugin.tensors import tensor_of

TOLERANCE = 1e-5
"""Difference of masked and compact network, over the largest output, from which on it is warned of."""


class ModelSpeedup:
    """Make a masked network small: drop-in for `nni.compression.speedup.ModelSpeedup`.

    Args:
        model: The network, unwrapped (`pruner.unwrap_model()`); changed in place by :meth:`speedup_model` only.
            Parameters stay the same objects.
        dummy_input: One tensor `[N, ...]`, or a tuple or dict of inputs, to trace the network with.
        masks_or_file: Masks as any pruner returns them, `{module: {target: mask}}`, or the path of a file of them.
        map_location: Where masks of a file go, as in `torch.load`.
        batch_dim: Must be 0.
        batch_size: Taken for compatibility; masks are followed along the graph, not inferred from data.
        customized_mask_updaters: Must be empty: there are no rules per operator that could be replaced.
        customized_replacers: Must be empty: layers are not replaced, their tensors shrink.
        graph_module: Must be None: the graph is found by tracing autograd.
        garbage_collect_values: Taken for compatibility; no values are kept.
        logger: Is told the report; None for this module's own.

    Attributes:
        plan: The plan that was applied, blocks and channels in one; `carry_optimizer(optimizer, speedup.plan)` takes an
            optimizer along. None before :meth:`speedup_model`. Channels of grouped layers may be put into another order
            first; the plan then counts in that order, and `plan.provenance["reordered"]` has the old channel at each
            place, by group.
        report: What became of the masks, None before.

    Raises:
        MaskError: The masks cannot be read or do not fit the network, or an argument asks for what NNI's own way needs.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> keep = torch.tensor([1, 0, 0, 1])
        >>> masks = {"0": {"weight": keep.reshape(4, 1, 1, 1).expand(4, 1, 3, 3), "bias": keep}}
        >>> ModelSpeedup(model, torch.randn(1, 1, 4, 4), masks).speedup_model()[3]
        Linear(in_features=8, out_features=2, bias=True)
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_or_file: Any,
        map_location: Any = None,
        batch_dim: int = 0,
        batch_size: int = 8,
        customized_mask_updaters: Any = None,
        customized_replacers: Any = None,
        graph_module: Any = None,
        garbage_collect_values: bool = True,
        logger: logging.Logger | None = None,
    ) -> None:
        refused = {
            "customized_mask_updaters": customized_mask_updaters,
            "customized_replacers": customized_replacers,
            "graph_module": graph_module,
            "batch_dim": batch_dim,
        }
        for name, value in refused.items():
            if value:
                raise MaskError(
                    f"{name}={value!r} belongs to NNI's own way of tracing; leave it out. See ModelSpeedup."
                )
        self.model, self.dummy_input = model, dummy_input
        self.masks = parameter_masks(model, load_masks(masks_or_file, map_location))
        self.logger = logger or logging.getLogger(__name__)
        self.plan: PruningPlan | None = None
        self.report: SpeedupReport | None = None

    def speedup_model(self) -> nn.Module:
        """Remove what the masks leave without effect, in place.

        Weights that are masked and stay are zero afterwards. Mode and statistics stay as they are, but for running
        means that take over constants of removed channels.

        Returns:
            The same model, smaller. Its attribute `pruning_plan` is the plan.

        Raises:
            MaskError: It was called before.
            GraphError: The network does not run on the dummy input or cannot be traced; it is unchanged.
            SurgeryError: The smaller network does not compute what the masked one does; it is unchanged.
        """
        if self.plan is not None:
            raise MaskError("The masks have been applied already; what they spoke of is no longer there.")
        model, inputs = self.model, self.dummy_input
        groups = find_groups(model, inputs, keep_host=True)
        before = count(model, inputs)
        with _restored_on_error(model):
            masks = {tensor_of(model, name): mask for name, mask in self.masks.items()}
            for parameter, mask in masks.items():
                parameter.data.mul_(mask.to(parameter))
            expected = self._outputs()
            removal, blocks_left = self._dead_blocks()
            called = removal.names.before
            with _taken_out(removal, model):
                here = {name: masks[parameter] for name, parameter in model.named_parameters() if parameter in masks}
                if removal.blocks:
                    groups = find_groups(model, inputs, keep_host=True)
                orders = self._line_up(groups, here, expected)
                plan, verdicts, groups = self._plan(groups, here, called)
                constants = Constants(model, plan, groups)
                with constants.listening():
                    self._outputs()
                inexact = {called(path): why for path, why in constants.fold().items()}
            plan = replace(
                plan,
                groups=tuple(replace(entry, name=called(entry.name)) for entry in plan.groups),
                removed_blocks=tuple(block.name for block in removal.blocks),
                cost_before=before,
                provenance={
                    **plan.provenance,
                    "reordered": {called(order.group.name): order.source.tolist() for order in orders},
                },
            )
            apply_plan(model, plan, inputs, groups=groups)
        zeros_left = _zeros_left(model, masks, plan)
        note_orders(model, plan, orders)
        difference, relative = _distance(expected, self._outputs())
        for path in (path for verdict in verdicts for path in verdict.renormalised):
            inexact[path] = "it normalises over channels, of which some have left"
        after = count(model, inputs)
        applied = model.pruning_plan
        assert isinstance(applied, PruningPlan)
        model.pruning_plan = replace(applied, cost_after=after)
        self.plan = replace(plan, cost_after=after)
        removed = self.plan.removed_blocks
        self.report = SpeedupReport(verdicts, difference, relative, inexact, zeros_left, removed, blocks_left)
        self.logger.info("%s; %s -> %s", self.report, before, after)
        if self.report.left or blocks_left or not relative <= TOLERANCE:
            warnings.warn(str(self.report), stacklevel=2)
        return model

    def _dead_blocks(self) -> tuple[Removal, dict[str, str]]:
        """Find the blocks that add nothing, and how they leave; those that must stay, with the reasons."""
        blocks, stay = dead_blocks(self.model, self.masks, self.dummy_input)
        nothing = Removal((), (), {})
        if not blocks:
            return nothing, stay
        names = tuple(block.name for block in blocks)
        removal = find_removal(self.model, names, self.dummy_input)
        try:
            parity = verify_with_blocks(self.model, PruningPlan((), names), removal, self.dummy_input)
            failure = None if parity.ok else str(parity)
        except SurgeryError as error:
            failure = str(error)
        return (removal, stay) if failure is None else (nothing, stay | dict.fromkeys(names, failure))

    def _line_up(self, groups: list[ChannelGroup], masks: Mapping[str, Tensor], expected: list[Tensor]) -> list[Order]:
        """Reorder channels where that lets more of them leave; taken back should the outputs change."""
        orders = []
        for group in groups:
            if group.fixed is None and group.units < group.width:
                order = order_of(self.model, group, dead_channels(self.model, group, masks))
                if order is not None:
                    reorder(self.model, masks, order)
                    orders.append(order)
        if orders and not _distance(expected, self._outputs())[1] <= TOLERANCE:
            for order in reversed(orders):
                reorder(self.model, masks, order.inverse)
            return []
        return orders

    def _plan(
        self, groups: list[ChannelGroup], masks: Mapping[str, Tensor], called: Callable[[str], str]
    ) -> tuple[PruningPlan, tuple[Verdict, ...], list[ChannelGroup]]:
        """Turn the masks into a plan that the network survives; groups that fail are left whole, with the reason."""
        plan, verdicts = plan_from_masks(self.model, groups, masks, called)
        try:
            sound = verify(self.model, plan, self.dummy_input, groups=groups).ok
        except SurgeryError:
            sound = False
        if not sound:
            groups = sound_groups(self.model, groups, self.dummy_input)
            plan, verdicts = plan_from_masks(self.model, groups, masks, called)
        return plan, verdicts, groups

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        """Run the network in eval mode on the dummy input, and on the same values in another order."""
        modes = {module: module.training for module in self.model.modules()}
        generator = torch.Generator().manual_seed(0)
        try:
            self.model.eval()
            outputs = [call(self.model, x) for x in (self.dummy_input, _shuffled(self.dummy_input, generator))]
        finally:
            for module, training in modes.items():
                module.training = training
        return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def _zeros_left(model: nn.Module, masks: Mapping[Tensor, Tensor], plan: PruningPlan) -> int:
    """Count the masked weights that are still there once a plan has been applied."""
    left, digest = 0, plan.digest
    for parameter in model.parameters():
        if parameter in masks:
            cuts = [cut for cut in CUTS.get(parameter, []) if cut.digest == digest]
            left += int((~sliced(masks[parameter], cuts[-1].keep if cuts else {})).sum())
    return left


@contextmanager
def _taken_out(removal: Removal, model: nn.Module) -> Iterator[None]:
    """Have blocks out of a network for a while."""
    put_back = removal.perform(model)
    try:
        yield
    finally:
        put_back()


def _distance(expected: list[Tensor], got: list[Tensor]) -> tuple[float, float]:
    """Return the largest absolute difference, and the same over the largest expected value."""
    pairs = [(a, b) for a, b in zip(expected, got, strict=True) if a.numel()]
    largest = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    difference = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    return difference, difference / largest if largest else difference


def _shuffled(value: Any, generator: torch.Generator) -> Any:
    """Copy nested inputs, the values of each floating-point tensor in another order: still what the network expects."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.numel() == 0:
            return value
        if bool((value == value.flatten()[0]).all()):  # zeros or ones, as dummies often are
            return torch.rand(value.shape, generator=generator).to(value)
        order = torch.randperm(value.numel(), generator=generator)
        return value.detach().flatten()[order.to(value.device)].reshape(value.shape)
    if isinstance(value, Mapping):
        return {key: _shuffled(item, generator) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_shuffled(item, generator) for item in value)
    return value


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put back values and gradients, should anything fail; shapes are put back by whoever cuts."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.data.copy_(copy)
        raise
