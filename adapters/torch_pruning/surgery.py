"""Cut channels out of a network by a plan: checked first, then every tensor is sliced, or all are put back.

Parameters stay the same objects (only their data shrinks), so optimizers, hooks and tied weights keep their
references, and `requires_grad`, dtype, device, memory format and module classes stay as they were. Each cut is
noted per parameter, for :func:`nni_plugin.adapters.torch_pruning.carry_optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from nni_plugin.adapters.torch_pruning.graph import forget_caches
from nni_plugin.adapters.torch_pruning.slicing import sliced, way_back
from nni_plugin.errors import PlanError
from nni_plugin.groups import ChannelGroup
from nni_plugin.narrowing import Place, gone_positions, staying
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


def check_fit(plan: PruningPlan, groups: Iterable[ChannelGroup]) -> dict[str, NDArray[np.bool_]]:
    """Check that a plan is for the network that these groups were found on.

    Returns:
        Which channels stay, bool, shape `[width]`, by the name of each group that loses some.

    Raises:
        PlanError: It names a group that is not there, or of another width, or one that must stay whole, parts
            channels that go together, or removes blocks, without which the groups are others.
    """
    found, stays = {group.name: group for group in groups}, {}
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
        stay = staying([group], {entry.name: entry.kept}).get(entry.name)
        if stay is None:
            continue
        if group.fixed:
            raise PlanError(f"Group {entry.name!r} must stay whole: {group.fixed}. The model is unchanged.")
        unit = group.unit.numpy()
        kept_units = np.zeros(group.width, dtype=bool)
        kept_units[unit[stay]] = True
        if kept_units[unit[~stay]].any():
            raise PlanError(f"Group {entry.name!r}: the plan parts channels that go together. The model is unchanged.")
        stays[entry.name] = stay
    return stays


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
    stays = check_fit(plan, groups)
    tensors = _Tensors(model)
    gone = gone_positions(groups, stays)
    keep = _positions_to_keep(tensors, gone)
    factors = _factors(tensors, plan, groups)
    sizes = _sizes(model, groups, stays, gone)
    shared = tensors.sharing_memory()
    with ExitStack() as stack:  # what has been done is undone when the rest fails, or by the caller
        stack.callback(forget_caches, model)
        for name in {**keep, **factors}:
            tensor = tensors[name]
            cut = Cut(digest, tuple(tensor.shape), keep.get(name, {}))
            stack.callback(_cut_tensor(tensor, cut, factors.get(name, {}), id(tensor) in shared))
        for layer, values in sizes.items():
            stack.callback(_set_sizes(layer, values))
        forget_caches(model)
        return stack.pop_all().close


def kept_outputs(dense: nn.Module, plan: PruningPlan, groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """Return the output channels that each narrower layer keeps of the dense network, by its name, ascending."""
    groups = list(groups)
    keep = _positions_to_keep(_Tensors(dense), gone_positions(groups, staying(groups, plan.kept())))
    layers = {name.removesuffix(".weight"): dims for name, dims in keep.items() if name.endswith(".weight")}
    return {
        path: dims[0]
        for path, dims in layers.items()
        if 0 in dims and isinstance(dense.get_submodule(path), (nn.Linear, nn.Conv2d))
    }


class _Tensors(dict[str, Tensor]):
    """Every parameter and buffer of a network by each of its names, walked through once; other tensors when asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.named_parameters(remove_duplicate=False))
        self.update(model.named_buffers(remove_duplicate=False))
        self._model = model
        self._first: dict[int, str] = {}
        for name, tensor in self.items():
            self._first.setdefault(id(tensor), name)

    def __missing__(self, name: str) -> Tensor:
        return tensor_of(self._model, name)

    def first(self, name: str) -> str:
        """Return the first name of the same tensor: tied weights are cut once."""
        return self._first.get(id(self[name]), name)

    def sharing_memory(self) -> set[int]:
        """Return the tensors (by `id`) that lie in memory with others, or in a part of it."""
        holders: dict[int, list[int]] = {}
        shared = set()
        for tensor in {id(tensor): tensor for tensor in self.values()}.values():
            if type(tensor.data) is not Tensor:  # of a subclass, which may keep its data elsewhere
                shared.add(id(tensor))
                continue
            memory = tensor.untyped_storage()
            holders.setdefault(memory.data_ptr(), []).append(id(tensor))
            if memory.nbytes() != tensor.numel() * tensor.element_size():
                shared.add(id(tensor))
        return shared.union(*(found for found in holders.values() if len(found) > 1))


