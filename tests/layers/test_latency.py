"""Latency of blocks: right units, on the inputs a block really gets, in turns; the network stays as it was."""

import time

import pytest
import torch
from layered import Residual, chain, vgg
from networks_at_random import assert_same, state_of
from torch import nn

import nni_plugin.layers.latency
from nni_plugin.errors import ModelError
from nni_plugin.layers import Block, removable_blocks
from nni_plugin.layers.latency import block_latencies


class Sleep(nn.Module):
    """Takes a known time a sample, and notes what it got."""

    def __init__(self, seconds=0.0, add=0.0):
        super().__init__()
        self.seconds, self.add, self.seen = seconds, add, []

    def forward(self, x, *, scale=1.0):
        self.seen.append((tuple(x.shape), float(x.double().mean()), x.dtype, self.training, scale))
        time.sleep(self.seconds * len(x))
        return x + self.add


class Branches(nn.Module):
    """Two parts that one branch consists of, the second called with a keyword."""

    def __init__(self, seconds):
        super().__init__()
        self.norm, self.work = Sleep(seconds, 2.0), Sleep(2 * seconds)

    def forward(self, x):
        return x + self.work(self.norm(x), scale=0.5)


def _block(*members, kind="block"):
    return Block(members[-1], kind, members, (1,))


def test_milliseconds_of_each_block_and_of_the_network():
    network = nn.Sequential(Sleep(0.002), Sleep(0.006), Branches(0.002))
    blocks = [_block("0"), _block("1"), _block("2"), _block("2.norm", "2.work", kind="branch")]
    found = block_latencies(network, torch.zeros(2, 1), blocks, min_run_time=0.03)
    assert list(found) == ["0", "1", "2", "2.work", ""]
    for name, least in (("0", 4.0), ("1", 12.0), ("2", 12.0), ("2.work", 12.0), ("", 28.0)):
        assert least <= found[name].median_ms  # shares are what does not depend on who else is at work
        assert found[name].share == pytest.approx(least / 28, rel=0.4)
        assert found[name].iqr_ms >= 0
        assert found[name].images_per_second == pytest.approx(2 / found[name].median_ms * 1000)
        assert found[name].runs >= 9
    assert found[""].share == 1
    assert {(f.batch_size, f.device, f.dtype) for f in found.values()} == {(2, "cpu", "float32")}


def test_a_block_is_timed_on_what_it_gets_in_the_network():
    network = nn.Sequential(Sleep(add=1.0), Branches(0.0))
    images = torch.tensor([[3.0], [5.0], [10.0]], dtype=torch.float64)
    block_latencies(network, images, [_block("1.norm", "1.work", kind="branch")], batch_size=4, min_run_time=0.001)
    # The batch is 3, 5, 10, 3, with a mean of 5.25: the first adds 1, the norm 2.
    assert set(network[1].norm.seen) == {((4, 1), 6.25, torch.float32, False, 1.0)}
    assert set(network[1].work.seen) == {((4, 1), 8.25, torch.float32, False, 0.5)}


def test_changes_in_place_reach_neither_the_network_nor_the_next_measurement():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(float(x.mean()))
            return x.mul_(2)

    network = nn.Sequential(Sleep(add=1.0), Doubles(), Sleep())
    block_latencies(network, torch.zeros(2, 1), [_block("1"), _block("2")], min_run_time=0.001)
    assert {mean for _, mean, *_ in network[2].seen} == {2.0}
    assert network[1].seen[0] == 1.0


@pytest.fixture
def timed(monkeypatch):
    """Every module that is timed, in order, with the number of hooks on it and inside it at that moment."""
    seen, timer = [], nni_plugin.layers.latency.Timer

    def watched(statement, globals, **kwargs):
        module = globals["module"]
        seen.append((module, sum(len(part._forward_pre_hooks) for part in module.modules())))
        return timer(statement, globals=globals, **kwargs)

    monkeypatch.setattr(nni_plugin.layers.latency, "Timer", watched)
    return seen


def test_blocks_and_the_network_take_turns(timed):
    network = nn.Sequential(Sleep(), Sleep(), Sleep())
    block_latencies(network, torch.zeros(1, 1), [_block("2"), _block("1")], min_run_time=0.001)
    assert [module for module, _ in timed] == [network, network[1], network[2]] * 9


def test_an_outer_block_is_not_charged_for_the_measuring_of_inner_ones(timed):
    network = nn.Sequential(Branches(0.001))
    blocks = [_block("0"), _block("0.norm"), _block("0.work")]
    block_latencies(network, torch.zeros(1, 1), blocks, min_run_time=0.01)
    assert [hooks for _, hooks in timed] == [0] * 9 * 4


@pytest.mark.parametrize("build", [lambda: chain(2), vgg])
def test_the_network_stays_as_it_was(build):
    network = build().train()
    network[1].eval()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    images = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    before, random = state_of(network), torch.get_rng_state()
    modes, threads = [m.training for m in network.modules()], torch.get_num_threads()
    blocks = removable_blocks(network, images)
    found = block_latencies(network, images, blocks, dtype=torch.float64, min_run_time=0.001, threads=2)
    assert set(found) == {"", *(block.name for block in blocks)}
    assert all(latency.median_ms > 0 for latency in found.values())
    assert found[""].threads == 2
    assert_same(network, before)
    assert all(bool((parameter.grad == 1).all()) for parameter in network.parameters())
    assert [m.training for m in network.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


def test_nothing_stays_after_a_failure():
    network = nn.Sequential(Residual(3, 2), nn.Flatten(), nn.Linear(7, 2)).train()
    with pytest.raises(ModelError, match="batch size 5"):
        block_latencies(network, torch.zeros(1, 3, 4, 4), [_block("0")], batch_size=5)
    assert all(m.training and not m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize(
    ("block", "batch_size", "said"),
    [
        (_block("1"), 0, "at least 1"),
        (_block("9"), 1, "no module '9'"),
        (_block("unused"), 1, "not go through 'unused'"),
    ],
)
def test_bad_input(block, batch_size, said):
    class Network(nn.Sequential):
        def forward(self, x):
            return self[1](x)

    network = Network(nn.Identity(), nn.Identity())
    network.unused = nn.Identity()
    with pytest.raises(ModelError, match=said):
        block_latencies(network, torch.zeros(2, 1), [block], batch_size=batch_size, min_run_time=0.001)
