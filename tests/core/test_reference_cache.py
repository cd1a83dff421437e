"""Isolated references: computed once, cached for other runs, and exactly the same.

What the published mask asks for is written out in `masked_flux2` with plain masked attention.
"""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.families import FLUX2_KLEIN_9B, FLUX2_KLEIN_9B_KV
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.run import run as run_job
from glassbox.flux_core.sampling.sigmas import flux_sigmas
from glassbox.flux_core.transformer.flux import Flux, cache_for_the_run
from glassbox.flux_core.values import Conditioning, Tokens
from glassbox.tests.core import tiny_flux2 as tiny
from glassbox.tests.core.masked_flux2 import masked_velocity

TOLERANCE = 1e-6
FAMILY = FLUX2_KLEIN_9B_KV
CACHED_TENSORS = 2 * (tiny.SPEC.double_blocks + tiny.SPEC.single_blocks)


@pytest.fixture
def network() -> Flux:
    return tiny.network(FAMILY)


def run(network: Flux, one: Conditioning, noise: Tokens, **settings) -> Tensor:
    sigmas = flux_sigmas(FAMILY.schedule, noise.ids.shape[0], 3)
    *_, last = run_job(network, Job(conditioning=one, noise=noise, sigmas=sigmas, **settings))
    return last.x


class Store:
    """Caches what it is given, as nodes do between runs; it counts what it had to compute."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, ...], tuple] = {}
        self.computed = 0

    def __call__(self, references: tuple[Tokens, ...], computed: Iterable) -> Iterable:
        key = tuple(id(tokens.values) for tokens in references)
        if key not in self.held:
            self.held[key] = tuple(computed)
            self.computed += 1
        return self.held[key]

    def tensors(self) -> list[Tensor]:
        return [tensor for one in self.held.values() for kv in one for tensor in (kv.key, kv.value)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cached_equals_computed_in_every_step_bit_for_bit(dtype, solver: str) -> None:
    network = tiny.network(FAMILY, dtype=dtype)
    one = tiny.conditioning(1, tiny.pictures(1, 2))
    results = []
    for network.reference_cache in (cache_for_the_run, tiny.compute_every_step, Store()):
        results.append(run(network, one, tiny.noise(), solver=solver))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_cached_does_not_depend_on_prompt_seed_size_or_steps(dtype) -> None:
    network, references = tiny.network(FAMILY, dtype=dtype), tiny.pictures(1, 2)
    runs = [
        (tiny.conditioning(1, references), tiny.noise(0)),
        (tiny.conditioning(2, references, length=11), tiny.noise(0)),
        (tiny.conditioning(1, references), tiny.noise(5)),
        (tiny.conditioning(1, references), tiny.noise(0, width=96, height=32)),
        (tiny.conditioning(3, references, length=9), tiny.noise(6, width=32, batch=2)),
    ]
    first, cached = Store(), []
    for one, noise in runs:
        network.reference_cache = store = Store()
        own = run(network, one, noise)
        cached.append(store.tensors())
        assert len(cached[-1]) == CACHED_TENSORS
        assert all(map(torch.equal, cached[0], cached[-1]))
        network.reference_cache = first
        assert torch.equal(run(network, one, noise), own)
        assert first.computed == 1


def test_references_a_then_b_then_a_again_give_the_first_image_bit_for_bit(network: Flux) -> None:
    network.reference_cache = store = Store()
    first, second = tiny.pictures(1, 2), tiny.pictures(3)
    a, b, again = (
        run(network, tiny.conditioning(1, references), tiny.noise())
        for references in (first, second, first)
    )
    assert store.computed == 2
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    network.reference_cache = cache_for_the_run
    assert torch.equal(a, run(network, tiny.conditioning(1, first), tiny.noise()))


def test_contents_order_and_ids_of_references_all_matter(network: Flux) -> None:
    one, two = tiny.pictures(1, 2)
    base = run(network, tiny.conditioning(1, (one, two)), tiny.noise())
    for references in (
        (one,),
        (one, replace(two, values=two.values + 0.01)),
        (one, replace(two, ids=two.ids + 1)),
        tiny.pictures(2, 1),
    ):
        other = run(network, tiny.conditioning(1, references), tiny.noise())
        assert float((other - base).abs().max()) > 1e-4


@pytest.mark.parametrize("seeds", [(1,), (1, 2), (3, 1, 2)])
@pytest.mark.parametrize("sigma", [1.0, 0.43])
def test_it_equals_full_attention_with_the_published_mask(network: Flux, seeds, sigma) -> None:
    noise, one = tiny.noise(7), tiny.conditioning(4, tiny.pictures(*seeds))
    with torch.no_grad():
        plan = network.plan(one, noise, [sigma, 0.0])
        found = plan.velocity(noise.values, sigma)
        expected = masked_velocity(network, one, noise, sigma)
        unmasked = masked_velocity(network, one, noise, sigma, masked=False)
        timed = masked_velocity(network, one, noise, sigma, reference_time=sigma)
    assert (found - expected).abs().max().item() <= TOLERANCE
    assert (found - unmasked).abs().max().item() > 1e-4, "the mask matters here"
    assert (found - timed).abs().max().item() > 1e-4, "the references' time matters here"


@pytest.mark.parametrize("shared", [True, False], ids=["one set for all", "a set each"])
def test_a_batch_of_three_equals_three_single_runs(network: Flux, shared: bool) -> None:
    references = tiny.pictures(1, 2, batch=1 if shared else 3)
    noise, one = tiny.noise(8, batch=3), tiny.conditioning(5, references)
    network.reference_cache = store = Store()
    whole = run(network, one, noise)
    assert {tensor.shape[0] for tensor in store.tensors()} == {1 if shared else 3}
    for number in range(3):
        at = slice(number, number + 1)
        own = references
        if not shared:
            own = tuple(replace(tokens, values=tokens.values[at]) for tokens in references)
        seen = tiny.conditioning(5, own)
        network.reference_cache = cache_for_the_run
        alone = run(network, seen, replace(noise, values=noise.values[at]))
        torch.testing.assert_close(alone, whole[at], atol=TOLERANCE, rtol=0)


def test_bfloat16_stays_near_float32() -> None:
    one, noise = tiny.conditioning(1, tiny.pictures(1, 2)), tiny.noise()
    wide, narrow = (
        run(tiny.network(FAMILY, dtype=dtype), one, noise)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert float((wide - narrow).abs().max()) < 0.05 * float(wide.abs().max())


def test_nothing_is_cached_without_references_or_on_a_model_that_was_not_trained_for_it() -> None:
    kv, plain, store = tiny.network(FAMILY), tiny.network(FLUX2_KLEIN_9B), Store()
    kv.reference_cache = plain.reference_cache = store
    bare = tiny.conditioning(1)
    assert torch.equal(run(kv, bare, tiny.noise()), run(plain, bare, tiny.noise()))
    run(plain, tiny.conditioning(1, tiny.pictures(1)), tiny.noise())
    assert store.computed == 0


def test_its_size_is_known_before_it_is_computed(network: Flux) -> None:
    foretold = []

    def hold(references: tuple[Tokens, ...], computed):
        foretold.append(computed.cached_bytes)
        return tuple(computed)

    network.reference_cache = hold
    plan = network.plan(
        tiny.conditioning(1, tiny.pictures(1, 2)), tiny.noise(), torch.tensor([1.0, 0.0])
    )
    held = [tensor for kv in plan.cached for tensor in (kv.key, kv.value)]
    assert foretold == [sum(tensor.numel() * tensor.element_size() for tensor in held)]
