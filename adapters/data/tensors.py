"""Small images in memory: a whole batch is gathered, shifted, flipped and normalised at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Augmentation:
    """Random translation (crop after padding with black) and horizontal flip.

    Args:
        pad: Largest shift in pixels, in each direction, at least 0.
        flip: Whether to mirror one image in two.
    """

    pad: int
    flip: bool


@dataclass(frozen=True)
class Format:
    """What a batch looks like.

    Args:
        channels: Channels of a batch; a single stored channel is repeated.
        size: Height and width of a batch in pixels; stored images are scaled bilinearly.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, likewise.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels by key (see :mod:`~nni_plugin.adapters.data.sampling`), one or a batch at a time.

    Args:
        images: uint8 `[N, 1 or channels, H, W]`.
        labels: int64 `[N]`.
        form: Of the batches.
        indices: Which of the N images belong to this data set; all by default.
        augmentation: None for the images as they are.
        seed: Of the augmentation, at least 0.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        form: Format,
        *,
        indices: NDArray[np.int64] | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.labels = labels
        self.form = form
        self.indices = torch.arange(len(labels)) if indices is None else torch.from_numpy(indices)
        self.augmentation = augmentation
        self.seed = seed
        self._scale = torch.tensor([1 / (255 * std) for std in form.std]).view(1, -1, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(form.mean, form.std, strict=True)]).view(1, -1, 1, 1)
        self._draws: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The batch of these keys: float32 `[B, channels, size, size]` and int64 `[B]`."""
        places = torch.tensor(keys)
        chosen = self.indices[places % len(self)]
        images = self.images[chosen]
        if self.augmentation is not None:
            images = self._augmented(images, places, self.augmentation)
        return self._formatted(images), self.labels[chosen]

    def _augmented(self, images: Tensor, places: Tensor, augmentation: Augmentation) -> Tensor:
        draws = torch.empty(len(places), 3, dtype=torch.int64)
        epochs = places // len(self)
        for epoch in epochs.unique().tolist():
            chosen = epochs == epoch
            draws[chosen] = self._epoch_draws(epoch, augmentation)[places[chosen] % len(self)]
        if augmentation.pad:
            height, width = images.shape[2:]
            padded = F.pad(images, [augmentation.pad] * 4)
            # Every crop is a view; indexing by the shifts copies the one wanted of each image.
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)
            images = crops[torch.arange(len(images)), :, draws[:, 0], draws[:, 1]]
        if augmentation.flip:
            images = torch.where(draws[:, 2].bool().view(-1, 1, 1, 1), images.flip(3), images)
        return images

    def _epoch_draws(self, epoch: int, augmentation: Augmentation) -> Tensor:
        """Shift down, shift right and flip of every image in an epoch, `[N, 3]`."""
        if self._draws[0] != epoch:
            # The last entry sets this stream apart from the sampler's order.
            generator = np.random.default_rng([self.seed, epoch, 1])
            bounds = [2 * augmentation.pad + 1, 2 * augmentation.pad + 1, 2]
            self._draws = epoch, torch.from_numpy(generator.integers(0, bounds, size=(len(self), 3)))
        return self._draws[1]

    def _formatted(self, images: Tensor) -> Tensor:
        values = images.float()
        if values.shape[-1] != self.form.size:
            values = F.interpolate(values, [self.form.size] * 2, mode="bilinear", antialias=True)
        return values.expand(-1, self.form.channels, -1, -1) * self._scale + self._shift


def identity_collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A batch of :meth:`TensorImages.__getitems__` is complete already."""
    return batch


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images `[N, C, H, W]` scaled bilinearly to `size` x `size`."""
    values = F.interpolate(images.float(), [size, size], mode="bilinear", antialias=True)
    return values.round_().clamp_(0, 255).to(torch.uint8)
