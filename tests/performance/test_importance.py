"""Learned gates as a criterion: in our own planner, and in stock pruners of Torch-Pruning."""

import copy

import pytest
import torch
import torch_pruning as tp
from search_task import EXAMPLE, batches, loss_of, planner, prunable, small_resnet
from torch import nn

from nni_plugin import MACs, count, plan_channels
from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import CriterionError, SearchError
from nni_plugin.performance import DifferentiableGates, GateImportance, gated_groups


def learned(model: torch.nn.Module, seed: int = 4) -> DifferentiableGates:
    return DifferentiableGates(gated_groups(prunable(model, EXAMPLE)), seed=seed)


def test_it_scores_with_the_gates_values() -> None:
    model = small_resnet()
    gates = learned(model)
    criterion = GateImportance(gates)
    assert isinstance(criterion, Criterion)
    assert not criterion.needs_data
    for group in prunable(model, EXAMPLE):
        scores = criterion(group)
        if group.residual:
            assert bool(torch.isinf(scores).all())
        else:
            assert torch.allclose(scores, (gates.vectors()[group.name] + 3.0).double())


def test_plan_channels_takes_it() -> None:
    """One order of removal: as the deterministic choice, but for what is filled up at the end."""
    model = small_resnet()
    searched = planner(model, mode="gates-only", steps=20)
    searched.search.run(batches())
    plan = plan_channels(model, EXAMPLE, GateImportance(searched.search.gates), (), loss_of, MACs(0.6))
    assert count(plan.apply(copy.deepcopy(model), EXAMPLE), EXAMPLE).macs <= 0.6 * count(model, EXAMPLE).macs
    kept, ours = plan.kept(), searched.plan().kept()
    for name, index in kept.items():
        assert set(index) <= set(ours.get(name, index))
    assert all(len(kept[group.name]) == group.width for group in prunable(model, EXAMPLE) if group.residual)


@pytest.mark.parametrize("pruner", [tp.pruner.MetaPruner, tp.pruner.BNScalePruner])
@pytest.mark.parametrize("global_pruning", [True, False])
def test_stock_pruners_take_it(pruner: type, global_pruning: bool) -> None:
    model = small_resnet()
    gates = learned(model)
    pruner(
        model,
        EXAMPLE,
        importance=GateImportance(gates),
        pruning_ratio=0.5,
        global_pruning=global_pruning,
        ignored_layers=[model.fc],
    ).step()
    assert model.conv1.out_channels == 16  # groups without gates stay whole
    assert model.layer3[0].conv2.out_channels == 64
    widths = [model.get_submodule(group.name).out_channels for group in gates.layout.groups]
    assert sum(widths) < 16 + 32 + 64
    assert model(EXAMPLE).shape == (2, 10)
    original = small_resnet()
    for group in gates.layout.groups:  # those with the highest gates stayed
        best = gates.vectors()[group.name].argsort(descending=True)[: model.get_submodule(group.name).out_channels]
        expected = original.get_submodule(group.name).weight[best.sort().values]
        assert torch.equal(model.get_submodule(group.name).weight, expected)


def test_gates_of_another_width_are_told() -> None:
    model = small_resnet()
    criterion = GateImportance(learned(model))
    narrow = tp.pruner.MetaPruner(
        model, EXAMPLE, importance=criterion, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[model.fc]
    )
    narrow.step()
    with pytest.raises(CriterionError, match="learned for another width"):
        narrow.step()


def test_tied_channels_score_together_what_their_gate_is_worth() -> None:
    """Whoever ranks sums over the channels of a unit."""
    layers = [nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(5 * 36, 2))
    gates = DifferentiableGates(prunable(model, EXAMPLE))
    criterion = GateImportance(gates)
    (tied,) = [group for group in gates.layout.groups if group.units == 4 and group.name == "0"]
    summed = torch.zeros(4, dtype=torch.float64).index_add(0, tied.unit, criterion(tied))
    assert torch.allclose(summed, gates.vectors()["0"].double() + gates.offset)


def test_state_and_bad_gates() -> None:
    model = small_resnet()
    first, second = GateImportance(learned(model, 1)), GateImportance(learned(model, 2))
    (group, *_) = gated_groups(prunable(model, EXAMPLE))
    assert not torch.equal(first(group), second(group))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(group), second(group))
    gates = learned(model)
    gates.logits.data[0] = float("inf")
    with pytest.raises(SearchError, match="not finite"):
        GateImportance(gates)
