"""Layer importances by name: each scores, a wrong name brings the closest, the ensemble is the paper's."""

import pytest
from layered import batches, chain, loss_of, plant

from nni_plugin.errors import CriterionError
from nni_plugin.layers import BlockGate, Imprinting, LayerEnsemble, LayerStatistic, removable_blocks, removal_order
from nni_plugin.layers.methods import LAYER_METHODS, SquaredMagnitude, create_layer_importance
from nni_plugin.layers.statistics import groups_inside
from nni_plugin.methods import METHODS

# What scores a redundant block by its weights, and chance.
UNKNOWING = ("layer-random",)


def _scores(importance, model, data):
    blocks = removable_blocks(model, data[0][0])
    return importance.score(model, data[0][0], blocks, data, loss_of, data)


@pytest.mark.parametrize("name", [name for name in LAYER_METHODS if name not in UNKNOWING])
def test_every_method_ranks_a_block_of_zeros_first(name):
    model, data = chain(3), batches(2)
    plant(model.get_submodule("2"), whole=True)
    if name == "imprinting":  # the gain of a block that does nothing is none, and others may lose
        assert _scores(create_layer_importance(name), model, data)["2"] == 0
        return
    assert removal_order(_scores(create_layer_importance(name), model, data))[0] == "2"


def test_names_by_contract():
    assert {"imprinting", "layer-ensemble", "block-gate", *(f"layer-{name}" for name in METHODS)} <= set(LAYER_METHODS)
    kinds = {"imprinting": Imprinting, "block-gate": BlockGate, "layer-ensemble": LayerEnsemble}
    for name in LAYER_METHODS:
        first, second = create_layer_importance(name), create_layer_importance(name)
        assert type(first) is kinds.get(name, LayerStatistic)
        assert first is not second


def test_the_ensemble_holds_the_five_criteria_of_the_paper():
    members = [str(member) for member in create_layer_importance("layer-ensemble").members]
    starts = [
        "TaylorFO(gates='weight', reduction='square-then-sum')",
        "SquaredMagnitude(p=2",
        "FeatureMap(",
        "TaylorFO(",
    ]
    assert len(members) == 5
    assert all(member.startswith(start) for member, start in zip(members, [*starts, "BNScale("], strict=True)), members
    assert "absolute='position'" in members[2]


def test_the_paper_squares_weights_before_the_mean_over_filters():
    from nni_plugin.adapters.torch_pruning import find_groups

    model, data = chain(2), batches(1)
    statistic = LayerStatistic(SquaredMagnitude())
    found = _scores(statistic, model, data)
    groups = find_groups(model, data[0][0])
    for block in removable_blocks(model, data[0][0]):
        (group,) = groups_inside(block, groups)
        weight = model.get_submodule(group.name).weight.detach()
        assert found[block.name] == pytest.approx(float(weight.square().sum((1, 2, 3)).mean()), rel=1e-12)


def test_the_seed_is_passed_on():
    model, data = chain(3), batches(1)
    scores = [_scores(create_layer_importance("layer-random", seed), model, data) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("imprint", "imprinting"),
        ("taylor-fo", "layer-taylor-fo"),
        ("layer-tp:taylor", "layer-tp:taylor-tuned"),
        ("?", "block-gate"),
    ],
)
def test_unknown_name(wrong, meant):
    with pytest.raises(CriterionError, match=f".*{meant}"):
        create_layer_importance(wrong)
