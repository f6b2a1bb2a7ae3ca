"""Blocks leave without a trace: shorter containers or shells, timm's records, optimizers; and what is refused."""

import copy
from typing import Any

import pytest
import timm
import torch
from networks_at_random import assert_same, randomise, state_of
from torch import Tensor, nn

from nni_plugin import PruningPlan, carry_optimizer, count, verify
from nni_plugin.adapters.torch_pruning import apply_plan
from nni_plugin.adapters.torch_pruning.surgery import CUTS, REMOVED
from nni_plugin.errors import PlanError, SurgeryError
from nni_plugin.layers import removable_blocks
from nni_plugin.layers.removal import find_removal
from nni_plugin.layers.shells import Nothing, Skip
from nni_plugin.networks import resnet20, vgg19_bn
from nni_plugin.networks.resnet import ResNet

X = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 3}


def removing(*names: str) -> PruningPlan:
    return PruningPlan((), names)


def resnet() -> ResNet:
    return randomise(resnet20(width_mult=0.5))  # type: ignore[return-value]


def vit(name: str = "vit_tiny_patch16_224", depth: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, depth=depth, **VIT, **options).double().eval()


class Loop(nn.Module):
    """Goes through its blocks by iteration, by number, or with something done between two of them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem = how, nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(Added() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = self.blocks[i](x) if self.how == "number" and i < 3 else block(x)
            if self.how == "between" and i == 1:
                x = torch.flip(x, [-1]) * 2
        return self.blocks[2](x) * 0 + x if self.how == "last" else x


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x + self.conv(x)  # type: ignore[no-any-return]


# -- exactly ----------------------------------------------------------------------------------------------------


def test_a_block_whose_branch_is_zero_leaves_exactly() -> None:
    model = resnet()
    for name in ("layer1.1", "layer3.2"):
        bn: Any = model.get_submodule(f"{name}.bn2")
        nn.init.zeros_(bn.weight)
        nn.init.zeros_(bn.bias)
    expected = model(X)
    assert removing("layer1.1", "layer3.2").apply(model, X) is model
    assert torch.equal(model(X), expected)


def test_an_identity_unit_leaves_exactly() -> None:
    model = randomise(vgg19_bn(width_mult=0.125))
    conv, bn = model.get_submodule("features.30"), model.get_submodule("features.31")
    nn.init.dirac_(conv.weight)  # type: ignore[arg-type]
    bn.eps = 0.0  # type: ignore[assignment]
    for tensor, value in ((bn.weight, 1.0), (bn.bias, 0.0), (bn.running_mean, 0.0), (bn.running_var, 1.0)):
        nn.init.constant_(tensor, value)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    removing("features.30:features.32").apply(model, x)
    assert torch.equal(model(x), expected)
    assert len(model.features) == 50  # type: ignore[arg-type]


def test_it_is_the_network_of_fewer_blocks() -> None:
    model = vit()
    weights = {k.replace("blocks.2.", "blocks.1."): v for k, v in model.state_dict().items() if "blocks.1." not in k}
    removing("blocks.1").apply(model, X)
    smaller = vit(depth=2)
    smaller.load_state_dict(weights)
    assert list(model.state_dict()) == list(smaller.state_dict())
    assert torch.equal(model(X), smaller(X))
    assert repr(model) == repr(smaller)
    assert count(model, X) == count(smaller, X)


def test_verify_holds_the_branches_at_zero() -> None:
    model = vit()
    for names in (("blocks.0",), ("blocks.0.attn", "blocks.2.mlp", "blocks.1")):
        assert verify(model, removing(*names), X).max_abs == 0
    held = copy.deepcopy(model)
    for name in ("blocks.0.attn.proj", "blocks.2.mlp.fc2"):  # the same, by hand
        nn.init.zeros_(held.get_submodule(name).weight)  # type: ignore[arg-type]
        nn.init.zeros_(held.get_submodule(name).bias)  # type: ignore[arg-type]
    removing("blocks.0.attn", "blocks.2.mlp").apply(model, X)
    assert torch.equal(model(X), held(X))
    assert {type(model.get_submodule(f"blocks.0.{name}")) for name in ("norm1", "attn")} == {Skip, Nothing}
    assert not any(name.startswith("blocks.0.norm1") for name in model.state_dict())


def test_attention_that_returns_a_tuple() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3).double().eval()
    plan = removing("encoder.layers.encoder_layer_0.self_attention")
    assert verify(model, plan, X).max_abs == 0
    plan.apply(model, X)
    assert model(X).shape == (2, 3)


# -- containers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "shells"), [("iteration", ()), ("number", ()), ("between", ("blocks.1",)), ("last", ("blocks.1",))]
)
def test_a_container_shrinks_where_the_forward_lets_it(how: str, shells: tuple[str, ...]) -> None:
    model = Loop(how).double().eval()
    plan = removing("blocks.1")
    if how == "last":
        with pytest.raises(PlanError, match=r"blocks.2.*called 2 times"):
            removing("blocks.2").apply(model, X)
    assert verify(model, plan, X).max_abs == 0
    plan.apply(model, X)
    assert model.pruning_plan.shells == shells  # type: ignore[union-attr]
    assert len(model.blocks) == (3 if shells else 2)
    assert isinstance(model.blocks[1], Skip) == bool(shells)


def test_a_block_called_by_its_name_leaves_a_shell() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 4, 1), Added()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x), 1)  # type: ignore[no-any-return]

    model = Net().double()
    removing("block").apply(model, X)
    assert isinstance(model.block, Skip)
    assert torch.equal(model(X), model.stem(X))
    assert list(model.state_dict()) == ["stem.weight", "stem.bias"]
    assert removable_blocks(model, X) == []


def test_a_stage_may_lose_all_its_blocks() -> None:
    model = resnet()
    removing("layer1.0", "layer1.1", "layer1.2").apply(model, X)
    assert len(model.layer1) == 0
    assert model(X).shape == (2, 10)


# -- timm -------------------------------------------------------------------------------------------------------


def test_feature_info_of_a_network_that_lists_every_block() -> None:
    model = vit(drop_path_rate=0.3)
    rates = [block.drop_path2.drop_prob for block in model.blocks if hasattr(block.drop_path2, "drop_prob")]
    removing("blocks.1").apply(model, X)
    assert [entry["module"] for entry in model.feature_info] == ["blocks.0", "blocks.1"]
    assert model.blocks[1].drop_path2.drop_prob == rates[-1] == pytest.approx(0.3)
    _, features = model.forward_intermediates(X)
    assert len(features) == 2


def test_feature_info_of_a_network_that_lists_the_ends_of_stages() -> None:
    stages = [nn.Sequential(Added()), nn.Sequential(Added(), Added()), nn.Sequential(Added(), Added(), Added())]
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), *stages).double()
    read = ["0", "1.0", "2.1.conv", "3.2"]
    model.feature_info = [{"num_chs": 4, "module": name} for name in read]
    plan = removing("1.0", "2.1", "3.0", "3.2")
    plan.apply(model, X)
    assert [entry["module"] for entry in model.feature_info] == ["0", "1", "2.0.conv", "3.0"]
    assert model.get_submodule("1") is stages[0]
    model = timm.create_model("mobilenetv3_large_100", num_classes=3).double().eval()
    shapes = [feature.shape for feature in model.forward_intermediates(X)[1]]
    removing("blocks.0.0", "blocks.2.1", "blocks.4.1").apply(model, X)
    assert [feature.shape for feature in model.forward_intermediates(X)[1]] == shapes
    assert [entry["num_chs"] for entry in model.feature_info] == [shape[1] for shape in shapes]


def test_depth_of_a_swin_stage() -> None:
    options: Any = {"img_size": 28, "window_size": 7, "patch_size": 2, "embed_dim": 8, "num_heads": (1, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 3), num_classes=3, **options).double().eval()
    x = torch.randn(1, 3, 28, 28, dtype=torch.float64)
    removing("layers.1.blocks.1").apply(model, x)
    assert [stage.depth for stage in model.layers] == [2, 2]
    assert len(model.forward_intermediates(x)[1]) == 2


# -- optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("layer2.1",), ("layer1.0", "layer3.2")])
def test_parameters_of_blocks_leave_the_optimizer(names: tuple[str, ...]) -> None:
    model = resnet().train()
    inside = [p for n, p in model.named_parameters() if n.startswith(tuple(f"{name}." for name in names))]
    rest = [p for p in model.parameters() if not any(p is q for q in inside)]
    optimizer = torch.optim.SGD([{"params": inside}, {"params": rest, "lr": 0.2}], lr=0.1, momentum=0.9)
    model(X).square().sum().backward()
    optimizer.step()
    moments = {p: optimizer.state[p]["momentum_buffer"].clone() for p in rest}
    plan = removing(*names)
    with pytest.raises(SurgeryError, match="Apply it first"):
        carry_optimizer(optimizer, plan)
    plan.apply(model, X)
    for _ in range(2):  # the second time changes nothing
        carry_optimizer(optimizer, plan)
        assert [len(group["params"]) for group in optimizer.param_groups] == [0, len(rest)]
        assert set(optimizer.state) == set(rest)
        assert all(torch.equal(optimizer.state[p]["momentum_buffer"], moments[p]) for p in rest)
    model(X).square().sum().backward()
    optimizer.step()


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            ("layer9",),
            "'layer9' is none of the network's removable blocks: the removable blocks are layer1.0, layer1.1",
        ),
        (("layer2.0",), r"'layer2.0' must stay: it changes the shape of a sample from \[8, 16, 16\] to \[16, 8, 8\]"),
        (("layer1.1.conv1",), "none of the network's removable blocks"),
        (("layer1",), "none of the network's removable blocks"),
    ],
)
def test_errors_leave_the_network_alone(names: tuple[str, ...], text: str) -> None:
    model = resnet()
    before, modules = state_of(model), [name for name, _ in model.named_modules()]
    for act in (lambda: removing(*names).apply(model, X), lambda: verify(model, removing(*names), X)):
        with pytest.raises(PlanError, match=f"{text}.*unchanged"):
            act()
    assert_same(model, before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not hasattr(model, "pruning_plan")


def test_twice_inside_another_and_no_block_at_all() -> None:
    with pytest.raises(PlanError, match=r"'layer1.0' is removed twice"):
        removing("layer1.0", "layer1.0")
    with pytest.raises(PlanError, match=r"'layer1.0' is to be removed twice"):
        find_removal(resnet(), ["layer1.0", "layer1.0"], X)
    model = vit()
    with pytest.raises(PlanError, match=r"'blocks.1.attn' lies inside 'blocks.1'"):
        removing("blocks.1", "blocks.1.attn").apply(model, X)
    assert len(model.blocks) == 3
    with pytest.raises(PlanError, match="it has none"):
        removing("0").apply(nn.Sequential(nn.Conv2d(3, 4, 1)).double(), X)


def test_a_network_that_fails_afterwards_is_put_back() -> None:
    class Insists(Added):
        def forward(self, x: Tensor, *_: Any) -> Tensor:
            if len(stage) < 3 and armed:
                raise RuntimeError("three are expected")
            return super().forward(x)

    armed, stage = [1], nn.Sequential(Added(), Insists(), Added())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), stage).double()
    model.feature_info = [{"module": "1.0"}, {"module": "1.2"}]  # type: ignore[assignment]
    before, children = state_of(model), list(stage)
    with pytest.raises(SurgeryError, match=r"three are expected.*put back"):
        apply_plan(model, removing("1.0"), X, check=False)
    assert_same(model, before)
    assert list(stage) == children
    assert model.feature_info == [{"module": "1.0"}, {"module": "1.2"}]
    assert not any(REMOVED.get(p) or CUTS.get(p) for p in model.parameters())
