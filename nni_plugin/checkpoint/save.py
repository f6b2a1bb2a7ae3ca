"""Write a network, pruned or not, with what is needed to build it again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from nni_plugin.adapters.models import identity_of
from nni_plugin.checkpoint.config import SCHEMA_VERSION, InputShape, checked_input
from nni_plugin.checkpoint.files import CONFIG, WEIGHTS, refusing, write_files
from nni_plugin.checkpoint.rebuild import rebuild
from nni_plugin.checkpoint.tensors import check_fit, find_ties, is_channels_last, unsaved_buffers
from nni_plugin.errors import CheckpointError
from nni_plugin.plan import ModelIdentity, PruningPlan
from nni_plugin.sample_inputs import Sample, same_form
from nni_plugin.wrappers import unwrapped

_PACKAGES = ("nni-plugin", "torch", "timm", "torchvision", "safetensors")


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    identity: ModelIdentity | None = None,
    plan: PruningPlan | None = None,
    example_input_shape: InputShape | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network, pruned or not, to `config.json` and `model.safetensors`.

    Args:
        model: The network as it is now, left as it is; wrappers of DDP and `torch.compile` are looked through.
        directory: Folder to write to, made if missing. Other files in it stay.
        identity: How to build the dense network; None takes what the model knows. For a class of your own it is
            `"custom"` with the class's name, and loading needs a dense network as `model=`.
        plan: What was cut from the dense network; None takes `model.pruning_plan`.
        example_input_shape: Shape of one sample, without the batch, to trace the dense network with; None takes
            that of the inputs that the plan was applied with, or the library's usual one.
        extra: Further JSON values for the config, e.g. the accuracy.

    Returns:
        The folder.

    Raises:
        CheckpointError: Identity and plan do not give a network of these shapes, or the files cannot be written;
            what was in the folder before is still there.
    """
    network = unwrapped(model)
    plan = plan or getattr(network, "pruning_plan", None)
    identity = identity or identity_of(network) or ModelIdentity("custom", type(network).__name__)
    sample = _sample(network, identity, example_input_shape)
    if plan is not None and sample is None:
        raise CheckpointError(
            f"Expected the shape of one sample to trace {identity.name!r} with, got none; give example_input_shape."
        )
    state = network.state_dict()
    if identity.library != "custom":
        dense = rebuild(identity, plan, sample, len(state))
        check_fit(dense, state, f"identity {identity.library}/{identity.name} and the plan give another network")
    with refusing("The network cannot be written", "leave out what JSON or safetensors cannot hold"):
        ties = find_ties(state)
        # Clones: safetensors refuses views that share memory.
        own = {name: tensor.cpu().contiguous().clone() for name, tensor in state.items() if name not in ties}
        weights = safetensors.torch.save(own)
        config = {
            "schema_version": SCHEMA_VERSION,
            "model": identity.to_dict(),
            "input_shape": None if sample is None else sample.shape,
            "input_dtype": None if sample is None else sample.dtype,
            "ties": ties,
            "channels_last": [name for name, tensor in own.items() if is_channels_last(state[name])],
            "buffer_dtypes": {n: str(b.dtype).removeprefix("torch.") for n, b in unsaved_buffers(network).items()},
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "extra": dict(extra or {}),
            "plan": None if plan is None else json.loads(plan.to_json()),
            "sha256": hashlib.sha256(weights).hexdigest(),
            "bytes": len(weights),
        }
        text = json.dumps(config, indent=1, allow_nan=False).encode()
    write_files(Path(directory), {WEIGHTS: weights, CONFIG: text})
    return Path(directory)


def _sample(model: nn.Module, identity: ModelIdentity, shape: InputShape | None) -> Sample | None:
    """Return the form of one sample: as asked for, as the plan was applied with, or as the library has it."""
    applied: Sample | None = getattr(model, "pruning_inputs", None)
    if shape is None:
        usual = _usual_input(model, identity)
        return applied or (None if usual is None else Sample(checked_input(usual), None))
    asked = checked_input(shape)
    return Sample(asked, applied.dtype if applied is not None and same_form(asked, applied.shape) else None)


def _usual_input(model: nn.Module, identity: ModelIdentity) -> list[int] | None:
    """Return the library's usual shape of one image, with the size and channels that the arguments ask for."""
    usual = {"torchvision": (3, 224, 224), "nni_plugin": (3, 32, 32)}.get(identity.library)
    config = getattr(model, "pretrained_cfg", None)
    if identity.library == "timm" and isinstance(config, Mapping):
        usual = config.get("input_size")
    if usual is None:
        return None
    size = identity.kwargs.get("img_size") or identity.kwargs.get("image_size") or list(usual[1:])
    height, width = size if isinstance(size, list) else (size, size)
    return [identity.kwargs.get("in_chans") or usual[0], height, width]
