"""Minibatches of the training set held out, for what must be measured on others than those learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nni_plugin.errors import DataError


def split_fifth(batches: Iterable[Any]) -> tuple[Iterable[Any], Iterable[Any]]:
    """Split minibatches into those to learn from and every fifth (of fewer than five the last one), held out.

    Raises:
        DataError: They can be gone through only once, or come in another order each time.
    """
    what = "give held_out, or minibatches that are the same each time (a list, or a loader that does not shuffle)"
    if iter(batches) is batches:
        raise DataError(f"batches can be gone through only once, so none can be held out: {what}.")
    number = sum(1 for _ in islice(batches, 5))
    if number < 2:
        raise DataError(f"batches holds {number} minibatch{'es' * (number != 1)}, so none can be held out: {what}.")
    if not same_batch(next(iter(batches)), next(iter(batches))):
        raise DataError(f"batches are shuffled, so none can be held out: {what}.")
    last = min(number, 5) - 1  # of fewer than five the last one
    return _Every(batches, lambda i: i % 5 != last), _Every(batches, lambda i: i % 5 == last)


class _Every:
    """Some of the minibatches, by their number."""

    def __init__(self, batches: Iterable[Any], chosen: Callable[[int], bool]) -> None:
        self.batches, self.chosen = batches, chosen

    def __iter__(self) -> Iterator[Any]:
        return (batch for i, batch in enumerate(self.batches) if self.chosen(i))


def same_batch(a: Any, b: Any) -> bool:
    """Tell whether two minibatches hold the same values: the first of a loader that does not shuffle does, twice."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same_batch(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same_batch, a, b))
    if getattr(a, "shape", ()) != getattr(b, "shape", ()):
        return False
    same = a == b  # of arrays number by number
    return bool(same.all()) if hasattr(same, "all") else bool(same)
