"""Whatever a user gets wrong: exit code 2, one line that says what and what to do, and no file touched."""

import errno
import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from nni_plugin.adapters.models import create_model

HALF = ["--macs", "0.5"]

# Name: arguments after those of `small` ("@" is the folder of `files`), and what the one line must hold.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown model": (["--model", "resnet2O", *HALF], ["'resnet2O'", "resnet20"]),
    "model of another library": (["--model", "resnet18", *HALF], ["resnet18", "--library timm"]),
    "unknown library": (["--library", "tim", *HALF], ["--library", "timm"]),
    "unknown dataset": (["--dataset", "digitz", *HALF], ["'digitz'", "digits"]),
    "unknown method": (["--method", "tailor-fo", *HALF], ["'tailor-fo'", "taylor-fo"]),
    "empty folder of data": (["--dataset", "ImageFolder", "--data-dir", "@/empty", *HALF], ["--data-dir", "empty"]),
    "missing folder of data": (["--dataset", "ImageFolder", "--data-dir", "@/none", *HALF], ["--data-dir", "@/none"]),
    "no folder of data": (["--dataset", "torch/fashion_mnist", *HALF], ["--data-dir"]),
    "other files as data": (["--dataset", "torch/fashion_mnist", "--data-dir", "@/other", *HALF], ["train-images"]),
    "damaged IDX file": (["--dataset", "torch/fashion_mnist", "--data-dir", "@/cut", *HALF], ["train-images", "fetch"]),
    "IDX file of something else": (["--dataset", "torch/fashion_mnist", "--data-dir", "@/magic", *HALF], ["images"]),
    "too few classes": (["--num-classes", "5", *HALF], ["--num-classes 5", "10"]),
    "checkpoint of another model": (["--checkpoint", "@/resnet56.pt", *HALF], ["resnet56.pt", "layer1.3"]),
    "checkpoint of other classes": (["--checkpoint", "@/seven.safetensors", *HALF], ["--num-classes 7"]),
    "checkpoint of a pruned network": (["--checkpoint", "@/narrow.safetensors", *HALF], ["pruned", "from_pretrained"]),
    "damaged checkpoint": (["--checkpoint", "@/bad.pt", *HALF], ["bad.pt", "damaged"]),
    "damaged safetensors": (["--checkpoint", "@/bad.safetensors", *HALF], ["bad.safetensors", "damaged"]),
    "missing checkpoint": (["--checkpoint", "@/no.pt", *HALF], ["@/no.pt", "path"]),
    "two sources of weights": (["--pretrained", "--checkpoint", "@/bad.pt", *HALF], ["checkpoint", "leave one out"]),
    "no published weights": (["--pretrained", *HALF], ["resnet20", "checkpoint"]),
    "loss not finite in pretraining": (["--pretrain-epochs", "1", "--pretrain-lr", "1e20", *HALF], ["loss", "lr"]),
    "ratio of zero": (["--macs", "0"], ["--macs", "above 0"]),
    "ratio above one": (["--macs", "1.5"], ["--macs", "at most 1"]),
    "negative ratio": (["--params", "-0.5"], ["--params", "above 0"]),
    "ratio not a number": (["--macs", "abc"], ["--macs", "number", "'abc'"]),
    "ratio nan": (["--macs", "nan"], ["--macs", "finite"]),
    "channels of zero": (["--channels", "0"], ["--channels", "at least 1"]),
    "channels as 1.5": (["--channels", "1.5"], ["--channels", "at most 1"]),
    "channels not a number": (["--channels", "many"], ["--channels", "number"]),
    "no budget": ([], ["--macs", "--params", "--channels"]),
    "two budgets": ([*HALF, "--params", "0.5"], ["one budget", "got --macs and --params"]),
    "budget out of reach": (["--macs", "0.0001"], ["remain", "of the dense network"]),
    "budget out of reach by rounding": (["--round-to", "1000", *HALF], ["--round-to"]),
    "nothing to remove": (["--macs", "1.0"], ["nothing would be removed"]),
    "negative epochs": (["--epochs", "-1", *HALF], ["--epochs", "at least 0"]),
    "batch of zero": (["--batch-size", "0", *HALF], ["--batch-size", "at least 1"]),
    "batch of 2.5": (["--batch-size", "2.5", *HALF], ["--batch-size", "integer"]),
    "batch larger than the data": (["--batch-size", "100000", *HALF], ["--batch-size 100000", "smaller"]),
    "images too large for the memory": (["--img-size", "1000000", *HALF], ["memory", "--img-size"]),
    "rounding to zero": (["--round-to", "0", *HALF], ["--round-to", "at least 1"]),
    "seed too large": (["--seed", "9" * 30, *HALF], ["--seed", str(2**32 - 1)]),
    "latency at batch zero": (["--latency-batch-sizes", "1,0", *HALF], ["--latency-batch-sizes", "'1,0'"]),
    "iterative without epochs": (["--schedule", "iterative", *HALF], ["--schedule", "--epochs"]),
    "steps of another schedule": (["--prune-every", "7", *HALF], ["--prune-every", "iterative"]),
    "channels of another schedule": (["--prune-channels", "3", *HALF], ["--prune-channels", "iterative"]),
    "threshold of another schedule": (["--loss-threshold", "1.04", *HALF], ["--loss-threshold", "continuous"]),
    "threshold of an iterative schedule": (
        ["--schedule", "iterative", "--epochs", "1", "--loss-threshold", "0.1", *HALF],
        ["--loss-threshold", "continuous"],
    ),
    "parts of a network that has none": (["--parts", "heads", *HALF], ["--parts", "transformer"]),
    "unknown schedule": (["--schedule", "gradual", *HALF], ["--schedule", "one-shot"]),
    "layer to ignore is not there": (["--ignore", "nolayer", *HALF], ["'nolayer'", "not in the model"]),
    "unknown device": (["--device", "banana", *HALF], ["--device", "banana"]),
    "device that computes nothing": (["--device", "meta", *HALF], ["--device", "meta"]),
    "unknown optimizer": (["--opt", "sdg", *HALF], ["--opt", "'sdg'"]),
    "unknown learning-rate schedule": (["--sched", "cos", *HALF], ["--sched", "cosine"]),
    "learning rate of zero": (["--lr", "0", *HALF], ["--lr", "positive"]),
    "pretraining at a rate of zero": (["--pretrain-lr", "0", *HALF], ["--pretrain-lr", "positive"]),
    "warm-up longer than training": (["--epochs", "1", "--warmup-epochs", "3", *HALF], ["--warmup-epochs", "--epochs"]),
    "argument the model does not take": (["--model-kwargs", '{"depth": 7}', *HALF], ["depth"]),
    "model arguments not a mapping": (["--model-kwargs", "{bad", *HALF], ["--model-kwargs", "dict"]),
    "gray images for torchvision": (
        ["--library", "torchvision", "--model", "resnet18", "--in-chans", "1", *HALF],
        ["--in-chans 3", "timm"],
    ),
    "images the model does not take": (
        ["--library", "timm", "--model", "vit_tiny_patch16_224", *HALF],
        ["vit_tiny_patch16_224", "8", "224"],
    ),
    "images too small for the model": (["--library", "torchvision", "--model", "alexnet", *HALF], ["alexnet", "8"]),
    "unknown flag": (["--foo", "1", *HALF], ["--foo", "--help"]),
    "damaged YAML": (["--config", "@/damaged.yaml", *HALF], ["config", "line 1"]),
    "YAML in another encoding": (["--config", "@/latin1.yaml", *HALF], ["--config", "UTF-8"]),
    "unknown key in YAML": (["--config", "@/unknown.yaml", *HALF], ["'modell'"]),
    "wrong type in YAML": (["--config", "@/float.yaml", *HALF], ["--batch-size", "integer", "2.5"]),
    "missing YAML": (["--config", "@/no.yaml", *HALF], ["--config", "@/no.yaml"]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in ("empty", "other", "cut", "magic"):
        (folder / name).mkdir()
    (folder / "other" / "notes.txt").write_text("nothing to see")
    images = struct.pack(">IIII", 2051, 4, 28, 28) + bytes(4 * 28 * 28)
    labels = struct.pack(">II", 2049, 4) + bytes(range(4))
    for part in ("train", "t10k"):
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            packed = gzip.compress(content)
            (folder / "cut" / f"{part}-{kind}-ubyte.gz").write_bytes(packed[: len(packed) // 2])
            (folder / "magic" / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(b"\x00\x01\x02\x03" + content[4:]))
    torch.save(create_model("resnet56", "nni_plugin").state_dict(), folder / "resnet56.pt")
    seven = create_model("resnet20", "nni_plugin", num_classes=7).state_dict()
    safetensors.torch.save_file(seven, folder / "seven.safetensors")
    narrow = create_model("resnet20", "nni_plugin").state_dict()
    for key, value in narrow.items():
        if key.startswith(("layer1.0.conv1", "layer1.0.bn1")) and value.dim():
            narrow[key] = value[:5].clone()
    narrow["layer1.0.conv2.weight"] = narrow["layer1.0.conv2.weight"][:, :5].clone()
    safetensors.torch.save_file(narrow, folder / "narrow.safetensors")
    for name in ("bad.pt", "bad.safetensors"):
        (folder / name).write_bytes(np.random.default_rng(0).bytes(1000))
    (folder / "damaged.yaml").write_text("model: [unclosed\n  x: }")
    (folder / "latin1.yaml").write_bytes("dataset: façade\n".encode("latin-1"))
    (folder / "unknown.yaml").write_text("modell: resnet20\n")
    (folder / "float.yaml").write_text("batch_size: 2.5\n")
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_written(command, small, files, tmp_path, name):
    arguments, words = CASES[name]
    arguments = [argument.replace("@", str(files)) for argument in arguments]
    used = tmp_path / "used"
    (used / "plots").mkdir(parents=True)
    (used / "metrics.json").write_text("of an earlier run")
    (used / "plots" / "own.txt").write_text("the user's own")
    before = _content(used)
    for output in (tmp_path / "made" / "deep", used):
        said = command(*small, "--output", output, *arguments)
        assert said.code == 2
        assert len(said.errors) == 1, said.err
        assert said.errors[0].startswith("nni-plugin prune: error: ")
        assert "Traceback" not in said.err
        for word in words:
            assert word.replace("@", str(files)) in said.errors[0]
    assert not (tmp_path / "made").exists()
    assert _content(used) == before
    assert sorted(path.name for path in used.iterdir()) == ["metrics.json", "plots"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["prune", "measure", "export"]),
        (["prun"], ["'prun'", "prune"]),
        (["prune", "--macs", "0.5", "--output", "x"], ["--model", "required"]),
        (["prune", "--macs", "0.5", "--model", "resnet20"], ["--output", "required"]),
        (["export"], [": directory", "required"]),
        (["measure"], ["--model", "folder"]),
    ],
)
def test_incomplete_commands(command, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    said = command(*arguments)
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert all(word in said.errors[0] for word in words), said.errors[0]
    assert not list(tmp_path.iterdir())


def test_output_below_a_file(command, small, tmp_path):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        said = command(*small, *HALF, "--output", output)
        assert said.code == 2
        assert len(said.errors) == 1
        assert str(output) in said.errors[0]
        assert "--output" in said.errors[0]
    assert (tmp_path / "file").read_text() == "kept"


def test_folder_where_a_result_belongs(command, small, tmp_path):
    (tmp_path / "plan.json").mkdir()
    (tmp_path / "config.json").write_text("kept")
    said = command(*small, *HALF, "--output", tmp_path)
    assert said.code == 2
    assert "plan.json" in said.errors[0]
    assert (tmp_path / "config.json").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".state", "config.json", "plan.json"]
    (tmp_path / "plan.json").rmdir()
    assert command(*small, *HALF, "--output", tmp_path, "--resume").code == 0
    assert not (tmp_path / ".state").exists()


class _Full:
    """A function of the operating system on a disk that is full from its n-th call on paths with a word."""

    def __init__(self, function, word: str, after: int) -> None:
        self.function, self.word, self.after, self.refused = function, word, after, 0

    def __call__(self, *args, **kwargs):
        if any(self.word in str(arg) for arg in args):
            self.after -= 1
            if self.after < 0:
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "word", "after", "trained"),
    [
        (Path, "mkdir", ".state", 0, False),
        (Path, "write_text", "settings", 0, False),
        (Path, "write_text", "plan.json", 0, True),
        (Path, "write_text", "metrics.json", 0, True),
        (os, "fsync", "", 0, False),  # the first checkpoint of training
        (os, "fsync", "", 2, True),  # the pruned network
        (os, "replace", "plan.json", 0, True),
        (os, "replace", "report.html", 0, True),
    ],
)
def test_full_disk(command, small, tmp_path, monkeypatch, owner, name, word, after, trained, existing):
    output = tmp_path / "out"
    before = {"config.json": b"old", "plan.json": b"old", "report.html": b"old", "notes.txt": b"own"}
    if existing:
        output.mkdir()
        for file, content in before.items():
            (output / file).write_bytes(content)
    full = _Full(getattr(owner, name), word, after)
    # A function, for a method of Path is bound to its object.
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: full(*args, **kwargs))
        said = command(*small, *HALF, "--pretrain-epochs", "1", "--output", output)
    assert full.refused, "the disk was never full"
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert "No space left on device" in said.errors[0]
    content = _content(output)
    state = {file for file in content if file.startswith(".state")}
    assert {file: content[file] for file in content if file not in state} == (before if existing else {})
    saved = {".state/settings.json", ".state/pretrain.pt", ".state/planned.json"}
    assert state == (saved if trained else set())
    assert output.exists() == (existing or trained)
