"""What model a file is: its sizes, read from shapes, and its family.

Whatever no shape tells (axes, theta, gating) a model has from its generation, as `families` says.
FLUX.1 dev, Kontext and Krea share every key and every shape, and so do FLUX.2 klein's distilled,
base and KV variants of one size: which of them a file is comes from the user or, as a guess that
the report names, from the file's name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, FamilyMismatchError
from ..families import AUTOENCODERS, FAMILIES, FLUX1_AUTOENCODER
from ..specs import AutoencoderSpec, FluxFamily, TransformerSpec
from ..types import Shapes
from .autoencoder_keys import MOST_LEVELS, NORMALISED
from .files import ANOTHER_FILE
from .key_map import count_numbers, matrix_sides, sized_shape
from .transformer_keys import SHARED_MODULATION

FAMILY_KEY = "glassbox_family"  # in the metadata of files this project writes
PUBLISHED_AUTOENCODER = "choose FLUX.1's ae.safetensors, or FLUX.2's flux2-vae.safetensors."
# Channels in and out of a token that tell FLUX.1's other tools from its plain models.
_TOOLS = {(384, 64): "FLUX.1 Fill [dev]", (128, 64): "FLUX.1 Canny or Depth [dev]"}
_MOST_RES_BLOCKS = 16  # at one level; the published autoencoders have 2

# The tensors that tell the sizes of a model.
_SIZING = (
    "img_in.weight",
    "txt_in.weight",
    "double_blocks.0.img_mlp.0.weight",
    "final_layer.linear.weight",
)
_POOLED = "vector_in.in_layer.weight"
AUTOENCODER_SIZING = (
    "encoder.conv_in.weight",
    "encoder.down.0.block.0.conv1.weight",
    "decoder.conv_in.weight",
    "decoder.up.0.block.0.conv1.weight",
)


@dataclass(frozen=True, slots=True)
class DetectedFamily:
    """Which family a transformer is, and how that is known."""

    family: FluxFamily
    guessed: bool
    known_by: str


@dataclass(frozen=True, slots=True)
class DetectedAutoencoder:
    """What an autoencoder is, and how it is known whose latents it makes."""

    spec: AutoencoderSpec
    guessed: bool
    known_by: str


def generation_of(keys: Iterable[str]) -> FluxFamily:
    """Returns the plainest family of the generation that keys without a prefix show."""
    shared = any(key.startswith(SHARED_MODULATION) for key in keys)
    return [one for one in FAMILIES.values() if one.transformer.shares_modulation == shared][-1]


def transformer_sizing(generation: FluxFamily) -> tuple[str, ...]:
    """Lists the tensors that tell the sizes of a transformer."""
    return (*_SIZING, _POOLED) if generation.transformer.pooled_width else _SIZING


def detect_transformer(shapes: Shapes) -> TransformerSpec:
    """Reads the sizes of a transformer.

    Args:
        shapes: by published name, without a prefix.

    Raises:
        CheckpointError: a tensor that tells a size is missing or malformed, or the model is one
            of FLUX.1's tools that take other inputs.
    """
    plain = generation_of(shapes).transformer
    inputs, context, mlp, output = (matrix_sides(shapes, key) for key in _SIZING)
    hidden = inputs[0]
    spec = replace(
        plain,
        hidden=hidden,
        double_blocks=count_numbers(shapes, "double_blocks."),
        single_blocks=count_numbers(shapes, "single_blocks."),
        mlp_ratio=mlp[0] / hidden / (2 if plain.is_gated else 1),
        in_channels=inputs[1],
        out_channels=output[0],
        context_width=context[1],
        pooled_width=matrix_sides(shapes, _POOLED)[1] if plain.pooled_width else 0,
        has_guidance=any(key.startswith("guidance_in.") for key in shapes),
    )
    tool = _TOOLS.get((spec.in_channels, spec.out_channels))
    if tool is not None:
        raise CheckpointError(
            f"This is {tool}: it takes {spec.in_channels} channels a token.",
            f"a FLUX.1 model that takes {spec.out_channels}, or a FLUX.2 model.",
            "choose a plain model of either in [model loader], or ComfyUI's own loader for this "
            "one.",
        )
    if hidden % spec.head_dim or spec.single_blocks == 0:
        raise CheckpointError(
            f"The model is {hidden} wide and has {spec.single_blocks} single blocks.",
            f"a width that is a multiple of {spec.head_dim} and blocks of both kinds.",
            ANOTHER_FILE,
        )
    return spec


def detect_autoencoder(shapes: Shapes, metadata: Mapping[str, str]) -> DetectedAutoencoder:
    """Reads the sizes of an autoencoder.

    Whose latents it makes cannot be read from shapes: the metadata say it, or a published
    autoencoder of the same sizes does, or it is taken for its generation's.

    Raises:
        CheckpointError: a tensor that tells a size is missing, or the latent is of another kind.
        FamilyMismatchError: it is built otherwise than the family that the metadata name.
    """
    spec, widths = _sizes_of_autoencoder(shapes)
    kin = [one for one in AUTOENCODERS if one.patch == spec.patch]
    said = FAMILIES.get(metadata.get(FAMILY_KEY, ""))
    if said is not None:
        kin = [one for one in kin if one.latent == said.latent]
        if not kin:
            raise FamilyMismatchError(
                f"The autoencoder says that it is of {said.title}, and is built like "
                f"{spec.latent.name}'s.",
                f"one that is built like {said.latent.name}'s.",
                ANOTHER_FILE,
            )
        spec = replace(spec, norm_groups=kin[0].norm_groups, latent=said.latent)
        detected = DetectedAutoencoder(spec, False, "named in the file")
    else:
        detected = _published_autoencoder(spec, kin)
    spec = detected.spec
    _check_latent(shapes, spec)
    channels = (spec.channels, spec.decoder_channels or spec.channels)
    if any(width % channels[0] for width in widths) or any(
        width % spec.norm_groups for width in channels
    ):
        raise CheckpointError(
            f"The autoencoder's levels are {', '.join(map(str, widths))} channels wide, its "
            f"decoder {channels[1]}.",
            f"multiples of the first, {channels[0]}; {spec.norm_groups} must divide both.",
            PUBLISHED_AUTOENCODER,
        )
    return detected


def describe_decoder(spec: AutoencoderSpec) -> str:
    """Describes a decoder with other widths than the encoder; "" when it has the same."""
    if spec.decoder_channels is None:
        return ""
    return f"a decoder {spec.decoder_channels} channels wide beside an encoder {spec.channels} wide"


def _sizes_of_autoencoder(shapes: Shapes) -> tuple[AutoencoderSpec, list[int]]:
    """Reads the sizes, and the width of every level of the encoder; the latent is guessed."""
    channels = sized_shape(shapes, "encoder.conv_in.weight")[0]
    levels = count_numbers(shapes, "encoder.down.", MOST_LEVELS)
    first_convs = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    widths = [sized_shape(shapes, name)[0] for name in first_convs]
    decoder = sized_shape(shapes, "decoder.up.0.block.0.conv1.weight")[0] * channels // widths[0]
    is_normalised = any(key.startswith(NORMALISED) for key in shapes)
    plain = next(one for one in AUTOENCODERS if (one.patch > 1) == is_normalised)
    spec = replace(
        plain,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        res_blocks=count_numbers(shapes, "encoder.down.0.block.", _MOST_RES_BLOCKS),
        decoder_channels=None if decoder == channels else decoder,
    )
    return spec, widths


def _published_autoencoder(
    spec: AutoencoderSpec, kin: Iterable[AutoencoderSpec]
) -> DetectedAutoencoder:
    """Returns the published autoencoder of these sizes, else the sizes with a guessed latent."""
    for one in kin:
        if one == replace(spec, norm_groups=one.norm_groups, latent=one.latent):
            if one == FLUX1_AUTOENCODER:
                shared = "guessed from its shape, which SD3's autoencoder has too"
                return DetectedAutoencoder(one, True, shared)
            return DetectedAutoencoder(one, False, "known by its shape")
    return DetectedAutoencoder(spec, True, "guessed: no autoencoder of this size is known")


def _check_latent(shapes: Shapes, spec: AutoencoderSpec) -> None:
    bottleneck = sized_shape(shapes, "decoder.conv_in.weight")[1:2]
    factor, needed = 2 ** (len(spec.channel_mult) - 1), spec.latent.downscale // spec.patch
    if bottleneck != (spec.bottleneck,) or factor != needed:
        raise CheckpointError(
            f"This autoencoder makes latents of {sum(bottleneck)} channels at 1/{factor} size.",
            f"{spec.bottleneck} channels at 1/{needed}, as {spec.latent.name} has.",
            PUBLISHED_AUTOENCODER,
        )


def detect_family(
    spec: TransformerSpec, path: Path, metadata: Mapping[str, str], asked: FluxFamily | None
) -> DetectedFamily:
    """Decides which family a transformer is.

    What the file says of itself and what the user says count first, then sizes that only one
    family has, then a guess from the file's name, then the plainest family.

    Raises:
        FamilyMismatchError: the family that was asked for, or that the file names, cannot be
            this model.
    """
    said = FAMILIES.get(metadata.get(FAMILY_KEY, ""))
    chosen = asked or said
    if asked is not None and said is not None and asked != said:
        raise _mismatch(f"{path.name} says that it is {said.title}.", asked)
    fitting = [one for one in FAMILIES.values() if _fits(spec, one)]
    same = [one for one in fitting if one.transformer == spec]
    if chosen is not None:
        _check_family(spec, path, chosen)
        return DetectedFamily(chosen, False, "chosen by hand" if asked else "named in the file")
    if len(same) == 1:
        return DetectedFamily(same[0], False, "known by its shape")
    name = _plain(_telling_name(path))
    for family in same or fitting:
        if any(_plain(hint) in name for hint in family.file_hints):
            return DetectedFamily(family, True, "guessed from the file name")
    plainest = (same or fitting or _kin(spec))[-1]
    _check_family(spec, path, plainest)
    return DetectedFamily(plainest, True, "guessed: nothing in the file or its name says more")


def describe_size(spec: TransformerSpec, family: FluxFamily) -> str:
    """Describes the size of a model that is not as large as its family; "" when it is."""
    if spec == family.transformer:
        return ""
    return (
        f"a custom size: width {spec.hidden}, {spec.double_blocks} + {spec.single_blocks} blocks, "
        f"text {spec.context_width} wide"
    )


def join_titles(families: Iterable[FluxFamily]) -> str:
    """Joins the titles of families as alternatives."""
    *others, last = (one.title for one in families)
    return f"{', '.join(others)} or {last}" if others else last


def _fits(spec: TransformerSpec, family: FluxFamily) -> bool:
    """Returns whether a transformer differs from a family's in its size only."""
    return spec == replace(
        family.transformer,
        hidden=spec.hidden,
        double_blocks=spec.double_blocks,
        single_blocks=spec.single_blocks,
        mlp_ratio=spec.mlp_ratio,
        context_width=spec.context_width,
        pooled_width=spec.pooled_width,
    )


