"""Importing the package is light and changes nothing elsewhere, and imports go one way through the house."""

import ast
import functools
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "nni_plugin": "nni_plugin",
    "adapters": "nni_plugin.adapters",
    "benchmarks": "nni_plugin.benchmarks",
}

# The house, lowest room first. A module may import from its own floor and from the floors below.
FLOORS = (
    frozenset(
        {
            "errors",
            "machine",
            "processes",
            "tensors",
            "flow",
            "parts",
            "random_weights",
            "cost",
            "latency",
            "renumbering",
            "described",
            "sample_inputs",
            "wrappers",
            "sample_rows",
        }
    ),
    frozenset({"groups"}),
    frozenset({"tracing", "compensation", "narrowing"}),
    frozenset({"latency_cache", "latency_table", "rounding"}),
    frozenset({"plan", "masks", "networks", "workspace", "correlation", "search_space"}),
    frozenset({"svg_figures", "pages", "report", "report_plots"}),
    frozenset({"criteria"}),
    frozenset({"budgets"}),
    frozenset({"selection", "stages", "slim_cost", "slim_latency", "knapsack", "schedules", "scorer", "live_plan"}),
    frozenset({"latency_budget", "budget_fit", "checks", "group_rules"}),
    frozenset({"layers", "side_by_side"}),
    frozenset({"adapters"}),
    frozenset({"channel_pruner", "methods"}),
    frozenset(
        {
            "planner",
            "layer_planner",
            "held_out",
            "checkpoint",
            "reconstruction",
            "filter_norms",
            "marginal_cost",
            "width_and_depth",
        }
    ),
    frozenset({"performance"}),
    frozenset(
        {
            "pruners",
            "network_job",
            "job",
            "search_plans",
            "job_plans",
            "workflow",
            "job_steps",
            "correlation_study",
            "comparison",
            "coverage",
            "experiment_job",
        }
    ),
    frozenset({"block_study"}),
    frozenset({""}),  # nni_plugin/__init__.py, which only gathers the public names
    frozenset({"benchmarks"}),
    frozenset({"cli", "trial", "__main__"}),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# The arrows that point up, taken when called: `plan.apply(...)` is the public verb for the surgery, and a layer
# statistic scores channels as a planner does. The names of layer importances are made of those of the criteria. NNI's
# own pruners need our speed-up behind them.
UPWARD = {
    ("nni_plugin.plan", "nni_plugin.adapters.torch_pruning"),
    ("nni_plugin.layers.statistics", "nni_plugin.adapters.torch_pruning"),
    ("nni_plugin.layers.statistics", "nni_plugin.planner"),
    ("nni_plugin.layers.methods", "nni_plugin.methods"),
    ("nni_plugin.adapters.nni.host_pruner", "nni_plugin.pruners"),
}

# Pruning hosts are touched in two rooms alone, and by the trial that users copy and the benchmark of their way through
# NNI, which speak it as they do; below the adapters no foreign host is known at all.
PRUNING_HOSTS = {"torch_pruning", "nni"}
HOSTS = PRUNING_HOSTS | {"timm", "torchvision", "accelerate", "onnx", "onnxruntime", "onnxscript"}


def _sources() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = _sources()


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """The absolute names that a module imports, wherever in its text; of ours, the module that is meant."""
    names = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write it absolute, from nni_plugin"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in SOURCES else str(node.module))
    return frozenset(names)


def _room(module: str) -> str:
    """The first name under `nni_plugin`; empty for `nni_plugin` itself."""
    return module.partition(".")[2].partition(".")[0]


def _run(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_imports_upward(module: str) -> None:
    assert _room(module) in FLOOR_OF, f"{module} has no room yet: give it one in FLOORS"
    ours = {name for name in _imports(module) if name.split(".")[0] == "nni_plugin"}
    upward = {name for name in ours if FLOOR_OF[_room(name)] > FLOOR_OF[_room(module)]}
    upward -= {name for importer, name in UPWARD if importer == module}
    assert not upward, f"{module} imports upward: {sorted(upward)}"


@pytest.mark.parametrize("module", SOURCES)
def test_hosts_stay_in_their_rooms(module: str) -> None:
    room = _room(module)
    roots = {name.split(".")[0] for name in _imports(module)}
    if room not in {"adapters", "pruners", "trial"} and module != "nni_plugin.benchmarks.nni_drop_in":
        assert not roots & PRUNING_HOSTS
    if FLOOR_OF[room] < FLOOR_OF["adapters"]:
        assert not roots & HOSTS


def test_no_circles() -> None:
    graph = {
        module: {name for name in _imports(module) if name in SOURCES and (module, name) not in UPWARD}
        for module in SOURCES
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"imports go in a circle: {' <- '.join(error.args[1])}")


def test_import_is_lean(tmp_path: Path) -> None:
    heavy = ["accelerate", "jinja2", "matplotlib", "nni", "onnx", "onnxruntime", "onnxscript", "sklearn"]
    code = f"import json, sys, nni_plugin\nprint(json.dumps([m for m in {heavy} if m in sys.modules]))"
    assert json.loads(_run(code, tmp_path)) == []


_PROBE = '''
import importlib, json, sys

HOSTS = ("torch", "torchvision", "torch_pruning", "nni")
REGISTRIES = ("torch_pruning", "nni.")
import torch, torchvision, timm, accelerate, torch_pruning, nni, nni.compression, nni.compression.pruning
import nni.compression.speedup, torch.onnx, torch.export, torch.utils.data
# Loaded beforehand, or what these change themselves would be laid at our door.

def snapshot():
    """Every function, class, method and registry of the hosts, held so that no identity is used twice."""
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in HOSTS or module is None:
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                seen[name, key] = value
            elif isinstance(value, dict) and name.startswith(REGISTRIES) and key[:2] != "__":
                seen[name, key] = tuple(value.items())
            if isinstance(value, type) and value.__module__ == name:
                for attribute, member in list(vars(value).items()):
                    if callable(member) or isinstance(member, (property, staticmethod, classmethod)):
                        seen[name, key + "." + attribute] = member
    return seen

def same(a, b):
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(x is y for p, q in zip(a, b) for x, y in zip(p, q))
    return a is b

before = snapshot()
for module in MODULES:
    importlib.import_module(module)
if PATCH:
    exec(PATCH)
after = snapshot()
changed = [".".join(key) for key in before if key not in after or not same(before[key], after[key])]
owners = {key[:1] + tuple(key[1].split(".")[:1]) for key in before}
new = [key for key in after if key not in before and "." in key[1]]
added = [".".join(key) for key in new if (key[0], key[1].split(".")[0]) in owners]
print(json.dumps([len(before), sorted(changed + added)]))
'''


def _changed_by(modules: list[str], cwd: Path, patch: str = "") -> tuple[int, list[str]]:
    """How many names of the hosts were watched, and which of them the imports (and `patch`) changed."""
    watched, changed = json.loads(_run(f"MODULES = {modules!r}\nPATCH = {patch!r}\n{_PROBE}", cwd))
    return watched, changed


def test_importing_everything_changes_no_host(tmp_path: Path) -> None:
    watched, changed = _changed_by([name for name in SOURCES if not name.endswith("__main__")], tmp_path)
    assert watched > 1000
    assert changed == []


def test_the_probe_sees_a_patch(tmp_path: Path) -> None:
    patch = (
        "torch.nn.Module.__call__ = lambda self: None\n"
        "torch.nn.Linear.shrink = lambda self: None\n"
        "torch_pruning.dependency.DependencyGraph.get_pruning_group = None\n"
        "torch_pruning.pruner.function.PrunerBox[torch.nn.Linear] = None\n"
    )
    _, changed = _changed_by([], tmp_path, patch)
    assert "torch.nn.modules.module.Module.__call__" in changed
    assert "torch.nn.modules.linear.Linear.shrink" in changed
    assert any(name.endswith("DependencyGraph.get_pruning_group") for name in changed)
    assert any(name.endswith(".PrunerBox") for name in changed)
