"""Torch-Pruning's importances by name: what the tuned ones compute, and what the Hessian is given and refuses."""

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from nni_plugin import MACs, plan_channels
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.errors import CriterionError
from nni_plugin.methods import create_criterion
from nni_plugin.planner import score_groups


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.Flatten(), nn.Linear(4, 3)).eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(3, 3, 4, 4), torch.randint(3, (3,))) for _ in range(2)]


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _scores(method, model, batches, loss=_loss):
    groups = [group for group in find_groups(model, batches[0][0], keep_host=True) if group.fixed is None]
    return score_groups(model, groups, create_criterion(method), batches, loss)


def _slices(model, gradient_of):
    """Every coupled part of the channels of the first layer: its filters, and the weights that read them."""
    first, second = model[0].weight, model[2].weight
    return [
        (first.flatten(1), gradient_of(first).flatten(1)),
        (second.transpose(0, 1).flatten(1), gradient_of(second).transpose(0, 1).flatten(1)),
    ]


def test_taylor_tuned_sums_before_the_absolute_value(model, batches):
    scores = _scores("tp:taylor-tuned", model, batches)
    for batch in batches:
        _loss(model, batch).backward()
    parts = _slices(model, lambda weight: weight.grad)
    expected = sum((weight * gradient).sum(1).abs() for weight, gradient in parts).detach()
    assert torch.allclose(scores["0"], expected.double(), rtol=1e-5)


def test_group_norm_is_the_sum_of_squares(model, batches):
    expected = sum(weight.square().sum(1) for weight, _ in _slices(model, lambda weight: weight)).detach()
    assert torch.allclose(_scores("tp:group-norm", model, batches)["0"], expected.double(), rtol=1e-5)


def test_hessian_is_given_every_sample(model, batches):
    seen = []

    def loss(model, batch):
        seen.append(len(batch[0]))
        return _loss(model, batch)

    scores = _scores("tp:hessian", model, batches, loss)
    assert seen == [1] * 6
    # Of the samples accumulated the library keeps the last.
    images, labels = batches[-1]
    _loss(model, (images[-1:], labels[-1:])).backward()
    parts = _slices(model, lambda weight: weight.grad)
    raw = sum((weight.square() * gradient.square()).sum(1) for weight, gradient in parts).detach().double()
    assert torch.allclose(scores["0"], raw / raw.mean(), rtol=1e-4)


@pytest.mark.parametrize("form", [dict, list])
def test_samples_keep_the_form_of_the_minibatch(model, batches, form):
    def loss(model, batch):
        assert type(batch) in (dict, tuple)
        images, labels = batch.values() if form is dict else batch
        return F.cross_entropy(model(images), labels)

    shaped = [{"x": x, "y": y} if form is dict else [x, y] for x, y in batches]
    groups = [group for group in find_groups(model, batches[0][0], keep_host=True) if group.fixed is None]
    found = score_groups(model, groups, create_criterion("tp:hessian"), shaped, loss)
    assert torch.equal(found["0"], _scores("tp:hessian", model, batches)["0"])


def test_hessian_refuses_minibatches_without_samples(model, batches):
    def loss(model, batch):
        return _loss(model, batches[0])

    groups = [group for group in find_groups(model, batches[0][0], keep_host=True) if group.fixed is None]
    with pytest.raises(CriterionError, match="minibatches of tensors"):
        score_groups(model, groups, create_criterion("tp:hessian"), ["a"], loss)


def test_an_importance_that_needs_a_pruner_of_its_own_library_is_named(model, batches):
    with pytest.raises(CriterionError, match="OBDCImportance works in Torch-Pruning's own pruners alone"):
        plan_channels(model, batches[0][0], tp.importance.OBDCImportance(), batches, _loss, MACs(0.7))


def test_activations_recorded_before_drive_a_plan(model, batches):
    importance = tp.importance.ActivationImportance()
    with importance.compute_importance(model), torch.no_grad():
        model(batches[0][0])
    assert plan_channels(model, batches[0][0], importance, batches, _loss, MACs(0.7)).channels_removed > 0


def test_hessian_plans_one_shot_and_refuses_a_training_loop(model, batches):
    plan = plan_channels(model, batches[0][0], create_criterion("tp:hessian"), batches, _loss, MACs(0.7))
    assert plan.channels_removed > 0

    pruner = ChannelPruner(model, batches[0][0], create_criterion("tp:hessian"), MACs(0.7))
    loss = _loss(model, batches[0])
    loss.backward()
    pruner.on_backward(float(loss.detach()))
    with pytest.raises(CriterionError, match="gradient of every sample"):
        pruner.finish()
