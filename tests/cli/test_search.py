"""`prune --method nppm` and its kin: flags, what a user gets wrong, and a kill in the middle of the search."""

import json
import os
import signal

import killed
import pytest
from search_of_jobs import FURTHER

SEARCH = ["--search-steps", "40", "--search-kwargs", json.dumps(FURTHER), "--batch-size", "64", "--score-batches", "5"]
SMALLER = ["--model-kwargs", '{"width_mult": 0.5}']
HALF = ["--macs", "0.5"]


@pytest.mark.parametrize("method", ["nppm", "differentiable-gates", "nppm-linear"])
def test_every_name_prunes_to_the_budget(command, small, tmp_path, method):
    said = command(*small, *SMALLER, *SEARCH, "--params", "0.6", "--method", method, "--output", tmp_path / "out")
    assert said.code == 0, said.err
    assert said.errors == []
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["method"] == method
    assert 0.59 < metrics["pruned"]["params"] / metrics["baseline"]["params"] <= 0.6
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["provenance"]["method"] == method
    assert plan["provenance"]["steps_made"] == 40


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        (["--channels", "0.5"], ["give --macs or --params"]),
        ([*HALF, "--schedule", "iterative", "--epochs", "1"], ["--schedule one-shot"]),
        (["--macs", "0.001"], ["smallest width", "--select 'all'"]),
        ([*HALF, "--search-steps", "0"], ["--search-steps", "at least 1"]),
        ([*HALF, "--search-kwargs", '{"memory": 3}'], ["memory of 3 entries is too small to train on"]),
        ([*HALF, "--search-kwargs", '{"tau": 3.0}'], ["--search-kwargs", "'tau'", "temperature"]),
        ([*HALF, "--search-kwargs", '{"noise": -1.0}'], ["noise", "above 0"]),
        ([*HALF, "--search-kwargs", "3"], ["--search-kwargs"]),
        ([*HALF, "--method", "nppmm"], ["'nppmm'", "nppm"]),
        ([*HALF, "--method", "taylor-fo", "--search-steps", "9"], ["--search-steps is for searches over gates"]),
    ],
)
def test_one_line_and_nothing_written(command, small, tmp_path, further, expected):
    said = command(*small, "--method", "nppm", *further, "--output", tmp_path / "out")
    assert said.code == 2
    (line,) = said.errors
    for text in expected:
        assert text in line
    assert not (tmp_path / "out").exists()


TRAINED = ["--method", "nppm", "--pretrain-epochs", "1", "--epochs", "1", "--checkpoint-every", "10"]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The arguments of a run, and the folder that it wrote without any interruption."""
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments, output = [*small, *SMALLER, *SEARCH, *HALF, *TRAINED], tmp_path_factory.mktemp("whole") / "out"
    log = output.with_name("log")
    assert killed.run([*arguments, "--output", str(output)], str(log)) == 0, log.read_text()
    return arguments, output


@pytest.mark.parametrize(("step", "found"), [(60, False), (95, True)])
def test_killed_then_resumed(whole, tmp_path, step, found):
    """After 22 steps of training come 40 of the gates, with 29 of the performance network among them."""
    (arguments, untouched), output, log = whole, tmp_path / "out", tmp_path / "log"
    arguments = [*arguments, "--output", str(output)]
    assert killed.run(arguments, str(log), ("step", step)) == -signal.SIGKILL, log.read_text()
    assert (output / ".state" / "pretrain.pt").is_file()
    assert (output / ".state" / "planned.json").is_file() == found
    assert killed.run([*arguments, "--resume"], str(log)) == 0, log.read_text()
    for name in ("plan.json", "model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (untouched / name).read_bytes(), name
