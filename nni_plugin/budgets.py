"""Budgets: what the pruned network may cost. Ratios are the fraction KEPT; all are exact on the result."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from nni_plugin.cost import Cost
from nni_plugin.errors import BudgetError


@dataclass(frozen=True)
class Size:
    """What budgets compare: the cost of a network and its number of prunable coupled channels."""

    cost: Cost
    channels: int


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


Budget = MACs | Params | Channels
