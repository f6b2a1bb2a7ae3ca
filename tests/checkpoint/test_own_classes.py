"""Classes of one's own: given as model=, with tied tensors, with several inputs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import X, images, pruned, randomised, refused, same
from torch import Tensor, nn

import nni_plugin
from nni_plugin.adapters.models import create_model
from nni_plugin.checkpoint import from_pretrained, input_shape_of, save_pretrained
from nni_plugin.criteria import Magnitude
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
    same(model, from_pretrained(save_pretrained(model, tmp_path / "b"), model=Own()))  # the plan's own inputs
    del model.pruning_inputs
    with pytest.raises(CheckpointError, match="example_input_shape"):
        save_pretrained(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 12), nn.Linear(12, 5)
        self.body = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, words: Tensor, weight: Tensor | None = None) -> Any:
        x = self.body(self.embedding(words)).mean(1)
        return self.head(x if weight is None else x * weight[:, None])


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_inputs_that_are_no_floats(kind: str, tmp_path: Path) -> None:
    words, weight = torch.randint(0, 40, (4, 6)), torch.rand(4)
    inputs = {"tensor": words, "tuple": (words, weight), "dict": {"words": words, "weight": weight}}[kind]
    model = Words()
    nni_plugin.plan_channels(model, inputs, Magnitude(), [], None, nni_plugin.MACs(0.5)).apply(model, inputs)
    for _ in range(2):  # what has been loaded is saved as well
        model = from_pretrained(save_pretrained(model, tmp_path / "a"), model=Words())
        assert model.body[0].out_features < 24
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["input_dtype"] == {
        "tensor": "int64", "tuple": ["int64", None], "dict": {"words": "int64", "weight": None}
    }[kind]  # fmt: skip
    assert config["input_shape"] == {"tensor": [6], "tuple": [[6], []], "dict": {"words": [6], "weight": []}}[kind]
    if kind == "tensor":
        save_pretrained(model, tmp_path / "b", example_input_shape=[9])
        assert from_pretrained(tmp_path / "b", model=Words())(words).shape == (4, 5)


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
