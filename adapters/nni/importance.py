"""NNI's built-in criteria by name, as scores of coupled channels.

NNI ranks the filters of one layer at a time and knows of no coupling. Whoever prunes channels by it has to choose the
layer whose word counts for all that are coupled, and here that is the first one that writes the channel: the group's
root. The metric of a layer is what NNI's own calculators return (`nni.compression.pruning.tools`), on weights `w`:

    nni:l1      sum over a filter of |w|, as L1NormPruner             nni:l2   its L2 norm, as L2NormPruner
    nni:fpgm    sum of the L2 distances to the layer's other filters, as FPGMPruner
    nni:taylor  mean over minibatches of the sum over a filter of (g w)^2, as TaylorPruner, which trains meanwhile;
                here the network stays as it is
    nni:level   LevelPruner ranks single weights and has no score for a channel; told to work by output channels
                (`granularity: out_channel`) it gives the same numbers as nni:l1
    nni:slim    |gamma| of the batch normalisation behind the first writer, as Network Slimming (ICCV 2017) ranks.
                SlimPruner instead trains an additional factor that starts at one for every channel, so before that
                training it has no order that could be compared

NNI takes dimension 0 of a weight for the outputs. Those of a transposed convolution lie elsewhere, and are taken from
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.bn_scale import BNScale
from nni_plugin.criteria.weight_criterion import WeightCriterion, layer_of, shares, weight_writers
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.tensors import kind_of, places_of


class NNINorm(WeightCriterion):
    """NNI's metric of the root layer's weights: `nni:l1`, `nni:l2`, `nni:fpgm` and, by output channels, `nni:level`.

    Args:
        metric: `"norm"` or `"fpgm"`.
        p: Order of the norm.

    Raises:
        CriterionError: NNI cannot be loaded.
    """

    def __init__(self, metric: Literal["norm", "fpgm"] = "norm", p: int = 1) -> None:
        _calculators()
        self.metric, self.p = metric, p
        super().__init__()

    def _weigh(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        layers = {member.path: layer_of(model, member) for member in weight_writers(group)}

        def metric(path: str) -> Tensor:
            return _metric(self.metric, self.p, path, _filters(layers[path], _weight(layers[path])))

        return _by_first_writer(group, metric)


class NNITaylor(Criterion):
    """NNI's Taylor metric of the root layer: mean over minibatches of the sum over a filter of (gradient * weight)^2.

    Raises:
        CriterionError: NNI cannot be loaded.
    """

    def __init__(self) -> None:
        _calculators()
        super().__init__()

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self._sums: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of each layer, in the shape of its filters."""
        return {**super().state_dict(), "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._sums = dict(state["sums"])

    def all_reduce(self) -> None:
        """Sum what every process collected."""
        super().all_reduce()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in self._sums.values():
                torch.distributed.all_reduce(total)

    @torch.no_grad()
    def _gather(self, model: nn.Module) -> None:
        found = False
        for path, layer in model.named_modules():
            gradient = getattr(getattr(layer, "weight", None), "grad", None)
            if gradient is None or kind_of(layer) not in ("dense", "depthwise", "embedding"):
                continue
            term = _filters(layer, (_weight(layer) * gradient).double().square())
            self._sums[path] = self._sums[path] + term if path in self._sums else term
            found = True
        if not found:
            raise CriterionError("nni:taylor found no gradient: call update() after backward().")

    @torch.no_grad()
    def _score(self, group: ChannelGroup) -> Tensor:
        def metric(path: str) -> Tensor:
            if path not in self._sums:
                raise CriterionError(f"Layer {path!r} had no gradient to collect; is it frozen, or was it cut since?")
            return _metric("norm", 1, path, self._sums[path] / self.minibatches)

        return _by_first_writer(group, metric)


def _by_first_writer(group: ChannelGroup, metric: Callable[[str], Tensor]) -> Tensor:
    """Return for each channel of a group the metric of the first layer that writes it, given the layer's path."""
    scores = torch.zeros(group.width, dtype=torch.float64)
    for member, index, channel in shares(group, weight_writers(group), False, "layer with weights that writes them"):
        scores[channel] = metric(member.path)[index]
    return scores


def _calculators() -> tuple[Any, Any, Any]:
    """Load NNI, which takes seconds the first time; return its two calculators and its class of blocks."""
    try:
        from nni.compression.pruning.tools import fpgm_metrics, norm_metrics
        from nni.compression.utils.scaling import Scaling
    except ImportError as error:
        raise CriterionError(
            f'NNI cannot be loaded ({error}); criteria that begin with nni: need pip install "nni-plugin[nni]".'
        ) from error
    return norm_metrics, fpgm_metrics, Scaling


def _metric(which: str, p: int, path: str, filters: Tensor) -> Tensor:
    """Return NNI's metric of the filters of one layer, `[outputs]`, by NNI's own calculator."""
    norm, fpgm, scaling = _calculators()
    # What the calculators ask of a target is only how its weights fall into blocks: one block a row.
    space = SimpleNamespace(_scaler=scaling([1], kernel_padding_mode="back", kernel_padding_val=-1))
    calculate = fpgm if which == "fpgm" else norm
    found: Tensor = calculate(p, {path: {"weight": filters}}, {path: {"weight": space}})[path]["weight"]
    return found.flatten().cpu()


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


def _filters(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Return a tensor of the shape of a layer's weight as one row an output channel, in float64."""
    place = next(place for place in places_of(layer, "out") if place.tensor == "weight")
    tensor = tensor.double()
    if place.period is None:
        return tensor.movedim(place.dim, 0).flatten(1)
    assert isinstance(layer, _ConvNd)  # transposed and grouped: each group has `period` outputs
    rows = tensor.reshape(layer.groups, tensor.shape[0] // layer.groups, place.period, -1)
    return rows.transpose(1, 2).reshape(layer.groups * place.period, -1)


IMPORTANCES: dict[str, Callable[[], Criterion]] = {
    "nni:l1": NNINorm,
    "nni:l2": lambda: NNINorm(p=2),
    "nni:fpgm": lambda: NNINorm("fpgm", p=2),
    "nni:level": NNINorm,
    "nni:taylor": NNITaylor,
    "nni:slim": lambda: BNScale(joint=False),
}
