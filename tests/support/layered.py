"""Small networks with blocks that can leave whole, in float64, and minibatches in which every class occurs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from networks_at_random import conv_bn, randomise
from torch import Tensor, nn

CLASSES = 4
SIDE = 6
WIDTH = 6

Batch = tuple[Tensor, Tensor]


class Residual(nn.Module):
    """A basic block: two convolutions with BN and an identity around them, then an activation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(*conv_bn(width, inner), nn.ReLU())
        self.inside = nn.Sequential(*conv_bn(inner, width))
        self.after = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.inside(self.reduce(x)))


def chain(blocks: int, *, strided: bool = False, seed: int = 0) -> nn.Sequential:
    """A stem, residual blocks 1..n, if `strided` a strided layer and n more blocks, mean and classifier."""
    torch.manual_seed(seed)
    stem = nn.Sequential(*conv_bn(3, WIDTH), nn.ReLU())
    layers: list[nn.Module] = [stem, *(Residual(WIDTH, 4) for _ in range(blocks))]
    if strided:
        between = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        layers += [between, *(Residual(WIDTH, 4) for _ in range(blocks))]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)]
    return randomise(nn.Sequential(*layers, *tail), seed)  # type: ignore[return-value]


def vgg(seed: int = 0) -> nn.Module:
    """A plain network with two layers of equal width behind a first one."""
    torch.manual_seed(seed)
    layers = [*conv_bn(3, WIDTH), nn.ReLU(), *conv_bn(WIDTH, WIDTH), nn.ReLU(), *conv_bn(WIDTH, WIDTH), nn.ReLU()]
    return randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)), seed)


def plant(block: nn.Module, *, whole: bool = False) -> None:
    """Make a residual block redundant: its last layer gives zero, or all its layers."""
    parts = block if whole else block.inside
    with torch.no_grad():
        for parameter in (parts if whole else parts[-1]).parameters():
            parameter.zero_()


def batches(number: int, size: int = 12, seed: int = 7) -> list[Batch]:
    """Noisy images of as many kinds as there are classes."""
    kinds = torch.randn(CLASSES, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        labels = torch.arange(size) % CLASSES
        noise = torch.randn(size, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)
        found.append((0.5 * kinds[labels] + noise, labels))
    return found


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
