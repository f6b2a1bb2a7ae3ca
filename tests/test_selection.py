"""Ranking and solving, against a search through all possibilities."""

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_plugin import Channels, Cost, MACs
from nni_plugin.budgets import Size
from nni_plugin.errors import BudgetError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.selection import Ranking, solve


def group(name: str, width: int, period: int | None = None) -> ChannelGroup:
    """A group of `width` channels; channels with equal `i % period` are tied."""
    index = torch.arange(width)
    ties = None if period is None else index % period
    return ChannelGroup(name, width, (Member(name, "out", "dense", index, index, (), ties),))


def size_of(kept: dict[str, torch.Tensor]) -> Size:
    """As in a chain of layers: products of neighbouring widths."""
    widths = [3, *(len(index) for index in kept.values()), 10]
    macs = sum(a * b for a, b in itertools.pairwise(widths))
    return Size(Cost(macs, macs + sum(widths)), sum(widths[1:-1]))


def lists(kept: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in kept.items()}


def whole(groups: list[ChannelGroup]) -> dict[str, torch.Tensor]:
    return {g.name: torch.arange(g.width) for g in groups}


GROUPS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.booleans()), min_size=1, max_size=4).map(
    lambda shapes: [
        group(f"g{i}", units * size, units if tied else None) for i, (units, size, tied) in enumerate(shapes)
    ]
)


@st.composite
def rankings(draw: Any) -> tuple[list[ChannelGroup], dict[str, torch.Tensor], int, int]:
    groups = draw(GROUPS)
    # Few values, so that many scores are equal.
    scores = {
        g.name: torch.tensor(
            draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.0]), min_size=g.width, max_size=g.width))
        )
        for g in groups
    }
    return groups, scores, draw(st.integers(1, 4)), draw(st.integers(1, 5))


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(rankings())
def test_what_is_kept_at_every_number_of_removals(case: Any) -> None:
    groups, scores, round_to, minimum = case
    ranking = Ranking(groups, scores, round_to=round_to, min_channels=minimum)
    assert ranking.units == sum(g.units for g in groups)
    assert lists(ranking.kept(0)) == lists(whole(groups))
    # All units of all groups, in ascending order of their sums, earlier groups and channels first.
    order = sorted(
        (float(scores[g.name][g.unit == unit].double().sum()), number, unit)
        for number, g in enumerate(groups)
        for unit in range(g.units)
    )
    previous = ranking.kept(0)
    for removed in range(ranking.units + 1):
        kept = ranking.kept(removed)
        assert list(kept) == [g.name for g in groups]
        for number, g in enumerate(groups):
            index = kept[g.name]
            assert index.tolist() == sorted(set(index.tolist()))
            labels = set(g.unit[index].tolist())
            assert len(index) == int(torch.isin(g.unit, torch.tensor(sorted(labels))).sum())  # no tie parted
            assert len(index) >= min(minimum, g.width)
            assert len(index) > 0
            assert len(index) % round_to == 0 or len(index) == g.width
            assert set(index.tolist()) <= set(previous[g.name].tolist())
            # The nearest width that is allowed, the wider of two equally near.
            asked = sum(1 for _, owner, _ in order[:removed] if owner == number)
            mine = [unit for _, owner, unit in order if owner == number]
            widths = {gone: int((~torch.isin(g.unit, torch.tensor(mine[:gone]))).sum()) for gone in range(g.units + 1)}
            allowed = [w for gone, w in widths.items() if gone == 0 or (w and w % round_to == 0 and w >= minimum)]
            assert len(index) == min(allowed, key=lambda w: (abs(w - widths[asked]), -w))
            gone = next(gone for gone, w in widths.items() if w == len(index))
            assert labels == set(mine[gone:])
        previous = kept


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(rankings(), st.floats(0.01, 1.0), st.booleans())
def test_a_budget_is_met_and_one_unit_less_does_not(case: Any, ratio: float, channels: bool) -> None:
    groups, scores, round_to, minimum = case
    ranking = Ranking(groups, scores, round_to=round_to, min_channels=minimum)
    dense = size_of(whole(groups))
    budget = Channels(max(1, int(ratio * dense.channels))) if channels else MACs(ratio)
    limit = budget.limit(dense)
    reachable = [n for n in range(ranking.units + 1) if budget.value(size_of(ranking.kept(n))) <= limit]
    if not reachable:
        with pytest.raises(BudgetError) as error:
            solve(ranking, budget, dense, size_of)
        least = budget.value(size_of(ranking.kept(ranking.units)))
        assert re.search(rf"allows {limit:,} of {budget.value(dense):,}.* {least:,} remain", str(error.value))
        return
    units, kept = solve(ranking, budget, dense, size_of)
    assert units == min(reachable)
    assert lists(kept) == lists(ranking.kept(units))


@given(st.integers(1, 12))
def test_any_number_of_equal_channels_exactly(count: int) -> None:
    groups = [group("a", 6), group("b", 7)]
    ranking = Ranking(groups, {g.name: torch.zeros(g.width) for g in groups})
    dense = size_of(whole(groups))
    if count == 1:
        with pytest.raises(BudgetError):
            solve(ranking, Channels(1), dense, size_of)
    else:
        _, kept = solve(ranking, Channels(count), dense, size_of)
        assert size_of(kept).channels == count


def test_ties_go_in_the_order_of_the_network() -> None:
    ranking = Ranking([group("a", 3), group("b", 3)], {"a": torch.ones(3), "b": torch.tensor([1.0, 0.0, 1.0])})
    assert lists(ranking.kept(1)) == {"a": [0, 1, 2], "b": [0, 2]}
    assert lists(ranking.kept(2)) == {"a": [1, 2], "b": [0, 2]}
    assert lists(ranking.kept(3)) == {"a": [2], "b": [0, 2]}


def test_channels_removed_before_go_first_and_infinite_ones_last() -> None:
    scores = {"a": torch.tensor([5.0, -torch.inf, 3.0]), "b": torch.full((3,), torch.inf)}
    ranking = Ranking([group("a", 3), group("b", 3)], scores)
    assert lists(ranking.kept(1))["a"] == [0, 2]
    assert lists(ranking.kept(3)) == {"a": [0], "b": [0, 1, 2]}


def test_tied_channels_score_their_sum() -> None:
    # Units {0, 2} and {1, 3}: 1 + 4 against 2 + 2; and a free channel of 4.5 between them.
    ranking = Ranking(
        [group("a", 4, 2), group("b", 2)], {"a": torch.tensor([1.0, 2.0, 4.0, 2.0]), "b": torch.tensor([4.5, 9.0])}
    )
    assert [lists(ranking.kept(n)) for n in (1, 2)] == [{"a": [0, 2], "b": [0, 1]}, {"a": [0, 2], "b": [1]}]


def test_fewest() -> None:
    ranking = Ranking([group("a", 5)], {"a": torch.arange(5)})
    assert ranking.fewest(lambda kept: len(kept["a"]) <= 3) == 2
    assert ranking.fewest(lambda kept: True) == 0
    assert ranking.fewest(lambda kept: False) is None
    assert ranking.fewest(lambda kept: len(kept["a"]) <= 1) == 4


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
@pytest.mark.parametrize("name", ["round_to", "min_channels"])
def test_bad_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(BudgetError, match=name):
        Ranking([group("a", 3)], {"a": torch.zeros(3)}, **{name: value})
