"""Measured times as a cost: what the table says at the widths measured, linear between, and as a budget."""

import pytest
import torch
from search_task import EXAMPLE, batches, loss_of, planner, prunable, small_resnet

from nni_plugin.errors import BudgetError
from nni_plugin.performance import ArchitectureCost, ArchitectureLayout, LatencyTable, LayerTimes, TableLatency

LAYERS = {
    "layer1.0.conv1": LayerTimes((4, 8, 16), (16,), ((1.0,), (2.0,), (5.0,))),
    "layer1.0.conv2": LayerTimes((16,), (4, 16), ((1.0, 3.0),)),
    "layer3.0.conv1": LayerTimes((16, 64), (32,), ((2.0,), (6.0,))),
}


def cost() -> ArchitectureCost:
    model = small_resnet()
    groups = [group for group in prunable(model, EXAMPLE) if not group.residual]
    return ArchitectureCost(model, EXAMPLE, ArchitectureLayout(groups))


def test_times_at_and_between_the_widths_measured() -> None:
    costs = cost()
    table = LatencyTable(costs, LAYERS, rest_ms=0.5)
    assert table.dense == 5 + 3 + 6 + 0.5
    assert table.fixed == 0.5
    layout = costs.layout
    for width, first, second in [(16, 5, 3), (8, 2, 1 + 2 / 3), (12, 3.5, 1 + 4 / 3), (4, 1, 1), (2, 1, 1)]:
        architecture = torch.ones(layout.size)
        architecture[layout.slices["layer1.0.conv1"]][width:] = 0
        assert float(table(architecture)) == pytest.approx(first + second + 6 + 0.5)


def test_both_widths_of_a_layer_count() -> None:
    costs = cost()
    costs = ArchitectureCost(small_resnet(), EXAMPLE, ArchitectureLayout(prunable(small_resnet(), EXAMPLE)))
    times = LayerTimes((8, 16), (8, 16), ((1.0, 2.0), (3.0, 8.0)))
    table = LatencyTable(costs, {"layer1.0.conv1": times})
    layout = costs.layout
    architecture = torch.ones(layout.size)
    architecture[layout.slices["layer1.0.conv1"]][12:] = 0
    architecture[layout.slices["conv1"]][12:] = 0
    assert float(table(architecture)) == pytest.approx((1 + 2 + 3 + 8) / 4)
    architecture.requires_grad_()
    (gradient,) = torch.autograd.grad(table(architecture), architecture)
    # One output channel more: halfway between the two rows, over a distance of 8.
    assert gradient[layout.slices["layer1.0.conv1"]].tolist() == pytest.approx([((3 - 1) + (8 - 2)) / 2 / 8] * 16)


def test_a_search_meets_a_budget_of_milliseconds() -> None:
    searched = planner(small_resnet(), TableLatency(0.6, LAYERS, 0.5), mode="gates-only", steps=30)
    searched.search.run(batches())
    plan = searched.plan(batches(600, 2))
    table = LatencyTable(searched.cost, LAYERS, 0.5)
    kept = {name: torch.tensor(index) for name, index in plan.kept().items()}
    assert 0.5 * table.dense < float(table(searched.cost.layout.architecture(kept))) <= 0.6 * table.dense
    assert plan.cost_after.macs < plan.cost_before.macs
    assert plan.apply(small_resnet(), EXAMPLE)(EXAMPLE).shape == (2, 10)
    assert loss_of(small_resnet(), batches()[0]).isfinite()


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (((8, 4), (16,), ((1.0,), (2.0,))), "ascending"),
        (((), (16,), ()), "ascending"),
        (((4, 8), (16,), ((1.0,),)), "2 rows of 1"),
        (((4,), (16,), ((-1.0,),)), "at least 0"),
    ],
)
def test_grids_that_are_none_are_refused(grid: tuple, text: str) -> None:
    with pytest.raises(BudgetError, match=text):
        LayerTimes(*grid)


def test_tables_that_do_not_fit_are_refused() -> None:
    times = LayerTimes((1,), (1,), ((1.0,),))
    with pytest.raises(BudgetError, match=r"'fc\.nothing', whose width no gate changes"):
        LatencyTable(cost(), {"fc.nothing": times})
    with pytest.raises(BudgetError, match="no layer"):
        LatencyTable(cost(), {})
    with pytest.raises(BudgetError, match="fraction kept"):
        TableLatency(1.2, LAYERS)
    with pytest.raises(BudgetError, match="rest_ms"):
        TableLatency(0.5, LAYERS, float("nan"))
