"""Which groups may be pruned, and whose scores are compared with whose: what a caller rules beside the criterion."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nni_plugin.checks import Selection, checked_choice
from nni_plugin.errors import BudgetError, CriterionError, GraphError
from nni_plugin.groups import ChannelGroup
from nni_plugin.parts import DEFAULT_PARTS, checked_parts
from nni_plugin.scorer import Scorer
from nni_plugin.stages import check_stages, turns, turns_by_make


@dataclass(frozen=True)
class GroupRules:
    """What holds for the groups of one network.

    Args:
        select: Which may be pruned: `"all"`, those that residual additions couple across blocks (`"skip-only"`), or
            the others (`"no-skip"`).
        parts: Which parts of a transformer may shrink.
        stages: Fraction of channels to keep by prefix of layer names; empty: no such proportion.
        isomorphic: Compare groups built alike with each other alone.
        divide_by_blocks: Divide the score of a residual group by the number of blocks that share its gate.
    """

    select: Selection = "all"
    parts: Collection[str] = DEFAULT_PARTS
    stages: Mapping[str, float] = field(default_factory=dict)
    isomorphic: bool = False
    divide_by_blocks: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no rule.

        Raises:
            BudgetError: Both `stages` and `isomorphic` are given.
            GraphError: `select` is none of the three, or a part is unknown.
        """
        checked_choice("select", self.select, Selection, GraphError)
        object.__setattr__(self, "parts", checked_parts(self.parts))
        object.__setattr__(self, "stages", dict(self.stages))
        if self.isomorphic and self.stages:
            raise BudgetError("Expected stages or isomorphic, got both: each says which groups lose the same fraction.")

    def check(self, scorer: Scorer, names: Sequence[str]) -> None:
        """Refuse rules that do not go with a criterion or a network.

        Args:
            scorer: What scores the groups.
            names: Of the groups that may be pruned.

        Raises:
            BudgetError: A stage has no group, or its fraction is none.
            CriterionError: The criterion gives an order, which cannot be divided by blocks.
        """
        if self.divide_by_blocks and scorer.is_ranking:
            raise CriterionError(
                f"divide_by_blocks divides scores, and {scorer} gives an order of removal: leave one of them out."
            )
        check_stages(self.stages, names)

    def selected(self, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """Return the groups, those fixed that `select` leaves whole."""
        if self.select == "all":
            return list(groups)
        return [
            group
            if group.fixed or group.residual == (self.select == "skip-only")
            else group.freeze(f"select={self.select!r} leaves it whole")
            for group in groups
        ]

    @property
    def in_turns(self) -> bool:
        """Whether scores end as turns, which say when channels go and not what they are worth."""
        return bool(self.stages) or self.isomorphic

    def comparable(
        self, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], widths: Mapping[str, int]
    ) -> Mapping[str, Tensor]:
        """Return scores that one ranking over all groups may compare.

        Args:
            groups: The groups to choose from.
            scores: One score a channel by group name, higher = keep.
            widths: Channels of each group of the dense network.
        """
        if self.divide_by_blocks:
            scores = {group.name: scores[group.name] / group.blocks for group in groups}
        if self.stages:
            return turns(groups, scores, self.stages, widths)
        if self.isomorphic:
            return turns_by_make(groups, scores, widths)
        return scores

    def record(self) -> dict[str, Any]:
        """Return the rules for a plan's provenance, those that were not given left out."""
        return {
            "select": self.select,
            **({"divide_by_blocks": True} if self.divide_by_blocks else {}),
            **({"stages": dict(self.stages)} if self.stages else {}),
            **({"isomorphic": True} if self.isomorphic else {}),
            **({"parts": sorted(self.parts)} if frozenset(self.parts) != frozenset(DEFAULT_PARTS) else {}),
        }
