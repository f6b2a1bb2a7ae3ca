"""A pruner that searches where NNI has none: NNI's constructor, evaluators and masks, and Lightning's modules."""

import inspect
from pathlib import Path
from typing import Any

import nni
import nni.compression.pruning as of_nni
import pytest
import torch
import torch.nn.functional as F
from referee import BATCH, CONVS, LightningEvaluator, ModelSpeedup, Network, TorchEvaluator, X, data, step, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nni_plugin.errors import ConfigError
from nni_plugin.performance import SearchOptions
from nni_plugin.pruners import PerformanceMaximizationPruner

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
OPTIONS = SearchOptions(steps=40, predictor_start=6, predictor_warmup=2, memory=10, candidates=2)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.nll_loss(model(batch[0]), batch[1])


def plain_task(_: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    model = Network()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    return model, TorchEvaluator(train, optimizer, step, dummy_input=X), {}


def lightning_task(name: str, folder: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    pl: Any = pytest.importorskip(name)

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = Network()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss_of(self, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Data(pl.LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(*data()), batch_size=BATCH)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = nni.trace(pl.Trainer)(accelerator="cpu", default_root_dir=folder, **quiet)
    return Module(), LightningEvaluator(trainer, nni.trace(Data)(), X), {"loss_fn": loss_of}


@pytest.mark.parametrize("kind", ["pytorch", "pytorch_lightning", "lightning.pytorch"])
def test_from_masks_to_a_smaller_network(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, evaluator, further = plain_task(tmp_path) if kind == "pytorch" else lightning_task(kind, tmp_path)
    pruner = PerformanceMaximizationPruner(model, CONFIG, evaluator, 4, options=OPTIONS, **further)
    _, masks = pruner.compress()
    prefix = "" if kind == "pytorch" else "model."
    gone = {name: int((masks[prefix + name]["weight"].flatten(1).sum(1) == 0).sum()) for name in CONVS}
    assert gone["conv2"] == gone["conv3"]  # they are added
    assert any(gone.values())
    torch.save(masks, tmp_path / "masks.pth")
    with torch.no_grad():
        expected = model.eval()(X)
    pruner.unwrap_model()
    ModelSpeedup(model, X, str(tmp_path / "masks.pth")).speedup_model()
    with torch.no_grad():
        assert torch.allclose(model.eval()(X), expected, atol=1e-5)
    widths = {name: model.get_submodule(prefix + name).out_channels for name in CONVS}
    assert widths == {name: whole - gone[name] for name, whole in zip(CONVS, (16, 32, 32), strict=True)}


def test_lightning_needs_a_loss(tmp_path: Path) -> None:
    model, evaluator, _ = lightning_task("pytorch_lightning", tmp_path)
    with pytest.raises(ConfigError, match="give loss_fn"):
        PerformanceMaximizationPruner(model, CONFIG, evaluator, 4)


def test_the_arguments_are_those_of_nnis_pruners() -> None:
    theirs = list(inspect.signature(of_nni.TaylorPruner).parameters)
    assert list(inspect.signature(PerformanceMaximizationPruner).parameters)[: len(theirs)] == theirs
    assert list(inspect.signature(of_nni.TaylorPruner.from_compressor).parameters) == [
        *list(inspect.signature(PerformanceMaximizationPruner.from_compressor).parameters)[:4]
    ]
