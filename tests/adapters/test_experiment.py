"""NNI's server as a context: private, watched, and gone afterwards whatever happened."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import private_network
import pytest
import yaml

from nni_plugin.adapters.experiment import TUNERS, Request, Running, check_request, command_line, runs_here
from nni_plugin.adapters.experiment.config import nni_config
from nni_plugin.adapters.experiment.trials import Trial, trial_of
from nni_plugin.errors import ExperimentError

SPACE = {"x": {"_type": "uniform", "_value": [0, 1]}}
REMOTE = {"platform": "remote", "machineList": [{"host": "10.0.0.2", "user": "me", "password": "x"}]}

TRIAL = """
import sys, time
import nni
x = nni.get_next_parameter()["x"]
for epoch in range(2):
    nni.report_intermediate_result(x * epoch)
if nni.get_sequence_id() == 1:
    sys.exit("it does not work")
if MODE == "hang":
    time.sleep(600)
nni.report_final_result({"default": x, "extra": 2 * x})
"""

DRIVER = """
import dataclasses, json, sys, time
from pathlib import Path
from nni_plugin.adapters.experiment import *

code, mode = Path(sys.argv[1]), sys.argv[2]
request = Request({"x": {"_type": "uniform", "_value": [0, 1]}}, command_line("trial.py"), code, 2)
with started(request) as running:
    print(json.dumps([running.port, running.is_private()]), flush=True)
    if mode == "raise":
        raise ArithmeticError("in the block")
    while len(trials := running.trials()) < 2 or not all(trial.is_over for trial in trials):
        time.sleep(0.2)
    print(json.dumps([dataclasses.asdict(trial) for trial in trials]))
    print(json.dumps([trial.last_words() for trial in trials]))
