"""One process among several: started by `torchrun`, on one machine or many, or by ourselves; each has its own GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nni_plugin.errors import OutputError

_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` sets. Cells are trained each by one process, so training must not see it."""


@dataclass(frozen=True)
class Launched:
    """What `torchrun` said: this process among all, among those of its machine, and a name for the run."""

    rank: int
    local_rank: int
    run: str


@contextmanager
def on_its_own() -> Iterator[Launched | None]:
    """Hide from training that `torchrun` started several processes; gives what it said, None if it did not."""
    hidden = {name: os.environ.pop(name) for name in _OF_LAUNCHERS if name in os.environ}
    try:
        if "RANK" not in hidden:
            yield None
            return
        run = f"{hidden.get('MASTER_ADDR')}:{hidden.get('MASTER_PORT')} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"
        yield Launched(int(hidden["RANK"]), int(hidden.get("LOCAL_RANK", "0")), run)
    finally:
        os.environ.update(hidden)


def wait_for(path: Path, run: str, seconds: float = 600.0) -> None:
    """Wait until the first process of this run has filled the store."""
    begun = time.monotonic()
    while not (path.is_file() and path.read_text() == run):
        if time.monotonic() - begun > seconds:
            raise OutputError(f"Expected {str(path)!r} of the process of rank 0 within {seconds:.0f} s, got none.")
        time.sleep(0.5)


def take_gpu(number: int) -> None:
    """Leave this process one of the GPUs alone, before it has touched any; without a GPU nothing happens."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if names:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
