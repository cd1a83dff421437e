"""What differs between the models, as frozen data.

A new family is one value here, one parity test and one workflow. No other file asks for a
family by name; where the data does not say enough, a field is missing here.
"""

from dataclasses import dataclass, replace
from typing import Literal

Placement = Literal["as wired", "offset", "index", "single"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """The latent as ComfyUI hands it over, and how the transformer reads it."""

    name: str
    channels: int
    downscale: int  # pixels per latent cell, each axis
    patch: int  # latent cells per token, each axis
    scale: float  # the transformer sees scale * (latent - shift)
    shift: float
    id_axes: tuple[str, ...]
    first_index: float  # where references begin on the first id axis; the target is at 0
    index_step: float  # from one reference to the next, for placement "index"
    # Red, green, blue in -1..1 from each scaled channel, then what is added; () = ComfyUI's own.
    preview_rgb: tuple[tuple[float, float, float], ...] = ()

    @property
    def token_width(self) -> int:
        """Channels of one token."""
        return self.channels * self.patch**2

    @property
    def token_px(self) -> int:
        """Pixels per token, each axis: picture sides are multiples of this."""
        return self.downscale * self.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSpec:
    """Shape of the transformer; everything but axes and theta is read from a checkpoint."""

    hidden: int
    double_blocks: int
    single_blocks: int
    mlp_ratio: float
    in_channels: int
    out_channels: int
    context_width: int
    pooled_width: int
    has_guidance: bool
    axes_dim: tuple[int, ...]
    theta: float

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return sum(self.axes_dim)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden // self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderSpec:
    """Shape of the autoencoder; the group count is the only part a checkpoint does not show."""

    channels: int
    channel_mult: tuple[int, ...]
    res_blocks: int
    norm_groups: int
    latent: LatentSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """Lengths the text encoders pad to, in tokens."""

    clip_tokens: int
    t5_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """The resolution-dependent shift: mu is linear in the target's token count."""

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    shifted: bool = True  # False: sigmas fall linearly


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxFamily:
    """One published model."""

    name: str
    title: str
    transformer: TransformerSpec
    latent: LatentSpec
    text: TextSpec
    trained_references: int  # how many references a picture had in training
    schedule: ScheduleSpec
    default_steps: int
    default_guidance: float
    file_hints: tuple[str, ...]  # substrings of file names; a hint is reported as a guess
    source: str

    @property
    def is_guidance_distilled(self) -> bool:
        """Guidance is an input of the network."""
        return self.transformer.has_guidance


FLUX1_LATENT = LatentSpec(
    name="FLUX.1",
    channels=16,
    downscale=8,
    patch=2,
    scale=0.3611,
    shift=0.1159,
    id_axes=("index", "row", "column"),
    first_index=1.0,
    index_step=1.0,
)
# The nano autoencoder is trained so that FLUX.1's scale and shift normalise it too; the latents
# still mean different pictures, hence a name of its own.
NANO_FLUX1_LATENT = replace(
    FLUX1_LATENT,
    name="FLUX.1 nano",
    preview_rgb=(  # least squares over drawn scenes
        (0.20, -0.01, -0.13),
        (-0.09, -0.17, -0.05),
        (0.07, -0.13, -0.11),
        (-0.12, 0.03, -0.05),
        (-0.25, -0.08, 0.16),
        (0.10, 0.03, 0.21),
        (0.13, 0.13, -0.03),
        (-0.04, 0.02, -0.04),
        (0.15, -0.07, 0.06),
        (0.00, 0.08, 0.23),
        (0.05, 0.11, 0.16),
        (0.18, 0.15, 0.09),
        (0.09, 0.16, -0.08),
        (0.03, -0.10, -0.03),
        (0.26, 0.13, 0.06),
        (0.04, -0.03, 0.07),
        (0.15, -0.08, -0.21),
    ),
)
LATENTS = {latent.name: latent for latent in (FLUX1_LATENT, NANO_FLUX1_LATENT)}

FLUX1_AUTOENCODER = AutoencoderSpec(
    channels=128, channel_mult=(1, 2, 4, 4), res_blocks=2, norm_groups=32, latent=FLUX1_LATENT
)

_FLUX1_TRANSFORMER = TransformerSpec(
    hidden=3072,
    double_blocks=19,
    single_blocks=38,
    mlp_ratio=4.0,
    in_channels=64,
    out_channels=64,
    context_width=4096,
    pooled_width=768,
    has_guidance=True,
    axes_dim=(16, 56, 56),
    theta=10_000.0,
)
_FLUX1_SCHNELL_TRANSFORMER = replace(_FLUX1_TRANSFORMER, has_guidance=False)

FLUX1_KONTEXT = FluxFamily(
    name="flux1-kontext",
    title="FLUX.1 Kontext [dev]",
    transformer=_FLUX1_TRANSFORMER,
    latent=FLUX1_LATENT,
    text=TextSpec(clip_tokens=77, t5_tokens=512),
    trained_references=1,
    schedule=ScheduleSpec(),
    default_steps=30,
    default_guidance=2.5,
    file_hints=("kontext",),
    source="black-forest-labs/flux@802fb47 src/flux/util.py configs, src/flux/cli_kontext.py",
)
FLUX1_DEV = FluxFamily(
    name="flux1-dev",
    title="FLUX.1 [dev]",
    transformer=_FLUX1_TRANSFORMER,
    latent=FLUX1_LATENT,
    text=TextSpec(clip_tokens=77, t5_tokens=512),
    trained_references=0,
    schedule=ScheduleSpec(),
    default_steps=50,
    default_guidance=2.5,
    file_hints=("flux1-dev", "flux-dev", "flux1_dev", "flux_dev"),
    source="black-forest-labs/flux@802fb47 src/flux/util.py configs, src/flux/cli.py",
)
FLUX1_KREA = FluxFamily(
    name="flux1-krea",
    title="FLUX.1 Krea [dev]",
    transformer=_FLUX1_TRANSFORMER,
    latent=FLUX1_LATENT,
    text=TextSpec(clip_tokens=77, t5_tokens=512),
    trained_references=0,
    schedule=ScheduleSpec(),
    default_steps=50,
    default_guidance=2.5,
    file_hints=("krea",),
    source="black-forest-labs/flux@802fb47 src/flux/util.py configs, src/flux/cli.py",
)
FLUX1_SCHNELL = FluxFamily(
    name="flux1-schnell",
    title="FLUX.1 [schnell]",
    transformer=_FLUX1_SCHNELL_TRANSFORMER,
    latent=FLUX1_LATENT,
    text=TextSpec(clip_tokens=77, t5_tokens=256),
    trained_references=0,
    schedule=ScheduleSpec(shifted=False),
    default_steps=4,
    default_guidance=0.0,  # huggingface/diffusers; it has no guidance input
    file_hints=("schnell",),
    source="black-forest-labs/flux@802fb47 src/flux/util.py configs, src/flux/cli.py",
)
NANO_KONTEXT = FluxFamily(
    name="nano-kontext",
    title="Glassbox nano Kontext",
    transformer=replace(
        _FLUX1_TRANSFORMER,
        hidden=256,
        double_blocks=2,
        single_blocks=4,
        context_width=192,
        pooled_width=128,
    ),
    latent=NANO_FLUX1_LATENT,
    text=TextSpec(clip_tokens=20, t5_tokens=20),
    trained_references=1,
    schedule=ScheduleSpec(),
    default_steps=8,
    default_guidance=1.0,
    file_hints=("glassbox_nano_kontext",),
    source="this project, flux_core/training/nano.py",
)
NANO_AUTOENCODER = AutoencoderSpec(
    channels=16, channel_mult=(1, 2, 4, 8), res_blocks=1, norm_groups=2, latent=NANO_FLUX1_LATENT
)

AUTOENCODERS = (FLUX1_AUTOENCODER, NANO_AUTOENCODER)

# In the order their file hints are tried: "flux1-dev-kontext" is Kontext.
FAMILIES = {
    family.name: family
    for family in (NANO_KONTEXT, FLUX1_KONTEXT, FLUX1_KREA, FLUX1_SCHNELL, FLUX1_DEV)
}
