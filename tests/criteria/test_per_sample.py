"""Per-sample gate gradients by hooks equal autograd through one explicit gate a sample, wherever a gate may lie."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gated import Batch, batches, collected, gate_members, gradients_of, group_of, loss_of, member_of
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import Branches, Recipe, Squeeze, Twice, conv_bn, networks, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import TaylorFG
from nni_plugin.criteria.first_order import member_gates
from nni_plugin.criteria.per_sample import PerSampleGates
from nni_plugin.errors import CriterionError
from nni_plugin.groups import Member

timm_layers = pytest.importorskip("timm.layers")


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def terms_of(model: nn.Module, members: list[Member], batch: Batch, passes: int = 1) -> list[Tensor]:
    """Return the terms of the last of several passes, as the hooks see them; gradients stay on the parameters."""
    with PerSampleGates(model, members) as watcher:
        for _ in range(passes):
            model.zero_grad()
            loss_of(model, batch).backward()
            terms = watcher.take()
    return terms


def assert_terms(model: nn.Module, member: Member, batch: Batch | None = None) -> None:
    """Assert that the terms of a member are autograd's, on a first pass and once the hooks know what is overwritten."""
    batch = batches(1)[0] if batch is None else batch
    expected = gradients_of(model, [member], batch, len(member.index))
    assert float(expected.abs().max()) > 1e-6
    for passes in (1, 3):
        (term,) = terms_of(model, [member], batch, passes)
        torch.testing.assert_close(term, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    layer = model.get_submodule(member.path)
    if list(layer.parameters(recurse=False)):  # the same from parameters alone
        (gate,) = member_gates(model, [member])
        torch.testing.assert_close(term.mean(0), gate, rtol=1e-8, atol=1e-11 * float(expected.abs().max()))


@pytest.fixture(params=[False, True], ids=["eval", "train"])
def mode(request: pytest.FixtureRequest) -> bool:
    return request.param


class Inplace(nn.Module):
    """A residual block as torchvision writes it: `out += identity`, activations in place."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.conv1 = nn.Conv2d(5, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Sequential(*head(5))

    def forward(self, x: Tensor) -> Tensor:
        identity = self.stem(x)
        out = self.relu(self.conv1(identity))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.head(self.relu(out))


# -- one layer after the other ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(6),
        lambda: nn.BatchNorm2d(6, affine=False),
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        lambda: nn.GroupNorm(2, 6),
        lambda: nn.InstanceNorm2d(6, affine=True),
        lambda: timm_layers.LayerNorm2d(6),
        lambda: timm_layers.BatchNormAct2d(6, act_layer=nn.SiLU),
        lambda: timm_layers.BatchNormAct2d(6, act_layer=nn.ReLU, act_kwargs={"inplace": True}),
        lambda: timm_layers.GroupNormAct(6, num_groups=2, act_layer=nn.SiLU),
        lambda: timm_layers.GroupNormAct(6, num_groups=2, act_layer=nn.ReLU, act_kwargs={"inplace": True}),
        lambda: timm_layers.LayerNormAct2d(6, act_layer=nn.ReLU, act_kwargs={"inplace": True}),
    ],
    ids=[
        "bn",
        "bn-bare",
        "bn-batch",
        "group",
        "instance",
        "layer2d",
        "bnact",
        "bnact-in",
        "gnact",
        "gnact-in",
        "lnact",
    ],
)
def test_behind_a_normalisation(norm: Callable[[], nn.Module], mode: bool) -> None:
    layer = norm()
    act = nn.Identity() if list(layer.children()) else nn.LeakyReLU(0.1, inplace=True)
    layers = [nn.Conv2d(3, 6, 3), layer, act, nn.Conv2d(6, 4, 3), nn.Tanh(), *head(4)]
    model = randomise(nn.Sequential(*layers)).train(mode)
    assert_terms(model, member_of(model, "1", "out", 6))


def test_behind_a_layer_norm_and_a_batch_norm_of_vectors(mode: bool) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.fc = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 5)
            self.norm1d, self.bn, self.out = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(torch.tanh(self.norm(self.embed(x.flatten(2).mT))))
            return self.out(torch.tanh(self.bn(self.norm1d(x.mT).relu_().mean(2))))

    model = randomise(Tokens()).train(mode)
    for path, width in [("embed", 6), ("norm", 6), ("fc", 5), ("norm1d", 5), ("bn", 5)]:
        assert_terms(model, member_of(model, path, "out", width))
    for path, width in [("fc", 6), ("out", 5)]:
        assert_terms(model, member_of(model, path, "in", width))


def test_channels_last_layer_norm_of_a_map_as_high_as_it_is_wide_in_channels() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(self.conv(x).permute(0, 2, 3, 1))).mean((1, 2)))

    model, batch = Last().double(), batches(1)[0]
    nn.init.normal_(model.norm.weight)
    assert_terms(model, member_of(model, "norm", "out", 6), batch)  # [N, 6, 6, 6]
    assert_terms(model, member_of(model, "norm", "out", 6), (batch[0][..., :4], batch[1]))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True), nn.SiLU(), nn.Identity()])
def test_behind_a_layer_without_normalisation_even_if_it_is_overwritten(act: nn.Module) -> None:
    layers = [nn.Conv2d(3, 6, 3), act, nn.Conv2d(6, 6, 3, groups=6), copy.deepcopy(act), nn.Flatten()]
    model = randomise(nn.Sequential(*layers, nn.Linear(24, 5), copy.deepcopy(act), nn.Linear(5, 3)))
    for path, width in [("0", 6), ("2", 6), ("5", 5)]:
        assert_terms(model, member_of(model, path, "out", width))


def test_in_place_addition_and_activations(mode: bool) -> None:
    for norm in (False, True):
        model = randomise(Inplace(norm)).train(mode)
        for path in ["stem", "conv1", "conv2", *["bn2"] * norm]:
            assert_terms(model, member_of(model, path, "out", 5))


def test_before_the_readers(mode: bool) -> None:
    layers = [*conv_bn(3, 8), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(inplace=True)]
    model = randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3))).train(mode)
    assert_terms(model, member_of(model, "3", "in", 8))
    assert_terms(model, member_of(model, "6", "in", 96))
    flat = Member("6", "in", "dense", torch.arange(96), torch.arange(96) // 16, ())
    criterion = TaylorFG("input")
    batch = batches(1)[0]
    group = group_of(find_groups(model, batch[0]), "3")
    expected = gradients_of(model, [flat], batch, 6).square().mean(0)
    torch.testing.assert_close(collected(model, criterion, [batch], [group])(group), expected, rtol=1e-9, atol=1e-14)


def test_two_readers_of_one_tensor_do_not_see_each_other() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 3, padding=1)
            self.head = nn.Sequential(*head(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head(self.a(x) * self.b(x).sigmoid())

    model = Fork().double()
    assert_terms(model, member_of(model, "a", "in", 4))
    assert_terms(model, member_of(model, "b", "in", 4))


class TwiceInplace(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu_())


class TwiceInplaceLast(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu()).relu_()


@pytest.mark.parametrize("kind", [Twice, TwiceInplace, TwiceInplaceLast])
def test_a_layer_called_twice_adds_up(kind: type[Twice]) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, 3), kind(nn.Conv2d(5, 5, 3, padding=1)), *head(5)))
    assert_terms(model, member_of(model, "1.layer", "out", 5))
    assert_terms(model, member_of(model, "1.layer", "in", 5))


def test_windows_folded_into_the_batch() -> None:
    swin = pytest.importorskip("timm.models.swin_transformer")
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
    model = swin.SwinTransformer(**sizes, num_classes=3, mlp_ratio=2).double().eval()
    batch = batches(1, side=16)[0]
    for block in ("layers.0.blocks.0", "layers.0.blocks.1"):
        assert_terms(model, member_of(model, f"{block}.attn.qkv", "in", 8), batch)
        assert_terms(model, member_of(model, f"{block}.attn.proj", "in", 8), batch)
        assert_terms(model, member_of(model, f"{block}.norm1", "out", 8), batch)
        assert_terms(model, member_of(model, f"{block}.mlp.fc1", "out", 16), batch)
        assert_terms(model, member_of(model, f"{block}.mlp.fc2", "in", 16), batch)
    member = member_of(model, "layers.0.blocks.1.attn.qkv", "in", 8)
    (total,) = terms_of(model, [member], batch)
    with PerSampleGates(model, [member]) as watcher:
        watcher.reduction = "mean"
        loss_of(model, batch).backward()
        (mean,) = watcher.take()
    torch.testing.assert_close(mean, total / 64, rtol=1e-10, atol=0)  # 4 windows of 16 positions


# -- coupled layers ---------------------------------------------------------------------------------------------


def assert_groups(model: nn.Module, data: list[Batch], names: set[str] | None = None) -> None:
    """Assert that Taylor-FG is the mean square of autograd's joint gates of each sample, for every group."""
    groups = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    assert names is None or names <= {group.name for group in groups}
    criterion = collected(model, TaylorFG(), data, groups)
    for group in groups:
        each = [gradients_of(model, gate_members(group), batch, group.width) for batch in data]
        expected = torch.cat(each).square().mean(0)
        torch.testing.assert_close(criterion(group), expected, rtol=1e-8, atol=1e-13 * float(expected.max()))


def test_coupled_groups(mode: bool) -> None:
    residual = Branches("add", [nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6)), nn.Identity()], nn.ReLU())
    depthwise = nn.Sequential(*conv_bn(6, 6, 3, 6), nn.ReLU6(), *conv_bn(6, 5, 1))
    cat = Branches("cat", [nn.Sequential(*conv_bn(5, 4), nn.SiLU()), nn.Sequential(*conv_bn(5, 3), nn.ReLU())])
    layers = [*conv_bn(3, 6), nn.ReLU(), residual, depthwise, cat, Squeeze(7, True), *head(7)]
    model = randomise(nn.Sequential(*layers)).train(mode)
    assert_groups(model, batches(2), {"0", "3.branches.0.0", "5.branches.0.0"})


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(networks(), st.booleans())
def test_random_networks(recipe: Recipe, training: bool) -> None:
    model = recipe.build().train(training)
    assert_groups(model, [(recipe.inputs(3), torch.tensor([0, 1, 2])), (recipe.inputs(2), torch.tensor([2, 0]))])


