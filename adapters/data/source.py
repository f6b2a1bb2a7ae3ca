"""What the loaders need to know of a data set, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nni_plugin.errors import DataError


@dataclass(frozen=True)
class Source:
    """A data set with training and test images.

    Args:
        name: As the user gave it.
        labels: Classes of the training images, `[N]`; all 0 where they are not known without reading.
        num_classes: Number of classes.
        input_shape: Channels, height and width of an image.
        mean: Of each channel, of values in [0, 1].
        std: Of each channel, of values in [0, 1].
        fingerprint: Short digest that changes with the data.
        training: Gives the data set of some training images, by index, augmented or not.
        test: The test images.
        collate: Of the loaders; None for torch's own.
        scaling: How pictures are brought to their size for scoring and testing, for people; empty for images of
            one size.
    """

    name: str
    labels: NDArray[np.int64]
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    training: Callable[[NDArray[np.int64], bool], Dataset[tuple[Tensor, Tensor]]]
    test: Dataset[tuple[Tensor, Tensor]]
    collate: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    scaling: str = ""


def check_labels(labels: NDArray[np.int64], num_classes: int, what: str) -> None:
    """Refuse labels outside `[0, num_classes)`.

    Raises:
        DataError: If there is one; `what` names the images.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"Expected labels from 0 to {num_classes - 1} in {what}, got {labels[wrong[0]]} at image "
            f"{wrong[0]} ({len(wrong)} in all); the labels are damaged or num_classes is too small."
        )


def check_statistics(values: Sequence[float], channels: int, what: str) -> tuple[float, ...]:
    """Mean or standard deviation as one number a channel; a single number serves them all.

    Raises:
        DataError: If the count does not fit, or a standard deviation is not above 0.
    """
    if len(values) not in (1, channels):
        number = "1 value" if channels == 1 else f"1 or {channels} values"
        raise DataError(f"Expected {number} for {what}, one a channel, got {len(values)}.")
    if what == "std" and min(values) <= 0:
        raise DataError(f"Expected a std above 0, got {list(values)}.")
    return tuple(float(v) for v in values) * (channels // len(values))
