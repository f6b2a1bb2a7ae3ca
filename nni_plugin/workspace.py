"""The output folder of a run: results appear in it complete or not at all, state stays for a resumed run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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

    When the block ends well the results are moved into `output`, all or none, and the state is deleted. When it is
    interrupted (`KeyboardInterrupt`) the state stays. When it fails, what this run made is deleted, and the folder
    too if this run made it; files that were there before stay as they were. A resumed run that fails keeps the
    state that it found, and so does one that ends in an error that is not the user's once it has saved something.

    Args:
        output: The folder, made if it is not there.
        settings: JSON values that a resumed run must share.
        resume: Go on with the state that an interrupted run left; a new run clears it.

    Raises:
        OutputError: The folder cannot be written to, or its state is of a run with other settings.
    """
    state = output / STATE
    made = [folder for folder in (output, *output.parents) if not os.path.lexists(folder)]
    resuming = resume and (state / "settings.json").is_file()
    results: Path | None = None
    try:
        if resuming:
            _check_same(state / "settings.json", settings)
        elif state.exists():
            shutil.rmtree(state)
        state.mkdir(parents=True, exist_ok=True)
        if not resuming:
            # In one step: a run killed in the middle of it must not leave a damaged file to the next one.
            (state / "settings.tmp").write_text(json.dumps(settings, indent=1))
            os.replace(state / "settings.tmp", state / "settings.json")
        results = Path(tempfile.mkdtemp(dir=state, prefix="results-"))
        yield Workspace(state, results)
        _move_all(results, output)
        shutil.rmtree(state)
    except Exception as error:
        expected = isinstance(error, (NNIPluginError, OSError))
        if not resuming and (expected or not _has_content(state)):
            shutil.rmtree(state, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # somebody else has put something there, or it was never made
                    folder.rmdir()
        elif results is not None:
            shutil.rmtree(results, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(output, error) from error
        raise


def _has_content(state: Path) -> bool:
    """Tell whether the run has saved something that it could go on from."""
    own = {"settings.json", "settings.tmp"}
    return any(path.is_file() and path.name not in own for path in state.iterdir()) if state.is_dir() else False


def _move_all(results: Path, output: Path) -> None:
    """Move every file of a folder into another; on any failure the files that were there before are back."""
    old = Path(tempfile.mkdtemp(dir=results.parent, prefix="old-"))
    undo: list[tuple[Path, Path]] = []
    try:
        for file in sorted(results.iterdir()):
            target = output / file.name
            if target.is_dir() and not target.is_symlink():
                raise IsADirectoryError(f"{str(target)!r} is a folder, and a file of that name is to be written")
            if os.path.lexists(target):
                os.replace(target, old / file.name)
                undo.append((old / file.name, target))
            os.replace(file, target)
            undo.append((target, file))
    except BaseException:
        for now, before in reversed(undo):
            with suppress(OSError):  # put back as many as possible
                os.replace(now, before)
        raise


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = _flat(json.loads(path.read_text()))
    except ValueError as error:
        raise OutputError(f"{str(path)!r} is damaged ({error}); run again without --resume.") from error
    now = _flat(json.loads(json.dumps(settings)))
    other = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if other:
        raise OutputError(
            f"The interrupted run in {str(path.parent.parent)!r} had other settings: {other[0]} was "
            f"{before.get(other[0])!r}, now {now.get(other[0])!r}. Give the same ones, or run again without --resume."
        )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names.

    Raises:
        ValueError: They are not settings.
    """
    if not isinstance(settings, dict):
        raise ValueError("no settings in it")
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _cannot_write(output: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Cannot write to the output folder {str(output)!r}: {error}. Make room there, or choose another --output."
    )


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make a folder for a file or two, written in the block; on a failure, folders that were made are gone again.

    Raises:
        OutputError: It cannot be made or written to.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except BaseException as error:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def write_file(path: Path, text: str) -> None:
    """Write a file in one step; on a failure the one that was there before stays."""
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.write_text(text, newline="")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
