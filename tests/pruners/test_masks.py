"""Masks as pruners write them: read, refused, and brought to one mask a parameter."""

from collections import defaultdict

import pytest
import torch
from masked import filters
from torch import nn

from nni_plugin.errors import MaskError
from nni_plugin.pruners.masks import load_masks, parameter_masks, used_channels


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


LAYERS = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed in groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "linear": lambda: nn.Linear(4, 6),
}


# A depthwise layer has one axis: its inputs are its outputs.
@pytest.mark.parametrize(
    ("name", "axis"), [(n, a) for n in LAYERS for a in ("in", "out") if (n, a) != ("depthwise", "in")]
)
def test_used_channels_are_those_that_change_the_output(name, axis):
    layer = LAYERS[name]()
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(layer.weight.shape, generator=generator) < 0.7
    mask[0] = mask[-1] = False
    if layer.weight.dim() == 4:
        mask = mask[:, :, :1, :1] & (torch.rand(len(mask), 1, 1, 1, generator=generator) < 0.5).expand(
            layer.weight.shape
        )
    layer.weight.data.mul_(mask)
    nn.init.zeros_(layer.bias)
    x = torch.rand(1, 4, 5, 5) if layer.weight.dim() == 4 else torch.rand(1, 4)
    x.requires_grad_()
    out = layer(x).abs()
    dims = [d for d in range(x.dim()) if d != 1]
    expected = out.sum(dims) != 0 if axis == "out" else torch.autograd.grad(out.sum(), x)[0].abs().sum(dims) != 0
    assert used_channels(layer, mask, axis).tolist() == expected.tolist()


def test_used_columns_of_an_embedding():
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[:, 1] = False
    assert used_channels(nn.Embedding(5, 3), mask, "out").tolist() == [True, False, True]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("full", [False, True])
def test_a_mask_on_an_output_is_held_by_the_weights(name, full):
    layer, kept = LAYERS[name](), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    kept = kept[: layer.weight.shape[0]] if name == "depthwise" else kept
    x = torch.rand(2, 4, 5, 5) if layer.weight.dim() == 4 else torch.rand(2, 4)
    out = layer(x)
    mask = kept.reshape(-1, 1, 1) if out.dim() == 4 else kept
    mask = mask.expand(out.shape[1:])[None] if full else mask[None]
    for target, part in parameter_masks(nn.Sequential(layer), {"0": {"_output_0": mask}}).items():
        getattr(layer, target.removeprefix("0.")).data.mul_(part)
    assert torch.equal(layer(x), out * mask)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "depthwise"])
def test_a_mask_on_an_input_is_held_by_the_weights(name):
    layer, kept = LAYERS[name](), torch.tensor([1.0, 0.0, 0.0, 1.0])
    x = torch.rand(2, 4, 5, 5) if layer.weight.dim() == 4 else torch.rand(2, 4)
    mask = kept.reshape(1, -1, *[1] * (x.dim() - 2))
    expected = layer(x * mask)
    found = parameter_masks(nn.Sequential(layer), {"0": {"_input_0": kept}})
    assert list(found) == ["0.weight"]
    layer.weight.data.mul_(found["0.weight"])
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_masks_of_shared_layers_meet(model):
    layer = nn.Linear(4, 4)
    shared = nn.ModuleDict({"a": layer, "b": layer})
    masks = {**filters(shared, {"a": [0]}, bias=False), **filters(shared, {"b": [2]}, bias=False)}
    (name,), (mask,) = zip(*parameter_masks(shared, masks).items(), strict=True)
    assert name == "a.weight"
    assert mask.any(1).tolist() == [False, True, False, True]


def test_files_are_read_without_executing_them(model, tmp_path):
    masks = filters(model, {"0": [1]})
    torch.save(masks, tmp_path / "plain.pth")
    nested = defaultdict(dict)
    nested.update(masks)
    nested["4"]["bias"] = None
    torch.save(nested, tmp_path / "nni.pth")
    for path in ("plain.pth", "nni.pth"):
        found = load_masks(str(tmp_path / path), "cpu")
        assert torch.equal(found["0"]["weight"], masks["0"]["weight"])
        assert "bias" not in found.get("4", {})
    torch.save({"0": {"weight": print}}, tmp_path / "code.pth")
    with pytest.raises(MaskError, match=r"code\.pth.*cannot be read"):
        load_masks(tmp_path / "code.pth")


def test_what_holds_no_masks_is_refused(model, tmp_path):
    (tmp_path / "text.pth").write_text("no masks")
    with pytest.raises(MaskError, match=r"text\.pth.*cannot be read"):
        load_masks(tmp_path / "text.pth")
    with pytest.raises(MaskError, match=r"There is no masks file .*gone\.pth"):
        load_masks(tmp_path / "gone.pth")
    for empty in ({}, {"0": {}}, {"0": {"weight": None}}):
        with pytest.raises(MaskError, match="There is no mask"):
            load_masks(empty)
    for wrong in ([1], {"0": torch.ones(1)}, None):
        with pytest.raises(MaskError, match=r"Expected masks as \{module"):
            load_masks(wrong)


BAD = {
    "another model": ({"layer1.conv": {"weight": torch.ones(4)}}, r"no module 'layer1\.conv'"),
    "shape": ({"0": {"weight": torch.ones(4, 3, 3, 1)}}, r"'weight' of module '0' has shape \[4, 3, 3, 1\], expected"),
    "values": ({"0": {"bias": torch.full((4,), 0.5)}}, r"'bias' of module '0' holds other values"),
    "nan": ({"0": {"bias": torch.full((4,), torch.nan)}}, r"'bias' of module '0' holds other values"),
    "empty": ({"0": {"bias": torch.ones(0)}}, r"'bias' of module '0' is an empty tensor"),
    "no tensor": ({"0": {"bias": [1, 1, 0, 1]}}, r"'bias' of module '0' is list"),
    "no parameter": ({"2": {"weight": torch.ones(4)}}, r"'weight' of module '2' is for no parameter"),
    "a buffer": ({"1": {"running_mean": torch.ones(4)}}, r"'running_mean' of module '1' is for no parameter"),
    "an activation's": ({"2": {"_output_0": torch.zeros(1, 4, 1, 1)}}, r"'_output_0' of module '2' cannot be held"),
    "a norm's input": ({"1": {"_input_0": torch.zeros(1, 4, 1, 1)}}, r"'_input_0' of module '1' cannot be held"),
    "parts of channels": ({"0": {"_output_0": torch.eye(4)[None, :, None]}}, r"'_output_0' of module '0' masks parts"),
    "width": ({"0": {"_output_0": torch.ones(1, 5, 1, 1)}}, r"'_output_0' .* expected 4 channels along dimension 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_masks_are_refused_by_name(model, case):
    masks, text = BAD[case]
    with pytest.raises(MaskError, match=text):
        parameter_masks(model, masks)


def test_a_wrapped_model_is_refused(model):
    pruning = pytest.importorskip("nni.compression.pruning")
    pruner = pruning.L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    with pytest.raises(MaskError, match=r"unwrap_model\(\)"):
        parameter_masks(model, masks)
    pruner.unwrap_model()
    assert set(parameter_masks(model, load_masks(masks))) == {"0.weight", "0.bias"}
