"""A network without one of its blocks, block after block: what it costs then, and what its loss becomes.

Statistics of batch normalisations behind a block belong to the network with it. So they are estimated anew, and those
of the whole network on the same minibatches for the comparison: a block that does nothing changes nothing, exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_plugin.adapters.training import evaluate
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import Cost, count
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.removal import Removal
from nni_plugin.layers.trace import CallRecord


@dataclass(frozen=True)
class Absence:
    """What changes when a block is not there.

    Args:
        loss: Change of the mean cross-entropy; above 0 the block was of use.
        top1: Change of the accuracy, in points.
    """

    loss: float
    top1: float


def costs_saved(
    model: nn.Module, example_inputs: Any, blocks: Sequence[Block], records: Mapping[str, CallRecord]
) -> dict[str, Cost]:
    """Count the MACs and parameters that leave with each block.

    Args:
        model: The network; left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        blocks: Blocks of the network.
        records: As :func:`~nni_plugin.layers.blocks.find_blocks` gave them.
    """
    whole = count(model, example_inputs)
    saved = {}
    for block in blocks:
        with without(model, block, records):
            rest = count(model, example_inputs)
        saved[block.name] = Cost(whole.macs - rest.macs, whole.params - rest.params)
    return saved


@contextmanager
def without(model: nn.Module, block: Block, records: Mapping[str, CallRecord]) -> Iterator[None]:
    """Take one block out of a network for a while, with an identity in its place unless it is a run of modules."""
    shells = () if block.kind == "unit" else (block.name,)
    undo = Removal((block,), shells, records).perform(model)
    try:
        yield
    finally:
        undo()


class Absences:
    """Measures the network without a block, on a copy.

    Args:
        model: The network.
        records: As :func:`~nni_plugin.layers.blocks.find_blocks` gave them.
        images: Minibatches `(images, labels)` that can be gone through again, to measure on.
        statistics: Minibatches to estimate the statistics of batch normalisations on.

    Attributes:
        whole: `loss` and `top1` (percent) of the whole network, its statistics estimated on the same minibatches.
    """

    def __init__(
        self,
        model: nn.Module,
        records: Mapping[str, CallRecord],
        images: Iterable[Any],
        statistics: Iterable[Any],
    ) -> None:
        self.network, self.records = copy.deepcopy(model).eval(), records
        self.images, self.statistics = images, statistics
        self._has_statistics = any(isinstance(m, _BatchNorm) for m in self.network.modules())
        self.whole = self._measured()

    def of(self, block: Block) -> Absence:
        """Measure what changes when a block is not there."""
        with without(self.network, block, self.records):
            found = self._measured()
        return Absence(found["loss"] - self.whole["loss"], found["top1"] - self.whole["top1"])

    def _measured(self) -> dict[str, float]:
        if self._has_statistics:
            with torch.random.fork_rng(devices=[]):
                reestimate_batchnorm(self.network, self.statistics, cross_entropy)
        return evaluate(self.network, self.images, progress=False)
