"""`nni-plugin compare`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = (
    "compare", "--library", "nni_plugin", "--model", "resnet20", "--img-size", "8", "--in-chans", "1",
    "--pretrain-epochs", "1", "--epochs", "1", "--lr", "0.02", "--score-batches", "1", "--score-steps", "1",
    "--device", "cpu", "--latency-batch-sizes", "1",
)  # fmt: skip


def test_compare_writes_the_table_and_says_how_to_see_it(command: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "compared"
    asked = (*SMALL, "--methods", "taylor-fo,tp:magnitude", "--macs", ".5", "--seeds", "0", "--output", output)
    said = command(*asked)
    assert said.code == 0, said.err
    assert "report.html shows it" in said.out
    assert "nothing to resume" not in said.out
    lines = (output / "results.csv").read_text().splitlines()
    assert lines[0].startswith("model,dataset,method,seed,target,macs_ratio")
    assert len(lines) == 3
    again = command(*asked)
    assert again.code == 2
    assert "--resume" in again.errors[0]
    again = command(*asked, "--resume")
    assert again.code == 0
    assert "nothing to resume" not in again.out


def test_resume_where_no_comparison_is(command: Callable[..., Any], tmp_path: Path) -> None:
    asked = (*SMALL, "--methods", "taylor-fo", "--macs", ".5", "--seeds", "0", "--checkpoint", tmp_path / "no.pt")
    said = command(*asked, "--output", tmp_path / "mistyped", "--resume")
    assert said.code == 2  # for want of the checkpoint; the line comes first
    assert "mistyped holds no comparison: there is nothing to resume" in said.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--methods", "obs"), "give targets of one kind"),
        (("--methods", "obs", "--macs", ".5", "--params", ".5"), "give targets of one kind"),
        (("--methods", "obs", "--macs", "1.5"), "--macs"),
        (("--methods", "obss", "--macs", ".5"), "did you mean"),
        (("--methods", "obs", "--macs", ".5", "--seeds", "-1"), "--seeds"),
        (("--macs", ".5"), "--methods"),
        (("--methods", "tp:taylor-locl", "--macs", ".5"), "tp:taylor-local"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    command: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    said = command(*SMALL, *arguments, "--output", tmp_path / "compared")
    assert said.code == 2
    assert len(said.errors) == 1
    assert text in said.errors[0]
    assert not (tmp_path / "compared").exists()


def test_help_has_what_can_be_used_here(command: Callable[..., Any]) -> None:
    said = command("compare", "--help").out
    assert not [
        flag for flag in ("--prune-every", "--prune-channels", "--loss-threshold", "--schedule") if flag in said
    ]
    assert "2,000 images" in " ".join(said.split())
    assert "--prune-every" in command("prune", "--help").out
