"""The output folder of a run: results appear in it complete or not at all, state stays for a resumed run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nni_plugin.errors import NNIPluginError, OutputError

STATE = ".state"
"""Folder, inside the output folder, of what a resumed run needs."""


class Workspace(NamedTuple):
    """Where a run writes: `state` while it goes on, `results` what is to appear at the end."""

    state: Path
    results: Path


@contextmanager
def workspace(output: Path, settings: Mapping[str, Any], *, resume: bool = False) -> Iterator[Workspace]:
    """Open an output folder for one run.

    When the block ends well the results are moved into `output` and the state is deleted. When it is interrupted
    (`KeyboardInterrupt`) the state stays. When it fails, what this run made is deleted, and the folder too if this
    run made it; files that were there before stay as they were.

    Args:
        output: The folder, made if it is not there.
        settings: JSON values that a resumed run must share.
        resume: Go on with the state that an interrupted run left; a new run clears it.

    Raises:
        OutputError: The folder cannot be written to, or its state is of a run with other settings.
    """
    state = output / STATE
    made = not output.exists()
    resuming = resume and (state / "settings.json").is_file()
    results: Path | None = None
    try:
        if resuming:
            _check_same(state / "settings.json", settings)
        elif state.exists():
            shutil.rmtree(state)
        state.mkdir(parents=True, exist_ok=True)
        if not resuming:
            (state / "settings.json").write_text(json.dumps(settings, indent=1))
        results = Path(tempfile.mkdtemp(dir=state, prefix="results-"))
        yield Workspace(state, results)
        for file in sorted(results.iterdir()):
            os.replace(file, output / file.name)
        shutil.rmtree(state)
    except (NNIPluginError, OSError) as error:
        if not resuming:
            shutil.rmtree(state, ignore_errors=True)
            if made and output.is_dir() and not any(output.iterdir()):
                output.rmdir()
        elif results is not None:
            shutil.rmtree(results, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"Cannot write to the output folder {str(output)!r}: {error}.") from error
        raise


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}); run again without --resume.") from error
    other = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
    if other:
        raise OutputError(
            f"The interrupted run had other settings: {other[0]} was {before.get(other[0])!r}, now "
            f"{settings.get(other[0])!r}. Give the same ones, or run again without --resume."
        )


def writable_folder(path: Path) -> Path:
    """Make a folder if it is not there and return it.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write to the output folder {str(path)!r}: {error}.") from error
    return path
