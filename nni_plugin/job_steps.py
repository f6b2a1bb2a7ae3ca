"""Steps that jobs share: training the dense network, minibatches for a method, what is measured before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.data import DataSplits
from nni_plugin.adapters.training import TrainingConfig, evaluate, fit
from nni_plugin.checkpoint.tensors import is_channels_last
from nni_plugin.cost import count
from nni_plugin.errors import TrainingError
from nni_plugin.latency import measure_pair


class FirstBatches:
    """The first minibatches of a loader, on a device; can be gone through again.

    Args:
        loader: Of images and labels.
        device: Where they go.
        batches: How many; None takes all.
    """

    def __init__(self, loader: Any, device: torch.device, batches: int | None) -> None:
        self.loader, self.device, self.batches = loader, device, batches

    def __len__(self) -> int:
        """Return how many minibatches there are."""
        return min(len(self.loader), self.batches or len(self.loader))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through them, from the first."""
        for images, labels in islice(self.loader, self.batches):
            yield images.to(self.device), labels.to(self.device)


def pretrain(
    model: nn.Module,
    splits: DataSplits,
    config: TrainingConfig,
    device: torch.device,
    state: Path | None = None,
    *,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Train the dense network; returns a record an epoch.

    Args:
        model: Trained in place.
        splits: Its data.
        config: Its training; no epochs leave it as it is.
        device: Where.
        state: Folder of checkpoints; None for none.
        resume: Go on from the one there.

    Raises:
        TrainingError: The loss is not finite; the text names the flags of pretraining.
    """
    try:
        return fit(model, splits, config, checkpoint_dir=state, resume=resume, device=device, phase="pretrain")
    except TrainingError as error:
        raise error.of_pretraining() from error


def before_and_after(
    dense: nn.Module,
    dense_top1: float,
    slim: nn.Module,
    splits: DataSplits,
    device: torch.device,
    latency_batch_sizes: Sequence[int],
) -> dict[str, Any]:
    """Measure a network and its pruned form, timed in turns.

    Args:
        dense: The network as it was; it takes the memory format of the other, in place.
        dense_top1: Its accuracy on the test images, in percent.
        slim: The pruned one.
        splits: Their data.
        device: Where both are.
        latency_batch_sizes: To time at.

    Returns:
        `baseline`, `pruned`, `latency_ratio` and `latency_ratio_iqr` of `metrics.json`.
    """
    if any(is_channels_last(parameter) for parameter in slim.parameters()):
        dense.to(memory_format=torch.channels_last)
    pairs = measure_pair(dense, slim, splits.input_shape, latency_batch_sizes)
    image = torch.zeros(1, *splits.input_shape, device=device)
    return {
        "baseline": {
            "top1": dense_top1,
            **asdict(count(dense, image)),
            "latency_ms": {str(pair.first.batch_size): pair.first.median_ms for pair in pairs},
        },
        "pruned": {
            "top1": evaluate(slim, splits.test, device)["top1"],
            **asdict(count(slim, image)),
            "latency_ms": {str(pair.second.batch_size): pair.second.median_ms for pair in pairs},
        },
        "latency_ratio": {str(pair.first.batch_size): pair.ratio for pair in pairs},
        "latency_ratio_iqr": {str(pair.first.batch_size): pair.ratio_iqr for pair in pairs},
    }
