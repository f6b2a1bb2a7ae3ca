"""The state of every cell, in a database through Optuna: a cell is a trial.

Any number of processes, on any number of machines that reach the database, take waiting cells; each is taken once. A
process tells that it lives while it works; a cell whose process died waits again. A method that cannot prune a network
or reach a target is a result (a pruned trial in Optuna's words); anything else that goes wrong is a failed trial, and
is tried again by the next run.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from nni_plugin.comparison.job import Cell, from_json, to_json
from nni_plugin.errors import BudgetError, CriterionError, GraphError, OutputError, SurgeryError

REFUSALS = (BudgetError, CriterionError, GraphError, SurgeryError)
"""What a method says of a network or a target; other errors say something of the run."""

NOT_ASKED = "not asked for"
"""Reason of a cell that waited and that a later run did not want."""

HEARTBEAT = 60
"""Seconds between two signs of life of a working process; after twice that its cell is given to another."""

Status = Literal["waiting", "running", "done", "refused", "failed"]
_STATUS: dict[TrialState, Status] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "refused",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Outcome:
    """What is known of a cell.

    Args:
        cell: Which.
        status: `"refused"` by the method with a reason, `"failed"` unexpectedly.
        metrics: As in `metrics.json`, when done.
        reason: Of what is refused or failed.
    """

    cell: Cell
    status: Status
    metrics: Mapping[str, Any] | None = None
    reason: str = ""


class Store:
    """A comparison's database.

    Args:
        url: As SQLAlchemy takes it, such as `sqlite:///compared/comparison.sqlite`.
        name: Of the comparison; a database may hold several.

    Raises:
        OutputError: It cannot be opened.
    """

    def __init__(self, url: str, name: str = "comparison") -> None:
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        with _quiet():
            try:
                storage = RDBStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=HEARTBEAT,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )
                self._study = optuna.create_study(
                    storage=storage, study_name=name, direction="maximize", load_if_exists=True
                )
            except Exception as error:  # of SQLAlchemy, Alembic or the database's driver
                raise OutputError(
                    f"The database {without_password(url)} cannot be opened: {type(error).__name__}. It is damaged, "
                    "not there, or its driver is not installed; choose another --output or --storage."
                ) from error

    def add(self, cells: Collection[Cell]) -> None:
        """Let cells wait that are new, have failed, or were running when everything was killed.

        To be called while no process works.
        """
        known = {outcome.cell: outcome for outcome in self.outcomes()}
        with _quiet():
            for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
                self._study.tell(trial.number, state=TrialState.FAIL)
            for cell in cells:
                before = known.get(cell)
                if before is None or before.status in ("failed", "running") or before.reason == NOT_ASKED:
                    self._study.enqueue_trial({}, user_attrs={"cell": to_json(cell)})

    def note_run(self, run: Mapping[str, Any]) -> None:
        """Add a call to those that have worked on this comparison.

        Args:
            run: JSON values that tell of it.
        """
        self._study.set_user_attr("runs", [*self.runs(), dict(run)])

    def runs(self) -> list[dict[str, Any]]:
        """Return what was noted of the calls so far, the first one first."""
        return list(self._study.user_attrs.get("runs", ()))

    def outcomes(self) -> list[Outcome]:
        """Return the latest of every cell, in the order in which they were first added."""
        found: dict[Cell, Outcome] = {}
        for trial in self._study.get_trials(deepcopy=False):
            outcome = _outcome(trial)
            if outcome is not None:
                found[outcome.cell] = outcome
        return list(found.values())

    def finished(self) -> bool:
        """Return whether no cell waits or runs; cells of processes that died meanwhile wait again."""
        with _quiet():
            optuna.storages.fail_stale_trials(self._study)
            return not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))

    def work(
        self, cells: Collection[Cell], do: Callable[[Cell], Mapping[str, Any]], say: Callable[[str], None]
    ) -> None:
        """Take cells until none waits.

        Args:
            cells: Those that are wanted; others that wait, of an earlier run, are put aside.
            do: Does a cell; returns its metrics.
            say: Takes a line a cell.
        """

        def objective(trial: optuna.Trial) -> float:
            if "cell" not in trial.user_attrs:  # another process was faster: this trial is none of ours
                raise optuna.TrialPruned
            cell = from_json(trial.user_attrs["cell"])
            if cell not in cells:
                trial.set_user_attr("reason", NOT_ASKED)
                raise optuna.TrialPruned
            try:
                metrics = do(cell)
            except REFUSALS as error:
                trial.set_user_attr("reason", str(error))
                say(f"{cell.name}: refused: {error}")
                raise optuna.TrialPruned from error
            except Exception as error:
                trial.set_user_attr("reason", "".join(traceback.format_exception_only(error)).strip())
                say(f"{cell.name}: failed: {traceback.format_exc()}")
                raise
            trial.set_user_attr("metrics", dict(metrics))
            say(f"{cell.name}: top-1 {metrics['pruned']['top1']:.2f} %")
            return float(metrics["pruned"]["top1"])

        with _quiet():
            while self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                # One cell that fails in an unforeseen way must not end the others; it is told as failed.
                self._study.optimize(objective, n_trials=1, catch=(Exception,))


def without_password(url: str) -> str:
    """Return a database's address as it may be shown.

    Example:
        >>> without_password("postgresql://me:secret@host/cells")
        'postgresql://me:***@host/cells'
    """
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "that was named"


def _outcome(trial: FrozenTrial) -> Outcome | None:
    text = trial.user_attrs.get("cell")
    if text is None:
        return None
    status = _STATUS[trial.state]
    return Outcome(
        from_json(text),
        status,
        trial.user_attrs.get("metrics") if status == "done" else None,
        trial.user_attrs.get("reason", "its process was killed") if status in ("refused", "failed") else "",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from telling of trials, and of features that it calls experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
