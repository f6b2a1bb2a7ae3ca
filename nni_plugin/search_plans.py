"""The plan of a job whose method is a search over gates (Gao et al., CVPR 2021): its data, its options, its checkpoint.

The search takes a part of the training data and the choice among its candidates another; the test images have no part
in either. The state is saved as the search goes on, so a run that is killed and resumed makes the plan that it would
have made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nni_plugin.adapters.training.checkpoint import read_checkpoint, write_checkpoint
from nni_plugin.budgets import MACs, Params
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import BudgetError, DataError, ScheduleError, SearchError
from nni_plugin.job import Job
from nni_plugin.performance import PerformanceMaximization, PerformancePlanner, SearchOptions, StepRecord
from nni_plugin.performance.options import Mode
from nni_plugin.plan import PruningPlan
from nni_plugin.planner import unchanged

SEARCHES: dict[str, Mode] = {"nppm": "full", "differentiable-gates": "gates-only", "nppm-linear": "linear"}
"""What the names of the methods mean."""

SHARE, LEAST = 10, 5
"""One in so many minibatches of the training data is used where a job does not say how many, but at least so many."""

_HELD_OUT = 5
"""One in so many of these is held out of the search."""

_EVERY = 50
"""Steps between checkpoints."""

_FLAGS = {"mode": "--method", "steps": "--search-steps", "seed": "--seed", "select": "--select"}
"""Options that have a flag of their own."""


@dataclass(frozen=True)
class GateSearch:
    """Stands for :func:`nni_plugin.performance.plan_performance`.

    Args:
        mode: See `SearchOptions`.
    """

    mode: Mode


def options_of(job: Job, method: GateSearch) -> SearchOptions:
    """Return how a job's search goes.

    Raises:
        SearchError: An option is unknown, has a flag of its own, or a value that makes no sense.
    """
    known = {field.name: field.default for field in fields(SearchOptions)}
    for name, value in job.search_kwargs.items():
        if name in _FLAGS:
            raise SearchError(f"--search-kwargs: {name} is set by {_FLAGS[name]}.")
        if name not in known:
            close = get_close_matches(name, known, n=3) or sorted(known.keys() - _FLAGS.keys())
            raise SearchError(f"--search-kwargs: unknown option {name!r}; did you mean {', '.join(close)}?")
        kind = type(known[name])
        wanted = (int, float) if kind is float else (kind,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise SearchError(f"--search-kwargs: {name} is of type {kind.__name__}, got {value!r}.")
    own = {} if job.search_steps is None else {"steps": job.search_steps}
    return SearchOptions(
        **{**job.search_kwargs, **own, "mode": method.mode, "seed": job.seed, "select": job.select or "no-skip"}
    )


def check_search(job: Job, method: GateSearch, model: nn.Module, examples: Tensor, idle: Sequence[str]) -> None:
    """Refuse what a job asks of a search in vain, before hours of training.

    Args:
        job: What is asked.
        method: The search.
        model: Left as it was.
        examples: Inputs to trace it with.
        idle: Settings, not at their defaults, that a search does not look at.

    Raises:
        BudgetError: The budget is of another kind, is out of reach, or is met already; or a setting is asked in vain.
        DataError: One minibatch is too few.
        GraphError: Nothing in the network can have gates.
        ScheduleError: The schedule is not one-shot.
        SearchError: An option of the search makes no sense.
    """
    if not isinstance(job.budget, (MACs, Params)):
        raise BudgetError(f"{job.method} searches for a network of fewer MACs or parameters: give --macs or --params.")
    if job.schedule != "one-shot":
        raise ScheduleError(f"{job.method} searches before fine-tuning: give --schedule one-shot.")
    if idle:
        raise BudgetError(f"{job.method} does not look at --{idle[0].replace('_', '-')}, which is for criteria.")
    if job.score_batches == 1:
        raise DataError(f"{job.method} holds training data out of its search: give --score-batches 2 or more.")
    dense = _planner(job, method, model, examples).cost.dense
    if job.budget.value(dense) <= job.budget.limit(dense):
        raise BudgetError(
            f"{job.budget} is met by the dense network already ({dense.cost}): nothing would be removed. Ask for less."
        )


def plan_by_search(
    job: Job, method: GateSearch, model: nn.Module, examples: Tensor, batches: Any, state: Path | None = None
) -> tuple[PruningPlan, float]:
    """Search, and choose on data that the search has not seen.

    Args:
        job: What is asked.
        method: The search.
        model: Left as it was.
        examples: Inputs to trace it with.
        batches: Minibatches of the training data, the same ones each time, with a length.
        state: File of the search's state: gone on from where it is there, and written as the search goes on.

    Returns:
        The plan, and the seconds it took, those before a kill included.

    Raises:
        NNIPluginError: Anything the user can mend.
    """
    learn, held_out = split(batches, job.score_batches)
    clock = _Clock()
    with unchanged(model):
        planner = _planner(job, method, model, examples)
        settings = {"method": job.method}
        if state is not None and state.is_file():
            saved = read_checkpoint(state, settings)
            planner.search.load_state_dict(saved["search"])
            clock.before = saved["seconds"]

        def keep(search: PerformanceMaximization) -> None:
            if state is not None and (search.steps_done % _EVERY == 0 or search.done):
                write_checkpoint(state, settings, {"search": search.state_dict(), "seconds": clock.seconds})

        planner.search.run(learn, keep)
        plan = planner.plan(held_out)
    told = {"search": summary(planner.search.history), "minibatches": {"search": len(learn), "choice": len(held_out)}}
    return replace(plan, provenance={**plan.provenance, **told}), clock.seconds


def split(batches: Any, number: int | None) -> tuple[Part, Part]:
    """Return minibatches to search on and others to choose on, a fifth of all that are used.

    Args:
        batches: All there are, with a length.
        number: How many are used; None: a tenth, or five.

    Raises:
        DataError: There are fewer than two.
    """
    used = min(len(batches), number or max(LEAST, round(len(batches) / SHARE)))
    if used < 2:
        raise DataError(
            f"Expected 2 minibatches of training data or more, to search on and to choose on, got {used}; take a "
            "smaller --batch-size."
        )
    held = max(1, used // _HELD_OUT)
    return Part(batches, 0, used - held), Part(batches, used - held, used)


class Part:
    """Some minibatches in a row; can be gone through again.

    Args:
        batches: All of them.
        start: The first that belongs to it.
        stop: The first that no longer does.
    """

    def __init__(self, batches: Any, start: int, stop: int) -> None:
        self.batches, self.start, self.stop = batches, start, stop

    def __len__(self) -> int:
        """Count them."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[Any]:
        """Go through them from the first."""
        return islice(iter(self.batches), self.start, self.stop)


def summary(history: Sequence[StepRecord], share: int = 10) -> dict[str, float | None]:
    """Return means over the last steps of a search, one in `share`, by the names in its records.

    What was not there (a prediction, before there is a performance network that has learned) is None.
    """
    last = history[-max(1, len(history) // share) :]
    means: dict[str, float | None] = {}
    for field in fields(StepRecord):
        values = [value for record in last if not math.isnan(value := getattr(record, field.name))]
        means[field.name] = math.fsum(values) / len(values) if values else None
    return means


def _planner(job: Job, method: GateSearch, model: nn.Module, examples: Tensor) -> PerformancePlanner:
    return PerformancePlanner(
        model,
        examples,
        cross_entropy,
        job.budget,  # type: ignore[arg-type]
        options=options_of(job, method),
        round_to=job.round_to,
        min_channels=job.min_channels,
        ignore=job.ignore,
    )


class _Clock:
    """Counts seconds, on top of those of a run that was killed."""

    def __init__(self) -> None:
        self.before, self._begun = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """How many by now."""
        return self.before + time.perf_counter() - self._begun
