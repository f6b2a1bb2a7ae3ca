"""Methods by name: each one prunes to the budget, and a wrong name brings the closest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nni_plugin import MACs, plan_channels
from nni_plugin.adapters.torch_pruning.importance import IMPORTANCES
from nni_plugin.criteria import Criterion
from nni_plugin.errors import CriterionError
from nni_plugin.methods import METHODS, create_criterion

NAMES = [*METHODS, *IMPORTANCES]


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def _plan(method):
    torch.manual_seed(1)
    batches = [(torch.randn(8, 3, 6, 6), torch.randint(4, (8,))) for _ in range(2)]
    network = _network().eval()
    with torch.no_grad():  # distinct scales, by which bn-scale ranks
        for layer in network:
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.1, 2)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    return plan_channels(network, batches[0][0], create_criterion(method), batches, loss, MACs(0.5))


@pytest.mark.parametrize("method", NAMES)
def test_every_method_meets_the_budget(method):
    plan = _plan(method)
    assert plan.channels_removed > 0
    assert plan.cost_after.macs <= 0.5 * plan.cost_before.macs


@pytest.mark.parametrize("method", NAMES)
def test_every_method_repeats(method):
    assert _plan(method).digest == _plan(method).digest


def test_methods_are_not_one_and_the_same():
    assert len({_plan(method).digest for method in NAMES}) >= len(NAMES) / 2


def test_names_by_contract():
    assert {"taylor-fo", "taylor-fo-weight"} <= set(METHODS)
    assert all(name.startswith("tp:") for name in IMPORTANCES)
    assert {"tp:magnitude", "tp:taylor", "tp:random"} <= set(IMPORTANCES)
    assert not set(METHODS) & set(IMPORTANCES)


@pytest.mark.parametrize("method", NAMES)
def test_each_call_builds_a_criterion_of_its_own(method):
    first, second = create_criterion(method), create_criterion(method)
    assert first is not second
    assert isinstance(first, Criterion) == (not method.startswith("tp:"))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("tailor-fo", "taylor-fo"),
        ("taylor_fo", "taylor-fo"),
        ("tp:magnitud", "tp:magnitude"),
        ("TAYLOR-FO", "taylor-fo"),
    ],
)
def test_unknown_name(wrong, meant):
    with pytest.raises(CriterionError, match=f"{wrong!r}.*{meant}"):
        create_criterion(wrong)


def test_unlike_any_name_lists_them_all():
    with pytest.raises(CriterionError) as caught:
        create_criterion("zzzz")
    assert all(name in str(caught.value) for name in NAMES)
