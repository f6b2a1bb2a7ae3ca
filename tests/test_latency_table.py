"""Times of single layers: measured where asked, bounded between measurements, kept on disk by several at once."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nni_plugin import latency_table
from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.errors import ModelError
from nni_plugin.latency_cache import LatencyCache, cache_folder
from nni_plugin.latency_table import LayerLatencies, LayerShape, Place, grid, measure_layer, table_of
from nni_plugin.live_plan import LivePlan
from nni_plugin.rounding import rounding_of
from nni_plugin.slim_latency import SlimLatency

PLACE = Place(torch.device("cpu"), torch.float32, batch_size=2)
CONV = LayerShape("conv2d", 24, 64, (6, 6), 1, (3, 3), (1, 1), (1, 1), (1, 1))
LINEAR = LayerShape("linear", 32, 20, (5,), bias=True)
DEPTHWISE = LayerShape("conv2d", 32, 32, (6, 6), 32, (3, 3), (1, 1), (1, 1), (1, 1))
GROUPED = LayerShape("conv2d", 32, 64, (6, 6), 4, (3, 3), (2, 2), (1, 1), (1, 1), bias=True)


class Fake:
    """A made-up clock that counts how often it is read; any number, always the same for a shape."""

    def __init__(self) -> None:
        self.asked: list[LayerShape] = []

    def __call__(self, layer: LayerShape, _: Place) -> float:
        self.asked.append(layer)
        return 1.0 + (layer.inputs * 7 + layer.outputs * 13) % 29


def test_only_what_a_question_needs_is_measured() -> None:
    clock = Fake()
    table = LayerLatencies(PLACE, None, clock)
    assert table.ms(CONV, 24, 64) == 1.0 + (24 * 7 + 64 * 13) % 29
    assert clock.asked == [CONV]
    table.ms(CONV, 24, np.array([8, 16, 24]))
    assert [shape.outputs for shape in clock.asked[1:]] == [8, 16, 24]
    table.ms(CONV, 24, np.array([8, 16, 64]))
    assert len(clock.asked) == 4


@pytest.mark.parametrize("layer", [CONV, LINEAR, DEPTHWISE, GROUPED])
@given(st.integers(0, 100), st.integers(0, 100))
def test_between_measurements_times_are_between_theirs(layer: LayerShape, inputs: int, outputs: int) -> None:
    clock = Fake()
    found = float(LayerLatencies(PLACE, None, clock).ms(layer, inputs, outputs))
    times = [clock(shape, PLACE) for shape in list(clock.asked)]
    assert 1 <= len(times) <= 4
    assert min(times) - 1e-12 <= found <= max(times) + 1e-12
    for shape in clock.asked:  # whatever the width asked for, the layers measured are ones that can be built
        assert 1 <= shape.outputs <= layer.outputs
        assert shape.inputs % shape.groups == shape.outputs % shape.groups == 0


def test_linear_times_are_met_exactly_at_every_width() -> None:
    table = LayerLatencies(PLACE, None, lambda layer, _: 3.0 * layer.outputs + 2.0 * layer.inputs * layer.outputs)
    inputs, outputs = np.meshgrid(np.arange(1, 25), np.arange(1, 65))
    np.testing.assert_allclose(table.ms(CONV, inputs, outputs), 3.0 * outputs + 2.0 * inputs * outputs, rtol=1e-12)


@given(st.integers(1, 5000))
def test_a_grid_has_both_ends_and_few_points(width: int) -> None:
    points = grid(width)
    assert points[0] == 1
    assert points[-1] == width
    assert len(points) <= latency_table.POINTS + 2
    assert (np.diff(points) > 0).all()
    assert len(set(np.diff(points[1:-1]).tolist())) <= 1  # evenly spaced between the ends


def test_a_layer_measured_is_the_layer_described() -> None:
    for layer in (CONV, LINEAR, DEPTHWISE, GROUPED, DEPTHWISE.resized(0, 16), GROUPED.resized(16, 8)):
        built, example = layer.build(), layer.example(2)
        assert LayerShape.of(built, example, built(example), 2) == layer  # type: ignore[arg-type]
        assert measure_layer(layer, PLACE) > 0


def test_building_a_layer_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    CONV.build()
    CONV.example(1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_layer_that_cannot_run_is_said() -> None:
    wrong = LayerShape("conv2d", 4, 4, (2, 2), 1, (7, 7), (1, 1), (0, 0), (1, 1))
    with pytest.raises(ModelError, match=r"Cannot time a layer .*kernel=7x7"):
        measure_layer(wrong, PLACE)


def test_whatever_decides_a_time_is_in_its_key() -> None:
    places = [
        PLACE,
        Place(torch.device("cpu"), torch.float32, 3),
        Place(torch.device("cpu"), torch.bfloat16, 2),
        Place(torch.device("cpu"), torch.float32, 2, channels_last=True),
        Place(torch.device("cpu"), torch.float32, 2, threads=4),
    ]
    assert len({place.key() for place in places}) == len(places)
    assert torch.__version__ in PLACE.key()
    layers = [CONV, LINEAR, DEPTHWISE, GROUPED, CONV.resized(8, 64), CONV.resized(24, 8)]
    assert len({layer.key() for layer in layers}) == len(layers)


# -- a network's layers -----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A residual sum, a depthwise and a grouped convolution, a layer called twice, a linear layer on windows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.wide, self.depth = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, groups=24, padding=1)
        self.back = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.same(torch.relu(self.same(x)))
        x = x + self.back(torch.relu(self.depth(self.wide(x))))
        return self.head(x.mean((2, 3)))


def test_a_networks_times_are_those_of_its_slim_layers() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    groups = find_groups(model, x)
    prunable = [group for group in groups if group.fixed is None]
    # Linear in each width, so that what lies between measurements is exact.
    clock = lambda layer, _: layer.outputs * layer.inputs / layer.groups + 0.5 * layer.outputs  # noqa: E731
    latency = SlimLatency(model, x, groups, LayerLatencies(PLACE, None, clock))
    kept = {group.name: torch.arange(group.width - 5) for group in prunable}
    cut_channels(model, LivePlan(prunable).relative(kept), groups)
    expected = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            out, into = layer.weight.shape[:2]
            expected += (out * into + 0.5 * out) * (2 if name == "same" else 1)
    widths = {name: len(index) for name, index in kept.items()}
    assert latency.total(widths) == pytest.approx(expected, rel=1e-12)
    for group in prunable:
        narrower = np.array([4, widths[group.name]])
        around = latency.around(group.name, narrower, widths)
        change = latency.total({**widths, group.name: 4}) - latency.total(widths)
        assert around[0] - around[1] == pytest.approx(change, rel=1e-9)


# -- on disk ----------------------------------------------------------------------------------------------------


def test_times_are_read_back_and_not_measured_again(tmp_path: Path) -> None:
    clock, cache = Fake(), LatencyCache("A device (TM), rev. 2", tmp_path)
    first = LayerLatencies(PLACE, cache, clock).ms(CONV, 24, np.array([8, 9, 64]))
    asked = len(clock.asked)
    again = LayerLatencies(PLACE, LatencyCache("A device (TM), rev. 2", tmp_path), clock)
    np.testing.assert_array_equal(again.ms(CONV, 24, np.array([8, 9, 64])), first)
    assert len(clock.asked) == asked
    other = LayerLatencies(Place(torch.device("cpu"), torch.float32, 4), cache, clock)
    other.ms(CONV, 24, 64)
    assert len(clock.asked) == asked + 1
    assert len(LatencyCache("A device (TM), rev. 3", tmp_path).read()) == 0
    content = json.loads(cache.path.read_text())
    assert content["device"] == "A device (TM), rev. 2"
    assert len(content["ms"]) == asked + 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) in ([".json"], [".json", ".lock"])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"schema": 0}', '{"schema": 1, "device": "d", "ms": {"a": NaN}}',
     '{"schema": 1, "device": "d", "ms": {"a": "1"}}', '{"schema": 1, "device": "other", "ms": {}}'],
)  # fmt: skip
def test_a_damaged_file_is_said_and_replaced(tmp_path: Path, content: str) -> None:
    cache = LatencyCache("d", tmp_path)
    cache.path.write_text(content)
    with pytest.warns(UserWarning, match="holds no latencies"):
        assert cache.read() == {}
    with pytest.warns(UserWarning, match="holds no latencies"):
        cache.add({"a": 2.0})
    assert cache.read() == {"a": 2.0}


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = LatencyCache("d", tmp_path / "file" / "folder")
    with pytest.warns(UserWarning, match="NNI_PLUGIN_CACHE"):
        assert cache.add({"a": 1.0}) == {"a": 1.0}


def _add_many(folder: Path, name: str, start: Any) -> None:
    cache = LatencyCache("d", folder)
    start.wait()
    for number in range(40):
        cache.add({f"{name}{number}": float(number)})


def test_two_processes_that_write_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    workers = [context.Process(target=_add_many, args=(tmp_path, name, start)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    expected = {f"{name}{number}": float(number) for name in "ab" for number in range(40)}
    assert LatencyCache("d", tmp_path).read() == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_the_users_folder_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_PLUGIN_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    table = table_of(PLACE)
    table._measure = Fake()
    table.ms(LINEAR, 32, 20)
    assert len(list((tmp_path / "here").glob("latency-*.json"))) == 1
    monkeypatch.delenv("NNI_PLUGIN_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "nni_plugin"


class _OnCuda(nn.Module):
    """Says that its parameters are on a GPU."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter([type("P", (), {"device": torch.device("cuda")})()])


def test_widths_are_rounded_to_eight_on_cuda_alone() -> None:
    assert rounding_of(None, nn.Linear(2, 2)) == 1
    assert rounding_of(None, _OnCuda()) == 8
    assert rounding_of(1, _OnCuda()) == 1
    assert rounding_of(16, nn.Linear(2, 2)) == 16
