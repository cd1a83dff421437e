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
from ..transformer.plan import Plan
from ..transformer.rope import rope_table
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
    weight: Tensor  # (B, N), of each target token in the loss


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
        generator: of noise and sigmas.

    Returns:
        a float32 scalar; x = (1 - sigma) x0 + sigma noise, and the velocity is noise - x0.
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
    """Returns the network's velocity as a function of x and sigma, for `flow_loss`.

    Args:
        network: with gradients.
        batch: text and references.
        grid: rows and columns of the target's tokens, and of every reference's.
        latent: its patch and position ids.
        guidance: for a network that has the input.
    """
    ids = [text_ids(batch.txt.shape[1], latent), image_ids(grid, latent)]
    for number in range(len(batch.references)):
        index = latent.first_index + number * latent.index_step
        ids.append(image_ids(grid, latent, index=index))
    references = torch.cat(batch.references, dim=1) if batch.references else None
    rope = rope_table(torch.cat(ids), network.spec.axes_dim, network.spec.theta)

    def predict(x: TokenValues, sigma: Tensor) -> TokenValues:
        blocks = network.blocks
        scale = torch.full_like(sigma, guidance)
        plan = Plan(
            blocks=blocks,
            txt=blocks.txt_in(batch.txt),
            references=None if references is None else blocks.img_in(references),
            rope=rope,
            modulations=[network.modulation(sigma, batch.pooled, scale, batch.txt.dtype)],
        )
        return plan.velocity(x, 0)

    return predict
