"""Optimal Brain Surgeon on joint gates: what the plan carries, what it wins, what it refuses."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import Recipe, assert_same, networks, randomise, state_of
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nni_plugin
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.budgets import Channels, MACs
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.compensation import fold_factors
from nni_plugin.criteria import OBS, TaylorFO
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.networks.resnet import ResNet
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import plan_channels
from nni_plugin.schedules import Gradual, Iterative, OneShot

Batch = tuple[Tensor, Tensor]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits: 1,797 real images of 8 x 8."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def batches(number: int = 4, size: int = 64) -> list[Batch]:
    images, labels = digits()
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, number * size, size)]


def small_resnet() -> nn.Module:
    """A ResNet-8 trained on the digits for six epochs, in eval mode, float64."""
    torch.manual_seed(0)
    model = ResNet(1, num_classes=10, in_chans=1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in batches(28) * 6:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return small_resnet()


def mean_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(loss_of(model, batch)) for batch in batches()) / 4


def pruned(model: nn.Module, plan: PruningPlan) -> nn.Module:
    return plan.apply(copy.deepcopy(model), batches()[0][0])


def test_loses_less_than_ranking_one_by_one(resnet: nn.Module) -> None:
    losses = {}
    for name, criterion in {
        "obs": OBS(cost_aware=False),
        "order": OBS(cost_aware=False, compensate=False),
        "fo": TaylorFO(),
    }.items():
        plan = plan_channels(resnet, batches()[0][0], criterion, batches(), loss_of, Channels(0.7))
        losses[name] = mean_loss(pruned(resnet, plan)) - mean_loss(resnet)
    assert losses["obs"] < losses["order"] < losses["fo"]


def test_plan_carries_factors_and_keeps_them_in_json(resnet: nn.Module) -> None:
    plan = plan_channels(resnet, batches()[0][0], OBS(), batches(), loss_of, MACs(0.6))
    assert any(group.factors for group in plan.groups)
    assert PruningPlan.from_json(plan.to_json()) == plan
    parity = nni_plugin.verify(resnet, plan, batches()[0][0])
    assert parity.max_rel < 1e-12
    without = PruningPlan.from_json(plan.to_json())
    for group in without.groups:
        object.__setattr__(group, "factors", None)
    assert mean_loss(pruned(resnet, plan)) < mean_loss(pruned(resnet, without))


def test_model_is_unchanged_by_planning(resnet: nn.Module) -> None:
    before = state_of(resnet)
    plan_channels(resnet, batches()[0][0], OBS(), batches(), loss_of, MACs(0.6), schedule=Gradual(3), reestimate=True)
    assert_same(resnet, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet.modules())


def test_factors_of_several_steps_multiply(resnet: nn.Module) -> None:
    """The network that the pruner leaves masked and compensated is the one that the plan makes of the dense one."""
    model = copy.deepcopy(resnet)
    images = batches()[0][0]
    pruner = ChannelPruner(model, images, OBS(), MACs(0.6), schedule=Gradual(4, minibatches=2), cut="never")
    with pruner:
        while not pruner.done:
            for batch in batches():
                model.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                pruner.on_backward(float(loss.detach()))
                pruner.on_step()
    assert len(pruner.steps) == 4
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(pruned(resnet, pruner.plan())(images), expected, rtol=1e-9, atol=1e-9)
        pruner.cut()
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pruned(resnet, model.pruning_plan)(images), expected, rtol=1e-9, atol=1e-9)


def test_state_goes_on_with_the_same_plan(resnet: nn.Module) -> None:
    plans = []
    for interrupted in (False, True):
        model, images = copy.deepcopy(resnet), batches()[0][0]

        def make(model: nn.Module = model, images: Tensor = images) -> ChannelPruner:
            return ChannelPruner(model, images, OBS(), Channels(0.8), schedule=Iterative(20, 4), cut="end")

        pruner, weights = make(), {}
        for number, batch in enumerate(batches() * 9):
            if interrupted and number == 6:  # in the middle of the second window
                state, weights = pruner.state_dict(), copy.deepcopy(model.state_dict())
                pruner.close()
                model.load_state_dict(resnet.state_dict())
                pruner = make()
                pruner.load_state_dict(state)
                model.load_state_dict(weights)
            if pruner.done:
                break
            pruner.open()
            model.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            pruner.on_backward(float(loss.detach()))
            pruner.on_step()
        assert pruner.done
        plans.append(pruner.plan())
    assert plans[0] == plans[1]


def test_predicted_change_meets_the_measured_one(resnet: nn.Module) -> None:
    plan = plan_channels(
        resnet, batches()[0][0], OBS(linear=True), batches(), loss_of, Channels(0.95), schedule=OneShot()
    )
    (step,) = plan.provenance["steps"]
    assert plan.predicted_loss_change == step["predicted_loss_change"]
    measured = mean_loss(pruned(resnet, plan)) - mean_loss(resnet)
    assert step["loss_change"] == pytest.approx(measured, abs=1e-9)


class TwoBranches(nn.Module):
    """A branch of a grouped convolution beside a plain one of the same make; one of them hardly counts."""

    def __init__(self, grouped_counts: bool) -> None:
        super().__init__()

        def branch(groups: int) -> nn.Sequential:
            layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
            layers += [nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
            return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

        self.grouped, self.plain, self.grouped_counts = branch(4), branch(1), grouped_counts

    def forward(self, x: Tensor) -> Tensor:
        most, least = (self.grouped, self.plain) if self.grouped_counts else (self.plain, self.grouped)
        return most(x) + 0.01 * least(x)


@pytest.mark.parametrize("grouped_counts", [False, True])
def test_channels_that_leave_together_weigh_as_one(grouped_counts: bool) -> None:
    torch.manual_seed(0)
    model = TwoBranches(grouped_counts).double().eval()
    examples = batches(1)[0][0][:2].double()
    data = [(images.double(), labels) for images, labels in batches()]
    plan = plan_channels(model, examples, OBS(), data, loss_of, Channels(0.5))
    left = dict.fromkeys(("grouped", "plain"), 0)
    for name, kept in plan.kept().items():
        left[name.partition(".")[0]] += len(kept)
    idle, needed = (left["plain"], left["grouped"]) if grouped_counts else (left["grouped"], left["plain"])
    assert 28 < idle + needed <= 32
    assert idle <= 8
    assert needed >= 24


def test_cost_aware_needs_fewer_channels_for_the_same_macs(resnet: nn.Module) -> None:
    plans = {
        (own, asked): plan_channels(
            resnet, batches()[0][0], OBS(cost_aware=own), batches(), loss_of, MACs(0.7), cost_aware=asked
        )
        for own, asked in ((True, None), (False, True), (False, None))
    }
    assert plans[True, None].kept() == plans[False, True].kept()
    assert plans[True, None].channels_removed < plans[False, None].channels_removed


@pytest.mark.parametrize("schedule", [Gradual(3, minibatches=4), Iterative(20, 4)])
def test_plan_does_not_depend_on_when_channels_are_cut(resnet: nn.Module, schedule: Gradual | Iterative) -> None:
    plans = []
    for cut in ("never", "step"):
        model, images = copy.deepcopy(resnet), batches()[0][0]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        pruner = ChannelPruner(
            model, images, OBS(damping=0.1), Channels(0.75), schedule=schedule, cut=cut, optimizer=optimizer
        )
        with pruner:
            while not pruner.done:
                for batch in batches():
                    optimizer.zero_grad()
                    loss = loss_of(model, batch)
                    loss.backward()
                    pruner.on_backward(float(loss.detach()))
                    optimizer.step()
                    pruner.on_step()
                    if pruner.done:
                        break
        plans.append(pruner.plan())
    assert plans[0].kept() == plans[1].kept()
    for one, other in zip(plans[0].groups, plans[1].groups, strict=True):
        assert one.factors == pytest.approx(other.factors, abs=1e-6)


def test_weights_that_writers_share_get_no_factor() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 3), nn.Conv2d(6, 10, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x) + self.b(x))).flatten(1)

    torch.manual_seed(0)
    model = Shared().double().eval()
    plan = plan_channels(model, batches()[0][0], OBS(), batches(), loss_of, Channels(0.5))
    assert [group.factors for group in plan.groups] == [None]
    assert nni_plugin.verify(model, plan, batches()[0][0]).max_rel < 1e-12


class TiedLanguageModel(nn.Module):
    """Predicts by the embedding that it reads with: the head's weight has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(10, 6), nn.Linear(6, 8), nn.Linear(6, 10, bias=False)
        self.outer = nn.Linear(8, 6)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding((x.flatten(1)[:, 20] * 9).long())
        return self.head(x + self.outer(torch.tanh(self.inner(x))))


