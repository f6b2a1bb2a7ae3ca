"""Run a command in a network of its own, where NNI's server reaches nobody, and tell where that cannot be done."""

import functools
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil


@functools.cache
def reason_against() -> str:
    """Why no private network can be made here; empty if one can."""
    try:
        done = subprocess.run(_inside(["true"]), capture_output=True, text=True, timeout=30)
    except OSError as error:
        return f"no private network namespace here: {error}"
    return "" if done.returncode == 0 else f"no private network namespace here: {done.stderr.strip()}"


def popen(words: list[object], home: Path, **kwargs: object) -> subprocess.Popen[str]:
    """Start `python ...` in a private network, with a home of its own, since NNI writes to `~/nni-experiments`."""
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    home.mkdir(exist_ok=True)
    command = _inside([sys.executable, *map(str, words)])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs
    )


def processes_of(home: Path) -> list[psutil.Process]:
    """The processes that have this home: what a command started there has left running."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # another user's, or gone
            continue
    return found


def command_lines(home: Path) -> list[str]:
    """The commands of those processes; of one that ends meanwhile, nothing."""
    lines = []
    for process in processes_of(home):
        with suppress(psutil.NoSuchProcess):  # a zombie is one, to psutil
            lines.append(shlex.join(process.cmdline()))
    return lines


def _inside(command: list[str]) -> list[str]:
    # The shell is replaced by the command, so that signals to the process reach the command.
    return ["unshare", "-rn", "sh", "-c", f"ip link set lo up && exec {shlex.join(command)}"]
