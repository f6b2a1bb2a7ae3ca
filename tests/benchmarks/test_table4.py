"""The ResNet-20 experiments at a tiny size: what is pruned, how much is left, resuming, scratch widths, pages."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.benchmarks import __main__ as command_line
from nni_plugin.benchmarks import resnet20_table4, schedules_fig6
from nni_plugin.benchmarks.experiment import Experiment
from nni_plugin.benchmarks.grid import summary
from nni_plugin.benchmarks.presets import FULL, PRESETS, REDUCED, Preset, reductions
from nni_plugin.benchmarks.progress import LastMinibatchScorer
from nni_plugin.budgets import Channels
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.errors import CriterionError, OutputError, ScheduleError
from nni_plugin.methods import create_criterion
from nni_plugin.networks import NETWORKS
from nni_plugin.schedules import Iterative, OneShot

TRAINING = TrainingConfig(epochs=1, opt="momentum", lr=0.05, sched="step", decay_epochs=0.5)
TINY = Preset(
    dataset="digits", images=480, base=TRAINING, finetune=TRAINING, every=1, batch_size=16, seeds=1, img_size=8
)
FIRST_LAYERS = {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)}


def _experiment(folder: Path, preset: Preset = TINY) -> Experiment:
    return Experiment(preset, folder, device="cpu")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A grid of one seed and two methods that is done: its folder, records and summary."""
    folder = tmp_path_factory.mktemp("experiment")
    experiment, methods = _experiment(folder), ("taylor-fo", "tp:magnitude")
    cells = resnet20_table4.fill(experiment, methods, (0,), (223, 119))
    return folder, cells, resnet20_table4.summarise(experiment, methods, (223, 119), cells)


def test_only_the_first_layers_of_blocks_are_left_to_prune() -> None:
    model = NETWORKS["resnet20"](in_chans=1)
    ignore = resnet20_table4.all_but_first_layers(model)
    convolutions = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Conv2d)}
    assert set(ignore) == convolutions - FIRST_LAYERS
    pruner = ChannelPruner(
        model, torch.zeros(1, 1, 8, 8), create_criterion("tp:magnitude", 0), Channels(223), ignore=ignore
    )
    assert {group.name for group in pruner.groups} == FIRST_LAYERS
    assert pruner.dense.channels == 336


@pytest.mark.parametrize(("label", "target", "steps"), [("A", 223, 12), ("B", 119, 22)])
@pytest.mark.parametrize("method", ["taylor-fo", "tp:magnitude"])
def test_exactly_the_target_is_left(done: Any, method: str, label: str, target: int, steps: int) -> None:
    record = done[1][f"{method}-{label}"][0]
    assert record["channels"] == sum(record["widths"].values()) == target
    assert set(record["widths"]) == FIRST_LAYERS
    assert min(record["widths"].values()) >= 1
    assert record["channels_before"] == 336
    assert record["steps"] == steps == -(-(336 - target) // 10)
    assert 0 < record["macs_ratio"] < 1
    assert 0 <= record["top1_after_pruning"] <= 100


@pytest.mark.parametrize("label", ["A", "B"])
def test_scratch_has_the_widths_of_the_pruned_network_and_fresh_weights(done: Any, label: str) -> None:
    folder, cells, _ = done
    experiment = _experiment(folder)
    pruned, scratch = cells[f"taylor-fo-{label}"][0], cells[f"taylor-fo-{label}-scratch"][0]
    assert (scratch["macs"], scratch["params"]) == (pruned["macs"], pruned["params"])
    model = experiment.fresh(0, pruned["widths"])
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            dense = dict(experiment.trained_base(0).named_modules())[name]
            assert layer.out_channels == pruned["widths"].get(name, dense.out_channels), name
    # He initialisation for the outputs that the narrow layer has, not for those of the dense one.
    narrow = min(pruned["widths"], key=lambda name: pruned["widths"][name] / model.get_submodule(name).in_channels)
    weight = model.get_submodule(narrow).weight
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.25)
    assert scratch["history"][-1]["epoch"] + 1 == TINY.base.epochs + TINY.finetune.epochs


