"""Choose the command, and turn every error into one line and an exit code."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from types import FrameType, ModuleType
from typing import Any, NoReturn

import jsonargparse

from nni_plugin.cli import compare, correlate, coverage, experiment, export, layers, measure, prune
from nni_plugin.errors import NNIPluginError, OutputError
from nni_plugin.workspace import holds_checkpoints

COMMANDS: dict[str, ModuleType] = {
    "prune": prune,
    "measure": measure,
    "export": export,
    "compare": compare,
    "correlate": correlate,
    "layers": layers,
    "coverage": coverage,
    "experiment": experiment,
}
"""Each has `DESCRIPTION`, `add_arguments(parser)` and `run(arguments, command_line)`."""

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130

_POSITIONAL = ("directory",)
"""Arguments without a flag."""

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        0 done; 2 bad usage or input, said in one line; 130 interrupted, state kept for `--resume`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if word in COMMANDS), None)
    program = f"nni-plugin {command}" if command else "nni-plugin"
    names: list[str] = []
    chosen: Any = None
    previous = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            signal.signal(signal.SIGTERM, _interrupt)
            arguments = build_parser().parse_args(argv)
            command = arguments.subcommand
            chosen = arguments[command]
            names = list(vars(chosen))
            COMMANDS[command].run(chosen, " ".join(["nni-plugin", *argv]))
        except argparse.ArgumentError as error:
            return _refuse(program, f"{_readable(str(error))} (see {program} --help)")
        except NNIPluginError as error:
            text = _as_flags(str(error), names)
            # An error of the folder itself says what to do with what is in it.
            if not isinstance(error, OutputError) and _can_go_on(chosen):
                text = f"{text.rstrip('.')}. What was done is kept: --resume goes on with it."
            return _refuse(program, text)
        except UnicodeDecodeError as error:
            if chosen is not None:  # only the file of --config is read before
                raise
            return _refuse(program, f"--config: Expected a file of text in UTF-8: {error}")
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(text in str(error) for text in _OUT_OF_MEMORY):
                raise
            reason = (str(error).splitlines() or ["no more to be had"])[0]
            return _refuse(program, f"Out of memory: {reason}. Take a smaller --batch-size or --img-size.")
        except KeyboardInterrupt:
            goes_on = "; the same command with --resume goes on" if "resume" in names else ""
            print(f"{program}: interrupted{goes_on}.", file=sys.stderr)
            return INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, previous)
    return DONE


def build_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of all commands, as the documentation and the tests read it."""
    parser = jsonargparse.ArgumentParser(
        prog="nni-plugin",
        description="Structured pruning for timm and torchvision models.",
        exit_on_error=False,
        formatter_class=_HelpFormatter,
    )
    commands = parser.add_subcommands(dest="subcommand", required=True)
    for name, module in COMMANDS.items():
        sub = jsonargparse.ArgumentParser(description=module.DESCRIPTION, exit_on_error=False)
        sub.add_argument("--config", action="config", help="YAML file with any of these arguments")
        module.add_arguments(sub)
        commands.add_subcommand(name, sub, help=module.DESCRIPTION)
    return parser


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Help with the defaults that say something, without the types: those are Python's names of functions."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or default is argparse.SUPPRESS:
            return text
        if action.required:
            return f"{text} (required)"
        if default is None or default is False or default in ((), {}):
            return text
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        return f"{text} (default: {shown})"


def _can_go_on(chosen: Any) -> bool:
    """Tell whether a command has left something in its folder that `--resume` goes on with."""
    return chosen is not None and "resume" in chosen and chosen.output is not None and holds_checkpoints(chosen.output)


def _refuse(program: str, text: str) -> int:
    print(f"{program}: error: {' '.join(text.split())}", file=sys.stderr)
    return BAD_INPUT


def _readable(text: str) -> str:
    """Name flags and types in an error of the parser as a user knows them."""

    def flag(match: re.Match[str]) -> str:
        return match[1] if match[1] in _POSITIONAL else "--" + match[1].replace("_", "-")

    text = re.sub(r'Parser key "(?:\w+\.)?(\w+)"', flag, text)
    text = re.sub(rf"\b(?:{'|'.join(COMMANDS)})\.(\w+)", flag, text)
    return re.sub(r"<class '(\w+)'>", r"\1", text)


def _as_flags(text: str, names: Iterable[str]) -> str:
    """Write the names that arguments have in Python, as errors of the package use them, as flags.

    Example:
        >>> _as_flags("batch_size=512 is too much; take a smaller batch_size.", ["batch_size"])
        '--batch-size 512 is too much; take a smaller --batch-size.'
    """
    for name in {**dict.fromkeys(names), "num_workers": None}:
        flag = {"num_workers": "--workers"}.get(name, "--" + name.replace("_", "-"))
        # Not within a path, a quoted name or the text of an object such as MACs(ratio=0.5).
        word = rf"(?<![\w/.'\"-])(?<!\w\(){name}"
        text = re.sub(rf"{word}=(?=[\w'\"-])", f"{flag} ", text)
        if "_" in name:
            text = re.sub(rf"{word}(?![\w/=('\"]|\.\w)", flag, text)
    return text


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"nni-plugin: warning: {' '.join(str(message).split())}", file=sys.stderr)
