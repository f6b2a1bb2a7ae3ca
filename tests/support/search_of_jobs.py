"""Jobs that search over gates on digits, in seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nni_plugin import MACs
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.job import Job
from nni_plugin.workflow import run_job

DATA = {"batch_size": 64, "img_size": 8}
QUICK = {"steps": 40, "predictor_start": 6, "predictor_warmup": 2, "predictor_batch": 8, "memory": 10, "candidates": 2}
FURTHER = {name: value for name, value in QUICK.items() if name != "steps"}
"""Options of a search whose performance network has a say in two thirds of it."""


def job_of(output: Path, **changes: Any) -> Job:
    """Return a job with a quick search; keywords are its fields."""
    basis = Job(
        "resnet20",
        output,
        MACs(0.5),
        library="nni_plugin",
        method="nppm",
        model_kwargs={"width_mult": 0.5},
        data_kwargs=DATA,
        latency_batch_sizes=(1,),
        search_steps=QUICK["steps"],
        search_kwargs=FURTHER,
        pretrain=TrainingConfig(1),
    )
    return dataclasses.replace(basis, **changes)


def run(job: Job, **more: Any) -> Any:
    """Run a job silently."""
    return run_job(job, say=lambda text: None, **more)
