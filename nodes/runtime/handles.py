"""What travels on the model sockets: a network, and the patchers through which ComfyUI loads it.

A handle is in no reference cycle, so a model is freed the moment its last user drops the handle.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...flux_core import memory
from ...flux_core.checks import check_finite, check_latent, check_sides
from ...flux_core.image.pixels import check_image, to_image, to_pixels
from ...flux_core.specs import LatentSpec
from ...flux_core.types import Image, Latent
from ...flux_core.values import Conditioning, TextFeatures
from .. import host
from .not_native import NotNative
from .quantised import changed_at_use, dequantised_bytes
from .reference_cache import ReferenceKV, ReferenceStore, RunCache, caching, choose
from .residency import Residency

if TYPE_CHECKING:
    from ...flux_core.image.autoencoder import Autoencoder
    from ...flux_core.sampling.job import Job
    from ...flux_core.sampling.run import Run
    from ...flux_core.text.encoders import PromptEncoder
    from ...flux_core.transformer.flux import Flux
    from ...flux_core.weights.lora import LoraPart


_OVERFLOW = "float16 overflows: set [autoencoder dtype] to bfloat16 or float32."


class ModelHandle(NotNative):
    """A transformer, whose blocks and modulation are two separate models to ComfyUI."""

    def __init__(self, network: "Flux", report: str, dtype: torch.dtype) -> None:
        from ..host.attention import transformer_attention

        devices = host.model_devices()
        self.network, self.family, self.report = network, network.family, report
        self.patcher = host.wrap(network.blocks, devices)
        self._modulation = host.wrap(network.modulation, devices)
        self._cached = ReferenceStore()
        self._residency = Residency(self._modulation, self.patcher, self._cached)
        self.dtype = network.compute_dtype = dtype
        network.ready = self._residency
        network.attention = transformer_attention(devices[0])
        self._dequantised = dequantised_bytes(self.patcher, self._modulation)
        self._base: ModelHandle | None = None

    def with_changes(self, parts: Sequence["LoraPart"]) -> "ModelHandle":
        """Returns a handle on the same weights that computes with changes applied.

        ComfyUI applies and removes the changes as one handle or the other is used, so this one
        stays as it is. Both share one store of cached references, whose digests tell them apart.
        """
        twin = copy(self)
        twin._base = self  # while it lives, its file is not loaded again
        twin.network = copy(self.network)  # the same two parts, loaded by the twin
        twin.patcher = changed_at_use(self.patcher, parts)
        twin._modulation = changed_at_use(self._modulation, parts)
        twin._dequantised = dequantised_bytes(twin.patcher, twin._modulation)
        twin._residency = Residency(twin._modulation, twin.patcher, self._cached)
        twin.network.ready = twin._residency
        return twin

    def get_models(self) -> list[Any]:
        """All patchers, so that ComfyUI holds on to them for the whole prompt."""
        return [self.patcher, self._modulation]

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.patcher.load_device

    @property
    def model_sampling(self) -> None:
        """It carries no noise levels of ComfyUI's."""
        return

    @contextmanager
    def ready(
        self, job: "Job", reference_kv: ReferenceKV = "auto", *, may_stop: bool = False
    ) -> Generator["Run", None, None]:
        """Yields a job on this model, planned and with its weights loaded.

        Raises:
            GlassboxError: inputs that do not go together, or more than memory holds.
        """
        from ...flux_core.sampling.run import run  # with the first use: it takes time

        cache = self._make_room(job, choose(reference_kv, self.family))
        with caching(self.network, cache):
            planned = run(self.network, job, may_stop=may_stop)
        self._residency.is_stepping = True
        yield replace(planned, notes=(*planned.notes, *cache.notes))

    def _make_room(self, job: "Job", reference_kv: ReferenceKV) -> RunCache:
        """Checks that a run fits into memory; returns its cache of references.

        Raises:
            MemoryLimitError: it does not fit, whatever is unloaded.
        """
        steps, cfg, batch = len(job.sigmas) - 1, job.cfg, job.noise.values.shape[0]
        sides = [job.conditioning]
        if cfg is not None and cfg.window(steps):
            sides.append(cfg.negative)
        texts = max(side.text.txt.shape[1] for side in sides)
        references = max(map(_reference_tokens, sides))
        spec, size = self.network.spec, self.dtype.itemsize
        needed = memory.plan_bytes(spec, steps, len(sides) * batch, size)
        if cfg is not None and len(sides) > 1 and cfg.passes == "batched":
            batch *= 2
        aside = references if self.family.references.isolated else 0
        tokens = texts + job.noise.count + references - aside
        needed += memory.transformer_bytes(spec, tokens, batch, size)
        needed += memory.attended_bytes(spec, aside, batch, size) + self._dequantised
        wired = [one.tokens for side in sides for one in side.references]
        images = max((one.values.shape[0] for one in wired), default=1)
        alone = memory.transformer_bytes(spec, aside, images, size) + self._dequantised
        count = max(len(side.references) for side in sides)
        memory.require_memory(
            needed + alone if reference_kv == "every step" else max(needed, alone),
            host.available_bytes(self.device),
            f"Sampling {tokens + aside} tokens ({count} references, batch {batch})",
            "make the image or the batch smaller, or use fewer or smaller [references].",
        )
        self._residency.begin(needed, uses_cached=reference_kv == "kept" and aside > 0)
        return RunCache(
            {"kept": self._cached, "this run": ReferenceStore()}.get(reference_kv),
            self._identity(),
            self.patcher,
            step_bytes=needed,
            token_bytes=memory.transformer_bytes(spec, 1, 1, size),
            is_stored=reference_kv == "kept",
        )

    def _identity(self) -> tuple[object, ...]:
        """Everything but the references that their keys and values depend on.

        ComfyUI gives a patcher a new uuid whenever patches, such as a LoRA's, are added to it.
        """
        patches = [patcher.patches_uuid for patcher in self.get_models()]
        return (*patches, self.dtype, self.device, self.network.attention.name)


