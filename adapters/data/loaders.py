"""Loaders for training, scoring, holding out and testing, by the name of a data set."""

from __future__ import annotations

import difflib
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nni_plugin.adapters.data.memory import CIFAR, IDX_FAMILIES, load_memory
from nni_plugin.adapters.data.pictures import load_pictures
from nni_plugin.adapters.data.sampling import EpochSampler, stratified_split
from nni_plugin.adapters.data.source import Source
from nni_plugin.errors import DataError

_IN_MEMORY = ("digits", *IDX_FAMILIES, *CIFAR)
_TORCH = ("torch/imagenet", "torch/inaturalist", "torch/places365", "torch/qmnist")
_STREAMED = ("hfids/", "tfds/", "wds/")
# Names that are known; timm also takes any "hfds/...".
DATASETS: tuple[str, ...] = (*_IN_MEMORY, "ImageFolder", *_TORCH)
# timm's number of processes.
_WORKERS = 4

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready to use.

    Every loader gives batches `(images float32 [N, C, H, W], normalised; labels int64 [N])`.

    Args:
        train: Augmented and shuffled by (seed, epoch); an incomplete last batch is left out.
        score: The same training images as they are, in an order fixed by the seed, for gathering importance;
            an incomplete last batch is left out, so that all minibatches weigh the same.
        held_out: The training images kept out of `train` and `score`; None if there are none.
        test: The test images.
        num_classes: Number of classes.
        input_shape: Channels, height and width of an image.
        name: Of the data set.
        fingerprint: Short digest that changes with the data.
        mean: Subtracted from each channel, of values in [0, 1].
        std: By which each channel is then divided.
        scaling: How pictures are brought to their size for scoring and testing; empty for images of one size.
    """

    train: DataLoader[Batch]
    score: DataLoader[Batch]
    held_out: DataLoader[Batch] | None
    test: DataLoader[Batch]
    num_classes: int
    input_shape: tuple[int, int, int]
    name: str
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scaling: str = ""

    def describe(self) -> str:
        """Return in one line how many images there are, and what the network sees of them."""
        held_out = 0 if self.held_out is None else _images(self.held_out)
        apart = f" and {held_out:,} held-out" if held_out else ""
        shape = " x ".join(map(str, self.input_shape))
        mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std))
        return (
            f"{self.name}: {_images(self.train):,} training{apart} and {_images(self.test):,} test images, "
            f"{self.num_classes} classes; {', '.join(filter(None, (shape, self.scaling)))}, mean {mean}, std {std}"
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration over `train` gives.

        Accelerate's prepared loader counts epochs itself: call its own `set_epoch` instead.
        """
        sampler = self.train.sampler
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(epoch)


