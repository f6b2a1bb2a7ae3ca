"""plan_channels: any criterion, exact budgets, and a network that is bit for bit as it was, whatever happens."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_pruning as tp
from networks_at_random import Branches, assert_same, conv_bn, randomise, state_of
from torch import Tensor, nn

from nni_plugin import (
    Channels,
    Continuous,
    Gradual,
    Iterative,
    MACs,
    OneShot,
    Params,
    PruningPlan,
    count,
    plan_channels,
    planner,
    verify,
)
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import TaylorFisher, TaylorFO
from nni_plugin.criteria.rerun import RandomState
from nni_plugin.errors import BudgetError, CriterionError, GraphError, NNIPluginError
from nni_plugin.networks import resnet20
from nni_plugin.planner import score_groups, unchanged

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def residual() -> nn.Module:
    torch.manual_seed(0)

    def block() -> nn.Module:
        return Branches("add", [nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *conv_bn(6, 8)), nn.Identity()], nn.ReLU())

    return randomise(nn.Sequential(*conv_bn(3, 8), nn.ReLU(), block(), block(), *head(8)))


def dense() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), DenseLayer(6, 4), DenseLayer(10, 4), DenseLayer(14, 4)]
    return randomise(nn.Sequential(*layers, nn.BatchNorm2d(18), nn.ReLU(), *head(18)))


def batches(number: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(0, 3, (4,), generator=generator),
        )
        for _ in range(number)
    ]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def plan_of(model: nn.Module, budget: Any, criterion: Any = None, **options: Any) -> PruningPlan:
    return plan_channels(model, X, criterion or TaylorFO(), batches(), loss_fn, budget, **options)


# -- exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count_kept", range(3, 21))
def test_a_number_of_channels_is_met_exactly(count_kept: int) -> None:
    if count_kept == 20:
        with pytest.warns(UserWarning, match="removes nothing"):
            assert plan_of(residual(), Channels(20)).channels_removed == 0
    else:
        assert plan_of(residual(), Channels(count_kept)).channels_kept == count_kept


@pytest.mark.parametrize("budget", [MACs, Params])
@pytest.mark.parametrize("ratio", [0.9, 0.71, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("build", [residual, dense])
def test_costs_are_met_within_one_unit(build: Callable[[], nn.Module], budget: Any, ratio: float) -> None:
    model = build()
    plan = plan_of(model, budget(ratio))
    limit = ratio * getattr(count(model, X), "macs" if budget is MACs else "params")

    def value(p: PruningPlan) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cost = count(p.apply(copy.deepcopy(model), X), X)
        return cost.macs if budget is MACs else cost.params

    assert value(plan) <= limit
    assert value(plan) == (plan.cost_after.macs if budget is MACs else plan.cost_after.params)
    # The last unit removed is the one with the highest score of those removed; with it back it is too much.
    groups = {group.name: group for group in find_groups(model, X)}
    criterion = TaylorFO()
    with criterion.collect(model, list(groups.values())[:-1]):
        for batch in batches():
            model.zero_grad()
            loss_fn(model, batch).backward()
            criterion.update()
    candidates = [
        (float(criterion(groups[entry.name])[channel]), entry.name, channel)
        for entry in plan.groups
        for channel in entry.removed
    ]
    _, name, channel = max(candidates)
    back = tuple(
        type(e)(e.name, e.total, tuple(sorted((*e.kept, channel)))) if e.name == name else e for e in plan.groups
    )
    assert value(PruningPlan(back)) > limit


def test_the_lowest_scores_go() -> None:
    model = residual()
    plan = plan_of(model, Channels(12))
    groups = [group for group in find_groups(model, X) if group.fixed is None]
    criterion = TaylorFO()
    with criterion.collect(model, groups):
        for batch in batches():
            model.zero_grad()
            loss_fn(model, batch).backward()
            criterion.update()
    scores = torch.cat([criterion(group) for group in groups])
    gone = torch.cat([torch.isin(torch.arange(e.total), torch.tensor(e.removed)) for e in plan.groups])
    assert scores[gone].max() < scores[~gone].min()
    for entry, group in zip(plan.groups, groups, strict=True):
        assert entry.score_range == pytest.approx((float(criterion(group).min()), float(criterion(group).max())))


@pytest.mark.parametrize("round_to", [2, 4])
def test_widths_are_rounded_and_still_within_budget(round_to: int) -> None:
    plan = plan_of(residual(), MACs(0.6), round_to=round_to)
    assert all(len(e.kept) % round_to == 0 or len(e.kept) == e.total for e in plan.groups)
    assert plan.cost_after.macs <= 0.6 * plan.cost_before.macs


def test_minimum_widths() -> None:
    plan = plan_of(residual(), Channels(12), min_channels=4)
    assert [len(entry.kept) for entry in plan.groups] == [4, 4, 4]
    with pytest.raises(BudgetError, match=r"allows 11 of 20.*12 remain"):
        plan_of(residual(), Channels(11), min_channels=4)


def test_ignored_layers_stay_whole() -> None:
    model = residual()
    assert [e.name for e in plan_of(model, Channels(9), ignore=["0"]).groups] == ["3.branches.0.0", "4.branches.0.0"]
    assert [e.name for e in plan_of(model, Channels(4), ignore=[model[3], model[0]]).groups] == ["4.branches.0.0"]


def test_a_plan_says_where_it_comes_from() -> None:
    model = resnet20(3).double()
    plan = plan_channels(model, X, TaylorFO("bn"), batches(1), loss_fn, MACs(0.5))
    assert plan.model is getattr(model, "nni_plugin_identity", None)
    assert plan.cost_before == count(model, X)
    assert "TaylorFO" in str(plan.provenance)
    assert "0.5" in str(plan.provenance)
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_the_same_twice_and_at_any_schedule_length() -> None:
    model = residual()
    assert plan_of(model, Channels(9)) == plan_of(model, Channels(9))
    assert plan_of(model, Channels(9), schedule=OneShot(3)).digest == plan_of(model, Channels(9)).digest
    assert plan_of(model, Channels(9), schedule=Iterative(99, 3)).digest == plan_of(model, Channels(9)).digest
    # Two minibatches instead of three: other scores.
    assert (
        plan_of(model, Channels(9), schedule=OneShot(2)).digest
        == plan_of(model, Channels(9), schedule=OneShot(2)).digest
    )


def test_iterative_goes_through_the_data_again() -> None:
    plan = plan_of(residual(), Channels(9), schedule=Iterative(2, 2))
    assert plan.channels_kept == 9


def test_continuous_without_training_ends() -> None:
    """Nothing trains between, so a loss above the threshold stays there: it must not go on for ever."""
    calls = 0

    def counted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        assert calls < 200, "still asking for batches"
        return 100 + loss_fn(model, batch)

    schedule = Continuous(2, 2, loss_threshold=1.0)
    with pytest.raises(NNIPluginError):
        plan_channels(residual(), X, TaylorFO(), batches(), counted, Channels(9), schedule=schedule)


# -- the network is as it was ---------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        state_of(model),
        [id(p.grad) for p in model.parameters()],
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.random.get_rng_state().tolist(),
    )


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    assert_same(model, before[0])
    assert snapshot(model)[1:] == before[1:]
    assert not hasattr(model, "pruning_plan")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("schedule", [OneShot(), Iterative(3, 1)])
def test_planning_leaves_the_network_as_it_was(train: bool, schedule: Any) -> None:
    model = residual().train(train)
    model[4].eval()
    loss_fn(model, batches()[0]).backward()
    model[0].weight.grad = None
    before = snapshot(model)
    plan_of(model, Channels(9), schedule=schedule)
    assert_unchanged(model, before)


def test_the_random_state_of_the_networks_device_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch keeps one for every GPU, and a network there draws from its own."""
    told: list[Any] = []

    class Random(RandomState):
        def __init__(self, device: torch.device) -> None:
            told.append(device)
            super().__init__(torch.device("cpu"))

        def restore(self) -> None:
            told.append("restored")

    monkeypatch.setattr(planner, "RandomState", Random)
    with unchanged(residual().to("meta")):
        told.append("inside")
    assert told == [torch.device("meta"), "inside", "restored"]


