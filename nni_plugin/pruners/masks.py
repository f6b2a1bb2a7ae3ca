"""Masks as NNI writes them, read and brought to one form: a mask of zeros and ones for each parameter.

NNI hands masks round as `{module: {target: mask}}`, saved or not, where a target is a parameter (`weight`, `bias`) or
an activation (`_input_0`, `_output_0`). A mask of whole channels on an activation says the same as zeros in the rows
or columns of the layer's weight, so it is turned into these, and the weights alone can hold everything that was masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.errors import MaskError
from nni_plugin.tensors import Axis, kind_of, places_of

INPUT, OUTPUT = "_input_", "_output_"
"""How NNI begins the name of a target that is an activation."""


def load_masks(masks_or_file: Any, map_location: Any = None) -> dict[str, dict[str, Tensor]]:
    """Take masks as they are, or read them from a file.

    Args:
        masks_or_file: `{module: {target: mask or None}}`, or the path of such a dictionary saved by `torch.save`
            (NNI saves a `defaultdict`; plain tensors and dictionaries are all that is read, nothing is executed).
        map_location: Where the tensors of a file go, as in `torch.load`.

    Returns:
        The masks by module and target; targets without a mask are left out.

    Raises:
        MaskError: It is neither, the file is not there or not to be read, or there is no mask at all.
    """
    if isinstance(masks_or_file, (str, Path)):
        masks_or_file = _read(Path(masks_or_file), map_location)
    if not isinstance(masks_or_file, Mapping) or not all(isinstance(v, Mapping) for v in masks_or_file.values()):
        raise MaskError(
            f"Expected masks as {{module: {{target: tensor}}}} or the path of a file that holds them, got "
            f"{type(masks_or_file).__name__}. The model is unchanged."
        )
    masks = {
        str(module): {str(target): mask for target, mask in targets.items() if mask is not None}
        for module, targets in masks_or_file.items()
    }
    if not any(masks.values()):
        raise MaskError("There is no mask: has the pruner's compress() been called? The model is unchanged.")
    return masks


def _read(path: Path, map_location: Any) -> Any:
    if not path.is_file():
        raise MaskError(f"There is no masks file {str(path)!r}. The model is unchanged.")
    try:
        # A defaultdict is what NNI saves and torch refuses to fill: a plain one is read in its place.
        with torch.serialization.safe_globals([(_plain_dict, "collections.defaultdict"), (dict, "builtins.dict")]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a file that is no file of torch's fails in many ways
        raise MaskError(
            f"{str(path)!r} cannot be read as masks ({type(error).__name__}: {error}). Save them with "
            "torch.save(masks, path). The model is unchanged."
        ) from error


def _plain_dict(_: object = None) -> dict[str, Any]:
    return {}


def parameter_masks(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Check masks against a network and bring them to one mask a parameter.

    Args:
        model: The network, unwrapped; left as it is.
        masks: By module and target: a parameter's name, with a mask of its shape; `_input_0` of a convolution or linear
            layer, or `_output_0` of these and of normalisations, with a mask of whole channels (`[C]`, or the
            activation's shape with 1 or its size elsewhere). On other modules only masks of ones, which say nothing.

    Returns:
        One boolean mask a parameter, True where it is kept, by the qualified name of the first of its owners.

    Raises:
        MaskError: The network is still wrapped, a module or target is not there, a mask has another shape or other
            values than 0 and 1, or an activation's mask that no weight can hold. The text names module and target.
    """
    if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise MaskError("The model is still wrapped by a pruner of NNI: call pruner.unwrap_model() first.")
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    result: dict[str, Tensor] = {}
    for path, targets in masks.items():
        if path not in modules:
            raise MaskError(
                f"The masks are for another model: there is no module {path!r}; model.named_modules() lists those of "
                f"{type(model).__name__}. The model is unchanged."
            )
        for target, mask in targets.items():
            where = f"mask of target {target!r} of module {path!r}"
            kept = _binary(where, mask)
            if target.startswith((INPUT, OUTPUT)):
                found = _of_activation(where, modules[path], target, kept)
            else:
                found = {target: kept}
            for name, part in found.items():
                parameter = getattr(modules[path], name, None)
                if not isinstance(parameter, nn.Parameter):
                    raise MaskError(f"The {where} is for no parameter: {type(modules[path]).__name__} has none of it.")
                if part.shape != parameter.shape:
                    raise MaskError(
                        f"The {where} has shape {list(part.shape)}, expected {list(parameter.shape)}, the parameter's. "
                        "The model is unchanged."
                    )
                key = first[id(parameter)]
                result[key] = result[key] & part if key in result else part
    return result


