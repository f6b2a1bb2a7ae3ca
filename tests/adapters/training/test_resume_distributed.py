"""Killed inside a window and resumed, two processes go on from what each of them had gathered itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_task import Kill, loader, tiny

from nni_plugin import ChannelPruner, Channels, Iterative, PruningPlan
from nni_plugin.adapters.training import TrainingConfig, fit
from nni_plugin.criteria import OBS, FeatureMap, TaylorFG, TaylorFisher
from nni_plugin.errors import TrainingError

PROCESSES = 2
CRITERIA = {"taylor-fisher": TaylorFisher, "taylor-fg": TaylorFG, "feature-map": FeatureMap, "obs": OBS}
WINDOW = 4
CONFIG = TrainingConfig(epochs=1, lr=0.02, checkpoint_every=1)


def pruned(criterion: Any, folder: Path, kill_at: int | None = None, resume: bool = False) -> str:
    """Train and prune on this process's half of the minibatches, and return the plan."""
    model = tiny(dropout=0.0)
    schedule = Iterative(8, WINDOW)
    pruner = ChannelPruner(model, torch.zeros(1, 3, 8, 8), criterion(), Channels(20), schedule=schedule, cut="never")
    callbacks = [pruner, Kill(kill_at)]
    fit(model, loader(80), CONFIG, callbacks=callbacks, checkpoint_dir=folder, resume=resume, device="cpu")
    return pruner.plan().to_json()


def work(folder: Path) -> None:
    """What each process does: a whole run by every criterion, and one that is killed inside the first window."""
    torch.set_num_threads(1)
    plans = {}
    for name, criterion in CRITERIA.items():
        plans[name] = [pruned(criterion, folder / "whole" / name)]
        try:
            pruned(criterion, folder / name, kill_at=WINDOW - 1)
        except KeyboardInterrupt:
            plans[name].append(pruned(criterion, folder / name, resume=True))
    torch.save(plans, folder / f"{torch.distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes leave their checkpoints and plans."""
    folder = tmp_path_factory.mktemp("processes")
    # Fresh processes: a fork of one in which autograd has run may hang or fail.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    search = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [*command, __file__, str(folder)], env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CRITERIA)
def test_resumed_is_uninterrupted(folder: Path, name: str) -> None:
    for rank in range(PROCESSES):
        whole, resumed = map(PruningPlan.from_json, torch.load(folder / f"{rank}.pt", weights_only=True)[name])
        assert whole.channels_kept == 20
        assert [group.score_range for group in resumed.groups] == [group.score_range for group in whole.groups]
        assert resumed == whole


def test_another_number_of_processes_is_refused(folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"another run: data\.batches was 5, is now 10"):
        pruned(TaylorFisher, folder / "taylor-fisher", resume=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
