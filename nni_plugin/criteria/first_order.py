"""First-order terms of removing a channel, as pure functions of parameters and their gradients.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, Sec. 3.1 and 3.3. Put a gate
`z = 1` on a channel; removing the channel is `z -> 0`, and to first order the loss changes by `-dE/dz`. No gate
needs to be built: `dE/dz` is a sum of products of parameters that exist and gradients that backward left.

- after a normalisation `gamma * x + beta`: `gamma dE/dgamma + beta dE/dbeta`, in train and in eval mode;
- after a dense or depthwise layer without one: `sum_s w_s dE/dw_s + b dE/db` over the channel's own weights;
- before the layers that read it: `sum w dE/dw` over their weights of that input channel.

Cost: one multiplication a parameter that is read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.errors import CriterionError
from nni_plugin.groups import Member
from nni_plugin.tensors import Place, places_of


def norm_gate(layer: nn.Module, path: str = "") -> Tensor:
    """Return `gamma dgamma + beta dbeta` of a normalisation layer, shape `[C]`.

    Raises:
        CriterionError: The layer has no affine parameters, or they have no gradient.
    """
    terms = [_product(layer, place.tensor, path) for place in places_of(layer, "out") if not _is_statistic(place)]
    if not terms:
        raise CriterionError(f"{path!r} is a normalisation without affine parameters: it has no gate to score.")
    return torch.stack(terms).sum(0)


def writer_gate(layer: nn.Module, path: str = "") -> Tensor:
    """Return `sum_s w_s g_s + b g_b` over the weights that write each output channel, shape `[out]`.

    Before a normalisation in train mode this is zero by scale invariance: score the normalisation instead.
    """
    total: Tensor | None = None
    for place in places_of(layer, "out"):
        term = _per_channel(_product(layer, place.tensor, path), layer, place)
        total = term if total is None else total + term
    assert total is not None
    return total


def reader_gate(layer: nn.Module, path: str = "") -> Tensor:
    """Return `sum w g` over the weights that read each input channel, shape `[in]`."""
    (place,) = places_of(layer, "in")
    return _per_channel(_product(layer, place.tensor, path), layer, place)


def parameter_gate(parameter: Tensor, dim: int, path: str = "") -> Tensor:
    """Return `sum p g` of a bare parameter over all dimensions but one, shape `[size of dim]`."""
    if parameter.grad is None:
        raise _no_gradient(path)
    return _sum_but(parameter.detach() * parameter.grad.detach(), dim)


def member_gate(model: nn.Module, member: Member) -> Tensor:
    """Return the gate gradient at one member of a group, for every position of its axis."""
    if member.kind == "parameter":
        (piece,) = member.slices
        path, _, leaf = member.path.rpartition(".")
        return parameter_gate(getattr(model.get_submodule(path), leaf), piece.dim, member.path)
    layer = model.get_submodule(member.path)
    if member.axis == "in":
        return reader_gate(layer, member.path)
    return norm_gate(layer, member.path) if member.kind == "norm" else writer_gate(layer, member.path)


def _product(layer: nn.Module, name: str, path: str) -> Tensor:
    parameter: Tensor = getattr(layer, name)
    if parameter.grad is None:
        raise _no_gradient(f"{path}.{name}" if path else name)
    return parameter.detach() * parameter.grad.detach()


def _per_channel(product: Tensor, layer: nn.Module, place: Place) -> Tensor:
    if place.period is None:
        return _sum_but(product, place.dim)
    # A grouped convolution folds this axis: each of its groups has `period` channels of its own.
    assert isinstance(layer, _ConvNd)
    split = product.reshape(layer.groups, product.shape[0] // layer.groups, place.period, -1)
    folded: Tensor = split.sum(dim=(1, 3)).reshape(-1)
    return folded


def _sum_but(product: Tensor, dim: int) -> Tensor:
    summed: Tensor = product.movedim(dim, 0).flatten(1).sum(1) if product.dim() > 1 else product
    return summed


def _is_statistic(place: Place) -> bool:
    return place.tensor.startswith("running_")


def _no_gradient(path: str) -> CriterionError:
    return CriterionError(
        f"{path!r} has no gradient: it is frozen, or backward() has not run (or zero_grad() has). Call update() "
        "between backward() and the optimizer's step, with requires_grad on the layers to score."
    )
