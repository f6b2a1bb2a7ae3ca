"""Where channels live: every place of every layer, proved by cutting and comparing with a fresh layer."""

from typing import Any

import pytest
import torch
from torch import nn

from nni_plugin.tensors import is_depthwise, kind_of, places_of, shrink_sizes, tie_period

KINDS: list[tuple[nn.Module, str]] = [
    (nn.Conv2d(4, 8, 3), "dense"),
    (nn.Conv2d(4, 8, 3, groups=2), "dense"),
    (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
    (nn.Conv1d(8, 8, 3, groups=8), "depthwise"),
    (nn.ConvTranspose2d(8, 8, 3, groups=8), "depthwise"),
    (nn.Conv2d(1, 1, 3), "dense"),
    (nn.Conv2d(8, 4, 3, groups=4), ""),
    (nn.Conv2d(4, 8, 3, groups=4), "dense"),
    (nn.ConvTranspose2d(4, 8, 3), "dense"),
    (nn.Linear(4, 8), "dense"),
    (nn.BatchNorm2d(4), "norm"),
    (nn.BatchNorm1d(4, affine=False), "norm"),
    (nn.SyncBatchNorm(4), "norm"),
    (nn.InstanceNorm2d(4), "norm"),
    (nn.GroupNorm(2, 4), "norm"),
    (nn.LayerNorm(4), "norm"),
    (nn.LayerNorm([4, 4]), ""),
    (nn.PReLU(4), "prelu"),
    (nn.Embedding(10, 4), "embedding"),
    (nn.ReLU(), ""),
    (nn.Sequential(nn.Linear(4, 4)), ""),
    (nn.LSTM(4, 4), ""),
]


@pytest.mark.parametrize(("layer", "kind"), KINDS, ids=lambda value: str(value)[:40])
def test_kinds(layer: nn.Module, kind: str) -> None:
    assert kind_of(layer) == kind
    assert is_depthwise(layer) is (kind == "depthwise")


def test_subclasses_are_what_they_extend() -> None:
    class Mine(nn.Conv2d):
        pass

    assert kind_of(Mine(3, 4, 1)) == "dense"


# A layer, the axis, the channels kept, and the layer of the smaller size.
CUTS: list[tuple[Any, str, list[int], Any]] = [
    (nn.Conv2d(4, 8, 3), "out", [0, 3, 5], nn.Conv2d(4, 3, 3)),
    (nn.Conv2d(4, 8, 3), "in", [0, 3], nn.Conv2d(2, 8, 3)),
    (nn.Conv2d(4, 8, 3, bias=False), "out", [1], nn.Conv2d(4, 1, 3, bias=False)),
    (nn.Conv2d(4, 8, 3, groups=2), "out", [0, 3, 4, 7], nn.Conv2d(4, 4, 3, groups=2)),
    (nn.Conv2d(6, 8, 3, groups=2), "in", [0, 2, 3, 5], nn.Conv2d(4, 8, 3, groups=2)),
    (nn.Conv2d(8, 8, 3, groups=8), "out", [1, 2, 7], nn.Conv2d(3, 3, 3, groups=3)),
    (nn.ConvTranspose2d(4, 8, 3), "out", [0, 3, 5], nn.ConvTranspose2d(4, 3, 3)),
    (nn.ConvTranspose2d(4, 8, 3), "in", [0, 3], nn.ConvTranspose2d(2, 8, 3)),
    (nn.ConvTranspose2d(4, 8, 3, groups=2), "out", [1, 2, 5, 6], nn.ConvTranspose2d(4, 4, 3, groups=2)),
    (nn.ConvTranspose2d(4, 8, 3, groups=2), "in", [1, 3], nn.ConvTranspose2d(2, 8, 3, groups=2)),
    (nn.Conv1d(4, 8, 3), "out", [0, 3], nn.Conv1d(4, 2, 3)),
    (nn.Conv3d(4, 8, 3), "in", [0, 3], nn.Conv3d(2, 8, 3)),
    (nn.Linear(4, 8), "out", [0, 7], nn.Linear(4, 2)),
    (nn.Linear(4, 8, bias=False), "in", [0, 1, 3], nn.Linear(3, 8, bias=False)),
    (nn.BatchNorm2d(4), "out", [1, 3], nn.BatchNorm2d(2)),
    (nn.BatchNorm2d(4, affine=False), "out", [1, 3], nn.BatchNorm2d(2, affine=False)),
    (nn.BatchNorm2d(4, track_running_stats=False), "out", [1, 3], nn.BatchNorm2d(2, track_running_stats=False)),
    (nn.InstanceNorm2d(4, affine=True), "out", [1, 3], nn.InstanceNorm2d(2, affine=True)),
    (nn.GroupNorm(2, 8), "out", [0, 2, 4, 6], nn.GroupNorm(2, 4)),
    (nn.LayerNorm(4), "out", [1, 3], nn.LayerNorm(2)),
    (nn.PReLU(4), "out", [1, 3], nn.PReLU(2)),
    (nn.PReLU(), "out", [1, 3], nn.PReLU()),
    (nn.Embedding(10, 4), "out", [1, 3], nn.Embedding(10, 2)),
]


@pytest.mark.parametrize(("layer", "axis", "kept", "expected"), CUTS, ids=lambda v: str(v)[:45])
def test_places_and_sizes_make_a_layer_of_the_smaller_size(
    layer: nn.Module, axis: Any, kept: list[int], expected: nn.Module
) -> None:
    width = max(getattr(layer, f"{axis}_channels", 0), getattr(layer, f"{axis}_features", 0)) or 8
    if kind_of(layer) in ("norm", "prelu", "embedding"):
        width = next(
            (getattr(layer, n) for n in ("num_features", "num_channels", "embedding_dim") if hasattr(layer, n)), 4
        )
    shapes = {name: list(tensor.shape) for name, tensor in layer.state_dict().items()}
    for place in places_of(layer, axis):
        positions = sorted({i % place.period for i in kept}) if place.period else kept
        shapes[place.tensor][place.dim] = len(positions)
    assert shapes == {name: list(tensor.shape) for name, tensor in expected.state_dict().items()}
    for name, value in shrink_sizes(layer, axis, width - len(kept)).items():
        assert getattr(expected, name) == value, name
    changed = {n for n in vars(layer) if not n.startswith("_") and vars(layer)[n] != vars(expected)[n]}
    assert changed <= set(shrink_sizes(layer, axis, width - len(kept))) | {"training"}


@pytest.mark.parametrize(
    ("layer", "axis", "period"),
    [
        (nn.Conv2d(6, 8, 3, groups=2), "in", 3),
        (nn.Conv2d(6, 8, 3, groups=2), "out", 4),
        (nn.ConvTranspose2d(6, 8, 3, groups=2), "in", 3),
        (nn.Conv2d(8, 8, 3, groups=8), "out", None),
        (nn.Conv2d(6, 8, 3), "in", None),
        (nn.GroupNorm(4, 8), "out", 2),
        (nn.GroupNorm(1, 8), "out", None),
        (nn.GroupNorm(8, 8), "out", 1),
        (nn.BatchNorm2d(8), "out", None),
        (nn.Linear(8, 8), "in", None),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_is_tied(layer: nn.Module, axis: Any, period: int | None) -> None:
    assert tie_period(layer, axis) == period


def test_the_positions_of_a_grouped_convolution() -> None:
    """Position `p` of the folded dimension is channel `p` of every group: closing it closes exactly those."""
    conv = nn.Conv2d(6, 4, 1, groups=2).double()
    (place,) = places_of(conv, "in")
    x = torch.randn(1, 6, 1, 1, dtype=torch.float64)
    for channel in range(6):
        closed = x.clone()
        closed[:, [i for i in range(6) if i % 3 == channel % 3]] = 0
        expected = conv(closed)
        weight = conv.weight.detach().clone()
        weight.select(place.dim, channel % (place.period or 6)).zero_()
        torch.testing.assert_close(nn.functional.conv2d(x, weight, conv.bias, groups=2), expected)
