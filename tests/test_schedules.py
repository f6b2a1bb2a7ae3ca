"""Schedules: which minibatches are due, and which values are refused."""

import math
from typing import Any

import pytest

from nni_plugin import Continuous, Iterative, OneShot
from nni_plugin.errors import ScheduleError


@pytest.mark.parametrize("value", [0, -1, 1.5, 30.0, True, "30", math.nan])
@pytest.mark.parametrize("build", [OneShot, lambda v: Iterative(v, 1), lambda v: Iterative(1, v), Continuous])
def test_counts_must_be_positive_integers(build: Any, value: Any) -> None:
    with pytest.raises(ScheduleError, match="integer of at least 1"):
        build(value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, 2, math.nan, math.inf, True, "0.9", None])
@pytest.mark.parametrize("schedule", [Iterative, Continuous])
def test_momentum_is_below_one(schedule: Any, value: Any) -> None:
    with pytest.raises(ScheduleError, match="momentum"):
        schedule(momentum=value)


@pytest.mark.parametrize("value", [math.nan, "1", None, True])
def test_a_threshold_is_a_number(value: Any) -> None:
    """A threshold that compares false with everything would never prune, silently."""
    with pytest.raises(ScheduleError, match="loss_threshold"):
        Continuous(loss_threshold=value)


def test_the_papers_settings_are_the_defaults() -> None:
    assert Iterative() == Iterative(channels=100, minibatches=30, momentum=0.9)
    assert Continuous().loss_threshold == 1.04
    assert OneShot().minibatches is None


def test_due() -> None:
    assert [Iterative(1, 3).due(n, math.inf) for n in (1, 2, 3, 4)] == [False, False, True, True]
    assert [OneShot(3).due(n, math.inf) for n in (2, 3)] == [False, True]
    assert not OneShot().due(10**6, 0.0)
    continuous = Continuous(1, 3, loss_threshold=1.0)
    assert [continuous.due(3, loss) for loss in (1.01, 1.0, 0.5)] == [False, True, True]
    assert not continuous.due(2, 0.0)
