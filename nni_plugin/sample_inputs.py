"""What one sample of a network's inputs is, as JSON can hold it: shapes, and the dtypes of what is no float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One sample: of one tensor, of several in a list, or of keyword inputs in a dict.

    Args:
        shape: Its shape in a list, without the batch; lists of lists, or a dict of lists, for several tensors.
        dtype: In the same form `"int64"`, `"bool"` ...; None for floats, which have the dtype of the parameters.
    """

    shape: Any
    dtype: Any


def sample_of(example_inputs: Any) -> Sample | None:
    """Return the form of example inputs; None where they hold anything but tensors with a batch.

    Example:
        >>> sample_of((torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, dtype=torch.int64)))
        Sample(shape=[[3, 8, 8], [5]], dtype=[None, 'int64'])
    """
    if isinstance(example_inputs, Tensor):
        if example_inputs.dim() == 0:
            return None
        dtype = None if example_inputs.is_floating_point() else str(example_inputs.dtype).removeprefix("torch.")
        return Sample(list(example_inputs.shape[1:]), dtype)
    if isinstance(example_inputs, Mapping):
        of_name = {name: sample_of(value) for name, value in example_inputs.items()}
        found = {name: sample for name, sample in of_name.items() if sample is not None}
        if not found or len(found) < len(of_name) or any(type(name) is not str for name in found):
            return None
        return Sample({n: s.shape for n, s in found.items()}, {n: s.dtype for n, s in found.items()})
    if isinstance(example_inputs, (tuple, list)):
        samples = [sample for sample in map(sample_of, example_inputs) if sample is not None]
        if not samples or len(samples) < len(example_inputs):
            return None
        return Sample([sample.shape for sample in samples], [sample.dtype for sample in samples])
    return None


def zeros(sample: Sample, dtype: torch.dtype) -> Any:
    """Return example inputs of one sample.

    Args:
        sample: Its form.
        dtype: Of floats.
    """
    shape, kind = sample.shape, sample.dtype
    if isinstance(shape, Mapping):
        return {name: zeros(Sample(size, kind and kind[name]), dtype) for name, size in shape.items()}
    if any(isinstance(size, list) for size in shape):
        return tuple(zeros(Sample(size, kind and kind[i]), dtype) for i, size in enumerate(shape))
    return torch.zeros(1, *shape, dtype=dtype if kind is None else getattr(torch, kind))


def same_form(one: Any, other: Any) -> bool:
    """Tell whether two shapes are of as many tensors under the same names."""
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        return isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys()
    several = [[size for size in shape if isinstance(size, list)] for shape in (one, other)]
    return len(several[0]) == len(several[1])
