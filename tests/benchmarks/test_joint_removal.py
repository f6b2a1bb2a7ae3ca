"""The joint-removal study on the digits, at a size of seconds."""

import json
from pathlib import Path

import pytest
import torch

from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.benchmarks import joint_removal
from nni_plugin.benchmarks.joint_removal.methods import VARIANTS, MinibatchOBS, own_labels
from nni_plugin.benchmarks.presets import Preset
from nni_plugin.criteria import OBS
from nni_plugin.criteria.ablation import cross_entropy
from nni_plugin.errors import OutputError

TRAINING = TrainingConfig(epochs=1, lr=0.05)
TINY = Preset("digits", 600, TRAINING, TRAINING, batch_size=64, seeds=1, img_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("joint_removal")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> dict:
    monkeypatch.setattr(joint_removal, "DENSE", {"resnet20": TINY})
    given = {
        "networks": ("resnet20",),
        "methods": ("obs", "magnitude"),
        "seeds": (0,),
        "macs": (0.6,),
        "channels": (),
        "images": 64,
        "test_images": 100,
        "folder": folder,
    }
    return joint_removal.run(**{**given, **options})


def test_fills_every_cell_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(folder, monkeypatch, regimes=("one-shot", "reconstructed"))
    cells = {(cell["method"], cell["regime"]): cell for cell in result["cells"]}
    assert set(cells) == {(m, r) for m in ("obs", "magnitude") for r in ("one-shot", "reconstructed")}
    for cell in cells.values():
        assert cell["macs_ratio"]["mean"] == pytest.approx(0.6, abs=0.02)
        assert cell["macs_ratio"]["mean"] <= 0.6
    # The regimes share the plan: the same channels, whatever comes after.
    assert cells["obs", "one-shot"]["channels_kept"] == cells["obs", "reconstructed"]["channels_kept"]
    monkeypatch.setattr(joint_removal._Cell, "load", lambda self: pytest.fail("nothing is left to run"))
    assert run(folder, monkeypatch, regimes=("one-shot", "reconstructed")) == result
    page = joint_removal.render(result)
    assert "## resnet20" in page
    assert page.count("\n| `") == 2


def test_images_are_drawn_by_the_seed() -> None:
    loader = [(torch.arange(50), torch.arange(50)), (torch.arange(50, 80), torch.arange(50, 80))]
    ((drawn, _),) = joint_removal.first(loader, 40, seed=3)
    ((again, _),) = joint_removal.first(loader, 40, seed=3)
    assert drawn.tolist() == again.tolist() != list(range(40))
    ((plain, _),) = joint_removal.first(loader, 40)
    assert plain.tolist() == list(range(40))


def test_every_variant_runs_and_the_rows_are_what_they_are_said_to_be(folder: Path, monkeypatch) -> None:
    variants = tuple(VARIANTS)
    result = run(folder, monkeypatch, methods=("obs", *variants), regimes=("one-shot",))
    told = ("top1", "macs_ratio", "params_ratio", "channels_kept")
    found = {cell["method"]: tuple(cell[name]["mean"] for name in told) for cell in result["cells"]}
    assert set(found) == {"obs", *variants}
    assert len(set(found.values())) > len(found) / 2

    torch.manual_seed(0)
    model = create_model("resnet20", "nni_plugin", num_classes=10, in_chans=1).eval()
    batch = torch.randn(12, 1, 8, 8), torch.randint(0, 10, (12,))
    groups = [group for group in find_groups(model, batch[0][:2]) if group.fixed is None]
    rows = {}
    for kind in (OBS, MinibatchOBS):
        criterion = kind()
        with criterion.collect(model, groups):
            cross_entropy(model, batch).backward()
            criterion.update(batch)
        (rows[kind],) = criterion.state_dict()["gradients"]
    torch.testing.assert_close(rows[MinibatchOBS], rows[OBS].mean(0, keepdim=True))
    with torch.no_grad():
        once, again = (float(own_labels(model, batch)) for _ in range(2))
        assert once == again != float(cross_entropy(model, batch))


def test_cells_are_added_to_an_earlier_result_that_they_belong_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = run(folder, monkeypatch, regimes=("one-shot", "reconstructed"))
    earlier = tmp_path / "earlier.json"

    def wrote(**changed: object) -> None:
        earlier.write_text(json.dumps({**result, "command": "before", "machine": {}, **changed}))

    of_obs = [{**cell, "top1": {"mean": 1.0, "sd": None}} for cell in result["cells"] if cell["method"] == "obs"]
    other = {**of_obs[0], "network": "resnet56", "seeds": [0, 1, 2]}
    wrote(cells=[other, *of_obs], settings={**result["settings"], "dense": {"resnet56": TINY.training()}})
    joined = run(folder, monkeypatch, regimes=("one-shot", "reconstructed"), onto=earlier)
    assert joined["cells"] == [other, *result["cells"]]  # the new ones in place of the old, other networks kept
    assert joined["earlier"] == [{"command": "before", "machine": {}}]
    assert "\nPut onto what earlier calls gave: `before`.\n" in joint_removal.render(joined)

    wrote(cells=[{**of_obs[0], "seeds": [0, 1]}])
    with pytest.raises(OutputError, match="with seed 1 too"):
        run(folder, monkeypatch, regimes=("one-shot", "reconstructed"), onto=earlier)
    wrote(settings={**result["settings"], "images": 65})
    with pytest.raises(OutputError, match="numbers of images"):
        run(folder, monkeypatch, regimes=("one-shot", "reconstructed"), onto=earlier)
    wrote(settings={**result["settings"], "dense": {"resnet20": {"epochs": 9}}})
    with pytest.raises(OutputError, match="trained otherwise"):
        run(folder, monkeypatch, regimes=("one-shot", "reconstructed"), onto=earlier)
