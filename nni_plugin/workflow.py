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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nni_plugin.adapters.data import DataSplits, create_loaders
from nni_plugin.adapters.torch_pruning import Parity, apply_plan, verify
from nni_plugin.adapters.training import Callback, TrainingState, evaluate, fit
from nni_plugin.budgets import Budget, Channels, Latency, Layers, MACs
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.checkpoint import save_pretrained
from nni_plugin.compensation import anchor_batchnorm, reestimate_batchnorm
from nni_plugin.cost import count
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import OutputError, PlanError, SurgeryError
from nni_plugin.filter_norms import restore_filter_norms
from nni_plugin.job import Job, schedule_of
from nni_plugin.job_plans import Planned, check_job, make_plan, method_of, pruner_of
from nni_plugin.job_steps import FirstBatches, before_and_after, pretrain
from nni_plugin.machine import describe_machine, usable_device
from nni_plugin.network_job import is_untrained, network_of
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import run_without_training
from nni_plugin.reconstruction import reconstruct
from nni_plugin.report import Report, Target, latency_notes, write_report
from nni_plugin.schedules import OneShot
from nni_plugin.workspace import Workspace, workspace, write_file


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
    method = method_of(job)
    with workspace(job.output, job.settings(), resume=resume) as places:
        return _Run(job, method, places, resume, say, callbacks).run(command)


@dataclass(frozen=True)
class _Pruned:
    """A network pruned and fine-tuned: its plan, how far it was proven, top-1 in between, seconds, epochs."""

    plan: PruningPlan
    parity: Parity
    after_cut: float
    seconds: dict[str, float]
    history: list[dict[str, float]]


