"""Block outputs as vectors of about equal length, whatever the block's width and resolution.

A map of `C` channels over `s` spatial dimensions is pooled by averages to `d` places along each,
`d = round((T / C)^(1/s))` for a target length `T`, and flattened to `C d^s` numbers: on images (`s = 2`) the rule of
LayerPrune's CIFAR experiments. At least one place is left, and never more than the map has, since pooling upwards
would only repeat values. Token sequences `[N, L, C]` have one spatial dimension, vectors `[N, C]` none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.errors import CriterionError

_POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}

_FEW = 64
"""Places left up to which pooling is faster as one matrix product than by torch's kernel, measured on a CPU."""


def pooled_size(channels: int, places: Sequence[int], target_length: int) -> tuple[int, ...]:
    """Return the places left along each spatial dimension.

    Args:
        channels: Width `C` of the map.
        places: Its sizes along the spatial dimensions, e.g. `(H, W)`.
        target_length: Length `T` that the flattened vector should have.

    Returns:
        One size a dimension, at least 1; halves are rounded to even.

    Example:
        >>> [pooled_size(channels, (32, 32), 2048) for channels in (16, 32, 64, 9000)]
        [(11, 11), (8, 8), (6, 6), (1, 1)]
        >>> pooled_size(768, (197,), 2048)  # tokens
        (3,)
    """
    if not places:
        return ()
    side = max(1, round((target_length / channels) ** (1 / len(places))))
    return tuple(min(side, size) for size in places)


def is_channels_last(layers: Sequence[nn.Module], shape: Sequence[int]) -> bool:
    """Tell whether a block's output holds its channels in the last dimension, by the layers inside.

    Convolutions as wide as the second dimension say no, linear layers and layer normalisations as wide as the last
    one say yes; without either, sequences `[N, L, C]` do and maps `[N, C, H, W]` do not.

    Args:
        layers: The layers of the block.
        shape: Shape of its output, `[N, ...]`.
    """
    if len(shape) < 3:
        return True
    if any(isinstance(m, _ConvNd) and shape[1] in (m.in_channels, m.out_channels) for m in layers):
        return False
    linear = any(isinstance(m, nn.Linear) and shape[-1] in (m.in_features, m.out_features) for m in layers)
    norm = any(isinstance(m, nn.LayerNorm) and m.normalized_shape == (shape[-1],) for m in layers)
    return linear or norm or len(shape) == 3


class Embedder:
    """Turns the outputs of one place in a network into vectors; the sizes are those that the first output asks for.

    Args:
        layers: The layers of the block, which say where its channels are.
        target_length: Length `T` that vectors should have.

    Attributes:
        width: Number of channels, where the layers do not tell which dimension holds them; None where they do.
        means_only: Whether one place is left, so that maps of different form (an image, and windows of it) compare.
    """

    def __init__(self, layers: Sequence[nn.Module], target_length: int) -> None:
        self.target_length = target_length
        self.width: int | None = None
        self.means_only = False
        self._layers = layers
        self._size: dict[int, tuple[int, ...]] = {}  # by the number of spatial dimensions
        self._matrix: tuple[tuple[int, ...], Tensor] | None = None

    def holds_channels_last(self, output: Tensor) -> bool:
        """Tell whether the last dimension of an output holds its channels, not the second."""
        if self.width is not None:
            return output.shape[-1] == self.width
        return is_channels_last(self._layers, output.shape)

    def __call__(self, output: Tensor, samples: int) -> Tensor:
        """Pool and flatten an output.

        Args:
            output: `[N, C]`, `[N, L, C]`, `[N, C, H, W]` or the like, a sample a row; or `[N * windows, ...]`, windows
                of samples one after the other, over which vectors are averaged.
            samples: Number `N` of samples.

        Returns:
            Vectors `[N, D]`, float32 where the output is in half precision.

        Raises:
            CriterionError: The output holds no rows of samples, or has more than three spatial dimensions.
        """
        spatial = output.dim() - 2
        if not 0 <= spatial <= len(_POOL) or samples == 0 or output.shape[0] % samples:
            raise CriterionError(
                f"Expected an output with {samples} samples as rows and 3 spatial dimensions at most, got one of shape "
                f"{tuple(output.shape)}."
            )
        is_last = self.holds_channels_last(output)
        places = tuple(output.shape[1:-1] if is_last else output.shape[2:])
        if spatial not in self._size:
            width = output.shape[-1 if is_last else 1]
            self._size[spatial] = (1,) * spatial if self.means_only else pooled_size(width, places, self.target_length)
        vectors = self._pooled(output, is_last, places, self._size[spatial]).flatten(1)
        vectors = vectors.float() if vectors.dtype in (torch.float16, torch.bfloat16) else vectors
        windows = output.shape[0] // samples
        return vectors if windows == 1 else vectors.unflatten(0, (samples, windows)).mean(1)

    def _pooled(self, output: Tensor, is_last: bool, places: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Return the output at fewer places, `[N, C, ...]`."""
        if places == size or math.prod(size) > _FEW:
            maps = output.movedim(-1, 1) if is_last else output
            return maps if places == size else _POOL[len(size)](maps, size)  # type: ignore[arg-type]
        if self._matrix is None or self._matrix[0] != places:
            self._matrix = places, pooling_matrix(places, size).to(output)
        matrix = self._matrix[1]
        return (matrix.T @ output.flatten(1, -2)).transpose(1, 2) if is_last else output.flatten(2) @ matrix


def pooling_matrix(places: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return adaptive average pooling as a matrix.

    Args:
        places: Sizes of the map along its spatial dimensions.
        size: Places left along each.

    Returns:
        float64, `[places, places left]`, by which a map flattened over its places is multiplied from the right.
    """
    along = [
        F.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64)[None], d)[0] for n, d in zip(places, size, strict=True)
    ]
    return functools.reduce(torch.kron, along)
