"""Models by name: identity, rebuilding, weights from files, and every refusal."""

import argparse
import copy
import json
from pathlib import Path, PureWindowsPath
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from nni_plugin.adapters.models import build, create_model, identity_of
from nni_plugin.adapters.weights import read_state_dict
from nni_plugin.errors import ModelError
from nni_plugin.plan import ModelIdentity


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "library", "arguments"),
    [
        ("resnet18", "timm", {"num_classes": 7, "in_chans": 1}),
        ("resnet18.a1_in1k", "timm", {}),
        ("vit_tiny_patch16_224", "timm", {"img_size": 32, "patch_size": 4, "depth": 2}),
        ("mobilenet_v2", "torchvision", {"num_classes": 4}),
        ("mobilenet_v2", "torchvision", {"width_mult": 0.5}),
        ("resnet20", "nni_plugin", {"in_chans": 1, "width_mult": 0.5}),
    ],
)
def test_build_repeats_the_architecture(name: str, library: str, arguments: dict[str, object]) -> None:
    model = create_model(name, library, **arguments)  # type: ignore[arg-type]
    identity = identity_of(model)
    assert identity is not None
    assert (identity.library, identity.name) == (library, name)
    stored = json.loads(json.dumps(identity.to_dict()))
    again = build(ModelIdentity(**stored))
    assert shapes(again) == shapes(model)
    assert identity_of(again) == identity
    assert identity_of(copy.deepcopy(model)) == identity
    again.load_state_dict(model.state_dict())
    images = torch.randn(2, int(arguments.get("in_chans", 3)), 32, 32)  # type: ignore[call-overload]
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert model(images).shape == (2, arguments.get("num_classes", 10))


def test_library_default_of_classes_is_recorded() -> None:
    model = create_model("resnet18", num_classes=None)
    identity = identity_of(model)
    assert identity is not None
    assert identity.kwargs["num_classes"] == 1000
    assert create_model("squeezenet1_1", "torchvision", num_classes=None)(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_identity_of_a_users_timm_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, in_chans=1, img_size=32, patch_size=8, depth=1)
    identity = identity_of(model)
    assert identity is not None
    assert identity.library == "timm"
    assert shapes(build(identity)) == shapes(model)

    model = timm.create_model("resnet18", num_classes=3)
    model.reset_classifier(5)
    identity = identity_of(model)
    assert identity is not None
    assert identity.kwargs["num_classes"] == 5

    assert identity_of(timm.create_model("resnet18", act_layer=nn.SiLU)) is None
    assert identity_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("name", "library", "text"),
    [
        ("resnet_18", "timm", "closest are .*resnet18"),
        ("mobilenetv2", "torchvision", "closest are mobilenet_v2"),
        ("resnet-20", "nni_plugin", "closest are resnet20"),
        ("resnet20", "timm", "library=nni_plugin"),
        ("resnet18", "nni_plugin", "library=t"),
        ("hf-hub:timm/resnet18.a1_in1k", "timm", "no model"),
        ("local-dir:/tmp", "timm", "no model"),
        ("fcn_resnet50", "torchvision", "no model"),
        ("resnet18.no_such_tag", "timm", "no_such_tag"),
        ("resnet18", "keras", "Unknown library 'keras'.*timm, torchvision, nni_plugin"),
    ],
)
def test_unknown_names(name: str, library: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        create_model(name, library)  # type: ignore[arg-type]
    if library != "keras":
        with pytest.raises(ModelError):
            build(ModelIdentity(library, name))


@pytest.mark.parametrize(
    ("name", "library", "arguments", "text"),
    [
        ("resnet18", "torchvision", {"in_chans": 1}, "3 channels, got in_chans=1"),
        ("resnet18", "timm", {"no_such_argument": 1}, "no_such_argument"),
        ("resnet20", "nni_plugin", {"num_classes": 0}, "num_classes >= 1"),
        ("resnet20", "nni_plugin", {"pretrained": True}, "no published weights"),
        ("resnet18", "timm", {"act_layer": nn.SiLU}, "'act_layer'.*got type"),
        ("resnet18", "timm", {"checkpoint_path": "weights.pth"}, "checkpoint="),
        ("resnet18", "torchvision", {"weights": "DEFAULT"}, "pretrained="),
        ("resnet18", "timm", {"pretrained": True, "checkpoint": "f"}, "got both"),
    ],
)
def test_refused_arguments(name: str, library: str, arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        create_model(name, library, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg"])
@pytest.mark.parametrize("library", ["timm", "torchvision", "nni_plugin"])
def test_an_identity_never_brings_weights(library: str, key: str) -> None:
    name = "resnet20" if library == "nni_plugin" else "resnet18"
    with pytest.raises(ModelError, match="not taken"):
        build(ModelIdentity(library, name, {key: True}))
    with pytest.raises(ModelError, match="got dict"):
        build(ModelIdentity(library, name, {"other": {"file": "x"}}))


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [
        (lambda s: s, ".safetensors"),
        (lambda s: s, ".pt"),
        (lambda s: {"state_dict": s, "epoch": 3, "arch": "resnet20"}, ".pth.tar"),
        (lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s}, ".pth"),
        (lambda s: {"model": {"module." + k: v for k, v in s.items()}}, ".pt"),
        (lambda s: {"module._orig_mod." + k: v for k, v in s.items()}, ".pt"),
        (lambda s: {"_orig_mod.module." + k: v for k, v in s.items()}, ".safetensors"),
    ],
)
def test_checkpoint_forms(tmp_path: Path, wrap, suffix: str) -> None:  # type: ignore[no-untyped-def]
    source = create_model("resnet20", "nni_plugin", width_mult=0.25)
    path = tmp_path / f"weights{suffix}"
    content = wrap(source.state_dict())
    if suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    model = create_model("resnet20", "nni_plugin", width_mult=0.25, checkpoint=path)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoint_of_timms_training_script(tmp_path: Path, averaged: bool) -> None:
    model, ema = timm.create_model("test_resnet", num_classes=3), timm.create_model("test_resnet", num_classes=3)
    arguments = argparse.Namespace(
        model="test_resnet", data_dir=tmp_path, log=PureWindowsPath("C:/log"), device=torch.device("cpu"), mean=None
    )
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=arguments,
        model_ema=ema if averaged else None,
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=71.5)
    file = tmp_path / "model_best.pth.tar"
    loaded = create_model("test_resnet", num_classes=3, checkpoint=file).state_dict()
    theirs = timm.create_model("test_resnet", num_classes=3)
    timm.models.load_checkpoint(theirs, str(file), weights_only=False)  # timm takes no paths among the arguments
    expected = (ema if averaged else model).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    assert all(torch.equal(value, expected[key]) for key, value in theirs.state_dict().items())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class _Foreign:
    """A class of the user's own beside the weights."""


