"""Data sets that are held in memory: digits, the relatives of MNIST, CIFAR."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from nni_plugin.adapters.data.idx import find_idx_files, read_idx
from nni_plugin.adapters.data.sampling import stratified_split
from nni_plugin.adapters.data.source import Source, check_labels, check_statistics
from nni_plugin.adapters.data.tensors import Augmentation, Format, TensorImages, identity_collate, resized
from nni_plugin.errors import DataError

# Name: torchvision's folder, and whether a mirrored image is still one of its class.
IDX_FAMILIES = {
    "torch/fashion_mnist": ("FashionMNIST", True),
    "torch/mnist": ("MNIST", False),
    "torch/kmnist": ("KMNIST", False),
}
CIFAR: dict[str, tuple[type[Any], int]] = {
    "torch/cifar10": (datasets.CIFAR10, 10),
    "torch/cifar100": (datasets.CIFAR100, 100),
}
_DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True)
class _Images:
    """uint8 images `[N, C, H, W]` and int64 labels `[N]` for training and test."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int
    augmentation: Augmentation


def load_memory(
    name: str,
    data_dir: Path | None,
    *,
    img_size: int | None,
    in_chans: int,
    seed: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Source:
    """Load one of the data sets of this module.

    Args:
        name: `"digits"`, a key of `IDX_FAMILIES` or of `CIFAR`.
        data_dir: Folder of the files; not used for `"digits"`.
        img_size: Height and width in pixels; None for 32, 28 and 32.
        in_chans: Channels; gray images are repeated, colours can be turned to gray.
        seed: Of the augmentation.
        mean: Of each channel; None to measure the training images.
        std: Of each channel; None to measure the training images.

    Raises:
        DataError: If a file is missing or damaged, or the images cannot have `in_chans` channels.
    """
    if name == "digits":
        images = _digits(img_size or 32)
    elif data_dir is None:
        raise DataError(f"Data set {name!r} is read from files: give data_dir, the folder that holds them.")
    elif name in IDX_FAMILIES:
        images = _idx(name, data_dir, img_size or 28)
    else:
        images = _cifar(name, data_dir, img_size or 32)
    check_labels(images.train_labels.numpy(), images.num_classes, f"the training labels of {name!r}")
    check_labels(images.test_labels.numpy(), images.num_classes, f"the test labels of {name!r}")
    size = img_size or images.train.shape[-1]
    train, test = (_with_channels(part, in_chans, name) for part in (images.train, images.test))
    measured_mean, measured_std = _statistics(train)
    form = Format(
        in_chans,
        size,
        check_statistics(mean or measured_mean, in_chans, "mean"),
        check_statistics(std or measured_std, in_chans, "std"),
    )

    def training(indices: NDArray[np.int64], augment: bool) -> Dataset[tuple[Tensor, Tensor]]:
        augmentation = images.augmentation if augment else None
        return TensorImages(train, images.train_labels, form, indices=indices, augmentation=augmentation, seed=seed)

    return Source(
        name=name,
        labels=images.train_labels.numpy(),
        num_classes=images.num_classes,
        input_shape=(in_chans, size, size),
        mean=form.mean,
        std=form.std,
        fingerprint=_digest(images),
        training=training,
        test=TensorImages(test, images.test_labels, form),
        collate=identity_collate,
    )


def _digits(size: int) -> _Images:
    """Scikit-learn's 1797 digits of 8x8 pixels, a fifth of each class for test."""
    from sklearn.datasets import load_digits

    content = load_digits()
    # 17 levels of gray; scaled up before rounding to bytes.
    values = torch.from_numpy(content.images).float().unsqueeze(1) * (255 / 16)
    images = resized(values, size)
    labels = torch.from_numpy(content.target.astype(np.int64))
    train, test = (torch.from_numpy(part) for part in stratified_split(labels.numpy(), 0.2, _DIGITS_SPLIT_SEED))
    augmentation = Augmentation(pad=size // 16, flip=False)
    return _Images(images[train], labels[train], images[test], labels[test], 10, augmentation)


def _idx(name: str, data_dir: Path, size: int) -> _Images:
    family, flip = IDX_FAMILIES[name]
    paths = find_idx_files(data_dir, family)
    parts: list[tuple[Tensor, Tensor]] = []
    for image_path, label_path in (paths[:2], paths[2:]):
        images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
        if len(images) != len(labels):
            raise DataError(
                f"Expected as many labels as images, got {len(images)} images in {image_path.name} and "
                f"{len(labels)} labels in {label_path.name}; the files do not belong together."
            )
        parts.append((_fitted(images.unsqueeze(1), size), labels.long()))
    return _Images(*parts[0], *parts[1], 10, Augmentation(pad=2, flip=flip))


def _cifar(name: str, data_dir: Path, size: int) -> _Images:
    kind, num_classes = CIFAR[name]
    parts: list[tuple[Tensor, Tensor]] = []
    for is_train in (True, False):
        try:
            content = kind(str(data_dir), train=is_train, download=False)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise DataError(
                f"Expected the folder {kind.base_folder!r} of {name!r}, with its python batches, in "
                f"{str(data_dir)!r}: {error}"
            ) from error
        images = torch.from_numpy(content.data).permute(0, 3, 1, 2).contiguous()
        parts.append((_fitted(images, size), torch.tensor(content.targets, dtype=torch.int64)))
    return _Images(*parts[0], *parts[1], num_classes, Augmentation(pad=4, flip=True))


def _fitted(images: Tensor, size: int) -> Tensor:
    """Smaller images scaled down, a little larger ones framed in black; more is left to each batch."""
    height, width = images.shape[2:]
    if height != width:
        raise DataError(f"Expected square images, got {height}x{width} pixels.")
    # A frame of up to two pixels takes 28x28 to 32x32, as usual for CIFAR networks, without blurring.
    if 0 < size - width <= 4:
        before = (size - width) // 2
        after = size - width - before
        return F.pad(images, [before, after, before, after])
    return resized(images, size) if size < width else images


def _with_channels(images: Tensor, in_chans: int, name: str) -> Tensor:
    stored = images.shape[1]
    if stored in (1, in_chans):
        return images
    if in_chans == 1:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return (images * weights).sum(1, keepdim=True).round_().to(torch.uint8)
    raise DataError(f"The images of {name!r} have {stored} channels: expected in_chans 1 or {stored}, got {in_chans}.")


def _statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of values in [0, 1], from the counts of the 256 levels."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].reshape(-1), minlength=256)
        share = counts.double() / counts.sum()
        mean = float(share @ levels)
        means.append(mean)
        # One level at least, so that blank images do not divide by zero.
        stds.append(max(float(share @ (levels - mean) ** 2) ** 0.5, 1 / 255))
    return means, stds


def _digest(images: _Images) -> str:
    digest = hashlib.sha256()
    for part in (images.train, images.train_labels, images.test, images.test_labels):
        digest.update(repr(tuple(part.shape)).encode())
        digest.update(np.ascontiguousarray(part.numpy()).data)
    return f"sha256:{digest.hexdigest()[:16]}"
