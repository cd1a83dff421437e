"""Where several references go.

`single` is the published Kontext rule, for the one reference it was trained on. `offset` and
`index` are ComfyUI's conventions for several; no published model was trained with either.
"""

from collections.abc import Sequence

from ..errors import SettingError
from ..specs import Placement
from ..values import Tokens
from .ids import place


def place_references(references: Sequence[Tokens], placement: Placement) -> tuple[Tokens, ...]:
    """Give every reference its ids.

    Args:
        references: in the order they were wired.
        placement: "as wired" keeps the ids they came with; "single" puts one reference at the
            latent's first index; "index" counts the first axis up; "offset" keeps the first
            index and tiles the references over rows and columns.

    Returns:
        The same values with new ids, in the same order.

    Raises:
        SettingError: "single" with more than one reference.

    Source: Comfy-Org/ComfyUI@14b05228 comfy/ldm/flux/model.py _forward (offset, index);
    black-forest-labs/flux@802fb47 src/flux/sampling.py prepare_kontext (single).
    """
    if placement == "as wired":
        return tuple(references)
    if placement == "single" and len(references) > 1:
        raise SettingError(
            f"{len(references)} references are wired with placement 'single'.",
            "one reference, which is what Kontext was trained with.",
            "set placement to 'offset' or 'index' on 'Reference Conditioner (FLUX)'.",
        )
    if placement == "index":
        return tuple(
            place(tokens, index=tokens.latent.first_index + tokens.latent.index_step * number)
            for number, tokens in enumerate(references)
        )
    return _tile(references)


def _tile(references: Sequence[Tokens]) -> tuple[Tokens, ...]:
    """Put each reference right of or below the ones before it, where the canvas grows least."""
    height = width = 0  # extent so far, in tokens
    placed: list[Tokens] = []
    for tokens in references:
        rows, columns = tokens.grid
        below = rows + height <= columns + width
        row, column = (height, 0) if below else (0, width)
        placed.append(place(tokens, index=tokens.latent.first_index, row=row, column=column))
        height, width = max(height, rows + row), max(width, columns + column)
    return tuple(placed)
