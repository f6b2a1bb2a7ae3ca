"""Data sets of picture files: `ImageFolder`, and what `timm.data.create_dataset` takes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.constants import DEFAULT_CROP_MODE, DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder

from nni_plugin.adapters.data.source import Source, check_labels, check_statistics
from nni_plugin.errors import DataError

_TEST_FOLDERS = ("val", "valid", "validation", "test")
_MODES = {1: "L", 3: "RGB"}
# timm's names; it also knows "random", which is for training alone.
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


class PictureError(DataError):
    """A picture that cannot be used.

    torch hands on an error of a process that loads with the traceback in its text; the text here is what it began as.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Transformed pictures by key (see :mod:`~nni_plugin.adapters.data.sampling`).

    Args:
        base: Gives (PIL image, class) by index.
        indices: Which of its pictures belong to this data set.
        transform: PIL image to float32 `[C, H, W]`.
        mode: PIL mode the pictures are brought to, `"RGB"` or `"L"`.
        num_classes: Labels must be below it.
        seed: Of the transform's random choices, at least 0.
    """

    def __init__(
        self,
        base: Any,
        indices: NDArray[np.int64],
        transform: Callable[[Image.Image], Tensor],
        mode: str,
        num_classes: int,
        seed: int,
    ) -> None:
        self.base = base
        self.indices = indices
        self.transform = transform
        self.mode = mode
        self.num_classes = num_classes
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(key, len(self))
        index = int(self.indices[place])
        try:
            picture, label = self.base[index]
            picture = picture.convert(self.mode)
        # PIL reports a damaged file by any of these.
        except (OSError, SyntaxError, ValueError) as error:
            samples = getattr(self.base, "samples", None)
            name = repr(samples[index][0]) if samples else f"number {index}"
            raise PictureError(f"Picture {name} cannot be read: {error}; replace or remove it.") from error
        try:
            check_labels(np.asarray([label]), self.num_classes, f"picture {index}")
        except DataError as error:
            raise PictureError(str(error)) from error
        with _drawing(self.seed, epoch, index):
            return self.transform(picture), torch.tensor(int(label))


def load_pictures(
    name: str,
    data_dir: Path | None,
    *,
    img_size: int | None,
    in_chans: int,
    num_classes: int | None,
    seed: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    crop_pct: float | None,
    crop_mode: str | None,
    interpolation: str | None,
    train_split: str,
    val_split: str,
    transform_kwargs: Mapping[str, Any],
) -> Source:
    """Open `ImageFolder` or a data set of timm, with timm's transforms.

    Args:
        name: `"ImageFolder"`, or a name of `timm.data.create_dataset`.
        data_dir: For `ImageFolder` the folder with `train/` and one of `val/`, `valid/`, `validation/` and
            `test/`, each with a folder of pictures per class.
        img_size: Height and width after the transform, in pixels; None for 224.
        in_chans: 3, or 1 for gray.
        num_classes: None to take the data set's own number.
        seed: Of the augmentation.
        mean: Of each channel; None for ImageNet's.
        std: Of each channel; None for ImageNet's.
        crop_pct: Share of the scaled picture, along each side, that scoring and testing see; None for timm's 0.875.
        crop_mode: How it is scaled and cropped: `"center"`, `"squash"` or `"border"`; None for the first.
        interpolation: In scaling pictures; None for `"bilinear"`.
        train_split: Name of the training part, for timm's data sets.
        val_split: Name of the part to test on, for timm's data sets.
        transform_kwargs: Further arguments of `timm.data.create_transform` for training.

    Raises:
        DataError: If the data are missing, empty or streamed, or an argument does not suit them.
    """
    if in_chans not in _MODES:
        raise DataError(f"Pictures have 1 or 3 channels, got in_chans={in_chans}.")
    choices = {"interpolation": (interpolation, _INTERPOLATIONS), "crop_mode": (crop_mode, _CROP_MODES)}
    for what, (value, known) in choices.items():
        if value is not None and value not in known:
            raise DataError(f"Expected {what} to be one of {', '.join(known)}, got {value!r}.")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise DataError(f"Expected a crop_pct above 0 and at most 1, the share of a side, got {crop_pct}.")
    size = img_size or 224
    shape = (in_chans, size, size)
    gray = in_chans == 1
    means = check_statistics(mean or ([0.449] if gray else IMAGENET_DEFAULT_MEAN), in_chans, "mean")
    stds = check_statistics(std or ([0.226] if gray else IMAGENET_DEFAULT_STD), in_chans, "std")
    if name == "ImageFolder":
        train, test = _folders(data_dir)
    else:
        train, test = (_timm_dataset(name, data_dir, split) for split in (train_split, val_split))
    train_labels, test_labels = _labels(train), _labels(test)
    classes = num_classes or _class_count(train, train_labels, name)
    for labels, what in ((train_labels, "training"), (test_labels, "test")):
        check_labels(labels, classes, f"the {what} pictures of {name!r}")

    given = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    scaling = {key: value for key, value in given.items() if value is not None}

    def transform(augment: bool) -> Callable[[Image.Image], Tensor]:
        extra = {**scaling, **transform_kwargs} if augment else scaling
        try:
            made: Callable[[Image.Image], Tensor] = create_transform(
                shape, is_training=augment, mean=means, std=stds, **extra
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise DataError(f"timm makes no transform of {dict(extra)} for {shape}: {error}") from error
        return made

    def training(indices: NDArray[np.int64], augment: bool) -> Dataset[tuple[Tensor, Tensor]]:
        return Pictures(train, indices, transform(augment), _MODES[in_chans], classes, seed)

    return Source(
        name=name,
        labels=train_labels,
        num_classes=classes,
        input_shape=shape,
        mean=means,
        std=stds,
        fingerprint=_digest(train, test, data_dir),
        training=training,
        test=Pictures(test, np.arange(len(test)), transform(False), _MODES[in_chans], classes, seed),
        scaling=(
            f"{crop_mode or DEFAULT_CROP_MODE} crop of {crop_pct or DEFAULT_CROP_PCT:g}, {interpolation or 'bilinear'}"
        ),
    )


def _folders(data_dir: Path | None) -> tuple[ImageFolder, ImageFolder]:
    if data_dir is None:
        raise DataError("ImageFolder needs data_dir, a folder with train/ and val/, a folder per class in each.")
    test_dir = next((data_dir / name for name in _TEST_FOLDERS if (data_dir / name).is_dir()), None)
    if not (data_dir / "train").is_dir() or test_dir is None:
        raise DataError(
            f"Expected the folders train/ and one of {', '.join(f'{name}/' for name in _TEST_FOLDERS)} in "
            f"{str(data_dir)!r}."
        )
    parts = []
    for folder in (data_dir / "train", test_dir):
        try:
            parts.append(ImageFolder(str(folder)))
        except OSError as error:
            raise DataError(
                f"Expected one folder of pictures per class in {str(folder)!r}: {str(error).splitlines()[0]}"
            ) from error
    train, test = parts
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"Expected the same class folders in train/ and {test_dir.name}/ of {str(data_dir)!r}; "
            f"only one of them has {', '.join(odd[:5])}."
        )
    return train, test


def _timm_dataset(name: str, data_dir: Path | None, split: str) -> Any:
    try:
        content = create_dataset(name, root=str(data_dir) if data_dir else None, split=split, download=False)
    except Exception as error:
        # Each kind of data set reports missing files or packages in its own way.
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"timm cannot open part {split!r} of {name!r} in {str(data_dir)!r}: {type(error).__name__}: {reason}"
        ) from error
    if isinstance(content, IterableDataset):
        raise DataError(
            f"{name!r} is streamed, and has no order that a resumed run could repeat: use a data set with "
            "random access, such as ImageFolder or hfds/."
        )
    if not len(content):
        raise DataError(f"Part {split!r} of {name!r} holds no pictures.")
    return content


def _labels(content: Any) -> NDArray[np.int64]:
    """Labels without opening the pictures; 0 for all if the data set does not list them."""
    labels = getattr(content, "targets", None)
    if labels is None:
        return np.zeros(len(content), np.int64)
    # Where a picture has a row of numbers (QMNIST), the class comes first.
    return np.asarray(labels, np.int64).reshape(len(content), -1)[:, 0]


def _class_count(content: Any, labels: NDArray[np.int64], name: str) -> int:
    for owner in (content, getattr(content, "reader", None)):
        for attribute in ("classes", "class_to_idx"):
            if getattr(owner, attribute, None):
                return len(getattr(owner, attribute))
    if not hasattr(content, "targets"):
        raise DataError(f"The number of classes of {name!r} is not known before reading it: give num_classes.")
    return int(labels.max()) + 1


def _digest(train: Any, test: Any, data_dir: Path | None) -> str:
    """Digest of names, sizes and classes of the files, or of the labels where there are no files listed."""
    digest = hashlib.sha256()
    for content in (train, test):
        digest.update(f"{len(content)}\n".encode())
        if isinstance(content, ImageFolder) and data_dir is not None:
            for path, label in content.samples:
                relative = Path(path).relative_to(data_dir).as_posix()
                digest.update(f"{relative}\t{Path(path).stat().st_size}\t{label}\n".encode())
        else:
            digest.update(_labels(content).tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


@contextmanager
def _drawing(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Within it, the global generators that timm's transforms draw from depend on these numbers alone."""
    state, array_state = random.getstate(), np.random.get_state()
    number = int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            np.random.seed(number)
            # The CPU's generator alone: seeding an accelerator's from a worker process would start it there.
            torch.default_generator.manual_seed(number)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(array_state)