class Stop(Exception):
    pass


def failing(kind: str) -> Callable[[nn.Module, Any], Tensor]:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        good = loss_fn(model, batch)
        if calls < 3:
            return good
        if kind == "exception":
            raise Stop("here")
        return {"nan": good * float("nan"), "vector": good[None] * torch.ones(2), "constant": good.detach()}[kind]

    return loss


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("exception", Stop, "here"),
        ("nan", CriterionError, "nan"),
        ("vector", CriterionError, "scalar"),
        ("constant", CriterionError, "requires_grad"),
    ],
)
@pytest.mark.parametrize("schedule", [OneShot(), Iterative(3, 1)])
def test_after_a_failure_the_network_is_as_it_was(kind: str, error: type[Exception], text: str, schedule: Any) -> None:
    model, criterion = residual().train(), TaylorFO()
    loss_fn(model, batches()[0]).backward()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        plan_channels(model, X, criterion, batches(), failing(kind), Channels(9), schedule=schedule)
    assert_unchanged(model, before)
    # And the criterion has forgotten the run that failed.
    again = plan_channels(model, X, criterion, batches(), loss_fn, Channels(9), schedule=schedule)
    assert again.kept() == plan_of(model, Channels(9), schedule=schedule).kept()


def test_a_loss_that_is_not_a_tensor_is_refused() -> None:
    model = residual()
    before = snapshot(model)
    with pytest.raises(CriterionError, match="scalar"):
        plan_channels(model, X, TaylorFO(), batches(), lambda m, b: 1.0, Channels(9))  # type: ignore[arg-type, return-value]
    assert_unchanged(model, before)


