"""Groups renumbered after a cut: what a fresh look at the smaller network finds, and nothing else touched."""

import copy

import torch
from hypothesis import given, settings
from networks_at_random import Recipe, any_plan, conv_bn, networks, randomise
from torch import Tensor, nn

from nni_plugin import PruningPlan
from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.groups import ChannelGroup
from nni_plugin.narrowing import gone_positions, narrowed, staying


def kept_by(plan: PruningPlan) -> dict[str, Tensor]:
    return {name: torch.tensor(kept) for name, kept in plan.kept().items()}


def places(groups: list[ChannelGroup]) -> dict[str, object]:
    """Return which channel lies where, whatever the order of members and positions."""
    return {
        group.name: (
            group.width,
            group.unit.tolist(),
            {
                (piece.tensor, piece.dim, place, channel)
                for piece in group.slices
                for place, channel in zip(piece.index.tolist(), piece.channel.tolist(), strict=True)
            },
            {
                (member.path, member.axis, place, channel)
                for member in group.members
                for place, channel in zip(member.index.tolist(), member.channel.tolist(), strict=True)
            },
            sorted((size.path, size.name, str(size.item), sorted(size.channel.tolist())) for size in group.sizes),
        )
        for group in groups
        if group.fixed is None
    }


@settings(max_examples=40, deadline=None)
@given(networks())
def test_renumbered_groups_are_those_of_the_smaller_network(recipe: Recipe) -> None:
    model, example = recipe.build(), recipe.inputs()
    groups = find_groups(model, example)
    plan = any_plan(groups, 3, least=2)
    renumbered = narrowed(groups, kept_by(plan))
    cut_channels(model, plan, groups)
    found = places(find_groups(model, example))
    ours = places(renumbered)
    assert {name: ours[name] for name in found} == found


def test_what_loses_nothing_is_taken_over() -> None:
    layers = [*conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 5), nn.ReLU(), *conv_bn(5, 4), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    groups = find_groups(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    before = {group.name: copy.deepcopy(group.members) for group in groups}
    after = {group.name: group for group in narrowed(groups, {"0": torch.tensor([0, 2, 3, 4, 5])})}
    kept = {group.name: group for group in groups}
    assert after["0"].width == 5
    assert after["3"].width == 5
    assert all(new is old for new, old in zip(after["6"].members, kept["6"].members, strict=True))
    assert all(new is old for new, old in zip(after["3"].members, kept["3"].members, strict=True))
    for group in groups:  # and the old ones are as they were
        for old, member in zip(before[group.name], group.members, strict=True):
            assert torch.equal(old.index, member.index)
            assert torch.equal(old.channel, member.channel)


def test_slices_with_the_same_positions_share_them() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 3)))
    groups = find_groups(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    (group,) = [group for group in narrowed(groups, {"0": torch.tensor([1, 2, 5])}) if group.name == "0"]
    (norm,) = [member for member in group.members if member.path == "1"]
    assert len({id(piece.index) for piece in norm.slices}) == 1
    (reader,) = group.readers
    assert reader.index.tolist() == list(range(3 * 64))
    assert reader.channel.tolist() == [channel for channel in range(3) for _ in range(64)]


def test_gone_positions_name_every_place_that_loses_some() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3)))
    groups = find_groups(model, torch.randn(1, 3, 2, 2, dtype=torch.float64))
    kept = {"0": [0, 2, 3]}
    gone = gone_positions(groups, staying(groups, kept))
    assert {place: positions.tolist() for place, positions in gone.items()} == {
        ("0", "out"): [1],
        ("0.weight", 0): [1],
        ("1", "out"): [1],
        **{(f"1.{name}", 0): [1] for name in ("weight", "bias", "running_mean", "running_var")},
        ("4", "in"): [4, 5, 6, 7],
        ("4.weight", 1): [4, 5, 6, 7],
    }
    assert gone_positions(groups, staying(groups, {"0": range(4)})) == {}
