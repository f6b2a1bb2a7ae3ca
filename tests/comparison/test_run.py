"""A comparison from end to end: the grid is complete and fair, interrupted or not, in one process or in two."""

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

import nni_plugin
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.budgets import Channels, Latency, MACs, Params
from nni_plugin.comparison import latency_target
from nni_plugin.comparison import run as running
from nni_plugin.comparison.job import CELLS, Cell, ComparisonJob
from nni_plugin.comparison.results import Row
from nni_plugin.comparison.run import finished_rows, run_comparison
from nni_plugin.cost import count
from nni_plugin.errors import (
    BudgetError,
    CriterionError,
    DataError,
    ModelError,
    OutputError,
    ScheduleError,
    TrainingError,
)
from nni_plugin.latency import Latency as Timing
from nni_plugin.latency import LatencyPair

Make = Callable[..., ComparisonJob]


def silent(text: str) -> None:
    pass


def outcome(rows: list[Row]) -> set[tuple[Any, ...]]:
    """What must not depend on how the comparison was run."""
    return {(r.method, r.target, r.seed, r.macs_ratio, r.top1_baseline, r.top1_before_finetune, r.top1) for r in rows}


def test_every_cell_starts_from_its_seeds_dense_network_and_meets_its_target(comparison: Make) -> None:
    wanted = comparison(methods=("obs", "tp:magnitude"))
    rows = run_comparison(wanted, command="the command", say=silent)
    assert {(r.method, r.target, r.seed) for r in rows} == {(c.method, c.target, c.seed) for c in wanted.cells()}
    assert len(rows) == 4
    for row in rows:
        ratio = float(row.target.removeprefix("macs="))
        assert ratio - 0.06 < row.macs_ratio <= ratio
        assert 0 < row.params_ratio < 1
    for seed in (0, 1):
        assert len({row.top1_baseline for row in rows if row.seed == seed}) == 1
    assert len({row.top1_baseline for row in rows}) == 2

    files = {path.name for path in wanted.output.iterdir()}
    plots = {f"accuracy-{cost}_ratio.svg" for cost in ("macs", "params", "latency")} | {
        "accuracy-macs_ratio-before.svg"
    }
    state = {"comparison.sqlite", "settings.json", ".lock", "dense", "cells"}
    assert files == {"results.csv", "report.html", "comparison.json", *state, *plots}
    with (wanted.output / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [(r["method"], r["target"], int(r["seed"])) for r in read] == [(r.method, r.target, r.seed) for r in rows]
    assert [float(r["top1"]) for r in read] == pytest.approx([r.top1 for r in rows], abs=0.005)

    page = (wanted.output / "report.html").read_text()
    assert not re.search(r'(src|href)="?(https?:)?//', page)
    assert page.count("<svg") == 4
    for text in (
        "Paired differences",
        "Where we lose, or are not known to win",
        "the command",
        "tp:magnitude",
        "BasePruner",
    ):
        assert text in page
    machine = re.findall(r"<dt>(.*?)</dt>", page)
    assert len(set(machine)) == len(machine)  # each library's version once
    # What one of our methods gave can be loaded; its report lies beside it.
    cell = wanted.output / CELLS / Cell("obs", "macs=0.5", 1).name
    assert nni_plugin.from_pretrained(cell).pruning_plan.provenance["seed"] == 1


def test_two_processes_give_what_one_gives(comparison: Make, tmp_path: Path) -> None:
    grid = {"methods": ("magnitude", "tp:random"), "seeds": (0,)}
    alone = run_comparison(comparison(**grid), say=silent)
    shared = run_comparison(comparison(**grid, processes=2, output=tmp_path / "shared"), say=silent)
    assert outcome(alone) == outcome(shared)


def test_interrupted_and_resumed_gives_what_an_uninterrupted_one_gives(
    comparison: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"methods": ("magnitude",), "seeds": (0, 1, 2)}
    expected = run_comparison(comparison(**grid, output=tmp_path / "whole"), say=silent)
    do_cell, done = running.do_cell, []

    def interrupted(wanted: ComparisonJob, cell: Cell, say: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell)
        return do_cell(wanted, cell, say)

    monkeypatch.setattr(running, "do_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(comparison(**grid), say=silent)
    monkeypatch.setattr(running, "do_cell", do_cell)
    with pytest.raises(OutputError, match="--resume"):
        run_comparison(comparison(**grid), say=silent)
    assert outcome(run_comparison(comparison(**grid), resume=True, say=silent)) == outcome(expected)


def test_a_finished_comparison_takes_more_methods_without_doing_anything_twice(comparison: Make) -> None:
    first = run_comparison(comparison(methods=("magnitude",), seeds=(0,)), command="first call", say=silent)
    said: list[str] = []
    more = comparison(methods=("magnitude", "tp:random-local"), budgets=(MACs(0.5), MACs(0.7)), seeds=(0,))
    rows = run_comparison(more, resume=True, command="second call", say=said.append)
    assert outcome(first) < outcome(rows)
    assert len(rows) == 4
    begun = {text for text in said if text.endswith("...")}
    assert begun == {f"{cell.name} ..." for cell in more.cells()} - {"magnitude-macs=0.5-seed0 ..."}
    assert outcome(finished_rows(more.output)) == outcome(rows)
    record = json.loads((more.output / "comparison.json").read_text())
    assert [run["command"] for run in record["runs"]] == ["first call", "second call"]
    assert all(run["seconds"] > 0 for run in record["runs"])
    # What a host was asked is told by cell where the cells differ.
    ratios = [record["host_cells"][f"tp_random-local-macs={target}-seed0"]["ratio"] for target in (0.5, 0.7)]
    assert ratios[0] != ratios[1]
    asked = record["hosts"]["tp:random-local"]
    assert (asked["importance"], asked["global_pruning"]) == ("RandomImportance", False)
    assert "ratio" not in asked
    assert "first call\nsecond call" in (more.output / "report.html").read_text()


def test_other_settings_are_refused(comparison: Make) -> None:
    wanted = comparison(methods=("magnitude",), seeds=(0,))
    run_comparison(wanted, say=silent)
    longer = dataclasses.replace(wanted.template.finetune, epochs=2)
    other = dataclasses.replace(wanted, template=dataclasses.replace(wanted.template, finetune=longer))
    with pytest.raises(OutputError, match="--epochs was 1, now 2"):
        run_comparison(other, resume=True, say=silent)
    timed = dataclasses.replace(wanted, template=dataclasses.replace(wanted.template, latency_batch_sizes=(2,)))
    with pytest.raises(OutputError, match="--latency-batch-sizes was \\[1\\], now \\[2\\]"):
        run_comparison(timed, resume=True, say=silent)
    with FileLock(wanted.output / ".lock"), pytest.raises(OutputError, match="Another process is at work"):
        run_comparison(wanted, resume=True, say=silent)


def test_what_would_fail_in_every_cell_is_refused_before_anything_is_written(comparison: Make, tmp_path: Path) -> None:
    wanted = comparison()
    for fields, error, text in (
        ({"dataset": "torch/fashion_mnist", "data_dir": tmp_path / "nothing"}, DataError, "nothing"),
        ({"model": "resnet21"}, ModelError, "resnet21"),
        ({"pretrain": TrainingConfig(epochs=0)}, TrainingError, "random weights"),
    ):
        with pytest.raises(error, match=text):
            run_comparison(dataclasses.replace(wanted, template=dataclasses.replace(wanted.template, **fields)))
        assert not wanted.output.exists()
    with pytest.raises(ScheduleError, match="one-shot"):
        dataclasses.replace(wanted, template=dataclasses.replace(wanted.template, schedule="iterative"))
    with pytest.raises(OutputError, match="cannot be opened"):
        run_comparison(dataclasses.replace(wanted, storage="nothing://here"), say=silent)
    assert not wanted.output.exists()


def test_what_a_method_refuses_is_told_and_the_others_go_on(comparison: Make) -> None:
    wanted = comparison(methods=("magnitude", "tp:magnitude"), budgets=(MACs(0.5), MACs(1e-4)), seeds=(0,))
    with pytest.warns(UserWarning, match="refused"):
        rows = run_comparison(wanted, say=silent)
    assert {row.target for row in rows} == {"macs=0.5"}
    told = json.loads((wanted.output / "comparison.json").read_text())["not_done"]
    assert set(told) == {"magnitude-macs=0.0001-seed0", "tp_magnitude-macs=0.0001-seed0"}
    assert "Not done" in (wanted.output / "report.html").read_text()


def test_whole_layers_are_compared_too(comparison: Make) -> None:
    wanted = comparison(methods=("imprinting",), budgets=(MACs(0.9),), seeds=(0,))
    enough = dataclasses.replace(wanted.template, score_batches=3, score_steps=None)  # some are held out
    [row] = run_comparison(dataclasses.replace(wanted, template=enough), say=silent)
    assert row.macs_ratio <= 0.9


def test_nothing_done_is_an_error(comparison: Make) -> None:
    with pytest.raises(TrainingError, match="No cell was done"), pytest.warns(UserWarning, match="refused"):
        run_comparison(comparison(budgets=(MACs(1e-4),), methods=("tp:magnitude",), seeds=(0,)), say=silent)


def test_processes_of_torchrun_are_hidden_from_training(comparison: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    # With WORLD_SIZE in sight, training would wait for the other process.
    assert len(run_comparison(comparison(methods=("magnitude",), seeds=(0,)), say=silent)) == 1
    import os

    assert os.environ["WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"methods": ()}, BudgetError, "at least one method"),
        ({"budgets": (MACs(0.5), Params(0.5))}, BudgetError, "one kind"),
        ({"budgets": (Channels(0.5),)}, BudgetError, "one kind"),
        ({"methods": ("obss",)}, CriterionError, "did you mean"),
        ({"methods": ("tp:taylr-local",)}, CriterionError, "did you mean tp:taylor"),
        ({"methods": ("nni:l1-local",)}, CriterionError, "did you mean nni:l1"),
    ],
)
def test_bad_input(comparison: Make, fields: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        comparison(**fields)
    assert not comparison().output.exists()


def test_a_latency_is_a_target_for_built_in_methods_too(comparison: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_the_macs(dense: nn.Module, slim: nn.Module, shape: Any, sizes: Any, **_: Any) -> list[LatencyPair]:
        """Time by the multiply-accumulates, so that a busy machine changes nothing."""
        image, [size] = torch.zeros(1, *shape), sizes
        macs = [count(network, image).macs for network in (dense, slim)]
        first, second = (Timing(size, of / 1e6, 0.0, size / of * 1e9, 1, "cpu", "float32", 1) for of in macs)
        return [LatencyPair(first, second, macs[1] / macs[0], 1)]

    for module in (latency_target, nni_plugin.job_steps):
        monkeypatch.setattr(module, "measure_pair", as_the_macs)
    wanted = comparison(methods=("tp:magnitude",), budgets=(Latency(ratio=0.7, batch_size=32),), seeds=(0,))
    sizes = dataclasses.replace(wanted.template, latency_batch_sizes=(32,))
    [row] = run_comparison(dataclasses.replace(wanted, template=sizes), say=silent)
    assert row.target == "latency=0.7"
    assert row.latency_ratio == row.macs_ratio
    assert 0.7 * (1 - latency_target.NEAR) <= row.macs_ratio <= 0.7
