"""Methods by name: what `--method` takes. A new criterion is one file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from nni_plugin.criteria import (
    OBD,
    OBS,
    BNScale,
    Criterion,
    FeatureMap,
    GeometricMedian,
    Magnitude,
    Oracle,
    Random,
    TaylorFG,
    TaylorFisher,
    TaylorFO,
    TaylorSO,
)
from nni_plugin.errors import CriterionError

METHODS: dict[str, Callable[[], Criterion]] = {
    "taylor-fo": TaylorFO,
    "taylor-fo-weight": lambda: TaylorFO("weight", "square-then-sum"),
    "taylor-fo-weight-sum": lambda: TaylorFO("weight"),
    "taylor-fo-input": lambda: TaylorFO("input"),
    "taylor-fg": TaylorFG,
    "taylor-fisher": TaylorFisher,
    "taylor-so": TaylorSO,
    "taylor-so-row": lambda: TaylorSO(hessian="row"),
    "obd": OBD,
    "obd-signed": lambda: OBD(signed=True),
    "feature-map": FeatureMap,
    "obs": OBS,
    "magnitude": Magnitude,
    "magnitude-l1": lambda: Magnitude(p=1),
    "bn-scale": BNScale,
    "geometric-median": GeometricMedian,
    "random": Random,
    "oracle": Oracle,
}
"""Our own criteria."""


def known_methods() -> dict[str, Callable[[], Any]]:
    """Return every method by name: ours, then those of Torch-Pruning and of NNI."""
    from nni_plugin.adapters.nni.importance import IMPORTANCES as OF_NNI
    from nni_plugin.adapters.torch_pruning.importance import IMPORTANCES as OF_TORCH_PRUNING

    return {**METHODS, **OF_TORCH_PRUNING, **OF_NNI}


def create_criterion(method: str, seed: int = 0) -> Any:
    """Build the criterion of a method.

    Args:
        method: One of `METHODS`, `tp:...` for an importance of Torch-Pruning, `nni:...` for a criterion of NNI.
        seed: Of criteria that draw random numbers.

    Raises:
        CriterionError: There is no such method (the text has the closest names), or its library is not installed.
    """
    known = known_methods()
    if method not in known:
        close = difflib.get_close_matches(method, known, n=3) or sorted(known)
        raise CriterionError(f"Unknown method {method!r}; did you mean {', '.join(close)}?")
    criterion = known[method]()
    if hasattr(criterion, "seed"):
        criterion.seed = seed
    return criterion
