"""Keys and values of isolated references, cached across runs.

Isolated references see themselves alone, at t = 0, so their keys and values depend on the weights
and the references and on nothing else: a new prompt, seed or size uses them again, bit for bit. A
store lives in its model's handle and dies with it.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from ...flux_core.errors import SettingError
from ...flux_core.families import FAMILIES
from ...flux_core.specs import FluxFamily
from ...flux_core.values import Tokens
from .. import host
from .replaceable import ReplaceablePatcher

if TYPE_CHECKING:
    from ...flux_core.transformer.flux import Flux
    from ...flux_core.transformer.references import KeyValue, ReferencePass

ReferenceKV = Literal["auto", "kept", "this run", "every step"]
REFERENCE_KV: tuple[ReferenceKV, ...] = get_args(ReferenceKV)

# Of the memory that is free on a device or can be freed there: what one model's store may hold.
# What a run needs itself may be more; ComfyUI's management may push off any of it at any time.
_SHARE_OF_DEVICE = 0.25


def choose(asked: ReferenceKV, family: FluxFamily) -> ReferenceKV:
    """Decides how a run treats the keys and values of references.

    Raises:
        SettingError: asked to keep them on a model whose references see what changes.
    """
    if family.references.isolated:
        return "kept" if asked == "auto" else asked
    if asked in ("kept", "this run"):
        trained = [one.title for one in FAMILIES.values() if one.references.isolated]
        raise SettingError(
            f"reference_kv is '{asked}', but the references of {family.title} see the text and "
            "the picture being made, so their keys and values change in every step.",
            f"a model trained with references that see only themselves: {', '.join(trained)}.",
            "set [reference_kv] to 'auto' or 'every step', or load such a model in [model loader].",
        )
    return "every step"


class CachedReferences(nn.Module):
    """Keys and values of one set of references, block by block; empty once dropped."""

    def __init__(self, computed: Iterable["KeyValue"]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_CachedBlock(one) for one in computed)

    @property
    def is_empty(self) -> bool:
        """Whether ComfyUI had them dropped."""
        return next(self.buffers(), None) is None


class _CachedBlock(nn.Module):
    key: Tensor
    value: Tensor

    def __init__(self, kept: "KeyValue") -> None:
        super().__init__()
        self.register_buffer("key", kept.key.contiguous())
        self.register_buffer("value", kept.value.contiguous())  # a view into a wide projection


class _Seen:
    """Cached keys and values as a plan reads them: from where they are, or computed anew."""

    def __init__(self, patcher: ReplaceablePatcher, computed: "ReferencePass") -> None:
        self.patcher, self.computed = patcher, computed

    def __iter__(self) -> Iterator["KeyValue"]:
        from ...flux_core.transformer.references import KeyValue

        if self.patcher.model.is_empty:  # dropped in the middle of the run
            yield from self.computed
            return
        device = self.patcher.load_device
        for block in self.patcher.model.blocks:
            key, value = (one.to(device, non_blocking=True) for one in (block.key, block.value))
            yield KeyValue(key, value)


class ReferenceStore:
    """Cached references of one model by digest, the least recently used first."""

    def __init__(self) -> None:
        self._held: dict[str, ReplaceablePatcher] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is cached, on the device and waiting beside it."""
        return sum(patcher.model_size() for patcher in self._held.values())

    def find(self, digest: str) -> ReplaceablePatcher | None:
        """What is cached under a digest, which is then the last used."""
        patcher = self._held.pop(digest, None)
        if patcher is None or patcher.model.is_empty:
            return None
        self._held[digest] = patcher
        return patcher

    def on_device(self) -> list[ReplaceablePatcher]:
        """What was used last, if any of it is where it computes: the next run may need it."""
        return [one for one in [*self._held.values()][-1:] if one.loaded_size()]

    def add(self, digest: str, patcher: ReplaceablePatcher) -> None:
        """Adds one more, as the last used."""
        self._held[digest] = patcher

    def make_room(self, needed: int, limit: float, in_use: Iterable[str]) -> None:
        """Drops the least recently used until so many bytes more stay within the limit."""
        for digest in [one for one in self._held if one not in in_use]:
            if self.held_bytes + needed <= limit:
                return
            del self._held[digest]


