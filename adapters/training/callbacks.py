"""What a training run shows to the objects that follow it, and the base class of those objects."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class TrainingState:
    """The live objects of a run, shared with its callbacks; valid until `fit` returns.

    A callback may shrink the model: the parameter objects stay, their `.data` shrinks, and the callback
    shrinks the optimizer's state and `ema` alike.

    Attributes:
        model: The network being trained, without any wrapper.
        optimizer: The torch optimizer itself, without Accelerate's wrapper.
        ema: The averaged copy of the network, or None when weights are not averaged.
        accelerator: The `accelerate.Accelerator` of this run.
        step: Minibatches finished since the start of the run.
        epoch: Epochs finished since the start of the run.
        total_steps: Minibatches of the whole run.
        batch: The minibatch at work, `(images, targets)` as the loss sees them.
        loss_scale: What the gradient scaler multiplied the loss of this minibatch with; 1 without one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None
    accelerator: Any
    step: int
    epoch: int
    total_steps: int
    batch: Any = None
    loss_scale: float = 1.0


class Callback:
    """Base class of what follows a training run; every method does nothing until overridden."""

    needs_graph = False
    """Whether gradients must be differentiable again (`backward(create_graph=True)`)."""

    def on_train_begin(self, state: TrainingState) -> None:
        """Called once before the first minibatch; on a resumed run, before `load_state_dict`.

        The model then is as it was built, and `state.step` already says where the run goes on.

        Args:
            state: Live view of the run; keep it to reach the model later.
        """

    def on_backward(self, loss: float) -> None:
        """Called when the gradients are there and unscaled, before clipping and the optimizer's step.

        Not called, nor is `on_step`, for a minibatch that fp16 training skips since its gradients overflowed.

        Args:
            loss: Mean loss of the minibatch (over all processes), finite.
        """

    def on_step(self) -> None:
        """Called after the optimizer's and the scheduler's step, before the averaged copy follows.

        The model may be shrunk here.
        """

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        """Called after each epoch, before its checkpoint is written.

        Args:
            epoch: Index of the epoch, from 0.
            metrics: The row of history that `fit` is going to return for it.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers, strings, and lists, tuples or dicts of them.

        Of several processes each gets its own state back.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state_dict` was taken.

        Called before weights and optimizer are loaded: a callback that had shrunk the model shrinks the
        freshly built one (and the averaged copy) to the same shapes here.

        Args:
            state: What `state_dict` returned, tensors on the CPU.
        """
