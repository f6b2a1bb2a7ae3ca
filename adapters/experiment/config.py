"""What an NNI experiment is asked to do, and NNI's own configuration made of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from nni_plugin.errors import ExperimentError

TUNERS: dict[str, Callable[[int], dict[str, Any] | None]] = {
    "TPE": lambda seed: {"optimize_mode": "maximize", "seed": seed},
    "Random": lambda seed: {"seed": seed},
    "GridSearch": lambda seed: None,
    "Evolution": lambda seed: {"optimize_mode": "maximize"},
}
"""NNI's tuners that need nothing further, and their arguments for a seed."""

_BROKEN = ("GP", "GPTuner", "Metis", "MetisTuner")


@dataclass(frozen=True)
class Request:
    """What an experiment is asked to do.

    Args:
        search_space: In NNI's form.
        command: Shell command of a trial, run in `code`.
        code: Folder that every trial gets.
        trials: How many to run, at least 1.
        concurrency: How many at a time.
        tuner: One of `TUNERS`.
        seed: Of tuners that take one.
        training_service: File with a training service of NNI; None: this machine.
        port: Of NNI's server; None: a random free one.
        name: What NNI calls the experiment.
    """

    search_space: Mapping[str, Any] = field(repr=False)
    command: str
    code: Path
    trials: int
    concurrency: int = 1
    tuner: str = "TPE"
    seed: int = 0
    training_service: Path | None = None
    port: int | None = None
    name: str = "nni-plugin"


def check_request(tuner: str, training_service: Path | None) -> None:
    """Check what can be checked before anything is started.

    Raises:
        ExperimentError: NNI is not installed, or the tuner or the training service are unknown.
    """
    if find_spec("nni") is None:
        raise ExperimentError('NNI is not installed; experiments need pip install "nni-plugin[nni,train]".')
    if tuner not in TUNERS:
        broken = " NNI's GP and Metis stop with an error under today's SciPy." if tuner in _BROKEN else ""
        raise ExperimentError(f"tuner={tuner!r} is none of {', '.join(TUNERS)}.{broken}")
    if training_service is not None:
        _training_service(training_service)


def runs_here(training_service: Path | None) -> bool:
    """Tell whether trials run on this machine.

    Raises:
        ExperimentError: The file is no training service.
    """
    section = {"platform": "local"} if training_service is None else _training_service(training_service)[0]
    return all(part["platform"] == "local" for part in (section if isinstance(section, list) else [section]))


def command_line(*words: str | Path, local: bool = True) -> str:
    """Return a shell command that runs Python with these arguments, on this machine the one that runs now.

    Example:
        >>> command_line("trial.py", Path("a b"), local=False)
        "python3 trial.py 'a b'"
    """
    return shlex.join([sys.executable if local else "python3", *map(str, words)])


def nni_config(request: Request) -> Any:
    """Return NNI's configuration of an experiment, checked by NNI.

    Raises:
        ExperimentError: NNI does not take it.
    """
    from nni.experiment.config import AlgorithmConfig, ExperimentConfig

    service = {"platform": "local"}
    shared: dict[str, Any] = {}
    if request.training_service is not None:
        service, shared = _training_service(request.training_service)
    try:
        config = ExperimentConfig(
            experiment_name=request.name,
            search_space=dict(request.search_space),
            trial_command=request.command,
            trial_code_directory=str(request.code),
            trial_concurrency=request.concurrency,
            max_trial_number=request.trials,
            tuner=AlgorithmConfig(name=request.tuner, class_args=TUNERS[request.tuner](request.seed)),
            training_service=service,
            **shared,
        )
        config.validate()
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ExperimentError(f"NNI does not take this experiment: {str(error) or type(error).__name__}") from error
    return config


def _training_service(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read a training service: its section alone, or a whole experiment of NNI's whose other keys are left out.

    Returns:
        The section, and what else of a whole file says where trials run.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"training_service: cannot read {str(path)!r}: {error.strerror or error}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ExperimentError(f"training_service: {str(path)!r} is not YAML: {error}.") from error
    # NNI reads its keys without regard to case and underscores.
    top = content if isinstance(content, dict) else {}
    plain: dict[str, Any] = {str(key).replace("_", "").lower(): value for key, value in top.items()}
    section: Any = plain.get("trainingservice", content)
    parts = section if isinstance(section, list) and section else [section]
    if not all(isinstance(part, dict) and "platform" in part for part in parts):
        raise ExperimentError(
            f"training_service: {str(path)!r}: expected a training service of NNI, a mapping with the key platform "
            f"(local, remote, openpai, ...), or an NNI experiment with trainingService, got {content!r}."
        )
    if section is content:
        return section, {}
    names = {"nnimanagerip": "nni_manager_ip", "sharedstorage": "shared_storage", "trialgpunumber": "trial_gpu_number"}
    return section, {name: plain[key] for key, name in names.items() if key in plain}
