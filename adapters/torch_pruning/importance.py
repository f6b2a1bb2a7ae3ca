"""Torch-Pruning's own importances by name, with its defaults, as its users call them.

Two names are not its defaults: `tp:taylor-tuned` is its Taylor without what harms a comparison over all groups (the
absolute value inside the sum over a filter, the mean over layers, the division by each group's own mean), and
`tp:group-norm` is the group norm of DepGraph's paper (CVPR 2023): squares summed over all coupled layers, undivided.

What they share: gradients are read as they lie in `.grad`, so several minibatches add up before the absolute value;
`tp:hessian` asks for the gradient of every sample, of which its accumulation keeps the last alone (version 1.6.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from nni_plugin.errors import CriterionError


class PerSampleHessian(tp.importance.GroupHessianImportance):  # type: ignore[misc]
    """Torch-Pruning's Hessian importance as it is, refusing to score gradients that were not accumulated by sample.

    `accumulate_grad(model)` must follow the backward pass of every sample; the planner sees that it is there and runs
    the samples of a minibatch one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen = 0

    def accumulate_grad(self, model: nn.Module) -> None:
        """Take in the gradients of one sample."""
        super().accumulate_grad(model)
        self._seen += 1

    def __call__(self, group: Any) -> Tensor | None:
        """Score a group.

        Raises:
            CriterionError: No sample was accumulated; plain gradients would be taken for squares.
        """
        if self._seen == 0:
            raise CriterionError(
                "tp:hessian needs the gradient of every sample, which a training loop does not give: score with a "
                "one-shot schedule, or call accumulate_grad(model) after the backward pass of each sample."
            )
        scores: Tensor | None = super().__call__(group)
        return scores


def _without_data(build: Callable[[], Any]) -> Callable[[], Any]:
    """Mark an importance that reads weights only, so that no minibatch is run for it."""

    def marked() -> Any:
        importance = build()
        importance.needs_gradients = False
        return importance

    return marked


IMPORTANCES: dict[str, Callable[[], Any]] = {
    "tp:magnitude": _without_data(tp.importance.GroupMagnitudeImportance),
    "tp:taylor": tp.importance.GroupTaylorImportance,
    "tp:taylor-tuned": lambda: tp.importance.GroupTaylorImportance(
        group_reduction="sum", normalizer=None, multivariable=True
    ),
    "tp:hessian": PerSampleHessian,
    "tp:lamp": _without_data(tp.importance.LAMPImportance),
    "tp:fpgm": _without_data(tp.importance.FPGMImportance),
    "tp:bn-scale": _without_data(tp.importance.BNScaleImportance),
    "tp:group-norm": _without_data(
        lambda: tp.importance.GroupMagnitudeImportance(group_reduction="sum", normalizer=None)
    ),
    "tp:random": _without_data(tp.importance.RandomImportance),
}
