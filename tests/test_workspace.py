"""The promise of the output folder: complete or untouched, and state kept for a resumed run."""

import errno
import json
import os

import pytest

from nni_plugin.errors import DataError, OutputError
from nni_plugin.workspace import is_finished, output_folder, workspace, write_file

SETTINGS = {"model": "resnet20", "finetune": {"lr": 0.1, "epochs": 3}, "ignore": []}


def _tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _leave(output, error, settings=SETTINGS, saved="train.pt", **options):
    """A run that saves a checkpoint (if any) and a result, and then ends in `error`."""
    with workspace(output, settings, **options) as places:
        if saved:
            (places.state / saved).write_text("epoch 2")
        (places.results / "metrics.json").write_text("half")
        raise error


def test_success_moves_the_results_and_deletes_the_state(tmp_path):
    output = tmp_path / "a" / "b"
    with workspace(output, SETTINGS) as places:
        assert json.loads((places.state / "settings.json").read_text()) == SETTINGS
        (places.state / "train.pt").write_text("x")
        (places.results / "metrics.json").write_text("1")
        (places.results / "plan.json").write_text("2")
        assert not (output / "metrics.json").exists()
    assert _tree(output) == {"metrics.json": "1", "plan.json": "2"}
    assert not (output / ".state").exists()


def test_success_replaces_results_and_keeps_other_files(tmp_path):
    (tmp_path / "metrics.json").write_text("old")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("own")
    with workspace(tmp_path, SETTINGS) as places:
        (places.results / "metrics.json").write_text("new")
    assert _tree(tmp_path) == {"metrics.json": "new", "own/notes.txt": "own"}


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "elsewhere.json").write_text("own")
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.json").symlink_to(tmp_path / "elsewhere.json")
    with workspace(output, SETTINGS) as places:
        (places.results / "metrics.json").write_text("new")
    assert not (output / "metrics.json").is_symlink()
    assert (tmp_path / "elsewhere.json").read_text() == "own"


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [(DataError("no data"), DataError), (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f"), OutputError)],
)
def test_failure_before_anything_is_saved_leaves_nothing(tmp_path, raised, becomes):
    with pytest.raises(becomes, match=r"no data|No space left on device.*--output"):
        _leave(tmp_path / "a" / "b", raised, saved=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("raised", [DataError("no data"), OSError(errno.EIO, "broken")])
def test_failure_leaves_what_was_there(tmp_path, raised):
    (tmp_path / "metrics.json").write_text("old")
    with pytest.raises((DataError, OutputError)):
        _leave(tmp_path, raised, saved=None)
    assert _tree(tmp_path) == {"metrics.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("raised", [DataError("no data"), OSError(errno.EIO, "broken")])
def test_failure_keeps_what_was_saved(tmp_path, raised):
    with pytest.raises((DataError, OutputError)):
        _leave(tmp_path / "out", raised)
    kept = _tree(tmp_path / "out" / ".state")
    assert json.loads(kept.pop("settings.json")) == SETTINGS
    assert kept == {"train.pt": "epoch 2"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".state"]


def test_a_folder_that_was_empty_stays(tmp_path):
    with pytest.raises(DataError):
        _leave(tmp_path, DataError("x"), saved=None)
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_the_state_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path / "out", KeyboardInterrupt())
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".state"]
    assert (tmp_path / "out" / ".state" / "train.pt").read_text() == "epoch 2"


def test_an_error_of_ours_keeps_what_was_saved_and_nothing_else(tmp_path):
    with pytest.raises(ZeroDivisionError):
        _leave(tmp_path / "late", ZeroDivisionError())
    assert (tmp_path / "late" / ".state" / "train.pt").exists()
    with pytest.raises(ZeroDivisionError), workspace(tmp_path / "early", SETTINGS):
        raise ZeroDivisionError
    assert not (tmp_path / "early").exists()


def test_resume_goes_on_with_the_state(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path, KeyboardInterrupt())
    with workspace(tmp_path, SETTINGS, resume=True) as places:
        assert (places.state / "train.pt").read_text() == "epoch 2"
        assert list(places.results.iterdir()) == []  # half results of the first run are not taken over
        (places.results / "metrics.json").write_text("whole")
    assert _tree(tmp_path) == {"metrics.json": "whole"}


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "model": "resnet2O"}])
def test_without_resume_what_was_saved_is_not_touched(tmp_path, settings):
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path, KeyboardInterrupt())
    before = _tree(tmp_path)
    with pytest.raises(OutputError, match=r"Give --resume.*another --output.*remove"), workspace(tmp_path, settings):
        pytest.fail("the block ran")
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_state_that_holds_nothing_is_cleared_whatever_its_settings(tmp_path, resume):
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path, KeyboardInterrupt(), {"model": "other"}, saved="train.pt.tmp")
    with workspace(tmp_path, SETTINGS, resume=resume) as places:
        assert [path.name for path in places.state.iterdir() if path.is_file()] == ["settings.json"]


