"""Checkpoints of a training run: one file, replaced in one step, readable without running code from it."""

import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nni_plugin.errors import TrainingError

_FORMAT = 1
_PLAIN = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)
_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def checkpoint_path(directory: Path, phase: str) -> Path:
    """Return where `fit` keeps the checkpoint of a phase.

    Args:
        directory: Folder of checkpoints, as given to `fit`.
        phase: Name of the phase, as given to `fit`; each phase has its own file.
    """
    return Path(directory) / f"{phase}.pt"


def rng_state() -> dict[str, Any]:
    """Return the state of the random generators of Python, NumPy and torch (CPU and current GPU)."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the random generators back to what `rng_state` returned."""
    random.setstate(state["python"])
    saved = state["numpy"]
    key = saved["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, saved["pos"], saved["has_gauss"], saved["gauss"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def on_cpu(value: Any) -> Any:
    """Return what a callback has saved with its tensors on the CPU, so that another process can take it."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(on_cpu, value))
    return value


def write_checkpoint(path: Path, settings: dict[str, Any], content: dict[str, Any]) -> None:
    """Write a checkpoint; `path` holds the old one or the new one at every moment, never a part of either.

    Args:
        path: File to write; its folder is made when missing.
        settings: JSON-serialisable settings that a run must share to go on from here.
        content: Tensors, numbers, strings, and lists, tuples or dicts of them.

    Raises:
        TrainingError: The content holds another type, or the file cannot be written; the old one stands.
    """
    _check_plain(content, "checkpoint")
    buffer = io.BytesIO()
    described = json.dumps(settings, sort_keys=True)
    torch.save({"format": _FORMAT, "settings": described, "content": content}, buffer)
    partial = path.with_name(path.name + ".tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise TrainingError(
            f"cannot write checkpoint {path}: {error.strerror or error}; free space there or choose another folder"
        ) from error


def read_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the content of a checkpoint back, tensors on the CPU.

    Args:
        path: File that `write_checkpoint` wrote.
        settings: Settings of the run that wants to go on from it.

    Returns:
        What was passed as `content`.

    Raises:
        TrainingError: The file is damaged, or was written with other settings.
    """
    try:
        # torch does not check the checksums it stores.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        stored = torch.load(path, map_location="cpu", weights_only=True)
        version, saved, content = stored["format"], json.loads(stored["settings"]), stored["content"]
    except _DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"checkpoint {path} is damaged ({reason}): remove it, and --resume does that part again"
        ) from error
    if version != _FORMAT:
        raise TrainingError(f"checkpoint {path} has format {version}, expected {_FORMAT}; train again from the start")
    difference = _first_difference(saved, json.loads(json.dumps(settings)))
    if difference is not None:
        name, old, new = difference
        raise TrainingError(
            f"checkpoint {path} belongs to another run: {name} was {_short(old)}, is now {_short(new)}; "
            "use the same settings, or another folder"
        )
    loaded: dict[str, Any] = content
    return loaded


def _check_plain(value: Any, where: str) -> None:
    """Raise unless `value` can be read back without running code from the file."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"{where}, a key")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in _PLAIN and not isinstance(value, torch.Tensor):
        raise TrainingError(
            f"{where}: expected tensors, numbers, strings, lists, tuples or dicts, "
            f"got {type(value).__name__}; convert it in state_dict"
        )


def _first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return the dotted name and both values of the first entry that differs, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            found = _first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    return None if old == new else (name, old, new)


def _short(value: Any) -> str:
    """Return a value in at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
