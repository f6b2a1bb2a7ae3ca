"""Groups: what is coupled, what must stay whole and why, and that asking leaves the network as it was."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from networks_at_random import Branches, Recipe, Squeeze, any_plan, assert_same, conv_bn, randomise, state_of
from torch import Tensor, nn

from nni_plugin import verify
from nni_plugin.adapters.torch_pruning import apply_plan, find_groups
from nni_plugin.errors import GraphError, NNIPluginError
from nni_plugin.groups import ChannelGroup
from nni_plugin.networks import resnet20

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def chain() -> nn.Module:
    return randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 5), nn.ReLU(), *head(5)))


def reasons(groups: list[ChannelGroup]) -> dict[str, str | None]:
    return {group.name: group.fixed for group in groups}


def test_groups_stand_in_the_order_of_the_network_and_the_classifier_stays_whole() -> None:
    groups = find_groups(chain(), X)
    assert [(g.name, g.width, g.units) for g in groups] == [("0", 6, 6), ("3", 5, 5), ("8", 3, 3)]
    fixed = reasons(groups)
    assert fixed["0"] is None
    assert fixed["3"] is None
    assert "output" in (fixed["8"] or "")
    assert {(m.path, m.axis, m.kind, m.writer) for m in groups[0].members} == {
        ("0", "out", "dense", False),
        ("1", "out", "norm", True),
        ("3", "in", "dense", False),
    }


def test_every_channel_of_resnet_20_may_go() -> None:
    groups = find_groups(resnet20(), torch.zeros(1, 3, 32, 32))
    # Three stages with one shared width each, and one inner width a block.
    assert sum(group.width for group in groups if group.fixed is None) == 112 + 3 * 112
    stage = groups[0]
    assert stage.name == "conv1"
    assert [m.kind for m in stage.writers] == ["norm"] * 4
    assert [group.name for group in groups if group.fixed] == ["fc"]


@pytest.mark.parametrize(("name", "gates"), [("resnet50", 11_392 + 64), ("resnet34", 8_512 + 64 - 64)])
def test_channel_counts_of_torchvision_networks(name: str, gates: int) -> None:
    """The paper's gates and, for bottlenecks, the stem, whose width is not shared with a stage there.

    With basic blocks the paper's code gates the second normalisation of a block and the stage: one channel here.
    """
    model = getattr(torchvision.models, name)()
    groups = [group for group in find_groups(model, torch.zeros(1, 3, 64, 64)) if group.fixed is None]
    if name == "resnet34":
        inner = 3 * 64 + 4 * 128 + 6 * 256 + 3 * 512
        assert sum(group.width for group in groups) == inner + 64 + 128 + 256 + 512
    else:
        assert sum(group.width for group in groups) == gates


def test_asking_leaves_the_network_as_it_was() -> None:
    model = chain().train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model(X).sum().backward()
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    before, random = state_of(model), torch.random.get_rng_state()
    find_groups(model, X)
    assert_same(model, before)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not X.requires_grad
    for module in model.modules():
        assert not module._forward_hooks
    copy.deepcopy(model)


def test_a_frozen_network_has_the_same_groups() -> None:
    model = chain()
    expected = [(g.name, g.width, g.fixed, len(g.members)) for g in find_groups(model, X)]
    model.requires_grad_(False)
    with torch.no_grad():
        assert [(g.name, g.width, g.fixed, len(g.members)) for g in find_groups(model, X)] == expected
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("by", ["name", "module"])
def test_ignored_layers_stay_whole(by: str) -> None:
    model = nn.Sequential(nn.Sequential(*conv_bn(3, 6)), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), *head(5)).double()
    groups = find_groups(model, X, ignore=["0" if by == "name" else model[0]])
    assert "ignored" in (reasons(groups)["0.0"] or "")
    assert reasons(groups)["2"] is None
    # A layer that only reads does not keep what it reads.
    groups = find_groups(model, X, ignore=["2" if by == "name" else model[2]])
    assert reasons(groups)["0.0"] is None
    assert "ignored" in (reasons(groups)["2"] or "")


def test_a_layer_to_ignore_must_exist() -> None:
    with pytest.raises(GraphError, match="'nowhere'"):
        find_groups(chain(), X, ignore=["nowhere"])
    with pytest.raises(GraphError, match="not in the model"):
        find_groups(chain(), X, ignore=[nn.Conv2d(3, 3, 1)])


def test_what_is_added_to_the_input_keeps_its_width() -> None:
    inside = nn.Sequential(*conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 3))
    model = randomise(nn.Sequential(Branches("add", [inside, nn.Identity()]), *conv_bn(3, 5), nn.ReLU(), *head(5)))
    fixed = reasons(find_groups(model, X))
    assert fixed["0.branches.0.0"] is None
    assert "input" in (fixed["0.branches.0.3"] or "")
    assert fixed["1"] is None


def test_a_depthwise_convolution_of_the_input_keeps_its_width() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 3, 3, 3), nn.ReLU(), *conv_bn(3, 5), nn.ReLU(), *head(5)))
    fixed = reasons(find_groups(model, X))
    assert "input" in (fixed["0"] or "")
    assert fixed["3"] is None


def test_several_outputs_stay_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = torch.relu(self.stem(x))
            return {"features": torch.relu(self.a(y)), "out": self.b(y)}

    fixed = reasons(find_groups(Two().double(), X))
    assert fixed["stem"] is None
    assert "output" in (fixed["a"] or "")
    assert "output" in (fixed["b"] or "")


def test_units_of_grouped_convolutions() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 8, 1), *conv_bn(8, 12, 3, 4), nn.ReLU(), *head(12)))
    first, second = find_groups(model, X)[:2]
    assert first.unit.tolist() == [0, 1] * 4
    assert second.unit.tolist() == [0, 1, 2] * 4


def test_units_of_group_normalisation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), *head(8)).double()
    assert find_groups(model, X)[0].unit.tolist() == [0, 1, 2, 3] * 2
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(8, 8), nn.ReLU(), *head(8)).double()
    assert "together" in (find_groups(model, X)[0].fixed or "")


def test_writers_of_squeeze_and_excite_and_of_products() -> None:
    layers = [*conv_bn(3, 6, 1), nn.SiLU(), Squeeze(6, False), *conv_bn(6, 4, 1), *head(4)]
    group = find_groups(randomise(nn.Sequential(*layers)), X)[0]
    assert [member.path for member in group.writers] == ["1"]
    assert {member.path for member in group.readers} == {"3.fc1", "4"}


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        # One filter a group over two inputs: inputs and outputs are tied in a way that is not modelled.
        (nn.Conv2d(8, 4, 3, groups=4), "cannot be cut"),
        (nn.LayerNorm([8, 8, 8]), "cannot be cut"),
    ],
    ids=["one-filter-a-group", "layer-norm-over-maps"],
)
def test_layers_that_cannot_be_cut_keep_their_groups_whole(layer: nn.Module, text: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))
    model = model.double()
    model(X)
    fixed = reasons(find_groups(model, X))
    assert text in (fixed["0"] or "")


class Net(nn.Module):
    """A stem of 8 channels, something done to it, a convolution and a head."""

    def __init__(self, do: object, width: int = 8, spatial: bool = True) -> None:
        super().__init__()
        self.stem, self.other = nn.Sequential(*conv_bn(3, 8), nn.ReLU()), nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.next = nn.Conv2d(width, 5, 1) if spatial else nn.Linear(width, 5)
        self.do, self.spatial = do, spatial
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.next(self.do(self.stem(x), self.other(x)))  # type: ignore[operator]
        return self.head(torch.relu(y.mean((2, 3)) if self.spatial else y))


def shuffle(a: Tensor, b: Tensor) -> Tensor:
    y = torch.cat([a, b], 1)
    n, c, h, w = y.shape
    return y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


HARD = {
    "flattened-concatenation": (
        lambda a, b: torch.cat([a[:, :, ::4, ::4].flatten(1), b[:, :, ::4, ::4].flatten(1)], 1),
        64,
        False,
    ),
    "channel-shuffle": (shuffle, 16, True),
    "gated-linear-unit": (lambda a, b: nn.functional.glu(a, 1) + b[:, :4], 4, True),
    "chunks": (lambda a, b: torch.sigmoid(a.chunk(2, 1)[0]) * b.chunk(2, 1)[1], 4, True),
    "unequal-split": (lambda a, b: torch.cat(a.split([3, 5], 1)[::-1], 1) + b, 8, True),
    "slice": (lambda a, b: a[:, 2:6] + b[:, :4], 4, True),
    "pixel-shuffle": (lambda a, b: nn.functional.pixel_shuffle(a + b, 2), 2, True),
    "flip": (lambda a, b: a.flip(1) + b, 8, True),
    "index": (lambda a, b: a[:, [3, 1, 2, 0, 7, 6, 5, 4]] + b, 8, True),
    "roll": (lambda a, b: a.roll(1, 1) + b, 8, True),
    "outer-product": (lambda a, b: torch.einsum("nchw,ndhw->ncdh", a, b).sum(2)[..., None], 8, True),
    "sum-and-product": (lambda a, b: torch.cat([a + b, a * b], 1), 16, True),
    "concatenated-twice": (lambda a, b: torch.cat([a, a + b, b], 1), 24, True),
    "sum-over-channels": (lambda a, b: a * b.sum(1, keepdim=True), 8, True),
}


@pytest.mark.parametrize("name", list(HARD))
def test_operators_on_channels_are_never_cut_silently_wrong(name: str) -> None:
    """Right, or refused by a clear error with the network as it was; a plan that applies gives the masked output."""
    torch.manual_seed(1)
    do, width, spatial = HARD[name]
    model = randomise(Net(do, width, spatial))
    before = state_of(model)
    for seed in range(6):
        slim = copy.deepcopy(model)
        try:
            groups = find_groups(slim, X)
            plan = any_plan(groups, seed)
            apply_plan(slim, plan, X)
        except NNIPluginError:
            assert_same(slim, before)
            continue
        assert verify(model, plan, X, groups=groups).max_rel <= 1e-9


def test_one_layer_called_twice_is_coupled_to_itself() -> None:
    recipe = Recipe((("conv", 4, "relu"), ("shared", 4, "relu"), ("conv", 3, "relu")), "mean", 0)
    group = next(g for g in find_groups(recipe.build(), recipe.inputs()) if g.name == "1.0")
    assert {m.path for m in group.members if m.axis == "out"} >= {"1.0", "1.1", "2.layer"}
    assert "2.layer" in {m.path for m in group.readers}
    assert group.fixed is None


def test_inputs_may_be_tuples_and_dicts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(torch.relu(self.a(x) + self.b(y)))

    for inputs in [(X, X), {"x": X, "y": X}, [X, X]]:
        groups = find_groups(Two().double(), inputs)
        assert [(g.name, g.width) for g in groups] == [("a", 6), ("head", 2)]
        assert groups[0].fixed is None


def test_what_cannot_be_traced_is_said() -> None:
    with pytest.raises(GraphError, match="no parameters"):
        find_groups(nn.ReLU(), X)
    with pytest.raises(GraphError, match="Check that it runs"):
        find_groups(chain(), X[:, :2])

    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(2, 4, dtype=x.dtype)

    with pytest.raises(GraphError, match="no tensor that depends"):
        find_groups(Deaf().double(), X)


def test_what_autograd_does_not_see_is_followed() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).detach())

    assert [(g.name, g.fixed is None) for g in find_groups(Cut().double(), X)] == [("first", True), ("second", False)]


def test_after_a_failed_trace_the_network_is_as_before() -> None:
    model = chain().train().requires_grad_(False)
    with pytest.raises(GraphError):
        find_groups(model, X[:, :2])
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_run_in_training_alone_is_coupled_too() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
            self.aux, self.fc = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            x = self.norm(self.stem(x)).relu().mean((2, 3))
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    model = Auxiliary().double().eval()
    before = state_of(model)
    (group, *rest) = find_groups(model, X)
    assert_same(model, before)
    assert {member.path for member in group.readers} == {"fc", "aux"}
    assert [other.name for other in rest if other.fixed] == ["aux", "fc"]
    apply_plan(model, any_plan([group], 0), X)
    assert [out.shape for out in model.train()(X)] == [(2, 3), (2, 3)]
