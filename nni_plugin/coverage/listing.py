"""Which models to try: read from a list, or all that a library has."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nni_plugin.adapters.libraries import model_names
from nni_plugin.errors import ModelError

COLUMNS = ("library", "model")
"""What a list must have; further columns are notes."""


@dataclass(frozen=True)
class Case:
    """A model to try.

    Args:
        library: `"timm"`, `"torchvision"` or `"nni_plugin"`.
        model: Its name there.
        notes: What the list says of it beside, by column.
    """

    library: str
    model: str
    notes: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    def __str__(self) -> str:
        """Return e.g. `timm resnet18`."""
        return f"{self.library} {self.model}"


def read_list(path: Path) -> list[Case]:
    """Read a list of models, CSV with the columns `library` and `model`, in its order.

    Raises:
        ModelError: It cannot be read, lacks a column, names no model, or names one twice.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", restkey="")
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            rows = [] if missing else list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"The list of models {str(path)!r} cannot be read: {reason}.") from error
    if missing:
        raise ModelError(
            f"The list of models {str(path)!r} has no column {missing[0]!r}: the first line must be library,model "
            "(further columns may follow)."
        )
    cases: dict[tuple[str, str], Case] = {}
    for line, row in enumerate(rows, start=2):
        notes = {name: text for name, text in row.items() if name and name not in COLUMNS}
        case = Case(row["library"].strip(), row["model"].strip(), notes)
        if not case.library or not case.model:
            raise ModelError(f"Row {line} of {str(path)!r} lacks a library or a model; give both, or leave it out.")
        if (case.library, case.model) in cases:
            raise ModelError(f"Row {line} of {str(path)!r} names {case} for the second time; leave one out.")
        cases[case.library, case.model] = case
    if not cases:
        raise ModelError(f"The list of models {str(path)!r} names no model.")
    return list(cases.values())


def whole_library(library: str) -> list[Case]:
    """Return every architecture that a library has.

    Raises:
        ModelError: There is no such library.
    """
    return [Case(library, name) for name in model_names(library)]
