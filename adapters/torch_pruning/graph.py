"""Find the coupled channel groups of a network, and Torch-Pruning's form of them for its own importances.

The network is run once, on the network as it is: mode, `requires_grad`, gradients, statistics and random
state are put back. Groups are returned in the order of the network's modules. Those that must stay whole
carry the reason: the network's output or input has that width, a layer is to be ignored, or a layer cannot
be cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nni_plugin.cost import call, tensors_in
from nni_plugin.errors import GraphError
from nni_plugin.groups import ChannelGroup
from nni_plugin.parts import DEFAULT_PARTS, checked_parts
from nni_plugin.tracing import coupled_groups, unreached
from nni_plugin.wrappers import checked_network

_HOST_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Torch-Pruning raises on networks it cannot follow."""


def find_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignore: Iterable[str | nn.Module] = (),
    keep_host: bool = False,
    parts: Collection[str] = DEFAULT_PARTS,
) -> list[ChannelGroup]:
    """Find every coupled channel group of a network.

    Args:
        model: Any network; left as it was. Wrappers (DDP, `torch.compile`) are looked through.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        ignore: Layers to leave whole, as modules or qualified names; a name also covers what is below it.
            The group of the network's output (the classifier) is always left whole.
        keep_host: Add Torch-Pruning's own group to each (`.host`), for its importances, which read that form
            (DepGraph, CVPR 2023). It holds the traced forward pass in memory.
        parts: Which parts of a transformer may shrink, of `nni_plugin.parts.PARTS`.

    Returns:
        All groups in the order of the network's modules, the ones to be left whole with `.fixed` set.

    Raises:
        GraphError: The network cannot be traced, or a layer to ignore does not exist.
        ModelError: It is no network.
    """
    model = checked_network(model)
    ignored = _ignored_paths(model, ignore)
    if not any(parameter.numel() for parameter in model.parameters()):
        raise GraphError(f"{type(model).__name__} has no parameters; there is nothing to prune.")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_in(example_inputs) if tensor.is_floating_point()):
        raise GraphError("example_inputs hold values that are not finite (NaN or inf); give an image, or torch.randn.")
    with _traceable(model, example_inputs) as inputs:
        with _refused(model):
            groups = coupled_groups(model, inputs, parts=checked_parts(parts))
        if keep_host:
            groups = _with_hosts(model, inputs, groups)
    reasons = [group.fixed or _reason_to_keep(group, ignored) for group in groups]
    return [group if reason is None else group.freeze(reason) for group, reason in zip(groups, reasons, strict=True)]


