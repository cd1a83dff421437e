"""Measures how well a nano model edits: `python tools/run.py nano.evaluate --model klein`.

Prints the share of held-out scenes that strictly succeed, as a Markdown table.
"""

import argparse
import logging
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...flux_core.families import NANO_KLEIN, NANO_KONTEXT
from ...flux_core.image.autoencoder import Autoencoder
from ...flux_core.image.pixels import to_image, to_pixels
from ...flux_core.nano import paths
from ...flux_core.sampling.job import Job
from ...flux_core.sampling.noise import make_noise
from ...flux_core.sampling.run import finish, run
from ...flux_core.sampling.sigmas import flux_sigmas
from ...flux_core.specs import FluxFamily
from ...flux_core.text.encoders import PromptEncoder
from ...flux_core.tokens.pack import latent_tokens, tokens_latent
from ...flux_core.tokens.references import place_references
from ...flux_core.transformer.flux import Flux
from ...flux_core.values import Conditioning, Reference, TextFeatures
from ...flux_core.weights.load import load_autoencoder, load_flux
from ...flux_core.weights.load_text import load_text_encoders
from .drawing import Floats, draw, draw_pillow
from .judge import judge
from .world import EDITS, SAMPLED, SIDE_PX, Action, Edit, random_edit

logger = logging.getLogger(__name__)
Draw = Callable[..., Floats]
_BATCH = 20


@dataclass(frozen=True, slots=True)
class NanoModel:
    """An embedded model, loaded."""

    network: Flux
    encoders: PromptEncoder
    autoencoder: Autoencoder


def load_nano(family: FluxFamily = NANO_KONTEXT, folder: Path = paths.FOLDER) -> NanoModel:
    """Loads an embedded model in float32.

    Args:
        family: of the model.
        folder: of the embedded files, or of another training's.
    """
    files = paths.FILES[family.name]

    def inside(path: Path) -> Path:
        return folder / path.relative_to(paths.FOLDER)

    network, _ = load_flux(inside(files.transformer), dtype=torch.float32)
    autoencoder, _ = load_autoencoder(inside(files.autoencoder), dtype=torch.float32)
    encoders = load_text_encoders(
        [inside(path) for path in files.text_encoders],
        clip_tokenizer=paths.CLIP_TOKENIZER,
        t5_tokenizer=paths.T5_TOKENIZER,
        qwen_tokenizer=paths.QWEN_TOKENIZER,
        text=family.text,
        dtype=torch.float32,
    )
    return NanoModel(network, encoders, autoencoder)


@torch.no_grad()
def run_edits(
    model: NanoModel, images: Sequence[Tensor], prompts: Sequence[str], *, seed: int, steps: int
) -> Tensor:
    """Edits a batch of images, one prompt each.

    Args:
        model: the embedded one.
        images: the references, each (B, H, W, 3) in 0..1: the first of all edits, then the
            second; without any, images are made from text alone.
        prompts: B instructions.
        seed: of the noise.
        steps: Euler steps.

    Returns:
        (B, SIDE_PX, SIDE_PX, 3) in 0..1.
    """
    family = model.network.family
    features = [model.encoders.encode(prompt) for prompt in prompts]
    pooled = [one.pooled for one in features if one.pooled is not None]
    text = TextFeatures(
        txt=torch.cat([one.txt for one in features]),
        pooled=torch.cat(pooled) if pooled else None,
    )
    latents = [model.autoencoder.encode(to_pixels(one)) for one in images]
    seen = [latent_tokens(latent, family.latent) for latent in latents]
    references = place_references(seen, "auto")
    noise = make_noise(family.latent, SIDE_PX, SIDE_PX, seed, len(prompts))
    sigmas = flux_sigmas(family.schedule, noise.values.shape[1], steps)
    wanted = Conditioning(
        text=text,
        references=tuple(Reference(tokens=one) for one in references),
        guidance=family.default_guidance,
    )
    x = noise.values
    for step in run(model.network, Job(conditioning=wanted, noise=noise, sigmas=sigmas)):
        x = step.x
    return to_image(model.autoencoder.decode(tokens_latent(finish(x, noise))))


def draw_edits(
    action: Action, shapes: int, count: int, seed: int, *, sampled: bool = False
) -> list[Edit]:
    """Returns random held-out edits of one kind; each changes the image."""
    rng = random.Random(f"{action} {shapes} {seed}")
    edits = [random_edit(action, shapes, rng, held_out=True, sampled=sampled) for _ in range(count)]
    for edit in edits:
        if edit.before is not None and np.abs(draw(edit.after) - draw(edit.before)).max() < 0.1:
            raise ValueError(f"'{edit.text}' changes nothing")
    return edits


