"""Attention with the log-sum-exp of its logits: what merges attentions over parts of the keys."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glassbox.flux_core.families import FLUX2_KLEIN_9B_KV
from glassbox.flux_core.tokens.sequence import TokenSequence, arrange
from glassbox.flux_core.transformer import attention as module
from glassbox.flux_core.transformer.attention import PyTorchAttention, Where
from glassbox.flux_core.transformer.references import JoinedReferences, KeyValue, _Recorder
from glassbox.flux_core.values import Reference
from glassbox.tests.core import tiny_flux2

# batch, queries, keys, heads, channels
SHAPES = [
    (1, 7, 7, 2, 16),
    (2, 3, 33, 4, 8),
    (1, 40, 5, 1, 64),
    (3, 1, 129, 2, 128),
    (1, 130, 1, 3, 12),
    (1, 257, 1031, 2, 24),
]
WHERE = Where(
    step=0,
    sigma=1.0,
    block=0,
    queries=TokenSequence(()),
    keys=TokenSequence(()),
    rope=torch.ones(1, 1, 1, dtype=torch.complex64),
)


def heads(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, count, channels = shape
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, count, channels, generator=draw)
    k = torch.randn(batch, keys, count, channels, generator=draw)
    return q, k, torch.randn(batch, keys, count, channels, generator=draw)


def by_math(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    attended = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.double())
    return attended.flatten(2), logits.exp().sum(-1).log()


@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_lse_are_those_of_the_formula(shape) -> None:
    q, k, v = heads(shape)
    expected, exact = by_math(q, k, v)
    plain = PyTorchAttention()(q, k, v, WHERE)
    attended, lse = PyTorchAttention().with_lse(q, k, v, WHERE)
    for found in (plain, attended):
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_bfloat16_has_its_lse_in_float32(shape) -> None:
    q, k, v = (one.bfloat16() for one in heads(shape))
    attended, lse = PyTorchAttention().with_lse(q, k, v, WHERE)
    expected, exact = by_math(q, k, v)
    assert (attended.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(attended.double(), expected, atol=0.03, rtol=0)
    torch.testing.assert_close(lse.double(), exact, atol=1e-3, rtol=0)


def merge(parts: list[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Attention over all keys from attention over parts of them."""
    whole = torch.stack([lse for _, lse in parts]).logsumexp(0)
    total = torch.zeros(())
    for attended, lse in parts:
        weight = (lse - whole).exp().transpose(1, 2)[..., None]  # (B, Q, H, 1)
        total = total + weight * attended.unflatten(-1, (count, -1))
    return total.flatten(2)


@pytest.mark.parametrize("shape", [one for one in SHAPES if one[2] > 4])
def test_halves_of_the_keys_merge_to_all_of_them(shape) -> None:
    q, k, v = heads(shape)
    attention = PyTorchAttention()
    whole = attention(q, k, v, WHERE)
    middle = shape[2] // 3
    halves = [
        attention.with_lse(q, k[:, part], v[:, part], WHERE)
        for part in (slice(0, middle), slice(middle, None))
    ]
    torch.testing.assert_close(merge(halves, shape[3]), whole, atol=1e-6, rtol=0)
    assert float((halves[0][0] - whole).abs().max()) > 1e-3


class Elsewhere(Tensor):
    """A tensor that says it is on a device without kernels of PyTorch's for this."""

    device = torch.device("mps")


