"""The page of the study of joint removal: one table a network."""

from __future__ import annotations

from typing import Any

from nni_plugin.benchmarks import earlier
from nni_plugin.benchmarks.grid import mean_and_sd
from nni_plugin.benchmarks.joint_removal.methods import REGIMES


def _column(column: tuple[str, str]) -> tuple[str, float, int]:
    """Order columns by what is budgeted, then from much kept to little."""
    target, regime = column
    kind = target.rstrip("0123456789.")
    return kind, -float(target.removeprefix(kind)), REGIMES.index(regime)


def render(result: dict[str, Any]) -> str:
    """Return the page: one table a network, test top-1 by method, mean and standard deviation over seeds."""
    settings, cells = result["settings"], result["cells"]
    text = [
        "# Accuracy after removing channels together, without fine-tuning",
        "",
        f"Test top-1 in percent on {settings['test_images']} images of Fashion-MNIST; every method sees the same "
        f"{settings['images']} training images. Mean and standard deviation over seeds, each a dense network of "
        "its own; a number without deviation is of one seed. *macs0.5*: half the MACs kept; *channels0.5*: half the "
        "coupled channels. Every criterion ranks in the same planner, those of Torch-Pruning (`tp:`) too; its own "
        "pruners run in [the comparison](comparison.md). *one-shot*: scored and cut once. *reconstructed*: the same "
        "plan, then the weights of each layer solved anew by least squares, for all methods alike. *gradual*: ten "
        "steps, scores and statistics of batch normalisation fresh in each.",
        *earlier.lines(result),
    ]
    for network in dict.fromkeys(cell["network"] for cell in cells):
        rows = [cell for cell in cells if cell["network"] == network]
        columns = sorted({(cell["target"], cell["regime"]) for cell in rows}, key=_column)
        by_method: dict[str, dict[tuple[str, str], Any]] = {}
        for cell in rows:
            by_method.setdefault(cell["method"], {})[cell["target"], cell["regime"]] = cell["top1"]
        dense, seeds = rows[0]["top1_dense"], max((cell["seeds"] for cell in rows), key=len)
        training = settings["dense"][network]
        of_size = f" at {training['img_size']} x {training['img_size']}" if training["img_size"] else ""
        text += [
            "",
            f"## {network}",
            "",
            f"Dense, {training['epochs']} epoch{'s' * (training['epochs'] != 1)}{of_size}: {mean_and_sd(dense)}; seeds "
            f"{', '.join(map(str, seeds))}.",
            "",
        ]
        text.append("| method | " + " | ".join(f"{target}, {regime}" for target, regime in columns) + " |")
        text.append("|---" * (len(columns) + 1) + "|")
        for method, found in by_method.items():
            values = [mean_and_sd(found[column]) if column in found else "-" for column in columns]
            text.append(f"| `{method}` | " + " | ".join(values) + " |")
    return "\n".join(text) + "\n"
