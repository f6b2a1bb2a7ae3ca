"""Leave PyTorch: ONNX and torch.export files with a dynamic batch, each proven before it is kept.

An exported file is loaded again and run at several batch sizes on inputs that the tracer never saw. It
takes its final name only when its outputs agree with PyTorch's; otherwise nothing is left behind.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from nni_plugin.errors import ExportError

_Tensors = tuple[torch.Tensor, ...]
_Run = Callable[[_Tensors], list[torch.Tensor]]
# Above this the exporter splits off the weights into a second file, which no rename could replace at once.
_LARGEST_ONNX_BYTES = 1536 * 2**20
_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class ExportParity:
    """How far an exported network is from the PyTorch one, over all batch sizes and outputs.

    Attributes:
        path: Where the file is.
        format: `onnx` or `torch-export`.
        batch_sizes: Batch sizes compared, images per pass.
        max_abs: Largest absolute difference of an output element.
        max_rel: Largest absolute difference of an output, divided by that output's largest magnitude.
        tolerance: Bound that `max_rel` had to meet.
    """

    path: Path
    format: str
    batch_sizes: tuple[int, ...]
    max_abs: float
    max_rel: float
    tolerance: float

    def __str__(self) -> str:
        """Return one sentence for a terminal or a report."""
        sizes = " and ".join(str(n) for n in self.batch_sizes)
        return (
            f"{self.path.name} agrees with PyTorch at batch {sizes}: largest difference "
            f"{self.max_abs:.2e} absolute, {self.max_rel:.2e} relative (allowed {self.tolerance:.0e})."
        )


def export_onnx(
    model: nn.Module,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    path: str | os.PathLike[str],
    *,
    batch_sizes: Sequence[int] = (1, 4),
    tolerance: float = 1e-4,
) -> ExportParity:
    """Write an ONNX file with a dynamic batch and check it in ONNX Runtime on the CPU.

    Args:
        model: Network; itself untouched, since a copy in eval mode on the CPU is exported.
        example_inputs: The network's positional inputs, each of shape (N, ...) with N at least 1.
        path: File to write, in a folder that exists.
        batch_sizes: Values of N to compare at, each at least 1.
        tolerance: Largest difference allowed, relative to an output's largest magnitude.

    Returns:
        The differences found.

    Raises:
        ExportError: A package is missing, the weights are too large for one file, the network cannot be
            exported, the file cannot be written, or its outputs differ; no file is left, and one that
            was there before stays.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _require(name)
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if size > _LARGEST_ONNX_BYTES:
        raise ExportError(
            f"{type(model).__name__} holds {size / 2**20:.0f} MiB of weights; one ONNX file takes at most "
            f"{_LARGEST_ONNX_BYTES / 2**20:.0f} MiB. Use export_torch, or export in half precision."
        )
    copied, inputs = _on_cpu(model, example_inputs, batch_sizes)

    def write(target: Path) -> None:
        program = torch.onnx.export(
            copied, inputs, dynamo=True, dynamic_shapes=_batch_is_dynamic(inputs), verbose=False
        )
        assert program is not None  # by the documentation of dynamo=True
        program.save(target)

    def load(target: Path) -> _Run:
        runtime = _require("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        session = runtime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]

        def run(batch: _Tensors) -> list[torch.Tensor]:
            feeds = {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, feeds)]

        return run

    return _export("onnx", copied, inputs, Path(path), batch_sizes, tolerance, write, load)


def export_torch(
    model: nn.Module,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    path: str | os.PathLike[str],
    *,
    batch_sizes: Sequence[int] = (1, 4),
    tolerance: float = 1e-4,
) -> ExportParity:
    """Write a `torch.export` program with a dynamic batch and check it after loading it again.

    Args:
        model: Network; itself untouched, since a copy in eval mode on the CPU is exported.
        example_inputs: The network's positional inputs, each of shape (N, ...) with N at least 1.
        path: File to write, in a folder that exists; `.pt2` is the usual suffix.
        batch_sizes: Values of N to compare at, each at least 1.
        tolerance: Largest difference allowed, relative to an output's largest magnitude.

    Returns:
        The differences found.

    Raises:
        ExportError: The network cannot be exported, the file cannot be written, or its outputs differ;
            no file is left, and one that was there before stays.
    """
    copied, inputs = _on_cpu(model, example_inputs, batch_sizes)

    def write(target: Path) -> None:
        program = torch.export.export(copied, inputs, dynamic_shapes=_batch_is_dynamic(inputs))
        with target.open("wb") as file:
            torch.export.save(program, file)

    def load(target: Path) -> _Run:
        with target.open("rb") as file:
            program = torch.export.load(file).module()
        return lambda batch: _tensors_in(program(*batch))

    return _export("torch-export", copied, inputs, Path(path), batch_sizes, tolerance, write, load)


