"""Factors folded into writers, and statistics of batch normalisations estimated anew."""

import copy
from typing import Any

import pytest
import torch
from networks_at_random import assert_same, state_of
from torch import nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.compensation import anchor_batchnorm, fold_factors, reestimate_batchnorm
from nni_plugin.errors import DataError
from nni_plugin.networks import resnet20


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = resnet20(num_classes=3, in_chans=3).double()
    network(torch.randn(16, 3, 8, 8, dtype=torch.float64))  # statistics that are not the initial ones
    return network.eval()


def test_a_factor_scales_what_the_readers_read(model: nn.Module) -> None:
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    group = next(g for g in find_groups(model, images) if g.fixed is None and len(g.readers) == 1)
    factors = torch.linspace(0.5, 2, group.width, dtype=torch.float64)
    (reader,) = group.readers
    expected = copy.deepcopy(model)
    weight = expected.get_submodule(reader.path).weight
    with torch.no_grad():  # scaling before a ReLU is scaling after it
        weight[:, reader.index] *= factors[reader.channel][None, :, None, None]
        fold_factors(model, [group], {group.name: factors})
        torch.testing.assert_close(model(images), expected(images))


def test_statistics_are_the_means_over_minibatches(model: nn.Module) -> None:
    batches = [torch.randn(32, 3, 8, 8, dtype=torch.float64) * 3 + 1 for _ in range(3)]
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reestimate_batchnorm(model, batches, lambda network, batch: network(batch))
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        maps = [conv(batch) for batch in batches]
    torch.testing.assert_close(first.running_mean, torch.stack([m.mean([0, 2, 3]) for m in maps]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([m.var([0, 2, 3]) for m in maps]).mean(0))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert first.momentum == 0.1


def test_without_minibatches_nothing_changes(model: nn.Module) -> None:
    before = state_of(model)
    with pytest.raises(DataError, match="no minibatch"):
        reestimate_batchnorm(model, [], lambda network, batch: network(batch))
    assert_same(model, before)


class _WithAuxiliaryHead(nn.Module):
    """A head that training alone would run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.auxiliary = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stem(images))


def test_a_normalisation_that_does_not_run_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    model = _WithAuxiliaryHead()
    model.auxiliary(torch.randn(8, 4, 6, 6) * 3 + 1)
    before = state_of(model.auxiliary)
    reestimate_batchnorm(model, [torch.randn(8, 3, 8, 8)], lambda network, batch: network(batch))
    assert_same(model.auxiliary, before)
    assert int(model.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("settle", [reestimate_batchnorm, anchor_batchnorm])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(model: nn.Module, settle: Any, bad: float) -> None:
    batches = [torch.randn(8, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    batches[1][2, 0, 4, 4] = bad
    before = state_of(model)
    with pytest.raises(DataError, match="'bn1' would not be finite"):
        settle(model, batches, lambda network, batch: network(batch))
    assert_same(model, before)
    assert not model.training


def test_without_batch_normalisation_nothing_happens() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    before = state_of(model)
    reestimate_batchnorm(model, [torch.randn(2, 3, 4, 4)], lambda network, batch: network(batch))
    assert_same(model, before)


def test_anchored_normalisations_compute_the_same_and_train_mode_begins_with_it(model: nn.Module) -> None:
    images = torch.randn(32, 3, 8, 8, dtype=torch.float64) * 3 + 1
    with torch.no_grad():  # weights solved anew leave the statistics behind
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(0.6)
        expected = model(images)
        apart = (copy.deepcopy(model).train()(images) - expected).abs().max()
        anchor_batchnorm(model, [images], lambda network, batch: network(batch))
        assert not model.training
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.train()(images), expected, rtol=1e-8, atol=1e-8)
    assert apart > 0.1


def test_anchoring_sums_over_minibatches_and_leaves_what_has_no_affine_part() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False))
    model = model.double().eval()
    batches = list(torch.randn(24, 3, 8, 8, dtype=torch.float64).split(8))
    before = copy.deepcopy(model[3].state_dict())
    anchor_batchnorm(model, batches, lambda network, batch: network(batch))
    read = model[0](torch.cat(batches)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(model[1].running_mean, read.mean(1))
    torch.testing.assert_close(model[1].running_var, read.var(1, correction=0))
    assert all(torch.equal(value, before[name]) for name, value in model[3].state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    state = state_of(model)
    with pytest.raises(DataError, match="no minibatch"):
        anchor_batchnorm(model, [], lambda network, batch: network(batch))
    assert_same(model, state)