def warn_of_unreached(model: nn.Module, example_inputs: Any) -> None:
    """Warn of layers that do not run on the example inputs: how they hang together with the others is not known.

    Args:
        model: The network; left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
    """
    with _traceable(model, example_inputs) as inputs:
        reached: set[nn.Module] = set()
        hooks = [
            layer.register_forward_pre_hook(lambda layer, _: reached.add(layer))
            for layer in model.modules()
            if not isinstance(layer, torch.jit.ScriptModule)
        ]
        try:
            call(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        # A layer that is not called may be used all the same: that takes a trace to tell.
        held = [layer for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None]
        names = [] if reached.issuperset(held) else unreached(model, inputs)
    if names:
        named = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(
            f"{len(names)} layer{'s do' if len(names) > 1 else ' does'} not run on the example inputs: {named}. What "
            "does not run stays as it is and may not fit the pruned network: give example inputs on which it runs, or "
            "name what it reads and writes in `ignore`.",
            stacklevel=3,
        )


@contextmanager
def _refused(model: nn.Module) -> Iterator[None]:
    """Say what a network raises when it does not run."""
    try:
        yield
    except _HOST_ERRORS as error:
        raise GraphError(
            f"{type(model).__name__} could not be traced on the example inputs ({type(error).__name__}: {error}). "
            "Check that it runs on them and returns tensors."
        ) from error


def _ignored_paths(model: nn.Module, ignore: Iterable[str | nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    paths = []
    for item in [ignore] if isinstance(ignore, (str, nn.Module)) else ignore:
        path = names.get(item) if isinstance(item, nn.Module) else item
        if path is None or path not in names.values():
            raise GraphError(f"Layer to ignore {item!r} is not in the model; see model.named_modules() for its names.")
        paths.append(path)
    return paths


@contextmanager
def _traceable(model: nn.Module, example_inputs: Any) -> Iterator[Any]:
    """Let every parameter and input require gradients, in eval mode; put everything back at the end."""
    modes = {module: module.training for module in model.modules()}
    hooks = {module: list(module._forward_hooks) for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    state = torch.random.get_rng_state()
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield _requiring_grad(example_inputs)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        forget_caches(model)
        for module, training in modes.items():
            module.training = training
        for module, known in hooks.items():  # those that a trace leaves behind when it fails
            for key in [key for key in module._forward_hooks if key not in known]:
                del module._forward_hooks[key]
        torch.random.set_rng_state(state)


def forget_caches(model: nn.Module) -> None:
    """Let modules drop what they keep between passes in eval mode, as they do when they are put into train mode."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, training in modes.items():
        module.training = training


def _requiring_grad(value: Any) -> Any:
    """Copy nested inputs so that gradients show where they enter the network."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    if isinstance(value, dict):
        return {key: _requiring_grad(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_requiring_grad(item) for item in value)
    return value


def _with_hosts(model: nn.Module, inputs: Any, groups: Iterable[ChannelGroup]) -> list[ChannelGroup]:
    """Return each group in the form that Torch-Pruning gives it, with its own group beside it.

    Where it has none, or couples other layers or channels, its importances would read what is not there: such a group
    stays whole.
    """
    graph = tp.DependencyGraph()
    with _refused(model):
        graph.build_dependency(model, inputs, forward_fn=call, output_transform=_reaching, verbose=False)
    result = []
    for group in groups:
        theirs, reason = _in_their_form(graph, model, group)
        result.append(group.freeze(group.fixed or reason) if theirs is None else theirs)
    return result


def _reaching(out: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(out) if tensor.grad_fn is not None]


def _in_their_form(graph: Any, model: nn.Module, group: ChannelGroup) -> tuple[ChannelGroup | None, str]:
    """Return a group as Torch-Pruning builds it from the same channels of the same layer, or why it does not."""
    root, module = group.members[0], model.get_submodule(group.name)
    order = root.index[torch.argsort(root.channel, stable=True)].tolist()
    if module not in graph.module2node or len(order) != group.width:
        return None, f"Torch-Pruning has no group of the channels of {group.name!r} and what goes with them"
    try:
        host = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, order)
        theirs = ChannelGroup.from_host(host)
    except _HOST_ERRORS as error:
        return None, f"Torch-Pruning cannot follow the channels of {group.name!r} ({type(error).__name__}: {error})"
    if group.fixed is None and _positions(theirs) != _positions(group):
        return None, f"Torch-Pruning couples other channels with those of {group.name!r}"
    differs = theirs.width == group.width and not torch.equal(theirs.unit, group.unit)
    tied = group.unit if differs else None
    return replace(theirs, fixed=group.fixed, tied=tied, sizes=group.sizes, passages=group.passages), ""


def _positions(group: ChannelGroup) -> dict[tuple[str, str], set[tuple[int, int]]]:
    """Return which channel lies where on which axis of which layer."""
    positions: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for member in group.members:
        pairs = zip(member.index.tolist(), member.channel.tolist(), strict=True)
        positions.setdefault((member.path, member.axis), set()).update(pairs)
    return positions


def _reason_to_keep(group: ChannelGroup, ignored: list[str]) -> str | None:
    for member in group.members:
        if member.kind == "":
            return f"layer {member.path!r} is of a kind that cannot be cut"
        for path in ignored:
            if member.axis == "out" and (member.path == path or member.path.startswith(path + ".") or path == ""):
                return f"layer {member.path!r} is to be ignored"
    if group.units == 1:
        return f"all its {group.width} channels must go together"
    return None
