"""The numbers of the NPPM experiments: the paper's, and fewer for two cores; every difference is named.

Gao et al., "Network Pruning via Performance Maximization", CVPR 2021, and the authors' code, which says what the paper
and its supplement leave open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.benchmarks.presets import DENSE, Preset, reductions
from nni_plugin.performance import SearchOptions


@dataclass(frozen=True)
class Numbers(Preset):
    """The numbers of these experiments.

    Args:
        macs: Fraction of the MACs kept.
        search: Options of the search that are not the library's defaults, see `SearchOptions`.
        search_images: Training images that are searched on.
        search_batch: Images in a minibatch of the search.
        choice_images: Further training images, on which candidates are compared.
        curve_images: Test images of the curves.
        points: Points of a curve, after its beginning.
        judged: Architectures that the performance network is judged by, of either kind.
    """

    macs: float = 0.5
    search: Mapping[str, Any] = field(default_factory=dict)
    search_images: int = 5000
    search_batch: int = 256
    choice_images: int = 2000
    curve_images: int = 10_000
    points: int = 40
    judged: int = 50


_BASE = TrainingConfig(epochs=200, opt="momentum", lr=0.1, weight_decay=1e-4, sched="step", decay_epochs=100)
FULL = Numbers("torch/cifar10", None, _BASE, _BASE, seeds=5, search={"steps": 4000})
"""A tenth of CIFAR-10 searched for 200 passes, fine-tuning for 200 epochs; five runs, as in Figure 2. The authors' code
lets the learning rate fall at half and at three quarters of training, here it falls at half."""

_REDUCED = {
    "images": 20_000,
    "search": {"steps": 600, "predictor_start": 32},
    "search_images": 6000,
    "search_batch": 128,
    "curve_images": 2000,
    "points": 15,
    "judged": 16,
}


def numbers_of(preset: str, network: str, dataset: str | None = None) -> Numbers:
    """Return the numbers of a preset for a network.

    Args:
        preset: `full`, the paper's; or `reduced`, for two cores: the networks of `presets.DENSE`, a tenth of
            Fashion-MNIST's training images searched for 600 minibatches, fine-tuning for one epoch on a third of them.
        network: Of `presets.DENSE`.
        dataset: Another data set than the preset's.
    """
    numbers = FULL
    if preset == "reduced":
        trained = DENSE[network]
        kept = {name: getattr(trained, name) for name in ("dataset", "batch_size", "img_size", "seeds", "base")}
        numbers = Numbers(**{**kept, "finetune": replace(trained.base, epochs=1, lr=0.01), **_REDUCED})
    return numbers if dataset is None else replace(numbers, dataset=dataset)


def reduced(numbers: Numbers) -> list[str]:
    """Name every number in which these differ from the paper's, options of the search that are left open included."""
    ours, full = (replace(n, search=asdict(SearchOptions(**n.search, mode="gates-only"))) for n in (numbers, FULL))
    return reductions(ours, full)
