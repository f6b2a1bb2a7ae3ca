"""The main job from end to end: data and model, baseline, prune, fine-tune, verify, measure, save.

Everything is a function of the job: the same job on the same machine gives the same plan, also when it was
killed and resumed, because training goes on from its checkpoints and all else is computed again.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin.adapters.data import DataSplits, create_loaders
from nni_plugin.adapters.training import Callback, TrainingConfig, TrainingState, evaluate, fit
from nni_plugin.budgets import Budget, Channels, MACs, Params
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.checkpoint import save_pretrained
from nni_plugin.cost import count
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import BudgetError, TrainingError
from nni_plugin.job import Job, network_of, schedule_of
from nni_plugin.latency import measure_pair
from nni_plugin.machine import describe_machine, usable_device
from nni_plugin.methods import create_criterion
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import run_without_training
from nni_plugin.reconstruction import reconstruct
from nni_plugin.report import Report, Target, write_report
from nni_plugin.schedules import Gradual, OneShot
from nni_plugin.workspace import Workspace, workspace


@dataclass(frozen=True)
class Result:
    """What came out of a job: the network, its plan and the content of `metrics.json`."""

    model: nn.Module
    plan: PruningPlan
    metrics: dict[str, Any]


def run_job(
    job: Job,
    *,
    resume: bool = False,
    command: str = "",
    say: Callable[[str], None] = print,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Prune a network from end to end.

    Args:
        job: What to do.
        resume: Go on from the state that an interrupted run of the same job left in the output folder.
        command: The command that was run, for the report.
        say: Takes what a person should read, as it happens.
        callbacks: Follow fine-tuning.

    Returns:
        The pruned network, its plan, and the metrics as written.

    Raises:
        NNIPluginError: Anything the user can mend; nothing half-written is left in the output folder.
    """
    criterion = create_criterion(job.method, job.seed)
    with workspace(job.output, job.settings(), resume=resume) as places:
        return _Run(job, criterion, places, resume, say, callbacks).run(command)


