"""An NNI experiment from end to end: data and dense network, trials, their table, the best one's network.

The dense network is built, and trained where that is asked, once; every trial prunes a copy of it with the parameters
that the tuner chose (`nni_plugin/trial.py`). While trials run, only the network of the best so far is kept.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.experiment import CANCELED, Request, Running, Trial, command_line, runs_here, started
from nni_plugin.adapters.training import evaluate
from nni_plugin.errors import ExperimentError
from nni_plugin.job import Job
from nni_plugin.job_plans import check_job, method_of
from nni_plugin.job_steps import pretrain
from nni_plugin.machine import usable_device
from nni_plugin.network_job import network_of
from nni_plugin.search_space import with_parameters
from nni_plugin.workspace import workspace

NETWORK = ("config.json", "model.safetensors", "plan.json", "metrics.json")
"""What a trial leaves of its network, and what the best one's is saved as."""

FIRST_FAILURES = 3
"""So many trials that fail before any has succeeded end the experiment: the next ones would fail too."""


@dataclass(frozen=True)
class ExperimentJob:
    """What to search, and where to put it.

    Args:
        output: Folder for the results.
        job: A job as one of the trials might run it: network, data and training of the dense network are taken from it.
        settings: What all trials share, under the names of `prune`'s flags.
        search_space: What they vary, in NNI's form.
        trials: How many to run.
        concurrency: How many at a time.
        tuner: See `adapters.experiment.TUNERS`.
        training_service: File with a training service of NNI; None: this machine.
        port: Of NNI's server; None: a random free one.
        trial_command: Shell command of a trial, `{settings}` and `{results}` in it replaced by paths; None: ours.
        trial_code: Folder that every trial of an own command runs in.
        macs_price: What all MACs of the dense network cost, in points of top-1: a trial's value is its top-1 minus
            this times the fraction of the MACs kept.
    """

    output: Path
    job: Job
    settings: Mapping[str, Any]
    search_space: Mapping[str, Any]
    trials: int
    concurrency: int = 1
    tuner: str = "TPE"
    training_service: Path | None = None
    port: int | None = None
    trial_command: str | None = None
    trial_code: Path = Path()
    macs_price: float = 0.0

    @property
    def objective(self) -> str:
        """What is maximised, in words."""
        price = f" - {self.macs_price:g} x MACs kept" if self.macs_price else ""
        return f"top-1 (percent) of the pruned network after fine-tuning{price}"


@dataclass(frozen=True)
class Outcome:
    """What came out of an experiment.

    Args:
        trials: Every trial, in the order of their start.
        best: The one with the highest value; None if none succeeded.
        saved: Whether the best one's network is in the output folder.
    """

    trials: list[Trial]
    best: Trial | None
    saved: bool


def run_experiment(wanted: ExperimentJob, *, say: Callable[[str], None] = print) -> Outcome:
    """Run an experiment.

    Args:
        wanted: What to do.
        say: Takes what a person should read, as it happens.

    Returns:
        The trials and the best of them.

    Raises:
        NNIPluginError: Anything the user can mend; nothing half-written is left in the output folder.
        ExperimentError: No trial succeeded, and nothing is left; or NNI failed later, and what was finished is there.
        KeyboardInterrupt: It was interrupted; NNI is stopped, and what was finished is in the output folder.
    """
    with workspace(wanted.output, {"experiment": dict(wanted.search_space)}) as places:
        # Absolute: trials run in another folder.
        code, results = (places.state / "code").resolve(), (places.state / "trials").resolve()
        for folder in (code, results):
            folder.mkdir()
        settings = dict(wanted.settings)
        try:
            weights = _prepare(wanted.job, places.results.resolve() / "dense.safetensors", say)
        except KeyboardInterrupt:  # nothing is there yet that could be kept
            shutil.rmtree(places.state)
            raise
        if weights is not None:
            settings |= {"checkpoint": str(weights), "pretrain_epochs": 0}
        (code / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        shutil.copyfile(Path(__file__).with_name("trial.py"), code / "trial.py")
        trials, ending = _run(wanted, code, results, say)
        best = best_of(trials)
        if best is None and not isinstance(ending, KeyboardInterrupt):
            raise ending or _no_success(trials)
        if weights is not None:
            settings["checkpoint"] = str((wanted.output / "dense.safetensors").resolve())
        saved = _write(places.results, trials, best, settings, results)
        (places.results / "search_space.json").write_text(json.dumps(dict(wanted.search_space), indent=2) + "\n")
        shutil.copyfile(code / "trial.py", places.results / "trial.py")
    if ending is not None:
        raise ending
    return Outcome(trials, best, saved)


def best_of(trials: list[Trial]) -> Trial | None:
    """Return the trial with the highest value, the first of equals; None if none has succeeded."""
    done = [trial for trial in trials if trial.succeeded]
    return max(done, key=lambda trial: (trial.value, -trial.number), default=None)


def trials_csv(trials: list[Trial], parameters: list[str]) -> str:
    """Return the table of trials as text.

    Args:
        trials: In the order to write them.
        parameters: Names of the search space, a column each.
    """
    measured = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["trial", "id", "status", "value", *measured, "seconds", *parameters])
    for trial in trials:
        values = [trial.metrics.get(name, "") for name in measured]
        ours = [trial.parameters.get(name, "") for name in parameters]
        value, seconds = ("" if number is None else number for number in (trial.value, trial.seconds))
        writer.writerow([trial.number, trial.id, trial.status, value, *values, seconds, *ours])
    return text.getvalue()