def test_resume_without_state_starts_from_nothing(tmp_path):
    with workspace(tmp_path / "out", SETTINGS, resume=True) as places:
        (places.results / "metrics.json").write_text("1")
    assert _tree(tmp_path / "out") == {"metrics.json": "1"}


@pytest.mark.parametrize("raised", [DataError("x"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()])
def test_a_resumed_run_that_ends_early_keeps_the_state(tmp_path, raised):
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path, KeyboardInterrupt())
    with pytest.raises((DataError, OutputError, KeyboardInterrupt, ValueError)):
        _leave(tmp_path, raised, resume=True)
    assert (tmp_path / ".state" / "train.pt").read_text() == "epoch 2"
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**SETTINGS, "model": "vgg"}, r"model was 'resnet20', now 'vgg'.*--resume"),
        ({**SETTINGS, "finetune": {"lr": 0.2, "epochs": 3}}, r" --lr was 0\.1, now 0\.2.*finetune\.pt'"),
        ({**SETTINGS, "finetune": {"lr": 0.1, "epochs": 3, "opt": "adam"}}, r" --opt was None, now 'adam'"),
        ({**SETTINGS, "ignore": ["fc"]}, r" --ignore was \[\], now \['fc'\]"),
        ({**SETTINGS, "data_kwargs": {"num_workers": 2}}, r" --workers was None, now 2"),
        ({**SETTINGS, "pretrain": {"lr": 0.2}}, r" --pretrain-lr was None, now 0\.2"),
        ({**SETTINGS, "budget": "MACs(0.5)"}, r" the budget was None, now 'MACs\(0\.5\)'"),
    ],
)
def test_resume_with_other_settings_is_refused(tmp_path, settings, words):
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path, KeyboardInterrupt())
    (tmp_path / ".state" / "finetune.pt").write_text("epoch 1")
    before = _tree(tmp_path)
    with pytest.raises(OutputError, match=words), workspace(tmp_path, settings, resume=True):
        pytest.fail("the block ran")
    assert _tree(tmp_path) == before


def test_a_training_that_has_saved_nothing_may_be_another(tmp_path):
    with pytest.raises(DataError):
        _leave(tmp_path, DataError("loss is nan, lower --lr"))
    other = {**SETTINGS, "finetune": {"lr": 0.01, "epochs": 3}}
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path, KeyboardInterrupt(), other, saved="finetune.pt", resume=True)
    with pytest.raises(OutputError, match=r"--lr was 0\.01, now 0\.1"), workspace(tmp_path, SETTINGS, resume=True):
        pytest.fail("the block ran")
    (tmp_path / ".state" / "finetune.pt").unlink()  # as the error says
    with workspace(tmp_path, SETTINGS, resume=True) as places:
        assert (places.state / "train.pt").read_text() == "epoch 2"


def test_what_a_resumed_run_finds(tmp_path):
    said = []
    assert not is_finished(tmp_path / "none", "m.json", SETTINGS, said.append)
    assert "starts from the beginning" in said.pop()
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path, KeyboardInterrupt())
    (tmp_path / "m.json").write_text(json.dumps({"settings": {"model": "of an earlier run"}}))
    assert not is_finished(tmp_path, "m.json", SETTINGS, said.append)
    assert said == []
    with workspace(tmp_path, SETTINGS, resume=True) as places:
        (places.results / "m.json").write_text(json.dumps({"settings": SETTINGS}))
    assert is_finished(tmp_path, "m.json", SETTINGS, said.append)
    assert "nothing to resume" in said.pop()
    with pytest.raises(OutputError, match=r"finished run .* --model was 'resnet20', now 'vgg'"):
        is_finished(tmp_path, "m.json", {**SETTINGS, "model": "vgg"}, said.append)
    (tmp_path / "m.json").write_text("{}")  # of a version that did not write them
    assert is_finished(tmp_path, "m.json", SETTINGS, said.append)
    (tmp_path / "m.json").write_text('{"settings"')
    with pytest.raises(OutputError, match=r"m\.json' is damaged"):
        is_finished(tmp_path, "m.json", SETTINGS, said.append)


