"""GeometricMedian against a loop over pairs of channels; bounded memory; masks and cuts score alike."""

import pytest
import torch
from filters_by_gradient import filters_of
from hypothesis import given, settings
from networks_at_random import Branches, Recipe, any_plan, conv_bn, networks, randomise
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.criteria import GeometricMedian, geometric_median
from nni_plugin.groups import ChannelGroup
from nni_plugin.masks import mask_plan

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def scored(model: nn.Module, group: ChannelGroup) -> Tensor:
    criterion = GeometricMedian()
    with criterion.collect(model):
        return criterion(group)


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def by_hand(model: nn.Module, group: ChannelGroup) -> Tensor:
    filters = [filters_of(model, group, channel) for channel in range(group.width)]
    sizes = {path: len(weights) for each in filters for path, weights in each.items()}
    scores = []
    for one in filters:
        total = 0.0
        for other in filters:
            pairs = [(one.get(p, torch.zeros(n)), other.get(p, torch.zeros(n))) for p, n in sizes.items()]
            total += float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5
        scores.append(total)
    return torch.tensor(scores, dtype=torch.float64)


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(networks(most=3))
def test_random_networks_by_hand(recipe: Recipe) -> None:
    model = recipe.build()
    for group in find_groups(model, recipe.inputs()):
        if group.fixed is None:
            torch.testing.assert_close(scored(model, group), by_hand(model, group), rtol=1e-11, atol=0)


def residual(width: int = 6) -> nn.Module:
    def block() -> nn.Module:
        inside = nn.Sequential(*conv_bn(width, 4), nn.ReLU(), *conv_bn(4, width))
        return Branches("add", [inside, nn.Identity()], nn.ReLU())

    layers = [nn.Sequential(*conv_bn(3, width), nn.ReLU()), block(), block()]
    return randomise(nn.Sequential(*layers, *head(width)))


def joint_weights(model: nn.Module) -> Tensor:
    paths = ("0.0", "1.branches.0.3", "2.branches.0.3")
    return torch.cat([model.get_submodule(path).weight.detach().flatten(1) for path in paths], dim=1)


@pytest.mark.parametrize("block", [1, 700, 2**21])
def test_a_wide_group_some_rows_at_a_time(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 25 rows distances come from matrix products, which cancel; the sums hold."""
    monkeypatch.setattr(geometric_median, "_BLOCK", block)
    model = residual(70)
    group = find_groups(model, X)[0]
    filters = joint_weights(model)
    expected = (filters[:, None] - filters[None]).square().sum(-1).sqrt().sum(1)
    scores = scored(model, group)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)
    squares = (filters[:, None] - filters[None]).square().sum(-1).sum(1)
    assert not torch.equal(scores.argsort(), squares.argsort())  # distances are not their squares


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometric_median, "_BLOCK", 300)
    seen, real = [], torch.cdist

    def watched(a: Tensor, b: Tensor) -> Tensor:
        distances = real(a, b)
        seen.append(distances.numel())
        return distances

    monkeypatch.setattr(torch, "cdist", watched)
    model = residual(70)
    scored(model, find_groups(model, X)[0])
    assert max(seen) <= 300
    assert sum(seen) == 70 * 70


def test_a_shift_of_all_filters_changes_nothing_and_scale_scales() -> None:
    model = residual()
    group = find_groups(model, X)[0]
    before = scored(model, group)
    with torch.no_grad():
        model[0][0].weight += torch.randn_like(model[0][0].weight[:1])
    torch.testing.assert_close(scored(model, group), before, rtol=1e-12, atol=0)
    with torch.no_grad():
        for path in ("0.0", "1.branches.0.3", "2.branches.0.3"):
            model.get_submodule(path).weight *= 3
    torch.testing.assert_close(scored(model, group), 3 * before, rtol=1e-12, atol=0)


def test_equal_filters_are_worth_nothing() -> None:
    model = residual(40)
    with torch.no_grad():
        for path in ("0.0", "1.branches.0.3", "2.branches.0.3"):
            weight = model.get_submodule(path).weight
            weight.copy_(weight[:1].expand_as(weight).clone())
    group = find_groups(model, X)[0]
    assert float(scored(model, group).max()) < 1e-12


def test_what_lies_in_the_middle_goes_first() -> None:
    """By norm the largest filter would stay; near the others it is the one that they replace."""
    model = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.ReLU(), *head(5)).double()
    points = torch.tensor([[9.0, 9, 9], [8, 9, 9], [10, 9, 9], [9, 8, 9], [9, 9, 2]], dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(points[:, :, None, None])
    assert int(scored(model, find_groups(model, X)[0]).argmin()) == 0


@settings(derandomize=True, database=None, deadline=None, max_examples=15)
@given(networks(most=3))
def test_masked_networks_score_what_cut_ones_do(recipe: Recipe) -> None:
    model = recipe.build()
    groups = find_groups(model, recipe.inputs())
    plan = any_plan(groups, recipe.seed)
    mask_plan(model, plan, groups)
    masked = {group.name: scored(model, group) for group in groups if group.fixed is None}
    cut_channels(model, plan, groups)
    narrow = {group.name: group for group in find_groups(model, recipe.inputs())}
    for name, kept in plan.kept().items():
        torch.testing.assert_close(masked[name][list(kept)], scored(model, narrow[name]), rtol=1e-11, atol=1e-15)


def test_all_filters_at_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), *head(5)).double()
    nn.init.zeros_(model[0].weight)
    assert scored(model, find_groups(model, X)[0]).tolist() == [0.0] * 5
