"""`score_groups`: the scores that a planner would rank by, and a network that is as it was."""

import pytest
import torch
import torch.nn.functional as F
from networks_at_random import assert_same, state_of
from torch import nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import TaylorFO
from nni_plugin.errors import CriterionError
from nni_plugin.methods import create_criterion, known_methods
from nni_plugin.planner import score_groups

METHODS = [name for name in known_methods() if name not in ("taylor-fo-weight-sum", "nni:level")]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 5, 2), nn.BatchNorm2d(5),
        nn.ReLU(), nn.Flatten(), nn.Linear(5, 3),
    ).train()  # fmt: skip
    with torch.no_grad():
        for layer in (model[1], model[5]):
            layer.weight.uniform_(0.5, 1.5)
    _loss(model, (torch.randn(4, 3, 4, 4), torch.randint(3, (4,)))).backward()
    return model


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 4, 4), torch.randint(3, (4,))) for _ in range(2)]


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _groups(model, *, keep_host=False):
    found = find_groups(model, torch.zeros(1, 3, 4, 4), keep_host=keep_host)
    return [group for group in found if group.fixed is None]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_every_channel_and_leaves_no_trace(model, batches, method):
    groups, before = _groups(model, keep_host=True), state_of(model)
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    gradients = [parameter.grad for parameter in model.parameters()]
    scores = score_groups(model, groups, create_criterion(method), batches, _loss)
    assert {name: len(score) for name, score in scores.items()} == {"0": 6, "4": 5}
    assert all(score.dtype == torch.float64 and bool(torch.isfinite(score).all()) for score in scores.values())
    assert_same(model, before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is kept for parameter, kept in zip(model.parameters(), gradients, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_is_what_the_criterion_gives_by_hand(model, batches):
    groups = _groups(model)
    scores = score_groups(model, groups, TaylorFO(), batches, _loss)
    model.eval()
    criterion = TaylorFO()
    with criterion.collect(model, groups):
        for batch in batches:
            model.zero_grad()
            _loss(model, batch).backward()
            criterion.update()
    for group in groups:
        assert torch.equal(scores[group.name], criterion(group).double())


def test_what_was_collected_stays_for_predictions(model, batches):
    groups, criterion = _groups(model), create_criterion("taylor-fisher")
    scores = score_groups(model, groups, criterion, batches, _loss)
    again = score_groups(model, groups, criterion, batches, _loss)  # and does not count twice
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert criterion.minibatches == len(batches)
    assert all(criterion.loss_changes(group).shape == (group.width,) for group in groups)


def test_groups_that_a_stock_importance_skips_are_left_out(model, batches):
    class First:
        needs_gradients = False

        def __call__(self, group):
            return torch.arange(6.0) if len(group[0].idxs) == 6 else None

    assert list(score_groups(model, _groups(model, keep_host=True), First(), (), _loss)) == ["0"]


def test_no_batch_and_a_failing_loss(model, batches):
    before = state_of(model)
    with pytest.raises(CriterionError, match="no batch"):
        score_groups(model, _groups(model), TaylorFO(), [], _loss)
    with pytest.raises(CriterionError, match="must return a scalar"):
        score_groups(model, _groups(model), TaylorFO(), batches, lambda model, batch: model(batch[0]))

    def broken(model, batch):
        raise RuntimeError("broken")

    criterion = TaylorFO()
    with pytest.raises(RuntimeError, match="broken"):
        score_groups(model, _groups(model), criterion, batches, broken)
    assert_same(model, before)
    assert model.training
    score_groups(model, _groups(model), criterion, batches, _loss)  # it is not collecting any more


def test_a_criterion_without_data_reads_no_batch(model):
    def unread():
        raise AssertionError("read a minibatch")
        yield

    assert set(score_groups(model, _groups(model), create_criterion("magnitude"), unread(), _loss)) == {"0", "4"}
