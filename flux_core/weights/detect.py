"""Sizes of a model, from the shapes in its header.

Whatever no shape tells (axes, theta, gating) a model has from its generation, as `families` says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..errors import CheckpointError, FamilyMismatchError
from ..families import AUTOENCODERS, FAMILIES, FLUX1_AUTOENCODER
from ..specs import AutoencoderSpec, FluxFamily, TransformerSpec
from .autoencoder_keys import MOST_LEVELS, NORMALISED
from .header import ANOTHER_FILE
from .layout import Shapes, count_numbers
from .transformer_keys import SHARED_MODULATION

FAMILY_KEY = "glassbox_family"  # in the metadata of files this project writes
# Channels in and out of a token that tell FLUX.1's other tools from its plain models.
_TOOLS = {(384, 64): "FLUX.1 Fill [dev]", (128, 64): "FLUX.1 Canny or Depth [dev]"}
_MOST_RES_BLOCKS = 16  # at one level; the published autoencoders have 2
_PUBLISHED = "choose FLUX.1's ae.safetensors, or FLUX.2's flux2-vae.safetensors."

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
class Known:
    """How it is known what a file is."""

    guessed: bool
    why: str


OWN_SHAPE = Known(False, "known by its shape")
_SHARED_SHAPE = Known(True, "guessed from its shape, which SD3's autoencoder has too")


def generation_of(keys: Iterable[str]) -> FluxFamily:
    """Give the plainest family of the generation that keys without a prefix show."""
    shared = any(key.startswith(SHARED_MODULATION) for key in keys)
    return [one for one in FAMILIES.values() if one.transformer.shares_modulation == shared][-1]


def flux_sizing(generation: FluxFamily) -> tuple[str, ...]:
    """Name the tensors that tell the sizes of a transformer."""
    return (*_SIZING, _POOLED) if generation.transformer.pooled_width else _SIZING


def spec_of_flux(shapes: Shapes) -> TransformerSpec:
    """Read the sizes of a transformer.

    Args:
        shapes: by published name, without a prefix.

    Raises:
        CheckpointError: a tensor that tells a size is missing or malformed, or the model is one
            of FLUX.1's tools that take other inputs.
    """
    plain = generation_of(shapes).transformer
    inputs, context, mlp, output = (_matrix(shapes, key) for key in _SIZING)
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
        pooled_width=_matrix(shapes, _POOLED)[1] if plain.pooled_width else 0,
        has_guidance=any(key.startswith("guidance_in.") for key in shapes),
    )
    tool = _TOOLS.get((spec.in_channels, spec.out_channels))
    if tool is not None:
        raise CheckpointError(
            f"This is {tool}: it takes {spec.in_channels} channels a token.",
            f"a FLUX.1 model that takes {spec.out_channels}, or a FLUX.2 model.",
            "choose a plain model of either, or ComfyUI's own loader for this one.",
        )
    if hidden % spec.head_dim or spec.single_blocks == 0:
        raise CheckpointError(
            f"The model is {hidden} wide and has {spec.single_blocks} single blocks.",
            f"a width that is a multiple of {spec.head_dim} and blocks of both kinds.",
            ANOTHER_FILE,
        )
    return spec


def spec_of_autoencoder(
    shapes: Shapes, metadata: Mapping[str, str]
) -> tuple[AutoencoderSpec, Known]:
    """Read the sizes of an autoencoder.

    Whose latents it makes cannot be read from shapes: the metadata say it, or a published
    autoencoder of the same sizes does, or it is taken for its generation's.

    Raises:
        CheckpointError: a tensor that tells a size is missing, or the latent is of another kind.
        FamilyMismatchError: it is built otherwise than the family that the metadata name.
    """
    found, widths = _sizes_of_autoencoder(shapes)
    kin = [one for one in AUTOENCODERS if one.patch == found.patch]
    said = FAMILIES.get(metadata.get(FAMILY_KEY, ""))
    if said is not None:
        kin = [one for one in kin if one.latent == said.latent]
        if not kin:
            raise FamilyMismatchError(
                f"The autoencoder says that it is of {said.title}, and is built like "
                f"{found.latent.name}'s.",
                f"one that is built like {said.latent.name}'s.",
                ANOTHER_FILE,
            )
        found = replace(found, norm_groups=kin[0].norm_groups, latent=said.latent)
        how = Known(False, "named in the file")
    else:
        how = Known(True, "guessed: no autoencoder of this size is known")
        for known in kin:
            if known == replace(found, norm_groups=known.norm_groups, latent=known.latent):
                found = known
                how = _SHARED_SHAPE if known == FLUX1_AUTOENCODER else OWN_SHAPE
                break
    _check_latent(shapes, found)
    channels = (found.channels, found.decoder_channels or found.channels)
    if any(width % channels[0] for width in widths) or any(
        width % found.norm_groups for width in channels
    ):
        raise CheckpointError(
            f"The autoencoder's levels are {', '.join(map(str, widths))} channels wide, its "
            f"decoder {channels[1]}.",
            f"multiples of the first, {channels[0]}; {found.norm_groups} must divide both.",
            _PUBLISHED,
        )
    return found, how


def narrow_decoder(spec: AutoencoderSpec) -> str:
    """Tell that the decoder has other widths than the encoder; "" when it has the same."""
    if spec.decoder_channels is None:
        return ""
    return f"a decoder {spec.decoder_channels} channels wide beside an encoder {spec.channels} wide"


def _sizes_of_autoencoder(shapes: Shapes) -> tuple[AutoencoderSpec, list[int]]:
    """Read the sizes, and the width of every level of the encoder; the latent is guessed."""
    channels = _sized(shapes, "encoder.conv_in.weight")[0]
    levels = count_numbers(shapes, "encoder.down.", MOST_LEVELS)
    widths = [_sized(shapes, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    decoder = _sized(shapes, "decoder.up.0.block.0.conv1.weight")[0] * channels // widths[0]
    is_normalised = any(key.startswith(NORMALISED) for key in shapes)
    plain = next(one for one in AUTOENCODERS if (one.patch > 1) == is_normalised)
    found = replace(
        plain,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        res_blocks=count_numbers(shapes, "encoder.down.0.block.", _MOST_RES_BLOCKS),
        decoder_channels=None if decoder == channels else decoder,
    )
    return found, widths


def _check_latent(shapes: Shapes, spec: AutoencoderSpec) -> None:
    bottleneck = _sized(shapes, "decoder.conv_in.weight")[1:2]
    factor, needed = 2 ** (len(spec.channel_mult) - 1), spec.latent.downscale // spec.patch
    if bottleneck != (spec.bottleneck,) or factor != needed:
        raise CheckpointError(
            f"This autoencoder makes latents of {sum(bottleneck)} channels at 1/{factor} size.",
            f"{spec.bottleneck} channels at 1/{needed}, as {spec.latent.name} has.",
            _PUBLISHED,
        )


def _matrix(shapes: Shapes, key: str) -> tuple[int, int]:
    shape = _sized(shapes, key)
    if len(shape) != 2:
        raise CheckpointError(f"'{key}' has {len(shape)} axes.", "a matrix of FLUX.", ANOTHER_FILE)
    return shape[0], shape[1]


def _sized(shapes: Shapes, key: str) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None or not shape or 0 in shape:
        found = f"'{key}' is missing." if shape is None else f"'{key}' is empty."
        raise CheckpointError(found, "a complete FLUX file.", ANOTHER_FILE)
    return shape
