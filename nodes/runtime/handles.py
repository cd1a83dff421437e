"""What travels on the model sockets: a network, and the patchers ComfyUI moves its weights with.

A handle lives as long as somebody holds it, and holds no reference to itself, so a model is freed
the moment its last user lets go.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...flux_core import memory
from ...flux_core.checks import check_finite, check_latent, check_sides
from ...flux_core.image.pixels import check_image, to_image, to_pixels
from ...flux_core.sampling.denoise import denoise, finish, sampling_notes
from ...flux_core.sampling.guidance import TrueCFG
from ...flux_core.sampling.solver import SolverName
from ...flux_core.specs import LatentSpec
from ...flux_core.types import Image, Latent, Sigmas
from ...flux_core.values import Conditioning, TextFeatures, Tokens
from .. import host
from .not_native import NotNative
from .quantised import changed_at_use, made_bytes
from .reference_cache import KeepDuringRun, ReferenceKV, ReferenceStore, choose, keeping

if TYPE_CHECKING:
    from ...flux_core.image.autoencoder import Autoencoder
    from ...flux_core.text.encoders import PromptEncoder
    from ...flux_core.transformer.flux import Flux
    from ...flux_core.weights.lora import LoraPart


_OVERFLOW = "float16 overflows: set dtype to bfloat16 or float32 in 'Load Autoencoder (FLUX)'."


class _Residency:
    """Brings the part of a transformer that computes next, and frees the other.

    It knows the patchers, not the network: a network that held its handle would never be freed.
    """

    def __init__(self, modulation: Any, blocks: Any, kept: ReferenceStore) -> None:
        self.modulation, self.blocks, self.kept = modulation, blocks, kept
        self.activations = 0  # bytes the next run needs beside the weights
        self.uses_kept = False  # whether it may need what was kept last, which then stays

    def __call__(self, part: nn.Module) -> torch.device:
        if part is self.modulation.model:
            return host.bring([self.modulation], 0)
        host.send_away(self.modulation)
        beside = self.kept.on_device() if self.uses_kept else []
        return host.bring([self.blocks, *beside], self.activations)


class ModelHandle(NotNative):
    """A transformer: blocks and modulation are two models to ComfyUI."""

    def __init__(self, network: "Flux", report: str, dtype: torch.dtype) -> None:
        devices = host.model_devices()
        self.network, self.family, self.report = network, network.family, report
        self.patcher = host.wrap(network.blocks, devices)
        self._modulation = host.wrap(network.modulation, devices)
        self._kept = ReferenceStore()
        self._residency = _Residency(self._modulation, self.patcher, self._kept)
        self.dtype = network.compute_dtype = dtype
        network.ready = self._residency
        self._made = made_bytes(self.patcher, self._modulation)
        self._base: ModelHandle | None = None

    def with_changes(self, parts: Sequence["LoraPart"]) -> "ModelHandle":
        """Give a handle on the same weights, with changes on them whenever it computes.

        ComfyUI puts changes on and takes them off as one handle or the other is used, so this one
        stays as it is. Both share one store of kept references, which tells them apart.
        """
        twin = copy(self)
        twin._base = self  # while it lives, its file is not loaded again
        twin.network = copy(self.network)  # the same two parts, brought by the twin
        twin.patcher = changed_at_use(self.patcher, parts)
        twin._modulation = changed_at_use(self._modulation, parts)
        twin._made = made_bytes(twin.patcher, twin._modulation)
        twin._residency = _Residency(twin._modulation, twin.patcher, self._kept)
        twin.network.ready = twin._residency
        return twin

    def get_models(self) -> list[Any]:
        """Name every patcher, so that ComfyUI keeps them for the prompt."""
        return [self.patcher, self._modulation]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.patcher.load_device

    def sample(
        self,
        conditioning: Conditioning,
        noise: Tokens,
        sigmas: Sigmas,
        solver: SolverName,
        cfg: TrueCFG | None = None,
        reference_kv: ReferenceKV = "auto",
    ) -> Tokens:
        """Sample under ComfyUI's progress, previews and cancelling.

        Raises:
            GlassboxError: inputs that do not go together, or more than memory holds.
        """
        steps = len(sigmas) - 1
        keep = self._prepare(conditioning, noise, steps, cfg, choose(reference_kv, self.family))
        notes = sampling_notes(self.network, conditioning, steps=steps, cfg=cfg, noise=noise)
        host.tell(notes)
        here = replace(noise, values=noise.values.to(self.device))
        with keeping(self.network, keep):
            run = denoise(self.network, conditioning, here, sigmas, cfg=cfg, solver=solver)
        if keep.notes:
            host.tell([*notes, *keep.notes])
        last = host.drive(run, noise, self.device)
        return finish(host.to_outputs(last.x), noise)

    def _prepare(
        self,
        conditioning: Conditioning,
        noise: Tokens,
        steps: int,
        cfg: TrueCFG | None,
        reference_kv: ReferenceKV,
    ) -> KeepDuringRun:
        """Ask for the memory of a run before it starts; gives how it treats references.

        Raises:
            MemoryLimitError: it cannot fit, whatever is unloaded.
        """
        twice = cfg is not None and len(cfg.window(steps)) > 0
        sides = [conditioning, cfg.negative] if cfg is not None and twice else [conditioning]
        texts = max(side.text.txt.shape[1] for side in sides)
        placed = max((side.references for side in sides), key=_token_count)
        references = _token_count(placed)
        spec, size = self.network.spec, self.dtype.itemsize
        batch = noise.values.shape[0]
        needed = memory.plan_bytes(spec, steps, 2 * batch if twice else batch, size)
        if cfg is not None and twice and cfg.passes == "batched":
            batch *= 2
        aside = references if self.family.references.see_only_themselves else 0
        tokens = texts + _token_count([noise]) + references - aside
        needed += memory.transformer_bytes(spec, tokens, batch, size)
        needed += memory.attended_bytes(spec, aside, batch, size) + self._made
        pictures = max(
            (one.values.shape[0] for side in sides for one in side.references), default=1
        )
        alone = memory.transformer_bytes(spec, aside, pictures, size) + self._made
        memory.require_memory(
            needed + alone if reference_kv == "every step" else max(needed, alone),
            host.available_bytes(self.device),
            f"Sampling {tokens + aside} tokens ({len(placed)} references, batch {batch})",
            "make the picture or the batch smaller, or use fewer or smaller references.",
        )
        self._residency.activations = needed
        self._residency.uses_kept = reference_kv == "kept" and aside > 0
        return KeepDuringRun(
            {"kept": self._kept, "this run": ReferenceStore()}.get(reference_kv),
            self._identity(),
            self.patcher,
            step_bytes=needed,
            token_bytes=memory.transformer_bytes(spec, 1, 1, size),
            is_stored=reference_kv == "kept",
        )

    def _identity(self) -> tuple[object, ...]:
        """Name what keys and values of references depend on beside them.

        ComfyUI gives a patcher a new uuid whenever patches, such as a LoRA's, are put on it.
        """
        patches = [patcher.patches_uuid for patcher in self.get_models()]
        return (*patches, self.dtype, self.device, host.attention_backend())


def _token_count(several: Sequence[Tokens]) -> int:
    return sum(one.ids.shape[0] for one in several)


class TextEncodersHandle:
    """The text encoders: one model to ComfyUI."""

    def __init__(self, encoders: "PromptEncoder") -> None:
        devices = host.text_devices()
        self.encoders, self.report = encoders, encoders.report
        # In a list, because a patcher sets attributes that transformers' own models refuse.
        self.patcher = patcher = host.wrap(nn.ModuleList(encoders.modules), devices)
        encoders.device = devices[0]
        encoders.ready = lambda: host.bring_whole(patcher)

    def get_models(self) -> list[Any]:
        """Name the patcher, so that ComfyUI keeps it for the prompt."""
        return [self.patcher]

    def encode(self, prompt: str, prompt_2: str, t5_tokens: int | None) -> TextFeatures:
        """Encode a prompt; `prompt_2` is T5's, the same when empty."""
        return text_to_outputs(self.encoders.encode(prompt, prompt_2, tokens=t5_tokens))


