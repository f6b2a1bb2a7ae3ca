"""Find the coupled channel groups of a network with Torch-Pruning's dependency graph (DepGraph, CVPR 2023).

The graph is asked once, on the network as it is: mode, `requires_grad`, gradients, statistics and random
state are put back. Groups are returned in the order of the network's modules. Those that must stay whole
carry the reason: the network's output or input has that width, a layer is to be ignored, or a layer cannot
be cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nni_plugin.cost import call, tensors_in
from nni_plugin.errors import GraphError
from nni_plugin.groups import ChannelGroup
from nni_plugin.tensors import kind_of, tensor_of

_HOST_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Torch-Pruning raises on networks it cannot follow."""


def find_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignore: Iterable[str | nn.Module] = (),
    keep_host: bool = False,
) -> list[ChannelGroup]:
    """Find every coupled channel group of a network.

    Args:
        model: Any network that autograd can trace; left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        ignore: Layers to leave whole, as modules or qualified names; a name also covers what is below it.
            The group of the network's output (the classifier) is always left whole.
        keep_host: Keep the graph's own group on each (`.host`), for criteria that read that form. It holds
            the traced forward pass in memory.

    Returns:
        All groups in the order of the network's modules, the ones to be left whole with `.fixed` set.

    Raises:
        GraphError: The network cannot be traced, or a layer to ignore does not exist.
    """
    ignored = _ignored_paths(model, ignore)
    with _traceable(model, example_inputs) as inputs:
        graph, output_functions = _trace(model, inputs)
        ends = _Ends(graph, output_functions, tensors_in(inputs))
        groups = []
        for host in _host_groups(graph, model):
            group = ChannelGroup.from_host(host)
            reason = ends.reason(host) or _reason_to_keep(group, ignored, model)
            group = group if reason is None else group.freeze(reason)
            if not keep_host:
                object.__setattr__(group, "host", None)
            groups.append(group)
    return groups


def _ignored_paths(model: nn.Module, ignore: Iterable[str | nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    paths = []
    for item in ignore:
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
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield _requiring_grad(example_inputs)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in modes.items():
            module.training = training
        for module, known in hooks.items():  # those that a trace leaves behind when it fails
            for key in [key for key in module._forward_hooks if key not in known]:
                del module._forward_hooks[key]
        torch.random.set_rng_state(state)


def _requiring_grad(value: Any) -> Any:
    """Copy nested inputs so that gradients show where they enter the network."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    if isinstance(value, dict):
        return {key: _requiring_grad(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_requiring_grad(item) for item in value)
    return value


def _trace(model: nn.Module, inputs: Any) -> tuple[Any, set[Any]]:
    outputs: set[Any] = set()

    def note_outputs(out: Any) -> list[Tensor]:
        found = [tensor for tensor in tensors_in(out) if tensor.grad_fn is not None]
        outputs.update(tensor.grad_fn for tensor in found)
        return found

    if not any(parameter.numel() for parameter in model.parameters()):
        raise GraphError(f"{type(model).__name__} has no parameters; there is nothing to prune.")
    graph = tp.DependencyGraph()
    try:
        graph.build_dependency(
            model,
            inputs,
            forward_fn=call,
            output_transform=note_outputs,
            verbose=False,
        )
    except _HOST_ERRORS as error:
        raise GraphError(
            f"{type(model).__name__} could not be traced on the example inputs ({type(error).__name__}: {error}). "
            "Check that it runs on them and returns tensors."
        ) from error
    if not outputs:
        raise GraphError(f"{type(model).__name__} returned no tensor that depends on its parameters.")
    return graph, outputs


def _host_groups(graph: Any, model: nn.Module) -> Iterator[Any]:
    """Yield one full group per coupled set of channels, rooted at its first dense layer in module order."""
    covered: dict[nn.Module, set[int]] = {}
    for module in model.modules():
        if module not in graph.module2node or kind_of(module) not in ("dense", "depthwise"):
            continue
        pruner = graph.get_pruner_of_module(module)
        left = [i for i in range(pruner.get_out_channels(module)) if i not in covered.get(module, ())]
        if not left:
            continue
        try:
            group = graph.get_pruning_group(module, pruner.prune_out_channels, left)
        except _HOST_ERRORS as error:
            name = graph._module2name[module]
            raise GraphError(
                f"The dependency graph cannot follow the channels of layer {name!r} ({type(error).__name__}: {error}); "
                f"{type(model).__name__} cannot be pruned yet."
            ) from error
        for item in group:
            if graph.is_out_channel_pruning_fn(item.dep.handler):
                covered.setdefault(item.dep.layer, set()).update(int(i) for i in item.idxs)
        yield group


class _Ends:
    """Where channels meet the network's inputs or outputs, whose width is not ours to change."""

    def __init__(self, graph: Any, output_functions: set[Any], inputs: list[Tensor]) -> None:
        self.outputs = output_functions
        self.at_input = {node for node in graph.module2node.values() if _reads_input(node, inputs)}

    def reason(self, host: Any) -> str | None:
        for item in host:
            node = item.dep.target
            reads = item.dep.handler.__name__ == "prune_in_channels" and kind_of(node.module) == "dense"
            if reads:
                continue
            if node.grad_fn in self.outputs or not node.outputs:
                return f"its channels are the network's output (at {node.name})"
            if node in self.at_input and kind_of(node.module) != "dense":
                return f"its channels meet the network's input (at {node.name})"
        return None


def _reads_input(node: Any, inputs: list[Tensor]) -> bool:
    leaves = [getattr(function, "variable", None) for function, _ in getattr(node.grad_fn, "next_functions", ())]
    return any(leaf is tensor for leaf in leaves for tensor in inputs)


def _reason_to_keep(group: ChannelGroup, ignored: list[str], model: nn.Module) -> str | None:
    for member in group.members:
        if member.kind == "":
            return f"layer {member.path!r} is of a kind that cannot be cut"
        if any(int(piece.index.max()) >= tensor_of(model, piece.tensor).shape[piece.dim] for piece in member.slices):
            return f"the dependency graph gives layer {member.path!r} more channels than it has"
        for path in ignored:
            if member.axis == "out" and (member.path == path or member.path.startswith(path + ".") or path == ""):
                return f"layer {member.path!r} is to be ignored"
        if member.ties is not None:
            layer = model.get_submodule(member.path)
            counts = torch.bincount(member.ties)
            if bool((counts[counts > 0] != getattr(layer, "groups", getattr(layer, "num_groups", 1))).any()):
                return f"layer {member.path!r} works in channel groups that this group covers only in part"
    if group.units == 1:
        return f"all its {group.width} channels must go together"
    return None
