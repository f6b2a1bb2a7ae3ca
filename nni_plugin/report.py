"""The report of a pruning run: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nni_plugin.pages import NO_PLOTS, NOTHING, render_page
from nni_plugin.report_plots import history_axis, plot_history, plot_widths

_MOST_HISTORY_ROWS = 200
_HISTORY_COLUMNS = {
    "phase": "phase",
    "top1": "test top-1 (%)",
    "loss": "training loss",
    "kept": "channels kept",
    "macs_ratio": "MACs kept",
}
_MACS_FELL = 0.9
"""Share of the MACs left, or less, at which latency is expected to follow: above it, a measurement says little."""

_LATENCY_FOLLOWED = 0.25
"""Part of what MACs have lost that latency must have lost."""

_UNCERTAIN = 0.1
"""Interquartile range of a ratio of latencies above which it says too little to tell a cause."""

IN_TURNS = (
    "The change of latency and throughput is of both networks timed in turns, and need not be the quotient of the two "
    "columns."
)
"""What stands beside a table of :func:`before_after` with such a change."""


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


@dataclass(frozen=True)
class Target:
    """One quantity that was asked for, in whatever unit its name states.

    Attributes:
        quantity: What it is, e.g. "MACs kept (share)" or "latency at batch 1 (ms)".
        asked: The budget; None where nothing was asked.
        predicted: What the plan said before surgery; None where it said nothing.
        result: What the network has now.
    """

    quantity: str
    asked: float | None
    predicted: float | None
    result: float | None


@dataclass(frozen=True)
class Report:
    """Everything a report shows; empty fields leave their section out.

    Attributes:
        title: Heading.
        metrics: What `metrics.json` holds: `method`, `model`, `dataset`, `seed`, `baseline` and `pruned`
            (each `top1` in percent, `macs` per image, `params`, `latency_ms` by batch size as text),
            `top1_before_finetune` in percent, `removed` (`channels`, `blocks`) and `seconds` by stage.
            `latency_ratio` by batch size, where it was measured in turns, goes before the quotient;
            `latency_ratio_iqr` is the interquartile range over the rounds.
        command: The exact command that was run, seed included.
        history: Rows in order of time, as `report_plots.plot_history` takes them.
        widths: Per layer its name, channels kept and channels before, in the order of the network; none kept where it
            leaves with its block.
        removed_blocks: Names of the blocks that are removed whole.
        targets: Asked, predicted and reached quantities.
        machine: Label to text, as `machine.describe_machine` returns it.
        parity: One sentence on how far the masked and the compact network are apart.
        load_code: Python lines that load the result.
        device: Where latency was measured, e.g. `cpu`.
        macs_target: Share of MACs asked for, 0 to 1, drawn in the figure.
        notes: Further sentences, e.g. warnings of the run, after those of :func:`latency_notes`.
        date: When, for the heading.
    """

    title: str
    metrics: Mapping[str, Any]
    command: str = ""
    history: Sequence[Mapping[str, Any]] = ()
    widths: Sequence[tuple[str, int, int]] = ()
    removed_blocks: Sequence[str] = ()
    targets: Sequence[Target] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    parity: str = ""
    load_code: str = ""
    device: str = ""
    macs_target: float | None = None
    notes: Sequence[str] = ()
    date: str = field(default_factory=_now)


@dataclass(frozen=True)
class Row:
    """One line of the before/after table, as printed.

    Attributes:
        quantity: Name and unit.
        before: Value of the baseline.
        after: Value of the pruned network.
        change: Quotient after / before, or the difference in points for accuracy.
    """

    quantity: str
    before: str
    after: str
    change: str


def before_after(metrics: Mapping[str, Any]) -> list[Row]:
    """Return the before/after table of a run, for the report and for a terminal.

    Args:
        metrics: As in `Report`; a missing value is printed as a dash.

    Returns:
        Rows for top-1, MACs, parameters, then latency and throughput per batch size, ascending.

    Example:
        >>> _, macs, _ = before_after({"baseline": {"macs": 40e6}, "pruned": {"macs": 20e6}})
        >>> macs
        Row(quantity='MACs (M, per image)', before='40.00', after='20.00', change='0.500')
    """
    old, new = metrics.get("baseline", {}), metrics.get("pruned", {})
    top1 = (old.get("top1"), new.get("top1"))
    rows = [Row("Top-1 (%)", _fixed(top1[0], 2), _fixed(top1[1], 2), _points(*top1))]
    shortly = metrics.get("top1_before_finetune")
    if shortly is not None:
        change = _points(top1[0], shortly)
        rows.append(Row("Top-1 before fine-tuning (%)", _fixed(top1[0], 2), _fixed(shortly, 2), change))
    for key, name in (("macs", "MACs (M, per image)"), ("params", "Parameters (M)")):
        a, b = old.get(key), new.get(key)
        # A small network has fewer than a hundred thousand parameters: two digits would say little.
        digits = 2 if a is not None and a >= 10e6 else 4
        rows.append(Row(name, _fixed(a, digits, 1e6), _fixed(b, digits, 1e6), _quotient(b, a)))
    latency = (old.get("latency_ms", {}), new.get("latency_ms", {}))
    for size in sorted({*latency[0], *latency[1]}, key=int):
        a, b = latency[0].get(size), latency[1].get(size)
        ratio = metrics.get("latency_ratio", {}).get(size)
        change = _quotient(b, a) if ratio is None else _fixed(ratio, 3)
        rows.append(Row(f"Latency at batch {size} (ms)", _time(a), _time(b), change))
        a, b = (int(size) / t * 1e3 if t else None for t in (a, b))
        change = _quotient(b, a) if ratio is None else _quotient(1.0, ratio)
        rows.append(Row(f"Throughput at batch {size} (images/s)", _fixed(a, 0), _fixed(b, 0), change))
    return rows


def latency_notes(metrics: Mapping[str, Any]) -> list[str]:
    """Say where multiply-accumulates went and the time did not, and where the time is uncertain.

    Args:
        metrics: As in `Report`; nothing is said of what is missing.

    Returns:
        A sentence, with both figures, for each batch size at which latency lost less than a quarter of the share that
        MACs lost, when they lost a tenth at least: at 0.6 of the MACs, a latency above 0.9. One for each at which the
        ratios of the rounds have an interquartile range above 0.1: no cause is told there.

    Example:
        >>> before, after = ({"macs": macs, "latency_ms": {"1": ms}} for macs, ms in ((100, 2.0), (60, 1.9)))
        >>> [note] = latency_notes({"baseline": before, "pruned": after})
        >>> note[:75]
        'MACs fell to 0.600 of the dense network, latency at batch 1 only to 0.950: '
    """
    old, new = metrics.get("baseline", {}), metrics.get("pruned", {})
    if not old.get("macs") or new.get("macs") is None:
        return []
    macs, notes = new["macs"] / old["macs"], []
    before, after = old.get("latency_ms", {}), new.get("latency_ms", {})
    for size in sorted({size for size in before if before[size] and size in after}, key=int):
        ratio = metrics.get("latency_ratio", {}).get(size, after[size] / before[size])
        iqr = metrics.get("latency_ratio_iqr", {}).get(size, 0.0)
        if iqr > _UNCERTAIN:
            notes.append(
                f"Latency at batch {size}, {ratio:.3f} of the dense network's, is uncertain: over the rounds of timing "
                f"the ratio has an interquartile range of {iqr:.3f}. Measure again while the machine does nothing else."
            )
        elif macs <= _MACS_FELL and 1 - ratio < _LATENCY_FOLLOWED * (1 - macs):
            went = f"only to {ratio:.3f}: what was removed took little time there."
            if ratio >= 1:
                went = f"to {ratio:.3f}: the narrower layers are no faster there."
            notes.append(
                f"MACs fell to {macs:.3f} of the dense network, latency at batch {size} {went} "
                "A budget of latency (--latency) removes what takes time; larger batches may gain more too."
            )
    return notes


def write_report(path: str | os.PathLike[str], report: Report) -> bool:
    """Write a report; an earlier file of that name is replaced only once the new one is complete.

    Args:
        path: HTML file to write, in a folder that exists.
        report: What to show.

    Returns:
        Whether the figures are in it; they need Matplotlib (`pip install "nni-plugin[plots]"`).

    Raises:
        OSError: The file cannot be written; nothing half is left.
    """
    path = Path(path)
    html, with_figures = _render(report)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return with_figures


def _render(report: Report) -> tuple[str, bool]:
    """Return the page, and whether it has its figures."""
    from markupsafe import Markup

    in_turns = [IN_TURNS] if report.metrics.get("latency_ratio") else []
    notes = [*latency_notes(report.metrics), *report.notes, *in_turns]
    baseline_top1 = report.metrics.get("baseline", {}).get("top1")
    try:
        history_svg = plot_history(report.history, baseline_top1=baseline_top1, target=report.macs_target)
        widths_svg, bars = plot_widths(report.widths)
        with_figures = True
    except ImportError:
        history_svg, widths_svg, bars, with_figures = "", "", 0, False
        notes.append(NO_PLOTS)
    page = render_page(
        "report.html.j2",
        report=report,
        facts=_facts(report),
        lead=_lead(report.metrics),
        rows=before_after(report.metrics),
        targets=[
            (t.quantity, *(NOTHING if v is None else f"{v:.4g}" for v in (t.asked, t.predicted, t.result)))
            for t in report.targets
        ],
        # Matplotlib has escaped every name in the figures; all other text is escaped by the template.
        history_svg=Markup(history_svg),
        widths_svg=Markup(widths_svg),
        bars=bars,
        history=_history_table(report.history),
        history_rows=len(report.history),
        seconds=[(name, f"{value:.1f}") for name, value in report.metrics.get("seconds", {}).items()],
        notes=notes,
    )
    return page, with_figures


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return what stands under the heading."""
    named = [(key, report.metrics.get(key)) for key in ("model", "dataset", "method", "seed")]
    facts = [(key, str(value)) for key, value in named if value is not None]
    removed = {key: n for key, n in report.metrics.get("removed", {}).items() if n}
    if removed:
        facts.append(("removed", ", ".join(f"{n} {key}" for key, n in removed.items())))
    return [*facts, ("date", report.date)]


