"""A plan: everything a run needs that does not depend on the noisy tokens, made once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import TokenValues
from .blocks import modulate
from .flux_blocks import FluxBlocks
from .modulation import StepModulation
from .rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One conditioning, ready for every step of one list of sigmas.

    Held: projected text (B, T, hidden), projected references (B, R, hidden) or None, the rotation
    of every token in the order text | target | references, and each step's modulation.
    """

    blocks: FluxBlocks
    txt: Tensor
    references: Tensor | None
    rope: Rope
    modulations: Sequence[StepModulation]

    def velocity(self, x: TokenValues, step: int) -> TokenValues:
        """Predict the velocity (noise - picture) of the target.

        Args:
            x: (B, N, D) noisy target tokens in the transformer's scale.
            step: position in the list of sigmas the plan was made for.

        Returns:
            (B, N, D) in x's dtype; references are read and never predicted.
        """
        blocks, mod = self.blocks, self.modulations[step]
        batch, count = x.shape[:2]
        img = blocks.img_in(x.to(self.txt))
        txt = self.txt.expand(batch, -1, -1)
        length = txt.shape[1]
        if self.references is not None:
            img = torch.cat((img, self.references.expand(batch, -1, -1)), dim=1)
        for block, img_mod, txt_mod in zip(blocks.double_blocks, mod.img, mod.txt, strict=True):
            img, txt = block(img, txt, img_mod, txt_mod, self.rope)
        joint = torch.cat((txt, img), dim=1)
        target = slice(length, length + count)
        last = len(blocks.single_blocks) - 1
        for number, (block, single) in enumerate(
            zip(blocks.single_blocks, mod.single, strict=True)
        ):
            joint = block(joint, single, self.rope, target if number == last else slice(None))
        if last < 0:
            joint = joint[:, target]
        return blocks.final_layer.linear(modulate(joint, mod.final)).to(x.dtype)
