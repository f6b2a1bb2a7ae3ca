"""Lists of models and tables of results, as files hold them."""

from pathlib import Path

import pytest

from nni_plugin.adapters.libraries import family_of, model_names
from nni_plugin.coverage.listing import Case, read_list, whole_library
from nni_plugin.coverage.results import COLUMNS, LONGEST, Row, append, counts, one_line, read, to_csv
from nni_plugin.errors import ModelError, OutputError

OK = Row("timm", "resnet18", "ok", "", 0.49951234, 1.2345e-7, 3.21)
REFUSED = Row("timm", "vit", "refused", "layer \"a\", or 'b'", None, None, None)


def written(folder: Path, text: str) -> Path:
    path = folder / "models.csv"
    path.write_text(text)
    return path


def test_a_list_keeps_its_order_and_its_notes(tmp_path: Path) -> None:
    cases = read_list(
        written(tmp_path, 'model,library,other\nb,timm,"x, y"\na,torchvision\nresnet20 , nni_plugin,z,w\n')
    )
    assert cases == [Case("timm", "b"), Case("torchvision", "a"), Case("nni_plugin", "resnet20")]
    assert [case.notes["other"] for case in cases] == ["x, y", "", "z"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'library'"),
        ("library,name\ntimm,a\n", "no column 'model'"),
        ("library,model\n", "names no model"),
        ("library,model\ntimm,\n", "Row 2"),
        ("library,model\ntimm,a\ntimm,a\n", "Row 3 .* timm a for the second time"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_list(written(tmp_path, text))


def test_a_list_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.csv.*No such file"):
        read_list(tmp_path / "none.csv")
    with pytest.raises(ModelError, match="directory"):
        read_list(tmp_path)


def test_whole_libraries() -> None:
    assert Case("timm", "resnet18") in whole_library("timm")
    assert len(model_names("timm")) > 1000
    assert Case("torchvision", "squeezenet1_0") in whole_library("torchvision")
    assert not any("raft" in name or "fcn" in name for name in model_names("torchvision"))
    assert Case("nni_plugin", "resnet20") in whole_library("nni_plugin")
    with pytest.raises(ModelError, match="keras"):
        whole_library("keras")


def test_families() -> None:
    assert family_of("timm", "vit_tiny_patch16_224") == "vision_transformer"
    assert family_of("torchvision", "squeezenet1_0") == "squeezenet"
    assert family_of("nni_plugin", "resnet20") == "resnet"
    assert family_of("timm", "no_such") == "no_such"


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert read(path) == []
    append(path, OK)
    append(path, REFUSED)
    assert path.read_bytes() == to_csv([OK, REFUSED]).encode()
    first, second = read(path)
    assert second == REFUSED
    assert (first.macs_ratio, first.parity_max_rel, first.seconds) == (0.499512, 1.23e-7, 3.21)
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert COLUMNS == ("library", "model", "status", "reason", "macs_ratio", "parity_max_rel", "seconds")


@pytest.mark.parametrize("lost", range(1, 40))
def test_a_row_that_was_cut_short_is_done_again(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "rows.csv"
    content = to_csv([REFUSED, OK]).encode()
    assert lost < len(to_csv([OK], header=False))
    path.write_bytes(content[:-lost])
    rows = read(path)
    assert rows[0] == REFUSED
    assert len(rows) == (2 if lost == 1 else 1)  # of the end of the line, half is enough
    append(path, OK)
    assert [row.model for row in read(path)][-1] == "resnet18"
    assert len(read(path)) == len(rows) + 1


def test_other_files_are_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for text in ("a,b\n1,2\n", to_csv([OK]).replace("ok", "fine"), to_csv([OK]).replace("3.21", "soon")):
        path.write_text(text)
        with pytest.raises(OutputError, match="damaged"):
            read(path)


def test_reasons_are_one_line() -> None:
    assert one_line("a\n b\t c ") == "a b c"
    assert len(one_line("word " * 1000)) <= LONGEST


def test_counts() -> None:
    assert counts([OK, REFUSED]) == {"timm": {"ok": 1, "refused": 1, "failed": 0}}
    other = Row("torchvision", "a", "failed", "b", None, None, None)
    assert counts([OK, other])["all"] == {"ok": 1, "refused": 0, "failed": 1}
