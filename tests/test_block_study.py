"""What the `layers` command puts together: scores in few passes, networks without a block, rows and ranks."""

import copy
import csv
import json
import math

import pytest
import torch
from layered import batches, chain, loss_of, plant, vgg
from networks_at_random import assert_same, state_of

from nni_plugin.block_study.plots import Panel, plot_panels
from nni_plugin.block_study.results import agreements, importance_panels, latency_panels, rows_of, write_results
from nni_plugin.block_study.scores import BlockScores, score_blocks
from nni_plugin.block_study.without import Absence, Absences, costs_saved
from nni_plugin.compensation import reestimate_batchnorm
from nni_plugin.cost import Cost, count
from nni_plugin.errors import CriterionError
from nni_plugin.layers import BlockGate, Imprinting, LayerEnsemble, LayerStatistic
from nni_plugin.layers.blocks import find_blocks
from nni_plugin.layers.ensemble import rank_sums
from nni_plugin.layers.latency import BlockLatency
from nni_plugin.layers.methods import create_layer_importance
from nni_plugin.plan import PruningPlan

SEVERAL = (
    "layer-taylor-fo", "layer-taylor-fo-weight", "layer-feature-map", "layer-taylor-fg", "layer-taylor-fisher",
    "layer-magnitude", "layer-taylor-so", "layer-nni:l1", "layer-tp:taylor-tuned", "layer-ensemble", "block-gate",
    "imprinting", "layer-oracle",
)  # fmt: skip


class Counted:
    """Minibatches that count how often they are gone through."""

    def __init__(self, data):
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.data)


def _blocks(model, data):
    found = find_blocks(model, data[0][0])
    return found, [block for block in found.blocks if block.fixed is None]


def _score(importances, model, data, held_out=None):
    _, blocks = _blocks(model, data.data)
    return dict(score_blocks(importances, model, data.data[0][0], blocks, data, loss_of, held_out))


def test_scores_are_those_of_each_importance_by_itself():
    model, data, held_out = chain(3), batches(3), batches(1, seed=3)
    before = state_of(model)
    _, blocks = _blocks(model, data)
    found = _score({name: create_layer_importance(name) for name in SEVERAL}, model, Counted(data), held_out)
    assert list(found) == list(SEVERAL)
    for name in SEVERAL:
        alone = create_layer_importance(name).score(model, data[0][0], blocks, data, loss_of, held_out)
        assert list(found[name].scores) == list(alone)
        assert list(found[name].scores.values()) == pytest.approx(list(alone.values()), rel=1e-12), name
        assert found[name].reason == ""
    assert_same(model, before)
    assert set(found["imprinting"].details) == {"accuracy"}
    assert list(found["block-gate"].details["predicted_loss_change"]) == [block.name for block in blocks]


@pytest.mark.parametrize(
    ("names", "passes"),
    [
        (("layer-taylor-fo", "layer-taylor-fg", "layer-feature-map", "layer-ensemble"), 1),
        (("layer-magnitude", "layer-bn-scale"), 0),
        (("layer-ensemble",), 1),
        (("layer-taylor-fo", "layer-taylor-so", "layer-tp:taylor-tuned", "block-gate"), 4),
        (("layer-taylor-fo", "layer-obd"), 2),
    ],
)
def test_few_passes_over_the_data(names, passes):
    data = Counted(batches(2))
    _score({name: create_layer_importance(name) for name in names}, chain(2), data)
    assert data.passes == passes


def test_imprinting_takes_one_pass_and_one_over_what_is_held_out():
    data, held_out = Counted(batches(2)), Counted(batches(1))
    _score({"imprinting": Imprinting()}, chain(2), data, held_out)
    assert (data.passes, held_out.passes) == (1, 1)


def test_an_ensemble_of_other_importances_is_scored_as_it_is():
    model, data = chain(3), batches(2)
    ensemble = LayerEnsemble([BlockGate(), create_layer_importance("layer-magnitude")])
    found = _score({"mixed": ensemble}, model, Counted(data))["mixed"].scores
    _, blocks = _blocks(model, data)
    alone = [member.score(model, data[0][0], blocks, data, loss_of) for member in ensemble.members]
    assert found == rank_sums(alone)


