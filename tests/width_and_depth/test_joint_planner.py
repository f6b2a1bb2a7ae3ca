"""Channels and blocks leave together, the budget holds on the slim network, and the order is the exact one."""

import copy
import random
from typing import Any

import latency_by_macs
import pytest
import timm
import torch
import torch.nn.functional as F
from networks_at_random import assert_same, randomise, state_of
from torch import Tensor, nn

from nni_plugin import (
    Channels,
    Latency,
    Layers,
    MACs,
    Params,
    PruningPlan,
    count,
    marginal_cost,
    plan_jointly,
    reestimate_batchnorm,
)
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.budgets import Size
from nni_plugin.cost import Cost
from nni_plugin.criteria import OBS, quadratic
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import BudgetError, CriterionError, GraphError, ScheduleError
from nni_plugin.layers import removable_blocks
from nni_plugin.layers.block_gate import block_gate_gradients
from nni_plugin.layers.latency import BlockLatency
from nni_plugin.marginal_cost import MarginalCost, shares
from nni_plugin.networks import resnet20, vgg19_bn

X = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def resnet() -> nn.Module:
    return randomise(resnet20(width_mult=0.25))


def planned(model: nn.Module, data: Any, budget: Any, **options: Any) -> PruningPlan:
    """Plan with cross-entropy, by default in one step with savings weighed fully."""
    return plan_jointly(model, X, data, cross_entropy, budget, **{"steps": 1, "cost_powers": [1.0], **options})


