"""ModelSpeedup takes out blocks that masks silence: exactly these, whole, in one plan with the channels of the rest."""

import copy
import random
import warnings
from typing import Any

import nni.compression.pruning as of_nni
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from masked import disturb, filters, masked
from networks_at_random import Recipe, assert_same, state_of
from nni_task import deep_resnet
from torch import Tensor, nn

import nni_plugin
from nni_plugin.errors import SurgeryError
from nni_plugin.layers.blocks import find_blocks
from nni_plugin.pruners import ModelSpeedup
from nni_plugin.pruners import speedup as module
from nni_plugin.pruners.dead_blocks import dead_blocks, silent_blocks
from nni_plugin.pruners.masks import parameter_masks
from nni_plugin.tensors import kind_of

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def whole(model: nn.Module, *prefixes: str, without: str = "\n") -> dict[str, dict[str, Tensor]]:
    """Masks of zeros for all layers below some names."""
    return {
        path: {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters(recurse=False)}
        for path, layer in model.named_modules()
        if path.startswith(prefixes) and without not in path and kind_of(layer) in ("dense", "depthwise", "norm")
    }


def speed_up(model: nn.Module, masks: Any, x: Any = IMAGES) -> ModelSpeedup:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        speedup = ModelSpeedup(model, x, masks)
        speedup.speedup_model()
    return speedup


def assert_equal_and_trains(model: nn.Module, expected: nn.Module, x: Tensor = IMAGES) -> None:
    with torch.no_grad():
        wanted = expected(x)
        assert float((model.eval()(x) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    model.train()(x).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def _swin() -> nn.Module:
    small = {"window_size": 2, "depths": (2, 2, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=10, **small)


NETWORKS = {
    "vit block": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=10),
        ("blocks.1.",),
        "blocks.1",
    ),
    "vit attention": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10),
        ("blocks.1.attn", "blocks.1.norm1"),
        "blocks.1.attn",
    ),
    "swin": (_swin, ("layers.1.blocks.1.",), "layers.1.blocks.1"),
    "convnext": (
        lambda: timm.create_model("convnext_atto", depths=(1, 2, 1, 1), num_classes=10),
        ("stages.1.blocks.1.",),
        "stages.1.blocks.1",
    ),
    "efficientnet": (lambda: timm.create_model("efficientnet_b0", num_classes=10), ("blocks.1.1.",), "blocks.1.1"),
    "regnet": (lambda: timm.create_model("regnety_002", num_classes=10), ("s4.b3.",), "s4.b3"),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 128, num_classes=10),
        ("encoder.layers.encoder_layer_1.",),
        "encoder.layers.encoder_layer_1",
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_block_under_masks_of_zeros_leaves(network: str) -> None:
    build, prefixes, block = NETWORKS[network]
    model = disturb(build())
    for parameter in model.parameters():  # torchvision's classifier begins at zero
        if not bool(parameter.any()):
            nn.init.normal_(parameter.data)
    masks = whole(model, *prefixes)
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert speedup.plan.removed_blocks == speedup.report.blocks == (block,)
    assert speedup.report.zeros_left == 0
    assert not speedup.report.left
    assert speedup.plan.cost_after.params < speedup.plan.cost_before.params
    assert_equal_and_trains(model, reference)


def test_containers_shrink_and_the_plan_says_it_all() -> None:
    model, x = deep_resnet(), IMAGES.double()
    masks = whole(model, "layer1.1.", "layer3.2.")
    plain, reference = copy.deepcopy(model), masked(model, masks)
    parameters = dict(model.named_parameters())
    speedup = speed_up(model, masks, x)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [2, 3, 2]
    assert str(speedup.report).startswith("2 masked blocks removed whole: 'layer1.1', 'layer3.2'")
    assert model.pruning_plan.removed_blocks == ("layer1.1", "layer3.2")
    assert model.layer1[1].conv1.weight is parameters["layer1.2.conv1.weight"]
    assert_equal_and_trains(model, reference, x)
    again = nni_plugin.PruningPlan.from_json(speedup.plan.to_json())
    assert torch.equal(again.apply(plain, x).eval()(x), reference(x))


