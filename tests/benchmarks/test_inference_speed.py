"""Inference speed, on small stand-ins: widths meet their goals, ways agree, networks take turns, a page comes of it."""

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from nni_plugin.benchmarks import __main__ as program
from nni_plugin.benchmarks import inference_speed
from nni_plugin.benchmarks.inference_speed import table5, ways
from nni_plugin.benchmarks.inference_speed.layouts import LAYOUTS, variants
from nni_plugin.benchmarks.inference_speed.table5 import TABLE5, Goal
from nni_plugin.benchmarks.inference_speed.turns import measure_in_turns
from nni_plugin.errors import BudgetError, ModelError, OutputError

ROOT = Path(__file__).parents[2]
GOALS = (Goal("most", 0.6, 0.7), Goal("skips", 0.85, 0.83, skip_only=True))


# -- the paper --------------------------------------------------------------------------------------------


def test_table5_gives_the_speedups_of_the_text() -> None:
    rows = {(row.name, row.skip_only): row for row in TABLE5}
    dense, half, skips = rows["none", False], rows["50 %", False], rows["22 %", True]
    assert round(dense.ms256 / skips.ms256, 2) == 1.59
    assert round(dense.ms256 / half.ms256, 2) == 1.51
    assert round(1 - skips.gmacs / dense.gmacs, 2) == 0.33
    assert round(1 - half.gmacs / dense.gmacs, 2) == 0.68
    goals = table5.goals_of("resnet101")
    assert [goal.skip_only for goal in goals] == [False] * 4 + [True] * 2
    assert table5.goals_of("resnet50") == table5.goals_of("anything else")


# -- widths -----------------------------------------------------------------------------------------------


@functools.cache
def made() -> list[Any]:
    torch.manual_seed(0)
    return variants(torchvision.models.resnet18(), GOALS, tuple(LAYOUTS), torch.randn(4, 3, 32, 32), 0)


def of(goal: Goal, layout: str) -> dict[str, Any]:
    [about] = [variant.about for variant in made() if (variant.goal, variant.layout) == (goal.name, layout)]
    return about


def test_every_layout_meets_the_macs() -> None:
    dense = made()[0].about
    assert [(v.goal, v.layout) for v in made()] == [
        ("dense", "dense"),
        *((goal.name, layout) for goal in GOALS for layout in LAYOUTS),
    ]
    for goal in GOALS:
        for layout, multiple in LAYOUTS.items():
            about = of(goal, layout)
            assert goal.macs - 0.02 * multiple / 8 - 0.005 <= about["macs"] / dense["macs"] <= goal.macs
            changed = [width for name, width in about["widths"].items() if width != dense["widths"][name]]
            assert changed
            assert all(width % multiple == 0 for width in changed)


def test_layouts_differ_in_where_channels_leave() -> None:
    dense = made()[0].about
    shares = [width / dense["widths"][name] for name, width in of(GOALS[0], "even")["widths"].items()]
    assert max(shares) - min(shares) <= 1 / 64  # one channel of the narrowest group
    for goal in GOALS:
        assert of(goal, "fitted")["params"] / dense["params"] == pytest.approx(goal.params, abs=0.005)
        assert abs(of(goal, "even")["params"] / dense["params"] - goal.params) > 0.01
    first, *_, last = (kept / total for kept, total in of(GOALS[0], "fitted")["stages"].values())
    assert first < last  # more parameters stay where early layers lose more
    whole = [name for name, width in of(GOALS[1], "even")["widths"].items() if width == dense["widths"][name]]
    assert any(name.endswith("0.conv1") for name in whole)
    assert not any("downsample" in name for name in whole)


def test_networks_have_the_widths_they_say_and_sound_activations() -> None:
    for variant in made():
        modules = dict(variant.network.named_modules())
        assert variant.about["widths"]["layer3.0.conv1"] == modules["layer3.0.conv1"].out_channels
        with torch.inference_mode():
            out = variant.network(torch.randn(2, 3, 32, 32))
        assert not variant.network.training
        assert 1e-3 < float(out.abs().max()) < 1e3


def test_parameters_out_of_reach_are_told() -> None:
    goal = Goal("impossible", 0.3, 0.999)
    with pytest.raises(BudgetError, match=r"impossible: with 0\.300 of the MACs .* leave out 'fitted'"):
        variants(torchvision.models.resnet18(), (goal,), ("fitted",), torch.randn(2, 3, 32, 32), 0)


