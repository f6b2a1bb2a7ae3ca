"""Networks to save, and folders with one thing changed."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from nni_plugin.adapters.models import create_model
from nni_plugin.budgets import MACs
from nni_plugin.checkpoint import from_pretrained
from nni_plugin.criteria.taylor import TaylorFO
from nni_plugin.errors import CheckpointError
from nni_plugin.planner import plan_channels

X = (3, 32, 32)


def images(*shape: int) -> Tensor:
    return torch.randn(4, *(shape or X), generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def randomised(model: nn.Module) -> Any:
    """Give vectors and statistics values of their own: some builders start gates at zero."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def pruned(model: nn.Module, ratio: float = 0.5) -> Any:
    model = randomised(model)
    x = images()
    plan = plan_channels(model, x, TaylorFO(), [(x, torch.arange(4))], loss, MACs(ratio))
    assert plan.channels_removed > 0
    return plan.apply(model, x)


@functools.cache
def pruned_resnet20() -> Any:
    torch.manual_seed(0)
    return pruned(create_model("resnet20", "nni_plugin", width_mult=0.5))


def same(model: nn.Module, loaded: nn.Module, x: Tensor | None = None) -> None:
    x = images() if x is None else x
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def refused(directory: Path, match: str, **arguments: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        from_pretrained(directory, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1200


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the config as somebody who knows its form would."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return directory


def replace_weights(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """Put other tensors there with a matching hash, so that only the later checks can object."""
    content = safetensors.torch.save(tensors)
    (directory / "model.safetensors").write_bytes(content)
    weights = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return edit(directory, lambda config: config.update(weights))
