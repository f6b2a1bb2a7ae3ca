"""Interrupted or killed at any moment, then resumed: the same plan and the same weights, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import pytest

TRAINED = ["--pretrain-epochs", "2", "--checkpoint-every", "2"]
KINDS = {
    # 10 minibatches of pretraining, then 10 of fine-tuning.
    "one-shot": [*TRAINED, "--macs", "0.5", "--epochs", "2", "--mixup", "0.2", "--model-ema"],
    "random": [*TRAINED, "--macs", "0.5", "--epochs", "1", "--method", "tp:random"],
    # 5 minibatches to train, then 20 in whose first half it is pruned.
    "iterative": [*TRAINED, "--pretrain-epochs", "1", "--macs", "0.5", "--epochs", "4", "--schedule", "iterative"],
    "continuous": [
        *TRAINED, "--pretrain-epochs", "1", "--params", "0.5", "--epochs", "4", "--schedule", "continuous",
        "--loss-threshold", "9", "--prune-channels", "70", "--prune-every", "3",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """Gives the arguments of a kind of run, and the folder that it wrote without any interruption."""
    os.environ["OMP_NUM_THREADS"] = "1"
    made: dict[str, Path] = {}

    def run(kind: str) -> tuple[list[str], Path]:
        arguments = [*small, *KINDS[kind]]
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "whole"
            log = made[kind].with_name("log")
            assert killed.run([*arguments, "--output", str(made[kind])], str(log)) == 0, log.read_text()
        return arguments, made[kind]

    return run


def _same_results(output: Path, whole: Path) -> None:
    for name in ("plan.json", "model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize(
    ("kind", "event", "count"),
    [
        ("one-shot", "step", 3),
        ("one-shot", "checkpoint", 4),
        ("one-shot", "cut", 1),
        ("one-shot", "step", 15),
        ("one-shot", "result", 2),
        ("random", "step", 13),
        ("iterative", "step", 9),
        ("iterative", "cut", 1),
        ("iterative", "step", 22),
        ("continuous", "step", 10),
    ],
)
def test_killed_then_resumed(whole, tmp_path, kind, event, count):
    arguments, untouched = whole(kind)
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = [*arguments, "--output", str(output)]
    assert killed.run(arguments, str(log), (event, count)) == -signal.SIGKILL, log.read_text()
    assert (output / ".state").is_dir()
    assert killed.run([*arguments, "--resume"], str(log)) == 0, log.read_text()
    _same_results(output, untouched)


def test_killed_over_and_over(whole, tmp_path):
    """Every attempt gets further than the one before, and that is enough."""
    arguments, untouched = whole("iterative")
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = [*arguments, "--output", str(output), "--resume"]
    codes = []
    while len(codes) < 8 and 0 not in codes:
        codes.append(killed.run(arguments, str(log), ("step", 7)))
    assert codes == [*[-signal.SIGKILL] * (len(codes) - 1), 0], log.read_text()
    assert len(codes) > 3
    _same_results(output, untouched)


def test_terminated_then_resumed(whole, tmp_path):
    arguments, untouched = whole("one-shot")
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = [*arguments, "--output", str(output)]
    assert killed.run(arguments, str(log), ("step", 13), signal.SIGTERM) == 130
    assert "Traceback" not in log.read_text()
    assert log.read_text().splitlines()[-1] == (
        "nni-plugin prune: interrupted; the same command with --resume goes on."
    )
    assert [path.name for path in output.iterdir()] == [".state"]
    assert killed.run([*arguments, "--resume"], str(log)) == 0, log.read_text()
    _same_results(output, untouched)


def test_a_resumed_run_that_is_refused_keeps_its_state(command, whole, tmp_path):
    arguments, untouched = whole("one-shot")
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = [*arguments, "--output", str(output)]
    assert killed.run(arguments, str(log), ("step", 13)) == -signal.SIGKILL
    state = {path.name: path.read_bytes() for path in (output / ".state").iterdir() if path.is_file()}
    assert set(state) == {"settings.json", "pretrain.pt", "planned.json", "finetune.pt"}

    # Other settings: refused, with the name of the first that differs and both values.
    for flags, words in (
        (["--macs", "0.6"], ["budget", "0.5", "0.6"]),
        (["--lr", "0.01"], [" --lr was 0.05, now 0.01", "finetune.pt"]),
        (["--seed", "7"], ["--seed", "0", "7"]),
        (["--num-classes", "12"], ["--num-classes was None, now 12"]),
        (["--model", "resnet2O"], ["--model was 'resnet20', now 'resnet2O'"]),
    ):
        said = command(*arguments, *flags, "--resume")
        assert said.code == 2
        assert len(said.errors) == 1
        assert all(word in said.errors[0] for word in [*words, "--resume"]), said.errors[0]

    # Without --resume nothing is touched, a typing mistake in the command or not.
    for flags in ([], ["--model", "resnet2O"]):
        said = command(*arguments, *flags)
        assert said.code == 2
        assert all(word in said.errors[0] for word in ("--resume", "--output", "remove")), said.errors[0]
    assert {path.name: path.read_bytes() for path in (output / ".state").iterdir() if path.is_file()} == state

    # A damaged checkpoint or damaged settings: said, and left for the user to look at.
    for name, content in (
        ("finetune.pt", state["finetune.pt"][:5000]),
        ("finetune.pt", b"\x00" * 5000),
        ("pretrain.pt", state["pretrain.pt"][:-300] + b"\xff" * 300),
        ("planned.json", b"{"),
        ("planned.json", b'{"plan": "{}", "seconds": {}}'),
        ("settings.json", b"{"),
        ("settings.json", b"[]"),
    ):
        (output / ".state" / name).write_bytes(content)
        said = command(*arguments, "--resume")
        assert said.code == 2
        assert len(said.errors) == 1, said.err
        assert all(word in said.errors[0] for word in (name, "damaged", "remove")), said.errors[0]
        assert (output / ".state" / name).read_bytes() == content
        (output / ".state" / name).write_bytes(state[name])

    assert [path.name for path in output.iterdir()] == [".state"]
    assert killed.run([*arguments, "--resume"], str(log)) == 0, log.read_text()
    _same_results(output, untouched)


def test_a_mended_run_goes_on_from_what_was_trained(command, small, tmp_path, monkeypatch):
    """Fine-tuning at a rate that is too high: the dense network stays, and a lower rate goes on from it."""
    arguments = [*small, *TRAINED, "--macs", "0.5", "--epochs", "1", "--output", tmp_path / "out"]
    said = command(*arguments, "--lr", "1e20")
    assert said.code == 2
    assert all(word in said.errors[0] for word in ("loss", "--lr", "What was done is kept: --resume")), said.errors[0]
    assert {path.name for path in (tmp_path / "out" / ".state").iterdir()} == {
        "settings.json", "pretrain.pt", "planned.json",
    }  # fmt: skip
    assert command(*arguments[:-1], tmp_path / "straight").code == 0
    monkeypatch.setattr("nni_plugin.workflow.make_plan", None)  # the plan is there, and so is the network behind it
    assert command(*arguments, "--resume").code == 0
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_finished_run_is_held_against_its_settings(command, small, tmp_path, pruned):
    arguments = [*small, "--pretrain-epochs", "1", "--output", pruned, "--resume"]
    said = command(*arguments, "--macs", "0.5")
    assert said.code == 0
    assert "nothing to resume" in said.out
    before = (pruned / "metrics.json").read_bytes()
    said = command(*arguments, "--macs", "0.25")
    assert said.code == 2
    assert all(word in said.errors[0] for word in ("finished", "the budget", "0.25", "--output")), said.errors[0]
    assert (pruned / "metrics.json").read_bytes() == before


def test_resume_with_nothing_to_resume(command, small, tmp_path, pruned):
    arguments = [*small, "--pretrain-epochs", "1", "--macs", "0.5", "--resume"]
    said = command(*arguments, "--output", tmp_path)
    assert said.code == 0
    assert "there is nothing to resume, this one starts from the beginning" in said.out
    assert (tmp_path / "plan.json").read_bytes() == (pruned / "plan.json").read_bytes()


def test_control_c_on_the_installed_command(small, tmp_path):
    """The real program, in a process of its own, with a signal from outside."""
    program = Path(sys.executable).with_name("nni-plugin")
    arguments = [*small, "--macs", "0.5", "--pretrain-epochs", "500", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([program, *arguments], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "out" / ".state" / "pretrain.pt").exists() and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()  # 500 epochs
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "nni-plugin prune: interrupted; the same command with --resume goes on."
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".state"]
