"""A job prunes by whatever method: layers, both, channels under a latency; asked in vain is refused before training."""

import dataclasses
import json
import re
from typing import Any

import latency_by_macs
import pytest
import torch
from torch import nn

import nni_plugin.latency
from nni_plugin import Channels, Latency, Layers, MACs, NNIPluginError, count, job_steps, marginal_cost, workflow
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.checkpoint import from_pretrained
from nni_plugin.errors import BudgetError, ScheduleError
from nni_plugin.job import Job
from nni_plugin.latency import LatencyPair
from nni_plugin.workflow import run_job
from nni_plugin.workspace import STATE

DATA = {"batch_size": 256, "img_size": 8}
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = nni_plugin.latency.measure_pair
    monkeypatch.setattr(job_steps, "measure_pair", lambda *args: measure(*args, min_run_time=1e-4, rounds=3))
    latency_by_macs.use(monkeypatch)
    monkeypatch.setattr(marginal_cost, "measure_pair", latency_by_macs.measure_pair)


def _job(output: Any, **changes: Any) -> Job:
    basis = Job("resnet20", output, MACs(0.5), library="nni_plugin", data_kwargs=DATA, latency_batch_sizes=(1,))
    return dataclasses.replace(basis, pretrain=TrainingConfig(1), score_batches=5, **changes)


def _run(job: Job, **more: Any) -> Any:
    return run_job(job, say=lambda text: None, **more)


@pytest.mark.parametrize("method", ["imprinting", "layer-taylor-fo", "layer-ensemble", "block-gate"])
def test_layers_leave(tmp_path: Any, method: str) -> None:
    result = _run(_job(tmp_path / "out", method=method, budget=Layers(2), ignore=("layer1.0",)))
    assert len(result.plan.removed_blocks) == 2
    assert "layer1.0" not in result.plan.removed_blocks
    assert result.metrics["removed"] == {"channels": 0, "blocks": 2}
    assert result.plan.provenance["method"] == method
    report = (tmp_path / "out" / "report.html").read_text()
    assert "blocks removed" in report
    assert all(f"<code>{block}</code>" in report for block in result.plan.removed_blocks)
    loaded = from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), result.model.eval()(X), rtol=0, atol=0)


def test_width_and_depth(tmp_path: Any) -> None:
    result = _run(_job(tmp_path / "out", method="obs-joint", budget=MACs(0.15), score_steps=2))
    assert result.metrics["pruned"]["macs"] <= 0.15 * result.metrics["baseline"]["macs"]
    assert result.plan.provenance["settled_losses"].keys() == {"1.0", "0.5", "0.0"}
    assert "reconstruct" in result.metrics["seconds"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert all(f"<code>{block}</code>" in report for block in result.plan.removed_blocks)
    loaded = from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), result.model.eval()(X), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["taylor-fo", "imprinting", "obs-joint"])
@pytest.mark.parametrize("in_ms", [False, True])
def test_latency(tmp_path: Any, method: str, in_ms: bool) -> None:
    dense = latency_by_macs.milliseconds(_built(), (3, 8, 8))
    budget = Latency(ms=0.7 * dense) if in_ms else Latency(0.7)
    result = _run(_job(tmp_path / "out", method=method, budget=budget, score_steps=1))
    assert latency_by_macs.milliseconds(result.model, (3, 8, 8)) <= 0.7 * dense
    assert ("latency (ms)" if in_ms else "latency kept") in (tmp_path / "out" / "report.html").read_text()


