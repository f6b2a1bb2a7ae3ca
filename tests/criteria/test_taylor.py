"""TaylorFO against explicit gates: autograd through real gate tensors on every coupling; what the class promises."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks_at_random import Branches, Recipe, Squeeze, Twice, any_plan, conv_bn, networks, randomise
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.criteria import TaylorFO
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member

Batch = tuple[Tensor, Tensor]


def batches(number: int = 3, size: int = 4, side: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(size, 3, side, side, dtype=torch.float64, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(number)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Gates:
    """Explicit gates `z = 1`: the output (or input) of chosen layers is multiplied, channel by channel.

    `places` maps a layer's name to the coupled channel behind each of its output channels. A name with a leading
    `>` gates the layer's input instead.
    """

    def __init__(self, model: nn.Module, width: int, places: dict[str, list[int]]) -> None:
        self.z = torch.ones(width, dtype=torch.float64, requires_grad=True)
        self.handles = []
        for name, channels in places.items():
            layer = model.get_submodule(name.lstrip(">"))
            index = torch.tensor(channels)
            if name.startswith(">"):
                self.handles.append(layer.register_forward_pre_hook(lambda _, x, i=index: (self.gated(x[0], i),)))
            else:
                self.handles.append(layer.register_forward_hook(lambda _, __, y, i=index: self.gated(y, i)))

    def gated(self, x: Tensor, index: Tensor) -> Tensor:
        return x * self.z[index].reshape(1, -1, *[1] * (x.dim() - 2))

    def scores(self, model: nn.Module, data: Iterable[Batch]) -> Tensor:
        """Mean over minibatches of the squared gradient of the gates, by autograd."""
        squares = [torch.autograd.grad(loss_of(model, batch), self.z)[0].square() for batch in data]
        for handle in self.handles:
            handle.remove()
        return torch.stack(squares).mean(0)


def collected(
    model: nn.Module, criterion: TaylorFO, data: Iterable[Batch], groups: Iterable[ChannelGroup] = ()
) -> TaylorFO:
    with criterion.collect(model, list(groups)):
        for batch in data:
            model.zero_grad()
            loss_of(model, batch).backward()
            criterion.update()
    return criterion


def group_of(groups: Iterable[ChannelGroup], name: str) -> ChannelGroup:
    return next(group for group in groups if any(m.path == name and m.axis == "out" for m in group.members))


def assert_gates(
    model: nn.Module, name: str, places: dict[str, list[int]], gates: str = "auto", rel: float = 1e-9
) -> None:
    """Assert that the group of layer `name` scores what explicit gates at `places` get from autograd."""
    data = batches()
    group = group_of(find_groups(model, data[0][0]), name)
    scores = collected(model, TaylorFO(gates), data, [group])(group)
    expected = Gates(model, group.width, places).scores(model, data)
    assert float(expected.max()) > 0
    torch.testing.assert_close(scores, expected, rtol=rel, atol=1e-12 * float(expected.max()))


def span(n: int, start: int = 0) -> list[int]:
    return list(range(start, start + n))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def plain() -> nn.Module:
    return randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 5), nn.ReLU(), *head(5)))


def residual_stage() -> nn.Module:
    def block() -> nn.Module:
        return Branches("add", [nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6)), nn.Identity()], nn.ReLU())

    return randomise(nn.Sequential(nn.Sequential(*conv_bn(3, 6), nn.ReLU()), block(), block(), *head(6)))


@pytest.fixture(params=[False, True], ids=["eval", "train"])
def mode(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_plain(mode: bool) -> None:
    model = plain().train(mode)
    assert_gates(model, "3", {"4": span(5)})
    assert_gates(model, "0", {"1": span(6)}, gates="bn")


def test_residual_stage_shares_one_gate(mode: bool) -> None:
    model = residual_stage().train(mode)
    shared = {"0.1": span(6), "1.branches.0.4": span(6), "2.branches.0.4": span(6)}
    assert_gates(model, "0.0", shared)
    assert_gates(model, "1.branches.0.0", {"1.branches.0.1": span(4)})


def test_projection_shares_one_gate(mode: bool) -> None:
    inside = nn.Sequential(*conv_bn(4, 5), nn.ReLU(), *conv_bn(5, 6))
    block = Branches("add", [inside, nn.Sequential(*conv_bn(4, 6, 1))], nn.ReLU())
    model = randomise(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), block, *head(6))).train(mode)
    assert_gates(model, "3.branches.0.3", {"3.branches.0.4": span(6), "3.branches.1.1": span(6)})


def test_inverted_residual_is_gated_behind_the_depthwise_convolution(mode: bool) -> None:
    layers = [*conv_bn(4, 6, 1), nn.ReLU6(), *conv_bn(6, 6, 3, 6), nn.ReLU6(), *conv_bn(6, 4, 1)]
    block = Branches("add", [nn.Sequential(*layers), nn.Identity()])
    model = randomise(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), block, *head(4))).train(mode)
    assert_gates(model, "3.branches.0.0", {"3.branches.0.4": span(6)})
    assert_gates(model, "0", {"1": span(4), "3.branches.0.7": span(4)})


def test_depthwise_without_normalisation() -> None:
    dw = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), dw, nn.ReLU(), *head(6)))
    assert_gates(model, "0", {"2": span(6)})


def test_weight_form_reads_the_dense_layers_that_write_not_the_depthwise_that_carries() -> None:
    dw = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), dw, nn.ReLU(), *head(6)))
    assert_gates(model, "0", {"0": span(6)}, gates="weight")


def test_dense_net(mode: bool) -> None:
    class Layer(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 5, 1, bias=False)
            self.norm2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.conv1(F.relu(self.norm1(x)))
            return torch.cat([x, self.conv2(F.relu(self.norm2(inner)))], 1)

    norm = nn.BatchNorm2d(10)
    stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    model = randomise(nn.Sequential(stem, Layer(4), Layer(7), norm, nn.ReLU(), *head(10))).train(mode)
    # The stem's channels are read only through the three normalisations behind the concatenations.
    data = batches()
    group = group_of(find_groups(model, data[0][0]), "0")
    scores = collected(model, TaylorFO(), data, [group])(group)

    z = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def gate(width: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda _, __, y: y * torch.cat([z, z.new_ones(width - 4)])[:, None, None]

    for name, width in [("1.norm1", 4), ("2.norm1", 7), ("3", 10)]:
        model.get_submodule(name).register_forward_hook(gate(width))
    expected = torch.stack([torch.autograd.grad(loss_of(model, b), z)[0].square() for b in data]).mean(0)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)


def test_inner_convolution_of_a_dense_layer(mode: bool) -> None:
    layers = [*conv_bn(3, 4), nn.ReLU()]
    inside = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), *conv_bn(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1))
    model = randomise(nn.Sequential(*layers, Branches("cat", [nn.Identity(), inside]), *head(7))).train(mode)
    assert_gates(model, "3.branches.1.2", {"3.branches.1.3": span(5)})


def test_grouped_convolution(mode: bool) -> None:
    layers = [*conv_bn(3, 8, 1), nn.ReLU(), *conv_bn(8, 12, 3, 4), nn.ReLU(), *conv_bn(12, 5, 1), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, *head(5))).train(mode)
    assert_gates(model, "0", {"1": span(8)})
    assert_gates(model, "3", {"4": span(12)})
    if not mode:
        assert_gates(model, "0", {"0": span(8)}, gates="weight")
        assert_gates(model, "0", {">3": span(8)}, gates="input")
        assert_gates(model, "3", {">6": span(12)}, gates="input")


def test_transposed_convolution() -> None:
    for groups in (1, 2):
        up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=groups)
        model = randomise(nn.Sequential(*conv_bn(3, 6, 1), nn.ReLU(), up, nn.ReLU(), *head(8)))
        assert_gates(model, "3", {"3": span(8)})
        assert_gates(model, "0", {">3": span(6)}, gates="input")


def test_squeeze_and_excite(mode: bool) -> None:
    for linear in (False, True):
        layers = [*conv_bn(3, 6), nn.SiLU(), Squeeze(6, linear), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU()]
        model = randomise(nn.Sequential(*layers, *head(5))).train(mode)
        model[3].fc1.bias.data += 1  # every hidden unit alive
        assert_gates(model, "0", {"1": span(6)})
        assert_gates(model, "3.fc1", {"3.fc1": span(3)})


def test_squeeze_and_excite_in_an_inverted_residual(mode: bool) -> None:
    layers = [*conv_bn(4, 6, 1), nn.SiLU(), *conv_bn(6, 6, 3, 6), nn.SiLU(), Squeeze(6, False), *conv_bn(6, 4, 1)]
    block = Branches("add", [nn.Sequential(*layers), nn.Identity()])
    model = randomise(nn.Sequential(*conv_bn(3, 4), nn.SiLU(), block, *head(4))).train(mode)
    assert_gates(model, "3.branches.0.0", {"3.branches.0.4": span(6)})


def test_without_normalisation_the_weights_and_bias_are_the_gate(mode: bool) -> None:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 5, 3, padding=1), nn.Sigmoid()]
    model = randomise(nn.Sequential(*layers, *head(5))).train(mode)
    assert_gates(model, "0", {"0": span(6)})
    assert_gates(model, "2", {"2": span(5)}, gates="weight")


def test_flattened_maps_and_linear_layers(mode: bool) -> None:
    layers = [*conv_bn(3, 4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))).train(mode)
    assert_gates(model, "0", {"1": span(4)})
    assert_gates(model, "5", {"6": span(6)})
    assert_gates(model, "8", {"8": span(7)})
    if not mode:
        # One channel is read at four places of the linear layer.
        assert_gates(model, "0", {">5": [i for i in span(4) for _ in range(4)]}, gates="input")


def test_reader_side(mode: bool) -> None:
    model = residual_stage().train(mode)
    readers = {">1.branches.0.0": span(6), ">2.branches.0.0": span(6), ">5": span(6)}
    assert_gates(model, "0.0", readers, gates="input")
    assert_gates(model, "1.branches.0.0", {">1.branches.0.3": span(4)}, gates="input")


def test_a_normalisation_without_affine_parameters_is_scored_at_its_readers(mode: bool) -> None:
    norm = nn.BatchNorm2d(6, affine=False)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), *head(5))
    model = randomise(model).train(mode)
    assert_gates(model, "0", {">3": span(6)})
    with pytest.raises(CriterionError, match="without an affine normalisation"):
        assert_gates(model, "0", {">3": span(6)}, gates="bn")


def test_timm_norm_act_is_gated_before_its_activation(mode: bool) -> None:
    timm_layers = pytest.importorskip("timm.layers")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
            self.norm = timm_layers.BatchNormAct2d(6, act_layer=nn.SiLU)
            self.head = nn.Sequential(*head(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x)))

    model = randomise(Net()).train(mode)
    data = batches()
    group = group_of(find_groups(model, data[0][0]), "conv")
    scores = collected(model, TaylorFO(), data, [group])(group)
    # The gate sits between normalisation and activation, so it multiplies the input of the activation.
    expected = Gates(model, 6, {">norm.act": span(6)}).scores(model, data)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)


def test_a_layer_called_twice_is_one_gate_at_both_places() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), Twice(nn.Conv2d(5, 5, 3, padding=1)), *head(5))
    model = randomise(model)
    assert_gates(model, "0", {"0": span(5), "1.layer": span(5)})


def test_shared_width_of_two_readers_and_two_writers(mode: bool) -> None:
    one, two = (nn.Sequential(*conv_bn(4, 6), nn.ReLU()) for _ in range(2))
    model = nn.Sequential(*conv_bn(3, 4), nn.ReLU(), Branches("add", [one, two]), *conv_bn(6, 5), nn.ReLU(), *head(5))
    model = randomise(model).train(mode)
    assert_gates(model, "3.branches.0.0", {"3.branches.0.1": span(6), "3.branches.1.1": span(6)})


def gate_writers(model: nn.Module, group: ChannelGroup, z: Tensor) -> list[RemovableHandle]:
    """Multiply the output of each layer that `group.writers` names by its channels' gates."""

    def gate(member: Member) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(_: nn.Module, __: object, y: Tensor) -> Tensor:
            full = z.new_ones(y.shape[1]).index_put((member.index,), z[member.channel])
            return y * full.reshape(1, -1, *[1] * (y.dim() - 2))

        return hook

    return [model.get_submodule(member.path).register_forward_hook(gate(member)) for member in group.writers]


