"""Arguments that several commands share, under timm's names where timm has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse

LIBRARIES = ("timm", "torchvision", "nni_plugin")


def integers(text: Any) -> tuple[int, ...]:
    """Read a list of integers of at least 1, from YAML or separated by commas.

    Example:
        >>> integers("1,64")
        (1, 64)
    """
    try:
        values = tuple(int(part) for part in _parts(text))
    except ValueError as error:
        raise ValueError(f"expected integers separated by commas, e.g. 1,64; got {text!r}") from error
    if not values or min(values) < 1:
        raise ValueError(f"expected integers of at least 1, got {text!r}")
    return values


def names(text: Any) -> tuple[str, ...]:
    """Read a list of names, from YAML or separated by commas."""
    return tuple(part for part in _parts(text) if part)


def _parts(text: Any) -> list[str]:
    parts = text if isinstance(text, (list, tuple)) else str(text).split(",")
    return [str(part).strip() for part in parts]


def above(minimum: int) -> Callable[[Any], int]:
    """Return a reader of integers of at least `minimum`."""

    def read(text: Any) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError(f"expected an integer of at least {minimum}, got {value}")
        return value

    read.__name__ = f"integer of at least {minimum}"
    return read


def add_model(parser: jsonargparse.ArgumentParser, *, required: bool) -> None:
    """Add the choice of a model."""
    add = parser.add_argument
    add("--model", type=str, required=required, help="name of the model in its library, e.g. resnet18")
    add("--library", type=str, choices=LIBRARIES, default="timm", help="where the model comes from")
    add("--checkpoint", type=Path, help="weights to start from (.safetensors, or a state dict of torch)")
    add("--pretrained", action="store_true", help="start from the library's published weights (downloads)")
    add("--model-kwargs", type=dict, default={}, help="further arguments of its builder, e.g. '{\"img_size\": 64}'")


def add_data(parser: jsonargparse.ArgumentParser) -> None:
    """Add the choice of data."""
    add = parser.add_argument
    add("--dataset", type=str, default="digits", help="digits, torch/fashion_mnist, torch/cifar10, ImageFolder, ...")
    add("--data-dir", type=Path, help="folder of the data (Fashion-MNIST: the one with the four IDX .gz files)")
    add("--num-classes", type=above(1), help="number of classes (that of the data set)")
    add("--in-chans", type=above(1), default=3, help="channels of the images; gray ones are repeated")
    add("--img-size", type=above(1), help="height and width of the images (that of the data set)")
    add("-b", "--batch-size", type=above(1), default=128, help="images in a minibatch")
    add("-j", "--workers", type=above(0), default=0, help="processes that load images (0: none needed in memory)")


def add_common(parser: jsonargparse.ArgumentParser, *, output_required: bool) -> None:
    """Add what every command has."""
    add = parser.add_argument
    add("--seed", type=above(0), default=0, help="of weights, data order and dropout")
    add("--device", type=str, help="cpu, cuda, cuda:1, ... (the best there is)")
    add("--output", type=Path, required=output_required, help="folder for the results")