def test_no_batches() -> None:
    model = residual()
    before = snapshot(model)
    with pytest.raises(CriterionError, match="no batch"):
        plan_channels(model, X, TaylorFO(), [], loss_fn, Channels(9))

    def once() -> Iterator[Any]:
        yield from batches(1)

    with pytest.raises(CriterionError, match="used up"):
        plan_channels(model, X, TaylorFO(), once(), loss_fn, Channels(9), schedule=Iterative(2, 2))
    assert plan_channels(model, X, TaylorFO(), once(), loss_fn, Channels(9)).channels_kept == 9
    assert_unchanged(model, before)


def test_a_frozen_network_is_refused() -> None:
    model = residual().requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(CriterionError, match=r"frozen|requires_grad"):
        plan_of(model, Channels(9))
    assert_unchanged(model, before)


def test_gates_behind_a_normalisation_that_is_missing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *head(6)).double()
    before = snapshot(model)
    with pytest.raises(CriterionError, match="'0'"):
        plan_of(model, Channels(3), TaylorFO("bn"))
    assert_unchanged(model, before)


def test_an_unreachable_budget_and_an_unknown_layer() -> None:
    model = residual()
    before = snapshot(model)
    with pytest.raises(BudgetError, match=r"\d+ remain"):
        plan_of(model, MACs(0.001))
    with pytest.raises(GraphError, match="nowhere"):
        plan_of(model, MACs(0.5), ignore=["nowhere"])
    assert_unchanged(model, before)


@pytest.mark.parametrize("budget", [0.5, None, "0.5", MACs])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    model = residual()
    before = snapshot(model)
    with pytest.raises(BudgetError, match=r"such as MACs\(0\.5\).*, got "):
        plan_channels(model, X, TaylorFO(), batches(), loss_fn, budget)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("criterion", "text"),
    [
        ("taylor-fo", r"create_criterion\('taylor-fo'\), got 'taylor-fo'"),
        (TaylorFO, r"got the class TaylorFO: give an instance, TaylorFO\(\)"),
        (tp.importance.MagnitudeImportance, r"give an instance, MagnitudeImportance\(\)"),
        (MACs(0.5), r"such as TaylorFO\(\).*, got MACs\(ratio=0\.5\)"),
    ],
)
def test_what_is_no_criterion_is_refused(criterion: Any, text: str) -> None:
    model = residual()
    before = snapshot(model)
    with pytest.raises(CriterionError, match=text):
        plan_channels(model, X, criterion, batches(), loss_fn, MACs(0.5))
    with pytest.raises(CriterionError, match=text):
        score_groups(model, find_groups(model, X), criterion, batches(), loss_fn)
    assert_unchanged(model, before)


