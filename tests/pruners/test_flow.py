"""The way NNI's users go, on networks they name: compress, unwrap_model, ModelSpeedup, train on."""

from typing import Any

import nni
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin.cost import count
from nni_plugin.pruners import L1NormPruner, ModelSpeedup, TaylorFOPruner, TorchEvaluator


def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("method", [TaylorFOPruner, L1NormPruner])
@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "mobilenetv3_small_050"])
def test_from_masks_to_a_smaller_network(name: str, method: Any) -> None:
    x, target = torch.randn(8, 3, 64, 64), torch.arange(8)
    model = timm.create_model(name, num_classes=10)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # beta is what NNI's own masks forget
            nn.init.uniform_(layer.bias, -0.5, 0.5)

    def train(network: nn.Module, optimizer: Any, training_step: Any, _: Any, max_steps: int, epochs: Any) -> None:
        network.train()
        for _step in range(max_steps):
            optimizer.zero_grad()
            training_step((x, target), network).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    evaluator = TorchEvaluator(train, optimizer, step)
    dense = count(model, x[:1])
    steps = (2,) if method is TaylorFOPruner else ()
    pruner = method(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator, *steps)
    wrapped, masks = pruner.compress()
    with torch.no_grad():
        masked = wrapped.eval()(x)
    pruner.unwrap_model()
    ModelSpeedup(model, x[:1], masks).speedup_model()
    with torch.no_grad():
        assert torch.allclose(model(x), masked, atol=1e-5)
    assert count(model, x[:1]).macs < 0.5 * dense.macs
    step((x, target), model.train()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
