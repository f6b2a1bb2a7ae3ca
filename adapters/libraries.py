"""What libraries say of their own models: all their names, the family of each, and the images they are meant for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torchvision
from timm.models import model_entrypoint
from torch import nn

from nni_plugin.errors import ModelError
from nni_plugin.networks import NETWORKS

_TORCHVISION_SIZES = {"inception_v3": 299}
"""Height and width of the images where they are not 224."""


def model_names(library: str) -> list[str]:
    """Return the name of every image classifier that a library has, without tags of published weights.

    Args:
        library: `"timm"`, `"torchvision"` or `"nni_plugin"`.

    Raises:
        ModelError: There is no such library.
    """
    if library == "timm":
        return list(timm.list_models())
    if library == "torchvision":
        return list(torchvision.models.list_models(module=torchvision.models))
    if library == "nni_plugin":
        return list(NETWORKS)
    raise ModelError(f"Unknown library {library!r}: expected one of timm, torchvision, nni_plugin.")


def family_of(library: str, name: str) -> str:
    """Return the family of a model: the file of its library that defines it; the name itself where there is none.

    Example:
        >>> family_of("timm", "resnet18"), family_of("torchvision", "squeezenet1_0")
        ('resnet', 'squeezenet')
    """
    builder: Any = None
    if library == "timm" and timm.is_model(name):
        builder = model_entrypoint(name)
    elif library == "torchvision" and name in model_names(library):
        builder = torchvision.models.get_model_builder(name)
    elif library == "nni_plugin" and name in NETWORKS:
        builder = NETWORKS[name]
    return name if builder is None else str(builder.__module__).rpartition(".")[2]


def usual_input(model: nn.Module, library: str, name: str) -> tuple[int, int, int]:
    """Return the shape `(C, H, W)` of the images that a model of a library is meant for.

    Args:
        model: The network, as its library builds it without further arguments.
        library: Where it comes from.
        name: Its name there.
    """
    if library == "timm":
        config = getattr(model, "pretrained_cfg", None)
        size = config.get("input_size") if isinstance(config, Mapping) else None
        channels, height, width = size or (3, 224, 224)
        return int(channels), int(height), int(width)
    size = _TORCHVISION_SIZES.get(name, 224) if library == "torchvision" else 32
    return 3, size, size
