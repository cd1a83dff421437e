"""Isolated references: keys and values that are computed once and reused in every step.

Isolated references attend to references only, at t = 0. So their rotated keys and values depend
on weights and references only, and may be cached. Both halves wrap an attention: one records
keys and values, the other joins the recorded ones to those of the other tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..tokens.sequence import TokenSequence
from .attention import Attention, Where
from .blocks import DoubleBlock, SingleBlock
from .flux_blocks import FluxBlocks
from .modulation import StepModulation
from .rope import Rope


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Rotated keys and values (1 or B, R, H, D) of isolated references in one block."""

    key: Tensor
    value: Tensor


class _Recorder:
    """Attends as `attention` does, and records the last keys and values."""

    def __init__(self, attention: Attention) -> None:
        self.attention, self.name = attention, attention.name
        self._recorded: KeyValue | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        self._record(k, v)
        return self.attention(q, k, v, where) if q.shape[1] else q.flatten(2)

    def with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where
    ) -> tuple[Tensor, Tensor] | None:
        self._record(k, v)
        return self.attention.with_lse(q, k, v, where)

    def _record(self, k: Tensor, v: Tensor) -> None:
        self._recorded = KeyValue(k, v.contiguous())  # v is a view into a wide projection

    def take(self) -> KeyValue:
        recorded, self._recorded = self._recorded, None
        assert recorded is not None
        return recorded


class JoinedReferences:
    """Attends as `attention` does, with cached keys and values joined block by block.

    Args:
        attention: the attention to wrap.
        cached: keys and values of each block, in the order in which the blocks run.
        sequence: the whole sequence, with the range of the references.
    """

    def __init__(
        self, attention: Attention, cached: Iterable[KeyValue], sequence: TokenSequence
    ) -> None:
        self.attention, self.name, self.sequence = attention, attention.name, sequence
        self._cached, self._block = iter(cached), -1
        self._range = sequence.range_of("reference")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        """Attends to the block's own tokens and the references; see `Attention`."""
        return self.attention(q, *self._join(k, v, where), replace(where, keys=self.sequence))

    def with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, where: Where
    ) -> tuple[Tensor, Tensor] | None:
        """The same with the log-sum-exp; see `Attention`."""
        return self.attention.with_lse(
            q, *self._join(k, v, where), replace(where, keys=self.sequence)
        )

    def _join(self, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        if where.block != self._block:  # a block may call twice, with and without the lse
            self._block, self._here = where.block, next(self._cached)
        at = self._range.start
        return _insert(k, self._here.key, at), _insert(v, self._here.value, at)


def _insert(own: Tensor, cached: Tensor, at: int) -> Tensor:
    cached = cached.expand(own.shape[0], -1, -1, -1)
    return torch.cat((own[:, :at], cached, own[:, at:]), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencePass:
    """The forward pass of isolated references, with no text and no target.

    Each iteration recomputes keys and values, block by block.

    Source: black-forest-labs/flux2 src/flux2/model.py forward_kv_extract.
    """

    blocks: FluxBlocks
    attention: Attention
    references: Tensor  # (B, R, hidden), projected
    sequence: TokenSequence  # of references alone
    rope: Rope
    modulation: StepModulation  # at t = 0

    def __iter__(self) -> Iterator[KeyValue]:
        """Yields keys and values of each double block, then of each single block."""
        x, mod = self.references, self.modulation
        recorder = _Recorder(self.attention)
        doubles = cast(Sequence[DoubleBlock], self.blocks.double_blocks)
        singles = cast(Sequence[SingleBlock], self.blocks.single_blocks)
        where = Where(
            step=0, sigma=0.0, block=0, queries=self.sequence, keys=self.sequence, rope=self.rope
        )
        for double, img, txt in zip(doubles, mod.img, mod.txt, strict=True):
            x, _ = double(x, x[:, :0], img, txt, self.rope, recorder, where)
            yield recorder.take()
            where = replace(where, block=where.block + 1)
        for single, one in zip(singles, mod.single, strict=True):
            # The last block's result is not read, so it has no queries.
            wanted = slice(0, 0) if single is singles[-1] else slice(None)
            x = single(x, one, self.rope, recorder, where, wanted)
            yield recorder.take()
            where = replace(where, block=where.block + 1)

    @property
    def cached_bytes(self) -> int:
        """Bytes of all keys and values."""
        count = len(self.blocks.double_blocks) + len(self.blocks.single_blocks)
        return 2 * count * self.references.numel() * self.references.element_size()
