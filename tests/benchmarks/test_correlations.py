"""The benchmark of correlations, made small: it goes on where it was, and its page says what its numbers say."""

import json
import re
import statistics
from pathlib import Path

import pytest

from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.benchmarks import __main__ as program
from nni_plugin.benchmarks import correlations
from nni_plugin.benchmarks.presets import Preset
from nni_plugin.errors import OutputError

ROOT = Path(__file__).parents[2]
SMALL = {
    "networks": ("resnet20",),
    "seeds": (0, 1),
    "images": 32,
    "held_out_images": 32,
    "channels_per_group": 10,
    "methods": ("taylor-fo", "taylor-fisher", "tp:magnitude", "random"),
    "device": "cpu",
}
TRAINING = TrainingConfig(epochs=1, lr=0.05)
TINY = Preset("digits", 600, TRAINING, TRAINING, batch_size=32, img_size=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of runs and the result; both to be left as they are."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correlations, "DENSE", {"resnet20": TINY})
        yield folder, correlations.run(**SMALL, folder=folder, dense=folder / "dense")


def test_one_file_a_run(made):
    folder, _ = made
    files = sorted(path.name for path in (folder / "resnet20").iterdir())
    assert files == [f"seed{seed}{end}" for seed in (0, 1) for end in ("-correlations.png", "-oracle.csv", ".json")]
    assert str(folder) not in (folder / "resnet20" / "seed0.json").read_text()


def test_means_over_seeds(made):
    folder, result = made
    runs = [json.loads((folder / "resnet20" / f"seed{seed}.json").read_text())["result"] for seed in (0, 1)]
    found = result["networks"]["resnet20"]["criteria"]["taylor-fo"]
    for column in ("spearman", "spearman_per_group", "kendall", "pearson", "spearman_held_out"):
        values = [run["criteria"]["taylor-fo"][column] for run in runs]
        assert values[0] != values[1]
        assert found[column]["mean"] == pytest.approx(statistics.mean(values))
        assert found[column]["sd"] == pytest.approx(statistics.stdev(values))
    assert found["spearman_signed"]["n"] == 0  # it predicts no sign
    network = result["networks"]["resnet20"]
    assert network["judged"] == 10 * network["groups"] < network["channels"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_goes_on_where_it_was(made, monkeypatch, tmp_path):
    folder, result = made

    def again(*args, **kwargs):
        raise AssertionError("ran what is done")

    monkeypatch.setattr(correlations, "run_correlations", again)
    assert correlations.run(**SMALL, folder=folder, dense=folder / "dense") == result
    with pytest.raises(OutputError, match="images was 32, is now 64"):
        correlations.run(**{**SMALL, "images": 64}, folder=folder, dense=folder / "dense")
    with pytest.raises(AssertionError, match="ran what is done"):
        correlations.run(**{**SMALL, "seeds": (2,)}, folder=folder, dense=folder / "dense")


def test_page_holds_the_numbers_best_first(made):
    _, result = made
    page = correlations.render(result)
    tables = re.findall(r"((?:^\|.*\n)+)", page, flags=re.MULTILINE)
    assert len(tables) == 2
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in tables[1].splitlines()]
    criteria = result["networks"]["resnet20"]["criteria"]
    assert {line[0] for line in lines[2:]} == set(criteria)
    means = []
    for method, *cells in lines[2:]:
        for heading, cell in zip(lines[0][1:], cells, strict=True):
            sample = criteria[method][correlations._SHOWN[heading]]
            if sample["mean"] is None:
                assert not re.search(r"\d", cell), (method, heading)
            else:
                assert cell == f"{sample['mean']:.3f} ± {sample['sd']:.3f}", (method, heading)
        means.append(criteria[method]["spearman"]["mean"])
    assert means == sorted(means, reverse=True)


def test_page_names_what_was_left_out(made):
    _, result = made
    changed = json.loads(json.dumps(result))
    changed["networks"]["resnet20"]["skipped"] = {"random": "no reason"}
    assert "- random left out: no reason" in correlations.render(changed)


def test_committed_page_is_made_of_the_committed_numbers(tmp_path):
    numbers, page = ROOT / "benchmarks/results/correlations.json", ROOT / "docs/correlations.md"
    assert numbers.exists() == page.exists(), "commit both: `python -m nni_plugin.benchmarks correlations`"
    if numbers.exists():
        program.write_page(correlations, json.loads(numbers.read_text()), tmp_path / "correlations.md")
        assert (tmp_path / "correlations.md").read_text() == page.read_text()


def test_is_registered():
    assert program.BENCHMARKS["correlations"] is correlations
