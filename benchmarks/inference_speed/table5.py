"""What the paper measured, and how far networks are pruned here.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, supplement 6.2, Table 5: ResNet-101
on an NVIDIA Tesla V100. The table has no ResNet-50; its goals are the fractions of the MACs left by the pruned
ResNet-50 of the paper's figure, read off to about 0.02 GFLOPs of 4.09.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A line of Table 5.

    Attributes:
        name: The fraction of gates that stays, by which the paper names the network.
        skip_only: Whether only channels of the skip connections left.
        gmacs: Multiply-accumulates of an image, in 10^9; the paper calls them GFLOPs.
        params: Parameters, in 10^6.
        error: Top-1 error on ImageNet, in percent.
        ms16: Milliseconds of a batch of 16.
        ms256: Milliseconds of a batch of 256.
    """

    name: str
    skip_only: bool
    gmacs: float
    params: float
    error: float
    ms16: float
    ms256: float


TABLE5 = (
    Row("none", False, 7.80, 44.7, 22.63, 29.0, 379.8),
    Row("75 %", False, 4.70, 31.2, 22.65, 24.1, 313.5),
    Row("55 %", False, 2.85, 20.7, 24.05, 21.6, 261.7),
    Row("50 %", False, 2.47, 17.8, 24.62, 20.9, 251.4),
    Row("40 %", False, 1.76, 13.6, 25.84, 21.0, 223.4),
    Row("52 %", True, 6.57, 36.0, 22.94, 25.3, 326.7),
    Row("22 %", True, 5.19, 28.6, 24.77, 19.5, 239.3),
)
"""The first is the dense network."""


@dataclass(frozen=True)
class Goal:
    """How much of a network stays.

    Attributes:
        name: What it is called on the page.
        macs: Fraction of the MACs kept.
        params: Fraction of the parameters kept, where the paper says it.
        skip_only: Whether only channels coupled across blocks may leave.
    """

    name: str
    macs: float
    params: float | None = None
    skip_only: bool = False


GOALS = {
    "resnet101": tuple(
        Goal(
            f"{row.name} of the gates" + ", skip only" * row.skip_only,
            row.gmacs / TABLE5[0].gmacs,
            row.params / TABLE5[0].params,
            row.skip_only,
        )
        for row in TABLE5[1:]
    ),
    "resnet50": tuple(Goal(f"{100 * ratio:.0f} % of the MACs", ratio) for ratio in (0.80, 0.65, 0.55, 0.33)),
}


def goals_of(network: str) -> tuple[Goal, ...]:
    """Return how far a network is pruned; one that the paper did not prune as ResNet-50."""
    return GOALS.get(network, GOALS["resnet50"])
