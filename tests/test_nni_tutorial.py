"""The blocks of the NNI tutorial run, one after the other, as a reader would paste them."""

import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("nni")

TUTORIAL = Path(__file__).parents[1] / "docs" / "nni_tutorial.md"


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 9
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "nni_tutorial.md", "exec"), scope)
    assert scope["before"] > 0.9
    assert scope["after"] > scope["before"] - 0.03
    assert scope["restored"].conv1.out_channels == 8  # half of half of 32
    assert [scope["model"].get_submodule(name).out_channels for name in ("conv1", "conv2", "conv3")] == [16, 16, 32]
    assert (tmp_path / "out/digits/model.safetensors").is_file()
    said = capsys.readouterr().out
    assert "48 of 48 masked coupled channels removed; 0 masked weights stay as zeros" in said
    assert said.count("50% kept") == 6


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("nni_plugin.pruners.TaylorFOPruner", "nni.compression.pruning.TaylorPruner"),
        ("nni_plugin.pruners.ModelSpeedup", "nni.compression.speedup.ModelSpeedup"),
        ("nni_plugin.pruners.auto_set_dependency_group_ids", "nni.compression.utils.auto_set_denpendency_group_ids"),
    ],
)
def test_what_is_imported_instead_takes_the_same_arguments(ours: str, theirs: str) -> None:
    found = [list(inspect.signature(pkgutil.resolve_name(name)).parameters) for name in (ours, theirs)]
    assert found[0][: len(found[1])] == found[1]
