"""Training of the nano autoencoder on drawn scenes."""

import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from ...flux_core.image.autoencoder import Autoencoder
from ...flux_core.specs import AutoencoderSpec, LatentSpec
from ...flux_core.training.optim import Clock, MatrixMuon, MovingAverage, learning_rate, set_rates
from .drawing import draw
from .ranks import Rank, average_gradients, gather_updates, share_from_lead
from .world import COLOURS, Scene, random_scene

logger = logging.getLogger(__name__)
LATENT_NOISE = 0.06  # deviation of the posterior, where the latent has unit variance
SHARPNESS = (0.75, 1.6)


def random_images(rng: random.Random, count: int) -> Tensor:
    """Returns random images, (count, 3, SIDE_PX, SIDE_PX) in -1..1, of varied sharpness."""
    images: list[np.ndarray] = []
    while len(images) < count:
        shapes = rng.choices((0, 1, 2), (1, 4, 10))[0]
        scene = Scene(background=rng.choice(list(COLOURS)))
        if shapes:
            scene = random_scene(rng, shapes, at_places=rng.random() < 0.3)
        if not scene.is_held_out:
            images.append(draw(scene, sharpness=rng.uniform(*SHARPNESS)))
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (stack * 2.0 - 1.0).contiguous()


def autoencoder_loss(model: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of a reconstruction from a noisy latent, which pulls it to unit variance.

    Returns:
        the loss, and the mean squared error of images in 0..1, detached.
    """
    latent = model.spec.latent
    mean, logvar = (part.float() for part in model.moments(pixels))
    noisy = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * torch.randn_like(mean)
    error = model.decoder(noisy).float() - pixels
    unit = latent.scale * (mean - latent.shift)
    variance, average = torch.var_mean(unit, dim=(0, 2, 3))
    size = average.square().mean() + (variance - 1.0).square().mean()
    spread = (logvar - 2.0 * math.log(LATENT_NOISE / latent.scale)).square().mean()
    squared = error.square().mean()
    loss = error.abs().mean() + 4.0 * squared + 0.02 * size + 0.02 * spread
    return loss, squared.detach() / 4.0


def train_autoencoder(
    rank: Rank, spec: AutoencoderSpec, out: Path, *, seed: int, budget_s: float, batch: int = 8
) -> None:
    """Trains an autoencoder from a seed, and scales its latent to unit variance.

    Args:
        rank: this process.
        spec: its shape.
        out: file for its weights, in the published layout.
        seed: of weights and scenes.
        budget_s: seconds.
        batch: images per step and process.
    """
    torch.manual_seed(seed)
    model = Autoencoder(spec)
    weights = list(model.parameters())
    rng = _train(rank, model, weights, autoencoder_loss, seed, budget_s, batch)
    if rank.leads:
        normalise_latent(model.eval(), random_images(rng, 256))
        save_file(model.state_dict(), out)


def decoder_loss(model: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of a reconstruction, with gradients for the decoder alone, and its error."""
    with torch.no_grad():
        latent = model.encode(pixels).float()
    latent += 0.5 * LATENT_NOISE / model.spec.latent.scale * torch.randn_like(latent)
    squared = (model.decode(latent).float() - pixels).square()
    # the mean of logarithms, because dB are averaged over images
    each = squared.mean(dim=(1, 2, 3))
    return torch.log(each + 1e-5).mean(), each.detach().mean() / 4.0


def polish_decoder(
    rank: Rank, model: Autoencoder, out: Path, *, seed: int, budget_s: float, batch: int = 8
) -> None:
    """Continues to train the decoder; the encoder, and so the latent, is frozen."""
    weights = list(model.decoder.requires_grad_(True).parameters())
    _train(rank, model, weights, decoder_loss, seed + 1, budget_s, batch, 0.4)
    if rank.leads:
        save_file(model.state_dict(), out)


def _train(
    rank: Rank,
    model: Autoencoder,
    weights: list[nn.Parameter],
    measure: Callable[[Autoencoder, Tensor], tuple[Tensor, Tensor]],
    seed: int,
    budget_s: float,
    batch: int,
    pace: float = 1.0,
) -> random.Random:
    """Minimises a loss over random images; the model has the averaged weights afterwards."""
    rng = random.Random(seed * 1000 + rank.index)
    torch.manual_seed(seed * 1000 + rank.index)
    matrices = [weight for weight in weights if weight.ndim > 1]
    muon = MatrixMuon(matrices, 0.01 * pace, owner=rank.index, owners=rank.count)
    vectors = [weight for weight in weights if weight.ndim == 1]
    adam = torch.optim.AdamW(vectors, lr=2e-3 * pace, weight_decay=0.0)
    average = MovingAverage([model], 0.995)
    clock, step, progress = Clock(budget_s), 0, 0.0
    while progress < 1.0:
        (progress,) = share_from_lead([clock.progress], rank)
        set_rates([muon.optimizer, adam], learning_rate(progress, warmup=0.03, flat=0.3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, error = measure(model, random_images(rng, batch))
        model.zero_grad()
        loss.backward()
        average_gradients(weights, rank)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        muon.step()
        adam.step()
        gather_updates(muon.shares, rank)
        average.update()
        step += 1
        if step % 50 == 0 and rank.leads:
            psnr = -10.0 * math.log10(max(float(error), 1e-12))
            logger.info("autoencoder step %d, %.0f s: %.1f dB", step, clock.elapsed_s, psnr)
    average.swap()
    return rng


@torch.no_grad()
def normalise_latent(model: Autoencoder, pixels: Tensor) -> None:
    """Shifts and scales the latent to zero mean and unit variance."""
    if model.bn is None:
        _scale_convolutions(model, pixels)
        return
    model.bn.running_mean.zero_()
    model.bn.running_var.fill_(1.0 - model.bn.EPS)
    latents = torch.cat([model.encode(part) for part in cast("Sequence[Tensor]", pixels.split(32))])
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    model.bn.running_mean.copy_(mean)
    model.bn.running_var.copy_(variance)
    model.bn.num_batches_tracked.fill_(len(pixels))


def _scale_convolutions(model: Autoencoder, pixels: Tensor) -> None:
    """Moves the latent's mean and deviation into the convolutions before and after it.

    Afterwards scale * (latent - shift), the transformer's input, has zero mean and unit variance.
    The decoder pads with zeros, not the moved mean, so pixels near the border change slightly.
    """
    latent: LatentSpec = model.spec.latent
    parts = cast("Sequence[Tensor]", pixels.split(32))
    means = torch.cat([model.encode(part) for part in parts])
    unit = latent.scale * (means - latent.shift)
    spread, middle = float(unit.std()), float(unit.mean())
    out, into, channels = model.encoder.conv_out, model.decoder.conv_in, latent.channels
    weight, bias = _weights(out)
    weight[:channels] /= spread
    bias[:channels] = (
        bias[:channels] - latent.shift - middle / latent.scale
    ) / spread + latent.shift
    bias[channels:] -= 2.0 * math.log(spread)
    weight, bias = _weights(into)
    moved = latent.shift + middle / latent.scale - spread * latent.shift
    bias += moved * weight.sum(dim=(1, 2, 3))
    weight *= spread
    logger.info("latent had mean %.3f and deviation %.3f", middle, spread)


def _weights(layer: torch.nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return weight, bias
