"""Groups as data: numbering, ties, writers and readers, and what they are read from."""

from types import SimpleNamespace

import pytest
import timm
import torch
import torch_pruning as tp
from hypothesis import given, settings
from networks_at_random import Branches, Recipe, Squeeze, Twice, conv_bn, networks
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


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(networks())
def test_no_position_is_named_twice(recipe: Recipe) -> None:
    """Sums over members count every weight once."""
    for group in find_groups(recipe.build(), recipe.inputs()):
        named = [(m.path, m.axis, i) for m in group.members for i in m.index.tolist()]
        assert len(set(named)) == len(named)


# -- which groups may be pruned -------------------------------------------------------------------------------

STAGES = {"resnet50": ((3, 4, 6, 3), 7552), "resnet101": ((3, 4, 23, 3), 16256)}


@pytest.mark.parametrize("name", STAGES)
def test_gates_of_residual_networks(name: str) -> None:
    """Four stages share their skip connections, 3840 channels; the others stand alone; the stem's 64 are not counted.

    With the stem left out that is 11392 channels of ResNet-50 and 20096 of ResNet-101, as Molchanov et al. count.
    """
    blocks, inner = STAGES[name]
    groups = [group for group in find_groups(timm.create_model(name), torch.randn(1, 3, 32, 32)) if not group.fixed]
    skips = [group for group in groups if group.residual]
    alone = [group for group in groups if not group.residual and group.name != "conv1"]
    assert [group.width for group in skips] == [256, 512, 1024, 2048]
    assert tuple(group.blocks for group in skips) == blocks
    assert (sum(group.width for group in skips), sum(group.width for group in alone)) == (3840, inner)
    assert {group.blocks for group in alone} == {1}
    assert sum(group.width for group in groups) - 64 == {"resnet50": 11392, "resnet101": 20096}[name]


def group_of(model: nn.Module, name: str) -> ChannelGroup:
    groups = find_groups(model.double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    return next(g for g in groups if any(m.path == name and m.axis == "out" for m in g.members))


def net(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*conv_bn(3, 4), nn.ReLU(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def skip(*layers: nn.Module) -> nn.Module:
    return Branches("add", [nn.Sequential(*layers), nn.Identity()])


@pytest.mark.parametrize(
    ("model", "layer", "blocks"),
    [
        pytest.param(net(width=4), "0", 0, id="plain"),
        pytest.param(net(skip(*conv_bn(4, 4)), width=4), "0", 1, id="one block on a stem"),
        pytest.param(net(*[skip(*conv_bn(4, 4)) for _ in range(3)], width=4), "0", 3, id="three blocks"),
        pytest.param(
            net(Branches("add", [nn.Sequential(*conv_bn(4, 6)) for _ in range(3)]), width=6),
            "3.branches.0.0",
            2,
            id="three branches",
        ),
        pytest.param(net(Branches("cat", [nn.Sequential(*conv_bn(4, w)) for w in (5, 3)]), width=8), "0", 0, id="read"),
        pytest.param(
            net(Branches("cat", [nn.Sequential(*conv_bn(4, w)) for w in (5, 3)]), nn.Conv2d(8, 4, 1), width=4),
            "3.branches.1.0",
            0,
            id="concatenation",
        ),
        pytest.param(
            net(
                Branches(
                    "add",
                    [Branches("cat", [nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)]), nn.Conv2d(4, 10, 1)],
                ),
                width=10,
            ),
            "3.branches.0.branches.1",
            1,
            id="added to a concatenation",
        ),
        pytest.param(
            net(Branches("cat", [nn.Identity(), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))]),
                nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 4, 1), width=4),
            "0", 0, id="two norms behind one layer",
        ),
        pytest.param(net(*conv_bn(4, 6), nn.ReLU(), *conv_bn(6, 6, 3, 6), width=6), "3", 0, id="depthwise"),
        pytest.param(
            net(skip(*conv_bn(4, 6), nn.ReLU(), *conv_bn(6, 6, 3, 6), *conv_bn(6, 4)), width=4),
            "0", 1, id="inverted residual",
        ),
        pytest.param(net(Squeeze(4, False), width=4), "0", 0, id="factor"),
    ],
)  # fmt: skip
def test_residual_groups_are_those_that_an_addition_couples(model: nn.Module, layer: str, blocks: int) -> None:
    group = group_of(model, layer)
    assert (group.residual, group.blocks) == (blocks > 0, max(blocks, 1))


def test_a_layer_on_its_own_output_counts_as_an_addition_would() -> None:
    group = group_of(net(Twice(nn.Conv2d(4, 4, 3, padding=1)), width=4), "0")
    assert (group.residual, group.blocks) == (True, 1)


def test_a_factor_that_ends_in_a_normalisation_lies_beside_as_a_whole() -> None:
    squeeze = Squeeze(4, False)
    squeeze.fc2 = nn.Sequential(squeeze.fc2, nn.BatchNorm2d(4))
    group = group_of(net(squeeze, width=4), "0")
    roles = {m.path: (m.writer, m.beside) for m in group.members if m.axis == "out"}
    assert roles == {
        "0": (False, False),
        "1": (True, False),
        "3.fc2.0": (False, True),
        "3.fc2.1": (False, True),
    }
    assert not group.residual