# -- turns ------------------------------------------------------------------------------------------------


def test_networks_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    networks = [functools.partial(calls.append, name) for name in "abc"]
    timings = measure_in_turns(networks, rounds=3, min_run_time=0.0)
    assert [timing.passes for timing in timings] == [3, 3, 3]
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"  # once to see how long it takes, then there and back


def test_speedup_is_over_the_first_network() -> None:
    naps = [functools.partial(time.sleep, seconds) for seconds in (0.012, 0.003)]
    first, second = measure_in_turns(naps, rounds=5, min_run_time=0.06)
    assert (first.speedup, first.speedup_iqr) == (1.0, 0.0)
    assert 2.0 < second.speedup < 6.0
    assert 12 <= first.median_ms < 24
    assert second.passes > first.passes
    with pytest.raises(ValueError, match="at least 3 rounds"):
        measure_in_turns(naps, rounds=2, min_run_time=0.0)


# -- ways -------------------------------------------------------------------------------------------------


class Small(nn.Sequential):
    def __init__(self, width: int = 8) -> None:
        layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        super().__init__(*layers, nn.Linear(width, 5))
        self.eval()


@pytest.mark.parametrize("way", ["eager", "channels-last", "onnx"])
def test_ways_agree(way: str) -> None:
    if way == "onnx":
        pytest.importorskip("onnxruntime")
    network, images = Small(), torch.randn(3, 3, 8, 8)
    ready = ways.prepare(way, network, images, threads=1)
    assert ready.difference <= 1e-5
    with torch.inference_mode():
        torch.testing.assert_close(ready.run(), network(images), rtol=1e-4, atol=1e-5)
        images.copy_(torch.randn_like(images))  # a pass computes what it returns
        if way != "channels-last":  # which holds a copy of the images
            torch.testing.assert_close(ready.run(), network(images), rtol=1e-4, atol=1e-5)
    assert all(p.is_contiguous() for p in network.parameters())


def test_many_networks_of_one_class_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(ways, "_start_compiler", lambda _: None)
    images, widths = torch.randn(1, 3, 8, 8), range(4, 16)
    networks = [Small(width) for width in widths]
    ready = [ways.prepare("compile", network, images, threads=1) for network in networks]
    assert len(graphs) == len(networks)
    with torch.inference_mode():
        for network, prepared in zip(networks, ready, strict=True):
            torch.testing.assert_close(prepared.run(), network(images))
    assert len(graphs) == len(networks)  # nothing is compiled while it is timed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_by_the_default_backend() -> None:
    torch.compiler.reset()
    network, images = Small(), torch.randn(2, 3, 8, 8)
    with ways.cold_compiler():
        ready = ways.prepare("compile", network, images, threads=1)
    assert ready.seconds > 0.01
    assert ready.difference <= 1e-5


def test_what_does_not_run_or_gives_other_numbers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(1, 3, 8, 8)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(ways.WAYS, "eager", fails)
    with pytest.raises(ModelError, match=r"eager: .* \(no such kernel\); choose others: --ways"):
        ways.prepare("eager", Small(), images, threads=1)
    for wrong in (2.0, float("nan")):
        monkeypatch.setitem(ways.WAYS, "eager", lambda net, images, _, by=wrong: lambda: by * net(images))
        with pytest.raises(ModelError, match="differs from the eager one"):
            ways.prepare("eager", Small(), images, threads=1)


def test_onnx_without_a_provider_for_the_device_is_left_out() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert ways.missing("onnx", torch.device("cpu")) is None
    assert ways.missing("eager", torch.device("cuda")) is None
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "has no CUDAExecutionProvider" in str(ways.missing("onnx", torch.device("cuda")))


# -- a whole run ------------------------------------------------------------------------------------------


def run(folder: Path, **options: Any) -> dict[str, Any]:
    small = {"ways": ("eager", "channels-last"), "layouts": ("even", "fitted"), "devices": ("cpu",)}
    small |= {"batches": (1, 2), "size": 32, "rounds": 3, "min_run_time": 0.0, "folder": folder}
    return json.loads(json.dumps(inference_speed.run(("resnet18",), **{**small, **options})))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("inference_speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table5.GOALS, "resnet18", GOALS)
        return folder, run(folder)


@pytest.fixture
def goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table5.GOALS, "resnet18", GOALS)


