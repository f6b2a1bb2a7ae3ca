"""Which groups may be pruned, and whose scores are compared with whose."""

import pytest
import torch

from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import OBS, TaylorFO
from nni_plugin.errors import BudgetError, CriterionError, GraphError
from nni_plugin.group_rules import GroupRules
from nni_plugin.groups import ChannelGroup
from nni_plugin.scorer import Scorer


@pytest.fixture(scope="module")
def groups() -> list[ChannelGroup]:
    return find_groups(create_model("resnet20", "nni_plugin"), torch.zeros(1, 3, 8, 8))


def _free(groups: list[ChannelGroup]) -> set[str]:
    return {group.name for group in groups if group.fixed is None}


def test_skips_and_the_others_are_all(groups: list[ChannelGroup]) -> None:
    skip, rest = (GroupRules(select).selected(groups) for select in ("skip-only", "no-skip"))
    assert _free(skip) | _free(rest) == _free(GroupRules().selected(groups)) == _free(groups)
    assert not _free(skip) & _free(rest)
    assert _free(skip) == {group.name for group in groups if group.fixed is None and group.residual}
    assert len(skip) == len(rest) == len(groups)
    assert {group.fixed for group in rest if group.name in _free(skip)} == {"select='no-skip' leaves it whole"}


def test_without_rules_scores_are_compared_as_they_are(groups: list[ChannelGroup]) -> None:
    scores = {group.name: torch.rand(group.width) for group in groups}
    widths = {group.name: group.width for group in groups}
    assert GroupRules().comparable(groups, scores, widths) is scores
    assert not GroupRules().in_turns
    divided = GroupRules(divide_by_blocks=True).comparable(groups, scores, widths)
    for group in groups:
        assert torch.equal(divided[group.name], scores[group.name] / group.blocks)
    assert {group.blocks for group in groups if group.fixed is None} > {1}


def test_a_record_holds_what_was_asked() -> None:
    assert GroupRules().record() == {"select": "all"}
    assert GroupRules("no-skip", ("mlp", "heads"), {"layer1": 0.5}, divide_by_blocks=True).record() == {
        "select": "no-skip",
        "divide_by_blocks": True,
        "stages": {"layer1": 0.5},
        "parts": ["heads", "mlp"],
    }


def test_bad_rules() -> None:
    with pytest.raises(GraphError, match=r"select.*'skips'"):
        GroupRules("skips")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="got tails"):
        GroupRules(parts=["tails"])
    with pytest.raises(BudgetError, match="stages or isomorphic"):
        GroupRules(stages={"layer1": 0.5}, isomorphic=True)
    with pytest.raises(BudgetError, match="layer9"):
        GroupRules(stages={"layer9": 0.5}).check(Scorer(TaylorFO()), ["layer1.0.conv1"])
    with pytest.raises(CriterionError, match="divide_by_blocks"):
        GroupRules(divide_by_blocks=True).check(Scorer(OBS()), [])
