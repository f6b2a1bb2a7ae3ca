"""Missing, damaged, disguised and exchanged files are one line of CheckpointError."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import edit, refused, replace_weights
from torch import Tensor


def test_missing_folder_or_files(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "Expected a folder with config.*got nothing")
    refused(saved / "config.json", "Expected a folder.*got a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"config\.json.*got a folder without it")
    (saved / "model.safetensors").unlink()
    refused(saved, r"model\.safetensors.*got a folder without it")
    os.mkfifo(saved / "model.safetensors")
    refused(saved, r"model\.safetensors.*got a folder without it")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights(saved: Path, size: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(saved, "truncated")


@pytest.mark.parametrize("where", [9, 500, -1])
def test_flipped_bit(saved: Path, where: int) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    refused(saved, "SHA-256")


def test_damaged_weights_with_a_matching_hash(saved: Path) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[20] ^= 0xFF
    (saved / "model.safetensors").write_bytes(content)
    edit(saved, lambda c: c.update(sha256=hashlib.sha256(content).hexdigest()))
    refused(saved, "cannot be read")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickle_in_disguise(saved: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved / "model.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps([Bomb()] * 3))
    else:
        torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    weights = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit(saved, lambda c: c.update(weights))
    refused(saved, "a pickle or a zip of torch.save; it is not opened")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_link_out_of_the_folder(saved: Path, name: str, tmp_path: Path) -> None:
    outside = (saved / name).rename(tmp_path / "outside")
    (saved / name).symlink_to(outside)
    refused(saved, "leads out of it")
    (saved / name).unlink()
    (saved / name).symlink_to(Path("..") / "outside")
    refused(saved, "leads out of it")
    (saved / name).unlink()
    (saved / name).symlink_to(saved / name)
    refused(saved, name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update(renamed=t.pop("fc.weight")), r"tensor '(renamed|fc\.weight)'"),
        (lambda t: t.pop("fc.bias"), r"tensor 'fc\.bias' to be absent"),
        (
            lambda t: t.update({"more\n\n": torch.zeros(1)}),
            r"tensor 'more\\n\\n' to be floating point \[1\], got absent",
        ),
        (lambda t: t.update({"fc.bias": torch.zeros(11)}), r"tensor 'fc\.bias' to be .*\[11\], got .*\[10\]"),
        (lambda t: t.update({"fc.bias": t["fc.bias"].long()}), r"tensor 'fc\.bias' to be torch\.int64"),
    ],
    ids=["renamed", "missing", "extra", "shape", "kind"],
)
def test_tensors_that_do_not_belong(saved: Path, change: Callable[[dict[str, Tensor]], Any], match: str) -> None:
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    change(tensors)
    refused(replace_weights(saved, tensors), match)
