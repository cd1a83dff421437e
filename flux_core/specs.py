"""The types of the data in `families.py`: what can differ between models."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Placement = Literal["as wired", "offset", "index", "single", "auto"]
SegmentKind = Literal["text", "target", "reference"]
Guidance = Literal["embedded", "true cfg", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSize:
    """The sizes of images that a model takes as references; the published code rejects others."""

    shortest_px: int  # the shortest valid side
    longest_aspect: float  # the highest valid ratio of long to short side
    most_px: int  # the most pixels in all: a larger image is scaled down
    multiple: int  # what both sides are cropped to, in pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """The latent in ComfyUI's layout, and how the transformer reads it."""

    name: str
    channels: int
    downscale: int  # pixels per latent cell, each axis
    patch: int  # latent cells per token, each axis
    scale: float  # the transformer reads scale * (latent - shift)
    shift: float
    id_axes: tuple[str, ...]  # index, row, column; FLUX.2 has one more, for text tokens
    text_axis: int | None = None  # the id axis that counts text tokens; None: text has all zeros
    first_index: float  # the first reference's first id; the target's is 0
    index_step: float  # from one reference to the next, for placement "index"
    placement: Placement = "offset"  # the default for references
    reference: ReferenceSize | None = None  # the valid sizes of references; None: any
    # Red, green, blue in -1..1 from each scaled channel, then the bias; (): ComfyUI's own.
    preview_rgb: tuple[tuple[float, float, float], ...] = ()

    def to_network(self, values: Tensor) -> Tensor:
        """Returns a latent, or its tokens, in the transformer's scale and shift; float32."""
        return (values.float() - self.shift) * self.scale

    def from_network(self, values: Tensor) -> Tensor:
        """The inverse of `to_network`: the autoencoder's latent."""
        return values / self.scale + self.shift

    @property
    def token_width(self) -> int:
        """Channels of one token."""
        return self.channels * self.patch**2

    @property
    def token_px(self) -> int:
        """Pixels per token, each axis: image sides are multiples of it."""
        return self.downscale * self.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSpec:
    """Shape of the transformer; all but axes and theta can be read from a checkpoint."""

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
    has_bias: bool = True  # on every linear layer
    is_gated: bool = False  # SwiGLU in place of GELU; mlp_ratio counts the gated half
    shares_modulation: bool = False  # one modulation for all blocks of a kind

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return sum(self.axes_dim)

    @property
    def mlp_width(self) -> int:
        """Channels between the two layers of a feed-forward part."""
        return int(self.hidden * self.mlp_ratio)

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden // self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderSpec:
    """Shape of the autoencoder; all but the group count can be read from a checkpoint."""

    channels: int
    channel_mult: tuple[int, ...]
    res_blocks: int
    norm_groups: int
    latent: LatentSpec
    decoder_channels: int | None = None  # None: as many as the encoder
    # Cells of the bottleneck per latent cell, each axis. Above 1 the bottleneck has 1x1
    # convolutions around it, and the latent is its patches, batch-normalised.
    patch: int = 1

    @property
    def bottleneck(self) -> int:
        """Channels between encoder and decoder."""
        return self.latent.channels // self.patch**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipT5Spec:
    """FLUX.1's text: CLIP's pooled vector and T5's sequence, padded to these lengths in tokens."""

    clip_tokens: int
    t5_tokens: int
    title: str = "CLIP-L and T5"

    @property
    def tokens(self) -> int:
        """Text tokens the transformer was trained with."""
        return self.t5_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelSpec:
    """FLUX.2's text: hidden states of a language model, taken after some of its layers.

    The prompt goes between `prefix` and `suffix`; all is truncated or padded to `tokens`.
    """

    title: str
    architecture: Literal["qwen3", "mistral3"]
    hidden: int
    ffn: int
    layers: tuple[int, ...]  # hidden states after this many layers, concatenated
    tokens: int
    padding: Literal["left", "right"]
    pad_token: str
    prefix: str
    suffix: str
    removed: tuple[str, ...] = ()  # removed from the prompt
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    theta: float = 1e6
    norm_eps: float = 1e-6


TextSpec: TypeAlias = ClipT5Spec | LanguageModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShift:
    """FLUX.1's schedule: mu is linear in the target's token count, and extrapolated."""

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def mu(self, tokens: int, steps: int) -> float:
        """Returns mu for a target of so many tokens; `steps` is not used."""
        del steps
        fraction = (tokens - self.base_tokens) / (self.max_tokens - self.base_tokens)
        return self.base_shift + fraction * (self.max_shift - self.base_shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmpiricalShift:
    """FLUX.2's schedule: mu depends on tokens and steps; above `most_tokens`, on tokens only.

    Source: black-forest-labs/flux2@ab7cca6 src/flux2/sampling.py compute_empirical_mu.
    """

    few: tuple[int, float, float] = (10, 8.73809524e-05, 1.89833333)  # steps, slope, intercept
    many: tuple[int, float, float] = (200, 0.00016927, 0.45666666)
    most_tokens: int = 4300

    def mu(self, tokens: int, steps: int) -> float:
        """Returns mu for a target of so many tokens in so many steps."""
        few, many = (slope * tokens + intercept for _, slope, intercept in (self.few, self.many))
        if tokens > self.most_tokens:
            return many
        slope = (many - few) / (self.many[0] - self.few[0])
        return slope * steps + (many - self.many[0] * slope)


ShiftSpec: TypeAlias = LinearShift | EmpiricalShift | None  # None: sigmas fall linearly


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSpec:
    """How a model reads references."""

    trained: int  # the most per image in training, or that the publisher recommends
    several_px: int = 0  # the most pixels of each if there are several; 0: no limit
    sequence: tuple[SegmentKind, ...] = ("text", "target", "reference")
    # Isolated references attend to references only, at t = 0: their keys and values are the same
    # in every step, for every prompt and size.
    isolated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxFamily:
    """One published model."""

    name: str
    title: str
    transformer: TransformerSpec
    latent: LatentSpec
    text: TextSpec
    references: ReferenceSpec
    schedule: ShiftSpec
    guidance: Guidance
    default_steps: int
    default_guidance: float  # the guidance input, or the scale of true CFG
    is_step_distilled: bool = False
    file_hints: tuple[str, ...]  # substrings of file names; a hint is reported as a guess
    source: str

    @property
    def is_guidance_distilled(self) -> bool:
        """Whether guidance is an input of the network."""
        return self.transformer.has_guidance
