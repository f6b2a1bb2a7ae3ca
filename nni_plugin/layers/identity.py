"""Whether a module can become the identity, tried out: its layers give zero (or pass on), and does the input come out?

A residual block gives its input back when every layer inside gives zero, behind an activation such as ReLU only on the
non-negative values that it really gets. A unit of a plain network (convolution, normalisation, activation) does when
the layers pass on what they get. Tried on a stand-in with drawn weights and inputs, the answer depends on a network's
structure alone: not on its training, and not on an example that happens to be zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.layers.trace import CallRecord, is_layer
from nni_plugin.tensors import kind_of

FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a forward function raises when a part of it was replaced."""


def stand_in(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Any]:
    """Return a copy of a network with drawn weights, and drawn inputs of the same shapes, at least in float32.

    Returns:
        The copy in eval mode, all its floating point parameters requiring gradients, and the inputs; integer inputs
        stay as they are.
    """
    network = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    # A prime number of values, repeated: cheap for the largest layers, and no two rows are equal.
    normal = torch.randn(65537, generator=generator)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            vector = isinstance(tensor, nn.Parameter) or name.rpartition(".")[2].startswith("running_")
            if not tensor.is_floating_point() or not vector or tensor.numel() == 0:
                continue
            if tensor.dim() <= 1:
                # Of either sign what is added: sums of what is positive would pass a ReLU that is not behind one.
                added = name.rpartition(".")[2] in ("bias", "running_mean")
                drawn = torch.rand(tensor.shape, generator=generator) + (-0.5 if added else 0.5)
            else:
                repeats = -(-tensor.numel() // len(normal))
                drawn = normal.repeat(repeats)[: tensor.numel()].view(tensor.shape)
                drawn = drawn / (tensor.numel() / tensor.shape[0]) ** 0.5
            tensor.copy_(drawn)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters()):
        network.float()
    return network, _drawn(example_inputs, generator)


def _drawn(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
        return torch.randn(value.shape, generator=generator).to(value.device, dtype)
    if isinstance(value, Mapping):
        return {key: _drawn(item, generator) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_drawn(item, generator) for item in value)
    return value


@contextmanager
def giving_zero(name: str, module: nn.Module, records: Mapping[str, CallRecord]) -> Iterator[None]:
    """Let every layer inside a module give zero, and hold at zero the parameters that belong to none that is called.

    Args:
        name: The module's qualified name.
        module: The module; put back at the end.
        records: The trace of the network that it is part of.
    """
    with ExitStack() as stack:
        layers = _called_layers(name, module, records)
        for layer in layers:
            stack.enter_context(_hooked(layer, lambda _, __, output: _zeros(output)))
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for parameter in module.parameters():
            if id(parameter) not in inside:
                stack.callback(_put_back, parameter, parameter.detach().clone())
                parameter.data.zero_()
        yield


@contextmanager
def passing_on(
    name: str, module: nn.Module, records: Mapping[str, CallRecord], *, dense_zero: bool = False
) -> Iterator[None]:
    """Let every normalisation inside a module give its input, and so every dense layer, or zero (`dense_zero`).

    A dense layer whose output has another shape than its input gives NaN: it can never be the identity.
    """

    def dense(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if dense_zero or not inputs:
            return _zeros(output)
        return inputs[0].clone() if inputs[0].shape == output.shape else torch.full_like(output, torch.nan)

    with ExitStack() as stack:
        for layer in _called_layers(name, module, records):
            kind = kind_of(layer)
            if kind == "norm":
                stack.enter_context(_hooked(layer, lambda _, inputs, __: inputs[0].clone()))
            elif kind != "prelu":
                stack.enter_context(_hooked(layer, dense))
        yield


@contextmanager
def giving(module: nn.Module, value: Callable[[Any], Any]) -> Iterator[None]:
    """Let a module give `value(its output)`."""
    with _hooked(module, lambda _, __, output: value(output)):
        yield


def replaced(output: Any, tensor: Tensor) -> Any:
    """Return a module's output with another tensor in it, also where it is a tuple."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def is_identity(run: Callable[[Tensor], Any], value: Tensor) -> bool:
    """Tell whether a function gives exactly its input, and that input tells something (finite, not constant)."""
    if not bool(value.isfinite().all()) or bool((value == value.flatten()[0]).all()):
        return False
    try:
        output = run(value.clone())
    except FORWARD_ERRORS:
        return False
    return isinstance(output, Tensor) and output.shape == value.shape and torch.equal(output, value)


def _called_layers(name: str, module: nn.Module, records: Mapping[str, CallRecord]) -> list[nn.Module]:
    prefix = f"{name}." if name else ""
    found: list[nn.Module] = []
    below: set[nn.Module] = set()
    for inner, layer in module.named_modules():
        if inner and layer not in below and is_layer(layer) and records[prefix + inner].count:
            found.append(layer)
            below.update(layer.modules())
    return found


def _zeros(output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    if isinstance(output, (tuple, list)):
        return type(output)(_zeros(item) for item in output)
    return output


def _put_back(parameter: nn.Parameter, data: Tensor) -> None:
    parameter.data.copy_(data)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
