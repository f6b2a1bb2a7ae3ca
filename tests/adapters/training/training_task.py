"""A tiny classification task, small networks, and callbacks that record, kill and shrink."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_plugin.adapters.training import Callback, TrainingState

CLASSES = 4


def loader(images: int = 64, batch_size: int = 8, seed: int = 0, shuffle: bool = True) -> DataLoader[Any]:
    """Noise with a bright corner that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(images) % CLASSES
    pictures = torch.randn(images, 3, 8, 8, generator=generator)
    for index, label in enumerate(target.tolist()):
        row, column = divmod(label, 2)
        pictures[index, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
    return DataLoader(TensorDataset(pictures, target), batch_size=batch_size, shuffle=shuffle)


class Tiny(nn.Module):
    """Two convolutions with batch norm, dropout, and two linear layers whose hidden width can shrink."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(128, 12)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.hidden(self.features(images)).relu()))


def tiny(seed: int = 0, dropout: float = 0.2) -> Tiny:
    """The same network for the same seed."""
    torch.manual_seed(seed)
    return Tiny(dropout)


class Recorder(Callback):
    """Writes down the names of the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.losses: list[float] = []

    def on_train_begin(self, state: TrainingState) -> None:
        self.state = state
        self.calls.append("begin")

    def on_backward(self, loss: float) -> None:
        self.calls.append("backward")
        self.losses.append(loss)

    def on_step(self) -> None:
        self.calls.append("step")

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        self.calls.append(f"epoch {epoch}")


class Kill(Callback):
    """Interrupts the run after `at` minibatches, unless `at` is None."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_begin(self, state: TrainingState) -> None:
        self.state = state

    def on_step(self) -> None:
        if self.state.step == self.at:
            raise KeyboardInterrupt


class Shrink(Callback):
    """At given minibatches, cuts the hidden units with the smallest running mean of |gradient|."""

    def __init__(self, at: tuple[int, ...] = (6, 13), count: int = 3) -> None:
        self.at, self.count = at, count
        self.kept = torch.arange(12)
        self.score = torch.zeros(12)

    def on_train_begin(self, state: TrainingState) -> None:
        self.state = state

    def on_backward(self, loss: float) -> None:
        gradient = self.state.model.hidden.weight.grad
        self.score = 0.9 * self.score + 0.1 * gradient.abs().mean(dim=1)

    def on_step(self) -> None:
        if self.state.step in self.at:
            order = self.score.argsort(descending=True)
            self._keep(order[: len(order) - self.count].sort().values)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "score": self.score}

    def load_state_dict(self, state: Any) -> None:
        self._keep(state["kept"])
        self.score = state["score"]

    def _keep(self, index: torch.Tensor) -> None:
        self.kept, self.score = self.kept[index], self.score[index]
        for model in filter(None, (self.state.model, self.state.ema)):
            for parameter, dim in ((model.hidden.weight, 0), (model.hidden.bias, 0), (model.head.weight, 1)):
                full = parameter.shape
                parameter.data = parameter.data.index_select(dim, index)
                parameter.grad = None
                slots = self.state.optimizer.state.get(parameter, {})
                for name, value in slots.items():
                    if isinstance(value, torch.Tensor) and value.shape == full:
                        slots[name] = value.index_select(dim, index)
            model.hidden.out_features = model.head.in_features = len(index)
