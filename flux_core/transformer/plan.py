"""A plan: everything a run needs that does not depend on the noisy tokens, made once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import cast

import torch
from torch import Tensor

from ..types import TokenValues
from .blocks import DoubleBlock, KeyValue, SingleBlock, modulate
from .flux_blocks import FluxBlocks
from .modulation import StepModulation
from .rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One conditioning, ready for every step of one list of sigmas.

    Held: projected text (B, T, hidden), projected references (B, R, hidden) or None, the rotation
    of every token in the order text | target | references, and each step's modulation. Where
    references see themselves alone, `kept` gives what each block's other tokens see of them, and
    they are no part of the sequence.
    """

    blocks: FluxBlocks
    txt: Tensor
    references: Tensor | None
    rope: Rope
    modulations: Sequence[StepModulation]
    kept: Iterable[KeyValue] | None = None

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
        kept = repeat(None) if self.kept is None else iter(self.kept)
        for block, img_mod, txt_mod in zip(blocks.double_blocks, mod.img, mod.txt, strict=True):
            img, txt = block(img, txt, img_mod, txt_mod, self.rope, next(kept))
        joint = torch.cat((txt, img), dim=1)
        target = slice(length, length + count)
        last = len(blocks.single_blocks) - 1
        for number, (block, single) in enumerate(
            zip(blocks.single_blocks, mod.single, strict=True)
        ):
            wanted = target if number == last else slice(None)
            joint = block(joint, single, self.rope, wanted, next(kept))
        if last < 0:
            joint = joint[:, target]
        return blocks.final_layer.linear(modulate(joint, mod.final)).to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencePass:
    """References that see themselves alone: what every block's other tokens see of them.

    It depends on weights and references only, not on text, target or step, so its results may be
    kept; iterated over, it computes them anew, block by block.

    Source: black-forest-labs/flux2 src/flux2/model.py forward_kv_extract.
    """

    blocks: FluxBlocks
    references: Tensor  # (B, R, hidden), projected
    rope: Rope
    modulation: StepModulation  # at t = 0

    def __iter__(self) -> Iterator[KeyValue]:
        """Give rotated keys and values of each double, then each single block."""
        x, mod = self.references, self.modulation
        doubles = cast(Sequence[DoubleBlock], self.blocks.double_blocks)
        singles = cast(Sequence[SingleBlock], self.blocks.single_blocks)
        last = len(doubles) + len(singles) - 1
        for number, (block, img) in enumerate(zip(doubles, mod.img, strict=True)):
            x, kept = block.references(x, img, self.rope, is_last=number == last)
            yield kept
        for number, (block, single) in enumerate(
            zip(singles, mod.single, strict=True), len(doubles)
        ):
            x, kept = block.references(x, single, self.rope, is_last=number == last)
            yield kept

    @property
    def kept_bytes(self) -> int:
        """Bytes of all keys and values."""
        count = len(self.blocks.double_blocks) + len(self.blocks.single_blocks)
        return 2 * count * self.references.numel() * self.references.element_size()
