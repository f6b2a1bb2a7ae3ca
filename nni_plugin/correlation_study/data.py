"""The images that criteria and the Oracle are compared on: so many for both, and so many that nothing else has seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nni_plugin.adapters.data import DataSplits, create_loaders
from nni_plugin.errors import DataError


class FirstImages:
    """The first images of a loader as minibatches of equal size (or one image less), gone through again and again.

    Equal, because criteria square per minibatch and then take the mean: a small last one would weigh too much.

    Args:
        loader: Gives minibatches `(images, labels)`, at least `number` images in all.
        device: Where they are to lie.
        number: How many images, at least 1.
        batch_size: Largest minibatch.
    """

    def __init__(self, loader: Any, device: torch.device, number: int, batch_size: int) -> None:
        self.loader, self.device = loader, device
        parts = math.ceil(number / batch_size)
        self.sizes = [number // parts + (part < number % parts) for part in range(parts)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = iter(self.loader)
        images, labels = next(source)
        for size in self.sizes:
            while len(images) < size:
                more_images, more_labels = next(source)
                images, labels = torch.cat([images, more_images]), torch.cat([labels, more_labels])
            yield images[:size].to(self.device), labels[:size].to(self.device)
            images, labels = images[size:], labels[size:]


def open_images(
    dataset: str,
    data_dir: Path | None,
    *,
    images: int,
    held_out_images: int,
    held_out_from: Literal["train", "test"] = "train",
    seed: int,
    **kwargs: Any,
) -> DataSplits:
    """Open a data set, with as many images held out as asked for.

    Args:
        dataset: See `adapters.data.create_loaders`.
        data_dir: Folder of the data.
        images: How many training images must remain in whole minibatches, at least 1.
        held_out_images: How many are held out, at least.
        held_out_from: Training images, which are kept away from training then; or test images, drawn by the seed, for
            a network that has been trained on all training images already.
        seed: Of the order and of the choice.
        **kwargs: Further arguments of `create_loaders`.

    Raises:
        DataError: There are too few images, or the data set cannot be opened.
    """
    splits = create_loaders(dataset, data_dir, seed=seed, **kwargs)
    if held_out_images and held_out_from == "test":
        total = _size(splits.test.dataset)
        if held_out_images > total:
            raise DataError(f"held_out_images={held_out_images} is more than the {total} test images; take fewer.")
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:held_out_images].tolist()
        held_out = DataLoader(
            splits.test.dataset, splits.test.batch_size, sampler=drawn, collate_fn=splits.test.collate_fn
        )
        splits = dataclasses.replace(splits, held_out=held_out)
    elif held_out_images:
        total = _size(splits.score.dataset)
        # Each class gives its share, rounded: half an image of each more, so that there are never too few.
        fraction = (held_out_images + splits.num_classes / 2) / total
        if fraction >= 1:
            raise DataError(
                f"held_out_images={held_out_images} would leave none of the {total} training images of "
                f"{splits.name!r}; take fewer."
            )
        splits = create_loaders(dataset, data_dir, seed=seed, train_fraction_held_out=fraction, **kwargs)
    there = len(splits.score) * int(splits.score.batch_size or 1)
    if images > there:
        raise DataError(
            f"images={images} is more than the {there} training images of {splits.name!r} in whole minibatches "
            f"beside held_out_images={0 if held_out_from == 'test' else held_out_images}; take fewer of either, or a "
            "smaller batch_size."
        )
    return splits


def _size(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]
