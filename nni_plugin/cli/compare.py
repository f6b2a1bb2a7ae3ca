"""`nni-plugin compare`: methods side by side on one network, ours and those built into Torch-Pruning and NNI."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

import jsonargparse

from nni_plugin.budgets import Budget
from nni_plugin.cli.arguments import above, add_common, add_data, add_model, latencies, names, numbers, seeds
from nni_plugin.cli.prune import BUDGETS, add_options, job_of
from nni_plugin.errors import BudgetError, TrainingError

DESCRIPTION = "Compare methods: one dense network a seed, the same data, targets and fine-tuning for all."

_TARGETS = ("macs", "params", "latency")


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `compare`: those of `prune` but for the lists, and those of the grid."""
    add = parser.add_argument
    add_model(parser, required=True)
    add_data(parser)
    add("--methods", type=names, required=True, help="obs,taylor-fo,tp:magnitude,nni:l1,...: tp: and nni: as built in")
    add("--macs", type=numbers, help="fractions of the multiply-accumulates to keep, .75,.5,.25")
    add("--params", type=numbers, help="fractions of the parameters to keep")
    add("--latency", type=latencies, help="fractions of the measured latency to keep, or milliseconds (3.5ms)")
    add("--seeds", type=seeds, help="one dense network each (three, from --seed on)")
    add_options(parser, while_training=False, scored="2,000 images; nppm and its kin: a tenth of the training data")
    add("--processes", type=above(1), default=1, help="networks at a time on this machine")
    add("--storage", type=str, help="database for the state, as SQLAlchemy names it (a SQLite file in --output)")
    add("--resume", action="store_true", help="go on in --output, also with more methods, targets or seeds")
    add_common(parser, output_required=True)


def run(arguments: Any, command: str) -> None:
    """Run `compare`.

    Raises:
        NNIPluginError: Anything the user can mend.
    """
    needed = ("accelerate", "torchmetrics", "sklearn", "optuna")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise TrainingError(
            f'{", ".join(missing)} not installed; compare needs pip install "nni-plugin[train,compare]"'
        )
    from rich.console import Console

    from nni_plugin.comparison.job import ComparisonJob
    from nni_plugin.comparison.run import SETTINGS, run_comparison

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if arguments.resume and not (arguments.output / SETTINGS).is_file():
        say(f"{arguments.output} holds no comparison: there is nothing to resume, this one starts from the beginning.")
    budgets = _budgets_of(arguments)
    rows = run_comparison(
        ComparisonJob(
            template=job_of(arguments, budgets[0]),
            methods=arguments.methods,
            budgets=budgets,
            seeds=arguments.seeds or tuple(range(arguments.seed, arguments.seed + 3)),
            output=arguments.output,
            processes=arguments.processes,
            storage=arguments.storage,
        ),
        resume=arguments.resume,
        command=command,
        say=say,
    )
    if rows:
        console.print(_table(rows))
        say(f"{arguments.output}/report.html shows it")


def _budgets_of(arguments: Any) -> tuple[Budget, ...]:
    given = [flag for flag in _TARGETS if arguments[flag]]
    if len(given) != 1:
        raise argparse.ArgumentError(
            None, f"give targets of one kind, --macs, --params or --latency, got {' and '.join(given) or 'none'}"
        )
    try:
        return tuple(BUDGETS[given[0]](amount, arguments) for amount in arguments[given[0]])
    except BudgetError as error:
        raise argparse.ArgumentError(None, f"--{given[0]}: {str(error).rstrip('.')}") from error


def _table(rows: Any) -> Any:
    from rich.table import Table

    from nni_plugin.comparison.analysis import points

    table = Table(title=f"{rows[0].model} on {rows[0].dataset}")
    for heading in ("target", "method", "top-1 (%)", "before", "MACs", "latency", "s"):
        table.add_column(heading, justify="left" if heading in ("target", "method") else "right", overflow="fold")
    for point in points(rows):
        ratios = (point.macs_ratio, point.latency_ratio)
        table.add_row(
            point.target,
            point.method,
            str(point.top1),
            str(point.top1_before_finetune),
            *(f"{ratio.mean:.3f}" for ratio in ratios),
            f"{point.seconds.mean:.1f}",
        )
    return table
