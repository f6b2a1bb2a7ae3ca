"""What is watched while a network is pruned: accuracy along the way, and a costly criterion only where it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nni_plugin.adapters.training import Callback, TrainingState, evaluate
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.groups import ChannelGroup
from nni_plugin.scorer import Scorer


class LastMinibatchScorer(Scorer):
    """A scorer that gathers on the last minibatch before each step alone, for a criterion that costs too much.

    Args:
        criterion: See :class:`~nni_plugin.scorer.Scorer`.
    """

    def update(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        *,
        due: bool,
        batch: Any = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Take in a minibatch if scores are asked for next."""
        if due:
            super().update(model, groups, due=due, batch=batch, loss_scale=loss_scale)


class Progress(Callback):
    """Test accuracy, mean training loss and channels left while a pruner works, and accuracy when it is done.

    Put it after the pruner. Evaluating draws no random number: the run is the same with and without.

    Args:
        pruner: The pruner to follow.
        loader: Test data.
        every: Minibatches between two points; None for none.
    """

    def __init__(self, pruner: ChannelPruner, loader: Any, every: int | None = None) -> None:
        self.pruner, self.loader, self.every = pruner, loader, every
        self.after_pruning: float | None = None
        self.points: list[dict[str, float]] = []
        self._loss_sum, self._minibatches = 0.0, 0
        self._state: TrainingState | None = None

    def on_train_begin(self, state: TrainingState) -> None:
        """Note the run."""
        self._state = state

    def on_backward(self, loss: float) -> None:
        """Add up the loss."""
        self._loss_sum += loss
        self._minibatches += 1

    def on_step(self) -> None:
        """Evaluate once pruning is over, and at every point of the curve."""
        assert self._state is not None
        if self.pruner.done and self.after_pruning is None:
            self.after_pruning = self._top1()
        if self.every is not None and self._state.step % self.every == 0:
            point = {
                "step": self._state.step,
                "train_loss": self._loss_sum / self._minibatches,
                "channels": self.pruner.size().channels,
                "top1": self._top1(),
            }
            self.points.append(point)
            self._loss_sum, self._minibatches = 0.0, 0

    def _top1(self) -> float:
        return evaluate(self.pruner.model, self.loader)["top1"]

    def state_dict(self) -> dict[str, Any]:
        """Return the points so far and the open sums."""
        open_sums = [self._loss_sum, self._minibatches]
        return {"after": self.after_pruning, "points": [dict(point) for point in self.points], "open": open_sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.after_pruning, self.points = state["after"], [dict(point) for point in state["points"]]
        self._loss_sum, self._minibatches = state["open"]