def gate_readers(model: nn.Module, group: ChannelGroup, z: torch.Tensor) -> list[Any]:
    """Multiply what every dense layer reads of the group's channels by `z`."""

    def gate(member: Member) -> Any:
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            (x,) = inputs
            dim = 1 if x.dim() == 4 else -1
            factor = torch.ones(x.shape[dim], dtype=x.dtype).index_put((member.index,), z[member.channel])
            return (x * (factor[:, None, None] if dim == 1 else factor),)

        return hook

    return [model.get_submodule(member.path).register_forward_pre_hook(gate(member)) for member in group.readers]


class Forked(nn.Module):
    """A stem that is read both directly and through a depthwise layer (the first block of MobileNetV3-large)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.depthwise, self.norm2 = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.BatchNorm2d(5)
        self.project, self.fc = nn.Conv2d(5, 5, 1), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.fc((x + self.project(self.norm2(self.depthwise(x)).relu())).mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
def test_a_forked_group_is_scored_where_it_is_read(training: bool) -> None:
    torch.manual_seed(0)
    model, data = Forked().double().train(training), [(torch.randn(4, 3, 6, 6).double(), torch.arange(4) % 3)]
    for layer in (model.norm, model.norm2):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    (group,) = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    assert group.forked
    z = torch.ones(group.width, dtype=torch.float64, requires_grad=True)
    handles = gate_readers(model, group, z)
    (expected,) = torch.autograd.grad(loss_of(model, data[0]), z)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(collected(model, TaylorFO(), data, [group])(group), expected.square(), rtol=1e-9, atol=0)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(networks())
def test_random_networks_score_the_gates_of_their_writers(recipe: Recipe) -> None:
    model = recipe.build().train(recipe.seed % 2 == 0)
    generator = torch.Generator().manual_seed(recipe.seed)
    data = [(recipe.inputs(3), torch.randint(0, 3, (3,), generator=generator)) for _ in range(2)]
    groups = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    criterion = collected(model, TaylorFO(), data, groups)
    for group in groups:
        z = torch.ones(group.width, dtype=torch.float64, requires_grad=True)
        handles = gate_readers(model, group, z) if group.forked else gate_writers(model, group, z)
        expected = torch.stack([torch.autograd.grad(loss_of(model, b), z)[0].square() for b in data]).mean(0)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(criterion(group), expected, rtol=1e-8, atol=1e-13 * float(expected.max()))


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(networks(), st.integers(0, 2**16))
def test_closing_the_gates_of_the_writers_is_removing_the_channels(recipe: Recipe, seed: int) -> None:
    """So the writers are where the gate of a coupled channel lies: every reader sees exactly one of them."""
    assume(all(act != "sigmoid" for _, _, act in recipe.blocks))  # its value at zero is not zero
    model, example = recipe.build(), recipe.inputs()
    groups = find_groups(model, example)
    plan = any_plan(groups, seed)
    handles = []
    for group in groups:
        if group.fixed is None:
            z = torch.zeros(group.width, dtype=torch.float64)
            z[list(plan.kept()[group.name])] = 1
            handles += gate_writers(model, group, z)
    expected = model(example)
    for handle in handles:
        handle.remove()
    cut_channels(model, plan, groups)
    torch.testing.assert_close(model(example), expected, rtol=1e-9, atol=1e-12)


# -- identities -----------------------------------------------------------------------------------------------


def test_positive_homogeneity_gate_before_and_after_relu() -> None:
    model, data = plain(), batches()
    before = Gates(model, 5, {"4": span(5)}).scores(model, data)
    after = Gates(model, 5, {"5": span(5)}).scores(model, data)
    torch.testing.assert_close(before, after, rtol=1e-10, atol=0)
    torch.testing.assert_close(before, Gates(model, 5, {">8": span(5)}).scores(model, data), rtol=1e-10, atol=0)


def test_reader_form_equals_writer_form_where_the_activation_is_homogeneous(mode: bool) -> None:
    model, data = residual_stage().train(mode), batches()
    group = group_of(find_groups(model, data[0][0]), "1.branches.0.0")
    written, read = (collected(model, TaylorFO(g), data, [group])(group) for g in ("bn", "input"))
    torch.testing.assert_close(written, read, rtol=1e-9, atol=0)


def test_duplicated_samples_and_scaled_loss() -> None:
    model, data = plain(), batches()
    group = group_of(find_groups(model, data[0][0]), "3")
    once = collected(model, TaylorFO(), data, [group])(group)
    doubled = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in data]
    torch.testing.assert_close(collected(model, TaylorFO(), doubled, [group])(group), once, rtol=1e-10, atol=0)

    scaled = TaylorFO()
    with scaled.collect(model, [group]):
        for batch in data:
            model.zero_grad()
            (3 * loss_of(model, batch)).backward()
            scaled.update()
    torch.testing.assert_close(scaled(group), 9 * once, rtol=1e-10, atol=0)


def test_squares_are_averaged_not_averages_squared() -> None:
    model, data = plain(), batches(5)
    group = group_of(find_groups(model, data[0][0]), "3")
    scores = collected(model, TaylorFO(), data, [group])(group)
    each = [collected(model, TaylorFO(), [batch], [group])(group) for batch in data]
    torch.testing.assert_close(scores, torch.stack(each).mean(0), rtol=1e-10, atol=0)
    mean = TaylorFO()
    with mean.collect(model, [group]):
        model.zero_grad()
        (sum(loss_of(model, batch) for batch in data) / len(data)).backward()
        mean.update()
    assert (scores >= mean(group) * (1 - 1e-9)).all()
    assert (scores > 1.01 * mean(group)).any()


@pytest.mark.parametrize("copies", [2, 3])
def test_one_gate_over_identical_contributions(copies: int) -> None:
    """B identical branches with one output: the gradient is B times one branch's, the score B squared."""
    torch.manual_seed(0)
    first = randomise(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))
    stem, tail = nn.Sequential(*conv_bn(3, 4), nn.ReLU()), nn.Sequential(*head(6))
    twins = [nn.Sequential(*conv_bn(4, 6), nn.ReLU()) for _ in range(copies)]
    for twin in twins:
        twin.double().load_state_dict(first.state_dict())
    model = randomise(nn.Sequential(stem, Branches("add", twins), tail))
    for twin in twins:
        twin.load_state_dict(first.state_dict())
    data = batches()
    group = group_of(find_groups(model, data[0][0]), "1.branches.0.0")
    one = Gates(model, 6, {"1.branches.0.1": span(6)}).scores(model, data)
    joint = collected(model, TaylorFO(), data, [group])(group)
    torch.testing.assert_close(joint, copies**2 * one, rtol=1e-9, atol=0)


