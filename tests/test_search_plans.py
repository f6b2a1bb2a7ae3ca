"""Jobs whose method is a search over gates: from end to end, what is held out, killed and resumed, asked in vain."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from search_of_jobs import DATA, FURTHER, QUICK, job_of, run

import nni_plugin.latency
from nni_plugin import Channels, Latency, MACs, Params, count, job_steps
from nni_plugin import search_plans as module
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.checkpoint import from_pretrained
from nni_plugin.errors import BudgetError, CriterionError, DataError, GraphError, ScheduleError, SearchError
from nni_plugin.job import Job
from nni_plugin.job_plans import method_of
from nni_plugin.networks import resnet20
from nni_plugin.performance import PerformanceMaximization, StepRecord
from nni_plugin.search_plans import SEARCHES, GateSearch, options_of, split, summary
from nni_plugin.workspace import STATE


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = nni_plugin.latency.measure_pair
    monkeypatch.setattr(job_steps, "measure_pair", lambda *args: measure(*args, min_run_time=1e-4, rounds=3))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("method", "budget"), [("nppm", MACs(0.5)), ("nppm-linear", Params(0.6))])
def test_from_end_to_end(tmp_path: Path, method: str, budget: Any) -> None:
    result = run(job_of(tmp_path / "out", method=method, budget=budget))
    before, after = result.metrics["baseline"], result.metrics["pruned"]
    name = "macs" if isinstance(budget, MACs) else "params"
    assert budget.ratio - 0.005 < after[name] / before[name] <= budget.ratio
    told = result.plan.provenance
    assert told["method"] == method
    assert told["minibatches"] == {"search": 4, "choice": 1}
    assert 0 <= told["held_out_accuracy"] <= 1
    assert told["search"]["predictor_loss"] > 0
    assert told["search"]["cost_ratio"] < 1
    assert all(".conv1" in group for group in result.plan.kept())  # inner layers alone
    stored = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert stored["provenance"]["search"] == told["search"]
    loaded = from_pretrained(tmp_path / "out")
    assert count(loaded, X).macs == after["macs"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), result.model.eval()(X), rtol=0, atol=0)


def test_gates_alone_on_all_groups(tmp_path: Path) -> None:
    """Residual groups have gates by option; there is no performance network to tell of."""
    job = job_of(tmp_path / "out", method="differentiable-gates", select="all", search_kwargs={}, search_steps=10)
    told = run(dataclasses.replace(job, score_batches=3))
    assert "conv1" in told.plan.kept()
    assert told.plan.provenance["search"]["predictor_loss"] is None
    assert told.plan.provenance["minibatches"] == {"search": 2, "choice": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of a job that nobody killed."""
    return run(job_of(tmp_path_factory.mktemp("whole"), finetune=TrainingConfig(1)))


class Killed(BaseException):
    """Ends a run as a signal would."""


