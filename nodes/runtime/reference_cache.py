"""Keys and values of isolated references, cached across runs.

Isolated references see themselves alone, at t = 0, so their keys and values depend on the weights
and the references and on nothing else: a new prompt, seed or size uses them again, bit for bit. A
store belongs to its model's handle and dies with it.
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

# The share of a device's free or freeable memory that one model's store may fill. A run's own
# references may exceed it. ComfyUI may offload any of them at any time.
_SHARE_OF_DEVICE = 0.25


def choose(asked: ReferenceKV, family: FluxFamily) -> ReferenceKV:
    """Resolves "auto" to the way a run caches the keys and values of references.

    Raises:
        SettingError: a cache is asked for on a model whose references attend to what changes.
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
        """Whether ComfyUI has dropped them."""
        return next(self.buffers(), None) is None


class _CachedBlock(nn.Module):
    key: Tensor
    value: Tensor

    def __init__(self, computed: "KeyValue") -> None:
        super().__init__()
        self.register_buffer("key", computed.key.contiguous())
        self.register_buffer("value", computed.value.contiguous())  # a view into a wide projection


class _CachedKeyValues:
    """Cached keys and values as a plan reads them: moved to the device, recomputed if dropped."""

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
    """The cached references of one model by digest, the least recently used first."""

    def __init__(self) -> None:
        self._held: dict[str, ReplaceablePatcher] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of everything cached, on the device and offloaded."""
        return sum(patcher.model_size() for patcher in self._held.values())

    def find(self, digest: str) -> ReplaceablePatcher | None:
        """Returns what is cached under a digest, which becomes the most recently used, or None."""
        patcher = self._held.pop(digest, None)
        if patcher is None or patcher.model.is_empty:
            return None
        self._held[digest] = patcher
        return patcher

    def on_device(self) -> list[ReplaceablePatcher]:
        """The most recently used entry if any of it is on the device: the next run may need it."""
        return [one for one in [*self._held.values()][-1:] if one.loaded_size()]

    def add(self, digest: str, patcher: ReplaceablePatcher) -> None:
        """Adds an entry, as the most recently used."""
        self._held[digest] = patcher

    def make_room(self, needed: int, limit: float, in_use: Iterable[str]) -> None:
        """Drops the least recently used entries until `needed` more bytes fit within the limit."""
        for digest in [one for one in self._held if one not in in_use]:
            if self.held_bytes + needed <= limit:
                return
            del self._held[digest]


class RunCache:
    """The network's `reference_cache` during one run; its `notes` tell what it did.

    Args:
        store: the entries; a new store caches for this run only, None computes in every step.
        identity: what keys and values depend on besides the references: weights, dtype and so on.
        blocks: the patcher of the network's blocks.
        step_bytes: activations of one step.
        token_bytes: activations of one token in the references' own pass.
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
        """Returns the keys and values of references, cached where memory allows."""
        size = _size(computed.cached_bytes)
        if self._store is None:
            return self._in_every_step(computed, "references: computed in every step.")
        digest = digest_of(references, computed, self._identity)
        patcher = self._used.get(digest)
        if patcher is None and (patcher := self._store.find(digest)) is not None:
            self._note(f"references: keys and values reused from an earlier run ({size}).")
        if patcher is None and (patcher := self._compute(computed, self._store)) is not None:
            self._store.add(digest, patcher)
            kept = "and kept" if self._is_stored else "for this run"
            self._note(f"references: keys and values computed {kept} ({size}).")
        if patcher is None:
            return self._in_every_step(
                computed,
                f"references: no memory for their keys and values ({size}): computed in every "
                "step, which is slower and makes the same picture.",
            )
        self._used[digest] = patcher
        host.load([self._blocks, *self._used.values()], self._step_bytes)
        return _CachedKeyValues(patcher, computed)

    def _compute(
        self, computed: "ReferencePass", store: ReferenceStore
    ) -> ReplaceablePatcher | None:
        """Computes keys and values; None if memory cannot hold them along with the run."""
        device, needed = self._blocks.load_device, computed.cached_bytes
        available = host.available_bytes(device)
        if device == torch.device("cpu"):  # on other devices cached entries count as freeable
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
        self._note(note)
        activations = self._step_bytes + self._pass_bytes(computed)
        host.load([self._blocks, *self._used.values()], activations)
        return computed

    def _pass_bytes(self, computed: "ReferencePass") -> int:
        images, tokens = computed.references.shape[:2]
        return images * tokens * self._token_bytes

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


@contextmanager
def caching(network: "Flux", cache: RunCache) -> Generator[None, None, None]:
    """Sets the network's `reference_cache` for one run, and restores the earlier one."""
    before, network.reference_cache = network.reference_cache, cache
    try:
        yield
    finally:
        network.reference_cache = before


def digest_of(
    references: Sequence[Tokens], computed: "ReferencePass", identity: tuple[object, ...]
) -> str:
    """Returns a digest of all that keys and values depend on: references, order, ids, identity."""
    digest = sha256(repr(identity).encode())
    tensors = [one for tokens in references for one in (tokens.values, tokens.ids)]
    for tensor in (*tensors, computed.modulation.final.shift):  # the shift differs with guidance
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _size(count: int) -> str:
    return f"{count / 1024**3:.1f} GB" if count >= 1e8 else f"{count / 1024**2:.1f} MB"
