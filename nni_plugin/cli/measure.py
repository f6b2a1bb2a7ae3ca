"""`nni-plugin measure`: MACs, parameters, latency and throughput of a saved or named network."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from nni_plugin.cli.arguments import above, add_common, add_model, integers
from nni_plugin.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

DESCRIPTION = "Measure MACs, parameters, latency and throughput of a saved network, or of a model by name."

_BY_NAME = ("checkpoint", "pretrained", "model_kwargs", "num_classes", "in_chans", "img_size")


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `measure`."""
    parser.add_argument("directory", type=Path, nargs="?", help="folder that `prune` wrote")
    add_model(parser, required=False)
    parser.add_argument("--num-classes", type=above(1), help="outputs of a model given by name (10)")
    parser.add_argument("--in-chans", type=above(1), help="channels of its images (3)")
    parser.add_argument("--img-size", type=above(1), help="height and width of its images (224; of nni_plugin's 32)")
    parser.add_argument("-b", "--batch-size", type=integers, default=(1,), help="batch sizes, e.g. 1,16,256")
    add_common(parser, output_required=False)


def run(arguments: Any, command: str) -> None:
    """Run `measure`.

    Raises:
        NNIPluginError: The network cannot be loaded, built or run.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from nni_plugin.adapters.models import create_model
    from nni_plugin.checkpoint import from_pretrained, input_shape_of
    from nni_plugin.cost import count
    from nni_plugin.latency import measure_latency
    from nni_plugin.workspace import output_folder, write_file

    if (arguments.directory is None) == (arguments.model is None):
        raise argparse.ArgumentError(None, "give either a folder that `prune` wrote, or --model")
    torch.manual_seed(arguments.seed)
    if arguments.directory is not None:
        _refuse_in_vain(arguments)
        model, shape = from_pretrained(arguments.directory), input_shape_of(arguments.directory)
    else:
        size = arguments.img_size or (32 if arguments.library == "nni_plugin" else 224)
        shape = (arguments.in_chans or 3, size, size)
        model = create_model(
            arguments.model,
            arguments.library,
            num_classes=arguments.num_classes or 10,
            in_chans=shape[0],
            pretrained=arguments.pretrained,
            checkpoint=arguments.checkpoint,
            **arguments.model_kwargs,
        )
    if len(shape) != 3:
        raise ModelError(f"The network takes inputs of shape {shape}; only images (C, H, W) can be measured.")
    # Latency first: it says in plain words when the model does not take such images.
    latencies = measure_latency(model, shape, arguments.batch_size, device=arguments.device)
    cost, classes = count(model, torch.zeros(1, *shape)), _classes(model, torch.zeros(1, *shape))
    rows = [
        {
            "batch_size": latency.batch_size,
            "in_chans": shape[0],
            "height": shape[1],
            "width": shape[2],
            "num_classes": classes,
            "macs": cost.macs,
            "params": cost.params,
            "latency_median_ms": round(latency.median_ms, 4),
            "latency_iqr_ms": round(latency.iqr_ms, 4),
            "images_per_second": round(latency.images_per_second, 2),
            "device": latency.device,
            "dtype": latency.dtype,
            "threads": latency.threads,
        }
        for latency in latencies
    ]
    first = latencies[0]
    table = Table(
        title=f"{cost} per image of {' x '.join(map(str, shape))}" + (f", {classes} classes" if classes else ""),
        caption=f"{first.device}, {first.dtype}, threads: {first.threads}",
    )
    for heading in ("batch size", "median (ms)", "IQR (ms)", "images/s"):
        table.add_column(heading, justify="right")
    for latency in latencies:
        times = (f"{latency.median_ms:.4g}", f"{latency.iqr_ms:.2g}", f"{latency.images_per_second:.4g}")
        table.add_row(str(latency.batch_size), *times)
    Console().print(table)
    if arguments.output is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        with output_folder(arguments.output) as folder:
            write_file(folder / "measure.csv", text.getvalue())


def _refuse_in_vain(arguments: Any) -> None:
    """Refuse what a model by name alone would heed: a saved network has its own weights, images and classes.

    Raises:
        ArgumentError: The text names the flag.
    """
    given = [name for name in _BY_NAME if arguments[name] not in (None, False, {})]
    if arguments.library != "timm":
        given.append("library")
    if given:
        flag = given[0].replace("_", "-")
        raise argparse.ArgumentError(None, f"--{flag} belongs to --model: a folder that `prune` wrote has its own")


def _classes(model: nn.Module, images: Tensor) -> int | None:
    """Return how many scores a network gives for an image; None for one that gives something else."""
    import torch

    with torch.inference_mode():
        scores = model.eval()(images)
    return scores.shape[1] if isinstance(scores, torch.Tensor) and scores.ndim == 2 else None