class TwoNames(nn.Module):
    """Each layer is a child under two names, and is one layer all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6 * 36, 10)
        self.body = nn.Sequential(self.first, self.norm, nn.ReLU(), nn.Flatten(), self.last)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def untrained() -> nn.Module:
    return ResNet(1, num_classes=10, in_chans=1)


@pytest.mark.parametrize(("network", "free"), [(untrained, 6), (TiedLanguageModel, 1), (TwoNames, 1)])
def test_a_factor_does_to_the_loss_what_its_gate_says(network: Callable[[], nn.Module], free: int) -> None:
    torch.manual_seed(0)
    model, batch = randomise(network()), batches(1)[0]
    groups = [group for group in find_groups(model, batch[0]) if group.fixed is None]
    obs = OBS()
    with obs.collect(model, groups):
        loss_of(model, batch).backward()
        obs.update(batch)
    checked = 0
    for group in groups:
        at = obs.gates_of(group)
        if not bool(obs.movable[at].all()):
            continue
        checked += 1
        for channel in range(0, group.width, 5):
            losses = []
            for step in (-1e-7, 1e-7):  # short: few activations cross zero
                moved, factors = copy.deepcopy(model), torch.ones(group.width, dtype=torch.float64)
                factors[channel] += step
                fold_factors(moved, [group], {group.name: factors})
                losses.append(float(loss_of(moved, batch).detach()))
            # Rows are of one sample's loss each, as the sum over samples has it.
            told = float(obs.rows[:, at][:, channel].mean())
            assert (losses[1] - losses[0]) / 2e-7 == pytest.approx(told, rel=1e-4, abs=1e-7)
    assert checked == free


@settings(max_examples=15, deadline=None)
@given(networks(), st.integers(0, 3))
def test_masked_is_compact_with_factors_on_random_networks(recipe: Recipe, seed: int) -> None:
    model = randomise(recipe.build(), seed).double().eval()
    images = torch.randn(12, 3, 8, 8, dtype=torch.float64)
    data = [(images, torch.randint(0, 3, (12,)))]
    groups = [group for group in find_groups(model, images) if group.fixed is None]
    if not groups:
        return
    plan = plan_channels(model, images, OBS(), data, loss_of, Channels(0.7))
    assert nni_plugin.verify(model, plan, images).max_rel < 1e-8


def test_as_importance_of_a_stock_pruner(resnet: nn.Module) -> None:
    model, images = copy.deepcopy(resnet), batches()[0][0]
    obs = OBS()
    groups = [group for group in find_groups(model, images) if group.fixed is None]
    with obs.collect(model, groups):
        for batch in batches():
            model.zero_grad()
            loss_of(model, batch).backward()
            obs.update()
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner = tp.pruner.BasePruner(
        model, images, importance=obs, global_pruning=True, pruning_ratio=0.3, ignored_layers=[model.fc]
    )
    pruner.step()
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.8 * before
    assert model(images).shape == (64, 10)


def collected(resnet: nn.Module, number: int, **settings: object) -> tuple[OBS, list[ChannelGroup]]:
    model = copy.deepcopy(resnet)
    groups = [group for group in find_groups(model, batches()[0][0]) if group.fixed is None]
    obs = OBS(**settings)
    with obs.collect(model, groups):
        for batch in batches(number):
            model.zero_grad()
            loss_of(model, batch).backward()
            obs.update(batch)
    return obs, groups


def test_holds_no_more_rows_than_it_may(resnet: nn.Module) -> None:
    """A part of a minibatch's rows would keep all of them in memory, and in the file of a run to go on with."""
    all_rows = collected(resnet, 2)[0].rows
    obs, _ = collected(resnet, 6, max_samples=80)
    assert torch.equal(obs.rows, all_rows[:80])
    state = collected(resnet, 6, max_samples=80)[0].state_dict()["gradients"]
    assert sum(rows.untyped_storage().nbytes() for rows in state) == 80 * all_rows.shape[1] * all_rows.element_size()