def test_scores_that_are_not_numbers_are_refused() -> None:
    model = residual()
    with pytest.raises(CriterionError, match="not a number"):
        plan_of(model, Channels(9), lambda group: torch.full((len(group[0].idxs),), float("nan")))
    with pytest.raises(CriterionError, match=r"shape \(1,\)"):
        plan_of(model, Channels(9), lambda group: torch.ones(1))


# -- the other host, both ways --------------------------------------------------------------------------------

STOCK = {
    "magnitude": tp.importance.MagnitudeImportance(p=2),
    "group-magnitude": tp.importance.GroupMagnitudeImportance(p=2),
    "taylor": tp.importance.TaylorImportance(),
    "group-taylor": tp.importance.GroupTaylorImportance(),
    "lamp": tp.importance.LAMPImportance(),
    "fpgm": tp.importance.FPGMImportance(),
    "random": tp.importance.RandomImportance(),
}


@pytest.mark.parametrize("build", [residual, dense])
@pytest.mark.parametrize("name", list(STOCK))
def test_stock_importances_make_plans(name: str, build: Callable[[], nn.Module]) -> None:
    model = build()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_of(model, MACs(0.5), STOCK[name])
    assert_unchanged(model, before)
    assert plan.cost_after.macs <= 0.5 * plan.cost_before.macs
    assert verify(model, plan, X).max_rel <= 1e-12
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_a_stock_importance_ranks_as_it_scores() -> None:
    model = nn.Sequential(*conv_bn(3, 6), nn.ReLU(), *head(6)).double()
    plan = plan_of(model, Channels(2), tp.importance.GroupMagnitudeImportance(p=2, normalizer=None))
    norms = model[0].weight.square().sum((1, 2, 3)) + model[5].weight.square().sum(0)
    assert set(plan.kept()["0"]) == set(norms.topk(2).indices.tolist())


def collect(model: nn.Module) -> TaylorFO:
    criterion = TaylorFO()
    with criterion.collect(model):
        for batch in batches():
            model.zero_grad()
            loss_fn(model, batch).backward()
            criterion.update()
    return criterion


@pytest.mark.parametrize("build", [residual, dense])
@pytest.mark.parametrize("everywhere", [True, False], ids=["global", "local"])
def test_taylor_is_an_importance_of_stock_pruners(build: Callable[[], nn.Module], everywhere: bool) -> None:
    model = build()
    criterion = collect(model)
    groups = {group.name: group for group in find_groups(model, X)}
    expected = {name: criterion(group) for name, group in groups.items() if group.fixed is None}
    seen: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}

    def watched(group: Any) -> Tensor:
        scores = criterion(group)
        seen[names[group[0].dep.layer]] = scores
        return scores

    pruner = tp.pruner.BasePruner(
        model, X, importance=watched, global_pruning=everywhere, pruning_ratio=0.5, ignored_layers=[model[-1]]
    )
    dense_macs = count(model, X).macs
    pruner.step()
    assert count(model, X).macs < 0.6 * dense_macs
    assert model(X).shape == (2, 3)
    assert set(seen) == set(expected)
    for name, scores in seen.items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-10, atol=0)


def test_the_criterion_itself_is_callable_by_a_stock_pruner() -> None:
    model = residual()
    criterion = collect(model)
    tp.pruner.BasePruner(
        model, X, importance=criterion, global_pruning=True, pruning_ratio=0.3, ignored_layers=[model[-1]]
    ).step()
    assert model(X).shape == (2, 3)