def _prepare(job: Job, path: Path, say: Callable[[str], None]) -> Path | None:
    """Build the network and let the job refuse what it cannot do, before NNI is started; train the dense network.

    Returns:
        The file of the trained weights, or None where nothing is to be trained.
    """
    torch.manual_seed(job.seed)
    splits = create_loaders(job.dataset, job.data_dir, seed=job.seed, **job.data_kwargs)
    device = usable_device(job.device)
    model, examples = network_of(job, splits, device)
    check_job(job, method_of(job), model, examples)
    if job.pretrain.epochs:
        pretrain(model, splits, job.pretrain, device)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    say(splits.describe())
    say(f"dense: top-1 {evaluate(model, splits.test, device)['top1']:.2f} %, the start of every trial")
    return path if job.pretrain.epochs else None


def _run(
    wanted: ExperimentJob, code: Path, results: Path, say: Callable[[str], None]
) -> tuple[list[Trial], BaseException | None]:
    """Run the trials; returns them, and what ended them before their time."""
    local = runs_here(wanted.training_service)
    settings = code / "settings.yaml"
    if wanted.trial_command is None:
        # Elsewhere the code folder is copied, and its path is another one.
        here = settings if local else settings.name
        command = command_line("trial.py", here, results, f"{wanted.macs_price:g}", local=local)
    else:
        command = wanted.trial_command
        for word, path in {"{settings}": settings, "{results}": results}.items():
            command = command.replace(word, shlex.quote(str(path)))
    request = Request(
        search_space=wanted.search_space,
        command=command,
        code=code if wanted.trial_command is None else wanted.trial_code.resolve(),
        trials=wanted.trials,
        concurrency=wanted.concurrency,
        tuner=wanted.tuner,
        seed=wanted.job.seed,
        training_service=wanted.training_service,
        port=wanted.port,
        name=f"{wanted.job.model} on {wanted.job.dataset}",
    )
    trials: list[Trial] = []
    ending: BaseException | None = None
    try:
        with started(request) as running:
            say(_where(running))
            say(f"maximised: {wanted.objective}")
            try:
                for trials in _watched(running, say):
                    _keep_best(results, trials)
                    if _hopeless(trials):
                        break
            except KeyboardInterrupt as interrupt:
                ending = interrupt
                with suppress(ExperimentError):  # a trial may have ended in the last second
                    trials = running.trials()
    except (ExperimentError, KeyboardInterrupt) as error:
        ending = error
    return [trial if trial.is_over else replace(trial, status=CANCELED) for trial in trials], ending


def _watched(running: Running, say: Callable[[str], None]) -> Iterator[list[Trial]]:
    """Give all trials so far, every second until the last is over, and say it of each when it is."""
    said: set[str] = set()
    while True:
        status, trials = running.status(), running.trials()
        yield trials
        for trial in trials:
            if trial.is_over and trial.id not in said:
                said.add(trial.id)
                say(_line(trial))
        # A tuner that has tried all that there is to try ends the trials, but never the experiment.
        exhausted = status == "TUNER_NO_MORE_TRIAL" and all(trial.is_over for trial in trials)
        if status in ("DONE", "STOPPED") or exhausted:
            return
        broken = all(trial.is_over for trial in trials) and running.tuner_error()
        if status == "ERROR" or broken:
            raise ExperimentError(f"NNI's tuner failed ({broken or 'no reason given'}); its logs: {running.log}")
        time.sleep(1.0)


def _where(running: Running) -> str:
    url = f"NNI's server: http://127.0.0.1:{running.port}"
    if running.is_private():
        return (
            f"{url}, without a password. NNI's server listens on every interface; here it is held to this machine, "
            "so others see it through an SSH tunnel alone (docs/experiments.md)."
        )
    return (
        f"{url}, without a password. It LISTENS ON EVERY INTERFACE: whoever reaches this machine by network can stop "
        "the experiment and run commands. Keep the port behind a firewall (docs/experiments.md)."
    )


def _line(trial: Trial) -> str:
    chosen = ", ".join(f"{name} {_short(value)}" for name, value in trial.parameters.items())
    if trial.succeeded:
        return f"trial {trial.number}: {trial.value:.2f} in {trial.seconds or 0:.0f} s ({chosen})"
    ending = "ended without a result" if trial.status == "SUCCEEDED" else trial.status
    return f"trial {trial.number}: {ending} ({chosen}); its logs: {trial.log}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _hopeless(trials: list[Trial]) -> bool:
    over = [trial for trial in trials if trial.is_over]
    return len(over) >= FIRST_FAILURES and not any(trial.succeeded for trial in over)


def _no_success(trials: list[Trial]) -> ExperimentError:
    over = [trial for trial in trials if trial.is_over and trial.status != CANCELED]
    if not over:
        return ExperimentError("NNI ended the experiment before any trial was over.")
    last = over[-1]
    words = last.last_words() if last.status == "FAILED" else "no final result"
    return ExperimentError(
        f"No trial succeeded ({len(over)} were run); the last ended with: {words or 'nothing'}. Its logs: {last.log}"
    )


def _keep_best(results: Path, trials: list[Trial]) -> None:
    """Delete the networks of trials that are over, but for the best."""
    best = best_of(trials)
    for trial in trials:
        if trial.is_over and trial is not best:
            shutil.rmtree(results / trial.id, ignore_errors=True)


def _write(folder: Path, trials: list[Trial], best: Trial | None, settings: Mapping[str, Any], results: Path) -> bool:
    """Write the table, how to repeat the best trial, and its network; returns whether that was there."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.parameters))
    (folder / "trials.csv").write_text(trials_csv(trials, names), newline="")
    if best is None:
        return False
    again = with_parameters(settings, best.parameters)
    (folder / "best.yaml").write_text(yaml.safe_dump(again, sort_keys=False))
    network = [path for name in NETWORK if (path := results / best.id / name).is_file()]
    for path in network:
        shutil.copyfile(path, folder / path.name)
    return bool(network)