@pytest.mark.parametrize("zipped", [True, False])
def test_class_that_a_checkpoint_may_not_hold_is_named(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {}, "own": _Foreign()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"_Foreign; save model\.state_dict\(\) alone, or as \.safetensors") as caught:
        read_state_dict(path)
    assert "\x1b" not in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    state = create_model("resnet20", "nni_plugin", width_mult=0.25).state_dict()
    for name in ("whole.pt", "whole.safetensors"):
        path = tmp_path / name
        (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(state, path)
        whole = path.read_bytes()
        for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ModelError, match="cannot be read"):
                create_model("resnet20", "nni_plugin", width_mult=0.25, checkpoint=path)
        path.write_bytes(b"no weights, just text\n" * 20)
        with pytest.raises(ModelError, match="cannot be read"):
            create_model("resnet20", "nni_plugin", width_mult=0.25, checkpoint=path)
    with pytest.raises(ModelError, match="not a file"):
        create_model("resnet20", "nni_plugin", checkpoint=tmp_path / "missing.pt")
    with pytest.raises(ModelError, match="not a file"):
        create_model("resnet20", "nni_plugin", checkpoint=tmp_path)


class _Hostile:
    """What a pickle would run when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"conv1.weight": _Hostile(mark)}, tmp_path / "hostile.pt")
    with pytest.raises(ModelError, match="cannot be read"):
        create_model("resnet20", "nni_plugin", checkpoint=tmp_path / "hostile.pt")
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {3: torch.zeros(1)}, torch.zeros(3)])
def test_checkpoints_without_named_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match="named tensors"):
        create_model("resnet20", "nni_plugin", checkpoint=tmp_path / "odd.pt")


def test_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = dict(create_model("resnet20", "nni_plugin").state_dict())

    def failure(changed: dict[str, torch.Tensor], **arguments: object) -> str:
        safetensors.torch.save_file(changed, path)
        with pytest.raises(ModelError) as caught:
            create_model("resnet20", "nni_plugin", checkpoint=path, **arguments)  # type: ignore[arg-type]
        return str(caught.value)

    lacking = {key: value for key, value in state.items() if key != "layer1.0.conv1.weight"}
    assert "lacks layer1.0.conv1.weight" in failure(lacking)
    assert "unknown extra.weight" in failure({**state, "extra.weight": torch.zeros(1)})
    message = failure({**state, "conv1.weight": torch.zeros(16, 1, 3, 3)})
    assert "conv1.weight [16, 1, 3, 3] instead of [16, 3, 3, 3]" in message
    assert "num_classes" not in message
    assert "ask for num_classes=10" in failure(state, num_classes=7)
    assert "num_classes=10" not in failure(state, width_mult=0.5)


def test_published_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(published))
    model = create_model("resnet18", "torchvision", num_classes=7, pretrained=True)
    assert model.state_dict()["fc.weight"].shape == (7, 512)
    same = [key for key in published if not key.startswith("fc.")]
    assert all(torch.equal(model.state_dict()[key], published[key]) for key in same)
    model = create_model("resnet18", "torchvision", num_classes=None, pretrained=True)
    assert torch.equal(model.state_dict()["fc.weight"], published["fc.weight"])


def test_published_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", refuse)
    with pytest.raises(ModelError, match=r"could not fetch the published weights of 'resnet18'.*no route"):
        create_model("resnet18", "torchvision", pretrained=True)
