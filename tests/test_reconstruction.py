"""Least-squares reconstruction of a pruned network's layers."""

import copy

import pytest
import torch
from networks_at_random import assert_same, state_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_plugin.errors import DataError, PlanError
from nni_plugin.networks.resnet import ResNet
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.reconstruction import reconstruct

BATCHES = [torch.randn(32, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = model(batch)
    return output


def difference(first: nn.Module, second: nn.Module) -> float:
    """Mean squared difference of the outputs on images that were not used."""
    with torch.no_grad():
        images = torch.randn(64, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
        return float((first.eval()(images) - second.eval()(images)).square().mean())


def twins() -> nn.Sequential:
    """A network whose even and odd channels of the first layer are alike, so that half of them can be given up."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1, stride=2)
    with torch.no_grad():
        first.weight[1::2], first.bias[1::2] = first.weight[::2], first.bias[::2]
    second = nn.Conv2d(8, 4, (3, 2), padding=(1, 0), dilation=(1, 2), bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 2, 5)).double()


def test_gives_back_what_the_kept_channels_hold() -> None:
    dense = twins().eval()
    pruned = PruningPlan((GroupPlan("0", 8, (0, 2, 4, 6)),)).apply(copy.deepcopy(dense), BATCHES[0])
    before = difference(pruned, dense)
    left = reconstruct(pruned, dense, BATCHES[0], BATCHES, forward)
    assert left["2"] < 1e-6
    assert difference(pruned, dense) < 1e-6 * before


def test_residual_network_comes_closer_to_the_dense_one() -> None:
    torch.manual_seed(0)
    dense = ResNet(1, num_classes=5).double()
    for batch in BATCHES:  # statistics of the images
        dense(batch)
    dense.eval()
    untouched = state_of(dense)
    kept = {"layer1.0.conv1": 16, "layer2.0.conv1": 32, "layer3.0.conv1": 64}
    plan = PruningPlan(tuple(GroupPlan(name, width, tuple(range(0, width, 2))) for name, width in kept.items()))
    pruned = plan.apply(copy.deepcopy(dense), BATCHES[0])
    pruned.layer1.train()
    norms = {name: tensor.clone() for name, tensor in pruned.state_dict().items() if "bn" in name}
    before = difference(copy.deepcopy(pruned), dense)
    left = reconstruct(pruned, dense, BATCHES[0], BATCHES, forward, positions=20)
    assert pruned.layer1.training
    assert not pruned.layer2.training
    assert all(0 <= share <= 1 for share in left.values())
    assert list(left)[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert all(torch.equal(pruned.state_dict()[name], value) for name, value in norms.items())
    assert difference(pruned, dense) < 0.8 * before
    assert_same(dense, untouched)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pruned.modules())


def test_nothing_to_mend_changes_nothing() -> None:
    dense = twins().eval()
    same = copy.deepcopy(dense)
    same.pruning_plan = PruningPlan((GroupPlan("0", 8, tuple(range(8))),))
    before = state_of(same)
    left = reconstruct(same, dense, BATCHES[0], BATCHES, forward)
    assert set(left.values()) == {1.0}
    assert_same(same, before)


def test_what_is_missing_is_said() -> None:
    dense = twins().eval()
    with pytest.raises(PlanError, match="no pruning_plan"):
        reconstruct(copy.deepcopy(dense), dense, BATCHES[0], BATCHES, forward)
    pruned = PruningPlan((GroupPlan("0", 8, (0, 2, 4)),)).apply(copy.deepcopy(dense), BATCHES[0])
    before = state_of(pruned)
    with pytest.raises(DataError, match="no minibatch"):
        reconstruct(pruned, dense, BATCHES[0], [], forward)
    assert_same(pruned, before)


@pytest.mark.parametrize(
    "padding",
    [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"padding": (1, 2), "padding_mode": "circular"}],
)
def test_padding_of_every_kind(padding: dict) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1)
    with torch.no_grad():
        first.weight[1::2], first.bias[1::2] = first.weight[::2], first.bias[::2]
    dense = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 4, 3, **padding), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    dense = dense.append(nn.Linear(16, 3)).double().eval()
    pruned = PruningPlan((GroupPlan("0", 8, (0, 2, 4, 6)),)).apply(copy.deepcopy(dense), BATCHES[0])
    assert reconstruct(pruned, dense, BATCHES[0], BATCHES, forward)["2"] < 1e-6
    assert difference(pruned, dense) < 1e-6


class Standardised(nn.Conv2d):
    """A convolution that computes with other weights than it holds."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_layers_of_other_classes_and_shared_weights_stay() -> None:
    torch.manual_seed(0)
    tied = nn.Linear(4, 4)
    dense = nn.Sequential(Standardised(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4), nn.ReLU(), tied, nn.ReLU(), tied)
    dense = dense.double().eval()
    pruned = PruningPlan((GroupPlan("0", 8, (0, 2, 4, 6)),)).apply(copy.deepcopy(dense), BATCHES[0])
    kept = {name: tensor.clone() for name, tensor in pruned.state_dict().items() if not name.startswith("2.")}
    assert list(reconstruct(pruned, dense, BATCHES[0], BATCHES, forward)) == ["2"]
    assert all(torch.equal(pruned.state_dict()[name], value) for name, value in kept.items())


def test_a_layer_of_two_names_is_no_shared_weight() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = twins()
            self.second = self.body[2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    dense = TwoNames().eval()
    pruned = PruningPlan((GroupPlan("body.0", 8, (0, 2, 4, 6)),)).apply(copy.deepcopy(dense), BATCHES[0])
    assert reconstruct(pruned, dense, BATCHES[0], BATCHES, forward)["body.2"] < 1e-6


def test_values_that_are_not_finite_change_nothing() -> None:
    dense = twins().eval()
    pruned = PruningPlan((GroupPlan("0", 8, (0, 2, 4)),)).apply(copy.deepcopy(dense), BATCHES[0])
    before = state_of(pruned)
    broken = [torch.full_like(BATCHES[0], torch.nan)]
    with pytest.raises(DataError, match="not finite"):
        reconstruct(pruned, dense, BATCHES[0], broken, forward)
    assert_same(pruned, before)


def test_an_error_half_way_changes_nothing() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.log(self.b(torch.relu(self.a(x))) + 50))

    torch.manual_seed(0)
    dense, x = Breaking().double().eval(), torch.randn(40, 6, dtype=torch.float64)
    pruned = PruningPlan((GroupPlan("a", 8, (0, 2, 4)),)).apply(copy.deepcopy(dense), x)
    before = state_of(pruned)
    with pytest.raises(DataError, match="'c' reads or gives is not finite"):
        reconstruct(pruned, dense, x, [1e4 * x], forward)
    assert_same(pruned, before)


def test_minibatches_in_another_order_each_time_are_refused() -> None:
    dense = twins().eval()
    pruned = PruningPlan((GroupPlan("0", 8, (0, 2, 4)),)).apply(copy.deepcopy(dense), BATCHES[0])
    before = state_of(pruned)
    torch.manual_seed(0)
    with pytest.raises(DataError, match=r"others each time.*neither shuffles.*unchanged"):
        reconstruct(pruned, dense, BATCHES[0], DataLoader(torch.cat(BATCHES), 16, shuffle=True), forward)
    assert_same(pruned, before)
    reconstruct(pruned, dense, BATCHES[0], DataLoader(torch.cat(BATCHES), 16), forward)


def test_a_layer_called_by_keyword_stays_as_it_is() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=torch.relu(self.a(x)))

    torch.manual_seed(0)
    dense, x = Keyword().double().eval(), torch.randn(40, 6, dtype=torch.float64)
    pruned = PruningPlan((GroupPlan("a", 8, (0, 2, 4)),)).apply(copy.deepcopy(dense), x)
    assert list(reconstruct(pruned, dense, x, [x], forward)) == ["a"]


def test_a_network_that_has_lost_blocks_as_well() -> None:
    """Its layers have moved up, and each is mended with what the same layer gave in the dense network."""
    torch.manual_seed(0)
    dense = ResNet(2, num_classes=5).double()
    for batch in BATCHES:
        dense(batch)
    dense.eval()
    untouched = state_of(dense)
    group = GroupPlan("layer3.1.conv1", 64, tuple(range(0, 64, 2)))
    plan = PruningPlan((group,), removed_blocks=("layer1.0", "layer2.1"))
    pruned = plan.apply(copy.deepcopy(dense), BATCHES[0])
    before = difference(pruned, dense)
    left = reconstruct(pruned, dense, BATCHES[0], BATCHES, forward)
    assert "layer1.0.conv1" in left  # the dense network's layer1.1
    assert "layer1.1.conv1" not in left
    assert difference(pruned, dense) < 0.7 * before
    assert_same(dense, untouched)
