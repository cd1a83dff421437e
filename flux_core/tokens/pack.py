"""Latent to tokens and back: pure permutations, so exact bit for bit.

Source: black-forest-labs/flux@802fb47 src/flux/sampling.py prepare, unpack. Deviation: written as
reshape and permute, without einops.
"""

from ..errors import ShapeError
from ..families import LATENTS
from ..specs import LatentSpec
from ..types import Latent, TokenValues
from ..values import Tokens
from .ids import image_ids


def pack_latent(latent: Latent, spec: LatentSpec) -> TokenValues:
    """Cuts a latent into tokens, row by row.

    Args:
        latent: (B, C, h, w); h and w are multiples of spec.patch.
        spec: channels and patch.

    Returns:
        (B, N, D); N = h w / patch**2, channel index = c patch**2 + row patch + column.

    Raises:
        ShapeError: wrong channel count, or a side that does not divide into tokens.
    """
    if latent.ndim != 4 or latent.shape[1] != spec.channels or not latent.shape[0]:
        channels = latent.shape[1] if latent.ndim == 4 else 0
        alike = [one.name for one in LATENTS.values() if one.channels == channels != spec.channels]
        whose = f", as those of {' and '.join(alike)} have" if alike else ""
        raise ShapeError(
            f"The latent has shape {tuple(latent.shape)}{whose}.",
            f"(batch, {spec.channels}, height, width) for {spec.name}, with a batch of 1 or more.",
            "choose the [latent_format] that made it, or the autoencoder of this family.",
        )
    batch, channels, height, width = latent.shape
    patch = spec.patch
    if height % patch or width % patch or not height or not width:
        raise ShapeError(
            f"The latent is {width}x{height} cells ({width * spec.downscale}x"
            f"{height * spec.downscale} px).",
            f"sides that are multiples of {patch} cells ({spec.token_px} px).",
            "bring the image to size with [image fit] before it is encoded.",
        )
    rows, columns = height // patch, width // patch
    cells = latent.reshape(batch, channels, rows, patch, columns, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, spec.token_width)


def unpack_tokens(values: TokenValues, grid: tuple[int, int], spec: LatentSpec) -> Latent:
    """Returns the latent (B, C, h, w) that tokens (B, N, D) were cut from."""
    rows, columns = grid
    if values.ndim != 3 or values.shape[1:] != (rows * columns, spec.token_width):
        raise ShapeError(
            f"The tokens have shape {tuple(values.shape)}.",
            f"(batch, {rows * columns}, {spec.token_width}): a {rows}x{columns} grid of "
            f"{spec.name}.",
            "hand over the tokens with the grid they were packed from.",
        )
    batch, patch = values.shape[0], spec.patch
    cells = values.reshape(batch, rows, columns, spec.channels, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(
        batch, spec.channels, rows * patch, columns * patch
    )


def latent_tokens(latent: Latent, spec: LatentSpec, *, is_noise: bool = False) -> Tokens:
    """Packs a latent into tokens with a target's position ids: index 0, row and column from 0."""
    values = pack_latent(latent, spec)
    grid = (latent.shape[2] // spec.patch, latent.shape[3] // spec.patch)
    ids = image_ids(grid, spec)
    return Tokens(values=values, ids=ids, grid=grid, latent=spec, is_noise=is_noise)


def tokens_latent(tokens: Tokens) -> Latent:
    """Unpacks tokens into their latent; the inverse of `latent_tokens`.

    Raises:
        ShapeError: tokens were dropped, so the latent is incomplete.
    """
    if tokens.cells is not None:
        rows, columns = tokens.grid
        raise ShapeError(
            f"{rows * columns - tokens.count} of {rows * columns} tokens were dropped.",
            "every token of the image.",
            "take the tokens from before they were dropped.",
        )
    return unpack_tokens(tokens.values, tokens.grid, tokens.latent)
