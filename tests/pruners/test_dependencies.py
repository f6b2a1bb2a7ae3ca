"""Dependencies written for NNI's own pruners: their masks then mean a smaller network, as ours do."""

from typing import Any

import nni.compression.pruning as of_nni
import pytest
import timm
import torch
from masked import disturb
from nni.compression.base.setting import PruningSetting
from nni_task import CONVS, Plain, data, evaluator_of, gone, resnet
from torch import nn

from nni_plugin.errors import ConfigError
from nni_plugin.pruners import L1NormPruner, ModelSpeedup, auto_set_dependency_group_ids

X = data()[0][:2]


def test_coupled_layers_share_an_id_and_normalisations_follow() -> None:
    config = auto_set_dependency_group_ids(resnet(), CONVS, X)
    ids = {entry["op_names"][0]: entry.get("dependency_group_id") for entry in config}
    assert ids["conv1"] == ids["layer1.0.conv2"] != ids["layer1.0.conv1"]
    assert all("align" in e["target_settings"]["bias"] for e in config if e["op_names"][0].endswith("bn1"))
    assert {entry["sparse_ratio"] for entry in config if "sparse_ratio" in entry} == {0.5}


def test_the_config_list_given_is_left_as_it_is() -> None:
    given: list[dict[str, Any]] = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv1"], "exclude": True}]
    before = [dict(entry) for entry in given]
    config = auto_set_dependency_group_ids(resnet(), given, X)
    assert given == before
    assert "conv1" not in {entry["op_names"][0] for entry in config}


@pytest.mark.parametrize("pruner_type", [of_nni.L1NormPruner, of_nni.FPGMPruner, of_nni.TaylorPruner])
@pytest.mark.parametrize("schedule", [None, of_nni.AGPPruner])
def test_masked_is_compact(pruner_type: Any, schedule: Any) -> None:
    model = resnet()
    evaluator = evaluator_of(model, lr=0.01)
    config = auto_set_dependency_group_ids(model, CONVS, X)
    options = {"evaluator": evaluator, "training_steps": 2} if pruner_type is of_nni.TaylorPruner else {}
    pruner = pruner_type(model, config, **options)
    if schedule is not None:
        pruner = schedule(pruner, interval_steps=2, total_times=2, evaluator=evaluator)
    _, masks = pruner.compress(*(() if schedule is None else (4, None)))
    with torch.no_grad():
        expected = model.eval()(X)
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, X, masks)
    speedup.speedup_model()
    with torch.no_grad():
        assert torch.allclose(model(X), expected, atol=1e-10)
    assert speedup.report is not None
    assert not speedup.report.left
    assert not speedup.report.inexact


def test_the_channels_are_those_of_our_l1_where_a_layer_stands_alone() -> None:
    model, ours = resnet(), resnet()
    masks = of_nni.L1NormPruner(model, auto_set_dependency_group_ids(model, CONVS, X)).compress()[1]
    expected = L1NormPruner(ours, CONVS, example_inputs=X).compress()[1]
    assert gone(masks, "layer1.0.conv1") == gone(expected, "layer1.0.conv1")


def test_layers_that_were_not_selected_follow() -> None:
    model = resnet()
    config = auto_set_dependency_group_ids(model, [{"op_names": ["layer1.0.conv2"], "sparse_ratio": 0.5}], X)
    masks = of_nni.L1NormPruner(model, config).compress()[1]
    assert set(masks) == {"conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2"}
    assert gone(masks, "conv1") == gone(masks, "layer1.0.conv2")
    assert len(gone(masks, "conv1")) == 4


def test_the_classifier_keeps_the_entry_it_had() -> None:
    (entry,) = auto_set_dependency_group_ids(
        Plain().double(), [{"op_names": ["fc2"], "sparse_ratio": 0.5}], data()[0][:1]
    )
    assert entry == {"op_names": ["fc2"], "sparse_ratio": 0.5}


def test_classes_that_nni_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PruningSetting, "registry", dict(PruningSetting.registry))
    model, x = disturb(timm.create_model("mobilenetv3_small_050", num_classes=10)), torch.rand(2, 3, 32, 32)
    assert "BatchNormAct2d" not in PruningSetting.registry
    config = auto_set_dependency_group_ids(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], x)
    pruner = of_nni.L1NormPruner(model, config)
    _, masks = pruner.compress()
    with torch.no_grad():
        expected = model(x)
    pruner.unwrap_model()
    ModelSpeedup(model, x, masks).speedup_model()
    with torch.no_grad():
        assert float((model(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config_list\[0\]\['op_names'\] names 'conv9'"):
        auto_set_dependency_group_ids(resnet(), [{"op_names": ["conv9"], "sparse_ratio": 0.5}], X)


@pytest.mark.filterwarnings("ignore:.*nothing to trace")
def test_blocks_are_those_of_a_grouped_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 2, 1)).double()
    config = auto_set_dependency_group_ids(model, [{"op_names": ["0", "1"], "sparse_ratio": 0.5}], X)
    assert [entry["internal_metric_block"] for entry in config] == [4, 4]
    with pytest.warns(UserWarning, match="only where a dependency_group_id says so"):
        without = L1NormPruner(model, config)  # nothing to trace with: the blocks say it all
    masks = without.compress()[1]
    assert [channel % 2 for channel in gone(masks, "0")] in ([0] * 4, [1] * 4)
    without.unwrap_model()
    for blocks, message in (
        (5, "internal_metric_block 5 of '0' does not divide its 8 channels"),
        (0, r"\['internal_metric_block'\] must be an integer of at least 1, got 0"),
    ):
        config = [{"op_names": ["0"], "sparse_ratio": 0.5, "internal_metric_block": blocks}]
        with pytest.raises(ConfigError, match=message):
            L1NormPruner(model, config)