@pytest.mark.parametrize("shape", SHAPES)
def test_by_hand_it_is_the_same(shape) -> None:
    q, k, v = (one.transpose(1, 2) for one in heads(shape))
    attended, lse = module._by_hand(q, k, v)
    expected, exact = by_math(*heads(shape))
    attended = attended.transpose(1, 2).flatten(2)
    torch.testing.assert_close(attended.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse.double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", [1, 100, 2000])
def test_by_hand_in_pieces_it_is_the_same(shape, elements: int, monkeypatch) -> None:
    sizes: list[int] = []
    by_hand = module._by_hand

    def piece(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return by_hand(q, k, v)

    monkeypatch.setattr(module, "_MATH_ELEMENTS", elements)
    monkeypatch.setattr(module, "_by_hand", piece)
    q, k, v = heads(shape)
    there = [one.as_subclass(Elsewhere) for one in (q, k, v)]
    found = PyTorchAttention().with_lse(*there, WHERE)
    for one, other in zip(found, PyTorchAttention().with_lse(q, k, v, WHERE), strict=True):
        torch.testing.assert_close(one.as_subclass(Tensor), other, atol=1e-6, rtol=1e-6)
    row = shape[0] * shape[3] * shape[2]  # logits of one query
    assert max(sizes) <= max(elements, row), "no piece is larger than was asked"


class Without(PyTorchAttention):
    """An attention that has no lse, as ComfyUI's may have none."""

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> None:
        return None


def joined(inner: PyTorchAttention) -> tuple[JoinedReferences, list[Tensor], Where]:
    """An attention with cached references of two blocks joined, and what block 0 hands to it."""
    references = [Reference(tokens=one) for one in tiny_flux2.pictures(1)]
    sequence = arrange(
        text=torch.zeros(4, 4),
        target=tiny_flux2.noise(),
        references=references,
        order=FLUX2_KLEIN_9B_KV.references.sequence,
    )
    own = sequence.only("text", "target")
    count = len(sequence) - len(own)
    cached = [KeyValue(*heads((1, 1, count, 2, 16), seed)[1:]) for seed in (1, 2)]
    where = replace(WHERE, queries=own, keys=own)
    q, k, v = heads((1, len(own), len(own), 2, 16))
    return JoinedReferences(inner, cached, sequence), [q, k, v], where


def test_an_attention_without_lse_says_so_through_joined_references() -> None:
    attention, qkv, where = joined(Without())
    assert attention.with_lse(*qkv, where) is None
    plain = joined(PyTorchAttention())[0]
    assert torch.equal(attention(*qkv, where), plain(*qkv, where)), "asking used up no block"
    second = replace(where, block=1)
    assert torch.equal(attention(*qkv, second), plain(*qkv, second))
    assert not torch.equal(plain(*qkv, second), joined(PyTorchAttention())[0](*qkv, where))


def test_joined_references_have_the_lse_of_all_keys() -> None:
    attention, (q, k, v), where = joined(PyTorchAttention())
    attended, lse = attention.with_lse(q, k, v, where)
    _, alone = PyTorchAttention().with_lse(q, k, v, where)
    assert bool((lse > alone).all()), "more keys, a larger sum"
    torch.testing.assert_close(attended, joined(PyTorchAttention())[0](q, k, v, where))


def test_an_attention_without_lse_computes_a_network_all_the_same() -> None:
    """The pass of references and the steps fall back to plain calls."""

    class Asking(Without):
        """Asks for the lse first, as a wrapper does."""

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
            assert self.with_lse(q, k, v, where) is None
            return super().__call__(q, k, v, where)

    net, noise = tiny_flux2.network(FLUX2_KLEIN_9B_KV), tiny_flux2.noise()
    one = tiny_flux2.conditioning(1, tiny_flux2.pictures(1, 2))
    results = []
    for net.attention in (PyTorchAttention(), Asking()):
        with torch.no_grad():
            results.append(net.plan(one, noise, [0.7, 0.0]).velocity(noise.values, 0.7))
    assert torch.equal(*results)


@pytest.mark.parametrize("asks_lse", [False, True])
def test_keys_and_values_are_recorded_however_a_block_asks(asks_lse: bool) -> None:
    recorder, (q, k, v) = _Recorder(PyTorchAttention()), heads(SHAPES[0])
    if asks_lse:
        found, _ = recorder.with_lse(q, k, v, WHERE)
    else:
        found = recorder(q, k, v, WHERE)
    torch.testing.assert_close(found, PyTorchAttention()(q, k, v, WHERE))
    taken = recorder.take()
    assert torch.equal(taken.key, k)
    assert torch.equal(taken.value, v)
    assert _Recorder(Without()).with_lse(q, k, v, WHERE) is None


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 0), (0, 0)])
def test_no_query_or_no_key_is_no_crash(queries: int, keys: int) -> None:
    """PyTorch's kernel on the CPU stops the process there."""
    q, k = torch.ones(1, queries, 2, 8), torch.ones(1, keys, 2, 8)
    attended, lse = PyTorchAttention().with_lse(q, k, k, None)
    assert attended.shape == (1, queries, 16)
    assert lse.shape == (1, 2, queries)
    assert bool((attended == 0).all()) == (keys == 0 or queries == 0)


def test_channels_apart_in_memory_are_read_as_they_are() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 7, 8, 2, generator=generator).transpose(2, 3) for _ in range(3))
    found = PyTorchAttention().with_lse(q, k, v, None)
    expected = PyTorchAttention().with_lse(q.contiguous(), k.contiguous(), v.contiguous(), None)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
