"""Which parts of a transformer may shrink."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nni_plugin.errors import GraphError

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


def parts_of(provenance: Mapping[str, Any]) -> Collection[str]:
    """Return the parts that a plan was made for, by its provenance: heads are other groups than head positions."""
    return provenance.get("parts") or DEFAULT_PARTS
