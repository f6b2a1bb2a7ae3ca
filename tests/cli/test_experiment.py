"""`experiment` from end to end in a private network, interrupted, and given bad input."""

import csv
import json
import signal
import sys
from pathlib import Path

import private_network
import pytest
import torch
import yaml

from nni_plugin import PruningPlan
from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.training import evaluate
from nni_plugin.checkpoint import from_pretrained

PROGRAM = Path(sys.executable).with_name("nni-plugin")
SMALL = [
    "experiment", "--library", "nni_plugin", "--model", "resnet20", "--dataset", "digits", "--img-size", "8",
    "--batch-size", "256", "--score-batches", "2", "--latency-batch-sizes", "1", "--trial-concurrency", "1",
]  # fmt: skip
SPACE = {
    "method": {"_type": "choice", "_value": ["taylor-fo", "magnitude"]},
    "schedule": {"_type": "choice", "_value": ["one-shot", "iterative"]},
    "epochs": {"_type": "choice", "_value": [1]},
    "stages.layer2": {"_type": "uniform", "_value": [0.3, 0.9]},
    "stages.layer3": {"_type": "uniform", "_value": [0.3, 0.9]},
}
TRIAL = """
import time, nni
parameters = nni.get_next_parameter()
if nni.get_sequence_id() == 1:
    time.sleep(600)
nni.report_final_result(parameters["anything"])
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder, the home and the words of an experiment of four trials."""
    if reason := private_network.reason_against():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "space.json").write_text(json.dumps(SPACE))
    flags = ["--macs", "0.6", "--pretrain-epochs", "2", "--max-trials", "4", "--search-space", folder / "space.json"]
    words = [PROGRAM, *SMALL, *flags, "--output", folder / "out"]
    process = private_network.popen(words, folder / "home")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return folder / "out", folder / "home", out


