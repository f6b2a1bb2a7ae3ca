"""Layer by layer, weights of a pruned network that give back the dense network's outputs, by least squares.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, Sec. 3.1 (Eq. 5), for whichever
channels a plan has removed; Frantar & Alistarh, "Optimal Brain Compression", NeurIPS 2022, do the like for single
weights. In the order of the forward pass each dense layer solves `min |X W - Y|^2 + ridge |W - W_0|^2`: `X` what the
pruned network (mended so far) feeds it, `Y` what the same layer of the dense network gives for the same images, at
positions drawn at random; the ridge pulls towards the present weights and is chosen on rows held out.

Cost: one forward pass of both networks where they can be traced and what is alive between two layers fits in memory
for all images (:mod:`nni_plugin.side_by_side`), else about `layers / 2`; one linear system of `inputs * kernel`
unknowns a layer. No labels, no gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from nni_plugin.adapters.torch_pruning import find_groups, kept_outputs
from nni_plugin.adapters.torch_pruning.blocks import channel_part
from nni_plugin.adapters.torch_pruning.surgery import check_fit
from nni_plugin.cost import on_device_of
from nni_plugin.criteria.gates import accumulable
from nni_plugin.criteria.traced import CannotReplayError
from nni_plugin.errors import DataError, PlanError, SurgeryError
from nni_plugin.held_out import same_batch
from nni_plugin.layers.removal import find_removal
from nni_plugin.plan import PruningPlan
from nni_plugin.renumbering import Renumbering
from nni_plugin.side_by_side import SideBySide
from nni_plugin.tensors import holders

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What the ridge is chosen from, in units of the mean square of the inputs."""


EXACT = 1024
"""Most inputs of a layer for which sums over rows are in double precision; above, that would be what takes the time."""