def text_to_outputs(text: TextFeatures) -> TextFeatures:
    """Bring text features to where ComfyUI keeps what travels between nodes."""
    pooled = None if text.pooled is None else host.to_outputs(text.pooled)
    return replace(text, txt=host.to_outputs(text.txt), pooled=pooled)


class AutoencoderHandle:
    """An autoencoder; pictures of a batch go through it one by one."""

    def __init__(self, autoencoder: "Autoencoder", report: str, dtype: torch.dtype) -> None:
        self.autoencoder, self.report, self.dtype = autoencoder, report, dtype
        self.patcher = host.wrap(autoencoder, host.autoencoder_devices())

    def get_models(self) -> list[Any]:
        """Name the patcher, so that ComfyUI keeps it for the prompt."""
        return [self.patcher]

    @property
    def latent(self) -> LatentSpec:
        """What its latents are."""
        return self.autoencoder.spec.latent

    def encode(self, image: Image, generator: torch.Generator | None) -> Latent:
        """Encode pictures (B, H, W, 3) to latents.

        Raises:
            ShapeError: channels or sides do not fit.
            MemoryLimitError: one picture takes more memory than there is.
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
        check_finite(encoded, "encoded picture", _OVERFLOW)
        return host.to_outputs(encoded.float())

    def decode(self, latent: Latent, spec: LatentSpec) -> Image:
        """Decode latents to pictures (B, H, W, 3).

        Raises:
            FamilyMismatchError: a latent of another autoencoder.
            MemoryLimitError: one picture takes more memory than there is.
            NonFiniteError: the autoencoder overflowed.
        """
        check_latent(spec, self.latent, "tokens")
        scale = self.latent.downscale
        height, width = latent.shape[2] * scale, latent.shape[3] * scale
        self._make_room(memory.decode_bytes, "Decoding", height, width)
        images: list[Image] = []
        for one in latent.split(1):
            pixels = self.autoencoder.decode(self._here(one))
            check_finite(pixels, "decoded picture", _OVERFLOW)
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
            f"{job} a picture of {width}x{height}",
            "make it smaller with 'Fit Image (FLUX)'.",
        )
        # Twice, as ComfyUI does for its own autoencoders: GPU kernels want room to work in.
        host.bring([self.patcher], 2 * needed)