def test_order_is_of_the_costs_as_they_are(resnet: nn.Module) -> None:
    obs, groups = collected(resnet, 2)
    plain = [obs(group) for group in groups]
    obs.costs = {group.name: 1.0 + number for number, group in enumerate(groups)}
    assert not all(map(torch.equal, plain, [obs(group) for group in groups]))
    obs.costs = {}
    assert all(map(torch.equal, plain, [obs(group) for group in groups]))


def test_a_saved_state_alone_cannot_conclude(resnet: nn.Module) -> None:
    again = OBS()
    again.load_state_dict(collected(resnet, 1)[0].state_dict())
    with pytest.raises(CriterionError, match="not of which groups"):
        again.conclude({}, {})


def test_refuses_what_it_cannot_do(resnet: nn.Module) -> None:
    with pytest.raises(CriterionError, match="damping must be a number of at least 1e-08"):
        OBS(damping=0.0)
    with pytest.raises(CriterionError, match="divide_by_blocks"):
        plan_channels(resnet, batches()[0][0], OBS(), batches(), loss_of, Channels(0.7), divide_by_blocks=True)
    with pytest.raises(CriterionError, match=r"pass them to collect\(\)"), OBS().collect(resnet):
        pass
    obs = OBS()
    groups = [group for group in find_groups(resnet, batches()[0][0]) if group.fixed is None]
    with obs.collect(resnet, groups), pytest.raises(CriterionError, match="No gradient came"):
        obs.update()
    with pytest.raises(CriterionError, match="seen no minibatch"):
        obs(groups[0])
