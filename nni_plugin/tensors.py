"""Where the channels of a layer live: which dimension of which tensor, for every kind of layer we cut.

One table, read by criteria (what to multiply with its gradient), masks (what to zero), cost (how a
tensor shrinks) and surgery (what to slice and which size attributes to lower).
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

Axis = Literal["out", "in"]

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
"""Layers whose output is `gamma * x_hat + beta`, channel by channel."""

CHANNEL_NORMS = (nn.GroupNorm, nn.LayerNorm)
"""Layers that normalise over channels: removing a channel changes the statistics of the others."""


class Place(NamedTuple):
    """Where one axis of a layer lies in one of its tensors.

    Args:
        tensor: Name of the parameter or buffer in the layer.
        dim: Dimension that holds the channels.
        period: The dimension holds channel `i` at `i % period` (a grouped convolution); None for `i` itself.
    """

    tensor: str
    dim: int
    period: int | None = None


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a network by its qualified name."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def holders(model: nn.Module) -> Counter[int]:
    """Count the layers that hold each parameter, by its `id`: more than one share it. A layer of two names is one."""
    return Counter(id(parameter) for layer in model.modules() for parameter in layer.parameters(recurse=False))


def is_depthwise(layer: nn.Module) -> bool:
    """Tell whether a layer is a convolution with one input channel and one filter a group."""
    return isinstance(layer, _ConvNd) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def kind_of(layer: nn.Module) -> str:
    """Return `"norm"`, `"depthwise"`, `"dense"`, `"prelu"`, `"embedding"`, or `""` for a layer we cannot cut."""
    if isinstance(layer, nn.LayerNorm):
        return "norm" if len(layer.normalized_shape) == 1 else ""
    if isinstance(layer, NORMS):
        return "norm"
    if is_depthwise(layer):
        return "depthwise"
    if isinstance(layer, _ConvNd):
        # One filter a group over several inputs: output and input counts are tied in a way we do not model.
        return "" if layer.groups > 1 and layer.groups == layer.out_channels else "dense"
    if isinstance(layer, nn.Linear):
        return "dense"
    if isinstance(layer, nn.PReLU):
        return "prelu"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return ""


def places_of(layer: nn.Module, axis: Axis) -> tuple[Place, ...]:
    """Return where the channels of one axis of a layer lie.

    Args:
        layer: A layer of a kind that :func:`kind_of` knows.
        axis: `"out"` (also for layers whose output channel is their input channel) or `"in"`.

    Returns:
        One place per tensor that exists in this layer; empty for a layer without channel tensors.

    Example:
        >>> places_of(nn.Conv2d(4, 8, 3, groups=2, bias=False), "in")
        (Place(tensor='weight', dim=1, period=2),)
        >>> [place.tensor for place in places_of(nn.BatchNorm2d(4), "out")]
        ['weight', 'bias', 'running_mean', 'running_var']
    """
    kind = kind_of(layer)
    places: list[Place] = []
    if kind == "norm":
        places = [Place(name, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    elif kind == "depthwise":
        places = [Place("weight", 0), Place("bias", 0)]
    elif kind == "prelu":
        places = [Place("weight", 0)] if isinstance(layer, nn.PReLU) and layer.num_parameters > 1 else []
    elif kind == "embedding":
        places = [Place("weight", 1)]
    elif isinstance(layer, _ConvNd):
        out_dim, in_dim = (1, 0) if layer.transposed else (0, 1)
        size = layer.out_channels if axis == "out" else layer.in_channels
        # The dimension that a grouped convolution folds: inputs, or outputs when it is transposed.
        folded = layer.groups > 1 and (axis == "in") != layer.transposed
        period = size // layer.groups if folded else None
        places = [Place("weight", out_dim if axis == "out" else in_dim, period)]
        if axis == "out":
            places.append(Place("bias", 0))
    elif isinstance(layer, nn.Linear):
        places = [Place("weight", 0), Place("bias", 0)] if axis == "out" else [Place("weight", 1)]
    return tuple(place for place in places if getattr(layer, place.tensor, None) is not None)


def tie_period(layer: nn.Module, axis: Axis) -> int | None:
    """Return the period at which channels of an axis must be removed together, None when each stands alone.

    The groups of a grouped convolution or of a GroupNorm must stay equally wide, so channel `i` goes
    together with every `j` with `j % period == i % period`.
    """
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels // layer.num_groups if layer.num_groups > 1 else None
    if isinstance(layer, _ConvNd) and layer.groups > 1 and not is_depthwise(layer):
        return (layer.out_channels if axis == "out" else layer.in_channels) // layer.groups
    return None


def shrink_sizes(layer: nn.Module, axis: Axis, removed: int) -> dict[str, object]:
    """Return the size attributes of a layer, by name, once `removed` channels of an axis are gone."""
    kind = kind_of(layer)
    if isinstance(layer, nn.LayerNorm):
        return {"normalized_shape": (layer.normalized_shape[0] - removed,)}
    if kind == "norm":
        name = "num_channels" if isinstance(layer, nn.GroupNorm) else "num_features"
        return {name: getattr(layer, name) - removed}
    if isinstance(layer, _ConvNd):
        if kind == "depthwise":
            width = layer.out_channels - removed
            return {"in_channels": width, "out_channels": width, "groups": width}
        name = "out_channels" if axis == "out" else "in_channels"
        return {name: getattr(layer, name) - removed}
    if isinstance(layer, nn.Linear):
        name = "out_features" if axis == "out" else "in_features"
        return {name: getattr(layer, name) - removed}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": layer.num_parameters - removed} if layer.num_parameters > 1 else {}
    if isinstance(layer, nn.Embedding):
        return {"embedding_dim": layer.embedding_dim - removed}
    return {}
