"""Verify: a right plan is proved, a wrong coupling is told, and neither changes the network."""

import warnings
from dataclasses import replace

import pytest
import torch
from networks_at_random import Recipe, any_plan, assert_same, conv_bn, randomise, state_of
from torch import nn

from nni_plugin import GroupPlan, PruningPlan, verify
from nni_plugin.adapters.torch_pruning import Parity, apply_plan, find_groups, sound_groups
from nni_plugin.cost import count
from nni_plugin.errors import PlanError, SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.networks import resnet20, resnet56

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def test_a_right_plan_is_proved_and_the_network_untouched() -> None:
    recipe = Recipe((("inverted", 4, "silu"), ("concat", 4, "sigmoid"), ("residual", 3, "relu")), "mean", 1)
    model, example = recipe.build().train(), recipe.inputs()
    model(example).sum().backward()
    before = state_of(model)
    parity = verify(model, any_plan(find_groups(model, example), 0), example)
    assert parity.ok
    assert parity.max_rel < 1e-12
    assert parity.max_abs >= 0
    assert str(parity).endswith("(equal within 0.0001)")
    assert_same(model, before)
    assert model.training
    assert not hasattr(model, "pruning_plan")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_difference(dtype: torch.dtype) -> None:
    """Its rounding alone is above the tolerance."""
    torch.manual_seed(0)
    model, example = randomise(resnet20(width_mult=0.5)).to(dtype), X.to(dtype)
    groups = find_groups(model, example)
    plan = any_plan(groups, 0)
    before = state_of(model)
    parity = verify(model, plan, example)
    assert parity.max_rel < 1e-5
    assert_same(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no group is left whole
        assert [group.fixed for group in sound_groups(model, groups, example)] == [group.fixed for group in groups]
    apply_plan(model, plan, example)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_wrong_coupling_is_told() -> None:
    """Channels of a reader in another order than those of its writer: it runs, and computes something else."""
    model = randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), *head(5)))
    groups = find_groups(model, X)
    reader = groups[0].readers[0]
    wrong = replace(reader.slices[0], channel=reader.slices[0].channel.flip(0))
    members = tuple(replace(m, slices=(wrong,)) if m is reader else m for m in groups[0].members)
    groups[0] = replace(groups[0], members=members)
    parity = verify(model, PruningPlan((GroupPlan("0", 6, (0, 1, 2)),)), X, groups=groups)
    assert not parity.ok
    assert parity.max_rel > 1e-3
    assert "NOT EQUAL" in str(parity)


def test_what_is_not_a_number_is_never_equal() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), *head(6)))
    model[5].bias.data[0] = float("nan")
    assert not verify(model, PruningPlan((GroupPlan("0", 6, (0, 1, 2)),)), X).ok


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.GroupNorm(1, 8)])
def test_norms_over_removed_channels_see_those_that_remain(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), *head(4)).double()
    plan = PruningPlan((GroupPlan("0", 8, (0, 1, 4, 5)),))
    parity = verify(model, plan, X)
    assert parity.renormalised == ("1",)
    assert parity.max_rel <= 1e-12
    assert "'1' normalising over the channels that remain" in str(parity)
    # Elsewhere nothing is.
    assert verify(model, PruningPlan((GroupPlan("3", 4, (0, 1)),)), X).renormalised == ()


def test_a_plan_that_does_not_fit_is_refused_and_not_compared() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 8), *conv_bn(8, 8, 3, 2), nn.ReLU(), *head(8)))
    for plan in (
        PruningPlan((GroupPlan("nowhere", 8, (0, 1)),)),
        PruningPlan((GroupPlan("0", 9, (0, 1)),)),
        PruningPlan((GroupPlan("0", 8, (0, 1, 2)),)),
        PruningPlan((GroupPlan("6", 3, (0, 1)),)),
    ):
        with pytest.raises((PlanError, SurgeryError)):
            verify(model, plan, X)


def test_several_outputs_are_all_compared() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = torch.relu(self.stem(x))
            return {"a": self.a(y), "b": self.b(y)}

    assert verify(Two().double(), PruningPlan((GroupPlan("stem", 6, (1, 2)),)), X).max_rel < 1e-12


def test_ok_is_a_matter_of_tolerance() -> None:
    assert Parity(1.0, 1e-5, 1e-4, ()).ok
    assert not Parity(1.0, 1e-3, 1e-4, ()).ok
    assert not Parity(1.0, 1e-3, 1e-4, ("norm",)).ok
    assert not Parity(float("inf"), float("inf"), 1e-4).ok


class Normed(nn.Module):
    """Two layers, the first behind a norm over channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.first = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3)
        self.second, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.norm(self.stem(x)).relu()).relu()
        return self.fc(self.second(x).mean((2, 3)))


def misread(group: ChannelGroup) -> ChannelGroup:
    """Take the readers' channels for those from the other end."""
    members = []
    for member in group.members:
        if member.axis == "in":
            pieces = tuple(replace(piece, index=piece.index.flip(0)) for piece in member.slices)
            member = replace(member, index=member.index.flip(0), slices=pieces)
        members.append(member)
    return replace(group, members=tuple(members))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8)])
def test_a_norm_does_not_hide_what_is_wrong_elsewhere(norm: nn.Module) -> None:
    model = Normed(norm).double()
    nn.init.zeros_(norm.weight)  # nor does a branch that starts at zero
    wrong = [misread(group) if group.name == "first" else group for group in find_groups(model, X)]
    with pytest.warns(UserWarning, match="'first' is left whole"):
        groups = sound_groups(model, wrong, X)
    assert [group.name for group in groups if group.fixed is None] == ["stem", "second"]


class Blocks(nn.Module):
    """Three residual blocks of one make."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
            for _ in range(3)
        )
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.relu().mean((2, 3)))


@pytest.mark.parametrize("at_fault", [["blocks.1.0"], ["blocks.0.0", "blocks.1.0", "blocks.2.0"]])
def test_groups_built_alike_fail_together_or_are_tried_again(at_fault: list[str]) -> None:
    model = Blocks().double()
    found = find_groups(model, X)
    wrong = [misread(group) if group.name in at_fault else group for group in found]
    with pytest.warns(UserWarning, match="left whole") as said:
        groups = sound_groups(model, wrong, X)
    assert ["(and 2 built like it)" in str(one.message) for one in said] == [len(at_fault) == 3]
    assert [group.name for group in groups if group.fixed] == [*at_fault, "fc"]


def test_a_plan_of_a_network_of_another_size_is_not_applied_in_silence() -> None:
    shallow, deep = resnet20(), resnet56()
    images = torch.zeros(1, 3, 32, 32)
    plan = PruningPlan((GroupPlan("layer1.0.conv1", 16, tuple(range(8))),), cost_before=count(shallow, images))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify(shallow, plan, images).ok
    for act in (verify, apply_plan):
        with pytest.warns(UserWarning, match=r"network of 27\d,\d+ parameters, this one has 85\d,\d+"):
            act(deep, plan, images)