def test_a_group_that_a_stock_importance_skips_stays_whole() -> None:
    model = residual()
    magnitude = tp.importance.MagnitudeImportance()
    groups = [group for group in find_groups(model, X) if group.fixed is None]
    skipped = groups[0].name

    def importance(group: Any) -> Tensor | None:
        return None if group[0].dep.layer is model.get_submodule(skipped) else magnitude(group)

    most = sum(group.width for group in groups)
    plan = plan_channels(model, X, importance, batches(), loss_fn, Channels(most - 4))
    assert len(plan.kept()[skipped]) == groups[0].width
    assert plan.channels_removed == 4


def test_what_a_criterion_has_seen_before_does_not_count() -> None:
    used, fresh = TaylorFO(), TaylorFO()
    other = randomise(residual(), 7)
    with used.collect(other):
        loss_fn(other, batches()[0]).backward()
        used.update()
    plans = [plan_channels(residual(), X, c, batches(), loss_fn, Channels(9)) for c in (used, fresh)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.6), Channels(0.5)])
@pytest.mark.parametrize("criterion", [TaylorFO, tp.importance.GroupTaylorImportance])
def test_gradual_takes_its_steps_and_meets_the_budget(criterion: Callable[[], Any], budget: Any) -> None:
    model = residual().eval()
    plan = plan_channels(model, X, criterion(), batches(), loss_fn, budget, schedule=Gradual(3))
    steps = plan.provenance["steps"]
    assert len(steps) == 3
    sizes = [step["channels"] for step in steps]
    assert sizes == sorted(set(sizes), reverse=True)
    once = plan_channels(model, X, criterion(), batches(), loss_fn, budget)
    assert plan.channels_kept == pytest.approx(once.channels_kept, abs=2)


@pytest.mark.parametrize(
    "schedule", [OneShot(), OneShot(2), Iterative(3, 1), Iterative(3, 2), Gradual(2), Gradual(3, 1)], ids=repr
)
def test_the_measured_change_of_a_step_is_the_removals_own(schedule: Any) -> None:
    """Channels that do nothing leave: the loss stays, whatever the minibatches on which steps follow each other."""
    model = residual()
    dead = {"1": 4, "3.branches.0.1": 2}
    with torch.no_grad():
        for path, number in dead.items():
            norm = model.get_submodule(path)
            norm.weight[:number], norm.bias[:number] = 0, 0  # type: ignore[index, operator]
        for path in ("3.branches.0.4", "4.branches.0.4"):
            norm = model.get_submodule(path)
            norm.weight[:4], norm.bias[:4] = 0, 0  # type: ignore[index, operator]
    model.eval()
    whole = sum(group.width for group in find_groups(model, X) if group.fixed is None)
    plan = plan_channels(model, X, TaylorFisher(), batches(4), loss_fn, Channels(whole - 6), schedule=schedule)
    steps = plan.provenance["steps"]
    assert len(steps) == (1 if isinstance(schedule, OneShot) else len(steps))
    assert [step["loss_change"] for step in steps] == pytest.approx([0.0] * len(steps), abs=1e-12)
    assert all(f"step {n}: loss change predicted " in plan.explain() for n in range(1, len(steps) + 1))


def test_the_measured_change_of_each_step_on_its_window() -> None:
    model, data = residual().eval(), batches(2)
    plan = plan_channels(model, X, TaylorFisher(), data, loss_fn, Channels(14), schedule=Gradual(2, 1))
    first = plan_channels(model, X, TaylorFisher(), data, loss_fn, Channels(10), schedule=OneShot(1))
    slim = copy.deepcopy(model)
    first.apply(slim, X)
    change = float(loss_fn(slim, data[0]) - loss_fn(model, data[0]))
    assert abs(change) > 1e-6
    assert first.provenance["steps"][0]["loss_change"] == pytest.approx(change, abs=1e-9)
    pruned = copy.deepcopy(model)
    plan.apply(pruned, X)
    assert len(plan.provenance["steps"]) == 2
    last = plan.provenance["steps"][1]
    assert last["loss_before"] + last["loss_change"] == pytest.approx(float(loss_fn(pruned, data[1])), abs=1e-9)
