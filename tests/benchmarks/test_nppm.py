"""The experiments with performance maximisation on the digits, at a size of seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.benchmarks import nppm
from nni_plugin.benchmarks.nppm import study as nppm_study
from nni_plugin.benchmarks.nppm import table1 as nppm_p
from nni_plugin.benchmarks.nppm.presets import FULL, Numbers, numbers_of, reduced
from nni_plugin.benchmarks.presets import DENSE
from nni_plugin.errors import CriterionError, DataError
from nni_plugin.performance import ArchitectureLayout, PerformanceMaximization
from nni_plugin.plan import PruningPlan

TRAINING = TrainingConfig(epochs=1, lr=0.05)
STEPS = 24
TINY = Numbers(
    "digits", 600, TRAINING, TRAINING, batch_size=64, img_size=8, seeds=1,
    search={"steps": STEPS, "predictor_start": 4, "predictor_warmup": 1, "predictor_batch": 8, "candidates": 2},
    search_images=128, search_batch=32, choice_images=64, curve_images=64, points=3, judged=3,
)  # fmt: skip
METHODS = ("nppm", "differentiable-gates", "magnitude", "dense")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(nppm, "numbers_of", lambda *_: TINY)
    given = {"experiments": ("search", "tune"), "methods": METHODS, "folder": folder, "dense": folder / "dense"}
    return json.loads(json.dumps(nppm.run(**{**given, "device": "cpu", **options})))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nppm")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, run(folder, monkeypatch)


def test_every_cell_within_the_budget(done: Any) -> None:
    tuned = {cell["method"]: cell for cell in done[1]["tuned"]}
    assert list(tuned) == list(METHODS)
    for method in METHODS[:3]:
        (ratio,) = tuned[method]["macs_ratios"]
        assert 0.495 <= ratio <= 0.5
        (widths,) = tuned[method]["widths"]
        assert all(".conv1" in name for name in widths)  # the same groups for all
    assert tuned["dense"]["macs_ratios"] == [1.0]
    gap = tuned["nppm"]["top1"]["mean"] - tuned["magnitude"]["top1"]["mean"]
    assert tuned["nppm"]["minus"]["magnitude"]["mean"] == pytest.approx(gap)
    assert set(tuned["magnitude"]["minus"]) == {"differentiable-gates"}


def test_searches_and_their_curves(done: Any) -> None:
    searches = {cell["method"]: cell for cell in done[1]["searches"]}
    assert set(searches) == {"nppm", "differentiable-gates"}
    for cell in searches.values():
        assert [point["step"] for point in cell["curve"]] == [0, 8, 16, 24]
        assert cell["curve"][0]["macs_ratio"]["mean"] > 0.9
        assert cell["choice_top1"]["mean"] == pytest.approx(cell["choice_top1_pruned"]["mean"])
        for point in cell["curve"]:
            assert 0 <= point["top1_within"]["mean"] <= 100
    assert searches["nppm"]["curve"][-1]["predictor_loss"]["n"] == 1
    assert searches["nppm"]["curve"][0]["predictor_loss"]["n"] == 0
    assert set(searches["nppm"]["quality"]) == {"near", "wide"}
    assert searches["differentiable-gates"]["quality"] == {}


def test_page_and_figure(done: Any, tmp_path: Path) -> None:
    table = [nppm_p.choice_of_p(nppm_p.TABLE1[0]), nppm_p.choice_of_p(nppm_p.TABLE1[-1])]
    result = {**done[1], "p": table}
    text = nppm.render(result)
    cell = done[1]["tuned"][0]
    assert f"| `nppm` | 1 | {cell['top1_before']['mean']:.2f} | {cell['top1']['mean']:.2f} |" in text
    assert "| CIFAR-10 | ResNet-56 | 0.9944 | 0.5028 | 0.4972 | 0.50 | 0.5028 |" in text
    assert "Neither timm nor torchvision has ShuffleNetV2+." in text
    assert "None" not in text
    pytest.importorskip("matplotlib")
    for name in ("first.svg", "second.svg"):
        nppm.plot(result, tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_a_killed_search_goes_on_to_the_same_end(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two points of the curve; the dense network is the one that is there."""
    step, made = PerformanceMaximization.step, []

    def killed(search: PerformanceMaximization, batch: Any) -> Any:
        if len(made) == 19:
            raise KeyboardInterrupt
        made.append(search.steps_done)
        return step(search, batch)

    options = {"methods": ("nppm",), "experiments": ("search",), "dense": done[0] / "dense"}
    monkeypatch.setattr(PerformanceMaximization, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, monkeypatch, **options)
    made.append(-1)
    resumed = run(tmp_path, monkeypatch, **options)
    assert made[20:] == list(range(16, STEPS))
    straight = next(cell for cell in done[1]["searches"] if cell["method"] == "nppm")
    for name in ("curve", "chosen", "quality", "macs_ratio"):
        assert resumed["searches"][0][name] == straight[name], name
    first, second = (
        json.loads((folder / "reduced" / "resnet20" / "search" / "seed0" / "nppm.json").read_text())["result"]["plan"]
        for folder in (done[0], tmp_path)
    )
    assert PruningPlan.from_json(first).digest == PruningPlan.from_json(second).digest