# -- the class ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["auto", "bn", "weight", "input"])
def test_scores_are_the_same_with_and_without_groups(gates: str) -> None:
    model, data = residual_stage(), batches()
    groups = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    assert [group.name for group in groups] == ["0.0", "1.branches.0.0", "2.branches.0.0"]
    known, unknown = collected(model, TaylorFO(gates), data, groups), collected(model, TaylorFO(gates), data)
    for group in groups:
        torch.testing.assert_close(unknown(group), known(group), rtol=1e-12, atol=0)


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(networks())
def test_scores_of_random_networks_with_and_without_groups(recipe: Recipe) -> None:
    model = recipe.build()
    data = [(recipe.inputs(3), torch.tensor([0, 1, 2]))]
    groups = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    known, unknown = collected(model, TaylorFO(), data, groups), collected(model, TaylorFO(), data)
    for group in groups:
        torch.testing.assert_close(unknown(group), known(group), rtol=1e-10, atol=1e-14 * float(known(group).max()))


@pytest.mark.parametrize("with_groups", [True, False])
def test_state_goes_on_where_it_was(with_groups: bool) -> None:
    model, data = plain(), batches(4)
    groups = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    given_groups = groups if with_groups else []
    whole = collected(model, TaylorFO(), data, given_groups)
    half = collected(model, TaylorFO(), data[:2], given_groups)
    other = TaylorFO()
    other.load_state_dict(half.state_dict())
    collected(model, other, data[2:], given_groups)
    assert other.minibatches == 4
    for group in groups:
        assert torch.equal(other(group), whole(group))
    whole.reset()
    assert whole.minibatches == 0
    with pytest.raises(CriterionError, match="no minibatch"):
        whole(groups[0])


