"""Weights from a file: safetensors or torch, read without running code, checked key by key."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from nni_plugin.errors import ModelError

# Where training scripts put the weights inside a checkpoint; averaged weights come first, as in timm.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
# What DistributedDataParallel and torch.compile put before every key.
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 3
# timm's train.py keeps its arguments beside the weights. Paths among them are read as pure ones, which every system
# has; Python 3.13 knows their classes under another name.
_OF_ARGUMENTS: list[Any] = [
    argparse.Namespace,
    *(
        (pure, f"{module}.{name}")
        for pure in (PurePosixPath, PureWindowsPath)
        for name in (pure.__name__, pure.__name__.removeprefix("Pure"))
        for module in ("pathlib", "pathlib._local")
    ),
]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a model's tensors from a checkpoint, on the CPU.

    Args:
        path: A `.safetensors` file, or a file of `torch.save`, which is unpickled with `weights_only`. It
            holds the state dict itself or has it under `state_dict_ema`, `model_ema`, `state_dict` or
            `model`, the first of these as in timm. Training arguments beside it, as timm's `train.py` keeps
            them, do no harm.

    Returns:
        The tensors by key, without the prefixes of DistributedDataParallel and `torch.compile`.

    Raises:
        ModelError: If the file is missing or damaged, needs code to be read, or holds something other than
            named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"Expected a checkpoint file, but {str(path)!r} is not a file; check the path.")
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals(_OF_ARGUMENTS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler raises whatever the damaged bytes lead it to.
        refused = re.search(r"\bGLOBAL (\S+)", str(error))
        if refused:
            raise ModelError(
                f"Checkpoint {str(path)!r} cannot be read without running code: it holds more than tensors and plain "
                f"values, namely {refused[1]}; save model.state_dict() alone, or as .safetensors."
            ) from error
        kind = "safetensors" if path.suffix == ".safetensors" else "torch (weights_only)"
        raise ModelError(
            f"Checkpoint {str(path)!r} cannot be read as a {kind} file; it is damaged or has "
            f"another format: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"Expected named tensors in checkpoint {str(path)!r}, got {type(content).__name__}.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"Expected only named tensors in checkpoint {str(path)!r}, got {type(value).__name__} "
                f"at {key!r}; save `model.state_dict()`."
            )
    return _without_prefixes(dict(content))


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a model after checking every key and shape.

    Args:
        model: Receives the tensors; untouched on error.
        state: Tensors by key.
        source: What to call the weights in an error, e.g. the file's name.

    Raises:
        ModelError: If keys are missing or unexpected, or shapes differ.
    """
    own = model.state_dict()
    shared = [key for key in own if key in state]
    shapes = {key: (tuple(own[key].shape), tuple(state[key].shape)) for key in shared}
    wrong = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    problems: list[str] = []
    if missing:
        problems.append(f"lacks {_listed(missing)}")
    if unexpected:
        problems.append(f"has the unknown {_listed(unexpected)}")
    if wrong:
        described = [f"{key} {list(got)} instead of {list(want)}" for key, (want, got) in wrong.items()]
        problems.append(f"has the wrong shape at {_listed(described)}")
    if problems:
        hint = "" if missing or unexpected else _class_hint(list(wrong.values())) or _pruned_hint(list(wrong.values()))
        raise ModelError(f"The weights of {source!r} do not fit: the file {'; it '.join(problems)}.{hint}")
    model.load_state_dict(state)


def _pruned_hint(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """What to do if every tensor that differs is narrower."""
    if any(len(want) != len(got) or any(a > b for a, b in zip(got, want, strict=False)) for want, got in pairs):
        return ""
    return (
        " The file seems to be of a pruned network: load its folder by nni_plugin.from_pretrained, and prune or train "
        "it further in Python."
    )


def _class_hint(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """What to do if the only difference is the classifier's number of outputs."""
    if any(len(want) != len(got) or want[1:] != got[1:] for want, got in pairs):
        return ""
    outputs = {(want[0], got[0]) for want, got in pairs if want}
    if len(outputs) != 1:
        return ""
    want, got = outputs.pop()
    return f" The file seems to be for {got} classes, the model has {want}: ask for num_classes={got}."


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in _PREFIXES:
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _first_line(error: BaseException) -> str:
    # torch puts advice, with colours, before what its unpickler found.
    reason = str(error).rpartition("WeightsUnpickler error: ")[2]
    return (reason.splitlines() or [""])[0]
