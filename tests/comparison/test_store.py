"""The state of cells: each is taken once, what dies or fails waits again, what is done stays."""

from pathlib import Path
from typing import Any

import pytest

from nni_plugin.comparison.job import Cell
from nni_plugin.comparison.store import NOT_ASKED, Store
from nni_plugin.errors import BudgetError, DataError, OutputError

CELLS = [Cell(method, "macs=0.5", seed) for method in ("obs", "tp:magnitude") for seed in (0, 1)]


def metrics(top1: float) -> dict[str, Any]:
    return {"pruned": {"top1": top1}}


def silent(text: str) -> None:
    pass


def opened(folder: Path) -> Store:
    return Store(f"sqlite:///{folder / 'cells.sqlite'}")


def test_two_workers_share_the_cells(tmp_path: Path) -> None:
    opened(tmp_path).add(CELLS)
    first: list[Cell] = []
    second: list[Cell] = []

    def slow(cell: Cell) -> dict[str, Any]:
        first.append(cell)
        if len(first) == 1:  # meanwhile another process does all that waits
            opened(tmp_path).work(CELLS, lambda other: second.append(other) or metrics(1.0), silent)  # type: ignore[func-returns-value]
        return metrics(2.0)

    opened(tmp_path).work(CELLS, slow, silent)
    assert first == CELLS[:1]
    assert second == CELLS[1:]
    outcomes = opened(tmp_path).outcomes()
    assert [(o.cell, o.status, o.metrics) for o in outcomes] == [
        (CELLS[0], "done", metrics(2.0)),
        *((cell, "done", metrics(1.0)) for cell in CELLS[1:]),
    ]
    assert opened(tmp_path).finished()


def test_an_interrupted_cell_waits_again_and_nothing_is_done_twice(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(CELLS)
    done: list[Cell] = []

    def interrupted(cell: Cell) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell)
        return metrics(1.0)

    with pytest.raises(KeyboardInterrupt):
        store.work(CELLS, interrupted, silent)
    assert [o.status for o in opened(tmp_path).outcomes()] == ["done", "done", "failed", "waiting"]
    assert opened(tmp_path).outcomes()[2].reason == "its process was killed"
    again = opened(tmp_path)
    again.add(CELLS)
    again.work(CELLS, lambda cell: done.append(cell) or metrics(1.0), silent)  # type: ignore[func-returns-value]
    assert sorted(map(str, done)) == sorted(map(str, CELLS))
    assert {o.status for o in again.outcomes()} == {"done"}


def test_a_refusal_is_a_result_and_a_failure_is_tried_again(tmp_path: Path) -> None:
    def once(cell: Cell) -> dict[str, Any]:
        if cell == CELLS[0]:
            raise BudgetError("out of reach")
        if cell == CELLS[1]:
            raise ZeroDivisionError("a defect")
        return metrics(1.0)

    said: list[str] = []
    store = opened(tmp_path)
    store.add(CELLS)
    store.work(CELLS, once, said.append)
    outcomes = store.outcomes()
    assert [o.status for o in outcomes] == ["refused", "failed", "done", "done"]
    assert [o.reason for o in outcomes[:2]] == ["out of reach", "ZeroDivisionError: a defect"]
    assert any("Traceback" in text for text in said)
    tried: list[Cell] = []
    store.add(CELLS)
    store.work(CELLS, lambda cell: tried.append(cell) or metrics(3.0), silent)  # type: ignore[func-returns-value]
    assert tried == [CELLS[1]]
    assert store.outcomes()[1].metrics == metrics(3.0)


def test_cells_that_are_no_longer_wanted_are_put_aside_until_they_are(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(CELLS)
    done: list[Cell] = []
    store.work(CELLS[:1], lambda cell: done.append(cell) or metrics(1.0), silent)  # type: ignore[func-returns-value]
    assert done == CELLS[:1]
    assert [o.reason for o in store.outcomes()] == ["", *[NOT_ASKED] * 3]
    assert store.finished()
    store.add(CELLS[:2])
    store.work(CELLS[:2], lambda cell: done.append(cell) or metrics(1.0), silent)  # type: ignore[func-returns-value]
    assert done == CELLS[:2]


def test_an_error_of_the_run_is_no_refusal_of_the_method(tmp_path: Path) -> None:
    def without_data(cell: Cell) -> dict[str, Any]:
        raise DataError("no such folder")

    store = opened(tmp_path)
    store.add(CELLS[:1])
    store.work(CELLS, without_data, silent)
    assert [o.status for o in store.outcomes()] == ["failed"]


def test_comparisons_share_a_database_under_their_names(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'cells.sqlite'}"
    Store(url, "one").add(CELLS[:1])
    assert Store(url, "two").outcomes() == []
    assert len(Store(url, "one").outcomes()) == 1


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cells.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OutputError, match="cannot be opened"):
        opened(tmp_path)


def test_a_password_is_not_shown() -> None:
    with pytest.raises(OutputError) as raised:
        Store("nothing+driver://me:secret@nowhere/cells")
    assert "secret" not in str(raised.value)
