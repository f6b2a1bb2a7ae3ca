"""The comparison: our best method against the pruners built into Torch-Pruning and NNI, on four networks.

What `nni-plugin compare` does, on the dense networks that the other benchmarks have trained: the same training images
to score on, the same short fine-tuning, MACs at three targets, every built-in method through its own library's pruner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.training import evaluate
from nni_plugin.benchmarks import earlier
from nni_plugin.benchmarks.experiment import Experiment
from nni_plugin.benchmarks.figures import save
from nni_plugin.benchmarks.presets import DENSE
from nni_plugin.budgets import MACs
from nni_plugin.comparison.analysis import Difference, Mean, best_of_ours, differences, losses, points
from nni_plugin.comparison.cells import keep_dense
from nni_plugin.comparison.job import DENSE as DENSE_FOLDER
from nni_plugin.comparison.job import ComparisonJob
from nni_plugin.comparison.results import Row
from nni_plugin.comparison.run import finished_rows, run_comparison
from nni_plugin.errors import OutputError
from nni_plugin.job import Job
from nni_plugin.workspace import other_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS = ("obs", "taylor-fo", "tp:magnitude", "tp:taylor", "tp:group-norm", "nni:l1")


def run(
    networks: tuple[str, ...] = tuple(DENSE),
    methods: tuple[str, ...] = METHODS,
    macs: tuple[float, ...] = (0.5, 0.25, 0.75),
    seeds: tuple[int, ...] = (0, 1, 2),
    images: int = 15_000,
    epochs: int = 1,
    lr: float = 0.02,
    score_steps: int | None = None,
    processes: int = 1,
    folder: Path = Path("out/comparison"),
    dense: Path = Path("out/joint_removal"),
    data_dir: Path | None = None,
    device: str | None = None,
    gather: bool = False,
    onto: Path | None = None,
) -> dict[str, Any]:
    """Fill the grid, going on where it was; returns settings and every row.

    Args:
        networks: Of `nni_plugin.networks`.
        methods: As `--methods` of `nni-plugin compare`.
        macs: Fractions of MACs kept.
        seeds: Of the dense networks and of everything else.
        images: Training images to fine-tune on, drawn by the seed.
        epochs: Passes over them.
        lr: Highest learning rate of fine-tuning.
        score_steps: Steps of our one-shot planning on fresh scores; None: as each method has it.
        processes: Networks at a time.
        folder: For the comparisons, one a network.
        dense: Folder of the dense networks, shared with other benchmarks.
        data_dir: Folder of the data.
        device: Where to run.
        gather: Run nothing: sum up all cells of these networks that the folder holds.
        onto: An earlier result whose rows stay, with its other networks: for a folder that holds but some of its cells.
            Refused where the settings differ, or a seed's dense network has another top-1 there.
    """
    before = earlier.read(onto)
    rows: dict[str, list[Row]] = {}
    settings: dict[str, Any] = {}
    for network in networks:
        study = Experiment(DENSE[network], dense / network, data_dir=data_dir, device=device, network=network)
        wanted = _wanted(study, folder / network, methods, macs, seeds, images, epochs, lr, score_steps, processes)
        settings[network] = {**wanted.settings(), "dense": DENSE[network].training()}
        if gather:
            rows[network] = finished_rows(wanted.output)
            continue
        for seed in seeds:
            if not (wanted.output / DENSE_FOLDER / f"seed{seed}" / "config.json").is_file():
                _take_dense(study, wanted, seed)
        rows[network] = run_comparison(wanted, resume=True)
    if before is not None:
        rows, settings = _joined(before, rows, settings)
    return {
        "earlier": earlier.calls(before),
        "settings": {"images": images, "epochs": epochs, "lr": lr, "score_steps": score_steps, "networks": settings},
        "rows": {network: [asdict(row) for row in of] for network, of in rows.items()},
    }


def _joined(
    before: dict[str, Any], rows: dict[str, list[Row]], settings: dict[str, Any]
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Return the rows and settings of an earlier result with new ones in their places.

    Raises:
        OutputError: They do not belong together.
    """
    joined = {network: [Row(**row) for row in of] for network, of in before["rows"].items()}
    for network, found in rows.items():
        others = other_settings(before["settings"]["networks"].get(network, settings[network]), settings[network])
        others = [other for other in others if other.name != "data_dir"]
        if others:
            raise OutputError(f"The earlier result's {network} had other settings: {others[0].said}.")
        dense = {row.seed: row.top1_baseline for row in joined.get(network, [])}
        for row in found:
            if dense.setdefault(row.seed, row.top1_baseline) != row.top1_baseline:
                raise OutputError(
                    f"The dense {network} of seed {row.seed} has a top-1 of {row.top1_baseline} %, in the earlier "
                    f"result {dense[row.seed]} %: they are two networks."
                )
        cells = {(row.method, row.target, row.seed): row for row in [*joined.get(network, []), *found]}
        joined[network] = list(cells.values())
    return joined, {**before["settings"]["networks"], **settings}


