"""Arguments that commands share: a model's own arguments, and pictures as its published weights want them."""

import inspect
import json

import pytest
import timm
from timm.data import resolve_model_data_config

from nni_plugin import MACs
from nni_plugin.adapters.models import create_model
from nni_plugin.cli.arguments import _FLAGS, BadValue, data_kwargs, model_kwargs
from nni_plugin.cli.main import build_parser
from nni_plugin.job import Job

NEEDED = ["--output", "out", "--macs", "0.5"]


def _arguments(*flags):
    return build_parser().parse_args(["prune", *NEEDED, *flags]).prune


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("drop_path_rate=0.1", {"drop_path_rate": 0.1}),
        ("depths=[2,2,6],embed_dim=96", {"depths": [2, 2, 6], "embed_dim": 96}),
        ("act_layer=silu no_aug=true", {"act_layer": "silu", "no_aug": True}),
        ("size=(1, 2), flag=None", {"size": (1, 2), "flag": None}),
        ('{"drop_rate": 1e-3, "note": "a=b"}', {"drop_rate": 1e-3, "note": "a=b"}),
        ("{img_size: 64}", {"img_size": 64}),
        ({"img_size": 64}, {"img_size": 64}),
        ({}, {}),
    ],
)
def test_arguments_of_a_model(text, value):
    assert model_kwargs(text) == value


@pytest.mark.parametrize("text", ["{bad", "", "0.1", "drop_rate", "drop_rate=", 3, None, ["a=1"]])
def test_what_is_no_argument_of_a_model(text):
    with pytest.raises(BadValue, match=r"expected name=value separated by commas, such as drop_path_rate=0\.1"):
        model_kwargs(text)


def test_arguments_with_flags_of_their_own_are_refused(command, tmp_path):
    own = {
        name
        for name, parameter in inspect.signature(create_model).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    assert set(_FLAGS) == own
    config = tmp_path / "prune.yaml"
    config.write_text("model_kwargs:\n  in_chans: 1\n")
    for given, flag in (
        (["--model-kwargs", '{"num_classes": 3}'], "--num-classes"),
        (["--model-kwargs", "name=resnet34"], "--model"),
        (["--config", config], "--in-chans"),
    ):
        said = command("prune", "--model", "resnet18", "--output", tmp_path / "out", "--macs", "0.5", *given)
        assert said.code == 2
        assert len(said.errors) == 1, said.err
        assert "--model-kwargs: " in said.errors[0]
        assert f"give {flag} instead" in said.errors[0]


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_resnet.r160_in1k"])
def test_pictures_are_as_the_model_wants_them(name):
    found = data_kwargs(_arguments("--model", name, "--dataset", "ImageFolder"))
    expected = resolve_model_data_config(timm.create_model(name))
    channels, *size = expected.pop("input_size")
    assert size == [found["img_size"]] * 2
    assert channels == found["in_chans"]
    assert {key: found[key] for key in expected} == expected
    assert json.loads(json.dumps(found))  # a run records it


def test_flags_about_pictures_win():
    flags = ["--img-size", "96", "--mean", "0.1", "0.2", "0.3", "--std", "0.4", "--crop-pct", "1.0"]
    arguments = _arguments("--model", "test_vit", "--dataset", "ImageFolder", *flags, "--interpolation", "bilinear")
    found = data_kwargs(arguments)
    assert found["img_size"] == 96
    assert found["mean"] == [0.1, 0.2, 0.3]
    assert found["std"] == [0.4]
    assert found["crop_pct"] == 1.0
    assert found["interpolation"] == "bilinear"
    gray = data_kwargs(_arguments("--model", "resnet18", "--dataset", "ImageFolder", "--in-chans", "1"))
    assert gray["mean"] == (0.449,)
    assert gray["std"] == (0.226,)


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "test_vit", "--dataset", "digits"],
        ["--model", "resnet20", "--library", "nni_plugin", "--dataset", "ImageFolder"],
        ["--model", "resnet18", "--library", "torchvision", "--dataset", "ImageFolder"],
        ["--model", "test_vit.no_such_weights", "--dataset", "ImageFolder"],
        ["--model", "no_such_model", "--dataset", "ImageFolder"],
    ],
)
def test_other_images_and_models_keep_the_numbers_of_the_data(flags):
    found = data_kwargs(_arguments(*flags))
    assert found["img_size"] is None
    assert set(found) == {"batch_size", "img_size", "in_chans", "num_classes", "num_workers"}


def test_workers_are_no_setting_that_a_resumed_run_must_share(tmp_path):
    few, many = (Job("resnet18", tmp_path, MACs(0.5), data_kwargs={"num_workers": n, "img_size": 32}) for n in (0, 4))
    assert few.settings() == many.settings()
    assert few.settings()["data_kwargs"] == {"img_size": 32}
    assert few.data_kwargs["num_workers"] == 0
