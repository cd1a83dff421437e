"""The whole Kontext loop, files to pictures, against diffusers' FluxKontextPipeline, fp32, CPU.

Tiny random models are saved as diffusers saves them; everything on our side is ours: loading,
text, encoding, packing, placing, noise, sigmas, guidance, solver, decoding.
"""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PILImage
from torch import Tensor

from glassbox.flux_core.families import FLUX1_KONTEXT, FLUX1_LATENT
from glassbox.flux_core.image.autoencoder import Autoencoder
from glassbox.flux_core.image.pixels import to_image, to_pixels
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.noise import make_noise
from glassbox.flux_core.sampling.run import finish, run
from glassbox.flux_core.sampling.sigmas import flux_sigmas
from glassbox.flux_core.text.encoders import TextEncoders
from glassbox.flux_core.tokens.pack import latent_tokens, tokens_latent
from glassbox.flux_core.tokens.references import place_references
from glassbox.flux_core.transformer.flux import Flux
from glassbox.flux_core.values import Conditioning, Reference
from glassbox.flux_core.weights.load import load_autoencoder, load_flux
from glassbox.flux_core.weights.load_text import load_text_encoders
from glassbox.tests.parity import text_samples as samples

TOLERANCE = 1e-5
STEPS, GUIDANCE, SEED = 4, 2.5, 11
PROMPT, OTHER = "make the circle red", "remove the blue square and the star"
NEGATIVE, OTHER_NEGATIVE = "a plain yellow photo", "background"


@dataclass(frozen=True)
class Both:
    """The same weights twice."""

    published: diffusers.FluxKontextPipeline
    network: Flux
    autoencoder: Autoencoder
    encoders: TextEncoders


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("kontext")
    transformer, vae = tiny_transformer(), tiny_vae()
    clip_files = samples.write_clip_tokenizer(folder / "clip_tokenizer")
    t5_files = samples.write_t5_tokenizer(folder / "t5_tokenizer")
    clip, t5 = samples.tiny_clip(clip_files), samples.tiny_t5()
    for name, part in (("kontext", transformer), ("vae", vae), ("clip", clip), ("t5", t5)):
        part.save_pretrained(folder / name)
    return Both(
        published=published_pipeline(transformer, vae, clip, t5, clip_files, t5_files),
        network=load_flux(folder / "kontext", family=FLUX1_KONTEXT)[0],
        autoencoder=load_autoencoder(folder / "vae")[0],
        encoders=load_text_encoders(
            [folder / "clip", folder / "t5"], clip_tokenizer=clip_files, t5_tokenizer=t5_files
        ),
    )


def tiny_transformer() -> diffusers.FluxTransformer2DModel:
    return samples.perturb(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=128,
            num_attention_heads=2,
            joint_attention_dim=samples.T5_WIDTH,
            pooled_projection_dim=samples.CLIP_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        seed=3,
    )


def tiny_vae() -> diffusers.AutoencoderKL:
    return samples.perturb(
        lambda: diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 64, 128, 128),
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=FLUX1_LATENT.shift,
            scaling_factor=FLUX1_LATENT.scale,
        ),
        seed=4,
    )


def published_pipeline(
    transformer, vae, clip, t5, clip_files: Path, t5_files: Path
) -> diffusers.FluxKontextPipeline:
    pipeline = diffusers.FluxKontextPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=vae,
        text_encoder=clip,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(clip_files), model_max_length=77),
        text_encoder_2=t5,
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(str(t5_files.parent)),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(width: int, height: int) -> PILImage.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(values)


@dataclass(frozen=True)
class Case:
    width: int
    height: int
    reference: tuple[int, int] | None = None  # width, height
    prompt_2: str = ""
    cfg: float = 1.0
    negative_2: str = ""
    batch: int = 1


