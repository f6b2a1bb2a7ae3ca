"""Around operators: numbers of modules that count channels, shared weights, what modules keep, and odd networks."""

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from traced import Net, X, by_name, drawn, paths, prove, reasons

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.errors import GraphError
from nni_plugin.tracing.operators import rule_of
from nni_plugin.tracing.trace import Trace

F = nn.functional


def sizes(groups: dict[str, Any], name: str) -> set[tuple[str, str, int | None]]:
    return {(size.path, size.name, size.item) for size in groups[name].sizes}


class Parts(nn.Module):
    """Splits channels by its own numbers, two of which are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.depth, self.scale = [2, 3, 3], 3, 8.0
        self.convs = nn.ModuleList(nn.Conv2d(part, part, 1) for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.parts, 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1) * self.scale


def test_every_number_of_a_list_counts_its_own_part() -> None:
    groups = by_name(prove(drawn(Net(lambda s, a, b: s.parts(a), parts=Parts())), X, seeds=range(8), least=7))
    assert reasons(groups.values()) == {}
    assert {("parts", "parts", 0), ("parts", "parts", 1), ("parts", "parts", 2)} <= sizes(groups, "a")


class Sized(nn.Module):
    """A network that lays out its tokens by a width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.tokens = 6, 64
        self.embed, self.head = nn.Conv2d(3, self.embed_dim, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.embed_dim)
        return self.head(y.mean(1))


def test_the_networks_own_width_is_lowered() -> None:
    groups = by_name(prove(drawn(Sized()), X))
    assert sizes(groups, "embed") == {("", "embed_dim", None)}


def test_numbers_of_layers_that_stay_stay() -> None:
    """`embed_dim` says what the attention's own parameters are, however many channels are added to its output."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        x = a.flatten(2).transpose(1, 2)
        return s.attention(x, x, x)[0].transpose(1, 2).unflatten(2, (8, 8)) + b

    groups = by_name(prove(drawn(Net(do, attention=attention)), X))
    assert reasons(groups.values()) == {"a": "layer 'attention' is of a kind that cannot be cut"}
    assert "attention.out_proj" in paths(groups["b"])


@pytest.mark.parametrize("how", ["module", "weight"])
def test_shared_layers_are_one(how: str) -> None:
    one, other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    if how == "module":
        other = one
    else:
        other.weight = one.weight
    model = drawn(Net(lambda s, a, b: s.one(a) + s.other(b), one=one, other=other))
    groups = by_name(prove(model, X))
    assert reasons(groups.values()) == {}
    assert {"a", "b"} <= paths(groups["a"])
    assert "one" in groups


def test_tied_embedding_and_classifier() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.inner, self.outer = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.words.weight

        def forward(self, words: Tensor) -> Tensor:
            x = self.words(words)
            return self.head(x + self.outer(torch.relu(self.inner(x))))

    groups = by_name(prove(drawn(Words()), torch.arange(10).view(2, 5)))
    assert groups["outer"].fixed is None
    assert {"words", "outer"} <= paths(groups["outer"])
    assert paths(groups["outer"], "in") == {"inner", "head"}


class Cached(nn.Module):
    """Keeps a tensor made of its weights between passes in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.ones(8)), None

    def train(self, mode: bool = True) -> nn.Module:
        self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.kept is None:
            self.kept = 2 * self.weight[:, None, None]
        return x * self.kept


def test_what_is_kept_between_passes_is_followed_and_forgotten() -> None:
    model = drawn(Net(lambda s, a, b: s.cached(a), cached=Cached()))
    model(X)
    groups = by_name(prove(model, X))
    assert "cached.weight" in paths(groups["a"])
    assert reasons(groups.values()) == {}


def test_modules_by_keyword_and_that_return_none() -> None:
    class Quiet(nn.Module):
        def forward(self, *, x: Tensor) -> None:
            return None

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.quiet = nn.LayerNorm(8), Quiet()

        def forward(self, *, x: Tensor) -> tuple[Tensor, None]:
            return self.norm(input=x), self.quiet(x=x)

    def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return s.named(x=a.permute(0, 2, 3, 1))[0].permute(0, 3, 1, 2) + b

    groups = by_name(prove(drawn(Net(do, named=Named())), X))
    assert {(p.path, p.side) for p in groups["a"].passages} == {("named.norm", "in"), ("named.norm", "out")}


@dataclasses.dataclass
class Out:
    """What some networks return."""

    scores: Tensor
    features: Tensor


