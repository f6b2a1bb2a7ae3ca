"""The networks that users name, under masks of NNI's own L1NormPruner and under masks that cover whole groups."""

import warnings

import pytest
import timm
import torch
import torchvision
from masked import disturb, masked
from torch import nn
from torchvision.models.resnet import Bottleneck

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.pruners.speedup import ModelSpeedup
from nni_plugin.tensors import CHANNEL_NORMS, places_of


def _torchvision(name, **arguments):
    return lambda: getattr(torchvision.models, name)(num_classes=10, **arguments)


def _convnext():
    blocks = [
        torchvision.models.convnext.CNBlockConfig(16, 32, 1),
        torchvision.models.convnext.CNBlockConfig(32, None, 2),
    ]
    return torchvision.models.ConvNeXt(blocks, num_classes=10)


def _regnet():
    params = torchvision.models.regnet.BlockParams.from_init_params(
        depth=6, w_0=48, w_a=27.89, w_m=2.09, group_width=8, se_ratio=0.25
    )
    return torchvision.models.RegNet(params, num_classes=10)


def _vit():
    model = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 128, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # it begins at zero, and so would all outputs
    return model


# Of the usual widths, the deep ones with fewer blocks.
# Name -> builder, and whether NNI's masks, each layer's for itself, halve the MACs.
MODELS = {
    "resnet18": (_torchvision("resnet18"), True),
    "resnet of bottlenecks": (lambda: torchvision.models.ResNet(Bottleneck, [1, 2, 1, 1], num_classes=10), True),
    "regnet_y": (_regnet, False),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), True),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), True),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), True),
    "densenet": (lambda: torchvision.models.DenseNet(32, (2, 3, 2, 2), 32, num_classes=10), True),
    "convnext": (_convnext, False),
    "vit": (_vit, False),
    "timm/regnety_002": (lambda: timm.create_model("regnety_002", num_classes=10), False),
    "timm/mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), True),
    "timm/resnet18": (lambda: timm.create_model("resnet18", num_classes=10), True),
    "timm/vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10), False),
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _speed_up(model, masks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        speedup = ModelSpeedup(model, IMAGES, masks)
        speedup.speedup_model()
    return speedup


def _assert_same(speedup, model, expected):
    """Assert that the compact network gives what the masked one gave, and that it trains."""
    assert bool(expected.any())
    with torch.no_grad():
        got = model.eval()(IMAGES)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert speedup.report.max_rel <= 1e-5
    model.train()(IMAGES).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert speedup.plan.cost_after.macs < speedup.plan.cost_before.macs


def _l1_masks(model, config):
    """Return masks of NNI's L1NormPruner, and what the wrapped network gives under them."""
    pruner = pytest.importorskip("nni.compression.pruning").L1NormPruner(model, config)
    _, masks = pruner.compress()
    with torch.no_grad():
        expected = model.eval()(IMAGES)
    pruner.unwrap_model()
    return masks, expected


@pytest.mark.parametrize("name", MODELS)
def test_masks_of_nnis_l1_norm_pruner(name):
    build, halves = MODELS[name]
    model = build()
    heads = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.out_features == 10]
    op_types = ["Conv2d", "Linear"] if "vit" in name or name == "convnext" else ["Conv2d"]
    config = [{"op_types": op_types, "sparse_ratio": 0.5, "exclude_op_names": heads}]
    masks, expected = _l1_masks(model, config)
    speedup = _speed_up(model, masks)
    _assert_same(speedup, model, expected)
    assert (speedup.plan.cost_after.macs < 0.5 * speedup.plan.cost_before.macs) == halves


@pytest.mark.parametrize("name", ["regnet_y", "timm/regnety_002"])
def test_masks_that_take_as_many_of_each_block_halve_grouped_networks(name):
    model = MODELS[name][0]()
    config = []
    for number, group in enumerate(find_groups(model, IMAGES)):
        if group.fixed is None:
            paths = [
                m.path for m in group.members if m.axis == "out" and m.kind in ("dense", "depthwise") and not m.beside
            ]
            blocks = max([model.get_submodule(m.path).groups for m in group.members if m.ties is not None], default=1)
            entry = {"op_names": paths, "sparse_ratio": 0.5, "dependency_group_id": f"group {number}"}
            config.append(entry if blocks == 1 else {**entry, "internal_metric_block": blocks})
    masks, expected = _l1_masks(model, config)
    speedup = _speed_up(model, masks)
    _assert_same(speedup, model, expected)
    assert not speedup.report.left
    assert speedup.plan.cost_after.macs < 0.35 * speedup.plan.cost_before.macs


def _group_masks(model):
    """Mask half the units of every group, with all that writes and carries them."""
    masks = {}
    for group in find_groups(model, IMAGES):
        if group.fixed or any(isinstance(_layer(model, m), CHANNEL_NORMS) for m in group.members):
            continue
        gone = group.unit < group.units // 2
        for member in group.members:
            if member.axis == "out" and member.kind in ("dense", "depthwise", "norm"):
                layer = _layer(model, member)
                for place in places_of(layer, "out"):
                    if isinstance(getattr(layer, place.tensor), nn.Parameter):
                        targets = masks.setdefault(member.path, {})
                        mask = targets.setdefault(place.tensor, torch.ones_like(getattr(layer, place.tensor)).detach())
                        mask[member.index[gone[member.channel]]] = 0
    return masks


def _layer(model, member):
    return None if member.kind == "parameter" else model.get_submodule(member.path)


@pytest.mark.parametrize("name", MODELS)
def test_masks_of_whole_groups_leave_exactly_with_any_statistics(name):
    model = disturb(MODELS[name][0]())
    masks = _group_masks(model)
    with torch.no_grad():
        expected = masked(model, masks)(IMAGES)
    speedup = _speed_up(model, masks)
    _assert_same(speedup, model, expected)
    assert not speedup.report.inexact
    # What timm's attention makes of its channels has its number of heads written into it.
    left = [f"blocks.{i}.attn.qkv" for i in range(2)] if name == "timm/vit" else []
    assert [verdict.name for verdict in speedup.report.left] == left
    if "vit" not in name and name != "convnext":
        assert speedup.plan.cost_after.macs < 0.5 * speedup.plan.cost_before.macs
