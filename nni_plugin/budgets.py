"""Budgets: what the pruned network may cost. Ratios are the fraction KEPT; all are exact on the result.

Latency is measured, so it is exact as far as a measurement is; :mod:`nni_plugin.latency_budget` measures it. `Layers`
alone says what leaves, as LayerPrune counts: LayerPrune_4 is `Layers(4)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from nni_plugin.cost import Cost
from nni_plugin.errors import BudgetError


@dataclass(frozen=True)
class Size:
    """What budgets compare.

    Args:
        cost: MACs and parameters of the network.
        channels: Its prunable coupled channels.
        latency_ms: Time of one forward pass where it was measured, in milliseconds for the batch.
        layers: How many blocks fewer than the dense network it has.
    """

    cost: Cost
    channels: int
    latency_ms: float | None = None
    layers: int = 0


def _check_ratio(name: str, ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise BudgetError(f"{name} is the fraction kept and must be above 0 and at most 1, got {ratio!r}.")


def _share(ratio: float, whole: int) -> int:
    """Return a share rounded down, of the decimal number that was written: 0.29 of 100 is 29."""
    return int(Fraction(str(ratio)) * whole)


@dataclass(frozen=True)
class MACs:
    """At most this fraction of the dense network's multiply-accumulates.

    Example:
        >>> MACs(0.5).limit(Size(Cost(macs=1000, params=10), channels=8))
        500
    """

    ratio: float

    def __post_init__(self) -> None:
        """Check the range."""
        _check_ratio("MACs", self.ratio)

    def limit(self, dense: Size) -> int:
        """Return the most MACs (of one sample) that the result may have."""
        return _share(self.ratio, dense.cost.macs)

    def value(self, size: Size) -> int:
        """Return what is compared with the limit."""
        return size.cost.macs


@dataclass(frozen=True)
class Params:
    """At most this fraction of the dense network's parameters."""

    ratio: float

    def __post_init__(self) -> None:
        """Check the range."""
        _check_ratio("Params", self.ratio)

    def limit(self, dense: Size) -> int:
        """Return the most parameters that the result may have."""
        return _share(self.ratio, dense.cost.params)

    def value(self, size: Size) -> int:
        """Return what is compared with the limit."""
        return size.cost.params


@dataclass(frozen=True)
class Channels:
    """At most this many coupled channels, over all prunable groups: a count (int) or a fraction (float)."""

    count: int | float

    def __post_init__(self) -> None:
        """Check the range."""
        if isinstance(self.count, float):
            _check_ratio("Channels", self.count)
        elif isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise BudgetError(f"Channels is a count of at least 1 or a fraction kept in (0, 1], got {self.count!r}.")

    def limit(self, dense: Size) -> int:
        """Return the most channels that the result may have."""
        return _share(self.count, dense.channels) if isinstance(self.count, float) else self.count

    def value(self, size: Size) -> int:
        """Return what is compared with the limit."""
        return size.channels


@dataclass(frozen=True)
class Layers:
    """This many blocks leave the network.

    Args:
        count: Removable blocks that go, at least 1; one that lies inside another one does not count beside it.
    """

    count: int

    def __post_init__(self) -> None:
        """Check the range."""
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise BudgetError(f"Layers is how many blocks go, an integer of at least 1, got {self.count!r}.")

    def limit(self, dense: Size) -> int:
        """Return the most that :meth:`value` may be."""
        return -self.count

    def value(self, size: Size) -> int:
        """Return what is compared with the limit: it falls as blocks leave."""
        return -size.layers


@dataclass(frozen=True)
class Latency:
    """At most this time for a forward pass: a fraction of the dense network's, or milliseconds.

    Args:
        ratio: Fraction of the dense network's latency kept, measured side by side with it.
        ms: Milliseconds of one pass over the batch, instead of a fraction. A machine that is busier later will be
            slower; a fraction holds.
        batch_size: Images in a pass.
        device: Where to measure; None: where the network is.
    """

    ratio: float | None = None
    ms: float | None = None
    batch_size: int = 1
    device: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if (self.ratio is None) == (self.ms is None):
            raise BudgetError(f"Latency takes a fraction kept or ms=milliseconds, one of them, got {self!r}.")
        if self.ratio is not None:
            _check_ratio("Latency", self.ratio)
        elif isinstance(self.ms, bool) or not isinstance(self.ms, (int, float)) or not 0 < self.ms < math.inf:
            raise BudgetError(f"Latency: ms must be a number of milliseconds above 0, got {self.ms!r}.")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise BudgetError(f"Latency: batch_size must be an integer of at least 1, got {self.batch_size!r}.")

    def __str__(self) -> str:
        """Return what is asked, without the rest.

        Example:
            >>> f"{Latency(0.7)}, {Latency(ms=3.5, batch_size=8)}"
            'Latency(ratio=0.7), Latency(ms=3.5) at batch size 8'
        """
        asked = f"Latency(ratio={self.ratio})" if self.ms is None else f"Latency(ms={self.ms})"
        return asked if self.batch_size == 1 else f"{asked} at batch size {self.batch_size}"

    def limit(self, dense: Size) -> float:
        """Return the most milliseconds of one pass."""
        if self.ms is not None:
            return self.ms
        assert self.ratio is not None
        return self.ratio * _measured(dense)

    def value(self, size: Size) -> float:
        """Return what is compared with the limit."""
        return _measured(size)


def _measured(size: Size) -> float:
    if size.latency_ms is None:
        raise BudgetError("This network's latency has not been measured: plan with plan_layers or plan_channels.")
    return size.latency_ms


Budget = MACs | Params | Channels | Layers | Latency
