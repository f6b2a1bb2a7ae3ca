from __future__ import annotations

from typing import Any

import pytest

from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.errors import TrainingError


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("epochs", -1),
        ("opt", "sdg"),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("sched", "plateau"),
        ("warmup_epochs", 5),
        ("min_lr", 0.2),
        ("decay_epochs", 0),
        ("decay_rate", 0.0),
        ("clip_grad", 0.0),
        ("smoothing", 1.0),
        ("mixup", -1.0),
        ("model_ema_decay", 1.0),
        ("amp", "fp8"),
        ("seed", -1),
        ("checkpoint_every", 0),
    ],
)
def test_error_names_the_flag(flag: str, value: Any) -> None:
    with pytest.raises(TrainingError, match="^--" + flag.replace("_", "-")):
        TrainingConfig(**{"epochs": 5, flag: value})


def test_no_epochs_are_allowed() -> None:
    assert TrainingConfig(epochs=0).epochs == 0
