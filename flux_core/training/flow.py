"""The flow-matching loss of FLUX, which every training in this project minimises.

Source: Lipman et al. 2023, "Flow Matching"; black-forest-labs/flux@802fb47 src/flux/sampling.py
denoise, whose Euler steps integrate the velocity that is learned here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..specs import LatentSpec
from ..tokens.ids import image_ids, text_ids
from ..transformer.flux import Flux
from ..types import TokenValues

Density = Callable[[int, torch.Generator], Tensor]


def logit_normal(mean: float, spread: float) -> Density:
    """Returns the density of sigmoid(N(mean, spread)); a mean above 0 favours noisy sigmas.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers".
    """

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(mean + spread * torch.randn(count, generator=generator))

    return draw


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowBatch:
    """Clean tokens in the transformer's scale, and their conditioning."""

    target: TokenValues  # (B, N, D)
    references: tuple[TokenValues, ...]  # each (B, N, D), on the target's grid
    txt: Tensor  # (B, T, E)
    pooled: Tensor | None  # (B, P)
    weight: Tensor  # (B, N), each target token's weight in the loss


def flow_loss(
    predict: Callable[[TokenValues, Tensor], TokenValues],
    batch: FlowBatch,
    density: Density,
    generator: torch.Generator,
) -> Tensor:
    """Returns the mean squared error of the velocity over the target's tokens.

    Args:
        predict: maps x (B, N, D) and sigma (B,) to the velocity of the target, (B, N, D); it adds
            the references, which are never noised.
        batch: target and token weights.
        density: of the sigmas, in 0..1.
        generator: draws noise and sigmas.

    Returns:
        A float32 scalar; x = (1 - sigma) x0 + sigma noise, and the velocity is noise - x0.
    """
    clean = batch.target.float()
    sigma = density(clean.shape[0], generator)
    noise = torch.randn(clean.shape, generator=generator)
    x = torch.lerp(clean, noise, sigma[:, None, None])
    error = predict(x, sigma).float() - (noise - clean)
    weight = batch.weight / batch.weight.mean()
    return (error.square().mean(dim=-1) * weight).mean()


def predictor(
    network: Flux,
    batch: FlowBatch,
    *,
    grid: tuple[int, int],
    latent: LatentSpec,
    guidance: float,
) -> Callable[[TokenValues, Tensor], TokenValues]:
    """Returns the network's velocity as a function of x and sigma; all images share a grid."""
    count = len(batch.references)
    positions = [image_ids(grid, latent)] + [
        image_ids(grid, latent, index=latent.first_index + number * latent.index_step)
        for number in range(count)
    ]
    img_ids, txt_ids = torch.cat(positions), text_ids(batch.txt.shape[1], latent)

    def predict(x: TokenValues, sigma: Tensor) -> TokenValues:
        img = torch.cat((x, *batch.references), dim=1)
        strength = torch.full_like(sigma, guidance)
        velocity = network(img, img_ids, batch.txt, txt_ids, sigma, batch.pooled, strength)
        return velocity[:, : x.shape[1]]

    return predict
