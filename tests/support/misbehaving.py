"""Calls that end in every way a call can; each takes what `nni_plugin.coverage.processes` gives besides."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nni_plugin.coverage.check import Verdict
from nni_plugin.coverage.listing import Case

Note = Callable[[str, Mapping[str, float]], None]


def end(how: str, folder: Path, note: Note) -> Any:
    """End like this."""
    assert list(folder.iterdir()) == []
    (folder / "file").write_text("content")
    note("the deed", {"known": 0.5})
    if how == "return":
        return folder
    if how == "compute for ever":
        while True:
            pass
    if how == "wait for ever":
        time.sleep(60)
    if how == "crash":
        os.abort()
    if how == "leave":
        os._exit(3)
    if how == "take all memory":
        bytearray(8 * 2**30)
    raise ValueError("this\nand that")


def judge(case: Case, wanted: object, folder: Path, note: Note) -> Verdict:
    """Give the verdict that the model is named after, in place of trying it."""
    if case.model == "hangs":
        note("planning", {"macs_ratio": 0.5})
        while True:
            pass
    if case.model == "refuses":
        return Verdict("refused", "layer 'a' cannot be cut")
    note("planning", {"macs_ratio": 0.5, "parity_max_rel": 1e-7})
    return Verdict("ok")