def _positions_to_keep(tensors: _Tensors, gone: Mapping[Place, NDArray[np.int64]]) -> dict[str, dict[int, Tensor]]:
    """Return, for each tensor that shrinks, the positions kept along each dimension that does."""
    lost: dict[tuple[str, int], NDArray[np.int64]] = {}
    for (name, dim), positions in gone.items():
        if isinstance(dim, int):  # a tensor's
            key = tensors.first(name), dim
            lost[key] = np.union1d(lost[key], positions) if key in lost else positions
    keep: dict[str, dict[int, Tensor]] = {}
    rest: dict[tuple[int, int], Tensor] = {}
    for (name, dim), positions in lost.items():
        size = tensors[name].shape[dim]
        if len(positions) == size:
            raise PlanError(f"{name!r} would lose all its {size} channels along dimension {dim}.")
        same = id(positions), size
        if same not in rest:
            rest[same] = torch.from_numpy(np.delete(np.arange(size), positions))
        keep.setdefault(name, {})[dim] = rest[same]
    return keep


def _factors(tensors: _Tensors, plan: PruningPlan, groups: Iterable[ChannelGroup]) -> dict[str, dict[int, Tensor]]:
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
                    piece.dim, torch.ones(tensors[piece.tensor].shape[piece.dim], dtype=torch.float64)
                )
                per_position[piece.index] *= channel_factor[piece.channel]
    # Tied weights are written once, whatever layers they are the weights of.
    return {tensors.first(name): dims for name, dims in result.items()}


def _sizes(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    stays: Mapping[str, NDArray[np.bool_]],
    gone: Mapping[Place, NDArray[np.int64]],
) -> dict[nn.Module, dict[str, object]]:
    """Return the size attributes of each layer after the cut."""
    losing = [group for group in groups if group.name in stays]
    members = (m for group in losing for m in group.members if m.kind not in ("parameter", ""))
    sizes: dict[nn.Module, dict[str, object]] = {}
    for path, axis in dict.fromkeys((member.path, member.axis) for member in members):
        if (path, axis) in gone:
            layer = model.get_submodule(path)
            sizes.setdefault(layer, {}).update(shrink_sizes(layer, axis, len(gone[path, axis])))
    for group in losing:
        for size in group.sizes:
            less = int((~stays[group.name])[size.channel.numpy()].sum())
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


def _cut_tensor(tensor: Tensor, cut: Cut, factors: Mapping[int, Tensor], shared: bool) -> Callable[[], None]:
    """Multiply and slice one tensor and its gradient in place; return what undoes it."""
    data, gradient = tensor.data, tensor.grad
    small = data
    for dim, factor in factors.items():
        small = small * factor.to(data).reshape([-1 if d == dim else 1 for d in range(data.dim())])
    small = sliced(small, cut.keep) if cut.keep else small
    small_gradient = None if gradient is None else sliced(gradient, cut.keep)
    # Nothing gives back what a factor of zero took, nor the memory that tensors share.
    whole = (lambda _: data) if shared or factors else way_back(data, cut.keep)
    _set_data(tensor, small)
    tensor.grad = small_gradient
    if isinstance(tensor, nn.Parameter):
        CUTS.setdefault(tensor, []).append(cut)

    def undo() -> None:
        _set_data(tensor, whole(tensor.data))
        tensor.grad = gradient
        if isinstance(tensor, nn.Parameter):
            CUTS[tensor].pop()

    return undo


def _set_sizes(layer: nn.Module, values: Mapping[str, object]) -> Callable[[], None]:
    """Set the size attributes of a layer; return what undoes it."""
    old = {key: getattr(layer, key) for key in values}
    for key, value in values.items():
        setattr(layer, key, value)

    def undo() -> None:
        for key, value in old.items():
            setattr(layer, key, value)

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