class _Run:
    """One run: its data, its network and where it writes."""

    def __init__(
        self,
        job: Job,
        method: Any,
        places: Workspace,
        resume: bool,
        say: Callable[[str], None],
        callbacks: Sequence[Callback],
    ) -> None:
        torch.manual_seed(job.seed)
        self.job, self.method, self.places, self.resume, self.say = job, method, places, resume, say
        self.callbacks = tuple(callbacks)
        self.splits: DataSplits = create_loaders(job.dataset, job.data_dir, seed=job.seed, **job.data_kwargs)
        self.device = usable_device(job.device)
        self.model, self.examples = network_of(job, self.splits, self.device)
        # Whatever the job asks in vain shows now, not after hours of training.
        check_job(job, method, self.model, self.examples)
        if job.schedule != "one-shot":
            schedule_of(job, self._steps(), self._pruner().dense.channels)

    def run(self, command: str) -> Result:
        """Do the job and write its results."""
        self.say(self.splits.describe())
        history = pretrain(
            self.model, self.splits, self.job.pretrain, self.device, self.places.state, resume=self.resume
        )
        self.dense = dense = copy.deepcopy(self.model)
        baseline = self._top1()
        self.say(f"dense: top-1 {baseline:.2f} %, {count(self.model, self.examples)}")

        done = (self._prune_then_train if self.job.schedule == "one-shot" else self._prune_while_training)()
        plan, parity = done.plan, done.parity
        self.say(plan.explain())
        self.say(str(parity))

        metrics = {
            "method": self.job.method,
            "model": self.job.model,
            "library": self.job.library,
            "dataset": self.splits.name,
            "settings": self.job.settings(),  # for a later --resume to be held against
            "data_fingerprint": self.splits.fingerprint,
            "seed": self.job.seed,
            **before_and_after(dense, baseline, self.model, self.splits, self.device, self.job.latency_batch_sizes),
            "top1_before_finetune": done.after_cut,
            "parity_max_abs": parity.max_abs,
            "removed": {"channels": plan.channels_removed, "blocks": len(plan.removed_blocks)},
            "seconds": {name: round(value, 3) for name, value in done.seconds.items()},
            "machine": describe_machine(),
        }
        metrics["notes"] = latency_notes(metrics)
        for note in metrics["notes"]:
            self.say(note)
        results = self.places.results
        save_pretrained(self.model, results, plan=plan, example_input_shape=self.splits.input_shape)
        (results / "plan.json").write_text(plan.to_json() + "\n")
        (results / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        offset = history[-1]["step"] if history else 0
        rows = [{**row, "phase": "train"} for row in history]
        rows += [{**row, "phase": "prune and fine-tune", "step": row["step"] + offset} for row in done.history]
        write_report(results / "report.html", self._report(metrics, plan, rows, str(parity), command))
        return Result(self.model, plan, metrics)

    def _prune_then_train(self) -> _Pruned:
        planned = self._planned()
        plan, begun = self._with_provenance(planned.plan), time.perf_counter()
        parity = verify(self.model, plan, self.examples)
        if not parity.ok:
            raise SurgeryError(f"{parity}. Leave the layers at fault whole with --ignore.")
        apply_plan(self.model, plan, self.examples, check=False)
        seconds = {**planned.seconds, "surgery": time.perf_counter() - begun}
        if self.job.reestimate or plan.removed_blocks:
            reestimate_batchnorm(self.model, self._score_batches(), cross_entropy)
        if getattr(self.method, "is_ranking", False) if self.job.reconstruct is None else self.job.reconstruct:
            seconds["reconstruct"] = self._reconstruct()
        after_cut = self._top1()
        history = self._finetune(self.callbacks)
        seconds["finetune"] = sum(row["seconds"] for row in history)
        return _Pruned(plan, parity, after_cut, seconds, history)

    def _planned(self) -> Planned:
        """Return the plan: the one that the interrupted run had, for a time measured anew would give another."""
        file = self.places.state / "planned.json"
        if self.resume and file.is_file():
            try:
                stored = json.loads(file.read_text())
                return Planned(PruningPlan.from_json(stored["plan"]), dict(stored["seconds"]))
            except (ValueError, KeyError, TypeError, PlanError) as error:
                raise OutputError(
                    f"{str(file)!r} is damaged ({error}): remove it, and --resume does that part again."
                ) from error
        torch.manual_seed(self.job.seed)  # a resumed run has not drawn the random numbers of the training before
        search = self.places.state / "search.pt"
        planned = make_plan(self.job, self.method, self.model, self.examples, self._score_batches(), search)
        write_file(file, json.dumps({"plan": planned.plan.to_json(), "seconds": planned.seconds}))
        return planned

    def _reconstruct(self) -> float:
        """Solve each layer's weights anew, on about 2,000 training images; returns the seconds it took."""
        begun = time.perf_counter()
        batches = self._score_batches(self.job.score_batches or math.ceil(2000 / (self.splits.score.batch_size or 1)))
        reconstruct(self.model, self.dense, self.examples, batches, _run_on_images)
        anchor_batchnorm(self.model, batches, _run_on_images)
        restore_filter_norms(self.model, self.dense, self.examples)
        return time.perf_counter() - begun

    def _prune_while_training(self) -> _Pruned:
        pruner = self._pruner()
        pruner.schedule = schedule_of(self.job, self._steps(), pruner.dense.channels)
        watch = _Watch(pruner, self.splits.test)
        with pruner:
            history = self._finetune((pruner, watch, *self.callbacks))
        if not pruner.done:
            warnings.warn(
                f"{pruner.schedule} was not over after {self.job.finetune.epochs} epochs: the rest goes at once. "
                "Prune more often (--prune-every), more at once (--prune-channels), or train longer.",
                stacklevel=2,
            )
            self._prune_the_rest(pruner)
            watch.top1 = self._top1()
        assert pruner.parity is not None  # the budget is below the dense network's cost, so something was cut
        training = sum(row["seconds"] for row in history) - sum(pruner.seconds.values())
        seconds = {**pruner.seconds, "finetune": max(training, 0.0)}
        return _Pruned(self._with_provenance(pruner.plan()), pruner.parity, watch.top1, seconds, history)

    def _prune_the_rest(self, pruner: ChannelPruner) -> None:
        """Go to the budget in one step, on the network as it is used."""
        pruner.schedule, pruner.cut_when = OneShot(), "never"
        self.model.eval()
        torch.manual_seed(self.job.seed)
        run_without_training(pruner, self._score_batches(), cross_entropy)
        self.model.zero_grad(set_to_none=True)
        pruner.cut()

    def _steps(self) -> int:
        return self.job.finetune.epochs * len(self.splits.train)

    def _pruner(self) -> ChannelPruner:
        return pruner_of(self.job, self.model, self.examples, self.method, "end")

    def _finetune(self, callbacks: tuple[Any, ...]) -> list[dict[str, float]]:
        return fit(
            self.model,
            self.splits,
            self.job.finetune,
            callbacks=callbacks,
            checkpoint_dir=self.places.state,
            resume=self.resume,
            device=self.device,
            phase="finetune",
        )

    def _top1(self) -> float:
        return evaluate(self.model, self.splits.test, self.device)["top1"]

    def _score_batches(self, number: int | None = None) -> FirstBatches:
        number = number or self.job.score_batches
        if number is None and getattr(self.method, "is_ranking", False):
            number = math.ceil(2000 / (self.splits.score.batch_size or 1))
        return FirstBatches(self.splits.score, self.device, number)

    def _with_provenance(self, plan: PruningPlan) -> PruningPlan:
        data = {"name": self.splits.name, "fingerprint": self.splits.fingerprint}
        more = {"method": self.job.method, "seed": self.job.seed, "data": data}
        return replace(plan, provenance={**more, **plan.provenance})

    def _report(
        self, metrics: dict[str, Any], plan: PruningPlan, history: list[Any], parity: str, command: str
    ) -> Report:
        job = self.job
        return Report(
            title=f"{job.model} on {job.dataset}, pruned by {job.method}",
            metrics=metrics,
            command=command,
            history=history,
            widths=[
                (group.name, 0 if plan.leaves(group.name) else len(group.kept), group.total) for group in plan.groups
            ],
            removed_blocks=plan.removed_blocks,
            targets=[_target(job.budget, metrics, plan)],
            machine=metrics["machine"],
            parity=parity,
            load_code=f"import nni_plugin\n\nmodel = nni_plugin.from_pretrained({str(job.output)!r})",
            device=str(self.device),
            notes=[_UNTRAINED] if is_untrained(job) else [],
            macs_target=job.budget.ratio if isinstance(job.budget, MACs) else None,
        )


_UNTRAINED = "The network's weights were random: accuracies say nothing here."


def _run_on_images(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


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


def _target(budget: Budget, metrics: Mapping[str, Any], plan: PruningPlan) -> Target:
    """Return what was asked and what was reached, for the report."""
    before, after = metrics["baseline"], metrics["pruned"]
    if isinstance(budget, Layers):
        return Target("blocks removed", budget.count, None, len(plan.removed_blocks))
    if isinstance(budget, Latency):
        timing = plan.provenance["latency"]
        if budget.ms is not None:
            return Target("latency (ms)", budget.ms, None, timing["pruned"]["median_ms"])
        return Target("latency kept", budget.ratio, timing.get("predicted_ratio"), timing["ratio"])
    if isinstance(budget, Channels):
        whole = plan.channels_kept + plan.channels_removed if isinstance(budget.count, float) else 1
        return Target("coupled channels kept", budget.count, None, plan.channels_kept / whole)
    name, kind = ("macs", "MACs kept") if isinstance(budget, MACs) else ("params", "parameters kept")
    planned = None
    if plan.cost_before is not None and plan.cost_after is not None:
        planned = getattr(plan.cost_after, name) / getattr(plan.cost_before, name)
    return Target(kind, budget.ratio, planned, after[name] / before[name])