def test_a_finished_grid_runs_nothing(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cells, _ = done

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("nni_plugin.benchmarks.experiment.fit", refuse)
    again = resnet20_table4.fill(_experiment(folder), ("taylor-fo", "tp:magnitude"), (0,), (223, 119))
    assert again == json.loads(json.dumps(cells), object_hook=_integer_keys)
    with pytest.raises(AssertionError, match="trained again"):
        resnet20_table4.fill(_experiment(folder), ("taylor-fo",), (1,), (223,))
    only_done = resnet20_table4.fill(_experiment(folder), ("taylor-fo", "taylor-fg"), (0, 1), (223,), collect=True)
    assert {name: set(records) for name, records in only_done.items()} == {
        "base": {0},
        "taylor-fo-A": {0},
        "taylor-fo-A-scratch": {0},
    }


def _integer_keys(content: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in content.items()}


def test_other_numbers_need_another_folder(done: Any) -> None:
    other = replace(TINY, finetune=replace(TRAINING, lr=0.01))
    with pytest.raises(OutputError, match="finetune"):
        resnet20_table4.fill(_experiment(done[0], other), ("taylor-fo",), (0,), (223,))


def test_a_killed_run_goes_on_to_the_same_end(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of pruning, with a checkpoint of five minibatches before."""
    checkpointed = replace(TINY, finetune=replace(TRAINING, checkpoint_every=5))
    on_step: Callable[[ChannelPruner], None] = ChannelPruner.on_step
    calls = 0

    def killed(pruner: ChannelPruner) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        on_step(pruner)

    experiment = _experiment(tmp_path, checkpointed)
    arguments = ("run", 0, "taylor-fo", 223, Iterative(10, 1))
    ignore = resnet20_table4.all_but_first_layers(NETWORKS["resnet20"]())
    monkeypatch.setattr(ChannelPruner, "on_step", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.prune(*arguments, ignore=ignore)
    resumed = _experiment(tmp_path, checkpointed).prune(*arguments, ignore=ignore)
    steps = resumed["history"][-1]["step"]
    assert calls == 9 + steps - 5  # minibatches 6 to 8 were run again, 1 to 5 not
    straight = done[1]["taylor-fo-A"][0]
    for key in ("top1", "top1_after_pruning", "widths", "channels", "steps", "macs"):
        assert resumed[key] == straight[key], key
    assert [row["train_loss"] for row in resumed["history"]] == [row["train_loss"] for row in straight["history"]]


def test_statistics_of_a_cell(done: Any) -> None:
    folder, cells, _ = done
    experiment = _experiment(folder)
    made = {name: {0: dict(records[0])} for name, records in cells.items()}
    for name, values in {
        "taylor-fo-A": (91.0, 92.0, 93.5),
        "taylor-fo-A-scratch": (90.0, 90.5, 90.0),
        "tp:magnitude-A": (88.0, 90.0, 89.0),
    }.items():
        made[name] = {seed: {**cells[name][0], "top1": value} for seed, value in enumerate(values)}
    result = resnet20_table4.summarise(experiment, ("taylor-fo", "tp:magnitude"), (223, 119), made)
    rows = {(row["method"], row["prune"]): row for row in result["rows"]}
    row = rows["taylor-fo", "A"]
    assert {key: row["pruned"][key] for key in ("n", "mean", "sd", "low", "high")} == summary([91.0, 92.0, 93.5])
    assert row["pruned_minus_scratch"] == summary([1.0, 1.5, 3.5])
    assert rows["tp:magnitude", "A"]["pruned_minus_taylor-fo"] == summary([-3.0, -2.0, -4.5])
    assert rows["taylor-fo", "B"]["pruned"]["n"] == 1


def test_page_has_the_numbers_of_the_result_and_no_others(done: Any, tmp_path: Path) -> None:
    result = json.loads(json.dumps({"preset": "tiny", **done[2]}))
    text = resnet20_table4.render(result)
    rows = [line for line in text.splitlines() if line.startswith("| taylor-fo")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    ours = {row["prune"]: row for row in result["rows"] if row["method"] == "taylor-fo"}
    expected = ["taylor-fo"]
    for label, paper in (("A", ("91.52 ± 0.11", "89.56 ± 0.19")), ("B", ("89.78 ± 0.18", "88.17 ± 0.22"))):
        expected += [f"{ours[label]['pruned']['mean']:.2f}", "-", f"{ours[label]['scratch']['mean']:.2f}", *paper]
    assert cells == expected
    for reduction in result["reductions"]:
        assert f"- {reduction}" in text
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        row["pruned"]["mean"] = 12.345
    assert "12.35" in resnet20_table4.render(changed) or "12.34" in resnet20_table4.render(changed)
    pytest.importorskip("matplotlib")
    resnet20_table4.plot(result, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_equal_numbers_give_an_equal_figure(done: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("first.svg", "second.svg"):
        resnet20_table4.plot(done[2], tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_every_reduction_is_stated() -> None:
    assert reductions(FULL) == []
    assert (FULL.base.epochs, FULL.base.lr, FULL.base.decay_epochs, FULL.base.decay_rate) == (200, 0.1, 80, 0.1)
    assert (FULL.finetune.epochs, FULL.finetune.lr, FULL.finetune.decay_epochs) == (70, 0.1, 20)
    assert (FULL.channels, FULL.every, FULL.seeds, FULL.images) == (10, 30, 10, None)
    stated = {text.partition(":")[0] for text in reductions(REDUCED)}
    assert "images: 20000 instead of all" in reductions(REDUCED)
    assert {"dataset", "images", "base.epochs", "finetune.epochs", "every", "batch_size", "seeds"} <= stated
    assert PRESETS["reduced"].scratch.epochs == 3
    assert FULL.scratch.epochs == 270
    assert FULL.scratch.decay_epochs == pytest.approx(108)


def test_the_seeds_that_were_run_are_stated(done: Any) -> None:
    experiment = _experiment(done[0], replace(TINY, seeds=3))
    summed = resnet20_table4.summarise(experiment, ("taylor-fo",), (223, 119), done[1])
    assert "seeds: 1 instead of 10" in summed["reductions"]


def test_reduced_pruning_ends_before_the_first_fall_of_the_learning_rate() -> None:
    assert REDUCED.images is not None
    assert REDUCED.finetune.decay_epochs is not None
    minibatches = -(-(336 - 119) // REDUCED.channels) * REDUCED.every
    assert minibatches <= REDUCED.finetune.decay_epochs * (REDUCED.images // REDUCED.batch_size)


def test_a_schedule_that_cannot_end_is_refused_before_training(done: Any) -> None:
    experiment, ignore = _experiment(done[0]), resnet20_table4.all_but_first_layers(NETWORKS["resnet20"]())
    with pytest.raises(ScheduleError, match=r"takes 44 minibatches to get from 336 to 119 channels, training has 29"):
        experiment.prune("too-slow", 0, "taylor-fo", 119, Iterative(10, 2), ignore=ignore)
    assert not experiment.grid.done("too-slow")


def test_an_unknown_method_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(CriterionError, match="taylor-fo"):
        resnet20_table4.fill(_experiment(tmp_path), ("taylor-fo", "tailor-fo"), (0,), (223,))
    assert not list(tmp_path.iterdir())


def test_random_scores_are_of_the_seed() -> None:
    assert [create_criterion("random", seed).seed for seed in (0, 3)] == [0, 3]


def test_a_costly_criterion_sees_the_last_minibatch_alone() -> None:
    criterion = create_criterion("taylor-fo", 0)
    seen: list[Any] = []
    criterion.update = lambda batch, loss_scale: seen.append(batch)
    scorer = LastMinibatchScorer(criterion)
    model = NETWORKS["resnet20"](in_chans=1)
    for minibatch in range(1, 7):
        scorer.update(model, (), due=minibatch % 3 == 0, batch=minibatch)
    assert seen == [3, 6]
    scorer.close()


def test_schedules_reach_the_same_number_of_channels(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules_fig6, "POINTS", 5)  # one in five of the 29 minibatches
    experiment = _experiment(done[0])
    cells = schedules_fig6.fill(experiment, "taylor-fo", (0,), 0.5, 100.0)
    result = json.loads(json.dumps({"method": "taylor-fo", **schedules_fig6.summarise(experiment, cells)}))
    assert [row["schedule"] for row in result["rows"]] == list(schedules_fig6.SCHEDULES)
    assert [row["channels"]["mean"] for row in result["rows"]] == [224, 224, 224]
    assert result["channels_before"] == 448
    more = schedules_fig6.summarise(_experiment(done[0], replace(TINY, seeds=3)), cells)
    assert "seeds: 1 instead of 10" in more["reductions"]
    assert [row["over"] for row in result["rows"]] == [1, 1, 1]
    assert [cells[name][0]["steps"] for name in schedules_fig6.SCHEDULES] == [1, 23, 23]
    # A threshold that no loss exceeds makes continuous pruning the same as iterative.
    assert cells["continuous"][0]["widths"] == cells["iterative"][0]["widths"]
    curve = result["rows"][1]["curve"]
    left = [point["channels"]["mean"] for point in curve]
    assert [point["step"] for point in curve] == list(range(5, 29, 5))
    assert left == [max(448 - 10 * step, 224) for step in range(5, 29, 5)]
    text = schedules_fig6.render(result)
    assert f"| iterative | {result['rows'][1]['top1']['mean']:.2f} | - | 0.00 |" in text
    pytest.importorskip("matplotlib")
    schedules_fig6.plot(result, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_a_threshold_that_is_never_met_is_reported(done: Any) -> None:
    experiment = _experiment(done[0])
    schedule = schedules_fig6.schedule_of(experiment, "continuous", 0, 1e-9)
    record = experiment.prune("never", 0, "taylor-fo", 0.5, schedule)
    assert (record["over"], record["channels"], record["top1_after_pruning"]) == (False, 448, None)


def test_threshold_is_of_the_base_network(done: Any) -> None:
    experiment = _experiment(done[0])
    loss = done[1]["base"][0]["history"][-1]["train_loss"]
    schedule = schedules_fig6.schedule_of(experiment, "continuous", 0, 1.25)
    assert schedule.loss_threshold == pytest.approx(1.25 * loss)  # type: ignore[union-attr]
    assert schedules_fig6.schedule_of(experiment, "single step", 0, 1.25) == OneShot(1)


def test_options_go_to_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: Any
) -> None:
    given: dict[str, Any] = {}

    def fill(experiment: Experiment, methods: Any, seeds: Any, targets: Any, **others: Any) -> dict[str, Any]:
        given.update(preset=experiment.preset, methods=methods, seeds=seeds, data_dir=experiment.data_dir)
        return {}

    monkeypatch.setattr(resnet20_table4, "fill", fill)
    monkeypatch.setattr(resnet20_table4, "summarise", lambda *_: done[2])
    folders = ["--output", str(tmp_path / "json"), "--docs", str(tmp_path / "docs")]
    options = ["--preset", "full", "--seeds", "0,1,2", "--methods=taylor-fo,oracle", "--data-dir", str(tmp_path)]
    command_line.main(["resnet20_table4", *folders, *options])
    expected = {"preset": FULL, "seeds": (0, 1, 2), "methods": ("taylor-fo", "oracle"), "data_dir": tmp_path}
    assert given == expected
    result = json.loads((tmp_path / "json" / "resnet20_table4.json").read_text())
    assert str(tmp_path) not in result["command"]
    assert result["command"].endswith("--preset full --seeds 0,1,2 --methods=taylor-fo,oracle --data-dir D")
    page = tmp_path / "docs" / "resnet20_table4.md"
    assert resnet20_table4.render(result) in page.read_text()
    page.unlink()
    given.clear()
    command_line.main(["resnet20_table4", "--render", *folders])
    assert page.exists()
    assert given == {}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["no_such"], "unknown benchmark 'no_such'"),
        (["resnet20_table4", "--methods", "tailor-fo", "--folder", "F"], "Unknown method 'tailor-fo'"),
        (["resnet20_table4", "--seeds", "x"], "seeds"),
        (["resnet20_table4", "--render", "--output", "F"], "run the benchmark first"),
        (["scoring_overhead", "--preset", "full"], "preset"),
    ],
)
def test_bad_options_are_refused(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main([str(tmp_path) if word == "F" else word for word in words])
    assert stopped.value.code == 2
    assert re.search(re.escape(text), " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("name", command_line.BENCHMARKS)
def test_every_benchmark_says_what_its_options_mean(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main([name, "--help"])
    assert stopped.value.code == 0
    assert name in capsys.readouterr().out
