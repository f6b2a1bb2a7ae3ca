"""Methods by name: what `--method` takes. A new criterion is one file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from nni_plugin.criteria import Criterion, TaylorFG, TaylorFisher, TaylorFO
from nni_plugin.errors import CriterionError

METHODS: dict[str, Callable[[], Criterion]] = {
    "taylor-fo": TaylorFO,
    "taylor-fo-weight": lambda: TaylorFO("weight", "square-then-sum"),
    "taylor-fo-weight-sum": lambda: TaylorFO("weight"),
    "taylor-fo-input": lambda: TaylorFO("input"),
    "taylor-fg": TaylorFG,
    "taylor-fisher": TaylorFisher,
}
"""Our own criteria."""


def create_criterion(method: str) -> Any:
    """Build the criterion of a method; names beginning with `tp:` are Torch-Pruning's own importances.

    Raises:
        CriterionError: There is no such method; the text has the closest names.
    """
    from nni_plugin.adapters.torch_pruning.importance import IMPORTANCES

    known: dict[str, Callable[[], Any]] = {**METHODS, **IMPORTANCES}
    if method not in known:
        close = difflib.get_close_matches(method, known, n=3) or sorted(known)
        raise CriterionError(f"Unknown method {method!r}; did you mean {', '.join(close)}?")
    return known[method]()