@pytest.mark.slow
def test_four_trials_on_digits(searched):
    output, home, said = searched
    files = (
        "best.yaml config.json dense.safetensors metrics.json model.safetensors plan.json search_space.json trial.py"
    )
    assert sorted(path.name for path in output.iterdir()) == sorted([*files.split(), "trials.csv"])
    with (output / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial"], row["status"]) for row in rows] == [(str(number), "SUCCEEDED") for number in range(4)]
    for row in rows:
        assert 0.5 < float(row["macs_ratio"]) <= 0.6
        assert float(row["value"]) == float(row["top1"])
        assert set(SPACE) <= set(row)
    assert len({row["stages.layer2"] for row in rows}) == 4
    best = max(rows, key=lambda row: float(row["value"]))
    assert "is held to this machine" in said
    assert "listens on every interface" in said
    assert f"best: trial {best['trial']} with {float(best['value']):.2f}" in said
    assert "maximised: top-1" in said
    assert private_network.processes_of(home) == []

    # The folder holds the network of that trial.
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["pruned"]["top1"] == float(best["top1"])
    assert metrics["method"] == best["method"]
    splits = create_loaders("digits", batch_size=256, img_size=8)
    model = from_pretrained(output)
    assert evaluate(model, splits.test, "cpu")["top1"] == float(best["top1"])
    plan = PruningPlan.from_json((output / "plan.json").read_text())
    assert plan.provenance["stages"] == {
        name.removeprefix("stages."): float(best[name]) for name in SPACE if name.startswith("stages.")
    }


@pytest.mark.slow
def test_the_best_trial_can_be_repeated(searched, command, tmp_path):
    output, _, _ = searched
    assert yaml.safe_load((output / "best.yaml").read_text())["checkpoint"] == str(output / "dense.safetensors")
    said = command("prune", "--config", output / "best.yaml", "--output", tmp_path / "again")
    assert said.code == 0, said.err
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()


@pytest.mark.slow
def test_interrupted_with_a_trial_script_of_ones_own(tmp_path):
    if reason := private_network.reason_against():
        pytest.skip(reason)
    (tmp_path / "mine.py").write_text(TRIAL)
    (tmp_path / "space.json").write_text('{"anything": {"_type": "uniform", "_value": [1, 2]}}')
    own = ["--trial-command", f"{sys.executable} mine.py {{settings}}", "--trial-code-directory", tmp_path]
    flags = ["--macs", "0.6", "--max-trials", "9", "--search-space", tmp_path / "space.json", *own]
    words = ["-u", PROGRAM, *SMALL, *flags, "--output", tmp_path / "out"]
    process = private_network.popen(words, tmp_path / "home")
    while (line := process.stdout.readline()) and not line.startswith("trial 0: "):
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "nni-plugin experiment: interrupted."
    assert "Traceback" not in err
    with (tmp_path / "out" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["status"] == "SUCCEEDED"
    assert float(rows[0]["value"]) == float(rows[0]["anything"])
    assert all(row["status"] == "USER_CANCELED" for row in rows[1:])
    assert not (tmp_path / "out" / ".state").exists()
    assert private_network.processes_of(tmp_path / "home") == []


HALF = ["--macs", "0.5"]
LR = '{"lr": {"_type": "uniform", "_value": [0.01, 0.1]}}'
# Name: the search space, further arguments, and what the one line must hold.
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "not JSON": ("{", HALF, ["--search-space", "space.json", "JSON"]),
    "empty": ("{}", HALF, ["--search-space", "a parameter or more"]),
    "unknown parameter": ('{"metod": {"_type": "choice", "_value": [1]}}', HALF, ["'metod'", "--trial-command"]),
    "parameter that is the same in all": ('{"seed": {"_type": "randint", "_value": [1, 3]}}', HALF, ["'seed'"]),
    "unknown type": ('{"lr": {"_type": "unifrom", "_value": [0, 1]}}', HALF, ["'unifrom'", "uniform"]),
    "unknown method": ('{"method": {"_type": "choice", "_value": ["obs", "tailor"]}}', HALF, ["'method'", "'tailor'"]),
    "value out of range": ('{"lr": {"_type": "uniform", "_value": [0.1, 0.2]}, "macs": {"_type": "choice", "_value": '
                           "[0.5, 1.5]}}", [], ["'macs' as 1.5", "at most 1"]),
    "whole numbers": ('{"epochs": {"_type": "quniform", "_value": [1, 4, 1]}}', HALF, ["--epochs", "integer"]),
    "unknown stage": ('{"stages.layer9": {"_type": "uniform", "_value": [0.3, 0.9]}}', HALF, ["'layer9'", "layer1"]),
    "no budget": (LR, [], ["one budget", "--macs"]),
    "two budgets": ('{"params": {"_type": "uniform", "_value": [0.3, 0.9]}}', HALF, ["--macs and --params"]),
    "unknown tuner": (LR, [*HALF, "--tuner", "tpe"], ["--tuner 'tpe'", "TPE, Random"]),
    "tuner that is broken": (LR, [*HALF, "--tuner", "GP"], ["--tuner 'GP'", "Metis", "SciPy"]),
    "no trials": (LR, [*HALF, "--max-trials", "0"], ["--max-trials", "at least 1"]),
    "none at a time": (LR, [*HALF, "--trial-concurrency", "0"], ["--trial-concurrency", "at least 1"]),
    "port too high": (LR, [*HALF, "--port", "70000"], ["--port", "65534"]),
    "unknown model": (LR, [*HALF, "--model", "resnet2O"], ["'resnet2O'", "resnet20"]),
    "unknown dataset": (LR, [*HALF, "--dataset", "digitz"], ["'digitz'"]),
    "missing training service": (LR, [*HALF, "--training-service", "none.yaml"], ["--training-service", "none.yaml"]),
    "price that is none": (LR, [*HALF, "--macs-price", "much"], ["--macs-price", "number"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_starts_nothing(command, tmp_path, monkeypatch, name):
    monkeypatch.setattr("nni_plugin.experiment_job.started", lambda request: pytest.fail("NNI was started"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    space, arguments, words = CASES[name]
    (tmp_path / "space.json").write_text(space)
    flags = ["--search-space", tmp_path / "space.json", "--max-trials", "2", "--output", tmp_path / "out"]
    said = command(*SMALL, *flags, *arguments)
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert said.errors[0].startswith("nni-plugin experiment: error: ")
    assert all(word in said.errors[0] for word in words), said.errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space.json"]


def test_missing_arguments(command, tmp_path):
    for left_out, arguments in {
        "--max-trials": ["--macs", "0.5", "--output", tmp_path / "out"],
        "--output": ["--macs", "0.5", "--max-trials", "1"],
    }.items():
        said = command(*SMALL, *arguments)
        assert said.code == 2
        assert left_out in said.errors[-1]
    said = command(
        *SMALL, *HALF, "--max-trials", "1", "--search-space", tmp_path / "no.json", "--output", tmp_path / "o"
    )
    assert said.code == 2
    assert "no.json" in said.errors[0]


def test_without_nni(command, tmp_path, monkeypatch):
    monkeypatch.setattr("nni_plugin.cli.experiment.find_spec", lambda name: None if name == "nni" else object())
    said = command(*SMALL, *HALF, "--max-trials", "1", "--output", tmp_path / "out")
    assert said.code == 2
    assert "nni not installed" in said.errors[0]
    assert "nni-plugin[nni,train]" in said.errors[0]


class _NoServer:
    """In the place of NNI's server: it has run one trial."""

    port, log = 1, "/log"

    def __init__(self, *trials):
        self.seen = list(trials)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def status(self):
        return "DONE"

    def trials(self):
        return self.seen

    def tuner_error(self):
        return ""

    def is_private(self):
        return False


def _run_with(command, tmp_path, monkeypatch, server, *arguments):
    asked = []
    monkeypatch.setattr("nni_plugin.experiment_job.started", lambda request: asked.append(request) or server)
    (tmp_path / "space.json").write_text('{"macs": {"_type": "choice", "_value": [0.5]}}')
    flags = ["--max-trials", "1", "--search-space", tmp_path / "space.json", "--output", tmp_path / "out"]
    return command(*SMALL, *flags, *arguments), asked[0]


def test_what_the_user_is_told(command, tmp_path, monkeypatch):
    from nni_plugin.adapters.experiment import Trial

    trial = Trial(0, "abc", "SUCCEEDED", {"macs": 0.5}, 90.0, {"top1": 95.0}, 3.0, "/logs/abc")
    said, request = _run_with(command, tmp_path, monkeypatch, _NoServer(trial))
    assert said.code == 0
    assert "LISTENS ON EVERY INTERFACE" in said.out  # where it does
    assert "size costs nothing" in said.err  # the budget varies, and large networks would win
    assert "not on this machine" in said.out  # the trial left no network here
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "best.yaml", "search_space.json", "trial.py", "trials.csv",
    ]  # fmt: skip
    assert yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["macs"] == 0.5
    assert request.port is None
    assert request.command.endswith(" 0")
    said, request = _run_with(command, tmp_path, monkeypatch, _NoServer(trial), "--macs-price", "10", "--port", "4444")
    assert "size costs nothing" not in said.err
    assert "top-1 (percent) of the pruned network after fine-tuning - 10 x MACs kept" in said.out
    assert request.port == 4444
    assert request.command.endswith(" 10")


def test_no_trial_succeeded(command, tmp_path, monkeypatch):
    from nni_plugin.adapters.experiment import Trial

    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "trial.stderr").write_text("Traceback\nValueError: the reason\n\n")
    trial = Trial(0, "abc", "FAILED", {"macs": 0.5}, None, {}, 3.0, str(tmp_path / "logs"))
    said, _ = _run_with(command, tmp_path, monkeypatch, _NoServer(trial))
    assert said.code == 2
    assert len(said.errors) == 1
    assert "ValueError: the reason" in said.errors[0]
    assert str(tmp_path / "logs") in said.errors[0]
    assert not (tmp_path / "out").exists()


def test_interrupted_before_any_trial(command, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nni_plugin.experiment_job.evaluate", interrupted)
    said = command(*SMALL, *HALF, "--max-trials", "1", "--output", tmp_path / "out")
    assert said.code == 130
    assert not (tmp_path / "out" / ".state").exists()
    assert torch.is_grad_enabled()


def test_a_server_that_dies_leaves_what_was_finished(command, tmp_path, monkeypatch):
    from nni_plugin.adapters.experiment import Trial
    from nni_plugin.errors import ExperimentError

    class Dying(_NoServer):
        def status(self):
            if not self.seen:
                raise ExperimentError("NNI's server does not answer any more; its logs: /log")
            return "RUNNING"

        def trials(self):
            return [self.seen.pop()]

    trial = Trial(0, "abc", "SUCCEEDED", {"macs": 0.5}, 90.0, {"top1": 95.0}, 3.0, "/logs/abc")
    said, _ = _run_with(command, tmp_path, monkeypatch, Dying(trial))
    assert said.code == 2
    assert said.errors == ["nni-plugin experiment: error: NNI's server does not answer any more; its logs: /log"]
    with (tmp_path / "out" / "trials.csv").open(newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["90.0"]
    assert (tmp_path / "out" / "best.yaml").exists()
