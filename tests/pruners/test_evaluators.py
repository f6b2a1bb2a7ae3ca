"""What is asked of evaluators: the first inputs, losses, clear errors, and order after an exception."""

import random
from typing import Any

import nni
import numpy as np
import pytest
import torch
from nni.compression.pruning import AGPPruner
from nni_task import CONVS, Training, data, evaluator_of, resnet, sparsity, step
from torch import nn

from nni_plugin.errors import ConfigError
from nni_plugin.pruners import (
    L1NormPruner,
    LightningEvaluator,
    OBDPruner,
    OraclePruner,
    TaylorFisherPruner,
    TaylorFOPruner,
    TorchEvaluator,
)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_inputs_are_those_of_the_first_minibatch() -> None:
    model, other = resnet(), resnet()
    seen = TaylorFOPruner(model, CONVS, evaluator_of(model, dummy=False), 3).compress()[1]
    given = TaylorFOPruner(other, CONVS, evaluator_of(other), 3).compress()[1]
    assert list(seen) == list(given)
    assert all(torch.equal(seen[name]["weight"], given[name]["weight"]) for name in seen)


def test_looking_for_inputs_leaves_no_trace() -> None:
    model = resnet().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Drawing(Training):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(3), np.random.rand(3), random.random()
            super().__call__(*args, **kwargs)

    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    parameters = [id(parameter) for parameter in model.parameters()]
    from nni_plugin.pruners.evaluators import first_inputs

    evaluator = evaluator_of(model, Drawing(), dummy=False)
    evaluator._init_optimizer_helpers(model)
    (images,) = first_inputs(evaluator, model)
    assert torch.equal(images, data()[0][:8])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert parameters == [id(parameter) for parameter in model.parameters()]
    assert not any(module.training for module in model.modules())
    assert hooks_of(model) == 0
    assert evaluator.model is None


def test_a_training_that_never_calls_the_network() -> None:
    model = resnet()
    evaluator = evaluator_of(model, lambda *args: None, dummy=False)
    with pytest.raises(ConfigError, match=r"called ResNet with nothing.*example_inputs"):
        TaylorFOPruner(model, CONVS, evaluator, 3)


def test_example_inputs_come_first() -> None:
    model = resnet()
    evaluator = evaluator_of(model, lambda *args: None, dummy=False)
    pruner = TaylorFOPruner(model, CONVS, evaluator, 3, example_inputs=[data()[0][:1]])
    assert len(pruner.plan().groups) == 6


@pytest.mark.parametrize("method", [TaylorFOPruner, TaylorFisherPruner, OBDPruner, OraclePruner])
def test_an_exception_leaves_nothing_behind(method: Any) -> None:
    model = resnet()
    training = Training(fails_at=2)
    evaluator = evaluator_of(model, training)
    pruner = method(model, CONVS, evaluator, 4)
    with pytest.raises(RuntimeError, match="the data ran out"):
        pruner.compress()
    assert hooks_of(model) == 0
    assert evaluator.model is None
    assert "train" not in vars(evaluator)
    assert all(
        bool((mask == 1).all()) for of in pruner.get_masks().values() for mask in of.values() if mask is not None
    )
    training.fails_at = None
    _, masks = pruner.compress()  # the same objects go on
    assert sparsity(masks, "layer3.0.conv1") == 0.5


def test_an_exception_inside_a_schedule() -> None:
    model = resnet()
    training = Training(fails_at=4)
    evaluator = evaluator_of(model, training)
    scheduled = AGPPruner(TaylorFisherPruner(model, CONVS, evaluator, 2), interval_steps=3, total_times=2)
    with pytest.raises(RuntimeError, match="the data ran out"):
        scheduled.compress(max_steps=6, max_epochs=None)
    assert hooks_of(model) == 0
    assert evaluator.model is None


