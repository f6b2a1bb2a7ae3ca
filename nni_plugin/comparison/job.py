"""What a comparison asks for: methods by targets by seeds, each a cell of its own."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nni_plugin.adapters.hosts import criterion_of
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.budgets import Budget, Latency, MACs, Params
from nni_plugin.errors import BudgetError, ScheduleError
from nni_plugin.job import Job
from nni_plugin.job_plans import method_of
from nni_plugin.layers.methods import LAYER_METHODS
from nni_plugin.search_plans import SEARCHES

STORE, DENSE, CELLS = "comparison.sqlite", "dense", "cells"
"""In the output folder: the state of all cells, the dense network of each seed, a folder for each cell."""

SCORE_IMAGES = 2000
"""Training images that every method sees, unless the template says otherwise; a search over gates sees a tenth."""

_OURS_ALONE = (
    "score_steps", "search_steps", "search_kwargs", "round_to", "min_channels", "candidates", "select", "cost_aware",
    "divide_by_blocks", "stages", "isomorphic", "parts", "reconstruct",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One method at one target with one seed.

    Args:
        method: As `--method`.
        target: The budget, see :func:`target_of`.
        seed: Of data order, of what the method draws, and of the dense network it starts from.
    """

    method: str
    target: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.method.replace(':', '_')}-{self.target}-seed{self.seed}"


@dataclass(frozen=True)
class ComparisonJob:
    """What to compare, on what.

    Args:
        template: Network, data, training of the dense network (`pretrain`), fine-tuning and options of the methods;
            its method, budget, seed and output are replaced.
        methods: As `--method`: ours, and `tp:...` and `nni:...`, which run through their own library's pruner.
        budgets: Of one kind: MACs, parameters or latency.
        seeds: Each with a dense network of its own, trained from the template's weights.
        output: Folder for everything.
        processes: Cells at a time on this machine.
        storage: Address of the database as SQLAlchemy takes it; None: a SQLite file in the output folder.
    """

    template: Job
    methods: tuple[str, ...]
    budgets: tuple[Budget, ...]
    seeds: tuple[int, ...]
    output: Path
    processes: int = 1
    storage: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared.

        Raises:
            BudgetError: Nothing to compare, another kind of budget, or kinds mixed.
            CriterionError: An unknown method.
            ScheduleError: Pruning within fine-tuning, which built-in methods cannot do.
        """
        if not (self.methods and self.budgets and self.seeds):
            raise BudgetError(
                "Expected at least one method, one target and one seed; name them with --methods, "
                "--macs (or --params or --latency) and --seeds."
            )
        kinds = {type(budget) for budget in self.budgets}
        if len(kinds) > 1 or not kinds <= {MACs, Params, Latency}:
            raise BudgetError(f"Expected targets of one kind, MACs, Params or Latency, got {self.budgets}.")
        if self.template.schedule != "one-shot":
            raise ScheduleError(
                f"Expected --schedule one-shot, got {self.template.schedule}: all methods are fine-tuned alike after "
                "they have pruned, and those of other libraries cannot prune while they train."
            )
        for method in self.methods:
            method_of(replace(self.template, method=criterion_of(method)))

    def cells(self) -> list[Cell]:
        """Return every cell once; seeds change fastest, so that processes begin with different dense networks."""
        targets = [target_of(budget) for budget in self.budgets]
        found = (Cell(m, t, s) for t in targets for m in self.methods for s in self.seeds)
        return list(dict.fromkeys(found))

    def job_of(self, cell: Cell, dense: Path) -> Job:
        """Return a cell's job, which starts from a dense network's weights and trains it no further."""
        template, of_seed = self.template, self.dense_job(cell.seed)
        # Other libraries' pruners do not round; methods for whole layers refuse to be told.
        round_to = template.round_to if cell.method in LAYER_METHODS else template.round_to or 1
        few = math.ceil(SCORE_IMAGES / int(template.data_kwargs.get("batch_size", 128)))
        return replace(
            of_seed,
            method=cell.method,
            budget=next(budget for budget in self.budgets if target_of(budget) == cell.target),
            output=self.output / CELLS / cell.name,
            checkpoint=dense,
            pretrained=False,
            pretrain=TrainingConfig(epochs=0),
            score_batches=template.score_batches or (None if cell.method in SEARCHES else few),
            round_to=round_to,
        )

    def dense_job(self, seed: int) -> Job:
        """Return the job whose network, after `pretrain`, all cells of a seed start from."""
        template = self.template
        pretrain, finetune = replace(template.pretrain, seed=seed), replace(template.finetune, seed=seed)
        return replace(template, seed=seed, pretrain=pretrain, finetune=finetune)

    def settings(self) -> dict[str, Any]:
        """Return what all cells share, as JSON values; a run that adds cells must have the same."""
        shared = self.dense_job(0).settings()
        for name in ("method", "budget", "device"):
            del shared[name]
        return {**shared, "latency_batch_sizes": list(self.template.latency_batch_sizes)}

    def ours_alone(self) -> dict[str, Any]:
        """Return the options, other than their defaults, that no built-in method looks at."""
        default = Job(model="", output=Path(), budget=MACs(1.0))
        return {
            name: getattr(self.template, name)
            for name in _OURS_ALONE
            if getattr(self.template, name) != getattr(default, name)
        }


def target_of(budget: Budget) -> str:
    """Return how a budget is called in tables and folders.

    Example:
        >>> target_of(MACs(0.5))
        'macs=0.5'
    """
    kind = type(budget).__name__.lower()
    values = {name: value for name, value in asdict(budget).items() if value is not None}
    if "ms" in values:
        return f"{kind}={values['ms']:g}ms"
    return f"{kind}={values['ratio']:g}"


def to_json(cell: Cell) -> str:
    """Return a cell as text."""
    return json.dumps(asdict(cell))


def from_json(text: str) -> Cell:
    """Return the cell that a text stands for."""
    return Cell(**json.loads(text))
