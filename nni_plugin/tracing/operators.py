"""One rule per operator: given the labels of what goes in, note what is the same channel and label what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from nni_plugin.tracing.labels import Labels

if TYPE_CHECKING:
    from nni_plugin.tracing.trace import Trace

Rule = Callable[["Trace", Any, Any, Any, list[torch.Tensor]], "Labels | Iterable[Labels]"]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators by name, without overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return register


def rule_of(operator: Any) -> Rule | None:
    """Return an operator's rule; all that work element by element share one. None where there is none."""
    found = RULES.get(str(operator).rpartition(".")[0])
    return RULES["aten.relu"] if found is None and torch.Tag.pointwise in operator.tags else found
