"""`results.csv`: a row a cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nni_plugin.comparison.job import Cell

OWN_TIME = "finetune"
"""Of a cell's seconds, what is not the method's own time."""


@dataclass(frozen=True)
class Row:
    """One cell.

    Args:
        model: Name of the network.
        dataset: Name of the data.
        method: As `--method`.
        seed: Of the cell, and of its dense network.
        target: What was asked, such as `macs=0.5`.
        macs_ratio: MACs of the slim network over those of the dense one.
        params_ratio: Parameters likewise.
        latency_ratio: Latency likewise, timed in turns, at the first of the batch sizes.
        top1_baseline: Accuracy of the dense network on the test images, in percent.
        top1_before_finetune: Of the slim network as the method left it.
        top1: Of the slim network, fine-tuned.
        seconds: That the method took, without fine-tuning.
    """

    model: str
    dataset: str
    method: str
    seed: int
    target: str
    macs_ratio: float
    params_ratio: float
    latency_ratio: float
    top1_baseline: float
    top1_before_finetune: float
    top1: float
    seconds: float


COLUMNS = tuple(field.name for field in fields(Row))
_DIGITS = {
    **dict.fromkeys(("macs_ratio", "params_ratio", "latency_ratio"), ".4f"),
    **dict.fromkeys(("top1_baseline", "top1_before_finetune", "top1"), ".2f"),
    "seconds": ".1f",
}


def row_of(cell: Cell, metrics: Mapping[str, Any]) -> Row:
    """Return the row of a cell that is done."""
    before, after = metrics["baseline"], metrics["pruned"]
    return Row(
        model=metrics["model"],
        dataset=metrics["dataset"],
        method=cell.method,
        seed=cell.seed,
        target=cell.target,
        macs_ratio=after["macs"] / before["macs"],
        params_ratio=after["params"] / before["params"],
        latency_ratio=next(iter(metrics["latency_ratio"].values())),
        top1_baseline=before["top1"],
        top1_before_finetune=metrics["top1_before_finetune"],
        top1=after["top1"],
        seconds=sum(value for name, value in metrics["seconds"].items() if name != OWN_TIME),
    )


def to_csv(rows: Iterable[Row]) -> str:
    """Return rows as text."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for row in rows:
        cells = asdict(row)
        writer.writerow(cells | {name: f"{cells[name]:{form}}" for name, form in _DIGITS.items()})
    return text.getvalue()
