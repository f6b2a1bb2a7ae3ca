"""What every test stands on: one thread, a fixed seed, hypothesis without deadlines."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# A deadline measures the machine; the same examples every time make a failure in `make test` repeatable.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "local"))

torch.set_num_threads(1)

# A shell starts jobs in the background with Ctrl-C ignored, and their children inherit that; tests send it to theirs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Helpers that several test modules import by name, e.g. `from networks_at_random import networks`.
sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep latencies that tests measure out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNI_PLUGIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)  # hosts draw from the global generator
    torch.manual_seed(0)
