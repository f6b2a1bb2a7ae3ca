"""Leave for timm: its own pruned-text format and a state dict, which timm alone loads again.

timm describes a pruned network (`ecaresnet101d_pruned` and others) by the shapes of its tensors, one text of
`name:[shape]` joined by `***`. `timm.models.adapt_model_from_string` builds a dense network's convolutions, batch
normalisations and Linear layers anew in these shapes, then `load_checkpoint` fills them. The text knows widths alone:
any grouped convolution becomes depthwise, a subclass of `Conv2d` a plain one, Linear layers keep their outputs, and
of everything else nothing changes. Nothing in it tells when that is another network, so here the files are read back
in exactly the lines that a user will write, and kept only where what comes out is the pruned network: the same layers
with the same attributes, and the same outputs bit by bit.

There is no shorter way in: `create_model(..., checkpoint_path=F)` loads F strictly into the dense shapes, and
`create_model(..., pruned=True)` reads its text from the folder `timm/models/_pruned` of the installation alone.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.models import adapt_model_from_string, load_checkpoint
from torch import Tensor, nn

from nni_plugin.adapters.models import build, identity_of
from nni_plugin.errors import ExportError
from nni_plugin.plan import ModelIdentity

_SEPARATOR = "***"
# What timm tells others about a network; it works these out from the new widths itself, and no layer reads them.
_METADATA = {"feature_info", "num_features", "head_hidden_size", "training"}
_HOW_TO = """\
# {name}, pruned

Needs timm and nothing else; run it in the folder of the two files:

```python
{lines}
```

