"""Which image comes when: an order fixed by (seed, epoch), and parts with every class in proportion.

A sampler counts on from epoch to epoch: position `i` of epoch `e` in a data set of `n` images has the key
`e * n + i`. The key tells the data set, in whatever process it runs, which random draw augments the image,
so a batch does not depend on what was drawn before it, on the number of workers, or on a restart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from nni_plugin.errors import DataError


class EpochSampler(Sampler[int]):
    """Keys of all images of one epoch, shuffled by (seed, epoch).

    Args:
        size: Number of images, at least 1.
        seed: Of the order, at least 0.
        shuffle: Whether to shuffle; otherwise the order of the data set.
    """

    def __init__(self, size: int, seed: int, *, shuffle: bool = True) -> None:
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        return iter((order + self.epoch * self.size).tolist())


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices in two, each class in proportion.

    Args:
        labels: Class of each image, `[N]`.
        fraction: Share of each class in the second part, rounded to the nearest image, in [0, 1).
        seed: Of the choice within each class, at least 0.

    Returns:
        Ascending indices of the first and of the second part.

    Raises:
        DataError: If `fraction` is outside [0, 1), or above 0 and too small for a single image.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"Expected a held-out fraction of at least 0 and below 1, got {fraction}.")
    generator = np.random.default_rng([seed, len(labels)])
    second = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        second[members[: round(fraction * len(members))]] = True
    if fraction > 0 and (not second.any() or second.all()):
        raise DataError(
            f"A held-out fraction of {fraction} of {len(labels)} training images leaves one part empty; "
            "change the fraction, or use more images."
        )
    return np.flatnonzero(~second), np.flatnonzero(second)
