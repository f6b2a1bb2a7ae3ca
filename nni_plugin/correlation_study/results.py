"""What a comparison with the Oracle found: one row a criterion, the Oracle itself, and the files they go into.

A coefficient that is not defined is an empty cell in the tables and null in JSON.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nni_plugin.correlation import Correlation, correlate
from nni_plugin.correlation_study.plots import plot_ranks

Scores = dict[str, Tensor]
"""One value a channel by group name, shape `[width]` each."""

COLUMNS = (
    "criterion", "spearman", "spearman_per_group", "kendall", "pearson", "seconds",
    "spearman_held_out", "spearman_per_group_held_out", "kendall_held_out", "pearson_held_out",
    "spearman_signed", "spearman_signed_held_out", "channels",
)  # fmt: skip
"""Of `correlations.csv`. Coefficients that are not defined are left empty."""


@dataclass(frozen=True)
class Measured:
    """The Oracle's signed loss changes by group, and how long they took."""

    changes: Scores
    seconds: float

    @property
    def squares(self) -> Scores:
        """The squared changes, which criteria are compared with."""
        return {name: change.square() for name, change in self.changes.items()}

    @property
    def judged(self) -> int:
        """How many channels were measured."""
        return sum(int((~change.isnan()).sum()) for change in self.changes.values())


@dataclass(frozen=True)
class Scored:
    """One criterion's scores, its signed predictions if it makes any, or why it has none."""

    scores: Scores
    predictions: Scores
    seconds: float
    reason: str


def write_results(
    folder: Path,
    record: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, float]],
    scored: Mapping[str, Scored],
    train: Measured,
    held_out: Measured | None,
) -> None:
    """Write `correlations.csv`, `correlations.json`, `correlations.png` and `oracle.csv`.

    Args:
        folder: Where they go.
        record: Content of `correlations.json`.
        rows: Of `correlations.csv`, by criterion.
        scored: By criterion.
        train: The Oracle on training images, groups in the order of the network.
        held_out: The Oracle on held-out images, if any.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    table = [[method, *(_cell(row[column]) for column in COLUMNS[1:])] for method, row in rows.items()]
    (folder / "correlations.csv").write_text(_csv(COLUMNS, table), newline="")
    measured = [
        [name, channel, *("" if m is None else repr(float(m.changes[name][channel])) for m in (train, held_out))]
        for name, change in train.changes.items()
        for channel in (~change.isnan()).nonzero().flatten().tolist()
    ]
    (folder / "oracle.csv").write_text(_csv(("group", "channel", "change", "change_held_out"), measured), newline="")
    (folder / "correlations.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    plot_ranks(
        folder / "correlations.png",
        {method: found.scores for method, found in scored.items() if found.scores},
        train.squares,
        {method: row["spearman"] for method, row in rows.items()},
    )


def row_of(found: Scored, train: Measured, held_out: Measured | None) -> dict[str, float]:
    """Return what `correlations.csv` says of one criterion, in the order of its columns."""
    nothing = Correlation(math.nan, math.nan, math.nan, math.nan, 0)
    here = correlate(found.scores, train.squares)
    there = nothing if held_out is None else correlate(found.scores, held_out.squares)
    values = {**asdict(here), "seconds": math.nan if found.reason else found.seconds}
    values |= {f"{name}_held_out": value for name, value in asdict(there).items()}
    values["spearman_signed"] = correlate(found.predictions, train.changes).spearman
    values["spearman_signed_held_out"] = (
        math.nan if held_out is None else correlate(found.predictions, held_out.changes).spearman
    )
    return {column: values[column] for column in COLUMNS[1:]}


def agreement(train: Measured, held_out: Measured) -> dict[str, float | None]:
    """Say how well the Oracle on training images ranks for held-out ones: the noise of the images."""
    return {key: json_value(value) for key, value in asdict(correlate(train.squares, held_out.squares)).items()}


def json_value(value: float) -> float | None:
    """Return a number as JSON knows it: null for what is not defined, channels as integers."""
    if isinstance(value, int):
        return value
    return None if math.isnan(value) else round(value, 6)


def _cell(value: float) -> str:
    rounded = json_value(value)
    return "" if rounded is None else str(rounded)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