def _binary(where: str, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.numel() == 0:
        got = "an empty tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(f"The {where} is {got}, expected a tensor of zeros and ones. The model is unchanged.")
    kept = mask.detach().cpu() != 0
    if not torch.equal(kept.double(), mask.detach().cpu().double()):
        raise MaskError(f"The {where} holds other values than 0 and 1. The model is unchanged.")
    return kept


def _of_activation(where: str, layer: nn.Module, target: str, kept: Tensor) -> dict[str, Tensor]:
    """Return what a mask of whole channels on a layer's input or output says of the layer's parameters."""
    axis: Axis = "in" if target.startswith(INPUT) else "out"
    kind = kind_of(layer)
    places = [p for p in places_of(layer, axis) if isinstance(getattr(layer, p.tensor), nn.Parameter)] if kind else []
    if not places or (axis == "in" and kind != "dense"):
        if bool(kept.all()):
            return {}
        raise MaskError(
            f"The {where} cannot be held by weights: inputs may be masked of convolutions and linear layers, outputs "
            "of these and of normalisations with affine parameters. Mask the layer before it instead. The model is "
            "unchanged."
        )
    width = _width(layer, axis)
    dim = -1 if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.Embedding)) or kept.dim() == 1 else 1
    rows = kept.movedim(dim, 0).flatten(1) if kept.dim() > 1 else kept[:, None]
    if rows.shape[0] != width:
        raise MaskError(
            f"The {where} has shape {list(kept.shape)}, expected {width} channels along dimension {dim}. The model is "
            "unchanged."
        )
    if not torch.equal(rows.any(1), rows.all(1)):
        raise MaskError(f"The {where} masks parts of channels; only whole channels can leave. The model is unchanged.")
    channels = rows.all(1)
    return {place.tensor: _spread(layer, place.tensor, channels, axis) for place in places}


def _width(layer: nn.Module, axis: Axis) -> int:
    if isinstance(layer, (_ConvNd, nn.Linear)):
        view = _grouped(layer, layer.weight)
        return view.shape[0] * view.shape[1 if axis == "out" else 2]
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[-1 if isinstance(layer, nn.Embedding) else 0]


def _grouped(layer: nn.Module, weight: Tensor) -> Tensor:
    """View a weight as `[groups, outputs a group, inputs a group, kernel]`."""
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    view = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return view.transpose(1, 2) if isinstance(layer, _ConvNd) and layer.transposed else view


def _spread(layer: nn.Module, name: str, channels: Tensor, axis: Axis) -> Tensor:
    """Return the mask of a parameter in which whole channels of one axis are masked."""
    parameter = getattr(layer, name)
    mask = torch.ones(parameter.shape, dtype=torch.bool)
    if isinstance(layer, (_ConvNd, nn.Linear)) and name == "weight":
        view = _grouped(layer, mask)
        rows = channels.reshape(view.shape[0], -1)
        view &= rows[:, :, None, None] if axis == "out" else rows[:, None, :, None]
        return mask
    return mask & channels  # vectors, and the columns of an embedding


def used_channels(layer: nn.Module, weight_mask: Tensor, axis: Axis) -> Tensor:
    """Tell which channels of a layer a mask of its weight leaves anything of.

    Args:
        layer: A layer of a kind that :func:`nni_plugin.tensors.kind_of` knows.
        weight_mask: True where the weight is kept, of the weight's shape.
        axis: `"out"` for whole filters, `"in"` for all that reads an input channel.

    Returns:
        Bool, one value a channel of that axis; False where the whole filter is masked.

    Example:
        >>> conv = nn.Conv2d(2, 3, 1)
        >>> mask = torch.tensor([[1, 0], [0, 0], [1, 0]]).bool().reshape(3, 2, 1, 1)
        >>> used_channels(conv, mask, "out").tolist(), used_channels(conv, mask, "in").tolist()
        ([True, False, True], [True, False])
    """
    if isinstance(layer, (_ConvNd, nn.Linear)):
        return _grouped(layer, weight_mask).any(3).any(2 if axis == "out" else 1).flatten()
    return weight_mask.any(0) if isinstance(layer, nn.Embedding) else weight_mask
