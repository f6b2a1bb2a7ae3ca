"""What an experiment makes of its trials: the table, the best, and what is kept on disk."""

import csv
import io
from types import SimpleNamespace

import pytest

from nni_plugin import experiment_job as module
from nni_plugin.adapters.experiment import Trial
from nni_plugin.errors import ExperimentError
from nni_plugin.experiment_job import best_of, trials_csv


def _trial(number, value=None, status="SUCCEEDED", **parameters):
    metrics = {} if value is None else {"top1": value + 1}
    return Trial(number, f"id{number}", status, parameters, value, metrics, 2.5, "/logs")


def test_the_best_is_the_first_of_the_highest():
    trials = [_trial(0, 1.0), _trial(1, 3.0), _trial(2, 3.0), _trial(3, 9.0, "FAILED"), _trial(4)]
    assert best_of(trials).number == 1
    assert best_of([_trial(0, status="FAILED"), _trial(1)]) is None
    assert best_of([]) is None
    assert best_of([_trial(0, -2.0), _trial(1, -1.0)]).number == 1  # values may be negative: sizes have a price


def test_table():
    trials = [_trial(0, 97.5, method="a,b", lr=0.1), _trial(1, None, "FAILED", method="obs")]
    rows = list(csv.DictReader(io.StringIO(trials_csv(trials, ["method", "lr"]))))
    assert rows == [
        {"trial": "0", "id": "id0", "status": "SUCCEEDED", "value": "97.5", "top1": "98.5", "seconds": "2.5",
         "method": "a,b", "lr": "0.1"},
        {"trial": "1", "id": "id1", "status": "FAILED", "value": "", "top1": "", "seconds": "2.5",
         "method": "obs", "lr": ""},
    ]  # fmt: skip
    assert trials_csv([], []) == "trial,id,status,value,seconds\r\n"


def test_only_the_best_network_stays(tmp_path):
    trials = [_trial(0, 1.0), _trial(1, 3.0), _trial(2, status="FAILED"), _trial(3, status="RUNNING")]
    for trial in trials:
        (tmp_path / trial.id).mkdir()
    module._keep_best(tmp_path, trials)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["id1", "id3"]


class _Server:
    """Answers as NNI's server does, one state after the other."""

    log = "/log"

    def __init__(self, *states, error=""):
        self.states, self.error = list(states), error

    def status(self):
        return self.states[0][0]

    def trials(self):
        return self.states.pop(0)[1]

    def tuner_error(self):
        return self.error


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))


def test_watching_ends_with_the_last_trial():
    lines = []
    running = _Server(
        ("RUNNING", []),
        ("RUNNING", [_trial(0, 90.0)]),
        ("NO_MORE_TRIAL", [_trial(0, 90.0), _trial(1, status="RUNNING")]),
        ("DONE", [_trial(0, 90.0), _trial(1, None, "FAILED", method="obs")]),
    )
    *_, last = module._watched(running, lines.append)
    assert [trial.status for trial in last] == ["SUCCEEDED", "FAILED"]
    assert [line.split(":")[0] for line in lines] == ["trial 0", "trial 1"]
    assert "90.00" in lines[0]
    assert "FAILED (method obs); its logs: /logs" in lines[1]


def test_a_tuner_that_has_tried_everything_ends_it():
    """NNI waits for ever then."""
    running = _Server(
        ("TUNER_NO_MORE_TRIAL", [_trial(0, status="RUNNING")]),
        ("TUNER_NO_MORE_TRIAL", [_trial(0, 1.0)]),
    )
    assert [[trial.status for trial in seen] for seen in module._watched(running, print)] == [
        ["RUNNING"],
        ["SUCCEEDED"],
    ]


def test_a_tuner_that_failed_ends_it():
    """So it does here."""
    running = _Server(
        ("RUNNING", [_trial(0, status="RUNNING")]), ("RUNNING", [_trial(0, 1.0)]), error="x0 must be flat"
    )
    seen = []
    with pytest.raises(ExperimentError, match=r"x0 must be flat.*/log"):
        seen.extend(module._watched(running, print))
    assert len(seen) == 2  # what was there has been given before


@pytest.mark.parametrize(
    ("statuses", "ends"),
    [
        (["FAILED", "FAILED"], False),
        (["FAILED", "FAILED", "RUNNING"], False),
        (["FAILED", "FAILED", "FAILED"], True),
        (["FAILED", "SUCCEEDED", "FAILED", "FAILED"], False),
    ],
)
def test_three_failures_and_no_success_are_enough(statuses, ends):
    trials = [_trial(n, 1.0 if status == "SUCCEEDED" else None, status) for n, status in enumerate(statuses)]
    assert module._hopeless(trials) is ends
