"""A grid of runs, each done once: one small JSON file a run, so that a killed benchmark goes on where it was.

A run is named by a path such as `table4/seed0/taylor-fo-A`. Its file appears complete or not at all; until then its
folder of state (checkpoints) stays. A file holds the settings that decided its outcome, and is refused under others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nni_plugin.errors import OutputError

STATE = ".state"
"""Folder, inside a grid's, of what unfinished runs need to go on."""


class Grid:
    """Runs by name, kept in a folder.

    Args:
        folder: Where the files go; made when the first run is done.
        settings: What decides the outcome of every run, as JSON values.
        say: Takes one line a run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, say: Callable[[str], None] = print) -> None:
        self.folder, self.say = Path(folder), say
        self.settings: dict[str, Any] = _as_json(dict(settings))

    def run(
        self, name: str, work: Callable[[Path], Mapping[str, Any]], settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the result of a run, of this call or of an earlier one.

        Args:
            name: Path of the run below the grid's folder, without ending.
            work: Does the run, given a folder for checkpoints that is there, with its content, when a killed run is
                started again; its result must be JSON values.
            settings: What decides the outcome of this run beside the grid's settings.

        Raises:
            OutputError: The file is damaged or of other settings, or cannot be written.
        """
        path, asked = self._path(name), {**self.settings, **_as_json(dict(settings or {}))}
        if path.exists():
            return _read(path, asked)
        self.say(f"{name}: running")
        state = self.folder / STATE / name
        try:
            state.mkdir(parents=True, exist_ok=True)
            result: dict[str, Any] = _as_json(dict(work(state)))
            _write(path, {"settings": asked, "result": result})
            shutil.rmtree(state)
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror or error}; choose another folder.") from error
        return result

    def done(self, name: str) -> bool:
        """Whether a run is done."""
        return self._path(name).exists()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def summary(values: Iterable[float], *, confidence: float = 0.95) -> dict[str, float | None]:
    """Describe a sample: `n`, `mean`, `sd` (of n - 1), and Student's t interval of the mean as `low` and `high`.

    What needs two values is None for one.

    Example:
        >>> {name: round(value, 3) for name, value in summary([90.0, 91.0, 92.0]).items()}
        {'n': 3, 'mean': 91.0, 'sd': 1.0, 'low': 88.516, 'high': 93.484}
    """
    from scipy import stats

    sample = [float(value) for value in values]
    n = len(sample)
    if n == 0:
        return {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    mean = sum(sample) / n
    if n == 1:
        return {"n": 1, "mean": mean, "sd": None, "low": None, "high": None}
    sd = (sum((value - mean) ** 2 for value in sample) / (n - 1)) ** 0.5
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * sd / n**0.5
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, float | None]:
    """Describe the differences `first - second` over the seeds that both have: what a seed shares cancels.

    Example:
        >>> paired({0: 91.0, 1: 93.0}, {0: 90.0, 1: 92.0, 2: 80.0})["mean"]
        1.0
    """
    return summary(value - second[seed] for seed, value in first.items() if seed in second)


def mean_and_sd(sample: Mapping[str, float | None], digits: int = 2) -> str:
    """Write a summary as `mean ± sd`, without the latter for a single value; a dash for none.

    Example:
        >>> mean_and_sd({"n": 3, "mean": 91.524, "sd": 0.11}), mean_and_sd({"n": 0, "mean": None, "sd": None})
        ('91.52 ± 0.11', '-')
    """
    mean, sd = sample["mean"], sample["sd"]
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def interval(sample: Mapping[str, float | None], digits: int = 2) -> str:
    """Write a summary's interval as `[low, high]`; a dash for none."""
    low, high = sample["low"], sample["high"]
    return "-" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def _as_json(value: Any) -> Any:
    """Return what comes back when a value is written and read."""
    return json.loads(json.dumps(value, allow_nan=False))


def _read(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        saved, result = content["settings"], content["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} cannot be read ({error}); delete it, and the run is done again.") from error
    other = sorted(name for name in {*saved, *asked} if saved.get(name) != asked.get(name))
    if other:
        raise OutputError(
            f"{path} was made with other settings: {other[0]} was {saved.get(other[0])!r}, is now "
            f"{asked.get(other[0])!r}. Use the same settings or another folder."
        )
    found: dict[str, Any] = result
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
