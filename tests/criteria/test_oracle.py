"""The Oracle against what it is by definition: mask a channel at its readers, run the whole network, compare losses."""

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from networks_at_random import Branches, Recipe, Squeeze, Twice, assert_same, conv_bn, networks, randomise, state_of
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nni_plugin import Channels, Iterative, plan_channels
from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.correlation import correlate
from nni_plugin.criteria import Oracle, TaylorFO
from nni_plugin.criteria.ablation import Ablations
from nni_plugin.criteria.suffix_runs import Suffixes
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.methods import create_criterion
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.planner import score_groups

Batch = tuple[Tensor, Tensor]


def batch_of(size: int = 5, side: int = 8, seed: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 3, (size,), generator=generator)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def free(model: nn.Module, batch: Batch) -> list[ChannelGroup]:
    return [group for group in find_groups(model, batch[0]) if group.fixed is None]


@torch.no_grad()
def expected(model: nn.Module, group: ChannelGroup, batch: Batch, loss_fn: Callable[..., Any] = loss_of) -> Tensor:
    """The definition, on copies: multiply what every reader reads by a mask."""
    base = float(loss_fn(copy.deepcopy(model), batch))
    changes = []
    for channel in range(group.width):
        masked = copy.deepcopy(model)
        for member in group.readers:

            def mask(
                reader: nn.Module, args: tuple[Tensor, ...], gone: Tensor = member.index[member.channel == channel]
            ) -> Any:
                (x,) = args
                dim = -1 if isinstance(reader, nn.Linear) else 1
                keep = torch.ones(x.shape[dim], dtype=x.dtype).index_fill(0, gone, 0)
                return x * (keep if dim == -1 else keep.reshape(-1, *[1] * (x.dim() - 2)))

            masked.get_submodule(member.path).register_forward_pre_hook(mask)
        changes.append(float(loss_fn(masked, batch)) - base)
    return torch.tensor(changes, dtype=torch.float64)


def measured(model: nn.Module, groups: Sequence[ChannelGroup], *batches: Any, **options: Any) -> Oracle:
    oracle = Oracle(**options)
    with oracle.collect(model, groups):
        for batch in batches:
            oracle.update(batch)
    return oracle


