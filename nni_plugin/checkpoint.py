"""Save a network with its plan to a folder, and load it again bit by bit: JSON and safetensors, no pickle.

`config.json` says how to build the dense network and what to cut, `model.safetensors` holds the tensors. A folder
may come from anybody: everything in it is checked before it is used, and nothing in it can name another file.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from nni_plugin.adapters.models import build, identity_of
from nni_plugin.adapters.torch_pruning import apply_plan
from nni_plugin.errors import CheckpointError, NNIPluginError
from nni_plugin.plan import ModelIdentity, PruningPlan

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SCHEMA_VERSION = 1
MAX_CONFIG_BYTES = 50_000_000
# A dense network may have so many elements (dinov3_7b fits), one example input and one argument so many.
MAX_ELEMENTS = 2**33
MAX_INPUT_ELEMENTS = 2**24
MAX_HEADER_BYTES = 100_000_000  # what safetensors itself takes

InputShape = Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Sequence[int]]
"""Shape of one sample, e.g. `(3, 32, 32)`; a list of shapes for several inputs, a dict for keyword inputs."""


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    identity: ModelIdentity | None = None,
    plan: PruningPlan | None = None,
    example_input_shape: InputShape | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network, pruned or not, to `config.json` and `model.safetensors`.

    Args:
        model: The network as it is now, left as it is; wrappers of DDP and `torch.compile` are looked through.
        directory: Folder to write to, made if missing. Other files in it stay.
        identity: How to build the dense network; None takes what the model knows. For a class of your own it is
            `"custom"` with the class's name, and loading needs a dense network as `model=`.
        plan: What was cut from the dense network; None takes `model.pruning_plan`.
        example_input_shape: Shape of one sample, without the batch, to trace the dense network with; None takes
            the library's usual one.
        extra: Further JSON values for the config, e.g. the accuracy.

    Returns:
        The folder.

    Raises:
        CheckpointError: Identity and plan do not give a network of these shapes, or the files cannot be written;
            what was in the folder before is still there.
    """
    network = _unwrapped(model)
    plan = getattr(network, "pruning_plan", None) if plan is None else plan
    identity = identity or identity_of(network) or ModelIdentity("custom", type(network).__name__)
    shape = example_input_shape if example_input_shape is not None else _usual_input(network, identity)
    shape = None if shape is None else _checked_input(shape)
    if plan is not None and shape is None:
        raise CheckpointError(
            f"Expected the shape of one sample to trace {identity.name!r} with, got none; give example_input_shape."
        )
    state = network.state_dict()
    entries = _describe(state)
    if identity.library != "custom":
        dense = _rebuild(identity, plan, shape, None, len(entries))
        _check_network(dense, entries, f"identity {identity.library}/{identity.name} and the plan give another network")
    config = {
        "schema_version": SCHEMA_VERSION,
        "model": identity.to_dict(),
        "input_shape": shape,
        "tensors": entries,
        "buffer_dtypes": {name: _dtype(buffer) for name, buffer in _unsaved(network).items()},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("nni-plugin", "torch", "timm", "torchvision", "safetensors")
        },
        "extra": dict(extra or {}),
    }
    with _refusing("The network cannot be written", "leave out what JSON or safetensors cannot hold"):
        config["plan"] = None if plan is None else json.loads(plan.to_json())
        own = {name: tensor for name, tensor in state.items() if "same_as" not in entries[name]}
        # Clones: safetensors refuses views that share memory.
        weights = safetensors.torch.save({n: t.detach().cpu().contiguous().clone() for n, t in own.items()})
        config["weights"] = {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
        text = json.dumps(config, indent=1, allow_nan=False).encode()
    _write(Path(directory), {WEIGHTS: weights, CONFIG: text})
    return Path(directory)


def from_pretrained(
    directory: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Load a network saved by :func:`save_pretrained`; needs no data, downloads nothing, runs no code of the folder.

    Args:
        directory: The folder.
        model: A freshly built dense network of the saved class, needed where the identity is `"custom"`; copied,
            not changed.
        device: Where the network goes.

    Returns:
        The network in eval mode, with its dtypes, giving the same logits bit by bit; a pruned one has its plan as
        `pruning_plan`.

    Raises:
        CheckpointError: Something in the folder is missing, damaged, hostile or for another model.
    """
    folder = Path(directory)
    config = _read_config(folder)
    with _refusing(f"{CONFIG} in {str(folder)!r} is damaged", "save the network again"):
        identity, plan, shape = _plan_from(config)
        entries, digest, size = (
            _checked_entries(config["tensors"]),
            config["weights"]["sha256"],
            config["weights"]["bytes"],
        )
        most = sum(math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize for entry in entries.values())
    weights_path = _file_in(folder, WEIGHTS)
    _check_head(weights_path, size, most)
    if identity.library == "custom" and model is None:
        raise CheckpointError(
            f"Expected a dense network of the class {identity.name!r}, which only you can build, got none; "
            "pass it as from_pretrained(..., model=...)."
        )
    network = _rebuild(identity, plan, shape, model, len(entries))
    _check_network(network, entries, f"the network of {str(folder)!r} is another than its {CONFIG} lists")
    with (
        _refusing(f"{WEIGHTS} in {str(folder)!r} cannot be read", "fetch or save it again"),
        torch.inference_mode(False),
    ):
        content = weights_path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(
                f"{str(weights_path)!r} is damaged or not the one of its {CONFIG}: expected SHA-256 {digest}, got "
                f"another; fetch or save it again."
            )
        tensors = safetensors.torch.load(content)
        _check_file(tensors, entries, f"{str(weights_path)!r} does not hold what its {CONFIG} lists")
        _fill(network, tensors, entries, config["buffer_dtypes"])
    with _refusing(f"The network cannot go to device {device!r}", "choose another device"), torch.inference_mode(False):
        network.to(device).eval()
    return network


def input_shape_of(directory: str | Path) -> tuple[int, ...]:
    """Return the shape of one sample of a saved network, without the batch, e.g. `(3, 32, 32)`.

    Raises:
        CheckpointError: The folder is missing or damaged, or the network has no input shape or several.
    """
    config = _read_config(Path(directory))
    shape = None if config.get("input_shape") is None else _checked_input(config["input_shape"])
    if not isinstance(shape, list) or isinstance(shape[0], list):
        raise CheckpointError(
            f"Expected one input shape in {str(directory)!r}, got {_short(shape)}; save the network with "
            "example_input_shape."
        )
    return tuple(shape)


# -- files ----------------------------------------------------------------------------------------------


def _write(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files beside their places, then move them in together; on any failure the old ones are there again."""
    made = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
    temporary = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in contents:
            if (directory / name).is_dir() and not (directory / name).is_symlink():
                raise IsADirectoryError(f"{name} is a folder there")
        temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
        for name, content in contents.items():
            with open(temporary / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # some file systems notice only now that the disk is full
        _move_in(temporary, directory, list(contents))
    except BaseException as error:
        if isinstance(error, CheckpointError):  # the old files are in there still
            raise
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, (OSError, ValueError)):
            raise CheckpointError(
                f"The network could not be written to {str(directory)!r} ({_line(error)}); the folder is as it was; "
                "free some space or choose another folder."
            ) from error
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def _move_in(temporary: Path, directory: Path, names: Sequence[str]) -> None:
    old = temporary / "old"
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for name in names:
            target = directory / name
            if os.path.lexists(target):
                os.replace(target, old / name)
                moved.append((old / name, target))
            os.replace(temporary / name, target)
            if not os.path.lexists(old / name):
                moved.append((target, temporary / name))
    except BaseException as error:
        try:
            for now, before in reversed(moved):
                os.replace(now, before)
        except OSError as second:
            raise CheckpointError(
                f"The network could not be written to {str(directory)!r}: {_line(error)}; nor could the old files be "
                f"put back ({_line(second)}); they are in {str(old)!r}."
            ) from error
        raise


def _file_in(folder: Path, name: str) -> Path:
    """Return a regular file that lies in the folder itself, not behind a link that leads out of it."""
    path = folder / name
    with _refusing(f"{str(path)!r} cannot be opened", "check the path"):
        if not folder.is_dir():
            what = "a file" if folder.exists() else "nothing"
            raise CheckpointError(
                f"Expected a folder with a saved network at {str(folder)!r}, got {what}; check the path."
            )
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"Expected {name} inside {str(folder)!r}, got a link that leads out of it; copy the file itself there."
            )
        if not path.is_file():
            raise CheckpointError(
                f"Expected the file {name} in {str(folder)!r}, got none; check the path or save the network again."
            )
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    path = _file_in(folder, CONFIG)
    with _refusing(f"{str(path)!r} is not JSON", "fetch it or save the network again"):
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"Expected at most {MAX_CONFIG_BYTES} bytes in {str(path)!r}, got more; it is not a saved network's."
            )
        config = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"Expected a JSON object in {str(path)!r}, got {type(config).__name__}; it is not a saved network's."
        )
    if type(config.get("schema_version")) is not int or config["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(
            f"Expected schema_version {SCHEMA_VERSION} in {str(path)!r}, got {_short(config.get('schema_version'))}; "
            "load it with the version of nni-plugin that wrote it."
        )
    for key, kind in (("model", dict), ("tensors", dict), ("weights", dict), ("buffer_dtypes", dict)):
        if not isinstance(config.get(key), kind):
            raise CheckpointError(
                f"Expected {key!r} as an object in {str(path)!r}, got {_short(config.get(key))}; it is damaged."
            )
    weights = config["weights"]
    if not isinstance(weights.get("sha256"), str) or type(weights.get("bytes")) is not int:
        raise CheckpointError(f"Expected sha256 and bytes under 'weights' in {str(path)!r}, got {_short(weights)}.")
    return config


