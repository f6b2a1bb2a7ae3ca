"""What every channel criterion is: scores per coupled channel, from data gathered inside a context.

A criterion is called with a group and returns one score a channel; higher means keep. It takes our own
:class:`~nni_plugin.groups.ChannelGroup` as well as a group of Torch-Pruning, so the same object drives our
plans and serves as `importance=` of any stock Torch-Pruning pruner. Whatever data it needs is gathered inside
`collect`, one `update()` a minibatch, between the backward pass and the optimizer's step. Once channels have been cut
from the network, `reset()` comes before data are gathered anew: scores of the network before are refused.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.processes import summed
from nni_plugin.tensors import tensor_of


@dataclass(frozen=True)
class Conclusion:
    """What a criterion says of a choice of channels.

    Args:
        factors: What the gates that stay become, `[width]` by group name, zero where removed; groups not named stay.
        predicted_loss_change: In units of the loss; None where the criterion predicts no sign.
    """

    factors: Mapping[str, Tensor] = field(default_factory=dict)
    predicted_loss_change: float | None = None


class Criterion(ABC):
    """Base class of the channel criteria.

    Subclasses say what one minibatch contributes (:meth:`_gather`) and how a group is scored
    (:meth:`_score`); this class keeps the context, the state and the checks.
    """

    needs_gradients = True
    """Whether a backward pass must precede `update()`."""

    needs_graph = False
    """Whether that pass must be `loss.backward(create_graph=True)`."""

    needs_batch = False
    """Whether `update` must be given the minibatch."""

    needs_data = True
    """Whether any minibatch must be seen at all."""

    is_ranking = False
    """Whether scores are positions in one order of removal: neither averaged over windows nor divided by a cost."""

    predicts = False
    """Whether `conclude` predicts the loss change."""

    cost_aware = False
    """Whether the criterion itself weighs a channel's loss against what its removal saves, given in `costs`."""

    _shapes: dict[str, torch.Size]  # of the parameters, when minibatches were seen
    _last: weakref.ref[nn.Module] | None  # the network collected from, once that is over

    def __init__(self) -> None:
        self.loss_scale = 1.0
        self.costs: Mapping[str, float] = {}
        """What removing one channel saves, by group name, in units of the budget; set by the pruner."""
        self._batch: Any = None
        self.loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
        """The loss, for a criterion that runs the network itself."""
        self._model: nn.Module | None = None
        self._groups: tuple[ChannelGroup, ...] = ()
        self.reset()

    @contextmanager
    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> Iterator[Criterion]:
        """Watch a network while minibatches run; nothing stays on it afterwards.

        Args:
            model: The network whose gradients will be read; a distributed wrapper is looked through.
            groups: The groups that will be scored. With them memory stays at one number a channel; without
                them one row is kept per minibatch until a group is named.

        Raises:
            CriterionError: The network is frozen, or was cut since data were gathered that are still held, or this
                criterion is collecting already.
        """
        if self._model is not None:
            raise CriterionError(f"{type(self).__name__} is collecting already; leave the first context before.")
        model = getattr(model, "module", model) if hasattr(model, "device_ids") else model
        if self.needs_gradients and not any(parameter.requires_grad for parameter in model.parameters()):
            raise CriterionError(
                f"{type(self).__name__} needs gradients, but every parameter of {type(model).__name__} is frozen. "
                "Set requires_grad on the parameters to score, or choose a criterion without data."
            )
        if self._shapes:
            self._refuse_cut(model)
        self._model, self._groups = model, tuple(groups)
        try:
            yield self
        finally:
            self._model, self._groups = None, ()
            self._last = weakref.ref(model)

    def update(self, batch: Any = None, *, loss_scale: float = 1.0) -> None:
        """Take in one minibatch: call it after the backward pass and before the optimizer's step.

        Args:
            batch: The minibatch, for a criterion that runs the network on it itself (`needs_batch`).
            loss_scale: What the loss was multiplied with for `backward()`, as a gradient scaler does. Gradients of
                parameters must be unscaled by now; those that hooks saw are divided by it.

        Raises:
            CriterionError: Outside `collect`, the network was cut since the last minibatch, or this one left nothing
                to read.
        """
        if self._model is None:
            raise CriterionError(
                f"{type(self).__name__}.update() belongs inside `with criterion.collect(model):`, after backward()."
            )
        if self.needs_batch and batch is None:
            raise CriterionError(f"{type(self).__name__} runs the network itself: call update(batch).")
        shapes = self._refuse_cut(self._model) if self.needs_data else {}
        self.loss_scale, self._batch = loss_scale, batch
        try:
            self._gather(self._model)
        finally:
            self._batch = None
        self._shapes = shapes
        self.minibatches += 1

    def __call__(self, group: Any) -> Tensor:
        """Score the channels of a group.

        Args:
            group: A :class:`ChannelGroup`, or a group of Torch-Pruning holding all channels of its root.

        Returns:
            Scores, float32 or float64 on the CPU, shape `[width]`, higher = keep, in the order of the root.

        Raises:
            CriterionError: No data was collected, the network was cut since, a layer lacks what is needed, or a score
                is not finite.
        """
        group = ChannelGroup.from_host(group)
        self._check_seen()
        if self._shapes and (network := self._network_of(group)) is not None:
            # The group's own channels alone: whoever cuts group by group may ask for the next in between.
            for piece in (piece for member in group.members for piece in member.slices if piece.tensor in self._shapes):
                self._compare(piece.tensor, tensor_of(network, piece.tensor).shape, piece.dim)
        scores = self._score(group)
        if scores.shape != (group.width,) or not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).sum())
            raise CriterionError(
                f"{type(self).__name__} gave {bad} scores that are not finite for group {group.name!r}: the loss or "
                "a gradient was not finite. Lower the learning rate, or look at the data."
            )
        return scores

    def conclude(self, before: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Conclusion:
        """Say what a choice of channels means, while what was collected is still there.

        Args:
            before: Channels that were there, as ascending indices by group name.
            kept: Channels that stay.
        """
        return Conclusion()

    def reset(self) -> None:
        """Forget everything collected, as must be done once the network has been cut."""
        self.minibatches = 0
        self._shapes, self._last = {}, None

    def state_dict(self) -> dict[str, Any]:
        """Return what was collected, as nested dicts of tensors and numbers."""
        return {"minibatches": self.minibatches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        self.minibatches, self._shapes = int(state["minibatches"]), {}

    def all_reduce(self) -> None:
        """Sum what every process collected, so that all hold the same scores; nothing alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.minibatches = self._summed(self.minibatches)

    def _check_seen(self) -> None:
        """Refuse to score without data.

        Raises:
            CriterionError: The criterion needs data and has seen none.
        """
        if self.needs_data and self.minibatches == 0:
            raise CriterionError(
                f"{type(self).__name__} has seen no minibatch: run some inside `with criterion.collect(model):`, "
                "calling criterion.update() after each backward()."
            )

    def _network_of(self, group: ChannelGroup) -> nn.Module | None:
        """Return the network being collected from; outside, the one a group came with, else the one collected last."""
        if self._model is not None:
            return self._model
        graph = getattr(group.host, "_DG", None)
        if graph is not None:
            network: nn.Module = graph.model
            return network
        return None if self._last is None else self._last()

    def _refuse_cut(self, model: nn.Module) -> dict[str, torch.Size]:
        """Refuse to go on where parameters had other shapes when data were gathered; returns those of now."""
        now = {name: parameter.shape for name, parameter in model.named_parameters()}
        for name, shape in now.items():
            self._compare(name, shape)
        return now

    def _compare(self, name: str, now: torch.Size, dim: int | None = None) -> None:
        before = self._shapes.get(name, now)
        if before != now and (dim is None or before[dim : dim + 1] != now[dim : dim + 1]):
            raise CriterionError(
                f"The network was cut since these scores were gathered ({name!r} had shape {tuple(before)}, now "
                f"{tuple(now)}): call reset() of {type(self).__name__} and collect again."
            )

    @staticmethod
    def _summed(number: int) -> int:
        """Return a number summed over all processes."""
        return int(summed(torch.tensor(number)))

    @abstractmethod
    def _gather(self, model: nn.Module) -> None:
        """Take in one minibatch."""

    @abstractmethod
    def _score(self, group: ChannelGroup) -> Tensor:
        """Return the scores of a group, shape `[width]`."""
