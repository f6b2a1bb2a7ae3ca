"""From a network to a plan: within the budget as counted, and the network that was evaluated is the one pruned."""

import copy

import pytest
import torch
from networks_at_random import assert_same, conv_bn, state_of
from search_task import EXAMPLE, QUICK, batches, digits, hooks_on, loss_of, planner, small_resnet
from torch import nn

from nni_plugin import MACs, Params, PruningPlan, count, verify
from nni_plugin.adapters.torch_pruning import Parity
from nni_plugin.budgets import Channels
from nni_plugin.errors import BudgetError, DataError, GraphError, SurgeryError
from nni_plugin.networks import mobilenetv2_cifar
from nni_plugin.performance import SearchOptions, plan_performance
from nni_plugin.performance.choose import choose

HELD_OUT = batches(600, 4)


def plan_of(model: nn.Module, budget: MACs | Params, held_out=None, **options) -> PruningPlan:
    chosen = SearchOptions(**{**QUICK, **options})
    return plan_performance(model, EXAMPLE, batches(), loss_of, budget, held_out=held_out, options=chosen)


@pytest.mark.parametrize("mode", ["full", "gates-only", "linear"])
@pytest.mark.parametrize("budget", [MACs(0.6), Params(0.55)])
def test_within_the_budget_as_counted(mode: str, budget: MACs | Params) -> None:
    model = small_resnet().train()
    before = state_of(model)
    plan = plan_of(model, budget, HELD_OUT, mode=mode)
    assert_same(model, before)
    assert model.training
    assert hooks_on(model) == 0
    slim = plan.apply(copy.deepcopy(model), EXAMPLE)
    counted, dense = count(slim, EXAMPLE), count(model, EXAMPLE)
    assert plan.cost_after == counted
    assert plan.cost_before == dense
    ratio = counted.macs / dense.macs if isinstance(budget, MACs) else counted.params / dense.params
    assert budget.ratio - 0.01 < ratio <= budget.ratio
    assert PruningPlan.from_json(plan.to_json()).digest == plan.digest
    names = {"full": "nppm", "gates-only": "differentiable-gates", "linear": "nppm-linear"}
    assert plan.provenance["method"] == names[mode]
    assert "layer1.0.conv1" in plan.explain()
    assert verify(model, plan, EXAMPLE).ok


def test_evaluated_is_pruned_is_saved() -> None:
    model = small_resnet()
    searched = planner(model, candidates=6)
    searched.search.run(batches())
    plan = searched.plan(HELD_OUT)
    choice = searched.choice
    assert {name: tuple(index.tolist()) for name, index in choice.kept.items()} == plan.kept()
    slim = PruningPlan.from_json(plan.to_json()).apply(copy.deepcopy(model), EXAMPLE).eval()
    with torch.no_grad():
        right = sum(int((slim(images).argmax(1) == labels).sum()) for images, labels in HELD_OUT)
    assert right / sum(len(labels) for _, labels in HELD_OUT) == pytest.approx(choice.accuracy)
    # The best of those compared, which all meet the budget, the deterministic one among them.
    assert choice.accuracy == max(choice.compared.values())
    assert len(choice.compared) > 2
    assert "deterministic" in choice.compared
    # Asked again it says the same, and the search would go on as before.
    state = searched.search.state_dict()
    assert choose(searched.search, searched.discretiser, HELD_OUT).source == choice.source
    assert torch.equal(searched.search.state_dict()["generator"], state["generator"])


def test_the_same_seed_gives_the_same_plan_also_after_a_kill() -> None:
    whole = plan_of(small_resnet(), MACs(0.5), HELD_OUT)
    states: list[dict] = []
    chosen = SearchOptions(**QUICK)
    options = {"held_out": HELD_OUT, "options": chosen}

    def keep(search) -> None:
        if search.steps_done == 33:
            states.append(search.state_dict())

    again = plan_performance(small_resnet(), EXAMPLE, batches(), loss_of, MACs(0.5), on_step=keep, **options)
    resumed = plan_performance(small_resnet(), EXAMPLE, batches(), loss_of, MACs(0.5), state=states[0], **options)
    assert whole.digest == again.digest == resumed.digest
    assert plan_of(small_resnet(), MACs(0.5), HELD_OUT, seed=7).digest != whole.digest


def test_without_held_out_data_the_deterministic_one() -> None:
    plan = plan_of(small_resnet(), MACs(0.6))
    assert plan.provenance["chosen"] == "deterministic"
    assert plan.provenance["held_out_accuracy"] is None
    with pytest.raises(DataError, match="evaluate on"):
        plan_of(small_resnet(), MACs(0.6), [])


