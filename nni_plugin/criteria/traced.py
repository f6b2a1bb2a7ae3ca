"""A network as a graph of layers whose values can be kept: traced, without in-place writes, norms folded in eval mode.

The network is traced once by torch.fx, with its layers kept whole. Operators that write into their arguments become
those that do not. In eval mode a batch normalisation is affine, and is folded into the convolution or linear layer
before it.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from nni_plugin.tensors import NORMS

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
TRACING_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError)
"""What a network may raise when proxies go through it instead of tensors (`TraceError` is a ValueError)."""


class CannotReplayError(Exception):
    """The network cannot be run in parts; the text says why."""


class _Tracer(fx.Tracer):
    """Keeps layers, normalisations and readers whole, and opens whatever else holds a reader."""

    def __init__(self, readers: Iterable[nn.Module], root: nn.Module) -> None:
        super().__init__()
        self.readers = set(readers)
        self.opened = {m for m in root.modules() if any(child in self.readers for child in m.modules())} - self.readers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.readers or isinstance(m, NORMS):
            return True
        return m not in self.opened and super().is_leaf_module(m, module_qualified_name)


class TracedNetwork:
    """The graph of a network.

    Args:
        network: The network; it is not changed.
        readers: Layers that must be nodes of the graph.
        inputs: Values of the parameters of `forward`, in order; non-tensors are fixed to these values.
        fold: Whether batch normalisations are folded in eval mode.

    Attributes:
        nodes: In the order in which they run; the last is `output`.
        layers: What each `call_module` node calls.
        nodes_of: The nodes that call each layer of the network.

    Raises:
        CannotReplayError: The network cannot be traced, or writes into parts of tensors.
    """

    def __init__(
        self, network: nn.Module, readers: Sequence[nn.Module], inputs: Mapping[str, Any], *, fold: bool = True
    ) -> None:
        fixed = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
        tracer = _Tracer(readers, network)
        try:
            graph = tracer.trace(network, concrete_args=fixed or None)
            self.module = fx.GraphModule(network, graph)
        except TRACING_ERRORS as error:
            raise CannotReplayError(f"{type(error).__name__}: {error}") from error
        self.nodes = list(self.module.graph.nodes)
        self.output = self.nodes[-1]
        self.layers = {n: self.module.get_submodule(n.target) for n in self.nodes if n.op == "call_module"}
        self.nodes_of: dict[nn.Module, list[fx.Node]] = {}
        for node, layer in self.layers.items():
            self.nodes_of.setdefault(layer, []).append(node)
        self.in_eval_mode = not any(module.training for module in network.modules())
        self._make_pure()
        if fold and self.in_eval_mode:
            self._fold()
        self._drop_identities()

    def call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """Compute one node, not a placeholder, from the values of others."""
        try:
            return self._call(node, map_arg(node.args, value), map_arg(node.kwargs, value))
        except torch.OutOfMemoryError:
            raise
        except TRACING_ERRORS as error:  # the network itself has run on this minibatch before
            raise CannotReplayError(f"at {node.name}: {error}") from error

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self.layers[node](*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.module)  # type: ignore[arg-type]
        return args[0]  # of the output

    def _make_pure(self) -> None:
        """Let no node overwrite another's value, so that values can be kept."""
        for node, layer in self.layers.items():
            if any(getattr(module, "inplace", False) is True for module in layer.modules()):
                self.layers[node] = copy.deepcopy(layer)  # the network itself goes on as it is written
                for module in self.layers[node].modules():
                    if hasattr(module, "inplace"):
                        setattr(module, "inplace", False)  # noqa: B010
        for node in self.nodes:
            if node.op == "call_function" and node.target in _IN_PLACE:
                node.target = _IN_PLACE[node.target]
            elif node.op == "call_function" and node.target is operator.setitem:
                raise CannotReplayError("the network assigns to parts of a tensor")
            elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
                node.target = node.target[:-1]
                if not hasattr(Tensor, node.target):
                    raise CannotReplayError(f"the network calls {node.target}_() on a tensor")
            elif node.op == "call_function" and getattr(node.target, "__name__", "_").endswith("_"):
                raise CannotReplayError(f"the network calls {node.target}")
            if node.op == "call_method" and node.target == "view" and not _has_dtype(node):
                node.target = "reshape"  # the same values, also of a tensor in channels-last form
            if "out" in node.kwargs:
                raise CannotReplayError("the network writes into given tensors")
            _forbid_inplace(node)

    def _fold(self) -> None:
        """Fold batch normalisations into the layer before each, where that layer feeds nothing else."""
        calls = {node: len(nodes) for nodes in self.nodes_of.values() for node in nodes}
        for node in self.nodes:
            norm, before = self.layers.get(node), node.args[0] if node.args else None
            layer = self.layers.get(before) if isinstance(before, fx.Node) else None
            if not isinstance(norm, _BatchNorm) or layer is None or before is None or len(before.users) > 1:
                continue
            after = _after_norm(norm)
            if after is None or norm.running_mean is None or is_marked(norm) or is_marked(layer):
                continue
            if calls[node] > 1 or calls[before] > 1:
                continue
            if type(layer) in CONVOLUTIONS:
                self.layers[before] = fuse_conv_bn_eval(layer, norm)  # type: ignore[type-var]
            elif type(layer) is nn.Linear and isinstance(norm, nn.BatchNorm1d):
                self.layers[before] = fuse_linear_bn_eval(layer, norm)
            else:
                continue
            self.layers[node] = after

    def _drop_identities(self) -> None:
        """Take out layers that do nothing, so that what they pass on has one holder."""
        for node in self.nodes:
            if type(self.layers.get(node)) is nn.Identity and not is_marked(self.layers[node]):
                node.replace_all_uses_with(node.args[0] if node.args else next(iter(node.kwargs.values())))
                self.module.graph.erase_node(node)
                del self.layers[node]
        self.nodes = list(self.module.graph.nodes)


def _forbid_inplace(node: fx.Node) -> None:
    """Set an argument `inplace`, by name or by position, to False."""
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.op == "call_function" and getattr(node.target, "__module__", "") == "torch.nn.functional":
        try:
            names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        except ValueError:  # a builtin, which has no such argument
            return
        if "inplace" in names[: len(node.args)]:
            at = names.index("inplace")
            node.args = (*node.args[:at], False, *node.args[at + 1 :])


def _has_dtype(node: fx.Node) -> bool:
    return any(isinstance(argument, torch.dtype) for argument in (*node.args, *node.kwargs.values()))


def _after_norm(norm: _BatchNorm) -> nn.Module | None:
    """Return what a batch normalisation does after its affine step; None when that is not known."""
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.Identity()
    children = dict(norm.named_children())  # timm's normalisations with an activation inside
    if set(children) == {"drop", "act"}:
        return nn.Sequential(children["drop"], children["act"])
    return None


def bound_inputs(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the parameters of `forward` for these arguments, in order.

    Raises:
        CannotReplayError: It takes any number of arguments.
    """
    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    kinds = {parameter.kind for parameter in bound.signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        raise CannotReplayError("forward() takes any number of arguments")
    return dict(bound.arguments)


def last_uses(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return for each node which others are read there for the last time, when only these nodes are run."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for before in node.all_input_nodes:
            last[before] = node
    frees: dict[fx.Node, list[fx.Node]] = {}
    for before, node in last.items():
        frees.setdefault(node, []).append(before)
    return frees


def is_marked(layer: nn.Module) -> bool:
    """Tell whether a layer has hooks or computed parameters, so that it is more than its class."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    return any(hooks) or hasattr(layer, "parametrizations")
