"""Torch-Pruning's own importances by name, with its defaults, as its users call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch_pruning as tp

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "tp:magnitude": tp.importance.GroupMagnitudeImportance,
    "tp:taylor": tp.importance.GroupTaylorImportance,
    "tp:lamp": tp.importance.LAMPImportance,
    "tp:fpgm": tp.importance.FPGMImportance,
    "tp:bn-scale": tp.importance.BNScaleImportance,
    "tp:random": tp.importance.RandomImportance,
}
