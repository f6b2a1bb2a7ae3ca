"""Search spaces: what NNI takes and `prune` has flags for, everything else refused in one sentence."""

import json

import pytest

from nni_plugin.cli.experiment import _SAME_IN_ALL
from nni_plugin.cli.prune import job_from
from nni_plugin.errors import ExperimentError
from nni_plugin.search_space import (
    SHIPPED,
    SHIPPED_STAGES,
    check_names,
    read_search_space,
    values_to_try,
    with_parameters,
)

BASE = {"model": "resnet20", "library": "nni_plugin", "macs": 0.5, "output": "nowhere"}


@pytest.mark.parametrize("path", [SHIPPED, SHIPPED_STAGES])
def test_every_value_of_the_shipped_spaces_makes_a_job(path):
    space = read_search_space(path)
    first = {name: values_to_try(spec)[0] for name, spec in space.items()}
    assert not {name.partition(".")[0] for name in space} & set(_SAME_IN_ALL)
    for name, spec in space.items():
        for value in values_to_try(spec):
            job = job_from(with_parameters(BASE, {**first, name: value}))
            if name == "epochs":
                assert job.finetune.epochs == value
            elif name.startswith("stages."):
                assert job.stages[name.removeprefix("stages.")] == value


def test_parameters_go_before_settings():
    merged = with_parameters(
        {"macs": 0.5, "stages": {"a": 0.1, "b": 0.2}}, {"round-to": 8, "stages.b": 0.3, "macs": 0.4}
    )
    assert merged == {"macs": 0.4, "stages": {"a": 0.1, "b": 0.3}, "round_to": 8}


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ({"_type": "choice", "_value": ["a", 2, True]}, ["a", 2, True]),
        ({"_type": "randint", "_value": [1, 5]}, [1, 4]),
        ({"_type": "quniform", "_value": [0, 1, 0.25]}, [0.0, 1.0]),
        ({"_type": "normal", "_value": [0, 1]}, []),
    ],
)
def test_values_to_try(spec, values):
    assert values_to_try(spec) == values


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (3, ["'x'", "_type", "got 3"]),
        ({"_value": [1]}, ["_type"]),
        ({"_type": "chioce", "_value": [1]}, ["'chioce'", "choice"]),
        ({"_type": "choice", "_value": 3}, ["_value", "a list"]),
        ({"_type": "choice", "_value": []}, ["one number"]),
        ({"_type": "choice", "_value": [{"_name": "a"}]}, ["nested"]),
        ({"_type": "uniform", "_value": [1]}, ["2 numbers", "got [1]"]),
        ({"_type": "uniform", "_value": [1, 1]}, ["ascending"]),
        ({"_type": "uniform", "_value": [0, float("inf")]}, ["2 numbers"]),
        ({"_type": "uniform", "_value": [0, True]}, ["2 numbers"]),
        ({"_type": "loguniform", "_value": [0, 1]}, ["above 0"]),
        ({"_type": "randint", "_value": [0.5, 3]}, ["2 integers"]),
        ({"_type": "quniform", "_value": [0, 1]}, ["3 numbers"]),
        ({"_type": "quniform", "_value": [0, 1, 0]}, ["last above 0"]),
        ({"_type": "normal", "_value": [0, -1]}, ["second above 0"]),
    ],
)
def test_bad_specifications(tmp_path, spec, words):
    path = tmp_path / "space.json"
    path.write_text(json.dumps({"x": spec}))
    with pytest.raises(ExperimentError) as caught:
        read_search_space(path)
    assert all(word in str(caught.value) for word in ["search_space", "'x'", *words]), caught.value


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"a": }'])
def test_files_that_hold_no_space(tmp_path, text):
    (tmp_path / "space.json").write_text(text)
    with pytest.raises(ExperimentError, match=r"search_space: .*space\.json"):
        read_search_space(tmp_path / "space.json")


def test_missing_file(tmp_path):
    with pytest.raises(ExperimentError, match=r"none\.json.*No such file"):
        read_search_space(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("name", "words"), [("metod", ["'metod'", "method"]), ("stages", ["stages.layer1"]), ("seed", ["'seed'"])]
)
def test_unknown_names(name, words):
    with pytest.raises(ExperimentError) as caught:
        check_names({name: {}}, ["method", "macs", "stages"])
    assert all(word in str(caught.value) for word in words), caught.value
