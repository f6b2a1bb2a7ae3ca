"""Arguments that several commands share, under timm's names where timm has one."""

from __future__ import annotations

import argparse
import json
import math
import re
from ast import literal_eval
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from nni_plugin.errors import TrainingError
from nni_plugin.machine import usable_device

LIBRARIES = ("timm", "torchvision", "nni_plugin")
LARGEST_SEED = 2**32 - 1
"""The most that every random generator takes."""

# Arguments of a model's builder that have flags of their own.
_FLAGS = {
    "name": "--model",
    "library": "--library",
    "num_classes": "--num-classes",
    "in_chans": "--in-chans",
    "pretrained": "--pretrained",
    "checkpoint": "--checkpoint",
}


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


def model_kwargs(text: Any) -> dict[str, Any]:
    """Read further arguments of a model's builder: a dict, from YAML or as JSON, or `name=value` as timm has it.

    Example:
        >>> model_kwargs("drop_path_rate=0.1,act_layer=silu"), model_kwargs('{"img_size": 64}')
        ({'drop_path_rate': 0.1, 'act_layer': 'silu'}, {'img_size': 64})
    """
    content = text
    if isinstance(text, str):
        # Only what stands before a further name parts two values: a list holds commas too.
        pairs = [part.partition("=") for part in re.split(r"[,\s]+(?=\w+=)", text.strip())]
        if all(name.isidentifier() and value for name, _, value in pairs):
            content = {name: _literal(value) for name, _, value in pairs}
        else:
            content = _mapping(text)
    if not isinstance(content, Mapping):
        raise BadValue(
            f"expected name=value separated by commas, such as drop_path_rate=0.1,img_size=64, or a dict, got {text!r}"
        )
    for name in content:
        if name in _FLAGS:
            raise BadValue(f"{name!r} has a flag of its own: give {_FLAGS[name]} instead")
    return {str(name): value for name, value in content.items()}


def _literal(text: str) -> Any:
    """Return what a literal of JSON or Python stands for; any other text is itself."""
    for read in (json.loads, literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _mapping(text: str) -> Any:
    """Return what YAML makes of a text, JSON included; None where it makes nothing of it."""
    try:
        return jsonargparse.get_loader("yaml")(text)
    except yaml.YAMLError:
        return None


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
    add("--checkpoint", type=Path, help="weights to start from (.safetensors, or a file of torch or timm's train.py)")
    add("--pretrained", action="store_true", help="start from the library's published weights (downloads)")
    add("--model-kwargs", type=model_kwargs, default={}, help="further arguments of its builder: img_size=64,depth=2")


def add_data(parser: jsonargparse.ArgumentParser) -> None:
    """Add the choice of data."""
    add = parser.add_argument
    add("--dataset", type=str, default="digits", help="digits, torch/fashion_mnist, torch/cifar10, ImageFolder, ...")
    add("--data-dir", type=Path, help="folder of the data (Fashion-MNIST: the one with the four IDX .gz files)")
    add("--num-classes", type=above(1), help="number of classes (that of the data set)")
    add("--in-chans", type=above(1), default=3, help="channels of the images; gray ones are repeated")
    add("--img-size", type=above(1), help="height and width of the images (pictures: the model's, else the data set's)")
    add("--mean", type=number, nargs="+", help="mean of each channel of the images (likewise)")
    add("--std", type=number, nargs="+", help="standard deviation of each channel (likewise)")
    add("--crop-pct", type=number, help="share of the side of a scaled picture to score and test on (the model's)")
    add("--interpolation", type=str, help="in scaling pictures: bilinear, bicubic, ... (the model's)")
    add("-b", "--batch-size", type=above(1), default=128, help="images in a minibatch")
    add("-j", "--workers", type=above(0), help="processes that load images (picture files: 4, at most one a CPU)")


def data_kwargs(arguments: Any) -> dict[str, Any]:
    """Return what `create_loaders` takes beside the name and the folder of the data.

    Pictures are as a model of timm wants them, but for what was asked otherwise.

    Raises:
        DataError: There is no such data set.
    """
    from nni_plugin.adapters.data import is_in_memory
    from nni_plugin.adapters.models import picture_format

    asked = {name: arguments[name] for name in ("batch_size", "img_size", "in_chans", "num_classes")}
    asked["num_workers"] = arguments.workers
    of_format = {name: arguments[name] for name in ("mean", "std", "crop_pct", "interpolation")}
    asked |= {name: value for name, value in of_format.items() if value is not None}
    if is_in_memory(arguments.dataset):
        return asked
    wanted = picture_format(arguments.model, arguments.library, in_chans=arguments.in_chans)
    return asked | {name: value for name, value in wanted.items() if asked.get(name) is None}


def add_common(parser: jsonargparse.ArgumentParser, *, output_required: bool) -> None:
    """Add what every command has."""
    add = parser.add_argument
    add("--seed", type=above(0, LARGEST_SEED), default=0, help="of weights, data order and dropout")
    add("--device", type=device_name, help="cpu, cuda, cuda:1, ... (the best there is)")
    add("--output", type=Path, required=output_required, help="folder for the results")
