"""The benchmark of coverage on one small network, and its page."""

import json
from pathlib import Path
from typing import Any

from nni_plugin.benchmarks import __main__ as program
from nni_plugin.benchmarks import coverage

ROOT = Path(__file__).parents[2]
NOTE = "torch_pruning_1_6_1_at_50_percent"


def row(library: str, model: str, family: str, status: str, note: str | None, **more: Any) -> dict[str, Any]:
    known = {"reason": "", "macs_ratio": 0.4995, "parity_max_rel": 1.25e-7, "seconds": 3.21, **more}
    notes = {} if note is None else {NOTE: note}
    return {"library": library, "model": model, "status": status, "family": family, "notes": notes, **known}


def page_of(models: list[dict[str, Any]]) -> str:
    settings = {"macs": 0.5, "seconds": 60, "seed": 0, "device": None, "images": 2, "budget_tolerance": 0.02}
    return coverage.render({"settings": settings, "models": models})


def test_page_shows_every_model_by_library_and_family() -> None:
    nothing = {"macs_ratio": None, "parity_max_rel": None, "seconds": None}
    page = page_of(
        [
            row("timm", "vit_b", "vision_transformer", "ok", "hang (index-mapping | blow-up)"),
            row("torchvision", "resnet18", "resnet", "ok", None),
            row("timm", "resnet18", "resnet", "ok", "ok"),
            row("timm", "beit", "beit", "failed", "ok but silently under-pruned", **nothing, reason="crashed"),
        ]
    )
    assert "| timm | 3 | 2 | 0 | 1 | 66.7% | 1 |" in page
    assert "| all | 4 | 3 | 0 | 1 | 75.0% | 1 |" in page
    assert "| vision_transformer | vit_b | ok | 0.499 | 1.2e-07 | 3.2 | hang (index-mapping \\| blow-up) |" in page
    assert "| beit | beit | failed: crashed | - | - | - | ok but silently under-pruned |" in page
    assert page.index("| beit |") < page.index("| resnet | resnet18 |") < page.index("| vision_transformer |")
    assert "| family | model | status | MACs kept | parity | CPU s | torch pruning 1 6 1 at 50 percent |" in page
    assert "| resnet | resnet18 | ok | 0.499 | 1.2e-07 | 3.2 |\n" in page  # torchvision, of which nothing is noted
    assert "## torchvision" in page


def test_page_of_a_list_without_notes() -> None:
    page = page_of([row("timm", "resnet18", "resnet", "ok", None)])
    assert "| library | models | ok | refused | failed | share ok |\n" in page
    assert "| all |" not in page


def test_a_list_is_tried(tmp_path: Path) -> None:
    (tmp_path / "models.csv").write_text(f"library,model,{NOTE}\nnni_plugin,resnet20,ok\n")
    result = coverage.run(tmp_path / "models.csv", macs=0.7, workers=1, device="cpu", folder=tmp_path / "out")
    assert json.loads(json.dumps(result)) == result
    (model,) = result["models"]
    assert (model["status"], model["family"], model["notes"]) == ("ok", "resnet", {NOTE: "ok"})
    assert 0.686 <= model["macs_ratio"] <= 0.7
    assert (tmp_path / "out" / "coverage.csv").is_file()
    assert "| resnet | resnet20 | ok | " in coverage.render(result)


def test_committed_page_is_made_of_the_committed_numbers(tmp_path: Path) -> None:
    numbers, page = ROOT / "benchmarks/results/coverage.json", ROOT / "docs/coverage.md"
    assert numbers.exists() == page.exists(), "commit both: `python -m nni_plugin.benchmarks coverage --models ...`"
    if numbers.exists():
        program.write_page(coverage, json.loads(numbers.read_text()), tmp_path / "coverage.md")
        assert (tmp_path / "coverage.md").read_text() == page.read_text()


def test_it_is_run_by_name() -> None:
    assert program.BENCHMARKS["coverage"] is coverage
