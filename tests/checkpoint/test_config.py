"""A config with anything wrong in it is one line of CheckpointError."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit, pruned, refused

from nni_plugin.adapters.models import create_model
from nni_plugin.checkpoint import rebuild
from nni_plugin.checkpoint.config import MAX_CONFIG_BYTES


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"schema_version": NaN}', "schema_version 1.*got nan"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not JSON"),
        (b'{"schema_version": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[]", "is damaged"),
        (b'"text"', "is damaged"),
        (b"null", "is damaged"),
        (b"{}", "schema_version 1.*got None"),
        (b'{"schema_version": "1"}', "schema_version 1.*got '1'"),
        (b'{"schema_version": 1}', "Expected 'model' as dict"),
    ],
    ids=range(13),
)
def test_config_of_another_form(saved: Path, content: bytes, match: str) -> None:
    (saved / "config.json").write_bytes(content)
    refused(saved, match)


def test_huge_config(saved: Path) -> None:
    with open(saved / "config.json", "ab") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    refused(saved, "at most 50000000 bytes")


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        place: Any = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


NESTED = json.loads("[" * 500 + "]" * 500)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set("schema_version", to=2), "schema_version 1.*got 2"),
        (_set("sha256", to=["../../etc/passwd"]), "'sha256' as str"),
        (_set("bytes", to="many"), "'bytes' as int"),
        (_set("bytes", to=10**30), "Expected 1000.* bytes"),
        (_set("ties", to=[]), "'ties' as dict"),
        (_set("ties", to={"fc.bias": "none"}), "cannot be read.*none"),
        (_set("ties", to={"fc.bias": ["fc.weight"]}), "cannot be read"),
        (_set("ties", to={"fc.bias": "fc.weight"}), "tensor 'fc.bias' to be"),
        (_set("ties", to={"more\nlines": "fc.bias"}), r"'more\\nlines' to be .*, got absent"),
        (_set("channels_last", to={}), "'channels_last' as list"),
        (_set("channels_last", to=["none"]), "cannot be read.*none"),
        (_set("channels_last", to=[["fc.bias"]]), "cannot be read"),
        (_set("channels_last", to=["fc.bias"]), "cannot be read"),
        (_set("buffer_dtypes", to=None), "'buffer_dtypes' as dict"),
        # Identity.
        (_set("model", to={}), "is damaged.*library"),
        (_set("model", "more", to=1), "is damaged.*more"),
        (_set("model", "kwargs", to=[1]), "is damaged"),
        (_set("model", "library", to=3), "library and a name as text"),
        (_set("model", "library", to="os"), "Unknown library 'os'"),
        (_set("model", "library", to="/etc"), "Unknown library '/etc'"),
        (_set("model", "name", to="../../x"), r"no model '\.\./\.\./x'"),
        (_set("model", "name", to="/etc/passwd"), "no model '/etc/passwd'"),
        (_set("model", "name", to="resnet9000\n\ud800"), "no model"),
        (_set("model", "name", to="x" * 100_000), "no model"),
        (_set("model", to={"library": "timm", "name": "hf-hub:a/b", "kwargs": {}}), "no model 'hf-hub:a/b'"),
        (_set("model", to={"library": "timm", "name": "local-dir:/tmp", "kwargs": {}}), "no model 'local-dir:/tmp'"),
        (_set("model", "kwargs", "pretrained", to=True), "'pretrained'.*not taken"),
        (_set("model", "kwargs", "checkpoint_path", to="/x"), "'checkpoint_path'.*not taken"),
        (_set("model", "kwargs", "pretrained_cfg", to={"file": "/x"}), "'pretrained_cfg'.*not taken"),
        (_set("model", "kwargs", "weights", to="DEFAULT"), "'weights'.*not taken"),
        (_set("model", "kwargs", "nonsense", to=1), "nonsense"),
        (_set("model", "kwargs", "nonsense", to={}), "'nonsense'.*must be text"),
        (_set("model", "kwargs", "num_classes", to=-5), "num_classes"),
        (_set("model", "kwargs", "num_classes", to=10**12), "cannot be rebuilt"),
        (_set("model", "kwargs", "width_mult", to=1e4), "cannot be rebuilt"),
        (_set("model", "kwargs", "width_mult", to="wide"), "could not build"),
        (_set("model", "kwargs", "deep", to=NESTED), "cannot be rebuilt|is damaged"),
        # Plan.
        (_set("plan", to=[]), "schema_version"),
        (_set("plan", to=3), "schema_version"),
        (_set("plan", "schema_version", to=7), "schema_version"),
        (_set("plan", "groups", to={}), "expected a list"),
        (_set("plan", "groups", 0, to=None), "Damaged plan"),
        (_set("plan", "groups", 0, "name", to="../../x"), r"another model.*'\.\./\.\./x'"),
        (_set("plan", "groups", 0, "total", to=10**9), "1000000000 channels in the plan"),
        (_set("plan", "groups", 0, "kept", to=[0]), "tensor .* to be"),
        (_set("plan", "groups", 0, "kept", to=[-1]), "ascending"),
        (_set("plan", "groups", 0, "factors", to=[10**400]), "is damaged"),
        (_set("plan", "removed_blocks", to=["layer1"]), "blocks"),
        (_set("plan", to=None), "tensor .* to be"),
        (_set("plan", "model", "name", to="resnet56"), "another model"),
        (_set("plan", "model", to=5), "Damaged plan"),
        # Input shape.
        (_set("input_shape", to=None), "Expected the shape of one sample"),
        (_set("input_dtype", to="os"), "Expected a dtype of inputs"),
        (_set("input_dtype", to=["int64"]), "cannot be rebuilt"),
        (_set("input_shape", to=[3, 10**6, 10**6]), "input shape.*at most"),
        (_set("input_shape", to=[3, -32, 32]), "positive integers"),
        (_set("input_shape", to=[3, 0, 32]), "positive integers"),
        (_set("input_shape", to=[3, 32.0, 32]), "positive integers"),
        (_set("input_shape", to=[3, True, 32]), "positive integers"),
        (_set("input_shape", to=[[3, 32, 32], 5]), "positive integers"),
        (_set("input_shape", to=[]), "positive integers"),
        (_set("input_shape", to={}), "cannot be rebuilt"),
        (_set("input_shape", to="3x32x32"), "positive integers"),
        (_set("input_shape", to=[1] * 9), "cannot be rebuilt"),
        (_set("input_shape", to=[[3, 32, 32]] * 17), "cannot be rebuilt"),
        (_set("input_shape", to={"nonsense": [3, 32, 32]}), "cannot be rebuilt"),
        (_set("input_shape", to=[5, 32, 32]), "cannot be rebuilt"),
    ],
)
def test_config_with_one_thing_wrong(saved: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    refused(edit(saved, change), match)


def test_plan_of_another_network(saved: Path, tmp_path: Path) -> None:
    vgg = pruned(create_model("vgg19_bn", "nni_plugin", width_mult=0.125))
    plan = json.loads(vgg.pruning_plan.to_json())
    plan["model"] = None
    refused(edit(saved, _set("plan", to=plan)), "another model: it has a group 'features")


def test_too_many_layers_are_stopped_while_building(saved: Path) -> None:
    deep = {"library": "timm", "name": "vit_tiny_patch16_224", "kwargs": {"depth": 100_000, "img_size": 32}}

    def change(config: dict[str, Any]) -> None:
        config.update(model=deep, plan=None)

    refused(edit(saved, change), "far more tensors")


def test_too_big_a_network_is_stopped_while_building(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "MAX_ELEMENTS", 50_000)
    refused(saved, "more than 50000 elements")


def test_no_such_device(saved: Path) -> None:
    refused(saved, "device 'nonsense'", device="nonsense")
