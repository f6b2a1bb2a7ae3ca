"""Every pruner by name: its scores are its criterion's, its masks are exact, the masked network is the compact one."""

import copy
import inspect
from typing import Any

import nni
import nni.compression.pruning as of_nni
import pytest
import torch
from nni.compression import TorchEvaluator
from nni_task import BATCH, CONVS, Plain, Training, data, evaluator_of, gone, resnet, sparsity, step
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.criteria import Criterion, Oracle, TaylorFO
from nni_plugin.errors import ConfigError, CriterionError
from nni_plugin.pruners import (
    BNScalePruner,
    FeatureMapPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    OBDPruner,
    OBSPruner,
    OraclePruner,
    RandomPruner,
    TaylorFGPruner,
    TaylorFisherPruner,
    TaylorFOPruner,
    TaylorSOPruner,
)

STEPS = 4
OF_DATA = [
    TaylorFOPruner,
    TaylorFGPruner,
    TaylorFisherPruner,
    TaylorSOPruner,
    OBDPruner,
    OBSPruner,
    FeatureMapPruner,
    OraclePruner,
]
OF_WEIGHTS = [L1NormPruner, L2NormPruner, FPGMPruner, RandomPruner]
ALL = [*OF_DATA, *OF_WEIGHTS, BNScalePruner]


def pruner_of(method: Any, model: nn.Module, config: Any = CONVS, **options: Any) -> Any:
    evaluator = options.pop("evaluator", None) or evaluator_of(model)
    steps = (STEPS,) if method in OF_DATA else ()  # BNScalePruner then reads the scales as they are
    return method(model, config, evaluator, *steps, **options)


def direct_scores(model: nn.Module, criterion: Criterion, names: set[str]) -> dict[str, Tensor]:
    """Scores of the criterion by itself, on the plain network in train mode."""
    groups = [group for group in find_groups(model, data()[0][:1]) if group.name in names]
    images, target = data()
    if criterion.needs_batch:
        criterion.loss_fn = lambda network, batch: step(batch, network)
    with criterion.collect(model, groups):
        for i in range(0, len(images) if criterion.needs_data else 0, BATCH):
            batch = (images[i : i + BATCH], target[i : i + BATCH])
            model.zero_grad()
            step(batch, model).backward(create_graph=criterion.needs_graph)
            criterion.update(batch)
    return {group.name: criterion(group) for group in groups}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("method", ALL)
def test_scores_are_those_of_the_criterion(method: Any) -> None:
    model = resnet()
    plain = copy.deepcopy(model)
    pruner = pruner_of(method, model)
    pruner.compress()
    expected = direct_scores(plain, method.default_criterion(), set(pruner.scores))
    assert len(expected) == 6
    for name, scores in expected.items():
        assert torch.allclose(pruner.scores[name].double(), scores.double(), rtol=1e-9, atol=1e-14), name


@pytest.mark.parametrize("method", ALL)
def test_masked_is_compact(method: Any) -> None:
    model, x = resnet(), data()[0]
    pruner = pruner_of(method, model, evaluator=evaluator_of(model, lr=0.05))
    wrapped, masks = pruner.compress()
    assert all(sparsity(masks, name) == 0.5 for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    assert gone(masks, "conv1") == gone(masks, "layer1.0.conv2") == gone(masks, "bn1")
    model.eval()
    with torch.no_grad():
        masked = wrapped(x)
        pruner.unwrap_model()
        pruner.plan().apply(model, x)
        compact = model(x)
    assert model.layer3[0].conv1.out_channels == 16
    assert torch.allclose(compact, masked, rtol=1e-10, atol=1e-12)
    compact.requires_grad_()
    step((x, data()[1]), model.train()).backward()


@pytest.mark.parametrize("method", ALL)
def test_nothing_stays_on_the_network(method: Any) -> None:
    model = resnet()
    before = copy.deepcopy(model)
    pruner = pruner_of(method, model)
    pruner.compress()
    pruner.unwrap_model()
    for (name, module), (_, was) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert not module._backward_hooks, name
        assert "forward" not in vars(module) or module.forward == module.forward.__func__.__get__(module), name
        assert list(module._buffers) == list(was._buffers), name
        assert set(module._parameters) == set(was._parameters), name
        assert module.training == was.training, name
    assert pruner.evaluator.model is None
    if method is not OBSPruner:  # which compensates
        values = dict(before.named_parameters())
        assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())


