"""All cells of a comparison, in processes side by side, then the table, the figures and the report.

State is kept in the store: a comparison that was interrupted goes on, and one that is finished takes further methods,
targets and seeds. Under `torchrun`, or called on several machines with one folder, each process works on cells of its
own; the first of them keeps the store and writes the results.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nni_plugin.comparison.cells import do_cell
from nni_plugin.comparison.job import STORE, Cell, ComparisonJob
from nni_plugin.comparison.report import RESULTS, write_results
from nni_plugin.comparison.results import Row, row_of
from nni_plugin.comparison.store import Outcome, Store
from nni_plugin.errors import OutputError, TrainingError
from nni_plugin.machine import describe_machine

READY = "ready"
"""File in the output folder: the store holds the cells of this run."""

_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` sets. Cells are trained each by one process, so training must not see it."""


def run_comparison(
    wanted: ComparisonJob, *, resume: bool = False, command: str = "", say: Callable[[str], None] = print
) -> list[Row]:
    """Do every cell that is not done, and write `results.csv`, `report.html` and the plots.

    Args:
        wanted: What to compare.
        resume: Go on in an output folder that holds a comparison: what is done stays, what failed is tried again.
        command: The command that was run, for the report.
        say: Takes what a person should read, as it happens.

    Returns:
        A row for every cell of this comparison that is done; none in a process of `torchrun` but the first. Cells
        that a method refused, or that failed, are named in a warning and in the report.

    Raises:
        OutputError: The folder holds a comparison and `resume` is not given, or one with other settings.
        TrainingError: No cell was done.
        KeyboardInterrupt: It was interrupted; what is done is kept.
    """
    with _on_its_own() as (rank, local_rank):
        if rank > 0:
            _wait_for(wanted.output / READY)
            _work(wanted, local_rank, say)
            return []
        return _lead(wanted, resume, command, say)


def _lead(wanted: ComparisonJob, resume: bool, command: str, say: Callable[[str], None]) -> list[Row]:
    if any((wanted.output / name).exists() for name in (STORE, RESULTS)) and not resume:
        raise OutputError(
            f"{str(wanted.output)!r} holds a comparison. Give --resume to go on with it, also with further methods, "
            "targets or seeds, or choose another --output."
        )
    cells, begun = wanted.cells(), time.perf_counter()
    try:
        wanted.output.mkdir(parents=True, exist_ok=True)
        store = Store(wanted.address)
        store.agree(wanted.settings())
        store.add(cells)
        (wanted.output / READY).touch()
    except OSError as error:
        raise OutputError(f"Cannot write to the output folder {str(wanted.output)!r}: {error}.") from error
    try:
        _do_all(wanted, store, say)
    finally:
        (wanted.output / READY).unlink(missing_ok=True)
    of_cell = {outcome.cell: outcome for outcome in store.outcomes()}
    outcomes = [of_cell[cell] for cell in cells]
    rows = [row_of(outcome.cell, outcome.metrics) for outcome in outcomes if outcome.metrics is not None]
    not_done = [outcome for outcome in outcomes if outcome.metrics is None]
    for outcome in not_done:
        warnings.warn(f"{outcome.cell.name} {outcome.status}: {outcome.reason}", stacklevel=3)
    if not rows:
        raise TrainingError(f"No cell was done. The first, {not_done[0].cell.name}: {not_done[0].reason}")
    write_results(wanted.output, rows, _record(wanted, outcomes, command, time.perf_counter() - begun))
    return rows


def finished_rows(folder: Path) -> list[Row]:
    """Return a row for every cell that is done in a comparison's output folder, whichever call asked for it."""
    outcomes = Store(f"sqlite:///{(folder / STORE).resolve()}").outcomes()
    return [row_of(outcome.cell, outcome.metrics) for outcome in outcomes if outcome.metrics is not None]


def _record(wanted: ComparisonJob, outcomes: list[Outcome], command: str, seconds: float) -> dict[str, Any]:
    done = [outcome for outcome in outcomes if outcome.metrics is not None]
    return {
        "command": command,
        "settings": wanted.settings(),
        "processes": wanted.processes,
        "seconds": round(seconds, 1),
        "not_done": {o.cell.name: f"{o.status}: {o.reason}" for o in outcomes if o.metrics is None},
        "hosts": {o.cell.method: o.metrics["host"] for o in done if o.metrics and "host" in o.metrics},
        "latency_batch_size": wanted.template.latency_batch_sizes[0],
        "machine": describe_machine(),
        "versions": {name: _version(name) for name in ("nni-plugin", "torch-pruning", "nni", "timm")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _do_all(wanted: ComparisonJob, store: Store, say: Callable[[str], None]) -> None:
    """Work, beside as many further processes as asked for, until no cell waits or is being worked on anywhere."""
    context, before = multiprocessing.get_context("spawn"), torch.get_num_threads()
    threads = max(1, before // wanted.processes)
    numbers = range(1, wanted.processes)
    others = [context.Process(target=_work_elsewhere, args=(wanted, n, threads), daemon=True) for n in numbers]
    torch.set_num_threads(threads)
    try:
        for process in others:
            process.start()
        while not store.finished():
            _work(wanted, 0, say)
            time.sleep(1.0)
    finally:
        torch.set_num_threads(before)
        for process in others:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work_elsewhere(wanted: ComparisonJob, number: int, threads: int) -> None:
    """Work in a process of its own; an interrupt of the terminal ends it without a word."""
    torch.set_num_threads(threads)
    with suppress(KeyboardInterrupt):
        _work(wanted, number, partial(print, flush=True))


def _work(wanted: ComparisonJob, number: int, say: Callable[[str], None]) -> None:
    """Take cells until none waits, on the GPU of this number where there are several and none was named."""
    if wanted.template.device is None and torch.cuda.device_count() > 1:
        device = f"cuda:{number % torch.cuda.device_count()}"
        wanted = replace(wanted, template=replace(wanted.template, device=device))

    def do(cell: Cell) -> dict[str, Any]:
        say(f"{cell.name} ...")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a plan warns of, its own report says
            return do_cell(wanted, cell, say)

    Store(wanted.address).work(do, say)


@contextmanager
def _on_its_own() -> Iterator[tuple[int, int]]:
    """Hide from training that `torchrun` started several processes; gives this one's rank, and that on its machine."""
    hidden = {name: os.environ.pop(name) for name in _OF_LAUNCHERS if name in os.environ}
    try:
        yield int(hidden.get("RANK", "0")), int(hidden.get("LOCAL_RANK", "0"))
    finally:
        os.environ.update(hidden)


def _wait_for(path: Path, seconds: float = 600.0) -> None:
    """Wait until the first process has filled the store."""
    begun = time.monotonic()
    while not path.exists():
        if time.monotonic() - begun > seconds:
            raise OutputError(f"Expected {str(path)!r} of the process of rank 0 within {seconds:.0f} s, got none.")
        time.sleep(0.5)
