"""Run benchmarks by name and write what they measured, with the machine, to JSON files; pages are made from these.

python -m nni_plugin.benchmarks                              those that take minutes
python -m nni_plugin.benchmarks NAME [NAME ...] [options]    those that are named
python -m nni_plugin.benchmarks NAME --help                  the options of one
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import jsonargparse

from nni_plugin.benchmarks import (
    comparison,
    correlations,
    coverage,
    efficientnet_lite0,
    fashion_mnist,
    inference_speed,
    joint_removal,
    layerprune,
    nni_drop_in,
    nppm,
    obs_scale,
    oracle_speed,
    resnet20_table4,
    resnet101_schedule,
    schedules_fig6,
    scoring_memory,
    scoring_overhead,
    surgery_speed,
    width_and_depth,
)
from nni_plugin.errors import NNIPluginError
from nni_plugin.machine import describe_machine

BENCHMARKS: dict[str, ModuleType] = {
    "scoring_overhead": scoring_overhead,
    "fashion_mnist": fashion_mnist,
    "resnet101_schedule": resnet101_schedule,
    "resnet20_table4": resnet20_table4,
    "schedules_fig6": schedules_fig6,
    "comparison": comparison,
    "correlations": correlations,
    "coverage": coverage,
    "inference_speed": inference_speed,
    "efficientnet_lite0": efficientnet_lite0,
    "joint_removal": joint_removal,
    "layerprune": layerprune,
    "oracle_speed": oracle_speed,
    "obs_scale": obs_scale,
    "scoring_memory": scoring_memory,
    "surgery_speed": surgery_speed,
    "nni_drop_in": nni_drop_in,
    "nppm": nppm,
    "width_and_depth": width_and_depth,
}
"""Each has `run(**options)`, whose typed arguments are its options, and may have `render(result)` for a page of
Markdown and `plot(result, path)` for its figure."""

SHORT = ("scoring_overhead", "fashion_mnist", "resnet101_schedule")
"""What is run when none is named."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks that are named; with one name, further options are that benchmark's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    parser = jsonargparse.ArgumentParser(
        prog=" ".join(["python -m nni_plugin.benchmarks", *(names or ["[NAME ...]"])]),
        description=f"Benchmarks: {', '.join(BENCHMARKS)}. None named: {', '.join(SHORT)}.",
    )
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    add = parser.add_argument
    add("--output", type=Path, default=Path("benchmarks/results"), help="folder for the JSON files")
    add("--docs", type=Path, default=Path("docs"), help="folder for the pages and figures")
    add("--render", action="store_true", help="run nothing: make the pages from the JSON files that are there")
    options: list[str] = []
    given = words[len(names) :]
    if len(names) == 1:
        run = BENCHMARKS[names[0]].run
        options = parser.add_function_arguments(run, as_group=False)
        given = _yaml_lists(run, given)
    arguments = parser.parse_args(given)
    for name in names or SHORT:
        path = arguments.output / f"{name}.json"
        if not arguments.render:
            result = {
                "command": _command(name, words[len(names) :], arguments),
                **_run(parser, name, {option: arguments[option] for option in options}),
                "machine": describe_machine(),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(path.read_text(encoding="utf-8"))
        elif not path.exists():
            parser.error(f"there is no {path} to render: run the benchmark first")
        write_page(BENCHMARKS[name], json.loads(path.read_text(encoding="utf-8")), arguments.docs / f"{name}.md")


def write_page(benchmark: ModuleType, result: dict[str, Any], path: Path) -> None:
    """Write a benchmark's page and, where matplotlib is installed, its figure; nothing for one without a page.

    Args:
        benchmark: The benchmark's module.
        result: As read from its JSON file.
        path: Of the page; the figure lies beside it as `.svg`.
    """
    if not hasattr(benchmark, "render"):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text: str = benchmark.render(result)
    if hasattr(benchmark, "plot"):
        figure = path.with_suffix(".svg")
        try:
            benchmark.plot(result, figure)
        except ImportError:
            print("No figure: matplotlib is not installed (nni-plugin[plots]).", file=sys.stderr)
        else:
            text += f"\n![{path.stem}]({figure.name})\n"
    text += f"\nNumbers: `{path.stem}.json`; command: `{result['command']}`.\n"
    path.write_text(text, encoding="utf-8")


def _run(parser: jsonargparse.ArgumentParser, name: str, options: dict[str, Any]) -> dict[str, Any]:
    try:
        result: dict[str, Any] = BENCHMARKS[name].run(**options)
    except NNIPluginError as error:
        parser.error(str(error))
    return result


def _yaml_lists(run: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """Write `--data-dir` as the argument's name, and a list's `0,1,2` in the brackets that the parser expects."""
    hints, lists = get_type_hints(run), set()
    for name, hint in hints.items():
        if any(get_origin(kind) in (tuple, list) for kind in (hint, *get_args(hint))):
            lists.add(f"--{name}")
    read: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        flag = flag.replace("-", "_").replace("__", "--", 1)
        owner = flag if equals else (read[-1] if read and not flag else "")
        if owner in lists and not value.startswith("[") and (equals or not flag):
            value = f"[{value}]"
        read.append(flag + equals + value)
    return read


def _command(name: str, words: Sequence[str], arguments: Any) -> str:
    """Return the command with a capital letter for every folder, which is this machine's affair."""
    said = ["python -m nni_plugin.benchmarks", name]
    for before, word in itertools.pairwise(["", *words]):
        flag = word.partition("=")[0] if "=" in word else before
        is_path = isinstance(arguments.get(flag.lstrip("-").replace("-", "_")), Path)
        if is_path:
            letter = flag.lstrip("-")[0].upper()
            word = f"{flag}={letter}" if "=" in word else letter
        said.append(word)
    return " ".join(said)


if __name__ == "__main__":
    main()