def success(
    model: NanoModel, edits: Sequence[Edit], *, renderer: Draw = draw, shuffled: bool = False
) -> float:
    """Returns the share of edits that strictly succeed.

    Args:
        model: the embedded one.
        edits: of one kind.
        renderer: draws the scene to edit.
        shuffled: whether each scene gets the instruction of another; it is judged by its own.
    """
    prompts = [edit.text for edit in edits]
    if shuffled:
        prompts = [*prompts[1:], *prompts[:1]]
    right, steps = 0, model.network.family.default_steps
    for start in range(0, len(edits), _BATCH):
        part = edits[start : start + _BATCH]
        before = [edit.before for edit in part if edit.before is not None]
        samples = [edit.sample for edit in part if edit.sample is not None]
        references = [
            torch.from_numpy(np.stack([renderer(scene) for scene in scenes]))
            for scenes in (before, samples)
            if scenes
        ]
        results = run_edits(
            model, references, prompts[start : start + _BATCH], seed=start, steps=steps
        )
        for row, edit in enumerate(part):
            right += judge(results[row].numpy(), edit.after, edit.before).is_success
    return right / len(edits)


@torch.no_grad()
def autoencoder_db(model: NanoModel, edits: Sequence[Edit], renderer: Draw) -> float:
    """Returns the autoencoder's mean peak signal-to-noise ratio on the edits' scenes, in dB."""
    levels: list[float] = []
    for start in range(0, len(edits), _BATCH):
        drawn = np.stack([renderer(edit.after) for edit in edits[start : start + _BATCH]])
        image = torch.from_numpy(drawn)
        again = to_image(model.autoencoder.decode(model.autoencoder.encode(to_pixels(image))))
        error = (again - image).square().mean(dim=(1, 2, 3))
        levels += (-10.0 * torch.log10(error + 1e-12)).tolist()
    return sum(levels) / len(levels)


def table(family: FluxFamily, folder: Path, count: int, seed: int, processes: int) -> list[str]:
    """Measures everything and returns the lines of a Markdown table.

    Args:
        family: of the model.
        folder: of its files.
        count: scenes of each kind.
        seed: of the scenes and the noise.
        processes: number of processes, of one thread each.
    """
    lines = [
        f"| strict success, {count} held-out scenes each, {family.default_steps} steps "
        "| 1 shape | 2 shapes | 1, Pillow | 2, Pillow | shuffled, 1 | shuffled, 2 |",
        "|---|---|---|---|---|---|---|",
    ]
    with ProcessPoolExecutor(processes, get_context("spawn"), _one_thread) as pool:
        jobs = [pool.submit(_row, family, folder, one, False, count, seed) for one in EDITS]
        if family.references.trained > 1:
            jobs += [pool.submit(_row, family, folder, one, True, count, seed) for one in SAMPLED]
        rest = pool.submit(_rest, family, folder, count, seed)
        for job in jobs:
            lines.append(job.result())
            logger.info(lines[-1])
        return [*lines, "", *rest.result()]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _row(
    family: FluxFamily, folder: Path, action: Action, sampled: bool, count: int, seed: int
) -> str:
    model = load_nano(family, folder)
    both = [draw_edits(action, shapes, count, seed, sampled=sampled) for shapes in (1, 2)]
    cells = [success(model, edits) for edits in both]
    cells += [success(model, edits, renderer=draw_pillow) for edits in both]
    cells += [success(model, edits, shuffled=True) for edits in both]
    name = f"{action}, from image 2" if sampled else action
    return f"| {name} | " + " | ".join(f"{cell:.0%}" for cell in cells) + " |"


def _rest(family: FluxFamily, folder: Path, count: int, seed: int) -> list[str]:
    """Measures text-to-image and the autoencoder."""
    model = load_nano(family, folder)
    scenes = draw_edits("recolour", 2, count, seed + 1)
    captions = draw_edits("caption", 1, count, seed)
    lines = [f"text-to-image: {success(model, captions):.0%} of {count} captions"]
    for name, renderer in (("own renderer", draw), ("Pillow", draw_pillow)):
        lines.append(f"autoencoder, {name}: {autoencoder_db(model, scenes, renderer):.1f} dB")
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    models = {"kontext": NANO_KONTEXT, "klein": NANO_KLEIN}
    parser.add_argument("--model", choices=list(models), default="kontext")
    parser.add_argument("--count", type=int, default=100, help="scenes of each kind")
    parser.add_argument("--seed", type=int, default=2026, help="of the held-out scenes")
    parser.add_argument("--folder", type=Path, default=paths.FOLDER, help="of the model's files")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = table(
        models[options.model], options.folder, options.count, options.seed, options.processes
    )
    print("\n".join(lines))
