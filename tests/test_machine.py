"""What the machine's description holds, and what it must never hold."""

import getpass
import importlib.metadata
import platform
import socket

import pytest
import torch

from nni_plugin.machine import describe_machine


def test_names_hardware_and_versions():
    machine = describe_machine()
    assert list(machine)[:7] == ["CPU", "CPU cores", "torch threads", "RAM", "GPU", "OS", "Python"]
    assert machine["torch threads"] == str(torch.get_num_threads())
    assert machine["torch"] == importlib.metadata.version("torch")
    assert machine["Python"].endswith(platform.python_version())
    assert all(isinstance(text, str) and text for text in machine.values())


def test_absent_package_is_told(monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    machine = describe_machine()
    assert machine["timm"] == "not installed"
    assert machine["torch"] == real("torch")


def test_fewer_usable_cores_are_told(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert describe_machine()["CPU cores"] == "2 of 64 usable"


def test_no_host_or_user_name(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-some-site-build")
    text = " ".join(describe_machine().values())
    assert "some-site-build" not in text
    for name in (socket.gethostname(), platform.node(), getpass.getuser()):
        if len(name) > 3:  # a name such as "pi" may stand in other words by chance
            assert name not in text


def test_gpu_names_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Card B" if i == 2 else "Card A")
    assert describe_machine()["GPU"] == "2 x Card A, 1 x Card B"


@pytest.mark.parametrize("key", ["CPU", "RAM"])
def test_known_on_this_platform(key):
    assert describe_machine()[key] != "unknown"
