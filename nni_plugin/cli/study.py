"""What the commands that look at one network share (`layers`, `correlate`): training it first, going on, saying so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import jsonargparse

from nni_plugin.cli.arguments import above, number
from nni_plugin.errors import TrainingError


def add_pretraining(parser: jsonargparse.ArgumentParser) -> None:
    """Add the training of the network before it is looked at, and going on with a run."""
    add = parser.add_argument
    add("--pretrain-epochs", type=above(0), default=0, help="epochs to train the network first")
    add("--pretrain-lr", type=number, default=0.1, help="learning rate of that")
    add("--opt", type=str, default="sgd", help="optimizer of timm")
    add("--momentum", type=number, default=0.9, help="momentum of the optimizer")
    add("--weight-decay", type=number, default=5e-4, help="weight decay")
    add("--sched", type=str, default="cosine", help="learning-rate schedule of timm")
    add("--checkpoint-every", type=above(1), help="minibatches of training between checkpoints (every epoch)")
    add("--resume", action="store_true", help="go on with the run that was interrupted in --output")


def fields_of(kind: Any, arguments: Any) -> dict[str, Any]:
    """Return the arguments that are fields of a dataclass."""
    return {field.name: arguments[field.name] for field in fields(kind) if field.name in arguments}


def pretraining(arguments: Any) -> Any:
    """Return the training that :func:`add_pretraining` asks for.

    Raises:
        TrainingError: A number is out of range; the text names its flag.
    """
    from nni_plugin.adapters.training import TrainingConfig

    shared = fields_of(TrainingConfig, arguments)
    try:
        return TrainingConfig(**{**shared, "epochs": arguments.pretrain_epochs, "lr": arguments.pretrain_lr})
    except TrainingError as error:
        raise error.of_pretraining() from error


def check_installed(command: str) -> None:
    """Refuse a command whose libraries are not there.

    Raises:
        TrainingError: The text says what to install.
    """
    missing = [name for name in ("accelerate", "torchmetrics", "sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        raise TrainingError(
            f'{", ".join(missing)} not installed; {command} needs pip install "nni-plugin[train,plots]"'
        )


def study(arguments: Any, command: str, record: str, run: Callable[..., Any], job: Any, console: Any) -> Any:
    """Run a job, unless it is finished.

    Args:
        arguments: Of the command line.
        command: The command that was run.
        record: Name of the file that a finished run leaves in its folder.
        run: Runs the job.
        job: What to do.
        console: Where to say how it goes.

    Returns:
        What the job returns; None for a finished one.
    """
    from nni_plugin.workspace import is_finished

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if arguments.resume and is_finished(arguments.output, record, job.settings(), say):
        return None
    return run(job, resume=arguments.resume, command=command, say=say)
