"""Load a saved network: config first, then the tensors, then the network they must fit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from nni_plugin.checkpoint.config import SavedConfig, read_config
from nni_plugin.checkpoint.files import CONFIG, WEIGHTS, read_file, refusing
from nni_plugin.checkpoint.rebuild import rebuild
from nni_plugin.checkpoint.tensors import check_fit, fill
from nni_plugin.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # what safetensors itself takes


def from_pretrained(
    directory: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Load a network saved by :func:`save_pretrained`; needs no data, downloads nothing, runs no code of the folder.

    Args:
        directory: The folder.
        model: A freshly built dense network of the saved class, needed where the identity is `"custom"`; copied,
            not changed.
        device: Where the network goes.

    Returns:
        The network in eval mode, with its dtypes, giving the same logits bit by bit; a pruned one has its plan as
        `pruning_plan`.

    Raises:
        CheckpointError: Something in the folder is missing, damaged, hostile or for another model.
    """
    folder = Path(directory)
    config = read_config(folder)
    if config.identity.library == "custom" and model is None:
        raise CheckpointError(
            f"Expected a dense network of the class {config.identity.name!r}, which only you can build, got none; "
            "pass it as from_pretrained(..., model=...)."
        )
    tensors = _read_tensors(folder, config)
    network = rebuild(config.identity, config.plan, config.sample, len(tensors), model)
    check_fit(network, tensors, f"{WEIGHTS} in {str(folder)!r} is another network's")
    # Tensors of inference mode could never be trained.
    with torch.inference_mode(False):
        with refusing(f"{CONFIG} in {str(folder)!r} is damaged", "fetch it or save the network again"):
            fill(network, tensors, config.buffer_dtypes)
        with refusing(f"The network cannot go to device {device!r}", "choose another device"):
            return network.to(device).eval()


def input_shape_of(directory: str | Path) -> tuple[int, ...]:
    """Return the shape of one sample of a saved network, without the batch, e.g. `(3, 32, 32)`.

    Raises:
        CheckpointError: The folder is missing or damaged, or the network has no input shape or several.
    """
    sample = read_config(Path(directory)).sample
    shape = None if sample is None else sample.shape
    if not isinstance(shape, list) or any(isinstance(size, list) for size in shape):
        raise CheckpointError(
            f"Expected one input shape in {str(directory)!r}, got {shape}; save the network with example_input_shape."
        )
    return tuple(shape)


def _read_tensors(folder: Path, config: SavedConfig) -> dict[str, Tensor]:
    """Return the tensors of the folder, tied ones under all their names, in their memory formats."""
    where = repr(str(folder / WEIGHTS))
    content = read_file(folder, WEIGHTS, config.size)
    # The first eight bytes are the header's length; those of a pickle or a zip would be a giant one.
    if len(content) >= 8 and int.from_bytes(content[:8], "little") > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"Expected safetensors in {where}, got other bytes, perhaps a pickle or a zip of torch.save; it is not "
            "opened: save the network again with save_pretrained."
        )
    if len(content) != config.size:
        raise CheckpointError(
            f"Expected {config.size} bytes in {where}, got {len(content)}; it is truncated, fetch it again."
        )
    if hashlib.sha256(content).hexdigest() != config.sha256:
        raise CheckpointError(
            f"Expected SHA-256 {config.sha256} of {where}, got another; it is damaged or not the one of its {CONFIG}: "
            "fetch it or save the network again."
        )
    with refusing(f"{where} cannot be read", "fetch it or save the network again"), torch.inference_mode(False):
        stored: dict[str, Tensor] = safetensors.torch.load(content)
        for name in config.channels_last:
            stored[name] = stored[name].clone(memory_format=torch.channels_last)
        return stored | {name: stored[root] for name, root in config.ties.items()}
