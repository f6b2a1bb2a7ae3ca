"""How long single layers take at any widths: measured where it is asked for, interpolated between, kept on disk.

Latency is no multiple of the MACs: it is a staircase whose steps depend on the device, the kernel that is chosen and
the shape, so it is looked up (Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022, section
3.2). Each layer is timed alone at a grid of input and output widths; between the points of the grid its time is linear
in each width. Only the points that a question needs are measured, a few milliseconds each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

from nni_plugin.errors import ModelError
from nni_plugin.latency import dtype_name
from nni_plugin.latency_cache import LatencyCache
from nni_plugin.machine import describe_machine
from nni_plugin.processes import agreed

STEP = 8
"""Wide layers are measured at multiples of this, which vector and matrix units work on; narrow ones at 1, 2 or 4."""

POINTS = 8
"""At most about so many widths of an axis are measured."""

MIN_RUN_TIME = 0.005
"""Seconds to time a layer at least; the median of its passes counts."""

_WARM_UP_PASSES = 3


@dataclass(frozen=True)
class LayerShape:
    """All that a layer's time depends on, except where it runs.

    Args:
        kind: `"conv2d"` or `"linear"`.
        inputs: Channels read.
        outputs: Channels written.
        size: Of a convolution the height and width of its input; of a linear layer the rows of one sample.
        groups: Of a convolution.
        kernel: Likewise, height and width, as the others.
        stride: Likewise.
        padding: Likewise, or `"same"`, `"valid"`.
        dilation: Likewise.
        padding_mode: Likewise.
        bias: Whether there is one.
    """

    kind: Literal["conv2d", "linear"]
    inputs: int
    outputs: int
    size: tuple[int, ...]
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    bias: bool = False

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Linear, given: Tensor, returned: Tensor, samples: int) -> LayerShape:
        """Read a layer from what it was given and returned in a pass over so many samples.

        Args:
            layer: The layer.
            given: `[N, C, H, W]`, or `[..., C]` for a linear one, whose rows are windows or tokens of the samples.
            returned: Likewise.
            samples: Length of the batch that the network was given.
        """
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            rows = math.ceil(math.prod(given.shape[:-1]) / samples)
            return cls("linear", layer.in_features, layer.out_features, (rows,), bias=bias)
        size, padding = tuple(given.shape[-2:]), layer.padding
        if not isinstance(padding, str):
            # A subclass may pad by itself before it convolves: then its input is larger than what it was given.
            padding = tuple(padding)
            axes = zip(returned.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, padding, strict=True)
            least = [(out - 1) * step + spread * (kernel - 1) + 1 - 2 * pad for out, kernel, step, spread, pad in axes]
            size = (max(size[0], least[0]), max(size[1], least[1]))
        return cls(
            "conv2d",
            layer.in_channels,
            layer.out_channels,
            size,
            layer.groups,
            tuple(layer.kernel_size),
            tuple(layer.stride),
            padding,
            tuple(layer.dilation),
            layer.padding_mode,
            bias,
        )

    @property
    def depthwise(self) -> bool:
        """Whether every input channel has filters of its own, so that inputs leave with outputs."""
        return self.groups > 1 and self.groups == self.inputs

    def resized(self, inputs: int, outputs: int) -> LayerShape:
        """Return the layer with other widths; a depthwise one follows its outputs."""
        if self.depthwise:
            inputs = outputs * self.inputs // self.outputs
            return replace(self, inputs=inputs, outputs=outputs, groups=inputs)
        return replace(self, inputs=inputs, outputs=outputs)

    def build(self) -> nn.Module:
        """Return such a layer with random weights; the global random state stays."""
        if self.kind == "linear":
            layer: nn.Module = nn.Linear(self.inputs, self.outputs, bias=self.bias, device="meta")
        else:
            layer = nn.Conv2d(
                self.inputs,
                self.outputs,
                self.kernel,  # type: ignore[arg-type]  # two numbers each
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.dilation,  # type: ignore[arg-type]
                self.groups,
                self.bias,
                self.padding_mode,  # type: ignore[arg-type]  # as a layer had it
                device="meta",
            )
        layer, generator = layer.to_empty(device="cpu"), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-1, 1, generator=generator)
        return layer

    def example(self, batch_size: int) -> Tensor:
        """Return a random input of such a layer on the CPU, float32."""
        one = (*self.size, self.inputs) if self.kind == "linear" else (self.inputs, *self.size)
        return torch.randn(batch_size, *one, generator=torch.Generator().manual_seed(0))

    def key(self) -> str:
        """Return all of it as text."""
        values = (f"{name}={_text(value)}" for name, value in self.__dict__.items() if name != "kind" and value != ())
        return " ".join((self.kind, *values))


@dataclass(frozen=True)
class Place:
    """Where and how layers run.

    Args:
        device: The device.
        dtype: Of input and weights.
        batch_size: Samples in a pass.
        channels_last: Memory format of convolutions.
        threads: Intra-operator CPU threads.
    """

    device: torch.device
    dtype: torch.dtype
    batch_size: int = 1
    channels_last: bool = False
    threads: int = 1

    @property
    def device_name(self) -> str:
        """The name of the device's make."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return describe_machine()["CPU"] if self.device.type == "cpu" else str(self.device.type)

    def key(self) -> str:
        """Return all that times depend on besides the layer and the device, as text."""
        layout = "channels_last" if self.channels_last else "contiguous"
        words = (f"batch={self.batch_size}", dtype_name(self.dtype), layout, f"threads={self.threads}")
        return " ".join((*words, f"torch={torch.__version__}"))