def _kin(spec: TransformerSpec) -> list[FluxFamily]:
    """Returns the families of one generation with the same guidance, the plainest last."""
    return [
        one
        for one in FAMILIES.values()
        if one.transformer.shares_modulation == spec.shares_modulation
        and one.is_guidance_distilled == spec.has_guidance
    ]


def _check_family(spec: TransformerSpec, path: Path, family: FluxFamily) -> None:
    """Refuses what another family is, or what the family's keys contradict.

    A size that no family has may be anybody's experiment with any family that is built so.
    """
    twins = [one for one in FAMILIES.values() if one.transformer == spec]
    if not _fits(spec, family):
        kin = [one for one in _kin(spec) if _fits(spec, one)]
        like = f", as {join_titles(twins or kin[-1:])} has" if kin else ""
        raise _mismatch(f"{path.name} has {_inputs(spec)}{like}.", family)
    if twins and family not in twins:
        raise _mismatch(f"{path.name} is {_size(spec)}, as {join_titles(twins)} is.", family)


def _mismatch(found: str, family: FluxFamily) -> FamilyMismatchError:
    spec = family.transformer
    return FamilyMismatchError(
        found,
        f"{family.title}, which has {_inputs(spec)} and is {_size(spec)}.",
        "set [family] to another, or to auto.",
    )


def _inputs(spec: TransformerSpec) -> str:
    guidance = "a" if spec.has_guidance else "no"
    return f"{guidance} guidance input, {spec.in_channels} channels in and {spec.out_channels} out"


def _size(spec: TransformerSpec) -> str:
    return f"{spec.hidden} wide with {spec.double_blocks} + {spec.single_blocks} blocks"


def _telling_name(path: Path) -> str:
    """Returns the file's own name, or the folders' where diffusers always writes the same name."""
    usual = path.name.startswith(("diffusion_pytorch_model", "model"))
    if path.suffix in (".safetensors", ".gguf") and not usual:
        return path.stem
    return "/".join(path.parts[-3:])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower())
