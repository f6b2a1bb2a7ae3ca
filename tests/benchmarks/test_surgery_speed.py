"""The speed of surgery, on a small network: both ways agree, the page says what was found, a difference is told."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_plugin.benchmarks import __main__ as program
from nni_plugin.benchmarks import surgery_speed
from nni_plugin.errors import SurgeryError

ROOT = Path(__file__).parents[2]


def test_measures_both_ways_on_the_same_channels() -> None:
    threads = torch.get_num_threads()
    result = surgery_speed.run(("test_resnet",), channels=12, rounds=2, size=32)
    assert torch.get_num_threads() == threads
    case = result["cases"]["test_resnet"]
    assert case["channels"] >= 12
    assert 0 < case["groups_cut"] <= case["groups_agreed"] <= case["groups"]
    assert {len(numbers) for numbers in case["rounds_s"].values()} == {2}
    assert all(number > 0 for number in case["median_s"].values())
    assert "| test_resnet |" in surgery_speed.render(result)


def test_other_seeds_remove_other_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    groups = [g for g in surgery_speed.find_groups(model, torch.randn(1, 3, 4, 4)) if g.fixed is None]
    drawn = [surgery_speed.drawn(groups, 5, seed) for seed in (0, 0, 1)]
    as_lists = [{name: kept.tolist() for name, kept in kept_by_group.items()} for kept_by_group in drawn]
    assert as_lists[0] == as_lists[1] != as_lists[2]
    assert sum(len(kept) for kept in as_lists[0].values()) == 14 - 5
    everything = surgery_speed.drawn(groups, 100, 0)
    assert {name: len(kept) for name, kept in everything.items()} == {"0": 1, "2": 1}


@pytest.mark.parametrize("change", ["tensor", "output"])
def test_a_difference_is_told(change: str) -> None:
    one, other = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    other.load_state_dict(one.state_dict())
    surgery_speed.check_equal(one, other, torch.ones(1, 3), "net")
    if change == "tensor":
        other[0].bias.data[1] += 1
        expected = r"net: .* differ at 0\.bias"
    else:
        other[0].register_forward_hook(lambda *found: found[-1] + 1)
        expected = "net: .* differ at the output"
    with pytest.raises(SurgeryError, match=expected):
        surgery_speed.check_equal(one, other, torch.ones(1, 3), "net")


def test_page_shows_ratios_to_the_step_of_torch_pruning() -> None:
    median = {"theirs_find": 2.0, "theirs_groups": 1.0, "theirs_prune": 0.5, "ours_find": 0.25, "ours_mask": 0.015}
    median |= {"ours_cut": 0.1, "ours_renumber": 0.05, "copy": 0.02}
    case = {"groups": 9, "groups_agreed": 7, "groups_cut": 5, "median_s": median}
    settings = {"channels": 100, "rounds": 5, "seed": 0, "size": 224, "images": 1, "threads": 1}
    page = surgery_speed.render({"settings": settings, "goal": 10.0, "find_goal": 3.0, "cases": {"net": case}})
    assert "| net | 5 | 1.500 | 0.0150 (100.0) | 0.150 (10.0) | 0.100 + 0.050 | 0.020 |" in page
    assert "| net | 9 | 7 | 2.00 | 0.25 |" in page


def test_it_is_run_by_name() -> None:
    assert program.BENCHMARKS["surgery_speed"] is surgery_speed


def test_committed_page_is_made_of_the_committed_numbers(tmp_path: Path) -> None:
    numbers, page = ROOT / "benchmarks/results/surgery_speed.json", ROOT / "docs/surgery_speed.md"
    assert numbers.exists() == page.exists(), "commit both: `python -m nni_plugin.benchmarks surgery_speed`"
    if numbers.exists():
        program.write_page(surgery_speed, json.loads(numbers.read_text()), tmp_path / "surgery_speed.md")
        assert (tmp_path / "surgery_speed.md").read_text() == page.read_text()
