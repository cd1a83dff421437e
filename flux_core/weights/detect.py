"""Sizes and family of a model, from the shapes in its header.

FLUX.1 dev, Kontext and Krea share every key and every shape: which of them a file is comes from
the user or, as a guess that the report names, from the file's name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, FamilyMismatchError
from ..families import AUTOENCODERS, FAMILIES, FLUX1_AUTOENCODER, FLUX1_DEV, FLUX1_SCHNELL
from ..specs import AutoencoderSpec, FluxFamily, TransformerSpec
from .autoencoder_keys import MOST_LEVELS
from .header import ANOTHER_FILE
from .layout import Shapes, count_numbers

FAMILY_KEY = "glassbox_family"  # in the metadata of files this project writes
# Packed input channels that tell FLUX.1's other tools from its plain models.
_TOOLS = {384: "FLUX.1 Fill [dev]", 128: "FLUX.1 Canny or Depth [dev]"}
_MOST_RES_BLOCKS = 16  # at one level; FLUX.1's autoencoder has 2

# The tensors that tell the sizes of a model.
FLUX1_SIZING = (
    "img_in.weight",
    "txt_in.weight",
    "vector_in.in_layer.weight",
    "double_blocks.0.img_mlp.0.weight",
    "final_layer.linear.weight",
)
AUTOENCODER_SIZING = (
    "encoder.conv_in.weight",
    "encoder.down.0.block.0.conv1.weight",
    "decoder.conv_in.weight",
)


@dataclass(frozen=True, slots=True)
class Known:
    """How it is known what a file is."""

    guessed: bool
    why: str


_OWN_SHAPE = Known(False, "known by its shape")
_SHARED_SHAPE = Known(True, "guessed from its shape, which SD3's autoencoder has too")


def spec_of_flux(shapes: Shapes) -> TransformerSpec:
    """Read the sizes of a FLUX.1 transformer.

    Args:
        shapes: by published name, without a prefix.

    Raises:
        CheckpointError: a tensor that tells a size is missing or malformed, or the model is one
            of FLUX.1's tools that take other inputs.
    """
    inputs, context, pooled, mlp, output = (_matrix(shapes, key) for key in FLUX1_SIZING)
    hidden, axes = inputs[0], FLUX1_DEV.transformer.axes_dim
    spec = TransformerSpec(
        hidden=hidden,
        double_blocks=count_numbers(shapes, "double_blocks."),
        single_blocks=count_numbers(shapes, "single_blocks."),
        mlp_ratio=mlp[0] / hidden,
        in_channels=inputs[1],
        out_channels=output[0],
        context_width=context[1],
        pooled_width=pooled[1],
        has_guidance=any(key.startswith("guidance_in.") for key in shapes),
        axes_dim=axes,
        theta=FLUX1_DEV.transformer.theta,
    )
    if spec.in_channels in _TOOLS:
        raise CheckpointError(
            f"This is {_TOOLS[spec.in_channels]}: it takes {spec.in_channels} channels a token.",
            "a FLUX.1 model that takes 64.",
            "choose FLUX.1 dev, Kontext, Krea or schnell, or ComfyUI's own loader for this one.",
        )
    if hidden % sum(axes) or spec.single_blocks == 0:
        raise CheckpointError(
            f"The model is {hidden} wide and has {spec.single_blocks} single blocks.",
            f"a width that is a multiple of {sum(axes)} and blocks of both kinds.",
            ANOTHER_FILE,
        )
    return spec


def spec_of_autoencoder(
    shapes: Shapes, metadata: Mapping[str, str]
) -> tuple[AutoencoderSpec, Known]:
    """Read the sizes of an autoencoder.

    Whose latents it makes cannot be read from shapes: the metadata say it, or a published
    autoencoder of the same sizes does, or it is taken for FLUX.1's.

    Raises:
        CheckpointError: a tensor that tells a size is missing, or the latent is of another kind.
    """
    channels = _sized(shapes, "encoder.conv_in.weight")[0]
    levels = count_numbers(shapes, "encoder.down.", MOST_LEVELS)
    widths = [_sized(shapes, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    found = replace(
        FLUX1_AUTOENCODER,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        res_blocks=count_numbers(shapes, "encoder.down.0.block.", _MOST_RES_BLOCKS),
    )
    said = FAMILIES.get(metadata.get(FAMILY_KEY, ""))
    how = Known(True, "guessed: no autoencoder of this size is known")
    for known in AUTOENCODERS:
        own = replace(found, norm_groups=known.norm_groups, latent=known.latent)
        if known.latent == said.latent if said else known == own:
            found = own
            how = Known(False, "named in the file")
            if not said:
                how = _SHARED_SHAPE if known == FLUX1_AUTOENCODER else _OWN_SHAPE
            break
    latent, factor = _sized(shapes, "decoder.conv_in.weight")[1:2], 2 ** (levels - 1)
    needed = found.latent
    if latent != (needed.channels,) or factor != needed.downscale:
        raise CheckpointError(
            f"This autoencoder makes latents of {sum(latent)} channels at 1/{factor} size.",
            f"{needed.channels} channels at 1/{needed.downscale}, as FLUX.1 has.",
            "choose the FLUX.1 autoencoder, ae.safetensors.",
        )
    if any(width % channels for width in widths) or channels % found.norm_groups:
        raise CheckpointError(
            f"The autoencoder's levels are {', '.join(map(str, widths))} channels wide.",
            f"multiples of the first, {channels}, which {found.norm_groups} must divide.",
            "choose the FLUX.1 autoencoder, ae.safetensors.",
        )
    return found, how


def choose_family(
    spec: TransformerSpec, path: Path, metadata: Mapping[str, str], asked: FluxFamily | None
) -> tuple[FluxFamily, Known]:
    """Decide which family a transformer is.

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
    if chosen is not None:
        _check_family(spec, path, chosen)
        return chosen, Known(False, "chosen by hand" if asked else "named in the file")
    fitting = [one for one in FAMILIES.values() if _fits(spec, one)]
    same = [one for one in fitting if one.transformer == spec]
    if len(same) == 1:
        return same[0], _OWN_SHAPE
    name = _plain(_telling_name(path))
    for family in same or fitting:
        if any(_plain(hint) in name for hint in family.file_hints):
            return family, Known(True, "guessed from the file name")
    plainest = FLUX1_DEV if spec.has_guidance else FLUX1_SCHNELL
    _check_family(spec, path, plainest)
    return plainest, Known(True, "guessed: nothing in the file or its name says more")


