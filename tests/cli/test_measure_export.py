"""`measure` and `export` on a pruned folder and on a model by name."""

import csv
import json
import shutil

import pytest
import torch
from checkpoints import pruned as pruned_of

from nni_plugin.adapters.models import create_model
from nni_plugin.checkpoint import from_pretrained, save_pretrained

COLUMNS = [
    "batch_size", "in_chans", "height", "width", "num_classes", "macs", "params",
    "latency_median_ms", "latency_iqr_ms", "images_per_second", "device", "dtype", "threads",
]  # fmt: skip


def _rows(folder):
    with (folder / "measure.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def test_measure_a_pruned_folder(command, pruned, tmp_path):
    said = command("measure", pruned, "--batch-size", "1,8", "--output", tmp_path / "new" / "out")
    assert said.code == 0, said.err
    rows = _rows(tmp_path / "new" / "out")
    assert [row["batch_size"] for row in rows] == ["1", "8"]
    size = json.loads((pruned / "metrics.json").read_text())["pruned"]
    for row in rows:
        assert (int(row["macs"]), int(row["params"])) == (size["macs"], size["params"])
        assert [row[name] for name in ("in_chans", "height", "width", "num_classes")] == ["3", "8", "8", "10"]
        median, per_second = float(row["latency_median_ms"]), float(row["images_per_second"])
        assert median > 0
        assert per_second == pytest.approx(int(row["batch_size"]) / median * 1e3, rel=0.01)
        assert float(row["latency_iqr_ms"]) >= 0
        assert (row["device"], row["dtype"]) == ("cpu", "float32")
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["measure.csv"]


def test_measure_a_model_by_name(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("measure", "--library", "nni_plugin", "--model", "resnet20")
    assert said.code == 0, said.err
    title = " ".join(said.out.partition("┏")[0].split())
    assert "40.81 M MACs" in title  # of ResNet-20 on CIFAR, as published
    assert "per image of 3 x 32 x 32, 10 classes" in title
    assert not list(tmp_path.iterdir())  # nothing is written unless asked for


def test_measure_leaves_the_state_of_an_interrupted_run(command, pruned, tmp_path):
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / "pretrain.pt").write_bytes(b"hours of training")
    assert command("measure", pruned, "--output", tmp_path).code == 0
    assert (tmp_path / ".state" / "pretrain.pt").read_bytes() == b"hours of training"


@pytest.mark.parametrize(("name", "file"), [("onnx", "model.onnx"), ("torch-export", "model.pt2")])
def test_export(command, pruned, tmp_path, name, file):
    output = tmp_path / "exported"
    said = command("export", pruned, "--format", name, "--output", output)
    assert said.code == 0, said.err
    assert [path.name for path in output.iterdir()] == [file]
    last = said.out.splitlines()[-1]
    assert last.startswith(f"{output / file}: ")

    # The numbers of the file, and not only its own word for them.
    images = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        expected = from_pretrained(pruned)(images)
    if name == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(output / file, providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    else:
        got = torch.export.load(output / file).module()(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_export_goes_into_the_folder_itself(command, pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "copy")
    assert command("export", folder, "--format", "torch-export").code == 0
    assert (folder / "model.pt2").is_file()


def test_export_for_timm(command, tmp_path, monkeypatch):
    torch.manual_seed(0)
    folder = save_pretrained(pruned_of(create_model("resnet10t")), tmp_path / "pruned", example_input_shape=(3, 32, 32))
    said = command("export", folder, "--format", "timm", "--output", tmp_path / "for timm")
    assert said.code == 0, said.err
    first, _, lines = said.out.partition("\n")
    assert first.startswith(f"{tmp_path / 'for timm'}: resnet10t.txt and resnet10t.safetensors")

    monkeypatch.chdir(tmp_path / "for timm")
    scope: dict[str, torch.nn.Module] = {}
    exec(compile(lines, "printed", "exec"), scope)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(scope["model"](images), from_pretrained(folder)(images))


def test_export_for_timm_of_another_network(command, pruned, tmp_path):
    said = command("export", pruned, "--format", "timm", "--output", tmp_path / "out")
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert "nni_plugin/resnet20" in said.errors[0]
    assert not (tmp_path / "out").exists()


def test_export_that_differs_too_much_is_not_kept(command, pruned, tmp_path):
    pytest.importorskip("onnxruntime")
    said = command("export", pruned, "--tolerance", "0", "--output", tmp_path / "out")
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["measure", "export"])
def test_folder_without_a_network(command, pruned, tmp_path, name):
    output = tmp_path / "out"
    empty, other, cut = tmp_path / "empty", tmp_path / "other", tmp_path / "cut"
    empty.mkdir()
    other.mkdir()
    (other / "config.json").write_text('{"architecture": "resnet18"}')
    shutil.copytree(pruned, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for folder in (tmp_path / "none", empty, other, cut):
        said = command(name, folder, "--output", output)
        assert said.code == 2
        assert len(said.errors) == 1, said.err
        assert said.errors[0].startswith(f"nni-plugin {name}: error: ")
        assert str(folder) in said.errors[0]
        assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["measure", "@", "--model", "resnet20"], ["either", "--model"]),
        (["measure", "@", "--checkpoint", "nofile"], ["--checkpoint", "--model"]),
        (["measure", "@", "--img-size", "999"], ["--img-size", "--model"]),
        (["measure", "@", "--num-classes", "10"], ["--num-classes", "--model"]),
        (["measure", "@", "--in-chans", "3"], ["--in-chans", "--model"]),
        (["measure", "@", "--pretrained"], ["--pretrained", "--model"]),
        (["measure", "@", "--library", "torchvision"], ["--library", "--model"]),
        (["measure", "@", "--model-kwargs", '{"depth": 3}'], ["--model-kwargs", "--model"]),
        (["measure", "--model", "resnet2O", "--library", "nni_plugin"], ["'resnet2O'", "resnet20"]),
        (["measure", "@", "--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["measure", "@", "--batch-size", "999999999999"], ["batch size"]),
        (["measure", "@", "--device", "banana"], ["--device", "banana"]),
        (["measure", "--model", "vit_tiny_patch16_224", "--img-size", "30"], ["30"]),
        (["measure", "@", "--output", "@/config.json/below"], ["--output", "config.json"]),
        (["export", "@", "--format", "onxx"], ["--format", "onnx"]),
        (["export", "@", "--batch-size", "few"], ["--batch-size", "'few'"]),
        (["export", "@", "--tolerance", "small"], ["--tolerance", "number"]),
        (["export", "@", "--tolerance", "-1"], ["--tolerance", "at least 0"]),
        (["export", "@", "--device", "cuda"], ["--device", "CPU"]),
        (["export", "@", "--output", "@/config.json/below"], ["--output", "config.json"]),
    ],
)
def test_bad_input(command, pruned, arguments, words):
    before = sorted(path.name for path in pruned.iterdir())
    said = command(*(argument.replace("@", str(pruned)) for argument in arguments))
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert all(word in said.errors[0] for word in words), said.errors[0]
    assert sorted(path.name for path in pruned.iterdir()) == before