def test_collect_runs_nothing(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nppm_study.Study, "_loaded", lambda *_: pytest.fail("nothing is left to run"))
    assert run(done[0], monkeypatch, collect=True, methods=(*METHODS, "taylor-fo")) == done[1]
    with pytest.raises(DataError, match="without --collect"):
        run(tmp_path, monkeypatch, collect=True)


def test_a_wrong_name_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CriterionError, match="magnitude"):
        run(tmp_path, monkeypatch, methods=("nppm", "magnitud:all"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "prunable"),
    # Reductions of all MACs by p as printed: 54.7 %, 54.4 % and 48.1 %, counted by hand from the layers' shapes.
    [(3, 0.547 / 0.62), (4, 0.544 / 0.58), (2, 0.481 / 0.5)],
)
def test_the_prunable_share(row: int, prunable: float) -> None:
    found = nppm_p.choice_of_p(nppm_p.TABLE1[row])
    assert found["prunable"] == pytest.approx(prunable, abs=1e-3)
    assert found["p_exact"] == pytest.approx(1 - 0.5 / found["prunable"])
    assert found["p_supplement"] == pytest.approx(0.5 / found["prunable"])


@pytest.mark.parametrize("row", [0, 1])
def test_the_table_follows_from_the_formula_as_printed(row: int) -> None:
    found = nppm_p.choice_of_p(nppm_p.TABLE1[row])
    assert round(found["p_supplement"], 2) == found["p_table"]


def test_reductions_are_stated() -> None:
    assert reduced(FULL) == []
    stated = reduced(numbers_of("reduced", "resnet20"))
    assert "search.steps: 600 instead of 4000" in stated
    assert "images: 20000 instead of all" in stated
    assert numbers_of("reduced", "resnet20").base == DENSE["resnet20"].base  # whose networks are there
    assert numbers_of("full", "resnet56", "torch/cifar100").dataset == "torch/cifar100"


def test_architectures_of_any_width() -> None:
    layout = ArchitectureLayout.__new__(ArchitectureLayout)
    layout.size, layout.slices, layout.device = 40, {"a": slice(0, 2), "b": slice(2, 40)}, torch.device("cpu")
    drawn = nppm_study.of_any_width(layout, 30, seed=0)
    assert all(bool(vector[part].any()) for vector in drawn for part in layout.slices.values())
    shares = [float(vector.mean()) for vector in drawn]
    assert min(shares) < 0.45
    assert max(shares) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(drawn, nppm_study.of_any_width(layout, 30, seed=0), strict=True))