class Returning(Net):
    """Returns its scores and features in some form."""

    def forward(self, x: Tensor) -> Any:
        scores, features = super().forward(x), torch.relu(self.a(x))
        return {
            "dataclass": Out(scores, features),
            "dict": {"scores": scores, "features": [features], "name": "a", "none": None},
            "nested": (scores, Out(features, features)),
        }[self.form]

    form = "dict"


@pytest.mark.parametrize("form", ["dict", "dataclass", "nested"])
def test_whatever_a_network_returns_stays_as_wide(form: str) -> None:
    model = drawn(Returning(lambda s, a, b: a + b))
    model.form = form
    groups = by_name(prove(model, X))
    assert groups["a"].fixed == "its channels are the network's output"
    assert groups["next"].fixed is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_recurrent_scripted_and_parametrised_layers_keep_what_they_read() -> None:
    parts = {
        "lstm": (nn.LSTM(8, 8, batch_first=True), "layer 'part' is of a kind that cannot be cut"),
        "scripted": (torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), "layer 'part.0' is of a kind"),
        "normed": (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), "'part"),
        "cell": (nn.GRUCell(8, 8), "layer 'part' is of a kind that cannot be cut"),
    }
    for part, text in parts.values():

        def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
            x = a.flatten(2).transpose(1, 2)
            y = s.part(x.flatten(0, 1)).unflatten(0, (2, 64)) if isinstance(s.part, nn.GRUCell) else s.part(x)
            y = y[0] if isinstance(y, tuple) else y
            return y.transpose(1, 2).unflatten(2, (8, 8)) + b

        groups = find_groups(Net(do, part=part).double(), X)
        assert text in reasons(groups)["a"]
        assert set(by_name(groups)) >= {"a", "next", "head"}


def test_wrapped_networks_are_those_inside() -> None:
    plain = drawn(Net(lambda s, a, b: a + b))
    expected = [(group.name, group.width, group.fixed is None) for group in prove(plain, X)]
    for wrapped in (nn.DataParallel(plain), torch.compile(plain, backend="eager")):
        assert [(group.name, group.width, group.fixed is None) for group in find_groups(wrapped, X)] == expected


def test_hooks_of_the_user_run_and_stay() -> None:
    model = drawn(Net(lambda s, a, b: a + b))
    calls: list[str] = []
    model.a.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    model.a.register_forward_hook(lambda module, inputs, output: 2 * output)
    before = {key: len(getattr(model.a, key)) for key in ("_forward_hooks", "_forward_pre_hooks")}
    groups = find_groups(model, X)
    assert calls == ["before"]
    assert reasons(groups) == {}
    assert {key: len(getattr(model.a, key)) for key in before} == before


def test_what_leaves_torch_stays_whole() -> None:
    groups = find_groups(drawn(Net(lambda s, a, b: torch.from_numpy(np.asarray(a.detach())) + b)), X)
    assert by_name(groups)["b"].fixed == "it meets a fixed size in module ''"
    assert by_name(groups)["a"].fixed == "no output of the network in use depends on it"


def test_a_network_that_fails_is_said_and_left_alone() -> None:
    def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        raise ValueError("no such thing")

    model = drawn(Net(do))
    with pytest.raises(GraphError, match=r"ValueError: no such thing"):
        find_groups(model, X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_activations_are_let_go_of_while_the_network_runs() -> None:
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            seen.append(weakref.ref(y))
            alive.append(sum(one() is not None for one in seen))
            return y.abs()

    model = nn.Sequential(nn.Conv2d(3, 8, 1), *[Watch() for _ in range(6)], nn.Conv2d(8, 2, 1)).double()
    trace = Trace(model, rule_of)
    with torch.no_grad():
        out = trace.run(X)
    assert max(alive) == 1
    assert trace.steps
    kept = weakref.ref(out)
    del out
    assert kept() is None
    groups = find_groups(model, X)
    gc.collect()
    assert not any(one() is not None for one in seen)
    assert len(groups) == 2


SCRIPT = """
import torch
from attention_blocks import Attention_, Recipe
from networks_at_random import any_plan
from nni_plugin.adapters.torch_pruning import find_groups
from traced import X
blocks = (("window", Attention_(bias=True), "glu"), ("cosine", Attention_(), "swiglu"))
recipe = Recipe("split-attention", blocks, "mean")
groups = find_groups(recipe.build(), X)
print([(g.name, g.unit.tolist(), [(m.path, m.axis, m.writer, m.beside, m.channel.tolist()) for m in g.members],
        [(s.path, s.name) for s in g.sizes], g.fixed, g.forked) for g in groups])
print(any_plan(groups, 0).digest)
"""


@pytest.mark.slow
def test_processes_agree() -> None:
    outputs = set()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1
