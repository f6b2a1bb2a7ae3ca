"""NNI's config_list, checked before anything is touched: every error names the entry, the key and what it may be.

The keys and their meaning are NNI 3.0's. Its own check says only that something does not fit its schema, and passes
over an entry that selects nothing. The older form (`sparsity`, `total_sparsity`, `exclude: True`) is turned into the
present one here, since NNI does so only where the first entry is an old one. `internal_metric_block` counts only where
there are no inputs to trace the network with: else the channels that the groups of a convolution tie together are found
with the layers that share them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nni_plugin.errors import ConfigError

SELECT = ("op_names", "op_types", "op_names_re")
EXCLUDE = ("exclude_op_names", "exclude_op_types", "exclude_op_names_re")
SETTINGS = (
    "sparse_ratio",
    "sparse_threshold",
    "max_sparse_ratio",
    "min_sparse_ratio",
    "global_group_id",
    "dependency_group_id",
    "internal_metric_block",
    "granularity",
    "apply_method",
    "align",
)
_RATIOS = ("sparse_ratio", "sparse_threshold")
_OLD_RATIOS = ("sparsity", "sparsity_per_layer", "total_sparsity")
_OLD = {"max_sparsity_per_layer": "max_sparse_ratio"}
_UNCHANGED = "The model is unchanged."


@dataclass(frozen=True)
class Checked:
    """A config_list that fits a network.

    Args:
        config_list: In NNI's present form, without `exclude` entries.
        excluded: Names of the modules that an exclusion takes out and no entry selects.
    """

    config_list: list[dict[str, Any]]
    excluded: frozenset[str]


def check_config(model: nn.Module, config_list: Any, known_types: Collection[str]) -> Checked:
    """Check a config_list against a network.

    Args:
        model: The network, unwrapped.
        config_list: As the user gave it; not changed.
        known_types: Names of the layer classes that NNI can mask.

    Raises:
        ConfigError: A key is unknown or its value wrong, or an entry selects no layer.
    """
    if not isinstance(config_list, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in config_list):
        raise ConfigError(f"config_list must be a list of dictionaries, got {config_list!r}. {_UNCHANGED}")
    types = {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}
    entries = [_renewed(dict(entry), number) for number, entry in enumerate(config_list)]
    outside: set[str] = set()
    for number, entry in enumerate(entries):
        _check_keys(entry, number)
        if entry.pop("exclude", False):
            outside |= _selected(entry, types, number)
            entry.clear()
    selected, excluded = set(), set(outside)
    kept = []
    for number, entry in enumerate(entries):
        if not entry:
            continue
        found = _selected(entry, types, number)
        left = found - outside - _matching(entry, EXCLUDE, types)
        if not left:
            raise _wrong(number, next(key for key in SELECT if key in entry), "selects no layer once some are excluded")
        unknown = sorted(name for name in left if types[name] not in known_types)
        if unknown:
            raise ConfigError(
                f"config_list[{number}] selects {unknown[0]!r}, a {types[unknown[0]]}, which NNI cannot mask; it knows "
                f"{', '.join(sorted(known_types))}. Name other layers. {_UNCHANGED}"
            )
        _check_settings(entry, number, f"config_list[{number}]")
        selected |= left
        excluded |= found - left
        if any(key in entry.get("target_settings", {}).get("weight", {}) for key in _RATIOS):
            for key in _RATIOS:  # the target's comes first; NNI's schema refuses to see two
                entry.pop(key, None)
        if outside:
            entry["exclude_op_names"] = sorted({*entry.get("exclude_op_names", ()), *outside})
        kept.append(entry)
    if not kept:
        raise ConfigError(f"config_list selects nothing to prune. {_UNCHANGED}")
    return Checked(kept, frozenset(excluded - selected))


def _renewed(entry: dict[str, Any], number: int) -> dict[str, Any]:
    """Turn the keys of NNI before 3.0 into those of today."""
    if "op_partial_names" in entry:
        parts = entry.pop("op_partial_names")
        entry["op_names_re"] = [f".*{re.escape(part)}.*" for part in parts]
    for key in _OLD_RATIOS:
        if key in entry:
            entry["sparse_ratio"] = entry.pop(key)
            if key == "total_sparsity":
                entry["global_group_id"] = f"total_sparsity of config_list[{number}]"
    for old, new in _OLD.items():
        if old in entry:
            entry[new] = entry.pop(old)
    return entry


def _check_keys(entry: Mapping[str, Any], number: int) -> None:
    known = (*SELECT, *EXCLUDE, *SETTINGS, "target_names", "target_settings", "exclude")
    for key in entry:
        if key not in known:
            raise _wrong(number, key, f"is no key of a config_list{_like(key, known)}")
    for key in (*SELECT, *EXCLUDE, "target_names"):
        names = entry.get(key, [])
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise _wrong(number, key, f"must be a list of strings, got {names!r}")
    if not any(entry.get(key) for key in SELECT):
        raise ConfigError(f"config_list[{number}] selects no layers: give op_types, op_names or op_names_re.")


def _selected(entry: Mapping[str, Any], types: Mapping[str, str], number: int) -> set[str]:
    """Return the modules that an entry selects, before exclusions: (names or patterns) that are of the types."""
    for name in entry.get("op_names", ()):
        if name not in types:
            raise _wrong(number, "op_names", f"names {name!r}, which is not in the model{_like(name, types)}")
    _check_patterns(entry, ("op_names_re", "exclude_op_names_re"), number)
    by_name = _matching(entry, ("op_names", "op_names_re"), types)
    by_type = {name for name, kind in types.items() if kind in entry.get("op_types", ())}
    named = bool(entry.get("op_names") or entry.get("op_names_re"))
    found = by_name & by_type if named and entry.get("op_types") else by_name if named else by_type
    if not found:
        key = "op_types" if entry.get("op_types") and (by_name or not named) else "op_names_re"
        there = ", ".join(sorted(set(types.values())))
        raise _wrong(number, key, f"{entry[key]!r} selects no layer of the model, whose layers are of types {there}")
    return found


def _matching(entry: Mapping[str, Any], keys: Iterable[str], types: Mapping[str, str]) -> set[str]:
    """Return the modules that match any of some keys."""
    found: set[str] = set()
    for key in keys:
        for wanted in entry.get(key, ()):
            if key.endswith("_re"):
                found |= {name for name in types if re.match(wanted, name)}
            elif key.endswith("types"):
                found |= {name for name, kind in types.items() if kind == wanted}
            else:
                found |= {wanted} & types.keys()
    return found


def _check_patterns(entry: Mapping[str, Any], keys: Iterable[str], number: int) -> None:
    for key in keys:
        for pattern in entry.get(key, ()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise _wrong(number, key, f"{pattern!r} is no regular expression ({error})") from None


def _check_settings(entry: Mapping[str, Any], number: int, where: str) -> None:
    _check_values({key: entry[key] for key in SETTINGS if key in entry}, where)
    targets = entry.get("target_settings", {})
    if not isinstance(targets, Mapping):
        raise _wrong(number, "target_settings", f"must be a dictionary by target name, got {targets!r}")
    for target, settings in targets.items():
        place = f"{where}['target_settings'][{target!r}]"
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{place} must be a dictionary of settings, got {settings!r}. {_UNCHANGED}")
        for key in settings:
            if key not in SETTINGS:
                raise ConfigError(f"{place} has {key!r}, which is no setting{_like(key, SETTINGS)}. {_UNCHANGED}")
        _check_values(settings, place)
        if target != "weight" and any(settings.get(key) is not None for key in _RATIOS):
            raise ConfigError(
                f"{place} asks for sparsity of {target!r}; whole channels are chosen by 'weight' alone, and other "
                f"targets follow it (align). {_UNCHANGED}"
            )
        both = {**entry, **settings} if target == "weight" else settings
        _check_pair(both, place)
    for target in (*entry.get("target_names", ()), *targets):
        if target.startswith(("_input_", "_output_")):
            raise _wrong(number, "target_names", f"has {target!r}; channels are masked on parameters, not activations")
    _check_pair(entry, where)


def _check_values(settings: Mapping[str, Any], where: str) -> None:
    def fail(key: str, what: str) -> ConfigError:
        return ConfigError(f"{where}[{key!r}] must be {what}, got {settings[key]!r}. {_UNCHANGED}")

    for key in _RATIOS:
        value = settings.get(key)
        if value is not None and (not isinstance(value, float) or not math.isfinite(value)):
            raise fail(key, "a float (0.5, not an integer or a string)")
    ratio = settings.get("sparse_ratio")
    if ratio is not None and not 0.0 <= ratio < 1.0:
        raise fail("sparse_ratio", "the share to REMOVE, at least 0.0 and below 1.0")
    limits: dict[str, tuple[Callable[[float], bool], str]] = {
        "min_sparse_ratio": (lambda value: 0 <= value < 1, "a number of at least 0 and below 1"),
        "max_sparse_ratio": (lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    }
    for key, (fits, what) in limits.items():
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value)):
            raise fail(key, what)
    for key in ("global_group_id", "dependency_group_id"):
        if not isinstance(settings.get(key, ""), (int, str, type(None))):
            raise fail(key, "an integer or a string")
    blocks = settings.get("internal_metric_block")
    if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
        raise fail("internal_metric_block", "an integer of at least 1")
    if settings.get("granularity", "default") not in ("default", "out_channel", None):
        raise fail("granularity", "'default' or 'out_channel': these pruners remove whole output channels")
    align = settings.get("align")
    if align is not None and (not isinstance(align, Mapping) or not {"target_name", "dims"} <= align.keys()):
        raise fail("align", "a dictionary with module_name, target_name and dims")


def _check_pair(settings: Mapping[str, Any], where: str) -> None:
    if settings.get("sparse_ratio") is not None and settings.get("sparse_threshold") is not None:
        raise ConfigError(f"{where} has both sparse_ratio and sparse_threshold: give one of them. {_UNCHANGED}")
    least, most = settings.get("min_sparse_ratio"), settings.get("max_sparse_ratio")
    if least is not None and most is not None and least > most:
        raise ConfigError(f"{where} has min_sparse_ratio {least} above max_sparse_ratio {most}. {_UNCHANGED}")


def _wrong(number: int, key: str, what: str) -> ConfigError:
    return ConfigError(f"config_list[{number}][{key!r}] {what}. {_UNCHANGED}")


def _like(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [k for k in known if k], n=3)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
