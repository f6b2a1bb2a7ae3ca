"""Follows `test_norm_pruner` and `test_slim_taylor_pruner` of NNI's pruning/test_pruner.py."""

from pathlib import Path
from typing import Any

import pytest
from nni.compression.utils import auto_set_denpendency_group_ids
from referee import BY_DATA, BY_WEIGHTS, CONTROL_BY_DATA, CONTROL_BY_WEIGHTS, Case, X, slots

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["pytorch", "pytorch_lightning", "lightning.pytorch"]


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path)


@pytest.mark.parametrize("pruner_type", slots(BY_WEIGHTS, CONTROL_BY_WEIGHTS))
def test_pruners_of_weights_by_nnis_dependencies_alone(case: Case, pruner_type: Any) -> None:
    """As NNI's tests call them: with the config_list and nothing that tells of the network's graph."""
    pruner = pruner_type(case.model, case.dependent_config)
    _, masks = pruner.compress()
    case.finish(pruner, masks)


@pytest.mark.parametrize("dependent", [True, False])
@pytest.mark.parametrize("pruner_type", slots(BY_WEIGHTS))
def test_pruners_of_weights_find_dependencies(case: Case, pruner_type: Any, dependent: bool) -> None:
    pruner = pruner_type(case.model, case.dependent_config if dependent else case.config, case.evaluator)
    _, masks = pruner.compress()
    case.finish(pruner, masks)


@pytest.mark.parametrize("pruner_type", slots(BY_DATA, CONTROL_BY_DATA))
def test_pruners_that_train_by_nnis_dependencies(case: Case, pruner_type: Any) -> None:
    pruner = pruner_type(case.model, case.dependent_config, evaluator=case.evaluator, training_steps=20)
    _, masks = pruner.compress()
    case.finish(pruner, masks)


@pytest.mark.parametrize("pruner_type", slots(BY_DATA))
def test_pruners_that_train_find_dependencies(case: Case, pruner_type: Any) -> None:
    pruner = pruner_type(case.model, case.config, evaluator=case.evaluator, training_steps=20)
    _, masks = pruner.compress()
    case.finish(pruner, masks)


@pytest.mark.parametrize("pruner_type", slots(BY_WEIGHTS, CONTROL_BY_WEIGHTS))
def test_dependencies_as_nni_itself_writes_them(tmp_path: Path, pruner_type: Any) -> None:
    """Where it can: `Case.dependent_config` has what it writes."""
    pytest.importorskip("tensorboard", reason="auto_set_denpendency_group_ids needs it, undeclared")
    case = Case("pytorch", tmp_path)
    pruner = pruner_type(case.model, auto_set_denpendency_group_ids(case.model, case.config, X))
    _, masks = pruner.compress()
    case.finish(pruner, masks)
