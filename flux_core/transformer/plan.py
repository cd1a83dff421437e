"""A plan: everything a run needs that does not depend on the noisy tokens, computed once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..steps import step_of
from ..tokens.sequence import TokenSequence
from ..types import TokenValues
from .attention import Attention, Where
from .blocks import DoubleBlock, SingleBlock, modulate
from .flux_blocks import FluxBlocks
from .modulation import StepModulation
from .references import JoinedReferences, KeyValue
from .rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One conditioning, ready for every step of one list of sigmas.

    It holds projected text (B, T, hidden), projected references (B, R, hidden) or None, the
    rotation of every token, and the modulation of each sigma. `own` are the tokens that are
    computed in every step, in the order text | target | references. Isolated references are not
    among them: `cached` holds their keys and values for each block, `sequence` their range.
    """

    blocks: FluxBlocks
    attention: Attention
    txt: Tensor
    references: Tensor | None
    own: TokenSequence
    sequence: TokenSequence
    rope: Rope
    sigmas: Sequence[float]  # the level at which each step begins
    modulations: dict[float, StepModulation]
    modulate: Callable[[float], StepModulation]  # for a sigma that is not in `modulations`
    cached: Iterable[KeyValue] | None = None

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.txt.device

    def velocity(self, x: TokenValues, sigma: float) -> TokenValues:
        """Predicts the velocity (noise - image) of the target.

        Args:
            x: (B, N, D) noisy target tokens in the transformer's scale.
            sigma: their noise level, in 0..1; the modulation of an unplanned one is computed now.

        Returns:
            (B, N, D) in x's dtype; references are read and never predicted.
        """
        if sigma not in self.modulations:
            self.modulations[sigma] = self.modulate(sigma)
        blocks, mod = self.blocks, self.modulations[sigma]
        batch, length = x.shape[0], self.txt.shape[1]
        img, txt = blocks.img_in(x.to(self.txt)), self.txt.expand(batch, -1, -1)
        if self.references is not None:
            img = torch.cat((img, self.references.expand(batch, -1, -1)), dim=1)
        attention = self.attention
        if self.cached is not None:
            attention = JoinedReferences(attention, self.cached, self.sequence)
        where = Where(
            step=step_of(sigma, self.sigmas),
            sigma=sigma,
            block=0,
            queries=self.own,
            keys=self.own,
            rope=self.rope,
        )
        doubles = cast(Sequence[DoubleBlock], blocks.double_blocks)
        singles = cast(Sequence[SingleBlock], blocks.single_blocks)
        for double, img_mod, txt_mod in zip(doubles, mod.img, mod.txt, strict=True):
            img, txt = double(img, txt, img_mod, txt_mod, self.rope, attention, where)
            where = replace(where, block=where.block + 1)
        joint, wanted = torch.cat((txt, img), dim=1), slice(None)
        target = slice(length, length + x.shape[1])
        for single, one in zip(singles, mod.single, strict=True):
            if single is singles[-1]:  # only its target tokens are read
                wanted = target
                where = replace(where, queries=self.own.only("target"), rope=self.rope[target])
            joint = single(joint, one, self.rope, attention, where, wanted)
            where = replace(where, block=where.block + 1)
        if not singles:
            joint = joint[:, target]
        return blocks.final_layer.linear(modulate(joint, mod.final)).to(x.dtype)
