"""Position ids: which image a token belongs to, its row and its column.

Ids stay float32: bfloat16 is exact only up to 256.
Source: black-forest-labs/flux@802fb47 src/flux/sampling.py prepare, prepare_kontext;
black-forest-labs/flux2@ab7cca6 src/flux2/sampling.py prc_txt, prc_img.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import SettingError, ShapeError
from ..specs import LatentSpec
from ..types import Ids
from ..values import Tokens


def image_ids(
    grid: tuple[int, int],
    spec: LatentSpec,
    *,
    index: float = 0.0,
    row: float = 0.0,
    column: float = 0.0,
    device: torch.device | str | None = None,
) -> Ids:
    """Returns the position ids of every token of an image.

    Args:
        grid: rows and columns, in tokens.
        spec: names the id axes; the first three are index, row, column, any other stays 0.
        index: first axis; 0 is the image being made, references are above 0.
        row, column: position of the top-left token, in tokens; fractions are allowed.

    Returns:
        (rows * columns, A) float32 on `device`, row by row, no batch axis.
    """
    rows, columns = grid
    ids = torch.zeros(rows, columns, len(spec.id_axes), dtype=torch.float32, device=device)
    ids[..., 0] = index
    ids[..., 1] = row + torch.arange(rows, dtype=torch.float32, device=device)[:, None]
    ids[..., 2] = column + torch.arange(columns, dtype=torch.float32, device=device)[None, :]
    return ids.reshape(rows * columns, -1)


def text_ids(length: int, spec: LatentSpec, device: torch.device | str | None = None) -> Ids:
    """Returns the position ids of text, (T, A) float32: zeros for FLUX.1, counted up for FLUX.2."""
    ids = torch.zeros(length, len(spec.id_axes), dtype=torch.float32, device=device)
    if spec.text_axis is not None:
        ids[:, spec.text_axis] = torch.arange(length, dtype=torch.float32, device=device)
    return ids


def place(tokens: Tokens, *, index: float, row: float = 0.0, column: float = 0.0) -> Tokens:
    """Returns an image's tokens with other position ids; the values stay the same.

    Raises:
        SettingError: a position is not finite.
    """
    if not all(map(math.isfinite, (index, row, column))):
        raise SettingError(
            f"The position is index {index}, row {row}, column {column}.",
            "finite numbers.",
            "set [index], [row] and [column].",
        )
    ids = image_ids(
        tokens.grid, tokens.latent, index=index, row=row, column=column, device=tokens.ids.device
    )
    return replace(tokens, ids=ids if tokens.cells is None else ids[tokens.cells.to(ids.device)])


def drop_tokens(tokens: Tokens, present: Tensor) -> Tokens:
    """Drops tokens; the others keep their values and position ids.

    Args:
        tokens: (B, N, D).
        present: (N,) bool, the tokens that stay; at least one.

    Raises:
        ShapeError: another number of tokens, or none is present.
    """
    if present.dtype != torch.bool or present.shape != (tokens.count,) or not bool(present.any()):
        raise ShapeError(
            f"The marks of present tokens are {present.dtype} of shape {tuple(present.shape)}.",
            f"bool of shape ({tokens.count},), at least one of them true.",
            "mark the tokens of this image.",
        )
    cells = torch.arange(tokens.count) if tokens.cells is None else tokens.cells
    stay = present.nonzero().flatten()
    return replace(
        tokens,
        values=tokens.values[:, stay.to(tokens.values.device)],
        ids=tokens.ids[stay.to(tokens.ids.device)],
        cells=cells[stay.to(cells.device)],
    )
