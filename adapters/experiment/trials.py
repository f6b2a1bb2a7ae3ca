"""One trial of an experiment as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNING = ("UNKNOWN", "WAITING", "RUNNING")
"""What NNI calls a trial that is not over. Over are SUCCEEDED, FAILED, USER_CANCELED, SYS_CANCELED, EARLY_STOPPED."""

CANCELED = "USER_CANCELED"
"""What NNI calls a trial that was running when its user ended the experiment."""


@dataclass(frozen=True)
class Trial:
    """One trial.

    Args:
        number: From 0, in the order of their start.
        id: NNI's name of it.
        status: NNI's word: `"SUCCEEDED"`, `"FAILED"`, `"RUNNING"`, ...
        parameters: What the tuner chose; empty before that.
        value: What the tuner maximises; None before the trial has reported it.
        metrics: What else the trial reported with it.
        seconds: How long it ran; None while it does.
        log: Folder with `trial.stdout` and `trial.stderr`.
    """

    number: int
    id: str
    status: str
    parameters: Mapping[str, Any]
    value: float | None
    metrics: Mapping[str, Any]
    seconds: float | None
    log: str

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status not in RUNNING

    @property
    def succeeded(self) -> bool:
        """Whether it ended well and has reported its value."""
        return self.status == "SUCCEEDED" and self.value is not None

    def last_words(self) -> str:
        """Return the last line of its standard error, if it can be read here; else an empty text."""
        try:
            lines = Path(self.log, "trial.stderr").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def trial_of(job: Any) -> Trial:
    """Return NNI's record of a trial (`nni.experiment.TrialJob`) as plain data."""
    final = job.finalMetricData[-1].data if job.finalMetricData else None
    rest = {key: value for key, value in final.items() if key != "default"} if isinstance(final, dict) else {}
    value = final.get("default") if isinstance(final, dict) else final
    return Trial(
        number=job.sequenceId,
        id=job.trialJobId,
        status=job.status,
        parameters=job.hyperParameters[-1].parameters if job.hyperParameters else {},
        value=float(value) if isinstance(value, (int, float)) else None,
        metrics=rest,
        seconds=(job.endTime - job.startTime) / 1000 if job.endTime and job.endTime > 0 else None,
        log=job.logPath.removeprefix("file://localhost:").removeprefix("file://"),
    )