class RunCache:
    """The network's `reference_cache` during one run; `notes` say afterwards what it did.

    Args:
        store: where to look and to add; a new one caches for this run only, None computes in
            every step.
        identity: what keys and values depend on beside the references: weights, dtype and so on.
        blocks: the patcher of the network's blocks.
        step_bytes: activations of one step.
        token_bytes: activations of one token, for the references' own pass.
        is_stored: whether the store outlives the run.
    """

    def __init__(
        self,
        store: ReferenceStore | None,
        identity: tuple[object, ...],
        blocks: host.Patcher,
        *,
        step_bytes: int,
        token_bytes: int,
        is_stored: bool,
    ) -> None:
        self._store, self._identity, self._is_stored = store, identity, is_stored
        self._blocks, self._step_bytes, self._token_bytes = blocks, step_bytes, token_bytes
        self._used: dict[str, ReplaceablePatcher] = {}
        self.notes: list[str] = []

    def __call__(
        self, references: tuple[Tokens, ...], computed: "ReferencePass"
    ) -> Iterable["KeyValue"]:
        """The keys and values of references, cached if they can be."""
        size = _size(computed.cached_bytes)
        if self._store is None:
            return self._in_every_step(computed, "references: computed in every step.")
        digest = digest_of(references, computed, self._identity)
        patcher = self._used.get(digest)
        if patcher is None and (patcher := self._store.find(digest)) is not None:
            self._tell(f"references: keys and values reused from an earlier run ({size}).")
        if patcher is None and (patcher := self._compute(computed, self._store)) is not None:
            self._store.add(digest, patcher)
            kept = "and kept" if self._is_stored else "for this run"
            self._tell(f"references: keys and values computed {kept} ({size}).")
        if patcher is None:
            return self._in_every_step(
                computed,
                f"references: no memory for their keys and values ({size}): computed in every "
                "step, which is slower and makes the same picture.",
            )
        self._used[digest] = patcher
        host.load([self._blocks, *self._used.values()], self._step_bytes)
        return _Seen(patcher, computed)

    def _compute(
        self, computed: "ReferencePass", store: ReferenceStore
    ) -> ReplaceablePatcher | None:
        """Computes keys and values; None if memory does not hold them beside what a run needs."""
        device, needed = self._blocks.load_device, computed.cached_bytes
        available = host.available_bytes(device)
        if device == torch.device("cpu"):  # elsewhere what is kept counts as what can be freed
            available += store.held_bytes
        store.make_room(needed, available * _SHARE_OF_DEVICE, self._used)
        activations = max(self._step_bytes, self._pass_bytes(computed))
        if activations + needed > host.available_bytes(device):
            return None
        try:
            host.load([self._blocks, *self._used.values()], activations + needed)
            return ReplaceablePatcher(CachedReferences(computed), device)
        except (RuntimeError, MemoryError) as error:
            if not host.is_out_of_memory(error):
                raise
            return None

    def _in_every_step(self, computed: "ReferencePass", note: str) -> Iterable["KeyValue"]:
        self._tell(note)
        activations = self._step_bytes + self._pass_bytes(computed)
        host.load([self._blocks, *self._used.values()], activations)
        return computed

    def _pass_bytes(self, computed: "ReferencePass") -> int:
        pictures, tokens = computed.references.shape[:2]
        return pictures * tokens * self._token_bytes

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


@contextmanager
def caching(network: "Flux", cache: RunCache) -> Generator[None, None, None]:
    """Lets a run decide how the network's isolated references are cached."""
    before, network.reference_cache = network.reference_cache, cache
    try:
        yield
    finally:
        network.reference_cache = before


def digest_of(
    references: Sequence[Tokens], computed: "ReferencePass", identity: tuple[object, ...]
) -> str:
    """Digest of all that keys and values depend on: references, their order and ids, the rest."""
    digest = sha256(repr(identity).encode())
    tensors = [one for tokens in references for one in (tokens.values, tokens.ids)]
    for tensor in (*tensors, computed.modulation.final.shift):  # the last tells guidance apart
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _size(count: int) -> str:
    return f"{count / 1024**3:.1f} GB" if count >= 1e8 else f"{count / 1024**2:.1f} MB"