def test_who_cannot_score_says_why_and_the_others_score():
    model = chain(3)
    for layer in model.modules():  # no scales, so that BNScale has nothing to read
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight = layer.bias = None
    names = ("layer-bn-scale", "layer-taylor-fo", "layer-taylor-fg", "layer-ensemble", "layer-magnitude")
    found = _score({name: create_layer_importance(name) for name in names}, model, Counted(batches(1)))
    assert "layer-bn-scale" in [name for name, scores in found.items() if scores.reason]
    assert "one of its members" in found["layer-ensemble"].reason
    assert found["layer-ensemble"].scores == {}
    assert len(found["layer-taylor-fg"].scores) == len(found["layer-magnitude"].scores) == 3


def test_a_stock_importance_may_fail_but_ours_may_not(monkeypatch):
    def failing(*_):
        raise IndexError("its own fault")

    stock, own = LayerStatistic(failing), create_layer_importance("layer-magnitude")
    found = _score({"stock": stock, "own": own}, chain(2), Counted(batches(1)))
    assert found["stock"].reason == "IndexError: its own fault"
    monkeypatch.setattr(type(own), "_score", failing)
    with pytest.raises(IndexError):
        _score({"own": own}, chain(2), Counted(batches(1)))


@pytest.mark.parametrize("build", [lambda: chain(2, strided=True), vgg])
def test_costs_saved_are_those_of_the_plan(build):
    model, data = build(), batches(1)
    before, text = state_of(model), str(model)
    found, blocks = _blocks(model, data)
    saved = costs_saved(model, data[0][0], blocks, found.records)
    assert list(saved) == [block.name for block in blocks]
    whole = count(model, data[0][0])
    for name, cost in saved.items():
        rest = count(PruningPlan((), (name,)).apply(copy.deepcopy(model), data[0][0]), data[0][0])
        assert cost == Cost(whole.macs - rest.macs, whole.params - rest.params)
        assert cost.macs > 0
        assert cost.params > 0
    assert_same(model, before)
    assert str(model) == text


@pytest.mark.parametrize("build", [lambda: chain(2, strided=True), vgg])
def test_absences_are_those_of_the_network_pruned_and_re_estimated(build):
    model, data, statistics = build().eval(), batches(2, seed=5), batches(3)
    before = state_of(model)
    found, blocks = _blocks(model, data)
    absences = Absences(model, found.records, data, statistics)

    def measured(network):
        reestimate_batchnorm(network, statistics, loss_of)
        with torch.no_grad():
            losses = [float(loss_of(network, batch)) for batch in data]
            right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in data)
        return sum(losses) / len(losses), 100 * right / 24

    loss, top1 = measured(copy.deepcopy(model))
    assert absences.whole == pytest.approx({"loss": loss, "top1": top1}, rel=1e-6)
    for block in (*blocks, blocks[0]):  # and again: nothing stays of the others
        pruned = PruningPlan((), (block.name,)).apply(copy.deepcopy(model), data[0][0])
        expected = measured(pruned)
        absence = absences.of(block)
        assert absence.loss == pytest.approx(expected[0] - loss, abs=1e-6)
        assert absence.top1 == pytest.approx(expected[1] - top1, abs=1e-6)
    assert_same(model, before)


def test_a_redundant_block_is_not_missed():
    model, data = chain(3).eval(), batches(2)
    plant(model.get_submodule("2"))
    found, blocks = _blocks(model, data)
    absences = Absences(model, found.records, data, batches(2, seed=1))
    changes = {block.name: absences.of(block) for block in blocks}
    assert changes["2"] == Absence(0.0, 0.0)
    assert all(abs(changes[name].loss) > 1e-3 for name in ("1", "3"))


def _latency(ms, share=0.25):
    return BlockLatency(8, ms, 0.125, 8000 / ms, 90, "cpu", "float32", 1, share)


