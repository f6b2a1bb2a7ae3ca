"""The one counter of MACs and parameters, used by budgets, plans, reports and benchmarks.

MACs are multiply-accumulates of ONE sample, counted on the operators that really run (convolutions,
matrix products, attention, LSTMs) by torch's own flop counter, two flops to a MAC. Normalisation, activation,
pooling and additions count as nothing. Parameters are counted once each, however often they are shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from nni_plugin.errors import ModelError


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _lstm_flops(inputs: Any, to_gates: Any, hidden_to_gates: Any, *_: Any, **__: Any) -> int:
    steps = math.prod(inputs[:-1])  # of all samples
    flops: int = 2 * steps * (math.prod(to_gates) + math.prod(hidden_to_gates))
    return flops


_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,
}
"""torch counts fused operators of GPUs but not those of CPUs; a budget must not depend on the device."""


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from the one operator that it has for inference, which nothing looks into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Args:
        macs: Multiply-accumulates of one sample.
        params: Number of parameters.
    """

    macs: int
    params: int

    def __post_init__(self) -> None:
        """Refuse what is no count."""
        for name, value in (("macs", self.macs), ("params", self.params)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")

    def __str__(self) -> str:
        """Return e.g. `40.6 M MACs, 0.27 M parameters`."""
        return f"{self.macs / 1e6:.4g} M MACs, {self.params / 1e6:.4g} M parameters"


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run a model on one tensor, a tuple or list of inputs, or a dict of keyword inputs."""
    args, kwargs = arguments_of(example_inputs)
    return model(*args, **kwargs)


def arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is called with, by place and by name, as :func:`call` does."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def batch_size_of(example_inputs: Any) -> int:
    """Return the length of the first dimension of the first input tensor.

    Raises:
        ModelError: There is no input tensor, or it has no batch dimension.
    """
    found = tensors_in(example_inputs)
    if not found or found[0].dim() == 0 or found[0].shape[0] == 0:
        raise ModelError("example_inputs must hold at least one tensor with a batch dimension, e.g. [1, 3, 32, 32].")
    return found[0].shape[0]


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, each shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs_by_module(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Count the MACs of one sample, in total and spent directly inside each leaf module.

    Args:
        model: Left as it was: mode, statistics and gradients do not change.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        Qualified name of each module without children -> MACs, and the whole network's under `""`.

    Raises:
        ModelError: The forward pass fails on the example inputs.
    """
    batch = batch_size_of(example_inputs)
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    spent: dict[str, int] = {}
    begun: dict[str, int] = {}
    hooks = []

    def before(name: str) -> Any:
        return lambda *_: begun.__setitem__(name, counter.get_total_flops())

    def after(name: str) -> Any:
        return lambda *_: spent.__setitem__(name, spent.get(name, 0) + counter.get_total_flops() - begun[name])

    for name, module in model.named_modules():
        if name and next(module.children(), None) is None:
            hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    modes = {module: module.training for module in model.modules()}
    # The counter hooks onto inputs of modules that require gradients, also where none are recorded; it then fails.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.no_grad(), _attention_in_parts(), counter:
            call(model, example_inputs)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"The model does not run on the example inputs: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
    macs = {name: flops // (2 * batch) for name, flops in spent.items() if flops}
    macs[""] = counter.get_total_flops() // (2 * batch)
    return macs


def count(model: nn.Module, example_inputs: Any) -> Cost:
    """Count the MACs of one sample and the parameters of a network.

    Args:
        model: Left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        The cost, independent of `N`.

    Raises:
        ModelError: The forward pass fails on the example inputs.

    Example:
        >>> count(nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(2, 3, 4, 4))
        Cost(macs=3456, params=216)
    """
    return Cost(count_macs_by_module(model, example_inputs)[""], count_params(model))


def on_device_of(model: nn.Module, inputs: Any) -> Any:
    """Return nested inputs on the device of a model that may have moved since they were made."""
    device = next((parameter.device for parameter in model.parameters()), None)
    if isinstance(inputs, Tensor):
        return inputs if device is None else inputs.to(device)
    if isinstance(inputs, dict):
        return {key: on_device_of(model, value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(on_device_of(model, value) for value in inputs)
    return inputs
