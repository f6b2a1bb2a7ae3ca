"""Data sets by name: what the batches hold, that (seed, epoch) fixes them, and every refusal."""

import gzip
import hashlib
import multiprocessing
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets

from nni_plugin.adapters.data import DATASETS, DataSplits, create_loaders
from nni_plugin.adapters.data.sampling import stratified_split
from nni_plugin.adapters.data.tensors import Augmentation, Format, TensorImages
from nni_plugin.adapters.models import picture_format
from nni_plugin.errors import DataError

IDX = [
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 40),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 15),
]

Batches = list[tuple[Tensor, Tensor]]


def idx_bytes(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder: Path, *, packed: bool = True, size: int = 28, top: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for images, labels, count in IDX:
        contents = {
            images: generator.integers(0, 256, (count, size, size), dtype=np.uint8),
            labels: (np.arange(count) % top).astype(np.uint8),
        }
        for name, values in contents.items():
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(values)))
            else:
                (folder / name).write_bytes(idx_bytes(values))
    return folder


def write_folders(root: Path, test: str = "val", count: int = 6) -> Path:
    generator = np.random.default_rng(0)
    for part in ("train", test):
        for name in ("ant", "bee", "cat"):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count: int) -> dict[str, object]:
        pixels = generator.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        return {"data": pixels, "labels": [index % 10 for index in range(count)]}

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write("data_batch_1", batch(30))])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch(10))])
    name, digest = write("batches.meta", {"label_names": list("abcdefghij")})
    meta = {"filename": name, "key": "label_names", "md5": digest}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


def epoch_of(splits: DataSplits, epoch: int) -> Batches:
    splits.set_epoch(epoch)
    return list(splits.train)


