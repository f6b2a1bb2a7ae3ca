"""Random: reproducible anywhere, different per group and seed, whatever the order."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from nni_plugin.criteria import Random
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member

CODE = """
import torch
from nni_plugin.criteria import Random
from nni_plugin.groups import ChannelGroup
torch.rand(3)
print(Random(7)(ChannelGroup("layer1.0.conv1", 5, ())).tolist())
"""


def group(name: str, width: int = 64) -> ChannelGroup:
    index = torch.arange(width)
    return ChannelGroup(name, width, (Member(name, "out", "dense", index, index, ()),))


def test_the_same_on_every_process() -> None:
    runs = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
        runs.add(done.stdout)
    assert runs == {f"{Random(7)(group('layer1.0.conv1', 5)).tolist()}\n"}


def test_a_stored_value() -> None:
    """A result that was published with a seed can be had again with the next version."""
    assert Random(0)(group("conv1", 2)).tolist() == [0.202171513048914, 0.680818877381671]


def test_the_order_of_questions_and_other_draws_do_not_matter() -> None:
    one, two = Random(3), Random(3)
    first = [one(group(name)) for name in "abc"]
    torch.manual_seed(5)
    second = [two(group(name)) for name in "cba"][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(one(group("a")), first[0])
    state = torch.random.get_rng_state()
    one(group("d"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_groups_and_seeds_differ() -> None:
    draws = [Random(seed)(group(name)) for seed in (0, 1, -1, 2**80) for name in ("a", "b", "1")]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)
    together = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws), dtype=torch.float64)
    assert float(together.abs().max()) < 0.5


def test_scores_are_even() -> None:
    scores = Random()(group("a", 20000))
    assert 0 <= float(scores.min()) < float(scores.max()) < 1
    torch.testing.assert_close(scores.mean().item(), 0.5, rtol=0, atol=0.01)
    torch.testing.assert_close(
        torch.histc(scores, 10, 0, 1) / 20000, torch.full((10,), 0.1).double(), rtol=0, atol=0.01
    )


@pytest.mark.parametrize("seed", [None, 1.0, "0", True])
def test_bad_seed(seed: Any) -> None:
    with pytest.raises(CriterionError, match="whole number"):
        Random(seed)