def test_misuse_is_refused() -> None:
    model, data = plain(), batches()
    group = group_of(find_groups(model, data[0][0]), "3")
    with pytest.raises(CriterionError, match="gates"):
        TaylorFO("batch")  # type: ignore[arg-type]
    with pytest.raises(CriterionError, match="inside"):
        TaylorFO().update()
    with pytest.raises(CriterionError, match="no minibatch"):
        TaylorFO()(group)
    criterion = TaylorFO()
    with criterion.collect(model, [group]):
        with pytest.raises(CriterionError, match="no gradient"):
            criterion.update()
        with pytest.raises(CriterionError, match="collecting already"), criterion.collect(model):
            pass
    with pytest.raises(CriterionError, match="frozen"), TaylorFO().collect(plain().requires_grad_(False)):
        pass
    model[4].requires_grad_(False)
    with pytest.raises(CriterionError, match=r"4\.weight"):
        collected(model, TaylorFO(), data, [group])


def test_gates_bn_needs_a_normalisation() -> None:
    model, data = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *head(6)).double(), batches()
    group = group_of(find_groups(model, data[0][0]), "0")
    with pytest.raises(CriterionError, match="'0'"):
        collected(model, TaylorFO("bn"), data, [group])
    with pytest.raises(CriterionError, match="'0'"):
        collected(model, TaylorFO("bn"), data)(group)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model, data = plain(), batches()
    group = group_of(find_groups(model, data[0][0]), "3")
    criterion = collected(model, TaylorFO(), data, [group])
    with criterion.collect(model, [group]):
        model[4].weight.grad[2] = float("nan")
        criterion.update()
    with pytest.raises(CriterionError, match="not finite"):
        criterion(group)


def test_nothing_stays_on_the_network_after_an_exception() -> None:
    model, data = plain(), batches()
    criterion = TaylorFO()
    with pytest.raises(ZeroDivisionError), criterion.collect(model):
        raise ZeroDivisionError
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    collected(model, criterion, data)  # it can be used again


def test_half_precision_is_accumulated_in_single() -> None:
    model, data = plain().to(torch.bfloat16), [(x.to(torch.bfloat16), y) for x, y in batches()]
    group = group_of(find_groups(model, data[0][0]), "3")
    assert collected(model, TaylorFO(), data, [group])(group).dtype == torch.float32
