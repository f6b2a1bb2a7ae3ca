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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.criteria.gates import accumulable
from nni_plugin.errors import CriterionError
from nni_plugin.groups import Member
from nni_plugin.tensors import Place, places_of, tensor_of


def member_gates(model: nn.Module, members: Sequence[Member], *, squared: bool = False) -> list[Tensor]:
    """Return the gate gradients at members of groups, for every position of each one's axis.

    Args:
        model: The network, with gradients.
        members: What to read.
        squared: Square each `w dE/dw` before the sum over a channel's weights instead of after it.

    Raises:
        CriterionError: A parameter has no gradient.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    places: list[tuple[int, Tensor, nn.Module | None, Place]] = []
    for i, member in enumerate(members):
        for parameter, layer, place in parameters_of(model, member):
            if parameter.grad is None:
                raise no_gradient(f"{member.path}.{place.tensor}" if layer is not None else member.path)
            # Before they are multiplied: squares of small products vanish in float16.
            pairs.append((accumulable(parameter.detach()), accumulable(parameter.grad.detach())))
            places.append((i, parameter, layer, place))
    if not pairs:
        return []
    products = _products(pairs)
    if squared:
        products = [product.square() for product in products]
    gates: list[Tensor | None] = [None] * len(members)
    for (i, _, layer, place), product in zip(places, products, strict=True):
        term = per_channel(product, layer, place)
        before = gates[i]
        gates[i] = term if before is None else before + term
    return [gate for gate in gates if gate is not None]


def parameters_of(model: nn.Module, member: Member) -> Iterator[tuple[Tensor, nn.Module | None, Place]]:
    """Yield the parameters that make up a member's gate."""
    if member.kind == "parameter":
        (piece,) = member.slices
        yield tensor_of(model, member.path), None, Place(member.path, piece.dim)
        return
    layer = model.get_submodule(member.path)
    places = [place for place in places_of(layer, member.axis) if not place.tensor.startswith("running_")]
    if not places:
        raise CriterionError(
            f"{member.path!r} is a {type(layer).__name__} without parameters: it has no gate to score."
        )
    for place in places:
        yield getattr(layer, place.tensor), layer, place


def _products(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Multiply many parameters with their gradients: one call where device and dtype are one."""
    first = pairs[0][0]
    if all(p.device == first.device and p.dtype == first.dtype == g.dtype for p, g in pairs):
        return list(torch._foreach_mul([p for p, _ in pairs], [g for _, g in pairs]))
    return [p * g for p, g in pairs]


def per_channel(product: Tensor, layer: nn.Module | None, place: Place) -> Tensor:
    """Sum what belongs to one parameter, such as `w dE/dw`, over all but the channels of an axis."""
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


def no_gradient(path: str) -> CriterionError:
    """Return the error for a parameter without a gradient."""
    return CriterionError(
        f"{path!r} has no gradient: it is frozen, or backward() has not run (or zero_grad() has). Call update() "
        "between backward() and the optimizer's step, with requires_grad on the layers to score."
    )