def _wanted(
    study: Experiment,
    output: Path,
    methods: tuple[str, ...],
    macs: tuple[float, ...],
    seeds: tuple[int, ...],
    images: int,
    epochs: int,
    lr: float,
    score_steps: int | None,
    processes: int,
) -> ComparisonJob:
    preset = study.preset
    template = Job(
        model=study.network,
        library="nni_plugin",
        output=output,
        budget=MACs(macs[0]),
        dataset=preset.dataset,
        data_dir=study.data_dir,
        data_kwargs={
            "batch_size": preset.batch_size,
            "img_size": preset.img_size,
            "in_chans": 1,
            "train_fraction_held_out": 1 - images / 60_000,
        },
        model_kwargs={},
        score_steps=score_steps,
        finetune=replace(preset.base, epochs=epochs, lr=lr),
        latency_batch_sizes=(16,),
        device=study.device,
    )
    return ComparisonJob(template, methods, tuple(MACs(ratio) for ratio in macs), seeds, output, processes)


def _take_dense(study: Experiment, wanted: ComparisonJob, seed: int) -> None:
    """Train a seed's dense network, or take the one that is there."""
    study.base(seed)
    model, template = study.trained_base(seed), wanted.template
    splits = create_loaders(template.dataset, template.data_dir, seed=seed, **template.data_kwargs)
    top1 = evaluate(model, splits.test, torch.device("cpu"))["top1"]
    keep_dense(wanted, seed, model, top1, splits.input_shape)


def render(result: dict[str, Any]) -> str:
    """Return the page: by network a table for each target, and paired differences to the best built-in method."""
    settings = result["settings"]
    text = [
        "# Ours against the built-in pruners",
        "",
        f"Fashion-MNIST, test top-1 in percent on all 10,000 test images. Every method starts from the same dense "
        f"network of each seed, sees the same 2,000 training images, and is followed by the same fine-tuning: "
        f"{settings['epochs']} epoch{'s' * (settings['epochs'] != 1)} of {settings['images']:,} training images, "
        f"learning rate {settings['lr']:g}, cosine. `tp:` and `nni:` methods run through the pruners of their own "
        "libraries, held to the same MACs; MACs, parameters and latency (batch 16, timed in turns with the dense "
        "network) are counted on the slim network, as shares of the dense one's. Seconds are the method's own. Mean "
        "and standard deviation over seeds.",
        "",
        "Each of ours is held against the built-in method that leaves it the least ahead. Intervals are Student's, of "
        "differences paired by seed, and hold together for all of ours at a target.",
        "",
        "How OBS goes on after its cut (one step; after reconstruction normalisations anchored, and filters given "
        "back their lengths) was settled on these networks and test images after first runs of this table, so its "
        "rows are favoured by that. So are those of the built-in pruners: many were tried at half the MACs on one "
        "seed, Torch-Pruning's in up to three ways to rank (the whole network, as in its benchmark; `-isomorphic`: "
        "layers built alike; `-local`: each layer by itself), and the best of them run on the other seeds and "
        "targets. Where each layer is ranked by itself, all of one width lose a channel in the same step, so those "
        "networks end below the target (column MACs). Rows of OBS were run before the samples on which it chooses "
        "its damping stopped depending on the order of the data. A method that is not listed at a target was not "
        "run there. The figure has ours and, of the built-in ones, those that are the best of some network at some "
        "target.",
        *earlier.lines(result),
        "",
        summary(result),
    ]
    for network, rows in _rows(result).items():
        text += ["", f"## {network}"]
        dense = settings["networks"][network]["dense"]
        of_size = f" at {dense['img_size']} x {dense['img_size']}" if dense["img_size"] else ""
        top1 = {row.seed: row.top1_baseline for row in rows}
        shown = ", ".join(f"{value:.2f}" for _, value in sorted(top1.items()))
        text += ["", f"Dense{of_size}, seeds {', '.join(map(str, sorted(top1)))}: {shown}."]
        whole = on_all_seeds(rows)
        text += ["", *_table(whole)]
        text += ["", "| target | ours | against | points | interval | seeds | |", "|---|---|---|--:|--:|--:|---|"]
        text += [_line(difference) for difference in differences(whole)]
        lost = losses(whole)
        text += ["", *(f"- {line}" for line in lost)] if lost else []
        tried = _on_shared_seeds(rows)
        if tried:
            seeds = sorted({row.seed for row in tried})
            text += ["", f"### Every method that was tried, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"]
            text += ["", *_table(tried)]
    return "\n".join(text) + "\n"


