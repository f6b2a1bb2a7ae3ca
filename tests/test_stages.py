"""Stages give up channels in the proportion asked, and the budget is met as ever."""

import math

import pytest
import torch
import torch.nn.functional as F

from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.budgets import Channels, MACs, Params
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.criteria import OBS, Magnitude, TaylorFO
from nni_plugin.errors import BudgetError
from nni_plugin.planner import run_without_training
from nni_plugin.schedules import Gradual, Iterative, OneShot
from nni_plugin.stages import check_stages, turns

STAGES = {"layer1": 0.5, "layer2": 0.75, "layer2.0": 0.9}


@pytest.fixture(scope="module")
def groups():
    found = find_groups(create_model("resnet20", "nni_plugin"), torch.zeros(1, 3, 8, 8))
    return [group for group in found if group.fixed is None]


def _stage(name):
    return "layer2.0" if name.startswith("layer2.0.") else name.split(".")[0]


def _removed(plan):
    """The fraction of each stage that a plan removes, and the stage's width."""
    widths, kept = {}, {}
    for group in plan.groups:
        widths[_stage(group.name)] = widths.get(_stage(group.name), 0) + group.total
        kept[_stage(group.name)] = kept.get(_stage(group.name), 0) + len(group.kept)
    return {stage: (1 - kept[stage] / width, width) for stage, width in widths.items()}


def test_turns_by_hand(groups):
    """In a stage of two layers with 16 channels each at 0.5, the i-th of all its channels goes at (i + 1/2) / 16."""
    inside = [group for group in groups if group.name in ("layer1.0.conv1", "layer1.1.conv1")]
    scores = {group.name: torch.randperm(1000)[:16].double() + number / 2 for number, group in enumerate(inside)}
    widths = {group.name: group.width for group in inside}
    turn = turns(inside, scores, {"layer1": 0.5}, widths)
    both = torch.cat([scores[group.name] for group in inside])
    expected = (torch.argsort(torch.argsort(both)).double() + 0.5) / 16
    torch.testing.assert_close(torch.cat([turn[group.name] for group in inside]), expected)


def test_turns_keep_what_is_gone_gone_and_what_stays(groups):
    scores = {group.name: torch.rand(group.width, dtype=torch.float64) for group in groups}
    scores["layer1.0.conv1"][3] = -math.inf
    scores["layer1.1.conv1"][:] = math.inf
    widths = {group.name: group.width for group in groups}
    turn = turns(groups, scores, {**STAGES, "layer3": 1.0}, widths)
    assert turn["layer1.0.conv1"][3] == -math.inf
    finite = turn["layer1.0.conv1"].isfinite()
    assert finite.sum() == 15
    # One of the stage's 48 channels is gone, and the next one goes when one and a half are.
    lowest = min(float(turn[name][turn[name].isfinite()].min()) for name in ("layer1.0.conv1", "layer1.2.conv1"))
    assert lowest == pytest.approx(1.5 / 24)
    for name in ("layer1.1.conv1", "layer3.0.conv1", "conv1"):
        assert bool((turn[name] == math.inf).all())


@pytest.mark.parametrize("budget", [MACs(0.6), Params(0.9), Channels(0.88)])
@pytest.mark.parametrize(
    ("criterion", "schedule", "cut"),
    [
        (TaylorFO, OneShot(), "never"),
        (TaylorFO, Iterative(20, 1), "never"),
        (TaylorFO, Iterative(20, 1), "step"),
        (OBS, Gradual(3), "never"),
        (Magnitude, OneShot(), "never"),
    ],
)
@pytest.mark.filterwarnings("ignore:Channels were cut without an optimizer")
def test_proportions_at_the_budget(budget, criterion, schedule, cut):
    model = create_model("resnet20", "nni_plugin").eval()
    batch = (torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,)))
    pruner = ChannelPruner(model, batch[0][:2], criterion(), budget, schedule=schedule, stages=STAGES, cut=cut)
    plan = run_without_training(pruner, [batch] * 3, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))
    size, dense = pruner.size(), pruner.dense
    assert 0.97 * budget.limit(dense) <= budget.value(size) <= budget.limit(dense)
    removed = _removed(plan)
    assert removed["conv1"][0] == removed["layer3"][0] == 0
    scale = {stage: removed[stage][0] / (1 - ratio) for stage, ratio in STAGES.items()}
    one = {stage: 1 / removed[stage][1] / (1 - ratio) for stage, ratio in STAGES.items()}
    middle = sum(scale.values()) / len(scale)
    assert all(abs(scale[stage] - middle) <= 1.5 * one[stage] for stage in STAGES), scale
    assert plan.provenance["stages"] == STAGES


def test_without_stages_nothing_changes():
    plans = []
    for stages in (None, {}):
        torch.manual_seed(0)
        model = create_model("resnet20", "nni_plugin").eval()
        pruner = ChannelPruner(model, torch.randn(1, 3, 8, 8), Magnitude(), MACs(0.5), stages=stages, cut="never")
        plans.append(run_without_training(pruner, [], lambda net, batch: net(batch).sum()))
    assert plans[0] == plans[1]
    assert "stages" not in plans[0].provenance


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"layer9": 0.5}, ["'layer9'", "conv1, layer1, layer2, layer3"]),
        ({"layer": 0.5}, ["'layer'"]),  # a prefix of a word is not a stage
        ({"layer1": 0.0}, ["layer1", "above 0", "got 0.0"]),
        ({"layer1": 1.5}, ["at most 1", "got 1.5"]),
        ({"layer1": True}, ["got True"]),
    ],
)
def test_bad_stages(groups, stages, words):
    with pytest.raises(BudgetError) as caught:
        check_stages(stages, [group.name for group in groups])
    assert all(word in str(caught.value) for word in words), caught.value


def test_budget_out_of_reach_of_the_stages():
    model = create_model("resnet20", "nni_plugin")
    with pytest.raises(BudgetError, match="remain"):
        ChannelPruner(model, torch.zeros(1, 3, 8, 8), Magnitude(), MACs(0.3), stages={"layer1": 0.5})
