"""Exported files: dynamic batch, parity with PyTorch, nothing left behind on failure."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nni_plugin.adapters import export
from nni_plugin.adapters.export import export_onnx, export_torch
from nni_plugin.errors import ExportError

BOTH = pytest.mark.parametrize("export_file", [export_onnx, export_torch])


class Residual(nn.Module):
    """A pruned-looking residual net: odd widths, batch norm, dropout, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.branch = nn.Sequential(nn.Conv2d(7, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 1))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.branch(x))
        return self.head(x.mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    return model


@BOTH
def test_residual_net_agrees_at_batch_sizes_it_was_not_traced_with(export_file, tmp_path, capfd):
    model = residual().train()
    model.branch.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "net.bin"
    parity = export_file(model, torch.randn(1, 3, 8, 8), path, batch_sizes=(1, 3, 5))
    assert parity.path == path
    assert parity.batch_sizes == (1, 3, 5)
    assert parity.max_rel < 1e-5
    assert list(tmp_path.iterdir()) == [path]
    assert model.training
    assert not model.branch.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert capfd.readouterr().out == ""
    assert "batch 1 and 3 and 5" in str(parity)


def test_onnx_file_holds_the_weights_itself(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = residual().eval()
    export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(6, 3, 8, 8)
    [logits] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), atol=1e-5, rtol=1e-5)


def test_torch_file_loads_without_our_code(tmp_path):
    model = residual().eval()
    export_torch(model, (torch.randn(2, 3, 8, 8),), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    images = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(program(images), model(images), atol=1e-6, rtol=1e-5)


@BOTH
def test_timm_resnet18(export_file, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=10)
    parity = export_file(model, torch.randn(1, 3, 32, 32), tmp_path / "resnet18.bin")
    assert parity.max_rel <= 1e-4


def test_file_that_gives_other_numbers_is_not_kept(monkeypatch, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    real = onnxruntime.InferenceSession

    class OffByOneThousandth:
        def __init__(self, *args, **kwargs):
            self.session = real(*args, **kwargs)
            self.get_inputs = self.session.get_inputs

        def run(self, names, feeds):
            return [1.001 * array for array in self.session.run(names, feeds)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", OffByOneThousandth)
    path = tmp_path / "net.onnx"
    path.write_bytes(b"an earlier export")
    with pytest.raises(ExportError, match=r"expected at most 1\.0e-04 relative, got 1\.0e-03"):
        export_onnx(residual(), torch.randn(1, 3, 8, 8), path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_bytes() == b"an earlier export"
    parity = export_onnx(residual(), torch.randn(1, 3, 8, 8), path, tolerance=2e-3)
    assert parity.max_rel == pytest.approx(1e-3, rel=0.01)


@BOTH
def test_nan_output_is_no_parity(export_file, tmp_path):
    model = residual()
    model.head[1].bias.data[3] = float("nan")
    with pytest.raises(ExportError, match="nan"):
        export_file(model, torch.randn(1, 3, 8, 8), tmp_path / "net.bin")
    assert not list(tmp_path.iterdir())


@BOTH
def test_network_that_fixes_its_batch_is_refused(export_file, tmp_path):
    class Fixed(nn.Module):  # runs at any batch size, but the tracer sees a plain number
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(int(x.shape[0]), -1)[:, : int(x.shape[0])]

    class FailsAtFour(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(2, 1, 1, 1)

    for model in (Fixed(), FailsAtFour()):
        with pytest.raises(ExportError, match=type(model).__name__):
            export_file(model, torch.randn(2, 3, 8, 8), tmp_path / "net.bin", batch_sizes=(2, 4))
        assert not list(tmp_path.iterdir())


def test_weights_too_large_for_one_onnx_file(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_LARGEST_ONNX_BYTES", 100)
    with pytest.raises(ExportError, match="export_torch"):
        export_onnx(residual(), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")


def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": x + y, "product": x * y}

    for export_file in (export_onnx, export_torch):
        parity = export_file(Two(), (torch.randn(1, 4), torch.randn(1, 4)), tmp_path / "two")
        assert parity.max_abs == 0.0


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_names_the_extra(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ExportError, match=rf'{missing}.*pip install "nni-plugin\[export\]"'):
        export_onnx(residual(), torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")


@BOTH
def test_bad_arguments(export_file, tmp_path):
    image = torch.randn(1, 3, 8, 8)
    with pytest.raises(ExportError, match="no folder"):
        export_file(residual(), image, tmp_path / "absent" / "net.bin")
    with pytest.raises(ExportError, match="batch sizes"):
        export_file(residual(), image, tmp_path / "net.bin", batch_sizes=(0, 2))
    with pytest.raises(ExportError, match="example inputs"):
        export_file(residual(), (), tmp_path / "net.bin")
    assert not list(tmp_path.iterdir())


@BOTH
def test_full_disk_leaves_nothing(export_file, monkeypatch, tmp_path):
    def replace(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.os, "replace", replace)
    with pytest.raises(ExportError, match="No space left"):
        export_file(residual(), torch.randn(1, 3, 8, 8), tmp_path / "net.bin")
    assert not list(tmp_path.iterdir())
