"""The values that travel between nodes: small frozen dataclasses, one per socket."""

from dataclasses import dataclass, field

from torch import Tensor

from .errors import SettingError
from .specs import LatentSpec
from .types import Ids, TokenValues

MAX_GUIDANCE = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """What one text encoder made of the prompt."""

    encoder: str  # "CLIP-L", "T5"
    used: int  # tokens of the prompt that were encoded, begin and end marks included
    limit: int  # tokens the encoder takes
    cut: str = ""  # the end of the prompt that did not fit, as text; "" when all of it fits


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFeatures:
    """An encoded prompt."""

    txt: Tensor  # (B, T, E)
    pooled: Tensor | None  # (B, P)
    counts: tuple[TokenCount, ...] = ()
    notes: tuple[str, ...] = ()  # what became of the prompt that one may not expect
    source: str = ""  # the title of the encoders that made it


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A picture, or noise, as a sequence of tokens with their places.

    Values of a picture are the autoencoder's latent as it is (ComfyUI's LATENT convention): the
    transformer's scale and shift are applied inside the plan. Noise is standard normal.
    """

    values: TokenValues
    ids: Ids
    grid: tuple[int, int]  # rows, columns
    latent: LatentSpec
    is_noise: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What every step sees beside the noisy tokens."""

    text: TextFeatures
    references: tuple[Tokens, ...] = ()
    guidance: float | None = None
    notes: tuple[str, ...] = ()  # what became of it that one may not expect, said by the sampler

    def __post_init__(self) -> None:
        """Refuse a guidance that is no number from 0 to 100."""
        if self.guidance is not None and not 0.0 <= self.guidance <= MAX_GUIDANCE:
            raise SettingError(
                f"guidance is {self.guidance}.",
                f"a number from 0 to {MAX_GUIDANCE:g}.",
                "set it in 'Reference Conditioner (FLUX)'.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was done to a picture to make its size legal; all sizes are (height, width) in px.

    The picture was cropped by `crop` (top, left, height, width; of the original), resized to
    `resized`, and set at `offset` (top, left) into a canvas of `canvas`.
    """

    original: tuple[int, int]
    crop: tuple[int, int, int, int]
    resized: tuple[int, int]
    offset: tuple[int, int] = field(default=(0, 0))
    canvas: tuple[int, int]