def _check_head(path: Path, size: int, most: int) -> None:
    """Refuse a file of the wrong kind or size before the network is built and the file is read."""
    with _refusing(f"{str(path)!r} cannot be read", "check its permissions"):
        with open(path, "rb") as file:
            head = file.read(8)
        got = path.stat().st_size
    # The first eight bytes are the header's length; those of a pickle or a zip would be a giant one.
    if len(head) == 8 and int.from_bytes(head, "little") > MAX_HEADER_BYTES:
        kind = "a pickle or a zip of torch.save" if head.startswith((b"PK", b"\x80")) else "other bytes"
        raise CheckpointError(
            f"Expected safetensors in {str(path)!r}, got {kind}; it is not opened: save the "
            "network again with save_pretrained."
        )
    if got != size or got > most + MAX_HEADER_BYTES:
        raise CheckpointError(
            f"Expected {size} bytes in {str(path)!r}, got {got}; it is truncated or another file, fetch it again."
        )


# -- network --------------------------------------------------------------------------------------------


def _rebuild(
    identity: ModelIdentity, plan: PruningPlan | None, shape: Any, model: nn.Module | None, tensors: int
) -> nn.Module:
    """Build the dense network on the CPU, or copy the given one, and cut it; the global random state stays."""
    what = f"The network {identity.library}/{identity.name[:80]!r} cannot be rebuilt"
    todo = "load it with the versions it was saved with, or save it again with a fitting plan"
    with (
        _refusing(what, todo),
        torch.inference_mode(False),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        if model is None:
            with _bounded(4 * tensors + 1000):
                network: nn.Module = build(identity)
        else:
            network = copy.deepcopy(_unwrapped(model)).cpu()
            if getattr(network, "pruning_plan", None) is not None:
                raise CheckpointError(
                    f"Expected a dense {identity.name!r} as model=, got one that is pruned already; build it afresh."
                )
        network.eval()
        if plan is not None:
            if plan.model is not None and identity.library != "custom" and _name(plan.model) != _name(identity):
                raise CheckpointError(
                    f"Expected a plan for {_name(identity)}, got one for another model, {_name(plan.model)}; {todo}."
                )
            dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The plan removes nothing")
                apply_plan(network, plan, _zeros(shape, dtype))
        network.nni_plugin_identity = identity  # type: ignore[assignment]
    return network


@contextlib.contextmanager
def _bounded(registrations: int) -> Iterator[None]:
    """Stop a builder in this thread that makes more tensors, or bigger ones, than a network could have."""
    thread, left = threading.get_ident(), [registrations, MAX_ELEMENTS]

    def note(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        left[0] -= 1
        left[1] -= 0 if isinstance(tensor, nn.UninitializedParameter) else tensor.numel()
        if min(left) < 0:
            raise CheckpointError(f"it has more tensors than it was saved with, or more than {MAX_ELEMENTS} elements")

    handles = [register_module_parameter_registration_hook(note), register_module_buffer_registration_hook(note)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fill(
    network: nn.Module, tensors: Mapping[str, Tensor], entries: Mapping[str, Any], dtypes: Mapping[str, Any]
) -> None:
    """Put the stored tensors in place; parameters stay the same objects, so tied ones stay tied."""
    live = network.state_dict(keep_vars=True)
    for name, entry in entries.items():
        if "same_as" in entry:
            continue
        layout = torch.channels_last if entry.get("channels_last") else torch.contiguous_format
        live[name].data = tensors[name].clone(memory_format=layout)
    for name, entry in entries.items():
        if "same_as" in entry:
            live[name].data = live[entry["same_as"]].data
    for name, buffer in _unsaved(network).items():
        wanted = dtypes.get(name, _dtype(buffer))
        if buffer.is_floating_point() and getattr(_torch_dtype(wanted), "is_floating_point", False):
            buffer.data = buffer.data.to(_torch_dtype(wanted))


def _unsaved(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the state dict leaves out: rebuilt, not stored, only their dtype is."""
    saved = network.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in network.named_buffers() if name not in saved}


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "module", None) if hasattr(model, "device_ids") else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


# -- what the config says -------------------------------------------------------------------------------


def _plan_from(config: Mapping[str, Any]) -> tuple[ModelIdentity, PruningPlan | None, Any]:
    found = config["model"]
    if set(found) != {"library", "name", "kwargs"} or not isinstance(found["kwargs"], dict):
        raise CheckpointError(f"Expected library, name and kwargs of the model, got {_short(found)}.")
    todo: list[Any] = [found["kwargs"]]
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list)):
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) > MAX_INPUT_ELEMENTS:
            raise CheckpointError(f"Expected arguments up to {MAX_INPUT_ELEMENTS}, got {_short(value)}.")
    identity = ModelIdentity(**found)
    plan = None if config.get("plan") is None else PruningPlan.from_json(json.dumps(config["plan"]))
    shape = None if config.get("input_shape") is None else _checked_input(config["input_shape"])
    if plan is not None and shape is None:
        raise CheckpointError("Expected the input_shape that the plan is traced with, got none.")
    return identity, plan, shape


def _checked_entries(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    for name, entry in entries.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        sizes = isinstance(shape, list) and all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in shape)
        root = entries.get(entry["same_as"]) if sizes and "same_as" in entry else None
        if (
            not sizes
            or _torch_dtype(entry.get("dtype")) is None
            or ("same_as" in entry and "same_as" in (root or entry))
        ):
            raise CheckpointError(f"Expected shape and dtype of tensor {name!r}, got {_short(entry)}.")
        if root is not None and (root["shape"], root["dtype"]) != (shape, entry["dtype"]):
            raise CheckpointError(f"Expected tensor {name!r} to be like {entry['same_as']!r}, got {_short(entry)}.")
    return dict(entries)


def _checked_input(value: Any) -> Any:
    """Return the shape of one sample, a list of them or a dict of them, as lists of integers."""
    if isinstance(value, Mapping):
        shapes = list(value.values())
    else:
        nested = isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in value)
        shapes = list(value) if nested else [value]
    for shape in shapes:
        good = isinstance(shape, (list, tuple)) and all(type(n) is int and n > 0 for n in shape)
        if not good or not 1 <= len(shape) <= 8 or math.prod(shape) > MAX_INPUT_ELEMENTS or len(shapes) > 16:
            raise CheckpointError(
                f"Expected an input shape of 1 to 8 positive integers with at most {MAX_INPUT_ELEMENTS} elements, e.g. "
                f"[3, 32, 32], got {_short(value)}; give the shape of one sample."
            )
    if not shapes:
        raise CheckpointError("Expected the shape of at least one input, got none.")
    lists = [list(shape) for shape in shapes]
    if isinstance(value, Mapping):
        return dict(zip(value, lists, strict=True))
    return lists if nested else lists[0]


def _zeros(shape: Any, dtype: torch.dtype) -> Any:
    if isinstance(shape, dict):
        return {name: torch.zeros(1, *size, dtype=dtype) for name, size in shape.items()}
    if isinstance(shape[0], list):
        return tuple(torch.zeros(1, *size, dtype=dtype) for size in shape)
    return torch.zeros(1, *shape, dtype=dtype)


def _usual_input(model: nn.Module, identity: ModelIdentity) -> Any:
    """Return the library's usual shape of one image, with the size and channels that the arguments ask for."""
    usual = {"torchvision": (3, 224, 224), "nni_plugin": (3, 32, 32)}.get(identity.library)
    config = getattr(model, "pretrained_cfg", None)
    if identity.library == "timm" and isinstance(config, Mapping):
        usual = config.get("input_size")
    if usual is None:
        return None
    size = identity.kwargs.get("img_size") or identity.kwargs.get("image_size") or list(usual[1:])
    height, width = size if isinstance(size, list) else (size, size)
    return [identity.kwargs.get("in_chans") or usual[0], height, width]


def _describe(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return shape and dtype of every tensor by name; one that is the memory of an earlier one says so."""
    entries: dict[str, dict[str, Any]] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"Expected a dense tensor with data as {name!r}, got {type(tensor).__name__}; such a network cannot be "
                "saved as safetensors."
            )
        entries[name] = {"shape": list(tensor.shape), "dtype": _dtype(tensor)}
        if tensor.dim() == 4 and tensor.stride() == _strides(tensor, torch.channels_last):
            # Kernels are chosen by strides, also where a size of 1 makes the two layouts the same memory.
            entries[name]["channels_last"] = tensor.stride() != _strides(tensor, torch.contiguous_format)
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(memory, name) != name:
            entries[name]["same_as"] = first[memory]
    return entries


# -- comparing ------------------------------------------------------------------------------------------


def _check_network(network: nn.Module, entries: Mapping[str, Any], what: str) -> None:
    """Refuse a network whose tensors have other names, shapes, kinds or ties than the stored ones."""
    state = _describe(network.state_dict())
    _check_same({n: e["shape"] for n, e in entries.items()}, {n: e["shape"] for n, e in state.items()}, what)
    for name, entry in state.items():
        own, stored = _torch_dtype(entry["dtype"]), _torch_dtype(entries[name]["dtype"])
        if own != stored and not (own and stored and own.is_floating_point and stored.is_floating_point):
            raise CheckpointError(f"Expected dtype {own} of tensor {name!r}, got {stored}: {what}; save it again.")
        if "same_as" in entry:
            roots = [entries[n].get("same_as", n) for n in (name, entry["same_as"])]
            if roots[0] != roots[1]:
                raise CheckpointError(
                    f"Expected tensor {name!r} to be one with {entry['same_as']!r}, got two: {what}; save it again."
                )


def _check_file(tensors: Mapping[str, Tensor], entries: Mapping[str, Any], what: str) -> None:
    own = {name: entry for name, entry in entries.items() if "same_as" not in entry}
    _check_same({n: e["shape"] for n, e in own.items()}, {n: list(t.shape) for n, t in tensors.items()}, what)
    for name, entry in own.items():
        if _dtype(tensors[name]) != entry["dtype"]:
            raise CheckpointError(
                f"Expected dtype {entry['dtype']} of tensor {name!r}, got {_dtype(tensors[name])}: {what}; fetch it "
                "again."
            )


def _check_same(expected: Mapping[str, list[int]], got: Mapping[str, list[int]], what: str) -> None:
    for name in [*expected, *got]:
        want, have = expected.get(name, "no such tensor"), got.get(name, "no such tensor")
        if want != have:
            raise CheckpointError(
                f"Expected {want} as shape of tensor {name!r}, got {have}: {what}; check that model, plan and files "
                "belong together."
            )


def _strides(tensor: Tensor, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta", memory_format=layout).stride()


def _name(identity: ModelIdentity) -> str:
    """Return library and architecture, without a tag of published weights."""
    return _short(f"{identity.library}/{identity.name.partition('.')[0]}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _torch_dtype(name: Any) -> torch.dtype | None:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None


# -- errors ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusing(what: str, todo: str) -> Iterator[None]:
    """Turn whatever damaged or hostile content leads a library to raise into one line of CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except NNIPluginError as error:
        raise CheckpointError(f"{what}: {_line(error)} {todo[0].upper()}{todo[1:]}.") from error
    except Exception as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {_line(error)}); {todo}.") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _line(error: BaseException) -> str:
    return _short(str(error), quote=False)


def _short(value: Any, *, quote: bool = True) -> str:
    """Return a value as one printable line of at most about 300 characters."""
    try:
        text = repr(value) if quote else str(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer too long to print
        text = f"a {type(value).__name__} too big to show"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
