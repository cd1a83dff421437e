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
    """An image, or noise, as a sequence of tokens with their position ids.

    Values of an image are the autoencoder's latent as it is (ComfyUI's LATENT convention): the
    transformer's scale and shift are applied inside the plan. Noise is standard normal.
    """

    values: TokenValues
    ids: Ids
    grid: tuple[int, int]  # rows, columns; where tokens lie, not how many there are
    latent: LatentSpec
    is_noise: bool = False
    cells: Tensor | None = None  # (N,) int64: the cells that are present, row by row; None: all

    @property
    def count(self) -> int:
        """Tokens of one image."""
        return self.ids.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """An image that every step sees, and how it is seen; the defaults change nothing."""

    tokens: Tokens
    name: str = ""
    strength: float = 1.0
    mask: Tensor | None = None  # (N,) 0..1, a weight for each token
    steps: tuple[float, float] = (0.0, 1.0)  # the part of the steps that sees it
    blocks: tuple[int, ...] | None = None  # the blocks that see it, doubles first; None: all

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of what is not at its default: a network that reads it says so in `supports`."""
        asked = {
            "strength": self.strength != 1.0,
            "mask": self.mask is not None,
            "steps": self.steps != (0.0, 1.0),
            "blocks": self.blocks is not None,
            "dropped tokens": self.tokens.cells is not None,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What every step sees beside the noisy tokens."""

    text: TextFeatures
    references: tuple[Reference, ...] = ()
    guidance: float | None = None  # None: the model's default
    notes: tuple[str, ...] = ()  # what became of it that one may not expect, said by the sampler

    def __post_init__(self) -> None:
        """Refuse a guidance that is no number from 0 to 100."""
        if self.guidance is not None and not 0.0 <= self.guidance <= MAX_GUIDANCE:
            raise SettingError(
                f"guidance is {self.guidance}.",
                f"a number from 0 to {MAX_GUIDANCE:g}.",
                "set [guidance].",
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
