"""Torch-Pruning's own importances by name, with its defaults, as its users call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch_pruning as tp


def _without_data(build: Callable[[], Any]) -> Callable[[], Any]:
    """Mark an importance that reads weights only, so that no minibatch is run for it."""

    def marked() -> Any:
        importance = build()
        importance.needs_gradients = False
        return importance

    return marked


IMPORTANCES: dict[str, Callable[[], Any]] = {
    "tp:magnitude": _without_data(tp.importance.GroupMagnitudeImportance),
    "tp:taylor": tp.importance.GroupTaylorImportance,
    "tp:lamp": _without_data(tp.importance.LAMPImportance),
    "tp:fpgm": _without_data(tp.importance.FPGMImportance),
    "tp:bn-scale": _without_data(tp.importance.BNScaleImportance),
    "tp:random": _without_data(tp.importance.RandomImportance),
}
