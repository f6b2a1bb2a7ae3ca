"""Scores of a network that has been cut since are refused, and after reset() a criterion is as good as new."""

from typing import Any

import pytest
import torch
import torch_pruning as tp
from gated import batches, loss_of
from networks_at_random import Branches, conv_bn, randomise
from torch import nn

from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.criteria import BNScale, Criterion, FeatureMap, TaylorFisher, TaylorFO
from nni_plugin.errors import CriterionError
from nni_plugin.plan import GroupPlan, PruningPlan

KINDS = [TaylorFO, TaylorFisher, FeatureMap]
DATA = batches(2)
X = DATA[0][0]
CUT = r"was cut since these scores were gathered \(.*\): call reset\(\) of .* and collect again"


def network(seed: int = 0) -> nn.Module:
    inside = nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *conv_bn(6, 8))
    layers = [*conv_bn(3, 8), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU())]
    return randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), seed)


def side_by_side() -> nn.Module:
    """Two layers that one normalisation reads side by side, so that cutting one moves the other's channels."""
    layers = [Branches("cat", [nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)]), nn.BatchNorm2d(12), nn.ReLU()]
    return randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)), 0)


def gather(model: nn.Module, criterion: Criterion, groups: Any = ()) -> None:
    with criterion.collect(model, groups):
        for batch in DATA:
            model.zero_grad()
            loss_of(model, batch).backward()
            criterion.update()


def pruner_of(model: nn.Module, importance: Any, steps: int = 2, everywhere: bool = False) -> Any:
    return tp.pruner.BasePruner(
        model,
        X,
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=steps,
        global_pruning=everywhere,
        ignored_layers=[model[-1]],
    )


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_step_of_a_stock_pruner_needs_data_of_its_own(kind: type[Criterion], everywhere: bool) -> None:
    model, criterion = network(), kind()
    gather(model, criterion)
    pruner = pruner_of(model, criterion, everywhere=everywhere)
    pruner.step()
    with pytest.raises(CriterionError, match=CUT):
        pruner.step()
    with pytest.raises(CriterionError, match=CUT), criterion.collect(model):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_with_reset_goes_through(kind: type[Criterion]) -> None:
    model, criterion = network(), kind()
    pruner = pruner_of(model, lambda group: criterion(group))
    widths = []
    for _ in range(2):
        criterion.reset()
        gather(model, criterion)
        fresh = kind()
        gather(model, fresh)
        for group in find_groups(model, X):
            if group.fixed is None:
                assert torch.equal(criterion(group), fresh(group))
        pruner.step()
        widths.append(model[0].out_channels)
    assert widths == [6, 4]


@pytest.mark.parametrize("with_groups", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_between_two_updates_is_refused(kind: type[Criterion], with_groups: bool) -> None:
    model, criterion = network(), kind()
    groups = [group for group in find_groups(model, X) if group.fixed is None]
    with criterion.collect(model, groups if with_groups else ()):
        loss_of(model, DATA[0]).backward()
        criterion.update()
        entries = tuple(GroupPlan(group.name, group.width, tuple(range(1, group.width))) for group in groups)
        cut_channels(model, PruningPlan(entries), find_groups(model, X))
        model.zero_grad()
        loss_of(model, DATA[0]).backward()
        with pytest.raises(CriterionError, match=CUT):
            criterion.update()
        assert criterion.minibatches == 1
    with pytest.raises(CriterionError, match=CUT):
        criterion(groups[0])


def test_weights_are_read_as_they_are() -> None:
    model, criterion = network(), BNScale()
    gather(model, criterion)
    pruner = pruner_of(model, criterion)
    pruner.step()
    gather(model, criterion)
    pruner.step()
    assert model[0].out_channels == 4


def test_channels_that_a_cut_of_others_has_moved_are_not_mistaken() -> None:
    model, criterion = side_by_side(), TaylorFO()
    gather(model, criterion)
    cut_channels(model, PruningPlan((GroupPlan("0.branches.0", 6, (1, 4)),)), find_groups(model, X))
    moved = next(group for group in find_groups(model, X) if group.name == "0.branches.1")
    with pytest.raises(CriterionError, match=CUT):
        criterion(moved)


def test_a_group_that_is_whole_is_scored_between_the_cuts_of_others() -> None:
    """Some pruners cut one group before they ask for the next."""
    model, criterion = network(), TaylorFO()
    gather(model, criterion)
    inner, outer = sorted((group for group in find_groups(model, X) if group.fixed is None), key=lambda g: g.width)
    expected = criterion(outer)
    cut_channels(model, PruningPlan((GroupPlan(inner.name, 6, (0, 5)),)), find_groups(model, X))
    assert torch.equal(criterion(outer), expected)
    with pytest.raises(CriterionError, match=CUT):
        criterion(inner)
