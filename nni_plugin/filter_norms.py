"""The lengths of filters, which set the pace of training where a batch normalisation follows, given back after pruning.

Behind a filter `w` a batch normalisation makes the network's output independent of the length of `w`: gradients go as
`1 / |w|`, so a step of gradient descent turns the filter by an angle that goes as `1 / |w|^2` (van Laarhoven, "L2
Regularization versus Batch and Weight Normalization", 2017; Hoffer et al., "Norm matters", NeurIPS 2018). A filter that
has lost inputs, or was solved anew by least squares, is shorter; at the learning rate that suited the dense network it
may be thrown about until nothing is left of what it knew. With the length of the dense network's filter, undone in the
normalisation, the network computes what it did and trains at the pace it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_plugin.cost import on_device_of
from nni_plugin.errors import PlanError
from nni_plugin.layers.trace import trace
from nni_plugin.reconstruction import what_stays
from nni_plugin.tensors import holders

LONGEST = 100.0
"""Most that a filter is stretched by: of one that is next to nothing there is no direction to keep."""


@torch.no_grad()
def restore_filter_norms(pruned: nn.Module, dense: nn.Module, example_inputs: Any) -> dict[str, float]:
    """Give the filters in front of batch normalisations the lengths they have in the dense network, in place.

    What the network computes stays the same, but for what `eps` does in train mode. Call it last before training on,
    after `nni_plugin.anchor_batchnorm` where weights were solved anew.

    Args:
        pruned: The compact network, as `plan.apply` or a pruner left it. Weights and biases of `nn.Linear` and
            `nn.Conv2d` layers change whose output one batch normalisation reads alone, and its scale and statistics.
        dense: The network it was cut from; unchanged.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        By layer how many times longer its filters are now, on average.

    Raises:
        PlanError: The pruned network has no plan, or it does not fit the dense one.
    """
    plan = getattr(pruned, "pruning_plan", None)
    if plan is None:
        raise PlanError("The pruned network has no pruning_plan: apply one with plan.apply(model, example_inputs).")
    kept, names = what_stays(plan, dense, on_device_of(dense, example_inputs))
    longer: dict[str, float] = {}
    for path, norm in _normalised(pruned, on_device_of(pruned, example_inputs)):
        layer = pruned.get_submodule(path)
        wanted = _lengths(dense.get_submodule(names.before(path)))
        wanted = wanted[kept[path].to(wanted.device)] if path in kept else wanted
        now = _lengths(layer)
        if len(wanted) != len(now):
            raise PlanError(f"Layer {path!r} has {len(now)} filters, the plan keeps {len(wanted)} of the dense one's.")
        factor = torch.where(now > 0, wanted.to(now) / now, 1.0).clamp(1 / LONGEST, LONGEST)
        _stretch(layer, norm, factor)
        longer[path] = float(factor.mean())
    return longer


def _normalised(model: nn.Module, example_inputs: Any) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield the layers whose output one batch normalisation reads and nobody else, with it."""
    records = trace(model, example_inputs)
    readers = {("call", record.order): name for name, record in records.items() if record.count == 1}
    held = holders(model)
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or records[path].count != 1 or len(records[path].readers) != 1:
            continue
        (reader,) = records[path].readers
        norm = model.get_submodule(readers[reader]) if reader in readers else None
        if not isinstance(norm, _BatchNorm) or norm.weight is None or norm.running_var is None:
            continue
        parameters = [*layer.parameters(), *norm.parameters()]
        plain = {"weight", "bias"}.issuperset(name for name, _ in layer.named_parameters())  # not parametrised
        if plain and all(held[id(parameter)] == 1 for parameter in parameters):
            yield path, norm


def _lengths(layer: nn.Module) -> Tensor:
    """Return the length of each output's filter, float64."""
    lengths: Tensor = torch.linalg.vector_norm(layer.get_parameter("weight").double().flatten(1), dim=1)
    return lengths


def _stretch(layer: nn.Module, norm: _BatchNorm, factor: Tensor) -> None:
    """Make filters longer, and undo it in the normalisation behind them."""
    weight = layer.get_parameter("weight")
    weight.mul_(factor.reshape(-1, *[1] * (weight.dim() - 1)).to(weight))
    if isinstance(layer.bias, Tensor):
        layer.bias.mul_(factor.to(layer.bias))
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    before = norm.running_var.double()
    after = before * factor.square()
    ratio = (after + norm.eps).sqrt() / (factor * (before + norm.eps).sqrt())
    norm.weight.copy_(norm.weight.double() * ratio)
    norm.running_mean.mul_(factor.to(norm.running_mean))
    norm.running_var.copy_(after)