def _rows(absent=True):
    model, data = chain(2), batches(1)
    found, blocks = _blocks(model, data)
    saved = costs_saved(model, data[0][0], blocks, found.records)
    scored = {
        "a": BlockScores({"1": 2e-9 / 3, "2": 1e-9}, 0.5),
        "b": BlockScores({"1": 5.0, "2": -1.0}, 0.5),
        "none": BlockScores({}, reason="cannot"),
    }
    absences = {"1": Absence(0.5, -2.0), "2": Absence(-0.25, 1.0)} if absent else {}
    latencies = {1: {"1": _latency(2.0), "2": _latency(3.0)}, 64: {"1": _latency(7.0), "2": _latency(6.0)}}
    return rows_of(blocks, saved, latencies, absences, scored), scored, absences


def test_rows():
    rows, _, _ = _rows()
    assert [row["block"] for row in rows] == ["1", "2"]
    first, second = rows
    assert (first["kind"], first["shape"]) == ("block", "6x6x6")
    assert (first["latency_ms_1"], first["latency_iqr_ms_1"], first["latency_share_64"]) == (2.0, 0.125, 0.25)
    assert (second["latency_ms_64"], second["loss_change"], second["top1_change"]) == (6.0, -0.25, 1.0)
    assert (first["a"], first["a_rank"], second["a_rank"]) == (6.66667e-10, 1, 2)
    assert (second["b"], second["b_rank"], first["b_rank"]) == (-1.0, 1, 2)
    assert not any(key.startswith("none") for key in first)
    assert {row["loss_change"] for row in _rows(absent=False)[0]} == {None}


def test_agreement_with_each_other_and_with_the_measured_loss():
    scores = {"x": 1.0, "y": 2.0, "z": 3.0}
    scored = {
        "up": BlockScores(scores),
        "down": BlockScores({name: -score for name, score in scores.items()}),
        "flat": BlockScores(dict.fromkeys(scores, 1.0)),
        "none": BlockScores({}, reason="cannot"),
    }
    absences = {name: Absence(score**3, 0.0) for name, score in scores.items()}
    found = agreements(scored, absences)
    assert found["up"] == {"down": -1.0, "flat": None, "loss_change": 1.0}
    assert found["down"]["loss_change"] == -1.0
    assert set(found) == {"up", "down", "flat"}
    assert "loss_change" not in agreements(scored, {})["up"]


def test_panels_hold_the_numbers_of_the_rows():
    rows, _, _ = _rows()
    panels = importance_panels(rows, ["a", "b"])
    assert [(panel.title, panel.values) for panel in panels] == [
        ("a", [6.66667e-10, 1e-9]), ("b", [5.0, -1.0]), ("measured", [0.5, -0.25]),
    ]  # fmt: skip
    assert [panel.title for panel in importance_panels(_rows(absent=False)[0], ["a"])] == ["a"]
    one, many = latency_panels(rows)
    assert (one.title, one.values, one.spreads) == ("batch size 1", [2.0, 3.0], [0.125, 0.125])
    assert (many.title, many.values) == ("batch size 64", [7.0, 6.0])


def test_files(tmp_path):
    rows, _, _ = _rows()
    write_results(tmp_path, {"blocks": rows}, rows, ["a", "b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "importance.png", "latency.png", "layers.csv", "layers.json",
    ]  # fmt: skip
    with (tmp_path / "layers.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["a"] for row in written] == ["6.66667e-10", "1e-09"]
    assert json.loads((tmp_path / "layers.json").read_text())["blocks"] == rows


def test_plots_take_many_blocks_long_names_and_dollars(tmp_path):
    names = [f"stages.{i}.$blocks$.and_a_name_that_goes_on_and_on" for i in range(60)]
    values = [math.sin(i) * 1e-7 for i in range(60)]
    plot_panels(tmp_path / "out.png", names, [Panel(f"${i}$", "x", values) for i in range(5)])
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_without_minibatches_each_says_so():
    found = _score({name: create_layer_importance(name) for name in ("layer-taylor-fo", "layer-taylor-fg")},
                   chain(2), _Empty(batches(1)))  # fmt: skip
    assert all("no batch" in scores.reason for scores in found.values())
    with pytest.raises(CriterionError, match="no block"):
        Imprinting().score(chain(1), batches(1)[0][0], [], [], None, [])


class _Empty(Counted):
    def __iter__(self):
        return iter(())
