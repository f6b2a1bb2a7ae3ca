"""What is refused when saving, and what stays in the folder when it fails."""

import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import X, randomised, same

from nni_plugin.adapters.models import create_model
from nni_plugin.checkpoint import from_pretrained, save_pretrained
from nni_plugin.errors import CheckpointError
from nni_plugin.plan import ModelIdentity


def test_cut_without_a_plan_is_refused(network: Any, tmp_path: Path) -> None:
    del network.pruning_plan
    with pytest.raises(CheckpointError, match=r"tensor '(conv1|layer|stage).*weight' to be"):
        save_pretrained(network, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_wrong_identity_or_plan_is_refused(network: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another model"):
        save_pretrained(network, tmp_path / "a", identity=ModelIdentity("timm", "resnet18"), example_input_shape=X)
    narrow = ModelIdentity("nni_plugin", "resnet20", {"width_mult": 0.25})
    with pytest.raises(CheckpointError, match="channels in the plan"):
        save_pretrained(network, tmp_path / "a", identity=narrow)
    more = ModelIdentity("nni_plugin", "resnet20", {"width_mult": 0.5, "num_classes": 11})
    with pytest.raises(CheckpointError, match=r"tensor 'fc.weight'"):
        save_pretrained(network, tmp_path / "a", identity=more)
    with pytest.raises(CheckpointError, match="JSON"):
        save_pretrained(network, tmp_path / "a", extra={"model": network})
    with pytest.raises(CheckpointError, match="input shape"):
        save_pretrained(network, tmp_path / "a", example_input_shape=(3, -32, 32))
    assert os.listdir(tmp_path) == []


def test_overwriting_keeps_other_files(network: Any, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    other = randomised(create_model("resnet20", "nni_plugin"))
    save_pretrained(other, saved)
    same(other, from_pretrained(saved))
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors", "notes.txt"]
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_link_is_replaced_not_followed(network: Any, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_text("mine")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").symlink_to(tmp_path / "foreign")
    save_pretrained(network, tmp_path / "a")
    assert (tmp_path / "foreign").read_text() == "mine"
    same(network, from_pretrained(tmp_path / "a"))


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_full_disk_while_moving(network: Any, saved: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    calls, replace = [0], os.replace

    def full(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] == fails_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pretrained(randomised(create_model("resnet20", "nni_plugin")), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    same(network, from_pretrained(saved))


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "safetensors.torch.save", "tempfile.mkdtemp"])
def test_full_disk_leaves_nothing(network: Any, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(function, full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_pretrained(network, tmp_path / "new" / "folder")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_old_files_are_kept_when_they_cannot_be_put_back(
    network: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "model.safetensors").read_bytes()
    calls, replace = [0], os.replace

    def full(source: Any, target: Any) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="they are in"):
        save_pretrained(network, saved)
    assert next(saved.glob(".saving-*/old/model.safetensors")).read_bytes() == before


def test_interrupted_while_writing(network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(network, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_file_or_folder_in_the_way(network: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a" / "config.json").mkdir(parents=True)
    (tmp_path / "a" / "config.json" / "inside").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "a"):
        with pytest.raises(CheckpointError, match="could not be written"):
            save_pretrained(network, target)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "a" / "config.json" / "inside").read_text() == "mine"
    assert os.listdir(tmp_path / "a") == ["config.json"]