def same(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


def gathered(loader: DataLoader[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_digits() -> None:
    splits = create_loaders("digits", batch_size=64)
    assert (splits.num_classes, splits.input_shape, splits.name) == (10, (3, 32, 32), "digits")
    for loader in (splits.train, splits.score, splits.test):
        images, labels = next(iter(loader))
        assert images.shape == (64, 3, 32, 32)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.is_contiguous()
    images, labels = gathered(splits.test)
    assert 350 <= len(labels) <= 369
    assert labels.bincount().min() >= 34
    everything = torch.cat([gathered(splits.score)[0], images])
    assert len(everything) == 1797 - (1797 - len(images)) % 64
    # Normalised by what the training images have, the same in every channel.
    assert gathered(splits.score)[0].mean().abs() < 0.02
    assert gathered(splits.score)[0].std() == pytest.approx(1, abs=0.02)
    assert torch.equal(images[:, 0], images[:, 2])
    # No test image is among those for training.
    one = create_loaders("digits", batch_size=1)
    train_rows = {row.numpy().tobytes() for row in gathered(one.score)[0]}
    assert not any(row.numpy().tobytes() in train_rows for row in gathered(one.test)[0])


def test_digits_split_does_not_depend_on_the_seed() -> None:
    first, second = (create_loaders("digits", seed=seed) for seed in (0, 5))
    assert torch.equal(gathered(first.test)[0], gathered(second.test)[0])
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_are_a_function_of_seed_and_epoch(workers: int) -> None:
    splits = create_loaders("digits", batch_size=200, num_workers=workers, seed=3, img_size=16, in_chans=1)
    epochs = [epoch_of(splits, epoch) for epoch in range(3)]
    # A run that starts again at epoch 2, in a process whose generators stand elsewhere.
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    resumed = create_loaders("digits", batch_size=200, seed=3, img_size=16, in_chans=1)
    assert same(epoch_of(resumed, 2), epochs[2])
    # And one that was stopped within an epoch and repeats it.
    resumed.set_epoch(1)
    next(iter(resumed.train))
    assert same(epoch_of(resumed, 1), epochs[1])
    assert not same(epochs[0], epochs[1])
    assert not same(epoch_of(create_loaders("digits", batch_size=200, seed=4, img_size=16, in_chans=1), 0), epochs[0])


def test_every_image_once_an_epoch_and_augmented_anew() -> None:
    splits = create_loaders("digits", batch_size=479, in_chans=1)
    size = len(splits.train.dataset)  # type: ignore[arg-type]
    for epoch in (0, 3):
        splits.set_epoch(epoch)
        keys = list(splits.train.sampler)
        assert sorted(key - epoch * size for key in keys) == list(range(size))
    dataset = splits.train.dataset
    views = [dataset[7 + epoch * size][0] for epoch in range(8)]
    assert len({view.numpy().tobytes() for view in views}) > 4
    # A shift moves the digit, which stays as bright as far as it stays in the picture.
    black = views[0].min()
    plain = splits.score.dataset[7][0]
    assert all((view - black).sum() <= (plain - black).sum() * 1.001 for view in views)


def test_batch_draws_do_not_depend_on_the_batch() -> None:
    splits = create_loaders("digits", batch_size=8)
    size = len(splits.train.dataset)  # type: ignore[arg-type]
    keys = [5, 2 * size + 9, size + 1, 2 * size + 5]
    images, labels = splits.train.dataset.__getitems__(keys)  # type: ignore[attr-defined]
    for key, image, label in zip(keys, images, labels, strict=True):
        alone = splits.train.dataset[key]
        assert torch.equal(alone[0], image)
        assert torch.equal(alone[1], label)


def test_loading_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    folders = write_folders(tmp_path)
    for arguments in ({"dataset": "digits"}, {"dataset": "ImageFolder", "data_dir": folders, "img_size": 16}):
        splits = create_loaders(batch_size=4, **arguments)  # type: ignore[arg-type]
        torch_state, state, array_state = (
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state()[1].copy(),
        )
        next(iter(splits.train))
        next(iter(splits.score))
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert random.getstate() == state
        assert np.array_equal(np.random.get_state()[1], array_state)


def test_score_order_is_fixed_and_plain() -> None:
    splits = create_loaders("digits", batch_size=300, seed=1)
    first = list(splits.score)
    epoch_of(splits, 4)
    assert same(list(splits.score), first)
    plain = create_loaders("digits", batch_size=300, seed=1, augment=False)
    assert same(epoch_of(plain, 0), first)
    assert not same(epoch_of(splits, 0), first)
    assert first[0][1].unique().numel() == 10


def test_held_out_comes_from_the_training_images() -> None:
    whole = create_loaders("digits", batch_size=1, img_size=8, in_chans=1)
    parted = create_loaders("digits", batch_size=1, img_size=8, in_chans=1, train_fraction_held_out=0.25)
    assert whole.held_out is None
    assert parted.held_out is not None

    def rows(loader: DataLoader[tuple[Tensor, Tensor]]) -> list[bytes]:
        return [row.numpy().tobytes() for row in gathered(loader)[0]]

    kept, held_out = rows(parted.score), rows(parted.held_out)
    assert sorted(kept + held_out) == sorted(rows(whole.score))
    assert len(held_out) == pytest.approx(0.25 * len(rows(whole.score)), abs=5)
    assert rows(parted.test) == rows(whole.test)
    assert len(parted.held_out.dataset) == len(held_out)  # type: ignore[arg-type]
    assert parted.describe().startswith(f"digits: {len(kept):,} training and {len(held_out)} held-out and ")
    assert "held-out" not in whole.describe()


def test_stratified_split() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 31])
    first, second = stratified_split(labels, 0.2, seed=0)
    assert sorted([*first, *second]) == list(range(61))
    assert np.bincount(labels[second]).tolist() == [2, 4, 6]
    assert not np.array_equal(second, stratified_split(labels, 0.2, seed=1)[1])
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="below 1"):
            stratified_split(labels, fraction, 0)
    with pytest.raises(DataError, match="one part empty"):
        stratified_split(labels, 0.001, 0)


def test_augmentation_by_hand() -> None:
    images = torch.randint(0, 256, (50, 2, 6, 6), dtype=torch.uint8)
    form = Format(2, 6, (0.1, 0.4), (0.2, 0.5))
    dataset = TensorImages(images, torch.arange(50), form, augmentation=Augmentation(pad=1, flip=True), seed=2)
    batch, labels = dataset.__getitems__(list(range(50)))
    assert torch.equal(labels, torch.arange(50))
    seen = set()
    for image, out in zip(images, batch, strict=True):
        padded = torch.nn.functional.pad(image, [1] * 4)
        matches = []
        for down in range(3):
            for right in range(3):
                for flip in (False, True):
                    crop = padded[:, down : down + 6, right : right + 6]
                    crop = (crop.flip(2) if flip else crop) / 255
                    expected = (crop - torch.tensor([0.1, 0.4]).view(2, 1, 1)) / torch.tensor([0.2, 0.5]).view(2, 1, 1)
                    if torch.allclose(expected, out, atol=1e-5):
                        matches.append((down, right, flip))
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 10