def _export(
    format_name: str,
    model: nn.Module,
    inputs: _Tensors,
    path: Path,
    batch_sizes: Sequence[int],
    tolerance: float,
    write: Callable[[Path], None],
    load: Callable[[Path], _Run],
) -> ExportParity:
    """Write under another name, compare, and only then give the file its own name."""
    if not path.parent.is_dir():
        raise ExportError(f"Cannot export to {path}: there is no folder {path.parent}. Make it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _quiet():
            try:
                write(temporary)
                run = load(temporary)
            except Exception as error:  # exporters raise whatever they like
                raise ExportError(
                    f"{type(model).__name__} cannot be exported as {format_name}: {_first_line(error)}"
                ) from error
            max_abs, max_rel = _compare(format_name, model, run, inputs, batch_sizes)
        if not max_rel <= tolerance:  # so that NaN fails too
            raise ExportError(
                f"The {format_name} file of {type(model).__name__} differs from PyTorch: expected at most "
                f"{tolerance:.1e} relative, got {max_rel:.1e} ({max_abs:.1e} absolute). No file was kept."
            )
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"Cannot write {path}: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return ExportParity(path, format_name, tuple(batch_sizes), max_abs, max_rel, tolerance)


def _compare(
    format_name: str, model: nn.Module, run: _Run, inputs: _Tensors, batch_sizes: Sequence[int]
) -> tuple[float, float]:
    """Return the largest absolute and relative difference over batch sizes and outputs."""
    max_abs = max_rel = 0.0
    for batch_size in batch_sizes:
        batch = _batch_of(inputs, batch_size)
        try:
            with torch.inference_mode():
                expected = _tensors_in(model(*batch))
        except Exception as error:  # a forward pass may raise anything
            raise ExportError(
                f"{type(model).__name__} itself fails at batch size {batch_size}: {_first_line(error)}. "
                "Check the example inputs. No file was kept."
            ) from error
        try:
            got = run(batch)
        except Exception as error:  # runtimes raise whatever they like
            raise ExportError(
                f"The {format_name} file of {type(model).__name__} does not run at batch size "
                f"{batch_size}: {_first_line(error)}. No file was kept."
            ) from error
        if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in expected]:
            raise ExportError(
                f"The {format_name} file of {type(model).__name__} gives outputs of shape "
                f"{[tuple(t.shape) for t in got]} at batch size {batch_size}, expected "
                f"{[tuple(t.shape) for t in expected]}. No file was kept."
            )
        for ours, theirs in zip(expected, got, strict=True):
            difference, scale = _largest(ours.double() - theirs.double()), _largest(ours.double())
            relative = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
            if difference != difference:  # NaN would be lost in max()
                return difference, difference
            max_abs, max_rel = max(max_abs, difference), max(max_rel, relative)
    return max_abs, max_rel


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _on_cpu(
    model: nn.Module, example_inputs: torch.Tensor | Sequence[torch.Tensor], batch_sizes: Sequence[int]
) -> tuple[nn.Module, _Tensors]:
    """Return a copy to export, and its inputs as a batch of two.

    The copy keeps the caller's mode and device out of the file. Tracing with one image would bake the
    one into the graph, hence two.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(t, torch.Tensor) and t.ndim and len(t) for t in inputs):
        raise ExportError(
            "Expected example inputs as one tensor or several, each (N, ...) with N >= 1; got "
            f"{[tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__ for t in inputs]}."
        )
    if not batch_sizes or min(batch_sizes) < 1:
        raise ExportError(f"Expected batch sizes of at least 1 to compare at, got {tuple(batch_sizes)}.")
    copied = copy.deepcopy(model).to("cpu").eval().requires_grad_(False)
    return copied, _batch_of(tuple(t.detach().cpu() for t in inputs), 2)


def _batch_of(inputs: _Tensors, batch_size: int) -> _Tensors:
    """Return inputs of another batch size: fresh noise, or for integers (indices) the given rows."""
    generator = torch.Generator().manual_seed(batch_size)
    return tuple(
        torch.randn(batch_size, *t.shape[1:], generator=generator).to(t.dtype)
        if t.is_floating_point()
        else t[torch.arange(batch_size) % len(t)]
        for t in inputs
    )


def _batch_is_dynamic(inputs: _Tensors) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in inputs)


def _tensors_in(output: Any) -> list[torch.Tensor]:
    """Return the tensors of a tensor, a sequence or a mapping, in the order exporters keep."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors_in(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [t for value in output for t in _tensors_in(value)]
    return []


def _require(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f'Export to ONNX needs the package {name}, which is not installed: pip install "nni-plugin[export]"'
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress lines, warnings and log records off the terminal."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
