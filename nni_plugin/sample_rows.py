"""Whether the rows of a network's activations are its samples.

Scores of single samples take row `n` of every activation, or its windows in turn, for sample `n`. A network that holds
sequences first (`[L, N, C]`, as torch's transformer layers do by default) breaks that, and where `L` is a multiple of
`N` no shape says so: then the network is run on two and on three samples, on a copy, and rows must grow alike.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_plugin.cost import tensors_in
from nni_plugin.errors import CriterionError

_FEW = (2, 3)
"""Numbers of samples of which no other divides one."""


def in_doubt(shape: Sequence[int], samples: int, channel_dim: int) -> bool:
    """Tell whether a shape may be `[positions, samples, channels]` as well as one with a sample a row.

    Args:
        shape: Of an activation.
        samples: Number of samples in the minibatch.
        channel_dim: The dimension that holds channels.

    Example:
        >>> in_doubt((16, 8, 32), 8, -1), in_doubt((8, 16, 32), 8, -1), in_doubt((8, 8, 4, 4), 8, 1)
        (True, False, False)
    """
    return len(shape) > 2 and shape[1] == samples > 1 and channel_dim % len(shape) != 1


def check_rows(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Refuse layers whose rows do not grow with the number of samples.

    Args:
        model: The network; it is not run, a copy without its hooks is.
        args: What it is called with, a sample a row.
        kwargs: Likewise, by name.
        paths: Names of the layers.

    Raises:
        CriterionError: A layer reads or gives something else than rows of samples.
    """
    rows: dict[str, list[list[int]]] = {path: [] for path in paths}
    try:
        with _without_hooks(model):
            network = copy.deepcopy(model).eval()
        for path, noted in rows.items():
            network.get_submodule(path).register_forward_hook(_noting(noted), with_kwargs=True)
        _run_on_few(network, args, kwargs)
    except Exception as error:  # whatever a network of the user's raises
        raise CriterionError(
            f"At this batch size the shape of {next(iter(rows))!r} does not say whether its rows are samples, and the "
            f"network cannot be tried on fewer ({error}). Take minibatches of another size. The model is unchanged."
        ) from error
    for path, seen in rows.items():
        calls = len(seen) // 2
        for of_two, of_three in zip(seen[:calls], seen[calls:], strict=True):
            if any(2 * three != 3 * two for two, three in zip(of_two, of_three, strict=True)):
                raise CriterionError(
                    f"{path!r} does not hold a sample a row: of 2 samples it has {of_two} rows, of 3 {of_three}. Is "
                    "the network sequence-first, [L, N, C]? Scores of single samples need the samples in the first "
                    "dimension throughout: build it with batch_first=True, or take a criterion of whole minibatches. "
                    "The model is unchanged."
                )


def _run_on_few(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    whole = next(len(tensor) for tensor in tensors_in([list(args), dict(kwargs)]) if tensor.dim() > 0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for number in _FEW:

            def fewer(tensor: Tensor, number: int = number) -> Tensor:
                of_samples = tensor.dim() > 0 and len(tensor) == whole
                return tensor[torch.arange(number, device=tensor.device) % whole] if of_samples else tensor

            given = tree_map_only(Tensor, fewer, (tuple(args), dict(kwargs)))
            network(*given[0], **given[1])


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Put the hooks of a network aside for a while: some hold what cannot be copied."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for module, kind, _ in hooks:
            setattr(module, kind, OrderedDict())
        yield
    finally:
        for module, kind, own in hooks:
            setattr(module, kind, own)


def _noting(rows: list[list[int]]) -> Any:
    """Return a hook that notes the rows of a layer's first input and its first output."""

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        ends = (next(iter(tensors_in(end)), None) for end in ([list(args), dict(kwargs)], output))
        rows.append([len(tensor) for tensor in ends if tensor is not None and tensor.dim() > 0])

    return note
