"""The documentation: it builds without a warning, its code runs, its commands exist, it asks the web for nothing."""

import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import nni_plugin
from nni_plugin.benchmarks.__main__ import BENCHMARKS
from nni_plugin.cli.main import COMMANDS, build_parser
from nni_plugin.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
HAND_WRITTEN = sorted(
    str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if path.stem not in BENCHMARKS or path.parent != DOCS
)
RUN_ELSEWHERE = ("nni_tutorial.md",)  # by test_nni_tutorial.py

pytestmark = pytest.mark.xdist_group("docs")  # one build for all


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def commands_of(page: str) -> list[list[str]]:
    """The words of every command in console blocks, continued lines joined, comments left out."""
    lines = "".join(blocks_of(page, "console")).replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- code ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in HAND_WRITTEN if blocks_of(p, "python") and p not in RUN_ELSEWHERE])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would paste them; they hold assertions of their own."""
    if page == "guides/nni.md":
        pytest.importorskip("nni")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page, "python"):
        exec(compile(block, page, "exec"), scope)


@pytest.mark.slow
def test_the_script_for_many_gpus_finds_one_plan_in_two_processes(tmp_path: Path) -> None:
    (script,) = blocks_of("guides/many_gpus.md", "python")
    (tmp_path / "prune_many.py").write_text(script)
    said = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        done = subprocess.run(
            [sys.executable, *launcher, "prune_many.py"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said[0].startswith("1 processes kept ")
    assert said[1].startswith("2 processes kept ")
    assert said[0][1:] == said[1][1:]  # the same channels, the same digest
    with torch.no_grad():
        nni_plugin.from_pretrained(tmp_path / "out/many")(torch.zeros(1, 3, 32, 32))


# -- commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", HAND_WRITTEN)
def test_commands_of_ours_are_understood(page: str) -> None:
    for words in commands_of(page):
        if words[0] != "nni-plugin":
            continue
        assert words[1] in COMMANDS, words
        if "..." in words:  # a part of a command: its flags at least are there
            flags = [word for word in words if word.startswith("--")]
            assert all(f"`{flag}`" in hook("command_line").page() for flag in flags), words
        else:
            build_parser().parse_args(words[1:])


@pytest.mark.parametrize("page", HAND_WRITTEN)
def test_benchmarks_and_targets_that_are_named_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands_of(page):
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        if words[:3] == ["python", "-m", "nni_plugin.benchmarks"]:
            known = {"help", "output", "docs", "render", *inspect.signature(BENCHMARKS[words[3]].run).parameters}
            flags = {word.removeprefix("--").replace("-", "_") for word in words[4:] if word.startswith("--")}
            assert flags <= known, words


def test_start_here_runs_what_the_demo_runs() -> None:
    recipe = re.search(r"^demo:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert recipe is not None
    demo = shlex.split(recipe[1].replace("\\\n", " ").replace("$(BIN)/", ""))
    (ours,) = (words for words in commands_of("index.md") if words[:2] == ["nni-plugin", "prune"])
    assert sorted(ours) == sorted(demo)


def test_every_method_is_in_the_table() -> None:
    rows = set(re.findall(r'^  "([\w-]+)": \(', text_of("methods/index.md"), flags=re.MULTILINE))
    assert rows == set(METHODS)


# -- numbers ---------------------------------------------------------------------------------------------


def test_numbers_come_from_the_result_files(tmp_path: Path) -> None:
    measured = hook("measured")
    summary = {"n": 3, "mean": 1.2345, "sd": 0.1}
    rows = [{"method": "a", "top1": summary}, {"method": "b", "top1": {**summary, "sd": None}}]
    (tmp_path / "study.json").write_text(json.dumps({"cells": rows}))
    text = '{{ only(study.cells, method="a").top1 | pm }}, {{ only(study.cells, method="b").top1 | pm(1) }}'
    assert measured.render(text, tmp_path) == "1.23\u00a0±\u00a00.10, 1.2"
    for wrong in ('{{ only(study.cells, method="c").top1 }}', "{{ study.missing.mean }}", "{{ other.cells }}"):
        with pytest.raises(Exception, match=r"0 rows|no attribute|undefined"):
            measured.render(wrong, tmp_path)


def test_shares_and_deviations_are_not_typed_by_hand() -> None:
    """Whoever writes a deviation, or a share of accuracy, has measured it: then it is filled in."""
    for page in HAND_WRITTEN:
        assert not re.search(r"\d ± \d|\b\d\d\.\d+ %", text_of(page)), page


def test_what_is_said_not_to_differ_does_not() -> None:
    """The pages say so in words of two pairs of methods; the words must go when the numbers do."""
    measured = hook("measured")
    results = {
        name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("joint_removal", "width_and_depth")
    }
    where = {"network": "resnet20", "target": "macs0.25", "regime": "reconstructed"}
    cells = results["joint_removal"]["cells"]
    pairs = [[measured.only(cells, **where, method=method)["top1"] for method in ("obs", "tp:taylor")]]
    cells = results["width_and_depth"]["cells"]
    pairs += [[measured.only(cells, method=method)["top1_reconstructed"] for method in ("obs-joint", "obs")]]
    for ours, theirs in pairs:
        assert abs(ours["mean"] - theirs["mean"]) < ours["sd"] + theirs["sd"]


# -- the site --------------------------------------------------------------------------------------------


def pages_in(nav: Any) -> Iterator[str]:
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from [entry] if isinstance(entry, str) else pages_in(entry)


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load(re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    found = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert sorted(pages_in(settings["nav"])) == sorted(found | {hook("command_line").PAGE})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_builds_strictly(site: Path) -> None:
    assert (site / "index.html").is_file()
    assert not (site / "hooks").exists()


def test_it_asks_the_web_for_nothing(site: Path) -> None:
    """Links may lead out, what a browser loads by itself may not."""
    loads = (
        r"""<(?:script|img|iframe|source|video)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?(?:https?:)?//"""
    )
    for file in site.rglob("*.html"):
        assert not re.search(loads, file.read_text(encoding="utf-8")), file
    for file in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s)[\"']?(?:https?:)?//", file.read_text(encoding="utf-8")), file


