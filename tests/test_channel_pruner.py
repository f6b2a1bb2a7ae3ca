"""The pruner in a training loop: when it prunes, how much, and that masked and cut training are one."""

import copy
import math
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch_pruning as tp
from networks_at_random import Branches, conv_bn, randomise
from torch import Tensor, nn
from torch.optim import SGD

from nni_plugin import ChannelPruner, Channels, Continuous, Iterative, MACs, OneShot, Params, PruningPlan, count
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import TaylorFisher, TaylorFO
from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import BudgetError, CriterionError, GraphError, ScheduleError
from nni_plugin.groups import ChannelGroup

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    inside = nn.Sequential(*conv_bn(8, 5), nn.ReLU(), *conv_bn(5, 8))
    layers = [*conv_bn(3, 8), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU()), *conv_bn(8, 9), nn.SiLU()]
    return randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3)), seed).train()


CHANNELS = 8 + 5 + 9


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (8,), generator=generator)


class State:
    def __init__(self, optimizer: torch.optim.Optimizer | None, ema: nn.Module | None = None) -> None:
        self.optimizer, self.ema = optimizer, ema


def train(
    model: nn.Module, pruner: ChannelPruner, optimizer: torch.optim.Optimizer, first: int, last: int, clip: float = 0.5
) -> list[int]:
    """Train on batches first..last-1; returns the channels left after each."""
    left = []
    for number in range(first, last):
        x, y = batch(number)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        pruner.on_backward(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        pruner.on_step()
        left.append(pruner.size().channels)
    return left


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def run(schedule: Any, budget: Any, minibatches: int, cut: Any = "end", **options: Any) -> tuple[Any, ...]:
    model = network()
    optimizer = sgd(model)
    pruner = ChannelPruner(model, X, TaylorFO(), budget, schedule=schedule, cut=cut, **options)
    pruner.on_train_begin(State(optimizer))
    left = train(model, pruner, optimizer, 0, minibatches)
    return model, pruner, left


# -- how much and when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["end", "step", "never"])
@pytest.mark.parametrize(("per_step", "target"), [(3, 12), (4, 12), (5, 9), (100, 15), (1, 19)])
def test_each_step_removes_exactly_so_many_until_the_target(per_step: int, target: int, cut: str) -> None:
    window, minibatches = 2, 24
    _, pruner, left = run(Iterative(per_step, window, 0.5), Channels(target), minibatches, cut)
    for number, channels in enumerate(left, start=1):
        assert channels == max(target, CHANNELS - per_step * (number // window))
    assert pruner.done
    assert len(pruner.steps) == math.ceil((CHANNELS - target) / per_step)
    assert pruner.plan().channels_kept == target


def test_the_window_starts_anew_after_each_step() -> None:
    _, _, left = run(Iterative(2, 5), Channels(16), 16)
    assert left == [22] * 4 + [20] * 5 + [18] * 5 + [16] * 2


@pytest.mark.parametrize("budget", [MACs(0.5), Params(0.5), MACs(0.3)])
@pytest.mark.parametrize("cut", ["end", "step", "never"])
def test_other_budgets_are_met_by_the_last_step(budget: Any, cut: str) -> None:
    dense = count(network(), X)
    model, pruner, left = run(Iterative(2, 1), budget, 20, cut)
    assert pruner.done
    slim = network()
    pruner.plan().apply(slim, X)
    assert count(slim, X) == pruner.plan().cost_after == pruner.size().cost
    value = {MACs: count(slim, X).macs / dense.macs, Params: count(slim, X).params / dense.params}[type(budget)]
    assert value <= budget.ratio
    if cut != "never":
        assert count(model, X) == count(slim, X)
    assert all(a - b in (0, 1, 2) for a, b in pairwise(left))


def test_one_shot_after_so_many_minibatches() -> None:
    _, pruner, left = run(OneShot(3), Channels(10), 5)
    assert left == [22, 22, 10, 10, 10]
    assert pruner.done


def test_one_shot_waits_for_finish() -> None:
    model, pruner, left = run(OneShot(), Channels(10), 3)
    assert left == [22] * 3
    assert not pruner.done
    assert pruner.finish().channels_kept == 10
    assert sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) < 8 + 5 + 8 + 9
    assert pruner.finish().digest == pruner.plan().digest  # again changes nothing


def test_finish_goes_the_rest_of_the_way_at_once() -> None:
    _, pruner, left = run(Iterative(2, 3), Channels(10), 4)
    assert left[-1] == 20
    assert pruner.finish().channels_kept == 10


def test_finish_needs_something_collected() -> None:
    _, pruner, _ = run(Iterative(2, 2), Channels(10), 4)
    with pytest.raises(ScheduleError, match="No minibatch"):
        pruner.finish()
    fresh = ChannelPruner(network(), X, TaylorFO(), Channels(10))
    with pytest.raises(ScheduleError, match="No minibatch"):
        fresh.finish()


def drive(pruner: ChannelPruner, losses: list[float]) -> list[int]:
    """Minibatches with given losses, without training."""
    left = []
    for number, loss in enumerate(losses):
        x, y = batch(number)
        pruner.model.zero_grad()
        nn.functional.cross_entropy(pruner.model(x), y).backward()
        pruner.on_backward(loss)
        pruner.on_step()
        left.append(pruner.size().channels)
    return left


def test_continuous_skips_while_the_mean_loss_since_the_last_check_is_above_the_threshold() -> None:
    pruner = ChannelPruner(
        network(), X, TaylorFO(), Channels(16), schedule=Continuous(2, 3, 0.0, loss_threshold=1.0), cut="never"
    )
    # Checks after minibatches 3, 6, 9, 12: means 2, 1 (at most the threshold), 1.5, 0.5.
    losses = [2.0, 2.0, 2.0] + [0.0, 3.0, 0.0] + [0.5, 2.5, 1.5] + [0.5] * 3
    assert drive(pruner, losses) == [22] * 5 + [20] * 6 + [18]


def test_a_skipped_check_is_not_repeated_at_the_next_minibatch() -> None:
    pruner = ChannelPruner(
        network(), X, TaylorFO(), Channels(16), schedule=Continuous(2, 3, 0.0, loss_threshold=1.0), cut="never"
    )
    # "Minibatches between checks": the check after the third is skipped, the next comes after the sixth.
    assert drive(pruner, [2.0, 2.0, 2.0, 0.1, 0.1, 0.1]) == [22] * 5 + [20]


@pytest.mark.parametrize("criterion", [TaylorFO, TaylorFisher])
def test_cut_by_the_caller_within_a_window_which_begins_anew(criterion: Any) -> None:
    pruner = ChannelPruner(network(), X, criterion(), Channels(16), schedule=Iterative(2, 3), cut="never")
    with pruner:
        assert drive(pruner, [1.0] * 5) == [22, 22, 20, 20, 20]
        pruner.cut()
        with pytest.raises(ScheduleError, match="No minibatch"):
            pruner.finish()
        assert drive(pruner, [1.0] * 6) == [20, 20, 18, 18, 18, 16]


def test_a_skipped_window_goes_on_growing() -> None:
    """Scores at the step average over all minibatches since the last step, also those of skipped checks."""
    model = network()
    pruner = ChannelPruner(
        model, X, TaylorFO(), Channels(20), schedule=Continuous(2, 2, 0.0, loss_threshold=1.0), cut="never"
    )
    reference, groups = TaylorFO(), [g for g in find_groups(model, X) if g.fixed is None]
    with reference.collect(model, groups):
        for number, loss in enumerate([2.0, 2.0, 0.1, 0.1]):
            x, y = batch(number)
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            reference.update()
            pruner.on_backward(loss)
            pruner.on_step()
    assert reference.minibatches == 4
    flat = torch.cat([reference(group) for group in groups])
    gone = torch.cat([torch.isin(torch.arange(e.total), torch.tensor(e.removed)) for e in pruner.plan().groups])
    assert gone.sum() == 2
    assert flat[gone].max() <= flat[~gone].min()


# -- scores over windows --------------------------------------------------------------------------------------


class Given(Criterion):
    """Scores from a table: window number -> group -> values."""

    def __init__(self, windows: list[dict[str, list[float]]]) -> None:
        self.windows, self.window = windows, 0
        super().__init__()

    def reset(self) -> None:
        if getattr(self, "minibatches", 0):
            self.window += 1
        super().reset()

    def _gather(self, model: nn.Module) -> None:
        pass

    def _score(self, group: ChannelGroup) -> Tensor:
        return torch.tensor(self.windows[self.window][group.name], dtype=torch.float64)


def two_groups() -> nn.Module:
    torch.manual_seed(0)
    layers = [*conv_bn(3, 4), nn.ReLU(), *conv_bn(4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(4, 3)))


def test_moving_average_over_windows() -> None:
    """First window raw, then `.9 old + .1 new`: here the average, not the latest window, decides."""
    windows = [
        {"0": [1.0, 8.0, 7.0, 6.0], "3": [9.0, 9.0, 9.0, 9.0]},  # 0:0 goes
        {"0": [0.0, 0.0, 9.0, 9.0], "3": [2.0, 9.0, 9.0, 9.0]},  # .9*8 = 7.2, 6.3 + .9 = 7.2, 5.4 + .9 = 6.3 goes
        {"0": [0.0, 90.0, 9.0, 9.0], "3": [0.0, 9.0, 9.0, 9.0]},  # 0:2 is 7.38, 3:0 is .9 * 8.3 + 0 = 7.47
    ]
    pruner = ChannelPruner(two_groups(), X, Given(windows), Channels(5), schedule=Iterative(1, 1, 0.9), cut="never")
    kept = []
    for _ in range(3):
        drive(pruner, [1.0])
        kept.append(pruner.plan().kept())
    assert kept == [
        {"0": (1, 2, 3), "3": (0, 1, 2, 3)},
        {"0": (1, 2), "3": (0, 1, 2, 3)},
        {"0": (1,), "3": (0, 1, 2, 3)},
    ]
    low, high = pruner.plan().groups[1].score_range or (0, 0)
    assert (low, high) == pytest.approx((0.9 * (0.9 * 9 + 0.1 * 2), 9.0))


def test_no_momentum_takes_the_latest_window() -> None:
    windows = [
        {"0": [1.0, 8.0, 7.0, 6.0], "3": [9.0] * 4},
        {"0": [0.0, 5.0, 9.0, 9.0], "3": [9.0] * 4},
    ]
    pruner = ChannelPruner(two_groups(), X, Given(windows), Channels(6), schedule=Iterative(1, 1, 0.0), cut="never")
    drive(pruner, [1.0, 1.0])
    assert pruner.plan().kept()["0"] == (2, 3)


def test_equal_scores_stay_within_the_budget() -> None:
    zeros = {"0": [0.0] * 4, "3": [0.0] * 4}
    pruner = ChannelPruner(two_groups(), X, Given([zeros] * 9), Channels(5), schedule=Iterative(1, 1), cut="never")
    assert drive(pruner, [1.0] * 4) == [7, 6, 5, 5]


# -- masked and cut are one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Channels(9), MACs(0.4)], ids=["channels", "macs"])
@pytest.mark.parametrize("gates", ["auto", "weight", "input"])
def test_masked_then_cut_is_cut_at_every_step(budget: Any, gates: str) -> None:
    results = []
    for cut in ("end", "step", "never"):
        model = network()
        optimizer = sgd(model)
        pruner = ChannelPruner(model, X, TaylorFO(gates), budget, schedule=Iterative(3, 2), cut=cut)  # type: ignore[arg-type]
        pruner.on_train_begin(State(optimizer))
        train(model, pruner, optimizer, 0, 16)
        assert pruner.done
        if cut == "never":
            assert count(model, X) == count(network(), X)
            pruner.cut()
        results.append((pruner.plan(), {k: v.clone() for k, v in model.state_dict().items()}))
    for plan, state in results[1:]:
        assert plan.kept() == results[0][0].kept()
        assert plan.digest == results[0][0].digest
        assert plan.cost_after == results[0][0].cost_after
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-9, atol=1e-11)


def test_the_plan_says_the_same_whenever_the_network_was_cut() -> None:
    """Also what it explains: the scores of channels that are long gone do not count."""
    plans = [run(Iterative(3, 2), Channels(9), 16, cut)[1].plan() for cut in ("end", "step", "never")]
    for plan in plans[1:]:
        for a, b in zip(plan.groups, plans[0].groups, strict=True):
            assert a.score_range == pytest.approx(b.score_range, rel=1e-6)


def test_the_moving_average_of_weights_is_cut_along() -> None:
    model = network()
    ema, optimizer = copy.deepcopy(model), sgd(model)
    pruner = ChannelPruner(model, X, TaylorFO(), Channels(9), schedule=Iterative(4, 2), cut="step")
    pruner.on_train_begin(State(optimizer, ema))
    dense_ema = copy.deepcopy(ema)
    train(model, pruner, optimizer, 0, 12)
    expected = network()
    expected.load_state_dict(dense_ema.state_dict())
    pruner.plan().apply(expected, X)
    for a, b in zip(ema.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cut", ["end", "step", "never"])
def test_groups_may_shrink_to_one_channel(cut: str) -> None:
    """Widths of one are legal; the plan stays complete, counts stay right, and pruning goes on."""
    scores = {"0": [0.0, 0.0, 0.0, 0.0], "3": [1.0, 2.0, 3.0, 4.0]}
    model = two_groups()

    class Table(Given):
        def _score(self, group: ChannelGroup) -> Tensor:
            return torch.tensor(scores[group.name][: group.width], dtype=torch.float64)

    pruner = ChannelPruner(model, X, Table([]), Channels(3), schedule=Iterative(1, 1, 0.0), cut=cut)
    assert drive(pruner, [1.0] * 6) == [7, 6, 5, 4, 3, 3]
    assert [len(kept) for kept in pruner.plan().kept().values()] == [1, 2]
    assert pruner.plan().kept()["0"] == (3,)


@pytest.mark.parametrize("cut", ["end", "step"])
def test_everything_may_shrink_to_one_channel(cut: str) -> None:
    model, pruner, left = run(Iterative(7, 1), Channels(3), 5, cut)
    assert left[-1] == 3
    assert pruner.plan().channels_kept == 3
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [1, 1, 1, 1]


@pytest.mark.parametrize("cut", ["end", "step", "never"])
def test_grouped_and_depthwise_convolutions_shrink_as_far(cut: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8, 3, 4), nn.ReLU(), *conv_bn(8, 6, 1), nn.ReLU()]
        layers += [*conv_bn(6, 6, 3, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
        return randomise(nn.Sequential(*layers)).train()

    model = build()
    pruner = ChannelPruner(model, X, TaylorFO(), Params(0.35), schedule=Iterative(3, 1), cut=cut)  # type: ignore[arg-type]
    optimizer = sgd(model)
    pruner.on_train_begin(State(optimizer))
    train(model, pruner, optimizer, 0, 12)
    slim = build()
    pruner.plan().apply(slim, X)
    assert count(slim, X) == pruner.plan().cost_after


# -- goes on after an interruption ----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["end", "step", "never"])
@pytest.mark.parametrize("stop", [3, 4, 11])
def test_resumed_is_uninterrupted(cut: str, stop: int, tmp_path: Any) -> None:
    def begin(model: nn.Module) -> tuple[ChannelPruner, SGD]:
        optimizer = sgd(model)
        pruner = ChannelPruner(model, X, TaylorFO(), Channels(9), schedule=Iterative(3, 2), cut=cut)  # type: ignore[arg-type]
        pruner.on_train_begin(State(optimizer))
        return pruner, optimizer

    model = network()
    pruner, optimizer = begin(model)
    train(model, pruner, optimizer, 0, stop)
    torch.save([pruner.state_dict(), model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    train(model, pruner, optimizer, stop, 14)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = network(5)
    again, carried = begin(other)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    carried.load_state_dict(saved[2])
    assert train(other, again, carried, stop, 14)[-1] == 9
    assert again.plan() == pruner.plan()
    assert (again.done, again.steps) == (pruner.done, pruner.steps)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_network_is_refused() -> None:
    _, pruner, _ = run(Iterative(3, 2), Channels(9), 4)
    other = ChannelPruner(two_groups(), X, TaylorFO(), Channels(4))
    with pytest.raises(ScheduleError, match="another network"):
        other.load_state_dict(pruner.state_dict())


# -- what is refused ------------------------------------------------------------------------------------------


def test_an_unreachable_budget_is_refused_before_anything_runs() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetError, match=r"0\.\d+ of the dense network"):
        ChannelPruner(model, X, TaylorFO(), MACs(0.001))
    with pytest.raises(BudgetError, match=r"allows 2 of 22.*3 remain"):
        ChannelPruner(model, X, TaylorFO(), Channels(2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_nothing_to_prune_is_refused() -> None:
    with pytest.raises(GraphError, match=r"Nothing in Sequential may be pruned.*output"):
        ChannelPruner(nn.Sequential(nn.Conv2d(3, 4, 1)).double(), X, TaylorFO(), Channels(2))
    with pytest.raises(GraphError, match="Nothing"):
        ChannelPruner(network(), X, TaylorFO(), Channels(2), ignore=[""])
    with pytest.raises(GraphError, match="not in the model"):
        ChannelPruner(network(), X, TaylorFO(), Channels(2), ignore=[nn.ReLU()])
    with pytest.raises(ScheduleError, match="cut"):
        ChannelPruner(network(), X, TaylorFO(), Channels(5), cut="now")  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    pruner = ChannelPruner(network(), X, TaylorFO(), Channels(9))
    with pytest.raises(CriterionError, match="loss of a minibatch is"):
        pruner.on_backward(loss)


def test_metrics_and_size() -> None:
    _, pruner, _ = run(Iterative(11, 2), Channels(11), 3)
    metrics: dict[str, float] = {}
    pruner.on_epoch_end(0, metrics)
    assert metrics["kept"] == 0.5
    assert metrics["macs_ratio"] == pruner.size().cost.macs / pruner.dense.cost.macs


def test_hooks_leave_with_close() -> None:
    model = network()
    pruner = ChannelPruner(model, X, TaylorFO(), Channels(9), schedule=Iterative(3, 2))
    drive(pruner, [1.0])
    pruner.close()
    with TaylorFO().collect(model):
        pass
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_a_ratio_of_one_removes_nothing_and_says_so() -> None:
    pruner = ChannelPruner(network(), X, TaylorFO(), MACs(1.0), cut="never")
    drive(pruner, [1.0])
    with pytest.warns(UserWarning, match="removes nothing"):
        assert pruner.finish().channels_removed == 0


# -- the importances of Torch-Pruning -------------------------------------------------------------------------

STOCK = {
    "magnitude": tp.importance.MagnitudeImportance(p=2),
    "group-magnitude": tp.importance.GroupMagnitudeImportance(p=1),
    "taylor": tp.importance.TaylorImportance(),
    "group-taylor": tp.importance.GroupTaylorImportance(),
    "lamp": tp.importance.LAMPImportance(),
    "fpgm": tp.importance.FPGMImportance(),
    "bn-scale": tp.importance.BNScaleImportance(),
    "random": tp.importance.RandomImportance(),
}


@pytest.mark.parametrize("cut", ["end", "step", "never"])
@pytest.mark.parametrize("name", list(STOCK))
def test_stock_importances_drive_it(name: str, cut: str) -> None:
    model = network()
    pruner = ChannelPruner(model, X, STOCK[name], Channels(12), schedule=Iterative(5, 2, 0.0), cut=cut)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = sgd(model)
        pruner.on_train_begin(State(optimizer))
        train(model, pruner, optimizer, 0, 6)
    assert pruner.plan().channels_kept == 12
    assert PruningPlan.from_json(pruner.plan().to_json()) == pruner.plan()


def test_a_group_that_an_importance_skips_stays_whole() -> None:
    def picky(group: Any) -> Tensor | None:
        return None if len(group[0].idxs) == 9 else torch.arange(len(group[0].idxs), dtype=torch.float32)

    pruner = ChannelPruner(network(), X, picky, Channels(12), schedule=Iterative(5, 1, 0.5), cut="never")
    drive(pruner, [1.0, 1.0])
    plan = pruner.plan()
    assert [len(kept) for kept in plan.kept().values()] == [2, 1, 9]
    assert PruningPlan.from_json(plan.to_json()).digest == plan.digest


# -- what the network carries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["end", "step"])
def test_the_network_carries_the_plan_with_its_provenance(cut: str) -> None:
    model = network()
    optimizer = sgd(model)
    pruner = ChannelPruner(
        model,
        X,
        TaylorFO(),
        Channels(12),
        schedule=Iterative(4, 1),
        cut=cut,  # type: ignore[arg-type]
        optimizer=optimizer,
    )
    train(model, pruner, optimizer, 0, 5)
    assert pruner.done
    assert model.pruning_plan == pruner.plan()
    assert "TaylorFO" in model.pruning_plan.provenance["criterion"]  # type: ignore[union-attr, operator]


def test_a_cut_without_an_optimizer_says_so() -> None:
    model = network()
    pruner = ChannelPruner(model, X, TaylorFO(), Channels(12), schedule=Iterative(100, 1))
    x, y = batch(0)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    pruner.on_backward(float(loss.detach()))
    with pytest.warns(UserWarning, match="whose next step will fail"):
        pruner.on_step()
