"""Follows `test_scheduled_pruner` of NNI's pruning/test_pruner.py: AGPPruner and LinearPruner around every pruner."""

from pathlib import Path
from typing import Any

import pytest
from nni.compression.pruning import AGPPruner, LinearPruner
from referee import BY_DATA, BY_WEIGHTS, CONTROL_BY_DATA, CONTROL_BY_WEIGHTS, RATIO, Case, slots

pytestmark = pytest.mark.filterwarnings("ignore")
TIMES, INTERVAL = 5, 6

lightning_too = pytest.mark.parametrize("kind", ["pytorch", "lightning.pytorch"])
schedules = pytest.mark.parametrize("schedule", [AGPPruner, LinearPruner])


@lightning_too
@schedules
@pytest.mark.parametrize("pruner_type", slots(BY_WEIGHTS, CONTROL_BY_WEIGHTS))
def test_around_pruners_of_weights(kind: str, schedule: Any, pruner_type: Any, tmp_path: Path) -> None:
    """These are made without an evaluator; the schedule brings it."""
    case = Case(kind, tmp_path)
    inner = pruner_type(case.model, case.dependent_config)
    pruner = schedule(inner, interval_steps=INTERVAL, total_times=TIMES, evaluator=case.evaluator)
    _, masks = pruner.compress(INTERVAL * TIMES, None)
    case.finish(pruner, masks)


@lightning_too
@schedules
@pytest.mark.parametrize("pruner_type", slots(BY_DATA, CONTROL_BY_DATA))
def test_around_pruners_that_train(kind: str, schedule: Any, pruner_type: Any, tmp_path: Path) -> None:
    """`training_steps` is the interval, as in NNI's tests."""
    case = Case(kind, tmp_path)
    inner = pruner_type(case.model, case.dependent_config, evaluator=case.evaluator, training_steps=INTERVAL)
    pruner = schedule(inner, interval_steps=INTERVAL, total_times=TIMES)
    _, masks = pruner.compress(INTERVAL * TIMES, None)
    case.finish(pruner, masks)


@lightning_too
@schedules
@pytest.mark.parametrize("training_steps", [1, 4, 100])
def test_with_other_training_steps(kind: str, schedule: Any, training_steps: int, tmp_path: Path) -> None:
    """What NNI's tests leave out, since NNI's Taylor then ends an interval late."""
    case = Case(kind, tmp_path)
    inner = BY_DATA["taylor"](case.model, case.config, evaluator=case.evaluator, training_steps=training_steps)
    pruner = schedule(inner, interval_steps=INTERVAL, total_times=TIMES)
    _, masks = pruner.compress(INTERVAL * TIMES, None)
    case.finish(pruner, masks)


@schedules
def test_the_lag_of_nnis_own(schedule: Any, tmp_path: Path) -> None:
    """Fails the day that NNI is mended: the case above is then one for the control as well."""
    case = Case("pytorch", tmp_path)
    inner = CONTROL_BY_DATA["taylor"](case.model, case.dependent_config, evaluator=case.evaluator, training_steps=1)
    _, masks = schedule(inner, interval_steps=INTERVAL, total_times=TIMES).compress(INTERVAL * TIMES, None)
    assert 1 - float(masks["fc1"]["weight"].mean()) < RATIO
