"""NNI's server: started on a free port, kept to this machine where it can be, and gone at the end with all it started.

NNI by itself listens on every network and cannot be told otherwise. Where all trials run on this machine nobody else
needs it, so its process (Node.js) loads `loopback.js` first; what it really listens on is looked up and said.

Ending it: `Experiment.stop()` asks the server to stop the trials and to go. When that fails, or an exception came
while it was being started, processes of the experiment may be left; all of them carry its name, and are ended.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nni_plugin.adapters.experiment.config import Request, nni_config, runs_here
from nni_plugin.adapters.experiment.trials import Trial, trial_of
from nni_plugin.errors import ExperimentError

PATIENCE = 60.0
"""Seconds that the server has to stop its trials, before it is killed."""

_LOOPBACK = Path(__file__).with_name("loopback.js")


@dataclass(frozen=True)
class Running:
    """An experiment whose server runs."""

    host: Any
    log: Path

    @property
    def port(self) -> int:
        """Port of NNI's server and web portal."""
        return int(self.host.port)

    def status(self) -> str:
        """Return NNI's word: `"RUNNING"`, `"NO_MORE_TRIAL"`, `"DONE"`, `"ERROR"`, ...

        Raises:
            ExperimentError: The server does not answer.
        """
        with self._answered():
            return str(self.host.get_status())

    def trials(self) -> list[Trial]:
        """Return all trials so far, in the order of their start.

        Raises:
            ExperimentError: The server does not answer.
        """
        with self._answered():
            return sorted((trial_of(job) for job in self.host.list_trial_jobs()), key=lambda trial: trial.number)

    def is_private(self) -> bool:
        """Whether the server listens to this machine alone."""
        addresses = set()
        for process in _processes(self.host.id):
            with suppress(psutil.Error):
                sockets = process.net_connections(kind="tcp")
                addresses |= {s.laddr.ip for s in sockets if s.status == "LISTEN" and s.laddr.port == self.port}
        return bool(addresses) and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

    def tuner_error(self) -> str:
        """Return the first error that the tuner has logged, or an empty text.

        NNI goes on after one as if nothing had happened, and waits for trials that never come.
        """
        try:
            text = (self.log / "dispatcher.log").read_text(errors="replace")
        except OSError:
            return ""
        found = re.search(r"^\[[^]]*\] ERROR \([^)]*\)\)? (.*)$", text, re.MULTILINE)
        return found[1] if found else ""

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise ExperimentError(f"NNI's server does not answer any more ({error}); its logs: {self.log}") from error


@contextmanager
def started(request: Request) -> Iterator[Running]:
    """Start an experiment; at the end of the block it is stopped, whatever happened there.

    Raises:
        ExperimentError: NNI does not take the request, or its server does not start.
    """
    from nni.experiment import Experiment
    from nni.runtime.log import silence_stdout

    silence_stdout()
    host = Experiment(nni_config(request))
    log = Path(host.config.canonical_copy().experiment_working_directory, host.id, "log")
    port = request.port or _free_port()
    try:
        with _environment(private=runs_here(request.training_service)):
            _start(host, port, log)
        yield Running(host, log)
    finally:
        _end(host)


def _start(host: Any, port: int, log: Path) -> None:
    try:
        host.start(port)
    except (OSError, RuntimeError, ValueError) as error:
        if "not idle" in str(error):
            raise ExperimentError(f"port={port} is taken; choose another one, or none for any that is free.") from error
        raise ExperimentError(f"NNI's server does not start ({error}); its logs: {log}") from error


def _end(host: Any) -> None:
    """Stop the server, and end whatever of the experiment is still there."""
    # NNI waits for its server without end; a server that hangs is killed, which ends the waiting.
    watchdog = threading.Timer(PATIENCE, _end_processes, (host.id,))
    watchdog.daemon = True
    watchdog.start()
    logger = logging.getLogger("nni.experiment")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a server that is gone already is no news
    try:
        host.stop()
    finally:
        logger.setLevel(level)
        watchdog.cancel()
        _end_processes(host.id)


def _end_processes(experiment: str) -> None:
    left = _processes(experiment)
    for process in left:
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=3)[1]:
        with suppress(psutil.Error):
            process.kill()


def _processes(experiment: str) -> list[Any]:
    """Return the processes of an experiment: server, tuner, and trials on this machine."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words, variables = process.cmdline(), process.environ()
            named = "--experiment-id" in words and experiment in words
            folder = Path(variables.get("NNI_LOG_DIRECTORY", "")).parent.name  # of the tuner's process
            if process.pid != os.getpid() and (named or experiment in (variables.get("NNI_EXP_ID"), folder)):
                found.append(process)
    return found


@contextmanager
def _environment(*, private: bool) -> Iterator[None]:
    """Let a process of Node.js that is started in the block keep to this machine."""
    before = os.environ.get("NODE_OPTIONS")
    if private:
        # Node.js reads its options with JSON's quotes.
        os.environ["NODE_OPTIONS"] = f"{before or ''} --require {json.dumps(str(_LOOPBACK))}".strip()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("NODE_OPTIONS", None)
        else:
            os.environ["NODE_OPTIONS"] = before


def _free_port() -> int:
    """Return a port that is free, as is the next one, which NNI takes where trials run elsewhere."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("", port + 1))
                return port
    raise ExperimentError("no free port was found; give one (port).")
