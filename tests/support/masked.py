"""Masks for tests: whole filters at random or by hand, and the network that they mean."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nni_plugin.tensors import kind_of

Masks = dict[str, dict[str, Tensor]]


def filters(model: nn.Module, gone: Mapping[str, Sequence[int]], bias: bool = True) -> Masks:
    """Mask these output channels of these layers, in weight and (where there is one) bias."""
    masks: Masks = {}
    for path, channels in gone.items():
        layer = model.get_submodule(path)
        for name in ("weight", "bias") if bias else ("weight",):
            if getattr(layer, name, None) is not None:
                mask = torch.ones_like(getattr(layer, name)).detach()
                mask[list(channels)] = 0
                masks.setdefault(path, {})[name] = mask
    return masks


def masked(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """Return a copy in eval mode whose parameters are multiplied with their masks."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for path, targets in masks.items():
            for name, mask in targets.items():
                getattr(model.get_submodule(path), name).mul_(mask)
    return model


def random_masks(model: nn.Module, seed: int, norms: bool = True) -> Masks:
    """Mask whole filters of layers at random, a few inputs and single weights as well; never none."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    share = draw.random()
    masks: Masks = {}
    layers = [
        (path, layer) for path, layer in model.named_modules() if kind_of(layer) in ("dense", "depthwise", "norm")
    ]
    for path, layer in layers:
        weight = layer.weight
        if weight is None or (masks and draw.random() < 0.3) or (kind_of(layer) == "norm" and not norms):
            continue
        mask = torch.ones_like(weight).detach()
        mask[torch.rand(len(weight), generator=generator) < share] = 0
        kept = mask.flatten(1).any(1) if mask.dim() > 1 else mask != 0
        if layer.bias is not None and len(layer.bias) == len(kept) and draw.random() < 0.7:
            masks[path] = {"bias": kept.to(mask)}
        if kind_of(layer) == "dense" and draw.random() < 0.2:
            mask *= torch.rand(mask.shape, generator=generator) < 0.8
        if kind_of(layer) == "dense" and draw.random() < 0.2:
            mask[:, torch.rand(mask.shape[1], generator=generator) < share] = 0
        masks.setdefault(path, {})["weight"] = mask
    return masks


def disturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every vector (scales, biases, statistics) from 0.5 to 1.5, so that nothing is zero by its default."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and (tensor.dim() == 1 or tensor[0].numel() == 1):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()
