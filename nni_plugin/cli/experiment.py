"""`nni-plugin experiment`: an NNI experiment whose trials prune as its tuner chooses."""

from __future__ import annotations

import argparse
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse

from nni_plugin.cli.arguments import above, add_common, number
from nni_plugin.cli.prune import add_job, job_from
from nni_plugin.errors import NNIPluginError, TrainingError
from nni_plugin.search_space import SHIPPED, check_names, plain_name, read_search_space, values_to_try, with_parameters

DESCRIPTION = "Search how to prune: an NNI experiment whose trials prune and fine-tune with what its tuner chooses."

_OWN = (
    "search_space", "max_trials", "trial_concurrency", "tuner", "training_service", "port", "trial_command",
    "trial_code_directory", "macs_price",
)  # fmt: skip
_SAME_IN_ALL = (
    "model", "library", "checkpoint", "pretrained", "model_kwargs", "dataset", "data_dir", "num_classes", "in_chans",
    "img_size", "mean", "std", "crop_pct", "interpolation", "batch_size", "workers", "pretrain_epochs", "pretrain_lr",
    "checkpoint_every", "latency_batch_sizes", "seed", "device",
)  # fmt: skip
"""Settings that no trial varies: they all start from one dense network on the same data."""


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `experiment`: those of `prune`, and those of the search."""
    add = parser.add_argument
    add_job(parser)
    add("--search-space", type=Path, help="JSON file in NNI's form: names are flags of prune (one for any network)")
    add("--max-trials", "--max-trial-number", type=above(1), required=True, help="trials to run")
    add("--trial-concurrency", type=above(1), default=1, help="trials at a time")
    add("--tuner", type=str, default="TPE", help="TPE, Random, GridSearch or Evolution")
    add("--training-service", type=Path, help="YAML file with a training service of NNI (this machine)")
    add("--port", type=above(1, 65534), help="port of NNI's server (a random free one)")
    add("--trial-command", type=str, help="command of your own trial script, with {settings} and {results} (trial.py)")
    add("--trial-code-directory", type=Path, default=Path(), help="folder that your own command runs in")
    add("--macs-price", type=number, default=0.0, help="top-1 points that all MACs cost: maximise top-1 - this x kept")
    add_common(parser, output_required=True)


def run(arguments: Any, command: str) -> None:
    """Run `experiment`.

    Raises:
        NNIPluginError: Anything the user can mend.
    """
    missing = [name for name in ("nni", "accelerate", "torchmetrics", "sklearn") if find_spec(name) is None]
    if missing:
        raise TrainingError(f'{", ".join(missing)} not installed; experiment needs pip install "nni-plugin[nni,train]"')
    from rich.console import Console

    from nni_plugin.adapters.experiment import check_request
    from nni_plugin.experiment_job import run_experiment

    check_request(arguments.tuner, arguments.training_service)
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    outcome = run_experiment(_wanted(arguments), say=say)
    best = outcome.best
    assert best is not None  # or an error said that none succeeded
    failed = [trial for trial in outcome.trials if not trial.succeeded]
    say(
        f"best: trial {best.number} with {best.value:.2f}; "
        f"all {len(outcome.trials)} are in {arguments.output}/trials.csv"
    )
    if failed:
        say(f"{len(failed)} of them did not succeed; the logs of the last: {failed[-1].log}")
    again = f"nni-plugin prune --config {arguments.output}/best.yaml --output FOLDER"
    if outcome.saved:
        say(f"its network: nni_plugin.from_pretrained({str(arguments.output)!r}); once more: {again}")
    else:
        say(f"its network is not on this machine; make it here: {again}")


def _wanted(arguments: Any) -> Any:
    from nni_plugin.experiment_job import ExperimentJob

    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name not in (*_OWN, "config", "output") and value not in (None, (), {})
    }
    settings = {name: _plain(value) for name, value in settings.items()}
    space = read_search_space(arguments.search_space or SHIPPED)
    own = arguments.trial_command is not None
    known = {name for name in vars(arguments) if name not in (*_OWN, *_SAME_IN_ALL, "config", "output")}
    if not own:
        check_names(space, known)
    free = [name for name in space if plain_name(name) in ("macs", "params", "channels")]
    if free and not own and not arguments.macs_price:
        warnings.warn(
            f"The search space varies {free[0]} and size costs nothing, so large networks win: give --macs-price, such "
            "as 10 for ten points of top-1.",
            stacklevel=2,
        )
    return ExperimentJob(
        output=arguments.output,
        job=_example(settings, {name: spec for name, spec in space.items() if plain_name(name) in known}, arguments),
        settings=settings,
        search_space=space,
        trials=arguments.max_trials,
        concurrency=arguments.trial_concurrency,
        tuner=arguments.tuner,
        training_service=arguments.training_service,
        port=arguments.port,
        trial_command=arguments.trial_command,
        trial_code=arguments.trial_code_directory,
        macs_price=arguments.macs_price,
    )


def _example(settings: dict[str, Any], space: dict[str, Any], arguments: Any) -> Any:
    """Try every choice and both ends of every parameter; returns the job of the first values."""
    from nni_plugin.methods import create_criterion

    tries = {name: values for name, spec in space.items() if (values := values_to_try(spec))}
    first = {name: values[0] for name, values in tries.items()}
    base = {**settings, "output": str(arguments.output)}
    example = job_from(with_parameters(base, first))
    create_criterion(example.method)
    for name, values in tries.items():
        for value in values[1:]:
            try:
                create_criterion(job_from(with_parameters(base, {**first, name: value})).method)
            except (argparse.ArgumentError, NNIPluginError) as error:
                hint = (
                    "" if space[name]["_type"] in ("choice", "randint") else "; integers come from choice and randint"
                )
                text = f"--search-space: {name!r} as {value!r}: {str(error).rstrip('.')}{hint}"
                raise argparse.ArgumentError(None, text) from error
    return example


def _plain(value: Any) -> Any:
    """Return a value as YAML has it; paths are absolute, since trials run in folders of their own."""
    if isinstance(value, Path):
        return str(value.resolve())
    return list(value) if isinstance(value, tuple) else value
