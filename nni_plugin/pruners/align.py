"""NNI's `align`: the mask of a target follows that of another, along one dimension of it.

Layers that share channels follow each other by themselves, see :mod:`nni_plugin.pruners.coupling`. What a config_list
aligns by hand besides is done here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.errors import ConfigError
from nni_plugin.pruners.wrapping import Masks


def check_aligned(model: nn.Module, config_list: Iterable[Mapping[str, Any]]) -> None:
    """Check that what targets are aligned with exists.

    Raises:
        ConfigError: A module is not in the network, or not one dimension is named.
    """
    names = dict(model.named_modules())
    for number, entry in enumerate(config_list):
        settings = [entry, *entry.get("target_settings", {}).values()]
        for align in (found["align"] for found in settings if found.get("align") is not None):
            name, dims = align.get("module_name"), align["dims"]
            if name is not None and name not in names:
                raise ConfigError(f"config_list[{number}]: align names {name!r}, which is not in the model.")
            if not isinstance(dims, list) or len(dims) != 1 or not isinstance(dims[0], int):
                raise ConfigError(
                    f"config_list[{number}]: align needs one dimension in dims, such as [0], got {dims!r}."
                )


def aligned_masks(masks: Masks, spaces: Mapping[str, Mapping[str, Any]]) -> Masks:
    """Add the masks of aligned targets that have none yet.

    Args:
        masks: By module and target.
        spaces: NNI's target spaces, by module and target; those with `align` are looked at.

    Returns:
        A copy with more masks. A target whose model is not masked is not masked either.

    Raises:
        ConfigError: The mask that is followed has another number of channels than the target.
    """
    result = {module: dict(targets) for module, targets in masks.items()}
    waiting = {
        (module, target): space
        for module, targets in spaces.items()
        for target, space in targets.items()
        if space.align is not None and space.target is not None and target not in result.get(module, {})
    }
    while True:  # one may follow another that follows
        ready = {}
        for (module, target), space in waiting.items():
            source = result.get(space.align["module_name"] or module, {}).get(space.align["target_name"])
            if source is not None:
                ready[module, target] = _follow(source, space, f"{module}.{target}")
        if not ready:
            return result
        for (module, target), mask in ready.items():
            result.setdefault(module, {})[target] = mask
            del waiting[module, target]


def _follow(source: Tensor, space: Any, name: str) -> Tensor:
    """Return the mask of a target whose first dimension follows one dimension of another mask."""
    (dim,) = space.align["dims"]
    if not -source.dim() <= dim < source.dim() or source.shape[dim] != space.target.shape[0]:
        raise ConfigError(
            f"{name} is aligned with dimension {dim} of a mask of shape {tuple(source.shape)}, but has "
            f"{space.target.shape[0]} channels itself (key align)."
        )
    stays = source.movedim(dim, 0).flatten(1).any(1) if source.dim() > 1 else source.bool()
    shape = [-1, *[1] * (space.target.dim() - 1)]
    return stays.to(space.target).reshape(shape) * torch.ones_like(space.target).detach()
