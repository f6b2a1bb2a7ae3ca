"""The two files of a folder: written all or none, and read only where they lie in the folder itself.

Whatever damaged content leads a library to raise becomes one line of CheckpointError by :func:`refusing`.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from nni_plugin.errors import CheckpointError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@contextlib.contextmanager
def refusing(what: str, todo: str) -> Iterator[None]:
    """Turn every error of the block into a CheckpointError that says what failed, why, and what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} ({_line(error)}); {todo}.") from error


def write_files(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files beside their places, then move them in together.

    Raises:
        CheckpointError: They could not be written. The folder is as it was before, or gone where it was new; if
            old files could not be put back, the error says where they are.
    """
    old = None
    try:
        with contextlib.ExitStack() as undo:  # undoes the latest step first, after an interrupt too
            for path in [path for path in (directory, *directory.parents) if not path.exists()][::-1]:
                path.mkdir()
                undo.callback(path.rmdir)
            temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
            old = temporary / "old"
            undo.callback(_clear, temporary, old)
            old.mkdir()
            for name, content in contents.items():
                with open(temporary / name, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())  # some file systems notice only now that the disk is full
            for name in contents:
                target = directory / name
                if target.is_dir():
                    raise IsADirectoryError(f"{name} is a folder there")
                if os.path.lexists(target):
                    os.replace(target, old / name)
                    undo.callback(os.replace, old / name, target)
                os.replace(temporary / name, target)
                undo.callback(target.unlink)
            undo.pop_all()
    except (OSError, ValueError) as error:
        lost = old is not None and old.exists()
        state = f"nor could the old files be put back, they are in {str(old)!r}" if lost else "the folder is as it was"
        raise CheckpointError(
            f"The network could not be written to {str(directory)!r} ({_line(error)}); {state}; free some space or "
            "choose another folder."
        ) from error
    shutil.rmtree(temporary, ignore_errors=True)


def _line(error: Exception) -> str:
    """Return kind and text of an error as one line of at most about 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _clear(temporary: Path, old: Path) -> None:
    """Remove what was written, unless an old file could not be put back and lies there still."""
    if not old.exists() or not any(old.iterdir()):
        shutil.rmtree(temporary, ignore_errors=True)


def read_file(folder: Path, name: str, at_most: int) -> bytes:
    """Return the content of a regular file that lies in the folder, not behind a link that leads out of it.

    Raises:
        CheckpointError: There is no such file, it has more than `at_most` bytes, or it cannot be read.
    """
    path = folder / name
    with refusing(f"{str(path)!r} cannot be read", "check path and permissions"):
        if not path.is_file():
            got = "a folder without it" if folder.is_dir() else "a file" if folder.exists() else "nothing"
            raise CheckpointError(
                f"Expected a folder with {name} at {str(folder)!r}, got {got}; check the path or save it again."
            )
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"Expected {name} inside {str(folder)!r}, got a link that leads out of it; copy the file itself there."
            )
        if path.stat().st_size > at_most:
            raise CheckpointError(
                f"Expected at most {at_most} bytes in {str(path)!r}, got more; fetch it or save the network again."
            )
        return path.read_bytes()
