"""Memory is that of a process of its own, and scoring a small network adds little."""

import pytest

from nni_plugin.benchmarks import scoring_memory
from nni_plugin.benchmarks.__main__ import BENCHMARKS
from nni_plugin.errors import CriterionError


@pytest.mark.parametrize("method", ["taylor-fo", "taylor-fisher"])
def test_scoring_adds_at_most_the_goal(method: str) -> None:
    result = scoring_memory.run(("mobilenetv2_100",), (method,), batch=16, size=128)
    case = result["cases"]["mobilenetv2_100"]
    assert case["forward_backward_mib"] > 100
    assert 0.9 < case["with"][method]["ratio"] <= scoring_memory.GOAL
    page = scoring_memory.render(result)
    assert f"| mobilenetv2_100 | {case['forward_backward_mib']:.0f} | {case['with'][method]['mib']:.0f} (" in page


def test_memory_grows_with_the_minibatch() -> None:
    small, large = (
        scoring_memory.run(("mobilenetv2_100",), (), batch=batch, size=128)["cases"]["mobilenetv2_100"]
        for batch in (8, 24)
    )
    assert large["forward_backward_mib"] > 1.5 * small["forward_backward_mib"]


def test_a_failure_is_told() -> None:
    with pytest.raises(CriterionError, match="taylor-foo"):
        scoring_memory.run(("mobilenetv2_100",), ("taylor-foo",), batch=4, size=64, minibatches=1)


def test_it_is_run_by_name() -> None:
    assert BENCHMARKS["scoring_memory"] is scoring_memory
