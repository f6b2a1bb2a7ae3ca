"""What NNI 3.0's tests share: a network with a grouped and a plain convolution added up, evaluators, and the checks.

The network has NNI's layers and widths, on images of 8 x 8 instead of MNIST's 28 x 28; the data are random.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import nni
import nni.compression.pruning as of_nni
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nni_plugin.pruners import (
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LightningEvaluator,
    ModelSpeedup,
    OBSPruner,
    TaylorFisherPruner,
    TaylorFOPruner,
    TorchEvaluator,
)

BATCH, SIDE = 8, 8
CONVS = ("conv1", "conv2", "conv3")
PRUNED = (*CONVS, "fc1")
RATIO = 0.75

BY_WEIGHTS = {"l1": L1NormPruner, "l2": L2NormPruner, "fpgm": FPGMPruner}
BY_DATA = {"taylor": TaylorFOPruner, "taylor-fisher": TaylorFisherPruner, "obs": OBSPruner}
CONTROL_BY_WEIGHTS = {"l1": of_nni.L1NormPruner, "l2": of_nni.L2NormPruner, "fpgm": of_nni.FPGMPruner}
CONTROL_BY_DATA = {"taylor": of_nni.TaylorPruner}
"""By slot, ours and NNI's."""


def slots(*tables: dict[str, Any]) -> list[Any]:
    """The pruners of some tables, as parameters that pytest names."""
    import pytest

    return [
        pytest.param(pruner, id=f"{pruner.__module__.partition('.')[0]}:{name}")
        for table in tables
        for name, pruner in table.items()
    ]


def data(batches: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batches * BATCH, 1, SIDE, SIDE, generator=generator)
    return images, torch.randint(0, 10, (len(images),), generator=generator)


X = data(1, seed=2)[0]


class Network(nn.Module):
    """A stem, a grouped and a plain convolution whose normalised outputs are added, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, groups=4), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)
        self.fc1, self.fc2 = nn.Linear(32 * (SIDE - 4) ** 2, 100), nn.Linear(100, 10)
        for norm in (self.bn1, self.bn2, self.bn3):  # a network that was trained; beta is what NNI's masks forget
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x)) + self.bn3(self.conv3(x))
        return F.log_softmax(self.fc2(self.fc1(x.flatten(1))), -1)


def step(batch: Any, model: nn.Module) -> Tensor:
    return F.nll_loss(model(batch[0]), batch[1])


def train(
    model: nn.Module,
    optimizers: torch.optim.Optimizer,
    training_step: Any,
    lr_schedulers: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    """Train as NNI asks a user's function to: so many steps, or epochs, or 50 steps."""
    images, labels = data()
    steps = max_steps or (4 * max_epochs if max_epochs else 50)
    model.train()
    for number in range(steps):
        part = slice(number % 4 * BATCH, (number % 4 + 1) * BATCH)
        optimizers.zero_grad()
        training_step((images[part], labels[part]), model).backward()
        optimizers.step()


def lightning_module(pl: Any) -> Any:
    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = Network()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return step(batch, self)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]

    return Module()


class Case:
    """A network, its evaluator and its config_list, in plain PyTorch or Lightning.

    Args:
        kind: `"pytorch"`, or the name of one of Lightning's packages.
        folder: Where Lightning may write.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        import pytest

        self.kind, self.folder = kind, folder
        self.prefix = "" if kind == "pytorch" else "model."
        self.pl = None if kind == "pytorch" else pytest.importorskip(kind)
        self.model: nn.Module = Network() if self.pl is None else lightning_module(self.pl)
        self.evaluator = self.evaluator_of(self.model)

    def evaluator_of(self, model: nn.Module) -> Any:
        if self.pl is None:
            optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            scheduler = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, 0.1)
            return TorchEvaluator(train, optimizer, step, scheduler, dummy_input=X)
        trainer = nni.trace(self.pl.Trainer)(
            max_epochs=1,
            max_steps=50,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=self.folder,
        )

        class Data(self.pl.LightningDataModule):  # type: ignore[misc, name-defined]
            def train_dataloader(self) -> DataLoader[Any]:
                return DataLoader(TensorDataset(*data(50)), batch_size=BATCH)

        return LightningEvaluator(trainer, nni.trace(Data)(), X)

    @property
    def config(self) -> list[dict[str, Any]]:
        """What NNI's tests prune: three quarters of each convolution and of the linear layer that is no classifier."""
        names = [self.prefix + name for name in CONVS]
        return [
            {"op_types": ["Linear"], "exclude_op_names": [f"{self.prefix}fc2"], "sparse_ratio": RATIO},
            {"op_names": names, "sparse_ratio": RATIO},
        ]

    @property
    def dependent_config(self) -> list[dict[str, Any]]:
        """The same as NNI's `auto_set_denpendency_group_ids` rewrites it; that one needs tensorboard."""
        shared = {"fc1": ("a", None), "conv1": ("b", 4), "conv2": ("c", 4), "conv3": ("c", 1)}
        return [
            {"op_names": [self.prefix + name], "sparse_ratio": RATIO, "dependency_group_id": group}
            | ({} if blocks is None else {"internal_metric_block": blocks})
            for name, (group, blocks) in shared.items()
        ]

    def check_masks(self, masks: dict[str, dict[str, Tensor]]) -> None:
        """Exact sparsity, biases that follow their weights, one mask on both sides of the addition."""
        kept = {}
        for name in PRUNED:
            weight, bias = (masks[self.prefix + name][target] for target in ("weight", "bias"))
            assert 1 - float(weight.mean()) == RATIO
            rows = weight.flatten(1)
            kept[name] = rows.any(1)
            assert torch.equal(rows.all(1), kept[name])  # whole channels
            assert torch.equal(bias.bool(), kept[name])
        assert torch.equal(kept["conv2"], kept["conv3"])

    def check_speedup(self, masks: dict[str, dict[str, Tensor]], expected: Tensor) -> None:
        """The unwrapped network shrinks to the widths that the masks ask for, and computes what the masked one did."""
        speedup = ModelSpeedup(self.model, X, masks)
        speedup.speedup_model()
        network: Any = self.model if self.pl is None else self.model.model
        assert [network.get_submodule(name).weight.shape[0] for name in PRUNED] == [4, 8, 8, 25]
        assert (network.conv2.groups, network.fc1.in_features, network.fc2.in_features) == (4, 8 * 16, 25)
        assert speedup.report is not None
        assert not speedup.report.left
        with torch.no_grad():
            assert torch.allclose(self.model.eval()(X), expected, atol=1e-5)
        step((X, data(1)[1]), self.model.train()).backward()

    def finish(self, pruner: Any, masks: dict[str, dict[str, Tensor]]) -> None:
        """Check masks and speed-up of a pruner that has compressed this case's network."""
        self.check_masks(masks)
        with torch.no_grad():
            expected = self.model.eval()(X)
        pruner.unwrap_model()
        self.check_speedup(masks, expected)


def quietly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call without the warnings of the hosts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)
