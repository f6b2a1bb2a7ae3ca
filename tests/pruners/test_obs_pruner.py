"""OBS under NNI: what the surviving gates become is in the weights, with masks on and after they are off."""

import copy
import itertools
from typing import Any

import torch
from nni.compression.pruning import LinearPruner
from nni_task import BATCH, CONVS, Training, data, evaluator_of, resnet, sparsity, step
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.compensation import fold_factors
from nni_plugin.criteria import OBS
from nni_plugin.pruners import OBSPruner

X, TARGET = data()


def pruned(model: nn.Module, **options: Any) -> tuple[OBSPruner, dict[str, dict[str, Any]]]:
    pruner = OBSPruner(model, CONVS, evaluator_of(model), 4, **options)
    return pruner, pruner.compress()[1]


def test_factors_are_in_the_layers_that_write_the_channel() -> None:
    model = resnet()
    before = copy.deepcopy(model)
    _, masks = pruned(model)
    factors = []
    for name, layer in before.named_modules():
        if not isinstance(layer, nn.BatchNorm2d):
            continue
        now = model.get_submodule(name)._nni_wrapper
        stays = masks[name]["weight"].bool()
        factor = now.weight.detach()[stays] / layer.weight.detach()[stays]
        assert torch.allclose(now.bias.detach()[stays], layer.bias.detach()[stays] * factor)
        assert not now.weight.detach()[~stays].any()
        factors.append(factor)
    assert float((torch.cat(factors) - 1).abs().max()) > 0.01
    convs = [name for name, layer in before.named_modules() if isinstance(layer, nn.Conv2d)]
    assert all(
        torch.equal(model.get_submodule(name)._nni_wrapper.weight, before.get_submodule(name).weight) for name in convs
    )


def test_unwrapping_leaves_the_pruned_network() -> None:
    """Unlike masks, compensation is in the weights: without its wrappers the network computes what it did with them."""
    model = resnet()
    pruner, _ = pruned(model)
    model.eval()
    with torch.no_grad():
        masked = model(X)
        pruner.unwrap_model()
        unwrapped = model(X)
        pruner.plan().apply(model, X)
        assert torch.allclose(unwrapped, masked, rtol=1e-10, atol=1e-12)
        assert torch.allclose(model(X), masked, rtol=1e-10, atol=1e-12)


def test_without_compensation_no_weight_changes() -> None:
    model = resnet()
    before = copy.deepcopy(model)
    pruner, masks = pruned(model, criterion=OBS(compensate=False))
    pruner.unwrap_model()
    values = dict(before.named_parameters())
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert sparsity(masks, "layer3.0.conv1") == 0.5


def test_factors_are_those_of_the_criterion_by_itself() -> None:
    model = resnet()
    plain = copy.deepcopy(model)
    pruner, _ = pruned(model)
    kept = {name: torch.tensor(channels) for name, channels in pruner.plan().kept().items()}
    groups = [group for group in find_groups(plain, X[:1]) if group.name in kept]
    criterion = OBS()
    with criterion.collect(plain, groups):
        for i in range(0, len(X), BATCH):
            plain.zero_grad()
            step((X[i : i + BATCH], TARGET[i : i + BATCH]), plain).backward()
            criterion.update()
    whole = {group.name: torch.arange(group.width) for group in groups}
    fold_factors(plain, groups, criterion.conclude(whole, kept).factors)
    pruner.unwrap_model()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-9), name


def test_under_a_schedule_factors_are_folded_each_time() -> None:
    model, training = resnet(), Training()
    evaluator = evaluator_of(model, training)
    scheduled = LinearPruner(OBSPruner(model, CONVS, evaluator, 2), interval_steps=2, total_times=2)
    values: list[Tensor] = []
    training.after_step = lambda _: values.append(model.bn1._nni_wrapper.weight.detach().clone())
    _, masks = scheduled.compress(max_steps=5, max_epochs=None)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(values)] == [False, True, False, True]
    assert sparsity(masks, "bn1") == 0.5
