"""The whole config_list: every key does what NNI says, and what is wrong is named by its key."""

import copy
from typing import Any

import pytest
import torch
from nni_task import CONVS, Plain, Training, data, evaluator_of, gone, resnet, sparsity
from torch import nn

from nni_plugin.errors import ConfigError
from nni_plugin.pruners import L1NormPruner, TaylorFOPruner

X = data()[0][:1]


def masks_of(config: Any, model: nn.Module | None = None) -> dict[str, dict[str, Any]]:
    model = resnet() if model is None else model
    return L1NormPruner(model, config, example_inputs=X).compress()[1]


def norms(model: nn.Module, *layers: str) -> torch.Tensor:
    """L1 norm of the weights of coupled layers by output channel."""
    return sum(model.get_submodule(name).weight.detach().abs().flatten(1).sum(1) for name in layers)


def test_masks_that_leave_next_to_nothing_are_said() -> None:
    model = resnet()
    pruner = TaylorFOPruner(model, [{"op_types": ["Conv2d"], "sparse_threshold": 0.5}], evaluator_of(model), 1)
    with pytest.warns(UserWarning, match=r"every channel of 6 of 6 groups.*'conv1', whose scores go from .*e-0"):
        _, masks = pruner.compress()
    assert len(gone(masks, "conv1")) == 7


