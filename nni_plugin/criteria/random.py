"""Random: the baseline that every criterion must beat.

Scores are drawn evenly from [0, 1) for each group by itself, from the seed and the group's name: the same on every
process and machine, whatever else was drawn before, and whichever groups are asked for in whatever order. They are
the same whenever they are asked for; once channels have been cut, those that remain are drawn anew.

Cost: none.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup


class Random(Criterion):
    """Scores at random, the same for the same seed.

    Args:
        seed: Which scores.
    """

    needs_gradients = False
    needs_data = False

    def __init__(self, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise CriterionError(f"seed must be a whole number, got {seed!r}.")
        self.seed = seed
        super().__init__()

    def _gather(self, model: nn.Module) -> None:
        """Take nothing from a minibatch."""

    def _score(self, group: ChannelGroup) -> Tensor:
        draw = random.Random(f"{self.seed}:{group.name}")  # hashes text by SHA-512, alike everywhere
        return torch.tensor([draw.random() for _ in range(group.width)], dtype=torch.float64)