def run_published(both: Both, case: Case) -> tuple[Tensor, Tensor]:
    """Returns the last latent tokens, and the pictures (B, H, W, 3).

    Only what the pipeline would otherwise change by itself (sizes) is switched off.
    """
    seen: list[Tensor] = []

    def remember(pipeline, step: int, timestep: Tensor, values: dict[str, Tensor]):
        seen.append(values["latents"])
        return values

    pictures = both.published(
        image=picture(*case.reference) if case.reference else None,
        prompt=PROMPT,
        prompt_2=case.prompt_2 or None,
        negative_prompt=NEGATIVE if case.cfg > 1 else None,
        negative_prompt_2=case.negative_2 or None,
        true_cfg_scale=case.cfg,
        width=case.width,
        height=case.height,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        num_images_per_prompt=case.batch,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
        callback_on_step_end=remember,
        max_area=case.width * case.height,
        _auto_resize=False,
    ).images
    assert len(seen) == STEPS
    return seen[-1], pictures.permute(0, 2, 3, 1)


@torch.no_grad()
def run_ours(both: Both, case: Case, passes: str = "batched") -> tuple[Tensor, Tensor]:
    """Returns the last latent tokens in the transformer's scale, and the pictures."""
    family = both.network.family
    references = ()
    if case.reference:
        image = torch.from_numpy(np.array(picture(*case.reference)))[None].float() / 255
        latent = both.autoencoder.encode(to_pixels(image))
        (placed,) = place_references([latent_tokens(latent, family.latent)], "single")
        references = (Reference(tokens=placed),)

    def condition(prompt: str, prompt_2: str) -> Conditioning:
        text = both.encoders.encode(prompt, prompt_2)
        return Conditioning(text=text, references=references, guidance=GUIDANCE)

    cfg = None
    if case.cfg > 1:
        negative = condition(NEGATIVE, case.negative_2)
        cfg = TrueCFG(negative=negative, scale=case.cfg, passes=passes)
    noise = make_noise(family.latent, case.height, case.width, SEED, case.batch)
    sigmas = flux_sigmas(family.schedule, noise.ids.shape[0], STEPS)
    positive = condition(PROMPT, case.prompt_2)
    *_, last = run(both.network, Job(conditioning=positive, noise=noise, sigmas=sigmas, cfg=cfg))
    return last.x, to_image(both.autoencoder.decode(tokens_latent(finish(last.x, noise))))


CASES = {
    "text to image": Case(64, 64),
    "edit": Case(64, 96, reference=(96, 64)),
    "edit with prompt_2": Case(80, 64, reference=(64, 64), prompt_2=OTHER),
    "true cfg": Case(64, 64, reference=(48, 80), cfg=4.0),
    "true cfg with both second prompts": Case(
        96, 48, reference=(64, 64), prompt_2=OTHER, cfg=3.5, negative_2=OTHER_NEGATIVE
    ),
    "true cfg without a reference": Case(64, 48, cfg=2.0, negative_2=OTHER_NEGATIVE),
    "two at once": Case(64, 64, reference=(64, 48), cfg=2.0, batch=2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_whole_loop_equals_the_published_pipeline(both: Both, name: str) -> None:
    case = CASES[name]
    latents, pictures = run_published(both, case)
    assert latents.std() > 0.1  # the comparison is not one of zeros
    assert pictures.std() > 0.01
    for passes in ("batched", "in turn") if case.cfg > 1 else ("in turn",):
        our_latents, our_pictures = run_ours(both, case, passes)
        torch.testing.assert_close(our_latents, latents, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(our_pictures, pictures, atol=TOLERANCE, rtol=0)


def test_every_part_of_the_job_changes_the_result(both: Both) -> None:
    """Otherwise the comparison above would pass with a part left out on both sides."""
    whole = Case(64, 64, reference=(64, 64), prompt_2=OTHER, cfg=3.5, negative_2=OTHER_NEGATIVE)
    base, _ = run_ours(both, whole)
    less = {
        "reference": Case(64, 64, prompt_2=OTHER, cfg=3.5, negative_2=OTHER_NEGATIVE),
        "prompt_2": Case(64, 64, reference=(64, 64), cfg=3.5, negative_2=OTHER_NEGATIVE),
        "negative": Case(64, 64, reference=(64, 64), prompt_2=OTHER),
        "negative_2": Case(64, 64, reference=(64, 64), prompt_2=OTHER, cfg=3.5),
    }
    for part, case in less.items():
        difference = float((run_ours(both, case)[0] - base).abs().max())
        assert difference > 100 * TOLERANCE, part