def create_loaders(
    dataset: str = "digits",
    data_dir: str | Path | None = None,
    *,
    batch_size: int = 128,
    img_size: int | None = None,
    in_chans: int = 3,
    num_classes: int | None = None,
    num_workers: int | None = 0,
    seed: int = 0,
    train_fraction_held_out: float = 0.0,
    augment: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    train_split: str = "train",
    val_split: str = "validation",
    transform_kwargs: Mapping[str, Any] | None = None,
    pin_memory: bool = False,
) -> DataSplits:
    """Open a data set.

    Args:
        dataset: `"digits"` (scikit-learn's, comes with it), `"torch/fashion_mnist"`, `"torch/mnist"`,
            `"torch/kmnist"`, `"torch/cifar10"`, `"torch/cifar100"`, `"ImageFolder"`, or a data set with
            random access of `timm.data.create_dataset`. Nothing is downloaded, except by `hfds/`.
        data_dir: The folder with the data; for the relatives of MNIST the one with the four IDX files, or
            torchvision's. Not used for `"digits"`.
        batch_size: Images in a batch, at least 1.
        img_size: Height and width of the images in pixels; None for 28 (relatives of MNIST), 32 (digits,
            CIFAR) or 224.
        in_chans: Channels of the images; a gray image is repeated.
        num_classes: Classes the labels must lie in; None for the data set's own number.
        num_workers: Processes that load; 0 is fastest for what is held in memory. None: 4 for picture files, at most
            one a usable CPU, else 0. The batches are the same with any number, and a daemonic process, which may
            start none, loads them itself.
        seed: Of the order, the augmentation and the held-out part, at least 0.
        train_fraction_held_out: Share of each class of the TRAINING images for `held_out`, in [0, 1).
        augment: Whether `train` is augmented: shifted (and flipped, where a mirrored image is of the same
            class) in memory, by timm's transforms otherwise.
        mean: Of each channel, of values in [0, 1]; None for that of the training images (ImageNet's for
            picture files).
        std: Of each channel, likewise.
        crop_pct: For picture files, the share of the scaled picture, along each side, that scoring and testing see;
            None for timm's 0.875. :func:`~nni_plugin.adapters.models.picture_format` gives what a model of timm wants.
        crop_mode: Likewise how it is scaled and cropped: `"center"`, `"squash"` or `"border"`; None for the first.
        interpolation: Likewise in scaling pictures, such as `"bicubic"`; None for `"bilinear"`.
        train_split: Name of the training part, for timm's data sets.
        val_split: Name of the part to test on, for timm's data sets.
        transform_kwargs: Further arguments of `timm.data.create_transform` for training on picture files.
        pin_memory: Whether batches are put into page-locked memory, for a GPU.

    Returns:
        The loaders, and what is known of the data.

    Raises:
        DataError: If the data set is unknown, missing, empty or damaged, or an argument does not suit it.
    """
    if batch_size < 1 or (num_workers or 0) < 0 or seed < 0 or in_chans < 1 or (img_size is not None and img_size < 1):
        raise DataError(
            f"Expected batch_size, img_size and in_chans of at least 1, num_workers and seed of at least 0; "
            f"got batch_size={batch_size}, img_size={img_size}, in_chans={in_chans}, "
            f"num_workers={num_workers}, seed={seed}."
        )
    name = _known_name(dataset)
    folder = _existing(data_dir, name)
    if name in _IN_MEMORY:
        given = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
        in_vain = [key for key, value in given.items() if value is not None]
        if in_vain:
            raise DataError(f"{name!r} is no data set of picture files, and takes no {in_vain[0]}; leave it out.")
        source = load_memory(name, folder, img_size=img_size, in_chans=in_chans, seed=seed, mean=mean, std=std)
    else:
        source = load_pictures(
            name,
            folder,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            seed=seed,
            mean=mean,
            std=std,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            interpolation=interpolation,
            train_split=train_split,
            val_split=val_split,
            transform_kwargs=transform_kwargs or {},
        )
    if num_classes is not None and num_classes < source.num_classes:
        raise DataError(
            f"{name!r} has labels of {source.num_classes} classes, outside num_classes={num_classes}; "
            f"ask for {source.num_classes}."
        )
    kept, held_out = stratified_split(source.labels, train_fraction_held_out, seed)
    if len(kept) < batch_size:
        raise DataError(
            f"Expected at least batch_size={batch_size} training images in {name!r}, got {len(kept)}; "
            "take a smaller batch_size."
        )
    if num_workers is None:
        num_workers = 0 if name in _IN_MEMORY else min(_WORKERS, _usable_cpus())
    if multiprocessing.current_process().daemon:
        num_workers = 0
    loading = _Loading(source, batch_size, num_workers, seed, pin_memory)
    plain = source.training(kept, False)
    return DataSplits(
        train=loading.loader(source.training(kept, True) if augment else plain, shuffle=True),
        score=loading.loader(plain, shuffle=True),
        held_out=loading.loader(source.training(held_out, False)) if len(held_out) else None,
        test=loading.loader(source.test),
        num_classes=num_classes or source.num_classes,
        input_shape=source.input_shape,
        name=name,
        fingerprint=source.fingerprint,
        mean=source.mean,
        std=source.std,
        scaling=source.scaling,
    )


def is_in_memory(dataset: str) -> bool:
    """Whether a data set is held in memory as a whole, not read picture by picture.

    Raises:
        DataError: If the data set is unknown.
    """
    return _known_name(dataset) in _IN_MEMORY


def _images(loader: DataLoader[Batch]) -> int:
    return len(loader.sampler)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Loading:
    """What all loaders of a data set share."""

    source: Source
    batch_size: int
    num_workers: int
    seed: int
    pin_memory: bool

    def loader(self, dataset: Dataset[Batch], *, shuffle: bool = False) -> DataLoader[Batch]:
        """Shuffled loaders leave an incomplete batch out: BN cannot train on a batch of one."""
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(dataset), self.seed, shuffle=shuffle),  # type: ignore[arg-type]
            drop_last=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
            collate_fn=self.source.collate,
            # An own generator, so that iterating draws nothing from torch's global one.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _usable_cpus() -> int:
    # A container or a batch system may allow fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _known_name(dataset: str) -> str:
    known = {name.lower(): name for name in DATASETS} | {
        "folder": "ImageFolder",
        "image_folder": "ImageFolder",
    }
    name = known.get(dataset.lower().removesuffix("/"))
    if name is not None:
        return name
    if dataset.lower().startswith(_STREAMED):
        raise DataError(
            f"{dataset!r} is streamed, and has no order that a resumed run could repeat: use a data set with "
            "random access, such as ImageFolder or hfds/."
        )
    if dataset.lower().startswith("hfds/"):
        return dataset
    close = difflib.get_close_matches(dataset.lower(), known, n=3, cutoff=0.4)
    suggestions = ", ".join(dict.fromkeys(known[key] for key in close)) or ", ".join(DATASETS)
    raise DataError(f"Unknown data set {dataset!r}; the closest are {suggestions}, or give hfds/NAME.")


def _existing(data_dir: str | Path | None, name: str) -> Path | None:
    if data_dir is None or name == "digits":
        return None
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"Expected data_dir to be the folder of {name!r}, but {str(folder)!r} is no folder.")
    if next(folder.iterdir(), None) is None:
        raise DataError(f"Expected the files of {name!r} in data_dir, but the folder {str(folder)!r} is empty.")
    return folder