"""


@pytest.fixture
def drive(tmp_path):
    """Start the driver with trials of a mode; gives the process and its home."""
    if reason := private_network.reason_against():
        pytest.skip(reason)

    def start(mode):
        (tmp_path / "trial.py").write_text(f"MODE = {mode!r}\n{TRIAL}")
        (tmp_path / "driver.py").write_text(DRIVER)
        home = tmp_path / "home"
        return private_network.popen([tmp_path / "driver.py", tmp_path, mode], home), home

    return start


def _finish(process):
    out, err = process.communicate(timeout=120)
    return [json.loads(line) for line in out.splitlines() if line.startswith("[")], err


@pytest.mark.slow
def test_trials_run_and_everything_is_gone_afterwards(drive):
    process, home = drive("well")
    (port, private), trials, words = _finish(process)[0]
    assert process.returncode == 0
    assert private, "NNI's server listens to others than this machine"
    assert 1024 <= port < 65535
    assert [(trial["number"], trial["status"]) for trial in trials] == [(0, "SUCCEEDED"), (1, "FAILED")]
    for trial in trials:
        assert 0 < trial["seconds"] < 60
        assert 0 <= trial["parameters"]["x"] <= 1
        assert Path(trial["log"]).is_relative_to(home / "nni-experiments")
    assert trials[0]["value"] == trials[0]["parameters"]["x"]
    assert trials[0]["metrics"] == {"extra": 2 * trials[0]["value"]}
    assert (trials[1]["value"], trials[1]["metrics"]) == (None, {})
    assert words[1] == "it does not work"
    assert private_network.processes_of(home) == []


@pytest.mark.slow
def test_an_exception_stops_the_server(drive):
    process, home = drive("raise")
    _, err = _finish(process)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "ArithmeticError: in the block"
    assert private_network.processes_of(home) == []


@pytest.mark.slow
@pytest.mark.parametrize("late", [True, False])
def test_an_interrupt_stops_the_server(drive, late):
    """While a trial runs; and while the server is being started, when NNI itself would leave it behind."""
    process, home = drive("hang")
    if late:
        assert process.stdout.readline().startswith("[")
    else:
        while not any("nni_node" in line for line in private_network.command_lines(home)):
            assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = _finish(process)
    assert "KeyboardInterrupt" in err
    assert private_network.processes_of(home) == []


def test_command_line_takes_this_python():
    assert command_line("trial.py", Path("a b")) == f"{sys.executable} trial.py 'a b'"
    assert command_line("trial.py", local=False) == "python3 trial.py"


@pytest.mark.parametrize("tuner", TUNERS)
def test_nni_takes_every_tuner(tuner, tmp_path):
    config = nni_config(Request(SPACE, "true", tmp_path, 3, concurrency=2, tuner=tuner, seed=4)).json()
    assert (config["maxTrialNumber"], config["trialConcurrency"], config["tuner"]["name"]) == (3, 2, tuner)
    assert config["tuner"].get("classArgs", {}).get("optimize_mode", "maximize") == "maximize"
    assert config["trainingService"]["platform"] == "local"


@pytest.mark.parametrize("tuner", ["tpe", "GP", "Metis", ""])
def test_other_tuners_are_refused(tuner):
    with pytest.raises(ExperimentError, match="TPE, Random, GridSearch, Evolution") as caught:
        check_request(tuner, None)
    assert ("SciPy" in str(caught.value)) == (tuner in ("GP", "Metis"))


def test_without_nni(monkeypatch):
    monkeypatch.setattr("nni_plugin.adapters.experiment.config.find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match=r"NNI is not installed.*nni-plugin\[nni"):
        check_request("TPE", None)


@pytest.mark.parametrize(
    "content",
    [
        REMOTE,
        {"trainingService": REMOTE, "nniManagerIp": "10.0.0.1", "searchSpace": {}, "trialCommand": "left out"},
        {"training_service": REMOTE, "nni_manager_ip": "10.0.0.1"},
    ],
)
def test_training_service_alone_or_in_a_whole_configuration(tmp_path, content):
    path = tmp_path / "service.yaml"
    path.write_text(yaml.safe_dump(content))
    check_request("TPE", path)
    if content is REMOTE:  # without the address NNI would look for one in the network
        content = {"trainingService": REMOTE, "nniManagerIp": "10.0.0.1"}
        path.write_text(yaml.safe_dump(content))
    request = Request(SPACE, "true", tmp_path, 1, training_service=path)
    config = nni_config(request).json()
    assert not runs_here(path)
    assert config["trialCommand"] == "true"
    assert config["nniManagerIp"] == "10.0.0.1"
    assert config["trainingService"]["machineList"][0]["host"] == "10.0.0.2"


def test_trials_on_this_machine_need_no_open_server(tmp_path):
    path = tmp_path / "service.yaml"
    path.write_text("{platform: local, useActiveGpu: false, trialGpuNumber: 1}")
    assert runs_here(path)
    assert runs_here(None)
    assert nni_config(Request(SPACE, "true", tmp_path, 1, training_service=path)).json()["trainingService"]["platform"]
    path.write_text(yaml.safe_dump([{"platform": "local"}, REMOTE]))
    assert not runs_here(path)


@pytest.mark.parametrize("text", ["[unclosed", "3", "host: a", "trainingService: []", "- platform"])
def test_bad_training_service(tmp_path, text):
    (tmp_path / "service.yaml").write_text(text)
    with pytest.raises(ExperimentError, match=r"training_service: .*service\.yaml"):
        check_request("TPE", tmp_path / "service.yaml")


@pytest.mark.parametrize("content", [{"platform": "moon"}, {"platform": "local", "gpus": 3}])
def test_training_service_that_nni_does_not_know(tmp_path, content):
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ExperimentError, match="NNI does not take this experiment"):
        nni_config(Request(SPACE, "true", tmp_path, 1, training_service=tmp_path / "service.yaml"))


def _job(**changes):
    record = {
        "sequenceId": 3, "trialJobId": "a", "status": "RUNNING", "hyperParameters": [], "finalMetricData": [],
        "startTime": 1000, "endTime": -1, "logPath": "/logs",
    }  # fmt: skip
    return SimpleNamespace(**{**record, **changes})


@pytest.mark.parametrize(
    ("data", "value", "metrics"),
    [(0.5, 0.5, {}), ({"default": 2, "top1": 3}, 2.0, {"top1": 3}), ({"top1": 3}, None, {"top1": 3}), ("x", None, {})],
)
def test_trial_of_nnis_record(data, value, metrics):
    ended = _job(status="SUCCEEDED", endTime=3500, finalMetricData=[SimpleNamespace(data=data)])
    trial = trial_of(ended)
    assert (trial.value, trial.metrics, trial.seconds) == (value, metrics, 2.5)
    assert trial.succeeded == (value is not None)
    waiting = trial_of(_job())
    assert waiting == Trial(3, "a", "RUNNING", {}, None, {}, None, "/logs")
    assert not waiting.is_over
    assert waiting.last_words() == ""


def test_error_of_the_tuner_is_found(tmp_path):
    running = Running(SimpleNamespace(id="x"), tmp_path)
    assert running.tuner_error() == ""
    (tmp_path / "dispatcher.log").write_text("[2026-01-01 00:00:00] INFO (nni/MainThread) ERROR (not one)\n")
    assert running.tuner_error() == ""
    with (tmp_path / "dispatcher.log").open("a") as log:
        log.write("[2026-01-01 00:00:01] ERROR (nni.base/Thread-1 (worker)) 'x0' must be flat.\nTraceback\n")
    assert running.tuner_error() == "'x0' must be flat."
