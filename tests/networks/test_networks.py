"""The CIFAR networks: parameter counts by hand, image sizes, widths, and that every channel can go."""

from itertools import pairwise

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn

from nni_plugin.errors import ModelError
from nni_plugin.networks import NETWORKS, mobilenetv2_cifar, resnet20, resnet56, vgg19_bn


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def conv_bn(channels_in: int, channels: int, kernel: int) -> int:
    return channels_in * channels * kernel**2 + 2 * channels


def resnet_parameters(depth: int, widths: tuple[int, ...] = (16, 32, 64), in_chans: int = 3, classes: int = 10) -> int:
    total = conv_bn(in_chans, widths[0], 3)
    previous = widths[0]
    for width in widths:
        total += conv_bn(previous, width, 3) + (2 * depth - 1) * conv_bn(width, width, 3)
        if width != previous:
            total += conv_bn(previous, width, 1)
        previous = width
    return total + widths[-1] * classes + classes


def test_resnet_parameters() -> None:
    # The paper's 269,722 parameters (option A) and the two projections with their BN.
    assert parameters(resnet20()) == resnet_parameters(3) == 269_722 + conv_bn(16, 32, 1) + conv_bn(32, 64, 1)
    assert parameters(resnet56()) == resnet_parameters(9) == 853_018 + conv_bn(16, 32, 1) + conv_bn(32, 64, 1)
    assert parameters(resnet20(7, 1)) == resnet_parameters(3, in_chans=1, classes=7)
    assert parameters(resnet20(width_mult=0.5)) == resnet_parameters(3, (8, 16, 32))


def test_vgg_parameters() -> None:
    channels = [3, *[64] * 2, *[128] * 2, *[256] * 4, *[512] * 8]
    expected = sum(conv_bn(a, b, 3) for a, b in pairwise(channels)) + 512 * 10 + 10
    assert parameters(vgg19_bn()) == expected == 20_035_018


def test_mobilenetv2_parameters() -> None:
    reference = torchvision.models.mobilenet_v2(num_classes=10)
    assert parameters(mobilenetv2_cifar()) == parameters(reference)
    sizes = sorted(tuple(p.shape) for p in mobilenetv2_cifar().parameters())
    assert sizes == sorted(tuple(p.shape) for p in reference.parameters())


@pytest.mark.parametrize(("name", "macs"), [("resnet20", 40.8e6), ("resnet56", 125.7e6), ("vgg19_bn", 398.1e6)])
def test_macs_of_convolutions(name: str, macs: float) -> None:
    model = NETWORKS[name]().eval()
    counted = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal counted
        counted += out[0].numel() * module.weight[0].numel()  # type: ignore[index]

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert counted == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("size", "in_chans", "width_mult"), [(28, 1, 0.25), (32, 3, 0.13), (33, 4, 0.02)])
def test_runs_in_any_size_and_width(name: str, size: int, in_chans: int, width_mult: float) -> None:
    model = NETWORKS[name](num_classes=5, in_chans=in_chans, width_mult=width_mult)
    out = model(torch.randn(2, in_chans, size, size))
    assert out.shape == (2, 5)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_of_channels_can_be_pruned(name: str) -> None:
    model = NETWORKS[name](in_chans=1, width_mult=0.25).eval()
    x = torch.randn(1, 1, 28, 28)
    classifier = next(m for m in model.modules() if isinstance(m, nn.Linear))
    before = {path: m.out_channels for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[classifier],
    )
    pruner.step()
    kept = {path: m.out_channels / before[path] for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(0.4 < share <= 0.67 for share in kept.values()), kept
    assert model(x).shape == (1, 10)


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"in_chans": 0}, {"width_mult": 0.0}])
def test_impossible_sizes_are_refused(arguments: dict[str, float]) -> None:
    for network in NETWORKS.values():
        with pytest.raises(ModelError, match=r"Expected .*" + next(iter(arguments))):
            network(**arguments)
