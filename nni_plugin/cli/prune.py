"""`nni-plugin prune`: a network pruned to a budget, fine-tuned, verified, measured and saved."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse

from nni_plugin.budgets import Budget, Channels, Latency, Layers, MACs, Params
from nni_plugin.cli.arguments import (
    above,
    add_common,
    add_data,
    add_model,
    count_or_fraction,
    data_kwargs,
    fractions,
    integers,
    latency,
    names,
    number,
    optional_bool,
)
from nni_plugin.cli.export import FILES
from nni_plugin.errors import BudgetError, TrainingError
from nni_plugin.parts import DEFAULT_PARTS, PARTS

DESCRIPTION = "Prune a network to a budget: train it if asked, prune, fine-tune, verify, measure, save."

_ONE_SHOT = ("reconstruct", "score_steps", "reestimate")
_SCORED = "all training data; obs: 2,000 images; nppm and its kin: a tenth"
_IN_STEPS = ("prune_channels", "prune_every")


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags of `prune`."""
    add_job(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run that was interrupted in --output")
    add_common(parser, output_required=True)


def add_job(parser: jsonargparse.ArgumentParser) -> None:
    """Declare the flags that say what to prune and how."""
    add = parser.add_argument
    add_model(parser, required=True)
    add_data(parser)
    add("--method", type=str, default="taylor-fo", help="taylor-fo, obs, nppm, tp:taylor, imprinting, ...")
    add("--macs", type=number, help="fraction of the multiply-accumulates to keep, above 0, at most 1")
    add("--params", type=number, help="fraction of the parameters to keep")
    add("--latency", type=latency, help="fraction of the measured latency to keep (0.7), or milliseconds (3.5ms)")
    add("--layers", type=above(1), help="whole blocks to remove, for imprinting, layer-... and block-gate")
    add("--channels", type=count_or_fraction, help="coupled channels to keep: a count (223) or a fraction (0.5)")
    add_options(parser)


def add_options(parser: jsonargparse.ArgumentParser, *, while_training: bool = True, scored: str = _SCORED) -> None:
    """Declare the flags of all methods, of training and of measuring.

    Args:
        parser: Takes them.
        while_training: Whether the command can prune while it trains; else the flags for that are not shown.
        scored: What methods score on if nothing is said.
    """
    add = parser.add_argument

    def told(text: str) -> str:
        return text if while_training else argparse.SUPPRESS

    add(
        "--schedule",
        type=str,
        choices=("one-shot", "iterative", "continuous"),
        default="one-shot",
        help=told("prune before fine-tuning, step by step within it, or only while the training loss is low"),
    )
    add("--prune-channels", type=above(1), help=told("channels removed in a step (done in the first half of --epochs)"))
    add("--prune-every", type=above(1), help=told("minibatches between steps (likewise, at most 30)"))
    add("--loss-threshold", type=number, help=told("largest training loss at which a continuous one prunes (1.04)"))
    add(
        "--score-batches",
        type=above(1),
        help=f"minibatches that one-shot, or what is left over after --epochs, is scored on ({scored})",
    )
    add(
        "--score-steps",
        type=above(1),
        help="steps of one-shot, each on fresh scores (1; obs without --reconstruct: 10, obs-joint: 5)",
    )
    add(
        "--search-steps",
        type=above(1),
        help="minibatches of a search over gates: nppm, differentiable-gates, nppm-linear (4000)",
    )
    add("--search-kwargs", type=dict, default={}, help="its further options (SearchOptions), e.g. '{\"noise\": 3.0}'")
    add("--reconstruct", type=optional_bool, help="after one-shot, solve weights anew by least squares (obs: true)")
    add("--bn-reestimate", dest="reestimate", action="store_true", help="new BN statistics after one-shot pruning")
    add(
        "--select",
        type=str,
        choices=("all", "skip-only", "no-skip"),
        help="layers to prune: all, those that residual additions couple, or the others (all; nppm: no-skip)",
    )
    add(
        "--cost-aware", type=optional_bool, help="rank by loss per unit of the budget: true or false (as the method is)"
    )
    add("--divide-by-blocks", action="store_true", help="divide a residual score by the blocks that share its gate")
    add("--stages", type=fractions, default={}, help="channels to keep by stage, layer1=0.7,layer2=0.4: a proportion")
    add("--isomorphic", action="store_true", help="compare layers built alike alone; all kinds lose the same fraction")
    add("--parts", type=names, default=DEFAULT_PARTS, help=f"of a transformer what may shrink, of {', '.join(PARTS)}")
    add("--round-to", type=above(1), help="make widths multiples of this (8 on CUDA, else 1)")
    add("--min-channels", type=above(1), default=1, help="make no layer narrower than this")
    add("--ignore", type=names, default=(), help="layers (or blocks) to leave whole, by name, separated by commas")
    add(
        "--candidates",
        type=str,
        choices=("outermost", "innermost", "all"),
        default="outermost",
        help="which of blocks inside blocks a method for layers may remove",
    )
    add("--epochs", type=above(0), default=0, help="epochs of fine-tuning")
    add("--lr", type=number, default=0.05, help="learning rate of fine-tuning")
    add("--pretrain-epochs", type=above(0), default=0, help="epochs to train the dense network first")
    add("--pretrain-lr", type=number, default=0.1, help="learning rate of that")
    add("--opt", type=str, default="sgd", help="optimizer of timm")
    add("--momentum", type=number, default=0.9, help="momentum of the optimizer")
    add("--weight-decay", type=number, default=5e-4, help="weight decay")
    add("--sched", type=str, default="cosine", help="learning-rate schedule of timm")
    add("--warmup-epochs", type=above(0), default=0, help="epochs of linear warm-up within --epochs")
    add("--clip-grad", type=number, help="largest norm of the gradient")
    add("--smoothing", type=number, default=0.0, help="label smoothing")
    add("--mixup", type=number, default=0.0, help="alpha of mixup")
    add("--model-ema", action="store_true", help="average the weights over time")
    add("--model-ema-decay", type=number, default=0.998, help="decay of that average")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", type=str, choices=("bfloat16", "float16"), default="bfloat16", help="its lower precision")
    add("--channels-last", action="store_true", help="channels-last memory format: faster convolutions")
    add("--checkpoint-every", type=above(1), help="minibatches between checkpoints (every epoch)")
    add(
        "--latency-batch-sizes",
        type=integers,
        default=(1, 64),
        help="batch sizes to measure the latency at; --latency is held at the first",
    )


def run(arguments: Any, command: str) -> None:
    """Run `prune`.

    Raises:
        NNIPluginError: Anything the user can mend.
    """
    missing = [name for name in ("accelerate", "torchmetrics", "sklearn") if find_spec(name) is None]
    if missing:
        raise TrainingError(f'{", ".join(missing)} not installed; prune needs pip install "nni-plugin[train]"')
    # Accelerate and the training stack load only when they are needed.
    from rich.console import Console

    from nni_plugin.workflow import run_job
    from nni_plugin.workspace import is_finished

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    job = job_of(arguments)
    _warn_of_idle(arguments)
    if arguments.resume and is_finished(arguments.output, "metrics.json", job.settings(), say):
        return
    earlier = _exports_in(arguments.output, job.model)
    result = run_job(job, resume=arguments.resume, command=command, say=say)
    console.print(_table(result.metrics))
    if earlier:
        say(f"{' and '.join(earlier)} in {arguments.output} are of the network that was there before: export anew.")
    say(f"{arguments.output}/report.html shows it; load it: nni_plugin.from_pretrained({str(arguments.output)!r})")


def job_from(settings: Mapping[str, Any]) -> Any:
    """Return the :class:`~nni_plugin.job.Job` that settings under the names of the flags ask for.

    Args:
        settings: As in a file that `--config` takes: `{"model": "resnet20", "round_to": 8, ...}`.

    Raises:
        ArgumentError: A name is unknown, or a value is not what the flag takes.
        TrainingError: A setting of training is out of its range.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return job_of(parser.parse_object(dict(settings)))


def job_of(arguments: Any, budget: Budget | None = None) -> Any:
    """Return the :class:`~nni_plugin.job.Job` that the arguments ask for.

    Args:
        arguments: Of `prune`, or another command's with the same options.
        budget: What the result may cost; None: as the flags say.

    Raises:
        ArgumentError: They contradict each other.
        TrainingError: A setting of training is out of its range.
    """
    from nni_plugin.adapters.training import TrainingConfig
    from nni_plugin.job import Job

    _refuse_in_vain(arguments)
    budget = budget or _budget_of(arguments)
    amp = {"bfloat16": "bf16", "float16": "fp16"}[arguments.amp_dtype] if arguments.amp else "no"
    shared = {
        field.name: arguments[field.name]
        for field in fields(TrainingConfig)
        if field.name in arguments and field.name != "amp"
    }
    finetune = TrainingConfig(**{**shared, "amp": amp})
    first = {"amp": amp, "epochs": arguments.pretrain_epochs, "lr": arguments.pretrain_lr, "warmup_epochs": 0}
    try:
        pretrain = TrainingConfig(**{**shared, **first})
    except TrainingError as error:
        # All that the two share has been accepted above.
        raise error.of_pretraining() from error
    direct = {field.name: arguments[field.name] for field in fields(Job) if field.name in arguments}
    if arguments.loss_threshold is None:
        del direct["loss_threshold"]
    return Job(
        **{
            **direct,
            "budget": budget,
            "data_kwargs": data_kwargs(arguments),
            "pretrain": pretrain,
            "finetune": finetune,
        }
    )


def _refuse_in_vain(arguments: Any) -> None:
    """Refuse what another schedule alone would heed.

    Raises:
        ArgumentError: The text names the flag, and the schedules that it belongs to.
    """
    at_once = [flag for flag in _ONE_SHOT if arguments[flag]]
    if at_once and arguments.schedule != "one-shot":
        flag = {"reestimate": "bn-reestimate"}.get(at_once[0], at_once[0].replace("_", "-"))
        raise argparse.ArgumentError(None, f"--{flag} belongs to --schedule one-shot: others prune while they train")
    in_steps = [flag for flag in _IN_STEPS if arguments[flag] is not None]
    if in_steps and arguments.schedule == "one-shot":
        flag = in_steps[0].replace("_", "-")
        raise argparse.ArgumentError(
            None, f"--{flag} belongs to --schedule iterative and continuous: one-shot prunes before training"
        )
    if arguments.loss_threshold is not None and arguments.schedule != "continuous":
        raise argparse.ArgumentError(
            None, f"--loss-threshold belongs to --schedule continuous: {arguments.schedule} does not look at the loss"
        )


def _warn_of_idle(arguments: Any) -> None:
    """Warn where flags of training were given and nothing is trained: an --epochs forgotten looks like a result."""
    from nni_plugin.adapters.training import TrainingConfig

    if arguments.epochs or arguments.pretrain_epochs:
        return
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    defaults = parser.get_defaults()
    idle = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(TrainingConfig)
        if field.name in defaults and field.name != "seed" and arguments[field.name] != defaults[field.name]
    ]
    if idle:
        warnings.warn(f"Nothing is trained, so {', '.join(idle)} changes nothing: give --epochs.", stacklevel=2)


BUDGETS: dict[str, Callable[[Any, Any], Budget]] = {
    "macs": lambda amount, _: MACs(amount),
    "params": lambda amount, _: Params(amount),
    "channels": lambda amount, _: Channels(amount),
    "layers": lambda amount, _: Layers(amount),
    "latency": lambda amount, given: Latency(**amount, batch_size=given.latency_batch_sizes[0], device=given.device),
}
"""What each flag stands for, given its value and all arguments."""


def _budget_of(arguments: Any) -> Budget:
    given = {flag: value for flag in BUDGETS if (value := arguments[flag]) is not None}
    if len(given) != 1:
        *some, last = (f"--{flag}" for flag in BUDGETS)
        raise argparse.ArgumentError(
            None,
            f"give one budget of {', '.join(some)} and {last}, got "
            f"{' and '.join(f'--{flag}' for flag in given) or 'none'}",
        )
    [(flag, amount)] = given.items()
    try:
        return BUDGETS[flag](amount, arguments)
    except BudgetError as error:
        raise argparse.ArgumentError(None, f"--{flag}: {str(error).rstrip('.')}") from error


def _exports_in(folder: Path, model: str) -> list[str]:
    """Return the names of the files of `export` in a folder: another network in it makes them out of date."""
    names = [*FILES.values(), f"{model.partition('.')[0]}.txt"]
    return [name for name in names if (folder / name).is_file()]


def _table(metrics: dict[str, Any]) -> Any:
    from rich.table import Table

    from nni_plugin.report import IN_TURNS, before_after

    table = Table(
        title=f"{metrics['model']} on {metrics['dataset']}, {metrics['method']}",
        caption=IN_TURNS if metrics.get("latency_ratio") else None,
    )
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in before_after(metrics):
        table.add_row(row.quantity, row.before, row.after, row.change)
    return table
