"""Memory of a process, and measuring in a process of its own, since a peak never falls again. Linux only."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_plugin.errors import NNIPluginError

MEBI = 2**20

# glibc is told to hand back what is freed, so that its reserves are not measured.
_PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def highest() -> int:
    """Return the highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(
    module: str, arguments: Sequence[object], threads: int = 1, environment: Mapping[str, str] | None = None
) -> Any:
    """Run a module as a program and return what it prints on its last line, read as JSON.

    Args:
        module: Its import name.
        arguments: Of the command line.
        threads: Of torch.
        environment: Variables to set besides.

    Raises:
        NNIPluginError: It failed.
    """
    variables = {**os.environ, **_PLAIN_MALLOC, "OMP_NUM_THREADS": str(threads), **(environment or {})}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NNIPluginError(f"Measuring {' '.join(map(str, arguments))} failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
