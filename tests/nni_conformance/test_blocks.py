"""A pruner of whole blocks where NNI has none: NNI's constructor, NNI's evaluators and schedules, masks in NNI's form.

NNI's tests hold no network with a removable block, so this one has two, and Lightning's module around it.
"""

import inspect
from pathlib import Path
from typing import Any

import nni
import nni.compression.pruning as of_nni
import pytest
import torch
import torch.nn.functional as F
from nni.compression.pruning import AGPPruner
from referee import BATCH, SIDE, LightningEvaluator, ModelSpeedup, TorchEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nni_plugin.layers import BlockGate
from nni_plugin.pruners import BlockPruner, ImprintingPruner, LayerStatisticPruner

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
STEPS = 8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        nn.init.uniform_(self.bn.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


def network() -> nn.Module:
    stem = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*stem, Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def step(batch: Any, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def data() -> tuple[Tensor, Tensor]:
    """Labels one after the other, so that no part of the minibatches misses a class."""
    images = torch.randn(STEPS * BATCH, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(len(images)) % 10


def train(model: nn.Module, optimizer: Any, training_step: Any, _: Any, max_steps: int, max_epochs: Any) -> None:
    model.train()
    batches = list(zip(*(part.split(BATCH) for part in data()), strict=True))
    for number in range(max_steps):
        optimizer.zero_grad()
        training_step(batches[number % len(batches)], model).backward()
        optimizer.step()


def plain_task() -> tuple[nn.Module, Any, str]:
    model = network()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    return model, TorchEvaluator(train, optimizer, step, dummy_input=X), ""


def lightning_task(pl: Any, folder: Path) -> tuple[nn.Module, Any, str]:
    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return step(batch, self)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Data(pl.LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(*data()), batch_size=BATCH)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = nni.trace(pl.Trainer)(accelerator="cpu", default_root_dir=folder, **quiet)
    return Module(), LightningEvaluator(trainer, nni.trace(Data)(), X), "model."


@pytest.mark.parametrize("kind", ["pytorch", "pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_from_masks_to_a_network_with_one_block_less(kind: str, scheduled: bool, tmp_path: Path) -> None:
    model, evaluator, prefix = (
        plain_task() if kind == "pytorch" else lightning_task(pytest.importorskip(kind), tmp_path)
    )
    pruner = ImprintingPruner(model, CONFIG, evaluator, STEPS)
    assert pruner.candidates == [f"{prefix}2", f"{prefix}3"]
    if scheduled:
        _, masks = AGPPruner(pruner, interval_steps=STEPS, total_times=2).compress(2 * STEPS, None)
    else:
        _, masks = pruner.compress()
    (block,) = pruner.plan().removed_blocks
    assert all(isinstance(mask, Tensor) and not bool(mask.any()) for mask in masks[f"{block}.bn"].values())
    torch.save(masks, tmp_path / "masks.pth")
    with torch.no_grad():
        expected = model.eval()(X)
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, X, str(tmp_path / "masks.pth"))
    speedup.speedup_model()
    assert speedup.plan is not None
    assert speedup.plan.removed_blocks == (block,)
    inner: Any = model if kind == "pytorch" else model.model
    assert [type(part) for part in inner].count(Residual) == 1
    with torch.no_grad():
        assert torch.allclose(model.eval()(X), expected, atol=1e-6)
    step((X, torch.tensor([1, 2])), model.train()).backward()


@pytest.mark.parametrize("method", [ImprintingPruner, LayerStatisticPruner])
def test_the_arguments_are_those_of_nnis_pruners(method: Any) -> None:
    theirs = list(inspect.signature(of_nni.TaylorPruner).parameters)
    assert list(inspect.signature(method).parameters)[: len(theirs)] == theirs
    assert list(inspect.signature(of_nni.TaylorPruner.from_compressor).parameters) == [
        *list(inspect.signature(method.from_compressor).parameters)[:4]
    ]


def test_a_ranking_of_ones_own() -> None:
    class GatePruner(BlockPruner):
        default_importance = BlockGate

    model, evaluator, _ = plain_task()
    pruner = GatePruner(model, CONFIG, evaluator, STEPS)
    pruner.compress()
    assert len(pruner.plan().removed_blocks) == 1
    assert all(score > 0 for score in pruner.scores.values())
