"""Arguments that several commands share, under timm's names where timm has one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonargparse

from nni_plugin.errors import TrainingError
from nni_plugin.machine import usable_device

LIBRARIES = ("timm", "torchvision", "nni_plugin")
LARGEST_SEED = 2**32 - 1
"""The most that every random generator takes."""


class BadValue(argparse.ArgumentTypeError, ValueError):
    """A value that an argument cannot take: argparse shows the text of the one, jsonargparse that of the other."""


def integers(text: Any) -> tuple[int, ...]:
    """Read a list of integers of at least 1, from YAML or separated by commas.

    Example:
        >>> integers("1,64")
        (1, 64)
    """
    read = above(1)
    try:
        return tuple(read(part) for part in _parts(text))
    except BadValue as error:
        raise BadValue(f"expected integers of at least 1 separated by commas, such as 1,64, got {text!r}") from error


def seeds(text: Any) -> tuple[int, ...]:
    """Read a list of seeds.

    Example:
        >>> seeds("0,1,2")
        (0, 1, 2)
    """
    read = above(0, LARGEST_SEED)
    return tuple(read(part) for part in _parts(text))


def numbers(text: Any) -> tuple[float, ...]:
    """Read a list of numbers.

    Example:
        >>> numbers(".75,.5")
        (0.75, 0.5)
    """
    return tuple(number(part) for part in _parts(text))


def latencies(text: Any) -> tuple[dict[str, float], ...]:
    """Read a list of latencies, see :func:`latency`."""
    return tuple(latency(part) for part in (text if isinstance(text, (list, tuple)) else str(text).split(",")))


def names(text: Any) -> tuple[str, ...]:
    """Read a list of names, from YAML or separated by commas."""
    return tuple(part for part in _parts(text) if part)


def _parts(text: Any) -> list[str]:
    parts = text if isinstance(text, (list, tuple)) else str(text).split(",")
    return [str(part).strip() for part in parts]


def above(minimum: int, maximum: int | None = None) -> Callable[[Any], int]:
    """Return a reader of integers of at least `minimum`, and at most `maximum`."""
    expected = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"

    def read(text: Any) -> int:
        try:
            value = int(str(text))  # by way of text, for 2.5 of a YAML file is no integer
        except ValueError as error:
            raise BadValue(f"expected {expected}, got {text!r}") from error
        if value < minimum or (maximum is not None and value > maximum):
            raise BadValue(f"expected {expected}, got {text!r}")
        return value

    return read


def number(text: Any) -> float:
    """Read a finite number.

    Example:
        >>> number("1e-3")
        0.001
    """
    try:
        value = float(str(text))
    except ValueError as error:
        raise BadValue(f"expected a number, got {text!r}") from error
    if not math.isfinite(value):
        raise BadValue(f"expected a finite number, got {text!r}")
    return value


def optional_bool(text: Any) -> bool:
    """Read `true` or `false`.

    Example:
        >>> optional_bool("true"), optional_bool(False)
        (True, False)
    """
    value = str(text).lower()
    if value not in ("true", "false"):
        raise BadValue(f"expected true or false, got {text!r}")
    return value == "true"


def count_or_fraction(text: Any) -> int | float:
    """Read a count, written as an integer, or a fraction.

    Example:
        >>> count_or_fraction("223"), count_or_fraction("0.5")
        (223, 0.5)
    """
    try:
        return int(str(text))
    except ValueError:
        return number(text)


def latency(text: Any) -> dict[str, float]:
    """Read a fraction, or milliseconds with their unit, as arguments of a latency budget.

    Example:
        >>> latency("0.7"), latency("3.5ms")
        ({'ratio': 0.7}, {'ms': 3.5})
    """
    if isinstance(text, Mapping):
        return {str(name): number(value) for name, value in text.items()}
    written = str(text).strip()
    if written.endswith("ms"):
        return {"ms": number(written.removesuffix("ms").strip())}
    return {"ratio": number(written)}


def fractions(text: Any) -> dict[str, float]:
    """Read numbers by name, from YAML or as `name=number` separated by commas.

    Example:
        >>> fractions("layer1=0.7,layer2=0.5")
        {'layer1': 0.7, 'layer2': 0.5}
    """
    if isinstance(text, Mapping):
        return {str(name): number(value) for name, value in text.items()}
    pairs = [part.partition("=") for part in _parts(text) if part]
    if not all(name and equals for name, equals, _ in pairs):
        raise BadValue(f"expected name=number separated by commas, such as layer1=0.7,layer2=0.5, got {text!r}")
    return {name.strip(): number(value.strip()) for name, _, value in pairs}


def device_name(text: Any) -> str:
    """Read the name of a device, and try whether it computes.

    Example:
        >>> device_name("cpu")
        'cpu'
    """
    try:
        return str(usable_device(str(text)))
    except TrainingError as error:
        raise BadValue(str(error).removeprefix("--device: ")) from error


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


def data_kwargs(arguments: Any) -> dict[str, Any]:
    """Return what `create_loaders` takes beside the name and the folder of the data."""
    names_of = {"num_workers": "workers"}
    wanted = ("batch_size", "img_size", "in_chans", "num_classes", "num_workers")
    return {name: arguments[names_of.get(name, name)] for name in wanted}


def add_common(parser: jsonargparse.ArgumentParser, *, output_required: bool) -> None:
    """Add what every command has."""
    add = parser.add_argument
    add("--seed", type=above(0, LARGEST_SEED), default=0, help="of weights, data order and dropout")
    add("--device", type=device_name, help="cpu, cuda, cuda:1, ... (the best there is)")
    add("--output", type=Path, required=output_required, help="folder for the results")
