"""Surgery: all or nothing, parameters that stay the same objects, and plans that do not fit."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import BLOCKS, Branches, Recipe, any_plan, assert_same, conv_bn, networks, randomise, state_of
from torch import Tensor, nn

from nni_plugin import GroupPlan, PruningPlan, verify
from nni_plugin.adapters.torch_pruning import apply_plan, cut_channels, find_groups
from nni_plugin.adapters.torch_pruning.surgery import CUTS
from nni_plugin.criteria import TaylorFO
from nni_plugin.errors import CriterionError, PlanError, SurgeryError
from nni_plugin.masks import mask_plan

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    inside = nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6))
    grouped = [*conv_bn(6, 8), nn.PReLU(8), *conv_bn(8, 8, 3, 2), nn.PReLU()]
    layers = [*conv_bn(3, 6), nn.ReLU(), Branches("add", [inside, nn.Identity()]), *grouped]
    return randomise(nn.Sequential(*layers, *head(8)), seed)


def whole(groups: list) -> PruningPlan:
    return PruningPlan(tuple(GroupPlan(g.name, g.width, tuple(range(g.width))) for g in groups if g.fixed is None))


def keeping(**kept: tuple[int, tuple[int, ...]]) -> PruningPlan:
    return PruningPlan(tuple(GroupPlan(name, total, channels) for name, (total, channels) in kept.items()))


PLAN = keeping(**{"0": (6, (0, 2, 5)), "4": (8, (1, 2, 3, 5, 6, 7)), "7": (8, (0, 1, 4, 5))})


# -- what a cut leaves --------------------------------------------------------------------------------------


def test_tensors_are_the_kept_slices_of_the_dense_ones() -> None:
    model, dense = network(), network()
    assert apply_plan(model, PLAN, X) is model
    now, before = model.state_dict(), dense.state_dict()
    stage, middle, last = ([*entry.kept] for entry in PLAN.groups)
    for name, kept in {
        "0.weight": (stage,),
        "1.running_var": (stage,),
        "3.branches.0.0.weight": (slice(None), stage),
        "3.branches.0.3.weight": (stage,),
        "3.branches.0.4.bias": (stage,),
        "4.weight": (middle, stage),
        "6.weight": (middle,),
        "8.running_mean": (last,),
        "12.weight": (slice(None), last),
    }.items():
        expected = before[name]
        for dim, index in enumerate(kept):
            if isinstance(index, list):
                expected = expected.index_select(dim, torch.tensor(index))
        assert torch.equal(now[name], expected), name
    # Each filter of a grouped convolution reads its own group's inputs, by their position in the group.
    assert torch.equal(now["7.weight"], before["7.weight"][last][:, [1, 2, 3]])
    assert (model[0].out_channels, model[4].in_channels, model[4].out_channels, model[12].in_features) == (3, 3, 6, 4)
    assert (model[7].in_channels, model[7].out_channels, model[7].groups) == (6, 4, 2)
    assert (model[5].num_features, model[6].num_parameters, model[9].num_parameters) == (6, 6, 1)
    repr(model)
    assert model.pruning_plan is PLAN


def test_sizes_are_what_a_fresh_layer_of_that_size_has() -> None:
    recipe = Recipe((("inverted", 4, "silu"), ("up_grouped", 5, "relu"), ("squeeze", 5, "relu")), "mean", 3)
    model, example = recipe.build(), recipe.inputs()
    apply_plan(model, any_plan(find_groups(model, example), 5, least=2), example)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fresh = type(layer)(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                groups=layer.groups,
                bias=layer.bias is not None,
            )
        elif isinstance(layer, nn.Linear):
            fresh = nn.Linear(layer.in_features, layer.out_features)
        elif isinstance(layer, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(layer.num_features)
        else:
            continue
        assert {n: t.shape for n, t in fresh.state_dict().items()} == {
            n: t.shape for n, t in layer.state_dict().items()
        }


def test_a_shared_prelu_keeps_its_one_parameter() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 6), nn.PReLU(), *conv_bn(6, 5), nn.PReLU(), *head(5)))
    apply_plan(model, keeping(**{"0": (6, (1, 3)), "3": (5, (0, 1, 2))}), X)
    assert (model[2].num_parameters, model[2].weight.shape) == (1, (1,))
    assert (model[5].num_parameters, model[5].weight.shape) == (1, (1,))


def test_objects_classes_and_flags_stay() -> None:
    class MyConv(nn.Conv2d):
        pass

    model = network().train()
    model[0] = MyConv(3, 6, 3, padding=1).double()
    model[5].eval()
    model[4].weight.requires_grad_(False)
    model[0].note = "mine"
    parameters = dict(model.named_parameters())
    identities = {name: id(parameter) for name, parameter in parameters.items()}
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    flags = {name: (parameter.requires_grad, parameter.is_leaf) for name, parameter in parameters.items()}
    apply_plan(model, PLAN, X)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert {n: (id(m), type(m), m.training) for n, m in model.named_modules()} == modules
    assert {n: (p.requires_grad, p.is_leaf) for n, p in model.named_parameters()} == flags
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    assert model[0].note == "mine"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision_stays(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    apply_plan(model, PLAN, X.to(dtype))
    for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        assert tensor.dtype == dtype
    assert model(X.to(dtype)).dtype == dtype


def test_memory_format_stays() -> None:
    model = network().to(memory_format=torch.channels_last)
    example = X.to(memory_format=torch.channels_last)
    model(example).sum().backward()
    apply_plan(model, PLAN, example)
    for layer in (model[4], model[7]):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()
        assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)
    plain = network()
    apply_plan(plain, PLAN, X)
    assert all(parameter.is_contiguous() for parameter in plain.parameters())
    for parameter in plain.parameters():  # nothing of the dense tensors is held
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_gradients_are_sliced_like_their_parameters() -> None:
    model, dense = network().train(), network().train()
    for net in (model, dense):
        net(X).square().sum().backward()
    model[12].bias.grad = None
    apply_plan(model, PLAN, X)
    slim = copy.deepcopy(dense)
    cut_channels(slim, PLAN, find_groups(dense, X))
    with torch.no_grad():  # gradients as if they were weights
        weights = copy.deepcopy(dense)
        for a, b in zip(weights.parameters(), dense.parameters(), strict=True):
            a.copy_(b.grad)
    apply_plan(weights, PLAN, X)
    for (name, parameter), expected in zip(model.named_parameters(), weights.parameters(), strict=True):
        if name == "12.bias":
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, expected), name


def test_hooks_on_parameters_go_on() -> None:
    model, seen = network(), []
    model[0].weight.register_hook(lambda g: seen.append(("hook", g.shape[0])))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(("after", p.grad.shape[0])))
    apply_plan(model, PLAN, X)
    model(X).sum().backward()
    assert seen == [("hook", 3), ("after", 3)]


def test_a_loss_from_before_does_not_break_the_next_backward() -> None:
    model = network().train()
    losses = [model(X).sum(), model(X).square().sum()]
    losses[0].backward(retain_graph=True)
    apply_plan(model, PLAN, X)
    model.zero_grad()
    loss = model(X).sum()
    loss.backward()
    slim = network().train()
    apply_plan(slim, PLAN, X)
    slim(X).sum().backward()
    for a, b in zip(model.parameters(), slim.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert losses


def test_modes_and_statistics_are_untouched_by_the_trial_run() -> None:
    model = network().train()
    apply_plan(model, PLAN, X)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0


def test_copying_and_saving_a_cut_network(tmp_path: object) -> None:
    model = network()
    apply_plan(model, PLAN, X)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert twin.pruning_plan == PLAN
    torch.save(model.state_dict(), f"{tmp_path}/w.pt")
    fresh = network(9)
    apply_plan(fresh, PLAN, X)
    fresh.load_state_dict(torch.load(f"{tmp_path}/w.pt"))
    assert torch.equal(fresh(X), model(X))


def test_two_plans_compose() -> None:
    model, direct = network(), network()
    first = keeping(**{"0": (6, (0, 2, 5)), "4": (8, tuple(range(8)))})
    second = keeping(**{"0": (3, (0, 2)), "4": (8, (1, 2, 3, 5, 6, 7))})
    apply_plan(apply_plan(model, first, X), second, X)
    apply_plan(direct, keeping(**{"0": (6, (0, 5)), "4": (8, (1, 2, 3, 5, 6, 7))}), X)
    assert_same(model, state_of(direct))
    assert model.pruning_plan == first.then(second)
    assert model.pruning_plan.digest == direct.pruning_plan.digest


def test_groups_cut_far_can_be_found_and_cut_again() -> None:
    """A second plan may name every group of the first (with one filter a group left, a layer's kind changes)."""
    recipe = Recipe((("resnext", 4, "relu"), ("inverted", 4, "relu"), ("conv", 5, "relu")), "mean", 0)
    model, example = recipe.build(), recipe.inputs()
    groups = [group for group in find_groups(model, example) if group.fixed is None]
    entries = [
        GroupPlan(g.name, g.width, tuple((g.unit < min(2, g.units)).nonzero().flatten().tolist())) for g in groups[1:]
    ]
    first = PruningPlan((whole(groups).groups[0], *entries))
    apply_plan(model, first, example)
    again = find_groups(model, example)
    assert [group.name for group in again][:-1] == [group.name for group in groups]
    rest = [GroupPlan(entry.name, len(entry.kept), tuple(range(len(entry.kept)))) for entry in first.groups[1:]]
    second = PruningPlan((GroupPlan(groups[0].name, groups[0].width, (0, 3)), *rest))
    reference = copy.deepcopy(model)
    apply_plan(model, second, example)
    assert verify(reference, second, example).max_rel <= 1e-12


# -- factors ------------------------------------------------------------------------------------------------


def with_hooks(model: nn.Module, plan: PruningPlan, example: Tensor) -> Tensor:
    """Output when removed channels are held at zero and the writers' outputs are multiplied by the factors."""
    groups = find_groups(model, example)
    masked = mask_plan(copy.deepcopy(model), plan, groups)
    entries = {entry.name: entry for entry in plan.groups}
    for group in groups:
        entry = entries.get(group.name)
        if entry is None or entry.factors is None:
            continue
        factor = torch.ones(group.width, dtype=torch.float64)
        factor[list(entry.kept)] = torch.tensor(entry.factors, dtype=torch.float64)
        for member in group.writers:

            def multiply(_: nn.Module, __: object, y: Tensor, m: object = member, f: Tensor = factor) -> Tensor:
                full = torch.ones(y.shape[1], dtype=y.dtype)
                full[m.index] = f[m.channel]
                return y * full.reshape(1, -1, *[1] * (y.dim() - 2))

            masked.get_submodule(member.path).register_forward_hook(multiply)
    return masked(example)


def scaled(plan: PruningPlan, seed: int) -> PruningPlan:
    generator = torch.Generator().manual_seed(seed)
    return replace(
        plan,
        groups=tuple(
            replace(g, factors=tuple((0.5 + torch.rand(len(g.kept), generator=generator)).tolist()))
            for g in plan.groups
        ),
    )


@settings(derandomize=True, database=None, deadline=None, max_examples=80)
@given(networks(tuple(b for b in BLOCKS if b != "up_grouped")), st.integers(0, 2**16))
def test_factors_multiply_what_the_writers_write(recipe: Recipe, seed: int) -> None:
    model, example = recipe.build(), recipe.inputs()
    plan = scaled(any_plan(find_groups(model, example), seed), seed)
    expected = with_hooks(model, plan, example)
    assert verify(model, plan, example).max_rel <= 1e-12
    apply_plan(model, plan, example)
    torch.testing.assert_close(model(example), expected, rtol=1e-10, atol=1e-13)


def test_factors_of_a_grouped_transposed_convolution() -> None:
    """Its output channels are folded: a position of the weight belongs to one channel of every group."""
    recipe = Recipe((("up_grouped", 5, "relu"),), "mean", 0)
    model, example = recipe.build(), recipe.inputs()
    plan = scaled(any_plan(find_groups(model, example), 4), 2)
    before = state_of(model)
    with pytest.raises(PlanError, match="transposed"):
        apply_plan(model, plan, example)
    assert_same(model, before)


def test_factors_that_nothing_can_hold_are_refused_or_kept() -> None:
    """Behind a normalisation without affine parameters the factor must go elsewhere, or the plan is refused."""
    norm = nn.BatchNorm2d(6, affine=False)
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), *head(5)))
    plan = PruningPlan((GroupPlan("0", 6, (0, 1, 4), (2.0, 0.5, 3.0)),))
    expected, before = with_hooks(model, plan, X), state_of(model)
    try:
        apply_plan(model, plan, X)
    except PlanError:
        assert_same(model, before)
        return
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-13)


