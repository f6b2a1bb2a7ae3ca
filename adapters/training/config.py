"""The settings of one training run, under the names of timm's own flags."""

import math
from dataclasses import dataclass
from typing import Literal

import timm.optim

from nni_plugin.errors import TrainingError

SCHEDULERS = ("cosine", "tanh", "step", "poly", "wsd", "rsqrt", "constant", "none")
"""timm's schedulers that need neither milestones nor a metric."""

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class TrainingConfig:
    """What decides the outcome of a training run, besides the model, the data and the callbacks.

    Attributes:
        epochs: Passes over the training data, >= 0; with 0, `fit` does nothing.
        opt: Name of an optimizer of timm (`timm.optim.list_optimizers()`); its "sgd" is Nesterov's.
        lr: Highest learning rate, > 0.
        momentum: Momentum of optimizers that have one, in [0, 1).
        weight_decay: Decoupled or L2, as the optimizer defines it, >= 0; not applied to biases and norms.
        sched: Learning-rate schedule, one of `SCHEDULERS`, stepped after every minibatch.
        warmup_epochs: Epochs of linear warm-up from 1e-5, counted within `epochs`.
        min_lr: Learning rate that the schedule decays to, in [0, lr].
        decay_epochs: Epochs between decays (step), length of the decay (wsd, rsqrt); None is timm's default.
        decay_rate: Factor of each decay (step), power (poly), > 0.
        clip_grad: Largest L2 norm of the gradient of all parameters together, > 0; None does not clip.
        smoothing: Label smoothing, in [0, 1).
        mixup: Alpha of mixup's Beta distribution, >= 0; 0 is off.
        model_ema: Average the weights over time, and end with the average. The decay is warmed up, so that
            short runs are averaged over a share of their length rather than over their start.
        model_ema_decay: Highest decay of that average, in [0, 1).
        amp: Mixed precision of the forward pass; "fp16" needs a GPU.
        channels_last: Weights and images in the channels-last memory format: faster convolutions.
        seed: Fixes the order of the data, dropout and mixup, >= 0.
        checkpoint_every: Minibatches between checkpoints within an epoch, >= 1; None is at epoch ends.

    Raises:
        TrainingError: A value is out of its range; the text begins with the flag.
    """

    epochs: int
    opt: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    sched: str = "cosine"
    warmup_epochs: int = 0
    min_lr: float = 0.0
    decay_epochs: float | None = None
    decay_rate: float = 0.1
    clip_grad: float | None = None
    smoothing: float = 0.0
    mixup: float = 0.0
    model_ema: bool = False
    model_ema_decay: float = 0.998
    amp: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    seed: int = 0
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        """Check every value; see the class for the ranges."""
        self._need("epochs", self.epochs >= 0, "0 or more")
        self._need("opt", self.opt in timm.optim.list_optimizers(), "an optimizer of timm, such as sgd")
        self._need("lr", 0 < self.lr < math.inf, "a positive number")
        self._need("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._need("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._need("sched", self.sched in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}")
        self._need(
            "warmup_epochs",
            self.warmup_epochs == 0 or 0 < self.warmup_epochs < self.epochs,
            f"0 or more and below --epochs {self.epochs}",
        )
        self._need("min_lr", 0 <= self.min_lr <= self.lr, f"between 0 and --lr {self.lr}")
        self._need("decay_epochs", self.decay_epochs is None or 0 < self.decay_epochs < math.inf, "positive")
        self._need("decay_rate", 0 < self.decay_rate < math.inf, "positive")
        self._need("clip_grad", self.clip_grad is None or 0 < self.clip_grad < math.inf, "positive")
        self._need("smoothing", 0 <= self.smoothing < 1, "in [0, 1)")
        self._need("mixup", 0 <= self.mixup < math.inf, "0 or more")
        self._need("model_ema_decay", 0 <= self.model_ema_decay < 1, "in [0, 1)")
        self._need("amp", self.amp in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._need("seed", self.seed >= 0, "0 or more")
        every = self.checkpoint_every
        self._need("checkpoint_every", every is None or every >= 1, "1 or more")

    def _need(self, name: str, holds: bool, expected: str) -> None:
        """Raise for the flag of field `name` unless its value `holds`."""
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise TrainingError(f"{flag}: expected {expected}, got {getattr(self, name)!r}")
