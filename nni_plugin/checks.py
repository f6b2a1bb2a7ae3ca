"""What a pruner of channels is asked for, checked before anything runs."""

from __future__ import annotations

from typing import Any, Literal, get_args

from nni_plugin.budgets import Budget, Layers
from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import BudgetError, CriterionError, NNIPluginError, ScheduleError
from nni_plugin.schedules import OneShot, Schedule
from nni_plugin.scorer import ForeignCriterion

Selection = Literal["all", "skip-only", "no-skip"]
"""Which groups may be pruned: all, those that residual additions couple across blocks, or the others."""

CutWhen = Literal["end", "step", "never"]
"""When channels leave the network physically."""


def checked_criterion(criterion: Any) -> Criterion | ForeignCriterion:
    """Return a criterion as it is.

    Args:
        criterion: What was given as one.

    Raises:
        CriterionError: It is a name, a class or anything else that cannot be called with a group.
    """
    if isinstance(criterion, type):
        raise CriterionError(
            f"Expected a criterion, got the class {criterion.__name__}: give an instance, {criterion.__name__}()."
        )
    if not callable(criterion):
        raise CriterionError(
            "Expected a criterion, such as TaylorFO() or nni_plugin.methods.create_criterion('taylor-fo'), "
            f"got {criterion!r}."
        )
    return criterion  # type: ignore[no-any-return]


def checked_budget(budget: Any) -> Budget:
    """Return a budget of channels as it is.

    Raises:
        BudgetError: It is none, or counts whole blocks.
    """
    if not isinstance(budget, Budget):
        raise BudgetError(
            f"Expected a budget, such as MACs(0.5), Params(0.5), Channels(100) or Latency(0.5), got {budget!r}."
        )
    if isinstance(budget, Layers):
        raise BudgetError(f"{budget} counts whole blocks, and channels leave: plan with plan_layers.")
    return budget


def checked_schedule(schedule: Any) -> Schedule:
    """Return a schedule as it is; everything in one step for None.

    Raises:
        ScheduleError: It is none.
    """
    if schedule is None:
        return OneShot()
    if not isinstance(schedule, Schedule):
        raise ScheduleError(f"Expected a schedule, such as OneShot(), Gradual(10) or Iterative(100), got {schedule!r}.")
    return schedule


def checked_choice(name: str, value: Any, choices: Any, error: type[NNIPluginError]) -> Any:
    """Return one of several words as it is.

    Args:
        name: Of the argument.
        value: What was given.
        choices: `Selection` or `CutWhen`.
        error: What is raised for another.
    """
    words = get_args(choices)
    if value not in words:
        raise error(f"{name} must be {', '.join(map(repr, words[:-1]))} or {words[-1]!r}, got {value!r}.")
    return value
