"""What goes wrong while scoring: an error of ours that says what to do, and a network that is as it was."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gated import Batch, batches, collected, loss_of
from networks_at_random import Branches, assert_same, conv_bn, randomise, state_of
from torch import Tensor, nn

from nni_plugin import Channels, PruningPlan, plan_channels
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import Criterion
from nni_plugin.criteria.gate_reader import GateReader
from nni_plugin.errors import CriterionError
from nni_plugin.methods import METHODS, create_criterion, known_methods
from nni_plugin.planner import score_groups

GRADIENTS = [name for name in METHODS if METHODS[name]().needs_gradients]
DATA = [name for name in METHODS if METHODS[name]().needs_data]
STOCK = [name for name in known_methods() if name not in METHODS]

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def network() -> nn.Module:
    inside = nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6))
    layers = [*conv_bn(3, 6), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU()), nn.Dropout(0.1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)]
    model = randomise(nn.Sequential(*layers)).train()
    model[5].eval()  # modes that differ from layer to layer must come back too
    loss_of(model, batches(1, seed=3)[0]).backward()
    return model


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds) + sum(
        len(parameter._backward_hooks or ()) for parameter in model.parameters()
    )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert that a network is the same, bit for bit, and carries nothing."""
    state, modes, random = state_of(model), [m.training for m in model.modules()], torch.get_rng_state()
    gradients = [parameter.grad for parameter in model.parameters()]
    asked = [parameter.requires_grad for parameter in model.parameters()]
    yield
    assert_same(model, state)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is kept for p, kept in zip(model.parameters(), gradients, strict=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert hooks(model) == 0
    assert not hasattr(model, "pruning_plan")


def plan(model: nn.Module, criterion: Any, data: Any, loss: Any = loss_of) -> PruningPlan:
    return plan_channels(model, batches(1)[0][0], criterion, data, loss, Channels(12))


def score(model: nn.Module, criterion: Any, data: Any, loss: Any = loss_of) -> dict[str, Tensor]:
    groups = [g for g in find_groups(model, batches(1)[0][0], keep_host=True) if g.fixed is None]
    return score_groups(model, groups, criterion, data, loss)


@pytest.fixture(params=[plan, score], ids=["plan", "score"])
def ask(request: pytest.FixtureRequest) -> Any:
    return request.param


def assert_usable_again(criterion: Any, ask: Any) -> None:
    """A criterion that failed once is not collecting any more."""
    model = network()
    with untouched(model):
        assert ask(model, criterion, batches(2))


# -- a frozen network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRADIENTS)
def test_a_frozen_network(ask: Any, method: str) -> None:
    model, criterion = network().requires_grad_(False), create_criterion(method)
    with untouched(model), pytest.raises(CriterionError, match=r"frozen.*Set requires_grad"):
        ask(model, criterion, batches())
    assert_usable_again(criterion, ask)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in GRADIENTS])
def test_a_frozen_network_does_for_criteria_without_gradients(ask: Any, method: str) -> None:
    model = network().requires_grad_(False)
    with untouched(model):
        assert ask(model, create_criterion(method), batches())


@pytest.mark.parametrize("method", [name for name in GRADIENTS if name != "taylor-fo-input"])
def test_a_network_that_is_frozen_in_part(ask: Any, method: str) -> None:
    model = frozen_in_part()
    with untouched(model), pytest.raises(CriterionError, match=r"'[01](\.weight)?'.*requires_grad"):
        ask(model, create_criterion(method), batches())


def test_gates_on_readers_need_no_gradient_of_writers(ask: Any) -> None:
    model = frozen_in_part()
    with untouched(model):
        assert ask(model, create_criterion("taylor-fo-input"), batches())


def frozen_in_part() -> nn.Module:
    """The first writer of the first group gets no gradient."""
    model = network()
    for layer in (model[0], model[1]):
        layer.requires_grad_(False)
    return model


# -- a loss that is not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", DATA)
def test_a_loss_that_is_not_finite(ask: Any, method: str, value: float) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return loss_of(model, batch) * value

    model, criterion = network(), create_criterion(method)
    with untouched(model), pytest.raises(CriterionError, match=r"finite|loss .*is (nan|inf)") as caught:
        ask(model, criterion, batches(), loss)
    assert "look at the data" in str(caught.value).lower()
    criterion.loss_fn = None
    assert_usable_again(criterion, ask)


@pytest.mark.parametrize("method", DATA)
def test_a_loss_that_is_infinite_with_finite_gradients(ask: Any, method: str) -> None:
    model = network()
    with untouched(model), pytest.raises(CriterionError, match=r"(?i)loss .*is inf.*look at the data"):
        ask(model, create_criterion(method), batches(), lambda model, batch: loss_of(model, batch) + math.inf)


