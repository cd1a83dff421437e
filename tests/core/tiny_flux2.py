"""A tiny FLUX.2 network with random weights, and what it is fed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from glassbox.flux_core.families import FLUX2_KLEIN_9B, FLUX2_LATENT
from glassbox.flux_core.sampling.noise import make_noise
from glassbox.flux_core.specs import FluxFamily
from glassbox.flux_core.tokens.references import place_references
from glassbox.flux_core.transformer.flux import Flux, build_flux
from glassbox.flux_core.transformer.references import KeyValue, ReferencePass
from glassbox.flux_core.values import Conditioning, Reference, TextFeatures, Tokens

CONTEXT = 24
SPEC = replace(
    FLUX2_KLEIN_9B.transformer,
    hidden=32,
    double_blocks=2,
    single_blocks=3,
    context_width=CONTEXT,
    axes_dim=(4, 4, 4, 4),
)


def network(family: FluxFamily, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Flux:
    """Build it at its family's kind: with a guidance input or without."""
    torch.manual_seed(seed)
    spec = replace(SPEC, has_guidance=family.transformer.has_guidance)
    net = build_flux(family, spec, dtype=torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.to(dtype).eval()


def noise(seed: int = 0, *, width: int = 48, height: int = 64, batch: int = 1) -> Tokens:
    return make_noise(FLUX2_LATENT, height, width, seed, batch)


def pictures(*seeds: int, batch: int = 1) -> tuple[Tokens, ...]:
    """References of different sizes at the position ids FLUX.2 was trained with."""
    drawn = [
        replace(noise(seed, width=32 + 16 * (seed % 3), height=48, batch=batch), is_noise=False)
        for seed in seeds
    ]
    return place_references(drawn, "index")


def conditioning(
    seed: int,
    references: Sequence[Tokens] = (),
    *,
    batch: int = 1,
    length: int = 6,
    guidance: float | None = None,
) -> Conditioning:
    draw = torch.Generator().manual_seed(seed)
    txt = torch.randn(batch, length, CONTEXT, generator=draw)
    text = TextFeatures(txt=txt, pooled=None)
    seen = tuple(Reference(tokens=tokens) for tokens in references)
    return Conditioning(text=text, references=seen, guidance=guidance)


def compute_every_step(
    references: tuple[Tokens, ...], computed: ReferencePass
) -> Iterable[KeyValue]:
    """The plain rule that a cache is compared with: references are computed anew in every step."""
    return computed
