"""Second-order Taylor criteria: the Hessian of the loss over joint gates, by double backward.

Removing gate `m` (z: 1 -> 0) changes the loss by `-g_m + 1/2 H_mm` to second order, `g` and `H` the gradient and the
Hessian over all joint gates at `z = 1`.

- Taylor-SO (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, Eq. 7, here on gates):
  `I_m = (g_m - 1/2 (H 1)_m)^2` with the row sum of the Hessian, or `(g_m - 1/2 H_mm)^2` with its diagonal alone,
  which is the exact change of a quadratic loss. Squared per minibatch, then averaged.
- OBD (LeCun et al., "Optimal Brain Damage", 1990): `1/2 H_mm`, the network taken as trained to a minimum, `g = 0`.

No gate needs to be built. A gate scales the parameters it lies on, `w_p(z) = w_p z_m`, and `z_m z_k` where a weight is
written under one gate and read under another. Along a direction `v` the weights move by `u_p = w_p (v_m + v_k)`, and
one Hessian-vector product over weights gives the one over gates,

    (H v)_m = sum_p w_p (H_ww u)_p + sum_{p on m and k} w_p g_p v_k.

The last term is the curvature of `w(z)` itself: it couples two different gates, never one with itself, and is exact.
Row sums need one product. The diagonal needs one a gate (`samples=None`), or is estimated without bias as
`mean_s v_s (H v_s)` over random signs (Hutchinson 1990), which depend on the seed and on the minibatch: whichever
process it comes to, and as the how-manieth, it gets the same.

Cost: the backward pass records its own graph (about twice its time, and its activations); a product costs about
another two backward passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin.cost import tensors_in
from nni_plugin.criteria.first_order import no_gradient, parameters_of, per_channel
from nni_plugin.criteria.gate_criterion import GateCriterion, Sums
from nni_plugin.criteria.gate_reader import Gates
from nni_plugin.criteria.gates import GateLayout, accumulable
from nni_plugin.errors import CriterionError
from nni_plugin.processes import rank

Hessian = Literal["row", "diagonal"]

_SHOWN = 4096
"""About so many values of each tensor of a minibatch tell it from others."""


class _SecondOrder(GateCriterion):
    """Base of the criteria that need the Hessian over joint gates; collects `g` and curvature of each minibatch.

    Args:
        gates: Where the gate lies, see :class:`GateCriterion`.
        samples: Random vectors a minibatch for the diagonal; None: the exact diagonal, one product a gate.
        seed: Of the random vectors. Those of one minibatch are the same in every process where `update(batch)` is
            given it.
    """

    needs_graph = True
    needs_groups = True

    def __init__(self, gates: Gates, samples: int | None, seed: int) -> None:
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise CriterionError(
                f"samples must be a whole number above 0, or None for the exact diagonal: {samples!r}."
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise CriterionError(f"seed must be a whole number, got {seed!r}.")
        self.vectors, self.seed = samples, seed
        super().__init__(gates)

    def _gather(self, model: nn.Module) -> None:
        assert self._layout is not None
        try:
            hessian = GateHessian(model, self._layout, loss_scale=self.loss_scale)
            self._accumulate(self._statistics(torch.stack([hessian.gradient, self._curvature(hessian)])))
        finally:  # a gradient with a graph keeps the whole minibatch alive, in a circle through its parameter
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.detach()

    def _curvature(self, hessian: GateHessian) -> Tensor:
        """Return what stands for the curvature of each gate: its diagonal entry, shape `[gates]`."""
        if self.vectors is None:
            return hessian.diagonal()
        return hessian.estimated_diagonal(self.vectors, f"{self.seed}:{self._minibatch()}")

    def _minibatch(self) -> str:
        """Return what tells this minibatch from others: some of its values, or else who has seen it, and when."""
        shown = [tensor.detach().flatten() for tensor in tensors_in(self._batch)]
        shown = [values[:: max(len(values) // _SHOWN, 1)].double().cpu() for values in shown if not values.is_complex()]
        if not any(map(len, shown)):
            return f"{rank()}:{self.minibatches}"
        found = hashlib.sha256(b"".join(values.numpy().tobytes() for values in shown)).hexdigest()
        self._times[found] = self._times.get(found, 0) + 1  # the same minibatch once more draws anew
        return f"{found}:{self._times[found]}"

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self._times: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums collected, and which minibatches have been seen."""
        return {**super().state_dict(), "times": dict(self._times)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._times = dict(state["times"])


class TaylorSO(_SecondOrder):
    """Squared second-order loss change of removing a channel, with the true Hessian.

    Args:
        gates: Where the gate lies, see :class:`GateCriterion`.
        hessian: `"diagonal"`: the gate's own curvature. `"row"`: the sum of its row, as the paper has it, which
            lets every other gate speak as if it were removed as well.
        samples: Random vectors a minibatch for the diagonal; None: the exact diagonal, one product a gate. Squares of
            an estimate count its noise too; the mean change that `loss_changes` gives does not.
        seed: Of the random vectors.

    Collecting needs the groups, and `loss.backward(create_graph=True)`; gradients have no graph after `update()`. A
    gradient scaler must have unscaled gradients in place, as PyTorch's does, and `update` be told its scale.
    """

    def __init__(
        self, gates: Gates = "auto", hessian: Hessian = "diagonal", samples: int | None = 8, seed: int = 0
    ) -> None:
        if hessian not in ("row", "diagonal"):
            raise CriterionError(f"hessian must be 'row' or 'diagonal', got {hessian!r}.")
        self.hessian = hessian
        super().__init__(gates, samples, seed)

    @property
    def predicts(self) -> bool:  # type: ignore[override]
        """Whether `conclude` predicts the loss change: a row sum is nobody's removal."""
        return self.hessian == "diagonal"

    def _curvature(self, hessian: GateHessian) -> Tensor:
        return hessian.row_sums() if self.hessian == "row" else super()._curvature(hessian)

    def _statistics(self, joint: Tensor) -> Sums:
        gradient, curvature = joint
        change = 0.5 * curvature - gradient
        return {"changes": change, "squares": change.square()}

    def _changes(self, mean: Sums) -> Tensor | None:
        return mean["changes"] if self.hessian == "diagonal" else None

    def _scores(self, mean: Sums) -> Tensor:
        return mean["squares"]


class OBD(_SecondOrder):
    """Optimal Brain Damage on joint gates: half the curvature of the loss.

    Args:
        gates: Where the gate lies, see :class:`GateCriterion`.
        signed: Keep the sign, so that channels of negative curvature go first; otherwise the absolute value scores.
        samples: Random vectors a minibatch; None: the exact diagonal, one product a gate.
        seed: Of the random vectors.

    What it needs of the backward pass is what :class:`TaylorSO` needs.
    """

    predicts = True

    def __init__(self, gates: Gates = "auto", signed: bool = False, samples: int | None = 8, seed: int = 0) -> None:
        self.signed = signed
        super().__init__(gates, samples, seed)

    def _statistics(self, joint: Tensor) -> Sums:
        return {"changes": 0.5 * joint[1]}

    def _changes(self, mean: Sums) -> Tensor:
        return mean["changes"]

    def _scores(self, mean: Sums) -> Tensor:
        return mean["changes"] if self.signed else mean["changes"].abs()


class GateHessian:
    """The Hessian of one minibatch's loss over all joint gates, known by its products with vectors.

    Args:
        model: The network, with gradients that `loss.backward(create_graph=True)` left.
        layout: The gates.
        loss_scale: What the loss was multiplied with, where gradients were unscaled in place since.

    Attributes:
        gradient: `dE/dz`, shape `[gates]`, float32 or float64.

    Raises:
        CriterionError: A parameter has no gradient, or gradients have no graph.
    """

    def __init__(self, model: nn.Module, layout: GateLayout, *, loss_scale: float = 1.0) -> None:
        self._layout, self._scale = layout, loss_scale
        self._reads = [
            (i, parameter, layer, place)
            for i, member in enumerate(layout.members)
            for parameter, layer, place in parameters_of(model, member)
        ]
        for i, parameter, _, place in self._reads:
            if parameter.grad is None:
                path = layout.members[i].path
                raise no_gradient(path if path == place.tensor else f"{path}.{place.tensor}")
        if not any(p.grad is not None and p.grad.requires_grad for p in model.parameters()):
            raise CriterionError(
                "Gradients have no graph to differentiate again: call loss.backward(create_graph=True) before update()."
            )
        for i, parameter, _, _ in self._reads:
            if parameter.grad is not None and not parameter.grad.requires_grad:
                raise CriterionError(
                    f"The gradient of {layout.members[i].path!r} has no graph to differentiate again, while others "
                    "have one. Gradient checkpointing hides it: call checkpoint(..., use_reentrant=False)."
                )
        # One weight may be read twice: by the layer that writes one group and reads another.
        self._weights = {id(parameter): parameter for _, parameter, _, _ in self._reads}
        self._values = {key: accumulable(parameter.detach()) for key, parameter in self._weights.items()}
        self._first = {
            key: self._values[key] * accumulable(parameter.grad.detach())
            for key, parameter in self._weights.items()
            if parameter.grad is not None
        }
        self.gradient = self._joint([self._first[id(parameter)] for _, parameter, _, _ in self._reads])

    def times(self, v: Tensor) -> Tensor:
        """Return `H v`.

        Args:
            v: A direction over gates, shape `[gates]`.

        Raises:
            CriterionError: An operator of the network has no second derivative.
        """
        spread = self._spread(v)
        moved: dict[int, Tensor] = {}
        for (_, parameter, _, _), along in zip(self._reads, spread, strict=True):
            moved[id(parameter)] = moved.get(id(parameter), 0) + along
        curved = self._curved({key: self._values[key] * along for key, along in moved.items()})
        products = []
        for (_, parameter, _, _), along in zip(self._reads, spread, strict=True):
            key = id(parameter)
            others = self._first[key] * (moved[key] - along)
            products.append(others + self._values[key] * curved[key] if key in curved else others)
        return self._joint(products)

    def row_sums(self) -> Tensor:
        """Return `H 1`, shape `[gates]`."""
        return self.times(torch.ones_like(self.gradient))

    def diagonal(self) -> Tensor:
        """Return the diagonal, shape `[gates]`, one product a gate."""
        found = torch.zeros_like(self.gradient)
        for m in range(len(found)):
            v = torch.zeros_like(found)
            v[m] = 1
            found[m] = self.times(v)[m]
        return found

    def estimated_diagonal(self, vectors: int, seed: str) -> Tensor:
        """Return an unbiased estimate of the diagonal, shape `[gates]`, from random signs drawn on the CPU."""
        found = torch.zeros_like(self.gradient)
        for v in _signs(vectors, len(found), seed):
            v = v.to(found)
            found += v * self.times(v)
        return found / vectors

    def _joint(self, products: list[Tensor]) -> Tensor:
        """Sum one product for each read, shaped as its parameter, over what belongs to each gate."""
        terms: list[Tensor | None] = [None] * len(self._layout.members)
        for (i, _, layer, place), product in zip(self._reads, products, strict=True):
            term, before = per_channel(product, layer, place), terms[i]
            terms[i] = term if before is None else before + term
        return self._layout.joint([term for term in terms if term is not None])

    def _spread(self, v: Tensor) -> list[Tensor]:
        """Return for each read the gates' entries of `v` spread over its parameter: the transpose of `_joint`."""
        with torch.enable_grad():
            products = [torch.zeros_like(self._values[id(p)], requires_grad=True) for _, p, _, _ in self._reads]
            return list(torch.autograd.grad(self._joint(products), products, v))

    def _curved(self, moved: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return `H_ww u` of the weights; those missing on which no gradient depends."""
        keys = list(self._weights)
        outputs = [
            (w.grad, moved[key]) for key, w in self._weights.items() if w.grad is not None and w.grad.requires_grad
        ]
        if not outputs:
            return {}
        try:
            found = torch.autograd.grad(
                [gradient for gradient, _ in outputs],
                [self._weights[key] for key in keys],
                [u.to(gradient.dtype) for gradient, u in outputs],
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "is not implemented" not in str(error) and "once_differentiable" not in str(error):
                raise
            raise CriterionError(
                f"The network has an operator without a second derivative ({error}). For fused attention, run the "
                "forward pass inside `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`; "
                "otherwise choose a criterion of first order, or Taylor-Fisher."
            ) from error
        return {key: accumulable(h) / self._scale for key, h in zip(keys, found, strict=True) if h is not None}


def _signs(vectors: int, size: int, seed: str) -> Iterator[Tensor]:
    """Yield random vectors of `-1` and `1`, float32, the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(_digest(seed))
    for _ in range(vectors):
        yield torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


def _digest(text: str) -> int:
    """Return 63 bits of a text, alike everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
