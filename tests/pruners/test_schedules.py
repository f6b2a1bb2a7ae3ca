"""Inside AGPPruner and LinearPruner: masks are final when the schedule ends, whatever training_steps is."""

import itertools
import warnings
from typing import Any

import nni
import nni.compression.pruning as of_nni
import pytest
import torch
import torch.nn.functional as F
from nni.compression import TorchEvaluator
from nni.compression.pruning import AGPPruner, LinearPruner
from nni.compression.quantization import QATQuantizer
from nni_task import BATCH, CONVS, Training, data, evaluator_of, gone, resnet, sparsity, step
from torch import nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.errors import ConfigError, CriterionError
from nni_plugin.pruners import (
    BNScalePruner,
    FPGMPruner,
    L1NormPruner,
    OBSPruner,
    OraclePruner,
    TaylorFisherPruner,
    TaylorFOPruner,
    TaylorSOPruner,
)

INTERVAL, TIMES = 3, 4
LAYER = "layer3.0.conv1"  # 32 channels


def ratios(schedule: Any, pruner: Any, training: Training, evaluator: Any, after: int = 2) -> list[float]:
    """Sparsity of a layer after every optimizer step of a schedule, which then trains a little longer."""
    found: list[float] = []
    scheduled = schedule(pruner, interval_steps=INTERVAL, total_times=TIMES, evaluator=evaluator)
    training.after_step = lambda _: found.append(sparsity(scheduled.get_masks(), LAYER))
    _, masks = scheduled.compress(max_steps=INTERVAL * TIMES + after, max_epochs=None)
    assert len(found) == INTERVAL * TIMES + after
    assert sparsity(masks, LAYER) == found[-1]
    return found


def goals(schedule: Any) -> list[float]:
    """What NNI documents: a ratio that grows with the cube of what is left, or linearly, floored to whole channels."""
    shares = [t / TIMES for t in range(TIMES + 1)]
    wanted = [0.5 * (1 - (1 - s) ** 3 if schedule is AGPPruner else s) for s in shares]
    return [int(32 * w + 1e-9) / 32 for w in wanted]


@pytest.mark.parametrize("schedule", [AGPPruner, LinearPruner])
@pytest.mark.parametrize("training_steps", [1, 2, 3, 100])
def test_no_lag_whatever_the_training_steps(schedule: Any, training_steps: int) -> None:
    model, training = resnet(), Training()
    evaluator = evaluator_of(model, training, lr=0.05)
    found = ratios(schedule, TaylorFOPruner(model, CONVS, evaluator, training_steps), training, evaluator)
    expected = [goal for goal in goals(schedule) for _ in range(INTERVAL)][1:]  # at the very end of each interval
    assert found == [*expected, 0.5, 0.5, 0.5][: len(found)]
    assert found[INTERVAL - 2 : INTERVAL] == [0.0, goals(schedule)[1]]


@pytest.mark.parametrize("method", [L1NormPruner, FPGMPruner, BNScalePruner])
def test_pruners_of_weights_fire_too(method: Any) -> None:
    model, training = resnet(), Training()
    evaluator = evaluator_of(model, training, lr=0.05)
    found = ratios(AGPPruner, method(model, CONVS, evaluator), training, evaluator)
    assert found[INTERVAL * TIMES - 1] == 0.5
    assert sorted(set(found)) == sorted({0.0, *goals(AGPPruner)})


@pytest.mark.parametrize("method", [TaylorFisherPruner, TaylorSOPruner, OBSPruner, OraclePruner, BNScalePruner])
def test_other_criteria_reach_the_goal(method: Any) -> None:
    model, training = resnet(), Training()
    evaluator = evaluator_of(model, training, lr=0.02)
    found = ratios(LinearPruner, method(model, CONVS, evaluator, 2), training, evaluator)
    assert found[INTERVAL * TIMES - 1] == 0.5


def test_what_is_masked_stays_masked() -> None:
    model, training = resnet(), Training()
    evaluator = evaluator_of(model, training, lr=0.1)
    pruner = TaylorFOPruner(model, CONVS, evaluator, 2)
    scheduled = LinearPruner(pruner, interval_steps=2, total_times=8)
    seen: list[set[int]] = []
    training.after_step = lambda _: seen.append(set(gone(scheduled.get_masks(), LAYER)))
    scheduled.compress(max_steps=16, max_epochs=None)
    assert all(earlier <= later for earlier, later in itertools.pairwise(seen))
    assert len(seen[-1]) == 16


def test_what_is_masked_stays_masked_though_its_weights_become_the_largest() -> None:
    model, training = resnet(), Training()
    pruner = L1NormPruner(model, CONVS, evaluator_of(model, training))
    scheduled = LinearPruner(pruner, interval_steps=2, total_times=2)
    first: list[int] = []

    def grow(steps: int) -> None:
        if steps == 2:
            first.extend(gone(scheduled.get_masks(), LAYER))
            with torch.no_grad():
                model.get_submodule(LAYER)._nni_wrapper.weight[first] *= 1000

    training.after_step = grow
    _, masks = scheduled.compress(max_steps=4, max_epochs=None)
    assert len(first) == 8
    assert set(first) < set(gone(masks, LAYER))


