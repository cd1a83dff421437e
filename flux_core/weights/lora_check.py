"""Does a LoRA fit a transformer? Said from its header, before any weight is read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..errors import CheckpointError, FamilyMismatchError
from ..families import FLUX1_DEV
from ..specs import FluxFamily, TransformerSpec
from ..transformer.flux import build_flux
from .check import shapes_of
from .choose import differences
from .files import Checkpoint
from .kinds import LORA, PARTS, TRANSFORMERS, identify
from .layout import Shapes
from .lora_kind import lora_title
from .lora_layers import Target, targets_of
from .lora_names import LoraLayer, LoraNames, Role, sort_names
from .names import shorten
from .report import dtype_name

CHOOSE = "choose another file in 'Apply LoRA (FLUX)'."
_NATIVE = (
    "choose another file in 'Apply LoRA (FLUX)', or apply this one with ComfyUI's own 'Load LoRA' "
    "to a native MODEL."
)
_CONTROL = "FLUX.1's Canny or Depth LoRA"
_CONTROL_CHANNELS = 2 * FLUX1_DEV.transformer.in_channels  # the noisy picture's, and the other's
_NORM = "_norm.scale"
# Which tensors need which beside them.
_WHOLE: tuple[tuple[Role, tuple[Role, ...]], ...] = (
    ("down", ("up",)),
    ("up", ("down",)),
    ("bias", ("up", "down")),
    ("first a", ("first b",)),
    ("first b", ("first a",)),
    ("second a", ("second b",)),
    ("second b", ("second a",)),
)
_FIRST: tuple[Role, ...] = ("first", "first a")
_SECOND: tuple[Role, ...] = ("second", "second a")
# Each says a layer's whole change, or a whole factor of it: one of each will do.
_ALONE: tuple[tuple[Role, ...], ...] = (("down", "first", "first a", "full"), _FIRST, _SECOND)


@dataclass(frozen=True, slots=True)
class LoraSetup:
    """A LoRA that fits: which of its layers changes what."""

    title: str
    names: LoraNames
    shapes: Shapes  # of the transformer's tensors
    matched: dict[str, Target]  # by plain name
    absent: tuple[str, ...]  # plain names of layers that this model does without
    norms: tuple[str, ...]  # keys of norms that take the place of the transformer's


def check_lora(
    checkpoint: Checkpoint,
    family: FluxFamily,
    spec: TransformerSpec,
    *,
    takes_control: bool = False,
) -> LoraSetup:
    """Match a LoRA's layers to a transformer.

    Args:
        checkpoint: the LoRA's file.
        family: which model the transformer is.
        spec: its real shape.
        takes_control: its input may become as wide as FLUX.1's Canny and Depth LoRAs need it.

    Raises:
        CheckpointError: it is no LoRA, of a kind that is not computed here, half or malformed.
        FamilyMismatchError: it was made for another model.
    """
    names = sort_names(checkpoint.shapes)
    norms = _control_norms(checkpoint, names) if takes_control else ()
    _check_kind(checkpoint, names, norms)
    title = lora_title(checkpoint.shapes)
    if norms:
        title, spec = _CONTROL, replace(spec, in_channels=_CONTROL_CHANNELS)
    shapes = _shapes(family, spec)
    known = targets_of(shapes)
    # A layer that only a variant with guidance has is left out; any other tells another model.
    guided = targets_of(_shapes(family, replace(spec, has_guidance=True)))
    optional = guided.keys() - known.keys()
    strangers = [name for name in names.layers if name not in known and name not in optional]
    matched = {name: known[name] for name in names.layers if name in known}
    wrong = [
        f"its {shorten(names.layers[name].name)} is {_by(size)} and not "
        f"{_by((target.rows, target.columns))}"
        for name, target in matched.items()
        if not _agrees(size := names.layers[name].size(checkpoint.shapes), target)
    ]
    wrong += [f"this model has no {shorten(names.layers[name].name)}" for name in strangers]
    wrong += [
        f"this model has no {shorten(key)} of {_by(checkpoint.shapes[key])}"
        for key in norms
        if shapes.get(key) != checkpoint.shapes[key]
    ]
    if wrong:
        raise _another_model(checkpoint, title, wrong, family, spec)
    for name, target in matched.items():
        _check_layer(checkpoint, names.layers[name], target, shapes)
    if not matched:
        raise CheckpointError(
            f"{checkpoint.path.name} is {title}, and changes no layer of this model.",
            f"a LoRA for {_title(family, spec)}.",
            CHOOSE,
        )
    absent = tuple(name for name in names.layers if name in optional)
    if "another size" in title or title == "a LoRA":
        title = f"a LoRA for {_title(family, spec)}"
    return LoraSetup(title, names, shapes, matched, absent, norms)


def _control_norms(checkpoint: Checkpoint, names: LoraNames) -> tuple[str, ...]:
    """List the norms of FLUX.1's Canny or Depth LoRA; none of any other file."""
    layers = names.layers
    inputs = layers["img_in"].size(checkpoint.shapes)[1] if "img_in" in layers else 0
    # FLUX.2's own input is as wide, but none of its layers has a bias.
    if inputs != _CONTROL_CHANNELS or not any("bias" in one.keys for one in layers.values()):
        return ()
    return tuple(key for key in names.unknown if key.endswith(_NORM))


