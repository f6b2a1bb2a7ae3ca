"""Layer importances by name: what `--method imprinting`, `layer-...` and `block-gate` stand for.

`layer-NAME` is the layer statistic of the criterion called NAME among the methods for channels. Of the stock ones
those that scale scores within a layer (by their mean, or LAMP's by their sum) are left out: they say nothing of layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from nni_plugin.criteria import BNScale, FeatureMap, Magnitude, TaylorFO
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.layers.base import LayerImportance
from nni_plugin.layers.block_gate import BlockGate
from nni_plugin.layers.ensemble import LayerEnsemble
from nni_plugin.layers.imprinting import Imprinting
from nni_plugin.layers.statistics import LayerStatistic
from nni_plugin.methods import METHODS, create_criterion

STOCK = (
    "tp:taylor-tuned", "tp:group-norm",
    "nni:l1", "nni:l2", "nni:fpgm", "nni:taylor", "nni:slim", "nni:level",
)  # fmt: skip
"""Criteria of Torch-Pruning and NNI whose scores compare between layers."""


class SquaredMagnitude(Magnitude):
    """The sum of the squared weights that write a channel; without the root, which tells in a mean over channels."""

    def _weigh(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        return super()._weigh(model, group).square()


def papers_ensemble() -> LayerEnsemble:
    """Build the ensemble of LayerPrune (Elkerdawy et al., ACCV 2020, arXiv 2007.05667).

    Its members are the layer statistics of Taylor on weights, the magnitude of weights, Taylor on feature maps, Taylor
    on gates and the scales of batch normalisations. The last needs batch normalisations in every block.
    """
    members = (
        TaylorFO("weight", "square-then-sum"),
        SquaredMagnitude(),
        FeatureMap(absolute="position"),
        TaylorFO(),
        BNScale(),
    )
    return LayerEnsemble(members)


def _statistic(method: str, seed: int) -> LayerStatistic:
    return LayerStatistic(create_criterion(method, seed))


LAYER_METHODS: dict[str, Callable[[int], LayerImportance]] = {
    "imprinting": lambda seed: Imprinting(),
    "block-gate": lambda seed: BlockGate(),
    "layer-ensemble": lambda seed: papers_ensemble(),
    **{f"layer-{method}": partial(_statistic, method) for method in (*METHODS, *STOCK)},
}
"""What builds each importance, called with a seed."""


def create_layer_importance(name: str, seed: int = 0) -> LayerImportance:
    """Build the layer importance of a method.

    Args:
        name: One of `LAYER_METHODS`.
        seed: Of importances that draw random numbers.

    Raises:
        CriterionError: There is no such method (the text has the closest names), or its library is not installed.
    """
    if name not in LAYER_METHODS:
        of_channels = [f"layer-{name}"] if f"layer-{name}" in LAYER_METHODS else []
        close = of_channels or difflib.get_close_matches(name, LAYER_METHODS, n=3) or sorted(LAYER_METHODS)
        raise CriterionError(f"Unknown layer importance {name!r}; did you mean {', '.join(close)}?")
    return LAYER_METHODS[name](seed)
