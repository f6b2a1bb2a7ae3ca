"""`prune` from end to end on real digits, by every schedule, and what it writes."""

import json
import re
import signal

import pytest
import safetensors.torch
import torch
import yaml

from nni_plugin import MACs, PruningPlan, count
from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.training import evaluate
from nni_plugin.checkpoint import from_pretrained

FILES = ["config.json", "metrics.json", "model.safetensors", "plan.json", "report.html"]
PROMISED = {
    "method", "model", "dataset", "seed", "baseline", "pruned",
    "top1_before_finetune", "parity_max_abs", "removed", "seconds",
}  # fmt: skip
TRAINED = ["--pretrain-epochs", "3", "--epochs", "2"]


@pytest.fixture(scope="module")
def digits():
    return create_loaders("digits", batch_size=256, img_size=8)


def _metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_exports_of_the_network_that_was_there_before_are_named(command, small, tmp_path):
    for name in ("model.onnx", "resnet20.txt", "resnet18.txt"):
        (tmp_path / name).write_text("of an earlier network")
    said = command(*small, "--macs", "0.5", "--output", tmp_path)
    assert said.code == 0, said.err
    assert f"model.onnx and resnet20.txt in {tmp_path} are of the network that was there before" in said.out
    assert (tmp_path / "model.onnx").read_text() == "of an earlier network"


@pytest.mark.parametrize(
    ("schedule", "extra"),
    [
        ("one-shot", []),
        ("iterative", ["--model-ema"]),
        ("continuous", ["--loss-threshold", "9"]),
        ("continuous", ["--loss-threshold", "9", "--prune-every", "2", "--prune-channels", "150"]),
    ],
)
def test_from_end_to_end(command, small, tmp_path, digits, schedule, extra):
    output = tmp_path / "out"
    said = command(*small, "--macs", "0.5", "--schedule", schedule, *TRAINED, *extra, "--output", output)
    assert said.code == 0, said.err
    assert said.err == ""
    assert sorted(path.name for path in output.iterdir()) == FILES

    metrics = _metrics(output)
    assert set(metrics) >= PROMISED
    for part in ("baseline", "pruned"):
        assert set(metrics[part]) == {"top1", "macs", "params", "latency_ms"}
        assert set(metrics[part]["latency_ms"]) == {"1"}
        assert metrics[part]["latency_ms"]["1"] > 0
    assert set(metrics["removed"]) == {"channels", "blocks"}
    assert set(metrics["seconds"]) == {"score", "plan", "surgery", "finetune"}
    assert all(value >= 0 for value in metrics["seconds"].values())
    assert (metrics["method"], metrics["model"], metrics["dataset"], metrics["seed"]) == (
        "taylor-fo", "resnet20", "digits", 0,
    )  # fmt: skip
    assert metrics["parity_max_abs"] <= 1e-4
    assert metrics["settings"]["budget"] == "MACs(ratio=0.5)"
    assert "timed in turns" in " ".join(said.out.split())
    assert 0 <= metrics["top1_before_finetune"] <= 100

    plan = PruningPlan.from_json((output / "plan.json").read_text())
    assert plan.channels_removed == metrics["removed"]["channels"] > 0
    assert plan.model == create_model("resnet20", "nni_plugin").nni_plugin_identity

    # The folder alone gives the network of the metrics.
    example = torch.zeros(1, *digits.input_shape)
    dense = count(create_model("resnet20", "nni_plugin"), example)
    model = from_pretrained(output)
    cost = count(model, example)
    assert (cost.macs, cost.params) == (metrics["pruned"]["macs"], metrics["pruned"]["params"])
    assert (dense.macs, dense.params) == (metrics["baseline"]["macs"], metrics["baseline"]["params"])
    assert 0.45 * dense.macs < cost.macs <= 0.5 * dense.macs
    assert plan.cost_before == dense
    assert plan.cost_after == cost
    assert evaluate(model, digits.test, "cpu")["top1"] == metrics["pruned"]["top1"]

    html = (output / "report.html").read_text()
    assert re.search(r"<script|https?://(?!www\.w3\.org)", html) is None
    assert str(metrics["seed"]) in html
    assert "nni-plugin prune --library nni_plugin --model resnet20 --img-size 8" in html
    assert f"from_pretrained({str(output)!r})" in said.out
    assert f"{plan.channels_removed} of {plan.channels_removed + plan.channels_kept} coupled channels" in said.out


def test_same_command_same_result(command, small, tmp_path, pruned):
    output = tmp_path / "again"
    said = command(*small, "--pretrain-epochs", "1", "--macs", "0.5", "--output", output)
    assert said.code == 0
    for name in ("plan.json", "model.safetensors"):
        assert (output / name).read_bytes() == (pruned / name).read_bytes()