def on_all_seeds(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of methods that were run on every seed of a target."""
    seeds: dict[tuple[str, str | None], set[int]] = {}
    for row in rows:
        for key in ((row.target, row.method), (row.target, None)):
            seeds.setdefault(key, set()).add(row.seed)
    return [row for row in rows if seeds[row.target, row.method] == seeds[row.target, None]]


def _on_shared_seeds(rows: Sequence[Row]) -> list[Row]:
    """Return all methods, on the seeds that all have, at the targets where some were not run on every seed."""
    found = []
    for target in dict.fromkeys(row.target for row in rows):
        there = [row for row in rows if row.target == target]
        if len(on_all_seeds(there)) < len(there):
            of_method: dict[str, set[int]] = {}
            for row in there:
                of_method.setdefault(row.method, set()).add(row.seed)
            shared = set.intersection(*of_method.values())
            found += [row for row in there if row.seed in shared]
    return found


def _table(rows: Sequence[Row]) -> list[str]:
    text = ["| target | method | top-1 | not fine-tuned | MACs | parameters | latency | s | seeds |"]
    text += ["|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for point in points(rows):
        ratios = " | ".join(f"{r.mean:.3f}" for r in (point.macs_ratio, point.params_ratio, point.latency_ratio))
        text.append(
            f"| {point.target} | `{point.method}` | {point.top1} | {point.top1_before_finetune} | {ratios} | "
            f"{point.seconds.mean:.0f} | {len(point.seeds)} |"
        )
    return text


def summary(result: dict[str, Any]) -> str:
    """Return a table of each network's dense top-1, and ours against the best built-in method at each target."""
    of_network = _rows(result)
    targets = sorted({row.target for rows in of_network.values() for row in rows}, key=_ratio, reverse=True)
    text = [
        f"| network | dense | {' | '.join(f'{_ratio(target):.0%} of MACs' for target in targets)} |",
        "|---|--:|" + "--:|" * len(targets),
    ]
    for network, rows in of_network.items():
        found, best = points(on_all_seeds(rows)), best_of_ours(on_all_seeds(rows))
        cells = []
        for target in targets:
            pair = (best[target].method, best[target].against) if target in best else ()
            both = [next(p for p in found if (p.target, p.method) == (target, method)) for method in pair]
            cells.append(" / ".join(f"{point.top1}" for point in both) or "-")
        dense = {row.seed: row.top1_baseline for row in rows}
        text.append(f"| `{network}` | {Mean.of(dense.values())} | {' | '.join(cells)} |")
    return "\n".join(text)


def _rows(result: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of each network that has some, targets from much kept to little."""
    found = {network: [Row(**row) for row in rows] for network, rows in result["rows"].items() if rows}
    return {network: sorted(rows, key=lambda row: (-_ratio(row.target), row.seed)) for network, rows in found.items()}


def _ratio(target: str) -> float:
    return float(target.partition("=")[2])


def _line(difference: Difference) -> str:
    interval = "-" if difference.interval is None else "{:+.2f} to {:+.2f}".format(*difference.interval)
    return (
        f"| {difference.target} | `{difference.method}` | `{difference.against}` | {difference.difference.mean:+.2f} | "
        f"{interval} | {difference.difference.count} | {difference.verdict} |"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy after fine-tuning against MACs, a panel a network."""
    from matplotlib.figure import Figure

    of_network = {network: on_all_seeds(rows) for network, rows in _rows(result).items()}
    figure = Figure(figsize=(4.2 * len(of_network), 3.6), layout="constrained")
    panels = figure.subplots(1, len(of_network), squeeze=False)[0]
    best = {
        method for rows in of_network.values() for d in best_of_ours(rows).values() for method in (d.method, d.against)
    }
    methods = sorted(best, key=lambda m: (":" in m, m))
    for ax, (network, rows) in zip(panels, of_network.items(), strict=True):
        _draw(ax, rows, methods)
        ax.set_title(network)
        ax.set_xlabel("MACs kept (%)")
    panels[0].set_ylabel("test top-1 (%)")
    handles = {label: handle for ax in panels for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    save(figure, path)


_COLORS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#777777")
_MARKERS = "osD^v<>Pp"


def _draw(ax: Axes, rows: list[Row], methods: list[str]) -> None:
    found = points(rows)
    for number, method in enumerate(methods):
        of_method = [p for p in found if p.method == method]
        if not of_method:
            continue
        ax.errorbar(
            [100 * p.macs_ratio.mean for p in of_method],
            [p.top1.mean for p in of_method],
            yerr=[p.top1.sd for p in of_method],
            color=_COLORS[number % len(_COLORS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markerfacecolor="none" if ":" in method else None,
            linestyle="--" if ":" in method else "-",
            linewidth=1.4,
            capsize=2,
            label=method,
        )
    top1 = {row.seed: row.top1_baseline for row in rows}
    ax.axhline(sum(top1.values()) / len(top1), color="black", linewidth=1, linestyle=":", label="dense")
    ax.set_xlim(20, 80)
    ax.grid(color="#e3e6ea")
    ax.set_axisbelow(True)
