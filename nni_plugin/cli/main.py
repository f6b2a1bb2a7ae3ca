"""Choose the command, and turn every error into one line and an exit code."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType, ModuleType
from typing import Any, NoReturn

import jsonargparse

from nni_plugin.cli import export, measure, prune
from nni_plugin.errors import NNIPluginError

COMMANDS: dict[str, ModuleType] = {"prune": prune, "measure": measure, "export": export}
"""Each has `DESCRIPTION`, `add_arguments(parser)` and `run(arguments, command_line)`."""

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        0 done; 2 bad usage or input, said in one line; 130 interrupted, state kept for `--resume`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    previous = signal.getsignal(signal.SIGTERM)
    name = "nni-plugin"
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            signal.signal(signal.SIGTERM, _interrupt)
            arguments = build_parser().parse_args(argv)
            name = f"nni-plugin {arguments.subcommand}"
            COMMANDS[arguments.subcommand].run(arguments[arguments.subcommand], " ".join(["nni-plugin", *argv]))
        except (NNIPluginError, argparse.ArgumentError) as error:
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt:
            print(f"{name}: interrupted; the same command with --resume goes on.", file=sys.stderr)
            return INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, previous)
    return DONE


def build_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of all commands, as the documentation and the tests read it."""
    parser = jsonargparse.ArgumentParser(
        prog="nni-plugin", description="Structured pruning for timm and torchvision models.", exit_on_error=False
    )
    commands = parser.add_subcommands(dest="subcommand", required=True)
    for name, module in COMMANDS.items():
        sub = jsonargparse.ArgumentParser(description=module.DESCRIPTION, exit_on_error=False)
        sub.add_argument("--config", action="config", help="YAML file with any of these arguments")
        module.add_arguments(sub)
        commands.add_subcommand(name, sub, help=module.DESCRIPTION)
    return parser


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"nni-plugin: warning: {' '.join(str(message).split())}", file=sys.stderr)
