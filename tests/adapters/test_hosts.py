"""Every built-in method through its own host: the budget holds, the network given is left alone, the result trains."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hosted import EXAMPLES, loss, minibatches, network
from torch import nn

from nni_plugin import Channels, MACs, Params
from nni_plugin.adapters.hosts import is_built_in, output_layers, through_host
from nni_plugin.adapters.nni.importance import IMPORTANCES as OF_NNI
from nni_plugin.adapters.torch_pruning import host_pruner
from nni_plugin.adapters.torch_pruning.importance import IMPORTANCES as OF_TORCH_PRUNING
from nni_plugin.budgets import Latency, Layers
from nni_plugin.cost import count
from nni_plugin.errors import BudgetError, CriterionError, DataError, GraphError

METHODS = (*OF_TORCH_PRUNING, *OF_NNI)


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch-Pruning's are 400; a network of 56 coupled channels has not that many."""
    monkeypatch.setattr(host_pruner, "STEPS", 100)


def pruned(method: str, budget: Any = None, **options: Any) -> Any:
    model = options.pop("model", None) or network()
    batches = options.pop("batches", None) or minibatches()
    return through_host(model, EXAMPLES, method, budget or MACs(0.5), batches, loss, **options)


def widths(model: nn.Module) -> dict[str, int]:
    return {path: layer.out_channels for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    model = network()
    model.layer1[0].conv1.weight.requires_grad_(False)
    model.fc.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, random = list(model.parameters()), torch.random.get_rng_state()
    result = pruned(method, model=model)

    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [p.grad is not None for p in parameters] == [p is model.fc.weight for p in parameters]
    assert not parameters_shared(model, result.model)
    assert hooks(model) == hooks(result.model) == 0
    assert type(model.conv1) is nn.Conv2d

    dense, slim = count(model, EXAMPLES), count(result.model, EXAMPLES)
    assert 0.43 * dense.macs < slim.macs <= 0.5 * dense.macs
    assert result.settings["ratio"] == slim.macs / dense.macs
    assert json.loads(json.dumps(result.settings)) == result.settings
    assert result.settings["host"] == {"tp": "torch-pruning", "nni": "nni"}[method.partition(":")[0]]
    assert result.model.fc.out_features == model.fc.out_features

    assert result.model.training
    assert result.model.layer1.training
    assert not result.model.fc.training
    assert all(p.grad is None for p in result.model.parameters())
    loss(result.model, minibatches()[0]).backward()
    frozen = {name for name, p in result.model.named_parameters() if p.grad is None}
    assert frozen == {"layer1.0.conv1.weight"}


def parameters_shared(one: nn.Module, other: nn.Module) -> bool:
    places = {p.data_ptr() for p in one.parameters()}
    return any(p.data_ptr() in places for p in other.parameters())


@pytest.mark.parametrize("method", ["tp:magnitude", "nni:l1"])
def test_parameters(method: str) -> None:
    model = network()
    slim = count(pruned(method, Params(0.4), model=model).model, EXAMPLES).params
    assert 0.3 * count(model, EXAMPLES).params < slim <= 0.4 * count(model, EXAMPLES).params


@pytest.mark.parametrize("method", ["tp:magnitude", "nni:l1"])
def test_nothing_has_to_go(method: str) -> None:
    result = pruned(method, MACs(1.0))
    assert result.settings["ratio"] == 1.0
    assert widths(result.model) == widths(network())


@pytest.mark.parametrize("method", ["tp:magnitude", "nni:l2"])
def test_layers_to_ignore_keep_their_width(method: str) -> None:
    dense, slim = widths(network()), widths(pruned(method, MACs(0.6), ignore=["layer2"]).model)
    assert {path for path in dense if path.startswith("layer2.") and slim[path] != dense[path]} == set()
    assert slim["layer3.0.conv1"] < dense["layer3.0.conv1"]


def test_seeds_are_those_of_random() -> None:
    first, again, other = (pruned("tp:random", seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(value.shape != other[name].shape or not torch.equal(value, other[name]) for name, value in first.items())


def test_channels_are_ranked_together_as_the_name_ends() -> None:
    dense = widths(network())
    whole, alike, alone = (pruned(f"tp:magnitude{ending}") for ending in ("", "-isomorphic", "-local"))
    for result, together in ((whole, (True, False)), (alike, (True, True)), (alone, (False, False))):
        assert (result.settings["global_pruning"], result.settings["isomorphic"]) == together
    # Ranked alone, every layer loses the same share, up to what is less than a channel.
    left = 1 - alone.settings["steps"] / host_pruner.STEPS
    assert widths(alone.model) == {path: int(width * left) for path, width in dense.items()}
    assert len({width / dense[path] for path, width in widths(whole.model).items()}) > 2
    assert len({str(widths(result.model)) for result in (whole, alike, alone)}) == 3


def test_in_eval_mode_too() -> None:
    assert not pruned("tp:magnitude", model=network().eval()).model.training


@pytest.mark.parametrize(
    ("model", "classifier"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)), ("3",)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)), ("2",)),
        # As wide as the output, and not the classifier.
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4)), ("3",)),
    ],
)
def test_the_classifier_is_what_writes_the_output(model: nn.Module, classifier: tuple[str, ...]) -> None:
    assert output_layers(model, EXAMPLES) == classifier


def test_what_is_built_in() -> None:
    assert all(map(is_built_in, METHODS))
    assert not is_built_in("taylor-fo")


@pytest.mark.parametrize("budget", [Latency(0.5), Channels(0.5), Layers(1)])
@pytest.mark.parametrize("method", ["tp:magnitude", "nni:l1"])
def test_budgets_that_no_host_knows(method: str, budget: Any) -> None:
    with pytest.raises(BudgetError, match="MACs or Params alone"):
        pruned(method, budget)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("taylor-fo", CriterionError, "begin with tp: or nni:"),
        ("tp:taylr", CriterionError, "Unknown method 'tp:taylr'.*tp:taylor"),
        ("nni:agp", CriterionError, "Unknown method 'nni:agp'.*nni:taylor"),
    ],
)
def test_unknown_methods(method: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pruned(method)


def test_other_bad_input() -> None:
    with pytest.raises(GraphError, match="conv9"):
        pruned("tp:magnitude", ignore=["conv9"])
    with pytest.raises(CriterionError, match="seed must be an integer"):
        pruned("tp:random", seed=-1)
    with pytest.raises(DataError, match="no minibatch"):
        through_host(network(), EXAMPLES, "tp:taylor", MACs(0.5), [], loss)


@pytest.mark.parametrize("method", ["tp:magnitude", "nni:l1"])
def test_what_cannot_be_reached_is_said(method: str) -> None:
    with pytest.raises(BudgetError, match=r"(kept|keeps) 0\.\d+ of the MACs, 0.5 was asked"):
        pruned(method, ignore=["layer1", "layer2"])
