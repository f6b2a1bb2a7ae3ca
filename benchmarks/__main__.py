"""Run a benchmark by name and write what it measured, with the machine, to a JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nni_plugin.benchmarks import fashion_mnist, resnet101_schedule, scoring_overhead
from nni_plugin.machine import describe_machine

BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {
    "scoring_overhead": scoring_overhead.run,
    "fashion_mnist": fashion_mnist.run,
    "resnet101_schedule": resnet101_schedule.run,
}


def main() -> None:
    """Run the benchmarks that are named, all if none is."""
    parser = argparse.ArgumentParser(prog="python -m nni_plugin.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)} (all)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for the JSON files")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    for name in arguments.names or BENCHMARKS:
        result = {
            "command": f"python -m nni_plugin.benchmarks {name}",
            **BENCHMARKS[name](),
            "machine": describe_machine(),
        }
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path.read_text())


if __name__ == "__main__":
    main()
