"""Attention as it is handed in: when the network calls it, and what it is told."""

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.families import FLUX1_KONTEXT, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B_KV
from glassbox.flux_core.sampling.guidance import TrueCFG
from glassbox.flux_core.sampling.job import Job
from glassbox.flux_core.sampling.run import run
from glassbox.flux_core.sampling.sigmas import parse_sigmas
from glassbox.flux_core.specs import FluxFamily
from glassbox.flux_core.tokens.sequence import TokenSequence
from glassbox.flux_core.transformer.attention import PyTorchAttention, Where
from glassbox.flux_core.transformer.blocks import DoubleBlock, SingleBlock
from glassbox.flux_core.transformer.flux import Flux, cache_for_the_run
from glassbox.flux_core.transformer.references import KeyValue
from glassbox.flux_core.transformer.rope import unrotate
from glassbox.flux_core.values import Conditioning, Tokens
from glassbox.tests.core import tiny_flux1, tiny_flux2

SIGMAS = parse_sigmas("1, 0.7, 0.2, 0")
LEVELS = [float(sigma) for sigma in SIGMAS[:-1]]
FAMILIES = [FLUX1_KONTEXT, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B_KV]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=[one.name for one in FAMILIES])
KV = FLUX2_KLEIN_9B_KV


class Watching:
    """Plain attention; it remembers every call."""

    name = "watching"

    def __init__(self) -> None:
        self.inner = PyTorchAttention()
        self.calls: list[tuple[Where, Tensor, Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        self.calls.append((where, q, k, v))
        return self.inner(q, k, v, where)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        return self.inner.with_lse(q, k, v, where)

    @property
    def wheres(self) -> list[Where]:
        return [where for where, *_ in self.calls]


def parts(family: FluxFamily, references: int = 2) -> tuple[Flux, Conditioning, Tokens]:
    """A network, a conditioning with references, and noise."""
    if family is FLUX1_KONTEXT:
        seen = [tiny_flux1.picture(1), tiny_flux1.picture(2, size=48, index=2.0)][:references]
        return tiny_flux1.network(), tiny_flux1.conditioning(3, *seen), tiny_flux1.noise()
    seen = tiny_flux2.pictures(1, 2)[:references]
    return tiny_flux2.network(family), tiny_flux2.conditioning(3, seen), tiny_flux2.noise()


def names(sequence: TokenSequence) -> list[str]:
    return [segment.name for segment in sequence.segments]


def block_count(net: Flux) -> int:
    return net.spec.double_blocks + net.spec.single_blocks


@every_family
@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_each_block_of_each_step_calls_it_once(family, references: int, solver: str) -> None:
    net, one, noise = parts(family, references)
    net.attention = watching = Watching()
    planned = run(net, Job(conditioning=one, noise=noise, sigmas=SIGMAS, solver=solver))
    before = len(watching.calls)  # the pass of isolated references
    list(planned)
    steps = [0, 1, 2] if solver == "euler" else [0, 1, 1, 2, 2]
    expected = [(step, LEVELS[step], block) for step in steps for block in range(block_count(net))]
    assert [(at.step, at.sigma, at.block) for at in watching.wheres[before:]] == expected
    alone = block_count(net) - 1 if references and family is KV else 0
    assert before == alone, "nobody reads what references become in the last block"


def test_the_end_of_a_run_that_stops_above_zero_begins_no_step() -> None:
    """Heun looks at the end of the last step, which belongs to that step."""
    net, one, noise = parts(FLUX1_KONTEXT)
    net.attention = watching = Watching()
    job = Job(conditioning=one, noise=noise, sigmas=SIGMAS[:3], solver="heun")
    list(run(net, job, may_stop=True))
    told = [(at.sigma, at.step) for at in watching.wheres if at.block == 0]
    assert told == [(LEVELS[0], 0), (LEVELS[1], 1), (LEVELS[1], 1), (LEVELS[2], 1)]


@every_family
@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("cache", [cache_for_the_run, tiny_flux2.compute_every_step])
def test_it_is_told_what_the_tokens_of_q_and_k_are(family, references: int, cache) -> None:
    net, one, noise = parts(family, references)
    net.attention, net.reference_cache = watching, _ = Watching(), cache
    list(run(net, Job(conditioning=one, noise=noise, sigmas=SIGMAS)))
    seen = ["reference 1", "reference 2"][:references]
    alone = 0
    for where, q, k, v in watching.calls:
        assert len(where.queries) == q.shape[1] == where.rope.shape[0]
        assert len(where.keys) == k.shape[1] == v.shape[1]
        if names(where.keys) == seen and seen:
            assert names(where.queries) == seen
            assert (where.step, where.sigma) == (0, 0.0)
            alone += 1
        elif family is KV:
            assert names(where.keys) == ["text", *seen, "target"]
            last = where.block == block_count(net) - 1
            assert names(where.queries) == (["target"] if last else ["text", "target"])
        else:
            assert names(where.keys) == ["text", "target", *seen]
            last = where.block == block_count(net) - 1
            assert names(where.queries) == (["target"] if last else names(where.keys))
    passes = (1 if cache is cache_for_the_run else 3) if family is KV and references else 0
    assert alone == passes * (block_count(net) - 1)


def test_cached_references_stand_among_the_keys_where_the_sequence_has_them() -> None:
    held: list[tuple[KeyValue, ...]] = []

    def hold(references: tuple[Tokens, ...], computed: Iterable[KeyValue]):
        held.append(tuple(computed))
        return held[-1]

    net, one, noise = parts(KV)
    net.attention, net.reference_cache = watching, _ = Watching(), hold
    planned = run(net, Job(conditioning=one, noise=noise, sigmas=SIGMAS))
    watching.calls.clear()
    list(planned)
    counts = [seen.tokens.count for seen in one.references]
    for where, _, k, v in watching.calls:
        at = where.keys.range_of("reference")
        assert (at.start, at.stop) == (6, 6 + sum(counts)), "after the text's 6 tokens"
        assert torch.equal(k[:, at], held[0][where.block].key)
        assert torch.equal(v[:, at], held[0][where.block].value)
        assert not torch.equal(k[:, at], held[0][where.block - 1].key)


@every_family
def test_its_result_is_what_the_network_goes_on_with(family) -> None:
    """Twice the attention is attention over values of twice the weights."""

    class Twice(Watching):
        def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
            return 2 * super().__call__(q, k, v, where)

    net, one, noise = parts(family)
    wide, plain = copy.deepcopy(net), copy.deepcopy(net)
    for name, weight in wide.blocks.named_parameters():
        if "qkv" in name or "linear1" in name:
            hidden = net.spec.hidden
            weight.data[2 * hidden : 3 * hidden] *= 2
    net.attention = Twice()
    job = Job(conditioning=one, noise=noise, sigmas=SIGMAS)
    found, expected, other = ([step.x for step in run(each, job)] for each in (net, wide, plain))
    for one_x, wide_x in zip(found, expected, strict=True):
        torch.testing.assert_close(one_x, wide_x, atol=1e-5, rtol=0)
    assert float((found[-1] - other[-1]).abs().max()) > 1e-3


@every_family
def test_a_query_without_its_rotation_is_the_normed_query(family, monkeypatch) -> None:
    """In float32, 1e-6: what a query was before it was turned, whatever block it is of."""
    net, one, noise = parts(family)
    norms = [type(module.norm) for module in net.blocks.modules() if hasattr(module, "norm")]
    normed: list[Tensor] = []
    original = norms[0].query

    def query(norm, q: Tensor) -> Tensor:
        normed.append(original(norm, q))
        return normed[-1]

    monkeypatch.setattr(norms[0], "query", query)
    net.attention = watching = Watching()
    planned = run(net, Job(conditioning=one, noise=noise, sigmas=SIGMAS[1:], solver="euler"))
    for clear in (normed, watching.calls):
        clear.clear()
    next(iter(planned))
    kinds = [*net.blocks.double_blocks, *net.blocks.single_blocks]
    for (where, q, *_), block in zip(watching.calls, kinds, strict=True):
        if isinstance(block, DoubleBlock):
            before = torch.cat((normed.pop(0), normed.pop(0)), dim=1)  # text, then image
        else:
            assert isinstance(block, SingleBlock)
            before = normed.pop(0)
            if where.block == block_count(net) - 1:
                text = one.text.txt.shape[1]
                before = before[:, text : text + noise.count]
        torch.testing.assert_close(unrotate(q, where.rope), before, atol=1e-6, rtol=0)
        assert float((q - before).abs().max()) > 1e-2, "the rotation matters here"
    assert normed == []


@pytest.mark.parametrize("passes", ["batched", "in turn"])
def test_both_passes_of_true_cfg_go_through_it(passes: str) -> None:
    net, one, noise = parts(FLUX1_KONTEXT)
    net.attention = watching = Watching()
    cfg = TrueCFG(negative=one, scale=2.0, end=0.5, passes=passes)
    list(run(net, Job(conditioning=one, noise=noise, sigmas=SIGMAS, cfg=cfg)))
    twice = [2] if passes == "batched" else [1, 1]
    batches = {step: [] for step in range(3)}
    for where, q, *_ in watching.calls:
        if where.block == 0:
            batches[where.step].append(q.shape[0])
    assert batches == {0: twice, 1: twice, 2: [1]}
