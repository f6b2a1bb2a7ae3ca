"""NNI's wrappers, seen from both sides: a wrapped network as if it were plain, and wrappers for coupled layers.

A wrapped layer holds its weight in `<layer>._nni_wrapper.weight`, what `<layer>.weight` shows is the masked product,
and the layer's `forward` is the wrapper's. Criteria, hooks and the trace of groups want the plain network. For the
moments in which they look at it, :func:`unwrapped` takes the wrappers off without copying or replacing a parameter, so
gradients, optimizers and the graph of a loss stay what they are (NNI's own `unwrap_model` makes new parameters).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nni_plugin.cost import call
from nni_plugin.criteria.masked_loop import channel_dim
from nni_plugin.groups import ChannelGroup, Member, Slice
from nni_plugin.masks import removed_positions
from nni_plugin.tensors import tensor_of

_WRAPPER = "_nni_wrapper"
MASKED = ("dense", "depthwise", "norm", "embedding")
"""Kinds of layers that write or carry a channel and are masked; others give zero for zero."""

Masks = dict[str, dict[str, Tensor]]
"""Masks by module and target, as NNI has them."""


def is_wrapped(model: nn.Module) -> bool:
    """Tell whether wrappers are on a network."""
    return any(_WRAPPER in module._modules for module in model.modules())


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


def masked_members(groups: Iterable[ChannelGroup], readers: Collection[str] = ()) -> list[tuple[ChannelGroup, Member]]:
    """Return the members of groups that are masked with them: all that write or carry a channel, and given readers."""
    return [
        (group, member)
        for group in groups
        for member in group.members
        if (member.kind in MASKED if member.axis == "out" else member.path in readers)
    ]


def wrap_followers(
    model: nn.Module,
    wrappers: dict[str, ModuleWrapper],
    members: Iterable[tuple[ChannelGroup, Member]],
    chosen: Collection[str],
) -> None:
    """Give every layer that is masked with a group a wrapper.

    Args:
        model: The network, unwrapped.
        wrappers: By module; those missing are added, not yet wrapped.
        members: What is masked, with its group.
        chosen: Modules whose targets the config_list chose; these are left as they are.
    """
    for _, member in members:
        if member.path in chosen:
            continue
        if member.path not in wrappers:
            wrappers[member.path] = ModuleWrapper(model.get_submodule(member.path), member.path, None, [])
        wrapper = wrappers[member.path]
        for target in (piece.tensor.rpartition(".")[2] for piece in _targets(member)):
            if target not in wrapper.pruning_target_spaces:
                space = PruningTargetSpace(wrapper, target, TargetType.PARAMETER, {"apply_method": "mul"})
                wrapper.pruning_target_spaces[target] = space


def group_masks(
    wrappers: Mapping[str, ModuleWrapper],
    members: Sequence[tuple[ChannelGroup, Member]],
    removed: Mapping[str, Tensor],
) -> Masks:
    """Return the masks under which removed channels give zero, biases and normalisations included.

    Args:
        wrappers: By module.
        members: What is masked, with its group.
        removed: By group name, bool, shape `[width]`.
    """
    masks: Masks = {}
    for group, member in members:
        for piece in _targets(member):
            target = piece.tensor.rpartition(".")[2]
            space = wrappers[member.path].pruning_target_spaces.get(target)
            if space is None or space.target is None:
                continue
            whole = torch.ones_like(space.target).detach()
            mask = masks.setdefault(member.path, {}).setdefault(target, whole)
            mask.index_fill_(piece.dim, removed_positions(piece, removed[group.name]).to(mask.device), 0)
    return masks


@torch.no_grad()
def readers_that_see(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> set[str]:
    """Return the layers that still read something where all channels are masked.

    That is so behind a sigmoid, or where a position embedding is added. Their inputs have to be masked as well.

    Args:
        model: The network, unwrapped; left as it was.
        groups: The groups that are masked.
        example_inputs: As for `find_groups`.
    """
    seeing: set[str] = set()
    tensors = {
        piece.tensor: tensor_of(model, piece.tensor)
        for _, member in masked_members(groups)
        for piece in _targets(member)
    }
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    modes = {module: module.training for module in model.modules()}

    def watch(member: Member) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if bool(x.index_select(channel_dim(layer, x), member.index.to(x.device)).any()):
                seeing.add(member.path)

        return model.get_submodule(member.path).register_forward_pre_hook(hook)

    with ExitStack() as stack:
        for reader in (member for group in groups for member in group.readers):
            stack.callback(watch(reader).remove)
        try:
            model.eval()
            for tensor in tensors.values():
                tensor.zero_()
            call(model, example_inputs)
        finally:
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
            for module, training in modes.items():
                module.training = training
    return seeing


def followers(group: ChannelGroup) -> Iterator[Member]:
    """Yield the members of a group whose output holds its channels and is masked."""
    return (member for _, member in masked_members([group]))


def _targets(member: Member) -> list[Slice]:
    return [piece for piece in member.slices if not piece.tensor.rpartition(".")[2].startswith("running_")]
