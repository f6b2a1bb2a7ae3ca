"""Top-1 accuracy and mean loss of a classifier on a labelled set."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from nni_plugin.errors import TrainingError


def show_progress(progress: bool | None) -> bool:
    """Return whether to draw a progress bar: as asked, or when standard error is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module of `model` its train or eval mode back on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_classes(logits: torch.Tensor, target: torch.Tensor) -> None:
    """Check that labels fit a classifier's output.

    Args:
        logits: Shape (N, classes).
        target: Integer labels, shape (N,).

    Raises:
        TrainingError: The output is not (N, classes), or a label is not below the number of classes.
    """
    if logits.ndim != 2:
        raise TrainingError(f"expected logits of shape (N, classes), got {tuple(logits.shape)}")
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
        raise TrainingError(
            f"the model has {logits.shape[1]} outputs but the data holds labels {int(target.min())} to "
            f"{int(target.max())}; build the model with as many classes as the data has"
        )


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | None = None,
    *,
    progress: bool | None = None,
) -> dict[str, float]:
    """Measure a classifier in eval mode and full precision; its modes are put back.

    Args:
        model: Maps images (N, C, H, W) to logits (N, classes).
        loader: Yields (images, integer labels of shape (N,)).
        device: Where to run, the model is moved there; None runs where the model is.
        progress: Draw a progress bar; None draws one when standard error is a terminal.

    Returns:
        ``top1`` in percent, 0 to 100, and ``loss``, the mean cross-entropy over all images.

    Raises:
        TrainingError: The loader is empty, the logits are not finite, or labels do not fit the outputs.
    """
    from torchmetrics.aggregation import MeanMetric

    if device is None:
        device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    model.to(device)
    top1, mean_loss = MeanMetric().to(device), MeanMetric().to(device)
    # Sums of many losses: single precision would lose digits on large sets.
    top1.set_dtype(torch.float64), mean_loss.set_dtype(torch.float64)
    images_seen = 0
    with kept_modes(model), torch.no_grad():
        model.eval()
        for images, target in tqdm(loader, desc="evaluate", leave=False, disable=not show_progress(progress)):
            images, target = images.to(device), target.to(device)
            logits = model(images).float()
            check_classes(logits, target)
            if not bool(torch.isfinite(logits).all()):
                raise TrainingError(
                    "the model's logits are not finite on the test data; its weights have diverged, "
                    "train again with a lower --lr"
                )
            top1.update((logits.argmax(dim=1) == target).double() * 100)
            mean_loss.update(functional.cross_entropy(logits, target, reduction="none").double())
            images_seen += len(target)
    if images_seen == 0:
        raise TrainingError("expected test data to evaluate on, got a loader without batches")
    return {"top1": float(top1.compute()), "loss": float(mean_loss.compute())}
