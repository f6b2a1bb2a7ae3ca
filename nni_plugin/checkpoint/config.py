"""`config.json`, read and checked: how to build the dense network, what to cut, what the tensors alone do not say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from nni_plugin.checkpoint.files import CONFIG, read_file, refusing
from nni_plugin.errors import CheckpointError
from nni_plugin.plan import ModelIdentity, PruningPlan
from nni_plugin.sample_inputs import Sample

SCHEMA_VERSION = 1
MAX_CONFIG_BYTES = 50_000_000
MAX_ELEMENTS = 2**24  # of one sample
_FORM = {"model": dict, "sha256": str, "bytes": int, "ties": dict, "channels_last": list, "buffer_dtypes": dict}

InputShape = Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Sequence[int]]
"""Shape of one sample, e.g. `(3, 32, 32)`; a list of shapes for several inputs, a dict for keyword inputs."""


@dataclass(frozen=True)
class SavedConfig:
    """What a `config.json` says.

    Args:
        identity: How to build the dense network.
        plan: What to cut from it.
        sample: Form of one sample.
        sha256: Hash of `model.safetensors`.
        size: Its length in bytes.
        ties: Names of tensors that are not stored, with the stored one that each is.
        channels_last: Names of the tensors in that memory format.
        buffer_dtypes: Dtypes of the buffers that are rebuilt, not stored.
    """

    identity: ModelIdentity
    plan: PruningPlan | None
    sample: Sample | None
    sha256: str
    size: int
    ties: Mapping[str, str]
    channels_last: Sequence[str]
    buffer_dtypes: Mapping[str, str]


def read_config(folder: Path) -> SavedConfig:
    """Read the config of a folder.

    Raises:
        CheckpointError: It is missing, too big, not JSON, of another schema version or damaged.
    """
    where = repr(str(folder / CONFIG))
    content = read_file(folder, CONFIG, MAX_CONFIG_BYTES)
    with refusing(f"{where} is not JSON", "fetch it or save the network again"):
        config = json.loads(content.decode("utf-8"))
    with refusing(f"{where} is damaged", "fetch it or save the network again"):
        version = config.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"Expected schema_version {SCHEMA_VERSION} in {where}, got {short(version)}; load it with the version "
                "of nni-plugin that wrote it."
            )
        for key, kind in _FORM.items():
            if type(config.get(key)) is not kind:
                raise CheckpointError(
                    f"Expected {key!r} as {kind.__name__} in {where}, got {short(config.get(key))}; save it again."
                )
        plan, shape, dtype = config.get("plan"), config.get("input_shape"), config.get("input_dtype")
        return SavedConfig(
            ModelIdentity(**config["model"]),
            None if plan is None else PruningPlan.from_json(json.dumps(plan)),
            None if shape is None else Sample(checked_input(shape), _checked_dtype(dtype)),
            config["sha256"],
            config["bytes"],
            config["ties"],
            config["channels_last"],
            config["buffer_dtypes"],
        )


def _checked_dtype(value: Any) -> Any:
    """Return the dtype of one sample's tensors, `None` for floats, in the form of its shape."""
    if isinstance(value, Mapping):
        return {name: _checked_dtype(dtype) for name, dtype in value.items()}
    if isinstance(value, list):
        return [_checked_dtype(dtype) for dtype in value]
    if value is None or (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)):
        return value
    raise CheckpointError(f"Expected a dtype of inputs, such as 'int64', got {short(value)}; save the network again.")


def checked_input(value: Any) -> Any:
    """Return the shape of one sample, a list of them or a dict of them, as lists of integers.

    Raises:
        CheckpointError: It is none of these, or too big.
    """
    if isinstance(value, Mapping):
        return {name: checked_input(shape) if shape else [] for name, shape in value.items()}
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(shape, (list, tuple)) for shape in value):
            return [checked_input(shape) if shape else [] for shape in value]  # a number a sample has no shape
        if all(type(n) is int and n > 0 for n in value) and math.prod(value) <= MAX_ELEMENTS:
            return list(value)
    raise CheckpointError(
        f"Expected an input shape of positive integers with at most {MAX_ELEMENTS} elements, e.g. [3, 32, 32], got "
        f"{short(value)}; give the shape of one sample."
    )
