"""EfficientNet-Lite0 from ImageNet to the digits, at a size of seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_plugin.adapters.efficientnet_lite0 import imagenet_model
from nni_plugin.benchmarks import efficientnet_lite0
from nni_plugin.checkpoint import from_pretrained

pytestmark = pytest.mark.slow

METHODS = ("magnitude", "tp:magnitude")


def run(folder: Path, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "methods": METHODS,
        "macs": (0.9,),
        "share": 0.1,
        "img_size": 32,
        "batch_size": 16,
        "transfer_epochs": 1,
        "score_batches": 1,
        "dataset": "digits",
        "folder": folder,
        "device": "cpu",
    }
    return json.loads(json.dumps(efficientnet_lite0.run(**{**given, **options})))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("lite0")
    return folder, run(folder)


def test_every_method_starts_from_the_transferred_network(done: Any) -> None:
    folder, result = done
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(METHODS)
    for row in rows.values():
        assert 0.8 < row["macs_ratio"] <= 0.9
        assert (row["target"], row["seed"]) == ("macs=0.9", 0)
    assert len({row["top1_baseline"] for row in rows.values()}) == 1
    assert result["not_done"] == {}
    assert result["settings"]["images"] == pytest.approx(0.1 * 1438, abs=10)
    assert result["dense"]["params"] == sum(tensor.numel() for tensor in imagenet_model(10).parameters())

    (dense,) = (folder / "comparison").glob("dense/seed0")
    trained, before = from_pretrained(dense).state_dict(), imagenet_model(10).state_dict()
    # Nine minibatches from the ImageNet weights, not from random ones.
    like = torch.nn.functional.cosine_similarity
    assert like(trained["conv_head.weight"].flatten(), before["conv_head.weight"].flatten(), dim=0) > 0.9
    assert not torch.equal(trained["classifier.weight"], before["classifier.weight"])


def test_goes_on_where_it_was(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = done
    with monkeypatch.context() as patch:
        patch.setattr("nni_plugin.comparison.run.do_cell", lambda *_: pytest.fail("nothing is left to run"))
        assert run(folder) == result


def test_page(done: Any) -> None:
    result = done[1]
    page = efficientnet_lite0.render(result)
    assert page.count("| macs=0.9 | `") == 2
    assert "1 pass over" in page
    best = max(result["rows"], key=lambda row: row["top1"])
    table = [line for line in page.splitlines() if line.startswith("| macs")]
    assert table[0].split(" | ")[2] == f"{best['top1']:.2f}"
    assert "Not done" not in page
    refused = efficientnet_lite0.render({**result, "not_done": {"nni_l1-macs=0.9-seed0": "refused: why"}})
    assert "- `nni_l1-macs=0.9-seed0`: refused: why" in refused

    first, second = ({**result["rows"][i], "top1": 50.0 - i} for i in range(2))
    ahead = efficientnet_lite0.render({**result, "rows": [first, second]})
    behind = efficientnet_lite0.render(
        {**result, "rows": [second | {"method": "magnitude"}, first | {"method": "tp:x"}]}
    )
    assert "on one seed: more is not known" in ahead
    assert "macs=0.9: tp:x is ahead of our best, magnitude, by 1.00 points" in behind