@pytest.mark.parametrize("method", [TaylorFOPruner, OraclePruner])
def test_each_interval_scores_the_masked_network_anew(method: Any) -> None:
    model, training = resnet(), Training()
    pruner = method(model, CONVS, evaluator_of(model, training), 4)
    scheduled = LinearPruner(pruner, interval_steps=4, total_times=2)
    masked: list[nn.Module] = []

    def copy_masked(steps: int) -> None:
        if steps == 4:
            plain = resnet()
            for name, targets in scheduled.get_masks().items():
                for target, mask in targets.items():
                    if mask is not None:
                        getattr(plain.get_submodule(name), target).data.mul_(mask)
            masked.append(plain)

    training.after_step = copy_masked
    scheduled.compress(max_steps=8, max_epochs=None)
    (plain,) = masked
    images, target = data()
    groups = [group for group in find_groups(plain, images[:1]) if group.name in pruner.scores]
    criterion = method.default_criterion()
    criterion.loss_fn = lambda network, batch: step(batch, network)
    with criterion.collect(plain, groups):
        for i in range(0, len(images), BATCH):
            plain.zero_grad()
            batch = (images[i : i + BATCH], target[i : i + BATCH])
            step(batch, plain).backward()
            criterion.update(batch)
    for group in groups:
        assert torch.allclose(criterion(group), pruner.scores[group.name], rtol=1e-9, atol=1e-15), group.name


def test_the_window_is_the_end_of_the_interval() -> None:
    """Scores of the last training_steps steps before masks are due, not of the first."""
    model, training = resnet(), Training()
    evaluator = evaluator_of(model, training)
    pruner = TaylorFOPruner(model, CONVS, evaluator, 1)
    LinearPruner(pruner, interval_steps=4, total_times=1).compress(max_steps=4, max_epochs=None)
    plain = resnet()
    images, target = data()
    groups = [group for group in find_groups(plain, images[:1]) if group.name in pruner.scores]
    criterion = type(pruner.criterion)()
    with criterion.collect(plain, groups):
        step((images[3 * BATCH :], target[3 * BATCH :]), plain).backward()
        criterion.update()
    for group in groups:
        assert torch.allclose(criterion(group), pruner.scores[group.name], rtol=1e-9)


def test_masks_of_pruners_by_weight_at_once_when_fused_without_a_schedule() -> None:
    """NNI's norm pruners never fire there."""
    model = resnet()
    first = L1NormPruner(model, [{"op_names": [LAYER], "sparse_ratio": 0.5}], evaluator_of(model))
    second = TaylorFOPruner.from_compressor(first, [{"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.25}], 2)
    _, masks = second.compress(max_steps=2, max_epochs=None)
    assert sparsity(masks, LAYER) == 0.5


def test_fused_with_a_quantizer() -> None:
    model = resnet().float()
    training = Training()
    images = data(dtype=torch.float32)[0]
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    evaluator = TorchEvaluator(
        training, optimizer, lambda b, m: F.cross_entropy(m(b[0].float()), b[1]), dummy_input=images[:1]
    )
    pruner = LinearPruner(TaylorFOPruner(model, CONVS, evaluator, 2), interval_steps=3, total_times=2)
    config = [{"op_types": ["Conv2d"], "target_names": ["weight"], "quant_dtype": "int8", "quant_scheme": "affine"}]
    quantizer = QATQuantizer.from_compressor(pruner, config, quant_start_step=1)
    quantizer.compress(max_steps=6, max_epochs=None)
    assert sparsity(pruner.get_masks(), LAYER) == 0.5
    assert sparsity(pruner.get_masks(), "layer3.0.bn1") == 0.5


def test_training_that_ends_before_masks_are_due() -> None:
    model = resnet()
    evaluator = evaluator_of(model, Training(stops_after=3))
    with pytest.raises(CriterionError, match=r"after 3 optimizer steps.*after 5.*there are none.*training_steps"):
        TaylorFOPruner(model, CONVS, evaluator, 5).compress()
    assert evaluator.model is None


def test_training_that_ends_before_the_schedule() -> None:
    model = resnet()
    evaluator = evaluator_of(model, Training(stops_after=7))
    scheduled = AGPPruner(TaylorFOPruner(model, CONVS, evaluator, 3), INTERVAL, TIMES)
    with pytest.warns(UserWarning, match="after 7 optimizer steps.*those of 2 of 4 times"):
        scheduled.compress(max_steps=12, max_epochs=None)


def test_a_duration_for_the_pruner_alone() -> None:
    model = resnet()
    pruner = TaylorFOPruner(model, CONVS, evaluator_of(model), 2)
    with pytest.raises(ConfigError, match=r"compress.max_steps=9.*training_steps, 2"):
        pruner.compress(max_steps=9)


def test_nni_s_own_lags_where_ours_does_not() -> None:
    """Why this is checked at all; if NNI is mended one day, this tells."""
    model, training = resnet(), Training()
    evaluator = evaluator_of(model, training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ratios(LinearPruner, of_nni.TaylorPruner(model, CONVS, evaluator, 1), training, evaluator, after=0)
    assert found[-1] < 0.5
