"""timm's pruned-text format: what timm makes of the files is the pruned network bit by bit, or nothing is written."""

import copy
import functools
import pkgutil
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import pruned, randomised
from torch import nn

from nni_plugin.adapters import timm_format
from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.timm_format import export_timm, pruned_text
from nni_plugin.errors import ExportError
from nni_plugin.plan import PruningPlan

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
KWARGS = {"convnext_atto": {"depths": [1, 1, 1, 1]}, "densenet121": {"block_config": [2, 2, 2, 2]}}


@functools.cache
def _pruned(name: str) -> nn.Module:
    torch.manual_seed(0)
    return pruned(create_model(name, **KWARGS.get(name, {})))


@pytest.fixture
def resnet() -> nn.Module:
    return copy.deepcopy(_pruned("resnet10t"))


def _loaded(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Run the lines that the user is given, where the files are."""
    monkeypatch.chdir(folder)
    scope: dict[str, nn.Module] = {}
    exec(compile(lines, "lines", "exec"), scope)
    return scope["model"]


def _refused(model: nn.Module, folder: Path, match: str) -> None:
    with pytest.raises(ExportError, match=match) as caught:
        export_timm(model, IMAGES, folder)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "densenet121"])
def test_timm_alone_loads_the_same_network(name, tmp_path, monkeypatch):
    model = copy.deepcopy(_pruned(name)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    files = export_timm(model, IMAGES[:2], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.txt", f"{name}.safetensors", f"{name}.md"}
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert files.lines in files.how_to.read_text()
    assert "nni_plugin" not in files.lines

    loaded = _loaded(files.lines, tmp_path, monkeypatch)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(before)
    assert sum(p.numel() for p in loaded.parameters()) < sum(
        p.numel() for p in create_model(name, **KWARGS.get(name, {})).parameters()
    )
    with torch.no_grad():
        expected = model.eval()(IMAGES)
        assert expected.std(0).max() > 0  # the network looks at its images
        assert torch.equal(loaded(IMAGES), expected)
    logits = []
    for network in (model.train(), loaded.train()):  # dropout and stochastic depth included
        torch.manual_seed(1)
        logits.append(network(IMAGES))
    assert torch.equal(*logits)


def test_text_is_what_timm_ships_for_its_own_pruned_networks():
    shipped = pkgutil.get_data("timm.models", "_pruned/efficientnet_b1_pruned.txt").decode().strip()
    assert pruned_text(timm.create_model("efficientnet_b1_pruned")) == shipped


def test_files_work_inside_an_installation_of_timm(resnet, tmp_path, monkeypatch):
    """The only way in which `create_model` takes `checkpoint_path` at once: the text lies among timm's own."""
    files = export_timm(resnet, IMAGES, tmp_path)
    monkeypatch.setattr(
        "timm.models._prune.pkgutil.get_data", lambda package, name: (tmp_path / Path(name).name).read_bytes()
    )
    loaded = timm.create_model("resnet10t", num_classes=10, pruned=True, checkpoint_path=files.weights)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IMAGES), resnet.eval()(IMAGES))


def test_memory_format_of_the_network_does_not_matter(resnet, tmp_path, monkeypatch):
    files = export_timm(resnet.to(memory_format=torch.channels_last), IMAGES, tmp_path)
    loaded = _loaded(files.lines, tmp_path, monkeypatch)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), resnet.to(memory_format=torch.contiguous_format)(IMAGES))


def test_linear_layers_with_fewer_outputs_are_refused(tmp_path):
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    mlp = model.blocks[0].mlp
    mlp.fc1, mlp.fc2 = nn.Linear(192, 100), nn.Linear(100, 192)
    _refused(model, tmp_path, r"'blocks\.0\.mlp\.fc1' \(Linear\) has weight \[100, 192\].* timm makes it \[768, 192\]")


def test_normalisations_of_other_kinds_are_refused(tmp_path):
    _refused(_pruned("convnext_atto"), tmp_path, r"LayerNorm\S*\) has weight \[\d+\].* timm makes it \[\d+\]")


def test_parameters_of_no_layer_are_refused(tmp_path):
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 100))
    _refused(model, tmp_path, r"it has cls_token \[1, 1, 100\]")


def test_grouped_convolutions_are_refused(tmp_path):
    _refused(create_model("regnetx_002"), tmp_path, r"conv2\S*' \(Conv2d\) has weight \[24, 8, 3, 3\]")


def test_removed_blocks_are_refused(tmp_path):
    model = randomised(create_model("resnet18"))
    PruningPlan((), removed_blocks=("layer1.1",)).apply(model, IMAGES)
    _refused(model, tmp_path, r"'layer1\.1\.conv1' was removed")


def test_other_kinds_of_layers_are_refused(resnet, tmp_path):
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super()._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    resnet.layer1[0].conv1.__class__ = Standardised
    _refused(resnet, tmp_path, r"'layer1\.0\.conv1' is a Standardised, timm makes it a Conv2d")
    resnet.layer1[0].conv1 = nn.Sequential(resnet.layer1[0].conv1)
    _refused(resnet, tmp_path, r"'layer1\.0\.conv1' was removed")


def test_attributes_that_the_text_cannot_say_are_refused(resnet, tmp_path):
    resnet.layer1[0].conv1.padding_mode = "circular"
    _refused(resnet, tmp_path, r"'layer1\.0\.conv1' \(Conv2d\) has padding_mode circular, timm makes it zeros")


def test_other_precision_is_refused(resnet, tmp_path):
    _refused(resnet.to(torch.bfloat16), tmp_path, "of bfloat16, timm makes it .* of float32")


def test_outputs_that_differ_in_the_last_bit_are_refused(resnet, tmp_path):
    resnet.register_forward_hook(lambda module, images, logits: torch.nextafter(logits, torch.tensor(torch.inf)))
    _refused(resnet, tmp_path, "its outputs differ")


def test_networks_of_others_are_refused(tmp_path):
    _refused(create_model("resnet20", "nni_plugin"), tmp_path, r"nni_plugin/resnet20.*onnx")
    _refused(nn.Conv2d(3, 8, 1), tmp_path, "got none")


def test_refusal_leaves_earlier_files(resnet, tmp_path):
    files = export_timm(resnet, IMAGES, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ExportError, match="fails on the example inputs"):
        export_timm(resnet, IMAGES[:, :1], tmp_path)
    with pytest.raises(ExportError, match="no such folder"):
        export_timm(resnet, IMAGES, tmp_path / "absent")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert files.text in before


def test_full_disk_leaves_nothing(resnet, monkeypatch, tmp_path):
    def replace(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(timm_format.os, "replace", replace)
    _refused(resnet, tmp_path, "No space left")


def test_random_state_stays(resnet, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    export_timm(resnet, IMAGES, tmp_path)
    assert torch.equal(torch.rand(2), expected)
