"""The numbers of the ResNet-20 experiments: the paper's, and fewer for two cores; every difference is named.

Molchanov et al., CVPR 2019, supplement 6.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nni_plugin.adapters.training import TrainingConfig


@dataclass(frozen=True)
class Preset:
    """The numbers of an experiment; what the paper leaves open is marked.

    Args:
        dataset: See `adapters.data.create_loaders`.
        images: Training images, the same share of each class (rounded); None for all.
        base: Training of the base network (weight decay: open).
        finetune: Training while and after pruning (likewise).
        channels: Channels removed in a step.
        every: Minibatches between steps.
        batch_size: Images in a minibatch (open).
        seeds: How many seeds.
        img_size: Height and width of the images; None for the data set's own.
    """

    dataset: str
    images: int | None
    base: TrainingConfig
    finetune: TrainingConfig
    channels: int = 10
    every: int = 30
    batch_size: int = 128
    seeds: int = 10
    img_size: int | None = None

    @property
    def scratch(self) -> TrainingConfig:
        """The base network's training, stretched to the length of base training and fine-tuning together."""
        epochs = self.base.epochs + self.finetune.epochs
        decay = self.base.decay_epochs
        stretched = None if decay is None else decay * epochs / self.base.epochs
        return replace(self.base, epochs=epochs, decay_epochs=stretched)

    def training(self) -> dict[str, Any]:
        """Return how the base network is trained, as JSON values."""
        values = {"dataset": self.dataset, "img_size": self.img_size, **asdict(self.base)}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


_STEPS = TrainingConfig(epochs=200, opt="momentum", lr=0.1, weight_decay=5e-4, sched="step", decay_epochs=80)
FULL = Preset(dataset="torch/cifar10", images=None, base=_STEPS, finetune=replace(_STEPS, epochs=70, decay_epochs=20))
"""Molchanov et al., CVPR 2019, supplement 6.1."""

REDUCED = replace(
    FULL,
    dataset="torch/fashion_mnist",
    images=20_000,
    # The learning rate falls at the same shares of training as in the paper, and pruning ends before its first fall.
    base=replace(FULL.base, epochs=2, decay_epochs=0.8),
    finetune=replace(FULL.finetune, epochs=1, decay_epochs=2 / 7),
    every=4,
    batch_size=64,
    seeds=3,
)
"""For two cores: minutes instead of hours a run."""

PRESETS = {"reduced": REDUCED, "full": FULL}


_TRAINING = TrainingConfig(epochs=2, lr=0.1, weight_decay=5e-4, sched="cosine")
_FASTER = replace(_TRAINING, lr=0.05, amp="bf16", channels_last=True)


def _trained(training: TrainingConfig) -> Preset:
    return Preset("torch/fashion_mnist", None, training, training, seeds=3)


DENSE = {
    "resnet20": _trained(_TRAINING),
    "resnet56": _trained(_FASTER),
    "vgg19_bn": replace(_trained(replace(_FASTER, epochs=2)), img_size=16),
    "mobilenetv2_cifar": _trained(replace(_FASTER, epochs=1)),
}
"""Dense networks to compare criteria on, trained as far as two cores go; nothing is fine-tuned."""


def reductions(preset: Preset, full: Preset = FULL) -> list[str]:
    """Name every number in which a preset differs from the full one.

    Example:
        >>> reductions(replace(FULL, every=4))
        ['every: 4 instead of 30']
    """
    ours, theirs = _flat(asdict(preset)), _flat(asdict(full))
    return [
        f"{name}: {_shown(ours[name])} instead of {_shown(theirs[name])}" for name in ours if ours[name] != theirs[name]
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "all"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