# -- how the loss is scaled, stored and computed ----------------------------------------------------------------


def plain() -> nn.Module:
    return randomise(nn.Sequential(*conv_bn(3, 6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(inplace=True), *head(5)))


def members_of_plain(model: nn.Module) -> list[Member]:
    return [member_of(model, "1", "out", 6), member_of(model, "3", "out", 5), member_of(model, "3", "in", 6)]


def remember(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[..., None]:
    """Return a hook that notes an output and its gradient, in double precision."""

    def hook(_: nn.Module, __: object, y: Tensor) -> None:
        value = y.detach().double().clone()
        y.register_hook(lambda g: seen.update({name: (value, g.double())}))

    return hook


def test_loss_scale_divides() -> None:
    model, (batch,) = plain(), batches(1)
    group = group_of(find_groups(model, batch[0]), "0")
    once = collected(model, TaylorFG(), [batch], [group])(group)
    scaled = TaylorFG()
    with scaled.collect(model, [group]):
        (1024 * loss_of(model, batch)).backward()
        scaled.update(loss_scale=1024.0)
    torch.testing.assert_close(scaled(group), once, rtol=1e-12, atol=0)


def test_half_precision_is_summed_in_single() -> None:
    """A sum of 64 x 64 products stops growing at 256 ulps in bfloat16; here it is exact to single precision."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.ReLU(), *head(5)).train()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    for name in "12":
        model[int(name)].register_forward_hook(remember(seen, name))
    x, y = torch.rand(2, 3, 64, 64) + 1, torch.tensor([0, 2])
    members = [member_of(model, "1", "out", 6), member_of(model, "2", "out", 5), member_of(model, "2", "in", 6)]
    with PerSampleGates(model, members) as watcher:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        norm, conv, read = watcher.take()
    assert norm.dtype == conv.dtype == read.dtype == torch.float32
    assert seen["2"][0].to(torch.bfloat16).double().equal(seen["2"][0])  # the output was in half precision
    expected = 2 * (seen["2"][0] * seen["2"][1]).sum((2, 3))
    torch.testing.assert_close(conv.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    exact = 2 * (seen["1"][0] * seen["1"][1]).sum((2, 3))
    # The output of the normalisation was rounded to half precision; its affine form was not.
    torch.testing.assert_close(norm.double(), exact, rtol=0, atol=2e-2 * float(exact.abs().max()))
    torch.testing.assert_close(read, norm, rtol=0, atol=2e-2 * float(norm.abs().max()))


def test_statistics_in_half_precision_are_used_in_single() -> None:
    torch.manual_seed(0)
    half = nn.Sequential(nn.BatchNorm2d(3), nn.Tanh(), *head(3)).to(torch.bfloat16).eval()
    half[0].running_mean.uniform_(-1, 1)
    half[0].running_var.uniform_(0.5, 1.5)
    x, y = torch.randn(2, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True), torch.tensor([0, 1])
    kept: list[Tensor] = []
    half[0].register_forward_hook(lambda _, __, out: out.register_hook(kept.append) and None)
    with PerSampleGates(half, [member_of(half, "0", "out", 3)]) as watcher:
        F.cross_entropy(half(x).float(), y).backward()
        (term,) = watcher.take()
    exact = copy.deepcopy(half[0]).double()
    expected = 2 * (exact(x.detach().double()) * kept[0].double()).sum((2, 3))
    torch.testing.assert_close(term.double(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, mode: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module, on: bool) -> None:
            super().__init__()
            self.stem, self.inner, self.head, self.on = nn.Conv2d(3, 4, 1), inner, nn.Sequential(*head(5)), on

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(checkpoint(self.inner, x, use_reentrant=reentrant) if self.on else self.inner(x))

    act = timm_layers.BatchNormAct2d(6, act_layer=nn.SiLU)
    inner = nn.Sequential(nn.Conv2d(4, 6, 3), act, nn.Conv2d(6, 5, 3), nn.ReLU(inplace=True))
    model, batch = randomise(Checkpointed(inner, False)).train(mode), batches(1)[0]
    members = [member_of(model, "inner.1", "out", 6), member_of(model, "inner.2", "out", 5)]
    members += [member_of(model, "inner.0", "in", 4), member_of(model, "stem", "out", 4)]
    expected = terms_of(copy.deepcopy(model), members, batch)
    model.on = True
    for _ in range(2):
        for term, right in zip(terms_of(model, members, batch, 2), expected, strict=True):
            torch.testing.assert_close(term, right, rtol=1e-12, atol=0)


def test_a_graph_of_the_gradient_is_not_kept() -> None:
    model, batch = plain(), batches(1)[0]
    members = members_of_plain(model)
    with PerSampleGates(model, members) as watcher:
        loss_of(model, batch).backward(create_graph=True)
        terms = watcher.take()
    model.zero_grad()
    for term, right in zip(terms, terms_of(model, members, batch), strict=True):
        assert not term.requires_grad
        assert torch.equal(term, right)


def test_means_over_positions() -> None:
    model, batch = plain(), batches(1)[0]
    members = members_of_plain(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    sums = terms_of(model, members, batch)
    for name in "13":
        model[int(name)].register_forward_hook(remember(seen, name))
    for reduction in ("mean", "mean-abs"):
        with PerSampleGates(model, members) as watcher:
            watcher.reduction = reduction  # type: ignore[assignment]
            loss_of(model, batch).backward()
            terms = watcher.take()
        if reduction == "mean":
            for term, total, positions in zip(terms, sums, [36, 16, 36], strict=True):
                torch.testing.assert_close(term * positions, total, rtol=1e-12, atol=0)
        else:
            for term, name in zip(terms, "13", strict=False):
                expected = 4 * (seen[name][0] * seen[name][1]).abs().mean((2, 3))
                torch.testing.assert_close(term, expected, rtol=1e-9, atol=1e-15)


# -- what stays behind, and what is refused ---------------------------------------------------------------------


def assert_clean(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not module._forward_pre_hooks_with_kwargs


def test_hooks_leave_with_the_context() -> None:
    model, batch = plain(), batches(1)[0]
    members = members_of_plain(model)
    terms_of(model, members, batch)
    assert_clean(model)
    with pytest.raises(ZeroDivisionError), PerSampleGates(model, members):
        raise ZeroDivisionError
    assert_clean(model)
    with pytest.raises(CriterionError, match="tensor input"), PerSampleGates(model, members):
        model(torch.tensor(1.0))
    assert_clean(model)
    with (
        pytest.raises(AttributeError),
        PerSampleGates(model, [*members, Member("9", "out", "", *[torch.arange(1)] * 2, ())]),
    ):
        pass
    assert_clean(model)


def test_nothing_keeps_activations_alive() -> None:
    model, batch = plain(), batches(1)[0]
    seen: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda _, __, y: seen.append(weakref.ref(y)))
    with PerSampleGates(model, members_of_plain(model)) as watcher:
        loss_of(model, batch).backward()
        watcher.take()
        model(batch[0])  # without a backward pass
        gc.collect()
        assert [ref() for ref in seen] == [None] * 3  # the first pass twice, for what it overwrites


def test_a_copy_neither_breaks_nor_feeds_the_terms() -> None:
    model, batch = plain(), batches(1)[0]
    members = members_of_plain(model)
    expected = terms_of(model, members, batch)
    with PerSampleGates(model, members) as watcher:
        twin = copy.deepcopy(model)
        loss = loss_of(model, batch)
        loss_of(twin, (batch[0][:2], batch[1][:2])).backward()
        loss.backward()
        loss_of(twin, batch).backward()
        terms = watcher.take()
    for term, right in zip(terms, expected, strict=True):
        assert torch.equal(term, right)
    loss_of(twin, batch).backward()
    with PerSampleGates(model, members) as watcher:
        loss_of(twin, batch).backward()
        with pytest.raises(CriterionError, match="No gradient came to '1'"):
            watcher.take()


def test_evaluation_in_between_is_not_seen() -> None:
    model, batch = plain(), batches(1)[0]
    members = members_of_plain(model)
    expected = terms_of(model, members, batch)
    with PerSampleGates(model, members) as watcher:
        loss = loss_of(model, batch)
        with torch.no_grad():
            model(batch[0][:3])
        loss.backward()
        with torch.no_grad():
            model(batch[0][:3])
        for term, right in zip(watcher.take(), expected, strict=True):
            assert torch.equal(term, right)


def test_inputs_in_containers() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch["images"])

    model, (x, y) = Named(), batches(1)[0]
    with PerSampleGates(model, [member_of(model, "net.1", "out", 6)]) as watcher:
        F.cross_entropy(model({"images": x}), y).backward()
        (term,) = watcher.take()
    (expected,) = terms_of(model.net, [member_of(model.net, "1", "out", 6)], (x, y))
    assert torch.equal(term, expected)


@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_overwritten_shows_on_the_first_pass(inplace: bool) -> None:
    """It is run once more then, as if for the first time: the same dropout, statistics counted once, one gradient."""
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(inplace=inplace), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Conv2d(6, 5, 3)]
    model = randomise(nn.Sequential(*layers, nn.SiLU(), *head(5))).train()
    twin, batch = copy.deepcopy(model), batches(1)[0]
    members = [member_of(model, "0", "out", 6), member_of(model, "4", "out", 5)]
    calls: list[int] = []
    model[5].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    loss_of(twin, batch).backward()
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    with PerSampleGates(model, members) as watcher:
        loss_of(model, batch).backward()
        terms = watcher.take()
        assert len(calls) == (2 if inplace else 1)
        assert torch.equal(torch.get_rng_state(), drawn)
        for (name, tensor), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.equal(tensor, other), name
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter.grad, other.grad)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss_of(model, batch).backward()
        assert len(calls) == (3 if inplace else 2)  # once for all
        for term, later in zip(terms, watcher.take(), strict=True):
            torch.testing.assert_close(term, later, rtol=1e-12, atol=0)


def test_only_what_is_overwritten_is_copied() -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3), nn.SiLU()]
    model, batch = randomise(nn.Sequential(*layers, *head(5))), batches(1)[0]
    made: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}
    with PerSampleGates(model, [member_of(model, "0", "out", 6), member_of(model, "2", "out", 5)]):
        for i in (0, 2):
            # Hooks of the convolutions come after ours, so what they see is what is handed on.
            model[i].register_forward_hook(lambda _, __, output, i=i: made.update({i: output}), prepend=True)
            model[i + 1].register_forward_pre_hook(lambda _, args, i=i: read.update({i: args[0]}))
        loss_of(model, batch).backward()
    assert read[2] is made[2]
    assert read[0] is not made[0]


def test_hooks_of_others_see_the_pass_that_counts() -> None:
    model, batch = plain(), batches(1)[0]
    hook = model.register_forward_hook(lambda _, __, output: output / 4)
    expected = loss_of(model, batch).item()
    with PerSampleGates(model, members_of_plain(model)):
        assert [loss_of(model, batch).item() for _ in range(2)] == [expected] * 2
    hook.remove()


def test_inputs_written_into_are_as_they_were_when_the_pass_is_run_again() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Sequential(*head(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x.sub_(0.5).div_(2)).relu_())

    model, (x, y) = Normalising().double(), batches(1)[0]
    expected = loss_of(model, (x.clone(), y)).item()
    with PerSampleGates(model, [member_of(model, "conv", "out", 5)]) as watcher:
        loss = loss_of(model, (given := x.clone(), y))
        loss.backward()
        first = watcher.take()[0]
        loss_of(model, (x.clone(), y)).backward()
        assert torch.equal(first, watcher.take()[0])
    assert loss.item() == expected
    assert torch.equal(given, (x - 0.5) / 2)


def test_an_output_may_be_written_into_by_the_loss() -> None:
    model, (x, y) = randomise(nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 3))), batches(1)[0]
    x = x[:, :, :6, :6]
    with PerSampleGates(model, [member_of(model, "1", "out", 3)]) as watcher:
        F.cross_entropy(model(x).div_(2), y).backward()
        (term,) = watcher.take()
    gradient = torch.autograd.functional.jacobian(lambda z: F.cross_entropy(z / 2, y), model(x))
    torch.testing.assert_close(term, gradient * model(x).detach() * len(x), rtol=1e-9, atol=1e-12)


def test_a_pass_that_fails_is_no_trial() -> None:
    """What the hooks have seen in it counts for nothing, and the next first pass is one again."""
    model, batch = plain(), batches(1)[0]
    (expected, *_) = terms_of(model, members_of_plain(model), batch)
    with PerSampleGates(model, members_of_plain(model)) as watcher:
        with pytest.raises(RuntimeError):
            model(batch[0][:, :2])
        with torch.no_grad():
            model(batch[0])
        loss_of(model, batch).backward()
        assert torch.equal(watcher.take()[0], expected)


def test_what_is_overwritten_only_later_is_an_error_once() -> None:
    class Moody(nn.Module):
        inplace = False

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Sequential(*head(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x.relu_() if self.inplace else x.relu())

    model, batch = Moody().double(), batches(1)[0]
    member = member_of(model, "conv", "out", 5)
    with PerSampleGates(model, [member]) as watcher:
        loss_of(model, batch).backward()
        (expected,) = watcher.take()
        model.inplace = True
        with pytest.raises(CriterionError, match="'conv' was overwritten"):
            loss_of(model, batch).backward()
        loss_of(model, batch).backward()
        assert torch.equal(watcher.take()[0], expected)


def test_what_cannot_be_seen_is_refused() -> None:
    model, batch = plain(), batches(1)[0]
    with pytest.raises(CriterionError, match="bare parameter"):
        PerSampleGates(model, [Member("scale", "out", "parameter", *[torch.arange(3)] * 2, ())])
    with PerSampleGates(model, members_of_plain(model)) as watcher:
        with pytest.raises(CriterionError, match="No gradient came"):
            watcher.take()
        with pytest.raises(CriterionError, match="itself was not called"):
            model[3](model[1](model[0](batch[0]))).sum().backward()

    class Folded(nn.Module):
        def __init__(self, fold: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.fold, self.fc, self.out = fold, nn.Linear(3, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc(self.fold(x.flatten(2))).flatten(0, -2)[: len(x)])

    folds: dict[str, Callable[[Tensor], Tensor]] = {
        "does not hold a sample a row": lambda x: x.permute(2, 0, 1)[:5],  # positions first
        "10 rows for 4 samples": lambda x: x.transpose(1, 2).flatten(0, 1)[:10],
    }
    for text, fold in folds.items():
        folded = Folded(fold).double()
        with (
            PerSampleGates(folded, [member_of(folded, "fc", "out", 5)]),
            pytest.raises(CriterionError, match=text),
        ):
            loss_of(folded, batch).backward()


def test_a_layer_that_never_runs_matters_only_to_its_own_group() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = plain(), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model, data = Spare().double(), batches(2)
    group = group_of(find_groups(model.net, data[0][0]), "0")
    expected = collected(model.net, TaylorFG(), data, [group])(group)
    groups = [g for g in find_groups(model, data[0][0]) if g.fixed is None]
    found = collected(model, TaylorFG(), data)
    torch.testing.assert_close(found(group_of(groups, "net.0")), expected, rtol=1e-12, atol=0)
