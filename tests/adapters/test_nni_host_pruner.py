"""NNI's own pruners: masks are those of a pruner made for the ratio, and the smaller network is the masked one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import nni.compression.pruning as of_nni
import pytest
import torch
from hosted import CLASSES, EXAMPLES, SIDE, loss, minibatches, network, task
from torch import nn

from nni_plugin import MACs
from nni_plugin.adapters.hosts import through_host
from nni_plugin.adapters.nni import host_pruner
from nni_plugin.adapters.nni.host_pruner import _evaluator, _largest, _scored, config_list, prune, removals
from nni_plugin.cost import count
from nni_plugin.errors import SurgeryError


def classes(method: str) -> Any:
    return getattr(of_nni, host_pruner.PRUNERS[method])


@pytest.mark.parametrize("method", ["nni:l1", "nni:l2", "nni:fpgm", "nni:level", "nni:taylor"])
@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_masks_are_those_of_a_pruner_made_for_the_ratio(method: str, ratio: float) -> None:
    job = task(method, MACs(0.5))
    config = config_list(job)
    masks_at, _ = _scored(job, of_nni, config)
    units = {entry.get("dependency_group_id", entry["op_names"][0]) for entry in config}
    masks_at(dict.fromkeys(units, 0.4))  # whatever was asked for before
    found = masks_at(dict.fromkeys(units, ratio))

    model = network()
    options: dict[str, Any] = {}
    if method == "nni:taylor":
        options = {"evaluator": _evaluator(job, model), "training_steps": 3}
    fresh = [entry | ({"sparse_ratio": ratio} if "sparse_ratio" in entry else {}) for entry in config]
    expected = classes(method)(model, fresh, **options).compress()[1]
    assert found.keys() == expected.keys()
    for path, targets in expected.items():
        for target, mask in targets.items():
            assert mask is None if found[path][target] is None else torch.equal(mask, found[path][target])


@pytest.mark.parametrize("method", ["nni:l1", "nni:slim"])
def test_masked_is_compact(method: str) -> None:
    settings = prune(task(method, MACs(0.5))).settings
    assert settings["masked_channels_left"] == 0
    assert settings["difference_to_masked"] < 1e-5


@pytest.mark.parametrize(("ratio", "fewest"), [(0.99, 1), (0.9, 10), (0.505, 50), (0.01, 99)])
def test_the_fewest_removals_that_fit(ratio: float, fewest: int) -> None:
    job = task("nni:l1", MACs(ratio), nn.Conv2d(3, 100, 1), classifier=())
    model, removed, trials = _largest(job, lambda gone: nn.Conv2d(3, 100 - gone, 1), 99)
    assert isinstance(model, nn.Conv2d)
    assert (model.out_channels, removed) == (100 - fewest, fewest)
    assert trials <= 7


def test_a_few_trials_reach_the_budget() -> None:
    settings = prune(task("nni:l1", MACs(0.5))).settings
    assert settings["trials"] <= 8
    assert 0.45 < settings["ratio"] <= 0.5


def test_layers_lose_the_same_share() -> None:
    result = prune(task("nni:l1", MACs(0.5)))
    ratio = result.settings["sparse_ratio"]
    for (path, dense), slim in zip(network().named_modules(), result.model.modules(), strict=True):
        if isinstance(dense, nn.Conv2d):
            assert isinstance(slim, nn.Conv2d)
            gone = dense.out_channels - slim.out_channels
            assert int(dense.out_channels * ratio) - 1 <= gone <= int(dense.out_channels * ratio), path


def test_what_is_coupled_with_a_layer_to_ignore_is_left_too() -> None:
    job = task("nni:l1", MACs(0.5), ignore=("layer1.0.conv2",))
    masked = {entry["op_names"][0] for entry in config_list(job)}
    assert "layer1.0.conv1" in masked
    assert not masked & {"conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2", "fc"}


def test_removals_begin_where_a_filter_is_the_smallest_share() -> None:
    assert removals({"a": 1, "b": 3, "c": 3}) == [(1 / 3, "b"), (1 / 3, "c"), (2 / 3, "b"), (2 / 3, "c")]


def test_scoring_leaves_weights_and_statistics_behind() -> None:
    """What is kept of the network after NNI's training is what was there before."""
    job = task("nni:taylor", MACs(0.5))
    slim, dense = prune(job).model, network()
    assert all(
        torch.equal(a, b) for a, b in zip(job.model.state_dict().values(), dense.state_dict().values(), strict=True)
    )
    kept = dict(dense.bn1.named_buffers())["running_mean"].tolist()
    assert set(slim.bn1.running_mean.tolist()) <= set(kept)
    assert len(slim.bn1.running_mean) < len(kept)


def test_slim_trains_the_factors_of_scales() -> None:
    job = task("nni:slim", MACs(0.5))
    config = config_list(job)
    layers = {entry["op_names"][0] for entry in config}
    assert all(isinstance(job.model.get_submodule(path), nn.BatchNorm2d) for path in layers)
    assert len(layers) == sum(isinstance(layer, nn.BatchNorm2d) for layer in job.model.modules())
    shared = {entry["op_names"][0]: entry["dependency_group_id"] for entry in config}
    assert shared["bn1"] == shared["layer1.0.bn2"] != shared["layer1.0.bn1"]
    masks_at, arguments = _scored(job, of_nni, config)
    assert arguments["training_steps"] == 102  # 100, and no part of a pass
    assert arguments["regular_scale"] == pytest.approx(1e-4 * len(layers))
    masks = masks_at(dict.fromkeys(shared.values(), 0.5))
    assert all(torch.equal(of["weight"], of["bias"]) for of in masks.values())
    assert [int(masks[path]["weight"].sum()) for path in ("bn1", "layer2.0.bn1")] == [4, 8]


def test_slim_without_normalisations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * SIDE**2, CLASSES))
    result = through_host(model, EXAMPLES, "nni:slim", MACs(0.5), minibatches(), loss)
    assert result.model[0].out_channels == 4


def test_linear_layers_too_but_the_classifier() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    slim = through_host(model, EXAMPLES, "nni:l1", MACs(0.5), minibatches(), loss).model
    assert slim[1].out_features == 6
    assert slim[3].out_features == CLASSES


def test_what_nni_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(of_nni.L1NormPruner, "_calculate_metrics", fail)
    with pytest.raises(SurgeryError, match=r"nni:l1: NNI failed on this ResNet \(RuntimeError: shapes differ\)"):
        prune(task("nni:l1", MACs(0.5)))


def test_nni_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys; import nni_plugin.adapters.hosts, nni_plugin.adapters.nni.host_pruner; print('nni' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_counts_are_ours() -> None:
    result = prune(task("nni:l2", MACs(0.5)))
    assert result.settings["ratio"] == count(result.model, EXAMPLES).macs / count(network(), EXAMPLES).macs
