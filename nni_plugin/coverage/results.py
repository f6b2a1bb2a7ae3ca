"""What came out for each model: rows, their CSV form, and how many of each outcome there are."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from nni_plugin.errors import OutputError

Status = Literal["ok", "refused", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)

LONGEST = 500
"""Characters of a reason; what is longer is cut."""


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        library: Where it comes from.
        model: Its name there.
        status: `"ok"`: all checks hold; `"refused"`: planning said why it cannot be done, naming the module;
            `"failed"`: anything else.
        reason: Of what is not ok, one line; for one that is, which groups had to stay whole, if any.
        macs_ratio: MACs of the pruned network over those of the dense one; None where it did not come to that.
        parity_max_rel: Largest difference of the outputs, masked and compact, over the largest output; likewise.
        seconds: CPU-seconds of its process; None where it died without telling.
    """

    library: str
    model: str
    status: Status
    reason: str
    macs_ratio: float | None
    parity_max_rel: float | None
    seconds: float | None


COLUMNS = tuple(field.name for field in fields(Row))
"""Of `coverage.csv`."""

_DIGITS = {"macs_ratio": ".6f", "parity_max_rel": ".3g", "seconds": ".2f"}


def one_line(text: object) -> str:
    """Return a text as one line of at most :data:`LONGEST` characters.

    Example:
        >>> one_line("shapes   differ ")
        'shapes differ'
    """
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 4]} ..."


def to_csv(rows: Iterable[Row], *, header: bool = True) -> str:
    """Return rows as text; what is not known is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if header:
        writer.writerow(COLUMNS)
    for row in rows:
        cells = asdict(row)
        cells |= {name: "" if cells[name] is None else f"{cells[name]:{form}}" for name, form in _DIGITS.items()}
        writer.writerow([cells[name] for name in COLUMNS])
    return text.getvalue()


def append(path: Path, row: Row) -> None:
    """Add a row to a file, at once and whole, as far as the machine can promise that."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(to_csv([row], header=new))


def read(path: Path) -> list[Row]:
    """Read the rows of a file to which a killed run may have been adding; none if there is no file.

    Raises:
        OutputError: It holds something else.
    """
    if not path.exists():
        return []
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]  # the last row may be half there
    if whole != content:
        path.write_text(whole, newline="", encoding="utf-8")
    rows = []
    try:
        for cells in csv.DictReader(io.StringIO(whole, newline=""), strict=True):
            if tuple(cells) != COLUMNS or cells["status"] not in STATUSES:
                raise ValueError(f"expected the columns {','.join(COLUMNS)}")
            values: dict[str, Any] = dict(cells)
            values |= {name: float(cells[name]) if cells[name] else None for name in _DIGITS}
            rows.append(Row(**values))
    except (ValueError, TypeError, csv.Error) as error:
        raise OutputError(f"{str(path)!r} is damaged ({error}): remove it, then --resume.") from error
    return rows


def counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Return how many models have each status, by library and, under `"all"`, together where there are several."""
    libraries = list(dict.fromkeys(row.library for row in rows))
    found = {name: [row for row in rows if row.library == name] for name in libraries}
    if len(libraries) > 1:
        found["all"] = list(rows)
    return {name: {kind: sum(row.status == kind for row in of) for kind in STATUSES} for name, of in found.items()}