def test_layers_by_type_name_and_pattern() -> None:
    by_type = masks_of([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert {name for name in by_type if "weight" in by_type[name] and by_type[name]["weight"].dim() == 4} == {
        name for name, layer in resnet().named_modules() if isinstance(layer, nn.Conv2d)
    }
    assert set(masks_of([{"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.5}])) == {"layer1.0.conv1", "layer1.0.bn1"}
    assert set(masks_of([{"op_names_re": [r"layer[12]\.0\.conv1"], "sparse_ratio": 0.5}])) == {
        f"layer{i}.0.{part}1" for i in (1, 2) for part in ("conv", "bn")
    }
    both = [{"op_names_re": ["layer1.*"], "op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    assert "conv1" in masks_of(both)  # coupled with layer1.0.conv2


def test_each_entry_has_its_ratio() -> None:
    masks = masks_of(
        [
            {"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.25},
            {"op_names": ["layer3.0.conv1"], "sparse_ratio": 0.75},
        ]
    )
    assert [sparsity(masks, f"layer{i}.0.conv1") for i in (1, 3)] == [0.25, 0.75]


def test_exclusions() -> None:
    for exclusion in (
        {"exclude_op_names": ["layer1.0.conv1"]},
        {"exclude_op_names_re": [r"layer1\.0\.conv1"]},
    ):
        masks = masks_of([{"op_types": ["Conv2d"], "sparse_ratio": 0.5, **exclusion}])
        assert "layer1.0.conv1" not in masks
        assert sparsity(masks, "layer1.0.conv2") == 0.5
    masks = masks_of([{"op_types": ["Conv2d", "BatchNorm2d"], "sparse_ratio": 0.5, "exclude_op_types": ["Linear"]}])
    assert sparsity(masks, "bn1") == 0.5


@pytest.mark.parametrize("ratio", ["sparse_ratio", "sparsity"])
def test_excluded_entries_of_nni_2(ratio: str) -> None:
    masks = masks_of([{"op_types": ["Conv2d"], ratio: 0.5}, {"op_names": ["layer1.0.conv1"], "exclude": True}])
    assert "layer1.0.conv1" not in masks
    assert sparsity(masks, "layer2.0.conv1") == 0.5


def test_an_excluded_layer_keeps_what_it_is_coupled_with() -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "exclude_op_names": ["layer1.0.conv2"]}]
    with pytest.warns(UserWarning, match=r"'conv1' left whole: 'layer1.0.conv2' .* is excluded"):
        masks = masks_of(config)
    assert sparsity(masks, "conv1") == 0
    assert not {"bn1", "layer1.0.conv2"} & set(masks)
    assert sparsity(masks, "layer1.0.conv1") == 0.5


def test_thresholds_and_their_limits() -> None:
    model = resnet()
    scores = norms(model, "layer1.0.conv1")
    threshold = float(scores.sort().values[3]) + 1e-9  # four channels lie below
    entry: dict[str, Any] = {"op_names": ["layer1.0.conv1"], "sparse_threshold": threshold}
    masks = masks_of([entry], copy.deepcopy(model))
    assert gone(masks, "layer1.0.conv1") == (scores < threshold).nonzero().flatten().tolist()
    assert sparsity(masks_of([{**entry, "max_sparse_ratio": 0.25}], copy.deepcopy(model)), "layer1.0.conv1") == 0.25
    assert sparsity(masks_of([{**entry, "min_sparse_ratio": 0.75}], copy.deepcopy(model)), "layer1.0.conv1") == 0.75


def test_limits_of_a_ratio() -> None:
    entry = {"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.5}
    assert sparsity(masks_of([{**entry, "max_sparse_ratio": 0.25}]), "layer1.0.conv1") == 0.25
    assert sparsity(masks_of([{**entry, "min_sparse_ratio": 0.75}]), "layer1.0.conv1") == 0.75


def test_target_settings_and_target_names() -> None:
    plain = Plain().double()
    masks = masks_of([{"op_names": ["conv1"], "target_settings": {"weight": {"sparse_ratio": 0.25}}}], plain)
    assert sparsity(masks, "conv1") == sparsity(masks, "conv1", "bias") == 0.25
    masks = masks_of([{"op_names": ["conv1"], "target_names": ["weight"], "sparse_ratio": 0.25}], Plain().double())
    assert set(masks["conv1"]) == {"weight"}


def test_align_by_hand() -> None:
    """A layer that shares no channels can still be told to follow."""
    config = [
        {"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.5},
        {
            "op_names": ["fc"],
            "target_names": ["weight"],
            "target_settings": {
                "weight": {"align": {"module_name": "layer1.0.conv1", "target_name": "weight", "dims": [0]}}
            },
        },
    ]
    model = resnet()
    model.fc = nn.Linear(32, 8).double()
    masks = masks_of(config, model)
    assert gone(masks, "fc") == gone(masks, "layer1.0.conv1")
    config[1]["target_settings"]["weight"]["align"]["module_name"] = "layer2.0.conv1"  # type: ignore[index]
    config[0]["op_names"] = ["layer2.0.conv1"]
    other = resnet()
    other.fc = nn.Linear(32, 8).double()
    with pytest.raises(ConfigError, match=r"fc.weight is aligned .* shape \(16, .* 8 channels .*align"):
        masks_of(config, other)


CONV1 = {"op_names": ["layer1.0.conv1"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([{"op_names": ["layer1.0.conv9"], "sparse_ratio": 0.5}], r"\[0\]\['op_names'\].*conv9.*did you mean.*conv1"),
        ([{"op_types": ["Conv3d"], "sparse_ratio": 0.5}], r"\['op_types'\].*Conv3d.*selects no layer.*Conv2d"),
        ([{"op_names_re": ["layer9.*"], "sparse_ratio": 0.5}], r"\['op_names_re'\].*selects no layer"),
        ([{"op_names_re": ["layer("], "sparse_ratio": 0.5}], r"\['op_names_re'\].*no regular expression"),
        ([{**CONV1, "sparse_ratio": 1}], r"\['sparse_ratio'\] must be a float.*got 1"),
        ([{**CONV1, "sparse_ratio": 1.2}], r"\['sparse_ratio'\].*below 1.0, got 1.2"),
        ([{**CONV1, "sparse_ratio": -0.1}], r"\['sparse_ratio'\].*at least 0.0.*got -0.1"),
        ([{**CONV1, "sparse_ratio": "0.5"}], r"\['sparse_ratio'\] must be a float"),
        ([{**CONV1, "sparse_ratio": float("nan")}], r"\['sparse_ratio'\] must be a float"),
        ([{**CONV1, "sparse_threshold": 1}], r"\['sparse_threshold'\] must be a float"),
        ([{**CONV1, "sparse_ratio": 0.5, "sparse_threshold": 0.1}], "both sparse_ratio and sparse_threshold"),
        ([{**CONV1, "sparse_ratio": 0.5, "max_sparse_ratio": 0.0}], r"\['max_sparse_ratio'\].*above 0"),
        ([{**CONV1, "sparse_ratio": 0.5, "min_sparse_ratio": 1.0}], r"\['min_sparse_ratio'\].*below 1"),
        (
            [{**CONV1, "sparse_ratio": 0.5, "min_sparse_ratio": 0.6, "max_sparse_ratio": 0.4}],
            "min_sparse_ratio 0.6 above max_sparse_ratio 0.4",
        ),
        ([{**CONV1, "sparse_ration": 0.5}], r"'sparse_ration'.*did you mean 'sparse_ratio'"),
        ([{"sparse_ratio": 0.5}], "op_types, op_names or op_names_re"),
        ([{**CONV1}], "no layer a sparse_ratio"),
        ([{**CONV1, "sparse_ratio": 0.5, "granularity": [1, 1]}], r"\['granularity'\].*output channels"),
        ([{**CONV1, "target_settings": {"weight": {"ratio": 0.5}}}], "'ratio', which is no setting"),
        ([{**CONV1, "target_settings": {"weight": {"sparse_ratio": 1}}}], r"\['weight'\]\['sparse_ratio'\].*float"),
        ([{**CONV1, "target_settings": {"bias": {"sparse_ratio": 0.5}}}], r"\['bias'\].*by 'weight' alone"),
        ([{**CONV1, "target_names": ["_output_"], "sparse_ratio": 0.5}], r"\['target_names'\].*not activations"),
        ([{"op_names": "conv1", "sparse_ratio": 0.5}], r"\['op_names'\] must be a list of strings"),
        ([{"op_types": ["ReLU"], "sparse_ratio": 0.5}], "a ReLU, which NNI cannot mask"),
        ([{**CONV1, "sparse_ratio": 0.5, "exclude_op_types": ["Conv2d"]}], "selects no layer once some are excluded"),
        ([{**CONV1, "sparse_ratio": 0.5, "global_group_id": 1.5}], r"\['global_group_id'\] must be an integer"),
        ([], "selects nothing to prune"),
        ("Conv2d", "config_list must be a list"),
        ([{"op_names": ["fc"], "sparse_ratio": 0.5}], "nothing to prune: 'fc' left whole.*network's output"),
        (
            [{"op_names": ["conv1"], "sparse_ratio": 0.5}, {"op_names": ["layer1.0.conv2"], "sparse_ratio": 0.25}],
            "'conv1' and 'layer1.0.conv2' share their channels.*sparse_ratio is 0.5 and 0.25",
        ),
    ],
)
def test_what_is_wrong_is_named(config: Any, message: str) -> None:
    model = resnet()
    parameters = list(model.named_parameters())
    with pytest.raises(ConfigError, match=message):
        L1NormPruner(model, config, example_inputs=X)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(after, parameters, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_classifier_keeps_its_outputs() -> None:
    with pytest.warns(UserWarning, match="'fc' left whole: its channels are the network's output"):
        masks = masks_of([{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}])
    assert masks["fc"]["weight"].all()


def test_linear_layers_that_are_no_classifier() -> None:
    with pytest.warns(UserWarning, match="fc2"):
        masks = masks_of([{"op_types": ["Linear"], "sparse_ratio": 0.5}], Plain().double())
    assert sparsity(masks, "fc1") == sparsity(masks, "fc1", "bias") == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluator": None}, "TaylorFOPruner .* give an evaluator"),
        ({"evaluator": "train"}, "evaluator must be one of NNI's"),
        ({"training_steps": 0}, "training_steps must be an integer of at least 1"),
        ({"training_steps": 2.5}, "training_steps must be an integer"),
    ],
)
def test_arguments_of_a_pruner_that_trains(change: dict[str, Any], message: str) -> None:
    model = resnet()
    arguments = {"evaluator": evaluator_of(model), "training_steps": 2, **change}
    with pytest.raises(ConfigError, match=message):
        TaylorFOPruner(model, CONVS, **arguments)


def test_an_evaluator_without_training() -> None:
    model = resnet()
    evaluator = evaluator_of(model)
    evaluator.training_func = None
    with pytest.raises(ConfigError, match="training_func is None"):
        TaylorFOPruner(model, CONVS, evaluator, 2)


def test_a_network_that_is_wrapped_already() -> None:
    model = resnet()
    L1NormPruner(model, CONVS, example_inputs=X)
    with pytest.raises(ConfigError, match=r"ResNet is wrapped by another compressor.*from_compressor"):
        L1NormPruner(model, CONVS, example_inputs=X)


def test_pruners_of_weights_take_an_evaluator_that_does_not_train() -> None:
    model = resnet()
    evaluator = evaluator_of(model, dummy=False)
    evaluator.training_func = None
    with pytest.warns(UserWarning, match="one by one"):
        L1NormPruner(model, CONVS, evaluator).compress()


def test_an_optimizer_of_another_network() -> None:
    model = resnet()
    pruner = TaylorFOPruner(model, CONVS, evaluator_of(resnet(), Training()), 2)
    with pytest.raises(ConfigError, match="optimizers hold no parameter of this ResNet"):
        pruner.compress()
