"""Follows NNI's base/test_compressor.py, test_wrapper.py and test_setting.py: what masks do on wrapped layers.

The fused wrappers of base/test_fused_wrapper.py are in test_fusion.py.
"""

from pathlib import Path

import nni.compression.pruning as of_nni
import pytest
import torch
import torch.nn.functional as F
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.quantization import QATQuantizer
from referee import Case, Network, X
from torch import Tensor

from nni_plugin.errors import ConfigError
from nni_plugin.pruners import L1NormPruner, TaylorFOPruner

pytestmark = pytest.mark.filterwarnings("ignore")
TWO = [{"op_names": ["conv1", "fc1"], "target_names": ["weight", "bias"], "sparse_ratio": 0.4}]
INT8 = {"target_names": ["_input_", "weight", "_output_"], "quant_dtype": "int8", "quant_scheme": "affine"}


@pytest.mark.parametrize("pruner_type", [L1NormPruner, of_nni.L1NormPruner])
def test_masks_are_set_and_read(pruner_type: type) -> None:
    model = Network()
    pruner = pruner_type(model, TWO)
    given = {
        name: {"weight": torch.ones_like(layer.weight).detach(), "bias": torch.ones_like(layer.bias).detach()}
        for name, layer in (("conv1", model.conv1), ("fc1", model.fc1))
    }
    given["conv1"]["weight"][3] = 0
    pruner.update_masks(given)
    masks = pruner.get_masks()
    for name, targets in given.items():
        for target, mask in targets.items():
            assert torch.equal(masks[name][target], mask)
    masks["fc1"]["bias"].zero_()  # a copy
    assert bool(pruner.get_masks()["fc1"]["bias"].all())


def simulated(model: Network, masks: dict[str, dict[str, Tensor | None]]) -> Tensor:
    """What the plain network gives with its parameters multiplied by their masks."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for module, targets in masks.items():
        for target, mask in targets.items():
            if mask is not None:
                state[f"{module}.{target}"] *= mask
    return torch.func.functional_call(model, state, X)


@pytest.mark.parametrize("trains", [False, True])
def test_a_wrapped_network_is_the_plain_one_under_its_masks(trains: bool, tmp_path: Path) -> None:
    case = Case("pytorch", tmp_path)
    if trains:
        pruner = TaylorFOPruner(case.model, case.config, case.evaluator, 4)
    else:
        pruner = L1NormPruner(case.model, case.config, case.evaluator)
    model, masks = pruner.compress()
    model.eval()
    with torch.no_grad():
        got, stem = model(X), model.bn1(model.conv1(X))
        pruner.unwrap_model()
        assert torch.equal(got, simulated(model, masks))
    gone = masks["bn1"]["weight"] == 0
    assert int(gone.sum()) == 12
    assert not bool(stem[:, gone].any())  # masked with its normalisation: nothing is left of the channel, beta neither
    assert bool(stem[:, ~gone].any())


def test_input_and_output_channels_under_a_mask_by_hand() -> None:
    """A masked column of a weight is a zero input; a masked row leaves the bias, unless that is masked as well."""
    model = Network()
    pruner = L1NormPruner(model, [{"op_names": ["conv3"], "sparse_ratio": 0.5}], example_inputs=X)
    x = torch.rand(2, 16, 6, 6)
    weight, bias = torch.ones(32, 16, 3, 3), torch.ones(32)
    weight[:, 1], weight[2], weight[3], bias[3] = 0, 0, 0, 0
    pruner.update_masks({"conv3": {"weight": weight, "bias": bias}})
    got = model.conv3(x)
    pruner.unwrap_model()
    x[:, 1] = 0
    expected = F.conv2d(x, model.conv3.weight, model.conv3.bias)
    assert model.conv3.bias is not None
    expected[:, 2], expected[:, 3] = model.conv3.bias[2], 0
    assert torch.allclose(got, expected, atol=1e-6)


def test_wrappers_are_handed_on(tmp_path: Path) -> None:
    """A pruner's, then a quantizer's of one more layer, then a distiller's of another."""
    case = Case("pytorch", tmp_path)
    pruner = L1NormPruner(case.model, TWO, case.evaluator)
    wrapped = {"conv1", "bn1", "fc1"}
    assert set(pruner._module_wrappers) == wrapped
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_names": ["conv2", "fc1"], **INT8}], quant_start_step=2)
    assert set(quantizer._module_wrappers) == wrapped | {"conv2"}
    config = [{"op_names": ["conv3", "fc1"], "target_names": ["_output_"], "lambda": 0.1}]
    distiller = DynamicLayerwiseDistiller.from_compressor(
        quantizer, config, Network(), lambda batch, net: net(batch[0])
    )
    assert set(distiller._module_wrappers) == wrapped | {"conv2", "conv3"}
    names = {name for name, _ in Network().named_parameters()}
    distiller.unwrap_model()
    assert {name for name, _ in case.model.named_parameters()} == names


def test_settings_of_a_target_come_before_those_of_its_entry() -> None:
    entry = {"op_names": ["fc1"], "target_names": ["weight", "bias"], "sparse_ratio": 0.5}
    config = [{**entry, "target_settings": {"weight": {"sparse_ratio": 0.6}}}]
    _, masks = L1NormPruner(Network(), config, example_inputs=X).compress()
    assert float(masks["fc1"]["weight"].mean()) == pytest.approx(0.4)
    assert float(masks["fc1"]["bias"].mean()) == pytest.approx(0.4)  # follows its weight
    with pytest.raises(ConfigError, match=r"\['bias'\] asks for sparsity of 'bias'"):  # a ratio of its own, in NNI's
        L1NormPruner(Network(), [{**entry, "target_settings": {"bias": {"sparse_ratio": 0.6}}}], example_inputs=X)
