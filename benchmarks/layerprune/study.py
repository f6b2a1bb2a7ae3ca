"""What the LayerPrune experiments share: rankings, plans, and what a plan leaves before and after fine-tuning.

Each of these is a run of its own in a grid. What a plan leaves is filed under what the plan does, so that experiments
that arrive at the same blocks share one measurement and one fine-tuning.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.training import evaluate
from nni_plugin.benchmarks.experiment import Experiment
from nni_plugin.benchmarks.grid import Grid
from nni_plugin.benchmarks.joint_removal import first
from nni_plugin.benchmarks.layerprune.presets import Numbers
from nni_plugin.budgets import Budget
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import count
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import BudgetError, DataError, NNIPluginError
from nni_plugin.latency import measure_pair
from nni_plugin.layer_planner import plan_layers
from nni_plugin.layers import Imprinting, LayerImportance
from nni_plugin.layers.candidates import candidate_blocks
from nni_plugin.layers.methods import LAYER_METHODS, create_layer_importance
from nni_plugin.machine import describe_machine, usable_device
from nni_plugin.methods import create_criterion
from nni_plugin.networks.layers import initialise
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import plan_channels
from nni_plugin.schedules import Gradual, OneShot, Schedule

LATENCY_BATCH_SIZES = (1, 64)
TARGET_LENGTH = {"vgg19_bn": 512}
"""Length of Imprinting's embeddings, 2048 unless named: as in the authors' code."""

_MINIBATCH = 100  # images of a minibatch to score on
_FRESH = 10_000  # added to the seed of networks trained from scratch
_ROUNDS = 21  # of a latency: at batches of 64 a pass alone takes longer than a round should


class NotDoneError(NNIPluginError):
    """A run that is only to be read is not there."""


class DoneRuns(Grid):
    """A grid that runs nothing."""

    def run(
        self, name: str, work: Callable[[Path], Mapping[str, Any]], settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the result of a run that is done.

        Raises:
            NotDoneError: It is not.
        """
        if not self.done(name):
            raise NotDoneError(f"{self.folder / name} is not done.")
        return super().run(name, work, settings)


class KnownScores(LayerImportance):
    """Scores of blocks that were measured before.

    Args:
        scores: By the block's name.
    """

    needs_batches = False

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = dict(scores)

    def _score(self, *_: Any, **__: Any) -> dict[str, float]:
        return self.scores


