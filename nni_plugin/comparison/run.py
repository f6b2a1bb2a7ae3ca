"""All cells of a comparison, in processes side by side, then the table, the figures and the report.

State is kept in the store: a comparison that was interrupted goes on, and one that is finished takes further methods,
targets and seeds. Under `torchrun`, on one machine or on several that share the folder, each process works on cells of
its own; the first of them keeps the store and writes the results.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from nni_plugin.adapters.data import create_loaders
from nni_plugin.comparison.cells import do_cell
from nni_plugin.comparison.job import CELLS, DENSE, STORE, Cell, ComparisonJob
from nni_plugin.comparison.launch import Launched, on_its_own, take_gpu, wait_for
from nni_plugin.comparison.report import RESULTS, write_results
from nni_plugin.comparison.results import Row, row_of, to_csv
from nni_plugin.comparison.store import NOT_ASKED, Outcome, Store, without_password
from nni_plugin.errors import OutputError, TrainingError
from nni_plugin.machine import describe_machine, library_versions, usable_device
from nni_plugin.network_job import network_of
from nni_plugin.workspace import other_settings, write_file

READY, SETTINGS = "ready", "settings.json"
"""In the output folder: the run whose cells the store holds, for the processes of `torchrun`; what all cells share."""


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
        A row for every cell in the folder that is done, of earlier runs too; none in a process of `torchrun` but the
        first. Cells that a method refused, or that failed, are named in a warning and in the report.

    Raises:
        OutputError: The folder holds a comparison and `resume` is not given, or one with other settings.
        TrainingError: No cell was done.
        KeyboardInterrupt: It was interrupted; what is done is kept.
    """
    with on_its_own() as launched:
        if launched is None or launched.rank == 0:
            return _lead(wanted, resume, command, say, launched)
        wait_for(wanted.output / READY, launched.run)
        take_gpu(launched.local_rank)
        _work(wanted, say)
        return []


def _lead(
    wanted: ComparisonJob, resume: bool, command: str, say: Callable[[str], None], launched: Launched | None
) -> list[Row]:
    folder, begun = wanted.output, time.perf_counter()
    _check_before(wanted)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            _agree(folder / SETTINGS, wanted.settings(), resume)
            store = _open(wanted)
            store.add(wanted.cells())
            write_file(folder / READY, launched.run if launched else "")
            try:
                _do_all(wanted, store, say)
            except KeyboardInterrupt:
                write_file(folder / RESULTS, to_csv(_rows(store.outcomes())))
                raise
            finally:
                store.note_run(_run(wanted, command, time.perf_counter() - begun))
            return _finish(wanted, store)
    except Timeout as error:
        raise OutputError(f"Another process is at work on the comparison in {str(folder)!r}; wait for it.") from error
    except OSError as error:
        raise OutputError(f"Cannot write to the output folder {str(folder)!r}: {error}.") from error
    finally:
        if launched is None:
            (folder / READY).unlink(missing_ok=True)
        if made:
            _remove_if_empty(folder)


