"""The page of the comparison, from the numbers that are committed and from some made up."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nni_plugin.benchmarks import comparison
from nni_plugin.comparison.analysis import points
from nni_plugin.comparison.results import Row
from nni_plugin.errors import OutputError

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "comparison.json"


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text())
    return found


def test_every_point_is_on_the_page_with_its_numbers(result: dict[str, Any]) -> None:
    page = comparison.render(result)
    for network, rows in result["rows"].items():
        section = page.partition(f"## {network}\n")[2].partition("\n## ")[0]
        for point in points([Row(**row) for row in rows]):
            assert f"| {point.target} | `{point.method}` | {point.top1} | {point.top1_before_finetune} |" in section


def test_cells_are_added_to_an_earlier_result_of_the_same_dense_networks_alone(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = [row for row in result["rows"]["resnet56"] if (row["method"], row["seed"]) != ("tp:taylor", 1)]
    (tmp_path / "earlier.json").write_text(json.dumps({**result, "rows": {**result["rows"], "resnet56": kept}}))
    new = [Row(**row) for row in result["rows"]["resnet56"] if row["method"] == "tp:taylor"]
    monkeypatch.setattr(comparison, "finished_rows", lambda folder: new)
    given = {"networks": ("resnet56",), "gather": True, "onto": tmp_path / "earlier.json", "folder": tmp_path}
    joined = comparison.run(**given)
    for network, rows in result["rows"].items():
        assert sorted(joined["rows"][network], key=str) == sorted(rows, key=str)
    assert set(joined["settings"]["networks"]) == set(result["settings"]["networks"])
    with pytest.raises(OutputError, match="--lr"):
        comparison.run(**given, lr=0.5)
    new[0] = dataclasses.replace(new[0], top1_baseline=50.0)
    with pytest.raises(OutputError, match="two networks"):
        comparison.run(**given)


def test_what_is_not_ahead_is_said(result: dict[str, Any]) -> None:
    rows = [{**row, "top1": 1.0 if row["method"] == "obs" else row["top1"]} for row in result["rows"]["resnet20"]]
    page = comparison.render({**result, "rows": {"resnet20": rows}})
    assert page.count("is ahead of our best, obs, by") == 3
    assert "ResNet-56" not in page.partition("## resnet20")[2]


def test_the_summary_holds_ours_against_the_hardest_to_beat() -> None:
    def row(method: str, target: str, seed: int, top1: float) -> dict[str, Any]:
        made = {field.name: 1.0 for field in dataclasses.fields(Row)}
        return {**made, "method": method, "target": target, "seed": seed, "top1": top1, "top1_baseline": 90.0 + seed}

    rows = [
        row("obs", "macs=0.5", 0, 80.0), row("obs", "macs=0.5", 1, 82.0), row("tp:taylor", "macs=0.5", 0, 70.0),
        row("tp:taylor", "macs=0.5", 1, 70.0), row("nni:l1", "macs=0.5", 0, 60.0), row("nni:l1", "macs=0.75", 0, 65.0),
    ]  # fmt: skip
    table = comparison.summary({"rows": {"some": rows, "not_run": []}})
    assert table.splitlines() == [
        "| network | dense | 75% of MACs | 50% of MACs |",
        "|---|--:|--:|--:|",
        "| `some` | 90.50 ± 0.71 | - | 81.00 ± 1.41 / 70.00 ± 0.00 |",
    ]


def test_the_figure_has_a_panel_for_each_network_that_has_rows(result: dict[str, Any], tmp_path: Path) -> None:
    comparison.plot({**result, "rows": {**result["rows"], "not_run": []}}, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.count("MACs kept") == len(result["rows"])
    assert "not_run" not in text


def test_methods_tried_on_some_seeds_alone_are_shown_beside_the_others_on_those(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"]["resnet56"] if row["method"] in ("obs", "tp:taylor", "nni:l1")]
    first = [row for row in rows if row["seed"] == 0 and row["target"] == "macs=0.5" and row["method"] == "nni:l1"]
    tried = [{**row, "method": "tp:lamp", "top1": 99.0} for row in first]
    page = comparison.render({**result, "rows": {"resnet56": [*rows, *tried]}})
    before = comparison.render({**result, "rows": {"resnet56": rows}})
    whole, _, extra = page.partition("### Every method that was tried, seed 0\n")
    assert "### Every" not in before
    assert [line for line in before.splitlines() if line not in page.splitlines()] == []  # it decides nothing
    assert "tp:lamp" not in whole
    lines = [line for line in extra.splitlines() if line.startswith("| macs=")]
    assert lines[0].startswith("| macs=0.5 | `tp:lamp` | 99.00 |")
    assert len(lines) == 1 + len({row["method"] for row in rows})
    own = next(row for row in rows if (row["method"], row["target"], row["seed"]) == ("obs", "macs=0.5", 0))
    assert f"| macs=0.5 | `obs` | {own['top1']:.2f} | {own['top1_before_finetune']:.2f} |" in extra
