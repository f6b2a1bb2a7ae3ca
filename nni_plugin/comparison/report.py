"""The files of a comparison: `results.csv`, `comparison.json`, the plots, and one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nni_plugin.comparison.analysis import (
    Difference,
    Mean,
    Point,
    best_built_in,
    best_of_ours,
    differences,
    losses,
    points,
)
from nni_plugin.comparison.plots import AXES, plot_accuracy
from nni_plugin.comparison.results import Row, to_csv
from nni_plugin.pages import NO_PLOTS, NOTHING, render_page
from nni_plugin.svg_figures import standalone
from nni_plugin.workspace import write_file

RESULTS, REPORT, RECORD = "results.csv", "report.html", "comparison.json"


def write_results(folder: Path, rows: Sequence[Row], record: Mapping[str, Any]) -> None:
    """Write everything that a comparison leaves.

    Args:
        folder: Where, a folder that exists.
        rows: A row a cell.
        record: How it came about: `runs` (of each call its `command`, `processes` and `seconds`), `settings`,
            `machine`, `versions`, `not_done`, `ours_alone`, `latency_batch_size`, `hosts` (by method, what was asked
            of its library in all cells) and `host_cells` (by cell, the rest).
    """
    figures = _figures(rows)
    for name, svg in figures.items():
        write_file(folder / f"{name}.svg", standalone(svg))
    write_file(folder / RESULTS, to_csv(rows))
    write_file(folder / RECORD, json.dumps(record, indent=1, default=str) + "\n")
    write_file(folder / REPORT, render(rows, record, figures))


def _figures(rows: Sequence[Row]) -> dict[str, str]:
    """Return the figures by name; none without Matplotlib."""
    found, baseline = points(rows), Mean.of(_dense(rows).values()).mean
    try:
        figures = {f"accuracy-{cost}": plot_accuracy(found, cost, baseline=baseline) for cost in AXES}
        figures["accuracy-macs_ratio-before"] = plot_accuracy(found, "macs_ratio", fine_tuned=False, baseline=baseline)
    except ImportError:
        return {}
    return figures


def _dense(rows: Sequence[Row]) -> dict[int, float]:
    """Return the dense networks' top-1 by seed."""
    return {row.seed: row.top1_baseline for row in rows}


def render(rows: Sequence[Row], record: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """Return the page."""
    from markupsafe import Markup

    settings = record["settings"]
    notes = [] if figures else [NO_PLOTS]
    dense = _dense(rows)
    if len(dense) > 1 and len(set(dense.values())) == 1:
        notes.append(
            "All seeds started from one dense network: deviations and intervals are of data order and chance alone."
        )
    return render_page(
        "comparison.html.j2",
        title=f"{rows[0].model} on {rows[0].dataset}: methods compared",
        facts=_facts(rows, record),
        lead=lead(rows),
        notes=notes,
        figures={name: Markup(svg) for name, svg in figures.items()},
        targets=[
            (target, [_line(p, rows) for p in points(rows) if p.target == target])
            for target in dict.fromkeys(row.target for row in rows)
        ],
        differences=[_difference(d) for d in differences(rows)],
        losses=losses(rows),
        ours_alone=", ".join(f"{name} {value}" for name, value in record["ours_alone"].items()),
        times=_times(rows),
        not_done=record["not_done"],
        hosts={method: _host(host) for method, host in record["hosts"].items()},
        latency_batch_size=record["latency_batch_size"],
        epochs=settings["finetune"]["epochs"],
        processes=max(run["processes"] for run in record["runs"]),
        machine={**record["machine"], **record["versions"]},
        commands=list(dict.fromkeys(run["command"] for run in record["runs"] if run["command"])),
        rows=[
            (
                row.method,
                row.target,
                row.seed,
                f"{row.top1_before_finetune:.2f}",
                f"{row.top1:.2f}",
                f"{row.macs_ratio:.4f}",
                f"{row.params_ratio:.4f}",
                f"{row.latency_ratio:.3f}",
            )
            for row in rows
        ],
    )


def lead(rows: Sequence[Row]) -> str:
    """Say in one sentence how our best method stands against the best built-in one."""
    best = best_of_ours(rows)
    if not best:
        return ""
    told = [f"{d.method} {d.difference.mean:+.2f} points against {d.against} at {target}" for target, d in best.items()]
    ahead = sum(d.difference.mean > 0 for d in best.values())
    clearly = sum(d.verdict == "ahead" for d in best.values())
    return (
        f"Our best method has the higher mean at {ahead} of {len(best)} targets, {clearly} of them with an interval "
        f"above zero: {'; '.join(told)}."
    )


def _facts(rows: Sequence[Row], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    dense = Mean.of(_dense(rows).values())
    return [
        ("network", f"{rows[0].model}, dense top-1 {dense} %"),
        ("data", rows[0].dataset),
        ("seeds", ", ".join(map(str, sorted(_dense(rows))))),
        ("fine-tuning", _epochs(record["settings"]["finetune"]["epochs"])),
        ("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def _line(point: Point, rows: Sequence[Row]) -> dict[str, Any]:
    of_target = [p for p in points(rows) if p.target == point.target]
    return {
        "method": point.method,
        "best": point.top1.mean == max(p.top1.mean for p in of_target),
        "best_built_in": point.method == best_built_in(rows, point.target),
        "top1": str(point.top1),
        "before": str(point.top1_before_finetune),
        "macs": f"{point.macs_ratio.mean:.3f}",
        "params": f"{point.params_ratio.mean:.3f}",
        "latency": f"{point.latency_ratio.mean:.3f}",
        "seconds": f"{point.seconds.mean:.1f}",
        "seeds": len(point.seeds),
    }


def _difference(difference: Difference) -> tuple[str, ...]:
    low_high = difference.interval
    return (
        difference.target,
        difference.method,
        difference.against,
        f"{difference.difference.mean:+.2f}",
        NOTHING if low_high is None else f"{low_high[0]:+.2f} to {low_high[1]:+.2f}",
        str(difference.difference.count),
        difference.verdict,
    )


def _times(rows: Sequence[Row]) -> list[tuple[str, str]]:
    by_method: dict[str, list[float]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row.seconds)
    return [(method, f"{Mean.of(of).mean:.1f}") for method, of in sorted(by_method.items(), key=lambda m: sum(m[1]))]


def _host(settings: Mapping[str, Any]) -> str:
    told = {name: value for name, value in settings.items() if not isinstance(value, (dict, list))}
    return ", ".join(f"{n} {value:.4g}" if isinstance(value, float) else f"{n} {value}" for n, value in told.items())


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number != 1)}, the same for all" if number else "none"
