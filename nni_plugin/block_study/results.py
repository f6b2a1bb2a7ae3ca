"""What is known of every removable block of a network, as a table: a row a block, and the files it goes into.

A number that is not known is an empty cell in the table and null in JSON.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_plugin.block_study.plots import Panel, plot_panels
from nni_plugin.block_study.scores import BlockScores
from nni_plugin.block_study.without import Absence
from nni_plugin.cost import Cost
from nni_plugin.layers import Block, rank_agreement, removal_order
from nni_plugin.layers.latency import BlockLatency

Row = dict[str, Any]


def rows_of(
    blocks: Sequence[Block],
    saved: Mapping[str, Cost],
    latencies: Mapping[int, Mapping[str, BlockLatency]],
    absences: Mapping[str, Absence],
    scored: Mapping[str, BlockScores],
) -> list[Row]:
    """Return a row for each block.

    Args:
        blocks: In the order of the network.
        saved: What leaves with each block, by its name.
        latencies: By batch size and block name.
        absences: By block name; empty if not measured.
        scored: By criterion; those without scores give no column.

    Returns:
        `block`, `kind`, `shape` (of its output for one sample), `macs_saved` (of one sample), `params_saved`; for each
        batch size `latency_ms_N`, `latency_iqr_ms_N` and `latency_share_N`; `loss_change`, `top1_change` (points); for
        each criterion its score under its name and `NAME_rank`, 1 for the block that leaves first.
    """
    ranks = {
        name: {block: place for place, block in enumerate(removal_order(found.scores), 1)}
        for name, found in scored.items()
    }
    rows = []
    for block in blocks:
        row: Row = {
            "block": block.name,
            "kind": block.kind,
            "shape": "x".join(map(str, block.shape)),
            "macs_saved": saved[block.name].macs,
            "params_saved": saved[block.name].params,
        }
        for batch_size, found in latencies.items():
            latency = found[block.name]
            row[f"latency_ms_{batch_size}"] = latency.median_ms
            row[f"latency_iqr_ms_{batch_size}"] = latency.iqr_ms
            row[f"latency_share_{batch_size}"] = latency.share
        absence = absences.get(block.name)
        row["loss_change"] = None if absence is None else absence.loss
        row["top1_change"] = None if absence is None else absence.top1
        for name, of_criterion in scored.items():
            if of_criterion.scores:
                row[name] = of_criterion.scores[block.name]
                row[f"{name}_rank"] = ranks[name][block.name]
        rows.append({key: _rounded(value) for key, value in row.items()})
    return rows


def agreements(
    scored: Mapping[str, BlockScores], absences: Mapping[str, Absence]
) -> dict[str, dict[str, float | None]]:
    """Return Spearman's rank correlation of every two criteria, and of each with the measured `loss_change`."""
    scorings = {name: found.scores for name, found in scored.items() if found.scores}
    others = dict(scorings)
    if absences:
        others["loss_change"] = {name: absence.loss for name, absence in absences.items()}
    return {
        name: {other: _rounded(rank_agreement(scores, others[other])) for other in others if other != name}
        for name, scores in scorings.items()
    }


def write_results(folder: Path, record: Mapping[str, Any], rows: Sequence[Row], criteria: Sequence[str]) -> None:
    """Write `layers.csv`, `layers.json`, `importance.png` and `latency.png`.

    Args:
        folder: Where they go.
        record: Content of `layers.json`.
        rows: See :func:`rows_of`; at least one.
        criteria: Those with scores, in the order of their panels.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "layers.csv").write_text(buffer.getvalue(), newline="")
    (folder / "layers.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    names = [str(row["block"]) for row in rows]
    plot_panels(folder / "importance.png", names, importance_panels(rows, criteria))
    plot_panels(folder / "latency.png", names, latency_panels(rows))


def importance_panels(rows: Sequence[Row], criteria: Sequence[str]) -> list[Panel]:
    """Return a panel for each criterion, and one for the loss without each block where it was measured."""
    panels = [Panel(name, "importance", [row[name] for row in rows]) for name in criteria]
    if rows[0]["loss_change"] is not None:
        panels.append(Panel("measured", "loss change without the block", [row["loss_change"] for row in rows]))
    return panels


def latency_panels(rows: Sequence[Row]) -> list[Panel]:
    """Return a panel for each batch size."""
    sizes = [key.removeprefix("latency_ms_") for key in rows[0] if key.startswith("latency_ms_")]
    return [
        Panel(
            f"batch size {size}",
            "median latency (ms), interquartile range",
            [row[f"latency_ms_{size}"] for row in rows],
            [row[f"latency_iqr_ms_{size}"] for row in rows],
            mark_least=False,
        )
        for size in sizes
    ]


def _rounded(value: Any) -> Any:
    """Return a number with six digits, None where it is not defined."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
