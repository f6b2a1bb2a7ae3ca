"""`correlate` from end to end on real digits: what it writes, what it refuses, and that it goes on where it was."""

import csv
import json
import os
import signal

import killed
import numpy as np
import pytest
import torch
from scipy import stats

import nni_plugin.correlation_study.job
from nni_plugin.correlation_study.data import FirstImages
from nni_plugin.correlation_study.job import CorrelationJob, run_correlations
from nni_plugin.correlation_study.results import COLUMNS
from nni_plugin.criteria import Oracle
from nni_plugin.errors import CriterionError
from nni_plugin.methods import known_methods

FILES = ["correlations.csv", "correlations.json", "correlations.png", "oracle.csv"]
SMALL = [
    "correlate", "--library", "nni_plugin", "--model", "resnet20", "--img-size", "8", "--batch-size", "32",
    "--images", "64", "--held-out-images", "48", "--pretrain-epochs", "1",
]  # fmt: skip
FEW = ["--methods", "taylor-fo,taylor-fisher,random,tp:magnitude,nni:l1"]
PROMISED = ["criterion", "spearman", "spearman_per_group", "kendall", "pearson", "seconds"]


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A folder that a comparison of a few criteria wrote; to be left as it is."""
    from nni_plugin.cli import main

    folder = tmp_path_factory.mktemp("correlate") / "out"
    assert main([*SMALL, *FEW, "--output", str(folder)]) == 0
    return folder


def test_files(found):
    assert sorted(path.name for path in found.iterdir()) == FILES
    assert (found / "correlations.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_table(found):
    rows = _rows(found / "correlations.csv")
    assert list(rows[0])[: len(PROMISED)] == PROMISED
    assert tuple(rows[0]) == COLUMNS
    assert [row["criterion"] for row in rows] == ["taylor-fo", "taylor-fisher", "random", "tp:magnitude", "nni:l1"]
    for row in rows:
        for column in ("spearman", "spearman_per_group", "kendall", "pearson", "spearman_held_out"):
            assert -1 <= float(row[column]) <= 1
        assert float(row["seconds"]) >= 0
        assert row["channels"] == "448"
    by_name = {row["criterion"]: row for row in rows}
    # On real data after an epoch; random ranks are within four standard errors of none.
    assert float(by_name["taylor-fo"]["spearman"]) > 0.5
    assert abs(float(by_name["random"]["spearman"])) < 4 / np.sqrt(448)
    signed = {name for name, row in by_name.items() if row["spearman_signed"]}
    assert signed == {"taylor-fisher"}


def test_oracle_file_holds_every_channel(found):
    rows = _rows(found / "oracle.csv")
    assert list(rows[0]) == ["group", "channel", "change", "change_held_out"]
    assert len(rows) == 448
    assert len({(row["group"], row["channel"]) for row in rows}) == 448
    record = json.loads((found / "correlations.json").read_text())
    agreement = record["oracle"]["agreement_with_held_out"]
    squares = [[float(row[column]) ** 2 for row in rows] for column in ("change", "change_held_out")]
    assert agreement["spearman"] == pytest.approx(stats.spearmanr(*squares).statistic, abs=1e-6)


def test_record(found):
    record = json.loads((found / "correlations.json").read_text())
    assert record["settings"]["images"] == 64
    assert record["minibatches"] == [32, 32]
    assert record["seed"] == 0
    assert record["network"]["channels"] == 448
    assert 0 < record["network"]["top1"] <= 100
    assert {"torch", "CPU", "GPU"} <= set(record["machine"])
    assert {"nni", "scipy", "torch-pruning"} <= set(record["versions"])
    assert record["skipped"] == {}
    for row in _rows(found / "correlations.csv"):
        for column, value in record["criteria"][row["criterion"]].items():
            assert row[column] == ("" if value is None else str(value)), column


def test_the_same_again(command, found, tmp_path):
    said = command(*SMALL, *FEW, "--output", tmp_path / "out")
    assert said.code == 0, said.err
    assert said.err == ""
    _same(tmp_path / "out", found)


def _same(output, other):
    assert (output / "oracle.csv").read_bytes() == (other / "oracle.csv").read_bytes()
    for ours, theirs in zip(_rows(output / "correlations.csv"), _rows(other / "correlations.csv"), strict=True):
        assert {**ours, "seconds": ""} == {**theirs, "seconds": ""}
    assert sorted(path.name for path in output.iterdir()) == FILES


# Two fsyncs a checkpoint: one epoch of training, two minibatches of the Oracle, two of the held-out, five criteria.
@pytest.mark.parametrize("syncs", [2, 5, 13])
def test_killed_then_resumed(found, tmp_path, monkeypatch, syncs):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = [*SMALL, *FEW, "--output", str(output)]
    assert killed.run(arguments, str(log), ("checkpoint", syncs)) == -signal.SIGKILL, log.read_text()
    assert [path.name for path in output.iterdir()] == [".state"]
    assert killed.run([*arguments, "--resume"], str(log)) == 0, log.read_text()
    _same(output, found)


def test_interrupted_then_refused_then_resumed(command, found, tmp_path, monkeypatch):
    output = tmp_path / "out"
    update, seen = Oracle.update, []

    def counted(oracle, batch=None, **kwargs):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(1)
        update(oracle, batch, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Oracle, "update", counted)
        said = command(*SMALL, *FEW, "--output", output)
    assert said.code == 130
    assert "--resume goes on" in said.err
    assert sorted(os.listdir(output / ".state"))[:2] == ["oracle-held-out.pt", "oracle-train.pt"]

    said = command(*SMALL, *FEW, "--images", "96", "--output", output, "--resume")
    assert said.code == 2
    assert all(word in said.errors[0] for word in ("images", "64", "96"))

    updates = []
    monkeypatch.setattr(Oracle, "update", lambda *args, **kwargs: updates.append(1) or update(*args, **kwargs))
    assert command(*SMALL, *FEW, "--output", output, "--resume").code == 0
    assert len(updates) == 1  # three minibatches of the four were measured before
    _same(output, found)

    said = command(*SMALL, *FEW, "--output", output, "--resume")
    assert said.code == 0
    assert "nothing to resume" in said.out


def test_all_methods_by_default_and_no_held_out_images(command, tmp_path, monkeypatch):
    scored = []

    def quick(model, groups, criterion, batches, loss_fn):
        scored.append(criterion)
        return {group.name: torch.rand(group.width) for group in groups}

    monkeypatch.setattr(nni_plugin.correlation_study.job, "score_groups", quick)
    monkeypatch.setattr(nni_plugin.correlation_study.job, "_predictions", lambda criterion, groups: {})
    output = tmp_path / "out"
    said = command(*SMALL, "--images", "32", "--held-out-images", "0", "--output", output)
    assert said.code == 0, said.err
    rows = _rows(output / "correlations.csv")
    assert [row["criterion"] for row in rows] == list(known_methods())
    assert {row["spearman_held_out"] for row in rows} == {""}
    assert {row["change_held_out"] for row in _rows(output / "oracle.csv")} == {""}
    assert json.loads((output / "correlations.json").read_text())["oracle"]["agreement_with_held_out"] is None


def test_some_channels_are_judged_and_the_test_images_can_be_held_out(command, tmp_path):
    few = ["--methods", "taylor-fo", "--images", "32", "--held-out-images", "40"]
    output, other = tmp_path / "out", tmp_path / "other"
    said = command(*SMALL, *few, "--channels-per-group", "5", "--held-out-from", "test", "--output", output)
    assert said.code == 0, said.err
    rows = _rows(output / "oracle.csv")
    record = json.loads((output / "correlations.json").read_text())
    assert len(rows) == record["network"]["judged"] == 5 * record["network"]["groups"] == 60
    assert record["network"]["channels"] == 448
    assert _rows(output / "correlations.csv")[0]["channels"] == "60"
    said = command(*SMALL, *few, "--held-out-from", "test", "--output", other)
    assert said.code == 0, said.err
    all_rows = {(row["group"], row["channel"]): row for row in _rows(other / "oracle.csv")}
    for row in rows:  # the network is the same: no training image is kept from it
        there = all_rows[row["group"], row["channel"]]
        for column in ("change", "change_held_out"):
            assert float(row[column]) == pytest.approx(float(there[column]), rel=1e-6, abs=1e-9)
    said = command(*SMALL, *few[:4], "--held-out-images", "360", "--held-out-from", "test", "--output", tmp_path / "x")
    assert said.code == 2
    assert "359 test images" in said.err


def test_without_nni_its_criteria_are_left_out_by_default(tmp_path, monkeypatch):
    job = CorrelationJob("resnet20", tmp_path)
    assert any(name.startswith("nni:") for name in job.chosen())
    monkeypatch.setattr(nni_plugin.correlation_study.job, "find_spec", lambda name: None)
    assert job.chosen() == tuple(name for name in known_methods() if not name.startswith("nni:"))


def test_the_oracle_itself_is_not_measured_twice(command, found, tmp_path, monkeypatch):
    monkeypatch.setattr(nni_plugin.correlation_study.job, "create_criterion", lambda name: Oracle())
    output = tmp_path / "out"
    assert command(*SMALL, "--methods", "oracle", "--output", output).code == 0
    (row,) = _rows(output / "correlations.csv")
    record = json.loads((output / "correlations.json").read_text())
    assert row["spearman"] == "1.0"
    assert float(row["spearman_held_out"]) == record["oracle"]["agreement_with_held_out"]["spearman"]
    assert float(row["seconds"]) == pytest.approx(record["oracle"]["seconds"], abs=1e-3)


def test_a_criterion_that_cannot_score_is_left_out_and_said(command, tmp_path, monkeypatch):
    score = nni_plugin.correlation_study.job.score_groups

    def failing(model, groups, criterion, batches, loss_fn):
        if type(criterion).__name__ == "Magnitude":
            raise CriterionError("no weights here")
        if type(criterion).__module__.startswith("torch_pruning"):
            raise IndexError("its own fault")
        return score(model, groups, criterion, batches, loss_fn)

    monkeypatch.setattr(nni_plugin.correlation_study.job, "score_groups", failing)
    output = tmp_path / "out"
    short = [*SMALL, "--images", "32", "--held-out-images", "0"]
    said = command(*short, "--methods", "random,magnitude,tp:fpgm", "--output", output)
    assert said.code == 0
    assert "magnitude is left out: no weights here" in said.err
    assert "tp:fpgm is left out: IndexError: its own fault" in said.err
    rows = {row["criterion"]: row for row in _rows(output / "correlations.csv")}
    assert rows["random"]["spearman"]
    assert rows["magnitude"]["spearman"] == rows["magnitude"]["seconds"] == ""
    assert rows["tp:fpgm"]["channels"] == "0"

    said = command(*short, "--methods", "magnitude", "--output", tmp_path / "none")
    assert said.code == 2
    assert "no weights here" in said.errors[0]
    assert [path.name for path in (tmp_path / "none").iterdir()] == [".state"]  # what was trained and measured


CASES = {
    "unknown criterion": (["--methods", "taylor-fo,tailor-fg"], ["'tailor-fg'", "taylor-fg"]),
    "no criterion": (["--methods", ","], ["No criterion"]),
    "no images": (["--images", "0"], ["--images", "at least 1"]),
    "more images than there are": (["--images", "5000"], ["--images 5000", "1376"]),
    "all held out": (["--held-out-images", "1438"], ["--held-out-images 1438", "1438 training images"]),
    "unknown model": (["--model", "resnet2O"], ["'resnet2O'", "resnet20"]),
    "unknown layer": (["--ignore", "conv9"], ["'conv9'"]),
    "nothing to compare": (["--ignore", "conv1,layer1,layer2,layer3"], ["may be pruned"]),
    "learning rate": (["--pretrain-lr", "-1"], ["--pretrain-lr", "-1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(command, tmp_path, case):
    flags, words = CASES[case]
    said = command(*SMALL, *FEW, *flags, "--output", tmp_path / "out")
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert all(word in said.errors[0] for word in words), said.errors[0]
    assert not (tmp_path / "out").exists()


def test_random_weights_are_said(command, tmp_path):
    bare = [*SMALL, "--pretrain-epochs", "0", "--images", "32", "--held-out-images", "0", "--methods", "random"]
    assert "random weights" in command(*bare, "--output", tmp_path / "out").err


@pytest.mark.parametrize(("number", "sizes"), [(8, [4, 4]), (10, [4, 3, 3]), (3, [3]), (13, [4, 3, 3, 3])])
def test_minibatches_are_of_one_size_and_hold_the_first_images(number, sizes):
    images, labels = torch.arange(20.0).reshape(20, 1), torch.arange(20)
    loader = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 20, 4)]
    batches = FirstImages(loader, torch.device("cpu"), number, 4)
    for _ in range(2):  # again and again
        parts = list(batches)
        assert [len(part) for part, _ in parts] == sizes
        assert torch.equal(torch.cat([part for part, _ in parts]), images[:number])
        assert torch.equal(torch.cat([part for _, part in parts]), labels[:number])
    assert len(batches) == len(sizes)


def test_in_python(tmp_path):
    job = CorrelationJob(
        "resnet20", tmp_path / "out", library="nni_plugin", data_kwargs={"batch_size": 16, "img_size": 8},
        methods=("random", "random"), images=16, held_out_images=0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="random weights"):
        record = run_correlations(job, say=lambda text: None)
    assert list(record["criteria"]) == ["random"]
