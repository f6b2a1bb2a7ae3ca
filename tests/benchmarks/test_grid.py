"""Runs are done once and go on after a kill; statistics are those of scipy."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nni_plugin.benchmarks.grid import STATE, Grid, interval, mean_and_sd, paired, summary
from nni_plugin.errors import OutputError


def _grid(folder: Path, **settings: Any) -> Grid:
    return Grid(folder, settings, say=lambda line: None)


def test_a_run_is_done_once(tmp_path: Path) -> None:
    calls = []

    def work(state: Path) -> dict[str, Any]:
        calls.append(state)
        return {"top1": 90.5}

    assert not _grid(tmp_path).done("a/b")
    first = _grid(tmp_path, epochs=2).run("a/b", work, {"method": "x"})
    second = _grid(tmp_path, epochs=2).run("a/b", work, {"method": "x"})
    assert first == second == {"top1": 90.5}
    assert len(calls) == 1
    assert _grid(tmp_path).done("a/b")
    content = json.loads((tmp_path / "a" / "b.json").read_text())
    assert content == {"settings": {"epochs": 2, "method": "x"}, "result": {"top1": 90.5}}


def test_a_killed_run_finds_its_state_and_leaves_none_at_the_end(tmp_path: Path) -> None:
    def work(state: Path) -> dict[str, int]:
        trace = state / "steps"
        steps = len(trace.read_text()) if trace.exists() else 0
        trace.write_text("x" * (steps + 1))
        if steps == 0:
            raise KeyboardInterrupt
        return {"steps_before": steps}

    with pytest.raises(KeyboardInterrupt):
        _grid(tmp_path).run("run", work)
    assert not _grid(tmp_path).done("run")
    assert _grid(tmp_path).run("run", work) == {"steps_before": 1}
    assert not (tmp_path / STATE / "run").exists()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    _grid(tmp_path, epochs=2).run("run", lambda state: {})
    with pytest.raises(OutputError, match=r"epochs was 2, is now 3"):
        _grid(tmp_path, epochs=3).run("run", lambda state: {})
    with pytest.raises(OutputError, match=r"method was None, is now 'x'"):
        _grid(tmp_path, epochs=2).run("run", lambda state: {}, {"method": "x"})


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    _grid(tmp_path).run("run", lambda state: {})
    path = tmp_path / "run.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(OutputError, match=re.escape(str(path))):
        _grid(tmp_path).run("run", lambda state: {})


def test_a_result_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        _grid(tmp_path).run("run", lambda state: {"top1": float("nan")})
    assert not _grid(tmp_path).done("run")


@pytest.mark.parametrize("n", [2, 3, 10])
def test_summary_is_that_of_scipy(n: int) -> None:
    sample = np.random.default_rng(n).normal(90, 2, n)
    found = summary(sample)
    low, high = stats.t.interval(0.95, n - 1, loc=sample.mean(), scale=stats.sem(sample))
    assert found["n"] == n
    assert found["mean"] == pytest.approx(sample.mean(), rel=1e-14)
    assert found["sd"] == pytest.approx(sample.std(ddof=1), rel=1e-12)
    assert (found["low"], found["high"]) == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))


def test_what_needs_two_values_is_none_for_one() -> None:
    assert summary([3.0]) == {"n": 1, "mean": 3.0, "sd": None, "low": None, "high": None}
    assert summary([]) == {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    assert (mean_and_sd(summary([3.0])), interval(summary([3.0]))) == ("3.00", "-")
    assert mean_and_sd(summary([])) == "-"


def test_pairs_are_by_seed() -> None:
    first, second = {2: 5.0, 0: 1.0, 7: 9.0}, {0: 0.0, 2: 1.0, 3: 100.0}
    assert paired(first, second) == summary([1.0, 4.0])