def test_statistics_are_those_of_the_training_alone() -> None:
    models = [resnet(), resnet()]
    for model, pruner in zip(models, (TaylorFOPruner, of_nni.TaylorPruner), strict=True):
        pruner(model, CONVS, evaluator_of(model), STEPS).compress()
    ours, theirs = ({k: v for k, v in m.named_buffers() if "running" in k} for m in models)
    assert len(ours) == 18
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("method", [TaylorFOPruner, OraclePruner])
def test_the_evaluator_s_training_is_disturbed_by_nothing(method: Any) -> None:
    """Weights after the training are bit for bit those of a training without any pruner."""
    model, plain = resnet(), resnet()
    pruner = pruner_of(method, model, evaluator=evaluator_of(model, lr=0.05))
    pruner.compress()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    Training()(plain, optimizer, step, max_steps=STEPS)
    pruner.unwrap_model()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-12, atol=1e-15), name


@pytest.mark.parametrize(("ratio", "removed"), [(0.75, 6), (0.5, 4), (0.1, 0), (0.99, 7)])
def test_exactly_so_many_channels(ratio: float, removed: int) -> None:
    model = Plain().double()
    config = [{"op_names": ["conv1"], "sparse_ratio": ratio}]
    _, masks = TaylorFOPruner(model, config, evaluator_of(model), STEPS).compress()
    assert len(gone(masks, "conv1")) == removed
    assert int((masks["conv1"]["bias"] == 0).sum()) == removed
    assert set(masks) == {"conv1"}


def test_the_constructors_are_nni_s() -> None:
    theirs = list(inspect.signature(of_nni.TaylorPruner).parameters)
    for method in OF_DATA:
        assert list(inspect.signature(method).parameters)[: len(theirs)] == theirs
    assert list(inspect.signature(of_nni.TaylorPruner.from_compressor).parameters) == [
        *list(inspect.signature(TaylorFOPruner.from_compressor).parameters)[:4]
    ]
    for make in (inspect.signature, lambda method: inspect.signature(method.from_compressor)):
        slim = list(make(of_nni.SlimPruner).parameters)
        assert list(make(BNScalePruner).parameters)[: len(slim)] == slim
    for method in OF_WEIGHTS:
        assert list(inspect.signature(method).parameters)[:4] == [
            "model",
            "config_list",
            "evaluator",
            "existed_wrappers",
        ]


@pytest.mark.parametrize("regular_scale", [0.0, 0.5])
def test_scales_are_trained_with_the_penalty_of_nni(regular_scale: float) -> None:
    """Weights after the training are those of one whose loss has the mean over layers of the scales' L1 norm."""
    model, plain = resnet(), resnet()
    training = Training()
    pruner = BNScalePruner(model, CONVS, evaluator_of(model, training, lr=0.05), STEPS, regular_scale)
    _, masks = pruner.compress()
    assert training.steps == STEPS
    pruner.unwrap_model()
    scales = [layer.weight for layer in plain.modules() if isinstance(layer, nn.BatchNorm2d)]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)

    def penalised(batch: tuple[Tensor, Tensor], network: nn.Module) -> Tensor:
        return step(batch, network) + regular_scale * torch.stack([scale.abs().sum() for scale in scales]).mean()

    Training()(plain, optimizer, penalised, max_steps=STEPS)
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-12, atol=1e-15), name
    assert gone(masks, "layer3.0.bn1") == plain.layer3[0].bn1.weight.abs().sort().indices[:16].sort().values.tolist()


def test_scales_are_read_as_they_are_without_training_steps() -> None:
    model, training = resnet(), Training()
    gamma = model.layer3[0].bn1.weight.detach().clone()
    _, masks = BNScalePruner(model, CONVS, evaluator_of(model, training, lr=0.05)).compress()
    assert training.steps == 0
    assert gone(masks, "layer3.0.bn1") == gamma.abs().sort().indices[:16].sort().values.tolist()


