"""A method as text for a plan's record: its class and options, without the addresses that differ from run to run."""

from __future__ import annotations

import inspect
from typing import Any


def described(method: Any) -> str:
    """Return the class of an object and the arguments of its constructor, as far as it keeps them.

    Example:
        >>> from nni_plugin.criteria import OBS
        >>> described(OBS(damping=0.1))
        "OBS(gates='auto', damping=0.1, compensate=True, linear=False, cost_aware=False, max_samples=4096)"
    """
    kind = type(method)
    options = [
        f"{name}={_text(getattr(method, name))}" for name in inspect.signature(kind).parameters if hasattr(method, name)
    ]
    return f"{kind.__name__}({', '.join(options)})"


def _text(value: Any) -> str:
    return str(value.__qualname__) if inspect.isroutine(value) else repr(value)
