"""Cut channels out of a network by a plan: all tensors sliced first, then put in place together or not at all.

Parameters stay the same objects (only their data shrinks), so optimizers, hooks and tied weights keep their
references, and `requires_grad`, dtype, device, memory format and module classes stay as they were. Each cut is
noted per parameter, for :func:`nni_plugin.adapters.torch_pruning.carry_optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nni_plugin.adapters.torch_pruning.graph import forget_caches
from nni_plugin.errors import PlanError
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import PruningPlan
from nni_plugin.tensors import shrink_sizes, tensor_of


@dataclass(frozen=True)
class Cut:
    """What one plan did to one parameter.

    Args:
        digest: The plan's digest.
        shape: The parameter's shape before.
        keep: Positions kept, by dimension.
    """

    digest: str
    shape: tuple[int, ...]
    keep: Mapping[int, Tensor]


CUTS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Every cut of every living parameter, oldest first: `dict[Parameter, list[Cut]]`, held weakly."""

REMOVED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The digests of the plans that took a living parameter out of its network: `dict[Parameter, list[str]]`."""


def check_fit(plan: PruningPlan, groups: Iterable[ChannelGroup]) -> None:
    """Check that a plan is for the network that these groups were found on.

    Raises:
        PlanError: It names a group that is not there, or of another width, or one that must stay whole, parts
            channels that go together, or removes blocks, without which the groups are others.
    """
    found = {group.name: group for group in groups}
    if plan.removed_blocks:
        raise PlanError(
            f"Only channels can be removed here; the plan also removes blocks {', '.join(plan.removed_blocks)}. Apply "
            "the whole plan with plan.apply(model, example_inputs)."
        )
    for entry in plan.groups:
        group = found.get(entry.name)
        if group is None:
            raise PlanError(
                f"The plan is for another model: it has a group {entry.name!r}, this one has "
                f"{', '.join(sorted(found)[:8])}, ... The model is unchanged."
            )
        if group.width != entry.total:
            raise PlanError(
                f"The plan is for another model: group {entry.name!r} has {entry.total} channels in the plan and "
                f"{group.width} here. The model is unchanged."
            )
        if entry.removed and group.fixed:
            raise PlanError(f"Group {entry.name!r} must stay whole: {group.fixed}. The model is unchanged.")
        labels = group.unit[list(entry.removed)]
        if len(entry.removed) != int(torch.isin(group.unit, labels).sum()):
            raise PlanError(f"Group {entry.name!r}: the plan parts channels that go together. The model is unchanged.")


def cut_channels(
    model: nn.Module, plan: PruningPlan, groups: Iterable[ChannelGroup], *, digest: str | None = None
) -> Any:
    """Slice every tensor of a network by a plan, in place, without running it.

    Args:
        model: The network that `groups` was found on (or an equal one, e.g. its moving average).
        plan: What to keep; groups not named keep everything.
        groups: The network's coupled groups.
        digest: Digest of the plan that this one is a part of; None takes its own.

    Returns:
        A function that puts everything back.

    Raises:
        PlanError: The plan does not fit; nothing is changed.
    """
    groups, digest = list(groups), digest or plan.digest
    check_fit(plan, groups)
    keep = _positions_to_keep(model, plan, groups)
    factors = _factors(model, plan, groups)
    new: dict[str, Tensor] = {}
    cuts: dict[str, Cut] = {}
    for name in {**keep, **factors}:
        old = tensor_of(model, name)
        data = old.detach()
        for dim, factor in factors.get(name, {}).items():
            shape = [1] * data.dim()
            shape[dim] = -1
            data = data * factor.to(data).reshape(shape)
        new[name] = sliced(data, keep.get(name, {}))
        cuts[name] = Cut(digest, tuple(old.shape), keep.get(name, {}))
    sizes = _sizes(model, plan, groups)
    return _commit(model, new, cuts, sizes)


def kept_outputs(dense: nn.Module, plan: PruningPlan, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """Return the output channels that each narrower layer keeps of the dense network, by its name, ascending."""
    keep = _positions_to_keep(dense, plan, groups)
    layers = {name.removesuffix(".weight"): dims for name, dims in keep.items() if name.endswith(".weight")}
    return {
        path: dims[0]
        for path, dims in layers.items()
        if 0 in dims and isinstance(dense.get_submodule(path), (nn.Linear, nn.Conv2d))
    }


def _positions_to_keep(
    model: nn.Module, plan: PruningPlan, groups: Iterable[ChannelGroup]
) -> dict[str, dict[int, Tensor]]:
    """Return, for each tensor that shrinks, the positions kept along each dimension that does."""
    removed: dict[tuple[str, int], Tensor] = {}
    kept, first_name = plan.kept(), _first_names(model)
    for group in groups:
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[list(kept.get(group.name, range(group.width)))] = False
        if not gone.any():
            continue
        for piece in group.slices:
            size = tensor_of(model, piece.tensor).shape[piece.dim]
            key = (first_name.get(piece.tensor, piece.tensor), piece.dim)
            mask = removed.setdefault(key, torch.zeros(size, dtype=torch.bool))
            mask[piece.index[gone[piece.channel]]] = True
    keep: dict[str, dict[int, Tensor]] = {}
    for (name, dim), mask in removed.items():
        if bool(mask.all()):
            raise PlanError(f"{name!r} would lose all its {len(mask)} channels along dimension {dim}.")
        if bool(mask.any()):
            keep.setdefault(name, {})[dim] = (~mask).nonzero().flatten()
    return keep


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return for each name of a parameter the first name of the same one: tied weights are cut once."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _factors(model: nn.Module, plan: PruningPlan, groups: Iterable[ChannelGroup]) -> dict[str, dict[int, Tensor]]:
    """Return the factor of every position of the writers' affine tensors, where it is not one."""
    wanted = {entry.name: entry for entry in plan.groups if entry.factors is not None}
    result: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        entry = wanted.get(group.name)
        if entry is None or entry.factors is None:
            continue
        channel_factor = torch.ones(group.width, dtype=torch.float64)
        channel_factor[list(entry.kept)] = torch.tensor(entry.factors, dtype=torch.float64)
        for writer in group.writers:
            pieces = [p for p in writer.slices if not p.tensor.rpartition(".")[2].startswith("running_")]
            if not pieces or any(len(p.index) != len(writer.index) for p in pieces):
                raise PlanError(
                    f"Group {group.name!r} has factors, but its writer {writer.path!r} has no parameter of its own for "
                    "each channel (a normalisation without affine parameters, or a grouped transposed convolution). "
                    "Plan without factors for this group."
                )
            for piece in pieces:
                per_position = result.setdefault(piece.tensor, {}).setdefault(
                    piece.dim, torch.ones(tensor_of(model, piece.tensor).shape[piece.dim], dtype=torch.float64)
                )
                per_position[piece.index] *= channel_factor[piece.channel]
    return result