@pytest.mark.parametrize("moment", [3, 30, "choice"])
def test_killed_and_resumed_it_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any, moment: Any
) -> None:
    """In the first steps, in the middle, and while it chooses; what it searched before the kill is not searched again.

    The learning of the gates must not depend on it, nor what is drawn and remembered.
    """
    monkeypatch.setattr(module, "_EVERY", 7)
    job = job_of(tmp_path / "out", finetune=TrainingConfig(1))
    step, plan, made = PerformanceMaximization.step, module.PerformancePlanner.plan, []

    def until(search: PerformanceMaximization, batch: Any) -> StepRecord:
        if search.steps_done == moment:
            raise Killed
        made.append(search.steps_done)
        return step(search, batch)

    def chosen(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(PerformanceMaximization, "step", until)
    if moment == "choice":
        monkeypatch.setattr(module.PerformancePlanner, "plan", chosen)
    with pytest.raises(Killed):
        run(job)
    state = tmp_path / "out" / STATE
    assert (state / "search.pt").is_file() == (moment != 3)
    assert not (state / "planned.json").exists()
    monkeypatch.setattr(PerformanceMaximization, "step", step)
    monkeypatch.setattr(module.PerformancePlanner, "plan", plan)
    before = len(made)
    monkeypatch.setattr(PerformanceMaximization, "step", lambda *given: made.append(0) or step(*given))
    resumed = run(job, resume=True)
    saved = {3: 0, 30: 28, "choice": 40}[moment]
    assert len(made) - before == QUICK["steps"] - saved
    assert resumed.plan.digest == whole.plan.digest
    assert resumed.plan.provenance["search"] == whole.plan.provenance["search"]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_the_seed_decides(tmp_path: Path, whole: Any) -> None:
    digests = [run(job_of(tmp_path / str(seed), seed=seed)).plan.digest for seed in (0, 1)]
    assert digests[0] == whole.plan.digest != digests[1]


class Loader(list[int]):
    """Minibatches that can be counted."""


@pytest.mark.parametrize(
    ("there", "asked", "search", "choice"),
    [(100, None, 8, 2), (20, None, 4, 1), (3, None, 2, 1), (469, None, 38, 9), (100, 50, 40, 10), (9, 50, 8, 1)],
)
def test_a_tenth_of_the_data_and_a_fifth_of_it_held_out(
    there: int, asked: int | None, search: int, choice: int
) -> None:
    learn, held_out = split(Loader(range(there)), asked)
    assert list(learn) == list(range(search)) == list(learn)
    assert list(held_out) == list(range(search, search + choice))
    assert (len(learn), len(held_out)) == (search, choice)


def test_one_minibatch_is_too_few() -> None:
    with pytest.raises(DataError, match="--batch-size"):
        split(Loader([0]), None)


def test_the_summary_is_of_the_last_tenth() -> None:
    nan = float("nan")
    records = [StepRecord(float(i), 0.5, 0.9, 0.1, nan, nan if i == 18 else 0.25) for i in range(20)]
    told = summary(records)
    assert told["loss"] == 18.5
    assert told["predictor_loss"] == 0.25  # of those that have one
    assert told["predicted"] is None


def test_names_and_options() -> None:
    job = Job("resnet20", Path(), MACs(0.5), method="nppm", seed=3, search_steps=500, search_kwargs={"noise": 3})
    assert [method_of(dataclasses.replace(job, method=name)) for name in SEARCHES] == [
        GateSearch("full"),
        GateSearch("gates-only"),
        GateSearch("linear"),
    ]
    options = options_of(job, GateSearch("full"))
    assert (options.mode, options.steps, options.seed, options.noise) == ("full", 500, 3, 3)
    assert (options.select, options.gate_lr) == ("no-skip", 0.05)
    assert options_of(dataclasses.replace(job, search_steps=None, search_kwargs={}), GateSearch("linear")).steps == 4000


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (BudgetError, "give --macs or --params", {"budget": Channels(0.5)}),
        (BudgetError, "give --macs or --params", {"budget": Latency(0.5)}),
        (BudgetError, r"smallest width .*select='all'", {"budget": MACs(0.01)}),
        (BudgetError, "met by the dense network", {"budget": MACs(1.0)}),
        (BudgetError, "--cost-aware, which is for criteria", {"cost_aware": True}),
        (BudgetError, "--score-steps", {"score_steps": 3}),
        (ScheduleError, "one-shot", {"schedule": "iterative"}),
        (DataError, "--score-batches 2", {"score_batches": 1}),
        (GraphError, "No group of channels can have gates", {"ignore": ("layer1", "layer2", "layer3")}),
        (SearchError, "too small to train on", {"search_kwargs": {**FURTHER, "memory": 4}}),
        (SearchError, "never has a say", {"search_kwargs": {}, "search_steps": 100}),
        (SearchError, "unknown option 'nois'; did you mean noise", {"search_kwargs": {"nois": 3.0}}),
        (SearchError, "steps is set by --search-steps", {"search_kwargs": {"steps": 3}}),
        (SearchError, "noise is of type float, got 'much'", {"search_kwargs": {"noise": "much"}}),
        (SearchError, "project is of type bool, got 1", {"search_kwargs": {"project": 1}}),
        (SearchError, "memory is of type int, got True", {"search_kwargs": {"memory": True}}),
        (SearchError, "--search-steps is for searches", {"method": "taylor-fo", "search_steps": 9}),
        (SearchError, "--search-kwargs is for searches", {"method": "imprinting", "search_steps": None}),
        (CriterionError, "did you mean nppm", {"method": "npmm"}),
        (CriterionError, "differentiable-gates", {"method": "differential-gates"}),
    ],
)
def test_asked_in_vain(tmp_path: Path, error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    """Before anything is trained, and nothing is left behind."""
    with pytest.raises(error, match=match):
        run(job_of(tmp_path / "out", pretrain=TrainingConfig(10_000), **changes))
    assert not (tmp_path / "out").exists()


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    from nni_plugin.errors import TrainingError

    job, model = job_of(tmp_path), resnet20(in_chans=3).eval()
    (tmp_path / "search.pt").write_bytes(b"nothing of the kind")
    batches = [(X, torch.arange(4))] * 5
    with pytest.raises(TrainingError, match="is damaged"):
        module.plan_by_search(job, GateSearch("full"), model, X, batches, tmp_path / "search.pt")
    assert DATA["img_size"] == X.shape[-1]
