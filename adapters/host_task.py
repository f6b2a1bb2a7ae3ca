"""What a host's own pruner is asked to do, and what it gives back, whichever host it is.

A host counts in its own way (channels, weights, its own operator counter); here every host is held to the one counter
of this package, on the network it made.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from nni_plugin.budgets import MACs, Params, Size
from nni_plugin.cost import Cost, count


class Batches(Sized, Protocol):
    """Minibatches that can be gone through again, such as a list or a loader."""

    def __iter__(self) -> Any:
        """Begin again."""


@dataclass(frozen=True)
class HostTask:
    """One network to prune by a host's own method.

    Args:
        model: The network, a copy that may be changed.
        examples: One tensor `[N, ...]`, or a tuple or dict of inputs, on its device.
        method: Its name, such as `"tp:taylor"`.
        budget: Of MACs or parameters.
        dense: What the network costs before.
        batches: Minibatches on its device.
        loss_fn: `loss_fn(model, batch)`.
        classifier: Names of the layers that write the network's output.
        ignore: Names of further layers to leave whole, with all below them.
        seed: Of methods that draw random numbers.
    """

    model: nn.Module
    examples: Any
    method: str
    budget: MACs | Params
    dense: Cost
    batches: Batches
    loss_fn: Callable[[nn.Module, Any], Tensor]
    classifier: tuple[str, ...]
    ignore: tuple[str, ...]
    seed: int

    @property
    def keep(self) -> tuple[str, ...]:
        """Names of all layers to leave whole."""
        return self.classifier + self.ignore

    @property
    def limit(self) -> int:
        """The most MACs or parameters of the result."""
        return self.budget.limit(Size(self.dense, channels=0))

    @property
    def unit(self) -> str:
        """What the budget counts, for texts."""
        return "MACs" if isinstance(self.budget, MACs) else "parameters"

    def spent(self, model: nn.Module) -> int:
        """Count what the budget counts, on a network."""
        return self.budget.value(Size(count(model, self.examples), channels=0))

    def ratio(self, spent: int) -> float:
        """Return the fraction of the dense network's."""
        return spent / self.budget.value(Size(self.dense, channels=0))


@dataclass(frozen=True)
class HostPruned:
    """A network that a host has pruned.

    Args:
        model: The smaller network, in the mode it was in.
        settings: How it came about, as JSON values: the host and its version, the class called, its arguments, the
            number of steps or trials, the fraction of the budget's unit that is left (`ratio`).
    """

    model: nn.Module
    settings: dict[str, Any]
