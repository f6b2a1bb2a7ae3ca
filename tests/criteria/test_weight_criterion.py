"""What every criterion without data promises: which network it reads, when, and that it serves any pruner."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch_pruning as tp
from networks_at_random import Branches, assert_same, conv_bn, randomise, state_of
from torch import Tensor, nn

from nni_plugin import Channels, Iterative, MACs, plan_channels
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.criteria import BNScale, Criterion, GeometricMedian, Magnitude, Random
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

READERS: list[Callable[[], Criterion]] = [Magnitude, lambda: Magnitude(1, joint=False), BNScale, GeometricMedian]
ALL = [*READERS, Random]
IDS = ["magnitude", "magnitude-alone", "bn-scale", "geometric-median", "random"]


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)

    def block() -> nn.Module:
        return Branches("add", [nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *conv_bn(6, 8)), nn.Identity()], nn.ReLU())

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return randomise(nn.Sequential(*conv_bn(3, 8), nn.ReLU(), block(), block(), *head), seed)


def free(model: nn.Module, **options: Any) -> list[ChannelGroup]:
    return [group for group in find_groups(model, X, **options) if group.fixed is None]


def forbidden() -> Iterator[Any]:
    raise AssertionError("a minibatch was asked for")
    yield


def no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("the network was run")


@pytest.mark.parametrize("build", ALL, ids=IDS)
def test_no_minibatch_is_needed(build: Callable[[], Criterion]) -> None:
    model, criterion = residual().requires_grad_(False), build()
    needs = {name: getattr(criterion, name) for name in dir(criterion) if name.startswith("needs_")}
    assert len(needs) >= 4
    assert not any(needs.values()), needs
    before = state_of(model)
    with criterion.collect(model):
        for group in free(model):
            scores = criterion(group)
            assert (scores.dtype, scores.shape, scores.device.type) == (torch.float64, (group.width,), "cpu")
            assert not scores.requires_grad
            assert len(set(scores.tolist())) == group.width
        criterion.update()  # a training loop that does not know it may call it
        assert torch.equal(criterion(group), scores)
    assert_same(model, before)


@pytest.mark.parametrize("build", ALL, ids=IDS)
def test_plans_without_data(build: Callable[[], Criterion]) -> None:
    """The ranking is global: no removed channel scores above one that stays."""
    model = residual()
    before, groups = state_of(model), free(model)
    plan = plan_channels(model, X, build(), forbidden(), no_loss, Channels(0.6))
    assert_same(model, before)
    criterion = build()
    kept, gone = [], []
    with criterion.collect(model):
        for group in groups:
            stays = torch.zeros(group.width, dtype=torch.bool)
            stays[list(plan.kept()[group.name])] = True
            kept.append(criterion(group)[stays])
            gone.append(criterion(group)[~stays])
            if int(stays.sum()) == 1:  # the last channel of a group stays, whatever it is worth
                kept.pop()
    assert sum(len(scores) for scores in gone) == 8  # of 20
    assert float(torch.cat(gone).max()) < float(torch.cat(kept).min())


@pytest.mark.parametrize("build", ALL, ids=IDS)
def test_as_importance_of_a_stock_pruner(build: Callable[[], Criterion]) -> None:
    """Uniform halving by Torch-Pruning keeps the upper half of our scores in every group."""
    model = residual().float()
    dense, criterion = copy.deepcopy(model), build()
    halves = {}
    with criterion.collect(dense):
        for group in [group for group in find_groups(dense, X.float()) if group.fixed is None]:
            halves[group.name] = criterion(group).topk(group.width // 2).indices.sort().values
    pruner = tp.pruner.BasePruner(
        model, X.float(), importance=build(), pruning_ratio=0.5, ignored_layers=[model[-1]], global_pruning=False
    )
    pruner.step()
    assert set(halves) == {"0", "3.branches.0.0", "4.branches.0.0"}
    assert model(X.float()).shape == (2, 3)
    for name, half in halves.items():
        expected = dense.get_submodule(name).weight[half]
        if name != "0":
            expected = expected[:, halves["0"]]
        assert torch.equal(model.get_submodule(name).weight, expected)


@pytest.mark.parametrize("build", READERS, ids=IDS[:-1])
def test_a_stock_pruner_reads_the_weights_of_its_own_network(build: Callable[[], Criterion]) -> None:
    """Also after this object has served another network."""
    criterion, other, model = build(), residual(1), residual(2)
    with criterion.collect(other):
        pass
    graph = tp.DependencyGraph().build_dependency(model, X)
    host = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(8)))
    fresh = build()
    with fresh.collect(model):
        expected = fresh(free(model)[0])
    torch.testing.assert_close(criterion(host), expected, rtol=1e-14, atol=0)  # members come in another order
    hosted = next(group for group in free(model, keep_host=True) if group.name == "0")
    torch.testing.assert_close(criterion(hosted), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("build", READERS, ids=IDS[:-1])
def test_weights_are_read_when_scores_are_asked_for(build: Callable[[], Criterion]) -> None:
    model, criterion = residual(), build()
    group = free(model)[0]
    with criterion.collect(model):
        before = criterion(group)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        torch.testing.assert_close(criterion(group), 2 * before, rtol=1e-12, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(criterion(group), 4 * before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("build", READERS, ids=IDS[:-1])
def test_the_network_is_held_weakly_and_forgotten(build: Callable[[], Criterion]) -> None:
    model, criterion = residual(), build()
    group = free(model)[0]
    with pytest.raises(CriterionError, match="came without its network"):
        criterion(group)
    with criterion.collect(model):
        pass
    criterion(group)
    criterion.reset()
    with pytest.raises(CriterionError, match="came without its network"):
        criterion(group)
    with criterion.collect(model):
        pass
    del model
    gc.collect()
    with pytest.raises(CriterionError, match="came without its network"):
        criterion(group)


@pytest.mark.parametrize("build", READERS, ids=IDS[:-1])
def test_wrappers_and_half_precision(build: Callable[[], Criterion]) -> None:
    model, criterion = residual(), build()
    group = free(model)[0]
    with criterion.collect(model):
        expected = criterion(group)
    wrapped: Any = SimpleNamespace(module=copy.deepcopy(model).to(torch.bfloat16), device_ids=None)
    with criterion.collect(wrapped):
        torch.testing.assert_close(criterion(group), expected, rtol=0.02, atol=0)
        assert criterion(group).dtype == torch.float64


@pytest.mark.parametrize("build", READERS, ids=IDS[:-1])
def test_misuse_is_refused(build: Callable[[], Criterion]) -> None:
    model, criterion = residual(), build()
    group = free(model)[0]
    with criterion.collect(nn.ModuleDict({"a": nn.Linear(3, 3)})), pytest.raises(CriterionError, match="has no layer"):
        criterion(group)
    small = nn.Sequential(*conv_bn(3, 7), nn.ReLU(), *model[3:])
    with criterion.collect(small), pytest.raises(CriterionError, match=r"'[01]' has 7 channels"):
        criterion(group)
    with pytest.raises(CriterionError, match="inside"):
        criterion.update()
    with (
        criterion.collect(model),
        pytest.raises(CriterionError, match="collecting already"),
        criterion.collect(model),
    ):
        pass
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[1] = float("nan")
    with criterion.collect(model), pytest.raises(CriterionError, match="weights that are not finite"):
        criterion(group)


@pytest.mark.parametrize("build", ALL, ids=IDS)
def test_a_pruner_without_a_training_loop(build: Callable[[], Criterion]) -> None:
    """`finish()` at once: nothing has run, and the network is cut by its weights as they are."""
    model = residual()
    plan = plan_channels(model, X, build(), [], no_loss, MACs(0.5))
    pruner = ChannelPruner(model, X, build(), MACs(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pruner.finish().kept() == plan.kept()
    assert pruner.parity is not None
    assert pruner.parity.ok


@pytest.mark.parametrize("build", READERS, ids=IDS[:-1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masked_and_cut_networks_end_in_the_same_plan(build: Callable[[], Criterion], momentum: float) -> None:
    """Weights change by training between steps, alike in both; gradients of what is removed are nothing."""
    plans = {}
    for cut in ("end", "step"):
        model = residual()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        schedule = Iterative(channels=2, minibatches=1, momentum=momentum)
        pruner: Any = ChannelPruner(
            model,
            X,
            build(),
            Channels(0.5),
            schedule=schedule,
            cut=cut,
            optimizer=optimizer,  # type: ignore[arg-type]
        )
        with pruner:
            while not pruner.done:
                optimizer.zero_grad()
                loss = model(X).square().sum()
                loss.backward()
                pruner.on_backward(float(loss.detach()))
                optimizer.step()
                pruner.on_step()
        plans[cut] = pruner.plan()
        assert len(pruner.steps) == 5
    assert plans["end"].kept() == plans["step"].kept()
