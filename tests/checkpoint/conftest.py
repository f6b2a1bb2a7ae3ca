"""A pruned network, and a folder that it was saved to."""

import copy
from pathlib import Path
from typing import Any

import pytest
from checkpoints import pruned_resnet20

from nni_plugin.checkpoint import save_pretrained


@pytest.fixture
def network() -> Any:
    return copy.deepcopy(pruned_resnet20())


@pytest.fixture
def saved(network: Any, tmp_path: Path) -> Path:
    return save_pretrained(network, tmp_path / "saved")
