"""On random networks of attention blocks: whatever may be cut is cut exactly, in any amounts, and trains."""

from dataclasses import replace

import pytest
from attention_blocks import ENDS, MIXERS, MLPS, STEMS, Attention_, Recipe, recipes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traced import X, by_name, prove, reasons

CASES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
PLAIN = Attention_()
WRITTEN = {
    "fused": replace(PLAIN, fused=True),
    "unfused": PLAIN,
    "heads-first": replace(PLAIN, order="h3d"),
    "three-layers": replace(PLAIN, one=False),
    "norms": replace(PLAIN, norms=True),
    "bias-table": replace(PLAIN, bias=True),
    "fused-bias-table": replace(PLAIN, bias=True, fused=True),
    "rotary": replace(PLAIN, rotary=True),
}


def check(recipe: Recipe, seeds: range) -> None:
    """Assert that all is cut exactly and nothing is left whole but the number of tokens."""
    kept = reasons(prove(recipe.build(), X, seeds=seeds, least=2))
    tokens = {f"blocks.{i}.mixer.fc2" for i, (mixer, _, _) in enumerate(recipe.blocks) if mixer == "token-mlp"}
    assert set(kept) == tokens
    for reason in kept.values():
        assert reason.startswith("it meets a fixed size in module '")


@pytest.mark.parametrize("mixer", ["attention", "window"])
@pytest.mark.parametrize("how", list(WRITTEN))
def test_attention_however_it_is_written(how: str, mixer: str) -> None:
    recipe = Recipe("plain", ((mixer, WRITTEN[how], "plain"),), "mean")
    groups = by_name(prove(recipe.build(), X, least=1))
    assert reasons(groups.values()) == {}
    (heads,) = [group for group in groups.values() if group.part == "heads"]
    assert heads.units == 3
    assert [size.name for size in heads.sizes] == ["num_heads"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer not in ("attention", "window")])
def test_mixers_and_ends(mixer: str, end: str) -> None:
    check(Recipe("plain", ((mixer, PLAIN, "plain"),), end), range(2))


@pytest.mark.parametrize("kind", MLPS)
def test_mlps(kind: str) -> None:
    check(Recipe("plain", (("attention", PLAIN, kind),), "mean"), range(2))


@pytest.mark.parametrize("kind", STEMS)
def test_stems(kind: str) -> None:
    check(Recipe(kind, (("channel-gate", PLAIN, "plain"),), "mean"), range(2))


@settings(CASES, max_examples=25)
@given(recipes(), st.integers(0, 2**16))
def test_any_network_in_any_amounts(recipe: Recipe, seed: int) -> None:
    check(recipe, range(seed, seed + 1))