class Study(Experiment):
    """One network: its rankings and plans, and what becomes of it.

    Args:
        numbers: The numbers; of the dense networks' training only `base`, for they see all training images.
        folder: For the runs.
        dense: For the dense networks.
        network: Of `presets.DENSE`.
        data_dir: Folder of the data; None for the usual place, where there is one.
        device: "cpu", "cuda" ...; None takes the best there is.
        collect: Run nothing: what is not done raises `NotDoneError`.
    """

    def __init__(
        self,
        numbers: Numbers,
        folder: Path,
        dense: Path,
        network: str,
        *,
        data_dir: Path | None = None,
        device: str | None = None,
        collect: bool = False,
    ) -> None:
        place = str(usable_device(device))
        super().__init__(numbers, folder, data_dir=data_dir, device=place, network=network)
        whole = replace(numbers, images=None)
        self.numbers = numbers
        self.dense = Experiment(whole, dense, data_dir=data_dir, device=place, network=network)
        if collect:
            self.grid, self.dense.grid = (DoneRuns(g.folder, g.settings) for g in (self.grid, self.dense.grid))
        self._images: tuple[int, Images] | None = None

    def base(self, seed: int) -> dict[str, Any]:
        """Train and save the dense network of a seed, unless it is there; return its record."""
        return self.dense.base(seed)

    def saved(self, seed: int) -> Path:
        """Return the folder of the dense network of a seed."""
        return self.dense.saved(seed)

    # -- runs ---------------------------------------------------------------------------------------------

    def scores(self, method: str, seed: int) -> dict[str, float]:
        """Return the scores of all blocks of the dense network by their names, lower = leaves first."""

        def work(_: Path) -> dict[str, Any]:
            begun = time.perf_counter()
            scores = self.score(self.network_of(seed), method, seed)
            return {"scores": scores, "seconds": time.perf_counter() - begun}

        scores: dict[str, float] = self.grid.run(f"rankings/seed{seed}/{method}", work, self.seen())["scores"]
        return scores

    def plan(
        self,
        name: str,
        method: str,
        seed: int,
        budget: Budget,
        schedule: Gradual | OneShot | None = None,
        *,
        ignore: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Plan to a budget by a method for channels or for layers.

        Args:
            name: Of the run.
            method: For channels, or one of `LAYER_METHODS`.
            seed: Of the dense network.
            budget: What to meet.
            schedule: Steps on fresh scores; None: scored once.
            ignore: Layers whose channels stay.

        Returns:
            `plan` (its JSON) and `seconds`; or, where the budget cannot be met, the reason as `refused`.
        """
        if method in LAYER_METHODS and schedule is None:
            self.scores(method, seed)

        def work(_: Path) -> dict[str, Any]:
            model, begun = self.network_of(seed), time.perf_counter()
            try:
                plan = self._planned(model, method, seed, budget, schedule or OneShot(), ignore)
            except BudgetError as error:
                return {"refused": str(error)}
            return {"plan": json.loads(plan.to_json()), "seconds": time.perf_counter() - begun}

        asked = {"method": method, "budget": repr(budget), "schedule": repr(schedule), "ignore": list(ignore)}
        return self.grid.run(f"plans/seed{seed}/{name}", work, {**asked, **self.seen()})

    def outcome(self, plan: PruningPlan, seed: int) -> dict[str, Any]:
        """Return costs, latencies and accuracies of the dense network after a plan; one run each for two parts.

        `top1_before` is taken with statistics of batch normalisations estimated anew, `top1` after fine-tuning.
        """
        before = self.grid.run(
            f"pruned/seed{seed}/{plan.digest[:16]}", lambda _: self.measured(self.pruned(plan, seed), seed), self.seen()
        )
        config = replace(self.preset.finetune, seed=seed)
        after = self.grid.run(
            f"finetuned/seed{seed}/{plan.digest[:16]}",
            lambda state: self.train(self.pruned(plan, seed), seed, state),
            {"finetune": asdict(config)},
        )
        return {**before, "top1": after["top1"], "images": after["images"], "seconds": after["seconds"]["training"]}

    def from_scratch(self, plan: PruningPlan, seed: int) -> dict[str, Any]:
        """Train what a plan leaves from fresh weights, on the images and by the settings of the dense network."""

        def work(state: Path) -> dict[str, Any]:
            model = plan.apply(self.dense.fresh(seed), self._examples(seed))
            torch.manual_seed(seed + _FRESH)
            initialise(model)  # anew: the dense network began with the weights of this seed
            record = self.dense._train(model, replace(self.preset.base, seed=seed), seed, state)
            return {**record, "machine": describe_machine()}

        return self.grid.run(f"scratch/seed{seed}/{plan.digest[:16]}", work)

    # -- parts --------------------------------------------------------------------------------------------

    @cached_property
    def place(self) -> torch.device:
        """Where everything runs."""
        return torch.device(self.device or "cpu")

    def seen(self) -> dict[str, Any]:
        """Return how many images scores are from, for the settings of a run."""
        return {"score_images": self.numbers.score_images, "held_out_images": self.numbers.held_out_images}

    def network_of(self, seed: int) -> nn.Module:
        """Return the dense network of a seed, as it is used; trained if it is not there."""
        self.base(seed)
        return self.trained_base(seed).to(self.place).eval()

    def pruned(self, plan: PruningPlan, seed: int) -> nn.Module:
        """Return the dense network after a plan."""
        model = self.network_of(seed)
        if plan.removed_blocks or plan.channels_removed:
            plan.apply(model, self.images(seed).example)
        return model

    def images(self, seed: int) -> Images:
        """Return the images of a seed on the device."""
        if self._images is None or self._images[0] != seed:
            self._images = seed, Images.of(self, seed)
        return self._images[1]

    def score(self, model: nn.Module, method: str, seed: int) -> dict[str, float]:
        """Score the blocks that may leave a network."""
        images = self.images(seed)
        blocks = candidate_blocks(model, images.example)
        given = (images.score, cross_entropy, images.held_out)
        torch.manual_seed(seed)
        return self.importance(method, seed).score(model, images.example, blocks, *given)

    def importance(self, method: str, seed: int) -> LayerImportance:
        """Build the importance of a method, Imprinting as in the authors' code for this network."""
        if method == "imprinting":
            return Imprinting(TARGET_LENGTH.get(self.network, 2048))
        return create_layer_importance(method, seed)

    def train(self, model: nn.Module, seed: int, state: Path) -> dict[str, Any]:
        """Fine-tune a network in place; return accuracy, way and cost."""
        record = self._train(model, replace(self.preset.finetune, seed=seed), seed, state)
        return {**record, "machine": describe_machine()}

    def settled_top1(self, model: nn.Module, seed: int) -> float:
        """Return the test accuracy of a network, its statistics of batch normalisations estimated anew on a copy."""
        settled = copy.deepcopy(model)
        reestimate_batchnorm(settled, self.images(seed).score, cross_entropy)
        return evaluate(settled, self.data(seed).test, self.place)["top1"]

    def measured(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Measure a pruned network that has not been trained: costs, latencies beside the dense one, accuracy."""
        images, dense = self.images(seed), self.network_of(seed)
        before, after = count(dense, images.example), count(model, images.example)
        pairs = measure_pair(dense, model, images.shape, LATENCY_BATCH_SIZES, min_run_time=1.0, rounds=_ROUNDS)
        return {
            "top1_before": self.settled_top1(model, seed),
            "macs": after.macs,
            "params": after.params,
            "macs_ratio": after.macs / before.macs,
            "params_ratio": after.params / before.params,
            "latency": {str(pair.second.batch_size): asdict(pair) for pair in pairs},
            "machine": describe_machine(),
        }

    def _planned(
        self, model: nn.Module, method: str, seed: int, budget: Budget, schedule: Schedule, ignore: Sequence[str]
    ) -> PruningPlan:
        images = self.images(seed)
        if method not in LAYER_METHODS:
            criterion = create_criterion(method, seed)
            again = isinstance(schedule, Gradual)
            return plan_channels(
                model,
                images.example,
                criterion,
                images.score,
                cross_entropy,
                budget,
                schedule=schedule,
                ignore=ignore,
                reestimate=again,
            )
        if isinstance(schedule, Gradual):
            given = {"held_out": images.held_out, "schedule": schedule, "reestimate": True}
            importance = self.importance(method, seed)
            return plan_layers(model, images.example, importance, images.score, budget, **given)  # type: ignore[arg-type]
        return plan_layers(model, images.example, KnownScores(self.scores(method, seed)), (), budget)


@dataclass(frozen=True)
class Images:
    """The training images that choices are made on, as minibatches on the device.

    Args:
        score: What criteria see, and statistics of batch normalisations are estimated on.
        held_out: What Imprinting's accuracies are measured on, none of `score`.
        example: Two images to trace and count with.
    """

    score: list[tuple[Tensor, Tensor]]
    held_out: list[tuple[Tensor, Tensor]]
    example: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image."""
        return self.example.shape[1], self.example.shape[2], self.example.shape[3]

    @classmethod
    def of(cls, study: Study, seed: int) -> Images:
        """Take the first images in the order of a seed.

        Raises:
            DataError: There are too few.
        """
        numbers = study.numbers
        wanted = numbers.score_images + numbers.held_out_images
        batches = first(study.data(seed).score, wanted)
        if sum(len(labels) for _, labels in batches) < wanted or numbers.score_images % _MINIBATCH:
            raise DataError(
                f"score_images={numbers.score_images} (in hundreds) and held_out_images={numbers.held_out_images} are "
                f"more than the training images of {numbers.dataset} in whole minibatches; take fewer."
            )
        placed = [(images.to(study.place), labels.to(study.place)) for images, labels in batches]
        split = numbers.score_images // _MINIBATCH
        return cls(placed[:split], placed[split:], placed[0][0][:2])
