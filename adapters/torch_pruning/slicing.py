"""Slices of tensors along several dimensions at once, and the way back to the whole tensor.

What a cut costs is memory traffic: big blocks without a gap are copied as they are, and a big tensor that loses little
is not held for undoing, only what it loses, so that its memory serves the slices of the next ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_BIG = 2**15
"""Elements of a tensor whose memory is worth giving back at once, and of a block worth copying by itself."""


def sliced(data: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """Return a copy of a tensor with only these positions along each dimension, in the memory format it had.

    Args:
        data: Any tensor.
        keep: Positions kept, ascending, int64 on the CPU, by dimension.
    """
    data = data.detach()
    if not keep:
        return data.clone()
    plain = data.is_contiguous()
    layout = torch.contiguous_format
    if not plain and data.dim() == 4 and data.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    if type(data) is Tensor and data.device.type == "cpu" and (plain or layout is torch.channels_last):
        shape = [len(keep[dim]) if dim in keep else size for dim, size in enumerate(data.shape)]
        small = torch.empty(shape, dtype=data.dtype, memory_format=layout)
        _fill(small, data, [(dim, keep[dim], _runs(keep[dim]) if data.numel() >= _BIG else []) for dim in sorted(keep)])
        return small
    for dim, positions in keep.items():
        data = data.index_select(dim, positions.to(data.device))
    return data.contiguous(memory_format=layout)


def way_back(data: Tensor, keep: Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what makes the tensor of its slice again.

    Args:
        data: A tensor. If it is big and loses at most a quarter, only what it loses is held: memory that was never
            touched costs several times what the copying does, and a network should not be there twice.
        keep: As in :func:`sliced`.
    """
    share = math.prod(len(positions) / data.shape[dim] for dim, positions in keep.items())
    if data.dim() < 2 or not data.is_contiguous() or data.numel() < _BIG or share < 0.75:
        return lambda _: data
    return _of_parts(data, keep)


def _of_parts(data: Tensor, keep: Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what makes a contiguous tensor of its slice again, without holding on to the tensor."""
    size, stride, left = data.shape, data.stride(), {}
    for dim, positions in keep.items():
        goes = torch.ones(size[dim], dtype=torch.bool)
        goes[positions] = False
        index = goes.nonzero().flatten().to(data.device)
        left[dim] = index, data.index_select(dim, index)

    def whole(small: Tensor) -> Tensor:
        for dim, positions in keep.items():
            shape = list(small.shape)
            shape[dim] = size[dim]
            small = small.new_empty(shape).index_copy_(dim, positions.to(small.device), small)
        for dim, (index, part) in left.items():
            small.index_copy_(dim, index, part)
        return small.as_strided(size, stride)

    return whole


def _fill(small: Tensor, data: Tensor, keep: Sequence[tuple[int, Tensor, Sequence[tuple[int, int, int]]]]) -> None:
    """Copy these positions along all dimensions at once: in blocks without a gap where they are large enough."""
    if not keep:
        small.copy_(data)
        return
    (dim, positions, runs), rest = keep[0], keep[1:]
    if runs and data.numel() >= _BIG * len(runs):
        for to, start, length in runs:
            _fill(small.narrow(dim, to, length), data.narrow(dim, start, length), rest)
    elif rest:
        _fill(small, data.index_select(dim, positions), rest)
    else:
        torch.index_select(data, dim, positions, out=small)


def _runs(positions: Tensor) -> list[tuple[int, int, int]]:
    """Return the place in the slice, the position and the length of each run without a gap."""
    at = positions.numpy()
    ends = [0, *(np.flatnonzero(at[1:] - at[:-1] != 1) + 1).tolist(), len(at)]
    return [(first, int(at[first]), last - first) for first, last in pairwise(ends)]
