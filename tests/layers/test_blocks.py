"""Which blocks are found removable, and why the others must stay: by what modules do, not by their names."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from networks_at_random import assert_same, state_of
from torch import Tensor, nn

from nni_plugin.layers import Block, removable_blocks
from nni_plugin.layers.blocks import find_blocks
from nni_plugin.networks import mobilenetv2_cifar, resnet20, resnet56, vgg19_bn

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(width: int = 4, out: int = 0, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, out or width, 3, padding=1, **options), nn.BatchNorm2d(out or width))


class Residual(nn.Module):
    def __init__(self, after: nn.Module | None = None, shortcut: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.branch = conv(**options)
        self.shortcut, self.after = shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.shortcut(x) + self.branch(x))  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """Two branches, one with a bare layer scale, one behind a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 1e-6))
        self.norm, self.first, self.second = nn.BatchNorm2d(4), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.first(self.norm(x))
        return x + self.second(x)  # type: ignore[no-any-return]


class Uses(nn.Module):
    """Calls its blocks in the order of a list of indices; those in `taps` are also added to the output."""

    def __init__(self, blocks: list[nn.Module], order: list[int], taps: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.blocks, self.order, self.taps = nn.ModuleList(blocks), order, taps

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for i in self.order:
            x = self.blocks[i](x)
            seen += [x] * (i in self.taps)
        return torch.cat([x, *seen], dim=1)


def names(model: nn.Module, x: Tensor = X, kind: str | None = None) -> list[str]:
    return [block.name for block in removable_blocks(model, x) if kind in (None, block.kind)]


def reason(model: nn.Module, name: str) -> str:
    (block,) = [block for block in find_blocks(model, X).blocks if block.name == name]
    assert block.name not in names(model)
    assert block.fixed is not None
    return block.fixed


# -- the networks of the papers ---------------------------------------------------------------------------------


def test_resnets() -> None:
    x = torch.zeros(1, 3, 16, 16)  # an example of zeros says as much as any other
    found = removable_blocks(resnet20(), x)
    assert found[0] == Block("layer1.0", "block", ("layer1.0",), (16, 16, 16))
    rest = ["layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]
    assert [block.name for block in found[1:]] == rest
    assert len(names(resnet56(width_mult=0.25), x)) == 25
    fixed = {block.name: block.fixed for block in find_blocks(resnet20(), x).blocks if block.fixed}
    assert fixed == {
        "layer2.0": "it changes the shape of a sample from [16, 16, 16] to [32, 8, 8]",
        "layer3.0": "it changes the shape of a sample from [32, 8, 8] to [64, 4, 4]",
    }


def test_vgg_units() -> None:
    found = removable_blocks(vgg19_bn(width_mult=0.25), torch.zeros(1, 3, 32, 32))
    assert [block.kind for block in found] == ["unit"] * 12
    assert found[0] == Block("features.3:features.5", "unit", ("features.3", "features.4", "features.5"), (16, 32, 32))
    # Configuration E without the four convolutions that widen: 1 + 1 + 3 + 3 + 4 remain.
    first = [3, 10, 17, 20, 23, 30, 33, 36, 40, 43, 46, 49]
    assert [block.members[0] for block in found] == [f"features.{i}" for i in first]


def test_torchvision() -> None:
    x = torch.zeros(1, 3, 32, 32)
    models = torchvision.models
    assert names(models.resnet18(), x) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    bottlenecks = names(models.ResNet(models.resnet.Bottleneck, [2, 1, 1, 2]), x)  # ResNet-50 with fewer blocks
    assert bottlenecks == ["layer1.1", "layer4.1"]
    inverted = [2, 4, 5, 7, 8, 9, 11, 12, 14, 15]
    assert names(models.mobilenet_v2(), x) == [f"features.{i + 1}" for i in inverted]
    assert names(mobilenetv2_cifar(), x) == [f"blocks.{i}" for i in inverted]
    assert names(models.densenet121(), x) == []


def test_torchvision_transformers() -> None:
    vit = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    found = removable_blocks(vit, torch.zeros(1, 3, 16, 16))
    layer = "encoder.layers.encoder_layer_0"
    assert [(b.name, b.kind, b.members) for b in found[:3]] == [
        (layer, "block", (layer,)),
        (f"{layer}.self_attention", "branch", (f"{layer}.ln_1", f"{layer}.self_attention")),
        (f"{layer}.mlp", "branch", (f"{layer}.ln_2", f"{layer}.mlp")),
    ]
    assert len(found) == 6
    swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 2], [1, 2], [2, 2])
    assert names(swin, torch.zeros(1, 3, 16, 16), "block") == ["features.1.0", "features.3.0", "features.3.1"]
    assert len(names(swin, torch.zeros(1, 3, 16, 16), "branch")) == 6


