"""Differentiable gates: which channels a network keeps, as a random variable that gradients can move.

Gao et al., "Network Pruning via Performance Maximization", CVPR 2021. Every unit of removal has one free number `w`
(there is no hypernetwork). A sample is

    u = sigmoid((w + s + b) / tau),   s ~ Gumbel(0, 1),   a = 1[u >= 1/2],

with the gradient of `u` in place of that of the step (straight-through). So `a = 1` with probability

    P(keep) = 1 - exp(-exp(w + b)),

whatever the temperature, and P(keep) >= 1/2 where `w + b >= log(log 2)`. One sample serves a whole step: the forward
pass, the cost and the memory see the same network. A group always keeps its largest gate, since a layer without
channels is no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nni_plugin.errors import SearchError
from nni_plugin.groups import ChannelGroup
from nni_plugin.performance.architecture import ArchitectureLayout
from nni_plugin.performance.hooks import GateHooks, frozen

EVEN = math.log(math.log(2))
"""The value of `w + b` at which a gate is as likely open as closed: -0.3665."""


def keep_probability(logits: Tensor, offset: float) -> Tensor:
    """Return `1 - exp(-exp(w + b))` of each gate.

    Example:
        >>> [round(float(p), 3) for p in keep_probability(torch.tensor([-2.0, -3.0, -4.0, -5.0]), 3.0)]
        [0.934, 0.632, 0.308, 0.127]
    """
    return -torch.expm1(-torch.exp(logits + offset))


def gumbel(uniform: Tensor) -> Tensor:
    """Return Gumbel(0, 1) noise from uniform numbers in [0, 1), finite also at both ends."""
    tiny = torch.finfo(uniform.dtype).tiny
    exponential = -torch.log(uniform.clamp(min=tiny))
    return -torch.log(exponential.clamp(min=tiny))


class DifferentiableGates(nn.Module):
    """Gates over coupled groups of channels.

    Args:
        groups: The groups; see :func:`~nni_plugin.performance.architecture.gated_groups`.
        temperature: `tau`; the released code has 0.4.
        offset: `b`; the released code has 3, so that nearly all gates begin open.
        init_std: Standard deviation of the initial `w`; the released code has 1.
        straight_through: Whether samples are 0 and 1. False: the soft `u` itself, as in the released code's forward
            pass; then the cost and the memory see it too.
        seed: Of the initial `w`.
        device: Where the gates live: where the network is.
        dtype: Of the gates.

    Attributes:
        logits: All `w` in one vector, shape `[N]`; `vectors()` has them by group.
        layout: Where each group's lie.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        *,
        temperature: float = 0.4,
        offset: float = 3.0,
        init_std: float = 1.0,
        straight_through: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise SearchError(f"temperature must be above 0, got {temperature}.")
        self.temperature, self.offset, self.straight_through = temperature, offset, straight_through
        self.layout = ArchitectureLayout(groups, device)
        drawn = torch.randn(self.layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.logits = nn.Parameter((init_std * drawn).to(device, dtype))

    def forward(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one architecture, shape `[N]`, differentiable with respect to `logits`.

        Args:
            generator: A generator of the CPU, so that a seed means the same on every device; None: the global one.

        Raises:
            SearchError: A gate is not a number.
        """
        self.check()
        uniform = torch.rand(self.layout.size, generator=generator, dtype=torch.float64)
        noise = gumbel(uniform)
        soft = torch.sigmoid((self.logits + noise.to(self.logits) + self.offset) / self.temperature)
        if not self.straight_through:
            return soft
        values = soft.detach()
        largest = values.new_zeros(len(self.layout.groups)).scatter_reduce(0, self.layout.owner, values, "amax")
        hard = ((values >= 0.5) | (values >= largest[self.layout.owner])).to(values)
        return hard + (soft - values)

    def keep_probability(self) -> dict[str, Tensor]:
        """Return the probability of each gate to be open, by group name, shape `[units]`."""
        return self.layout.split(keep_probability(self.logits.detach(), self.offset))

    def vectors(self) -> dict[str, Tensor]:
        """Return `w` by group name, shape `[units]`."""
        return self.layout.split(self.logits.detach())

    @contextmanager
    def applied(self, model: nn.Module, architecture: Tensor) -> Iterator[nn.Module]:
        """Put gates on a network, which is frozen and in eval mode meanwhile, and as it was afterwards.

        Args:
            model: The network that the groups were found on.
            architecture: One value a gate, shape `[N]`.
        """
        with frozen(model), GateHooks(model, self.layout) as hooks:
            hooks.set(architecture)
            yield model

    def check(self) -> None:
        """Check that every gate is a number.

        Raises:
            SearchError: One is not.
        """
        if not bool(torch.isfinite(self.logits.detach()).all()):
            bad = [name for name, vector in self.vectors().items() if not bool(torch.isfinite(vector).all())]
            raise SearchError(
                f"Gates of {len(bad)} groups are not finite, first {bad[0]!r}: a loss or gradient overflowed. Lower "
                "gate_lr or cost_weight, or go on from an earlier state. The model is unchanged."
            )
