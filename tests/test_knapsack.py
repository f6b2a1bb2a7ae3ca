"""Channels by knapsack: the best there is on small cases, within the time it is given, and on the staircase's edges."""

import itertools
import math
from typing import Any

import latency_by_macs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nni_plugin import Gradual, Iterative, Latency, OneShot, latency_budget, plan_channels
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import OBS, Magnitude, TaylorFO
from nni_plugin.groups import ChannelGroup
from nni_plugin.knapsack import KnapsackRanking, best_choice, within
from nni_plugin.latency import Latency as Measured
from nni_plugin.latency import LatencyPair
from nni_plugin.latency_table import LayerLatencies, LayerShape, Place, grid
from nni_plugin.slim_latency import SlimLatency

PLACE = Place(torch.device("cpu"), torch.float32)
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

OPTIONS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=4), min_size=1, max_size=4
)


def arrays(groups: list[list[tuple[int, int]]]) -> tuple[list[Any], list[Any]]:
    """Values that do not rise, and costs in any order."""
    values = [np.array(sorted((v for v, _ in options), reverse=True), dtype=float) for options in groups]
    return values, [np.array([c for _, c in options]) for options in groups]


def by_trying_all(values: list[Any], costs: list[Any], capacity: float) -> float:
    """The most that is worth having, -inf if nothing fits."""
    choices = itertools.product(*(range(len(value)) for value in values))
    fits = [c for c in choices if sum(cost[i] for cost, i in zip(costs, c, strict=True)) <= capacity]
    return max((sum(v[i] for v, i in zip(values, c, strict=True)) for c in fits), default=-math.inf)


def worth(values: list[Any], chosen: list[int]) -> float:
    return float(sum(value[i] for value, i in zip(values, chosen, strict=True)))


@given(OPTIONS, st.integers(0, 30))
def test_the_best_choice_is_that_of_trying_all(groups: Any, capacity: int) -> None:
    values, costs = arrays(groups)
    best = by_trying_all(values, costs, capacity)
    chosen = best_choice(values, costs, capacity)
    if chosen is None:
        assert best == -math.inf
    else:
        assert worth(values, chosen) == best
        assert sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= capacity


@given(OPTIONS, st.integers(0, 30))
def test_more_room_is_never_worth_less(groups: Any, capacity: int) -> None:
    values, costs = arrays(groups)
    less, more = best_choice(values, costs, capacity), best_choice(values, costs, capacity + 1)
    assert less is None or (more is not None and worth(values, more) >= worth(values, less))


@given(OPTIONS, st.floats(-5, 30), st.floats(0.1, 3))
def test_times_of_any_unit_are_kept_within_a_step_a_group(groups: Any, capacity: float, unit: float) -> None:
    values, costs = arrays(groups)
    times = [unit * cost - 1 for cost in costs]
    chosen = within(values, times, capacity, resolution=100)
    room = capacity - sum(time.min() for time in times)
    if room < 0:
        assert chosen is None
        return
    assert chosen is not None
    assert sum(time[i] for time, i in zip(times, chosen, strict=True)) <= capacity + 1e-6
    assert worth(values, chosen) >= by_trying_all(values, times, capacity - len(groups) * room / 100)


def test_of_equal_worth_the_first_option_is_taken() -> None:
    zeros = [np.zeros(3), np.zeros(2)]
    assert best_choice(zeros, [np.array([2, 1, 0]), np.array([3, 0])], 5) == [0, 0]


# -- on networks ----------------------------------------------------------------------------------------------


def chain(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    pairs = itertools.pairwise((3, *widths))
    layers = [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)).eval()


def by_macs(layer: LayerShape, _: Place) -> float:
    return layer.inputs * layer.outputs / 1e3


def by_tiles(layer: LayerShape, _: Place) -> float:
    """A staircase: outputs are computed sixteen at a time, inputs read sixteen at a time."""
    return math.ceil(layer.inputs / 16) * math.ceil(layer.outputs / 16)


