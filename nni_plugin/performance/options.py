"""Every choice of a search, with its default and where that comes from.

"Paper" is the text and supplement of Gao et al., CVPR 2021; "released" the authors' code, which says what the paper
leaves open; "ours" where neither does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from nni_plugin.checks import Selection
from nni_plugin.errors import SearchError

Mode = Literal["full", "gates-only", "linear"]

_CHOICES = {
    "mode": ("full", "gates-only", "linear"),
    "select": ("no-skip", "skip-only", "all"),
    "predictor": ("table2", "released"),
    "predictor_loss": ("l1", "mse"),
}
_FROM_ONE = ("steps", "memory", "average", "bins", "predictor_batch", "predictor_start")
_FROM_ZERO = ("seed", "candidates", "predictor_warmup")
_POSITIVE = ("temperature", "gate_lr", "predictor_lr", "lr_factor", "cost_weight")
_NOT_NEGATIVE = ("init_std", "performance_weight", "noise", "gate_decay", "predictor_decay")


@dataclass(frozen=True)
class SearchOptions:
    """How a search goes.

    Args:
        mode: `"full"`: performance maximisation. `"gates-only"`: loss and cost alone, no performance network.
            `"linear"`: logistic regression on the gates in place of the performance network.
        steps: Minibatches of the search. Released: 200 passes over a tenth of CIFAR-10, of 20 minibatches each.
        seed: Of the gates, their noise, the performance network and the draws from the memory.
        select: Which groups have gates. Paper: those inside of blocks.
        temperature: `tau` of the gates. Released.
        offset: `b` of the gates. Released.
        init_std: Standard deviation of the initial gates. Released.
        straight_through: Whether samples are 0 and 1 everywhere. Ours; released: soft in the forward pass.
        cost_weight: `lambda`, the weight of the cost penalty. Released, where factors of 2 and 2 meet.
        performance_weight: Weight of `log(1/PN(a))`. Paper.
        project: Whether its gradient is made orthogonal to that of the loss in each layer. Paper.
        noise: Standard deviation of what is added to gates before the performance network reads them, which are then
            cut to [0, 1]; gates outside get no gradient from it. Released: 1, 3 and 15; at 15 hardly a gate is
            reached.
        gate_lr: Learning rate of the gates (AdamW). Released.
        gate_decay: Weight decay of the gates; it pulls towards open. Released.
        lr_at: Fraction of the steps after which the gates' learning rate falls. Released: 0.8 and 0.5.
        lr_factor: By what it is multiplied then. Released.
        predictor: `"table2"`, the supplement's performance network, or `"released"`, the code's.
        predictor_loss: `"l1"` or `"mse"`. Released: both.
        predictor_lr: Learning rate of the performance network (AdamW). Released.
        predictor_decay: Its weight decay. Released.
        predictor_batch: Entries of the memory that it learns from in a step. Released.
        predictor_start: Entries from which on it learns. Released.
        predictor_warmup: Steps that it learns before the gates follow it. Ours: its statistics begin as nothing.
        memory: Most entries of the memory. Released.
        average: Steps that make an entry. Released.
        bins: Bins of accuracies for drawing from the memory. Released.
        candidates: Samples that are compared on held-out data at the end, beside the deterministic choice. Ours;
            released: whichever sample did best on the test set.

    Raises:
        SearchError: A value makes no sense; the text names it.
    """

    mode: Mode = "full"
    steps: int = 4000
    seed: int = 0
    select: Selection = "no-skip"
    temperature: float = 0.4
    offset: float = 3.0
    init_std: float = 1.0
    straight_through: bool = True
    cost_weight: float = 4.0
    performance_weight: float = 1.0
    project: bool = True
    noise: float = 1.0
    gate_lr: float = 5e-2
    gate_decay: float = 1e-2
    lr_at: float = 0.8
    lr_factor: float = 0.1
    predictor: Literal["table2", "released"] = "table2"
    predictor_loss: Literal["l1", "mse"] = "l1"
    predictor_lr: float = 1e-3
    predictor_decay: float = 1e-3
    predictor_batch: int = 64
    predictor_start: int = 64
    predictor_warmup: int = 20
    memory: int = 500
    average: int = 2
    bins: int = 10
    candidates: int = 16

    def __post_init__(self) -> None:
        """Check every value."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise SearchError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for names, least in ((_FROM_ONE, 1), (_FROM_ZERO, 0)):
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise SearchError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise SearchError(f"{field.name} must be a finite number, got {value!r}.")
            if (field.name in _POSITIVE and not value > 0) or (field.name in _NOT_NEGATIVE and not value >= 0):
                raise SearchError(f"{field.name} must be above 0 (or 0 where that means none), got {value!r}.")
        if not 0 < self.lr_at <= 1:
            raise SearchError(f"lr_at is a fraction of the steps in (0, 1], got {self.lr_at!r}.")
        if self.predicts:
            self._check_memory()

    @property
    def predicts(self) -> bool:
        """Whether there is a performance network."""
        return self.mode != "gates-only"

    def _check_memory(self) -> None:
        if self.predictor_batch < 2:
            raise SearchError("predictor_batch must be at least 2: batch normalisation needs two architectures.")
        if self.memory < self.predictor_start:
            raise SearchError(
                f"A memory of {self.memory} entries is too small to train on: the performance network begins at "
                f"{self.predictor_start}. Give more memory, or lower predictor_start."
            )
        first = self.average * self.predictor_start + self.predictor_warmup
        if self.steps <= first:
            raise SearchError(
                f"In {self.steps} steps the performance network never has a say: it begins to learn at "
                f"{self.predictor_start} entries of {self.average} steps and is followed after {self.predictor_warmup} "
                f"more, so give more than {first} steps, lower predictor_start or predictor_warmup, or take "
                "mode='gates-only' (--method differentiable-gates)."
            )
