"""NNI's way on one network, and the page; all networks and hash seeds are left to the benchmark."""

from typing import Any

import pytest
import torch
from torch import nn

from nni_plugin.benchmarks import nni_drop_in
from nni_plugin.benchmarks.__main__ import BENCHMARKS


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        )

    monkeypatch.setattr(nni_drop_in, "NETWORKS", {"small": network})


def test_from_masks_to_a_backward_pass() -> None:
    threads = torch.get_num_threads()
    result = nni_drop_in.run(("small",), size=8, hash_seeds=())
    assert torch.get_num_threads() == threads
    cases = result["cases"]["small"]
    for method in ("nni:l1 coupled", "taylor-fo"):
        assert cases[method]["difference"] <= 1e-5
        assert cases[method]["macs_after"] < 0.5 * cases[method]["macs_before"]
        assert (cases[method]["sparsity"], cases[method]["gradients"], cases[method]["left"]) == (0.5, True, 0)
    assert cases["nni:l1"]["difference"] > 1e-5  # beta is not masked: the reason for it all
    assert "| small | taylor-fo |" in nni_drop_in.render(result)


@pytest.mark.parametrize("method", nni_drop_in.GLOBAL)
def test_one_ratio_over_a_network(method: str) -> None:
    found = nni_drop_in.whole_network("small", method, size=8, images=4, training_steps=2, ratio=0.5)
    assert 0 < found["sparsity"] < 1
    assert found == nni_drop_in.whole_network("small", method, size=8, images=4, training_steps=2, ratio=0.5)


def page_of(digests: list[str]) -> str:
    case: dict[str, Any] = {"macs_before": 4e6, "macs_after": 1e6, "difference": 1e-7, "gradients": True, "left": 0}
    shares = {str(seed): {"sparsity": 0.4998, "digest": digest} for seed, digest in enumerate(digests)}
    return nni_drop_in.render(
        {
            "settings": {"size": 64, "ratio": 0.5, "threads": 1},
            "tolerance": 1e-5,
            "cases": {"net": {"taylor-fo": {**case, "seconds_masks": 1.0, "seconds_speedup": 2.0}}},
            "global": {"taylor-fo": shares},
        }
    )


def test_page() -> None:
    page = page_of(["a", "a"])
    assert "| net | taylor-fo | 4.0 | 1.0 | 0.250 | 1.0e-07 | yes | 0 | 1.0 | 2.0 |" in page
    assert "| taylor-fo | 0.4998 | 0.4998 | the same |" in page
    assert "| taylor-fo | 0.4998 | 0.4998 | differ |" in page_of(["a", "b"])


def test_it_is_run_by_name() -> None:
    assert BENCHMARKS["nni_drop_in"] is nni_drop_in
