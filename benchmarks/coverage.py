"""Which models can be pruned, model by model, beside what a list says of another tool.

Every model of the list goes through `nni-plugin coverage`: planned to a fraction of its MACs, cut, proven, run in both
modes, saved and loaded, in a process of its own with a limit of CPU-seconds. Columns of the list behind `library` and
`model` are shown beside ours; a cell that is `ok` and nothing more counts as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nni_plugin.adapters.libraries import family_of
from nni_plugin.coverage.check import BUDGET_TOLERANCE, IMAGES
from nni_plugin.coverage.job import CoverageJob, run_coverage
from nni_plugin.coverage.listing import read_list
from nni_plugin.coverage.results import STATUSES, Row, counts

_COLUMNS = ("family", "model", "status", "MACs kept", "parity", "CPU s")


def run(
    models: Path,
    macs: float = 0.5,
    seconds: int = 60,
    workers: int = 2,
    seed: int = 0,
    device: str | None = None,
    folder: Path = Path("out/coverage"),
) -> dict[str, Any]:
    """Try every model of a list; a killed call goes on.

    Args:
        models: CSV file with the columns library and model, and further ones to show beside.
        macs: Fraction of the multiply-accumulates to keep.
        seconds: CPU-seconds that a model may take, on one thread.
        workers: Models at a time.
        seed: Of weights, statistics, images and scores.
        device: cpu, cuda ...; the best there is if not given.
        folder: For what is done so far, and the table.
    """
    cases = read_list(Path(models))
    job = CoverageJob(cases, macs, seconds, workers, seed, device, Path(folder))
    rows = run_coverage(job, resume=True)
    return {
        "settings": {
            **{"macs": macs, "seconds": seconds, "seed": seed, "device": device, "images": IMAGES},
            "budget_tolerance": BUDGET_TOLERANCE,
        },
        "models": [
            {**asdict(row), "family": family_of(case.library, case.model), "notes": dict(case.notes)}
            for case, row in zip(cases, rows, strict=True)
        ],
    }


def render(result: Mapping[str, Any]) -> str:
    """Return the page: how many of each library, then every model, by library and family."""
    asked, models = result["settings"], result["models"]
    notes = list(dict.fromkeys(name for model in models for name in model["notes"]))
    libraries = list(dict.fromkeys(model["library"] for model in models))
    page = [
        "# Coverage",
        "",
        f"Plans by random scores at {asked['macs']:g} of the MACs, on random weights with drawn normalisation "
        f"statistics (seed {asked['seed']}); {asked['seconds']} CPU-seconds a model, on one thread.",
        "",
        f"- ok: the MACs are met within {asked['budget_tolerance']:.0%}; every group was tried before it was cut; the "
        f"masked network computes what the compact one does; forward and backward passes of {asked['images']} images, "
        "in train and in eval mode, give finite outputs and a gradient wherever the dense network has one; saved and "
        "loaded it is the same bit by bit.",
        "- refused: nothing is cut, and the reason names the module. failed: anything else.",
        "- Parity: largest difference of the outputs, masked and compact, over the largest output. CPU s: all of it, "
        "building and saving too.",
        *(
            f"- {_words(name)}: as the list of models says, from an earlier run on another machine whose time limit "
            "counts too; not run by this command."
            for name in notes
        ),
        "",
        *_table(
            ["library", "models", *STATUSES, "share ok", *(f"ok: {_words(name)}" for name in notes)],
            _summary(models, notes),
        ),
    ]
    for library in libraries:
        found = [model for model in models if model["library"] == library]
        found.sort(key=lambda model: (model["family"], model["model"]))
        shown = [name for name in notes if any(model["notes"].get(name) for model in found)]
        header = [*_COLUMNS, *(_words(name) for name in shown)]
        page += ["", f"## {library}", "", *_table(header, [_cells(model, shown) for model in found])]
    return "\n".join([*page, ""])


def _summary(models: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> list[list[str]]:
    rows = [Row(**{name: model[name] for name in Row.__dataclass_fields__}) for model in models]
    table = []
    for library, found in counts(rows).items():
        of = [model for model in models if library in ("all", model["library"])]
        theirs = [str(sum(model["notes"].get(name) == "ok" for model in of)) for name in notes]
        shares = [str(found[kind]) for kind in STATUSES] + [f"{found['ok'] / len(of):.1%}"]
        table.append([library, str(len(of)), *shares, *theirs])
    return table


def _cells(model: Mapping[str, Any], notes: Sequence[str]) -> list[str]:
    status = model["status"] + (f": {model['reason']}" if model["reason"] else "")
    forms = {"macs_ratio": ".3f", "parity_max_rel": ".1e", "seconds": ".1f"}
    numbers = ["-" if model[name] is None else f"{model[name]:{form}}" for name, form in forms.items()]
    return [model["family"], model["model"], status, *numbers, *(model["notes"].get(name) or "-" for name in notes)]


def _words(column: str) -> str:
    return column.replace("_", " ")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    numeric = {"models", *STATUSES, "share ok", *_COLUMNS[3:]}
    marks = ["--:" if name in numeric or name.startswith("ok: ") else "---" for name in header]
    lines = [list(header), marks, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]
