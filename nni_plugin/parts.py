"""Which parts of a transformer may shrink."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from nni_plugin.errors import GraphError

if TYPE_CHECKING:
    from nni_plugin.plan import PruningPlan

PARTS = ("heads", "head_dim", "mlp", "embedding")
"""Whole attention heads; positions of every head alike; hidden channels of an MLP; channels of the residual stream."""

DEFAULT_PARTS = ("heads", "mlp", "embedding")


def checked_parts(parts: Collection[str]) -> frozenset[str]:
    """Return parts as a set.

    Raises:
        GraphError: One is unknown, or both ways to cut an attention are asked for.
    """
    chosen = frozenset([parts] if isinstance(parts, str) else parts)
    unknown = sorted(chosen - set(PARTS))
    if unknown:
        raise GraphError(f"Expected parts of {', '.join(PARTS)}; got {', '.join(unknown)}.")
    if {"heads", "head_dim"} <= chosen:
        raise GraphError("An attention loses whole heads or positions of every head: give one of heads and head_dim.")
    return chosen


def parts_of(plan: PruningPlan) -> Collection[str]:
    """Return the parts that a plan was made for: a group of head positions is another than one of heads."""
    return plan.provenance.get("parts") or DEFAULT_PARTS
