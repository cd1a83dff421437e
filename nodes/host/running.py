"""The running node: notes on it, progress, previews, and cancelling.

`Any` stands for ComfyUI's own classes, which carry no usable types.
"""

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import comfy.latent_formats
import comfy.model_management as mm
import comfy.utils
import latent_preview
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...flux_core.errors import SettingError
from ...flux_core.specs import LatentSpec
from ...flux_core.tokens.pack import unpack_tokens
from ...flux_core.types import Latent
from ...flux_core.values import Tokens
from ..settings import in_words

if TYPE_CHECKING:
    from ...flux_core.sampling.run import Run
    from ...flux_core.sampling.solvers import Step

logger = logging.getLogger(__name__)

MAX_SIDE_PX = 16384  # ComfyUI's own MAX_RESOLUTION
_PREVIEW_PX = 512  # the side ComfyUI shrinks previews to
_PREVIEWED = (comfy.latent_formats.Flux, comfy.latent_formats.Flux2)


def latent_samples(latent: Any) -> Tensor:
    """Returns the tensor of a LATENT.

    Raises:
        SettingError: it carries something that tokens cannot, which would be lost.
    """
    if latent.get("noise_mask") is not None:
        raise SettingError(
            "The latent carries a noise mask, which tokens cannot carry.",
            "a latent without one.",
            "take 'Set Latent Noise Mask' or 'VAE Encode (for Inpainting)' off this wire.",
        )
    nested = not isinstance(latent["samples"], Tensor)
    if latent.get("type") is not None or nested:
        several = "several at once, as videos with sound have them"
        raise SettingError(
            f"The latent is {several if nested else 'of type ' + repr(latent['type'])}.",
            "the latent of a picture.",
            "encode a picture with FLUX's autoencoder.",
        )
    if latent.get("batch_index") is not None:
        notify(["The latent's batch_index is ignored: tokens carry no noise indices."])
    return latent["samples"]


def notify(notes: Sequence[str]) -> None:
    """Shows notes on the node that runs, and writes them into ComfyUI's log."""
    from server import PromptServer

    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    text = "\n".join(map(in_words, notes))
    if text:
        logger.info(text)
    if text and server is not None and context is not None:
        server.send_progress_text(text, context.node_id, server.client_id)


def is_prompt_running() -> bool:
    """Whether ComfyUI is running a prompt; if not, unloading was a person's request."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    return server is not None and bool(server.prompt_queue.get_current_queue_volatile()[0])


def stop_if_cancelled() -> None:
    """Raises ComfyUI's interruption if the user pressed cancel."""
    mm.throw_exception_if_processing_interrupted()


class Progress:
    """Shows each step as progress and preview, and cancels between steps."""

    def __init__(self, target: Tokens, device: torch.device) -> None:
        stop_if_cancelled()
        self.target = target
        self._previewer = latent_preview.get_previewer(device, latent_format(target.latent))
        self._bar: Any = None

    def __call__(self, index: int, steps: int, denoised: Latent) -> None:
        """Shows step `index` of `steps`; denoised (B, C, h, w) in the transformer's scale."""
        self._bar = self._bar or comfy.utils.ProgressBar(steps)
        self._bar.update_absolute(index + 1, steps, self._preview(denoised))
        stop_if_cancelled()

    def _preview(self, denoised: Latent) -> Any:
        short, long = sorted(self.target.grid)
        if self._previewer is None or long >= _PREVIEW_PX * short:
            return None  # ComfyUI would shrink the short side to 0 and crash
        return self._previewer.decode_latent_to_preview_image("JPEG", denoised)


def drive(run: "Run", device: torch.device) -> "Step":
    """Runs every step under ComfyUI's progress, previews and cancelling; returns the last.

    The generator is always closed, so nothing it holds outlives a cancel.
    """
    target = run.job.noise
    show, last = Progress(target, device), None
    with closing(iter(run)) as steps:
        for last in steps:
            latent = unpack_tokens(last.denoised, target.grid, target.latent)
            show(last.index, last.steps, latent)
    assert last is not None  # sigmas hold at least one step
    return last


def latent_format(spec: LatentSpec) -> Any:
    """Returns ComfyUI's latent format for previews, with our colours where the spec has any."""
    described: Any = next(one for one in _PREVIEWED if one.latent_channels == spec.channels)()
    if spec.preview_rgb:
        *described.latent_rgb_factors, described.latent_rgb_factors_bias = spec.preview_rgb
        described.taesd_decoder_name = None  # that one decodes the published model's latents
    return described