def test_other_seed_other_result(command, small, tmp_path, pruned):
    output = tmp_path / "other"
    assert command(*small, "--pretrain-epochs", "1", "--macs", "0.5", "--seed", "1", "--output", output).code == 0
    assert (output / "model.safetensors").read_bytes() != (pruned / "model.safetensors").read_bytes()
    assert _metrics(output)["seed"] == 1


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (["--params", "0.4"], lambda size, plan: size["pruned"]["params"] <= 0.4 * size["baseline"]["params"]),
        (["--channels", "200"], lambda size, plan: plan.channels_kept == 200),
        (["--channels", "0.5"], lambda size, plan: plan.channels_kept == plan.channels_removed),
    ],
)
def test_other_budgets(command, small, tmp_path, budget, kept):
    output = tmp_path / "out"
    said = command(*small, *budget, "--output", output)
    assert said.code == 0, said.err
    assert "random weights" in said.err  # nothing was trained, which is said
    assert kept(_metrics(output), PruningPlan.from_json((output / "plan.json").read_text()))


def test_trained_weights_as_checkpoint(command, small, tmp_path, digits):
    """A network trained elsewhere gives the baseline it had there."""
    model = create_model("resnet20", "nni_plugin")
    torch.manual_seed(3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "dense.safetensors")
    arguments = ["--checkpoint", tmp_path / "dense.safetensors", "--macs", "0.7", "--output", tmp_path / "out"]
    said = command(*small, *arguments)
    assert said.code == 0
    assert said.err == ""
    assert _metrics(tmp_path / "out")["baseline"]["top1"] == evaluate(model, digits.test, "cpu")["top1"]


def test_rounding_least_width_and_ignored_layers(command, small, tmp_path):
    output = tmp_path / "out"
    rules = ["--round-to", "8", "--min-channels", "16", "--ignore", "layer1.0.conv1,layer3.2.conv1"]
    assert command(*small, "--macs", "0.7", *rules, "--output", output).code == 0
    plan = PruningPlan.from_json((output / "plan.json").read_text())
    widths = {group.name: (len(group.kept), group.total) for group in plan.groups}
    assert all(kept % 8 == 0 and kept >= 16 for kept, total in widths.values())
    assert "layer1.0.conv1" not in widths
    assert "layer3.2.conv1" not in widths


def test_results_of_an_earlier_run_are_replaced_and_other_files_stay(command, small, tmp_path):
    (tmp_path / "metrics.json").write_text("old")
    (tmp_path / "notes.txt").write_text("own")
    assert command(*small, "--macs", "0.5", "--output", tmp_path).code == 0
    assert _metrics(tmp_path)["model"] == "resnet20"
    assert (tmp_path / "notes.txt").read_text() == "own"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "notes.txt"])


def test_printed_configuration_can_be_given_back(command, small, tmp_path, pruned):
    arguments = [*small, "--pretrain-epochs", "1", "--macs", "0.5", "--output", tmp_path / "out"]
    said = command(*arguments, "--print_config")
    assert said.code == 0
    assert not (tmp_path / "out").exists()
    config = yaml.safe_load(said.out)
    assert (config["batch_size"], config["macs"], config["latency_batch_sizes"]) == (256, 0.5, [1])
    (tmp_path / "run.yaml").write_text(said.out)
    assert command("prune", "--config", tmp_path / "run.yaml").code == 0
    assert (tmp_path / "out" / "plan.json").read_bytes() == (pruned / "plan.json").read_bytes()


def test_flags_go_before_the_configuration_file(command, small, tmp_path):
    (tmp_path / "run.yaml").write_text("macs: 0.9\nseed: 4\n")
    said = command(*small, "--config", tmp_path / "run.yaml", "--macs", "0.6", "--output", tmp_path / "out")
    assert said.code == 0
    metrics = _metrics(tmp_path / "out")
    assert metrics["seed"] == 4
    assert metrics["pruned"]["macs"] <= MACs(0.6).ratio * metrics["baseline"]["macs"]


def test_unfinished_schedule_is_said_and_the_budget_is_met_all_the_same(command, small, tmp_path, request):
    slow = ["--schedule", "continuous", "--loss-threshold", "1e-9", "--epochs", "1"]
    request.addfinalizer(lambda: signal.alarm(0))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(30)  # a loop without an end is a failure, not a test that hangs
    said = command(*small, "--macs", "0.5", "--pretrain-epochs", "1", *slow, "--output", tmp_path / "out")
    assert said.code == 0, said.err
    assert "was not over" in said.err
    metrics = _metrics(tmp_path / "out")
    assert metrics["pruned"]["macs"] <= 0.5 * metrics["baseline"]["macs"]


def test_flags_of_training_without_any_are_named(command, small, tmp_path):
    said = command(*small, "--macs", "0.5", "--mixup", "0.2", "--model-ema", "--output", tmp_path / "idle")
    assert said.code == 0
    warnings = [line for line in said.err.splitlines() if "changes nothing" in line]
    assert len(warnings) == 1
    assert "--mixup, --model-ema changes nothing: give --epochs" in warnings[0].replace(
        "--model-ema, --mixup", "--mixup, --model-ema"
    )
    said = command(*small, "--macs", "0.5", "--mixup", "0.2", "--epochs", "1", "--output", tmp_path / "trained")
    assert "changes nothing" not in said.err
    assert "random" in (tmp_path / "idle" / "report.html").read_text()
