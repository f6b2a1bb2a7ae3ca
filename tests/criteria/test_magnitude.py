"""Magnitude against a loop over channels that asks autograd which weights are theirs; what joint means."""

from typing import Any

import pytest
import torch
from filters_by_gradient import filters_of
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import Branches, Recipe, Squeeze, conv_bn, networks, randomise
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import Magnitude
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def scored(model: nn.Module, name: str, criterion: Any = None) -> Tensor:
    group = next(g for g in find_groups(model, X) if any(m.path == name and m.axis == "out" for m in g.members))
    criterion = criterion or Magnitude()
    with criterion.collect(model):
        return criterion(group)


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def by_hand(model: nn.Module, group: ChannelGroup, p: float, joint: bool) -> Tensor:
    scores = []
    for channel in range(group.width):
        filters = list(filters_of(model, group, channel).values())
        weights = torch.cat(filters) if joint else filters[0]
        scores.append(sum(abs(weight) ** p for weight in weights.tolist()) ** (1 / p))
    return torch.tensor(scores, dtype=torch.float64)


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(networks(most=3), st.sampled_from([1, 2, 3.5]), st.booleans())
def test_random_networks_by_hand(recipe: Recipe, p: float, joint: bool) -> None:
    model, criterion = recipe.build(), Magnitude(p, joint)
    groups = [group for group in find_groups(model, recipe.inputs()) if group.fixed is None]
    with criterion.collect(model, groups):
        for group in groups:
            torch.testing.assert_close(criterion(group), by_hand(model, group, p, joint), rtol=1e-12, atol=0)


def residual() -> nn.Module:
    def block() -> nn.Module:
        return Branches("add", [nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6)), nn.Identity()], nn.ReLU())

    return randomise(nn.Sequential(nn.Sequential(*conv_bn(3, 6), nn.ReLU()), block(), block(), *head(6)))


def test_squares_are_summed_over_all_writers_before_the_root() -> None:
    model = residual()
    layers = [model.get_submodule(path).weight.detach() for path in ("0.0", "1.branches.0.3", "2.branches.0.3")]
    squares = [weight.square().sum((1, 2, 3)) for weight in layers]
    expected = (squares[0] + squares[1] + squares[2]).sqrt()
    torch.testing.assert_close(scored(model, "0.0"), expected, rtol=1e-13, atol=0)
    assert (scored(model, "0.0") < sum(square.sqrt() for square in squares)).all()
    torch.testing.assert_close(scored(model, "0.0", Magnitude(joint=False)), squares[0].sqrt(), rtol=1e-13, atol=0)
    absolute = sum(weight.abs().sum((1, 2, 3)) for weight in layers)
    torch.testing.assert_close(scored(model, "0.0", Magnitude(p=1)), absolute, rtol=1e-13, atol=0)


def test_nothing_is_normalised() -> None:
    """Groups compare as they are: three times the weights is three times the score, in every group."""
    model = residual()
    before = [scored(model, name) for name in ("0.0", "1.branches.0.0")]
    with torch.no_grad():
        for path in ("0.0", "1.branches.0.3", "2.branches.0.3"):
            model.get_submodule(path).weight.mul_(3)
    torch.testing.assert_close(scored(model, "0.0"), 3 * before[0], rtol=1e-13, atol=0)
    assert torch.equal(scored(model, "1.branches.0.0"), before[1])


