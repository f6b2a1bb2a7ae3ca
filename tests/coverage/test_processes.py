"""Calls in processes of their own: each way to end is told, and none harms another."""

import multiprocessing.util
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import misbehaving
import pytest

from nni_plugin.coverage.processes import Ended, Limits, last_words, run_each

COMPUTING = Limits(seconds=2, wall=120, memory=4 * 2**30)
WAITING = Limits(seconds=60, wall=2, memory=4 * 2**30)
PRELOAD = ["nni_plugin.coverage.job"]
WAYS = {
    "compute for ever": "more than 2 CPU-seconds, while the deed",
    "return": "",
    "wait for ever": "no end after 2 s, while the deed",
    "crash": "crashed with SIGABRT",
    "leave": "crashed: it said nothing, while the deed",
    "take all memory": "MemoryError",
    "raise": "crashed: ValueError: this and that, while the deed",
}


@pytest.fixture(scope="module", autouse=True)
def _socket() -> None:
    """Let the server of processes have its socket where it has it always, whatever a test says of folders."""
    multiprocessing.util.get_temp_dir()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How each way ended, three at a time."""
    found, folder = {}, tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        for limits, waits in ((COMPUTING, False), (WAITING, True)):
            calls = [(way,) for way in WAYS if way.startswith("wait") == waits]
            for index, end in run_each(misbehaving.end, calls, limits, workers=3, preload=PRELOAD):
                found[calls[index][0]] = end
    assert list(folder.iterdir()) == []
    return found


@pytest.mark.parametrize("way", WAYS)
def test_every_end_is_told(ended: dict[str, Ended], way: str) -> None:
    assert WAYS[way] in ended[way].problem
    assert (ended[way].problem == "") == (way == "return")
    assert "\n" not in ended[way].problem
    assert ended[way].numbers == {"known": 0.5}


def test_what_is_returned_arrives(ended: dict[str, Ended]) -> None:
    value = ended["return"].value
    assert isinstance(value, Path)
    assert not value.exists()
    assert all(end.value is None for way, end in ended.items() if way != "return")


def test_seconds_are_those_of_the_processor(ended: dict[str, Ended]) -> None:
    assert ended["compute for ever"].seconds == COMPUTING.seconds
    for way in ("return", "wait for ever"):
        seconds = ended[way].seconds
        assert seconds is not None
        assert seconds < COMPUTING.seconds


def test_nothing_goes_on_when_the_caller_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    calls = [("raise",), ("wait for ever",)]
    running = run_each(misbehaving.end, calls, COMPUTING, workers=2, preload=PRELOAD)
    next(running)
    begun = time.monotonic()
    while not _at_work(tmp_path) and time.monotonic() - begun < 60:
        time.sleep(0.01)
    assert len(_at_work(tmp_path)) == 1
    begun = time.monotonic()
    running.close()
    assert time.monotonic() - begun < 30  # it would wait for a minute
    assert not _at_work(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _at_work(folder: Path) -> list[str]:
    """Return the processes that are in their calls, told by the logs that they write to."""
    found = []
    for pid in os.listdir("/proc"):
        with suppress(OSError):
            if pid.isdigit() and os.readlink(f"/proc/{pid}/fd/1").startswith(str(folder)):
                found.append(pid)
    return found


def test_last_words_are_the_whole_error() -> None:
    before = "Traceback (most recent call last):\n  File\nKeyError: 'a'\n\nDuring handling ...\n\n"
    log = f"loading\n{before}Traceback (most recent call last):\n  File ...\n    call()\nValueError: one\n  [1, 2]\n"
    assert last_words(log) == "ValueError: one   [1, 2]"
    assert last_words("one\ntwo\n") == "two"
    assert last_words("") == "it said nothing"


def test_limits_are_shared_among_workers() -> None:
    one, four = Limits.shared(60, 1), Limits.shared(60, 4)
    assert (one.seconds, one.wall) == (four.seconds, four.wall) == (60, 600)
    assert one.memory == pytest.approx(4 * four.memory, rel=1e-6)
    assert one.memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
