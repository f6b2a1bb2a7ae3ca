"""Calls in processes of their own, so many at a time, held to CPU-seconds, wall-clock seconds and memory by the kernel.

Whatever a call does, it harms no other: one that computes too long is ended by its CPU limit, one that waits for ever
by an alarm clock, one that takes too much memory is refused more, and one that crashes takes nobody along. Processes
are forked from a server that has imported what they need and computed nothing, so that none imports torch again; the
CPU-seconds of a process count from its fork. Linux only.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nni_plugin.coverage.results import one_line

WALL = 10
"""Wall-clock seconds of a process for each CPU-second it may use: many processes share few cores."""

MEMORY_SHARE = 0.8
"""Of the machine's memory, what all processes together may take."""

Note = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class Limits:
    """What a process may use.

    Args:
        seconds: CPU-seconds, on one thread.
        wall: Wall-clock seconds.
        memory: Bytes of its own (not those shared with the others).
    """

    seconds: int
    wall: int
    memory: int

    @classmethod
    def shared(cls, seconds: int, workers: int) -> Limits:
        """Return the limits of one of several workers on this machine."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(seconds, WALL * seconds, int(MEMORY_SHARE * memory / workers))


@dataclass
class Ended:
    """How a call ended.

    Args:
        value: What it returned; None where it returned nothing.
        problem: Why it did not return, in one line; empty where it did.
        numbers: What it told on its way.
        seconds: CPU-seconds of the process, as far as they are known.
    """

    value: Any = None
    problem: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None


@dataclass
class _Running:
    index: int
    process: BaseProcess
    messages: Connection
    folder: tempfile.TemporaryDirectory[str]
    doing: str = "starting"
    ended: Ended = field(default_factory=Ended)
    returned: bool = False


def run_each(
    function: Callable[..., Any],
    calls: Iterable[Sequence[Any]],
    limits: Limits,
    *,
    workers: int = 1,
    preload: Sequence[str] = (),
) -> Iterator[tuple[int, Ended]]:
    """Call a function with each of several arguments, each time in a process of its own.

    Args:
        function: Of a module that can be imported; called as `function(*arguments, folder, note)` with an empty folder
            that is deleted afterwards and a `note(doing, numbers)`, which tells what it is about to do.
        calls: The arguments.
        limits: Of each process.
        workers: Processes at a time.
        preload: Modules that all of them need, imported once; what they import on their own counts as theirs.

    Yields:
        The number of the call and how it ended, in the order in which they end. Processes that are running when the
        caller goes away are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", *preload])
    waiting = iter(enumerate(calls))
    live: dict[int, _Running] = {}
    try:
        while True:
            while len(live) < workers and (item := next(waiting, None)) is not None:
                running = _start(context, function, item, limits)
                live[running.process.sentinel] = running
            if not live:
                return
            ready = wait([*live, *(running.messages for running in live.values() if not running.messages.closed)])
            for running in list(live.values()):
                if running.messages in ready or running.process.sentinel in ready:
                    _listen(running)
                if running.process.sentinel in ready:
                    del live[running.process.sentinel]
                    yield running.index, _end(running, limits)
    finally:
        for running in live.values():
            running.process.kill()
            _end(running, limits)


def _start(context: Any, function: Callable[..., Any], item: tuple[int, Sequence[Any]], limits: Limits) -> _Running:
    index, arguments = item
    folder = tempfile.TemporaryDirectory(prefix="nni-plugin-", ignore_cleanup_errors=True)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(function, arguments, folder.name, theirs, limits), daemon=True)
    process.start()
    theirs.close()
    return _Running(index, process, ours, folder)


def _listen(running: _Running) -> None:
    """Take in what a process has told so far."""
    try:
        while not running.messages.closed and running.messages.poll():
            kind, seconds, content = running.messages.recv()
            running.ended.seconds = seconds
            if kind == "doing":
                running.doing, running.ended.numbers = content
            else:
                running.ended.value, running.returned = content, True
    except (EOFError, OSError):  # it has ended, perhaps in the middle of a word
        running.messages.close()


def _end(running: _Running, limits: Limits) -> Ended:
    """Put together how a process that has ended came to its end, and clear up after it."""
    running.process.join()
    running.messages.close()
    code, ended = running.process.exitcode, running.ended
    running.process.close()
    try:
        log = (Path(running.folder.name) / "log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        log = ""
    running.folder.cleanup()
    if running.returned:
        return ended
    last = last_words(log)
    if code == -signal.SIGXCPU:
        ended.seconds = float(limits.seconds)
        problem = f"more than {limits.seconds} CPU-seconds"
    elif code == -signal.SIGALRM:
        problem = f"no end after {limits.wall} s"
    elif code == -signal.SIGKILL:
        problem = "killed from outside, as a machine without memory does"
    elif code is not None and code < 0:
        problem = f"crashed with {signal.Signals(-code).name} ({last})"
    else:
        problem = f"crashed: {last}"
    ended.problem = one_line(f"{problem}, while {running.doing}")
    return ended


def last_words(log: str) -> str:
    """Return the error that ended a process, with all its lines, or else the last line that it wrote.

    Example:
        >>> last_words("loading")
        'loading'
    """
    _, traceback, error = log.strip().rpartition("Traceback (most recent call last):\n")
    lines = error.splitlines() or ["it said nothing"]
    if not traceback:
        return lines[-1]
    return " ".join(itertools.dropwhile(lambda line: line.startswith(" "), lines))


def _work(
    function: Callable[..., Any], arguments: Sequence[Any], folder: str, told: Connection, limits: Limits
) -> None:
    """Do one call; the body of a process. An error that the function does not catch ends the log."""
    log = os.open(Path(folder) / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _hold_to(limits)
    import torch

    torch.set_num_threads(1)
    place = Path(folder) / "work"
    place.mkdir()

    def note(doing: str, numbers: Mapping[str, float]) -> None:
        told.send(("doing", time.process_time(), (doing, dict(numbers))))

    value = function(*arguments, place, note)
    told.send(("returned", time.process_time(), value))


def _hold_to(limits: Limits) -> None:
    """Let the kernel end this process when it has used what it may, by signals that nobody here handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the one who started it ends it
    for number in (signal.SIGXCPU, signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, limits.seconds),
        (resource.RLIMIT_DATA, limits.memory),
    ):
        allowed = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if allowed == resource.RLIM_INFINITY else min(most, allowed), allowed))
    signal.setitimer(signal.ITIMER_REAL, limits.wall)
