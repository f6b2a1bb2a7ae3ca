"""The main job as a function: what it returns, what it says, and what decides its outcome."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nni_plugin.latency
from nni_plugin import Channels, Continuous, Iterative, MACs, NNIPluginError, Params, PruningPlan
from nni_plugin import job_steps as module
from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.checkpoint import from_pretrained
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.job import Job, schedule_of
from nni_plugin.workflow import run_job

DATA = {"batch_size": 256, "img_size": 8}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    measure = nni_plugin.latency.measure_pair
    monkeypatch.setattr(module, "measure_pair", lambda *args: measure(*args, min_run_time=1e-4, rounds=3))


def _job(output, **changes):
    basis = Job("resnet20", output, MACs(0.5), library="nni_plugin", data_kwargs=DATA, latency_batch_sizes=(1,))
    return dataclasses.replace(basis, pretrain=TrainingConfig(1), score_batches=2, **changes)


def test_result_is_what_was_written(tmp_path):
    lines = []
    result = run_job(_job(tmp_path / "out"), say=lines.append, command="the command that was run")
    assert result.metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result.plan == PruningPlan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert lines[0].startswith("digits: ")
    assert lines[1].startswith("dense: top-1 ")
    assert result.plan.explain() in lines
    assert "the command that was run" in (tmp_path / "out" / "report.html").read_text()

    images = torch.randn(4, 3, 8, 8)
    loaded = from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), result.model.eval()(images), rtol=0, atol=0)


def test_nothing_but_the_job_decides(tmp_path):
    """Neither the random state of the caller nor what ran before in this process."""
    first = run_job(_job(tmp_path / "first"), say=lambda text: None)
    torch.manual_seed(99)
    torch.randn(5)
    again = run_job(_job(tmp_path / "again"), say=lambda text: None)
    assert first.plan.digest == again.plan.digest
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


CHANGES = {
    "model": "resnet56", "budget": MACs(0.4), "library": "timm", "model_kwargs": {"a": 1}, "checkpoint": "x.pt",
    "pretrained": True, "dataset": "ImageFolder", "data_dir": "data", "data_kwargs": {**DATA, "batch_size": 64},
    "method": "taylor-fo-weight", "schedule": "iterative", "prune_channels": 7, "prune_every": 7,
    "loss_threshold": 2.0, "score_batches": 9, "round_to": 8, "min_channels": 2, "ignore": ("conv1",),
    "finetune": TrainingConfig(3), "seed": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_settings_hold_what_decides_the_outcome(tmp_path, field):
    job = _job(tmp_path)
    other = dataclasses.replace(job, **{field: CHANGES[field]})
    assert other.settings() != job.settings()
    assert json.loads(json.dumps(other.settings())) == other.settings()


def test_settings_leave_out_where_the_results_go(tmp_path):
    assert _job(tmp_path / "a").settings() == _job(tmp_path / "b").settings()


@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.5), Channels(3), Channels(0.5)])
def test_settings_tell_budgets_apart(tmp_path, budget):
    others = {repr(other) for other in (MACs(0.5), Params(0.5), Channels(3), Channels(0.5)) if other != budget}
    assert _job(tmp_path / "x").settings()["budget"] == repr(MACs(0.5))
    assert dataclasses.replace(_job(tmp_path), budget=budget).settings()["budget"] not in others


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "resnet2O"},
        {"dataset": "digitz"},
        {"method": "nothing"},
        {"checkpoint": "missing.pt"},
        {"device": "banana"},
        {"ignore": ("nolayer",)},
        {"schedule": "iterative"},
        {"budget": MACs(1e-6)},
        {"budget": MACs(1.0)},
        {"data_kwargs": {"batch_size": 10**6}},
    ],
)
def test_errors_are_the_packages_own_and_leave_nothing(tmp_path, changes):
    with pytest.raises(NNIPluginError):
        run_job(_job(tmp_path / "out", **changes), say=lambda text: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["iterative", "continuous"])
@pytest.mark.parametrize("channels", [1, 7, 432, 5000])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 39, 400, 23400])
def test_schedule_is_over_within_the_first_half(tmp_path, kind, channels, steps):
    made = schedule_of(dataclasses.replace(_job(tmp_path), schedule=kind), steps, channels)
    assert isinstance(made, Continuous if kind == "continuous" else Iterative)
    needed = math.ceil(channels / made.channels) * made.minibatches
    assert needed <= max(1, steps // 2)
    assert made.minibatches <= 30


def test_schedule_takes_what_the_user_says(tmp_path):
    job = dataclasses.replace(
        _job(tmp_path), schedule="continuous", prune_every=4, prune_channels=9, loss_threshold=0.5
    )
    made = schedule_of(job, 100, 400)
    assert (made.minibatches, made.channels, made.loss_threshold) == (4, 9, 0.5)


def test_cross_entropy_is_the_mean_over_the_images():
    model = nn.Linear(5, 3)
    images, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    each = -F.log_softmax(model(images), dim=1)[range(6), labels]
    torch.testing.assert_close(cross_entropy(model, (images, labels)), each.mean())


def test_after_reconstruction_normalisations_have_the_statistics_of_what_they_read(tmp_path):
    job = _job(tmp_path / "out", method="obs")
    model = run_job(job, say=lambda text: None).model.eval()
    splits = create_loaders(job.dataset, None, seed=job.seed, **DATA)
    norm, read = model.bn1, []
    handle = norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        for images, _ in list(splits.score)[: job.score_batches]:
            model(images)
    handle.remove()
    values = torch.cat(read).movedim(1, 0).flatten(1)
    torch.testing.assert_close(norm.running_mean, values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, values.var(1, correction=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("reconstruct", "steps"), [(None, 1), (False, 10)])
def test_steps_of_a_method_that_compensates(tmp_path, reconstruct, steps):
    job = _job(tmp_path / "out", method="obs", reconstruct=reconstruct)
    assert len(run_job(job, say=lambda text: None).plan.provenance["steps"]) == steps
