"""`nni-plugin export`: a saved network as ONNX or torch.export, kept only when it agrees with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonargparse

from nni_plugin.cli.arguments import add_common, integers, number

DESCRIPTION = "Export a saved network to ONNX or torch.export, and check it against PyTorch."

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
"""Name of the file that each format becomes."""


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `export`."""
    parser.add_argument("directory", type=Path, help="folder that `prune` wrote")
    parser.add_argument("--format", type=str, choices=tuple(FILES), default="onnx", help="what to write")
    parser.add_argument("-b", "--batch-size", type=integers, default=(1, 4), help="batch sizes to check at")
    parser.add_argument("--tolerance", type=number, default=1e-4, help="largest relative difference")
    add_common(parser, output_required=False)


def run(arguments: Any, command: str) -> None:
    """Run `export`.

    Raises:
        NNIPluginError: The network cannot be loaded or exported, or the exported one gives other numbers.
    """
    import torch

    from nni_plugin.adapters.export import export_onnx, export_torch
    from nni_plugin.checkpoint import from_pretrained, input_shape_of
    from nni_plugin.workspace import output_folder

    torch.manual_seed(arguments.seed)
    model = from_pretrained(arguments.directory)
    shape = input_shape_of(arguments.directory)
    export = {"onnx": export_onnx, "torch-export": export_torch}[arguments.format]
    with output_folder(arguments.output or arguments.directory) as folder:
        file = folder / FILES[arguments.format]
        parity = export(
            model,
            torch.randn(2, *shape),
            file,
            batch_sizes=arguments.batch_size,
            tolerance=arguments.tolerance,
        )
    print(f"{file}: {parity}")
