"""Blocks in plans: with channels in either order, composed, in JSON and checkpoints, on random networks."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks_at_random import Recipe, any_plan, assert_same, networks, randomise, state_of
from torch import nn

from nni_plugin import GroupPlan, ModelIdentity, PruningPlan, carry_optimizer, from_pretrained, save_pretrained, verify
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.errors import NNIPluginError, PlanError
from nni_plugin.layers import removable_blocks
from nni_plugin.networks import resnet20, vgg19_bn

X = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MAKERS = {"resnet20": lambda: resnet20(width_mult=0.5), "vgg19_bn": lambda: vgg19_bn(width_mult=0.125)}
BLOCKS = {
    "resnet20": PruningPlan((), ("layer1.1", "layer3.1", "layer3.2")),
    "vgg19_bn": PruningPlan((), ("features.17:features.19", "features.46:features.48")),
}


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(MAKERS[name]())


def half(model: nn.Module) -> PruningPlan:
    """Keep every other channel of every group."""
    groups = [group for group in find_groups(model, X) if group.fixed is None]
    return PruningPlan(tuple(GroupPlan(g.name, g.width, tuple(range(0, g.width, 2))) for g in groups))


# -- blocks and channels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_either_order_and_one_plan_give_one_network(name: str) -> None:
    blocks = BLOCKS[name]
    first, second, at_once, replayed = (create(name) for _ in range(4))
    blocks.apply(first, X)
    later = half(first)
    later.apply(first, X)
    half(second).apply(second, X)
    blocks.apply(second, X)
    both = blocks.then(later)
    assert verify(at_once, both, X).max_rel < 1e-12
    both.apply(at_once, X)
    assert_same(second, state_of(first))
    assert_same(at_once, state_of(first))
    assert torch.equal(first(X), second(X))
    for model in (first, second, at_once):
        plan: Any = model.pruning_plan
        assert plan.removed_blocks == blocks.removed_blocks
        again = copy.deepcopy(replayed)
        PruningPlan.from_json(plan.to_json()).apply(again, X)
        assert_same(again, state_of(first))
    assert first.pruning_plan.digest == both.digest == at_once.pruning_plan.digest  # type: ignore[union-attr]


def test_groups_are_named_as_in_the_dense_network() -> None:
    model = create("resnet20")
    BLOCKS["resnet20"].apply(model, X)
    assert "layer1.1.conv1" in [group.name for group in find_groups(model, X)]
    half(model).apply(model, X)
    kept = model.pruning_plan.kept()  # type: ignore[union-attr]
    assert "layer1.2.conv1" in kept
    assert "layer1.1.conv1" not in kept
    assert not any(name.startswith(("layer3.1", "layer3.2")) for name in kept)


def test_a_plan_of_the_dense_network_with_blocks_added() -> None:
    model = create("resnet20")
    dense = half(model)  # it also names the channels inside the blocks
    plan = PruningPlan(dense.groups, ("layer1.1",))
    assert verify(model, plan, X).ok
    plan.apply(model, X)
    other = create("resnet20")
    PruningPlan(tuple(g for g in dense.groups if not g.name.startswith("layer1.1.")), ("layer1.1",)).apply(other, X)
    assert_same(model, state_of(other))


def test_channels_that_meet_where_a_unit_leaves() -> None:
    model = create("vgg19_bn")
    unit, (before, behind) = "features.17:features.19", ("features.14", "features.17")
    same = PruningPlan((GroupPlan(before, 32, (0, 3, 5)), GroupPlan(behind, 32, (0, 3, 5))), (unit,))
    one = PruningPlan((GroupPlan(before, 32, (0, 3, 5)),), (unit,))
    other = PruningPlan((GroupPlan(behind, 32, (0, 3, 5)),), (unit,))  # rooted in what leaves
    results = [state_of(plan.apply(copy.deepcopy(model), X)) for plan in (same, one, other)]
    assert results[0]["features.14.weight"].shape[0] == results[0]["features.17.weight"].shape[1] == 3
    for state in results[1:]:
        assert all(torch.equal(state[key], results[0][key]) for key in state)
    torn = PruningPlan((GroupPlan(before, 32, (0, 3, 5)), GroupPlan(behind, 32, (0, 3, 6))), (unit,))
    untouched = state_of(model)
    with pytest.raises(PlanError, match=r"meet where a block is removed.*unchanged"):
        torn.apply(model, X)
    assert_same(model, untouched)
    PruningPlan(torn.groups).apply(model, X)  # and in two steps no better
    untouched = state_of(model)
    with pytest.raises(PlanError, match=r"different ones have been removed before.*unchanged"):
        PruningPlan((), (unit,)).apply(model, X)
    assert_same(model, untouched)


def test_factors_beside_blocks() -> None:
    model = create("resnet20")
    plan = PruningPlan((GroupPlan("layer1.2.conv1", 8, (1, 2, 6), (0.5, 2.0, 1.0)),), ("layer1.1",))
    assert verify(model, plan, X).max_rel < 1e-12
    plan.apply(model, X)
    torch.testing.assert_close(
        model.get_submodule("layer1.1.bn1").weight,
        create("resnet20").get_submodule("layer1.2.bn1").weight[[1, 2, 6]]
        * torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64),
    )


def test_optimizers_follow_both() -> None:
    model = create("resnet20").train()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).square().sum().backward()
    optimizer.step()
    plan = PruningPlan((GroupPlan("layer1.2.conv1", 8, (1, 2, 6)),), ("layer1.1",))
    moment = optimizer.state[model.get_submodule("layer1.2.conv1").weight]["exp_avg"].clone()
    plan.apply(model, X)
    carry_optimizer(optimizer, plan)
    weight: Any = model.get_submodule("layer1.1.conv1").weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment[[1, 2, 6]])
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert set(optimizer.state) == set(model.parameters())
    model(X).square().sum().backward()
    optimizer.step()


# -- composed ---------------------------------------------------------------------------------------------------


def test_one_block_after_the_other() -> None:
    model = create("resnet20")
    for _ in range(2):
        PruningPlan((), ("layer1.1",)).apply(model, X)
    assert model.pruning_plan.removed_blocks == ("layer1.1", "layer1.2")  # type: ignore[union-attr]
    other = create("resnet20")
    PruningPlan((), ("layer1.1", "layer1.2")).apply(other, X)
    assert_same(model, state_of(other))


def test_a_branch_and_then_the_block_around_it() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=16, num_heads=2)
    model = model.double().eval()
    dense = copy.deepcopy(model)
    for name in ("blocks.0", "blocks.1.attn", "blocks.0.mlp", "blocks.1"):
        PruningPlan((), (name,)).apply(model, X)
    plan = model.pruning_plan
    assert plan.removed_blocks == ("blocks.0", "blocks.1.mlp", "blocks.2")
    assert plan.shells == ("blocks.1.mlp",)
    assert len(model.blocks) == 1
    plan.apply(dense, X)
    assert torch.equal(dense(X), model(X))


def test_explained() -> None:
    model = create("resnet20")
    BLOCKS["resnet20"].apply(model, X)
    lines = model.pruning_plan.explain().splitlines()  # type: ignore[union-attr]
    assert [line.split() for line in lines[2:5]] == [[name, "removed"] for name in BLOCKS["resnet20"].removed_blocks]
    assert lines[5] == "3 blocks removed"


# -- saved and loaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = create(name).float()
    x = X.float()
    BLOCKS[name].apply(model, x)
    half(model.double()).apply(model, X)
    model.float()
    arguments = {"width_mult": 0.5 if name == "resnet20" else 0.125}
    save_pretrained(model, tmp_path, identity=ModelIdentity("nni_plugin", name, arguments))
    loaded = from_pretrained(tmp_path)
    assert_same(loaded, state_of(model))
    assert torch.equal(loaded(x), model(x))
    assert loaded.pruning_plan == model.pruning_plan
    # And once more from what was loaded.
    last = [block.name for block in removable_blocks(loaded, x)][-1]
    PruningPlan((), (last,)).apply(loaded, x)
    save_pretrained(loaded, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(x), loaded(x))


# -- random networks, random subsets ----------------------------------------------------------------------------


NOT_BEHIND_A_RELU = Recipe((("up_grouped", 2, "relu"), ("residual", 2, "relu")), "mean", 0)
"""Its last block ends in one, and gets values of either sign: with its branch at zero it is no identity."""


@settings(max_examples=30)
@given(networks(), st.integers(0, 2**20), st.booleans())
@example(NOT_BEHIND_A_RELU, 1, False)
def test_removed_is_held_at_zero(recipe: Recipe, seed: int, channels: bool) -> None:
    model, x = recipe.build(), recipe.inputs()
    rng = random.Random(seed)
    chosen: list[str] = []
    for block in removable_blocks(model, x):
        if rng.random() < 0.5 and not any(block.name.startswith(f"{name}.") for name in chosen):
            chosen.append(block.name)
    plan = PruningPlan((), tuple(chosen))
    dense = state_of(model)
    parity = verify(model, plan, x)
    assert parity.max_rel < 1e-9
    assert_same(model, dense)
    if not chosen:
        return
    slim = plan.apply(copy.deepcopy(model), x)
    if channels:
        later = any_plan(find_groups(slim, x), seed)
        later.apply(slim, x)
        both = slim.pruning_plan
        assert isinstance(both, PruningPlan)
        once = copy.deepcopy(model)
        both.apply(once, x)
        assert_same(once, state_of(slim))
        assert torch.equal(once(x), slim(x))


@settings(max_examples=40)
@given(networks(), st.integers(0, 2**20))
def test_channels_first_then_blocks_is_one_plan(recipe: Recipe, seed: int) -> None:
    model, x = recipe.build(), recipe.inputs()
    slim = copy.deepcopy(model)
    first = any_plan(find_groups(slim, x), seed)
    if first.channels_removed == 0:
        return
    first.apply(slim, x)
    names = [block.name for block in removable_blocks(slim, x)]
    chosen = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    if not chosen:
        return
    before, refusal = state_of(slim), ""
    try:
        PruningPlan((), tuple(chosen)).apply(slim, x)
    except PlanError as error:
        refusal = str(error)
    if refusal:  # no plan on the dense network does it
        assert "different ones have been removed before" in refusal
        assert_same(slim, before)
        return
    plan = slim.pruning_plan
    assert isinstance(plan, PruningPlan)
    once = plan.apply(copy.deepcopy(model), x)
    assert_same(once, state_of(slim))
    assert torch.equal(once(x), slim(x))


@settings(max_examples=15)
@given(networks(), st.integers(0, 2**20))
def test_nonsense_changes_nothing(recipe: Recipe, seed: int) -> None:
    model, x = recipe.build(), recipe.inputs()
    before, names = state_of(model), [name for name, _ in model.named_modules()][1:]
    removable = {block.name for block in removable_blocks(model, x)}
    name = random.Random(seed).choice([name for name in names if name not in removable])
    with pytest.raises(NNIPluginError, match="unchanged"):
        PruningPlan((), (name,)).apply(model, x)
    assert_same(model, before)
