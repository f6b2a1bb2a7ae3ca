"""What several processes that work on one network must have in common; nothing to do for one alone.

Each process scores its own minibatches; sums over them are exchanged by the criteria. What follows from the sums is
computed by every process, and could still part them: a different number of threads, or another kind of machine,
rounds otherwise. So one process's word holds for all.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def several() -> bool:
    """Tell whether a process group is there, which every process then has to take part in."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return torch.distributed.get_rank() if several() else 0


def count() -> int:
    """Return how many processes there are."""
    return torch.distributed.get_world_size() if several() else 1


def agreed(value: T) -> T:
    """Return what the first process has found; every process calls this with its own.

    Args:
        value: Anything that can be pickled, tensors on the CPU.
    """
    if not several():
        return value
    words: list[Any] = [value]
    torch.distributed.broadcast_object_list(words, src=0)
    return cast("T", words[0])


def summed(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU summed over all processes; itself for one alone."""
    if not several():
        return tensor
    shared = tensor.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu", copy=True)
    torch.distributed.all_reduce(shared)
    return shared.cpu()


def gathered(value: T) -> list[T]:
    """Return every process's value, in the order of ranks; anything that can be pickled, tensors on the CPU."""
    if not several():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def pooled_mean(total: float, count: int) -> float | None:
    """Return the mean over all processes from each one's sum and number; None of nothing at all."""
    sums = summed(torch.tensor([total, count], dtype=torch.float64))
    return float(sums[0]) / int(sums[1]) if sums[1] else None