def sliced(data: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Return a tensor with only these positions along each dimension, in the memory format it had."""
    layout = torch.preserve_format
    if data.dim() == 4 and data.is_contiguous(memory_format=torch.channels_last) and not data.is_contiguous():
        layout = torch.channels_last
    for dim, positions in keep.items():
        data = data.index_select(dim, positions.to(data.device))
    return (
        data.clone(memory_format=layout) if layout is torch.preserve_format else data.contiguous(memory_format=layout)
    )


def _sizes(model: nn.Module, plan: PruningPlan, groups: Iterable[ChannelGroup]) -> dict[nn.Module, dict[str, object]]:
    """Return the size attributes of each layer after the cut."""
    gone_by_axis: dict[tuple[str, Any], set[int]] = {}
    kept = plan.kept()
    for group in groups:
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[list(kept.get(group.name, range(group.width)))] = False
        for member in group.members:
            if member.kind not in ("parameter", "") and gone.any():
                positions = member.index[gone[member.channel]].tolist()
                gone_by_axis.setdefault((member.path, member.axis), set()).update(positions)
    sizes: dict[nn.Module, dict[str, object]] = {}
    for (path, axis), gone_positions in gone_by_axis.items():
        layer = model.get_submodule(path)
        sizes.setdefault(layer, {}).update(shrink_sizes(layer, axis, len(gone_positions)))
    for group in groups:
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[list(kept.get(group.name, range(group.width)))] = False
        for size in group.sizes:
            less = int(gone[size.channel].sum())
            if less:
                module = model.get_submodule(size.path)
                values = sizes.setdefault(module, {})
                values[size.name] = _lowered(values.get(size.name, getattr(module, size.name)), size.item, less)
    return sizes


def _lowered(value: Any, item: int | None, less: int) -> object:
    """Return a number, or a tuple or list with one of its numbers, lowered."""
    if item is None:
        return value - less
    parts = list(value)
    parts[item] -= less
    return type(value)(parts) if type(value) in (tuple, list) else tuple(parts)


def _commit(
    model: nn.Module,
    new: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    sizes: Mapping[nn.Module, dict[str, object]],
) -> Any:
    """Put the sliced tensors and sizes in place; return what undoes it."""
    old = {name: (tensor_of(model, name).data, tensor_of(model, name).grad) for name in new}
    old_sizes = {layer: {key: getattr(layer, key) for key in values} for layer, values in sizes.items()}
    for name, data in new.items():
        tensor = tensor_of(model, name)
        gradient = tensor.grad
        _set_data(tensor, data)
        if gradient is not None:
            tensor.grad = sliced(gradient, cuts[name].keep)
        if isinstance(tensor, nn.Parameter):
            CUTS.setdefault(tensor, []).append(cuts[name])
    for layer, values in sizes.items():
        for key, value in values.items():
            setattr(layer, key, value)
    forget_caches(model)

    def undo() -> None:
        for name, (data, gradient) in old.items():
            tensor = tensor_of(model, name)
            _set_data(tensor, data)
            tensor.grad = gradient
            if isinstance(tensor, nn.Parameter):
                CUTS[tensor].pop()
        for layer, values in old_sizes.items():
            for key, value in values.items():
                setattr(layer, key, value)
        forget_caches(model)

    return undo


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """Swap a tensor's data for one of another shape.

    A loss still held from before keeps the old gradient accumulator alive, which remembers the old shape;
    autograd drops it only when dtype or device change, so the data passes through another dtype.
    """
    tensor.grad = None
    other = torch.float32 if data.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