def test_factors_alone_are_a_plan() -> None:
    model, reference = network(), network()
    plan = PruningPlan((GroupPlan("0", 6, tuple(range(6)), (1.0, 2.0, 1.0, 1.0, 1.0, -1.0)),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_plan(model, plan, X)
    for name in ("1", "3.branches.0.4"):
        factor = torch.tensor(plan.groups[0].factors, dtype=torch.float64)
        assert torch.equal(model.get_submodule(name).weight, reference.get_submodule(name).weight * factor)
        assert torch.equal(model.get_submodule(name).bias, reference.get_submodule(name).bias * factor)
        assert torch.equal(model.get_submodule(name).running_mean, reference.get_submodule(name).running_mean)


# -- all or nothing -----------------------------------------------------------------------------------------


class Insists(nn.Module):
    """Runs only on the width it was made for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.width:
            raise RuntimeError(f"expected {self.width} channels, got {x.shape[1]}")
        return x


class Breaks(Exception):
    """An error of no kind that the surgery expects."""


class InsistsOddly(Insists):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.width:
            raise Breaks
        return x


def everything(model: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        for key in (
            "in_channels",
            "out_channels",
            "groups",
            "num_features",
            "in_features",
            "num_parameters",
            "training",
        ):
            if hasattr(module, key):
                found[f"{name}.{key}"] = getattr(module, key)
    for name, parameter in model.named_parameters():
        found[name] = (id(parameter), parameter.requires_grad, parameter.dtype, parameter.stride())
    return found


@pytest.mark.parametrize(("check", "error"), [(Insists, SurgeryError), (InsistsOddly, Exception)])
def test_a_network_that_does_not_run_is_put_back(check: type[Insists], error: type[Exception]) -> None:
    model = network().train()
    model.insert(4, check(6))
    model[5].weight.requires_grad_(False)
    model(X).square().sum().backward()
    before, sizes = state_of(model), everything(model)
    plan = keeping(**{"0": (6, (0, 2, 5)), "5": (8, (1, 2, 3, 5, 6, 7))})
    with pytest.raises(error) as caught:
        apply_plan(model, plan, X)
    if check is Insists:
        assert "expected 6 channels, got 3" in str(caught.value)
    assert_same(model, before)
    assert everything(model) == sizes
    assert not any(CUTS.get(parameter) for parameter in model.parameters())
    assert not hasattr(model, "pruning_plan")
    model.zero_grad()
    model(X).sum().backward()  # and it still trains


def test_after_a_failed_second_cut_the_first_remains() -> None:
    model = network()
    first = keeping(**{"0": (6, (0, 2, 5)), "4": (8, tuple(range(8)))})
    apply_plan(model, first, X)
    model.insert(4, Insists(3))
    cuts = {name: len(CUTS.get(parameter, [])) for name, parameter in model.named_parameters()}
    before = state_of(model)
    with pytest.raises(SurgeryError):
        apply_plan(model, keeping(**{"0": (3, (0, 2))}), X)
    assert_same(model, before)
    assert {name: len(CUTS.get(p, [])) for name, p in model.named_parameters()} == cuts
    assert model.pruning_plan is first


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (keeping(**{"elsewhere": (6, (0,))}), "another model.*elsewhere"),
        (keeping(**{"0": (7, (0, 1))}), "7 channels in the plan and 6 here"),
        (keeping(**{"4": (8, (0, 1, 2))}), "parts channels that go together"),
        (keeping(**{"7": (8, (0, 1, 2, 3))}), "parts channels that go together"),
        (keeping(**{"12": (3, (0, 1))}), "must stay whole.*output"),
        (replace(PLAN, removed_blocks=("7",)), "blocks"),
    ],
    ids=["unknown", "width", "tied-inputs", "tied-outputs", "output", "blocks"],
)
def test_plans_that_do_not_fit_change_nothing(plan: PruningPlan, text: str) -> None:
    model = network()
    before, sizes = state_of(model), everything(model)
    with pytest.raises(PlanError, match=text):
        apply_plan(model, plan, X)
    assert_same(model, before)
    assert everything(model) == sizes
    assert not any(CUTS.get(parameter) for parameter in model.parameters())


def test_a_plan_for_the_dense_network_does_not_fit_the_slim_one() -> None:
    model = network()
    apply_plan(model, PLAN, X)
    before = state_of(model)
    with pytest.raises(PlanError, match="6 channels in the plan and 3 here"):
        apply_plan(model, PLAN, X)
    assert_same(model, before)


def test_an_ignored_group_is_not_cut_by_a_plan_made_without_it() -> None:
    model = network()
    groups = find_groups(model, X, ignore=["4"])
    with pytest.raises(PlanError, match="ignored"):
        apply_plan(model, PLAN, X, groups=groups)


def test_a_plan_of_nothing_says_so() -> None:
    model = network()
    before = state_of(model)
    with pytest.warns(UserWarning, match="removes nothing"):
        apply_plan(model, whole(find_groups(model, X)), X)
    assert_same(model, before)


def test_a_frozen_network_can_be_cut_but_not_scored_by_gradients() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(CriterionError, match="frozen"), TaylorFO().collect(model):
        pass
    apply_plan(model, PLAN, X)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(X).shape == (2, 3)


def test_apply_is_the_same_as_a_method_of_the_plan() -> None:
    one, other = network(), network()
    assert PLAN.apply(one, X) is one
    apply_plan(other, PLAN, X)
    assert_same(one, state_of(other))
