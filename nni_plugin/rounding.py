"""What widths are rounded to where nobody says: the one place that knows the default.

The matrix units of a GPU work on tiles; a width that is no multiple of 8 (in half precision, and in TF32 of 4) is
padded to one or runs on slower kernels, so a channel removed below that multiple saves nothing.
"""

from __future__ import annotations

from torch import nn

from nni_plugin.latency import device_of

CUDA_MULTIPLE = 8
"""Widths on a CUDA device become multiples of this unless something else is asked for."""


def rounding_of(round_to: int | None, model: nn.Module) -> int:
    """Return the multiple that widths of a network become.

    Args:
        round_to: What was asked for; None: what suits the device that the network is on.
        model: The network.

    Example:
        >>> rounding_of(None, nn.Linear(2, 2)), rounding_of(4, nn.Linear(2, 2))
        (1, 4)
    """
    if round_to is not None:
        return round_to
    return CUDA_MULTIPLE if device_of(model).type == "cuda" else 1
