"""Saved networks of the libraries come back bit by bit."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checkpoints import X, images, pruned, randomised, same
from torch import Tensor, nn

from nni_plugin.adapters.models import create_model
from nni_plugin.checkpoint import from_pretrained, input_shape_of, save_pretrained
from nni_plugin.plan import GroupPlan, PruningPlan


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("table", torch.linspace(0.1, 0.9, 4), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * self.table


@pytest.mark.parametrize(
    ("name", "library"), [("resnet18", "timm"), ("mobilenet_v2", "torchvision"), ("resnet20", "nni_plugin")]
)
def test_pruned_networks_come_back(name: str, library: Any, tmp_path: Path) -> None:
    model = pruned(create_model(name, library, num_classes=10))
    assert save_pretrained(model, tmp_path / "a", example_input_shape=X) == tmp_path / "a"
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]
    loaded: Any = from_pretrained(tmp_path / "a")
    same(model, loaded)
    plan, again = model.pruning_plan, loaded.pruning_plan
    assert isinstance(plan, PruningPlan)
    assert isinstance(again, PruningPlan)
    assert again.digest == plan.digest
    assert again.explain() == plan.explain()
    assert input_shape_of(tmp_path / "a") == X


def test_in_a_fresh_process(network: Any, saved: Path, tmp_path: Path) -> None:
    torch.save({"x": images(), "y": network(images()).detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from nni_plugin.checkpoint import from_pretrained\n"
        "want = torch.load(sys.argv[2])\n"
        "model = from_pretrained(sys.argv[1])\n"
        "assert torch.equal(model(want['x']), want['y'])\n"
        "print(model.pruning_plan.digest)\n"
    )
    command = [sys.executable, "-P", "-c", code, str(saved), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [network.pruning_plan.digest]


def test_pruned_twice_and_saved_again(network: Any, tmp_path: Path) -> None:
    twice = pruned(network, 0.7)
    first = from_pretrained(save_pretrained(twice, tmp_path / "a"))
    second = from_pretrained(save_pretrained(first, tmp_path / "b"))
    same(twice, second)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unpruned(tmp_path: Path) -> None:
    model = randomised(create_model("resnet20", "nni_plugin", in_chans=1))
    save_pretrained(model, tmp_path / "a", extra={"top1": 0.5})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["plan"] is None
    assert config["input_shape"] == [1, 32, 32]
    assert config["extra"] == {"top1": 0.5}
    loaded: Any = from_pretrained(tmp_path / "a")
    assert not hasattr(loaded, "pruning_plan")
    same(model, loaded, images(1, 32, 32))


def test_a_plan_that_removes_nothing_is_no_warning(tmp_path: Path) -> None:
    model = randomised(create_model("resnet20", "nni_plugin", width_mult=0.5))
    plan = PruningPlan((GroupPlan("conv1", model.conv1.out_channels, tuple(range(model.conv1.out_channels))),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = from_pretrained(save_pretrained(model, tmp_path / "a", plan=plan))
    assert loaded.pruning_plan == plan


def test_users_own_timm_model_takes_timms_input_size(tmp_path: Path) -> None:
    model = randomised(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=3))
    save_pretrained(model, tmp_path / "a")
    assert input_shape_of(tmp_path / "a") == X
    same(model, from_pretrained(tmp_path / "a"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precision(network: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    network.to(dtype)
    loaded: Any = from_pretrained(save_pretrained(network, tmp_path / "a"))
    assert next(loaded.parameters()).dtype == dtype
    same(network, loaded, images().to(dtype))


def test_mixed_precision_and_nan(network: Any, tmp_path: Path) -> None:
    network.conv1.half()
    with torch.no_grad():
        network.fc.weight[0, 0] = torch.nan
    loaded: Any = from_pretrained(save_pretrained(network, tmp_path / "a"))
    assert loaded.conv1.weight.dtype == torch.float16
    assert loaded.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.fc.weight.isnan(), network.fc.weight.isnan())


def test_memory_format_comes_back(network: Any, tmp_path: Path) -> None:
    network.to(memory_format=torch.channels_last)
    loaded: Any = from_pretrained(save_pretrained(network, tmp_path / "a"))
    for ours, theirs in zip(network.parameters(), loaded.parameters(), strict=True):
        assert ours.stride() == theirs.stride()
    same(network, loaded)


def test_buffers_outside_the_state_keep_their_dtype(tmp_path: Path) -> None:
    model = WithTable().to(torch.bfloat16)
    loaded: Any = from_pretrained(save_pretrained(model, tmp_path / "a"), model=WithTable())
    assert loaded.table.dtype == torch.bfloat16
    same(model, loaded, torch.randn(2, 4, dtype=torch.bfloat16))


def test_saving_and_loading_leave_the_model_and_the_random_state(network: Any, tmp_path: Path) -> None:
    network.train()
    before, state = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    save_pretrained(network, tmp_path / "a")
    from_pretrained(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_inside_inference_mode(network: Any, tmp_path: Path) -> None:
    with torch.inference_mode():
        loaded: Any = from_pretrained(save_pretrained(network, tmp_path / "a"))
    same(network, loaded)
    loaded(images()).sum().backward()


def test_data_parallel_is_looked_through(network: Any, tmp_path: Path) -> None:
    save_pretrained(nn.DataParallel(network), tmp_path / "a")
    same(network, from_pretrained(tmp_path / "a"))
