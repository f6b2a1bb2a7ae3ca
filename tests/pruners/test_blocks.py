"""BlockPruner and its kin: which blocks go, that masked is removed, schedules, and what is refused."""

import copy
import itertools
import warnings
from typing import Any

import nni
import nni.compression.pruning as of_nni
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks_at_random import assert_same, state_of
from nni.compression import TorchEvaluator
from nni.compression.pruning import AGPPruner, LinearPruner
from nni_task import BATCH, CLASSES, Training, data, deep_resnet, evaluator_of, gone, resnet, step
from torch import Tensor, nn

from nni_plugin.criteria import Magnitude
from nni_plugin.errors import ConfigError, CriterionError, DataError
from nni_plugin.layers import Imprinting, LayerEnsemble, LayerStatistic, removable_blocks, removal_order
from nni_plugin.networks import vgg19_bn
from nni_plugin.pruners import ImprintingPruner, L1NormPruner, LayerStatisticPruner, ModelSpeedup, TaylorFOPruner
from nni_plugin.pruners.minibatches import held_out_places

STEPS = 4
THIRD = [{"op_types": ["Conv2d"], "sparse_ratio": 0.3}]  # two of seven
ALL = ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]


def pruner_of(model: nn.Module, config: Any = THIRD, method: Any = ImprintingPruner, **options: Any) -> Any:
    evaluator = options.pop("evaluator", None) or evaluator_of(model)
    return method(model, config, evaluator, options.pop("training_steps", STEPS), **options)


def masked_blocks(masks: dict[str, dict[str, Tensor]], block: str) -> set[bool]:
    """Whether each target in a block is masked, wholly: True, not at all: False."""
    found = set()
    for path, targets in masks.items():
        if path.startswith(f"{block}."):
            for mask in (mask for mask in targets.values() if mask is not None):  # no bias, no mask
                assert bool((mask == mask.flatten()[0]).all())
                found.add(not bool(mask.any()))
    return found


