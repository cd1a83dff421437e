"""Our network, with its references, as ComfyUI's GUIDER: any native SAMPLER runs it.

`Any` stands for ComfyUI's own classes, which carry no usable types.

Source: Comfy-Org/ComfyUI@14b05228 comfy/samplers.py CFGGuider, KSAMPLER, cfg_function.
"""

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ...flux_core.checks import check_finite
from ...flux_core.errors import FamilyMismatchError, SettingError, ShapeError
from ...flux_core.sampling.guidance import TrueCFG
from ...flux_core.sampling.job import Job
from ...flux_core.sampling.run import Run, check_computed
from ...flux_core.specs import LatentSpec
from ...flux_core.tokens.pack import latent_tokens, pack_latent, tokens_latent, unpack_tokens
from ...flux_core.types import Latent, Sigmas
from ...flux_core.values import Conditioning, Tokens
from .. import host
from ..runtime.reference_cache import ReferenceKV
from ..runtime.sample import Handle
from ..settings import ON_GUIDER, settings_named

_FOLLOWED = ("transformer_options", "sampler_post_cfg_function", "disable_cfg1_optimization")
_OTHER = "choose another SAMPLER, or use [guided sampling] without one."


class Guider:
    """One conditioning, or two with true CFG, on one model.

    Samplers call it for the denoised latent and read `model_patcher`, `inner_model` and `cfg`.
    """

    def __init__(
        self,
        handle: Handle,
        conditioning: Conditioning,
        cfg: TrueCFG | None,
        reference_kv: ReferenceKV = "auto",
    ) -> None:
        self.handle, self.conditioning = handle, conditioning
        self.settings = cfg
        self.reference_kv: ReferenceKV = reference_kv
        self.cfg = 1.0 if cfg is None else cfg.scale
        self.model_patcher = host.SampledPatcher(
            handle.family, handle.device, handle.model_sampling
        )
        self.inner_model = self.model_patcher.model
        self._run: Run | None = None

    def sample(
        self,
        noise: Latent,
        latent_image: Latent,
        sampler: Any,
        sigmas: Sigmas,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., None] | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Latent:
        """Samples as ComfyUI's CFGGuider does.

        Args:
            noise: (B, C, h, w), standard normal.
            latent_image: (B, C, h, w), unscaled; zeros for an empty latent.
            sampler: a native SAMPLER.
            sigmas: (S + 1,), falling; with no sigmas, latent_image is returned.
            denoise_mask: where it samples, of the latent's size or of the image's in pixels.
            callback: called with step, denoised, x, steps.
            disable_pbar: no progress bar on the console.
            seed: of the noise that the sampler adds itself.

        Raises:
            GlassboxError: something the network cannot do, with the setting to change.
        """
        with settings_named(ON_GUIDER):
            if sigmas.shape[-1] == 0:
                return latent_image
            spec = self.handle.family.latent
            _check_latents(noise, latent_image, spec)
            if denoise_mask is not None:
                denoise_mask = _checked_mask(denoise_mask, latent_image, spec)
                check_finite(latent_image, "latent_image input")
            noise = noise.float().expand_as(latent_image)
            is_start = denoise_mask is None and bool(torch.count_nonzero(latent_image))
            job = Job(
                conditioning=self.conditioning,
                noise=latent_tokens(noise, spec, is_noise=True),
                sigmas=sigmas,
                cfg=self.settings,
                start=latent_tokens(latent_image, spec) if is_start else None,
            )
            return self.run(
                job,
                sampler,
                beneath=latent_image,
                denoise_mask=denoise_mask,
                callback=callback,
                disable_pbar=disable_pbar,
                seed=seed,
                may_stop=True,
            )

    def run(
        self,
        job: Job,
        sampler: Any,
        *,
        beneath: Latent | None = None,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., None] | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        may_stop: bool = False,
    ) -> Latent:
        """Samples a job with a native SAMPLER in place of its solver.

        Args:
            job: without edits, which a native SAMPLER has no place for.
            sampler: a native SAMPLER.
            beneath: (B, C, h, w), what the mask lets through; the job's start when None.
            denoise_mask, callback, disable_pbar, seed: as `sample`.
            may_stop: sigmas may end above 0.
        """
        _check_sampler(sampler, job)
        with self.handle.ready(job, self.reference_kv, may_stop=may_stop) as planned:
            host.notify(planned.notes)
            before, self._run = self._run, planned
            try:
                return self._sampled(
                    planned, sampler, beneath, denoise_mask, callback, disable_pbar, seed
                )
            finally:
                self._run = before

    def _sampled(
        self,
        planned: Run,
        sampler: Any,
        beneath: Latent | None,
        denoise_mask: Tensor | None,
        callback: Callable[..., None] | None,
        disable_pbar: bool,
        seed: int | None,
    ) -> Latent:
        device, spec = planned.plan.device, self.handle.family.latent
        levels = torch.tensor(planned.sigmas, dtype=torch.float32, device=device)
        noise = tokens_latent(planned.job.noise).to(device, torch.float32)
        if beneath is None and planned.job.start is not None:
            beneath = tokens_latent(planned.job.start)
        start = torch.zeros_like(noise)
        if beneath is not None and bool(torch.count_nonzero(beneath)):  # zeros are an empty one
            start = spec.to_network(beneath.to(device)).expand_as(noise)
        if denoise_mask is not None:
            denoise_mask = host.fitted_mask(denoise_mask, noise, device)
        options = {"transformer_options": {"sample_sigmas": levels}}
        samples = sampler.sample(
            self,
            levels,
            {"model_options": options, "seed": seed},
            callback,
            noise,
            start,
            denoise_mask,
            disable_pbar,
        )
        if not isinstance(samples, Tensor) or samples.shape != noise.shape:
            shape = tuple(getattr(samples, "shape", ()))
            raise SettingError(
                f"The SAMPLER gave back a {type(samples).__name__} of shape {shape}.",
                f"a latent of the shape it was given, {tuple(noise.shape)}.",
                _OTHER,
            )
        check_computed(samples)
        return spec.from_network(samples.float())

    def get_models(self) -> list[Any]:
        """The model's patchers, so that ComfyUI keeps them for the prompt."""
        return [self.handle.patcher]

    def __call__(
        self,
        x: Latent,
        sigma: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Latent:
        """Predicts the denoised latent of x (B, C, h, w) at sigma (B,); called by samplers."""
        del seed
        host.stop_if_cancelled()
        options = model_options or {}
        _check_options(options)
        assert self._run is not None  # samplers call it while `sample` runs
        plan, target = self._run.plan, self._run.job.noise
        level = _level(sigma)
        values = pack_latent(x.float(), target.latent)
        passes = plan.passes(values, level)

        def denoised(velocity: Tensor) -> Latent:
            return x - level * unpack_tokens(velocity, target.grid, target.latent)

        result = denoised(plan.combine(*passes))
        functions = options.get("sampler_post_cfg_function", ())
        if not functions:
            return result
        positive, negative = passes
        if negative is None:
            raise SettingError(
                "The sampler asks for the negative pass in a step that has none.",
                "a negative conditioning that is read in every step.",
                f"wire negative to [guider], with cfg above 1, start 0 and end 1; or {_OTHER}",
            )
        for change in functions:
            result = change(
                {
                    "denoised": result,
                    "cond": None,
                    "uncond": None,
                    "cond_scale": self.cfg,
                    "model": self.inner_model,
                    "cond_denoised": denoised(positive),
                    "uncond_denoised": denoised(negative),
                    "sigma": sigma,
                    "model_options": options,
                    "input": x,
                }
            )
        return result


def sample_with(sampler: Any, handle: Handle, job: Job, reference_kv: ReferenceKV) -> Tokens:
    """Samples a job with a native SAMPLER in place of its solver.

    Noise that the sampler itself adds follows from the job's noise, so that it repeats itself.
    """
    guider = Guider(handle, job.conditioning, job.cfg, reference_kv)
    show = host.Progress(job.noise, handle.device)

    def callback(step: int, denoised: Latent, x: Latent, steps: int) -> None:
        del x
        show(step, steps, denoised)

    values = job.noise.values.detach().to("cpu", torch.float32).contiguous()
    digest = sha256(values.numpy().tobytes()).digest()
    seed = int.from_bytes(digest[:7], "big")
    made = guider.run(job, sampler, callback=callback, seed=seed)
    values = pack_latent(host.to_outputs(made), job.noise.latent)
    return replace(job.noise, values=values, is_noise=False)


def _check_sampler(sampler: Any, job: Job) -> None:
    """Refuses what is no SAMPLER, and what one cannot do."""
    if not host.is_sampler(sampler):
        raise SettingError(
            f"A {type(sampler).__name__} is wired where a SAMPLER goes.",
            "one of ComfyUI's samplers.",
            "wire 'KSamplerSelect', or leave [sampler] empty.",
        )
    if job.edits:
        raise SettingError(
            f"The job has {len(job.edits)} edits after its steps.",
            "none: a native SAMPLER takes its steps itself.",
            "choose a [solver], and leave [sampler] empty.",
        )


def _check_latents(noise: Latent, latent_image: Latent, spec: LatentSpec) -> None:
    """Refuses latents that this network cannot make."""
    if getattr(latent_image, "is_nested", False) or getattr(noise, "is_nested", False):
        raise SettingError(
            "The latent is several at once, as videos with sound have them.",
            "the latent of an image.",
            "wire 'Empty Latent Image', or a latent of FLUX's autoencoder.",
        )
    for name, one in (("latent_image", latent_image), ("noise", noise)):
        if one.ndim != 4 or one.shape[1] != spec.channels:
            raise FamilyMismatchError(
                f"The {name} has shape {tuple(one.shape)}.",
                f"(batch, {spec.channels}, height, width) for {spec.name}.",
                "wire a latent of this model's autoencoder, or an empty one: 'EmptySD3LatentImage' "
                "for FLUX.1, 'Empty Flux 2 Latent' for FLUX.2.",
            )
    if noise.shape[1:] != latent_image.shape[1:] or noise.shape[0] not in (1, len(latent_image)):
        raise ShapeError(
            f"The noise has shape {tuple(noise.shape)}, the latent {tuple(latent_image.shape)}.",
            "the same shape, or one noise for all.",
            "wire 'RandomNoise', or another NOISE that fits the latent.",
        )


def _checked_mask(mask: Any, latent: Latent, spec: LatentSpec) -> Tensor:
    """Refuses a mask that ComfyUI would stretch: neither of the latent's size nor the image's."""
    if not isinstance(mask, Tensor) or not mask.numel():
        raise ShapeError(
            f"The noise mask is a {type(mask).__name__} with nothing in it.",
            "a MASK.",
            "wire 'Set Latent Noise Mask'.",
        )
    height, width = latent.shape[-2:]
    sizes = [(height, width), (height * spec.downscale, width * spec.downscale)]
    if getattr(mask, "is_nested", False) or tuple(mask.shape[-2:]) not in sizes:
        found = "x".join(map(str, reversed(mask.shape[-2:])))
        raise ShapeError(
            f"The noise mask is {found}.",
            f"{sizes[1][1]}x{sizes[1][0]}, the size of the image, or {width}x{height}, the "
            "latent's.",
            "fit the image first, and make the mask of the fitted image.",
        )
    check_finite(mask.float(), "noise mask")
    return mask.float()


def _check_options(options: dict[str, Any]) -> None:
    """Refuses what a sampler puts on the model and only ComfyUI's own guiders follow."""
    unknown = [
        name
        for name, value in options.items()
        if name not in _FOLLOWED and (callable(value) or isinstance(value, Tensor) or bool(value))
    ]
    if unknown:
        raise SettingError(
            f"The sampler asks for {', '.join(map(str, unknown[:3]))}.",
            "denoised images, and corrections after CFG.",
            _OTHER,
        )


def _level(sigma: Tensor) -> float:
    """The one noise level of a call."""
    levels = torch.as_tensor(sigma).flatten()
    if bool((levels != levels[0]).any()):
        raise SettingError(
            "The sampler asks for several noise levels at once.",
            "one level for all images of the batch.",
            _OTHER,
        )
    return float(levels[0])
