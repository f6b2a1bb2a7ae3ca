"""The command line run in this process, on work that takes seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import nni_plugin.job_steps
from nni_plugin.cli import main


class Said(NamedTuple):
    """What one command answered."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of standard error that are no warnings."""
        return [line for line in self.err.splitlines() if line and not line.startswith("nni-plugin: warning: ")]


def _measure_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure_pair", "measure_latency"):
        measure = getattr(nni_plugin.latency, name)
        extra = {"rounds": 3} if name == "measure_pair" else {}

        def quick(*args, measure=measure, extra=extra, **kwargs):
            return measure(*args, **{**kwargs, **extra, "min_run_time": 0.01})

        monkeypatch.setattr(nni_plugin.latency, name, quick)
        if hasattr(nni_plugin.job_steps, name):
            monkeypatch.setattr(nni_plugin.job_steps, name, quick)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    _measure_quickly(monkeypatch)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run `nni-plugin` with these arguments."""

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # --help and --print_config leave as argparse does
            code = leaving.code or 0
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def small() -> list[str]:
    """The arguments of a `prune` that takes about a second; it lacks a budget and an output folder."""
    size = ["--img-size", "8", "--batch-size", "256", "--score-batches", "2", "--latency-batch-sizes", "1"]
    return ["prune", "--library", "nni_plugin", "--model", "resnet20", *size]


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """A folder that `prune` wrote; to be left as it is."""
    folder = tmp_path_factory.mktemp("pruned") / "half"
    with pytest.MonkeyPatch.context() as monkeypatch:
        _measure_quickly(monkeypatch)
        assert main([*small, "--pretrain-epochs", "1", "--macs", "0.5", "--output", str(folder)]) == 0
    return folder