class _Run:
    """One run: its data, its network and where it writes."""

    def __init__(
        self,
        job: Job,
        criterion: Any,
        places: Workspace,
        resume: bool,
        say: Callable[[str], None],
        callbacks: Sequence[Callback],
    ) -> None:
        torch.manual_seed(job.seed)
        self.job, self.criterion, self.places, self.resume, self.say = job, criterion, places, resume, say
        self.callbacks = tuple(callbacks)
        self.splits: DataSplits = create_loaders(job.dataset, job.data_dir, seed=job.seed, **job.data_kwargs)
        self.device = usable_device(job.device)
        self.model, self.examples = network_of(job, self.splits, self.device)
        # Whatever the job asks in vain shows now, not after hours of training.
        pruner = self._pruner("never")
        schedule_of(job, self._steps(), pruner.dense.channels)
        if job.budget.value(pruner.dense) <= job.budget.limit(pruner.dense):
            raise BudgetError(
                f"{job.budget} is met by the dense network already ({pruner.dense.cost}, {pruner.dense.channels} "
                "coupled channels): nothing would be removed. Ask for less."
            )

    def run(self, command: str) -> Result:
        """Do the job and write its results."""
        history = self._fit(self.job.pretrain, "pretrain")
        self.dense = dense = copy.deepcopy(self.model)
        baseline = self._top1()
        self.say(f"dense: top-1 {baseline:.2f} %, {count(self.model, self.examples)}")

        prune = self._prune_then_train if self.job.schedule == "one-shot" else self._prune_while_training
        pruner, after_cut, later = prune()
        within = 0.0 if self.job.schedule == "one-shot" else sum(pruner.seconds.values())
        seconds = {**pruner.seconds, "finetune": max(sum(row["seconds"] for row in later) - within, 0.0)}
        plan, parity = self._with_provenance(pruner.plan()), pruner.parity
        assert parity is not None  # the budget is below the dense network's cost, so something was cut
        self.say(plan.explain())
        self.say(str(parity))

        metrics = {
            "method": self.job.method,
            "model": self.job.model,
            "library": self.job.library,
            "dataset": self.splits.name,
            "data_fingerprint": self.splits.fingerprint,
            "seed": self.job.seed,
            **self._before_after(dense, baseline),
            "top1_before_finetune": after_cut,
            "parity_max_abs": parity.max_abs,
            "removed": {"channels": plan.channels_removed, "blocks": len(plan.removed_blocks)},
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "machine": describe_machine(),
        }
        results = self.places.results
        save_pretrained(self.model, results, plan=plan, example_input_shape=self.splits.input_shape)
        (results / "plan.json").write_text(plan.to_json() + "\n")
        (results / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        offset = history[-1]["step"] if history else 0
        rows = [{**row, "phase": "train"} for row in history]
        rows += [{**row, "phase": "prune and fine-tune", "step": row["step"] + offset} for row in later]
        write_report(results / "report.html", self._report(metrics, plan, rows, str(parity), command))
        return Result(self.model, plan, metrics)

    def _prune_then_train(self) -> tuple[ChannelPruner, float, list[dict[str, float]]]:
        pruner = self._pruner("never")
        steps = self.job.score_steps or (10 if pruner.scorer.is_ranking else 1)
        pruner.schedule = OneShot() if steps == 1 else Gradual(steps)
        self._score_and_cut(pruner)
        if pruner.scorer.is_ranking if self.job.reconstruct is None else self.job.reconstruct:
            self._reconstruct(pruner)
        after_cut = self._top1()
        return pruner, after_cut, self._fit(self.job.finetune, "finetune", self.callbacks)

    def _reconstruct(self, pruner: ChannelPruner) -> None:
        """Solve each layer's weights anew, on about 2,000 training images."""
        begun = time.perf_counter()
        batches = self._score_batches(self.job.score_batches or math.ceil(2000 / (self.splits.score.batch_size or 1)))
        reconstruct(self.model, self.dense, self.examples, batches, lambda model, batch: model(batch[0]))
        pruner.seconds["reconstruct"] = time.perf_counter() - begun

    def _score_and_cut(self, pruner: ChannelPruner) -> None:
        """Prune to the budget in one step, on the network as it is used."""
        self.model.eval()
        # A resumed run has not drawn the random numbers of the training before.
        torch.manual_seed(self.job.seed)
        begun, before = time.perf_counter(), dict(pruner.seconds)
        run_without_training(pruner, self._score_batches(), cross_entropy, reestimate=self.job.reestimate)
        self.model.zero_grad(set_to_none=True)
        planning = pruner.seconds["plan"] - before["plan"]
        pruner.seconds["score"] = before["score"] + time.perf_counter() - begun - planning
        pruner.cut()

    def _prune_while_training(self) -> tuple[ChannelPruner, float, list[dict[str, float]]]:
        pruner = self._pruner("end")
        pruner.schedule = schedule_of(self.job, self._steps(), pruner.dense.channels)
        watch = _Watch(pruner, self.splits.test)
        with pruner:
            history = self._fit(self.job.finetune, "finetune", (pruner, watch, *self.callbacks))
        if not pruner.done:
            warnings.warn(
                f"{pruner.schedule} was not over after {self.job.finetune.epochs} epochs: the rest goes at once. "
                "Prune more often (--prune-every), more at once (--prune-channels), or train longer.",
                stacklevel=2,
            )
            pruner.schedule, pruner.cut_when = OneShot(), "never"
            self._score_and_cut(pruner)
            watch.top1 = self._top1()
        return pruner, watch.top1, history

    def _steps(self) -> int:
        return self.job.finetune.epochs * len(self.splits.train)

    def _pruner(self, cut: Literal["end", "never"]) -> ChannelPruner:
        return ChannelPruner(
            self.model,
            self.examples,
            self.criterion,
            self.job.budget,
            schedule=OneShot(),
            round_to=self.job.round_to,
            min_channels=self.job.min_channels,
            ignore=self.job.ignore,
            select=self.job.select,
            cost_aware=self.job.cost_aware,
            divide_by_blocks=self.job.divide_by_blocks,
            stages=self.job.stages,
            cut=cut,
        )

    def _fit(self, config: TrainingConfig, phase: str, callbacks: tuple[Any, ...] = ()) -> list[dict[str, float]]:
        try:
            return fit(
                self.model,
                self.splits,
                config,
                callbacks=callbacks,
                checkpoint_dir=self.places.state,
                resume=self.resume,
                device=self.device,
                phase=phase,
            )
        except TrainingError as error:
            if phase == "pretrain":
                raise TrainingError(str(error).replace("--lr", "--pretrain-lr")) from error
            raise

    def _top1(self) -> float:
        return evaluate(self.model, self.splits.test, self.device)["top1"]

    def _score_batches(self, number: int | None = None) -> _FirstBatches:
        number = number or self.job.score_batches
        if number is None and getattr(self.criterion, "is_ranking", False):
            number = math.ceil(2000 / (self.splits.score.batch_size or 1))
        return _FirstBatches(self.splits.score, self.device, number)

    def _with_provenance(self, plan: PruningPlan) -> PruningPlan:
        data = {"name": self.splits.name, "fingerprint": self.splits.fingerprint}
        more = {"method": self.job.method, "seed": self.job.seed, "data": data}
        return replace(plan, provenance={**more, **plan.provenance})

    def _before_after(self, dense: nn.Module, baseline: float) -> dict[str, Any]:
        sizes = self.job.latency_batch_sizes
        pairs = measure_pair(dense, self.model, self.splits.input_shape, sizes)
        return {
            "baseline": {
                "top1": baseline,
                **asdict(count(dense, self.examples)),
                "latency_ms": {str(size): pair.first.median_ms for size, pair in zip(sizes, pairs, strict=True)},
            },
            "pruned": {
                "top1": self._top1(),
                **asdict(count(self.model, self.examples)),
                "latency_ms": {str(size): pair.second.median_ms for size, pair in zip(sizes, pairs, strict=True)},
            },
            "latency_ratio": {str(size): pair.ratio for size, pair in zip(sizes, pairs, strict=True)},
        }

    def _report(
        self, metrics: dict[str, Any], plan: PruningPlan, history: list[Any], parity: str, command: str
    ) -> Report:
        job, (asked, kind) = self.job, _asked(self.job.budget)
        before, after = metrics["baseline"], metrics["pruned"]
        reached = {
            "MACs kept": after["macs"] / before["macs"],
            "parameters kept": after["params"] / before["params"],
            "coupled channels kept": plan.channels_kept,
        }[kind]
        if isinstance(asked, float) and kind == "coupled channels kept":
            reached /= plan.channels_kept + plan.channels_removed
        return Report(
            title=f"{job.model} on {job.dataset}, pruned by {job.method}",
            metrics=metrics,
            command=command,
            history=history,
            widths=[(group.name, len(group.kept), group.total) for group in plan.groups],
            targets=[Target(kind, asked, None, reached)],
            machine=metrics["machine"],
            parity=parity,
            load_code=f"import nni_plugin\n\nmodel = nni_plugin.from_pretrained({str(job.output)!r})",
            device=str(self.device),
            macs_target=asked if isinstance(job.budget, MACs) else None,
        )


class _Watch(Callback):
    """Evaluates the network at the moment it has been cut."""

    def __init__(self, pruner: ChannelPruner, loader: Any) -> None:
        self.pruner, self.loader, self.top1 = pruner, loader, math.nan
        self.device: Any = None

    def on_train_begin(self, state: TrainingState) -> None:
        """Note where the network runs."""
        self.device = state.accelerator.device

    def on_step(self) -> None:
        """Evaluate once pruning is over."""
        if self.pruner.done and math.isnan(self.top1):
            self.top1 = evaluate(self.pruner.model, self.loader, self.device)["top1"]

    def state_dict(self) -> dict[str, Any]:
        """Return the accuracy."""
        return {"top1": self.top1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the accuracy back."""
        self.top1 = float(state["top1"])


class _FirstBatches:
    """The first batches of a loader, on a device; can be gone through again."""

    def __init__(self, loader: Any, device: torch.device, batches: int | None) -> None:
        self.loader, self.device, self.batches = loader, device, batches

    def __len__(self) -> int:
        return min(len(self.loader), self.batches or len(self.loader))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in islice(self.loader, self.batches):
            yield images.to(self.device), labels.to(self.device)


def _asked(budget: Budget) -> tuple[float, str]:
    if isinstance(budget, Channels):
        return budget.count, "coupled channels kept"
    return budget.ratio, {MACs: "MACs kept", Params: "parameters kept"}[type(budget)]