def finish(pruner: Any, model: nn.Module, masks: Any, x: Tensor) -> ModelSpeedup:
    """Unwrap and speed up; the small network is the masked one, and all of it trains."""
    with torch.no_grad():
        expected = model.eval()(x)
    pruner.unwrap_model()
    planned = copy.deepcopy(model)
    pruner.plan().apply(planned, x)
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    with torch.no_grad():
        for small in (model, planned):
            assert float((small.eval()(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert speedup.plan is not None
    assert speedup.plan.removed_blocks == pruner.plan().removed_blocks
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return speedup


@pytest.mark.parametrize("method", [ImprintingPruner, LayerStatisticPruner])
def test_masks_of_whole_blocks_and_the_network_without_them(method: Any) -> None:
    model, x = deep_resnet(), data()[0]
    pruner = pruner_of(model, method=method)
    assert pruner.candidates == ALL == [block.name for block in removable_blocks(deep_resnet(), x)]
    assert any("'layer2.0' stays: it changes the shape" in note for note in pruner.notes)
    _, masks = pruner.compress()
    removed = pruner.plan().removed_blocks
    assert set(removed) == set(removal_order(pruner.scores)[:2])
    for block in ALL:
        assert masked_blocks(masks, block) == {block in removed}
        layers = {"conv1", "bn1", "conv2", "bn2"}
        assert {path for path in masks if path.startswith(block)} == {f"{block}.{layer}" for layer in layers}
    assert set(masks["layer1.0.bn1"]) == {"weight", "bias"}
    assert bool(masks["conv1"]["weight"].all())
    finish(pruner, model, masks, x)
    assert len(model.layer1) + len(model.layer2) + len(model.layer3) == 7
    assert type(masks) is dict


def test_scores_are_those_of_the_importance_on_the_minibatches_of_the_training() -> None:
    model, (images, target) = deep_resnet(), data()
    plain = copy.deepcopy(model)
    pruner = pruner_of(model, importance=Imprinting(300), held_out=0.25)
    pruner.compress()
    # Four steps with learning rate 0 change the statistics of normalisations, which the evaluator's training does.
    Training()(plain, torch.optim.SGD(plain.parameters(), lr=0.0), step, max_steps=STEPS)
    batches = list(zip(images.split(BATCH), target.split(BATCH), strict=True))
    held = [batches.pop(place) for place in held_out_places(4, 0.25)]
    blocks = removable_blocks(plain, images)
    expected = Imprinting(300).score(plain, images[:1], blocks, batches, held_out=held)
    assert pruner.scores == pytest.approx(expected, abs=1e-12)
    assert len(set(expected.values())) > 1


def test_the_training_goes_on_undisturbed_and_nothing_stays_on_the_network() -> None:
    model, plain = deep_resnet(), deep_resnet()
    pruner = pruner_of(model, evaluator=evaluator_of(model, lr=0.05))
    pruner.compress()
    Training()(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), step, max_steps=STEPS)
    pruner.unwrap_model()
    assert pruner.evaluator.model is None
    expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.allclose(tensor, expected[name], rtol=1e-12, atol=1e-15), name
    for name, part in model.named_modules():
        assert not part._forward_hooks, name
        assert not part._forward_pre_hooks, name
        assert part.training, name


def test_a_statistic_of_weights_needs_no_training() -> None:
    model = deep_resnet()
    with torch.no_grad():
        for name in ("conv1", "conv2"):
            getattr(model.layer2[1], name).weight.mul_(1e-3)
    pruner = LayerStatisticPruner(model, THIRD, example_inputs=data()[0][:1], importance=LayerStatistic(Magnitude()))
    _, masks = pruner.compress()
    assert "layer2.1" in pruner.plan().removed_blocks
    assert removal_order(pruner.scores)[0] == "layer2.1"
    finish(pruner, model, masks, data()[0])


@pytest.mark.parametrize(("ratio", "removed"), [(0.143, 1), (0.29, 2), (2 / 7, 2), (0.5, 3), (0.99, 6)])
def test_the_ratio_is_a_share_of_the_blocks(ratio: float, removed: int) -> None:
    pruner = pruner_of(deep_resnet(), [{"op_types": ["Conv2d"], "sparse_ratio": ratio}])
    pruner.compress()
    assert len(pruner.plan().removed_blocks) == removed


def test_entries_with_other_settings_are_ranked_apart() -> None:
    config = [
        {"op_names_re": [r"layer1\..*conv.*"], "sparse_ratio": 0.7},
        {"op_names_re": [r"layer3\..*conv.*"], "sparse_ratio": 0.5, "global_group_id": 1},
    ]
    pruner = pruner_of(deep_resnet(), config)
    assert pruner.candidates == ["layer1.0", "layer1.1", "layer1.2", "layer3.1", "layer3.2"]
    pruner.compress()
    stages = [name.partition(".")[0] for name in pruner.plan().removed_blocks]
    assert stages == ["layer1", "layer1", "layer3"]


def test_a_threshold_and_limits() -> None:
    def removed(**settings: Any) -> tuple[str, ...]:
        pruner = pruner_of(deep_resnet(), [{"op_types": ["Conv2d"], **settings}], importance=importance)
        pruner.compress()
        blocks: tuple[str, ...] = pruner.plan().removed_blocks
        scores.update(pruner.scores)
        return blocks

    importance, scores = Imprinting(), dict[str, float]()
    below = removed(sparse_threshold=0.1)
    assert set(below) == {name for name in ALL if scores[name] < 0.1}
    assert 0 < len(below) < 7
    assert len(removed(sparse_threshold=9.0)) == 6  # one always stays
    assert len(removed(sparse_threshold=9.0, max_sparse_ratio=0.3)) == 2


def test_what_is_selected_decides_what_goes_of_a_transformer() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=16, depth=3, num_classes=CLASSES)

    model = network()
    evaluator = evaluator_of_pictures(model)
    pruner = ImprintingPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.4}], evaluator, STEPS)
    assert pruner.candidates == ["blocks.0", "blocks.1", "blocks.2"]
    _, masks = pruner.compress()
    (block,) = pruner.plan().removed_blocks
    assert masked_blocks(masks, block) == {True}
    assert f"{block}.norm1" in masks
    speedup = finish(pruner, model, masks, PICTURES)
    assert len(model.blocks) == 2
    assert speedup.plan.cost_after.params < speedup.plan.cost_before.params  # type: ignore[union-attr]

    model = network()
    config = [{"op_names_re": [r".*\.attn\..*"], "op_types": ["Linear"], "sparse_ratio": 0.7}]
    pruner = ImprintingPruner(model, config, evaluator_of_pictures(model), STEPS)
    assert pruner.candidates == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    _, masks = pruner.compress()
    assert len(pruner.plan().removed_blocks) == 2
    assert not any(".mlp" in path for path in masks)
    finish(pruner, model, masks, PICTURES)


