"""The search: what a step does to gates, network and memory; a killed search equals one that was not."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from networks_at_random import assert_same, state_of
from search_task import EXAMPLE, QUICK, batches, hooks_on, loss_of, planner, small_resnet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nni_plugin.errors import DataError, SearchError
from nni_plugin.performance import PerformanceMaximization, SearchOptions, predictor_quality
from nni_plugin.performance.hooks import frozen
from nni_plugin.performance.projection import orthogonal_part

MODES = ["full", "gates-only", "linear"]


def searched(model: nn.Module, **options) -> PerformanceMaximization:
    return planner(model, **options).search.run(batches())


@pytest.mark.parametrize("mode", MODES)
def test_it_brings_the_cost_down_to_the_target(mode: str) -> None:
    model = small_resnet().train()
    before, modes = state_of(model), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    search = searched(model, mode=mode, steps=150, gate_lr=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    first, last = search.history[:10], search.history[-10:]
    assert sum(record.cost_ratio for record in first) / 10 > 0.9
    assert sum(record.cost_ratio for record in last) / 10 < 0.65  # the target is 0.6
    assert sum(record.penalty for record in last) < 0.2 * sum(record.penalty for record in first)
    assert len(search.history) == search.steps_done == 150
    # A trace neither in the network nor on it.
    assert_same(model, before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert hooks_on(model) == 0
    if mode == "gates-only":
        assert search.learner is None
        assert all(math.isnan(record.predictor_loss) for record in search.history)


def test_a_step_is_the_sum_of_three_gradients() -> None:
    """Against plain autograd through the straight-through sample, and AdamW of the sum."""
    search = planner(small_resnet(), noise=0.0, performance_weight=0.7).search
    for batch in batches() * 3:  # until the performance network has a say
        search.step(batch)
    assert search.learner.leads
    twin = copy.deepcopy(search.gates)
    generator = torch.Generator()
    generator.set_state(search._generator.get_state())
    optimizer = torch.optim.AdamW([twin.logits], lr=search.options.gate_lr, weight_decay=search.options.gate_decay)
    state = copy.deepcopy(search._gate_optimizer.state_dict())
    optimizer.load_state_dict(state)
    predictor = copy.deepcopy(search.learner.predictor)

    sample = twin(generator)
    with twin.applied(search.model, sample):
        loss = loss_of(search.model, batches()[4])
    by_loss = torch.autograd.grad(loss, twin.logits, retain_graph=True)[0]
    penalty = search.target.penalty(search.target.objective(sample))
    by_cost = torch.autograd.grad(penalty, twin.logits, retain_graph=True)[0]
    predicted = predictor.eval()(sample[None])[0]
    by_performance = torch.autograd.grad(torch.log(1 / predicted), twin.logits)[0]
    by_performance = orthogonal_part(by_performance, by_loss, twin.layout.owner)
    twin.logits.grad = by_loss + 4 * by_cost + 0.7 * by_performance
    optimizer.step()

    record = search.step(batches()[4])
    assert torch.allclose(search.gates.logits, twin.logits, rtol=1e-5, atol=1e-7)
    assert record.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert record.predicted == pytest.approx(float(predicted.detach()), rel=1e-5)
    assert record.penalty == pytest.approx(float(penalty.detach()))


def test_one_sample_serves_forward_cost_and_memory() -> None:
    """The memory's entry is the network that was measured, and its cost the cost recorded."""
    model = small_resnet()
    search = planner(model, average=1, steps=60).search
    batch = batches()[0]
    for _ in range(3):
        record = search.step(batch)
        architecture = search.learner.memory.architectures[-1]
        assert set(architecture.tolist()) <= {0.0, 1.0}
        with search.network:
            assert search.network.evaluate(architecture, [batch]) == pytest.approx((record.loss, record.accuracy))
        assert float(search.target.objective(architecture)) == record.cost_ratio * search.target.objective.dense
        assert float(search.learner.memory.accuracies[-1]) == record.accuracy


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_search_and_a_killed_one_goes_on(mode: str) -> None:
    class KilledError(Exception):
        pass

    saved: list[io.BytesIO] = []

    def kill(search: PerformanceMaximization) -> None:
        if search.steps_done == 37:  # within the fourth pass
            saved.append(io.BytesIO())
            torch.save(search.state_dict(), saved[0])
        if search.steps_done == 41:
            raise KilledError

    whole = searched(small_resnet(), mode=mode)
    torch.rand(5)
    model = small_resnet()
    with pytest.raises(KilledError):
        planner(model, mode=mode).search.run(batches(), kill)
    assert hooks_on(model) == 0

    resumed = planner(small_resnet(), mode=mode).search
    saved[0].seek(0)
    resumed.load_state_dict(torch.load(saved[0], weights_only=True))
    resumed.run(batches())
    assert torch.equal(resumed.gates.logits, whole.gates.logits)
    assert repr(resumed.history) == repr(whole.history)
    if mode != "gates-only":
        for name, tensor in whole.learner.predictor.state_dict().items():
            assert torch.equal(resumed.learner.predictor.state_dict()[name], tensor), name
        assert torch.equal(resumed.learner.memory.architectures, whole.learner.memory.architectures)
    other = searched(small_resnet(), mode=mode, seed=1)
    assert not torch.equal(other.gates.logits, whole.gates.logits)


