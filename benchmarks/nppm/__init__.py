"""Performance maximisation's experiments: searches as they go, what they find, and the choice of p.

Gao et al., "Network Pruning via Performance Maximization", CVPR 2021, and its supplement:

    p       Table 1: p for seven networks, computed and as printed
    search  Figures 1 and 2: test accuracy and loss during the search with the performance network, with gates alone and
            with linear regression, over several seeds; the loss of the performance network, and how well it ranks
            architectures that it has not seen
    tune    what the networks found are worth after the same fine-tuning, beside those of ordinary criteria
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from nni_plugin.benchmarks.grid import Grid, paired, summary
from nni_plugin.benchmarks.nppm.page import plot, render
from nni_plugin.benchmarks.nppm.presets import numbers_of, reduced
from nni_plugin.benchmarks.nppm.study import DENSE_ALIKE, Study, criterion_of, is_search
from nni_plugin.benchmarks.nppm.table1 import TABLE1, Entry, choice_of_p
from nni_plugin.errors import DataError
from nni_plugin.methods import create_criterion

__all__ = ["plot", "render", "run"]

SEARCHED = ("nppm", "differentiable-gates", "nppm-linear")
METHODS = (*SEARCHED, "magnitude", "magnitude:all", "taylor-fo", DENSE_ALIKE)
REFERENCES = ("differentiable-gates", "magnitude")
"""Whom the others are compared with, seed by seed."""

NOTES = (
    "Searches see one part of the training images, candidates are compared on another; test images are read for the "
    "curves and the accuracies shown alone. The authors' code chooses on the test images.",
    "The dense networks were trained on all training images, as in the paper, and are frozen during a search.",
    "Images of a search are not augmented; in the authors' code they are.",
    "As it is: gates that are as likely open as closed are open, whatever it costs. Within the budget: the same after "
    "repair, the network that would be pruned if the search ended there.",
    "Methods prune the hidden channels of blocks; those that end in ':all' residual ones too.",
    "Every fine-tuning sees the same images in the same order, and its last epoch counts.",
    "Rank correlations are over architectures that are not in the memory, of predicted and measured accuracy on images "
    "held out of the search. Near: drawn from the gates at the end. Any width: drawn without regard to them.",
)

_CURVE = ("top1", "loss", "macs_ratio", "top1_within", "loss_within")


def run(
    experiments: tuple[Literal["p", "search", "tune"], ...] = ("p", "search", "tune"),
    preset: Literal["reduced", "full"] = "reduced",
    dataset: str | None = None,
    data_dir: Path | None = None,
    networks: tuple[str, ...] = ("resnet20",),
    methods: tuple[str, ...] = METHODS,
    seeds: tuple[int, ...] | None = None,
    macs: float = 0.5,
    steps: int | None = None,
    folder: Path = Path("out/nppm"),
    dense: Path = Path("out/joint_removal"),
    device: str | None = None,
    collect: bool = False,
) -> dict[str, Any]:
    """Fill the grid of the experiments that are named, and return its summary; a killed call goes on.

    Args:
        experiments: Which ones.
        preset: `full` has the paper's numbers, `reduced` fewer; the result says which.
        dataset: `torch/cifar10`, `torch/fashion_mnist` ...; the preset's if not given.
        data_dir: Folder of the data; for Fashion-MNIST the environment variable FASHION_MNIST names it too.
        networks: Of `presets.DENSE`.
        methods: Searches, criteria (`:all` prunes residual groups too), and `dense` for the network fine-tuned alike;
            `search` takes the searches among them.
        seeds: Of the dense networks; as many as the preset says, from 0, if not given.
        macs: Fraction of the MACs kept.
        steps: Minibatches of a search; the preset's if not given.
        folder: For the runs.
        dense: For the dense networks; that of `joint_removal` has those of the reduced preset.
        device: cpu, cuda ...; the best there is if not given.
        collect: Run nothing, and sum up what is done.
    """
    for method in methods:
        if not is_search(method) and method != DENSE_ALIKE:
            create_criterion(criterion_of(method)[0])  # a wrong name is told before hours of work
    searches, tuned, settings = list[dict[str, Any]](), list[dict[str, Any]](), dict[str, Any]()
    for network in networks if {"search", "tune"} & set(experiments) else ():
        numbers = replace(numbers_of(preset, network, dataset), macs=macs)
        if steps is not None:
            numbers = replace(numbers, search={**numbers.search, "steps": steps})
        own = preset if preset == "reduced" and dataset is None else f"{preset}-{numbers.dataset.rpartition('/')[2]}"
        home = Path(dense) / network if own == "reduced" else Path(dense) / own / network
        study = Study(numbers, Path(folder) / own / network, home, network, data_dir=data_dir, device=device)
        settings[network] = {**asdict(numbers), "reductions": reduced(numbers)}
        for method in filter(is_search, methods):
            study.options(method, 0)  # likewise, steps that are too few
        for seed in seeds or range(numbers.seeds):
            for method in methods:
                who = {"network": network, "method": method, "seed": seed}
                if "search" in experiments and is_search(method):
                    searches += _done(collect, study, "search", who)
                if "tune" in experiments:
                    tuned += _done(collect, study, "tuned", who)
    table = [] if "p" not in experiments else _table1(Path(folder))
    if not (searches or tuned or table):
        raise DataError(f"Nothing is done below {folder}: run without --collect first.")
    return {
        "preset": preset,
        "settings": settings,
        "notes": list(NOTES),
        "p": table,
        "searches": [_search_cell(key, rows) for key, rows in _by_method(searches).items()],
        "tuned": _tuned_cells(_by_method(tuned)),
    }


def _done(
    collect: bool, study: Study, kind: Literal["search", "tuned"], who: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the record of a run, of now or of before; nothing for one that is only to be read and is not there."""
    method, seed = who["method"], who["seed"]
    if collect and not study.grid.done(study.name_of(kind, method, seed)):
        return []
    return [{**who, **getattr(study, kind)(method, seed)}]


