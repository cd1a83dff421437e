"""ComfyUI's own MODEL on our model socket: sampling under its management, as ours is."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ...flux_core import memory
from ...flux_core.sampling.denoise import denoise, finish, sampling_notes
from ...flux_core.sampling.guidance import TrueCFG
from ...flux_core.sampling.solver import SolverName
from ...flux_core.types import Sigmas
from ...flux_core.values import Conditioning, Tokens
from .. import host
from ..runtime.handles import ModelHandle
from ..runtime.reference_cache import ReferenceKV, choose
from .lora import native_with_changes

if TYPE_CHECKING:
    from ...flux_core.weights.lora import Lora, LoraPart

AnyModel: TypeAlias = ModelHandle | Any  # the other is ComfyUI's ModelPatcher


def as_model(model: AnyModel) -> "ModelHandle | NativeModelHandle":
    """Take what is wired to a model socket: a model of this pack's loaders, or a native MODEL."""
    return model if isinstance(model, ModelHandle) else NativeModelHandle(model)


class NativeModelHandle:
    """A native MODEL; it lives as long as the node that runs."""

    def __init__(self, patcher: Any) -> None:
        from .network import NativeNetwork  # reading weights' names takes time to import

        self.network = NativeNetwork(patcher)
        self.patcher, self.family, self.report = patcher, self.network.family, self.network.report

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.patcher.load_device

    def with_lora(self, lora: "Lora", parts: Sequence["LoraPart"]) -> Any:
        """Give a MODEL with a LoRA on it whenever it computes; this one stays as it is."""
        return native_with_changes(self.patcher, parts, lora.norms if parts else ())

    def sample(
        self,
        conditioning: Conditioning,
        noise: Tokens,
        sigmas: Sigmas,
        solver: SolverName,
        cfg: TrueCFG | None = None,
        reference_kv: ReferenceKV = "auto",
    ) -> Tokens:
        """Sample as `ModelHandle` does; both passes of true CFG run in turn.

        Raises:
            GlassboxError: inputs that do not go together, or more than memory holds.
        """
        choose(reference_kv, self.family)
        if cfg is not None:
            cfg = replace(cfg, passes="in turn")
        steps = len(sigmas) - 1
        notes = sampling_notes(self.network, conditioning, steps=steps, cfg=cfg, noise=noise)
        guess = [f"taken for {self.report}."] if self.network.is_guess else []
        host.tell([*guess, *notes])
        here = replace(noise, values=noise.values.to(self.device))
        with self._loaded(conditioning, noise):
            run = denoise(self.network, conditioning, here, sigmas, cfg=cfg, solver=solver)
            last = host.drive(run, noise, self.device)
        return finish(host.to_outputs(last.x), noise)

    @contextmanager
    def _loaded(self, conditioning: Conditioning, noise: Tokens) -> Generator[None, None, None]:
        """Have ComfyUI load the MODEL and all that hangs on it; tell it when the run ends."""
        parts = (noise, *conditioning.references)
        tokens = conditioning.text.txt.shape[1] + sum(one.ids.shape[0] for one in parts)
        batch, size = noise.values.shape[0], self.network.dtype.itemsize
        needed = memory.transformer_bytes(self.network.spec, tokens, batch, size)
        memory.require_memory(
            needed,
            host.available_bytes(self.device),
            f"Sampling {tokens} tokens ({len(parts) - 1} references, batch {batch})",
            "make the picture or the batch smaller, or use fewer or smaller references.",
        )
        host.bring([self.patcher, *self.patcher.get_nested_additional_models()], needed)
        try:
            self.patcher.pre_run()
            self.patcher.apply_hooks(hooks=None)
            yield
        finally:
            self.patcher.cleanup()
