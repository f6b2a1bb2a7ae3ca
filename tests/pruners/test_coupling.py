"""Coupled layers share masks: on networks at random the masked network is the compact one, whatever lies between."""

from typing import Any

import nni.compression.pruning as of_nni
import pytest
import torch
from hypothesis import given, settings
from networks_at_random import Recipe, networks
from nni_task import CONVS, Plain, data, evaluator_of, gone, resnet, sparsity
from torch import Tensor, nn

from nni_plugin.errors import ConfigError, CriterionError, GraphError
from nni_plugin.pruners import BNScalePruner, L1NormPruner, RandomPruner, TaylorFOPruner

X = data()[0][:2]


def masked_and_compact(model: nn.Module, x: Tensor, pruner: Any) -> tuple[Tensor, Tensor]:
    wrapped, _ = pruner.compress()
    model.eval()
    with torch.no_grad():
        masked = wrapped(x)
        pruner.unwrap_model()
        pruner.plan().apply(model, x)
        compact = model(x)
    return masked, compact


@pytest.mark.filterwarnings("ignore:.*left whole")
@settings(max_examples=40)
@given(networks())
def test_masked_is_compact_on_networks_at_random(recipe: Recipe) -> None:
    model, x = recipe.build(), recipe.inputs()
    config = [{"op_types": ["Conv2d", "Linear", "ConvTranspose2d"], "sparse_ratio": 0.5}]
    pruner = RandomPruner(model, config, example_inputs=x)
    masked, compact = masked_and_compact(model, x, pruner)
    assert pruner.plan().channels_removed > 0
    assert torch.allclose(compact, masked, rtol=1e-9, atol=1e-9)


class Gated(nn.Module):
    """What a sigmoid makes of a masked channel is one half, and a bare parameter is added to it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.activation = activation
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x + self.shift)).mean((2, 3)))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Softplus])
def test_readers_are_masked_where_zero_does_not_stay_zero(activation: Any) -> None:
    model = Gated(activation()).double()
    pruner = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], example_inputs=X)
    masked, compact = masked_and_compact(model, X, pruner)
    assert torch.allclose(compact, masked, rtol=1e-10, atol=1e-12)
    columns = pruner.get_masks()["conv2"]["weight"].sum((0, 2, 3)) == 0
    assert columns.nonzero().flatten().tolist() == gone(pruner.get_masks(), "conv1")


def test_readers_are_left_alone_where_it_does() -> None:
    masks = L1NormPruner(resnet(), CONVS, example_inputs=X).compress()[1]
    assert sparsity(masks, "layer3.0.conv2") == 0.5
    assert masks["layer3.0.conv2"]["weight"].sum((0, 2, 3)).all()


def test_layers_that_no_one_selected_follow() -> None:
    masks = L1NormPruner(resnet(), [{"op_names": ["conv1"], "sparse_ratio": 0.5}], example_inputs=X).compress()[1]
    assert set(masks) == {"conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2"}
    assert len({tuple(gone(masks, name)) for name in masks}) == 1


def test_normalisations_can_be_selected() -> None:
    """How NNI's SlimPruner is configured."""
    model = resnet()
    masks = BNScalePruner(model, [{"op_names": ["layer1.0.bn1"], "sparse_ratio": 0.5}], example_inputs=X).compress()[1]
    assert gone(masks, "layer1.0.conv1") == gone(masks, "layer1.0.bn1")
    gamma = model.layer1[0].bn1._nni_wrapper.weight.abs()
    assert gone(masks, "layer1.0.bn1") == gamma.sort().indices[:4].sort().values.tolist()


DEPENDENT = [{"op_names": ["layer1.0.conv1", "conv1"], "sparse_ratio": 0.5, "dependency_group_id": 1}]


def test_layers_of_one_dependency_group_share_their_mask() -> None:
    model = resnet()
    pruner = L1NormPruner(model, DEPENDENT, example_inputs=X)
    _, masks = pruner.compress()
    joint = pruner.scores["conv1"] + pruner.scores["layer1.0.conv1"]
    assert gone(masks, "conv1") == gone(masks, "layer1.0.conv1") == joint.sort().indices[:4].sort().values.tolist()
    assert gone(masks, "layer1.0.bn2") == gone(masks, "conv1")


def test_dependency_and_global_groups_together() -> None:
    """NNI takes one of them."""
    names = ["layer1.0.conv1", "conv1", "layer2.0.conv1", "layer3.0.conv1"]
    config = [
        {"op_names": names[:2], "sparse_ratio": 0.5, "dependency_group_id": "a", "global_group_id": "g"},
        {"op_names": names[2:], "sparse_ratio": 0.5, "global_group_id": "g"},
    ]
    model = resnet()
    _, masks = L1NormPruner(model, config, example_inputs=X).compress()
    assert gone(masks, names[0]) == gone(masks, names[1])
    total = sum(masks[name]["weight"].numel() for name in names)
    removed = sum(float((masks[name]["weight"] == 0).sum()) for name in names)
    assert total * 0.5 - 16 * 9 * 32 < removed <= total * 0.5


def test_a_dependency_group_of_different_widths() -> None:
    config = [{"op_names": ["conv1", "layer2.0.conv1"], "sparse_ratio": 0.5, "dependency_group_id": 3}]
    with pytest.raises(ConfigError, match=r"dependency_group_id 3 .*'conv1' has 8, 'layer2.0.conv1' has 16"):
        L1NormPruner(resnet(), config, example_inputs=X)


def test_nothing_to_trace_with_prunes_layer_by_layer_and_says_so() -> None:
    """As NNI's L1NormPruner, which is given a network and a config_list alone."""
    model, theirs = resnet(), resnet()
    with pytest.warns(UserWarning, match="one by one.*example_inputs"):
        _, masks = L1NormPruner(model, CONVS).compress()
    _, expected = of_nni.L1NormPruner(theirs, CONVS).compress()
    assert set(masks) == set(expected)
    for name in masks:
        assert gone(masks, name) == gone(expected, name), name


def test_grouped_and_transposed_convolutions_layer_by_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2), nn.ConvTranspose2d(6, 8, 2, groups=2)
    )
    config = [{"op_types": ["Conv2d", "ConvTranspose2d"], "sparse_ratio": 0.5}]
    with pytest.warns(UserWarning, match="one by one"):
        L1NormPruner(model, config).compress()
    x = torch.randn(1, 4, 8, 8)
    outputs = []
    for layer in model:
        x = layer(x)
        outputs.append((x == 0).all((0, 2, 3)).sum().item())
        x = torch.rand_like(x) + 1
    assert outputs == [4, 3, 4]


def test_a_network_on_which_the_trace_fails() -> None:
    model = Plain().double()
    with pytest.raises(GraphError, match="could not be traced"):
        L1NormPruner(model, CONVS, example_inputs=torch.randn(2, 7, 8, 8).double())
    assert not hasattr(model.conv1, "_nni_wrapper")


def test_frozen_layers_are_named() -> None:
    model = resnet()
    for parameter in model.layer1.parameters():
        parameter.requires_grad_(False)
    evaluator = evaluator_of(model)
    with pytest.raises(CriterionError, match=r"layer1\.0.*no gradient.*frozen"):
        TaylorFOPruner(model, CONVS, evaluator, 2).compress()
    assert evaluator.model is None