def _check_kind(checkpoint: Checkpoint, names: LoraNames, taken: tuple[str, ...]) -> None:
    """Refuse what is no LoRA of this kind, by its name; norms may be taken with it."""
    file = checkpoint.path.name
    if not names.layers:
        others = [kind for kind in (*TRANSFORMERS, *PARTS) if kind != LORA]
        kind = identify(checkpoint.shapes, checkpoint.metadata, others)
        said = "holds no LoRA" if kind is None else f"is {kind.title}, not a LoRA"
        if names.text and kind is None:
            said = f"is a LoRA for a text encoder: all its {len(names.text)} tensors are"
        raise CheckpointError(
            f"{file} {said}.",
            "a LoRA of a FLUX.1 or FLUX.2 transformer.",
            CHOOSE if kind is None else kind.fix,
        )
    norms = [key for key in names.unknown if key.endswith(_NORM)]
    if not taken and _control_norms(checkpoint, names):
        raise CheckpointError(
            f"{file} is {_CONTROL}: it makes the model take {_CONTROL_CHANNELS} channels a "
            "token, half of them a control picture's.",
            "a LoRA that leaves the model's inputs as they are.",
            "wire ComfyUI's own MODEL of FLUX.1 [dev] to 'Apply LoRA (FLUX)', and use its output "
            "'native' with 'InstructPixToPixConditioning' and KSampler.",
        )
    if norms and not taken:
        raise CheckpointError(
            f"{file} replaces {len(norms)} norms, first '{shorten(norms[0])}'.",
            "a LoRA that adds to linear layers.",
            _NATIVE,
        )
    strange = {kind for layer in names.layers.values() for kind in layer.others}
    if strange:
        raise CheckpointError(
            f"{file} is {' and '.join(sorted(strange))}.", "a LoRA or a LoKr.", _NATIVE
        )
    if names.twice:
        raise CheckpointError(
            f"{file} says {len(names.twice)} things twice, first '{shorten(names.twice[0])}'.",
            "each layer once.",
            CHOOSE,
        )


def _check_layer(checkpoint: Checkpoint, layer: LoraLayer, target: Target, shapes: Shapes) -> None:
    """Refuse half a layer, and tensors that do not fit one another."""
    faults = [*_halves(layer), *_misshapen(checkpoint, layer, target, shapes)]
    if faults:
        raise CheckpointError(
            f"{checkpoint.path.name} cannot be applied: of {shorten(layer.name)}, {faults[0]}.",
            "two matrices of one rank for each layer, of floating-point numbers.",
            CHOOSE,
        )


def _halves(layer: LoraLayer) -> Iterator[str]:
    keys = layer.keys
    for role, needed in _WHOLE:
        if role in keys and any(one not in keys for one in needed):
            yield f"{_end(keys[role])} is there without its other half"
    if any(one in keys for one in _FIRST) != any(one in keys for one in _SECOND):
        yield "one of the two factors of a LoKr is there without the other"
    for ways in _ALONE:
        said = [_end(keys[role]) for role in ways if role in keys]
        if len(said) > 1:
            yield f"{' and '.join(said)} both say what the change is"
    if not keys.keys() - {"alpha"}:
        yield "nothing is there but alpha"


def _misshapen(
    checkpoint: Checkpoint, layer: LoraLayer, target: Target, shapes: Shapes
) -> Iterator[str]:
    sizes = {role: checkpoint.shapes[key] for role, key in layer.keys.items()}
    for role, key in layer.keys.items():
        dtype, size = checkpoint.dtypes[key], sizes[role]
        if role == "alpha":
            if math.prod(size) != 1:
                yield f"alpha is {_by(size)} and not one number"
        elif not dtype.is_floating_point:
            yield f"{_end(key)} is stored as {dtype_name(dtype)}"
        elif role in ("bias", "full bias"):
            biased = target.key.removesuffix("weight") + "bias"
            if biased not in shapes:
                yield f"{_end(key)} changes a bias that this model does not have"
            elif size != (target.rows,):
                yield f"{_end(key)} is {_by(size)} and not {target.rows}"
        elif len(size) != 2 or 0 in size:
            yield f"{_end(key)} is {_by(size)}, which is no matrix"
    most = max(target.rows, target.columns)
    for left, right in (("up", "down"), ("first a", "first b"), ("second a", "second b")):
        pair = (sizes.get(left, ()), sizes.get(right, ()))
        if len(pair[0]) == len(pair[1]) == 2:
            if pair[0][1] != pair[1][0]:
                yield f"the ranks of the two matrices are {pair[1][0]} and {pair[0][1]}"
            elif pair[1][0] > most:
                yield f"the rank is {pair[1][0]:,}, and the layer no wider than {most:,}"


def _another_model(
    checkpoint: Checkpoint,
    title: str,
    wrong: list[str],
    family: FluxFamily,
    spec: TransformerSpec,
) -> FamilyMismatchError:
    more = f" ({len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
    return FamilyMismatchError(
        f"{checkpoint.path.name} is {title}: {wrong[0]}{more}.",
        f"a LoRA for {_title(family, spec)}.",
        "choose another file in 'Apply LoRA (FLUX)', or load the model that this one was made for.",
    )


def _title(family: FluxFamily, spec: TransformerSpec) -> str:
    custom = differences(spec, family)
    return f"{family.title} ({custom})" if custom else family.title


@lru_cache(maxsize=8)
def _shapes(family: FluxFamily, spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    network = build_flux(family, spec, device="meta")
    return shapes_of(network.modulation) | shapes_of(network.blocks)


def _agrees(size: tuple[int, int], target: Target) -> bool:
    pairs = zip(size, (target.rows, target.columns), strict=True)
    return all(given in (0, needed) for given, needed in pairs)


def _by(shape: tuple[int, ...]) -> str:
    return shorten("x".join(map(str, shape))) or "a single value"


def _end(key: str) -> str:
    return shorten(key[-40:])
