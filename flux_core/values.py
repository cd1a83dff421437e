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
    used: int  # tokens of the prompt that were encoded, start and end tokens included
    limit: int  # tokens the encoder takes
    cut: str = ""  # the end of the prompt that did not fit, as text; "" if all of it fits


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFeatures:
    """An encoded prompt."""

    txt: Tensor  # (B, T, E)
    pooled: Tensor | None  # (B, P)
    counts: tuple[TokenCount, ...] = ()
    notes: tuple[str, ...] = ()  # on changes to the prompt that one may not expect
    source: str = ""  # the title of the encoders that made it


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """An image, or noise, as a sequence of tokens with their position ids.

    An image's values are the autoencoder's latent, unscaled (ComfyUI's LATENT convention): the
    transformer's scale and shift are applied in the plan. Noise is standard normal.
    """

    values: TokenValues
    ids: Ids
    grid: tuple[int, int]  # rows, columns of the image, dropped tokens included
    latent: LatentSpec
    is_noise: bool = False
    cells: Tensor | None = None  # (N,) int64: the cells that are present, row by row; None: all

    @property
    def count(self) -> int:
        """Tokens of one image."""
        return self.ids.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A reference image, and how the target attends to it; the defaults change nothing."""

    tokens: Tokens
    name: str = ""
    strength: float = 1.0
    mask: Tensor | None = None  # (N,) 0..1, a weight for each token
    steps: tuple[float, float] = (0.0, 1.0)  # the part of the steps that read it
    blocks: tuple[int, ...] | None = None  # the blocks that read it, doubles first; None: all

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of settings not at their default; a network's `supports` lists those it follows."""
        is_set = {
            "strength": self.strength != 1.0,
            "mask": self.mask is not None,
            "steps": self.steps != (0.0, 1.0),
            "blocks": self.blocks is not None,
            "dropped tokens": self.tokens.cells is not None,
        }
        return tuple(name for name, value in is_set.items() if value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What every step reads besides the noisy tokens."""

    text: TextFeatures
    references: tuple[Reference, ...] = ()
    guidance: float | None = None  # None: the model's default
    notes: tuple[str, ...] = ()  # shown by the sampler

    def __post_init__(self) -> None:
        """Raises if guidance is not a number from 0 to 100."""
        if self.guidance is not None and not 0.0 <= self.guidance <= MAX_GUIDANCE:
            raise SettingError(
                f"guidance is {self.guidance}.",
                f"a number from 0 to {MAX_GUIDANCE:g}.",
                "set [guidance].",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was done to an image to make its size valid; all sizes are (height, width) in px.

    The image was cropped to `crop` (top, left, height, width; of the original), resized to
    `resized`, and placed at `offset` (top, left) on a canvas of size `canvas`.
    """

    original: tuple[int, int]
    crop: tuple[int, int, int, int]
    resized: tuple[int, int]
    offset: tuple[int, int] = field(default=(0, 0))
    canvas: tuple[int, int]