def test_inner_groups_or_all() -> None:
    inner = plan_of(small_resnet(), MACs(0.7))
    assert set(inner.kept()) == {f"layer{i}.0.conv1" for i in (1, 2, 3)}
    everything = plan_of(small_resnet(), MACs(0.3), select="all")
    assert set(inner.kept()) < set(everything.kept())
    assert len(everything.kept()["conv1"]) <= 16


def test_depthwise_layers_are_cut_along() -> None:
    model, example = mobilenetv2_cifar(in_chans=1, width_mult=0.25).eval(), torch.zeros(1, 1, 8, 8)
    options = SearchOptions(mode="gates-only", steps=8)
    plan = plan_performance(model, example, batches(), loss_of, MACs(0.7), options=options, round_to=4)
    slim = plan.apply(copy.deepcopy(model), example)
    assert count(slim, example).macs <= 0.7 * count(model, example).macs
    hidden = {len(kept) for kept in plan.kept().values()} - {group.total for group in plan.groups}
    assert hidden
    assert all(width % 4 == 0 for width in hidden)


def test_layers_that_normalise_over_channels() -> None:
    """No gate imitates what removal does to their statistics; the plan is still a plan."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), *conv_bn(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 10)).eval()
    plan = plan_of(model, MACs(0.6), mode="gates-only", steps=5)
    assert count(plan.apply(copy.deepcopy(model), EXAMPLE), EXAMPLE).macs <= 0.6 * count(model, EXAMPLE).macs


def test_learning_beats_dropping_at_random() -> None:
    """At half the MACs, before any fine-tuning, on images that nothing has seen."""
    model = small_resnet()
    plan = plan_of(model, MACs(0.5), HELD_OUT, steps=150, gate_lr=0.1)
    random = plan_of(model, MACs(0.5), mode="gates-only", steps=1, gate_lr=1e-9)  # gates as they were drawn
    images, labels = digits()

    def accuracy(chosen: PruningPlan) -> float:
        with torch.no_grad():
            slim = chosen.apply(copy.deepcopy(model), EXAMPLE).eval()
            return float((slim(images[1000:]).argmax(1) == labels[1000:]).float().mean())

    assert accuracy(plan) > accuracy(random) + 0.05


class Gram(nn.Module):
    """Also multiplies its channels with each other, which costs their square and lies in no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.fc = nn.Conv2d(1, 12, 3), nn.Conv2d(12, 4, 1), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        flat = x.flatten(2)
        return self.fc(self.second(x + 1e-3 * (flat @ flat.transpose(1, 2) @ flat).reshape(x.shape)).mean((2, 3)))


def test_where_arithmetic_is_off_networks_are_counted() -> None:
    model = Gram().eval()
    searched = planner(model, MACs(0.75), mode="gates-only", steps=5)
    searched.search.run(batches())
    plan = searched.plan(HELD_OUT)
    counted, dense = count(plan.apply(copy.deepcopy(model), EXAMPLE), EXAMPLE), count(model, EXAMPLE)
    kept = {name: torch.tensor(index) for name, index in plan.kept().items()}
    assert searched.cost.predict(kept).cost != counted
    assert plan.cost_after == counted
    assert 0.67 * dense.macs < counted.macs <= 0.75 * dense.macs


def test_a_plan_that_is_not_proved_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = planner(small_resnet(), mode="gates-only", steps=2)
    monkeypatch.setattr("nni_plugin.performance.plan.verify", lambda *_, **__: Parity(0.1, 0.1, 1e-4))
    with pytest.raises(SurgeryError, match="NOT EQUAL"):
        searched.plan()


def test_budgets_out_of_reach() -> None:
    with pytest.raises(BudgetError, match=r"with every gated group at its smallest width .*select='all'"):
        plan_of(small_resnet(), MACs(0.05))
    with pytest.raises(BudgetError, match="MACs, Params or TableLatency"):
        plan_of(small_resnet(), Channels(0.5))
    with pytest.raises(BudgetError, match="min_channels"):
        plan_performance(small_resnet(), EXAMPLE, batches(), loss_of, MACs(0.5), min_channels=0)


def test_nothing_to_prune() -> None:
    with pytest.raises(GraphError, match="No group of channels can have gates"):
        plan_performance(small_resnet(), EXAMPLE, batches(), loss_of, MACs(0.5), ignore=["layer1", "layer2", "layer3"])