@pytest.mark.parametrize("layout", ["packed", "plain", "torchvision", "raw"])
def test_fashion_mnist_layouts(tmp_path: Path, layout: str) -> None:
    below = {"torchvision": "FashionMNIST/raw", "raw": "raw"}.get(layout, ".")
    write_idx(tmp_path / below, packed=layout in ("packed", "torchvision"))
    splits = create_loaders("torch/fashion_mnist", tmp_path, batch_size=8, in_chans=1)
    assert (splits.num_classes, splits.input_shape) == (10, (1, 28, 28))
    images, labels = gathered(splits.test)
    name = IDX[1][0]
    path = next(p for p in (tmp_path / below / name, tmp_path / below / f"{name}.gz") if p.exists())
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    expected = torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(15, 1, 28, 28) / 255
    assert torch.allclose(images, (expected - splits.mean[0]) / splits.std[0], atol=1e-5)
    assert labels.tolist() == [index % 10 for index in range(15)]
    assert len(splits.train) == 5


@pytest.mark.parametrize("size", [16, 28, 31, 32, 48])
def test_fashion_mnist_sizes(tmp_path: Path, size: int) -> None:
    splits = create_loaders("torch/fashion_mnist", write_idx(tmp_path), batch_size=8, img_size=size)
    assert splits.input_shape == (3, size, size)
    assert next(iter(splits.train))[0].shape == (8, 3, size, size)
    if size == 32:
        plain = create_loaders("torch/fashion_mnist", tmp_path, batch_size=8, mean=splits.mean, std=splits.std)
        framed, inner = gathered(splits.test)[0], gathered(plain.test)[0]
        assert torch.equal(framed[:, :, 2:30, 2:30], inner)
        assert torch.all(framed[:, :, :2] == framed.min())


def test_fingerprint_follows_the_data(tmp_path: Path) -> None:
    first = create_loaders("torch/fashion_mnist", write_idx(tmp_path / "a"), batch_size=8)
    again = create_loaders("torch/fashion_mnist", write_idx(tmp_path / "b", packed=False), batch_size=4, seed=1)
    other = create_loaders("torch/fashion_mnist", write_idx(tmp_path / "c", top=9), batch_size=8)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.fingerprint.startswith("sha256:")