def test_scales_go_on_from_another_compressor() -> None:
    model, training = resnet(), Training()
    first = of_nni.L1NormPruner(model, [{"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.5}])
    first.compress()
    config = [{"op_names": ["layer2.0.conv1"], "sparse_ratio": 0.25}]
    second = BNScalePruner.from_compressor(first, config, STEPS, 0.1, evaluator_of(model, training))
    assert (second.training_steps, second.regular_scale) == (STEPS, 0.1)
    _, masks = second.compress(max_steps=STEPS, max_epochs=None)
    assert sparsity(masks, "layer2.0.bn1") == 0.25


def test_scales_that_are_not_there_and_bad_arguments_are_refused_before_the_training() -> None:
    model, training = Plain().double(), Training()
    pruner = BNScalePruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], evaluator_of(model, training), STEPS)
    with pytest.raises(CriterionError, match="no affine normalisation"):
        pruner.compress()
    assert training.steps == 0
    for arguments, said in (
        ((None, STEPS), "give an evaluator"),
        ((evaluator_of(resnet()), -1), "training_steps"),
        ((evaluator_of(resnet()), STEPS, -0.1), "regular_scale"),
        ((evaluator_of(resnet()), STEPS, float("nan")), "regular_scale"),
    ):
        with pytest.raises(ConfigError, match=said):
            BNScalePruner(resnet(), CONVS, *arguments)


def test_an_oracle_measures_the_loss_of_the_evaluator_it_is_used_with() -> None:
    def doubled(batch: tuple[Tensor, Tensor], network: nn.Module) -> Tensor:
        return 2 * step(batch, network)

    shared, scores = Oracle(), []
    for training_step, criterion in ((step, shared), (doubled, shared), (doubled, Oracle())):
        model = resnet()
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
        evaluator = TorchEvaluator(Training(), optimizer, training_step, dummy_input=data()[0][:1])
        pruner = OraclePruner(model, CONVS, evaluator, 1, criterion=criterion)
        pruner.compress()
        scores.append(pruner.scores["conv1"])
    assert torch.equal(scores[1], scores[2])
    assert not torch.equal(scores[0], scores[1])
    assert shared.loss_fn is None


def test_a_criterion_of_one_s_own() -> None:
    model = resnet()
    pruner = pruner_of(TaylorFOPruner, model, criterion=TaylorFO("weight", "square-then-sum"))
    pruner.compress()
    plain = resnet()
    expected = direct_scores(plain, TaylorFO("weight", "square-then-sum"), set(pruner.scores))
    assert all(torch.allclose(pruner.scores[name].double(), value.double()) for name, value in expected.items())


def test_masks_are_plain_and_reload(tmp_path: Any) -> None:
    model = resnet()
    _, masks = pruner_of(L1NormPruner, model).compress()
    torch.save(masks, tmp_path / "masks.pth")
    again = torch.load(tmp_path / "masks.pth")
    assert type(masks) is dict
    assert list(again) == list(masks)
    assert torch.equal(again["bn1"]["bias"], masks["bn1"]["bias"])


def test_from_compressor_goes_on_from_nni_s_pruner() -> None:
    model = resnet()
    first = of_nni.L1NormPruner(model, [{"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.5}])
    _, masks = first.compress()
    config = [{"op_names": ["layer2.0.conv1"], "sparse_ratio": 0.25}]
    second = TaylorFOPruner.from_compressor(first, config, STEPS, evaluator_of(model))
    assert second.fused_compressors == [second, first]
    _, after = second.compress(max_steps=STEPS, max_epochs=None)
    assert gone(after, "layer1.0.conv1") == gone(masks, "layer1.0.conv1")
    assert sparsity(after, "layer2.0.conv1") == sparsity(after, "layer2.0.bn1") == 0.25


def test_gradients_that_no_optimizer_clears_do_not_add_up() -> None:
    """An optimizer of the stem alone: the scores are those of an optimizer of everything."""
    scores = []
    for all_of_it in (True, False):
        model = resnet()
        parameters = model.parameters() if all_of_it else model.conv1.parameters()
        optimizer = nni.trace(torch.optim.SGD)(parameters, lr=0.0)
        evaluator = TorchEvaluator(Training(), optimizer, step, dummy_input=data()[0][:1])
        pruner = TaylorFOPruner(model, CONVS, evaluator, STEPS)
        pruner.compress()
        scores.append(pruner.scores)
    assert all(torch.allclose(scores[0][name], scores[1][name]) for name in scores[0])


def test_what_another_compressor_has_masked_stays_masked() -> None:
    model = resnet()
    first = of_nni.L1NormPruner(model, [{"op_names": ["layer1.0.conv2"], "sparse_ratio": 0.5}])
    before = gone(first.compress()[1], "layer1.0.conv2")
    config = [{"op_names": ["conv1"], "sparse_ratio": 0.5}]  # it writes the same channels
    second = RandomPruner.from_compressor(first, config, evaluator_of(model))
    second._single_compress(None, None)
    masks = second.get_masks()
    assert not set(before) <= set(gone(masks, "conv1"))
    assert sorted({*before, *gone(masks, "conv1")}) == gone(masks, "layer1.0.conv2")


def test_compress_twice_gives_the_same() -> None:
    model = resnet()
    pruner = pruner_of(TaylorFOPruner, model)
    _, first = pruner.compress()
    _, second = pruner.compress()
    assert all(gone(first, name) == gone(second, name) for name in first)


def test_the_evaluator_is_nni_s_own() -> None:
    assert type(evaluator_of(resnet())) is TorchEvaluator
