"""`layers` from end to end on real digits: what it writes, what it refuses, and that it goes on where it was."""

import csv
import json
import signal
from functools import partial

import killed
import pytest

import nni_plugin.block_study.job
from nni_plugin.block_study.job import CRITERIA, LayersJob, run_layers
from nni_plugin.block_study.without import Absences
from nni_plugin.cli import main
from nni_plugin.errors import CriterionError
from nni_plugin.layers.latency import block_latencies

FILES = ["importance.png", "latency.png", "layers.csv", "layers.json"]
BLOCKS = ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]
SMALL = [
    "layers", "--library", "nni_plugin", "--model", "resnet20", "--img-size", "8", "--batch-size", "64",
    "--score-batches", "2", "--removal-images", "60", "--latency-batch-sizes", "1", "--pretrain-epochs", "1",
]  # fmt: skip
FEW = ["--criteria", "imprinting,layer-taylor-fo,layer-tp:group-norm"]


@pytest.fixture(autouse=True)
def _quick_latency(monkeypatch):
    monkeypatch.setattr(nni_plugin.block_study.job, "block_latencies", partial(block_latencies, min_run_time=0.005))


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _made(tmp_path_factory, *flags):
    folder = tmp_path_factory.mktemp("layers") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nni_plugin.block_study.job, "block_latencies", partial(block_latencies, min_run_time=0.005))
        assert main([*SMALL, *flags, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A folder that a look at the default criteria wrote; to be left as it is."""
    return _made(tmp_path_factory, "--latency-batch-sizes", "1,3")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Likewise, of three criteria."""
    return _made(tmp_path_factory, *FEW)


def test_files(found):
    assert sorted(path.name for path in found.iterdir()) == FILES
    for name in FILES[:2]:
        assert (found / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (found / name).stat().st_size > 5000


def test_table(found):
    rows = _rows(found / "layers.csv")
    assert [row["block"] for row in rows] == BLOCKS
    assert list(rows[0]) == [
        "block", "kind", "shape", "macs_saved", "params_saved",
        *(f"latency_{what}_{size}" for size in (1, 3) for what in ("ms", "iqr_ms", "share")),
        "loss_change", "top1_change",
        *(column for name in CRITERIA for column in (name, f"{name}_rank")),
    ]  # fmt: skip
    # Two convolutions of 16 x 16 x 3 x 3 on 8 x 8 places, and two normalisations.
    assert rows[0]["macs_saved"] == str(2 * 16 * 16 * 9 * 64)
    assert rows[0]["params_saved"] == str(2 * (16 * 16 * 9 + 32))
    assert (rows[0]["kind"], rows[0]["shape"], rows[-1]["shape"]) == ("block", "16x8x8", "64x2x2")
    for row in rows:
        assert float(row["latency_ms_1"]) > 0
        assert 0 < float(row["latency_share_3"]) < 1
    for name in CRITERIA:
        order = sorted(rows, key=lambda row: int(row[f"{name}_rank"]))
        assert [int(row[f"{name}_rank"]) for row in order] == list(range(1, 8))
        scores = [float(row[name]) for row in order]
        assert scores == sorted(scores)
    assert len({row["layer-taylor-fo"] for row in rows}) == 7


def test_record(found):
    record = json.loads((found / "layers.json").read_text())
    for row, written in zip(record["blocks"], _rows(found / "layers.csv"), strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == written
    assert 0 < record["network"]["top1"] <= 100
    assert record["network"]["held_out"]["images"] == 60
    assert set(record["network"]["latency"]) == {"1", "3"}
    assert set(record["staying"]) == {"layer2.0", "layer3.0"}
    assert list(record["criteria"]) == list(CRITERIA)
    assert record["skipped"] == {}
    assert record["minibatches"] == [64, 64]
    gains = [row["imprinting"] for row in record["blocks"]]
    accuracies = record["criteria"]["imprinting"]["accuracy"]
    assert gains[0] == pytest.approx(accuracies["layer1.0"], rel=1e-5)
    assert gains[1] == pytest.approx(accuracies["layer1.1"] - accuracies["layer1.0"], abs=1e-5)
    assert set(record["spearman"]["layer-taylor-fo"]) == {*CRITERIA, "loss_change"} - {"layer-taylor-fo"}
    assert {"torch", "CPU", "GPU"} <= set(record["machine"])


def _same(output, other):
    for ours, theirs in zip(_rows(output / "layers.csv"), _rows(other / "layers.csv"), strict=True):
        both = [{k: v for k, v in row.items() if not k.startswith("latency")} for row in (ours, theirs)]
        assert both[0] == both[1]
    assert sorted(path.name for path in output.iterdir()) == FILES


# Two fsyncs a checkpoint: one epoch of training, three criteria, seven blocks, one batch size.
@pytest.mark.parametrize("syncs", [5, 14])
def test_killed_then_resumed(few, tmp_path, monkeypatch, syncs):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = [*SMALL, *FEW, "--output", str(output)]
    assert killed.run(arguments, str(log), ("checkpoint", syncs)) == -signal.SIGKILL, log.read_text()
    assert [path.name for path in output.iterdir()] == [".state"]
    assert killed.run([*arguments, "--resume"], str(log)) == 0, log.read_text()
    _same(output, few)


def test_interrupted_then_refused_then_resumed(command, few, tmp_path, monkeypatch):
    output, seen = tmp_path / "out", []
    of = Absences.of

    def stopping(absences, block):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(block.name)
        return of(absences, block)

    with monkeypatch.context() as patch:
        patch.setattr(Absences, "of", stopping)
        said = command(*SMALL, *FEW, "--output", output)
    assert said.code == 130
    assert "--resume goes on" in said.err

    said = command(*SMALL, *FEW, "--candidates", "all", "--output", output, "--resume")
    assert said.code == 2
    assert all(word in said.errors[0] for word in ("candidates", "outermost", "all"))

    seen.clear()
    monkeypatch.setattr(Absences, "of", lambda absences, block: seen.append(block.name) or of(absences, block))
    monkeypatch.setattr(nni_plugin.block_study.job, "score_blocks", _score_nothing)
    said = command(*SMALL, *FEW, "--output", output, "--resume")
    assert said.code == 0, said.err
    assert seen == BLOCKS[3:]
    _same(output, few)
    assert "nothing to resume" in command(*SMALL, *FEW, "--output", output, "--resume").out


def _score_nothing(importances, *args, **kwargs):
    assert not importances
    return iter(())


def test_without_removals_and_with_branches(command, tmp_path):
    small = [
        "layers", "--model", "vit_tiny_patch16_224", "--img-size", "16", "--batch-size", "64", "--score-batches", "2",
        "--model-kwargs", '{"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24}', "--removal-images", "0",
        "--latency-batch-sizes", "1", "--candidates", "all", "--criteria", "layer-bn-scale,block-gate,imprinting",
    ]  # fmt: skip
    said = command(*small, "--output", tmp_path / "out")
    assert said.code == 0, said.err
    assert "layer-bn-scale is left out" in said.err
    assert "random weights" in said.err
    rows = _rows(tmp_path / "out" / "layers.csv")
    assert [row["kind"] for row in rows] == ["block", "branch", "branch"] * 2
    assert {row["loss_change"] for row in rows} == {""}
    assert not any("bn-scale" in column for column in rows[0])
    for i in (0, 3):
        whole, *branches = (int(row["macs_saved"]) for row in rows[i : i + 3])
        assert whole == sum(branches)
    record = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert "normalisation" in record["skipped"]["layer-bn-scale"]
    assert record["network"]["held_out"] is None

    said = command(*small[:-1], "layer-bn-scale", "--output", tmp_path / "none")
    assert said.code == 2
    assert "No criterion could score" in said.errors[0]
    assert [path.name for path in (tmp_path / "none").iterdir()] == [".state"]  # what was trained and measured


CASES = {
    "unknown criterion": (["--criteria", "imprinting,layer-tailor-fo"], ["'layer-tailor-fo'", "layer-taylor-fo"]),
    "one for channels": (["--criteria", "taylor-fo"], ["'taylor-fo'", "layer-taylor-fo"]),
    "no criterion": (["--criteria", ","], ["No criterion"]),
    "a class without images": (["--num-classes", "12"], ["2 of 12 classes", "10, 11"]),
    "minibatches without a class": (["--batch-size", "4", "--score-batches", "1"], ["have no sample"]),
    "nothing held out": (["--held-out", "0"], ["--held-out 0"]),
    "all held out": (["--held-out", "1"], ["--held-out 1"]),
    "nothing removable": (["--library", "torchvision", "--model", "squeezenet1_1", "--img-size", "32"], ["no block"]),
    "unknown model": (["--model", "resnet2O"], ["'resnet2O'", "resnet20"]),
    "batch size": (["--latency-batch-sizes", "0"], ["--latency-batch-sizes", "at least 1"]),
    "candidates": (["--candidates", "some"], ["--candidates", "some"]),
    "learning rate": (["--pretrain-lr", "-1"], ["--pretrain-lr", "-1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(command, tmp_path, case):
    flags, words = CASES[case]
    said = command(*SMALL, "--pretrain-epochs", "0", "--criteria", "imprinting", *flags, "--output", tmp_path / "out")
    if case == "learning rate":
        said = command(*SMALL, *flags, "--output", tmp_path / "out")
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert all(word in said.errors[0] for word in words), said.errors[0]
    assert not (tmp_path / "out").exists()


def test_in_python(tmp_path):
    job = LayersJob(
        "resnet20", tmp_path / "out", library="nni_plugin", data_kwargs={"batch_size": 16, "img_size": 8},
        criteria=("layer-random", "layer-magnitude"), removal_images=0, latency_batch_sizes=(2,), seed=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="random weights"):
        record = run_layers(job, say=lambda text: None)
    assert list(record["criteria"]) == ["layer-random", "layer-magnitude"]
    assert record["network"]["latency"]["2"]["batch_size"] == 2
    with pytest.raises(CriterionError, match="No criterion"):
        run_layers(LayersJob("resnet20", tmp_path / "none", criteria=()))
