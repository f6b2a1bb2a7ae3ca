from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from training_task import loader, tiny

from nni_plugin.adapters.training import evaluate
from nni_plugin.errors import TrainingError


def test_equals_the_direct_computation_over_uneven_batches() -> None:
    model, data = tiny(), loader(21, batch_size=8)
    images, target = data.dataset.tensors
    model.eval()
    with torch.no_grad():
        logits = model(images)
    result = evaluate(model, data)
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
    assert result["loss"] == pytest.approx(functional.cross_entropy(logits, target).item(), rel=1e-6)


def test_modes_come_back_module_by_module() -> None:
    model = tiny().train()
    model.features.eval()
    evaluate(model, loader(8))
    assert model.training
    assert not model.features[1].training
    assert model.dropout.training


def test_nan_is_refused_and_the_mode_put_back() -> None:
    model = tiny().train()
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        evaluate(model, loader(8))
    assert model.training


def test_empty_loader_is_refused() -> None:
    with pytest.raises(TrainingError, match="without batches"):
        evaluate(tiny(), [])


def test_labels_beyond_the_outputs_are_refused() -> None:
    with pytest.raises(TrainingError, match="4 outputs"):
        evaluate(tiny(), [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]))])
