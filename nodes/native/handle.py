"""ComfyUI's own MODEL on our model socket, sampled under ComfyUI's memory management."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ...flux_core import memory
from .. import host
from ..runtime.handles import ModelHandle
from ..runtime.reference_cache import ReferenceKV, choose
from .lora import native_with_changes

if TYPE_CHECKING:
    from ...flux_core.sampling.job import Job
    from ...flux_core.sampling.run import Run
    from ...flux_core.weights.lora import Lora, LoraPart

AnyModel: TypeAlias = ModelHandle | Any  # the other is ComfyUI's ModelPatcher


def as_model(model: AnyModel) -> "ModelHandle | NativeModelHandle":
    """Returns a handle on the model wired to a socket: ours as it is, a native MODEL wrapped."""
    return model if isinstance(model, ModelHandle) else NativeModelHandle(model)


class NativeModelHandle:
    """A native MODEL; it lives as long as the node that runs, or the guider it is in."""

    def __init__(self, patcher: Any) -> None:
        from .network import NativeNetwork  # its imports, for reading weight names, take time

        self.network = NativeNetwork(patcher)
        self.patcher, self.family, self.report = patcher, self.network.family, self.network.report

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.patcher.load_device

    @property
    def model_sampling(self) -> Any:
        """The noise levels it carries."""
        return self.patcher.get_model_object("model_sampling")

    def with_lora(self, lora: "Lora", parts: Sequence["LoraPart"]) -> Any:
        """Returns a MODEL with a LoRA applied whenever it computes; this one stays as it is."""
        return native_with_changes(self.patcher, parts, lora.norms if parts else ())

    @contextmanager
    def ready(
        self, job: "Job", reference_kv: ReferenceKV = "auto", *, may_stop: bool = False
    ) -> Generator["Run", None, None]:
        """Yields a job on this model, planned and loaded; both passes of true CFG run in turn.

        ComfyUI loads the MODEL and the models attached to it, and cleans up when the run ends.

        Raises:
            GlassboxError: inputs that do not go together, or more than memory holds.
        """
        from ...flux_core.sampling.run import run  # with the first use: it takes time

        choose(reference_kv, self.family)
        if job.cfg is not None:
            job = replace(job, cfg=replace(job.cfg, passes="in turn"))
        self._make_room(job)
        try:
            self.patcher.pre_run()
            self.patcher.apply_hooks(hooks=None)
            planned = run(self.network, job, may_stop=may_stop)
            guess = [f"taken for {self.report}."] if self.network.is_guess else []
            yield replace(planned, notes=(*guess, *planned.notes))
        finally:
            self.patcher.cleanup()

    def _make_room(self, job: "Job") -> None:
        conditioning, noise = job.conditioning, job.noise
        images = (noise, *(one.tokens for one in conditioning.references))
        tokens = conditioning.text.txt.shape[1] + sum(one.count for one in images)
        batch, size = noise.values.shape[0], self.network.dtype.itemsize
        needed = memory.transformer_bytes(self.network.spec, tokens, batch, size)
        memory.require_memory(
            needed,
            host.available_bytes(self.device),
            f"Sampling {tokens} tokens ({len(images) - 1} references, batch {batch})",
            "make the image or the batch smaller, or use fewer or smaller [references].",
        )
        host.load([self.patcher, *self.patcher.get_nested_additional_models()], needed)