@torch.no_grad()
def reconstruct(
    pruned: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    *,
    positions: int = 10,
    seed: int = 0,
    memory: int = 4 * 2**30,
) -> dict[str, float]:
    """Re-solve the weights of a pruned network's dense layers, in place.

    Args:
        pruned: The compact network, as `plan.apply` or a pruner left it. Weights and biases of plain `nn.Linear` and
            ungrouped `nn.Conv2d` layers change, nothing else; layers of other classes (weight standardisation,
            padding of their own), called twice, or with shared weights stay as they are.
        dense: The network it was cut from; unchanged.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs, to trace the dense network with.
        batches: Minibatches that can be gone through again, the same each time (neither shuffled nor augmented at
            random); a few thousand images do. Labels are not used.
        forward: `forward(model, batch)` runs a network.
        positions: Output positions drawn of each image and layer.
        seed: Of the positions.
        memory: Bytes for values of all images side by side, for both networks.

    Returns:
        By layer the share of the squared error that is left on held-out rows; 1 where the weights stay. Before training
        on, give normalisations the statistics of what they read now, and filters their lengths:
        `nni_plugin.anchor_batchnorm`, then `nni_plugin.restore_filter_norms`.

    Raises:
        DataError: There is no minibatch, they are others each time, or what a layer reads or gives is not finite.
        PlanError: The pruned network has no plan, or it does not fit the dense one.
        SurgeryError: A layer does not see the same in both networks. The weights are what they were, as always.
    """
    plan = getattr(pruned, "pruning_plan", None)
    if plan is None:
        raise PlanError("The pruned network has no pruning_plan: apply one with plan.apply(model, example_inputs).")
    if iter(batches) is batches:
        raise DataError("batches can be gone through only once: give a list or a loader. The model is unchanged.")
    if not same_batch(next(iter(batches), None), next(iter(batches), None)):
        raise DataError(
            "batches are others each time, but both networks must see the same images: give a list, or a loader that "
            "neither shuffles nor augments at random. The model is unchanged."
        )
    kept, names = what_stays(plan, dense, on_device_of(dense, example_inputs))
    modes = {module: module.training for network in (pruned, dense) for module in network.modules()}
    left: dict[str, float] = {}
    before = [(parameter, parameter.clone()) for _, layer in _solvable(pruned) for parameter in layer.parameters()]
    try:
        pruned.eval()
        dense.eval()
        layers = _order(pruned, batches, forward)
        here = SideBySide(pruned, layers, batches, forward, memory // 2)
        there = SideBySide(dense, [names.before(path) for path in layers], batches, forward, memory // 2)
        sizes = [_samples(batch) for batch in batches]
        for path in tqdm(layers, desc="reconstruct", unit="layer", delay=2, disable=None, leave=False):
            pairs = zip(here.inputs(path), there.outputs(names.before(path)), sizes, strict=True)
            rows, targets = _rows(pruned.get_submodule(path), path, kept.get(path), pairs, positions, seed)
            left[path] = _solve(pruned.get_submodule(path), rows, targets)
    except BaseException as error:
        for parameter, values in before:
            parameter.copy_(values)
        if isinstance(error, CannotReplayError):
            raise SurgeryError(f"The networks cannot be run side by side: {error}. The model is unchanged.") from error
        raise
    finally:
        for module, training in modes.items():
            module.training = training
    return left


def what_stays(plan: PruningPlan, dense: nn.Module, example_inputs: Any) -> tuple[dict[str, Tensor], Renumbering]:
    """Return the outputs kept by layer, under the names of the pruned network, and the way to the dense one's."""
    removal, rest, network = None, plan, dense
    with torch.enable_grad():
        if plan.removed_blocks:
            removal, network = find_removal(dense, plan.removed_blocks, example_inputs), copy.deepcopy(dense)
            removal.perform(network)
            rest, groups = channel_part(plan, removal, dense, network, example_inputs)
        else:
            groups = find_groups(dense, example_inputs)
    check_fit(rest, groups)
    return kept_outputs(network, rest, groups), Renumbering(()) if removal is None else removal.names


def _solvable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers whose output is their own weight times what they read."""
    held = holders(model)
    return [
        (path, layer)
        for path, layer in model.named_modules()
        if (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1))
        and all(held[id(parameter)] == 1 for parameter in layer.parameters())
    ]


def _order(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> list[str]:
    """Return the layers to solve in the order in which they run, those that run once, on an argument by position."""
    calls: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: calls.extend([path] * bool(args)))
        for path, layer in _solvable(model)
    ]
    try:
        batch = next(iter(batches), None)
        if batch is None:
            raise DataError("There is no minibatch to reconstruct outputs on. The model is unchanged.")
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in calls if calls.count(path) == 1]


def _rows(
    layer: nn.Module,
    path: str,
    kept: Tensor | None,
    pairs: Iterable[tuple[Tensor, Tensor, int]],
    positions: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Draw from what a layer reads in the pruned network and gives in the dense one, `[rows, inputs or outputs]`."""
    generator = torch.Generator().manual_seed(seed)
    width = len(layer.get_parameter("weight"))
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for x, y, samples in pairs:
        y = y if kept is None else y.index_select(1 if isinstance(layer, _ConvNd) else -1, kept.to(y.device))
        if isinstance(layer, nn.Conv2d):
            at = torch.randint(y.shape[2] * y.shape[3], (positions,), generator=generator).tolist()
            inputs.append(_patches(layer, x, at, y.shape[3]))
            outputs.append(torch.cat([y[:, :, i // y.shape[3], i % y.shape[3]] for i in at]))
        else:
            x, y = x.flatten(0, -2), y.flatten(0, -2)
            if len(x) > positions * samples:
                at_rows = torch.randperm(len(x), generator=generator)[: positions * samples].to(x.device)
                x, y = x[at_rows], y[at_rows]
            inputs.append(x)
            outputs.append(y)
        if len(inputs[-1]) != len(outputs[-1]) or outputs[-1].shape[1] != width:
            raise SurgeryError(f"Layer {path!r} does not give the same outputs in both networks.")
    rows, targets = accumulable(torch.cat(inputs)), accumulable(torch.cat(outputs))
    if rows.shape[1] <= EXACT:
        rows, targets = rows.double(), targets.double()
    if not bool(torch.isfinite(rows).all() and torch.isfinite(targets).all()):
        raise DataError(f"What layer {path!r} reads or gives is not finite: look at the data.")
    return rows, targets


def _samples(batch: Any) -> int:
    """Return the length of the first tensor of a minibatch."""
    first = batch if isinstance(batch, Tensor) else next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(first)


def _patches(layer: nn.Conv2d, x: Tensor, at: list[int], width: int) -> Tensor:
    """Return the windows that a convolution reads for these output positions, `[positions * N, inputs * kernel]`."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    (sy, sx), (dy, dx), (ky, kx) = layer.stride, layer.dilation, layer.kernel_size
    windows = []
    for i in at:
        top, start = i // width * sy, i % width * sx
        windows.append(x[:, :, top : top + (ky - 1) * dy + 1 : dy, start : start + (kx - 1) * dx + 1 : dx].flatten(1))
    return torch.cat(windows)


def _solve(layer: nn.Module, rows: Tensor, targets: Tensor) -> float:
    """Put the least-squares weights into a layer where they are better on held-out rows; return the error left."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    start = weight.detach().to(rows).flatten(1)
    if isinstance(bias, Tensor):
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        start = torch.cat([start, bias.detach().to(rows)[:, None]], 1)
    held_out = torch.arange(len(rows), device=rows.device) >= len(rows) * 4 // 5  # the last images
    missing = targets - rows @ start.T
    before = float(missing[held_out].square().sum())
    fitted = _LeastSquares(rows[~held_out], missing[~held_out])
    errors = {ridge: float((missing[held_out] - rows[held_out] @ fitted(ridge)).square().sum()) for ridge in RIDGES}
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < before:
        return 1.0
    new = start + fitted.extended(rows[held_out], missing[held_out])(best).T
    if isinstance(bias, Tensor):
        bias.copy_(new[:, -1])
        new = new[:, :-1]
    weight.copy_(new.reshape(weight.shape))
    return errors[best] / before


class _LeastSquares:
    """Ridge regression for any ridge, by the smaller of its two linear systems, which is set up once.

    Sums over rows are in the precision of the rows, systems are solved in double precision.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.wide = x.shape[1] > len(x)
        self.gram = x @ x.T if self.wide else x.T @ x
        self.right = y if self.wide else x.T @ y

    def extended(self, x: Tensor, y: Tensor) -> _LeastSquares:
        """Return the problem with further rows."""
        both = torch.cat([self.x, x]), torch.cat([self.y, y])
        if self.wide:
            return _LeastSquares(*both)
        other = copy.copy(self)
        other.x, other.y = both
        other.gram, other.right = self.gram + x.T @ x, self.right + x.T @ y
        return other

    def __call__(self, ridge: float) -> Tensor:
        """Return the solution, `[inputs, outputs]`, for a ridge in units of the mean square of the inputs."""
        system = self.gram.to(torch.float64, copy=True)
        system.diagonal().add_(ridge * float(self.x.double().square().sum()) / self.x.shape[1] + 1e-12)
        solution = torch.cholesky_solve(self.right.double(), torch.linalg.cholesky(system)).to(self.x)
        return self.x.T @ solution if self.wide else solution
