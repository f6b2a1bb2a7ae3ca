"""The Oracle's engine beside the plain loop: the same numbers, and the page that shows both."""

import pytest
from torch import nn

from nni_plugin.benchmarks import oracle_speed


def network() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))


def test_both_measure_the_same_loss_changes() -> None:
    case = oracle_speed.measure(network, (8, 1, 9, 9), rounds=1, sampled=3)
    assert case["channels"] == 10
    assert case["largest_difference_of_a_loss_change"] < 1e-6
    assert case["times_faster"] == pytest.approx(case["plain_loop_seconds"] / case["engine_seconds"])


def test_the_page_shows_what_was_measured() -> None:
    case = {
        "channels": 448, "plain_loop_seconds": 12.34, "engine_seconds": 3.0, "times_faster": 4.1,
        "largest_difference_of_a_loss_change": 3e-7,
    }  # fmt: skip
    page = oracle_speed.render({"rounds": 3, "threads": 1, "cases": {"some": case}})
    assert "| some | 448 | 12.3 | 3.0 | 4.1 | 3e-07 |" in page
