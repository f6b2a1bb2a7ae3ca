"""Several processes, each with its share of the minibatches, find the plan that one finds on all of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import batches, collected, loss_of
from networks_at_random import Branches, conv_bn, randomise
from torch import nn

from nni_plugin import (
    ChannelPruner,
    Channels,
    Continuous,
    Gradual,
    Iterative,
    PruningPlan,
    plan_channels,
    reestimate_batchnorm,
)
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import OBS, TaylorFO
from nni_plugin.errors import CriterionError
from nni_plugin.methods import create_criterion

METHODS = (
    "taylor-fo",
    "taylor-fg",
    "taylor-fisher",
    "taylor-so",
    "taylor-so-row",
    "obd",
    "feature-map",
    "obs",
    "oracle",
    "magnitude",
    "tp:magnitude",
)
PROCESSES = 2
SETTLED: dict[str, Any] = {"number": 3, "schedule": Gradual(2), "reestimate": True}


def network() -> nn.Module:
    torch.manual_seed(0)
    inside = nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6))
    layers = [*conv_bn(3, 6), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU()), *conv_bn(6, 5), nn.ReLU()]
    return randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)))


def share_of(data: list[Any], rank: int, processes: int) -> list[Any]:
    """Return the minibatches of one process, those that follow each other."""
    return data[rank * len(data) // processes : (rank + 1) * len(data) // processes]


def plan_of(
    method: str, rank: int = 0, processes: int = 1, number: int = 4, dealt: bool = False, **options: Any
) -> PruningPlan:
    """Plan on this process's minibatches; `dealt`: like cards, instead of those that follow each other."""
    data, model = batches(number), network()
    share = data[rank::processes] if dealt else share_of(data, rank, processes)
    return plan_channels(model, data[0][0], create_criterion(method), share, loss_of, Channels(9), **options)


def settled(rank: int = 0, processes: int = 1, number: int = 3) -> dict[str, torch.Tensor]:
    """Return what a network holds once its statistics are those of the minibatches; of 3, two have 1 and 2."""
    model = network()
    reestimate_batchnorm(model, share_of(batches(number), rank, processes), loss_of)
    return model.state_dict()


def losses_that_part(rank: int) -> list[int]:
    """Channels left after each minibatch of a loop of one's own, whose losses part the processes at each check.

    Mean losses at the checks: 2 in one process and 0.5 in the other, then 0.5 and 1, at a threshold of 1.
    """
    model, data = network(), batches(4)
    pruner = ChannelPruner(model, data[0][0], TaylorFO(), Channels(9), schedule=Continuous(2, 2, 0.0, 1.0), cut="never")
    left = []
    for batch, loss in zip(data, ([3.0, 1.0, 0.5, 0.5], [0.5, 0.5, 0.9, 1.1])[rank], strict=True):
        model.zero_grad()
        loss_of(model, batch).backward()
        pruner.on_backward(loss)
        pruner.on_step()
        left.append(pruner.size().channels)
    return left


def work(folder: Path, rank: int) -> None:
    """What each process does: plans by every method, by several steps, by scores that differ; then loops of its own."""
    torch.set_num_threads(1)
    init = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=PROCESSES)
    plans = {method: plan_of(method, rank, PROCESSES).to_json() for method in METHODS}
    plans |= {f"{method}, dealt": plan_of(method, rank, PROCESSES, dealt=True).to_json() for method in METHODS}
    plans["steps"] = plan_of("taylor-fisher", rank, PROCESSES, schedule=Iterative(3, 1)).to_json()
    plans["settled"] = plan_of("taylor-fo", rank, PROCESSES, **SETTLED).to_json()
    model, data = network(), batches(1)
    rounding = _ByRank(rank)
    plans["by rank"] = plan_channels(model, data[0][0], rounding, data, loss_of, Channels(9)).to_json()
    statistics = {number: settled(rank, PROCESSES, number) for number in (1, 3)}
    groups = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    few = collected(model, OBS(max_samples=10), batches(4)[rank::PROCESSES], groups)  # of 16 samples
    few.all_reduce()
    refused = ""
    try:
        plan_channels(model, data[0][0], TaylorFO(), data if rank == 0 else [], loss_of, Channels(9))
    except CriterionError as error:
        refused = str(error)
    said = {"refused": refused, "rows": len(few.rows), "left": losses_that_part(rank)}
    torch.save({"plans": plans, "settled": statistics, **said}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


class _ByRank:
    """A stock importance that no two processes agree on."""

    needs_gradients = False

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, group: Any) -> torch.Tensor:
        order = torch.arange(len(group[0].idxs), dtype=torch.float64)
        return order if self.rank == 0 else -order


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found, all in one go."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "support")}
    started = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * PROCESSES, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def found(done: list[dict[str, Any]]) -> list[dict[str, PruningPlan]]:
    """The plans of each process."""
    return [{name: PruningPlan.from_json(text) for name, text in one["plans"].items()} for one in done]