def test_every_network_is_timed_in_every_way_and_batch(done: Any) -> None:
    threads = torch.get_num_threads()
    result = done[1]
    assert [(cell["batch"], cell["way"]) for cell in result["cells"]] == [
        (batch, way) for batch in (1, 2) for way in ("eager", "channels-last")
    ]
    for cell in result["cells"]:
        assert [(t["goal"], t["layout"]) for t in cell["timed"]] == [
            (v["goal"], v["layout"]) for v in result["networks"]["resnet18"]
        ]
        assert all(timed["median_ms"] > 0 and timed["passes"] == 3 for timed in cell["timed"])
        assert cell["timed"][0]["speedup"] == 1
    assert result["left_out"] == {}
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("goals")
def test_a_killed_run_goes_on(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = done
    prepared: list[str] = []
    prepare = inference_speed.prepare
    monkeypatch.setattr(inference_speed, "prepare", lambda way, *given: prepared.append(way) or prepare(way, *given))
    assert run(folder) == result
    assert prepared == []
    [cell] = folder.rglob("*batch2-eager.json")
    cell.unlink()
    again = run(folder)
    assert prepared == ["eager"] * 5
    assert [c for c in again["cells"] if c["batch"] == 1] == [c for c in result["cells"] if c["batch"] == 1]
    with pytest.raises(OutputError, match="made with other settings"):
        run(folder, size=64)


def test_names_are_checked_before_anything_runs(tmp_path: Path) -> None:
    for wrong, error in (({"ways": ("eager", "jit")}, ModelError), ({"layouts": ()}, BudgetError)):
        with pytest.raises(error, match="Expected at least one"):
            run(tmp_path, **wrong)
    with pytest.raises(ModelError, match="got resnet99"):
        inference_speed.run(("resnet99",), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_page_and_figure(done: Any, tmp_path: Path) -> None:
    result = {**done[1], "machine": {"CPU": "A make of CPU"}, "command": "c", "left_out": {"onnx on cpu": "no reason"}}
    program.write_page(inference_speed, result, tmp_path / "inference_speed.md")
    page = (tmp_path / "inference_speed.md").read_text()
    [timed] = [t for t in result["cells"][2]["timed"] if (t["goal"], t["layout"]) == ("skips", "fitted")]
    section = page.partition("## resnet18, cpu, batch 2\n")[2].partition("\n## ")[0]
    assert "| kept | layout | eager | channels-last |" in section
    assert (
        f"| skips | fitted | **{timed['speedup']:.2f}** {timed['median_ms']:.4g} ({timed['iqr_ms']:.2g}) | " in section
    )
    assert "Fastest over slowest layout" in section
    assert "| 22 %, skip only | 5.19 | 28.6 | 24.77 | **1.49** 19.5 | **1.59** 239.3 |" in page
    assert "- onnx on cpu was left out: no reason." in page
    assert "- CPU: A make of CPU" in page
    pytest.importorskip("matplotlib")
    assert "![inference_speed](inference_speed.svg)" in page
    assert (tmp_path / "inference_speed.svg").read_text().count("even, skip only") >= 1


def test_the_spread_between_layouts_is_said() -> None:
    timed = [{"goal": "dense", "layout": "dense", "speedup": 1.0}]
    timed += [{"goal": "half", "layout": layout, "speedup": s} for layout, s in (("even", 1.5), ("fitted", 2.4))]
    timed += [{"goal": "most", "layout": layout, "speedup": s} for layout, s in (("even", 3.0), ("fitted", 3.3))]
    said = inference_speed.page._between_layouts([{"way": "eager", "timed": timed}])
    assert said.endswith("at most: eager 1.60 (fitted over even, half).")


def test_it_is_run_by_name() -> None:
    assert program.BENCHMARKS["inference_speed"] is inference_speed


def test_committed_page_is_made_of_the_committed_numbers(tmp_path: Path) -> None:
    numbers, page = ROOT / "benchmarks/results/inference_speed.json", ROOT / "docs/inference_speed.md"
    assert numbers.exists() == page.exists(), "commit both: `python -m nni_plugin.benchmarks inference_speed`"
    if numbers.exists():
        program.write_page(inference_speed, json.loads(numbers.read_text()), tmp_path / "inference_speed.md")
        assert (tmp_path / "inference_speed.md").read_text() == page.read_text()