def assert_definition(model: nn.Module, batch: Batch, parts: bool = True, **options: Any) -> None:
    groups, before = free(model, batch), state_of(model)
    assert groups
    with warnings.catch_warnings():
        warnings.simplefilter("error" if parts else "ignore")
        oracle = measured(model, groups, batch, **options)
    assert_same(model, before)
    largest = 0.0
    for group in groups:
        wanted = expected(model, group, batch)
        largest = max(largest, float(wanted.abs().max()))
        torch.testing.assert_close(oracle.loss_changes(group), wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(oracle(group), wanted.square(), rtol=1e-8, atol=1e-12)
    assert largest > 1e-4


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


class Views(nn.Module):
    """Sizes that follow the batch, in-place operators, a split, a linear reader with several positions a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(*conv_bn(3, 6)), nn.Sequential(*conv_bn(6, 6))
        self.c, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x), inplace=True)
        x += self.b(x)
        left, right = x.chunk(2, 1)
        x = F.relu(self.c(left * right), True)
        x = F.max_pool2d(x, 2)
        return self.out(x.view(x.size(0), -1))


class Tokens(nn.Module):
    """Windows in the batch dimension, then linear layers on tokens, as window attention has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.out = (
            nn.Conv2d(3, 6, 2, 2),
            nn.Linear(6, 7),
            nn.Linear(7, 6),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.out(x.reshape(n, -1, c).mean(1))


class Aliases(nn.Module):
    """A branch whose view outlives it, and sums that are used again: nothing of these may be written into."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4))
        self.relu, self.out = nn.ReLU(inplace=inplace), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        seen = x.flatten(2)
        y = x + self.b(torch.relu(x))
        z = self.c(y + 1)
        w = z.flatten(2)
        z = self.relu(z) + y
        return self.out(torch.tanh(z.flatten(2) + w * seen).mean(2))


def plain() -> nn.Module:
    return nn.Sequential(*conv_bn(3, 6), nn.ReLU(inplace=True), *conv_bn(6, 5), nn.ReLU(inplace=True), *head(5))


def residual() -> nn.Module:
    def block() -> nn.Module:
        inside = nn.Sequential(*conv_bn(6, 4), nn.ReLU(inplace=True), *conv_bn(4, 6))
        return Branches("add", [inside, nn.Identity()], nn.ReLU(inplace=True))

    return nn.Sequential(*conv_bn(3, 6), nn.ReLU(), block(), block(), *head(6))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": residual,
    "concatenated": lambda: nn.Sequential(
        Branches("cat", [nn.Sequential(*conv_bn(3, 4)), nn.Sequential(*conv_bn(3, 3))]),
        nn.ReLU(),
        *conv_bn(7, 5),
        *head(5),
    ),
    "depthwise": lambda: nn.Sequential(
        *conv_bn(3, 6), nn.ReLU6(), *conv_bn(6, 6, 3, 6), nn.ReLU6(), *conv_bn(6, 4, 1), *head(4)
    ),
    "grouped": lambda: nn.Sequential(
        *conv_bn(3, 8, 1), nn.ReLU(), *conv_bn(8, 8, 3, 2), nn.ReLU(), *conv_bn(8, 6, 1), nn.ReLU(), *head(6)
    ),
    "squeeze-excite": lambda: nn.Sequential(*conv_bn(3, 6), nn.SiLU(), Squeeze(6, True), *conv_bn(6, 5), *head(5)),
    "densenet": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        *[
            Branches("cat", [nn.Identity(), nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 3, 3, padding=1))])
            for w in (4, 7)
        ],
        nn.BatchNorm2d(10),
        nn.ReLU(),
        *head(10),
    ),
    "sigmoid": lambda: nn.Sequential(*conv_bn(3, 6), nn.Sigmoid(), *conv_bn(6, 5), nn.Sigmoid(), *head(5)),
    "shared": lambda: nn.Sequential(*conv_bn(3, 5), nn.ReLU(), Twice(nn.Conv2d(5, 5, 3, padding=1)), *head(5)),
    "transposed": lambda: nn.Sequential(
        *conv_bn(3, 6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.ReLU(), *conv_bn(4, 5), *head(5)
    ),
    "layer-norm": lambda: nn.Sequential(
        *head(1)[:0],
        nn.Flatten(),
        nn.Linear(192, 8),
        nn.LayerNorm(8),
        nn.ReLU(),
        nn.Linear(8, 6),
        nn.GELU(),
        nn.Linear(6, 3),
    ),
    "views": Views,
    "tokens": Tokens,
    "aliases": Aliases,
    "activation-in-norm": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        BatchNormAct2d(6),
        nn.Conv2d(6, 5, 3),
        BatchNormAct2d(5, apply_act=False),
        *head(5),
    ),
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_masked_loop(name: str, train: bool) -> None:
    torch.manual_seed(3)
    assert_definition(randomise(NETWORKS[name]()).train(train), batch_of())


@settings(max_examples=25)
@given(recipe=networks(most=3))
def test_equals_the_masked_loop_on_networks_at_random(recipe: Recipe) -> None:
    model, images = recipe.build(), recipe.inputs(3)
    batch = images, torch.tensor([0, 2, 1])
    groups = free(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changes, samples = Ablations(groups).changes(model, batch)
    assert samples == 3
    for group in groups:
        torch.testing.assert_close(changes[group.name], expected(model, group, batch), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "residual", "concatenated", "depthwise", "densenet"])
def test_equals_the_loss_of_the_compact_network(name: str) -> None:
    model, batch = randomise(NETWORKS[name]()), batch_of()
    groups = free(model, batch)
    oracle = measured(model, groups, batch)
    for number, group in enumerate(groups):
        channel = group.width // 2
        kept = tuple(c for c in range(group.width) if c != channel)
        compact = copy.deepcopy(model)
        plan = PruningPlan((GroupPlan(group.name, group.width, kept),))
        cut_channels(
            compact, plan, [find_groups(compact, batch[0])[i] for i in range(len(find_groups(model, batch[0])))]
        )
        with torch.no_grad():
            change = float(loss_of(compact, batch)) - float(loss_of(model, batch))
        assert float(oracle.loss_changes(group)[channel]) == pytest.approx(change, rel=1e-9, abs=1e-11), number


def test_equals_first_order_where_the_loss_is_linear_in_the_gate() -> None:
    model = randomise(nn.Sequential(*conv_bn(3, 6), *conv_bn(6, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.append(nn.Linear(4, 3).double())
    batch = batch_of()

    def linear(network: nn.Module, data: Batch) -> Tensor:
        return (network(data[0]) * torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64)).sum(1).mean()

    for group in free(model, batch):
        oracle, first = measured(model, [group], batch, loss_fn=linear), TaylorFO()
        with first.collect(model, [group]):
            linear(model, batch).backward()
            first.update()
        model.zero_grad()
        torch.testing.assert_close(oracle(group), first(group), rtol=1e-9, atol=1e-15)
        assert float(oracle(group).max()) > 1e-6


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_any_loss_sees_the_output_without_a_channel(train: bool) -> None:
    model, batch = randomise(residual()).train(train), batch_of()

    def loss_fn(network: nn.Module, data: Batch) -> Tensor:
        decay = sum(p.square().sum() for p in network.parameters())
        return network(data[0]).softmax(1).var() + 1e-3 * decay  # not a mean over samples

    groups = free(model, batch)
    oracle = measured(model, groups, batch, loss_fn=loss_fn, memory=20_000)
    for group in groups:
        wanted = expected(model, group, batch, loss_fn)
        torch.testing.assert_close(oracle.loss_changes(group), wanted, rtol=1e-9, atol=1e-11)


def test_dropout_draws_the_same_numbers_with_and_without_a_channel() -> None:
    model = nn.Sequential(
        *conv_bn(3, 6), nn.ReLU(), nn.Dropout(0.5), *conv_bn(6, 5), nn.ReLU(), nn.Dropout(0.3), *head(5)
    )
    model, batch = randomise(model).train(), batch_of()
    groups, state = free(model, batch), torch.get_rng_state()

    def seeded(network: nn.Module, data: Batch) -> Tensor:
        torch.set_rng_state(state)
        return loss_of(network, data)

    oracle = measured(model, groups, batch)
    assert torch.equal(torch.get_rng_state(), state)
    for group in groups:
        wanted = expected(model, group, batch, seeded)
        torch.testing.assert_close(oracle.loss_changes(group), wanted, rtol=1e-9, atol=1e-11)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on and not yet gone, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and tensor.device.type != "meta":
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_memory_stays_within_its_bound_and_changes_nothing() -> None:
    model, batch = randomise(residual()), batch_of(size=48)
    groups = free(model, batch)
    parts, most = {}, {}
    for memory in (200_000, 2_000_000, 2**30):
        with Live() as live:
            parts[memory] = Ablations(groups, memory=memory).changes(model, batch)[0]
        most[memory] = live.most
    assert most[200_000] < most[2_000_000] < most[2**30]
    one_value = 48 * 6 * 64 * 8  # of the largest layer: one group's kept values cannot be fewer than a few of these
    assert most[200_000] < 200_000 + 8 * one_value
    for memory in (200_000, 2_000_000):
        for name, change in parts[memory].items():
            torch.testing.assert_close(change, parts[2**30][name], rtol=1e-9, atol=1e-13)


def test_samples_where_a_channel_is_zero_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = randomise(plain()), batch_of()
    with torch.no_grad():
        model[1].bias[2] = -100.0  # dead behind the ReLU
        model[1].weight[2] = 0.1
    group = next(group for group in free(model, batch) if group.name == "0")
    seen: list[int] = []
    run = Suffixes._run_rows

    def spy(self: Suffixes, suffix: Any, kept: Any, by_channel: Any, channels: Tensor, samples: Tensor) -> Any:
        seen.extend(channels.tolist())
        return run(self, suffix, kept, by_channel, channels, samples)

    monkeypatch.setattr(Suffixes, "_run_rows", spy)
    changes = measured(model, [group], batch).loss_changes(group)
    assert seen
    assert 2 not in seen
    assert float(changes[2]) == 0.0
    torch.testing.assert_close(changes, expected(model, group, batch), rtol=1e-9, atol=1e-12)


def test_resumes_from_its_state_and_weighs_by_samples() -> None:
    model = randomise(residual())
    batches = [batch_of(5, seed=1), batch_of(2, seed=2), batch_of(4, seed=3)]
    groups = free(model, batches[0])
    through = measured(model, groups, *batches)
    begun = measured(model, groups, *batches[:2])
    resumed = Oracle()
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    with resumed.collect(model, groups):
        resumed.update(batches[2])
    everything = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    for group in groups:
        assert torch.equal(resumed(group), through(group))
        wanted = expected(model, group, everything)  # type: ignore[arg-type]
        torch.testing.assert_close(resumed.loss_changes(group), wanted, rtol=1e-9, atol=1e-11)
    with pytest.raises(CriterionError, match="other groups"), resumed.collect(model, groups[:1]):
        pass


def test_some_channels_of_each_group_are_measured_as_when_all_are() -> None:
    model, batch = randomise(residual()), batch_of()
    groups = free(model, batch)

    def changes(**options: Any) -> dict[str, Tensor]:
        oracle = measured(model, groups, batch, **options)
        return {group.name: oracle.loss_changes(group) for group in groups}

    everything, some = changes(), changes(channels_per_group=2, seed=3)
    again, other = changes(channels_per_group=2, seed=3), changes(channels_per_group=2, seed=4)
    drawn = {name: (~change.isnan()).nonzero().flatten().tolist() for name, change in some.items()}
    for group in groups:
        there = drawn[group.name]
        assert len(there) == min(2, group.width)
        torch.testing.assert_close(some[group.name][there], everything[group.name][there], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(again[group.name], some[group.name], rtol=0, atol=0, equal_nan=True)
    assert any((~change.isnan()).nonzero().flatten().tolist() != drawn[name] for name, change in other.items())
    found = correlate(everything, some)
    assert found.spearman == pytest.approx(1.0)
    assert found.channels == sum(map(len, drawn.values()))
    with pytest.raises(CriterionError, match=r"measured 2 of the \d+ channels"):
        measured(model, groups, batch, channels_per_group=2)(groups[0])
    with pytest.raises(CriterionError, match="channels_per_group"):
        Oracle(channels_per_group=0)


def test_a_planner_s_loss_is_measured_while_that_planner_works() -> None:
    model, batch = plain().double(), batch_of()
    groups = free(model, batch)

    def doubled(model: nn.Module, batch: Batch) -> Tensor:
        return 2 * loss_of(model, batch)

    oracle = Oracle()
    once, twice = (score_groups(model, groups, oracle, [batch], loss) for loss in (loss_of, doubled))
    for group in groups:
        torch.testing.assert_close(twice[group.name], 4 * once[group.name], rtol=1e-8, atol=1e-14)
    plan_channels(model, batch[0], oracle, [batch], loss_of, Channels(0.8), schedule=Iterative(1, 1))
    assert oracle.loss_fn is None
    own = score_groups(model, groups, Oracle(loss_of), [batch], doubled)  # its own goes before the planner's
    assert all(torch.equal(own[name], once[name]) for name in once)


def test_signed_scores_are_the_changes() -> None:
    model, batch = randomise(plain()), batch_of()
    (group, *_) = free(model, batch)
    oracle = measured(model, [group], batch, signed=True)
    assert torch.equal(oracle(group), oracle.loss_changes(group))
    assert isinstance(create_criterion("oracle"), Oracle)
    assert not oracle.needs_gradients


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.mean() > 100:  # control flow on data
            x = -x
        return self.out(self.b(F.relu(x)).mean((2, 3)))


def test_an_untraceable_network_is_run_in_full() -> None:
    model, batch = randomise(Untraceable()), batch_of()
    with pytest.warns(UserWarning, match="cannot be run in parts") as caught:
        oracle = measured(model, free(model, batch), batch, batch)
    assert len(caught) == 1
    for group in free(model, batch):
        torch.testing.assert_close(oracle.loss_changes(group), expected(model, group, batch), rtol=1e-9, atol=1e-12)


def test_a_loss_that_runs_the_network_twice_is_measured_in_full() -> None:
    model, batch = randomise(plain()), batch_of()

    def twice(network: nn.Module, data: Batch) -> Tensor:
        return loss_of(network, data) + network(data[0].flip(3)).square().mean()

    groups = free(model, batch)
    with pytest.warns(UserWarning, match="calls the network 2 times"):
        oracle = measured(model, groups, batch, loss_fn=twice)
    for group in groups:
        wanted = expected(model, group, batch, twice)
        torch.testing.assert_close(oracle.loss_changes(group), wanted, rtol=1e-9, atol=1e-12)


def test_a_view_that_sees_what_is_written_in_place_is_run_in_full() -> None:
    model = randomise(Aliases(inplace=True))
    with pytest.warns(UserWarning, match="the outputs of the traced network differ"):
        measured(model, free(model, batch_of()), batch_of())
    assert_definition(model, batch_of(), parts=False)


class Mixing(nn.Module):
    """Each sample is told from the mean of the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


def test_samples_that_see_each_other_are_run_together() -> None:
    model = nn.Sequential(*conv_bn(3, 5), nn.ReLU(), *conv_bn(5, 4), nn.ReLU(), *head(4), Mixing())
    assert_definition(randomise(model), batch_of())


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = randomise(plain()), batch_of()
    run = Suffixes._run_rows
    monkeypatch.setattr(Suffixes, "_run_rows", lambda *args: run(*args) * 1.01)
    with pytest.warns(UserWarning, match="but in parts by"):
        assert_changes = measured(model, free(model, batch), batch)
    for group in free(model, batch):
        torch.testing.assert_close(
            assert_changes.loss_changes(group), expected(model, group, batch), rtol=1e-9, atol=1e-12
        )


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("build", [plain, Untraceable])
def test_bad_input_leaves_the_network_as_it_was(build: Callable[[], nn.Module]) -> None:
    model, batch = randomise(build()), batch_of()
    groups = free(model, batch)
    loss_of(model, batch).backward()
    before, modes = state_of(model), [module.training for module in model.modules()]
    calls = iter(range(10**6))

    def fails_later(network: nn.Module, data: Batch) -> Tensor:
        loss = loss_of(network, data)
        return loss if next(calls) < 3 else loss * float("nan")

    bad: list[tuple[Any, Any, str]] = [
        ((batch[0][:0], batch[1][:0]), None, "empty"),
        ((batch[0] * float("inf"), batch[1]), None, "The loss with all channels is nan"),
        (batch, fails_later, r"The loss without channel \d+ of group"),
        (batch, lambda network, data: network(data[0]), "must return a scalar tensor"),
        (batch, lambda network, data: torch.zeros(()), "must call the model"),
    ]
    for data, loss_fn, text in bad:
        oracle = Oracle(loss_fn)
        with warnings.catch_warnings(), oracle.collect(model, groups):
            warnings.simplefilter("ignore")
            with pytest.raises(CriterionError, match=text):
                oracle.update(data)
        assert oracle.minibatches == 0
        assert_same(model, before)
        assert hooks_of(model) == 0
        assert modes == [module.training for module in model.modules()]


def test_what_it_cannot_measure_is_said() -> None:
    model, batch = randomise(plain()), batch_of()
    groups = find_groups(model, batch[0])
    whole = [group.freeze("as it is") for group in groups]
    with pytest.raises(CriterionError, match="pass groups"), Oracle().collect(model, whole):
        pass
    (first, *_) = free(model, batch)
    oracle = measured(model, [first], batch)
    other = next(group for group in groups if group.name != first.name)
    with pytest.raises(CriterionError, match="was not measured"):
        oracle(other)
    with pytest.raises(CriterionError, match="memory must be"):
        Oracle(memory=0)
    with pytest.raises(CriterionError, match="runs the network itself"), Oracle().collect(model, [first]) as criterion:
        criterion.update()
