"""Keys and values of references, kept across runs where a model was trained for that.

Such a model's references see themselves alone, at t = 0, so what all other tokens see of them
depends on the weights and the references and on nothing else: a new prompt, seed or size uses it
again, bit for bit. A store lives in its model's handle and dies with it.
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
    from ...flux_core.transformer.blocks import KeyValue
    from ...flux_core.transformer.flux import Flux
    from ...flux_core.transformer.plan import ReferencePass

ReferenceKV = Literal["auto", "kept", "this run", "every step"]
REFERENCE_KV: tuple[ReferenceKV, ...] = get_args(ReferenceKV)

# Of the memory that is free on a device or can be freed there: what one model's store may hold.
# What a run needs itself may be more; ComfyUI's management may push off any of it at any time.
_SHARE_OF_DEVICE = 0.25


def choose(asked: ReferenceKV, family: FluxFamily) -> ReferenceKV:
    """Decide how a run treats the keys and values of references.

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
            "set reference_kv to 'auto' or 'every step' on the sampler, or load such a model in "
            "'Load Model (FLUX)'.",
        )
    return "every step"


class KeptReferences(nn.Module):
    """What every block's other tokens see of one set of references; empty once dropped."""

    def __init__(self, computed: Iterable["KeyValue"]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_KeptBlock(one) for one in computed)

    @property
    def is_empty(self) -> bool:
        """Whether ComfyUI had them dropped."""
        return next(self.buffers(), None) is None


class _KeptBlock(nn.Module):
    key: Tensor
    value: Tensor

    def __init__(self, kept: "KeyValue") -> None:
        super().__init__()
        self.register_buffer("key", kept.key.contiguous())
        self.register_buffer("value", kept.value.contiguous())  # a view into a wide projection


class _Seen:
    """Kept keys and values as a plan reads them: from where they are, or computed anew."""

    def __init__(self, patcher: ReplaceablePatcher, computed: "ReferencePass") -> None:
        self.patcher, self.computed = patcher, computed

    def __iter__(self) -> Iterator["KeyValue"]:
        from ...flux_core.transformer.blocks import KeyValue

        if self.patcher.model.is_empty:  # dropped in the middle of the run
            yield from self.computed
            return
        device = self.patcher.load_device
        for block in self.patcher.model.blocks:
            key, value = (one.to(device, non_blocking=True) for one in (block.key, block.value))
            yield KeyValue(key, value)


class ReferenceStore:
    """Kept references of one model by digest, the least recently used first."""

    def __init__(self) -> None:
        self._held: dict[str, ReplaceablePatcher] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of all that is kept, on the device and waiting beside it."""
        return sum(patcher.model_size() for patcher in self._held.values())

    def find(self, digest: str) -> ReplaceablePatcher | None:
        """Give what is kept under a digest, and take it for the last used."""
        patcher = self._held.pop(digest, None)
        if patcher is None or patcher.model.is_empty:
            return None
        self._held[digest] = patcher
        return patcher

    def on_device(self) -> list[ReplaceablePatcher]:
        """Give what was used last, if any of it is where it computes: the next run may need it."""
        return [one for one in [*self._held.values()][-1:] if one.loaded_size()]

    def add(self, digest: str, patcher: ReplaceablePatcher) -> None:
        """Keep one more, as the last used."""
        self._held[digest] = patcher

    def make_room(self, needed: int, limit: float, in_use: Iterable[str]) -> None:
        """Forget the least recently used until so many bytes more stay within the limit."""
        for digest in [one for one in self._held if one not in in_use]:
            if self.held_bytes + needed <= limit:
                return
            del self._held[digest]


class KeepDuringRun:
    """The network's `keep` during one run; `notes` say afterwards what it did.

    Args:
        store: where to look and to keep; a new one keeps for this run only, None computes in
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
        """Give the keys and values of references, kept if they can be."""
        size = _size(computed.kept_bytes)
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
        host.bring([self._blocks, *self._used.values()], self._step_bytes)
        return _Seen(patcher, computed)

    def _compute(
        self, computed: "ReferencePass", store: ReferenceStore
    ) -> ReplaceablePatcher | None:
        """Compute keys and values; None if memory does not hold them beside what a run needs."""
        device, needed = self._blocks.load_device, computed.kept_bytes
        available = host.available_bytes(device)
        if device == torch.device("cpu"):  # elsewhere what is kept counts as what can be freed
            available += store.held_bytes
        store.make_room(needed, available * _SHARE_OF_DEVICE, self._used)
        activations = max(self._step_bytes, self._pass_bytes(computed))
        if activations + needed > host.available_bytes(device):
            return None
        try:
            host.bring([self._blocks, *self._used.values()], activations + needed)
            return ReplaceablePatcher(KeptReferences(computed), device)
        except (RuntimeError, MemoryError) as error:
            if not host.is_out_of_memory(error):
                raise
            return None

    def _in_every_step(self, computed: "ReferencePass", note: str) -> Iterable["KeyValue"]:
        self._tell(note)
        activations = self._step_bytes + self._pass_bytes(computed)
        host.bring([self._blocks, *self._used.values()], activations)
        return computed

    def _pass_bytes(self, computed: "ReferencePass") -> int:
        pictures, tokens = computed.references.shape[:2]
        return pictures * tokens * self._token_bytes

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


@contextmanager
def keeping(network: "Flux", keep: KeepDuringRun) -> Generator[None, None, None]:
    """Let a run decide how the network's references are kept."""
    before, network.keep = network.keep, keep
    try:
        yield
    finally:
        network.keep = before


def digest_of(
    references: Sequence[Tokens], computed: "ReferencePass", identity: tuple[object, ...]
) -> str:
    """Name keys and values by all they depend on: references, their order and places, the rest."""
    digest = sha256(repr(identity).encode())
    tensors = [one for tokens in references for one in (tokens.values, tokens.ids)]
    for tensor in (*tensors, computed.modulation.final.shift):  # the last tells guidance apart
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _size(count: int) -> str:
    return f"{count / 1024**3:.1f} GB" if count >= 1e8 else f"{count / 1024**2:.1f} MB"
