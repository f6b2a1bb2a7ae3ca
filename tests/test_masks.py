"""Masks: removed channels stay at zero through training, and what remains trains as in the slim network."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import BLOCKS, Recipe, any_plan, networks
from torch import nn
from torch.optim import SGD

from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.masks import Masks, mask_plan


def kept_of(plan: object) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(kept) for name, kept in plan.kept().items()}  # type: ignore[attr-defined]


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(networks(BLOCKS), st.integers(0, 2**16))
def test_masked_training_is_training_the_slim_network(recipe: Recipe, seed: int) -> None:
    """Momentum, weight decay and clipping by the global norm, in train mode."""
    model, slim, example = recipe.build().train(), recipe.build().train(), recipe.inputs(4)
    target = torch.tensor([0, 1, 2, 0])
    groups = find_groups(model, example)
    plan = any_plan(groups, seed, least=2)
    cut_channels(slim, plan, groups)
    masks = Masks(model, groups)
    masks.remove(kept_of(plan))
    masks.zero_weights()
    for network in (model, slim):
        optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(example), target).backward()
            if network is model:
                masks.zero_grads()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            if network is model:
                masks.zero_weights()
    cut_channels(model, plan, groups)
    for (name, a), b in zip(model.state_dict().items(), slim.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def test_every_slice_is_zero_and_nothing_else() -> None:
    recipe = Recipe((("inverted", 4, "relu"), ("residual", 4, "relu")), "mean", 0)
    model, dense, example = recipe.build(), recipe.build(), recipe.inputs()
    groups = find_groups(model, example)
    plan = any_plan(groups, 2)
    assert plan.channels_removed > 3
    assert mask_plan(model, plan, groups) is model
    marks = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in model.named_parameters()}
    for entry in plan.groups:
        group = next(g for g in groups if g.name == entry.name)
        for piece in group.slices:
            dead = piece.index[torch.isin(piece.channel, torch.tensor(entry.removed))]
            if piece.tensor in marks:
                marks[piece.tensor].index_fill_(piece.dim, dead, True)
    for (name, tensor), before in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(tensor, before.masked_fill(marks[name], 0)), name
    for (name, tensor), before in zip(model.named_buffers(), dense.buffers(), strict=True):
        assert torch.equal(tensor, before), name


def test_masks_can_be_changed_and_gradients_may_be_missing() -> None:
    recipe = Recipe((("conv", 4, "relu"),), "mean", 0)
    model, example = recipe.build(), recipe.inputs()
    masks = Masks(model, find_groups(model, example))
    masks.zero_grads()  # nothing removed, no gradients
    masks.remove({"1.0": torch.tensor([0, 1, 2])})
    masks.zero_grads()
    model(example).sum().backward()
    masks.zero_grads()
    assert model[1][0].weight.grad[3].abs().sum() == 0
    assert model[1][0].weight.grad[2].abs().sum() > 0
    masks.remove({"1.0": torch.tensor([0, 3])})
    masks.zero_weights()
    assert (model[1][1].weight != 0).tolist() == [True, False, False, True]
    assert masks.removed["1.0"].tolist() == [False, True, True, False]
