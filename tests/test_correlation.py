"""Rank correlation against rankings made by hand: ties, constant scores, groups that agree inside but not across."""

import math
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nni_plugin.correlation import correlate, kendall, pearson, ranks, spearman
from nni_plugin.errors import CriterionError

few = st.lists(st.integers(-3, 3), min_size=3, max_size=12)


def _array(*values):
    return np.array(values, dtype=np.float64)


def _tau_b(first, second):
    agree = tied_first = tied_second = pairs = 0
    for i, j in combinations(range(len(first)), 2):
        a, b = np.sign(first[i] - first[j]), np.sign(second[i] - second[j])
        agree, pairs = agree + a * b, pairs + 1
        tied_first, tied_second = tied_first + (a == 0), tied_second + (b == 0)
    return agree / math.sqrt((pairs - tied_first) * (pairs - tied_second))


def test_by_hand_without_ties():
    # Differences of ranks 1, 1, 1, 1, 0: rho = 1 - 6 * 4 / (5 * 24); 8 pairs agree and 2 do not.
    first, second = _array(1, 2, 3, 4, 5), _array(20, 10, 400, 300, 5000)
    assert spearman(first, second) == pytest.approx(0.8, abs=1e-12)
    assert kendall(first, second) == pytest.approx(0.6, abs=1e-12)


def test_by_hand_with_ties():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    first, second = _array(1, 2, 2, 3), _array(1, 2, 3, 4)
    assert spearman(first, second) == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-12)
    assert kendall(first, second) == pytest.approx(5 / math.sqrt(5 * 6), abs=1e-12)


@given(few, st.randoms(use_true_random=False))
def test_is_pearson_of_ranks_and_kendall_counts_pairs(values, random):
    first = _array(*values)
    second = _array(*random.sample(values, len(values)))
    if len(set(values)) == 1:
        assert math.isnan(spearman(first, second))
        return
    assert spearman(first, second) == pytest.approx(np.corrcoef(ranks(first), ranks(second))[0, 1], abs=1e-9)
    assert kendall(first, second) == pytest.approx(_tau_b(first, second), abs=1e-9)
    assert spearman(first, second) == pytest.approx(spearman(first, 2 * second**3 + 1), abs=1e-12)
    assert spearman(first, -second) == pytest.approx(-spearman(first, second), abs=1e-12)


def test_pearson_sees_the_numbers():
    first, second = _array(1, 2, 3), _array(1, 2, 30)
    assert pearson(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-12)
    assert spearman(first, second) == pytest.approx(1)


@pytest.mark.parametrize("measure", [spearman, kendall, pearson])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_array(1, 1, 1, 1), _array(1, 2, 3, 4)),
        (_array(1, 2, 3, 4), _array(0, 0, 0, 0)),
        (_array(1, 2), _array(1, 2)),
        (_array(), _array()),
    ],
)
def test_not_defined_is_nan_without_a_warning(measure, first, second):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(measure(first, second))


def test_right_inside_groups_wrong_across():
    changes = {"a": torch.arange(5.0), "b": torch.arange(5.0) + 100}
    scores = {"a": torch.arange(5.0) + 100, "b": torch.arange(5.0)}
    found = correlate(scores, changes)
    assert found.spearman_per_group == pytest.approx(1)
    assert found.spearman < 0
    assert found.channels == 10
    assert correlate(changes, changes).spearman == pytest.approx(1)


def test_groups_count_once_each_where_they_are_defined():
    changes = {"a": torch.arange(9.0), "b": torch.arange(3.0), "two": torch.arange(2.0), "flat": torch.zeros(4)}
    scores = {
        "a": torch.arange(9.0),
        "b": -torch.arange(3.0),
        "two": torch.tensor([1.0, 0.0]),
        "flat": torch.arange(4.0),
    }
    assert correlate(scores, changes).spearman_per_group == pytest.approx(0)


def test_the_order_of_groups_is_of_no_account():
    torch.manual_seed(0)
    scores = {name: torch.rand(6) for name in "abc"}
    changes = {name: torch.rand(6) for name in "cab"}
    backwards = dict(reversed(scores.items()))
    assert correlate(scores, changes).spearman == pytest.approx(correlate(backwards, changes).spearman)


def test_groups_that_are_not_scored_are_left_out():
    changes = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
    assert correlate({"a": torch.arange(4.0)}, changes).channels == 4
    nothing = correlate({}, changes)
    assert nothing.channels == 0
    assert math.isnan(nothing.spearman)
    assert math.isnan(nothing.spearman_per_group)


def test_half_precision_scores_are_ranked():
    changes = {"a": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    assert correlate({"a": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)}, changes).spearman == 1


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"b": torch.arange(3.0)}, "no such group"),
        ({"a": torch.arange(4.0)}, "shape"),
        ({"a": torch.tensor([1.0, math.nan, 2.0])}, "not finite"),
        ({"a": torch.tensor([1.0, math.inf, 2.0])}, "not finite"),
    ],
)
def test_what_cannot_be_compared(scores, said):
    with pytest.raises(CriterionError, match=said):
        correlate(scores, {"a": torch.arange(3.0)})


def test_ranks_go_from_zero_to_one():
    assert ranks(_array(30, 10, 20)).tolist() == [1.0, 0.0, 0.5]
    assert ranks(_array(7)).tolist() == [0.0]