def test_gradients_are_the_training_s_own_after_scores_that_differentiate_twice() -> None:
    """OBD sets gradients with a graph for a moment; the optimizer sees none of it."""
    norms: list[list[float]] = []
    for method in (TaylorFOPruner, OBDPruner):
        model = resnet()
        training = Training()
        seen: list[float] = []
        training.after_step = lambda _, m=model, s=seen: s.append(
            float(sum(p.grad.abs().sum() for p in m.parameters() if p.grad is not None))
        )
        method(model, CONVS, evaluator_of(model, training, lr=0.01), 3).compress()
        assert all(p.grad is None or not p.grad.requires_grad for p in model.parameters())
        norms.append(seen)
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


def test_validation_steps_without_gradients_do_no_harm() -> None:
    class Validating(Training):
        def __call__(self, model: nn.Module, optimizer: Any, training_step: Any, *args: Any, **kwargs: Any) -> None:
            def validate(_: int) -> None:
                with torch.no_grad():
                    training_step((data()[0][:8], data()[1][:8]), model.eval())
                model.train()

            self.after_step = validate
            super().__call__(model, optimizer, training_step, *args, **kwargs)

    for method in (TaylorFisherPruner, OBDPruner):
        scores = []
        for training in (Training(), Validating()):
            model = resnet()
            pruner = method(model, CONVS, evaluator_of(model, training), 3)
            pruner.compress()
            scores.append(pruner.scores)
        assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


def test_the_oracle_asks_for_a_loss_that_it_can_use() -> None:
    model = resnet()
    evaluator = evaluator_of(model)
    del evaluator._ori_training_step
    evaluator.revert_loss = lambda: None
    pruner = OraclePruner(model, CONVS, evaluator, 2)
    with pytest.raises(ConfigError, match=r"criterion=Oracle\(loss_fn\)"):
        pruner.compress()


def test_losses_in_tuples_and_dicts() -> None:
    scores = []
    for wrap in (lambda loss: loss, lambda loss: (loss, "more"), lambda loss: {"loss": loss}):
        model = resnet()
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)

        def unpack(*args: Any, training: Any = None, **kwargs: Any) -> None:
            first, *others = args[2:3]
            Training()(*args[:2], lambda *a: _loss(first(*a)), *others, *args[3:], **kwargs)

        evaluator = TorchEvaluator(unpack, optimizer, lambda b, m, w=wrap: w(step(b, m)), dummy_input=data()[0][:1])
        pruner = OraclePruner(model, [{"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.5}], evaluator, 1)
        pruner.compress()
        scores.append(pruner.scores["layer1.0.conv1"])
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def _loss(output: Any) -> torch.Tensor:
    return output["loss"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output


def test_our_torch_evaluator_says_what_is_wrong() -> None:
    model = resnet()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    traced = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"optimizers must be traced.*plain SGD.*nni.trace\(SGD\)"):
        TorchEvaluator(Training(), plain, step)
    with pytest.raises(ConfigError, match="lr_schedulers must be traced"):
        TorchEvaluator(Training(), traced, step, torch.optim.lr_scheduler.StepLR(traced, 1))
    with pytest.raises(ConfigError, match="training_func must be a function, got None"):
        TorchEvaluator(None, traced, step)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="optimizers must be traced"):
        TorchEvaluator(Training(), None, step)  # type: ignore[arg-type]
    scheduler = nni.trace(torch.optim.lr_scheduler.StepLR)(traced, 1)
    evaluator = TorchEvaluator(Training(), traced, step, scheduler, data()[0][:1])
    assert sparsity(TaylorFOPruner(model, CONVS, evaluator, 2).compress()[1], "conv1") == 0.5


def test_our_lightning_evaluator_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"trainer must be made as nni.trace\(Trainer\).*plain object"):
        LightningEvaluator(object(), None)
    with pytest.raises(ConfigError, match=r"one of Lightning, got torch\.optim"):
        LightningEvaluator(nni.trace(torch.optim.SGD)(resnet().parameters(), lr=0.1), None)


def test_pruners_of_weights_train_nothing() -> None:
    model = resnet()
    training = Training()
    pruner = L1NormPruner(model, CONVS, evaluator_of(model, training))
    pruner.compress()
    assert training.steps == 0
