"""Classes of one's own: given as model=, with tied tensors, with several inputs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import X, images, pruned, randomised, refused, same
from torch import Tensor, nn

from nni_plugin.adapters.models import create_model
from nni_plugin.checkpoint import from_pretrained, input_shape_of, save_pretrained
from nni_plugin.errors import CheckpointError
from nni_plugin.plan import GroupPlan, PruningPlan


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x).relu())


def test_custom_class(tmp_path: Path) -> None:
    model, dense = pruned(Own()), Own()
    before = copy.deepcopy(dense.state_dict())
    directory = save_pretrained(model, tmp_path / "a", example_input_shape=X)
    refused(directory, "'Own'.*model=")
    same(model, from_pretrained(directory, model=dense))
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
    refused(directory, "pruned already", model=model)
    refused(directory, "another model", model=create_model("resnet20", "nni_plugin"))
    with pytest.raises(CheckpointError, match="example_input_shape"):
        save_pretrained(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_custom_class_unpruned_needs_no_shape(tmp_path: Path) -> None:
    model = Own()
    directory = save_pretrained(model, tmp_path / "a")
    same(model, from_pretrained(directory, model=Own()))
    with pytest.raises(CheckpointError, match="example_input_shape"):
        input_shape_of(directory)


def test_tied_tensors(tmp_path: Path) -> None:
    model, x = Tied(), torch.randn(2, 6)
    directory = save_pretrained(model, tmp_path / "a")
    stored = safetensors.torch.load_file(directory / "model.safetensors")
    assert sorted(stored) == ["a.bias", "a.weight", "b.bias"]
    loaded: Any = from_pretrained(directory, model=Tied())
    same(model, loaded, x)
    assert loaded.a.weight is loaded.b.weight
    same(model, from_pretrained(directory, model=Tied(tie=False)), x)
    apart = save_pretrained(Tied(tie=False), tmp_path / "b")
    refused(apart, "'b.weight' and 'a.weight' to be two tensors, got one", model=Tied())


def test_views_of_one_memory(tmp_path: Path) -> None:
    model, block = Tied(tie=False), torch.randn(12, 6)
    model.a.weight.data, model.b.weight.data = block[:6], block[6:]
    same(model, from_pretrained(save_pretrained(model, tmp_path / "a"), model=Tied(tie=False)), torch.randn(2, 6))


def test_several_inputs(tmp_path: Path) -> None:
    class Sum(Own):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            return super().forward(x if y is None else x + y)

    x = images()
    for shape in ([X, X], {"x": X, "y": X}):
        model = randomised(Sum())
        plan = PruningPlan((GroupPlan("stem", 16, tuple(range(9))),))
        plan.apply(model, (x, x))
        directory = save_pretrained(model, tmp_path / "a", example_input_shape=shape)
        same(model, from_pretrained(directory, model=Sum()))
        with pytest.raises(CheckpointError, match="one input shape"):
            input_shape_of(directory)
