"""A tiny task trained through NNI's evaluator, and networks with couplings, biases and normalisations to prune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import torch
import torch.nn.functional as F
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from nni_plugin.networks.resnet import ResNet

CLASSES, SIDE, BATCH = 4, 8, 8
CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def data(images: int = 4 * BATCH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(images) % CLASSES
    return torch.randn(images, 3, SIDE, SIDE, dtype=dtype, generator=generator), target


def resnet(width: float = 0.5, seed: int = 0) -> ResNet:
    """A residual network of 8, 16 and 32 channels whose normalisations are not at their defaults, in train mode."""
    torch.manual_seed(seed)
    model = ResNet(1, num_classes=CLASSES, width_mult=width).double()
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low in ((layer.weight, 0.5), (layer.bias, -0.5), (layer.running_var, 0.5)):
                assert tensor is not None
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model.train()


def deep_resnet(seed: int = 0) -> ResNet:
    """One of three blocks a stage, 4, 8 and 16 channels wide, of which seven blocks can be removed."""
    torch.manual_seed(seed)
    model = ResNet(3, num_classes=CLASSES, width_mult=0.25).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model.train()


class Plain(nn.Module):
    """Convolutions and linear layers with biases and no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.fc1 = nn.Linear(12, 10)
        self.fc2 = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3))
        return self.fc2(F.relu(self.fc1(x)))


def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Training:
    """A training function that counts what it does.

    Args:
        stops_after: Optimizer steps after which it ends whatever it was told; None: as told.
        fails_at: The step at which it raises.
    """

    def __init__(self, stops_after: int | None = None, fails_at: int | None = None) -> None:
        self.stops_after, self.fails_at = stops_after, fails_at
        self.steps = 0
        self.after_step: Callable[[int], Any] = lambda steps: None

    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_schedulers: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        images, target = data()
        limit = max_steps if max_steps is not None else len(images) // BATCH * (max_epochs or 1)
        limit = limit if self.stops_after is None else min(limit, self.stops_after)
        self.steps = 0
        model.train()
        while self.steps < limit:
            for i in range(0, len(images), BATCH):
                optimizer.zero_grad()
                loss = training_step((images[i : i + BATCH], target[i : i + BATCH]), model)
                loss.backward()
                if self.steps == self.fails_at:
                    raise RuntimeError("the data ran out")
                optimizer.step()
                self.steps += 1
                self.after_step(self.steps)
                if self.steps == limit:
                    return


def evaluator_of(model: nn.Module, training: Any = None, lr: float = 0.0, dummy: bool = True) -> TorchEvaluator:
    """NNI's own evaluator; by default it computes gradients and changes no weight."""
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=lr, momentum=0.9)
    return TorchEvaluator(training or Training(), optimizer, step, dummy_input=data()[0][:1] if dummy else None)


def sparsity(masks: dict[str, dict[str, Any]], layer: str, target: str = "weight") -> float:
    """Share of a layer's weights that is masked."""
    return 1 - float(masks[layer][target].double().mean())


def gone(masks: dict[str, dict[str, Any]], layer: str) -> list[int]:
    """Output channels of a layer that are masked."""
    weight = masks[layer]["weight"]
    return (weight.reshape(len(weight), -1).sum(1) == 0).nonzero().flatten().tolist()
