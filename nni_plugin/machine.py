"""What machine and which versions a result was measured with; no name of a host or a person."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from nni_plugin.errors import TrainingError

_PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "nni-plugin")
_OF_A_PLAN = ("nni-plugin", "torch", "torch-pruning", "timm")
_UNKNOWN = "unknown"


def describe_machine() -> dict[str, str]:
    """Describe the machine and the versions a measurement depends on.

    Returns:
        Label to text, in the order to print: `CPU`, `CPU cores`, `torch threads`, `RAM` (GiB), `GPU`,
        `OS`, `Python`, then each of torch, torchvision, timm, torch-pruning and nni-plugin, whose text
        is "not installed" where the package is absent.
    """
    description = {
        "CPU": _cpu_model(),
        "CPU cores": _cores(),
        "torch threads": str(torch.get_num_threads()),
        "RAM": _memory(),
        "GPU": _gpus(),
        "OS": _operating_system(),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    return description | library_versions(_PACKAGES)


def library_versions(names: Iterable[str] = _OF_A_PLAN) -> dict[str, str]:
    """Return the versions of libraries by name, "not installed" of one that is absent.

    Args:
        names: Of which; those that a plan depends on if not given.
    """
    return {name: _version(name) for name in names}


def usable_device(name: str | None = None) -> torch.device:
    """Return a device that has been tried, the best there is when none is named.

    Raises:
        TrainingError: It cannot be used here.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise TrainingError(f"The device {name!r} cannot be used here ({reason}); the CPU can: 'cpu'.") from error
    return device


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine() or _UNKNOWN


def _cores() -> str:
    total = os.cpu_count() or 1
    # A container or a batch system may allow fewer cores than the machine has.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return str(total) if usable == total else f"{usable} of {total} usable"


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return _UNKNOWN
    return f"{size / 2**30:.1f} GiB"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _operating_system() -> str:
    # Kernel builds may carry a site's own suffix: only the leading numbers are kept.
    numbers = re.match(r"[\d.]+", platform.release())
    kernel = f"{platform.system()} {numbers.group() if numbers else ''}".strip()
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    parts = [part for part in (distribution, kernel, platform.machine()) if part]
    return ", ".join(parts) or _UNKNOWN


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
