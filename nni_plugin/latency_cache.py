"""Times that were measured once, on disk: one JSON file a device, which several processes may share.

A file is replaced in one step, so whoever reads it finds a whole one; who adds to it holds a lock while reading,
merging and replacing, so that nothing is lost. What cannot be read or written costs time, not the result: it is said,
and layers are measured anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

SCHEMA_VERSION = 1

FOLDER_VARIABLE = "NNI_PLUGIN_CACHE"
"""Environment variable that names the folder; `~/.cache/nni_plugin` without it."""

_LOCK_SECONDS = 10.0


def cache_folder() -> Path:
    """Return the folder for what may be deleted at any time."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/nni_plugin").expanduser()


class LatencyCache:
    """The file of one device.

    Args:
        device: The name of its make, e.g. that of a GPU.
        folder: Where the file lies; None: :func:`cache_folder`.

    Attributes:
        path: The file; it need not be there.
    """

    def __init__(self, device: str, folder: Path | None = None) -> None:
        self.device = device
        # Two names may look alike without their punctuation: the digits at the end tell them apart.
        plain = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:60]
        digest = hashlib.sha256(device.encode()).hexdigest()[:8]
        self.path = (cache_folder() if folder is None else folder) / f"latency-{plain}-{digest}.json"

    def read(self) -> dict[str, float]:
        """Return milliseconds by what was measured; nothing where there is no file, or none that can be used."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            warnings.warn(f"Cannot read the measured latencies in {str(self.path)!r}: {error}.", stacklevel=2)
            return {}
        try:
            return _checked(json.loads(text), self.device)
        except ValueError as error:
            warnings.warn(
                f"{str(self.path)!r} holds no latencies ({error}); layers are measured anew, and it is replaced.",
                stacklevel=2,
            )
            return {}

    def add(self, times: Mapping[str, float]) -> dict[str, float]:
        """Add measurements to the file; returns all that it then holds.

        Args:
            times: Milliseconds by what was measured; an earlier measurement of the same goes.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=_LOCK_SECONDS):
                merged = {**self.read(), **times}
                _replace(self.path, {"schema": SCHEMA_VERSION, "device": self.device, "ms": merged})
                return merged
        except (OSError, Timeout) as error:
            warnings.warn(
                f"Cannot keep measured latencies in {str(self.path)!r} ({error}); they will be measured again. "
                f"{FOLDER_VARIABLE} names another folder.",
                stacklevel=2,
            )
            return dict(times)


def _checked(content: object, device: str) -> dict[str, float]:
    """Return the times in a file's content.

    Raises:
        ValueError: They are none, or another device's.
    """
    if not isinstance(content, dict) or content.get("schema") != SCHEMA_VERSION or content.get("device") != device:
        raise ValueError(f"expected schema {SCHEMA_VERSION} of {device!r}")
    times = content.get("ms")
    if not isinstance(times, dict):
        raise ValueError("expected an object of milliseconds")
    for key, ms in times.items():
        if isinstance(ms, bool) or not isinstance(ms, (int, float)) or not 0 <= ms < math.inf:
            raise ValueError(f"{key!r} takes {ms!r} ms")
    return {key: float(ms) for key, ms in times.items()}


def _replace(path: Path, content: object) -> None:
    """Write a file in one step, under a name of this process's own until it is whole."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=0, sort_keys=True)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
