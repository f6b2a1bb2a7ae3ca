"""On random networks: the compact network is the masked one, costs what was predicted, trains, and can be rebuilt."""

import copy
import random
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks_at_random import Recipe, any_plan, assert_same, networks, state_of
from torch import nn

from nni_plugin import Params, PruningPlan, count, plan_channels, verify
from nni_plugin.adapters.torch_pruning import apply_plan, find_groups, sound_groups
from nni_plugin.criteria import TaylorFO
from nni_plugin.errors import GraphError
from nni_plugin.slim_cost import SlimCost

SEEDS = st.integers(0, 2**16)
CASES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def cut(model: nn.Module, plan: PruningPlan, example: torch.Tensor, **options: object) -> nn.Module:
    slim = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The plan removes nothing")
        return apply_plan(slim, plan, example, **options)


@settings(CASES, max_examples=200)
@given(networks(), SEEDS)
def test_masked_is_compact_and_costs_what_was_predicted(recipe: Recipe, seed: int) -> None:
    model, example = recipe.build(), recipe.inputs()
    before = state_of(model)
    groups = find_groups(model, example)
    # Nothing is proved by leaving things whole: only the classifier is.
    assert [group.fixed for group in groups if group.fixed and "output" not in group.fixed] == []
    plan = any_plan(groups, seed)

    parity = verify(model, plan, example, groups=groups)
    assert not parity.renormalised
    assert parity.max_rel <= 1e-12, str(parity)
    assert_same(model, before)

    predicted = SlimCost(model, example, groups)
    slim = cut(model, plan, example)
    size = predicted.predict({name: torch.tensor(kept) for name, kept in plan.kept().items()})
    assert count(slim, example) == size.cost
    assert predicted.dense.cost == count(model, example)
    assert (size.channels, predicted.dense.channels) == (plan.channels_kept, plan.channels_kept + plan.channels_removed)

    slim.train()
    slim(example).square().mean().backward()
    for name, parameter in slim.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name


@settings(CASES, max_examples=60)
@given(networks(), SEEDS)
def test_every_way_to_one_plan_gives_the_same_bits(recipe: Recipe, seed: int) -> None:
    model, example = recipe.build(), recipe.inputs()
    groups = find_groups(model, example)
    # Two filters a group at least: a grouped convolution with one is another kind of layer, see below.
    plan = any_plan(groups, seed, least=2)
    expected = state_of(cut(model, plan, example))

    assert_same(cut(model, PruningPlan.from_json(plan.to_json()), example), expected)

    shuffled = random.Random(seed).sample(groups, len(groups))
    entries = tuple(random.Random(seed + 1).sample(plan.groups, len(plan.groups)))
    assert_same(cut(model, PruningPlan(entries), example, groups=shuffled), expected)
    assert PruningPlan(entries).digest == plan.digest

    names = {group.name for group in plan.groups}
    first_names = {name for name in names if random.Random(f"{seed}{name}").random() < 0.5}
    first = any_plan(groups, seed, least=2, names=first_names)
    slim = cut(model, first, example)
    direct = plan.kept()
    second_groups = find_groups(slim, example)
    # The second half in the numbering of the slim network.
    left = {entry.name: list(entry.kept) for entry in first.groups}
    wanted = {name: sorted(set(direct[name])) if name not in first_names else left[name] for name in names}
    second = PruningPlan(
        tuple(
            type(first.groups[0])(name, len(left[name]), tuple(left[name].index(i) for i in wanted[name]))
            for name in direct
        )
    )
    assert {group.name for group in second_groups if group.fixed is None} <= {group.name for group in groups}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The plan removes nothing")
        apply_plan(slim, second, example)
    at_once = PruningPlan(
        tuple(type(entry)(entry.name, entry.total, tuple(wanted[entry.name])) for entry in plan.groups)
    )
    assert_same(slim, state_of(cut(model, at_once, example)))
    assert first.then(second).digest == at_once.digest
    assert slim.pruning_plan.digest == at_once.digest


@settings(CASES, max_examples=40)
@given(networks(), SEEDS, st.booleans())
def test_plan_channels_from_scores_to_a_network_within_budget(recipe: Recipe, seed: int, train: bool) -> None:
    model, example = recipe.build(), recipe.inputs(4)
    model.train(train)
    before = state_of(model)
    target = torch.tensor([0, 1, 2, 0])

    def loss(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(network(batch), target)

    # A third of the way from the dense network to the smallest possible: there is always something to do.
    groups = [group for group in find_groups(model, example) if group.fixed is None]
    predicted = SlimCost(model, example, groups)
    least = {group.name: (group.unit == 0).nonzero().flatten() for group in groups}
    dense = predicted.dense.cost.params
    ratio = (2 + predicted.predict(least).cost.params / dense) / 3

    plan = plan_channels(model, example, TaylorFO(), [example, example.flip(0)], loss, Params(ratio))
    assert_same(model, before)
    assert model.training is train
    slim = cut(model, plan, example)
    assert count(slim, example) == plan.cost_after
    assert count(slim, example).params <= ratio * dense
    assert verify(model.eval(), plan, example).max_rel <= 1e-12


def case(*blocks: tuple[str, int, str], head: str) -> Recipe:
    return Recipe(blocks, head, 1)


@pytest.mark.parametrize("head", ["flatten", "mlp"])
@pytest.mark.parametrize(
    "blocks",
    [
        [("concat", 2, "relu")],
        [("concat", 3, "relu")],
        [("concat", 4, "relu")],
        [("conv", 5, "relu"), ("dense", 4, "relu")],
        [("conv", 5, "relu"), ("concat", 4, "relu")],
        [("concat", 4, "relu"), ("pool", 4, "relu")],
        [("up_grouped", 5, "relu"), ("dense", 4, "relu")],
        [("bare", 3, "prelu_one")],
        [("projection", 3, "prelu_one")],
    ],
    ids=lambda blocks: "+".join(f"{kind}-{act}" for kind, _, act in blocks),
)
def test_flattened_maps_of_a_concatenation(blocks: list[tuple[str, int, str]], head: str) -> None:
    recipe = case(*blocks, head=head)
    model, example = recipe.build(), recipe.inputs()
    # Torch-Pruning maps some of these wrongly; such groups are left whole, the others are right.
    groups = sound_groups(model, find_groups(model, example), example)
    for seed in range(4):
        plan = any_plan(groups, seed)
        assert verify(model, plan, example, groups=groups).max_rel <= 1e-12
        cut(model, plan, example)


@pytest.mark.parametrize("block", ["concat", "dense"])
def test_one_slope_for_all_channels_hides_nothing(block: str) -> None:
    """Torch-Pruning loses the number of channels behind such a PReLU, and fails at the next concatenation."""
    recipe = case(("conv", 4, "prelu_one"), (block, 4, "prelu_one"), ("conv", 4, "prelu_one"), head="mean")
    model, example = recipe.build(), recipe.inputs()
    groups = find_groups(model, example)
    for seed in range(4):
        assert verify(model, any_plan(groups, seed), example, groups=groups).max_rel <= 1e-12
    with pytest.raises(GraphError, match="could not be traced"):
        find_groups(model, example, keep_host=True)