def differences(spec: TransformerSpec, family: FluxFamily) -> str:
    """Tell the size of a model that is not as large as its family; "" when it is."""
    if spec == family.transformer:
        return ""
    return (
        f"a custom size: width {spec.hidden}, {spec.double_blocks} + {spec.single_blocks} blocks, "
        f"text {spec.context_width} wide"
    )


def _fits(spec: TransformerSpec, family: FluxFamily) -> bool:
    width = family.latent.token_width
    return (spec.has_guidance, spec.in_channels, spec.out_channels) == (
        family.is_guidance_distilled,
        width,
        width,
    )


def _check_family(spec: TransformerSpec, path: Path, family: FluxFamily) -> None:
    if not _fits(spec, family):
        guidance = "a" if spec.has_guidance else "no"
        raise _mismatch(
            f"{path.name} has {guidance} guidance input, {spec.in_channels} channels in and "
            f"{spec.out_channels} out.",
            family,
        )


def _mismatch(found: str, family: FluxFamily) -> FamilyMismatchError:
    guidance = "a" if family.is_guidance_distilled else "no"
    width = family.latent.token_width
    return FamilyMismatchError(
        found,
        f"{family.title}, which has {guidance} guidance input and {width} channels in and out.",
        "choose another family in 'Load Model (FLUX)', or leave it at auto.",
    )


def _telling_name(path: Path) -> str:
    """Take the file's own name, or the folders' where the name is what diffusers always writes."""
    usual = path.name.startswith(("diffusion_pytorch_model", "model"))
    if path.suffix == ".safetensors" and not usual:
        return path.stem
    return "/".join(path.parts[-3:])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower())


def _matrix(shapes: Shapes, key: str) -> tuple[int, int]:
    shape = _sized(shapes, key)
    if len(shape) != 2:
        raise CheckpointError(
            f"'{key}' has {len(shape)} axes.", "a matrix of FLUX.1.", ANOTHER_FILE
        )
    return shape[0], shape[1]


def _sized(shapes: Shapes, key: str) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None or not shape or 0 in shape:
        found = f"'{key}' is missing." if shape is None else f"'{key}' is empty."
        raise CheckpointError(found, "a complete FLUX.1 file.", ANOTHER_FILE)
    return shape