# -- by function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero", "random"])
def test_weights_do_not_matter(how: str) -> None:
    model = nn.Sequential(conv(), Residual(), Residual(shortcut=conv()), Residual())
    for parameter in model.parameters():
        nn.init.zeros_(parameter) if how == "zero" else nn.init.normal_(parameter)
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert names(model.to(dtype), X.to(dtype), "block") == ["1", "3"]


def test_activations_behind_the_addition() -> None:
    after_relu = nn.Sequential(conv(), nn.ReLU(), Residual(nn.ReLU(inplace=True)))
    assert names(after_relu, kind="block") == ["2"]
    assert names(nn.Sequential(conv(), Residual(nn.ReLU())), kind="block") == []  # it would cut negative values off
    assert "does not give its input" in reason(nn.Sequential(conv(), nn.ReLU(), Residual(nn.SiLU())), "2")


def test_stages_are_no_blocks() -> None:
    stage = nn.Sequential(Residual(), Residual())
    model = nn.Sequential(conv(), stage, nn.Sequential(nn.Sequential(Residual())))
    assert names(model, kind="block") == ["1.0", "1.1", "2.0.0"]


def test_branches_with_their_norm_and_scale() -> None:
    model = nn.Sequential(conv(), Scaled())
    found = [(b.name, b.kind, b.members) for b in removable_blocks(model, X) if b.kind != "unit"]
    assert found == [
        ("1", "block", ("1",)),
        ("1.first", "branch", ("1.norm", "1.first")),
        ("1.second", "branch", ("1.second",)),
    ]


def test_what_adds_a_constant_is_no_block() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    assert names(nn.Sequential(Positions(), Residual())) == ["1"]


def test_units() -> None:
    relu = nn.ReLU()
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    assert names(nn.Sequential(nn.Conv2d(4, 4, 1), relu, plain, nn.MaxPool2d(2), conv(4, 8))) == ["2.0:2.1", "2.2:2.5"]
    whole = nn.Sequential(nn.Conv2d(4, 4, 1), relu, conv(), conv(4, 8))
    assert names(whole) == ["2"]  # the Sequential inside, not a run that would leave it empty
    silu = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(*conv(), nn.SiLU()), conv(4, 8))
    assert reason(silu, "1") == "'1.2' (SiLU) would change what an identity gives it"
    strided = nn.Sequential(nn.Conv2d(4, 4, 1), relu, nn.Conv2d(4, 4, 2, stride=2), relu, conv(4, 8))
    assert names(strided) == []
    assert reason(nn.Sequential(relu, nn.Conv2d(4, 4, 1)), "1") == "its output is the network's"
    mlp = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    assert names(mlp) == ["2:3"]


# -- what must stay ---------------------------------------------------------------------------------------------


def test_called_twice_shared_or_read_elsewhere() -> None:
    blocks = [Residual(), Residual(), Residual()]
    assert names(Uses(blocks, [0, 1, 2])) == ["blocks.0", "blocks.1", "blocks.2"]
    assert reason(Uses(blocks, [0, 1, 1, 2]), "blocks.1") == "it is called 2 times"
    assert reason(Uses(blocks, [0, 1, 2], taps=(1,)), "blocks.1") == "its output is read in 2 places"
    assert "also used under another name" in reason(Uses([blocks[0], blocks[1], blocks[0]], [0, 1]), "blocks.0")
    assert names(Uses(blocks, [0, 2])) == ["blocks.0", "blocks.2"]


def test_hooks() -> None:
    model = Uses([Residual(), Residual()], [0, 1])
    handle = model.blocks[1].branch.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, operator]
    assert reason(model, "blocks.1") == "a forward hook reads the output of 'blocks.1.branch'"
    handle.remove()
    assert names(model) == ["blocks.0", "blocks.1"]


def test_inside_inference_mode() -> None:
    with torch.inference_mode():
        assert names(nn.Sequential(conv(4, 8), conv(8, 4), Scaled()), kind="branch") == ["2.first", "2.second"]


def test_the_network_stays_as_it_was() -> None:
    model = nn.Sequential(conv(), nn.Dropout(), Scaled()).train()
    model(X).sum().backward()
    model[0].requires_grad_(False)
    before, modules, random = state_of(model), list(model.modules()), torch.random.get_rng_state()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
    twin = copy.deepcopy(model)
    assert names(model) == names(twin)
    assert_same(model, before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(module.training for module in modules)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]
    assert [p.requires_grad for p in model[0].parameters()] == [False] * 4