def test_channels_of_the_rest_leave_in_the_same_plan_under_their_old_names() -> None:
    model, x = deep_resnet(), IMAGES.double()
    gone = {"layer2.2.conv1": [0, 3, 5], "layer2.2.bn1": [0, 3, 5], "layer1.0.conv1": [1], "layer1.0.bn1": [1]}
    # Other layers write what layer2.0.conv2 writes, so there channel 1 stays.
    masks = whole(model, "layer2.1.") | filters(model, {**gone, "layer2.0.conv2": [1]})
    reference, optimizer = masked(model, masks), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():  # the step above is to give the optimizer moments, no other weights
        for name, parameter in model.named_parameters():
            parameter.copy_(reference.get_parameter(name))
    kept = model.layer2[2].conv1.weight
    momentum = optimizer.state[kept]["momentum_buffer"].clone()
    model.eval()
    for name, buffer in model.named_buffers():
        buffer.copy_(reference.get_buffer(name))
    speedup = speed_up(model, masks, x)
    assert speedup.plan.removed_blocks == ("layer2.1",)
    assert speedup.plan.kept()["layer2.2.conv1"] == (1, 2, 4, 6, 7)
    assert {group.name: group.removed for group in speedup.report.groups if group.removed} == {
        "layer1.0.conv1": 1,
        "layer2.2.conv1": 3,
    }
    (left,) = speedup.report.left
    assert "'layer2.2.conv2'" in left.reason
    assert model.layer2[1].conv1.weight is kept
    nni_plugin.carry_optimizer(optimizer, speedup.plan)
    assert torch.equal(optimizer.state[kept]["momentum_buffer"], momentum[[1, 2, 4, 6, 7]])
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert_equal_and_trains(model, reference, x)


@pytest.mark.parametrize(
    ("kept", "is_dead"),
    [
        ("bn2", False),  # the normalisation behind the zeros gives its constant
        ("conv2", True),
        ("conv1", True),
        ("bn1", True),  # its constant is stopped by zeros
    ],
)
def test_what_is_behind_the_zeros_decides(kept: str, is_dead: bool) -> None:
    model = deep_resnet()
    masks = parameter_masks(model, whole(model, "layer1.1.", without=kept))
    blocks, left = dead_blocks(model, masks, IMAGES.double())
    assert [block.name for block in blocks] == ["layer1.1"] * is_dead
    assert left == {}


def test_one_weight_is_enough_to_stay() -> None:
    """Whatever its value: a network that is trained on would use it."""
    model = deep_resnet()
    masks = whole(model, "layer1.1.", without="bn2") | {
        "layer1.1.bn2": {"weight": torch.ones(4), "bias": torch.zeros(4)}
    }
    masks["layer1.1.bn2"]["weight"][1:] = 0
    nn.init.zeros_(model.layer1[1].bn2.weight)
    found = find_blocks(model, IMAGES.double())
    assert silent_blocks(model, found, parameter_masks(model, masks), IMAGES.double()) == ()
    speedup = speed_up(model, masks, IMAGES.double())
    assert speedup.report.blocks == ()
    assert len(model.layer1) == 3


class Bare(nn.Module):
    """A residual branch without normalisations, whose second layer has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


def bare() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 4, 4), Bare(), Bare(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return disturb(nn.Sequential(*layers))


def test_zeros_are_followed_through_a_branch() -> None:
    """The first layer is masked, so the second gives zero, as it has no bias; the first layer's bias would give one."""
    model = bare()
    assert not dead_blocks(model, parameter_masks(model, filters(model, {"1.conv1": range(4)}, bias=False)), IMAGES)[0]
    masks = filters(model, {"1.conv1": range(4)})
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert speedup.report.blocks == ("1",)
    assert len(model) == 5
    assert_equal_and_trains(model, reference)


