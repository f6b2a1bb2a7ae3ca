"""Orthogonal projection: what performance maximisation adds must not undo what the loss asks for.

Gao et al., CVPR 2021, supplement, Eq. 1: in each layer `i`, of the gradient `g_P` of `log(1/PN(a))` only the part
orthogonal to the gradient `g_L` of the classification loss is used,

    g_P_hat = g_P - (g_L . g_P) / ||g_L||^2  g_L.

The released code divides by zero where a layer has no gradient; here `g_P` is then used whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal_part(gradient: Tensor, reference: Tensor, owner: Tensor, eps: float = 1e-30) -> Tensor:
    """Return the part of one gradient that is orthogonal to another, layer by layer.

    Args:
        gradient: `g_P`, shape `[N]`.
        reference: `g_L`, shape `[N]`.
        owner: The number of the layer behind each entry, int64, shape `[N]`, layers from 0.
        eps: Added to `||g_L||^2`; far below any gradient, for it only stands against division by zero.

    Returns:
        `g_P_hat`, shape `[N]`, of the gradient's dtype.

    Example:
        >>> orthogonal_part(torch.tensor([1.0, 1.0, 5.0]), torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0, 0, 1]))
        tensor([0., 1., 5.])
    """
    ours, theirs = gradient.double(), reference.double()
    layers = int(owner[-1]) + 1 if len(owner) else 0
    sums = torch.zeros(2, layers, dtype=torch.float64, device=gradient.device)
    sums = sums.index_add(1, owner, torch.stack([ours * theirs, theirs.square()]))
    share = sums[0] / (sums[1] + eps)
    return (ours - share[owner] * theirs).to(gradient.dtype)
