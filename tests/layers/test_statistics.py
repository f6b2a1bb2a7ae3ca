"""Layer statistics: means of layer means over the right groups, by every criterion; a redundant block goes first."""

import pytest
import torch
from layered import Residual, batches, chain, loss_of, plant, vgg
from networks_at_random import assert_same, conv_bn, randomise, state_of
from torch import nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import BNScale, Criterion, Magnitude, Oracle, TaylorFG, TaylorFO
from nni_plugin.errors import CriterionError, DataError
from nni_plugin.layers import Block, LayerStatistic, removable_blocks, removal_order
from nni_plugin.layers.statistics import groups_inside, written_last
from nni_plugin.methods import METHODS, create_criterion
from nni_plugin.planner import score_groups

# A random score knows no redundancy.
KNOWING = [name for name in METHODS if name != "random"]
# What reads weights alone cannot see that a block's last layer gives nothing.
BLIND = ("magnitude", "magnitude-l1", "bn-scale", "geometric-median")
# What looks at layers that a depthwise branch does not have.
ELSEWHERE = ("oracle", "taylor-fo-input", "taylor-fo-weight", "taylor-fo-weight-sum")


def _score(model, criterion, data, blocks=None):
    statistic = LayerStatistic(criterion)
    blocks = removable_blocks(model, data[0][0]) if blocks is None else blocks
    return statistic, statistic.score(model, data[0][0], blocks, data, loss_of)


