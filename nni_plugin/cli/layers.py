"""`nni-plugin layers`: what every removable block of a network costs and is worth."""

from __future__ import annotations

from typing import Any

import jsonargparse

from nni_plugin.cli.arguments import above, add_common, add_data, add_model, data_kwargs, integers, names, number
from nni_plugin.cli.study import add_pretraining, check_installed, fields_of, pretraining, study

DESCRIPTION = "Measure every block that can be removed whole: latency, cost, importance by criterion, loss without it."


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `layers`."""
    add = parser.add_argument
    add_model(parser, required=True)
    add_data(parser)
    add(
        "--criteria",
        type=names,
        help="separated by commas: imprinting, layer-..., block-gate (LayerPrune's, and gates)",
    )
    add(
        "--candidates",
        type=str,
        choices=("outermost", "innermost", "all"),
        default="outermost",
        help="of blocks inside blocks, such as the branches of a transformer's, which to take",
    )
    add("--score-batches", type=above(1), help="minibatches that the criteria see (all training data once)")
    add(
        "--held-out", type=number, default=0.1, help="share of the training images that only accuracies are measured on"
    )
    add("--removal-images", type=above(0), default=1000, help="of these, images for the loss without each block")
    add("--latency-batch-sizes", type=integers, default=(1, 64), help="batch sizes to measure the latency at")
    add_pretraining(parser)
    add_common(parser, output_required=True)


def run(arguments: Any, command: str) -> None:
    """Run `layers`.

    Raises:
        NNIPluginError: Anything the user can mend.
    """
    check_installed("layers")
    # Accelerate and the training stack load only when they are needed.
    from rich.console import Console

    from nni_plugin.block_study.job import run_layers

    console = Console(highlight=False)
    record = study(arguments, command, "layers.json", run_layers, _job(arguments), console)
    if record is None:
        return
    console.print(_blocks(record))
    console.print(_criteria(record))
    where = f"{arguments.output}/importance.png and latency.png show the bars, layers.csv holds the numbers"
    console.print(where, markup=False, soft_wrap=True)


def _job(arguments: Any) -> Any:
    from nni_plugin.block_study.job import CRITERIA, LayersJob

    criteria = CRITERIA if arguments.criteria is None else tuple(dict.fromkeys(arguments.criteria))
    asked = {"criteria": criteria, "data_kwargs": data_kwargs(arguments), "pretrain": pretraining(arguments)}
    return LayersJob(**{**fields_of(LayersJob, arguments), **asked})


def _blocks(record: dict[str, Any]) -> Any:
    from rich.table import Table

    settings = record["settings"]
    table = Table(title=f"{settings['model']} on {settings['dataset']}: what each block costs")
    columns = {f"ms at {size}": f"latency_ms_{size}" for size in settings["latency_batch_sizes"]}
    columns |= {"M MACs": "macs_saved", "loss without": "loss_change", "points": "top1_change"}
    table.add_column("block", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in record["blocks"]:
        cells = {**row, "macs_saved": row["macs_saved"] / 1e6}
        table.add_row(row["block"], *(_number(cells[key]) for key in columns.values()))
    return table


def _criteria(record: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="which blocks leave first", caption="Spearman: with the change of the loss without each block")
    for heading in ("criterion", "first to leave"):
        table.add_column(heading)
    for heading in ("Spearman", "seconds"):
        table.add_column(heading, justify="right")
    for name, found in record["criteria"].items():
        first = sorted(record["blocks"], key=lambda row: row[f"{name}_rank"])[:3]
        agreement = record["spearman"][name].get("loss_change")
        table.add_row(name, " ".join(row["block"] for row in first), _number(agreement), _number(found["seconds"]))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
