"""Figures of the benchmarks as files: the same numbers give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file, `.svg`, `.png` or whatever else matplotlib writes.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    import matplotlib

    dated = Path(path).suffix == ".svg"
    with matplotlib.rc_context({"svg.hashsalt": "nni-plugin"}):
        figure.savefig(path, metadata={"Date": None} if dated else None)
