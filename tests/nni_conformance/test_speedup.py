"""Follows NNI's pruning/test_speedup_init_mask.py, test_speedup_softmax.py and test_speedup_torchvision.py.

NNI's say that it runs. Here the output must be the masked network's, and the network smaller, as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import nni.compression.pruning as of_nni
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from masked import disturb
from referee import quietly
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from nni_plugin.cost import count
from nni_plugin.errors import ConfigError
from nni_plugin.pruners import L1NormPruner, ModelSpeedup, auto_set_dependency_group_ids

CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
PRUNERS = pytest.mark.parametrize("ours", [True, False], ids=["nni_plugin:l1", "nni:l1"])


def masked(model: nn.Module, config: list[dict[str, Any]], x: Tensor, ours: bool) -> tuple[dict[str, Any], Tensor]:
    """Prune by L1 norm; the masks, and what the network gives under them. NNI's is told of dependencies by us."""
    if ours:
        pruner: Any = L1NormPruner(model, config, example_inputs=x)
    else:
        pruner = of_nni.L1NormPruner(model, auto_set_dependency_group_ids(model, config, x))
    _, masks = pruner.compress()
    with torch.no_grad():
        expected = model.eval()(x)
    pruner.unwrap_model()
    return masks, expected


def sped_up(model: nn.Module, x: Tensor, masks: Any, expected: Tensor) -> ModelSpeedup:
    speedup: ModelSpeedup = quietly(ModelSpeedup, model, x, masks)
    quietly(speedup.speedup_model)
    with torch.no_grad():
        assert float((model(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    return speedup


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return inner


class Decorated(nn.Module):
    """A layer whose forward is decorated so many times, which hides it from tracers of source code."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.relu = nn.ReLU6()
        for _ in range(times):
            self.forward = decorated(self.forward)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x)


class LeNet(nn.Module):
    """Two convolutions, two linear layers, a view between them."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(4 * 4 * 50, 100), nn.Linear(100, 10)
        self.relu1, self.relu2, self.act = first, nn.ReLU6(), last
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.pool(self.relu2(self.conv2(x)))
        x = x.view(-1, x.size()[1:].numel())
        return F.log_softmax(self.fc2(self.act(self.fc1(x))), 1)


DIGITS = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@PRUNERS
@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_masks_of_ones_on_activations(times: int, ours: bool) -> None:
    model = LeNet(Decorated(times), nn.ReLU6())
    masks, expected = masked(model, [{"op_types": ["Conv2d"], "sparsity": 0.5}], DIGITS, ours)
    ones = torch.ones(3, 20, 24, 24)
    masks["relu1"] = {"_input_input": ones, "_output_0": ones}
    masks["conv1"]["_output_0"] = ones
    before = count(model, DIGITS[:1])
    sped_up(model, DIGITS, masks, expected)
    assert (model.conv1.out_channels, model.conv2.out_channels, model.fc1.in_features) == (10, 25, 16 * 25)
    assert count(model, DIGITS[:1]).macs < 0.5 * before.macs


@PRUNERS
def test_softmax_between_layers(ours: bool) -> None:
    """A masked unit still takes its share of the softmax, so none can leave without a change, and that is said."""
    model = LeNet(nn.ReLU6(), nn.Softmax(1))
    config = [{"op_types": ["Linear"], "op_names": ["fc1"], "sparsity": 0.5}]
    if ours:
        with pytest.raises(ConfigError, match="'fc1' left whole: it enters softmax in module"):
            masked(model, config, DIGITS, ours)
        return
    masks, expected = masked(model, config, DIGITS, ours)
    speedup = sped_up(model, DIGITS, masks, expected)
    assert speedup.report is not None
    assert [verdict.name for verdict in speedup.report.left] == ["fc1"]
    assert "must stay whole" in str(speedup.report)
    assert model.fc1.out_features == 100


def without_classifier(model: Any, features: int) -> nn.Module:
    model.classifier = nn.Linear(features, 10)
    return model


# NNI's list; the widest and deepest with fewer blocks, and without the hidden layers of their classifiers. Its tests
# leave out convnext_tiny and shufflenet_v2_x0_5.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "alexnet": lambda: without_classifier(tv.alexnet(), 256 * 6 * 6),
    "densenet": lambda: tv.DenseNet(32, (2, 3, 2, 2), 64, num_classes=10),
    "efficientnet_b0": lambda: tv.efficientnet_b0(num_classes=10),
    "mnasnet0_5": lambda: tv.mnasnet0_5(num_classes=10),
    "mobilenet_v2": lambda: tv.mobilenet_v2(num_classes=10),
    "resnet18": lambda: tv.resnet18(num_classes=10),
    "resnext": lambda: tv.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=32, width_per_group=4),
    "squeezenet1_0": lambda: tv.squeezenet1_0(num_classes=10),
    "vgg11": lambda: without_classifier(tv.vgg11(init_weights=False), 512 * 7 * 7),
    "wide_resnet": lambda: tv.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=128),
}


@PRUNERS
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision(name: str, ours: bool) -> None:
    if name == "densenet" and not ours:
        pytest.skip("see test_a_normalisation_behind_a_concatenation_cannot_follow_in_nnis_masks")
    model, x = disturb(NETWORKS[name]()), torch.rand(2, 3, 64, 64)
    check_network(model, x, ours)


@pytest.mark.slow
def test_inception_v3() -> None:
    model = tv.inception_v3(num_classes=10, init_weights=False, aux_logits=False)
    for _ in range(20):  # statistics of its own; without them nothing gets through
        model.train()(torch.rand(2, 3, 96, 96))
    check_network(model, torch.rand(2, 3, 96, 96), ours=True)


def test_a_normalisation_behind_a_concatenation_cannot_follow_in_nnis_masks() -> None:
    """Each part of its channels has another layer to follow; constants of what has left are then lost."""
    model, x = disturb(NETWORKS["densenet"]()), torch.rand(2, 3, 64, 64)
    masks, expected = masked(model, CONVS, x, ours=False)
    speedup: ModelSpeedup = ModelSpeedup(model, x, masks)
    with pytest.warns(UserWarning, match="to hold the constants"):
        speedup.speedup_model()
    with torch.no_grad():
        difference = float((model(x) - expected).abs().max())
    assert 1e-5 * float(expected.abs().max()) < difference < 0.2 * float(expected.abs().max())


def check_network(model: nn.Module, x: Tensor, ours: bool) -> None:
    masks, expected = masked(model, CONVS, x, ours)
    assert float(expected.std(0).max()) > 0  # the images matter
    speedup = sped_up(model, x, masks, expected)
    before, after = speedup.plan.cost_before, speedup.plan.cost_after  # type: ignore[union-attr]
    assert after.macs < 0.5 * before.macs
    assert after == count(model, x[:1])
    assert speedup.report is not None
    assert not speedup.report.inexact
    if ours:  # nothing is left behind
        assert (speedup.report.left, speedup.report.zeros_left) == ((), 0)