SIDE = 32
PICTURES = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def evaluator_of_pictures(model: nn.Module) -> TorchEvaluator:
    def train(network: nn.Module, optimizer: Any, training_step: Any, _: Any, max_steps: int, epochs: Any) -> None:
        network.train()
        for _step in range(max_steps):
            optimizer.zero_grad()
            training_step((PICTURES, torch.arange(CLASSES)), network).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
    return TorchEvaluator(train, optimizer, step, dummy_input=PICTURES[:1])


@pytest.mark.parametrize("schedule", [AGPPruner, LinearPruner])
def test_inside_a_schedule_blocks_go_one_after_the_other_and_stay_gone(schedule: Any) -> None:
    model, training = deep_resnet(), Training()
    pruner = pruner_of(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.6}], evaluator=evaluator_of(model, training))
    scheduled = schedule(pruner, interval_steps=STEPS, total_times=4)
    seen: list[tuple[str, ...]] = []
    ranked: list[int] = []

    def look(steps: int) -> None:
        if steps % STEPS == 0:
            seen.append(pruner.plan().removed_blocks)
            ranked.append(len(pruner.scores))

    training.after_step = look
    _, masks = scheduled.compress(max_steps=4 * STEPS + 2, max_epochs=None)
    goals = [1 - (1 - t / 4) ** 3 if schedule is AGPPruner else t / 4 for t in (1, 2, 3, 4)]
    assert [len(blocks) for blocks in seen] == [int(7 * 0.6 * goal + 1e-9) for goal in goals]
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(seen))
    assert ranked == [7, *(7 - len(blocks) for blocks in seen[:-1])]  # those that are gone are not ranked again
    scheduled.unwrap_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speedup = ModelSpeedup(model, data()[0], masks)
        speedup.speedup_model()
    assert speedup.plan is not None
    assert len(speedup.plan.removed_blocks) == 4


def test_from_compressor_keeps_the_channels_that_another_masked() -> None:
    model, x = deep_resnet(), data()[0]
    first = L1NormPruner(model, [{"op_names": ["layer2.0.conv1"], "sparse_ratio": 0.5}], example_inputs=x)
    first.compress()
    config = [{"op_names_re": [r"layer[13]\..*conv.*"], "sparse_ratio": 0.4}]
    second = ImprintingPruner.from_compressor(first, config, STEPS, evaluator_of(model))
    assert second.fused_compressors == [second, first]
    _, masks = second.compress(max_steps=STEPS, max_epochs=None)
    assert len(gone(masks, "layer2.0.conv1")) == 4
    assert len(second.plan().removed_blocks) == 2
    with torch.no_grad():
        expected = model.eval()(x)
        second.unwrap_model()
        speedup = ModelSpeedup(model, x, masks)
        speedup.speedup_model()
        assert torch.allclose(model.eval()(x), expected, rtol=1e-9)
    assert speedup.plan is not None
    assert speedup.plan.channels_removed == 4
    assert speedup.plan.removed_blocks == second.plan().removed_blocks
    assert (model.layer2[0].conv1.out_channels, len(model.layer1) + len(model.layer3)) == (4, 4)


def test_blocks_and_channels_of_ours_one_after_the_other() -> None:
    model, x = deep_resnet(), data()[0]
    blocks = pruner_of(model)
    _, masks = blocks.compress()
    finish(blocks, model, masks, x)
    channels = TaylorFOPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator_of(model), STEPS)
    _, masks = channels.compress()
    finish(channels, model, masks, x)
    assert model.pruning_plan.removed_blocks == blocks.plan().removed_blocks
    assert model.pruning_plan.channels_removed > 0


def test_an_ensemble_ranks_too() -> None:
    pruner = pruner_of(deep_resnet(), importance=LayerEnsemble([Imprinting(), Magnitude()]))
    pruner.compress()
    assert len(pruner.plan().removed_blocks) == 2


# -- what is refused, the network unchanged --------------------------------------------------------------


def refused(model: nn.Module, config: Any, match: str, error: Any = ConfigError, **options: Any) -> None:
    state = state_of(model)
    with pytest.raises(error, match=match):
        pruner_of(model, config, **options)
    assert_same(model, state)


def test_networks_without_a_block_to_remove() -> None:
    class Straight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))

    refused(Straight().double(), THIRD, "Straight has no block that could be the identity")
    model = vgg19_bn(num_classes=CLASSES, width_mult=0.0625).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    refused(model, THIRD, "layer of a plain network, which zeros would cut in two.*removed_blocks=", example_inputs=x)


