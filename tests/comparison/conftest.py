"""Comparisons that take seconds: ResNet-20 on digits of 8 pixels, timed shortly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nni_plugin.job_steps
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.budgets import MACs
from nni_plugin.comparison.job import ComparisonJob
from nni_plugin.job import Job


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = nni_plugin.job_steps.measure_pair

    def quick(*args: Any, **kwargs: Any) -> Any:
        return measure(*args, **{**kwargs, "rounds": 3, "min_run_time": 0.01})

    monkeypatch.setattr(nni_plugin.job_steps, "measure_pair", quick)


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., ComparisonJob]:
    """Make a comparison; arguments replace its fields."""
    template = Job(
        model="resnet20",
        library="nni_plugin",
        output=tmp_path,
        budget=MACs(0.5),
        data_kwargs={"batch_size": 128, "img_size": 8, "in_chans": 1, "train_fraction_held_out": 0.6},
        pretrain=TrainingConfig(epochs=1),
        finetune=TrainingConfig(epochs=1, lr=0.02),
        score_batches=1,
        score_steps=1,
        latency_batch_sizes=(1,),
        device="cpu",
    )

    def make(**fields: Any) -> ComparisonJob:
        given = {"methods": ("taylor-fo", "tp:magnitude"), "budgets": (MACs(0.5),), "seeds": (0, 1), **fields}
        return ComparisonJob(template=template, output=given.pop("output", tmp_path / "compared"), **given)

    return make