def test_formulas_are_mathml(site: Path) -> None:
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        assert "arithmatex" not in text, file
        assert "{{" not in text.replace("{{}}", ""), file
    page = (site / "methods/taylor.html").read_text(encoding="utf-8")
    assert page.count("<math") == len(re.findall(r"\$\$.+?\$\$|\$.+?\$", _prose("methods/taylor.md"), flags=re.DOTALL))


def test_a_formula_that_cannot_be_shown_ends_the_build() -> None:
    maths = hook("maths")
    assert "<mfrac>" in maths.on_page_content(r'<span class="arithmatex">\(\frac{a}{b}\)</span>')
    with pytest.raises(Exception, match="cannot be shown"):
        maths.on_page_content(r'<span class="arithmatex">\(\nosuchcommand{a}\)</span>')


def _prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def test_the_reference_has_every_public_name_and_flag(site: Path) -> None:
    packages = {"nni_plugin": "nni_plugin", "criteria": "nni_plugin.criteria", "layers": "nni_plugin.layers"}
    packages |= {"performance": "nni_plugin.performance"}
    if importlib.util.find_spec("nni") is not None:
        packages |= {"pruners": "nni_plugin.pruners"}
    for page, package in packages.items():
        text = (site / f"reference/{page}.html").read_text(encoding="utf-8")
        missing = [name for name in import_module(package).__all__ if f'id="{package}.{name}"' not in text]
        if page == "nni_plugin" and 'id="nni_plugin.adapters.torch_pruning.verify.verify"' in text:
            missing.remove("verify")  # its module has the same name, so it is on the page by its full one
        assert not missing, (page, missing)
    flags = (site / "reference/command_line.html").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f"nni-plugin {name}" in flags
        assert command.DESCRIPTION[:30] in flags
    assert all(f"<code>{flag}</code>" in flags for flag in ("--latency-batch-sizes", "--parts", "--held-out-images"))
    assert str(ROOT) not in flags