def test_cifar10(cifar: Path) -> None:
    splits = create_loaders("torch/cifar10", cifar, batch_size=10)
    assert splits.input_shape == (3, 32, 32)
    images, labels = gathered(splits.test)
    pixels = datasets.CIFAR10(str(cifar), train=False).data.transpose(0, 3, 1, 2) / 255
    expected = (pixels - np.array(splits.mean).reshape(3, 1, 1)) / np.array(splits.std).reshape(3, 1, 1)
    assert np.allclose(images.numpy(), expected, atol=1e-5)
    assert labels.tolist() == list(range(10))
    assert create_loaders("torch/cifar10", cifar, batch_size=5, in_chans=1).input_shape == (1, 32, 32)
    with pytest.raises(DataError, match="in_chans 1 or 3, got 4"):
        create_loaders("torch/cifar10", cifar, batch_size=5, in_chans=4)
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(b"\x80\x04damaged")
    with pytest.raises(DataError, match="cifar-10-batches-py"):
        create_loaders("torch/cifar10", cifar, batch_size=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folder(tmp_path: Path, workers: int) -> None:
    root = write_folders(tmp_path, test="validation")
    arguments = {"batch_size": 4, "img_size": 24, "num_workers": workers, "train_fraction_held_out": 0.33}
    splits = create_loaders("imagefolder", root, **arguments)  # type: ignore[arg-type]
    assert (splits.name, splits.num_classes, splits.input_shape) == ("ImageFolder", 3, (3, 24, 24))
    assert splits.held_out is not None
    assert gathered(splits.held_out)[1].bincount().tolist() == [2, 2, 2]
    images, labels = gathered(splits.test)
    assert images.shape == (18, 3, 24, 24)
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    epochs = [epoch_of(splits, epoch) for epoch in range(2)]
    torch.manual_seed(5)
    random.seed(5)
    resumed = create_loaders("ImageFolder", root, batch_size=4, img_size=24, train_fraction_held_out=0.33)
    assert same(epoch_of(resumed, 1), epochs[1])
    assert not same(epochs[0], epochs[1])
    before = resumed.fingerprint
    (root / "train" / "ant" / "0.png").rename(root / "train" / "bee" / "new.png")
    assert create_loaders("ImageFolder", root, batch_size=4).fingerprint != before


def test_image_folder_in_gray_and_with_timms_arguments(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    splits = create_loaders(
        "ImageFolder",
        root,
        batch_size=4,
        img_size=16,
        in_chans=1,
        transform_kwargs={"re_prob": 1.0, "scale": (1, 1)},
    )
    assert next(iter(splits.train))[0].shape == (4, 1, 16, 16)
    with pytest.raises(DataError, match="no_such"):
        create_loaders("ImageFolder", root, batch_size=4, transform_kwargs={"no_such": 1})


def test_pictures_in_the_format_of_a_model(tmp_path: Path) -> None:
    root = write_folders(tmp_path, count=2)
    splits = create_loaders("ImageFolder", root, batch_size=2, **picture_format("test_vit"))
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    transform = timm.data.create_transform(**config)
    pictures = [transform(picture) for picture, _ in datasets.ImageFolder(str(root / "val"))]
    assert splits.mean == (0.5, 0.5, 0.5)
    assert splits.input_shape == (3, 160, 160)
    assert torch.equal(gathered(splits.test)[0], torch.stack(pictures))
    assert str(transform.transforms[0]) in str(splits.score.dataset.transform)  # type: ignore[attr-defined]
    assert "bicubic" in str(splits.train.dataset.transform)  # type: ignore[attr-defined]
    seen = f"3 x 160 x 160, center crop of {config['crop_pct']:g}, bicubic, mean 0.500 0.500 0.500"
    assert seen in splits.describe()
    wide = create_loaders("ImageFolder", root, batch_size=2, img_size=16, crop_mode="squash", crop_pct=1.0)
    assert not torch.equal(
        gathered(wide.test)[0], gathered(create_loaders("ImageFolder", root, batch_size=2, img_size=16).test)[0]
    )


def test_processes_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def processes(dataset: str) -> int:
        return create_loaders(dataset, root, batch_size=2, num_workers=None).train.num_workers

    root = write_folders(tmp_path, count=2)
    for usable, expected in ((64, 4), (2, 2)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, n=usable: set(range(n)), raising=False)
        assert processes("ImageFolder") == expected
    assert processes("digits") == 0
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    assert processes("ImageFolder") == 0


def test_a_data_set_through_timm(tmp_path: Path) -> None:
    raw = write_idx(tmp_path / "QMNIST" / "raw", packed=False)
    for part in ("train", "test"):
        source = raw / ("train" if part == "train" else "t10k")
        images = Path(f"{source}-images-idx3-ubyte").read_bytes()
        labels = np.frombuffer(Path(f"{source}-labels-idx1-ubyte").read_bytes()[8:], dtype=np.uint8)
        (raw / f"qmnist-{part}-images-idx3-ubyte").write_bytes(images)
        table = np.zeros((len(labels), 8), dtype=">i4")
        table[:, 0] = labels
        header = bytes([0, 0, 12, 2]) + struct.pack(">2I", *table.shape)
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(header + table.tobytes())
    splits = create_loaders("torch/qmnist", tmp_path, batch_size=4, img_size=32, in_chans=1)
    assert splits.num_classes == 10
    images, labels = gathered(splits.test)
    assert images.shape == (15, 1, 32, 32)
    assert labels.tolist() == [index % 10 for index in range(15)]
    assert same(epoch_of(splits, 1), epoch_of(splits, 1))


def test_accelerate_keeps_the_epochs() -> None:
    plain = create_loaders("digits", batch_size=400, img_size=8, in_chans=1)
    expected = [epoch_of(plain, epoch) for epoch in range(3)]
    AcceleratorState._reset_state(reset_partial_state=True)
    loader = Accelerator(cpu=True).prepare(create_loaders("digits", batch_size=400, img_size=8, in_chans=1).train)
    # A resumed run says where it is; from there Accelerate counts on.
    loader.set_epoch(1)
    assert same(list(loader), expected[1])
    assert same(list(loader), expected[2])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dataset": "digit"}, "Unknown data set 'digit'; the closest are digits"),
        ({"dataset": "torch/fashionmnist"}, "closest are torch/fashion_mnist"),
        ({"dataset": "cifar10"}, "torch/cifar10"),
        ({"dataset": "wds/imagenet"}, "streamed"),
        ({"dataset": "torch/fashion_mnist"}, "give data_dir"),
        ({"dataset": "torch/cifar100"}, "give data_dir"),
        ({"dataset": "ImageFolder"}, "needs data_dir"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"img_size": 0}, "img_size=0"),
        ({"batch_size": 5000}, "at least batch_size=5000 training images in 'digits', got 14"),
        ({"num_classes": 7}, "num_classes=7"),
        ({"train_fraction_held_out": 1.0}, "below 1, got 1.0"),
        ({"mean": [0.1, 0.2]}, "for mean, one a channel, got 2"),
        ({"std": [0.0]}, "std above 0"),
        ({"crop_pct": 0.9}, "takes no crop_pct; leave it out"),
        ({"interpolation": "bicubic"}, "takes no interpolation; leave it out"),
    ],
)
def test_refused_arguments(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(DataError, match=text):
        create_loaders(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "digits"])