def _check_before(wanted: ComparisonJob) -> None:
    """Refuse what would fail in every cell, before anything is written.

    Raises:
        NNIPluginError: The data or the network cannot be had, or the network would have random weights.
    """
    job = wanted.dense_job(wanted.seeds[0])
    given = all((wanted.output / DENSE / f"seed{seed}" / "config.json").is_file() for seed in wanted.seeds)
    if not (given or job.checkpoint or job.pretrained or job.pretrain.epochs):
        raise TrainingError(
            "The networks would have random weights, and methods cannot be compared on those: give --checkpoint, "
            "--pretrained or --pretrain-epochs."
        )
    splits = create_loaders(job.dataset, job.data_dir, seed=job.seed, **job.data_kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights, where dense networks are there already
        network_of(job, splits, usable_device(job.device))


def _agree(path: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Note what all cells of a folder share, or check that it is what was noted before.

    Raises:
        OutputError: The folder holds a comparison and `resume` is not given, or one with other settings.
    """
    if not path.is_file():
        write_file(path, json.dumps(settings, indent=1) + "\n")
        return
    if not resume:
        raise OutputError(
            f"{str(path.parent)!r} holds a comparison. Give --resume to go on with it, also with further methods, "
            "targets or seeds, or choose another --output."
        )
    try:
        others = other_settings(json.loads(path.read_text()), settings)
    except ValueError as error:
        raise OutputError(
            f"{str(path)!r} is damaged ({error}): remove {str(path.parent)!r}, or choose another --output."
        ) from error
    if others:
        raise OutputError(
            f"The comparison in {str(path.parent)!r} was begun with other settings: {others[0].said}. Give the same "
            "ones (methods, targets and seeds may grow), or choose another --output."
        )


def _run(wanted: ComparisonJob, command: str, seconds: float) -> dict[str, Any]:
    if wanted.storage:
        command = command.replace(wanted.storage, without_password(wanted.storage))
    return {"command": command, "seconds": round(seconds, 1), "processes": wanted.processes}


def _finish(wanted: ComparisonJob, store: Store) -> list[Row]:
    """Write the results of all cells that are done, of earlier runs too; returns their rows."""
    outcomes = store.outcomes()
    asked, rows = set(wanted.cells()), _rows(outcomes)
    not_done = [outcome for outcome in outcomes if outcome.cell in asked and outcome.metrics is None]
    for outcome in not_done:
        warnings.warn(f"{outcome.cell.name} {outcome.status}: {outcome.reason}", stacklevel=4)
    if not rows:
        raise TrainingError(f"No cell was done. The first, {not_done[0].cell.name}: {not_done[0].reason}")
    write_results(wanted.output, rows, _record(wanted, outcomes, store.runs()))
    return rows


def _open(wanted: ComparisonJob) -> Store:
    """Open the store; in a database of the user's own the comparison is named after its folder."""
    return Store(wanted.storage, str(wanted.output.resolve())) if wanted.storage else _own_store(wanted.output)


def _own_store(folder: Path) -> Store:
    return Store(f"sqlite:///{(folder / STORE).resolve()}")


def _rows(outcomes: Sequence[Outcome]) -> list[Row]:
    return [row_of(outcome.cell, outcome.metrics) for outcome in outcomes if outcome.metrics is not None]


def finished_rows(folder: Path) -> list[Row]:
    """Return a row for every cell that is done in a comparison's output folder, whichever call asked for it."""
    return _rows(_own_store(folder).outcomes())


def _record(wanted: ComparisonJob, outcomes: list[Outcome], runs: list[dict[str, Any]]) -> dict[str, Any]:
    hosts = {o.cell: o.metrics["host"] for o in outcomes if o.metrics is not None and "host" in o.metrics}
    shared = {method: _shared([hosts[cell] for cell in hosts if cell.method == method]) for method in _methods(hosts)}
    return {
        "runs": runs,
        "settings": wanted.settings(),
        "not_done": {
            o.cell.name: f"{o.status}: {o.reason}" for o in outcomes if o.metrics is None and o.reason != NOT_ASKED
        },
        "ours_alone": wanted.ours_alone(),
        "hosts": shared,
        "host_cells": {
            cell.name: {name: value for name, value in asked.items() if name not in shared[cell.method]}
            for cell, asked in hosts.items()
        },
        "latency_batch_size": wanted.template.latency_batch_sizes[0],
        "machine": describe_machine(),
        "versions": library_versions(("nni-plugin", "torch-pruning", "nni", "timm")),
    }


def _methods(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.method for cell in cells))


def _shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all of several settings have in common."""
    first, *others = settings
    return {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}


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
            _work(wanted, say)
            time.sleep(1.0)
    finally:
        torch.set_num_threads(before)
        for process in others:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work_elsewhere(wanted: ComparisonJob, number: int, threads: int) -> None:
    """Work in a process of its own, which ends with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    take_gpu(number)
    torch.set_num_threads(threads)
    with suppress(KeyboardInterrupt):
        _work(wanted, partial(print, flush=True))


def _work(wanted: ComparisonJob, say: Callable[[str], None]) -> None:
    """Take cells until none waits."""

    def do(cell: Cell) -> dict[str, Any]:
        say(f"{cell.name} ...")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a plan warns of, its own report says
            return do_cell(wanted, cell, say)

    _open(wanted).work(set(wanted.cells()), do, say)


def _remove_if_empty(folder: Path) -> None:
    """Take back a folder in which nothing was done."""
    for name in (".lock", SETTINGS, STORE) if not (folder / CELLS).exists() and not (folder / DENSE).exists() else ():
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
