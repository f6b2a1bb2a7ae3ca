"""BNScale: which normalisations count, and a clear word where there are none."""

import pytest
import torch
from hypothesis import given, settings
from networks_at_random import Branches, Recipe, Squeeze, conv_bn, networks, randomise
from torch import Tensor, nn

from nni_plugin import Channels, plan_channels
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import BNScale
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def group_of(model: nn.Module, name: str) -> ChannelGroup:
    return next(g for g in find_groups(model, X) if any(m.path == name and m.axis == "out" for m in g.members))


def scored(model: nn.Module, name: str, joint: bool = True) -> Tensor:
    criterion = BNScale(joint)
    with criterion.collect(model):
        return criterion(group_of(model, name))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def scales(model: nn.Module, *paths: str) -> list[Tensor]:
    return [model.get_submodule(path).weight.detach().abs() for path in paths]


def residual() -> nn.Module:
    def block() -> nn.Module:
        return Branches("add", [nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6)), nn.Identity()], nn.ReLU())

    model = randomise(nn.Sequential(nn.Sequential(*conv_bn(3, 6), nn.ReLU()), block(), block(), *head(6)))
    with torch.no_grad():
        model[1].branches[0][4].weight[::2] *= -1  # the sign says nothing
    return model


def test_a_stage_sums_the_scales_of_its_blocks() -> None:
    model = residual()
    one, two, three = scales(model, "0.1", "1.branches.0.4", "2.branches.0.4")
    torch.testing.assert_close(scored(model, "0.0"), one + two + three, rtol=1e-15, atol=0)
    assert torch.equal(scored(model, "0.0", joint=False), one)
    assert torch.equal(scored(model, "1.branches.0.0"), *scales(model, "1.branches.0.1"))


def test_inverted_residual_counts_the_normalisation_behind_the_depthwise_layer() -> None:
    layers = [*conv_bn(4, 6, 1), nn.ReLU6(), *conv_bn(6, 6, 3, 6), nn.ReLU6(), *conv_bn(6, 4, 1)]
    block = Branches("add", [nn.Sequential(*layers), nn.Identity()])
    model = randomise(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), block, *head(4)))
    assert torch.equal(scored(model, "3.branches.0.0"), *scales(model, "3.branches.0.4"))


def test_dense_net_sums_over_the_readers_normalisations() -> None:
    inside = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    layers = [nn.Conv2d(3, 4, 3), Branches("cat", [nn.Identity(), inside]), nn.BatchNorm2d(7), nn.ReLU(), *head(7)]
    model = randomise(nn.Sequential(*layers))
    inner, last = scales(model, "1.branches.1.0", "2")
    torch.testing.assert_close(scored(model, "0"), inner + last[:4], rtol=1e-15, atol=0)
    assert torch.equal(scored(model, "1.branches.1.2"), last[4:])


def test_a_normalisation_beside_the_channel_does_not_count() -> None:
    squeeze = Squeeze(6, False)
    squeeze.fc2 = nn.Sequential(squeeze.fc2, nn.BatchNorm2d(6))
    model = randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), squeeze, *head(6)))
    assert torch.equal(scored(model, "0"), *scales(model, "1"))


@pytest.mark.parametrize("norm", [nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(1, 6)])
def test_other_normalisations(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), *head(6)).double()
    torch.nn.init.uniform_(norm.weight)
    assert torch.equal(scored(model, "0"), *scales(model, "1"))


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(networks(most=3))
def test_random_networks(recipe: Recipe) -> None:
    model, criterion = recipe.build(), BNScale()
    for group in find_groups(model, recipe.inputs()):
        if group.fixed is not None:
            continue
        expected = [0.0] * group.width
        for member in group.writers:
            layer = model.get_submodule(member.path) if member.kind != "parameter" else None
            if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
                for position, channel in zip(member.index.tolist(), member.channel.tolist(), strict=True):
                    expected[channel] += abs(layer.weight[position].item())
        with criterion.collect(model):
            if 0.0 in expected:
                with pytest.raises(CriterionError, match="no affine normalisation"):
                    criterion(group)
            else:
                torch.testing.assert_close(
                    criterion(group), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
                )


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(6, affine=False)])
def test_without_an_affine_normalisation(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), *head(6)).double()
    with pytest.raises(CriterionError, match=r"group '0' \(written by '.'\) have no affine normalisation.*ignore"):
        scored(model, "0")


def test_only_some_channels_normalised() -> None:
    parts = [nn.Sequential(*conv_bn(4, 3)), nn.Conv2d(4, 3, 1)]
    both = Branches("cat", parts)
    model = nn.Sequential(*conv_bn(3, 4), nn.ReLU(), both, nn.ReLU(), nn.Conv2d(6, 6, 1), *head(6)).double()
    assert torch.equal(scored(model, "3.branches.0.0"), *scales(model, "3.branches.0.1"))
    with pytest.raises(CriterionError, match="3 of 3 channels"):
        scored(model, "3.branches.1")


def test_a_network_with_bare_layers_is_planned_once_they_are_ignored() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), *head(5)))
    with pytest.raises(CriterionError, match="'3'"):
        plan_channels(model, X, BNScale(), [], lambda m, b: m(b).sum(), Channels(0.5))
    plan = plan_channels(model, X, BNScale(), [], lambda m, b: m(b).sum(), Channels(0.5), ignore=["3"])
    best = model[1].weight.detach().abs().topk(3).indices.sort().values
    assert plan.kept()["0"] == tuple(best.tolist())
