"""The Python blocks of the README run, one after the other, as a reader would paste them."""

import json
import re
from pathlib import Path

import pytest
import torch

from nni_plugin.benchmarks import comparison

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert len(blocks) == 4
    assert (tmp_path / "out/resnet18/model.safetensors").is_file()
    assert scope["speedup"].plan.cost_after.macs < 0.5 * scope["speedup"].plan.cost_before.macs  # type: ignore[attr-defined]
    assert scope["plan"].channels_kept * 2 <= scope["plan"].channels_kept + scope["plan"].channels_removed  # type: ignore[attr-defined]


def test_the_table_is_that_of_the_committed_numbers() -> None:
    result = json.loads((README.parent / "benchmarks" / "results" / "comparison.json").read_text())
    assert comparison.summary(result) in README.read_text(), "copy the table from the head of docs/comparison.md"


def test_commands_exist() -> None:
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\w+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
