"""The search for MACs that give a latency, on times that are made up."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from nni_plugin.adapters.host_task import HostPruned
from nni_plugin.budgets import Latency, MACs
from nni_plugin.comparison import latency_target
from nni_plugin.comparison.latency_target import macs_at_latency
from nni_plugin.errors import BudgetError


class Sized(nn.Module):
    """A network that only knows how large it is."""

    def __init__(self, macs: float) -> None:
        super().__init__()
        self.macs = macs


def prune(budget: MACs) -> HostPruned:
    if budget.ratio < 0.1:
        raise BudgetError("too small")
    return HostPruned(Sized(budget.ratio), {})


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network takes 0.3 of the dense time, and the rest in proportion to its MACs; the dense one takes 10 ms."""

    def pair(dense: Any, slim: Sized, *_: Any, **__: Any) -> Any:
        return [SimpleNamespace(ratio=0.3 + 0.7 * slim.macs)]

    monkeypatch.setattr(latency_target, "measure_pair", pair)
    monkeypatch.setattr(latency_target, "measure_latency", lambda *_, **__: [SimpleNamespace(median_ms=10.0)])


@pytest.mark.parametrize("budget", [Latency(ratio=0.6), Latency(ms=6.0)])
def test_the_network_is_just_fast_enough(budget: Latency) -> None:
    found = macs_at_latency(prune, Sized(1.0), budget, (1, 8, 8), "cpu")
    latency = 0.3 + 0.7 * found
    assert 0.97 * 0.6 <= latency <= 0.6


def test_a_latency_out_of_reach_is_refused_with_what_was_reached() -> None:
    with pytest.raises(BudgetError, match=r"0\.300 .* reached 0\.3[78]"):
        macs_at_latency(prune, Sized(1.0), Latency(ratio=0.3), (1, 8, 8), "cpu")