@pytest.mark.parametrize("dealt", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_what_one_finds(found: list[dict[str, PruningPlan]], method: str, dealt: bool) -> None:
    alone = plan_of(method)
    method += ", dealt" * dealt
    assert alone.channels_kept == 9
    for plans in found:
        assert plans[method].kept() == alone.kept()
        for group, expected in zip(plans[method].groups, alone.groups, strict=True):
            assert (group.factors is None) == (expected.factors is None)
            if expected.factors is not None:
                assert group.factors == pytest.approx(expected.factors, rel=1e-9, abs=1e-12)
            assert group.score_range == pytest.approx(expected.score_range, rel=1e-9)
        expected_change = alone.predicted_loss_change
        assert (plans[method].predicted_loss_change is None) == (expected_change is None)
        if expected_change is not None:
            assert plans[method].predicted_loss_change == pytest.approx(expected_change, rel=1e-9)
        now, then = (plan.provenance["steps"][0] for plan in (plans[method], alone))
        assert now == pytest.approx(then, rel=1e-9)


def test_compensation_was_put_to_the_test(found: list[dict[str, PruningPlan]]) -> None:
    assert any(group.factors is not None for group in found[0]["obs"].groups)


def test_a_process_without_minibatches_is_told_to_all(done: list[dict[str, Any]]) -> None:
    """And nobody is left waiting."""
    assert "no batch to score with in one of the processes: the loader is empty" in done[0]["refused"]
    assert "no batch to score with: the loader is empty" in done[1]["refused"]


def test_rows_are_bounded_in_all_processes_together(done: list[dict[str, Any]]) -> None:
    assert [one["rows"] for one in done] == [10, 10]


def test_all_processes_hold_one_plan(found: list[dict[str, PruningPlan]]) -> None:
    """To the last bit, the losses on record too; also where each would rank otherwise."""
    for name, plan in found[0].items():
        if name == "by rank":  # whose scores stay its own
            assert plan.kept() == found[1][name].kept()
        else:
            assert plan == found[1][name]


def test_steps_on_windows_of_their_own(found: list[dict[str, PruningPlan]]) -> None:
    """Windows of one minibatch in each of two processes: and all go the same way."""
    plan = found[0]["steps"]
    assert plan.channels_kept == 9
    assert [step["channels"] for step in plan.provenance["steps"]] == [12, 9]


def test_the_data_make_a_difference(found: list[dict[str, PruningPlan]]) -> None:
    """A process that kept to its own minibatches would be seen."""
    half = [plan_of("taylor-fisher", rank, PROCESSES) for rank in range(PROCESSES)]
    ranges = [[group.score_range for group in plan.groups] for plan in (*half, found[0]["taylor-fisher"])]
    assert ranges[2] not in (ranges[0], ranges[1])


def test_statistics_are_those_of_all_minibatches(done: list[dict[str, Any]]) -> None:
    """Also where the processes have unequal numbers of them, or one has none at all."""
    for number in (1, 3):
        alone = settled(number=number)
        for one in done:
            torch.testing.assert_close(one["settled"][number], alone, rtol=1e-9, atol=1e-12)
    halves = [settled(rank, PROCESSES) for rank in range(PROCESSES)]
    assert not any(torch.allclose(half["1.running_mean"], settled()["1.running_mean"]) for half in halves)


def test_steps_on_statistics_taken_anew(found: list[dict[str, PruningPlan]]) -> None:
    alone = plan_of("taylor-fo", **SETTLED)
    assert len(alone.provenance["steps"]) == 2
    for plans in found:
        assert plans["settled"].kept() == alone.kept()
        for group, expected in zip(plans["settled"].groups, alone.groups, strict=True):
            assert group.score_range == pytest.approx(expected.score_range, rel=1e-9)


def test_a_loss_decides_for_all_processes(done: list[dict[str, Any]]) -> None:
    """A check is passed or skipped by the mean over all processes: 1.25, then 0.75, at a threshold of 1."""
    assert [one["left"] for one in done] == [[15, 15, 15, 13]] * PROCESSES


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
