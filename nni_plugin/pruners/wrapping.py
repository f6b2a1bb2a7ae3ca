"""NNI's wrappers, seen from both sides: a wrapped network as if it were plain, and wrappers for coupled layers.

A wrapped layer holds its weight in `<layer>._nni_wrapper.weight`, what `<layer>.weight` shows is the masked product,
and the layer's `forward` is the wrapper's. Criteria, hooks and the dependency graph want the plain network. For the
moments in which they look at it, :func:`unwrapped` takes the wrappers off without copying or replacing a parameter, so
gradients, optimizers and the graph of a loss stay what they are (NNI's own `unwrap_model` makes new parameters).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nni_plugin.groups import ChannelGroup, Member, Slice
from nni_plugin.masks import removed_positions

_WRAPPER = "_nni_wrapper"
_MASKED = ("dense", "depthwise", "norm", "embedding")
"""Kinds of layers that write or carry a channel and are masked; others give zero for zero."""

Masks = dict[str, dict[str, Tensor]]
"""Masks by module and target, as NNI has them."""


@contextmanager
def unwrapped(model: nn.Module, *, masked: bool = False) -> Iterator[None]:
    """Take all wrappers off for a moment; parameters are the ones that an optimizer trains.

    Args:
        model: The network, wrapped or not.
        masked: Show weights with their masks applied instead, as copies to run the network on.
    """
    taken: list[tuple[nn.Module, Any, Any, dict[str, Any]]] = []
    try:
        for layer in [module for module in model.modules() if _WRAPPER in module._modules]:
            wrapper, shown = layer._modules.pop(_WRAPPER), layer._buffers.copy()
            taken.append((layer, wrapper, layer.__dict__.pop("forward"), shown))
            for name, space in _parameter_spaces(wrapper):
                layer._buffers.pop(name, None)
                mask = getattr(space, "mask", None) if masked else None
                layer._parameters[name] = space.target if mask is None else nn.Parameter(space.target.detach() * mask)
        yield
    finally:
        for layer, wrapper, forward, shown in reversed(taken):
            for name, _ in _parameter_spaces(wrapper):
                layer._parameters.pop(name, None)
            layer._buffers.clear()
            layer._buffers.update(shown)
            layer._modules[_WRAPPER] = wrapper
            layer.__dict__["forward"] = forward


def _parameter_spaces(wrapper: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters that a wrapper has taken over; a pruning target before others on the same parameter."""
    spaces = {**wrapper.quantization_target_spaces, **wrapper.pruning_target_spaces}
    for name, space in spaces.items():
        if space.type is TargetType.PARAMETER and isinstance(space.target, nn.Parameter):
            yield name, space


def wrap_followers(
    model: nn.Module, wrappers: dict[str, ModuleWrapper], groups: Iterable[ChannelGroup], chosen: Mapping[str, Any]
) -> None:
    """Give every layer that writes or carries channels of some groups a wrapper, so that it can be masked with them.

    Args:
        model: The network, unwrapped.
        wrappers: By module; those missing are added, not yet wrapped.
        groups: The groups.
        chosen: Modules whose targets the config_list chose; these are left as they are.
    """
    for path, target, _ in (found for group in groups for found in _masked_slices(group)):
        if path in chosen:
            continue
        if path not in wrappers:
            wrappers[path] = ModuleWrapper(model.get_submodule(path), path, None, [])
        wrapper = wrappers[path]
        if target not in wrapper.pruning_target_spaces:
            setting = {"apply_method": "mul"}
            space = PruningTargetSpace(wrapper, target, TargetType.PARAMETER, setting)
            wrapper.pruning_target_spaces[target] = space


def group_masks(
    wrappers: Mapping[str, ModuleWrapper], groups: Iterable[ChannelGroup], removed: Mapping[str, Tensor]
) -> Masks:
    """Return the masks under which removed channels give zero, biases and normalisations included.

    Args:
        wrappers: By module.
        groups: All groups to mask.
        removed: By group name, bool, shape `[width]`.
    """
    masks: Masks = {}
    for group in groups:
        for path, target, piece in _masked_slices(group):
            space = wrappers[path].pruning_target_spaces.get(target)
            if space is None or space.target is None:
                continue
            mask = masks.setdefault(path, {}).setdefault(target, torch.ones_like(space.target).detach())
            mask.index_fill_(piece.dim, removed_positions(piece, removed[group.name]).to(mask.device), 0)
    return masks


def followers(group: ChannelGroup) -> Iterator[Member]:
    """Yield the members of a group whose output holds its channels and is masked."""
    return (member for member in group.members if member.axis == "out" and member.kind in _MASKED)


def _masked_slices(group: ChannelGroup) -> Iterator[tuple[str, str, Slice]]:
    for member in followers(group):
        for piece in member.slices:
            target = piece.tensor.rpartition(".")[2]
            if not target.startswith("running_"):
                yield member.path, target, piece
