"""`nni-plugin export`: a saved network as ONNX, torch.export or timm's files, kept only when it agrees with PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jsonargparse

from nni_plugin.cli.arguments import add_common, integers, number

DESCRIPTION = "Export a saved network to ONNX, torch.export or files that timm alone loads; check it against PyTorch."

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
"""Name of the file that each format becomes; those of timm's have the model's name."""


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `export`."""
    parser.add_argument("directory", type=Path, help="folder that `prune` wrote")
    parser.add_argument(
        "--format",
        type=str,
        choices=(*FILES, "timm"),
        default="onnx",
        help="what to write; timm: its pruned-text format",
    )
    parser.add_argument(
        "-b", "--batch-size", type=integers, default=(1, 4), help="batch sizes to check ONNX and torch.export at"
    )
    parser.add_argument("--tolerance", type=number, default=1e-4, help="largest relative difference (timm: always 0)")
    add_common(parser, output_required=False)


def run(arguments: Any, command: str) -> None:
    """Run `export`.

    Raises:
        NNIPluginError: The network cannot be loaded or exported, or the exported one gives other numbers.
    """
    import torch

    from nni_plugin.adapters.export import export_onnx, export_torch
    from nni_plugin.adapters.timm_format import export_timm
    from nni_plugin.checkpoint import from_pretrained, input_shape_of
    from nni_plugin.workspace import output_folder

    if arguments.tolerance < 0:
        raise argparse.ArgumentError(None, f"--tolerance: expected a number of at least 0, got {arguments.tolerance:g}")
    if arguments.device not in (None, "cpu"):
        raise argparse.ArgumentError(None, "--device: networks are exported and checked on the CPU, leave it out")
    torch.manual_seed(arguments.seed)
    model = from_pretrained(arguments.directory)
    shape = input_shape_of(arguments.directory)
    images = torch.randn(2, *shape)
    sizes, tolerance = arguments.batch_size, arguments.tolerance
    with output_folder(arguments.output or arguments.directory) as folder:
        if arguments.format == "timm":
            print(f"{folder}: {export_timm(model, images, folder)}")
        else:
            export = {"onnx": export_onnx, "torch-export": export_torch}[arguments.format]
            file = folder / FILES[arguments.format]
            parity = export(model, images, file, batch_sizes=sizes, tolerance=tolerance)
            print(f"{file}: {parity}")
