"""From identity and plan to a network of the saved shapes: build the dense one and cut it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from nni_plugin.adapters.models import build
from nni_plugin.adapters.torch_pruning import apply_plan
from nni_plugin.checkpoint.files import refusing
from nni_plugin.errors import CheckpointError
from nni_plugin.plan import ModelIdentity, PruningPlan
from nni_plugin.sample_inputs import Sample, zeros
from nni_plugin.wrappers import checked_network

MAX_ELEMENTS = 2**33  # of a dense network: dinov3_7b fits


def rebuild(
    identity: ModelIdentity,
    plan: PruningPlan | None,
    sample: Sample | None,
    tensors: int,
    model: nn.Module | None = None,
) -> nn.Module:
    """Build the dense network on the CPU, or copy the given one, and cut it; the global random state stays.

    Args:
        identity: How to build it.
        plan: What to cut, if anything.
        sample: Form of one sample, to trace it with; needed with a plan.
        tensors: How many tensors were saved; a network with far more is not built to its end.
        model: A dense network to copy in place of building one.

    Raises:
        CheckpointError: It cannot be built or cut, is far too big, or the plan is another model's.
    """
    what = f"The network {identity.library}/{identity.name[:80]!r} cannot be rebuilt"
    todo = "load it with the versions it was saved with, or save it again with a fitting plan"
    cpu = torch.device("cpu")  # whatever the user's default device is
    with refusing(what, todo), torch.inference_mode(False), cpu, torch.random.fork_rng(devices=[]):
        if model is None:
            note = _bound(4 * tensors + 1000)
            with register_module_parameter_registration_hook(note), register_module_buffer_registration_hook(note):
                network = build(identity)
        else:
            network = copy.deepcopy(checked_network(model)).cpu()
            if getattr(network, "pruning_plan", None) is not None:
                raise CheckpointError(
                    f"Expected a dense {identity.name!r} as model=, got one that is pruned already; build it afresh."
                )
        network.eval()
        if plan is not None:
            if sample is None:
                raise CheckpointError("Expected the shape of one sample beside the plan, got none; save it again.")
            if plan.model is not None and identity.library != "custom" and _name(plan.model) != _name(identity):
                raise CheckpointError(
                    f"Expected a plan for {_name(identity)}, got one for another model, {_name(plan.model)}; {todo}."
                )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The plan removes nothing")
                apply_plan(network, plan, zeros(sample, next(network.parameters()).dtype), check=False)
        network.nni_plugin_identity = identity  # type: ignore[assignment]
    return network


def _bound(tensors: int) -> Callable[[nn.Module, str, Tensor | None], None]:
    """Return a hook that stops a builder of this thread at so many tensors, or at :data:`MAX_ELEMENTS`."""
    thread, left = threading.get_ident(), [tensors, MAX_ELEMENTS]

    def note(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and threading.get_ident() == thread:
            left[:] = left[0] - 1, left[1] - tensor.numel()
            if min(left) < 0:
                raise CheckpointError(
                    f"Expected the network that was saved, got one with far more tensors, or more than {MAX_ELEMENTS} "
                    "elements; save it again."
                )

    return note


def _name(identity: ModelIdentity) -> str:
    """Return library and architecture, without a tag of published weights."""
    return repr(f"{identity.library}/{identity.name.partition('.')[0]}"[:100])
