"""Follows NNI's utils/test_evaluator.py: losses, optimizer steps and hooks are patched, in training and fine-tuning."""

from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from nni.compression import TorchEvaluator as NNIsTorchEvaluator
from nni.compression.utils.evaluator import BackwardHook, ForwardHook, TensorHook
from referee import Case, X, step, train

pytestmark = pytest.mark.filterwarnings("ignore")


class Seen:
    """Counts what an evaluator tells."""

    def __init__(self) -> None:
        self.before = self.after = self.losses = 0
        self.order: list[str] = []

    def before_step(self) -> None:
        self.before += 1
        self.order.append("before")

    def after_step(self) -> None:
        self.after += 1
        self.order.append("after")

    def loss(self, loss: torch.Tensor, batch: Any) -> torch.Tensor:
        assert loss.requires_grad
        assert batch[0].shape == X.shape
        self.losses += 1
        return loss


def counter(buffer: list[bool]) -> Any:
    return lambda *args: buffer.append(True)


@pytest.mark.parametrize("kind", ["nni", "pytorch", "pytorch_lightning", "lightning.pytorch"])
def test_patches_and_hooks(kind: str, tmp_path: Path) -> None:
    case = Case("pytorch" if kind == "nni" else kind, tmp_path)
    evaluator = case.evaluator
    if kind == "nni":  # the control
        optimizer = nni.trace(torch.optim.SGD)(case.model.parameters(), lr=0.01)
        evaluator = NNIsTorchEvaluator(train, optimizer, step)
    evaluator._init_optimizer_helpers(case.model)
    evaluator.bind_model(case.model)
    layer = case.model.get_submodule(f"{case.prefix}conv1")
    hooks = [
        TensorHook(layer.weight, "weight", counter),
        ForwardHook(layer, "conv1", counter),
        BackwardHook(layer, "conv1", counter),
    ]
    seen = Seen()
    evaluator.patch_loss(seen.loss)
    evaluator.patch_optimizer_step([seen.before_step], [seen.after_step])
    evaluator.register_hooks(hooks)
    evaluator.train(max_steps=1)
    assert (seen.losses, seen.order) == (1, ["before", "after"])
    assert [len(hook.buffer) for hook in hooks] == [1, 1, 1]

    evaluator.remove_all_hooks()
    evaluator.register_hooks(hooks)
    evaluator.finetune()
    assert (seen.losses, seen.before, seen.after) == (51, 51, 51)
    assert [len(hook.buffer) for hook in hooks] == [50, 50, 50]

    evaluator.unbind_model()
    assert not layer._forward_hooks
    assert not layer._backward_hooks
    assert "training_step" not in vars(case.model)