The network is in eval mode and contiguous memory format, and gives the outputs of the exported one in that format bit
by bit.
"""


@dataclass(frozen=True)
class TimmFiles:
    """What was written for timm.

    Attributes:
        text: timm's pruned-text format, `NAME.txt`.
        weights: The state dict, `NAME.safetensors`.
        how_to: A page that says how to load them, `NAME.md`.
        lines: The Python lines on it.
    """

    text: Path
    weights: Path
    how_to: Path
    lines: str

    def __str__(self) -> str:
        """Return a sentence for a terminal, and the lines."""
        return (
            f"{self.text.name} and {self.weights.name} give PyTorch's outputs bit by bit, in contiguous memory format; "
            f"to load them ({self.how_to.name}):\n{self.lines}"
        )


def pruned_text(model: nn.Module) -> str:
    """Return the shapes of a network's tensors in the form of timm's files for pruned networks.

    Example:
        >>> pruned_text(nn.Conv2d(3, 8, 1))
        'weight:[8, 3, 1, 1]***bias:[8]'
    """
    return _SEPARATOR.join(f"{name}:{list(tensor.shape)}" for name, tensor in model.state_dict().items())


def export_timm(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    folder: str | os.PathLike[str],
) -> TimmFiles:
    """Write a pruned timm network as text and state dict, if timm makes exactly that network of them.

    Args:
        model: A network whose identity is one of timm's; itself untouched.
        example_inputs: Its positional inputs, each of shape (N, ...), to compare outputs on.
        folder: Folder to write `NAME.txt`, `NAME.safetensors` and `NAME.md` to; it exists.

    Returns:
        The files, and how to load them.

    Raises:
        ExportError: It is not one of timm's, timm's format does not hold it, or the files cannot be written; none
            is left, and those that were there before stay.
    """
    identity = identity_of(model)
    if identity is None or identity.library != "timm":
        got = "none" if identity is None else f"{identity.library}/{identity.name}"
        raise ExportError(
            f"Expected a network of timm for timm's own format, got {got} ({type(model).__name__}); "
            "export it with --format onnx or torch-export."
        )
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError(f"Cannot export to {folder}: there is no such folder. Make it first.")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    inputs = tuple(tensor.detach().cpu() for tensor in inputs)
    # Strides choose kernels, and kernels the last bits: timm loads everything contiguous.
    slim = copy.deepcopy(model).cpu().eval().to(memory_format=torch.contiguous_format)
    name = identity.name.partition(".")[0]
    lines = _loading(identity, name)
    try:
        with tempfile.TemporaryDirectory(prefix=".timm-", dir=folder) as drafts:
            text, weights = Path(drafts, f"{name}.txt"), Path(drafts, f"{name}.safetensors")
            text.write_text(pruned_text(slim), newline="")
            # Clones: safetensors takes no views that share memory, and timm wants tied tensors under all their names.
            state = {key: tensor.contiguous().clone() for key, tensor in slim.state_dict().items()}
            weights.write_bytes(safetensors.torch.save(state))  # a full disk is an OSError here
            Path(drafts, f"{name}.md").write_text(_HOW_TO.format(name=name, lines=lines))
            _check(slim, _reloaded(slim, identity, text, weights), inputs)
            # The text last: whoever finds it finds the rest too.
            files = [folder / f"{name}{suffix}" for suffix in (".md", ".safetensors", ".txt")]
            for file in files:
                os.replace(Path(drafts, file.name), file)
    except OSError as error:
        raise ExportError(f"Cannot write to {folder}: {error}.") from error
    how_to, weights, text = files
    return TimmFiles(text, weights, how_to, lines)


def _loading(identity: ModelIdentity, name: str) -> str:
    """Return the lines with which a user of timm loads the files."""
    arguments = "".join(f", {key}={value!r}" for key, value in identity.kwargs.items())
    return (
        "import timm\n"
        "from timm.models import adapt_model_from_string, load_checkpoint\n\n"
        f"model = timm.create_model({identity.name!r}{arguments})\n"
        f'model = adapt_model_from_string(model, open("{name}.txt").read())\n'
        f'load_checkpoint(model, "{name}.safetensors")'
    )


def _reloaded(slim: nn.Module, identity: ModelIdentity, text: Path, weights: Path) -> nn.Module:
    """Return what timm makes of the files.

    Raises:
        ExportError: It makes another network of them, or none.
    """
    with torch.random.fork_rng(devices=[]):
        dense = build(identity)
        gone = [name for name in _layers(dense) if f"{name}.weight" not in slim.state_dict()]
        if gone:
            raise _inexact(slim, f"{gone[0]!r} was removed, and the format knows narrower layers, not absent ones")
        try:
            network: nn.Module = adapt_model_from_string(dense, text.read_text())
        except Exception as error:  # it builds layers of whatever shapes it finds
            raise _inexact(slim, f"timm makes no network of the shapes ({_first_line(error)})") from error
    difference = next(_differences(slim, network), None)
    if difference is not None:
        raise _inexact(slim, difference)
    load_checkpoint(network, str(weights))  # strict
    return network.eval()


def _layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that timm builds anew, and so looks for in the text."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _differences(ours: nn.Module, theirs: nn.Module) -> Iterator[str]:
    """Yield in what timm's network is another one than ours, module by module."""
    mine = dict(ours.named_modules())
    for name in mine.keys() - dict(theirs.named_modules()).keys():
        yield f"{name!r} ({type(mine[name]).__name__}) is new, and the format adds no layers"
    for name, other in theirs.named_modules():
        module = mine.get(name)
        if module is None:
            yield f"{name!r} was removed, and the format knows narrower layers, not absent ones"
            continue
        kind, got = type(module), type(other)
        # timm's Linear is torch's with a cast for TorchScript.
        if kind is not got and not (kind is nn.Linear and got is timm.layers.Linear):
            yield f"{name!r} is a {kind.__name__}, timm makes it a {got.__name__}"
        want, get = _facts(module), _facts(other)
        for key in {**want, **get}:
            if want.get(key) != get.get(key):
                where = f"{name!r} ({kind.__name__})" if name else "it"
                yield f"{where} has {key} {want.get(key)}, timm makes it {get.get(key)}"


def _facts(module: nn.Module) -> dict[str, object]:
    """Return the forms of a module's own tensors, and its attributes that are numbers, text or sequences of these."""
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    forms = {key: f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}" for key, tensor in tensors}
    return forms | {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _METADATA and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _check(slim: nn.Module, network: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Compare the outputs.

    Raises:
        ExportError: One differs in one bit, or the network does not run.
    """
    try:
        with torch.inference_mode():
            want, got = slim(*inputs), network(*inputs)
    except Exception as error:  # a forward pass may raise anything
        raise ExportError(
            f"{type(slim).__name__} fails on the example inputs: {_first_line(error)}. No file was kept."
        ) from error
    if not _same(want, got):
        raise _inexact(slim, "its outputs differ, though the layers are alike")


def _same(want: object, got: object) -> bool:
    if isinstance(want, Tensor) and isinstance(got, Tensor):
        return want.shape == got.shape and want.dtype == got.dtype and torch.equal(want, got)
    if isinstance(want, (tuple, list)) and isinstance(got, (tuple, list)):
        return len(want) == len(got) and all(map(_same, want, got))
    if isinstance(want, dict) and isinstance(got, dict):
        return want.keys() == got.keys() and all(_same(want[key], got[key]) for key in want)
    return False


def _inexact(model: nn.Module, why: str) -> ExportError:
    return ExportError(
        f"timm's pruned-text format cannot hold this {type(model).__name__}: {why}. No file was kept; "
        "use --format onnx or torch-export, or load the folder with nni_plugin.from_pretrained."
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
