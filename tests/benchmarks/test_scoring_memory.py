"""Memory is that of a process of its own, and scoring a small network adds little."""

import pytest

from nni_plugin.benchmarks import scoring_memory
from nni_plugin.benchmarks.__main__ import BENCHMARKS
from nni_plugin.errors import CriterionError


def test_scoring_adds_at_most_the_goal_and_memory_grows_with_the_minibatch() -> None:
    result = scoring_memory.run(("mobilenetv2_100",), ("taylor-fisher",), batch=24, size=96)
    case = result["cases"]["mobilenetv2_100"]
    assert 0.9 < case["with"]["taylor-fisher"]["ratio"] <= scoring_memory.GOAL
    page = scoring_memory.render(result)
    assert (
        f"| mobilenetv2_100 | {case['forward_backward_mib']:.0f} | {case['with']['taylor-fisher']['mib']:.0f} (" in page
    )
    small = scoring_memory.run(("mobilenetv2_100",), (), batch=12, size=96)["cases"]["mobilenetv2_100"]
    assert case["forward_backward_mib"] > 1.4 * small["forward_backward_mib"] > 50


def test_a_failure_is_told() -> None:
    with pytest.raises(CriterionError, match="Measuring no_such_network with none failed"):
        scoring_memory.run(("no_such_network",), ())


def test_it_is_run_by_name() -> None:
    assert BENCHMARKS["scoring_memory"] is scoring_memory