def _table1(folder: Path) -> list[dict[str, Any]]:
    grid = Grid(folder / "p", {})

    def row(entry: Entry) -> dict[str, Any]:
        return grid.run(f"{entry.dataset}-{entry.network}", lambda _: choice_of_p(entry))

    return [row(entry) for entry in TABLE1]


def _by_method(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["method"]), []).append(row)
    return groups


def _search_cell(key: tuple[str, str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and deviation over the seeds of a search: the curve, and what it ends with."""
    curve = []
    for points in zip(*(row["curve"] for row in rows), strict=True):
        point: dict[str, Any] = {"step": points[0]["step"]}
        point |= {name: summary(p[name] for p in points) for name in _CURVE}
        learned = [p["search"].get("predictor_loss") for p in points]
        point["predictor_loss"] = summary(value for value in learned if value is not None)
        curve.append(point)
    kinds = dict.fromkeys(kind for row in rows for kind in row["quality"])
    quality = {
        kind: {
            name: summary(row["quality"][kind][name] for row in rows if row["quality"][kind][name] is not None)
            for name in ("spearman", "kendall", "mean_abs_error")
        }
        for kind in kinds
    }
    values = ("macs_ratio", "choice_top1", "choice_top1_pruned", "seconds", "p")
    return {
        "network": key[0],
        "method": key[1],
        "seeds": [row["seed"] for row in rows],
        "curve": curve,
        "quality": quality,
        "chosen": [row["choice"] for row in rows],
        **{name: summary(row[name] for row in rows) for name in values},
    }


def _tuned_cells(groups: Mapping[tuple[str, str], Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return mean, deviation and interval over the seeds of what is fine-tuned, and differences seed by seed."""
    by_seed = {key: {int(row["seed"]): float(row["top1"]) for row in rows} for key, rows in groups.items()}
    cells = []
    for (network, method), rows in groups.items():
        values = ("top1", "top1_before", "macs_ratio", "params_ratio")
        mine = by_seed[network, method]
        cells.append(
            {
                "network": network,
                "method": method,
                "seeds": [row["seed"] for row in rows],
                **{name: summary(row[name] for row in rows) for name in values},
                "macs_ratios": [row["macs_ratio"] for row in rows],
                "minus": {
                    other: paired(mine, by_seed[network, other])
                    for other in REFERENCES
                    if other != method and (network, other) in by_seed
                },
                "widths": [row["widths"] for row in rows],
                "seconds": summary(row["seconds"]["all"] for row in rows),
            }
        )
    return cells
