"""Read the IDX files of MNIST and its relatives, plain or gzipped, and say what is wrong with a bad one."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nni_plugin.errors import DataError

# Two zero bytes, the code of unsigned bytes, the number of dimensions.
_MAGIC = {1: b"\x00\x00\x08\x01", 3: b"\x00\x00\x08\x03"}
# Far above any of these data sets; a header that asks for more is damaged.
_MOST_BYTES = 2**32


def idx_files() -> tuple[str, str, str, str]:
    """Names of training images and labels, then test images and labels, without `.gz`."""
    return (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )


def find_idx_files(data_dir: Path, family: str) -> tuple[Path, Path, Path, Path]:
    """Find the four files in a folder, or in the `FAMILY/raw` below it that torchvision makes.

    Args:
        data_dir: The folder the user named.
        family: Torchvision's name of the data set, e.g. `"FashionMNIST"`.

    Returns:
        Paths in the order of :func:`idx_files`; the plain file where there is a gzipped one too.

    Raises:
        DataError: If any of the four is missing.
    """
    best: list[Path] = []
    for folder in (data_dir, data_dir / family / "raw", data_dir / "raw"):
        candidates = [(folder / name, folder / f"{name}.gz") for name in idx_files()]
        found = [next(filter(Path.is_file, pair)) for pair in candidates if any(map(Path.is_file, pair))]
        if len(found) == 4:
            return found[0], found[1], found[2], found[3]
        best = max(best, found, key=len)
    present = {path.name.removesuffix(".gz") for path in best}
    missing = [name for name in idx_files() if name not in present]
    raise DataError(
        f"Expected the four files {', '.join(idx_files())} (each plain or with .gz) in {str(data_dir)!r}; "
        f"missing: {', '.join(missing)}."
    )


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file; `.gz` is unpacked on the way.
        dimensions: 3 for images, 1 for labels.

    Returns:
        uint8 tensor `[N, H, W]` or `[N]`, N at least 1.

    Raises:
        DataError: If the file is damaged, truncated, too long or of another kind.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            shape = [int(n) for n in np.frombuffer(header[4 : len(header) // 4 * 4], dtype=">u4")]
            size = math.prod(shape)
            sound = header[:4] == _MAGIC[dimensions] and len(shape) == dimensions and 0 < size <= _MOST_BYTES
            # One byte more than announced, to notice a file that goes on.
            content = file.read(size + 1) if sound else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {type(error).__name__}: {error}; "
            "it is damaged or truncated, fetch it again."
        ) from error
    if header[:4] != _MAGIC[dimensions]:
        raise DataError(
            f"Expected {str(path)!r} to begin with the magic number {_MAGIC[dimensions].hex()} of an IDX "
            f"file of {dimensions} dimension(s), got {header[:4].hex() or 'nothing'}; it is another file or "
            "damaged."
        )
    if not sound or len(content) != size:
        amount = "more" if len(content) > size else str(len(content))
        raise DataError(
            f"Expected {size} bytes after the header of {str(path)!r} (shape {shape}), got {amount}; the "
            "file is truncated or damaged, fetch it again."
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()).view(*shape)
