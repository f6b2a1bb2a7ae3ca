"""Follows NNI's test_fusion_compress.py: a distiller, a pruner made from it, a quantizer from that; one training."""

from pathlib import Path
from typing import Any

import nni.compression.pruning as of_nni
import pytest
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner
from nni.compression.quantization import LsqQuantizer, QATQuantizer
from referee import BY_DATA, BY_WEIGHTS, CONTROL_BY_DATA, CONVS, PRUNED, Case, slots

from nni_plugin.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")
INT8 = {"target_names": ["_input_", "weight", "_output_"], "quant_dtype": "int8", "quant_scheme": "symmetric"}
FUSED = {"fuse_names": [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]}


def distiller_of(case: Case) -> DynamicLayerwiseDistiller:
    teacher = Case(case.kind, case.folder).model
    config = [
        {"op_types": ["Linear"], "lambda": 0.75},
        {"op_names": [case.prefix + name for name in CONVS], "lambda": 0.75},
    ]
    return DynamicLayerwiseDistiller(case.model, config, case.evaluator, teacher, lambda batch, model: model(batch[0]))


@pytest.mark.parametrize("kind", ["pytorch", "lightning.pytorch"])
@pytest.mark.parametrize("pruner_type", slots(BY_DATA, CONTROL_BY_DATA))
def test_distiller_pruner_quantizer(kind: str, pruner_type: Any, tmp_path: Path) -> None:
    case = Case(kind, tmp_path)
    pruner = pruner_type.from_compressor(distiller_of(case), case.dependent_config, 10)
    config = [{"op_names": [case.prefix + name for name in (*PRUNED, "fc2")], **INT8}]
    quantizer = LsqQuantizer.from_compressor(pruner, config)
    _, scales = quantizer.compress(20, None)
    case.check_masks(pruner.get_masks())
    assert scales[f"{case.prefix}fc2"]["weight"]["scale"].numel() == 1


@pytest.mark.parametrize("pruner_type", slots(BY_WEIGHTS))
def test_pruners_of_weights_from_a_distiller(pruner_type: Any, tmp_path: Path) -> None:
    case = Case("pytorch", tmp_path)
    pruner = pruner_type.from_compressor(distiller_of(case), case.dependent_config)
    pruner.compress(4, None)
    case.finish(pruner, pruner.get_masks())


def test_a_schedule_from_a_distiller(tmp_path: Path) -> None:
    case = Case("pytorch", tmp_path)
    inner = BY_DATA["taylor"].from_compressor(distiller_of(case), case.config, 3)
    pruner = AGPPruner(inner, interval_steps=4, total_times=3)
    pruner.compress(12, None)
    case.finish(pruner, pruner.get_masks())


@pytest.mark.parametrize(
    "first", slots(BY_WEIGHTS, BY_DATA, {"l1": of_nni.L1NormPruner, "taylor": of_nni.TaylorPruner})
)
@pytest.mark.parametrize("second", slots(BY_WEIGHTS, BY_DATA))
def test_one_pruner_after_another(first: Any, second: Any, tmp_path: Path) -> None:
    """Each prunes its layers, whosever it is, in one training; what the first has masked stays."""
    case = Case("pytorch", tmp_path)
    linear, convs = case.config
    options = {} if first in (of_nni.L1NormPruner, *BY_WEIGHTS.values()) else {"training_steps": 6}
    if first is not of_nni.L1NormPruner:
        options["evaluator"] = case.evaluator
    one = first(case.model, [linear], **options)
    if first is of_nni.L1NormPruner:  # fused, NNI's would never make its masks
        one.compress()
    steps = {"training_steps": 6} if second in BY_DATA.values() else {}
    two = second.from_compressor(one, [convs], **steps, evaluator=case.evaluator)
    two.compress(12, None)
    case.finish(two, two.get_masks())


def test_a_layer_that_the_first_has_taken(tmp_path: Path) -> None:
    case = Case("pytorch", tmp_path)
    one = BY_WEIGHTS["l1"](case.model, case.config, case.evaluator)
    with pytest.raises(ConfigError, match="that the compressor it was made from has not configured already"):
        BY_DATA["taylor"].from_compressor(one, case.config, 6)


def test_quantizers_that_fold_normalisations_come_after_the_speedup(tmp_path: Path) -> None:
    """Our masks lie on normalisations as well, and NNI refuses to fold one that is wrapped."""
    case = Case("pytorch", tmp_path)
    pruner = BY_DATA["taylor"](case.model, case.config, case.evaluator, 6)
    config = [{"op_names": list(CONVS), **INT8, **FUSED}]
    with pytest.raises(ValueError, match="bn1 is wrapped"):
        QATQuantizer.from_compressor(pruner, config, quant_start_step=2)

    case = Case("pytorch", tmp_path)
    pruner = BY_DATA["taylor"](case.model, case.config, case.evaluator, 6)
    case.finish(pruner, pruner.compress()[1])
    QATQuantizer(case.model, config, case.evaluator_of(case.model), quant_start_step=2).compress(4, None)
    assert case.model.get_submodule("conv1").weight.shape[0] == 4
