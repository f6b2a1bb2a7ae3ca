"""A clock that cannot jitter: a network takes a millisecond for every ten thousand MACs, and a fixed time besides."""

from typing import Any

import pytest
import torch
from torch import nn

from nni_plugin import latency_budget
from nni_plugin.cost import count
from nni_plugin.latency import Latency, LatencyPair

FIXED_MS = 1.0


def milliseconds(model: nn.Module, shape: tuple[int, int, int]) -> float:
    dtype = next(model.parameters()).dtype
    return FIXED_MS + count(model, torch.zeros(1, *shape, dtype=dtype)).macs / 1e4


def measure_pair(first: nn.Module, second: nn.Module, shape: Any, sizes: Any, **_: Any) -> list[LatencyPair]:
    times = [milliseconds(model, shape) for model in (first, second)]
    one, two = (Latency(sizes[0], ms, 0.0, 1e3 * sizes[0] / ms, 1, "cpu", "float32", 1) for ms in times)
    return [LatencyPair(one, two, times[1] / times[0], 1)]


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let latency budgets look at this clock."""
    monkeypatch.setattr(latency_budget, "measure_pair", measure_pair)
