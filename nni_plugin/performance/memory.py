"""Episodic memory: architectures that were tried, and how accurate they were.

Gao et al., CVPR 2021: the performance network learns from a bounded memory. Minibatch accuracies are noisy and
architectures of neighbouring steps alike, so an entry is the mean of a few consecutive steps. A full memory does not
forget: the entry of the nearest accuracy is averaged with the new one, so that rare accuracies stay. For training,
entries are drawn inversely to how many share their accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nni_plugin.errors import SearchError


class EpisodicMemory:
    """A bounded store of (architecture, accuracy).

    Args:
        capacity: Most entries; the released code has 500.
        average: Consecutive steps that make one entry; the released code has 2.
        bins: Bins of equal width that the range of accuracies is cut into for sampling; the released code has 10.

    Attributes:
        architectures: One entry a row, shape `[len, N]`; None while empty.
        accuracies: float64 on the CPU, shape `[len]`.
    """

    def __init__(self, capacity: int = 500, average: int = 2, bins: int = 10) -> None:
        for name, value in (("capacity", capacity), ("average", average), ("bins", bins)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SearchError(f"{name} must be an integer of at least 1, got {value!r}.")
        self.capacity, self.average, self.bins = capacity, average, bins
        self._store: Tensor | None = None  # [capacity, N]; rows beyond `_length` are not used
        self._length = 0
        self._accuracies = torch.zeros(capacity, dtype=torch.float64)
        self._pending: list[tuple[Tensor, float]] = []

    def __len__(self) -> int:
        """Return the number of entries."""
        return self._length

    @property
    def architectures(self) -> Tensor | None:
        """The architectures of all entries, shape `[len, N]`."""
        return None if self._store is None else self._store[: self._length]

    @property
    def accuracies(self) -> Tensor:
        """The accuracies of all entries, shape `[len]`."""
        return self._accuracies[: self._length]

    def add(self, architecture: Tensor, accuracy: float) -> None:
        """Take in one step.

        Args:
            architecture: Gates, shape `[N]`; copied.
            accuracy: In [0, 1].

        Raises:
            SearchError: The accuracy is not in [0, 1], or a gate is not a number.
        """
        check_accuracy(accuracy)
        if not bool(torch.isfinite(architecture).all()):
            raise SearchError("The memory was given an architecture with gates that are not finite.")
        self._pending.append((architecture.detach().clone(), float(accuracy)))
        if len(self._pending) < self.average:
            return
        merged = torch.stack([pending for pending, _ in self._pending]).mean(0)
        mean = math.fsum(value for _, value in self._pending) / self.average
        self._pending.clear()
        if self._store is None:
            self._store = merged.new_zeros(self.capacity, *merged.shape)
        if self._length < self.capacity:
            self._store[self._length], self._accuracies[self._length] = merged, mean
            self._length += 1
            return
        nearest = int((self._accuracies - mean).abs().argmin())
        self._store[nearest] = (self._store[nearest] + merged) / 2
        self._accuracies[nearest] = (self._accuracies[nearest] + mean) / 2

    def weights(self) -> Tensor:
        """Return the probability of each entry to be drawn, float64, shape `[len]`: every bin in use has the same."""
        accuracies = self.accuracies
        low, high = float(accuracies.min()), float(accuracies.max())
        width = max(high - low, 1e-12) / self.bins
        bin_of = ((accuracies - low) / width).long().clamp(max=self.bins - 1)
        counts = torch.bincount(bin_of, minlength=self.bins)
        weights = 1 / counts[bin_of].double()
        return weights / weights.sum()

    def sample(self, number: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw entries with replacement.

        Args:
            number: How many, `B`.
            generator: Of the CPU.

        Returns:
            Architectures `[B, N]` and accuracies `[B]`, of the architectures' dtype and device.

        Raises:
            SearchError: The memory is empty.
        """
        if self._store is None:
            raise SearchError("The memory is empty: nothing can be drawn from it yet.")
        drawn = torch.multinomial(self.weights(), number, replacement=True, generator=generator)
        architectures = self._store[drawn.to(self._store.device)]
        return architectures, self._accuracies[drawn].to(architectures)

    def holds(self, architecture: Tensor) -> bool:
        """Tell whether an entry is this architecture."""
        known = self.architectures
        return known is not None and bool((known == architecture.to(known)).all(1).any())

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as tensors and numbers."""
        known = self.architectures
        return {
            "architectures": None if known is None else known.clone(),
            "accuracies": self.accuracies.clone(),
            "pending": [(architecture.clone(), accuracy) for architecture, accuracy in self._pending],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """Put back what :meth:`state_dict` returned.

        Args:
            state: Read back from a file its tensors lie on the CPU, wherever they were.
            device: Where architectures go; None: they stay where they are.

        Raises:
            SearchError: It holds more entries than this memory.
        """
        known = state["architectures"]
        length = 0 if known is None else len(known)
        if length > self.capacity:
            raise SearchError(f"The saved memory has {length} entries, this one holds {self.capacity}.")
        self._store, self._length = None, length
        if known is not None:
            self._store = known.new_zeros(self.capacity, *known.shape[1:], device=device)
            self._store[:length] = known
        self._accuracies.zero_()
        self._accuracies[:length] = state["accuracies"]
        pending = [(architecture.clone(), float(accuracy)) for architecture, accuracy in state["pending"]]
        self._pending = [(architecture.to(device=device), accuracy) for architecture, accuracy in pending]


def check_accuracy(accuracy: float) -> None:
    """Check that an accuracy is a fraction.

    Raises:
        SearchError: It is not.
    """
    if not 0 <= accuracy <= 1:
        hint = " Percent? Divide by 100." if 1 < accuracy <= 100 else ""
        raise SearchError(f"An accuracy is a fraction between 0 and 1, got {accuracy!r}.{hint}")
