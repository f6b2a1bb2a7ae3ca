"""The wheel holds what the checkout holds, under the right names, and works away from the checkout."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "nni_plugin": "nni_plugin",
    "adapters": "nni_plugin/adapters",
    "benchmarks": "nni_plugin/benchmarks",
}

# One worker builds the wheel once for the whole file.
pytestmark = pytest.mark.xdist_group("packaging")


def _declared() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _in_checkout() -> Iterator[tuple[Path, str]]:
    """Every file that belongs to the package, with the path it must have in the wheel."""
    for folder, inside in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if ROOT / "benchmarks" / "results" in path.parents:  # what was measured on one machine stays here
                continue
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                yield path, f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy: a build in the checkout would pick up what older builds left."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", target, source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder the wheel alone is installed into."""
    target = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    return target


def _away_from_checkout(installed: Path, code: str) -> str:
    """Run `code` with the installed wheel first on the path and the editable install's finder taken out."""
    prelude = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
        f"sys.path[:] = [{str(installed)!r}, *(p for p in sys.path if p != {str(ROOT)!r})]\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", prelude + code],
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_every_subpackage_is_listed() -> None:
    found = {inside.rpartition("/")[0].replace("/", ".") for path, inside in _in_checkout() if path.suffix == ".py"}
    listed = _declared()["options"]["packages"].split()
    assert sorted(listed) == sorted(found), "setup.cfg, [options] packages: list each folder that holds modules"


def test_wheel_holds_the_checkout_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {inside for _, inside in _in_checkout()}


def test_wheel_owns_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nni_plugin"}


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    assert re.search(r"^License-Expression: MIT$", metadata, re.MULTILINE)
    assert re.search(r"^Requires-Python: >=3\.10$", metadata, re.MULTILINE)
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert extras == {"train", "compare", "nni", "export", "plots", "docs", "dev"}
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE))
    assert {"torch", "torchvision", "timm", "torch-pruning", "nni"} <= required


def test_wheel_works_away_from_the_checkout(installed: Path) -> None:
    code = (
        "import nni_plugin, nni_plugin.adapters.torch_pruning as surgery, nni_plugin.benchmarks as harness\n"
        "print(nni_plugin.__file__, surgery.__file__, harness.__file__)\n"
    )
    files = _away_from_checkout(installed, code).split()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(installed) for file in files), files


def test_every_installed_module_is_importable_away_from_the_checkout(installed: Path) -> None:
    code = (
        "import importlib, pkgutil, nni_plugin\n"
        "names = [m.name for m in pkgutil.walk_packages(nni_plugin.__path__, 'nni_plugin.')]\n"
        "for name in names:\n"
        "    if not name.endswith('__main__'):\n"
        "        importlib.import_module(name)\n"
        "files = [m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'nni_plugin']\n"
        f"print([f for f in files if not f.startswith({str(installed)!r})])\n"
    )
    assert _away_from_checkout(installed, code) == "[]"


def test_command_resolves(installed: Path) -> None:
    code = (
        "import importlib.metadata as metadata\n"
        f"(found,) = metadata.distributions(name='nni-plugin', path=[{str(installed)!r}])\n"
        "(entry,) = found.entry_points.select(group='console_scripts')\n"
        "print(entry.name, entry.value, callable(entry.load()))\n"
    )
    assert _away_from_checkout(installed, code) == "nni-plugin nni_plugin.cli:main True"


def test_one_version_everywhere(installed: Path) -> None:
    version = _declared()["metadata"]["version"]
    (found,) = importlib.metadata.distributions(name="nni-plugin", path=[str(installed)])
    assert found.version == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE).group(1) == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(?:Unreleased\]\s+What will be released as )?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest is not None, "CHANGELOG.md must open with a version, or Unreleased and the version it will be"
    assert newest.group(1) == version


def test_pyproject_holds_tool_tables_only() -> None:
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(pyproject) == {"build-system", "tool"}
    assert "setuptools" not in pyproject["tool"]


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wrong = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", pin)]
    assert not wrong, f"constraints.txt: expected NAME==VERSION, got {wrong}"
    assert pins == sorted(pins, key=str.upper)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (pin.split("==") for pin in pins)}


def test_constraints_pin_every_direct_dependency() -> None:
    pins = _constraints()
    declared = _declared()
    wanted = declared["options"]["install_requires"].splitlines()
    for extra in declared["options.extras_require"].values():
        wanted += extra.splitlines()
    names = {re.match(r"[\w-]+", line).group().lower() for line in wanted if line}
    assert names - set(pins) == set()
    assert "nni-plugin" not in pins
    pinned = {name: pins[name] for name in ("torch", "torchvision", "timm", "torch-pruning", "nni")}
    assert pinned == {
        "torch": "2.14.1",
        "torchvision": "0.29.1",
        "timm": "1.0.31",
        "torch-pruning": "1.6.1",
        "nni": "3.0",
    }
