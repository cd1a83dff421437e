"""Position ids of several references.

`single` is the published Kontext rule, for the one reference it was trained on; `index` is
FLUX.2's published rule. `offset` on any model and `index` on FLUX.1 are ComfyUI's conventions for
several; no published model was trained with them.
"""

from collections.abc import Sequence

from ..checks import check_reference
from ..errors import SettingError
from ..specs import Placement
from ..values import Tokens
from .ids import place

_CANVAS_INDEX = 1.0  # the first id of all references with ComfyUI's "offset"


def place_references(references: Sequence[Tokens], placement: Placement) -> tuple[Tokens, ...]:
    """Returns the references with the position ids of a placement.

    Args:
        references: in the order they were wired.
        placement: "auto" is the latent's default: "offset" on FLUX.1, "index" on FLUX.2; "as wired"
            leaves the ids as they are; "single" puts one reference at the latent's first index;
            "index" counts the first axis up from there by the latent's step: 1, 2, 3 on FLUX.1,
            10, 20, 30 on FLUX.2; "offset" tiles several references over rows and columns at
            index 1, and puts a single one at the latent's first index.

    Returns:
        The same values with new ids, in the same order.

    Raises:
        SettingError: "single" with more than one reference.

    Source: Comfy-Org/ComfyUI@14b05228 comfy/ldm/flux/model.py _forward (offset, index);
    black-forest-labs/flux@802fb47 src/flux/sampling.py prepare_kontext (single);
    black-forest-labs/flux2@ab7cca6 src/flux2/sampling.py encode_image_refs (index on FLUX.2).
    """
    if placement == "auto":
        placement = references[0].latent.placement if references else "as wired"
    if placement == "as wired":
        return tuple(references)
    if placement == "single" and len(references) > 1:
        raise SettingError(
            f"{len(references)} references are wired with placement 'single'.",
            "one reference, which is what Kontext was trained with.",
            "set [placement] to 'auto', 'index' or 'offset'.",
        )
    if placement == "offset" and len(references) > 1:
        return tile(references)
    return tuple(
        place(tokens, index=tokens.latent.first_index + tokens.latent.index_step * number)
        for number, tokens in enumerate(references)
    )


def check_references(references: Sequence[Tokens]) -> None:
    """Raises for references of a size that their model does not take.

    Raises:
        ShapeError: one is too small, or its long side is too long.
    """
    for number, tokens in enumerate(references, 1):
        rule, (rows, columns) = tokens.latent.reference, tokens.grid
        if rule is not None:
            token_px = tokens.latent.token_px
            check_reference(
                rows * token_px,
                columns * token_px,
                rule,
                f"Reference {number}",
                cropped_px=rule.multiple - 1,
            )


def tile(
    references: Sequence[Tokens], sides: Sequence[tuple[int, int]] | None = None
) -> tuple[Tokens, ...]:
    """Places each reference right of or below the earlier ones, where the canvas grows least.

    Args:
        references: in their order.
        sides: height and width of each latent in cells, before padding to whole tokens; None
            takes them from the tokens.

    Source: Comfy-Org/ComfyUI@14b05228 comfy/ldm/flux/model.py _forward.
    """
    height = width = 0  # extent so far, in cells
    placed: list[Tokens] = []
    for number, tokens in enumerate(references):
        patch = tokens.latent.patch
        rows, columns = [side * patch for side in tokens.grid] if sides is None else sides[number]
        below = rows + height <= columns + width
        row, column = (height, 0) if below else (0, width)
        row_tokens, column_tokens = (-(-cells // patch) for cells in (row, column))
        placed.append(place(tokens, index=_CANVAS_INDEX, row=row_tokens, column=column_tokens))
        height, width = max(height, rows + row), max(width, columns + column)
    return tuple(placed)
