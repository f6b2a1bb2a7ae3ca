"""The numbers of the LayerPrune experiments: the paper's, and fewer for two cores; every difference is named.

Elkerdawy et al., "To Filter Prune, or to Layer Prune, That Is the Question", ACCV 2020, supplement 1.1 and 1.2. What it
leaves open is from the authors' code: weight decay, and when the learning rate of fine-tuning falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.benchmarks.presets import DENSE, Preset


@dataclass(frozen=True)
class Numbers(Preset):
    """The numbers of these experiments.

    Args:
        score_images: Training images that criteria see and statistics of batch normalisations are estimated on.
        held_out_images: Further training images, on which Imprinting measures the accuracies of its proxies.
    """

    score_images: int = 39_900
    held_out_images: int = 10_000


_BASE = TrainingConfig(epochs=160, opt="momentum", lr=0.1, weight_decay=5e-4, sched="step", decay_epochs=61)
FULL = Numbers(
    dataset="torch/cifar10",
    images=None,
    base=_BASE,
    finetune=replace(_BASE, epochs=30, lr=1e-3, decay_epochs=10),
    channels=100,
    every=10,
    seeds=3,
)
"""Supplement, 1.1, and the authors' code (weight decay, decays of the learning rate)."""


def numbers_of(preset: str, network: str, dataset: str | None = None) -> Numbers:
    """Return the numbers of a preset for a network.

    Args:
        preset: `full`, the paper's; or `reduced`, for two cores: the networks of `presets.DENSE`, fine-tuned for one
            epoch on a third of Fashion-MNIST's training images.
        network: Of `presets.DENSE`.
        dataset: Another data set than the preset's.
    """
    numbers = FULL
    if preset == "reduced":
        trained = DENSE[network]
        numbers = Numbers(
            **{
                **{name: getattr(trained, name) for name in ("dataset", "batch_size", "img_size", "seeds", "base")},
                "images": 20_000,
                "finetune": replace(trained.base, epochs=1, lr=0.01),
                "channels": FULL.channels,
                "every": FULL.every,
                "score_images": 2000,
                "held_out_images": 4000,
            }
        )
    return numbers if dataset is None else replace(numbers, dataset=dataset)