def _lead(metrics: Mapping[str, Any]) -> str:
    """Return the result in one sentence, "" where a part of it is missing."""
    old, new = metrics.get("baseline", {}), metrics.get("pruned", {})
    values = [side.get(key) for key in ("top1", "macs", "params") for side in (old, new)]
    if any(value is None for value in values) or not (old["macs"] and old["params"]):
        return ""
    macs, params = new["macs"] / old["macs"], new["params"] / old["params"]
    sentence = (
        f"{100 * macs:.1f}_% of the MACs and {100 * params:.1f}_% of the parameters are left; top-1 went "
        f"from {old['top1']:.2f}_% to {new['top1']:.2f}_% ({_points(old['top1'], new['top1'])})."
    )
    return sentence.replace("_", "\u00a0")  # no line break between a number and its unit


def _history_table(history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return header and lines; of a long history the rows with a test accuracy, then evenly thinned."""
    rows = list(history)
    if len(rows) > _MOST_HISTORY_ROWS:
        rows = [row for row in rows if row.get("top1") is not None] or rows
    if len(rows) > _MOST_HISTORY_ROWS:
        last = len(rows) - 1
        rows = [rows[round(i * last / (_MOST_HISTORY_ROWS - 1))] for i in range(_MOST_HISTORY_ROWS)]
    if not rows:
        return []
    key, label = history_axis(history)
    used = {name for row in rows for name, value in row.items() if value is not None}
    columns = {key: label} | {name: text for name, text in _HISTORY_COLUMNS.items() if name in used}
    lines = [[_cell(row.get(name)) for name in columns] for row in rows]
    return [list(columns.values()), *lines]


def _cell(value: object) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fixed(value: float | None, digits: int, unit: float = 1.0) -> str:
    return NOTHING if value is None else f"{value / unit:,.{digits}f}".replace(",", "\u202f")


def _time(milliseconds: float | None) -> str:
    return _fixed(milliseconds, 2 if milliseconds is not None and milliseconds >= 10 else 3)


def _quotient(after: float | None, before: float | None) -> str:
    return NOTHING if after is None or not before else f"{after / before:.3f}"


def _points(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return NOTHING
    # Rounded first, so that no minus stands before 0.00; then the typographic minus, as wide as the plus.
    return f"{round(after - before, 2) + 0.0:+.2f} points".replace("-", "\u2212")
