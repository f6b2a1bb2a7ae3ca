"""Scores of all groups over a run: windows of minibatches, and a moving average over windows.

The seam between our criteria, which gather data minibatch by minibatch, and the stock importances of
Torch-Pruning, which read the gradients as they are when they are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

ForeignCriterion = Callable[[Any], "Tensor | None"]
"""A stock importance of Torch-Pruning: called with the graph's own group; None leaves the group whole."""


class Scorer:
    """Gathers what a criterion needs and keeps the moving average of its scores.

    Args:
        criterion: One of ours (what it has collected before is forgotten), or any stock importance of Torch-Pruning.
    """

    def __init__(self, criterion: Criterion | ForeignCriterion) -> None:
        self.criterion = criterion
        if isinstance(criterion, Criterion):
            criterion.reset()
        self.range: dict[str, tuple[float, float]] = {}
        self._average: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}
        self._stack = ExitStack()
        self._collecting = False

    @property
    def foreign(self) -> bool:
        """Whether the criterion is a stock one that reads gradients by itself."""
        return not isinstance(self.criterion, Criterion)

    @property
    def needs_gradients(self) -> bool:
        """Whether minibatches must run before scores are asked for."""
        if isinstance(self.criterion, Criterion):
            return self.criterion.needs_data
        return bool(getattr(self.criterion, "needs_gradients", True))

    @property
    def needs_graph(self) -> bool:
        """Whether backward passes must be `loss.backward(create_graph=True)`."""
        return isinstance(self.criterion, Criterion) and self.criterion.needs_graph

    def open(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Start watching, before the forward pass of the first minibatch; nothing when watching already."""
        if isinstance(self.criterion, Criterion) and not self._collecting:
            self._stack.enter_context(self.criterion.collect(model, groups))
            self._collecting = True

    def update(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        *,
        due: bool,
        batch: Any = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Take in one minibatch after its backward pass; `due` says that scores will be asked for next."""
        if isinstance(self.criterion, Criterion):
            self.open(model, groups)
            self.criterion.update(batch, loss_scale=loss_scale)
        elif due:
            self.read(groups)

    def read(self, groups: Sequence[ChannelGroup]) -> None:
        """Ask a stock importance now, while the gradients are there."""
        if not isinstance(self.criterion, Criterion):
            found = {group.name: self.criterion(group.host) for group in groups if group.host is not None}
            self._fresh = {name: score.detach().cpu() for name, score in found.items() if score is not None}

    def scores(self, groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor], momentum: float) -> dict[str, Tensor]:
        """Return the averaged scores of every group; the window is over.

        Args:
            groups: The groups to score.
            kept: Channels still there, as index tensors; the others get `-inf`, to go first.
            momentum: Weight of the earlier average.

        Returns:
            Scores by group name, float64, shape `[width]`; `inf` for a group that a stock importance skips.

        Raises:
            CriterionError: A score is not a number, or of the wrong shape.
        """
        self.close()  # whoever copies the network now finds no hook on it
        if isinstance(self.criterion, Criterion):
            self.criterion.all_reduce()
            fresh = {group.name: self.criterion(group) for group in groups}
            self.criterion.reset()
        else:
            fresh, self._fresh = self._fresh, {}
        result = {}
        for group in groups:
            if group.name not in fresh:  # a stock importance that skips a group wants it whole
                result[group.name] = torch.full((group.width,), math.inf, dtype=torch.float64)
                continue
            score = fresh[group.name].double()
            if score.shape != (group.width,) or bool(torch.isnan(score).any()):
                raise CriterionError(
                    f"{self} gave scores of shape {tuple(score.shape)}, {int(torch.isnan(score).sum())} of them not a "
                    f"number, for group {group.name!r} of {group.width} channels."
                )
            before = self._average.get(group.name)
            score = score if before is None else momentum * before + (1 - momentum) * score
            self._average[group.name] = score
            alive = score[kept[group.name]]
            if bool(torch.isfinite(alive).all()):
                self.range[group.name] = (float(alive.min()), float(alive.max()))
            result[group.name] = torch.full_like(score, -math.inf)
            result[group.name][kept[group.name]] = alive
        return result

    def narrow(self, kept: Mapping[str, Tensor]) -> None:
        """Follow a physical cut: the averages keep only these channels."""
        self._average = {name: score[kept[name]] for name, score in self._average.items()}
        self.close()

    def close(self) -> None:
        """Stop collecting; whatever was put on the network leaves it."""
        self._stack.close()
        self._collecting = False

    def state_dict(self) -> dict[str, Any]:
        """Return averages, ranges and the open window."""
        window = self.criterion.state_dict() if isinstance(self.criterion, Criterion) else {}
        return {"average": dict(self._average), "range": dict(self.range), "window": window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        self._average, self.range = dict(state["average"]), dict(state["range"])
        if isinstance(self.criterion, Criterion):
            self.criterion.load_state_dict(state["window"])

    def __str__(self) -> str:
        """Name the criterion and its options."""
        kind = type(self.criterion)
        if not isinstance(self.criterion, Criterion):
            return f"{kind.__module__}.{kind.__name__}"
        options = [
            f"{k}={v!r}" for k, v in vars(self.criterion).items() if not k.startswith("_") and k != "minibatches"
        ]
        return f"{kind.__name__}({', '.join(options)})"