def test_concatenated_writers_of_an_added_width() -> None:
    """Two layers write five channels each, side by side, and one layer adds ten to them."""
    branches = Branches("cat", [nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 5, 1)])
    block = Branches("add", [branches, nn.Conv2d(4, 10, 1)], nn.ReLU())
    model = randomise(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), block, *head(10)))
    one, two, wide = (
        model.get_submodule(f"3.branches.{path}").weight.detach().square().sum((1, 2, 3))
        for path in ("0.branches.0", "0.branches.1", "1")
    )
    groups = [g for g in find_groups(model, X) if any(m.path == "3.branches.1" and m.axis == "out" for m in g.members)]
    assert sum(group.width for group in groups) == 10
    criterion = Magnitude()
    with criterion.collect(model):
        scores = torch.cat([criterion(group) for group in groups])
    torch.testing.assert_close(scores, (torch.cat([one, two]) + wide).sqrt(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=groups)
    model = randomise(nn.Sequential(*conv_bn(3, 6, 1), nn.ReLU(), up, nn.ReLU(), *head(8)))
    halves = up.weight.detach().chunk(groups)  # inputs of each of its groups
    expected = torch.cat([half.square().sum((0, 2, 3)).sqrt() for half in halves])
    torch.testing.assert_close(scored(model, "3"), expected, rtol=1e-13, atol=0)


def test_depthwise_filters_count() -> None:
    dw = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), dw, nn.ReLU(), *head(6)))
    squares = [model[i].weight.detach().square().sum((1, 2, 3)) for i in (0, 2)]
    torch.testing.assert_close(scored(model, "0"), (squares[0] + squares[1]).sqrt(), rtol=1e-13, atol=0)
    torch.testing.assert_close(scored(model, "0", Magnitude(joint=False)), squares[0].sqrt(), rtol=1e-13, atol=0)


def test_linear_layers_behind_flattened_maps() -> None:
    layers = [*conv_bn(3, 4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)]
    model = randomise(nn.Sequential(*layers))
    torch.testing.assert_close(scored(model, "0"), model[0].weight.detach().flatten(1).norm(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(scored(model, "5"), model[5].weight.detach().norm(dim=1), rtol=1e-13, atol=0)


class SqueezeNorm(Squeeze):
    """Squeeze-and-excite whose branch ends in a normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__(width, False)
        self.fc2 = nn.Sequential(self.fc2, nn.BatchNorm2d(width))


@pytest.mark.parametrize("squeeze", [Squeeze(6, False), Squeeze(6, True), SqueezeNorm(6)])
def test_a_factor_beside_the_channel_and_biases_do_not_count(squeeze: nn.Module) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), squeeze, *head(6)))
    expected = model[0].weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(scored(model, "0"), expected, rtol=1e-13, atol=0)
    with torch.no_grad():
        model[0].bias.add_(5)
    torch.testing.assert_close(scored(model, "0"), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_high_power_is_nearly_the_largest_weight(scale: float) -> None:
    """0.001 to the 2000th is far below what any float holds."""
    model = residual()
    layers = [model.get_submodule(path).weight for path in ("0.0", "1.branches.0.3", "2.branches.0.3")]
    with torch.no_grad():
        for weight in layers:
            weight.mul_(scale)
    largest = torch.stack([weight.detach().abs().amax((1, 2, 3)) for weight in layers]).amax(0)
    torch.testing.assert_close(scored(model, "0.0", Magnitude(p=2000)), largest, rtol=5e-3, atol=0)


def test_channels_of_zeros_score_zero() -> None:
    model = residual()
    with torch.no_grad():
        for path in ("0.0", "1.branches.0.3", "2.branches.0.3"):
            model.get_submodule(path).weight[2] = 0
    for p in (1, 2, 7):
        scores = scored(model, "0.0", Magnitude(p))
        assert scores[2] == 0
        assert (scores[[0, 1, 3, 4, 5]] > 0).all()


@pytest.mark.parametrize("p", [0, 0.5, -1, float("inf"), float("nan"), "2", None, True])
def test_bad_p(p: Any) -> None:
    with pytest.raises(CriterionError, match="finite number of at least 1"):
        Magnitude(p)


def test_a_layer_without_weights_is_refused() -> None:
    model = residual()
    group, other = find_groups(model, X)[0], residual()
    other[1].branches[0][3] = nn.ReLU()
    criterion = Magnitude()
    with criterion.collect(other), pytest.raises(CriterionError, match=r"'1\.branches\.0\.3' is a ReLU without"):
        criterion(group)
