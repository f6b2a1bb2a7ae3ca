"""One training run under a pruner: what is gathered at each step, and the step at which masks are made.

An evaluator lets others act around the optimizer's step and on the loss. Gradients are read just before the step;
criteria that differentiate twice, or run the network themselves, do so when the loss has been computed. Whatever was
put on the network or the evaluator is taken off when the training ends, also by an exception.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.pruners.evaluators import training_loss, untrained
from nni_plugin.pruners.wrapping import unwrapped


class Observer(Protocol):
    """What gathers data while an evaluator trains: any criterion of `nni_plugin.criteria`, or :class:`Minibatches`."""

    needs_data: bool
    """Whether any minibatch must be seen at all."""

    needs_graph: bool
    """Whether gradients must be differentiable once more."""

    needs_batch: bool
    """Whether `update` is given the minibatch, when its loss has been computed."""

    loss_fn: Callable[[nn.Module, Any], Tensor] | None
    """The loss, for one that is given minibatches; the evaluator's unless it has one already."""

    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> AbstractContextManager[Any]:
        """Watch a network while minibatches run."""

    def update(self, batch: Any = None) -> None:
        """Take in one minibatch."""

    def reset(self) -> None:
        """Forget everything gathered."""


@dataclass(frozen=True)
class Schedule:
    """When masks are made, in optimizer steps.

    Args:
        window: Steps before it over which scores are gathered; 0 without data.
        interval: Steps from one time to the next.
        times: How often; may be infinite.
    """

    window: int
    interval: int
    times: float


class Run:
    """Gathers scores and has masks made while an evaluator trains.

    Args:
        model: The wrapped network.
        observer: What gathers.
        groups: The groups to score, for a criterion.
        schedule: When masks are due.
        regenerate: Makes masks from what was gathered.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: Observer,
        groups: Sequence[ChannelGroup],
        schedule: Schedule,
        regenerate: Callable[[], None],
    ) -> None:
        self.model, self.observer, self.groups = model, observer, groups
        self.schedule, self.regenerate = schedule, regenerate
        self.step, self.steps, self.times = 0, 0, 0
        self._collecting = ExitStack()
        self._open = False
        self._strays: list[nn.Parameter] = []
        self._on_loss = observer.needs_graph or observer.needs_batch

    def attach(self, evaluator: Any) -> None:
        """Act around the optimizer's step of an evaluator that is bound and about to train."""
        self.observer.reset()
        lends = self.observer.needs_batch and self.observer.loss_fn is None
        if lends:
            self.observer.loss_fn = training_loss(evaluator)
        self._strays = untrained(evaluator, self.model)
        if self._on_loss:
            evaluator.patch_loss(self._at_loss)
        evaluator.patch_optimizer_step([self._before_step], [self._after_step])
        train = evaluator.train

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                result = train(*args, **kwargs)
                self._check_end()
            except BaseException:
                if evaluator.model is not None:
                    evaluator.unbind_model()
                raise
            finally:
                self._close()
                if lends:
                    self.observer.loss_fn = None
                evaluator.__dict__.pop("train", None)
            return result

        evaluator.__dict__["train"] = guarded
        self._open_if_due()

    def _before_step(self) -> None:
        if self._open and not self._on_loss:
            with unwrapped(self.model):
                self.observer.update()

    def _after_step(self) -> None:
        self.steps += 1
        for parameter in self._strays:  # or gradients of several steps add up
            parameter.grad = None
        if self.times >= self.schedule.times:
            return
        self.step += 1
        if self.step == self.schedule.interval:
            self._close()
            self.regenerate()
            self.observer.reset()
            self.step, self.times = 0, self.times + 1
        self._open_if_due()

    def _at_loss(self, loss: Tensor, batch: Any) -> Tensor:
        if not self._open or not loss.requires_grad:  # a validation step that shares the function
            return loss
        if self.observer.needs_graph:
            with unwrapped(self.model), _gradients_with_graph(self.model, loss):
                self.observer.update(batch)
        else:
            with unwrapped(self.model, masked=True), torch.random.fork_rng():
                self.observer.update(batch)
        return loss

    def _open_if_due(self) -> None:
        """Start to gather when the next step lies in the window."""
        due = self.times < self.schedule.times and self.step >= self.schedule.interval - self.schedule.window
        if due and not self._open and self.schedule.window:
            with unwrapped(self.model):
                self._collecting.enter_context(self.observer.collect(self.model, self.groups))
            self._open = True

    def _close(self) -> None:
        self._collecting.close()
        self._open = False

    def _check_end(self) -> None:
        """See to it that masks were made as often as asked.

        Raises:
            CriterionError: Not once.
        """
        wanted = self.schedule.times
        if self.times >= (1 if math.isinf(wanted) else wanted):
            return
        said = (
            f"The evaluator's training ended after {self.steps} optimizer steps, but masks are due "
            f"{'' if wanted == 1 else 'each time '}after {self.schedule.interval}"
        )
        if self.times == 0:
            raise CriterionError(
                f"{said}: there are none. Let training_func make max_steps steps with the optimizer that it is given, "
                "going through the data anew where it ends, or lower training_steps (interval_steps)."
            )
        warnings.warn(f"{said}: masks are those of {self.times} of {wanted:.0f} times.", stacklevel=2)


@contextmanager
def _gradients_with_graph(model: nn.Module, loss: Tensor) -> Iterator[None]:
    """Show gradients of a loss that can be differentiated again; the loss can still be, and gradients are put back."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in parameters]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        yield
    finally:
        for parameter, own in zip(parameters, before, strict=True):
            parameter.grad = own
