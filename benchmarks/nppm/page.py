"""The page and the figure of the NPPM experiments: every number from the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_plugin.benchmarks.figures import save
from nni_plugin.benchmarks.grid import interval, mean_and_sd

Cell = Mapping[str, Any]

LOOKS = {
    "nppm": ("performance network", "#D55E00", "-"),
    "differentiable-gates": ("gates alone", "#0072B2", "--"),
    "nppm-linear": ("linear regression", "#009E73", "-."),
}
PANELS = (
    ("top1", "test top-1 (%), as it is"),
    ("loss", "test loss, as it is"),
    ("top1_within", "test top-1 (%), within the budget"),
    ("predictor_loss", "loss of the predictor"),
)


def render(result: Mapping[str, Any]) -> str:
    """Return the page: what is fine-tuned, the searches, the predictors, the choice of p."""
    text = ["# Pruning by performance maximisation", ""]
    for network, settings in result["settings"].items():
        tuned = [cell for cell in result["tuned"] if cell["network"] == network]
        searches = [cell for cell in result["searches"] if cell["network"] == network]
        data, kept = settings["dataset"].rpartition("/")[2], f"{100 * settings['macs']:g} %"
        text += [f"## {network} on {data}, {kept} of the MACs", ""]
        text += _tuned(tuned) if tuned else []
        text += _searches(searches) if searches else []
        if settings["reductions"]:
            text += [f"{network} against the paper's settings:", "", *(f"- {x}" for x in settings["reductions"]), ""]
    text += _choice(result["p"]) if result["p"] else []
    text += ["Notes:", "", *(f"- {note}" for note in result["notes"]), ""]
    return "\n".join(text)


def _tuned(cells: Sequence[Cell]) -> list[str]:
    others = list(dict.fromkeys(other for cell in cells for other in cell["minus"]))
    head = ["method", "seeds", "top-1 before", "top-1 fine-tuned", *(f"minus {other}" for other in others)]
    rows = []
    for cell in cells:
        row = [f"`{cell['method']}`", str(len(cell["seeds"])), mean_and_sd(cell["top1_before"])]
        row.append(mean_and_sd(cell["top1"]))
        for other in others:
            found = cell["minus"].get(other)
            row.append("-" if found is None else f"{mean_and_sd(found)} {interval(found)}".removesuffix(" -"))
        rows.append([*row, _span(cell["macs_ratios"]), mean_and_sd(cell["params_ratio"], 4)])
    said = (
        "Test top-1 in percent before and after the same fine-tuning, mean ± standard deviation over the seeds; "
        "differences seed by seed, with their 95 % interval; MACs and parameters kept."
    )
    return [said, "", *_table([*head, "MACs", "parameters"], rows), ""]


def _span(values: Sequence[float]) -> str:
    """Write the lowest and the highest of some ratios."""
    low, high = f"{min(values):.4f}", f"{max(values):.4f}"
    return low if low == high else f"{low} to {high}"


def _searches(cells: Sequence[Cell]) -> list[str]:
    head = ["search", "seeds", "chosen", "held-out top-1, of the gates", "of the pruned network", "predictor's loss"]
    head += ["Spearman, near", "Spearman, any width", "mean error, near", "mean error, any width", "minutes"]
    rows = []
    for cell in cells:
        quality, learned = cell["quality"], cell["curve"][-1]["predictor_loss"]
        row = [f"`{cell['method']}`", str(len(cell["seeds"])), ", ".join(cell["chosen"])]
        row += [mean_and_sd(cell["choice_top1"]), mean_and_sd(cell["choice_top1_pruned"]), mean_and_sd(learned, 4)]
        for name in ("spearman", "mean_abs_error"):
            row += [mean_and_sd(quality[kind][name], 3) if kind in quality else "-" for kind in ("near", "wide")]
        rows.append([*row, f"{cell['seconds']['mean'] / 60:.1f}"])
    return [
        "What each search ends with. The predictor (performance network or linear regression) is judged on "
        "architectures that it has not seen: rank correlation of predicted and measured accuracy, and the mean "
        "absolute error as a fraction.",
        "",
        *_table(head, rows),
        "",
    ]


def _choice(rows: Sequence[Cell]) -> list[str]:
    head = ["data", "network", "prunable share of MACs", "p for half, as printed: 0.5 T_all / T_total"]
    head += ["p for half, exact", "p in Table 1", "MACs kept at it"]
    body = []
    for row in rows:
        names = ("prunable", "p_supplement", "p_exact", "p_table", "kept_at_table")
        digits = {"p_table": 2}
        values = ["-" if row.get(name) is None else f"{row[name]:.{digits.get(name, 4)}f}" for name in names]
        body.append([row["dataset"], row["network"], *values])
    missing = [row["network"] for row in rows if "prunable" not in row]
    text = [
        "## The choice of p",
        "",
        "`p` is the kept fraction of the MACs that gates can remove, with gates on the hidden channels of each block.",
        "",
        *_table(head, body),
        "",
    ]
    return text + ([f"Neither timm nor torchvision has {', '.join(missing)}.", ""] if missing else [])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy, loss and the predictor's loss during the searches, a row of panels a network, to a file.

    Lines are means over the seeds, shaded areas one standard deviation to either side.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(cell["network"] for cell in result["searches"])) or [""]
    figure = Figure(figsize=(3.6 * len(PANELS), 2.9 * len(networks) + 0.5), layout="constrained")
    grid = figure.subplots(len(networks), len(PANELS), squeeze=False)
    for network, row in zip(networks, grid, strict=True):
        for ax, (value, label) in zip(row, PANELS, strict=True):
            for cell in result["searches"]:
                if cell["network"] == network:
                    _draw(ax, cell, value)
            ax.set_xlabel("minibatches of the search")
            ax.set_ylabel(label)
            ax.set_title(network, fontsize=10)
            ax.grid(alpha=0.3)
    entries: dict[str, Any] = {}
    for ax in grid.flat:
        entries.update({label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)})
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=len(entries))
    save(figure, path)


def _draw(ax: Any, cell: Cell, value: str) -> None:
    name, _, groups = cell["method"].partition(":")
    label, color, line = LOOKS[name]
    points = [point for point in cell["curve"] if point[value]["n"]]
    if not points:
        return
    steps = [point["step"] for point in points]
    means = [point[value]["mean"] for point in points]
    spread = [point[value]["sd"] or 0.0 for point in points]
    label += ", all groups" if groups else ""
    ax.plot(steps, means, line if not groups else ":", color=color, label=label, linewidth=1.3)
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    ax.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
