"""Results that new numbers are put onto, for benchmarks whose runs of other days are no longer in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path | None) -> dict[str, Any] | None:
    """Return an earlier result as its JSON file has it; None for no path."""
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path else None
    return found


def calls(earlier: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return command and machine of every call that an earlier result came from, the first one first."""
    if earlier is None:
        return []
    return [*earlier.get("earlier", []), {name: earlier[name] for name in ("command", "machine")}]


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of a page on the calls that its result was put onto; none where there are none."""
    commands = [f"`{call['command']}`" for call in result.get("earlier", [])]
    return ["", f"Put onto what earlier calls gave: {'; '.join(commands)}."] if commands else []
