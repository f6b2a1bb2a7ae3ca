"""How long a forward pass takes: the one place where latency is measured.

Times come from `torch.utils.benchmark`, which synchronises with the accelerator around every block of
passes and repeats blocks until they agree. A ratio of two networks should come from `measure_pair`:
on a machine that is busy with other work, only measurements taken side by side can be compared.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.benchmark import Measurement, Timer

from nni_plugin.errors import ModelError

_WARM_UP_PASSES = 3
# A noisy machine may need longer than asked for until blocks agree, but never longer than this.
_LONGEST_OVER_SHORTEST = 4.0


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass at one batch size.

    Attributes:
        batch_size: Images per pass.
        median_ms: Median time of a pass, in milliseconds for the whole batch.
        iqr_ms: Distance between the first and third quartile of the same times, in milliseconds.
        images_per_second: Throughput, `batch_size / median_ms * 1000`.
        runs: Number of timed passes.
        device: Where it ran, e.g. `cpu` or `cuda:0`.
        dtype: Element type of input and weights, e.g. `float32`.
        threads: Intra-operator CPU threads used.
    """

    batch_size: int
    median_ms: float
    iqr_ms: float
    images_per_second: float
    runs: int
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class LatencyPair:
    """Two networks measured in turns at one batch size.

    Attributes:
        first: Latency of the first network.
        second: Latency of the second network.
        ratio: Median over the rounds of (time of the second / time of the first); below 1 the second
            is faster. Steadier than the ratio of the two medians, since each round is short.
        rounds: Number of rounds.
        ratio_iqr: Interquartile range of the rounds' ratios: how far `ratio` can be trusted.
    """

    first: Latency
    second: Latency
    ratio: float
    rounds: int
    ratio_iqr: float = 0.0


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Switch models to eval mode and put every submodule's own mode back on exit.

    Args:
        *models: Networks; a submodule that was frozen in eval mode inside a training network stays so.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def measure_latency(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    batch_sizes: Sequence[int] = (1,),
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    min_run_time: float = 0.5,
    threads: int | None = None,
) -> list[Latency]:
    """Measure the forward pass in eval mode, without autograd.

    The model keeps its weights, place, element type and mode: where another device or dtype is asked
    for, a copy is measured.

    Args:
        model: Network that takes one tensor of shape (N, C, H, W).
        input_shape: Shape of one image (C, H, W).
        batch_sizes: Values of N, each at least 1.
        device: Where to run; the model's own device when None.
        dtype: Element type of the input and of the floating-point weights.
        min_run_time: Seconds to measure at least, per batch size; at most about four times as long.
        threads: Intra-operator CPU threads; torch's current setting when None.

    Returns:
        One `Latency` per batch size, in their order.

    Raises:
        ModelError: A batch size is below 1, or the forward pass fails at one of them.

    Example:
        >>> [result] = measure_latency(nn.Conv2d(3, 8, 3), (3, 16, 16), min_run_time=0.01)
        >>> result.batch_size, result.device, result.median_ms > 0
        (1, 'cpu', True)
    """
    place = device_of(model) if device is None else torch.device(device)
    threads = torch.get_num_threads() if threads is None else threads
    network = placed(model, place, dtype)
    results = []
    with evaluation_mode(network), torch.inference_mode():
        for batch_size in batch_sizes:
            timer = _warm_timer(network, input_shape, batch_size, place, dtype, threads)
            measurement = timer.adaptive_autorange(
                min_run_time=min_run_time, max_run_time=_LONGEST_OVER_SHORTEST * min_run_time
            )
            results.append(_latency([measurement], batch_size, place, dtype, threads))
    return results


