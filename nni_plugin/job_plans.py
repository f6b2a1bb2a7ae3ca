"""The plan of a job that prunes before it trains: whatever the method, what comes out is a PruningPlan.

The network is as it was afterwards; applying the plan is the host's affair.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from nni_plugin.budgets import Channels, Layers
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import BudgetError, CriterionError, ScheduleError, SearchError
from nni_plugin.job import Job
from nni_plugin.layer_planner import check_reachable, plan_layers
from nni_plugin.layers import LayerImportance
from nni_plugin.layers.methods import LAYER_METHODS, create_layer_importance
from nni_plugin.methods import create_criterion, known_methods
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import run_without_training, unchanged
from nni_plugin.schedules import Gradual, OneShot
from nni_plugin.search_plans import SEARCHES, GateSearch, check_search, plan_by_search
from nni_plugin.width_and_depth import check_jointly, plan_jointly

_OF_CHANNELS = ("round_to", "min_channels", "select", "cost_aware", "divide_by_blocks", "stages", "isomorphic", "parts")
_OF_SEARCHES = ("search_steps", "search_kwargs")
_NOT_OF_SEARCHES = ("cost_aware", "divide_by_blocks", "stages", "score_steps", "isomorphic", "parts")
_NAMED = {*_OF_CHANNELS, *_OF_SEARCHES, *_NOT_OF_SEARCHES}
_DEFAULTS = {name: getattr(Job(model="", output=Path(), budget=Layers(1)), name) for name in _NAMED}


JOINT = "obs-joint"
"""Name of the method for channels and layers together."""


@dataclass(frozen=True)
class JointGates:
    """Stands for :func:`nni_plugin.plan_jointly`."""

    is_ranking = True
    """It orders what leaves, as `OBS` does for channels: on a few thousand images, with reconstruction afterwards."""


@dataclass(frozen=True)
class Planned:
    """A plan, and the seconds that scoring and planning took."""

    plan: PruningPlan
    seconds: dict[str, float]


def method_of(job: Job) -> Any:
    """Return what a job's method stands for: a criterion for channels, an importance of layers, or a way with gates.

    Raises:
        CriterionError: There is no such method.
    """
    if job.method == JOINT:
        return JointGates()
    if job.method in SEARCHES:
        return GateSearch(SEARCHES[job.method])
    if job.method in LAYER_METHODS:
        return create_layer_importance(job.method, job.seed)
    known = known_methods()
    if job.method not in known:
        names = [*known, *LAYER_METHODS, JOINT, *SEARCHES]
        close = difflib.get_close_matches(job.method, names, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(sorted(names))}."
        raise CriterionError(f"Unknown method {job.method!r}; {hint}")
    return create_criterion(job.method, job.seed)


def pruner_of(
    job: Job, model: nn.Module, examples: Tensor, criterion: Any, cut: Literal["end", "never"]
) -> ChannelPruner:
    """Return the pruner of a job for channels; its schedule is one shot."""
    return ChannelPruner(
        model,
        examples,
        criterion,
        job.budget,
        schedule=OneShot(),
        round_to=job.round_to,
        min_channels=job.min_channels,
        ignore=job.ignore,
        select=job.select or "all",
        cost_aware=job.cost_aware,
        divide_by_blocks=job.divide_by_blocks,
        stages=job.stages,
        isomorphic=job.isomorphic,
        parts=job.parts,
        cut=cut,
    )


def check_job(job: Job, method: Any, model: nn.Module, examples: Tensor) -> None:
    """Refuse what a job asks in vain, before hours of training.

    Raises:
        BudgetError: The budget is of another kind than the method, is out of reach, or is met already.
        DataError: A search is given a single minibatch.
        GraphError: Nothing in the network can have gates to be searched.
        ScheduleError: The method prunes before training, and the schedule is another.
        SearchError: An option of a search makes no sense, or the method is no search.
    """
    if isinstance(method, GateSearch):
        check_search(job, method, model, examples, [name for name in _NOT_OF_SEARCHES if _asked(job, name)])
        return
    for name in _OF_SEARCHES:
        if _asked(job, name):
            raise SearchError(f"--{name.replace('_', '-')} is for searches over gates: {', '.join(SEARCHES)}.")
    if isinstance(method, LayerImportance):
        if isinstance(job.budget, Channels):
            raise BudgetError(f"{job.method} removes whole layers: give --layers, --latency, --macs or --params.")
        _refuse_in_vain(job, _OF_CHANNELS)
        check_reachable(model, examples, job.budget, job.candidates, job.ignore)
        return
    if isinstance(method, JointGates):
        if isinstance(job.budget, (Channels, Layers)):
            raise BudgetError(f"{job.method} removes channels and layers: give --latency, --macs or --params.")
        _refuse_in_vain(job, ("select", "cost_aware", "divide_by_blocks", "stages", "isomorphic", "parts"))
        check_jointly(
            model,
            examples,
            job.budget,
            candidates=job.candidates,
            ignore=job.ignore,
            min_channels=job.min_channels,
            round_to=job.round_to,
        )
        return
    if isinstance(job.budget, Layers):
        raise BudgetError(f"{job.method} removes channels: give --macs, --params, --channels or --latency.")
    pruner = pruner_of(job, model, examples, method, "never")
    if _asked(job, "parts") and not any(group.part for group in pruner.groups):
        raise BudgetError(f"{job.model} has no such parts of a transformer that may shrink: leave --parts out.")
    dense = pruner.dense
    if job.budget.value(dense) <= job.budget.limit(dense):
        raise BudgetError(
            f"{job.budget} is met by the dense network already ({dense.cost}, {dense.channels} coupled channels): "
            "nothing would be removed. Ask for less."
        )


def _refuse_in_vain(job: Job, names: Sequence[str]) -> None:
    """Refuse what a method for layers does not look at."""
    if job.schedule != "one-shot":
        raise ScheduleError(f"{job.method} prunes before training: give --schedule one-shot (and --score-steps).")
    for name in names:
        if _asked(job, name):
            raise BudgetError(f"{job.method} does not look at --{name.replace('_', '-')}, which is for channels alone.")


def _asked(job: Job, name: str) -> bool:
    return bool(getattr(job, name) != _DEFAULTS[name])


def make_plan(
    job: Job, method: Any, model: nn.Module, examples: Tensor, batches: Iterable[Any], state: Path | None = None
) -> Planned:
    """Choose what to remove.

    Args:
        job: What is asked, of schedule `"one-shot"`.
        method: See :func:`method_of`.
        model: Left as it was.
        examples: Inputs to trace it with.
        batches: Minibatches to score on; for a search with a length.
        state: File of a search's state, see :func:`nni_plugin.search_plans.plan_by_search`; others need none.

    Raises:
        NNIPluginError: Anything the user can mend.
    """
    begun = time.perf_counter()
    if isinstance(method, LayerImportance):
        plan = plan_layers(
            model,
            examples,
            method,
            batches,
            job.budget,
            schedule=Gradual(job.score_steps) if job.score_steps else OneShot(),
            candidates=job.candidates,
            keep=job.ignore,
            reestimate=True,
        )
        return Planned(plan, {"score": time.perf_counter() - begun, "plan": 0.0})
    if isinstance(method, JointGates):
        plan = plan_jointly(
            model,
            examples,
            batches,
            cross_entropy,
            job.budget,  # type: ignore[arg-type]
            steps=job.score_steps or 5,
            candidates=job.candidates,
            ignore=job.ignore,
            min_channels=job.min_channels,
            round_to=job.round_to,
        )
        return Planned(plan, {"score": time.perf_counter() - begun, "plan": 0.0})
    if isinstance(method, GateSearch):
        plan, seconds = plan_by_search(job, method, model, examples, batches, state)
        return Planned(plan, {"score": seconds, "plan": 0.0})
    with unchanged(model):
        model.eval()
        pruner = pruner_of(job, model, examples, method, "never")
        # Where weights are solved anew afterwards, steps in between gain nothing, see docs/methods/obs.md.
        steps = job.score_steps or (10 if pruner.scorer.is_ranking and job.reconstruct is False else 1)
        pruner.schedule = OneShot() if steps == 1 else Gradual(steps)
        plan = run_without_training(pruner, batches, cross_entropy, reestimate=job.reestimate)
    planning = pruner.seconds["plan"]
    return Planned(plan, {"score": time.perf_counter() - begun - planning, "plan": planning})
