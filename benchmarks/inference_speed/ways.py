"""Ways to run a network: each makes of it something that can be called, at a batch that stays the same.

    eager          as it is, in the memory format that torch starts from
    channels-last  weights and images in channels-last order
    compile        torch.compile, its defaults, for this batch alone
    onnx           exported (:mod:`nni_plugin.adapters.export`) and run by ONNX Runtime on torch's own memory

Eager passes leave normalisations as they are; ONNX Runtime folds them into the convolutions when it loads a file.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nni_plugin.adapters.export import export_onnx
from nni_plugin.errors import ModelError

_TOLERANCE = 2e-2
"""Largest difference allowed between ways, over the largest output: TF32 of GPUs keeps three digits, layer by layer."""

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network that is ready to run.

    Attributes:
        run: Makes one pass, and returns the output.
        seconds: What it took to get ready: to copy, to compile (which the first pass does), to export and load.
        difference: Largest one of the first image's output from the eager one, over the largest value of that.
    """

    run: Callable[[], Tensor]
    seconds: float
    difference: float


def prepare(way: str, network: nn.Module, images: Tensor, threads: int) -> Prepared:
    """Get a network ready.

    Args:
        way: Of `WAYS`.
        network: In eval mode, where the images are; itself untouched.
        images: The batch, `[N, C, H, W]`.
        threads: CPU threads of a runtime that has its own.

    Raises:
        ModelError: It cannot run that way here, or its outputs are others.
    """
    try:
        if way == "compile":
            _start_compiler(images.device)
        begun = time.perf_counter()
        run = WAYS[way](network, images, threads)
        with torch.inference_mode():
            output = run()
        seconds = time.perf_counter() - begun
    except Exception as error:  # compilers and runtimes raise anything
        raise ModelError(f"{way}: this network does not run that way here ({error}); choose others: --ways") from error
    with torch.inference_mode():
        expected = network(images[:1]).double()
    difference = float((output[:1].double() - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:  # so that NaN fails too
        raise ModelError(
            f"{way}: the output differs from the eager one by {difference:.1e} of its largest value, allowed are "
            f"{_TOLERANCE:.0e}. Its time would say nothing; choose other ways: --ways"
        )
    return Prepared(run, seconds, difference)


def _eager(network: nn.Module, images: Tensor, threads: int) -> Callable[[], Tensor]:
    return lambda: network(images)


def _channels_last(network: nn.Module, images: Tensor, threads: int) -> Callable[[], Tensor]:
    network = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    return lambda: network(images)


def _compiled(network: nn.Module, images: Tensor, threads: int) -> Callable[[], Tensor]:
    # All networks share one forward(): without isolation the ninth would run uncompiled, or be refused.
    # torch's own overloads know nothing of that argument.
    compiled = torch.compile(network, fullgraph=True, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
    return lambda: compiled(images)


def _onnx(network: nn.Module, images: Tensor, threads: int) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(network, images[:1], path, batch_sizes=(1, 2))
        session = onnxruntime.InferenceSession(path, options, providers=_providers(images.device))
    if session.get_providers()[0] not in _providers(images.device):  # it falls back to the CPU without an error
        raise ModelError(f"ONNX Runtime uses {session.get_providers()[0]} for a network on {images.device}")
    device = {"device_type": images.device.type, "device_id": images.device.index or 0, "element_type": np.float32}
    [of_input], [of_output] = session.get_inputs(), session.get_outputs()
    output = torch.empty(len(images), *of_output.shape[1:], device=images.device)
    binding = session.io_binding()
    for bind, node, tensor in ((binding.bind_input, of_input, images), (binding.bind_output, of_output, output)):
        bind(name=node.name, shape=tuple(tensor.shape), buffer_ptr=tensor.data_ptr(), **device)
    held = images, output  # the runtime knows their addresses alone

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return held[1]

    return run


WAYS = {"eager": _eager, "channels-last": _channels_last, "compile": _compiled, "onnx": _onnx}


def missing(way: str, device: torch.device) -> str | None:
    """Say why a way cannot be taken on a device at all; None where it can be tried."""
    if way != "onnx":
        return None
    try:
        import onnxruntime
    except ImportError:
        return 'ONNX Runtime is not installed: pip install "nni-plugin[export]"'
    wanted = _providers(device)[0]
    here = onnxruntime.get_available_providers()
    return None if wanted in here else f"ONNX Runtime {onnxruntime.__version__} has no {wanted} here"


def _providers(device: torch.device) -> list[str]:
    return ["CUDAExecutionProvider"] if device.type == "cuda" else ["CPUExecutionProvider"]


@contextlib.contextmanager
def cold_compiler() -> Iterator[None]:
    """Let torch.compile find nothing of earlier calls, so that the time it takes is that of a first one."""
    before = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[_CACHE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[_CACHE]
            else:
                os.environ[_CACHE] = before


@functools.cache
def _start_compiler(device: torch.device) -> None:
    """Compile something small, once a process: the first network does not pay for the compiler's own start."""
    small = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU()).to(device).eval()
    with torch.inference_mode():
        torch.compile(small)(torch.zeros(1, 1, 4, 4, device=device))
