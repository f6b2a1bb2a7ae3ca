"""Models by library and name: timm, torchvision and this package's own networks.

A model built here carries its :class:`~nni_plugin.plan.ModelIdentity` as `model.nni_plugin_identity`, from
which :func:`build` makes the same architecture again, with random weights and without any download.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torchvision
from timm.data import resolve_data_config
from timm.models import get_model_args, get_pretrained_cfg
from torch import Tensor, nn

from nni_plugin.adapters.weights import load_weights, read_state_dict
from nni_plugin.errors import ModelError
from nni_plugin.networks import NETWORKS
from nni_plugin.plan import ModelIdentity

Library = Literal["timm", "torchvision", "nni_plugin"]

# Arguments by which a library's builder would fetch or read weights; an identity never may.
_WEIGHT_SOURCES = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "pretrained",
        "pretrained_backbone",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "weights",
        "weights_backbone",
    }
)
# torchvision's two networks that scale their own input when they have ImageNet weights.
_TRANSFORM_INPUT = ("googlenet", "inception_v3")


def create_model(
    name: str,
    library: Library = "timm",
    *,
    num_classes: int | None = 10,
    in_chans: int = 3,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """Build a model, with random, published or own weights.

    Args:
        name: The model's name in its library, for timm with or without a weight tag.
        library: `"timm"`, `"torchvision"` (its classification models) or `"nni_plugin"`.
        num_classes: Outputs of the classifier; None takes the library's own number.
        in_chans: Channels of the images; torchvision has only models for 3.
        pretrained: Whether to fetch the library's weights; the classifier stays random where its number of
            outputs differs.
        checkpoint: A file of weights for exactly this model, see
            :func:`~nni_plugin.adapters.weights.read_state_dict`.
        **model_kwargs: Further arguments of the library's builder, e.g. timm's `img_size`: text, numbers,
            booleans, None and lists of these.

    Returns:
        The model in train mode, with its identity as `nni_plugin_identity`.

    Raises:
        ModelError: If library or name are unknown, the arguments do not suit the model, or the weights are
            missing, damaged or for another model.
    """
    if pretrained and checkpoint is not None:
        raise ModelError("Expected either pretrained weights or a checkpoint, got both; leave one out.")
    if library == "torchvision" and in_chans != 3:
        raise ModelError(
            f"torchvision's models take images of 3 channels, got in_chans={in_chans}; "
            "repeat the channel in the data (in_chans=3), or use timm."
        )
    kwargs = dict(model_kwargs)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if library != "torchvision":
        kwargs["in_chans"] = in_chans
    elif pretrained and name in _TRANSFORM_INPUT:
        kwargs["transform_input"] = True
    model = _construct(library, name, kwargs, pretrained=pretrained)
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    if checkpoint is not None:
        load_weights(model, read_state_dict(checkpoint), str(checkpoint))
    # nn.Module's own __setattr__ is for tensors and modules; this is neither, and survives deepcopy.
    model.nni_plugin_identity = ModelIdentity(library, name, kwargs)  # type: ignore[assignment]
    return model


def build(identity: ModelIdentity) -> nn.Module:
    """Build the dense architecture of an identity with random weights; never downloads or reads a file.

    Raises:
        ModelError: If the library is none of the three, the name is unknown in it, or the arguments are not
            plain values, name a source of weights, or do not suit the model.
    """
    model = _construct(identity.library, identity.name, dict(identity.kwargs), pretrained=False)
    model.nni_plugin_identity = identity  # type: ignore[assignment]
    return model


def identity_of(model: nn.Module) -> ModelIdentity | None:
    """How to build a model again, as far as it is known.

    Models of :func:`create_model` and :func:`build` carry their identity. Of a model made by
    `timm.create_model` the architecture and the arguments recorded by timm are used.

    Returns:
        The identity, or None for any other model and for arguments that JSON cannot hold.
    """
    identity = getattr(model, "nni_plugin_identity", None)
    if isinstance(identity, ModelIdentity):
        return identity
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not architecture or not timm.is_model(architecture):
        return None
    # timm also reports a default pooling here, which not every builder takes back.
    recorded = {*getattr(model, "_model_args", {}), "num_classes", "in_chans"}
    kwargs = {key: value for key, value in get_model_args(model).items() if key in recorded}
    if not all(_is_plain(value) for value in kwargs.values()):
        return None
    tag = config.get("tag")
    return ModelIdentity("timm", f"{architecture}.{tag}" if tag else architecture, kwargs)


def picture_format(name: str, library: str = "timm", *, in_chans: int = 3) -> dict[str, Any]:
    """How the published weights of a model of timm want their pictures; downloads nothing.

    Args:
        name: The model's name, with or without a weight tag.
        library: Only timm keeps a record.
        in_chans: Channels of the images; a single one gets the average of the three numbers.

    Returns:
        `img_size`, `mean`, `std`, `crop_pct`, `crop_mode` and `interpolation` for
        :func:`~nni_plugin.adapters.data.create_loaders`, as timm's `resolve_model_data_config` has them; without
        `img_size` for pictures that are not square. Empty where there is no record.

    Example:
        >>> picture_format("vit_tiny_patch16_224")["mean"], picture_format("efficientnet_b1")["img_size"]
        ((0.5, 0.5, 0.5), 240)
    """
    if library != "timm" or not _has("timm", name):
        return {}
    try:
        record = get_pretrained_cfg(name)
    except RuntimeError:
        return {}  # an unknown weight tag: building the model says so
    if record is None:
        return {}
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=record.to_dict())
    _, height, width = config.pop("input_size")
    if height == width:
        config["img_size"] = height
    for key in ("mean", "std"):
        values = config[key]
        config[key] = (round(sum(values) / len(values), 6),) if in_chans == 1 else tuple(values)
    return config


def _construct(library: str, name: str, kwargs: dict[str, Any], *, pretrained: bool) -> nn.Module:
    for key, value in kwargs.items():
        if key in _WEIGHT_SOURCES:
            raise ModelError(f"Argument {key!r} of model {name!r} is not taken: use pretrained= or checkpoint=.")
        if not _is_plain(value):
            raise ModelError(
                f"Argument {key!r} of model {name!r} must be text, a number, a boolean, None or a list "
                f"of these, so that the model can be saved; got {type(value).__name__}."
            )
    if library not in get_args(Library):
        raise ModelError(f"Unknown library {library!r}: expected one of {', '.join(get_args(Library))}.")
    builder = _BUILDERS[library]
    try:
        return builder(name, kwargs, pretrained)
    except ModelError:
        raise
    except Exception as error:
        # Builders raise anything from AssertionError to a network library's own classes.
        what = "fetch the published weights of" if pretrained else "build"
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{library} could not {what} {name!r} with {kwargs}: {type(error).__name__}: {reason}"
        ) from error


def _build_timm(name: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    # A source such as "hf-hub:" or "local-dir:" would read foreign files.
    if ":" in name or not timm.is_model(name):
        raise ModelError(_unknown("timm", name, timm.list_models()))
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    return model


def _build_torchvision(name: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ModelError(_unknown("torchvision", name, names))
    model: nn.Module = torchvision.models.get_model(name, weights=None, **kwargs)
    if pretrained:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        state: dict[str, Tensor] = dict(weights.get_state_dict(progress=False, check_hash=True))
        classes = len(weights.meta["categories"])
        own = model.state_dict()
        for key, value in state.items():
            # Only the rows of a classifier for another number of classes are left random.
            if key in own and value.shape != own[key].shape and value.shape[0] == classes:
                state[key] = own[key]
        load_weights(model, state, f"torchvision {name}")
    return model


def _build_own(name: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    if name not in NETWORKS:
        raise ModelError(_unknown("nni_plugin", name, list(NETWORKS)))
    if pretrained:
        raise ModelError(f"There are no published weights of {name!r}: give a checkpoint, or train it first.")
    return NETWORKS[name](**kwargs)


_BUILDERS: dict[str, Callable[[str, dict[str, Any], bool], nn.Module]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "nni_plugin": _build_own,
}


def _unknown(library: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    elsewhere = [other for other in get_args(Library) if other != library and _has(other, name)]
    hint = f"; the closest are {', '.join(close)}" if close else f"; it has {len(known)} models"
    where = f"; {elsewhere[0]} has it: use library={elsewhere[0]}" if elsewhere else ""
    return f"{library} has no model {name!r}{where or hint}."


def _has(library: str, name: str) -> bool:
    if library == "timm":
        return ":" not in name and bool(timm.is_model(name))
    if library == "torchvision":
        return name in torchvision.models.list_models(module=torchvision.models)
    return name in NETWORKS


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))