def batches(number: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(20) % 10
    return [(torch.randn(20, 3, 16, 16, dtype=torch.float64, generator=generator), labels) for _ in range(number)]


class TestOrder:
    """A gate that holds others is taken alone, and takes them along."""

    def rows(self) -> Tensor:
        return torch.randn(200, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def brute(self, holds: dict[int, list[int]], costs: Tensor, damping: float) -> list[int]:
        """Remove one by one, each time solving for the best values of the free gates from scratch."""
        rows = self.rows()
        hessian = rows.T @ rows / len(rows)
        hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
        shift = torch.zeros(12, dtype=torch.float64)  # of the gates, from 1
        fixed: list[int] = []
        order: list[int] = []
        while len(fixed) < 12:
            free = [i for i in range(12) if i not in fixed]
            inverse = torch.linalg.inv(hessian[free][:, free])
            price = (1 + shift[free]).square() / (2 * inverse.diagonal()) / costs[free]
            m = int(price.argmin())
            shift[free] -= inverse[:, m] * (1 + shift[free][m]) / inverse[m, m]
            order.append(free[m])
            fixed += [free[m], *(i for i in holds.get(free[m], []) if i not in fixed)]
        return order

    @pytest.mark.parametrize("low_rank", [False, True])
    @pytest.mark.parametrize("holds", [{}, {10: [0, 1, 2], 11: [5, 6]}])
    def test_is_that_of_solving_anew(
        self, holds: dict[int, list[int]], low_rank: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if low_rank:
            monkeypatch.setattr(quadratic, "DENSE", 0)
        costs = torch.linspace(1, 2, 12, dtype=torch.float64)
        costs[10:] = 4.0
        tensors = {gate: torch.tensor(inside) for gate, inside in holds.items()}
        order = quadratic.removal_order(self.rows(), 0.1, costs, holds=tensors).tolist()
        assert order == self.brute(holds, costs, 0.1)
        for gate, inside in holds.items():
            assert not set(order[order.index(gate) :]) & set(inside)


@pytest.mark.parametrize("budget", [MACs(0.6), MACs(0.3), Params(0.5)])
def test_a_counted_budget_is_met(budget: MACs | Params) -> None:
    model = resnet()
    before = state_of(model)
    plan = planned(model, batches(), budget, steps=2)
    assert_same(model, before)
    value = budget.value(Size(plan.cost_after or Cost(0, 0), 0))
    assert value <= budget.limit(Size(count(model, X), 0))
    slim = plan.apply(copy.deepcopy(model), X)
    assert count(slim, X) == plan.cost_after
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert plan.predicted_loss_change is not None
    assert len(plan.provenance["steps"]) == 2
    F.cross_entropy(slim.train()(X), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


def test_a_block_that_does_nothing_leaves_first() -> None:
    """Its gate has no gradient at all, so that it costs nothing; channels of the rest stay."""
    model = resnet()
    with torch.no_grad():
        model.layer2[1].bn2.weight.zero_()  # type: ignore[index,union-attr]
        model.layer2[1].bn2.bias.zero_()  # type: ignore[index,union-attr]
    without = count(PruningPlan((), ("layer2.1",)).apply(copy.deepcopy(model), X), X).macs
    budget = MACs(round(without / count(model, X).macs + 1e-4, 4))
    plan = planned(model, batches(), budget)
    assert plan.removed_blocks == ("layer2.1",)
    assert plan.channels_removed == 0
    assert plan.predicted_loss_change == pytest.approx(0.0, abs=1e-20)
    slim = plan.apply(copy.deepcopy(model), X)
    torch.testing.assert_close(slim.eval()(X), model.eval()(X), rtol=0, atol=0)


def test_channels_inside_a_block_that_leaves_are_not_named() -> None:
    plan = planned(resnet(), batches(), MACs(0.3))
    assert plan.removed_blocks
    for group in plan.groups:
        assert not any(group.name.startswith(f"{block}.conv1") for block in plan.removed_blocks)


def test_without_any_weight_on_savings_blocks_stay() -> None:
    cheap = planned(resnet(), batches(), MACs(0.7), cost_powers=[0.0])
    dear = planned(resnet(), batches(), MACs(0.7))
    assert len(cheap.removed_blocks) <= len(dear.removed_blocks)
    assert cheap.channels_removed > 0


def test_names_are_those_of_the_network_as_it_is() -> None:
    """A network that has lost a block: its layers are numbered anew, and layers to ignore are named by that."""
    model = PruningPlan((), ("layer1.0",)).apply(resnet(), X)
    fresh = copy.deepcopy(model)
    del fresh.pruning_plan
    ignored = {"ignore": ["conv1", "layer1.0", "layer2", "layer3.0", "layer3.1"]}
    texts = []
    for network in (model, fresh):
        with pytest.raises(BudgetError, match=r"can leave .* remain") as caught:
            planned(network, batches(), MACs(0.7), **ignored)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    plans = [planned(network, batches(), MACs(0.9), **ignored) for network in (model, fresh)]
    assert plans[0].groups == plans[1].groups
    assert plans[0].removed_blocks == plans[1].removed_blocks
    assert plans[0].cost_after.macs <= 0.9 * plans[0].cost_before.macs  # type: ignore[union-attr]


def test_a_path_whose_loss_is_not_finite_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([1.0, float("nan")])
    monkeypatch.setattr("nni_plugin.width_and_depth.search.Search.settled_loss", lambda *_: next(given))
    plan = planned(resnet(), batches(), MACs(0.6), cost_powers=(1.0, 0.5))
    assert plan.provenance["settled_losses"] == {"1.0": 1.0, "0.5": None}
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_the_network_that_loses_least_is_taken() -> None:
    model, powers = resnet(), (1.0, 0.5, 0.0)
    each = [planned(model, batches(), MACs(0.5), cost_powers=[p]) for p in powers]
    both = planned(model, batches(), MACs(0.5), cost_powers=powers)
    losses = []
    for plan in each:
        slim = plan.apply(copy.deepcopy(model), X).eval()
        reestimate_batchnorm(slim, batches(), cross_entropy)
        with torch.no_grad():
            losses.append(sum(float(cross_entropy(slim, batch)) for batch in batches()) / len(batches()))
    assert list(both.provenance["settled_losses"].values()) == pytest.approx(losses, rel=1e-9)
    assert both.digest == each[losses.index(min(losses))].digest


def test_the_factors_are_the_best_values_of_the_gates() -> None:
    """They solve the damped least-squares problem over all gates that stay, blocks that leave among the rest."""
    model, data, damping = resnet(), batches(), 0.1
    plan = planned(model, data, MACs(0.6), damping=damping)
    assert plan.removed_blocks
    groups = [group for group in find_groups(model, X) if group.fixed is None]
    blocks = removable_blocks(model, X)
    criterion = OBS()
    with criterion.collect(model, groups):
        for batch in data:
            model.zero_grad()
            cross_entropy(model, batch).backward()
            criterion.update()
    rows = torch.cat([criterion.rows.double(), block_gate_gradients(model, blocks, data, cross_entropy)], 1)
    kept, names = plan.kept(), [group.name for group in groups]
    leaves = [i not in kept[group.name] if group.name in kept else None for group in groups for i in range(group.width)]
    leaves += [block.name in plan.removed_blocks for block in blocks]
    gone = torch.tensor([leaf is True for leaf in leaves])
    # Gates inside a block that leaves mean nothing, those of blocks that stay take no factor: both stay as they are.
    free = torch.tensor([leaf is False for leaf in leaves])
    free[-len(blocks) :] = False
    hessian = rows.T @ rows / len(rows)
    alive = int((rows != 0).any(0).sum())  # those without any gradient do not count in the mean
    hessian += damping * hessian.trace() / alive * torch.eye(len(hessian), dtype=torch.float64)
    factors = torch.ones(len(hessian), dtype=torch.float64)
    factors[free] += torch.linalg.solve(hessian[free][:, free], hessian[free][:, gone].sum(1))
    firsts = dict(zip(names, torch.tensor([0, *(g.width for g in groups)]).cumsum(0).tolist(), strict=False))
    for group in plan.groups:
        expected = factors[firsts[group.name] + torch.tensor(group.kept)]
        torch.testing.assert_close(torch.tensor(group.factors, dtype=torch.float64), expected, rtol=1e-6, atol=1e-9)
    assert any(group.factors and max(abs(f - 1) for f in group.factors) > 1e-3 for group in plan.groups)


def test_a_latency_is_met_on_the_slim_network(monkeypatch: pytest.MonkeyPatch) -> None:
    latency_by_macs.use(monkeypatch)
    monkeypatch.setattr(marginal_cost, "measure_pair", latency_by_macs.measure_pair)
    model = resnet()
    plan = planned(model, batches(), Latency(0.6), steps=2)
    left = latency_by_macs.milliseconds(plan.apply(copy.deepcopy(model), X), (3, 16, 16))
    assert left <= 0.6 * latency_by_macs.milliseconds(model, (3, 16, 16))
    assert plan.provenance["latency"]["ratio"] <= 0.6
    with pytest.raises(BudgetError, match="remain"):
        planned(model, batches(), Latency(0.01))


class TestMarginalCost:
    def test_counts(self) -> None:
        model = resnet()
        groups = [group for group in find_groups(model, X) if group.fixed is None]
        blocks = removable_blocks(model, X)
        cost = MarginalCost(model, X, groups, blocks, MACs(0.5))
        whole = count(model, X).macs
        for block in blocks:
            slim = PruningPlan((), (block.name,)).apply(copy.deepcopy(model), X)
            assert cost.blocks[block.name] == whole - count(slim, X).macs
        inner = next(group for group in groups if group.name == "layer1.0.conv1")
        assert cost.channels[inner.name] == 2 * 9 * 4 * 16 * 16  # 3 x 3 x 4 in and out, on 16 x 16 positions
        assert cost.channels.keys() == {group.name for group in groups}

    def test_a_channel_has_its_share_of_its_layers(self) -> None:
        model = resnet()
        groups = [group for group in find_groups(model, X) if group.fixed is None]
        times = {"layer1.0.conv1": 8.0, "layer1.0.bn1": 2.0, "layer1.0.conv2": 4.0}
        found = shares(model, groups, times)
        assert found["layer1.0.conv1"] == pytest.approx((8 + 2 + 4) / 4)  # 4 channels
        residual = next(group for group in groups if group.residual and group.width == 4)
        assert found[residual.name] == pytest.approx((8 + 4) / 4)

    def test_milliseconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fixed(_: Any, __: Any, blocks: Any, **___: Any) -> dict[str, BlockLatency]:
            return {b.name: BlockLatency(1, 3.0, 0.0, 1.0, 1, "cpu", "float32", 1, 0.1) for b in blocks}

        monkeypatch.setattr(marginal_cost, "block_latencies", fixed)
        monkeypatch.setattr(marginal_cost, "measure_pair", latency_by_macs.measure_pair)
        model = resnet()
        groups = [group for group in find_groups(model, X) if group.fixed is None]
        cost = MarginalCost(model, X, groups, removable_blocks(model, X), Latency(0.5))
        assert set(cost.blocks.values()) == {3.0}
        assert all(0 < value < 10 for value in cost.channels.values())


class Grouped(nn.Module):
    """Two residual blocks of grouped convolutions behind group normalisations, which overwrite what they give."""

    def __init__(self) -> None:
        super().__init__()

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv1, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
                self.act, self.conv2 = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, groups=2)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.conv2(self.act(self.norm(self.conv1(x))))

        self.stem, self.blocks = nn.Conv2d(3, 8, 3), nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def test_tied_channels_and_blocks_of_a_network_that_overwrites() -> None:
    torch.manual_seed(0)
    model = Grouped().double().eval()
    data = [(X[:2], torch.tensor([0, 1])), (X[:2] + 1, torch.tensor([2, 1]))]
    dense = count(model, X).macs
    for ratio in (0.7, 0.4):
        plan = plan_jointly(model, X, data, cross_entropy, MACs(ratio), steps=2)
        slim = plan.apply(copy.deepcopy(model), X)
        assert count(slim, X).macs <= ratio * dense
        assert plan.removed_blocks or any(len(kept) < 8 for kept in plan.kept().values())


def test_blocks_to_ignore_stay() -> None:
    kept = ("layer1.0", "layer2.1.conv1")
    plan = planned(resnet(), batches(), MACs(0.4), ignore=kept)
    assert not {"layer1.0", "layer2.1"} & set(plan.removed_blocks)
    one = planned(resnet(), batches(), MACs(0.4), ignore="layer1.0")  # a name is no list of letters
    assert "layer1.0" not in one.removed_blocks
    assert "layer2.1.conv1" not in plan.kept()


def test_rows_of_channels_and_blocks_are_of_the_same_samples() -> None:
    """Minibatches that come in another order each time: a pass of its own for each kind of gate would mix them up."""

    class Shuffled:
        def __init__(self) -> None:
            self.draw = random.Random(0)

        def __iter__(self) -> Any:
            given = batches(6)
            self.draw.shuffle(given)
            return iter(given)

    model = resnet()
    plan = planned(model, Shuffled(), MACs(0.6), damping=0.1)
    same = planned(model, batches(6), MACs(0.6), damping=0.1)
    assert plan.removed_blocks == same.removed_blocks
    assert plan.kept() == same.kept()
    assert plan.predicted_loss_change == pytest.approx(same.predicted_loss_change, rel=1e-9)


class TestOtherNetworks:
    def vit(self) -> nn.Module:
        torch.manual_seed(0)
        options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 10}
        return timm.create_model("vit_tiny_patch16_224", depth=3, **options).double().eval()

    @pytest.mark.parametrize(("ratio", "candidates"), [(0.6, "outermost"), (0.3, "all"), (0.5, "innermost")])
    def test_transformer(self, ratio: float, candidates: Any) -> None:
        plan = planned(self.vit(), batches(), MACs(ratio), steps=3, cost_powers=(1.0, 0.0), candidates=candidates)
        removed = plan.removed_blocks
        assert not any(a != b and a.startswith(f"{b}.") for a in removed for b in removed)
        slim = plan.apply(self.vit(), X)
        assert count(slim, X) == plan.cost_after
        assert slim(X).shape == (2, 10)

    def test_units_of_a_plain_network_stay(self) -> None:
        model = randomise(vgg19_bn(width_mult=0.125))
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        data = [(torch.randn(10, 3, 32, 32, dtype=torch.float64), torch.arange(10))]
        plan = plan_jointly(model, x, data, cross_entropy, MACs(0.3), steps=3, cost_powers=[1.0])
        assert not plan.removed_blocks
        assert plan.channels_removed


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (BudgetError, "both leave", {"budget": Channels(0.5)}),
        (BudgetError, "both leave", {"budget": Layers(1)}),
        (BudgetError, "remain", {"budget": MACs(0.001)}),
        (BudgetError, "both leave", {"budget": 0.5}),
        (CriterionError, "batch", {"batches": []}),
        (CriterionError, "loss is nan", {"batches": [(X * float("nan"), torch.tensor([0, 1]))]}),
        (CriterionError, "damping", {"damping": -1.0}),
        (BudgetError, "cost_powers", {"cost_powers": ["x"]}),
        (BudgetError, "cost_powers", {"cost_powers": []}),
        (ScheduleError, "steps", {"steps": 0}),
        (GraphError, "'layer9'", {"ignore": ["layer9"]}),
    ],
)
def test_bad_input(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    model = resnet()
    before = state_of(model)
    given = {"batches": batches(1), "budget": MACs(0.5), **arguments}
    with pytest.raises(error, match=match):
        planned(model, given.pop("batches"), given.pop("budget"), **given)
    assert_same(model, before)
