"""How long each block of a network takes, alone, on the inputs that it really gets there.

In each round one forward pass goes through the network. Wherever it is about to enter a module that leaves with a
block, it waits while that module alone is timed on a copy of what it is just being given. So no block's inputs are
kept, shapes, strides and values are those of the network, and blocks take turns: on a machine that is busy with other
work each one meets the same weather. The whole network is timed in each round too, which makes a share of it steadier
than the milliseconds are.

In isolation a block finds its inputs and weights in the caches, and a GPU waits for every launch: what a network loses
with a block may differ from this, and a plan for a latency is measured on the slim network.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.benchmark import Timer

from nni_plugin.cost import batch_size_of, call
from nni_plugin.errors import ModelError
from nni_plugin.latency import Latency, device_of, dtype_name, evaluation_mode, passes_within, placed
from nni_plugin.layers.blocks import Block

_ROUNDS = 9


@dataclass(frozen=True)
class BlockLatency(Latency):
    """Time of one pass through one block.

    Attributes:
        share: Median over the rounds of (time of the block / time of the network); the shares of all blocks do not add
            up to 1, for the network has other parts, and some blocks hold others.
    """

    share: float


def block_latencies(
    model: nn.Module,
    example_inputs: Any,
    blocks: Sequence[Block],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    min_run_time: float = 0.2,
    threads: int | None = None,
) -> dict[str, BlockLatency]:
    """Measure the forward pass of each block in eval mode, without autograd, and that of the whole network.

    The model keeps its weights, place, element type and modes; where another device or dtype is asked for, a copy is
    measured.

    Args:
        model: The network.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        blocks: The blocks; of several members the times add up.
        batch_size: Samples a pass, those of `example_inputs` again and again; None: as many as there are.
        device: Where to run; the model's own device when None.
        dtype: Element type of the inputs and of the floating-point weights.
        min_run_time: Seconds to measure each module, about.
        threads: Intra-operator CPU threads; torch's current setting when None.

    Returns:
        The latency of each block by its name, in the order given, and that of the network under `""`.

    Raises:
        ModelError: The batch size is below 1, the forward pass fails, or does not go through a block once.

    Example:
        >>> from nni_plugin.layers import removable_blocks
        >>> from nni_plugin.networks import resnet20
        >>> network, images = resnet20(), torch.zeros(2, 3, 8, 8)
        >>> found = block_latencies(network, images, removable_blocks(network, images), min_run_time=0.01)
        >>> list(found)[0], list(found)[-1], 0 < found["layer2.1"].median_ms < found[""].median_ms
        ('layer1.0', '', True)
    """
    number = batch_size_of(example_inputs) if batch_size is None else batch_size
    if number < 1:
        raise ModelError(f"Expected a batch size of at least 1 to measure latency at, got {number}.")
    place = device_of(model) if device is None else torch.device(device)
    threads = torch.get_num_threads() if threads is None else threads
    network = placed(model, place, dtype)
    inputs = _inputs(example_inputs, batch_size_of(example_inputs), number, place, dtype)
    with evaluation_mode(network), torch.inference_mode():
        watch = _Watch(network, [member for block in blocks for member in block.members], min_run_time, threads)
        for _ in range(_ROUNDS):
            watch.round(inputs)
    common = (number, str(place), dtype_name(dtype), threads)
    found = {block.name: _summary(block.members, watch, *common) for block in blocks}
    return {**found, "": _summary(("",), watch, *common)}


class _Watch:
    """Times modules during forward passes, a round a pass.

    Attributes:
        times: Seconds of a call, by the module's name, one a round; the network's under `""`.
        calls: How many calls of it a round takes.
    """

    def __init__(self, network: nn.Module, members: Sequence[str], min_run_time: float, threads: int) -> None:
        known = dict(network.named_modules())
        missing = [name for name in members if name not in known]
        if missing:
            raise ModelError(
                f"{type(network).__name__} has no module {missing[0]!r}: the blocks are of another network; find them "
                "anew with removable_blocks."
            )
        self.network, self.modules = network, {name: known[name] for name in members}
        self.times: dict[str, list[float]] = {name: [] for name in ("", *self.modules)}
        self.calls: dict[str, int] = {}
        self._seconds, self._threads = min_run_time / _ROUNDS, threads

    def round(self, inputs: Any) -> None:
        """Time the network and each module once.

        Raises:
            ModelError: The forward pass fails, or does not go through a module once.
        """
        before = len(self.times[""])
        try:
            self._time("", "call(module, inputs)", call=call, module=self.network, inputs=inputs)
            with self._waiting():
                call(self.network, inputs)
        except Exception as error:  # a forward pass may raise anything
            raise ModelError(
                f"The forward pass failed at batch size {batch_size_of(inputs)}: {error}. Check the example inputs and "
                "the dtype, or measure at a smaller batch size."
            ) from error
        missed = [name for name in self.modules if len(self.times[name]) == before]
        if missed:
            raise ModelError(f"The forward pass does not go through {missed[0]!r}; leave its block out.")

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Have each module timed where a forward pass first enters it; no hook stays afterwards."""
        left = dict(self.modules)
        handles: list[Any] = []

        def arm() -> None:
            handles.extend(m.register_forward_pre_hook(enter(name), with_kwargs=True) for name, m in left.items())

        def disarm() -> None:
            while handles:
                handles.pop().remove()

        def enter(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                disarm()  # a hook takes time, also one on a module inside
                del left[name]
                # A copy, for a module may change what it gets in place.
                args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
                self._time(name, "module(*args, **kwargs)", module=module, args=args, kwargs=kwargs)
                arm()

            return hook

        try:
            arm()
            yield
        finally:
            disarm()

    def _time(self, name: str, statement: str, **names: Any) -> None:
        timer = Timer(statement, globals=names, num_threads=self._threads)
        if name not in self.calls:
            self.calls[name] = passes_within(timer, self._seconds)
        self.times[name].append(timer.timeit(self.calls[name]).median)


def _inputs(example_inputs: Any, samples: int, number: int, place: torch.device, dtype: torch.dtype) -> Any:
    """Return inputs of another batch size: the same samples again and again."""

    def fitting(tensor: Tensor) -> Tensor:
        if tensor.dim() > 0 and len(tensor) == samples:
            tensor = tensor[torch.arange(number, device=tensor.device) % samples]
        return tensor.to(place, dtype) if tensor.is_floating_point() else tensor.to(place)

    return tree_map_only(Tensor, fitting, example_inputs)


def _summary(
    members: Sequence[str], watch: _Watch, batch_size: int, device: str, dtype: str, threads: int
) -> BlockLatency:
    seconds = [sum(parts) for parts in zip(*(watch.times[name] for name in members), strict=True)]
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return BlockLatency(
        batch_size=batch_size,
        median_ms=median * 1e3,
        iqr_ms=(upper - lower) * 1e3,
        images_per_second=batch_size / median,
        runs=_ROUNDS * min(watch.calls[name] for name in members),
        device=device,
        dtype=dtype,
        threads=threads,
        share=statistics.median(part / whole for part, whole in zip(seconds, watch.times[""], strict=True)),
    )