def test_selections_that_hold_no_whole_block() -> None:
    refused(deep_resnet(), [{"op_names": ["conv1"], "sparse_ratio": 0.5}], "selects no layer in a block.*'layer1.0'")
    some = [{"op_names": ["layer1.0.conv1", "layer2.1.conv2"], "sparse_ratio": 0.5}]
    refused(deep_resnet(), some, r"'layer1.0.conv2' \(Conv2d\) in it is not selected")
    outside = [{**THIRD[0], "exclude_op_names_re": [r".*conv2"]}]
    refused(deep_resnet(), outside, "'layer1.0.conv2' in it is excluded")


def test_an_excluded_layer_keeps_its_block() -> None:
    pruner = pruner_of(deep_resnet(), [{**THIRD[0], "exclude_op_names": ["layer1.1.conv1"]}])
    assert pruner.candidates == [name for name in ALL if name != "layer1.1"]
    assert "block 'layer1.1' stays: 'layer1.1.conv1' in it is excluded" in pruner.notes


def test_attention_that_no_mask_can_silence() -> None:
    """torchvision's attention holds its weights itself, where NNI cannot mask them: its MLPs can go, not its blocks."""
    model = torchvision.models.VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=CLASSES).double()
    config = [{"op_names_re": [r"encoder\..*"], "op_types": ["Linear"], "sparse_ratio": 0.5}]
    pruner = pruner_of(model, config)
    assert pruner.candidates == [f"encoder.layers.encoder_layer_{i}.mlp" for i in (0, 1)]
    assert any("encoder_layer_0' stays: zeros in its layers' weights leave something" in note for note in pruner.notes)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ([{"op_types": ["Conv2d"], "sparse_ratio": 0.1}], r"removes no block: 0.1 of 7 selected blocks \(layer1.0, "),
        ([{"op_names_re": [r"layer1\.0\.conv."], "sparse_ratio": 0.99}], "0.99 of 1 selected blocks.*one always stays"),
        ([{"op_types": ["Conv2d"], "sparse_ratio": 1.0}], "below 1.0"),
        (
            [{"op_names_re": [r".*conv1"], "sparse_ratio": 0.3}, {"op_names_re": [r".*conv2"], "sparse_ratio": 0.5}],
            "'layer1.0.conv1' and 'layer1.0.conv2' are of one block, 'layer1.0'.*sparse_ratio is 0.3 and 0.5",
        ),
    ],
)
def test_ratios_that_do_not_fit(config: Any, match: str) -> None:
    refused(deep_resnet(), config, match)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"held_out": 0.0}, "held_out must be a share"),
        ({"held_out": 1}, "held_out must be a share"),
        ({"training_steps": 1}, "at least 2"),
        ({"training_steps": 0}, "training_steps must be an integer of at least 1"),
        ({"importance": Magnitude()}, "importance must be one of nni_plugin.layers"),
        ({"evaluator": "mine"}, "NNI's evaluators"),
    ],
)
def test_options_that_do_not_fit(options: Any, match: str) -> None:
    refused(deep_resnet(), THIRD, match, **options)


def test_no_inputs_to_find_blocks_with() -> None:
    model = deep_resnet()
    with pytest.raises(ConfigError, match="give example_inputs"):
        LayerStatisticPruner(model, THIRD, importance=LayerStatistic(Magnitude()))


class OfOneClass(Training):
    """Shows the network one class less than it tells apart."""

    def __call__(self, model: Any, optimizer: Any, training_step: Any, *args: Any, **kwargs: Any) -> None:
        def fewer(batch: Any, network: Any) -> Tensor:
            loss: Tensor = training_step((batch[0], batch[1].clamp(max=CLASSES - 2)), network)
            return loss

        super().__call__(model, optimizer, fewer, *args, **kwargs)


def test_a_class_that_the_training_never_shows() -> None:
    model = deep_resnet()
    pruner = pruner_of(model, evaluator=evaluator_of(model, OfOneClass()))
    with pytest.raises(DataError, match=r"has 4 minibatches of 4 training steps.*1 of 4 classes have no sample.*3"):
        pruner.compress()
    assert pruner.evaluator.model is None
    assert all(masked_blocks(pruner.get_masks(), block) == {False} for block in ALL)


def test_an_interval_of_one_minibatch() -> None:
    model = deep_resnet()
    scheduled = AGPPruner(pruner_of(model), interval_steps=1, total_times=2)
    with pytest.raises(CriterionError, match="Of 1 minibatches none can be held out"):
        scheduled.compress(max_steps=2, max_epochs=None)


def test_a_wrapped_network() -> None:
    model = resnet()
    of_nni.L1NormPruner(model, THIRD)
    with pytest.raises(ConfigError, match="wrapped by another compressor"):
        pruner_of(model)
