"""The ensemble: ranks summed by hand, blind to scales; orders and their agreement."""

import math

import pytest
import torch
from layered import batches, chain, loss_of, plant

from nni_plugin.criteria import Magnitude, TaylorFO
from nni_plugin.errors import CriterionError
from nni_plugin.layers import (
    BlockGate,
    Imprinting,
    LayerEnsemble,
    LayerImportance,
    LayerStatistic,
    rank_agreement,
    removable_blocks,
    removal_order,
)
from nni_plugin.layers.ensemble import rank_sums


class Given(LayerImportance):
    """Scores that were written down."""

    needs_batches = False

    def __init__(self, scores):
        self.scores = scores

    def _score(self, model, example_inputs, blocks, batches, loss_fn, held_out):
        return self.scores


def test_ranks_are_summed_and_ties_keep_their_order():
    first = {"a": 0.5, "b": -0.1, "c": 0.5, "d": 9.0}
    assert rank_sums([first]) == {"a": 1, "b": 0, "c": 2, "d": 3}
    second = {"d": 1.0, "c": 2.0, "b": 3.0, "a": 4.0}
    assert rank_sums([first, second]) == {"a": 4, "b": 2, "c": 3, "d": 3}
    alike = {"d": 1.0, "c": 1.0, "b": 1.0, "a": 1.0}
    assert rank_sums([first, alike]) == {"a": 1, "b": 1, "c": 4, "d": 6}  # in the order of the first


@pytest.mark.parametrize("change", [lambda s: 1000 * s, math.exp, lambda s: s**3 - 7, math.atan])
def test_ranks_do_not_see_monotone_changes(change):
    torch.manual_seed(1)
    scorings = [{f"{i}": float(v) for i, v in enumerate(torch.randn(9))} for _ in range(3)]
    changed = [scorings[0], {name: change(score) for name, score in scorings[1].items()}, scorings[2]]
    assert rank_sums(changed) == rank_sums(scorings)


def test_is_the_sum_of_its_members_ranks_on_a_network():
    model, data, held_out = chain(4), batches(2), batches(1, seed=8)
    plant(model[3], whole=True)
    blocks = removable_blocks(model, data[0][0])
    ensemble = LayerEnsemble([Imprinting(), TaylorFO(), LayerStatistic(Magnitude()), BlockGate()])
    scores = ensemble.score(model, data[0][0], blocks, data, loss_of, held_out)
    assert [type(member) for member in ensemble.members] == [Imprinting, LayerStatistic, LayerStatistic, BlockGate]
    alone = Imprinting().score(model, data[0][0], blocks, data, held_out=held_out)
    assert ensemble.scorings[0] == alone
    assert scores == rank_sums(ensemble.scorings)
    assert removal_order(scores)[0] == "3"
    assert all(scoring["3"] == 0 for scoring in ensemble.scorings)


def test_needs_are_those_of_its_members():
    none = LayerEnsemble([Magnitude()])
    assert not any([none.needs_batches, none.needs_loss, none.needs_held_out])
    some = LayerEnsemble([Magnitude(), TaylorFO(), Imprinting()])
    assert some.needs_batches
    assert some.needs_loss
    assert some.needs_held_out
    model, data = chain(2), batches(1)
    blocks = removable_blocks(model, data[0][0])
    with pytest.raises(CriterionError, match="LayerEnsemble measures on minibatches"):
        some.score(model, data[0][0], blocks, data, loss_of)
    with pytest.raises(CriterionError, match="at least one importance"):
        LayerEnsemble([])


def test_minibatches_that_can_be_gone_through_once_do_for_one_member():
    model, data = chain(2), batches(1)
    blocks = removable_blocks(model, data[0][0])
    one = LayerEnsemble([TaylorFO(), Magnitude()])
    assert one.score(model, data[0][0], blocks, iter(data), loss_of).keys() == {"1", "2"}
    with pytest.raises(CriterionError, match="2 members of the ensemble each go through batches"):
        LayerEnsemble([TaylorFO(), BlockGate()]).score(model, data[0][0], blocks, iter(data), loss_of)
    two = LayerEnsemble([Imprinting(), Imprinting(100)])
    with pytest.raises(CriterionError, match="each go through held_out"):
        two.score(model, data[0][0], blocks, data, loss_of, iter(data))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused(wrong):
    model, data = chain(2), batches(1)
    blocks = removable_blocks(model, data[0][0])
    with pytest.raises(CriterionError, match="1 of 2 blocks a score that is not finite, first '2'"):
        LayerEnsemble([Given({"1": 0.0, "2": wrong})]).score(model, data[0][0], blocks)


def test_agreement_of_rankings():
    one_shot = {"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.3}
    assert rank_agreement(one_shot, one_shot) == pytest.approx(1.0)
    assert rank_agreement(one_shot, {name: -score for name, score in one_shot.items()}) == pytest.approx(-1.0)
    # Ranks 0 3 1 2 and 0 2 1 3: 1 - 6 * 2 / (4 * 15).
    assert rank_agreement(one_shot, {"a": 1.0, "b": 3.0, "c": 2.0, "d": 4.0}) == pytest.approx(0.8)
    # One block has left since: three remain.
    assert rank_agreement(one_shot, {"b": 7.0, "c": 5.0, "d": 6.0}) == pytest.approx(1.0)
    assert math.isnan(rank_agreement(one_shot, {"a": 1.0, "b": 2.0}))
    assert math.isnan(rank_agreement(one_shot, dict.fromkeys(one_shot, 1.0)))
