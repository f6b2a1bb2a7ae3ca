"""One model through all checks; and each check finds what it is there to find."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nni_plugin.adapters.torch_pruning import Parity
from nni_plugin.budgets import MACs
from nni_plugin.coverage import check
from nni_plugin.coverage.check import Verdict, Wanted, check_model
from nni_plugin.coverage.listing import Case
from nni_plugin.errors import GraphError, SurgeryError

CASE = Case("nni_plugin", "resnet20")


def tried(folder: Path, macs: float = 0.5, case: Case = CASE) -> tuple[Verdict, dict[str, float], list[str]]:
    numbers: dict[str, float] = {}
    done: list[str] = []

    def note(doing: str, found: Any) -> None:
        done.append(doing)
        numbers.update(found)

    return check_model(case, Wanted(macs, device="cpu"), folder, note), numbers, done


def test_a_network_that_can_be_pruned(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    verdict, numbers, done = tried(tmp_path)
    assert verdict == Verdict("ok")
    assert 0.49 <= numbers["macs_ratio"] <= 0.5
    assert 0 <= numbers["parity_max_rel"] < 1e-5
    assert done[0] == "building it"
    assert done[-1] == "saving and loading it"
    assert (tmp_path / "model.safetensors").is_file()
    assert tried(tmp_path)[1] == numbers
    torch.random.set_rng_state(state)


def test_the_seed_decides(tmp_path: Path) -> None:
    found = [check._plan(*_model(seed), Wanted(0.5, seed)).plan.digest for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def _model(seed: int) -> tuple[nn.Module, torch.Tensor]:
    model, shape = check._network(CASE, Wanted(0.5, seed, "cpu"))
    return model, torch.zeros(1, *shape)


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    verdict, numbers, _ = tried(tmp_path, case=Case("timm", "resnet20"))
    assert verdict.status == "refused"
    assert "resnet20" in verdict.reason
    assert numbers == {}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (GraphError("The channels of layer 'layer1.0.conv1'\ncannot be followed."), "refused"),
        (GraphError("Nothing in ResNet may be pruned. layer1.0.conv1: no reason"), "refused"),
        (GraphError("The channels of some layer cannot be followed, be it 'head' or conv"), "failed"),
    ],
)
def test_a_refusal_names_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def plan(*_: object) -> None:
        raise error

    monkeypatch.setattr(check, "plan_channels", plan)
    verdict, _, done = tried(tmp_path)
    assert verdict.status == status
    assert "\n" not in verdict.reason
    assert done[-1] == "planning"
    assert ("without naming a module" in verdict.reason) == (status == "failed")


def test_a_budget_out_of_reach_names_what_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check.find_groups
    monkeypatch.setattr(check, "find_groups", lambda *a: [replace(group, fixed="no reason") for group in found(*a)])
    verdict, _, _ = tried(tmp_path, macs=1e-6)
    assert verdict.status == "refused"
    assert verdict.reason.startswith("Group 'conv1' is left whole: no reason; ")
    assert "more. MACs(ratio=1e-06) allows" in verdict.reason


def test_errors_that_are_not_ours_are_not_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "plan_channels", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tried(tmp_path)


def test_an_error_of_ours_after_planning_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object, **__: object) -> None:
        raise SurgeryError("Layer 'conv1' does not run.")

    monkeypatch.setattr(check, "apply_plan", cut)
    verdict, numbers, _ = tried(tmp_path)
    assert verdict == Verdict("failed", "SurgeryError: Layer 'conv1' does not run.")
    assert set(numbers) == {"parity_max_rel"}


def test_another_output_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "verify", lambda *_, **__: Parity(1.0, 0.5, 1e-4))
    verdict, _, _ = tried(tmp_path)
    assert verdict.status == "failed"
    assert "NOT EQUAL" in verdict.reason


def test_too_few_or_too_many_macs_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = check.plan_channels
    for ratio in (0.45, 0.55):

        def other(*arguments: Any, ratio: float = ratio) -> Any:
            warnings.warn("Group 'conv1' is left whole: no reason", stacklevel=2)
            return plan(*arguments[:-1], MACs(ratio))

        monkeypatch.setattr(check, "plan_channels", other)
        verdict, numbers, _ = tried(tmp_path)
        assert verdict.status == "failed"
        assert "asked for 0.5 within 2%; Group 'conv1' is left whole: no reason" in verdict.reason
        assert numbers["macs_ratio"] == pytest.approx(ratio, abs=0.01)


def test_what_stays_whole_is_told_of_an_ok_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = check.plan_channels

    def warned(*arguments: Any) -> Any:
        for number in range(5):
            warnings.warn(f"Group 'layer{number}' is left whole: no reason.", stacklevel=2)
        return plan(*arguments)

    monkeypatch.setattr(check, "plan_channels", warned)
    verdict, _, _ = tried(tmp_path)
    assert verdict.status == "ok"
    assert verdict.reason.startswith("Group 'layer0' is left whole: no reason; Group 'layer1'")
    assert verdict.reason.endswith("; and 2 more")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_lost_gradient_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    cut = check.apply_plan

    class Detach(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach() if self.training == (mode == "train") else x

    def lossy(model: Any, *arguments: Any, **options: Any) -> None:
        cut(model, *arguments, **options)
        model.conv1.register_forward_hook(lambda layer, _, output: Detach().train(layer.training)(output))

    monkeypatch.setattr(check, "apply_plan", lossy)
    verdict, _, _ = tried(tmp_path)
    assert verdict.status == "failed"
    assert f"no finite gradient of 'conv1.weight' in {mode} mode" in verdict.reason


def test_an_output_that_is_not_finite_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = check.apply_plan

    def spoilt(model: Any, *arguments: Any, **options: Any) -> None:
        cut(model, *arguments, **options)
        model.bn1.running_var.fill_(-1.0)

    monkeypatch.setattr(check, "apply_plan", spoilt)
    verdict, _, _ = tried(tmp_path)
    assert verdict == Verdict("failed", "an output of the pruned network is not finite in eval mode")


def test_a_tensor_that_comes_back_otherwise_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = check.from_pretrained

    def nearly(*arguments: Any, **options: Any) -> nn.Module:
        model = load(*arguments, **options)
        weight: torch.Tensor = next(model.parameters()).data
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
        return model

    monkeypatch.setattr(check, "from_pretrained", nearly)
    verdict, _, _ = tried(tmp_path)
    assert verdict == Verdict("failed", "tensor 'conv1.weight' is another one once saved and loaded")


def test_an_output_that_comes_back_otherwise_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = check.from_pretrained

    def shifted(*arguments: Any, **options: Any) -> nn.Module:
        model = load(*arguments, **options)
        model.register_forward_hook(lambda _, __, output: output * (1 + 1e-6))
        return model

    monkeypatch.setattr(check, "from_pretrained", shifted)
    verdict, _, _ = tried(tmp_path)
    assert verdict == Verdict("failed", "the outputs are not the same bit by bit once saved and loaded")
