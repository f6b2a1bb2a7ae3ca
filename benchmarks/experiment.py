"""Prune-and-fine-tune experiments on ResNet-20: base network, pruned network, the same widths from scratch.

What the benchmarks on one network share. A preset holds every number; a grid keeps every run; a base network is
trained once a seed and saved, whichever benchmark asks first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nni_plugin.adapters.data import DataSplits, create_loaders
from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.training import TrainingConfig, fit
from nni_plugin.benchmarks.fashion_mnist import DATA_DIR
from nni_plugin.benchmarks.grid import Grid
from nni_plugin.benchmarks.presets import PRESETS, Preset
from nni_plugin.benchmarks.progress import LastMinibatchScorer, Progress
from nni_plugin.budgets import Channels
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.checkpoint import from_pretrained, save_pretrained
from nni_plugin.cost import count
from nni_plugin.criteria import Criterion
from nni_plugin.errors import DataError, ScheduleError
from nni_plugin.methods import create_criterion
from nni_plugin.networks.layers import initialise
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.schedules import Continuous, Iterative, Schedule

_FRESH = 10_000  # added to the seed of networks trained from scratch, so that none begins as a base network did


class Experiment:
    """Runs of one preset in one folder.

    Args:
        preset: The numbers.
        folder: For the runs and the base networks; benchmarks of the same preset may share it.
        data_dir: Folder of the data; None for the usual place, where there is one.
        device: "cpu", "cuda" ...; None takes the best there is.
        network: One of `nni_plugin.networks.NETWORKS`.
    """

    def __init__(
        self,
        preset: Preset,
        folder: Path,
        *,
        data_dir: Path | None = None,
        device: str | None = None,
        network: str = "resnet20",
    ) -> None:
        self.preset, self.folder, self.device, self.network = preset, Path(folder), device, network
        self.data_dir = DATA_DIR if data_dir is None and preset.dataset == "torch/fashion_mnist" else data_dir
        # What every run depends on; each adds its own. How many seeds there are decides no outcome.
        shared = {name: getattr(preset, name) for name in ("dataset", "images", "batch_size", "img_size")}
        self.grid = Grid(self.folder, {**shared, "network": network, "base": asdict(preset.base)})
        self._data: tuple[int, DataSplits] | None = None

    # -- what a benchmark asks for ------------------------------------------------------------------------

    def base(self, seed: int) -> dict[str, Any]:
        """Train and save the base network of a seed, unless it is there; return its record."""
        return self.grid.run(f"base/seed{seed}", lambda state: self._train_base(seed, state))

    def prune(
        self,
        name: str,
        seed: int,
        method: str,
        channels: int | float,
        schedule: Schedule,
        *,
        ignore: tuple[str, ...] = (),
        evaluate_every: int | None = None,
    ) -> dict[str, Any]:
        """Prune the base network of a seed while it is fine-tuned.

        Args:
            name: Of the run, see :class:`~nni_plugin.benchmarks.grid.Grid`.
            seed: Of the base network, the order of the data and random scores.
            method: See `nni_plugin.methods`.
            channels: Channels that stay, or their share.
            schedule: When to prune.
            ignore: Layers to leave whole.
            evaluate_every: Minibatches between two points of the record's curve; None for none.

        Returns:
            The record: `top1` in percent at the end and `top1_after_pruning`, right after the last step; `channels`
            left, `widths` by group, costs, `history`, `curve` and `seconds`; `over` says whether the target is reached,
            which a continuous schedule may not.
        """
        self.base(seed)
        settings = {
            "finetune": asdict(self.preset.finetune),
            "method": method,
            "target": channels,
            "schedule": repr(schedule),
            "ignore": list(ignore),
            "evaluate_every": evaluate_every,
        }
        work = _Prune(self, seed, method, channels, schedule, ignore, evaluate_every)
        return self.grid.run(name, work, settings)

    def scratch(self, name: str, seed: int, widths: Mapping[str, int]) -> dict[str, Any]:
        """Train a network of these widths from fresh weights, as long as base training and fine-tuning together."""
        settings = {"scratch": asdict(self.preset.scratch), "widths": dict(widths)}
        return self.grid.run(name, lambda state: self._train_scratch(seed, widths, state), settings)

    # -- parts --------------------------------------------------------------------------------------------

    def data(self, seed: int) -> DataSplits:
        """Open the data in the order, and with the share of training images, of a seed."""
        if self._data is None or self._data[0] != seed:
            self._data = seed, self._open(seed, 0.0)
            available = len(self._data[1].train.dataset)  # type: ignore[arg-type]
            wanted = self.preset.images
            if wanted is not None and wanted > available:
                raise DataError(f"The preset takes {wanted} training images, {self.preset.dataset} has {available}.")
            if wanted is not None and wanted < available:
                self._data = seed, self._open(seed, 1 - wanted / available)
        return self._data[1]

    def _open(self, seed: int, held_out: float) -> DataSplits:
        preset = self.preset
        return create_loaders(
            preset.dataset,
            self.data_dir,
            batch_size=preset.batch_size,
            img_size=preset.img_size,
            in_chans=3 if preset.dataset.startswith("torch/cifar") else 1,
            seed=seed,
            train_fraction_held_out=held_out,
        )

    def fresh(self, seed: int, widths: Mapping[str, int] | None = None) -> nn.Module:
        """Build a network with random weights: the dense one, or one of the widths given by group.

        Args:
            seed: Of the weights.
            widths: Channels of the groups that are narrower than in the dense network, by the group's root layer.
        """
        data = self.data(seed)
        torch.manual_seed(seed if widths is None else seed + _FRESH)
        model = create_model(self.network, "nni_plugin", num_classes=data.num_classes, in_chans=data.input_shape[0])
        if widths is not None:
            root = dict(model.named_modules())
            groups = [
                GroupPlan(group, int(root[group].out_channels), tuple(range(width))) for group, width in widths.items()
            ]
            PruningPlan(tuple(groups)).apply(model, self._examples(seed))
            initialise(model)  # drawn for the narrow layers, not a part of what was drawn for wide ones
        return model

    def trained_base(self, seed: int) -> nn.Module:
        """Load the base network of a seed, ready to be trained on."""
        return from_pretrained(self.saved(seed)).train()

    def steps(self, seed: int) -> int:
        """Minibatches of pruning and fine-tuning."""
        return self.preset.finetune.epochs * len(self.data(seed).train)

    def saved(self, seed: int) -> Path:
        """Return the folder of the base network of a seed."""
        return self.folder / "networks" / f"base-seed{seed}"

    def _examples(self, seed: int) -> torch.Tensor:
        return torch.zeros(2, *self.data(seed).input_shape)

    def _train_base(self, seed: int, state: Path) -> dict[str, Any]:
        model = self.fresh(seed)
        record = self._train(model, replace(self.preset.base, seed=seed), seed, state)
        save_pretrained(model, self.saved(seed), example_input_shape=self.data(seed).input_shape)
        return record

    def _train_scratch(self, seed: int, widths: Mapping[str, int], state: Path) -> dict[str, Any]:
        return self._train(self.fresh(seed, widths), replace(self.preset.scratch, seed=seed), seed, state)

    def _train(
        self, model: nn.Module, config: TrainingConfig, seed: int, state: Path, callbacks: tuple[Any, ...] = ()
    ) -> dict[str, Any]:
        """Train, going on from a checkpoint where there is one; return the end, the way and the cost."""
        data, begun = self.data(seed), time.perf_counter()
        history = fit(
            model,
            data,
            config,
            callbacks=callbacks,
            checkpoint_dir=state,
            resume=True,
            device=self.device,
            phase="train",
        )
        cost = count(model, self._examples(seed).to(next(model.parameters()).device))
        return {
            "top1": history[-1]["top1"],
            "macs": cost.macs,
            "params": cost.params,
            "data": data.fingerprint,
            "images": len(data.train.dataset),  # type: ignore[arg-type]
            "history": history,
            "seconds": {"all": time.perf_counter() - begun, "training": sum(row["seconds"] for row in history)},
        }


@dataclass(frozen=True)
class _Prune:
    """The work of one pruning run; its arguments are those of :meth:`Experiment.prune`."""

    experiment: Experiment
    seed: int
    method: str
    channels: int | float
    schedule: Schedule
    ignore: tuple[str, ...]
    evaluate_every: int | None

    def __call__(self, state: Path) -> dict[str, Any]:
        """Do the run."""
        experiment, seed = self.experiment, self.seed
        data, model = experiment.data(seed), experiment.trained_base(seed)
        if experiment.device is not None:
            model.to(experiment.device)
        criterion = create_criterion(self.method, seed)
        examples = experiment._examples(seed)
        pruner = ChannelPruner(
            model, examples, criterion, Channels(self.channels), schedule=self.schedule, ignore=self.ignore
        )
        self._check_length(pruner)
        if runs_network(criterion):
            pruner.scorer = LastMinibatchScorer(criterion)
        progress = Progress(pruner, data.test, self.evaluate_every)
        with pruner:
            config = replace(experiment.preset.finetune, seed=seed)
            record = experiment._train(model, config, seed, state, (pruner, progress))
        if not pruner.done and not isinstance(self.schedule, Continuous):
            raise ScheduleError(f"{self.schedule} left {pruner.size().channels} channels: {pruner.budget} is not met.")
        size = pruner.size()
        kept = pruner.plan().kept()
        return {
            **record,
            "macs": size.cost.macs,
            "params": size.cost.params,
            "macs_ratio": size.cost.macs / pruner.dense.cost.macs,
            "over": pruner.done,
            "top1_after_pruning": progress.after_pruning,
            "channels": size.channels,
            "channels_before": pruner.dense.channels,
            "widths": {name: len(index) for name, index in kept.items()},
            "steps": len(pruner.steps),
            "curve": progress.points,
            "seconds": {**record["seconds"], **pruner.seconds},
        }

    def _check_length(self, pruner: ChannelPruner) -> None:
        """Refuse a schedule that could not be over in time, before anything is trained."""
        dense, left = pruner.dense.channels, pruner.budget.limit(pruner.dense)
        schedule = self.schedule
        if isinstance(schedule, Iterative):
            steps_needed = math.ceil((dense - left) / schedule.channels)
        else:
            steps_needed = schedule.steps
        needed = steps_needed * (schedule.minibatches or 0)
        steps = self.experiment.steps(self.seed)
        if needed > steps:
            raise ScheduleError(
                f"{schedule} takes {needed} minibatches to get from {dense} to {left} channels, training "
                f"has {steps}: prune more often, more at once, or train longer."
            )


def runs_network(criterion: Any) -> bool:
    """Whether a criterion runs the network itself many times over (the Oracle), too dear for every minibatch."""
    return isinstance(criterion, Criterion) and criterion.needs_batch


def open_experiment(
    preset: str, dataset: str | None, data_dir: Path | None, folder: Path, device: str | None
) -> Experiment:
    """Open the experiment of a preset by name, in a folder of its own below `folder`.

    Args:
        preset: One of `PRESETS`.
        dataset: Another data set than the preset's; None for the preset's.
        data_dir: Folder of the data; None for the usual place, where there is one.
        folder: Of all experiments.
        device: "cpu", "cuda" ...; None takes the best there is.
    """
    numbers = PRESETS[preset] if dataset is None else replace(PRESETS[preset], dataset=dataset)
    place = Path(folder) / f"{preset}-{numbers.dataset.rpartition('/')[2]}"
    return Experiment(numbers, place, data_dir=data_dir, device=device)
