"""References of which some tokens were dropped: as if nobody could see these tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.families import FLUX1_KONTEXT, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B_KV
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.run import run
from glassbox.flux_core.sampling.sigmas import parse_sigmas
from glassbox.flux_core.specs import FluxFamily
from glassbox.flux_core.tokens.ids import drop_tokens, place
from glassbox.flux_core.transformer.attention import PyTorchAttention, Where
from glassbox.flux_core.transformer.flux import Flux
from glassbox.flux_core.values import Conditioning, Tokens
from glassbox.tests.core import tiny_flux1, tiny_flux2

SIGMAS = parse_sigmas("1, 0.7, 0.2, 0")
TOLERANCE = 1e-5
FAMILIES = [FLUX1_KONTEXT, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B_KV]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=[one.name for one in FAMILIES])


class Hiding:
    """Attention in which nobody sees some tokens of all references, in their order."""

    name = "hiding"

    def __init__(self, present: Tensor) -> None:
        self.present = present
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        self.calls += 1
        seen = torch.ones(k.shape[1], dtype=torch.bool)
        seen[where.keys.range_of("reference")] = self.present
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> None:
        return None


def network(family: FluxFamily) -> Flux:
    return tiny_flux1.network() if family is FLUX1_KONTEXT else tiny_flux2.network(family)


def references(family: FluxFamily, batch: int = 1) -> tuple[Tokens, ...]:
    if family is FLUX1_KONTEXT:
        pictures = [tiny_flux1.picture(seed, size=48, batch=batch) for seed in (1, 2)]
        return pictures[0], place(pictures[1], index=2.0)
    return tiny_flux2.pictures(1, 2, batch=batch)


def conditioning(family: FluxFamily, seed: int, seen: tuple[Tokens, ...]) -> Conditioning:
    if family is FLUX1_KONTEXT:
        return tiny_flux1.conditioning(seed, *seen)
    return tiny_flux2.conditioning(seed, seen)


def noise(family: FluxFamily, batch: int = 1) -> Tokens:
    made = tiny_flux1.noise if family is FLUX1_KONTEXT else tiny_flux2.noise
    return made(5, batch=batch)


def stays(whole: tuple[Tokens, ...]) -> list[Tensor]:
    """Which tokens of each reference stay: two of three, and two of five."""
    cells = [torch.arange(one.count) for one in whole]
    return [cells[0] % 3 != 1, cells[1] % 5 < 2]


def last(net: Flux, one: Conditioning, target: Tokens, **settings) -> Tensor:
    *_, step = run(net, Job(conditioning=one, noise=target, sigmas=SIGMAS, **settings))
    return step.x


@every_family
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_dropped_tokens_equal_tokens_that_nobody_sees(family, batch: int, solver: str) -> None:
    whole, target, net = references(family, batch), noise(family, batch), network(family)
    present = stays(whole)
    part = tuple(map(drop_tokens, whole, present))
    assert all(0 < one.count < other.count for one, other in zip(part, whole, strict=True))
    dropped = last(net, conditioning(family, 1, part), target, solver=solver)
    full = last(net, conditioning(family, 1, whole), target, solver=solver)
    net.attention = hiding = Hiding(torch.cat(present))
    hidden = last(net, conditioning(family, 1, whole), target, solver=solver)
    assert hiding.calls > 0
    torch.testing.assert_close(dropped, hidden, atol=TOLERANCE, rtol=0)
    assert float((dropped - full).abs().max()) > 100 * TOLERANCE, "what was dropped matters here"
    hiding.present = torch.ones_like(hiding.present)
    unhidden = last(net, conditioning(family, 1, whole), target, solver=solver)
    torch.testing.assert_close(unhidden, full, atol=TOLERANCE, rtol=0)


@every_family
@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_they_are_dropped_from_both_passes(family, passes: str) -> None:
    whole, target, net = references(family), noise(family), network(family)
    present = stays(whole)
    results = []
    for seen in (tuple(map(drop_tokens, whole, present)), whole):
        positive, negative = (conditioning(family, seed, seen) for seed in (1, 2))
        cfg = TrueCFG(negative=negative, scale=3.0, passes=passes)
        results.append(last(net, positive, target, cfg=cfg))
        net.attention = Hiding(torch.cat(present))
    torch.testing.assert_close(*results, atol=TOLERANCE, rtol=0)
    bare = TrueCFG(negative=conditioning(family, 2, whole[:1]), scale=3.0, passes="in turn")
    net.attention = PyTorchAttention()
    other = last(net, conditioning(family, 1, whole), target, cfg=bare)
    assert float((results[0] - other).abs().max()) > 100 * TOLERANCE


@every_family
def test_the_order_of_the_tokens_that_stay_is_that_of_their_ids(family) -> None:
    """Attention has no order of its own: ids that travel with their values are all it takes."""
    whole, target, net = references(family), noise(family), network(family)
    part = drop_tokens(whole[0], stays(whole)[0])
    found = last(net, conditioning(family, 1, (part,)), target)
    turned = replace(part, values=part.values.flip(1), ids=part.ids.flip(0))
    torch.testing.assert_close(
        last(net, conditioning(family, 1, (turned,)), target), found, atol=TOLERANCE, rtol=0
    )
    torn = replace(part, values=part.values.flip(1))
    assert float((last(net, conditioning(family, 1, (torn,)), target) - found).abs().max()) > 1e-3
