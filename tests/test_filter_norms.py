"""Filters get their dense length back, and nothing else changes but the pace of training."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import Recipe, any_plan, assert_same, conv_bn, networks, randomise, state_of
from torch import Tensor, nn

from nni_plugin import restore_filter_norms
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.errors import PlanError
from nni_plugin.filter_norms import LONGEST
from nni_plugin.networks import resnet20
from nni_plugin.plan import GroupPlan, PruningPlan

X = torch.randn(16, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def lengths(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").detach().flatten(1).norm(dim=1)


def test_lengths_are_those_of_the_dense_network_and_outputs_stay() -> None:
    torch.manual_seed(0)
    dense = randomise(resnet20(width_mult=0.5))
    for norm in dense.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 1e-14  # what a batch's variance is compared with in train mode, whatever the filter's length
    untouched = state_of(dense)
    plan = PruningPlan((GroupPlan("layer1.2.conv1", 8, (1, 2, 6)), GroupPlan("conv1", 8, (0, 3, 4, 7))), ("layer1.1",))
    slim = plan.apply(copy.deepcopy(dense), X)
    with torch.no_grad():
        slim.layer1[1].conv2.weight.mul_(0.02)  # as least squares may leave it
    before = {mode: slim.train(mode)(X) for mode in (True, False)}
    longer = restore_filter_norms(slim, dense, X)
    assert set(longer) == {name for name, layer in slim.named_modules() if isinstance(layer, nn.Conv2d)}
    torch.testing.assert_close(lengths(slim.layer1[1].conv1), lengths(dense.layer1[2].conv1)[[1, 2, 6]])
    torch.testing.assert_close(lengths(slim.layer1[1].conv2), lengths(dense.layer1[2].conv2)[[0, 3, 4, 7]])
    assert longer["layer1.1.conv2"] > 50 > 1 > longer["layer3.2.conv2"] - 1e-9
    torch.testing.assert_close(slim.eval()(X), before[False], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slim.train()(X), before[True], rtol=1e-8, atol=1e-8)
    assert_same(dense, untouched)


def test_a_layer_of_two_names_is_no_shared_weight() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*conv_bn(3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
            self.first = self.body[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    torch.manual_seed(0)
    dense = randomise(TwoNames())
    slim = PruningPlan((GroupPlan("body.0", 6, (0, 2, 3)),)).apply(copy.deepcopy(dense), X)
    with torch.no_grad():
        slim.first.weight.mul_(0.5)
    assert restore_filter_norms(slim, dense, X) == pytest.approx({"body.0": 2.0})


def test_a_step_turns_a_filter_as_much_as_in_the_dense_network() -> None:
    """Behind a normalisation the gradient goes as 1/length: at a tenth of it a step does a hundred times more."""
    torch.manual_seed(0)
    dense = randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))
    slim = PruningPlan((GroupPlan("0", 6, (0, 2, 3, 4, 5)),)).apply(copy.deepcopy(dense), X)
    norm = slim.get_submodule("1")

    def turned() -> float:
        slim.train().zero_grad()
        nn.functional.cross_entropy(slim(X), torch.arange(16) % 3).backward()
        weight = slim.get_parameter("0.weight")
        return float(weight.grad.norm() / weight.norm())

    expected = turned()
    with torch.no_grad():
        slim.get_parameter("0.weight").mul_(0.1)
        norm.running_mean.mul_(0.1)
        norm.running_var.mul_(0.01)
    assert turned() > 50 * expected
    restore_filter_norms(slim, dense, X)
    assert turned() == pytest.approx(expected, rel=0.01)


def test_layers_that_others_read_too_stay() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.head(self.b(self.norm(x) + x).mean((2, 3)))

    torch.manual_seed(0)
    dense = randomise(Read())
    slim = PruningPlan((GroupPlan("a", 6, (0, 1, 4)),)).apply(copy.deepcopy(dense), X)
    before = state_of(slim)
    assert restore_filter_norms(slim, dense, X) == {}
    assert_same(slim, before)


def test_a_filter_of_nothing() -> None:
    torch.manual_seed(0)
    dense = randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))
    slim = PruningPlan((GroupPlan("0", 6, (0, 2, 3, 4, 5)),)).apply(copy.deepcopy(dense), X)
    with torch.no_grad():
        slim.get_parameter("0.weight")[0] = 0
        slim.get_parameter("0.weight")[1].mul_(1e-9)
    expected = slim(X)
    restore_filter_norms(slim, dense, X)
    torch.testing.assert_close(slim(X), expected)
    assert float(lengths(slim.get_submodule("0"))[0]) == 0
    assert float(lengths(slim.get_submodule("0"))[1]) == pytest.approx(1e-9 * LONGEST * float(lengths(dense[0])[2]))


def test_a_network_without_a_plan_is_refused() -> None:
    dense = resnet20(width_mult=0.5)
    with pytest.raises(PlanError, match="no pruning_plan"):
        restore_filter_norms(copy.deepcopy(dense), dense, X.float())


@settings(max_examples=25)
@given(networks(), st.integers(0, 2**20))
def test_random_networks_compute_the_same(recipe: Recipe, seed: int) -> None:
    dense, x = recipe.build(), recipe.inputs(4)
    slim = copy.deepcopy(dense)
    any_plan(find_groups(slim, x), seed).apply(slim, x)
    if not hasattr(slim, "pruning_plan"):
        return
    expected = slim(x)
    restore_filter_norms(slim, dense, x)
    torch.testing.assert_close(slim(x), expected, rtol=1e-8, atol=1e-8)
