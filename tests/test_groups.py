"""Groups as data: numbering, ties, writers and readers, and what they are read from."""

from types import SimpleNamespace

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from networks_at_random import Recipe, networks
from torch import nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.errors import GraphError
from nni_plugin.groups import ChannelGroup, Member


def member(width: int, period: int | None = None, start: int = 0, channels: list[int] | None = None) -> Member:
    index = torch.arange(start, start + width)
    channel = torch.arange(width) if channels is None else torch.tensor(channels)
    return Member("a", "out", "dense", index, channel, (), None if period is None else index % period)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ((member(4),), [0, 1, 2, 3]),
        ((member(6, 3),), [0, 1, 2, 0, 1, 2]),
        ((member(6, 2),), [0, 1, 0, 1, 0, 1]),
        ((member(6, 3), member(6, 2)), [0] * 6),  # both at once: everything hangs together
        ((member(8, 4), member(8, 2)), [0, 1] * 4),
        ((member(4), member(2, 1, 0, [1, 3])), [0, 1, 2, 1]),
    ],
)
def test_units_join_all_ties(members: tuple[Member, ...], expected: list[int]) -> None:
    group = ChannelGroup("a", len(expected), members)
    assert group.unit.tolist() == expected
    assert group.units == len(set(expected))


def test_freezing_gives_another_group() -> None:
    group = ChannelGroup("a", 4, (member(4),))
    frozen = group.freeze("because")
    assert (group.fixed, frozen.fixed, frozen.width) == (None, "because", 4)
    assert ChannelGroup.from_host(group) is group


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(networks())
def test_groups_cover_every_tensor_once(recipe: Recipe) -> None:
    """Every position of every channel dimension belongs to one channel of one group, or reads the input."""
    model = recipe.build()
    groups = find_groups(model, recipe.inputs())
    assert [g.name for g in groups] == [n for n, _ in model.named_modules() if n in {g.name for g in groups}]
    seen: dict[tuple[str, int], list[int]] = {}
    tensors = dict(model.state_dict())
    for group in groups:
        assert set(group.members[0].channel.tolist()) == set(range(group.width))
        assert group.writers
        assert {m.path for m in group.writers}.isdisjoint({m.path for m in group.members if m.kind == "prelu"})
        for piece in group.slices:
            assert len(piece.index) == len(piece.channel)
            assert 0 <= int(piece.channel.min()) <= int(piece.channel.max()) < group.width
            assert int(piece.index.max()) < tensors[piece.tensor].shape[piece.dim]
            seen.setdefault((piece.tensor, piece.dim), []).extend(piece.index.tolist())
    for (name, dim), positions in seen.items():
        assert sorted(set(positions)) == list(range(tensors[name].shape[dim])), (name, dim)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d | nn.BatchNorm2d):
            for leaf, tensor in module.state_dict().items():
                if tensor.dim():
                    assert any(key[0] == f"{name}.{leaf}" for key in seen), f"{name}.{leaf}"


def test_a_group_of_torch_pruning_is_read_in_the_order_of_its_root() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 8, 8))
    host = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [4, 1, 5])
    group = ChannelGroup.from_host(host)
    assert (group.name, group.width) == ("0", 3)
    for item in group.members:
        assert [item.index[item.channel == c].tolist() for c in range(3)] == [[4], [1], [5]]


def test_a_group_without_its_graph_is_refused() -> None:
    for foreign in (SimpleNamespace(), [], object()):
        with pytest.raises(GraphError, match="dependency graph"):
            ChannelGroup.from_host(foreign)
