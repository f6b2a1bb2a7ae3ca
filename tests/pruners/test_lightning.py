"""With Lightning's trainer, under both of its names. Skipped where they are not installed."""

import importlib.util
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
import torch.nn.functional as F
from nni.compression.pruning import AGPPruner
from nni_task import BATCH, CONVS, data, resnet, sparsity
from torch.utils.data import DataLoader, TensorDataset

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.criteria import Oracle
from nni_plugin.errors import ConfigError
from nni_plugin.pruners import (
    L1NormPruner,
    LightningEvaluator,
    OBDPruner,
    OraclePruner,
    TaylorFisherPruner,
    TaylorFOPruner,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def pl(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def module_of(pl: Any, form: str = "optimizer", lr: float = 0.0) -> Any:
    class Classifier(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = resnet()
            self.seen = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            loss = F.cross_entropy(self(batch[0]), batch[1])
            return {"loss": loss} if form == "dict" else loss

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("default", (self(batch[0]).argmax(1) == batch[1]).double().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return {
                "optimizer": optimizer,
                "dict": {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}},
                "lists": ([optimizer], [scheduler]),
            }[form]

    return Classifier()


def evaluator_of(pl: Any, folder: Path, dummy: bool = False, **options: Any) -> LightningEvaluator:
    class Data(pl.LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(*data()), batch_size=BATCH)

        test_dataloader = train_dataloader

    arguments = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
        **options,
    }
    trainer = nni.trace(pl.Trainer)(**arguments)
    return LightningEvaluator(trainer, nni.trace(Data)(), data()[0][:1] if dummy else None)


@pytest.mark.parametrize("form", ["optimizer", "dict", "lists"])
def test_scores_are_those_of_the_same_minibatches(pl: Any, tmp_path: Path, form: str) -> None:
    """Gradients are those of the step they are read at; weights move meanwhile."""
    model = module_of(pl, form, lr=0.05)
    pruner = TaylorFOPruner(model, CONVS, evaluator_of(pl, tmp_path), 3)
    model.seen = 0  # the first call told the inputs
    pruner.compress()
    assert model.seen == 3
    plain = resnet()
    images, target = data()
    groups = [group for group in find_groups(plain, images[:1]) if f"network.{group.name}" in pruner.scores]
    criterion, optimizer = type(pruner.criterion)(), torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    with criterion.collect(plain, groups):
        for i in range(0, 3 * BATCH, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(plain(images[i : i + BATCH]), target[i : i + BATCH]).backward()
            criterion.update()
            optimizer.step()
    assert len(groups) == 6
    for group in groups:
        assert torch.allclose(criterion(group), pruner.scores[f"network.{group.name}"], rtol=1e-9)


@pytest.mark.parametrize("method", [TaylorFisherPruner, OBDPruner, L1NormPruner])
def test_inside_a_schedule_longer_than_the_trainer_s_epochs(pl: Any, tmp_path: Path, method: Any) -> None:
    model = module_of(pl, lr=0.01)
    evaluator = evaluator_of(pl, tmp_path, dummy=True)
    pruner = method(model, CONVS, evaluator, *(() if method is L1NormPruner else (2,)))
    _, masks = AGPPruner(pruner, interval_steps=3, total_times=3).compress(max_steps=9, max_epochs=None)
    assert model.seen == 9
    assert sparsity(masks, "network.layer3.0.conv1") == sparsity(masks, "network.layer3.0.bn1") == 0.5
    assert model._trainer is None
    assert "training_step" not in vars(model)
    assert "configure_optimizers" not in vars(model)


def test_accumulated_and_clipped_gradients(pl: Any, tmp_path: Path) -> None:
    model = module_of(pl)
    evaluator = evaluator_of(pl, tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0)
    pruner = TaylorFOPruner(model, CONVS, evaluator, 3)
    model.seen = 0
    _, masks = pruner.compress()
    assert model.seen == 6  # two minibatches a step
    assert sparsity(masks, "network.conv1") == 0.5


def test_the_oracle_needs_a_loss_here(pl: Any, tmp_path: Path) -> None:
    model = module_of(pl)
    config = [{"op_names": ["network.layer1.0.conv1"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match="criterion=Oracle"):
        OraclePruner(model, config, evaluator_of(pl, tmp_path), 1).compress()
    model = module_of(pl)
    criterion = Oracle(lambda network, batch: F.cross_entropy(network(batch[0]), batch[1]))
    _, masks = OraclePruner(model, config, evaluator_of(pl, tmp_path), 1, criterion=criterion).compress()
    assert sparsity(masks, "network.layer1.0.conv1") == 0.5


def test_evaluate_and_finetune(pl: Any, tmp_path: Path) -> None:
    model = module_of(pl, lr=0.01)
    evaluator = evaluator_of(pl, tmp_path)
    pruner = TaylorFOPruner(model, CONVS, evaluator, 2)
    pruner.compress()
    evaluator.bind_model(model)
    seen = model.seen
    evaluator.finetune()
    assert model.seen == seen + 4
    metric, results = evaluator.evaluate()
    assert 0 <= metric <= 1
    assert results[0]["default"] == metric


def test_an_exception_leaves_nothing_behind(pl: Any, tmp_path: Path) -> None:
    model = module_of(pl)

    def fail(batch: Any, batch_idx: int) -> Any:
        raise RuntimeError("the data ran out")

    evaluator = evaluator_of(pl, tmp_path, dummy=True)
    pruner = TaylorFisherPruner(model, CONVS, evaluator, 2)
    model.training_step = fail
    with pytest.raises(RuntimeError, match="the data ran out"):
        pruner.compress()
    assert model.training_step is fail
    assert evaluator.model is None
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_nni_s_own_evaluator_is_refused(pl: Any) -> None:
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("NNI's own knows pytorch_lightning alone")
    import pytorch_lightning
    from nni.compression import LightningEvaluator as OfNNI

    trainer = nni.trace(pytorch_lightning.Trainer)(max_epochs=1, logger=False)
    theirs = OfNNI(trainer, nni.trace(pytorch_lightning.LightningDataModule)())
    with pytest.raises(ConfigError, match=r"nni_plugin\.pruners\.LightningEvaluator"):
        TaylorFOPruner(module_of(pytorch_lightning), CONVS, theirs, 2)


def test_a_network_that_is_no_lightning_module(pl: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ResNet is no .*LightningModule"):
        TaylorFOPruner(resnet(), CONVS, evaluator_of(pl, tmp_path), 2)
