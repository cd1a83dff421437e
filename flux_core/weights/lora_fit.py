"""Whether a LoRA fits a transformer, judged by its header before any weight is read; the report."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..errors import CheckpointError, FamilyMismatchError, shorten
from ..families import FLUX1_DEV
from ..specs import FluxFamily, TransformerSpec
from ..transformer.flux import build_flux
from ..types import Shapes
from .checkpoint import Checkpoint, dtype_name
from .detect import describe_size
from .key_map import by, shapes_of
from .kinds import LORA, PARTS, TRANSFORMERS, identify, lora_title
from .lora_keys import CHOOSE, LoraKeys, LoraLayer, LoraTarget, Role, sort_keys, targets_of

_NATIVE = (
    "choose another file in [LoRA loader], or apply this one with ComfyUI's own 'Load LoRA' to a "
    "native MODEL."
)
_CONTROL = "FLUX.1's Canny or Depth LoRA"
_CONTROL_CHANNELS = (
    2 * FLUX1_DEV.transformer.in_channels
)  # the noisy image's, and the control image's
_NORM = "_norm.scale"
_LISTED = 5  # names of each list of the report
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
class LoraFit:
    """A LoRA that fits: which of its layers changes what."""

    title: str
    keys: LoraKeys
    shapes: Shapes  # of the transformer's tensors
    matched: dict[str, LoraTarget]  # by plain name
    absent: tuple[str, ...]  # plain names of layers that this model does without
    norms: tuple[str, ...]  # keys of norms that replace the transformer's


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraReport:
    """One LoRA, every key of its file accounted for."""

    source: str  # the file, by name
    title: str  # which models it is for
    writer: str  # which program's way of naming it is
    ranks: tuple[int, ...]  # each once; none of a LoKr without a product
    scales: tuple[float, ...]  # alpha / rank, each once
    layers: int
    matched: tuple[str, ...]  # keys that change this model
    absent: tuple[str, ...]  # of layers that this model does not have
    text: tuple[str, ...]  # of text encoders
    unknown: tuple[str, ...]  # of nothing that is known

    @property
    def keys(self) -> int:
        """How many keys the file has."""
        return len(self.matched) + len(self.unmatched)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The keys that change nothing."""
        return (*self.absent, *self.text, *self.unknown)

    def __str__(self) -> str:
        """One fact per line."""
        lines = [
            f"{self.source} is {self.title}",
            f"format: {self.writer}",
            f"rank {_range(self.ranks) or 'full'}, alpha / rank {_range(self.scales)}",
            f"matched: {len(self.matched)} of {self.keys} keys, {self.layers} layers",
            f"unmatched: {len(self.unmatched)} keys",
        ]
        for keys, what in (
            (self.absent, "layers that this model does not have"),
            (self.text, "a text encoder, left alone"),
            (self.unknown, "not known"),
        ):
            if keys:
                rest = ", …" if len(keys) > _LISTED else ""
                lines.append(f"- {what}: {', '.join(map(shorten, keys[:_LISTED]))}{rest}")
        return "\n".join(lines)


def fit_lora(
    checkpoint: Checkpoint,
    family: FluxFamily,
    spec: TransformerSpec,
    *,
    takes_control: bool = False,
) -> LoraFit:
    """Matches a LoRA's layers to a transformer.

    Args:
        checkpoint: the LoRA's file.
        family: which model the transformer is.
        spec: its real shape.
        takes_control: its input may become as wide as FLUX.1's Canny and Depth LoRAs need it.

    Raises:
        CheckpointError: it is no LoRA, of a kind that is not computed here, half or malformed.
        FamilyMismatchError: it was made for another model.
    """
    keys = sort_keys(checkpoint.shapes)
    norms = _control_norms(checkpoint, keys) if takes_control else ()
    _check_kind(checkpoint, keys, norms)
    title = lora_title(checkpoint.shapes)
    if norms:
        title, spec = _CONTROL, replace(spec, in_channels=_CONTROL_CHANNELS)
    shapes = _shapes(family, spec)
    known = targets_of(shapes)
    # A layer that only a variant with guidance has is skipped; any other means another model.
    guided = targets_of(_shapes(family, replace(spec, has_guidance=True)))
    optional = guided.keys() - known.keys()
    strangers = [name for name in keys.layers if name not in known and name not in optional]
    matched = {name: known[name] for name in keys.layers if name in known}
    wrong = [
        f"its {shorten(keys.layers[name].name)} is {by(size)} and not "
        f"{by((target.rows, target.columns))}"
        for name, target in matched.items()
        if not target.agrees(size := keys.layers[name].size(checkpoint.shapes))
    ]
    wrong += [f"this model has no {shorten(keys.layers[name].name)}" for name in strangers]
    wrong += [
        f"this model has no {shorten(key)} of {by(checkpoint.shapes[key])}"
        for key in norms
        if shapes.get(key) != checkpoint.shapes[key]
    ]
    if wrong:
        raise _another_model(checkpoint, title, wrong, family, spec)
    for name, target in matched.items():
        _check_layer(checkpoint, keys.layers[name], target, shapes)
    if not matched:
        raise CheckpointError(
            f"{checkpoint.path.name} is {title}, and changes no layer of this model.",
            f"a LoRA for {_title(family, spec)}.",
            CHOOSE,
        )
    absent = tuple(name for name in keys.layers if name in optional)
    if "another size" in title or title == "a LoRA":
        title = f"a LoRA for {_title(family, spec)}"
    return LoraFit(title, keys, shapes, matched, absent, norms)


