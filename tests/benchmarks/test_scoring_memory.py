"""The page of the memory benchmark, and what it says when a measurement fails; the measuring is left to it."""

import pytest

from nni_plugin.benchmarks import scoring_memory
from nni_plugin.benchmarks.__main__ import BENCHMARKS
from nni_plugin.errors import NNIPluginError


def test_page_shows_what_was_measured() -> None:
    settings = {"batch": 8, "size": 224, "minibatches": 2, "rounds": 1, "threads": 1}
    case = {"forward_backward_mib": 100.0, "with": {"obs": {"mib": 104.0, "ratio": 1.04}}}
    page = scoring_memory.render({"settings": settings, "goal": 1.25, "cases": {"net": case}})
    assert "| net | 100 | 104 (1.04) |" in page


def test_a_failure_is_told() -> None:
    with pytest.raises(NNIPluginError, match=r"Measuring no_such_network none .* failed: .*no_such_network"):
        scoring_memory.run(("no_such_network",), ())


def test_it_is_run_by_name() -> None:
    assert BENCHMARKS["scoring_memory"] is scoring_memory