def test_killed_while_the_state_is_deleted(tmp_path, monkeypatch):
    """What is left still knows its settings, so the run goes on from it."""
    manager = workspace(tmp_path, SETTINGS)
    places = manager.__enter__()
    for name in ("pretrain.pt", "train.pt", "zero.pt"):
        (places.state / name).write_text("x")
    (places.results / "m.json").write_text("1")
    left, unlink = [1], type(tmp_path).unlink

    def dying(path, *args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            manager.__exit__(None, None, None)
    assert len(list((tmp_path / ".state").glob("*.pt"))) == 2
    with workspace(tmp_path, SETTINGS, resume=True):
        pass
    assert _tree(tmp_path) == {"m.json": "1"}


def test_settings_are_compared_as_json_has_them(tmp_path):
    settings = {"sizes": (1, 64), "model": "m"}
    with pytest.raises(KeyboardInterrupt):
        _leave(tmp_path, KeyboardInterrupt(), settings)
    with workspace(tmp_path, settings, resume=True):
        pass


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_damaged_settings(tmp_path, content):
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / "settings.json").write_text(content)
    (tmp_path / ".state" / "train.pt").write_text("epoch 2")
    with (
        pytest.raises(OutputError, match=r"settings\.json' is damaged.*remove .*--output"),
        workspace(tmp_path, SETTINGS, resume=True),
    ):
        pytest.fail("the block ran")
    assert (tmp_path / ".state" / "settings.json").read_text() == content
    (tmp_path / ".state" / "settings.json").unlink()
    with pytest.raises(OutputError, match="damaged"), workspace(tmp_path, SETTINGS, resume=True):
        pytest.fail("the block ran")
    assert (tmp_path / ".state" / "train.pt").read_text() == "epoch 2"


def test_killed_before_its_settings_were_written(tmp_path):
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / "settings.tmp").write_text('{"mod')
    with workspace(tmp_path, SETTINGS, resume=True) as places:
        assert json.loads((places.state / "settings.json").read_text()) == SETTINGS


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_results_appear_all_or_none(tmp_path, monkeypatch, call, raised):
    """Whichever move fails, every file is as it was before: two of the three exist, so there are five moves."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"old {name}")
    replace, left = os.replace, call

    def failing(source, target):
        nonlocal left
        if left == 0:
            left = -1
            raise raised
        left -= 1
        replace(source, target)

    manager = workspace(tmp_path, SETTINGS)
    places = manager.__enter__()
    for name in ("a", "b", "c"):
        (places.results / name).write_text(f"new {name}")
    monkeypatch.setattr(os, "replace", failing)
    if call < 5:
        with pytest.raises((OutputError, KeyboardInterrupt)):
            manager.__exit__(None, None, None)
        assert {name: (tmp_path / name).read_text() for name in "ab"} == {"a": "old a", "b": "old b"}
        assert not (tmp_path / "c").exists()
        assert (tmp_path / ".state").exists() == isinstance(raised, KeyboardInterrupt)
    else:
        manager.__exit__(None, None, None)
        assert _tree(tmp_path) == {name: f"new {name}" for name in "abc"}


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="file"), workspace(path, SETTINGS):
            pytest.fail("the block ran")
        with pytest.raises(OutputError, match="file"), output_folder(path):
            pytest.fail("the block ran")
    assert _tree(tmp_path) == {"file": "kept"}


def test_output_folder_is_gone_after_a_failure_if_it_was_made(tmp_path):
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    manager = output_folder(tmp_path / "a" / "b")
    (manager.__enter__() / "f").write_text("x")
    with pytest.raises(OutputError, match="broken"):
        manager.__exit__(OSError, OSError("broken"), None)
    assert _tree(tmp_path) == {"a/b/f": "x"}  # what the block wrote is its own to clear


def test_write_file_in_one_step(tmp_path, monkeypatch):
    write_file(tmp_path / "f.csv", "1\r\n")
    assert (tmp_path / "f.csv").read_bytes() == b"1\r\n"

    def failing(source, target):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="full"):
        write_file(tmp_path / "f.csv", "2\r\n")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("f.csv", b"1\r\n")]
