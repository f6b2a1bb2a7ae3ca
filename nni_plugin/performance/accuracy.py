"""How accurate a network with gates is on minibatches, from the forward pass that its loss has made anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.cost import tensors_in
from nni_plugin.errors import DataError, SearchError
from nni_plugin.performance.hooks import GateHooks, frozen
from nni_plugin.performance.memory import check_accuracy

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)` -> a finite scalar, the mean over the samples of the minibatch."""

AccuracyFn = Callable[[Any, Any], "Tensor | float"]
"""`accuracy_fn(output, batch)` -> a fraction in [0, 1], from what the network returned on the minibatch."""


def top1(output: Any, batch: Any) -> Tensor:
    """Return the fraction of samples whose largest logit is at their label.

    Args:
        output: Logits `[B, classes]`, or a tuple or dict whose first tensor they are.
        batch: `(images, labels)`, labels int64 `[B]` or class probabilities `[B, classes]`.

    Raises:
        SearchError: The minibatch or the output is of another form.
    """
    found = tensors_in(output)
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not found or found[0].dim() != 2 or not isinstance(labels, Tensor) or len(labels) != len(found[0]):
        raise SearchError(
            "Top-1 accuracy needs logits [B, classes] and minibatches (images, labels): give accuracy_fn(output, "
            "batch) -> a fraction in [0, 1] for others."
        )
    labels = labels.to(found[0].device)
    target = labels.argmax(1) if labels.dim() == 2 else labels
    return (found[0].argmax(1) == target).float().mean()


class GatedNetwork:
    """A frozen network with gates, and what it does on minibatches.

    A context manager that leaves no trace, and can be entered again inside.

    Args:
        model: The network.
        hooks: The gates' hooks on it.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar.
        accuracy_fn: `accuracy_fn(output, batch)` -> a fraction.
    """

    def __init__(self, model: nn.Module, hooks: GateHooks, loss_fn: LossFn, accuracy_fn: AccuracyFn = top1) -> None:
        self.model, self.hooks, self.loss_fn, self.accuracy_fn = model, hooks, loss_fn, accuracy_fn
        self._output: Any = None
        self._entered = 0
        self._stack = ExitStack()

    def __enter__(self) -> GatedNetwork:
        """Freeze the network and put the gates on, unless they are."""
        if self._entered == 0:
            with ExitStack() as stack:  # undone where one of these fails
                stack.enter_context(frozen(self.model))
                stack.enter_context(self.hooks)
                stack.callback(self.model.register_forward_hook(self._note).remove)
                self._stack = stack.pop_all()
        self._entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        """Take the gates off and put the network's modes and parameters back, if this was the first to enter."""
        self._entered -= 1
        self._output = None
        if self._entered == 0:
            self._stack.close()

    def run(self, architecture: Tensor, batch: Any) -> tuple[Tensor, Tensor, int]:
        """Run a minibatch.

        Args:
            architecture: One value a gate, shape `[N]`.
            batch: What `loss_fn` takes.

        Returns:
            The loss, a scalar that depends on the gates; the accuracy, without gradient; the number of samples.

        Raises:
            SearchError: `loss_fn` gives no scalar, or does not call the network.
        """
        self._output = None
        self.hooks.set(architecture)
        loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise SearchError(f"loss_fn must return a scalar tensor, got {loss}.")
        if self._output is None:
            raise SearchError("loss_fn must call the network that it is given: model(images).")
        self.hooks.check_reached()
        with torch.no_grad():
            accuracy = torch.as_tensor(self.accuracy_fn(self._output, batch)).detach()
        found = tensors_in(self._output)
        return loss, accuracy.reshape(()), len(found[0]) if found and found[0].dim() else 1

    @torch.no_grad()
    def evaluate(self, architecture: Tensor, batches: Iterable[Any]) -> tuple[float, float]:
        """Return the mean loss and the accuracy over minibatches.

        Args:
            architecture: One value a gate, shape `[N]`.
            batches: Minibatches, gone through once.

        Raises:
            DataError: There is none.
            SearchError: The loss is not finite, or the accuracy no fraction.
        """
        samples, losses, accuracies = 0, [], []
        for batch in batches:
            loss, accuracy, number = self.run(architecture, batch)
            losses.append(float(loss) * number)
            accuracies.append(float(accuracy) * number)
            samples += number
        if samples == 0:
            raise DataError("There is no minibatch to evaluate on: the loader is empty (or used up).")
        mean_loss, mean_accuracy = math.fsum(losses) / samples, math.fsum(accuracies) / samples
        if not math.isfinite(mean_loss):
            raise SearchError(f"The loss of a candidate is {mean_loss}: the network overflows. It is unchanged.")
        check_accuracy(mean_accuracy)
        return mean_loss, mean_accuracy

    def _note(self, _: nn.Module, __: Any, output: Any) -> None:
        self._output = output