def test_masks_of_nnis_own_pruner() -> None:
    """NNI masks a linear layer with its bias, and a threshold above all norms masks all of it."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    config = [{"op_names": ["blocks.1.attn.proj", "blocks.1.mlp.fc2", "blocks.0.mlp.fc2"], "sparse_threshold": 1e9}]
    pruner = of_nni.L1NormPruner(model, config)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    disturb(model)
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert speedup.report.blocks == ("blocks.0.mlp", "blocks.1")
    assert len(model.blocks) == 1
    assert_equal_and_trains(model, reference)


class ReadTwice(nn.Module):
    """A block whose output goes on beside the blocks behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Conv2d(3, 6, 4, 4), Bare(), Bare(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(self.stem(x))
        return self.head(torch.cat([first, self.two(first)], 1).mean((2, 3)))


def test_a_block_that_must_stay_is_said() -> None:
    model = disturb(ReadTwice())
    masks = whole(model, "one.")
    reference = masked(model, masks)
    speedup = ModelSpeedup(model, IMAGES, masks)
    with pytest.warns(UserWarning, match="block 'one' adds nothing but stays: its output is read in 2 places"):
        speedup.speedup_model()
    assert list(speedup.report.blocks_left) == ["one"]
    assert model.one.conv1.out_channels == 1
    assert_equal_and_trains(model, reference)


def test_a_block_that_cannot_be_proven_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise SurgeryError("it does not run")

    model = bare()
    monkeypatch.setattr(module, "verify_with_blocks", fails)
    speedup = speed_up(model, whole(model, "1."))
    assert speedup.report.blocks_left == {"1": "it does not run"}
    assert len(model) == 6


def test_units_of_plain_networks_are_not_blocks() -> None:
    """Zeros in a layer of VGG are zeros for all behind it: one channel stays, as the masks say."""
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    model = disturb(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    masks = whole(model, "2")
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert speedup.report.blocks == ()
    assert model[2].out_channels == 1
    assert_equal_and_trains(model, reference)


def test_a_failure_puts_the_blocks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep_resnet(), IMAGES.double()
    state = state_of(model)

    def fails(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "plan_from_masks", fails)
    with pytest.raises(KeyboardInterrupt):
        ModelSpeedup(model, x, whole(model, "layer1.1.")).speedup_model()
    assert_same(model, state)


def test_networks_and_masks_at_random() -> None:
    """What is called silent gives back exactly what it gets, also other signals than it gets in its network."""
    draw, silent, live = random.Random(0), 0, 0
    for seed in range(30):
        kinds = [draw.choice(["residual", "inverted", "resnext"]) for _ in range(3)]
        recipe = Recipe(
            tuple((kind, draw.randint(2, 6), draw.choice(["relu", "none"])) for kind in kinds), "mean", seed
        )
        model, masks = recipe.build(), {}
        for path, layer in model.named_modules():
            if kind_of(layer) and not path.startswith("0") and draw.random() < 0.5:
                found = layer.named_parameters(recurse=False)
                masks[path] = {name: torch.zeros_like(tensor) for name, tensor in found if draw.random() < 0.85}
        blocks = find_blocks(model, recipe.inputs())
        names = {block.name for block in silent_blocks(model, blocks, parameter_masks(model, masks), recipe.inputs())}
        expected = masked(model, masks)
        for block in (block for block in blocks.blocks if block.kind == "block" and block.fixed is None):
            signal = torch.rand(2, *block.shape, dtype=torch.float64) * 3
            with torch.no_grad():
                assert torch.equal(expected.get_submodule(block.name)(signal.clone()), signal) == (block.name in names)
            silent, live = silent + (block.name in names), live + (block.name not in names)
    assert min(silent, live) > 20
