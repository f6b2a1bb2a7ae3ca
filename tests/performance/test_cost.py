"""The cost as a function of gates: the count of the slim network at every hard vector, and a penalty that ends."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks_at_random import Recipe, networks
from search_task import CASES, prunable
from torch import nn

from nni_plugin.adapters.torch_pruning import apply_plan
from nni_plugin.cost import count
from nni_plugin.errors import BudgetError
from nni_plugin.networks import mobilenetv2_cifar, resnet20
from nni_plugin.performance import ArchitectureCost, ArchitectureLayout, CostTarget, kept_fraction
from nni_plugin.performance.cost import one_sided_log
from nni_plugin.plan import GroupPlan, PruningPlan

SEEDS = st.integers(0, 2**16)


def any_architecture(layout: ArchitectureLayout, seed: int) -> torch.Tensor:
    """A random 0/1 vector that leaves each group at least one gate open."""
    generator = torch.Generator().manual_seed(seed)
    share = float(torch.rand(1, generator=generator))
    architecture = (torch.rand(layout.size, generator=generator) < share).double()
    for part in layout.slices.values():
        architecture[part][int(torch.randint(part.stop - part.start, (1,), generator=generator))] = 1
    return architecture


def slim_of(
    model: nn.Module, layout: ArchitectureLayout, architecture: torch.Tensor, example: torch.Tensor
) -> nn.Module:
    kept = layout.kept(architecture)
    entries = tuple(GroupPlan(group.name, group.width, tuple(kept[group.name].tolist())) for group in layout.groups)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The plan removes nothing")
        return apply_plan(copy.deepcopy(model), PruningPlan(entries), example)


def check_equal_to_count(model: nn.Module, example: torch.Tensor, seed: int) -> None:
    layout = ArchitectureLayout(prunable(model, example))
    cost = ArchitectureCost(model, example, layout)
    architecture = any_architecture(layout, seed)
    counted = count(slim_of(model, layout, architecture, example), example)
    assert float(cost.macs(architecture)) == counted.macs
    assert float(cost.params(architecture)) == counted.params
    assert cost.predict(layout.kept(architecture)).cost == counted


@CASES
@given(networks(), SEEDS)
def test_it_is_the_count_of_the_slim_network(recipe: Recipe, seed: int) -> None:
    """Residual, depthwise, grouped, concatenated, squeezed, transposed layers in any order; exactly."""
    check_equal_to_count(recipe.build(), recipe.inputs(), seed)


@pytest.mark.parametrize("build", [resnet20, mobilenetv2_cifar])
def test_on_the_papers_networks(build) -> None:
    check_equal_to_count(build(width_mult=0.25), torch.zeros(1, 3, 16, 16), 1)


def test_a_weight_that_two_layers_share_is_multiplied_by_twice_and_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.two.weight = self.one.weight
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            return self.head(self.two(self.one(x).relu()).mean((2, 3)))

    model, example = Tied(), torch.randn(2, 3, 8, 8)
    layout = ArchitectureLayout(prunable(model, example))
    cost = ArchitectureCost(model, example, layout)
    architecture = any_architecture(layout, 3)
    assert 0 < architecture.sum() < layout.size
    counted = count(slim_of(model, layout, architecture, example), example)
    assert cost.predict(layout.kept(architecture)).cost == counted
    assert (float(cost.macs(architecture)), float(cost.params(architecture))) == (counted.macs, counted.params)


def test_all_ones_cost_what_the_dense_network_costs() -> None:
    model, example = resnet20(), torch.zeros(1, 3, 32, 32)
    layout = ArchitectureLayout([group for group in prunable(model, example) if not group.residual])
    cost = ArchitectureCost(model, example, layout)
    ones = torch.ones(layout.size)
    dense = count(model, example)
    assert (float(cost.macs(ones)), float(cost.params(ones))) == (dense.macs, dense.params)
    assert (cost.macs.dense, cost.params.dense) == (dense.macs, dense.params)
    # What no gate changes: the stem, the shortcuts, the classifier.
    stem = count(nn.Conv2d(3, 16, 3, padding=1, bias=False), example).macs
    shortcuts = 16 * 32 * 16 * 16 + 32 * 64 * 8 * 8
    assert cost.macs.fixed == stem + shortcuts + 64 * 10


def test_depthwise_layers_are_linear_in_their_width() -> None:
    layers = [nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 5, 1)]
    model, example = nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 16, 2)), torch.zeros(1, 3, 4, 4)
    (group,) = [group for group in prunable(model, example) if group.name == "0"]
    cost = ArchitectureCost(model, example, ArchitectureLayout([group]))
    per_channel = 16 * (3 + 9 + 5)
    for width in range(1, 9):
        architecture = torch.zeros(8)
        architecture[:width] = 1
        assert float(cost.macs(architecture)) == 16 * 5 * 0 + 5 * 16 * 2 + per_channel * width


def test_the_gradient_is_what_a_channel_costs() -> None:
    model, example = resnet20(width_mult=0.5), torch.zeros(1, 3, 16, 16)
    layout = ArchitectureLayout(prunable(model, example))
    cost = ArchitectureCost(model, example, layout)
    architecture = any_architecture(layout, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(cost.macs(architecture), architecture)
    for gate in (0, 11, layout.size - 1):  # linear in each gate alone
        ends = []
        for value in (0.0, 1.0):
            moved = architecture.detach().clone()
            moved[gate] = value
            ends.append(float(cost.macs(moved)))
        assert ends[1] - ends[0] == pytest.approx(float(gradient[gate]), rel=1e-12)


def test_the_penalty_is_one_sided() -> None:
    kept = torch.tensor([0.7, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    penalty = 2 * one_sided_log(kept, 0.5)
    (gradient,) = torch.autograd.grad(penalty.sum(), kept)
    assert penalty.tolist() == pytest.approx([0.6729444732, 0, 0], abs=1e-9)
    assert gradient.tolist() == pytest.approx([2.857142857, 0, 0], abs=1e-9)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_p_meets_the_ratio_of_the_whole_network(ratio: float) -> None:
    model, example = resnet20(), torch.zeros(1, 3, 32, 32)
    layout = ArchitectureLayout([group for group in prunable(model, example) if not group.residual])
    macs = ArchitectureCost(model, example, layout).macs
    target = CostTarget(macs, ratio * macs.dense)
    prunable_part = macs.dense - macs.fixed
    assert macs.fixed + target.p * prunable_part == pytest.approx(ratio * macs.dense, rel=1e-12)
    # The supplement's leaves out what cannot be pruned, so the whole network keeps more than asked for.
    printed = kept_fraction(ratio, prunable_part, macs.dense, "supplement")
    assert printed == pytest.approx(ratio * macs.dense / prunable_part)
    assert macs.fixed + printed * prunable_part == pytest.approx(ratio * macs.dense + macs.fixed)
    # Zero from the limit on, and positive with a gradient above it.
    assert float(target.penalty(torch.tensor(ratio * macs.dense, dtype=torch.float64))) < 1e-12
    assert float(target.penalty(torch.tensor(macs.dense, dtype=torch.float64))) == pytest.approx(
        -torch.log(torch.tensor(target.p)).item()
    )


def test_the_two_formulas_agree_where_all_can_be_pruned() -> None:
    assert kept_fraction(0.4, 10.0, 10.0) == pytest.approx(kept_fraction(0.4, 10.0, 10.0, "supplement"))


@pytest.mark.parametrize("ratio", [0.0, 1.5, -0.1])
def test_ratios_that_make_no_sense_are_refused(ratio: float) -> None:
    with pytest.raises(BudgetError, match="fraction kept"):
        kept_fraction(ratio, 1.0, 2.0)


def test_p_out_of_reach() -> None:
    with pytest.raises(BudgetError, match=r"out of reach: layers that cost 0\.6000 of it have no gates"):
        kept_fraction(0.5, 40.0, 100.0)
    with pytest.raises(BudgetError, match="prunable cost"):
        kept_fraction(0.5, 0.0, 100.0)
