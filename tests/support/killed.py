"""Run a command in a process that is killed, or interrupted, at a chosen moment."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

MODULES = ["nni_plugin.cli", "nni_plugin.workflow", "accelerate", "sklearn.datasets", "matplotlib.figure"]


def context() -> ForkServerContext:
    """Processes that need not import torch each: they are forked from one that has, and that has computed nothing."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(MODULES)
    return made


def run(arguments: list[str], log: str, moment: tuple[str, int] | None = None, number: int = signal.SIGKILL) -> int:
    """Run `nni-plugin` in a process of its own and return its exit code, negative for the signal that ended it.

    Args:
        arguments: Of the command.
        log: File for what it says.
        moment: What is counted, and the count at which the signal comes: "step" (of an optimizer), "checkpoint"
            (begun), "cut" (done), "result" (moved to its place).
        number: The signal that the process sends itself then.
    """
    process = context().Process(target=_child, args=(arguments, log, moment, number))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the command did not end"
    return process.exitcode


def _child(arguments: list[str], log: str, moment: tuple[str, int] | None, number: int) -> None:
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from nni_plugin import job_steps, latency
    from nni_plugin.cli import main

    torch.set_num_threads(1)
    measure = latency.measure_pair
    job_steps.measure_pair = lambda *args: measure(*args, min_run_time=1e-4, rounds=3)
    if moment is not None:
        _arm(*moment, number)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _arm(event: str, count: int, number: int) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from nni_plugin import workflow
    from nni_plugin.channel_pruner import ChannelPruner

    left = count

    def happened(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    if event == "step":
        register_optimizer_step_post_hook(happened)
    elif event == "cut":
        cut, apply_plan = ChannelPruner.cut, workflow.apply_plan

        def counted(pruner: ChannelPruner) -> None:
            cut(pruner)
            happened()

        def applied(*args: Any, **kwargs: Any) -> Any:
            apply_plan(*args, **kwargs)
            happened()

        ChannelPruner.cut = counted
        workflow.apply_plan = applied
    elif event == "checkpoint":
        sync = os.fsync

        def synced(descriptor: int) -> None:
            happened()
            sync(descriptor)

        os.fsync = synced
    else:
        replace = os.replace

        def replaced(source: object, target: object) -> None:
            replace(source, target)
            if Path(str(source)).parent.name.startswith("results-"):
                happened()

        os.replace = replaced