class Bottleneck(nn.Module):
    """Two inner widths, unlike each other, behind an identity."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(*conv_bn(6, 3, 1), nn.ReLU())
        self.two = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.three = nn.Sequential(*conv_bn(8, 6, 1))

    def forward(self, x):
        return torch.relu(x + self.three(self.two(self.one(x))))


def _bottlenecks():
    stem, tail = [*conv_bn(3, 6), nn.ReLU()], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return randomise(nn.Sequential(*stem, Bottleneck(), Bottleneck(), *tail))


@pytest.mark.parametrize("criterion", [TaylorFO, TaylorFG, Magnitude])
def test_is_the_mean_of_the_means_of_a_blocks_own_layers(criterion):
    model, data = _bottlenecks(), batches(2)
    statistic, found = _score(model, criterion(), data)
    assert statistic.layers == {"3": ["3.one.0", "3.two.0"], "4": ["4.one.0", "4.two.0"]}
    groups = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    scores = score_groups(model, groups, criterion(), data, loss_of)
    for name in ("3", "4"):
        one, two = scores[f"{name}.one.0"], scores[f"{name}.two.0"]
        assert found[name] == pytest.approx(float(one.mean() + two.mean()) / 2, rel=1e-12)
        assert found[name] != pytest.approx(float(torch.cat([one, two]).mean()), rel=1e-3)  # not the pooled mean


def test_groups_of_basic_blocks_and_plain_layers():
    statistic, _ = _score(chain(2), Magnitude(), batches(1))
    assert statistic.layers == {"1": ["1.reduce.0"], "2": ["2.reduce.0"]}  # not the stream, which blocks share
    statistic, found = _score(vgg(), BNScale(), batches(1))
    assert list(statistic.layers.values()) == [["3"], ["6"]]
    assert found[next(iter(found))] == pytest.approx(float(vgg()[4].weight.detach().abs().mean()), rel=1e-12)


@pytest.mark.parametrize("method", KNOWING)
def test_a_redundant_block_goes_first(method):
    data = batches(2)
    for at in ("1", "2", "3"):
        model = chain(3)
        plant(model.get_submodule(at), whole=method in BLIND)
        _, found = _score(model, create_criterion(method), data)
        assert removal_order(found)[0] == at
        if method != "obs":  # which gives positions in its order
            assert found[at] == pytest.approx(0.0, abs=1e-12)
            assert min(score for name, score in found.items() if name != at) > 1e-9


@pytest.mark.parametrize("method", ["tp:lamp", "tp:taylor-tuned", "nni:l2", "nni:taylor"])
def test_stock_importances_score_the_same_layers(method):
    model, data = chain(3), batches(2)
    statistic, found = _score(model, create_criterion(method), data)
    assert statistic.layers == {name: [f"{name}.reduce.0"] for name in "123"}
    groups = [g for g in find_groups(model, data[0][0], keep_host=True) if g.name.endswith("reduce.0")]
    scores = score_groups(model, groups, create_criterion(method), data, loss_of)
    assert list(found.values()) == pytest.approx([float(score.mean()) for score in scores.values()], rel=1e-9)


def test_an_importance_that_normalises_within_layers_ranks_no_blocks():
    with pytest.warns(UserWarning, match="scores all 3 blocks alike"):
        _score(chain(3), create_criterion("tp:magnitude"), batches(2))


def test_minibatches_weigh_by_their_samples_for_criteria_on_samples():
    images, labels = batches(1, size=12)[0]
    _, whole = _score(chain(3), TaylorFG(), [(images, labels)])
    _, parts = _score(chain(3), TaylorFG(), list(zip(images.split(5), labels.split(5), strict=True)))
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-9)


class Depthwise(nn.Module):
    """A residual branch without any width of its own."""

    def __init__(self):
        super().__init__()
        self.work = nn.Sequential(*conv_bn(6, 6, groups=6))

    def forward(self, x):
        return torch.relu(x + self.work(x))


def _depthwise():
    stem, tail = [*conv_bn(3, 6), nn.ReLU()], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return randomise(nn.Sequential(*stem, Residual(6, 4), Depthwise(), Depthwise(), *tail))


def test_a_block_without_width_of_its_own_is_scored_by_what_it_adds():
    model, data = _depthwise(), batches(2)
    statistic, found = _score(model, TaylorFG(), data)
    assert statistic.layers == {"3": ["3.reduce.0"], "4": ["4: 4.work.1"], "5": ["5: 5.work.1"]}
    squares = _gate_squares(model, model[4].work, data)
    assert found["4"] == pytest.approx(float(squares.mean()), rel=1e-9)
    _, by_scale = _score(model, BNScale(), data, _only(model, data, "4", "5"))
    assert by_scale["4"] == pytest.approx(float(model[4].work[1].weight.detach().abs().mean()), rel=1e-12)


def _only(model, data, *names):
    return [block for block in removable_blocks(model, data[0][0]) if block.name in names]


def _gate_squares(model, layer, data):
    """Mean over samples of the squared gradient of a gate on each channel of a layer, by autograd on real gates."""
    total = torch.zeros(6, dtype=torch.float64)
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            gate = torch.ones(1, 6, 1, 1, dtype=torch.float64, requires_grad=True)
            hook = layer.register_forward_hook(lambda _, __, output, gate=gate: output * gate)
            loss_of(model, (image[None], label[None])).backward()
            hook.remove()
            total += gate.grad.flatten().square()
    return total / sum(len(labels) for _, labels in data)


@pytest.mark.parametrize("method", [name for name in KNOWING if name not in (*BLIND, *ELSEWHERE)])
def test_a_redundant_block_without_width_of_its_own_goes_first(method):
    model, data = _depthwise(), batches(2)
    plant(_Inside(model[5].work))
    _, found = _score(model, create_criterion(method), data, _only(model, data, "4", "5"))
    assert removal_order(found)[0] == "5"


class _Inside:
    def __init__(self, inside):
        self.inside = inside


def test_the_last_layer_is_the_one_called_last():
    model, data = _depthwise(), batches(1)
    groups = find_groups(model, data[0][0])
    block = next(block for block in removable_blocks(model, data[0][0]) if block.name == "4")
    assert groups_inside(block, groups) == []
    group = written_last(model, data[0][0], block, groups)
    assert [(member.path, member.writer) for member in group.members] == [("4.work.1", True)]
    assert group.width == 6
    parts = written_last(model, data[0][0], Block("3.inside", "branch", ("3.inside",), (6, 6, 6)), groups)
    assert [(m.path, m.writer) for m in parts.members] == [("3.inside.1", True), ("3.inside.0", False)]
    with pytest.raises(CriterionError, match="has no layer whose channels"):
        written_last(model, data[0][0], Block("2", "block", ("2",), (6, 6, 6)), groups)


@pytest.mark.parametrize(
    ("criterion", "match"),
    [
        (Oracle(), "removes channels where they are read"),
        (TaylorFO("input"), "no layer to score under gates='input'"),
        (TaylorFO("weight"), "no layer to score under gates='weight'"),
        (create_criterion("tp:taylor-tuned"), "a stock importance scores only whole groups"),
    ],
)
def test_criteria_that_cannot_score_what_is_added_say_so(criterion, match):
    model, data = _depthwise(), batches(1)
    before = state_of(model)
    with pytest.raises(CriterionError, match=match):
        _score(model, criterion, data)
    assert_same(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_needs_are_those_of_the_criterion_and_are_checked():
    model, data = chain(2).train(), batches(1)
    blocks = removable_blocks(model, data[0][0])
    assert not LayerStatistic(Magnitude()).needs_batches
    assert LayerStatistic(TaylorFO()).needs_loss
    assert LayerStatistic(Magnitude()).score(model, data[0][0], blocks).keys() == {"1", "2"}
    before = state_of(model)
    with pytest.raises(CriterionError, match="give loss_fn"):
        LayerStatistic(TaylorFO()).score(model, data[0][0], blocks, data)
    with pytest.raises((CriterionError, DataError), match="no batch"):
        LayerStatistic(TaylorFO()).score(model, data[0][0], blocks, [], loss_of)
    with pytest.raises(CriterionError, match="loss of a minibatch is nan"):
        LayerStatistic(TaylorFO()).score(model, data[0][0], blocks, [(data[0][0] * torch.nan, data[0][1])], loss_of)
    assert_same(model, before)
    assert all(module.training for module in model.modules())


def test_an_importance_that_skips_every_layer_of_a_block():
    class Never:
        needs_gradients = False

        def __call__(self, group):
            return None

    assert not isinstance(Never(), Criterion)
    with pytest.raises(CriterionError, match="skips every layer of block '1'"):
        _score(chain(2), Never(), batches(1))
