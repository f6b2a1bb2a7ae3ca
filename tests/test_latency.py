"""Latency: right units, the model left as it was, ratios that follow the work done."""

import time

import pytest
import torch
from torch import nn

from nni_plugin.errors import ModelError
from nni_plugin.latency import evaluation_mode, measure_latency, measure_pair


class Sleep(nn.Module):
    """Takes a known time per image, so that units can be checked."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.seen: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, torch.is_inference_mode_enabled(), x.dtype))
        time.sleep(self.seconds * len(x))
        return x


def test_milliseconds_per_batch_and_images_per_second():
    one, four = measure_latency(Sleep(0.003), (1, 2, 2), (1, 4), min_run_time=0.05)
    assert 3.0 <= one.median_ms < 6.0
    assert 12.0 <= four.median_ms < 18.0
    assert four.images_per_second == pytest.approx(4 / four.median_ms * 1000)
    assert (one.batch_size, four.batch_size) == (1, 4)
    assert one.runs >= 4
    assert one.iqr_ms >= 0
    assert (one.device, one.dtype) == ("cpu", "float32")


def test_eval_and_inference_mode_during_and_modes_restored():
    model = nn.Sequential(Sleep(0.0), nn.BatchNorm2d(3), nn.Dropout())
    model.train()
    model[1].eval()  # a frozen normalisation inside a training network
    mean = model[1].running_mean.clone()
    measure_latency(model, (3, 4, 4), min_run_time=0.005)
    assert set(model[0].seen) == {(False, True, torch.float32)}
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.equal(model[1].running_mean, mean)


def test_mode_restored_after_a_failure():
    model = nn.Linear(3, 3).train()
    with pytest.raises(ModelError, match="batch size 2"):
        measure_latency(model, (1, 1, 4), (2,))
    assert model.training


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(batch_size):
    with pytest.raises(ModelError, match="at least 1"):
        measure_latency(nn.Identity(), (1, 2, 2), (batch_size,))


def test_another_dtype_is_measured_on_a_copy():
    model = nn.Conv2d(3, 4, 3)
    [result] = measure_latency(model, (3, 8, 8), dtype=torch.float64, min_run_time=0.005)
    assert result.dtype == "float64"
    assert model.weight.dtype == torch.float32


def test_random_state_and_threads_left_alone():
    model = nn.Conv2d(1, 1, 1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    [result] = measure_latency(model, (1, 2, 2), min_run_time=0.005, threads=threads + 1)
    assert result.threads == threads + 1
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_pair_ratio_follows_the_work():
    first, second = Sleep(0.004).train(), Sleep(0.002).eval()
    [pair] = measure_pair(first, second, (1, 2, 2), min_run_time=0.05, rounds=5)
    assert pair.ratio == pytest.approx(0.5, rel=0.2)
    assert 4.0 <= pair.first.median_ms < 8.0
    assert 2.0 <= pair.second.median_ms < 4.0
    assert pair.rounds == 5
    assert first.training
    assert not second.training


def test_pair_takes_turns(monkeypatch):
    order: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not order or order[-1] != self.name:
                order.append(self.name)
            time.sleep(0.001)
            return x

    measure_pair(Named("a"), Named("b"), (1, 1, 1), min_run_time=0.01, rounds=4)
    # warm-ups a b, estimates a b, then rounds ab ba ab ba, in which equal neighbours merge
    assert order == list("abab") + list("abab") + list("a")


def test_pair_names_the_batch_size_that_failed():
    class AtMostOne(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                raise KeyError("no")
            return x

    with pytest.raises(ModelError, match="batch size 8"):
        measure_pair(nn.Identity(), AtMostOne(), (1, 2, 2), (1, 8), min_run_time=0.005, rounds=3)
    with pytest.raises(ValueError, match="at least 3"):
        measure_pair(nn.Identity(), nn.Identity(), (1, 2, 2), rounds=1)


def test_evaluation_mode_restores_after_an_exception():
    model = nn.Sequential(nn.Dropout()).train()

    def fail() -> None:
        with evaluation_mode(model):
            assert not model[0].training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert model[0].training
