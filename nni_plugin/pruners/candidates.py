"""Which whole blocks a config_list lets go, and what of them is masked so that nothing of them is left.

A block is a candidate when all its convolutions, linear layers and embeddings were selected, nothing in it was
excluded, and it adds exactly zero once these and its normalisations are masked: then the masked network computes what
the network without the block computes. Of nested candidates (a transformer block and its attention) the outermost one
counts, so a config_list that selects the attention alone lets attention go and no block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nni_plugin.errors import ConfigError
from nni_plugin.layers.blocks import Block, BlockMap
from nni_plugin.pruners.dead_blocks import called_layers, outermost, silent_blocks
from nni_plugin.pruners.wrapping import MASKED, Masks
from nni_plugin.tensors import kind_of

Settings = tuple[Any, ...]
"""What the config_list says of a layer, value by value of :data:`SHARED`."""

SHARED = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "global_group_id")


@dataclass(frozen=True)
class Candidate:
    """A block that may go.

    Args:
        block: The block.
        layers: Its layers that are masked with it, normalisations too.
        chosen: One of its selected layers; all have the same settings.
        settings: These.
    """

    block: Block
    layers: tuple[str, ...]
    chosen: str
    settings: Settings


def candidates_of(
    model: nn.Module,
    found: BlockMap,
    wrappers: Mapping[str, ModuleWrapper],
    spaces: Mapping[str, Any],
    excluded: Collection[str],
    example_inputs: Any,
) -> tuple[list[Candidate], list[str]]:
    """Find the blocks that may go.

    Args:
        model: The network, unwrapped.
        found: What :func:`~nni_plugin.layers.blocks.find_blocks` found in it.
        wrappers: Of the selected layers, by module; not yet on the network.
        spaces: The weight's target space of each selected layer.
        excluded: Layers that an exclusion of the config_list takes out.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        The candidates in forward order, none inside another one, and which other blocks stay and why, a line each.

    Raises:
        ConfigError: There is none, or layers of one block are configured differently.
    """
    kinds = {name: kind_of(layer) for name, layer in called_layers(model, found)}
    layers = {b.name: [name for name, kind in kinds.items() if kind in MASKED and b.holds(name)] for b in found.blocks}
    whole: list[Block] = []
    stay: dict[str, str] = {}
    for block in found.blocks:
        inside = layers[block.name]
        chosen = [name for name in inside if name in spaces]
        reason = _reason(model, block, inside, spaces, excluded)
        if reason is None:
            whole.append(block)
        elif chosen or any(block.holds(name) for name in excluded):
            stay[block.name] = reason
    zeros: dict[str, Tensor] = {}
    for path in {name for block in whole for name in layers[block.name]}:
        targets = _targets(wrappers[path]) if path in spaces else _parameters(model.get_submodule(path))
        zeros |= {f"{path}.{target}": torch.zeros_like(tensor) for target, tensor in targets.items()}
    silent = {block.name for block in silent_blocks(model, found, zeros, example_inputs)} if whole else set()
    stay |= {
        block.name: "zeros in its layers' weights leave something of it, as tensors that NNI cannot mask do"
        for block in whole
        if block.name not in silent
    }
    leaving = outermost(block for block in whole if block.name in silent)
    notes = [f"block {name!r} stays: {reason}" for name, reason in stay.items()]
    if not leaving:
        raise ConfigError(_nothing(model, found, notes))
    return [_candidate(block, layers[block.name], spaces) for block in leaving], notes


def _reason(
    model: nn.Module, block: Block, inside: Collection[str], spaces: Mapping[str, Any], excluded: Collection[str]
) -> str | None:
    """Return why a block is no candidate; None if it may be one."""
    if block.fixed is not None:
        return block.fixed
    if block.kind == "unit":
        return (
            "it is a layer of a plain network, which zeros would cut in two instead of passing over; no mask can say "
            f"that it goes, but PruningPlan((), removed_blocks=({block.name!r},)).apply(model, inputs) removes it"
        )
    out = sorted(name for name in excluded if block.holds(name))
    if out:
        return f"{out[0]!r} in it is excluded"
    chosen = [name for name in inside if name in spaces]
    if not chosen:
        return "none of its layers is selected"
    rest = [name for name in inside if name not in spaces and kind_of(model.get_submodule(name)) != "norm"]
    if rest:
        kind = type(model.get_submodule(rest[0])).__name__
        return f"{rest[0]!r} ({kind}) in it is not selected; a block goes with all its layers"
    return None


def _candidate(block: Block, layers: Iterable[str], spaces: Mapping[str, Any]) -> Candidate:
    layers = tuple(layers)
    chosen = [name for name in layers if name in spaces]
    settings = {name: tuple(getattr(spaces[name], key) for key in SHARED) for name in chosen}
    for name, values in settings.items():
        for key, value, first in zip(SHARED, values, settings[chosen[0]], strict=True):
            if value != first:
                raise ConfigError(
                    f"Layers {chosen[0]!r} and {name!r} are of one block, {block.name!r}, which goes as a whole, but "
                    f"their {key} is {first!r} and {value!r}. Give them the same. The model is unchanged."
                )
    return Candidate(block, layers, chosen[0], settings[chosen[0]])


def _nothing(model: nn.Module, found: BlockMap, notes: list[str]) -> str:
    kind = type(model).__name__
    if not found.blocks:
        return f"{kind} has no block that could be the identity, so none can be removed. The model is unchanged."
    if not notes:
        names = [block.name for block in found.blocks if block.fixed is None]
        some = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
        return f"config_list selects no layer in a block that can be removed ({some}). The model is unchanged."
    more = f"; and {len(notes) - 3} more" if len(notes) > 3 else ""
    return f"config_list leaves no block of {kind} to remove: {'; '.join(notes[:3])}{more}. The model is unchanged."


def wrap_candidates(
    model: nn.Module, wrappers: dict[str, ModuleWrapper], candidates: Iterable[Candidate], spaces: Mapping[str, Any]
) -> None:
    """Give every layer of the candidates a wrapper with all its parameters as targets; selected ones have theirs."""
    for path in (name for candidate in candidates for name in candidate.layers if name not in spaces):
        layer = model.get_submodule(path)
        if path not in wrappers:
            wrappers[path] = ModuleWrapper(layer, path, None, [])
        for target in _parameters(layer):
            if target not in wrappers[path].pruning_target_spaces:
                space = PruningTargetSpace(wrappers[path], target, TargetType.PARAMETER, {"apply_method": "mul"})
                wrappers[path].pruning_target_spaces[target] = space


def block_masks(wrappers: Mapping[str, ModuleWrapper], candidates: Iterable[Candidate], gone: Collection[str]) -> Masks:
    """Return the masks of all candidates: zeros in those that are gone, ones in the others.

    Args:
        wrappers: By module.
        candidates: The candidates.
        gone: Names of blocks.
    """
    masks: Masks = {}
    for candidate in candidates:
        value = 0.0 if candidate.block.name in gone else 1.0
        for path in candidate.layers:
            targets = _targets(wrappers[path])
            masks[path] = {name: torch.full_like(target, value) for name, target in targets.items()}
    return masks


def _targets(wrapper: ModuleWrapper) -> dict[str, Tensor]:
    """Return the parameters that a wrapper masks."""
    return {
        name: space.target.detach()
        for name, space in wrapper.pruning_target_spaces.items()
        if space.type is TargetType.PARAMETER and isinstance(space.target, Tensor)
    }


def _parameters(layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's own parameters."""
    return {name: parameter.detach() for name, parameter in layer.named_parameters(recurse=False)}
