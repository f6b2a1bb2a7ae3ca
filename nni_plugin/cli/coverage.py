"""`nni-plugin coverage`: which models of a list, or of a whole library, can be pruned, and why the others cannot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jsonargparse

from nni_plugin.cli.arguments import LIBRARIES, above, add_common, number

DESCRIPTION = "Try many models: plan, cut, prove, run, save and load each in a process of its own."


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `coverage`."""
    add = parser.add_argument
    add("--models", type=Path, help="CSV file with the columns library and model")
    add("--library", type=str, choices=LIBRARIES, help="with --all: this library instead of a list")
    add("--all", action="store_true", help="every architecture that --library has")
    add("--macs", type=number, default=0.5, help="fraction of the multiply-accumulates to keep")
    add("--seconds", type=above(1), default=60, help="CPU-seconds that a model may take, on one thread")
    add("-j", "--workers", type=above(1), default=2, help="models at a time")
    add("--resume", action="store_true", help="go on with the run that was interrupted in --output")
    add_common(parser, output_required=False)


def run(arguments: Any, command: str) -> None:
    """Run `coverage`.

    Raises:
        NNIPluginError: Anything the user can mend.
    """
    from rich.console import Console

    from nni_plugin.coverage.job import RESULT, CoverageJob, run_coverage
    from nni_plugin.coverage.listing import read_list, whole_library
    from nni_plugin.workspace import STATE

    if (arguments.models is None) == (arguments.library is None) or arguments.all == (arguments.library is None):
        raise argparse.ArgumentError(None, "give either --models FILE.csv, or --library NAME with --all")
    if arguments.resume and arguments.output is None:
        raise argparse.ArgumentError(None, "--resume goes on with a run in --output: name the folder")
    console = Console(highlight=False)
    if arguments.resume and (arguments.output / RESULT).is_file() and not (arguments.output / STATE).exists():
        console.print(f"{arguments.output} holds a finished run: there is nothing to resume.", markup=False)
        return
    job = CoverageJob(
        cases=read_list(arguments.models) if arguments.models is not None else whole_library(arguments.library),
        macs=arguments.macs,
        seconds=arguments.seconds,
        workers=arguments.workers,
        seed=arguments.seed,
        device=arguments.device,
        output=arguments.output,
    )
    rows = run_coverage(
        job, resume=arguments.resume, say=lambda text: console.print(text, markup=False, soft_wrap=True)
    )
    console.print(_table(rows, job.macs))
    if arguments.output is not None:
        console.print(f"{arguments.output / RESULT} holds the reasons", markup=False, soft_wrap=True)


def _table(rows: list[Any], macs: float) -> Any:
    from rich.table import Table

    from nni_plugin.coverage.results import STATUSES, counts

    table = Table(title=f"{len(rows)} models at {macs:g} of their MACs")
    table.add_column("library")
    for heading in ("models", *STATUSES, "share ok"):
        table.add_column(heading, justify="right")
    for library, found in counts(rows).items():
        models = sum(found.values())
        table.add_row(library, str(models), *(str(found[kind]) for kind in STATUSES), f"{found['ok'] / models:.1%}")
    return table
