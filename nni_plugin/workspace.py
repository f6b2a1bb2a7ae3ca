"""The output folder of a run: results appear in it complete or not at all, state stays for a resumed run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from nni_plugin.errors import OutputError

STATE = ".state"
"""Folder, inside the output folder, of what a resumed run needs."""

_SETTINGS = "settings.json"
_LAST = "finetune"
"""The training that comes last: nothing but its own checkpoint, of this name, depends on its settings."""


class Workspace(NamedTuple):
    """Where a run writes: `state` while it goes on, `results` what is to appear at the end."""

    state: Path
    results: Path


@contextmanager
def workspace(output: Path, settings: Mapping[str, Any], *, resume: bool = False) -> Iterator[Workspace]:
    """Open an output folder for one run.

    When the block ends well the results are moved into `output`, all or none, and the state is deleted. When it is
    interrupted (`KeyboardInterrupt`) the state stays. When it fails, the results are deleted, and what it has saved
    stays, for the user to mend the cause and go on; a run that has saved nothing yet leaves nothing, and the folder is
    deleted too if this run made it. Files that were there before stay as they were.

    Args:
        output: The folder, made if it is not there.
        settings: JSON values that a resumed run must share; those of `finetune` only once that training has a
            checkpoint.
        resume: Go on with what an interrupted or failed run has saved, if there is anything.

    Raises:
        OutputError: The folder cannot be written to, holds what another run has saved and `resume` is not given, or
            that is of a run with other settings.
    """
    state = output / STATE
    made = [folder for folder in (output, *output.parents) if not os.path.lexists(folder)]
    results: Path | None = None
    try:
        if not holds_checkpoints(output):
            if state.exists():
                shutil.rmtree(state)
        elif resume:
            _check_same(state, settings)
        else:
            raise OutputError(
                f"{str(output)!r} holds what an interrupted run has saved. Give --resume to go on with it, choose "
                f"another --output, or remove {str(state)!r} to start anew."
            )
        state.mkdir(parents=True, exist_ok=True)
        write_file(state / _SETTINGS, json.dumps(settings, indent=1))
        results = Path(tempfile.mkdtemp(dir=state, prefix="results-"))
        yield Workspace(state, results)
        _move_all(results, output)
        _delete(state)
    except Exception as error:
        saved = True
        with suppress(OSError):  # what cannot be read is not deleted either
            saved = holds_checkpoints(output)
        if not saved:
            shutil.rmtree(state, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # somebody else has put something there, or it was never made
                    folder.rmdir()
        elif results is not None:
            shutil.rmtree(results, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(output, error) from error
        raise


def holds_checkpoints(output: Path) -> bool:
    """Tell whether a run in this folder was interrupted, or has failed, after it had saved something to go on from."""
    state = output / STATE
    if not state.is_dir():
        return False
    return any(path.is_file() and path.name != _SETTINGS and path.suffix != ".tmp" for path in state.iterdir())


def is_finished(output: Path, record: str, settings: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Look what there is for a run that is to be resumed; say so where it is no interrupted run.

    Args:
        output: The folder.
        record: Name of the JSON file that a finished run leaves in it, with its settings under `"settings"`.
        settings: Those of the run that is to be resumed.
        say: Takes the line.

    Returns:
        Whether the run is finished, so that nothing is left to do.

    Raises:
        OutputError: It is finished, and had other settings.
    """
    if holds_checkpoints(output):
        return False
    path = output / record
    if not path.is_file():
        say(f"{output} holds no interrupted run: there is nothing to resume, this one starts from the beginning.")
        return False
    try:
        kept = json.loads(path.read_text())
        others = other_settings(kept["settings"], settings) if "settings" in kept else []
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{str(path)!r} is damaged ({error}): remove {str(output)!r}, or give another --output."
        ) from error
    if others:
        raise OutputError(
            f"The finished run in {str(output)!r} had other settings: {others[0].said}. Choose another --output, or "
            "leave --resume out to run again and replace it."
        )
    say(f"{output} holds a finished run: there is nothing to resume.")
    return True


def _delete(state: Path) -> None:
    """Delete a state, its settings last: of what is left when this is killed, it is still known whose it is."""
    for path in state.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _SETTINGS:
            path.unlink()
    shutil.rmtree(state)


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


class OtherSetting(NamedTuple):
    """A setting that two runs do not share: its dotted name, and both values in the words of the command line."""

    name: str
    said: str


def _check_same(state: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than those that what is there was made with.

    Raises:
        OutputError: They are others, or are not to be read.
    """
    try:
        others = other_settings(json.loads((state / _SETTINGS).read_text()), settings)
    except (ValueError, FileNotFoundError) as error:
        raise OutputError(
            f"{str(state / _SETTINGS)!r} is damaged ({error}), so nobody knows what to go on with: remove "
            f"{str(state)!r} to start anew, or choose another --output."
        ) from error
    last = state / f"{_LAST}.pt"
    others = [other for other in others if last.exists() or not other.name.startswith(f"{_LAST}.")]
    if others:
        hint = f", or remove {str(last)!r} to do that training again" if others[0].name.startswith(f"{_LAST}.") else ""
        raise OutputError(
            f"The interrupted run in {str(state.parent)!r} had other settings: {others[0].said}. Give the same ones "
            f"with --resume{hint}, or choose another --output."
        )


def other_settings(before: Any, now: Mapping[str, Any]) -> list[OtherSetting]:
    """Return the settings in which two runs differ, by name.

    Args:
        before: As read from a JSON file.
        now: JSON values.

    Raises:
        ValueError: `before` holds no settings.
    """
    was, given = _flat(before), _flat(json.loads(json.dumps(now)))
    names = sorted(name for name in {*was, *given} if was.get(name) != given.get(name))
    return [OtherSetting(name, f"{_flag(name)} was {was.get(name)!r}, now {given.get(name)!r}") for name in names]


def _flag(name: str) -> str:
    """Return what the command line calls a setting.

    Example:
        >>> _flag("finetune.weight_decay"), _flag("pretrain.lr"), _flag("model_kwargs.drop_rate"), _flag("budget")
        ('--weight-decay', '--pretrain-lr', "--model-kwargs 'drop_rate'", 'the budget')
    """
    section, _, last = name.rpartition(".")
    if name == "budget":
        return "the budget"
    if section in ("model_kwargs", "search_kwargs", "stages"):
        return f"--{section.replace('_', '-')} {last!r}"
    if section == "pretrain" and last in ("epochs", "lr"):
        last = f"pretrain_{last}"
    last = {"num_workers": "workers", "reestimate": "bn_reestimate"}.get(last, last)
    return f"--{last.replace('_', '-')}"


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
