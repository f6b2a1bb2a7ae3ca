"""The command line: `nni-plugin COMMAND ...`. One command a file: reads arguments, calls, writes files."""

from nni_plugin.cli.main import main

__all__ = ["main"]
