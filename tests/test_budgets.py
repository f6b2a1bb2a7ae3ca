"""Budgets: what is refused, and limits that are exact fractions of the dense network."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nni_plugin import Channels, Cost, MACs, Params
from nni_plugin.budgets import Size
from nni_plugin.errors import BudgetError

DENSE = Size(Cost(macs=1000, params=200), channels=100)


@pytest.mark.parametrize("budget", [MACs, Params])
@pytest.mark.parametrize("ratio", [0, 0.0, -1, -0.5, 1.5, 2, math.nan, math.inf, True, False, "0.5", None, [0.5]])
def test_a_ratio_that_is_none_is_refused(budget: Any, ratio: Any) -> None:
    with pytest.raises(BudgetError, match=budget.__name__) as error:
        budget(ratio)
    assert repr(ratio) in str(error.value)


@pytest.mark.parametrize("count", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, False, "3", None])
def test_a_count_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(BudgetError, match="Channels") as error:
        Channels(count)
    assert repr(count) in str(error.value)


def test_limits_and_values() -> None:
    assert (MACs(0.5).limit(DENSE), MACs(0.5).value(DENSE)) == (500, 1000)
    assert (Params(0.25).limit(DENSE), Params(1).value(DENSE)) == (50, 200)
    assert (Channels(30).limit(DENSE), Channels(30).value(DENSE)) == (30, 100)
    assert Channels(0.5).limit(DENSE) == 50
    assert Channels(1.0).limit(DENSE) == 100
    assert Channels(1).limit(DENSE) == 1
    assert MACs(0.0015).limit(DENSE) == 1


@given(st.integers(1, 1000))
def test_a_fraction_written_in_decimals_is_that_fraction(thousandths: int) -> None:
    """0.29 of 100 channels are 29, though in binary 0.29 * 100 is a little less."""
    ratio = thousandths / 1000
    for whole in (100, 1000, 3840):
        size = Size(Cost(whole, whole), whole)
        expected = math.floor(Fraction(thousandths, 1000) * whole)
        assert Channels(ratio).limit(size) == expected
        assert MACs(ratio).limit(size) == expected
        assert Params(ratio).limit(size) == expected


def test_equal_budgets_are_equal() -> None:
    assert MACs(0.5) == MACs(0.5)
    assert MACs(0.5) != Params(0.5)
    assert len({MACs(0.5), MACs(0.5), Channels(3)}) == 2
