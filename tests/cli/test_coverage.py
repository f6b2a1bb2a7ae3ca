"""`coverage`: a table of models, and one clear line for whatever a user gets wrong."""

import csv

import pytest

LIST = "library,model,other\nnni_plugin,resnet20,ok\ntimm,no_such_model,ok\n"


def test_a_list_of_models(command, tmp_path):
    (tmp_path / "models.csv").write_text(LIST)
    output = tmp_path / "new" / "out"
    arguments = ("--models", tmp_path / "models.csv", "--macs", "0.6", "--device", "cpu", "--output", output)
    said = command("coverage", *arguments)
    assert said.code == 0, said.err
    assert [path.name for path in output.iterdir()] == ["coverage.csv"]
    with (output / "coverage.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert ",".join(first) == "library,model,status,reason,macs_ratio,parity_max_rel,seconds"
    assert (first["library"], first["model"], first["status"], first["reason"]) == ("nni_plugin", "resnet20", "ok", "")
    assert 0.588 <= float(first["macs_ratio"]) <= 0.6
    assert float(first["parity_max_rel"]) < 1e-5
    assert 0 < float(first["seconds"]) < 60
    assert (second["status"], second["macs_ratio"]) == ("refused", "")
    assert "no_such_model" in second["reason"]
    assert "2 models at 0.6 of their MACs" in said.out

    again = command("coverage", *arguments, "--resume")
    assert again.code == 0
    assert "nothing to resume" in again.out


def test_a_whole_library(command, tmp_path, monkeypatch):
    from nni_plugin.coverage import listing

    monkeypatch.setattr(listing, "model_names", lambda library: ["resnet20"])
    monkeypatch.chdir(tmp_path)
    said = command("coverage", "--library", "nni_plugin", "--all", "--device", "cpu", "--workers", "1")
    assert said.code == 0, said.err
    assert "1/1 nni_plugin resnet20: ok in " in said.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--models", "--library"]),
        (["--library", "timm"], ["--all"]),
        (["--all"], ["--library"]),
        (["--models", "@/models.csv", "--all"], ["either"]),
        (["--models", "@/models.csv", "--library", "timm"], ["either"]),
        (["--library", "keras", "--all"], ["--library", "timm"]),
        (["--models", "@/none.csv"], ["none.csv", "No such file"]),
        (["--models", "@/empty.csv"], ["empty.csv", "library,model"]),
        (["--models", "@/models.csv", "--macs", "1.5"], ["at most 1"]),
        (["--models", "@/models.csv", "--macs", "half"], ["--macs", "number"]),
        (["--models", "@/models.csv", "--seconds", "0"], ["--seconds", "at least 1"]),
        (["--models", "@/models.csv", "--workers", "0"], ["--workers", "at least 1"]),
        (["--models", "@/models.csv", "--device", "banana"], ["--device", "banana"]),
        (["--models", "@/models.csv", "--resume"], ["--resume", "--output"]),
        (["--models", "@/models.csv", "--output", "@/models.csv/below"], ["--output"]),
    ],
)
def test_bad_input(command, tmp_path, arguments, words):
    (tmp_path / "models.csv").write_text(LIST)
    (tmp_path / "empty.csv").write_text("")
    before = sorted(tmp_path.iterdir())
    said = command("coverage", *(argument.replace("@", str(tmp_path)) for argument in arguments))
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert all(word in said.errors[0] for word in words), said.errors[0]
    assert sorted(tmp_path.iterdir()) == before
