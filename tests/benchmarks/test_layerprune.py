"""LayerPrune's experiments on the digits, at a size of seconds: rows, resuming, what is shared, pages, the figure."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latency_by_macs import measure_layer

from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.benchmarks import __main__ as command_line
from nni_plugin.benchmarks import layerprune
from nni_plugin.benchmarks.layerprune import study as layerprune_study
from nni_plugin.benchmarks.layerprune import tables as layerprune_tables
from nni_plugin.benchmarks.layerprune.presets import FULL, Numbers, numbers_of
from nni_plugin.benchmarks.presets import DENSE, reductions
from nni_plugin.cost import count
from nni_plugin.errors import CriterionError, DataError, OutputError
from nni_plugin.latency import Latency, LatencyPair
from nni_plugin.latency_table import LayerLatencies
from nni_plugin.layers import rank_agreement, removal_order

TRAINING = TrainingConfig(epochs=1, opt="momentum", lr=0.05)
TINY = Numbers(
    dataset="digits",
    images=448,
    base=TRAINING,
    finetune=replace(TRAINING, lr=0.01),
    channels=20,
    every=1,
    batch_size=32,
    seeds=1,
    img_size=8,
    score_images=200,
    held_out_images=200,
)
OPTIONS: dict[str, Any] = {
    "networks": ("resnet20",),
    "layers": 2,
    "units": (2,),
    "scratch": (1,),
    "shares": (0.2,),
    "methods": ("magnitude", "imprinting"),
    "latency": (0.8,),
    "device": "cpu",
}


def by_macs(first: Any, second: Any, shape: Any, sizes: Any, **_: Any) -> list[LatencyPair]:
    """Stand in for a clock: a pass takes as long as its MACs say."""
    ms = [count(model, torch.zeros(1, *shape)).macs / 1e6 for model in (first, second)]
    one, other = ([Latency(size, t, 0.0, 1.0, 1, "cpu", "float32", 1) for size in sizes] for t in ms)
    return [LatencyPair(a, b, ms[1] / ms[0], 3) for a, b in zip(one, other, strict=True)]


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerprune, "numbers_of", lambda *_: TINY)
        patch.setattr(layerprune_study, "measure_pair", by_macs)
        patch.setattr("nni_plugin.latency_budget.measure_pair", by_macs)
        patch.setattr("nni_plugin.latency_budget.table_of", lambda place: LayerLatencies(place, None, measure_layer))
        patch.setattr(layerprune_tables, "STEPS", 2)
        patch.setattr(layerprune_tables, "FILTER_CRITERIA", ("taylor-fo",))
        patch.setattr(layerprune_tables, "OF_TABLE_3", ("magnitude",))
        patch.setattr(layerprune_tables, "KEPT_OF_TABLE_3", {"resnet20": 400})
        yield


@pytest.fixture(scope="module")
def done(small: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layerprune")
    return folder, layerprune.run(**OPTIONS, folder=folder / "runs", dense=folder / "dense", seeds=(0,))


def cells_of(result: dict[str, Any], part: str, **labels: Any) -> list[dict[str, Any]]:
    cells = [cell for cell in result["cells"] if cell["experiment"] == part]
    return [cell for cell in cells if all(cell[name] == value for name, value in labels.items())]


def test_every_experiment_has_all_its_cells(done: Any) -> None:
    result = done[1]
    count_of = {part: len(cells_of(result, part)) for part in layerprune.LABELS}
    assert count_of == {"control": 1, "t1": 2, "t2": 6, "t3": 3, "t5": 1, "f1": 2}
    for cell in result["cells"]:
        assert 0 <= cell["top1"]["mean"] <= 100
        assert cell["seeds"] == [0]
        assert cell["refused"] == []
    assert [place["dtype"] for place in result["measured_on"]] == ["float32"]
    assert {"threads", "device", "machine"} <= set(result["measured_on"][0])


def test_the_control_is_the_dense_network_fine_tuned_alike(done: Any) -> None:
    (cell,) = cells_of(done[1], "control")
    assert cell["macs_ratio"]["mean"] == cell["latency_64"]["mean"] == 1
    assert cell["top1_minus_control"]["mean"] == 0
    once = cells_of(done[1], "t2", n=1, way="one-shot")[0]
    assert once["top1_minus_control"]["mean"] == pytest.approx(once["top1"]["mean"] - cell["top1"]["mean"])


def test_blocks_leave_in_the_order_of_their_scores(done: Any) -> None:
    folder, result = done
    ranking = json.loads((folder / "runs/reduced/resnet20/rankings/seed0/imprinting.json").read_text())
    scores = ranking["result"]["scores"]
    assert len(scores) == 7
    for n in (1, 2):
        assert set(cells_of(result, "t2", n=n, way="one-shot")[0]["blocks"][0]) == set(removal_order(scores)[:n])
    again = json.loads((folder / "runs/reduced/resnet20/plans/seed0/imprinting-rescored2.json").read_text())
    first = [row for row in again["result"]["plan"]["provenance"]["blocks"] if row["step"] == 0]
    assert {row["name"]: row["score"] for row in first} == scores
    # The coefficient at n is that of the ranking made after the n-th removal, by names of the dense network.
    last = {row["name"]: row["score"] for row in again["result"]["plan"]["provenance"]["blocks"] if row["step"] == 2}
    cell = cells_of(result, "t2", n=2, way="re-scored")[0]
    assert set(last) == set(scores) - set(cell["blocks"][0])
    assert cell["spearman"]["mean"] == pytest.approx(rank_agreement(scores, last))


def test_iterative_and_one_shot_agree_on_the_first_block(done: Any) -> None:
    folder, result = done
    once, between = (cells_of(result, "t2", n=1, way=way)[0] for way in ("one-shot", "iterative"))
    assert once["blocks"] == between["blocks"]
    # One fine-tuning each, of the same network on the same images: bit for bit the same.
    assert between["top1_between"]["mean"] == between["top1"]["mean"] == once["top1"]["mean"]
    record = json.loads((folder / "runs/reduced/resnet20/iterative/seed0/2.json").read_text())["result"]
    assert len(record["blocks"]) == 2
    assert record["blocks"][0] == once["blocks"][0][0]
    earlier = json.loads((folder / "runs/reduced/resnet20/iterative/seed0/1.json").read_text())["result"]
    assert record["blocks"][1] == removal_order(earlier["scores"])[0]
    assert set(record["scores"]) == set(earlier["scores"]) - {record["blocks"][1]}


def test_the_same_blocks_are_fine_tuned_once(done: Any) -> None:
    folder, result = done
    home = folder / "runs/reduced/resnet20"
    plans = [
        cell["blocks"][0]
        for cell in result["cells"]
        if cell["blocks"][0] is not None and not cell.get("channels_removed", {}).get("mean")
    ]
    tuned = [json.loads(path.read_text())["result"] for path in (home / "finetuned/seed0").iterdir()]
    channels = [
        cell for cell in result["cells"] if cell.get("channels_removed", {}).get("mean") and cell["blocks"][0] == []
    ]
    assert len(tuned) == len({tuple(sorted(blocks)) for blocks in plans}) + len(channels)


def test_filters_leave_between_the_convolutions_of_a_block_alone(done: Any) -> None:
    for way in ("one-shot", "iterative"):
        (cell,) = cells_of(done[1], "t1", method="taylor-fo", way=way)
        assert cell["channels_removed"]["mean"] == 336 - math.floor(0.8 * 336)
    once, stepwise = (cells_of(done[1], "t1", way=way)[0] for way in ("one-shot", "iterative"))
    assert "top1_before" in once
    assert "top1_before" not in stepwise


def test_filters_are_set_against_layers_at_their_latency(done: Any) -> None:
    layers = cells_of(done[1], "t3", method="LayerPrune_2")[0]
    filters = cells_of(done[1], "t3", goal="latency of LayerPrune_2")[0]
    assert filters["latency_64"]["mean"] == pytest.approx(layers["latency_64"]["mean"], abs=0.04)
    assert filters["channels_removed"]["mean"] > 0
    assert layers["architectures"][0].count(0) == 4  # two blocks of two convolutions
    left = cells_of(done[1], "t3", goal="400 filters left")[0]
    dense = layerprune_tables.architecture("resnet20", (), {})
    assert sum(left["architectures"][0]) < sum(dense)


def test_latencies_of_figure_1_are_met(done: Any) -> None:
    for cell in cells_of(done[1], "f1"):
        assert cell["latency_64"]["mean"] <= 0.8 * 1.03
        assert bool(cell["blocks"][0]) == (cell["method"] != "magnitude")
        assert "top1_before" in cell


def test_from_scratch_is_trained_like_the_dense_network(done: Any) -> None:
    folder, result = done
    (path,) = (folder / "runs/reduced/resnet20/scratch/seed0").iterdir()
    record = json.loads(path.read_text())["result"]
    (cell,) = cells_of(result, "t5", n=1)
    assert record["top1"] == cell["top1_scratch"]["mean"]
    assert record["images"] > TINY.images  # all training images, as the dense network
    assert cell["top1_minus_scratch"]["mean"] == pytest.approx(cell["top1"]["mean"] - record["top1"])
    one = next(c for c in cells_of(result, "t2", n=1, way="one-shot"))
    assert one["blocks"] == cell["blocks"]


def test_a_finished_grid_runs_nothing_and_can_be_collected(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = done
    places = {"folder": folder / "runs", "dense": folder / "dense"}
    monkeypatch.setattr("nni_plugin.benchmarks.experiment.fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(layerprune_study.Study, "network_of", lambda *_: pytest.fail("loaded again"))
    assert layerprune.run(**OPTIONS, **places, seeds=(0,)) == result
    more = {**OPTIONS, "layers": 2, "methods": (*OPTIONS["methods"], "block-gate"), "latency": (0.8, 0.5)}
    assert layerprune.run(**more, **places, seeds=(0, 1), collect=True)["cells"] == result["cells"]
    with pytest.raises(DataError, match="Nothing is done"):
        layerprune.run(**OPTIONS, **places, seeds=(7,), collect=True)


def test_one_part_runs_alone(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = done
    monkeypatch.setattr("nni_plugin.benchmarks.experiment.fit", lambda *_, **__: pytest.fail("trained again"))
    options = {**OPTIONS, "folder": folder / "runs", "dense": folder / "dense", "seeds": (0,)}
    alone = layerprune.run(**options, experiments=("t2",))
    assert {cell["experiment"] for cell in alone["cells"]} == {"control", "t2"}
    assert cells_of(alone, "t2") == cells_of(result, "t2")


def test_other_numbers_need_another_folder(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(TINY, score_images=100)
    monkeypatch.setattr(layerprune, "numbers_of", lambda *_: other)
    with pytest.raises(OutputError, match="score_images"):
        layerprune.run(**OPTIONS, folder=done[0] / "runs", dense=done[0] / "dense", experiments=("t2",), seeds=(0,))


def test_a_killed_step_goes_on_from_its_checkpoint(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = done
    options = {**OPTIONS, "dense": folder / "dense", "seeds": (0,), "experiments": ("t2",), "layers": 1}
    killing = layerprune_tables.save_pretrained

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layerprune_tables, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        layerprune.run(**options, folder=tmp_path)
    monkeypatch.setattr(layerprune_tables, "save_pretrained", killing)
    again = layerprune.run(**options, folder=tmp_path)
    one, other = (cells_of(r, "t2", n=1, way="iterative")[0] for r in (again, result))
    assert one["top1_between"] == other["top1_between"]


def test_a_budget_out_of_reach_is_told_and_the_rest_goes_on(done: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "methods": ("imprinting",), "latency": (0.8, 0.01)}
    places = {"folder": done[0] / "runs", "dense": done[0] / "dense"}
    result = layerprune.run(**options, **places, experiments=("f1",), seeds=(0,))
    (cell,) = cells_of(result, "f1", asked=0.01)
    assert "top1" not in cell
    assert "blocks that can leave" in cell["refused"][0] or "remain" in cell["refused"][0]
    page = layerprune.render(json.loads(json.dumps(result)))
    assert "## Budgets that could not be met" in page
    layerprune.plot(json.loads(json.dumps(result)), tmp_path / "figure.svg")


def test_unknown_methods_and_too_few_images_are_refused(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CriterionError, match="layer-magnitude"):
        layerprune.run(**{**OPTIONS, "methods": ("layer-magnitud",)})
    greedy = replace(TINY, held_out_images=5000)
    monkeypatch.setattr(layerprune, "numbers_of", lambda *_: greedy)
    with pytest.raises(DataError, match="held_out_images=5000"):
        layerprune.run(**OPTIONS, folder=done[0] / "greedy", dense=done[0] / "dense", experiments=("t2",), seeds=(0,))


def test_the_page_has_the_paper_beside_ours(done: Any, tmp_path: Path) -> None:
    result = json.loads(json.dumps(done[1]))
    page = layerprune.render(result)
    for part in ("Table 1", "Table 2", "Table 3", "Table 5", "Figure 1"):
        assert f"## {part}: resnet20" in page
    assert "CIFAR-100" in page
    assert "76.72 / 75.70" in page
    assert "93.32" not in page  # of ResNet-56, which this is not
    of_paper = json.loads(json.dumps(result).replace("resnet20", "resnet56"))
    assert "93.28 / 93.31 / 0.97" in layerprune.render(of_paper)
    assert "70.51 / 70.01" in layerprune.render(of_paper)
    for line in page.splitlines():
        assert not line.startswith("|") or line.count("|") > 3
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    for name in ("a.svg", "b.svg"):
        layerprune.plot(result, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_numbers_of_the_presets() -> None:
    assert reductions(FULL, FULL) == []
    assert (FULL.finetune.epochs, FULL.finetune.lr, FULL.finetune.decay_epochs, FULL.batch_size) == (30, 1e-3, 10, 128)
    reduced = numbers_of("reduced", "vgg19_bn")
    for name in ("dataset", "batch_size", "img_size", "base"):
        assert getattr(reduced, name) == getattr(DENSE["vgg19_bn"], name)
    assert numbers_of("full", "resnet56", "torch/cifar100") == replace(FULL, dataset="torch/cifar100")


def test_an_architecture_is_written_as_in_the_paper() -> None:
    widths = {"features.0": 47, "features.49": 509}
    units = ("features.30:features.32", "features.40:features.42")
    shown = layerprune_tables.architecture("vgg19_bn", units, widths)
    assert shown[:6] == [47, 64, "M", 128, 128, "M"]
    assert shown.count(0) == 2
    assert shown.count("M") == 5
    assert len(shown) == 21


def test_options_are_read_by_the_command_line(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(layerprune, "run", _spy(layerprune.run, seen, done[1]))
    words = ["layerprune", "--experiments", "t2", "--seeds", "0", "--networks", "resnet56", "--latency", "0.7,0.5"]
    command_line.main([*words, "--output", str(tmp_path / "r"), "--docs", str(tmp_path / "d")])
    assert (tuple(seen["experiments"]), tuple(seen["seeds"]), tuple(seen["networks"])) == (("t2",), (0,), ("resnet56",))
    assert tuple(seen["latency"]) == (0.7, 0.5)
    assert (tmp_path / "d/layerprune.md").read_text().startswith("# Whole layers or filters")
    assert (tmp_path / "d/layerprune.svg").exists()


def _spy(original: Any, seen: dict[str, Any], result: dict[str, Any]) -> Any:
    import functools

    @functools.wraps(original)
    def run(**options: Any) -> dict[str, Any]:
        seen.update(options)
        return result

    return run