def ranking_of(
    model: nn.Module, measure: Any, scores: Any = None, **options: Any
) -> tuple[KnapsackRanking, SlimLatency, list[ChannelGroup]]:
    groups = [group for group in find_groups(model, X) if group.fixed is None]
    latency = SlimLatency(model, X, groups, LayerLatencies(PLACE, None, measure))
    if scores is None:
        draw = torch.Generator().manual_seed(1)
        scores = {group.name: torch.rand(group.width, generator=draw) + 0.1 for group in groups}
    return KnapsackRanking(groups, scores, latency, **options), latency, groups


def widths_of(kept: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: len(index) for name, index in kept.items()}


def test_every_level_is_within_its_time() -> None:
    ranking, latency, groups = ranking_of(chain(32, 64, 48), by_macs)
    whole, least = latency.total({}), latency.total({group.name: 1 for group in groups})
    assert widths_of(ranking.kept(0)) == {group.name: group.width for group in groups}
    assert set(widths_of(ranking.kept(ranking.units)).values()) == {1}
    totals = []
    for level in range(0, ranking.units + 1, 16):
        allowed = whole - (whole - least) * level / ranking.units
        totals.append(latency.total(widths_of(ranking.kept(level))))
        assert totals[-1] <= allowed * (1 + 1e-6)
    assert all(total > 0.8 * (whole - (whole - least) * i * 16 / ranking.units) for i, total in enumerate(totals[:-3]))


