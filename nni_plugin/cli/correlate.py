"""`nni-plugin correlate`: how well every criterion ranks the channels of a network, judged by the Oracle."""

from __future__ import annotations

import math
from typing import Any

import jsonargparse

from nni_plugin.cli.arguments import above, add_common, add_data, add_model, data_kwargs, names
from nni_plugin.cli.study import add_pretraining, check_installed, fields_of, pretraining, study

DESCRIPTION = "Compare criteria with the Oracle: the rank correlation of their scores with the true change of the loss."


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `correlate`."""
    add = parser.add_argument
    add_model(parser, required=True)
    add_data(parser)
    add("--methods", type=names, help="criteria, separated by commas (all: ours, tp:... and nni:...)")
    add("--images", type=above(1), default=2000, help="training images that the criteria and the Oracle see")
    add("--held-out-images", type=above(0), default=1000, help="further images that the Oracle alone sees")
    add(
        "--held-out-from",
        type=str,
        choices=("train", "test"),
        default="train",
        help="whence: training images not trained on, or test images (for weights that have seen all the others)",
    )
    add("--channels-per-group", type=above(1), help="judge at most so many channels of each group, drawn (all)")
    add("--ignore", type=names, default=(), help="layers to leave whole, by name, separated by commas")
    add_pretraining(parser)
    add_common(parser, output_required=True)


def run(arguments: Any, command: str) -> None:
    """Run `correlate`.

    Raises:
        NNIPluginError: Anything the user can mend.
    """
    check_installed("correlate")
    # Accelerate and the training stack load only when they are needed.
    from rich.console import Console

    from nni_plugin.correlation_study.job import run_correlations

    console = Console(highlight=False)
    record = study(arguments, command, "correlations.json", run_correlations, _job(arguments), console)
    if record is None:
        return
    console.print(_table(record))
    console.print(f"{arguments.output}/correlations.png shows the ranks", markup=False, soft_wrap=True)


def _job(arguments: Any) -> Any:
    from nni_plugin.correlation_study.job import CorrelationJob

    asked = {"data_kwargs": data_kwargs(arguments), "pretrain": pretraining(arguments)}
    return CorrelationJob(**{**fields_of(CorrelationJob, arguments), **asked})


def _table(record: dict[str, Any]) -> Any:
    from rich.table import Table

    settings = record["settings"]
    table = Table(title=f"{settings['model']} on {settings['dataset']}: rank correlation with the Oracle")
    columns = {
        "criterion": None,
        "Spearman": "spearman",
        "per group": "spearman_per_group",
        "held out": "spearman_held_out",
        "Kendall": "kendall",
        "seconds": "seconds",
    }
    for heading, key in columns.items():
        table.add_column(heading, justify="left" if key is None else "right")
    best_first = sorted(record["criteria"].items(), key=lambda item: _or_least(item[1]["spearman"]), reverse=True)
    for method, row in best_first:
        cells = (row[key] for key in columns.values() if key is not None)
        table.add_row(method, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    return table


def _or_least(value: float | None) -> float:
    return -math.inf if value is None else value
