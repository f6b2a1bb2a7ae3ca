"""Scores of all groups over a run: windows of minibatches, and a moving average over windows.

The seam between our criteria, which gather data minibatch by minibatch, and the stock importances of
Torch-Pruning, which read the gradients as they are when they are called.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_plugin.cost import tensors_in
from nni_plugin.criteria.base import Conclusion, Criterion
from nni_plugin.described import described
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

ForeignCriterion = Callable[[Any], "Tensor | None"]
"""A stock importance of Torch-Pruning: called with the graph's own group; None leaves the group whole."""


class Scorer:
    """Gathers what a criterion needs and keeps the moving average of its scores.

    Args:
        criterion: One of ours (what it has collected before is forgotten), or a stock importance of Torch-Pruning.

    Raises:
        CriterionError: An importance works inside a pruner of Torch-Pruning alone.
    """

    def __init__(self, criterion: Criterion | ForeignCriterion) -> None:
        if hasattr(criterion, "_prepare_model"):
            raise CriterionError(
                f"{type(criterion).__name__} works in Torch-Pruning's own pruners alone, which put its hooks on the "
                "layers. Plan with another importance, or with nni_plugin.criteria.TaylorFisher(), which reads squared "
                "gradients of every sample too. The model is unchanged."
            )
        self.criterion = criterion
        self._loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
        if isinstance(criterion, Criterion):
            criterion.reset()
        self.range: dict[str, tuple[float, float]] = {}
        self._average: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}
        self._stack = ExitStack()
        self.collecting = False
        """Whether it watches a network."""

    @property
    def foreign(self) -> bool:
        """Whether the criterion is a stock one that reads gradients by itself."""
        return not isinstance(self.criterion, Criterion)

    @property
    def needs_data(self) -> bool:
        """Whether minibatches must run before scores are asked for."""
        if isinstance(self.criterion, Criterion):
            return self.criterion.needs_data
        return bool(getattr(self.criterion, "needs_gradients", True))

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass must precede `update`."""
        return bool(getattr(self.criterion, "needs_gradients", True))

    @property
    def needs_graph(self) -> bool:
        """Whether backward passes must be `loss.backward(create_graph=True)`."""
        return isinstance(self.criterion, Criterion) and self.criterion.needs_graph

    def open(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Start watching, before the forward pass of the first minibatch; nothing when watching already."""
        if isinstance(self.criterion, Criterion) and not self.collecting:
            with ExitStack() as stack:
                if self.criterion.needs_batch and self.criterion.loss_fn is None:
                    self.criterion.loss_fn = self._loss_fn  # lent: the criterion may serve another planner later
                    stack.callback(setattr, self.criterion, "loss_fn", None)
                stack.enter_context(self.criterion.collect(model, groups))
                self._stack = stack.pop_all()
            self.collecting = True

    def evaluate_with(self, loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
        """Say what a criterion measures that runs the network itself, unless it was built with a loss.

        It has this loss from `open` to `close`.
        """
        self._loss_fn = loss_fn

    def backward(
        self, model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor], *, create_graph: bool = False
    ) -> float:
        """Run one minibatch, forward and back where gradients are needed; returns its loss.

        A stock importance that has `accumulate_grad(model)` is given the gradient of every sample instead.

        Raises:
            CriterionError: `loss_fn` gave no finite scalar that depends on parameters, a minibatch has no samples, or
                it is too small for the statistics of a batch normalisation in train mode.
        """
        if any(tensor.dim() > 0 and len(tensor) == 0 for tensor in tensors_in(batch)[:1]):
            raise CriterionError("The minibatch is empty: there is nothing to score with.")
        accumulate = None if isinstance(self.criterion, Criterion) else getattr(self.criterion, "accumulate_grad", None)
        if accumulate is None:
            return _backward(model, batch, loss_fn, gradients=self.needs_gradients, create_graph=create_graph)
        losses = []
        for sample in _samples(batch):
            model.zero_grad(set_to_none=True)
            losses.append(_backward(model, sample, loss_fn, gradients=True, create_graph=False))
            accumulate(model)
        return sum(losses) / len(losses)

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

    def read_unless_read(self, groups: Sequence[ChannelGroup]) -> None:
        """Ask a stock importance now, unless it was asked at the last minibatch."""
        if not self._fresh:
            self.read(groups)

    def read(self, groups: Sequence[ChannelGroup]) -> None:
        """Ask a stock importance now, while the gradients are there."""
        if not isinstance(self.criterion, Criterion):
            found = {group.name: self.criterion(group.host) for group in groups if group.host is not None}
            self._fresh = {name: score.detach().cpu() for name, score in found.items() if score is not None}

    def scores(
        self,
        groups: Sequence[ChannelGroup],
        kept: Mapping[str, Tensor],
        momentum: float,
        costs: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Return the averaged scores of every group; the window is over once `conclude` is called.

        Args:
            groups: The groups to score.
            kept: Channels still there, as index tensors; the others get `-inf`, to go first.
            momentum: Weight of the earlier average.
            costs: What removing one channel of each group saves: scores become loss per cost. None: loss per channel.

        Returns:
            Scores by group name, float64, shape `[width]`; `inf` for a group that a stock importance skips.

        Raises:
            CriterionError: A score is not a number, or of the wrong shape.
        """
        self.close()  # whoever copies the network now finds no hook on it
        if isinstance(self.criterion, Criterion):
            self.criterion.all_reduce()
            self.criterion.costs = costs or {}
            fresh = {group.name: self.criterion(group) for group in groups}
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
            if before is not None and not self.is_ranking:
                score = momentum * before + (1 - momentum) * score
            self._average[group.name] = score
            if costs is not None and not self.is_ranking:
                score = score / max(costs[group.name], 1e-12)
            alive = score[kept[group.name]]
            if bool(torch.isfinite(alive).all()):
                self.range[group.name] = (float(alive.min()), float(alive.max()))
            result[group.name] = torch.full_like(score, -math.inf)
            result[group.name][kept[group.name]] = alive
        return result

    @property
    def predicts(self) -> bool:
        """Whether the criterion predicts the loss change of a choice of channels."""
        return isinstance(self.criterion, Criterion) and self.criterion.predicts

    @property
    def is_ranking(self) -> bool:
        """Whether scores are positions in one order of removal."""
        return isinstance(self.criterion, Criterion) and self.criterion.is_ranking

    @property
    def cost_aware(self) -> bool:
        """Whether the criterion weighs loss against cost by itself."""
        return isinstance(self.criterion, Criterion) and self.criterion.cost_aware

    def conclude(self, before: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Conclusion:
        """Say what the criterion predicts of the choice made, and forget the window."""
        if not isinstance(self.criterion, Criterion):
            return Conclusion()
        said = self.criterion.conclude(before, kept)
        self.criterion.reset()
        return said

    def narrow(self, kept: Mapping[str, Tensor]) -> None:
        """Follow a physical cut: the averages keep only these channels."""
        self._average = {name: score[kept[name]] for name, score in self._average.items()}
        self.close()
        if isinstance(self.criterion, Criterion):
            self.criterion.reset()  # a window that is open, when the caller cuts, is of the wider network

    def close(self) -> None:
        """Stop collecting; whatever was put on the network leaves it."""
        self._stack.close()
        self.collecting = False

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
        return described(self.criterion)


def _backward(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    gradients: bool,
    create_graph: bool,
) -> float:
    try:
        # Fused attention has no second derivative.
        backends = sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()
        with torch.set_grad_enabled(gradients), backends:
            loss = loss_fn(model, batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise CriterionError(
            f"A batch normalisation in train mode cannot take statistics of a single value a channel ({error}): score "
            "in eval mode (model.eval()), or with minibatches of two samples and more (drop_last=True)."
        ) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0 or (gradients and not loss.requires_grad):
        raise CriterionError(
            f"loss_fn must return a scalar tensor that depends on parameters (requires_grad), got {loss}."
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise CriterionError(
            f"The loss of a minibatch is {value}: look at the data, and at what the network makes of them."
        )
    if gradients:
        with warnings.catch_warnings():
            # Gradients are cleared before the next minibatch, which ends the cycle that torch warns of.
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True", UserWarning)
            loss.backward(create_graph=create_graph)
    return value


def _samples(batch: Any) -> list[Any]:
    """Return a minibatch as minibatches of one sample, of the same form."""
    if isinstance(batch, Tensor) and batch.dim() > 0:
        parts: list[Any] = list(batch.split(1))
    elif isinstance(batch, Mapping):
        parts = [dict(zip(batch, row, strict=True)) for row in zip(*map(_samples, batch.values()), strict=True)]
    elif isinstance(batch, (tuple, list)):
        parts = list(zip(*map(_samples, batch), strict=True))
    else:
        parts = []
    if not parts:
        raise CriterionError(
            f"Gradients of every sample need minibatches of tensors, a sample a row, got {type(batch).__name__}."
        )
    return parts
