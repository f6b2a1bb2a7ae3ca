"""What a comparison asks for: methods by targets by seeds, each a cell of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nni_plugin.adapters.hosts import is_built_in
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.budgets import Budget, Latency, MACs, Params
from nni_plugin.errors import BudgetError
from nni_plugin.job import Job
from nni_plugin.job_plans import method_of

STORE, DENSE, CELLS = "comparison.sqlite", "dense", "cells"
"""In the output folder: the state of all cells, the dense network of each seed, a folder for each cell."""


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
        """
        if not (self.methods and self.budgets and self.seeds):
            raise BudgetError(
                "Expected at least one method, one target and one seed; name them with --methods, "
                "--macs (or --params or --latency) and --seeds."
            )
        kinds = {type(budget) for budget in self.budgets}
        if len(kinds) > 1 or not kinds <= {MACs, Params, Latency}:
            raise BudgetError(f"Expected targets of one kind, MACs, Params or Latency, got {self.budgets}.")
        for method in self.methods:
            method_of(replace(self.template, method=method))

    @property
    def address(self) -> str:
        """Address of the database."""
        return self.storage or f"sqlite:///{(self.output / STORE).resolve()}"

    def cells(self) -> list[Cell]:
        """Return every cell once; seeds change fastest, so that processes begin with different dense networks."""
        targets = [target_of(budget) for budget in self.budgets]
        found = (Cell(m, t, s) for t in targets for m in self.methods for s in self.seeds)
        return list(dict.fromkeys(found))

    def job_of(self, cell: Cell, dense: Path) -> Job:
        """Return a cell's job, which starts from a dense network's weights and trains it no further."""
        template = self.template
        return replace(
            template,
            method=cell.method,
            budget=next(budget for budget in self.budgets if target_of(budget) == cell.target),
            output=self.output / CELLS / cell.name,
            checkpoint=dense,
            pretrained=False,
            pretrain=TrainingConfig(epochs=0),
            finetune=replace(template.finetune, seed=cell.seed),
            seed=cell.seed,
        )

    def dense_job(self, seed: int) -> Job:
        """Return the job whose network, after `pretrain`, all cells of a seed start from."""
        return replace(self.template, seed=seed, pretrain=replace(self.template.pretrain, seed=seed))

    def settings(self) -> dict[str, Any]:
        """Return what all cells share, as JSON values; a run that adds cells must have the same."""
        shared = self.dense_job(0).settings()
        for name in ("method", "budget"):
            del shared[name]
        return shared


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


def kinds(methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our methods and the built-in ones of other libraries."""
    return [m for m in methods if not is_built_in(m)], [m for m in methods if is_built_in(m)]


def to_json(cell: Cell) -> str:
    """Return a cell as text."""
    return json.dumps(asdict(cell))


def from_json(text: str) -> Cell:
    """Return the cell that a text stands for."""
    return Cell(**json.loads(text))
