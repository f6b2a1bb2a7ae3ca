"""The reference of the command line, made from its parser: what `--help` says, as tables."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import nni_plugin
from nni_plugin.cli.main import build_parser

PAGE = "reference/command_line.md"

_HEAD = """\
# Command line

Every command takes its flags from the command line, from a YAML file (`--config FILE`), or from both; `--print_config`
writes such a file. Exit codes: 0 done; 2 bad usage or input, said in one line, nothing written half; 130 interrupted,
with the state kept for `--resume` where the command has it.
"""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the page to the site."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Return the page as Markdown."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return "\n".join([_HEAD, *(_section(name, sub) for name, sub in commands.choices.items())])


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        help_text = formatter._expand_help(action) if action.help else ""
        rows.append(f"| {_flags(action)} | {_cell(help_text)} |")
    lines = [f"## nni-plugin {name}", "", str(parser.description), "", "| flag | what it says |", "|---|---|", *rows]
    return "\n".join([*lines, ""])


def _flags(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{(action.metavar or action.dest).upper()}`"
    names = [f"`{flag}`" for flag in sorted(action.option_strings, key=len)]
    if action.choices:
        names += [f"`{choice}`" for choice in action.choices]
    return "<br>".join(names)


def _cell(text: str) -> str:
    package = os.fspath(Path(nni_plugin.__file__).parent)
    return " ".join(text.split()).replace(package, "nni_plugin").replace("|", "\\|").replace("<", "&lt;")
