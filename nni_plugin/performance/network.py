"""The performance network: how accurate a network will be, from its architecture alone.

Gao et al., CVPR 2021. Layers are read as a sequence, so that what one keeps can depend on what others keep. Three of
them:

- :class:`PerformanceNetwork`, the supplement's Table 2: `FC_i(C_i, 16)`, batch normalisation and ReLU for each layer
  `i`; `GRU(16, 16)`, averaged over its steps; `FC(16, 1)`, sigmoid. The table does not say whether layers share a
  normalisation: here each has its own.
- :class:`ReleasedNetwork`, what the authors' code has instead: weight-normalised `FC_i(C_i, 128)` without bias, one
  layer normalisation for all, ReLU; a bidirectional `GRU(128, 64)`, of which the two final states are joined;
  `FC(128, 1)` without bias, sigmoid.
- :class:`LinearPredictor`, the baseline of Fig. 1: `FC(N, 1)` without bias, sigmoid.

The layers' FCs run as one batched product over widths padded with zeros; the weights are stored without padding, a row
for each gate. Cost: well below a thousandth of a training step of the network that is pruned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin.errors import SearchError

PredictorName = Literal["table2", "released", "linear"]


class Predictor(nn.Module):
    """Base of the predictors: maps architectures `[B, N]` to accuracies `[B]` in (0, 1).

    In eval mode a prediction does not depend on the others of its batch.
    """

    def train(self, mode: bool = True) -> Predictor:
        """Switch the normalisation; a GRU stays in train mode, where alone cuDNN gives gradients of inputs."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.GRU):
                module.train(True)
        return self


class PerformanceNetwork(Predictor):
    """The performance network of the supplement's Table 2.

    Args:
        widths: Number of gates of each layer, `C_i`.
        hidden: Width of what a layer is read as, and of the GRU.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 16) -> None:
        super().__init__()
        self.read = _LayerwiseLinear(widths, hidden, bias=True)
        self.norm = nn.BatchNorm1d(len(widths) * hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, architectures: Tensor) -> Tensor:
        """Map `[B, N]` to `[B]`."""
        read = self.read(architectures)
        sequence = torch.relu(self.norm(read.flatten(1))).reshape(read.shape)
        steps, _ = self.gru(sequence)
        return torch.sigmoid(self.head(steps.mean(1))).squeeze(1)


class ReleasedNetwork(Predictor):
    """The performance network of the authors' released code.

    Args:
        widths: Number of gates of each layer, `C_i`.
        hidden: Width of what a layer is read as; even.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 128) -> None:
        super().__init__()
        self.read = _LayerwiseLinear(widths, hidden, bias=False, weight_norm=True)
        self.norm = nn.LayerNorm(hidden)
        self.gru = nn.GRU(hidden, hidden // 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(hidden, 1, bias=False)

    def forward(self, architectures: Tensor) -> Tensor:
        """Map `[B, N]` to `[B]`."""
        sequence = torch.relu(self.norm(self.read(architectures)))
        _, final = self.gru(sequence)
        return torch.sigmoid(self.head(torch.cat([final[0], final[1]], dim=1))).squeeze(1)


class LinearPredictor(Predictor):
    """Logistic regression on all gates; monotone in each.

    Args:
        widths: Number of gates of each layer, `C_i`.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.head = nn.Linear(sum(widths), 1, bias=False)

    def forward(self, architectures: Tensor) -> Tensor:
        """Map `[B, N]` to `[B]`."""
        return torch.sigmoid(self.head(architectures)).squeeze(1)


def build_predictor(name: PredictorName, widths: Sequence[int], seed: int = 0) -> Predictor:
    """Build a predictor with weights drawn from a seed; the global random state stays as it was.

    Raises:
        SearchError: There is no predictor of that name.
    """
    kinds = {"table2": PerformanceNetwork, "released": ReleasedNetwork, "linear": LinearPredictor}
    if name not in kinds:
        raise SearchError(f"The predictor must be one of {', '.join(kinds)}, got {name!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        network: Predictor = kinds[name](widths)
    return network


class _LayerwiseLinear(nn.Module):
    """A fully connected layer of its own for each layer's gates, `[B, N]` to `[B, L, hidden]`."""

    index: Tensor

    def __init__(self, widths: Sequence[int], hidden: int, *, bias: bool, weight_norm: bool = False) -> None:
        super().__init__()
        layers, widest, size = len(widths), max(widths), sum(widths)
        weight = torch.empty(size, hidden)
        index = torch.full((layers, widest), size)
        start = 0
        for number, width in enumerate(widths):
            bound = 1 / math.sqrt(width)  # what torch gives a linear layer
            nn.init.uniform_(weight[start : start + width], -bound, bound)
            index[number, :width] = torch.arange(start, start + width)
            start += width
        self.register_buffer("index", index, persistent=False)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty(layers, hidden)) if bias else None
        if self.bias is not None:
            for row, width in zip(self.bias.data, widths, strict=True):
                nn.init.uniform_(row, -1 / math.sqrt(width), 1 / math.sqrt(width))
        self.scale = nn.Parameter(self._padded_weight().norm(dim=1, keepdim=True).detach()) if weight_norm else None

    def forward(self, architectures: Tensor) -> Tensor:
        padded = F.pad(architectures, (0, 1))[:, self.index].transpose(0, 1)  # [L, B, widest]
        weight = self._padded_weight()
        if self.scale is not None:
            weight = self.scale * F.normalize(weight, dim=1)
        read = torch.bmm(padded, weight).transpose(0, 1)
        return read if self.bias is None else read + self.bias

    def _padded_weight(self) -> Tensor:
        """Return the weights of each layer, zeros beyond its width, `[L, widest, hidden]`."""
        return F.pad(self.weight, (0, 0, 0, 1))[self.index]