def test_layers_that_depend_on_each_other_are_chosen_nearly_as_by_trying_all() -> None:
    """Rounds with the others' widths of the last round find the best pair of widths mostly, and one close to it always.

    Where every layer's time is a product of two widths, no round by round way is sure of the best.
    """
    model, options, found = chain(16, 16), grid(16).tolist(), []
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        names = [group.name for group in find_groups(model, X) if group.fixed is None]
        scores = {name: torch.rand(16, generator=draw, dtype=torch.float64) ** 2 + 0.01 for name in names}
        ranking, latency, _ = ranking_of(model, by_macs, scores)
        worths = [torch.cat([torch.zeros(1), scores[n].sort(descending=True).values.cumsum(0)]) for n in names]
        allowed = 0.5 * (latency.total({}) + latency.total(dict.fromkeys(names, 1)))
        best = max(
            float(worths[0][a] + worths[1][b])
            for a, b in itertools.product(options, repeat=2)
            if latency.total(dict(zip(names, (a, b), strict=True))) <= allowed
        )
        kept = ranking.kept(ranking.units // 2)
        found.append(sum(float(scores[name][index].sum()) for name, index in kept.items()) / best)
    assert max(found) <= 1 + 1e-9
    assert min(found) > 0.97
    assert sum(share > 1 - 1e-9 for share in found) > 6


def test_the_channels_of_a_group_leave_in_the_order_of_their_scores() -> None:
    ranking, _, groups = ranking_of(chain(32, 32), by_macs)
    draw = torch.Generator().manual_seed(1)
    scores = {group.name: torch.rand(group.width, generator=draw) + 0.1 for group in groups}
    for name, index in ranking.kept(150).items():
        gone = torch.ones(32, dtype=torch.bool)
        gone[index] = False
        assert not gone.any() or scores[name][gone].max() <= scores[name][index].min()


@pytest.mark.parametrize("level", [40, 100, 160, 220])
def test_widths_lie_on_the_edges_of_a_staircase(level: int) -> None:
    """A channel more on the same step is free, so a width inside a step is never the better choice."""
    ranking, _, _ = ranking_of(chain(64, 128, 64), by_tiles)
    for width in widths_of(ranking.kept(level)).values():
        assert width % 16 == 0, width


def test_a_slow_width_is_passed_over() -> None:
    """A kernel that is slow at 48 channels and fast at 32 and 64: HALP's point."""

    def slow_at_48(layer: LayerShape, _: Place) -> float:
        return 10.0 if 32 < layer.outputs < 64 and layer.kind == "conv2d" else layer.outputs / 16

    for level in range(0, 257, 8):
        ranking, _, groups = ranking_of(chain(64), slow_at_48)
        assert not 32 < widths_of(ranking.kept(level))[groups[0].name] < 64


def test_what_is_gone_stays_gone_and_what_must_stay_stays() -> None:
    model = chain(32, 32)
    first, second = (group.name for group in find_groups(model, X) if group.fixed is None)
    scores = {first: torch.rand(32) + 1, second: torch.full((32,), math.inf)}
    scores[first][:8] = -math.inf
    ranking, _, _ = ranking_of(model, by_macs, scores)
    for level in (0, 64, 200, ranking.units):
        kept = ranking.kept(level)
        assert not set(kept[first].tolist()) & set(range(8))
        assert len(kept[second]) == 32


def test_what_is_worth_nothing_stays_while_there_is_time() -> None:
    """Scores below zero promise a lower loss; a budget of 90 % must not take half of the network for it."""
    model = chain(32, 32)
    scores = {group.name: torch.full((32,), -1.0) for group in find_groups(model, X) if group.fixed is None}
    ranking, latency, _ = ranking_of(model, by_macs, scores)
    assert latency.total(widths_of(ranking.kept(ranking.units // 10))) > 0.8 * latency.total({})


def test_rounding_and_least_widths_hold() -> None:
    ranking, _, groups = ranking_of(chain(40, 64), by_macs, round_to=8, min_channels=12)
    for level in range(0, ranking.units + 1, 16):
        for group in groups:
            width = widths_of(ranking.kept(level))[group.name]
            assert width % 8 == 0
            assert width >= 16


# -- plans ----------------------------------------------------------------------------------------------------


def tiles_of(model: nn.Module) -> float:
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return 4.0 + sum(math.ceil(m.weight.shape[0] / 16) * math.ceil(m.weight.shape[1] / 16) for m in layers)


def pair_by_tiles(first: nn.Module, second: nn.Module, _: Any, sizes: Any, **__: Any) -> list[LatencyPair]:
    a, b = (Measured(sizes[0], ms, 0.0, 1e3 / ms, 1, "cpu", "float32", 1) for ms in map(tiles_of, (first, second)))
    return [LatencyPair(a, b, b.median_ms / a.median_ms, 1)]


def test_a_plan_holds_its_budget_on_a_staircase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_budget, "measure_pair", pair_by_tiles)
    monkeypatch.setattr(latency_budget, "table_of", lambda place: LayerLatencies(place, None, by_tiles))
    model = chain(64, 128, 64)
    plan = plan_channels(model, X, Magnitude(), [], lambda *_: None, Latency(0.6))  # type: ignore[arg-type,return-value]
    assert all(len(entry.kept) % 16 == 0 for entry in plan.groups)
    timing = plan.provenance["latency"]
    assert timing["ratio"] <= 0.6
    assert timing["chosen_by"] == "knapsack"
    assert timing["predicted_ratio"] == pytest.approx(timing["ratio"], abs=1e-9)
    dense = tiles_of(model)
    assert tiles_of(plan.apply(model, X)) / dense == timing["ratio"]


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(number: int) -> list[Any]:
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 3, 8, 8, generator=draw), torch.randint(0, 5, (8,), generator=draw)) for _ in range(number)]


@pytest.mark.parametrize(("schedule", "steps"), [(OneShot(), 1), (Gradual(3), 3), (Iterative(20, 1), 2)])
def test_every_schedule_ends_within_the_budget(monkeypatch: pytest.MonkeyPatch, schedule: Any, steps: int) -> None:
    latency_by_macs.use(monkeypatch)
    plan = plan_channels(chain(24, 32, 24), X, TaylorFO(), batches(12), loss_fn, Latency(0.5), schedule=schedule)
    assert plan.provenance["latency"]["ratio"] <= 0.5
    assert plan.provenance["latency"]["chosen_by"] == "knapsack"
    sizes = [step["channels"] for step in plan.provenance["steps"]]
    assert len(sizes) >= steps
    assert sizes == sorted(sizes, reverse=True)


def test_an_order_of_removal_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions in an order are no worths to add up: such a criterion's own order is followed."""
    latency_by_macs.use(monkeypatch)
    plan = plan_channels(chain(16, 16), X, OBS(), batches(3), loss_fn, Latency(0.7))
    assert plan.provenance["latency"]["chosen_by"] == "order"
    assert plan.provenance["latency"]["ratio"] <= 0.7