def report_lora(checkpoint: Checkpoint, fit: LoraFit, scales: Iterable[float]) -> LoraReport:
    """Describes a LoRA that fits.

    Args:
        checkpoint, fit: the file, and what it changes.
        scales: alpha / rank of every layer.
    """
    keys = fit.keys
    ranks = {keys.layers[name].rank(checkpoint.shapes) for name in fit.matched}
    return LoraReport(
        source=checkpoint.path.name,
        title=fit.title,
        writer=keys.writer,
        ranks=tuple(sorted(ranks - {0})),
        scales=tuple(sorted({float(f"{one:.6g}") for one in scales})),
        layers=len(fit.matched),
        matched=(
            *(key for name in fit.matched for key in keys.layers[name].keys.values()),
            *fit.norms,
        ),
        absent=tuple(key for name in fit.absent for key in keys.layers[name].keys.values()),
        text=keys.text,
        unknown=tuple(key for key in keys.unknown if key not in fit.norms),
    )


def _control_norms(checkpoint: Checkpoint, keys: LoraKeys) -> tuple[str, ...]:
    """Lists the norms of FLUX.1's Canny or Depth LoRA; none of any other file."""
    layers = keys.layers
    inputs = layers["img_in"].size(checkpoint.shapes)[1] if "img_in" in layers else 0
    # FLUX.2's own input is as wide, but none of its layers has a bias.
    if inputs != _CONTROL_CHANNELS or not any("bias" in one.keys for one in layers.values()):
        return ()
    return tuple(key for key in keys.unknown if key.endswith(_NORM))


def _check_kind(checkpoint: Checkpoint, keys: LoraKeys, taken: tuple[str, ...]) -> None:
    """Refuses what is no LoRA of this kind, by its name; norms may be taken with it."""
    file = checkpoint.path.name
    if not keys.layers:
        others = [kind for kind in (*TRANSFORMERS, *PARTS) if kind != LORA]
        kind = identify(checkpoint.shapes, checkpoint.metadata, others)
        said = "holds no LoRA" if kind is None else f"is {kind.title}, not a LoRA"
        if keys.text and kind is None:
            said = f"is a LoRA for a text encoder: all its {len(keys.text)} tensors are"
        raise CheckpointError(
            f"{file} {said}.",
            "a LoRA of a FLUX.1 or FLUX.2 transformer.",
            CHOOSE if kind is None else kind.fix,
        )
    norms = [key for key in keys.unknown if key.endswith(_NORM)]
    if not taken and _control_norms(checkpoint, keys):
        raise CheckpointError(
            f"{file} is {_CONTROL}: it makes the model take {_CONTROL_CHANNELS} channels a "
            "token, half of them a control image's.",
            "a LoRA that leaves the model's inputs as they are.",
            "wire ComfyUI's own MODEL of FLUX.1 dev to [LoRA loader], and use its output 'native' "
            "with 'InstructPixToPixConditioning' and KSampler.",
        )
    if norms and not taken:
        raise CheckpointError(
            f"{file} replaces {len(norms)} norms, first '{shorten(norms[0])}'.",
            "a LoRA that adds to linear layers.",
            _NATIVE,
        )
    strange = {kind for layer in keys.layers.values() for kind in layer.others}
    if strange:
        raise CheckpointError(
            f"{file} is {' and '.join(sorted(strange))}.", "a LoRA or a LoKr.", _NATIVE
        )
    if keys.duplicates:
        raise CheckpointError(
            f"{file} says {len(keys.duplicates)} things twice, first "
            f"'{shorten(keys.duplicates[0])}'.",
            "each layer once.",
            CHOOSE,
        )


def _check_layer(
    checkpoint: Checkpoint, layer: LoraLayer, target: LoraTarget, shapes: Shapes
) -> None:
    """Refuses half a layer, and tensors that do not fit one another."""
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
    checkpoint: Checkpoint, layer: LoraLayer, target: LoraTarget, shapes: Shapes
) -> Iterator[str]:
    sizes = {role: checkpoint.shapes[key] for role, key in layer.keys.items()}
    for role, key in layer.keys.items():
        dtype, size = checkpoint.dtypes[key], sizes[role]
        if role == "alpha":
            if math.prod(size) != 1:
                yield f"alpha is {by(size)} and not one number"
        elif not dtype.is_floating_point:
            yield f"{_end(key)} is stored as {dtype_name(dtype)}"
        elif role in ("bias", "full bias"):
            biased = target.key.removesuffix("weight") + "bias"
            if biased not in shapes:
                yield f"{_end(key)} changes a bias that this model does not have"
            elif size != (target.rows,):
                yield f"{_end(key)} is {by(size)} and not {target.rows}"
        elif len(size) != 2 or 0 in size:
            yield f"{_end(key)} is {by(size)}, which is no matrix"
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
        "choose another file in [LoRA loader], or load the model that this one was made for.",
    )


def _title(family: FluxFamily, spec: TransformerSpec) -> str:
    custom = describe_size(spec, family)
    return f"{family.title} ({custom})" if custom else family.title


@lru_cache(maxsize=8)
def _shapes(family: FluxFamily, spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    network = build_flux(family, spec, device="meta")
    return shapes_of(network.modulation) | shapes_of(network.blocks)


def _end(key: str) -> str:
    return shorten(key[-40:])


def _range(numbers: tuple[float, ...]) -> str:
    if len(numbers) > 1:
        return f"{numbers[0]:g} to {numbers[-1]:g}"
    return "".join(f"{one:g}" for one in numbers)
