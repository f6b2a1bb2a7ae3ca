"""Every fifth minibatch is held out, of whatever it is made."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nni_plugin.errors import DataError
from nni_plugin.held_out import split_fifth


def make(kind: str, i: int) -> Any:
    values = torch.full((2, 3), float(i))
    return {
        "tensors": (values, torch.tensor([0, 1])),
        "arrays": (values.numpy(), np.array([0, 1])),
        "dict": {"x": values, "name": ["a", "b"], "number": i},
        "nan": [torch.full((2,), torch.nan), i],
    }[kind]


def number_of(batch: Any) -> int:
    first = (
        batch["number"] if isinstance(batch, dict) else batch[1] if isinstance(batch, list) else batch[0].flatten()[0]
    )
    return int(first)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "dict", "nan"])
@pytest.mark.parametrize(("number", "held"), [(2, [1]), (4, [3]), (6, [4]), (10, [4, 9])])
def test_every_fifth(kind: str, number: int, held: list[int]) -> None:
    learn, held_out = split_fifth([make(kind, i) for i in range(number)])
    for _ in range(2):  # both can be gone through again
        assert [number_of(batch) for batch in held_out] == held
        assert [number_of(batch) for batch in learn] == [i for i in range(number) if i not in held]


def test_what_cannot_be_split() -> None:
    data = TensorDataset(torch.randn(64, 3))
    for batches, text in (
        (iter([make("tensors", 0)]), "only once"),
        ([make("tensors", 0)], "1 minibatch,"),
        (DataLoader(data, 8, shuffle=True), "shuffled"),
    ):
        with pytest.raises(DataError, match=text):
            split_fifth(batches)


def test_arrays_of_other_sizes_are_others() -> None:
    class Growing:
        length = 1

        def __iter__(self) -> Any:
            Growing.length += 1
            return iter([np.ones(Growing.length)] * 5)

    with pytest.raises(DataError, match="shuffled"):
        split_fifth(Growing())