def test_a_state_of_another_search_is_refused() -> None:
    state = planner(small_resnet()).search.state_dict()
    with pytest.raises(SearchError, match="other options"):
        planner(small_resnet(), seed=5).search.load_state_dict(state)
    with pytest.raises(SearchError, match="other gates_of"):
        planner(small_resnet()).search.load_state_dict({**state, "gates_of": {"conv1": 16}})
    with pytest.raises(SearchError, match="other limit"):
        planner(small_resnet()).search.load_state_dict({**state, "limit": 1.0})


def test_passes_are_announced_and_a_resumed_one_is_entered_where_it_was_left() -> None:
    class Shuffled:
        def __init__(self) -> None:
            self.passes: list[int] = []

        def set_epoch(self, number: int) -> None:
            self.passes.append(number)

        def __iter__(self):
            order = torch.randperm(7, generator=torch.Generator().manual_seed(self.passes[-1])).tolist()
            return iter([batches()[i] for i in order])

    loader = Shuffled()
    whole = planner(small_resnet(), mode="gates-only", steps=16).search.run(loader)
    assert loader.passes == [0, 1, 2]
    states: list[dict] = []
    planner(small_resnet(), mode="gates-only", steps=16).search.run(
        Shuffled(), lambda search: states.append(search.state_dict())
    )
    for at in (6, 7, 9):  # at the end of a pass, at its beginning, in its middle
        resumed = planner(small_resnet(), mode="gates-only", steps=16).search
        resumed.load_state_dict(states[at - 1])
        resumed.run(Shuffled())
        assert torch.equal(resumed.gates.logits, whole.gates.logits)


def test_predictions_are_judged_on_architectures_not_seen() -> None:
    search = searched(small_resnet(), predictor_lr=1e-2)
    before = search.state_dict()
    quality = predictor_quality(search, batches(600, 2), 12)
    assert quality.architectures == 12
    assert -1 <= quality.spearman <= 1
    assert 0 <= quality.mean_abs_error < 0.5
    assert torch.equal(search.state_dict()["generator"], before["generator"])
    seen = search.learner.memory.architectures[-1].clone()
    with pytest.raises(SearchError, match="in the memory"):
        predictor_quality(search, batches(600, 1), [seen])
    with pytest.raises(SearchError, match="no performance network"):
        predictor_quality(planner(small_resnet(), mode="gates-only").search, batches())


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("predictor", ["table2", "released"])
@pytest.mark.parametrize("predictor_loss", ["l1", "mse"])
def test_every_option_runs(straight_through: bool, predictor: str, predictor_loss: str) -> None:
    search = searched(
        small_resnet(),
        straight_through=straight_through,
        predictor=predictor,
        predictor_loss=predictor_loss,
        steps=30,
        project=straight_through,
        select="all" if straight_through else "no-skip",
    )
    assert math.isfinite(search.history[-1].predictor_loss)
    assert 0 < search.history[-1].predicted < 1


