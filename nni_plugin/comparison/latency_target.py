"""Hold a built-in pruner to a latency: other libraries' pruners know MACs, so those are searched for, by measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from nni_plugin.adapters.host_task import HostPruned
from nni_plugin.budgets import Latency, MACs
from nni_plugin.errors import BudgetError
from nni_plugin.latency import measure_latency, measure_pair

TRIALS = 7
"""Networks that are pruned and timed: the MACs are known to a hundredth of the dense network's then."""

NEAR = 0.03
"""So far below the target, as a share of it, a network is near enough."""


def macs_at_latency(
    prune: Callable[[MACs], HostPruned], dense: nn.Module, budget: Latency, input_shape: Sequence[int], device: Any
) -> float:
    """Return the fraction of MACs, found by halving, at which a network's latency is just at or below a target.

    Args:
        prune: Prunes the dense network to a fraction of its MACs.
        dense: The dense network, timed in turns with the pruned ones.
        budget: What the result may take.
        input_shape: Channels, height and width of an image.
        device: Where both are.

    Raises:
        BudgetError: No network that was tried is fast enough.
    """
    shape = (int(input_shape[0]), int(input_shape[1]), int(input_shape[2]))
    sizes = (budget.batch_size,)
    if budget.ratio is not None:
        target = budget.ratio
    else:
        assert budget.ms is not None  # one of the two is given
        target = budget.ms / measure_latency(dense, shape, sizes, device=device)[0].median_ms
    low, high = 0.0, 1.0
    best: float | None = None
    fastest = 1.0
    for _ in range(TRIALS):
        middle = (low + high) / 2
        try:
            pruned = prune(MACs(middle))
        except BudgetError:  # it cannot be made so small
            low = middle
            continue
        ratio = measure_pair(dense, pruned.model, shape, sizes, device=device)[0].ratio
        fastest = min(fastest, ratio)
        if ratio > target:
            high = middle
            continue
        low = best = middle
        if ratio >= target * (1 - NEAR):
            break
    if best is None:
        raise BudgetError(
            f"Expected a latency of {target:.3f} of the dense network's, the fastest of {TRIALS} networks reached "
            f"{fastest:.3f}. Ask for more; the model is unchanged."
        )
    return best