def test_latency_that_did_not_follow_is_said_everywhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the budget was: here MACs are halved, and the clock stands still."""

    def still(*_: Any) -> list[LatencyPair]:
        ms = nni_plugin.latency.Latency(1, 2.0, 0.0, 500.0, 1, "cpu", "float32", 1)
        return [LatencyPair(ms, dataclasses.replace(ms, median_ms=1.96), 0.98, 3)]

    monkeypatch.setattr(job_steps, "measure_pair", still)
    said: list[str] = []
    result = run_job(_job(tmp_path / "out"), say=said.append)
    [note] = result.metrics["notes"]
    assert re.match(r"MACs fell to 0\.(4\d\d|500) of the dense network, latency at batch 1 only to 0\.980: ", note)
    assert note in said
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"] == [note]
    assert note in (tmp_path / "out" / "report.html").read_text()
    assert result.plan.provenance["round_to"] == 1


def _built() -> nn.Module:
    from nni_plugin.networks import resnet20

    return resnet20(in_chans=3).eval()


def test_a_resumed_run_keeps_its_plan(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times measured anew would give another plan; what the network was cut by stands in the state."""
    job = _job(tmp_path / "out", method="imprinting", budget=Latency(0.7), finetune=TrainingConfig(1))
    whole = _run(dataclasses.replace(job, output=tmp_path / "whole"))

    class Killed(BaseException):
        pass

    def killed(*_: Any, phase: str, **__: Any) -> Any:
        if phase == "finetune":
            raise Killed
        return fit(*_, phase=phase, **__)

    fit = workflow.fit
    monkeypatch.setattr(workflow, "fit", killed)
    with pytest.raises(Killed):
        _run(job)
    stored = json.loads((tmp_path / "out" / STATE / "planned.json").read_text())
    monkeypatch.setattr(workflow, "fit", fit)
    monkeypatch.setattr(workflow, "make_plan", lambda *_: pytest.fail("the plan is made a second time"))
    resumed = _run(job, resume=True)
    assert resumed.plan.removed_blocks == whole.plan.removed_blocks
    assert json.loads(stored["plan"])["removed_blocks"] == list(resumed.plan.removed_blocks)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_latency_met_while_training_is_there_after_a_resumed_run(tmp_path: Any, monkeypatch: Any) -> None:
    job = _job(tmp_path / "out", budget=Latency(0.7), schedule="iterative", finetune=TrainingConfig(2))

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    save = workflow.save_pretrained
    monkeypatch.setattr(workflow, "save_pretrained", killed)
    with pytest.raises(Killed):
        _run(job)
    monkeypatch.setattr(workflow, "save_pretrained", save)
    assert _run(job, resume=True).plan.provenance["latency"]["ratio"] <= 0.7


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (BudgetError, "removes channels", {"method": "taylor-fo", "budget": Layers(1)}),
        (BudgetError, "whole layers", {"method": "imprinting", "budget": Channels(0.5)}),
        (BudgetError, "channels and layers", {"method": "obs-joint", "budget": Layers(1)}),
        (BudgetError, "only 7 blocks", {"method": "imprinting", "budget": Layers(9)}),
        (BudgetError, "remain", {"method": "imprinting", "budget": Latency(0.01)}),
        (BudgetError, "remain", {"method": "taylor-fo", "budget": Latency(0.001)}),
        (BudgetError, "met by the network", {"method": "imprinting", "budget": MACs(1.0)}),
        (BudgetError, "remain", {"method": "obs-joint", "budget": MACs(0.0001)}),
        (BudgetError, "only 6 blocks", {"method": "imprinting", "budget": Layers(7), "ignore": ("layer1.0",)}),
        (NNIPluginError, "'nope'", {"method": "imprinting", "budget": Layers(1), "ignore": ("nope",)}),
        (BudgetError, "--round-to", {"method": "imprinting", "budget": Layers(1), "round_to": 8}),
        (BudgetError, "--select", {"method": "obs-joint", "select": "no-skip"}),
        (ScheduleError, "one-shot", {"method": "imprinting", "budget": Layers(1), "schedule": "iterative"}),
        (NNIPluginError, "did you mean imprinting", {"method": "imprint", "budget": Layers(1)}),
    ],
)
def test_asked_in_vain(tmp_path: Any, error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    before = count(_built(), X)
    with pytest.raises(error, match=match):
        _run(_job(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    assert count(_built(), X) == before
