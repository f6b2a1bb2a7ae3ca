"""Optimizers carried over a cut: training goes on as if the state had been sliced by hand, bit for bit."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from networks_at_random import Branches, conv_bn, randomise
from timm.optim.lookahead import Lookahead
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from nni_plugin import GroupPlan, PruningPlan, carry_optimizer
from nni_plugin.adapters.torch_pruning import apply_plan
from nni_plugin.errors import SurgeryError

X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])
STAGE, INNER = (0, 2, 5), (1, 3)
PLAN = PruningPlan((GroupPlan("0", 6, STAGE), GroupPlan("3.branches.0.0", 4, INNER)))

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd-momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd-nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "radam": lambda p: RAdam(p, lr=0.01),
    "adamax": lambda p: Adamax(p, lr=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.01),
    "adadelta": lambda p: Adadelta(p),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    inside = nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6))
    layers = [*conv_bn(3, 6), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU())]
    return randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))).train()


def steps(model: nn.Module, optimizer: Optimizer, number: int = 3) -> None:
    for _ in range(number):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def by_hand(name: str, value: Tensor) -> Tensor:
    """Slice a parameter, or a moment of its shape, as this plan does."""
    if value.dim() == 0:
        return value.clone()
    out = {"3.branches.0.0": INNER, "3.branches.0.1": INNER, "6": None}.get(name.rpartition(".")[0], STAGE)
    into = {"0": None, "3.branches.0.0": STAGE, "3.branches.0.3": INNER, "6": STAGE}.get(name.rpartition(".")[0])
    if out is not None:
        value = value[list(out)]
    if into is not None and value.dim() > 1:
        value = value[:, list(into)]
    return value.clone()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_goes_on_as_with_a_state_sliced_by_hand(name: str) -> None:
    model = network()
    # Two parameter groups with settings of their own; they must stay.
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = OPTIMIZERS[name](decay)
    optimizer.add_param_group({"params": rest, "lr": 0.005})
    steps(model, optimizer)

    reference = copy.deepcopy(model)
    states = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    for module in reference.modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            path = next(f"{n}.{leaf}" for n, m in reference.named_modules() if m is module)
            if tensor is not None:
                tensor.grad = None
                tensor.data = by_hand(path, tensor.data)
    names = {id(p): n for n, p in reference.named_parameters()}
    fresh = OPTIMIZERS[name]([p for p in reference.parameters() if p.dim() > 1])
    fresh.add_param_group({"params": [p for p in reference.parameters() if p.dim() <= 1], "lr": 0.005})
    for group in fresh.param_groups:
        for parameter in group["params"]:
            state = states.get(names[id(parameter)], {})
            fresh.state[parameter] = {
                key: by_hand(names[id(parameter)], value) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_plan(model, PLAN, X)
        assert carry_optimizer(optimizer, PLAN) is optimizer
        carry_optimizer(optimizer, PLAN)  # twice is harmless
    assert [group["lr"] for group in optimizer.param_groups][1] == 0.005
    steps(model, optimizer)
    steps(reference, fresh)
    for (path, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), path
    for (path, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b), path


def test_an_optimizer_that_has_not_stepped_yet() -> None:
    model, reference = network(), network()
    optimizer = AdamW(model.parameters())
    apply_plan(model, PLAN, X)
    carry_optimizer(optimizer, PLAN)
    apply_plan(reference, PLAN, X)
    steps(model, optimizer)
    steps(reference, AdamW(reference.parameters()))
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_cuts_carried_one_by_one_or_both_at_the_end() -> None:
    second = PruningPlan((GroupPlan("0", 3, (0, 2)), GroupPlan("3.branches.0.0", 2, (0, 1))))
    results = []
    for late in (False, True):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        steps(model, optimizer)
        apply_plan(model, PLAN, X)
        if not late:
            carry_optimizer(optimizer, PLAN)
        apply_plan(model, second, X)
        if late:
            carry_optimizer(optimizer, PLAN)
        carry_optimizer(optimizer, second)
        for parameter in model.parameters():
            assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
        steps(model, optimizer)
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*results)


def test_a_moment_keeps_its_memory_format() -> None:
    model = network().to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer)
    apply_plan(model, PLAN, X)
    carry_optimizer(optimizer, PLAN)
    moment = optimizer.state[model[0].weight]["momentum_buffer"]
    assert moment.is_contiguous(memory_format=torch.channels_last)
    steps(model, optimizer)


def test_factored_moments_start_again_and_say_so() -> None:
    model = network()
    optimizer = Adafactor(model.parameters(), lr=0.01)
    steps(model, optimizer)
    apply_plan(model, PLAN, X)
    with pytest.warns(UserWarning, match="does not follow its parameter"):
        carry_optimizer(optimizer, PLAN)
    steps(model, optimizer)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_what_was_not_cut_is_refused() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SurgeryError, match="unchanged"):
        carry_optimizer(optimizer, PLAN)  # not applied yet
    apply_plan(model, PLAN, X)
    with pytest.raises(SurgeryError, match="None of the optimizer's parameters"):
        carry_optimizer(SGD(network().parameters(), lr=0.1), PLAN)  # of another network
    with pytest.raises(SurgeryError):
        carry_optimizer(optimizer, PruningPlan((GroupPlan("0", 6, (0, 1)),)))  # another plan
    for key, state in before["state"].items():
        assert torch.equal(optimizer.state_dict()["state"][key]["momentum_buffer"], state["momentum_buffer"])


def test_a_plan_of_nothing_needs_no_carrying() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    nothing = PruningPlan((GroupPlan("0", 6, tuple(range(6))),))
    with pytest.warns(UserWarning, match="removes nothing"):
        apply_plan(model, nothing, X)
    assert carry_optimizer(optimizer, nothing) is optimizer


def test_factored_state_starts_afresh_and_says_so() -> None:
    """Adafactor keeps row and column means, which no channel of their own can be cut from."""
    model = network()
    optimizer = Adafactor(model.parameters(), lr=0.01)
    steps(model, optimizer)
    apply_plan(model, PLAN, X)
    with pytest.warns(UserWarning, match="Adafactor.*afresh"):
        carry_optimizer(optimizer, PLAN)
    steps(model, optimizer)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


class Sharpness(Optimizer):
    """As the usual SAM has it: weights of its own beside an optimizer that it holds."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.base_optimizer = SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["before"] = parameter.detach().clone()
        self.base_optimizer.step(closure)


@pytest.mark.parametrize("name", ["lookahead", "sharpness"])
def test_optimizers_inside_another_are_carried_too(name: str) -> None:
    model, plain = network(), network()
    inner, alone = SGD(model.parameters(), lr=0.1, momentum=0.9), SGD(plain.parameters(), lr=0.1, momentum=0.9)
    # Before its sixth step Lookahead is what it holds.
    outer = Lookahead(inner) if name == "lookahead" else Sharpness(list(model.parameters()))
    for one, optimizer in ((model, outer), (plain, alone)):
        steps(one, optimizer)
        apply_plan(one, PLAN, X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            carry_optimizer(optimizer, PLAN)
        steps(one, optimizer)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_of_one_history_starts_afresh() -> None:
    model = network()
    optimizer = LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    apply_plan(model, PLAN, X)
    with pytest.warns(UserWarning, match="LBFGS keeps state that does not follow"):
        carry_optimizer(optimizer, PLAN)
    before = float(closure())
    optimizer.step(closure)
    assert float(closure()) < before
