"""The scale of Optimal Brain Surgeon, made small: a process of its own measures, a page says what was found."""

import json
from pathlib import Path

import pytest

from nni_plugin.benchmarks import __main__ as program
from nni_plugin.benchmarks import obs_scale

ROOT = Path(__file__).parents[2]


def test_measures_a_network_in_a_process_of_its_own() -> None:
    result = obs_scale.run(networks=("resnet18",), samples=16, threads=1)
    case = result["cases"]["resnet18"]
    assert case["gates"] == obs_scale.gates("resnet18") > 2000
    assert case["seconds_order"] > 0
    assert case["mib"] > case["mib_gradients"] == pytest.approx(16 * case["gates"] * 4 / 2**20)
    assert f"| resnet18 | {case['gates']} |" in obs_scale.render(result)


def test_committed_page_is_made_of_the_committed_numbers(tmp_path: Path) -> None:
    numbers, page = ROOT / "benchmarks/results/obs_scale.json", ROOT / "docs/obs_scale.md"
    assert numbers.exists() == page.exists(), "commit both: `python -m nni_plugin.benchmarks obs_scale`"
    if numbers.exists():
        program.write_page(obs_scale, json.loads(numbers.read_text()), tmp_path / "obs_scale.md")
        assert (tmp_path / "obs_scale.md").read_text() == page.read_text()
