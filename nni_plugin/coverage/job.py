"""All models of a list, a process each; rows are kept as they come, so that an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from nni_plugin.budgets import MACs
from nni_plugin.coverage.check import Verdict, Wanted, check_model
from nni_plugin.coverage.listing import Case
from nni_plugin.coverage.processes import Ended, Limits, run_each
from nni_plugin.coverage.results import Row, append, read, to_csv
from nni_plugin.workspace import Workspace, workspace

RESULT = "coverage.csv"
"""File in the output folder."""


@dataclass(frozen=True)
class CoverageJob:
    """What to try.

    Args:
        cases: The models.
        macs: Fraction of the multiply-accumulates to keep.
        seconds: CPU-seconds that each may take, on one thread.
        workers: Models at a time.
        seed: Of weights, statistics, images and scores.
        device: Where to do it; None: the best there is.
        output: Folder for `coverage.csv`; None writes nothing.
    """

    cases: Sequence[Case]
    macs: float = 0.5
    seconds: int = 60
    workers: int = 2
    seed: int = 0
    device: str | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        """Check the budget."""
        MACs(self.macs)


def run_coverage(job: CoverageJob, *, resume: bool = False, say: Callable[[str], None] = print) -> list[Row]:
    """Try every model.

    Args:
        job: What to try.
        resume: Take over the rows of the interrupted run in the output folder; the list may be another one.
        say: Takes one line a model.

    Returns:
        A row a model, in the order of the list.

    Raises:
        OutputError: The output folder cannot be written to, or holds a run with other settings.
        KeyboardInterrupt: It was interrupted; what is done is kept in the output folder.
    """
    settings = {"macs": job.macs, "seconds": job.seconds, "seed": job.seed, "device": job.device}
    keeper = nullcontext(None) if job.output is None else workspace(job.output, settings, resume=resume)
    with keeper as places:
        rows = _rows(job, places, say)
        if places is not None:
            (places.results / RESULT).write_text(to_csv(rows), newline="", encoding="utf-8")
    return rows


def _rows(job: CoverageJob, places: Workspace | None, say: Callable[[str], None]) -> list[Row]:
    kept = None if places is None else places.state / "rows.csv"
    known = [] if kept is None else read(kept)
    found = {(row.library, row.model): row for row in known}
    left = [case for case in job.cases if (case.library, case.model) not in found]
    if found:
        say(f"{len(job.cases) - len(left)} of {len(job.cases)} models are done already")
    wanted = Wanted(job.macs, job.seed, job.device)
    calls = ((case, wanted) for case in left)
    limits = Limits.shared(job.seconds, job.workers)
    for index, ended in run_each(check_model, calls, limits, workers=job.workers, preload=[__name__]):
        row = row_of(left[index], ended)
        if kept is not None:
            append(kept, row)
        found[row.library, row.model] = row
        say(f"{len(job.cases) - len(left) + index + 1}/{len(job.cases)} {_line(row)}")
    return [found[case.library, case.model] for case in job.cases]


def row_of(case: Case, ended: Ended) -> Row:
    """Return what is said of a model whose process ended like this."""
    verdict = ended.value if isinstance(ended.value, Verdict) else Verdict("failed", ended.problem)
    return Row(
        library=case.library,
        model=case.model,
        status=verdict.status,
        reason=verdict.reason,
        macs_ratio=ended.numbers.get("macs_ratio"),
        parity_max_rel=ended.numbers.get("parity_max_rel"),
        seconds=ended.seconds,
    )


def _line(row: Row) -> str:
    seconds = "" if row.seconds is None else f" in {row.seconds:.1f} s"
    reason = f": {row.reason}" if row.reason else ""
    return f"{row.library} {row.model}: {row.status}{seconds}{reason}"
