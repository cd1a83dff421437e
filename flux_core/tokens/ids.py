"""Position ids: which picture a token belongs to, its row and its column.

Ids stay float32: bfloat16 is exact only up to 256.
Source: black-forest-labs/flux@802fb47 src/flux/sampling.py prepare, prepare_kontext;
black-forest-labs/flux2@ab7cca6 src/flux2/sampling.py prc_txt, prc_img.
"""

import math
from dataclasses import replace

import torch

from ..errors import SettingError
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
    """Give every token of a picture its position.

    Args:
        grid: rows and columns, in tokens.
        spec: names the id axes; the first three are index, row, column, any other stays 0.
        index: first axis; 0 is the picture being made, references are above 0.
        row, column: place of the top-left token, in tokens; fractions are allowed.

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
    """Positions of text tokens, (T, A) float32: zeros for FLUX.1, counted up for FLUX.2."""
    ids = torch.zeros(length, len(spec.id_axes), dtype=torch.float32, device=device)
    if spec.text_axis is not None:
        ids[:, spec.text_axis] = torch.arange(length, dtype=torch.float32, device=device)
    return ids


def place(tokens: Tokens, *, index: float, row: float = 0.0, column: float = 0.0) -> Tokens:
    """Move a picture's tokens to another place; the values stay what they are.

    Raises:
        SettingError: a place that is no finite number.
    """
    if not all(map(math.isfinite, (index, row, column))):
        raise SettingError(
            f"The place is index {index}, row {row}, column {column}.",
            "finite numbers.",
            "set them in 'Position Ids (FLUX)'.",
        )
    ids = image_ids(
        tokens.grid, tokens.latent, index=index, row=row, column=column, device=tokens.ids.device
    )
    return replace(tokens, ids=ids)
