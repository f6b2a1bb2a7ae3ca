"""Two processes, each with its share of the minibatches, find the importances that one finds on all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layered import batches, chain, loss_of

from nni_plugin.criteria import TaylorFG
from nni_plugin.errors import DataError
from nni_plugin.layers import BlockGate, Imprinting, LayerEnsemble, LayerStatistic, removable_blocks

PROCESSES = 2
IMPORTANCES = {
    "imprinting": Imprinting,
    "statistic": lambda: LayerStatistic(TaylorFG()),
    "gate": BlockGate,
    "ensemble": lambda: LayerEnsemble([Imprinting(), TaylorFG(), BlockGate()]),
}


def scores_of(name, rank=0, processes=1):
    data, held_out = batches(4), batches(2, seed=8)
    share, kept = data[rank::processes], held_out[rank::processes]
    model = chain(3)
    blocks = removable_blocks(model, data[0][0])
    importance = IMPORTANCES[name]()
    scores = importance.score(model, data[0][0], blocks, share, loss_of, kept)
    accuracies = getattr(importance, "accuracies", {})
    return {**scores, **{f"accuracy {block}": accuracy for block, accuracy in accuracies.items()}}


def failing_on_one(rank):
    """What each process is told when only the second one has a label that is no class."""
    data, model = batches(2), chain(2)
    bad = [(images, labels + (4 if rank else 0)) for images, labels in data]
    try:
        Imprinting().score(model, data[0][0], removable_blocks(model, data[0][0]), bad, held_out=data)
    except DataError as error:
        return str(error)
    return "nothing"


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=PROCESSES)
    found = {name: scores_of(name, rank, PROCESSES) for name in IMPORTANCES}
    torch.save({**found, "told": failing_on_one(rank)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The scores of each process, all importances in one go."""
    folder = tmp_path_factory.mktemp("processes")
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "PYTHONPATH": support}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * PROCESSES, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", IMPORTANCES)
def test_two_processes_find_what_one_finds(found, name):
    alone = scores_of(name)
    for scores in found:
        assert list(scores[name]) == list(alone)
        assert list(scores[name].values()) == pytest.approx(list(alone.values()), rel=1e-9, abs=1e-12)


def test_the_data_make_a_difference(found):
    """A process that kept to its own minibatches would be seen."""
    for name in ("imprinting", "gate"):
        halves = [scores_of(name, rank, PROCESSES) for rank in range(PROCESSES)]
        assert found[0][name] not in halves


def test_an_error_of_one_process_is_told_by_all(found):
    own, other = found[1]["told"], found[0]["told"]
    assert own.startswith("Labels must lie in 0..3 for 4 classes, got 7")
    assert other == f"Another process cannot score its minibatches: {own}"


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