@pytest.mark.parametrize("method", DATA)
def test_a_minibatch_without_samples(ask: Any, method: str) -> None:
    model, data = network(), batches()
    data[1] = (data[1][0][:0], data[1][1][:0])
    with untouched(model), pytest.raises(CriterionError, match="minibatch is empty"):
        ask(model, create_criterion(method), data, lambda model, batch: loss_of(model, batch).nan_to_num())


@pytest.mark.parametrize("method", DATA)
def test_images_that_are_not_finite(ask: Any, method: str) -> None:
    model, data = network(), batches()
    data[1][0][0, 0, 0, 0] = math.nan
    with untouched(model), pytest.raises(CriterionError, match=r"(?i)look at the data"):
        ask(model, create_criterion(method), data)


# -- a batch of one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DATA)
def test_a_batch_of_one_in_train_mode(method: str) -> None:
    model, criterion = network(), create_criterion(method)
    with untouched(model), pytest.raises(CriterionError, match=r"train mode.*model\.eval\(\).*drop_last=True"):
        plan(model, criterion, [*batches(1), *batches(1, size=1)])
    assert_usable_again(criterion, plan)


@pytest.mark.parametrize("method", DATA)
def test_a_batch_of_one_in_eval_mode(ask: Any, method: str) -> None:
    model = network().eval()
    with untouched(model):
        assert ask(model, create_criterion(method), batches(2, size=1))


def test_other_errors_of_a_loss_stay_what_they_are(ask: Any) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise ValueError("labels are missing")

    model = network()
    with untouched(model), pytest.raises(ValueError, match="labels are missing"):
        ask(model, create_criterion("taylor-fo"), batches(), loss)


# -- no batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*DATA, *(name for name in STOCK if name in ("tp:taylor", "nni:taylor"))])
def test_an_empty_loader(ask: Any, method: str) -> None:
    model, criterion = network(), create_criterion(method)
    with untouched(model), pytest.raises(CriterionError, match="no batch to score with: the loader is empty"):
        ask(model, criterion, [])
    with untouched(model), pytest.raises(CriterionError, match="used up"):
        ask(model, criterion, iter(()))
    assert_usable_again(criterion, ask)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in DATA])
def test_criteria_on_weights_need_no_batch(ask: Any, method: str) -> None:
    model = network()
    with untouched(model):
        assert ask(model, create_criterion(method), [])


# -- no normalisation -------------------------------------------------------------------------------------------


def bare() -> nn.Module:
    """The second group has no normalisation behind it."""
    layers = [*conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(6, 3))).train()


@pytest.mark.parametrize("method", [name for name in METHODS if issubclass(type(METHODS[name]()), GateReader)])
def test_gates_behind_a_normalisation_that_is_not_there(ask: Any, method: str) -> None:
    model, criterion = bare(), create_criterion(method)
    criterion.gates = "bn"
    with untouched(model), pytest.raises(CriterionError, match=r"'3' without an affine norm.*gates='auto'"):
        ask(model, criterion, batches())
    criterion.gates = "auto"
    with untouched(model):
        assert ask(model, criterion, batches())


def test_scales_of_a_normalisation_that_is_not_there(ask: Any) -> None:
    model = bare()
    with untouched(model), pytest.raises(CriterionError, match=r"'3'.*no affine normalisation.*`ignore`"):
        ask(model, create_criterion("bn-scale"), batches())


def test_every_method_is_looked_at() -> None:
    assert set(GRADIENTS) <= set(DATA) < set(METHODS)
    assert {"taylor-fo", "obs", "oracle"} <= set(DATA)
    assert all(isinstance(METHODS[name](), Criterion) for name in METHODS)


# -- what is read from a state, or asked too early ----------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("oracle", "random") and name in DATA])
def test_a_state_without_the_groups_it_was_of(method: str) -> None:
    model, data = network(), batches(1)
    groups = [group for group in find_groups(model, data[0][0]) if group.fixed is None]
    criterion, later = create_criterion(method), create_criterion(method)
    collected(model, criterion, data, groups)
    later.load_state_dict(criterion.state_dict())
    with pytest.raises(CriterionError, match=r"enter `with criterion\.collect"):
        later(groups[0])
    with later.collect(model, groups):
        pass
    assert torch.equal(later(groups[0]), criterion(groups[0]))


@pytest.mark.parametrize("method", ["taylor-fo", "taylor-fisher", "taylor-so", "obd"])
def test_a_prediction_without_data(method: str) -> None:
    group = find_groups(network(), batches(1)[0][0])[0]
    with pytest.raises(CriterionError, match="has seen no minibatch"):
        create_criterion(method).loss_changes(group)