def measure_layer(layer: LayerShape, place: Place) -> float:
    """Time a layer alone, in eval mode and without autograd.

    Returns:
        Median milliseconds of a pass over the batch.

    Raises:
        ModelError: It does not run there, e.g. for want of memory.
    """
    layout = torch.channels_last if place.channels_last and layer.kind == "conv2d" else torch.contiguous_format
    try:
        module = layer.build().eval().to(place.device, place.dtype).to(memory_format=layout)
        example = layer.example(place.batch_size).to(place.device, place.dtype).to(memory_format=layout)
        with torch.inference_mode():
            for _ in range(_WARM_UP_PASSES):
                module(example)
            timer = Timer("module(example)", globals={"module": module, "example": example}, num_threads=place.threads)
            return timer.blocked_autorange(min_run_time=MIN_RUN_TIME).median * 1e3
    except RuntimeError as error:
        raise ModelError(
            f"Cannot time a layer ({layer.key()}) at batch size {place.batch_size} on {place.device}: {error}. Budget "
            "by MACs, or by the latency of a smaller batch."
        ) from error


class LayerLatencies:
    """The table of one place.

    Args:
        place: Where layers run.
        cache: File of earlier measurements on that device; None keeps none.
        measure: `measure(layer, place)` -> milliseconds.

    Of several processes the first one's times hold for all, which ask the same in the same order.
    """

    def __init__(
        self,
        place: Place,
        cache: LatencyCache | None = None,
        measure: Callable[[LayerShape, Place], float] = measure_layer,
    ) -> None:
        self.place, self._cache, self._measure = place, cache, measure
        self._grids: dict[LayerShape, _Grid] = {}
        self._stored: dict[str, float] | None = None

    def ms(self, layer: LayerShape, inputs: ArrayLike, outputs: ArrayLike) -> NDArray[np.float64]:
        """Return how long a layer takes at other widths, in milliseconds for the batch.

        Args:
            layer: The layer at its full width, which the grid ends with.
            inputs: Numbers of input channels, of any shape; of a depthwise layer not looked at.
            outputs: Numbers of output channels, of a shape that fits.

        Returns:
            Times, float64, of the common shape; beyond the grid those of its end.
        """
        reads, writes = np.broadcast_arrays(np.asarray(inputs), np.asarray(outputs))
        table = self._grids.setdefault(layer, _Grid(layer))
        corners = [
            (row, column, p * q)
            for row, p in _corners(table.outputs, writes)
            for column, q in _corners(table.inputs, reads)
        ]
        wanted = np.zeros(table.ms.shape, dtype=bool)
        for row, column, share in corners:
            wanted[row[share > 0], column[share > 0]] = True
        self._learn(table, np.argwhere(wanted & np.isnan(table.ms)))
        total = np.zeros(reads.shape)
        for row, column, share in corners:
            total += np.where(share > 0, share * table.ms[row, column], 0.0)  # not a number where nobody asks
        return total

    def _learn(self, table: _Grid, points: NDArray[np.intp]) -> None:
        """Fill in points of a grid, `[points, 2]`, and measure those that nobody has measured before."""
        if len(points) == 0:
            return
        if self._stored is None:
            self._stored = {} if self._cache is None else self._cache.read()
        where = self.place.key()
        shapes = [table.layer.resized(int(table.inputs[j]), int(table.outputs[i])) for i, j in points]
        keys = [f"{shape.key()} {where}" for shape in shapes]
        missing = {key: shape for key, shape in zip(keys, shapes, strict=True) if key not in self._stored}
        bar = tqdm(missing.items(), desc="time layers", unit="shape", delay=2, leave=False, disable=None)
        fresh = {key: self._measure(shape, self.place) for key, shape in bar}
        self._stored.update(fresh)
        if fresh and self._cache is not None:
            self._stored.update(self._cache.add(fresh))
        table.ms[points[:, 0], points[:, 1]] = agreed([self._stored[key] for key in keys])


class _Grid:
    """One layer's times at the widths of a grid, not a number where they are not known: `[outputs, inputs]`."""

    def __init__(self, layer: LayerShape) -> None:
        unit = layer.outputs // layer.inputs if layer.depthwise else layer.groups
        self.layer = layer
        self.outputs = grid(layer.outputs, unit)
        self.inputs = np.array([layer.inputs]) if layer.depthwise else grid(layer.inputs, unit)
        self.ms = np.full((len(self.outputs), len(self.inputs)), np.nan)


def table_of(place: Place) -> LayerLatencies:
    """Return the table of a place, with what has been measured on its device before."""
    return LayerLatencies(place, LatencyCache(place.device_name))


def grid(width: int, unit: int = 1) -> NDArray[np.int64]:
    """Return the widths at which an axis is measured: the smallest, multiples of a step, the full one.

    Args:
        width: The full width.
        unit: Every width is a multiple of it.

    Example:
        >>> grid(20).tolist(), grid(512).tolist()
        ([1, 4, 8, 12, 16, 20], [1, 64, 128, 192, 256, 320, 384, 448, 512])
    """
    least = math.ceil(width / POINTS)
    step = 1 << (least - 1).bit_length() if least < STEP else STEP * math.ceil(least / STEP)
    step = unit * math.ceil(step / unit)
    return np.unique([min(unit, width), *range(step, width, step), width])


def _corners(axis: NDArray[np.int64], width: NDArray[Any]) -> list[tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """Return the two points of an axis around each width, by number, with their shares, which add up to one."""
    if len(axis) == 1:
        return [(np.zeros(width.shape, dtype=np.intp), np.ones(width.shape))]
    below = np.clip(np.searchsorted(axis, width, side="right") - 1, 0, len(axis) - 2)
    share = np.clip((width - axis[below]) / (axis[below + 1] - axis[below]), 0.0, 1.0)
    return [(below, 1 - share), (below + 1, share)]


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
