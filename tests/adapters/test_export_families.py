"""Pruned networks of several families leave PyTorch: ONNX Runtime and torch.export give PyTorch's outputs.

Full widths, fewer blocks where the builder allows it: tracing takes time per layer.
"""

import functools

import pytest
import torch
from checkpoints import pruned
from torch import nn

from nni_plugin.adapters.export import export_onnx, export_torch
from nni_plugin.adapters.models import create_model

# Model -> library and further arguments of its builder.
MODELS = {
    "resnet18": ("timm", {}),
    "mobilenetv3_small_050": ("timm", {}),
    "convnext_atto": ("timm", {"depths": [1, 1, 1, 1]}),
    "densenet121": ("timm", {"block_config": [2, 2, 2, 2]}),
    "regnet_y_400mf": ("torchvision", {}),
    "vit_tiny_patch16_224": ("timm", {"img_size": 32, "depth": 2}),
}


@functools.cache
def _pruned(name: str) -> nn.Module:
    library, arguments = MODELS[name]
    torch.manual_seed(0)
    return pruned(create_model(name, library, **arguments))


@pytest.mark.slow
@pytest.mark.xdist_group("export_families")
@pytest.mark.parametrize("export_file", [export_torch, export_onnx])
@pytest.mark.parametrize("name", MODELS)
def test_pruned_network_agrees_with_pytorch(name, export_file, tmp_path):
    model = _pruned(name)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(images)
    # Of a network that no longer looked at its images, every file would agree.
    assert float(logits.std(0).max()) > 1e-3 * float(logits.abs().max())
    parity = export_file(model, images, tmp_path / "net.bin", batch_sizes=(1, 3))
    assert parity.max_rel <= (1e-6 if export_file is export_torch else 1e-5)
