"""The minibatches that an evaluator trains on, kept until blocks are ranked with them.

An evaluator of NNI's has no data to hand out, it trains; what it trains on passes by. A layer importance wants two
passes over minibatches on one and the same network, so they are kept, in main memory, from the training steps before
blocks are ranked. A part of them, spread evenly, is held out: an importance measures on these and learns from the
others. Samples that come twice within those steps are in both parts; gather over an epoch at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nni_plugin.cost import on_device_of
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup


def held_out_places(number: int, share: float) -> list[int]:
    """Return which of some minibatches are held out, spread evenly: at least one, and at most all but one.

    Args:
        number: Minibatches, at least 2.
        share: Of them, in (0, 1).

    Example:
        >>> held_out_places(10, 0.2), held_out_places(2, 0.2)
        ([2, 7], [1])
    """
    held = min(max(round(number * share), 1), number - 1)
    return [(2 * place + 1) * number // (2 * held) for place in range(held)]


class Minibatches:
    """Keeps minibatches while an evaluator trains; an observer of :class:`~nni_plugin.pruners.run.Run`.

    Args:
        needs_data: Whether any are needed.
        needs_loss: Whether the evaluator's loss is as well; then `loss_fn` is that once training has begun.
    """

    needs_graph = False
    needs_batch = True

    def __init__(self, needs_data: bool, needs_loss: bool) -> None:
        self.needs_data = needs_data
        self.loss_fn: Callable[[nn.Module, Any], Tensor] | None = None if needs_loss else _no_loss
        self._kept: list[Any] = []

    @contextmanager
    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> Iterator[Minibatches]:
        """Watch nothing: minibatches are handed in."""
        yield self

    def update(self, batch: Any = None) -> None:
        """Keep a minibatch."""
        self._kept.append(_copied(batch))

    def reset(self) -> None:
        """Forget them all."""
        self._kept = []

    def __len__(self) -> int:
        """Count them."""
        return len(self._kept)

    def all(self, model: nn.Module) -> Sequence[Any]:
        """Return them all, each moved to the model's device when it is asked for."""
        return _OnDevice(model, self._kept)

    def split(self, model: nn.Module, share: float) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return those to learn from and those held out, each moved to the model's device when it is asked for.

        Raises:
            CriterionError: There are fewer than two.
        """
        if len(self) < 2:
            raise CriterionError(
                f"Of {len(self)} minibatches none can be held out: blocks are ranked with those of the last "
                "training_steps steps of an interval (interval_steps under a schedule); give at least 2 of both."
            )
        held = held_out_places(len(self), share)
        learn = [batch for place, batch in enumerate(self._kept) if place not in held]
        return _OnDevice(model, learn), _OnDevice(model, [self._kept[place] for place in held])


class _OnDevice(Sequence[Any]):
    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.model, self.batches = model, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: Any) -> Any:
        return on_device_of(self.model, self.batches[place])


def _copied(value: Any) -> Any:
    """Copy nested tensors to main memory: a training loop may use its own again for the next minibatch."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_copied(item) for item in value)
    return value


def _no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("an importance that needs no loss asked for one")
