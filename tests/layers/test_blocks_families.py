"""Families of timm: their candidates; each without one of them runs forward and backward, is saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from nni_plugin import ModelIdentity, PruningPlan, count, from_pretrained, save_pretrained
from nni_plugin.layers import removable_blocks

TRANSFORMER = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
SWIN = {"img_size": 28, "window_size": 7, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}

FAMILIES: dict[str, tuple[dict[str, Any], int, tuple[int, int, int], str]] = {
    # name: arguments, pixels, number of (blocks, branches, units), the one to remove
    "resnet18": ({"channels": (8, 8, 8, 8)}, 32, (4, 0, 0), "layer4.1"),
    "resnetv2_50": ({"layers": (2, 2), "channels": (32, 64), "stem_chs": 8}, 32, (2, 0, 0), "stages.1.blocks.1"),
    "vit_tiny_patch16_224": (TRANSFORMER, 32, (2, 4, 0), "blocks.0"),
    "beit_base_patch16_224": (TRANSFORMER, 32, (2, 4, 0), "blocks.1.attn"),
    "convnext_atto": ({"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 16)}, 32, (5, 0, 0), "stages.1.blocks.0"),
    "mixer_s32_224": ({"img_size": 64}, 64, (8, 16, 0), "blocks.3.mlp_tokens"),
    "swin_tiny_patch4_window7_224": (SWIN, 28, (4, 8, 0), "layers.1.blocks.0"),
    "mobilenetv3_small_050": ({}, 32, (7, 0, 0), "blocks.2.2"),
    "efficientnet_lite0": ({}, 32, (9, 0, 0), "blocks.5.3"),
    "regnetx_002": ({}, 32, (9, 0, 0), "s4.b3"),
    "repvgg_a0": ({}, 32, (0, 0, 17), "stages.2.5"),
    "pvt_v2_b0": ({"depths": (1, 1, 2, 1)}, 32, (5, 10, 0), "stages.2.blocks.0"),
    "poolformer_s12": ({}, 32, (12, 24, 0), "stages.2.blocks.1"),
}


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=3, **FAMILIES[name][0])
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    arguments, size, expected, chosen = FAMILIES[name]
    model, x = create(name), torch.randn(2, 3, size, size)
    found = removable_blocks(model, x)
    kinds = [block.kind for block in found]
    assert tuple(kinds.count(kind) for kind in ("block", "branch", "unit")) == expected
    (block,) = [block for block in found if block.name == chosen]
    before, shape = count(model, x), model(x).shape
    parameters = sum(p.numel() for member in block.members for p in model.get_submodule(member).parameters())
    PruningPlan((), (chosen,)).apply(model, x)

    after = count(model, x)
    assert parameters > 0
    assert after.params == before.params - parameters
    assert after.macs < before.macs
    assert model(x).shape == shape
    assert model.pruning_plan.shells == ((chosen,) if block.kind == "branch" else ())  # type: ignore[union-attr]
    modules = dict(model.named_modules())
    assert all(entry["module"] in modules for entry in model.feature_info)  # type: ignore[union-attr]
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())

    identity = ModelIdentity("timm", name, {"num_classes": 3, **arguments})
    save_pretrained(model, tmp_path, identity=identity, example_input_shape=(3, size, size))
    loaded = from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded(x), model.eval()(x))


def test_no_candidates_where_every_output_is_read_again() -> None:
    model = timm.create_model("densenet121", growth_rate=4, block_config=(2, 2))
    assert removable_blocks(model, torch.zeros(1, 3, 32, 32)) == []
