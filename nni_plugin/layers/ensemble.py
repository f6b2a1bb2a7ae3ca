"""Several layer importances as one: each ranks the blocks, and a block's score is the sum of its ranks (Borda count).

Elkerdawy et al., LayerPrune, ACCV 2020, arXiv 2007.05667: criteria ranked 0 (leaves first) to `L - 1`, ties in the
order of the blocks. Ranks know nothing of scales, so importances in different units may be summed; one dissenting
member, however, weighs as much as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import CriterionError
from nni_plugin.layers.base import LayerImportance, LossFn, removal_order
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.statistics import LayerStatistic


def rank_sums(scorings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the sum of each block's ranks.

    Args:
        scorings: Score by block name, of the same blocks, lower = leaves first.

    Returns:
        By block name, whole numbers from 0, in the order of the first scoring.

    Example:
        >>> rank_sums([{"a": 0.3, "b": 0.1, "c": 0.2}, {"a": 50.0, "b": 70.0, "c": 60.0}])
        {'a': 2.0, 'b': 2.0, 'c': 2.0}
    """
    sums = dict.fromkeys(scorings[0], 0.0)
    for scores in scorings:
        in_order = {name: scores[name] for name in sums}  # ties in one order, whoever scored
        for rank, name in enumerate(removal_order(in_order)):
            sums[name] += rank
    return sums


class LayerEnsemble(LayerImportance):
    """Sum of ranks over several importances.

    Args:
        criteria: Layer importances; a criterion for channels stands for its :class:`LayerStatistic`.

    Attributes:
        members: The importances.
        scorings: What each member gave, in their order; of the last scoring.
    """

    def __init__(self, criteria: Iterable[LayerImportance | Criterion | Callable[[Any], Any]]) -> None:
        self.members = [item if isinstance(item, LayerImportance) else LayerStatistic(item) for item in criteria]
        if not self.members:
            raise CriterionError("An ensemble needs at least one importance, got none.")
        self.needs_batches = any(member.needs_batches for member in self.members)
        self.needs_loss = any(member.needs_loss for member in self.members)
        self.needs_held_out = any(member.needs_held_out for member in self.members)
        self.scorings: list[dict[str, float]] = []

    def _score(
        self,
        model: nn.Module,
        example_inputs: Any,
        blocks: Sequence[Block],
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        held_out: Iterable[Any] | None,
    ) -> dict[str, float]:
        self.scorings = []
        for what, given, readers in (
            ("batches", batches, sum(member.needs_batches for member in self.members)),
            ("held_out", held_out, sum(member.needs_held_out for member in self.members)),
        ):
            if readers > 1 and isinstance(given, Iterator):
                raise CriterionError(
                    f"{readers} members of the ensemble each go through {what}, and an iterator can be gone through "
                    "once: give a loader or a list."
                )
        self.scorings = [
            member.score(model, example_inputs, blocks, batches, loss_fn, held_out) for member in self.members
        ]
        return rank_sums(self.scorings)