def _reference_tokens(conditioning: Conditioning) -> int:
    return sum(one.tokens.count for one in conditioning.references)


class TextEncodersHandle:
    """The text encoders, which are one model to ComfyUI."""

    def __init__(self, encoders: "PromptEncoder") -> None:
        devices = host.text_devices()
        self.encoders, self.report = encoders, encoders.report
        # In a list, because a patcher sets attributes that transformers' own models reject.
        self.patcher = patcher = host.wrap(nn.ModuleList(encoders.modules), devices)
        encoders.device = devices[0]
        encoders.ready = lambda: host.load_whole(patcher)

    def get_models(self) -> list[Any]:
        """The patcher, so that ComfyUI holds on to it for the whole prompt."""
        return [self.patcher]

    def encode(self, prompt: str, prompt_2: str, t5_tokens: int | None) -> TextFeatures:
        """Encodes a prompt; `prompt_2` is T5's, the same when empty."""
        return text_to_outputs(self.encoders.encode(prompt, prompt_2, tokens=t5_tokens))


def text_to_outputs(text: TextFeatures) -> TextFeatures:
    """Moves text features to the device on which ComfyUI keeps node outputs."""
    pooled = None if text.pooled is None else host.to_outputs(text.pooled)
    return replace(text, txt=host.to_outputs(text.txt), pooled=pooled)


class AutoencoderHandle:
    """An autoencoder; images of a batch go through it one by one."""

    def __init__(self, autoencoder: "Autoencoder", report: str, dtype: torch.dtype) -> None:
        from ..host.attention import autoencoder_attention

        self.autoencoder, self.report, self.dtype = autoencoder, report, dtype
        self.patcher = host.wrap(autoencoder, host.autoencoder_devices())
        autoencoder.use_attention(autoencoder_attention(self.patcher.load_device))

    def get_models(self) -> list[Any]:
        """The patcher, so that ComfyUI holds on to it for the whole prompt."""
        return [self.patcher]

    @property
    def latent(self) -> LatentSpec:
        """The format of its latents."""
        return self.autoencoder.spec.latent

    def encode(self, image: Image, generator: torch.Generator | None) -> Latent:
        """Encodes images (B, H, W, 3) to latents.

        Raises:
            ShapeError: wrong channel count, or sides that do not divide into tokens.
            MemoryLimitError: one image takes more memory than there is.
            NonFiniteError: the autoencoder overflowed.
        """
        check_image(image)
        height, width = image.shape[1:3]
        check_sides(height, width, self.latent)
        self._make_room(memory.encode_bytes, "Encoding", height, width)
        latents = [
            self.autoencoder.encode(self._here(to_pixels(one)), generator=generator)
            for one in image.split(1)
        ]
        encoded = torch.cat(latents)
        check_finite(encoded, "encoded image", _OVERFLOW)
        return host.to_outputs(encoded.float())

    def decode(self, latent: Latent, spec: LatentSpec) -> Image:
        """Decodes latents to images (B, H, W, 3).

        Raises:
            FamilyMismatchError: the latent is another autoencoder's.
            MemoryLimitError: one image takes more memory than there is.
            NonFiniteError: the autoencoder overflowed.
        """
        check_latent(spec, self.latent, "tokens")
        scale = self.latent.downscale
        height, width = latent.shape[2] * scale, latent.shape[3] * scale
        self._make_room(memory.decode_bytes, "Decoding", height, width)
        images: list[Image] = []
        for one in latent.split(1):
            pixels = self.autoencoder.decode(self._here(one))
            check_finite(pixels, "decoded image", _OVERFLOW)
            images.append(host.to_outputs(to_image(pixels)))
        return torch.cat(images)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        host.stop_if_cancelled()
        return tensor.to(self.patcher.load_device, self.dtype)

    def _make_room(
        self, estimate: Callable[[Any, int, int], int], job: str, height: int, width: int
    ) -> None:
        needed = estimate(self.autoencoder.spec, height * width, self.dtype.itemsize)
        memory.require_memory(
            needed,
            host.available_bytes(self.patcher.load_device),
            f"{job} an image of {width}x{height}",
            "make it smaller with [image fit].",
        )
        # Twice, as ComfyUI does for its own autoencoders: GPU kernels need workspace.
        host.load([self.patcher], 2 * needed)