def measure_pair(
    first: nn.Module,
    second: nn.Module,
    input_shape: tuple[int, int, int],
    batch_sizes: Sequence[int] = (1,),
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    min_run_time: float = 0.5,
    rounds: int = 41,
    threads: int | None = None,
) -> list[LatencyPair]:
    """Measure two networks in turns, so that their ratio holds on a noisy machine.

    Args:
        first: Network before, taking (N, C, H, W).
        second: Network after, taking the same input.
        input_shape: Shape of one image (C, H, W).
        batch_sizes: Values of N, each at least 1.
        device: Where to run both; the first model's own device when None.
        dtype: Element type of the input and of the floating-point weights.
        min_run_time: Seconds to measure each network, about, per batch size.
        rounds: Number of rounds, at least 3; each times both networks once, in alternating order. Many short ones
            give a steadier median than a few long ones where other work interrupts.
        threads: Intra-operator CPU threads; torch's current setting when None.

    Returns:
        One `LatencyPair` per batch size, in their order.

    Raises:
        ModelError: A batch size is below 1, or a forward pass fails at one of them.
        ValueError: `rounds` is below 3.
    """
    if rounds < 3:
        raise ValueError(f"measure_pair needs at least 3 rounds for a median, got {rounds}.")
    place = device_of(first) if device is None else torch.device(device)
    threads = torch.get_num_threads() if threads is None else threads
    models = (placed(first, place, dtype), placed(second, place, dtype))
    pairs = []
    with evaluation_mode(*models), torch.inference_mode():
        for batch_size in batch_sizes:
            timers = [_warm_timer(m, input_shape, batch_size, place, dtype, threads) for m in models]
            passes = [passes_within(timer, min_run_time / rounds) for timer in timers]
            times: tuple[list[Measurement], list[Measurement]] = ([], [])
            for turn in range(rounds):
                # Every other round starts with the second network: a clock that drifts steadily
                # would otherwise always favour the same one.
                for i in (0, 1) if turn % 2 == 0 else (1, 0):
                    times[i].append(timers[i].timeit(passes[i]))
            low, ratio, high = statistics.quantiles(b.median / a.median for a, b in zip(*times, strict=True))
            before, after = (_latency(list(t), batch_size, place, dtype, threads) for t in times)
            pairs.append(LatencyPair(before, after, ratio, rounds, high - low))
    return pairs


def device_of(model: nn.Module) -> torch.device:
    """Return where a network's parameters lie; the CPU for one without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model itself where it already fits, else a converted copy."""
    tensors = [*model.parameters(), *model.buffers()]
    # An empty tensor resolves "cuda" to "cuda:0", so that the comparison below holds.
    resolved = torch.empty(0, device=device).device
    fits = all(t.device == resolved and (t.dtype == dtype or not t.is_floating_point()) for t in tensors)
    return model if fits else copy.deepcopy(model).to(device=device, dtype=dtype)


def _warm_timer(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
) -> Timer:
    """Return a timer of the forward pass, after a few passes that show it works."""
    if batch_size < 1:
        raise ModelError(f"Expected a batch size of at least 1 to measure latency at, got {batch_size}.")
    # Own generator: measuring must not move the random state of a training run.
    generator = torch.Generator().manual_seed(0)
    try:
        images = torch.randn(batch_size, *input_shape, generator=generator).to(device=device, dtype=dtype)
        for _ in range(_WARM_UP_PASSES):
            model(images)
    except Exception as error:  # a forward pass may raise anything
        raise ModelError(
            f"The forward pass failed at batch size {batch_size} with input "
            f"{(batch_size, *input_shape)}, {dtype_name(dtype)}, on {device}: {str(error).rstrip('.')}. "
            f"Check the input shape and dtype{', or measure at a smaller batch size' * (batch_size > 1)}."
        ) from error
    return Timer("model(images)", globals={"model": model, "images": images}, num_threads=threads)


def passes_within(timer: Timer, seconds: float) -> int:
    """Return how many passes fit into a time, at least 1."""
    estimate = timer.blocked_autorange(min_run_time=min(seconds, 0.05))
    return max(1, round(seconds / estimate.median))


def _latency(
    measurements: list[Measurement],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
) -> Latency:
    merged = Measurement.merge(measurements)[0] if len(measurements) > 1 else measurements[0]
    median_ms = merged.median * 1e3
    return Latency(
        batch_size=batch_size,
        median_ms=median_ms,
        iqr_ms=merged.iqr * 1e3,
        images_per_second=batch_size / median_ms * 1e3,
        runs=merged.number_per_run * len(merged.raw_times),
        device=str(device),
        dtype=dtype_name(dtype),
        threads=threads,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return e.g. `float32`."""
    return str(dtype).removeprefix("torch.")