def test_a_step_runs_the_network_once_forth_and_once_back() -> None:
    """No gradients of weights, and next to nothing for the performance network; counted, not timed."""
    model, batch = small_resnet(), batches(size=64)[0]
    searches = {mode: planner(model, mode=mode).search for mode in ("gates-only", "full")}
    for small in batches() * 3:
        searches["full"].step(small)
    assert searches["full"].learner.leads

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def plain() -> None:
        images = batch[0].clone().requires_grad_()
        with frozen(model):
            loss_of(model, (images, batch[1])).backward()

    gates, full = (flops(lambda search=search: search.step(batch)) for search in searches.values())
    assert 0.85 * flops(plain) < gates <= flops(plain)
    assert gates < full < 1.05 * gates
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_learning_rate_falls_once() -> None:
    search = planner(small_resnet(), mode="gates-only", steps=10, lr_at=0.5).search
    rates = []
    for batch in batches():
        search.step(batch)
        rates.append(search._gate_optimizer.param_groups[0]["lr"])
    assert rates == [0.05] * 5 + [0.05 * 0.1] * 5
    with pytest.raises(SearchError, match="All 10 steps"):
        search.step(batches()[0])


# -- bad input --------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_leaves_the_gates_as_they_were() -> None:
    model = small_resnet()
    search = planner(model).search
    search.step(batches()[0])
    before = search.gates.logits.detach().clone()
    images, labels = batches()[1]
    with pytest.raises(SearchError, match=r"loss is nan .* in step 2"):
        search.step((images * float("nan"), labels))
    assert torch.equal(search.gates.logits, before)
    assert hooks_on(model) == 0
    assert search.steps_done == 1
    untouched = planner(small_resnet()).search
    untouched.step(batches()[0])
    for search_now in (search, untouched):
        search_now.step(batches()[1])
    assert torch.equal(search.gates.logits, untouched.gates.logits)  # nothing was drawn in vain
    search.gates.logits.data[3] = float("nan")
    with pytest.raises(SearchError, match="not finite, first 'layer1"):
        search.step(batches()[0])


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda model, batch: model(batch[0]).sum(1), "scalar"),
        (lambda model, batch: 1.0, "scalar"),
        (lambda model, batch: model.fc.weight.sum(), "must call the network"),
        (lambda model, batch: loss_of(model, batch).detach(), "does not depend on the gates"),
    ],
)
def test_losses_that_are_none(loss, text: str) -> None:
    search = planner(small_resnet()).search
    search.network.loss_fn = loss
    with pytest.raises(SearchError, match=text):
        search.step(batches()[0])


def test_accuracies_that_are_none() -> None:
    search = planner(small_resnet()).search
    search.network.accuracy_fn = lambda output, batch: 93.0
    with pytest.raises(SearchError, match="Percent"):
        search.step(batches()[0])
    search = planner(small_resnet()).search
    search.network.loss_fn = lambda model, images: model(images).square().mean()
    with pytest.raises(SearchError, match="give accuracy_fn"):
        search.step(batches()[0][0])
    search.network.accuracy_fn = lambda output, batch: (output.argmax(1) == 3).float().mean()
    assert 0 <= search.step(batches()[0][0]).accuracy <= 1


def test_no_minibatch() -> None:
    with pytest.raises(DataError, match="search on"):
        planner(small_resnet()).search.run([])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"memory": 7}, "memory of 7 entries is too small to train on"),
        ({"steps": 20}, "never has a say.*more than 20 steps"),
        ({"predictor_batch": 1}, "two architectures"),
        ({"mode": "nppm"}, "full, gates-only, linear"),
        ({"predictor": "gru"}, "table2, released"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"steps": True}, "steps"),
        ({"candidates": -1}, "candidates"),
        ({"gate_lr": 0.0}, "gate_lr"),
        ({"noise": -1.0}, "noise"),
        ({"offset": float("nan")}, "offset must be a finite number"),
        ({"lr_at": 0.0}, "lr_at"),
    ],
)
def test_options_that_make_no_sense(options: dict, text: str) -> None:
    with pytest.raises(SearchError, match=text):
        SearchOptions(**{**QUICK, **options})


def test_gates_alone_need_no_memory() -> None:
    assert not SearchOptions(mode="gates-only", steps=1, memory=1).predicts
    names = {field.name for field in dataclasses.fields(SearchOptions)}
    documented = SearchOptions.__doc__ or ""
    assert all(f"        {name}: " in documented for name in names)
    assert EXAMPLE.shape == (2, 1, 8, 8)