def test_missing_empty_and_wrong_folders(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(DataError, match="is no folder"):
        create_loaders(dataset, tmp_path / "missing")
    with pytest.raises(DataError, match="is empty"):
        create_loaders(dataset, tmp_path)
    (tmp_path / "readme.txt").write_text("nothing of use")
    with pytest.raises(DataError, match=r"Expected the f|timm cannot open"):
        create_loaders(dataset, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["readme.txt"]


def test_missing_idx_file_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError) as caught:
        create_loaders("torch/fashion_mnist", tmp_path)
    message = str(caught.value)
    assert message.endswith("missing: t10k-labels-idx1-ubyte.")
    assert all(name in message for images, labels, _ in IDX for name in (images, labels))


def _recompressed(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda packed: gzip.compress(change(gzip.decompress(packed)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b: b[: len(b) // 2], "cannot be read"),
        (lambda b: b[:-3], "cannot be read"),
        (lambda b: b[:200] + bytes(50) + b[250:], "cannot be read|truncated or damaged"),
        (lambda b: b"not gzip at all", "cannot be read"),
        (lambda b: b"", "magic number|cannot be read"),
        (_recompressed(lambda b: b[:-1]), "truncated or damaged"),
        (_recompressed(lambda b: b[:20]), "truncated or damaged"),
        (_recompressed(lambda b: b[:6]), "truncated or damaged"),
        (_recompressed(lambda b: b + b"x"), "got more"),
        (_recompressed(lambda b: b"\x00\x00\x08\x01" + b[4:]), "magic number 00000803 .* got 00000801"),
        (_recompressed(lambda b: b[:4] + b"\xff" * 12 + b[16:]), "truncated or damaged"),
        (_recompressed(lambda b: b[:4] + bytes(12)), "truncated or damaged"),
        (_recompressed(lambda b: b""), "magic number 00000803 .* got nothing"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, change: Callable[[bytes], bytes], text: str) -> None:
    path = write_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=text) as caught:
        create_loaders("torch/fashion_mnist", tmp_path, batch_size=8)
    assert "train-images-idx3-ubyte" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_idx_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_idx(tmp_path, packed=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(39, np.uint8)))
    with pytest.raises(DataError, match=r"40 images .* 39 labels"):
        create_loaders("torch/fashion_mnist", tmp_path, batch_size=8)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(40, 10, np.uint8)))
    with pytest.raises(DataError, match=r"from 0 to 9 in the training labels .* got 10"):
        create_loaders("torch/fashion_mnist", tmp_path, batch_size=8)
    write_idx(tmp_path, packed=False)
    wide = np.zeros((40, 28, 20), np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(wide))
    with pytest.raises(DataError, match="square"):
        create_loaders("torch/fashion_mnist", tmp_path, batch_size=8)


def test_bad_image_folders(tmp_path: Path) -> None:
    (tmp_path / "a" / "train" / "ant").mkdir(parents=True)
    (tmp_path / "a" / "val" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match="one folder of pictures per class"):
        create_loaders("ImageFolder", tmp_path / "a")
    root = write_folders(tmp_path / "b")
    with pytest.raises(DataError, match=r"num_classes=2|from 0 to 1"):
        create_loaders("ImageFolder", root, batch_size=4, num_classes=2)
    for arguments, text in (
        ({"crop_pct": 0.0}, "crop_pct above 0"),
        ({"crop_pct": 95.0}, "at most 1"),
        ({"crop_mode": "middle"}, "crop_mode to be one of center, squash, border, got 'middle'"),
        ({"interpolation": "random"}, "interpolation to be one of nearest, bilinear"),
    ):
        with pytest.raises(DataError, match=text):
            create_loaders("ImageFolder", root, batch_size=4, **arguments)  # type: ignore[arg-type]
    assert create_loaders("ImageFolder", root, batch_size=4, num_classes=9).num_classes == 9
    (root / "train" / "ant" / "3.png").write_bytes((root / "train" / "ant" / "3.png").read_bytes()[:300])
    splits = create_loaders("ImageFolder", root, batch_size=6, img_size=8)
    with pytest.raises(DataError, match=r"3\.png' cannot be read") as here:
        list(splits.train)
    elsewhere = create_loaders("ImageFolder", root, batch_size=6, img_size=8, num_workers=1)
    with pytest.raises(DataError) as there:
        list(elsewhere.train)
    assert str(there.value) == str(here.value)
    (root / "val" / "ant").rename(root / "val" / "dog")
    with pytest.raises(DataError, match="only one of them has ant, dog"):
        create_loaders("ImageFolder", root, batch_size=4)
