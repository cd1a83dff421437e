"""How ComfyUI's own FLUX places references, and how our position ids replace its own.

Its sequence is text | target | references. It computes position ids by a named method,
`reference_latents_method`; ids that no method computes are written over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import SettingError, ShapeError
from ..specs import LatentSpec
from ..types import Ids
from ..values import Tokens
from .ids import place
from .references import tile

Method = Literal["offset", "index"]


def own_method(latent: LatentSpec) -> Method:
    """Returns the method by which ComfyUI's network places references by default."""
    return "index" if latent.placement == "index" else "offset"


def native_method(references: Sequence[Tokens]) -> Method | None:
    """Returns the method of ComfyUI that computes the position ids these references have.

    Returns:
        The method, the latent's default first where both give the same ids; None where neither
        does, or there is no reference.

    Source: Comfy-Org/ComfyUI@14b05228 comfy/ldm/flux/model.py _forward.
    """
    if not references:
        return None
    counted = [
        place(tokens, index=tokens.latent.index_step * number)
        for number, tokens in enumerate(references, 1)
    ]
    rules: dict[Method, Sequence[Tokens]] = {"offset": tile(references), "index": counted}
    if own_method(references[0].latent) == "index":
        rules = dict(reversed(rules.items()))
    return next((name for name, rule in rules.items() if _have_ids_of(references, rule)), None)


def _have_ids_of(references: Sequence[Tokens], others: Sequence[Tokens]) -> bool:
    pairs = zip(references, others, strict=True)
    return all(torch.equal(one.ids, other.ids.to(one.ids)) for one, other in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePositions:
    """Our position ids for the references in ComfyUI's sequence, and the length of our text.

    No tokens are added here: ComfyUI has put them into the sequence, in the same order.
    """

    references: tuple[Ids, ...]  # (N, A) each
    text_tokens: int
    target: Ids | None = None  # (N, A); None leaves the target where ComfyUI puts it

    def place(self, img_ids: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns ComfyUI's position ids with ours for the references.

        Args:
            img_ids: (B, N + R, A) of target and references.
            counts: tokens of each reference, as ComfyUI counted them.

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            ShapeError: references other than the conditioning's, or a changed sequence.
        """
        own = [ids.shape[0] for ids in self.references]
        if list(counts) != own:
            raise ShapeError(
                f"The sampler hands {_described(counts)} to the model, whose position ids are for "
                f"{_described(own)}.",
                "the same references, in the same order, in the positive and negative prompt.",
                "wire one conditioning to [native conditioning] and [native positions], "
                "and the same references to the negative prompt; take 'Set Reference Latent' off.",
            )
        if not own and self.target is None:
            return img_ids
        target = img_ids[:, : img_ids.shape[1] - sum(own)]
        count = target.shape[1] if self.target is None else self.target.shape[0]
        if target.shape[1] != count or not _is_one_image(target):
            raise ShapeError(
                "Another node has added tokens to the model's sequence.",
                "the target, then the references, and nothing after them.",
                "take the node between the loader and the sampler off that adds them.",
            )
        first = target if self.target is None else _expanded(self.target, img_ids)
        return torch.cat((first, *(_expanded(ids, img_ids) for ids in self.references)), dim=1)

    def trim(self, txt: Tensor, txt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Removes the empty tokens with which ComfyUI pads a short text of FLUX.2 on the left.

        Args:
            txt: (B, L, hidden), projected; FLUX.2's projection leaves empty tokens at 0.
            txt_ids: (B, L, A).

        Returns:
            The text and ids at its own length; both unchanged where the text is not ours.

        Raises:
            SettingError: one batch holds our text and one of another length.
        """
        extra = txt.shape[1] - self.text_tokens
        if extra <= 0:
            return txt, txt_ids
        empty = (txt == 0).all(dim=-1).long().cumprod(dim=1).sum(dim=1)
        ours = empty == extra
        if bool((ours | (empty == txt.shape[1])).all()):  # a zeroed text fits any length
            return txt[:, extra:], txt_ids[:, : self.text_tokens]
        if bool(ours.any()):
            raise SettingError(
                f"The positive and the negative text differ in length; one has {self.text_tokens} "
                "tokens.",
                "equal lengths, which ComfyUI runs as one batch.",
                "set the same [text tokens] for both, and wire both through [native conditioning].",
            )
        return txt, txt_ids


def _is_one_image(ids: Tensor) -> bool:
    return ids.shape[1] > 0 and not bool((ids[..., 0] != ids[0, 0, 0]).any())


def _expanded(ids: Ids, like: Tensor) -> Tensor:
    """Expands (N, A) over the batch of `like`, on its device."""
    return ids.to(like).expand(like.shape[0], -1, -1)


def _described(counts: Sequence[int]) -> str:
    if not counts:
        return "no reference"
    return f"{len(counts)} references of {', '.join(map(str, counts))} tokens"
