"""Lists of models from end to end: rows in the order of the list, kept as they come, taken over by a resumed run."""

from collections.abc import Sequence
from pathlib import Path

import misbehaving
import pytest

from nni_plugin.coverage import job as module
from nni_plugin.coverage.job import CoverageJob, run_coverage
from nni_plugin.coverage.listing import Case
from nni_plugin.coverage.processes import Ended
from nni_plugin.coverage.results import COLUMNS, read
from nni_plugin.errors import BudgetError, OutputError

CASES = [Case("timm", "hangs"), Case("timm", "refuses"), Case("timm", "works")]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check_model", misbehaving.judge)


def job(output: Path | None, cases: Sequence[Case] = CASES, **options: float) -> CoverageJob:
    return CoverageJob(cases, seconds=1, device="cpu", output=output, **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("judged")
def test_rows_are_in_the_order_of_the_list(tmp_path: Path) -> None:
    said: list[str] = []
    rows = run_coverage(job(tmp_path / "new"), say=said.append)
    assert [(row.model, row.status) for row in rows] == [("hangs", "failed"), ("refuses", "refused"), ("works", "ok")]
    assert rows[0].reason == "more than 1 CPU-seconds, while planning"
    assert (rows[0].seconds, rows[0].macs_ratio, rows[0].parity_max_rel) == (1.0, 0.5, None)
    assert rows[1].reason == "layer 'a' cannot be cut"
    assert (rows[2].macs_ratio, rows[2].parity_max_rel) == (0.5, 1e-7)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["coverage.csv"]
    assert [row.model for row in read(tmp_path / "new" / "coverage.csv")] == ["hangs", "refuses", "works"]
    assert sorted(line.split(" timm ")[0] for line in said) == ["1/3", "2/3", "3/3"]
    assert any("timm hangs: failed in 1.0 s: more than 1 CPU-seconds" in line for line in said)


@pytest.mark.usefixtures("judged")
def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [row.status for row in run_coverage(job(None, CASES[2:]), say=lambda _: None)] == ["ok"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("judged")
def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_coverage(job(tmp_path, CASES[1:], workers=1), say=interrupt)
    assert not (tmp_path / "coverage.csv").exists()
    kept = tmp_path / ".state" / "rows.csv"
    assert [row.model for row in read(kept)] == ["refuses"]
    kept.write_text(kept.read_text().replace("refused", "failed"))  # so that it shows whose row it is
    said: list[str] = []
    # The list may have changed: what is on it no more is left out.
    rows = run_coverage(job(tmp_path, [CASES[2], CASES[1]]), resume=True, say=said.append)
    assert [(row.model, row.status) for row in rows] == [("works", "ok"), ("refuses", "failed")]
    assert said[0] == "1 of 2 models are done already"
    assert said[1].startswith("2/2 timm works: ok")
    assert [path.name for path in tmp_path.iterdir()] == ["coverage.csv"]


@pytest.mark.usefixtures("judged")
def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_coverage(job(tmp_path, CASES[2:]), say=interrupt)
    with pytest.raises(OutputError, match=r"macs was 0\.5, now 0\.6"):
        run_coverage(job(tmp_path, CASES[2:], macs=0.6), resume=True)
    (tmp_path / ".state" / "rows.csv").write_text("something\nelse\n")
    with pytest.raises(OutputError, match="damaged"):
        run_coverage(job(tmp_path, CASES[2:]), resume=True)


def test_a_ratio_that_makes_no_sense_is_refused_at_once() -> None:
    with pytest.raises(BudgetError, match=r"above 0 and at most 1, got 1\.5"):
        job(None, macs=1.5)


def test_a_process_that_told_nothing_is_a_failure() -> None:
    row = module.row_of(CASES[0], Ended(problem="crashed with SIGSEGV, while starting"))
    assert (row.status, row.reason) == ("failed", "crashed with SIGSEGV, while starting")
    assert (row.macs_ratio, row.parity_max_rel, row.seconds) == (None, None, None)
    assert COLUMNS[-1] == "seconds"
