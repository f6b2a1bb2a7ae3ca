"""Search spaces in NNI's form, whose parameters are settings of a pruning job: read, checked, tried at their ends."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nni_plugin.errors import ExperimentError

SHIPPED = Path(__file__).parent / "templates" / "search_space.json"
"""A search space for any model: method, schedule, length and learning rate of fine-tuning."""

SHIPPED_STAGES = SHIPPED.with_name("search_space_stages.json")
"""One for ResNets of three stages: also how much goes of each stage."""


def read_search_space(path: Path) -> dict[str, Any]:
    """Read a search space.

    Raises:
        ExperimentError: It cannot be read, or is not what NNI takes.
    """
    try:
        space = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"search_space: cannot read {str(path)!r}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ExperimentError(f"search_space: {str(path)!r} is not JSON: {error}.") from error
    if not isinstance(space, dict) or not space:
        raise ExperimentError(
            f"search_space: {str(path)!r}: expected an object with a parameter or more, such as "
            f'{{"method": {{"_type": "choice", "_value": ["taylor-fo", "obs"]}}}}.'
        )
    for name, spec in space.items():
        _check(name, spec)
    return space


def check_names(space: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that every parameter is a setting that a trial can vary (`stages.NAME` for a stage).

    Raises:
        ExperimentError: One is not; the text has the closest names.
    """
    for name in space:
        plain = plain_name(name)
        if plain not in known or (plain == "stages" and "." not in name):
            close = difflib.get_close_matches(plain, known, n=3, cutoff=0.5) or sorted(known)
            close = ["stages.NAME, as in stages.layer1" if word == "stages" else word for word in close]
            raise ExperimentError(
                f"search_space: a trial of `prune` has no parameter {name!r} to vary; "
                f"did you mean {', '.join(close)}? Further ones need a trial script of your own (trial_command)."
            )


def plain_name(name: str) -> str:
    """Return the setting behind a parameter.

    Example:
        >>> plain_name("round-to"), plain_name("stages.layer1")
        ('round_to', 'stages')
    """
    return name.partition(".")[0].removeprefix("--").replace("-", "_")


def with_parameters(settings: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with a trial's parameters put in, which go before.

    Example:
        >>> with_parameters({"macs": 0.5, "lr": 0.1}, {"lr": 0.01, "stages.layer1": 0.75})
        {'macs': 0.5, 'lr': 0.01, 'stages': {'layer1': 0.75}}
    """
    merged = dict(settings)
    for name, value in parameters.items():
        plain, _, part = name.partition(".")
        if part:
            merged[plain_name(plain)] = {**merged.get(plain_name(plain), {}), part: value}
        else:
            merged[plain_name(plain)] = value
    return merged


def values_to_try(spec: Mapping[str, Any]) -> list[Any]:
    """Return the values of a parameter that say whether all of them can be taken: all choices, or both ends.

    Example:
        >>> values_to_try({"_type": "randint", "_value": [1, 4]})
        [1, 3]
    """
    kind, value = spec["_type"], spec["_value"]
    if kind == "choice":
        return list(value)
    if kind == "randint":
        return [value[0], value[1] - 1]
    if "normal" in kind:  # without ends: only its middle is sure to be asked for
        return []
    return [float(value[0]), float(value[1])]


def _check(name: str, spec: Any) -> None:
    """Check what NNI's tuners would otherwise stumble over once they run."""
    kinds = ("choice", "randint", *(q + log + "uniform" for q in ("", "q") for log in ("", "log")))
    kinds += tuple(q + log + "normal" for q in ("", "q") for log in ("", "log"))
    if not isinstance(spec, dict) or spec.get("_type") not in kinds or not isinstance(spec.get("_value"), list):
        raise ExperimentError(
            f"search_space: {name!r}: expected an object with _type, one of {', '.join(kinds)}, and _value, a list, "
            f"got {spec!r}."
        )
    kind, value = spec["_type"], spec["_value"]
    if kind == "choice":
        if not value or not all(isinstance(item, (bool, int, float, str)) for item in value):
            raise ExperimentError(
                f"search_space: {name!r}: _value of choice is a list of one number, text or boolean at least, "
                f"got {value!r}; nested choices are not for `prune`."
            )
        return
    wanted = 3 if kind.startswith("q") else 2
    whole = kind == "randint"
    numbers = [item for item in value if isinstance(item, int if whole else (int, float))]
    numbers = [item for item in numbers if not isinstance(item, bool) and math.isfinite(item)]
    words = f"_value of {kind} is {wanted} {'integers' if whole else 'numbers'}"
    if len(value) != wanted or len(numbers) != wanted or (wanted == 3 and value[2] <= 0):
        raise ExperimentError(
            f"search_space: {name!r}: {words}{', the last above 0' if wanted == 3 else ''}, got {value!r}."
        )
    if "normal" in kind:
        if value[1] <= 0:
            raise ExperimentError(f"search_space: {name!r}: {words}, the second above 0, got {value!r}.")
    elif value[0] >= value[1] or ("log" in kind and value[0] <= 0):
        raise ExperimentError(
            f"search_space: {name!r}: {words}, {'above 0 and ' if 'log' in kind else ''}ascending, got {value!r}."
        )
