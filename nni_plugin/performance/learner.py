"""The performance network at work: it learns from the memory, and says how accuracy would rise.

Gao et al., CVPR 2021. What the gates minimise is `log(1 / PN(a))`. Gates are 0 and 1, on which a network that was
trained on means of them says little between; the released code adds noise before the performance network reads them,
and cuts to [0, 1], where a gate that left the interval gets no gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nni_plugin.performance.memory import EpisodicMemory
from nni_plugin.performance.network import build_predictor
from nni_plugin.performance.options import SearchOptions

_LEAST_ACCURACY = 1e-6
"""Predictions below count as this: `log(1/PN)` has no bound."""


class PredictorLearner:
    """A performance network, its memory and its optimizer.

    Args:
        widths: Number of gates of each layer.
        options: How the search goes; its mode has a performance network.
        device: Where the gates are.

    Attributes:
        predictor: The performance network.
        memory: What it learns from.
        updates: How often it has learned.
    """

    def __init__(self, widths: Sequence[int], options: SearchOptions, device: torch.device) -> None:
        self.options = options
        name = "linear" if options.mode == "linear" else options.predictor
        self.predictor = build_predictor(name, widths, options.seed).to(device)
        self.memory = EpisodicMemory(options.memory, options.average, options.bins)
        self.updates = 0
        self._optimizer = torch.optim.AdamW(
            self.predictor.parameters(), lr=options.predictor_lr, weight_decay=options.predictor_decay
        )

    @property
    def leads(self) -> bool:
        """Whether it has learned enough for the gates to follow it."""
        return self.updates >= max(1, self.options.predictor_warmup)

    def maximise(self, architecture: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the gradient of `log(1 / PN(a))` with respect to `a`, shape `[N]`, and the prediction.

        Args:
            architecture: Gates, shape `[N]`, that require a gradient.
            generator: Of the CPU, for the noise.
        """
        self.predictor.eval()
        read = architecture
        if self.options.noise:
            noise = torch.randn(architecture.shape, generator=generator, dtype=torch.float64)
            read = (architecture + self.options.noise * noise.to(architecture)).clamp(0, 1)
        predicted = self.predictor(read[None]).squeeze(0)
        (gradient,) = torch.autograd.grad(-predicted.clamp(min=_LEAST_ACCURACY).log(), architecture)
        return gradient, predicted.detach()

    def learn(self, architecture: Tensor, accuracy: float, generator: torch.Generator) -> float:
        """Remember a step, and learn from the memory once it holds enough.

        Args:
            architecture: Gates, shape `[N]`.
            accuracy: In [0, 1].
            generator: Of the CPU, for the draw from the memory.

        Returns:
            The loss of the performance network, in units of accuracy (squared for `"mse"`); `nan` before it learns.
        """
        self.memory.add(architecture, accuracy)
        if len(self.memory) < self.options.predictor_start:
            return math.nan
        architectures, accuracies = self.memory.sample(self.options.predictor_batch, generator)
        self.predictor.train()
        measure = F.l1_loss if self.options.predictor_loss == "l1" else F.mse_loss
        loss = measure(self.predictor(architectures), accuracies)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self.updates += 1
        return float(loss.detach())

    @torch.no_grad()
    def predict(self, architectures: Tensor) -> Tensor:
        """Return the accuracies predicted of architectures `[B, N]`, shape `[B]`."""
        self.predictor.eval()
        predicted: Tensor = self.predictor(architectures)
        return predicted

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as nested dicts and lists of tensors and numbers."""
        return {
            "predictor": {name: tensor.clone() for name, tensor in self.predictor.state_dict().items()},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "memory": self.memory.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        self.predictor.load_state_dict(state["predictor"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.memory.load_state_dict(state["memory"], next(self.predictor.parameters()).device)
        self.updates = int(state["updates"])
