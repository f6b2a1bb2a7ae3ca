"""Follows NNI's pruning/test_channel_dependency.py: which convolutions share channels, and which only look like it."""

from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.pruners import L1NormPruner

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(3, channels, 3, padding=1)


class Batches(nn.Module):
    """Joined along the batch and then added: one channel of any is one channel of all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (conv(16) for _ in range(4))
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = ((self.conv1, self.conv2), (self.conv3, self.conv4))
        return self.out(torch.cat([layer(x) for layer in left]) + torch.cat([layer(x) for layer in right]))


class Channels(nn.Module):
    """Joined along the channels: each keeps its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.out = conv(16), conv(32), nn.Conv2d(48, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.conv1(x), self.conv2(x)], 1))


class Sums(nn.Module):
    """Added once their channels are summed up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(16), conv(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x).sum(1) + self.conv2(x).sum(1)


def masks_of(model: nn.Module, *names: str) -> dict[str, dict[str, Any]]:
    pruner = L1NormPruner(model, [{"op_names": list(names), "sparse_ratio": 0.5}], example_inputs=X)
    masks: dict[str, dict[str, Any]] = pruner.compress()[1]
    return masks


def test_joined_along_the_batch() -> None:
    """NNI names two pairs; the addition makes them one."""
    masks = masks_of(Batches(), "conv1")
    assert set(masks) == {f"conv{i}" for i in (1, 2, 3, 4)}
    rows = [masks[f"conv{i}"]["weight"].flatten(1).any(1) for i in (1, 2, 3, 4)]
    assert int(rows[0].sum()) == 8
    assert all(torch.equal(rows[0], other) for other in rows)


def test_joined_along_the_channels() -> None:
    assert set(masks_of(Channels(), "conv1")) == {"conv1"}
    masks = masks_of(Channels(), "conv1", "conv2")
    assert [float(masks[name]["weight"].mean()) for name in ("conv1", "conv2")] == [0.5, 0.5]


def test_summed_up() -> None:
    """Independent in NNI's eyes, and they are: what is zero adds nothing to a sum over channels."""
    masks = masks_of(Sums(), "conv1")
    assert set(masks) == {"conv1"}
    assert float(masks["conv1"]["weight"].mean()) == 0.5
